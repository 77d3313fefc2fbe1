//! What the schedule looks at: the ledger and what hosts report, put together for each VM that has a policy. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::v1::{CheckpointPolicy, VmInfo, VmState};

use crate::agents::lease::HostState;
use crate::ledger::event::{Intent, Task};
use crate::ledger::policy::Scheduled;
use crate::ledger::state::{State, Vm, packs_lock};
use crate::saga::table::Status;

/// What is known of one VM with a policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Its name.
    pub vm: String,
    /// Hex of its id.
    pub vm_id: String,
    /// The host that has it.
    pub host: String,
    /// Its policy.
    pub policy: Arc<CheckpointPolicy>,
    /// When that was set.
    pub set_unix_ms: u64,
    /// The ledger says that the newest checkpoint is too old.
    pub missed: bool,
    /// Failures since the newest checkpoint, and when the last was.
    pub failures: u32,
    /// Of the last failure.
    pub failed_unix_ms: u64,
    /// The newest attempt.
    pub attempt: Attempt,
    /// The newest checkpoint.
    pub newest: Option<Newest>,
    /// Whether one can be made.
    pub stands: Stands,
}

/// The newest checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newest {
    /// Its id.
    pub id: String,
    /// When it was made, by the clock of then.
    pub unix_ms: u64,
    /// When it was made, by the ledger.
    pub sequence: u64,
}

/// How the newest attempt went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// There was none, or it is done, or its failure is counted.
    Settled,
    /// It is under way.
    UnderWay,
    /// It failed, and nobody has counted that yet.
    Failed {
        /// The operation.
        operation: String,
        /// Why.
        reason: String,
    },
}

/// Whether a checkpoint can be made of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stands {
    /// It runs.
    Runs,
    /// It stands still, so that its newest checkpoint loses nothing by getting older.
    Still(&'static str),
    /// It should run, but something is in the way.
    Blocked(String),
}

/// What a host says of a VM.
pub type Observe = Arc<dyn Fn(&Vm) -> (HostState, Option<VmInfo>) + Send + Sync>;

/// Puts together what is known, by name of the VM.
pub fn gather(state: &State, observe: &Observe) -> Vec<Facts> {
    let newest = state.newest_checkpoints();
    let of = |(name, scheduled): (&String, &Arc<Scheduled>)| {
        let vm = state.vms.get(name)?;
        let newest = newest.get(vm.id.as_str()).map(|entry| Newest {
            id: entry.id.clone(),
            unix_ms: entry.created_unix_ms,
            sequence: entry.sequence,
        });
        let attempt = attempt(state, scheduled);
        Some(Facts {
            vm: name.clone(),
            vm_id: vm.id.clone(),
            host: vm.host.clone(),
            policy: scheduled.policy.clone(),
            set_unix_ms: scheduled.set_unix_ms,
            missed: scheduled.missed,
            failures: scheduled.failures,
            failed_unix_ms: scheduled.failed_unix_ms,
            stands: if attempt == Attempt::UnderWay { Stands::Runs } else { stands(state, vm, observe) },
            attempt,
            newest,
        })
    };
    state.policies.iter().filter_map(of).collect()
}

fn attempt(state: &State, scheduled: &Scheduled) -> Attempt {
    match state.operations.get(&scheduled.attempt) {
        Some(operation) if !operation.status.ended() => Attempt::UnderWay,
        Some(operation) if operation.status == Status::Undone && scheduled.counted != operation.id => {
            let reason = operation.failure.as_ref().map_or("it failed", |failure| &failure.message);
            Attempt::Failed { operation: operation.id.clone(), reason: reason.into() }
        }
        Some(_) | None => Attempt::Settled,
    }
}

fn stands(state: &State, vm: &Vm, observe: &Observe) -> Stands {
    match vm.intent {
        Intent::Paused => return Stands::Still("paused"),
        Intent::Stopped => return Stands::Still("stopped"),
        Intent::Running => {}
    }
    let holder = state.operation_of(&vm.name).or_else(|| state.lock_holder(&packs_lock(&vm.id)));
    if let Some(operation) = holder {
        return Stands::Blocked(format!("{} is under way", operation.plan.task.label()));
    }
    if !vm.pages_from.is_empty() {
        return Stands::Blocked("its pages still come".into());
    }
    let (host, info) = observe(vm);
    if host != HostState::Up {
        return Stands::Blocked(format!("{} is {}", vm.host, host.word()));
    }
    match info.filter(|info| info.generation == vm.generation).map(|info| info.state()) {
        Some(VmState::Running) => Stands::Runs,
        Some(VmState::Stopped) => Stands::Still("ended by itself"),
        Some(VmState::Crashed) => Stands::Still("crashed"),
        Some(VmState::Paused) => Stands::Blocked(format!("{} has paused it", vm.host)),
        Some(VmState::Starting | VmState::Incoming | VmState::HandedOver | VmState::Unspecified) => {
            Stands::Blocked("starting".into())
        }
        None => Stands::Blocked(format!("{} does not have it", vm.host)),
    }
}

/// Checkpoints under way on each host, whoever asked for them; those that wait in line included.
pub fn busy(state: &State) -> BTreeMap<String, usize> {
    let mut busy = BTreeMap::new();
    for operation in state.active().filter(|operation| matches!(operation.plan.task, Task::Checkpoint { .. })) {
        let host = operation.plan.holder.as_ref().map(|holder| holder.host.clone()).unwrap_or_default();
        *busy.entry(host).or_default() += 1;
    }
    busy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::event::Event;
    use crate::ledger::tests::{append, begin, migrate_plan, running_vm, scheduled_plan};

    fn observe(host: HostState, state: VmState) -> Observe {
        Arc::new(move |vm| (host, Some(VmInfo { generation: vm.generation, state: state.into(), ..VmInfo::default() })))
    }

    fn facts(state: &State, observe: &Observe) -> Facts {
        gather(state, observe).remove(0)
    }

    #[test]
    fn only_a_guest_that_runs_and_that_nobody_holds_is_taken() {
        let mut state = running_vm("hostA");
        let policy = CheckpointPolicy { every_ms: 10_000, ..CheckpointPolicy::default() };
        append(&mut state, Event::PolicySet { vm: "vm1".into(), policy }).unwrap();
        let cases = [
            (HostState::Up, VmState::Running, Stands::Runs),
            (HostState::Up, VmState::Crashed, Stands::Still("crashed")),
            (HostState::Silent, VmState::Running, Stands::Blocked("hostA is silent".into())),
            (HostState::Up, VmState::Paused, Stands::Blocked("hostA has paused it".into())),
        ];
        for (host, seen, expected) in cases {
            assert_eq!(facts(&state, &observe(host, seen)).stands, expected);
        }
        let up = observe(HostState::Up, VmState::Running);
        let mut migrating = state.clone();
        let plan = migrate_plan(&migrating, "hostB");
        begin(&mut migrating, "op5", plan);
        assert_eq!(facts(&migrating, &up).stands, Stands::Blocked("migrate is under way".into()));
        let plan = scheduled_plan(&state, "vm1", "c1");
        begin(&mut state, "op6", plan);
        assert_eq!(facts(&state, &up).attempt, Attempt::UnderWay);
        assert_eq!(busy(&state), BTreeMap::from([("hostA".to_owned(), 1)]));
    }
}
