//! When a lease has surely ended. Pure: instants in, instants out.
//!
//! An agent counts a lease from the moment at which it sent the heartbeat, the controller from the moment at which it
//! answered, which is later: at `granted + lease` on the controller's clock no host runs the VM any more. A tenth of
//! the lease is added for clocks that do not run equally fast and for a guest that takes a moment to stop.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// What this controller granted, and what a controller before it may have granted.
#[derive(Debug)]
pub struct Leases {
    /// Until here a controller before this one may have granted leases.
    started: Instant,
    granted: HashMap<(String, String), Instant>,
}

impl Leases {
    /// Leases of a controller that starts now and remembers nothing.
    pub fn new(started: Instant) -> Leases {
        Leases { started, granted: HashMap::new() }
    }

    /// The host was told HOLD at `now`.
    pub fn grant(&mut self, host: &str, vm: &str, now: Instant) {
        self.granted.insert((host.into(), vm.into()), now);
    }

    /// The instant from which on the host does not run the VM, however cut off it is.
    pub fn ended_at(&self, host: &str, vm: &str, lease: Duration) -> Instant {
        let granted = self.granted.get(&(host.to_owned(), vm.to_owned())).copied().unwrap_or(self.started);
        granted.max(self.started) + lease + lease / 10
    }
}

/// What the age of its last heartbeat says of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// Heard lately.
    Up,
    /// Missed heartbeats; its guests may run.
    Silent,
    /// Its leases have ended; its guests stand still unless they may keep running.
    Lost,
}

impl HostState {
    /// The word for people.
    pub fn word(self) -> &'static str {
        match self {
            HostState::Up => "up",
            HostState::Silent => "silent",
            HostState::Lost => "lost",
        }
    }
}

/// Heartbeats come every fifth of a lease; three missed ones make a host silent, a whole lease and its margin make it
/// lost.
pub fn host_state(age: Option<Duration>, lease: Duration) -> HostState {
    match age {
        Some(age) if age <= lease * 3 / 5 => HostState::Up,
        Some(age) if age <= lease + lease / 10 => HostState::Silent,
        _ => HostState::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    #[test]
    fn a_lease_ends_after_the_last_grant() {
        let start = Instant::now();
        let mut leases = Leases::new(start);
        leases.grant("hostA", "vm1", start + LEASE);
        assert!(leases.ended_at("hostA", "vm1", LEASE) > start + 2 * LEASE);
        assert!(leases.ended_at("hostB", "vm1", LEASE) < start + 2 * LEASE);
    }

    #[test]
    fn a_controller_that_just_started_waits_for_what_others_granted() {
        let start = Instant::now();
        let leases = Leases::new(start);
        assert!(leases.ended_at("hostA", "vm1", LEASE) > start + LEASE);
    }

    #[test]
    fn a_host_is_up_then_silent_then_lost() {
        let state = |seconds| host_state(Some(Duration::from_secs(seconds)), LEASE);
        assert_eq!(
            [state(0), state(6), state(7), state(11), state(12)].map(HostState::word),
            ["up", "up", "silent", "silent", "lost"]
        );
        assert_eq!(host_state(None, LEASE), HostState::Lost);
    }
}
