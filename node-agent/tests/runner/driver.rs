//! The machine thread against a scripted guest, with time as an argument.

use crate::scripted::{Act, Hand, Kept, Kernel, Scripted, Shared, TravellingKernel, terms};
use node_agent::runner::driver::{BootImages, Driver, Input, Output, Wait};
use node_agent::runner::guest::Outcome;
use proptest::prelude::*;
use proto::status::Code;
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{
    RunnerApply, RunnerAttach, RunnerBoot, RunnerCapture, RunnerConsoleInput, RunnerFreeze, RunnerFrozen, RunnerLease,
    RunnerPause, RunnerRequest, RunnerResume, RunnerState, RunnerStatus, RunnerStayFrozen, RunnerThaw, RunnerThrottle,
    Section, VmState,
};

pub const MS: u64 = 1_000_000;

pub struct Bench {
    pub driver: Driver<Scripted, Hand, Kept>,
    pub clock: Hand,
    kept: Kept,
    pub seen: Shared,
}

fn bench_with(images: Box<dyn BootImages>, script: impl IntoIterator<Item = Act>) -> Bench {
    let (guest, seen) = Scripted::new(script);
    let (clock, kept) = (Hand::at(1_000_000 * MS), Kept::default());
    let driver = Driver::new(guest, clock.clone(), kept.clone(), terms(false, &[]), Some(images));
    Bench { driver, clock, kept, seen }
}

pub fn bench(paced: bool, script: impl IntoIterator<Item = Act>) -> Bench {
    let (guest, seen) = Scripted::new(script);
    let (clock, kept) = (Hand::at(1_000_000 * MS), Kept::default());
    let images = Box::new(Kernel(b"kernel"));
    let driver = Driver::new(guest, clock.clone(), kept.clone(), terms(paced, &[]), Some(images));
    Bench { driver, clock, kept, seen }
}

impl Bench {
    pub fn ask(&mut self, request: Request) -> Reply {
        let input = Input::Request { connection: 1, request: RunnerRequest { id: 9, request: Some(request) } };
        let _flow = self.driver.take(input).unwrap();
        match self.kept.0.lock().unwrap().pop() {
            Some(Output::Reply { connection: 1, reply }) if reply.id == 9 => reply.reply.unwrap(),
            other => panic!("no reply but {other:?}"),
        }
    }

    pub fn lease(&mut self, ms: u64) {
        use node_agent::clock::Clock;
        let until_boottime_ns = self.clock.boottime_ns() + ms * MS;
        self.ask(Request::Lease(RunnerLease { until_boottime_ns }));
    }

    pub fn booted(&mut self) {
        self.ask(Request::Lease(RunnerLease { until_boottime_ns: 0 }));
        assert!(
            matches!(self.ask(Request::Boot(RunnerBoot {})), Reply::State(state) if state.state() == VmState::Running)
        );
    }

    pub fn runs(&self) -> u64 {
        self.seen.lock().unwrap().runs
    }

    pub fn changes(&self) -> Vec<RunnerState> {
        let kept = self.kept.0.lock().unwrap();
        kept.iter()
            .filter_map(|o| if let Output::Changed(state) = o { Some((**state).clone()) } else { None })
            .collect()
    }
}

#[test]
fn nothing_runs_without_a_lease_and_a_lost_lease_stops_the_guest_until_it_is_renewed() {
    let mut bench = bench(false, []);
    assert!(matches!(bench.ask(Request::Boot(RunnerBoot {})), Reply::State(state) if state.reason == "no lease yet"));
    assert_eq!(bench.driver.step().unwrap(), Wait::Input);
    assert_eq!(bench.runs(), 0);

    bench.lease(100);
    assert_eq!(bench.driver.step().unwrap(), Wait::No);
    bench.clock.advance(100 * MS);
    assert_eq!(bench.driver.step().unwrap(), Wait::No);
    assert_eq!(bench.runs(), 2);

    bench.clock.advance(1);
    assert_eq!(bench.driver.step().unwrap(), Wait::Input);
    assert_eq!(bench.runs(), 2, "no instruction after the lease");
    let changes = bench.changes();
    let last = changes.last().unwrap();
    assert_eq!(last.state(), VmState::Paused);
    assert!(last.reason.starts_with("lease ended"), "{}", last.reason);

    bench.lease(100);
    bench.driver.step().unwrap();
    assert_eq!(bench.runs(), 3);
    assert_eq!(bench.driver.state().state(), VmState::Running);
}

/// A bench whose guest is always busy, two milliseconds a slice.
fn busy_bench() -> Bench {
    let (clock, kept) = (Hand::at(1_000_000 * MS), Kept::default());
    let (guest, seen) = Scripted::new(vec![Act::Takes(clock.clone(), 2 * MS); 5000]);
    let images = Box::new(Kernel(b"kernel"));
    let driver = Driver::new(guest, clock.clone(), kept.clone(), terms(false, &[]), Some(images));
    Bench { driver, clock, kept, seen }
}

/// Lets the host's time pass for so long; returns how many slices the guest ran.
fn slices_in(bench: &mut Bench, ms: u64) -> u64 {
    use node_agent::clock::Clock;
    let (before, end) = (bench.runs(), bench.clock.boottime_ns() + ms * MS);
    while bench.clock.boottime_ns() < end {
        match bench.driver.step().unwrap() {
            Wait::No => {}
            Wait::Until(instant) => bench.clock.advance(instant - bench.clock.boottime_ns()),
            Wait::Input => panic!("a busy guest waits for nobody"),
        }
    }
    bench.runs() - before
}

#[test]
fn a_guest_that_is_held_back_runs_so_much_less_and_free_again_when_it_is_lifted_or_forgotten() {
    let mut bench = busy_bench();
    bench.booted();
    let throttle = |percent, valid_ms| Request::Throttle(RunnerThrottle { percent, valid_ms });
    assert_eq!(slices_in(&mut bench, 400), 200);
    for (percent, expected) in [(20, 160), (50, 100), (90, 20), (99, 2), (500, 2)] {
        bench.ask(throttle(percent, 5000));
        slices_in(&mut bench, 200);
        let ran = slices_in(&mut bench, 400);
        assert!(ran.abs_diff(expected) <= 2, "{percent} %: {ran} slices");
    }
    let Reply::State(state) = bench.ask(throttle(0, 0)) else { panic!() };
    assert_eq!(state.state(), VmState::Running, "to be held back is not to be paused");
    assert_eq!(slices_in(&mut bench, 400), 200);

    bench.ask(throttle(99, 300));
    slices_in(&mut bench, 300);
    assert!(slices_in(&mut bench, 400) >= 199, "nobody has repeated it");
    bench.ask(throttle(99, 60_000));
    bench.ask(Request::Attach(RunnerAttach {}));
    assert_eq!(slices_in(&mut bench, 400), 200, "a new connection lifts it");
}

#[test]
fn a_guest_that_is_held_back_hears_and_loses_its_lease_as_any_other() {
    let mut bench = busy_bench();
    bench.booted();
    bench.lease(50);
    bench.ask(Request::Throttle(RunnerThrottle { percent: 99, valid_ms: 60_000 }));
    bench.driver.step().unwrap();
    let Wait::Until(instant) = bench.driver.step().unwrap() else { panic!("it rests") };
    assert_eq!(instant, 1_000_050 * MS + 1);
    bench.ask(Request::Console(RunnerConsoleInput { data: b"x".to_vec() }));
    bench.driver.step().unwrap();
    assert_eq!(bench.seen.lock().unwrap().typed, b"x");
    assert!(
        matches!(bench.ask(Request::Pause(RunnerPause::default())), Reply::State(state) if state.state() == VmState::Paused)
    );
}

fn freeze(bench: &mut Bench, valid_ms: u32) -> RunnerFrozen {
    match bench.ask(Request::Freeze(RunnerFreeze { mark: 3, valid_ms })) {
        Reply::Frozen(frozen) => frozen,
        other => panic!("{other:?}"),
    }
}

fn code(reply: Reply) -> Code {
    match reply {
        Reply::Failure(failure) => Code::from_number(failure.code),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_instant_is_frozen_while_the_guest_goes_on_and_thawed_once() {
    let mut bench = busy_bench();
    bench.booted();
    slices_in(&mut bench, 10);
    let frozen = freeze(&mut bench, 5000);
    assert_eq!((frozen.epoch, frozen.sections.len()), (2, 1));
    assert!(slices_in(&mut bench, 100) > 10, "the guest runs");
    assert!(matches!(bench.ask(Request::StayFrozen(RunnerStayFrozen { valid_ms: 5000 })), Reply::State(_)));
    assert!(matches!(bench.ask(Request::Thaw(RunnerThaw {})), Reply::State(_)));
    assert_eq!(code(bench.ask(Request::Thaw(RunnerThaw {}))), Code::Exhausted);
    assert_eq!(code(bench.ask(Request::StayFrozen(RunnerStayFrozen { valid_ms: 5000 }))), Code::Exhausted);
}

#[test]
fn an_instant_that_nobody_asks_for_any_more_is_forgotten() {
    let mut bench = busy_bench();
    bench.booted();
    freeze(&mut bench, 300);
    slices_in(&mut bench, 200);
    assert!(bench.seen.lock().unwrap().frozen.is_some());
    slices_in(&mut bench, 200);
    assert!(bench.seen.lock().unwrap().frozen.is_none());
    assert_eq!(code(bench.ask(Request::Thaw(RunnerThaw {}))), Code::Exhausted);
    freeze(&mut bench, 60_000);
    bench.ask(Request::Attach(RunnerAttach {}));
    assert!(bench.seen.lock().unwrap().frozen.is_none(), "a new agent does not read it");
}

#[test]
fn a_guest_that_overwrites_too_fast_waits_for_room_and_not_for_ever() {
    let mut bench = busy_bench();
    bench.booted();
    freeze(&mut bench, 60_000);
    bench.seen.lock().unwrap().frozen = Some(65 << 20);
    assert_eq!(slices_in(&mut bench, 1000), 0, "there is no room");
    bench.seen.lock().unwrap().frozen = Some(1 << 20);
    assert!(slices_in(&mut bench, 100) > 10);
    bench.seen.lock().unwrap().frozen = Some(65 << 20);
    assert_eq!(slices_in(&mut bench, 4900), 0);
    assert!(slices_in(&mut bench, 1000) > 100, "it does not wait for ever");
    assert_eq!(code(bench.ask(Request::Thaw(RunnerThaw {}))), Code::Exhausted);
}

#[test]
fn an_instant_of_a_paused_guest_may_be_frozen_and_of_an_ended_one_not() {
    let mut paused = busy_bench();
    paused.booted();
    paused.ask(Request::Pause(RunnerPause::default()));
    let before = paused.runs();
    freeze(&mut paused, 5000);
    assert_eq!(paused.driver.step().unwrap(), Wait::Input);
    assert!(matches!(paused.ask(Request::Thaw(RunnerThaw {})), Reply::State(_)));
    assert_eq!(paused.runs(), before);
    let mut ended = bench(false, [Act::End(Outcome::PowerOff)]);
    ended.booted();
    ended.driver.step().unwrap();
    assert_eq!(code(ended.ask(Request::Freeze(RunnerFreeze::default()))), Code::Conflict);
}

#[test]
fn an_idle_guest_wakes_for_the_end_of_its_lease() {
    let mut bench = bench(true, [Act::IdleUntil(Some(5_000 * MS)), Act::IdleUntil(None)]);
    bench.booted();
    bench.lease(100);
    let end = 1_000_100 * MS + 1;
    assert_eq!(bench.driver.step().unwrap(), Wait::Until(end));
    bench.clock.advance(100 * MS + 1);
    assert_eq!(bench.driver.step().unwrap(), Wait::Input);
    assert!(bench.driver.state().reason.starts_with("lease ended"));
}

#[test]
fn a_paused_guest_does_not_change() {
    let mut bench = bench(false, []);
    bench.booted();
    bench.driver.step().unwrap();
    assert!(matches!(bench.ask(Request::Capture(RunnerCapture {})), Reply::Failure(f) if f.message.contains("runs")));
    let pause = || Request::Pause(RunnerPause { reason: "coffee".into() });
    let Reply::State(state) = bench.ask(pause()) else { panic!() };
    assert_eq!((state.state(), state.reason.as_str()), (VmState::Paused, "coffee"));
    assert_eq!(state.stopped_boottime_ns, 1_000_000 * MS);
    bench.clock.advance(MS);
    let Reply::State(again) = bench.ask(pause()) else { panic!() };
    assert_eq!(again, state, "a pause may be repeated");

    let _flow = bench.driver.take(Input::Packet { card: 0, bytes: vec![1] }).unwrap();
    bench.ask(Request::Console(RunnerConsoleInput { data: b"ls\n".to_vec() }));
    assert_eq!(bench.driver.step().unwrap(), Wait::Input);
    assert!(bench.seen.lock().unwrap().packets.is_empty() && bench.seen.lock().unwrap().typed.is_empty());
    let (Reply::Sections(first), Reply::Sections(second)) =
        (bench.ask(Request::Capture(RunnerCapture {})), bench.ask(Request::Capture(RunnerCapture {})))
    else {
        panic!()
    };
    assert_eq!(first, second);
    let Reply::Failure(refusal) = bench.ask(Request::Console(RunnerConsoleInput { data: b"late".to_vec() })) else {
        panic!("what is typed after the capture would not travel")
    };
    assert!(refusal.message.contains("captured"), "{}", refusal.message);
    assert_eq!(first.state_digest, blake3::hash(&first.sections[0].body).as_bytes());

    bench.ask(Request::Resume(RunnerResume {}));
    bench.driver.step().unwrap();
    let seen = bench.seen.lock().unwrap();
    assert_eq!((seen.packets.len(), seen.typed.as_slice()), (1, &b"ls\n"[..]));
}

#[test]
fn a_guest_whose_kernel_travels_starts_again_and_one_that_only_resets_is_ended() {
    let ends = |outcome: &Outcome| [Act::Busy, Act::End(outcome.clone())];
    for outcome in [Outcome::Reset, Outcome::TripleFault] {
        let long = Act::IdleUntil(Some(1 << 40));
        let script = ends(&outcome).into_iter().chain([long]).chain(ends(&outcome)).chain([Act::Say(b"again")]);
        let mut bench = bench_with(Box::new(TravellingKernel(b"kernel")), script);
        bench.booted();
        (0..7).for_each(|_| {
            bench.driver.step().unwrap();
        });
        let resets = bench.seen.lock().unwrap().resets;
        assert_eq!((resets, bench.changes().len()), (2, 0), "{outcome:?}");
        assert_eq!(bench.driver.state().state(), VmState::Running);
    }
    let mut bench =
        bench_with(Box::new(TravellingKernel(b"kernel")), std::iter::repeat_n(Act::End(Outcome::TripleFault), 9));
    bench.booted();
    (0..9).for_each(|_| {
        bench.driver.step().unwrap();
    });
    let resets = bench.seen.lock().unwrap().resets;
    assert_eq!((resets, bench.runs()), (4, 5));
    let state = bench.driver.state();
    assert_eq!(state.state(), VmState::Crashed);
    assert!(state.reason.contains("5 times") && state.reason.ends_with("triple fault"), "{}", state.reason);
}

#[test]
fn idle_time_follows_the_host_and_an_input_ends_it_early() {
    let mut bench = bench(true, [Act::IdleUntil(Some(50 * MS)), Act::Busy, Act::IdleUntil(Some(80 * MS))]);
    bench.booted();
    assert_eq!(bench.driver.step().unwrap(), Wait::Until(1_000_050 * MS + 1));
    bench.clock.advance(20 * MS);
    let _flow = bench.driver.take(Input::Packet { card: 0, bytes: vec![1] }).unwrap();
    assert_eq!(bench.seen.lock().unwrap().tsc, 20 * MS, "the packet comes at the host's time");
    bench.driver.step().unwrap();
    // A stall of the host: the timer is long due, the guest catches up at once, to the timer and no further.
    bench.clock.advance(500 * MS);
    assert_eq!(bench.driver.step().unwrap(), Wait::No);
    assert_eq!(bench.seen.lock().unwrap().tsc, 80 * MS);
}

#[test]
fn unpaced_idle_time_is_skipped() {
    let mut bench = bench(false, [Act::IdleUntil(Some(1 << 50)), Act::IdleUntil(None)]);
    bench.booted();
    assert_eq!(bench.driver.step().unwrap(), Wait::No);
    assert_eq!(bench.seen.lock().unwrap().tsc, 1 << 50);
    assert_eq!(bench.driver.step().unwrap(), Wait::Input);
}

#[test]
fn the_end_of_a_guest_is_told_once_with_its_reason() {
    for (outcome, state, reason) in [
        (Outcome::PowerOff, VmState::Stopped, "switched itself off"),
        (Outcome::TripleFault, VmState::Crashed, "triple fault"),
        (Outcome::Failed("opcode 0f ff".into()), VmState::Crashed, "opcode 0f ff"),
    ] {
        let mut bench = bench(false, [Act::Say(b"bye"), Act::End(outcome)]);
        bench.booted();
        for _ in 0..4 {
            bench.driver.step().unwrap();
        }
        assert_eq!(bench.runs(), 2);
        let changes = bench.changes();
        assert_eq!(changes.len(), 1);
        assert_eq!(changes[0].state(), state);
        assert!(changes[0].reason.contains(reason), "{}", changes[0].reason);
        assert!(matches!(&bench.kept.0.lock().unwrap()[0], Output::Console(said) if said == b"bye"));
        assert!(matches!(bench.ask(Request::Boot(RunnerBoot {})), Reply::Failure(_)));
    }
}

#[test]
fn state_is_loaded_once_and_waits_for_a_resume() {
    let mut bench = bench(false, []);
    bench.lease(100);
    assert!(matches!(bench.ask(Request::Apply(RunnerApply { sections: vec![] })), Reply::Failure(_)));
    let sections = vec![Section { name: "clock".into(), ..Section::default() }];
    let apply = Request::Apply(RunnerApply { sections });
    assert!(matches!(bench.ask(apply.clone()), Reply::State(state) if state.state() == VmState::Paused));
    assert!(matches!(bench.ask(apply), Reply::Failure(failure) if failure.message.contains("already")));
    bench.driver.step().unwrap();
    assert_eq!(bench.runs(), 0);
    bench.ask(Request::Resume(RunnerResume {}));
    bench.driver.step().unwrap();
    assert_eq!(bench.runs(), 1);
}

#[test]
fn the_first_instruction_after_a_restore_is_run_by_itself_and_its_time_is_told() {
    let mut bench = bench(false, [Act::IdleUntil(Some(5)), Act::Busy, Act::Busy]);
    let sections = vec![Section { name: "clock".into(), ..Section::default() }];
    bench.ask(Request::Apply(RunnerApply { sections }));
    bench.ask(Request::Lease(RunnerLease { until_boottime_ns: 0 }));
    bench.ask(Request::Resume(RunnerResume {}));
    let first = |bench: &mut Bench| match bench.ask(Request::Status(RunnerStatus {})) {
        Reply::State(state) => state.first_instruction_boottime_ns,
        other => panic!("{other:?}"),
    };
    bench.driver.step().unwrap();
    assert_eq!(first(&mut bench), 0, "a guest that halts has run none");
    bench.clock.advance(7 * MS);
    bench.driver.step().unwrap();
    assert_eq!((first(&mut bench), bench.seen.lock().unwrap().retired), (1_000_007 * MS, 1));
    bench.clock.advance(MS);
    bench.driver.step().unwrap();
    assert_eq!(first(&mut bench), 1_000_007 * MS);
    assert!(bench.seen.lock().unwrap().retired > 1000, "from then on slices are whole");
}

#[derive(Clone, Debug)]
enum Deed {
    Step,
    Wait(u64),
    Lease(u64),
    Pause,
    Resume,
    Packet,
    Status,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        4 => Just(Deed::Step),
        1 => (1..200u64).prop_map(Deed::Wait),
        1 => (0..300u64).prop_map(Deed::Lease),
        1 => Just(Deed::Pause),
        1 => Just(Deed::Resume),
        1 => Just(Deed::Packet),
        1 => Just(Deed::Status),
    ]
}

proptest! {
    /// Whatever happens: no instruction while paused or without a lease, and what is reported is what is.
    #[test]
    fn the_guest_runs_exactly_when_it_may(deeds in proptest::collection::vec(deed(), 1..60)) {
        use node_agent::clock::Clock;
        let idle = [Act::Busy, Act::IdleUntil(Some(30 * MS)), Act::IdleUntil(None)];
        let mut bench = bench(true, idle.iter().cycle().take(30).cloned());
        bench.ask(Request::Boot(RunnerBoot {}));
        let (mut paused, mut until) = (false, None::<u64>);
        for deed in deeds {
            let before = bench.runs();
            let may_run = !paused && until.is_some_and(|until| until == 0 || bench.clock.boottime_ns() <= until);
            match deed {
                Deed::Step => {
                    bench.driver.step().unwrap();
                    prop_assert!(may_run || bench.runs() == before);
                }
                Deed::Wait(ms) => bench.clock.advance(ms * MS),
                Deed::Lease(0) => {
                    bench.ask(Request::Lease(RunnerLease { until_boottime_ns: 0 }));
                    until = Some(0);
                }
                Deed::Lease(ms) => {
                    bench.lease(ms);
                    until = Some(bench.clock.boottime_ns() + ms * MS);
                }
                Deed::Pause => {
                    bench.ask(Request::Pause(RunnerPause::default()));
                    paused = true;
                }
                Deed::Resume => {
                    bench.ask(Request::Resume(RunnerResume {}));
                    paused = false;
                }
                Deed::Packet => drop(bench.driver.take(Input::Packet { card: 0, bytes: vec![0] }).unwrap()),
                Deed::Status => {
                    let Reply::State(state) = bench.ask(Request::Status(RunnerStatus {})) else { panic!() };
                    prop_assert_eq!(state.state() == VmState::Running, may_run);
                }
            }
        }
    }
}
