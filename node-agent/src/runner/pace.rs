//! Guest time against host time, as plain numbers.
//!
//! A busy guest is never throttled: its TSC follows its instructions. Only idle time is paced. The anchor ties a TSC
//! value to an instant of the host; where the guest is behind the host's time it catches up while idle, and where it
//! is ahead it waits. Guest time never goes backwards. Knows no guest and reads no clock.

/// A guest that is behind the wall clock by no more than this when it is started catches up (a migration's downtime,
/// a short pause). Beyond it, time goes on from where it stood: a guest restored after a week must not live through
/// a week of timer ticks.
pub const CATCH_UP_NS_MAX: u64 = 60 * 1_000_000_000;

/// What an idle guest is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Idle {
    /// Let its time jump to this TSC now.
    Skip(u64),
    /// Wait until this instant of `CLOCK_BOOTTIME`, or for an input.
    WaitUntil(u64),
    /// Wait for an input.
    Wait,
}

/// Ties guest time to host time.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    tsc_hz: u64,
    anchor_ns: u64,
    anchor_tsc: u64,
}

/// Readings taken together when the guest starts or goes on.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// `CLOCK_BOOTTIME` now.
    pub boottime_ns: u64,
    /// Wall clock now.
    pub realtime_ns: u64,
    /// Guest TSC now.
    pub tsc: u64,
    /// Wall clock at guest TSC 0 (`MachineConfig.epoch_ns`).
    pub epoch_ns: u64,
}

fn scale(value: u64, times: u64, over: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(times) / u128::from(over.max(1))).unwrap_or(u64::MAX)
}

impl Pace {
    /// Anchors guest time. `tsc_hz` of 0 counts as 1 GHz.
    pub fn start(tsc_hz: u64, start: Start) -> Pace {
        let tsc_hz = if tsc_hz == 0 { 1_000_000_000 } else { tsc_hz };
        let guest_ns = start.epoch_ns.saturating_add(scale(start.tsc, 1_000_000_000, tsc_hz));
        let behind_ns = match start.realtime_ns.saturating_sub(guest_ns) {
            behind if behind <= CATCH_UP_NS_MAX => behind,
            _ => 0,
        };
        Pace { tsc_hz, anchor_ns: start.boottime_ns.saturating_sub(behind_ns), anchor_tsc: start.tsc }
    }

    /// TSC that the host's time corresponds to.
    pub fn tsc_at(&self, boottime_ns: u64) -> u64 {
        let elapsed = boottime_ns.saturating_sub(self.anchor_ns);
        self.anchor_tsc.saturating_add(scale(elapsed, self.tsc_hz, 1_000_000_000))
    }

    /// Host instant that a TSC corresponds to, rounded up.
    pub fn instant_of(&self, tsc: u64) -> u64 {
        let ticks = tsc.saturating_sub(self.anchor_tsc);
        self.anchor_ns.saturating_add(scale(ticks, 1_000_000_000, self.tsc_hz)).saturating_add(1)
    }

    /// What a guest that is idle until `until_tsc` is to do now.
    pub fn idle(&self, now_ns: u64, until_tsc: Option<u64>) -> Idle {
        match until_tsc {
            None => Idle::Wait,
            Some(until) if self.tsc_at(now_ns) >= until => Idle::Skip(until),
            Some(until) => Idle::WaitUntil(self.instant_of(until)),
        }
    }

    /// Where the time of an idle guest stands when an input wakes it now.
    pub fn woken(&self, now_ns: u64, tsc: u64, until_tsc: Option<u64>) -> u64 {
        self.tsc_at(now_ns).min(until_tsc.unwrap_or(u64::MAX)).max(tsc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: u64 = 1_000_000_000;

    fn start(tsc: u64, realtime_ns: u64) -> Start {
        Start { boottime_ns: 500 * S, realtime_ns, tsc, epoch_ns: 1000 * S }
    }

    #[test]
    fn a_short_absence_is_caught_up_and_a_long_one_is_not() {
        // Guest stands at 1000 s + 2 s; the wall clock says 1005 s: three seconds behind.
        let pace = Pace::start(S, start(2 * S, 1005 * S));
        assert_eq!(pace.tsc_at(500 * S), 5 * S);
        let pace = Pace::start(S, start(2 * S, 90_000 * S));
        assert_eq!(pace.tsc_at(500 * S), 2 * S);
        let pace = Pace::start(S, start(2 * S, 900 * S));
        assert_eq!(pace.tsc_at(500 * S), 2 * S);
    }

    #[test]
    fn an_idle_guest_waits_for_its_timer_or_skips_to_it() {
        let pace = Pace::start(2 * S, start(0, 0));
        assert_eq!(pace.idle(501 * S, Some(2 * S)), Idle::Skip(2 * S));
        assert_eq!(pace.idle(501 * S, Some(4 * S)), Idle::WaitUntil(502 * S + 1));
        assert_eq!(pace.idle(501 * S, None), Idle::Wait);
    }

    proptest! {
        #[test]
        fn time_never_goes_backwards_nor_past_the_timer(
            hz in 1..u64::MAX, tsc in any::<u64>(), now in any::<u64>(), ahead in any::<u64>(), real in any::<u64>()
        ) {
            let pace = Pace::start(hz, start(tsc, real));
            let until = tsc.saturating_add(ahead);
            let woken = pace.woken(now, tsc, Some(until));
            prop_assert!(woken >= tsc && woken <= until);
            if let Idle::WaitUntil(instant) = pace.idle(now, Some(until)) {
                prop_assert!(instant >= now || pace.tsc_at(instant) >= until || instant == u64::MAX);
            }
        }
    }
}
