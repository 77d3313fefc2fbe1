//! A recording of a real Linux (as in `linux.rs`) with console, network and disk, on one, two and four vCPUs: replayed from each cut
//! with slices of three lengths it is the machine that was recorded, and any instant is reached in time. The kernel is the one
//! that `GODWIT_TEST_KERNEL` names, or that `deploy/guest` has made.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod recorded;
mod replaying;

use std::time::Instant;

use recorded::linux::linux;
use replaying::*;
use vmcb_engine::engine::soft::Tuning;
use vmcb_engine::engine::{Stops, WatchKind, Watchpoint};
use vmcb_engine::journal::RecordingId;
use vmcb_engine::machine::Outcome;
use vmcb_engine::replay::{Arrival, Door, Goal, LastWrite, Pause, Spacing, Timeline, WhenFull};

/// Boots until `from`, records until `until`.
fn record(vcpus: u32, from: u64, until: u64) -> Option<Recorded> {
    let guest = linux(vcpus)?;
    let mut door = Door::new(guest.machine(false, Tuning::default()));
    door.boot(&guest.kernel, guest.initrd.as_deref()).unwrap();
    let go = |door: &mut Door, until: u64| {
        while door.position().retired < until {
            match door.run(until.min(door.position().retired + 7_654_321)) {
                Outcome::Reached => {}
                Outcome::Idle { until_tsc } => {
                    door.skip_idle_until(until_tsc.unwrap_or(door.machine().tsc() + 1_000_000))
                }
                other => panic!("{other:?} at {}", door.position()),
            }
            // Something comes all the time: typed lines, packets that find no buffer or one, a cable.
            if door.is_recording() {
                door.console_input(recorded::linux::TYPED);
                door.net_input(0, &[0xff; 60]);
                door.set_realtime(door.position().retired);
            }
        }
    };
    go(&mut door, from);
    let here = |door: &mut Door| {
        let sections = door.capture().unwrap();
        base(door.machine(), sections)
    };
    let mut bases = vec![here(&mut door)];
    door.record(RecordingId([5; 16]), 1 << 30, WhenFull::End).unwrap();
    let mut sights = Vec::new();
    for part in 1..=4 {
        go(&mut door, from + (until - from) * part / 4);
        sights.push((door.position(), sight(door.machine())));
        if part == 2 {
            bases.push(here(&mut door));
        }
        door.close_block();
    }
    door.stop_recording("enough");
    let console = door.machine_mut().take_console_output();
    println!("{}", String::from_utf8_lossy(&console[console.len().saturating_sub(800)..]));
    let mut frames: Vec<Vec<u8>> = Vec::new();
    loop {
        let more = door.take(frames.len() as u64);
        if more.is_empty() {
            return Some(Recorded { guest, bases, frames, sights, console });
        }
        frames.extend(more);
    }
}

fn never() -> bool {
    false
}

fn replays(vcpus: u32, from: u64, until: u64) {
    let Some(recorded) = record(vcpus, from, until) else { return };
    for base in &recorded.bases {
        for piece in [u64::MAX / 2, 3_000_017, 99_991] {
            let mut player = recorded.player(base);
            let begun = Instant::now();
            for (position, seen) in recorded.sights.iter().filter(|(position, _)| *position > base.position) {
                while player.position() < *position {
                    let goal =
                        Goal::position(*position).or_instruction(player.position().retired.saturating_add(piece));
                    assert_eq!(player.run_to(goal, &mut never).unwrap(), Pause::Reached);
                }
                assert!(sight(player.machine()) == *seen, "pieces of {piece} from {}: at {position}", base.position);
            }
            let (compared, _) = player.compared();
            println!("{vcpus} vCPUs from {}: {:?}, {compared} compared", base.position, begun.elapsed());
        }
    }
}

#[test]
fn a_linux_with_one_vcpu_is_replayed_from_each_cut_with_any_slices() {
    replays(1, 900_000_000, 1_500_000_000);
}

#[test]
fn a_linux_with_two_vcpus_is_replayed_from_each_cut_with_any_slices() {
    replays(2, 300_000_000, 900_000_000);
}

#[test]
fn a_linux_with_four_vcpus_is_replayed_from_each_cut_with_any_slices() {
    replays(4, 300_000_000, 900_000_000);
}

#[test]
fn any_instant_of_a_linux_is_reached_in_time() {
    let Some(recorded) = record(2, 300_000_000, 900_000_000) else { return };
    let mut timeline = Timeline::new(recorded.player(&recorded.bases[0]), Spacing::default()).unwrap();
    let begun = Instant::now();
    let end = recorded.sights.last().unwrap().0;
    timeline.seek(end, &mut never).unwrap();
    println!("to the end: {:?}, {:?}", begun.elapsed(), timeline.rungs());
    let mut slowest = std::time::Duration::ZERO;
    for _ in 0..20 {
        let (here, begun) = (timeline.position().retired, Instant::now());
        assert_eq!(timeline.reverse_step(0, &mut never).unwrap(), Arrival::Reached);
        assert!(timeline.position().retired < here);
        slowest = slowest.max(begun.elapsed());
    }
    println!("slowest of 20 steps back: {slowest:?}");
    // A place that is never written: backwards over everything.
    let nowhere = Watchpoint { address: 0xffff_8000_0000_0000, bytes: 8, kind: WatchKind::Write };
    let stops = Stops { breakpoints: vec![0xffff_8000_0000_1000], watchpoints: vec![nowhere] };
    let begun = Instant::now();
    assert_eq!(timeline.reverse_continue(&stops, &mut never).unwrap(), Arrival::Start);
    println!("backwards over {} instructions: {:?}", end.retired - timeline.position().retired, begun.elapsed());
    let begun = Instant::now();
    timeline.seek(end, &mut never).unwrap();
    println!("forwards again: {:?}", begun.elapsed());
    // Each vCPU steps by itself, whoever runs between.
    for vcpu in [0, 1, 0] {
        let before = timeline.player().machine().peek_cpu(vcpu).unwrap();
        let begun = Instant::now();
        assert_eq!(timeline.reverse_step(vcpu, &mut never).unwrap(), Arrival::Reached);
        println!("vCPU {vcpu} back to {}: {:?}", timeline.position(), begun.elapsed());
        let between = timeline.position();
        assert_eq!(timeline.step(vcpu, &Stops::default(), &mut never).unwrap(), Arrival::Reached);
        let after = timeline.player().machine().peek_cpu(vcpu).unwrap();
        assert_eq!((after.rip, after.gprs), (before.rip, before.gprs), "one back and one on is none");
        timeline.seek(between, &mut never).unwrap();
    }
    timeline.seek(end, &mut never).unwrap();
    // Instants in any order are what was recorded.
    for (position, seen) in [2, 0, 3, 1].map(|at| &recorded.sights[at]) {
        let begun = Instant::now();
        timeline.seek(*position, &mut never).unwrap();
        println!("to {position}: {:?}", begun.elapsed());
        assert!(sight(timeline.player().machine()) == *seen, "at {position}");
    }
    let rsp = timeline.player().machine().peek_cpu(0).unwrap().gprs[4];
    let gpa = timeline.player().machine().translate(0, rsp & !7).unwrap();
    let begun = Instant::now();
    let found = timeline.last_write(gpa, 8, &mut never).unwrap();
    println!("who wrote the top of the stack: {:?}, {found:?}", begun.elapsed());
    assert!(matches!(found, LastWrite::By(_)));
}
