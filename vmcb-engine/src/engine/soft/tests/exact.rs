//! Where a run is cut is never visible: any partition of a program leaves the same states, devices and memory.

use iced_x86::code_asm::*;

use super::*;

/// Loops, calls, string moves, faults, port and memory accesses of devices, and a timer.
fn program(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    let mut callee = a.create_label();
    let mut over = a.create_label();
    a.sti().unwrap();
    a.mov(ebp, 6).unwrap();
    a.set_label(&mut again).unwrap();
    a.mov(esi, CODE as i32).unwrap();
    a.mov(edi, 0x30_0000).unwrap();
    a.mov(ecx, 40).unwrap();
    a.rep().movsb().unwrap();
    a.call(callee).unwrap();
    a.mov(ebx, DEVICE as u32).unwrap();
    a.add(dword_ptr(rbx), 7).unwrap();
    a.push(rbp).unwrap();
    a.cpuid().unwrap();
    a.pop(rbp).unwrap();
    a.int(0x80).unwrap();
    a.rdtsc().unwrap();
    a.mov(qword_ptr(0x30_1000), rax).unwrap();
    a.out(0x42, al).unwrap();
    a.dec(ebp).unwrap();
    a.jne(again).unwrap();
    a.jmp(over).unwrap();
    a.set_label(&mut callee).unwrap();
    a.imul_3(rax, rcx, 77).unwrap();
    a.xor(rdx, rax).unwrap();
    a.pushfq().unwrap();
    a.pop(r8).unwrap();
    a.ret().unwrap();
    a.set_label(&mut over).unwrap();
    a.cli().unwrap();
    a.hlt().unwrap();
}

pub fn guest() -> Guest {
    let mut guest = Guest::new(program);
    let memory = &guest.memory;
    memory
        .write(
            HANDLERS + 0x80 * 16,
            &assemble(64, 0, |a| {
                a.inc(r9).unwrap();
                a.iretq().unwrap();
            }),
        )
        .unwrap();
    memory
        .write(
            HANDLERS + 0x40 * 16,
            &assemble(64, 0, |a| {
                a.inc(r10).unwrap();
                a.iretq().unwrap();
            }),
        )
        .unwrap();
    guest.world.alarms = (1..12).map(|n| (n * 17, 0x40)).collect();
    guest
}

pub fn ram_digest(memory: &GuestMemory) -> blake3::Hash {
    let mut bytes = vec![0; 4 << 20];
    memory.read(0, &mut bytes).unwrap();
    blake3::hash(&bytes)
}

#[test]
fn every_cut_of_a_program_is_invisible() {
    // One instruction at a time: the state at every count.
    let mut single = guest();
    let mut states = vec![single.state()];
    let end = loop {
        let next = single.engine.clock().retired + 1;
        match single.run(next) {
            Exit::Reached => assert_eq!(single.engine.clock().retired, next),
            Exit::Halted => break single.engine.clock().retired,
            other => panic!("{other}"),
        }
        states.push(single.state());
    };
    assert!(end > 150, "{end}");
    let last = ram_digest(&single.memory);
    for cut in 0..=end {
        let mut guest = guest();
        let exit = guest.run(cut);
        assert_eq!(guest.engine.clock().retired, cut, "{exit}");
        if cut < end {
            let differences = guest.state().compare(&states[cut as usize]);
            assert!(differences.is_empty(), "after {cut}: {}", differences[0]);
        }
        assert_eq!(guest.run(end + 10), Exit::Halted);
        assert_eq!(guest.world.log, single.world.log, "cut at {cut}");
        assert_eq!(ram_digest(&guest.memory), last, "cut at {cut}");
    }
}

#[test]
fn a_restored_machine_goes_on_as_the_one_it_came_from() {
    for cut in (1..180).step_by(7) {
        let mut first = guest();
        first.run(cut);
        let (state, clock) = (first.state(), first.engine.clock());
        let mut second = guest();
        let mut ram = vec![0; 16 << 20];
        first.memory.read(0, &mut ram).unwrap();
        second.memory.write(0, &ram).unwrap();
        second.engine.load(0, &state).unwrap();
        second.engine.set_clock(clock);
        second.world.alarms = first.world.alarms.clone();
        second.world.pending = first.world.pending.clone();
        second.world.registers = first.world.registers.clone();
        assert_eq!(second.state(), state);
        for guest in [&mut first, &mut second] {
            guest.world.log.clear();
            assert_eq!(guest.run(10_000), Exit::Halted);
        }
        assert_eq!(first.world.log, second.world.log, "cut at {cut}");
        assert_eq!(first.state(), second.state(), "cut at {cut}");
        assert_eq!(ram_digest(&first.memory), ram_digest(&second.memory), "cut at {cut}");
    }
}

#[test]
fn a_look_between_any_two_instructions_is_invisible() {
    let mut alone = guest();
    assert_eq!(alone.run(10_000), Exit::Halted);
    let mut watched = guest();
    let mut cut = guest();
    while watched.engine.clock().retired < alone.engine.clock().retired {
        let next = watched.engine.clock().retired + 1;
        watched.run(next);
        cut.run(next);
        let seen = watched.engine.peek(0).unwrap();
        assert_eq!(seen, watched.engine.peek(0).unwrap(), "at {next}");
        assert_eq!(seen.compare(&cut.state()), [], "at {next}");
    }
    assert_eq!(watched.world.log, alone.world.log);
    assert_eq!(watched.engine.peek(0).unwrap(), alone.engine.peek(0).unwrap());
    assert_eq!(ram_digest(&watched.memory), ram_digest(&alone.memory));
}
