//! The bytes of an ELF64 core around a guest's RAM, as gdb, readelf and crash read it.
//!
//! ```text
//! 0         ELF header, program headers, notes (NT_PRSTATUS and NT_FPREGSET of each processor)
//! DATA_AT   RAM, one byte after the other
//! ```
//! PT_LOAD segments name the same bytes more than once: RAM by physical address (`p_vaddr` is `p_paddr`: addresses of the
//! lower half are physical), then every kernel mapping by its virtual address. Layouts: System V ABI, gABI chapter 5,
//! and the x86-64 `elf_prstatus` of Linux's core files.

use vmcb_engine::cpu::{CpuState, gpr};
use vmcb_engine::memory::{HOLE_END, HOLE_START};

use super::paging::Run;

/// Where RAM begins in the file.
pub const DATA_AT: u64 = 4 << 20;
/// Most kernel mappings of a core: their headers, and the notes of 256 processors, fit before [`DATA_AT`].
pub const RUNS_MAX: usize = 60_000;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const NT_PRSTATUS: u32 = 1;
const NT_FPREGSET: u32 = 2;
const PRSTATUS_BYTES: usize = 336;
/// Of the process id, and of the registers, in `elf_prstatus`.
const PID_AT: usize = 32;
const REGISTERS_AT: usize = 112;
const FP_VALID_AT: usize = 328;

/// Guest RAM by physical address: what lies above the hole is found after what lies below it.
#[derive(Debug, Clone, Copy)]
pub struct Ram {
    bytes: u64,
}

/// A range of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical address.
    pub physical: u64,
    /// Bytes.
    pub bytes: u64,
    /// Byte of RAM.
    pub offset: u64,
}

impl Ram {
    /// So much of it.
    pub fn new(bytes: u64) -> Ram {
        Ram { bytes }
    }

    /// Its ranges, those without bytes left out.
    pub fn ranges(&self) -> impl Iterator<Item = Range> {
        let low = self.bytes.min(HOLE_START);
        let ranges = [
            Range { physical: 0, bytes: low, offset: 0 },
            Range { physical: HOLE_END, bytes: self.bytes - low, offset: low },
        ];
        ranges.into_iter().filter(|range| range.bytes > 0)
    }

    /// The parts of a physical range that are RAM.
    pub fn parts(&self, physical: u64, bytes: u64) -> impl Iterator<Item = Range> {
        self.ranges().filter_map(move |range| {
            let start = physical.max(range.physical);
            let end = physical.saturating_add(bytes).min(range.physical + range.bytes);
            let offset = range.offset + start.checked_sub(range.physical)?;
            (start < end).then(|| Range { physical: start, bytes: end - start, offset })
        })
    }
}

/// Everything before the pages.
pub fn head(ram: &Ram, runs: &[Run], cpus: &[CpuState]) -> Vec<u8> {
    let runs = &runs[..runs.len().min(RUNS_MAX)];
    let segments = 1 + ram.ranges().count() + runs.len();
    let notes_at = HEADER_BYTES + segments * PROGRAM_HEADER_BYTES;
    let notes = notes(cpus);
    let mut out = elf_header(segments as u16);
    program_header(&mut out, PT_NOTE, 0, [notes_at as u64, 0, 0, notes.len() as u64, 0, 4]);
    let mut load = |virt: u64, range: Range| {
        let Range { physical, bytes, offset } = range;
        program_header(&mut out, PT_LOAD, 7, [DATA_AT + offset, virt, physical, bytes, bytes, 4096]);
    };
    ram.ranges().for_each(|range| load(range.physical, range));
    runs.iter().for_each(|run| load(run.virt, run.range));
    out.extend_from_slice(&notes);
    out
}

fn elf_header(segments: u16) -> Vec<u8> {
    // 64 bits, little endian, version 1, System V.
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend([ET_CORE, EM_X86_64].iter().flat_map(|n| n.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    out.extend([0, HEADER_BYTES as u64, 0].iter().flat_map(|n| n.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    let halves = [HEADER_BYTES as u16, PROGRAM_HEADER_BYTES as u16, segments, 0, 0, 0];
    out.extend(halves.iter().flat_map(|n| n.to_le_bytes()));
    out
}

/// Offset, virtual and physical address, bytes in the file and in memory, alignment.
fn program_header(out: &mut Vec<u8>, kind: u32, flags: u32, numbers: [u64; 6]) {
    out.extend([kind, flags].iter().flat_map(|n| n.to_le_bytes()));
    out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
}

fn notes(cpus: &[CpuState]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, cpu) in (1..).zip(cpus) {
        note(&mut out, NT_PRSTATUS, &prstatus(number, cpu));
        note(&mut out, NT_FPREGSET, cpu.fpu.fxsave());
    }
    out
}

/// Names and descriptions of these notes are multiples of four bytes already.
fn note(out: &mut Vec<u8>, kind: u32, description: &[u8]) {
    out.extend([5, description.len() as u32, kind].iter().flat_map(|n| n.to_le_bytes()));
    out.extend_from_slice(b"CORE\0\0\0\0");
    out.extend_from_slice(description);
}

/// A processor as a thread: `pid` is how gdb names it.
fn prstatus(pid: u32, cpu: &CpuState) -> [u8; PRSTATUS_BYTES] {
    let general = |number: usize| cpu.gprs[number];
    let selector = |segment: &vmcb_engine::vmcb::Segment| u64::from(segment.selector);
    let registers: [u64; 27] = [
        general(15),
        general(14),
        general(13),
        general(12),
        general(gpr::RBP),
        general(gpr::RBX),
        general(11),
        general(10),
        general(9),
        general(8),
        general(gpr::RAX),
        general(gpr::RCX),
        general(gpr::RDX),
        general(gpr::RSI),
        general(gpr::RDI),
        // ORIG_RAX: in no system call.
        u64::MAX,
        cpu.rip,
        selector(&cpu.cs),
        cpu.rflags,
        general(gpr::RSP),
        selector(&cpu.ss),
        cpu.fs.base,
        cpu.gs.base,
        selector(&cpu.ds),
        selector(&cpu.es),
        selector(&cpu.fs),
        selector(&cpu.gs),
    ];
    let mut out = [0; PRSTATUS_BYTES];
    out[PID_AT..PID_AT + 4].copy_from_slice(&pid.to_le_bytes());
    for (number, register) in registers.iter().enumerate() {
        out[REGISTERS_AT + 8 * number..][..8].copy_from_slice(&register.to_le_bytes());
    }
    out[FP_VALID_AT] = 1;
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn ram_above_the_hole_follows_that_below_it() {
        let ram = Ram::new(HOLE_START + (1 << 20));
        let high = Range { physical: HOLE_END, bytes: 1 << 20, offset: HOLE_START };
        assert_eq!(ram.ranges().last(), Some(high));
        // Across the hole: what lies in it is none.
        let parts: Vec<_> = ram.parts(HOLE_START - 4096, 2 << 30).collect();
        assert_eq!(parts, [Range { physical: HOLE_START - 4096, bytes: 4096, offset: HOLE_START - 4096 }, high]);
        assert_eq!(ram.parts(HOLE_START, HOLE_END - HOLE_START).count(), 0);
        assert_eq!(ram.parts(u64::MAX - 4095, 4096).count(), 0);
        assert_eq!(Ram::new(1 << 20).ranges().count(), 1);
    }

    #[test]
    fn a_core_is_laid_out_as_readers_expect() {
        let mut cpu = CpuState::reset();
        (cpu.rip, cpu.rflags, cpu.gs.base) = (0xffff_ffff_8123_4567, 0x246, 0xffff_8880_1f00_0000);
        cpu.gprs = std::array::from_fn(|number| 0x100 + number as u64);
        let ram = Ram::new(64 << 20);
        let range = Range { physical: 0x100_0000, bytes: 0x20_0000, offset: 0x100_0000 };
        let runs = [Run { virt: 0xffff_ffff_8100_0000, range }];
        let core = head(&ram, &runs, &[cpu.clone(), cpu]);
        // e_type, e_machine, e_phoff, e_phentsize, e_phnum.
        assert_eq!(core[16..20], [4, 0, 62, 0]);
        assert_eq!((number(&core, 32), core[54], core[56]), (64, 56, 3));
        let segment = |index: usize| {
            let at = 64 + 56 * index;
            (core[at], [8, 16, 24, 32, 40].map(|field| number(&core, at + field)))
        };
        let notes_at = 64 + 3 * 56;
        let notes_bytes = 2 * (20 + 336 + 20 + 512);
        assert_eq!(segment(0), (4, [notes_at as u64, 0, 0, notes_bytes, 0]));
        assert_eq!(core.len() as u64, notes_at as u64 + notes_bytes);
        assert_eq!(segment(1), (1, [DATA_AT, 0, 0, 64 << 20, 64 << 20]));
        let kernel = [DATA_AT + 0x100_0000, 0xffff_ffff_8100_0000, 0x100_0000, 0x20_0000, 0x20_0000];
        assert_eq!(segment(2), (1, kernel));
        // Second processor: after one of each note.
        let status = notes_at + (20 + 336) + (20 + 512) + 20;
        assert_eq!((core[status - 20], core[status - 12], &core[status - 8..status - 4]), (5, 1, &b"CORE"[..]));
        assert_eq!(core[status + PID_AT], 2);
        let register = |index: usize| number(&core, status + REGISTERS_AT + 8 * index);
        // R15, RBX, RDI, RIP, RFLAGS, RSP, GS base.
        let found = [0, 5, 14, 16, 18, 19, 22].map(register);
        assert_eq!(found, [0x10f, 0x103, 0x107, 0xffff_ffff_8123_4567, 0x246, 0x104, 0xffff_8880_1f00_0000]);
    }

    #[test]
    fn the_largest_head_fits_before_the_pages() {
        let range = Range { physical: 0, bytes: 4096, offset: 0 };
        let runs = vec![Run { virt: 0xffff_8000_0000_0000, range }; RUNS_MAX + 1];
        let cpus = vec![CpuState::reset(); 256];
        let head = head(&Ram::new(8 << 30), &runs, &cpus);
        assert!(head.len() as u64 <= DATA_AT, "{}", head.len());
        assert_eq!(u16::from_le_bytes([head[56], head[57]]) as usize, RUNS_MAX + 3);
    }
}
