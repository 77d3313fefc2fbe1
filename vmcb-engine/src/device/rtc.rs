//! The CMOS clock (MC146818): date and time, and battery-backed bytes. It counts from the machine's own date, which is
//! an argument; what the guest sets is kept as an offset. It never interrupts.

use super::civil::Civil;
use super::{Unfit, nanoseconds, narrow};

const CMOS_BYTES: usize = 128;
const CMOS_FIRST: usize = 14;
const CENTURY: u8 = 0x32;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const B_SET: u8 = 1 << 7;

/// What the machine's date is made of; fixed for its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Epoch {
    /// Unix nanoseconds at TSC 0.
    pub epoch_ns: u64,
    /// TSC ticks per second.
    pub tsc_hz: u64,
}

impl Epoch {
    /// Unix seconds now.
    pub fn unix_s(&self, tsc: u64) -> i64 {
        ((u128::from(self.epoch_ns) + u128::from(nanoseconds(tsc, self.tsc_hz))) / 1_000_000_000) as i64
    }
}

/// The clock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rtc {
    epoch: Epoch,
    index: u8,
    register_a: u8,
    register_b: u8,
    offset_s: i64,
    staged: Option<Civil>,
    cmos: [u8; CMOS_BYTES],
}

impl Rtc {
    /// A clock that shows the machine's date.
    pub fn new(epoch: Epoch) -> Self {
        let (register_a, register_b) = (0x26, B_24_HOURS);
        Self { epoch, index: 0, register_a, register_b, offset_s: 0, staged: None, cmos: [0; CMOS_BYTES] }
    }

    /// What its date is made of.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Writes the index register (port 0); bit 7 was the NMI gate and is ignored.
    pub fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    fn date(&self, tsc: u64) -> Civil {
        self.staged.unwrap_or_else(|| Civil::from_unix(self.epoch.unix_s(tsc).saturating_add(self.offset_s)))
    }

    /// Reads the selected register (port 1).
    pub fn read(&self, tsc: u64) -> u8 {
        let date = self.date(tsc);
        match self.index {
            0 => self.encode(date.second),
            2 => self.encode(date.minute),
            4 => self.encode_hour(date.hour),
            6 => self.encode(date.weekday),
            7 => self.encode(date.day),
            8 => self.encode(date.month),
            9 => self.encode(date.year.rem_euclid(100) as u8),
            CENTURY => self.encode(date.year.div_euclid(100).rem_euclid(100) as u8),
            // Update in progress never shows: reading is between two instructions.
            10 => self.register_a,
            11 => self.register_b,
            12 => 0,
            13 => 0x80,
            index => self.cmos[usize::from(index)],
        }
    }

    /// Writes the selected register (port 1).
    pub fn write(&mut self, tsc: u64, value: u8) {
        let mut date = self.date(tsc);
        match self.index {
            0 => date.second = self.decode(value).min(59),
            2 => date.minute = self.decode(value).min(59),
            4 => date.hour = self.decode_hour(value).min(23),
            6 => date.weekday = self.decode(value).clamp(1, 7),
            7 => date.day = self.decode(value).clamp(1, 31),
            8 => date.month = self.decode(value).clamp(1, 12),
            9 => date.year = date.year.div_euclid(100) * 100 + i64::from(self.decode(value).min(99)),
            CENTURY => date.year = date.year.rem_euclid(100) + i64::from(self.decode(value).min(99)) * 100,
            10 => return self.register_a = value & 0x7f,
            11 => return self.write_b(tsc, value),
            12 | 13 => return,
            index => return self.cmos[usize::from(index)] = value,
        }
        if self.staged.is_some() {
            self.staged = Some(date);
        } else {
            self.set(tsc, date);
        }
    }

    fn write_b(&mut self, tsc: u64, value: u8) {
        let date = self.date(tsc);
        self.register_b = value;
        match (value & B_SET != 0, self.staged) {
            (true, None) => self.staged = Some(date),
            (false, Some(staged)) => {
                self.staged = None;
                self.set(tsc, staged);
            }
            _ => {}
        }
    }

    fn set(&mut self, tsc: u64, date: Civil) {
        self.offset_s = date.to_unix() - self.epoch.unix_s(tsc);
    }

    fn encode(&self, value: u8) -> u8 {
        if self.register_b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.register_b & B_BINARY != 0 { value } else { (value >> 4).saturating_mul(10) + (value & 15) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.register_b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.register_b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let noon = if value & 0x80 != 0 { 12 } else { 0 };
        self.decode(value & 0x7f) % 12 + noon
    }
}

mod saved {
    use proto::v1::RtcV1;

    use super::*;

    /// Beyond it no sane guest sets its clock, and sums stay far from overflow.
    const OFFSET_S_MAX: i64 = 1 << 40;

    impl Rtc {
        /// The saved form.
        pub fn save(&self) -> RtcV1 {
            // The epoch is configuration.
            let Rtc { epoch: _, index, register_a, register_b, offset_s, staged, cmos } = self;
            let staged = staged.map_or(Vec::new(), |date| {
                let Civil { year, month, day, hour, minute, second, weekday } = date;
                vec![
                    second.into(),
                    minute.into(),
                    hour.into(),
                    weekday.into(),
                    day.into(),
                    month.into(),
                    year.clamp(0, 9999) as u32,
                ]
            });
            RtcV1 {
                index: (*index).into(),
                register_a: (*register_a).into(),
                register_b: (*register_b).into(),
                offset_s: *offset_s,
                staged,
                cmos: cmos.to_vec(),
            }
        }

        /// The clock in a saved state.
        ///
        /// # Errors
        /// A field that no clock could hold.
        pub fn restore(epoch: Epoch, saved: &RtcV1) -> Result<Rtc, Unfit> {
            let index = narrow("index", saved.index)?;
            Unfit::check(index < 0x80, "index", index, "seven bits")?;
            let register_a = narrow("register_a", saved.register_a)?;
            Unfit::check(register_a < 0x80, "register_a", register_a, "seven bits")?;
            let register_b = narrow("register_b", saved.register_b)?;
            let far = saved.offset_s.unsigned_abs() > OFFSET_S_MAX as u64;
            Unfit::check(!far, "offset_s", saved.offset_s, "within 2^40 seconds")?;
            let staged = staged(&saved.staged)?;
            Unfit::check(staged.is_some() == (register_b & B_SET != 0), "staged", &saved.staged, "there while SET")?;
            let cmos = saved.cmos.as_slice().try_into();
            let cmos: [u8; CMOS_BYTES] = cmos.map_err(|_| Unfit::new("cmos", saved.cmos.len(), "128 bytes"))?;
            let clock = (0..CMOS_FIRST).filter(|at| ![1, 3, 5].contains(at)).chain([usize::from(CENTURY)]);
            Unfit::check(clock.into_iter().all(|at| cmos[at] == 0), "cmos", &cmos[..CMOS_FIRST], "zero in the clock")?;
            Ok(Rtc { epoch, index, register_a, register_b, offset_s: saved.offset_s, staged, cmos })
        }
    }

    fn staged(fields: &[u32]) -> Result<Option<Civil>, Unfit> {
        if fields.is_empty() {
            return Ok(None);
        }
        let unfit = || Unfit::new("staged", fields, "seven fields of a date");
        let &[second, minute, hour, weekday, day, month, year] = fields else { return Err(unfit()) };
        let fits = second < 60
            && minute < 60
            && hour < 24
            && (1..=7).contains(&weekday)
            && (1..=31).contains(&day)
            && (1..=12).contains(&month)
            && year <= 9999;
        if !fits {
            return Err(unfit());
        }
        Ok(Some(Civil {
            year: year.into(),
            month: month as u8,
            day: day as u8,
            hour: hour as u8,
            minute: minute as u8,
            second: second as u8,
            weekday: weekday as u8,
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EPOCH: Epoch = Epoch { epoch_ns: 1_700_000_000_000_000_000, tsc_hz: 1_000_000_000 };

    fn read(rtc: &mut Rtc, tsc: u64, index: u8) -> u8 {
        rtc.select(index);
        rtc.read(tsc)
    }

    fn write(rtc: &mut Rtc, tsc: u64, index: u8, value: u8) {
        rtc.select(index);
        rtc.write(tsc, value);
    }

    #[test]
    fn it_shows_the_machines_date() {
        let mut rtc = Rtc::new(EPOCH);
        let tsc = 45 * 1_000_000_000;
        let shown = [9, 8, 7, 4, 2, 0, 0x32].map(|index| read(&mut rtc, tsc, index));
        assert_eq!(shown, [0x23, 0x11, 0x14, 0x22, 0x14, 0x05, 0x20]);
        assert_eq!((read(&mut rtc, tsc, 10), read(&mut rtc, tsc, 13)), (0x26, 0x80));
        write(&mut rtc, tsc, 11, 0x04);
        assert_eq!(read(&mut rtc, tsc, 4), 0x8a, "10 in the evening, binary, 12 hours");
    }

    #[test]
    fn a_guest_sets_it_and_it_goes_on() {
        let mut rtc = Rtc::new(EPOCH);
        write(&mut rtc, 0, 11, 0x82);
        for (index, value) in [(9, 0x30), (8, 0x02), (7, 0x28), (4, 0x23), (2, 0x59), (0, 0x58)] {
            write(&mut rtc, 0, index, value);
        }
        assert_eq!(read(&mut rtc, 9_000_000_000, 0), 0x58, "it stands while it is set");
        write(&mut rtc, 9_000_000_000, 11, 0x02);
        let shown = [9, 8, 7, 4, 2, 0].map(|index| read(&mut rtc, 12_000_000_000, index));
        assert_eq!(shown, [0x30, 0x03, 0x01, 0x00, 0x00, 0x01]);
    }

    proptest! {
        #[test]
        fn any_history_survives_saving(steps in proptest::collection::vec((any::<u8>(), any::<u8>()), 0..60)) {
            let mut rtc = Rtc::new(EPOCH);
            for (n, (index, value)) in steps.into_iter().enumerate() {
                write(&mut rtc, n as u64 * 700_000_000, index % 64, value);
            }
            prop_assert_eq!(Rtc::restore(EPOCH, &rtc.save()), Ok(rtc));
        }
    }

    #[test]
    fn hostile_saved_forms_are_refused_by_name() {
        let good = Rtc::new(EPOCH).save();
        let field = |saved| Rtc::restore(EPOCH, &saved).unwrap_err().field;
        assert_eq!(field(proto::v1::RtcV1 { index: 128, ..good.clone() }), "index");
        assert_eq!(field(proto::v1::RtcV1 { offset_s: i64::MIN, ..good.clone() }), "offset_s");
        assert_eq!(field(proto::v1::RtcV1 { cmos: vec![0; 127], ..good.clone() }), "cmos");
        assert_eq!(field(proto::v1::RtcV1 { cmos: vec![1; 128], ..good.clone() }), "cmos");
        assert_eq!(field(proto::v1::RtcV1 { register_b: 0x80, ..good.clone() }), "staged");
        let staged = vec![0, 0, 0, 1, 1, 13, 2000];
        assert_eq!(field(proto::v1::RtcV1 { register_b: 0x80, staged, ..good }), "staged");
    }
}
