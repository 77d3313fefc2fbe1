//! Laws of the check and of withholding over arbitrary sets, and the words that people read.

use proptest::prelude::*;

use super::CpuidRegister::{Eax, Ebx};
use super::*;

/// A set whose words are drawn from `seed`.
fn set(seed: u64, msrs: &[u32]) -> CapabilitySet {
    let mut cpuid = |leaf: u32, subleaf: u32| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(&leaf.to_le_bytes()).update(&subleaf.to_le_bytes());
        let hash = hasher.finalize();
        std::array::from_fn(|at| {
            let bytes: [u8; 4] = std::array::from_fn(|byte| hash.as_bytes()[4 * at + byte]);
            // Vendors and places of XSAVE components are few in this world.
            if leaf == 0 || (leaf == 0xd && subleaf > 1) { u32::from(bytes[0] & 1) } else { u32::from_le_bytes(bytes) }
        })
    };
    let facts = Facts {
        phys_bits: 36 + (seed % 16) as u32,
        linear_bits: 48,
        tsc_khz: 1000,
        tsc_scaling: false,
        engines: ["soft".to_owned()].into(),
        msrs: msrs.iter().copied().collect(),
    };
    CapabilitySet::from_cpuid("", &mut cpuid, facts)
}

/// A set that asks for at most what `of` has.
fn part(of: &CapabilitySet, seed: u64) -> CapabilitySet {
    let mut part = of.clone();
    for (at, atom) in part.atoms.iter_mut().enumerate().filter(|(_, atom)| atom.rule == Rule::Subset) {
        atom.value &= (seed.rotate_left(at as u32 * 7)) as u32;
    }
    part.facts.phys_bits -= (seed % 3) as u32;
    part.facts.msrs.retain(|msr| msr % 3 != (seed % 3) as u32);
    part
}

fn msrs() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(0u32..2000, 0..20)
}

proptest! {
    #[test]
    fn a_set_passes_on_itself_and_on_whatever_has_more(seed: u64, less: u64, least: u64, msrs in msrs()) {
        let host = set(seed, &msrs);
        let (middle, guest) = (part(&host, less), part(&part(&host, less), least));
        prop_assert_eq!(host.failing_on(&host), []);
        prop_assert_eq!(middle.failing_on(&host), []);
        // What passes on the middle passes on whatever the middle passes on.
        prop_assert_eq!(guest.failing_on(&middle), []);
        prop_assert_eq!(guest.failing_on(&host), []);
        prop_assert!(guest.demands() <= middle.demands() && middle.demands() <= host.demands());
    }

    #[test]
    fn a_refusal_names_exactly_what_is_withheld(seed: u64, at: prop::sample::Index, bit in 0u32..32) {
        let guest = set(seed, &[0x3b]);
        let subsets: Vec<&Atom> = guest.atoms.iter().filter(|atom| atom.rule == Rule::Subset).collect();
        let place = subsets[at.index(subsets.len())].place(bit);
        let withheld = Withheld::parse(&place.to_string()).unwrap();
        let mut host = guest.clone();
        host.withhold(&withheld);
        let had = subsets[at.index(subsets.len())].value & (1 << bit) != 0;
        let expected = if had { vec![Failing::Bit(place)] } else { vec![] };
        prop_assert_eq!(guest.failing_on(&host), expected);
        prop_assert_eq!(host.failing_on(&guest), [], "less is not missed");
        prop_assert_eq!(guest.demands() - host.demands(), usize::from(had));
        let again = host.clone();
        host.withhold(&withheld);
        prop_assert_eq!(host, again);
    }

    #[test]
    fn sets_differ_exactly_where_one_lacks_what_the_other_has(a: u64, b: u64, ma in msrs(), mb in msrs()) {
        let (a, b) = (set(a, &ma), set(b, &mb));
        let (there, back) = (a.differences(&b), b.differences(&a));
        prop_assert_eq!(a.differences(&a), []);
        let mirrored: Vec<_> = back.into_iter().map(|d| Difference { what: d.what, a: d.b, b: d.a }).collect();
        prop_assert_eq!(&there, &mirrored);
        let equal = a.failing_on(&b).is_empty() && b.failing_on(&a).is_empty();
        prop_assert_eq!(there.is_empty(), equal, "{:?}", there);
        for failing in a.failing_on(&b) {
            if let Failing::Bit(place) = failing {
                let row = there.iter().find(|row| row.what == place.to_string()).unwrap();
                prop_assert_eq!((row.a.as_str(), row.b.as_str()), ("yes", "no"));
            }
        }
    }

    #[test]
    fn every_place_parses_from_its_own_words(leaf: u32, subleaf in 0u32..64, register in 0usize..4, bit in 0u32..32) {
        let place = Place { leaf, subleaf, register: CpuidRegister::ALL[register], bit };
        prop_assert_eq!(place.to_string().parse(), Ok(place));
    }

    #[test]
    fn text_that_is_no_feature_never_panics(text: String) {
        let _ = Withheld::parse(&text);
        let _ = text.parse::<Place>();
    }
}

#[test]
fn places_and_msrs_print_as_the_manual_writes_them() {
    let avx2 = Place { leaf: 7, subleaf: 0, register: Ebx, bit: 5 };
    assert_eq!(avx2.to_string(), "CPUID 0000_0007.0 EBX[5] avx2");
    assert_eq!(
        Place { leaf: 0x8000_000a, subleaf: 0, register: CpuidRegister::Edx, bit: 3 }.to_string(),
        "CPUID 8000_000A.0 EDX[3] nrip_save"
    );
    assert_eq!(
        Place { bit: 31, ..Place { leaf: 0x7, subleaf: 9, register: Eax, bit: 0 } }.to_string(),
        "CPUID 0000_0007.9 EAX[31]"
    );
    assert_eq!(Failing::Msr(0xc001_1029).to_string(), "MSR C001_1029 DE_CFG");
    assert_eq!(Failing::Msr(7).to_string(), "MSR 0000_0007");
}

#[test]
fn features_are_withheld_by_name_place_and_number() {
    for text in ["avx2", "AVX2", "CPUID 0000_0007.0 EBX[5]", "cpuid 7.0 ebx[5] avx2"] {
        let mut host = set(1, &[0xc001_1029]);
        for atom in host.atoms.iter_mut().filter(|atom| (atom.leaf, atom.register) == (7, Ebx)) {
            atom.value |= 1 << 5;
        }
        let guest = host.clone();
        host.withhold(&Withheld::parse(text).unwrap());
        let text: Vec<String> = guest.failing_on(&host).iter().map(Failing::to_string).collect();
        assert_eq!(text, ["CPUID 0000_0007.0 EBX[5] avx2"]);
    }
    for text in ["de_cfg", "MSR C001_1029", "msr 0xc0011029"] {
        let mut host = set(1, &[0xc001_1029, 1]);
        host.withhold(&Withheld::parse(text).unwrap());
        assert_eq!(host.facts.msrs, [1].into(), "{text}");
    }
    for text in ["", "avx9", "MSR xyz", "CPUID", "CPUID 7.0 EBX", "CPUID 7.0 EBX[32]", "CPUID 7.0 ESI[1]"] {
        assert_eq!(Withheld::parse(text), Err(Unknown(text.to_owned())));
    }
}

#[test]
fn a_feature_of_both_vendors_leaves_is_withheld_in_both() {
    let places = names::places("fxsr");
    assert_eq!(places.iter().map(|place| place.leaf).collect::<Vec<_>>(), [1, 0x8000_0001]);
}

#[test]
fn a_set_in_words_names_every_bit() {
    let lines = set(3, &[0x200, 0x201, 0x277]).lines();
    let line =
        |what: &str| lines.iter().find(|line| line.what == what).unwrap_or_else(|| panic!("no {what}")).has.clone();
    assert_eq!(line("MSRs"), ["MTRRphys", "PAT"]);
    assert_eq!(line("TSC"), ["1000 kHz"]);
    let word = set(3, &[]).atoms.iter().find(|atom| (atom.leaf, atom.register) == (7, Ebx)).unwrap().value;
    assert_eq!(line("CPUID 0000_0007.0 EBX").len(), word.count_ones() as usize);
}

#[test]
fn rates_that_hosts_measured_of_one_crystal_are_one() {
    let tsc = |khz| {
        let mut host = set(1, &[]);
        host.facts.tsc_khz = khz;
        host
    };
    let guest = tsc(2_600_000);
    assert_eq!(guest.failing_on(&tsc(2_600_000 + 649)), []);
    assert_eq!(guest.failing_on(&tsc(2_600_000 - 649)), []);
    let slower = guest.failing_on(&tsc(2_600_000 - 651));
    assert!(matches!(slower[..], [Failing::TscRate { guest: 2_600_000, host: 2_599_349 }]), "{slower:?}");
    assert!(!same_rate(1, 0) && same_rate(0, 0) && !same_rate(u64::MAX, 1) && same_rate(u64::MAX, u64::MAX));
}
