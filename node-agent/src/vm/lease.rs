//! How long this host may run VMs: counted from when the last heartbeat that was answered had been sent.
//!
//! The controller counts a host's leases from a later instant (when it received that heartbeat), so what is granted
//! here always ends first. A new VM begins with what is left of it; the ledger's HOLD renews it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::v1::IsolationPolicy;

/// Lease until the controller has said its own.
const LEASE_MS: u64 = 10_000;
/// A lease that has ended: nothing runs until the next renewal. (0 would mean: no limit.)
const ENDED: u64 = 1;

/// The host's standing with the controller.
#[derive(Debug)]
pub struct Leases {
    required: bool,
    sent_ns: AtomicU64,
    lease_ms: AtomicU64,
}

impl Leases {
    /// `required`: there is a controller; without one guests run without limit.
    pub fn new(required: bool) -> Leases {
        Leases { required, sent_ns: AtomicU64::new(0), lease_ms: AtomicU64::new(LEASE_MS) }
    }

    /// A heartbeat sent at `sent_ns` (`CLOCK_BOOTTIME`) was answered.
    pub fn note(&self, sent_ns: u64, lease_ms: u32) {
        if lease_ms > 0 {
            self.lease_ms.store(lease_ms.into(), Ordering::Relaxed);
        }
        self.sent_ns.fetch_max(sent_ns, Ordering::Relaxed);
    }

    /// Until when a guest may run that the heartbeat sent at `sent_ns` was answered for; 0 is no limit.
    pub fn until(&self, sent_ns: u64, policy: IsolationPolicy) -> u64 {
        if !self.required || policy == IsolationPolicy::KeepRunning {
            return 0;
        }
        let lease_ns = self.lease_ms.load(Ordering::Relaxed).saturating_mul(1_000_000);
        // A tenth is kept for the runner's slice and for clocks that are not quite of one speed.
        match sent_ns {
            0 => ENDED,
            sent => sent.saturating_add(lease_ns - lease_ns / 10),
        }
    }

    /// Until when a guest that was just given to this host may run.
    pub fn initial(&self, policy: IsolationPolicy) -> u64 {
        self.until(self.sent_ns.load(Ordering::Relaxed), policy)
    }

    /// When the last answered heartbeat was sent; 0 if none was.
    pub fn heard_ns(&self) -> u64 {
        self.sent_ns.load(Ordering::Relaxed)
    }

    /// How often a heartbeat is due.
    pub fn interval(&self) -> Duration {
        Duration::from_millis((self.lease_ms.load(Ordering::Relaxed) / 5).clamp(20, 10_000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_from_the_sending_and_ends_early() {
        let leases = Leases::new(true);
        assert_eq!(leases.initial(IsolationPolicy::Pause), ENDED);
        leases.note(5_000_000_000, 1000);
        leases.note(4_000_000_000, 1000);
        assert_eq!(leases.initial(IsolationPolicy::Pause), 5_900_000_000);
        assert_eq!(leases.initial(IsolationPolicy::KeepRunning), 0);
        assert_eq!(leases.interval(), Duration::from_millis(200));
        assert_eq!(Leases::new(false).initial(IsolationPolicy::Pause), 0);
    }
}
