//! Record and replay: the machine's door, and what goes through a recording again.
//!
//! | file | what |
//! |---|---|
//! | `record` | the door: every outside value passes it, with its position |
//! | `arrive` | a machine that comes from a checkpoint goes through a recording before it runs |
//! | `tape` | what a recording says happened, and what time it was |
//! | `probe` | what a machine is like, in as few bytes as a journal has for it |
//! | `play` | a machine to which it happens again, compared with what was recorded |
//! | `ladder` | rungs to go back to |
//! | `timeline` | any instant of it, forwards and backwards |
//!
//! The machine is deterministic: its time is its instructions, and nothing happens in it but by a call. So a capture and
//! what came through the door since are the machine at every later instant. This room refuses to know files, sockets,
//! hosts and clocks.

mod arrive;
mod ladder;
mod play;
mod probe;
mod record;
mod tape;
mod timeline;

pub use arrive::ArrivalError;
pub use ladder::LadderError;
pub use play::{BootImages, Goal, Hit, Mismatch, Pause, PlayError, Player, Said};
pub use record::{Door, DoorError, PARCEL_BYTES_MAX, PROBE_EVERY, SECTION, WhenFull, config_digest};
pub use tape::{Entry, Happening, Rate, Tape, TapeError};
pub use timeline::{Arrival, LastWrite, Spacing, Timeline, TimelineError, Written};

#[cfg(test)]
mod tests;
