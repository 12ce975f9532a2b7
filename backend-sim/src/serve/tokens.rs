//! What became of the tokens that clients proved their addresses by, and of datagrams of connections that are gone: counted, and told
//! when an operator may have to look.

use std::{sync::Arc, time::Duration};

use quic::{
    driver::Endpoint,
    token::InvalidToken,
    transport::{DropReason, TokenResult},
};
use tokio::time::{self, Instant, MissedTickBehavior};
use tracing::warn;

use super::Shared;

/// From one look to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// From one record in the log to the next of the same reason, at least.
const QUIET: Duration = Duration::from_secs(60);

/// Looks for as long as it is polled.
pub(super) async fn watch(endpoint: Endpoint, shared: Arc<Shared>) {
    let mut ticks = time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // How many an operator was told of, and when there may be another record, by reason.
    let mut told = InvalidToken::ALL.map(|why| (why, 0, Instant::now()));
    loop {
        let now = ticks.tick().await;
        look(&endpoint, &shared);
        for (why, told, tell_again) in &mut told {
            let refused = endpoint.tokens_refused(*why);
            if refused > *told && now >= *tell_again {
                let more = refused - *told;
                warn!(
                    reason = why.label(),
                    refused = more,
                    hint = hint(*why),
                    "Retry tokens are refused"
                );
                (*told, *tell_again) = (refused, now + QUIET);
            }
        }
    }
}

/// Counts what has become of tokens and of resets since the last look.
fn look(endpoint: &Endpoint, shared: &Shared) {
    let metrics = &shared.metrics;
    for (result, word) in [
        (TokenResult::Retry, "retry"),
        (TokenResult::NewToken, "new_token"),
        (TokenResult::Spent, "spent"),
        (TokenResult::Ignored, "ignored"),
    ] {
        metrics.tokens.set(word, endpoint.tokens(result));
    }
    metrics.resets.set("sent", endpoint.resets_sent());
    metrics.resets.set("withheld", endpoint.dropped(DropReason::TooManyResets));
    for why in InvalidToken::ALL {
        metrics.tokens.set(why.label(), endpoint.tokens_refused(why));
    }
}

/// Where to look first.
const fn hint(why: InvalidToken) -> &'static str {
    match why {
        InvalidToken::Expired | InvalidToken::Future => {
            "compare the clocks of balancers and servers"
        }
        InvalidToken::UnknownKey => {
            "a balancer has a key that this server has not: compare retry.keys, and reload servers first"
        }
        InvalidToken::Seal => {
            "forged, or keys differ under one sequence number: compare retry.keys and retry.format"
        }
        InvalidToken::Address => {
            "made for another address: retry.format shared_state needs servers that see clients' addresses"
        }
        InvalidToken::Port => "made for another port: a NAT has moved since, or somebody copied it",
        InvalidToken::Type | InvalidToken::Truncated | InvalidToken::OriginalDcidLength => {
            "forged, or of another format: compare retry.format"
        }
    }
}
