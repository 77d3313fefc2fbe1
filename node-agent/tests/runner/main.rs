//! The process of a guest without an engine: the machine thread and the I/O thread against a scripted guest.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod debugging;
mod driver;
mod protocol;
mod scripted;
