//! System instructions (APM3 chapter 4): flags of the system, time, identification, MSRs, waiting; the others by re-export.
//!
//! Exceptions that follow from mode and CPL come first, then the intercept, then everything else (APM2 15.7). Nothing
//! here knows a host: what is not intercepted has the meaning it has on a processor alone.

use super::operand::Width;
use crate::engine::soft::core::{Core, RAX, RCX, RDX, Step, rflags};
use crate::engine::soft::op::Op;
use crate::vmcb::registers::cr4;
use crate::vmcb::{ExitCode, Intercept};

pub use super::control::{clts, invlpg, invlpga, lmsw, mov_from_cr, mov_from_dr, mov_to_cr, mov_to_dr, smsw};
pub use super::fast_calls::{rdfsbase, rdgsbase, swapgs, syscall, sysenter, sysexit, sysret, wrfsbase, wrgsbase};
pub use super::tables::{arpl, lar, lgdt, lidt, lldt, lsl, ltr, sgdt, sidt, sldt, str_, verr, verw};
pub use super::vm::{clgi, skinit, stgi, vmload, vmmcall, vmrun, vmsave};

impl Core {
    /// #GP(0) unless CPL is 0.
    #[inline]
    pub(super) fn privileged(&mut self) -> Step {
        if self.cpl == 0 { Ok(()) } else { self.general_protection() }
    }

    /// IOPL (APM2 3.1.6).
    pub(super) fn iopl(&self) -> u8 {
        (self.system_flags >> 12 & 3) as u8
    }

    /// The guest's TSC at this instruction.
    pub fn tsc_at(&self, op: &Op) -> u64 {
        self.retired_before(op).wrapping_mul(self.tsc_per_instruction).wrapping_add(self.tsc_base)
    }

    /// EDX:EAX.
    fn set_edx_eax(&mut self, value: u64) {
        self.gprs[RAX] = value & 0xffff_ffff;
        self.gprs[RDX] = value >> 32;
    }
}

/// CLI.
pub fn cli(core: &mut Core, _: &Op) -> Step {
    if core.cpl > core.iopl() {
        return core.general_protection();
    }
    core.system_flags &= !rflags::IF;
    Ok(())
}

/// STI. Interrupts wait for one more instruction if IF was clear.
pub fn sti(core: &mut Core, _: &Op) -> Step {
    if core.cpl > core.iopl() {
        return core.general_protection();
    }
    core.interrupt_shadow |= core.system_flags & rflags::IF == 0;
    core.system_flags |= rflags::IF;
    Ok(())
}

/// CLAC.
pub fn clac(core: &mut Core, _: &Op) -> Step {
    if core.cpl != 0 {
        return core.undefined();
    }
    core.system_flags &= !rflags::AC;
    Ok(())
}

/// STAC.
pub fn stac(core: &mut Core, _: &Op) -> Step {
    if core.cpl != 0 {
        return core.undefined();
    }
    core.system_flags |= rflags::AC;
    Ok(())
}

/// HLT. A processor without a host that would wake it leaves by the same exit.
pub fn hlt(core: &mut Core, _: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::HLT)?;
    core.exit_with(ExitCode::HLT, 0, 0)
}

/// CPUID. A processor alone has no model: its host intercepts CPUID, and without one all leaves are zero.
pub fn cpuid(core: &mut Core, _: &Op) -> Step {
    core.intercept(Intercept::CPUID)?;
    for register in 0..4 {
        core.gprs[register] = 0;
    }
    Ok(())
}

/// RDTSC.
pub fn rdtsc(core: &mut Core, op: &Op) -> Step {
    if core.cpl > 0 && core.cr4 & cr4::TSD != 0 {
        return core.general_protection();
    }
    core.intercept(Intercept::RDTSC)?;
    let tsc = core.tsc_at(op);
    core.set_edx_eax(tsc);
    Ok(())
}

/// RDTSCP.
pub fn rdtscp(core: &mut Core, op: &Op) -> Step {
    if core.cpl > 0 && core.cr4 & cr4::TSD != 0 {
        return core.general_protection();
    }
    core.intercept(Intercept::RDTSCP)?;
    let tsc = core.tsc_at(op);
    core.set_edx_eax(tsc);
    core.gprs[RCX] = core.msrs.tsc_aux;
    Ok(())
}

/// RDPMC: this processor has no counters.
pub fn rdpmc(core: &mut Core, _: &Op) -> Step {
    if core.cpl > 0 && core.cr4 & cr4::PCE == 0 {
        return core.general_protection();
    }
    core.intercept(Intercept::RDPMC)?;
    core.general_protection()
}

/// RDPRU: this processor has no such counters.
pub fn rdpru(core: &mut Core, _: &Op) -> Step {
    core.intercept(Intercept::RDPRU)?;
    core.undefined()
}

/// RDMSR.
pub fn rdmsr(core: &mut Core, op: &Op) -> Step {
    core.privileged()?;
    let msr = core.gprs[RCX] as u32;
    if core.msr_intercepted(msr, false) {
        return core.exit_with(ExitCode::MSR, 0, 0);
    }
    match core.read_own_msr(msr, core.tsc_at(op)) {
        Some(value) => {
            core.set_edx_eax(value);
            Ok(())
        }
        None => core.general_protection(),
    }
}

/// WRMSR.
pub fn wrmsr(core: &mut Core, op: &Op) -> Step {
    core.privileged()?;
    let msr = core.gprs[RCX] as u32;
    if core.msr_intercepted(msr, true) {
        return core.exit_with(ExitCode::MSR, 1, 0);
    }
    let value = core.gprs[RDX] << 32 | core.gprs[RAX] & 0xffff_ffff;
    match core.write_own_msr(msr, value, core.tsc_at(op)) {
        Some(()) => Ok(()),
        None => core.general_protection(),
    }
}

/// INVD.
pub fn invd(core: &mut Core, _: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::INVD)
}

/// WBINVD.
pub fn wbinvd(core: &mut Core, _: &Op) -> Step {
    core.privileged()?;
    core.intercept(Intercept::WBINVD)
}

/// MONITOR: not on this processor; a host sees it first.
pub fn monitor(core: &mut Core, _: &Op) -> Step {
    if core.cpl > 0 {
        return core.undefined();
    }
    core.intercept(Intercept::MONITOR)?;
    core.undefined()
}

/// MWAIT: not on this processor; a host sees it first.
pub fn mwait(core: &mut Core, _: &Op) -> Step {
    if core.cpl > 0 {
        return core.undefined();
    }
    core.intercept(Intercept::MWAIT)?;
    core.undefined()
}

/// PAUSE.
pub fn pause(core: &mut Core, _: &Op) -> Step {
    core.intercept(Intercept::PAUSE)
}

/// XGETBV: #UD, because CR4.OSXSAVE cannot be set on this processor.
pub fn xgetbv(core: &mut Core, _: &Op) -> Step {
    core.undefined()
}

/// XSETBV: as XGETBV.
pub fn xsetbv(core: &mut Core, _: &Op) -> Step {
    core.undefined()
}

/// Writes a register of the operand's size.
pub(super) fn set_register(core: &mut Core, register: u8, size: u8, value: u64) {
    match size {
        2 => u16::set(core, register, value as u16),
        4 => u32::set(core, register, value as u32),
        _ => u64::set(core, register, value),
    }
}
