//! The frozen model stays frozen, refusals name the bit, and the saved form takes only its own bytes.

use super::CpuidRegister::{Eax, Ebx, Ecx, Edx};
use super::*;
use crate::cpu::{RunState, gpr};
use crate::vmcb::Vmcb;
use crate::vmcb::check::violations;
use crate::vmcb::registers::{cr0, cr4, efer};
use proptest::prelude::*;

const ONE: Topology = Topology { vcpu: 0, vcpus: 1, tsc_hz: 1_000_000_000 };

/// Every leaf that answers, as one digest: a change of any bit would break guests that were booted with the model.
fn digest(model: CpuModel) -> String {
    let mut hasher = blake3::Hasher::new();
    for topology in [ONE, Topology { vcpu: 2, vcpus: 4, tsc_hz: 2_500_000_000 }] {
        for leaf in (0..0x20).chain(0x4000_0000..0x4000_0020).chain(0x8000_0000..0x8000_0040) {
            for subleaf in 0..3 {
                for word in model.cpuid(leaf, subleaf, &topology) {
                    hasher.update(&word.to_le_bytes());
                }
            }
        }
    }
    for row in msr::ROWS.iter().filter_map(|row| model.msr(row.first)) {
        hasher.update(format!("{row:?}").as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[test]
fn models_are_frozen() {
    assert_eq!(digest(CpuModel::SoftV1), FROZEN);
    assert_eq!(digest(CpuModel::X86V1), FROZEN_V1);
    assert_eq!(digest(CpuModel::X86V2), FROZEN_V2);
    let hardware = CpuModel::ALL.into_iter().filter(|model| matches!(model, CpuModel::Hardware(_)));
    let hardware: Vec<(&str, String)> = hardware.map(|model| (model.name(), digest_with_xsave(model))).collect();
    let hardware: Vec<(&str, &str)> = hardware.iter().map(|(name, digest)| (*name, digest.as_str())).collect();
    assert_eq!(hardware, FROZEN_HARDWARE);
}

/// The same with all of leaf D, and the MSRs that a model has of its own.
fn digest_with_xsave(model: CpuModel) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(digest(model).as_bytes());
    for subleaf in 0..64 {
        for word in model.cpuid(0xd, subleaf, &ONE) {
            hasher.update(&word.to_le_bytes());
        }
    }
    for msr in [0x48, 0x49] {
        hasher.update(format!("{:?}", model.msr(msr)).as_bytes());
    }
    hasher.update(format!("{:?}", model.limits()).as_bytes());
    hasher.finalize().to_hex().to_string()
}

const FROZEN_HARDWARE: [(&str, &str); 4] = [
    ("x86-64-v3", "a37800f56d384066b103f9f882feb2acbf993c32a7ddee26463cd705b3d645dc"),
    ("zen2", "bb37beebebf04588b3123830568dbc4fb24711e763f174bc2922725af0979812"),
    ("zen3", "d40e25533c2352c75b184e12d372e2e5f6d94de495971a124768c48c8e603449"),
    ("zen4", "0c6e89d8424b5642e6918348325fd941e21b3af474950d80a3f1da4e46d3ab3d"),
];

fn named(name: &str) -> CpuModel {
    CpuModel::by_name(name).unwrap()
}

#[test]
fn models_of_hardware_have_what_their_names_promise() {
    let has = |name: &str, leaf, register: CpuidRegister, bits: &[u32]| {
        let word = named(name).cpuid(leaf, 0, &ONE)[register as usize];
        bits.iter().all(|bit| word & (1 << bit) != 0)
    };
    for name in ["x86-64-v3", "zen2", "zen3", "zen4"] {
        // System V ABI, level 3: AVX, AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE, OSXSAVE.
        assert!(has(name, 1, Ecx, &[12, 22, 26, 28, 29]) && has(name, 7, Ebx, &[3, 5, 8]), "{name}");
        assert!(has(name, 0x8000_0001, Ecx, &[0, 5]), "{name}");
        assert!(!has(name, 1, Ecx, &[27]), "{name}: OSXSAVE is the guest's to set");
        assert!(named(name).limits().cr4 & cr4::OSXSAVE != 0);
        let below = CpuModel::X86V2.contract(1000);
        assert!(below.failing_on(&named(name).contract(1000)).is_empty(), "{name} is less than x86-64-v2");
    }
    // System V ABI, level 4: AVX512 F, DQ, CD, BW, VL.
    assert!(has("zen4", 7, Ebx, &[16, 17, 28, 30, 31]) && !has("zen3", 7, Ebx, &[16]));
    for pair in ["x86-64-v3", "zen2", "zen3", "zen4"].windows(2) {
        let [less, more] = [pair[0], pair[1]].map(|name| named(name).contract(1000));
        assert_eq!(less.failing_on(&more), [], "{} on {}", pair[0], pair[1]);
        assert_ne!(more.failing_on(&less), [], "{} on {}", pair[1], pair[0]);
    }
}

#[test]
fn xsave_leaves_say_where_amd_puts_components() {
    let leaf = |name: &str, subleaf| named(name).cpuid(0xd, subleaf, &ONE);
    assert_eq!(leaf("x86-64-v3", 0), [7, 576, 832, 0]);
    assert_eq!((leaf("x86-64-v3", 1), leaf("x86-64-v3", 2)), ([0; 4], [256, 0x240, 0, 0]));
    assert_eq!((leaf("zen2", 0), leaf("zen2", 9)), ([7, 576, 832, 0], [0; 4]));
    // An EPYC 7003 and an EPYC 9004: PKRU lies behind AVX512 on both.
    assert_eq!((leaf("zen3", 0), leaf("zen3", 9)), ([0x207, 576, 0x988, 0], [8, 0x980, 0, 0]));
    assert_eq!((leaf("zen4", 0), leaf("zen4", 5)), ([0x2e7, 576, 0x988, 0], [64, 0x340, 0, 0]));
    assert_eq!((leaf("zen4", 6), leaf("zen4", 7)), ([512, 0x380, 0, 0], [1024, 0x580, 0, 0]));
    assert_eq!(leaf("zen4", 10), [0; 4]);
}

#[test]
fn the_software_engine_refuses_models_of_hardware_by_what_it_lacks() {
    let refused = named("x86-64-v3").contract(1000).failing_on(&soft_host());
    let text: Vec<String> = refused.iter().map(ToString::to_string).collect();
    assert_eq!(
        text,
        [
            "CPUID 0000_0001.0 ECX[12] fma",
            "CPUID 0000_0001.0 ECX[22] movbe",
            "CPUID 0000_0001.0 ECX[26] xsave",
            "CPUID 0000_0001.0 ECX[28] avx",
            "CPUID 0000_0001.0 ECX[29] f16c",
            "CPUID 0000_0007.0 EBX[3] bmi1",
            "CPUID 0000_0007.0 EBX[5] avx2",
            "CPUID 0000_0007.0 EBX[8] bmi2",
            "CPUID 0000_000D.0 EAX[0] xcr0_x87",
            "CPUID 0000_000D.0 EAX[1] xcr0_sse",
            "CPUID 0000_000D.0 EAX[2] xcr0_avx",
            "CPUID 0000_000D.2 EAX (size of XSAVE component 2) = 0000_0100 (the host has 0000_0000)",
            "CPUID 0000_000D.2 EBX (offset of XSAVE component 2) = 0000_0240 (the host has 0000_0000)",
            "one of the engines kvm (the host has soft)",
        ]
    );
    for name in ["zen2", "zen3", "zen4"] {
        let refused = named(name).contract(1000).failing_on(&soft_host());
        assert!(refused.contains(&Failing::Msr(0x48)), "{name}: {refused:?}");
    }
}

#[test]
fn speculation_control_is_there_where_it_is_promised() {
    for (name, there) in [("x86-64-v3", false), ("zen2", true), ("zen4", true)] {
        let model = named(name);
        assert_eq!((model.msr(0x48).is_some(), model.msr(0x49).is_some()), (there, there), "{name}");
        assert_eq!(model.saved_msrs().any(|(msr, _)| msr == 0x48), there, "{name}");
        assert!(model.saved_msrs().all(|(msr, _)| msr != 0x49), "{name}: a command is no state");
        let state = model.power_up(&ONE);
        assert!(state.msrs.keys().all(|msr| model.msr(*msr).is_some()), "{name}");
    }
    assert!(named("zen2").msr(0x48).unwrap().accepts(0, 4) && !named("zen2").msr(0x48).unwrap().accepts(0, 1));
}

#[test]
fn each_level_is_less_than_the_next() {
    let [more, less, least] =
        [CpuModel::SoftV1, CpuModel::X86V2, CpuModel::X86V1].map(|model| model.contract(1_000_000));
    assert!(less.atoms.iter().zip(&least.atoms).all(|(less, least)| least.value & !less.value == 0));
    assert_eq!(least.failing_on(&soft_host()), []);
    assert_eq!(less.failing_on(&soft_host()), []);
    assert!(more.atoms.iter().zip(&less.atoms).all(|(more, less)| less.value & !more.value == 0));
    let state = CpuModel::X86V2.power_up(&ONE);
    assert!(state.msrs.keys().all(|msr| CpuModel::X86V2.msr(*msr).is_some()) && !state.msrs.contains_key(&0xc000_0103));
    let row = CpuModel::X86V2.msr(0xc000_0080).unwrap();
    assert!(!row.accepts(0xd01, 0xd01 | efer::AIBRSE) && row.accepts(0, efer::NXE));
}

const FROZEN_V1: &str = "0b4b681e0cff3443cb56f4897073b3d1f4f92321bb16042eb633f485828c525b";
const FROZEN_V2: &str = "b81a067276fb1ae74898a4d9c7369622efdefb9411c245ad9e53d8e4054745f2";
const FROZEN: &str = "2f28614531c142a6b209bbd344fd19764401936f59cfd29dba4ec084e145f779";

fn has(leaf: u32, register: CpuidRegister, bit: u32) -> bool {
    CpuModel::SoftV1.cpuid(leaf, 0, &ONE)[register as usize] & (1 << bit) != 0
}

#[test]
fn the_features_are_those_of_x86_64_v2_and_no_more() {
    // System V ABI, levels v1 and v2.
    for bit in [0, 8, 15, 23, 24, 25, 26] {
        assert!(has(1, Edx, bit), "1.EDX {bit}");
    }
    for bit in [0, 9, 13, 19, 20, 23] {
        assert!(has(1, Ecx, bit), "1.ECX {bit}");
    }
    assert!(has(0x8000_0001, Ecx, 0) && has(0x8000_0001, Edx, 11) && has(0x8000_0001, Edx, 29));
    // PCLMUL, FMA, PCID, MOVBE, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
    for bit in [1, 12, 17, 22, 25, 26, 27, 28, 29, 30] {
        assert!(!has(1, Ecx, bit), "1.ECX {bit}");
    }
    // BMI1, AVX2, BMI2, INVPCID, RDSEED, SMAP.
    for bit in [3, 5, 8, 10, 18, 20] {
        assert!(!has(7, Ebx, bit), "7.EBX {bit}");
    }
    assert_eq!(CpuModel::SoftV1.cpuid(7, 0, &ONE)[2], 0, "no UMIP, PKU, LA57");
    assert!(!has(0x8000_0001, Ecx, 2), "no SVM");
    assert_eq!(CpuModel::SoftV1.cpuid(0xd, 0, &ONE), [0; 4]);
}

#[test]
fn what_spares_guests_their_mitigations_is_there_and_usable() {
    for (register, bits) in [(Eax, &[2, 6, 8, 29][..]), (Ecx, &[1, 2])] {
        assert!(bits.iter().all(|&bit| has(0x8000_0021, register, bit)));
    }
    assert!(has(0x8000_0008, Ebx, 26) && has(0x8000_0008, Ebx, 29));
    let row = CpuModel::SoftV1.msr(0xc000_0080).unwrap();
    assert!(row.accepts(0xd01, 0xd01 | efer::AIBRSE), "AutoIBRS can be turned on");
    assert!(!row.accepts(0, efer::SVME) && !row.accepts(0, efer::FFXSR));
}

#[test]
fn identity_reads_as_text() {
    let text = |leaves: &[u32], order: [usize; 4], take: usize| -> String {
        let bytes = leaves.iter().flat_map(|&leaf| {
            let answer = CpuModel::SoftV1.cpuid(leaf, 0, &ONE);
            order.into_iter().take(take).flat_map(move |register| answer[register].to_le_bytes())
        });
        String::from_utf8(bytes.collect()).unwrap().trim_end_matches('\0').to_owned()
    };
    assert_eq!(text(&[0], [1, 3, 2, 0], 3), "AuthenticAMD");
    assert_eq!(text(&[0x4000_0000], [1, 2, 3, 0], 3), "KVMKVMKVM");
    assert_eq!(text(&[0x8000_0002, 0x8000_0003, 0x8000_0004], [0, 1, 2, 3], 4), "Godwit soft-v1");
    let signature = CpuModel::SoftV1.cpuid(1, 0, &ONE)[0];
    assert_eq!((signature >> 8 & 0xf) + (signature >> 20 & 0xff), 0x19, "family");
    assert_eq!(signature >> 4 & 0xf | signature >> 12 & 0xf0, 0x11, "model");
}

#[test]
fn leaves_vary_by_vcpu_where_they_must() {
    let topology = Topology { vcpu: 2, vcpus: 4, tsc_hz: 2_500_000_000 };
    let [_, ebx, _, edx] = CpuModel::SoftV1.cpuid(1, 0, &topology);
    assert_eq!((ebx >> 24, ebx >> 16 & 0xff, edx >> 28 & 1), (2, 4, 1));
    assert_eq!(CpuModel::SoftV1.cpuid(0x8000_0008, 0, &topology)[2], 0x2003);
    assert_eq!(CpuModel::SoftV1.cpuid(0x4000_0010, 0, &topology)[..2], [2_500_000, 2_500_000]);
    assert_eq!(CpuModel::SoftV1.cpuid(0x8000_0008, 0, &ONE)[0], 0x3030);
}

#[test]
fn power_up_is_reset_with_the_contract_in_it() {
    let first = CpuModel::SoftV1.power_up(&ONE);
    assert_eq!(first.gprs[gpr::RDX], u64::from(soft_v1::SIGNATURE));
    assert_eq!((first.msrs[&0x277], first.msrs[&0x2ff]), (0x0007_0406_0007_0406, 0x806));
    assert!(!first.msrs.contains_key(&0xc000_0080) && !first.msrs.contains_key(&0x800));
    assert_eq!(first.run_state, RunState::Runnable);
    assert_eq!(CpuModel::SoftV1.power_up(&Topology { vcpu: 1, ..ONE }).run_state, RunState::Uninitialised);
    let back = CpuState::from_bytes(&first.to_bytes()).unwrap();
    assert_eq!(back, first);
}

#[test]
fn a_guest_in_long_mode_passes_the_checks_of_vmrun() {
    let mut state = CpuModel::SoftV1.power_up(&ONE);
    state.cr0 = cr0::PE | cr0::PG;
    state.cr4 = cr4::PAE | cr4::SMEP;
    state.efer = efer::LME | efer::LMA | efer::AIBRSE;
    let mut vmcb = Vmcb::boxed();
    state.to_vmcb(&mut vmcb);
    vmcb.control.np_enable = 1;
    vmcb.control.guest_asid = 1;
    vmcb.control.set_intercept(crate::vmcb::Intercept::VMRUN, true);
    assert_eq!(violations(&vmcb, CpuModel::SoftV1.limits()), []);
}

#[test]
fn msr_rows_are_sorted_and_apart() {
    for pair in msr::ROWS.windows(2) {
        assert!(pair[0].first + pair[0].count <= pair[1].first, "{} and {}", pair[0].name, pair[1].name);
    }
    for row in msr::ROWS {
        assert_eq!(msr::find(row.first), Some(row));
        assert_eq!(msr::find(row.first + row.count - 1), Some(row));
        if row.home == msr::Home::Saved && row.form != msr::Form::ReadOnly {
            assert!(row.accepts(row.reset, row.reset), "{} refuses its own reset value", row.name);
        }
    }
    for absent in [0, 0x48, 0x49, 0x210, 0x900, 0xc000_0104, 0xc001_0114, u32::MAX] {
        assert_eq!(msr::find(absent), None, "{absent:#x}");
    }
    let legal = |index, current, value| msr::find(index).unwrap().accepts(current, value);
    assert!(!legal(0xc000_0082, 0, 1 << 47), "LSTAR must be canonical");
    assert!(!legal(0x277, 0, 2) && legal(0x277, 0, 0x0007_0406_0001_0406));
    assert!(legal(0xc001_1029, 2, 2) && !legal(0xc001_1029, 2, 0), "LFENCE stays serialising");
    assert!(!legal(0x8b, 0, 0));
}

#[test]
fn the_soft_host_runs_the_soft_contract_at_any_rate() {
    assert_eq!(CpuModel::by_name("soft-v1"), Some(CpuModel::SoftV1));
    assert_eq!(CpuModel::by_name("soft-v0"), None);
    assert_eq!(CpuModel::SoftV1.contract(2_596_000).failing_on(&soft_host()), []);
}

#[test]
fn a_refusal_names_each_missing_thing() {
    let guest = CpuModel::SoftV1.contract(1_000_000);
    let mut host = soft_host();
    for atom in &mut host.atoms {
        match (atom.leaf, atom.register) {
            (1, Ecx) => atom.value &= !(1 << 20 | 1 << 23),
            (0, Ebx) => atom.value = 0x756e_6547,
            (0x8000_0021, Ecx) => atom.value = 2,
            _ => {}
        }
    }
    host.facts.phys_bits = 40;
    host.facts.tsc_scaling = false;
    host.facts.engines = ["xen".to_owned()].into();
    host.facts.msrs.remove(&0xc001_1029);
    let text: Vec<String> = guest.failing_on(&host).iter().map(Failing::to_string).collect();
    assert_eq!(
        text,
        [
            "CPUID 0000_0000.0 EBX (vendor) = 6874_7541 (the host has 756E_6547)",
            "CPUID 0000_0001.0 ECX[20] sse4.2",
            "CPUID 0000_0001.0 ECX[23] popcnt",
            "CPUID 8000_0021.0 ECX[2] tsa_l1_no",
            "48 physical address bits (the host has 40)",
            "a TSC of 1000000 kHz (the host's runs at 0 kHz and cannot be scaled)",
            "one of the engines kvm, soft (the host has xen)",
            "MSR C001_1029 DE_CFG",
        ]
    );
}

#[test]
fn the_three_rules_point_the_right_way() {
    let atom = |rule, value| Atom { leaf: 9, subleaf: 0, register: Eax, mask: 0xff, value, rule };
    let set = |rule, value| {
        let facts = Facts { engines: ["soft".to_owned()].into(), ..Facts::default() };
        CapabilitySet { model: String::new(), atoms: vec![atom(rule, value)], facts }
    };
    let passes = |rule, guest, host| set(rule, guest).failing_on(&set(rule, host)).is_empty();
    assert!(passes(Rule::Subset, 0b0101, 0b1101) && !passes(Rule::Subset, 0b1101, 0b0101));
    assert!(passes(Rule::Equal, 7, 7) && !passes(Rule::Equal, 6, 7) && !passes(Rule::Equal, 7, 6));
    assert!(passes(Rule::NotGreater, 6, 7) && passes(Rule::NotGreater, 7, 7) && !passes(Rule::NotGreater, 8, 7));
}

#[test]
fn xsave_components_must_lie_at_the_same_place() {
    let set = |pkru_offset: u32| {
        let mut cpuid = |leaf, subleaf| match (leaf, subleaf) {
            (0xd, 0) => [0x207, 0, 0, 0],
            (0xd, 2) => [256, 0x240, 0, 0],
            (0xd, 9) => [8, pkru_offset, 0, 0],
            _ => [0; 4],
        };
        let facts = Facts { engines: ["kvm".to_owned()].into(), ..Facts::default() };
        CapabilitySet::from_cpuid("", &mut cpuid, facts)
    };
    assert_eq!(set(0x980).failing_on(&set(0x980)), []);
    let failing = set(0x980).failing_on(&set(0xa80));
    assert!(matches!(failing[..], [Failing::Field { guest: Atom { leaf: 0xd, subleaf: 9, .. }, host: 0xa80 }]));
}

#[test]
fn every_bit_that_the_model_sets_has_a_name() {
    for atom in CpuModel::ALL.iter().flat_map(|model| model.contract(0).atoms) {
        for bit in (0..32).filter(|bit| atom.rule == Rule::Subset && atom.value & (1 << bit) != 0) {
            assert!(names::name(atom.place(bit)).is_some(), "{atom:x?} bit {bit}");
        }
    }
    for row in msr::ROWS {
        for index in [row.first, row.first + row.count - 1] {
            assert_eq!(names::msr_name(index), Some(row.name), "MSR {index:x}");
        }
    }
}

#[test]
fn the_saved_form_refuses_what_no_encoder_wrote() {
    type Spoil = fn(&mut proto::v1::CapabilitySet);
    let rows: &[Spoil] = &[
        |set| set.atoms.swap(0, 1),
        |set| set.atoms.insert(0, set.atoms[0]),
        |set| set.atoms[0].register = 4,
        |set| set.atoms[0].rule = 0,
        |set| set.atoms[0].rule = 99,
        |set| set.atoms[0].mask = 0,
        |set| set.engines.reverse(),
        |set| set.msrs.push(0),
        |set| set.model = "x".repeat(65),
        |set| set.msrs = (0..5000).collect(),
    ];
    let good = CpuModel::SoftV1.contract(5).encode();
    assert_eq!(CapabilitySet::decode(good.clone()), Ok(CpuModel::SoftV1.contract(5)));
    for (index, spoil) in rows.iter().enumerate() {
        let mut set = good.clone();
        spoil(&mut set);
        assert!(matches!(CapabilitySet::decode(set), Err(BadSet::Malformed(_))), "row {index}");
    }
}

proptest! {
    #[test]
    fn sets_round_trip_and_corruption_never_panics(khz: u64, at: prop::sample::Index, flip in 1u8..) {
        let set = CpuModel::SoftV1.contract(khz);
        let mut bytes = set.to_bytes();
        prop_assert_eq!(CapabilitySet::from_bytes(&bytes), Ok(set));
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let _ = CapabilitySet::from_bytes(&bytes);
    }

    #[test]
    fn any_msr_and_value_can_be_asked_about(index: u32, current: u64, value: u64) {
        if let Some(row) = CpuModel::SoftV1.msr(index) {
            let _ = row.accepts(current, value);
        }
    }
}
