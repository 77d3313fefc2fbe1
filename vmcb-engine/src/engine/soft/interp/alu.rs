//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NOT, NEG (APM3 chapter 3).
//!
//! Flags are kept lazily: a result and a word of carries ([`Flags`]). Flags are written after the store, so that an
//! instruction that faults has changed nothing.

use super::muldiv;
use super::operand::{Place, Width};
use super::pick::{Pick, by_size, placed, straight};
use crate::engine::soft::core::{Core, Flags, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;

/// One of the eight operations of opcodes 00-3F and group 1.
pub trait Binary: Copy + 'static {
    /// False for CMP.
    const WRITES: bool;
    /// Result and flags.
    fn apply<W: Width>(flags: Flags, left: W, right: W) -> (W, Flags);
}

/// Flags of `left + right (+ carry) = result`.
#[inline(always)]
fn added<W: Width>(left: u64, right: u64, result: u64) -> (W, Flags) {
    let carries = left & right | (left | right) & !result;
    let value = W::cut(result);
    (value, Flags::arithmetic(value.signed(), carries, W::BITS))
}

/// Flags of `left - right (- borrow) = result`.
#[inline(always)]
fn subtracted<W: Width>(left: u64, right: u64, result: u64) -> (W, Flags) {
    let borrows = !left & right | !(left ^ right) & result;
    let value = W::cut(result);
    (value, Flags::arithmetic(value.signed(), borrows, W::BITS))
}

/// Result and flags of an addition.
#[inline(always)]
pub fn add<W: Width>(left: W, right: W) -> (W, Flags) {
    let (left, right) = (left.wide(), right.wide());
    added(left, right, left.wrapping_add(right))
}

/// Result and flags of a subtraction or comparison.
#[inline(always)]
pub fn subtract<W: Width>(left: W, right: W) -> (W, Flags) {
    let (left, right) = (left.wide(), right.wide());
    subtracted(left, right, left.wrapping_sub(right))
}

macro_rules! binary {
    ($name:ident, $writes:literal, |$flags:ident, $left:ident, $right:ident| $e:expr) => {
        #[doc = concat!("The operation `", stringify!($name), "`.")]
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<W: Width>($flags: Flags, $left: W, $right: W) -> (W, Flags) {
                let ($left, $right) = ($left.wide(), $right.wide());
                $e
            }
        }
    };
}

#[inline(always)]
fn logic<W: Width>(result: u64) -> (W, Flags) {
    let value = W::cut(result);
    (value, Flags::logic(value.signed()))
}

binary!(Add, true, |_flags, left, right| added(left, right, left.wrapping_add(right)));
binary!(Or, true, |_flags, left, right| logic(left | right));
binary!(Adc, true, |flags, left, right| {
    added(left, right, left.wrapping_add(right).wrapping_add(u64::from(flags.cf())))
});
binary!(Sbb, true, |flags, left, right| {
    subtracted(left, right, left.wrapping_sub(right).wrapping_sub(u64::from(flags.cf())))
});
binary!(And, true, |_flags, left, right| logic(left & right));
binary!(Sub, true, |_flags, left, right| subtracted(left, right, left.wrapping_sub(right)));
binary!(Xor, true, |_flags, left, right| logic(left ^ right));
binary!(Cmp, false, |_flags, left, right| subtracted(left, right, left.wrapping_sub(right)));
binary!(Test, false, |_flags, left, right| logic(left & right));

/// r/m op= register.
#[inline(always)]
pub fn rm_reg<W: Width, B: Binary, P: Place>(core: &mut Core, op: &Op) -> Step {
    let right = W::get(core, op.reg);
    into_rm::<W, B, P>(core, op, right)
}

/// r/m op= immediate.
#[inline(always)]
pub fn rm_imm<W: Width, B: Binary, P: Place>(core: &mut Core, op: &Op) -> Step {
    into_rm::<W, B, P>(core, op, W::cut(op.immediate))
}

#[inline(always)]
fn into_rm<W: Width, B: Binary, P: Place>(core: &mut Core, op: &Op, right: W) -> Step {
    core.flags = if B::WRITES {
        P::modify::<W, _>(core, op, |core, left| B::apply(core.flags, left, right))?
    } else {
        let left = P::load::<W>(core, op)?;
        B::apply(core.flags, left, right).1
    };
    Ok(())
}

/// register op= r/m.
#[inline(always)]
pub fn reg_rm<W: Width, B: Binary, P: Place>(core: &mut Core, op: &Op) -> Step {
    let right = P::load::<W>(core, op)?;
    let (value, flags) = B::apply(core.flags, W::get(core, op.reg), right);
    if B::WRITES {
        W::set(core, op.reg, value);
    }
    core.flags = flags;
    Ok(())
}

/// Accumulator op= immediate.
#[inline(always)]
pub fn rax_imm<W: Width, B: Binary>(core: &mut Core, op: &Op) -> Step {
    let (value, flags) = B::apply(core.flags, W::get(core, 0), W::cut(op.immediate));
    if B::WRITES {
        W::set(core, 0, value);
    }
    core.flags = flags;
    Ok(())
}

#[inline(always)]
fn xor_self<W: Width>(core: &mut Core, op: &Op) -> Step {
    W::set(core, op.rm, W::cut(0));
    core.flags = Flags::logic(0);
    Ok(())
}

macro_rules! by_binary {
    ($number:expr, $B:ident => $e:expr) => {
        match $number & 7 {
            0 => by_binary!(@ $B, Add, $e),
            1 => by_binary!(@ $B, Or, $e),
            2 => by_binary!(@ $B, Adc, $e),
            3 => by_binary!(@ $B, Sbb, $e),
            4 => by_binary!(@ $B, And, $e),
            5 => by_binary!(@ $B, Sub, $e),
            6 => by_binary!(@ $B, Xor, $e),
            _ => by_binary!(@ $B, Cmp, $e),
        }
    };
    (@ $B:ident, $T:ident, $e:expr) => {{
        type $B = $T;
        $e
    }};
}

/// Opcodes 00-3F.
pub fn pick(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    if insn.opcode & !3 == 0x30 && !insn.is_memory() && insn.op.rm == insn.op.reg {
        return by_size!(size, W => straight(xor_self::<W>));
    }
    match insn.opcode & 7 {
        0 | 1 => {
            by_size!(size, W => by_binary!(insn.opcode >> 3, B => placed!(insn, P => rm_reg::<W, B, P>)))
        }
        2 | 3 => {
            by_size!(size, W => by_binary!(insn.opcode >> 3, B => placed!(insn, P => reg_rm::<W, B, P>)))
        }
        _ => by_size!(size, W => by_binary!(insn.opcode >> 3, B => straight(rax_imm::<W, B>))),
    }
}

/// 80-83: group 1.
pub fn pick_group_1(insn: &Insn) -> Option<Pick> {
    by_size!(insn.op.size, W => by_binary!(insn.extension(), B => placed!(insn, P => rm_imm::<W, B, P>)))
}

/// 84, 85, A8, A9: TEST.
pub fn pick_test(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    match insn.opcode {
        0x84 | 0x85 => by_size!(size, W => placed!(insn, P => rm_reg::<W, Test, P>)),
        _ => by_size!(size, W => straight(rax_imm::<W, Test>)),
    }
}

#[inline(always)]
fn step<W: Width, const DOWN: bool>(flags: Flags, old: W) -> (W, Flags) {
    let one = W::cut(1);
    let (value, new) = if DOWN { subtract(old, one) } else { add(old, one) };
    (value, new.with_cf(flags.cf()))
}

/// INC, or DEC if `DOWN`.
#[inline(always)]
pub fn inc_dec<W: Width, P: Place, const DOWN: bool>(core: &mut Core, op: &Op) -> Step {
    core.flags = P::modify::<W, _>(core, op, |core, old| step::<W, DOWN>(core.flags, old))?;
    Ok(())
}

/// FE, FF /0 /1, and 40-4F outside 64-bit mode: INC, DEC.
pub fn pick_inc_dec(insn: &Insn) -> Option<Pick> {
    let down = if insn.opcode < 0x50 { insn.opcode & 8 != 0 } else { insn.extension() == 1 };
    match down {
        false => by_size!(insn.op.size, W => placed!(insn, P => inc_dec::<W, P, false>)),
        true => by_size!(insn.op.size, W => placed!(insn, P => inc_dec::<W, P, true>)),
    }
}

/// FE: group 4.
pub fn pick_group_4(insn: &Insn) -> Option<Pick> {
    if insn.extension() < 2 { pick_inc_dec(insn) } else { None }
}

#[inline(always)]
fn not<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    P::modify::<W, _>(core, op, |_, old| (W::cut(!old.wide()), ()))
}

#[inline(always)]
fn neg<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    core.flags = P::modify::<W, _>(core, op, |_, old| subtract(W::cut(0), old))?;
    Ok(())
}

/// F6, F7: group 3.
pub fn pick_group_3(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    match insn.extension() {
        0 | 1 => by_size!(size, W => placed!(insn, P => rm_imm::<W, Test, P>)),
        2 => by_size!(size, W => placed!(insn, P => not::<W, P>)),
        3 => by_size!(size, W => placed!(insn, P => neg::<W, P>)),
        _ => muldiv::pick_group_3(insn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags_of<W: Width>(result: (W, Flags)) -> (u64, u64) {
        (result.0.wide(), result.1.to_rflags())
    }

    #[test]
    fn addition_sets_the_flags_of_the_manual() {
        const ROWS: &[(u8, u8, u8, u64)] = &[
            // left, right, result, flags: CF 1, PF 4, AF 10, ZF 40, SF 80, OF 800
            (0, 0, 0, 0x44),
            (0xff, 1, 0, 0x55),
            (0x7f, 1, 0x80, 0x890),
            (0x80, 0x80, 0, 0x845),
            (0x0f, 1, 0x10, 0x10),
            (0x10, 0x21, 0x31, 0x00),
        ];
        for (left, right, result, flags) in ROWS {
            assert_eq!(flags_of(add(*left, *right)), ((*result).into(), *flags), "{left:#x} + {right:#x}");
            // The same bits at the top of a wider operand: all but AF and PF scale.
            let (wide, wide_flags) = flags_of(add(u64::from(*left) << 56, u64::from(*right) << 56));
            assert_eq!((wide, wide_flags & !0x14), (u64::from(*result) << 56, flags & !0x14));
        }
    }

    #[test]
    fn subtraction_sets_the_flags_of_the_manual() {
        const ROWS: &[(u16, u16, u16, u64)] = &[
            (0, 0, 0, 0x44),
            (0, 1, 0xffff, 0x95),
            (0x8000, 1, 0x7fff, 0x814),
            (1, 0x8000, 0x8001, 0x881),
            (0x10, 1, 0x0f, 0x14),
        ];
        for (left, right, result, flags) in ROWS {
            assert_eq!(flags_of(subtract(*left, *right)), ((*result).into(), *flags), "{left:#x} - {right:#x}");
        }
    }

    #[test]
    fn carry_goes_through_adc_and_sbb_and_survives_inc() {
        let carry = Flags::from_rflags(1);
        assert_eq!(flags_of(Adc::apply(carry, 0xffu8, 0)), (0, 0x55));
        assert_eq!(flags_of(Adc::apply(carry, 0xffu8, 0xff)), (0xff, 0x95));
        assert_eq!(flags_of(Sbb::apply(carry, 0u32, 0)), (0xffff_ffff, 0x95));
        assert_eq!(flags_of(Sbb::apply(carry, 0u32, 0xffff_ffff)), (0, 0x55));
        assert_eq!(flags_of(step::<u8, false>(carry, 0x7f)), (0x80, 0x891));
        assert_eq!(flags_of(step::<u8, true>(Flags::default(), 0x80)), (0x7f, 0x810));
    }
}
