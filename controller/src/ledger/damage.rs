//! What the ledger knows of objects in the bucket that are missing or damaged, and which checkpoints that hurts. Part of
//! the fold, and as pure.
//!
//! A pack stays damaged until a checkpoint that needs it was read in full and found sound, or until no checkpoint needs it
//! any more. A checkpoint that needs a damaged object is damaged, whoever found it out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::event::CheckpointEntry;
use super::state::State;

/// Checkpoints that are looked at for something to build on.
const BASES_MAX: usize = 4;

/// Whether a checkpoint is known to be damaged.
pub fn is_damaged(entry: &CheckpointEntry) -> bool {
    entry.verified.starts_with("damaged")
}

impl State {
    /// The checkpoints that need an object, oldest first.
    pub fn hurt_by(&self, key: &str) -> Vec<&Arc<CheckpointEntry>> {
        let needs =
            |entry: &&Arc<CheckpointEntry>| entry.manifest_key == key || entry.pack_keys.iter().any(|k| k == key);
        let mut found: Vec<_> = self.checkpoints.values().filter(needs).collect();
        found.sort_by_key(|entry| (entry.sequence, entry.created_unix_ms));
        found
    }

    /// What a checkpoint needs and is damaged, with what is said of it.
    pub fn damage_of<'a>(&'a self, entry: &'a CheckpointEntry) -> impl Iterator<Item = (&'a String, &'a String)> {
        let keys = entry.pack_keys.iter().chain([&entry.manifest_key]);
        keys.filter(|_| !self.damaged.is_empty()).filter_map(|key| self.damaged.get_key_value(key))
    }

    /// The checkpoints of a VM that a new one may build on, the newest first. What of their packs is damaged is known and not
    /// trusted; one that is damaged in another way is not among them.
    pub fn bases(&self, vm_id: &str) -> Vec<&Arc<CheckpointEntry>> {
        let sound = |entry: &&Arc<CheckpointEntry>| {
            let packs_alone = || entry.pack_keys.iter().any(|key| self.damaged.contains_key(key));
            !self.damaged.contains_key(&entry.manifest_key) && (!is_damaged(entry) || packs_alone())
        };
        self.checkpoints_of(vm_id).into_iter().rev().filter(sound).take(BASES_MAX).collect()
    }

    /// These objects are damaged, and with them all checkpoints that need them.
    pub(super) fn find_damage(&mut self, objects: &BTreeMap<String, String>) {
        for entry in self.checkpoints.values_mut() {
            let why = entry.pack_keys.iter().chain([&entry.manifest_key]).find_map(|key| objects.get(key));
            if let Some(why) = why.filter(|_| !is_damaged(entry)) {
                Arc::make_mut(entry).verified = format!("damaged: {why}");
            }
        }
        self.damaged.extend(objects.iter().map(|(key, why)| (key.clone(), why.clone())));
        self.forget_damage();
    }

    /// A checkpoint was read in full and nothing was found.
    pub(super) fn found_sound(&mut self, checkpoint: &str) {
        let Some(entry) = self.checkpoints.get(checkpoint).filter(|_| !self.damaged.is_empty()).cloned() else {
            return;
        };
        entry.pack_keys.iter().chain([&entry.manifest_key]).for_each(|key| drop(self.damaged.remove(key)));
    }

    /// Forgets damage that hurts no checkpoint.
    pub(super) fn forget_damage(&mut self) {
        if !self.damaged.is_empty() {
            let entries = self.checkpoints.values();
            let needed: BTreeSet<&String> =
                entries.flat_map(|entry| entry.pack_keys.iter().chain([&entry.manifest_key])).collect();
            self.damaged.retain(|key, _| needed.contains(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::event::{Event, Outcome, Task};
    use crate::ledger::tests::{append, begin, checkpoint_plan, entry, running_vm, simple_plan, vm_id};

    fn made(state: &mut State, id: &str, packs: &[&str]) {
        let plan = checkpoint_plan(state, "vm1", id);
        let operation = format!("make {id}");
        begin(state, &operation, plan);
        append(state, Event::StepDone { operation: operation.clone(), step: 0 }).unwrap();
        let pack_keys = packs.iter().map(|pack| (*pack).to_owned()).collect();
        let result = Outcome::Checkpoint(Box::new(CheckpointEntry { pack_keys, ..entry(id, "vm1", 1) }));
        append(state, Event::Committed { operation, result: Box::new(result) }).unwrap();
    }

    fn damage(state: &mut State, key: &str) {
        let objects = [(key.to_owned(), format!("pack {key}: gone"))].into();
        append(state, Event::ObjectsDamaged { vm_id: vm_id("vm1"), objects, checkpoints: vec![] }).unwrap();
    }

    fn on_checkpoint(state: &mut State, operation: &str, task: Task, result: Outcome) {
        let plan = simple_plan(state, "vm1", task.clone());
        begin(state, operation, plan);
        if task.shape().commit == 1 {
            append(state, Event::StepDone { operation: operation.into(), step: 0 }).unwrap();
        }
        append(state, Event::Committed { operation: operation.into(), result: Box::new(result) }).unwrap();
    }

    fn ids(found: Vec<&Arc<CheckpointEntry>>) -> Vec<String> {
        found.into_iter().map(|entry| entry.id.clone()).collect()
    }

    #[test]
    fn a_damaged_pack_hurts_every_checkpoint_that_needs_it_and_none_else() {
        let mut state = running_vm("hostA");
        made(&mut state, "c1", &["p1"]);
        made(&mut state, "c2", &["p1", "p2"]);
        made(&mut state, "c3", &["p2"]);
        damage(&mut state, "p1");
        assert_eq!(ids(state.hurt_by("p1")), ["c1", "c2"]);
        let words: Vec<&str> = state.checkpoints.values().map(|entry| entry.verified.as_str()).collect();
        assert_eq!(words, ["damaged: pack p1: gone", "damaged: pack p1: gone", "unverified"]);
        // They may be built on all the same, because what is damaged in them is known.
        assert_eq!(ids(state.bases(&vm_id("vm1"))), ["c3", "c2", "c1"]);
        assert_eq!(state.damage_of(&state.checkpoints["c2"]).count(), 1);
        // Sound after all: it had been away.
        on_checkpoint(&mut state, "v", Task::Verify { checkpoint: "c1".into() }, Outcome::Verified("ok".into()));
        assert!(state.damaged.is_empty() && state.checkpoints["c1"].verified == "ok");
        // The other was not looked at yet, and nothing says which of its packs may be trusted.
        assert_eq!(ids(state.bases(&vm_id("vm1"))), ["c3", "c1"]);
    }

    #[test]
    fn what_nobody_needs_is_forgotten_and_a_lost_manifest_is_no_base() {
        let mut state = running_vm("hostA");
        made(&mut state, "c1", &["p1"]);
        made(&mut state, "c2", &["p2"]);
        damage(&mut state, "nobody's");
        assert!(state.damaged.is_empty());
        damage(&mut state, "p1");
        let key = state.checkpoints["c2"].manifest_key.clone();
        damage(&mut state, &key);
        assert_eq!(ids(state.bases(&vm_id("vm1"))), ["c1"]);
        let remove = Task::RemoveCheckpoint { checkpoint: "c1".into(), generation: 1 };
        on_checkpoint(&mut state, "r", remove, Outcome::AsPlanned);
        assert_eq!(state.damaged.keys().collect::<Vec<_>>(), [&key]);
    }
}
