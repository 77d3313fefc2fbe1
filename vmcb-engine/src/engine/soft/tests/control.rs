//! Control registers, MSRs, descriptor tables: what they refuse, and what follows from them.

use iced_x86::code_asm::*;

use super::*;
use crate::engine::soft::core::{RAX, RBX, RCX, RDX};
use crate::vmcb::registers::rflags;

fn runs_into(program: impl FnOnce(&mut CodeAssembler)) -> u64 {
    let mut bare = Bare::new(program);
    handlers(&bare.memory, 0..32);
    bare.halt()
}

#[test]
fn illegal_control_values_fault() {
    let gp = HANDLERS + 13 * 16;
    for value in [1_u64 << 32, 1 << 31, 1 << 29 | 1 << 31 | 1] {
        let at = runs_into(|a| {
            a.mov(rax, value).unwrap();
            a.mov(cr0, rax).unwrap();
        });
        assert_eq!(at, gp, "CR0 {value:#x}");
    }
    for value in [0_u64, 1 << 5 | 1 << 31, 1 << 5 | 1 << 18] {
        let at = runs_into(|a| {
            a.mov(rax, value).unwrap();
            a.mov(cr4, rax).unwrap();
        });
        assert_eq!(at, gp, "CR4 {value:#x}");
    }
    for (msr, value) in [(0xc000_0080_u32, 0_u64), (0xc000_0080, 1 << 3), (0xc000_0082, 1 << 47), (0x1234_5678, 0)] {
        let at = runs_into(|a| {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, value as u32).unwrap();
            a.mov(edx, (value >> 32) as u32).unwrap();
            a.wrmsr().unwrap();
        });
        assert_eq!(at, gp, "MSR {msr:#x} = {value:#x}");
    }
}

#[test]
fn user_code_has_no_privileges() {
    type Program = fn(&mut CodeAssembler);
    let programs: &[(Program, u64)] = &[
        (|a| a.cli().unwrap(), 13),
        (|a| a.hlt().unwrap(), 13),
        (|a| a.mov(rax, cr0).unwrap(), 13),
        (|a| a.mov(dr0, rax).unwrap(), 13),
        (|a| a.rdmsr().unwrap(), 13),
        (|a| a.swapgs().unwrap(), 13),
        (|a| a.lgdt(ptr(rax)).unwrap(), 13),
        (|a| a.invlpg(byte_ptr(rax)).unwrap(), 13),
        (|a| a.in_(al, 0x60).unwrap(), 13),
        (|a| a.sysretq().unwrap(), 13),
        (|a| a.clac().unwrap(), 6),
        (|a| a.vmrun().unwrap(), 6),
        (|a| a.monitor().unwrap(), 6),
        (|a| a.xgetbv().unwrap(), 6),
    ];
    for (index, (program, vector)) in programs.iter().enumerate() {
        let mut bare = Bare::user(program);
        handlers(&bare.memory, 0..32);
        assert_eq!(bare.halted_vector(), *vector, "program {index}");
    }
}

#[test]
fn msrs_round_trip() {
    let mut bare = Bare::new(|a| {
        a.mov(ecx, 0xc000_0101_u32).unwrap();
        a.mov(edx, 0xffff_8880_u32).unwrap();
        a.mov(eax, 0x1000).unwrap();
        a.wrmsr().unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.rdmsr().unwrap();
        a.rdgsbase(rbx).unwrap();
        a.hlt().unwrap();
    });
    bare.halt();
    assert_eq!((bare.core.gprs[RAX], bare.core.gprs[RDX]), (0x1000, 0xffff_8880));
    assert_eq!(bare.core.gprs[RBX], 0xffff_8880_0000_1000);
}

#[test]
fn tsc_counts_instructions_inside_a_block() {
    let mut bare = Bare::new(|a| {
        a.rdtsc().unwrap();
        a.mov(ebx, eax).unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    bare.core.tsc_per_instruction = 3;
    bare.core.tsc_base = 1000;
    bare.halt();
    assert_eq!((bare.core.gprs[RBX], bare.core.gprs[RAX]), (1000, 1012));
}

#[test]
fn table_registers_store_what_they_loaded() {
    let mut bare = Bare::new(|a| {
        a.mov(rbx, 0x30_0000_u64).unwrap();
        a.lgdt(ptr(rbx)).unwrap();
        a.sgdt(ptr(rbx + 0x10)).unwrap();
        a.mov(eax, u32::from(TSS_SELECTOR)).unwrap();
        a.ltr(ax).unwrap();
        a.str(ecx).unwrap();
        a.hlt().unwrap();
    });
    bare.memory.write(0x30_0000, &[0x57, 0, 0, 0x80, 0, 0, 0, 0, 0, 0]).unwrap();
    // The descriptor of an available TSS.
    put(&bare.memory, GDT + 0x30, get(&bare.memory, GDT + 0x30) & !(2 << 40));
    bare.halt();
    assert_eq!(get(&bare.memory, 0x30_0010), 0x8000_0057 & 0xffff | 0x8000 << 16);
    assert_eq!(bare.core.gprs[RCX], u64::from(TSS_SELECTOR));
    assert_eq!(get(&bare.memory, GDT + 0x30) >> 41 & 1, 1, "busy");
}

#[test]
fn segment_loads_follow_the_rules() {
    // (selector, faults with): MOV DS from CPL 0.
    for (selector, expected) in [(KERNEL_SS, None), (0, None), (3, None), (USER_SS, None), (0x100, Some(0x100))] {
        let mut bare = Bare::new(|a| {
            a.mov(eax, u32::from(selector)).unwrap();
            a.mov(ds, eax).unwrap();
            a.mov(ecx, ds).unwrap();
            a.hlt().unwrap();
        });
        handlers(&bare.memory, [13]);
        let at = bare.halt();
        match expected {
            None => assert_eq!(bare.core.gprs[RCX], u64::from(selector), "{selector:#x}"),
            Some(code) => {
                assert_eq!(at, HANDLERS + 13 * 16);
                assert_eq!(get(&bare.memory, bare.core.gprs[RSP]), code);
            }
        }
    }
    // SS must have RPL = DPL = CPL.
    let mut bare = Bare::new(|a| {
        a.mov(eax, u32::from(USER_SS)).unwrap();
        a.mov(ss, eax).unwrap();
    });
    handlers(&bare.memory, [13]);
    assert_eq!(bare.halted_vector(), 13);
}

#[test]
fn looking_at_descriptors_loads_nothing() {
    let mut bare = Bare::new(|a| {
        a.mov(eax, u32::from(KERNEL_CS)).unwrap();
        a.lar(ecx, eax).unwrap();
        a.setz(bl).unwrap();
        a.lsl(edx, eax).unwrap();
        a.verw(ax).unwrap();
        a.setz(bh).unwrap();
        a.hlt().unwrap();
    });
    bare.core.gprs[RBX] = 0;
    bare.halt();
    assert_eq!(bare.core.gprs[RCX], 0x00af_9b00);
    assert_eq!(bare.core.gprs[RDX], 0xffff_ffff);
    assert_eq!(bare.core.gprs[RBX], 1);
}

#[test]
fn user_code_may_use_ports_that_the_tss_allows() {
    let mut bare = Bare::user(|a| {
        a.in_(al, 0x42).unwrap();
        a.in_(ax, 0x43).unwrap();
    });
    handlers(&bare.memory, [13]);
    bare.core.tr.limit = 0x68 + 0x20;
    bare.memory.write(TSS + 0x68, &[0xff; 0x21]).unwrap();
    // Ports 42h and 43h allowed, 44h not.
    bare.memory.write(TSS + 0x68 + 8, &[0b1111_0011]).unwrap();
    assert_eq!(bare.halted_vector(), 13);
    assert_eq!(get(&bare.memory, bare.core.gprs[RSP] + 8), CODE + 2);
    assert_eq!(bare.core.gprs[RAX] & 0xff, 0xff);
}

#[test]
fn alignment_is_checked_for_user_code_that_asks() {
    let mut bare = Bare::user(|a| {
        a.pushfq().unwrap();
        a.or(dword_ptr(rsp), 1 << 18).unwrap();
        a.mov(eax, dword_ptr(0x30_0001)).unwrap();
        a.popfq().unwrap();
        a.mov(eax, dword_ptr(0x30_0004)).unwrap();
        a.mov(eax, dword_ptr(0x30_0001)).unwrap();
    });
    handlers(&bare.memory, [17]);
    bare.core.cr0 |= cr0::AM;
    assert_eq!(bare.halted_vector(), 17);
    assert_eq!(bare.core.retired(), 5);
    assert_eq!(bare.core.system_flags & rflags::AC, rflags::AC);
}
