//! The software engine: a software SVM processor per vCPU ([`core::Core`]), and the small hypervisor that runs a VMCB on it.
//!
//! ```text
//! SoftEngine (host)  --VMRUN-->  svm (enter, exit)  -->  run (blocks)  -->  interp, sse, x87  -->  tlb, walk
//! ```
//! Deterministic: time is the count of retired instructions, and nothing here reads anything of the host.

pub mod block;
pub mod core;
pub mod decode;
pub mod deliver;
pub mod fpu;
pub mod host;
pub mod interp;
pub mod noting;
pub mod op;
pub mod run;
pub mod rung;
pub mod sse;
pub mod stops;
pub mod svm;
pub mod tlb;
pub mod walk;
pub mod x87;

pub use host::{SoftConfig, SoftEngine, Tuning};

#[cfg(test)]
mod tests;
