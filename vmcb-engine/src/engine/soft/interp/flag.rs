//! STC, CLC, CMC, STD, CLD, LAHF, SAHF (APM3 chapter 3), and FWAIT, which only looks. The interrupt flag is the system instructions' business.

use super::operand::Width;
use super::pick::{Pick, straight};
use crate::engine::soft::core::{Core, Flags, Step, rflags};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;

/// Number of AH as decode numbers byte registers.
const AH: u8 = 32;

fn clc(core: &mut Core, _: &Op) -> Step {
    core.flags = core.flags.with_cf(false);
    Ok(())
}

fn stc(core: &mut Core, _: &Op) -> Step {
    core.flags = core.flags.with_cf(true);
    Ok(())
}

fn cmc(core: &mut Core, _: &Op) -> Step {
    core.flags = core.flags.with_cf(!core.flags.cf());
    Ok(())
}

fn cld(core: &mut Core, _: &Op) -> Step {
    core.system_flags &= !rflags::DF;
    Ok(())
}

fn std(core: &mut Core, _: &Op) -> Step {
    core.system_flags |= rflags::DF;
    Ok(())
}

fn lahf(core: &mut Core, _: &Op) -> Step {
    let value = core.flags.to_rflags() as u8 | rflags::RESERVED_ONE as u8;
    u8::set(core, AH, value);
    Ok(())
}

fn sahf(core: &mut Core, _: &Op) -> Step {
    let value = u64::from(u8::get(core, AH));
    let overflow = core.flags.to_rflags() & rflags::OF;
    core.flags = Flags::from_rflags(value & rflags::ARITHMETIC & 0xff | overflow);
    Ok(())
}

/// Raises what x87 has pending (APM5 FWAIT).
fn fwait(core: &mut Core, _: &Op) -> Step {
    const MONITOR_AND_SWITCHED: u64 = 1 << 1 | 1 << 3;
    const EXCEPTION_SUMMARY: u16 = 1 << 7;
    if core.cr0 & MONITOR_AND_SWITCHED == MONITOR_AND_SWITCHED {
        return core.raise(7);
    }
    if core.fpu.status & EXCEPTION_SUMMARY != 0 {
        return core.raise(16);
    }
    Ok(())
}

/// 9B, 9E, 9F, F5, F8, F9, FC, FD.
pub fn pick(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0x9b => straight(fwait),
        0x9e => straight(sahf),
        0x9f => straight(lahf),
        0xf5 => straight(cmc),
        0xf8 => straight(clc),
        0xf9 => straight(stc),
        0xfc => straight(cld),
        _ => straight(std),
    }
}
