//! Positions, wall clocks and instructions for people. It refuses to know what is asked of a recording.

use std::fmt::Write as _;

use vmcb_engine::journal::Position;
use vmcb_engine::machine::Machine;
use vmcb_engine::replay::{Said, Tape};

use super::symbols::Symbols;

/// Lines of console that are shown.
const LINES: usize = 40;

/// A time of the wall clock, in UTC.
pub fn clock(realtime_ns: u64) -> String {
    match jiff::Timestamp::from_nanosecond(realtime_ns.into()) {
        Ok(time) => format!("{time:.6}"),
        Err(_) => format!("{realtime_ns} ns since 1970"),
    }
}

/// A position and what time it was.
pub fn instant(tape: &Tape, position: Position) -> String {
    let tsc = tape.rate().tsc(position).unwrap_or(0);
    format!("{position}, {}", clock(tape.realtime_ns(tsc)))
}

/// Seconds since 1970 with decimals, or nanoseconds if it is too large for that: what people type.
pub fn parse_time(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let whole: u64 = whole.parse().ok()?;
    if part.len() > 9 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    if part.is_empty() && whole > 100_000_000_000 {
        return Some(whole);
    }
    let ns: u64 = format!("{part:0<9}").parse().ok()?;
    whole.checked_mul(1_000_000_000)?.checked_add(ns)
}

/// A number in decimal or, after `0x`, in hex.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The instruction that a vCPU executes next, in Intel's syntax.
pub fn disassembled(machine: &Machine, vcpu: usize) -> String {
    let Some((text, bytes)) = machine.next_instruction(vcpu) else {
        return "(no instruction can be read there)".to_owned();
    };
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{text}   ({})", hex.join(" "))
}

/// `rip 0x... <name>` of a vCPU.
pub fn place(machine: &Machine, vcpu: usize, symbols: Option<&Symbols>) -> String {
    let Some(state) = machine.peek_cpu(vcpu) else { return "nowhere".to_owned() };
    let name = symbols.and_then(|symbols| symbols.name(state.code_address()));
    format!("rip {:#x}{}", state.rip, name.map_or(String::new(), |name| format!(" <{name}>")))
}

/// Bytes as a hex dump of sixteen a line.
pub fn dump(address: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (line, bytes) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let shown: String =
            bytes.iter().map(|byte| if (32..127).contains(byte) { char::from(*byte) } else { '.' }).collect();
        let _infallible = writeln!(text, "{:#014x}: {:<47}  {shown}", address + 16 * line as u64, hex.join(" "));
    }
    text
}

/// A little-endian value of up to eight bytes, or the bytes.
pub fn value(bytes: &[u8]) -> String {
    if bytes.len() > 8 {
        return bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    }
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    format!("{:#x}", u64::from_le_bytes(word))
}

/// The last lines that the guest had said until an instant, without what a terminal would act upon.
pub fn console(said: &[Said], until: Position) -> String {
    let bytes: Vec<u8> =
        said.iter().take_while(|said| said.until <= until).flat_map(|said| &said.bytes).copied().collect();
    let text: String =
        String::from_utf8_lossy(&bytes).chars().filter(|c| matches!(c, '\n' | '\t') || !c.is_control()).collect();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(parse_time("1700000000"), Some(1_700_000_000_000_000_000));
        assert_eq!(parse_time("1700000000.25"), Some(1_700_000_000_250_000_000));
        assert_eq!(parse_time("1700000000250000000"), Some(1_700_000_000_250_000_000));
        for odd in ["", "x", "1.x", "-1", "1.0000000001", "99999999999999999999", "99999999999.5"] {
            assert_eq!(parse_time(odd), None, "{odd:?}");
        }
        assert_eq!(clock(1_700_000_000_250_000_000), "2023-11-14T22:13:20.250000Z");
    }

    #[test]
    fn a_terminal_is_not_driven_by_what_a_guest_said() {
        let at = |retired| Position { retired, skipped_tsc: 0 };
        let said = [
            Said { until: at(5), bytes: b"one\r\ntw\x1b[2Jo\n".to_vec() },
            Said { until: at(9), bytes: b"three\n".to_vec() },
        ];
        assert_eq!(console(&said, at(5)), "one\ntw[2Jo");
        assert_eq!(console(&said, at(20)), "one\ntw[2Jo\nthree");
    }
}
