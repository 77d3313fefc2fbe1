//! Choosing the handler of an instruction: what every family's `pick` function returns, and the two macros that turn
//! a run-time width and place into type parameters.

use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::decode::Row;
use crate::engine::soft::op::{self, Handler, Meaning, Op, Target, Turn};

/// A handler, and how its instruction stands in its block.
#[derive(Clone, Copy)]
pub struct Pick {
    /// Runs it.
    pub run: Handler,
    /// What may follow.
    pub place: Standing,
}

/// How an instruction stands in its block.
#[derive(Clone, Copy)]
pub enum Standing {
    /// Another may follow.
    Inside,
    /// Nothing follows it in its block.
    Last,
    /// As `Last`, and it is linked to the blocks that follow; the handler is the one for when both lie in its page.
    Linked(Handler),
    /// As `Last`, and the block that follows it is one that something returns to.
    Returned,
}

/// An instruction that another may follow.
pub fn straight<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::straight(f), place: Standing::Inside })
}

/// An instruction that another may follow: `f` if the TLB has what it asks for, else `g`, which is the same.
pub fn quick<F: Meaning, G: Meaning>(f: F, g: G) -> Option<Pick> {
    Some(Pick { run: op::quick(f, g), place: Standing::Inside })
}

/// An instruction that ends its block.
pub fn last<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::last(f), place: Standing::Last })
}

/// A near branch.
pub fn branch<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::branch(f), place: Standing::Last })
}

/// A relative near branch of 64-bit mode.
pub fn turn<F: Turn>(f: F) -> Option<Pick> {
    Some(Pick { run: op::turn::<F, false>(f), place: Standing::Linked(op::turn::<F, true>(f)) })
}

/// A relative near branch of 64-bit mode that stores: `f` if the TLB has the page, else `g`, which is the same.
pub fn quick_turn<F: Turn, G: Turn>(f: F, g: G) -> Option<Pick> {
    let near = op::quick_turn::<F, G, true>(f, g);
    Some(Pick { run: op::quick_turn::<F, G, false>(f, g), place: Standing::Linked(near) })
}

/// An indirect near call of 64-bit mode: its links know what follows it.
pub fn calling<F: Meaning>(f: F) -> Option<Pick> {
    Some(Pick { run: op::branch(f), place: Standing::Returned })
}

/// A near return of 64-bit mode: `f` finds where to, if the TLB has the page and it is canonical; `g` is all of it.
pub fn returning<F: Target, G: Meaning>(f: F, g: G) -> Option<Pick> {
    Some(Pick { run: op::returning(f, g), place: Standing::Last })
}

/// The handler of an SSE or x87 row.
pub fn row(row: Row) -> Option<Pick> {
    Some(Pick { run: row.run, place: Standing::Inside })
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

/// The handler of a meaning that is generic over the place `$P`; for the families that run most.
macro_rules! placed {
    ($insn:expr, $P:ident => $f:expr) => {
        match $insn.place() {
            $crate::engine::soft::decode::PlaceKind::Register => {
                type $P = $crate::engine::soft::interp::operand::Register;
                $crate::engine::soft::interp::pick::straight($f)
            }
            $crate::engine::soft::decode::PlaceKind::Near => {
                $crate::engine::soft::interp::pick::placed!(@ Near, $P => $f)
            }
            $crate::engine::soft::decode::PlaceKind::Wide => {
                $crate::engine::soft::interp::pick::placed!(@ Wide, $P => $f)
            }
            $crate::engine::soft::decode::PlaceKind::Any => {
                type $P = $crate::engine::soft::interp::operand::Any;
                $crate::engine::soft::interp::pick::straight($f)
            }
        }
    };
    (@ $place:ident, $P:ident => $f:expr) => {
        $crate::engine::soft::interp::pick::quick(
            {
                type $P = $crate::engine::soft::interp::operand::Quick<
                    $crate::engine::soft::interp::operand::$place,
                >;
                $f
            },
            {
                // Takes in the near ones: what is slow anyhow need not be there twice.
                type $P = $crate::engine::soft::interp::operand::Wide;
                $f
            },
        )
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
            $crate::engine::soft::decode::PlaceKind::Wide | $crate::engine::soft::decode::PlaceKind::Any => {
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

pub(super) use {by_condition, by_memory, by_place, by_size, by_wide, placed};
