//! One thing that a guest needs and a host lacks, in words that name it as the manual does.
//!
//! Each prints as what is needed, so that a refusal reads `it lacks CPUID 0000_0007.0 EBX[5] avx2`. This file refuses
//! to know which guest and which host: whoever refuses says that.

use std::collections::BTreeSet;
use std::fmt;

use super::atom::{Atom, Place, Rule, halves};
use super::names;

/// One thing that the guest needs and the host lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failing {
    /// A bit that must be set.
    Bit(Place),
    /// A field that must be equal, or must not be greater.
    Field {
        /// The guest's atom.
        guest: Atom,
        /// The host's bits at that place.
        host: u32,
    },
    /// Physical or linear address bits.
    AddressBits {
        /// `physical` or `linear`.
        which: &'static str,
        /// The guest's.
        guest: u32,
        /// The host's.
        host: u32,
    },
    /// The TSC runs at another rate and the host cannot scale it.
    TscRate {
        /// kHz of the guest.
        guest: u64,
        /// kHz of the host.
        host: u64,
    },
    /// No engine in common.
    Engines {
        /// Engines that may run the guest.
        guest: BTreeSet<String>,
        /// Engines of the host.
        host: BTreeSet<String>,
    },
    /// An MSR of the guest that the host cannot set.
    Msr(u32),
}

impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |names: &BTreeSet<String>| match names.is_empty() {
            true => "none".to_owned(),
            false => names.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
        };
        match self {
            Failing::Bit(place) => place.fmt(f),
            Failing::Field { guest, host } => {
                let relation = if guest.rule == Rule::Equal { "=" } else { ">=" };
                write!(f, "{} {relation} {} (the host has {})", guest.word(), halves(guest.value), halves(*host))
            }
            Failing::AddressBits { which, guest, host } => {
                write!(f, "{guest} {which} address bits (the host has {host})")
            }
            Failing::TscRate { guest, host } => {
                write!(f, "a TSC of {guest} kHz (the host's runs at {host} kHz and cannot be scaled)")
            }
            Failing::Engines { guest, host } => {
                write!(f, "one of the engines {} (the host has {})", list(guest), list(host))
            }
            Failing::Msr(index) => f.write_str(&msr_word(*index)),
        }
    }
}

/// `MSR C001_1029 DE_CFG`.
pub(super) fn msr_word(index: u32) -> String {
    match names::msr_name(index) {
        Some(name) => format!("MSR {} {name}", halves(index)),
        None => format!("MSR {}", halves(index)),
    }
}
