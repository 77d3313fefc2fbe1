//! Group 15: FXSAVE, FXRSTOR, LDMXCSR, STMXCSR, fences, CLFLUSH; and the FXSAVE image that both they and the CPU state use
//! (APM2 11.4.4).

use super::operand::{aligned, sse_ready};
use super::{Row, Selector, row};
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::fpu::Fpu;
use crate::engine::soft::op::{Op, form};

/// MXCSR bits that exist: all sixteen.
const MXCSR_MASK: u32 = 0xffff;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const EFER_FFXSR: u64 = 1 << 14;

impl Fpu {
    /// The FXSAVE image, 64-bit format, bytes 0 to 415. x87 registers lie in stack order.
    pub fn to_fxsave(&self) -> [u8; 416] {
        let mut image = [0; 416];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.control.to_le_bytes());
        put(2, &self.status.to_le_bytes());
        put(4, &[self.tags]);
        put(6, &self.opcode.to_le_bytes());
        put(8, &self.instruction_pointer.to_le_bytes());
        put(16, &self.data_pointer.to_le_bytes());
        put(24, &self.mxcsr.to_le_bytes());
        put(28, &MXCSR_MASK.to_le_bytes());
        let top = usize::from(self.status >> 11 & 7);
        for i in 0..8 {
            let (significand, exponent) = self.registers[(top + i) & 7];
            put(32 + 16 * i, &significand.to_le_bytes());
            put(40 + 16 * i, &exponent.to_le_bytes());
        }
        for (i, xmm) in self.xmm.iter().enumerate() {
            put(160 + 16 * i, &xmm.to_le_bytes());
        }
        image
    }

    /// From an FXSAVE image. MXCSR's bits are the caller's to check.
    pub fn from_fxsave(image: &[u8; 416]) -> Self {
        let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let quad = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let status = half(2);
        let top = usize::from(status >> 11 & 7);
        let mut registers = [(0, 0); 8];
        for i in 0..8 {
            registers[(top + i) & 7] = (quad(32 + 16 * i), half(40 + 16 * i));
        }
        let mut xmm = [0; 16];
        for (i, register) in xmm.iter_mut().enumerate() {
            *register = u128::from(quad(160 + 16 * i)) | u128::from(quad(168 + 16 * i)) << 64;
        }
        Self {
            registers,
            control: half(0) & 0x1f7f | 0x40,
            status,
            tags: image[4],
            opcode: half(6) & 0x7ff,
            instruction_pointer: quad(8),
            data_pointer: quad(16),
            xmm,
            mxcsr: word(24),
        }
    }
}

fn fx_ready(core: &mut Core) -> Step {
    match core.cr0 & (CR0_EM | CR0_TS) {
        0 => Ok(()),
        em if em & CR0_EM != 0 => core.undefined(),
        _ => core.raise(7),
    }
}

/// Bytes of the image that are used: without CR4.OSFXSR only x87, outside 64-bit mode only XMM0-7; with EFER.FFXSR at CPL 0
/// in 64-bit mode no XMM.
fn image_bytes(core: &Core) -> usize {
    let fast = core.efer & EFER_FFXSR != 0 && core.mode.long && core.cpl == 0;
    match (core.cr4 & CR4_OSFXSR != 0 && !fast, core.mode.long) {
        (false, _) => 160,
        (true, false) => 288,
        (true, true) => 416,
    }
}

fn save(core: &mut Core, op: &Op) -> Step {
    fx_ready(core)?;
    let linear = aligned(core, op)?;
    core.settle_mxcsr();
    let mut image = core.fpu.to_fxsave();
    if !op.has(form::WIDE) {
        // 32-bit form: offset and selector; selectors are not kept (AMD saves zero).
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    // AMD saves the pointers only while an unmasked exception is pending (APM2 11.4.4.3).
    if core.fpu.status & 0x80 == 0 {
        image[6..24].fill(0);
    }
    let bytes = image_bytes(core);
    core.probe_write(linear, bytes)?;
    for (i, chunk) in image[..bytes].chunks_exact(8).enumerate() {
        core.store(linear + 8 * i as u64, u64::from_le_bytes(chunk.try_into().expect("chunks of 8")))?;
    }
    Ok(())
}

fn restore(core: &mut Core, op: &Op) -> Step {
    fx_ready(core)?;
    let linear = aligned(core, op)?;
    let mut image = core.fpu.to_fxsave();
    let pointers: [u8; 18] = image[6..24].try_into().expect("18 bytes");
    let bytes = image_bytes(core);
    let mut read = [0; 416];
    for (i, chunk) in read[..bytes].chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&core.load::<u64>(linear + 8 * i as u64)?.to_le_bytes());
    }
    let mxcsr = u32::from_le_bytes([read[24], read[25], read[26], read[27]]);
    let with_sse = core.cr4 & CR4_OSFXSR != 0;
    if with_sse && mxcsr & !MXCSR_MASK != 0 {
        return core.general_protection();
    }
    core.settle_mxcsr();
    let kept = core.fpu.mxcsr;
    image[..bytes].copy_from_slice(&read[..bytes]);
    if !op.has(form::WIDE) {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    if u16::from_le_bytes([image[2], image[3]]) & 0x80 == 0 {
        image[6..24].copy_from_slice(&pointers);
    }
    core.fpu = Fpu::from_fxsave(&image);
    if !with_sse {
        core.fpu.mxcsr = kept;
    }
    Ok(())
}

fn load_mxcsr(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    let value: u32 = core.load(op.linear(core))?;
    if value & !MXCSR_MASK != 0 {
        return core.general_protection();
    }
    core.settle_mxcsr();
    core.fpu.mxcsr = value;
    Ok(())
}

fn store_mxcsr(core: &mut Core, op: &Op) -> Step {
    sse_ready(core)?;
    core.settle_mxcsr();
    core.store(op.linear(core), core.fpu.mxcsr)
}

fn fence(_: &mut Core, _: &Op) -> Step {
    Ok(())
}

/// CLFLUSH reads the line as far as faults go.
fn flush_line(core: &mut Core, op: &Op) -> Step {
    core.load::<u8>(op.linear(core)).map(|_| ())
}

/// The instruction of group 15 that a selector names.
pub fn lookup(s: Selector) -> Option<Row> {
    if s.map != 1 || s.opcode != 0xae || s.prefix != 0 {
        return None;
    }
    match (s.memory, s.reg) {
        (true, 0) => row(save),
        (true, 1) => row(restore),
        (true, 2) => row(load_mxcsr),
        (true, 3) => row(store_mxcsr),
        (true, 7) => row(flush_line),
        (false, 5..=7) => row(fence),
        _ => None,
    }
}
