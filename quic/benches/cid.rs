//! What it costs to read a routable connection ID: clear text, single pass and four pass, one at a
//! time and batched, beside the bare AES blocks that the method cannot do without.
//!
//! `cargo bench -p quic --bench cid` prints nanoseconds (median over interleaved rounds, so that a
//! noisy machine disturbs all rows alike) and, where valgrind is installed, instructions. Compare
//! rows of one run by their ratio; nanoseconds of different runs say little.

#![allow(clippy::disallowed_methods, reason = "a benchmark is its own shell")]
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a benchmark prints, and stops when its own input is wrong"
)]

use std::{
    hint::black_box,
    process::Command,
    time::{Duration, Instant},
};

use aes::{
    Aes128Enc, Block,
    cipher::{BlockCipherEncrypt, KeyInit},
};
use quic::routable::{CidConfig, ConfigId, Decoder, Key, ServerId, Unroutable};

/// Connection IDs per round: what a worker receives at once.
const BATCH: usize = 64;
const ROUNDS: usize = 301;
const REPEATS: usize = 50;
/// Decodes per counted run; the same run with none is subtracted.
const COUNTED: usize = 200;

struct Case {
    name: &'static str,
    run: Box<dyn Fn()>,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name, run: Box<dyn Fn()>| cases.push(Case { name, run });
    let cipher = Aes128Enc::new(&[7; 16].into());
    for (name, passes) in [("bare AES, 1 block", 1), ("bare AES, 3 dependent blocks", 3)] {
        let cipher = cipher.clone();
        add(
            name,
            Box::new(move || {
                for index in 0..BATCH {
                    let mut block = Block::from([index as u8; 16]);
                    for _ in 0..passes {
                        cipher.encrypt_block(&mut block);
                    }
                    black_box(block);
                }
            }),
        );
    }
    add(
        "bare AES, 3 dependent blocks, 8 side by side",
        Box::new(move || {
            for index in 0..BATCH / 8 {
                let mut blocks = [Block::from([index as u8; 16]); 8];
                for _ in 0..3 {
                    cipher.encrypt_blocks(&mut blocks);
                }
                black_box(blocks);
            }
        }),
    );
    let rows = [
        ("clear text, 2 + 6 bytes", "clear text, batched", 2, 6, false),
        ("single pass, 8 + 8 bytes", "single pass, batched", 8, 8, true),
        ("four pass, 2 + 6 bytes", "four pass, batched", 2, 6, true),
        ("four pass, 10 + 5 bytes (all passes)", "four pass, all passes, batched", 10, 5, true),
    ];
    for (one, batched, server_id_len, nonce_len, encrypted) in rows {
        let key = encrypted.then(|| Key::new([7; 16]));
        let id = ConfigId::new(1).unwrap();
        let config = CidConfig::new(id, server_id_len, nonce_len, key.as_ref()).unwrap();
        let cids: Vec<Vec<u8>> = (0..BATCH)
            .map(|n| {
                let server_id = ServerId::new(&vec![n as u8; server_id_len]).unwrap();
                let cid = config.encode(&server_id, &vec![!n as u8; nonce_len]).unwrap();
                // As behind the first octet of a short header: the rest of the packet follows.
                [cid.as_slice(), &[0x55; 40]].concat()
            })
            .collect();
        let decoder = Decoder::new([config]);
        {
            let (decoder, cids) = (decoder.clone(), cids.clone());
            add(
                one,
                Box::new(move || {
                    for cid in &cids {
                        let _ = black_box(decoder.decode(black_box(cid)));
                    }
                }),
            );
        }
        add(
            batched,
            Box::new(move || {
                let mut slices = [&[][..]; BATCH];
                for (slice, cid) in slices.iter_mut().zip(&cids) {
                    *slice = cid;
                }
                let mut out = [Err(Unroutable::Empty); BATCH];
                decoder.decode_batch(black_box(&slices), &mut out);
                let _ = black_box(out);
            }),
        );
    }
    cases
}

/// Median nanoseconds per connection ID, by case.
fn measure(cases: &[Case]) -> Vec<f64> {
    let mut samples = vec![Vec::with_capacity(ROUNDS); cases.len()];
    for _ in 0..ROUNDS {
        for (case, samples) in cases.iter().zip(&mut samples) {
            let start = Instant::now();
            (0..REPEATS).for_each(|_| (case.run)());
            samples.push(start.elapsed());
        }
    }
    let per_cid = |mut samples: Vec<Duration>| {
        samples.sort();
        samples[samples.len() / 2].as_nanos() as f64 / (REPEATS * BATCH) as f64
    };
    samples.into_iter().map(per_cid).collect()
}

/// Instructions per connection ID, counted by running this program again under valgrind; `None`
/// where that is not possible.
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
    println!("| per connection ID | ns | instructions | of three bare blocks |");
    println!("| --- | ---: | ---: | ---: |");
    let floor = nanoseconds[1];
    for ((case, ns), count) in cases.iter().zip(&nanoseconds).zip(&counts) {
        let count = count.map_or_else(|| "skipped".into(), |count| format!("{count:.0}"));
        println!("| {} | {ns:.1} | {count} | {:.2} |", case.name, ns / floor);
    }
    if counts.iter().any(Option::is_none) {
        println!("\ninstructions skipped: valgrind is not installed or cannot run here");
    }
}
