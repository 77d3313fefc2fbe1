//! BT, BTS, BTR, BTC, BSF, BSR, POPCNT, LZCNT, CRC32 (APM3 chapter 3).
//!
//! With a register bit offset and a memory operand the offset reaches beyond the operand: bit strings.

use super::operand::{Any, Place, Register, Width, checked};
use super::pick::{Pick, by_memory, by_place, by_wide, straight};
use crate::engine::soft::core::{Core, Flags, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::{Op, form};

/// What is done with the bit after it was copied to CF.
const SET: u8 = 1;
const RESET: u8 = 2;
const COMPLEMENT: u8 = 3;

#[inline(always)]
fn changed<W: Width, const KIND: u8>(old: W, bit: u32) -> W {
    let (old, mask) = (old.wide(), 1u64 << bit);
    W::cut(match KIND {
        SET => old | mask,
        RESET => old & !mask,
        COMPLEMENT => old ^ mask,
        _ => old,
    })
}

/// The bit within the operand itself.
#[inline(always)]
fn within<W: Width, P: Place, const KIND: u8>(core: &mut Core, op: &Op, offset: u64) -> Step {
    let bit = offset as u32 & (W::BITS - 1);
    let old = if KIND == 0 {
        P::load::<W>(core, op)?.wide()
    } else {
        P::modify::<W, _>(core, op, |_, old| (changed::<W, KIND>(old, bit), old.wide()))?
    };
    core.flags = core.flags.with_cf(old >> bit & 1 != 0);
    Ok(())
}

#[inline(always)]
fn imm<W: Width, P: Place, const KIND: u8>(core: &mut Core, op: &Op) -> Step {
    within::<W, P, KIND>(core, op, op.immediate)
}

#[inline(always)]
fn reg<W: Width, const KIND: u8>(core: &mut Core, op: &Op) -> Step {
    let offset = W::get(core, op.reg).wide();
    within::<W, Register, KIND>(core, op, offset)
}

/// The bit of a bit string in memory: the operand is moved by whole operands first.
fn string<W: Width, const KIND: u8>(core: &mut Core, op: &Op) -> Step {
    let offset = W::get(core, op.reg).signed();
    let moved = (offset as i64 >> W::BITS.ilog2()).wrapping_mul(W::BYTES as i64);
    let mut there = Op { displacement: op.displacement.wrapping_add(moved), ..Op::default() };
    (there.base, there.index, there.scale) = (op.base, op.index, op.scale);
    (there.segment, there.address_size) = (op.segment, op.address_size);
    checked(core, &there, W::BYTES, KIND != 0)?;
    within::<W, Any, KIND>(core, &there, offset)
}

fn pick_kind<const KIND: u8>(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    if insn.opcode == 0xba {
        return by_wide!(size, W => by_place!(insn, P => straight(imm::<W, P, KIND>)));
    }
    match insn.is_memory() {
        true => by_wide!(size, W => straight(string::<W, KIND>)),
        false => by_wide!(size, W => straight(reg::<W, KIND>)),
    }
}

/// 0F A3, AB, B3, BB, BA: bit tests.
pub fn pick_test(insn: &Insn) -> Option<Pick> {
    match if insn.opcode == 0xba { insn.extension() } else { insn.opcode >> 3 & 7 } {
        4 => pick_kind::<0>(insn),
        5 => pick_kind::<SET>(insn),
        6 => pick_kind::<RESET>(insn),
        7 => pick_kind::<COMPLEMENT>(insn),
        _ => None,
    }
}

/// BSF, or BSR if `REVERSE`. Of 0 the register stays. PF is that of the index, the other flags but ZF are
/// clear (AMD family 19h).
fn scan<W: Width, P: Place, const REVERSE: bool>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?.wide();
    if value == 0 {
        core.flags = Flags::logic(0);
        return Ok(());
    }
    let bit = if REVERSE { value.ilog2() } else { value.trailing_zeros() };
    W::set(core, op.reg, W::cut(bit.into()));
    core.flags = Flags::logic(0x100 | u64::from(bit));
    Ok(())
}

fn popcnt<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?.wide();
    W::set(core, op.reg, W::cut(value.count_ones().into()));
    core.flags = Flags::only_zf(value == 0);
    Ok(())
}

fn lzcnt<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?.wide();
    let count = value.leading_zeros() - (64 - W::BITS);
    W::set(core, op.reg, W::cut(count.into()));
    // OF stays, the others are clear (AMD family 19h).
    core.flags = Flags::only_zf(count == 0).with_cf_of(value == 0, core.flags.of());
    Ok(())
}

/// 0F BC, BD, B8. This processor has LZCNT but not BMI1: F3 0F BC is BSF.
pub fn pick_scan(insn: &Insn) -> Option<Pick> {
    let (size, f3) = (insn.op.size, insn.prefix == 0xf3);
    match insn.opcode {
        0xbc => by_wide!(size, W => by_place!(insn, P => straight(scan::<W, P, false>))),
        0xbd if f3 => by_wide!(size, W => by_place!(insn, P => straight(lzcnt::<W, P>))),
        0xbd => by_wide!(size, W => by_place!(insn, P => straight(scan::<W, P, true>))),
        _ if f3 => by_wide!(size, W => by_place!(insn, P => straight(popcnt::<W, P>))),
        _ => None,
    }
}

/// CRC-32C, bit-reflected polynomial 11EDC6F41h, as the instruction defines it: no inversion.
fn crc32<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let mut value = P::load::<W>(core, op)?.wide();
    let mut crc = core.gprs[usize::from(op.reg)] as u32;
    for _ in 0..W::BYTES {
        crc ^= value as u8 as u32;
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
        value = value.checked_shr(8).unwrap_or(0);
    }
    core.gprs[usize::from(op.reg)] = crc.into();
    Ok(())
}

/// F2 0F38 F0, F1. MOVBE, which shares the opcodes, is not of this processor.
pub fn pick_crc32(insn: &Insn) -> Option<Pick> {
    if !insn.op.has(form::REPNE) {
        return None;
    }
    match (insn.opcode, insn.is_memory()) {
        (0xf0, false) => straight(crc32::<u8, Register>),
        (0xf0, true) => by_memory!(insn, P => straight(crc32::<u8, P>)),
        _ => by_wide!(insn.op.size, W => by_place!(insn, P => straight(crc32::<W, P>))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_change_as_named() {
        assert_eq!(changed::<u16, SET>(0, 15), 0x8000);
        assert_eq!(changed::<u16, RESET>(0xffff, 0), 0xfffe);
        assert_eq!(changed::<u64, COMPLEMENT>(1, 0), 0);
    }

    #[test]
    fn zero_flag_changes_alone() {
        for before in [0u64, 0x8d5, 0x40, 0x84, 0xc4] {
            for zero in [false, true] {
                let after = Flags::from_rflags(before).with_zf(zero).to_rflags();
                assert_eq!(after, before & 0x895 | if zero { 0x40 } else { 0 });
            }
        }
        assert_eq!(Flags::only_zf(true).to_rflags(), 0x40);
        assert_eq!(Flags::only_zf(false).to_rflags(), 0);
    }
}
