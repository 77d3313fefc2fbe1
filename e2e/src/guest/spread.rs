//! A guest that has little and has it far apart: blocks at given places of its RAM, which it checks and rewrites at each tick.
//!
//! Whatever of a large guest's RAM a move puts elsewhere, loses or sets back shows as `bad` in its lines, which are as those of
//! [`super::Program`]. It runs at CPL 3, above the kernel of [`super::user`].

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::MULTIPLIER;
use super::printing::Printer;
use super::user::{above_kernel, sleep};

/// What the guest does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spread {
    /// Guest-physical addresses of the blocks, as the guest sees them; a multiple of 8, below 10 GiB.
    pub places: Vec<u64>,
    /// Bytes of each; a multiple of 8.
    pub block_bytes: u64,
    /// Milliseconds of guest time between two lines.
    pub tick_ms: u64,
    /// Guest TSC frequency.
    pub tsc_hz: u64,
}

impl Spread {
    /// The ELF file.
    ///
    /// # Errors
    /// The assembler refused; a bug in this file.
    pub fn elf(&self) -> Result<Vec<u8>, IcedError> {
        above_kernel(|asm| self.code(asm))
    }

    /// r9 how often blocks were rewritten, r12 ticks, rbp bad blocks.
    fn code(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        let mut printer = Printer::new(asm);
        let mut again = asm.create_label();
        asm.xor(r9d, r9d)?;
        asm.xor(r12d, r12d)?;
        asm.xor(ebp, ebp)?;
        self.rewrite(asm)?;
        asm.set_label(&mut again)?;
        asm.mov(rsi, self.tsc_hz / 1000 * self.tick_ms)?;
        sleep(asm)?;
        self.check(asm)?;
        asm.inc(r9)?;
        self.rewrite(asm)?;
        asm.inc(r12)?;
        printer.print_ticks(asm, [r12, r9, rbp])?;
        printer.print(asm, "\n")?;
        asm.jmp(again)?;
        printer.emit(asm, false)
    }

    /// rdi: the block, rax its first word, rdx what is added from word to word, rcx words.
    fn begin(&self, asm: &mut CodeAssembler, place: u64) -> Result<(), IcedError> {
        asm.mov(rdi, place)?;
        asm.lea(rax, ptr(rdi + r9 + 1))?;
        asm.mov(rdx, MULTIPLIER)?;
        asm.imul_2(rax, rdx)?;
        asm.mov(rcx, self.block_bytes / 8)
    }

    fn rewrite(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        for place in &self.places {
            let mut word = asm.create_label();
            self.begin(asm, *place)?;
            asm.set_label(&mut word)?;
            asm.mov(qword_ptr(rdi), rax)?;
            asm.add(rax, rdx)?;
            asm.add(rdi, 8)?;
            asm.dec(rcx)?;
            asm.jnz(word)?;
        }
        Ok(())
    }

    fn check(&self, asm: &mut CodeAssembler) -> Result<(), IcedError> {
        for place in &self.places {
            let (mut word, mut bad, mut over) = (asm.create_label(), asm.create_label(), asm.create_label());
            self.begin(asm, *place)?;
            asm.set_label(&mut word)?;
            asm.cmp(qword_ptr(rdi), rax)?;
            asm.jne(bad)?;
            asm.add(rax, rdx)?;
            asm.add(rdi, 8)?;
            asm.dec(rcx)?;
            asm.jnz(word)?;
            asm.jmp(over)?;
            asm.set_label(&mut bad)?;
            asm.inc(rbp)?;
            asm.set_label(&mut over)?;
            asm.nop()?;
        }
        Ok(())
    }
}
