//! The consistency checks of VMRUN (APM2 15.5.1 and the sections named below) as a pure list of violations.
//!
//! Every violation ends VMRUN with #VMEXIT(INVALID), all 64 bits of EXITCODE set. What raises #GP before (the address of
//! the VMCB, EFER.SVME of the host) is the processor's business. The list is complete: all that is wrong is named,
//! not only the first.

use crate::vmcb::control::{AVIC_ENABLE, V_NMI_ENABLE, tlb_control};
use crate::vmcb::permission::{IOPM_BYTES, MSRPM_BYTES};
use crate::vmcb::registers::{cr0, cr4, efer};
use crate::vmcb::{Intercept, Vmcb};

/// What the processor that would run the VMCB has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Physical address bits of the host (CPUID 8000_0008 EAX, low byte).
    pub phys_bits: u32,
    /// CR4 bits that exist; others must be zero.
    pub cr4: u64,
    /// EFER bits that exist; others must be zero.
    pub efer: u64,
}

impl Limits {
    /// Every bit that the manual names.
    pub const fn full(phys_bits: u32) -> Self {
        Self { phys_bits, cr4: cr4::ALL, efer: efer::ALL }
    }

    const fn beyond(&self, address: u64) -> bool {
        self.phys_bits < 64 && address >> self.phys_bits != 0
    }
}

/// One reason why VMRUN exits with INVALID.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// APM2 15.5.1.
    #[error("EFER.SVME is zero")]
    EferSvmeClear,
    /// APM2 15.5.1.
    #[error("CR0.CD is zero and CR0.NW is set")]
    Cr0NwWithoutCd,
    /// APM2 15.5.1.
    #[error("CR0[63:32] are not zero")]
    Cr0High,
    /// APM2 15.5.1.
    #[error("CR3 has bits beyond the physical address space")]
    Cr3Reserved,
    /// APM2 15.5.1.
    #[error("CR4 has reserved bits {0:#x}")]
    Cr4Reserved(u64),
    /// APM2 15.5.1.
    #[error("DR6[63:32] are not zero")]
    Dr6High,
    /// APM2 15.5.1.
    #[error("DR7[63:32] are not zero")]
    Dr7High,
    /// APM2 15.5.1.
    #[error("EFER has reserved bits {0:#x}")]
    EferReserved(u64),
    /// APM2 15.5.1.
    #[error("EFER.LME and CR0.PG are set and CR4.PAE is zero")]
    LongModeWithoutPae,
    /// APM2 15.5.1.
    #[error("EFER.LME and CR0.PG are set and CR0.PE is zero")]
    LongModeWithoutPe,
    /// APM2 15.5.1.
    #[error("EFER.LME, CR0.PG, CR4.PAE, CS.L and CS.D are all set")]
    LongModeCsLAndD,
    /// APM2 15.5.1.
    #[error("the VMRUN intercept is clear")]
    VmrunNotIntercepted,
    /// APM2 15.5.1.
    #[error("the IOPM extends beyond the physical address space")]
    IopmBeyondPhysical,
    /// APM2 15.5.1.
    #[error("the MSRPM extends beyond the physical address space")]
    MsrpmBeyondPhysical,
    /// APM2 15.20.
    #[error("{0}")]
    IllegalEvent(&'static str),
    /// APM2 15.5.1.
    #[error("ASID is zero")]
    AsidZero,
    /// APM2 15.16.2.
    #[error("TLB_CONTROL {0:#x} is reserved")]
    TlbControlReserved(u8),
    /// APM2 15.25.4.
    #[error("nested paging is on and N_CR3 has bits beyond the physical address space")]
    NestedCr3Reserved,
    /// APM2 15.25.8.
    #[error("nested paging is on and entry {0} of G_PAT is not a memory type")]
    PatReserved(u8),
    /// APM2 15.5.1.
    #[error("CR4.CET is set and CR0.WP is zero")]
    CetWithoutWp,
    /// APM2 15.21.10.
    #[error("virtual NMIs are enabled and physical NMIs are not intercepted")]
    VnmiWithoutNmiIntercept,
    /// APM2 15.29.4.
    #[error("an AVIC address lies beyond the physical address space")]
    AvicBeyondPhysical,
}

/// True if `value` holds eight memory types (APM2 7.8.2): UC, WC, WT, WP, WB, UC-.
pub fn pat_is_legal(value: u64) -> bool {
    first_bad_pat_entry(value).is_none()
}

fn first_bad_pat_entry(value: u64) -> Option<u8> {
    (0..8).find(|&entry| !matches!(value.to_le_bytes()[usize::from(entry)], 0 | 1 | 4..=7))
}

/// All reasons why VMRUN of `vmcb` would exit with INVALID on a processor with `limits`.
pub fn violations(vmcb: &Vmcb, limits: Limits) -> Vec<Violation> {
    let mut found = Vec::new();
    check_state(vmcb, limits, &mut found);
    check_control(vmcb, limits, &mut found);
    found
}

/// All of them in words; `None` if VMRUN would go on.
pub fn refusal(vmcb: &Vmcb, limits: Limits) -> Option<String> {
    let found: Vec<String> = violations(vmcb, limits).iter().map(ToString::to_string).collect();
    (!found.is_empty()).then(|| found.join("; "))
}

fn check_state(vmcb: &Vmcb, limits: Limits, found: &mut Vec<Violation>) {
    let save = &vmcb.save;
    let mut when = |condition: bool, violation: Violation| {
        if condition {
            found.push(violation);
        }
    };
    let has = |word: u64, bits: u64| word & bits == bits;
    let long = has(save.efer, efer::LME) && has(save.cr0, cr0::PG);
    when(!has(save.efer, efer::SVME), Violation::EferSvmeClear);
    when(!has(save.cr0, cr0::CD) && has(save.cr0, cr0::NW), Violation::Cr0NwWithoutCd);
    when(save.cr0 >> 32 != 0, Violation::Cr0High);
    when(long && limits.beyond(save.cr3), Violation::Cr3Reserved);
    when(save.cr4 & !limits.cr4 != 0, Violation::Cr4Reserved(save.cr4 & !limits.cr4));
    when(save.dr6 >> 32 != 0, Violation::Dr6High);
    when(save.dr7 >> 32 != 0, Violation::Dr7High);
    when(save.efer & !limits.efer != 0, Violation::EferReserved(save.efer & !limits.efer));
    when(long && !has(save.cr4, cr4::PAE), Violation::LongModeWithoutPae);
    when(long && !has(save.cr0, cr0::PE), Violation::LongModeWithoutPe);
    when(long && has(save.cr4, cr4::PAE) && save.cs.long() && save.cs.big(), Violation::LongModeCsLAndD);
    when(has(save.cr4, cr4::CET) && !has(save.cr0, cr0::WP), Violation::CetWithoutWp);
}

fn check_control(vmcb: &Vmcb, limits: Limits, found: &mut Vec<Violation>) {
    let control = &vmcb.control;
    let mut when = |condition: bool, violation: Violation| {
        if condition {
            found.push(violation);
        }
    };
    let leaves_memory =
        |base: u64, bytes: usize| base.checked_add(bytes as u64 - 1).is_none_or(|last| limits.beyond(last));
    when(!control.intercepts(Intercept::VMRUN), Violation::VmrunNotIntercepted);
    when(
        control.intercepts(Intercept::IOIO_PROT) && leaves_memory(control.iopm_address(), IOPM_BYTES),
        Violation::IopmBeyondPhysical,
    );
    when(
        control.intercepts(Intercept::MSR_PROT) && leaves_memory(control.msrpm_address(), MSRPM_BYTES),
        Violation::MsrpmBeyondPhysical,
    );
    if let Some(problem) = control.injected_event().illegal() {
        when(true, Violation::IllegalEvent(problem));
    }
    when(control.guest_asid == 0, Violation::AsidZero);
    let flush = control.tlb_control;
    let flush_is_known = matches!(
        flush,
        tlb_control::NONE | tlb_control::FLUSH_ALL | tlb_control::FLUSH_GUEST | tlb_control::FLUSH_GUEST_NON_GLOBAL
    );
    when(!flush_is_known, Violation::TlbControlReserved(flush));
    if control.nested_paging() {
        when(limits.beyond(control.n_cr3), Violation::NestedCr3Reserved);
        if let Some(entry) = first_bad_pat_entry(vmcb.save.g_pat) {
            when(true, Violation::PatReserved(entry));
        }
    }
    let vnmi = V_NMI_ENABLE.is_set(control.vintr);
    when(vnmi && !control.intercepts(Intercept::NMI), Violation::VnmiWithoutNmiIntercept);
    if AVIC_ENABLE.is_set(control.vintr) {
        let tables = [control.avic_apic_backing_page, control.avic_logical_table, control.avic_physical_table];
        when(tables.into_iter().any(|table| limits.beyond(table)), Violation::AvicBeyondPhysical);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmcb::{Event, EventType};

    const LIMITS: Limits = Limits::full(48);

    type Breach = (fn(&mut Vmcb), Violation);

    fn legal() -> Box<Vmcb> {
        let mut vmcb = Vmcb::boxed();
        vmcb.control.set_intercept(Intercept::VMRUN, true);
        vmcb.control.set_intercept(Intercept::IOIO_PROT, true);
        vmcb.control.set_intercept(Intercept::MSR_PROT, true);
        vmcb.control.guest_asid = 1;
        vmcb.control.np_enable = 1;
        vmcb.save.g_pat = 0x0007_0406_0007_0406;
        vmcb.save.efer = efer::SVME | efer::LME | efer::LMA;
        vmcb.save.cr0 = cr0::PE | cr0::PG;
        vmcb.save.cr4 = cr4::PAE;
        vmcb.save.cs.attrib = 0x29b;
        vmcb
    }

    #[test]
    fn a_legal_vmcb_has_no_violation() {
        assert_eq!(violations(&legal(), LIMITS), []);
        // Paged real mode outside of long mode is legal (APM2 15.5.1).
        let mut vmcb = legal();
        vmcb.save.efer = efer::SVME;
        vmcb.save.cr0 = cr0::PG;
        vmcb.save.cr3 = u64::MAX;
        assert_eq!(violations(&vmcb, LIMITS), []);
    }

    #[test]
    fn each_breach_of_the_state_is_named_alone() {
        let rows: &[Breach] = &[
            (|v| v.save.efer &= !efer::SVME, Violation::EferSvmeClear),
            (|v| v.save.cr0 |= cr0::NW, Violation::Cr0NwWithoutCd),
            (|v| v.save.cr0 |= 1 << 32, Violation::Cr0High),
            (|v| v.save.cr3 |= 1 << 48, Violation::Cr3Reserved),
            (|v| v.save.cr4 |= 1 << 24, Violation::Cr4Reserved(1 << 24)),
            (|v| v.save.dr6 |= 1 << 63, Violation::Dr6High),
            (|v| v.save.dr7 |= 1 << 32, Violation::Dr7High),
            (|v| v.save.efer |= 1 << 1, Violation::EferReserved(2)),
            (|v| v.save.cr4 &= !cr4::PAE, Violation::LongModeWithoutPae),
            (|v| v.save.cr0 &= !cr0::PE, Violation::LongModeWithoutPe),
            (|v| v.save.cs.attrib |= 1 << 10, Violation::LongModeCsLAndD),
            (|v| v.save.cr4 |= cr4::CET, Violation::CetWithoutWp),
        ];
        assert_alone(rows);
    }

    #[test]
    fn each_breach_of_the_controls_is_named_alone() {
        let rows: &[Breach] = &[
            (|v| v.control.set_intercept(Intercept::VMRUN, false), Violation::VmrunNotIntercepted),
            (|v| v.control.iopm_base_pa = (1 << 48) - 0x2000, Violation::IopmBeyondPhysical),
            (|v| v.control.msrpm_base_pa = u64::MAX, Violation::MsrpmBeyondPhysical),
            (|v| v.control.guest_asid = 0, Violation::AsidZero),
            (|v| v.control.tlb_control = 2, Violation::TlbControlReserved(2)),
            (|v| v.control.n_cr3 = 1 << 52, Violation::NestedCr3Reserved),
            (|v| v.save.g_pat = 0x0207_0406_0007_0406, Violation::PatReserved(7)),
            (|v| v.control.vintr = V_NMI_ENABLE.mask(), Violation::VnmiWithoutNmiIntercept),
            (
                |v| {
                    v.control.vintr = AVIC_ENABLE.mask();
                    v.control.avic_physical_table = 1 << 60;
                },
                Violation::AvicBeyondPhysical,
            ),
            (
                |v| v.control.eventinj = Event::new(EventType::Exception, 2).0,
                Violation::IllegalEvent("EVENTINJ injects vector 2 (NMI) as an exception"),
            ),
            (|v| v.control.eventinj = 0x8000_0100, Violation::IllegalEvent("EVENTINJ has a reserved type")),
        ];
        assert_alone(rows);
    }

    fn assert_alone(rows: &[Breach]) {
        for (breach, expected) in rows {
            let mut vmcb = legal();
            breach(&mut vmcb);
            assert_eq!(violations(&vmcb, LIMITS), [*expected]);
        }
    }

    #[test]
    fn the_last_page_of_memory_may_hold_a_map() {
        let mut vmcb = legal();
        vmcb.control.msrpm_base_pa = (1 << 48) - MSRPM_BYTES as u64;
        assert_eq!(violations(&vmcb, LIMITS), []);
    }
}
