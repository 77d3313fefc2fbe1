//! What runs guest instructions: one trait, implemented by the software SVM processor ([`soft`]) and by hardware SVM
//! through Linux KVM ([`kvm`]). State is architectural on both sides of the trait, so a guest can move between them.
//!
//! What differs is said by the trait. Time: the software engine counts instructions, and comes back at exactly the one that
//! was asked for; hardware does not, and there an "instruction" is [`Clock::tsc_per_instruction`] ticks of the guest's
//! running TSC. Local APICs: the platform has them, or the engine ([`Engine::local_apics`]); their saved form is one.
//!
//! An engine refuses to know devices: what the guest asks of the world goes through [`Platform`], synchronously, and
//! what the world asks of the guest (interrupts, deadlines) is fetched from it between two instructions.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use proto::v1::LapicV1;

use crate::cpu::CpuState;
use crate::device::lapic::Message;
use crate::vmcb::Vmcb;

pub mod kvm;
pub mod soft;
pub mod stops;
pub mod uses;

pub use stops::{Stops, WatchKind, Watchpoint, Why};
pub use uses::Uses;

/// The machine's time. Guest TSC = `retired * tsc_per_instruction + skipped_tsc` (+ the vCPU's own offset).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Clock {
    /// Guest instructions retired over all vCPUs.
    pub retired: u64,
    /// TSC ticks that passed while the machine was idle.
    pub skipped_tsc: u64,
    /// TSC ticks an instruction takes.
    pub tsc_per_instruction: u32,
}

impl Clock {
    /// TSC ticks since the machine was built.
    pub fn tsc(&self) -> u64 {
        self.retired.wrapping_mul(self.tsc_per_instruction.into()).wrapping_add(self.skipped_tsc)
    }

    /// The first instruction count at which [`Clock::tsc`] is at least `tsc`, if the machine stays busy.
    pub fn retired_at(&self, tsc: u64) -> u64 {
        self.retired + tsc.saturating_sub(self.tsc()).div_ceil(u64::from(self.tsc_per_instruction))
    }
}

/// Everything outside the processor, as the processor sees it. `tsc` is [`Clock::tsc`] now.
pub trait Platform {
    /// IN of `size` bytes (1, 2, 4).
    fn io_read(&mut self, tsc: u64, port: u16, size: u8) -> u32;
    /// OUT of `size` bytes (1, 2, 4).
    fn io_write(&mut self, tsc: u64, port: u16, size: u8, value: u32);
    /// Load of `size` bytes (1, 2, 4, 8) from an address that is not RAM.
    fn mmio_read(&mut self, tsc: u64, gpa: u64, size: u8) -> u64;
    /// Store of `size` bytes (1, 2, 4, 8) to an address that is not RAM.
    fn mmio_write(&mut self, tsc: u64, gpa: u64, size: u8, value: u64);
    /// RDMSR of an MSR that the engine does not own (APIC_BASE, x2APIC, TSC_DEADLINE, kvm-clock); `None` is #GP(0).
    fn msr_read(&mut self, tsc: u64, vcpu: usize, msr: u32) -> Option<u64>;
    /// WRMSR of an MSR that the engine does not own; `None` is #GP(0).
    fn msr_write(&mut self, tsc: u64, vcpu: usize, msr: u32, value: u64) -> Option<()>;
    /// Lets time-driven devices act; called whenever [`Platform::next_deadline`] has passed, and after idle jumps.
    fn tick(&mut self, tsc: u64);
    /// TSC at which `tick` must be called next.
    fn next_deadline(&self) -> Option<u64>;
    /// The vector that the local APIC would deliver now (priority above PPR), without acknowledging it.
    fn pending_interrupt(&mut self, vcpu: usize) -> Option<u8>;
    /// The processor took this vector.
    fn acknowledge(&mut self, vcpu: usize, vector: u8);
    /// Task priority, as CR8 shows it.
    fn cr8(&self, vcpu: usize) -> u8;
    /// MOV to CR8.
    fn set_cr8(&mut self, vcpu: usize, value: u8);
    /// This vCPU executes from now on: loads and stores of its local APIC page are its own. Engines with several vCPUs
    /// say so at every change.
    fn executing(&mut self, vcpu: usize) {
        let _ = vcpu;
    }
    /// What the processor is asked to do besides interrupts, once each; looked at where interrupts are.
    fn take_request(&mut self, vcpu: usize) -> Option<Request> {
        let _ = vcpu;
        None
    }
    /// True once the guest asked to be powered off or reset: the engine returns [`Exit::Stopped`] at once.
    fn stopped(&self) -> bool;
    /// The next message for local APICs that are the engine's, in the order in which they were sent.
    fn take_message(&mut self) -> Option<Message> {
        None
    }
    /// The level-triggered messages whose end of interrupt the platform wants to hear of, if that changed since it was
    /// asked last. For engines with local APICs of their own.
    fn take_level_messages(&mut self) -> Option<Vec<Message>> {
        None
    }
    /// The guest has said something that is to be fetched after the run.
    fn has_output(&self) -> bool {
        false
    }
    /// A local APIC of the engine's ended a level-triggered interrupt of this vector.
    fn end_of_interrupt(&mut self, vector: u8) {
        let _ = vector;
    }
}

/// What one processor or a device asks another processor to do, besides interrupts (APM2 16.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// INIT: reset, then wait for a start-up.
    Init,
    /// Start in real mode at this page of the first MiB.
    Startup(u8),
    /// Non-maskable interrupt.
    Nmi,
}

/// Why [`Engine::run`] came back. Always between two instructions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Exit {
    /// The instruction count that was asked for.
    Reached,
    /// Every vCPU waits for an interrupt. No deadline has passed.
    Halted,
    /// Triple fault (APM2 8.2.9, 15.14.3).
    Shutdown,
    /// [`Platform::stopped`].
    Stopped,
    /// One of the [`Stops`] that were set.
    Stop {
        /// The vCPU that met it.
        vcpu: usize,
        /// Which.
        why: Why,
    },
    /// The engine met something that it cannot do; the guest cannot go on.
    Failed(String),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Reached => f.write_str("reached the instruction asked for"),
            Exit::Halted => f.write_str("halted"),
            Exit::Shutdown => f.write_str("triple fault"),
            Exit::Stopped => f.write_str("stopped by the guest"),
            Exit::Stop { vcpu, why } => write!(f, "vCPU {vcpu}: {why}"),
            Exit::Failed(why) => write!(f, "engine cannot go on: {why}"),
        }
    }
}

/// Why a CPU state cannot be loaded.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LoadError {
    /// This engine has no such vCPU.
    #[error("there is no vCPU {0}")]
    NoVcpu(usize),
    /// VMRUN would refuse it (APM2 15.5.1).
    #[error("illegal CPU state: {0}")]
    Illegal(String),
    /// The host below the engine does not take it.
    #[error("{step}: {reason}")]
    Refused {
        /// What was being set.
        step: &'static str,
        /// Why not.
        reason: String,
    },
}

/// Why a state cannot be had from the engine.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// This engine has no such vCPU.
    #[error("there is no vCPU {0}")]
    NoVcpu(usize),
    /// The host below the engine does not give it.
    #[error("{step}: {reason}")]
    Refused {
        /// What was being read.
        step: &'static str,
        /// Why not.
        reason: String,
    },
}

/// An engine between two instructions, in a form that only its kind knows.
pub struct EngineRung {
    kept: Box<dyn Any + Send>,
    bytes: usize,
}

impl EngineRung {
    /// Of what the engine keeps; `bytes` of host memory.
    pub fn new(kept: impl Any + Send, bytes: usize) -> Self {
        Self { kept: Box::new(kept), bytes }
    }

    /// What the engine kept, if it is of this type.
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.kept.downcast_ref()
    }

    /// Bytes of host memory that it takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl fmt::Debug for EngineRung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineRung").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

/// Local APICs that an engine has itself, in the form that the platform's are saved in. Everything here is for a machine
/// that stands still, except [`LocalApics::send`].
pub trait LocalApics {
    /// The saved form of a vCPU's local APIC. Deadlines are in the machine's TSC.
    ///
    /// # Errors
    /// No such vCPU, or the host does not give it.
    fn save(&mut self, vcpu: usize) -> Result<LapicV1, StoreError>;
    /// Puts a vCPU's local APIC into a saved state; the vCPU's own state and the clock were loaded before.
    ///
    /// # Errors
    /// No such vCPU, or the host does not take it.
    fn restore(&mut self, vcpu: usize, saved: &LapicV1) -> Result<(), LoadError>;
    /// Brings a message to the local APICs that it is for.
    ///
    /// # Errors
    /// The host does not take it.
    fn send(&mut self, message: Message) -> Result<(), LoadError>;
}

/// Ends a run that is under way in another thread, or, where none is, the next one: it comes back as if it had reached its end.
#[derive(Clone)]
pub struct Bell(Arc<dyn Fn() + Send + Sync>);

impl Bell {
    /// A bell that does this when it is rung.
    pub fn new(ring: impl Fn() + Send + Sync + 'static) -> Bell {
        Bell(Arc::new(ring))
    }

    /// Rings it.
    pub fn ring(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bell")
    }
}

/// Runs the vCPUs of one machine. Owned by one thread.
pub trait Engine {
    /// Makes what the engine needs and has not made yet, threads above all: for processes that can make none later. Without it
    /// the first [`Engine::run`] does.
    ///
    /// # Errors
    /// The host refused.
    fn prepare(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    /// What ends a run from another thread; none: the engine has none, or is not [prepared](Engine::prepare).
    fn bell(&self) -> Option<Bell> {
        None
    }
    /// Local APICs, if they are the engine's and not the platform's.
    fn local_apics(&mut self) -> Option<&mut dyn LocalApics> {
        None
    }
    /// True if the guest's time is the host's: it goes on by itself and is told by [`Engine::set_clock`] alone to stand where it
    /// stood. Such an engine counts no instructions and keeps no rungs and stops.
    fn runs_in_real_time(&self) -> bool {
        false
    }
    /// Runs until exactly `until_retired` instructions have retired over all vCPUs, or until an earlier [`Exit`]. An engine
    /// that [runs in real time](Engine::runs_in_real_time) comes back soon after, or before: when its bell is rung, and when the
    /// guest has said something.
    fn run(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit;
    /// The machine's time.
    fn clock(&self) -> Clock;
    /// Sets the machine's time: restore, and jumps over idle time.
    fn set_clock(&mut self, clock: Clock);
    /// Architectural state of a vCPU. Forgets all cached translations, so that a restored machine behaves the same.
    ///
    /// # Errors
    /// No such vCPU, or the host does not give it.
    fn store(&mut self, vcpu: usize) -> Result<CpuState, StoreError>;
    /// [`Engine::store`] without forgetting anything: the guest cannot tell that somebody looked.
    ///
    /// # Errors
    /// No such vCPU, or the host does not give it.
    fn peek(&self, vcpu: usize) -> Result<CpuState, StoreError>;
    /// Loads architectural state.
    ///
    /// # Errors
    /// No such vCPU, or a state that VMRUN would refuse.
    fn load(&mut self, vcpu: usize, state: &CpuState) -> Result<(), LoadError>;
    /// Stamps what the guest has written and the engine has not stamped yet; before the epoch advances and before stamps are
    /// read. For engines that stamp as they write there is nothing to do.
    ///
    /// # Errors
    /// The host does not say what was written.
    fn settle_stamps(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
    /// The same before its time: what is stamped already is stamped again when the epoch ends. Cheap, and for the guest nothing
    /// changes.
    ///
    /// # Errors
    /// The host does not say what was written.
    fn look_at_writes(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
    /// RAM holds what the machine had elsewhere, and none of that is the guest's doing here: only what it writes from now on is
    /// to be stamped.
    ///
    /// # Errors
    /// The host does not watch writes.
    fn watch_writes(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
    /// The epoch of page stamps advanced: the next write to every page must be stamped again.
    fn rearm_stamps(&mut self);
    /// Everything that a later run depends on, cached translations included, but RAM. The guest cannot tell that it was
    /// taken.
    fn rung(&self) -> EngineRung;
    /// Makes the engine what it was, its time included; RAM is what it was already, by writes that the engine was told of.
    /// Stops stay set.
    ///
    /// # Errors
    /// The rung is of another engine; nothing has changed.
    fn climb(&mut self, rung: &EngineRung) -> Result<(), LoadError>;
    /// Comes back there from now on; replaces what was set before. The guest cannot tell. Running again after a
    /// [`Why::Breakpoint`] executes the instruction.
    fn set_stops(&mut self, stops: &Stops);
    /// The instructions before which the vCPUs stand now are executed without a stop, as after a [`Why::Breakpoint`].
    fn pass_breakpoints(&mut self);
    /// The vCPU that runs, or ran last.
    fn current(&self) -> usize {
        0
    }
    /// Instructions that had retired over all vCPUs after this one's last; `None` if it has run none since the engine was made
    /// or climbed to a rung.
    fn last_ran(&self, vcpu: usize) -> Option<u64> {
        (vcpu == 0).then_some(self.clock().retired)
    }
    /// What may have been used since this was asked last; `None`: anything. Whoever climbs asks then, too: what was used before
    /// is no use of what comes. The guest cannot tell.
    fn take_uses(&mut self) -> Option<Uses> {
        None
    }
    /// Decodes everything anew, and no more than so many operations at once from now on: another way to do the same work.
    /// The guest cannot tell; if it can, that is a fault of the engine, which two executions show.
    fn set_block_ops_max(&mut self, _: usize) {}
    /// The VMCB that holds this vCPU now, or that holds its state where the VMCB itself is the host's.
    ///
    /// # Errors
    /// No such vCPU, or the host does not give its state.
    fn vmcb(&self, vcpu: usize) -> Result<Vmcb, StoreError>;
}
