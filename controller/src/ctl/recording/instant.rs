//! Instants as people write them: `2026-11-23T12:03:55.250Z`, `12:03:55.250` (the last one, by the local clock), `-30s` (ago).
//!
//! What a text means depends on the clock alone, which is an argument here.

use std::time::Duration;

use jiff::civil::Time;
use jiff::{Timestamp, ToSpan as _, Zoned};

use crate::ctl::failure::Failure;
use crate::ctl::units;

/// A text that names an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// With date and zone.
    At(Timestamp),
    /// A time of the day: the last one.
    Clock(Time),
    /// Before now.
    Ago(Duration),
}

/// Reads it.
///
/// # Errors
/// What would be right.
pub fn when(text: &str) -> Result<When, String> {
    let wrong = || format!("{text:?} is no instant; write 2026-11-23T12:03:55.250Z, 12:03:55.250 or -30s");
    if let Some(ago) = text.strip_prefix('-') {
        return units::duration(ago).map(When::Ago).map_err(|error| error.to_string());
    }
    if text.contains(['T', 't', ' ']) {
        return text.parse().map(When::At).map_err(|_| wrong());
    }
    let clock = text.len() >= 5 && text.as_bytes()[2] == b':';
    text.parse().ok().filter(|_| clock).map(When::Clock).ok_or_else(wrong)
}

impl When {
    /// Unix nanoseconds.
    ///
    /// # Errors
    /// An instant that no clock has.
    pub fn unix_ns(&self, now: &Zoned) -> Result<u64, Failure> {
        let none = || Failure::bad_input("an instant before 1970, or too far away");
        let stamp = match self {
            When::At(stamp) => *stamp,
            When::Ago(ago) => now.timestamp().checked_sub(*ago).map_err(|_| none())?,
            When::Clock(time) => {
                let today = now.with().time(*time).build().map_err(|_| none())?;
                let last = if today > *now { today.checked_sub(1.day()).map_err(|_| none())? } else { today };
                last.timestamp()
            }
        };
        u64::try_from(stamp.as_nanosecond()).map_err(|_| none())
    }

    /// The same on this machine's clock.
    ///
    /// # Errors
    /// As [`When::unix_ns`].
    pub fn here(&self) -> Result<u64, Failure> {
        self.unix_ns(&Zoned::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_means_one_instant() {
        let now: Zoned = "2026-11-23T12:00:00[Europe/Berlin]".parse().unwrap();
        let at = |text: &str| {
            let ns = when(text).unwrap().unix_ns(&now).unwrap();
            Timestamp::from_nanosecond(ns.into()).unwrap().to_string()
        };
        assert_eq!(at("2026-11-23T12:03:55.250Z"), "2026-11-23T12:03:55.25Z");
        assert_eq!(at("2026-11-23T12:03:55+01:00"), "2026-11-23T11:03:55Z");
        assert_eq!(at("11:59:59.250"), "2026-11-23T10:59:59.25Z");
        assert_eq!(at("12:00"), "2026-11-23T11:00:00Z");
        assert_eq!(at("12:03:55"), "2026-11-22T11:03:55Z", "it was yesterday");
        assert_eq!(at("-30s"), "2026-11-23T10:59:30Z");
        assert_eq!(at("-1.5s"), "2026-11-23T10:59:58.5Z");
    }

    #[test]
    fn what_could_mean_anything_is_refused() {
        for text in ["", "now", "12", "1203", "30s", "-30", "25:00:00", "2026-11-23", "2026-11-23T12:03:55", "é:12:3"]
        {
            assert!(when(text).is_err(), "{text:?}");
        }
        let now: Zoned = "1970-01-01T00:00:10[UTC]".parse().unwrap();
        assert!(when("-30s").unwrap().unix_ns(&now).is_err());
    }
}
