//! Promises of the ledger: nothing is forgotten, nothing is reordered, one append decides. Also the histories that
//! other rooms' property tests run over.

use std::time::Duration;

use proptest::prelude::*;
use proto::capability::{CapabilitySet, Facts};
use proto::v1::{MachineConfig, TransferPolicy};

use super::event::{CheckpointEntry, Event, FORMAT, Holder, Intent, Outcome, Plan, Record, Task};
use super::state::{Refusal, State, checkpoint_lock, packs_lock, vm_lock};
use super::{Ledger, LedgerError};
use crate::failure::Failure;
use crate::saga::table::{Illegal, Status};

pub(crate) fn append(state: &mut State, event: Event) -> Result<(), Refusal> {
    let record = Record {
        format: FORMAT,
        sequence: state.sequence + 1,
        unix_ms: 1000 + state.sequence,
        actor: "operator/test".into(),
        vm: String::new(),
        task: String::new(),
        event,
    };
    state.apply(&record)
}

pub(crate) fn vm_id(vm: &str) -> String {
    format!("{:0>32}", vm.len())
}

fn holder(state: &State, vm: &str) -> Option<Holder> {
    state.vms.get(vm).map(|vm| Holder { host: vm.host.clone(), generation: vm.generation })
}

fn plan(state: &State, vm: &str, generation: u64, task: Task) -> Plan {
    let locks = vec![vm_lock(vm)];
    Plan { vm: vm.into(), vm_id: vm_id(vm), locks, holder: holder(state, vm), generation, task }
}

pub(crate) fn config() -> MachineConfig {
    MachineConfig { vcpus: 1, memory_bytes: 2 << 20, engine: "soft".into(), ..MachineConfig::default() }
}

/// A guest that needs every feature of CPUID 1 ECX, and one MSR.
pub(crate) fn contract() -> CapabilitySet {
    let facts = Facts {
        phys_bits: 48,
        tsc_khz: 1_000_000,
        engines: ["soft".to_owned()].into(),
        msrs: [0xc001_1029].into(),
        ..Facts::default()
    };
    let mut cpuid = |leaf, _| if leaf == 1 { [0, 0, u32::MAX, 0] } else { [0; 4] };
    CapabilitySet::from_cpuid("soft-v1", &mut cpuid, facts)
}

pub(crate) fn create_plan(vm: &str, host: &str) -> Plan {
    let task =
        Task::Create { host: host.into(), config: config(), on_isolation: 0, capabilities: contract().to_bytes() };
    plan(&State::default(), vm, 1, task)
}

pub(crate) fn migrate_plan(state: &State, target: &str) -> Plan {
    migrate_plan_of(state, "vm1", target)
}

fn migrate_plan_of(state: &State, vm: &str, target: &str) -> Plan {
    let policy = TransferPolicy::default();
    let task =
        Task::Migrate { target: target.into(), via_controller: false, paused: false, engine: String::new(), policy };
    plan(state, vm, state.fresh_generation(vm), task)
}

pub(crate) fn restore_plan(state: &State, vm: &str, checkpoint: &str, target: &str) -> Plan {
    let task = Task::Restore {
        checkpoint: checkpoint.into(),
        target: target.into(),
        new: !state.vms.contains_key(vm),
        config: config(),
        capabilities: contract().to_bytes(),
        on_isolation: 0,
        policy: TransferPolicy::default(),
        lazy: false,
        checkpoint_policy: Vec::new(),
        drill: false,
        replay: None,
    };
    let mut plan = plan(state, vm, state.fresh_generation(vm), task);
    plan.locks.push(checkpoint_lock(checkpoint));
    plan
}

pub(crate) fn checkpoint_plan(state: &State, vm: &str, checkpoint: &str) -> Plan {
    let mut plan = plan(state, vm, 0, Task::Checkpoint { checkpoint: checkpoint.into(), by_policy: false });
    plan.locks.push(packs_lock(&plan.vm_id));
    plan
}

pub(crate) fn scheduled_plan(state: &State, vm: &str, checkpoint: &str) -> Plan {
    let task = Task::Checkpoint { checkpoint: checkpoint.into(), by_policy: true };
    Plan { task, ..checkpoint_plan(state, vm, checkpoint) }
}

pub(crate) fn simple_plan(state: &State, vm: &str, task: Task) -> Plan {
    plan(state, vm, 0, task)
}

pub(crate) fn entry(id: &str, vm: &str, generation: u64) -> CheckpointEntry {
    CheckpointEntry {
        id: id.into(),
        vm: vm.into(),
        vm_id: vm_id(vm),
        generation,
        created_unix_ms: 5,
        ram_bytes: 2 << 20,
        stored_bytes: 10,
        own_bytes: 10,
        stop_us: 1,
        manifest_key: format!("vms/{}/checkpoints/{id}.manifest", vm_id(vm)),
        pack_keys: vec![],
        digest: Default::default(),
        verified: "unverified".into(),
        by_policy: false,
        sequence: 0,
    }
}

pub(crate) fn begin(state: &mut State, id: &str, plan: Plan) {
    append(state, Event::OperationBegan { operation: id.into(), plan: Box::new(plan) }).unwrap();
}

pub(crate) fn running_vm(host: &str) -> State {
    let mut state = State::default();
    begin(&mut state, "op1", create_plan("vm1", host));
    append(&mut state, Event::StepDone { operation: "op1".into(), step: 0 }).unwrap();
    append(&mut state, Event::Committed { operation: "op1".into(), result: Box::new(Outcome::AsPlanned) }).unwrap();
    state
}

/// What a random walk tries next; most tries are refused, which is part of the promise.
fn attempt(state: &State, serial: usize, choice: (u8, u8, u8)) -> Event {
    let vm = ["vm1", "vm2"][usize::from(choice.1) % 2];
    let host = ["hostA", "hostB", "hostC"][usize::from(choice.2) % 3];
    let active: Vec<_> = state.active().cloned().collect();
    let began = |plan: Plan| Event::OperationBegan { operation: format!("op{serial}"), plan: Box::new(plan) };
    if let Some(operation) = active.get(usize::from(choice.2) % active.len().max(1)).filter(|_| choice.0 > 40) {
        let (id, shape) = (operation.id.clone(), operation.plan.task.shape());
        let step = match operation.status {
            Status::Doing(step) | Status::Undoing(step) => step,
            Status::Done | Status::Undone | Status::Left(_) => 0,
        };
        let failure = Failure::new(proto::status::Code::Unreachable, "gone");
        let result = match &operation.plan.task {
            Task::Checkpoint { checkpoint, .. } => {
                Outcome::Checkpoint(Box::new(entry(checkpoint, &operation.plan.vm, state.fresh_generation(vm))))
            }
            _ => Outcome::AsPlanned,
        };
        return match (choice.0 % 16, operation.status) {
            (0, _) => Event::Cancelled { operation: id },
            (1, _) => Event::Interrupted { operation: id },
            (2, _) => Event::StepFailed { operation: id, step, failure },
            (3, _) => Event::GaveUp { operation: id, step, failure },
            (_, Status::Undoing(_)) => Event::StepUndone { operation: id, step },
            (_, _) if step == shape.commit => Event::Committed { operation: id, result: Box::new(result) },
            _ => Event::StepDone { operation: id, step },
        };
    }
    let checkpoint = state.checkpoints.keys().next().cloned().unwrap_or_else(|| "none".into());
    match choice.0 % 8 {
        0 | 1 => {
            let task = Task::Create {
                host: host.into(),
                config: config(),
                on_isolation: 0,
                capabilities: contract().to_bytes(),
            };
            began(plan(state, vm, state.fresh_generation(vm), task))
        }
        2 | 3 => began(migrate_plan_of(state, vm, host)),
        4 => began(restore_plan(state, vm, &checkpoint, host)),
        5 => began(checkpoint_plan(state, vm, &format!("c{serial}"))),
        6 => began(simple_plan(state, vm, Task::Remove)),
        _ => began(simple_plan(state, vm, Task::Pause { was: Intent::Running })),
    }
}

/// Every state of a random history.
pub(crate) fn histories() -> impl Strategy<Value = Vec<State>> {
    proptest::collection::vec(any::<(u8, u8, u8)>(), 0..80).prop_map(|choices| {
        let mut states = vec![running_vm("hostA")];
        for (serial, choice) in (100..).zip(choices) {
            let mut state = states.last().cloned().unwrap_or_default();
            let event = attempt(&state, serial, choice);
            if append(&mut state, event).is_ok() {
                states.push(state);
            }
        }
        states
    })
}

proptest! {
    #[test]
    fn generations_only_rise_and_only_by_a_commit(states in histories()) {
        for pair in states.windows(2) {
            let (before, after) = (&pair[0], &pair[1]);
            for (name, vm) in &before.vms {
                let Some(now) = after.vms.get(name) else { continue };
                prop_assert!(now.generation >= vm.generation);
                if now.generation == vm.generation {
                    prop_assert_eq!(&now.host, &vm.host);
                }
            }
            for (name, highest) in &before.generations {
                prop_assert!(after.generations[name] >= *highest);
            }
        }
    }

    #[test]
    fn no_two_operations_hold_one_lock(states in histories()) {
        for state in &states {
            let mut held = std::collections::BTreeSet::new();
            for operation in state.active() {
                for lock in &operation.plan.locks {
                    prop_assert!(held.insert(lock.clone()), "{lock} is held twice");
                }
            }
        }
    }

    #[test]
    fn a_refused_record_changes_nothing(states in histories(), choice in any::<(u8, u8, u8)>()) {
        let before = states.last().unwrap().clone();
        let mut after = before.clone();
        let event = attempt(&before, 7, (choice.0, choice.1, choice.2));
        if append(&mut after, event).is_err() {
            prop_assert_eq!(before, after);
        }
    }
}

#[test]
fn a_record_out_of_order_is_refused() {
    let mut state = running_vm("hostA");
    let event = Event::LeaseSet { lease_ms: 5 };
    let record = Record {
        format: FORMAT,
        sequence: state.sequence + 2,
        unix_ms: 0,
        actor: String::new(),
        vm: String::new(),
        task: String::new(),
        event,
    };
    assert!(matches!(state.apply(&record), Err(Refusal::Sequence { .. })));
}

#[test]
fn a_name_that_is_used_again_goes_on_counting_generations() {
    let mut state = running_vm("hostA");
    let plan = simple_plan(&state, "vm1", Task::Remove);
    begin(&mut state, "op2", plan);
    append(&mut state, Event::Committed { operation: "op2".into(), result: Box::new(Outcome::AsPlanned) }).unwrap();
    append(&mut state, Event::StepDone { operation: "op2".into(), step: 1 }).unwrap();
    assert!(state.vms.is_empty());
    let refused = append(
        &mut state,
        Event::OperationBegan { operation: "op3".into(), plan: Box::new(create_plan("vm1", "hostB")) },
    );
    assert!(matches!(refused, Err(Refusal::Stale(_))), "{refused:?}");
    assert_eq!(state.fresh_generation("vm1"), 2);
}

#[tokio::test]
async fn a_ledger_that_is_opened_again_means_the_same() {
    let folder = std::env::temp_dir().join(format!("godwit-{}", super::saved::to_hex(&crate::entropy::bytes::<8>())));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("controller.redb");
    let ledger = Ledger::open(&path).unwrap();
    let plan = Box::new(create_plan("vm1", "hostA"));
    ledger.append("operator/a", Event::OperationBegan { operation: "op1".into(), plan }).await.unwrap();
    ledger.append("controller/a", Event::StepDone { operation: "op1".into(), step: 0 }).await.unwrap();
    let before = ledger.state();
    drop(ledger);
    let ledger = Ledger::open(&path).unwrap();
    assert_eq!(ledger.state(), before);
    let records = ledger.records(1, 10).await.unwrap();
    assert_eq!(records.len(), 2);
    assert_eq!((records[1].vm.as_str(), records[1].task.as_str()), ("vm1", "create"));
    drop(ledger);
    std::fs::remove_dir_all(folder).unwrap();
}

/// A record as releases before contracts wrote it.
const BEFORE_CONTRACTS: &str = r#"{"format":1,"sequence":1,"unix_ms":5,"actor":"operator/a","vm":"vm1","task":"create",
    "event":{"operation_began":{"operation":"op1","plan":{"vm":"vm1","vm_id":"00","locks":["VM vm1"],"holder":null,
    "generation":1,"task":{"create":{"host":"hostA","config":"MACHINE","on_isolation":0,"capabilities":""}}}}}}"#;

#[test]
fn a_record_before_contracts_loads_and_its_vm_gets_one_once() {
    let machine = super::saved::to_hex(&prost::Message::encode_to_vec(&config()));
    let record: Record = serde_json::from_str(&BEFORE_CONTRACTS.replace("MACHINE", &machine)).unwrap();
    let mut state = State::default();
    state.apply(&record).unwrap();
    assert!(state.vms["vm1"].capabilities.is_empty());
    let frozen = |bytes: Vec<u8>| Event::ContractFrozen { vm: "vm1".into(), capabilities: bytes };
    append(&mut state, frozen(contract().to_bytes())).unwrap();
    assert_eq!(CapabilitySet::from_bytes(&state.vms["vm1"].capabilities), Ok(contract()));
    assert!(matches!(append(&mut state, frozen(vec![1])), Err(Refusal::Stale(_))), "a contract is frozen once");
    let gone = Event::ContractFrozen { vm: "vm9".into(), capabilities: vec![1] };
    assert!(matches!(append(&mut state, gone), Err(Refusal::Stale(_))));
}

#[tokio::test]
async fn a_cancel_and_a_commit_cannot_both_happen() {
    let ledger = Ledger::in_memory().unwrap();
    let plan = Box::new(create_plan("vm1", "hostA"));
    ledger.append("a", Event::OperationBegan { operation: "op1".into(), plan }).await.unwrap();
    ledger.append("a", Event::StepDone { operation: "op1".into(), step: 0 }).await.unwrap();
    let commit = Event::Committed { operation: "op1".into(), result: Box::new(Outcome::AsPlanned) };
    let cancel = Event::Cancelled { operation: "op1".into() };
    let (committed, cancelled) = tokio::join!(ledger.append("a", commit), ledger.append("b", cancel));
    assert!(committed.is_ok() != cancelled.is_ok());
    let refused = committed.err().or(cancelled.err());
    assert!(matches!(refused, Some(LedgerError::Refused(Refusal::Illegal(Illegal::Ended | Illegal::Order { .. })))));
}

#[test]
fn a_lazily_restored_vm_keeps_its_checkpoint_until_its_pages_have_arrived() {
    let mut state = running_vm("hostA");
    state.checkpoints.insert("c1".into(), std::sync::Arc::new(entry("c1", "vm1", 1)));
    let mut plan = restore_plan(&state, "vm1", "c1", "hostB");
    let Task::Restore { lazy, .. } = &mut plan.task else { panic!("a restore restores") };
    *lazy = true;
    begin(&mut state, "op2", plan);
    for step in 0..3 {
        append(&mut state, Event::StepDone { operation: "op2".into(), step }).unwrap();
    }
    assert!(state.fed_by("c1").is_none(), "nothing is true before the commit");
    append(&mut state, Event::Committed { operation: "op2".into(), result: Box::new(Outcome::AsPlanned) }).unwrap();
    for step in 4..6 {
        append(&mut state, Event::StepDone { operation: "op2".into(), step }).unwrap();
    }
    assert_eq!(state.fed_by("c1").map(|vm| vm.name.as_str()), Some("vm1"));
    let began = |id: &str, plan: Plan| Event::OperationBegan { operation: id.into(), plan: Box::new(plan) };
    let remove = Task::RemoveCheckpoint { checkpoint: "c1".into(), generation: 1 };
    for (id, plan) in [
        ("op3", simple_plan(&state, "vm1", remove.clone())),
        ("op4", migrate_plan(&state, "hostA")),
        ("op5", checkpoint_plan(&state, "vm1", "c2")),
    ] {
        assert!(matches!(append(&mut state, began(id, plan)), Err(Refusal::Stale(_))), "{id}");
    }
    let arrived = |generation| Event::PagesArrived { vm: "vm1".into(), generation };
    assert!(matches!(append(&mut state, arrived(1)), Err(Refusal::Stale(_))), "of an older generation");
    append(&mut state, arrived(2)).unwrap();
    assert!(matches!(append(&mut state, arrived(2)), Err(Refusal::Stale(_))), "once");
    let plan = simple_plan(&state, "vm1", remove);
    append(&mut state, began("op6", plan)).unwrap();
}

#[tokio::test]
async fn a_ledger_in_use_is_said_to_be_and_waited_for() {
    let folder = std::env::temp_dir().join(format!("godwit-{}", super::saved::to_hex(&crate::entropy::bytes::<8>())));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("ledger.redb");
    let first = Ledger::open(&path).unwrap();
    assert!(matches!(Ledger::open_when_free(&path, Duration::ZERO).await, Err(LedgerError::Busy(_))));
    let (path_too, patience) = (path.clone(), Duration::from_secs(60));
    let second = tokio::spawn(async move { Ledger::open_when_free(&path_too, patience).await.map(drop) });
    tokio::task::yield_now().await;
    drop(first);
    second.await.unwrap().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
}
