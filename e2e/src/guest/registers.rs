//! A guest that checks its own state: every register that a move must carry holds a pattern of its own, round after round.
//!
//! In each round it fills general, vector and x87 registers with their control words, debug registers, CR2 and MSRs, spins and
//! halts under timer interrupts for as long as the round lasts, and then looks whether all of them still hold what they should.
//! What does not is printed as `BAD word N`, in the order of the list below. Timers may be late, never early, and the TSC never goes
//! back. Its lines are as those of [`super::Program`], with interrupts for writes.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::printing::Printer;
use super::{MAIN, MULTIPLIER, REGION, STACK, TABLES, VECTOR, image, read_tsc, start_apic, write_msr};

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registers {
    /// With AVX: vector registers have 256 bits, otherwise 128.
    pub avx: bool,
    /// Guest TSC frequency.
    pub tsc_hz: u64,
}

const WANT: u64 = REGION;
const HAVE: u64 = REGION + 0x1000;
/// Rounds, interrupts, findings, the timer's deadline, the last TSC, and two loop counters.
const ROUND: u64 = REGION + 0x2000;
const INTERRUPTS: u64 = ROUND + 8;
const BAD: u64 = ROUND + 16;
const DEADLINE: u64 = ROUND + 24;
const LAST: u64 = ROUND + 32;
const SPIN: u64 = ROUND + 40;
const PARTS: u64 = ROUND + 48;
/// A round is so many halts of this many milliseconds at most, with a loop of so many turns before each.
const HALTS: i32 = 5;
const HALT_MS: u64 = 10;
const TURNS: i32 = 30_000;

const GPRS: [AsmRegister64; 15] = [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15];
const XMMS: [AsmRegisterXmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];
const YMMS: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];
const DEBUG: [AsmRegisterDr; 4] = [dr0, dr1, dr2, dr3];
/// FS, GS and kernel GS bases, LSTAR, CSTAR, SYSENTER_ESP, SYSENTER_EIP: addresses. STAR and SFMASK: not.
const MSRS: [u32; 9] =
    [0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0082, 0xc000_0083, 0x175, 0x176, 0xc000_0081, 0xc000_0084];

// Word numbers: 15 general registers, 16 vector registers of four words, 8 of x87, 4 debug registers, CR2, the MSRs, MXCSR, and
// x87's control word.
const VECTORS: u64 = GPRS.len() as u64;
const X87: u64 = VECTORS + 64;
const DRS: u64 = X87 + 8;
const CR2: u64 = DRS + 4;
const MSR: u64 = CR2 + 1;
const MXCSR: u64 = MSR + MSRS.len() as u64;
const FCW: u64 = MXCSR + 1;
const WORDS: u64 = FCW + 1;

const _: () = assert!(8 * WORDS <= HAVE - WANT && 8 * WORDS <= ROUND - HAVE);

fn want(word: u64) -> AsmMemoryOperand {
    qword_ptr(WANT + 8 * word)
}

fn have(word: u64) -> AsmMemoryOperand {
    qword_ptr(HAVE + 8 * word)
}

impl Registers {
    /// Bytes of RAM that the guest needs.
    pub const MEMORY_BYTES: u64 = REGION + (4 << 20);

    /// The ELF file.
    ///
    /// # Errors
    /// The assembler refused; a bug in this file.
    pub fn elf(&self) -> Result<Vec<u8>, IcedError> {
        let (main, handler) = self.main()?;
        image(main, &[(VECTOR as u8, handler)])
    }

    /// 64-bit code, and the address of the timer's interrupt handler.
    fn main(&self) -> Result<(Vec<u8>, u64), IcedError> {
        let mut asm = CodeAssembler::new(64)?;
        let mut printer = Printer::new(&mut asm);
        let (mut again, mut handler) = (asm.create_label(), asm.create_label());
        asm.mov(rsp, STACK)?;
        asm.lidt(ptr(TABLES + 0xff0))?;
        if self.avx {
            asm.mov(rax, cr4)?;
            asm.or(eax, 1 << 18)?;
            asm.mov(cr4, rax)?;
            asm.xor(ecx, ecx)?;
            asm.xor(edx, edx)?;
            asm.mov(eax, 7u32)?;
            asm.xsetbv()?;
        }
        start_apic(&mut asm)?;
        self.arm(&mut asm)?;

        asm.set_label(&mut again)?;
        asm.inc(qword_ptr(ROUND))?;
        choose(&mut asm)?;
        self.fill(&mut asm)?;
        spin(&mut asm)?;
        self.look(&mut asm)?;
        compare(&mut asm, &mut printer)?;
        asm.mov(r12, qword_ptr(ROUND))?;
        asm.mov(r14, qword_ptr(INTERRUPTS))?;
        asm.mov(rbp, qword_ptr(BAD))?;
        printer.print_ticks(&mut asm, [r12, r14, rbp])?;
        printer.print(&mut asm, "\n")?;
        asm.jmp(again)?;

        printer.emit(&mut asm, true)?;
        asm.set_label(&mut handler)?;
        self.interrupt(&mut asm)?;
        let result = asm.assemble_options(MAIN, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        let at = result.label_ip(&handler)?;
        Ok((result.inner.code_buffer, at))
    }

    /// The timer fires so long after now. Clobbers rax, rcx, rdx.
    fn arm(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        read_tsc(asm)?;
        asm.mov(rcx, self.tsc_hz / 1000 * HALT_MS)?;
        asm.add(rax, rcx)?;
        asm.mov(qword_ptr(DEADLINE), rax)?;
        asm.mov(rdx, rax)?;
        asm.shr(rdx, 32)?;
        asm.mov(ecx, 0x6e0u32)?;
        asm.wrmsr()
    }

    fn interrupt(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        let mut in_time = asm.create_label();
        asm.push(rax)?;
        asm.push(rcx)?;
        asm.push(rdx)?;
        read_tsc(asm)?;
        asm.cmp(rax, qword_ptr(DEADLINE))?;
        asm.jae(in_time)?;
        asm.inc(qword_ptr(BAD))?;
        asm.set_label(&mut in_time)?;
        asm.inc(qword_ptr(INTERRUPTS))?;
        self.arm(asm)?;
        write_msr(asm, 0x80b, 0)?;
        asm.pop(rdx)?;
        asm.pop(rcx)?;
        asm.pop(rax)?;
        asm.iretq()
    }

    fn fill(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        for (at, msr) in (MSR..).zip(MSRS) {
            asm.mov(rax, want(at))?;
            asm.mov(rdx, rax)?;
            asm.shr(rdx, 32)?;
            asm.mov(ecx, msr)?;
            asm.wrmsr()?;
        }
        for (at, register) in (DRS..).zip(DEBUG) {
            asm.mov(rax, want(at))?;
            asm.mov(register, rax)?;
        }
        asm.mov(rax, want(CR2))?;
        asm.mov(cr2, rax)?;
        asm.ldmxcsr(dword_ptr(WANT + 8 * MXCSR))?;
        asm.fninit()?;
        asm.fldcw(word_ptr(WANT + 8 * FCW))?;
        for at in (X87..X87 + 8).rev() {
            asm.fild(want(at))?;
        }
        for n in 0..16 {
            let at = WANT + 8 * (VECTORS + 4 * n as u64);
            match self.avx {
                true => asm.vmovdqu(YMMS[n], ymmword_ptr(at))?,
                false => asm.movdqu(XMMS[n], xmmword_ptr(at))?,
            }
        }
        asm.mov(qword_ptr(PARTS), HALTS)?;
        for (at, register) in (0..).zip(GPRS) {
            asm.mov(register, want(at))?;
        }
        Ok(())
    }

    fn look(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        for (at, register) in (0..).zip(GPRS) {
            asm.mov(have(at), register)?;
        }
        for n in 0..16 {
            let at = 8 * (VECTORS + 4 * n as u64);
            match self.avx {
                true => asm.vmovdqu(ymmword_ptr(HAVE + at), YMMS[n])?,
                false => asm.movdqu(xmmword_ptr(HAVE + at), XMMS[n])?,
            }
        }
        for at in X87..X87 + 8 {
            asm.fistp(have(at))?;
        }
        asm.fnstcw(word_ptr(HAVE + 8 * FCW))?;
        asm.stmxcsr(dword_ptr(HAVE + 8 * MXCSR))?;
        for (at, register) in (DRS..).zip(DEBUG) {
            asm.mov(rax, register)?;
            asm.mov(have(at), rax)?;
        }
        asm.mov(rax, cr2)?;
        asm.mov(have(CR2), rax)?;
        for (at, msr) in (MSR..).zip(MSRS) {
            asm.mov(ecx, msr)?;
            asm.rdmsr()?;
            asm.shl(rdx, 32)?;
            asm.or(rax, rdx)?;
            asm.mov(have(at), rax)?;
        }
        if !self.avx {
            // What registers of 128 bits do not have is as it should be.
            for at in (VECTORS..X87).filter(|at| (at - VECTORS) % 4 >= 2) {
                asm.mov(rax, want(at))?;
                asm.mov(have(at), rax)?;
            }
        }
        Ok(())
    }
}

/// What every word is to be in this round.
fn choose(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = asm.create_label();
    asm.imul_3(rax, qword_ptr(ROUND), WORDS as i32 + 1)?;
    asm.mov(rdx, MULTIPLIER)?;
    asm.imul_2(rax, rdx)?;
    asm.mov(edi, WANT as u32)?;
    asm.mov(ecx, WORDS as u32)?;
    asm.set_label(&mut next)?;
    asm.add(rax, rdx)?;
    asm.mov(qword_ptr(rdi), rax)?;
    asm.add(rdi, 8)?;
    asm.dec(ecx)?;
    asm.jnz(next)?;
    let mut shape = |at: u64, mask: u64, always: u64| -> Result<(), IcedError> {
        asm.mov(rdx, mask)?;
        asm.and(rdx, want(at))?;
        asm.mov(rax, always)?;
        asm.or(rdx, rax)?;
        asm.mov(want(at), rdx)
    };
    // Addresses are canonical.
    for at in (DRS..=CR2).chain(MSR..MSR + 7) {
        shape(at, (1 << 47) - 1, 0)?;
    }
    shape(MSR + 8, u64::from(u32::MAX), 0)?;
    // All exceptions masked; the way of rounding varies.
    shape(MXCSR, 0x6000, 0x1f80)?;
    shape(FCW, 0x0c00, 0x037f)
}

/// Every register holds its word, and none is used.
fn spin(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut part, mut turn) = (asm.create_label(), asm.create_label());
    asm.sti()?;
    asm.set_label(&mut part)?;
    asm.mov(qword_ptr(SPIN), TURNS)?;
    asm.set_label(&mut turn)?;
    asm.dec(qword_ptr(SPIN))?;
    asm.jnz(turn)?;
    asm.hlt()?;
    asm.dec(qword_ptr(PARTS))?;
    asm.jnz(part)?;
    asm.cli()
}

fn compare(asm: &mut CodeAssembler, printer: &mut Printer) -> Result<(), IcedError> {
    let (mut next, mut good, mut forwards) = (asm.create_label(), asm.create_label(), asm.create_label());
    asm.xor(ebx, ebx)?;
    asm.set_label(&mut next)?;
    asm.mov(rax, qword_ptr(rbx * 8 + WANT as i32))?;
    asm.cmp(rax, qword_ptr(rbx * 8 + HAVE as i32))?;
    asm.je(good)?;
    asm.inc(qword_ptr(BAD))?;
    printer.print_with(asm, "BAD word ", rbx)?;
    printer.print(asm, "\n")?;
    asm.set_label(&mut good)?;
    asm.inc(ebx)?;
    asm.cmp(ebx, WORDS as i32)?;
    asm.jb(next)?;
    read_tsc(asm)?;
    asm.cmp(rax, qword_ptr(LAST))?;
    asm.jae(forwards)?;
    asm.inc(qword_ptr(BAD))?;
    printer.print(asm, "BAD: the TSC went back\n")?;
    asm.set_label(&mut forwards)?;
    asm.mov(qword_ptr(LAST), rax)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_fits_its_places() {
        for avx in [false, true] {
            let guest = Registers { avx, tsc_hz: 1_000_000_000 };
            let (main, handler) = guest.main().unwrap();
            assert!(MAIN + main.len() as u64 <= TABLES && (MAIN..TABLES).contains(&handler));
        }
    }
}
