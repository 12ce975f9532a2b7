//! The contract of Retry tokens: asks the servers of pools whose clients may be sent Retries, as a client that has been
//! sent one.
//!
//! The Retry is made here, as the balancer makes it for clients, and never leaves the process: the server sees
//! the Initial that follows, with the token in it. If it takes the token for what it is, it says in its
//! transport parameters which connection ID the client had drawn first, and the handshake comes to its end. If not, it
//! refuses the token, or the client sees that it was ignored. That is no check of health: a server that says
//! nothing at all has shown nothing.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time"
)]

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use quic_lb_config::{CheckKind, Config};
use tokio::{sync::Semaphore, time::sleep};

use super::{
    Task,
    handshake::{self, Client, Offer},
    honours::{Honours, TokenAnswer, UNKNOWN_EVERY},
    share_of,
    skew::{self, Search},
};
use crate::{
    admission::tokens::Tokens,
    control::{
        plane::{
            ControlPlane,
            backends::{CheckTarget, TokenTarget},
            watched::Name,
        },
        shared::Shared,
    },
};

/// From one question to a server that honours tokens to the next.
const KNOWN_EVERY: Duration = Duration::from_secs(30);

/// The same where it honours tokens, though not of every key: somebody may be waiting for that who rotates them.
const KEY_UNKNOWN_EVERY: Duration = Duration::from_secs(5);

/// From one look at the clock of a server to the next; each takes some twenty tokens.
const COMPARED_EVERY: Duration = Duration::from_secs(300);

/// As [`COMPARED_EVERY`], of one that refuses tokens.
const DOUBTED_EVERY: Duration = Duration::from_secs(10);

/// Servers that are asked at once.
const AT_ONCE: usize = 64;

/// The task of each server that is asked.
pub(super) struct Questions {
    of: Option<Arc<Config>>,
    running: BTreeMap<Name, (TokenTarget, Task)>,
    places: Arc<Semaphore>,
}

impl Questions {
    pub(super) fn new() -> Self {
        Self { of: None, running: BTreeMap::new(), places: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Begins and ends tasks, so that those servers are asked that the configuration says, and no others.
    pub(super) fn follow(&mut self, shared: &Arc<Shared>) {
        let plane = shared.plane();
        let config = plane.shared_config();
        if self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, &config)) {
            return;
        }
        let targets = plane.token_targets();
        drop(plane);
        self.of = Some(config);
        let mut before = std::mem::take(&mut self.running);
        for target in targets {
            let name = target.target.name.clone();
            let running = before.remove(&name).filter(|(of, _)| *of == target);
            let running = running.unwrap_or_else(|| {
                let (shared, places) = (Arc::clone(shared), Arc::clone(&self.places));
                let asking = ask(shared, target.target.clone(), places);
                (target, Task(tokio::spawn(asking)))
            });
            self.running.insert(name, running);
        }
    }
}

/// Asks one server again and again.
async fn ask(shared: Arc<Shared>, target: CheckTarget, places: Arc<Semaphore>) {
    let CheckKind::Quic(handshake) = &target.check.kind else { return };
    let client = Client::new(handshake, None, target.check.timeout);
    let (mut compared, mut knows_all) = (None, true);
    sleep(share_of(Duration::from_millis(100))).await;
    loop {
        // They are never closed.
        let place = places.acquire().await.ok();
        let tokens = shared.plane().tokens();
        let honours = match tokens {
            Some(tokens) => {
                let answer = offer(&target, &client, &tokens, 0).await;
                let told = |plane: &mut ControlPlane| plane.on_token(&target, answer);
                let honours = shared.change(told);
                let every = match answer {
                    TokenAnswer::Honoured | TokenAnswer::Nothing => COMPARED_EVERY,
                    TokenAnswer::Expired | TokenAnswer::Future | TokenAnswer::Refused => {
                        DOUBTED_EVERY
                    }
                };
                if compared.is_none_or(|at: Instant| at.elapsed() >= every) {
                    compared = Some(Instant::now());
                    let skew = compare(&target, &client, &tokens, answer).await;
                    shared.change(|plane: &mut ControlPlane| plane.on_skew(&target, skew));
                }
                knows_all = ask_of_keys(&shared, &target, &client, &tokens, answer).await;
                honours
            }
            None => Honours::Unknown,
        };
        drop(place);
        let every = match honours {
            Honours::Yes { doubted: false } if knows_all => KNOWN_EVERY,
            Honours::Yes { doubted: false } => KEY_UNKNOWN_EVERY,
            Honours::Yes { doubted: true } | Honours::Unknown | Honours::No => UNKNOWN_EVERY,
        };
        sleep(every - share_of(every / 10)).await;
    }
}

/// Asks about each key: whoever puts another one in front has to know first that servers honour it. `first` is what the server
/// has made of the one in front. Says whether it honours all of them.
async fn ask_of_keys(
    shared: &Shared,
    target: &CheckTarget,
    client: &Result<Client, rustls::Error>,
    tokens: &Arc<Tokens>,
    first: TokenAnswer,
) -> bool {
    let mut honoured = BTreeMap::new();
    for (nth, sequence) in tokens.sequences().enumerate() {
        let answer = match (nth, first) {
            (0, first) => first,
            // Then it does not answer at all.
            (_, TokenAnswer::Nothing) => TokenAnswer::Nothing,
            _ => match tokens.with_key(sequence) {
                Some(tokens) => offer(target, client, &Arc::new(tokens), 0).await,
                None => TokenAnswer::Nothing,
            },
        };
        if answer != TokenAnswer::Nothing {
            honoured.insert(sequence, answer == TokenAnswer::Honoured);
        }
    }
    let knows_all = tokens.sequences().all(|sequence| honoured.get(&sequence) == Some(&true));
    shared.plane().on_token_keys(target, tokens, honoured);
    knows_all
}

/// Offers a token that is made so many seconds from now.
async fn offer(
    target: &CheckTarget,
    client: &Result<Client, rustls::Error>,
    tokens: &Arc<Tokens>,
    seconds: i64,
) -> TokenAnswer {
    let time = skew::shifted(SystemTime::now(), seconds);
    handshake::offer(target, client, Offer { tokens: Arc::clone(tokens), time }).await
}

/// Compares clocks, where a token of now was answered like this.
async fn compare(
    target: &CheckTarget,
    client: &Result<Client, rustls::Error>,
    tokens: &Arc<Tokens>,
    now: TokenAnswer,
) -> Option<i64> {
    let mut search = Search::new(tokens.lifetime());
    search.on_answer(now);
    while let Some(seconds) = search.next() {
        search.on_answer(offer(target, client, tokens, seconds).await);
    }
    search.skew()
}
