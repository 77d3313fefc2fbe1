//! From bytes to operations (APM3 chapter 1): prefixes, three opcode maps, ModRM, immediates, mode rules.
//!
//! Decoding is exact where it is guest-visible: #UD for what AMD processors refuse, the 15-byte limit, LOCK legality,
//! REX only directly before the opcode.

use super::block::Block;
use super::core::{Core, Step};
use super::op::Handler;

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
    /// Runs it.
    pub run: Handler,
    /// An 8-bit immediate follows.
    pub immediate: bool,
}

/// Decodes at most `limit` instructions from RIP.
///
/// # Errors
/// The first instruction cannot be fetched.
pub fn block(core: &mut Core, fetched: Fetched, limit: usize) -> Step<Decoded> {
    let _ = (core, fetched, limit);
    unreachable!("skeleton")
}
