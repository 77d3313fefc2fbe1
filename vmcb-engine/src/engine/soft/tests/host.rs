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
