//! The software processor against the host's: random user-mode instructions run on both from the same state, and
//! registers, flags, x87, SSE, memory and exceptions must agree.
//!
//! `GODWIT_DIFF_SEED`, `GODWIT_DIFF_COUNT` and `GODWIT_DIFF_ONLY` (a mnemonic) choose what runs. What the manual leaves
//! undefined is compared too where the host is an AMD processor: the engine promises AMD's values.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter, Mnemonic, OpKind,
    Register,
};
use vmcb_engine::engine::soft::core::{Core, GS};
use vmcb_engine::engine::soft::run::Ended;
use vmcb_engine::memory::GuestMemory;

mod native;
use native::{CODE, DATA, DATA_BYTES, Fault, GS_BASE, Native, State};

/// Arithmetic flags and DF.
const FLAGS: u64 = 0xcd5;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A value as programs have them: pointers into scratch memory, small numbers, edges, noise.
    fn value(&mut self) -> u64 {
        match self.below(16) {
            0..=6 => DATA + self.below(DATA_BYTES as u64),
            7 => (DATA + (self.below(5) << 12)).wrapping_sub(self.below(20)),
            8..=9 => self.below(200),
            10 => self.below(200).wrapping_neg(),
            11 => self.pick(&[0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]),
            12 => self.pick(&[u64::MAX, 1 << 63, i64::MAX as u64, 0x7fff_ffff_f000, 0x8000_0000_0000, 1 << 47]),
            13 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }

    /// Eight bytes of memory or half a register: also floats of all kinds.
    fn content(&mut self) -> u64 {
        match self.below(8) {
            0 => (self.below(1000) as f64 - 500.0).to_bits(),
            1 => {
                u64::from((self.below(1000) as f32 * 0.25).to_bits()) << 32
                    | u64::from((self.below(9) as f32).to_bits())
            }
            2 => self.pick(&[f64::NAN.to_bits(), f64::INFINITY.to_bits(), 1, 1 << 63, 0x7ff0_0000_0000_0001, 0]),
            3 => {
                self.pick(&[0x7fc0_0000_7f80_0000, 0xff80_0001_0000_0001, 0x8000_0000_3f80_0000, 0x3f80_0000_bf80_0000])
            }
            4 => f64::from_bits(self.next()).to_bits(),
            5 => self.value(),
            _ => self.next(),
        }
    }
}

/// Instructions that make no sense here or would leave the test: system, far transfers, segments, flags images with TF in
/// them, time, ports. And x87's transcendental functions, which the engine computes by itself: processors differ there.
const EXCLUDED: &[Mnemonic] = &[
    Mnemonic::Fsin,
    Mnemonic::Fcos,
    Mnemonic::Fsincos,
    Mnemonic::Fptan,
    Mnemonic::Fpatan,
    Mnemonic::F2xm1,
    Mnemonic::Fyl2x,
    Mnemonic::Fyl2xp1,
    Mnemonic::Syscall,
    Mnemonic::Sysenter,
    Mnemonic::Sysret,
    Mnemonic::Sysretq,
    Mnemonic::Sysexit,
    Mnemonic::Sysexitq,
    Mnemonic::Int,
    Mnemonic::Int1,
    Mnemonic::Int3,
    Mnemonic::Into,
    Mnemonic::Fxsave,
    Mnemonic::Fxsave64,
    Mnemonic::Fxrstor,
    Mnemonic::Fxrstor64,
    Mnemonic::Cpuid,
    Mnemonic::Rdtsc,
    Mnemonic::Rdtscp,
    Mnemonic::Rdpmc,
    Mnemonic::Rdpru,
    Mnemonic::Rdpid,
    Mnemonic::Xgetbv,
    Mnemonic::Rdfsbase,
    Mnemonic::Rdgsbase,
    Mnemonic::Wrfsbase,
    Mnemonic::Wrgsbase,
    Mnemonic::Lfs,
    Mnemonic::Lgs,
    Mnemonic::Lss,
    Mnemonic::Sgdt,
    Mnemonic::Sidt,
    Mnemonic::Sldt,
    Mnemonic::Str,
    Mnemonic::Smsw,
    Mnemonic::Lar,
    Mnemonic::Lsl,
    Mnemonic::Verr,
    Mnemonic::Verw,
    Mnemonic::Monitorx,
    Mnemonic::Mwaitx,
    Mnemonic::Clzero,
    Mnemonic::Pushf,
    Mnemonic::Pushfd,
    Mnemonic::Pushfq,
    Mnemonic::Popf,
    Mnemonic::Popfd,
    Mnemonic::Popfq,
    Mnemonic::Rdrand,
    Mnemonic::Rdseed,
    Mnemonic::Vmmcall,
    Mnemonic::In,
    Mnemonic::Out,
    Mnemonic::Insb,
    Mnemonic::Insw,
    Mnemonic::Insd,
    Mnemonic::Outsb,
    Mnemonic::Outsw,
    Mnemonic::Outsd,
    Mnemonic::Rdpkru,
    Mnemonic::Wrpkru,
    Mnemonic::Rcpps,
    Mnemonic::Rcpss,
    Mnemonic::Rsqrtps,
    Mnemonic::Rsqrtss,
    Mnemonic::Xbegin,
    Mnemonic::Xabort,
    Mnemonic::Xend,
    Mnemonic::Xtest,
    Mnemonic::Pause,
    Mnemonic::Ud0,
    Mnemonic::Ud1,
    Mnemonic::Ud2,
    Mnemonic::Incsspd,
    Mnemonic::Incsspq,
    Mnemonic::Rdsspd,
    Mnemonic::Rdsspq,
];

/// What the software processor has of this.
const SUPPORTED: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CPUID,
    CpuidFeature::CMOV,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::POPCNT,
    CpuidFeature::LZCNT,
    CpuidFeature::CLFSH,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PREFETCHW,
    CpuidFeature::PAUSE,
    CpuidFeature::BMI1,
];

/// True for what a user may execute, and both processors have.
fn allowed(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    if instruction.is_invalid() {
        return false;
    }
    let far = matches!(instruction.mnemonic(), M::Retf | M::Iret | M::Iretd | M::Iretq)
        || instruction.is_call_far()
        || instruction.is_call_far_indirect()
        || instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect();
    let excluded = EXCLUDED.contains(&instruction.mnemonic());
    let segments = (0..instruction.op_count())
        .any(|at| instruction.op_kind(at) == OpKind::Register && instruction.op_register(at).is_segment_register());
    let supported = instruction.cpuid_features().iter().all(|feature| SUPPORTED.contains(feature));
    let bmi = instruction.cpuid_features().contains(&CpuidFeature::BMI1);
    !far && !excluded
        && !segments
        && supported
        && !bmi
        && !instruction.is_privileged()
        && instruction.segment_prefix() != Register::FS
        && !matches!(instruction.flow_control(), FlowControl::Interrupt | FlowControl::XbeginXabortXend)
}

/// Instructions that move memory in several pieces: which piece of it faults first is nobody's promise.
fn in_pieces(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Fnsave | M::Frstor | M::Fnstenv | M::Fldenv | M::Maskmovq | M::Maskmovdqu)
}

/// One random instruction: prefixes, opcode of some map, ModRM that mostly reaches scratch memory, immediate.
fn instruction(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    for (prefix, percent) in [(0x66, 15), (0x67, 4), (0xf2, 5), (0xf3, 8), (0x65, 2), (0x3e, 2), (0xf0, 2)] {
        if random.chance(percent) {
            bytes.push(prefix);
        }
    }
    if random.chance(50) {
        bytes.push(0x40 | random.below(16) as u8);
    }
    match random.below(20) {
        0..=8 => bytes.push(random.next() as u8),
        9..=16 => bytes.extend([0x0f, random.next() as u8]),
        17 => bytes.extend([0x0f, 0x38, random.next() as u8]),
        18 => bytes.extend([0x0f, 0x3a, random.next() as u8]),
        _ => bytes.push(0xd8 | random.next() as u8 & 7),
    }
    let modrm = random.next() as u8;
    bytes.push(modrm);
    if modrm < 0xc0 && modrm & 7 == 4 {
        bytes.push(if random.chance(50) { 0x20 | random.next() as u8 & 0xc7 } else { random.next() as u8 });
    }
    if modrm >> 6 == 2 {
        let small = random.below(256) as i32 - 128;
        bytes.extend(small.to_le_bytes());
    } else if modrm & 0xc7 == 5 {
        bytes.extend(((DATA - CODE) as i32 - 4096 + random.below(DATA_BYTES as u64) as i32).to_le_bytes());
    }
    bytes.extend(random.next().to_le_bytes());
    bytes.truncate(15);
    bytes
}

fn fxsave(random: &mut Random) -> [u64; 64] {
    let mut image = [0u64; 64];
    let top = random.below(8);
    let control = 0x37f & !(random.below(4) << 8) | random.below(4) << 10;
    image[0] = control | top << 27 | (random.next() & 0xff & if random.chance(70) { 0xff } else { 0 }) << 32;
    image[3] = 0x1f80 | random.below(4) << 13 | if random.chance(5) { 0x40 } else { 0 };
    for register in 0..8 {
        let exponent = random.pick(&[0u64, 1, 0x3ffe, 0x3fff, 0x4000, 0x4005, 0x403e, 0x7ffe, 0x7fff, 0xbfff, 0xc001]);
        image[4 + 2 * register] = random.content() | if exponent & 0x7fff != 0 { 1 << 63 } else { 0 };
        image[5 + 2 * register] = exponent;
    }
    for half in 0..32 {
        image[20 + half] = random.content();
    }
    image
}

fn state(random: &mut Random, length: usize) -> State {
    let mut gprs = [0; 16];
    for register in &mut gprs {
        *register = random.value();
    }
    if random.chance(80) {
        gprs[4] = DATA + 64 + random.below(DATA_BYTES as u64 - 128) / 8 * 8;
    }
    let rflags = random.next() & 0x8d5 | if random.chance(10) { 0x400 } else { 0 } | 0x202;
    State { gprs, rip: CODE + 4096 - length as u64, rflags, fxsave: fxsave(random) }
}

/// The engine with page tables that map exactly what the host has mapped.
struct Soft {
    core: Box<Core>,
    memory: Arc<GuestMemory>,
}

/// Where scratch memory lies in RAM.
const RAM_CODE: u64 = 0x10_0000;
const RAM_DATA: u64 = 0x11_0000;

impl Soft {
    fn new() -> Self {
        let memory = Arc::new(GuestMemory::create(16 << 20).unwrap());
        let mut core = Core::bare(Arc::clone(&memory));
        let put = |at: u64, value: u64| memory.write(at, &value.to_le_bytes()).unwrap();
        let (root, pointers, directory, table) = (0x8000u64, 0x9000u64, 0xa000u64, 0xb000u64);
        put(root, pointers | 7);
        put(pointers, directory | 7);
        put(directory + (CODE >> 21) * 8, table | 7);
        put(table + (CODE >> 12 & 511) * 8, RAM_CODE | 7);
        for page in 0..DATA_BYTES as u64 / 4096 {
            put(table + (((DATA >> 12) + page) & 511) * 8, (RAM_DATA + page * 4096) | 7 | 1 << 63);
        }
        core.cr3 = root;
        core.to_user();
        core.segments[GS].base = GS_BASE;
        core.control.guest = true;
        core.control.words[2] = u32::MAX;
        Self { core, memory }
    }

    fn run(&mut self, bytes: &[u8], input: &State, repeats: bool) -> (State, Option<Fault>) {
        self.memory.write(RAM_CODE + 4096 - bytes.len() as u64, bytes).unwrap();
        for page in self.memory.stamps().take_written_code() {
            self.core.blocks.invalidate(page, u64::MAX);
            self.memory.stamps().clear_code_lines(page);
        }
        self.core.gprs[..16].copy_from_slice(&input.gprs);
        self.core.rip = input.rip;
        self.core.set_rflags(input.rflags);
        load_fxsave(&mut self.core, &input.fxsave);
        let mut fault = None;
        for _ in 0..100_000 {
            let until = self.core.retired() + 1;
            if self.core.run_until(until) == Ended::Exit {
                let vector = (self.core.exit.code.0 - 0x40) as u8;
                let address = if vector == 14 { self.core.exit.info2 } else { 0 };
                fault = Some(Fault { vector, address });
            }
            if fault.is_some() || !repeats || self.core.rip != input.rip {
                break;
            }
        }
        let mut gprs = [0; 16];
        gprs.copy_from_slice(&self.core.gprs[..16]);
        let fxsave = store_fxsave(&self.core);
        (State { gprs, rip: self.core.rip, rflags: self.core.rflags(), fxsave }, fault)
    }
}

fn load_fxsave(core: &mut Core, image: &[u64; 64]) {
    let fpu = &mut core.fpu;
    fpu.control = image[0] as u16;
    fpu.status = (image[0] >> 16) as u16;
    fpu.tags = (image[0] >> 32) as u8;
    fpu.mxcsr = image[3] as u32;
    (fpu.opcode, fpu.instruction_pointer, fpu.data_pointer) = (0, 0, 0);
    let top = usize::from(fpu.status >> 11 & 7);
    for register in 0..8 {
        fpu.registers[(top + register) & 7] = (image[4 + 2 * register], image[5 + 2 * register] as u16);
    }
    for (number, register) in fpu.xmm.iter_mut().enumerate() {
        *register = u128::from(image[21 + 2 * number]) << 64 | u128::from(image[20 + 2 * number]);
    }
}

fn store_fxsave(core: &Core) -> [u64; 64] {
    let (fpu, mut image) = (&core.fpu, [0; 64]);
    image[0] = u64::from(fpu.control) | u64::from(fpu.status) << 16 | u64::from(fpu.tags) << 32;
    image[3] = fpu.mxcsr.into();
    let top = usize::from(fpu.status >> 11 & 7);
    for register in 0..8 {
        let (significand, exponent) = fpu.registers[(top + register) & 7];
        (image[4 + 2 * register], image[5 + 2 * register]) = (significand, exponent.into());
    }
    for (number, register) in fpu.xmm.iter().enumerate() {
        (image[20 + 2 * number], image[21 + 2 * number]) = (*register as u64, (*register >> 64) as u64);
    }
    image
}

/// What is compared of a state; last opcode and pointers of x87 are AMD's to leave alone.
fn comparable(state: &State, flags: u64) -> State {
    let mut state = *state;
    state.rflags &= flags;
    state.fxsave[0] &= 0xff_ffff_ffff;
    (state.fxsave[1], state.fxsave[2]) = (0, 0);
    state.fxsave[3] &= 0xffff_ffff;
    for register in 0..8 {
        state.fxsave[5 + 2 * register] &= 0xffff;
    }
    state.fxsave[52..].fill(0);
    state
}

fn differences(native: &State, soft: &State) -> Vec<String> {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let mut found = Vec::new();
    let mut note = |name: String, native: u64, soft: u64| {
        if native != soft {
            found.push(format!("{name}: host {native:#x} engine {soft:#x}"));
        }
    };
    for (at, name) in NAMES.iter().enumerate() {
        note((*name).to_owned(), native.gprs[at], soft.gprs[at]);
    }
    note("rip".into(), native.rip, soft.rip);
    note("rflags".into(), native.rflags, soft.rflags);
    for at in 0..52usize {
        let name = match at {
            0 => "fcw/fsw/tags".to_owned(),
            3 => "mxcsr".to_owned(),
            4..=19 => format!("st{}.{}", (at - 4) / 2, at & 1),
            _ => format!("xmm{}.{}", at.saturating_sub(20) / 2, at & 1),
        };
        note(name, native.fxsave[at], soft.fxsave[at]);
    }
    found
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    vendor.ebx.to_le_bytes() == *b"Auth"
}

/// Whether the host leaves the flags of a bit scan as the engine does. Hosts whose CPUID says the same model were seen to differ:
/// one set what the manual leaves undefined, another left it as it was.
fn scans_alike(native: &mut Native, soft: &mut Soft) -> bool {
    const BSF: [u8; 3] = [0x0f, 0xbc, 0xc7];
    let mut random = Random(1);
    (0..8).all(|_| {
        let input = state(&mut random, BSF.len());
        let (host, engine) = (native.run(&BSF, &input, false).0, soft.run(&BSF, &input, false).0);
        (host.rflags ^ engine.rflags) & FLAGS == 0
    })
}

/// What is asked for first of the two that a comparison of strings reads is for the processor to choose.
fn same_fault(instruction: &Instruction, host: Option<Fault>, engine: Option<Fault>) -> bool {
    let two = matches!(instruction.mnemonic(), Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq);
    let of_memory = |fault: Option<Fault>| fault.is_some_and(|fault| matches!(fault.vector, 13 | 14));
    host == engine || two && of_memory(host) && of_memory(engine)
}

/// Flags that the manual defines for this instruction, or all where the host is AMD's like the engine.
fn compared_flags(instruction: &Instruction, scans_alike: bool) -> u64 {
    use iced_x86::RflagsBits as B;
    if is_amd() && (scans_alike || !matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr)) {
        return FLAGS;
    }
    let undefined = instruction.rflags_undefined();
    let bits = [(B::CF, 1u64), (B::PF, 4), (B::AF, 0x10), (B::ZF, 0x40), (B::SF, 0x80), (B::OF, 0x800)];
    bits.iter().filter(|(bit, _)| undefined & bit != 0).fold(FLAGS, |flags, (_, mask)| flags & !mask)
}

#[test]
fn user_mode_instructions_agree_with_the_host() {
    let seed = environment("GODWIT_DIFF_SEED").unwrap_or(1);
    let count = environment("GODWIT_DIFF_COUNT").unwrap_or(100_000);
    let only = std::env::var("GODWIT_DIFF_ONLY").ok();
    println!("seed {seed}, {count} instructions");
    let (mut native, mut soft) = (Native::new(), Soft::new());
    let scans_alike = scans_alike(&mut native, &mut soft);
    if !scans_alike {
        println!("this host leaves other flags behind bit scans: those that are undefined are not compared");
    }
    let mut random = Random(seed);
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let mut ran = 0;
    let shown_each = environment("GODWIT_DIFF_SHOW").unwrap_or(1);
    let (mut contents, mut after) = (vec![0; DATA_BYTES], vec![0; DATA_BYTES]);
    while ran < count {
        let bytes = instruction(&mut random);
        let options = DecoderOptions::AMD;
        let mut decoder = Decoder::with_ip(64, &bytes, CODE + 4096 - bytes.len() as u64, options);
        let decoded = decoder.decode();
        let name = format!("{:?}", decoded.code());
        if !allowed(&decoded)
            || only.as_ref().is_some_and(|only| !format!("{:?}", decoded.mnemonic()).eq_ignore_ascii_case(only))
        {
            continue;
        }
        ran += 1;
        let bytes = &bytes[..decoded.len()];
        let mut input = state(&mut random, bytes.len());
        let repeats = decoded.is_string_instruction() && (decoded.has_rep_prefix() || decoded.has_repne_prefix());
        if repeats {
            input.gprs[1] = random.below(70) | if random.chance(20) { random.next() << 32 } else { 0 };
        }
        if ran % 32 == 1 {
            for chunk in contents.chunks_mut(8) {
                chunk.copy_from_slice(&random.content().to_le_bytes());
            }
        }
        native.data().copy_from_slice(&contents);
        soft.memory.write(RAM_DATA, &contents).unwrap();
        let (host, host_fault) = native.run(bytes, &input, repeats);
        let (engine, engine_fault) = soft.run(bytes, &input, repeats);
        if host_fault.is_some() && in_pieces(&decoded) {
            continue;
        }
        let flags = compared_flags(&decoded, scans_alike);
        let mut found = differences(&comparable(&host, flags), &comparable(&engine, flags));
        // The host may fault already where the step arrived: that is the next instruction's fault.
        let arrived =
            host_fault.is_some_and(|fault| fault.vector == 14 && fault.address == engine.rip && engine.rip == host.rip);
        if !(same_fault(&decoded, host_fault, engine_fault) || arrived && engine_fault.is_none()) {
            found.push(format!("fault: host {host_fault:x?} engine {engine_fault:x?}"));
        }
        soft.memory.read(RAM_DATA, &mut after).unwrap();
        if after != native.data() {
            let at = after.iter().zip(native.data().iter()).position(|(soft, native)| soft != native).unwrap();
            let (host, engine) = (&native.data()[at..], &after[at..]);
            let shown = 16.min(host.len());
            found.push(format!(
                "memory at {:#x}: host {:x?} engine {:x?}",
                DATA + at as u64,
                &host[..shown],
                &engine[..shown]
            ));
        }
        if !found.is_empty() {
            let mut text = String::new();
            IntelFormatter::new().format(&decoded, &mut text);
            let report = format!(
                "{bytes:02x?} {text}\n  in: {:x?} flags {:x}\n  {}",
                input.gprs,
                input.rflags,
                found.join("\n  ")
            );
            let known = failures.entry(name).or_insert_with(|| (0, String::new()));
            known.0 += 1;
            if known.0 <= shown_each {
                known.1 += &report;
                known.1 += "\n";
            }
        }
    }
    for (name, (times, report)) in &failures {
        println!("{name} x{times}: {report}");
    }
    assert!(
        failures.is_empty(),
        "{} kinds of instructions differ (seed {seed}): {:?}",
        failures.len(),
        failures.keys()
    );
}

/// What neither side knows must be refused by both, with the same exception.
#[test]
fn undefined_encodings_agree_with_the_host() {
    let seed = environment("GODWIT_DIFF_SEED").unwrap_or(1);
    let count = environment("GODWIT_DIFF_COUNT").unwrap_or(100_000) / 10;
    println!("seed {seed}, {count} undefined encodings");
    let (mut native, mut soft) = (Native::new(), Soft::new());
    let mut random = Random(seed ^ 0x5eed);
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let mut ran = 0;
    while ran < count {
        let bytes = instruction(&mut random);
        let decoded = Decoder::with_ip(64, &bytes, 0, DecoderOptions::AMD).decode();
        // The host ignores LOCK before VERR and VERW; the manual says #UD.
        let verify = bytes.windows(2).any(|pair| pair == [0x0f, 0]);
        let skipped = bytes
            .iter()
            .take_while(
                |byte| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3),
            )
            .count();
        // VEX and EVEX: a host may know more of these than the disassembler.
        let vector = bytes.get(skipped).is_some_and(|byte| matches!(byte, 0xc4 | 0xc5 | 0x62));
        if !decoded.is_invalid() || bytes.len() < 15 || verify || vector {
            continue;
        }
        ran += 1;
        let input = state(&mut random, bytes.len());
        let (_, host) = native.run(&bytes, &input, false);
        let (_, engine) = soft.run(&bytes, &input, false);
        if host.map(|fault| fault.vector) != engine.map(|fault| fault.vector) {
            let name = format!("{:02x?}", &bytes[skipped..(skipped + 3).min(15)]);
            failures.entry(name).or_insert((0, format!("{bytes:02x?} host {host:x?} engine {engine:x?}"))).0 += 1;
        }
    }
    for (name, (times, report)) in &failures {
        println!("{name} x{times}: {report}");
    }
    assert!(failures.is_empty(), "{} encodings differ (seed {seed})", failures.len());
}
