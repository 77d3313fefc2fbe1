//! MOVS, STOS, LODS, SCAS, CMPS and their repetition (APM3 chapter 3, APM1 3.3.8).
//!
//! A repeated instruction is done in chunks that reach to the end of the page of either operand; a chunk is one tick, and
//! RIP stays on the instruction until the last. The chunk depends on registers alone, never on what is cached, and
//! rSI, rDI, rCX tell exactly how far it came when an element faults.
#![allow(unsafe_code, reason = "whole chunks are copied and filled through the TLB's host addresses")]

use super::operand::Width;
use super::pick::{Pick, by_size, straight};
use crate::engine::soft::core::{Core, DS, ES, RAX, RCX, RDI, RSI, Step, Stop, rflags};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::{NO_SEGMENT, Op, form};

fn address_mask(op: &Op) -> u64 {
    match op.address_size {
        8 => u64::MAX,
        4 => 0xffff_ffff,
        _ => 0xffff,
    }
}

/// Writes an index or count register as its address size asks.
#[inline(always)]
fn set_index(core: &mut Core, op: &Op, register: usize, value: u64) {
    match op.address_size {
        8 => core.gprs[register] = value,
        4 => core.gprs[register] = value & 0xffff_ffff,
        _ => core.gprs[register] = core.gprs[register] & !0xffff | value & 0xffff,
    }
}

#[inline(always)]
fn backward(core: &Core) -> bool {
    core.system_flags & rflags::DF != 0
}

#[inline(always)]
fn advance<W: Width>(core: &mut Core, op: &Op, register: usize) {
    let by = if backward(core) { W::BYTES.wrapping_neg() } else { W::BYTES };
    set_index(core, op, register, core.gprs[register].wrapping_add(by));
}

#[inline(always)]
fn source<W: Width>(core: &mut Core, op: &Op) -> Step<u64> {
    let segment = if op.segment == NO_SEGMENT { DS } else { op.segment.into() };
    core.segment_linear(segment, core.gprs[RSI] & address_mask(op), W::BYTES, false)
}

#[inline(always)]
fn target<W: Width>(core: &mut Core, op: &Op, write: bool) -> Step<u64> {
    core.segment_linear(ES, core.gprs[RDI] & address_mask(op), W::BYTES, write)
}

/// Elements from a linear address to the end of its page; at least one.
#[inline(always)]
fn room<W: Width>(core: &Core, linear: u64) -> u64 {
    let at = linear & 0xfff;
    if !backward(core) {
        ((0x1000 - at) / W::BYTES).max(1)
    } else if at + W::BYTES > 0x1000 {
        1
    } else {
        at / W::BYTES + 1
    }
}

/// Which operands an instruction has.
const SOURCE: u8 = 1;
const TARGET: u8 = 2;

/// Elements of the next chunk.
fn chunk<W: Width, const OPERANDS: u8>(core: &mut Core, op: &Op, write: bool) -> Step<u64> {
    let mut elements = core.gprs[RCX] & address_mask(op);
    if OPERANDS & SOURCE != 0 {
        let linear = source::<W>(core, op)?;
        elements = elements.min(room::<W>(core, linear));
    }
    if OPERANDS & TARGET != 0 {
        let linear = target::<W>(core, op, write)?;
        elements = elements.min(room::<W>(core, linear));
    }
    Ok(elements)
}

#[inline(always)]
fn counted(core: &mut Core, op: &Op, elements: u64) {
    set_index(core, op, RCX, core.gprs[RCX].wrapping_sub(elements));
}

/// Done, or another chunk.
fn more(core: &Core, op: &Op) -> Step {
    if core.gprs[RCX] & address_mask(op) == 0 { Ok(()) } else { Err(Stop::Again) }
}

/// Runs `one` for the elements of a chunk until it says stop.
#[inline(always)]
fn repeat(core: &mut Core, op: &Op, elements: u64, mut one: impl FnMut(&mut Core) -> Step<bool>) -> Step {
    for _ in 0..elements {
        let goes_on = one(core)?;
        counted(core, op, 1);
        if !goes_on {
            return Ok(());
        }
    }
    more(core, op)
}

fn movs_one<W: Width>(core: &mut Core, op: &Op) -> Step<bool> {
    let from = source::<W>(core, op)?;
    let value = core.load::<W>(from)?;
    let to = target::<W>(core, op, true)?;
    core.store(to, value)?;
    advance::<W>(core, op, RSI);
    advance::<W>(core, op, RDI);
    Ok(true)
}

fn movs<W: Width>(core: &mut Core, op: &Op) -> Step {
    movs_one::<W>(core, op).map(|_| ())
}

/// Copies `elements` at once if both pages are in the TLB and the copy does not feed on itself. True if it did.
fn copy_whole<W: Width>(core: &mut Core, op: &Op, elements: u64) -> Step<bool> {
    if !core.mode.long || op.address_size != 8 || backward(core) || elements == 0 {
        return Ok(false);
    }
    let (from, to) = (source::<W>(core, op)?, target::<W>(core, op, true)?);
    let bytes = elements * W::BYTES;
    if (from & 0xfff) + bytes > 0x1000 || (to & 0xfff) + bytes > 0x1000 {
        return Ok(false);
    }
    let Some(from) = core.host_for_load(from, bytes as usize) else { return Ok(false) };
    let Some(to) = core.host_for_store(to, bytes as usize) else { return Ok(false) };
    if (to as u64).wrapping_sub(from as u64).wrapping_sub(1) < bytes - 1 {
        return Ok(false);
    }
    // SAFETY: both ranges lie within one page of RAM each, which the TLB's entries map; writes there need no notice.
    unsafe { std::ptr::copy(from, to, bytes as usize) };
    core.gprs[RSI] = core.gprs[RSI].wrapping_add(bytes);
    core.gprs[RDI] = core.gprs[RDI].wrapping_add(bytes);
    core.gprs[RCX] = core.gprs[RCX].wrapping_sub(elements);
    Ok(true)
}

fn rep_movs<W: Width>(core: &mut Core, op: &Op) -> Step {
    if core.gprs[RCX] & address_mask(op) == 0 {
        return nothing(core, op);
    }
    let elements = chunk::<W, { SOURCE | TARGET }>(core, op, true)?;
    if copy_whole::<W>(core, op, elements)? {
        return more(core, op);
    }
    // The first element brings both pages into the TLB.
    movs_one::<W>(core, op)?;
    counted(core, op, 1);
    if copy_whole::<W>(core, op, elements - 1)? {
        return more(core, op);
    }
    repeat(core, op, elements - 1, |core| movs_one::<W>(core, op))
}

fn stos_one<W: Width>(core: &mut Core, op: &Op) -> Step<bool> {
    let to = target::<W>(core, op, true)?;
    let value = W::get(core, RAX as u8);
    core.store(to, value)?;
    advance::<W>(core, op, RDI);
    Ok(true)
}

fn stos<W: Width>(core: &mut Core, op: &Op) -> Step {
    stos_one::<W>(core, op).map(|_| ())
}

fn fill_whole<W: Width>(core: &mut Core, op: &Op, elements: u64) -> Step<bool> {
    if !core.mode.long || op.address_size != 8 || backward(core) || elements == 0 {
        return Ok(false);
    }
    let to = target::<W>(core, op, true)?;
    let bytes = elements * W::BYTES;
    if (to & 0xfff) + bytes > 0x1000 {
        return Ok(false);
    }
    let Some(host) = core.host_for_store(to, bytes as usize) else { return Ok(false) };
    let (value, host) = (W::get(core, RAX as u8), host.cast::<W>());
    for at in 0..elements as usize {
        // SAFETY: as in `copy_whole`.
        unsafe { host.wrapping_add(at).write_unaligned(value) };
    }
    core.gprs[RDI] = core.gprs[RDI].wrapping_add(bytes);
    core.gprs[RCX] = core.gprs[RCX].wrapping_sub(elements);
    Ok(true)
}

fn rep_stos<W: Width>(core: &mut Core, op: &Op) -> Step {
    if core.gprs[RCX] & address_mask(op) == 0 {
        return nothing(core, op);
    }
    let elements = chunk::<W, TARGET>(core, op, true)?;
    if fill_whole::<W>(core, op, elements)? {
        return more(core, op);
    }
    stos_one::<W>(core, op)?;
    counted(core, op, 1);
    if fill_whole::<W>(core, op, elements - 1)? {
        return more(core, op);
    }
    repeat(core, op, elements - 1, |core| stos_one::<W>(core, op))
}

/// A count of zero: nothing happens.
fn nothing(_: &mut Core, _: &Op) -> Step {
    Ok(())
}

fn lods_one<W: Width>(core: &mut Core, op: &Op) -> Step<bool> {
    let from = source::<W>(core, op)?;
    let value = core.load::<W>(from)?;
    W::set(core, RAX as u8, value);
    advance::<W>(core, op, RSI);
    Ok(true)
}

fn lods<W: Width>(core: &mut Core, op: &Op) -> Step {
    lods_one::<W>(core, op).map(|_| ())
}

fn rep_lods<W: Width>(core: &mut Core, op: &Op) -> Step {
    if core.gprs[RCX] & address_mask(op) == 0 {
        return nothing(core, op);
    }
    let elements = chunk::<W, SOURCE>(core, op, false)?;
    repeat(core, op, elements, |core| lods_one::<W>(core, op))
}

/// True if a repetition with this prefix goes on: REPE while equal, REPNE while not.
#[inline(always)]
fn goes_on(core: &Core, op: &Op) -> bool {
    core.flags.zf() == op.has(form::REP)
}

fn scas_one<W: Width>(core: &mut Core, op: &Op) -> Step<bool> {
    let to = target::<W>(core, op, false)?;
    let value = core.load::<W>(to)?;
    core.flags = super::alu::subtract(W::get(core, RAX as u8), value).1;
    advance::<W>(core, op, RDI);
    Ok(goes_on(core, op))
}

fn scas<W: Width>(core: &mut Core, op: &Op) -> Step {
    scas_one::<W>(core, op).map(|_| ())
}

fn rep_scas<W: Width>(core: &mut Core, op: &Op) -> Step {
    if core.gprs[RCX] & address_mask(op) == 0 {
        return nothing(core, op);
    }
    let elements = chunk::<W, TARGET>(core, op, false)?;
    repeat(core, op, elements, |core| scas_one::<W>(core, op))
}

/// AMD family 19h reads the operand at rDI first, but not for REPE CMPSB; it shows if both fault.
fn cmps_one<W: Width>(core: &mut Core, op: &Op) -> Step<bool> {
    let source_first = W::BYTES == 1 && op.has(form::REP);
    let mut left = W::cut(0);
    if source_first {
        let from = source::<W>(core, op)?;
        left = core.load::<W>(from)?;
    }
    let to = target::<W>(core, op, false)?;
    let right = core.load::<W>(to)?;
    if !source_first {
        let from = source::<W>(core, op)?;
        left = core.load::<W>(from)?;
    }
    core.flags = super::alu::subtract(left, right).1;
    advance::<W>(core, op, RSI);
    advance::<W>(core, op, RDI);
    Ok(goes_on(core, op))
}

fn cmps<W: Width>(core: &mut Core, op: &Op) -> Step {
    cmps_one::<W>(core, op).map(|_| ())
}

fn rep_cmps<W: Width>(core: &mut Core, op: &Op) -> Step {
    if core.gprs[RCX] & address_mask(op) == 0 {
        return nothing(core, op);
    }
    let elements = chunk::<W, { SOURCE | TARGET }>(core, op, false)?;
    repeat(core, op, elements, |core| cmps_one::<W>(core, op))
}

/// A4-A7, AA-AF.
pub fn pick(insn: &Insn) -> Option<Pick> {
    let repeated = insn.op.form & (form::REP | form::REPNE) != 0;
    by_size!(insn.op.size, W => match (insn.opcode & !1, repeated) {
        (0xa4, false) => straight(movs::<W>),
        (0xa4, true) => straight(rep_movs::<W>),
        (0xa6, false) => straight(cmps::<W>),
        (0xa6, true) => straight(rep_cmps::<W>),
        (0xaa, false) => straight(stos::<W>),
        (0xaa, true) => straight(rep_stos::<W>),
        (0xac, false) => straight(lods::<W>),
        (0xac, true) => straight(rep_lods::<W>),
        (_, false) => straight(scas::<W>),
        (_, true) => straight(rep_scas::<W>),
    })
}
