//! Near JMP, CALL, RET, Jcc, LOOPcc, JrCXZ (APM3 chapter 3).
//!
//! The wrapper of a last instruction has set RIP to the next instruction before it runs the meaning, so a branch adds to
//! RIP. In 64-bit mode AMD processors honour the operand-size prefix on near branches: RIP becomes 16 bits wide.

use super::operand::{Place, Width};
use super::pick::{Pick, branch, by_condition, by_place, by_wide, calling, last, quick_turn, returning, turn};
use super::stack::{self, by_long};
use crate::engine::soft::core::{CS, Core, RCX, RIP_BASE, RSP, Step, Stop, canonical};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::interp::{alu, far};
use crate::engine::soft::op::Op;

/// RIP of a target of this operand size, checked.
#[inline(always)]
fn target<W: Width, const LONG: bool>(core: &mut Core, target: u64) -> Step<u64> {
    let target = W::cut(target).wide();
    let fits = if LONG { W::BITS != 64 || canonical(target) } else { target <= u64::from(core.segments[CS].limit) };
    if fits { Ok(target) } else { core.general_protection() }
}

/// RIP of a relative target. In 64-bit mode one outside the canonical range faults when it is fetched from.
#[inline(always)]
fn relative<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step<u64> {
    let next = core.rip.wrapping_add(op.immediate);
    if LONG && W::BITS == 64 { Ok(next) } else { target::<W, LONG>(core, next) }
}

#[inline(always)]
fn jmp<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    core.rip = relative::<W, LONG>(core, op)?;
    Ok(())
}

#[inline(always)]
fn jcc<W: Width, const LONG: bool, const CC: u8>(core: &mut Core, op: &Op) -> Step {
    if core.flags.condition(CC) {
        core.rip = relative::<W, LONG>(core, op)?;
    }
    Ok(())
}

#[inline(always)]
fn call<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let (next, target) = (core.rip, relative::<W, LONG>(core, op)?);
    core.push::<W, LONG>(W::cut(next))?;
    core.rip = target;
    Ok(())
}

#[inline(always)]
fn jmp_rm<W: Width, P: Place, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?.wide();
    core.rip = target::<W, LONG>(core, value)?;
    Ok(())
}

#[inline(always)]
fn call_rm<W: Width, P: Place, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let next = core.rip;
    let value = P::load::<W>(core, op)?.wide();
    // A stack that cannot be written has precedence over a bad target.
    let target = match target::<W, LONG>(core, value) {
        Ok(target) => target,
        Err(stop) => {
            let fault = core.fault;
            core.stack_probe::<LONG>(core.gprs[RSP].wrapping_sub(W::BYTES), W::BYTES)?;
            core.fault = fault;
            return Err(stop);
        }
    };
    core.push::<W, LONG>(W::cut(next))?;
    core.rip = target;
    Ok(())
}

#[inline(always)]
fn ret<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let before = core.gprs[RSP];
    let popped = core.pop::<W, LONG>(op.immediate)?.wide();
    match target::<W, LONG>(core, popped) {
        Ok(target) => core.rip = target,
        Err(stop) => {
            core.gprs[RSP] = before;
            return Err(stop);
        }
    }
    Ok(())
}

/// True for a relative branch whose blocks are linked: 64-bit mode without an operand-size prefix.
fn is_linked(insn: &Insn) -> bool {
    insn.mode.long && insn.op.size == 8
}

fn jmp_linked(_: &mut Core, _: &Op) -> Step<bool> {
    Ok(true)
}

/// Whether a linked Jcc is taken.
#[inline(always)]
pub fn jcc_linked<const CC: u8>(core: &mut Core, _: &Op) -> Step<bool> {
    Ok(core.flags.condition(CC))
}

/// RIP after a linked branch.
#[inline(always)]
fn after(core: &Core, op: &Op) -> u64 {
    core.gprs[usize::from(RIP_BASE)].wrapping_add(u64::from(op.offset) + u64::from(op.length))
}

fn call_quick(core: &mut Core, op: &Op) -> Step<bool> {
    let next = after(core, op);
    core.push_hit(next).ok_or(Stop::Again)?;
    core.returns.push(next, op.immediate);
    Ok(true)
}

fn call_linked(core: &mut Core, op: &Op) -> Step<bool> {
    let next = after(core, op);
    core.push::<u64, true>(next)?;
    core.returns.push(next, op.immediate);
    Ok(true)
}

fn call_noted<P: Place>(core: &mut Core, op: &Op) -> Step {
    let next = core.rip;
    call_rm::<u64, P, true>(core, op)?;
    core.returns.push(next, op.immediate);
    Ok(())
}

/// Where a return leads, if that is known without a page walk and may be.
#[inline(always)]
fn return_target(core: &mut Core, _: &Op) -> Option<u64> {
    core.load_known::<u64>(core.gprs[RSP]).filter(|target| canonical(*target))
}

/// E8, E9, EB, C2, C3.
pub fn pick(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0xe8 if is_linked(insn) => quick_turn(call_quick, call_linked),
        0xe9 | 0xeb if is_linked(insn) => turn(jmp_linked),
        0xe8 => by_wide!(insn.op.size, W => by_long!(insn, L => branch(call::<W, L>))),
        0xe9 | 0xeb => by_wide!(insn.op.size, W => by_long!(insn, L => branch(jmp::<W, L>))),
        _ if is_linked(insn) => returning(return_target, ret::<u64, true>),
        _ => by_wide!(insn.op.size, W => by_long!(insn, L => branch(ret::<W, L>))),
    }
}

/// 70-7F, 0F 80-8F.
pub fn pick_jcc(insn: &Insn) -> Option<Pick> {
    if is_linked(insn) {
        return by_condition!(insn.opcode, CC => turn(jcc_linked::<CC>));
    }
    by_condition!(insn.opcode, CC => by_wide!(insn.op.size, W => by_long!(insn, L => branch(jcc::<W, L, CC>))))
}

/// FF: group 5.
pub fn pick_group_5(insn: &Insn) -> Option<Pick> {
    match insn.extension() {
        0 | 1 => alu::pick_inc_dec(insn),
        2 if is_linked(insn) => by_place!(insn, P => calling(call_noted::<P>)),
        2 => by_wide!(insn.op.size, W => by_place!(insn, P => by_long!(insn, L => branch(call_rm::<W, P, L>)))),
        4 => by_wide!(insn.op.size, W => by_place!(insn, P => by_long!(insn, L => branch(jmp_rm::<W, P, L>)))),
        3 if insn.is_memory() => last(far::far_call_memory),
        5 if insn.is_memory() => last(far::far_jump_memory),
        6 => stack::pick_push_rm(insn),
        _ => None,
    }
}

/// LOOPNE, LOOPE, LOOP by kind 0, 1, 2; the counter has the address size `A`.
fn looping<W: Width, A: Width, const LONG: bool, const KIND: u8>(core: &mut Core, op: &Op) -> Step {
    let count = A::cut(A::get(core, RCX as u8).wide().wrapping_sub(1));
    let zero = core.flags.zf();
    let taken = count.wide() != 0 && (KIND == 2 || zero == (KIND == 1));
    if taken {
        core.rip = relative::<W, LONG>(core, op)?;
    }
    A::set(core, RCX as u8, count);
    Ok(())
}

fn jcxz<W: Width, A: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    if A::get(core, RCX as u8).wide() == 0 {
        core.rip = relative::<W, LONG>(core, op)?;
    }
    Ok(())
}

/// E0-E3. F3 makes LOOPE and F2 makes LOOPNE of either (AMD family 19h; the manual is silent).
pub fn pick_loop(insn: &Insn) -> Option<Pick> {
    let kind = match (insn.opcode & 3, insn.prefix) {
        (0 | 1, 0xf3) => 1,
        (0 | 1, 0xf2) => 0,
        (kind, _) => kind,
    };
    by_wide!(insn.op.size, W => by_wide!(insn.op.address_size, A => by_long!(insn, L => match kind {
        0 => branch(looping::<W, A, L, 0>),
        1 => branch(looping::<W, A, L, 1>),
        2 => branch(looping::<W, A, L, 2>),
        _ => branch(jcxz::<W, A, L>),
    })))
}
