//! The decoder against iced-x86: lengths of everything both know, in 64-, 32- and 16-bit code.
//!
//! `GODWIT_DECODE_SEED` and `GODWIT_DECODE_COUNT` choose what is decoded. Where the two differ on purpose, `explained`
//! says why.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use iced_x86::{Code, CpuidFeature as F, Decoder, DecoderOptions, Instruction, Mnemonic as M};
use vmcb_engine::engine::soft::core::{CS, Core};
use vmcb_engine::engine::soft::decode;
use vmcb_engine::memory::GuestMemory;
use vmcb_engine::vmcb::Segment;

const AT: u64 = 0x10_0000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Features that this processor lacks: it raises #UD, whose length is what was read until that was clear.
fn explained(instruction: &Instruction) -> bool {
    let lacking = instruction.cpuid_features().iter().any(|feature| {
        !matches!(
            feature,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL286_ONLY
                | F::INTEL386
                | F::INTEL386_ONLY
                | F::INTEL486
                | F::X64
                | F::CPUID
                | F::CMOV
                | F::CX8
                | F::CMPXCHG16B
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::POPCNT
                | F::LZCNT
                | F::CLFSH
                | F::MULTIBYTENOP
                | F::PREFETCHW
                | F::PAUSE
                | F::BMI1
                | F::MSR
                | F::TSC
                | F::RDPMC
                | F::RDTSCP
                | F::SYSCALL
                | F::SEP
                | F::SVM
                | F::SKINIT
                | F::SMAP
                | F::FSGSBASE
                | F::MONITOR
                | F::RDPRU
                | F::INVEPT
        )
    });
    let bmi = instruction.cpuid_features().contains(&F::BMI1) && instruction.mnemonic() != M::Tzcnt;
    // UD0, UD1 and UD2 are #UD either way.
    let undefined = matches!(instruction.mnemonic(), M::Ud0 | M::Ud1 | M::Ud2);
    lacking || bmi || undefined || instruction.code() == Code::INVALID
}

fn set_bits(core: &mut Core, bits: u32) {
    core.segments[CS] = match bits {
        64 => Segment::new(0x10, 0xa9b, 0xffff_ffff, 0),
        32 => Segment::new(0x10, 0xc9b, 0xffff_ffff, 0),
        _ => Segment::new(0x10, 0x89b, 0xffff_ffff, 0),
    };
    core.refresh_mode();
}

#[test]
fn lengths_agree_with_iced() {
    let environment = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = environment("GODWIT_DECODE_SEED").unwrap_or(1);
    let count = environment("GODWIT_DECODE_COUNT").unwrap_or(300_000);
    println!("seed {seed}, {count} encodings");
    let memory = Arc::new(GuestMemory::create(16 << 20).unwrap());
    let mut core = Core::bare(Arc::clone(&memory));
    let mut random = Random(seed | 1);
    let mut failures = Vec::new();
    for round in 0..count {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&random.next().to_le_bytes());
        bytes[8..].copy_from_slice(&random.next().to_le_bytes());
        if round & 1 == 0 {
            bytes[0] = 0x0f;
        }
        let bits = [64, 32, 16, 64][round as usize & 3];
        let expected = Decoder::new(bits, &bytes, DecoderOptions::AMD).decode();
        if expected.is_invalid() || explained(&expected) {
            continue;
        }
        memory.write(AT, &bytes).unwrap();
        set_bits(&mut core, bits);
        core.rip = AT;
        let fetched = core.translate_code(AT).unwrap();
        let decoded = decode::block(&mut core, fetched, 1).unwrap_or_else(|stop| panic!("{bytes:02x?}: {stop:?}"));
        let length = usize::from(decoded.block.ops[0].length);
        if length != expected.len() {
            failures.push(format!("{bits}-bit {bytes:02x?}: iced {expected} ({}) engine {length}", expected.len()));
        }
    }
    for failure in failures.iter().take(40) {
        println!("{failure}");
    }
    assert!(failures.is_empty(), "{} lengths differ (seed {seed})", failures.len());
}
