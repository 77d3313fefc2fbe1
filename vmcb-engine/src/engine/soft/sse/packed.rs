//! Packed integer arithmetic: one table of SSE rows, and the MMX twins that are made from the same functions.
//!
//! An MMX instruction is done by its SSE twin on the low halves: element-wise operations as they are, those that gather
//! (packs, horizontal adds) on destination and source joined in one register.

use super::native as n;
use super::operand::{mmx_ready, set_mmx, set_xmm_reg, source_mmx, source128, sse_ready, xmm_reg};
use super::{Row, Selector, row, row_immediate};
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::op::Op;

/// A function of two registers. Only plain functions: they become part of a handler's type.
trait Binary: Fn(u128, u128) -> u128 + Copy + 'static {}
impl<F: Fn(u128, u128) -> u128 + Copy + 'static> Binary for F {}

/// `xmm, xmm/m128`.
fn sse(f: impl Binary) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source128(core, op)?;
        let result = f(xmm_reg(core, op), source);
        set_xmm_reg(core, op, result);
        Ok(())
    })
}

/// `mm, mm/m64`: the low half of the SSE result.
fn mmx(f: impl Binary) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        mmx_ready(core)?;
        let source = source_mmx(core, op)?;
        let destination = core.fpu.registers[usize::from(op.reg & 7)].0;
        set_mmx(core, op.reg, f(destination.into(), source.into()) as u64);
        Ok(())
    })
}

/// `mm, mm/m32`: as [`mmx`], with only the four bytes in memory that are used.
fn mmx_low(f: impl Binary) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        mmx_ready(core)?;
        let source = if op.is_memory() { core.load::<u32>(op.linear(core))?.into() } else { source_mmx(core, op)? };
        let destination = core.fpu.registers[usize::from(op.reg & 7)].0;
        set_mmx(core, op.reg, f(destination.into(), source.into()) as u64);
        Ok(())
    })
}

/// `mm, mm/m64`: the SSE function of (source : destination) with itself.
fn mmx_joined(f: impl Binary) -> Option<Row> {
    mmx(move |d, s| {
        let joined = d | s << 64;
        f(joined, joined)
    })
}

/// `mm, mm/m64`: the high half of the SSE result.
fn mmx_high(f: impl Binary) -> Option<Row> {
    mmx(move |d, s| f(d, s) >> 64)
}

/// Both, element-wise.
fn both(selector: Selector, f: impl Binary) -> Option<Row> {
    match selector.prefix {
        0x66 => sse(f),
        0 => mmx(f),
        _ => None,
    }
}

/// Both, of the low halves of the operands.
fn both_low(selector: Selector, f: impl Binary) -> Option<Row> {
    if selector.prefix == 0 { mmx_low(f) } else { both(selector, f) }
}

/// Both, gathering.
fn gathering(selector: Selector, f: impl Binary) -> Option<Row> {
    match selector.prefix {
        0x66 => sse(f),
        0 => mmx_joined(f),
        _ => None,
    }
}

fn only_sse(selector: Selector, f: impl Binary) -> Option<Row> {
    if selector.prefix == 0x66 { sse(f) } else { None }
}

/// The packed integer instruction that a selector names.
pub fn lookup(selector: Selector) -> Option<Row> {
    match selector.map {
        1 => two_byte(selector),
        2 => three_byte(selector),
        _ => None,
    }
}

fn two_byte(s: Selector) -> Option<Row> {
    match s.opcode {
        0x54 if s.prefix == 0 || s.prefix == 0x66 => sse(|d, s| d & s),
        0x55 if s.prefix == 0 || s.prefix == 0x66 => sse(|d, s| !d & s),
        0x56 if s.prefix == 0 || s.prefix == 0x66 => sse(|d, s| d | s),
        0x57 if s.prefix == 0 || s.prefix == 0x66 => sse(|d, s| d ^ s),
        0x14 if s.prefix == 0 => sse(n::unpcklps),
        0x14 if s.prefix == 0x66 => sse(n::unpcklpd),
        0x15 if s.prefix == 0 => sse(n::unpckhps),
        0x15 if s.prefix == 0x66 => sse(n::unpckhpd),
        0x60 => both_low(s, n::punpcklbw),
        0x61 => both_low(s, n::punpcklwd),
        0x62 => both_low(s, n::punpckldq),
        0x63 => gathering(s, n::packsswb),
        0x64 => both(s, n::pcmpgtb),
        0x65 => both(s, n::pcmpgtw),
        0x66 => both(s, n::pcmpgtd),
        0x67 => gathering(s, n::packuswb),
        0x68 if s.prefix == 0 => mmx_high(n::punpcklbw),
        0x69 if s.prefix == 0 => mmx_high(n::punpcklwd),
        0x6a if s.prefix == 0 => mmx_high(n::punpckldq),
        0x68 => only_sse(s, n::punpckhbw),
        0x69 => only_sse(s, n::punpckhwd),
        0x6a => only_sse(s, n::punpckhdq),
        0x6b => gathering(s, n::packssdw),
        0x6c => only_sse(s, n::punpcklqdq),
        0x6d => only_sse(s, n::punpckhqdq),
        0x71..=0x73 => shift_group(s),
        0x74 => both(s, n::pcmpeqb),
        0x75 => both(s, n::pcmpeqw),
        0x76 => both(s, n::pcmpeqd),
        0xd1 => both(s, n::psrlw),
        0xd2 => both(s, n::psrld),
        0xd3 => both(s, n::psrlq),
        0xd4 => both(s, n::paddq),
        0xd5 => both(s, n::pmullw),
        0xd8 => both(s, n::psubusb),
        0xd9 => both(s, n::psubusw),
        0xda => both(s, n::pminub),
        0xdb => both(s, |d, s| d & s),
        0xdc => both(s, n::paddusb),
        0xdd => both(s, n::paddusw),
        0xde => both(s, n::pmaxub),
        0xdf => both(s, |d, s| !d & s),
        0xe0 => both(s, n::pavgb),
        0xe1 => both(s, n::psraw),
        0xe2 => both(s, n::psrad),
        0xe3 => both(s, n::pavgw),
        0xe4 => both(s, n::pmulhuw),
        0xe5 => both(s, n::pmulhw),
        0xe8 => both(s, n::psubsb),
        0xe9 => both(s, n::psubsw),
        0xea => both(s, n::pminsw),
        0xeb => both(s, |d, s| d | s),
        0xec => both(s, n::paddsb),
        0xed => both(s, n::paddsw),
        0xee => both(s, n::pmaxsw),
        0xef => both(s, |d, s| d ^ s),
        0xf1 => both(s, n::psllw),
        0xf2 => both(s, n::pslld),
        0xf3 => both(s, n::psllq),
        0xf4 => both(s, n::pmuludq),
        0xf5 => both(s, n::pmaddwd),
        0xf6 => both(s, n::psadbw),
        0xf8 => both(s, n::psubb),
        0xf9 => both(s, n::psubw),
        0xfa => both(s, n::psubd),
        0xfb => both(s, n::psubq),
        0xfc => both(s, n::paddb),
        0xfd => both(s, n::paddw),
        0xfe => both(s, n::paddd),
        _ => None,
    }
}

fn three_byte(s: Selector) -> Option<Row> {
    match s.opcode {
        0x00 if s.prefix == 0 => mmx(|d, s| n::pshufb(d, s & 0x8787_8787_8787_8787)),
        0x00 => only_sse(s, n::pshufb),
        0x01 => gathering(s, n::phaddw),
        0x02 => gathering(s, n::phaddd),
        0x03 => gathering(s, n::phaddsw),
        0x04 => both(s, n::pmaddubsw),
        0x05 => gathering(s, n::phsubw),
        0x06 => gathering(s, n::phsubd),
        0x07 => gathering(s, n::phsubsw),
        0x08 => both(s, n::psignb),
        0x09 => both(s, n::psignw),
        0x0a => both(s, n::psignd),
        0x0b => both(s, n::pmulhrsw),
        0x1c => both(s, n::pabsb),
        0x1d => both(s, n::pabsw),
        0x1e => both(s, n::pabsd),
        0x28 => only_sse(s, n::pmuldq),
        0x29 => only_sse(s, n::pcmpeqq),
        0x2b => only_sse(s, n::packusdw),
        0x37 => only_sse(s, n::pcmpgtq),
        0x38 => only_sse(s, n::pminsb),
        0x39 => only_sse(s, n::pminsd),
        0x3a => only_sse(s, n::pminuw),
        0x3b => only_sse(s, n::pminud),
        0x3c => only_sse(s, n::pmaxsb),
        0x3d => only_sse(s, n::pmaxsd),
        0x3e => only_sse(s, n::pmaxuw),
        0x3f => only_sse(s, n::pmaxud),
        0x40 => only_sse(s, n::pmulld),
        0x41 => only_sse(s, n::phminposuw),
        _ => None,
    }
}

/// Groups 12 to 14: shifts of ModRM.rm by an immediate.
fn shift_group(s: Selector) -> Option<Row> {
    if s.memory {
        return None;
    }
    match (s.opcode, s.reg) {
        (0x71, 2) => shift(s, n::psrlw),
        (0x71, 4) => shift(s, n::psraw),
        (0x71, 6) => shift(s, n::psllw),
        (0x72, 2) => shift(s, n::psrld),
        (0x72, 4) => shift(s, n::psrad),
        (0x72, 6) => shift(s, n::pslld),
        (0x73, 2) => shift(s, n::psrlq),
        (0x73, 6) => shift(s, n::psllq),
        (0x73, 3) if s.prefix == 0x66 => shift(s, |d, count| if count > 15 { 0 } else { d >> (8 * count) }),
        (0x73, 7) if s.prefix == 0x66 => shift(s, |d, count| if count > 15 { 0 } else { d << (8 * count) }),
        _ => None,
    }
}

fn shift(selector: Selector, f: impl Binary) -> Option<Row> {
    match selector.prefix {
        0x66 => row_immediate(move |core: &mut Core, op: &Op| -> Step {
            sse_ready(core)?;
            let register = &mut core.fpu.xmm[usize::from(op.rm & 15)];
            *register = f(*register, u128::from(op.immediate & 0xff));
            Ok(())
        }),
        0 => row_immediate(move |core: &mut Core, op: &Op| -> Step {
            mmx_ready(core)?;
            let value = core.fpu.registers[usize::from(op.rm & 7)].0;
            set_mmx(core, op.rm, f(value.into(), u128::from(op.immediate & 0xff)) as u64);
            Ok(())
        }),
        _ => None,
    }
}
