//! The file as it may be written: every section, every key, every default.
//!
//! The comments of this module are what people read in the JSON schema and when a required key is
//! missing. What a value has to be on its own is in its type; what it has to be beside the others
//! is judged in `check`. The reason for each default stands above its section.

use crate::{
    checked::{
        Admission, Admittance, HashBy, HonoursTokens, LogFormat, LogLevel, RetryMode, TokenFormat,
        UnknownPackets,
    },
    leaf::{
        Address, CertificateWord, CheckWord, Count, Endpoint, Flag, HostName, Identity, Interval,
        Name, PerConfig, Percent, Secret, Share, Text, TokenIv, WireVersion,
    },
    read::{List, mapping},
};

const SECOND: u64 = 1_000;
const HOUR: u64 = 60 * 60 * SECOND;

mapping! {
    /// The configuration of quic-lb.
    struct Document {
        /// Where client datagrams arrive. 1 to 64, each with its own name and address.
        required listeners: List<Listener>,
        /// Named sets of servers, with 1 to 16384 backends altogether.
        required pools: List<Pool>,
        /// The admin interface: metrics, health, backends. Left out, there is none.
        optional admin: Admin,
        /// Worker threads. Left out, one for each core.
        optional workers: Count<1, 1024>,
        /// A folder of this process alone, from / on: what operators have commanded is kept there over restarts. Left out, it ends with
        /// the process.
        optional state_dir: Text,
        /// What bounds memory and descriptors.
        default limits: Limits = {},
        /// What ends flows and the process.
        default timeouts: Timeouts = {},
        /// What is logged and how.
        default log: Log = {},
        /// Address validation on behalf of the servers.
        default retry: Retry = {},
    }
}

mapping! {
    /// An address that receives client datagrams.
    struct Listener {
        /// A unique name, which becomes a metric label.
        required name: Name,
        /// "IP:port" to listen on. 0.0.0.0 and [::] cover every local address of their family.
        required address: Endpoint,
        /// Whether a listener on [::] leaves IPv4 to others. With false it has every local address of
        /// both families; nowhere else can it be false.
        optional ipv6_only: Flag,
        /// The name of the pool that new connections go to.
        required pool: Name,
        /// Address validation on this listener, where it differs from that of all.
        optional retry: ListenerRetry,
        /// Other pools by server name or ALPN. Not in this version yet: refused.
        optional routes: List<Route>,
    }
}

mapping! {
    /// Address validation on one listener.
    struct ListenerRetry {
        /// As retry.mode, for this listener alone.
        required mode: RetryMode,
    }
}

mapping! {
    /// New connections that go to a pool of their own.
    struct Route {
        /// The server name that the client asks for.
        optional server_name: Text,
        /// The application protocol that the client asks for.
        optional alpn: Text,
        /// The name of the pool.
        required pool: Name,
    }
}

mapping! {
    /// A named set of servers that share configurations of connection IDs.
    struct Pool {
        /// A unique name, which becomes a metric label.
        required name: Name,
        /// How the servers write their identity into connection IDs, up to seven configurations.
        /// Left out, the servers have no routable connection IDs.
        optional quic_lb: List<QuicLb>,
        /// The servers. Names and addresses are unique within the pool.
        required backends: List<Backend>,
        /// What decides about the server of a packet that nobody knows: "dcid" spreads the connections of
        /// one client, "client_address" keeps those of one address together, also when its port
        /// changes, "client_address_and_port" those of one socket. Left out, "dcid" with quic_lb and
        /// "client_address" without.
        optional hash: HashBy,
        /// Local addresses that datagrams to the backends leave from; each adds ports for flows.
        /// Left out, the kernel chooses.
        optional source_addresses: List<Address>,
        /// Whether the servers honour the tokens of address validation: they have the keys in
        /// retry.keys and take clients for validated that come with a token. "probe", or left out: the
        /// balancer begins connections with tokens of its own to find out, and clients are not asked for proof
        /// before half of the servers have honoured one, nor while one of them does not.
        optional honours_tokens: HonoursTokens,
        /// Active checks of the backends. Left out, a backend is only judged by what becomes of its traffic.
        optional health_check: HealthCheck,
        /// A file with the token that the servers of the pool show when they report their half-open connections, relative to this one: 16
        /// to 4096 characters. Left out, reports are taken where commands are.
        optional report_token_file: Text,
        /// What the servers derive the tokens of stateless resets from, so that clients of a server that has started anew know at
        /// once. The balancer makes no use of it.
        optional stateless_reset: StatelessReset,
    }
}

mapping! {
    /// A secret of all servers of a pool. Each derives a key of its own from it.
    struct StatelessReset {
        /// 32 hex digits. One of key, key_file and key_env.
        optional key: Secret,
        /// A file that holds the key, relative to this one.
        optional key_file: Text,
        /// The environment variable that holds the key.
        optional key_env: Text,
    }
}

mapping! {
    /// One configuration of routable connection IDs (draft-ietf-quic-load-balancers-21).
    struct QuicLb {
        /// The number that connection IDs of this configuration carry, 0 to 6.
        required config_id: Count<0, 6>,
        /// Octets of a server ID, 1 to 15. Use more than needed to tell the backends apart, so that
        /// the random connection IDs of clients hit none.
        required server_id_length: Count<1, 15>,
        /// Octets of a nonce, 4 to 18; with the server ID at most 19.
        required nonce_length: Count<4, 18>,
        /// The AES-128 key: 32 hex digits. Without key, key_file and key_env, connection IDs are
        /// in the clear.
        optional key: Secret,
        /// A file that holds the key, relative to this one.
        optional key_file: Text,
        /// The environment variable that holds the key.
        optional key_env: Text,
    }
}

// weight: all alike.
// state: whoever writes a backend down wants it used.
mapping! {
    /// One server.
    struct Backend {
        /// A name that is unique within the pool, which becomes a metric label.
        required name: Name,
        /// "IP:port" of the server. Names are not resolved.
        required address: Endpoint,
        /// The server ID in all configurations of the pool, in hex.
        optional server_id: Identity,
        /// The server IDs by config ID, in hex, where configurations differ.
        optional server_ids: PerConfig<Identity>,
        /// The share of new connections relative to the other backends, 1 to 1000.
        default weight: Count<1, 1000> = 1,
        /// "active" gets everything, "draining" keeps its connections and gets no new ones.
        default state: Admission = "active",
        /// "IP:port" that its active checks go to, if not to its address. Goes before health_check.port.
        optional check_address: Endpoint,
    }
}

// interval, timeout and fall: a dead backend is noticed within two and a half seconds.
// fall, rise: one datagram that is lost, or one that gets through, means little.
// alpn: what most servers of QUIC speak.
// slow_start: few servers mind, and with a share that is less others have more.
// panic_below: where most seem to be gone, it is more likely the checks that fail, and those that are left could not carry all.
mapping! {
    /// Active checks of the backends of a pool.
    struct HealthCheck {
        /// What is asked: "http3" makes a request, "quic" begins a connection as clients do, "version_negotiation" sends a datagram of a
        /// version that nobody has, which any QUIC server answers with those that it has.
        required kind: CheckWord,
        /// The application protocol that "quic" asks for. Left out, "h3".
        optional alpn: Text,
        /// The path that "http3" asks for. Left out, "/".
        optional path: Text,
        /// The answers to "http3" that are good. Left out, 200.
        optional expect_status: List<Count<200, 599>>,
        /// The name that "quic" and "http3" ask for, and that certificates have to carry. Left out, the address that is
        /// checked.
        optional server_name: HostName,
        /// A file of certificates in PEM, relative to this one: what the servers show has to lead to one of
        /// them. "quic" and "http3" need it, or certificate.
        optional ca_file: Text,
        /// "ignored" where the certificates of the servers do not matter to "quic" and "http3".
        optional certificate: CertificateWord,
        /// From one check of a backend to the next, less up to a tenth, so that they do not all fall together.
        default interval: Interval<100, HOUR> = "1s",
        /// How long a check waits for its answer; at most the interval. Left out, half of it.
        optional timeout: Interval<50, HOUR>,
        /// So many checks in a row have to pass before a backend that was down gets new connections.
        default rise: Count<1, 100> = 2,
        /// After so many failed checks in a row a backend gets no new connections.
        default fall: Count<1, 100> = 2,
        /// The port that is checked, if it is not that of the backend.
        optional port: Count<1, 65535>,
        /// Where fewer backends of the pool than this would be left, failed checks are ignored: "0%" for never.
        default panic_below: Percent = "50%",
        /// How long it takes until a backend that gets new connections again has its whole share of them, in ten
        /// steps. "0s" for at once.
        default slow_start: Interval<0, HOUR> = "0s",
    }
}

mapping! {
    /// The admin interface.
    struct Admin {
        /// "IP:port" to listen on. It has no authentication: keep it on loopback or a management network. With commands, it
        /// takes none itself.
        required address: Endpoint,
        /// Where commands are taken. Left out, at the Unix socket admin.sock in the RuntimeDirectory of the service, where systemd
        /// says that there is one, and at the address above otherwise.
        optional commands: Commands,
        /// Names that it is asked by. It answers requests to its addresses, to localhost and to these,
        /// so that no web page reaches it by a name that is made to lead here.
        optional host_names: List<HostName>,
    }
}

mapping! {
    /// Where commands are taken: at a Unix socket, or at an address from those who have a token or a certificate.
    struct Commands {
        /// The path of a Unix socket, relative to this file. Who may write to it is the file system's business: its owner and group.
        optional unix: Text,
        /// "IP:port" to listen on, for requests with "Authorization: Bearer …".
        optional address: Endpoint,
        /// A file that holds the token that is wanted at the address, relative to this one: 16 to 4096 characters.
        optional token_file: Text,
        /// A file with the chain of certificates, in PEM, that is shown at the address, relative to this one: commands are taken over TLS
        /// then, from those whose certificate leads to client_ca_file.
        optional cert_file: Text,
        /// A file with its private key, in PEM.
        optional key_file: Text,
        /// A file with the certificates, in PEM, that those of clients have to lead to.
        optional client_ca_file: Text,
    }
}

// flows: a flow costs a descriptor and a port; 50000 is what one source address can reach of one
// backend, and below the usual limits of descriptors for services.
// remembered: 2^18 handshakes and clients of servers without routable connection IDs, some 30 MB.
mapping! {
    /// What bounds memory and descriptors.
    struct Limits {
        /// Flows of all workers together. Each holds one descriptor and one upstream port.
        default flows: Count<1, 16_777_216> = 50000,
        /// Remembered connection IDs and handshakes of all listeners together.
        default remembered: Count<1, 16_777_216> = 262144,
        /// How many connections may begin in a second.
        default new_connections_per_second: NewConnections = {},
        /// Short headers that nothing is known about, while addresses are being validated: "forward"
        /// or "refuse". Connections whose server can be told by their connection ID are never
        /// concerned.
        default unknown_short_headers: UnknownPackets = "forward",
    }
}

mapping! {
    /// How many connections may begin in a second. What is left out has no limit. Connections that
    /// exist are never concerned; while addresses are being validated, only those that have been
    /// count.
    struct NewConnections {
        /// On all listeners together.
        optional total: Count<1, 10_000_000>,
        /// On each listener.
        optional per_listener: Count<1, 10_000_000>,
        /// From each IPv4 address and each IPv6 network of 64 bits.
        optional per_address: Count<1, 10_000_000>,
        /// From each IPv4 network of 24 bits and each IPv6 network of 48 bits.
        optional per_network: Count<1, 10_000_000>,
    }
}

// flow_idle: longer than the idle timeouts of browsers and servers (30 to 120 seconds).
// learnt: longer than a phone sleeps between two datagrams of a connection that is meant to last.
// flow_unanswered: two probe timeouts beyond the first seconds of a lossy handshake; short, because
// whoever sends garbage gets flows too.
// drain: what service managers and orchestrators grant before they kill.
mapping! {
    /// What ends flows and the process.
    struct Timeouts {
        /// A flow without a datagram in either direction for this long is forgotten.
        default flow_idle: Interval<SECOND, { 24 * HOUR }> = "180s",
        /// A flow whose backend has not answered yet is forgotten after this long.
        default flow_unanswered: Interval<100, HOUR> = "10s",
        /// A connection ID that was learnt from a server without routable ones is forgotten after it
        /// was not used for this long.
        default learnt: Interval<SECOND, { 24 * HOUR }> = "10m",
        /// How long the process goes on forwarding after SIGTERM.
        default drain: Interval<0, HOUR> = "30s",
    }
}

// level: what an operator did or must know, nothing per packet or connection.
// format: for people, who are the first to look.
mapping! {
    /// What is logged and how.
    struct Log {
        /// The least severe level that is written: "error", "warn", "info", "debug" or "trace".
        default level: LogLevel = "info",
        /// "text" for people, "json" for one JSON object a line.
        default format: LogFormat = "text",
        /// A record for each connection that begins and ends. Left out, there is none.
        optional connections: ConnectionLog,
    }
}

// sample: whoever asks for the log wants all of it; a part is enough to count by.
// format: what reads it is a program.
mapping! {
    /// The connection log.
    struct ConnectionLog {
        /// "stdout", or a file, relative to this one. SIGUSR1 has it opened anew.
        required path: Text,
        /// The share of connections that is logged, 0 to 1, with up to six decimals.
        default sample: Share = 1,
        /// "json" for one JSON object a line, "text" for people.
        default format: LogFormat = "json",
    }
}

// mode: servers validate addresses themselves; a Retry costs each client a round trip.
// format: the one that works while the balancer rewrites addresses, as it does.
// lifetime: a client answers a Retry at once, and may have to repeat that.
// transition: what most handshakes in progress need for their second Initial.
// other_versions: a balancer should not stand in the way of versions yet to come.
mapping! {
    /// Address validation on behalf of the servers.
    struct Retry {
        /// When clients have to prove their address first: "off", "always", or "adaptive" for under
        /// load. Anything but "off" needs keys, and servers that honour tokens made with them.
        default mode: RetryMode = "off",
        /// "nat" for tokens that servers can verify although the balancer rewrites addresses,
        /// "shared_state" for those of draft-ietf-quic-retry-offload, for servers that see the true
        /// addresses of clients.
        default format: TokenFormat = "nat",
        /// The keys of tokens, shared with the servers. Tokens are made with the first, those of the
        /// format "shared_state" with the next one when 2^23 have been; all of them open tokens.
        optional keys: List<RetryKey>,
        /// How long the token of a Retry is good for.
        default lifetime: Interval<SECOND, { 60 * SECOND }> = "10s",
        /// When validation begins: for how long Initials without token are forwarded besides
        /// being answered, for the sake of handshakes in progress.
        default transition: Interval<0, { 10 * SECOND }> = "200ms",
        /// QUIC versions other than 1 and 2 while addresses are being validated, which no Retry is
        /// known for: "allow" or "deny".
        default other_versions: Admittance = "allow",
        /// Versions for which the opposite of other_versions holds, such as "0xff00001d".
        optional except_versions: List<WireVersion>,
        /// When the mode "adaptive" begins and ends validation.
        default adaptive: Adaptive = {},
    }
}

mapping! {
    /// One key of tokens.
    struct RetryKey {
        /// Its number, which tokens carry: 0 to 127.
        required sequence: Count<0, 127>,
        /// The AES-128 key: 32 hex digits. One of key, key_file and key_env.
        optional key: Secret,
        /// A file that holds the key, relative to this one.
        optional key_file: Text,
        /// The environment variable that holds the key.
        optional key_env: Text,
        /// The 96-bit IV that goes with the key in the format "shared_state": 24 hex digits; zeros
        /// if left out.
        optional iv: TokenIv,
    }
}

// on_rate: a server does some thousand handshakes a second on a core.
// off_rate, off_half_open: half, so that what hovers around the threshold does not toggle.
// hold: longer than attacks pause.
mapping! {
    /// When the mode "adaptive" begins and ends validation.
    struct Adaptive {
        /// It begins when so many connections begin on a listener in a second, ...
        default on_rate: Count<1, 10_000_000> = 1000,
        /// It begins when a server of the pool reports so many half-open connections, ...
        default on_half_open: Count<1, 10_000_000> = 1000,
        /// ... and ends when there are fewer attempts than this in a second ...
        default off_rate: Count<1, 10_000_000> = 500,
        /// ... and every server reports fewer half-open connections than this ...
        default off_half_open: Count<1, 10_000_000> = 500,
        /// ... for this long.
        default hold: Interval<100, HOUR> = "30s",
    }
}
