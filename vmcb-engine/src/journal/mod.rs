//! The journal: everything that entered a machine from outside, with its position, in blocks that name each other.
//!
//! | file | what |
//! |---|---|
//! | `events` | what can enter, and its bytes |
//! | `write` | events become blocks |
//! | `read` | blocks are checked and become events again |
//!
//! A block is a frame of kind Journal (`proto/src/frame.rs`, `JournalBlock` in journal.proto). It names the hash of the
//! one before, so a chain cannot be cut in its middle, reordered or mixed unseen; it may end anywhere, since a recorder can
//! die. Where the machine was captured a *segment* begins: there, and only there, a replay can begin.
//!
//! This room refuses to know machines, where blocks lie, and clocks: whoever closes a block says what time it is.

mod events;
mod read;
mod write;

use std::fmt;

pub use proto::ids::RecordingId;

pub use events::{CpuDetail, Detail, Event, EventError, Probe};
pub use read::{Block, Chain, ChainError, Stamped};
pub use write::{Closed, Closing, Cut, Head, Writer};

/// Version of everything that a guest can see of the soft engine and the devices. It is raised whenever any of that changes:
/// recordings of other versions are not replayed. Golden recordings (`vmcb-engine/tests/golden_recordings.rs`) notice a change.
pub const SEMANTICS: u32 = 1;

/// Bytes of events after which a block is closed.
pub const BLOCK_BYTES: usize = 64 << 10;

/// An instant of a machine, between two instructions. What comes later has more of both.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Position {
    /// Guest instructions retired since the machine was built, over all vCPUs.
    pub retired: u64,
    /// TSC ticks that passed while the machine was idle.
    pub skipped_tsc: u64,
}

impl Position {
    /// True if a machine can be at `self` first and at `later` afterwards.
    pub fn is_before_or_at(self, later: Position) -> bool {
        self.retired <= later.retired && self.skipped_tsc <= later.skipped_tsc
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "instruction {}", self.retired)?;
        if self.skipped_tsc > 0 { write!(f, " (+{} idle ticks)", self.skipped_tsc) } else { Ok(()) }
    }
}

impl From<Position> for proto::v1::Position {
    fn from(Position { retired, skipped_tsc }: Position) -> Self {
        Self { retired, skipped_tsc }
    }
}

impl From<proto::v1::Position> for Position {
    fn from(proto::v1::Position { retired, skipped_tsc }: proto::v1::Position) -> Self {
        Self { retired, skipped_tsc }
    }
}
