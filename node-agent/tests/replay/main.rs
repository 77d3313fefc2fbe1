//! `vm-replay` and what it is made of, on recordings of a small guest (`vmcb-engine/tests/replaying`): its verdicts, real gdb
//! sessions, and files that nobody should have written. `GODWIT_REPLAY_SEED` chooses what happens to the guest.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

#[path = "../../../vmcb-engine/tests/replaying/mod.rs"]
mod replaying;

mod files;
mod hostile;
mod sessions;
mod symbols;
mod verdicts;
