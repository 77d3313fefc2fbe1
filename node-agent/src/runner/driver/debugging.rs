//! A debugger in the machine thread: it stops the guest, looks, writes and lets it go on.
//!
//! ```text
//! (none) --attach--> halted --step, go_on--> moving --stop, halt--> halted     detach, a new connection: (none)
//! ```
//! While it moves, the guest runs as any other: in slices, at its pace, as long as its lease holds. A pause that was there
//! when it was told to move comes back when the debugger goes; one that comes later stops it. What is written passes the
//! guest's door. It refuses to know gdb, and what an address means.

use std::ops::Range;

use proto::status::Code;
use proto::v1::runner_debug::Ask;
use proto::v1::runner_reply::Reply;
use proto::v1::{
    RunnerCpu, RunnerDebug, RunnerDebugged, RunnerFailure, RunnerHalt, RunnerMemory, RunnerStops, RunnerWatched,
    VmState,
};
use vmcb_engine::engine::{Stops, WatchKind, Watchpoint, Why};

use super::{Driver, Guest, Outbox, Phase, failure};
use crate::clock::Clock;
use crate::runner::guest::Place;

/// Most bytes that are read or written at once.
pub const MEMORY_BYTES_MAX: usize = 64 << 10;
/// Most stops of each kind.
const STOPS_MAX: usize = 1024;
/// Longest range that is watched.
const WATCHED_BYTES: Range<u64> = 1..4097;

/// A debugger that is attached.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Debugger {
    told: RunnerDebugged,
    /// The vCPU that is to execute one instruction, and how many had retired when it was told so.
    step: Option<(usize, u64)>,
    /// Why the guest was paused before it was told to move.
    was_paused: Option<String>,
}

fn conflict(text: &str) -> RunnerFailure {
    failure(Code::Conflict, text)
}

fn bad(text: &str) -> RunnerFailure {
    failure(Code::BadInput, text)
}

impl<G: Guest, C: Clock, O: Outbox> Driver<G, C, O> {
    /// How the guest stands; none: there is no debugger.
    pub(super) fn debugged(&self) -> Option<RunnerDebugged> {
        self.debugger.as_ref().map(|debugger| debugger.told)
    }

    /// A debugger keeps the guest from running.
    pub(super) fn is_halted(&self) -> bool {
        self.debugger.as_ref().is_some_and(|debugger| debugger.told.halted)
    }

    /// The guest moves by a debugger's word alone.
    pub(super) fn moves_although_paused(&self) -> bool {
        self.debugger.as_ref().is_some_and(|debugger| debugger.was_paused.is_some())
    }

    /// Somebody wants the guest to go on when the debugger has gone.
    pub(super) fn resume(&mut self) {
        self.pause = None;
        if let Some(debugger) = &mut self.debugger {
            debugger.was_paused = None;
        }
    }

    /// Goes on as if there had been no debugger.
    pub(super) fn forget_debugger(&mut self) {
        if let Some(debugger) = self.debugger.take() {
            self.guest.set_stops(&Stops::default());
            self.pause = self.pause.take().or(debugger.was_paused);
        }
    }

    /// Instructions of the next slice.
    pub(super) fn slice_under_debugger(&self, slice: u64) -> u64 {
        let steps = self.debugger.as_ref().is_some_and(|debugger| debugger.step.is_some());
        if steps { 1 } else { slice }
    }

    /// A slice is over: was that the step?
    pub(super) fn note_step(&mut self) {
        let Some((vcpu, since)) = self.debugger.as_ref().and_then(|debugger| debugger.step) else { return };
        if self.guest.last_ran(vcpu).is_some_and(|retired| retired > since) {
            self.halt(RunnerHalt::Stepped, vcpu, None);
        }
    }

    /// The guest met one of the stops that were set.
    pub(super) fn note_stop(&mut self, vcpu: usize, why: &Why) {
        match why {
            Why::Breakpoint { .. } => self.halt(RunnerHalt::Breakpoint, vcpu, None),
            Why::Watchpoint { watched, .. } => self.halt(RunnerHalt::Watched, vcpu, Some(told(watched))),
        }
    }

    /// The guest is over.
    pub(super) fn note_over(&mut self) {
        let vcpu = self.guest.current_vcpu();
        self.halt(RunnerHalt::Ended, vcpu, None);
    }

    fn halt(&mut self, halt: RunnerHalt, vcpu: usize, watched: Option<RunnerWatched>) {
        if let Some(debugger) = &mut self.debugger {
            debugger.step = None;
            let motions = debugger.told.motions;
            debugger.told = RunnerDebugged { motions, halted: true, vcpu: vcpu as u32, halt: halt.into(), watched };
        }
    }

    pub(super) fn debug(&mut self, request: RunnerDebug) -> Result<Reply, RunnerFailure> {
        let ask = request.ask.ok_or_else(|| failure(Code::Protocol, "unknown request of a debugger"))?;
        match ask {
            Ask::Attach(_) => self.attach_debugger()?,
            _ if self.debugger.is_none() => return Err(conflict("no debugger is attached")),
            Ask::Detach(_) => self.forget_debugger(),
            Ask::ReadCpu(RunnerCpu { vcpu, .. }) => {
                let state = self.guest.read_cpu(vcpu as usize).ok_or_else(|| bad("there is no such vCPU"))?;
                return Ok(Reply::Cpu(RunnerCpu { vcpu, state }));
            }
            Ask::WriteCpu(RunnerCpu { vcpu, state }) => {
                self.must_be_writable()?;
                self.guest.write_cpu(vcpu as usize, &state).map_err(|text| bad(&text))?;
            }
            Ask::ReadMemory(asked) => {
                let mut data = vec![0; MEMORY_BYTES_MAX.min(asked.length as usize)];
                let read = self.guest.read_memory(place(&asked), &mut data);
                data.truncate(read);
                return Ok(Reply::Memory(RunnerMemory { data, ..asked }));
            }
            Ask::WriteMemory(asked) => {
                self.must_be_writable()?;
                if asked.data.len() > MEMORY_BYTES_MAX {
                    return Err(bad("more than 64 KiB at once"));
                }
                self.guest.write_memory(place(&asked), &asked.data).map_err(|text| bad(&text))?;
            }
            Ask::SetStops(stops) => self.guest.set_stops(&wanted(&stops)?),
            Ask::Step(step) => self.set_in_motion(Some(step.vcpu as usize))?,
            Ask::GoOn(_) => self.set_in_motion(None)?,
            Ask::Halt(_) if self.is_halted() => {}
            Ask::Halt(_) => {
                let vcpu = self.guest.current_vcpu();
                self.halt(RunnerHalt::Asked, vcpu, None);
            }
        }
        Ok(Reply::State(self.state()))
    }

    fn attach_debugger(&mut self) -> Result<(), RunnerFailure> {
        match self.phase {
            _ if self.debugger.is_some() => return Err(conflict("a debugger is attached already")),
            _ if self.arriving().is_some() => return Err(conflict("the guest goes through a recording")),
            Phase::Fresh => return Err(conflict("this machine has no state yet")),
            Phase::Ended(VmState::Stopped, _) => return Err(conflict("the guest has ended")),
            Phase::Live | Phase::Ended(..) => {}
        }
        let (step, was_paused) = (None, None);
        self.debugger = Some(Debugger { told: RunnerDebugged::default(), step, was_paused });
        let vcpu = self.guest.current_vcpu();
        self.halt(RunnerHalt::Asked, vcpu, None);
        Ok(())
    }

    fn must_be_writable(&self) -> Result<(), RunnerFailure> {
        match &self.phase {
            Phase::Live if !self.is_halted() => Err(conflict("the guest runs: halt it first")),
            Phase::Live if self.must_wait() => {
                Err(failure(Code::Exhausted, "what was recorded is not taken, and there is no room for more"))
            }
            Phase::Live => Ok(()),
            Phase::Fresh | Phase::Ended(..) => Err(conflict("the guest has ended: it can only be looked at")),
        }
    }

    fn set_in_motion(&mut self, step: Option<usize>) -> Result<(), RunnerFailure> {
        if let Phase::Ended(_, reason) = &self.phase {
            return Err(conflict(&format!("the guest has ended: {reason}")));
        }
        if step.is_some_and(|vcpu| self.guest.read_cpu(vcpu).is_none()) {
            return Err(bad("there is no such vCPU"));
        }
        let Some(debugger) = &mut self.debugger else { return Ok(()) };
        if !debugger.told.halted {
            return Err(conflict("the guest moves already"));
        }
        let retired = self.guest.retired();
        debugger.step = step.map(|vcpu| (vcpu, retired));
        let motions = debugger.told.motions + 1;
        debugger.told = RunnerDebugged { motions, vcpu: debugger.told.vcpu, ..RunnerDebugged::default() };
        debugger.was_paused = debugger.was_paused.take().or(self.pause.take());
        self.guest.pass_breakpoints();
        Ok(())
    }
}

fn place(asked: &RunnerMemory) -> Place {
    match asked.vcpu {
        Some(vcpu) => Place::Linear { vcpu: vcpu as usize, address: asked.address },
        None => Place::Physical(asked.address),
    }
}

/// A watchpoint in the form that travels.
pub fn told(watched: &Watchpoint) -> RunnerWatched {
    let Watchpoint { address, bytes, kind } = *watched;
    let (reads, writes) = match kind {
        WatchKind::Read => (true, false),
        WatchKind::Write | WatchKind::PhysicalWrite => (false, true),
        WatchKind::Access => (true, true),
    };
    RunnerWatched { address, bytes, reads, writes }
}

/// A watchpoint that has travelled; `None` if it watches for nothing.
pub fn meant(watched: &RunnerWatched) -> Option<Watchpoint> {
    let RunnerWatched { address, bytes, reads, writes } = *watched;
    let kind = match (reads, writes) {
        (true, true) => WatchKind::Access,
        (true, false) => WatchKind::Read,
        (false, true) => WatchKind::Write,
        (false, false) => return None,
    };
    Some(Watchpoint { address, bytes, kind })
}

fn wanted(stops: &RunnerStops) -> Result<Stops, RunnerFailure> {
    if stops.breakpoints.len().max(stops.watched.len()) > STOPS_MAX {
        return Err(bad("more stops than there may be"));
    }
    let watchpoint = |watched: &RunnerWatched| {
        let watchpoint = meant(watched).ok_or_else(|| bad("nothing is watched for"))?;
        let Watchpoint { address, bytes, .. } = watchpoint;
        if !WATCHED_BYTES.contains(&bytes) || address.checked_add(bytes - 1).is_none() {
            return Err(bad("1 to 4096 bytes can be watched"));
        }
        Ok(watchpoint)
    };
    let watchpoints = stops.watched.iter().map(watchpoint).collect::<Result<_, _>>()?;
    Ok(Stops { breakpoints: stops.breakpoints.clone(), watchpoints })
}
