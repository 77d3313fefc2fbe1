//! Operands of SSE and MMX instructions, the checks that come before each, and what raised flags lead to.

use super::native;
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::op::Op;

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// Checks that come before every SSE instruction (APM2 11.4): #UD, then #NM.
#[inline(always)]
pub fn sse_ready(core: &mut Core) -> Step {
    if core.cr0 & (CR0_EM | CR0_TS) == 0 && core.cr4 & CR4_OSFXSR != 0 {
        return Ok(());
    }
    not_ready(core, CR4_OSFXSR)
}

/// Checks that come before every MMX instruction: #UD, #NM, then a pending x87 exception.
#[inline(always)]
pub fn mmx_ready(core: &mut Core) -> Step {
    if core.cr0 & (CR0_EM | CR0_TS) != 0 {
        return not_ready(core, 0);
    }
    if core.fpu.status & 0x80 != 0 {
        return core.raise(16);
    }
    Ok(())
}

#[cold]
fn not_ready(core: &mut Core, needed_cr4: u64) -> Step {
    if core.cr0 & CR0_EM != 0 || core.cr4 & needed_cr4 != needed_cr4 {
        return core.undefined();
    }
    core.raise(7)
}

/// XMM register of ModRM.reg.
#[inline(always)]
pub fn xmm_reg(core: &Core, op: &Op) -> u128 {
    core.fpu.xmm[usize::from(op.reg & 15)]
}

/// Sets the XMM register of ModRM.reg.
#[inline(always)]
pub fn set_xmm_reg(core: &mut Core, op: &Op, value: u128) {
    core.fpu.xmm[usize::from(op.reg & 15)] = value;
}

/// Linear address of a 16-byte operand that must be aligned: #GP(0) otherwise.
#[inline(always)]
pub fn aligned(core: &mut Core, op: &Op) -> Step<u64> {
    let linear = op.linear(core);
    if linear & 15 != 0 { core.general_protection() } else { Ok(linear) }
}

/// XMM register of ModRM.rm, or 16 aligned bytes.
#[inline(always)]
pub fn source128(core: &mut Core, op: &Op) -> Step<u128> {
    if op.is_memory() {
        let linear = aligned(core, op)?;
        return core.load(linear);
    }
    Ok(core.fpu.xmm[usize::from(op.rm & 15)])
}

/// XMM register of ModRM.rm, or 16 bytes anywhere.
#[inline(always)]
pub fn source128_unaligned(core: &mut Core, op: &Op) -> Step<u128> {
    if op.is_memory() {
        return core.load(op.linear(core));
    }
    Ok(core.fpu.xmm[usize::from(op.rm & 15)])
}

/// XMM register of ModRM.rm whole, or 8 bytes zero-extended.
#[inline(always)]
pub fn source64(core: &mut Core, op: &Op) -> Step<u128> {
    if op.is_memory() {
        return core.load::<u64>(op.linear(core)).map(u128::from);
    }
    Ok(core.fpu.xmm[usize::from(op.rm & 15)])
}

/// XMM register of ModRM.rm whole, or 4 bytes zero-extended.
#[inline(always)]
pub fn source32(core: &mut Core, op: &Op) -> Step<u128> {
    if op.is_memory() {
        return core.load::<u32>(op.linear(core)).map(u128::from);
    }
    Ok(core.fpu.xmm[usize::from(op.rm & 15)])
}

/// XMM register of ModRM.rm whole, or 2 bytes zero-extended.
#[inline(always)]
pub fn source16(core: &mut Core, op: &Op) -> Step<u128> {
    if op.is_memory() {
        return core.load::<u16>(op.linear(core)).map(u128::from);
    }
    Ok(core.fpu.xmm[usize::from(op.rm & 15)])
}

/// General register or memory of ModRM.rm: 8 bytes with REX.W, else 4 zero-extended.
#[inline(always)]
pub fn source_general(core: &mut Core, op: &Op, wide: bool) -> Step<u64> {
    match (op.is_memory(), wide) {
        (true, true) => core.load::<u64>(op.linear(core)),
        (true, false) => core.load::<u32>(op.linear(core)).map(u64::from),
        (false, true) => Ok(core.gprs[usize::from(op.rm & 15)]),
        (false, false) => Ok(core.gprs[usize::from(op.rm & 15)] & 0xffff_ffff),
    }
}

/// MMX register of ModRM.rm, or 8 bytes.
#[inline(always)]
pub fn source_mmx(core: &mut Core, op: &Op) -> Step<u64> {
    if op.is_memory() {
        return core.load(op.linear(core));
    }
    Ok(core.fpu.registers[usize::from(op.rm & 7)].0)
}

/// Every MMX instruction makes all registers valid and the stack start at register 0 (APM1 5.12).
#[inline(always)]
pub fn enter_mmx(core: &mut Core) {
    core.fpu.tags = 0xff;
    core.fpu.status &= !0x3800;
}

/// Sets an MMX register; its exponent becomes all ones.
#[inline(always)]
pub fn set_mmx(core: &mut Core, register: u8, value: u64) {
    enter_mmx(core);
    core.fpu.registers[usize::from(register & 7)] = (value, 0xffff);
}

/// The MXCSR to run an operation with: while the guest's modes and masks are those of Rust code, the host's MXCSR gathers
/// what its operations raise, and the guest's is told of it by [`Core::settle_mxcsr`].
#[inline(always)]
pub fn control(core: &mut Core) -> u32 {
    if core.gathers_flags { native::GATHERING } else { begin_gathering(core) }
}

#[cold]
#[inline(never)]
fn begin_gathering(core: &mut Core) -> u32 {
    if !native::can_gather(core.fpu.mxcsr) {
        return core.fpu.mxcsr;
    }
    native::gather();
    core.gathers_flags = true;
    native::GATHERING
}

impl Core {
    /// Makes the guest's MXCSR whole: before anything but [`control`] looks at it, and before other code of this thread
    /// may compute with floating point.
    #[inline]
    pub fn settle_mxcsr(&mut self) {
        if std::mem::take(&mut self.gathers_flags) {
            self.fpu.mxcsr |= native::gathered();
        }
    }
}

/// Merges raised flags into MXCSR; an unmasked one is #XM (or #UD without CR4.OSXMMEXCPT), and the instruction must not
/// write. Of an unmasked pre-computation exception, no post-computation flag is seen (APM1 4.10.2).
#[inline(always)]
pub fn accrue(core: &mut Core, raised: u32) -> Step {
    let unmasked = raised & !(core.fpu.mxcsr >> 7) & 0x3f;
    if unmasked == 0 {
        core.fpu.mxcsr |= raised;
        return Ok(());
    }
    simd_exception(core, raised, unmasked)
}

#[cold]
fn simd_exception(core: &mut Core, raised: u32, unmasked: u32) -> Step {
    core.fpu.mxcsr |= if unmasked & 7 != 0 { raised & 7 } else { raised };
    if core.cr4 & CR4_OSXMMEXCPT == 0 { core.undefined() } else { core.raise(19) }
}
