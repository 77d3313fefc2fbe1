//! The protocol's questions, answered by a [`Debuggee`]. Breakpoints and watchpoints are the debuggee's: nothing is ever
//! written into guest memory for them. It refuses to know how the debuggee moves.

use std::collections::BTreeSet;
use std::marker::PhantomData;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::ConnectionExt;
use gdbstub::outputln;
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{
    ReplayLogPosition, ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind as GdbWatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use vmcb_engine::cpu::CpuState;
use vmcb_engine::engine::{Stops, WatchKind, Watchpoint};

use super::registers::{RegisterFile, RegisterNumber, X86_64};
use super::wire::Wire;
use super::{DebugError, Debuggee, Halt, Motion};

/// Most stops of each kind: what a client asks for is bounded.
const STOPS_MAX: usize = 1024;
/// Longest range that is watched, in bytes.
const WATCHED_BYTES_MAX: u64 = 4096;
const EFAULT: u8 = 14;
const EROFS: u8 = 30;

/// A client's session with a debuggee.
pub struct Session<'a, D> {
    debuggee: &'a mut D,
    stops: Stops,
    /// Which of the stops at instructions the client calls software: it believes a stop only of the kind that it set.
    software: BTreeSet<u64>,
    hardware: BTreeSet<u64>,
    motion: Motion,
    /// What a write was answered with, for people: gdb shows only the number.
    refused: Option<String>,
}

impl<'a, D: Debuggee> Session<'a, D> {
    /// At the beginning.
    pub fn new(debuggee: &'a mut D) -> Self {
        Self {
            debuggee,
            stops: Stops::default(),
            software: BTreeSet::new(),
            hardware: BTreeSet::new(),
            motion: Motion::Forward,
            refused: None,
        }
    }

    fn vcpu(&self, tid: Tid) -> Result<usize, TargetError<DebugError>> {
        let vcpu = tid.get() - 1;
        if vcpu < self.debuggee.vcpus() { Ok(vcpu) } else { Err(TargetError::NonFatal) }
    }

    fn refuse(&mut self, answer: Result<(), String>) -> TargetResult<(), Self> {
        answer.map_err(|why| {
            self.refused = Some(why);
            TargetError::Errno(EROFS)
        })
    }

    /// Changes registers of a vCPU.
    fn change_cpu(
        &mut self,
        vcpu: usize,
        change: impl FnOnce(&mut CpuState) -> Result<(), String>,
    ) -> TargetResult<(), Self> {
        let mut state = self.debuggee.cpu(vcpu).map_err(TargetError::Fatal)?;
        let answer = change(&mut state).and_then(|()| self.debuggee.set_cpu(vcpu, &state));
        self.refuse(answer)
    }

    fn reason(&mut self, halt: Halt) -> Result<MultiThreadStopReason<u64>, DebugError> {
        let current = thread(self.debuggee.current());
        Ok(match halt {
            Halt::Stepped => MultiThreadStopReason::SignalWithThread { tid: current, signal: Signal::SIGTRAP },
            Halt::Instruction(vcpu) => {
                let address = self.debuggee.cpu(vcpu)?.code_address();
                let software = self.software.contains(&address) || !self.hardware.contains(&address);
                let tid = thread(vcpu);
                if software { MultiThreadStopReason::SwBreak(tid) } else { MultiThreadStopReason::HwBreak(tid) }
            }
            Halt::Watched { vcpu, watched } => {
                let kind = match watched.kind {
                    WatchKind::Read => GdbWatchKind::Read,
                    WatchKind::Write | WatchKind::PhysicalWrite => GdbWatchKind::Write,
                    WatchKind::Access => GdbWatchKind::ReadWrite,
                };
                MultiThreadStopReason::Watch { tid: thread(vcpu), kind, addr: watched.address }
            }
            Halt::Beginning => MultiThreadStopReason::ReplayLog { tid: Some(current), pos: ReplayLogPosition::Begin },
            Halt::End => MultiThreadStopReason::ReplayLog { tid: Some(current), pos: ReplayLogPosition::End },
            Halt::Over => MultiThreadStopReason::SignalWithThread { tid: current, signal: Signal::SIGABRT },
            Halt::Interrupted => MultiThreadStopReason::SignalWithThread { tid: current, signal: Signal::SIGINT },
        })
    }

    fn watched(address: u64, bytes: u64, kind: GdbWatchKind) -> Option<Watchpoint> {
        let kind = match kind {
            GdbWatchKind::Read => WatchKind::Read,
            GdbWatchKind::Write => WatchKind::Write,
            GdbWatchKind::ReadWrite => WatchKind::Access,
        };
        let fits = (1..=WATCHED_BYTES_MAX).contains(&bytes) && address.checked_add(bytes - 1).is_some();
        fits.then_some(Watchpoint { address, bytes, kind })
    }

    fn change(&mut self, change: impl FnOnce(&mut Stops) -> bool) -> TargetResult<bool, Self> {
        let changed = change(&mut self.stops);
        if changed {
            self.debuggee.set_stops(&self.stops).map_err(TargetError::Fatal)?;
        }
        Ok(changed)
    }

    /// All instructions to stop at are those of both kinds.
    fn change_instructions(
        &mut self,
        change: impl FnOnce(&mut BTreeSet<u64>, &mut BTreeSet<u64>) -> bool,
    ) -> TargetResult<bool, Self> {
        if !change(&mut self.software, &mut self.hardware) {
            return Ok(false);
        }
        self.stops.breakpoints = self.software.union(&self.hardware).copied().collect();
        self.debuggee.set_stops(&self.stops).map_err(TargetError::Fatal)?;
        Ok(true)
    }
}

/// Adds an address if there is room.
fn add(to: &mut BTreeSet<u64>, address: u64) -> bool {
    let room = to.len() < STOPS_MAX || to.contains(&address);
    if room {
        to.insert(address);
    }
    room
}

fn thread(vcpu: usize) -> Tid {
    Tid::new(vcpu + 1).expect("one more than a count is not zero")
}

impl<D: Debuggee> Target for Session<'_, D> {
    type Arch = X86_64;
    type Error = DebugError;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, DebugError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> MultiThreadBase for Session<'_, D> {
    fn read_registers(&mut self, registers: &mut RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid)?;
        *registers = RegisterFile::of(&self.debuggee.cpu(vcpu).map_err(TargetError::Fatal)?);
        Ok(())
    }

    fn write_registers(&mut self, registers: &RegisterFile, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid)?;
        self.change_cpu(vcpu, |state| registers.put_into(state))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu(tid)?;
        match self.debuggee.read(vcpu, start, data) {
            0 if !data.is_empty() => Err(TargetError::Errno(EFAULT)),
            bytes => Ok(bytes),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid)?;
        let answer = self.debuggee.write(vcpu, start, data);
        self.refuse(answer)
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), DebugError> {
        (0..self.debuggee.vcpus()).for_each(|vcpu| active(thread(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> SingleRegisterAccess<Tid> for Session<'_, D> {
    fn read_register(&mut self, tid: Tid, number: RegisterNumber, buffer: &mut [u8]) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu(tid)?;
        let bytes = number.bytes(&self.debuggee.cpu(vcpu).map_err(TargetError::Fatal)?).ok_or(TargetError::NonFatal)?;
        buffer.get_mut(..bytes.len()).ok_or(TargetError::NonFatal)?.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, tid: Tid, number: RegisterNumber, value: &[u8]) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid)?;
        self.change_cpu(vcpu, |state| number.put(state, value))
    }
}

impl<D: Debuggee> ThreadExtraInfo for Session<'_, D> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, DebugError> {
        let text = format!("vCPU {}", tid.get() - 1);
        let bytes = text.len().min(buffer.len());
        buffer[..bytes].copy_from_slice(&text.as_bytes()[..bytes]);
        Ok(bytes)
    }
}

impl<D: Debuggee> MultiThreadResume for Session<'_, D> {
    fn resume(&mut self) -> Result<(), DebugError> {
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), DebugError> {
        self.motion = Motion::Forward;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, _tid: Tid, _signal: Option<Signal>) -> Result<(), DebugError> {
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, Tid, Self>> {
        if self.debuggee.reversible() { Some(self) } else { None }
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, Tid, Self>> {
        if self.debuggee.reversible() { Some(self) } else { None }
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> MultiThreadSchedulerLocking for Session<'_, D> {
    // Who runs when is history: other vCPUs go on while one steps, and a step ends after one instruction of its own.
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), DebugError> {
        Ok(())
    }
}

impl<D: Debuggee> MultiThreadSingleStep for Session<'_, D> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), DebugError> {
        self.motion = Motion::Step(tid.get() - 1);
        Ok(())
    }
}

impl<D: Debuggee> ReverseStep<Tid> for Session<'_, D> {
    fn reverse_step(&mut self, tid: Tid) -> Result<(), DebugError> {
        self.motion = Motion::StepBack(tid.get() - 1);
        Ok(())
    }
}

impl<D: Debuggee> ReverseCont<Tid> for Session<'_, D> {
    fn reverse_cont(&mut self) -> Result<(), DebugError> {
        self.motion = Motion::Backward;
        Ok(())
    }
}

impl<D: Debuggee> Breakpoints for Session<'_, D> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> SwBreakpoint for Session<'_, D> {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.change_instructions(|software, _| add(software, address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.change_instructions(|software, _| software.remove(&address))
    }
}

impl<D: Debuggee> HwBreakpoint for Session<'_, D> {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.change_instructions(|_, hardware| add(hardware, address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.change_instructions(|_, hardware| hardware.remove(&address))
    }
}

impl<D: Debuggee> HwWatchpoint for Session<'_, D> {
    fn add_hw_watchpoint(&mut self, address: u64, bytes: u64, kind: GdbWatchKind) -> TargetResult<bool, Self> {
        let Some(watched) = Self::watched(address, bytes, kind) else { return Ok(false) };
        self.change(|Stops { watchpoints, .. }| {
            let room = watchpoints.len() < STOPS_MAX;
            if room && !watchpoints.contains(&watched) {
                watchpoints.push(watched);
            }
            room
        })
    }

    fn remove_hw_watchpoint(&mut self, address: u64, bytes: u64, kind: GdbWatchKind) -> TargetResult<bool, Self> {
        let Some(watched) = Self::watched(address, bytes, kind) else { return Ok(false) };
        self.change(|Stops { watchpoints, .. }| {
            let there = watchpoints.iter().position(|other| *other == watched);
            there.map(|at| watchpoints.remove(at)).is_some()
        })
    }
}

impl<D: Debuggee> MonitorCmd for Session<'_, D> {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), DebugError> {
        let answer = match std::str::from_utf8(command).map(str::trim) {
            Ok("why") => self.refused.take().unwrap_or_else(|| "nothing was refused".to_owned()),
            Ok(command) => self.debuggee.monitor(command),
            Err(_) => "no text".to_owned(),
        };
        answer.lines().for_each(|line| outputln!(out, "{line}"));
        Ok(())
    }
}

/// The loop between the connection and the debuggee.
pub struct Loop<'a, D>(PhantomData<&'a mut D>);

impl<'a, D: Debuggee> BlockingEventLoop for Loop<'a, D> {
    type Target = Session<'a, D>;
    type Connection = Wire;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        session: &mut Session<'a, D>,
        wire: &mut Wire,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<DebugError, std::io::Error>> {
        if !wire.has_come() {
            let halt = session.debuggee.resume(session.motion, &mut || wire.has_come());
            let halt = halt.map_err(WaitForStopReasonError::Target)?;
            if halt != Halt::Interrupted {
                return session.reason(halt).map(Event::TargetStopped).map_err(WaitForStopReasonError::Target);
            }
        }
        wire.read().map(Event::IncomingData).map_err(WaitForStopReasonError::Connection)
    }

    fn on_interrupt(session: &mut Session<'a, D>) -> Result<Option<Self::StopReason>, DebugError> {
        session.reason(Halt::Interrupted).map(Some)
    }
}
