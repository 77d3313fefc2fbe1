//! How long a sender must wait so that all lanes together keep to a bandwidth. Pure: bytes and `now` in, microseconds out.

/// Bytes that may be sent at once after a silence, in microseconds of the allowed rate.
const BURST_US: u64 = 20_000;

/// The pace of one transfer.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: u64,
    /// When all that was admitted will have been sent at the allowed rate.
    free_us: u64,
}

impl Pace {
    /// A pace of so many bytes per second; 0 is no limit.
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, free_us: 0 }
    }

    /// Admits bytes; they are to be sent after so many microseconds.
    pub fn admit(&mut self, bytes: u64, now_us: u64) -> u64 {
        if self.bytes_per_s == 0 {
            return 0;
        }
        let start = self.free_us.max(now_us.saturating_sub(BURST_US));
        let takes = (u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_s)).min(u64::MAX.into()) as u64;
        self.free_us = start.saturating_add(takes);
        start.saturating_sub(now_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_silence_earns_only_a_small_burst() {
        let mut pace = Pace::new(100 << 20);
        let (mut now, mut sent) = (0, 0);
        while now < 1_000_000 {
            now += pace.admit(1 << 20, now) + 1;
            sent += 1;
        }
        assert!((99..=103).contains(&sent), "{sent} MiB in a second");
        now += 60_000_000;
        let burst = (0..).take_while(|_| pace.admit(1 << 20, now) == 0).count();
        assert!(burst <= 3, "{burst}");
        assert_eq!(Pace::new(0).admit(u64::MAX, 0), 0);
    }
}
