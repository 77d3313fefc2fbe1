//! General, segment, control and debug registers: KVM's words and [`CpuState`]'s (KVM API 4.11-4.13, 4.33).

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::cpu::CpuState;
use crate::vmcb::Segment;
use crate::vmcb::segment::{ATTRIB_AVL, ATTRIB_DB, ATTRIB_DPL, ATTRIB_G, ATTRIB_L, ATTRIB_P, ATTRIB_S, ATTRIB_TYPE};

/// A segment with another privilege level.
pub(super) fn with_dpl(segment: &Segment, dpl: u8) -> Segment {
    let attrib = ATTRIB_DPL.with(segment.attrib.into(), dpl.into());
    Segment::new(segment.selector, attrib as u16, segment.limit, segment.base)
}

/// General registers of a state.
pub(super) fn general(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gprs;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// General registers into a state.
pub(super) fn store_general(regs: &kvm_regs, state: &mut CpuState) {
    let kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } = *regs;
    state.gprs = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    (state.rip, state.rflags) = (rip, rflags);
}

fn segment(segment: &Segment) -> kvm_segment {
    let attrib = u64::from(segment.attrib);
    let flag = |bit: crate::vmcb::Bits| u8::from(bit.is_set(attrib));
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.kind(),
        present: flag(ATTRIB_P),
        dpl: segment.dpl(),
        db: flag(ATTRIB_DB),
        s: flag(ATTRIB_S),
        l: flag(ATTRIB_L),
        g: flag(ATTRIB_G),
        avl: flag(ATTRIB_AVL),
        unusable: u8::from(!segment.present()),
        padding: 0,
    }
}

fn store_segment(segment: &kvm_segment) -> Segment {
    let mut attrib = 0;
    let present = segment.present & u8::from(segment.unusable == 0);
    let fields = [
        (ATTRIB_TYPE, segment.type_),
        (ATTRIB_S, segment.s),
        (ATTRIB_DPL, segment.dpl),
        (ATTRIB_P, present),
        (ATTRIB_AVL, segment.avl),
        (ATTRIB_L, segment.l),
        (ATTRIB_DB, segment.db),
        (ATTRIB_G, segment.g),
    ];
    for (bits, value) in fields {
        attrib = bits.with(attrib, value.into());
    }
    Segment::new(segment.selector, attrib as u16, segment.limit, segment.base)
}

fn table(segment: &Segment) -> kvm_dtable {
    kvm_dtable { base: segment.base, limit: segment.limit as u16, ..kvm_dtable::default() }
}

/// Segment and control registers of a state; `before` says what is not the vCPU's but its local APIC's.
pub(super) fn special(state: &CpuState, before: &kvm_sregs) -> kvm_sregs {
    // KVM has the privilege level in SS. An AMD processor has it apart: SYSRET leaves the DPL of SS as it was (APM3, SYSRET).
    let mut ss = segment(&state.ss);
    ss.dpl = state.cpl;
    kvm_sregs {
        cs: segment(&state.cs),
        ds: segment(&state.ds),
        es: segment(&state.es),
        fs: segment(&state.fs),
        gs: segment(&state.gs),
        ss,
        tr: segment(&state.tr),
        ldt: segment(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base: before.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// Segment and control registers into a state.
pub(super) fn store_special(sregs: &kvm_sregs, state: &mut CpuState) {
    state.cs = store_segment(&sregs.cs);
    state.ds = store_segment(&sregs.ds);
    state.es = store_segment(&sregs.es);
    state.fs = store_segment(&sregs.fs);
    state.gs = store_segment(&sregs.gs);
    state.ss = store_segment(&sregs.ss);
    state.tr = store_segment(&sregs.tr);
    state.ldtr = store_segment(&sregs.ldt);
    state.gdtr = Segment::new(0, 0, sregs.gdt.limit.into(), sregs.gdt.base);
    state.idtr = Segment::new(0, 0, sregs.idt.limit.into(), sregs.idt.base);
    state.cpl = sregs.ss.dpl & 3;
    (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    (state.cr8, state.efer) = (sregs.cr8, sregs.efer);
}

/// Debug registers of a state.
pub(super) fn debug(state: &CpuState) -> kvm_debugregs {
    let [db0, db1, db2, db3, dr6, dr7] = state.drs;
    kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..kvm_debugregs::default() }
}

/// Debug registers into a state.
pub(super) fn store_debug(regs: &kvm_debugregs, state: &mut CpuState) {
    let [db0, db1, db2, db3] = regs.db;
    state.drs = [db0, db1, db2, db3, regs.dr6, regs.dr7];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_of_a_segment_has_its_place() {
        for bit in 0..12 {
            let one = Segment::new(0x33, 1 << bit | 0x80, 0xfffff, 0x1000);
            assert_eq!(store_segment(&segment(&one)), one, "bit {bit}");
        }
        let null = Segment::new(0, 0, 0, 0);
        assert_eq!((segment(&null).unusable, store_segment(&segment(&null))), (1, null));
    }
}
