//! Dates: seconds since the Unix epoch as year, month, day, hour, minute, second, and back (proleptic Gregorian, UTC).
//! The arithmetic of days is in integers of 400-year eras.

/// A date and a time of day.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Civil {
    /// Full year.
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
    /// 1 is Sunday.
    pub weekday: u8,
}

impl Civil {
    /// The date of so many seconds after 1970 began.
    pub fn from_unix(seconds: i64) -> Civil {
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days since 0000-03-01, so that leap days come last.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Civil {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * shifted_month + 2) / 5 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    /// Seconds after 1970 began. A month beyond the year counts as its last; the other fields may overflow into the next.
    pub fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let shifted_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * shifted_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let cases = [
            (0, (1970, 1, 1, 0, 0, 0, 5)),
            (951_782_400, (2000, 2, 29, 0, 0, 0, 3)),
            (1_700_000_000, (2023, 11, 14, 22, 13, 20, 3)),
            (4_107_542_399, (2100, 2, 28, 23, 59, 59, 1)),
            (-1, (1969, 12, 31, 23, 59, 59, 4)),
        ];
        for (seconds, (year, month, day, hour, minute, second, weekday)) in cases {
            let date = Civil { year, month, day, hour, minute, second, weekday };
            assert_eq!(Civil::from_unix(seconds), date);
            assert_eq!(date.to_unix(), seconds);
        }
    }

    #[test]
    fn every_day_of_eight_centuries_survives() {
        for day in -146_097..146_097 {
            let seconds = day * 86_400 + 12_345;
            assert_eq!(Civil::from_unix(seconds).to_unix(), seconds);
        }
    }
}
