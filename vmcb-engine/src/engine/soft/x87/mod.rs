//! x87 in 80 bits (APM5).

use super::decode::Row;

/// The instruction of an escape opcode (D8-DF) and its ModRM byte.
pub fn lookup(opcode: u8, modrm: u8) -> Option<Row> {
    let _ = (opcode, modrm);
    None
}
