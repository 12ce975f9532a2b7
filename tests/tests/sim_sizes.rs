//! How large the datagrams of a transfer are in the end, whatever its path has done before: as large as it carries.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use quic::transport::{
    CidIssuer, ClientConfig, EndpointConfig, ResetKey, ServerConfig, TransportConfig,
};
use quic_lb_tests::sim::{
    Access, NodeId, World,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer},
    for_seeds,
    host::Host,
    link::LinkConfig,
    rng::Rng,
};

/// More than any of these transfers can carry.
const FILE: usize = 100 << 20;
/// How long a path has been well when datagrams are as large as it carries.
const HEALED: Duration = Duration::from_secs(10);
/// How well a size is known.
const PRECISION: usize = 12;
/// Of IPv4 in Ethernet.
const FULL: usize = 1472;

/// A download that goes on as long as it is looked at.
struct Transfer {
    world: World,
    client: NodeId,
    /// Sizes of what the server has sent, and when.
    sent: Rc<RefCell<Vec<(Duration, usize)>>>,
}

impl Transfer {
    fn start(seed: u64, link: LinkConfig) -> Self {
        let mut rng = Rng::new(seed ^ 0x512e);
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let (front, inside) = (address("192.0.2.1:443"), address("10.0.0.1:5000"));
        let transport = TransportConfig { max_udp_payload: 1472, ..TransportConfig::default() };
        let transport = Arc::new(transport);
        let mut server = ServerConfig::new(crypto::server(rng.number(), CertificateSize::Small));
        server.transport = Arc::clone(&transport);
        let tls = crypto::client(rng.number(), CertificateSize::Small, None);
        let mut client = ClientConfig::new(tls);
        client.transport = transport;
        let fetch = Fetch { download: FILE, upload: 0 };
        let app = FileClient::new(client, front, vec![fetch]);
        let mut world = World::new(rng.number());
        let cids = CidIssuer::standalone(9, [9; 32], ResetKey::new([8; 32]));
        let config = EndpointConfig::server(server, cids, rng.octets());
        world.add(&[front], Host::new(front, config, FileServer::default()));
        let host = Host::new(inside, EndpointConfig::client(rng.octets()), app);
        let client = world.add_behind(&[inside], host, link.clone(), link, None);
        let sent = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&sent);
        world.watch(move |at, packet| {
            if packet.from == front {
                sink.borrow_mut().push((at, packet.octets.len()));
            }
        });
        Self { world, client, sent }
    }

    fn pass(&mut self, time: Duration) {
        self.world.pass(time);
        let app = &self.world.node::<Host<FileClient>>(self.client).app;
        assert_eq!((app.failed.as_slice(), app.done), (&[][..], 0), "it goes on");
    }

    fn access(&mut self) -> &mut Access {
        self.world.access(self.client)
    }

    /// The size of the full datagrams of the last second; a probe is not one.
    fn size(&self) -> usize {
        let since = self.world.elapsed().saturating_sub(Duration::from_secs(1));
        let sent = self.sent.borrow();
        let mut sizes: Vec<_> =
            sent.iter().rev().take_while(|(at, _)| *at >= since).map(|(_, size)| *size).collect();
        sizes.sort_unstable();
        assert!(sizes.len() > 20, "{} datagrams in a second", sizes.len());
        sizes[sizes.len() / 2]
    }

    fn assert_carries(&mut self, what: &str, size: usize) {
        self.pass(HEALED);
        let found = self.size();
        assert!((size - PRECISION..=size).contains(&found), "{what}: {found} octets, not {size}");
    }
}

/// What happens to a path, from one moment to the next; in the end it is as it was.
type Trouble = fn(&mut Access);

const SECOND: Duration = Duration::from_secs(1);

fn both(access: &mut Access, change: impl Fn(&mut LinkConfig)) {
    change(&mut access.up.config);
    change(&mut access.down.config);
}

const TROUBLES: [(&str, Duration, Trouble); 8] = [
    ("an outage", Duration::from_secs(2), |access| both(access, |link| link.mtu = 0)),
    ("a short outage", Duration::from_millis(100), |access| both(access, |link| link.mtu = 0)),
    ("a long outage", Duration::from_secs(12), |access| both(access, |link| link.mtu = 0)),
    ("outages", Duration::from_secs(10), |access| {
        both(access, |link| {
            link.blackout = Some((Duration::from_millis(700), Duration::from_millis(300)));
        });
    }),
    ("lost acknowledgments", Duration::from_secs(10), |access| {
        access.up.config.loss = 400_000;
        access.up.config.burst = 20;
    }),
    ("a drop of the rate", Duration::from_secs(10), |access| {
        access.down.config.rate /= 20;
        access.down.config.queue = 8;
    }),
    ("jitter", Duration::from_secs(10), |access| {
        both(access, |link| {
            link.jitter = Duration::from_millis(60);
            link.reorder = 50_000;
        });
    }),
    ("overflows", Duration::from_secs(10), |access| access.down.config.queue = 3),
];

#[test]
fn req_l03_a_path_that_is_well_again_carries_full_datagrams_ten_seconds_later() {
    for_seeds("--test sim_sizes req_l03_a_path_that_is_well", 2, |seed| {
        for mtu in [1280, 1300, FULL] {
            for (what, time, trouble) in TROUBLES {
                let link = LinkConfig { mtu, ..LinkConfig::default() };
                let mut transfer = Transfer::start(seed, link.clone());
                transfer.pass(5 * SECOND);
                trouble(transfer.access());
                transfer.pass(time);
                both(transfer.access(), |config| *config = link.clone());
                transfer.assert_carries(&format!("{what}, {mtu}"), mtu);
            }
        }
    });
}

/// Also where all that is under way is of full size when a router narrows it.
#[test]
fn req_l03_a_path_that_narrows_is_used_on_at_once_and_again_as_it_was() {
    for_seeds("--test sim_sizes req_l03_a_path_that_narrows", 2, |seed| {
        for narrow in [1200, 1280, 1300, 1400] {
            let mut transfer = Transfer::start(seed, LinkConfig::default());
            transfer.pass(5 * SECOND);
            both(transfer.access(), |link| link.mtu = narrow);
            transfer.assert_carries("narrow", narrow);
            transfer.pass(20 * SECOND);
            both(transfer.access(), |link| link.mtu = FULL);
            transfer.assert_carries("wide again", FULL);
        }
    });
}
