//! Exactness of replay: what was recorded is the same again however the engine does its work, wherever it is begun, and
//! although the recorded machine went to another host half way. Guests: the rich one of `recorded`, and a real Linux.
//!
//! `GODWIT_REPLAY_SEED` chooses what happens to them. No guest here relies on translations that it should have flushed: for
//! such a one the size of the TLB is part of the machine (`engine/soft/tlb.rs`).
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod recorded;
mod replaying;

use std::time::Instant;

use recorded::{linux, rich};
use replaying::*;
use vmcb_engine::engine::soft::Tuning;
use vmcb_engine::journal::{Event, Position};
use vmcb_engine::replay::{Entry, Goal, Happening, Pause, Player, Spacing, Timeline};

fn seed() -> u64 {
    std::env::var("GODWIT_REPLAY_SEED").ok().and_then(|value| value.parse().ok()).unwrap_or(0x2545_f491)
}

fn never() -> bool {
    false
}

fn tuned(tlb_halvings: u32, block_ops_max: usize) -> Tuning {
    Tuning { tlb_halvings, block_ops_max }
}

/// How a replay is done.
#[derive(Clone, Copy, Debug)]
struct Way {
    tuning: Tuning,
    /// Longest piece.
    piece: u64,
}

const WHOLE: u64 = u64::MAX / 2;

/// Digests that a tape names.
fn digests(player: &Player) -> u64 {
    let entries = player.tape().entries().iter();
    entries.filter(|it| matches!(it.happening, Happening::Cut(_) | Happening::Event(Event::Probe(_)))).count() as u64
}

fn run_to(player: &mut Player, to: Position, way: Way, random: &mut Random) {
    while player.position() < to {
        let piece = player.position().retired.saturating_add(1 + random.below(way.piece));
        assert_eq!(player.run_to(Goal::position(to).or_instruction(piece), &mut never).unwrap(), Pause::Reached);
    }
}

/// From a base to the end: every sight and every digest of the tape is what was recorded.
fn replays(recorded: &Recorded, base: &Base, way: Way) {
    let (begun, mut random) = (Instant::now(), Random(seed()));
    let mut player = recorded.player_tuned(base, way.tuning);
    for (position, seen) in recorded.sights.iter().filter(|(position, _)| *position > base.position) {
        run_to(&mut player, *position, way, &mut random);
        assert!(sight(player.machine()) == *seen, "{way:?} from {}: at {position}", base.position);
    }
    assert_eq!(player.run_to(Goal::instruction(u64::MAX), &mut never).unwrap(), Pause::End);
    assert_eq!(player.compared().0, digests(&player), "{way:?}");
    if base.position == recorded.bases[0].position {
        let said: Vec<u8> = player.console().iter().flat_map(|said| said.bytes.clone()).collect();
        assert!(said == recorded.console, "{way:?}: the console differs");
    }
    println!("{way:?} from {}: {} digests, {:?}", base.position, player.compared().0, begun.elapsed());
}

/// The replay itself goes to another machine wherever a capture is part of what was recorded.
fn replays_on_many_machines(recorded: &Recorded, tunings: &[Tuning]) {
    let mut tunings = tunings.iter().copied().cycle();
    let whole = recorded.tape(recorded.bases[0].position);
    let entries = whole.entries();
    let alone = |at: usize| entries.get(at + 1).is_some_and(|next| next.position > entries[at].position);
    let cuts = (1..entries.len()).filter(|at| matches!(entries[*at].happening, Happening::Cut(_)) && alone(*at));
    let mut player = recorded.player_tuned(&recorded.bases[0], tunings.next().unwrap());
    let mut moves = 0;
    for cut in cuts {
        let position = entries[cut].position;
        assert_eq!(player.run_to(Goal::position(position), &mut never).unwrap(), Pause::Reached);
        let mut machine = player.into_machine();
        let sections = machine.capture().unwrap();
        player = recorded.player_tuned(&base(&machine, sections), tunings.next().unwrap());
        moves += 1;
    }
    let (end, seen) = recorded.sights.last().unwrap();
    assert_eq!(player.run_to(Goal::position(*end), &mut never).unwrap(), Pause::Reached);
    assert!(sight(player.machine()) == *seen, "after {moves} moves");
    println!("{moves} moves");
    assert!(moves > 0);
}

const DEFAULT: Way = Way { tuning: Tuning { tlb_halvings: 0, block_ops_max: 32 }, piece: WHOLE };

fn ways() -> Vec<Way> {
    let tunings = [tuned(1, 32), tuned(3, 32), tuned(8, 32), tuned(0, 1), tuned(0, 5), tuned(2, 7)];
    let mut ways = vec![DEFAULT; 3];
    ways.extend(tunings.map(|tuning| Way { tuning, piece: WHOLE }));
    ways.extend([977, 30_000].map(|piece| Way { piece, ..DEFAULT }));
    ways.push(Way { tuning: tuned(3, 3), piece: 5000 });
    ways
}

fn plan(resets: bool) -> Plan {
    Plan { resets, moves: true, probe_every: 5003, ..Plan::new(seed(), 1_200_000) }
}

#[test]
fn a_recording_replays_alike_however_the_engine_works() {
    for (vcpus, resets) in [(1, true), (2, false), (2, true)] {
        let recorded = record_guest(rich(vcpus), plan(resets));
        println!("{vcpus} vCPUs: {} sights, {} bases", recorded.sights.len(), recorded.bases.len());
        assert!(recorded.sights.len() > 8 && recorded.bases.len() > 3);
        ways().into_iter().for_each(|way| replays(&recorded, &recorded.bases[0], way));
        recorded.bases[1..].iter().for_each(|base| replays(&recorded, base, DEFAULT));
        replays_on_many_machines(&recorded, &[Tuning::default(), tuned(2, 5), tuned(0, 1)]);
    }
}

#[test]
fn a_recording_is_the_same_however_the_recorded_engine_works() {
    let frames = |tuning| record_guest(rich(2), Plan { tuning, ..plan(true) }).frames;
    let usual = frames(Tuning::default());
    for tuning in [tuned(1, 32), tuned(8, 3), tuned(0, 1)] {
        assert!(frames(tuning) == usual, "{tuning:?}");
    }
}

#[test]
fn what_the_host_fails_to_write_fails_again_in_every_replay() {
    let mut guest = rich(1);
    guest.config.disks[0].path = UNWRITABLE.into();
    let recorded = record_guest(guest, Plan { probe_every: 5003, ..Plan::new(seed() ^ 0x11, 800_000) });
    let tape = recorded.tape(recorded.bases[0].position);
    let failed = |it: &&Entry| matches!(it.happening, Happening::Event(Event::DiskFailed { .. }));
    let failures = tape.entries().iter().filter(failed).count();
    println!("{failures} failures, {} sights, {} bases", recorded.sights.len(), recorded.bases.len());
    assert!(failures > 20 && recorded.sights.len() > 2);
    for way in [DEFAULT, Way { piece: 977, ..DEFAULT }, Way { tuning: tuned(3, 3), piece: 5000 }] {
        replays(&recorded, &recorded.bases[0], way);
    }
    recorded.bases[1..].iter().for_each(|base| replays(&recorded, base, DEFAULT));
    // Rungs lie between where a failure entered and the request that failed.
    let spacing = Spacing { coarse: 10_000, fine: 500, bytes_max: 64 << 20 };
    let mut timeline = Timeline::new(recorded.player(&recorded.bases[0]), spacing).unwrap();
    let (start, end) = (timeline.start().retired, tape.end().retired);
    let mut random = Random(seed());
    timeline.seek(tape.end(), &mut never).unwrap();
    for _ in 0..40 {
        let instant = Position { retired: start + random.below(end - start), skipped_tsc: 0 };
        timeline.seek(instant, &mut never).unwrap();
        timeline.reverse_step(0, &mut never).unwrap();
        timeline.seek(instant, &mut never).unwrap();
        let mut straight = recorded.player(&recorded.bases[0]);
        straight.run_to(Goal::position(instant), &mut never).unwrap();
        assert!(sight(timeline.player().machine()) == sight(straight.machine()), "at {instant}");
    }
}

#[test]
fn the_rich_guest_does_all_that_it_is_for() {
    let recorded = record_guest(rich(2), plan(false));
    let last = recorded.bases.last().unwrap();
    let count = |vector: usize| {
        let at = 0x1a_0000 + vector * 8;
        u64::from_le_bytes(last.ram[at..at + 8].try_into().unwrap())
    };
    // Faults, and from 0x20 on interrupts: timer, typing, packets, disk, entropy, IPIs.
    for vector in [0, 3, 6, 13, 14].into_iter().chain([0x40, 0x41, 0x42, 0x43, 0x44, 0x50].map(|it| it + 0x20)) {
        assert!(count(vector) > 4, "vector {vector:#x}: {}", count(vector));
    }
    let turns = |vcpu: usize| last.ram[0x18_0000 + vcpu * 0x4000 + 24];
    assert!(turns(0) > 10 && turns(1) > 10, "{} {}", turns(0), turns(1));
    assert!(last.disks[0].iter().any(|byte| *byte != 0), "it writes to its disk");
}

#[test]
fn a_linux_replays_alike_however_the_engine_works() {
    let Some(guest) = linux::linux(2) else { return };
    let begun = Instant::now();
    let (after, typed) = ("guest# ", linux::TYPED);
    let usual = Plan::new(seed(), 50_000_000);
    let plan = Plan { after, typed, slice: 6_000_000, moves: true, probe_every: 1_000_003, ..usual };
    let recorded = record_guest(guest, plan);
    println!("recorded in {:?}: {} sights, {} bases", begun.elapsed(), recorded.sights.len(), recorded.bases.len());
    println!("{}", String::from_utf8_lossy(&recorded.console));
    assert!(recorded.console.windows(8).any(|word| word == b"records "), "the disk was read");
    for tuning in [Tuning::default(), tuned(1, 32), tuned(3, 1)] {
        replays(&recorded, &recorded.bases[0], Way { tuning, piece: WHOLE });
    }
    replays(&recorded, &recorded.bases[0], Way { piece: 99_991, ..DEFAULT });
    recorded.bases[1..].iter().for_each(|base| replays(&recorded, base, DEFAULT));
}
