//! Address validation on one listener as the control plane sees it: the attempts of the last second
//! and the servers' reports go in, where the listener stands comes out.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use quic_lb_config::{Config, Listener, RetryMode};
use tracing::{info, warn};

use crate::admission::mode::{Load, Phase, Reason, Settings, Switch};

/// What is looked back at.
const WINDOW: Duration = Duration::from_secs(1);

/// One listener.
#[derive(Debug)]
pub(crate) struct Validation {
    switch: Switch,
    switches: [u64; Reason::ALL.len()],
    /// How many attempts there had been at the ticks of the last second, oldest first.
    seen: VecDeque<(Instant, u64)>,
}

impl Validation {
    /// Where a listener with this mode stands when the process begins.
    pub(crate) const fn at_start(mode: RetryMode) -> Self {
        let switch = Switch::at_start(mode);
        Self { switch, switches: [0; Reason::ALL.len()], seen: VecDeque::new() }
    }

    /// Begins anew where the listener does; what was counted stays.
    pub(crate) fn begin_anew(&mut self, mode: RetryMode) {
        *self = Self { switches: self.switches, ..Self::at_start(mode) };
    }

    /// Takes note of all attempts so far and of the most half-open connections of a server, where clients may be
    /// asked for proof by this `mode`. Says whether the phase is another one.
    pub(crate) fn on_tick(
        &mut self,
        now: Instant,
        config: &Config,
        listener: &Listener,
        mode: RetryMode,
        attempts: u64,
        half_open: u64,
    ) -> bool {
        let load = Load { rate: self.rate(now, attempts), half_open };
        let settings =
            Settings { mode, transition: config.retry.transition, adaptive: config.retry.adaptive };
        let before = self.switch;
        self.switch = before.on_load(now, load, &settings);
        self.report(&listener.name, before, load);
        before.phase().at(now) != self.switch.phase().at(now)
    }

    pub(crate) const fn phase(&self) -> Phase {
        self.switch.phase()
    }

    /// How often validation began, by reason.
    pub(crate) const fn switches(&self) -> [u64; Reason::ALL.len()] {
        self.switches
    }

    fn rate(&mut self, now: Instant, attempts: u64) -> u64 {
        // The youngest that is a second old, or else the oldest, is what is compared with.
        while self.seen.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            self.seen.pop_front();
        }
        self.seen.push_back((now, attempts));
        let Some((at, before)) = self.seen.front() else { return 0 };
        let (elapsed, count) = (now.duration_since(*at), attempts.saturating_sub(*before));
        // A process that has just begun has not seen a second; what it has seen counts.
        let millis = elapsed.max(WINDOW).as_millis();
        u64::try_from(u128::from(count) * WINDOW.as_millis() / millis).unwrap_or(u64::MAX)
    }

    fn report(&mut self, listener: &str, before: Switch, load: Load) {
        let Load { rate, half_open } = load;
        match (before.reason(), self.switch.reason()) {
            (None, Some(reason)) => {
                self.switches[reason as usize] += 1;
                let why = reason.label();
                match reason {
                    Reason::Configured => info!(listener, why, "address validation begins"),
                    Reason::Rate | Reason::HalfOpen => {
                        warn!(listener, why, rate, half_open, "address validation begins");
                    }
                }
            }
            (Some(_), None) => info!(listener, rate, half_open, "address validation ends"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use quic_lb_config::Adaptive;

    use super::*;
    use crate::fixtures;

    const TICK: Duration = Duration::from_millis(200);

    fn config() -> Config {
        let mut config = fixtures::config(true);
        config.retry.mode = RetryMode::Adaptive;
        config.retry.adaptive = Adaptive {
            on_rate: 100,
            off_rate: 50,
            hold: Duration::from_secs(2),
            ..Adaptive::default()
        };
        config
    }

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut validation = Validation::at_start(RetryMode::Adaptive);
        let start = Instant::now();
        let mut total = 0;
        for tick in 0..50u32 {
            let rate = validation.rate(start + TICK * tick, total);
            let expected = if tick < 5 { u64::from(tick) * 20 } else { 100 };
            assert_eq!(rate, expected, "tick {tick}");
            total += 20;
        }
        assert!(validation.seen.len() <= 7);
        // A tick that comes late finds as many in more time.
        assert_eq!(validation.rate(start + TICK * 59, total), 10);
    }

    #[test]
    fn an_attack_is_noticed_within_a_tick_and_its_end_after_the_hold() {
        let config = config();
        let mut validation = Validation::at_start(RetryMode::Adaptive);
        let start = Instant::now();
        let mut attempts = 0;
        let mut changes = Vec::new();
        for tick in 0..100u32 {
            let now = start + TICK * tick;
            // From tick 5 to tick 20, a thousand a tick; otherwise one.
            attempts += if (5..20).contains(&tick) { 1000 } else { 1 };
            if validation.on_tick(
                now,
                &config,
                &config.listeners[0],
                RetryMode::Adaptive,
                attempts,
                0,
            ) {
                changes.push((tick, validation.phase().label()));
            }
        }
        // The last of it is seen for a second, and two follow.
        // (That the transition is over needs nobody to say so.)
        assert_eq!(changes, [(5, "transition"), (34, "inactive")]);
        assert_eq!(validation.switches(), [0, 1, 0]);
    }

    #[test]
    fn half_open_connections_of_a_server_are_reason_enough() {
        let config = config();
        let mut validation = Validation::at_start(RetryMode::Adaptive);
        let now = Instant::now();
        assert!(!validation.on_tick(
            now,
            &config,
            &config.listeners[0],
            RetryMode::Adaptive,
            0,
            999
        ));
        assert!(validation.on_tick(
            now,
            &config,
            &config.listeners[0],
            RetryMode::Adaptive,
            0,
            1000
        ));
        assert_eq!(validation.switches(), [0, 0, 1]);
    }
}
