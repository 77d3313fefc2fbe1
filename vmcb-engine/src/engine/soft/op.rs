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

use super::block::Links;
use super::core::{Core, RIP_BASE, RSP, Step, Stop, ZERO};
use super::tlb::Tlb;

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
    /// Immediate, sign-extended; for far pointers selector << 32 | offset; for MOV moffs the address; for branches the
    /// displacement, or if they are linked the address of the block's [`Links`].
    pub immediate: u64,
    /// Displacement of the memory operand; for RIP-relative operands the instruction's end in the block is folded in, and
    /// `base` is [`RIP_BASE`]. For linked branches the target's offset from the block's start.
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
    /// Operations from this one to the end of the block, this one included.
    pub remaining: u8,
    /// Offset of the instruction from the block's start.
    pub offset: u16,
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

const _: () = assert!(size_of::<Op>() == 40, "decoded code should fit into the caches");

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

/// Handler of an instruction whose memory operand the TLB mostly has: `F` does it then, and fails without effect
/// otherwise; `G` is the same instruction, whatever the TLB has. So the common case needs no stack of the host.
pub fn quick<F: Meaning, G: Meaning>(_: F, _: G) -> Handler {
    fn run<F: Meaning, G: Meaning>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        match meaning::<F>()(core, this) {
            Ok(()) => {
                // SAFETY: see `straight`.
                let next = unsafe { op.add(1) };
                // SAFETY: as above.
                let handler = unsafe { (*next).run.get() };
                handler(core, next)
            }
            Err(_) => slowly::<G>(core, op),
        }
    }
    run::<F, G>
}

/// [`straight`] out of line, for the rare case of a quick handler.
#[cold]
#[inline(never)]
fn slowly<G: Meaning>(core: &mut Core, op: *const Op) -> Flow {
    // SAFETY: see `straight`.
    let this = unsafe { &*op };
    match meaning::<G>()(core, this) {
        Ok(()) => {
            // SAFETY: see `straight`.
            let next = unsafe { op.add(1) };
            start(core, next)
        }
        Err(stop) => leave(core, this, stop),
    }
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

/// What a linked branch does before the next block: true if it is taken. `Op::displacement` is where its target lies, and
/// `Op::offset` and `Op::length` where the next instruction, both counted from the block's start.
pub trait Turn: Fn(&mut Core, &Op) -> Step<bool> + Copy + 'static {}
impl<F: Fn(&mut Core, &Op) -> Step<bool> + Copy + 'static> Turn for F {}

#[inline(always)]
fn turn_of<F: Turn>() -> F {
    const { assert!(size_of::<F>() == 0, "a turn is a plain function without captures") };
    // SAFETY: as in `meaning`.
    unsafe { std::mem::zeroed() }
}

/// Handler of a relative near branch of 64-bit mode with 64-bit operand size: the block that followed last time follows
/// at once. `SAME` if both blocks that may follow begin in the page of this one, so that their addresses need no look at
/// the TLB: this page's translation is cached, since nothing in a block can drop one of code.
pub fn turn<F: Turn, const SAME: bool>(_: F) -> Handler {
    fn run<F: Turn, const SAME: bool>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        match turn_of::<F>()(core, this) {
            Ok(taken) => go_on::<SAME>(core, this, taken),
            Err(stop) => leave(core, this, stop),
        }
    }
    run::<F, SAME>
}

/// As [`turn`], where `F` does it if the TLB has what it needs, and `G` otherwise.
pub fn quick_turn<F: Turn, G: Turn, const SAME: bool>(_: F, _: G) -> Handler {
    fn run<F: Turn, G: Turn, const SAME: bool>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        match turn_of::<F>()(core, this) {
            Ok(taken) => go_on::<SAME>(core, this, taken),
            Err(_) => turn_slowly::<G>(core, op),
        }
    }
    run::<F, G, SAME>
}

#[cold]
#[inline(never)]
fn turn_slowly<G: Turn>(core: &mut Core, op: *const Op) -> Flow {
    // SAFETY: see `straight`.
    let this = unsafe { &*op };
    match turn_of::<G>()(core, this) {
        Ok(taken) => go_on::<false>(core, this, taken),
        Err(stop) => leave(core, this, stop),
    }
}

/// Handler of an instruction that cannot be the last but is followed by one: as [`straight`] and [`turn`] in one.
pub fn fused<F: Meaning, G: Turn>(_: F, _: G) -> Handler {
    fn run<F: Meaning, G: Turn>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        if let Err(stop) = meaning::<F>()(core, this) {
            return leave(core, this, stop);
        }
        // SAFETY: decode fuses an operation with the one after it only.
        let next = unsafe { &*op.add(1) };
        match turn_of::<G>()(core, next) {
            Ok(taken) => go_on::<true>(core, next, taken),
            Err(stop) => leave(core, next, stop),
        }
    }
    run::<F, G>
}

/// As [`fused`], where `F` does the first one if the TLB has its page, and `S` otherwise.
pub fn quick_fused<F: Meaning, G: Turn, S: Meaning>(_: F, _: G, _: S) -> Handler {
    fn run<F: Meaning, G: Turn, S: Meaning>(core: &mut Core, op: *const Op) -> Flow {
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        if meaning::<F>()(core, this).is_err() {
            return slowly::<S>(core, op);
        }
        // SAFETY: as in `fused`.
        let next = unsafe { &*op.add(1) };
        match turn_of::<G>()(core, next) {
            Ok(taken) => go_on::<true>(core, next, taken),
            Err(stop) => leave(core, next, stop),
        }
    }
    run::<F, G, S>
}

/// Finds where a return leads, if that is easy; changes nothing.
pub trait Target: Fn(&mut Core, &Op) -> Option<u64> + Copy + 'static {}
impl<F: Fn(&mut Core, &Op) -> Option<u64> + Copy + 'static> Target for F {}

/// Handler of a near return of 64-bit mode. If it leads to where the last call said, the block that follows that call
/// follows at once. Otherwise `G` does all of it.
pub fn returning<F: Target, G: Meaning>(_: F, _: G) -> Handler {
    fn run<F: Target, G: Meaning>(core: &mut Core, op: *const Op) -> Flow {
        const { assert!(size_of::<F>() == 0, "a target is a plain function without captures") };
        // SAFETY: as in `meaning`.
        let target: F = unsafe { std::mem::zeroed() };
        // SAFETY: see `straight`.
        let this = unsafe { &*op };
        let (rip, links) = core.returns.top();
        if links != 0 && core.follow != 0 && target(core, this) == Some(rip) {
            // SAFETY: `Core::returns` forgets what it knows before the loop lets go of any block.
            let link = unsafe { &(*(links as *const Links)).exits[0] };
            let ops = link.ops.get() as *const Op;
            if !ops.is_null()
                && Tlb::code_gpa(core.tlb_base, rip) == Some(link.gpa.get())
                && count_of(ops) <= core.budget
            {
                core.returns.pop();
                core.gprs[RSP] = core.gprs[RSP].wrapping_add(8).wrapping_add(this.immediate);
                core.follow -= 1;
                core.budget -= count_of(ops);
                core.gprs[RIP_BASE as usize] = rip;
                return start(core, ops);
            }
        }
        return_slowly::<G>(core, op)
    }
    run::<F, G>
}

#[inline(never)]
fn return_slowly<G: Meaning>(core: &mut Core, op: *const Op) -> Flow {
    // SAFETY: see `straight`.
    let this = unsafe { &*op };
    core.rip = core.next_rip(this);
    if let Err(stop) = meaning::<G>()(core, this) {
        return leave(core, this, stop);
    }
    let (rip, links) = core.returns.top();
    core.returns.pop();
    if core.follow == 0 {
        return Flow::Next;
    }
    let Some((gpa, ops)) = core.block_at(core.rip) else { return Flow::Next };
    if rip == core.rip && links != 0 {
        // SAFETY: as in `returning`.
        let caller = unsafe { (*(links as *const Links)).slot };
        core.blocks.connect(caller, 0, gpa, core.mode);
    }
    core.enter_next(ops)
}

/// As [`fall_through`], in 64-bit mode.
pub(super) fn fall_linked<const SAME: bool>(core: &mut Core, op: *const Op) -> Flow {
    // SAFETY: see `straight`.
    let this = unsafe { &*op };
    go_on::<SAME>(core, this, false)
}

#[inline(always)]
fn go_on<const SAME: bool>(core: &mut Core, op: &Op, taken: bool) -> Flow {
    let after = if taken { op.displacement as u64 } else { u64::from(op.offset) + u64::from(op.length) };
    let rip = core.gprs[RIP_BASE as usize].wrapping_add(after);
    // SAFETY: `Block::settle` put the address of the block's own links there; the block lives, because it runs.
    let links = unsafe { &*(op.immediate as *const Links) };
    let link = &links.exits[usize::from(taken)];
    let ops = link.ops.get() as *const Op;
    if !ops.is_null() && core.follow != 0 && (SAME || Tlb::code_gpa(core.tlb_base, rip) == Some(link.gpa.get())) {
        // A block that dies clears all links to it, so these are the operations of one that lives.
        let count = count_of(ops);
        if count <= core.budget {
            core.follow -= 1;
            core.budget -= count;
            core.gprs[RIP_BASE as usize] = rip;
            return start(core, ops);
        }
    }
    core.rip = rip;
    find_next(core, links, taken)
}

/// A link that is empty, or led elsewhere, or there is a reason to look at the loop.
#[inline(never)]
fn find_next(core: &mut Core, links: &Links, taken: bool) -> Flow {
    if core.follow == 0 {
        return Flow::Next;
    }
    let Some((gpa, ops)) = core.block_at(core.rip) else { return Flow::Next };
    core.blocks.connect(links.slot, usize::from(taken), gpa, core.mode);
    core.enter_next(ops)
}

/// Runs a block from its first operation.
#[inline(always)]
pub(super) fn start(core: &mut Core, ops: *const Op) -> Flow {
    // SAFETY: the loop passes the operations of a block that `Blocks` holds until the loop is back.
    let handler = unsafe { (*ops).run.get() };
    handler(core, ops)
}

/// Instructions of the block that begins with `ops`.
#[inline(always)]
pub(super) fn count_of(ops: *const Op) -> i64 {
    // SAFETY: as in `start`.
    i64::from(unsafe { (*ops).remaining })
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
            core.goes_on_repeating();
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
