//! The machine: VMCB, CPU state, guest memory, devices, the engines, capture and apply, record and replay.
//!
//! Rooms, in order; each may use those before it: `addr, vmcb, cpu, capability, memory, device, engine, boot, snapshot,
//! machine, journal, replay, transfer`. This crate refuses to know async, sockets, buckets, the wall clock, the
//! environment and randomness: what enters from outside is an argument.

pub mod addr;
pub mod boot;
pub mod capability;
pub mod cpu;
pub mod device;
pub mod engine;
pub mod journal;
pub mod machine;
pub mod memory;
pub mod replay;
pub mod snapshot;
pub mod transfer;
pub mod vmcb;
