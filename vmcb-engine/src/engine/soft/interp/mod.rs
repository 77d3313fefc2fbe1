//! Meanings of the general-purpose and system instructions, one file a family.
//!
//! Each family has `pick` functions that choose the handler of a decoded instruction, and the meanings themselves.
//! `operand` and `pick` hold what families share. This room refuses to know how bytes become operations.

pub mod alu;
pub mod atomic;
pub mod bit;
pub mod branch;
pub mod control;
pub mod convert;
pub mod descriptor;
pub mod far;
pub mod fast_calls;
pub mod flag;
pub mod fuse;
pub mod io;
pub mod legacy;
pub mod liveness;
pub mod mov;
pub mod muldiv;
pub mod operand;
pub mod pick;
pub mod shift;
pub mod stack;
pub mod string;
pub mod system;
pub mod tables;
pub mod vm;
