//! The register stack, exceptions and checks of x87 (APM1 6.2, 6.8; APM2 8.4).

use super::native::F80;
use crate::engine::soft::core::{Core, Step};
use crate::engine::soft::op::Op;

/// Status word bits.
pub mod status {
    /// Invalid operation.
    pub const IE: u16 = 1;
    /// Stack fault.
    pub const SF: u16 = 64;
    /// An unmasked exception is pending.
    pub const ES: u16 = 128;
    /// Condition 0.
    pub const C0: u16 = 1 << 8;
    /// Condition 1.
    pub const C1: u16 = 1 << 9;
    /// Condition 2.
    pub const C2: u16 = 1 << 10;
    /// Condition 3.
    pub const C3: u16 = 1 << 14;
    /// Busy, a copy of ES.
    pub const B: u16 = 1 << 15;
}

/// What masked invalid operations give.
pub const INDEFINITE: F80 = (0xc000_0000_0000_0000, 0xffff);
const CR0_EM_TS: u64 = 0b1100;

/// Checks before an instruction that does not wait for exceptions: #NM.
pub fn ready_no_wait(core: &mut Core) -> Step {
    if core.cr0 & CR0_EM_TS != 0 { core.raise(7) } else { Ok(()) }
}

/// Checks before every other: #NM, then a pending exception is #MF.
pub fn ready(core: &mut Core) -> Step {
    ready_no_wait(core)?;
    if core.fpu.status & status::ES != 0 { core.raise(16) } else { Ok(()) }
}

/// As [`ready`], and remembers the instruction (and its operand) for FNSTENV.
pub fn begin(core: &mut Core, op: &Op) -> Step {
    ready(core)?;
    core.fpu.instruction_pointer = core.op_rip(op);
    if op.is_memory() {
        core.fpu.data_pointer = op.linear(core);
    }
    Ok(())
}

fn top(core: &Core) -> u8 {
    (core.fpu.status >> 11 & 7) as u8
}

fn set_top(core: &mut Core, top: u8) {
    core.fpu.status = core.fpu.status & !0x3800 | u16::from(top & 7) << 11;
}

/// Physical number of ST(i).
pub fn physical(core: &Core, i: u8) -> u8 {
    top(core).wrapping_add(i) & 7
}

/// ST(i), if it is not empty.
pub fn get(core: &Core, i: u8) -> Option<F80> {
    let register = physical(core, i);
    (core.fpu.tags >> register & 1 != 0).then(|| core.fpu.registers[usize::from(register)])
}

/// Sets ST(i), which becomes valid.
pub fn set(core: &mut Core, i: u8, value: F80) {
    let register = physical(core, i);
    core.fpu.registers[usize::from(register)] = value;
    core.fpu.tags |= 1 << register;
}

/// Empties ST(i).
pub fn free(core: &mut Core, i: u8) {
    core.fpu.tags &= !(1 << physical(core, i));
}

/// Pops: ST(0) becomes empty, the next is ST(0).
pub fn pop(core: &mut Core) {
    free(core, 0);
    rotate(core, 1);
}

/// Moves the top of the stack.
pub fn rotate(core: &mut Core, by: u8) {
    let next = top(core).wrapping_add(by);
    set_top(core, next);
}

/// Merges exception flags, C1 and, where `conditions` says so, other condition codes of a host status word. Returns whether
/// a result may be written: not after an unmasked exception that comes before the computation.
pub fn accrue(core: &mut Core, host: u16, conditions: u16) -> bool {
    let kept = core.fpu.status & !(conditions | status::C1);
    core.fpu.status = kept | host & (0x7f | conditions | status::C1);
    let unmasked = core.fpu.status & !core.fpu.control & 0x3f;
    if unmasked != 0 {
        core.fpu.status |= status::ES | status::B;
    }
    host & !core.fpu.control & 0x07 == 0
}

/// Stack underflow: an empty register was used. Returns whether the masked answer may be written.
pub fn underflow(core: &mut Core) -> bool {
    accrue(core, status::IE | status::SF, 0)
}

/// Stack overflow: a push onto a register that is not empty.
fn overflow(core: &mut Core) -> bool {
    accrue(core, status::IE | status::SF | status::C1, 0)
}

/// Pushes a result with the status it came with.
pub fn push(core: &mut Core, value: F80, host: u16) {
    if core.fpu.tags >> physical(core, 7) & 1 != 0 {
        if overflow(core) {
            rotate(core, 7);
            set(core, 0, INDEFINITE);
        }
    } else if accrue(core, host, 0) {
        rotate(core, 7);
        set(core, 0, value);
    }
}

/// After control, status or tags were loaded: ES follows from what is unmasked.
pub fn refresh_summary(core: &mut Core) {
    let pending = core.fpu.status & !core.fpu.control & 0x3f != 0;
    core.fpu.status = core.fpu.status & !(status::ES | status::B) | if pending { status::ES | status::B } else { 0 };
}
