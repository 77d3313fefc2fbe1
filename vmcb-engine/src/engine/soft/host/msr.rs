//! MSRs of the guest that its host keeps: the rows of the CPU model, each in its home (APM2 appendix A).
//!
//! The platform holds the local APIC's; for kvm-clock the value is kept here and the platform is told, so that it can fill
//! the guest's clock page.

use super::Vcpu;
use crate::capability::CpuModel;
use crate::capability::msr::Home;
use crate::engine::Platform;
use crate::engine::soft::svm::msr::{EFER, PAT, TSC, TSC_AUX};
use crate::vmcb::SaveArea;
use crate::vmcb::registers::{cr0, efer};

const TSC_ADJUST: u32 = 0x3b;
const TSC_DEADLINE: u32 = 0x6e0;

impl Vcpu {
    /// The guest's TSC while the machine's clock shows `tsc`.
    fn guest_tsc(&self, tsc: u64) -> u64 {
        tsc.wrapping_add(self.vmcb.control.tsc_offset)
    }

    /// RDMSR; `None` is #GP(0).
    pub(super) fn read_msr(&mut self, model: CpuModel, platform: &mut dyn Platform, tsc: u64, msr: u32) -> Option<u64> {
        let row = model.msr(msr)?;
        match (row.home, msr) {
            (Home::Constant, _) => Some(row.reset),
            (Home::Lapic, TSC_DEADLINE) => {
                let deadline = platform.msr_read(tsc, self.topology.vcpu as usize, msr)?;
                Some(if deadline == 0 { 0 } else { self.guest_tsc(deadline) })
            }
            (Home::Lapic, _) => platform.msr_read(tsc, self.topology.vcpu as usize, msr),
            (_, TSC) => Some(self.guest_tsc(tsc)),
            (_, EFER) => Some(self.vmcb.save.efer & !efer::SVME),
            _ => match saved(&mut self.vmcb.save, msr) {
                Some(place) => Some(*place),
                None => self.msrs.get(&msr).copied(),
            },
        }
    }

    /// WRMSR; `None` is #GP(0).
    pub(super) fn write_msr(
        &mut self,
        model: CpuModel,
        platform: &mut dyn Platform,
        tsc: u64,
        msr: u32,
        value: u64,
    ) -> Option<()> {
        let row = model.msr(msr)?;
        let vcpu = self.topology.vcpu as usize;
        if row.home == Home::Lapic {
            let value = if msr == TSC_DEADLINE && value != 0 { self.machine_tsc(value) } else { value };
            return platform.msr_write(tsc, vcpu, msr, value);
        }
        let current = self.read_msr(model, platform, tsc, msr)?;
        if !row.accepts(current, value) {
            return None;
        }
        match msr {
            TSC => self.move_tsc(value.wrapping_sub(current)),
            TSC_ADJUST => self.move_tsc(value.wrapping_sub(current)),
            EFER => self.write_efer(value)?,
            _ => {
                if matches!(msr, 0x4b56_4d00 | 0x4b56_4d01) {
                    platform.msr_write(tsc, vcpu, msr, value)?;
                }
                if msr == TSC_AUX {
                    self.core.msrs.tsc_aux = value;
                }
                match saved(&mut self.vmcb.save, msr) {
                    Some(place) => *place = value,
                    None => {
                        self.msrs.insert(msr, value);
                    }
                }
            }
        }
        Some(())
    }

    /// A deadline in the guest's TSC, in the machine's: one that has passed stays past, and never becomes "disarmed".
    fn machine_tsc(&self, guest: u64) -> u64 {
        guest.wrapping_sub(self.vmcb.control.tsc_offset).max(1)
    }

    /// TSC and TSC_ADJUST move together (APM2 13.2.4).
    fn move_tsc(&mut self, by: u64) {
        let control = &mut self.vmcb.control;
        control.tsc_offset = control.tsc_offset.wrapping_add(by);
        let adjust = self.msrs.entry(TSC_ADJUST).or_default();
        *adjust = adjust.wrapping_add(by);
    }

    fn write_efer(&mut self, value: u64) -> Option<()> {
        let save = &mut self.vmcb.save;
        let long = save.efer & (efer::LME | efer::LMA);
        if save.cr0 & cr0::PG != 0 && value & efer::LME != long & efer::LME {
            return None;
        }
        save.efer = value & !efer::LMA | save.efer & efer::LMA | efer::SVME;
        Some(())
    }
}

/// MSRs that have a row in the save area and that the guest does not reach without its host.
fn saved(save: &mut SaveArea, msr: u32) -> Option<&mut u64> {
    Some(match msr {
        PAT => &mut save.g_pat,
        0x1d9 => &mut save.dbgctl,
        0x1db => &mut save.br_from,
        0x1dc => &mut save.br_to,
        0x1dd => &mut save.lastexcpfrom,
        0x1de => &mut save.lastexcpto,
        _ => return None,
    })
}
