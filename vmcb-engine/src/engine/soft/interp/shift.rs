//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD (APM3 chapter 3).
//!
//! A count of zero changes no flag. What the manual leaves undefined (OF of longer shifts, AF) is what AMD family 19h does.

use super::operand::{Place, Width};
use super::pick::{Pick, by_place, by_size, by_wide, straight};
use crate::engine::soft::core::{Core, Flags, RCX, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;

/// One of the eight operations of group 2. `count` is masked to 5 or 6 bits and not 0.
trait Shift: Copy + 'static {
    fn apply<W: Width>(flags: Flags, value: W, count: u32) -> (W, Flags);
}

#[inline(always)]
fn top<W: Width>(value: W) -> bool {
    value.wide() >> (W::BITS - 1) & 1 != 0
}

/// The bit below the top one.
#[inline(always)]
fn second<W: Width>(value: W) -> bool {
    value.wide() >> (W::BITS - 2) & 1 != 0
}

#[derive(Clone, Copy)]
struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Width>(_: Flags, value: W, count: u32) -> (W, Flags) {
        let wide = u128::from(value.wide()) << count;
        let result = W::cut(wide as u64);
        let cf = wide >> W::BITS & 1 != 0;
        (result, Flags::parts(result.signed(), cf, cf != top(result), true))
    }
}

#[derive(Clone, Copy)]
struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Width>(_: Flags, value: W, count: u32) -> (W, Flags) {
        let before = value.wide() >> (count - 1);
        let result = W::cut(before >> 1);
        (result, Flags::parts(result.signed(), before & 1 != 0, top(result) != second(result), true))
    }
}

#[derive(Clone, Copy)]
struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Width>(_: Flags, value: W, count: u32) -> (W, Flags) {
        let before = value.signed() as i64 >> (count - 1);
        let result = W::cut((before >> 1) as u64);
        (result, Flags::parts(result.signed(), before & 1 != 0, false, true))
    }
}

#[derive(Clone, Copy)]
struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Width>(flags: Flags, value: W, count: u32) -> (W, Flags) {
        let (bits, wide) = (count % W::BITS, value.wide());
        let result = if bits == 0 { value } else { W::cut(wide << bits | wide >> (W::BITS - bits)) };
        let cf = result.wide() & 1 != 0;
        (result, flags.with_cf_of(cf, cf != top(result)))
    }
}

#[derive(Clone, Copy)]
struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Width>(flags: Flags, value: W, count: u32) -> (W, Flags) {
        let (bits, wide) = (count % W::BITS, value.wide());
        let result = if bits == 0 { value } else { W::cut(wide >> bits | wide << (W::BITS - bits)) };
        (result, flags.with_cf_of(top(result), top(result) != second(result)))
    }
}

#[derive(Clone, Copy)]
struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn apply<W: Width>(flags: Flags, value: W, count: u32) -> (W, Flags) {
        let (result, cf) = through_carry(value, flags.cf(), count % (W::BITS + 1));
        (result, flags.with_cf_of(cf, cf != top(result)))
    }
}

#[derive(Clone, Copy)]
struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn apply<W: Width>(flags: Flags, value: W, count: u32) -> (W, Flags) {
        let right = count % (W::BITS + 1);
        let (result, cf) = through_carry(value, flags.cf(), (W::BITS + 1 - right) % (W::BITS + 1));
        (result, flags.with_cf_of(cf, top(result) != second(result)))
    }
}

/// Rotates the carry and the value together to the left.
#[inline(always)]
fn through_carry<W: Width>(value: W, cf: bool, count: u32) -> (W, bool) {
    let all = u128::from(cf) << W::BITS | u128::from(value.wide());
    let rotated = all << count | all >> (W::BITS + 1 - count);
    (W::cut(rotated as u64), rotated >> W::BITS & 1 != 0)
}

#[inline(always)]
fn masked<W: Width>(count: u64) -> u32 {
    (count & if W::BITS == 64 { 63 } else { 31 }) as u32
}

#[inline(always)]
fn shift<W: Width, S: Shift, P: Place>(core: &mut Core, op: &Op, count: u64) -> Step {
    let count = masked::<W>(count);
    core.flags =
        P::modify::<W, _>(
            core,
            op,
            |core, value| {
                if count == 0 { (value, core.flags) } else { S::apply(core.flags, value, count) }
            },
        )?;
    Ok(())
}

#[inline(always)]
fn by_imm<W: Width, S: Shift, P: Place>(core: &mut Core, op: &Op) -> Step {
    shift::<W, S, P>(core, op, op.immediate)
}

#[inline(always)]
fn by_one<W: Width, S: Shift, P: Place>(core: &mut Core, op: &Op) -> Step {
    shift::<W, S, P>(core, op, 1)
}

#[inline(always)]
fn by_cl<W: Width, S: Shift, P: Place>(core: &mut Core, op: &Op) -> Step {
    let count = core.gprs[RCX];
    shift::<W, S, P>(core, op, count)
}

fn pick_of<S: Shift>(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    match insn.opcode {
        0xc0 | 0xc1 => by_size!(size, W => by_place!(insn, P => straight(by_imm::<W, S, P>))),
        0xd0 | 0xd1 => by_size!(size, W => by_place!(insn, P => straight(by_one::<W, S, P>))),
        _ => by_size!(size, W => by_place!(insn, P => straight(by_cl::<W, S, P>))),
    }
}

/// C0, C1, D0-D3: group 2; extension 6 is SHL too.
pub fn pick(insn: &Insn) -> Option<Pick> {
    match insn.extension() {
        0 => pick_of::<Rol>(insn),
        1 => pick_of::<Ror>(insn),
        2 => pick_of::<Rcl>(insn),
        3 => pick_of::<Rcr>(insn),
        5 => pick_of::<Shr>(insn),
        7 => pick_of::<Sar>(insn),
        _ => pick_of::<Shl>(insn),
    }
}

/// SHLD, or SHRD if `RIGHT`. Beyond its width a 16-bit operand takes the bits of `right` once more,
/// and CF is 0 (AMD family 19h).
#[inline(always)]
fn double<W: Width, const RIGHT: bool>(left: W, right: W, count: u32) -> (W, Flags) {
    let (bits, left, right) = (W::BITS, u128::from(left.wide()), u128::from(right.wide()));
    if RIGHT {
        let again = if W::BITS == 16 { right << 32 } else { 0 };
        // The last bit shifted out is the lowest.
        let below = (again | right << bits | left) >> (count - 1);
        let result = W::cut((below >> 1) as u64);
        let cf = count <= bits && below & 1 != 0;
        return (result, Flags::parts(result.signed(), cf, top(result) != second(result), true));
    }
    let shifted = if W::BITS == 16 {
        (left << 32 | right << 16 | right) << count >> 32
    } else {
        (left << bits | right) >> (bits - count)
    };
    let result = W::cut(shifted as u64);
    let cf = count <= bits && shifted >> bits & 1 != 0;
    (result, Flags::parts(result.signed(), cf, cf != (count < bits && top(result)), true))
}

fn double_shift<W: Width, P: Place, const RIGHT: bool, const CL: bool>(core: &mut Core, op: &Op) -> Step {
    let count = masked::<W>(if CL { core.gprs[RCX] } else { op.immediate });
    let right = W::get(core, op.reg);
    core.flags = P::modify::<W, _>(core, op, |core, left| {
        if count == 0 { (left, core.flags) } else { double::<W, RIGHT>(left, right, count) }
    })?;
    Ok(())
}

/// 0F A4, A5, AC, AD.
pub fn pick_double(insn: &Insn) -> Option<Pick> {
    by_wide!(insn.op.size, W => by_place!(insn, P => match insn.opcode {
        0xa4 => straight(double_shift::<W, P, false, false>),
        0xa5 => straight(double_shift::<W, P, false, true>),
        0xac => straight(double_shift::<W, P, true, false>),
        _ => straight(double_shift::<W, P, true, true>),
    }))
}
