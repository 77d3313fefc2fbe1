//! x87 control: environment, state, and instructions that move no numbers.

use super::stack::{free, get, physical, ready, ready_no_wait, refresh_summary, rotate, set, status, underflow};
use super::{arithmetic, native};
use crate::engine::soft::core::{Core, RAX, Step};
use crate::engine::soft::op::Op;

/// FNINIT.
pub fn initialise(core: &mut Core, _: &Op) -> Step {
    ready_no_wait(core)?;
    reset(core);
    Ok(())
}

fn reset(core: &mut Core) {
    let fpu = &mut core.fpu;
    (fpu.control, fpu.status, fpu.tags) = (0x037f, 0, 0);
    (fpu.opcode, fpu.instruction_pointer, fpu.data_pointer) = (0, 0, 0);
}

/// FNCLEX.
pub fn clear_exceptions(core: &mut Core, _: &Op) -> Step {
    ready_no_wait(core)?;
    core.fpu.status &= !(0xff | status::B);
    Ok(())
}

/// WAIT (9B): #NM only if both CR0.MP and CR0.TS.
pub fn wait(core: &mut Core, _: &Op) -> Step {
    if core.cr0 & 0b1010 == 0b1010 {
        return core.raise(7);
    }
    if core.fpu.status & status::ES != 0 { core.raise(16) } else { Ok(()) }
}

/// FLDCW.
pub fn load_control(core: &mut Core, op: &Op) -> Step {
    ready(core)?;
    core.fpu.control = core.load::<u16>(op.linear(core))? & 0x1f7f | 0x40;
    refresh_summary(core);
    Ok(())
}

/// FNSTCW.
pub fn store_control(core: &mut Core, op: &Op) -> Step {
    ready_no_wait(core)?;
    core.store(op.linear(core), core.fpu.control)
}

/// FNSTSW m16.
pub fn store_status(core: &mut Core, op: &Op) -> Step {
    ready_no_wait(core)?;
    core.store(op.linear(core), core.fpu.status)
}

/// FNSTSW AX.
pub fn store_status_ax(core: &mut Core, _: &Op) -> Step {
    ready_no_wait(core)?;
    core.gprs[RAX] = core.gprs[RAX] & !0xffff | u64::from(core.fpu.status);
    Ok(())
}

/// FFREE (and FFREEP).
pub fn free_register(core: &mut Core, op: &Op) -> Step {
    ready(core)?;
    free(core, op.rm & 7);
    if op.code as u8 == 0xdf {
        super::stack::pop(core);
    }
    Ok(())
}

/// FINCSTP.
pub fn increment_top(core: &mut Core, _: &Op) -> Step {
    ready(core)?;
    core.fpu.status &= !status::C1;
    rotate(core, 1);
    Ok(())
}

/// FDECSTP.
pub fn decrement_top(core: &mut Core, _: &Op) -> Step {
    ready(core)?;
    core.fpu.status &= !status::C1;
    rotate(core, 7);
    Ok(())
}

/// FNOP.
pub fn nothing(core: &mut Core, _: &Op) -> Step {
    ready(core)
}

/// FXCH.
pub fn exchange(core: &mut Core, op: &Op) -> Step {
    super::stack::begin(core, op)?;
    let i = op.rm & 7;
    let (a, b) = (get(core, 0), get(core, i));
    if (a.is_none() || b.is_none()) && !underflow(core) {
        return Ok(());
    }
    if a.is_some() && b.is_some() {
        core.fpu.status &= !status::C1;
    }
    set(core, 0, b.unwrap_or(super::stack::INDEFINITE));
    set(core, i, a.unwrap_or(super::stack::INDEFINITE));
    Ok(())
}

/// FCMOVcc: the condition is CF, ZF, CF or ZF, PF; negated for DB.
pub fn conditional_move(core: &mut Core, op: &Op) -> Step {
    super::stack::begin(core, op)?;
    let flags = core.flags;
    let condition = match op.reg & 3 {
        0 => flags.cf(),
        1 => flags.zf(),
        2 => flags.cf() || flags.zf(),
        _ => flags.pf(),
    };
    match (get(core, 0), get(core, op.rm & 7)) {
        (Some(_), Some(value)) => {
            core.fpu.status &= !status::C1;
            if condition != (op.code as u8 == 0xdb) {
                set(core, 0, value);
            }
        }
        _ => {
            if underflow(core) {
                set(core, 0, super::stack::INDEFINITE);
            }
        }
    }
    Ok(())
}

/// FXAM.
pub fn examine(core: &mut Core, op: &Op) -> Step {
    super::stack::begin(core, op)?;
    let register = core.fpu.registers[usize::from(physical(core, 0))];
    let conditions = match get(core, 0) {
        Some(value) => native::examine(value),
        None => status::C3 | status::C0 | if register.1 >> 15 != 0 { status::C1 } else { 0 },
    };
    core.fpu.status = core.fpu.status & !0x4700 | conditions;
    Ok(())
}

/// FTST.
pub fn test(core: &mut Core, op: &Op) -> Step {
    super::stack::begin(core, op)?;
    arithmetic::compare_with(core, 0, |a, control| Some(native::compare(a, (0, 0), false, control)));
    Ok(())
}

/// FCHS, FABS: no exception but underflow.
pub fn change_sign(core: &mut Core, op: &Op) -> Step {
    super::stack::begin(core, op)?;
    arithmetic::unary(core, 0, |(significand, exponent), _| ((significand, exponent ^ 0x8000), 0));
    Ok(())
}

/// See [`change_sign`].
pub fn absolute(core: &mut Core, op: &Op) -> Step {
    super::stack::begin(core, op)?;
    arithmetic::unary(core, 0, |(significand, exponent), _| ((significand, exponent & 0x7fff), 0));
    Ok(())
}

/// The 14-byte environment: an operand size of 16 bits.
fn is_short(op: &Op) -> bool {
    op.size == 2
}

/// The full tag word: 0 valid, 1 zero, 2 special, 3 empty.
fn tag_word(core: &Core) -> u16 {
    (0..8).fold(0, |word, i| {
        let (significand, exponent) = core.fpu.registers[i];
        let tag = match (core.fpu.tags >> i & 1, exponent & 0x7fff, significand) {
            (0, ..) => 3,
            (_, 0, 0) => 1,
            (_, 0 | 0x7fff, _) => 2,
            (_, _, s) if s >> 63 == 0 => 2,
            _ => 0,
        };
        word | tag << (2 * i)
    })
}

fn environment(core: &Core, short: bool) -> ([u32; 7], u64) {
    let fpu = &core.fpu;
    let high = if short { 0 } else { 0xffff_0000 };
    let words = [
        high | u32::from(fpu.control),
        high | u32::from(fpu.status),
        high | u32::from(tag_word(core)),
        fpu.instruction_pointer as u32,
        u32::from(fpu.opcode) << 16,
        fpu.data_pointer as u32,
        high,
    ];
    (words, if short { 2 } else { 4 })
}

fn put_environment(core: &mut Core, linear: u64, short: bool) -> Step {
    let (words, size) = environment(core, short);
    for (i, word) in words.into_iter().enumerate() {
        let at = linear.wrapping_add(size * i as u64);
        if short { core.store(at, word as u16)? } else { core.store(at, word)? }
    }
    Ok(())
}

fn take_environment(core: &mut Core, linear: u64, short: bool) -> Step {
    let mut words = [0u32; 7];
    for (i, word) in words.iter_mut().enumerate() {
        *word = if short {
            core.load::<u16>(linear.wrapping_add(2 * i as u64))?.into()
        } else {
            core.load::<u32>(linear.wrapping_add(4 * i as u64))?
        };
    }
    let fpu = &mut core.fpu;
    fpu.control = words[0] as u16 & 0x1f7f | 0x40;
    fpu.status = words[1] as u16;
    fpu.tags = (0..8).fold(0, |tags, i| tags | u8::from(words[2] >> (2 * i) & 3 != 3) << i);
    fpu.instruction_pointer = words[3].into();
    fpu.opcode = (words[4] >> 16) as u16 & 0x7ff;
    fpu.data_pointer = words[5].into();
    refresh_summary(core);
    Ok(())
}

/// FNSTENV: afterwards all exceptions are masked.
pub fn store_environment(core: &mut Core, op: &Op) -> Step {
    ready_no_wait(core)?;
    let (linear, short) = (op.linear(core), is_short(op));
    core.probe_write(linear, if short { 14 } else { 28 })?;
    put_environment(core, linear, short)?;
    core.fpu.control |= 0x3f;
    refresh_summary(core);
    Ok(())
}

/// FLDENV.
pub fn load_environment(core: &mut Core, op: &Op) -> Step {
    ready(core)?;
    let (linear, short) = (op.linear(core), is_short(op));
    take_environment(core, linear, short)
}

/// FNSAVE: environment and registers in stack order, then FNINIT.
pub fn save(core: &mut Core, op: &Op) -> Step {
    ready_no_wait(core)?;
    let (linear, short) = (op.linear(core), is_short(op));
    let header = if short { 14 } else { 28 };
    core.probe_write(linear, header + 80)?;
    put_environment(core, linear, short)?;
    for i in 0..8u8 {
        let value = core.fpu.registers[usize::from(physical(core, i))];
        arithmetic::store80(core, linear.wrapping_add(header as u64 + 10 * u64::from(i)), value)?;
    }
    reset(core);
    Ok(())
}

/// FRSTOR.
pub fn restore(core: &mut Core, op: &Op) -> Step {
    ready(core)?;
    let (linear, short) = (op.linear(core), is_short(op));
    let header = if short { 14 } else { 28 };
    core.probe_read(linear, header as usize + 80)?;
    let mut values = [(0, 0); 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = arithmetic::load80(core, linear.wrapping_add(header + 10 * i as u64))?;
    }
    take_environment(core, linear, short)?;
    for (i, value) in values.into_iter().enumerate() {
        let register = physical(core, i as u8);
        core.fpu.registers[usize::from(register)] = value;
    }
    Ok(())
}
