//! Code of a hostile guest on the software processor: decoder, interpreter, exceptions, paging.
//!
//! ```text
//! byte 0      bits 1:0 64-bit, 32-bit or 16-bit code, or real mode; bit 2 CPL 3; bit 3 single step; bit 4 alignment checks
//! bytes 1..3  where time is cut, in instructions; bytes 3..7 seed of registers and data
//! the rest    code
//! ```
//! Handlers of all exceptions skip one byte and return, so that one fault does not end the run. All of RAM is writable for the
//! guest: page tables, descriptors and handlers as well. The run stops exactly at [`INSTRUCTIONS`] or by an exit, and a
//! second processor that is stopped half-way ends in the same state.

use std::sync::Arc;

use vmcb_engine::engine::soft::core::{CS, Core, DS, ES, FS, GS, RSP, SS, rflags};
use vmcb_engine::engine::soft::run::Ended;
use vmcb_engine::memory::GuestMemory;
use vmcb_engine::vmcb::Segment;
use vmcb_engine::vmcb::registers::cr0;

use super::{Input, mix};

/// Most instructions of a run.
pub const INSTRUCTIONS: u64 = 2000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const HANDLERS: u64 = 0x8000;
const CODE: u64 = 0x20_0000;
const REAL_CODE: u64 = 0x1_0000;
const DATA: u64 = 0x40_0000;
const STACK: u64 = 0x60_0000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Long,
    Compatible32,
    Compatible16,
    Real,
}

struct Plan<'a> {
    width: Width,
    user: bool,
    step: bool,
    aligned: bool,
    cut: u64,
    seed: u64,
    code: &'a [u8],
}

/// Instructions that an input retires.
pub fn retires(data: &[u8]) -> u64 {
    let (mut core, _memory) = prepare(&Plan::read(data));
    core.run_until(INSTRUCTIONS);
    core.retired()
}

impl<'a> Plan<'a> {
    fn read(data: &'a [u8]) -> Self {
        let mut input = Input(data);
        let flags = input.byte();
        let width = [Width::Long, Width::Compatible32, Width::Compatible16, Width::Real][usize::from(flags & 3)];
        Plan {
            width,
            user: flags & 4 != 0 && width != Width::Real,
            step: flags & 8 != 0,
            aligned: flags & 16 != 0,
            cut: input.number(2) % INSTRUCTIONS,
            seed: input.number(4),
            code: input.take(3000),
        }
    }
}

/// Takes any bytes.
pub fn run(data: &[u8]) {
    let plan = Plan::read(data);
    let (mut whole, memory) = prepare(&plan);
    let ended = whole.run_until(INSTRUCTIONS);
    assert!(whole.retired() <= INSTRUCTIONS, "{} instructions retired", whole.retired());
    if ended == Ended::Reached {
        assert_eq!(whole.retired(), INSTRUCTIONS, "it stops where it was asked to");
    }
    let (mut parts, other_memory) = prepare(&plan);
    let mut twice = parts.run_until(plan.cut);
    if twice == Ended::Reached {
        twice = parts.run_until(INSTRUCTIONS);
    }
    assert_eq!((ended, whole.retired()), (twice, parts.retired()), "cut at {}", plan.cut);
    assert_eq!(state(&whole), state(&parts), "cut at {}", plan.cut);
    for (from, bytes) in [(0, 0x2_0000), (CODE, 0x2000), (DATA, 0x2_0000), (STACK - 0x2000, 0x4000)] {
        let read = |memory: &GuestMemory| {
            let mut page = vec![0; bytes];
            memory.read(from, &mut page).expect("RAM is there");
            page
        };
        assert!(read(&memory) == read(&other_memory), "RAM at {from:#x} differs, cut at {}", plan.cut);
    }
}

/// What a guest can see of a processor.
fn state(core: &Core) -> (Vec<u64>, Vec<Segment>) {
    let mut words = core.gprs[..16].to_vec();
    words.extend([core.rip, core.rflags(), core.cpl.into(), core.cr0, core.cr2, core.cr3, core.cr4, core.efer]);
    words.extend(core.debug);
    words.push(core.interrupt_shadow.into());
    (words, [core.segments.as_slice(), &[core.gdtr, core.idtr, core.ldtr, core.tr]].concat())
}

fn prepare(plan: &Plan<'_>) -> (Box<Core>, Arc<GuestMemory>) {
    let memory = super::memory();
    let mut seed = plan.seed;
    let data: Vec<u8> = (0..0x800).flat_map(|_| mix(&mut seed).to_le_bytes()).collect();
    let put = |at, bytes: &[u8]| memory.write(at, bytes).expect("RAM is there");
    put(DATA, &data);
    let mut core = if plan.width == Width::Real { real(&memory) } else { protected(&memory, plan) };
    put(if plan.width == Width::Real { REAL_CODE } else { CODE }, plan.code);
    let random = (0..16).map(|register: u64| match mix(&mut seed) {
        word if register.is_multiple_of(3) => word >> (word & 63),
        word => DATA + (word & 0x1_ffff),
    });
    random.enumerate().for_each(|(register, word)| core.gprs[register] = word);
    core.gprs[RSP] = if plan.width == Width::Real { 0xff00 } else { STACK };
    let mut flags = mix(&mut seed) & rflags::ARITHMETIC | rflags::RESERVED_ONE;
    if plan.step {
        flags |= rflags::TF;
    }
    if plan.aligned {
        flags |= rflags::AC;
        core.cr0 |= cr0::AM;
    }
    core.set_rflags(flags);
    core.refresh_alignment();
    core.refresh_mode();
    (core, memory)
}

fn real(memory: &Arc<GuestMemory>) -> Box<Core> {
    let mut core = Core::new(Arc::clone(memory));
    // Every vector: F000 is not RAM of the code, so the handler lies at 0000:8000.
    let vectors: Vec<u8> = (0..256).flat_map(|_| (HANDLERS as u32).to_le_bytes()).collect();
    memory.write(0, &vectors).expect("RAM is there");
    // push bp; mov bp, sp; inc word [bp+2]; pop bp; iret.
    memory.write(HANDLERS, &[0x55, 0x89, 0xe5, 0xff, 0x46, 2, 0x5d, 0xcf]).expect("RAM is there");
    core.idtr = Segment::new(0, 0, 0x3ff, 0);
    core.segments[CS] = Segment::new((REAL_CODE >> 4) as u16, 0x9b, 0xffff, REAL_CODE);
    core.rip = 0;
    core
}

fn protected(memory: &Arc<GuestMemory>, plan: &Plan<'_>) -> Box<Core> {
    let mut core = Core::bare(Arc::clone(memory));
    let level: u64 = if plan.user { 3 } else { 0 };
    let put = |at, word: u64| memory.write(at, &word.to_le_bytes()).expect("RAM is there");
    let descriptor = |access: u64, flags: u64, dpl: u64| 0x000f_0000_0000_ffff | access << 40 | dpl << 45 | flags << 52;
    let code_flags = match plan.width {
        Width::Compatible32 => 0xc,
        Width::Compatible16 => 0x8,
        Width::Long | Width::Real => 0xa,
    };
    put(GDT + 0x10, descriptor(0x9b, code_flags, level));
    put(GDT + 0x18, descriptor(0x93, 0xc, level));
    put(GDT + 0x20, descriptor(0x9b, 0xa, 0));
    // add qword [rsp], 1; iretq; and the same below an error code.
    memory.write(HANDLERS, &[0x48, 0x83, 0x04, 0x24, 1, 0x48, 0xcf]).expect("RAM is there");
    memory.write(HANDLERS + 0x10, &[0x48, 0x83, 0xc4, 8, 0x48, 0x83, 0x04, 0x24, 1, 0x48, 0xcf]).expect("RAM is there");
    for vector in 0..256u64 {
        let target = if matches!(vector, 8 | 10..=14 | 17) { HANDLERS + 0x10 } else { HANDLERS };
        let dpl = if vector == 3 || vector >= 32 { 3 } else { 0 };
        put(IDT + vector * 16, target & 0xffff | 0x20 << 16 | (0x8e00 | dpl << 13) << 32 | (target >> 16) << 48);
    }
    put(TSS + 4, STACK - 0x1000);
    core.gdtr = Segment::new(0, 0, 0x27, GDT);
    core.idtr = Segment::new(0, 0, 0xfff, IDT);
    core.tr = Segment::new(0x28, 0x8b, 0x67, TSS);
    if plan.user {
        core.to_user();
    }
    let attributes = 0x9b | (level as u16) << 5 | (code_flags as u16) << 8;
    core.segments[CS].attrib = attributes;
    for register in [ES, SS, DS, FS, GS] {
        core.segments[register].attrib = 0xc93 | (level as u16) << 5;
    }
    core.rip = CODE;
    core
}

/// Code of each width that touches many instructions.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let plan = |flags: u8, code: &[u8]| [&[flags, 0x33, 1, 1, 2, 3, 4], code].concat();
    // Arithmetic with memory, shifts, MUL, DIV, string copies, SSE, x87, CPUID, SYSCALL, a loop.
    let long: &[u8] = &[
        0x48, 0x8d, 0x0d, 0, 0, 0, 0, 0x48, 0x01, 0x08, 0xf7, 0xe1, 0x48, 0xf7, 0xf1, 0xd3, 0xe2, 0xf3, 0xa4, 0x66,
        0x0f, 0x6f, 0x07, 0x0f, 0x58, 0xc1, 0xd9, 0xe8, 0xdc, 0x06, 0xdd, 0x1f, 0x0f, 0xa2, 0xf0, 0x48, 0x0f, 0xc1,
        0x06, 0x0f, 0xb1, 0x0f, 0xcd, 0x80, 0x0f, 0x05, 0xff, 0xc1, 0x75, 0xd0,
    ];
    let far: &[u8] = &[
        0x6a, 0x10, 0x48, 0x8d, 0x05, 2, 0, 0, 0, 0x50, 0x48, 0xcb, 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0x0f, 1, 0xd9,
        0xfa, 0xfb, 0xf4,
    ];
    let narrow: &[u8] = &[
        0x60, 0x27, 0x37, 0xd4, 10, 0xd5, 10, 0xc8, 8, 0, 3, 0xc9, 0x61, 0x9c, 0x9d, 0xc4, 0x06, 0x1e, 0x07, 0x62,
        0x06, 0x63, 0xc8, 0xe2, 0xe0,
    ];
    vec![
        ("long-user", plan(4, long)),
        ("long-kernel", plan(0, long)),
        ("long-kernel-system", plan(0, far)),
        ("step", plan(12, long)),
        ("aligned", plan(20, long)),
        ("compatible-32", plan(5, narrow)),
        ("compatible-16", plan(6, narrow)),
        ("real", plan(3, narrow)),
    ]
}
