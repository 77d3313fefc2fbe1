//! Fused pairs: a comparison (or another operation that only makes flags interesting) and the linked Jcc behind it run as
//! one handler, so that the condition follows from values that are still in host registers.
//!
//! Both operations stay in the block as they were: the first one's handler is all that changes, and a block that is cut
//! between them is decoded without it.

use super::alu::{self, Add, And, Cmp, Sub, Test};
use super::branch::jcc_linked;
use super::operand::{Near, Quick, Register};
use crate::engine::soft::core::ZERO;
use crate::engine::soft::op::{Handler, NO_SEGMENT, Op, form, fused, quick_fused};

/// The fused handler of `$f` and the Jcc of condition `$cc`, for the conditions that compilers use after it.
macro_rules! with_jcc {
    ($cc:expr, $f:expr, $($n:literal)*) => {
        match $cc & 15 {
            $($n => Some(fused($f, jcc_linked::<$n>)),)*
            _ => None,
        }
    };
    ($cc:expr, $f:expr, $slow:expr, $($n:literal)*) => {
        match $cc & 15 {
            $($n => Some(quick_fused($f, jcc_linked::<$n>, $slow)),)*
            _ => None,
        }
    };
}

macro_rules! compare {
    ($cc:expr, $($f:expr),*) => { with_jcc!($cc, $($f,)* 2 3 4 5 6 7 8 9 12 13 14 15) };
}

macro_rules! test {
    ($cc:expr, $($f:expr),*) => { with_jcc!($cc, $($f,)* 4 5 8 9 14 15) };
}

macro_rules! count {
    ($cc:expr, $f:expr) => { with_jcc!($cc, $f, 4 5 8 9) };
}

/// Evaluates with `$W` as the type of a width of 1, 4 or 8 bytes; 2 is rare.
macro_rules! by_common_size {
    ($size:expr, $W:ident => $e:expr) => {
        match $size {
            1 => {
                type $W = u8;
                $e
            }
            4 => {
                type $W = u32;
                $e
            }
            8 => {
                type $W = u64;
                $e
            }
            _ => None,
        }
    };
}

/// ModRM.reg of a group, as decode numbered it.
fn extension(op: &Op) -> u8 {
    (op.reg & 7) + (op.reg >> 5) * 4
}

/// The handler of `first` and the linked Jcc of condition `cc` after it, if the pair has one.
pub fn with_jcc(first: &Op, cc: u8) -> Option<Handler> {
    if first.has(form::LOCK) {
        return None;
    }
    if !first.is_memory() {
        return registers(first, cc);
    }
    if first.address_size != 8 || first.segment != NO_SEGMENT || first.index != ZERO {
        return None;
    }
    memory(first, cc)
}

fn registers(first: &Op, cc: u8) -> Option<Handler> {
    let size = first.size;
    match (first.code, extension(first)) {
        (0x38 | 0x39, _) => by_common_size!(size, W => compare!(cc, alu::rm_reg::<W, Cmp, Register>)),
        (0x3a | 0x3b, _) => by_common_size!(size, W => compare!(cc, alu::reg_rm::<W, Cmp, Register>)),
        (0x3c | 0x3d, _) => by_common_size!(size, W => compare!(cc, alu::rax_imm::<W, Cmp>)),
        (0x80 | 0x81 | 0x83, 7) => by_common_size!(size, W => compare!(cc, alu::rm_imm::<W, Cmp, Register>)),
        (0x84 | 0x85, _) => by_common_size!(size, W => test!(cc, alu::rm_reg::<W, Test, Register>)),
        (0xa8 | 0xa9, _) => by_common_size!(size, W => test!(cc, alu::rax_imm::<W, Test>)),
        (0xf6 | 0xf7, 0 | 1) => by_common_size!(size, W => test!(cc, alu::rm_imm::<W, Test, Register>)),
        (0x81 | 0x83, 4) => by_common_size!(size, W => count!(cc, alu::rm_imm::<W, And, Register>)),
        (0x81 | 0x83, 5) => by_common_size!(size, W => count!(cc, alu::rm_imm::<W, Sub, Register>)),
        (0x81 | 0x83, 0) => by_common_size!(size, W => count!(cc, alu::rm_imm::<W, Add, Register>)),
        (0xff, 1) => by_common_size!(size, W => count!(cc, alu::inc_dec::<W, Register, true>)),
        _ => None,
    }
}

fn memory(first: &Op, cc: u8) -> Option<Handler> {
    let size = first.size;
    match (first.code, extension(first)) {
        (0x39, _) => {
            by_common_size!(size, W => compare!(cc, alu::rm_reg::<W, Cmp, Quick<Near>>, alu::rm_reg::<W, Cmp, Near>))
        }
        (0x3a | 0x3b, _) => {
            by_common_size!(size, W => compare!(cc, alu::reg_rm::<W, Cmp, Quick<Near>>, alu::reg_rm::<W, Cmp, Near>))
        }
        (0x80 | 0x81 | 0x83, 7) => {
            by_common_size!(size, W => compare!(cc, alu::rm_imm::<W, Cmp, Quick<Near>>, alu::rm_imm::<W, Cmp, Near>))
        }
        (0xf6 | 0xf7, 0 | 1) => {
            by_common_size!(size, W => test!(cc, alu::rm_imm::<W, Test, Quick<Near>>, alu::rm_imm::<W, Test, Near>))
        }
        _ => None,
    }
}
