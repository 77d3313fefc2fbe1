//! Real binaries, real guests, faults: what the whole-cluster tests and the benchmarks are made of.

pub mod bench;
pub mod bucket;
pub mod cluster;
pub mod fault;
pub mod guest;
pub mod lab;
pub mod leftovers;
pub mod linux;
