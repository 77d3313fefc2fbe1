//! SYSCALL, SYSRET, SYSENTER, SYSEXIT (APM2 6.1), SWAPGS, and FS and GS base by instruction.
//!
//! As on AMD processors: SYSENTER and SYSEXIT are #UD in long mode, and SYSRET leaves SS's hidden part alone.

use super::system::set_register;
use crate::addr::is_canonical;
use crate::engine::soft::core::{Core, FS, GS, RCX, RDX, RSP, SS, Step, rflags};
use crate::engine::soft::op::{Op, form};
use crate::vmcb::Segment;
use crate::vmcb::registers::{cr0, cr4, efer};

/// Attributes of a flat 64-bit code segment, DPL 0.
const CODE_64: u16 = 0xa9b;
/// Attributes of a flat 32-bit code segment, DPL 0.
const CODE_32: u16 = 0xc9b;
/// Attributes of a flat writable data segment, DPL 0.
const DATA: u16 = 0xc93;
const DPL_3: u16 = 0x60;
const R11: usize = 11;

fn flat(selector: u16, attrib: u16) -> Segment {
    Segment::new(selector, attrib, 0xffff_ffff, 0)
}

/// SYSCALL.
pub fn syscall(core: &mut Core, op: &Op) -> Step {
    if core.efer & efer::SCE == 0 || core.cr0 & cr0::PE == 0 {
        return core.undefined();
    }
    let next = core.next_rip(op);
    let selector = (core.msrs.star >> 32) as u16 & !3;
    core.gprs[RCX] = next;
    if core.efer & efer::LMA != 0 {
        core.gprs[R11] = core.rflags() & !rflags::RF;
        let target = if core.mode.long { core.msrs.lstar } else { core.msrs.cstar };
        let flags = core.rflags() & !core.msrs.sfmask & !rflags::RF;
        core.set_rflags(flags);
        core.segments[SS] = flat(selector.wrapping_add(8), DATA);
        core.set_code_segment(flat(selector, CODE_64), 0);
        core.rip = target;
    } else {
        core.system_flags &= !(rflags::VM | rflags::IF | rflags::RF);
        core.segments[SS] = flat(selector.wrapping_add(8), DATA);
        core.set_code_segment(flat(selector, CODE_32), 0);
        core.rip = core.msrs.star & 0xffff_ffff;
    }
    Ok(())
}

/// SYSRET.
pub fn sysret(core: &mut Core, op: &Op) -> Step {
    if core.efer & efer::SCE == 0 {
        return core.undefined();
    }
    if core.cr0 & cr0::PE == 0 || core.cpl != 0 {
        return core.general_protection();
    }
    let selector = (core.msrs.star >> 48) as u16;
    let long = core.mode.long && op.has(form::WIDE);
    let rip = if long { core.gprs[RCX] } else { core.gprs[RCX] & 0xffff_ffff };
    if core.mode.long {
        let flags = core.gprs[R11] & 0x003c_7fd7;
        core.set_rflags(flags);
    } else {
        core.system_flags |= rflags::IF;
    }
    core.segments[SS].selector = selector.wrapping_add(8) | 3;
    let code =
        if long { flat(selector.wrapping_add(16) | 3, CODE_64 | DPL_3) } else { flat(selector | 3, CODE_32 | DPL_3) };
    core.set_code_segment(code, 3);
    core.rip = rip;
    Ok(())
}

/// SYSENTER.
pub fn sysenter(core: &mut Core, _: &Op) -> Step {
    if core.efer & efer::LMA != 0 {
        return core.undefined();
    }
    let selector = core.msrs.sysenter_cs as u16 & !3;
    if core.cr0 & cr0::PE == 0 || selector == 0 {
        return core.general_protection();
    }
    core.system_flags &= !(rflags::VM | rflags::IF | rflags::RF);
    core.gprs[RSP] = core.msrs.sysenter_esp & 0xffff_ffff;
    core.segments[SS] = flat(selector.wrapping_add(8), DATA);
    core.set_code_segment(flat(selector, CODE_32), 0);
    core.rip = core.msrs.sysenter_eip & 0xffff_ffff;
    Ok(())
}

/// SYSEXIT.
pub fn sysexit(core: &mut Core, _: &Op) -> Step {
    if core.efer & efer::LMA != 0 {
        return core.undefined();
    }
    let selector = core.msrs.sysenter_cs as u16 & !3;
    if core.cr0 & cr0::PE == 0 || core.cpl != 0 || selector == 0 {
        return core.general_protection();
    }
    core.gprs[RSP] = core.gprs[RCX] & 0xffff_ffff;
    let rip = core.gprs[RDX] & 0xffff_ffff;
    core.segments[SS] = flat(selector.wrapping_add(24) | 3, DATA | DPL_3);
    core.set_code_segment(flat(selector.wrapping_add(16) | 3, CODE_32 | DPL_3), 3);
    core.rip = rip;
    Ok(())
}

/// SWAPGS.
pub fn swapgs(core: &mut Core, _: &Op) -> Step {
    if !core.mode.long {
        return core.undefined();
    }
    core.privileged()?;
    std::mem::swap(&mut core.segments[GS].base, &mut core.msrs.kernel_gs_base);
    Ok(())
}

fn check_base_access(core: &mut Core) -> Step {
    if core.mode.long && core.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { core.undefined() }
}

fn read_base(core: &mut Core, op: &Op, segment: usize) -> Step {
    check_base_access(core)?;
    let base = core.segments[segment].base;
    set_register(core, op.rm, op.size.max(4), base);
    Ok(())
}

fn write_base(core: &mut Core, op: &Op, segment: usize) -> Step {
    check_base_access(core)?;
    let value = core.gprs[usize::from(op.rm & 15)] & if op.size == 8 { u64::MAX } else { 0xffff_ffff };
    if !is_canonical(value, 48) {
        return core.general_protection();
    }
    core.segments[segment].base = value;
    Ok(())
}

/// RDFSBASE.
pub fn rdfsbase(core: &mut Core, op: &Op) -> Step {
    read_base(core, op, FS)
}

/// RDGSBASE.
pub fn rdgsbase(core: &mut Core, op: &Op) -> Step {
    read_base(core, op, GS)
}

/// WRFSBASE.
pub fn wrfsbase(core: &mut Core, op: &Op) -> Step {
    write_base(core, op, FS)
}

/// WRGSBASE.
pub fn wrgsbase(core: &mut Core, op: &Op) -> Step {
    write_base(core, op, GS)
}
