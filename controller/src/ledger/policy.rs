//! What the ledger knows of a VM's policy: the policy, and how its checkpoints went. Part of the fold, and as pure.
//!
//! A checkpoint that fails leaves its operation named in [`Scheduled::attempt`] until [`Event::PolicyBackedOff`] has
//! counted it; one whose controller ended under it is nobody's fault and is not named.
//!
//! [`Event::PolicyBackedOff`]: super::event::Event::PolicyBackedOff

use std::sync::Arc;

use proto::v1::CheckpointPolicy;

use super::event::{Event, Record, Task};
use super::state::{Refusal, State};
use crate::retention::policy::from_bytes;

/// A policy and how it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheduled {
    /// The policy.
    pub policy: Arc<CheckpointPolicy>,
    /// When it was set.
    pub set_unix_ms: u64,
    /// The newest operation that made a checkpoint by it, unless a restart ended it; may be empty.
    pub attempt: String,
    /// The operation whose failure was counted last; may be empty.
    pub counted: String,
    /// Failures since the newest checkpoint.
    pub failures: u32,
    /// When the last of them was counted.
    pub failed_unix_ms: u64,
    /// Why it failed; empty if none did.
    pub failure: String,
    /// The newest checkpoint was found too old, and none was made since.
    pub missed: bool,
    /// When packs were hashed again for the last time; 0: never.
    pub sampled_unix_ms: u64,
    /// What that found: `ok` or `damaged: ...`.
    pub sampled: String,
    /// When a checkpoint was drilled for the last time; 0: never.
    pub drilled_unix_ms: u64,
    /// How that went: `ok: ...` or `failed: ...`.
    pub drilled: String,
}

impl State {
    /// Folds an event about policies.
    pub(super) fn apply_policy(&mut self, record: &Record) -> Result<(), Refusal> {
        match &record.event {
            Event::PolicySet { vm, policy } => {
                if !self.vms.contains_key(vm) {
                    return Err(Refusal::Stale("the VM is gone"));
                }
                self.set_policy(record, vm, policy.clone());
            }
            Event::PolicyRemoved { vm } => {
                self.policies.remove(vm).ok_or(Refusal::Stale("the VM has no policy"))?;
            }
            Event::PolicyMissed { vm, .. } => self.scheduled(vm)?.missed = true,
            Event::PolicyRecovered { vm, .. } => self.scheduled(vm)?.missed = false,
            // Also one without a policy may be drilled by hand.
            Event::Drilled { vm, alive, words, .. } => {
                if let Ok(scheduled) = self.scheduled(vm) {
                    scheduled.drilled_unix_ms = record.unix_ms;
                    scheduled.drilled = format!("{}: {words}", if *alive { "ok" } else { "failed" });
                }
            }
            Event::PolicyBackedOff { vm, operation, failures, reason, .. } => {
                let scheduled = self.scheduled(vm)?;
                scheduled.counted.clone_from(operation);
                scheduled.failures = *failures;
                scheduled.failed_unix_ms = record.unix_ms;
                scheduled.failure.clone_from(reason);
            }
            _ => {}
        }
        Ok(())
    }

    fn set_policy(&mut self, record: &Record, vm: &str, policy: CheckpointPolicy) {
        let before = self.policies.get(vm);
        let now = Scheduled {
            policy: Arc::new(policy),
            set_unix_ms: record.unix_ms,
            attempt: before.map(|before| before.attempt.clone()).unwrap_or_default(),
            counted: before.map(|before| before.counted.clone()).unwrap_or_default(),
            failures: 0,
            failed_unix_ms: 0,
            failure: String::new(),
            missed: before.is_some_and(|before| before.missed),
            sampled_unix_ms: before.map_or(0, |before| before.sampled_unix_ms),
            sampled: before.map(|before| before.sampled.clone()).unwrap_or_default(),
            drilled_unix_ms: before.map_or(0, |before| before.drilled_unix_ms),
            drilled: before.map(|before| before.drilled.clone()).unwrap_or_default(),
        };
        self.policies.insert(vm.into(), Arc::new(now));
    }

    pub(super) fn note_sample(&mut self, record: &Record, vm: &str, packs: u64, damaged: u64) {
        if let Ok(scheduled) = self.scheduled(vm) {
            scheduled.sampled_unix_ms = record.unix_ms;
            scheduled.sampled = if damaged == 0 { "ok".into() } else { format!("damaged: {damaged} of {packs} packs") };
        }
    }

    /// A VM came back from its manifest, and with it its policy. One that this release cannot carry out is left out.
    pub(super) fn resume_policy(&mut self, record: &Record, vm: &str, policy: &[u8]) {
        if let Ok(Some(policy)) = from_bytes(policy) {
            self.set_policy(record, vm, policy);
        }
    }

    /// What the beginning or the end of an operation means for the policy of its VM.
    pub(super) fn note_attempt(&mut self, operation: &str, task: &Task, vm: &str, ended: Attempt) {
        let by_policy = matches!(task, Task::Checkpoint { by_policy: true, .. });
        let Ok(scheduled) = self.scheduled(vm) else { return };
        match ended {
            Attempt::Began if by_policy => scheduled.attempt = operation.into(),
            Attempt::Interrupted if scheduled.attempt == operation => scheduled.attempt.clear(),
            // Whoever made it: the guest's newest state is in the bucket.
            Attempt::Made => {
                scheduled.failures = 0;
                scheduled.failure.clear();
            }
            Attempt::Began | Attempt::Interrupted => {}
        }
    }

    fn scheduled(&mut self, vm: &str) -> Result<&mut Scheduled, Refusal> {
        self.policies.get_mut(vm).map(Arc::make_mut).ok_or(Refusal::Stale("the VM has no policy"))
    }
}

/// How far a checkpoint's operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// It began.
    Began,
    /// The controller was started again under it.
    Interrupted,
    /// It is committed.
    Made,
}

#[cfg(test)]
mod tests {
    use proto::status::Code;

    use super::*;
    use crate::failure::Failure;
    use crate::ledger::event::{CheckpointEntry, Outcome};
    use crate::ledger::tests::{append, begin, entry, running_vm, scheduled_plan, simple_plan};

    fn set(state: &mut State, every_ms: u64) {
        let policy = CheckpointPolicy { every_ms, ..CheckpointPolicy::default() };
        append(state, Event::PolicySet { vm: "vm1".into(), policy }).unwrap();
    }

    fn attempt(state: &mut State, operation: &str, checkpoint: &str) {
        let plan = scheduled_plan(state, "vm1", checkpoint);
        begin(state, operation, plan);
    }

    #[test]
    fn a_policy_is_of_a_vm_and_goes_with_it() {
        let mut state = running_vm("hostA");
        let nobody = Event::PolicySet { vm: "vm9".into(), policy: CheckpointPolicy::default() };
        assert!(append(&mut state, nobody).is_err());
        assert!(append(&mut state, Event::PolicyRemoved { vm: "vm1".into() }).is_err());
        set(&mut state, 10_000);
        set(&mut state, 20_000);
        assert_eq!(state.policies["vm1"].policy.every_ms, 20_000);
        let plan = simple_plan(&state, "vm1", Task::Remove);
        begin(&mut state, "op2", plan);
        append(&mut state, Event::Committed { operation: "op2".into(), result: Box::new(Outcome::AsPlanned) }).unwrap();
        assert!(state.policies.is_empty());
    }

    #[test]
    fn failures_are_counted_once_and_forgotten_with_the_next_checkpoint() {
        let mut state = running_vm("hostA");
        set(&mut state, 10_000);
        attempt(&mut state, "op2", "c1");
        let failure = Failure::new(Code::Exhausted, "the bucket is full");
        append(&mut state, Event::StepFailed { operation: "op2".into(), step: 0, failure }).unwrap();
        append(&mut state, Event::StepUndone { operation: "op2".into(), step: 0 }).unwrap();
        assert_eq!(state.policies["vm1"].attempt, "op2");
        let backed_off = Event::PolicyBackedOff {
            vm: "vm1".into(),
            operation: "op2".into(),
            failures: 1,
            wait_ms: 5,
            reason: "the bucket is full".into(),
        };
        append(&mut state, backed_off).unwrap();
        assert_eq!((state.policies["vm1"].failures, state.policies["vm1"].counted.as_str()), (1, "op2"));
        attempt(&mut state, "op3", "c2");
        append(&mut state, Event::StepDone { operation: "op3".into(), step: 0 }).unwrap();
        let made = Outcome::Checkpoint(Box::new(CheckpointEntry { by_policy: true, ..entry("c2", "vm1", 1) }));
        append(&mut state, Event::Committed { operation: "op3".into(), result: Box::new(made) }).unwrap();
        assert_eq!((state.policies["vm1"].failures, state.policies["vm1"].failure.as_str()), (0, ""));
        assert!(state.checkpoints["c2"].by_policy && state.checkpoints["c2"].sequence == state.sequence);
    }

    #[test]
    fn a_restart_is_nobodys_failure() {
        let mut state = running_vm("hostA");
        set(&mut state, 10_000);
        attempt(&mut state, "op2", "c1");
        append(&mut state, Event::Interrupted { operation: "op2".into() }).unwrap();
        assert_eq!(state.policies["vm1"].attempt, "");
    }
}
