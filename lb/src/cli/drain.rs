//! Commands about a backend, to a balancer that runs: no new connections, and again.

use std::{
    fmt::{self, Display},
    io::{self, Write},
    time::{Duration, Instant},
};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::{
    admin::{self, Balancer},
    args::{BackendArgs, BackendName, DrainArgs},
    outcome::{Failure, print_to_stderr},
};

/// From one look at a backend that drains to the next.
const LOOK: Duration = Duration::from_millis(250);
/// From one line about what is left to the next.
const TELL: Duration = Duration::from_secs(10);
/// How many looks in a row may fail: a balancer may be restarted meanwhile.
const FAILURES: u32 = 60;

/// What the admin interface says of a backend.
#[derive(Debug, Deserialize)]
struct Told {
    state: String,
    live: Live,
    drain: Option<Drain>,
}

#[derive(Debug, Deserialize)]
struct Live {
    connections: u64,
    flows: u64,
}

#[derive(Debug, Deserialize)]
struct Drain {
    silent_seconds: f64,
}

/// A path of the admin interface about a backend.
struct About<'a>(&'a BackendName, &'a str);

impl Display for About<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(BackendName { pool, name }, command) = self;
        let escaped = |name| utf8_percent_encode(name, NON_ALPHANUMERIC);
        write!(f, "/api/v1/backends/{}/{}{command}", escaped(pool), escaped(name))
    }
}

pub(super) fn activate(args: &BackendArgs, out: &mut impl Write) -> Result<(), Failure> {
    let balancer = Balancer::meant(&args.admin)?;
    let told = admin::run(command(&balancer, args, "/activate"))?;
    Ok(writeln!(out, "{}/{} is {}", args.backend.pool, args.backend.name, told.state)?)
}

pub(super) fn drain(args: &DrainArgs, out: &mut impl Write) -> Result<(), Failure> {
    let BackendName { pool, name } = &args.backend.backend;
    let balancer = Balancer::meant(&args.backend.admin)?;
    let told = admin::run(async {
        let told = command(&balancer, &args.backend, "/drain").await?;
        if args.wait { until_quiet(&balancer, args).await } else { Ok(told) }
    })?;
    let Live { connections, flows } = told.live;
    if args.wait {
        let quiet = args.quiet.as_secs_f64();
        return Ok(writeln!(out, "{pool}/{name} is drained: silent for {quiet} s")?);
    }
    Ok(writeln!(
        out,
        "{pool}/{name} gets no new connections; about {connections} are left on {flows} flows"
    )?)
}

async fn command(balancer: &Balancer, args: &BackendArgs, command: &str) -> Result<Told, Failure> {
    let escaped = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let user = ["SUDO_USER", "USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let mut path = About(&args.backend, command).to_string();
    path += &format!("?by={}", escaped(user.as_deref().unwrap_or("quic-lb")));
    if let Some(reason) = &args.reason {
        path += &format!("&reason={}", escaped(reason));
    }
    let answer = balancer.post(&path).await;
    answer.and_then(|body| read(&body)).map_err(|error| balancer.refused(&error))
}

/// Looks at the backend until nothing was heard on it for long enough.
async fn until_quiet(balancer: &Balancer, args: &DrainArgs) -> Result<Told, Failure> {
    let backend = &args.backend.backend;
    let path = About(backend, "").to_string();
    let begin = Instant::now();
    let (mut told_at, mut failures) = (begin, 0);
    loop {
        match balancer.get(&path).await.and_then(|body| read(&body)) {
            Ok(told) => {
                failures = 0;
                let Some(Drain { silent_seconds }) = told.drain else {
                    return Err(Failure::other(format_args!(
                        "{}/{} is {} again: somebody else has said so",
                        backend.pool, backend.name, told.state
                    )));
                };
                if silent_seconds >= args.quiet.as_secs_f64() {
                    return Ok(told);
                }
                if told_at.elapsed() >= TELL {
                    told_at = Instant::now();
                    let Live { connections, flows } = told.live;
                    print_to_stderr(format_args!(
                        "{}/{}: about {connections} connections on {flows} flows, the last heard {silent_seconds:.0} s ago",
                        backend.pool, backend.name
                    ));
                }
            }
            Err(error) => {
                failures += 1;
                if failures == FAILURES {
                    return Err(balancer.refused(&error));
                }
            }
        }
        if args.timeout.is_some_and(|timeout| begin.elapsed() >= timeout) {
            print_to_stderr(format_args!(
                "quic-lb: {}/{} is not drained yet",
                backend.pool, backend.name
            ));
            return Err(Failure::No);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn read(body: &str) -> io::Result<Told> {
    serde_json::from_str(body).map_err(io::Error::other)
}
