//! Whole agents in this process, with real certificates, real sockets and real runner processes whose guest is a
//! counter instead of a machine (this test binary started again, see `counter`).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod counter;
mod debugging;
mod fleet;
mod lifecycle;
mod machine;
mod moves;
