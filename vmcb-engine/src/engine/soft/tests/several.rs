//! Several vCPUs: start-up, turns, code that one writes and another runs.

use iced_x86::code_asm::*;

use super::*;
use crate::cpu::RunState;

/// Where the second vCPU starts, in real mode.
const START: u64 = 0x7000;
/// Counters that both raise.
pub const COUNTER: u64 = 0x500;

/// Starts the second vCPU, then raises the counter until the other has raised its own to 3000.
fn first(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.mov(al, (START >> 12) as i32).unwrap();
    a.out(i32::from(START_PORT), al).unwrap();
    a.set_label(&mut again).unwrap();
    a.lock().inc(dword_ptr(COUNTER)).unwrap();
    a.cmp(dword_ptr(COUNTER + 4), 3000).unwrap();
    a.jb(again).unwrap();
    a.mov(al, 0).unwrap();
    a.out(i32::from(START_PORT), al).unwrap();
    a.hlt().unwrap();
}

/// Real mode: raises both counters, then waits for the NMI.
fn second(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.lock().inc(dword_ptr(COUNTER as u32)).unwrap();
    a.inc(dword_ptr((COUNTER + 4) as u32)).unwrap();
    a.cmp(dword_ptr((COUNTER + 4) as u32), 3000).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.hlt().unwrap();
}

pub fn guest() -> Guest {
    let guest = Guest::with_vcpus(2, first);
    guest.memory.write(START, &assemble(16, 0, second)).unwrap();
    // NMI in real mode: INC BX, IRET.
    guest.memory.write(2 * 4, &[0x00, 0x01, 0x00, 0x07]).unwrap();
    guest.memory.write(START + 0x100, &[0x43, 0xcf]).unwrap();
    guest
}

#[test]
fn a_second_vcpu_starts_in_real_mode_and_takes_turns() {
    let mut guest = guest();
    assert_eq!(guest.engine.store(1).unwrap().run_state, RunState::Uninitialised);
    assert_eq!(guest.run(10_000_000), Exit::Halted);
    let other = guest.engine.store(1).unwrap();
    assert_eq!((other.run_state, other.gprs[3], other.cs.base), (RunState::Halted, 1, START));
    let both = get(&guest.memory, COUNTER);
    assert_eq!(both >> 32, 3000);
    let (of_first, retired) = ((both & 0xffff_ffff) - 3000, guest.engine.clock().retired);
    // First: 2 + 3 a round + 3; second: 4 a round + HLT, handler of two, HLT.
    assert_eq!(retired, 2 + of_first * 3 + 3 + 3000 * 4 + 1 + 2 + 1);
    assert!(of_first > 1000, "{of_first}");
}

#[test]
fn cuts_of_two_vcpus_are_invisible() {
    let mut whole = guest();
    assert_eq!(whole.run(10_000_000), Exit::Halted);
    let states: Vec<CpuState> = (0..2).map(|vcpu| whole.engine.store(vcpu).unwrap()).collect();
    for step in [1, 777, 5000, 5001] {
        let mut cut = guest();
        while cut.engine.clock().retired < whole.engine.clock().retired {
            let next = cut.engine.clock().retired + step;
            cut.run(next);
        }
        assert_eq!(cut.engine.clock(), whole.engine.clock(), "step {step}");
        assert_eq!(get(&cut.memory, COUNTER), get(&whole.memory, COUNTER), "step {step}");
        for (vcpu, state) in states.iter().enumerate() {
            assert_eq!(cut.engine.store(vcpu).unwrap().compare(state), [], "step {step}");
        }
    }
}

#[test]
fn code_that_another_vcpu_changes_runs_changed() {
    // The second spins on JMP $ until the first makes it INC BX; HLT.
    let mut guest = Guest::with_vcpus(2, |a| {
        let mut wait = a.create_label();
        a.mov(al, (START >> 12) as i32).unwrap();
        a.out(i32::from(START_PORT), al).unwrap();
        a.mov(ecx, 10_000).unwrap();
        a.set_label(&mut wait).unwrap();
        a.dec(ecx).unwrap();
        a.jne(wait).unwrap();
        a.mov(word_ptr(START), 0xf443).unwrap();
        a.hlt().unwrap();
    });
    guest.memory.write(START, &[0xeb, 0xfe]).unwrap();
    // The page is in the first vCPU's write table before the second decodes it.
    assert_eq!(guest.run(1_000_000), Exit::Halted);
    assert_eq!(guest.engine.store(1).unwrap().gprs[3], 1);
}
