//! What address validation costs: a token and the Retry packet around it, and checking the token
//! that comes back, beside the bare AES-GCM seals that neither can do without.
//!
//! `cargo bench -p quic --bench token` prints nanoseconds (median over interleaved rounds, so that
//! a noisy machine disturbs all rows alike) and, where valgrind is installed, instructions. Compare
//! rows of one run by their ratio; nanoseconds of different runs say little. Goals: a token and its
//! Retry in a microsecond, a check in 0.7.
//!
//! That nothing is allocated is tested where it matters, in the balancer's datapath
//! (`a_flood_is_answered_and_dropped_without_allocating`).

#![allow(clippy::disallowed_methods, reason = "a benchmark is its own shell")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and stops when its own input is wrong"
)]

use std::{
    hint::black_box,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use aes_gcm::{Aes128Gcm, KeyInit, aead::AeadInOut};
use quic::{
    ConnectionId,
    header::Version,
    random::Random,
    retry::{self, Retry},
    token::{RetryClaim, Token, TokenKey, TokenKeys, nat, shared_state},
};

/// Operations per round.
const BATCH: usize = 64;
const ROUNDS: usize = 301;
const REPEATS: usize = 20;
/// Batches per counted run; the same run with none is subtracted.
const COUNTED: usize = 100;

struct Case {
    name: &'static str,
    run: Box<dyn Fn()>,
}

/// All that a token is about.
#[derive(Clone, Copy)]
struct Subject {
    claim: RetryClaim,
    scid: ConnectionId,
    client: SocketAddr,
    now: SystemTime,
}

fn subject() -> Subject {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let client = SocketAddr::from(([198, 51, 100, 7], 50_000));
    let original_dcid = ConnectionId::new(&[5; 8]).unwrap();
    let claim = RetryClaim { original_dcid, client, expires: now + Duration::from_secs(10) };
    Subject { claim, scid: ConnectionId::new(&[0xe5; 8]).unwrap(), client, now }
}

fn write(subject: &Subject, token: &Token) -> usize {
    let retry = Retry {
        version: Version::V1,
        dcid: &[6; 8],
        scid: &subject.scid,
        original_dcid: &subject.claim.original_dcid,
        token,
    };
    let mut out = [0; retry::MAX_LEN];
    let len = retry.write(7, &mut out).unwrap();
    black_box(&out);
    len
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name, run: Box<dyn Fn()>| cases.push(Case { name, run });
    let repeat =
        |run: Box<dyn Fn()>| -> Box<dyn Fn()> { Box::new(move || (0..BATCH).for_each(|_| run())) };
    let cipher = Aes128Gcm::new(&[7; 16].into());
    for (name, body, associated) in
        [("bare AES-GCM of a NAT token", 26, 31), ("bare AES-GCM of a Retry's tag", 0, 120)]
    {
        let cipher = cipher.clone();
        add(
            name,
            repeat(Box::new(move || {
                let mut inside = [9u8; 26];
                let inside = &mut inside[..body];
                let associated = black_box(&[2u8; 128][..associated]);
                let tag = cipher.encrypt_inout_detached(&[1; 12].into(), associated, inside.into());
                black_box(tag).unwrap();
            })),
        );
    }
    let subject = subject();
    let key = || TokenKey::new(3, [7; 16], [9; 12]).unwrap();
    let keys = TokenKeys::new([key()]);
    let drawn = |random: &mut Random| -> [u8; 21] { random.octets() };
    add("randomness for a Retry", {
        let random = std::cell::RefCell::new(Random::new([1; 32]));
        repeat(Box::new(move || {
            black_box(drawn(&mut random.borrow_mut()));
        }))
    });
    add("NAT token and its Retry", {
        let key = key();
        repeat(Box::new(move || {
            let subject = black_box(&subject);
            let token = nat::seal(&key, [4; 12], &subject.claim, &subject.scid).unwrap();
            black_box(write(subject, &token));
        }))
    });
    add("shared-state token and its Retry", {
        let key = key();
        repeat(Box::new(move || {
            let subject = black_box(&subject);
            let token =
                shared_state::seal_retry(&key, [4; 12], &subject.claim, &subject.scid).unwrap();
            black_box(write(subject, &token));
        }))
    });
    add("NAT token, checked", {
        let token = nat::seal(&key(), [4; 12], &subject.claim, &subject.scid).unwrap();
        let keys = keys.clone();
        repeat(Box::new(move || {
            let subject = black_box(&subject);
            let claim = nat::open(&keys, &token, &subject.scid, subject.now).unwrap();
            black_box(nat::check_client(&claim, subject.client)).unwrap();
        }))
    });
    add("shared-state token, checked", {
        let token =
            shared_state::seal_retry(&key(), [4; 12], &subject.claim, &subject.scid).unwrap();
        let keys = keys.clone();
        repeat(Box::new(move || {
            let subject = black_box(&subject);
            let Subject { client, scid, now, .. } = subject;
            black_box(shared_state::open(&keys, &token, *client, scid, *now)).unwrap();
        }))
    });
    add("NAT token, forged", {
        let mut token = nat::seal(&key(), [4; 12], &subject.claim, &subject.scid).unwrap().to_vec();
        *token.last_mut().unwrap() ^= 1;
        repeat(Box::new(move || {
            let subject = black_box(&subject);
            let opened = nat::open(&keys, &token, &subject.scid, subject.now);
            black_box(opened).unwrap_err();
        }))
    });
    cases
}

/// Median nanoseconds per operation, by case.
fn measure(cases: &[Case]) -> Vec<f64> {
    let mut samples = vec![Vec::with_capacity(ROUNDS); cases.len()];
    for _ in 0..ROUNDS {
        for (case, samples) in cases.iter().zip(&mut samples) {
            let start = Instant::now();
            (0..REPEATS).for_each(|_| (case.run)());
            samples.push(start.elapsed());
        }
    }
    let each = |mut samples: Vec<Duration>| {
        samples.sort();
        samples[samples.len() / 2].as_nanos() as f64 / (REPEATS * BATCH) as f64
    };
    samples.into_iter().map(each).collect()
}

/// Instructions per operation, counted by running this program again under valgrind; `None` where
/// that is not possible.
fn count(case: usize) -> Option<f64> {
    let instructions = |repeats: usize| -> Option<f64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args(["--count", &case.to_string(), &repeats.to_string()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        text.split("Collected :").nth(1)?.split_whitespace().next()?.parse().ok()
    };
    Some((instructions(COUNTED)? - instructions(0)?) / (COUNTED * BATCH) as f64)
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, case, repeats] = arguments.as_slice()
        && flag == "--count"
    {
        let cases = cases();
        let case = &cases[case.parse::<usize>().unwrap()];
        (0..repeats.parse().unwrap()).for_each(|_| (case.run)());
        return;
    }
    let cases = cases();
    let nanoseconds = measure(&cases);
    let counts: Vec<_> = (0..cases.len()).map(count).collect();
    println!("| operation | ns | instructions | of a bare seal |");
    println!("| --- | ---: | ---: | ---: |");
    for ((case, ns), count) in cases.iter().zip(&nanoseconds).zip(&counts) {
        let count = count.map_or_else(|| "skipped".into(), |count| format!("{count:.0}"));
        println!("| {} | {ns:.0} | {count} | {:.2} |", case.name, ns / nanoseconds[0]);
    }
    if counts.iter().any(Option::is_none) {
        println!("\ninstructions skipped: valgrind is not installed or cannot run here");
    }
}
