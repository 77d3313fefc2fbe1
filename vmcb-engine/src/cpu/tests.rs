//! The table of fields kept honest: round trips, refusals that name the field, and completeness.

use super::*;
use crate::vmcb::{Event, Vmcb};
use proptest::prelude::*;
use proto::v1::{CpuStateV1, MsrState, XsaveComponent};
use std::collections::BTreeMap;

fn segment() -> impl Strategy<Value = Segment> {
    (any::<u16>(), 0..0x1000u16, any::<u32>(), any::<u64>()).prop_map(|(s, a, l, b)| Segment::new(s, a, l, b))
}

fn fx() -> impl Strategy<Value = Box<FxState>> {
    let later = proptest::collection::btree_map(2..63u32, proptest::collection::vec(any::<u8>(), 0..64), 0..3);
    (proptest::collection::vec(any::<u8>(), 512), later).prop_map(|(image, later)| {
        let mut state = FxState::from_fxsave(&image.try_into().unwrap());
        state.later = later;
        Box::new(state)
    })
}

fn run_state() -> impl Strategy<Value = RunState> {
    prop_oneof![
        Just(RunState::Runnable),
        Just(RunState::Uninitialised),
        Just(RunState::InitReceived),
        Just(RunState::Halted)
    ]
}

prop_compose! {
    fn state()(
        gprs: [u64; 16],
        words in proptest::collection::vec(any::<u64>(), 10),
        segments in proptest::collection::vec(segment(), 10),
        cpl in 0..4u8,
        cr8 in 0..16u64,
        drs: [u64; 6],
        msrs in proptest::collection::btree_map(any::<u32>(), any::<u64>(), 0..20),
        fpu in fx(),
        event in prop_oneof![Just(Event::NONE), (32..=255u8).prop_map(Event::interrupt)],
        flags: [bool; 3],
        run_state in run_state(),
    ) -> CpuState {
        let mut state = CpuState {
            gprs, rip: words[0], rflags: words[1], cpl, cr0: words[2], cr2: words[3], cr3: words[4], cr4: words[5], cr8,
            efer: words[6], xcr0: words[7], drs, msrs, fpu, event_injection: event, interrupt_shadow: flags[0],
            nmi_masked: flags[1], nmi_pending: flags[2], run_state, tsc_offset: words[8], ..CpuState::reset()
        };
        for (register, segment) in SegmentRegister::ALL.into_iter().zip(segments) {
            *state.segment_mut(register) = segment;
        }
        state
    }
}

proptest! {
    #[test]
    fn saved_form_is_the_state(state in state()) {
        let bytes = state.to_bytes();
        let back = CpuState::from_bytes(&bytes).unwrap();
        prop_assert_eq!(state.compare(&back), vec![]);
        prop_assert_eq!(&back, &state);
        prop_assert_eq!(back.digest(), state.digest());
        prop_assert_eq!(back.to_bytes(), bytes);
    }

    #[test]
    fn equal_digests_mean_equal_states(left in state(), right in state()) {
        prop_assert_eq!(left == right, left.digest() == right.digest());
        prop_assert_eq!(left == right, left.compare(&right).is_empty());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = CpuState::from_bytes(&bytes);
    }

    #[test]
    fn a_state_with_one_corrupt_byte_never_panics(state in state(), at: prop::sample::Index, flip in 1u8..) {
        let mut bytes = state.to_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(other) = CpuState::from_bytes(&bytes) {
            prop_assert_eq!(CpuState::from_bytes(&other.to_bytes()).unwrap(), other);
        }
    }

    #[test]
    fn a_vmcb_gives_back_what_it_was_given(state in state()) {
        let mut vmcb = Vmcb::boxed();
        let mut state = state;
        // Outside of real and virtual-8086 mode, where CPL is a register of its own.
        state.cr0 |= 1;
        state.rflags &= !(1 << 17);
        state.to_vmcb(&mut vmcb);
        let mut back = state.clone();
        back.gprs[gpr::RAX] = 7;
        back.gprs[gpr::RSP] = 7;
        (back.rip, back.rflags, back.cr0, back.cr2, back.cr3, back.cr4, back.efer, back.cr8) =
            (0, 0, 0, 0, 0, 0, state.efer & (1 << 12), 0);
        prop_assert_eq!(vmcb.save.efer, state.efer | 1 << 12);
        SegmentRegister::ALL.into_iter().for_each(|register| *back.segment_mut(register) = Segment::default());
        back.from_vmcb(&vmcb);
        for index in [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102, 0x174, 0x175, 0x176, 0x277] {
            prop_assert!(back.msrs.contains_key(&index));
            if !state.msrs.contains_key(&index) {
                back.msrs.remove(&index);
            }
        }
        prop_assert_eq!(state.compare(&back), vec![]);
    }
}

#[test]
fn one_flipped_field_is_named() {
    type Flip = (fn(&mut CpuState), &'static str);
    let rows: &[Flip] = &[
        (|s| s.gprs[4] = 1, "rsp"),
        (|s| s.cs.base = 1, "cs.base"),
        (|s| s.drs[4] = 1, "dr6"),
        (|s| s.fpu.set_xmm(3, 1), "xmm3"),
        (|s| s.fpu.set_st(7, [1; 10]), "st7"),
        (|s| s.fpu.set_mxcsr(0), "mxcsr"),
        (|s| s.run_state = RunState::Halted, "run_state"),
        (|s| s.event_injection = Event::nmi(), "event_injection"),
        (|s| s.msrs.extend([(0xc000_0082, 5)]), "msr c0000082"),
    ];
    for (flip, name) in rows {
        let (left, mut right) = (CpuState::reset(), CpuState::reset());
        flip(&mut right);
        let differences = left.compare(&right);
        assert_eq!(differences.iter().map(|d| d.field.as_str()).collect::<Vec<_>>(), [*name]);
        assert_ne!(left.digest(), right.digest());
    }
    let mut right = CpuState::reset();
    right.msrs.insert(0x10, 0xff);
    assert_eq!(CpuState::reset().compare(&right)[0].to_string(), "msr 10: absent / 0xff");
}

#[test]
fn malformed_states_are_refused_with_the_name_of_the_field() {
    type Spoil = (fn(&mut CpuStateV1), &'static str);
    let rows: &[Spoil] = &[
        (|s| s.gprs.truncate(15), "gprs"),
        (|s| s.gprs.push(0), "gprs"),
        (|s| s.debug.clear(), "drs"),
        (|s| s.ldtr = None, "ldtr"),
        (|s| s.cs.as_mut().unwrap().selector = 0x1_0000, "cs"),
        (|s| s.tr.as_mut().unwrap().attrib = 0x1000, "tr"),
        (|s| s.cpl = 4, "cpl"),
        (|s| s.cr8 = 16, "cr8"),
        (|s| s.msrs = vec![MsrState { index: 2, value: 0 }, MsrState { index: 1, value: 0 }], "msrs"),
        (|s| s.msrs = vec![MsrState { index: 2, value: 0 }; 2], "msrs"),
        (|s| s.msrs = (0..5000).map(|index| MsrState { index, value: 0 }).collect(), "msrs"),
        (|s| s.xsave.clear(), "fpu"),
        (|s| s.xsave.swap(0, 1), "fpu"),
        (|s| s.xsave[0].data.push(0), "fpu"),
        (|s| s.xsave[0].data[24] = 1, "fpu"),
        (|s| s.xsave[0].data[42] = 1, "fpu"),
        (|s| s.xsave[1].data.truncate(255), "fpu"),
        (|s| s.xsave.push(XsaveComponent { id: 1, data: vec![] }), "fpu"),
        (|s| s.xsave.push(XsaveComponent { id: 63, data: vec![] }), "fpu"),
        (|s| s.xsave.push(XsaveComponent { id: 2, data: vec![0; 8193] }), "fpu"),
        (|s| s.mxcsr = 0x1_0000, "fpu"),
        (|s| s.event_injection = 0x8000_0100, "event_injection"),
        (|s| s.event_injection = 1, "event_injection"),
        (|s| s.run_state = 4, "run_state"),
    ];
    for (spoil, expected) in rows {
        let mut wire = CpuState::reset().encode();
        spoil(&mut wire);
        match CpuState::decode(wire) {
            Err(DecodeError::Malformed { field, .. }) => assert_eq!(field, *expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

/// A field that is added to the struct must be added here, and must then be in the table: both directions compile
/// only when `FIELDS`, the struct and the message agree.
#[test]
fn every_field_is_in_the_table() {
    #[rustfmt::skip]
    let CpuState {
        gprs: _, rip: _, rflags: _, es: _, cs: _, ss: _, ds: _, fs: _, gs: _, gdtr: _, ldtr: _, idtr: _, tr: _, cpl: _,
        cr0: _, cr2: _, cr3: _, cr4: _, cr8: _, efer: _, xcr0: _, drs: _, msrs: _, fpu: _, event_injection: _,
        interrupt_shadow: _, nmi_masked: _, nmi_pending: _, run_state: _, tsc_offset: _,
    } = CpuState::reset();
    assert_eq!(CpuState::FIELDS.len(), 30);
    let mut names = Vec::new();
    CpuState::reset().leaves(&mut |leaf| names.push(leaf.name));
    assert_eq!(names.len(), 16 + 2 + 10 * 4 + 1 + 7 + 6 + 7 + 8 + 16 + 6);
    let unique: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}

#[test]
fn reset_is_table_14_1() {
    let state = CpuState::reset();
    assert_eq!((state.rip, state.cs.selector, state.cs.base), (0xfff0, 0xf000, 0xffff_0000));
    assert_eq!((state.cr0, state.rflags, state.xcr0), (0x6000_0010, 2, 1));
    assert_eq!((state.drs[4], state.drs[5]), (0xffff_0ff0, 0x400));
    assert_eq!((state.fpu.fcw(), state.fpu.ftw(), state.fpu.mxcsr()), (0x40, 0xff, 0x1f80));
    assert_eq!(state.msrs, BTreeMap::new());
    assert_eq!((FxState::fninit().fcw(), FxState::fninit().ftw()), (0x37f, 0));
}
