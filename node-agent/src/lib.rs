//! The daemon of a host and the process of one guest.
//!
//! - [`agent`]: config -> build -> run until shutdown -> drain.
//! - [`rpc`]: what the agent offers by gRPC; [`heartbeat`]: what it says to the controller; [`tls`]: who may say what.
//! - [`facts`]: what the host can give a guest; [`host`]: what it will take on.
//! - [`vm`]: one task per VM, the only one that changes it; its files; its runner.
//! - [`migration`]: a VM on its way over lanes.
//! - [`runner`]: the process of one guest (binary `vm-runner`).
//! - [`replay`]: a recording, gone through again where its reader is (binary `vm-replay`).
//!
//! This crate refuses to know other hosts' VMs, placement and the bucket.

pub mod agent;
pub mod clock;
pub mod config;
pub mod facts;
pub mod heartbeat;
pub mod host;
pub mod metrics;
pub mod migration;
pub mod replay;
pub mod rpc;
pub mod runner;
pub mod saved;
pub mod tls;
pub mod vm;
