//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE, PUSHF, POPF (APM3 chapter 3), and the stack itself (APM2 2.2.4).
//!
//! The stack is 64 bits wide in 64-bit mode; elsewhere SS.B says how much of RSP counts. RSP changes only after the
//! memory was accessed.

use super::operand::{Place, Width};
use super::pick::{Pick, by_place, by_wide, last, quick, straight};
use crate::engine::soft::core::{Core, RBP, RSP, SS, Step, Stop, rflags};
use crate::engine::soft::decode::Insn;
use crate::engine::soft::op::Op;
use crate::vmcb::Intercept;

/// A non-canonical stack address is #SS.
#[cold]
#[inline(never)]
fn blame<T>(core: &mut Core, stop: Stop) -> Step<T> {
    if stop == Stop::Fault {
        core.blame_stack();
    }
    Err(stop)
}

impl Core {
    /// The bits of RSP that address the stack.
    #[inline(always)]
    fn sp_mask<const LONG: bool>(&self) -> u64 {
        match (LONG, self.segments[SS].big()) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        }
    }

    #[inline(always)]
    fn set_stack<const LONG: bool>(&mut self, sp: u64) {
        let mask = self.sp_mask::<LONG>();
        self.gprs[RSP] = self.gprs[RSP] & !mask | sp & mask;
    }

    /// Writes a value on the stack at an offset in SS.
    #[inline(always)]
    fn stack_store<W: Width, const LONG: bool>(&mut self, sp: u64, value: W) -> Step {
        let sp = sp & self.sp_mask::<LONG>();
        let linear = if LONG { sp } else { self.segment_linear(SS, sp, W::BYTES, true)? };
        match self.store(linear, value) {
            Ok(()) => Ok(()),
            Err(stop) => blame(self, stop),
        }
    }

    /// Raises what a write at an offset in SS would raise.
    pub(super) fn stack_probe<const LONG: bool>(&mut self, sp: u64, bytes: u64) -> Step {
        let sp = sp & self.sp_mask::<LONG>();
        let linear = self.segment_linear(SS, sp, bytes, true)?;
        match self.probe_write(linear, bytes as usize) {
            Ok(()) => Ok(()),
            Err(stop) => blame(self, stop),
        }
    }

    /// Reads a value of the stack at an offset in SS.
    #[inline(always)]
    fn stack_load<W: Width, const LONG: bool>(&mut self, sp: u64) -> Step<W> {
        let sp = sp & self.sp_mask::<LONG>();
        let linear = if LONG { sp } else { self.segment_linear(SS, sp, W::BYTES, false)? };
        match self.load(linear) {
            Ok(value) => Ok(value),
            Err(stop) => blame(self, stop),
        }
    }

    /// Pushes.
    ///
    /// # Errors
    /// The stack cannot be written; RSP is as before.
    #[inline(always)]
    pub fn push<W: Width, const LONG: bool>(&mut self, value: W) -> Step {
        let sp = self.gprs[RSP].wrapping_sub(W::BYTES);
        self.stack_store::<W, LONG>(sp, value)?;
        self.set_stack::<LONG>(sp);
        Ok(())
    }

    /// Pushes in 64-bit mode, if the TLB has the page; `None` has changed nothing.
    #[inline(always)]
    pub fn push_hit(&mut self, value: u64) -> Option<()> {
        let sp = self.gprs[RSP].wrapping_sub(8);
        self.store_hit(sp, value)?;
        self.gprs[RSP] = sp;
        Some(())
    }

    /// Pops, and releases `extra` more bytes.
    ///
    /// # Errors
    /// The stack cannot be read; RSP is as before.
    #[inline(always)]
    pub fn pop<W: Width, const LONG: bool>(&mut self, extra: u64) -> Step<W> {
        let sp = self.gprs[RSP];
        let value = self.stack_load::<W, LONG>(sp)?;
        self.set_stack::<LONG>(sp.wrapping_add(W::BYTES).wrapping_add(extra));
        Ok(value)
    }
}

/// Evaluates with `$LONG` telling whether the instruction is for 64-bit mode.
macro_rules! by_long {
    ($insn:expr, $LONG:ident => $e:expr) => {
        if $insn.mode.long {
            const $LONG: bool = true;
            $e
        } else {
            const $LONG: bool = false;
            $e
        }
    };
}
pub(super) use by_long;

#[inline(always)]
fn push_reg<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let value = W::get(core, op.rm);
    core.push::<W, LONG>(value)
}

#[inline(always)]
fn push_imm<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    core.push::<W, LONG>(W::cut(op.immediate))
}

#[inline(always)]
fn push_rm<W: Width, P: Place, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let value = P::load::<W>(core, op)?;
    core.push::<W, LONG>(value)
}

#[inline(always)]
fn pop_reg<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let value = core.pop::<W, LONG>(0)?;
    W::set(core, op.rm, value);
    Ok(())
}

fn push_quick(core: &mut Core, op: &Op) -> Step {
    let value = u64::get(core, op.rm);
    core.push_hit(value).ok_or(Stop::Again)
}

fn pop_quick(core: &mut Core, op: &Op) -> Step {
    let sp = core.gprs[RSP];
    let value = core.load_known::<u64>(sp).ok_or(Stop::Again)?;
    core.gprs[RSP] = sp.wrapping_add(8);
    u64::set(core, op.rm, value);
    Ok(())
}

/// The address of the destination is computed with the new RSP.
fn pop_rm<W: Width, P: Place, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let before = core.gprs[RSP];
    let value = core.pop::<W, LONG>(0)?;
    P::store(core, op, value).inspect_err(|_| core.gprs[RSP] = before)
}

/// 50-5F, 68, 6A.
pub fn pick(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0x50..=0x57 if insn.mode.long && insn.op.size == 8 => quick(push_quick, push_reg::<u64, true>),
        0x58..=0x5f if insn.mode.long && insn.op.size == 8 => quick(pop_quick, pop_reg::<u64, true>),
        0x50..=0x57 => by_wide!(insn.op.size, W => by_long!(insn, L => straight(push_reg::<W, L>))),
        0x58..=0x5f => by_wide!(insn.op.size, W => by_long!(insn, L => straight(pop_reg::<W, L>))),
        _ => by_wide!(insn.op.size, W => by_long!(insn, L => straight(push_imm::<W, L>))),
    }
}

/// FF /6.
pub fn pick_push_rm(insn: &Insn) -> Option<Pick> {
    by_wide!(insn.op.size, W => by_place!(insn, P => by_long!(insn, L => straight(push_rm::<W, P, L>))))
}

/// 8F /0; the other extensions are XOP or undefined.
pub fn pick_pop_rm(insn: &Insn) -> Option<Pick> {
    if insn.extension() != 0 {
        return None;
    }
    by_wide!(insn.op.size, W => by_place!(insn, P => by_long!(insn, L => straight(pop_rm::<W, P, L>))))
}

fn pusha<W: Width>(core: &mut Core, _: &Op) -> Step {
    let before = core.gprs[RSP];
    for register in 0..8u64 {
        let value = W::get(core, register as u8);
        let sp = before.wrapping_sub((register + 1) * W::BYTES);
        core.stack_store::<W, false>(sp, value)?;
    }
    core.set_stack::<false>(before.wrapping_sub(8 * W::BYTES));
    Ok(())
}

fn popa<W: Width>(core: &mut Core, _: &Op) -> Step {
    let before = core.gprs[RSP];
    let mut values = [W::cut(0); 8];
    for (at, value) in values.iter_mut().enumerate() {
        *value = core.stack_load::<W, false>(before.wrapping_add(at as u64 * W::BYTES))?;
    }
    for (at, value) in values.iter().enumerate() {
        let register = 7 - at;
        if register != RSP {
            W::set(core, register as u8, *value);
        }
    }
    core.set_stack::<false>(before.wrapping_add(8 * W::BYTES));
    Ok(())
}

/// 60, 61.
pub fn pick_all(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0x60 => by_wide!(insn.op.size, W => straight(pusha::<W>)),
        _ => by_wide!(insn.op.size, W => straight(popa::<W>)),
    }
}

/// The final top of the stack must be writable, though nothing is written there.
fn enter<W: Width, const LONG: bool>(core: &mut Core, op: &Op) -> Step {
    let (bytes, level) = (op.immediate & 0xffff, op.immediate >> 16 & 31);
    let mut sp = core.gprs[RSP].wrapping_sub(W::BYTES);
    let mut rbp = core.gprs[RBP];
    core.stack_store::<W, LONG>(sp, W::cut(rbp))?;
    let frame = sp;
    for _ in 1..level {
        rbp = rbp.wrapping_sub(W::BYTES);
        let outer = core.stack_load::<W, LONG>(rbp)?;
        sp = sp.wrapping_sub(W::BYTES);
        core.stack_store::<W, LONG>(sp, outer)?;
    }
    if level != 0 {
        sp = sp.wrapping_sub(W::BYTES);
        core.stack_store::<W, LONG>(sp, W::cut(frame))?;
    }
    let mask = core.sp_mask::<LONG>();
    let top = sp.wrapping_sub(bytes);
    core.stack_probe::<LONG>(top, W::BYTES)?;
    W::set(core, RBP as u8, W::cut(frame & mask));
    core.set_stack::<LONG>(top);
    Ok(())
}

#[inline(always)]
fn leave<W: Width, const LONG: bool>(core: &mut Core, _: &Op) -> Step {
    let frame = core.gprs[RBP];
    let value = core.stack_load::<W, LONG>(frame)?;
    core.set_stack::<LONG>(frame.wrapping_add(W::BYTES));
    W::set(core, RBP as u8, value);
    Ok(())
}

/// C8, C9.
pub fn pick_frame(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0xc8 => by_wide!(insn.op.size, W => by_long!(insn, L => straight(enter::<W, L>))),
        _ => by_wide!(insn.op.size, W => by_long!(insn, L => straight(leave::<W, L>))),
    }
}

impl Core {
    fn io_privilege(&self) -> u8 {
        (self.system_flags >> 12 & 3) as u8
    }
}

fn pushf<W: Width, const LONG: bool>(core: &mut Core, _: &Op) -> Step {
    if core.virtual_8086() && core.io_privilege() < 3 {
        return core.general_protection();
    }
    core.intercept(Intercept::PUSHF)?;
    let value = core.rflags() & !(rflags::RF | rflags::VM);
    core.push::<W, LONG>(W::cut(value))
}

/// Which bits POPF may change depends on CPL and IOPL; VM, VIF and VIP never change, RF becomes 0 (APM3 POPF).
fn popf<W: Width, const LONG: bool>(core: &mut Core, _: &Op) -> Step {
    if core.virtual_8086() && core.io_privilege() < 3 {
        return core.general_protection();
    }
    core.intercept(Intercept::POPF)?;
    let popped = core.pop::<W, LONG>(0)?.wide();
    let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    if core.cpl == 0 && !core.virtual_8086() {
        mask |= rflags::IOPL;
    }
    if core.cpl <= core.io_privilege() || core.virtual_8086() {
        mask |= rflags::IF;
    }
    if W::BITS == 16 {
        mask &= 0xffff;
    }
    let kept = core.rflags() & !rflags::RF;
    core.set_rflags(kept & !mask | popped & mask);
    Ok(())
}

/// 9C, 9D.
pub fn pick_flags(insn: &Insn) -> Option<Pick> {
    match insn.opcode {
        0x9c => by_wide!(insn.op.size, W => by_long!(insn, L => last(pushf::<W, L>))),
        _ => by_wide!(insn.op.size, W => by_long!(insn, L => last(popf::<W, L>))),
    }
}
