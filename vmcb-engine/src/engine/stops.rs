//! Where a run is to come back besides the places that the guest itself chooses: breakpoints and watchpoints.
//!
//! Addresses are linear, of whatever address space runs, or guest-physical. Nothing of them is in the machine's state: they
//! change no byte of the guest, no count and no cache that it could notice. What a debugger makes of a stop is not known
//! here.

use std::fmt;

/// All stops of a machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stops {
    /// Linear addresses (RIP + CS base) of instructions before which to stop.
    pub breakpoints: Vec<u64>,
    /// Bytes after whose use to stop.
    pub watchpoints: Vec<Watchpoint>,
}

impl Stops {
    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.breakpoints.is_empty() && self.watchpoints.is_empty()
    }
}

/// Bytes that are watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watchpoint {
    /// First byte: linear, or guest-physical where the kind says so.
    pub address: u64,
    /// How many; none watches nothing.
    pub bytes: u64,
    /// Which uses count.
    pub kind: WatchKind,
}

impl Watchpoint {
    /// The first byte of a range that is watched.
    pub(crate) fn first_in(&self, start: u64, bytes: u64) -> Option<u64> {
        let last = self.address.saturating_add(self.bytes.checked_sub(1)?);
        let until = start.saturating_add(bytes.checked_sub(1)?);
        (start <= last && self.address <= until).then_some(start.max(self.address))
    }

    /// True if any byte of the page at `address` is watched.
    pub(crate) fn is_in_page(&self, address: u64) -> bool {
        self.first_in(address & !0xfff, 0x1000).is_some()
    }
}

/// Which uses of watched bytes count. Fetches of instructions never do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchKind {
    /// Stores to a linear address.
    Write,
    /// Loads from a linear address.
    Read,
    /// Both.
    Access,
    /// Stores by vCPUs to guest-physical RAM by whatever linear address, accessed and dirty bits of their page walks
    /// included. What devices and the host write does not count.
    PhysicalWrite,
}

impl WatchKind {
    /// True if a use of a linear address counts.
    pub(crate) fn counts(self, write: bool) -> bool {
        match self {
            WatchKind::Write => write,
            WatchKind::Read => !write,
            WatchKind::Access => true,
            WatchKind::PhysicalWrite => false,
        }
    }
}

/// Why a run stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// The instruction at this linear address comes next.
    Breakpoint {
        /// As it was set.
        address: u64,
    },
    /// The last instruction, or the delivery of an event, used watched bytes. If it used several, the first is told.
    Watchpoint {
        /// Which watchpoint.
        watched: Watchpoint,
        /// It was a store.
        wrote: bool,
        /// Guest-physical address of the first watched byte that was used.
        gpa: u64,
        /// RIP of the instruction; that at which the event was delivered.
        rip: u64,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Breakpoint { address } => write!(f, "breakpoint at {address:#x}"),
            Why::Watchpoint { watched, wrote, gpa, rip } => {
                let (what, at) = (if *wrote { "wrote" } else { "read" }, watched.address);
                write!(f, "the instruction at {rip:#x} {what} watched bytes at {at:#x} (guest-physical {gpa:#x})")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_meet_at_their_edges_and_at_the_end_of_the_address_space() {
        let watch = |address, bytes| Watchpoint { address, bytes, kind: WatchKind::Write };
        assert_eq!(watch(0x1004, 4).first_in(0x1000, 4), None);
        assert_eq!(watch(0x1004, 4).first_in(0x1000, 5), Some(0x1004));
        assert_eq!(watch(0x1004, 4).first_in(0x1007, 8), Some(0x1007));
        assert_eq!(watch(0x1004, 4).first_in(0x1008, 8), None);
        assert_eq!(watch(0x1004, 0).first_in(0x1000, 8), None);
        assert_eq!(watch(u64::MAX - 1, 8).first_in(u64::MAX, 1), Some(u64::MAX));
        assert!(watch(0x1ffe, 4).is_in_page(0x2abc) && watch(0x1ffe, 4).is_in_page(0x1000));
        assert!(!watch(0x1ffe, 2).is_in_page(0x2000));
    }
}
