//! The MSRs of `soft-v1`: reset value, legal writes, and the part of the machine that holds each.
//!
//! Everything that is not listed raises #GP(0), as on a processor. Sources: APM2 appendix A, APM2 16.11 (x2APIC), Linux'
//! `virt/kvm/x86/msr` for the two clock MSRs. This file refuses to execute an access: the holder does.

use crate::addr::is_canonical;
use crate::capability::soft_v1::{EFER_WRITABLE, LINEAR_BITS, PHYS_BITS};
use crate::vmcb::check::pat_is_legal;
use crate::vmcb::registers::efer;

/// Which part of the machine holds an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Home {
    /// `CpuState::msrs`.
    Saved,
    /// A field of `CpuState` of its own: EFER, FS and GS base, the TSC.
    Field,
    /// The local APIC: its base, x2APIC registers, the TSC deadline.
    Lapic,
    /// Nowhere: it always reads as its reset value.
    Constant,
    /// Nowhere: writing it has the processor do something, RDMSR raises #GP(0).
    Command,
}

/// What WRMSR accepts; anything else raises #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Nothing: read-only.
    ReadOnly,
    /// Any value.
    Any,
    /// Bits of the mask; others must keep the value that they have.
    Mask(u64),
    /// A canonical address.
    Canonical,
    /// Eight memory types, as in the PAT.
    PatTypes,
    /// Eight memory types, as in a fixed-range MTRR.
    MtrrTypes,
}

/// A row: one MSR, or `count` neighbours that are alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsrRow {
    /// Index of the first.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// The manual's name.
    pub name: &'static str,
    /// Value when the machine is built.
    pub reset: u64,
    /// Legal writes.
    pub form: Form,
    /// Holder.
    pub home: Home,
}

impl MsrRow {
    /// True if WRMSR of `value` is legal while the MSR holds `current`; false: #GP(0).
    pub fn accepts(&self, current: u64, value: u64) -> bool {
        match self.form {
            Form::ReadOnly => false,
            Form::Any => true,
            Form::Mask(mask) => (value ^ current) & !mask == 0,
            Form::Canonical => is_canonical(value, LINEAR_BITS),
            Form::PatTypes => pat_is_legal(value),
            Form::MtrrTypes => value.to_le_bytes().into_iter().all(|kind| matches!(kind, 0 | 1 | 4..=6)),
        }
    }
}

const fn row(first: u32, name: &'static str, reset: u64, form: Form, home: Home) -> MsrRow {
    MsrRow { first, count: 1, name, reset, form, home }
}

const PHYS_MASK: u64 = (1 << PHYS_BITS) - 1;
const MTRR_MASK: u64 = PHYS_MASK & !0xfff;

/// MTRRdefType as firmware would leave it: enabled, default write-back. There is no firmware, and a kernel that finds the
/// MTRRs off turns the PAT off as well.
const MTRR_DEFAULT: u64 = 0x806;
/// Eight variable ranges, fixed ranges, write-combining (APM2 7.7.5).
const MTRR_CAPABILITIES: u64 = 0x508;
/// HWCR.TscFreqSel: the TSC counts at a constant rate.
const HWCR_RESET: u64 = 1 << 24;

/// Every MSR, in order of index.
pub const ROWS: &[MsrRow] = &[
    row(0x10, "TSC", 0, Form::Any, Home::Field),
    // BSC 8 (read-only), x2APIC 10, enable 11, base; the reset value of the first vCPU.
    row(0x1b, "APIC_BASE", 0xfee0_0900, Form::Mask(PHYS_MASK & !0x3ff), Home::Lapic),
    row(0x3b, "TSC_ADJUST", 0, Form::Any, Home::Saved),
    // The microcode loader of a guest may write here and finds that nothing changed.
    row(0x8b, "PATCH_LEVEL", 0x0a10_1148, Form::ReadOnly, Home::Constant),
    row(0xfe, "MTRRcap", MTRR_CAPABILITIES, Form::ReadOnly, Home::Constant),
    row(0x174, "SYSENTER_CS", 0, Form::Any, Home::Saved),
    row(0x175, "SYSENTER_ESP", 0, Form::Canonical, Home::Saved),
    row(0x176, "SYSENTER_EIP", 0, Form::Canonical, Home::Saved),
    // No banks, no MCG_CTL.
    row(0x179, "MCG_CAP", 0, Form::ReadOnly, Home::Constant),
    row(0x17a, "MCG_STATUS", 0, Form::Mask(7), Home::Saved),
    // LBR and BTF.
    row(0x1d9, "DBGCTL", 0, Form::Mask(3), Home::Saved),
    row(0x1db, "BR_FROM", 0, Form::Any, Home::Saved),
    row(0x1dc, "BR_TO", 0, Form::Any, Home::Saved),
    row(0x1dd, "LASTEXCPFROM", 0, Form::Any, Home::Saved),
    row(0x1de, "LASTEXCPTO", 0, Form::Any, Home::Saved),
    // Even: base with type in 7:0. Odd: mask with valid bit 11.
    MsrRow {
        first: 0x200,
        count: 16,
        name: "MTRRphys",
        reset: 0,
        form: Form::Mask(MTRR_MASK | 0x8ff),
        home: Home::Saved,
    },
    row(0x250, "MTRRfix64K_00000", 0, Form::MtrrTypes, Home::Saved),
    MsrRow { first: 0x258, count: 2, name: "MTRRfix16K", reset: 0, form: Form::MtrrTypes, home: Home::Saved },
    MsrRow { first: 0x268, count: 8, name: "MTRRfix4K", reset: 0, form: Form::MtrrTypes, home: Home::Saved },
    row(0x277, "PAT", 0x0007_0406_0007_0406, Form::PatTypes, Home::Saved),
    row(0x2ff, "MTRRdefType", MTRR_DEFAULT, Form::Mask(0xcff), Home::Saved),
    row(0x6e0, "TSC_DEADLINE", 0, Form::Any, Home::Lapic),
    MsrRow { first: 0x800, count: 0x100, name: "X2APIC", reset: 0, form: Form::Any, home: Home::Lapic },
    row(0x4b56_4d00, "KVM_WALL_CLOCK_NEW", 0, Form::Mask(PHYS_MASK & !3), Home::Saved),
    row(0x4b56_4d01, "KVM_SYSTEM_TIME_NEW", 0, Form::Mask(PHYS_MASK & !2), Home::Saved),
    row(0xc000_0080, "EFER", 0, Form::Mask(EFER_WRITABLE | efer::LMA), Home::Field),
    row(0xc000_0081, "STAR", 0, Form::Any, Home::Saved),
    row(0xc000_0082, "LSTAR", 0, Form::Canonical, Home::Saved),
    row(0xc000_0083, "CSTAR", 0, Form::Canonical, Home::Saved),
    row(0xc000_0084, "SFMASK", 0, Form::Mask(0xffff_ffff), Home::Saved),
    row(0xc000_0100, "FS_BASE", 0, Form::Canonical, Home::Field),
    row(0xc000_0101, "GS_BASE", 0, Form::Canonical, Home::Field),
    row(0xc000_0102, "KERNEL_GS_BASE", 0, Form::Canonical, Home::Saved),
    row(0xc000_0103, "TSC_AUX", 0, Form::Mask(0xffff_ffff), Home::Saved),
    // MtrrFixDramEn, MtrrFixDramModEn, MtrrVarDramEn, MtrrTom2En, Tom2ForceMemTypeWB.
    row(0xc001_0010, "SYSCFG", 0, Form::Mask(0x007c_0000), Home::Saved),
    // Ignored by every part of the machine: FFDIS, MONMWAIT, IRPERF and the like.
    row(0xc001_0015, "HWCR", HWCR_RESET, Form::Mask(0x4105_0158), Home::Saved),
    row(0xc001_001a, "TOP_MEM", 0, Form::Mask(PHYS_MASK & !0x7f_ffff), Home::Saved),
    row(0xc001_001d, "TOM2", 0, Form::Mask(PHYS_MASK & !0x7f_ffff), Home::Saved),
    // Bit 46, extended PCI configuration space by port, is set by kernels and means nothing without PCI.
    row(0xc001_001f, "NB_CFG", 0, Form::Any, Home::Saved),
    row(0xc001_0055, "INT_PENDING", 0, Form::ReadOnly, Home::Constant),
    row(0xc001_1020, "LS_CFG", 0, Form::Any, Home::Saved),
    // Bit 1: LFENCE serialises; always so.
    row(0xc001_1029, "DE_CFG", 2, Form::Mask(0), Home::Saved),
];

/// The row of MSR `index`; `None`: RDMSR and WRMSR raise #GP(0).
pub fn find(index: u32) -> Option<&'static MsrRow> {
    let row = &ROWS[ROWS.partition_point(|row| row.first <= index).checked_sub(1)?];
    (index - row.first < row.count).then_some(row)
}

/// Index and reset value of every MSR that `CpuState::msrs` holds.
pub fn saved() -> impl Iterator<Item = (u32, u64)> {
    let rows = ROWS.iter().filter(|row| row.home == Home::Saved);
    rows.flat_map(|row| (row.first..row.first + row.count).map(|index| (index, row.reset)))
}
