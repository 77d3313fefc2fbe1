//! The host of the software engine: a small hypervisor that runs each vCPU's VMCB on a software processor.
//!
//! | file | what |
//! |---|---|
//! | `npt` | nested tables and permission maps |
//! | `exits` | what the host does with each #VMEXIT |
//! | `msr` | MSRs that the host keeps for the guest |
//! | `state` | between `CpuState` and processor plus VMCB |
//!
//! The loop stops at `until`, at the platform's next deadline, and at exits; only there does the outside world reach the
//! guest. It looks at interrupts again after each stop, so where it stops is never visible to the guest. One vCPU runs;
//! further ones wait for an INIT that nobody can send yet.

mod exits;
mod msr;
mod npt;
mod state;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::core::Core;
use super::svm::enter::HostTsc;
use crate::capability::{CpuModel, Topology};
use crate::cpu::{CpuState, RunState};
use crate::engine::{Clock, Engine, Exit, LoadError, Platform};
use crate::memory::GuestMemory;
use crate::vmcb::control::{V_IGN_TPR, V_INTR_MASKING, V_INTR_PRIO, V_INTR_VECTOR, V_IRQ, V_TPR};
use crate::vmcb::registers::rflags;
use crate::vmcb::{Event, Intercept, Vmcb, tlb_control};

/// What a software engine is built for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SoftConfig {
    /// vCPUs of the machine.
    pub vcpus: u32,
    /// CPU contract.
    pub model: CpuModel,
    /// Guest TSC frequency, as CPUID tells it.
    pub tsc_hz: u64,
    /// TSC ticks that an instruction takes.
    pub tsc_per_instruction: u32,
}

/// One vCPU: its processor, its VMCB, and what neither holds.
struct Vcpu {
    core: Box<Core>,
    vmcb: Box<Vmcb>,
    topology: Topology,
    msrs: BTreeMap<u32, u64>,
    xcr0: u64,
    run_state: RunState,
    nmi_pending: bool,
    /// The guest shut down: nothing but a new state makes it run again.
    shut_down: bool,
}

/// The software engine.
pub struct SoftEngine {
    vcpus: Vec<Vcpu>,
    model: CpuModel,
    clock: Clock,
}

/// What the host does intercept. CR8 writes, so that the local APIC sees every change of priority at once.
const INTERCEPTS: [Intercept; 27] = [
    Intercept::INTR,
    Intercept::NMI,
    Intercept::SMI,
    Intercept::INIT,
    Intercept::cr_write(8),
    Intercept::CPUID,
    Intercept::HLT,
    Intercept::INVD,
    Intercept::WBINVD,
    Intercept::INVLPGA,
    Intercept::IOIO_PROT,
    Intercept::MSR_PROT,
    Intercept::RDPMC,
    Intercept::TASK_SWITCH,
    Intercept::SHUTDOWN,
    Intercept::VMRUN,
    Intercept::VMMCALL,
    Intercept::VMLOAD,
    Intercept::VMSAVE,
    Intercept::STGI,
    Intercept::CLGI,
    Intercept::SKINIT,
    Intercept::MONITOR,
    Intercept::MWAIT,
    Intercept::XSETBV,
    Intercept::RDPRU,
    Intercept::RSM,
];

impl Vcpu {
    fn new(memory: &Arc<GuestMemory>, config: &SoftConfig, vcpu: u32) -> Self {
        let topology = Topology { vcpu, vcpus: config.vcpus, tsc_hz: config.tsc_hz };
        let mut core = Core::new(Arc::clone(memory));
        core.limits = config.model.limits();
        core.tsc_per_instruction = config.tsc_per_instruction.into();
        let mut vmcb = Vmcb::boxed();
        let control = &mut vmcb.control;
        for which in INTERCEPTS {
            control.set_intercept(which, true);
        }
        control.guest_asid = vcpu + 1;
        control.np_enable = 1;
        control.n_cr3 = npt::nested_tables(&mut core.arena, memory);
        control.iopm_base_pa = npt::io_permissions(&mut core.arena);
        control.msrpm_base_pa = npt::msr_permissions(&mut core.arena);
        control.vintr = V_INTR_MASKING.mask();
        let mut vcpu = Self {
            core,
            vmcb,
            topology,
            msrs: BTreeMap::new(),
            xcr0: 1,
            run_state: RunState::Runnable,
            nmi_pending: false,
            shut_down: false,
        };
        vcpu.load(&config.model.power_up(&topology)).expect("the model's power-up state is legal");
        vcpu
    }

    fn halted(&self) -> bool {
        self.run_state != RunState::Runnable
    }

    /// Injects what waits, if the guest can take it now; else asks to be told when it can. False: the guest sleeps on.
    fn offer_interrupts(&mut self, platform: &mut dyn Platform, index: usize) -> bool {
        let pending = platform.pending_interrupt(index);
        V_TPR.put(&mut self.vmcb.control.vintr, u64::from(platform.cr8(index) & 15));
        let takes_nmi = self.nmi_pending && !self.core.events.nmi_masked;
        let enabled = self.vmcb.save.rflags & rflags::IF != 0;
        if self.run_state == RunState::Halted && (takes_nmi || (pending.is_some() && enabled)) {
            self.run_state = RunState::Runnable;
        }
        if self.halted() {
            return false;
        }
        let control = &mut self.vmcb.control;
        let free = !control.injected_event().valid() && !control.in_interrupt_shadow();
        let mut waits = pending.is_some();
        if takes_nmi && free {
            control.eventinj = Event::nmi().0;
            self.nmi_pending = false;
        } else if let Some(vector) = pending
            && free
            && enabled
        {
            platform.acknowledge(index, vector);
            control.eventinj = Event::interrupt(vector).0;
            waits = platform.pending_interrupt(index).is_some();
        }
        self.request_window(waits);
        true
    }

    /// A virtual interrupt that is never delivered: its intercept says when one could be (APM2 15.21.5).
    fn request_window(&mut self, wanted: bool) {
        let control = &mut self.vmcb.control;
        V_IRQ.put(&mut control.vintr, u64::from(wanted));
        V_IGN_TPR.put(&mut control.vintr, u64::from(wanted));
        V_INTR_PRIO.put(&mut control.vintr, 0);
        V_INTR_VECTOR.put(&mut control.vintr, 0);
        control.set_intercept(Intercept::VINTR, wanted);
    }
}

impl SoftEngine {
    /// An engine whose vCPUs are as the model powers them up.
    pub fn new(memory: Arc<GuestMemory>, config: &SoftConfig) -> Self {
        let vcpus = (0..config.vcpus.max(1)).map(|vcpu| Vcpu::new(&memory, config, vcpu)).collect();
        let clock = Clock { retired: 0, skipped_tsc: 0, tsc_per_instruction: config.tsc_per_instruction };
        Self { vcpus, model: config.model, clock }
    }

    fn host_tsc(&self) -> HostTsc {
        HostTsc(self.clock.skipped_tsc)
    }

    /// Runs the first vCPU to `stop_at` or to its next exit, and handles that.
    fn enter(&mut self, platform: &mut dyn Platform, stop_at: u64) -> Result<(), Exit> {
        let tsc = self.host_tsc();
        let vcpu = &mut self.vcpus[0];
        vcpu.core.set_retired(self.clock.retired);
        let code = vcpu.core.vmrun(&mut vcpu.vmcb, tsc, stop_at);
        vcpu.vmcb.control.tlb_control = tlb_control::NONE;
        self.clock.retired = vcpu.core.retired();
        self.handle(platform, code)
    }
}

impl Engine for SoftEngine {
    fn run(&mut self, platform: &mut dyn Platform, until_retired: u64) -> Exit {
        loop {
            if platform.stopped() {
                return Exit::Stopped;
            }
            let tsc = self.clock.tsc();
            if platform.next_deadline().is_some_and(|deadline| deadline <= tsc) {
                platform.tick(tsc);
            }
            let vcpu = &mut self.vcpus[0];
            vcpu.core.drop_written_code();
            if vcpu.shut_down {
                return Exit::Shutdown;
            }
            if self.clock.retired >= until_retired {
                return Exit::Reached;
            }
            if !vcpu.offer_interrupts(platform, 0) {
                return Exit::Halted;
            }
            // A deadline that has passed and was not moved by `tick` must not stop the guest for ever.
            let deadline = platform.next_deadline().map_or(u64::MAX, |deadline| self.clock.retired_at(deadline));
            let stop_at = until_retired.min(deadline.max(self.clock.retired + 1));
            if let Err(exit) = self.enter(platform, stop_at) {
                return exit;
            }
        }
    }

    fn clock(&self) -> Clock {
        self.clock
    }

    fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
        for vcpu in &mut self.vcpus {
            vcpu.core.tsc_per_instruction = clock.tsc_per_instruction.into();
        }
    }

    fn store(&mut self, vcpu: usize) -> CpuState {
        self.vcpus[vcpu].store()
    }

    fn load(&mut self, vcpu: usize, state: &CpuState) -> Result<(), LoadError> {
        self.vcpus.get_mut(vcpu).ok_or(LoadError::NoVcpu(vcpu))?.load(state)
    }

    fn rearm_stamps(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.core.tlb.rearm();
        }
    }

    fn vmcb(&self, vcpu: usize) -> Vmcb {
        let vcpu = &self.vcpus[vcpu];
        let mut vmcb = (*vcpu.vmcb).clone();
        vcpu.core.vmsave(&mut vmcb.save);
        vmcb
    }
}
