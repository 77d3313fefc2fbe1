//! Weeks of simulated time over the book, and the loop over a world that is not there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use proto::v1::{CheckpointPolicy, CheckpointsKept, VmInfo, VmState};
use tokio_util::sync::CancellationToken;

use super::book::{Action, Book};
use super::due::Now;
use super::facts::{Attempt, Facts, Newest, Stands};
use super::{Clock, Schedule};
use crate::agents::lease::HostState;
use crate::api::plans;
use crate::ledger::Ledger;
use crate::ledger::event::{Event, Intent, Task};
use crate::ledger::tests::{create_plan, simple_plan};
use crate::retention::policy::parse_window;
use crate::saga::fake::{FakeWorld, Fault, Field};
use crate::saga::gate::Limits;
use crate::saga::{Patience, Sagas};

const MINUTE: i64 = 60_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;
const BEGIN: i64 = 1_767_225_600_000;

fn every(every_ms: i64) -> CheckpointPolicy {
    CheckpointPolicy { every_ms: every_ms as u64, jitter_ms: every_ms as u64 / 10, ..CheckpointPolicy::default() }
}

/// VMs, a ledger and hosts, as far as the book sees them.
struct Sim {
    book: Book,
    now: Now,
    facts: BTreeMap<String, Facts>,
    /// When what is under way ends, and whether it fails.
    ends: BTreeMap<String, (i64, bool)>,
    takes_ms: i64,
    fails: bool,
    sequence: u64,
    /// When each checkpoint began.
    began: BTreeMap<String, Vec<Now>>,
    said: Vec<Action>,
    most: usize,
    most_on_host: usize,
}

impl Sim {
    fn new(vms: usize, policy: &CheckpointPolicy) -> Sim {
        let facts = (0..vms).map(|number| {
            let facts = Facts {
                vm: format!("vm{number:02}"),
                vm_id: format!("{number:032}"),
                host: format!("host{}", number % 4),
                policy: Arc::new(policy.clone()),
                set_unix_ms: BEGIN as u64,
                missed: false,
                failures: 0,
                failed_unix_ms: 0,
                attempt: Attempt::Settled,
                newest: None,
                stands: Stands::Runs,
            };
            (facts.vm.clone(), facts)
        });
        Sim {
            book: Book::default(),
            now: Now { mono_ms: 0, wall_ms: BEGIN },
            facts: facts.collect(),
            ends: BTreeMap::new(),
            takes_ms: 3000,
            fails: false,
            sequence: 0,
            began: BTreeMap::new(),
            said: Vec::new(),
            most: 0,
            most_on_host: 0,
        }
    }

    fn vm(&mut self, number: usize) -> &mut Facts {
        self.facts.get_mut(&format!("vm{number:02}")).unwrap()
    }

    fn busy(&self) -> BTreeMap<String, usize> {
        let mut busy = BTreeMap::new();
        self.ends.keys().for_each(|vm| *busy.entry(self.facts[vm].host.clone()).or_default() += 1);
        busy
    }

    fn run(&mut self, span: i64, step: i64) {
        let until = self.now.mono_ms + span;
        while self.now.mono_ms < until {
            self.now.mono_ms += step;
            self.now.wall_ms += step;
            self.end_some();
            let facts: Vec<Facts> = self.facts.values().cloned().collect();
            for action in self.book.look(&facts, &self.busy(), Limits::default(), self.now) {
                self.act(action);
            }
            self.most = self.most.max(self.ends.len());
            self.most_on_host = self.most_on_host.max(self.busy().into_values().max().unwrap_or(0));
        }
    }

    fn end_some(&mut self) {
        let ended: Vec<(String, bool)> =
            self.ends.iter().filter(|(_, (at, _))| *at <= self.now.mono_ms).map(|(vm, e)| (vm.clone(), e.1)).collect();
        for (vm, fails) in ended {
            self.ends.remove(&vm);
            self.sequence += 1;
            let (id, sequence, unix_ms) = (format!("c{}", self.sequence), self.sequence, self.now.wall_ms as u64);
            let facts = self.facts.get_mut(&vm).unwrap();
            if fails {
                facts.attempt = Attempt::Failed { operation: id, reason: "full".into() };
            } else {
                facts.attempt = Attempt::Settled;
                facts.newest = Some(Newest { id, unix_ms, sequence });
                facts.failures = 0;
            }
        }
    }

    fn act(&mut self, action: Action) {
        match &action {
            Action::Begin { vm } => {
                let facts = self.facts.get_mut(vm).unwrap();
                assert!(facts.attempt == Attempt::Settled && facts.stands == Stands::Runs, "{facts:?}");
                facts.attempt = Attempt::UnderWay;
                assert!(self.ends.insert(vm.clone(), (self.now.mono_ms + self.takes_ms, self.fails)).is_none());
                self.began.entry(vm.clone()).or_default().push(self.now);
            }
            Action::BackOff { vm, failures, .. } => {
                let wall_ms = self.now.wall_ms as u64;
                let facts = self.facts.get_mut(vm).unwrap();
                (facts.failures, facts.failed_unix_ms, facts.attempt) = (*failures, wall_ms, Attempt::Settled);
                self.said.push(action);
            }
            Action::Missed { vm, .. } => {
                self.facts.get_mut(vm).unwrap().missed = true;
                self.said.push(action);
            }
            Action::Recovered { vm, .. } => {
                self.facts.get_mut(vm).unwrap().missed = false;
                self.said.push(action);
            }
            Action::Prune { .. } => {}
        }
    }

    /// Spans between beginnings of one VM's checkpoints.
    fn spans(&self, vm: usize) -> Vec<i64> {
        self.began[&format!("vm{vm:02}")].windows(2).map(|pair| pair[1].mono_ms - pair[0].mono_ms).collect()
    }

    fn count(&self) -> usize {
        self.began.values().map(Vec::len).sum()
    }
}

#[test]
fn three_weeks_pass_and_no_interval_is_longer_than_promised() {
    let mut sim = Sim::new(8, &every(5 * MINUTE));
    sim.run(21 * DAY, 20_000);
    for vm in 0..8 {
        let spans = sim.spans(vm);
        assert!(spans.len() as i64 >= 21 * DAY / (5 * MINUTE + 20_000), "{}", spans.len());
        assert!(spans.iter().all(|span| (4 * MINUTE..=5 * MINUTE + 40_000).contains(span)), "{:?}", spans.iter().max());
    }
    assert_eq!(sim.said, []);
    assert!(sim.most <= 4 && sim.most_on_host <= 2);
}

#[test]
fn more_than_there_are_places_for_take_turns_and_nobody_starves() {
    // 40 checkpoints of half a minute each in five minutes need all four places.
    let mut sim = Sim::new(40, &every(5 * MINUTE));
    sim.takes_ms = 29_000;
    sim.run(3 * HOUR, 1000);
    assert_eq!((sim.most, sim.most_on_host), (4, 2));
    let counts: Vec<usize> = sim.began.values().map(Vec::len).collect();
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(counts.len() == 40 && most - least <= 3, "{counts:?}");
}

#[test]
fn an_outage_is_made_up_for_by_one_checkpoint_each() {
    let mut sim = Sim::new(4, &every(5 * MINUTE));
    sim.run(DAY, 1000);
    let before = sim.count();
    // The controller is gone for six hours and knows nothing but the ledger when it comes back, on another clock.
    sim.book = Book::default();
    sim.now.wall_ms += 6 * HOUR;
    sim.now.mono_ms = 17;
    sim.ends.clear();
    sim.facts.values_mut().for_each(|facts| facts.attempt = Attempt::Settled);
    sim.run(4 * MINUTE, 500);
    assert_eq!(sim.count() - before, 4, "one each");
    let missed = sim.said.iter().filter(|said| matches!(said, Action::Missed { .. })).count();
    let recovered = sim.said.iter().filter(|said| matches!(said, Action::Recovered { .. })).count();
    assert_eq!((missed, recovered), (4, 4), "{:?}", sim.said);
}

#[test]
fn a_controller_that_starts_again_goes_on_from_the_newest_checkpoint() {
    let mut sim = Sim::new(1, &every(5 * MINUTE));
    sim.run(HOUR, 1000);
    let last = *sim.began["vm00"].last().unwrap();
    sim.book = Book::default();
    sim.run(6 * MINUTE, 1000);
    let next = sim.began["vm00"].iter().find(|now| now.mono_ms > last.mono_ms).unwrap();
    assert!((4 * MINUTE..=5 * MINUTE + 10_000).contains(&(next.mono_ms - last.mono_ms)));
    assert_eq!(sim.said, []);
}

#[test]
fn a_wall_clock_that_jumps_by_a_day_changes_no_interval() {
    for by in [DAY, -DAY] {
        let mut sim = Sim::new(2, &every(5 * MINUTE));
        sim.run(HOUR, 1000);
        sim.now.wall_ms += by;
        sim.run(HOUR, 1000);
        assert!(
            sim.spans(0).iter().all(|span| (4 * MINUTE..=5 * MINUTE + 10_000).contains(span)),
            "{:?}",
            sim.spans(0)
        );
        assert_eq!(sim.said, [], "{by}");
    }
}

#[test]
fn a_failure_waits_longer_each_time_is_missed_once_and_recovers_once() {
    let mut sim = Sim::new(1, &every(5 * MINUTE));
    sim.run(HOUR, 1000);
    sim.fails = true;
    let before = sim.count();
    sim.run(2 * HOUR, 1000);
    let tried = sim.count() - before;
    assert!((10..=15).contains(&tried), "{tried} attempts in two hours");
    sim.fails = false;
    sim.run(HOUR, 1000);
    let waits: Vec<u64> = sim
        .said
        .iter()
        .filter_map(|said| if let Action::BackOff { wait_ms, .. } = said { Some(wait_ms / 1000) } else { None })
        .collect();
    assert_eq!(waits[..5], [75, 150, 300, 600, 600]);
    assert!(waits.len() == tried || waits.len() == tried + 1, "each failure is said once");
    let missed = sim.said.iter().filter(|said| matches!(said, Action::Missed { .. })).count();
    let recovered = sim.said.iter().filter(|said| matches!(said, Action::Recovered { .. })).count();
    assert_eq!((missed, recovered), (1, 1));
    assert!(sim.spans(0).iter().rev().take(5).all(|span| *span <= 5 * MINUTE + 10_000), "as before");
}

#[test]
fn a_guest_that_stands_still_needs_none_and_misses_none() {
    let mut sim = Sim::new(1, &every(5 * MINUTE));
    sim.run(HOUR, 1000);
    let before = sim.count();
    sim.vm(0).stands = Stands::Still("paused");
    sim.run(DAY, 1000);
    assert!(sim.count() <= before + 1 && sim.said.is_empty(), "{:?}", sim.said);
    assert_eq!(sim.book.standing("vm00").unwrap().word, "paused");
    let before = sim.count();
    sim.vm(0).stands = Stands::Runs;
    sim.run(MINUTE, 1000);
    assert_eq!((sim.count() - before, sim.said.len()), (1, 0), "at once, and no miss");
}

#[test]
fn a_migration_is_waited_for_and_a_long_one_is_a_miss() {
    let mut sim = Sim::new(1, &every(5 * MINUTE));
    sim.run(HOUR, 1000);
    let newest = sim.vm(0).newest.clone();
    while sim.vm(0).newest == newest {
        sim.run(1000, 1000);
    }
    let before = sim.count();
    sim.vm(0).stands = Stands::Blocked("migrate is under way".into());
    sim.run(6 * MINUTE, 1000);
    assert!(sim.count() == before && sim.said.is_empty(), "{:?}", sim.said);
    assert_eq!(sim.book.standing("vm00").unwrap().word, "migrate is under way");
    sim.run(8 * MINUTE, 1000);
    assert!(matches!(sim.said[..], [Action::Missed { .. }]), "{:?}", sim.said);
    sim.vm(0).stands = Stands::Runs;
    sim.run(10_000, 1000);
    assert!(matches!(sim.said[..], [Action::Missed { .. }, Action::Recovered { .. }]), "{:?}", sim.said);
}

#[test]
fn checkpoints_begin_in_their_windows_only_and_the_day_is_no_miss() {
    let windows = vec![parse_window("22:00-06:00").unwrap()];
    let mut sim = Sim::new(2, &CheckpointPolicy { windows, ..every(10 * MINUTE) });
    sim.run(5 * DAY, 10_000);
    let hours = sim.began.values().flatten().map(|now| now.wall_ms.rem_euclid(DAY) / HOUR);
    assert!(hours.clone().all(|hour| !(6..22).contains(&hour)));
    assert!(hours.count() >= 2 * 5 * 7 * 6);
    assert_eq!(sim.said, []);
}

/// A clock that stands where it is put.
#[derive(Clone, Default)]
struct Hand(Arc<AtomicI64>);

impl Clock for Hand {
    fn now(&self) -> Now {
        let mono_ms = self.0.load(Ordering::SeqCst);
        Now { mono_ms, wall_ms: BEGIN + mono_ms }
    }
}

struct Stage {
    ledger: Ledger,
    schedule: Schedule<FakeWorld>,
    sagas: Sagas<FakeWorld>,
    field: Arc<Mutex<Field>>,
    clock: Hand,
}

impl Stage {
    async fn new(fault: Fault, keep: CheckpointsKept) -> Stage {
        let mut field = Field::default();
        field.hosts = ["hostA", "hostB"].map(|host| (host.to_owned(), BTreeMap::new())).into();
        let (ledger, field) = (Ledger::in_memory().unwrap(), Arc::new(Mutex::new(field)));
        let patience = Patience { undo: 1, forward: 1, pause: std::time::Duration::from_millis(1) };
        let sagas = |fault| {
            let world = FakeWorld::new(field.clone(), fault);
            Sagas::new(ledger.clone(), world, patience, "controller/test".into(), Arc::new(|_| None))
        };
        sagas(Fault::Nothing).begin("operator/test", create_plan("vm1", "hostA")).await.unwrap();
        ended(&ledger).await;
        let observe: super::Observe = Arc::new(|vm| {
            let info = VmInfo { generation: vm.generation, state: VmState::Running.into(), ..VmInfo::default() };
            (HostState::Up, Some(info))
        });
        let (clock, sagas) = (Hand::default(), sagas(fault));
        let schedule =
            Schedule::new(ledger.clone(), sagas.clone(), observe, clock.clone(), "controller/test".to_owned());
        let policy = CheckpointPolicy { every_ms: 10_000, keep: Some(keep), ..CheckpointPolicy::default() };
        ledger.append("operator/test", Event::PolicySet { vm: "vm1".into(), policy }).await.unwrap();
        Stage { ledger, schedule, sagas, field, clock }
    }

    /// The clock goes on, the schedule looks three times, and everything that it began ends.
    async fn goes_on(&self, by_ms: i64) {
        self.clock.0.fetch_add(by_ms, Ordering::SeqCst);
        for _ in 0..3 {
            self.schedule.turn(&CancellationToken::new()).await;
            ended(&self.ledger).await;
        }
        // The pruning that was begun beside is over when another gets through.
        self.schedule.prune("controller/test", "vm1").await.unwrap();
        ended(&self.ledger).await;
    }

    fn ids(&self) -> Vec<String> {
        let state = self.ledger.state();
        state.checkpoints_of(&state.vms["vm1"].id).into_iter().map(|entry| entry.id.clone()).collect()
    }
}

async fn ended(ledger: &Ledger) {
    ledger.watch().wait_for(|state| state.active().next().is_none()).await.unwrap();
}

const LAST_2: CheckpointsKept = CheckpointsKept { last: 2, hourly: 0, daily: 0, weekly: 0, monthly: 0 };

#[tokio::test]
async fn checkpoints_come_and_go_and_those_made_by_hand_stay() {
    let stage = Stage::new(Fault::Nothing, LAST_2).await;
    stage.goes_on(0).await;
    let by_hand = plans::checkpoint(&stage.ledger.state(), "vm1", false).unwrap();
    stage.sagas.begin("operator/test", by_hand).await.unwrap();
    ended(&stage.ledger).await;
    let pinned = stage.ids().pop().unwrap();
    stage.goes_on(0).await;
    for _ in 0..5 {
        let before = stage.ids().pop().unwrap();
        stage.goes_on(10_000).await;
        assert_ne!(stage.ids().pop().unwrap(), before, "a new one after each interval");
    }
    let ids = stage.ids();
    assert!(ids.len() == 3 && ids[0] == pinned, "{ids:?}");
    let state = stage.ledger.state();
    assert_eq!(ids.iter().map(|id| state.checkpoints[id].by_policy).collect::<Vec<_>>(), [false, true, true]);
    let manifests = stage.field.lock().unwrap().bucket.iter().filter(|key| key.ends_with(".manifest")).count();
    assert_eq!(manifests, 3, "the bucket holds what the ledger says");
    stage.goes_on(3000).await;
    assert_eq!(stage.ids(), ids, "nothing is due and nothing is removed");
}

#[tokio::test]
async fn a_failure_is_counted_in_the_ledger_once_and_the_next_attempt_waits() {
    // Call 0 is the first checkpoint.
    let stage = Stage::new(Fault::Before(0), LAST_2).await;
    stage.goes_on(0).await;
    let scheduled = stage.ledger.state().policies["vm1"].clone();
    assert_eq!((scheduled.failures, scheduled.counted.is_empty()), (1, false));
    assert!(scheduled.failure.contains("no answer"), "{}", scheduled.failure);
    stage.goes_on(9000).await;
    assert_eq!((stage.ledger.state().policies["vm1"].failures, stage.ids().len()), (1, 0));
    stage.goes_on(1000).await;
    assert_eq!((stage.ledger.state().policies["vm1"].failures, stage.ids().len()), (0, 1));
}

#[tokio::test]
async fn what_the_schedule_began_makes_way_for_an_operator() {
    let stage = Stage::new(Fault::Hangs(0), LAST_2).await;
    stage.schedule.turn(&CancellationToken::new()).await;
    stage.sagas.world().struck.notified().await;
    let pause = simple_plan(&stage.ledger.state(), "vm1", Task::Pause { was: Intent::Running });
    assert!(stage.sagas.begin("operator/test", pause.clone()).await.is_err(), "the checkpoint holds the VM");
    stage.schedule.make_way(&pause.locks).await;
    stage.sagas.begin("operator/test", pause).await.unwrap();
    ended(&stage.ledger).await;
    assert_eq!(stage.ledger.state().vms["vm1"].intent, Intent::Paused);
}

#[tokio::test]
async fn a_checkpoint_by_hand_waits_in_line_and_says_why() {
    use proto::v1::operation_event::Event as Said;
    use tokio_stream::StreamExt;

    let stage = Stage::new(Fault::Nothing, LAST_2).await;
    let mut places = Vec::new();
    for host in ["hostB", "hostB", "hostC", "hostD"] {
        places.push(stage.sagas.gate().enter(host, |why| panic!("{why}")).await);
    }
    let by_hand = plans::checkpoint(&stage.ledger.state(), "vm1", false).unwrap();
    let voice = stage.sagas.begin("operator/test", by_hand).await.unwrap();
    let mut said = voice.listen();
    loop {
        match said.next().await.unwrap().unwrap().event {
            Some(Said::Note(note)) => break assert_eq!(note, "waits: 4 checkpoints are under way"),
            Some(Said::Step(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(stage.ids().is_empty());
    drop(places);
    ended(&stage.ledger).await;
    assert_eq!(stage.ids().len(), 1);
}
