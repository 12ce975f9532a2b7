//! What the load client counts, and what it does not let pass.

mod support;

use std::time::Duration;

use anyhow::ensure;
use backend_sim::{
    certificate::Trust,
    load::{Load, Options, Report},
    serve::{Misbehaviour, Origin, Settings},
};
use support::{LossyLink, NAME, settings, soon};

#[tokio::test]
async fn a_load_counts_what_it_has_verified() -> anyhow::Result<()> {
    let (report, origin) = load(settings()?, |options| {
        options.connections = 4;
        options.concurrency = 2;
        options.sizes = vec![0, 1, 100_000];
        options.rebind_every = Some(Duration::from_millis(200));
        options.migrate_every = Some(Duration::from_millis(300));
        options.lifetime = Some(Duration::from_millis(800));
        options.duration = Duration::from_secs(2);
    })
    .await?;
    ensure!(report.is_clean(), "{report:?}");
    ensure!(report.connections > 4, "connections have a lifetime: {report:?}");
    ensure!(report.rebinds > 0 && report.migrations > 0, "{report:?}");
    ensure!(report.bytes_verified > 100_000 && report.latency.max_us > 0, "{report:?}");
    ensure!(report.backends["a"] == report.requests, "{report:?}");
    let counters = origin.counters();
    ensure!(counters.accepted == report.connections, "{counters:?} {report:?}");
    ensure!(counters.requests >= report.requests, "{counters:?} {report:?}");
    Ok(())
}

#[tokio::test]
async fn a_server_in_several_shards_follows_clients_that_move() -> anyhow::Result<()> {
    let mut settings = settings()?;
    settings.shards = 3;
    let (report, origin) = load(settings, |options| {
        options.connections = 6;
        options.rebind_every = Some(Duration::from_millis(100));
        options.duration = Duration::from_secs(1);
    })
    .await?;
    ensure!(report.is_clean() && report.rebinds > 0, "{report:?}");
    ensure!(origin.counters().unclaimed == 0, "{:?}", origin.counters());
    Ok(())
}

#[tokio::test]
async fn an_open_loop_asks_as_often_as_it_was_told() -> anyhow::Result<()> {
    let (report, _origin) = load(settings()?, |options| {
        options.connections = 5;
        options.rate = Some(50.0);
        options.duration = Duration::from_secs(2);
    })
    .await?;
    ensure!(report.is_clean() && report.requests == 100, "{report:?}");
    Ok(())
}

#[tokio::test]
async fn one_wrong_octet_does_not_pass() -> anyhow::Result<()> {
    let mut settings = settings()?;
    settings.misbehaviour = Misbehaviour::WrongBody;
    let (report, _origin) = load(settings, |options| options.sizes = vec![100_000]).await?;
    ensure!(report.requests == 0 && report.bytes_verified == 0, "{report:?}");
    ensure!(report.requests_failed["body"] > 0 && !report.is_clean(), "{report:?}");
    Ok(())
}

#[tokio::test]
async fn answers_from_another_backend_are_misrouted() -> anyhow::Result<()> {
    let mut settings = settings()?;
    settings.misbehaviour = Misbehaviour::TwoFaced;
    let (report, _origin) = load(settings, |_| ()).await?;
    ensure!(report.misrouted == report.requests / 2, "{report:?}");
    ensure!(report.misrouted > 0 && !report.is_clean(), "{report:?}");
    Ok(())
}

#[tokio::test]
async fn a_connection_that_falls_silent_is_lost() -> anyhow::Result<()> {
    // A runtime of its own, which ends without a word.
    let server = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let origin = server.spawn(async { anyhow::Ok(Origin::start(settings()?).await?) }).await??;
    let load = Load::start(options(&origin))?;
    soon("an answer comes", || load.report().requests > 0).await?;
    server.shutdown_background();
    let report = load.finish().await;
    ensure!(report.lost == 1 && report.lost_by_cause["silent"] == 1, "{report:?}");
    ensure!(!report.is_clean(), "{report:?}");
    Ok(())
}

#[tokio::test]
async fn handshakes_that_fail_have_a_cause() -> anyhow::Result<()> {
    let mut settings = settings()?;
    settings.misbehaviour = Misbehaviour::Refusing;
    let (report, _origin) = load(settings, |_| ()).await?;
    ensure!(report.connections == 0 && !report.is_clean(), "{report:?}");
    ensure!(report.handshakes_failed["refused_by_peer"] > 0, "{report:?}");
    Ok(())
}

#[tokio::test]
async fn handshakes_that_had_to_say_something_again_are_counted() -> anyhow::Result<()> {
    let origin = Origin::start(settings()?).await?;
    let link = LossyLink::start(origin.address()).await?;
    let mut options = options(&origin);
    options.target = link.address;
    options.duration = Duration::from_secs(2);
    let report = Load::start(options)?.finish().await;
    ensure!(report.is_clean() && report.connections == 1, "{report:?}");
    ensure!(report.handshakes_repeated == 1, "{report:?}");
    ensure!(report.to_string().contains("repeated    1 handshakes"), "{report}");
    // Where everything is answered none is.
    let (report, _origin) = load(settings()?, |_| ()).await?;
    ensure!(report.connections > 0 && report.handshakes_repeated == 0, "{report:?}");
    ensure!(!report.to_string().contains("repeated"), "{report}");
    Ok(())
}

#[tokio::test]
async fn servers_that_are_not_trusted_are_not_asked() -> anyhow::Result<()> {
    let (report, origin) =
        load(settings()?, |options| options.trust = Trust::Roots(vec![])).await?;
    ensure!(report.requests == 0 && report.handshakes_failed["tls"] > 0, "{report:?}");
    ensure!(origin.counters().requests == 0, "{:?}", origin.counters());
    Ok(())
}

#[tokio::test]
async fn a_server_that_drains_loses_nobody() -> anyhow::Result<()> {
    let origin = Origin::start(settings()?).await?;
    let mut options = options(&origin);
    options.duration = Duration::from_secs(2);
    options.connections = 3;
    let load = Load::start(options)?;
    soon("ten answers come", || load.report().requests >= 10).await?;
    origin.drain(Duration::from_secs(10)).await;
    let report = load.report();
    load.stop();
    let after = load.finish().await;
    ensure!(report.lost == 0 && report.requests_failed.is_empty(), "{report:?}");
    ensure!(after.lost == 0 && after.misrouted == 0, "{after:?}");
    Ok(())
}

fn options(origin: &Origin) -> Options {
    let mut options = Options::new(origin.address(), NAME, Trust::Everybody);
    options.duration = Duration::from_millis(300);
    options
}

async fn load(
    settings: Settings,
    change: impl FnOnce(&mut Options),
) -> anyhow::Result<(Report, Origin)> {
    let origin = Origin::start(settings).await?;
    let mut options = options(&origin);
    change(&mut options);
    Ok((Load::start(options)?.finish().await, origin))
}
