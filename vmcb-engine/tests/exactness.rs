//! Exactness: where a run stops does not change what it computes, and code that changes itself is seen at once.
//!
//! Random straight code with faults, repeated string instructions and branches runs once in a whole and once in pieces of
//! random length; registers, flags, RIP, time and memory must be equal. `GODWIT_SPLIT_SEED` chooses the code.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use iced_x86::code_asm::{CodeAssembler, al, byte_ptr, eax, ecx, ptr, qword_ptr, rax, rbx, rcx};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use vmcb_engine::engine::soft::core::Core;
use vmcb_engine::engine::soft::run::Ended;
use vmcb_engine::engine::soft::svm::bare::TABLES;
use vmcb_engine::memory::GuestMemory;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x60_0000;
/// Bytes that a program has at most.
const CODE_BYTES: u64 = 0x2000;
const DATA_BYTES: usize = 0x4000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A processor whose host intercepts every exception.
fn processor() -> (Box<Core>, Arc<GuestMemory>) {
    let memory = Arc::new(GuestMemory::create(16 << 20).unwrap());
    let mut core = Core::bare(Arc::clone(&memory));
    // The page tables are the host's: stray stores do not reach them.
    memory.write(TABLES + 0x2000, &0x83u64.to_le_bytes()).unwrap();
    core.to_user();
    core.control.guest = true;
    core.control.words[2] = u32::MAX;
    core.rip = CODE;
    (core, memory)
}

/// Straight code of a few pages that ends with a jump back to its beginning: one-byte and 0F opcodes with memory operands
/// relative to RBX, short forward branches, string instructions.
fn program(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 5000 {
        let mut bytes = Vec::new();
        if random.next().is_multiple_of(4) {
            bytes.push([0x66, 0xf3, 0xf2, 0x67][random.next() as usize & 3]);
        }
        bytes.push(0x40 | random.next() as u8 & 0xb);
        if random.next().is_multiple_of(3) {
            bytes.push(0x0f);
        }
        bytes.push(random.next() as u8);
        bytes.extend([random.next() as u8 & 0x38 | 0x43, random.next() as u8 & 0x7f, 1, 0, 0, 0, 0, 0, 0, 0]);
        let decoded = Decoder::new(64, &bytes, DecoderOptions::AMD).decode();
        let harmless = !decoded.is_invalid()
            && !decoded.is_privileged()
            && !decoded.is_save_restore_instruction()
            && matches!(decoded.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
            && (decoded.flow_control() == FlowControl::Next || (decoded.is_jcc_short() && bytes[0] != 0x66))
            && decoded.is_stack_instruction() == (random.next().is_multiple_of(4))
            && decoded.op0_register().full_register() != iced_x86::Register::RBX
            && !decoded.op0_register().is_segment_register();
        if harmless {
            code.extend(&bytes[..decoded.len()]);
        }
    }
    // No short branch reaches beyond these.
    code.extend([0x90; 130]);
    let back = -(code.len() as i32 + 5);
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    code
}

fn run_to(core: &mut Core, until: u64) {
    let mut exits = 0;
    while core.run_until(until) == Ended::Exit {
        // The host skips what faulted, and brings back who is lost.
        let next = core.exit.next_rip;
        core.rip = if (CODE..CODE + CODE_BYTES).contains(&next) { next } else { CODE };
        core.gprs[1] &= 0xff;
        exits += 1;
        assert!(exits < 100_000, "the guest goes on: {:x?} at {:#x}, {:x?}", core.exit, core.rip, &core.gprs[..16]);
    }
}

fn outcome(core: &Core, memory: &GuestMemory) -> (Vec<u64>, u64, u64, u64, Vec<u8>) {
    let mut data = vec![0; DATA_BYTES];
    memory.read(DATA, &mut data).unwrap();
    (core.gprs[..16].to_vec(), core.rip, core.rflags(), core.retired(), data)
}

#[test]
fn a_run_in_pieces_equals_the_whole() {
    let seed = std::env::var("GODWIT_SPLIT_SEED").ok().and_then(|value| value.parse().ok()).unwrap_or(1);
    println!("seed {seed}");
    let mut random = Random(seed);
    for _ in 0..20 {
        let code = program(&mut random);
        let registers: Vec<u64> = (0..16).map(|_| DATA + random.next() % DATA_BYTES as u64).collect();
        let total = 20_000;
        let start = || {
            let (mut core, memory) = processor();
            memory.write(CODE, &code).unwrap();
            memory.write(DATA, &vec![0x5a; DATA_BYTES]).unwrap();
            core.gprs[..16].copy_from_slice(&registers);
            core.gprs[1] = 40;
            (core, memory)
        };
        let (mut whole, whole_memory) = start();
        run_to(&mut whole, total);
        let (mut pieces, pieces_memory) = start();
        while pieces.retired() < total {
            let step = 1 + random.next() % if random.next().is_multiple_of(2) { 7 } else { 500 };
            let until = (pieces.retired() + step).min(total);
            run_to(&mut pieces, until);
            assert_eq!(pieces.retired(), until, "stops exactly where asked");
        }
        assert_eq!(outcome(&whole, &whole_memory), outcome(&pieces, &pieces_memory), "seed {seed}");
    }
}

fn run_code(assemble: impl FnOnce(&mut CodeAssembler)) -> Box<Core> {
    let mut core = prepared(assemble);
    assert_eq!(core.run_until(1000), Ended::Exit);
    assert_eq!(core.exit.code.0, 0x46, "ended by UD2");
    core
}

/// A processor before some code that ends with UD2.
fn prepared(assemble: impl FnOnce(&mut CodeAssembler)) -> Box<Core> {
    let (mut core, memory) = processor();
    core.gprs[3] = DATA;
    let mut code = CodeAssembler::new(64).unwrap();
    assemble(&mut code);
    code.ud2().unwrap();
    memory.write(CODE, &code.assemble(CODE).unwrap()).unwrap();
    core
}

#[test]
fn code_that_overwrites_the_next_instruction_runs_the_new_one() {
    let core = run_code(|code| {
        let mut target = code.create_label();
        code.lea(rbx, ptr(target)).unwrap();
        code.mov(byte_ptr(rbx + 1), 42i32).unwrap();
        code.set_label(&mut target).unwrap();
        code.mov(eax, 7i32).unwrap();
        code.mov(ecx, eax).unwrap();
    });
    assert_eq!((core.gprs[0], core.gprs[1]), (42, 42));
    assert_eq!(core.retired(), 4);
}

#[test]
fn code_that_overwrites_a_loop_leaves_it() {
    let core = run_code(|code| {
        let (mut top, mut patched) = (code.create_label(), code.create_label());
        code.xor(eax, eax).unwrap();
        code.mov(ecx, 10i32).unwrap();
        code.lea(rbx, ptr(patched)).unwrap();
        code.set_label(&mut top).unwrap();
        code.add(eax, 1i32).unwrap();
        code.dec(rcx).unwrap();
        code.cmp(ecx, 5i32).unwrap();
        let mut skip = code.create_label();
        code.jne(skip).unwrap();
        // Two NOPs over the jump back.
        code.mov(byte_ptr(rbx), 0x90i32).unwrap();
        code.mov(byte_ptr(rbx + 1), 0x90i32).unwrap();
        code.set_label(&mut skip).unwrap();
        code.test(al, al).unwrap();
        code.set_label(&mut patched).unwrap();
        code.jne(top).unwrap();
    });
    assert_eq!((core.gprs[0], core.gprs[1]), (5, 5));
}

#[test]
fn every_instruction_ticks_once_wherever_its_block_ends() {
    let code = |code: &mut CodeAssembler| {
        code.fxsave64(ptr(rbx + 0x100)).unwrap();
        code.inc(eax).unwrap();
        code.fxrstor64(ptr(rbx + 0x100)).unwrap();
        code.inc(eax).unwrap();
        code.stmxcsr(ptr(rbx + 0x400)).unwrap();
        code.ldmxcsr(ptr(rbx + 0x400)).unwrap();
        code.inc(eax).unwrap();
        code.fninit().unwrap();
        code.emms().unwrap();
        code.mfence().unwrap();
        code.inc(eax).unwrap();
    };
    assert_eq!(run_code(code).retired(), 11);
    for block_ops_max in [1, 2, 3] {
        let mut core = prepared(code);
        core.block_ops_max = block_ops_max;
        assert_eq!(core.run_until(1000), Ended::Exit);
        assert_eq!((core.retired(), core.gprs[0]), (11, 4));
    }
}

#[test]
fn the_size_of_the_tlb_shows_in_stale_translations_alone() {
    // Loads a word, then one whose page has the same slot in a TLB of half the size, then the first one again.
    let load = |code: &mut CodeAssembler| {
        code.mov(rax, qword_ptr(rbx)).unwrap();
        code.mov(rcx, qword_ptr(rbx + 0x20_0000)).unwrap();
    };
    let second_load = |tlb_halvings, flush: bool| {
        let (mut core, memory) = processor();
        core.tlb.halve(tlb_halvings);
        core.gprs[3] = DATA;
        let mut code = CodeAssembler::new(64).unwrap();
        load(&mut code);
        code.ud2().unwrap();
        memory.write(CODE, &code.assemble(CODE).unwrap()).unwrap();
        memory.write(DATA, &[1]).unwrap();
        memory.write(DATA + 0x40_0000, &[2]).unwrap();
        assert_eq!(core.run_until(1000), Ended::Exit);
        assert_eq!(core.gprs[0], 1);
        // Somebody changes the entry of its 2 MiB, and does not say so.
        let entry = TABLES + 0x2000 + (DATA >> 21) * 8;
        memory.write(entry, &((DATA + 0x40_0000) | 0x87).to_le_bytes()).unwrap();
        if flush {
            core.tlb.flush();
        }
        core.rip = CODE;
        assert_eq!(core.run_until(1000), Ended::Exit);
        core.gprs[0]
    };
    assert_eq!([0, 1].map(|halvings| second_load(halvings, false)), [1, 2]);
    assert_eq!([0, 1].map(|halvings| second_load(halvings, true)), [2, 2]);
}

#[test]
fn repeated_moves_tick_once_a_page() {
    let core = run_code(|code| {
        code.mov(rcx, 10_000i64).unwrap();
        code.lea(iced_x86::code_asm::rsi, ptr(rbx + 0x10_000)).unwrap();
        code.lea(iced_x86::code_asm::rdi, ptr(rbx + 0x20_000)).unwrap();
        code.rep().movsb().unwrap();
        code.mov(rax, rcx).unwrap();
    });
    // Three to set up, three pages, one to end.
    assert_eq!(core.retired(), 7);
    assert_eq!((core.gprs[0], core.gprs[6], core.gprs[7]), (0, DATA + 0x10_000 + 10_000, DATA + 0x20_000 + 10_000));
}
