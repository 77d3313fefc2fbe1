//! Breakpoints and watchpoints: exact to the instruction, and invisible.

use iced_x86::code_asm::*;
use proptest::prelude::*;

use super::exact::{guest, ram_digest};
use super::*;
use crate::engine::{Stops, WatchKind, Watchpoint, Why};

/// What a run met: instructions retired, and what.
type Seen = Vec<(u64, Why)>;

/// Runs to the halt, and lists every stop on the way. `step` cuts the run as well.
fn run_through(guest: &mut Guest, step: u64) -> Seen {
    let mut seen = Vec::new();
    loop {
        let until = guest.engine.clock().retired + step;
        match guest.run(until) {
            Exit::Reached => assert_eq!(guest.engine.clock().retired, until),
            Exit::Halted => return seen,
            Exit::Stop { vcpu: 0, why } => seen.push((guest.engine.clock().retired, why)),
            other => panic!("{other}"),
        }
        assert!(seen.len() < 100_000, "it stops for ever: {:?}", seen.last());
    }
}

fn breakpoints(at: impl IntoIterator<Item = u64>) -> Stops {
    Stops { breakpoints: at.into_iter().collect(), ..Stops::default() }
}

pub(super) fn watch(address: u64, bytes: u64, kind: WatchKind) -> Stops {
    Stops { watchpoints: vec![Watchpoint { address, bytes, kind }], ..Stops::default() }
}

fn same_machine(one: &Guest, other: &Guest) {
    assert_eq!(one.engine.peek(0).unwrap().compare(&other.engine.peek(0).unwrap()), []);
    assert_eq!(one.engine.clock(), other.engine.clock());
    assert_eq!(one.world.log, other.world.log);
    assert_eq!(ram_digest(&one.memory), ram_digest(&other.memory));
    assert_eq!(one.engine.translations(0), other.engine.translations(0));
}

/// RIP before every instruction, by count.
fn trace() -> Vec<u64> {
    let mut guest = guest();
    let mut rips = Vec::new();
    loop {
        rips.push(guest.engine.peek(0).unwrap().rip);
        let next = guest.engine.clock().retired + 1;
        if guest.run(next) == Exit::Halted {
            rips.pop();
            return rips;
        }
    }
}

/// Every address of the program and of its handlers.
fn everywhere() -> Stops {
    breakpoints((CODE..CODE + 0x200).chain(HANDLERS..HANDLERS + 0x1000))
}

#[test]
fn a_breakpoint_everywhere_stops_before_every_instruction_once() {
    let trace = trace();
    let mut guest = guest();
    guest.engine.set_stops(&everywhere());
    let seen = run_through(&mut guest, 1 << 30);
    let mut repeated = 0;
    for (retired, rip) in trace.iter().enumerate() {
        let here = (retired as u64, Why::Breakpoint { address: *rip });
        let goes_on = retired > 0 && trace[retired - 1] == *rip;
        repeated += usize::from(goes_on);
        let times = seen.iter().filter(|other| **other == here).count();
        // An interrupt that is due is delivered first.
        let delivered = seen.iter().any(|(at, _)| *at == retired as u64) && times == 0;
        assert!(times == 1 || goes_on || delivered, "{retired}: {rip:#x} {times} times");
    }
    assert_eq!(repeated, 0, "the program's repeated instruction is of one part");
    assert!(seen.len() >= trace.len());
    let mut alone = super::exact::guest();
    run_through(&mut alone, 1 << 30);
    same_machine(&guest, &alone);
}

#[test]
fn a_repeated_instruction_is_one_for_a_breakpoint() {
    let mut guest = Guest::new(|a| {
        a.mov(edi, 0x30_0000).unwrap();
        a.mov(ecx, 0x3000).unwrap();
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    guest.engine.set_stops(&breakpoints([CODE + 10]));
    assert_eq!(run_through(&mut guest, 1 << 30), [(2, Why::Breakpoint { address: CODE + 10 })]);
    assert_eq!(guest.engine.clock().retired, 2 + 3 + 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_stops_are_met_in_order_and_change_nothing(
        chosen in proptest::collection::vec(0usize..10_000, 0..6),
        watched in proptest::collection::vec((0u64..8, 0u64..0x40, 1u64..24, 0u8..4), 0..4),
        step in prop_oneof![Just(1u64 << 30), 1u64..40],
    ) {
        let mut alone = guest();
        run_through(&mut alone, 1 << 30);
        let mut all = guest();
        all.engine.set_stops(&everywhere());
        let all = run_through(&mut all, 1 << 30);
        let wanted: Vec<u64> = chosen.iter().map(|index| match all[index % all.len()].1 {
            Why::Breakpoint { address } => address,
            other => panic!("{other:?}"),
        }).collect();
        let regions = [STACK - 0x20, 0x30_0000, 0x30_1000, CODE, IDT + 0x800, DEVICE, 0x2ff0, GDT + 0x10];
        let kinds = [WatchKind::Write, WatchKind::Read, WatchKind::Access, WatchKind::PhysicalWrite];
        let watchpoints: Vec<Watchpoint> = watched.iter().map(|(region, offset, bytes, kind)| Watchpoint {
            address: regions[*region as usize] + offset,
            bytes: *bytes,
            kind: kinds[usize::from(*kind)],
        }).collect();
        let mut stopped = guest();
        stopped.engine.set_stops(&Stops { breakpoints: wanted.clone(), watchpoints: watchpoints.clone() });
        let seen = run_through(&mut stopped, step);
        same_machine(&stopped, &alone);

        let met: Seen = seen.iter().filter(|(_, why)| matches!(why, Why::Breakpoint { .. })).copied().collect();
        let expected: Seen = all.iter()
            .filter(|(_, why)| matches!(why, Why::Breakpoint { address } if wanted.contains(address)))
            .copied().collect();
        prop_assert_eq!(met, expected);

        // Whatever changed was told, where it changed and at the instruction that changed it.
        let trace = trace();
        let mut single = guest();
        let bytes_of = |guest: &Guest, watch: &Watchpoint| {
            let mut bytes = vec![0; watch.bytes as usize];
            guest.memory.read(watch.address, &mut bytes).ok().map(|()| bytes)
        };
        for (retired, rip) in trace.iter().enumerate() {
            let before: Vec<_> = watchpoints.iter().map(|watch| bytes_of(&single, watch)).collect();
            single.run(retired as u64 + 1);
            let after: Vec<_> = watchpoints.iter().map(|watch| bytes_of(&single, watch)).collect();
            // Accessed and dirty bits are written by no linear address.
            let by_linear = |watch: &Watchpoint| watch.kind != WatchKind::Read && watch.address >= 0x4000;
            let counts = |watch: &Watchpoint| by_linear(watch) || watch.kind == WatchKind::PhysicalWrite;
            let changed = (0..watchpoints.len()).any(|index| counts(&watchpoints[index]) && before[index] != after[index]);
            let told = seen.iter().any(|(at, why)| {
                matches!(why, Why::Watchpoint { wrote, .. } if *wrote || watchpoints.len() > 1)
                    && (*at == retired as u64 + 1 || *at == retired as u64)
            });
            prop_assert!(!changed || told, "{retired}: {rip:#x} changed watched bytes: {seen:x?}");
        }
        for (retired, why) in &seen {
            if let Why::Watchpoint { watched, rip, gpa, wrote } = why {
                prop_assert!(watchpoints.contains(watched));
                prop_assert!((watched.address..watched.address + watched.bytes).contains(gpa), "identity-mapped");
                prop_assert!(watched.kind == WatchKind::Access || *wrote == (watched.kind != WatchKind::Read));
                let last = (*retired as usize).checked_sub(1).map(|last| trace[last]);
                // The instruction before; an instruction of a handler; or one that an event interrupted.
                let known = last == Some(*rip) || trace.get(*retired as usize) == Some(rip) || *rip >= HANDLERS;
                prop_assert!(known, "{retired}: {why:x?}");
            }
        }
    }
}

/// One instruction between two NOPs, and where its operand lies.
pub(super) type Case = (&'static str, fn(&mut CodeAssembler), u64, bool, bool);

/// What each instruction does to memory: name, instruction, where, reads, writes.
pub(super) const CASES: &[Case] = &[
    ("mov8", |a| a.mov(byte_ptr(rbx), 1).unwrap(), DATA, false, true),
    ("mov16", |a| a.mov(word_ptr(rbx), 1).unwrap(), DATA, false, true),
    ("mov32", |a| a.mov(dword_ptr(rbx), eax).unwrap(), DATA, false, true),
    ("mov64", |a| a.mov(qword_ptr(rbx), rax).unwrap(), DATA, false, true),
    ("load", |a| a.mov(rax, qword_ptr(rbx)).unwrap(), DATA, true, false),
    ("add", |a| a.add(qword_ptr(rbx), rax).unwrap(), DATA, true, true),
    ("cmp", |a| a.cmp(qword_ptr(rbx), rax).unwrap(), DATA, true, false),
    ("movups", |a| a.movups(xmmword_ptr(rbx), xmm1).unwrap(), DATA, false, true),
    ("movaps", |a| a.movaps(xmm1, xmmword_ptr(rbx)).unwrap(), DATA, true, false),
    ("movsd", |a| a.movsd_2(qword_ptr(rbx), xmm1).unwrap(), DATA, false, true),
    ("fld", |a| a.fld(qword_ptr(rbx)).unwrap(), DATA, true, false),
    ("fnstcw", |a| a.fnstcw(word_ptr(rbx)).unwrap(), DATA, false, true),
    ("fxsave", |a| a.fxsave(ptr(rbx)).unwrap(), DATA, false, true),
    ("xadd", |a| a.lock().xadd(dword_ptr(rbx), eax).unwrap(), DATA, true, true),
    ("xchg", |a| a.xchg(qword_ptr(rbx), rcx).unwrap(), DATA, true, true),
    ("cmpxchg16b", |a| a.lock().cmpxchg16b(xmmword_ptr(rbx)).unwrap(), DATA, true, true),
    ("stosb", |a| a.stosb().unwrap(), DATA, false, true),
    ("rep stosq", |a| a.rep().stosq().unwrap(), DATA, false, true),
    ("movsb", |a| a.movsb().unwrap(), DATA, false, true),
    ("lodsb", |a| a.lodsb().unwrap(), SOURCE, true, false),
    ("sgdt", |a| a.sgdt(ptr(rbx)).unwrap(), DATA, false, true),
    ("push", |a| a.push(rax).unwrap(), STACK - 8, false, true),
    ("pop", |a| a.pop(rax).unwrap(), STACK, true, false),
    ("call", |a| a.call(CODE + 64).unwrap(), STACK - 8, false, true),
    ("call through memory", |a| a.call(qword_ptr(rbx)).unwrap(), DATA, true, false),
    ("ret", |a| a.ret().unwrap(), STACK, true, false),
    ("enter", |a| a.enter(16, 0).unwrap(), STACK - 8, false, true),
    ("pushfq", |a| a.pushfq().unwrap(), STACK - 8, false, true),
    ("int", |a| a.int(0x33).unwrap(), STACK - 8, false, true),
    ("int reads its gate", |a| a.int(0x33).unwrap(), IDT + 0x33 * 16, true, false),
    ("maskmovdqu", |a| a.maskmovdqu(xmm1, xmm2).unwrap(), DATA, false, true),
    ("bts", |a| a.bts(qword_ptr(rbx), rcx).unwrap(), DATA, true, true),
];
pub(super) const DATA: u64 = 0x30_0000;
pub(super) const SOURCE: u64 = 0x38_0000;

fn case(instruction: fn(&mut CodeAssembler)) -> Guest {
    case_behind(|a| a.nop().unwrap(), instruction)
}

pub(super) fn case_behind(before: fn(&mut CodeAssembler), instruction: fn(&mut CodeAssembler)) -> Guest {
    let guest = Guest::new(|a| {
        before(a);
        instruction(a);
        (0..70).for_each(|_| a.nop().unwrap());
        a.hlt().unwrap();
    });
    handlers(&guest.memory, [0x33]);
    put(&guest.memory, DATA, CODE + 64);
    put(&guest.memory, STACK, CODE + 64);
    let mut guest = guest;
    let mut state = guest.engine.peek(0).unwrap();
    (state.gprs[3], state.gprs[7], state.gprs[6], state.gprs[1]) = (DATA, DATA, SOURCE, 3);
    state.fpu.set_xmm(2, u128::MAX);
    guest.engine.load(0, &state).unwrap();
    guest
}

#[test]
fn every_kind_of_instruction_stops_right_after_it_touched_watched_bytes() {
    for (name, instruction, at, reads, writes) in CASES {
        // One byte of the operand.
        for (kind, counts) in [
            (WatchKind::Write, *writes),
            (WatchKind::Read, *reads),
            (WatchKind::Access, *reads || *writes),
            (WatchKind::PhysicalWrite, *writes),
        ] {
            let mut guest = case(*instruction);
            guest.engine.set_stops(&watch(*at, 1, kind));
            let exit = guest.run(40);
            if !counts {
                assert!(matches!(exit, Exit::Reached | Exit::Halted), "{name} {kind:?}: {exit}");
                continue;
            }
            let Exit::Stop { vcpu: 0, why: Why::Watchpoint { watched, wrote, gpa, rip } } = exit else {
                panic!("{name} {kind:?}: {exit}");
            };
            assert_eq!((watched.address, gpa, rip), (*at, *at, CODE + 1), "{name} {kind:?}");
            assert_eq!(wrote, *writes && (kind != WatchKind::Read) && (kind != WatchKind::Access || !reads), "{name}");
            assert_eq!(guest.engine.clock().retired, 2, "{name} {kind:?}");
            let mut alone = case(*instruction);
            assert_eq!(alone.run(2), Exit::Reached);
            assert_eq!(guest.engine.peek(0).unwrap().compare(&alone.engine.peek(0).unwrap()), [], "{name} {kind:?}");
            guest.engine.set_stops(&Stops::default());
            assert_eq!(guest.run(90), alone.run(90), "{name}");
            same_machine(&guest, &alone);
        }
    }
}

#[test]
fn an_access_across_pages_is_seen_by_either_page() {
    for (at, gpa) in [(DATA + 0xfff, DATA + 0xfff), (DATA + 0x1000, DATA + 0x1000), (DATA + 0x1004, DATA + 0x1004)] {
        let mut guest = Guest::new(|a| {
            a.mov(ebx, DATA as u32 + 0xffd).unwrap();
            a.mov(qword_ptr(rbx), rax).unwrap();
            a.mov(qword_ptr(rbx), rcx).unwrap();
            a.hlt().unwrap();
        });
        guest.engine.set_stops(&watch(at, 1, WatchKind::Write));
        let seen = run_through(&mut guest, 1 << 30);
        let told: Vec<_> = seen
            .iter()
            .map(|(retired, why)| match why {
                Why::Watchpoint { gpa, rip, .. } => (*retired, *gpa, *rip),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, [(2, gpa, CODE + 5), (3, gpa, CODE + 8)]);
    }
}

#[test]
fn a_breakpoint_is_of_one_linear_address_and_not_of_its_bytes() {
    // The same page of code at two linear addresses: RAM and 1 GiB above it.
    let guest = Guest::new(|a| {
        let mut again = a.create_label();
        let mut over = a.create_label();
        a.mov(ebp, 4).unwrap();
        a.mov(eax, (CODE + 0x100) as u32).unwrap();
        a.mov(r8d, 0x4000_0000).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rax).unwrap();
        a.xor(rax, r8).unwrap();
        a.dec(ebp).unwrap();
        a.jne(again).unwrap();
        a.jmp(over).unwrap();
        a.set_label(&mut over).unwrap();
        a.hlt().unwrap();
    });
    let tables = crate::engine::soft::svm::bare::TABLES;
    let first = get(&guest.memory, tables + 0x1000);
    put(&guest.memory, tables + 0x1008, first);
    guest
        .memory
        .write(
            CODE + 0x100,
            &assemble(64, 0, |a| {
                a.nop().unwrap();
                a.inc(rdx).unwrap();
                a.ret().unwrap();
            }),
        )
        .unwrap();
    let low = CODE + 0x101;
    let high = 0x4000_0000 + low;
    for wanted in [vec![low], vec![high], vec![low, high]] {
        // Set from the start, and set when all of the code is known and linked.
        for warm in [0, 30] {
            let mut guest = clone_of(&guest);
            guest.run(warm);
            guest.engine.set_stops(&breakpoints(wanted.clone()));
            let seen = run_through(&mut guest, 1 << 30);
            // 3, then rounds of 7: the call, NOP, INC, RET, XOR, DEC, JNE.
            let expected: Seen = (0..4)
                .map(|round| (3 + 7 * round + 2, if round % 2 == 0 { low } else { high }))
                .filter(|(at, address)| *at >= warm && wanted.contains(address))
                .map(|(at, address)| (at, Why::Breakpoint { address }))
                .collect();
            assert_eq!(seen, expected, "{wanted:x?} after {warm}");
        }
    }
}

fn clone_of(guest: &Guest) -> Guest {
    let mut copy = Guest::new(|a| a.nop().unwrap());
    let mut ram = vec![0; 16 << 20];
    guest.memory.read(0, &mut ram).unwrap();
    copy.memory.write(0, &ram).unwrap();
    copy.engine.load(0, &guest.engine.peek(0).unwrap()).unwrap();
    copy
}

#[test]
fn a_machine_put_to_a_breakpoint_stops_at_once_unless_told_to_pass_it() {
    let program = |a: &mut CodeAssembler| {
        (0..5).for_each(|_| a.nop().unwrap());
        a.hlt().unwrap();
    };
    let here = Exit::Stop { vcpu: 0, why: Why::Breakpoint { address: CODE + 2 } };
    let mut guest = Guest::new(program);
    assert_eq!(guest.run(2), Exit::Reached);
    guest.engine.set_stops(&breakpoints([CODE + 2, CODE + 4]));
    assert_eq!(guest.run(10), here);
    let mut passes = Guest::new(program);
    assert_eq!(passes.run(2), Exit::Reached);
    passes.engine.set_stops(&breakpoints([CODE + 2, CODE + 4]));
    passes.engine.pass_breakpoints();
    for guest in [&mut guest, &mut passes] {
        assert_eq!(guest.run(10), Exit::Stop { vcpu: 0, why: Why::Breakpoint { address: CODE + 4 } });
        // Set again while it stands there: it still goes on.
        guest.engine.set_stops(&breakpoints([CODE + 4]));
        assert_eq!(guest.run(10), Exit::Halted);
    }
}

#[test]
fn breakpoints_of_a_second_vcpu_in_real_mode_are_linear() {
    let mut guest = Guest::with_vcpus(2, |a| {
        a.mov(al, 7).unwrap();
        a.out(i32::from(START_PORT), al).unwrap();
        a.hlt().unwrap();
    });
    // INC BX; MOV [0x500], BX; JMP $-5
    guest.memory.write(0x7000, &[0x43, 0x89, 0x1e, 0x00, 0x05, 0xeb, 0xf9]).unwrap();
    guest.engine.set_stops(&Stops {
        breakpoints: vec![0x7005],
        watchpoints: vec![Watchpoint { address: 0x501, bytes: 1, kind: WatchKind::PhysicalWrite }],
    });
    for round in 1..4 {
        let Exit::Stop { vcpu: 1, why: Why::Watchpoint { rip: 1, gpa: 0x501, .. } } = guest.run(100_000) else {
            panic!("round {round}");
        };
        assert_eq!(guest.run(100_000), Exit::Stop { vcpu: 1, why: Why::Breakpoint { address: 0x7005 } });
        assert_eq!(guest.engine.peek(1).unwrap().gprs[3], round);
    }
}
