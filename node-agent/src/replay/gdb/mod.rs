//! gdb's remote protocol for whatever can be stopped: a recording, or a live VM that is paused.
//!
//! | file | what |
//! |---|---|
//! | `registers` | x86-64 registers as gdb numbers them |
//! | `target` | the protocol's questions, answered by a [`Debuggee`] |
//! | `wire` | bytes of one connection |
//!
//! A vCPU is a thread, numbered from 1. One client at a time; when it detaches the next one may come, `kill` ends the
//! session. What a client sends is hostile: malformed packets end its connection, never the program. This room refuses
//! to know recordings and machines.

mod registers;
mod target;
mod wire;

use std::net::TcpListener;
use std::os::fd::OwnedFd;

use gdbstub::stub::{DisconnectReason, GdbStub};
use vmcb_engine::cpu::CpuState;
use vmcb_engine::engine::{Stops, Watchpoint};

use target::{Loop, Session};
use wire::Wire;

/// Longest packet that a client may send.
const PACKET_BYTES_MAX: usize = 16 << 10;

/// How the debuggee moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Motion {
    /// To the next stop.
    Forward,
    /// By one instruction of this vCPU.
    Step(usize),
    /// To the last stop before now.
    Backward,
    /// To before the last instruction of this vCPU.
    StepBack(usize),
}

/// Why it stands still again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Halt {
    /// A step is done.
    Stepped,
    /// Before this vCPU's instruction.
    Instruction(usize),
    /// A watched range was touched: just after it going forward, just before it going backward.
    Watched {
        /// Who touched it.
        vcpu: usize,
        /// The range.
        watched: Watchpoint,
    },
    /// The beginning of what is known.
    Beginning,
    /// The end of what is known.
    End,
    /// The guest is over; it can be looked at.
    Over,
    /// As was asked for.
    Interrupted,
}

/// The debuggee cannot go on; for people.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct DebugError(pub String);

/// What can be debugged: it stands still but while [`Debuggee::resume`] is called.
pub trait Debuggee {
    /// How many vCPUs.
    fn vcpus(&self) -> usize;
    /// The vCPU that stopped, or ran last.
    fn current(&self) -> usize;
    /// State of a vCPU.
    ///
    /// # Errors
    /// It cannot be asked any more; the session ends.
    fn cpu(&mut self, vcpu: usize) -> Result<CpuState, DebugError>;
    /// Reads linear memory as this vCPU sees it now, without any effect; how many bytes are mapped and read.
    fn read(&mut self, vcpu: usize, address: u64, into: &mut [u8]) -> usize;
    /// Writes linear memory.
    ///
    /// # Errors
    /// Why it may not be written; for people.
    fn write(&mut self, vcpu: usize, address: u64, from: &[u8]) -> Result<(), String>;
    /// Puts a vCPU into a state.
    ///
    /// # Errors
    /// Why it may not be changed; for people.
    fn set_cpu(&mut self, vcpu: usize, state: &CpuState) -> Result<(), String>;
    /// Where to stop from now on.
    ///
    /// # Errors
    /// It cannot be told any more; the session ends.
    fn set_stops(&mut self, stops: &Stops) -> Result<(), DebugError>;
    /// Whether time can go backwards.
    fn reversible(&self) -> bool;
    /// Moves until it stops, or until `interrupted` says so; it is asked several times a second.
    ///
    /// # Errors
    /// It cannot go on; the session ends.
    fn resume(&mut self, motion: Motion, interrupted: &mut dyn FnMut() -> bool) -> Result<Halt, DebugError>;
    /// A command of `monitor`; the answer is for people.
    fn monitor(&mut self, command: &str) -> String;
}

/// How a session ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The client went; another may come.
    Detached,
    /// The client asked for the end.
    Killed,
}

/// Serves clients, one after the other, until one asks for the end; `said` is told what happens.
///
/// # Errors
/// The listener fails.
pub fn serve<D: Debuggee>(debuggee: &mut D, listener: &TcpListener, said: &mut dyn FnMut(&str)) -> std::io::Result<()> {
    loop {
        let (stream, peer) = listener.accept()?;
        said(&format!("gdb from {peer}"));
        stream.set_nodelay(true)?;
        match session(debuggee, stream) {
            Ok(Ended::Killed) => {
                said("gdb asked for the end");
                return Ok(());
            }
            Ok(Ended::Detached) => said("gdb has gone; waiting for the next one"),
            Err(why) => said(&format!("the connection to gdb ended: {why}; waiting for the next one")),
        }
        debuggee.set_stops(&Stops::default()).map_err(std::io::Error::other)?;
    }
}

/// Serves one client.
///
/// # Errors
/// The connection broke, the client broke the protocol, or the debuggee cannot go on: a text for people.
pub fn session<D: Debuggee>(debuggee: &mut D, socket: impl Into<OwnedFd>) -> Result<Ended, String> {
    let stub = GdbStub::builder(Wire::new(socket.into())).packet_buffer_size(PACKET_BYTES_MAX).build();
    let mut session = Session::new(debuggee);
    match stub.map_err(|e| e.to_string())?.run_blocking::<Loop<'_, D>>(&mut session) {
        Ok(DisconnectReason::Kill) => Ok(Ended::Killed),
        Ok(_) => Ok(Ended::Detached),
        Err(error) => Err(error.to_string()),
    }
}
