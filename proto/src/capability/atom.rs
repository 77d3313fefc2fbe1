//! An atom: some bits of one CPUID register, and how a host's must relate to a guest's (APM3 appendix E).
//!
//! A place prints as `CPUID 0000_0007.0 EBX[5] avx2` and parses from the same words, with or without the name.

use std::fmt;
use std::str::FromStr;

use super::names;

/// A register of CPUID's answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum CpuidRegister {
    /// EAX.
    Eax = 0,
    /// EBX.
    Ebx = 1,
    /// ECX.
    Ecx = 2,
    /// EDX.
    Edx = 3,
}

impl CpuidRegister {
    /// In the order of the answer.
    pub const ALL: [CpuidRegister; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    /// Name.
    pub const fn name(self) -> &'static str {
        ["EAX", "EBX", "ECX", "EDX"][self as usize]
    }
}

/// How a host's bits must relate to a guest's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rule {
    /// Every bit of the guest is set on the host.
    Subset,
    /// Equal.
    Equal,
    /// The guest's number is at most the host's.
    NotGreater,
}

/// Some bits of one CPUID register.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Atom {
    /// Leaf (EAX).
    pub leaf: u32,
    /// Subleaf (ECX).
    pub subleaf: u32,
    /// Register of the answer.
    pub register: CpuidRegister,
    /// Bits that count.
    pub mask: u32,
    /// Their values; zero outside of the mask.
    pub value: u32,
    /// Rule of the guest's side.
    pub rule: Rule,
}

impl Atom {
    /// `CPUID 0000_0007.0 EBX`; what the register says, where that is no list of features.
    pub fn word(&self) -> String {
        let Atom { leaf, subleaf, register, .. } = *self;
        let word = register_word(leaf, subleaf, register);
        match (leaf, subleaf, register) {
            (0xd, 2.., CpuidRegister::Eax) => format!("{word} (size of XSAVE component {subleaf})"),
            (0xd, 2.., CpuidRegister::Ebx) => format!("{word} (offset of XSAVE component {subleaf})"),
            (0x0, ..) => format!("{word} (vendor)"),
            (0x8000_000a, 0, CpuidRegister::Ebx) => format!("{word} (SVM: number of ASIDs)"),
            _ => word,
        }
    }

    /// The place of one of its bits.
    pub const fn place(&self, bit: u32) -> Place {
        Place { leaf: self.leaf, subleaf: self.subleaf, register: self.register, bit }
    }

    /// Numbers of the bits that are set in `value`.
    pub(super) fn bits(value: u32) -> impl Iterator<Item = u32> {
        (0..32).filter(move |bit| value & (1 << bit) != 0)
    }
}

fn register_word(leaf: u32, subleaf: u32, register: CpuidRegister) -> String {
    format!("CPUID {}.{subleaf:x} {}", halves(leaf), register.name())
}

/// `8000_0021`: both halves, as the manual writes leaves and MSRs.
pub(super) fn halves(number: u32) -> String {
    format!("{:04X}_{:04X}", number >> 16, number & 0xffff)
}

/// A number as [`halves`] writes it, or less of it.
pub(super) fn from_halves(text: &str) -> Option<u32> {
    let digits: String = text.trim_start_matches("0x").chars().filter(|c| *c != '_').collect();
    u32::from_str_radix(&digits, 16).ok()
}

/// Where one bit of CPUID is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Place {
    /// Leaf (EAX).
    pub leaf: u32,
    /// Subleaf (ECX).
    pub subleaf: u32,
    /// Register of the answer.
    pub register: CpuidRegister,
    /// 0 to 31.
    pub bit: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { leaf, subleaf, register, bit } = *self;
        write!(f, "{}[{bit}]", register_word(leaf, subleaf, register))?;
        match names::name(*self) {
            Some(name) => write!(f, " {name}"),
            None => Ok(()),
        }
    }
}

/// Text that is no place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not of the form CPUID 0000_0007.0 EBX[5]")]
pub struct NotAPlace;

impl FromStr for Place {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Place, NotAPlace> {
        let parse = || {
            let mut words = text.split_whitespace();
            words.next().filter(|word| word.eq_ignore_ascii_case("cpuid"))?;
            let (leaf, subleaf) = words.next()?.split_once('.')?;
            let (register, bit) = words.next()?.strip_suffix(']')?.split_once('[')?;
            let register = CpuidRegister::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(register))?;
            let bit = bit.parse().ok().filter(|bit| *bit < 32)?;
            Some(Place { leaf: from_halves(leaf)?, subleaf: from_halves(subleaf)?, register, bit })
        };
        parse().ok_or(NotAPlace)
    }
}
