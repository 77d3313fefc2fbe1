//! Writes the in-tree guest: `beat FILE` makes an ELF that any loader with the PVH protocol starts.
//!
//! The guest is 32-bit code on bare memory, for machines where no kernel can be had. It does what the Linux guest of
//! `deploy/guest` does, in RAM: for ever it fills one of 256 pages with words that follow from the count, and says
//! `godwit: beat N` on the first serial port; at a line that begins with `v` it checks all pages and says
//! `godwit: verify ok N` or `godwit: verify FAILED`. It knows no interrupts, no timer and no disk.
//! Entry: PVH (Xen `docs/misc/pvh.markdown`), 32-bit protected mode, flat segments, paging off.

use std::process::ExitCode;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the code lies, and where it is entered.
const BASE: u32 = 0x10_0000;
/// Stack, below the code's page of variables.
const STACK: u32 = 0x18_0000;
/// Byte: does the current line of input begin with `v`? Its neighbour: is the line empty so far?
const LINE_IS_VERIFY: u32 = 0x18_0100;
const LINE_IS_EMPTY: u32 = 0x18_0104;
/// The pages that are filled.
const PAGES: u32 = 0x20_0000;
const PAGE_COUNT: u32 = 256;
const WORDS_PER_PAGE: u32 = 1024;
/// Makes words of neighbouring counts differ in all bits.
const GOLDEN: u32 = 0x9e37_79b9;
/// First serial port: data, and line status (data ready 0x01, transmitter empty 0x20).
const SERIAL: u32 = 0x3f8;
const SERIAL_STATUS: u32 = 0x3fd;
/// Turns of the loop that makes the guest breathe between beats.
const IDLE_TURNS: u32 = 4_000_000;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: beat FILE");
        return ExitCode::from(2);
    };
    let elf = match code() {
        Ok(code) => elf(&code),
        Err(error) => {
            eprintln!("beat: the guest does not assemble: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = std::fs::write(&path, elf) {
        eprintln!("beat: cannot write {}: {error}", path.display());
        return ExitCode::from(2);
    }
    ExitCode::SUCCESS
}

/// Subroutines.
#[derive(Clone, Copy)]
struct Routines {
    /// Says the character in `al`. Keeps all registers.
    put_char: CodeLabel,
    /// Says the text at `esi`, up to a zero.
    put_text: CodeLabel,
    /// Says `eax` in decimal.
    put_number: CodeLabel,
    /// Fills the page of the count in `ebp`.
    fill: CodeLabel,
    /// Checks every page and says how it went.
    verify: CodeLabel,
    /// Reads what has come on the serial port.
    input: CodeLabel,
}

/// Texts lie in the page after the code, one every 64 bytes.
const TEXTS: [&[u8]; 5] = [
    b"godwit: up, the in-tree guest\r\n",
    b"godwit: beat ",
    b"\r\n",
    b"godwit: verify ok ",
    b"godwit: verify FAILED\r\n",
];
const TEXT_PITCH: usize = 64;
const UP: u32 = text_at(0);
const BEAT: u32 = text_at(1);
const LINE_END: u32 = text_at(2);
const OK: u32 = text_at(3);
const FAILED: u32 = text_at(4);
const CODE_BYTES: usize = 4096;

const fn text_at(index: usize) -> u32 {
    BASE + (CODE_BYTES + index * TEXT_PITCH) as u32
}

/// Code and texts of the guest. `ebp` is the count all the time; every routine may change the other registers.
fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let r = Routines {
        put_char: a.create_label(),
        put_text: a.create_label(),
        put_number: a.create_label(),
        fill: a.create_label(),
        verify: a.create_label(),
        input: a.create_label(),
    };
    main_loop(&mut a, r)?;
    output(&mut a, r)?;
    memory(&mut a, r)?;
    input(&mut a, r)?;
    let mut image = a.assemble(u64::from(BASE))?;
    assert!(image.len() <= CODE_BYTES, "the code fits into its page");
    for (index, text) in TEXTS.iter().enumerate() {
        image.resize(CODE_BYTES + index * TEXT_PITCH, 0);
        image.extend_from_slice(text);
        image.push(0);
    }
    Ok(image)
}

fn main_loop(a: &mut CodeAssembler, r: Routines) -> Result<(), IcedError> {
    let (mut next, mut breathe) = (a.create_label(), a.create_label());
    a.cli()?;
    a.cld()?;
    a.mov(esp, STACK)?;
    a.xor(ebp, ebp)?;
    a.mov(dword_ptr(LINE_IS_VERIFY), 0)?;
    a.mov(dword_ptr(LINE_IS_EMPTY), 1)?;
    a.mov(esi, UP)?;
    a.call(r.put_text)?;

    a.set_label(&mut next)?;
    a.inc(ebp)?;
    a.call(r.fill)?;
    a.mov(esi, BEAT)?;
    a.call(r.put_text)?;
    a.mov(eax, ebp)?;
    a.call(r.put_number)?;
    a.mov(esi, LINE_END)?;
    a.call(r.put_text)?;
    a.mov(ecx, IDLE_TURNS)?;
    a.set_label(&mut breathe)?;
    a.dec(ecx)?;
    a.jnz(breathe)?;
    a.call(r.input)?;
    a.jmp(next)
}

fn output(a: &mut CodeAssembler, mut r: Routines) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.set_label(&mut r.put_char)?;
    a.push(edx)?;
    a.push(eax)?;
    a.mov(edx, SERIAL_STATUS)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.jz(wait)?;
    a.mov(edx, SERIAL)?;
    a.pop(eax)?;
    a.out(dx, al)?;
    a.pop(edx)?;
    a.ret()?;

    let mut end = a.create_label();
    a.set_label(&mut r.put_text)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(end)?;
    a.call(r.put_char)?;
    a.jmp(r.put_text)?;
    a.set_label(&mut end)?;
    a.ret()?;

    // Digits come from the last to the first: they wait on the stack.
    let (mut digit, mut say) = (a.create_label(), a.create_label());
    a.set_label(&mut r.put_number)?;
    a.mov(ebx, 10)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut digit)?;
    a.xor(edx, edx)?;
    a.div(ebx)?;
    a.push(edx)?;
    a.inc(ecx)?;
    a.test(eax, eax)?;
    a.jnz(digit)?;
    a.set_label(&mut say)?;
    a.pop(eax)?;
    a.add(al, u32::from(b'0'))?;
    a.call(r.put_char)?;
    a.dec(ecx)?;
    a.jnz(say)?;
    a.ret()
}

/// Word `i` of the page of count `n` is `n + i * GOLDEN`; word 0 says which count it was.
fn memory(a: &mut CodeAssembler, mut r: Routines) -> Result<(), IcedError> {
    let mut word = a.create_label();
    a.set_label(&mut r.fill)?;
    a.mov(edi, ebp)?;
    a.and(edi, PAGE_COUNT - 1)?;
    a.shl(edi, 12)?;
    a.add(edi, PAGES)?;
    a.mov(eax, ebp)?;
    a.mov(ecx, WORDS_PER_PAGE)?;
    a.set_label(&mut word)?;
    a.stosd()?;
    a.add(eax, GOLDEN)?;
    a.dec(ecx)?;
    a.jnz(word)?;
    a.ret()?;

    let (mut page, mut word, mut wrong) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut r.verify)?;
    a.mov(esi, PAGES)?;
    // Pages that were filled: all, or as many as there were counts.
    a.mov(ebx, PAGE_COUNT)?;
    a.cmp(ebp, ebx)?;
    a.cmovb(ebx, ebp)?;
    a.push(ebx)?;
    // Page 0 is filled first by count PAGE_COUNT; before that the pages begin with number 1.
    a.cmp(ebp, PAGE_COUNT)?;
    a.jae(page)?;
    a.add(esi, 4096)?;
    a.set_label(&mut page)?;
    a.mov(eax, dword_ptr(esi))?;
    a.mov(ecx, WORDS_PER_PAGE)?;
    a.set_label(&mut word)?;
    a.cmp(eax, dword_ptr(esi))?;
    a.jne(wrong)?;
    a.add(eax, GOLDEN)?;
    a.add(esi, 4)?;
    a.dec(ecx)?;
    a.jnz(word)?;
    // The page's count has the page's number in its low bits, and is one of the last PAGE_COUNT.
    a.mov(eax, dword_ptr(esi - 4096))?;
    a.mov(edx, ebp)?;
    a.sub(edx, eax)?;
    a.cmp(edx, PAGE_COUNT)?;
    a.jae(wrong)?;
    a.dec(ebx)?;
    a.jnz(page)?;
    a.mov(esi, OK)?;
    a.call(r.put_text)?;
    a.pop(eax)?;
    a.call(r.put_number)?;
    a.mov(esi, LINE_END)?;
    a.call(r.put_text)?;
    a.ret()?;
    a.set_label(&mut wrong)?;
    a.add(esp, 4)?;
    a.mov(esi, FAILED)?;
    a.call(r.put_text)?;
    a.ret()
}

fn input(a: &mut CodeAssembler, mut r: Routines) -> Result<(), IcedError> {
    let (mut line_end, mut end) = (a.create_label(), a.create_label());
    a.set_label(&mut r.input)?;
    a.mov(edx, SERIAL_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(end)?;
    a.mov(edx, SERIAL)?;
    a.in_(al, dx)?;
    a.cmp(al, u32::from(b'\n'))?;
    a.je(line_end)?;
    a.cmp(al, u32::from(b'\r'))?;
    a.je(line_end)?;
    a.cmp(dword_ptr(LINE_IS_EMPTY), 0)?;
    a.je(r.input)?;
    a.mov(dword_ptr(LINE_IS_EMPTY), 0)?;
    a.cmp(al, u32::from(b'v'))?;
    a.jne(r.input)?;
    a.mov(dword_ptr(LINE_IS_VERIFY), 1)?;
    a.jmp(r.input)?;

    a.set_label(&mut line_end)?;
    a.mov(dword_ptr(LINE_IS_EMPTY), 1)?;
    a.cmp(dword_ptr(LINE_IS_VERIFY), 0)?;
    a.je(r.input)?;
    a.mov(dword_ptr(LINE_IS_VERIFY), 0)?;
    a.call(r.verify)?;
    a.jmp(r.input)?;
    a.set_label(&mut end)?;
    a.ret()
}

/// ELF-64 with one loaded segment and one note: `XEN_ELFNOTE_PHYS32_ENTRY` (18), whose value is the entry.
fn elf(image: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 12 + 4 + 8;
    const IMAGE_AT: u64 = 4096;
    let mut out = Vec::new();
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable, x86-64, version 1, entry, program headers at 64, no sections, no flags.
    out.extend([2u16, 62].iter().flat_map(|n| n.to_le_bytes()));
    out.extend(1u32.to_le_bytes());
    out.extend([u64::from(BASE), 64, 0].iter().flat_map(|n| n.to_le_bytes()));
    out.extend(0u32.to_le_bytes());
    out.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    let mut segment = |kind: u32, flags: u32, numbers: [u64; 6]| {
        out.extend([kind, flags].iter().flat_map(|n| n.to_le_bytes()));
        out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    };
    let (base, bytes) = (u64::from(BASE), image.len() as u64);
    segment(1, 7, [IMAGE_AT, base, base, bytes, bytes, 4096]);
    segment(4, 4, [HEADERS, 0, 0, NOTE_BYTES, NOTE_BYTES, 4]);
    out.extend([4u32, 8, 18].iter().flat_map(|n| n.to_le_bytes()));
    out.extend_from_slice(b"Xen\0");
    out.extend(u64::from(BASE).to_le_bytes());
    out.resize(IMAGE_AT as usize, 0);
    out.extend_from_slice(image);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_elf_says_where_to_enter() {
        let image = code().unwrap();
        let file = elf(&image);
        let note = 64 + 2 * 56;
        assert_eq!(file[note..note + 16], *b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0");
        assert_eq!(file[note + 16..note + 24], u64::from(BASE).to_le_bytes());
        assert_eq!(file[4096..], image);
        let text = BEAT as usize - BASE as usize;
        assert!(image[text..].starts_with(b"godwit: beat \0"));
    }
}
