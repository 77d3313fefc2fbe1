//! `CapabilitySet`: atoms of CPUID and scalar facts; its saved form; and whether a host satisfies a guest.
//!
//! A guest's set (its contract) and a host's have the same shape, made by the same list of rules from two readers of
//! CPUID, so the check is one loop and every refusal names the leaf, register and bit.

use std::collections::BTreeSet;

use prost::Message;

use super::atom::{Atom, CpuidRegister, Rule};
use super::failing::Failing;
use crate::v1;

/// What is no CPUID bit.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Physical address bits; a guest's must not exceed the host's, else reserved bits would not fault.
    pub phys_bits: u32,
    /// Linear address bits, compared likewise.
    pub linear_bits: u32,
    /// TSC rate; equal, as [`same_rate`] has it, unless the host scales.
    pub tsc_khz: u64,
    /// The host can run guests at another rate.
    pub tsc_scaling: bool,
    /// Engines that may run the guest, or that the host has: one in common is enough.
    pub engines: BTreeSet<String>,
    /// MSRs that a restore sets, or that the host can set.
    pub msrs: BTreeSet<u32>,
}

/// Two rates that differ by no more are one: hosts measure their own TSC when they boot, and no two measure the same. KVM takes
/// so much for equal, too (`tsc_tolerance_ppm`, KVM API 4.55).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether a guest whose TSC runs at one rate is well served by a TSC that runs at the other.
pub fn same_rate(guest_khz: u64, host_khz: u64) -> bool {
    u128::from(guest_khz.abs_diff(host_khz)) * 1_000_000 <= u128::from(host_khz) * u128::from(TSC_TOLERANCE_PPM)
}

/// What a guest needs or a host has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CapabilitySet {
    /// CPU model of a guest; empty for a host.
    pub model: String,
    /// Sorted, no place twice.
    pub atoms: Vec<Atom>,
    /// The rest.
    pub facts: Facts,
}

/// Bytes that are no capability set.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadSet {
    /// Not the message.
    #[error("capability set: not a CapabilitySet message")]
    NotAMessage(#[source] prost::DecodeError),
    /// A part of it that no encoder wrote.
    #[error("capability set: {0}")]
    Malformed(&'static str),
}

/// Which bits are compared and how. Left out: what varies by vCPU (APIC id, HTT, CmpLegacy), what software sets
/// (OSXSAVE, OSPKE), and family, model and stepping, which a guest keeps wherever it runs.
const RULES: &[(u32, u32, CpuidRegister, u32, Rule)] = &[
    (0x0, 0, CpuidRegister::Ebx, u32::MAX, Rule::Equal),
    (0x0, 0, CpuidRegister::Ecx, u32::MAX, Rule::Equal),
    (0x0, 0, CpuidRegister::Edx, u32::MAX, Rule::Equal),
    (0x1, 0, CpuidRegister::Ecx, !(1 << 27 | 1 << 31), Rule::Subset),
    (0x1, 0, CpuidRegister::Edx, !(1 << 28), Rule::Subset),
    (0x6, 0, CpuidRegister::Eax, 1 << 2, Rule::Subset),
    (0x7, 0, CpuidRegister::Ebx, u32::MAX, Rule::Subset),
    (0x7, 0, CpuidRegister::Ecx, !(1 << 4), Rule::Subset),
    (0x7, 0, CpuidRegister::Edx, u32::MAX, Rule::Subset),
    (0x7, 1, CpuidRegister::Eax, u32::MAX, Rule::Subset),
    // XCR0 components, and for AVX and PKRU their size and offset (APM2 11.5.3).
    (0xd, 0, CpuidRegister::Eax, u32::MAX, Rule::Subset),
    (0xd, 1, CpuidRegister::Eax, u32::MAX, Rule::Subset),
    (0x4000_0001, 0, CpuidRegister::Eax, u32::MAX, Rule::Subset),
    (0x8000_0001, 0, CpuidRegister::Ecx, !(1 << 1), Rule::Subset),
    (0x8000_0001, 0, CpuidRegister::Edx, u32::MAX, Rule::Subset),
    (0x8000_0007, 0, CpuidRegister::Edx, 1 << 8, Rule::Subset),
    (0x8000_0008, 0, CpuidRegister::Ebx, u32::MAX, Rule::Subset),
    (0x8000_000a, 0, CpuidRegister::Ebx, u32::MAX, Rule::NotGreater),
    (0x8000_000a, 0, CpuidRegister::Edx, u32::MAX, Rule::Subset),
    (0x8000_0021, 0, CpuidRegister::Eax, u32::MAX, Rule::Subset),
    (0x8000_0021, 0, CpuidRegister::Ecx, u32::MAX, Rule::Subset),
];

/// XSAVE components whose place in the standard area is compared.
const XSAVE_COMPONENTS: std::ops::Range<u32> = 2..10;
const ATOMS_MAX: usize = 1024;
const MSRS_MAX: usize = 4096;
const ENGINES_MAX: usize = 16;
const NAME_MAX: usize = 64;

impl CapabilitySet {
    /// Asks `cpuid` (leaf, subleaf) for everything that is compared. A reader answers leaves that it does not have, or
    /// that lie beyond the greatest, with zeros.
    pub fn from_cpuid(model: &str, cpuid: &mut dyn FnMut(u32, u32) -> [u32; 4], facts: Facts) -> CapabilitySet {
        let mut atoms: Vec<Atom> = RULES
            .iter()
            .map(|&(leaf, subleaf, register, mask, rule)| {
                let value = cpuid(leaf, subleaf)[register as usize] & mask;
                Atom { leaf, subleaf, register, mask, value, rule }
            })
            .collect();
        let components = cpuid(0xd, 0)[0];
        for subleaf in XSAVE_COMPONENTS.filter(|component| components & (1 << component) != 0) {
            let answer = cpuid(0xd, subleaf);
            for register in [CpuidRegister::Eax, CpuidRegister::Ebx] {
                let value = answer[register as usize];
                atoms.push(Atom { leaf: 0xd, subleaf, register, mask: u32::MAX, value, rule: Rule::Equal });
            }
        }
        atoms.sort();
        CapabilitySet { model: model.to_owned(), atoms, facts }
    }

    /// The bits of this set at an atom's place; zero if it says nothing about it.
    pub(super) fn bits_at(&self, place: &Atom) -> u32 {
        self.atoms
            .iter()
            .filter(|atom| (atom.leaf, atom.subleaf, atom.register) == (place.leaf, place.subleaf, place.register))
            .fold(0, |bits, atom| bits | atom.value)
            & place.mask
    }

    /// Everything that `self`, a guest's contract, needs and `host` lacks; empty: it may run there.
    pub fn failing_on(&self, host: &CapabilitySet) -> Vec<Failing> {
        let mut failing = Vec::new();
        for atom in &self.atoms {
            let bits = host.bits_at(atom);
            match atom.rule {
                Rule::Subset => failing.extend(Atom::bits(atom.value & !bits).map(|bit| Failing::Bit(atom.place(bit)))),
                Rule::Equal if bits != atom.value => failing.push(Failing::Field { guest: *atom, host: bits }),
                Rule::NotGreater if bits < atom.value => failing.push(Failing::Field { guest: *atom, host: bits }),
                Rule::Equal | Rule::NotGreater => {}
            }
        }
        self.failing_facts(&host.facts, &mut failing);
        failing
    }

    fn failing_facts(&self, host: &Facts, failing: &mut Vec<Failing>) {
        let guest = &self.facts;
        let widths = [("physical", guest.phys_bits, host.phys_bits), ("linear", guest.linear_bits, host.linear_bits)];
        for (which, guest, host) in widths.into_iter().filter(|(_, guest, host)| guest > host) {
            failing.push(Failing::AddressBits { which, guest, host });
        }
        if !same_rate(guest.tsc_khz, host.tsc_khz) && !host.tsc_scaling {
            failing.push(Failing::TscRate { guest: guest.tsc_khz, host: host.tsc_khz });
        }
        if guest.engines.is_disjoint(&host.engines) {
            failing.push(Failing::Engines { guest: guest.engines.clone(), host: host.engines.clone() });
        }
        failing.extend(guest.msrs.difference(&host.msrs).copied().map(Failing::Msr));
    }

    /// The saved form.
    pub fn encode(&self) -> v1::CapabilitySet {
        let atom = |atom: &Atom| v1::CapabilityAtom {
            leaf: atom.leaf,
            subleaf: atom.subleaf,
            register: u32::from(atom.register as u8),
            mask: atom.mask,
            value: atom.value,
            rule: match atom.rule {
                Rule::Subset => v1::CapabilityRule::Subset,
                Rule::Equal => v1::CapabilityRule::Equal,
                Rule::NotGreater => v1::CapabilityRule::NotGreater,
            } as i32,
        };
        let Facts { phys_bits, linear_bits, tsc_khz, tsc_scaling, engines, msrs } = &self.facts;
        v1::CapabilitySet {
            model: self.model.clone(),
            atoms: self.atoms.iter().map(atom).collect(),
            phys_bits: *phys_bits,
            linear_bits: *linear_bits,
            tsc_khz: *tsc_khz,
            tsc_scaling: *tsc_scaling,
            engines: engines.iter().cloned().collect(),
            msrs: msrs.iter().copied().collect(),
        }
    }

    /// The saved form as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode().encode_to_vec()
    }

    /// From bytes that may hold anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<CapabilitySet, BadSet> {
        Self::decode(v1::CapabilitySet::decode(bytes).map_err(BadSet::NotAMessage)?)
    }

    /// From the saved form, which may hold anything.
    pub fn decode(set: v1::CapabilitySet) -> Result<CapabilitySet, BadSet> {
        let v1::CapabilitySet { model, atoms, phys_bits, linear_bits, tsc_khz, tsc_scaling, engines, msrs } = set;
        if atoms.len() > ATOMS_MAX || msrs.len() > MSRS_MAX || engines.len() > ENGINES_MAX {
            return Err(BadSet::Malformed("too many atoms, MSRs or engines"));
        }
        if model.len() > NAME_MAX || engines.iter().any(|name| name.len() > NAME_MAX) {
            return Err(BadSet::Malformed("a name is too long"));
        }
        let atoms: Vec<Atom> = atoms.into_iter().map(decode_atom).collect::<Result<_, _>>()?;
        let place = |atom: &Atom| (atom.leaf, atom.subleaf, atom.register, atom.mask);
        if !atoms.is_sorted_by(|a, b| place(a) < place(b)) {
            return Err(BadSet::Malformed("atoms are out of order or twice"));
        }
        if !engines.is_sorted_by(|a, b| a < b) || !msrs.is_sorted_by(|a, b| a < b) {
            return Err(BadSet::Malformed("engines or MSRs are out of order or twice"));
        }
        let (engines, msrs) = (engines.into_iter().collect(), msrs.into_iter().collect());
        let facts = Facts { phys_bits, linear_bits, tsc_khz, tsc_scaling, engines, msrs };
        Ok(CapabilitySet { model, atoms, facts })
    }
}

fn decode_atom(atom: v1::CapabilityAtom) -> Result<Atom, BadSet> {
    let rule = match atom.rule() {
        v1::CapabilityRule::Subset => Rule::Subset,
        v1::CapabilityRule::Equal => Rule::Equal,
        v1::CapabilityRule::NotGreater => Rule::NotGreater,
        v1::CapabilityRule::Unspecified => return Err(BadSet::Malformed("an atom has an unknown rule")),
    };
    let v1::CapabilityAtom { leaf, subleaf, register, mask, value, rule: _ } = atom;
    let register = usize::try_from(register).ok().and_then(|index| CpuidRegister::ALL.get(index).copied());
    let register = register.ok_or(BadSet::Malformed("an atom has an unknown register"))?;
    if value & !mask != 0 {
        return Err(BadSet::Malformed("an atom has bits outside of its mask"));
    }
    Ok(Atom { leaf, subleaf, register, mask, value, rule })
}
