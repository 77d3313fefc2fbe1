//! Small bare-metal loops that measure one kind of instruction each: prints `start`, runs a counted loop, prints `done`.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::bare;
use crate::guest::user::{above_kernel, sleep};

/// How long a loop that is over sleeps at once.
const PAUSE_TICKS: u64 = 100_000_000;

/// Which kind of instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loop {
    /// Adds, shifts, compares on registers.
    Int,
    /// Loads and stores over 1 MiB.
    Mem,
    /// Data-dependent conditional branches, calls and returns.
    Branch,
    /// Packed integer and scalar double arithmetic.
    Sse,
}

impl Loop {
    /// All, with their names in the benchmark's contract.
    pub const ALL: [(&'static str, Loop); 4] =
        [("int", Loop::Int), ("mem", Loop::Mem), ("branch", Loop::Branch), ("sse", Loop::Sse)];

    /// An ELF with a PVH note that runs the loop `iterations` times.
    ///
    /// # Errors
    /// The assembler refused; a bug in this file.
    pub fn elf(self, iterations: u64) -> Result<Vec<u8>, IcedError> {
        bare(|asm| {
            // SSE on: CR0.MP, not EM; CR4.OSFXSR and OSXMMEXCPT.
            asm.mov(rdx, cr4)?;
            asm.or(rdx, 0x600)?;
            asm.mov(cr4, rdx)?;
            self.counted(asm, iterations)?;
            let mut stop = asm.create_label();
            asm.set_label(&mut stop)?;
            asm.cli()?;
            asm.hlt()?;
            asm.jmp(stop)
        })
    }

    /// The same at CPL 3, where it waits for ever at the end.
    ///
    /// # Errors
    /// As [`Loop::elf`].
    pub fn user_elf(self, iterations: u64) -> Result<Vec<u8>, IcedError> {
        above_kernel(|asm| {
            self.counted(asm, iterations)?;
            let mut stop = asm.create_label();
            asm.set_label(&mut stop)?;
            asm.mov(rsi, PAUSE_TICKS)?;
            sleep(asm)?;
            asm.jmp(stop)
        })
    }

    fn counted(self, asm: &mut CodeAssembler, iterations: u64) -> Result<(), IcedError> {
        text(asm, "start\n")?;
        asm.mov(rcx, iterations)?;
        asm.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
        asm.mov(rdi, 0x40_0000u64)?;
        asm.xor(ebx, ebx)?;
        asm.xor(esi, esi)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        match self {
            Loop::Int => int(asm)?,
            Loop::Mem => mem(asm)?,
            Loop::Branch => branch(asm)?,
            Loop::Sse => sse(asm)?,
        }
        asm.dec(rcx)?;
        asm.jnz(again)?;
        text(asm, "done\n")
    }
}

fn text(asm: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    asm.mov(edx, 0x3f8u32)?;
    for byte in text.bytes() {
        asm.mov(al, u32::from(byte))?;
        asm.out(dx, al)?;
    }
    Ok(())
}

fn int(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.add(rbx, rax)?;
    asm.mov(rdx, rbx)?;
    asm.shr(rdx, 17)?;
    asm.xor(rbx, rdx)?;
    asm.lea(rsi, ptr(rsi + rbx * 2 + 7))?;
    asm.sub(rsi, rdx)?;
    asm.and(esi, 0x7fff_ffff)?;
    asm.cmp(rsi, rbx)
}

fn mem(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.add(rbx, 0x1238)?;
    asm.and(ebx, 0xf_fff8)?;
    asm.mov(rdx, qword_ptr(rdi + rbx))?;
    asm.add(rdx, rcx)?;
    asm.mov(qword_ptr(rdi + rbx), rdx)?;
    asm.movzx(esi, byte_ptr(rdi + rbx + 3))?;
    asm.mov(dword_ptr(rdi + rsi * 4), edx)?;
    asm.add(rsi, qword_ptr(rdi + rsi * 8))
}

fn branch(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut odd, mut joined, mut over, mut leaf) =
        (asm.create_label(), asm.create_label(), asm.create_label(), asm.create_label());
    asm.imul_3(rbx, rbx, 1_664_525)?;
    asm.add(rbx, 1_013_904_223)?;
    asm.bt(ebx, 29)?;
    asm.jc(odd)?;
    asm.call(leaf)?;
    asm.jmp(joined)?;
    asm.set_label(&mut odd)?;
    asm.add(rsi, 3)?;
    asm.set_label(&mut joined)?;
    asm.test(ebx, 0x40_0000)?;
    asm.jz(over)?;
    asm.inc(rsi)?;
    asm.jmp(over)?;
    asm.set_label(&mut leaf)?;
    asm.add(rsi, rbx)?;
    asm.ret()?;
    asm.set_label(&mut over)?;
    asm.nop()
}

fn sse(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.movq(xmm0, rcx)?;
    asm.punpcklqdq(xmm0, xmm0)?;
    asm.paddd(xmm1, xmm0)?;
    asm.pxor(xmm2, xmm1)?;
    asm.pshufd(xmm3, xmm2, 0x1b)?;
    asm.cvtsi2sd(xmm4, rcx)?;
    asm.addsd(xmm5, xmm4)?;
    asm.mulsd(xmm4, xmm4)?;
    asm.movdqu(xmmword_ptr(rdi), xmm3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_assemble() {
        for (name, kind) in Loop::ALL {
            assert!(kind.elf(1000).is_ok() && kind.user_elf(1000).is_ok(), "{name}");
        }
    }
}
