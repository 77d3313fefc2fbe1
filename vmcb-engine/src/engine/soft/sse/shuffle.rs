//! Shuffles, blends, inserts and extracts: instructions whose immediate or mask chooses elements. Pure functions of the
//! operands, written out.

use super::operand::{mmx_ready, set_mmx, set_xmm_reg, source_mmx, source32, source128, sse_ready, xmm_reg};
use super::{Row, Selector, row, row_immediate};
use crate::engine::soft::core::{Core, Flags, Step, rflags};
use crate::engine::soft::op::{Op, form};

fn element(value: u128, bits: u32, index: u64) -> u128 {
    value >> (u64::from(bits) * index) & (u128::MAX >> (128 - bits))
}

fn with_element(value: u128, bits: u32, index: u64, new: u128) -> u128 {
    let mask = u128::MAX >> (128 - bits);
    let shift = u64::from(bits) * index;
    value & !(mask << shift) | (new & mask) << shift
}

fn immediate(f: impl Fn(u128, u128, u64) -> u128 + Copy + 'static) -> Option<Row> {
    row_immediate(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source128(core, op)?;
        let result = f(xmm_reg(core, op), source, op.immediate & 0xff);
        set_xmm_reg(core, op, result);
        Ok(())
    })
}

fn shuffle_doublewords(_: u128, source: u128, control: u64) -> u128 {
    (0..4).fold(0, |all, i| with_element(all, 32, i, element(source, 32, control >> (2 * i) & 3)))
}

fn shuffle_words(source: u128, control: u64, first: u64) -> u128 {
    (0..4)
        .fold(source, |all, i| with_element(all, 16, first + i, element(source, 16, first + (control >> (2 * i) & 3))))
}

fn shuffle_singles(destination: u128, source: u128, control: u64) -> u128 {
    (0..4).fold(0, |all, i| {
        let from = if i < 2 { destination } else { source };
        with_element(all, 32, i, element(from, 32, control >> (2 * i) & 3))
    })
}

fn shuffle_doubles(destination: u128, source: u128, control: u64) -> u128 {
    element(destination, 64, control & 1) | element(source, 64, control >> 1 & 1) << 64
}

fn align_right(destination: u128, source: u128, bytes: u64) -> u128 {
    match bytes {
        0 => source,
        1..=15 => source >> (8 * bytes) | destination << (128 - 8 * bytes),
        16 => destination,
        17..=31 => destination >> (8 * (bytes - 16)),
        _ => 0,
    }
}

fn blend<const BITS: u32>(destination: u128, source: u128, control: u64) -> u128 {
    (0..u64::from(128 / BITS))
        .filter(|i| control >> i & 1 != 0)
        .fold(destination, |all, i| with_element(all, BITS, i, element(source, BITS, i)))
}

/// Sums of absolute differences (APM4 MPSADBW).
fn multiple_sums(destination: u128, source: u128, control: u64) -> u128 {
    let (block, window) = (4 * (control & 3), 4 * (control >> 2 & 1));
    (0..8).fold(0, |all, i| {
        let sum: u128 =
            (0..4).map(|k| element(source, 8, block + k).abs_diff(element(destination, 8, window + i + k))).sum();
        with_element(all, 16, i, sum)
    })
}

/// BLENDVPS, BLENDVPD, PBLENDVB: the sign bits of XMM0 choose.
fn variable_blend<const BITS: u32>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let source = source128(core, op)?;
    let mask = core.fpu.xmm[0];
    let control = (0..128 / BITS).fold(0u64, |bits, i| bits | ((mask >> (BITS * i + BITS - 1)) as u64 & 1) << i);
    set_xmm_reg(core, op, blend::<BITS>(xmm_reg(core, op), source, control));
    Ok(())
}

/// PTEST: ZF if no common bit, CF if the source has no bit outside the destination.
fn test(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let (source, destination) = (source128(core, op)?, xmm_reg(core, op));
    let zero = if source & destination == 0 { rflags::ZF } else { 0 };
    let carry = if source & !destination == 0 { rflags::CF } else { 0 };
    core.flags = Flags::from_rflags(zero | carry);
    Ok(())
}

fn mmx_shuffle(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let source = source_mmx(core, op)?;
    set_mmx(core, op.reg, shuffle_words(source.into(), op.immediate & 0xff, 0) as u64);
    Ok(())
}

fn mmx_align_right(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let source = source_mmx(core, op)?;
    let joined = u128::from(core.fpu.registers[usize::from(op.reg & 7)].0) << 64 | u128::from(source);
    let bytes = op.immediate & 0xff;
    set_mmx(core, op.reg, if bytes > 15 { 0 } else { (joined >> (8 * bytes)) as u64 });
    Ok(())
}

/// What an insert takes: a general register, or memory of the element's size.
fn inserted<const BITS: u32>(core: &mut Core, op: &Op) -> Step<u64> {
    if !op.is_memory() {
        return Ok(core.gprs[usize::from(op.rm & 15)]);
    }
    let linear = op.linear(core);
    match BITS {
        8 => core.load::<u8>(linear).map(u64::from),
        16 => core.load::<u16>(linear).map(u64::from),
        32 => core.load::<u32>(linear).map(u64::from),
        _ => core.load::<u64>(linear),
    }
}

fn insert<const BITS: u32>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = inserted::<BITS>(core, op)?;
    let index = op.immediate & u64::from(128 / BITS - 1);
    set_xmm_reg(core, op, with_element(xmm_reg(core, op), BITS, index, value.into()));
    Ok(())
}

fn mmx_insert(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = inserted::<16>(core, op)?;
    let destination = core.fpu.registers[usize::from(op.reg & 7)].0;
    set_mmx(core, op.reg, with_element(destination.into(), 16, op.immediate & 3, value.into()) as u64);
    Ok(())
}

/// PEXTRB, PEXTRW (0F3A), PEXTRD, PEXTRQ, EXTRACTPS: from ModRM.reg to ModRM.rm.
fn extract<const BITS: u32>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = element(xmm_reg(core, op), BITS, op.immediate & u64::from(128 / BITS - 1)) as u64;
    if !op.is_memory() {
        core.gprs[usize::from(op.rm & 15)] = value;
        return Ok(());
    }
    let linear = op.linear(core);
    match BITS {
        8 => core.store(linear, value as u8),
        16 => core.store(linear, value as u16),
        32 => core.store(linear, value as u32),
        _ => core.store(linear, value),
    }
}

/// 0F C5: PEXTRW from ModRM.rm to a general register.
fn extract_word(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = element(core.fpu.xmm[usize::from(op.rm & 15)], 16, op.immediate & 7);
    core.gprs[usize::from(op.reg & 15)] = value as u64;
    Ok(())
}

fn mmx_extract_word(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = element(core.fpu.registers[usize::from(op.rm & 7)].0.into(), 16, op.immediate & 3);
    super::operand::enter_mmx(core);
    core.gprs[usize::from(op.reg & 15)] = value as u64;
    Ok(())
}

/// INSERTPS: bits 7:6 choose in a source register, 5:4 where it goes, 3:0 what becomes zero.
fn insert_single(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let control = op.immediate & 0xff;
    let source = source32(core, op)?;
    let chosen = if op.is_memory() { source } else { element(source, 32, control >> 6) };
    let placed = with_element(xmm_reg(core, op), 32, control >> 4 & 3, chosen);
    let result = (0..4).filter(|i| control >> i & 1 != 0).fold(placed, |all, i| with_element(all, 32, i, 0));
    set_xmm_reg(core, op, result);
    Ok(())
}

/// CRC32 (polynomial 11EDC6F41): the source's size is the opcode's or the prefixes'.
fn crc32(core: &mut Core, op: &Op) -> Step {
    let (value, bits) = match (op.code as u8 == 0xf0, op.has(form::WIDE), op.has(form::OPERAND_SIZE)) {
        (true, ..) => (byte_source(core, op)?, 8),
        (_, true, _) => (inserted::<64>(core, op)?, 64),
        (_, _, true) => (inserted::<16>(core, op)? & 0xffff, 16),
        _ => (inserted::<32>(core, op)? & 0xffff_ffff, 32),
    };
    let mut crc = core.gprs[usize::from(op.reg & 15)] as u32;
    for i in (0..bits).step_by(8) {
        crc ^= (value >> i) as u32 & 0xff;
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    core.gprs[usize::from(op.reg & 15)] = crc.into();
    Ok(())
}

/// A byte register (AH to BH without REX) or memory byte.
fn byte_source(core: &mut Core, op: &Op) -> Step<u64> {
    if op.is_memory() {
        return core.load::<u8>(op.linear(core)).map(u64::from);
    }
    let high = (4..8).contains(&op.rm) && !op.has(form::REX);
    let value = if high { core.gprs[usize::from(op.rm - 4)] >> 8 } else { core.gprs[usize::from(op.rm & 15)] };
    Ok(value & 0xff)
}

/// The instruction that a selector names.
pub fn lookup(s: Selector) -> Option<Row> {
    match s.map {
        1 => two_byte(s),
        2 => match (s.opcode, s.prefix) {
            (0x10, 0x66) => row(variable_blend::<8>),
            (0x14, 0x66) => row(variable_blend::<32>),
            (0x15, 0x66) => row(variable_blend::<64>),
            (0x17, 0x66) => row(test),
            (0xf0 | 0xf1, 0xf2) => row(crc32),
            _ => None,
        },
        _ => three_byte(s),
    }
}

fn two_byte(s: Selector) -> Option<Row> {
    match (s.opcode, s.prefix) {
        (0x70, 0) => row_immediate(mmx_shuffle),
        (0x70, 0x66) => immediate(shuffle_doublewords),
        (0x70, 0xf2) => immediate(|_, source, control| shuffle_words(source, control, 0)),
        (0x70, 0xf3) => immediate(|_, source, control| shuffle_words(source, control, 4)),
        (0xc4, 0) => row_immediate(mmx_insert),
        (0xc4, 0x66) => row_immediate(insert::<16>),
        (0xc5, 0) if !s.memory => row_immediate(mmx_extract_word),
        (0xc5, 0x66) if !s.memory => row_immediate(extract_word),
        (0xc6, 0) => immediate(shuffle_singles),
        (0xc6, 0x66) => immediate(shuffle_doubles),
        _ => None,
    }
}

fn three_byte(s: Selector) -> Option<Row> {
    match (s.opcode, s.prefix) {
        (0x0f, 0) => row_immediate(mmx_align_right),
        (0x0f, 0x66) => immediate(align_right),
        (0x0c, 0x66) => immediate(blend::<32>),
        (0x0d, 0x66) => immediate(blend::<64>),
        (0x0e, 0x66) => immediate(blend::<16>),
        (0x14, 0x66) => row_immediate(extract::<8>),
        (0x15, 0x66) => row_immediate(extract::<16>),
        (0x16, 0x66) if s.wide => row_immediate(extract::<64>),
        (0x16, 0x66) => row_immediate(extract::<32>),
        (0x17, 0x66) => row_immediate(extract::<32>),
        (0x20, 0x66) => row_immediate(insert::<8>),
        (0x21, 0x66) => row_immediate(insert_single),
        (0x22, 0x66) if s.wide => row_immediate(insert::<64>),
        (0x22, 0x66) => row_immediate(insert::<32>),
        (0x42, 0x66) => immediate(multiple_sums),
        _ => None,
    }
}
