//! Hours, days, weeks and months, and windows of the day, in a named time zone. Pure, but for the tables of zones.
//!
//! Zones are IANA's, by the host's tables where it has them and by those built in otherwise. An hour that a clock change
//! repeats counts twice, one that it skips not at all; a window that falls into a skipped hour does not open on that day.

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _, Zoned};
use proto::v1::DayWindow;

/// Minutes of a day.
pub const DAY_MINUTES: u32 = 24 * 60;
/// Days that are looked through for the next opening: a window can fall into a skipped hour once.
const DAYS_AHEAD: i64 = 3;

/// No such zone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no time zone; write for example Europe/Berlin or UTC")]
pub struct UnknownZone(String);

/// A time zone.
#[derive(Clone, Debug)]
pub struct Zone(TimeZone);

/// The periods that an instant falls into, as numbers that are equal within one period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Periods {
    /// Unix time of the hour's beginning.
    pub hour: i64,
    /// Days.
    pub day: i64,
    /// ISO weeks.
    pub week: i64,
    /// Months.
    pub month: i64,
}

impl Zone {
    /// Coordinated universal time.
    pub const UTC: Zone = Zone(TimeZone::UTC);

    /// By IANA's name; empty is UTC.
    ///
    /// # Errors
    /// [`UnknownZone`].
    pub fn named(name: &str) -> Result<Zone, UnknownZone> {
        if name.is_empty() || name == "UTC" {
            return Ok(Zone::UTC);
        }
        TimeZone::get(name).map(Zone).map_err(|_| UnknownZone(name.into()))
    }

    fn zoned(&self, unix_ms: i64) -> Zoned {
        let stamp = Timestamp::from_millisecond(unix_ms);
        // What no calendar reaches is as late as can be.
        stamp.unwrap_or(Timestamp::MAX).to_zoned(self.0.clone())
    }

    /// The periods of an instant.
    pub fn periods(&self, unix_ms: u64) -> Periods {
        let zoned = self.zoned(i64::try_from(unix_ms).unwrap_or(i64::MAX));
        let offset = i64::from(zoned.offset().seconds());
        let local = zoned.timestamp().as_second() + offset;
        let week = zoned.date().iso_week_date();
        Periods {
            hour: local.div_euclid(3600) * 3600 - offset,
            day: local.div_euclid(86_400),
            week: i64::from(week.year()) * 100 + i64::from(week.week()),
            month: i64::from(zoned.year()) * 12 + i64::from(zoned.month()),
        }
    }

    /// Whether a window is open at an instant; none at all means always.
    pub fn open(&self, windows: &[DayWindow], unix_ms: i64) -> bool {
        if windows.is_empty() {
            return true;
        }
        let zoned = self.zoned(unix_ms);
        let minute = zoned.hour() as u32 * 60 + zoned.minute() as u32;
        windows.iter().any(|window| within(window, minute))
    }

    /// The first instant from this one on at which a window is open.
    pub fn next_open(&self, windows: &[DayWindow], unix_ms: i64) -> i64 {
        if self.open(windows, unix_ms) {
            return unix_ms;
        }
        let today = self.zoned(unix_ms).date();
        let mut openings = Vec::new();
        for ahead in 0..DAYS_AHEAD {
            let Ok(day) = today.checked_add(ahead.days()) else { continue };
            for window in windows {
                let (hour, minute) = ((window.from_minute / 60) as i8, (window.from_minute % 60) as i8);
                let ambiguous = self.0.to_ambiguous_zoned(day.at(hour, minute, 0, 0));
                // An hour that comes twice opens the window twice.
                let both = [ambiguous.clone().earlier(), ambiguous.later()];
                openings.extend(both.into_iter().flatten().map(|zoned| zoned.timestamp().as_millisecond()));
            }
        }
        let ahead = openings.into_iter().filter(|at| *at > unix_ms && self.open(windows, *at));
        // Windows that are skipped for days do not exist; should they, an hour later is looked again.
        ahead.min().unwrap_or(unix_ms.saturating_add(3_600_000))
    }
}

fn within(window: &DayWindow, minute: u32) -> bool {
    let DayWindow { from_minute: from, to_minute: to } = *window;
    if from <= to { (from..to).contains(&minute) } else { minute >= from || minute < to }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_millisecond()
    }

    fn night() -> Vec<DayWindow> {
        vec![DayWindow { from_minute: 22 * 60, to_minute: 6 * 60 }]
    }

    #[test]
    fn a_window_over_midnight_is_open_at_night() {
        let (zone, night) = (Zone::UTC, night());
        assert!(zone.open(&night, at("2026-03-01T23:00:00Z")) && zone.open(&night, at("2026-03-01T05:59:59Z")));
        assert!(!zone.open(&night, at("2026-03-01T06:00:00Z")) && !zone.open(&night, at("2026-03-01T21:59:59Z")));
        assert_eq!(zone.next_open(&night, at("2026-03-01T06:00:00Z")), at("2026-03-01T22:00:00Z"));
        assert_eq!(zone.next_open(&night, at("2026-03-01T23:00:00Z")), at("2026-03-01T23:00:00Z"));
        assert!(zone.open(&[], 0));
    }

    #[test]
    fn windows_follow_the_clock_of_their_zone() {
        let berlin = Zone::named("Europe/Berlin").unwrap();
        assert!(berlin.open(&night(), at("2026-07-01T20:00:00Z")), "22:00 in summer");
        assert!(!berlin.open(&night(), at("2026-01-01T20:59:00Z")), "21:59 in winter");
        assert!(Zone::named("Mars/Olympus").is_err());
    }

    #[test]
    fn a_window_in_a_skipped_hour_opens_the_next_day_and_one_in_a_repeated_hour_twice() {
        let berlin = Zone::named("Europe/Berlin").unwrap();
        let window = [DayWindow { from_minute: 150, to_minute: 165 }];
        // 2026-03-29: 02:00 to 03:00 does not exist.
        assert_eq!(berlin.next_open(&window, at("2026-03-28T12:00:00Z")), at("2026-03-30T00:30:00Z"));
        // 2026-10-25: 02:00 to 03:00 comes twice.
        assert_eq!(berlin.next_open(&window, at("2026-10-24T12:00:00Z")), at("2026-10-25T00:30:00Z"));
        assert_eq!(berlin.next_open(&window, at("2026-10-25T00:50:00Z")), at("2026-10-25T01:30:00Z"));
    }

    #[test]
    fn periods_are_those_of_the_zone_and_iso() {
        let berlin = Zone::named("Europe/Berlin").unwrap();
        let periods = |text: &str| berlin.periods(at(text) as u64);
        let (late, early) = (periods("2026-01-31T22:59:00Z"), periods("2026-01-31T23:00:00Z"));
        assert_ne!((late.day, late.month), (early.day, early.month), "midnight in Berlin");
        assert_eq!(late.week, early.week, "a Saturday and a Sunday");
        assert_eq!(periods("2026-12-31T12:00:00Z").week, periods("2027-01-03T12:00:00Z").week, "ISO week 53");
        let repeated = [periods("2026-10-25T00:30:00Z"), periods("2026-10-25T01:30:00Z")];
        assert_ne!(repeated[0].hour, repeated[1].hour);
        assert_eq!(repeated[0].day, repeated[1].day);
        // Nothing panics at the end of time.
        berlin.periods(u64::MAX);
        berlin.next_open(&night(), i64::MAX - 5);
    }
}
