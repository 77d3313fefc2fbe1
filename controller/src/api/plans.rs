//! From a request to a plan: what must be so before an operation begins. Pure.
//!
//! A plan is made from one state of the ledger; `State::apply` looks again whether it still fits when it is appended.
//! Refusals say what, why and what to do.

use proto::capability::CapabilitySet;
use proto::ids::{CheckpointId, VmId};
use proto::status::Code;
use proto::v1::{MachineConfig, Manifest, TransferPolicy};

use super::placement::{Fleet, Need};
use crate::failure::Failure;
use crate::ingest::manifest::SPACE_BYTES_MAX;
use crate::ledger::event::{CheckpointEntry, Holder, Intent, Plan, Replay, Task};
use crate::ledger::state::{State, Vm, checkpoint_lock, packs_lock, vm_lock};

/// Guest RAM comes in these units.
const MEMORY_UNIT: u64 = 2 << 20;

/// Says that a name is of no VM.
pub fn unknown_vm(vm: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no VM {vm}")).hint("`ctl vm ls` names the VMs")
}

/// Says that a name is of no checkpoint.
pub fn unknown_checkpoint(id: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no checkpoint {id}")).hint("`ctl checkpoint ls` names them")
}

fn vm<'a>(state: &'a State, name: &str) -> Result<&'a Vm, Failure> {
    match state.vms.get(name) {
        Some(vm) => Ok(vm),
        None => Err(unknown_vm(name)),
    }
}

fn holder(vm: &Vm) -> Option<Holder> {
    Some(Holder { host: vm.host.clone(), generation: vm.generation })
}

fn plan(vm: &Vm, generation: u64, task: Task) -> Plan {
    let locks = vec![vm_lock(&vm.name)];
    Plan { vm: vm.name.clone(), vm_id: vm.id.clone(), locks, holder: holder(vm), generation, task }
}

/// Whether text can be the name of a VM: it names directories on hosts.
///
/// # Errors
/// [`Code::BadInput`].
pub fn check_name(name: &str) -> Result<(), Failure> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if first && name.len() <= 40 && name.chars().all(plain) {
        return Ok(());
    }
    Err(Failure::new(Code::BadInput, format!("{name:?} cannot name a VM"))
        .hint("1 to 40 letters, digits, `-`, `_` and `.`; the first a letter or digit"))
}

fn check_config(config: &MachineConfig) -> Result<(), Failure> {
    let bad = |text: String| Err(Failure::new(Code::BadInput, text));
    if config.vcpus == 0 {
        return bad("a VM needs a vCPU".into());
    }
    if config.memory_bytes == 0 || !config.memory_bytes.is_multiple_of(MEMORY_UNIT) {
        return bad(format!("memory of {} bytes is not a multiple of 2 MiB", config.memory_bytes));
    }
    let spaces = config.disks.iter().map(|disk| disk.size_bytes).chain([config.memory_bytes]);
    if spaces.max() > Some(SPACE_BYTES_MAX) {
        return bad(format!("memory and each disk may have {SPACE_BYTES_MAX} bytes at most"));
    }
    Ok(())
}

/// Create a VM.
///
/// # Errors
/// [`Code::BadInput`], [`Code::Conflict`], and what [`Fleet::keeping`] says.
pub fn create(
    state: &State,
    fleet: &Fleet,
    name: &str,
    host: &str,
    mut config: MachineConfig,
    on_isolation: i32,
) -> Result<Plan, Failure> {
    check_name(name)?;
    check_config(&config)?;
    if state.vms.contains_key(name) {
        return Err(Failure::new(Code::Conflict, format!("there is a VM {name} already")).hint("choose another name"));
    }
    let contract = fleet.host(host)?.freeze(&mut config)?;
    fleet.keeping(host, &Need { vm: name, config: &config, contract: &contract }, None)?;
    Ok(Plan {
        vm: name.into(),
        vm_id: VmId(crate::entropy::bytes()).to_string(),
        locks: vec![vm_lock(name)],
        holder: None,
        generation: state.fresh_generation(name),
        task: Task::Create { host: host.into(), config, on_isolation, capabilities: contract.to_bytes() },
    })
}

/// Pause, resume, stop or remove a VM.
///
/// # Errors
/// [`Code::NotFound`]; [`Code::Conflict`] for a VM that was stopped.
pub fn power(state: &State, name: &str, task: impl FnOnce(Intent) -> Task) -> Result<Plan, Failure> {
    let vm = vm(state, name)?;
    let task = task(vm.intent);
    if vm.intent == Intent::Stopped && matches!(task, Task::Pause { .. } | Task::Resume { .. }) {
        return Err(stopped(name));
    }
    Ok(plan(vm, 0, task))
}

/// Says that a VM cannot be read yet, if so.
fn complete(vm: &Vm) -> Result<(), Failure> {
    if vm.pages_from.is_empty() {
        return Ok(());
    }
    let text = format!("pages of {} still come from checkpoint {}: it cannot be read yet", vm.name, vm.pages_from);
    Err(Failure::new(Code::Conflict, text)
        .hint(format!("`ctl vm show {}` says how much is missing; ask again", vm.name)))
}

fn stopped(name: &str) -> Failure {
    Failure::new(Code::Conflict, format!("{name} is stopped"))
        .hint(format!("`ctl restore {name}` brings its newest checkpoint back"))
}

/// The contract of a VM.
///
/// # Errors
/// [`Code::Unreachable`]: it was made by a release before contracts, and no host that knows its model was heard since.
/// [`Code::Corrupt`].
pub fn contract(vm: &Vm) -> Result<CapabilitySet, Failure> {
    if vm.capabilities.is_empty() {
        let (name, model) = (&vm.name, &vm.config.cpu_model);
        let text = format!("what {name} needs is not known: no host that knows its CPU model {model:?} was heard yet");
        return Err(Failure::new(Code::Unreachable, text).hint("`ctl host ls` shows which hosts are up"));
    }
    decode(&vm.name, &vm.capabilities)
}

fn decode(vm: &str, bytes: &[u8]) -> Result<CapabilitySet, Failure> {
    CapabilitySet::from_bytes(bytes).map_err(|error| Failure::new(Code::Corrupt, format!("contract of {vm}: {error}")))
}

/// Migrate a VM.
///
/// # Errors
/// [`Code::NotFound`], [`Code::Conflict`], and what [`contract`] and [`Fleet::fitting`] say.
pub fn migrate(
    state: &State,
    fleet: &Fleet,
    name: &str,
    target: &str,
    engine: &str,
    via_controller: bool,
    policy: TransferPolicy,
) -> Result<Plan, Failure> {
    let vm = vm(state, name)?;
    if vm.host == target {
        return Err(Failure::new(Code::Conflict, format!("{name} is on {target} already")));
    }
    if vm.intent == Intent::Stopped {
        return Err(stopped(name));
    }
    complete(vm)?;
    let contract = contract(vm)?;
    let mut config = vm.config.clone();
    if !engine.is_empty() {
        engine.clone_into(&mut config.engine);
    }
    if config.engine != "soft" && state.recording_of(&vm.id).is_some() {
        let text = format!("{name} is being recorded, and only the software engine is deterministic");
        return Err(Failure::new(Code::Conflict, text).hint(format!("`ctl record stop {name}` first")));
    }
    fleet.fitting(target, &Need { vm: name, config: &config, contract: &contract }, Some(&vm.host))?;
    let paused = vm.intent == Intent::Paused;
    let task = Task::Migrate { target: target.into(), via_controller, paused, engine: engine.into(), policy };
    Ok(plan(vm, state.fresh_generation(name), task))
}

/// Make a checkpoint of a VM, which its policy may remove again, or only an operator.
///
/// # Errors
/// [`Code::NotFound`]; [`Code::Conflict`] for a VM that was stopped.
pub fn checkpoint(state: &State, name: &str, by_policy: bool) -> Result<Plan, Failure> {
    let vm = vm(state, name)?;
    if vm.intent == Intent::Stopped {
        return Err(stopped(name));
    }
    complete(vm)?;
    let checkpoint = CheckpointId(crate::entropy::bytes()).to_string();
    let mut plan = plan(vm, 0, Task::Checkpoint { checkpoint, by_policy });
    plan.locks.push(packs_lock(&vm.id));
    Ok(plan)
}

/// The checkpoint that a name means: itself, or the newest of a VM, also of one that was removed.
///
/// # Errors
/// [`Code::NotFound`].
pub fn named_checkpoint<'a>(state: &'a State, name: &str) -> Result<&'a CheckpointEntry, Failure> {
    if let Some(entry) = state.checkpoints.get(name) {
        return Ok(entry);
    }
    let newest = match state.vms.get(name) {
        Some(vm) => state.newest_checkpoint(&vm.id),
        None => state.checkpoints.values().filter(|entry| entry.vm == name).max_by_key(|entry| entry.created_unix_ms),
    };
    match newest {
        Some(entry) => Ok(entry),
        None if state.vms.contains_key(name) => {
            Err(Failure::new(Code::NotFound, format!("{name} has no checkpoint")).hint("`ctl checkpoint create`"))
        }
        None => Err(Failure::new(Code::NotFound, format!("there is no VM and no checkpoint {name}"))
            .hint("`ctl vm ls` and `ctl checkpoint ls` name them")),
    }
}

/// How a checkpoint is restored.
#[derive(Default)]
pub struct How {
    /// The operator's limits.
    pub policy: TransferPolicy,
    /// The guest runs before its RAM has come.
    pub lazy: bool,
    /// What it goes through before it is ready.
    pub replay: Option<Replay>,
}

/// Restore a checkpoint whose manifest was read. No target: the host that suits it best.
///
/// # Errors
/// [`Code::Conflict`], [`Code::BadInput`], [`Code::Corrupt`], and what [`Fleet::keeping`] and [`Fleet::place`] say.
pub fn restore(
    state: &State,
    fleet: &Fleet,
    entry: &CheckpointEntry,
    manifest: Manifest,
    target: &str,
    as_name: &str,
    How { policy, lazy, replay }: How,
) -> Result<Plan, Failure> {
    if lazy && replay.is_some() {
        let text = "a guest that goes through a recording first needs all of its pages";
        return Err(Failure::new(Code::BadInput, text).hint("leave --lazy out"));
    }
    let name = if as_name.is_empty() { &entry.vm } else { as_name };
    check_name(name)?;
    let config = manifest.config.unwrap_or_default();
    let contract = match &manifest.capabilities[..] {
        [] => fleet.contract_by_model(&config).ok_or_else(|| {
            let text = format!(
                "checkpoint {} names no contract, and no host knows CPU model {:?}",
                entry.id, config.cpu_model
            );
            Failure::new(Code::Incapable, text).hint("`ctl host ls` shows which hosts are up")
        })?,
        bytes => decode(name, bytes)?,
    };
    let there = state.vms.get(name);
    let vm_id = match there {
        Some(_) if !as_name.is_empty() => {
            let text = format!("there is a VM {name} already");
            return Err(Failure::new(Code::Conflict, text).hint("choose another name for --as"));
        }
        Some(vm) if vm.id != entry.vm_id => {
            let text = format!("{name} is another VM than the one of checkpoint {}", entry.id);
            return Err(Failure::new(Code::Conflict, text).hint("restore it under another name with --as"));
        }
        None if !as_name.is_empty() => VmId(crate::entropy::bytes()).to_string(),
        Some(_) | None => entry.vm_id.clone(),
    };
    // What a replay goes through must be the machine that was recorded, bit by bit: it keeps its seed, its generation ID and
    // its network addresses.
    let config = if replay.is_some() { config } else { reborn(config, !as_name.is_empty()) };
    let need = Need { vm: name, config: &config, contract: &contract };
    let target = match target {
        "" => fleet.place(&need, there.map(|vm| vm.host.as_str()))?,
        target => fleet.keeping(target, &need, None)?,
    };
    if lazy {
        target.pages_on_demand()?;
    }
    let task = Task::Restore {
        checkpoint: entry.id.clone(),
        target: target.name.clone(),
        new: there.is_none(),
        config,
        capabilities: contract.to_bytes(),
        on_isolation: there.map_or(manifest.on_isolation, |vm| vm.on_isolation),
        policy,
        lazy,
        // A copy is not what the policy was set for, and what is here has its own.
        checkpoint_policy: if there.is_none() && as_name.is_empty() { manifest.policy } else { Vec::new() },
        drill: false,
        replay,
    };
    Ok(Plan {
        vm: name.into(),
        vm_id,
        locks: vec![vm_lock(name), checkpoint_lock(&entry.id)],
        holder: there.and_then(|vm| holder(vm)),
        generation: state.fresh_generation(name),
        task,
    })
}

/// The configuration of a guest that goes back in time: what it draws from now on, nobody has drawn before. A copy is also
/// another machine on its network.
fn reborn(mut config: MachineConfig, copy: bool) -> MachineConfig {
    config.seed = crate::entropy::bytes::<32>().to_vec();
    if !config.generation_id.is_empty() {
        config.generation_id = crate::entropy::bytes::<16>().to_vec();
    }
    for net in config.nets.iter_mut().filter(|_| copy) {
        // Locally administered, unicast.
        net.mac = [&[0x52, 0x54][..], &crate::entropy::bytes::<4>()].concat();
    }
    config
}

/// Verify or remove a checkpoint.
///
/// # Errors
/// [`Code::NotFound`].
pub fn on_checkpoint(state: &State, id: &str, task: impl FnOnce(&CheckpointEntry) -> Task) -> Result<Plan, Failure> {
    let entry = state.checkpoints.get(id).ok_or_else(|| unknown_checkpoint(id))?;
    let task = task(entry);
    if let (Task::RemoveCheckpoint { .. }, Some(vm)) = (&task, state.fed_by(id)) {
        let text = format!("pages of {} still come from checkpoint {id}", vm.name);
        return Err(Failure::new(Code::Conflict, text).hint("remove it when they are there, or stop the VM"));
    }
    let mut locks = vec![checkpoint_lock(id)];
    if matches!(task, Task::RemoveCheckpoint { .. }) {
        locks.push(packs_lock(&entry.vm_id));
    }
    Ok(Plan { vm: entry.vm.clone(), vm_id: entry.vm_id.clone(), locks, holder: None, generation: 0, task })
}

/// Hash packs of a VM again, which nobody may remove meanwhile.
pub fn sample(vm: &Vm, packs: Vec<String>) -> Plan {
    let (name, vm_id, locks) = (vm.name.clone(), vm.id.clone(), vec![packs_lock(&vm.id)]);
    Plan { vm: name, vm_id, locks, holder: None, generation: 0, task: Task::Sample { packs } }
}

/// Sweep a VM's packs. To rewrite some, nobody may be reading a checkpoint of it.
pub fn sweep(state: &State, vm_id: &str, live_percent_min: u32) -> Plan {
    let mut locks = vec![packs_lock(vm_id)];
    if live_percent_min > 0 {
        let ids = state.checkpoints.values().filter(|entry| entry.vm_id == vm_id).map(|entry| &entry.id);
        locks.extend(ids.map(|id| checkpoint_lock(id)));
    }
    let (vm, task) = (state.name_of(vm_id).to_owned(), Task::Sweep { live_percent_min });
    Plan { vm, vm_id: vm_id.into(), locks, holder: None, generation: 0, task }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::lease::HostState;
    use crate::api::placement::Candidate;
    use crate::api::placement::tests::up;
    use crate::ledger::recording::Recording;
    use crate::ledger::tests::{config, contract, entry, running_vm};
    use proto::v1::HostInfo;

    fn cluster() -> State {
        let mut state = running_vm("hostA");
        for host in ["hostA", "hostB"] {
            state.hosts.insert(host.into(), format!("{host}:1"));
        }
        state
    }

    fn code<T: std::fmt::Debug>(result: Result<T, Failure>) -> Code {
        result.unwrap_err().code
    }

    #[test]
    fn a_migration_is_refused_for_a_reason() {
        let state = cluster();
        let migrate = |vm: &str, to: &str, hosts: &[Candidate]| {
            migrate(&state, &Fleet { hosts: hosts.to_vec() }, vm, to, "", false, TransferPolicy::default())
        };
        let hosts = [up("hostA", &[]), up("hostB", &[])];
        assert_eq!(migrate("vm1", "hostB", &hosts).unwrap().generation, 2);
        assert_eq!(code(migrate("vm9", "hostB", &hosts)), Code::NotFound);
        assert_eq!(code(migrate("vm1", "hostA", &hosts)), Code::Conflict);
        assert_eq!(code(migrate("vm1", "hostZ", &hosts)), Code::NotFound);
        let silent = Candidate { state: HostState::Silent, ..up("hostB", &[]) };
        assert_eq!(code(migrate("vm1", "hostB", &[silent])), Code::Unreachable);
        let fleet = Fleet { hosts: hosts.to_vec() };
        let on = |engine| super::migrate(&state, &fleet, "vm1", "hostB", engine, false, TransferPolicy::default());
        assert!(matches!(on("soft").unwrap().task, Task::Migrate { engine, .. } if engine == "soft"));
        let refused = on("kvm").unwrap_err();
        assert!(
            refused.code == Code::Incapable && refused.message.contains("kvm"),
            "the engine there counts: {refused}"
        );
        let no_engine = Candidate { info: Some(HostInfo::default()), ..up("hostB", &[]) };
        assert_eq!(code(migrate("vm1", "hostB", &[no_engine])), Code::Incapable);
        let mut small = up("hostB", &[]);
        small.info.as_mut().unwrap().memory_bytes_free = 5;
        assert_eq!(code(migrate("vm1", "hostB", &[small])), Code::Exhausted);
        let refused = migrate("vm1", "hostB", &[up("hostA", &[]), up("hostB", &["cmpxchg16b"])]).unwrap_err();
        assert!(refused.message.contains("CPUID 0000_0001.0 ECX[13] cmpxchg16b"), "{refused}");
        assert!(refused.hint.contains("no other host"), "the host where it is does not count: {}", refused.hint);
    }

    #[test]
    fn a_vm_that_is_recorded_stays_on_the_engine_that_can() {
        let mut state = cluster();
        let vm_id = state.vms["vm1"].id.clone();
        let recording = Recording {
            id: "ab".repeat(16),
            vm: "vm1".into(),
            vm_id,
            started_unix_ms: 1,
            full: 0,
            ended: String::new(),
            ended_unix_ms: 0,
        };
        state.recordings.insert(recording.id.clone(), std::sync::Arc::new(recording));
        let fleet = Fleet { hosts: vec![up("hostA", &[]), up("hostB", &[])] };
        let on = |engine| migrate(&state, &fleet, "vm1", "hostB", engine, false, TransferPolicy::default());
        let refused = on("kvm").unwrap_err();
        assert!(refused.code == Code::Conflict && refused.hint.contains("ctl record stop vm1"), "{refused}");
        on("").unwrap();
        on("soft").unwrap();
    }

    #[test]
    fn a_vm_whose_pages_still_come_is_neither_moved_nor_read_and_keeps_its_checkpoint() {
        let mut state = cluster();
        state.checkpoints.insert("c1".into(), std::sync::Arc::new(entry("c1", "vm1", 1)));
        std::sync::Arc::make_mut(state.vms.get_mut("vm1").unwrap()).pages_from = "c1".into();
        let fleet = Fleet { hosts: vec![up("hostA", &[]), up("hostB", &[])] };
        let refused = migrate(&state, &fleet, "vm1", "hostB", "", false, TransferPolicy::default()).unwrap_err();
        assert!(refused.code == Code::Conflict && refused.message.contains("c1"), "{refused}");
        assert_eq!(code(checkpoint(&state, "vm1", true)), Code::Conflict);
        let remove = |entry: &CheckpointEntry| Task::RemoveCheckpoint { checkpoint: entry.id.clone(), generation: 1 };
        assert_eq!(code(on_checkpoint(&state, "c1", remove)), Code::Conflict);
        on_checkpoint(&state, "c1", |entry| Task::Verify { checkpoint: entry.id.clone() }).unwrap();
        power(&state, "vm1", |was| Task::Pause { was }).unwrap();
        // A host that cannot do it is refused with what its operator can do; nothing has moved then.
        let manifest =
            || Manifest { config: Some(config()), capabilities: contract().to_bytes(), ..Manifest::default() };
        let lazily = |hosts: Vec<Candidate>| {
            let how = How { lazy: true, ..How::default() };
            restore(&state, &Fleet { hosts }, &entry("c1", "vm1", 1), manifest(), "hostB", "vm2", how)
        };
        let mut able = up("hostB", &[]);
        assert!(lazily(vec![able.clone()]).unwrap_err().message.contains("older release"));
        let info = able.info.as_mut().unwrap();
        (info.lazy_known, info.lazy_refused) = (true, "userfaultfd is not permitted here".into());
        let refused = lazily(vec![able.clone()]).unwrap_err();
        assert!(refused.code == Code::Incapable && refused.message.contains("not permitted"), "{refused}");
        able.info.as_mut().unwrap().lazy_refused.clear();
        assert!(matches!(lazily(vec![able]).unwrap().task, Task::Restore { lazy: true, .. }));
    }

    #[test]
    fn a_vm_whose_contract_is_not_known_stays_where_it_is() {
        let mut state = cluster();
        let vm = std::sync::Arc::make_mut(state.vms.get_mut("vm1").unwrap());
        vm.capabilities.clear();
        let fleet = Fleet { hosts: vec![up("hostA", &[]), up("hostB", &[])] };
        let refused = migrate(&state, &fleet, "vm1", "hostB", "", false, TransferPolicy::default()).unwrap_err();
        assert!(refused.code == Code::Unreachable && refused.message.contains("not known"), "{refused}");
        std::sync::Arc::make_mut(state.vms.get_mut("vm1").unwrap()).capabilities = vec![0xff; 3];
        assert_eq!(code(migrate(&state, &fleet, "vm1", "hostB", "", false, TransferPolicy::default())), Code::Corrupt);
    }

    #[test]
    fn a_restore_knows_the_vm_it_replaces_and_what_it_needs() {
        let state = cluster();
        let fleet = Fleet { hosts: vec![up("hostA", &["popcnt"]), up("hostB", &[])] };
        let mut entry = CheckpointEntry { vm_id: "22".repeat(16), ..entry("c1", "vm1", 1) };
        let manifest = |capabilities| Manifest { config: Some(config()), capabilities, ..Manifest::default() };
        let known = || manifest(contract().to_bytes());
        let other = restore(&state, &fleet, &entry, known(), "hostB", "", How::default());
        assert_eq!(code(other), Code::Conflict, "vm1 in the ledger has another id");
        entry.vm_id.clone_from(&state.vms["vm1"].id);
        let same = restore(&state, &fleet, &entry, known(), "hostB", "", How::default()).unwrap();
        assert_eq!(same.holder, Some(Holder { host: "hostA".into(), generation: 1 }));
        let copy = restore(&state, &fleet, &entry, known(), "hostB", "vm2", How::default()).unwrap();
        assert!(copy.holder.is_none() && copy.vm_id != entry.vm_id && copy.generation == 1);
        assert_eq!(code(restore(&state, &fleet, &entry, known(), "hostB", "../x", How::default())), Code::BadInput);
        let keeps =
            |plan: Plan| matches!(plan.task, Task::Restore { checkpoint_policy, .. } if !checkpoint_policy.is_empty());
        let with_policy = || Manifest { policy: vec![8, 1], ..known() };
        let mut gone = state.clone();
        gone.vms.clear();
        assert!(keeps(restore(&gone, &fleet, &entry, with_policy(), "hostB", "", How::default()).unwrap()));
        assert!(!keeps(restore(&gone, &fleet, &entry, with_policy(), "hostB", "vm2", How::default()).unwrap()));
        assert!(!keeps(restore(&state, &fleet, &entry, with_policy(), "hostB", "", How::default()).unwrap()));
        let refused = restore(&state, &fleet, &entry, known(), "hostA", "vm2", How::default()).unwrap_err();
        assert!(refused.code == Code::Incapable && refused.hint.contains("hostB would do"), "{refused:?}");
        assert_eq!(
            restore(&state, &fleet, &entry, known(), "", "vm2", How::default()).unwrap().task.new_host(),
            Some("hostB")
        );
        // A manifest of a release before contracts: that of the model is checked and kept.
        let old = restore(&state, &fleet, &entry, manifest(vec![]), "hostB", "vm2", How::default()).unwrap();
        let Task::Restore { capabilities, .. } = old.task else { panic!("a restore restores") };
        assert_eq!(CapabilitySet::from_bytes(&capabilities), Ok(contract()));
        assert_eq!(
            code(restore(&state, &Fleet::default(), &entry, manifest(vec![]), "", "vm2", How::default())),
            Code::Incapable
        );
        assert_eq!(
            code(restore(&state, &fleet, &entry, manifest(vec![9; 9]), "", "vm2", How::default())),
            Code::Corrupt
        );
    }

    #[test]
    fn what_goes_through_a_recording_is_the_machine_that_was_recorded() {
        let (state, fleet) = (cluster(), Fleet { hosts: vec![up("hostB", &[])] });
        let net = proto::v1::NetConfig { mac: vec![2, 0, 0, 0, 0, 1], ..proto::v1::NetConfig::default() };
        let config = MachineConfig { seed: vec![7; 32], generation_id: vec![1; 16], nets: vec![net], ..config() };
        let entry = CheckpointEntry { vm_id: state.vms["vm1"].id.clone(), ..entry("c1", "vm1", 1) };
        let manifest =
            || Manifest { config: Some(config.clone()), capabilities: contract().to_bytes(), ..Manifest::default() };
        let replay = Replay {
            recording: "ab".repeat(16),
            first: 0,
            last: 3,
            retired: 9,
            skipped_tsc: 1,
            span_ms: 2000,
            bytes: 0,
        };
        let how = |lazy| How { lazy, replay: Some(replay.clone()), ..How::default() };
        for name in ["", "vm2"] {
            let plan = restore(&state, &fleet, &entry, manifest(), "hostB", name, how(false)).unwrap();
            let Task::Restore { config: restored, replay: planned, .. } = plan.task else {
                panic!("a restore restores")
            };
            assert_eq!((restored, planned), (config.clone(), Some(replay.clone())), "as {name:?}");
        }
        assert_eq!(code(restore(&state, &fleet, &entry, manifest(), "hostB", "", how(true))), Code::BadInput);
    }

    #[test]
    fn what_comes_back_is_another_generation_and_a_copy_another_machine() {
        let net = proto::v1::NetConfig { mac: vec![2, 0, 0, 0, 0, 1], ..proto::v1::NetConfig::default() };
        let before = MachineConfig { generation_id: vec![1; 16], nets: vec![net.clone(), net], ..config() };
        let same = reborn(before.clone(), false);
        let copy = reborn(before.clone(), true);
        for after in [&same, &copy] {
            assert_eq!((after.seed.len(), after.generation_id.len()), (32, 16));
            assert!(after.seed != before.seed && after.generation_id != before.generation_id);
        }
        assert_eq!(same.nets, before.nets);
        let [a, b] = [&copy.nets[0].mac, &copy.nets[1].mac];
        assert!(a != b && *a != before.nets[0].mac && a.len() == 6 && a[0] & 3 == 2, "{a:02x?} {b:02x?}");
        // A machine of an earlier release does not look for a generation.
        assert!(reborn(config(), true).generation_id.is_empty());
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "-x", "a b", "é", &"x".repeat(41)] {
            assert_eq!(code(check_name(name)), Code::BadInput, "{name:?}");
        }
        check_name("vm1.test-2_b").unwrap();
    }

    #[test]
    fn machines_that_cannot_be_are_refused() {
        let state = cluster();
        let on = |host: &str, change: fn(&mut MachineConfig)| {
            let mut config = config();
            change(&mut config);
            create(&state, &Fleet { hosts: vec![up("hostA", &[]), up("hostB", &["popcnt"])] }, "vm2", host, config, 0)
        };
        let with = |change| on("hostA", change);
        let Task::Create { capabilities, .. } = with(|_| ()).unwrap().task else { panic!("a create plan creates") };
        assert_eq!(CapabilitySet::from_bytes(&capabilities), Ok(contract()));
        assert_eq!(code(on("hostB", |_| ())), Code::Incapable);
        assert_eq!(code(with(|config| config.cpu_model = "soft-v9".into())), Code::Incapable);
        assert_eq!(code(with(|config| config.vcpus = 0)), Code::BadInput);
        assert_eq!(code(with(|config| config.memory_bytes = 4096)), Code::BadInput);
        assert_eq!(code(with(|config| config.memory_bytes = 1 << 60)), Code::BadInput);
    }
}
