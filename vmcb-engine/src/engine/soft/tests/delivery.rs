//! Exceptions and interrupts through the IDT, and the ways back.

use iced_x86::code_asm::*;

use super::*;
use crate::engine::soft::core::{RAX, RCX};
use crate::vmcb::registers::rflags;

/// Words of the frame on the stack that the processor halted on.
fn frame(bare: &Bare, words: u64) -> Vec<u64> {
    (0..words).map(|word| get(&bare.memory, bare.core.gprs[RSP] + word * 8)).collect()
}

#[test]
fn faults_push_error_code_and_point_at_the_instruction() {
    let mut bare = Bare::new(|a| {
        a.nop().unwrap();
        a.mov(rax, qword_ptr(0x4000_0000)).unwrap();
    });
    handlers(&bare.memory, 0..32);
    assert_eq!(bare.halted_vector(), 14);
    let frame = frame(&bare, 6);
    assert_eq!(frame[0], 0, "supervisor read of a page that is not present");
    assert_eq!(frame[1..3], [CODE + 1, u64::from(KERNEL_CS)]);
    assert_eq!(frame[3] & rflags::RF, rflags::RF);
    assert_eq!(frame[4..], [STACK, u64::from(KERNEL_SS)]);
    assert_eq!(bare.core.cr2, 0x4000_0000);
    assert_eq!(bare.core.gprs[RSP] % 16, 0);
    assert_eq!(bare.core.system_flags & rflags::IF, 0);
}

#[test]
fn a_fault_of_user_code_switches_to_the_stack_of_the_tss() {
    let mut bare = Bare::user(|a| a.ud2().unwrap());
    handlers(&bare.memory, 0..32);
    assert_eq!(bare.halted_vector(), 6);
    assert_eq!(bare.core.gprs[RSP], RSP0 - 40);
    assert_eq!(frame(&bare, 5)[0..2], [CODE, u64::from(USER_CS)]);
    assert_eq!(frame(&bare, 5)[3..], [USER_STACK, u64::from(USER_SS)]);
    assert_eq!((bare.core.cpl, bare.core.segments[SS].selector), (0, 0));
    assert!(!bare.core.segments[SS].present());
}

#[test]
fn an_interrupt_stack_is_used_whatever_the_level() {
    let mut bare = Bare::new(|a| a.int(0x80).unwrap());
    handlers(&bare.memory, [0x80]);
    gate(&bare.memory, 0x80, 0xee, 1);
    assert_eq!(bare.halted_vector(), 0x80);
    assert_eq!(bare.core.gprs[RSP], IST1 - 40);
    assert_eq!(frame(&bare, 1), [CODE + 2]);
    assert_eq!(bare.core.retired(), 1, "INT retires, HLT exits");
}

#[test]
fn software_interrupts_check_the_gates_dpl() {
    let mut bare = Bare::user(|a| a.int(0x80).unwrap());
    handlers(&bare.memory, [13, 0x80]);
    gate(&bare.memory, 0x80, 0x8e, 0);
    assert_eq!(bare.halted_vector(), 13);
    assert_eq!(frame(&bare, 2), [0x80 << 3 | 2, CODE]);
    assert_eq!(bare.core.retired(), 0);
}

#[test]
fn int3_returns_behind_itself() {
    let mut bare = Bare::new(|a| a.int3().unwrap());
    handlers(&bare.memory, [3]);
    assert_eq!(bare.halted_vector(), 3);
    assert_eq!(frame(&bare, 1), [CODE + 1]);
}

#[test]
fn iretq_goes_to_user_code_and_back() {
    let mut bare = Bare::new(|a| {
        a.push(i32::from(USER_SS)).unwrap();
        a.mov(rax, USER_STACK).unwrap();
        a.push(rax).unwrap();
        a.push(0x202).unwrap();
        a.push(i32::from(USER_CS)).unwrap();
        a.mov(rax, CODE + 0x800).unwrap();
        a.push(rax).unwrap();
        a.iretq().unwrap();
    });
    bare.memory
        .write(
            CODE + 0x800,
            &assemble(64, CODE + 0x800, |a| {
                a.mov(ecx, 77).unwrap();
                a.int(0x80).unwrap();
            }),
        )
        .unwrap();
    handlers(&bare.memory, [0x80]);
    assert_eq!(bare.halted_vector(), 0x80);
    assert_eq!(bare.core.gprs[RCX], 77);
    let frame = frame(&bare, 5);
    assert_eq!(frame[1..], [u64::from(USER_CS), 0x202, USER_STACK, u64::from(USER_SS)]);
    assert_eq!(bare.core.cpl, 0);
}

#[test]
fn a_returning_handler_resumes_the_program_with_its_flags() {
    let mut bare = Bare::new(|a| {
        a.stc().unwrap();
        a.int(0x80).unwrap();
        a.setc(al).unwrap();
        a.hlt().unwrap();
    });
    bare.memory
        .write(
            HANDLERS + 0x80 * 16,
            &assemble(64, HANDLERS + 0x80 * 16, |a| {
                a.clc().unwrap();
                a.iretq().unwrap();
            }),
        )
        .unwrap();
    bare.core.gprs[RAX] = 0;
    bare.halt();
    assert_eq!(bare.core.gprs[RAX], 1);
    assert_eq!(bare.core.gprs[RSP], STACK);
}

#[test]
fn syscall_and_sysret_swap_levels() {
    let mut bare = Bare::user(|a| {
        a.mov(eax, 9).unwrap();
        a.syscall().unwrap();
        a.ud2().unwrap();
    });
    let entry = CODE + 0x800;
    bare.memory
        .write(
            entry,
            &assemble(64, entry, |a| {
                a.swapgs().unwrap();
                a.add(eax, 1).unwrap();
                a.swapgs().unwrap();
                a.sysretq().unwrap();
            }),
        )
        .unwrap();
    bare.core.msrs.star = u64::from(KERNEL_CS) << 32 | u64::from(USER_CS - 16) << 48;
    bare.core.msrs.lstar = entry;
    bare.core.msrs.sfmask = rflags::IF;
    bare.core.msrs.kernel_gs_base = 0x1234_5000;
    bare.core.system_flags |= rflags::IF;
    handlers(&bare.memory, [6]);
    assert_eq!(bare.halted_vector(), 6, "the UD2 after SYSCALL, back in user code");
    assert_eq!(bare.core.gprs[RAX], 10);
    assert_eq!(frame(&bare, 3), [CODE + 7, u64::from(USER_CS), 0x10202]);
    assert_eq!(bare.core.gprs[RCX], CODE + 7);
    assert_eq!(bare.core.msrs.kernel_gs_base, 0x1234_5000);
}

#[test]
fn two_faults_make_a_double_fault_and_three_a_shutdown() {
    let mut bare = Bare::new(|a| a.ud2().unwrap());
    handlers(&bare.memory, [8]);
    // #UD's gate is not present: #NP; #NP's neither: double fault.
    gate(&bare.memory, 6, 0x6e, 0);
    gate(&bare.memory, 11, 0x6e, 0);
    assert_eq!(bare.halted_vector(), 8);
    assert_eq!(frame(&bare, 2), [0, CODE]);
    let mut bare = Bare::new(|a| a.ud2().unwrap());
    bare.core.idtr.limit = 0;
    assert_eq!(bare.run(), ExitCode::SHUTDOWN);
}

#[test]
fn single_step_traps_after_each_instruction() {
    let mut bare = Bare::new(|a| {
        a.mov(rax, cr0).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
    });
    handlers(&bare.memory, [1]);
    bare.core.system_flags |= rflags::TF;
    assert_eq!(bare.halted_vector(), 1);
    assert_eq!(frame(&bare, 1), [CODE + 3]);
    assert_eq!(bare.core.debug[4] & 1 << 14, 1 << 14);
    assert_eq!(bare.core.system_flags & rflags::TF, 0);
    assert_eq!(frame(&bare, 3)[2] & rflags::TF, rflags::TF);
}

#[test]
fn legacy_gates_switch_stacks_and_return() {
    // 32-bit protected mode without paging: GDT with 32-bit segments, a 32-bit TSS, user code that does INT 80h.
    let memory = ram();
    tables(&memory);
    let mut core = Core::new(Arc::clone(&memory));
    core.cr0 = cr0::PE | cr0::ET;
    core.segments[CS] = Segment::new(USER_CS_32, 0xcfb, 0xffff_ffff, 0);
    for register in [SS, DS, ES] {
        core.segments[register] = Segment::new(USER_SS, 0xcf3, 0xffff_ffff, 0);
    }
    core.cpl = 3;
    core.gdtr = Segment::new(0, 0, 0x57, GDT);
    core.idtr = Segment::new(0, 0, 0x7ff, IDT);
    core.tr = Segment::new(TSS_SELECTOR, 0x8b, 0x67, TSS);
    put(&memory, TSS + 4, RSP0);
    put(&memory, TSS + 8, KERNEL_SS.into());
    for vector in 0..256_u64 {
        let target = HANDLERS + vector * 16;
        put(&memory, IDT + vector * 8, target & 0xffff | u64::from(CS_32) << 16 | 0xee << 40 | (target >> 16) << 48);
    }
    memory
        .write(
            CODE,
            &assemble(32, CODE, |a| {
                a.int(0x80).unwrap();
                a.mov(ebx, 5).unwrap();
                a.ud2().unwrap();
            }),
        )
        .unwrap();
    memory
        .write(
            HANDLERS + 0x80 * 16,
            &assemble(32, HANDLERS + 0x80 * 16, |a| {
                a.mov(eax, cs).unwrap();
                a.iretd().unwrap();
            }),
        )
        .unwrap();
    handlers(&memory, [6]);
    core.rip = CODE;
    core.gprs[RSP] = USER_STACK;
    core.refresh_mode();
    let mut bare = Bare { core, memory };
    assert_eq!(bare.halted_vector(), 6);
    assert_eq!((bare.core.gprs[RAX], bare.core.gprs[3]), (u64::from(CS_32), 5));
    assert_eq!(bare.core.gprs[RSP], RSP0 - 20);
    let mut words = [0; 20];
    bare.memory.read(RSP0 - 20, &mut words).unwrap();
    let word = |at: usize| u32::from_le_bytes(words[at * 4..at * 4 + 4].try_into().unwrap());
    assert_eq!([word(0), word(1)], [CODE as u32 + 7, u32::from(USER_CS_32)]);
    assert_eq!([word(3), word(4)], [USER_STACK as u32, u32::from(USER_SS)]);
}

#[test]
fn real_mode_interrupts_use_four_byte_vectors() {
    let memory = ram();
    let mut core = Core::new(Arc::clone(&memory));
    core.segments[CS] = Segment::new(0x100, 0x9b, 0xffff, 0x1000);
    core.idtr = Segment::new(0, 0, 0x3ff, 0);
    core.rip = 0;
    core.gprs[RSP] = 0x8000;
    core.refresh_mode();
    memory.write(0x1000, &[0xcd, 0x21, 0xf4]).unwrap();
    memory.write(0x21 * 4, &[0x10, 0x00, 0x00, 0x02]).unwrap();
    memory.write(0x2010, &[0x40, 0xcf]).unwrap();
    let mut bare = Bare { core, memory };
    assert_eq!(bare.halt(), 2);
    assert_eq!((bare.core.gprs[RAX], bare.core.gprs[RSP]), (1, 0x8000));
    assert_eq!(bare.core.segments[CS].base, 0x1000);
}

#[test]
fn a_handler_that_faults_for_ever_still_reaches_the_stop_point() {
    let mut bare = Bare::new(|a| a.ud2().unwrap());
    gate(&bare.memory, 6, 0xee, 1);
    bare.memory.write(HANDLERS + 6 * 16, &[0x0f, 0x0b]).unwrap();
    assert_eq!(bare.core.run_until(3), Ended::Reached);
    assert_eq!(bare.core.retired(), 3);
}

#[test]
fn far_transfers_change_code_segments() {
    let mut bare = Bare::new(|a| {
        a.push(i32::from(CS_32)).unwrap();
        a.mov(rax, CODE + 0x800).unwrap();
        a.push(rax).unwrap();
        a.db(&[0x48, 0xcb]).unwrap();
    });
    bare.memory
        .write(
            CODE + 0x800,
            &assemble(32, CODE + 0x800, |a| {
                a.mov(eax, u32::MAX).unwrap();
                a.inc(eax).unwrap();
                a.hlt().unwrap();
            }),
        )
        .unwrap();
    assert_eq!(bare.halt(), CODE + 0x806);
    assert!(!bare.core.mode.long && bare.core.mode.big);
    assert_eq!(bare.core.gprs[RAX], 0);
}
