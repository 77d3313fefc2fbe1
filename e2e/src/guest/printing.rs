//! What guests have in common that print: texts and numbers on the 8250.
//!
//! It refuses to know what is said.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::UART;

/// Subroutines that print, and the texts that they print.
pub struct Printer {
    /// al: one byte to the console. Clobbers rax, rdx.
    pub byte: CodeLabel,
    /// rsi, ecx: bytes to the console.
    text: CodeLabel,
    /// rax: decimal to the console.
    number: CodeLabel,
    texts: Vec<(CodeLabel, Vec<u8>)>,
}

impl Printer {
    /// Subroutines that are not emitted yet.
    pub fn new(asm: &mut CodeAssembler) -> Self {
        Self { byte: asm.create_label(), text: asm.create_label(), number: asm.create_label(), texts: Vec::new() }
    }

    /// Emits a call that prints a text.
    ///
    /// # Errors
    /// The assembler refused.
    pub fn print(&mut self, asm: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
        let label = asm.create_label();
        asm.lea(rsi, ptr(label))?;
        asm.mov(ecx, text.len() as u32)?;
        asm.call(self.text)?;
        self.texts.push((label, text.as_bytes().to_vec()));
        Ok(())
    }

    /// Emits calls that print a text and a number behind it.
    ///
    /// # Errors
    /// The assembler refused.
    pub fn print_with(&mut self, asm: &mut CodeAssembler, text: &str, number: AsmRegister64) -> Result<(), IcedError> {
        self.print(asm, text)?;
        asm.mov(rax, number)?;
        asm.call(self.number)
    }

    /// Emits calls that print `tick N writes W bad B`, without the line's end.
    ///
    /// # Errors
    /// The assembler refused.
    pub fn print_ticks(
        &mut self,
        asm: &mut CodeAssembler,
        [ticks, writes, bad]: [AsmRegister64; 3],
    ) -> Result<(), IcedError> {
        self.print_with(asm, "tick ", ticks)?;
        self.print_with(asm, " writes ", writes)?;
        self.print_with(asm, " bad ", bad)
    }

    /// Emits the subroutines and the texts. `waits`: for each byte until the transmitter is empty; whoever does not relies on a
    /// host that takes everything, and spares an exit for each byte.
    ///
    /// # Errors
    /// The assembler refused.
    pub fn emit(&mut self, asm: &mut CodeAssembler, waits: bool) -> Result<(), IcedError> {
        let (mut wait, mut digit, mut out) = (asm.create_label(), asm.create_label(), asm.create_label());
        asm.set_label(&mut self.byte)?;
        if waits {
            asm.push(rax)?;
            asm.mov(edx, UART + 5)?;
            asm.set_label(&mut wait)?;
            asm.in_(al, dx)?;
            asm.test(al, 0x20)?;
            asm.jz(wait)?;
            asm.pop(rax)?;
        }
        asm.mov(edx, UART)?;
        asm.out(dx, al)?;
        asm.ret()?;

        asm.set_label(&mut self.text)?;
        asm.mov(al, byte_ptr(rsi))?;
        asm.call(self.byte)?;
        asm.inc(rsi)?;
        asm.dec(ecx)?;
        asm.jnz(self.text)?;
        asm.ret()?;

        asm.set_label(&mut self.number)?;
        asm.mov(r8d, 10u32)?;
        asm.xor(ecx, ecx)?;
        asm.set_label(&mut digit)?;
        asm.xor(edx, edx)?;
        asm.div(r8)?;
        asm.push(rdx)?;
        asm.inc(ecx)?;
        asm.test(rax, rax)?;
        asm.jnz(digit)?;
        asm.set_label(&mut out)?;
        asm.pop(rax)?;
        asm.add(al, i32::from(b'0'))?;
        asm.call(self.byte)?;
        asm.dec(ecx)?;
        asm.jnz(out)?;
        asm.ret()?;

        for (label, text) in &mut self.texts {
            asm.set_label(label)?;
            asm.db(text)?;
        }
        asm.nop()
    }
}
