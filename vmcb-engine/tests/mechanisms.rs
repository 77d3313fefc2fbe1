//! What makes the software processor fast must not be seen: fused pairs, links between blocks, remembered returns, and
//! flags gathered by the host's MXCSR.
//!
//! Random programs made of what these work on (comparisons and jumps, calls and returns, memory, floating point, stores into
//! code) run three times: one instruction at a time, in a whole, and in pieces of random length. What a program computed,
//! after each instruction that the pieces stop at, must be equal. `GODWIT_SPLIT_SEED` chooses the programs.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use iced_x86::code_asm::*;
use vmcb_engine::engine::soft::core::Core;
use vmcb_engine::engine::soft::run::Ended;
use vmcb_engine::engine::soft::svm::bare::TABLES;
use vmcb_engine::memory::GuestMemory;

const CODE: u64 = 0x40_0f00;
const DATA: u64 = 0x60_0000;
const DATA_BYTES: usize = 0x2000;
const STACK: u64 = 0x61_0800;
const TOTAL: u64 = 4000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> usize {
        (self.next() >> 8) as usize % limit as usize
    }
}

/// A processor whose host intercepts every exception.
fn processor(code: &[u8], registers: &[u64; 16]) -> (Box<Core>, Arc<GuestMemory>) {
    let memory = Arc::new(GuestMemory::create(16 << 20).unwrap());
    let mut core = Core::bare(Arc::clone(&memory));
    memory.write(TABLES + 0x2000, &0x83u64.to_le_bytes()).unwrap();
    memory.write(CODE, code).unwrap();
    memory.write(DATA, &(0..DATA_BYTES).map(|at| at as u8 ^ 0x5a).collect::<Vec<u8>>()).unwrap();
    core.to_user();
    core.control.guest = true;
    core.control.words[2] = u32::MAX;
    core.cr4 |= 0x600;
    core.rip = CODE;
    core.gprs[..16].copy_from_slice(registers);
    (core, memory)
}

const WIDE: [AsmRegister64; 6] = [rax, rcx, rdx, rsi, rdi, r8];
const HALF: [AsmRegister32; 6] = [eax, ecx, edx, esi, edi, r8d];
const BYTE: [AsmRegister8; 6] = [al, cl, dl, sil, dil, r8b];
const FLOAT: [AsmRegisterXmm; 4] = [xmm0, xmm1, xmm2, xmm3];

/// An operation on registers: all that sets flags, reads them, or leaves them alone.
fn on_registers(a: &mut CodeAssembler, random: &mut Random) -> Result<(), iced_x86::IcedError> {
    let (x, y) = (random.below(6), random.below(6));
    let count = random.below(64) as u32;
    let small = random.next() as i8 as i32;
    match random.below(30) {
        0 => a.add(WIDE[x], WIDE[y]),
        1 => a.sub(HALF[x], HALF[y]),
        2 => a.adc(WIDE[x], WIDE[y]),
        3 => a.sbb(BYTE[x], BYTE[y]),
        4 => a.and(HALF[x], small),
        5 => a.or(WIDE[x], WIDE[y]),
        6 => a.xor(BYTE[x], BYTE[y]),
        7 => a.inc(WIDE[x]),
        8 => a.dec(HALF[x]),
        9 => a.neg(WIDE[x]),
        10 => a.shl(WIDE[x], count),
        11 => a.shr(HALF[x], count),
        12 => a.sar(WIDE[x], cl),
        13 => a.rol(HALF[x], count),
        14 => a.rcr(BYTE[x], 3),
        15 => a.imul_2(WIDE[x], WIDE[y]),
        16 => a.mul(HALF[x]),
        17 => a.bt(WIDE[x], count),
        18 => a.setl(BYTE[x]),
        19 => a.cmovb(HALF[x], HALF[y]),
        20 => a.lea(WIDE[x], ptr(WIDE[y] + 7)),
        21 => a.lahf(),
        22 => a.cmc(),
        23 => a.stc(),
        24 => a.shld(HALF[x], HALF[y], count),
        25 => a.popcnt(WIDE[x], WIDE[y]),
        26 => a.movzx(HALF[x], BYTE[y]),
        27 => a.add(BYTE[x], small),
        28 => a.sub(WIDE[x], small),
        _ => a.mov(HALF[x], HALF[y]),
    }
}

/// Something with memory, some of it at the end of what is mapped: RBX points at the data, R9 near the first page that is
/// the host's alone.
fn on_memory(a: &mut CodeAssembler, random: &mut Random) -> Result<(), iced_x86::IcedError> {
    let (x, at) = (random.below(6), random.below(DATA_BYTES as u64 - 16));
    match random.below(9) {
        0 => a.mov(WIDE[x], qword_ptr(rbx + at)),
        1 => a.mov(dword_ptr(rbx + at), HALF[x]),
        2 => a.add(qword_ptr(rbx + at), WIDE[x]),
        3 => a.cmp(byte_ptr(rbx + at), 0x5a),
        4 => a.movzx(HALF[x], word_ptr(rbx + at)),
        5 => a.push(WIDE[x]),
        6 => a.pop(WIDE[x]),
        7 => a.mov(WIDE[x], qword_ptr(r9 + random.below(24))),
        _ => a.mov(BYTE[x], byte_ptr(rbx + r10 * 8 + at / 2)),
    }
}

fn on_floats(a: &mut CodeAssembler, random: &mut Random) -> Result<(), iced_x86::IcedError> {
    let (x, y) = (FLOAT[random.below(4)], FLOAT[random.below(4)]);
    match random.below(12) {
        0 => a.addsd(x, y),
        1 => a.divss(x, y),
        2 => a.mulps(x, y),
        3 => a.sqrtpd(x, y),
        4 => a.cvtsi2sd(x, WIDE[random.below(6)]),
        5 => a.cvttsd2si(HALF[random.below(6)], x),
        6 => a.ucomisd(x, y),
        7 => a.cmpps(x, y, 2),
        8 => a.roundsd(x, y, [0, 3, 4, 8, 12][random.below(5)]),
        9 => a.stmxcsr(dword_ptr(rbx + 4 * random.below(16))),
        // The second one asks for another rounding, flush to zero, and an exception or none.
        10 => a.ldmxcsr(dword_ptr(r11 + 4 * random.below(4))),
        _ => a.movups(x, xmmword_ptr(rbx + random.below(512))),
    }
}

/// A comparison and a jump over a few instructions.
fn jump(a: &mut CodeAssembler, random: &mut Random) -> Result<(), iced_x86::IcedError> {
    let (x, y) = (random.below(6), random.below(6));
    let small = random.next() as i8 as i32;
    match random.below(9) {
        0 => a.cmp(WIDE[x], WIDE[y]),
        1 => a.cmp(HALF[x], small),
        2 => a.cmp(BYTE[x], BYTE[y]),
        3 => a.test(WIDE[x], WIDE[x]),
        4 => a.test(BYTE[x], 1),
        5 => a.dec(WIDE[x]),
        6 => a.sub(HALF[x], 3),
        7 => a.cmp(dword_ptr(rbx + 4 * random.below(64)), HALF[x]),
        _ => a.cmp(WIDE[x], qword_ptr(r9 + random.below(24))),
    }?;
    let mut over = a.create_label();
    match random.below(16) {
        0 => a.jo(over),
        1 => a.jno(over),
        2 => a.jb(over),
        3 => a.jae(over),
        4 => a.je(over),
        5 => a.jne(over),
        6 => a.jbe(over),
        7 => a.ja(over),
        8 => a.js(over),
        9 => a.jns(over),
        10 => a.jp(over),
        11 => a.jnp(over),
        12 => a.jl(over),
        13 => a.jge(over),
        14 => a.jle(over),
        _ => a.jg(over),
    }?;
    for _ in 0..random.below(4) {
        on_registers(a, random)?;
    }
    a.set_label(&mut over)?;
    a.zero_bytes()
}

/// A program of two pages that runs for ever: functions that call the ones behind them, and a loop that calls them all and
/// now and then changes the immediate of an instruction in one of them.
fn program(random: &mut Random) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut functions: Vec<CodeLabel> = (0..6).map(|_| a.create_label()).collect();
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.mov(rsp, STACK).unwrap();
    for at in 0..6 {
        a.call(functions[at]).unwrap();
        jump(&mut a, random).unwrap();
        if random.below(2) == 0 {
            a.lea(r12, ptr(functions[random.below(6)])).unwrap();
            a.mov(byte_ptr(r12 + 1), BYTE[random.below(6)]).unwrap();
        }
        if random.below(2) == 0 {
            a.lea(r12, ptr(functions[at])).unwrap();
            a.call(r12).unwrap();
        }
    }
    a.jmp(again).unwrap();
    for at in 0..6 {
        a.set_label(&mut functions[at]).unwrap();
        a.mov(eax, at as i32).unwrap();
        for _ in 0..4 + random.below(12) {
            match random.below(10) {
                0..=4 => on_registers(&mut a, random),
                5..=6 => on_memory(&mut a, random),
                7 => on_floats(&mut a, random),
                8 => jump(&mut a, random),
                _ if at < 5 => a.call(functions[at + 1]),
                _ => a.nop(),
            }
            .unwrap();
        }
        // Of whatever was pushed and popped; now and then a return to nowhere is skipped like any fault.
        if random.below(8) != 0 {
            a.lea(rsp, ptr(rsp)).unwrap();
        }
        a.ret().unwrap();
    }
    a.assemble(CODE).unwrap()
}

/// Runs to an instruction count. What faults is skipped; who is lost begins anew.
fn run_to(core: &mut Core, until: u64, end: u64) {
    let mut exits = 0;
    while core.run_until(until) == Ended::Exit {
        let next = core.exit.next_rip;
        core.rip = if (CODE..end).contains(&next) { next } else { CODE };
        core.gprs[4] = STACK;
        exits += 1;
        assert!(exits < 100_000, "the guest goes on: {:x?} at {:#x}", core.exit, core.rip);
    }
    assert_eq!(core.retired(), until, "stops exactly where asked");
}

fn state(core: &Core) -> (Vec<u64>, u64, u64, [u128; 16], u32) {
    (core.gprs[..16].to_vec(), core.rip, core.rflags(), core.fpu.xmm, core.fpu.mxcsr)
}

fn ram(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; 0x62_0000];
    memory.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn no_mechanism_is_seen_wherever_a_run_is_cut() {
    let seed = std::env::var("GODWIT_SPLIT_SEED").ok().and_then(|value| value.parse().ok()).unwrap_or(1);
    let programs = std::env::var("GODWIT_SPLIT_COUNT").ok().and_then(|value| value.parse().ok()).unwrap_or(60);
    println!("seed {seed}");
    let mut random = Random(seed);
    for number in 0..programs {
        let code = program(&mut random);
        let end = CODE + code.len() as u64;
        let mut registers = [0u64; 16].map(|_: u64| random.next() >> random.below(60));
        (registers[3], registers[4], registers[9], registers[10]) = (DATA, STACK, 0x20_0000 - 12, 5);
        registers[11] = DATA + 0x1800;
        let controls: Vec<u8> =
            [0x1f80u32, 0x7f80, 0x1f00, 0x9fc0].iter().flat_map(|word| word.to_le_bytes()).collect();
        let start = || {
            let (core, memory) = processor(&code, &registers);
            memory.write(DATA + 0x1800, &controls).unwrap();
            (core, memory)
        };
        let (mut single, single_memory) = start();
        let mut states = vec![state(&single)];
        for count in 1..=TOTAL {
            run_to(&mut single, count, end);
            states.push(state(&single));
        }
        let (mut whole, whole_memory) = start();
        run_to(&mut whole, TOTAL, end);
        assert!(state(&whole) == states[TOTAL as usize], "seed {seed}, program {number}: a whole run differs");
        assert!(ram(&whole_memory) == ram(&single_memory), "seed {seed}, program {number}: memory differs");
        let (mut pieces, pieces_memory) = start();
        while pieces.retired() < TOTAL {
            let longest = [3, 40, 700][random.below(3)];
            let step = 1 + random.below(longest) as u64;
            let until = (pieces.retired() + step).min(TOTAL);
            run_to(&mut pieces, until, end);
            assert_eq!(state(&pieces), states[until as usize], "seed {seed}, program {number}, after {until}");
        }
        assert!(ram(&pieces_memory) == ram(&single_memory), "seed {seed}, program {number}: memory differs");
    }
}

fn assemble(f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut code = CodeAssembler::new(64).unwrap();
    f(&mut code).unwrap();
    code.assemble(CODE).unwrap()
}

#[test]
fn a_link_to_code_that_was_overwritten_leads_to_the_new_code() {
    // A loop whose body is a block of its own on another line, linked both ways before it is overwritten from elsewhere.
    let code = assemble(|a| {
        let (mut again, mut body, mut back, mut done) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 20)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.cmp(ecx, 10)?;
        a.jne(body)?;
        a.lea(rdx, ptr(body))?;
        // ADD EAX, imm32: 05 id.
        a.mov(byte_ptr(rdx + 1), 100)?;
        a.jmp(body)?;
        for _ in 0..130 {
            a.nop()?;
        }
        a.set_label(&mut body)?;
        a.add(eax, 1)?;
        a.jmp(back)?;
        for _ in 0..130 {
            a.nop()?;
        }
        a.set_label(&mut back)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.jmp(done)?;
        a.set_label(&mut done)?;
        a.ud2()
    });
    let (mut core, _memory) = processor(&code, &[0; 16]);
    assert_eq!(core.run_until(10_000), Ended::Exit);
    assert_eq!(core.gprs[0], 10 + 10 * 100);
}

#[test]
fn a_return_to_code_that_was_overwritten_runs_the_new_code() {
    // The callee overwrites what its caller goes on with.
    let code = assemble(|a| {
        let (mut again, mut callee, mut after) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 6)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.call(callee)?;
        a.set_label(&mut after)?;
        a.add(eax, 1)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.ud2()?;
        for _ in 0..130 {
            a.nop()?;
        }
        a.set_label(&mut callee)?;
        a.lea(rdx, ptr(after))?;
        a.mov(byte_ptr(rdx + 1), cl)?;
        a.ret()
    });
    let mut registers = [0; 16];
    registers[4] = STACK;
    let (mut core, _memory) = processor(&code, &registers);
    assert_eq!(core.run_until(10_000), Ended::Exit);
    assert_eq!(core.gprs[0], 6 + 5 + 4 + 3 + 2 + 1);
}

#[test]
fn flags_that_the_host_gathers_arrive_in_the_guest() {
    let code = assemble(|a| {
        a.mov(eax, 1)?;
        a.cvtsi2sd(xmm0, eax)?;
        a.mov(eax, 3)?;
        a.cvtsi2sd(xmm1, eax)?;
        a.stmxcsr(dword_ptr(rbx))?;
        a.divsd(xmm0, xmm1)?;
        a.stmxcsr(dword_ptr(rbx + 4))?;
        a.xorps(xmm2, xmm2)?;
        a.divsd(xmm0, xmm2)?;
        a.ud2()
    });
    let mut registers = [0; 16];
    registers[3] = DATA;
    let (mut core, memory) = processor(&code, &registers);
    assert_eq!(core.run_until(100), Ended::Exit);
    let mut stored = [0; 8];
    memory.read(DATA, &mut stored).unwrap();
    assert_eq!(stored, [0x80, 0x1f, 0, 0, 0xa0, 0x1f, 0, 0], "nothing, then inexact");
    assert_eq!(core.fpu.mxcsr, 0x1fa4, "inexact and division by zero");
}
