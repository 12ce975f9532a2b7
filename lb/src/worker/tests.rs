//! Workers that panic, on real sockets. Datagrams that make a forwarder panic exist in these tests alone.

use std::{
    collections::HashSet,
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    thread,
    time::Instant,
};

use super::{
    mailbox::Sample,
    panics::{Origin, Suspect},
    *,
};
use crate::{
    backend::BackendState,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    fixtures::{self, AT_DECODING, AT_RETURN, AT_VERDICT, cid_config, server_id},
    registry::Registry,
    totals::ListenerTotals,
    verdict::DropReason,
};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
const CLIENTS: usize = 32;

#[test]
fn a_panic_takes_only_the_flows_of_its_worker_along() {
    let balancer = Balancer::start();
    let clients = balancer.clients();
    let before: Vec<_> = clients.iter().map(Client::ask).collect();

    let did_it = clients[0].send(AT_VERDICT);
    let worker = balancer.wait_for_panics(1);
    let after: Vec<_> = clients.iter().map(Client::ask).collect();
    let has_changed = |client: &usize| before[*client] != after[*client];
    let lost: Vec<_> = (0..CLIENTS).filter(has_changed).collect();
    assert!(lost.contains(&0) && lost.len() < CLIENTS, "one worker's: {lost:?}");
    let ports_before: HashSet<_> = before.iter().copied().collect();
    assert!(lost.iter().all(|client| !ports_before.contains(&after[*client])), "ports rest");

    let [panic] = &balancer.workers.panics().kept()[..] else { panic!("there was one") };
    assert_eq!((panic.worker, panic.flows), (worker, lost.len() as u64));
    assert_eq!(panic.told.message, "as the test wants");
    assert!(panic.told.place.contains("forwarder"), "{}", panic.told.place);
    assert_eq!(panic.suspect, Some(clients[0].suspect(Origin::Client, &did_it)));
    let totals = balancer.settled();
    assert_eq!(totals.flows, CLIENTS as u64);
    // And what was sent twice, because the first answer was slow.
    assert!(totals.dropped[DropReason::Panic as usize] >= 1);
    assert_eq!(balancer.workers.failure(), None);

    clients[0].send(AT_VERDICT);
    assert_eq!(balancer.wait_for_panics(2), worker, "the client path is still the same worker's");
    assert_ne!(clients[0].ask(), after[0]);
}

#[test]
fn the_datagram_that_did_it_is_found_among_others() {
    let balancer = Balancer::start();
    let clients = balancer.clients();
    for (panics, place, origin) in [
        (1, AT_VERDICT, Origin::Client),
        (2, AT_DECODING, Origin::Client),
        (3, AT_RETURN, Origin::Backend),
    ] {
        for (nth, client) in clients.iter().enumerate() {
            client.ask();
            if nth % 2 == 0 {
                client.send(b"");
            }
        }
        let did_it = clients[7].send(place);
        clients.iter().for_each(|client| drop(client.send(b"")));
        balancer.wait_for_panics(panics);
        let panic = balancer.workers.panics().kept().pop().unwrap();
        let suspect = panic.suspect.expect("one was found");
        assert_eq!((suspect.origin, suspect.client), (origin, clients[7].address()));
        // Backends put something in front.
        assert!(suspect.octets.ends_with(&did_it), "{suspect:?}");
    }
    assert!(clients.iter().all(|client| client.ask() > 0));
}

#[test]
fn a_worker_that_panics_again_and_again_waits_and_datagrams_wait_for_it() {
    let balancer = Balancer::start();
    let clients = balancer.clients();
    let panics = balancer.workers.panics();
    let (mut count, mut restless) = (0, vec![]);
    while restless.is_empty() {
        count += 1;
        clients[0].send(AT_VERDICT);
        let worker = balancer.wait_for_panics(count);
        restless = panics.restless(Instant::now());
        assert!(restless.iter().all(|restless| *restless == worker));
    }
    assert!(count >= 5, "{count}");
    // While it waits: whoever sends once has to be answered once.
    let sequence = clients[0].send(b"once");
    wait_until(|| clients[0].answer(&sequence).is_some());
    assert!(clients.iter().all(|client| client.ask() > 0));
}

/// Two processes that read from the same sockets would each miss what the other has read.
#[test]
fn who_has_handed_over_reads_nothing_until_it_is_to_go_on() {
    let balancer = Balancer::start();
    let clients = balancer.clients();
    let before: Vec<_> = clients.iter().map(Client::ask).collect();
    let orders = balancer.workers.orders();
    let pairs: Vec<_> = (0..orders.len()).map(|_| Channel::pair().unwrap()).collect();
    let (_theirs, ours): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    assert_eq!(orders.hand_over(ours, PATIENCE).unwrap(), CLIENTS);
    let rounds = balancer.workers.totals().rounds();
    let questions: Vec<_> = clients.iter().map(|client| client.send(b"")).collect();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(balancer.workers.totals().rounds(), rounds);
    orders.go_on();
    // Whoever has sent once is answered once, by way of the same port.
    for ((client, question), before) in clients.iter().zip(&questions).zip(&before) {
        assert_eq!(client.answer(question), Some(*before));
    }
    assert_eq!(balancer.settled().flows, CLIENTS as u64);
}

#[test]
fn a_question_that_cannot_be_answered_costs_nobody_a_flow() {
    let balancer = Balancer::start();
    let clients = balancer.clients();
    let before: Vec<_> = clients.iter().map(Client::ask).collect();
    let path = ClientPath { client: ClientAddr(clients[0].address()), local: None };
    let octets = clients[0].datagram(AT_DECODING);
    let sample = Sample { listener: ListenerIndex(0), path, octets: octets[..].into() };
    let answers = balancer.workers.mailboxes().ask(&sample);
    assert!(answers.recv().is_err(), "nobody can answer that");
    let after: Vec<_> = clients.iter().map(Client::ask).collect();
    assert_eq!(before, after);
    assert_eq!(balancer.workers.totals().panics(), [0, 0]);
    let kept = balancer.workers.panics().kept();
    let suspects: Vec<_> = kept.into_iter().filter_map(|panic| panic.suspect).collect();
    let suspect = clients[0].suspect(Origin::Question, &octets);
    assert_eq!(suspects, [suspect.clone(), suspect], "one for each worker");
}

/// Two workers in front of a server that says what it sees.
struct Balancer {
    workers: Workers,
    _server: Server,
}

impl Balancer {
    fn start() -> Self {
        let server = Server::start();
        let mut config = fixtures::config(true);
        config.workers = NonZeroUsize::new(2);
        config.listeners[0].address = ([127, 0, 0, 1], 0).into();
        config.pools[0].backends.truncate(1);
        config.pools[0].backends[0].address = server.address;
        let state = |_: &str, _: &str| BackendState::Active;
        let routing = Routing::new(&config, &mut Registry::default(), state);
        let routing = Arc::new(ArcSwap::from_pointee(routing));
        let memory = Arc::new(Memory::new(1000, Instant::now(), [1; 4]));
        let listeners = Listen::at_addresses_of(&config);
        let workers = Workers::start(&config, listeners, routing, memory, false).unwrap();
        Self { workers, _server: server }
    }

    fn clients(&self) -> Vec<Client> {
        let client = |_| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(self.workers.local_addresses()[0].0).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            Client { socket, sequence: AtomicU32::new(0) }
        };
        (0..CLIENTS).map(client).collect()
    }

    /// Waits for the panics of all workers to be so many; says which one has had most.
    fn wait_for_panics(&self, count: u64) -> usize {
        let panics = || self.workers.totals().panics();
        wait_until(|| panics().iter().sum::<u64>() >= count);
        // What is kept comes a moment later.
        wait_until(|| self.workers.panics().kept().len() as u64 >= count.min(8));
        let panics = panics();
        assert_eq!(panics.iter().sum::<u64>(), count);
        usize::from(panics[1] > panics[0])
    }

    /// What was counted, once each datagram has its verdict.
    fn settled(&self) -> ListenerTotals {
        let totals = || self.workers.totals().of_listener(0);
        wait_until(|| totals().verdicts() == totals().received);
        totals()
    }
}

fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "in vain");
        thread::sleep(Duration::from_millis(2));
    }
}

struct Client {
    socket: UdpSocket,
    sequence: AtomicU32,
}

impl Client {
    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// The upstream port that the server sees. Asks until there is an answer.
    fn ask(&self) -> u16 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let question = self.send(b"");
            if let Some(port) = self.answer(&question) {
                return port;
            }
            assert!(Instant::now() < deadline, "no answer");
        }
    }

    /// The upstream port in the answer to a question, if one comes.
    fn answer(&self, question: &[u8]) -> Option<u16> {
        let mut answer = [0; 200];
        while let Ok(len) = self.socket.recv(&mut answer) {
            if let Some((&[_, high, low], asked)) = answer[..len].split_first_chunk()
                && asked == question
            {
                return Some(u16::from_be_bytes([high, low]));
            }
        }
        None
    }

    fn send(&self, end: &[u8]) -> Vec<u8> {
        let datagram = self.datagram(end);
        self.socket.send(&datagram).unwrap();
        datagram
    }

    /// A short header with a routable connection ID, unlike any other, with this end.
    fn datagram(&self, end: &[u8]) -> Vec<u8> {
        let sequence = self.sequence.fetch_add(1, SeqCst).to_be_bytes();
        let cid = cid_config().encode(&server_id(1), &[7; 6]).unwrap();
        [&[0x40], &*cid, &sequence, &[0; 30], end].concat()
    }

    fn suspect(&self, origin: Origin, octets: &[u8]) -> Suspect {
        let (client, listener) = (self.address(), ListenerIndex(0));
        Suspect { origin, client, listener, octets: octets.into() }
    }
}

/// Sends everything back, with the port that it came from in front, until it is dropped.
struct Server {
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let thread = thread::spawn(move || {
            let mut datagram = [0; 200];
            while let Ok((len, from)) = socket.recv_from(&mut datagram) {
                if len == 0 {
                    return;
                }
                // Looks like a short header, which nothing is learnt from.
                let answer = [&[0x40][..], &from.port().to_be_bytes(), &datagram[..len]].concat();
                let _ = socket.send_to(&answer, from);
            }
        });
        Self { address, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let _ = socket.send_to(&[], self.address);
        self.thread.take().unwrap().join().unwrap();
    }
}
