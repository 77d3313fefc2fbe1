//! Packed and scalar floating point: arithmetic, comparison, rounding, dot products.

use super::native as n;
use super::operand::{accrue, control, set_xmm_reg, source32, source64, source128, sse_ready, xmm_reg};
use super::{Row, Selector, approximate, row, row_immediate};
use crate::engine::soft::core::{Core, Flags, Step, rflags};
use crate::engine::soft::op::Op;

/// (destination, source, MXCSR) -> (destination, raised flags).
trait Float: Fn(u128, u128, u32) -> (u128, u32) + Copy + 'static {}
impl<F: Fn(u128, u128, u32) -> (u128, u32) + Copy + 'static> Float for F {}

/// (destination, source, immediate, MXCSR) -> (destination, raised flags).
trait FloatImmediate: Fn(u128, u128, u64, u32) -> (u128, u32) + Copy + 'static {}
impl<F: Fn(u128, u128, u64, u32) -> (u128, u32) + Copy + 'static> FloatImmediate for F {}

/// Fetches the r/m operand: `source32`, `source64` or `source128`.
pub trait Source: Fn(&mut Core, &Op) -> Step<u128> + Copy + 'static {}
impl<F: Fn(&mut Core, &Op) -> Step<u128> + Copy + 'static> Source for F {}

fn float(source: impl Source, f: impl Float) -> Option<Row> {
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

fn float_immediate(source: impl Source, f: impl FloatImmediate) -> Option<Row> {
    row_immediate(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source(core, op)?;
        let mxcsr = control(core);
        let (result, raised) = f(xmm_reg(core, op), source, op.immediate & 0xff, mxcsr);
        accrue(core, raised)?;
        set_xmm_reg(core, op, result);
        Ok(())
    })
}

/// The four forms of one operation, by prefix: ps, pd, ss, sd.
fn forms(s: Selector, ps: impl Float, pd: impl Float, ss: impl Float, sd: impl Float) -> Option<Row> {
    match s.prefix {
        0 => float(source128, ps),
        0x66 => float(source128, pd),
        0xf3 => float(source32, ss),
        _ => float(source64, sd),
    }
}

fn ordered(source: impl Source, f: impl Fn(u128, u128, u32) -> (u64, u32) + Copy + 'static) -> Option<Row> {
    row(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source(core, op)?;
        let mxcsr = control(core);
        let (flags, raised) = f(xmm_reg(core, op), source, mxcsr);
        accrue(core, raised)?;
        core.flags = Flags::from_rflags(flags & (rflags::CF | rflags::PF | rflags::ZF));
        Ok(())
    })
}

/// ROUNDxx by its immediate (APM4): bits 1:0 mode unless bit 2 says "as MXCSR", bit 3 keeps PE quiet. Neither goes with
/// gathered flags.
fn rounding(source: impl Source, f: impl Fn(u128, u128, u64, u32) -> (u128, u32) + Copy + 'static) -> Option<Row> {
    row_immediate(move |core: &mut Core, op: &Op| -> Step {
        sse_ready(core)?;
        let source = source(core, op)?;
        core.settle_mxcsr();
        let (immediate, mxcsr) = (op.immediate, core.fpu.mxcsr);
        let mode = if immediate & 4 != 0 { mxcsr } else { mxcsr & !0x6000 | (immediate as u32 & 3) << 13 };
        let (result, raised) = f(xmm_reg(core, op), source, 4, mode);
        accrue(core, if immediate & 8 != 0 { raised & !0x20 } else { raised })?;
        set_xmm_reg(core, op, result);
        Ok(())
    })
}

fn comparing(
    f: impl Fn(u128, u128, u64, u32) -> (u128, u32) + Copy + 'static,
) -> impl Fn(u128, u128, u64, u32) -> (u128, u32) + Copy + 'static {
    move |destination, source, immediate, mxcsr| f(destination, source, immediate & 7, mxcsr)
}

/// The floating-point instruction that a selector names.
pub fn lookup(s: Selector) -> Option<Row> {
    match s.map {
        1 => two_byte(s),
        3 if s.prefix == 0x66 => three_byte(s.opcode),
        _ => None,
    }
}

fn two_byte(s: Selector) -> Option<Row> {
    match (s.opcode, s.prefix) {
        (0x51, _) => forms(s, n::sqrtps, n::sqrtpd, n::sqrtss, n::sqrtsd),
        (0x52, 0) => float(source128, |_, s, _| (approximate::packed(s, approximate::reciprocal_root), 0)),
        (0x52, 0xf3) => float(source32, |d, s, _| (approximate::scalar(d, s, approximate::reciprocal_root), 0)),
        (0x53, 0) => float(source128, |_, s, _| (approximate::packed(s, approximate::reciprocal), 0)),
        (0x53, 0xf3) => float(source32, |d, s, _| (approximate::scalar(d, s, approximate::reciprocal), 0)),
        (0x58, _) => forms(s, n::addps, n::addpd, n::addss, n::addsd),
        (0x59, _) => forms(s, n::mulps, n::mulpd, n::mulss, n::mulsd),
        (0x5c, _) => forms(s, n::subps, n::subpd, n::subss, n::subsd),
        (0x5d, _) => forms(s, n::minps, n::minpd, n::minss, n::minsd),
        (0x5e, _) => forms(s, n::divps, n::divpd, n::divss, n::divsd),
        (0x5f, _) => forms(s, n::maxps, n::maxpd, n::maxss, n::maxsd),
        (0x2e, 0) => ordered(source32, n::ucomiss),
        (0x2e, 0x66) => ordered(source64, n::ucomisd),
        (0x2f, 0) => ordered(source32, n::comiss),
        (0x2f, 0x66) => ordered(source64, n::comisd),
        (0x7c, 0x66) => float(source128, n::haddpd),
        (0x7c, 0xf2) => float(source128, n::haddps),
        (0x7d, 0x66) => float(source128, n::hsubpd),
        (0x7d, 0xf2) => float(source128, n::hsubps),
        (0xd0, 0x66) => float(source128, n::addsubpd),
        (0xd0, 0xf2) => float(source128, n::addsubps),
        (0xc2, 0) => float_immediate(source128, comparing(n::cmpps)),
        (0xc2, 0x66) => float_immediate(source128, comparing(n::cmppd)),
        (0xc2, 0xf3) => float_immediate(source32, comparing(n::cmpss)),
        (0xc2, 0xf2) => float_immediate(source64, comparing(n::cmpsd)),
        _ => None,
    }
}

fn three_byte(opcode: u8) -> Option<Row> {
    match opcode {
        0x08 => rounding(source128, n::roundps),
        0x09 => rounding(source128, n::roundpd),
        0x0a => rounding(source32, n::roundss),
        0x0b => rounding(source64, n::roundsd),
        0x40 => float_immediate(source128, dot_single),
        0x41 => float_immediate(source128, dot_double),
        _ => None,
    }
}

/// DPPS: products chosen by bits 7:4, summed pairwise, broadcast by bits 3:0 (APM4).
fn dot_single(destination: u128, source: u128, immediate: u64, mxcsr: u32) -> (u128, u32) {
    let lanes =
        |bits: u64| (0..4).filter(|i| bits >> i & 1 != 0).fold(0u128, |mask, i| mask | 0xffff_ffffu128 << (32 * i));
    let chosen = lanes(immediate >> 4);
    let (products, mut raised) = n::mulps(destination & chosen, source & chosen, mxcsr);
    let (pairs, flags) = n::haddps(products & chosen, products & chosen, mxcsr);
    raised |= flags;
    let (sum, flags) = n::haddps(pairs, pairs, mxcsr);
    (sum & lanes(immediate), raised | flags)
}

/// DPPD: as [`dot_single`] with two lanes.
fn dot_double(destination: u128, source: u128, immediate: u64, mxcsr: u32) -> (u128, u32) {
    let lanes = |bits: u64| {
        (0..2).filter(|i| bits >> i & 1 != 0).fold(0u128, |mask, i| mask | u128::from(u64::MAX) << (64 * i))
    };
    let chosen = lanes(immediate >> 4);
    let (products, raised) = n::mulpd(destination & chosen, source & chosen, mxcsr);
    let (sum, flags) = n::haddpd(products & chosen, products & chosen, mxcsr);
    (sum & lanes(immediate), raised | flags)
}
