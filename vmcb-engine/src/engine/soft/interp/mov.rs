//! MOV, LEA, XCHG without memory, CMOVcc, SETcc, BSWAP, MOVNTI and the no-operations (APM3 chapter 3).

use super::operand::{Place, Width};
use super::pick::{Pick, by_condition, by_memory, by_place, by_size, by_wide, placed, straight};
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::{NO_SEGMENT, Op};

#[inline(always)]
fn rm_reg<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = W::get(core, op.reg);
    P::store(core, op, value)
}

#[inline(always)]
fn reg_rm<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?;
    W::set(core, op.reg, value);
    Ok(())
}

#[inline(always)]
fn rm_imm<W: Width, P: Place>(core: &mut Core, op: &Op) -> Step {
    P::store(core, op, W::cut(op.immediate))
}

/// 88-8B, A0-A3, B0-BF, C6, C7, 0F C3.
pub fn pick(insn: &Insn) -> Option<Pick> {
    let size = insn.op.size;
    match insn.opcode {
        0x88 | 0x89 => by_size!(size, W => placed!(insn, P => rm_reg::<W, P>)),
        0x8a | 0x8b | 0xa0 | 0xa1 => by_size!(size, W => placed!(insn, P => reg_rm::<W, P>)),
        // Opcodes A2 and A3 have no ModRM: register 0 is the accumulator.
        0xa2 | 0xa3 => by_size!(size, W => by_memory!(insn, P => straight(rm_reg::<W, P>))),
        0xc3 if insn.is_memory() && insn.prefix == 0 => {
            by_wide!(size, W => by_memory!(insn, P => straight(rm_reg::<W, P>)))
        }
        0xc3 => None,
        0xc6 | 0xc7 if insn.extension() != 0 => None,
        _ => by_size!(size, W => placed!(insn, P => rm_imm::<W, P>)),
    }
}

#[inline(always)]
fn lea_near<W: Width>(core: &mut Core, op: &Op) -> Step {
    let address = super::operand::near(core, op);
    W::set(core, op.reg, W::cut(address));
    Ok(())
}

#[inline(always)]
fn lea_indexed<W: Width>(core: &mut Core, op: &Op) -> Step {
    let address = super::operand::indexed(core, op);
    W::set(core, op.reg, W::cut(address));
    Ok(())
}

#[inline(always)]
fn lea<W: Width>(core: &mut Core, op: &Op) -> Step {
    let address = op.effective(core);
    W::set(core, op.reg, W::cut(address));
    Ok(())
}

/// 8D.
pub fn pick_lea(insn: &Insn) -> Option<Pick> {
    use crate::engine::soft::decode::PlaceKind;
    match insn.place() {
        PlaceKind::Register => None,
        PlaceKind::Near if insn.op.segment == NO_SEGMENT => by_wide!(insn.op.size, W => straight(lea_near::<W>)),
        PlaceKind::Wide => by_wide!(insn.op.size, W => straight(lea_indexed::<W>)),
        _ => by_wide!(insn.op.size, W => straight(lea::<W>)),
    }
}

#[inline(always)]
fn cmov<W: Width, P: Place, const CC: u8>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?;
    // Without the condition a 32-bit register is still zero-extended.
    let kept = W::get(core, op.reg);
    W::set(core, op.reg, if core.flags.condition(CC) { value } else { kept });
    Ok(())
}

/// 0F 40-4F.
pub fn pick_cmov(insn: &Insn) -> Option<Pick> {
    by_condition!(insn.opcode, CC => by_wide!(insn.op.size, W => by_place!(insn, P => straight(cmov::<W, P, CC>))))
}

#[inline(always)]
fn setcc<P: Place, const CC: u8>(core: &mut Core, op: &Op) -> Step {
    let value = u8::from(core.flags.condition(CC));
    P::store(core, op, value)
}

/// 0F 90-9F.
pub fn pick_setcc(insn: &Insn) -> Option<Pick> {
    by_condition!(insn.opcode, CC => by_place!(insn, P => straight(setcc::<P, CC>)))
}

fn bswap<W: Width>(core: &mut Core, op: &Op) -> Step {
    let value = W::get(core, op.rm).wide();
    // Of 16 bits the manual says nothing; processors give 0.
    let swapped = if W::BITS == 16 { 0 } else { value.swap_bytes() >> (64 - W::BITS) };
    W::set(core, op.rm, W::cut(swapped));
    Ok(())
}

/// 0F C8-CF.
pub fn pick_bswap(insn: &Insn) -> Option<Pick> {
    by_wide!(insn.op.size, W => straight(bswap::<W>))
}

fn nop(_: &mut Core, _: &Op) -> Step {
    Ok(())
}

/// NOP with or without operands, prefetches, fences: nothing that software could see here.
pub fn pick_nop(_: &Insn) -> Option<Pick> {
    straight(nop)
}

fn touch<P: Place>(core: &mut Core, op: &Op) -> Step {
    P::load::<u8>(core, op).map(|_| ())
}

/// 0F AE without a row of its own: fences by register form, CLFLUSH, which faults like a load.
pub fn pick_fence(insn: &Insn) -> Option<Pick> {
    match (insn.is_memory(), insn.extension(), insn.prefix) {
        (false, 5..=7, 0) => straight(nop),
        (true, 7, 0 | 0x66) => by_memory!(insn, P => straight(touch::<P>)),
        _ => None,
    }
}

/// 0F 0D: PREFETCH with a memory operand only.
pub fn pick_prefetch(insn: &Insn) -> Option<Pick> {
    if insn.is_memory() { straight(nop) } else { None }
}
