//! A debugger in the machine thread, against a scripted guest.

use node_agent::runner::driver::{UNDER_DEBUGGER, Wait};
use node_agent::runner::guest::Outcome;
use proto::status::Code;
use proto::v1::runner_debug::Ask;
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{
    RunnerAttach, RunnerCpu, RunnerDebug, RunnerDebugAttach, RunnerDebugDetach, RunnerDebugGoOn, RunnerDebugHalt,
    RunnerDebugStep, RunnerFailure, RunnerHalt, RunnerMemory, RunnerPause, RunnerResume, RunnerState, RunnerStops,
    RunnerWatched, VmState,
};
use vmcb_engine::engine::{Stops, Why};

use crate::driver::{Bench, MS, bench};
use crate::scripted::Act;

impl Bench {
    fn debug(&mut self, ask: Ask) -> Result<RunnerState, RunnerFailure> {
        match self.ask(Request::Debug(RunnerDebug { ask: Some(ask) })) {
            Reply::State(state) => Ok(state),
            Reply::Failure(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    fn refused(&mut self, ask: Ask) -> Code {
        Code::from_number(self.debug(ask).unwrap_err().code)
    }

    fn pause(&mut self) {
        self.ask(Request::Pause(RunnerPause { reason: "lunch".into() }));
    }

    fn standing(&self) -> (VmState, String) {
        let state = self.driver.state();
        (state.state(), state.reason)
    }
}

const ATTACH: Ask = Ask::Attach(RunnerDebugAttach {});
const DETACH: Ask = Ask::Detach(RunnerDebugDetach {});
const GO_ON: Ask = Ask::GoOn(RunnerDebugGoOn {});
const STEP: Ask = Ask::Step(RunnerDebugStep { vcpu: 0 });
const HALT: Ask = Ask::Halt(RunnerDebugHalt {});

fn stops() -> RunnerStops {
    let watched = RunnerWatched { address: 0x2000, bytes: 4, reads: false, writes: true };
    RunnerStops { breakpoints: vec![0x1000], watched: vec![watched] }
}

#[test]
fn a_debugger_halts_steps_and_leaves_nothing_behind() {
    let mut bench = bench(false, []);
    bench.booted();
    assert_eq!(bench.refused(HALT), Code::Conflict);
    let halted = bench.debug(ATTACH).unwrap();
    assert_eq!((halted.state(), halted.reason.as_str()), (VmState::Paused, UNDER_DEBUGGER));
    assert!(halted.debugged.unwrap().halted);
    assert_eq!(bench.driver.step().unwrap(), Wait::Input);
    assert_eq!(bench.runs(), 0);
    assert_eq!(bench.refused(ATTACH), Code::Conflict);

    let retired = bench.driver.state().retired_instructions;
    let moving = bench.debug(STEP).unwrap();
    assert!(!moving.debugged.unwrap().halted);
    bench.driver.step().unwrap();
    bench.driver.step().unwrap();
    let told = bench.changes().last().unwrap().clone();
    let debugged = told.debugged.unwrap();
    assert_eq!((debugged.motions, debugged.halt(), debugged.halted), (1, RunnerHalt::Stepped, true));
    assert_eq!(told.retired_instructions, retired + 1, "one instruction");

    bench.debug(Ask::SetStops(stops())).unwrap();
    assert_eq!(bench.seen.lock().unwrap().stops.breakpoints, [0x1000]);
    bench.debug(GO_ON).unwrap();
    assert_eq!(bench.refused(GO_ON), Code::Conflict);
    assert_eq!(bench.refused(Ask::WriteMemory(RunnerMemory::default())), Code::Conflict, "it runs");
    bench.driver.step().unwrap();
    assert_eq!(bench.standing().0, VmState::Running);
    let debugged = bench.debug(HALT).unwrap().debugged.unwrap();
    assert_eq!((debugged.motions, debugged.halt()), (2, RunnerHalt::Asked));
    bench.debug(DETACH).unwrap();
    assert_eq!(bench.seen.lock().unwrap().stops, Stops::default());
    assert_eq!(bench.standing().0, VmState::Running);
    let runs = bench.runs();
    bench.driver.step().unwrap();
    assert!(bench.runs() > runs);
}

#[test]
fn a_stop_is_told_as_it_happens_and_an_end_too() {
    let why = Why::Breakpoint { address: 0x1000 };
    let script = [Act::End(Outcome::Stop { vcpu: 0, why }), Act::End(Outcome::PowerOff)];
    let mut bench = bench(false, script);
    bench.booted();
    bench.debug(ATTACH).unwrap();
    bench.debug(GO_ON).unwrap();
    bench.driver.step().unwrap();
    bench.driver.step().unwrap();
    assert_eq!(bench.changes().last().unwrap().debugged.unwrap().halt(), RunnerHalt::Breakpoint);
    bench.debug(GO_ON).unwrap();
    bench.driver.step().unwrap();
    let last = bench.changes().last().unwrap().clone();
    assert_eq!((last.state(), last.debugged.unwrap().halt()), (VmState::Stopped, RunnerHalt::Ended));
    assert_eq!(bench.refused(GO_ON), Code::Conflict);
    assert_eq!(bench.refused(Ask::WriteMemory(RunnerMemory::default())), Code::Conflict);
}

#[test]
fn a_lost_lease_and_a_later_pause_stop_what_a_debugger_lets_run() {
    let mut bench = bench(false, []);
    bench.booted();
    bench.lease(100);
    bench.debug(ATTACH).unwrap();
    bench.debug(GO_ON).unwrap();
    bench.driver.step().unwrap();
    assert_eq!(bench.runs(), 1);
    bench.clock.advance(101 * MS);
    bench.driver.step().unwrap();
    assert_eq!((bench.runs(), bench.standing().0), (1, VmState::Paused));
    bench.lease(100);
    bench.pause();
    bench.driver.step().unwrap();
    assert_eq!((bench.runs(), bench.standing()), (1, (VmState::Paused, "lunch".into())));
    bench.ask(Request::Resume(RunnerResume {}));
    bench.driver.step().unwrap();
    assert_eq!(bench.runs(), 2);
}

#[test]
fn a_paused_guest_moves_by_its_debugger_and_is_paused_when_that_has_gone() {
    for leaves in [Request::Debug(RunnerDebug { ask: Some(DETACH) }), Request::Attach(RunnerAttach {})] {
        let mut bench = bench(false, []);
        bench.booted();
        bench.pause();
        bench.debug(ATTACH).unwrap();
        bench.debug(GO_ON).unwrap();
        bench.driver.step().unwrap();
        assert_eq!((bench.runs(), bench.standing().1), (1, UNDER_DEBUGGER.into()), "it runs, and is shown as paused");
        bench.ask(leaves);
        bench.driver.step().unwrap();
        assert_eq!((bench.runs(), bench.standing()), (1, (VmState::Paused, "lunch".into())));
        assert!(bench.driver.state().debugged.is_none());
    }
}

#[test]
fn a_new_connection_forgets_a_debugger() {
    let mut bench = bench(false, []);
    bench.booted();
    bench.debug(ATTACH).unwrap();
    bench.debug(Ask::SetStops(stops())).unwrap();
    bench.ask(Request::Attach(RunnerAttach {}));
    assert_eq!(bench.seen.lock().unwrap().stops, Stops::default());
    bench.driver.step().unwrap();
    assert_eq!((bench.runs(), bench.standing().0), (1, VmState::Running));
    assert_eq!(bench.refused(GO_ON), Code::Conflict);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut bench = bench(false, []);
    assert_eq!(bench.refused(ATTACH), Code::Conflict, "it has no state");
    bench.booted();
    bench.debug(ATTACH).unwrap();
    let watched = |address, bytes, reads| RunnerWatched { address, bytes, reads, writes: false };
    let odd = [watched(0, 0, true), watched(0, 4097, true), watched(u64::MAX, 2, true), watched(0, 1, false)];
    for watched in odd {
        let stops = RunnerStops { breakpoints: vec![], watched: vec![watched] };
        assert_eq!(bench.refused(Ask::SetStops(stops)), Code::BadInput, "{watched:?}");
    }
    let many = RunnerStops { breakpoints: vec![0; 1025], watched: vec![] };
    assert_eq!(bench.refused(Ask::SetStops(many)), Code::BadInput);
    assert_eq!(bench.refused(Ask::Step(RunnerDebugStep { vcpu: 7 })), Code::BadInput);
    assert_eq!(bench.refused(Ask::ReadCpu(RunnerCpu { vcpu: u32::MAX, state: vec![] })), Code::BadInput);
    assert_eq!(bench.refused(Ask::WriteCpu(RunnerCpu { vcpu: 0, state: vec![1] })), Code::BadInput);
    let long = RunnerMemory { data: vec![0; (64 << 10) + 1], ..RunnerMemory::default() };
    assert_eq!(bench.refused(Ask::WriteMemory(long)), Code::BadInput);
    let reply = bench.ask(Request::Debug(RunnerDebug { ask: None }));
    assert!(matches!(reply, Reply::Failure(failure) if Code::from_number(failure.code) == Code::Protocol));
}
