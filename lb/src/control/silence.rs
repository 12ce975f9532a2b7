//! Whether a backend that is asked does not answer, pure: what the workers saw during a tick goes in, with the time.
//!
//! A backend is silent when several clients have asked it to begin a connection and nothing at all came from it
//! since: neither an answer to them nor a datagram of any other connection. Servers also leave first flights unanswered that
//! somebody has made up, so that what counts is how the rest of the pool fares: unless most of what the others
//! were asked meanwhile was answered, nothing speaks against this one. So
//!
//! - forged first flights that no server answers show nothing where they go to all, since then the others leave most
//!   unanswered too;
//! - where they are aimed at one backend, any client that it does answer clears it. Only one that nobody uses can be made
//!   to look silent, and never the last one that answers;
//! - where clients get no answers for reasons of their own or of the network, nobody does, and nobody is to blame.
//!
//! Where the kernel has said once that the backend cannot be sent to, that and a shorter silence are enough, whatever
//! the others do. Most systems send such errors to one host once a second, whatever they are about, so that more of
//! them may be long in coming.

use std::time::{Duration, Instant};

/// First flights that nothing came back for.
const ASKED: u64 = 3;

/// How long nothing came back: longer than servers pause that are well.
const PATIENCE: Duration = Duration::from_millis(1500);

/// As above where the kernel has said something.
const ASKED_AFTER_REFUSAL: u64 = 2;
const PATIENCE_AFTER_REFUSAL: Duration = Duration::from_millis(500);

/// First flights further apart than this do not add up.
const LATELY: Duration = Duration::from_secs(10);

/// What was seen of a backend during a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    /// First flights that it was asked by.
    pub(crate) asked: u64,
    /// Whether anything came from it.
    pub(crate) heard: bool,
    /// Whether the kernel said that it cannot be sent to.
    pub(crate) refused: bool,
}

/// How the backends of a pool fare that answer at all: numbers that only grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Norm {
    /// First flights that they were asked by.
    pub(crate) asked: u64,
    /// Those of them that they answered.
    pub(crate) answered: u64,
}

/// What speaks for the silence of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Silence(Option<Unanswered>);

/// What it was asked since it was heard last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unanswered {
    since: Instant,
    last: Instant,
    asked: u64,
    /// The norm of its pool when that began.
    norm: Norm,
    /// When the kernel said first that it cannot be sent to, and what it was asked from then on.
    refused: Option<(Instant, u64)>,
}

impl Norm {
    /// Whether most was answered since it was `before`.
    fn is_met_since(self, before: Self) -> bool {
        let asked = self.asked.saturating_sub(before.asked);
        let answered = self.answered.saturating_sub(before.answered);
        answered > 0 && answered.saturating_mul(2) >= asked
    }
}

impl Silence {
    /// Takes note of a tick that ends at `now`, when its pool fares by `norm`; says whether the backend is
    /// silent, and begins anew with that.
    pub(crate) fn on_tick(&mut self, now: Instant, seen: Seen, norm: Norm) -> bool {
        let Seen { asked, heard, refused } = seen;
        let is_over = |before: &Unanswered| now.saturating_duration_since(before.last) > LATELY;
        if heard || self.0.as_ref().is_some_and(is_over) {
            self.0 = None;
        }
        // Which came first is not known. If it was the answer, this is the one refusal for a while.
        if (heard && !refused) || (self.0.is_none() && asked == 0 && !refused) {
            return false;
        }
        let asked = if heard { 0 } else { asked };
        let nothing = Unanswered { since: now, last: now, asked: 0, norm, refused: None };
        let unanswered = self.0.get_or_insert(nothing);
        unanswered.asked = unanswered.asked.saturating_add(asked);
        if let Some((_, since_then)) = &mut unanswered.refused {
            *since_then = since_then.saturating_add(asked);
        } else if refused {
            unanswered.refused = Some((now, asked));
        }
        if asked > 0 || refused {
            unanswered.last = now;
        }
        let is_silent = unanswered.is_silence(now, norm);
        if is_silent {
            self.0 = None;
        }
        is_silent
    }
}

impl Unanswered {
    fn is_silence(&self, now: Instant, norm: Norm) -> bool {
        let for_long = |since, patience| now.saturating_duration_since(since) >= patience;
        let after_refusal = self.refused.is_some_and(|(since, asked)| {
            asked >= ASKED_AFTER_REFUSAL && for_long(since, PATIENCE_AFTER_REFUSAL)
        });
        let without = || self.asked >= ASKED && for_long(self.since, PATIENCE);
        after_refusal || (without() && norm.is_met_since(self.norm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(200);

    /// One backend, and how its pool fares.
    struct Bench {
        start: Instant,
        ticks: u32,
        silence: Silence,
        norm: Norm,
    }

    impl Bench {
        fn new() -> Self {
            let start = Instant::now();
            Self { start, ticks: 0, silence: Silence::default(), norm: Norm::default() }
        }

        /// A tick in which the backend is asked so often, and the others so often and answer so often.
        fn tick(&mut self, asked: u64, others: [u64; 2]) -> bool {
            self.see(Seen { asked, ..Seen::default() }, others)
        }

        fn see(&mut self, seen: Seen, [asked, answered]: [u64; 2]) -> bool {
            self.norm.asked += asked;
            self.norm.answered += answered;
            self.ticks += 1;
            self.silence.on_tick(self.start + TICK * self.ticks, seen, self.norm)
        }

        /// In how many ticks like this it is silent, of so many.
        fn silent_after(&mut self, asked: u64, others: [u64; 2], ticks: u32) -> Option<u32> {
            (1..=ticks).find(|_| self.tick(asked, others))
        }
    }

    #[test]
    fn who_is_asked_and_never_answers_is_silent_after_a_second_and_a_half() {
        assert_eq!(Bench::new().silent_after(5, [5, 5], 100), Some(9));
        // Few clients are enough, and two are not.
        let mut bench = Bench::new();
        assert!(!bench.tick(1, [9, 9]) && !bench.tick(1, [0, 0]));
        assert_eq!(bench.silent_after(0, [1, 1], 20), None);
        assert!(bench.tick(1, [0, 0]));
        // It begins anew.
        assert_eq!(bench.silent_after(5, [5, 5], 100), Some(9));
    }

    #[test]
    fn whatever_it_says_clears_it() {
        let mut bench = Bench::new();
        for turn in 0..100 {
            let heard = turn % 7 == 0;
            assert!(!bench.see(Seen { asked: 50, heard, refused: false }, [5, 5]), "{turn}");
        }
    }

    #[test]
    fn who_is_asked_now_and_then_is_not_silent() {
        let mut bench = Bench::new();
        for turn in 0..1000 {
            // More than ten seconds apart.
            assert!(!bench.tick(u64::from(turn % 52 == 0), [5, 5]), "{turn}");
        }
        let mut bench = Bench::new();
        let silent = (0..200).find(|turn| bench.tick(u64::from(turn % 50 == 0), [5, 5]));
        assert_eq!(silent, Some(100), "the third one, ten seconds after the second");
    }

    #[test]
    fn nobody_is_silent_where_the_others_answer_less_than_half_or_nobody_does() {
        // A flood that no server answers, a pool of one, an outage of clients.
        for others in [[5, 2], [1000, 5], [5, 0], [0, 0]] {
            assert_eq!(Bench::new().silent_after(5, others, 1000), None, "{others:?}");
        }
        for others in [[6, 3], [1, 1], [0, 1]] {
            assert_eq!(Bench::new().silent_after(5, others, 1000), Some(9), "{others:?}");
        }
        // What they did before it was asked means nothing.
        let mut bench = Bench::new();
        assert_eq!(bench.silent_after(0, [100, 100], 10), None);
        assert_eq!(bench.silent_after(5, [5, 2], 100), None);
        assert_eq!(bench.silent_after(0, [300, 300], 2), Some(1));
    }

    #[test]
    fn one_refusal_and_half_a_second_of_silence_are_enough_whatever_the_others_do() {
        let refused = |asked| Seen { asked, heard: false, refused: true };
        for asked in [1, 5] {
            let mut bench = Bench::new();
            assert!(!bench.see(refused(asked), [0, 0]));
            assert_eq!(bench.silent_after(1, [0, 0], 100), Some(3), "{asked}");
        }
        // Nobody has asked since.
        let mut bench = Bench::new();
        assert!(!bench.see(refused(1), [0, 0]));
        assert_eq!(bench.silent_after(0, [5, 5], 40), None);
        assert!(bench.tick(1, [0, 0]));
        // What was asked before does not count: a server may have started anew in between.
        let mut bench = Bench::new();
        assert_eq!(bench.silent_after(5, [0, 0], 3), None);
        assert!(!bench.see(refused(0), [0, 0]));
        assert_eq!(bench.silent_after(0, [0, 0], 40), None);
        assert!(!bench.see(refused(1), [0, 0]));
        assert!(bench.tick(1, [0, 0]));
        // It answers.
        let mut bench = Bench::new();
        assert!(!bench.see(refused(5), [0, 0]));
        assert!(!bench.see(Seen { asked: 5, heard: true, refused: false }, [0, 0]));
        assert_eq!(bench.silent_after(5, [0, 0], 100), None);
    }

    /// Whoever is killed has answered a moment ago, and its host may say nothing more for a second.
    #[test]
    fn a_refusal_counts_beside_an_answer_unless_another_follows() {
        let both = Seen { asked: 5, heard: true, refused: true };
        let mut bench = Bench::new();
        assert!(!bench.see(both, [0, 0]));
        assert_eq!(bench.silent_after(1, [0, 0], 100), Some(3));
        let mut bench = Bench::new();
        assert!(!bench.see(both, [0, 0]));
        assert!(!bench.see(Seen { refused: false, ..both }, [0, 0]));
        assert_eq!(bench.silent_after(5, [0, 0], 100), None);
    }
}
