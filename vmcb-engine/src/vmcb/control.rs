//! The control area: VMCB offsets 000h-3FFh, APM vol. 2 rev. 3.44 table B-1.
//!
//! Every row has its manual's name and a compile-time check of its offset. Words that hold several things are raw
//! integers; the [`Bits`] constants below name their parts. This room refuses to know what a processor does with
//! them: see `check` for legality and the engines for behaviour.

use crate::vmcb::bits::{Bits, NamedBits, area};
use crate::vmcb::event::Event;
use crate::vmcb::exit::ExitCode;
use crate::vmcb::intercept::Intercept;

area! {
    /// Control area of the VMCB: what the host asks for and what the processor reports at #VMEXIT.
    pub struct ControlArea[0x400] {
        0x000 intercept: [u32; 6], "INTERCEPT";
        0x018 reserved_018: [u8; 0x24], "reserved";
        0x03c pause_filter_threshold: u16, "PAUSE_FILTER_THRESHOLD";
        0x03e pause_filter_count: u16, "PAUSE_FILTER_COUNT";
        0x040 iopm_base_pa: u64, "IOPM_BASE_PA";
        0x048 msrpm_base_pa: u64, "MSRPM_BASE_PA";
        0x050 tsc_offset: u64, "TSC_OFFSET";
        0x058 guest_asid: u32, "GUEST_ASID";
        0x05c tlb_control: u8, "TLB_CONTROL";
        0x05d rap_control: u8, "RAP_CONTROL";
        0x05e reserved_05e: [u8; 2], "reserved";
        0x060 vintr: u64, "VINTR";
        0x068 interrupt_shadow: u64, "INTERRUPT_SHADOW";
        0x070 exitcode: u64, "EXITCODE";
        0x078 exitinfo1: u64, "EXITINFO1";
        0x080 exitinfo2: u64, "EXITINFO2";
        0x088 exitintinfo: u64, "EXITINTINFO";
        0x090 np_enable: u64, "NP_ENABLE";
        0x098 avic_apic_bar: u64, "AVIC_APIC_BAR";
        0x0a0 ghcb_gpa: u64, "GHCB_GPA";
        0x0a8 eventinj: u64, "EVENTINJ";
        0x0b0 n_cr3: u64, "N_CR3";
        0x0b8 lbr_virtualization_enable: u64, "LBR_VIRTUALIZATION_ENABLE";
        0x0c0 vmcb_clean: u32, "VMCB_CLEAN";
        0x0c4 reserved_0c4: [u8; 4], "reserved";
        0x0c8 nrip: u64, "NRIP";
        0x0d0 bytes_fetched: u8, "BYTES_FETCHED";
        0x0d1 instruction_bytes: [u8; 15], "GUEST_INSTRUCTION_BYTES";
        0x0e0 avic_apic_backing_page: u64, "AVIC_APIC_BACKING_PAGE";
        0x0e8 reserved_0e8: [u8; 8], "reserved";
        0x0f0 avic_logical_table: u64, "AVIC_LOGICAL_TABLE";
        0x0f8 avic_physical_table: u64, "AVIC_PHYSICAL_TABLE";
        0x100 reserved_100: [u8; 8], "reserved";
        0x108 vmsa_pointer: u64, "VMSA_POINTER";
        0x110 vmgexit_rax: u64, "VMGEXIT_RAX";
        0x118 vmgexit_cpl: u8, "VMGEXIT_CPL";
        0x119 reserved_119: [u8; 7], "reserved";
        0x120 bus_lock_threshold: u16, "BUS_LOCK_THRESHOLD";
        0x122 reserved_122: [u8; 0x12], "reserved";
        0x134 update_irr: u32, "UPDATE_IRR";
        0x138 allowed_sev_features: u64, "ALLOWED_SEV_FEATURES";
        0x140 guest_sev_features: u64, "GUEST_SEV_FEATURES";
        0x148 reserved_148: [u8; 8], "reserved";
        0x150 requested_irr: [u64; 4], "REQUESTED_IRR";
        0x170 reserved_170: [u8; 0x270], "reserved";
        0x3e0 host_use: [u8; 0x20], "HOST_USE";
    }
}

/// TLB_CONTROL values (APM2 15.16.2); every other value is reserved.
pub mod tlb_control {
    /// Flush nothing.
    pub const NONE: u8 = 0;
    /// Flush everything, all ASIDs, global entries too.
    pub const FLUSH_ALL: u8 = 1;
    /// Flush this guest's entries.
    pub const FLUSH_GUEST: u8 = 3;
    /// Flush this guest's non-global entries.
    pub const FLUSH_GUEST_NON_GLOBAL: u8 = 7;
}

/// RAP_CONTROL (05Dh, bits 41:40 of 058h) bit 0: the guest may use the larger return address predictor.
pub const ALLOW_LARGER_RAP: Bits = Bits::bit(0);
/// RAP_CONTROL bit 1: clear the return address predictor at VMRUN.
pub const CLEAR_RAP: Bits = Bits::bit(1);

/// 060h bits 3:0: virtual task priority; written back at #VMEXIT. Bits 7:4 should be zero.
pub const V_TPR: Bits = Bits::range(3, 0);
/// 060h bit 8: a virtual interrupt is pending; written back at #VMEXIT.
pub const V_IRQ: Bits = Bits::bit(8);
/// 060h bit 9: virtual GIF.
pub const V_GIF: Bits = Bits::bit(9);
/// 060h bit 11: a virtual NMI is pending.
pub const V_NMI: Bits = Bits::bit(11);
/// 060h bit 12: virtual NMIs are masked.
pub const V_NMI_MASK: Bits = Bits::bit(12);
/// 060h bits 19:16: priority of the virtual interrupt.
pub const V_INTR_PRIO: Bits = Bits::range(19, 16);
/// 060h bit 20: the virtual interrupt ignores V_TPR.
pub const V_IGN_TPR: Bits = Bits::bit(20);
/// 060h bit 24: physical interrupts follow the host's RFLAGS.IF.
pub const V_INTR_MASKING: Bits = Bits::bit(24);
/// 060h bit 25: virtual GIF enabled.
pub const V_GIF_ENABLE: Bits = Bits::bit(25);
/// 060h bit 26: virtual NMI enabled.
pub const V_NMI_ENABLE: Bits = Bits::bit(26);
/// 060h bit 30: x2AVIC enabled.
pub const X2AVIC_ENABLE: Bits = Bits::bit(30);
/// 060h bit 31: AVIC enabled.
pub const AVIC_ENABLE: Bits = Bits::bit(31);
/// 060h bits 39:32: vector of the virtual interrupt.
pub const V_INTR_VECTOR: Bits = Bits::range(39, 32);

/// 068h bit 0: the guest is in an interrupt shadow (after STI or a load of SS).
pub const INTERRUPT_SHADOW: Bits = Bits::bit(0);
/// 068h bit 1: value of RFLAGS.IF for an SEV-ES guest.
pub const GUEST_INTERRUPT_MASK: Bits = Bits::bit(1);

/// 090h bit 0: nested paging.
pub const NP_ENABLE: Bits = Bits::bit(0);
/// 090h bit 1: SEV.
pub const SEV_ENABLE: Bits = Bits::bit(1);
/// 090h bit 2: SEV-ES.
pub const SEV_ES_ENABLE: Bits = Bits::bit(2);
/// 090h bit 3: guest mode execute trap.
pub const GMET_ENABLE: Bits = Bits::bit(3);
/// 090h bit 4: supervisor shadow-stack check in nested tables.
pub const SSS_CHECK_ENABLE: Bits = Bits::bit(4);
/// 090h bit 5: virtual transparent encryption.
pub const VTE_ENABLE: Bits = Bits::bit(5);
/// 090h bit 6: read-only guest page tables.
pub const READ_ONLY_GUEST_PAGE_TABLES: Bits = Bits::bit(6);
/// 090h bit 7: INVLPGB and TLBSYNC in the guest.
pub const INVLPGB_ENABLE: Bits = Bits::bit(7);

/// 0B8h bit 0: LBR virtualisation.
pub const LBR_ENABLE: Bits = Bits::bit(0);
/// 0B8h bit 1: virtualised VMSAVE and VMLOAD.
pub const VMSAVE_VMLOAD_ENABLE: Bits = Bits::bit(1);
/// 0B8h bit 2: IBS virtualisation.
pub const IBS_ENABLE: Bits = Bits::bit(2);
/// 0B8h bit 3: PMC virtualisation.
pub const PMC_ENABLE: Bits = Bits::bit(3);

/// Clean bits (APM2 15.15.1, 0C0h): a set bit lets the processor keep what it has cached of the group.
pub mod clean {
    /// Bit 0: intercepts, TSC_OFFSET, pause filter.
    pub const INTERCEPTS: u32 = 1 << 0;
    /// Bit 1: IOPM_BASE_PA and MSRPM_BASE_PA.
    pub const IOPM: u32 = 1 << 1;
    /// Bit 2: ASID.
    pub const ASID: u32 = 1 << 2;
    /// Bit 3: the whole group at 060h-067h.
    pub const TPR: u32 = 1 << 3;
    /// Bit 4: nested paging: N_CR3 and G_PAT.
    pub const NP: u32 = 1 << 4;
    /// Bit 5: CR0, CR3, CR4 and EFER.
    pub const CRX: u32 = 1 << 5;
    /// Bit 6: DR6 and DR7.
    pub const DRX: u32 = 1 << 6;
    /// Bit 7: GDTR and IDTR.
    pub const DT: u32 = 1 << 7;
    /// Bit 8: CS, DS, SS, ES and CPL.
    pub const SEG: u32 = 1 << 8;
    /// Bit 9: CR2.
    pub const CR2: u32 = 1 << 9;
    /// Bit 10: DBGCTL, BR_FROM, BR_TO, LASTEXCPFROM, LASTEXCPTO.
    pub const LBR: u32 = 1 << 10;
    /// Bit 11: AVIC addresses.
    pub const AVIC: u32 = 1 << 11;
    /// Bit 12: S_CET, SSP, ISST_ADDR.
    pub const CET: u32 = 1 << 12;
    /// No group: what no clean bit covers.
    pub const NONE: u32 = 0;
    /// All bits that have a meaning.
    pub const ALL: u32 = 0x1fff;
}

/// Parts of RAP_CONTROL by name.
pub const RAP_CONTROL_BITS: &[NamedBits] =
    &[NamedBits::new("ALLOW_LARGER_RAP", ALLOW_LARGER_RAP), NamedBits::new("CLEAR_RAP", CLEAR_RAP)];

/// Parts of VINTR (060h) by name.
pub const VINTR_BITS: &[NamedBits] = &[
    NamedBits::new("V_TPR", V_TPR),
    NamedBits::new("V_IRQ", V_IRQ),
    NamedBits::new("V_GIF", V_GIF),
    NamedBits::new("V_NMI", V_NMI),
    NamedBits::new("V_NMI_MASK", V_NMI_MASK),
    NamedBits::new("V_INTR_PRIO", V_INTR_PRIO),
    NamedBits::new("V_IGN_TPR", V_IGN_TPR),
    NamedBits::new("V_INTR_MASKING", V_INTR_MASKING),
    NamedBits::new("V_GIF_ENABLE", V_GIF_ENABLE),
    NamedBits::new("V_NMI_ENABLE", V_NMI_ENABLE),
    NamedBits::new("X2AVIC_ENABLE", X2AVIC_ENABLE),
    NamedBits::new("AVIC_ENABLE", AVIC_ENABLE),
    NamedBits::new("V_INTR_VECTOR", V_INTR_VECTOR),
];

/// Parts of 068h by name.
pub const INTERRUPT_SHADOW_BITS: &[NamedBits] = &[
    NamedBits::new("INTERRUPT_SHADOW", INTERRUPT_SHADOW),
    NamedBits::new("GUEST_INTERRUPT_MASK", GUEST_INTERRUPT_MASK),
];

/// Parts of 090h by name.
pub const NP_ENABLE_BITS: &[NamedBits] = &[
    NamedBits::new("NP_ENABLE", NP_ENABLE),
    NamedBits::new("SEV_ENABLE", SEV_ENABLE),
    NamedBits::new("SEV_ES_ENABLE", SEV_ES_ENABLE),
    NamedBits::new("GMET_ENABLE", GMET_ENABLE),
    NamedBits::new("SSS_CHECK_ENABLE", SSS_CHECK_ENABLE),
    NamedBits::new("VTE_ENABLE", VTE_ENABLE),
    NamedBits::new("READ_ONLY_GUEST_PAGE_TABLES", READ_ONLY_GUEST_PAGE_TABLES),
    NamedBits::new("INVLPGB_ENABLE", INVLPGB_ENABLE),
];

/// Parts of 0B8h by name.
pub const LBR_BITS: &[NamedBits] = &[
    NamedBits::new("LBR_ENABLE", LBR_ENABLE),
    NamedBits::new("VMSAVE_VMLOAD_ENABLE", VMSAVE_VMLOAD_ENABLE),
    NamedBits::new("IBS_ENABLE", IBS_ENABLE),
    NamedBits::new("PMC_ENABLE", PMC_ENABLE),
];

/// Clean bits by name.
pub const CLEAN_BITS: &[NamedBits] = &[
    NamedBits::new("INTERCEPTS", Bits::bit(0)),
    NamedBits::new("IOPM", Bits::bit(1)),
    NamedBits::new("ASID", Bits::bit(2)),
    NamedBits::new("TPR", Bits::bit(3)),
    NamedBits::new("NP", Bits::bit(4)),
    NamedBits::new("CRX", Bits::bit(5)),
    NamedBits::new("DRX", Bits::bit(6)),
    NamedBits::new("DT", Bits::bit(7)),
    NamedBits::new("SEG", Bits::bit(8)),
    NamedBits::new("CR2", Bits::bit(9)),
    NamedBits::new("LBR", Bits::bit(10)),
    NamedBits::new("AVIC", Bits::bit(11)),
    NamedBits::new("CET", Bits::bit(12)),
];

impl ControlArea {
    /// True if `which` is intercepted.
    pub fn intercepts(&self, which: Intercept) -> bool {
        self.intercept[which.word()] & which.mask() != 0
    }

    /// Turns interception of `which` on or off and drops the clean bit of the intercepts.
    pub fn set_intercept(&mut self, which: Intercept, on: bool) {
        let word = &mut self.intercept[which.word()];
        *word = if on { *word | which.mask() } else { *word & !which.mask() };
        self.vmcb_clean &= !clean::INTERCEPTS;
    }

    /// EXITCODE, all 64 bits.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode(self.exitcode)
    }

    /// EXITINTINFO: the event whose delivery the exit interrupted.
    pub fn interrupted_event(&self) -> Event {
        Event(self.exitintinfo)
    }

    /// EVENTINJ: the event to deliver at the next VMRUN.
    pub fn injected_event(&self) -> Event {
        Event(self.eventinj)
    }

    /// Physical address of the IOPM: the low 12 bits of the base are ignored (APM2 15.10.1).
    pub fn iopm_address(&self) -> u64 {
        self.iopm_base_pa & !0xfff
    }

    /// Physical address of the MSRPM: the low 12 bits of the base are ignored (APM2 15.11).
    pub fn msrpm_address(&self) -> u64 {
        self.msrpm_base_pa & !0xfff
    }

    /// Nested paging on.
    pub fn nested_paging(&self) -> bool {
        NP_ENABLE.is_set(self.np_enable)
    }

    /// The guest is in an interrupt shadow.
    pub fn in_interrupt_shadow(&self) -> bool {
        INTERRUPT_SHADOW.is_set(self.interrupt_shadow)
    }

    /// Marks groups of [`clean`] as changed by the host.
    pub fn mark_dirty(&mut self, groups: u32) {
        self.vmcb_clean &= !groups;
    }
}
