//! What is loaded is what is stored, whatever it is, as far as hardware keeps it. Skipped aloud where there is no KVM.

use proptest::prelude::*;

use super::*;
use crate::cpu::{FxState, RunState};
use crate::device::lapic::Lapic;
use crate::vmcb::registers::{cr0, cr4, efer, rflags};
use crate::vmcb::{Event, Segment};

const RAM_BYTES: u64 = 16 << 20;

/// An engine on this host, at its own TSC rate.
fn engine(vcpus: u32) -> Option<KvmEngine> {
    let host = match capabilities() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    let memory = Arc::new(GuestMemory::create(RAM_BYTES).unwrap());
    let tsc_hz = host.facts.tsc_khz * 1000;
    let config = KvmConfig { vcpus, model: CpuModel::X86V2, tsc_hz, tsc_per_instruction: 4 };
    Some(KvmEngine::new(memory, &config).unwrap())
}

fn segment(selector: u16, attrib: u16, base: u64) -> Segment {
    Segment::new(selector, attrib, u32::MAX, base)
}

/// Registers of a 64-bit kernel or user, as a guest has them.
fn state() -> impl Strategy<Value = CpuState> {
    let words = (any::<[u64; 16]>(), any::<[u32; 4]>(), any::<[u64; 4]>(), any::<[bool; 6]>());
    let parts = (words, any::<[u8; 16]>(), 0..256_u64, prop_oneof![Just(0_u8), Just(3)], 0..16_u64, 32..=255_u8);
    parts.prop_map(|((gprs, bases, xmms, flags), drs, page, cpl, cr8, vector)| {
        let canonical = |word: u64| word & 0x7fff_ffff_ffff;
        let mut state = CpuModel::X86V2.power_up(&Topology { vcpu: 0, vcpus: 1, tsc_hz: 1_000_000_000 });
        (state.gprs, state.rip, state.cpl) = (gprs, canonical(gprs[3]), cpl);
        state.rflags = 2 | gprs[0] & (rflags::CF | rflags::ZF | rflags::DF | rflags::AC | rflags::ID | rflags::IF);
        let dpl = u16::from(cpl) << 5;
        // SYSRET to a user leaves the DPL of SS as the kernel had it.
        let ss_dpl = if flags[5] { dpl } else { 0 };
        (state.cs, state.ss) =
            (segment(0x10 | u16::from(cpl), 0xa9b | dpl, 0), segment(0x18 | u16::from(cpl), 0xc93 | ss_dpl, 0));
        for (place, base) in [&mut state.ds, &mut state.es].into_iter().zip(bases) {
            *place = segment(0x23, 0xcf3, base.into());
        }
        (state.fs, state.gs) = (segment(0, 0xcf3, canonical(gprs[1])), segment(0, 0xcf3, canonical(gprs[2])));
        state.tr = Segment::new(0x40, 0x8b, 0x67, canonical(gprs[4]));
        state.ldtr = Segment::new(0x48, 0x82, 0xff, canonical(gprs[5]));
        state.gdtr = Segment::new(0, 0, 0x7f, canonical(gprs[6]));
        state.idtr = Segment::new(0, 0, 0xfff, canonical(gprs[7]));
        state.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
        state.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        (state.cr2, state.cr3, state.cr8) = (gprs[8], page << 12, cr8);
        state.drs = [canonical(gprs[9]), 0, canonical(gprs[10]), 4, 0xffff_0ff0 | u64::from(drs[0] & 15), 0x400];
        for (msr, value) in [(0xc000_0081, gprs[11]), (0xc000_0082, canonical(gprs[12])), (0x174, 0x10), (0x200, 0)] {
            state.msrs.insert(msr, value);
        }
        // A 64-bit guest writes addresses, of which the processor uses 32 bits.
        state.msrs.extend([(0x175, canonical(gprs[13])), (0x176, canonical(gprs[14]))]);
        state.msrs.insert(0x4b56_4d01, u64::from(bases[3]) & !3 | 1);
        let mut fpu = FxState::fninit();
        xmms.iter().enumerate().for_each(|(n, word)| fpu.set_xmm(4 * n, u128::from(*word) << 64 | 0xabc));
        fpu.set_mxcsr(0x1f80 | u32::from(drs[1] & 0x3f));
        fpu.set_ftw(1);
        fpu.set_st(0, [1, 2, 3, 4, 5, 6, 7, 0x88, 0xff, 0x3f]);
        state.fpu = Box::new(fpu);
        state.event_injection = if flags[0] { Event::interrupt(vector) } else { Event::NONE };
        (state.interrupt_shadow, state.nmi_masked, state.nmi_pending) = (flags[1], flags[2], flags[3]);
        state.run_state = if flags[4] { RunState::Halted } else { RunState::Runnable };
        state
    })
}

/// What hardware does not keep: the last x87 instruction and operand of a guest without a pending exception, on processors
/// that do not say otherwise (APM2 11.5.9, RstrFpErrPtrs).
fn kept(mut state: CpuState) -> CpuState {
    state.fpu.set_fop(0);
    state.fpu.set_fip(0);
    state.fpu.set_fdp(0);
    state
}

#[test]
fn whatever_is_loaded_is_stored() {
    let Some(engine) = engine(1) else { return };
    let engine = std::cell::RefCell::new(engine);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(64));
    let states = (state(), 0..1_u64 << 40);
    runner
        .run(&states, |(state, tsc_offset)| {
            let mut engine = engine.borrow_mut();
            let state = CpuState { tsc_offset, ..state };
            engine.load(0, &state).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let stored = engine.store(0).unwrap();
            prop_assert_eq!(kept(stored).compare(&kept(state)), []);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_state_that_vmrun_refuses_is_refused_by_name_and_changes_nothing() {
    let Some(mut engine) = engine(1) else { return };
    let before = engine.store(0).unwrap();
    let refused = CpuState { cr0: cr0::NW, ..before.clone() };
    let error = engine.load(0, &refused).unwrap_err().to_string();
    assert!(error.contains("CR0"), "{error}");
    let software = CpuState { event_injection: Event::new(crate::vmcb::EventType::Software, 3), ..before.clone() };
    assert!(engine.load(0, &software).is_err());
    let mut tiles = before.clone();
    tiles.fpu.later.insert(18, vec![0; 8192]);
    assert!(engine.load(0, &tiles).unwrap_err().to_string().contains("component 18"));
    assert_eq!(engine.store(0).unwrap().rip, before.rip);
    assert_eq!(engine.load(1, &before), Err(LoadError::NoVcpu(1)));
    assert_eq!(engine.store(1), Err(StoreError::NoVcpu(1)));
}

#[test]
fn a_tsc_rate_that_the_host_has_not_is_refused() {
    let Ok(host) = capabilities() else {
        return eprintln!("skipped: no KVM");
    };
    if host.facts.tsc_scaling {
        return eprintln!("skipped: this host scales the TSC");
    }
    let memory = Arc::new(GuestMemory::create(RAM_BYTES).unwrap());
    let tsc_hz = host.facts.tsc_khz * 2000;
    let config = KvmConfig { vcpus: 1, model: CpuModel::X86V2, tsc_hz, tsc_per_instruction: 4 };
    let refused = KvmEngine::new(memory, &config).err();
    assert!(matches!(refused, Some(KvmError::TscRate { .. })), "{refused:?}");
}

#[test]
fn a_counting_timer_stands_while_the_machine_does() {
    let (Some(mut engine), Some(mut target)) = (engine(1), engine(1)) else { return };
    let mut lapic = Lapic::new(0);
    lapic.set_base(0xfee0_0900).unwrap();
    // Vector 0x40 once, far away, counted in steps of 128.
    for (offset, value) in [(0xf0, 0x1ff), (0x320, 0x40), (0x3e0, 0xa), (0x380, 0x3000_0000)] {
        lapic.write_page(1000, offset, value);
    }
    let asked = lapic.save();
    engine.restore(0, &asked).unwrap();
    let first = engine.save(0).unwrap();
    assert_eq!(first.timer, asked.timer);
    // KVM's own counts on.
    let count = |engine: &KvmEngine| {
        let page = engine.vcpus[0].as_ref().unwrap().fd.get_lapic().unwrap();
        page.regs[0x390..0x394].to_vec()
    };
    let (begun, before) = (std::time::Instant::now(), count(&engine));
    while count(&engine) == before {
        assert!(begun.elapsed().as_secs() < 10, "KVM's timer does not count");
    }
    assert_eq!(engine.save(0).unwrap(), first);
    target.restore(0, &first).unwrap();
    assert_eq!(target.save(0).unwrap(), first);
}
