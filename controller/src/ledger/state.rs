//! The state that the ledger means: a fold over its records, and nothing else.
//!
//! `State::apply` checks a record completely before it changes anything. The same function judges a record that is
//! about to be appended and one that is read back at start; what it refuses at start is corruption. It knows no clock,
//! no host and no disk, so that equal records give equal states for ever.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use proto::v1::MachineConfig;

use super::event::{CheckpointEntry, Event, Holder, Intent, Outcome, Plan, Record, Task};
use super::policy::{Attempt, Scheduled};
use super::recording::Recording;
use crate::failure::Failure;
use crate::saga::table::{self, Illegal, Status, Turn};

/// How many operations that have ended are remembered.
const ENDED_MAX: usize = 256;

/// A VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Hex of its id.
    pub id: String,
    /// The one host that may run it.
    pub host: String,
    /// The one generation that may run.
    pub generation: u64,
    /// What the operator asked for.
    pub intent: Intent,
    /// The machine.
    pub config: MachineConfig,
    /// CPU contract, a `CapabilitySet`; empty until a host is heard that knows its model, if it is from a release before
    /// contracts.
    pub capabilities: Vec<u8>,
    /// `IsolationPolicy`.
    pub on_isolation: i32,
    /// When it was created.
    pub created_unix_ms: u64,
    /// Its creation is not committed yet.
    pub creating: bool,
    /// Id of its newest checkpoint; may be empty.
    pub last_checkpoint: String,
    /// Id of the checkpoint from which pages of its RAM still come; empty: it has all of them.
    pub pages_from: String,
    /// The generation with which this cluster got it: created or restored.
    pub since: u64,
    /// It is a drill's and goes when that ends.
    pub drill: bool,
}

/// An operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// Hex of its id.
    pub id: String,
    /// Who asked.
    pub actor: String,
    /// When.
    pub began_unix_ms: u64,
    /// What it does.
    pub plan: Plan,
    /// Where it is.
    pub status: Status,
    /// Why it is being undone or was given up.
    pub failure: Option<Failure>,
    /// What its commit added.
    pub result: Option<Outcome>,
}

impl Operation {
    /// Whether its change is true.
    pub fn committed(&self) -> bool {
        self.result.is_some()
    }
}

/// Everything that the ledger means.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Sequence of the last record; 0 if there is none.
    pub sequence: u64,
    /// Longest lease that a controller may have granted lately, milliseconds.
    pub lease_ms: u64,
    /// Hex of this cluster's id; empty in a ledger that no controller of this release has opened.
    pub cluster: String,
    /// Address of each host that was ever heard.
    pub hosts: BTreeMap<String, String>,
    /// VMs by name.
    pub vms: BTreeMap<String, Arc<Vm>>,
    /// Highest generation that was ever reserved for a name.
    pub generations: BTreeMap<String, u64>,
    /// Operations by id: all that are under way, and the last that have ended.
    pub operations: BTreeMap<String, Arc<Operation>>,
    /// Checkpoints by id.
    pub checkpoints: BTreeMap<String, Arc<CheckpointEntry>>,
    /// Objects in the bucket that are missing or damaged and that some checkpoint needs, with what is said of each.
    pub damaged: BTreeMap<String, String>,
    /// Policies by name of the VM.
    pub policies: BTreeMap<String, Arc<Scheduled>>,
    /// Recordings by id.
    pub recordings: BTreeMap<String, Arc<Recording>>,
    ended: VecDeque<String>,
}

/// Why a record cannot follow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Records are missing or out of order.
    #[error("record {found} follows record {last}")]
    Sequence {
        /// The last one.
        last: u64,
        /// The one after it.
        found: u64,
    },
    /// Another operation holds what this one needs.
    #[error("{what} is held by operation {by}")]
    Locked {
        /// The lock.
        what: String,
        /// Its holder.
        by: String,
    },
    /// No such operation.
    #[error("there is no operation {0}")]
    NoOperation(String),
    /// The operation is not where this event could happen.
    #[error(transparent)]
    Illegal(#[from] Illegal),
    /// The plan was made from a state that is gone.
    #[error("the plan does not fit the ledger any more: {0}")]
    Stale(&'static str),
}

impl State {
    /// The state after this record.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed then.
    pub fn apply(&mut self, record: &Record) -> Result<(), Refusal> {
        if record.sequence != self.sequence + 1 {
            return Err(Refusal::Sequence { last: self.sequence, found: record.sequence });
        }
        match &record.event {
            Event::LeaseSet { lease_ms } => self.lease_ms = *lease_ms,
            Event::ClusterNamed { cluster } => self.cluster.clone_from(cluster),
            Event::HostSeen { host, address } => {
                self.hosts.insert(host.clone(), address.clone());
            }
            Event::ContractFrozen { vm, capabilities } => {
                let vm = self.vms.get_mut(vm).ok_or(Refusal::Stale("the VM is gone"))?;
                if !vm.capabilities.is_empty() {
                    return Err(Refusal::Stale("the VM has a contract"));
                }
                Arc::make_mut(vm).capabilities.clone_from(capabilities);
            }
            Event::PagesArrived { vm, generation } => {
                let vm = self.vms.get_mut(vm).ok_or(Refusal::Stale("the VM is gone"))?;
                if vm.generation != *generation || vm.pages_from.is_empty() {
                    return Err(Refusal::Stale("no pages of this generation are on their way"));
                }
                Arc::make_mut(vm).pages_from.clear();
            }
            Event::CheckpointFound { entry } => self.find(record, entry)?,
            Event::GenerationSeen { vm, generation } => {
                let offered = self.generations.entry(vm.clone()).or_insert(0);
                *offered = (*generation).max(*offered);
            }
            Event::ObjectsDamaged { objects, .. } => self.find_damage(objects),
            Event::OperationBegan { operation, plan } => self.begin(record, operation, plan)?,
            Event::StepDone { operation, step } => {
                let op = self.operation(operation)?;
                if *step == op.plan.task.shape().commit {
                    return Err(Refusal::Stale("the commit step is done by its own event only"));
                }
                self.turn(operation, Turn::Did(*step), None)?;
            }
            Event::StepFailed { operation, step, failure } => {
                self.turn(operation, Turn::Failed(*step), Some(failure))?;
            }
            Event::Cancelled { operation } => {
                let failure = Failure::new(proto::status::Code::Cancelled, "cancelled by the operator");
                self.turn(operation, Turn::Cancelled, Some(&failure))?;
            }
            Event::Interrupted { operation } => {
                let failure = Failure::new(proto::status::Code::Unreachable, "the controller was restarted")
                    .hint("nothing has changed; ask again");
                self.turn(operation, Turn::Interrupted, Some(&failure))?;
                self.note(operation, Attempt::Interrupted);
            }
            Event::StepUndone { operation, step } => self.turn(operation, Turn::Undid(*step), None)?,
            Event::GaveUp { operation, step, failure } => {
                self.turn(operation, Turn::GaveUp(*step), Some(failure))?;
            }
            Event::Committed { operation, result } => self.commit(record, operation, result)?,
            Event::PolicySet { .. }
            | Event::PolicyRemoved { .. }
            | Event::PolicyMissed { .. }
            | Event::PolicyRecovered { .. }
            | Event::Drilled { .. }
            | Event::PolicyBackedOff { .. } => self.apply_policy(record)?,
            Event::RecordingBegan { .. }
            | Event::RecordingEnded { .. }
            | Event::RecordingFound { .. }
            | Event::RecordingRemoved { .. } => self.apply_recording(record)?,
        }
        self.sequence = record.sequence;
        Ok(())
    }

    /// The name of the VM with this id, also of one that has nothing but checkpoints; empty if there is none.
    pub fn name_of(&self, vm_id: &str) -> &str {
        let there = self.vms.values().find(|vm| vm.id == vm_id).map(|vm| vm.name.as_str());
        let kept = || self.checkpoints.values().find(|entry| entry.vm_id == vm_id).map(|entry| entry.vm.as_str());
        there.or_else(kept).unwrap_or_default()
    }

    /// Whether pages of some guest still come from a checkpoint of this VM.
    pub fn feeds(&self, vm_id: &str) -> bool {
        self.checkpoints.values().any(|entry| entry.vm_id == vm_id && self.fed_by(&entry.id).is_some())
    }

    /// The operation that holds a lock.
    pub fn lock_holder(&self, lock: &str) -> Option<&Arc<Operation>> {
        self.active().find(|operation| operation.plan.locks.iter().any(|held| held == lock))
    }

    /// The operation that holds a VM.
    pub fn operation_of(&self, vm: &str) -> Option<&Arc<Operation>> {
        self.lock_holder(&vm_lock(vm))
    }

    /// The VM whose pages still come from this checkpoint.
    pub fn fed_by(&self, checkpoint: &str) -> Option<&Arc<Vm>> {
        self.vms.values().find(|vm| vm.pages_from == checkpoint)
    }

    /// Operations that are under way.
    pub fn active(&self) -> impl Iterator<Item = &Arc<Operation>> {
        self.operations.values().filter(|operation| !operation.status.ended())
    }

    /// The newest checkpoint of a VM's id: the one that was made last, whatever the clock said.
    pub fn newest_checkpoint(&self, vm_id: &str) -> Option<&Arc<CheckpointEntry>> {
        let of_vm = self.checkpoints.values().filter(|c| c.vm_id == vm_id);
        of_vm.max_by(|a, b| made_order(a).cmp(&made_order(b)))
    }

    /// The newest checkpoint of every VM's id, in one pass.
    pub fn newest_checkpoints(&self) -> BTreeMap<&str, &Arc<CheckpointEntry>> {
        let mut newest: BTreeMap<&str, &Arc<CheckpointEntry>> = BTreeMap::new();
        for entry in self.checkpoints.values() {
            let there = newest.entry(&entry.vm_id).or_insert(entry);
            if made_order(entry) > made_order(there) {
                *there = entry;
            }
        }
        newest
    }

    /// The checkpoints of a VM's id in the order in which they were made, oldest first.
    pub fn checkpoints_of(&self, vm_id: &str) -> Vec<&Arc<CheckpointEntry>> {
        let mut found: Vec<_> = self.checkpoints.values().filter(|c| c.vm_id == vm_id).collect();
        found.sort_by(|a, b| made_order(a).cmp(&made_order(b)));
        found
    }

    /// Notes for the VM's policy how far an operation is.
    fn note(&mut self, operation: &str, attempt: Attempt) {
        if let Some(operation) = self.operations.get(operation).cloned() {
            self.note_attempt(&operation.id, &operation.plan.task, &operation.plan.vm, attempt);
        }
    }

    /// A generation that was never offered for this name.
    pub fn fresh_generation(&self, vm: &str) -> u64 {
        self.generations.get(vm).copied().unwrap_or(0) + 1
    }

    /// A checkpoint of an earlier ledger. Its VM's generations were offered before: none of them is offered again.
    fn find(&mut self, record: &Record, entry: &CheckpointEntry) -> Result<(), Refusal> {
        if self.checkpoints.contains_key(&entry.id) {
            return Err(Refusal::Stale("the checkpoint is known"));
        }
        let offered = self.generations.entry(entry.vm.clone()).or_insert(0);
        *offered = entry.generation.max(*offered);
        let entry = CheckpointEntry { sequence: record.sequence, ..entry.clone() };
        self.checkpoints.insert(entry.id.clone(), Arc::new(entry));
        Ok(())
    }

    fn operation(&self, id: &str) -> Result<&Arc<Operation>, Refusal> {
        self.operations.get(id).ok_or_else(|| Refusal::NoOperation(id.into()))
    }

    fn begin(&mut self, record: &Record, id: &str, plan: &Plan) -> Result<(), Refusal> {
        if self.operations.contains_key(id) {
            return Err(Refusal::Stale("the operation id was used before"));
        }
        for lock in &plan.locks {
            if let Some(holder) = self.lock_holder(lock) {
                return Err(Refusal::Locked { what: lock.clone(), by: holder.id.clone() });
            }
        }
        self.fits(plan)?;
        if plan.generation > 0 {
            self.generations.insert(plan.vm.clone(), plan.generation);
        }
        if let Task::Create { host, config, on_isolation, capabilities } = &plan.task {
            self.vms.insert(
                plan.vm.clone(),
                Arc::new(Vm {
                    name: plan.vm.clone(),
                    id: plan.vm_id.clone(),
                    host: host.clone(),
                    generation: plan.generation,
                    intent: Intent::Running,
                    config: config.clone(),
                    capabilities: capabilities.clone(),
                    on_isolation: *on_isolation,
                    created_unix_ms: record.unix_ms,
                    creating: true,
                    last_checkpoint: String::new(),
                    pages_from: String::new(),
                    since: plan.generation,
                    drill: false,
                }),
            );
        }
        let operation = Operation {
            id: id.into(),
            actor: record.actor.clone(),
            began_unix_ms: record.unix_ms,
            plan: plan.clone(),
            status: Status::Doing(0),
            failure: None,
            result: None,
        };
        self.operations.insert(id.into(), Arc::new(operation));
        self.note(id, Attempt::Began);
        Ok(())
    }

    /// Whether a plan was made from this state: between the making and the append another operation may have ended.
    fn fits(&self, plan: &Plan) -> Result<(), Refusal> {
        if plan.generation > 0 && plan.generation < self.fresh_generation(&plan.vm) {
            return Err(Refusal::Stale("its generation was offered before"));
        }
        let vm = self.vms.get(&plan.vm);
        let holder = vm.map(|vm| Holder { host: vm.host.clone(), generation: vm.generation });
        match &plan.task {
            Task::Create { .. } if vm.is_some() => Err(Refusal::Stale("the VM exists")),
            Task::Restore { new: true, .. } if vm.is_some() => Err(Refusal::Stale("the VM exists")),
            Task::RemoveCheckpoint { checkpoint, .. } if self.fed_by(checkpoint).is_some() => {
                Err(Refusal::Stale("a VM still runs from the checkpoint"))
            }
            Task::Sweep { live_percent_min: 1.. } if self.feeds(&plan.vm_id) => {
                Err(Refusal::Stale("a VM still runs from a checkpoint whose packs would be rewritten"))
            }
            Task::Create { .. }
            | Task::Verify { .. }
            | Task::RemoveCheckpoint { .. }
            | Task::Sweep { .. }
            | Task::Sample { .. } => Ok(()),
            Task::Restore { new: true, .. } => Ok(()),
            _ if vm.is_none() => Err(Refusal::Stale("the VM is gone")),
            Task::Migrate { .. } | Task::Checkpoint { .. } if vm.is_some_and(|vm| !vm.pages_from.is_empty()) => {
                Err(Refusal::Stale("pages of the VM are still on their way"))
            }
            _ if plan.holder != holder => Err(Refusal::Stale("the VM has another holder")),
            _ => Ok(()),
        }
    }

    fn turn(&mut self, id: &str, turn: Turn, failure: Option<&Failure>) -> Result<(), Refusal> {
        let operation = self.operation(id)?;
        let status = table::next(operation.plan.task.shape(), operation.status, turn)?;
        let mut operation = Operation::clone(operation);
        operation.status = status;
        if matches!(status, Status::Undoing(_) | Status::Left(_)) {
            operation.failure = operation.failure.or_else(|| failure.cloned());
        }
        if status == Status::Undone && matches!(operation.plan.task, Task::Create { .. }) {
            self.vms.remove(&operation.plan.vm);
            self.policies.remove(&operation.plan.vm);
        }
        self.store(operation);
        Ok(())
    }

    fn commit(&mut self, record: &Record, id: &str, result: &Outcome) -> Result<(), Refusal> {
        let operation = self.operation(id)?;
        let shape = operation.plan.task.shape();
        let mut operation = Operation::clone(operation);
        operation.status = table::next(shape, operation.status, Turn::Did(shape.commit))?;
        operation.result = Some(result.clone());
        self.change(record, &operation.plan, result)?;
        self.store(operation);
        Ok(())
    }

    fn store(&mut self, operation: Operation) {
        if operation.status.ended() {
            self.ended.push_back(operation.id.clone());
        }
        self.operations.insert(operation.id.clone(), Arc::new(operation));
        while self.ended.len() > ENDED_MAX {
            if let Some(oldest) = self.ended.pop_front() {
                self.operations.remove(&oldest);
            }
        }
    }

    /// What a commit makes true. The only place where a VM's generation rises.
    fn change(&mut self, record: &Record, plan: &Plan, result: &Outcome) -> Result<(), Refusal> {
        self.end_recording(record, plan);
        match (&plan.task, result) {
            (Task::Create { .. }, _) => self.edit(plan, |vm| vm.creating = false),
            (Task::Pause { .. }, _) => self.edit(plan, |vm| vm.intent = Intent::Paused),
            (Task::Resume { .. }, _) => self.edit(plan, |vm| vm.intent = Intent::Running),
            (Task::Stop, _) => self.edit(plan, |vm| {
                vm.intent = Intent::Stopped;
                vm.pages_from.clear();
            }),
            (Task::Remove, _) => {
                self.vms.remove(&plan.vm);
                self.policies.remove(&plan.vm);
                Ok(())
            }
            (Task::Migrate { target, engine, .. }, _) => self.edit(plan, |vm| {
                if !engine.is_empty() {
                    vm.config.engine.clone_from(engine);
                }
                vm.host.clone_from(target);
                vm.generation = plan.generation;
            }),
            (Task::Restore { new: false, target, checkpoint, lazy, config, .. }, _) => self.edit(plan, |vm| {
                // What runs from now on: it has another seed and generation ID than what ran before.
                vm.config.clone_from(config);
                vm.pages_from = if *lazy { checkpoint.clone() } else { String::new() };
                vm.host.clone_from(target);
                vm.generation = plan.generation;
                vm.intent = Intent::Running;
            }),
            (Task::Restore { new: true, .. }, _) => {
                self.adopt(record, plan);
                Ok(())
            }
            (Task::Checkpoint { .. }, Outcome::Checkpoint(entry)) => {
                self.edit(plan, |vm| vm.last_checkpoint.clone_from(&entry.id))?;
                let entry = CheckpointEntry { sequence: record.sequence, ..CheckpointEntry::clone(entry) };
                self.checkpoints.insert(entry.id.clone(), Arc::new(entry));
                self.note_attempt("", &plan.task, &plan.vm, Attempt::Made);
                Ok(())
            }
            (Task::Checkpoint { .. }, _) => Err(Refusal::Stale("a checkpoint's commit names no checkpoint")),
            (Task::Verify { checkpoint }, Outcome::Verified(verdict)) => {
                if let Some(entry) = self.checkpoints.get_mut(checkpoint) {
                    Arc::make_mut(entry).verified.clone_from(verdict);
                }
                if verdict == "ok" {
                    self.found_sound(checkpoint);
                }
                Ok(())
            }
            (Task::Verify { .. }, _) => Err(Refusal::Stale("a verification's commit has no verdict")),
            (Task::Sample { .. }, Outcome::Sampled { packs, damaged, .. }) => {
                self.note_sample(record, &plan.vm, *packs, *damaged);
                Ok(())
            }
            (Task::Sample { .. }, _) => Err(Refusal::Stale("a sample's commit has no result")),
            (Task::Sweep { .. }, Outcome::Swept(swept)) => {
                for changed in &swept.changed {
                    if let Some(entry) = self.checkpoints.get_mut(&changed.checkpoint) {
                        let entry = Arc::make_mut(entry);
                        entry.pack_keys.clone_from(&changed.pack_keys);
                        entry.stored_bytes = changed.stored_bytes;
                    }
                }
                self.forget_damage();
                Ok(())
            }
            (Task::Sweep { .. }, _) => Err(Refusal::Stale("a sweep's commit has no result")),
            (Task::RemoveCheckpoint { checkpoint, .. }, _) => {
                self.checkpoints.remove(checkpoint);
                self.forget_damage();
                self.forget_checkpoint(checkpoint);
                Ok(())
            }
        }
    }

    fn edit(&mut self, plan: &Plan, change: impl FnOnce(&mut Vm)) -> Result<(), Refusal> {
        let vm = self.vms.get_mut(&plan.vm).ok_or(Refusal::Stale("the VM is gone"))?;
        change(Arc::make_mut(vm));
        Ok(())
    }

    fn adopt(&mut self, record: &Record, plan: &Plan) {
        let Task::Restore {
            checkpoint,
            target,
            config,
            capabilities,
            on_isolation,
            lazy,
            checkpoint_policy,
            drill,
            ..
        } = &plan.task
        else {
            return;
        };
        let vm = Vm {
            name: plan.vm.clone(),
            id: plan.vm_id.clone(),
            host: target.clone(),
            generation: plan.generation,
            intent: Intent::Running,
            config: config.clone(),
            capabilities: capabilities.clone(),
            on_isolation: *on_isolation,
            created_unix_ms: record.unix_ms,
            creating: false,
            since: plan.generation,
            drill: *drill,
            last_checkpoint: self.newest_checkpoint(&plan.vm_id).map(|c| c.id.clone()).unwrap_or_default(),
            pages_from: if *lazy { checkpoint.clone() } else { String::new() },
        };
        self.vms.insert(plan.vm.clone(), Arc::new(vm));
        self.resume_policy(record, &plan.vm, checkpoint_policy);
    }

    fn forget_checkpoint(&mut self, id: &str) {
        let names: Vec<String> =
            self.vms.values().filter(|vm| vm.last_checkpoint == id).map(|vm| vm.name.clone()).collect();
        for name in names {
            let newest = self.vms.get(&name).and_then(|vm| self.newest_checkpoint(&vm.id)).map(|c| c.id.clone());
            if let Some(vm) = self.vms.get_mut(&name) {
                Arc::make_mut(vm).last_checkpoint = newest.unwrap_or_default();
            }
        }
    }
}

/// Sorts checkpoints as they were made. Those that the ledger did not see made come first, by the clock.
fn made_order(entry: &CheckpointEntry) -> (u64, u64, &str) {
    (entry.sequence, entry.created_unix_ms, &entry.id)
}

/// Lock of a VM's name.
pub fn vm_lock(vm: &str) -> String {
    format!("VM {vm}")
}

/// Lock of a VM's packs: whoever adds or removes any.
pub fn packs_lock(vm_id: &str) -> String {
    format!("packs of {vm_id}")
}

/// Lock of a checkpoint.
pub fn checkpoint_lock(id: &str) -> String {
    format!("checkpoint {id}")
}
