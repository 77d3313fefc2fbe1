//! What the opcode tables say of each opcode.

use super::Insn;
use crate::engine::soft::interp::pick::Pick;

/// Immediate bytes after ModRM, SIB and displacement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Immediate {
    /// None.
    None,
    /// One byte, sign-extended.
    Byte,
    /// Two bytes, zero-extended.
    Word,
    /// Operand size, at most four bytes, sign-extended.
    Short,
    /// Operand size.
    Full,
    /// Two bytes and one byte: ENTER; the byte is in bits 23:16.
    Enter,
    /// Offset of operand size and selector.
    Far,
    /// Address of address size: becomes the memory operand.
    Moffs,
    /// Group 3 (F6, F7): operand size for TEST, else none.
    Test,
}

/// One opcode.
#[derive(Clone, Copy)]
pub struct Entry {
    /// See [`flag`].
    pub flags: u16,
    /// What follows.
    pub immediate: Immediate,
    /// Chooses the handler; `None` is #UD.
    pub pick: fn(&Insn) -> Option<Pick>,
}

/// Bits of [`Entry::flags`].
pub mod flag {
    /// A ModRM byte follows.
    pub const MODRM: u16 = 1;
    /// Operands are bytes.
    pub const BYTE: u16 = 2;
    /// The r/m operand is a byte, the register is not.
    pub const BYTE_RM: u16 = 4;
    /// #UD in 64-bit mode.
    pub const NO_LONG: u16 = 8;
    /// Operand size is 64 bits in 64-bit mode unless 66 makes it 16.
    pub const DEFAULT_64: u16 = 16;
    /// The low opcode bits are a register (REX.B extends it).
    pub const IN_OPCODE: u16 = 32;
    /// ModRM names registers whatever its mod field says.
    pub const REGISTERS: u16 = 64;
    /// Operand size is at most 32 bits.
    pub const PORT: u16 = 128;
    /// Looked up in `sse` or `x87`.
    pub const ROW: u16 = 256;
}

const fn none(_: &Insn) -> Option<Pick> {
    None
}

impl Entry {
    /// An invalid opcode.
    pub const UNDEFINED: Entry = Entry { flags: 0, immediate: Immediate::None, pick: none };
    /// Something of `sse` or `x87` with a ModRM byte.
    pub const ROW: Entry = Entry { flags: flag::MODRM | flag::ROW, immediate: Immediate::None, pick: none };

    /// An opcode.
    pub const fn new(flags: u16, immediate: Immediate, pick: fn(&Insn) -> Option<Pick>) -> Self {
        Self { flags, immediate, pick }
    }
}
