//! What the ledger knows of recordings: which there are, whose they are, and why they ended. Part of the fold, and as pure.
//! What was recorded lies in the bucket alone ([`crate::journal`]).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::event::{Event, Plan, Record, Task};
use super::state::{Refusal, State};

/// A recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    /// Hex of its id.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Hex of the VM's id.
    pub vm_id: String,
    /// When it began.
    pub started_unix_ms: u64,
    /// `JournalFull`: what the host does when it has no more room for blocks.
    pub full: i32,
    /// Why it ended; empty: it goes on.
    pub ended: String,
    /// When.
    pub ended_unix_ms: u64,
}

impl State {
    /// The recording of a VM's id that goes on.
    pub fn recording_of(&self, vm_id: &str) -> Option<&Arc<Recording>> {
        self.recordings.values().find(|recording| recording.vm_id == vm_id && recording.ended.is_empty())
    }

    /// The recordings of a VM's id, the newest first.
    pub fn recordings_of(&self, vm_id: &str) -> Vec<&Arc<Recording>> {
        let mut found: Vec<_> = self.recordings.values().filter(|recording| recording.vm_id == vm_id).collect();
        found.sort_by_key(|recording| (std::cmp::Reverse(recording.started_unix_ms), recording.id.clone()));
        found
    }

    /// The id of the VM that has this name, or had it last.
    pub fn id_of(&self, vm: &str) -> Option<&str> {
        if let Some(there) = self.vms.get(vm) {
            return Some(&there.id);
        }
        let checkpoint = self.checkpoints.values().filter(|c| c.vm == vm).max_by_key(|c| c.created_unix_ms);
        let recording = || self.recordings.values().filter(|r| r.vm == vm).max_by_key(|r| r.started_unix_ms);
        checkpoint.map(|c| c.vm_id.as_str()).or_else(|| recording().map(|r| r.vm_id.as_str()))
    }

    /// Folds an event about recordings.
    pub(super) fn apply_recording(&mut self, record: &Record) -> Result<(), Refusal> {
        match &record.event {
            Event::RecordingBegan { vm, recording, full } => {
                let vm_id = self.vms.get(vm).ok_or(Refusal::Stale("the VM is gone"))?.id.clone();
                if self.recordings.contains_key(recording) {
                    return Err(Refusal::Stale("the recording is known"));
                }
                if self.recording_of(&vm_id).is_some() {
                    return Err(Refusal::Stale("the VM is recorded already"));
                }
                let begun = Recording {
                    id: recording.clone(),
                    vm: vm.clone(),
                    vm_id,
                    started_unix_ms: record.unix_ms,
                    full: *full,
                    ended: String::new(),
                    ended_unix_ms: 0,
                };
                self.recordings.insert(recording.clone(), Arc::new(begun));
            }
            Event::RecordingEnded { recording, why, .. } => {
                let there = self.recordings.get_mut(recording).ok_or(Refusal::Stale("the recording is gone"))?;
                if !there.ended.is_empty() {
                    return Err(Refusal::Stale("the recording has ended"));
                }
                let there = Arc::make_mut(there);
                (there.ended, there.ended_unix_ms) = (nonempty(why), record.unix_ms);
            }
            Event::RecordingFound { entry } => {
                if self.recordings.contains_key(&entry.id) {
                    return Err(Refusal::Stale("the recording is known"));
                }
                let entry = Recording { ended: nonempty(&entry.ended), ..Recording::clone(entry) };
                self.recordings.insert(entry.id.clone(), Arc::new(entry));
            }
            Event::RecordingRemoved { recording, .. } => {
                match self.recordings.get(recording) {
                    Some(there) if there.ended.is_empty() => return Err(Refusal::Stale("the recording goes on")),
                    Some(_) => self.recordings.remove(recording),
                    None => return Err(Refusal::Stale("the recording is gone")),
                };
            }
            _ => return Err(Refusal::Stale("it is not about recordings")),
        }
        Ok(())
    }

    /// Ends the recording of a VM whose history does not go on with this commit.
    pub(super) fn end_recording(&mut self, record: &Record, plan: &Plan) {
        let why = match &plan.task {
            Task::Restore { new: false, .. } => "the VM was restored: another history begins",
            Task::Stop => "the VM was stopped",
            Task::Remove => "the VM was removed",
            _ => return,
        };
        let running = |recording: &&mut Arc<Recording>| recording.vm_id == plan.vm_id && recording.ended.is_empty();
        if let Some(recording) = self.recordings.values_mut().find(running) {
            let recording = Arc::make_mut(recording);
            (recording.ended, recording.ended_unix_ms) = (why.into(), record.unix_ms);
        }
    }
}

/// A recording that has ended has a reason.
fn nonempty(why: &str) -> String {
    if why.is_empty() { "it ended".into() } else { why.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::event::{CheckpointEntry, Outcome};
    use crate::ledger::tests::{
        append, begin, checkpoint_plan, entry, migrate_plan, restore_plan, running_vm, simple_plan, vm_id,
    };

    fn began(recording: &str) -> Event {
        Event::RecordingBegan { vm: "vm1".into(), recording: recording.into(), full: 1 }
    }

    fn recorded() -> State {
        let mut state = running_vm("hostA");
        append(&mut state, began("r1")).unwrap();
        state
    }

    fn committed(state: &mut State, operation: &str, plan: Plan, result: Outcome) {
        let shape = plan.task.shape();
        let commit = shape.commit;
        begin(state, operation, plan);
        for step in 0..commit {
            append(state, Event::StepDone { operation: operation.into(), step }).unwrap();
        }
        append(state, Event::Committed { operation: operation.into(), result: Box::new(result) }).unwrap();
        for step in commit + 1..shape.steps.len() {
            append(state, Event::StepDone { operation: operation.into(), step }).unwrap();
        }
    }

    #[test]
    fn a_vm_has_one_recording_at_a_time_and_it_ends_once() {
        let mut state = recorded();
        assert!(append(&mut state, began("r2")).is_err());
        let ended = |why: &str| Event::RecordingEnded { vm: "vm1".into(), recording: "r1".into(), why: why.into() };
        let removed = Event::RecordingRemoved { vm: "vm1".into(), recording: "r1".into() };
        assert!(append(&mut state, removed.clone()).is_err(), "it goes on");
        append(&mut state, ended("a gap after block 5: block 7 came")).unwrap();
        assert!(append(&mut state, ended("twice")).is_err());
        assert_eq!(state.recordings["r1"].ended, "a gap after block 5: block 7 came");
        append(&mut state, began("r2")).unwrap();
        assert_eq!(state.recording_of(&vm_id("vm1")).map(|recording| recording.id.as_str()), Some("r2"));
        append(&mut state, removed).unwrap();
        assert_eq!(state.recordings.len(), 1);
    }

    #[test]
    fn a_recording_survives_a_migration_and_ends_with_its_history() {
        let why = |state: &State| state.recordings["r1"].ended.clone();
        let mut state = recorded();
        let plan = migrate_plan(&state, "hostB");
        committed(&mut state, "op2", plan, Outcome::AsPlanned);
        assert_eq!(why(&state), "");
        let plan = checkpoint_plan(&state, "vm1", "c1");
        let made = CheckpointEntry { ..entry("c1", "vm1", 2) };
        committed(&mut state, "op3", plan, Outcome::Checkpoint(Box::new(made)));
        let mut restored = state.clone();
        let mut plan = restore_plan(&restored, "vm1", "c1", "hostA");
        if let Task::Restore { config, .. } = &mut plan.task {
            config.seed = vec![7; 32];
        }
        committed(&mut restored, "op4", plan, Outcome::AsPlanned);
        assert_eq!(restored.vms["vm1"].config.seed, [7; 32], "the next checkpoint states the machine that runs");
        assert!(why(&restored).contains("another history"), "{}", why(&restored));
        // A copy is another VM.
        let mut copied = state.clone();
        let plan = restore_plan(&copied, "copy", "c1", "hostA");
        committed(&mut copied, "op4", plan, Outcome::AsPlanned);
        assert_eq!(why(&copied), "");
        for (task, says) in [(Task::Stop, "stopped"), (Task::Remove, "removed")] {
            let mut over = state.clone();
            let plan = simple_plan(&over, "vm1", task);
            committed(&mut over, "op4", plan, Outcome::AsPlanned);
            assert!(why(&over).contains(says), "{}", why(&over));
        }
    }
}
