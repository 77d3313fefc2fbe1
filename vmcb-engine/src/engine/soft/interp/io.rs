//! IN, OUT, INS, OUTS (APM3). First IOPL and the TSS's permission map (APM2 12.2.4), then the host's IOPM with the exact
//! EXITINFO1 of APM2 15.10.2. A processor without a host has nothing on its ports: all ones.

use super::system::set_register;
use crate::engine::soft::core::{Core, DS, ES, RAX, RCX, RDI, RDX, RSI, Step, Stop, rflags};
use crate::engine::soft::op::{NO_SEGMENT, Op, form};
use crate::vmcb::registers::cr0;
use crate::vmcb::{ExitCode, IoInfo};

fn port(core: &Core, op: &Op) -> u16 {
    // E4-E7 have the port in an immediate byte, EC-EF and the string forms in DX.
    if op.code & 0xf8 == 0xe0 { op.immediate as u8 as u16 } else { core.gprs[RDX] as u16 }
}

/// #GP(0) unless IOPL or the TSS allows it.
fn check_permission(core: &mut Core, port: u16, size: u8) -> Step {
    let virtual_mode = core.system_flags & rflags::VM != 0;
    if core.cr0 & cr0::PE == 0 || (core.cpl <= core.iopl() && !virtual_mode) {
        return Ok(());
    }
    if !core.tr.present() || core.tr.kind() & 0xd != 9 || core.tr.limit < 0x67 {
        return core.general_protection();
    }
    let base = core.tr.base;
    let map = u32::from(core.as_supervisor(|core| core.load::<u16>(base.wrapping_add(0x66)))?);
    let at = map + u32::from(port) / 8;
    // Two bytes are always read, and both must be within the limit.
    if at + 1 > core.tr.limit {
        return core.general_protection();
    }
    let bits = core.as_supervisor(|core| core.load::<u16>(base.wrapping_add(at.into())))?;
    let wanted = ((1_u32 << size) - 1) << (port % 8);
    if u32::from(bits) & wanted != 0 {
        return core.general_protection();
    }
    Ok(())
}

fn exit(core: &mut Core, op: &Op, port: u16, input: bool, string: bool) -> Step {
    if !core.io_intercepted(port, op.size) {
        return Ok(());
    }
    let repeated = string && op.form & (form::REP | form::REPNE) != 0;
    let segment = match (string, input) {
        (false, _) => 0,
        (true, true) => ES as u8,
        (true, false) if op.segment == NO_SEGMENT => DS as u8,
        (true, false) => op.segment,
    };
    let info = IoInfo { input, string, rep: repeated, size: op.size, address_size: op.address_size, segment, port };
    let next = core.next_rip(op);
    core.exit_with(ExitCode::IOIO, info.encode(), next)
}

/// IN.
pub fn in_(core: &mut Core, op: &Op) -> Step {
    let port = port(core, op);
    check_permission(core, port, op.size)?;
    exit(core, op, port, true, false)?;
    let value = core.mmio.input(port, op.size);
    if op.size == 1 {
        core.gprs[RAX] = core.gprs[RAX] & !0xff | u64::from(value as u8);
    } else {
        set_register(core, RAX as u8, op.size, value.into());
    }
    Ok(())
}

/// OUT.
pub fn out_(core: &mut Core, op: &Op) -> Step {
    let port = port(core, op);
    check_permission(core, port, op.size)?;
    exit(core, op, port, false, false)?;
    let value = core.gprs[RAX] as u32 & (u32::MAX >> (32 - 8 * u32::from(op.size)));
    core.mmio.output(port, op.size, value);
    Ok(())
}

fn address_mask(op: &Op) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(op.address_size))
}

/// A register of address size, as the string instructions move it.
fn advance(core: &mut Core, op: &Op, register: usize, by: u64) {
    let (mask, old) = (address_mask(op), core.gprs[register]);
    let moved = old.wrapping_add(by) & mask;
    core.gprs[register] = if op.address_size == 2 { old & !mask | moved } else { moved };
}

/// One element of a string instruction is done: RCX, and whether the instruction goes on.
fn finish(core: &mut Core, op: &Op, register: usize) -> Step {
    let size = u64::from(op.size);
    let by = if core.system_flags & rflags::DF != 0 { size.wrapping_neg() } else { size };
    advance(core, op, register, by);
    if op.form & (form::REP | form::REPNE) == 0 {
        return Ok(());
    }
    advance(core, op, RCX, u64::MAX);
    if core.gprs[RCX] & address_mask(op) == 0 { Ok(()) } else { Err(Stop::Again) }
}

fn nothing_left(core: &Core, op: &Op) -> bool {
    op.form & (form::REP | form::REPNE) != 0 && core.gprs[RCX] & address_mask(op) == 0
}

fn string_address(core: &Core, op: &Op, register: usize, segment: usize) -> u64 {
    let offset = core.gprs[register] & address_mask(op);
    let based = segment as u8 != NO_SEGMENT && (!core.mode.long || segment > DS);
    let linear = offset.wrapping_add(if based { core.segments[segment].base } else { 0 });
    if core.mode.long { linear } else { linear & 0xffff_ffff }
}

/// INS: one element a tick.
pub fn ins(core: &mut Core, op: &Op) -> Step {
    let port = core.gprs[RDX] as u16;
    check_permission(core, port, op.size)?;
    if nothing_left(core, op) {
        return Ok(());
    }
    exit(core, op, port, true, true)?;
    let linear = string_address(core, op, RDI, ES);
    core.probe_write(linear, op.size.into())?;
    let value = core.mmio.input(port, op.size).to_le_bytes();
    core.write_linear(linear, &value[..op.size.into()])?;
    finish(core, op, RDI)
}

/// OUTS: one element a tick.
pub fn outs(core: &mut Core, op: &Op) -> Step {
    let port = core.gprs[RDX] as u16;
    check_permission(core, port, op.size)?;
    if nothing_left(core, op) {
        return Ok(());
    }
    exit(core, op, port, false, true)?;
    let linear = string_address(core, op, RSI, op.segment.into());
    let mut value = [0; 4];
    core.read_linear(linear, &mut value[..op.size.into()])?;
    core.mmio.output(port, op.size, u32::from_le_bytes(value));
    finish(core, op, RSI)
}
