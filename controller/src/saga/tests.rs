//! One generic test over every kind of operation: it fails at every call, repeats every call, dies at every call, is
//! cancelled at every call, and loses each host at every call. Afterwards hosts, bucket and ledger must agree, and at
//! no time may a VM have run twice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::v1::operation_event::Event as Said;
use proto::v1::vm_verdict::Verdict;
use proto::v1::{TransferPolicy, VmState};
use tokio_stream::StreamExt;

use super::fake::{FakeWorld, Fault, Field};
use super::steps::told_before;
use super::table::Status;
use super::voice::Voice;
use super::{Patience, Sagas};
use crate::agents::verdict::{Report, verdict};
use crate::ledger::Ledger;
use crate::ledger::event::{Event, Intent, Plan, Replay, Task};
use crate::ledger::state::{State, checkpoint_lock, packs_lock};
use crate::ledger::tests::{checkpoint_plan, config, create_plan, restore_plan, simple_plan};
use crate::reconcile::{Correction, corrections};

const HOSTS: [&str; 2] = ["hostA", "hostB"];
const CHECKPOINT: &str = "00112233445566ff";
const PATIENCE: Patience = Patience { undo: 2, forward: 3, pause: Duration::from_millis(10) };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scene {
    Create,
    Pause,
    Resume,
    Stop,
    Remove,
    Migrate,
    Checkpoint,
    RestoreElsewhere,
    RestoreInPlace,
    RestoreFromSilent,
    RestoreEnded,
    RestoreAs,
    RestoreAt,
    Verify,
    RemoveCheckpoint,
    Sweep,
    Sample,
}

const SCENES: [Scene; 17] = [
    Scene::Create,
    Scene::Pause,
    Scene::Resume,
    Scene::Stop,
    Scene::Remove,
    Scene::Migrate,
    Scene::Checkpoint,
    Scene::RestoreElsewhere,
    Scene::RestoreInPlace,
    Scene::RestoreFromSilent,
    Scene::RestoreEnded,
    Scene::RestoreAs,
    Scene::RestoreAt,
    Scene::Verify,
    Scene::RemoveCheckpoint,
    Scene::Sweep,
    Scene::Sample,
];

struct Stage {
    ledger: Ledger,
    field: Arc<Mutex<Field>>,
}

impl Stage {
    async fn new(scene: Scene) -> Stage {
        let mut field = Field::default();
        field.hosts = HOSTS.map(|host| (host.to_owned(), BTreeMap::new())).into();
        let stage = Stage { ledger: Ledger::in_memory().unwrap(), field: Arc::new(Mutex::new(field)) };
        if scene != Scene::Create {
            stage.run(create_plan("vm1", "hostA")).await;
            let plan = checkpoint_plan(&stage.ledger.state(), "vm1", CHECKPOINT);
            stage.run(plan).await;
        }
        if scene == Scene::Resume {
            let plan = simple_plan(&stage.ledger.state(), "vm1", Task::Pause { was: Intent::Running });
            stage.run(plan).await;
        }
        if scene == Scene::Sweep {
            let pack = format!("vms/{}/g00000001/packs/nobody's", stage.ledger.state().vms["vm1"].id);
            stage.field.lock().unwrap().bucket.insert(pack);
        }
        if scene == Scene::RestoreEnded {
            stage.field.lock().unwrap().held("hostA", "vm1").unwrap().state = VmState::Crashed;
        }
        if scene == Scene::RestoreFromSilent {
            stage.field.lock().unwrap().silent.insert("hostA".into());
        }
        stage
    }

    fn sagas(&self, fault: Fault) -> Sagas<FakeWorld> {
        let world = FakeWorld::new(self.field.clone(), fault);
        Sagas::new(self.ledger.clone(), world, PATIENCE, "controller/test".into(), Arc::new(|_| None))
    }

    async fn run(&self, plan: Plan) {
        self.sagas(Fault::Nothing).begin("operator/test", plan).await.unwrap();
        self.ended().await;
    }

    async fn ended(&self) {
        let mut states = self.ledger.watch();
        states.wait_for(|state| state.active().next().is_none()).await.unwrap();
    }

    /// Every host is heard again, three times: verdicts and corrections are followed as agents do.
    async fn settle(&self) {
        self.field.lock().unwrap().silent.clear();
        let world = FakeWorld::new(self.field.clone(), Fault::Nothing);
        for host in HOSTS.iter().cycle().take(3 * HOSTS.len()) {
            let report = world.field().report(host);
            let state = self.ledger.state();
            for vm in &report.vms {
                let said = verdict(&state, host, Report { vm: &vm.name, generation: vm.generation, state: vm.state() });
                let mut field = world.field();
                let held = field.held(host, &vm.name).unwrap();
                match said.verdict() {
                    // A runner whose lease is renewed goes on by itself.
                    Verdict::Hold if held.state == VmState::Paused && !held.paused => held.state = VmState::Running,
                    Verdict::Discard => field.give_up(host, &vm.name),
                    _ => {}
                }
            }
            let work = corrections(&state, &world.field().report(host));
            for correction in work {
                correct(&world, host, correction).await;
            }
        }
    }
}

async fn correct(world: &FakeWorld, host: &str, correction: Correction) {
    use super::world::World;
    let done = match correction.clone() {
        Correction::Activate(request) => world.activate(host, request).await.map(drop),
        Correction::Abandon(operation) => world.abandon(host, operation).await,
        Correction::Pause(vm) => world.pause(host, vm).await.map(drop),
        Correction::Resume(vm) => world.resume(host, vm).await.map(drop),
        Correction::Stop(request) => world.stop(host, request).await.map(drop),
    };
    done.unwrap_or_else(|failure| panic!("{correction:?}: {failure}"));
}

fn plan(scene: Scene, state: &State) -> Plan {
    let policy = TransferPolicy::default();
    let on_checkpoint = |task| {
        let entry = &state.checkpoints[CHECKPOINT];
        let locks = vec![checkpoint_lock(CHECKPOINT), packs_lock(&entry.vm_id)];
        Plan { vm: "vm1".into(), vm_id: entry.vm_id.clone(), locks, holder: None, generation: 0, task }
    };
    let checkpoint = CHECKPOINT.to_owned();
    match scene {
        Scene::Create => create_plan("vm1", "hostA"),
        Scene::Pause => simple_plan(state, "vm1", Task::Pause { was: Intent::Running }),
        Scene::Resume => simple_plan(state, "vm1", Task::Resume { was: Intent::Paused }),
        Scene::Stop => simple_plan(state, "vm1", Task::Stop),
        Scene::Remove => simple_plan(state, "vm1", Task::Remove),
        Scene::Migrate => {
            let task = Task::Migrate {
                target: "hostB".into(),
                via_controller: false,
                paused: false,
                engine: String::new(),
                policy,
            };
            Plan { generation: state.fresh_generation("vm1"), ..simple_plan(state, "vm1", task) }
        }
        Scene::Checkpoint => checkpoint_plan(state, "vm1", "aabbccddeeff0011"),
        Scene::RestoreElsewhere | Scene::RestoreFromSilent | Scene::RestoreEnded => {
            restore_plan(state, "vm1", CHECKPOINT, "hostB")
        }
        Scene::RestoreInPlace => restore_plan(state, "vm1", CHECKPOINT, "hostA"),
        Scene::RestoreAs => restore_plan(state, "vm2", CHECKPOINT, "hostB"),
        Scene::RestoreAt => {
            let mut plan = restore_plan(state, "vm1", CHECKPOINT, "hostB");
            if let Task::Restore { replay, .. } = &mut plan.task {
                let recording = "ab".repeat(16);
                *replay = Some(Replay {
                    recording,
                    first: 3,
                    last: 9,
                    retired: 77,
                    skipped_tsc: 5,
                    span_ms: 60_000,
                    bytes: 4096,
                });
            }
            plan
        }
        Scene::Verify => on_checkpoint(Task::Verify { checkpoint }),
        Scene::Sample => on_checkpoint(Task::Sample { packs: state.checkpoints[CHECKPOINT].pack_keys.clone() }),
        Scene::Sweep => on_checkpoint(Task::Sweep { live_percent_min: 30 }),
        Scene::RemoveCheckpoint => on_checkpoint(Task::RemoveCheckpoint { checkpoint, generation: 1 }),
    }
}

/// Plays a scene with a fault to its end, whatever it takes, and checks everything; returns how it ended and the calls
/// it took.
async fn play(scene: Scene, fault: Fault) -> (Status, usize) {
    let played = tokio::time::timeout(Duration::from_secs(3600), play_to_the_end(scene, fault.clone())).await;
    played.unwrap_or_else(|_| panic!("{scene:?} with {fault:?} takes for ever"))
}

async fn play_to_the_end(scene: Scene, fault: Fault) -> (Status, usize) {
    let stage = Stage::new(scene).await;
    let before = stage.ledger.state();
    let sagas = stage.sagas(fault.clone());
    let voice = sagas.begin("operator/test", plan(scene, &before)).await.unwrap();
    let id = voice.operation().to_owned();
    let struck = tokio::select! {
        () = stage.ended() => false,
        () = sagas.world().struck.notified() => true,
    };
    let after = match fault {
        Fault::DiesBefore(_) | Fault::DiesAfter(_) if struck => {
            // The first controller hangs for ever; another one takes over.
            let next = stage.sagas(Fault::Nothing);
            next.recover().await.unwrap();
            stage.ended().await;
            next.voice(&id).unwrap()
        }
        Fault::Hangs(_) if struck => {
            match sagas.cancel("operator/test", &id).await {
                Ok(()) => stage.ended().await,
                // After the commit nothing can be cancelled: a call that never ends is the end of this controller.
                Err(failure) => {
                    assert_eq!(failure.code, proto::status::Code::Conflict, "{scene:?} {fault:?}");
                    stage.sagas(Fault::Nothing).recover().await.unwrap();
                    stage.ended().await;
                }
            }
            sagas.voice(&id).unwrap()
        }
        _ => voice,
    };
    let state = stage.ledger.state();
    let status = state.operations[&id].status;
    stage.settle().await;
    check(scene, &fault, &before, &stage, status);
    if !struck {
        check_last_word(&after, status).await;
    }
    (status, sagas.world().calls())
}

fn check(scene: Scene, fault: &Fault, before: &State, stage: &Stage, status: Status) {
    let (state, field) = (stage.ledger.state(), stage.field.lock().unwrap());
    let at = format!("{scene:?} with {fault:?}, {status:?}");
    assert_eq!(field.broken, [""; 0], "{at}");
    for host in HOSTS {
        for (name, held) in &field.hosts[host] {
            let vm = state.vms.get(name).unwrap_or_else(|| panic!("{at}: {host} has {name}, the ledger has not"));
            assert_eq!((vm.host.as_str(), vm.generation), (host, held.generation), "{at}");
        }
    }
    assert!(field.aside.is_empty(), "{at}: what was to be replaced is neither gone nor back");
    for vm in state.vms.values() {
        let held = field.hosts[&vm.host].get(&vm.name);
        let expected = match vm.intent {
            Intent::Running => VmState::Running,
            Intent::Paused => VmState::Paused,
            Intent::Stopped => VmState::Stopped,
        };
        match held {
            // A guest that had ended by itself is as it was.
            Some(held) if scene == Scene::RestoreEnded && status == Status::Undone => {
                assert_eq!(held.state, VmState::Crashed, "{at}");
            }
            Some(held) => assert_eq!(held.state, expected, "{at}"),
            None => panic!("{at}: {} does not have {}", vm.host, vm.name),
        }
    }
    let manifests: Vec<&String> = field.bucket.iter().filter(|key| key.ends_with(".manifest")).collect();
    let known: Vec<&String> = state.checkpoints.values().map(|entry| &entry.manifest_key).collect();
    let swept = !matches!(status, Status::Left(_)) && (scene != Scene::Sweep || status == Status::Done);
    if swept {
        assert_eq!(manifests, known, "{at}");
        let packs: usize = state.checkpoints.values().map(|entry| entry.pack_keys.len()).sum();
        assert_eq!(field.bucket.len(), manifests.len() + packs, "{at}: packs that are nobody's");
    }
    if status == Status::Undone {
        assert_eq!(state.vms.keys().collect::<Vec<_>>(), before.vms.keys().collect::<Vec<_>>(), "{at}");
        for (name, vm) in &before.vms {
            assert_eq!(&state.vms[name], vm, "{at}");
        }
        assert_eq!(state.checkpoints, before.checkpoints, "{at}");
    }
    assert!(status.ended(), "{at}");
    if scene == Scene::RestoreEnded && *fault == Fault::Nothing {
        assert!(!field.waited, "{at}: a host that says that the guest has ended need not be waited for");
    }
}

async fn check_last_word(voice: &Voice, status: Status) {
    let said: Vec<_> = voice.listen().map(|event| event.unwrap().event.unwrap()).collect().await;
    match said.last() {
        Some(Said::Done(_)) => assert_eq!(status, Status::Done),
        Some(Said::Failed(failed)) => assert!(status != Status::Done && !failed.message.is_empty(), "{failed:?}"),
        other => panic!("the last word is {other:?}"),
    }
}

async fn calls(scene: Scene) -> usize {
    let (status, calls) = play(scene, Fault::Nothing).await;
    assert_eq!(status, Status::Done, "{scene:?}");
    assert!(calls > 0, "{scene:?} does nothing");
    calls
}

#[tokio::test(start_paused = true)]
async fn every_call_of_every_operation_may_fail() {
    for scene in SCENES {
        for call in 0..calls(scene).await {
            play(scene, Fault::Before(call)).await;
            play(scene, Fault::After(call)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_call_of_every_operation_may_be_repeated() {
    for scene in SCENES {
        assert_eq!(play(scene, Fault::Twice).await.0, Status::Done, "{scene:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_controller_may_die_at_every_call() {
    for scene in SCENES {
        for call in 0..calls(scene).await {
            play(scene, Fault::DiesBefore(call)).await;
            play(scene, Fault::DiesAfter(call)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_may_fall_silent_at_every_call() {
    for scene in SCENES {
        for call in 0..calls(scene).await {
            for host in HOSTS {
                play(scene, Fault::Silent(call, host)).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_may_cancel_at_every_call() {
    let mut undone = 0;
    for scene in SCENES {
        for call in 0..calls(scene).await {
            let (status, _) = play(scene, Fault::Hangs(call)).await;
            undone += usize::from(status == Status::Undone);
        }
    }
    assert!(undone >= 10, "only {undone} operations were undone by a cancel");
}

#[tokio::test(start_paused = true)]
async fn a_second_operation_on_a_vm_is_refused_by_name() {
    let stage = Stage::new(Scene::Migrate).await;
    let sagas = stage.sagas(Fault::Hangs(1));
    let state = stage.ledger.state();
    let first = sagas.begin("operator/test", plan(Scene::Migrate, &state)).await.unwrap();
    let Err(refused) = sagas.begin("operator/test", plan(Scene::Pause, &state)).await else {
        panic!("two operations hold one VM");
    };
    assert_eq!(refused.code, proto::status::Code::Conflict);
    assert!(refused.message.contains(first.operation()), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_keeps_running_is_not_restored_away_from_a_silent_host() {
    let stage = Stage::new(Scene::RestoreFromSilent).await;
    let mut plan = plan(Scene::RestoreFromSilent, &stage.ledger.state());
    if let Task::Restore { on_isolation, config: machine, .. } = &mut plan.task {
        *on_isolation = proto::v1::IsolationPolicy::KeepRunning.into();
        assert_eq!(*machine, config());
    }
    let voice = stage.sagas(Fault::Nothing).begin("operator/test", plan).await.unwrap();
    stage.ended().await;
    let id = voice.operation();
    let operation = stage.ledger.state().operations[id].clone();
    assert_eq!(operation.status, Status::Undone);
    assert!(operation.failure.clone().unwrap().message.contains("keeps running"), "{operation:?}");
    assert_eq!(stage.field.lock().unwrap().hosts["hostA"]["vm1"].state, VmState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_is_removed_takes_what_was_recorded_before_the_next_one_with_it() {
    let stage = Stage::new(Scene::RemoveCheckpoint).await;
    let keeps = "00112233445566aa";
    stage.run(checkpoint_plan(&stage.ledger.state(), "vm1", keeps)).await;
    let began = Event::RecordingBegan { vm: "vm1".into(), recording: "r1".into(), full: 1 };
    stage.ledger.append("operator/test", began).await.unwrap();
    stage.run(plan(Scene::RemoveCheckpoint, &stage.ledger.state())).await;
    let state = stage.ledger.state();
    assert!(!state.checkpoints.contains_key(CHECKPOINT));
    let kept = vec![state.checkpoints[keeps].digest.state.clone()];
    assert_eq!(stage.field.lock().unwrap().pruned, [("r1".to_owned(), kept)]);
}

#[tokio::test(start_paused = true)]
async fn a_restore_to_an_instant_goes_there_and_any_other_goes_nowhere() {
    for (scene, went) in [(Scene::RestoreAt, true), (Scene::RestoreElsewhere, false)] {
        let stage = Stage::new(scene).await;
        stage.run(plan(scene, &stage.ledger.state())).await;
        let until = went.then_some(proto::v1::Position { retired: 77, skipped_tsc: 5 });
        let held = stage.field.lock().unwrap().hosts["hostB"]["vm1"].clone();
        assert_eq!((held.state, held.replay), (VmState::Running, until));
    }
}

#[test]
fn a_restore_that_goes_through_much_of_a_journal_says_so() {
    let recording = "ab".repeat(16);
    let replay = |bytes| Replay {
        recording: recording.clone(),
        first: 3,
        last: 9,
        retired: 77,
        skipped_tsc: 5,
        span_ms: 60_000,
        bytes,
    };
    let first = "hostB will go through 7 blocks that were recorded in 60.0 s";
    assert_eq!(told_before(&replay(256 << 20), "hostB"), [first]);
    let long = told_before(&replay(300 << 20), "hostB");
    assert!(long.len() == 2 && long[0] == first && long[1].contains("300 MiB of journal"), "{long:?}");
    // As an earlier controller wrote it.
    let mut old = serde_json::to_value(replay(5)).unwrap();
    old.as_object_mut().unwrap().remove("bytes");
    assert_eq!(serde_json::from_value::<Replay>(old).unwrap(), replay(0));
}
