//! x87 in 80 bits (APM5): from an escape opcode and its ModRM byte to the function that does it.
//!
//! [`native`] computes by the host's x87, [`transcendental`] what hosts do not agree on, [`stack`] keeps registers and exceptions, [`arithmetic`] and [`control`] are the
//! instructions.

mod arithmetic;
mod control;
mod native;
mod stack;
mod transcendental;
mod wide;

use self::arithmetic as a;
use self::native as n;
use self::stack::{begin, get, pop, push, status};
use self::transcendental as t;
use super::core::{Core, Step};
use super::decode::Row;
use super::op::{Meaning, Op, straight};

pub use control::wait;

fn row(meaning: impl Meaning) -> Option<Row> {
    Some(Row { run: straight(meaning), immediate: false })
}

/// The instruction of an escape opcode (D8-DF) and its ModRM byte.
pub fn lookup(opcode: u8, modrm: u8) -> Option<Row> {
    if modrm < 0xc0 { memory(opcode, modrm >> 3 & 7) } else { register(opcode, modrm) }
}

/// Arithmetic with a 32-bit or 64-bit real of memory.
macro_rules! with_real {
    ($type:ty, $f:path) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            let operand = core.load::<$type>(op.linear(core))?;
            a::with_memory(core, |st, control| $f(st, operand, control));
            Ok(())
        })
    };
}

/// Arithmetic with an integer of memory: every integer is exact in 80 bits.
macro_rules! with_integer {
    ($type:ty, $load:path, $f:path) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            let operand = core.load::<$type>(op.linear(core))?;
            a::with_memory(core, |st, control| $f(st, $load(operand, control).0, control));
            Ok(())
        })
    };
}

macro_rules! compare_memory {
    ($type:ty, $pops:literal, $f:expr) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            let operand = core.load::<$type>(op.linear(core))?;
            a::compare_with(core, $pops, |st, control| Some($f(st, operand, control)));
            Ok(())
        })
    };
}

macro_rules! load {
    ($type:ty, $f:path) => {
        row(|core: &mut Core, op: &Op| a::load(core, op, |core, linear| core.load::<$type>(linear), $f))
    };
}

macro_rules! store {
    ($type:ty, $pops:literal, $indefinite:expr, $f:path) => {
        row(|core: &mut Core, op: &Op| {
            a::store(core, op, $pops, $indefinite, $f, |core, at, value: $type| core.store(at, value))
        })
    };
}

fn memory(opcode: u8, reg: u8) -> Option<Row> {
    match opcode {
        0xd8 => match reg {
            0 => with_real!(u32, n::add_single),
            1 => with_real!(u32, n::mul_single),
            2 => compare_memory!(u32, 0, n::compare_single),
            3 => compare_memory!(u32, 1, n::compare_single),
            4 => with_real!(u32, n::sub_single),
            5 => with_real!(u32, n::subr_single),
            6 => with_real!(u32, n::div_single),
            _ => with_real!(u32, n::divr_single),
        },
        0xdc => match reg {
            0 => with_real!(u64, n::add_double),
            1 => with_real!(u64, n::mul_double),
            2 => compare_memory!(u64, 0, n::compare_double),
            3 => compare_memory!(u64, 1, n::compare_double),
            4 => with_real!(u64, n::sub_double),
            5 => with_real!(u64, n::subr_double),
            6 => with_real!(u64, n::div_double),
            _ => with_real!(u64, n::divr_double),
        },
        0xda => integer_arithmetic32(reg),
        0xde => integer_arithmetic16(reg),
        0xd9 => match reg {
            0 => load!(u32, n::load_single),
            2 => store!(u32, false, 0xffc0_0000, n::store_single),
            3 => store!(u32, true, 0xffc0_0000, n::store_single),
            4 => row(control::load_environment),
            5 => row(control::load_control),
            6 => row(control::store_environment),
            7 => row(control::store_control),
            _ => None,
        },
        0xdb => match reg {
            0 => load!(u32, n::load_int32),
            1 => store!(u32, true, 0x8000_0000, n::truncate_int32),
            2 => store!(u32, false, 0x8000_0000, n::store_int32),
            3 => store!(u32, true, 0x8000_0000, n::store_int32),
            5 => row(|core: &mut Core, op: &Op| a::load(core, op, a::load80, |value, _| (value, 0))),
            7 => row(|core: &mut Core, op: &Op| {
                a::store(core, op, true, stack::INDEFINITE, |value, _| (value, 0), a::store80)
            }),
            _ => None,
        },
        0xdd => match reg {
            0 => load!(u64, n::load_double),
            1 => store!(u64, true, 1 << 63, n::truncate_int64),
            2 => store!(u64, false, 0xfff8 << 48, n::store_double),
            3 => store!(u64, true, 0xfff8 << 48, n::store_double),
            4 => row(control::restore),
            6 => row(control::save),
            7 => row(control::store_status),
            _ => None,
        },
        _ => match reg {
            0 => load!(u16, n::load_int16),
            1 => store!(u16, true, 0x8000, n::truncate_int16),
            2 => store!(u16, false, 0x8000, n::store_int16),
            3 => store!(u16, true, 0x8000, n::store_int16),
            4 => row(|core: &mut Core, op: &Op| a::load(core, op, a::load80, n::load_decimal)),
            5 => load!(u64, n::load_int64),
            6 => row(|core: &mut Core, op: &Op| {
                a::store(core, op, true, (0xc000_0000_0000_0000, 0xffff), n::store_decimal, a::store_packed)
            }),
            _ => store!(u64, true, 1 << 63, n::store_int64),
        },
    }
}

fn integer_arithmetic32(reg: u8) -> Option<Row> {
    match reg {
        0 => with_integer!(u32, n::load_int32, n::add),
        1 => with_integer!(u32, n::load_int32, n::mul),
        2 => compare_memory!(u32, 0, |st, v, c| n::compare(st, n::load_int32(v, c).0, false, c)),
        3 => compare_memory!(u32, 1, |st, v, c| n::compare(st, n::load_int32(v, c).0, false, c)),
        4 => with_integer!(u32, n::load_int32, n::sub),
        5 => with_integer!(u32, n::load_int32, n::subr),
        6 => with_integer!(u32, n::load_int32, n::div),
        _ => with_integer!(u32, n::load_int32, n::divr),
    }
}

fn integer_arithmetic16(reg: u8) -> Option<Row> {
    match reg {
        0 => with_integer!(u16, n::load_int16, n::add),
        1 => with_integer!(u16, n::load_int16, n::mul),
        2 => compare_memory!(u16, 0, |st, v, c| n::compare(st, n::load_int16(v, c).0, false, c)),
        3 => compare_memory!(u16, 1, |st, v, c| n::compare(st, n::load_int16(v, c).0, false, c)),
        4 => with_integer!(u16, n::load_int16, n::sub),
        5 => with_integer!(u16, n::load_int16, n::subr),
        6 => with_integer!(u16, n::load_int16, n::div),
        _ => with_integer!(u16, n::load_int16, n::divr),
    }
}

/// ST(0) = ST(0) op ST(i) for D8; ST(i) = ST(i) op ST(0) for DC; and pops for DE.
macro_rules! between {
    ($opcode:expr, $forward:path, $backward:path) => {
        match $opcode {
            0xd8 => row(|core: &mut Core, op: &Op| -> Step {
                begin(core, op)?;
                a::between(core, 0, op.rm & 7, false, $forward);
                Ok(())
            }),
            0xdc => row(|core: &mut Core, op: &Op| -> Step {
                begin(core, op)?;
                a::between(core, op.rm & 7, 0, false, $backward);
                Ok(())
            }),
            _ => row(|core: &mut Core, op: &Op| -> Step {
                begin(core, op)?;
                a::between(core, op.rm & 7, 0, true, $backward);
                Ok(())
            }),
        }
    };
}

fn arithmetic_registers(opcode: u8, reg: u8) -> Option<Row> {
    match reg {
        0 => between!(opcode, n::add, n::add),
        1 => between!(opcode, n::mul, n::mul),
        // E0-E7: FSUB for D8, FSUBR for DC (to ST(i)): ST(0) - ST(i), stored to ST(i).
        4 => between!(opcode, n::sub, n::subr),
        5 => between!(opcode, n::subr, n::sub),
        6 => between!(opcode, n::div, n::divr),
        _ => between!(opcode, n::divr, n::div),
    }
}

macro_rules! compare_registers {
    ($quiet:literal, $pops:literal) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            let other = get(core, op.rm & 7);
            a::compare_with(core, $pops, |st, control| other.map(|b| n::compare(st, b, $quiet, control)));
            Ok(())
        })
    };
}

macro_rules! compare_flags {
    ($quiet:literal, $pops:literal) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            a::compare_flags(core, op.rm & 7, $quiet, $pops);
            Ok(())
        })
    };
}

/// FLD ST(i).
fn load_register(core: &mut Core, op: &Op) -> Step {
    begin(core, op)?;
    match get(core, op.rm & 7) {
        Some(value) => push(core, value, 0),
        // Underflow is seen before overflow.
        None => {
            if stack::underflow(core) {
                stack::rotate(core, 7);
                stack::set(core, 0, stack::INDEFINITE);
            }
        }
    }
    Ok(())
}

/// FST ST(i), FSTP ST(i).
fn store_register<const POPS: bool>(core: &mut Core, op: &Op) -> Step {
    begin(core, op)?;
    let (value, host) = get(core, 0).map_or((stack::INDEFINITE, status::IE | status::SF), |value| (value, 0));
    if stack::accrue(core, host, 0) {
        stack::set(core, op.rm & 7, value);
        if POPS {
            pop(core);
        }
    }
    Ok(())
}

/// FSTPNCE ST(i), an alias of FSTP that checks nothing: an empty ST(0) is popped and not copied (AMD family 19h).
fn move_register(core: &mut Core, op: &Op) -> Step {
    begin(core, op)?;
    if let Some(value) = get(core, 0) {
        core.fpu.status &= !status::C1;
        stack::set(core, op.rm & 7, value);
    }
    pop(core);
    Ok(())
}

fn register(opcode: u8, modrm: u8) -> Option<Row> {
    let reg = modrm >> 3 & 7;
    match (opcode, reg) {
        (0xd8 | 0xdc, 2) => compare_registers!(false, 0),
        (0xd8 | 0xdc, 3) | (0xde, 2) => compare_registers!(false, 1),
        (0xde, 3) if modrm == 0xd9 => compare_registers!(false, 2),
        (0xde, 3) => None,
        (0xd8 | 0xdc | 0xde, _) => arithmetic_registers(opcode, reg),
        (0xd9, 0) => row(load_register),
        (0xd9, 1) => row(control::exchange),
        (0xd9, 2) if modrm == 0xd0 => row(control::nothing),
        (0xd9, 3) => row(move_register),
        (0xd9, 4..=7) => special(modrm),
        (0xda | 0xdb, 0..=3) => row(control::conditional_move),
        (0xda, 5) if modrm == 0xe9 => compare_registers!(true, 2),
        (0xdb, 4) if modrm == 0xe2 => row(control::clear_exceptions),
        (0xdb, 4) if modrm == 0xe3 => row(control::initialise),
        (0xdb, 4) if modrm < 0xe5 => row(control::nothing),
        (0xdb, 5) => compare_flags!(true, false),
        (0xdb, 6) => compare_flags!(false, false),
        (0xdd, 0) | (0xdf, 0) => row(control::free_register),
        (0xdd, 1) | (0xdf, 1) => row(control::exchange),
        (0xdd, 2) => row(store_register::<false>),
        (0xdd, 3) | (0xdf, 2 | 3) => row(store_register::<true>),
        (0xdd, 4) => compare_registers!(true, 0),
        (0xdd, 5) => compare_registers!(true, 1),
        (0xdf, 4) if modrm == 0xe0 => row(control::store_status_ax),
        (0xdf, 5) => compare_flags!(true, true),
        (0xdf, 6) => compare_flags!(false, true),
        _ => None,
    }
}

macro_rules! unary {
    ($f:path, $conditions:expr) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            a::unary(core, $conditions, $f);
            Ok(())
        })
    };
}

macro_rules! of_two {
    ($f:path, $conditions:expr) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            a::of_two(core, $conditions, $f);
            Ok(())
        })
    };
}

macro_rules! of_two_popping {
    ($f:path) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            a::of_two_popping(core, $f);
            Ok(())
        })
    };
}

macro_rules! two_results {
    ($f:path, $may_refuse:literal) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            a::two_results(core, $f, $may_refuse);
            Ok(())
        })
    };
}

macro_rules! constant {
    ($significand:literal, $exponent:literal, $rounds_up:expr) => {
        row(|core: &mut Core, op: &Op| -> Step {
            begin(core, op)?;
            // The rounded constant depends on the rounding mode (APM5 FLDPI): up by one unit where it was cut.
            let mode = core.fpu.control >> 10 & 3;
            push(core, ($significand + u64::from($rounds_up(mode)), $exponent), 0);
            Ok(())
        })
    };
}

/// D9 E0-FF.
fn special(modrm: u8) -> Option<Row> {
    /// Stored value is below the exact one: only rounding up adds a unit.
    fn below(mode: u16) -> bool {
        mode == 2
    }
    /// Stored value is the one below, and nearest is above: nearest and up add a unit.
    fn nearest_above(mode: u16) -> bool {
        mode == 0 || mode == 2
    }
    fn exact(_: u16) -> bool {
        false
    }
    match modrm {
        0xe0 => row(control::change_sign),
        0xe1 => row(control::absolute),
        0xe4 => row(control::test),
        0xe5 => row(control::examine),
        0xe8 => constant!(0x8000_0000_0000_0000, 0x3fff, exact),
        0xe9 => constant!(0xd49a_784b_cd1b_8afe, 0x4000, below),
        0xea => constant!(0xb8aa_3b29_5c17_f0bb, 0x3fff, nearest_above),
        0xeb => constant!(0xc90f_daa2_2168_c234, 0x4000, nearest_above),
        0xec => constant!(0x9a20_9a84_fbcf_f798, 0x3ffd, nearest_above),
        0xed => constant!(0xb172_17f7_d1cf_79ab, 0x3ffe, nearest_above),
        0xee => constant!(0, 0, exact),
        0xf0 => unary!(t::power_of_two, 0),
        0xf1 => of_two_popping!(t::logarithm),
        0xf2 => two_results!(t::tangent, true),
        0xf3 => of_two_popping!(t::arctangent),
        0xf4 => two_results!(n::extract, false),
        0xf5 => of_two!(n::remainder_ieee, status::C0 | status::C2 | status::C3),
        0xf6 => row(control::decrement_top),
        0xf7 => row(control::increment_top),
        0xf8 => of_two!(n::remainder, status::C0 | status::C2 | status::C3),
        0xf9 => of_two_popping!(t::logarithm_plus_one),
        0xfa => unary!(n::square_root, 0),
        0xfb => two_results!(t::sine_cosine, true),
        0xfc => unary!(n::round, 0),
        0xfd => of_two!(n::scale, 0),
        0xfe => unary!(t::sine, status::C2),
        0xff => unary!(t::cosine, status::C2),
        _ => None,
    }
}
