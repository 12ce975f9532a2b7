//! Address validation by the real balancer, in front of our real servers: our clients and quinn's
//! get in, forged tokens do not, keys are rotated and validation is switched on under load.

use std::{
    fs::File,
    net::SocketAddr,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use quic::{
    driver::{Cids, Endpoint},
    header::Version,
    initial::{Initial, Sender},
    invariants::Packet,
    retry,
    token::{TokenKey, TokenKeys},
    transport::{
        ClientConfig, Code, ConnectionError, PeerClose, ResetKey, TokenPolicy, TokenResult,
    },
    varint,
};
use quic_lb_config::{Config, Surroundings};
use quic_lb_tests::{
    aioquic,
    audit::Issued,
    balancer::Balancer,
    binary,
    certificate::{ALPN, Certificate, SERVER_NAME, client_tls, provider},
    client::Client,
    document::{Document, Listener, Pool, Scheme, free_address},
    exchange,
    metrics::Metrics,
    nat::Nat,
    origin::{self, Origin, seed},
    ours::{self, Server},
    site::{LOCAL, local},
};
use tokio::{
    net::UdpSocket,
    process::Command,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

const ANY: SocketAddr = SocketAddr::new(LOCAL, 0);
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_clients_and_quinns_complete_handshakes_through_validation() -> anyhow::Result<()> {
    let site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    let nat = Nat::start(site.address(), local(7)).await?;
    let mut expected = 0;
    for target in [site.address(), nat.address()] {
        for _ in 0..4 {
            site.visit(target).await?;
            site.visit_with_quinn(target).await?;
            expected += 2;
        }
    }
    let metrics = site.end(expected).await?;
    ensure!(metrics.sum("retry_sent_total", &[]) >= expected, "each was asked");
    ensure!(
        metrics.sum("retry_tokens_total", &[("result", "valid")]) >= expected,
        "each proved it"
    );
    ensure!(invalid_tokens(&metrics) == 0, "tokens were refused");
    ensure!(metrics.verdicts().replied == metrics.sum("retry_sent_total", &[]), "one verdict each");
    Ok(())
}

/// Behind the balancer a server sees the addresses of its clients in the seals of their Retry tokens
/// alone; the balancer sees them as they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn returning_clients_are_spared_the_round_trip() -> anyhow::Result<()> {
    const VISITS: u64 = 6;
    let site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    let config = ours::client(site.certificate.der(), provider())?;
    let endpoint = Endpoint::client(ANY)?;
    for _ in 0..VISITS {
        visit(&endpoint, &config, site.address()).await?;
    }
    let metrics = site.end(VISITS).await?;
    // A visit after a Retry brings a token, which is good for the next one.
    let asked = metrics.sum("retry_sent_total", &[]);
    ensure!((VISITS / 2..VISITS).contains(&asked), "{asked} of {VISITS} were asked");
    ensure!(invalid_tokens(&metrics) == 0, "tokens were refused");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_pool_without_routable_ids_are_validated_too() -> anyhow::Result<()> {
    let site = Site::start(&[], &always(&[1])).await?;
    for _ in 0..4 {
        site.visit(site.address()).await?;
        site.visit_with_quinn(site.address()).await?;
    }
    let metrics = site.end(8).await?;
    ensure!(invalid_tokens(&metrics) == 0, "tokens were refused");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test retry -- --ignored"]
async fn an_aioquic_client_completes_its_handshake_through_validation() -> anyhow::Result<()> {
    let python = aioquic::python().await?;
    let site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    let files = tempfile::tempdir()?;
    let mut command = aioquic::command(python, "client", files.path(), &site.certificate)?;
    command.args(["--target", &site.address().to_string(), "--octets", "100000"]);
    let output = command.stdin(Stdio::null()).output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metrics = site.balancer.at_rest().await?;
    ensure!(metrics.sum("retry_sent_total", &[]) > 0, "it was not asked");
    ensure!(metrics.sum("retry_tokens_total", &[("result", "valid")]) > 0, "it proved nothing");
    ensure!(invalid_tokens(&metrics) == 0, "tokens were refused");
    Ok(())
}

/// A server that is not ours reads the tokens with a few lines of its own, in versions 1 and 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test retry -- --ignored"]
async fn an_aioquic_server_reads_our_tokens_in_both_versions() -> anyhow::Result<()> {
    let python = aioquic::python().await?;
    let key = "01".repeat(16);
    for version in [&[][..], &["--version-2"]] {
        let (certificate, files) = (Certificate::new()?, tempfile::tempdir()?);
        let arguments = [&["--nat-key", &key], version].concat();
        let (_server, address) =
            aioquic::serve(python, files.path(), &certificate, &arguments).await?;
        let mut pool = Pool::new("web", &[], LOCAL, 1);
        pool.backends[0].address = address;
        let document = document(pool);
        let text = format!("{document}{}", always(&[1]));
        let balancer = Balancer::start_from(&text, document.admin).await?;
        let mut command = aioquic::command(python, "client", files.path(), &certificate)?;
        let target = document.listeners[0].address.to_string();
        command.args(["--target", &target, "--octets", "100000"]).args(version);
        let output = command.stdin(Stdio::null()).output().await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metrics = balancer.at_rest().await?;
        ensure!(metrics.sum("retry_sent_total", &[]) > 0, "it was not asked");
        ensure!(metrics.sum("retry_tokens_total", &[("result", "valid")]) > 0, "proved nothing");
    }
    Ok(())
}

/// Every bit, other addresses and ports, other connection IDs, and time: none gets to a server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_token_but_the_right_one_reaches_a_server() -> anyhow::Result<()> {
    let mut pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 1);
    let sink = UdpSocket::bind(pool.backends[0].address).await?;
    pool.backends[0].draining = false;
    let document = document(pool);
    let validation = always(&[1]).replace("mode: always", "mode: always, lifetime: \"1s\"");
    let balancer = Balancer::start_from(&format!("{document}{validation}"), document.admin).await?;
    let target = document.listeners[0].address;
    let client = UdpSocket::bind(ANY).await?;

    client.send_to(&initial(b"first of all", &[]), target).await?;
    let mut answer = [0; 2000];
    let (len, from) = timeout(PATIENCE, client.recv_from(&mut answer)).await??;
    ensure!(from == target, "answered by {from}");
    ensure!(retry::verify(Version::V1, b"first of all", &answer[..len]), "no Retry");
    let Ok(Packet::Long(header)) = Packet::read(&answer[..len]) else { anyhow::bail!("no Retry") };
    let token = &header.rest[..header.rest.len() - retry::TAG_LEN];

    let mut sent = 0;
    let mut refused = async |socket: &UdpSocket, dcid: &[u8], token: &[u8]| {
        sent += 1;
        // No faster than they are taken, so that each is counted.
        if sent % 32 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        socket.send_to(&initial(dcid, token), target).await
    };
    // The first bit makes another kind of token of it, which is answered.
    for bit in (0..token.len() * 8).filter(|bit| *bit != 7) {
        let mut flipped = token.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        refused(&client, header.scid, &flipped).await?;
    }
    for len in 1..token.len() {
        refused(&client, header.scid, &token[..len]).await?;
    }
    refused(&client, b"another one", token).await?;
    let other_address = UdpSocket::bind((local(9), client.local_addr()?.port())).await?;
    refused(&other_address, header.scid, token).await?;
    let dropped =
        |metrics: &Metrics| metrics.sum("datagrams_dropped_total", &[("reason", "invalid_token")]);
    let metrics = balancer.wait_for("all are refused", |metrics| dropped(metrics) >= sent).await?;
    let forwarded = metrics.verdicts().forwarded;
    ensure!(forwarded == 0, "{forwarded} were forwarded");
    for reason in ["seal", "address", "truncated", "unknown_key", "original_dcid_length"] {
        let count = metrics.sum("retry_tokens_total", &[("result", reason)]);
        ensure!(count > 0, "none was refused for {reason}");
    }

    // From where it belongs it is good at first, and then never again: a second of life, two of
    // skew, and what rounding adds. Each arrives or has expired.
    const TRIES: u64 = 200;
    let expired = |metrics: &Metrics| metrics.sum("retry_tokens_total", &[("result", "expired")]);
    let (mut good, mut old) = (0, 0);
    for tried in 1..=TRIES {
        client.send_to(&initial(header.scid, token), target).await?;
        let judged = |metrics: &Metrics| metrics.verdicts().forwarded + expired(metrics) == tried;
        let metrics = balancer.wait_for("the token is judged", judged).await?;
        let now_good = metrics.verdicts().forwarded;
        ensure!(old == 0 || now_good == good, "an old one was forwarded");
        (good, old) = (now_good, expired(&metrics));
        if old == 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    ensure!(good > 0 && old == 3, "{good} were good, {old} old");
    for _ in 0..good {
        let (len, _) = timeout(PATIENCE, sink.recv_from(&mut [0; 2000])).await??;
        ensure!(len == 1200, "{len} octets");
    }
    ensure!(sink.try_recv_from(&mut [0; 2000]).is_err(), "an old one arrived");
    // Nobody was answered but whoever asked without a token.
    ensure!(client.try_recv_from(&mut answer).is_err(), "a forger was answered");
    let verdicts = balancer.at_rest().await?.verdicts();
    ensure!(verdicts.add_up() && verdicts.replied == 1, "{verdicts:?}");
    Ok(())
}

/// Where the way out changes right after the Retry, its token is one of another address. It would try until its patience ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_an_invalid_token_is_told_so_and_ends() -> anyhow::Result<()> {
    let site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;

    let middle = Middle::start(site.address(), Trick::Move).await?;
    let config = ours::client(site.certificate.der(), provider())?;
    let endpoint = Endpoint::client(ANY)?;
    let connecting = endpoint.connect_with(&config, middle.address, SERVER_NAME)?;
    let ended = timeout(PATIENCE, connecting).await.context("our client goes on trying")?;
    ensure!(
        matches!(&ended, Err(ConnectionError::PeerClosed(PeerClose::Transport { code, .. }))
            if *code == Code::INVALID_TOKEN),
        "{ended:?}"
    );

    let middle = Middle::start(site.address(), Trick::Move).await?;
    let client = Client::new(LOCAL, site.certificate.der())?;
    let ended = timeout(PATIENCE, client.connect(middle.address)).await;
    let error = ended.context("quinn goes on trying")?.err().context("quinn got in")?;
    let told = match error.downcast_ref() {
        Some(quinn::ConnectionError::ConnectionClosed(close)) => {
            close.error_code == quinn::TransportErrorCode::INVALID_TOKEN
        }
        _ => false,
    };
    ensure!(told, "{error:?}");

    let metrics = site.end(0).await?;
    let told = metrics.sum("datagrams_replied_total", &[("kind", "invalid_token")]);
    ensure!(told >= 2, "{told} were told");
    ensure!(metrics.sum("retry_tokens_total", &[("result", "address")]) >= told, "and why");
    Ok(())
}

/// Before its token is back a client cannot be asked again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_whose_nat_moves_right_after_the_retry_goes_on() -> anyhow::Result<()> {
    let site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    for trick in [Trick::Rebind, Trick::Lose] {
        let middle = Middle::start(site.address(), trick).await?;
        site.visit(middle.address).await?;
        let middle = Middle::start(site.address(), trick).await?;
        site.visit_with_quinn(middle.address).await?;
    }
    let metrics = site.end(4).await?;
    let other_port = metrics.sum("retry_tokens_total", &[("result", "port")]);
    ensure!(other_port >= 4, "{other_port} tokens from another port");
    ensure!(metrics.sum("datagrams_replied_total", &[("kind", "invalid_token")]) == 0, "told");
    Ok(())
}

/// What the balancer answers to an Initial with an invalid token goes to whom its sender claims to be, and ends no handshake of
/// theirs, although the forger knows the connection ID that they go by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_forged_initials_end_no_handshake_of_their_claimed_senders()
-> anyhow::Result<()> {
    let site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    for _ in 0..3 {
        let middle = Middle::start(site.address(), Trick::Forge).await?;
        site.visit(middle.address).await?;
        let middle = Middle::start(site.address(), Trick::Forge).await?;
        site.visit_with_quinn(middle.address).await?;
    }
    let metrics = site.end(6).await?;
    let refused = metrics.sum("datagrams_replied_total", &[("kind", "invalid_token")]);
    ensure!(refused >= 12, "{refused} forged Initials were answered");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_under_load_and_no_handshake_fails() -> anyhow::Result<()> {
    let mut site = Site::start(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    let load = site.load(4);
    let mut keys = vec![1];
    for key in 2..6 {
        // Servers first, then the balancer opens, then it makes, then the old one goes.
        site.use_keys(&[keys[0], key]);
        for step in [vec![keys[0], key], vec![key, keys[0]], vec![key]] {
            // Longer than a token of the step before is under way.
            load.wait_for_more(40).await?;
            site.validate(&always(&step)).await?;
        }
        load.wait_for_more(40).await?;
        keys = vec![key];
        site.use_keys(&keys);
    }
    let visits = load.end().await?;
    let metrics = site.end(visits).await?;
    // A handshake whose token is of a key that was taken away meanwhile would have failed.
    ensure!(visits > 100, "{visits} visits");
    ensure!(metrics.sum("retry_tokens_total", &[("result", "valid")]) >= visits, "each proved it");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn validation_begins_and_ends_in_the_middle_of_handshakes_and_none_fails()
-> anyhow::Result<()> {
    let mut site = Site::start(&[Scheme::FOUR_PASS], &validation("\"off\"", &[1])).await?;
    let load = site.load(8);
    for _ in 0..4 {
        load.wait_for_more(20).await?;
        site.validate(&always(&[1])).await?;
        site.in_phase("active").await?;
        load.wait_for_more(20).await?;
        site.validate(&validation("\"off\"", &[1])).await?;
        site.in_phase("inactive").await?;
    }
    let visits = load.end().await?;
    let metrics = site.end(visits).await?;
    let begun = metrics.sum("retry_switches_total", &[("reason", "configured")]);
    ensure!(begun == 4, "it began {begun} times");
    ensure!(metrics.sum("retry_sent_total", &[]) > 20, "clients were asked");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adaptive_validation_begins_by_rate_and_by_half_open_connections() -> anyhow::Result<()> {
    let adaptive = validation("adaptive", &[1]).replace(
        "mode: adaptive",
        "mode: adaptive, adaptive: { on_rate: 50, off_rate: 20, on_half_open: 30, off_half_open: 10, hold: \"1s\" }",
    );
    let site = Site::start(&[Scheme::FOUR_PASS], &adaptive).await?;
    site.visit(site.address()).await?;
    let metrics = site.in_phase("inactive").await?;
    ensure!(metrics.sum("retry_sent_total", &[]) == 0, "asked without reason");

    site.balancer.report_half_open("web", "web-a", 30).await?;
    let metrics = site.in_phase("active").await?;
    ensure!(metrics.sum("backend_half_open", &[("backend", "web-a")]) == 30, "the report");
    site.visit(site.address()).await?;
    site.balancer.report_half_open("web", "web-a", 3).await?;
    site.in_phase("inactive").await?;
    ensure!(site.balancer.report_half_open("web", "nobody", 3).await.is_err(), "no such backend");

    let stranger = UdpSocket::bind(ANY).await?;
    for n in 0..100u32 {
        let dcid = [&b"drawn"[..], &n.to_be_bytes()].concat();
        stranger.send_to(&initial(&dcid, &[]), site.address()).await?;
    }
    site.in_phase("active").await?;
    site.visit(site.address()).await?;
    let metrics = site.in_phase("inactive").await?;
    for (reason, expected) in [("rate", 1), ("half_open", 1), ("configured", 0)] {
        let begun = metrics.sum("retry_switches_total", &[("reason", reason)]);
        ensure!(begun == expected, "it began {begun} times by {reason}");
    }
    let log = site.balancer.log();
    for word in ["address validation begins", "address validation ends", "half_open", "rate"] {
        ensure!(log.contains(word), "the log does not say {word}:\n{log}");
    }
    Ok(())
}

/// quinn's servers do not know our tokens, and take a client for one that has made up its connection IDs. Whoever has said
/// that validation is to begin by rate keeps it from nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_ignore_tokens_have_no_client_sent_a_retry_and_lose_none_in_a_rush()
-> anyhow::Result<()> {
    const RUSH: usize = 60;
    let adaptive = validation("adaptive", &[1]).replace(
        "mode: adaptive",
        "mode: adaptive, adaptive: { on_rate: 10, off_rate: 5, hold: \"1s\" }",
    );
    let mut pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 2);
    pool.honours_tokens = false;
    let document = document(pool);
    let text = format!("{}{adaptive}", probed(&document));
    let config = checked(&text)?;
    let (issued, certificate) = (Issued::default(), Certificate::new()?);
    let origins = config.pools[0].backends.iter().map(|backend| {
        let cids = origin::Cids::of(&config, "web", &backend.name, None)?;
        Origin::start(&backend.name, backend.address, cids, &issued, &certificate)
    });
    let _origins = origins.collect::<anyhow::Result<Vec<_>>>()?;
    let balancer = Balancer::start_from(&text, document.admin).await?;
    let known = |metrics: &Metrics| metrics.sum("retry_unsupported", &[]) == 2;
    balancer.wait_for("both servers are known to ignore tokens", known).await?;

    let mut rush = JoinSet::new();
    for _ in 0..RUSH {
        let client = Client::new(LOCAL, certificate.der())?;
        let target = document.listeners[0].address;
        rush.spawn(async move {
            let connection = timeout(PATIENCE, client.connect(target)).await??;
            let (send, recv) = connection.open_bi().await?;
            exchange::get(send, recv, 1_000, |_| {}).await?;
            client.close().await;
            anyhow::Ok(())
        });
    }
    while let Some(visit) = rush.join_next().await {
        visit??;
    }
    let metrics = balancer.metrics().await?;
    ensure!(metrics.sum("connection_attempts_total", &[]) >= RUSH as u64, "it was a rush");
    ensure!(metrics.sum("retry_sent_total", &[]) == 0, "clients were asked");
    ensure!(metrics.sum("retry_phase", &[("phase", "inactive")]) == 1, "validation has begun");
    let log = balancer.log();
    let said = log.matches("does not honour the tokens of Retries").count();
    ensure!(said == 2, "the log says it {said} times:\n{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn validation_begins_once_servers_have_honoured_a_token_of_a_connection_of_ours()
-> anyhow::Result<()> {
    let site = Site::start_probed(&[Scheme::FOUR_PASS], &always(&[1])).await?;
    let metrics = site.in_phase("active").await?;
    ensure!(metrics.sum("retry_unsupported", &[]) == 0, "they honour tokens");
    let (before, accepted) = (metrics.sum("retry_sent_total", &[]), site.accepted());
    ensure!(before == 0 && accepted >= 1, "{before} Retries, {accepted} connections");
    site.visit(site.address()).await?;
    site.visit_with_quinn(site.address()).await?;
    let metrics = site.balancer.at_rest().await?;
    ensure!(metrics.sum("retry_sent_total", &[]) == 2, "both were asked");
    ensure!(invalid_tokens(&metrics) == 0, "tokens were refused");
    Ok(())
}

/// A server that is run as operators do says itself that first flights come which nobody goes on
/// with. Of two balancers that it is to tell, one is not there, which harms nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_reports_its_half_open_connections_is_protected_as_long_as_it_has_them()
-> anyhow::Result<()> {
    const ABANDONED: usize = 40;
    let document = document(Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 1));
    let adaptive = validation("adaptive", &[1]).replace(
        "mode: adaptive",
        "mode: adaptive, adaptive: { on_half_open: 20, off_half_open: 5, hold: \"1s\" }",
    );
    let text = format!("{document}{adaptive}");
    let balancer = Balancer::start_from(&text, document.admin).await?;
    let (certificate, files) = (Certificate::new()?, tempfile::tempdir()?);
    let file = |name: &str| files.path().join(name);
    for (name, text) in
        [("lb.yaml", &*text), ("cert", certificate.pem().0), ("key", certificate.pem().1)]
    {
        std::fs::write(file(name), text)?;
    }
    let mut server = Command::new(binary::backend_sim()?);
    server.args(["serve", "--backend", "web-a", "--config"]).arg(file("lb.yaml"));
    server.arg("--cert").arg(file("cert")).arg("--key").arg(file("key"));
    for admin in [document.admin, free_address(LOCAL)] {
        server.args(["--report-half-open", &format!("http://{admin}")]);
    }
    let _server = server.stderr(File::create(file("log"))?).kill_on_drop(true).spawn()?;
    let logged = |words: &str| -> anyhow::Result<usize> {
        Ok(std::fs::read_to_string(file("log"))?.matches(words).count())
    };
    let mut polls = 0..600;
    while logged("half-open connections are reported")? == 0 {
        ensure!(polls.next().is_some(), "{}", std::fs::read_to_string(file("log"))?);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // What goes up this road is answered when it is opened the other way.
    let (inside, outside) = (UdpSocket::bind(ANY).await?, UdpSocket::bind(ANY).await?);
    let target = document.listeners[0].address;
    let mut tls = client_tls(certificate.der(), provider())?;
    tls.alpn_protocols = vec![quic::h3::ALPN.to_vec()];
    let clients = Endpoint::client(ANY)?;
    let config = ClientConfig::new(Arc::new(tls));
    let entrance = inside.local_addr()?;
    let attempts: Vec<_> = (0..ABANDONED)
        .map(|_| clients.connect_with(&config, entrance, SERVER_NAME))
        .collect::<Result<_, _>>()?;
    let active = |metrics: &Metrics| metrics.sum("retry_phase", &[("phase", "active")]) == 1;
    let metrics = tokio::select! {
        metrics = balancer.wait_for("validation is active", active) => metrics?,
        ended = carry(&inside, &outside, target) => return ended,
    };
    for (reason, expected) in [("half_open", 1), ("rate", 0), ("configured", 0)] {
        let begun = metrics.sum("retry_switches_total", &[("reason", reason)]);
        ensure!(begun == expected, "it began {begun} times by {reason}");
    }
    let mut load = Command::new(binary::backend_sim()?);
    load.args(["load", "--insecure", "--duration", "300ms", "--target", &target.to_string()]);
    let load = load.output().await?;
    ensure!(load.status.success(), "{}", String::from_utf8_lossy(&load.stderr));
    let valid = |metrics: &Metrics| metrics.sum("retry_tokens_total", &[("result", "valid")]);
    ensure!(valid(&balancer.metrics().await?) > 0, "nobody had to prove an address");

    // Those who were only slow get in, and then nothing is half-open any more.
    let inactive = |metrics: &Metrics| metrics.sum("retry_phase", &[("phase", "inactive")]) == 1;
    let end = async {
        let mut connections = Vec::new();
        for attempt in attempts {
            connections.push(attempt.await.context("a slow client")?);
        }
        balancer.wait_for("validation has ended", inactive).await
    };
    let metrics = tokio::select! {
        metrics = end => metrics?,
        ended = carry(&inside, &outside, target) => return ended,
        ended = carry(&outside, &inside, clients.local_addr()) => return ended,
    };
    ensure!(metrics.sum("retry_switches_total", &[]) == 1, "it toggles");
    ensure!(logged("cannot be reported")? == 1 && logged("are reported")? == 1, "once per change");
    Ok(())
}

/// Sends `to` out of one socket what comes in at the other, for ever.
async fn carry(from: &UdpSocket, out_of: &UdpSocket, to: SocketAddr) -> anyhow::Result<()> {
    let mut octets = [0; 2000];
    loop {
        let (len, _) = from.recv_from(&mut octets).await?;
        out_of.send_to(&octets[..len], to).await?;
    }
}

fn always(keys: &[u8]) -> String {
    validation("always", keys)
}

/// The section of the configuration.
fn validation(mode: &str, keys: &[u8]) -> String {
    let keys: Vec<_> = keys
        .iter()
        .map(|n| format!("{{ sequence: {n}, key: \"{}\" }}", format!("{n:02x}").repeat(16)))
        .collect();
    format!("retry: {{ mode: {mode}, keys: [{}] }}\n", keys.join(", "))
}

fn token_keys(keys: &[u8]) -> TokenPolicy {
    let keys = keys.iter().filter_map(|&n| TokenKey::new(n, [n; 16], [0; 12]));
    TokenPolicy::Nat(TokenKeys::new(keys))
}

fn invalid_tokens(metrics: &Metrics) -> u64 {
    metrics.sum("datagrams_dropped_total", &[("reason", "invalid_token")])
        + metrics.sum("datagrams_replied_total", &[("kind", "invalid_token")])
}

/// Somebody between one client and its target.
struct Middle {
    address: SocketAddr,
    task: JoinHandle<anyhow::Result<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trick {
    /// After the first answer, what the client sends comes from another port.
    Rebind,
    /// The same, only that the next datagram still comes from the first port, and nothing that answers it
    /// arrives.
    Lose,
    /// After the first answer, it comes from another address.
    Move,
    /// With every long header of the client, an Initial with an invalid token in its name.
    Forge,
}

impl Middle {
    async fn start(target: SocketAddr, trick: Trick) -> anyhow::Result<Self> {
        let inside = UdpSocket::bind(ANY).await?;
        let address = inside.local_addr()?;
        let task = tokio::spawn(in_between(inside, target, trick));
        Ok(Self { address, task })
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn in_between(inside: UdpSocket, target: SocketAddr, trick: Trick) -> anyhow::Result<()> {
    let elsewhere = if trick == Trick::Move { SocketAddr::from((local(9), 0)) } else { ANY };
    let (before, after) = (UdpSocket::bind(ANY).await?, UdpSocket::bind(elsewhere).await?);
    let (mut up, mut down, mut late) = ([0; 2000], [0; 2000], [0; 2000]);
    let (mut client, mut answered, mut lost) = (ANY, false, false);
    loop {
        tokio::select! {
            received = inside.recv_from(&mut up) => {
                let len;
                (len, client) = received?;
                let last = trick == Trick::Lose && !std::mem::replace(&mut lost, answered);
                let out = match answered && trick != Trick::Forge && !last {
                    true => &after,
                    false => &before,
                };
                if let Ok(Packet::Long(header)) = Packet::read(&up[..len])
                    && trick == Trick::Forge
                {
                    out.send_to(&forged(header.scid)?, target).await?;
                }
                out.send_to(&up[..len], target).await?;
            }
            received = before.recv_from(&mut down) => {
                let len = received?.0;
                if !lost {
                    inside.send_to(&down[..len], client).await?;
                }
                answered = true;
            }
            received = after.recv_from(&mut late) => {
                inside.send_to(&late[..received?.0], client).await?;
            }
        }
    }
}

/// An Initial that opens, with a token that claims to be of a Retry.
fn forged(scid: &[u8]) -> anyhow::Result<Vec<u8>> {
    let initial = Initial {
        version: Version::V1,
        sender: Sender::Client,
        key_cid: b"made up by somebody",
        dcid: b"made up by somebody",
        scid,
        token: &[8; 80],
        frames: &[0; 1200],
    };
    let mut octets = vec![0; 1500];
    let len = initial.write(&mut octets).context("an Initial fits")?;
    octets.truncate(len);
    Ok(octets)
}

/// An Initial that nobody can open.
fn initial(dcid: &[u8], token: &[u8]) -> Vec<u8> {
    let len = u8::try_from(dcid.len()).unwrap_or(u8::MAX);
    let mut octets = [&[0xc0, 0, 0, 0, 1, len][..], dcid, &[4], b"scid"].concat();
    varint::write(token.len() as u64, &mut octets);
    octets.extend_from_slice(token);
    octets.resize(1200, 0);
    octets
}

fn document(pool: Pool) -> Document {
    let listener =
        Listener { name: "edge".into(), address: free_address(LOCAL), pool: pool.name.clone() };
    Document { listeners: vec![listener], pools: vec![pool], admin: free_address(LOCAL) }
}

/// The configuration with checks of its pool, which say how connections begin that ask whether its servers honour tokens.
fn probed(document: &Document) -> String {
    let alpn = String::from_utf8_lossy(ALPN);
    let check = format!("{{ kind: quic, alpn: {alpn:?}, certificate: ignored, interval: 60s }}");
    let honours = "    honours_tokens: probe\n";
    document.to_string().replace(honours, &format!("{honours}    health_check: {check}\n"))
}

/// Two of our servers behind a balancer.
struct Site {
    document: Document,
    certificate: Certificate,
    servers: Vec<Server>,
    balancer: Balancer,
}

impl Site {
    async fn start(schemes: &[Scheme], validation: &str) -> anyhow::Result<Self> {
        let document = document(Pool::new("web", schemes, LOCAL, 2));
        let text = format!("{document}{validation}");
        Self::start_from(document, &text).await
    }

    /// As [`Self::start`], and the balancer has to find out whether the servers honour tokens.
    async fn start_probed(schemes: &[Scheme], validation: &str) -> anyhow::Result<Self> {
        let mut pool = Pool::new("web", schemes, LOCAL, 2);
        pool.honours_tokens = false;
        let document = document(pool);
        let text = format!("{}{validation}", probed(&document));
        Self::start_from(document, &text).await
    }

    async fn start_from(document: Document, text: &str) -> anyhow::Result<Self> {
        let config = checked(text)?;
        let certificate = Certificate::new()?;
        let mut servers = Vec::new();
        for backend in &config.pools[0].backends {
            let mut cids = Cids::Standalone;
            if let Some(config) = config.pools[0].cid_configs.first() {
                let (_, server_id) = *backend.server_ids.first().context("a server ID")?;
                let reset_key = ResetKey::new(seed()?);
                cids = Cids::Routable { config: config.clone(), server_id, reset_key };
            }
            let start = |options: &mut quic::driver::Options, _: &mut _| {
                options.address = backend.address;
                options.tokens = Some(TokenPolicy::Nat(TokenKeys::new(config.retry.keys.clone())));
                options.cids = cids;
            };
            servers.push(Server::on_loopback(LOCAL, &certificate, provider(), start)?);
        }
        let balancer = Balancer::start_from(text, document.admin).await?;
        Ok(Self { document, certificate, servers, balancer })
    }

    fn address(&self) -> SocketAddr {
        self.document.listeners[0].address
    }

    fn accepted(&self) -> usize {
        self.servers.iter().map(Server::accepted).sum()
    }

    /// Has all servers honour tokens of these keys.
    fn use_keys(&self, keys: &[u8]) {
        for server in &self.servers {
            server.endpoint.set_token_policy(&token_keys(keys));
        }
    }

    /// Replaces the section about validation and waits until that is in force.
    async fn validate(&mut self, validation: &str) -> anyhow::Result<()> {
        let text = format!("{}{validation}", self.document);
        let digest = checked(&text)?.digest();
        self.balancer.write_config(&text)?;
        let applied = |metrics: &Metrics| metrics.sum("config_info", &[("digest", &digest)]) == 1;
        self.balancer.wait_for("the configuration is applied", applied).await.map(drop)
    }

    async fn in_phase(&self, phase: &str) -> anyhow::Result<Metrics> {
        let reached = |metrics: &Metrics| metrics.sum("retry_phase", &[("phase", phase)]) == 1;
        self.balancer.wait_for(&format!("validation is {phase}"), reached).await
    }

    /// One connection of our client.
    async fn visit(&self, target: SocketAddr) -> anyhow::Result<()> {
        let config = ours::client(self.certificate.der(), provider())?;
        visit(&Endpoint::client(ANY)?, &config, target).await
    }

    /// One connection of quinn's.
    async fn visit_with_quinn(&self, target: SocketAddr) -> anyhow::Result<()> {
        let client = Client::new(LOCAL, self.certificate.der())?;
        let connection = timeout(PATIENCE, client.connect(target)).await??;
        let (send, recv) = connection.open_bi().await?;
        exchange::get(send, recv, 10_000, |_| {}).await?;
        client.close().await;
        Ok(())
    }

    /// So many clients that connect again and again.
    fn load(&self, clients: usize) -> Load {
        let (stop, visits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        for _ in 0..clients {
            let (stop, visits) = (Arc::clone(&stop), Arc::clone(&visits));
            let config = ours::client(self.certificate.der(), provider());
            let target = self.address();
            tasks.spawn(async move {
                let (endpoint, config) = (Endpoint::client(ANY)?, config?);
                while !stop.load(Relaxed) {
                    visit(&endpoint, &config, target).await?;
                    visits.fetch_add(1, Relaxed);
                }
                anyhow::Ok(())
            });
        }
        Load { stop, visits, tasks }
    }

    /// When all clients are gone: nothing was lost, and the servers have had `visits` connections,
    /// none of which had an invalid token.
    async fn end(&self, visits: u64) -> anyhow::Result<Metrics> {
        let metrics = self.balancer.at_rest().await?;
        ensure!(metrics.verdicts().add_up(), "{:?}", metrics.verdicts());
        for server in &self.servers {
            let refused = server.endpoint.tokens(TokenResult::Invalid);
            ensure!(refused == 0, "{refused} invalid tokens have reached a server");
        }
        let accepted = self.accepted();
        ensure!(accepted as u64 == visits, "{accepted} connections of {visits}");
        Ok(metrics)
    }
}

/// Connects, fetches something and closes.
async fn visit(
    endpoint: &Endpoint,
    config: &ClientConfig,
    target: SocketAddr,
) -> anyhow::Result<()> {
    let connecting = endpoint.connect_with(config, target, SERVER_NAME)?;
    let connection =
        timeout(PATIENCE, connecting).await.context("a handshake takes too long")??;
    let (send, recv) = connection.open_bi().await?;
    timeout(PATIENCE, exchange::get(send, recv, 10_000, |_| {})).await??;
    connection.close(0, b"done");
    Ok(())
}

/// Clients at work.
struct Load {
    stop: Arc<AtomicBool>,
    visits: Arc<AtomicUsize>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Load {
    /// Waits for some more visits.
    async fn wait_for_more(&self, more: usize) -> anyhow::Result<()> {
        const POLLS: usize = 2000;
        let enough = self.visits.load(Relaxed) + more;
        for _ in 0..POLLS {
            if self.visits.load(Relaxed) >= enough {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::bail!("clients have stopped after {} visits", self.visits.load(Relaxed))
    }

    /// Ends it; says how many visits there were, all of which succeeded.
    async fn end(mut self) -> anyhow::Result<u64> {
        self.stop.store(true, Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended??;
        }
        Ok(self.visits.load(Relaxed) as u64)
    }
}

fn checked(text: &str) -> anyhow::Result<Config> {
    let surroundings = Surroundings::of_text("scenario");
    let loaded = quic_lb_config::from_str(text, &surroundings);
    Ok(loaded.map_err(|report| anyhow::anyhow!("{report}"))?.config)
}
