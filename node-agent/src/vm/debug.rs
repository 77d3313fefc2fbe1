//! A debugger on a guest of this host: gdb's questions become requests to the runner.
//!
//! ```text
//! attach (by the VM's actor: it knows what else is under way) -> Live, on a thread of its own -> detach
//! ```
//! The runner tells each stop as it happens. It forgets a debugger whose agent has gone, and so does this: the next request is
//! refused, and the session ends. Only forwards: a live guest has no past. It refuses to know gdb's packets, and who asks.

use std::sync::Arc;
use std::time::Duration;

use proto::status::Code;
use proto::v1::runner_debug::Ask;
use proto::v1::runner_reply::Reply;
use proto::v1::runner_request::Request;
use proto::v1::{
    RunnerCpu, RunnerDebug, RunnerDebugAttach, RunnerDebugDetach, RunnerDebugGoOn, RunnerDebugHalt, RunnerDebugStep,
    RunnerDebugged, RunnerHalt, RunnerMemory, RunnerState, RunnerStops, VmRef, VmState,
};
use tokio::runtime;
use tokio::sync::watch;
use vmcb_engine::cpu::CpuState;
use vmcb_engine::engine::Stops;

use super::actor::{Actor, refusal};
use super::runner::Runner;
use crate::migration::Failure;
use crate::replay::gdb::{DebugError, Debuggee, Halt, Motion};
use crate::replay::instant::{dump, parse_number};
use crate::runner::driver::debugging::{meant, told};

/// How often a moving guest's debugger is looked at for an interrupt.
const LOOK: Duration = Duration::from_millis(50);
/// Longest range that `monitor physical` takes.
const BYTES_MAX: u64 = 4096;
const HELP: &str = "position                      how many instructions have retired, and which vCPU ran last
physical ADDRESS [BYTES]      guest-physical memory
why                           why a write was refused
a live guest only goes forwards: `ctl replay` goes back";

impl Actor {
    /// Attaches a debugger; the guest stands still then.
    pub(super) async fn debug(&mut self, vm: VmRef) -> Result<Arc<Runner>, Failure> {
        let refused = |code: Code, text: &str| Err(refusal(&self.name, code, text));
        let Some(record) = &self.record else { return refused(Code::NotFound, "this host has no such VM") };
        if record.generation != vm.generation {
            let text = format!("generation {} is here, not {}", record.generation, vm.generation);
            return refused(Code::Denied, &text);
        }
        if !matches!(record.state(), VmState::Running | VmState::Paused | VmState::Crashed) {
            let text = format!("it is {}", super::requests::state_words(record.state()));
            return refused(Code::Conflict, &text);
        }
        if self.is_leaving() {
            return refused(Code::Conflict, &format!("operation {} moves it", record.operation));
        }
        if let Some(lazy) = self.lazy_info() {
            let text = format!("pages of its RAM still come from checkpoint {}; ask again later", lazy.checkpoint);
            return refused(Code::Conflict, &text);
        }
        let Some(runner) = self.runner.clone() else {
            return refused(Code::Conflict, "it has no process");
        };
        let state = runner.debug(Ask::Attach(RunnerDebugAttach {})).await?;
        self.absorb(&state);
        tracing::info!(vm = self.name, "a debugger is attached");
        Ok(runner)
    }
}

/// A guest under a debugger.
pub struct Live {
    runner: Arc<Runner>,
    runtime: runtime::Handle,
    told: watch::Receiver<RunnerState>,
    vcpus: usize,
    current: usize,
}

fn gone(failure: &Failure) -> DebugError {
    DebugError(failure.reason.clone())
}

impl Live {
    /// A guest to which a debugger was attached. Its methods wait: they are for a thread that may.
    pub async fn new(runner: Arc<Runner>) -> Live {
        let (told, vcpus) = (runner.changes(), runner.config.vcpus.max(1) as usize);
        // One that does not answer says so again.
        let debugged = runner.status().await.ok().and_then(|state| state.debugged);
        let current = debugged.map_or(0, |debugged| debugged.vcpu as usize).min(vcpus - 1);
        Live { runner, runtime: runtime::Handle::current(), told, vcpus, current }
    }

    /// The guest goes on as if there had been no debugger.
    pub fn detach(&self) {
        let detached = self.ask(Ask::Detach(RunnerDebugDetach {}));
        // A runner that is gone, or that has heard another agent, has forgotten it already.
        if let Err(failure) = detached {
            tracing::debug!(%failure, "a debugger went");
        }
    }

    fn call(&self, ask: Ask) -> Result<Reply, Failure> {
        self.runtime.block_on(self.runner.call(Request::Debug(RunnerDebug { ask: Some(ask) })))
    }

    fn ask(&self, ask: Ask) -> Result<RunnerState, Failure> {
        self.runtime.block_on(self.runner.debug(ask))
    }

    fn read_at(&self, vcpu: Option<usize>, address: u64, length: usize) -> Result<Vec<u8>, Failure> {
        let vcpu = vcpu.map(|vcpu| vcpu as u32);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        match self.call(Ask::ReadMemory(RunnerMemory { vcpu, address, length, data: Vec::new() }))? {
            Reply::Memory(memory) => Ok(memory.data),
            _ => Err(Failure::new(Code::Protocol, "the runner answered something else")),
        }
    }

    fn halted(&mut self, debugged: &RunnerDebugged) -> Halt {
        self.current = (debugged.vcpu as usize).min(self.vcpus - 1);
        match debugged.halt() {
            RunnerHalt::Asked => Halt::Interrupted,
            RunnerHalt::Stepped => Halt::Stepped,
            RunnerHalt::Breakpoint => Halt::Instruction(self.current),
            // A runner that does not say what was touched has stopped all the same.
            RunnerHalt::Watched => match debugged.watched.as_ref().and_then(meant) {
                Some(watched) => Halt::Watched { vcpu: self.current, watched },
                None => Halt::Stepped,
            },
            RunnerHalt::Ended => Halt::Over,
        }
    }

    fn physical(&self, address: u64, bytes: u64) -> Result<String, String> {
        if !(1..=BYTES_MAX).contains(&bytes) {
            return Err(format!("{bytes} bytes: 1 to {BYTES_MAX}"));
        }
        let read = self.read_at(None, address, bytes as usize).map_err(|failure| failure.reason)?;
        if read.is_empty() { Err(format!("there is no RAM at {address:#x}")) } else { Ok(dump(address, &read)) }
    }

    fn answer(&self, command: &str) -> Result<String, String> {
        let number = |text: &str| parse_number(text).ok_or_else(|| format!("{text:?} is no number"));
        match command.split_whitespace().collect::<Vec<_>>()[..] {
            ["position"] => {
                let state = self.runtime.block_on(self.runner.status()).map_err(|failure| failure.reason)?;
                Ok(format!("instruction {}, vCPU {}", state.retired_instructions, self.current))
            }
            ["physical", at] => self.physical(number(at)?, 64),
            ["physical", at, bytes] => self.physical(number(at)?, number(bytes)?),
            _ => Ok(HELP.to_owned()),
        }
    }
}

impl Debuggee for Live {
    fn vcpus(&self) -> usize {
        self.vcpus
    }

    fn current(&self) -> usize {
        self.current
    }

    fn cpu(&mut self, vcpu: usize) -> Result<CpuState, DebugError> {
        let asked = RunnerCpu { vcpu: vcpu as u32, state: Vec::new() };
        match self.call(Ask::ReadCpu(asked)).map_err(|failure| gone(&failure))? {
            Reply::Cpu(cpu) => CpuState::from_bytes(&cpu.state).map_err(|error| DebugError(error.to_string())),
            _ => Err(DebugError("the runner answered something else".to_owned())),
        }
    }

    fn read(&mut self, vcpu: usize, address: u64, into: &mut [u8]) -> usize {
        let read = self.read_at(Some(vcpu), address, into.len()).unwrap_or_default();
        let bytes = read.len().min(into.len());
        into[..bytes].copy_from_slice(&read[..bytes]);
        bytes
    }

    fn write(&mut self, vcpu: usize, address: u64, from: &[u8]) -> Result<(), String> {
        let asked = RunnerMemory { vcpu: Some(vcpu as u32), address, length: 0, data: from.to_vec() };
        self.ask(Ask::WriteMemory(asked)).map(drop).map_err(|failure| failure.reason)
    }

    fn set_cpu(&mut self, vcpu: usize, state: &CpuState) -> Result<(), String> {
        let asked = RunnerCpu { vcpu: vcpu as u32, state: state.to_bytes() };
        self.ask(Ask::WriteCpu(asked)).map(drop).map_err(|failure| failure.reason)
    }

    fn set_stops(&mut self, stops: &Stops) -> Result<(), DebugError> {
        let Stops { breakpoints, watchpoints } = stops.clone();
        let stops = RunnerStops { breakpoints, watched: watchpoints.iter().map(told).collect() };
        self.ask(Ask::SetStops(stops)).map(drop).map_err(|failure| gone(&failure))
    }

    fn reversible(&self) -> bool {
        false
    }

    fn resume(&mut self, motion: Motion, interrupted: &mut dyn FnMut() -> bool) -> Result<Halt, DebugError> {
        let ask = match motion {
            Motion::Forward => Ask::GoOn(RunnerDebugGoOn {}),
            Motion::Step(vcpu) => Ask::Step(RunnerDebugStep { vcpu: vcpu as u32 }),
            Motion::Backward | Motion::StepBack(_) => {
                return Err(DebugError("a live guest only goes forwards: `ctl replay` goes back".to_owned()));
            }
        };
        let forgotten = || DebugError("the guest has forgotten its debugger".to_owned());
        let state = self.ask(ask).map_err(|failure| gone(&failure))?;
        let motions = state.debugged.ok_or_else(forgotten)?.motions;
        loop {
            let told = self.told.borrow_and_update().debugged;
            if let Some(debugged) = told.filter(|debugged| debugged.motions == motions && debugged.halted) {
                return Ok(self.halted(&debugged));
            }
            if interrupted() {
                let state = self.ask(Ask::Halt(RunnerDebugHalt {})).map_err(|failure| gone(&failure))?;
                let debugged = state.debugged.ok_or_else(forgotten)?;
                return Ok(self.halted(&debugged));
            }
            let mut told = self.told.clone();
            match self.runtime.block_on(async { tokio::time::timeout(LOOK, told.changed()).await }) {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(_)) => return Err(DebugError("the guest's process is gone".to_owned())),
            }
        }
    }

    fn monitor(&mut self, command: &str) -> String {
        self.answer(command).unwrap_or_else(|why| why)
    }
}
