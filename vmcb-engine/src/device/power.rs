//! Off and reset: the sleep control, sleep status and reset registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7).

use super::Unfit;

/// Sleep type of S5, as the DSDT's `_S5` says.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What the FADT tells the guest to write into the reset register.
pub const RESET_VALUE: u8 = 1;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Why the guest asked the machine to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// S5: soft off.
    PowerOff,
    /// Start again from nothing.
    Reset,
}

/// The registers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Power {
    sleep_control: u8,
    stopped: Option<Stop>,
}

impl Power {
    /// Sleep control register.
    pub fn sleep_control(&self) -> u8 {
        self.sleep_control
    }

    /// A write of the sleep control register.
    pub fn set_sleep_control(&mut self, value: u8) {
        // SLP_EN reads as zero.
        self.sleep_control = value & 0x1c;
        if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF {
            self.stopped = Some(Stop::PowerOff);
        }
    }

    /// A write of the reset register.
    pub fn reset(&mut self, value: u8) {
        if value == RESET_VALUE {
            self.stopped = Some(Stop::Reset);
        }
    }

    /// What the guest asked for, once it has.
    pub fn stopped(&self) -> Option<Stop> {
        self.stopped
    }
}

mod saved {
    use proto::v1::PowerV1;

    use super::*;

    impl Power {
        /// The saved form.
        pub fn save(&self) -> PowerV1 {
            let Power { sleep_control, stopped } = self;
            let stopped = match stopped {
                None => 0,
                Some(Stop::PowerOff) => 1,
                Some(Stop::Reset) => 2,
            };
            PowerV1 { sleep_control: (*sleep_control).into(), stopped }
        }

        /// The registers in a saved state.
        ///
        /// # Errors
        /// A field that they could not hold.
        pub fn restore(saved: &PowerV1) -> Result<Power, Unfit> {
            Unfit::check(saved.sleep_control & !0x1c == 0, "sleep_control", saved.sleep_control, "a sleep type")?;
            let stopped = match saved.stopped {
                0 => None,
                1 => Some(Stop::PowerOff),
                2 => Some(Stop::Reset),
                other => return Err(Unfit::new("stopped", other, "0, 1 or 2")),
            };
            Ok(Power { sleep_control: saved.sleep_control as u8, stopped })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_enable_is_off() {
        let mut power = Power::default();
        power.set_sleep_control(0x14);
        assert_eq!((power.stopped(), power.sleep_control()), (None, 0x14));
        power.set_sleep_control(0x30);
        assert_eq!(power.stopped(), None);
        power.set_sleep_control(0x34);
        assert_eq!(power.stopped(), Some(Stop::PowerOff));
        let mut power = Power::default();
        power.reset(0);
        assert_eq!(power.stopped(), None);
        power.reset(1);
        assert_eq!(power.stopped(), Some(Stop::Reset));
    }

    #[test]
    fn saved_forms_survive_or_are_refused_by_name() {
        let mut power = Power::default();
        power.set_sleep_control(0x34);
        assert_eq!(Power::restore(&power.save()), Ok(power));
        let field =
            |sleep_control, stopped| Power::restore(&proto::v1::PowerV1 { sleep_control, stopped }).unwrap_err().field;
        assert_eq!(field(0x20, 0), "sleep_control");
        assert_eq!(field(0, 3), "stopped");
    }
}
