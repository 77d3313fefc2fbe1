//! Operands: widths, registers, and where the r/m operand lies. Meanings are generic over these, so that each common
//! combination becomes one short handler.
//!
//! Four places: a register; memory in 64-bit mode without segment base, index and 32-bit addresses ([`Near`], most of
//! all); other memory in 64-bit mode with 64-bit addresses ([`Wide`]); any other ([`Any`], with the limit checks of APM2
//! 4.12.2 outside 64-bit mode).

use std::marker::PhantomData;

use crate::engine::soft::core::{Core, SS, Step, Stop};
use crate::engine::soft::op::{NO_SEGMENT, Op};
use crate::engine::soft::tlb::Word;

/// A general-purpose operand width.
pub trait Width: Word + PartialEq + Eq {
    /// Bits.
    const BITS: u32;
    /// Bytes.
    const BYTES: u64;
    /// Zero-extended.
    fn wide(self) -> u64;
    /// Sign-extended.
    fn signed(self) -> u64;
    /// The low part.
    fn cut(value: u64) -> Self;
    /// Reads a register as decode numbered it.
    fn get(core: &Core, register: u8) -> Self;
    /// Writes a register; 32-bit writes clear the upper half (APM1 3.1.2).
    fn set(core: &mut Core, register: u8, value: Self);
}

macro_rules! width {
    ($type:ty, $signed:ty, |$core:ident, $register:ident| $get:expr, |$to:ident, $into:ident, $value:ident| $set:expr) => {
        impl Width for $type {
            const BITS: u32 = <$type>::BITS;
            const BYTES: u64 = size_of::<$type>() as u64;
            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn signed(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn cut(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn get($core: &Core, $register: u8) -> Self {
                $get
            }
            #[inline(always)]
            fn set($to: &mut Core, $into: u8, $value: Self) {
                $set
            }
        }
    };
}

#[inline(always)]
fn slot(register: u8) -> usize {
    (register & 31) as usize
}

#[inline(always)]
fn high(register: u8) -> u32 {
    u32::from(register >> 2 & 8)
}

width!(u8, i8, |core, register| (core.gprs[slot(register)] >> high(register)) as u8, |core, register, value| {
    let whole = &mut core.gprs[slot(register)];
    *whole = *whole & !(0xff << high(register)) | u64::from(value) << high(register);
});
width!(u16, i16, |core, register| core.gprs[slot(register)] as u16, |core, register, value| {
    let whole = &mut core.gprs[slot(register)];
    *whole = *whole & !0xffff | u64::from(value);
});
width!(u32, i32, |core, register| core.gprs[slot(register)] as u32, |core, register, value| {
    core.gprs[slot(register)] = u64::from(value);
});
width!(u64, i64, |core, register| core.gprs[slot(register)], |core, register, value| {
    core.gprs[slot(register)] = value;
});

/// Where the r/m operand lies.
pub trait Place: Copy + 'static {
    /// Reads it.
    ///
    /// # Errors
    /// The memory cannot be read.
    fn load<W: Width>(core: &mut Core, op: &Op) -> Step<W>;
    /// Writes it.
    ///
    /// # Errors
    /// The memory cannot be written.
    fn store<W: Width>(core: &mut Core, op: &Op, value: W) -> Step;
    /// Reads, computes, writes; `f` returns the new value and what to hand back, and must change nothing itself.
    ///
    /// # Errors
    /// The memory cannot be written.
    fn modify<W: Width, R>(core: &mut Core, op: &Op, f: impl FnOnce(&Core, W) -> (W, R)) -> Step<R>;
}

/// The r/m operand is a register.
#[derive(Clone, Copy)]
pub struct Register;

impl Place for Register {
    #[inline(always)]
    fn load<W: Width>(core: &mut Core, op: &Op) -> Step<W> {
        Ok(W::get(core, op.rm))
    }

    #[inline(always)]
    fn store<W: Width>(core: &mut Core, op: &Op, value: W) -> Step {
        W::set(core, op.rm, value);
        Ok(())
    }

    #[inline(always)]
    fn modify<W: Width, R>(core: &mut Core, op: &Op, f: impl FnOnce(&Core, W) -> (W, R)) -> Step<R> {
        let (value, out) = f(core, W::get(core, op.rm));
        W::set(core, op.rm, value);
        Ok(out)
    }
}

/// Memory at base + displacement, in 64-bit mode, without a segment base.
#[derive(Clone, Copy)]
pub struct Near;

/// Address of a [`Near`] operand.
#[inline(always)]
pub fn near(core: &Core, op: &Op) -> u64 {
    core.gprs[slot(op.base)].wrapping_add(op.displacement as u64)
}

impl Place for Near {
    #[inline(always)]
    fn load<W: Width>(core: &mut Core, op: &Op) -> Step<W> {
        core.load(near(core, op))
    }

    #[inline(always)]
    fn store<W: Width>(core: &mut Core, op: &Op, value: W) -> Step {
        core.store(near(core, op), value)
    }

    #[inline(always)]
    fn modify<W: Width, R>(core: &mut Core, op: &Op, f: impl FnOnce(&Core, W) -> (W, R)) -> Step<R> {
        core.modify(near(core, op), |core, old| f(core, old))
    }
}

/// Memory in 64-bit mode with 64-bit addresses.
#[derive(Clone, Copy)]
pub struct Wide;

/// Offset of a [`Wide`] operand in its segment.
#[inline(always)]
pub fn indexed(core: &Core, op: &Op) -> u64 {
    near(core, op).wrapping_add(core.gprs[slot(op.index)] << (op.scale & 3))
}

#[inline(always)]
fn wide(core: &Core, op: &Op) -> u64 {
    let offset = indexed(core, op);
    if op.segment == NO_SEGMENT { offset } else { offset.wrapping_add(core.segments[usize::from(op.segment)].base) }
}

impl Place for Wide {
    #[inline(always)]
    fn load<W: Width>(core: &mut Core, op: &Op) -> Step<W> {
        core.load(wide(core, op))
    }

    #[inline(always)]
    fn store<W: Width>(core: &mut Core, op: &Op, value: W) -> Step {
        core.store(wide(core, op), value)
    }

    #[inline(always)]
    fn modify<W: Width, R>(core: &mut Core, op: &Op, f: impl FnOnce(&Core, W) -> (W, R)) -> Step<R> {
        core.modify(wide(core, op), |core, old| f(core, old))
    }
}

/// The same operand where the TLB has its page. If it has not, nothing was changed, and the error says nothing but that:
/// the instruction is done again without this.
#[derive(Clone, Copy)]
pub struct Quick<P>(PhantomData<P>);

/// A place whose address cannot fault by itself.
pub trait Addressed: Copy + 'static {
    /// The linear address.
    fn linear(core: &Core, op: &Op) -> u64;
}

impl Addressed for Near {
    #[inline(always)]
    fn linear(core: &Core, op: &Op) -> u64 {
        near(core, op)
    }
}

impl Addressed for Wide {
    #[inline(always)]
    fn linear(core: &Core, op: &Op) -> u64 {
        wide(core, op)
    }
}

impl<P: Addressed> Place for Quick<P> {
    #[inline(always)]
    fn load<W: Width>(core: &mut Core, op: &Op) -> Step<W> {
        core.load_known(P::linear(core, op)).ok_or(Stop::Again)
    }

    #[inline(always)]
    fn store<W: Width>(core: &mut Core, op: &Op, value: W) -> Step {
        core.store_hit(P::linear(core, op), value).ok_or(Stop::Again)
    }

    #[inline(always)]
    fn modify<W: Width, R>(core: &mut Core, op: &Op, f: impl FnOnce(&Core, W) -> (W, R)) -> Step<R> {
        core.modify_hit(P::linear(core, op), |core, old| f(core, old)).ok_or(Stop::Again)
    }
}

/// Any memory operand.
#[derive(Clone, Copy)]
pub struct Any;

impl Place for Any {
    #[inline(always)]
    fn load<W: Width>(core: &mut Core, op: &Op) -> Step<W> {
        let linear = checked(core, op, W::BYTES, false)?;
        core.load(linear)
    }

    #[inline(always)]
    fn store<W: Width>(core: &mut Core, op: &Op, value: W) -> Step {
        let linear = checked(core, op, W::BYTES, true)?;
        core.store(linear, value)
    }

    #[inline(always)]
    fn modify<W: Width, R>(core: &mut Core, op: &Op, f: impl FnOnce(&Core, W) -> (W, R)) -> Step<R> {
        let linear = checked(core, op, W::BYTES, true)?;
        core.modify(linear, |core, old| f(core, old))
    }
}

/// Linear address of the memory operand, its segment checked.
///
/// # Errors
/// #GP(0) or #SS(0) outside 64-bit mode.
#[inline(always)]
pub fn checked(core: &mut Core, op: &Op, bytes: u64, write: bool) -> Step<u64> {
    if !core.mode.long && op.segment != NO_SEGMENT {
        core.check_segment(op.segment as usize, op.effective(core), bytes, write)?;
    }
    Ok(op.linear(core))
}

impl Core {
    /// Checks an access of `bytes` at `offset` of a segment outside 64-bit mode (APM2 4.12.2): usable, of a fitting type,
    /// within its limit.
    ///
    /// # Errors
    /// #SS(0) for the stack segment, else #GP(0).
    pub fn check_segment(&mut self, number: usize, offset: u64, bytes: u64, write: bool) -> Step {
        let segment = self.segments[number];
        let (limit, last) = (u64::from(segment.limit), offset + bytes - 1);
        let expands_down = segment.is_code_or_data() && segment.kind() & 0xc == 4;
        let inside = if expands_down {
            offset > limit && last <= if segment.big() { 0xffff_ffff } else { 0xffff }
        } else {
            last <= limit
        };
        let fits = !self.mode.protected
            || self.virtual_8086()
            || segment.present() && if write { segment.kind() & 0xa == 2 } else { segment.kind() & 0xa != 8 };
        if inside && fits {
            return Ok(());
        }
        self.raise_code(if number == SS { 12 } else { 13 }, 0)
    }

    /// Linear address of an offset in a segment, checked outside 64-bit mode; in 64-bit mode only FS and GS have a base.
    ///
    /// # Errors
    /// As [`Core::check_segment`].
    #[inline(always)]
    pub fn segment_linear(&mut self, number: usize, offset: u64, bytes: u64, write: bool) -> Step<u64> {
        if self.mode.long {
            return Ok(if number >= 4 { offset.wrapping_add(self.segments[number].base) } else { offset });
        }
        self.check_segment(number, offset, bytes, write)?;
        Ok(offset.wrapping_add(self.segments[number].base) & 0xffff_ffff)
    }
}
