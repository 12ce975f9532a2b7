//! How far the clock of a server is from ours, pure: what it makes of tokens that were made at other times goes in.
//!
//! A server honours a token until it is over, and a little longer, as clocks differ. The earliest token that it still honours
//! therefore says what time it is there. It is found by halving; a server of ours says of one that it does not honour whether its time is
//! over or has not come, others are taken to mean the former.

use std::time::{Duration, SystemTime};

use super::honours::TokenAnswer;

/// Clocks that differ by more are not told apart from other keys.
const RANGE: i64 = 24 * 3600;

/// A search for the earliest token that is honoured.
#[derive(Debug)]
pub(super) struct Search {
    lifetime: i64,
    /// The latest time that is known to be too early, in seconds from now.
    early: i64,
    /// The earliest time that is known not to be.
    late: i64,
    /// Whether any token was honoured.
    honoured: bool,
    asked: Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// What clients get.
    Now,
    /// The bound of the range: whether there is anything to be found in it.
    Latest,
    Between,
    /// The search is over.
    Nothing,
}

impl Search {
    /// Where tokens last for `lifetime`.
    pub(super) fn new(lifetime: Duration) -> Self {
        let lifetime = i64::try_from(lifetime.as_secs()).unwrap_or(RANGE);
        Self { lifetime, early: -RANGE, late: RANGE, honoured: false, asked: Asked::Now }
    }

    /// How many seconds from now a token has to be made that is offered next, if one has to.
    pub(super) const fn next(&self) -> Option<i64> {
        match self.asked {
            Asked::Now => Some(0),
            Asked::Latest => Some(self.late),
            Asked::Between => Some(self.early.midpoint(self.late)),
            Asked::Nothing => None,
        }
    }

    /// Takes what the server has made of it.
    pub(super) fn on_answer(&mut self, answer: TokenAnswer) {
        let Some(at) = self.next() else { return };
        self.honoured |= answer == TokenAnswer::Honoured;
        let is_early = match answer {
            TokenAnswer::Honoured | TokenAnswer::Future => false,
            TokenAnswer::Expired | TokenAnswer::Refused => true,
            TokenAnswer::Nothing => {
                self.honoured = false;
                self.asked = Asked::Nothing;
                return;
            }
        };
        self.asked = match (self.asked, is_early) {
            // The keys are others, or tokens mean nothing to it.
            (Asked::Latest, true) => Asked::Nothing,
            (Asked::Now, true) => {
                self.early = at;
                Asked::Latest
            }
            (_, true) => {
                self.early = at;
                Asked::Between
            }
            (_, false) => {
                self.late = at;
                Asked::Between
            }
        };
        if self.asked == Asked::Between && self.late - self.early <= 1 {
            self.asked = Asked::Nothing;
        }
    }

    /// By how many seconds the server's clock is ahead, give or take one, once the search is over and if it has found it.
    pub(super) fn skew(&self) -> Option<i64> {
        let is_over = self.asked == Asked::Nothing && self.honoured;
        let grace = i64::try_from(quic::token::CLOCK_SKEW.as_secs()).unwrap_or(0);
        // A part of a second is lost where a token says when it ends.
        is_over.then_some(self.late + self.lifetime + grace - 1)
    }
}

/// `time`, and `seconds` more.
pub(super) fn shifted(time: SystemTime, seconds: i64) -> SystemTime {
    let by = Duration::from_secs(seconds.unsigned_abs());
    let shifted = if seconds < 0 { time.checked_sub(by) } else { time.checked_add(by) };
    shifted.unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFETIME: i64 = 10;

    /// What a search comes to, and how many tokens it takes.
    fn search(mut server: impl FnMut(i64) -> TokenAnswer) -> (Option<i64>, u32) {
        let mut search = Search::new(Duration::from_secs(10));
        let mut asked = 0;
        while let Some(at) = search.next() {
            assert_eq!(search.skew(), None, "it is not over");
            search.on_answer(server(at));
            asked += 1;
            assert!(asked < 40, "{search:?}");
        }
        (search.skew(), asked)
    }

    /// A server of ours whose clock is `ahead`.
    fn ours(ahead: i64) -> impl Fn(i64) -> TokenAnswer {
        move |made| match made + LIFETIME - ahead {
            ..-1 => TokenAnswer::Expired,
            63.. => TokenAnswer::Future,
            _ => TokenAnswer::Honoured,
        }
    }

    /// One that looks only whether tokens are over.
    fn others(ahead: i64) -> impl Fn(i64) -> TokenAnswer {
        move |made| match made + LIFETIME - ahead {
            ..-1 => TokenAnswer::Refused,
            _ => TokenAnswer::Honoured,
        }
    }

    #[test]
    fn any_clock_within_a_day_is_found_in_a_few_questions() {
        for ahead in [0, 1, -1, 3, 11, 12, 13, -51, -53, -54, 60, -60, 3600, -3600, 86_000, -86_000]
        {
            for (found, asked) in [search(ours(ahead)), search(others(ahead))] {
                assert_eq!(found, Some(ahead), "{ahead}");
                assert!(asked < 20, "{ahead}: {asked}");
            }
        }
    }

    #[test]
    fn what_is_no_clock_is_not_taken_for_one() {
        assert_eq!(search(|_| TokenAnswer::Refused), (None, 2), "other keys");
        assert_eq!(search(|_| TokenAnswer::Nothing), (None, 1), "nobody there");
        assert_eq!(search(ours(200_000)).0, None);
        assert_eq!(search(ours(-200_000)).0, None);
        // It falls silent in the midst of the search.
        let mut left = 5;
        let found = search(|at| {
            left -= 1;
            if left == 0 { TokenAnswer::Nothing } else { ours(0)(at) }
        });
        assert_eq!(found.0, None);
    }
}
