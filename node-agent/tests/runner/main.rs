//! The process of a guest without an engine: the machine thread and the I/O thread against a scripted guest.

mod driver;
mod protocol;
mod scripted;
