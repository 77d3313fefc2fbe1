//! The daemon of a host and the process of one guest.

pub mod migration;
