//! The demonstration: a balancer, origin servers and clients in one process, on loopback.
//!
//! Nothing is arranged for it: the balancer is the one of `run`, with a configuration file of its
//! own; the drain goes through its admin interface and the rotation through its file.

mod fleet;
mod metrics;
mod screen;
mod summary;

use std::{
    io::Write,
    net::SocketAddr,
    time::{Duration, Instant},
};

use backend_sim::load::{Load, Options};
use tokio::{signal, time};

use self::{fleet::Fleet, metrics::Metrics, screen::Screen, summary::Summary};
use super::{args::DemoArgs, outcome::Failure};

/// From one picture to the next.
const FRAME: Duration = Duration::from_millis(250);
/// From one change of a client's port to the next, and from one migration to the next.
const REBIND_EVERY: Duration = Duration::from_secs(1);
const MIGRATE_EVERY: Duration = Duration::from_millis(1500);
/// Clients come back with a new connection after about this time.
const LIFETIME: Duration = Duration::from_secs(6);
/// Requests of a client per second, and what it asks for.
const RATE: f64 = 10.0;
const SIZES: [u64; 3] = [1 << 10, 10 << 10, 100 << 10];

pub(super) fn demo(args: &DemoArgs, out: &mut impl Write) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::other(format_args!("cannot start: {error}")))?;
    let summary = runtime.block_on(play(args)).map_err(Failure::Other)?;
    // Nothing that is left has anything to say.
    runtime.shutdown_background();
    if args.json {
        writeln!(out, "{}", summary.to_json())?;
    } else {
        writeln!(out, "{summary}")?;
    }
    out.flush()?;
    match summary.verdict() {
        Ok(()) => Ok(()),
        Err(sentence) => Err(Failure::Other(sentence)),
    }
}

async fn play(args: &DemoArgs) -> Result<Summary, String> {
    let mut fleet = Fleet::start(args.backends.into()).await?;
    let load = Load::start(options(args, &fleet, fleet.address()));
    let mut load = load.map_err(|error| error.to_string())?;
    let mut screen = Screen::new(args, &fleet);
    let mut plot = Plot::new(args);
    loop {
        tokio::select! {
            () = load.wait() => break,
            _ = signal::ctrl_c() => load.stop(),
            () = time::sleep(FRAME) => {}
        }
        let report = load.report();
        if report.seconds > 0.0
            && let Some(act) = plot.next(Duration::from_secs_f64(report.seconds))
        {
            screen.note(report.seconds, &act.play(&mut fleet).await?);
        }
        screen.show(&fleet, &load).await;
    }
    screen.end();
    let report = load.report();
    let rules = Metrics::fetch(fleet.admin()).await.map_err(|error| error.to_string())?;
    fleet.check()?;
    Ok(Summary::new(report, rules.by_rule(), fleet.counters(), plot.is_over()))
}

fn options(args: &DemoArgs, fleet: &Fleet, target: SocketAddr) -> Options {
    let mut options = Options::new(target, fleet::SERVER_NAME, fleet.trust());
    let clients = args.clients;
    options.connections = clients.into();
    options.rate = Some(RATE * f64::from(clients));
    options.sizes = SIZES.to_vec();
    options.rebind_every = Some(REBIND_EVERY);
    options.migrate_every = Some(MIGRATE_EVERY);
    options.lifetime = Some(LIFETIME);
    options.duration = args.duration;
    options
}

/// What happens while the clients go on.
#[derive(Clone, Copy, Debug)]
enum Act {
    Drain,
    Rotate,
    Activate,
}

impl Act {
    /// Plays it, and says what happened.
    async fn play(self, fleet: &mut Fleet) -> Result<String, String> {
        let began = Instant::now();
        let what = match self {
            Self::Drain => fleet.drain().await?,
            Self::Rotate => fleet.rotate().await?,
            Self::Activate => fleet.activate().await?,
        };
        Ok(format!("{what} ({} ms)", began.elapsed().as_millis()))
    }
}

/// Which act comes when.
struct Plot {
    /// The next one last.
    acts: Vec<(Duration, Act)>,
}

impl Plot {
    fn new(args: &DemoArgs) -> Self {
        let mut acts = vec![(0.75, Act::Activate), (0.5, Act::Rotate), (0.4, Act::Drain)];
        if args.backends == 1 {
            // Nobody could take the new connections of the only one.
            acts.retain(|(_, act)| matches!(act, Act::Rotate));
        }
        Self { acts: acts.into_iter().map(|(at, act)| (args.duration.mul_f64(at), act)).collect() }
    }

    fn next(&mut self, now: Duration) -> Option<Act> {
        let (_, act) = self.acts.pop_if(|(at, _)| *at <= now)?;
        Some(act)
    }

    const fn is_over(&self) -> bool {
        self.acts.is_empty()
    }
}
