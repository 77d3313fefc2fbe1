//! When to hold the guest back, and when to stop it: numbers in, decision out.
//!
//! A round sends what was dirty when it began; meanwhile the guest dirties more. Where rounds do not shrink quickly, the
//! guest is held back, in steps, as far as the operator allows. The policy stops the guest when
//! 1. what is left can be sent within the downtime the operator allows, or
//! 2. rounds no longer help (the guest dirties as fast as the wire carries and cannot be held back further), at a local
//!    minimum of what is left, or
//! 3. the rounds are used up.
//!
//! So it always ends. There is no floating point: the same numbers give the same decision everywhere.

use proto::v1::TransferPolicy;

/// Rounds before the guest is stopped, if the operator does not say.
pub const ROUNDS_MAX_DEFAULT: u32 = 30;
/// Downtime to aim at, if the operator does not say, in milliseconds.
pub const DOWNTIME_MS_DEFAULT: u32 = 30;
/// The most that a guest is ever held back: it must stay alive.
pub const THROTTLE_PERCENT_MAX: u32 = 99;
/// How far a guest is held back first, and how much further each time.
const THROTTLE_PERCENT_FIRST: u32 = 20;
const THROTTLE_PERCENT_STEP: u32 = 10;
/// Rounds in a row that may leave more than half of what they sent before the guest is held back (further).
const SLOW_ROUNDS_MAX: u32 = 2;
/// Rounds that may fail to lower what is left by an eighth before the policy looks for a minimum to stop at.
const STALLED_ROUNDS_MAX: u32 = 3;
/// Rounds with fewer bytes say little about the speed of the wire.
const TELLING_BYTES_MIN: u64 = 1 << 20;

/// What is known when a round has been acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RoundFacts {
    /// Bytes that the round sent.
    pub sent_bytes: u64,
    /// How long it took, from its first page to its acknowledgement.
    pub took_us: u64,
    /// Bytes that are dirty now.
    pub left_bytes: u64,
}

/// Why the guest is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopReason {
    /// What is left can be sent within the allowed downtime.
    Fits,
    /// Further rounds do not help.
    Stalled,
    /// All rounds are used up.
    RoundsUsedUp,
}

/// What to do after a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Send what became dirty, with the guest running, but held back as [`Rounds::throttle_percent`] says.
    Again,
    /// Stop the guest and send the last pages.
    Stop(StopReason),
}

/// The policy and what it has seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rounds {
    downtime_us_max: u64,
    rounds_max: u32,
    rounds: u32,
    stalled: u32,
    slow: u32,
    least_left_bytes: u64,
    bytes_per_s: u64,
    throttle_percent: u32,
    throttle_percent_max: u32,
}

impl Rounds {
    /// A policy that has seen nothing. `rounds_max` 0 means [`ROUNDS_MAX_DEFAULT`]; a downtime of 0 means
    /// [`DOWNTIME_MS_DEFAULT`]. Whether the guest may be held back at all is the operator's word.
    pub fn new(policy: &TransferPolicy) -> Self {
        let rounds_max = if policy.rounds_max == 0 { ROUNDS_MAX_DEFAULT } else { policy.rounds_max };
        let downtime_ms_max = if policy.downtime_ms_max == 0 { DOWNTIME_MS_DEFAULT } else { policy.downtime_ms_max };
        Self {
            downtime_us_max: u64::from(downtime_ms_max) * 1000,
            rounds_max,
            rounds: 0,
            stalled: 0,
            slow: 0,
            least_left_bytes: u64::MAX,
            bytes_per_s: 0,
            throttle_percent: 0,
            throttle_percent_max: policy.throttle_percent_max.min(THROTTLE_PERCENT_MAX),
        }
    }

    /// How much of its time the guest is to be held back until the next decision. It only grows.
    pub fn throttle_percent(&self) -> u32 {
        self.throttle_percent
    }

    /// Bytes per second of the last round that was long enough to tell.
    pub fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// How long what is left would take, if the speed is known.
    pub fn left_us(&self, left_bytes: u64) -> Option<u64> {
        let us = u128::from(left_bytes) * 1_000_000 / u128::from(self.bytes_per_s).max(1);
        (self.bytes_per_s > 0).then_some(us.min(u64::MAX.into()) as u64)
    }

    /// Takes in a round and decides.
    pub fn decide(&mut self, facts: RoundFacts) -> Decision {
        self.rounds = self.rounds.saturating_add(1);
        if facts.sent_bytes >= TELLING_BYTES_MIN || self.bytes_per_s == 0 {
            let rate = u128::from(facts.sent_bytes) * 1_000_000 / u128::from(facts.took_us.max(1));
            self.bytes_per_s = rate.min(u64::MAX.into()) as u64;
        }
        let helped = facts.left_bytes < self.least_left_bytes - self.least_left_bytes / 8;
        self.stalled = if helped { 0 } else { self.stalled.saturating_add(1) };
        self.least_left_bytes = self.least_left_bytes.min(facts.left_bytes);
        let slow = facts.left_bytes > facts.sent_bytes / 2;
        self.slow = if slow { self.slow.saturating_add(1) } else { 0 };
        let fits = self.left_us(facts.left_bytes).is_some_and(|us| us <= self.downtime_us_max);
        if facts.left_bytes == 0 || fits {
            Decision::Stop(StopReason::Fits)
        } else if self.rounds >= self.rounds_max {
            Decision::Stop(StopReason::RoundsUsedUp)
        } else if self.slow >= SLOW_ROUNDS_MAX && self.throttle_percent < self.throttle_percent_max {
            self.throttle_percent = match self.throttle_percent {
                0 => THROTTLE_PERCENT_FIRST,
                percent => percent + THROTTLE_PERCENT_STEP,
            }
            .min(self.throttle_percent_max);
            // What rounds did with a freer guest says nothing of the next ones.
            self.stalled = 0;
            Decision::Again
        } else if self.stalled >= STALLED_ROUNDS_MAX && self.is_near_least(facts.left_bytes) {
            Decision::Stop(StopReason::Stalled)
        } else {
            Decision::Again
        }
    }

    fn is_near_least(&self, left_bytes: u64) -> bool {
        left_bytes <= self.least_left_bytes.saturating_add(self.least_left_bytes / 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn policy(downtime_ms_max: u32, rounds_max: u32) -> Rounds {
        Rounds::new(&TransferPolicy { downtime_ms_max, rounds_max, ..Default::default() })
    }

    /// 1000 MiB/s wire, a guest that dirties `dirty` MiB/s of a working set of `set` MiB.
    fn run(mut rounds: Rounds, dirty: u64, set: u64) -> (u32, StopReason, u64) {
        let mut left = 1024 * MIB;
        for round in 1.. {
            let took_us = left / MIB * 1000;
            let next = (took_us * dirty / 1_000_000).min(set) * MIB;
            match rounds.decide(RoundFacts { sent_bytes: left, took_us, left_bytes: next }) {
                Decision::Again => left = next,
                Decision::Stop(reason) => return (round, reason, next / MIB),
            }
        }
        unreachable!()
    }

    #[test]
    fn an_idle_guest_is_stopped_after_one_round() {
        assert_eq!(run(policy(30, 0), 0, 512), (1, StopReason::Fits, 0));
    }

    #[test]
    fn a_converging_guest_is_stopped_when_the_rest_fits() {
        let (rounds, reason, left) = run(policy(30, 0), 500, 512);
        assert_eq!((rounds, reason), (6, StopReason::Fits));
        assert!(left <= 30, "{left} MiB at 1000 MiB/s is more than 30 ms");
    }

    #[test]
    fn a_guest_faster_than_the_wire_is_stopped_at_its_working_set() {
        let (rounds, reason, left) = run(policy(30, 0), 4000, 300);
        assert_eq!((reason, left), (StopReason::Stalled, 300));
        assert!(rounds <= 6, "{rounds}");
    }

    /// As [`run`], but the guest is held back as the policy says; also returns the last throttle.
    fn run_held_back(dirty: u64, set: u64, throttle_percent_max: u32) -> (StopReason, u64, u32) {
        let policy = TransferPolicy { downtime_ms_max: 30, throttle_percent_max, ..Default::default() };
        let (mut rounds, mut left) = (Rounds::new(&policy), 1024 * MIB);
        loop {
            let took_us = left / MIB * 1000;
            let free = u64::from(100 - rounds.throttle_percent());
            let next = (took_us * dirty * free / 100 / 1_000_000).min(set) * MIB;
            match rounds.decide(RoundFacts { sent_bytes: left, took_us, left_bytes: next }) {
                Decision::Again => left = next,
                Decision::Stop(reason) => return (reason, next / MIB, rounds.throttle_percent()),
            }
        }
    }

    #[test]
    fn a_guest_faster_than_the_wire_is_held_back_until_the_rest_fits() {
        let (reason, left, throttle) = run_held_back(4000, 600, 99);
        assert_eq!(reason, StopReason::Fits);
        assert!(left <= 30 && (70..=99).contains(&throttle), "{left} MiB, {throttle} %");
        let (reason, _, throttle) = run_held_back(900, 600, 99);
        assert!(reason == StopReason::Fits && (20..=60).contains(&throttle), "{throttle} %");
    }

    #[test]
    fn a_guest_that_converges_or_must_not_be_held_back_is_not() {
        assert_eq!(run_held_back(400, 600, 99).2, 0);
        assert_eq!(run_held_back(4000, 300, 0), (StopReason::Stalled, 300, 0));
        assert_eq!(run_held_back(4000, 300, 25).2, 25);
    }

    #[test]
    fn no_downtime_given_is_not_none_allowed() {
        let mut rounds = Rounds::new(&TransferPolicy::default());
        let facts = RoundFacts { sent_bytes: 1000 * MIB, took_us: 1_000_000, left_bytes: 25 * MIB };
        assert_eq!(rounds.decide(facts), Decision::Stop(StopReason::Fits));
    }

    #[test]
    fn a_stall_ends_at_a_minimum_not_at_a_peak() {
        let mut rounds = policy(1, 0);
        let mut decide =
            |left| rounds.decide(RoundFacts { sent_bytes: 64 * MIB, took_us: 64_000, left_bytes: left * MIB });
        assert!([100, 200, 190, 210, 205].into_iter().all(|left| decide(left) == Decision::Again));
        assert_eq!(decide(105), Decision::Stop(StopReason::Stalled));
    }

    #[test]
    fn a_short_round_does_not_spoil_the_estimate() {
        let mut rounds = policy(10, 0);
        rounds.decide(RoundFacts { sent_bytes: 1000 * MIB, took_us: 1_000_000, left_bytes: 100 * MIB });
        rounds.decide(RoundFacts { sent_bytes: 4096, took_us: 1_000_000, left_bytes: 50 * MIB });
        assert_eq!(rounds.bytes_per_s(), 1000 * MIB);
    }

    proptest! {
        #[test]
        fn it_always_ends(
            downtime in 0..1000u32,
            rounds_max in 0..60u32,
            throttle_percent_max in 0..200u32,
            facts in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 61),
        ) {
            let policy = TransferPolicy { downtime_ms_max: downtime, rounds_max, throttle_percent_max, ..Default::default() };
            let mut rounds = Rounds::new(&policy);
            let limit = if rounds_max == 0 { ROUNDS_MAX_DEFAULT } else { rounds_max } as usize;
            let decisions = facts.into_iter().map(|(sent_bytes, took_us, left_bytes)| {
                let before = rounds.throttle_percent();
                let decision = rounds.decide(RoundFacts { sent_bytes, took_us, left_bytes });
                let throttle = rounds.throttle_percent();
                assert!(before <= throttle && throttle <= throttle_percent_max.min(THROTTLE_PERCENT_MAX));
                decision
            });
            let ended = decisions.take(limit).any(|decision| matches!(decision, Decision::Stop(_)));
            prop_assert!(ended);
        }
    }
}
