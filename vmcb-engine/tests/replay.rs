//! Recordings of a small guest, replayed: from each cut, in slices of any length, forwards and backwards, it is the machine
//! that was recorded. `GODWIT_REPLAY_SEED` chooses what happens to it.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod replaying;

use replaying::*;
use vmcb_engine::engine::{Stops, WatchKind, Watchpoint};
use vmcb_engine::journal::Position;
use vmcb_engine::replay::{Arrival, Goal, LastWrite, Pause, PlayError, Player, Spacing, Timeline};

fn seed() -> u64 {
    std::env::var("GODWIT_REPLAY_SEED").ok().and_then(|value| value.parse().ok()).unwrap_or(0x9e37_79b9)
}

fn never() -> bool {
    false
}

/// Runs to a position in pieces of at most so many instructions.
fn run_in_pieces(player: &mut Player, to: Position, piece: &mut dyn FnMut() -> u64) {
    while player.position() < to {
        let goal = Goal::position(to).or_instruction(player.position().retired + piece());
        assert_eq!(player.run_to(goal, &mut never).unwrap(), Pause::Reached);
    }
    assert_eq!(player.position(), to);
}

#[test]
fn a_recording_is_replayed_from_each_cut_in_slices_of_any_length() {
    let recorded = record(seed(), 1_500_000, true);
    println!("{} bases, {} sights, {} blocks", recorded.bases.len(), recorded.sights.len(), recorded.frames.len());
    assert!(recorded.bases.len() > 2 && recorded.sights.len() > 10 && recorded.console.len() > 20);
    for (number, base) in recorded.bases.iter().enumerate() {
        let mut random = Random(seed() + 1);
        let slices: [&mut dyn FnMut() -> u64; 3] =
            [&mut || u64::MAX / 2, &mut || 977, &mut || 1 + random.below(20_000)];
        for (way, slice) in slices.into_iter().enumerate() {
            let mut player = recorded.player(base);
            for (position, seen) in recorded.sights.iter().filter(|(position, _)| *position > base.position) {
                run_in_pieces(&mut player, *position, slice);
                assert_eq!(sight(player.machine()), *seen, "base {number}, way {way}, at {position}");
            }
            let (compared, _) = player.compared();
            assert!(compared as usize >= recorded.bases.len() - number, "{compared}");
            if number == 0 {
                let said: Vec<u8> = player.console().iter().flat_map(|said| said.bytes.clone()).collect();
                assert!(said == recorded.console, "the console differs");
            }
            assert_eq!(player.run_to(Goal::instruction(u64::MAX), &mut never).unwrap(), Pause::End);
        }
    }
}

#[test]
fn what_a_debugger_does_to_a_live_machine_is_replayed_exactly() {
    for round in 0..3 {
        let recorded = record_debugged(seed() + round, 400_000);
        assert!(recorded.bases.len() > 2, "{}", recorded.bases.len());
        for (number, base) in recorded.bases.iter().enumerate() {
            let mut random = Random(seed() + 1);
            let slices: [&mut dyn FnMut() -> u64; 2] = [&mut || u64::MAX / 2, &mut || 1 + random.below(20_000)];
            for (way, slice) in slices.into_iter().enumerate() {
                let mut player = recorded.player(base);
                let end = recorded.sights.last().unwrap();
                run_in_pieces(&mut player, end.0, slice);
                assert_eq!(sight(player.machine()), end.1, "base {number}, way {way}");
                assert_eq!(player.run_to(Goal::instruction(u64::MAX), &mut never).unwrap(), Pause::End);
            }
        }
    }
}

#[test]
fn a_debugger_of_a_replay_stops_where_one_of_the_live_machine_stood() {
    let recorded = record_debugged(seed() ^ 0x33, 300_000);
    let end = recorded.sights.last().unwrap();
    let mut player = recorded.player(&recorded.bases[0]);
    let breakpoint = handler(player.machine());
    let count = |stops: &Stops, player: &mut Player| {
        player.machine_mut().set_stops(stops);
        let mut hits = 0;
        while let Pause::Hit(hit) = player.run_to(Goal::position(end.0), &mut never).unwrap() {
            assert!(player.machine().stands_at(hit.vcpu) == Some(breakpoint));
            hits += 1;
        }
        hits
    };
    let stopped = count(&Stops { breakpoints: vec![breakpoint], watchpoints: vec![] }, &mut player);
    assert_eq!(sight(player.machine()), end.1, "stops are invisible");
    // The handler counts its calls.
    let mut bytes = [0; 4];
    player.machine().memory().read(TICKS.into(), &mut bytes).unwrap();
    let ticks = u32::from_le_bytes(bytes);
    assert!(ticks > 5 && (ticks - 1..=ticks + 1).contains(&stopped), "{stopped} stops, {ticks} interrupts");
}

#[test]
fn a_machine_that_is_not_the_recorded_one_is_noticed() {
    let recorded = record(seed(), 400_000, false);
    let base = &recorded.bases[0];
    let mut other = base.clone();
    // Another count of turns: the guest stores it, and the next cut or probe sees it in a register sooner or later.
    other.ram[TURNS as usize] ^= 2;
    let mut player = recorded.player(&other);
    let end = player.run_to(Goal::instruction(u64::MAX), &mut never);
    let cuts = recorded.bases.len() - 1;
    match end {
        Err(PlayError::Diverged(mismatch)) => println!("{mismatch}"),
        Ok(Pause::End) => assert_eq!(cuts, 0, "no cut noticed it"),
        other => panic!("{other:?}"),
    }
}

/// A timeline of the whole recording, with rungs so close that there are many.
fn timeline(recorded: &Recorded, bytes_max: u64) -> Timeline {
    let spacing = Spacing { coarse: 40_000, fine: 5_000, bytes_max };
    Timeline::new(recorded.player(&recorded.bases[0]), spacing).unwrap()
}

fn at(retired: u64) -> Position {
    Position { retired, skipped_tsc: 0 }
}

/// What a straight run sees at the first instant after so many instructions.
fn straight(recorded: &Recorded, retired: &[u64]) -> Vec<(Position, Sight)> {
    let mut sorted = retired.to_vec();
    sorted.sort_unstable();
    let mut player = recorded.player(&recorded.bases[0]);
    let mut seen = std::collections::BTreeMap::new();
    for retired in sorted {
        player.run_to(Goal::instruction(retired), &mut never).unwrap();
        seen.insert(retired, (player.position(), sight(player.machine())));
    }
    retired.iter().map(|retired| seen[retired].clone()).collect()
}

#[test]
fn a_walk_through_time_sees_what_a_straight_run_sees() {
    let seed = seed() ^ 0x51;
    let recorded = record(seed, 700_000, true);
    let mut random = Random(seed);
    let (start, end) = (recorded.bases[0].position.retired, recorded.sights.last().unwrap().0.retired);
    for bytes_max in [512 << 20, 12 << 20] {
        let mut timeline = timeline(&recorded, bytes_max);
        let mut present = start;
        let mut walk = Vec::new();
        let mut seen = Vec::new();
        for _ in 0..60 {
            match random.below(4) {
                0 => {
                    present = start + random.below(end - start);
                    timeline.seek(at(present), &mut never).unwrap();
                }
                1 => {
                    for _ in 0..=random.below(5) {
                        present -= u64::from(timeline.reverse_step(0, &mut never).unwrap() == Arrival::Reached);
                    }
                }
                2 => {
                    for _ in 0..=random.below(5) {
                        let arrival = timeline.step(0, &Stops::default(), &mut never).unwrap();
                        present += u64::from(arrival == Arrival::Reached);
                    }
                }
                _ => {
                    present = present.saturating_sub(random.below(20_000)).max(start);
                    timeline.seek(at(present), &mut never).unwrap();
                }
            }
            assert_eq!(timeline.position().retired, present);
            walk.push(present);
            seen.push(sight(timeline.player().machine()));
        }
        let (rungs, bytes) = timeline.rungs();
        println!("{rungs} rungs, {bytes} bytes of {bytes_max}");
        assert!(rungs > 3 && bytes <= bytes_max + (2 << 20));
        for (step, (expected, seen)) in straight(&recorded, &walk).iter().zip(&seen).enumerate() {
            assert!(expected.1 == *seen, "step {step} at {} differs", walk[step]);
        }
    }
}

#[test]
fn the_last_stop_before_now_is_the_one_that_a_run_meets_last() {
    let recorded = record(seed() ^ 0x77, 500_000, false);
    let stops = Stops { breakpoints: vec![u64::from(PATCHED)], watchpoints: vec![] };
    let mut timeline = timeline(&recorded, 512 << 20);
    let mut forwards = Vec::new();
    while let Arrival::Hit(_) = timeline.continue_to(&stops, &mut never).unwrap() {
        forwards.push(timeline.position().retired);
    }
    assert_eq!(timeline.position(), recorded.sights.last().unwrap().0, "the end is an end");
    assert!(forwards.len() > 50, "{}", forwards.len());
    let mut backwards = Vec::new();
    while let Arrival::Hit(_) = timeline.reverse_continue(&stops, &mut never).unwrap() {
        backwards.push(timeline.position().retired);
        assert_eq!(timeline.player().machine().peek_cpu(0).unwrap().rip, u64::from(PATCHED));
    }
    assert_eq!(timeline.position(), recorded.bases[0].position, "the beginning is an end");
    backwards.reverse();
    assert_eq!(forwards, backwards);
}

#[test]
fn watched_bytes_stop_behind_a_write_forwards_and_before_it_backwards() {
    let recorded = record(seed() ^ 0x99, 300_000, false);
    let watched = Watchpoint { address: TURNS.into(), bytes: 4, kind: WatchKind::Write };
    let stops = Stops { breakpoints: vec![], watchpoints: vec![watched] };
    let mut timeline = timeline(&recorded, 512 << 20);
    let turns = |timeline: &Timeline| {
        let mut bytes = [0; 4];
        timeline.player().machine().memory().read(TURNS.into(), &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    };
    let before = turns(&timeline);
    for n in 1..=20 {
        assert!(matches!(timeline.continue_to(&stops, &mut never).unwrap(), Arrival::Hit(_)));
        assert_eq!(turns(&timeline), before + n);
    }
    for n in (0..20).rev() {
        assert!(matches!(timeline.reverse_continue(&stops, &mut never).unwrap(), Arrival::Hit(_)));
        assert_eq!(turns(&timeline), before + n);
    }
    assert_eq!(timeline.reverse_continue(&stops, &mut never).unwrap(), Arrival::Start);
}

#[test]
fn who_wrote_last_is_found_wherever_one_looks_from() {
    let recorded = record(seed() ^ 0xaa, 400_000, false);
    let mut timeline = timeline(&recorded, 512 << 20);
    for retired in [399_000, 250_000, 100_000, 5_000] {
        timeline.seek(at(retired), &mut never).unwrap();
        let now = timeline.position();
        let LastWrite::By(written) = timeline.last_write(TURNS.into(), 4, &mut never).unwrap() else {
            panic!("nobody wrote before {now}");
        };
        let (old, new) = (written.old.clone(), written.new.clone());
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        assert_eq!((written.vcpu, word(&new)), (Some(0), word(&old) + 1));
        let place = timeline.position();
        assert!(place < now);
        // One instruction later it is as it was said to be, and nothing changes it until now.
        assert_eq!(timeline.step(0, &Stops::default(), &mut never).unwrap(), Arrival::Reached);
        let mut bytes = [0; 4];
        timeline.player().machine().memory().read(TURNS.into(), &mut bytes).unwrap();
        assert_eq!(bytes[..], new);
        timeline.seek(now, &mut never).unwrap();
        timeline.player().machine().memory().read(TURNS.into(), &mut bytes).unwrap();
        assert_eq!(bytes[..], new);
    }
    assert_eq!(timeline.last_write(0xe0_0000, 8, &mut never).unwrap(), LastWrite::Nobody);
}
