//! Sizes and times as people write them: `512M`, `1.5G`, `30ms`, `5m`.
//!
//! Units of size are powers of 1024 (`K`, `M`, `G`, `T`, each also as `KiB` ...), because guest RAM and pages are. `KB` is
//! refused, since half of the world reads it as 1000. Parsing is exact: what is not a whole number of bytes or
//! nanoseconds is refused, never rounded. Knows no flag and no message.

use std::time::Duration;

/// Why a text is not a size or a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// There is no number in front.
    #[error("{0:?} does not begin with a number; write for example {1}")]
    Number(String, &'static str),
    /// There is a number only, and it could mean anything.
    #[error("{0:?} has no unit; write for example {1}")]
    NoUnit(String, &'static str),
    /// The unit is none of ours.
    #[error("{unit:?} in {text:?} is no unit; known are {known}")]
    Unit {
        /// All that was given.
        text: String,
        /// Its unit.
        unit: String,
        /// What would be right.
        known: &'static str,
    },
    /// A fraction of the smallest unit.
    #[error("{0:?} is not a whole number of {1}")]
    Fraction(String, &'static str),
    /// Does not fit into 64 bits.
    #[error("{0:?} is too large")]
    Large(String),
}

const SIZE_UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KiB", 1 << 10),
    ("M", 1 << 20),
    ("MiB", 1 << 20),
    ("G", 1 << 30),
    ("GiB", 1 << 30),
    ("T", 1 << 40),
    ("TiB", 1 << 40),
];

const TIME_UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// Bytes of a text such as `512M`.
///
/// # Errors
/// Any [`UnitError`].
pub fn size(text: &str) -> Result<u64, UnitError> {
    quantity(text, SIZE_UNITS, "512M", "bytes", "B, K, M, G and T (powers of 1024), each also as KiB, MiB, ...")
}

/// A span of time such as `30ms`. The unit must be given.
///
/// # Errors
/// Any [`UnitError`].
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    quantity(text, TIME_UNITS, "30ms", "nanoseconds", "ns, us, ms, s, m, h and d").map(Duration::from_nanos)
}

/// Number times unit, without rounding.
fn quantity(
    text: &str,
    units: &[(&str, u64)],
    example: &'static str,
    smallest: &'static str,
    known: &'static str,
) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let unit = unit.trim_start();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
        return Err(UnitError::Number(text.into(), example));
    }
    let large = || UnitError::Large(text.into());
    if unit.is_empty() && units.iter().all(|(name, _)| !name.is_empty()) {
        return Err(UnitError::NoUnit(text.into(), example));
    }
    let factor = units.iter().find(|(name, _)| *name == unit || name.eq_ignore_ascii_case(unit) && unit.len() == 1);
    let (_, factor) = factor.ok_or_else(|| UnitError::Unit { text: text.into(), unit: unit.into(), known })?;
    let whole: u64 = whole.parse().map_err(|_| large())?;
    let whole = whole.checked_mul(*factor).ok_or_else(large)?;
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > 18 {
        return Err(UnitError::Fraction(text.into(), smallest));
    }
    let scale = 10u128.pow(fraction.len() as u32);
    let numerator = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().map_err(|_| large())? };
    let part = numerator * u128::from(*factor);
    if part % scale != 0 {
        return Err(UnitError::Fraction(text.into(), smallest));
    }
    let part = u64::try_from(part / scale).map_err(|_| large())?;
    whole.checked_add(part).ok_or_else(large)
}

/// Bytes for people: `1.5 GiB`, `17 B`.
pub fn show_bytes(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" || value.fract() == 0.0 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// Milliseconds for people: `85 us`, `12.3 ms`, `4.20 s`, `3m 20s`, `2h 5m`.
pub fn show_ms(ms: f64) -> String {
    match ms {
        ms if ms < 1.0 => format!("{:.0} us", ms * 1000.0),
        ms if ms < 1000.0 => format!("{ms:.1} ms"),
        ms if ms < 120_000.0 => format!("{:.2} s", ms / 1000.0),
        ms if ms < 7_200_000.0 => format!("{}m {}s", (ms / 60_000.0) as u64, (ms / 1000.0) as u64 % 60),
        ms => format!("{}h {}m", (ms / 3_600_000.0) as u64, (ms / 60_000.0) as u64 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_the_manual_shows_is_understood() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("1G"), Ok(1 << 30));
        assert_eq!(size("1.5g"), Ok(3 << 29));
        assert_eq!(size("64 KiB"), Ok(64 << 10));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(duration("30ms"), Ok(Duration::from_millis(30)));
        assert_eq!(duration("0.5s"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
    }

    #[test]
    fn what_is_doubtful_is_refused_with_the_reason() {
        assert!(matches!(size("1GB"), Err(UnitError::Unit { .. })));
        assert!(matches!(size("G"), Err(UnitError::Number(..))));
        assert!(matches!(size("1."), Err(UnitError::Number(..))));
        assert!(matches!(size("1.2.3M"), Err(UnitError::Number(..))));
        assert!(matches!(size("-1"), Err(UnitError::Number(..))));
        assert!(matches!(size("0.3K"), Err(UnitError::Fraction(..))));
        assert!(matches!(size("99999999T"), Err(UnitError::Large(_))));
        assert!(matches!(size("99999999999999999999"), Err(UnitError::Large(_))));
        assert!(matches!(duration("30"), Err(UnitError::NoUnit(..))));
        assert!(matches!(duration("30 MS"), Err(UnitError::Unit { .. })));
        assert!(size("1GB").unwrap_err().to_string().contains("powers of 1024"));
    }

    #[test]
    fn people_read_three_digits() {
        assert_eq!(show_bytes(17), "17 B");
        assert_eq!(show_bytes(3 << 29), "1.5 GiB");
        assert_eq!(show_bytes(512 << 20), "512 MiB");
        assert_eq!(show_ms(0.085), "85 us");
        assert_eq!(show_ms(12.34), "12.3 ms");
        assert_eq!(show_ms(200_000.0), "3m 20s");
    }

    proptest! {
        #[test]
        fn every_whole_number_survives(number in 0..1u64 << 24, unit in 0..SIZE_UNITS.len()) {
            let (name, factor) = SIZE_UNITS[unit];
            let expected = number.checked_mul(factor).unwrap();
            prop_assert_eq!(size(&format!("{number}{name}")), Ok(expected));
            prop_assert_eq!(size(&format!(" {number} {name} ")), Ok(expected));
        }

        #[test]
        fn fractions_are_exact_or_refused(thousandths in 0..10_000_000u64, unit in 0..TIME_UNITS.len()) {
            let (name, factor) = TIME_UNITS[unit];
            let exact = u128::from(thousandths) * u128::from(factor);
            let found = duration(&format!("{}.{:03}{name}", thousandths / 1000, thousandths % 1000));
            if exact.is_multiple_of(1000) {
                prop_assert_eq!(found.map(|d| d.as_nanos()), Ok(exact / 1000));
            } else {
                prop_assert!(matches!(found, Err(UnitError::Fraction(..))), "{:?}", found);
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = size(&text);
            let _ = duration(&text);
        }

        #[test]
        fn numbers_with_odd_tails_never_panic(text in "[0-9.]{0,30}[a-zA-Z]{0,3}") {
            let _ = size(&text);
            let _ = duration(&text);
        }
    }
}
