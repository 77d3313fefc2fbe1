//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (APM4): comparison of two short strings by a matrix of their elements.

use super::operand::{source128_unaligned, sse_ready, xmm_reg};
use super::{Row, Selector, row_immediate};
use crate::engine::soft::core::{Core, Flags, RAX, RCX, RDX, Step, rflags};
use crate::engine::soft::op::{Op, form};

/// Elements of one operand and how many of them are valid.
struct Text {
    elements: [i32; 16],
    length: usize,
}

/// Bits 1:0 of the immediate: unsigned bytes, unsigned words, signed bytes, signed words.
fn elements(value: u128, control: u64) -> ([i32; 16], usize) {
    let mut out = [0; 16];
    let count = if control & 1 != 0 { 8 } else { 16 };
    for (i, element) in out.iter_mut().take(count).enumerate() {
        *element = match control & 3 {
            0 => i32::from((value >> (8 * i)) as u8),
            1 => i32::from((value >> (16 * i)) as u16),
            2 => i32::from((value >> (8 * i)) as i8),
            _ => i32::from((value >> (16 * i)) as i16),
        };
    }
    (out, count)
}

fn implicit(value: u128, control: u64) -> Text {
    let (elements, count) = elements(value, control);
    let length = elements[..count].iter().position(|element| *element == 0).unwrap_or(count);
    Text { elements, length }
}

fn explicit(value: u128, control: u64, length: i64) -> Text {
    let (elements, count) = elements(value, control);
    Text { elements, length: length.unsigned_abs().min(count as u64) as usize }
}

/// The aggregated comparison, before polarity: one bit for each element of `text`.
fn aggregate(set: &Text, text: &Text, control: u64) -> u32 {
    let count = if control & 1 != 0 { 8 } else { 16 };
    let in_text = |j: usize| j < text.length;
    let bit = |j: usize| -> bool {
        match control >> 2 & 3 {
            0 => in_text(j) && set.elements[..set.length].contains(&text.elements[j]),
            1 => {
                in_text(j)
                    && set.elements[..set.length & !1]
                        .chunks(2)
                        .any(|range| range[0] <= text.elements[j] && text.elements[j] <= range[1])
            }
            2 => match (j < set.length, in_text(j)) {
                (true, true) => set.elements[j] == text.elements[j],
                (false, false) => true,
                _ => false,
            },
            _ => (0..set.length)
                .take_while(|i| i + j < count)
                .all(|i| in_text(i + j) && set.elements[i] == text.elements[i + j]),
        }
    };
    (0..count).fold(0, |bits, j| bits | u32::from(bit(j)) << j)
}

/// Bits 5:4: as it is, negated, as it is, negated where `text` is valid.
fn polarity(bits: u32, text: &Text, control: u64) -> u32 {
    let all = if control & 1 != 0 { 0xff } else { 0xffff };
    match control >> 4 & 3 {
        1 => bits ^ all,
        3 => bits ^ ((1u32 << text.length) - 1),
        _ => bits,
    }
}

fn compare<const EXPLICIT: bool, const MASK: bool>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let control = op.immediate & 0xff;
    let (a, b) = (xmm_reg(core, op), source128_unaligned(core, op)?);
    let (set, text) = if EXPLICIT {
        let length = |register: usize| {
            let value = core.gprs[register];
            if op.has(form::WIDE) { value as i64 } else { i64::from(value as i32) }
        };
        (explicit(a, control, length(RAX)), explicit(b, control, length(RDX)))
    } else {
        (implicit(a, control), implicit(b, control))
    };
    let count = if control & 1 != 0 { 8 } else { 16 };
    let bits = polarity(aggregate(&set, &text, control), &text, control);
    if MASK {
        core.fpu.xmm[0] = if control & 0x40 == 0 {
            bits.into()
        } else {
            let width = 128 / count as u32;
            let ones = u128::MAX >> (128 - width);
            (0..count as u32).filter(|i| bits >> i & 1 != 0).fold(0, |mask, i| mask | ones << (width * i))
        };
    } else {
        let found = if control & 0x40 == 0 { bits.trailing_zeros() } else { bits.checked_ilog2().unwrap_or(32) };
        core.gprs[RCX] = u64::from(found.min(count as u32));
    }
    let flag = |on: bool, flag: u64| if on { flag } else { 0 };
    core.flags = Flags::from_rflags(
        flag(bits != 0, rflags::CF)
            | flag(text.length < count, rflags::ZF)
            | flag(set.length < count, rflags::SF)
            | flag(bits & 1 != 0, rflags::OF),
    );
    Ok(())
}

/// The instruction that a selector names.
pub fn lookup(s: Selector) -> Option<Row> {
    match (s.map, s.prefix, s.opcode) {
        (3, 0x66, 0x60) => row_immediate(compare::<true, true>),
        (3, 0x66, 0x61) => row_immediate(compare::<true, false>),
        (3, 0x66, 0x62) => row_immediate(compare::<false, true>),
        (3, 0x66, 0x63) => row_immediate(compare::<false, false>),
        _ => None,
    }
}
