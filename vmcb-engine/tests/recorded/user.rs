//! What the guest's user does, turn after turn, in stages: each leaves its results in registers or in the stage's words, and R12
//! takes all of them in. A fault ends its stage (R15 says where to go on).
//!
//! RBX: bytes for random instructions; RBP: pages on demand; R12: everything so far; R13: random; R14: data of this processor.

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, OpAccess, Register};

use super::*;
use crate::replaying::Random;

pub use super::kernel::fold;

/// Words of [`USER_DATA`] that every turn folds.
const STAGE_WORDS: u32 = 128;
/// Instructions of a random block, and how many blocks there are: a fault ends one.
const RANDOM_INSTRUCTIONS: usize = 12;
const RANDOM_BLOCKS: u64 = 24;

pub fn code() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut again, mut patched) = (a.create_label(), a.create_label());
    a.set_label(&mut again).unwrap();
    for stage in [wander, demand, strings, floats, more_floats, vectors, text, atomics] {
        staged(&mut a, stage);
    }
    for seed in 1..=RANDOM_BLOCKS {
        staged(&mut a, |a| random_block(a, seed));
    }
    for fault in [divide, undefined, breakpoint, forbidden, halt, not_executable] {
        staged(&mut a, fault);
    }
    a.lea(rdi, ptr(patched)).unwrap();
    a.mov(dword_ptr(rdi + 1), r13d).unwrap();
    a.call(patched).unwrap();
    fold(&mut a, rax);
    for word in 0..16 {
        a.mov(edi, SHARED as u32).unwrap();
        a.mov(rax, qword_ptr(rdi + word * 8)).unwrap();
        fold(&mut a, rax);
    }
    fold_stage(&mut a);
    a.syscall().unwrap();
    // The page that was demanded last is demanded again.
    a.mov(rcx, r13).unwrap();
    a.shr(rcx, 44).unwrap();
    a.and(ecx, 0xff).unwrap();
    a.shl(ecx, 12).unwrap();
    a.mov(rax, qword_ptr(rbp + rcx)).unwrap();
    fold(&mut a, rax);
    a.rdtsc().unwrap();
    fold(&mut a, rax);
    a.rdtscp().unwrap();
    fold(&mut a, rcx);
    a.rdgsbase(rax).unwrap();
    fold(&mut a, rax);
    a.jmp(again).unwrap();
    a.set_label(&mut patched).unwrap();
    a.mov(eax, 0x7777_7777).unwrap();
    a.ret().unwrap();
    a.assemble(USER).unwrap()
}

fn staged(a: &mut CodeAssembler, stage: impl FnOnce(&mut CodeAssembler)) {
    let mut end = a.create_label();
    a.lea(r15, ptr(end)).unwrap();
    stage(a);
    a.set_label(&mut end).unwrap();
    // Whatever happened: flags and the registers that a stage may use.
    a.cld().unwrap();
    a.emms().unwrap();
    a.pushfq().unwrap();
    a.pop(r11).unwrap();
    for register in [r11, rax, rcx, rdx, rsi, rdi] {
        fold(a, register);
    }
}

fn next_random(a: &mut CodeAssembler) {
    a.mov(r11, 0x5851_f42d_4c95_7f2du64).unwrap();
    a.imul_2(r13, r11).unwrap();
    a.add(r13, 0x2c9e_77b1).unwrap();
}

fn fold_stage(a: &mut CodeAssembler) {
    let mut next = a.create_label();
    a.mov(rsi, r14).unwrap();
    a.mov(ecx, STAGE_WORDS).unwrap();
    a.set_label(&mut next).unwrap();
    a.lodsq().unwrap();
    fold(a, rax);
    a.loop_(next).unwrap();
}

/// Loads and stores all over more pages than the TLB holds.
fn wander(a: &mut CodeAssembler) {
    let mut next = a.create_label();
    a.mov(ecx, 120).unwrap();
    a.xor(edx, edx).unwrap();
    a.set_label(&mut next).unwrap();
    next_random(a);
    for shift in [17, 34] {
        a.mov(rax, r13).unwrap();
        a.shr(rax, shift).unwrap();
        a.and(eax, 0x7f_fff8).unwrap();
        a.add(eax, WANDERED as i32).unwrap();
        if shift == 17 {
            a.xor(qword_ptr(rax), r13).unwrap();
        } else {
            a.add(rdx, qword_ptr(rax)).unwrap();
        }
    }
    a.dec(ecx).unwrap();
    a.jne(next).unwrap();
}

/// Pages that are there when they are touched.
fn demand(a: &mut CodeAssembler) {
    for shift in [20, 28, 36, 44] {
        a.mov(rcx, r13).unwrap();
        a.shr(rcx, shift).unwrap();
        a.and(ecx, 0xff).unwrap();
        a.shl(ecx, 12).unwrap();
        a.add(qword_ptr(rbp + rcx), r13).unwrap();
        a.mov(rax, qword_ptr(rbp + rcx)).unwrap();
        fold(a, rax);
    }
}

/// Over page borders, forwards and backwards.
fn strings(a: &mut CodeAssembler) {
    let places = |a: &mut CodeAssembler| {
        a.mov(eax, r13d).unwrap();
        a.and(eax, 0x1ff).unwrap();
        a.lea(rsi, ptr(r14 + rax + 0x3e80)).unwrap();
        a.lea(rdi, ptr(r14 + rax + 0x5d30)).unwrap();
        a.mov(ecx, 300).unwrap();
    };
    a.mov(qword_ptr(r14 + 0x3f00), r13).unwrap();
    a.mov(qword_ptr(r14 + 0x4010), r12).unwrap();
    places(a);
    a.rep().movsb().unwrap();
    places(a);
    a.repe().cmpsb().unwrap();
    a.mov(qword_ptr(r14), rcx).unwrap();
    a.setc(byte_ptr(r14 + 0x3e8)).unwrap();
    places(a);
    a.mov(eax, r13d).unwrap();
    a.repne().scasb().unwrap();
    a.mov(qword_ptr(r14 + 8), rcx).unwrap();
    places(a);
    a.std().unwrap();
    a.mov(ecx, 60).unwrap();
    a.rep().movsw().unwrap();
    a.cld().unwrap();
    a.mov(rax, r13).unwrap();
    a.mov(ecx, 20).unwrap();
    a.rep().stosq().unwrap();
    a.repe().cmpsw().unwrap();
}

/// A number of [1, 2) on x87's stack.
fn fraction(a: &mut CodeAssembler, rotation: u32) {
    a.mov(rax, r13).unwrap();
    a.rol(rax, rotation).unwrap();
    a.shr(rax, 12).unwrap();
    a.mov(rcx, 0x3ff0_0000_0000_0000u64).unwrap();
    a.or(rax, rcx).unwrap();
    a.mov(qword_ptr(r14 + 0x3f8), rax).unwrap();
    a.fld(qword_ptr(r14 + 0x3f8)).unwrap();
}

/// x87: the transcendental functions.
fn floats(a: &mut CodeAssembler) {
    a.fninit().unwrap();
    let mut at = 0x10;
    let mut store = |a: &mut CodeAssembler| {
        a.fstp(tbyte_ptr(r14 + at)).unwrap();
        at += 10;
    };
    let of_one: [fn(&mut CodeAssembler); 4] = [
        |a| a.fsin().unwrap(),
        |a| a.fcos().unwrap(),
        |a| a.fsqrt().unwrap(),
        |a| {
            a.fld1().unwrap();
            a.fsubp(st1, st0).unwrap();
            a.f2xm1().unwrap();
        },
    ];
    for (rotation, function) in (1..).zip(of_one) {
        fraction(a, rotation * 5);
        function(a);
        store(a);
    }
    let of_two: [fn(&mut CodeAssembler); 8] = [
        |a| a.fpatan().unwrap(),
        |a| a.fyl2x().unwrap(),
        |a| a.fprem().unwrap(),
        |a| a.fprem1().unwrap(),
        |a| a.fscale().unwrap(),
        |a| a.fdivp(st1, st0).unwrap(),
        |a| a.fmulp(st1, st0).unwrap(),
        |a| {
            a.fsubp(st1, st0).unwrap();
            a.fldln2().unwrap();
            a.fmulp(st1, st0).unwrap();
            a.fld1().unwrap();
            a.fxch(st0, st1).unwrap();
            a.fyl2xp1().unwrap();
        },
    ];
    for (rotation, function) in (1..).zip(of_two) {
        fraction(a, rotation * 7);
        fraction(a, rotation * 11);
        function(a);
        store(a);
    }
    fraction(a, 3);
    a.fsincos().unwrap();
    store(a);
    a.fptan().unwrap();
    store(a);
    store(a);
    a.fnstsw(ax).unwrap();
}

/// x87: integers, decimals, rounding, control words; a store of all of it.
fn more_floats(a: &mut CodeAssembler) {
    a.fninit().unwrap();
    a.mov(eax, r13d).unwrap();
    a.and(eax, 0xf00).unwrap();
    a.or(eax, 0x3f).unwrap();
    a.mov(word_ptr(r14 + 0x3f0), ax).unwrap();
    a.fldcw(word_ptr(r14 + 0x3f0)).unwrap();
    fraction(a, 13);
    a.fldpi().unwrap();
    a.fmulp(st1, st0).unwrap();
    a.fst(dword_ptr(r14 + 0xe0)).unwrap();
    a.fst(qword_ptr(r14 + 0xe8)).unwrap();
    a.fist(dword_ptr(r14 + 0xf0)).unwrap();
    a.frndint().unwrap();
    a.fbstp(tbyte_ptr(r14 + 0xf4)).unwrap();
    a.mov(qword_ptr(r14 + 0x100), r13).unwrap();
    a.fild(qword_ptr(r14 + 0x100)).unwrap();
    a.fxtract().unwrap();
    a.fcomip(st0, st1).unwrap();
    a.fisttp(qword_ptr(r14 + 0x108)).unwrap();
    a.fldz().unwrap();
    a.fxam().unwrap();
    a.fnstsw(ax).unwrap();
    a.fnstenv(ptr(r14 + 0x110)).unwrap();
    a.fxsave64(ptr(r14 + 0x800)).unwrap();
    a.fld1().unwrap();
    a.fxrstor64(ptr(r14 + 0x800)).unwrap();
    a.rdtsc().unwrap();
    // Its selectors and pointers are folded too.
    a.fninit().unwrap();
}

/// SSE on any bits there are: arithmetic, approximations, conversions, rounding by MXCSR.
fn vectors(a: &mut CodeAssembler) {
    a.mov(eax, r13d).unwrap();
    a.and(eax, 0x6000).unwrap();
    a.or(eax, 0x1f80).unwrap();
    a.mov(dword_ptr(r14 + 0x3f0), eax).unwrap();
    a.ldmxcsr(dword_ptr(r14 + 0x3f0)).unwrap();
    let mut at = 0x140;
    let mut store = |a: &mut CodeAssembler| {
        a.movups(xmmword_ptr(r14 + at), xmm0).unwrap();
        at += 16;
    };
    // Half of the numbers are ordinary: near one.
    a.movq(xmm1, r13).unwrap();
    a.movq(xmm2, r12).unwrap();
    a.punpcklqdq(xmm1, xmm2).unwrap();
    a.psrld(xmm1, 9).unwrap();
    a.mov(eax, 0x3f80_0000).unwrap();
    a.movd(xmm2, eax).unwrap();
    a.pshufd(xmm2, xmm2, 0).unwrap();
    a.por(xmm1, xmm2).unwrap();
    a.movups(xmm2, xmmword_ptr(rbx)).unwrap();
    type Operation = fn(&mut CodeAssembler, AsmRegisterXmm, AsmRegisterXmm) -> Result<(), iced_x86::IcedError>;
    let operations: [Operation; 20] = [
        CodeAssembler::rcpps,
        CodeAssembler::rsqrtps,
        CodeAssembler::rcpss,
        CodeAssembler::rsqrtss,
        CodeAssembler::addps,
        CodeAssembler::mulps,
        CodeAssembler::divps,
        CodeAssembler::subpd,
        CodeAssembler::divpd,
        CodeAssembler::sqrtps,
        CodeAssembler::sqrtpd,
        CodeAssembler::maxps,
        CodeAssembler::cvtps2dq,
        CodeAssembler::cvttps2dq,
        CodeAssembler::cvtdq2ps,
        CodeAssembler::haddps,
        CodeAssembler::pmulld,
        CodeAssembler::pshufb,
        CodeAssembler::packssdw,
        CodeAssembler::psadbw,
    ];
    for (number, operation) in operations.into_iter().enumerate() {
        a.movaps(xmm0, xmm2).unwrap();
        operation(a, xmm0, xmm1).unwrap();
        if number % 2 == 1 {
            store(a);
        } else {
            a.pxor(xmm3, xmm0).unwrap();
        }
    }
    a.movaps(xmm0, xmm3).unwrap();
    store(a);
    a.rcpps(xmm0, xmm2).unwrap();
    a.rsqrtps(xmm3, xmm2).unwrap();
    a.pxor(xmm0, xmm3).unwrap();
    a.roundps(xmm3, xmm1, 4).unwrap();
    a.dpps(xmm3, xmm1, 0xf1).unwrap();
    a.pxor(xmm0, xmm3).unwrap();
    store(a);
    a.cvtsd2si(rdx, xmm2).unwrap();
    a.comiss(xmm1, xmm2).unwrap();
    a.stmxcsr(dword_ptr(r14 + 0x3f0)).unwrap();
    a.mov(ecx, dword_ptr(r14 + 0x3f0)).unwrap();
    a.mov(dword_ptr(r14 + 0x3f0), 0x1f80).unwrap();
    a.ldmxcsr(dword_ptr(r14 + 0x3f0)).unwrap();
}

/// Strings in vectors, checksums, bits.
fn text(a: &mut CodeAssembler) {
    a.movups(xmm1, xmmword_ptr(r14 + 0x3f00)).unwrap();
    a.pcmpistri(xmm1, xmmword_ptr(r14 + 0x5f00), 0x18).unwrap();
    a.mov(eax, 16).unwrap();
    a.mov(edx, 12).unwrap();
    a.pcmpestrm(xmm1, xmmword_ptr(rbx), 0x40).unwrap();
    a.pmovmskb(edx, xmm0).unwrap();
    a.crc32(edx, r13d).unwrap();
    a.popcnt(rsi, r12).unwrap();
    a.lzcnt(rdi, r13).unwrap();
    a.bsf(rax, r13).unwrap();
    a.pavgb(mm0, qword_ptr(rbx)).unwrap();
    a.movq(qword_ptr(r14 + 0x2f0), mm0).unwrap();
    a.emms().unwrap();
}

/// Any instructions that leave RBX, RBP, RSP and R12 to R15 alone and touch memory only around RBX.
fn random_block(a: &mut CodeAssembler, seed: u64) {
    let mut random = Random(seed << 32 | 0x1357_9bdf);
    let mut info = InstructionInfoFactory::new();
    let mut code = Vec::new();
    let mut count = 0;
    while count < RANDOM_INSTRUCTIONS {
        let mut bytes = Vec::new();
        if random.below(4) == 0 {
            bytes.push([0x66, 0xf3, 0xf2, 0xf0][random.below(4) as usize]);
        }
        bytes.push(0x40 | random.next() as u8 & 0xe);
        if random.below(2) == 0 {
            bytes.push(0x0f);
        }
        bytes.push(random.next() as u8);
        let modrm = random.next() as u8;
        bytes.push(if random.below(2) == 0 { modrm | 0xc0 } else { modrm & 0x38 | 0x43 });
        bytes.extend([random.next() as u8 & 0x7f, 1, 0, 0, 0, 0, 0, 0, 0]);
        let decoded = Decoder::new(64, &bytes, DecoderOptions::AMD).decode();
        let kept =
            [Register::RBX, Register::RBP, Register::RSP, Register::R12, Register::R13, Register::R14, Register::R15];
        let used = info.info(&decoded);
        let writes =
            |access| !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None);
        let leaves = used.used_registers().iter().all(|used| {
            let register = used.register();
            !writes(used.access()) || !(kept.contains(&register.full_register()) || register.is_segment_register())
        });
        let near = used.used_memory().iter().all(|it| it.base() == Register::RBX && it.index() == Register::None);
        let plain = !decoded.is_invalid()
            && !decoded.is_privileged()
            && !decoded.is_save_restore_instruction()
            && !decoded.is_stack_instruction()
            && decoded.flow_control() == FlowControl::Next;
        // Few may fault: what follows would never run.
        let name = decoded.mnemonic();
        let safe = !matches!(name, iced_x86::Mnemonic::Div | iced_x86::Mnemonic::Idiv | iced_x86::Mnemonic::Ldmxcsr)
            && (!decoded.has_lock_prefix() || decoded.op0_kind() == iced_x86::OpKind::Memory)
            && !decoded.cpuid_features().iter().any(|feature| !feature_is_there(*feature));
        if plain && leaves && near && safe {
            code.extend(&bytes[..decoded.len()]);
            count += 1;
        }
    }
    a.fninit().unwrap();
    a.db(&code).unwrap();
    for register in [r8, r9, r10] {
        fold(a, register);
    }
}

/// Features of the guest's processor.
fn feature_is_there(feature: iced_x86::CpuidFeature) -> bool {
    use iced_x86::CpuidFeature::*;
    matches!(
        feature,
        INTEL8086
            | INTEL186
            | INTEL286
            | INTEL386
            | INTEL486
            | X64
            | CMOV
            | CPUID
            | FPU
            | FPU387
            | CX8
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | POPCNT
    )
}

/// Both processors change the same words.
fn atomics(a: &mut CodeAssembler) {
    a.mov(edi, SHARED as u32).unwrap();
    a.mov(rax, r13).unwrap();
    a.lock().xadd(qword_ptr(rdi), rax).unwrap();
    a.mov(rdx, r12).unwrap();
    a.lock().cmpxchg(qword_ptr(rdi + 8), rdx).unwrap();
    a.mov(rcx, r13).unwrap();
    a.xchg(qword_ptr(rdi + 0x10), rcx).unwrap();
    a.mov(esi, r13d).unwrap();
    a.and(esi, 63).unwrap();
    a.lock().btc(qword_ptr(rdi + 0x18), rsi).unwrap();
    a.setc(al).unwrap();
    fold(a, rax);
    a.mov(rdx, qword_ptr(rdi + 0x28)).unwrap();
    a.mov(rax, qword_ptr(rdi + 0x20)).unwrap();
    a.mov(r8, rbx).unwrap();
    a.mov(rbx, r13).unwrap();
    a.lock().cmpxchg16b(xmmword_ptr(rdi + 0x20)).unwrap();
    a.mov(rbx, r8).unwrap();
    a.mfence().unwrap();
}

fn divide(a: &mut CodeAssembler) {
    a.mov(eax, r13d).unwrap();
    a.xor(edx, edx).unwrap();
    a.mov(ecx, r12d).unwrap();
    a.and(ecx, 0x101).unwrap();
    a.div(ecx).unwrap();
}

fn undefined(a: &mut CodeAssembler) {
    a.ud2().unwrap();
}

fn breakpoint(a: &mut CodeAssembler) {
    a.int3().unwrap();
    a.mov(eax, 5).unwrap();
}

fn forbidden(a: &mut CodeAssembler) {
    a.mov(edi, KERNEL_DATA as u32).unwrap();
    a.mov(dword_ptr(rdi), 1).unwrap();
}

fn halt(a: &mut CodeAssembler) {
    a.hlt().unwrap();
}

fn not_executable(a: &mut CodeAssembler) {
    a.mov(eax, WANDERED as u32 + 0x1000).unwrap();
    a.jmp(rax).unwrap();
}
