//! CPU states and a capability set of version 1 as they were written when it was released: every later release reads them.
//!
//! Beside each `cpu-*.bin` lies the same state as text, one line a leaf, and its digest; both are compared. The files of
//! `tests/golden/v1` are only ever added: `GODWIT_GOLDEN=write cargo test -p vmcb-engine --test golden_cpu` writes those
//! that are missing. What this release writes must be the same bytes; if that changes, it is a new version with new files.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]
#![allow(clippy::needless_update, reason = "states gain fields; a golden file has those of its release")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use vmcb_engine::capability::{Atom, CapabilitySet, CpuModel, CpuidRegister, Rule, Topology, soft_host, soft_v1};
use vmcb_engine::cpu::{CpuState, FxState, RunState, gpr};
use vmcb_engine::vmcb::{Event, EventType, Segment};

const CAPABILITIES: &str = "capability-soft-v1.bin";

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1").join(name)
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn topology(vcpu: u32) -> Topology {
    Topology { vcpu, vcpus: 2, tsc_hz: 1_000_000_000 }
}

/// A processor in the middle of everything: no two fields hold the same, none its reset value.
fn busy() -> CpuState {
    let mut fpu = Box::new(FxState::fninit());
    fpu.set_fcw(0x027f);
    fpu.set_fsw(0x3801);
    fpu.set_ftw(0x81);
    fpu.set_fop(0x7bc);
    fpu.set_fip(0x0040_1000);
    fpu.set_fdp(0x7fff_1234_5678);
    fpu.set_mxcsr(0x9fc0);
    (0..8).for_each(|at| fpu.set_st(at, [at as u8 + 1, 2, 3, 4, 5, 6, 7, 0x80, 0xff, 0x3f]));
    (0..16).for_each(|at| fpu.set_xmm(at, 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100 ^ (at as u128) << 64));
    fpu.later = BTreeMap::from([(2, vec![0xaa; 256]), (9, vec![1, 2, 3, 4])]);
    let mut gprs = [0; 16];
    gprs.iter_mut().zip(1u64..).for_each(|(register, n)| *register = n * 0x0101_0101_0101_0101);
    CpuState {
        gprs,
        rip: 0xffff_ffff_8100_0042,
        rflags: 0x0025_0a97,
        es: Segment::new(0x2b, 0xcf3, 0xffff_fff0, 0x10),
        cs: Segment::new(0x33, 0xafb, 0xffff_fff1, 0x20),
        ss: Segment::new(0x3b, 0xcf7, 0xffff_fff2, 0x30),
        ds: Segment::new(0x43, 0xcf1, 0xffff_fff3, 0x40),
        fs: Segment::new(0x4b, 0x4f3, 0xffff_fff4, 0x7f12_3456_7000),
        gs: Segment::new(0x53, 0x8f3, 0xffff_fff5, 0xffff_8880_0000_0000),
        gdtr: Segment::new(0, 0, 0x7f, 0xffff_fe00_0000_1000),
        ldtr: Segment::new(0x58, 0x82, 0x17, 0xffff_fe00_0000_2000),
        idtr: Segment::new(0, 0, 0xfff, 0xffff_fe00_0000_0000),
        tr: Segment::new(0x40, 0x8b, 0x206f, 0xffff_fe00_0000_3000),
        cpl: 3,
        cr0: 0x8005_0033,
        cr2: 0x0000_7fff_dead_b000,
        cr3: 0x0123_4000,
        cr4: 0x0011_06f0,
        cr8: 13,
        efer: 0x0d01,
        xcr0: 0x207,
        drs: [0x1111, 0x2222, 0x3333, 0x4444, 0xffff_4ff1, 0x0003_0401],
        msrs: BTreeMap::from([(0x174, 0x10), (0x277, 0x0007_0406_0007_0506), (0xc000_0082, 0xffff_ffff_8160_0000)]),
        fpu,
        event_injection: Event::exception(14, Some(6)),
        interrupt_shadow: true,
        nmi_masked: true,
        nmi_pending: true,
        run_state: RunState::Halted,
        tsc_offset: 0xffff_ffff_ffff_fc18,
        ..CpuState::reset()
    }
}

/// Every state that has a file.
fn states() -> [(&'static str, CpuState); 3] {
    [
        ("cpu-busy", busy()),
        ("cpu-power-up-soft-v1", CpuModel::SoftV1.power_up(&topology(0))),
        ("cpu-power-up-soft-v1-second", CpuModel::SoftV1.power_up(&topology(1))),
    ]
}

fn text(state: &CpuState) -> String {
    let mut text = String::new();
    state.leaves(&mut |leaf| writeln!(text, "{}: {}", leaf.name, leaf.value).expect("a string has room"));
    writeln!(text, "digest: {}", state.digest()).expect("a string has room");
    text
}

#[test]
fn missing_files_are_written_when_asked() {
    if std::env::var("GODWIT_GOLDEN").as_deref() != Ok("write") {
        return;
    }
    let states = states();
    let mut files = vec![(CAPABILITIES.to_owned(), CpuModel::SoftV1.contract(1_000_000).to_bytes())];
    for (name, state) in &states {
        files.push((format!("{name}.bin"), state.to_bytes()));
        files.push((format!("{name}.txt"), text(state).into_bytes()));
    }
    for (name, bytes) in files {
        if !path(&name).exists() {
            std::fs::write(path(&name), bytes).unwrap();
        }
    }
}

#[test]
fn every_state_is_read_leaf_by_leaf() {
    for (name, state) in states() {
        let found = CpuState::from_bytes(&golden(&format!("{name}.bin"))).unwrap();
        assert_eq!(found.compare(&state), [], "{name}");
        assert_eq!(found, state, "{name}");
        let frozen = String::from_utf8(golden(&format!("{name}.txt"))).unwrap();
        for (found, frozen) in text(&found).lines().zip(frozen.lines()) {
            assert_eq!(found, frozen, "{name}");
        }
        assert_eq!(text(&found).len(), frozen.len(), "{name}");
    }
}

#[test]
fn this_release_writes_what_version_1_wrote() {
    for (name, state) in states() {
        assert!(golden(&format!("{name}.bin")) == state.to_bytes(), "{name}");
    }
    assert!(golden(CAPABILITIES) == CpuModel::SoftV1.contract(1_000_000).to_bytes());
}

#[test]
fn the_busy_processor_differs_from_a_reset_one_in_every_field() {
    let (busy, reset) = (text(&busy()), text(&CpuState::reset()));
    let same: Vec<&str> = busy.lines().filter(|line| reset.lines().any(|other| other == *line)).collect();
    // Tables have no selector and no attributes; a descriptor's type is what the register demands.
    let constant = ["gdtr.selector", "gdtr.attrib", "idtr.selector", "idtr.attrib", "ldtr.attrib", "tr.attrib"];
    let unexpected: Vec<&&str> =
        same.iter().filter(|line| !constant.iter().any(|name| line.starts_with(&format!("{name}:")))).collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
}

#[test]
fn words_of_the_busy_processor_are_where_they_belong() {
    let found = CpuState::from_bytes(&golden("cpu-busy.bin")).unwrap();
    assert_eq!((found.gprs[gpr::RAX], found.gprs[15]), (0x0101_0101_0101_0101, 0x1010_1010_1010_1010));
    assert_eq!((found.rip, found.cpl, found.cr8, found.run_state), (0xffff_ffff_8100_0042, 3, 13, RunState::Halted));
    assert_eq!(found.gs, Segment { selector: 0x53, attrib: 0x8f3, limit: 0xffff_fff5, base: 0xffff_8880_0000_0000 });
    assert_eq!(found.msrs.get(&0xc000_0082), Some(&0xffff_ffff_8160_0000));
    let event = found.event_injection;
    assert_eq!((event.kind(), event.vector(), event.error()), (Some(EventType::Exception), 14, Some(6)));
    assert_eq!((found.fpu.fcw(), found.fpu.mxcsr(), found.fpu.st(7)[0]), (0x027f, 0x9fc0, 8));
    assert_eq!(found.fpu.xmm(15), 0x0f0e_0d0c_0b0a_0907_0706_0504_0302_0100);
    assert_eq!(found.fpu.later[&9], [1, 2, 3, 4]);
}

#[test]
fn power_up_is_what_the_manual_says() {
    let first = CpuState::from_bytes(&golden("cpu-power-up-soft-v1.bin")).unwrap();
    assert_eq!((first.rip, first.cs.base, first.cr0, first.rflags), (0xfff0, 0xffff_0000, 0x6000_0010, 2));
    assert_eq!((first.gprs[gpr::RDX], first.run_state), (u64::from(soft_v1::SIGNATURE), RunState::Runnable));
    assert_eq!(first.msrs.get(&0x277), Some(&0x0007_0406_0007_0406));
    let second = CpuState::from_bytes(&golden("cpu-power-up-soft-v1-second.bin")).unwrap();
    assert_eq!(second.run_state, RunState::Uninitialised);
    assert_eq!(CpuState { run_state: RunState::Runnable, ..second }, first);
}

#[test]
fn changed_bytes_never_panic_and_never_pass_as_what_they_were() {
    for (name, state) in states() {
        let bytes = golden(&format!("{name}.bin"));
        let mut unseen = 0;
        for at in 0..bytes.len() {
            for flip in [0xff, 1 << (at % 8)] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                // The frame around a section refuses a change; what gets this far must still be a state or an error.
                let Ok(found) = CpuState::from_bytes(&changed) else { continue };
                assert_eq!(CpuState::from_bytes(&found.to_bytes()).as_ref(), Ok(&found), "{name}: byte {at}");
                unseen += usize::from(found == state);
            }
        }
        // Only another spelling of the same number is no change: `true` as 3, a u32 with bits above 32.
        assert!(unseen * 100 < bytes.len(), "{name}: {unseen} changes unseen");
    }
}

#[test]
fn every_cut_is_an_error_or_another_state() {
    for (name, state) in states() {
        let bytes = golden(&format!("{name}.bin"));
        for at in 0..bytes.len() {
            assert_ne!(CpuState::from_bytes(&bytes[..at]).ok().as_ref(), Some(&state), "{name}: cut at {at}");
        }
    }
}

#[test]
fn the_contract_of_soft_v1_is_read_and_runs_here() {
    let contract = CapabilitySet::from_bytes(&golden(CAPABILITIES)).unwrap();
    assert_eq!((contract.model.as_str(), contract.facts.phys_bits, contract.facts.linear_bits), ("soft-v1", 48, 48));
    assert_eq!((contract.facts.tsc_khz, contract.facts.tsc_scaling), (1_000_000, false));
    assert!(contract.facts.engines.iter().eq(["kvm", "soft"]));
    assert!(contract.facts.msrs.contains(&0xc000_0082));
    let vendor = Atom {
        leaf: 0,
        subleaf: 0,
        register: CpuidRegister::Ebx,
        mask: u32::MAX,
        value: u32::from_le_bytes(*b"Auth"),
        rule: Rule::Equal,
    };
    assert!(contract.atoms.contains(&vendor));
    assert_eq!(contract.failing_on(&soft_host()), [], "a guest of the first release runs on this one");
}
