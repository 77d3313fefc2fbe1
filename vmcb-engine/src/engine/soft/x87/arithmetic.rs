//! x87 arithmetic, comparison, loads and stores.

use super::native::{self as n, F80};
use super::stack::{INDEFINITE, accrue, begin, get, pop, push, set, status, underflow};
use crate::engine::soft::core::{Core, Flags, Step, rflags};
use crate::engine::soft::op::Op;

/// ST(0) = f(ST(0), operand of memory), or what underflow gives.
pub fn with_memory(core: &mut Core, f: impl FnOnce(F80, u16) -> (F80, u16)) {
    match get(core, 0) {
        Some(a) => {
            let (result, host) = f(a, core.fpu.control);
            if accrue(core, host, 0) {
                set(core, 0, result);
            }
        }
        None => {
            if underflow(core) {
                set(core, 0, INDEFINITE);
            }
        }
    }
}

/// ST(to) = f(ST(to), ST(from)); pops if asked and the exceptions allow it.
pub fn between(core: &mut Core, to: u8, from: u8, pops: bool, f: impl FnOnce(F80, F80, u16) -> (F80, u16)) {
    let written = match (get(core, to), get(core, from)) {
        (Some(a), Some(b)) => {
            let (result, host) = f(a, b, core.fpu.control);
            let written = accrue(core, host, 0);
            if written {
                set(core, to, result);
            }
            written
        }
        _ => {
            let written = underflow(core);
            if written {
                set(core, to, INDEFINITE);
            }
            written
        }
    };
    if pops && written {
        pop(core);
    }
}

/// Compares ST(0) by `f`; `None` is underflow: unordered.
pub fn compare_with(core: &mut Core, pops: u8, f: impl FnOnce(F80, u16) -> Option<u16>) {
    let conditions = status::C0 | status::C2 | status::C3;
    let host = get(core, 0).and_then(|a| f(a, core.fpu.control)).unwrap_or(status::IE | status::SF | conditions);
    if accrue(core, host & !status::C1, conditions) {
        (0..pops).for_each(|_| pop(core));
    }
}

/// FCOMI, FUCOMI and their popping forms: flags instead of conditions.
pub fn compare_flags(core: &mut Core, i: u8, quiet: bool, pops: bool) {
    let all = status::C0 | status::C2 | status::C3;
    let host = match (get(core, 0), get(core, i)) {
        (Some(a), Some(b)) => n::compare(a, b, quiet, core.fpu.control),
        _ => status::IE | status::SF | all,
    };
    let written = accrue(core, host & !status::C1 & !all, 0);
    if written {
        let bit = |condition: u16, flag: u64| if host & condition != 0 { flag } else { 0 };
        core.flags =
            Flags::from_rflags(bit(status::C0, rflags::CF) | bit(status::C2, rflags::PF) | bit(status::C3, rflags::ZF));
        if pops {
            pop(core);
        }
    }
}

/// ST(0) = f(ST(0)). `conditions`: which condition codes it sets.
pub fn unary(core: &mut Core, conditions: u16, f: impl FnOnce(F80, u16) -> (F80, u16)) {
    match get(core, 0) {
        Some(a) => {
            let (result, host) = f(a, core.fpu.control);
            if accrue(core, host, conditions) {
                set(core, 0, result);
            }
        }
        None => {
            if underflow(core) {
                set(core, 0, INDEFINITE);
            }
        }
    }
}

/// ST(0) = f(ST(0), ST(1)), for FSCALE, FPREM, FPREM1.
pub fn of_two(core: &mut Core, conditions: u16, f: impl FnOnce(F80, F80, u16) -> (F80, u16)) {
    match (get(core, 0), get(core, 1)) {
        (Some(a), Some(b)) => {
            let (result, host) = f(a, b, core.fpu.control);
            if accrue(core, host, conditions) {
                set(core, 0, result);
            }
        }
        _ => {
            if underflow(core) {
                set(core, 0, INDEFINITE);
            }
        }
    }
}

/// ST(1) = f(ST(0), ST(1)), then pops: FPATAN, FYL2X, FYL2XP1.
pub fn of_two_popping(core: &mut Core, f: impl FnOnce(F80, F80, u16) -> (F80, u16)) {
    between(core, 1, 0, true, |b, a, control| f(a, b, control));
}

/// ST(0) becomes the first result, the second is pushed: FXTRACT, FPTAN, FSINCOS. With C2 (out of range) nothing changes.
pub fn two_results(core: &mut Core, f: impl FnOnce(F80, u16) -> ((F80, F80), u16), may_refuse: bool) {
    let Some(a) = get(core, 0) else {
        if underflow(core) {
            set(core, 0, INDEFINITE);
            super::stack::rotate(core, 7);
            set(core, 0, INDEFINITE);
        }
        return;
    };
    if super::stack::get(core, 7).is_some() {
        if accrue(core, status::IE | status::SF | status::C1, 0) {
            set(core, 0, INDEFINITE);
            super::stack::rotate(core, 7);
            set(core, 0, INDEFINITE);
        }
        return;
    }
    let ((low, high), host) = f(a, core.fpu.control);
    let conditions = if may_refuse { status::C2 } else { 0 };
    if accrue(core, host, conditions) && !(may_refuse && host & status::C2 != 0) {
        set(core, 0, low);
        push(core, high, host & status::C1);
    }
}

/// Converts ST(0) with `f`, stores with `put`, pops if asked. `indefinite` is what underflow stores.
pub fn store<T: Copy>(
    core: &mut Core,
    op: &Op,
    pops: bool,
    indefinite: T,
    f: impl FnOnce(F80, u16) -> (T, u16),
    put: impl FnOnce(&mut Core, u64, T) -> Step,
) -> Step {
    begin(core, op)?;
    let (value, host) = get(core, 0).map_or((indefinite, status::IE | status::SF), |a| f(a, core.fpu.control));
    let linear = op.linear(core);
    if host & !core.fpu.control & 0x07 == 0 {
        put(core, linear, value)?;
    }
    if accrue(core, host, 0) && pops {
        pop(core);
    }
    Ok(())
}

/// Loads with `get`, converts with `f`, pushes.
pub fn load<T>(
    core: &mut Core,
    op: &Op,
    fetch: impl FnOnce(&mut Core, u64) -> Step<T>,
    f: impl FnOnce(T, u16) -> (F80, u16),
) -> Step {
    begin(core, op)?;
    let linear = op.linear(core);
    let value = fetch(core, linear)?;
    let (value, host) = f(value, core.fpu.control);
    push(core, value, host & !status::C1);
    Ok(())
}

/// Ten bytes.
pub fn load80(core: &mut Core, linear: u64) -> Step<F80> {
    let significand = core.load::<u64>(linear)?;
    let exponent = core.load::<u16>(linear.wrapping_add(8))?;
    Ok((significand, exponent))
}

/// Ten bytes.
pub fn store80(core: &mut Core, linear: u64, (significand, exponent): F80) -> Step {
    core.probe_write(linear, 10)?;
    core.store(linear, significand)?;
    core.store(linear.wrapping_add(8), exponent)
}

/// Ten packed bytes: of the first eight and the last two, each faults by itself (AMD family 19h).
pub fn store_packed(core: &mut Core, linear: u64, value: F80) -> Step {
    core.probe_write(linear, 8)?;
    store80(core, linear, value)
}
