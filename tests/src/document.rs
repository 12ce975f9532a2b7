//! The YAML of a scenario, as values that a test can change and write again.

use std::{
    fmt,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    sync::atomic::{AtomicU16, Ordering::Relaxed},
};

/// A configuration.
#[derive(Clone, Debug)]
pub struct Document {
    /// Where clients come in.
    pub listeners: Vec<Listener>,
    /// Who serves them.
    pub pools: Vec<Pool>,
    /// The admin interface.
    pub admin: SocketAddr,
}

/// A listener.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// The name of its pool.
    pub pool: String,
}

/// A pool.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// How its connection IDs are encoded; empty without routable ones.
    pub schemes: Vec<Scheme>,
    /// Its servers.
    pub backends: Vec<Backend>,
    /// Otherwise the balancer has to find out.
    pub honours_tokens: bool,
}

/// One configuration of routable connection IDs.
#[derive(Clone, Copy, Debug)]
pub struct Scheme {
    /// Its number.
    pub config_id: u8,
    /// Octets of a server ID.
    pub server_id_length: usize,
    /// Octets of a nonce.
    pub nonce_length: usize,
    /// The key, in hex; without one connection IDs are in the clear.
    pub key: Option<&'static str>,
}

/// A server.
#[derive(Clone, Debug)]
pub struct Backend {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// The number that its server IDs stand for.
    pub number: u8,
    /// Whether it gets no new connections.
    pub draining: bool,
}

const KEY: &str = "8f95f09245765f80256934e50c66207f";

impl Scheme {
    /// Four passes of AES, the way of most lengths.
    pub const FOUR_PASS: Self =
        Self { config_id: 0, server_id_length: 2, nonce_length: 6, key: Some(KEY) };
    /// One AES block.
    pub const SINGLE_PASS: Self =
        Self { config_id: 1, server_id_length: 3, nonce_length: 13, key: Some(KEY) };
    /// In the clear.
    pub const CLEAR: Self = Self { config_id: 2, server_id_length: 4, nonce_length: 5, key: None };
}

impl Pool {
    /// A pool of `backends` servers named after it: web-a, web-b and so on, at free ports of `ip`.
    #[must_use]
    pub fn new(name: &str, schemes: &[Scheme], ip: IpAddr, backends: u8) -> Self {
        let mut pool = Self {
            name: name.to_owned(),
            schemes: schemes.to_vec(),
            backends: Vec::new(),
            honours_tokens: true,
        };
        for _ in 0..backends {
            pool.add_backend(ip);
        }
        pool
    }

    /// Adds one more server at a free port of `ip`, and says which.
    pub fn add_backend(&mut self, ip: IpAddr) -> String {
        let number = u8::try_from(self.backends.len()).expect("a handful");
        let name = format!("{}-{}", self.name, char::from(b'a' + number));
        let address = free_address(ip);
        self.backends.push(Backend { name: name.clone(), address, number, draining: false });
        name
    }

    /// The server with this name.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn backend(&mut self, name: &str) -> &mut Backend {
        let backend = self.backends.iter_mut().find(|backend| backend.name == name);
        backend.unwrap_or_else(|| panic!("no backend {name}"))
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "listeners:")?;
        for Listener { name, address, pool } in &self.listeners {
            writeln!(f, "  - {{ name: {name}, address: \"{address}\", pool: {pool} }}")?;
        }
        writeln!(f, "pools:")?;
        self.pools.iter().try_for_each(|pool| pool.fmt(f))?;
        writeln!(f, "admin: {{ address: \"{}\" }}", self.admin)?;
        writeln!(f, "limits: {{ flows: 4000 }}")?;
        writeln!(f, "timeouts: {{ drain: \"1s\" }}")
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  - name: {}", self.name)?;
        let honours = if self.honours_tokens { "true" } else { "probe" };
        writeln!(f, "    honours_tokens: {honours}")?;
        if !self.schemes.is_empty() {
            writeln!(f, "    quic_lb:")?;
        }
        for Scheme { config_id, server_id_length, nonce_length, key } in &self.schemes {
            writeln!(f, "      - config_id: {config_id}")?;
            writeln!(f, "        server_id_length: {server_id_length}")?;
            writeln!(f, "        nonce_length: {nonce_length}")?;
            if let Some(key) = key {
                writeln!(f, "        key: \"{key}\"")?;
            }
        }
        writeln!(f, "    backends:")?;
        for backend in &self.backends {
            writeln!(f, "      - name: {}", backend.name)?;
            writeln!(f, "        address: \"{}\"", backend.address)?;
            if backend.draining {
                writeln!(f, "        state: draining")?;
            }
            if !self.schemes.is_empty() {
                writeln!(f, "        server_ids:")?;
            }
            for scheme in &self.schemes {
                writeln!(f, "          {}: \"{}\"", scheme.config_id, server_id(scheme, backend))?;
            }
        }
        Ok(())
    }
}

/// Configurations in the clear and encrypted ones must not share server IDs, so the config ID is part
/// of them.
fn server_id(scheme: &Scheme, backend: &Backend) -> String {
    let octets = scheme.server_id_length - 1;
    format!("{:02x}{:0width$x}", 0xa0 + scheme.config_id, backend.number + 1, width = 2 * octets)
}

/// An address of `ip` at which nobody listens.
///
/// It lies below the ports that the kernel gives to sockets without one, so that none of the many
/// sockets of a scenario takes it meanwhile; and each process of tests starts somewhere else.
///
/// # Panics
///
/// When the machine has no free port.
#[must_use]
pub fn free_address(ip: IpAddr) -> SocketAddr {
    const PORTS: std::ops::Range<u16> = 10_000..30_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let count = PORTS.end - PORTS.start;
    let mut start = [0; 2];
    getrandom::fill(&mut start).expect("the system has randomness");
    let _ = NEXT.compare_exchange(0, u16::from_ne_bytes(start) % count, Relaxed, Relaxed);
    let mut refused = None;
    for _ in 0..count {
        let port = PORTS.start + NEXT.fetch_add(1, Relaxed) % count;
        let address = SocketAddr::new(ip, port);
        match UdpSocket::bind(address).and_then(|_| TcpListener::bind(address)) {
            Ok(_) => return address,
            Err(error) => refused = Some(error),
        }
    }
    panic!("no free port on {ip}: {refused:?}");
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_is_written_is_a_valid_configuration() {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let schemes = [Scheme::FOUR_PASS, Scheme::SINGLE_PASS, Scheme::CLEAR];
        let mut web = Pool::new("web", &schemes, ip, 3);
        web.backend("web-b").draining = true;
        let plain = Pool::new("plain", &[], ip, 1);
        let listener = |name: &str, pool: &Pool| Listener {
            name: name.to_owned(),
            address: free_address(ip),
            pool: pool.name.clone(),
        };
        let listeners = vec![listener("edge", &web), listener("side", &plain)];
        let document =
            Document { listeners, pools: vec![web, plain], admin: free_address(ip) }.to_string();
        let surroundings = quic_lb_config::Surroundings::of_text("scenario");
        let loaded = quic_lb_config::from_str(&document, &surroundings);
        let config = loaded.unwrap_or_else(|report| panic!("{report}\n{document}")).config;
        assert_eq!(config.pools[0].cid_configs.len(), 3);
        assert_eq!(config.pools[0].backends[1].admission, quic_lb_config::Admission::Draining);
        assert_eq!(config.pools[1].backends[0].server_ids, []);
    }
}
