//! SSE, SSE2, SSE3, SSSE3, SSE4.1, SSE4.2 and MMX (APM4, APM5).

use super::decode::{Row, Selector};

/// The instruction that a selector names, if this processor has it.
pub fn lookup(selector: Selector) -> Option<Row> {
    let _ = selector;
    None
}
