//! The timer of a local APIC: one-shot, periodic, TSC-deadline (APM2 16.4.1). Its clock is the TSC, divided.
//!
//! What is kept are instants, never a running counter: the count is computed when it is read, so that the state does not
//! depend on how often anyone looked.

use proto::v1::LapicTimerV1;

use crate::device::{Unfit, narrow};

/// LVT timer bits 18:17.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Fires once when the count reaches zero.
    OneShot,
    /// Starts again from the initial count.
    Periodic,
    /// Fires when the TSC reaches the TSC_DEADLINE MSR.
    Deadline,
    /// Reserved; never fires.
    Reserved,
}

impl Mode {
    /// The mode that an LVT timer entry selects.
    pub fn of(lvt: u32) -> Mode {
        match lvt >> 17 & 3 {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            2 => Mode::Deadline,
            _ => Mode::Reserved,
        }
    }
}

/// Count, divider and next expiry.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Timer {
    /// Divide configuration register.
    pub divide: u32,
    /// Initial count register.
    pub initial: u32,
    count: u32,
    start: u64,
    deadline: Option<u64>,
}

impl Timer {
    /// log2 of the divisor.
    fn shift(&self) -> u32 {
        ((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7
    }

    /// When it fires next.
    #[inline]
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Current count register.
    pub fn current(&self, tsc: u64) -> u32 {
        let elapsed = tsc.saturating_sub(self.start) >> self.shift();
        u64::from(self.count).saturating_sub(elapsed) as u32
    }

    /// A write of the initial count: 0 stops the timer.
    pub fn set_initial(&mut self, tsc: u64, value: u32) {
        self.initial = value;
        self.load(tsc, value);
    }

    fn load(&mut self, tsc: u64, count: u32) {
        self.count = count;
        self.start = tsc;
        self.deadline = (count != 0).then(|| tsc.saturating_add(u64::from(count) << self.shift()));
    }

    /// A write of the divide configuration: counting goes on from the present count.
    pub fn set_divide(&mut self, tsc: u64, value: u32, mode: Mode) {
        let count = self.current(tsc);
        self.divide = value & 0xb;
        if mode != Mode::Deadline {
            self.load(tsc, count);
        }
    }

    /// A change between counting and deadline stops the timer.
    pub fn disarm(&mut self) {
        (self.count, self.start, self.deadline) = (0, 0, None);
    }

    /// A write of TSC_DEADLINE: 0 disarms.
    pub fn arm(&mut self, tsc: u64) {
        self.deadline = (tsc != 0).then_some(tsc);
    }

    /// True if it fires now; then the next period has begun.
    pub fn expire(&mut self, tsc: u64, mode: Mode) -> bool {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= tsc) else { return false };
        self.deadline = None;
        match mode {
            Mode::Periodic if self.initial != 0 => {
                let period = u64::from(self.initial) << self.shift();
                let missed = (tsc - deadline) / period;
                self.load(deadline + missed * period, self.initial);
            }
            _ => (self.count, self.start) = (0, 0),
        }
        true
    }

    pub(super) fn save(&self) -> LapicTimerV1 {
        let Timer { divide, initial, count, start, deadline } = self.clone();
        LapicTimerV1 { divide, initial, count, start, deadline }
    }

    pub(super) fn restore(saved: Option<&LapicTimerV1>, mode: Mode) -> Result<Timer, Unfit> {
        let saved = saved.ok_or(Unfit::new("timer", "nothing", "must be there"))?;
        let LapicTimerV1 { divide, initial, count, start, deadline } = *saved;
        Unfit::check(divide & !0xb == 0, "timer.divide", divide, "bits 0, 1, 3")?;
        let timer = Timer { divide, initial: narrow("timer.initial", initial)?, count, start, deadline };
        if mode == Mode::Deadline {
            Unfit::check(count == 0 && start == 0, "timer.count", count, "0 in deadline mode")?;
            Unfit::check(deadline != Some(0), "timer.deadline", deadline, "absent or not 0")?;
        } else {
            let due = start.checked_add(u64::from(count) << timer.shift());
            let fits = if count == 0 { deadline.is_none() } else { due.is_some() && deadline == due };
            Unfit::check(fits, "timer.deadline", deadline, "when the count ends")?;
        }
        Ok(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divider_is_the_register_of_the_manual() {
        let divisors = [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)];
        for (divide, divisor) in divisors {
            let mut timer = Timer { divide, ..Timer::default() };
            timer.set_initial(100, 10);
            assert_eq!(timer.deadline(), Some(100 + 10 * divisor), "{divide}");
            assert_eq!(timer.current(100 + 3 * divisor), 7);
        }
    }

    #[test]
    fn a_period_never_drifts_however_late_the_tick() {
        let mut timer = Timer { divide: 11, ..Timer::default() };
        timer.set_initial(0, 100);
        assert!(!timer.expire(99, Mode::Periodic));
        assert!(timer.expire(100, Mode::Periodic));
        assert_eq!(timer.deadline(), Some(200));
        assert!(timer.expire(555, Mode::Periodic));
        assert_eq!(timer.deadline(), Some(600));
        assert_eq!(timer.current(560), 40);
    }

    #[test]
    fn one_shot_fires_once() {
        let mut timer = Timer { divide: 11, ..Timer::default() };
        timer.set_initial(5, 10);
        assert!(timer.expire(15, Mode::OneShot));
        assert!(!timer.expire(1000, Mode::OneShot));
        assert_eq!(timer.current(1000), 0);
    }
}
