//! SSE, SSE2, SSE3, SSSE3, SSE4.1, SSE4.2 and MMX (APM4, APM5): from a selector to the function that does it.
//!
//! Files: [`native`] does the arithmetic by the host, [`operand`] fetches and checks, [`moves`], [`shuffle`], [`convert`],
//! [`strings`] and [`state`] hold what is more than arithmetic, [`approximate`] what hosts do not agree on.

mod approximate;
mod convert;
mod float;
mod moves;
mod native;
mod operand;
mod packed;
mod shuffle;
mod state;
mod strings;

pub use operand::{mmx_ready, sse_ready};

use super::decode::{Row, Selector};
use super::op::{Meaning, straight};

/// A row without an immediate.
fn row(meaning: impl Meaning) -> Option<Row> {
    Some(Row { run: straight(meaning), immediate: false })
}

/// A row with an 8-bit immediate.
fn row_immediate(meaning: impl Meaning) -> Option<Row> {
    Some(Row { run: straight(meaning), immediate: true })
}

/// The instruction that a selector names, if this processor has it.
pub fn lookup(selector: Selector) -> Option<Row> {
    packed::lookup(selector)
        .or_else(|| float::lookup(selector))
        .or_else(|| moves::lookup(selector))
        .or_else(|| shuffle::lookup(selector))
        .or_else(|| convert::lookup(selector))
        .or_else(|| strings::lookup(selector))
        .or_else(|| state::lookup(selector))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every selector can be asked for (each row is instantiated here), and the tables are not empty.
    #[test]
    fn every_row_is_reachable() {
        let mut rows = 0;
        for map in 1..=3 {
            for opcode in 0..=255 {
                for prefix in [0, 0x66, 0xf3, 0xf2] {
                    for form in 0..32 {
                        let selector = Selector {
                            map,
                            opcode,
                            prefix,
                            reg: form >> 2,
                            memory: form & 1 != 0,
                            wide: form & 2 != 0,
                        };
                        rows += usize::from(lookup(selector).is_some());
                    }
                }
            }
        }
        assert!(rows > 8000, "{rows}");
    }
}
