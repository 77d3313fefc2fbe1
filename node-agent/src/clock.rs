//! The host's clocks, behind a trait so that leases, pacing and tickets are tested with time as an argument.
//!
//! Leases and tickets use `CLOCK_BOOTTIME`: it never jumps and it counts suspension, in which another host may have
//! been given the VM. The wall clock serves guests' time of day alone; nothing that decides ownership reads it.

use rustix::time::{ClockId, clock_gettime};

/// Where time comes from.
pub trait Clock: Send + Sync {
    /// Nanoseconds of `CLOCK_BOOTTIME`.
    fn boottime_ns(&self) -> u64;
    /// Nanoseconds since the Unix epoch.
    fn realtime_ns(&self) -> u64;
}

/// The clocks of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

fn read(id: ClockId) -> u64 {
    let now = clock_gettime(id);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

impl Clock for HostClock {
    fn boottime_ns(&self) -> u64 {
        read(ClockId::Boottime)
    }

    fn realtime_ns(&self) -> u64 {
        read(ClockId::Realtime)
    }
}
