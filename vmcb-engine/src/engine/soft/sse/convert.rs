//! Conversions between integers and floating point, MMX forms included.

use super::native as n;
use super::operand::{
    accrue, control, enter_mmx, mmx_ready, set_mmx, set_xmm_reg, source_general, source_mmx, source16, source32,
    source64, source128, sse_ready, xmm_reg,
};
use super::{Row, Selector, row};
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::op::{Op, form};

fn between(
    source: impl super::float::Source,
    f: impl Fn(u128, u128, u32) -> (u128, u32) + Copy + 'static,
) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source(core, op)?;
        let mxcsr = control(core);
        let (result, raised) = f(xmm_reg(core, op), source, mxcsr);
        accrue(core, raised)?;
        set_xmm_reg(core, op, result);
        Ok(())
    })
}

/// To a general register: (32-bit function, 64-bit function).
fn to_general(
    source: impl super::float::Source,
    narrow: impl Fn(u128, u32) -> (u64, u32) + Copy + 'static,
    wide: impl Fn(u128, u32) -> (u64, u32) + Copy + 'static,
) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source(core, op)?;
        let mxcsr = control(core);
        let (result, raised) = if op.has(form::WIDE) { wide(source, mxcsr) } else { narrow(source, mxcsr) };
        accrue(core, raised)?;
        core.gprs[usize::from(op.reg & 15)] = if op.has(form::WIDE) { result } else { result & 0xffff_ffff };
        Ok(())
    })
}

/// From a general register or memory.
fn from_general(
    narrow: impl Fn(u128, u64, u32) -> (u128, u32) + Copy + 'static,
    wide: impl Fn(u128, u64, u32) -> (u128, u32) + Copy + 'static,
) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let is_wide = op.has(form::WIDE);
        let source = source_general(core, op, is_wide)?;
        let (destination, mxcsr) = (xmm_reg(core, op), control(core));
        let (result, raised) =
            if is_wide { wide(destination, source, mxcsr) } else { narrow(destination, source, mxcsr) };
        accrue(core, raised)?;
        set_xmm_reg(core, op, result);
        Ok(())
    })
}

/// CVTPI2PS, CVTPI2PD: two integers of an MMX register or memory. From memory neither is an MMX access
/// (AMD family 19h).
fn from_mmx(double: bool) -> Option<Row> {
    fn single_form(core: &mut Core, op: &Op) -> Step {
        sse_ready(core)?;
        if !op.is_memory() {
            mmx_ready(core)?;
        }
        let source = source_mmx(core, op)?;
        let mxcsr = control(core);
        let (result, raised) = n::cvtdq2ps(0, source.into(), mxcsr);
        accrue(core, raised)?;
        if !op.is_memory() {
            enter_mmx(core);
        }
        let kept = xmm_reg(core, op) >> 64 << 64;
        set_xmm_reg(core, op, kept | u128::from(result as u64));
        Ok(())
    }
    fn double_form(core: &mut Core, op: &Op) -> Step {
        sse_ready(core)?;
        if !op.is_memory() {
            mmx_ready(core)?;
        }
        let source = source_mmx(core, op)?;
        let mxcsr = control(core);
        let (result, raised) = n::cvtdq2pd(0, source.into(), mxcsr);
        accrue(core, raised)?;
        if !op.is_memory() {
            enter_mmx(core);
        }
        set_xmm_reg(core, op, result);
        Ok(())
    }
    if double { row(double_form) } else { row(single_form) }
}

/// CVT(T)PS2PI, CVT(T)PD2PI. The source of a `ps` form is its low half only.
fn to_mmx(
    source: impl super::float::Source,
    keep: u128,
    f: impl Fn(u128, u128, u32) -> (u128, u32) + Copy + 'static,
) -> Option<Row> {
    if keep == u128::MAX {
        row(move |core: &mut Core, op: &Op| to_mmx_step(core, op, source, u128::MAX, f))
    } else {
        row(move |core: &mut Core, op: &Op| to_mmx_step(core, op, source, u64::MAX.into(), f))
    }
}

fn to_mmx_step(
    core: &mut Core,
    op: &Op,
    source: impl super::float::Source,
    keep: u128,
    f: impl Fn(u128, u128, u32) -> (u128, u32),
) -> Step {
    sse_ready(core)?;
    mmx_ready(core)?;
    let source = source(core, op)? & keep;
    let mxcsr = control(core);
    let (result, raised) = f(0, source, mxcsr);
    accrue(core, raised)?;
    set_mmx(core, op.reg, result as u64);
    Ok(())
}

/// The conversion that a selector names.
pub fn lookup(s: Selector) -> Option<Row> {
    match s.map {
        1 => two_byte(s),
        2 if s.prefix == 0x66 => extensions(s.opcode),
        _ => None,
    }
}

fn two_byte(s: Selector) -> Option<Row> {
    let half = u128::from(u64::MAX);
    match (s.opcode, s.prefix) {
        (0x2a, 0) => from_mmx(false),
        (0x2a, 0x66) => from_mmx(true),
        (0x2a, 0xf3) => from_general(n::cvtsi2ss32, n::cvtsi2ss64),
        (0x2a, 0xf2) => from_general(n::cvtsi2sd32, n::cvtsi2sd64),
        (0x2c, 0) => to_mmx(source64, half, n::cvttps2dq),
        (0x2c, 0x66) => to_mmx(source128, u128::MAX, n::cvttpd2dq),
        (0x2c, 0xf3) => to_general(source32, n::cvttss2si32, n::cvttss2si64),
        (0x2c, 0xf2) => to_general(source64, n::cvttsd2si32, n::cvttsd2si64),
        (0x2d, 0) => to_mmx(source64, half, n::cvtps2dq),
        (0x2d, 0x66) => to_mmx(source128, u128::MAX, n::cvtpd2dq),
        (0x2d, 0xf3) => to_general(source32, n::cvtss2si32, n::cvtss2si64),
        (0x2d, 0xf2) => to_general(source64, n::cvtsd2si32, n::cvtsd2si64),
        (0x5a, 0) => between(source64, n::cvtps2pd),
        (0x5a, 0x66) => between(source128, n::cvtpd2ps),
        (0x5a, 0xf3) => between(source32, n::cvtss2sd),
        (0x5a, 0xf2) => between(source64, n::cvtsd2ss),
        (0x5b, 0) => between(source128, n::cvtdq2ps),
        (0x5b, 0x66) => between(source128, n::cvtps2dq),
        (0x5b, 0xf3) => between(source128, n::cvttps2dq),
        (0xe6, 0xf3) => between(source64, n::cvtdq2pd),
        (0xe6, 0x66) => between(source128, n::cvttpd2dq),
        (0xe6, 0xf2) => between(source128, n::cvtpd2dq),
        _ => None,
    }
}

/// PMOVSX and PMOVZX.
fn extensions(opcode: u8) -> Option<Row> {
    fn extend(source: impl super::float::Source, f: impl Fn(u128, u128) -> u128 + Copy + 'static) -> Option<Row> {
        between(source, move |_, source, _| (f(0, source), 0))
    }
    match opcode {
        0x20 => extend(source64, n::pmovsxbw),
        0x21 => extend(source32, n::pmovsxbd),
        0x22 => extend(source16, n::pmovsxbq),
        0x23 => extend(source64, n::pmovsxwd),
        0x24 => extend(source32, n::pmovsxwq),
        0x25 => extend(source64, n::pmovsxdq),
        0x30 => extend(source64, n::pmovzxbw),
        0x31 => extend(source32, n::pmovzxbd),
        0x32 => extend(source16, n::pmovzxbq),
        0x33 => extend(source64, n::pmovzxwd),
        0x34 => extend(source32, n::pmovzxwq),
        0x35 => extend(source64, n::pmovzxdq),
        _ => None,
    }
}
