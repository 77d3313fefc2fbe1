//! What a span used: whatever stop is met in it may be met by what was noted, and what was not used may not.

use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::exact::guest;
use super::stops::{CASES, case_behind, watch};
use super::*;
use crate::engine::{Stops, Uses, WatchKind, Watchpoint, Why};

/// Where the guests of these tests store: linear is guest-physical there.
const REGIONS: [u64; 7] = [STACK - 0x40, 0x30_0000, 0x30_1000, DEVICE, 0x2fc0, GDT, CODE];
const REGION_BYTES: u64 = 0x80;

/// All instructions, and every word of the regions.
fn everything() -> Stops {
    let words = |region: u64| (region..region + REGION_BYTES).step_by(8);
    let kinds = [WatchKind::Write, WatchKind::Read, WatchKind::PhysicalWrite];
    let watch = |address| kinds.map(|kind| Watchpoint { address, bytes: 8, kind });
    Stops {
        breakpoints: (CODE..CODE + 0x200).chain(HANDLERS..HANDLERS + 0x1000).collect(),
        watchpoints: REGIONS.into_iter().flat_map(words).flat_map(watch).collect(),
    }
}

fn only(why: &Why) -> Stops {
    match *why {
        Why::Breakpoint { address } => Stops { breakpoints: vec![address], watchpoints: vec![] },
        Why::Watchpoint { watched, .. } => Stops { breakpoints: vec![], watchpoints: vec![watched] },
    }
}

/// What is met in each span of so many instructions.
fn met(guest: &mut Guest, stops: &Stops, step: u64) -> Vec<Vec<Why>> {
    guest.engine.set_stops(stops);
    let mut spans = vec![Vec::new()];
    loop {
        let until = spans.len() as u64 * step;
        match guest.run(until) {
            Exit::Reached => spans.push(Vec::new()),
            Exit::Halted => return spans,
            Exit::Stop { why, .. } => spans.last_mut().unwrap().push(why),
            other => panic!("{other}"),
        }
    }
}

/// What is used in each span of so many instructions.
fn used(guest: &mut Guest, step: u64) -> Vec<Uses> {
    assert_eq!(guest.engine.take_uses(), None, "nobody has asked before");
    let mut spans = Vec::new();
    loop {
        let end = guest.run((spans.len() as u64 + 1) * step);
        spans.push(guest.engine.take_uses().unwrap());
        match end {
            Exit::Reached => {}
            Exit::Halted => return spans,
            other => panic!("{other}"),
        }
    }
}

/// Every stop of every span may be met there. Returns how many of all stops are known not to be.
fn compare(met: &[Vec<Why>], used: &[Uses], stops: &Stops) -> usize {
    assert_eq!(met.len(), used.len());
    for (span, (met, uses)) in met.iter().zip(used).enumerate() {
        for why in met {
            assert!(uses.may_meet(&only(why)), "span {span}: {why:x?}");
        }
    }
    let breakpoints = stops.breakpoints.iter().map(|at| Stops { breakpoints: vec![*at], watchpoints: vec![] });
    let watchpoints = stops.watchpoints.iter().map(|it| Stops { breakpoints: vec![], watchpoints: vec![*it] });
    let each: Vec<Stops> = breakpoints.chain(watchpoints).collect();
    used.iter().map(|uses| each.iter().filter(|stops| !uses.may_meet(stops)).count()).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_met_in_a_span_was_noted_in_it(step in prop_oneof![Just(1u64), 2u64..80, Just(1u64 << 30)]) {
        let all = everything();
        // Of what one instruction uses the first watchpoint is told: by kinds, then.
        for kind in [WatchKind::Write, WatchKind::Read, WatchKind::PhysicalWrite] {
            let mut stops = all.clone();
            stops.watchpoints.retain(|watch| watch.kind == kind);
            let met = met(&mut guest(), &stops, step);
            let used = used(&mut guest(), step);
            prop_assert!(met.iter().flatten().any(|why| matches!(why, Why::Watchpoint { .. })), "{:?}", kind);
            let passed = compare(&met, &used, &stops);
            prop_assert!(passed > used.len() * 2000, "{} of {} spans", passed, used.len());
        }
    }
}

#[test]
fn noting_changes_nothing() {
    let mut alone = guest();
    assert_eq!(alone.run(1 << 30), Exit::Halted);
    for step in [1, 7, 1 << 30] {
        let mut noted = guest();
        used(&mut noted, step);
        assert_eq!(noted.engine.peek(0).unwrap().compare(&alone.engine.peek(0).unwrap()), []);
        assert_eq!(noted.world.log, alone.world.log);
        assert_eq!(super::exact::ram_digest(&noted.memory), super::exact::ram_digest(&alone.memory));
        assert_eq!(noted.engine.translations(0), alone.engine.translations(0));
    }
}

/// What an instruction uses behind others, which have used both of its pages: in its span, if `warm`, or in one before.
fn used_behind(others: fn(&mut CodeAssembler), instruction: fn(&mut CodeAssembler), warm: bool) -> Uses {
    let mut guest = case_behind(others, instruction);
    guest.engine.take_uses();
    guest.run(2);
    if !warm {
        guest.engine.take_uses();
    }
    guest.run(3);
    guest.engine.take_uses().unwrap()
}

#[test]
fn every_kind_of_instruction_that_stores_is_noted() {
    let stores = |a: &mut CodeAssembler| {
        a.mov(byte_ptr(rbx + 0x800), al).unwrap();
        a.mov(byte_ptr(rsp - 0x800), al).unwrap();
    };
    for (name, instruction, address, _, writes) in CASES {
        for warm in [false, true] {
            let uses = used_behind(stores, *instruction, warm);
            for kind in [WatchKind::Write, WatchKind::PhysicalWrite] {
                let noted = uses.may_meet(&watch(*address, 1, kind));
                assert_eq!(noted, *writes, "{name}: {kind:?}, warm {warm}");
            }
        }
    }
}

#[test]
fn every_kind_of_instruction_that_loads_is_noted() {
    let loads = |a: &mut CodeAssembler| {
        a.mov(al, byte_ptr(rbx + 0x800)).unwrap();
        a.mov(al, byte_ptr(rsp - 0x800)).unwrap();
    };
    for (name, instruction, address, reads, writes) in CASES {
        for warm in [false, true] {
            let uses = used_behind(loads, *instruction, warm);
            for kind in [WatchKind::Read, WatchKind::Access] {
                let noted = |at| uses.may_meet(&watch(at, 1, kind));
                let counts = *reads || *writes && kind == WatchKind::Access;
                assert_eq!(noted(*address), counts, "{name}: {kind:?}, warm {warm}");
                assert!(!noted(*address & !0xfff | 0xc00), "{name}: of the same page");
            }
        }
    }
}

/// Stores of every size at every offset around a word, a page's end included, warm and cold: exactly their words.
#[test]
fn exactly_the_words_of_a_store_are_noted() {
    type Store = fn(&mut CodeAssembler);
    let stores: [(u64, Store); 8] = [
        (1, |a| a.mov(byte_ptr(rbx), al).unwrap()),
        (2, |a| a.add(word_ptr(rbx), ax).unwrap()),
        (4, |a| a.mov(dword_ptr(rbx), eax).unwrap()),
        (8, |a| a.xchg(qword_ptr(rbx), rax).unwrap()),
        (16, |a| a.movups(xmmword_ptr(rbx), xmm1).unwrap()),
        (10, |a| a.fstp(tbyte_ptr(rbx)).unwrap()),
        (24, |a| {
            a.mov(rdi, rbx).unwrap();
            a.mov(ecx, 24).unwrap();
            a.rep().stosb().unwrap();
        }),
        (20, |a| {
            a.mov(rdi, rbx).unwrap();
            a.mov(esi, 0x38_0000).unwrap();
            a.mov(ecx, 5).unwrap();
            a.rep().movsd().unwrap();
        }),
    ];
    for (bytes, store) in stores {
        for address in (0x30_0ff0 - 16..0x30_1010).step_by(1) {
            for warm in [false, true] {
                let mut guest = Guest::new(|a| {
                    a.mov(ebx, 0x30_0f00).unwrap();
                    a.mov(qword_ptr(rbx), rax).unwrap();
                    a.mov(qword_ptr(rbx + 0x100), rax).unwrap();
                    a.fninit().unwrap();
                    a.fldz().unwrap();
                    a.mov(ebx, address as i32).unwrap();
                    store(a);
                    a.hlt().unwrap();
                });
                guest.engine.take_uses();
                if !warm {
                    guest.run(6);
                    guest.engine.take_uses();
                }
                assert_eq!(guest.run(1 << 30), Exit::Halted);
                let uses = guest.engine.take_uses().unwrap();
                for word in (0x30_0fc0u64..0x30_1040).step_by(8) {
                    let stored = word < address + bytes && address < word + 8 || warm && word == 0x30_1000;
                    for kind in [WatchKind::Write, WatchKind::PhysicalWrite] {
                        let noted = uses.may_meet(&watch(word, 8, kind));
                        assert_eq!(noted, stored, "{bytes} at {address:#x}, warm {warm}: {word:#x} {kind:?}");
                    }
                }
            }
        }
    }
}
