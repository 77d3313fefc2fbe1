//! One decoded operation, and how operations follow each other.
//!
//! Every instruction's meaning is a plain function `fn(&mut Core, &Op) -> Step`. [`straight`] and [`last`] wrap
//! such a function into a [`Handler`]: run it, then call the handler of the next operation in tail position. In
//! optimised builds LLVM turns that call into a jump; where it does not, the stack grows by at most one block.
#![allow(
    clippy::not_unsafe_ptr_arg_deref,
    reason = "handlers are called by the loop and by each other only, with operations of a live block"
)]
#![allow(unsafe_code, reason = "dispatch: operations of a block lie one after the other and end with one that returns")]

use std::cell::Cell;

use super::core::{Core, Step, Stop, ZERO};

/// What a handler tells the loop that runs blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Flow {
    /// RIP and budget are right; go on.
    Next,
    /// [`Core::fault`] waits to be delivered.
    Fault,
    /// [`Core::exit`] waits for the host.
    Exit,
}

/// Runs one operation and all that follow it in its block.
pub type Handler = fn(&mut Core, *const Op) -> Flow;

/// No segment base is added.
pub const NO_SEGMENT: u8 = 255;

/// A decoded operation.
#[repr(C)]
pub struct Op {
    /// Runs it. Patched when the block is overwritten while it runs.
    pub run: Cell<Handler>,
    /// Immediate, sign-extended; for branches the displacement; for far pointers selector << 32 | offset; for MOV moffs
    /// the address.
    pub immediate: u64,
    /// Displacement of the memory operand; for RIP-relative operands the instruction's end in the block is folded in, and
    /// `base` is [`RIP_BASE`].
    pub displacement: i64,
    /// Register of ModRM.rm or the opcode, or high-byte form: bit 5 set: AH, CH, DH, BH.
    pub rm: u8,
    /// Register of ModRM.reg, or high-byte form as `rm`.
    pub reg: u8,
    /// Base register of the memory operand or `ZERO`.
    pub base: u8,
    /// Index register of the memory operand or `ZERO`.
    pub index: u8,
    /// log2 of the scale.
    pub scale: u8,
    /// Segment whose base is added, or [`NO_SEGMENT`] (64-bit mode without FS/GS).
    pub segment: u8,
    /// Operand size in bytes: 1, 2, 4, 8 (16 for SSE).
    pub size: u8,
    /// Address size in bytes: 2, 4, 8.
    pub address_size: u8,
    /// Length of the instruction in bytes.
    pub length: u8,
    /// Offset of the instruction from the block's start.
    pub offset: u16,
    /// Operations from this one to the end of the block, this one included.
    pub remaining: u16,
    /// Opcode: low byte the opcode byte, high byte the map (0 one-byte, 1 0F, 2 0F38, 3 0F3A).
    pub code: u16,
    /// Prefixes and form: see [`form`].
    pub form: u16,
}

/// Bits of [`Op::form`].
pub mod form {
    /// The r/m operand is memory.
    pub const MEMORY: u16 = 1;
    /// REP / REPE (F3).
    pub const REP: u16 = 2;
    /// REPNE (F2).
    pub const REPNE: u16 = 4;
    /// LOCK.
    pub const LOCK: u16 = 8;
    /// A REX prefix is there: byte registers 4-7 are SPL, BPL, SIL, DIL.
    pub const REX: u16 = 16;
    /// 66 prefix.
    pub const OPERAND_SIZE: u16 = 32;
    /// REX.W.
    pub const WIDE: u16 = 64;
    /// The memory operand is on the stack segment: a non-canonical address is #SS instead of #GP.
    pub const STACK: u16 = 128;
}

impl Op {
    /// True if the r/m operand is memory.
    #[inline(always)]
    pub fn is_memory(&self) -> bool {
        self.form & form::MEMORY != 0
    }

    /// True if all these prefix bits are set.
    #[inline(always)]
    pub fn has(&self, bits: u16) -> bool {
        self.form & bits == bits
    }

    /// Offset of the memory operand in its segment.
    #[inline(always)]
    pub fn effective(&self, core: &Core) -> u64 {
        let mut address = core.gprs[(self.base & 31) as usize]
            .wrapping_add(core.gprs[(self.index & 31) as usize] << self.scale)
            .wrapping_add(self.displacement as u64);
        if self.address_size != 8 {
            address &= if self.address_size == 4 { 0xffff_ffff } else { 0xffff };
        }
        address
    }

    /// Linear address of the memory operand: any form, any mode. Checks nothing but wraps as the address size asks.
    #[inline(always)]
    pub fn linear(&self, core: &Core) -> u64 {
        let address = self.effective(core);
        if self.segment == NO_SEGMENT {
            return address;
        }
        let linear = address.wrapping_add(core.segments[self.segment as usize].base);
        if core.mode.long { linear } else { linear & 0xffff_ffff }
    }
}

/// The meaning of an instruction.
pub trait Meaning: Fn(&mut Core, &Op) -> Step + Copy + 'static {}
impl<F: Fn(&mut Core, &Op) -> Step + Copy + 'static> Meaning for F {}

#[inline(always)]
fn meaning<F: Meaning>() -> F {
    const { assert!(size_of::<F>() == 0, "a meaning is a plain function without captures") };
    // SAFETY: F has no bytes, so there is nothing to initialise, and one exists (it was passed to the wrapper).
    unsafe { std::mem::zeroed() }
}

/// Handler of an instruction that is followed by another of its block.
pub fn straight<F: Meaning>(_: F) -> Handler {
    fn run<F: Meaning>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: the loop and these wrappers pass only pointers to operations of a live block (block.rs keeps blocks that
        // were overwritten until the loop is back).
        let this = unsafe { &*op };
        match meaning::<F>()(core, this) {
            Ok(()) => {
                // SAFETY: a straight operation is never the last of its block (decode ends each block with another kind).
                let next = unsafe { op.add(1) };
                // SAFETY: as above.
                let handler = unsafe { (*next).run.get() };
                handler(core, next)
            }
            Err(stop) => leave(core, this, stop),
        }
    }
    run::<F>
}

/// Handler of the last instruction of a block: RIP is the next instruction unless the meaning sets another.
pub fn last<F: Meaning>(_: F) -> Handler {
    fn run<F: Meaning>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        core.rip = core.next_rip(this);
        match meaning::<F>()(core, this) {
            Ok(()) => Flow::Next,
            Err(stop) => leave(core, this, stop),
        }
    }
    run::<F>
}

/// Handler of a near branch: as [`last`], and the next block may follow at once, because nothing changed that the loop
/// would have to look at.
pub fn branch<F: Meaning>(_: F) -> Handler {
    fn run<F: Meaning>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        core.rip = core.next_rip(this);
        match meaning::<F>()(core, this) {
            Ok(()) => core.follow(),
            Err(stop) => leave(core, this, stop),
        }
    }
    run::<F>
}

/// Ends a block that was cut at a page's end or at its greatest length.
pub(super) fn fall_through(core: &mut Core, op: *const Op) -> Flow {
    // SAFETY: see `straight`.
    let this = unsafe { &*op };
    core.rip = core.op_rip(this);
    core.follow()
}

/// Runs a block from its first operation.
#[inline(always)]
pub(super) fn start(core: &mut Core, ops: *const Op) -> Flow {
    // SAFETY: the loop passes the operations of a block that `Blocks` holds until the loop is back.
    let handler = unsafe { (*ops).run.get() };
    handler(core, ops)
}

/// Ends a block without an instruction: what follows was not decoded into it, or was overwritten. Retires nothing;
/// `remaining` is what the block did not do (0 where decode put it).
pub(super) fn stop_here(core: &mut Core, op: *const Op) -> Flow {
    // SAFETY: see `straight`.
    let this = unsafe { &*op };
    core.rip = core.op_rip(this);
    core.budget += i64::from(this.remaining);
    Flow::Next
}

#[cold]
#[inline(never)]
fn leave(core: &mut Core, op: &Op, stop: Stop) -> Flow {
    let flow = match stop {
        Stop::Done => {
            core.budget += i64::from(op.remaining) - 1;
            return Flow::Next;
        }
        Stop::Again => {
            core.rip = core.op_rip(op);
            core.budget += i64::from(op.remaining) - 1;
            return Flow::Next;
        }
        Stop::Fault => {
            if op.form & form::STACK != 0 {
                core.blame_stack();
            }
            Flow::Fault
        }
        Stop::Exit => Flow::Exit,
    };
    core.rip = core.op_rip(op);
    core.exit.next_rip = core.next_rip(op);
    core.budget += i64::from(op.remaining);
    flow
}

impl Default for Op {
    /// What [`stop_here`] needs: no registers, no memory.
    fn default() -> Self {
        Self {
            run: Cell::new(stop_here),
            immediate: 0,
            displacement: 0,
            rm: 0,
            reg: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            segment: NO_SEGMENT,
            size: 4,
            address_size: 8,
            length: 0,
            offset: 0,
            remaining: 0,
            code: 0,
            form: 0,
        }
    }
}
