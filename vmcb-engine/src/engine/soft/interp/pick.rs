//! Choosing the handler of an instruction: what every family's `pick` function returns, and the two macros that turn
//! a run-time width and place into type parameters.

use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::decode::Row;
use crate::engine::soft::op::{self, Handler, Meaning, Op};

/// A handler, and whether its instruction ends the block.
#[derive(Clone, Copy)]
pub struct Pick {
    /// Runs it.
    pub run: Handler,
    /// Nothing follows it in its block.
    pub ends: bool,
}

/// An instruction that another may follow.
pub fn straight<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::straight(f), ends: false })
}

/// An instruction that ends its block.
pub fn last<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::last(f), ends: true })
}

/// A near branch.
pub fn branch<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::branch(f), ends: true })
}

/// The handler of an SSE or x87 row.
pub fn row(row: Row) -> Option<Pick> {
    Some(Pick { run: row.run, ends: false })
}

/// Raises #UD: bytes that are no instruction.
pub fn undefined(core: &mut Core, _: &Op) -> Step {
    core.undefined()
}

/// Raises #GP(0): an instruction longer than 15 bytes (APM3 1.1).
pub fn too_long(core: &mut Core, _: &Op) -> Step {
    core.general_protection()
}

/// Evaluates with `$W` as the type of a width of 1, 2, 4 or 8 bytes.
macro_rules! by_size {
    ($size:expr, $W:ident => $e:expr) => {
        match $size {
            1 => {
                type $W = u8;
                $e
            }
            2 => {
                type $W = u16;
                $e
            }
            4 => {
                type $W = u32;
                $e
            }
            _ => {
                type $W = u64;
                $e
            }
        }
    };
}

/// Evaluates with `$W` as the type of a width of 2, 4 or 8 bytes.
macro_rules! by_wide {
    ($size:expr, $W:ident => $e:expr) => {
        match $size {
            2 => {
                type $W = u16;
                $e
            }
            4 => {
                type $W = u32;
                $e
            }
            _ => {
                type $W = u64;
                $e
            }
        }
    };
}

/// Evaluates with `$P` as the place of the r/m operand.
macro_rules! by_place {
    ($insn:expr, $P:ident => $e:expr) => {
        match $insn.place() {
            $crate::engine::soft::decode::PlaceKind::Register => {
                type $P = $crate::engine::soft::interp::operand::Register;
                $e
            }
            $crate::engine::soft::decode::PlaceKind::Near => {
                type $P = $crate::engine::soft::interp::operand::Near;
                $e
            }
            $crate::engine::soft::decode::PlaceKind::Any => {
                type $P = $crate::engine::soft::interp::operand::Any;
                $e
            }
        }
    };
}

/// Evaluates with `$P` as the place of an r/m operand that is memory.
macro_rules! by_memory {
    ($insn:expr, $P:ident => $e:expr) => {
        match $insn.place() {
            $crate::engine::soft::decode::PlaceKind::Near => {
                type $P = $crate::engine::soft::interp::operand::Near;
                $e
            }
            _ => {
                type $P = $crate::engine::soft::interp::operand::Any;
                $e
            }
        }
    };
}

/// Evaluates with `$CC` as a constant condition code.
macro_rules! by_condition {
    ($cc:expr, $CC:ident => $e:expr) => {
        by_condition!(@ $cc, $CC, $e, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $CC:ident, $e:expr, $($n:literal)*) => {
        match $cc & 15 {
            $($n => {
                const $CC: u8 = $n;
                $e
            })*
            _ => unreachable!("four bits"),
        }
    };
}

pub(super) use {by_condition, by_memory, by_place, by_size, by_wide};
