//! The host of the software engine: a small hypervisor that runs each vCPU's VMCB on a software processor.
//!
//! | file | what |
//! |---|---|
//! | `npt` | nested tables and permission maps |
//! | `exits` | what the host does with each #VMEXIT |
//! | `msr` | MSRs that the host keeps for the guest |
//! | `state` | between `CpuState` and processor plus VMCB |
//! | `rung` | all of it, to come back to |
//! | `wake` | interrupts, INIT, start-up, NMI: what starts and stops a vCPU |
//!
//! The loop stops at `until`, at the platform's next deadline, and at exits; only there does the outside world reach the
//! guest. It looks at interrupts again after each stop, so where it stops is never visible to the guest.
//!
//! vCPUs take turns on one global count of instructions. Which one runs is a function of that count and of who is awake:
//! the vCPU whose turn of [`TURN`] instructions it is, or the next one awake. Nothing of the schedule is state.

mod exits;
mod msr;
mod npt;
mod rung;
mod state;
mod wake;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::block::OPS_MAX;
use super::core::Core;
use super::svm::enter::HostTsc;
use super::tlb::Cached;
use crate::capability::{CpuModel, Topology};
use crate::cpu::{CpuState, RunState};
use crate::engine::{Clock, Engine, EngineRung, Exit, LoadError, Platform, Stops, StoreError, Uses};
use crate::memory::GuestMemory;
use crate::vmcb::control::V_INTR_MASKING;
use crate::vmcb::{Intercept, Vmcb, tlb_control};

/// How the engine does its work. No guest can tell one tuning from another but by stale translations: a guest that changes its
/// page tables and relies on what is cached sees how many entries the TLB has, so that the default's are part of
/// [`crate::journal::SEMANTICS`]. For tests and measurements; no configuration reaches it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuning {
    /// How often the tables of the TLB are halved; see [`super::tlb::Tlb::halve`].
    pub tlb_halvings: u32,
    /// Most operations of a decoded block, 1 to [`OPS_MAX`].
    pub block_ops_max: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { tlb_halvings: 0, block_ops_max: OPS_MAX }
    }
}

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
    /// How it does its work.
    pub tuning: Tuning,
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

/// Instructions of a vCPU's turn.
pub const TURN: u64 = 5000;

/// The software engine.
pub struct SoftEngine {
    vcpus: Vec<Vcpu>,
    memory: Arc<GuestMemory>,
    /// The vCPU that runs, or ran last.
    current: usize,
    model: CpuModel,
    clock: Clock,
    stops: Stops,
    /// What `clock` said after the last instruction of each vCPU; 0 if it has run none in this engine. No state.
    last_ran: Vec<u64>,
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
        core.shares_memory = config.vcpus > 1;
        core.tlb.halve(config.tuning.tlb_halvings);
        core.block_ops_max = config.tuning.block_ops_max.clamp(1, OPS_MAX);
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
}

impl SoftEngine {
    /// An engine whose vCPUs are as the model powers them up.
    pub fn new(memory: Arc<GuestMemory>, config: &SoftConfig) -> Self {
        let vcpus: Vec<Vcpu> = (0..config.vcpus.max(1)).map(|vcpu| Vcpu::new(&memory, config, vcpu)).collect();
        let clock = Clock { retired: 0, skipped_tsc: 0, tsc_per_instruction: config.tsc_per_instruction };
        let last_ran = vec![0; vcpus.len()];
        Self { vcpus, memory, current: 0, model: config.model, clock, stops: Stops::default(), last_ran }
    }

    /// What a vCPU has cached: see [`super::tlb::Tlb::contents`].
    pub fn translations(&self, vcpu: usize) -> Vec<Cached> {
        self.vcpus[vcpu].core.tlb.contents()
    }

    /// The vCPU that runs now, woken if it must be; `None` if all sleep.
    fn choose(&mut self, platform: &mut dyn Platform) -> Option<usize> {
        let count = self.vcpus.len();
        let turn = (self.clock.retired / TURN) as usize % count;
        (turn..turn + count).map(|index| index % count).find(|index| self.vcpus[*index].awake(platform))
    }

    /// Makes `index` the vCPU that runs: it learns where others have decoded code since it ran.
    fn switch_to(&mut self, platform: &mut dyn Platform, index: usize) {
        if index == self.current {
            return;
        }
        let pages = std::mem::take(&mut self.vcpus[self.current].core.new_code_pages);
        for vcpu in &mut self.vcpus {
            pages.iter().for_each(|page| vcpu.core.tlb.protect_code(*page));
        }
        self.current = index;
        platform.executing(index);
    }

    /// Devices, the host, or another processor wrote to code that was decoded.
    fn drop_written_code(&mut self) {
        let written = self.memory.stamps().take_written_code();
        for vcpu in &mut self.vcpus {
            vcpu.core.drop_code(&written);
        }
        written.iter().for_each(|page| self.memory.stamps().clear_code_lines(*page));
    }

    /// Where the chosen vCPU must stop at the latest.
    fn stop_point(&self, platform: &dyn Platform, until_retired: u64) -> u64 {
        let retired = self.clock.retired;
        // A deadline that has passed and was not moved by `tick` must not stop the guest for ever.
        let deadline = platform.next_deadline().map_or(u64::MAX, |deadline| self.clock.retired_at(deadline));
        let turn = if self.vcpus.len() > 1 { (retired / TURN + 1) * TURN } else { u64::MAX };
        // Nothing exits when the guest becomes able to take an NMI, so that is looked at after every instruction.
        let nmi = if self.vcpus[self.current].nmi_pending { retired + 1 } else { u64::MAX };
        until_retired.min(deadline.max(retired + 1)).min(turn).min(nmi)
    }

    fn host_tsc(&self) -> HostTsc {
        HostTsc(self.clock.skipped_tsc)
    }

    /// Runs the current vCPU to `stop_at` or to its next exit, and handles that.
    fn enter(&mut self, platform: &mut dyn Platform, stop_at: u64) -> Result<(), Exit> {
        let tsc = self.host_tsc();
        let vcpu = &mut self.vcpus[self.current];
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
            self.drop_written_code();
            self.take_requests(platform);
            if self.vcpus.iter().any(|vcpu| vcpu.shut_down) {
                return Exit::Shutdown;
            }
            if self.clock.retired >= until_retired {
                return Exit::Reached;
            }
            let Some(index) = self.choose(platform) else { return Exit::Halted };
            self.switch_to(platform, index);
            self.vcpus[index].offer_interrupts(platform);
            let stop_at = self.stop_point(platform, until_retired);
            let before = self.clock.retired;
            let entered = self.enter(platform, stop_at);
            if self.clock.retired > before {
                self.last_ran[index] = self.clock.retired;
            }
            // Whatever ended it: what was met is told now or never.
            let met = self.vcpus[index].core.take_stop();
            match (entered, met) {
                (Err(exit), _) => return exit,
                (Ok(()), Some(why)) => return Exit::Stop { vcpu: index, why },
                (Ok(()), None) => {}
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

    fn store(&mut self, vcpu: usize) -> Result<CpuState, StoreError> {
        self.vcpus.get_mut(vcpu).map(Vcpu::store).ok_or(StoreError::NoVcpu(vcpu))
    }

    fn peek(&self, vcpu: usize) -> Result<CpuState, StoreError> {
        self.vcpus.get(vcpu).map(Vcpu::peek).ok_or(StoreError::NoVcpu(vcpu))
    }

    fn load(&mut self, vcpu: usize, state: &CpuState) -> Result<(), LoadError> {
        self.vcpus.get_mut(vcpu).ok_or(LoadError::NoVcpu(vcpu))?.load(state)
    }

    fn rearm_stamps(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.core.tlb.rearm();
        }
    }

    fn rung(&self) -> EngineRung {
        self.take_rung()
    }

    fn climb(&mut self, rung: &EngineRung) -> Result<(), LoadError> {
        self.climb_to(rung)
    }

    fn set_stops(&mut self, stops: &Stops) {
        self.stops = stops.clone();
        for vcpu in &mut self.vcpus {
            vcpu.core.set_stops(stops);
        }
    }

    fn pass_breakpoints(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.core.set_retired(self.clock.retired);
            let linear = vcpu.peek().code_address();
            vcpu.core.pass_breakpoint(linear);
        }
    }

    fn current(&self) -> usize {
        self.current
    }

    fn last_ran(&self, vcpu: usize) -> Option<u64> {
        self.last_ran.get(vcpu).copied().filter(|retired| *retired > 0)
    }

    fn take_uses(&mut self) -> Option<Uses> {
        // Each is asked, whatever the others say.
        let uses: Vec<Option<Uses>> = self.vcpus.iter_mut().map(|vcpu| vcpu.core.take_uses()).collect();
        let mut all = Uses::default();
        for uses in uses {
            all.add(&uses?);
        }
        Some(all)
    }

    fn set_block_ops_max(&mut self, ops_max: usize) {
        self.forget_all_code();
        for vcpu in &mut self.vcpus {
            vcpu.core.block_ops_max = ops_max.clamp(1, OPS_MAX);
        }
    }

    fn vmcb(&self, vcpu: usize) -> Result<Vmcb, StoreError> {
        let vcpu = self.vcpus.get(vcpu).ok_or(StoreError::NoVcpu(vcpu))?;
        let mut vmcb = (*vcpu.vmcb).clone();
        vcpu.core.vmsave(&mut vmcb.save);
        Ok(vmcb)
    }
}
