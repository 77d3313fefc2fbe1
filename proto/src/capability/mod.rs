//! What a guest needs and what a host has, as data that every part of Godwit can carry, compare and print.
//!
//! | file | what |
//! |---|---|
//! | `atom` | where a bit of CPUID is, and how a host's must relate to a guest's |
//! | `set` | [`CapabilitySet`]: atoms and facts, its saved form, and the check of a guest's against a host's |
//! | `failing` | one thing that a guest needs and a host lacks, in words |
//! | `compare` | what two sets differ in, what an operator withholds, and a set in words |
//! | `names` | a name for every bit and MSR |
//!
//! The rule of an atom is part of its meaning, so the check belongs to the bytes: an agent and a controller that hold the
//! same two sets come to the same answer. This room refuses to know which models and engines there are, and to execute
//! CPUID: whoever can, passes a reader.

mod atom;
mod compare;
mod failing;
pub mod names;
mod set;
#[cfg(test)]
mod tests;

pub use atom::{Atom, CpuidRegister, Place, Rule};
pub use compare::{Difference, Line, Unknown, Withheld};
pub use failing::Failing;
pub use set::{BadSet, CapabilitySet, Facts, same_rate};
