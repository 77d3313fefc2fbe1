//! Searches backwards find what a straight run meets last, although they pass over what cannot hold it: under a guest that
//! changes page tables and has two processors, and under a real Linux. `GODWIT_REPLAY_SEED` chooses what is searched.
#![allow(clippy::unwrap_used, reason = "a test whose preparation fails has failed")]

mod recorded;
mod replaying;

use recorded::{linux, rich};
use replaying::*;
use vmcb_engine::engine::{Stops, WatchKind, Watchpoint};
use vmcb_engine::journal::Position;
use vmcb_engine::machine::Machine;
use vmcb_engine::replay::{Arrival, Goal, Hit, LastWrite, Pause, Spacing, Timeline};

fn seed() -> u64 {
    std::env::var("GODWIT_REPLAY_SEED").ok().and_then(|value| value.parse().ok()).unwrap_or(0x1234_9876)
}

fn never() -> bool {
    false
}

/// The last stop that a straight run to the end meets, and how many instructions had retired there.
fn met_last(recorded: &Recorded, stops: &Stops, end: Position) -> Option<(Hit, u64)> {
    let mut player = recorded.player(&recorded.bases[0]);
    player.machine_mut().set_stops(stops);
    let mut last = None;
    while let Pause::Hit(hit) = player.run_to(Goal::position(end), &mut never).unwrap() {
        last = Some((hit, player.position().retired)).filter(|_| player.position() < end).or(last);
    }
    last
}

/// Places that the guest executes, loads from and stores to at some instants, and some that it never does.
fn searched(timeline: &mut Timeline, random: &mut Random, instants: usize) -> Vec<Stops> {
    let (start, end) = (timeline.start().retired, timeline.player().tape().end().retired);
    let mut all = vec![Stops { breakpoints: vec![0xffff_ffff_8000_0ff1], watchpoints: vec![] }];
    for _ in 0..instants {
        let retired = start + random.below(end - start);
        timeline.seek(Position { retired, skipped_tsc: 0 }, &mut never).unwrap();
        let machine = timeline.player().machine();
        let cpu = machine.peek_cpu(machine.current_vcpu()).unwrap();
        // Within an instruction, mostly.
        let breakpoint = |address| Stops { breakpoints: vec![address], watchpoints: vec![] };
        all.push(breakpoint(cpu.code_address()));
        all.push(breakpoint(cpu.code_address().wrapping_add(1 + random.below(3))));
        let watch = |address, bytes, kind| {
            let watchpoints = vec![Watchpoint { address, bytes, kind }];
            Stops { breakpoints: vec![], watchpoints }
        };
        let kind = [WatchKind::Read, WatchKind::Access][random.below(2) as usize];
        let stack = cpu.gprs[4].wrapping_sub(8 * random.below(200));
        all.push(watch(stack, 8, kind));
        // Words next to those that are stored to, too.
        for address in [stack, cpu.gprs[random.below(16) as usize].wrapping_add(random.below(64))] {
            let bytes = [1, 4, 8, 24][random.below(4) as usize];
            all.push(watch(address, bytes, WatchKind::Write));
            let gpa = machine.translate(machine.current_vcpu(), address);
            all.extend(gpa.map(|gpa| watch(gpa, bytes, WatchKind::PhysicalWrite)));
        }
    }
    all
}

/// Who wrote last is told as a straight run meets it, if it was a processor.
fn wrote_last(timeline: &mut Timeline, recorded: &Recorded, stops: &Stops, expected: Option<(Hit, u64)>) {
    let [Watchpoint { address, bytes, kind: WatchKind::PhysicalWrite }] = stops.watchpoints[..] else { return };
    let end = timeline.player().tape().end();
    timeline.seek(end, &mut never).unwrap();
    let contents = |machine: &Machine| {
        let mut contents = vec![0; bytes as usize];
        machine.memory().read(address, &mut contents).map(|()| contents).unwrap_or_default()
    };
    let now = contents(timeline.player().machine());
    match timeline.last_write(address, bytes as usize, &mut never).unwrap() {
        LastWrite::By(written) => {
            assert_eq!(written.new, now);
            assert_eq!(contents(timeline.player().machine()), written.old, "{stops:x?}");
            let before = timeline.position().retired;
            match (written.vcpu, expected) {
                (Some(vcpu), Some((hit, retired))) => {
                    assert!(hit.vcpu == vcpu && retired - before <= 1, "{stops:x?}: {before} instead of {retired}");
                }
                (Some(_), None) => panic!("no processor wrote: {stops:x?}"),
                (None, expected) => {
                    assert!(expected.is_none_or(|(_, retired)| retired <= before + 1), "{stops:x?}");
                    assert_ne!(written.old, now);
                }
            }
        }
        LastWrite::Nobody => {
            assert_eq!(expected, None, "{stops:x?}");
            assert_eq!(timeline.position(), end);
            assert_eq!(contents(recorded.player(&recorded.bases[0]).machine()), now);
        }
        LastWrite::Interrupted => panic!("by nobody"),
    }
}

fn searches(recorded: &Recorded, spacing: Spacing, instants: usize) {
    let mut timeline = Timeline::new(recorded.player(&recorded.bases[0]), spacing).unwrap();
    let end = timeline.player().tape().end();
    let mut random = Random(seed());
    let mut found = 0;
    for stops in searched(&mut timeline, &mut random, instants) {
        timeline.seek(end, &mut never).unwrap();
        let expected = met_last(recorded, &stops, end);
        match (timeline.reverse_continue(&stops, &mut never).unwrap(), expected) {
            (Arrival::Start, None) => assert_eq!(timeline.position(), timeline.start()),
            (Arrival::Hit(hit), Some((expected, retired))) => {
                assert_eq!(hit, expected);
                let behind = retired - timeline.position().retired;
                assert!(behind <= u64::from(!stops.watchpoints.is_empty()), "{behind} instructions before {hit:?}");
                found += 1;
            }
            (arrival, expected) => panic!("{stops:?}: {arrival:?} instead of {expected:?}"),
        }
        wrote_last(&mut timeline, recorded, &stops, expected);
    }
    println!("{found} found with {:?} rungs", timeline.rungs());
    assert!(found >= instants);
}

#[test]
fn a_search_backwards_finds_what_a_straight_run_meets_last() {
    for (vcpus, bytes_max) in [(1, 512 << 20), (2, 512 << 20), (2, 12 << 20)] {
        let plan = Plan { resets: vcpus == 2, moves: true, ..Plan::new(seed(), 600_000) };
        let recorded = record_guest(rich(vcpus), plan);
        searches(&recorded, Spacing { coarse: 20_000, fine: 3_000, bytes_max }, 8);
    }
}

#[test]
fn a_search_backwards_through_linux_finds_what_a_straight_run_meets_last() {
    let Some(guest) = linux::linux(1) else { return };
    let plan = Plan { after: "guest# ", typed: linux::TYPED, slice: 3_000_000, ..Plan::new(seed(), 12_000_000) };
    let recorded = record_guest(guest, plan);
    searches(&recorded, Spacing { coarse: 400_000, fine: 50_000, bytes_max: 512 << 20 }, 4);
}
