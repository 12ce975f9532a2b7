//! Whether all workers make progress, pure: how many rounds each has made goes in with every tick; who stands still comes out.
//!
//! A worker makes ten rounds a second at least, whatever arrives. Ticks are counted, and not the time: a machine that was
//! asleep wakes workers and this at the same moment.

/// A worker that has made no round for so many ticks stands still: for six seconds, longer than a hand-over may take.
const TICKS: u32 = 30;

/// What was seen of each worker.
#[derive(Debug, Default)]
pub(super) struct Progress(Vec<Seen>);

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    rounds: u64,
    /// Ticks without another one.
    still: u32,
}

impl Progress {
    /// Takes note of how many rounds each worker has made so far; says who stands still since this tick, or goes on again.
    pub(super) fn on_tick(&mut self, rounds: &[u64]) -> Vec<(usize, bool)> {
        self.0.resize(rounds.len(), Seen::default());
        let seen = self.0.iter_mut().zip(rounds).enumerate();
        let change = |(worker, (seen, &rounds)): (usize, (&mut Seen, &u64))| {
            let was_still = seen.stands_still();
            let still = if seen.rounds == rounds { seen.still.saturating_add(1) } else { 0 };
            *seen = Seen { rounds, still };
            let is_still = seen.stands_still();
            (is_still != was_still).then_some((worker, is_still))
        };
        seen.filter_map(change).collect()
    }

    /// The workers that stand still.
    pub(super) fn stuck(&self) -> Vec<usize> {
        let stuck = self.0.iter().enumerate().filter(|(_, seen)| seen.stands_still());
        stuck.map(|(worker, _)| worker).collect()
    }
}

impl Seen {
    const fn stands_still(self) -> bool {
        self.still >= TICKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_makes_no_round_for_many_ticks_stands_still_until_there_is_one() {
        let mut progress = Progress::default();
        for tick in 1..u64::from(TICKS) + 1 {
            assert_eq!(progress.on_tick(&[tick, 7]), [], "{tick}");
        }
        assert_eq!(progress.stuck(), [0; 0]);
        assert_eq!(progress.on_tick(&[100, 7]), [(1, true)]);
        assert_eq!(progress.on_tick(&[101, 7]), []);
        assert_eq!(progress.stuck(), [1]);
        assert_eq!(progress.on_tick(&[102, 8]), [(1, false)]);
        assert_eq!(progress.stuck(), [0; 0]);
        for _ in 0..TICKS - 1 {
            assert_eq!(progress.on_tick(&[102, 8]), []);
        }
        assert_eq!(progress.on_tick(&[102, 8]), [(0, true), (1, true)]);
    }
}
