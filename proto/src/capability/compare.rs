//! Two sets side by side, a set without what an operator withholds, and a set in words.
//!
//! All of it is over places and names alone; whose sets they are, the caller says.

use std::collections::BTreeSet;
use std::fmt;

use super::atom::{Atom, CpuidRegister, Place, Rule, from_halves, halves};
use super::failing::msr_word;
use super::names;
use super::set::CapabilitySet;

/// What an operator withholds from guests: a feature by name, or one bit or MSR by number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Withheld {
    /// As it was written.
    pub text: String,
    places: Vec<Place>,
    msrs: Vec<u32>,
}

/// A name that no bit and no MSR has.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no feature; a name as in `ctl host show`, `CPUID 0000_0007.0 EBX[5]` or `MSR C001_1029` is")]
pub struct Unknown(pub String);

impl Withheld {
    /// From a name (`avx2`, `DE_CFG`), a place (`CPUID 0000_0007.0 EBX[5]`) or an MSR's number (`MSR C001_1029`).
    ///
    /// # Errors
    /// [`Unknown`].
    pub fn parse(text: &str) -> Result<Withheld, Unknown> {
        let mut words = text.split_whitespace();
        let (places, msrs) = match (words.next(), words.next()) {
            (Some(name), None) => (names::places(name), names::msrs(name).collect()),
            (Some(kind), Some(index)) if kind.eq_ignore_ascii_case("msr") => {
                (Vec::new(), from_halves(index).into_iter().collect())
            }
            _ => (text.parse().into_iter().collect(), Vec::new()),
        };
        if places.is_empty() && msrs.is_empty() {
            return Err(Unknown(text.to_owned()));
        }
        Ok(Withheld { text: text.to_owned(), places, msrs })
    }
}

/// One thing in which two sets differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// What it is, as refusals name it.
    pub what: String,
    /// In the first set: `yes` or `no` for a bit or an MSR, otherwise a value.
    pub a: String,
    /// In the second.
    pub b: String,
}

/// A line of a set in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// `CPUID 0000_0007.0 EBX`, `MSR`, `physical address bits`, ...
    pub what: String,
    /// What it has there.
    pub has: Vec<String>,
}

fn word(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

type Register = (u32, u32, CpuidRegister);

impl CapabilitySet {
    /// Takes away what is withheld; what is not there stays away.
    pub fn withhold(&mut self, withheld: &Withheld) {
        for place in &withheld.places {
            let here = |atom: &&mut Atom| {
                (atom.leaf, atom.subleaf, atom.register) == (place.leaf, place.subleaf, place.register)
            };
            for atom in self.atoms.iter_mut().filter(here).filter(|atom| atom.rule == Rule::Subset) {
                atom.value &= !(1 << place.bit);
            }
        }
        for msr in &withheld.msrs {
            self.facts.msrs.remove(msr);
        }
    }

    /// In how many single things a host is asked for something: bits, fields, widths, the TSC's rate and MSRs.
    pub fn demands(&self) -> usize {
        let of = |atom: &Atom| if atom.rule == Rule::Subset { atom.value.count_ones() as usize } else { 1 };
        let widths = [self.facts.phys_bits, self.facts.linear_bits].iter().filter(|bits| **bits > 0).count();
        self.atoms.iter().map(of).sum::<usize>() + widths + 1 + self.facts.msrs.len()
    }

    /// What differs, in order of place; the names of models and engines do not count.
    pub fn differences(&self, other: &CapabilitySet) -> Vec<Difference> {
        let register = |atom: &Atom| -> Register { (atom.leaf, atom.subleaf, atom.register) };
        let registers: BTreeSet<Register> = self.atoms.iter().chain(&other.atoms).map(register).collect();
        let mut found = Vec::new();
        for at in registers {
            let here: Vec<&Atom> = self.atoms.iter().chain(&other.atoms).filter(|atom| register(atom) == at).collect();
            let Some(first) = here.first() else { continue };
            let mask = here.iter().fold(0, |mask, atom| mask | atom.mask);
            let whole = Atom { mask, ..**first };
            let (a, b) = (self.bits_at(&whole), other.bits_at(&whole));
            if here.iter().any(|atom| atom.rule == Rule::Subset) {
                found.extend(Atom::bits(a ^ b).map(|bit| Difference {
                    what: first.place(bit).to_string(),
                    a: word(a & (1 << bit) != 0),
                    b: word(b & (1 << bit) != 0),
                }));
            } else if a != b {
                found.push(Difference { what: first.word(), a: halves(a), b: halves(b) });
            }
        }
        let facts = self.scalars().into_iter().zip(other.scalars()).filter(|(a, b)| a.1 != b.1);
        found.extend(facts.map(|((what, a), (_, b))| Difference { what: what.to_owned(), a, b }));
        found.extend(self.facts.msrs.symmetric_difference(&other.facts.msrs).map(|msr| Difference {
            what: msr_word(*msr),
            a: word(self.facts.msrs.contains(msr)),
            b: word(other.facts.msrs.contains(msr)),
        }));
        found
    }

    fn scalars(&self) -> [(&'static str, String); 3] {
        let facts = &self.facts;
        let tsc = match (facts.tsc_scaling, facts.tsc_khz) {
            (true, _) => "any rate".to_owned(),
            (false, khz) => format!("{khz} kHz"),
        };
        [
            ("physical address bits", facts.phys_bits.to_string()),
            ("linear address bits", facts.linear_bits.to_string()),
            ("TSC", tsc),
        ]
    }

    /// The set in words: a line for each register, the widths, the TSC, the MSRs. Registers without a bit are left out.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for atom in self.atoms.iter().filter(|atom| atom.value != 0) {
            let name = |bit| names::name(atom.place(bit)).map_or_else(|| format!("[{bit}]"), str::to_owned);
            let has = match atom.rule {
                Rule::Subset => Atom::bits(atom.value).map(name).collect(),
                Rule::Equal | Rule::NotGreater => vec![halves(atom.value)],
            };
            lines.push(Line { what: atom.word(), has });
        }
        lines.extend(self.scalars().map(|(what, has)| Line { what: what.to_owned(), has: vec![has] }));
        if !self.facts.msrs.is_empty() {
            let name = |msr: &u32| names::msr_name(*msr).map_or_else(|| halves(*msr), str::to_owned);
            let mut has: Vec<String> = self.facts.msrs.iter().map(name).collect();
            // Neighbours that are alike bear one name.
            has.dedup();
            lines.push(Line { what: "MSRs".to_owned(), has });
        }
        lines
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.has.join(" "))
    }
}
