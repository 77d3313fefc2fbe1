//! skeleton

pub mod ctl;
