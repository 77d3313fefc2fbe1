//! Twelve traps of older VMCB headers, each pinned by the test that is named after it.
//!
//! They come from comparing such headers with tables B-1 and B-2; every one has bitten a published hypervisor.

use crate::cpu::CpuState;
use crate::vmcb::check::{Limits, Violation, violations};
use crate::vmcb::control::*;
use crate::vmcb::permission::{Iopm, MsrAccess, Msrpm, PortSize};
use crate::vmcb::*;

#[test]
fn trap_1_exit_code_is_64_bits_and_invalid_is_all_ones() {
    let mut vmcb = Vmcb::boxed();
    vmcb.control.exitcode = u64::MAX;
    assert_eq!(vmcb.control.exit_code(), ExitCode::INVALID);
    assert_eq!(vmcb.as_page()[0x70..0x78], [0xff; 8]);
    vmcb.control.exitcode = 0xffff_ffff;
    assert_ne!(vmcb.control.exit_code(), ExitCode::INVALID);
    assert_eq!(vmcb.control.exit_code().name(), None);
}

#[test]
fn trap_2_neighbours_of_a_flag_survive_its_write() {
    for word in [u64::MAX, 0x5a5a_a5a5_1234_fedc] {
        let mut control = ControlArea { vintr: word, np_enable: word, interrupt_shadow: word, ..Default::default() };
        control.lbr_virtualization_enable = word;
        V_IRQ.put(&mut control.vintr, 0);
        NP_ENABLE.put(&mut control.np_enable, 0);
        INTERRUPT_SHADOW.put(&mut control.interrupt_shadow, 0);
        LBR_ENABLE.put(&mut control.lbr_virtualization_enable, 0);
        assert_eq!(control.vintr, word & !(1 << 8));
        for single in [control.np_enable, control.interrupt_shadow, control.lbr_virtualization_enable] {
            assert_eq!(single, word & !1);
        }
    }
    // The state of a guest goes into a VMCB full of other bits and leaves all of them.
    let mut vmcb = Vmcb::boxed();
    vmcb.control.vintr = !(V_TPR.mask() | V_NMI_ENABLE.mask());
    let before = vmcb.control.vintr;
    CpuState::reset().to_vmcb(&mut vmcb);
    assert_eq!(vmcb.control.vintr, before);
}

#[test]
fn trap_3_virtual_interrupt_fields_lie_where_the_manual_says() {
    assert_eq!(V_INTR_PRIO.mask(), 0xf_0000);
    assert_eq!(V_IRQ.mask(), 1 << 8);
    assert_eq!(V_IGN_TPR.mask(), 1 << 20);
    assert_eq!(V_TPR.mask(), 0xf);
    assert_eq!(V_INTR_VECTOR.mask(), 0xff_0000_0000);
    let (mut vmcb, mut cpu) = (Vmcb::boxed(), CpuState::reset());
    vmcb.control.vintr = 0xf5;
    cpu.from_vmcb(&vmcb);
    assert_eq!(cpu.cr8, 5, "bits 7:4 are no part of V_TPR");
}

#[test]
fn trap_4_an_error_code_is_the_high_half_and_is_shifted_once() {
    let event = Event::exception(14, Some(0xdead_beef));
    assert_eq!(event.0, 0xdead_beef_8000_0b0e);
    let mut vmcb = Vmcb::boxed();
    vmcb.control.eventinj = event.0;
    let half = |at: usize| u32::from_le_bytes(vmcb.as_page()[at..at + 4].try_into().unwrap());
    assert_eq!((half(0xa8), half(0xac)), (0x8000_0b0e, 0xdead_beef));
    assert!(!vmcb.control.interrupted_event().valid(), "no event was interrupted");
}

#[test]
fn trap_5_exceptions_and_software_interrupts_differ() {
    assert_eq!(Event::exception(3, None).0, 0x8000_0303);
    assert_eq!(Event::new(EventType::Software, 3).0, 0x8000_0403);
    assert!(Event::exception(2, None).illegal().is_some());
    assert!(Event::exception(32, None).illegal().is_some());
    assert!(Event::new(EventType::Software, 0x80).illegal().is_none());
    assert_eq!(Event::nmi().illegal(), None);
    for reserved in [1, 5, 6, 7] {
        assert!(Event(0x8000_0000 | reserved << 8).illegal().is_some());
    }
    assert_eq!(Event(0x7fff_ffff).illegal(), None, "an invalid word injects nothing");
}

#[test]
fn trap_6_tlb_control_shares_a_word_with_the_asid() {
    let mut vmcb = Vmcb::boxed();
    vmcb.control.tlb_control = tlb_control::FLUSH_GUEST;
    vmcb.control.guest_asid = 0x1234_5678;
    assert_eq!(vmcb.as_page()[0x58..0x60], [0x78, 0x56, 0x34, 0x12, 3, 0, 0, 0]);
    vmcb.control.guest_asid = 0;
    vmcb.control.set_intercept(Intercept::VMRUN, true);
    vmcb.save.efer = 1 << 12;
    assert_eq!(violations(&vmcb, Limits::full(48)), [Violation::AsidZero]);
}

#[test]
fn trap_7_maps_reach_past_64_k_and_end_at_three_ranges() {
    let mut io = Iopm::none();
    io.set(0xffff, PortSize::Double);
    assert_eq!((io.as_bytes().len(), io.as_bytes()[0x1fff], io.as_bytes()[0x2000]), (12288, 0x80, 0x07));
    assert!(!io.intercepts(0, PortSize::Double), "ports do not wrap");
    let msrs = Msrpm::none();
    assert_eq!(msrs.as_bytes().len(), 8192);
    assert!(!msrs.intercepts(0xc001_1fff, MsrAccess::Write));
    for outside in [0x2000, 0x4b56_4d00, 0xbfff_ffff, 0xc000_2000, 0xc001_2000, u32::MAX] {
        assert!(msrs.intercepts(outside, MsrAccess::Read), "{outside:#x}");
    }
    let control = ControlArea { iopm_base_pa: 0x1fff, msrpm_base_pa: 0x2001, ..Default::default() };
    assert_eq!((control.iopm_address(), control.msrpm_address()), (0x1000, 0x2000));
}

#[test]
fn trap_8_segment_attributes_are_packed_in_12_bits_and_cpl_is_a_byte_of_its_own() {
    let data = Segment::from_descriptor(0x18, 0x00cf_f300_0000_ffff);
    assert_eq!((data.attrib, data.limit, data.dpl()), (0xcf3, 0xffff_ffff, 3));
    let mut vmcb = Vmcb::boxed();
    for register in [SegmentRegister::Ds, SegmentRegister::Ldtr] {
        assert_eq!(vmcb.descriptor(register).access & 0x10000, 0x10000, "P = 0 is unusable");
    }
    vmcb.set_descriptor(SegmentRegister::Cs, Descriptor { base: 0, limit: 0, access: 0xa09b });
    assert_eq!(vmcb.save.cs.attrib, 0xa9b);
    assert_eq!(vmcb.descriptor(SegmentRegister::Cs).access, 0xa09b);
    vmcb.save.cpl = 2;
    vmcb.save.ss.attrib = 0xcf3;
    assert_eq!(vmcb.save.effective_cpl(), 0, "real mode");
    vmcb.save.cr0 = 1;
    assert_eq!(vmcb.save.effective_cpl(), 2, "from offset 0CBh, not from SS.DPL");
    assert_eq!(vmcb.as_page()[0x4cb], 2);
    vmcb.save.rflags = 1 << 17;
    assert_eq!(vmcb.save.effective_cpl(), 3, "virtual-8086 mode");
}

#[test]
fn trap_9_vmload_moves_its_own_registers_and_no_other() {
    let full = Vmcb::from_bytes(&[0xa5; 4096]);
    let mut vmcb = Vmcb::boxed();
    vmcb.save.copy_vmload_fields(&full.save);
    let moved: usize = vmcb.as_page().iter().filter(|byte| **byte != 0).count();
    assert_eq!(moved, 4 * 16 + 8 * 8);
    for register in [SegmentRegister::Fs, SegmentRegister::Gs, SegmentRegister::Tr, SegmentRegister::Ldtr] {
        assert_eq!(vmcb.segment(register), full.segment(register));
        assert_eq!(register.clean_group(), 0, "no clean bit covers what VMRUN does not load");
    }
}

#[test]
fn trap_10_cr2_and_debug_registers_travel_with_the_guest() {
    let mut cpu = CpuState::reset();
    cpu.cr2 = 0x1111;
    cpu.drs = [1, 2, 3, 4, 0xffff_4ff0, 0x401];
    let mut vmcb = Vmcb::boxed();
    cpu.to_vmcb(&mut vmcb);
    assert_eq!((vmcb.save.cr2, vmcb.save.dr6, vmcb.save.dr7), (0x1111, 0xffff_4ff0, 0x401));
    let mut back = CpuState::reset();
    back.from_vmcb(&vmcb);
    assert_eq!(back.drs, [0, 0, 0, 0, 0xffff_4ff0, 0x401], "DR0 to DR3 are the host's duty");
}

#[test]
fn trap_11_instruction_bytes_follow_their_count() {
    let mut vmcb = Vmcb::boxed();
    vmcb.control.nrip = 0x1122_3344_5566_7788;
    vmcb.control.bytes_fetched = 15;
    vmcb.control.instruction_bytes = *b"123456789abcdef";
    assert_eq!(vmcb.as_page()[0xc8..0xd0], 0x1122_3344_5566_7788_u64.to_le_bytes());
    assert_eq!(&vmcb.as_page()[0xd0..0xe0], b"\x0f123456789abcdef");
}

#[test]
fn trap_12_clean_bits_cover_their_whole_group() {
    let dropped = |register: Register| {
        let mut vmcb = Vmcb::boxed();
        vmcb.control.vmcb_clean = u32::MAX;
        vmcb.write(register, 0);
        !vmcb.control.vmcb_clean
    };
    assert_eq!(dropped(Register::GPat), 1 << 4, "NP covers G_PAT");
    assert_eq!(dropped(Register::NCr3), 1 << 4);
    assert_eq!(dropped(Register::Efer), 1 << 5, "CRx covers EFER");
    assert_eq!(dropped(Register::Vintr), 1 << 3, "the whole word at 060h");
    assert_eq!(dropped(Register::Selector(SegmentRegister::Idtr)), 1 << 7);
    assert_eq!(dropped(Register::Rax), 0);
    assert_eq!(clean::CET, 1 << 12);
    let anywhere = Access::new(0x570, Width::Quad).unwrap();
    assert_eq!(dropped(Register::Raw(anywhere)), u32::MAX, "a raw write may touch any group");
}
