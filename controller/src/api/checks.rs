//! Checks by the clock: samples of a VM's packs are hashed again, and its newest sound checkpoint is drilled, as often as its
//! policy says.
//!
//! One check at a time in the cluster: they are to be noticed by nobody. Intervals count from the last check that the ledger
//! knows. A check that could not be made (the bucket or the host is away) is tried again after a pause; one that found
//! something wrong was made.

use std::collections::HashMap;
use std::time::Duration;

use proto::v1::DrillRequest;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Api;
use crate::api::plans;
use crate::failure::Failure;
use crate::ledger::damage::is_damaged;
use crate::ledger::policy::Scheduled;
use crate::ledger::unix_ms;
use crate::saga::world::World;
use crate::schedule::Schedule;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// After a check that could not be made.
const PAUSE: Duration = Duration::from_secs(60);
/// Least packs of a sample, if there are as many.
const SAMPLE_MIN: usize = 16;
/// Most packs of a sample: a gibibyte at most.
const SAMPLE_MAX: usize = 64;

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Check {
    /// Some packs are hashed again.
    Sample,
    /// A checkpoint is restored and watched.
    Drill,
}

/// The checks of a policy that are due. Pure.
pub fn due(scheduled: &Scheduled, now_unix_ms: u64) -> Vec<Check> {
    let checks = [
        (Check::Sample, scheduled.policy.verify_every_ms, scheduled.sampled_unix_ms),
        (Check::Drill, scheduled.policy.drill_every_ms, scheduled.drilled_unix_ms),
    ];
    let is_due = |every_ms: u64, last: u64| {
        every_ms > 0 && now_unix_ms >= last.max(scheduled.set_unix_ms).saturating_add(every_ms)
    };
    checks.into_iter().filter(|(_, every, last)| is_due(*every, *last)).map(|(check, ..)| check).collect()
}

/// So many of these, chosen by these random numbers. Pure.
pub fn sample(mut keys: Vec<String>, mut random: impl FnMut() -> u64) -> Vec<String> {
    keys.sort();
    keys.dedup();
    let count = (keys.len() / 20).clamp(SAMPLE_MIN, SAMPLE_MAX).min(keys.len());
    for at in 0..count {
        let other = at + (random() % (keys.len() - at) as u64) as usize;
        keys.swap(at, other);
    }
    keys.truncate(count);
    keys
}

impl Api {
    /// Looks and checks until shutdown.
    pub async fn check_by_clock(self, shutdown: CancellationToken) {
        let actor = self.schedule.actor().to_owned();
        self.clear_drills(&actor).await;
        let mut pauses: HashMap<(String, Check), Instant> = HashMap::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let state = self.ledger.state();
            let all = state.policies.iter().flat_map(|(vm, s)| due(s, unix_ms()).into_iter().map(|c| (vm.clone(), c)));
            pauses.retain(|_, until| *until > Instant::now());
            let all: Vec<(String, Check)> = all.filter(|check| !pauses.contains_key(check)).collect();
            for (vm, check) in all {
                let made = tokio::select! {
                    () = shutdown.cancelled() => return,
                    made = self.check(&actor, &vm, check) => made,
                };
                if let Err(failure) = made {
                    tracing::warn!(vm, ?check, %failure, "a check by the clock");
                    pauses.insert((vm, check), Instant::now() + PAUSE);
                }
            }
        }
    }

    async fn check(&self, actor: &str, vm: &str, check: Check) -> Result<(), Failure> {
        match check {
            Check::Sample => self.schedule.sample(actor, vm).await,
            Check::Drill => {
                let state = self.ledger.state();
                let Some(found) = state.vms.get(vm) else { return Ok(()) };
                let newest = state.checkpoints_of(&found.id).into_iter().rev().find(|entry| !is_damaged(entry));
                let Some(newest) = newest else { return Err(plans::unknown_checkpoint(vm)) };
                let asked = DrillRequest { id: newest.id.clone(), ..DrillRequest::default() };
                self.drill(actor, asked).await.map(drop)
            }
        }
    }
}

impl<W: World> Schedule<W> {
    /// Hashes some packs of a VM again.
    ///
    /// # Errors
    /// Something else holds the VM's packs; the bucket's.
    pub async fn sample(&self, actor: &str, vm: &str) -> Result<(), Failure> {
        let state = self.ledger().state();
        let Some(found) = state.vms.get(vm) else { return Ok(()) };
        let keys = state.checkpoints_of(&found.id).into_iter().flat_map(|entry| entry.pack_keys.iter().cloned());
        let keys = keys.filter(|key| !state.damaged.contains_key(key)).collect();
        let random = || u64::from_le_bytes(crate::entropy::bytes());
        let plan = plans::sample(found, sample(keys, random));
        self.to_the_end(actor, plan).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use proto::v1::CheckpointPolicy;

    use super::*;

    #[test]
    fn a_check_is_due_an_interval_after_the_last_or_after_the_policy_was_set() {
        let policy = CheckpointPolicy { verify_every_ms: 100, drill_every_ms: 1000, ..CheckpointPolicy::default() };
        let mut scheduled = Scheduled {
            policy: Arc::new(policy),
            set_unix_ms: 5000,
            attempt: String::new(),
            counted: String::new(),
            failures: 0,
            failed_unix_ms: 0,
            failure: String::new(),
            missed: false,
            sampled_unix_ms: 0,
            sampled: String::new(),
            drilled_unix_ms: 0,
            drilled: String::new(),
        };
        assert_eq!(due(&scheduled, 5099), []);
        assert_eq!(due(&scheduled, 5100), [Check::Sample]);
        assert_eq!(due(&scheduled, 6000), [Check::Sample, Check::Drill]);
        (scheduled.sampled_unix_ms, scheduled.drilled_unix_ms) = (5950, 5500);
        assert_eq!(due(&scheduled, 6049), []);
        assert_eq!(due(&scheduled, u64::MAX), [Check::Sample, Check::Drill]);
        scheduled.policy = Arc::new(CheckpointPolicy::default());
        assert_eq!(due(&scheduled, u64::MAX), []);
    }

    #[test]
    fn a_sample_is_some_of_what_there_is_each_once_and_in_time_all() {
        let keys: Vec<String> = (0..2000).map(|number| format!("p{number:04}")).collect();
        let mut number = 12_345_u64;
        let mut random = || {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            number >> 33
        };
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            let chosen: BTreeSet<String> = sample(keys.clone(), &mut random).into_iter().collect();
            assert_eq!(chosen.len(), SAMPLE_MAX);
            seen.extend(chosen);
        }
        assert!(seen.len() > 1900, "{}", seen.len());
        assert_eq!(sample(keys[..5].to_vec(), &mut random).len(), 5);
        assert_eq!(sample(vec![], &mut random), [""; 0]);
    }
}
