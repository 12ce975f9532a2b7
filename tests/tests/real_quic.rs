//! quinn clients, the balancer, quinn servers; on loopback, without privileges.
//!
//! Every scenario ends with [`Site::check`] or one of its sisters: no connection lost, no datagram at
//! a server that did not issue its connection ID, one verdict for each datagram.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::ensure;
use quic::routable::Key;
use quic_lb_tests::{
    balancer::Reload,
    certificate::ALPN,
    client::{Client, download, each, echo, who},
    document::{Listener, Pool, Scheme, free_address},
    metrics::Metrics,
    nat::Nat,
    noise,
    origin::{Cids, OPAQUE_CID_LEN},
    site::{LOCAL, LOCAL_V6, Site, configured, local},
};
use tokio::task::JoinSet;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// What a download is long enough for, a rebind each 256 KiB: twice what is asked for, since a port
/// that is given up before it has sent anything is none that anybody saw.
const REBINDS: usize = 24;
const REBOUND_DOWNLOAD: usize = (REBINDS + 1) * 256 * KIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_goes_both_ways_unharmed() -> anyhow::Result<()> {
    let site = Site::start(web(Scheme::FOUR_PASS)).await?;
    let client = site.client(LOCAL)?;
    let connection = client.connect(site.address()).await?;

    download(&connection, 24 * MIB, |_| {}).await?;
    echo(&connection, 8 * MIB, |_| {}).await?;

    client.close().await;
    let metrics = site.check().await?;
    ensure!(metrics.by_rule("cid") > metrics.verdicts().received * 9 / 10, "by connection ID");
    ensure!(metrics.verdicts().dropped == 0, "nothing was dropped");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_one_client_socket_go_to_different_backends() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 60;
    let site = Site::start(web(Scheme::SINGLE_PASS)).await?;
    let client = site.client(LOCAL)?;

    let mut downloads = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (client, address) = (client.clone(), site.address());
        downloads.spawn(async move {
            let connection = client.connect(address).await?;
            let server = who(&connection).await?;
            download(&connection, 100 * KIB, |_| {}).await?;
            ensure!(who(&connection).await? == server, "another server");
            Ok(())
        });
    }
    all(downloads).await?;

    client.close().await;
    site.check().await?;
    ensure!(site.accepted() == CONNECTIONS, "{} connections", site.accepted());
    for origin in &site.origins {
        // Three backends alike: twenty each, give or take what chance does.
        ensure!(origin.accepted() >= 5, "{} has {}", origin.name(), origin.accepted());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_survive_a_client_that_changes_its_port_all_the_time() -> anyhow::Result<()> {
    for scheme in [Scheme::FOUR_PASS, Scheme::SINGLE_PASS, Scheme::CLEAR] {
        moved_downloads(Site::start(web(scheme)).await?, |_| LOCAL).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_survive_a_client_that_changes_its_address_all_the_time() -> anyhow::Result<()> {
    let address = |nth| local(10 + u8::try_from(nth % 100).expect("below 100"));
    moved_downloads(Site::start(web(Scheme::FOUR_PASS)).await?, address).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_survive_a_nat_that_rebinds_all_the_time() -> anyhow::Result<()> {
    let site = Site::start(web(Scheme::FOUR_PASS)).await?;
    rebound_downloads(site).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_pool_without_routable_ids_survive_a_nat_that_rebinds()
-> anyhow::Result<()> {
    let site = Site::start(Pool::new("plain", &[], LOCAL, 3)).await?;
    rebound_downloads(site).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_server_that_ignores_its_configuration_survive_a_nat_that_rebinds()
-> anyhow::Result<()> {
    let opaque = |_: &_, _: &str, _: &str| Ok(Cids::Opaque(OPAQUE_CID_LEN));
    let site = Site::of(vec![(LOCAL, web(Scheme::FOUR_PASS))], opaque).await?;
    rebound_downloads(site).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_tell_quinn_servers_whose_connection_ids_lead_to_them() -> anyhow::Result<()> {
    // The first does as it should, the second ignores its configuration, the third has another's key.
    let cids = |config: &_, pool: &str, backend: &str| match backend {
        "web-a" => Cids::of(config, pool, backend, None),
        "web-b" => Ok(Cids::Opaque(OPAQUE_CID_LEN)),
        _ => Cids::with_key(config, pool, backend, &Key::new([9; 16])),
    };
    let site = Site::of(vec![(LOCAL, web(Scheme::SINGLE_PASS))], cids).await?;
    let alpn = str::from_utf8(ALPN)?;
    let check =
        format!("{{ kind: quic, interval: 1s, timeout: 1s, alpn: {alpn}, certificate: ignored }}");
    let text = site.document.to_string();
    let checked =
        text.replace("    backends:\n", &format!("    health_check: {check}\n    backends:\n"));
    site.balancer.write_config(&checked)?;
    let state = |name: &'static str, wanted: &'static str| {
        site.balancer.wait_for(wanted, move |metrics| metrics.backend_state(name) == Some(wanted))
    };
    state("web-b", "miswired").await?;
    state("web-c", "miswired").await?;
    let labels = [("backend", "web-a"), ("result", "answered")];
    let metrics = site
        .balancer
        .wait_for("checks", |metrics| metrics.sum("backend_checks_total", &labels) > 2)
        .await?;
    ensure!(metrics.backend_state("web-a") == Some("active"), "{}", site.balancer.log());
    let miswired = metrics.sum("backend_checks_total", &[labels[0], ("result", "miswired")]);
    ensure!(miswired == 0, "{}", site.balancer.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_does_all_that_ipv4_does() -> anyhow::Result<()> {
    let pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL_V6, 3);
    let site = Site::of(vec![(LOCAL_V6, pool)], configured).await?;
    moved_downloads_from(site, LOCAL_V6, |_| LOCAL_V6).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_may_use_different_configurations_at_once() -> anyhow::Result<()> {
    let schemes = [Scheme::FOUR_PASS, Scheme::SINGLE_PASS];
    let pool = Pool::new("web", &schemes, LOCAL, 3);
    // As in the middle of a rotation: some servers have moved on, others have not.
    let cids = |config: &_, pool: &str, backend: &str| {
        let scheme = if backend == "web-a" { schemes[0] } else { schemes[1] };
        Cids::of(config, pool, backend, Some(scheme.config_id))
    };
    moved_downloads(Site::of(vec![(LOCAL, pool)], cids).await?, |_| LOCAL).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_listeners_lead_to_their_own_pools() -> anyhow::Result<()> {
    let pools = vec![
        (LOCAL, Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 2)),
        (LOCAL, Pool::new("media", &[Scheme::SINGLE_PASS], LOCAL_V6, 2)),
        (LOCAL_V6, Pool::new("plain", &[], LOCAL, 1)),
    ];
    let site = Site::of(pools, configured).await?;

    for listener in &site.document.listeners {
        let client = site.client(listener.address.ip())?;
        for _ in 0..6 {
            let connection = client.connect(listener.address).await?;
            download(&connection, 200 * KIB, |_| {}).await?;
            let server = who(&connection).await?;
            ensure!(server.starts_with(&listener.pool), "{server} for {}", listener.name);
        }
        client.close().await;
    }

    let metrics = site.check().await?;
    for listener in &site.document.listeners {
        let label = [("listener", listener.name.as_str())];
        ensure!(metrics.sum("datagrams_received_total", &label) > 0, "{}", listener.name);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_changes_under_its_connections() -> anyhow::Result<()> {
    let mut site = Site::start(web(Scheme::FOUR_PASS)).await?;
    let early = Crowd::start(&site, 12).await?;
    early.all_go_on(|_| true).await?;

    let added = site.add_backend(Reload::Signal).await?;
    early.all_go_on(|_| true).await?;
    let late = Crowd::start(&site, 12).await?;
    ensure!(late.servers().any(|server| server == added), "the new server gets connections");

    site.drain_backend("web-a", Reload::FileChange).await?;
    let drained = site.origin("web-a").accepted();
    early.all_go_on(|_| true).await?;
    let latest = Crowd::start(&site, 12).await?;
    ensure!(latest.servers().all(|server| server != "web-a"), "nothing new for who drains");
    ensure!(site.origin("web-a").accepted() == drained, "nothing new for who drains");

    site.remove_backend("web-b").await?;
    let crowds = [early, late, latest];
    for crowd in &crowds {
        crowd.all_go_on(|server| server != "web-b").await?;
    }
    ensure!(crowds.iter().flat_map(Crowd::servers).any(|server| server == "web-b"), "to lose");
    for crowd in crowds {
        crowd.end(|server| server != "web-b").await?;
    }
    let metrics = site.check_except(&["web-b"]).await?;
    ensure!(metrics.sum("config_reloads_total", &[("result", "applied")]) == 3, "three reloads");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_come_and_go_and_no_connection_is_lost() -> anyhow::Result<()> {
    listeners_come_and_go(20, Duration::ZERO).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute: cargo test -p quic-lb-tests --test real_quic -- --ignored"]
async fn listeners_come_and_go_a_hundred_times_a_minute() -> anyhow::Result<()> {
    listeners_come_and_go(100, Duration::from_millis(550)).await
}

/// Two listeners come and go by so many reloads. Connections are on the one that stays, and on the two from the first time on that
/// they are there.
async fn listeners_come_and_go(reloads: usize, pause: Duration) -> anyhow::Result<()> {
    let mut site = Site::start(web(Scheme::FOUR_PASS)).await?;
    let stays = site.document.listeners[0].clone();
    let [one, other] = ["one", "other"].map(|name| Listener {
        name: name.to_owned(),
        address: free_address(LOCAL),
        ..stays.clone()
    });
    let mut crowds = vec![Crowd::start(&site, 6).await?];
    for nth in 1..=reloads {
        let listeners = match nth % 4 {
            1 => vec![stays.clone(), one.clone()],
            2 => vec![other.clone(), stays.clone(), one.clone()],
            3 => vec![other.clone(), stays.clone()],
            _ => vec![stays.clone()],
        };
        site.document.listeners = listeners;
        site.balancer.reload(&site.document, Reload::Signal)?;
        let applied = move |metrics: &Metrics| {
            metrics.sum("config_reloads_total", &[("result", "applied")]) == nth as u64
        };
        site.balancer.wait_for("the reload", applied).await?;
        match nth {
            1 => crowds.push(Crowd::start_at(&site, one.address, 3).await?),
            2 => crowds.push(Crowd::start_at(&site, other.address, 3).await?),
            _ => tokio::time::sleep(pause).await,
        }
        if nth % 5 == 0 || nth == reloads {
            for crowd in &crowds {
                crowd.all_go_on(|_| true).await?;
            }
        }
    }
    let newcomer = site.client(LOCAL)?;
    let gone = tokio::time::timeout(Duration::from_secs(2), newcomer.connect(one.address)).await;
    ensure!(!matches!(gone, Ok(Ok(_))), "a new connection at a listener that was removed");
    let metrics = site.balancer.metrics().await?;
    let refused = metrics.sum("datagrams_dropped_total", &[("reason", "listener_removed")]);
    ensure!(refused > 0, "it was refused for another reason");
    for crowd in crowds {
        crowd.end(|_| true).await?;
    }
    site.document.listeners = vec![stays, one, other];
    site.balancer.reload(&site.document, Reload::Signal)?;
    let applied = |metrics: &Metrics| {
        metrics.sum("config_reloads_total", &[("result", "applied")]) == reloads as u64 + 1
    };
    site.balancer.wait_for("the reload", applied).await?;
    site.check().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_configuration_changes_nothing() -> anyhow::Result<()> {
    let site = Site::start(web(Scheme::FOUR_PASS)).await?;
    let crowd = Crowd::start(&site, 6).await?;

    site.balancer.write_config("listeners: 7\npools: []\nnonsense: yes\n")?;
    let rejected = |m: &Metrics| m.sum("config_reloads_total", &[("result", "rejected")]) > 0;
    site.balancer.wait_for("the file is rejected", rejected).await?;

    crowd.all_go_on(|_| true).await?;
    crowd.end(|_| true).await?;
    let metrics = site.check().await?;
    for backend in ["web-a", "web-b", "web-c"] {
        ensure!(metrics.backend_state(backend) == Some("active"), "{backend} is still there");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_outlive_the_balancer() -> anyhow::Result<()> {
    let mut site = Site::start(web(Scheme::FOUR_PASS)).await?;
    let crowd = Crowd::start(&site, 12).await?;
    for _ in 0..2 {
        crowd.all_go_on(|_| true).await?;
        site.balancer.restart().await?;
    }
    crowd.all_go_on(|_| true).await?;
    crowd.client.rebind(LOCAL)?;
    crowd.all_go_on(|_| true).await?;
    crowd.end(|_| true).await?;
    site.check().await?;
    site.balancer.terminate().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_pool_without_routable_ids_outlive_the_balancer() -> anyhow::Result<()> {
    let mut site = Site::start(Pool::new("plain", &[], LOCAL, 3)).await?;
    let crowd = Crowd::start(&site, 6).await?;
    site.balancer.restart().await?;
    crowd.all_go_on(|_| true).await?;
    crowd.end(|_| true).await?;
    site.check().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn noise_harms_nobody_and_every_datagram_of_it_is_accounted_for() -> anyhow::Result<()> {
    const NOISE: usize = 20_000;
    let site = Site::start(web(Scheme::FOUR_PASS)).await?;
    let seed = noise::seed()?;
    println!("replay: NOISE_SEED={seed}");
    let sending = tokio::spawn(make_noise(site.address(), seed, NOISE));
    let client = site.client(LOCAL)?;
    let connection = client.connect(site.address()).await?;
    while !sending.is_finished() {
        download(&connection, MIB, each(256 * KIB, || client.rebind(LOCAL).expect("a port")))
            .await?;
    }
    sending.await??;

    client.close().await;
    let metrics = site.check_with_noise().await?;
    let verdicts = metrics.verdicts();
    ensure!(verdicts.received >= NOISE as u64, "{verdicts:?}");
    let reasons = ["malformed", "empty", "small_initial"];
    let dropped =
        reasons.map(|reason| metrics.sum("datagrams_dropped_total", &[("reason", reason)]));
    ensure!(dropped.iter().all(|&count| count > 0), "{reasons:?}: {dropped:?}");
    ensure!(
        verdicts.dropped == dropped.iter().sum::<u64>(),
        "dropped for no other reason than {reasons:?}: {dropped:?}, {verdicts:?}"
    );
    Ok(())
}

/// What all the others go by: that it shows when something is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_balancer_with_another_key_than_its_servers_is_found_out() -> anyhow::Result<()> {
    let site = Site::of(vec![(LOCAL, web(Scheme::FOUR_PASS))], |config, pool, backend| {
        Cids::with_key(config, pool, backend, &Key::new([7; 16]))
    })
    .await?;
    let client = site.client(LOCAL)?;
    let connection = client.connect(site.address()).await?;
    download(&connection, MIB, |_| {}).await?;
    site.check().await?;

    let misdelivered =
        || site.origins.iter().any(|origin| !origin.arrivals().misdelivered.is_empty());
    // Each new port is another draw of consistent hashing among three servers.
    for _ in 0..100 {
        client.rebind(LOCAL)?;
        tokio::time::sleep(Duration::from_millis(20)).await;
        if misdelivered() {
            break;
        }
    }

    ensure!(misdelivered(), "counted where it arrives");
    ensure!(site.check().await.is_err(), "and reported");
    Ok(())
}

/// Three servers with routable connection IDs.
fn web(scheme: Scheme) -> Pool {
    Pool::new("web", &[scheme], LOCAL, 3)
}

/// Six downloads through one client socket that moves to `address(n)` at its nth move, more than ten
/// times while each of them runs.
async fn moved_downloads(site: Site, address: impl Fn(usize) -> IpAddr) -> anyhow::Result<()> {
    moved_downloads_from(site, LOCAL, address).await
}

async fn moved_downloads_from(
    site: Site,
    from: IpAddr,
    address: impl Fn(usize) -> IpAddr,
) -> anyhow::Result<()> {
    const CLIENTS: usize = 6;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let client = site.client(from)?;
        let connection = client.connect(site.address()).await?;
        clients.push((client, connection));
    }
    for (client, connection) in &clients {
        let rebind = || client.rebind(address(client.rebinds())).expect("a free port");
        download(connection, REBOUND_DOWNLOAD, each(256 * KIB, rebind)).await?;
        ensure!(client.rebinds() >= 10, "{} rebinds", client.rebinds());
    }
    for (client, _) in clients {
        client.close().await;
    }
    let metrics = site.check().await?;
    let changes = metrics.sum("path_changes_total", &[]);
    ensure!(changes >= 10 * CLIENTS as u64, "{changes} path changes");
    Ok(())
}

/// Six downloads, each through a NAT of its own that rebinds more than ten times meanwhile. The
/// clients keep their paths alive, as any should behind a NAT: a server cannot reach a client behind
/// a new binding until it has heard of it.
async fn rebound_downloads(site: Site) -> anyhow::Result<()> {
    const CLIENTS: usize = 6;
    let mut downloads = JoinSet::new();
    for _ in 0..CLIENTS {
        let nat = Nat::start(site.address(), LOCAL).await?;
        let client = site.client(LOCAL)?.with_keep_alive();
        downloads.spawn(async move {
            let connection = client.connect(nat.address()).await?;
            let server = who(&connection).await?;
            let rebind = each(256 * KIB, || nat.rebind(LOCAL));
            download(&connection, REBOUND_DOWNLOAD, rebind).await?;
            ensure!(nat.rebinds() >= 10, "{} rebinds", nat.rebinds());
            ensure!(who(&connection).await? == server, "another server");
            client.close().await;
            Ok(())
        });
    }
    all(downloads).await?;
    site.check().await?;
    Ok(())
}

async fn make_noise(target: SocketAddr, seed: u64, count: usize) -> anyhow::Result<()> {
    let socket = tokio::net::UdpSocket::bind((target.ip(), 0)).await?;
    for (nth, datagram) in noise::datagrams(seed, count).enumerate() {
        socket.send_to(&datagram, target).await?;
        // Slower than the balancer, so that the kernel loses none of it.
        if nth % 20 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    Ok(())
}

async fn all(mut tasks: JoinSet<anyhow::Result<()>>) -> anyhow::Result<()> {
    while let Some(result) = tasks.join_next().await {
        result??;
    }
    Ok(())
}

/// Connections that download without end. They keep their paths alive: behind a new balancer, as
/// behind a new binding of a NAT, a server cannot reach a client until it has heard of it.
struct Crowd {
    client: Client,
    members: Vec<Member>,
    enough: Arc<AtomicBool>,
}

struct Member {
    server: String,
    downloads: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Crowd {
    async fn start(site: &Site, size: usize) -> anyhow::Result<Self> {
        Self::start_at(site, site.address(), size).await
    }

    async fn start_at(site: &Site, listener: SocketAddr, size: usize) -> anyhow::Result<Self> {
        let client = site.client(LOCAL)?.with_keep_alive();
        let enough = Arc::<AtomicBool>::default();
        let mut members = Vec::new();
        for _ in 0..size {
            let connection = client.connect(listener).await?;
            let server = who(&connection).await?;
            let downloads = Arc::<AtomicUsize>::default();
            let (count, enough) = (Arc::clone(&downloads), Arc::clone(&enough));
            let task = tokio::spawn(async move {
                while !enough.load(Relaxed) {
                    download(&connection, 64 * KIB, |_| {}).await?;
                    count.fetch_add(1, Relaxed);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(())
            });
            members.push(Member { server, downloads, task });
        }
        Ok(Self { client, members, enough })
    }

    fn servers(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.server.as_str())
    }

    /// Waits until each connection to a server of interest has begun and ended a download.
    async fn all_go_on(&self, of_interest: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        const POLLS: usize = 3000;
        let members = || self.members.iter().filter(|member| of_interest(&member.server));
        let before: Vec<_> = members().map(|member| member.downloads.load(Relaxed)).collect();
        for _ in 0..POLLS {
            let mut both = members().zip(&before);
            // One may have been under way; the second has been begun since.
            if both.all(|(member, before)| member.downloads.load(Relaxed) >= before + 2) {
                return Ok(());
            }
            let ended = members().find(|member| member.task.is_finished());
            ensure!(ended.is_none(), "a connection to {} is lost", ended.expect("some").server);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::bail!("a connection stands still")
    }

    /// Lets all end; those to servers of interest have to end well.
    async fn end(self, of_interest: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        self.enough.store(true, Relaxed);
        for Member { server, task, .. } in self.members {
            if of_interest(&server) {
                task.await??;
            } else {
                task.abort();
            }
        }
        self.client.close().await;
        Ok(())
    }
}
