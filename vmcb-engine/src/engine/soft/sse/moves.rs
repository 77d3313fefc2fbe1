//! Moves between XMM, MMX, general registers and memory, and masks made from sign bits.

use super::native as n;
use super::operand::{
    aligned, enter_mmx, mmx_ready, set_mmx, set_xmm_reg, source_general, source_mmx, source32, source64, source128,
    source128_unaligned, sse_ready, xmm_reg,
};
use super::{Row, Selector, row};
use crate::engine::soft::core::{Core, RDI, Step};
use crate::engine::soft::op::{NO_SEGMENT, Op, form};

const LOW: u128 = u64::MAX as u128;

/// `xmm, xmm/m128` without alignment.
fn load_unaligned(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = source128_unaligned(core, op)?;
    set_xmm_reg(core, op, value);
    Ok(())
}

/// `xmm, xmm/m128` aligned.
fn load_aligned(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = source128(core, op)?;
    set_xmm_reg(core, op, value);
    Ok(())
}

/// `xmm/m128, xmm` without alignment.
fn store_unaligned(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = xmm_reg(core, op);
    if op.is_memory() {
        return core.store(op.linear(core), value);
    }
    core.fpu.xmm[usize::from(op.rm & 15)] = value;
    Ok(())
}

/// `xmm/m128, xmm` aligned.
fn store_aligned(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = xmm_reg(core, op);
    if op.is_memory() {
        let linear = aligned(core, op)?;
        return core.store(linear, value);
    }
    core.fpu.xmm[usize::from(op.rm & 15)] = value;
    Ok(())
}

/// MOVSS, MOVSD load: from memory the rest of the register becomes zero, from a register it stays. `bits` is 32 or 64.
fn load_scalar<const BITS: u32>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let source = if BITS == 32 { source32(core, op)? } else { source64(core, op)? };
    let mask = u128::MAX >> (128 - BITS);
    let value = if op.is_memory() { source } else { xmm_reg(core, op) & !mask | source & mask };
    set_xmm_reg(core, op, value);
    Ok(())
}

/// MOVSS, MOVSD store.
fn store_scalar<const BITS: u32>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = xmm_reg(core, op);
    if op.is_memory() {
        let linear = op.linear(core);
        return if BITS == 32 { core.store(linear, value as u32) } else { core.store(linear, value as u64) };
    }
    let mask = u128::MAX >> (128 - BITS);
    let register = &mut core.fpu.xmm[usize::from(op.rm & 15)];
    *register = *register & !mask | value & mask;
    Ok(())
}

/// MOVLPS, MOVLPD, and MOVHLPS from a register.
fn load_low(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let source = source64(core, op)?;
    let low = if op.is_memory() { source } else { source >> 64 };
    set_xmm_reg(core, op, xmm_reg(core, op) & !LOW | low);
    Ok(())
}

/// MOVHPS, MOVHPD, and MOVLHPS from a register.
fn load_high(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let source = source64(core, op)?;
    set_xmm_reg(core, op, xmm_reg(core, op) & LOW | source << 64);
    Ok(())
}

fn store_low(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    core.store(op.linear(core), xmm_reg(core, op) as u64)
}

fn store_high(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    core.store(op.linear(core), (xmm_reg(core, op) >> 64) as u64)
}

/// MOVD, MOVQ from a general register or memory.
fn from_general(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = source_general(core, op, op.has(form::WIDE))?;
    set_xmm_reg(core, op, value.into());
    Ok(())
}

fn mmx_from_general(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = source_general(core, op, op.has(form::WIDE))?;
    set_mmx(core, op.reg, value);
    Ok(())
}

fn put_general(core: &mut Core, op: &Op, value: u64) -> Step {
    match (op.is_memory(), op.has(form::WIDE)) {
        (true, true) => return core.store(op.linear(core), value),
        (true, false) => return core.store(op.linear(core), value as u32),
        (false, true) => core.gprs[usize::from(op.rm & 15)] = value,
        (false, false) => core.gprs[usize::from(op.rm & 15)] = value & 0xffff_ffff,
    }
    Ok(())
}

fn to_general(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = xmm_reg(core, op) as u64;
    put_general(core, op, value)
}

fn mmx_to_general(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = core.fpu.registers[usize::from(op.reg & 7)].0;
    put_general(core, op, value)?;
    enter_mmx(core);
    Ok(())
}

/// F3 0F 7E: MOVQ load.
fn load_quad(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = source64(core, op)? & LOW;
    set_xmm_reg(core, op, value);
    Ok(())
}

/// 66 0F D6: MOVQ store; the rest of a register becomes zero.
fn store_quad(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = xmm_reg(core, op) as u64;
    if op.is_memory() {
        return core.store(op.linear(core), value);
    }
    core.fpu.xmm[usize::from(op.rm & 15)] = value.into();
    Ok(())
}

fn mmx_load(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = source_mmx(core, op)?;
    set_mmx(core, op.reg, value);
    Ok(())
}

fn mmx_store(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = core.fpu.registers[usize::from(op.reg & 7)].0;
    if op.is_memory() {
        core.store(op.linear(core), value)?;
        enter_mmx(core);
    } else {
        set_mmx(core, op.rm, value);
    }
    Ok(())
}

fn move_sign_mask<const BITS: u32>(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value = core.fpu.xmm[usize::from(op.rm & 15)];
    let mask = (0..128 / BITS).fold(0u64, |mask, i| mask | ((value >> (BITS * i + BITS - 1)) as u64 & 1) << i);
    core.gprs[usize::from(op.reg & 15)] = mask;
    Ok(())
}

fn mmx_sign_mask(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let value = core.fpu.registers[usize::from(op.rm & 7)].0;
    let mask = (0..8).fold(0u64, |mask, i| mask | (value >> (8 * i + 7) & 1) << i);
    enter_mmx(core);
    core.gprs[usize::from(op.reg & 15)] = mask;
    Ok(())
}

/// F3 0F D6: MOVQ2DQ.
fn mmx_to_xmm(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    mmx_ready(core)?;
    let value = core.fpu.registers[usize::from(op.rm & 7)].0;
    enter_mmx(core);
    set_xmm_reg(core, op, value.into());
    Ok(())
}

/// F2 0F D6: MOVDQ2Q.
fn xmm_to_mmx(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    mmx_ready(core)?;
    let value = core.fpu.xmm[usize::from(op.rm & 15)] as u64;
    set_mmx(core, op.reg, value);
    Ok(())
}

/// MOVNTI.
fn store_general(core: &mut Core, op: &Op) -> Step {
    let (linear, value) = (op.linear(core), core.gprs[usize::from(op.reg & 15)]);
    if op.has(form::WIDE) { core.store(linear, value) } else { core.store(linear, value as u32) }
}

/// Where MASKMOVQ and MASKMOVDQU store: DS:rDI, or the segment of an override.
fn masked_address(core: &Core, op: &Op) -> u64 {
    let offset = match op.address_size {
        8 => core.gprs[RDI],
        4 => core.gprs[RDI] & 0xffff_ffff,
        _ => core.gprs[RDI] & 0xffff,
    };
    if op.segment == NO_SEGMENT { offset } else { offset.wrapping_add(core.segments[usize::from(op.segment)].base) }
}

fn store_masked(core: &mut Core, linear: u64, value: u128, mask: u128, bytes: u64) -> Step {
    let chosen = |i: &u64| mask >> (8 * i + 7) & 1 != 0;
    // Of each page that a byte goes to, the first byte of the operand is what a fault tells of.
    let room = 0x1000 - (linear & 0xfff);
    for (first, end) in [(0, room.min(bytes)), (room, bytes)] {
        if (first..end).any(|i| chosen(&i)) {
            core.probe_write(linear.wrapping_add(first), 1)?;
        }
    }
    for i in (0..bytes).filter(chosen) {
        core.store(linear.wrapping_add(i), (value >> (8 * i)) as u8)?;
    }
    Ok(())
}

fn mask_store(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let mask = core.fpu.xmm[usize::from(op.rm & 15)];
    store_masked(core, masked_address(core, op), xmm_reg(core, op), mask, 16)
}

fn mmx_mask_store(core: &mut Core, op: &Op) -> Step {
    mmx_ready(core)?;
    let registers = &core.fpu.registers;
    let (value, mask) = (registers[usize::from(op.reg & 7)].0, registers[usize::from(op.rm & 7)].0);
    enter_mmx(core);
    store_masked(core, masked_address(core, op), value.into(), mask.into(), 8)
}

fn duplicate(f: impl Fn(u128, u128) -> u128 + Copy + 'static) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source128(core, op)?;
        set_xmm_reg(core, op, f(0, source));
        Ok(())
    })
}

fn duplicate_double(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let source = source64(core, op)?;
    set_xmm_reg(core, op, n::movddup(0, source));
    Ok(())
}

fn empty_mmx(core: &mut Core, _: &Op) -> Step {
    mmx_ready(core)?;
    super::operand::enter_mmx(core);
    core.fpu.tags = 0;
    Ok(())
}

/// The move that a selector names.
pub fn lookup(s: Selector) -> Option<Row> {
    match s.map {
        1 if s.memory => memory_only(s).or_else(|| any_form(s)),
        1 => register_only(s).or_else(|| any_form(s)),
        2 if s.prefix == 0x66 && s.opcode == 0x2a && s.memory => row(load_aligned),
        _ => None,
    }
}

fn any_form(s: Selector) -> Option<Row> {
    match (s.opcode, s.prefix) {
        (0x10, 0 | 0x66) => row(load_unaligned),
        (0x10, 0xf3) => row(load_scalar::<32>),
        (0x10, 0xf2) => row(load_scalar::<64>),
        (0x11, 0 | 0x66) => row(store_unaligned),
        (0x11, 0xf3) => row(store_scalar::<32>),
        (0x11, 0xf2) => row(store_scalar::<64>),
        (0x12, 0) => row(load_low),
        (0x12, 0xf3) => duplicate(n::movsldup),
        (0x12, 0xf2) => row(duplicate_double),
        (0x16, 0) => row(load_high),
        (0x16, 0xf3) => duplicate(n::movshdup),
        (0x28, 0 | 0x66) => row(load_aligned),
        (0x29, 0 | 0x66) => row(store_aligned),
        (0x6e, 0x66) => row(from_general),
        (0x6e, 0) => row(mmx_from_general),
        (0x6f, 0) => row(mmx_load),
        (0x6f, 0x66) => row(load_aligned),
        (0x6f, 0xf3) => row(load_unaligned),
        (0x7e, 0x66) => row(to_general),
        (0x7e, 0) => row(mmx_to_general),
        (0x7e, 0xf3) => row(load_quad),
        (0x7f, 0) => row(mmx_store),
        (0x7f, 0x66) => row(store_aligned),
        (0x7f, 0xf3) => row(store_unaligned),
        (0xd6, 0x66) => row(store_quad),
        (0x77, 0) => row(empty_mmx),
        _ => None,
    }
}

fn memory_only(s: Selector) -> Option<Row> {
    match (s.opcode, s.prefix) {
        (0x12, 0x66) => row(load_low),
        (0x13, 0 | 0x66) => row(store_low),
        (0x16, 0x66) => row(load_high),
        (0x17, 0 | 0x66) => row(store_high),
        (0x2b, 0 | 0x66) | (0xe7, 0x66) => row(store_aligned),
        (0xe7, 0) => row(mmx_store),
        (0xf0, 0xf2) => row(load_unaligned),
        (0xc3, 0) => row(store_general),
        _ => None,
    }
}

fn register_only(s: Selector) -> Option<Row> {
    match (s.opcode, s.prefix) {
        (0x50, 0) => row(move_sign_mask::<32>),
        (0x50, 0x66) => row(move_sign_mask::<64>),
        (0xd7, 0x66) => row(move_sign_mask::<8>),
        (0xd7, 0) => row(mmx_sign_mask),
        (0xd6, 0xf3) => row(mmx_to_xmm),
        (0xd6, 0xf2) => row(xmm_to_mmx),
        (0xf7, 0x66) => row(mask_store),
        (0xf7, 0) => row(mmx_mask_store),
        _ => None,
    }
}
