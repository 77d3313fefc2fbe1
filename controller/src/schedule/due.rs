//! When the next checkpoint is due, and when one is missed. Pure: a policy, a history and an instant in, an instant out.
//!
//! Intervals are counted on the monotonic clock; the wall clock only says whether a window of the day is open. However
//! long nothing was done, one checkpoint is due, not many.

use proto::v1::CheckpointPolicy;

use crate::retention::policy;

/// Shortest pause after a failure, milliseconds.
const BACKOFF_MS_MIN: i64 = 10_000;
/// Longest pause after failures, milliseconds, unless the interval is longer.
const BACKOFF_MS_MAX: i64 = 600_000;

/// One instant on both clocks, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Since some beginning; never goes back.
    pub mono_ms: i64,
    /// Since the Unix epoch; may jump.
    pub wall_ms: i64,
}

impl Now {
    /// What the wall clock said at an instant of the past or will say at one of the future, if it does not jump.
    fn wall_at(self, mono_ms: i64) -> i64 {
        self.wall_ms.saturating_add(mono_ms.saturating_sub(self.mono_ms))
    }

    /// When this wall time was; one of the future counts as now, because only a clock that jumped can have said it.
    pub fn mono_of(self, unix_ms: u64) -> i64 {
        let unix_ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
        self.mono_ms.saturating_sub(self.wall_ms.saturating_sub(unix_ms).max(0))
    }
}

/// What has happened to a VM, on the monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// Id of the newest checkpoint and when it was made.
    pub made: Option<(String, i64)>,
    /// When the policy was set.
    pub since: i64,
    /// Failures since then, and when the last of them was.
    pub failed: Option<(u32, i64)>,
}

fn every(policy: &CheckpointPolicy) -> i64 {
    i64::try_from(policy.every_ms).unwrap_or(i64::MAX)
}

/// How much earlier, or how long after the beginning: the same for the same VM and checkpoint, on every controller.
fn spread(policy: &CheckpointPolicy, vm_id: &str, made: &str) -> i64 {
    let hash = blake3::hash(format!("{vm_id} {made}").as_bytes());
    let number = hash.as_bytes().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte));
    i64::try_from(number % policy.jitter_ms.saturating_add(1).max(1)).unwrap_or(0)
}

/// How long the next attempt waits after so many failures.
pub fn back_off(policy: &CheckpointPolicy, failures: u32) -> i64 {
    let first = (every(policy) / 4).max(BACKOFF_MS_MIN);
    let most = every(policy).max(BACKOFF_MS_MAX);
    first.saturating_mul(1i64.checked_shl(failures.saturating_sub(1).min(30)).unwrap_or(i64::MAX)).min(most)
}

/// When the next checkpoint is due, never before now; windows of the day included.
pub fn next_due(checkpoint: &CheckpointPolicy, vm_id: &str, history: &History, now: Now) -> i64 {
    let mut due = match &history.made {
        Some((id, made)) => made.saturating_add(every(checkpoint)) - spread(checkpoint, vm_id, id),
        None => history.since.saturating_add(spread(checkpoint, vm_id, "")),
    };
    if let Some((failures, at)) = history.failed {
        due = due.max(at.saturating_add(back_off(checkpoint, failures)));
    }
    allowed(checkpoint, due.max(now.mono_ms), now)
}

/// The first instant from this one on at which a window of the day is open.
fn allowed(checkpoint: &CheckpointPolicy, mono_ms: i64, now: Now) -> i64 {
    if checkpoint.windows.is_empty() {
        return mono_ms;
    }
    let wall = now.wall_at(mono_ms);
    mono_ms.saturating_add(policy::zone(checkpoint).next_open(&checkpoint.windows, wall) - wall)
}

/// From when on the newest checkpoint is too old: one interval after the next one could have been made, which without
/// windows is twice the interval after the newest one.
pub fn missed_at(checkpoint: &CheckpointPolicy, history: &History, now: Now) -> i64 {
    // An old checkpoint from before the policy is no miss of the policy.
    let last = history.made.as_ref().map_or(history.since, |(_, made)| history.since.max(*made));
    allowed(checkpoint, last.saturating_add(every(checkpoint)), now).saturating_add(every(checkpoint))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::retention::policy::parse_window;

    const MINUTE: i64 = 60_000;
    const HOUR: i64 = 60 * MINUTE;

    fn every_5m() -> CheckpointPolicy {
        CheckpointPolicy { every_ms: 300_000, ..CheckpointPolicy::default() }
    }

    fn made(at: i64) -> History {
        History { made: Some(("c1".into(), at)), since: 0, failed: None }
    }

    fn noon(mono_ms: i64) -> Now {
        Now { mono_ms, wall_ms: 12 * HOUR }
    }

    #[test]
    fn an_interval_after_the_newest_and_at_once_after_an_outage() {
        assert_eq!(next_due(&every_5m(), "vm", &made(1000), noon(2000)), 301_000);
        assert_eq!(next_due(&every_5m(), "vm", &made(1000), noon(90 * HOUR)), 90 * HOUR);
        let none = History { made: None, since: 7, failed: None };
        assert_eq!(next_due(&every_5m(), "vm", &none, noon(7)), 7);
    }

    #[test]
    fn outside_of_its_windows_it_waits_for_the_next() {
        let windows = vec![parse_window("22:00-06:00").unwrap()];
        let policy = CheckpointPolicy { windows, ..every_5m() };
        assert_eq!(next_due(&policy, "vm", &made(0), noon(HOUR)), 11 * HOUR);
        let night = Now { mono_ms: HOUR, wall_ms: 23 * HOUR };
        assert_eq!(next_due(&policy, "vm", &made(0), night), HOUR);
        // The day is no miss: the first chance after noon is at 22:00.
        assert_eq!(missed_at(&policy, &made(HOUR), noon(HOUR)), 11 * HOUR + 5 * MINUTE);
        assert_eq!(missed_at(&every_5m(), &made(HOUR), noon(HOUR)), HOUR + 10 * MINUTE);
    }

    #[test]
    fn failures_wait_longer_and_longer_up_to_a_limit() {
        let waits: Vec<i64> = (1..8).map(|failures| back_off(&every_5m(), failures) / 1000).collect();
        assert_eq!(waits, [75, 150, 300, 600, 600, 600, 600]);
        let daily = CheckpointPolicy { every_ms: 24 * HOUR as u64, ..CheckpointPolicy::default() };
        assert_eq!(back_off(&daily, u32::MAX), 24 * HOUR);
        let failed = History { failed: Some((1, 400_000)), ..made(0) };
        assert_eq!(next_due(&every_5m(), "vm", &failed, noon(400_001)), 475_000);
    }

    #[test]
    fn many_vms_of_one_interval_spread() {
        let policy = CheckpointPolicy { jitter_ms: 30_000, ..every_5m() };
        let due: std::collections::BTreeSet<i64> =
            (0..100).map(|vm| next_due(&policy, &format!("vm{vm}"), &made(0), noon(0)) / 1000).collect();
        assert!(due.len() > 20 && due.iter().all(|at| (270..=300).contains(at)), "{due:?}");
        let again = next_due(&policy, "vm7", &made(0), noon(5));
        assert_eq!(next_due(&policy, "vm7", &made(0), noon(0)), again, "the same on every look");
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nothing_is_due_in_the_past(
            every_ms: u64, jitter_ms: u64, at: i64, since: i64, failures: u32, mono_ms: i64, wall_ms: i64, night: bool,
        ) {
            let windows = if night { vec![parse_window("22:00-06:00").unwrap()] } else { vec![] };
            let policy = CheckpointPolicy { every_ms, jitter_ms, windows, ..CheckpointPolicy::default() };
            let half = |value: i64| value / 4;
            let history = History {
                made: Some(("c".into(), half(at))), since: half(since), failed: Some((failures, half(at))),
            };
            let now = Now { mono_ms: half(mono_ms), wall_ms: half(wall_ms) };
            prop_assert!(next_due(&policy, "vm", &history, now) >= now.mono_ms);
            missed_at(&policy, &history, now);
            now.mono_of(every_ms);
        }
    }
}
