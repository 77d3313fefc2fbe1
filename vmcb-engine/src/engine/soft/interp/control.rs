//! Control and debug registers (APM2 3.1, 13.1; APM3 MOV CRn, MOV DRn), and what follows from them: the decoding mode.

use super::system::set_register;
use crate::addr::is_canonical;
use crate::engine::soft::core::{CS, Core, Mode, RAX, Step, rflags};
use crate::engine::soft::op::{Op, form};
use crate::engine::soft::tlb::ENTRIES;
use crate::vmcb::Intercept;
use crate::vmcb::registers::{cr0, cr4, efer};

/// Bits of CR4 that this processor has.
pub const CR4_BITS: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::SMEP
    | cr4::SMAP;
/// Bits of CR4 whose change flushes the TLB (APM2 5.5.2).
const CR4_FLUSHING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP;
/// Bits 63:48 of CR3 are reserved with 48 physical address bits.
const CR3_RESERVED: u64 = 0xffff_0000_0000_0000;
/// EXITINFO1 bit 63: the instruction was MOV CRn (APM2 15.8.1).
const MOV_CR: u64 = 1 << 63;

impl Core {
    /// Recomputes [`Core::mode`] and the TLB's set after CS, CR0, EFER or CPL changed.
    #[inline]
    pub fn refresh_mode(&mut self) {
        let code = &self.segments[CS];
        let long = self.efer & efer::LMA != 0 && code.long();
        self.mode = Mode::new(long, code.big(), self.cpl == 3, self.cr0 & cr0::PE != 0);
        self.use_tlb_set(if self.cpl == 3 { ENTRIES } else { 0 });
        if self.cr0 & cr0::AM != 0 && (self.system_flags & rflags::AC != 0 || self.alignment_checked) {
            self.refresh_alignment();
        }
    }

    /// Writes CR0; `None` is #GP(0) (APM2 3.1.1, 14.6.1).
    pub fn write_cr0(&mut self, value: u64) -> Option<()> {
        let value = value & !0xffff_ffff | value & cr0::ALL | cr0::ET;
        let paging = value & cr0::PG != 0;
        if value >> 32 != 0 || (paging && value & cr0::PE == 0) || (value & cr0::NW != 0 && value & cr0::CD == 0) {
            return None;
        }
        let code = self.segments[CS];
        let mut efer = self.efer;
        if paging && self.cr0 & cr0::PG == 0 && efer & efer::LME != 0 {
            if self.cr4 & cr4::PAE == 0 || code.long() {
                return None;
            }
            efer |= efer::LMA;
        } else if !paging && self.cr0 & cr0::PG != 0 {
            if self.mode.long {
                return None;
            }
            efer &= !efer::LMA;
        }
        if (value ^ self.cr0) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush();
        }
        self.cr0 = value;
        self.efer = efer;
        self.refresh_alignment();
        self.refresh_mode();
        Some(())
    }

    /// Writes CR3; `None` is #GP(0).
    pub fn write_cr3(&mut self, value: u64) -> Option<()> {
        if self.efer & efer::LMA != 0 && value & CR3_RESERVED != 0 {
            return None;
        }
        self.cr3 = value;
        self.tlb.flush_local();
        Some(())
    }

    /// Writes CR4; `None` is #GP(0).
    pub fn write_cr4(&mut self, value: u64) -> Option<()> {
        if value & !self.limits.cr4 != 0 || (self.efer & efer::LMA != 0 && value & cr4::PAE == 0) {
            return None;
        }
        if (value ^ self.cr4) & CR4_FLUSHING != 0 {
            self.tlb.flush();
        }
        self.cr4 = value;
        Some(())
    }

    fn require(&mut self, written: Option<()>) -> Step {
        if written.is_some() { Ok(()) } else { self.general_protection() }
    }
}

/// LOCK MOV CR0 is CR8 (APM3 MOV CRn).
fn control_register(op: &Op) -> u8 {
    if op.reg == 0 && op.has(form::LOCK) { 8 } else { op.reg }
}

/// MOV reg, CRn.
pub fn mov_from_cr(core: &mut Core, op: &Op) -> Step {
    let number = control_register(op);
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return core.undefined();
    }
    core.privileged()?;
    core.intercept_info(Intercept::cr_read(number), MOV_CR | u64::from(op.rm))?;
    let value = match number {
        0 => core.cr0,
        2 => core.cr2,
        3 => core.cr3,
        4 => core.cr4,
        _ => u64::from(core.control.task_priority()),
    };
    set_register(core, op.rm, if core.mode.long { 8 } else { 4 }, value);
    Ok(())
}

/// MOV CRn, reg.
pub fn mov_to_cr(core: &mut Core, op: &Op) -> Step {
    let number = control_register(op);
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return core.undefined();
    }
    core.privileged()?;
    let info = MOV_CR | u64::from(op.rm);
    core.intercept_info(Intercept::cr_write(number), info)?;
    let value = core.gprs[usize::from(op.rm & 15)] & if core.mode.long { u64::MAX } else { 0xffff_ffff };
    let written = match number {
        0 => {
            select_cr0(core, value, info)?;
            core.write_cr0(value)
        }
        2 => {
            core.cr2 = value;
            Some(())
        }
        3 => core.write_cr3(value),
        4 => core.write_cr4(value),
        _ => (value < 16).then(|| core.control.set_task_priority(value as u8)),
    };
    core.require(written)
}

/// The selective CR0 intercept: any bit but TS and MP changes (APM2 15.9).
fn select_cr0(core: &mut Core, value: u64, info: u64) -> Step {
    if (value ^ core.cr0) & !(cr0::TS | cr0::MP) & cr0::ALL != 0 {
        core.intercept_info(Intercept::CR0_SEL_WRITE, info)?;
    }
    Ok(())
}

/// SMSW.
pub fn smsw(core: &mut Core, op: &Op) -> Step {
    if core.cr4 & cr4::UMIP != 0 {
        core.privileged()?;
    }
    core.intercept(Intercept::cr_read(0))?;
    let value = core.cr0;
    if op.is_memory() {
        return core.store::<u16>(op.linear(core), value as u16);
    }
    set_register(core, op.rm, op.size, value);
    Ok(())
}

/// LMSW: the low four bits; PE can only be set.
pub fn lmsw(core: &mut Core, op: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::cr_write(0))?;
    let word =
        if op.is_memory() { core.load::<u16>(op.linear(core))? } else { core.gprs[usize::from(op.rm & 15)] as u16 };
    let low = u64::from(word) & 0xf | core.cr0 & cr0::PE;
    let value = core.cr0 & !0xf | low;
    select_cr0(core, value, 0)?;
    let written = core.write_cr0(value);
    core.require(written)
}

/// CLTS.
pub fn clts(core: &mut Core, _: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::cr_write(0))?;
    core.cr0 &= !cr0::TS;
    Ok(())
}

/// Index of DRn in [`Core::debug`], after the exceptions that both directions raise.
fn debug_register(core: &mut Core, op: &Op) -> Step<u8> {
    let number = match op.reg {
        4 | 5 if core.cr4 & cr4::DE != 0 => return core.undefined(),
        4 | 5 => op.reg + 2,
        0..=7 => op.reg,
        _ => return core.undefined(),
    };
    core.privileged()?;
    if core.debug[5] & 1 << 13 != 0 {
        // General detect (APM2 13.1.1.3): DR6.BD, and the access is possible in the handler.
        core.debug[4] |= 1 << 13;
        core.debug[5] &= !(1 << 13);
        return core.raise(1);
    }
    Ok(number)
}

fn debug_index(number: u8) -> usize {
    usize::from(if number < 4 { number } else { number - 2 })
}

/// MOV reg, DRn.
pub fn mov_from_dr(core: &mut Core, op: &Op) -> Step {
    let number = debug_register(core, op)?;
    core.intercept_info(Intercept::dr_read(number), u64::from(op.rm))?;
    let value = core.debug[debug_index(number)];
    set_register(core, op.rm, if core.mode.long { 8 } else { 4 }, value);
    Ok(())
}

/// MOV DRn, reg.
pub fn mov_to_dr(core: &mut Core, op: &Op) -> Step {
    let number = debug_register(core, op)?;
    core.intercept_info(Intercept::dr_write(number), u64::from(op.rm))?;
    let value = core.gprs[usize::from(op.rm & 15)] & if core.mode.long { u64::MAX } else { 0xffff_ffff };
    if number >= 6 && value >> 32 != 0 {
        return core.general_protection();
    }
    core.debug[debug_index(number)] = match number {
        6 => value & 0xe00f | 0xffff_0ff0,
        7 => value & 0xffff_2bff | 0x400,
        _ => value,
    };
    Ok(())
}

/// INVLPG.
pub fn invlpg(core: &mut Core, op: &Op) -> Step {
    core.privileged()?;
    let linear = op.linear(core);
    core.intercept_info(Intercept::INVLPG, linear)?;
    if !core.mode.long || is_canonical(linear, 48) {
        core.tlb.flush_page(linear);
    }
    Ok(())
}

/// INVLPGA: this processor keeps the translations of one ASID only, the loaded one.
pub fn invlpga(core: &mut Core, _: &Op) -> Step {
    if core.efer & efer::SVME == 0 || core.cr0 & cr0::PE == 0 {
        return core.undefined();
    }
    core.privileged()?;
    core.intercept(Intercept::INVLPGA)?;
    let linear = core.gprs[RAX];
    core.tlb.flush_page(linear);
    Ok(())
}
