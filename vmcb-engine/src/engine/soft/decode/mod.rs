//! From bytes to operations (APM3 chapter 1): prefixes, opcode maps, ModRM, immediates, mode rules.
//!
//! Decoding is exact where it is guest-visible: #UD for what AMD processors refuse, the 15-byte limit, LOCK legality,
//! REX only directly before the opcode. A block never leaves its page: an instruction that crosses into the next page is
//! decoded only as the first of a block, so that a fault of the second page is raised exactly when RIP is there.

use std::cell::Cell;

use super::block::{Block, Links, OPS_MAX, lines_of};
use super::core::{Core, Mode, Step, Stop, ZERO};
use super::op::{self, Handler, NO_SEGMENT, Op, form};

mod bytes;
mod insn;
mod one_byte;
mod table;
mod two_byte;

use super::interp::pick::Standing;
use super::interp::{fuse, liveness};
use bytes::{Cursor, Trouble};

/// Where the bytes at RIP lie.
#[derive(Clone, Copy, Debug)]
pub struct Fetched {
    /// Guest-physical address of the byte at RIP.
    pub gpa: u64,
    /// Page number of RAM.
    pub page: u64,
    /// Host address of that byte; readable to the end of its page.
    pub host: *const u8,
}

/// A block, and the lines of a second page if its only instruction crosses into one.
pub struct Decoded {
    /// The block.
    pub block: Block,
    /// (page, lines) of the second page.
    pub second: Option<(u64, u64)>,
}

/// What an SSE or MMX instruction is known by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Selector {
    /// Opcode map: 1 = 0F, 2 = 0F38, 3 = 0F3A.
    pub map: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// Mandatory prefix: 0 none, 0x66, 0xF3 or 0xF2 (F3/F2 win over 66).
    pub prefix: u8,
    /// ModRM.reg without REX, for groups.
    pub reg: u8,
    /// The r/m operand is memory.
    pub memory: bool,
    /// REX.W.
    pub wide: bool,
}

/// What decode needs to know of such an instruction. Its `Op` has `reg`/`rm` with REX applied, `immediate` = imm8 if any.
#[derive(Clone, Copy)]
pub struct Row {
    /// Runs it; another instruction may follow it in its block.
    pub run: Handler,
    /// An 8-bit immediate follows.
    pub immediate: bool,
}

/// Where the r/m operand lies; see `interp::operand`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlaceKind {
    /// A register.
    Register,
    /// Memory, base + displacement, 64-bit mode without segment base.
    Near,
    /// Other memory, 64-bit mode with a 64-bit address.
    Wide,
    /// Any other memory.
    Any,
}

/// An instruction on its way to become an [`Op`]: what families look at to pick its handler.
pub struct Insn {
    /// The operation, complete but for its handler (and length and immediate, which `pick` must not look at).
    pub op: Op,
    /// Mode it is decoded for.
    pub mode: Mode,
    /// Opcode map: 0 one-byte, 1 0F, 2 0F38, 3 0F3A.
    pub map: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// ModRM byte, 0 if there is none.
    pub modrm: u8,
    /// Mandatory prefix as in [`Selector`].
    pub prefix: u8,
}

impl Insn {
    fn new(mode: Mode) -> Self {
        Self { op: Op::default(), mode, map: 0, opcode: 0, modrm: 0, prefix: 0 }
    }

    /// ModRM.reg without REX: the opcode extension of groups.
    pub fn extension(&self) -> u8 {
        self.modrm >> 3 & 7
    }

    /// True if the r/m operand is memory.
    pub fn is_memory(&self) -> bool {
        self.op.is_memory()
    }

    /// Where the r/m operand lies.
    pub fn place(&self) -> PlaceKind {
        let op = &self.op;
        if !op.is_memory() {
            PlaceKind::Register
        } else if op.address_size == 8 && op.segment == NO_SEGMENT && op.index == ZERO {
            PlaceKind::Near
        } else if self.mode.long && op.address_size == 8 {
            PlaceKind::Wide
        } else {
            PlaceKind::Any
        }
    }

    fn selector(&self) -> Selector {
        Selector {
            map: self.map,
            opcode: self.opcode,
            prefix: self.prefix,
            reg: self.extension(),
            memory: self.is_memory(),
            wide: self.op.has(form::WIDE),
        }
    }
}

/// Decodes at most `limit` instructions from RIP, which `fetched` found.
///
/// # Errors
/// The first instruction cannot be fetched.
pub fn block(core: &mut Core, fetched: Fetched, limit: usize) -> Step<Decoded> {
    let mode = core.mode;
    let in_page = 0x1000 - (fetched.gpa & 0xfff) as usize;
    let mut ops = Vec::with_capacity(limit.min(OPS_MAX) + 1);
    let (mut at, mut standing, mut second) = (0usize, Standing::Inside, None);
    while ops.len() < limit.min(OPS_MAX) && at < in_page && matches!(standing, Standing::Inside) {
        if at > 0 && core.is_suspect(fetched.gpa + at as u64) {
            break;
        }
        let mut cursor = Cursor::new(core, fetched, at, ops.is_empty());
        match insn::decode(&mut cursor, mode, at as u16) {
            Ok((op, place)) => {
                standing = place;
                second = cursor.second_lines();
                at += usize::from(op.length);
                ops.push(op);
            }
            Err(Trouble::Crosses) => break,
            Err(Trouble::Fetch(stop)) => return Err(stop),
            Err(Trouble::TooLong | Trouble::Undefined) => unreachable!("decode turned these into operations"),
        }
    }
    let count = ops.len();
    for (at, op) in ops.iter_mut().enumerate() {
        op.remaining = (count - at) as u8;
    }
    // What ends a block may raise, whatever its opcode says.
    let inside = if matches!(standing, Standing::Inside) { count } else { count - 1 };
    liveness::drop_unseen_flags(&ops[..inside]);
    let linked = end(&mut ops, standing, at, mode, fetched.gpa & 0xfff);
    let lines = lines_of(fetched.gpa & 0xfff, at.min(in_page));
    let block = Block {
        gpa: fetched.gpa,
        mode,
        page: fetched.page,
        lines,
        count: count as u32,
        ops: ops.into(),
        linked,
        links: Links::default(),
        incoming: Vec::new(),
    };
    Ok(Decoded { block, second })
}

/// Ends the operations of a block that begins at `start` of its page and is `bytes` long. Returns which one is linked.
fn end(ops: &mut Vec<Op>, standing: Standing, bytes: usize, mode: Mode, start: u64) -> Option<usize> {
    let in_page = |offset: i64| (0..0x1000).contains(&(start as i64).saturating_add(offset));
    let same = in_page(bytes as i64);
    match standing {
        Standing::Last => return None,
        Standing::Returned => {}
        Standing::Linked(near) => {
            let at = ops.len() - 1;
            if same && in_page(ops[at].displacement) {
                ops[at].run.set(near);
                let condition = matches!(ops[at].code, 0x70..=0x7f | 0x180..=0x18f).then_some(ops[at].code as u8);
                let first = at.checked_sub(1).map(|first| &ops[first]);
                if let (Some(first), Some(condition)) = (first, condition)
                    && let Some(handler) = fuse::with_jcc(first, condition)
                {
                    first.run.set(handler);
                }
            }
        }
        Standing::Inside => {
            let run = match (mode.long, same) {
                (false, _) => op::fall_through,
                (true, true) => op::fall_linked::<true>,
                (true, false) => op::fall_linked::<false>,
            };
            ops.push(Op { run: Cell::new(run), offset: bytes as u16, ..Op::default() });
            if !mode.long {
                return None;
            }
        }
    }
    Some(ops.len() - 1)
}

impl From<Stop> for Trouble {
    fn from(stop: Stop) -> Self {
        Trouble::Fetch(stop)
    }
}
