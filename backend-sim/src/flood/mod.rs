//! What attackers send, for tests of the balancer's defence: Initials from false senders, short
//! headers that nobody knows or of connections that have ended, versions that nobody knows, tokens
//! that were replayed or changed, garbage.
//!
//! It refuses targets that are not on loopback, unless it runs in a network namespace of its own and
//! the target has a private address, and it is bounded in rate and time. With the right to make raw
//! sockets it forges senders; without, it sends from many sockets on loopback.

mod craft;
mod target;
mod wire;

use std::{
    fmt, io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use quic::{ConnectionId, random::Random};
use serde::Serialize;

use craft::Crafts;
pub use target::RefusedTarget;
use wire::Wire;

/// The most datagrams in a second.
pub const MAX_RATE: u32 = 200_000;
/// The longest flood.
pub const MAX_DURATION: Duration = Duration::from_secs(300);
/// How often what is due is sent.
const STEP: Duration = Duration::from_millis(1);
/// What is due at once at most.
const LONGEST_STEP: Duration = Duration::from_millis(20);
const MICROS: u64 = 1_000_000;

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// First flights that a server would answer, each from another sender.
    Initials,
    /// Short headers with random connection IDs, or with a given one; those from each sender twice.
    Short,
    /// Long headers of versions that nobody knows, from each sender twice.
    Versions,
    /// Initials with a token that was made for somebody else, replayed and with bits flipped.
    Tokens,
    /// Random octets.
    Garbage,
    /// All of them in turns.
    Mixed,
}

/// A flood.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to.
    pub target: SocketAddr,
    /// What.
    pub kind: Kind,
    /// The destination connection ID of short headers, and of Initials with tokens, if not a random
    /// one: that of a server whose connection has ended.
    pub cid: Option<ConnectionId>,
    /// Datagrams in a second; at most [`MAX_RATE`].
    pub rate: u32,
    /// How long; at most [`MAX_DURATION`].
    pub duration: Duration,
}

/// What was sent.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What.
    pub kind: Kind,
    /// Datagrams that left.
    pub sent: u64,
    /// Datagrams that the kernel refused.
    pub refused: u64,
    /// How long it took.
    pub seconds: f64,
    /// Whether senders were forged, or sockets on loopback stood in for them.
    pub forged_senders: bool,
}

/// Why there is no flood.
#[derive(Debug, thiserror::Error)]
pub enum FloodError {
    /// The target is out of bounds.
    #[error(transparent)]
    Target(#[from] RefusedTarget),
    /// The rate is.
    #[error("a rate of {0} datagrams a second; at most {MAX_RATE}")]
    Rate(u32),
    /// The duration is.
    #[error("a flood of {0:?}; at most {MAX_DURATION:?}")]
    Duration(Duration),
    /// There is nothing to send from, or no randomness.
    #[error("cannot send: {0}")]
    Send(#[from] io::Error),
    /// The target gave no token to forge.
    #[error("the target answered no Initial with a Retry, so that there is no token to forge")]
    NoToken,
    /// First flights cannot be made.
    #[error("cannot make first flights: {0}")]
    Craft(String),
}

/// Sends the flood, on this thread.
///
/// # Errors
///
/// [`FloodError`], before anything is sent.
pub fn run(options: &Options) -> Result<Report, FloodError> {
    target::check(options.target)?;
    if options.rate > MAX_RATE {
        return Err(FloodError::Rate(options.rate));
    }
    if options.duration > MAX_DURATION {
        return Err(FloodError::Duration(options.duration));
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    let mut random = Random::new(seed);
    let crafts = Crafts::new(options, random.octets())?;
    let mut wire = Wire::new(options.target)?;

    let start = Instant::now();
    let (mut sent, mut refused, mut elapsed) = (0, 0, Duration::ZERO);
    // In millionths of a datagram.
    let mut owed = 0;
    let mut datagram = Vec::with_capacity(2048);
    while elapsed < options.duration {
        std::thread::sleep(STEP);
        let step = start.elapsed() - elapsed;
        elapsed += step;
        // What a machine that is too slow has not sent in time is not made up for.
        let micros = u64::try_from(step.min(LONGEST_STEP).as_micros()).unwrap_or(0);
        owed += u64::from(options.rate) * micros;
        while owed >= MICROS {
            let from = wire.sender(&mut random);
            for octets in crafts.next(sent + refused, &mut random, &mut datagram).datagrams() {
                match wire.send(from, octets) {
                    Ok(()) => sent += 1,
                    Err(_) => refused += 1,
                }
                owed = owed.saturating_sub(MICROS);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let forged_senders = wire.is_forging();
    Ok(Report { kind: options.kind, sent, refused, seconds, forged_senders })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, sent, refused, seconds, forged_senders } = self;
        let senders = if *forged_senders { "forged senders" } else { "many sockets" };
        let rate = *sent as f64 / seconds.max(f64::EPSILON);
        write!(
            f,
            "{kind:?}: {sent} datagrams in {seconds:.1} s ({rate:.0} a second) from {senders}, \
             {refused} refused by the kernel"
        )
    }
}
