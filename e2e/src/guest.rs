//! The in-tree guest: a small 64-bit program in an ELF with a PVH note, assembled here, that finds wrong memory.
//!
//! It fills a region with incompressible pages, then rewrites pages at a given rate of guest time, and before each rewrite
//! checks that the page is exactly what it wrote last: each page holds its own number, a count of its writes, and words that
//! follow from both; the counts are kept a second time in a shadow table elsewhere. Whatever a migration or a restore
//! loses, mixes or sets back is printed as `BAD page ...`. A line `tick N writes W bad B` comes at a steady interval, and
//! what is typed on the serial console is echoed. Between two events it halts, woken by the APIC timer.
//!
//! It refuses to know a firmware, PCI, or any device but the 8250 and the local APIC.

mod printing;
pub mod registers;
pub mod spread;
pub mod user;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use self::printing::Printer;

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Program {
    /// Where in RAM the region begins, [`REGION`] or above; RAM above 3 GiB lies at 4 GiB.
    pub start: u64,
    /// Bytes of the region that is filled and rewritten; a multiple of 4096. The shadow table (8 bytes a page) lies behind it.
    pub region_bytes: u64,
    /// Pages rewritten a second of guest time.
    pub pages_per_s: u64,
    /// Milliseconds of guest time between two lines.
    pub tick_ms: u64,
    /// Guest TSC frequency.
    pub tsc_hz: u64,
}

/// Where the region begins at the lowest.
pub const REGION: u64 = 16 << 20;
/// What lies here in RAM, and above, is found this much higher.
const HOLE_START: u64 = 3 << 30;
const HOLE_BYTES: u64 = 1 << 30;

const ENTRY: u64 = 0x10_0000;
const MAIN: u64 = 0x10_1000;
const TABLES: u64 = 0x10_8000;
const GDT: u64 = TABLES;
const IDT: u64 = TABLES + 0x1000;
const TSS: u64 = TABLES + 0x2000;
/// With a bit for each port and a byte of ones behind them (APM2 12.2.5).
const TSS_BYTES: usize = 104 + 0x1_0000 / 8 + 1;
const PML4: u64 = 0x20_0000;
const STACK: u64 = 0x1f_f000;
const VECTOR: u64 = 0x40;
const UART: u32 = 0x3f8;
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
const PAGE: u64 = 4096;
/// Page tables lie below [`REGION`]: room is for 12 GiB and more.
const MAPPED_GIB: u64 = 10;

impl Program {
    /// Bytes of RAM that the guest needs.
    pub fn memory_bytes(&self) -> u64 {
        (self.start + self.region_bytes + self.region_bytes / PAGE * 8 + PAGE).next_multiple_of(2 << 20)
    }

    /// The ELF file.
    ///
    /// # Errors
    /// The assembler refused; a bug in this file.
    pub fn elf(&self) -> Result<Vec<u8>, IcedError> {
        assert!(self.region_bytes > 0 && self.region_bytes.is_multiple_of(PAGE), "region of whole pages");
        let (main, handler) = self.main()?;
        image(main, &[(VECTOR as u8, handler)])
    }

    /// 64-bit code, and the address of the timer's interrupt handler.
    fn main(&self) -> Result<(Vec<u8>, u64), IcedError> {
        let mut asm = CodeAssembler::new(64)?;
        let mut routines = Routines::new(&mut asm, self.start, self.shadow());
        asm.mov(rsp, STACK)?;
        asm.lidt(ptr(TABLES + 0xff0))?;
        start_apic(&mut asm)?;
        self.fill(&mut asm, &mut routines)?;
        self.work(&mut asm, &mut routines)?;
        routines.emit(&mut asm)?;
        let mut handler = routines.handler;
        asm.set_label(&mut handler)?;
        asm.push(rax)?;
        asm.push(rcx)?;
        asm.push(rdx)?;
        write_msr(&mut asm, 0x80b, 0)?;
        asm.pop(rdx)?;
        asm.pop(rcx)?;
        asm.pop(rax)?;
        asm.iretq()?;
        let result = asm.assemble_options(MAIN, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let at = result.label_ip(&handler)?;
        Ok((result.inner.code_buffer, at))
    }

    fn pages(&self) -> u64 {
        self.region_bytes / PAGE
    }

    fn shadow(&self) -> u64 {
        let (at, bytes) = (self.start + self.region_bytes, self.region_bytes / PAGE * 8);
        assert!(at >= HOLE_START || at + bytes <= HOLE_START, "the shadow table lies on one side of the hole");
        if at >= HOLE_START { at + HOLE_BYTES } else { at }
    }

    /// Every page is written once; its count is 1.
    fn fill(&self, asm: &mut CodeAssembler, routines: &mut Routines) -> Result<(), IcedError> {
        routines.printer.print(asm, "guest: filling\n")?;
        let mut next = asm.create_label();
        asm.xor(rbx, rbx)?;
        asm.set_label(&mut next)?;
        asm.mov(rcx, 1u64)?;
        asm.call(routines.write_page)?;
        asm.mov(rdi, self.shadow())?;
        asm.mov(qword_ptr(rdi + rbx * 8), rcx)?;
        asm.inc(rbx)?;
        asm.mov(rax, self.pages())?;
        asm.cmp(rbx, rax)?;
        asm.jb(next)?;
        routines.printer.print(asm, "guest: filled\n")
    }

    /// r12 ticks, r13 TSC of the next tick, r14 writes, r15 TSC at the start, rbp bad pages.
    fn work(&self, asm: &mut CodeAssembler, routines: &mut Routines) -> Result<(), IcedError> {
        let mut again = asm.create_label();
        let (mut no_tick, mut no_key, mut no_write) = (asm.create_label(), asm.create_label(), asm.create_label());
        let (mut good, mut sleep) = (asm.create_label(), asm.create_label());
        let tick_tsc = self.tsc_hz / 1000 * self.tick_ms;
        let page_tsc = self.tsc_hz.checked_div(self.pages_per_s).unwrap_or(0);
        asm.xor(r12d, r12d)?;
        asm.xor(r14d, r14d)?;
        asm.xor(ebp, ebp)?;
        read_tsc(asm)?;
        asm.mov(r15, rax)?;
        asm.mov(r13, rax)?;

        asm.set_label(&mut again)?;
        read_tsc(asm)?;
        asm.cmp(rax, r13)?;
        asm.jb(no_tick)?;
        asm.mov(rcx, tick_tsc)?;
        asm.add(r13, rcx)?;
        asm.inc(r12)?;
        routines.printer.print_ticks(asm, [r12, r14, rbp])?;
        routines.printer.print(asm, "\n")?;

        asm.set_label(&mut no_tick)?;
        asm.mov(edx, UART + 5)?;
        asm.in_(al, dx)?;
        asm.test(al, 1)?;
        asm.jz(no_key)?;
        asm.mov(edx, UART)?;
        asm.in_(al, dx)?;
        asm.call(routines.printer.byte)?;
        asm.jmp(again)?;

        asm.set_label(&mut no_key)?;
        if page_tsc == 0 {
            asm.mov(rsi, r13)?;
            asm.jmp(sleep)?;
        }
        // The TSC at which write number r14 is due.
        asm.mov(rsi, page_tsc)?;
        asm.imul_2(rsi, r14)?;
        asm.add(rsi, r15)?;
        read_tsc(asm)?;
        asm.cmp(rax, rsi)?;
        asm.jb(no_write)?;
        // Page number: the high half of (writes * odd constant), scaled to the region.
        asm.mov(rax, MULTIPLIER)?;
        asm.imul_2(rax, r14)?;
        asm.mov(rbx, self.pages())?;
        asm.mul(rbx)?;
        asm.mov(rbx, rdx)?;
        asm.call(routines.check_page)?;
        asm.test(rax, rax)?;
        asm.jz(good)?;
        asm.inc(rbp)?;
        routines.printer.print_with(asm, "BAD page ", rbx)?;
        routines.printer.print(asm, "\n")?;
        asm.set_label(&mut good)?;
        asm.mov(rdi, self.shadow())?;
        asm.inc(qword_ptr(rdi + rbx * 8))?;
        asm.mov(rcx, qword_ptr(rdi + rbx * 8))?;
        asm.call(routines.write_page)?;
        asm.inc(r14)?;
        asm.jmp(again)?;

        asm.set_label(&mut no_write)?;
        asm.cmp(rsi, r13)?;
        asm.cmova(rsi, r13)?;
        asm.set_label(&mut sleep)?;
        asm.mov(rax, rsi)?;
        asm.mov(rdx, rsi)?;
        asm.shr(rdx, 32)?;
        asm.mov(ecx, 0x6e0)?;
        asm.wrmsr()?;
        asm.sti()?;
        asm.hlt()?;
        asm.cli()?;
        asm.jmp(again)?;
        Ok(())
    }
}

/// An ELF with a PVH note that runs `code` in 64-bit mode with the first 10 GiB mapped one to one and interrupts off.
///
/// # Errors
/// The assembler refused.
pub fn bare(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    asm.mov(rsp, STACK)?;
    code(&mut asm)?;
    image(asm.assemble(MAIN)?, &[])
}

/// Subroutines.
struct Routines {
    /// rbx page, rcx count: writes the whole page. Keeps rbx and rcx.
    write_page: CodeLabel,
    /// rbx page: rax is 0 if the page is what its shadow says. Keeps rbx.
    check_page: CodeLabel,
    printer: Printer,
    handler: CodeLabel,
    start: u64,
    shadow: u64,
}

impl Routines {
    fn new(asm: &mut CodeAssembler, start: u64, shadow: u64) -> Self {
        Self {
            write_page: asm.create_label(),
            check_page: asm.create_label(),
            printer: Printer::new(asm),
            handler: asm.create_label(),
            start,
            shadow,
        }
    }

    fn emit(&mut self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        self.emit_pages(asm)?;
        self.printer.emit(asm, true)
    }

    /// Word k of a page: k = 0 its number, k = 1 its count, else a running xorshift seeded by both.
    fn emit_pages(&mut self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        let (mut word, mut compare) = (asm.create_label(), asm.create_label());
        let mut bad = asm.create_label();
        asm.set_label(&mut self.write_page)?;
        page_seed(asm, self.start)?;
        asm.mov(qword_ptr(rdi), rbx)?;
        asm.mov(qword_ptr(rdi + 8), rcx)?;
        asm.mov(esi, 2u32)?;
        asm.set_label(&mut word)?;
        xorshift(asm)?;
        asm.mov(qword_ptr(rdi + rsi * 8), rax)?;
        asm.inc(esi)?;
        asm.cmp(esi, 512)?;
        asm.jb(word)?;
        asm.ret()?;

        asm.set_label(&mut self.check_page)?;
        asm.mov(rdi, self.shadow)?;
        asm.mov(rcx, qword_ptr(rdi + rbx * 8))?;
        page_seed(asm, self.start)?;
        asm.cmp(qword_ptr(rdi), rbx)?;
        asm.jne(bad)?;
        asm.cmp(qword_ptr(rdi + 8), rcx)?;
        asm.jne(bad)?;
        asm.mov(esi, 2u32)?;
        asm.set_label(&mut compare)?;
        xorshift(asm)?;
        asm.cmp(qword_ptr(rdi + rsi * 8), rax)?;
        asm.jne(bad)?;
        asm.inc(esi)?;
        asm.cmp(esi, 512)?;
        asm.jb(compare)?;
        asm.xor(eax, eax)?;
        asm.ret()?;
        asm.set_label(&mut bad)?;
        asm.mov(eax, 1u32)?;
        asm.ret()
    }
}

/// rbx page, rcx count -> rdi address of the page, rax seed of its words (never 0). Clobbers rdx.
fn page_seed(asm: &mut CodeAssembler, start: u64) -> Result<(), IcedError> {
    let mut low = asm.create_label();
    asm.mov(rdi, rbx)?;
    asm.shl(rdi, 12)?;
    asm.mov(rax, start)?;
    asm.add(rdi, rax)?;
    asm.mov(rax, HOLE_START)?;
    asm.cmp(rdi, rax)?;
    asm.jb(low)?;
    asm.add(rdi, HOLE_BYTES as i32)?;
    asm.set_label(&mut low)?;
    asm.mov(rax, MULTIPLIER)?;
    asm.imul_2(rax, rcx)?;
    asm.mov(rdx, rbx)?;
    asm.rol(rdx, 32)?;
    asm.xor(rax, rdx)?;
    asm.bts(rax, 63)
}

/// The next word in rax. Clobbers rdx.
fn xorshift(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.mov(rdx, rax)?;
    asm.shl(rdx, 13)?;
    asm.xor(rax, rdx)?;
    asm.mov(rdx, rax)?;
    asm.shr(rdx, 7)?;
    asm.xor(rax, rdx)?;
    asm.mov(rdx, rax)?;
    asm.shl(rdx, 17)?;
    asm.xor(rax, rdx)
}

fn read_tsc(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.rdtsc()?;
    asm.shl(rdx, 32)?;
    asm.or(rax, rdx)
}

fn write_msr(asm: &mut CodeAssembler, msr: u32, value: u32) -> Result<(), IcedError> {
    asm.mov(ecx, msr)?;
    asm.mov(eax, value)?;
    asm.xor(edx, edx)?;
    asm.wrmsr()
}

/// x2APIC on, spurious vector, timer in TSC-deadline mode.
fn start_apic(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.mov(ecx, 0x1bu32)?;
    asm.rdmsr()?;
    asm.or(eax, 0xc00)?;
    asm.wrmsr()?;
    write_msr(asm, 0x80f, 0x1ff)?;
    write_msr(asm, 0x808, 0)?;
    write_msr(asm, 0x832, 1 << 18 | VECTOR as u32)
}

/// PVH entry: 32-bit protected mode without paging; ends in 64-bit mode at [`MAIN`].
fn entry() -> Result<Vec<u8>, IcedError> {
    entry_to(MAIN)
}

/// The same with another end.
fn entry_to(main: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(32)?;
    asm.cli()?;
    asm.lgdt(ptr(TABLES as u32 + 0xfe0))?;
    asm.mov(eax, 0x6a0u32)?;
    asm.mov(cr4, eax)?;
    asm.mov(eax, PML4 as u32)?;
    asm.mov(cr3, eax)?;
    asm.mov(ecx, 0xc000_0080u32)?;
    asm.rdmsr()?;
    asm.or(eax, 0x100)?;
    asm.wrmsr()?;
    asm.mov(eax, 0x8000_0033u32)?;
    asm.mov(cr0, eax)?;
    // Far jump to 0x08:main.
    let mut far = vec![0xea];
    far.extend_from_slice(&(main as u32).to_le_bytes());
    far.extend_from_slice(&[8, 0]);
    asm.db(&far)?;
    asm.assemble(ENTRY)
}

/// A vector and where it leads.
type Gate = (u8, u64);

/// GDT, descriptors of GDT (at 0xfe0) and IDT (at 0xff0), IDT with gates.
fn tables(gates: &[Gate]) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(16, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    // User data at 0x20, user code at 0x28.
    put(32, &0x00cf_f300_0000_ffffu64.to_le_bytes());
    put(40, &0x00af_fb00_0000_ffffu64.to_le_bytes());
    // An available TSS at 0x30, for guests that have one.
    let low = (TSS_BYTES as u64 - 1) | (TSS & 0xff_ffff) << 16 | 0x89 << 40;
    put(48, &low.to_le_bytes());
    put(0xfe0, &0x3fu16.to_le_bytes());
    put(0xfe2, &GDT.to_le_bytes());
    put(0xff0, &0xfffu16.to_le_bytes());
    put(0xff2, &IDT.to_le_bytes());
    let mut idt = vec![0; 0x1000];
    for (vector, handler) in gates {
        let gate = &mut idt[16 * usize::from(*vector)..][..16];
        gate[0..2].copy_from_slice(&(*handler as u16).to_le_bytes());
        gate[2..4].copy_from_slice(&8u16.to_le_bytes());
        gate[5] = 0x8e;
        gate[6..8].copy_from_slice(&((handler >> 16) as u16).to_le_bytes());
        gate[8..12].copy_from_slice(&((handler >> 32) as u32).to_le_bytes());
    }
    bytes.extend_from_slice(&idt);
    bytes
}

/// Rights in page tables (APM2 5.4.1): present and writable; the same for CPL 3.
const KERNEL_PAGES: u64 = 3;
const USER_PAGES: u64 = 7;

/// The first [`MAPPED_GIB`] one to one, in pages of 2 MiB.
fn page_tables(rights: u64) -> Vec<u8> {
    const LARGE: u64 = 0x80;
    const GIB: usize = MAPPED_GIB as usize;
    let mut words = vec![0u64; 512 * (2 + GIB)];
    words[0] = (PML4 + PAGE) | rights;
    for i in 0..GIB {
        words[512 + i] = (PML4 + (2 + i as u64) * PAGE) | rights;
    }
    for i in 0..512 * GIB {
        words[1024 + i] = (i as u64) << 21 | LARGE | rights;
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The ELF file of 64-bit code at [`MAIN`] with these interrupt handlers.
fn image(main: Vec<u8>, gates: &[Gate]) -> Result<Vec<u8>, IcedError> {
    let segments = [(ENTRY, entry()?), (MAIN, main), (TABLES, tables(gates)), (PML4, page_tables(KERNEL_PAGES))];
    Ok(elf(&segments))
}

/// An executable ELF64 whose note names [`ENTRY`] as PVH entry (note type 18, XEN_ELFNOTE_PHYS32_ENTRY).
fn elf(segments: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&(ENTRY as u32).to_le_bytes());

    let headers = segments.len() as u16 + 1;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64, 56, headers, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let note_at = 64 + 56 * u64::from(headers);
    let mut at = (note_at + note.len() as u64).next_multiple_of(PAGE);
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, bytes: u64, align: u64| {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        for word in [offset, address, address, bytes, bytes, align] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    };
    header(4, 4, note_at, 0, note.len() as u64, 4);
    for (address, bytes) in segments {
        header(1, 7, at, *address, bytes.len() as u64, PAGE);
        at = (at + bytes.len() as u64).next_multiple_of(PAGE);
    }
    file.extend_from_slice(&note);
    for (_, bytes) in segments {
        file.resize(file.len().next_multiple_of(PAGE as usize), 0);
        file.extend_from_slice(bytes);
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_assembles_and_fits_its_places() {
        let program =
            Program { start: REGION, region_bytes: 4 << 20, pages_per_s: 1000, tick_ms: 10, tsc_hz: 1_000_000_000 };
        let (main, handler) = program.main().unwrap();
        assert!(MAIN + main.len() as u64 <= TABLES && (MAIN..TABLES).contains(&handler));
        let elf = program.elf().unwrap();
        assert_eq!(&elf[..4], b"\x7fELF");
    }
}
