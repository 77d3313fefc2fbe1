//! The machine: VMCB, CPU state, guest memory, devices, the engines, capture and apply.
//!
//! Modules form a strict order; each may use only those before it.

pub mod addr;

pub mod vmcb;

pub mod cpu;

pub mod capability;
