//! The engine's host: exits, devices, interrupts, time.

use iced_x86::code_asm::*;

use super::*;
use crate::cpu::RunState;

#[test]
fn ports_and_memory_of_devices_see_each_access_once() {
    let mut guest = Guest::new(|a| {
        a.mov(rax, DEVICE).unwrap();
        a.mov(ecx, dword_ptr(rax)).unwrap();
        a.mov(qword_ptr(rax + 8), rcx).unwrap();
        a.add(dword_ptr(rax + 0x10), 3).unwrap();
        a.mov(dx, 0x3f8).unwrap();
        a.mov(al, 0x41).unwrap();
        a.out(dx, al).unwrap();
        a.in_(ax, 0x60).unwrap();
        a.hlt().unwrap();
    });
    guest.world.registers.extend([(DEVICE, 0x1234_5678), (DEVICE + 0x10, 39), (0x60, 0xbeef)]);
    assert_eq!(guest.run(1000), Exit::Halted);
    assert_eq!(
        guest.world.log,
        [
            "1: load 0x20000000 4",
            "2: store 0x20000008 8 0x12345678",
            "3: load 0x20000010 4",
            "3: store 0x20000010 4 0x2a",
            "6: out 0x3f8 1 0x41",
            "7: in 0x60 2",
        ]
    );
    let state = guest.state();
    assert_eq!(state.gprs[0] & 0xffff, 0xbeef);
    assert_eq!(state.run_state, RunState::Halted);
    assert_eq!(guest.engine.clock().retired, 9);
}

#[test]
fn an_interrupt_waits_for_if_and_for_the_shadow_of_sti() {
    let mut guest = Guest::new(|a| {
        a.nop().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.sti().unwrap();
        a.inc(eax).unwrap();
        a.inc(eax).unwrap();
        a.hlt().unwrap();
    });
    handlers(&guest.memory, [0x40]);
    guest.world.alarms.push((1, 0x40));
    assert_eq!(guest.run(1000), Exit::Halted);
    let state = guest.state();
    assert_eq!(state.rip, HANDLERS + 0x40 * 16 + 1);
    // Delivered after the INC behind STI: RIP on the stack is the second INC.
    assert_eq!(get(&guest.memory, state.gprs[4]), CODE + 6);
    assert_eq!(guest.world.log, ["1: alarm of 1", "acknowledge 0x40"]);
}

#[test]
fn an_interrupt_comes_exactly_at_its_deadline() {
    for deadline in 1..40 {
        let mut guest = Guest::new(|a| {
            let mut again = a.create_label();
            a.sti().unwrap();
            a.nop().unwrap();
            a.set_label(&mut again).unwrap();
            a.inc(rax).unwrap();
            a.inc(rbx).unwrap();
            a.jmp(again).unwrap();
        });
        handlers(&guest.memory, [0x40]);
        guest.world.alarms.push((deadline, 0x40));
        assert_eq!(guest.run(1000), Exit::Halted);
        // STI, NOP, then three instructions a round; STI's shadow covers the NOP.
        let done = deadline.max(2) - 2;
        let state = guest.state();
        assert_eq!((state.gprs[0], state.gprs[3]), (done.div_ceil(3), (done + 1) / 3), "deadline {deadline}");
        assert_eq!(guest.engine.clock().retired, deadline.max(2) + 1);
    }
}

#[test]
fn a_halted_guest_wakes_for_an_interrupt_only() {
    let mut guest = Guest::new(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
        a.mov(eax, 7).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    guest.memory.write(HANDLERS + 0x40 * 16, &[0x48, 0xcf]).unwrap();
    assert_eq!(guest.run(1000), Exit::Halted);
    assert_eq!(guest.run(1000), Exit::Halted);
    assert_eq!(guest.engine.clock().retired, 2);
    let mut clock = guest.engine.clock();
    clock.skipped_tsc += 5000;
    guest.engine.set_clock(clock);
    guest.world.alarms.push((5000, 0x40));
    assert_eq!(guest.run(1000), Exit::Halted);
    assert_eq!(guest.state().gprs[0] & 0xff, 7);
    assert_eq!(guest.world.log, ["5002: alarm of 5000", "acknowledge 0x40"]);
    // Interrupts are off now: nothing wakes it.
    guest.world.pending.push(0x40);
    assert_eq!(guest.run(1000), Exit::Halted);
}

#[test]
fn task_priority_holds_interrupts_back() {
    let mut guest = Guest::new(|a| {
        a.mov(eax, 5).unwrap();
        a.mov(cr8, rax).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.mov(rbx, cr8).unwrap();
        a.mov(eax, 3).unwrap();
        a.mov(cr8, rax).unwrap();
        a.ud2().unwrap();
    });
    handlers(&guest.memory, [6, 0x40]);
    guest.world.pending.push(0x40);
    assert_eq!(guest.run(1000), Exit::Halted);
    let state = guest.state();
    assert_eq!(state.rip, HANDLERS + 0x40 * 16 + 1);
    assert_eq!((state.gprs[3], state.cr8, guest.world.tpr), (5, 3, 3));
}

#[test]
fn cpuid_and_msrs_are_those_of_the_model() {
    let mut guest = Guest::new(|a| {
        a.mov(eax, 0x8000_0001_u32).unwrap();
        a.cpuid().unwrap();
        a.mov(r8d, edx).unwrap();
        a.mov(ecx, 0xc000_0080_u32).unwrap();
        a.rdmsr().unwrap();
        a.mov(r9d, eax).unwrap();
        a.mov(ecx, 0x1b).unwrap();
        a.rdmsr().unwrap();
        a.mov(ecx, 0x277).unwrap();
        a.mov(eax, 0x0606_0606).unwrap();
        a.mov(edx, eax).unwrap();
        a.wrmsr().unwrap();
        a.mov(ecx, 0x3b).unwrap();
        a.mov(eax, 0x1000).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.rdtsc().unwrap();
        a.mov(r10, rax).unwrap();
        a.mov(ecx, 0x4000_0000).unwrap();
        a.rdmsr().unwrap();
    });
    handlers(&guest.memory, [13]);
    assert_eq!(guest.run(1000), Exit::Halted);
    let state = guest.state();
    let topology = Topology { vcpu: 0, vcpus: 1, tsc_hz: 1_000_000_000 };
    assert_eq!(state.gprs[8], u64::from(CpuModel::SoftV1.cpuid(0x8000_0001, 0, &topology)[3]));
    assert_eq!(state.gprs[9], efer::LME | efer::LMA | efer::NXE | efer::SCE, "no SVME");
    assert_eq!(state.msrs[&0x277], 0x0606_0606_0606_0606);
    assert_eq!((state.msrs[&0x3b], state.tsc_offset), (0x1000, 0x1000));
    assert_eq!(state.gprs[10], 0x1000 + 16);
    assert_eq!(guest.world.log, ["rdmsr 0x1b"]);
    assert_eq!(get(&guest.memory, state.gprs[4] + 8), CODE + u64::from(code_length_before_last(&guest.memory)));
}

/// Offset of the last RDMSR of the program above: found by its bytes, so that the test need not count lengths.
fn code_length_before_last(memory: &GuestMemory) -> u32 {
    let mut bytes = [0; 256];
    memory.read(CODE, &mut bytes).unwrap();
    bytes.windows(2).rposition(|pair| pair == [0x0f, 0x32]).unwrap() as u32
}

#[test]
fn string_io_reaches_the_device_element_by_element() {
    let mut guest = Guest::new(|a| {
        a.mov(esi, 0x30_0000).unwrap();
        a.mov(ecx, 3).unwrap();
        a.mov(edx, 0x3f8).unwrap();
        a.rep().outsb().unwrap();
        a.mov(edi, 0x30_0100).unwrap();
        a.mov(ecx, 2).unwrap();
        a.rep().insd().unwrap();
        a.hlt().unwrap();
    });
    guest.memory.write(0x30_0000, b"abc").unwrap();
    guest.world.registers.insert(0x3f8, 0x1122_3344);
    assert_eq!(guest.run(1000), Exit::Halted);
    assert_eq!(
        guest.world.log,
        ["3: out 0x3f8 1 0x61", "4: out 0x3f8 1 0x62", "5: out 0x3f8 1 0x63", "8: in 0x3f8 4", "9: in 0x3f8 4"]
    );
    assert_eq!(get(&guest.memory, 0x30_0100), 0x1122_3344_1122_3344);
    let state = guest.state();
    assert_eq!((state.gprs[1], state.gprs[6], state.gprs[7]), (0, 0x30_0003, 0x30_0108));
}

#[test]
fn stopping_shutting_down_and_failing_end_the_run() {
    let mut guest = Guest::new(|a| {
        a.mov(dx, 0xdead_u32 as i32).unwrap();
        a.out(dx, al).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(guest.run(1000), Exit::Stopped);
    assert_eq!(guest.state().rip, CODE + 5);
    let mut guest = Guest::new(|a| a.ud2().unwrap());
    for vector in [6, 8, 11, 13] {
        gate(&guest.memory, vector, 0, 0);
    }
    assert_eq!(guest.run(1000), Exit::Shutdown);
    assert_eq!(guest.run(1000), Exit::Shutdown);
    assert_eq!(guest.engine.vmcb(0).unwrap().control.exit_code(), ExitCode::SHUTDOWN);
    let mut guest = Guest::new(|a| {
        a.mov(eax, DEVICE as u32).unwrap();
        a.jmp(rax).unwrap();
    });
    assert!(matches!(guest.run(1000), Exit::Failed(why) if why.contains("executes at 0x20000000")));
}

#[test]
fn instructions_of_the_host_are_undefined_for_the_guest() {
    type Program = fn(&mut CodeAssembler);
    let programs: &[(Program, u64)] = &[
        (|a| a.vmrun().unwrap(), 6),
        (|a| a.vmsave().unwrap(), 6),
        (|a| a.clgi().unwrap(), 6),
        (|a| a.monitor().unwrap(), 6),
        (|a| a.mwait().unwrap(), 6),
        (|a| a.rdpmc().unwrap(), 13),
    ];
    for (index, (program, vector)) in programs.iter().enumerate() {
        let mut guest = Guest::new(program);
        handlers(&guest.memory, 0..32);
        assert_eq!(guest.run(1000), Exit::Halted);
        assert_eq!(guest.state().rip, HANDLERS + vector * 16 + 1, "program {index}");
    }
}

#[test]
fn illegal_states_are_not_loaded() {
    let mut guest = Guest::new(|a| a.hlt().unwrap());
    let before = guest.state();
    let mut state = before.clone();
    state.cr0 |= 1 << 32;
    assert!(matches!(guest.engine.load(0, &state), Err(LoadError::Illegal(why)) if why.contains("CR0")));
    assert_eq!(guest.engine.load(1, &before), Err(LoadError::NoVcpu(1)));
    assert_eq!(guest.state(), before);
}

#[test]
fn an_nmi_waits_for_the_iret_of_the_one_before() {
    let mut guest = Guest::new(|a| {
        let mut after = a.create_label();
        a.nop().unwrap();
        a.mov(rbx, rsp).unwrap();
        a.push(i32::from(KERNEL_SS)).unwrap();
        a.push(rbx).unwrap();
        a.push(2).unwrap();
        a.push(i32::from(KERNEL_CS)).unwrap();
        a.lea(rax, ptr(after)).unwrap();
        a.push(rax).unwrap();
        a.iretq().unwrap();
        a.set_label(&mut after).unwrap();
        a.inc(ecx).unwrap();
    });
    handlers(&guest.memory, [2]);
    let mut state = guest.state();
    (state.nmi_pending, state.nmi_masked) = (true, true);
    guest.engine.load(0, &state).unwrap();
    assert_eq!(guest.run(1000), Exit::Halted);
    let state = guest.state();
    assert_eq!(state.rip, HANDLERS + 2 * 16 + 1);
    assert_eq!(get(&guest.memory, state.gprs[4]), state.gprs[0], "right after IRET");
    assert_eq!((state.nmi_pending, state.nmi_masked), (false, true));
}
