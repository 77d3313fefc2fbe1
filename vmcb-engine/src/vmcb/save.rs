//! The state-save area: VMCB offsets 400h-FFFh, APM vol. 2 rev. 3.44 table B-2 (guests without SEV-ES).
//!
//! Offsets here are relative to 400h, as in the manual. What VMRUN/#VMEXIT switch and what only VMLOAD/VMSAVE move is
//! a matter of the processor (APM2 15.5.1, 15.5.2); [`SaveArea::copy_vmload_fields`] is the one list of the latter.
//! The layout of an SEV-ES save area differs and is refused here.

use crate::vmcb::bits::area;
use crate::vmcb::segment::Segment;

area! {
    /// State-save area of the VMCB.
    pub struct SaveArea[0xc00] {
        0x000 es: Segment, "ES";
        0x010 cs: Segment, "CS";
        0x020 ss: Segment, "SS";
        0x030 ds: Segment, "DS";
        0x040 fs: Segment, "FS";
        0x050 gs: Segment, "GS";
        0x060 gdtr: Segment, "GDTR";
        0x070 ldtr: Segment, "LDTR";
        0x080 idtr: Segment, "IDTR";
        0x090 tr: Segment, "TR";
        0x0a0 reserved_0a0: [u8; 0x2b], "reserved";
        0x0cb cpl: u8, "CPL";
        0x0cc reserved_0cc: [u8; 4], "reserved";
        0x0d0 efer: u64, "EFER";
        0x0d8 reserved_0d8: [u8; 8], "reserved";
        0x0e0 perf: [PerfCounter; 6], "PERF_CTL/PERF_CTR";
        0x140 reserved_140: [u8; 8], "reserved";
        0x148 cr4: u64, "CR4";
        0x150 cr3: u64, "CR3";
        0x158 cr0: u64, "CR0";
        0x160 dr7: u64, "DR7";
        0x168 dr6: u64, "DR6";
        0x170 rflags: u64, "RFLAGS";
        0x178 rip: u64, "RIP";
        0x180 reserved_180: [u8; 0x40], "reserved";
        0x1c0 instr_retired_ctr: u64, "INSTR_RETIRED_CTR";
        0x1c8 perf_ctr_global_sts: u64, "PERF_CTR_GLOBAL_STS";
        0x1d0 perf_ctr_global_ctl: u64, "PERF_CTR_GLOBAL_CTL";
        0x1d8 rsp: u64, "RSP";
        0x1e0 s_cet: u64, "S_CET";
        0x1e8 ssp: u64, "SSP";
        0x1f0 isst_addr: u64, "ISST_ADDR";
        0x1f8 rax: u64, "RAX";
        0x200 star: u64, "STAR";
        0x208 lstar: u64, "LSTAR";
        0x210 cstar: u64, "CSTAR";
        0x218 sfmask: u64, "SFMASK";
        0x220 kernel_gs_base: u64, "KERNEL_GS_BASE";
        0x228 sysenter_cs: u64, "SYSENTER_CS";
        0x230 sysenter_esp: u64, "SYSENTER_ESP";
        0x238 sysenter_eip: u64, "SYSENTER_EIP";
        0x240 cr2: u64, "CR2";
        0x248 reserved_248: [u8; 0x20], "reserved";
        0x268 g_pat: u64, "G_PAT";
        0x270 dbgctl: u64, "DBGCTL";
        0x278 br_from: u64, "BR_FROM";
        0x280 br_to: u64, "BR_TO";
        0x288 lastexcpfrom: u64, "LASTEXCPFROM";
        0x290 lastexcpto: u64, "LASTEXCPTO";
        0x298 dbgextnctl: u64, "DBGEXTNCTL";
        0x2a0 reserved_2a0: [u8; 0x40], "reserved";
        0x2e0 spec_ctrl: u64, "SPEC_CTRL";
        0x2e8 reserved_2e8: [u8; 0x388], "reserved";
        0x670 lbr_stack: [LbrEntry; 16], "LBR_STACK";
        0x770 lbr_select: u64, "LBR_SELECT";
        0x778 ibs_fetch_ctl: u64, "IBS_FETCH_CTL";
        0x780 ibs_fetch_linaddr: u64, "IBS_FETCH_LINADDR";
        0x788 ibs_op_ctl: u64, "IBS_OP_CTL";
        0x790 ibs_op_rip: u64, "IBS_OP_RIP";
        0x798 ibs_op_data: u64, "IBS_OP_DATA";
        0x7a0 ibs_op_data2: u64, "IBS_OP_DATA2";
        0x7a8 ibs_op_data3: u64, "IBS_OP_DATA3";
        0x7b0 ibs_dc_linaddr: u64, "IBS_DC_LINADDR";
        0x7b8 bp_ibstgt_rip: u64, "BP_IBSTGT_RIP";
        0x7c0 ic_ibs_extd_ctl: u64, "IC_IBS_EXTD_CTL";
        0x7c8 reserved_7c8: [u8; 0x438], "reserved";
    }
}

/// A performance counter with its event selector (0E0h-13Fh).
#[repr(C)]
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
pub struct PerfCounter {
    /// PERF_CTLn.
    pub ctl: u64,
    /// PERF_CTRn.
    pub ctr: u64,
}

/// One entry of the last-branch stack (670h-76Fh).
#[repr(C)]
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
pub struct LbrEntry {
    /// LBR_STACK_FROM.
    pub from: u64,
    /// LBR_STACK_TO.
    pub to: u64,
}

impl SaveArea {
    /// Copies what VMLOAD and VMSAVE move, and nothing else (APM2 15.5.2): FS, GS, TR and LDTR with their hidden
    /// parts, KernelGSBase, STAR, LSTAR, CSTAR, SFMASK and the three SYSENTER registers.
    pub fn copy_vmload_fields(&mut self, from: &SaveArea) {
        self.fs = from.fs;
        self.gs = from.gs;
        self.tr = from.tr;
        self.ldtr = from.ldtr;
        self.kernel_gs_base = from.kernel_gs_base;
        self.star = from.star;
        self.lstar = from.lstar;
        self.cstar = from.cstar;
        self.sfmask = from.sfmask;
        self.sysenter_cs = from.sysenter_cs;
        self.sysenter_esp = from.sysenter_esp;
        self.sysenter_eip = from.sysenter_eip;
    }

    /// CPL as VMRUN takes it (APM2 15.5.1): 0 in real mode, 3 in virtual-8086 mode, else the byte at 0CBh.
    pub fn effective_cpl(&self) -> u8 {
        if self.cr0 & 1 == 0 {
            0
        } else if self.rflags & (1 << 17) != 0 {
            3
        } else {
            self.cpl & 3
        }
    }
}
