//! Flags that nobody can see: an operation on registers whose flags the block overwrites before anything reads them, and
//! before anything that could fault, exit or end the block, runs as a handler that does not work them out.
//!
//! Nothing is between such operations and the one that overwrites: no memory, no event. A block that is cut between them is
//! decoded anew, and what ends it counts as a reader.

use super::alu::{Add, And, Binary, Cmp, Or, Sub, Test, Xor};
use super::operand::Width;
use super::pick::{by_size, by_wide};
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::op::{self, Handler, Op, form};

/// What an operation means for the flags before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Effect {
    /// It sets all six and reads none, and can do nothing else than write registers.
    Sets,
    /// It sets some and keeps the others, and can do nothing else than write registers.
    Changes,
    /// It neither sets nor reads any, and can do nothing else than write registers.
    Leaves,
    /// Anything else.
    Reads,
}

/// ModRM.reg of a group, as decode numbered it.
fn extension(op: &Op) -> u8 {
    (op.reg & 7) + (op.reg >> 5) * 4
}

/// A shift by a constant that is not 0, so that it changes flags.
fn shifts(op: &Op) -> bool {
    let count = if matches!(op.code, 0xd0 | 0xd1) { 1 } else { op.immediate };
    count & if op.size == 8 { 63 } else { 31 } != 0
}

fn effect(op: &Op) -> Effect {
    if op.is_memory() && !matches!(op.code, 0x8d) {
        return Effect::Reads;
    }
    match op.code {
        // PAUSE.
        0x90 if op.has(form::REP) => Effect::Reads,
        // ADC and SBB read CF.
        0x10..=0x1f => Effect::Reads,
        0x00..=0x3f if op.code & 7 < 6 => Effect::Sets,
        0x80 | 0x81 | 0x83 if !matches!(extension(op), 2 | 3) => Effect::Sets,
        0x84 | 0x85 | 0xa8 | 0xa9 => Effect::Sets,
        0xf6 | 0xf7 if matches!(extension(op), 0 | 1 | 3) => Effect::Sets,
        0xc0 | 0xc1 | 0xd0 | 0xd1 if extension(op) >= 4 && shifts(op) => Effect::Sets,
        0xc0 | 0xc1 | 0xd0 | 0xd1 if extension(op) < 2 => Effect::Changes,
        0xfe | 0xff if extension(op) < 2 => Effect::Changes,
        0x69 | 0x6b | 0x1af => Effect::Changes,
        0x88..=0x8b | 0x8d | 0xb0..=0xbf | 0xc6 | 0xc7 | 0x90 | 0x98 | 0x99 => Effect::Leaves,
        0x1b6 | 0x1b7 | 0x1be | 0x1bf | 0x11f | 0x1c8..=0x1cf => Effect::Leaves,
        _ => Effect::Reads,
    }
}

/// Gives the operations from the beginning of a block, each followed by another, whose flags nobody sees the handlers that do not work them out.
pub fn drop_unseen_flags(ops: &[Op]) {
    let mut seen = true;
    for op in ops.iter().rev() {
        match effect(op) {
            Effect::Leaves => {}
            Effect::Reads => seen = true,
            Effect::Sets | Effect::Changes if !seen => {
                if let Some(handler) = without_flags(op) {
                    op.run.set(handler);
                }
            }
            Effect::Sets => seen = false,
            // What it keeps is seen through it.
            Effect::Changes => {}
        }
    }
}

#[inline(always)]
fn put<W: Width, B: Binary>(core: &mut Core, into: u8, left: W, right: W) -> Step {
    if B::WRITES {
        let value = B::apply(core.flags, left, right).0;
        W::set(core, into, value);
    }
    Ok(())
}

#[inline(always)]
fn rm_reg<W: Width, B: Binary>(core: &mut Core, op: &Op) -> Step {
    put::<W, B>(core, op.rm, W::get(core, op.rm), W::get(core, op.reg))
}

#[inline(always)]
fn reg_rm<W: Width, B: Binary>(core: &mut Core, op: &Op) -> Step {
    put::<W, B>(core, op.reg, W::get(core, op.reg), W::get(core, op.rm))
}

#[inline(always)]
fn rm_imm<W: Width, B: Binary>(core: &mut Core, op: &Op) -> Step {
    put::<W, B>(core, op.rm, W::get(core, op.rm), W::cut(op.immediate))
}

#[inline(always)]
fn rax_imm<W: Width, B: Binary>(core: &mut Core, op: &Op) -> Step {
    put::<W, B>(core, 0, W::get(core, 0), W::cut(op.immediate))
}

#[inline(always)]
fn shift<W: Width, const KIND: u8>(core: &mut Core, op: &Op) -> Step {
    let count = op.immediate as u32 & (W::BITS - 1);
    let value = W::get(core, op.rm);
    let shifted = match KIND {
        5 => value.wide() >> count,
        7 => (value.signed() as i64 >> count) as u64,
        _ => value.wide() << count,
    };
    W::set(core, op.rm, W::cut(shifted));
    Ok(())
}

#[inline(always)]
fn rotate<W: Width, const RIGHT: bool>(core: &mut Core, op: &Op) -> Step {
    let count = op.immediate as u32 & (W::BITS - 1);
    let value = W::get(core, op.rm).wide();
    let left = if RIGHT { (W::BITS - count) & (W::BITS - 1) } else { count };
    let right = (W::BITS - left) & (W::BITS - 1);
    W::set(core, op.rm, W::cut(value << left | value >> right));
    Ok(())
}

#[inline(always)]
fn step<W: Width>(core: &mut Core, op: &Op) -> Step {
    let by = if extension(op) == 1 { u64::MAX } else { 1 };
    let value = W::get(core, op.rm).wide().wrapping_add(by);
    W::set(core, op.rm, W::cut(value));
    Ok(())
}

#[inline(always)]
fn multiply<W: Width>(core: &mut Core, op: &Op) -> Step {
    let value = W::get(core, op.reg).wide().wrapping_mul(W::get(core, op.rm).wide());
    W::set(core, op.reg, W::cut(value));
    Ok(())
}

#[inline(always)]
fn multiply_imm<W: Width>(core: &mut Core, op: &Op) -> Step {
    let value = W::get(core, op.rm).wide().wrapping_mul(op.immediate);
    W::set(core, op.reg, W::cut(value));
    Ok(())
}

macro_rules! by_operation {
    ($number:expr, $B:ident => $e:expr) => {
        match $number & 7 {
            0 => by_operation!(@ $B, Add, $e),
            1 => by_operation!(@ $B, Or, $e),
            4 => by_operation!(@ $B, And, $e),
            5 => by_operation!(@ $B, Sub, $e),
            6 => by_operation!(@ $B, Xor, $e),
            7 => by_operation!(@ $B, Cmp, $e),
            _ => return None,
        }
    };
    (@ $B:ident, $T:ident, $e:expr) => {{
        type $B = $T;
        $e
    }};
}

/// The handler of such an operation without its flags, if there is one.
fn without_flags(op: &Op) -> Option<Handler> {
    let (size, number) = (op.size, op.code >> 3);
    Some(match op.code {
        0x00..=0x3f => match op.code & 7 {
            0 | 1 => by_size!(size, W => by_operation!(number, B => op::straight(rm_reg::<W, B>))),
            2 | 3 => by_size!(size, W => by_operation!(number, B => op::straight(reg_rm::<W, B>))),
            _ => by_size!(size, W => by_operation!(number, B => op::straight(rax_imm::<W, B>))),
        },
        0x80 | 0x81 | 0x83 => {
            by_size!(size, W => by_operation!(extension(op), B => op::straight(rm_imm::<W, B>)))
        }
        0x84 | 0x85 => op::straight(rm_reg::<u64, Test>),
        0x69 | 0x6b => by_wide!(size, W => op::straight(multiply_imm::<W>)),
        0x1af => by_wide!(size, W => op::straight(multiply::<W>)),
        0xff => by_wide!(size, W => op::straight(step::<W>)),
        0xc1 if size >= 4 => by_wide!(size, W => match extension(op) {
            0 => op::straight(rotate::<W, false>),
            1 => op::straight(rotate::<W, true>),
            5 => op::straight(shift::<W, 5>),
            7 => op::straight(shift::<W, 7>),
            _ => op::straight(shift::<W, 4>),
        }),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(code: u16, reg: u8, immediate: u64) -> Op {
        Op { code, reg, immediate, size: 4, ..Op::default() }
    }

    fn changed(ops: &[Op]) -> Vec<bool> {
        let before: Vec<Handler> = ops.iter().map(|op| op.run.get()).collect();
        drop_unseen_flags(ops);
        ops.iter().zip(before).map(|(op, before)| !std::ptr::fn_addr_eq(op.run.get(), before)).collect()
    }

    #[test]
    fn flags_that_are_overwritten_unread_are_dropped() {
        // ADD, MOV, SUB, AND: the last one's flags leave the block.
        let block = [op(0x01, 1, 0), op(0x89, 1, 0), op(0x29, 1, 0), op(0x83, 4, 1)];
        assert_eq!(changed(&block), [true, false, true, false]);
    }

    #[test]
    fn flags_that_are_kept_stay_and_unseen_changes_go() {
        // ADD, INC, ADD: nobody sees what INC keeps. ADD, INC, JBE: the carry of ADD is seen through INC.
        assert_eq!(changed(&[op(0x01, 1, 0), op(0xff, 0, 0), op(0x01, 1, 0)]), [true, true, false]);
        assert_eq!(changed(&[op(0x01, 1, 0), op(0xff, 0, 0), op(0x76, 0, 0)]), [false, false, false]);
    }

    #[test]
    fn flags_before_a_reader_or_a_fault_stay() {
        // ADD, ADC, ADD: ADC reads.
        assert_eq!(changed(&[op(0x01, 1, 0), op(0x11, 1, 0), op(0x01, 1, 0)]), [false, false, false]);
        // ADD, a load, ADD: the load may fault.
        let load = Op { form: form::MEMORY, ..op(0x8b, 1, 0) };
        assert_eq!(changed(&[op(0x01, 1, 0), load, op(0x01, 1, 0)]), [false, false, false]);
        // ADD, SHL by 32 (which is 0): it overwrites nothing.
        assert_eq!(changed(&[op(0x01, 1, 0), op(0xc1, 4, 32)]), [false, false]);
    }
}
