//! XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B (APM3 chapter 3).
//!
//! Processors of a machine run one after the other, so LOCK adds nothing; only its legality matters, and decode sees to it.

use super::operand::{Place, Width, checked};
use super::pick::{Pick, by_place, by_size, by_wide, straight};
use super::{alu, system};
use crate::engine::soft::core::{Core, RAX, RBX, RCX, RDX, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::{Op, form};

fn xchg<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = W::get(core, op.reg);
    let old = P::modify::<W, _>(core, op, |_, old| (value, old))?;
    W::set(core, op.reg, old);
    Ok(())
}

/// 86, 87.
pub fn pick_xchg(insn: &Insn) -> Option<Pick> {
    by_size!(insn.op.size, W => by_place!(insn, P => straight(xchg::<W, P>)))
}

fn xchg_rax<W: Width>(core: &mut Core, op: &Op) -> Step {
    let (value, old) = (W::get(core, RAX as u8), W::get(core, op.rm));
    W::set(core, op.rm, value);
    W::set(core, RAX as u8, old);
    Ok(())
}

/// 90-97: 90 without REX.B is NOP, with F3 PAUSE.
pub fn pick_xchg_rax(insn: &Insn) -> Option<Pick> {
    if insn.op.rm == 0 {
        return if insn.op.has(form::REP) { super::pick::last(system::pause) } else { super::mov::pick_nop(insn) };
    }
    by_wide!(insn.op.size, W => straight(xchg_rax::<W>))
}

/// The sum goes to the destination last, which matters if both are one register.
fn xadd<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let right = W::get(core, op.reg);
    let (old, sum, flags) = P::modify::<W, _>(core, op, |_, old| {
        let (sum, flags) = alu::add(old, right);
        (sum, (old, sum, flags))
    })?;
    W::set(core, op.reg, old);
    if !op.is_memory() {
        W::set(core, op.rm, sum);
    }
    core.flags = flags;
    Ok(())
}

/// 0F C0, C1.
pub fn pick_xadd(insn: &Insn) -> Option<Pick> {
    by_size!(insn.op.size, W => by_place!(insn, P => straight(xadd::<W, P>)))
}

/// Memory is always written, if only with its old value; a register that does not match is not, so that its upper half
/// stays.
fn cmpxchg<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let (accumulator, new) = (W::get(core, RAX as u8), W::get(core, op.reg));
    if !op.is_memory() && W::get(core, op.rm) != accumulator {
        let old = W::get(core, op.rm);
        core.flags = alu::subtract(accumulator, old).1;
        W::set(core, RAX as u8, old);
        return Ok(());
    }
    let (old, flags) = P::modify::<W, _>(core, op, |_, old| {
        (if old == accumulator { new } else { old }, (old, alu::subtract(accumulator, old).1))
    })?;
    if old != accumulator {
        W::set(core, RAX as u8, old);
    }
    core.flags = flags;
    Ok(())
}

/// 0F B0, B1.
pub fn pick_cmpxchg(insn: &Insn) -> Option<Pick> {
    by_size!(insn.op.size, W => by_place!(insn, P => straight(cmpxchg::<W, P>)))
}

fn cmpxchg8b(core: &mut Core, op: &Op) -> Step {
    let linear = checked(core, op, 8, true)?;
    let low = |core: &Core, register: usize| core.gprs[register] & 0xffff_ffff;
    let expected = low(core, RDX) << 32 | low(core, RAX);
    let new = low(core, RCX) << 32 | low(core, RBX);
    let old = core.modify::<u64, _>(linear, |_, old| (if old == expected { new } else { old }, old))?;
    if old != expected {
        u32::set(core, RAX as u8, old as u32);
        u32::set(core, RDX as u8, (old >> 32) as u32);
    }
    core.flags = core.flags.with_zf(old == expected);
    Ok(())
}

fn cmpxchg16b(core: &mut Core, op: &Op) -> Step {
    let linear = checked(core, op, 16, true)?;
    if linear & 15 != 0 {
        return core.general_protection();
    }
    let pair = |core: &Core, high: usize, low: usize| u128::from(core.gprs[high]) << 64 | u128::from(core.gprs[low]);
    let (expected, new) = (pair(core, RDX, RAX), pair(core, RCX, RBX));
    let old = core.modify::<u128, _>(linear, |_, old| (if old == expected { new } else { old }, old))?;
    if old != expected {
        core.gprs[RAX] = old as u64;
        core.gprs[RDX] = (old >> 64) as u64;
    }
    core.flags = core.flags.with_zf(old == expected);
    Ok(())
}

/// 0F C7: group 9.
pub fn pick_group_9(insn: &Insn) -> Option<Pick> {
    match (insn.is_memory(), insn.extension(), insn.op.has(form::WIDE)) {
        (true, 1, false) => straight(cmpxchg8b),
        (true, 1, true) => straight(cmpxchg16b),
        _ => None,
    }
}
