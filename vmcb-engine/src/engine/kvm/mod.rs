//! Hardware SVM through Linux KVM.
//!
//! | file | what |
//! |---|---|
//! | `system` | `/dev/kvm`: what it must have, and why it cannot be used |
//! | `host` | what a host's KVM has to offer to guests |
//! | `vm` | a virtual machine: memory, interrupt routing, MSR filter, dirty log |
//! | `vcpu` | a vCPU: set-up, and `CpuState` stored from and loaded into it |
//! | `registers` | general, segment, control and debug registers |
//! | `events` | interrupts, exceptions and NMIs in flight |
//! | `xsave` | the XSAVE area, component by component |
//! | `msr` | which MSRs KVM has, and which are kept here |
//! | `lapic` | KVM's local APIC and its saved form |
//! | `time` | the machine's clock on the guest's TSC |
//! | `thread` | the threads that run vCPUs, and how they are called back |
//! | `exits` | why a vCPU came back, and what is answered |
//! | `run` | all vCPUs until there is a reason to stop |
//! | `ioctl` | what kvm-ioctls does not have |
//!
//! The kernel has the local APICs and the TSC-deadline timer (split irqchip); the IOAPIC and all else is the platform's, and
//! so are kvm-clock and every MSR that the processor itself does not need: the MSR filter sends the guest's accesses here.
//! One saved form therefore serves both engines.
//!
//! A vCPU belongs to its thread while it runs and to the engine's while it does not; it travels between them by value. When
//! [`KvmEngine::run`](crate::engine::Engine::run) returns, every vCPU is out of the kernel and the access that it may have
//! left with is complete, so what is stored is what stopped.
//!
//! Sources: Linux `Documentation/virt/kvm/api.rst` (KVM API below, by section). This room refuses to know devices, which CPU
//! model is whose, and the wall clock.
#![allow(unsafe_code, reason = "ioctls with pointers, and the page that a vCPU shares with the kernel")]

mod events;
mod exits;
mod host;
mod ioctl;
mod lapic;
mod msr;
mod registers;
mod run;
mod system;
#[cfg(test)]
mod tests;
mod thread;
mod time;
mod vcpu;
mod vm;
mod xsave;

use std::sync::Arc;

use proto::v1::LapicV1;

pub use self::host::capabilities;
use self::msr::ModelMsrs;
pub use self::system::{DEVICE, KvmError};
use self::thread::Crew;
use self::time::Time;
use self::vcpu::Vcpu;
use self::vm::Vm;
use crate::capability::{CpuModel, Topology};
use crate::cpu::CpuState;
use crate::device::lapic::Message;
use crate::engine::{Bell, Clock, Engine, EngineRung, Exit, LoadError, LocalApics, Platform, Stops, StoreError};
use crate::memory::GuestMemory;
use crate::vmcb::{Intercept, Vmcb};

/// What a KVM engine is built for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvmConfig {
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// CPU contract.
    pub model: CpuModel,
    /// Guest TSC frequency; the host's own, or one that the host can scale to.
    pub tsc_hz: u64,
    /// TSC ticks that count as an instruction.
    pub tsc_per_instruction: u32,
}

/// An answer of the kernel that was not expected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{step}: {source}")]
struct Refusal {
    step: &'static str,
    source: vmm_sys_util::errno::Error,
}

/// Says of a failed call what it was for.
fn refused(step: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> Refusal {
    move |source| Refusal { step, source }
}

/// A list that has no room in memory.
fn no_memory(step: &'static str) -> Refusal {
    refused(step)(vmm_sys_util::errno::Error::new(libc::ENOMEM))
}

impl From<Refusal> for StoreError {
    fn from(Refusal { step, source }: Refusal) -> Self {
        StoreError::Refused { step, reason: source.to_string() }
    }
}

impl From<Refusal> for LoadError {
    fn from(Refusal { step, source }: Refusal) -> Self {
        LoadError::Refused { step, reason: source.to_string() }
    }
}

/// The KVM engine.
pub struct KvmEngine {
    // In the order in which they end: threads, vCPUs, and then their VM.
    crew: Option<Crew>,
    vcpus: Vec<Option<Vcpu>>,
    vm: Vm,
    time: Time,
    memory: Arc<GuestMemory>,
    model: CpuModel,
}

impl KvmEngine {
    /// An engine whose vCPUs are as the model powers them up.
    ///
    /// # Errors
    /// There is no KVM here that can run it.
    pub fn new(memory: Arc<GuestMemory>, config: &KvmConfig) -> Result<Self, KvmError> {
        let kvm = system::open()?;
        let vm = Vm::new(&kvm, &memory, config.model)?;
        let layout = xsave::Layout::of(&kvm)?;
        let msrs = ModelMsrs::new(&kvm, config.model)?;
        let topology = |vcpu| Topology { vcpu, vcpus: config.vcpus, tsc_hz: config.tsc_hz };
        let mut vcpus = Vec::new();
        for vcpu in 0..config.vcpus {
            vcpus.push(Some(Vcpu::new(&vm, &layout, &msrs, config.model, topology(vcpu))?));
        }
        let time = Time::new(config.tsc_hz, config.tsc_per_instruction);
        let mut engine = Self { crew: None, vcpus, vm, time, memory, model: config.model };
        for vcpu in 0..config.vcpus {
            engine.load(vcpu as usize, &config.model.power_up(&topology(vcpu))).map_err(KvmError::PowerUp)?;
        }
        Ok(engine)
    }

    /// A vCPU that stands still.
    fn standing(&self, vcpu: usize) -> Result<&Vcpu, StoreError> {
        self.vcpus.get(vcpu).and_then(Option::as_ref).ok_or(StoreError::NoVcpu(vcpu))
    }

    /// The same, to be changed.
    fn standing_mut(vcpus: &mut [Option<Vcpu>], vcpu: usize) -> Result<&mut Vcpu, LoadError> {
        vcpus.get_mut(vcpu).and_then(Option::as_mut).ok_or(LoadError::NoVcpu(vcpu))
    }
}

impl Engine for KvmEngine {
    fn prepare(&mut self) -> std::io::Result<()> {
        if self.crew.is_none() {
            let kicks = self.vcpus.iter_mut().flatten().map(Vcpu::kick).collect();
            self.crew = Some(Crew::hire(kicks)?);
        }
        Ok(())
    }

    fn bell(&self) -> Option<Bell> {
        self.crew.as_ref().map(Crew::bell)
    }

    fn local_apics(&mut self) -> Option<&mut dyn LocalApics> {
        Some(self)
    }

    fn runs_in_real_time(&self) -> bool {
        true
    }

    fn run(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        self.run_until(platform, until_retired)
    }

    fn clock(&self) -> Clock {
        self.time.clock
    }

    fn set_clock(&mut self, clock: Clock) {
        self.time.set(clock);
    }

    fn store(&mut self, vcpu: usize) -> Result<CpuState, StoreError> {
        self.peek(vcpu)
    }

    fn peek(&self, vcpu: usize) -> Result<CpuState, StoreError> {
        self.standing(vcpu)?.store(&self.time)
    }

    fn load(&mut self, vcpu: usize, state: &CpuState) -> Result<(), LoadError> {
        Self::standing_mut(&mut self.vcpus, vcpu)?.load(self.model, &self.time, state)?;
        self.time.unsettle();
        Ok(())
    }

    fn settle_stamps(&mut self) -> Result<(), StoreError> {
        Ok(self.vm.settle_stamps(&self.memory)?)
    }

    fn look_at_writes(&mut self) -> Result<(), StoreError> {
        Ok(self.vm.look_at_writes(&self.memory)?)
    }

    fn watch_writes(&mut self) -> Result<(), StoreError> {
        Ok(self.vm.watch_writes()?)
    }

    fn rearm_stamps(&mut self) {
        // Pages were protected again when their writes were read.
    }

    fn rung(&self) -> EngineRung {
        EngineRung::new((), 0)
    }

    fn climb(&mut self, _rung: &EngineRung) -> Result<(), LoadError> {
        Err(LoadError::Illegal("hardware keeps no rungs".to_owned()))
    }

    fn set_stops(&mut self, _stops: &Stops) {}

    fn pass_breakpoints(&mut self) {}

    fn vmcb(&self, vcpu: usize) -> Result<Vmcb, StoreError> {
        let mut vmcb = Vmcb::default();
        self.peek(vcpu)?.to_vmcb(&mut vmcb);
        // Of the control area the kernel shows nothing; what any hypervisor must set is set.
        vmcb.control.set_intercept(Intercept::VMRUN, true);
        vmcb.control.guest_asid = vcpu as u32 + 1;
        vmcb.control.np_enable = 1;
        Ok(vmcb)
    }
}

impl LocalApics for KvmEngine {
    fn save(&mut self, vcpu: usize) -> Result<LapicV1, StoreError> {
        let standing = self.vcpus.get_mut(vcpu).and_then(Option::as_mut);
        standing.ok_or(StoreError::NoVcpu(vcpu))?.store_lapic(&self.time)
    }

    fn restore(&mut self, vcpu: usize, saved: &LapicV1) -> Result<(), LoadError> {
        Self::standing_mut(&mut self.vcpus, vcpu)?.load_lapic(&self.time, saved)?;
        for message in lapic::requests(vcpu, saved) {
            self.vm.signal(message)?;
        }
        Ok(())
    }

    fn send(&mut self, message: Message) -> Result<(), LoadError> {
        Ok(self.vm.signal(message)?)
    }
}
