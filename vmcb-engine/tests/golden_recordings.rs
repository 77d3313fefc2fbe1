//! Golden recordings: `golden/recordings/vN` holds recordings of engines whose semantics are version N
//! (`vmcb_engine::journal::SEMANTICS`). Those of the present version are replayed and must be equal at every probe and cut; those
//! of other versions are refused, and the refusal names the version. So a change that a guest can see fails here, until
//! `SEMANTICS` is raised and a new folder written:
//!
//! `GODWIT_WRITE_GOLDEN=1 cargo test -p vmcb-engine --test golden_recordings` writes those of the present version that are
//! missing; it never writes over one.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod recorded;
mod replaying;

use std::path::PathBuf;
use std::sync::Arc;

use proto::frame::{self, Kind};
use proto::v1::JournalBlock;
use recorded::{file, rich};
use replaying::*;
use vmcb_engine::engine::soft::Tuning;
use vmcb_engine::journal::{Chain, ChainError, Event, SEMANTICS};
use vmcb_engine::replay::{BootImages, Entry, Goal, Happening, Pause, PlayError, Player, Rate, Tape};

const BYTES_MAX: u64 = 300 << 10;

fn folder(version: u32) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden", "recordings", &format!("v{version}")].iter().collect()
}

fn never() -> bool {
    false
}

/// What the present version's recordings hold. Not to be changed: a change is a new version, or another name.
fn recordings() -> Vec<(&'static str, Guest, Plan)> {
    let plan = |seed, instructions, probe_every| Plan { probe_every, moves: true, ..Plan::new(seed, instructions) };
    vec![
        ("one-vcpu.gwr", rich(1), plan(11, 400_000, 1009)),
        ("two-vcpus.gwr", rich(2), plan(22, 600_000, 1511)),
        // Typing, cables, packets that nobody reads, and new starts of the machine.
        ("details.gwr", rich(1), plan(44, 400_000, 4001)),
        ("devices.gwr", file::with_image(small()), Plan { resets: true, before: 20, ..plan(33, 500_000, 5003) }),
    ]
}

#[test]
fn missing_recordings_are_written_when_asked() {
    if std::env::var_os("GODWIT_WRITE_GOLDEN").is_none() {
        return;
    }
    std::fs::create_dir_all(folder(SEMANTICS)).unwrap();
    for (name, guest, plan) in recordings() {
        let path = folder(SEMANTICS).join(name);
        if !path.exists() {
            std::fs::write(path, file::bytes(&record_guest(guest, plan))).unwrap();
        }
    }
}

#[test]
fn every_version_has_its_recordings() {
    for version in 1..=SEMANTICS {
        let mut found: Vec<_> = std::fs::read_dir(folder(version)).unwrap().map(|entry| entry.unwrap()).collect();
        found.sort_by_key(std::fs::DirEntry::file_name);
        assert!(found.iter().all(|entry| entry.metadata().unwrap().len() <= BYTES_MAX), "{found:?}");
        let names: Vec<_> = found.iter().map(|entry| entry.file_name().into_string().unwrap()).collect();
        let mut expected: Vec<_> = recordings().iter().map(|(name, ..)| (*name).to_owned()).collect();
        expected.sort();
        // Older versions had other ones, perhaps.
        assert!(if version == SEMANTICS { names == expected } else { !names.is_empty() }, "v{version}: {names:?}");
    }
}

/// Digests that a tape names: of probes, and of cuts.
fn digests(tape: &Tape) -> (usize, usize) {
    let count = |wanted: fn(&Happening) -> bool| tape.entries().iter().filter(|it| wanted(&it.happening)).count();
    (count(|it| matches!(it, Happening::Event(Event::Probe(_)))), count(|it| matches!(it, Happening::Cut(_))))
}

#[test]
fn the_present_version_replays_to_equal_digests() {
    for (name, ..) in recordings() {
        let golden = file::read(&folder(SEMANTICS).join(name));
        for tuning in [Tuning::default(), Tuning { tlb_halvings: 2, block_ops_max: 4 }] {
            let mut player = golden.player_tuned(&golden.bases[0], tuning);
            let end = player.run_to(Goal::instruction(u64::MAX), &mut never);
            let end = end.unwrap_or_else(|e| {
                panic!("{name}: {e}: what guests see has changed; if that must be, raise `journal::SEMANTICS`")
            });
            assert_eq!(end, Pause::End, "{name}");
            let (probes, cuts) = digests(player.tape());
            assert!(probes > 80 && cuts > 3, "{name}: {probes} probes, {cuts} cuts");
            assert_eq!(player.compared().0, (probes + cuts) as u64, "{name}");
        }
    }
}

#[test]
fn the_present_version_records_what_it_recorded() {
    for (name, guest, plan) in recordings() {
        let (golden, again) = (file::read(&folder(SEMANTICS).join(name)), record_guest(guest, plan));
        let [golden, again] = [golden, again].map(|recorded| recorded.tape(recorded.bases[0].position));
        let is_detail = |it: &&Entry| matches!(it.happening, Happening::Event(Event::Detail(_)));
        // Recorders of earlier builds said less of the same machine.
        let detailed = golden.entries().iter().any(|it| is_detail(&it));
        let again = again.entries().iter().filter(|it| detailed || !is_detail(it));
        assert!(golden.entries().iter().eq(again), "{name}: the same history has another recording");
        assert_eq!(detailed, name == "details.gwr", "{name}");
    }
}

/// A golden recording, replayed by a machine to which something is different.
fn changed(name: &str, change: impl FnOnce(&mut Recorded)) -> Result<Pause, PlayError> {
    let mut golden = file::read(&folder(SEMANTICS).join(name));
    change(&mut golden);
    played(&golden, golden.tape(golden.bases[0].position))
}

fn played(recorded: &Recorded, tape: Arc<Tape>) -> Result<Pause, PlayError> {
    let Guest { kernel, initrd, .. } = recorded.guest.clone();
    let machine = recorded.guest.at(&recorded.bases[0], false, Tuning::default());
    let mut player = Player::new(machine, tape, Some(BootImages { kernel, initrd }))?;
    player.run_to(Goal::instruction(u64::MAX), &mut never)
}

fn assert_noticed(what: &str, end: Result<Pause, PlayError>) {
    match end {
        Err(PlayError::Diverged(mismatch)) => println!("{what}: {mismatch}"),
        other => panic!("{what}: {other:?}"),
    }
}

/// Replaces the only place of some bytes in RAM.
fn patch(recorded: &mut Recorded, old: &[u8], new: &[u8]) {
    let ram = &mut recorded.bases[0].ram;
    let places: Vec<usize> =
        ram.windows(old.len()).enumerate().filter(|(_, it)| *it == old).map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "{old:02x?} is not there");
    places.into_iter().for_each(|at| ram[at..at + new.len()].copy_from_slice(new));
}

/// Instructions that mean something else, as they would after a change of the engine.
const CHANGES: [(&str, &[u8], &[u8]); 8] = [
    ("RCPPS XMM0, XMM2 gives what SQRTPS does", &[0x0f, 0x53, 0xc2], &[0x0f, 0x51, 0xc2]),
    ("RSQRTPS XMM0, XMM1 gives what RCPPS does", &[0x0f, 0x52, 0xc1], &[0x0f, 0x53, 0xc1]),
    ("FSIN gives what FCOS does", &[0xd9, 0xfe, 0x41, 0xdb], &[0xd9, 0xff]),
    ("F2XM1 does nothing", &[0xd9, 0xf0, 0x41, 0xdb], &[0xd9, 0xd0]),
    ("the carry of BTC is another one", &[0x0f, 0x92, 0xc0], &[0x0f, 0x93, 0xc0]),
    (
        "CRC32 EDX, R13D gives what XOR does",
        &[0xf2, 0x41, 0x0f, 0x38, 0xf1, 0xd5],
        &[0x66, 0x66, 0x90, 0x44, 0x31, 0xea],
    ),
    ("RDGSBASE gives what RDFSBASE does", &[0xf3, 0x48, 0x0f, 0xae, 0xc8], &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
    ("INVLPG does nothing", &[0x0f, 0x01, 0x38], &[0x0f, 0x1f, 0x00]),
];

#[test]
fn one_change_of_the_machine_is_noticed() {
    for name in ["one-vcpu.gwr", "two-vcpus.gwr"] {
        assert_eq!(changed(name, |_| {}).unwrap(), Pause::End);
        for (what, old, new) in CHANGES {
            assert_noticed(what, changed(name, |recorded| patch(recorded, old, new)));
        }
        let slower = changed(name, |recorded| recorded.guest.config.tsc_per_instruction += 1);
        assert_noticed("an instruction takes four ticks", slower);
        let seeded = changed(name, |recorded| recorded.guest.config.seed[0] ^= 1);
        assert_noticed("another seed of the entropy device", seeded);
    }
}

#[test]
fn one_change_of_what_happened_is_noticed() {
    let golden = file::read(&folder(SEMANTICS).join("one-vcpu.gwr"));
    let rate = Rate::of(&golden.guest.config);
    let altered = |kind: &str, change: &dyn Fn(&mut Vec<vmcb_engine::journal::Stamped>, usize)| {
        let (mut tape, mut chain) = (Tape::new(rate), Chain::new());
        let mut done = false;
        for frame in &golden.frames {
            let mut block = chain.take(frame).unwrap();
            let wanted = |event: &Event| match event {
                Event::Console(_) => kind == "typed",
                Event::Packet { bytes, .. } => kind == "packet" && bytes.len() > 20,
                _ => false,
            };
            let at = block.events.iter().position(|stamped| wanted(&stamped.event)).filter(|_| !done);
            if let Some(at) = at {
                change(&mut block.events, at);
                done = true;
            }
            tape.push(block).unwrap();
        }
        assert!(done, "nothing was {kind}");
        played(&golden, Arc::new(tape))
    };
    assert_noticed(
        "another key",
        altered("typed", &|events, at| {
            let Event::Console(bytes) = &mut events[at].event else { unreachable!() };
            bytes[0] ^= 1;
        }),
    );
    assert_noticed("no key", altered("typed", &|events, at| drop(events.remove(at))));
    assert_noticed("a key one instruction later", altered("typed", &|events, at| events[at].position.retired += 1));
    assert_noticed("no packet", altered("packet", &|events, at| drop(events.remove(at))));
    assert_noticed(
        "another packet",
        altered("packet", &|events, at| {
            let Event::Packet { bytes, .. } = &mut events[at].event else { unreachable!() };
            bytes[3] ^= 0x10;
        }),
    );
}

#[test]
fn other_versions_are_refused_by_name() {
    let mut refused = 0;
    for version in (1..=SEMANTICS).filter(|version| *version != SEMANTICS) {
        for entry in std::fs::read_dir(folder(version)).unwrap() {
            let golden = file::read(&entry.unwrap().path());
            assert_refused(&golden.frames[0], version);
            refused += 1;
        }
    }
    // A later one, and one that never was.
    let golden = file::read(&folder(SEMANTICS).join("devices.gwr"));
    for version in [0, SEMANTICS + 1] {
        let mut block: JournalBlock = frame::decode_message(Kind::Journal, &golden.frames[0]).unwrap();
        block.cut.as_mut().unwrap().semantics = version;
        assert_refused(&frame::encode_message(Kind::Journal, &block), version);
        refused += 1;
    }
    assert!(refused > 1);
}

fn assert_refused(block: &[u8], version: u32) {
    let error = Chain::new().take(block).unwrap_err();
    assert_eq!(error, ChainError::Semantics { found: version });
    assert!(error.to_string().contains(&format!("version {version}")), "{error}");
}
