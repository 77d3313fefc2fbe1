//! A vCPU: set-up, and `CpuState` stored from and loaded into it.
//!
//! The order of loading is fixed by what depends on what: segment and control registers decide how XCR0, MSRs and events are
//! checked; the TSC's offset comes before the local APIC, and that before its deadline, or timers never fire; what the vCPU is
//! doing comes last. Storing begins with that, because the kernel first takes INIT and start-ups that wait.

use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_enable_cap,
    kvm_mp_state, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use proto::v1::{LapicTimerV1, LapicV1};

use super::lapic::Beside;
use super::msr::{ModelMsrs, write_msr};
use super::system::KvmError;
use super::thread::Kick;
use super::time::Time;
use super::vm::Vm;
use super::xsave::Layout;
use super::{Refusal, events, lapic, no_memory, refused, registers};
use crate::capability::{CpuModel, Topology, same_rate};
use crate::cpu::{CpuState, RunState};
use crate::engine::{LoadError, StoreError};
use crate::vmcb::check::refusal;
use crate::vmcb::registers::efer;
use crate::vmcb::{Intercept, Vmcb};

const APIC_BASE: u32 = 0x1b;
/// Leaves of CPUID that have subleaves.
const LEAVES_WITH_SUBLEAVES: [u32; 2] = [7, 0xd];
const SUBLEAVES: u32 = 64;

/// A vCPU that stands still, or that its thread has.
pub(super) struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) msrs: ModelMsrs,
    pub(super) topology: Topology,
    /// By how much its TSC missed where it was put, until it runs; see `time`.
    pub(super) tsc_skew: u64,
    /// DPL of SS where it was loaded beside another CPL, until it runs: KVM has one place for both.
    pub(super) ss_dpl: Option<u8>,
    /// Its APIC's counting timer as of the instant at which it stands, if somebody knows: KVM's counts on.
    resting_timer: Option<LapicTimerV1>,
    /// That timer when the vCPU left the kernel: what expires later has not expired yet.
    left_timer: Option<lapic::LeftTimer>,
    layout: Layout,
}

impl Vcpu {
    /// A vCPU of this model, not yet loaded.
    pub(super) fn new(
        vm: &Vm,
        layout: &Layout,
        msrs: &ModelMsrs,
        model: CpuModel,
        topology: Topology,
    ) -> Result<Self, KvmError> {
        let fd = vm.create_vcpu(topology.vcpu)?;
        let cap = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, args: [1, 0, 0, 0], ..Default::default() };
        fd.enable_cap(&cap).map_err(refused("KVM_CAP_ENFORCE_PV_FEATURE_CPUID"))?;
        let table = CpuId::from_entries(&cpuid(model, &topology));
        let table = table.map_err(|_| no_memory("CPUID table"))?;
        fd.set_cpuid2(&table).map_err(refused("KVM_SET_CPUID2"))?;
        set_rate(&fd, topology.tsc_hz, vm.scales_tsc())?;
        Ok(Self {
            fd,
            msrs: msrs.clone(),
            topology,
            tsc_skew: 0,
            ss_dpl: None,
            resting_timer: None,
            left_timer: None,
            layout: layout.clone(),
        })
    }

    /// Where others say that it must come back.
    pub(super) fn kick(&mut self) -> Kick {
        let place = &raw mut self.fd.get_kvm_run().immediate_exit;
        Kick::at(NonNull::new(place.cast::<AtomicU8>()).expect("a field of a mapping"))
    }

    /// What its TSC is ahead of the machine's clock, or was asked to be.
    pub(super) fn tsc_offset(&self, time: &Time) -> Result<u64, Refusal> {
        Ok(time.own_offset(&self.fd)?.wrapping_sub(self.tsc_skew))
    }

    /// The vCPU's state.
    pub(super) fn store(&self, time: &Time) -> Result<CpuState, StoreError> {
        let mut state = CpuState::reset();
        state.run_state = run_state(self.fd.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?);
        events::store(&self.fd.get_vcpu_events().map_err(refused("KVM_GET_VCPU_EVENTS"))?, &mut state);
        registers::store_general(&self.fd.get_regs().map_err(refused("KVM_GET_REGS"))?, &mut state);
        registers::store_special(&self.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?, &mut state);
        if let Some(dpl) = self.ss_dpl {
            state.ss = registers::with_dpl(&state.ss, dpl);
        }
        registers::store_debug(&self.fd.get_debug_regs().map_err(refused("KVM_GET_DEBUGREGS"))?, &mut state);
        if state.efer & efer::SVME != 0 {
            let reason = "the guest runs guests itself: their state has no saved form".to_owned();
            return Err(StoreError::Refused { step: "nested state", reason });
        }
        let xcrs = self.fd.get_xcrs().map_err(refused("KVM_GET_XCRS"))?;
        state.xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0).map_or(1, |xcr| xcr.value);
        state.fpu = Box::new(self.layout.store(&self.fd, state.xcr0)?);
        state.msrs = self.msrs.store(&self.fd)?;
        state.tsc_offset = self.tsc_offset(time)?;
        Ok(state)
    }

    /// Takes over a state; nothing changes if VMRUN would refuse it.
    pub(super) fn load(&mut self, model: CpuModel, time: &Time, state: &CpuState) -> Result<(), LoadError> {
        check(model, state)?;
        let events = events::load(state)?;
        let before = self.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
        let special = registers::special(state, &before);
        self.fd.set_sregs(&special).map_err(refused("KVM_SET_SREGS"))?;
        self.ss_dpl = Some(state.ss.dpl()).filter(|dpl| *dpl != state.cpl);
        self.fd.set_regs(&registers::general(state)).map_err(refused("KVM_SET_REGS"))?;
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..kvm_xcr::default() };
        self.fd.set_xcrs(&xcrs).map_err(refused("KVM_SET_XCRS"))?;
        self.layout.load(&self.fd, &state.fpu)?;
        self.fd.set_debug_regs(&registers::debug(state)).map_err(refused("KVM_SET_DEBUGREGS"))?;
        self.msrs.load(&self.fd, &state.msrs)?;
        self.tsc_skew = time.set_own_offset(&self.fd, state.tsc_offset)?;
        self.fd.set_vcpu_events(&events).map_err(refused("KVM_SET_VCPU_EVENTS"))?;
        let mp_state = kvm_mp_state { mp_state: state.run_state as u32 };
        self.fd.set_mp_state(mp_state).map_err(refused("KVM_SET_MP_STATE"))?;
        self.is_what_was_loaded(time, state)
    }

    /// Refuses a state of which this host keeps something else, field by field.
    fn is_what_was_loaded(&self, time: &Time, state: &CpuState) -> Result<(), LoadError> {
        let stored = self.store(time).map_err(|error| LoadError::Illegal(error.to_string()))?;
        let lost: Vec<String> = state.compare(&stored).iter().map(ToString::to_string).collect();
        if lost.is_empty() {
            return Ok(());
        }
        let reason = format!("hardware keeps another state than was loaded: {}", lost.join("; "));
        Err(LoadError::Refused { step: "comparing", reason })
    }

    /// The saved form of its local APIC.
    pub(super) fn store_lapic(&mut self, time: &Time) -> Result<LapicV1, StoreError> {
        let waits = run_state(self.fd.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?);
        let mut page = self.fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
        if let Some(left) = self.left_timer {
            left.put_back(&mut page);
        }
        let beside = Beside {
            base: self.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?.apic_base,
            dormant: matches!(waits, RunState::Uninitialised | RunState::InitReceived),
            deadline: time.deadline(&self.fd)?,
            now: time.clock.tsc(),
            tsc_hz: self.topology.tsc_hz,
        };
        let mut saved = lapic::saved(&page, beside);
        match self.resting_timer {
            Some(timer) => saved.timer = Some(timer),
            None => self.resting_timer = lapic::counting_timer(&saved),
        }
        Ok(saved)
    }

    /// Takes over a saved local APIC; the vCPU itself was loaded before.
    pub(super) fn load_lapic(&mut self, time: &Time, saved: &LapicV1) -> Result<(), LoadError> {
        write_msr(&self.fd, APIC_BASE, saved.apic_base, "set APIC_BASE")?;
        let mut page = self.fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
        lapic::load(&mut page, self.topology.vcpu, saved, time.clock.tsc(), self.topology.tsc_hz);
        self.fd.set_lapic(&page).map_err(refused("KVM_SET_LAPIC"))?;
        self.resting_timer = lapic::counting_timer(saved);
        self.left_timer = None;
        Ok(time.arm(&self.fd, lapic::deadline(saved))?)
    }

    /// The machine's time goes on from where it stood, at this TSC: a counting timer has so much left as it had then.
    pub(super) fn start_timer(&mut self, now: u64) -> Result<(), Refusal> {
        let Some(timer) = self.resting_timer.take() else { return Ok(()) };
        let mut page = self.fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
        lapic::set_timer(&mut page, timer, now, self.topology.tsc_hz);
        self.fd.set_lapic(&page).map_err(refused("KVM_SET_LAPIC"))
    }

    /// It has left the kernel, which delivers what has expired by then; KVM's timer counts on, and whatever expires before
    /// somebody asks for the state would be in nobody's hands.
    pub(super) fn note_timer(&mut self) {
        // Without an answer the timer is taken as it is found when it is asked for.
        self.left_timer = self.fd.get_lapic().ok().map(|page| lapic::LeftTimer::of(&page));
    }

    /// The machine's time has gone on by itself, and the timer with it.
    pub(super) fn forget_timer(&mut self) {
        self.resting_timer = None;
        self.left_timer = None;
    }
}

/// Refuses what VMRUN would refuse, by name; KVM would say no more than EINVAL.
fn check(model: CpuModel, state: &CpuState) -> Result<(), LoadError> {
    let mut vmcb = Vmcb::boxed();
    vmcb.control.set_intercept(Intercept::VMRUN, true);
    vmcb.control.guest_asid = 1;
    state.to_vmcb(&mut vmcb);
    refusal(&vmcb, model.limits()).map_or(Ok(()), |reasons| Err(LoadError::Illegal(reasons)))
}

fn run_state(state: kvm_mp_state) -> RunState {
    match state.mp_state {
        1 => RunState::Uninitialised,
        2 => RunState::InitReceived,
        3 => RunState::Halted,
        // A start-up that was received is taken by the next entry; the kernel shows it as runnable by then.
        _ => RunState::Runnable,
    }
}

/// Gives the guest its TSC rate: the host's own, one that KVM takes for equal, or a scaled one.
fn set_rate(fd: &VcpuFd, tsc_hz: u64, scales: bool) -> Result<(), KvmError> {
    let guest_khz = tsc_hz / 1000;
    let host_khz = u64::from(fd.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))?);
    if guest_khz == host_khz {
        return Ok(());
    }
    let refusal = KvmError::TscRate { guest_khz, host_khz };
    // Without scaling the kernel takes faster rates too, and makes the TSC jump at each entry: that is no clock.
    match u32::try_from(guest_khz) {
        Ok(khz) if (scales || same_rate(guest_khz, host_khz)) && fd.set_tsc_khz(khz).is_ok() => Ok(()),
        _ => Err(refusal),
    }
}

/// The table of KVM_SET_CPUID2 (KVM API 4.78). What it does not list reads as zeros.
fn cpuid(model: CpuModel, topology: &Topology) -> Vec<kvm_cpuid_entry2> {
    let mut entries = Vec::new();
    for range in [0, 0x4000_0000, 0x8000_0000] {
        let [last, ..] = model.cpuid(range, 0, topology);
        for leaf in range..=last.max(range) {
            let several = LEAVES_WITH_SUBLEAVES.contains(&leaf);
            for subleaf in 0..if several { SUBLEAVES } else { 1 } {
                let [eax, ebx, ecx, edx] = model.cpuid(leaf, subleaf, topology);
                if [eax, ebx, ecx, edx] != [0; 4] {
                    let flags = if several { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
                    let entry = kvm_cpuid_entry2 {
                        function: leaf,
                        index: subleaf,
                        flags,
                        eax,
                        ebx,
                        ecx,
                        edx,
                        ..Default::default()
                    };
                    entries.push(entry);
                }
            }
        }
    }
    entries
}
