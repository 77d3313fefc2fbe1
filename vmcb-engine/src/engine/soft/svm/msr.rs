//! MSRs that the processor itself keeps (APM2 appendix A), and RDMSR/WRMSR of them where no host intercepts.
//!
//! FS and GS base live in their segments, EFER in [`Core::efer`]. Every other MSR is #GP(0) here: a host that wants the
//! guest to see one intercepts it.

use crate::addr::is_canonical;
use crate::engine::soft::core::{Core, FS, GS};
use crate::vmcb::check::pat_is_legal;
use crate::vmcb::registers::{cr0, efer};

/// Time stamp counter.
pub const TSC: u32 = 0x10;
/// Page attribute table.
pub const PAT: u32 = 0x277;
/// Extended features.
pub const EFER: u32 = 0xc000_0080;
/// TSC_AUX.
pub const TSC_AUX: u32 = 0xc000_0103;
/// Physical address of the host's save area.
pub const VM_HSAVE_PA: u32 = 0xc001_0117;
/// SVM control.
pub const VM_CR: u32 = 0xc001_0114;

/// Bits of EFER that this processor lets software set.
pub const EFER_WRITABLE: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE | efer::SVME | efer::FFXSR | efer::AIBRSE;

/// MSRs kept by the processor.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Msrs {
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KernelGSBase.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// PAT of the running guest.
    pub pat: u64,
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// VM_HSAVE_PA.
    pub host_save: u64,
}

impl Core {
    /// RDMSR of an MSR of the processor; `None` is #GP(0). `tsc` is the TSC now.
    pub fn read_own_msr(&self, msr: u32, tsc: u64) -> Option<u64> {
        Some(match msr {
            TSC => tsc,
            0x174 => self.msrs.sysenter_cs,
            0x175 => self.msrs.sysenter_esp,
            0x176 => self.msrs.sysenter_eip,
            PAT => self.msrs.pat,
            EFER => self.efer,
            0xc000_0081 => self.msrs.star,
            0xc000_0082 => self.msrs.lstar,
            0xc000_0083 => self.msrs.cstar,
            0xc000_0084 => self.msrs.sfmask,
            0xc000_0100 => self.segments[FS].base,
            0xc000_0101 => self.segments[GS].base,
            0xc000_0102 => self.msrs.kernel_gs_base,
            TSC_AUX => self.msrs.tsc_aux,
            VM_CR => 0,
            VM_HSAVE_PA => self.msrs.host_save,
            _ => return None,
        })
    }

    /// WRMSR of an MSR of the processor; `None` is #GP(0).
    pub fn write_own_msr(&mut self, msr: u32, value: u64, tsc: u64) -> Option<()> {
        let canonical = || is_canonical(value, 48).then_some(value);
        match msr {
            TSC => self.tsc_base = self.tsc_base.wrapping_add(value.wrapping_sub(tsc)),
            0x174 => self.msrs.sysenter_cs = value,
            0x175 => self.msrs.sysenter_esp = canonical()?,
            0x176 => self.msrs.sysenter_eip = canonical()?,
            PAT => self.msrs.pat = pat_is_legal(value).then_some(value)?,
            EFER => self.write_efer(value)?,
            0xc000_0081 => self.msrs.star = value,
            0xc000_0082 => self.msrs.lstar = canonical()?,
            0xc000_0083 => self.msrs.cstar = canonical()?,
            0xc000_0084 => self.msrs.sfmask = (value >> 32 == 0).then_some(value)?,
            0xc000_0100 => self.segments[FS].base = canonical()?,
            0xc000_0101 => self.segments[GS].base = canonical()?,
            0xc000_0102 => self.msrs.kernel_gs_base = canonical()?,
            TSC_AUX => self.msrs.tsc_aux = (value >> 32 == 0).then_some(value)?,
            VM_HSAVE_PA => self.msrs.host_save = (value & 0xffff_0000_0000_0fff == 0).then_some(value)?,
            _ => return None,
        }
        Some(())
    }

    /// Writes EFER: reserved bits and a change of LME under paging are refused, LMA is kept (APM2 3.1.7, 14.6).
    pub fn write_efer(&mut self, value: u64) -> Option<()> {
        if value & !EFER_WRITABLE != 0 {
            return None;
        }
        if self.cr0 & cr0::PG != 0 && (value ^ self.efer) & efer::LME != 0 {
            return None;
        }
        let value = value & !efer::LMA | self.efer & efer::LMA;
        if (value ^ self.efer) & efer::NXE != 0 {
            self.tlb.flush();
        }
        self.efer = value;
        self.refresh_mode();
        Some(())
    }
}
