//! CBW and its kin, MOVSX, MOVZX, MOVSXD, XLAT (APM3 chapter 3).

use super::operand::{Place, Width, checked};
use super::pick::{Pick, by_wide, placed, straight};
use crate::engine::soft::core::{Core, RAX, RDX, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;

#[inline(always)]
fn movzx<W: Width, F: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<F>(core, op)?;
    W::set(core, op.reg, W::cut(value.wide()));
    Ok(())
}

#[inline(always)]
fn movsx<W: Width, F: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<F>(core, op)?;
    W::set(core, op.reg, W::cut(value.signed()));
    Ok(())
}

/// 0F B6, B7, BE, BF.
pub fn pick_extend(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    match insn.opcode {
        0xb6 => by_wide!(size, W => placed!(insn, P => movzx::<W, u8, P>)),
        0xb7 => by_wide!(size, W => placed!(insn, P => movzx::<W, u16, P>)),
        0xbe => by_wide!(size, W => placed!(insn, P => movsx::<W, u8, P>)),
        _ => by_wide!(size, W => placed!(insn, P => movsx::<W, u16, P>)),
    }
}

/// 63 in 64-bit mode.
pub fn pick_movsxd(insn: &Insn) -> Option<Pick> {
    match insn.op.size {
        2 => placed!(insn, P => movzx::<u16, u16, P>),
        4 => placed!(insn, P => movzx::<u32, u32, P>),
        _ => placed!(insn, P => movsx::<u64, u32, P>),
    }
}

/// CBW, CWDE, CDQE: the lower half of the accumulator into all of it.
fn widen<W: Width>(core: &mut Core, _: &Op) -> Step {
    let unused = 64 - W::BITS / 2;
    let value = (core.gprs[RAX] << unused) as i64 >> unused;
    W::set(core, RAX as u8, W::cut(value as u64));
    Ok(())
}

/// CWD, CDQ, CQO: the sign of the accumulator into all of rDX.
fn spread<W: Width>(core: &mut Core, _: &Op) -> Step {
    let sign = (W::get(core, RAX as u8).signed() as i64 >> 63) as u64;
    W::set(core, RDX as u8, W::cut(sign));
    Ok(())
}

/// 98, 99.
pub fn pick_accumulator(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0x98 => by_wide!(insn.op.size, W => straight(widen::<W>)),
        _ => by_wide!(insn.op.size, W => straight(spread::<W>)),
    }
}

/// The operation's memory operand is rBX plus AL as index; decode knows only the segment.
fn xlat(core: &mut Core, op: &Op) -> Step {
    let mut there = Op { base: 3, displacement: (core.gprs[RAX] & 0xff) as i64, ..Op::default() };
    (there.segment, there.address_size) = (op.segment, op.address_size);
    let linear = checked(core, &there, 1, false)?;
    let value = core.load::<u8>(linear)?;
    u8::set(core, RAX as u8, value);
    Ok(())
}

/// D7.
pub fn pick_xlat(_: &Insn) -> Option<Pick> {
    straight(xlat)
}
