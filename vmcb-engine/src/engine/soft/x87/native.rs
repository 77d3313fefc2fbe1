//! x87 arithmetic, done by the host's own x87: all 80 bits, every rounding mode and flag, as IEEE and APM5 specify them.
//!
//! Each function starts from FNINIT, loads the guest's control word with all exceptions masked, works, and leaves the
//! host's x87 as FNINIT leaves it. What comes back with a result is the status word: flags and condition codes.
#![allow(unsafe_code, reason = "host x87 by inline assembly: Rust has no 80-bit floating point")]

use std::arch::asm;

/// An 80-bit value: 64-bit significand with its integer bit, 16-bit sign and exponent.
pub type F80 = (u64, u16);

/// As in memory.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Raw([u8; 16]);

impl Raw {
    const ZERO: Raw = Raw([0; 16]);

    fn new((significand, exponent): F80) -> Self {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&significand.to_le_bytes());
        raw[8..10].copy_from_slice(&exponent.to_le_bytes());
        Raw(raw)
    }

    fn value(&self) -> F80 {
        let (mut significand, mut exponent) = ([0; 8], [0; 2]);
        significand.copy_from_slice(&self.0[..8]);
        exponent.copy_from_slice(&self.0[8..10]);
        (u64::from_le_bytes(significand), u16::from_le_bytes(exponent))
    }
}

/// The guest's control word with everything masked.
fn quiet(control: u16) -> u16 {
    control | 0x3f
}

/// Runs x87 instructions between FNINIT and FNINIT, under a control word; `status` is FNSTSW after `$work`, `$store` follows.
macro_rules! x87 {
    ($control:expr, [$($work:expr),*], [$($store:expr),*], $($name:ident = $pointer:expr),*) => {{
        let control: u16 = quiet($control);
        let status: u16;
        // SAFETY: touches x87 registers (all declared clobbered) and the named locals, each at least as large as the
        // instructions access; leaves the x87 as Rust expects it, by FNINIT.
        unsafe {
            asm!("fninit", "fldcw word ptr [{control}]", $($work,)* "fnstsw ax", $($store,)* "fninit",
                control = in(reg) &control, $($name = in(reg) $pointer,)* out("ax") status,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack));
        }
        status
    }};
}

macro_rules! binary {
    ($($register:ident $single:ident $double:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, " st, b` with st = a.")]
        pub fn $register(a: F80, b: F80, control: u16) -> (F80, u16) {
            let (a, b, mut r) = (Raw::new(a), Raw::new(b), Raw::ZERO);
            let status = x87!(control,
                ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]", concat!($mnemonic, " st, st(1)")],
                ["fstp tbyte ptr [{r}]"], a = &a, b = &b, r = &mut r);
            (r.value(), status)
        }

        #[doc = concat!("`", $mnemonic, " m32` with st = a.")]
        pub fn $single(a: F80, b: u32, control: u16) -> (F80, u16) {
            let (a, mut r) = (Raw::new(a), Raw::ZERO);
            let status = x87!(control, ["fld tbyte ptr [{a}]", concat!($mnemonic, " dword ptr [{b}]")],
                ["fstp tbyte ptr [{r}]"], a = &a, b = &b, r = &mut r);
            (r.value(), status)
        }

        #[doc = concat!("`", $mnemonic, " m64` with st = a.")]
        pub fn $double(a: F80, b: u64, control: u16) -> (F80, u16) {
            let (a, mut r) = (Raw::new(a), Raw::ZERO);
            let status = x87!(control, ["fld tbyte ptr [{a}]", concat!($mnemonic, " qword ptr [{b}]")],
                ["fstp tbyte ptr [{r}]"], a = &a, b = &b, r = &mut r);
            (r.value(), status)
        }
    )*};
}

binary! {
    add add_single add_double "fadd";
    mul mul_single mul_double "fmul";
    sub sub_single sub_double "fsub";
    subr subr_single subr_double "fsubr";
    div div_single div_double "fdiv";
    divr divr_single divr_double "fdivr";
}

macro_rules! compare {
    ($($name:ident $type:ty, $instruction:literal;)*) => {$(
        #[doc = concat!("`", $instruction, "` with st = a: status word.")]
        pub fn $name(a: F80, b: $type, control: u16) -> u16 {
            let a = Raw::new(a);
            x87!(control, ["fld tbyte ptr [{a}]", concat!($instruction, " ptr [{b}]")], [], a = &a, b = &b)
        }
    )*};
}

compare! {
    compare_single u32, "fcom dword";
    compare_double u64, "fcom qword";
}

/// FCOM (`quiet` false) or FUCOM of a with b: status word.
pub fn compare(a: F80, b: F80, unordered_is_quiet: bool, control: u16) -> u16 {
    let (a, b) = (Raw::new(a), Raw::new(b));
    if unordered_is_quiet {
        x87!(control, ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]", "fucom st(1)"], [], a = &a, b = &b)
    } else {
        x87!(control, ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]", "fcom st(1)"], [], a = &a, b = &b)
    }
}

macro_rules! unary {
    ($($name:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "` with st = a.")]
        pub fn $name(a: F80, control: u16) -> (F80, u16) {
            let (a, mut r) = (Raw::new(a), Raw::ZERO);
            let status = x87!(control, ["fld tbyte ptr [{a}]", $mnemonic], ["fstp tbyte ptr [{r}]"], a = &a, r = &mut r);
            (r.value(), status)
        }
    )*};
}

unary! {
    square_root "fsqrt"; round "frndint"; power_of_two "f2xm1"; sine "fsin"; cosine "fcos";
}

macro_rules! two_operands {
    ($($name:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "` with st = a and st(1) = b: what is on top afterwards.")]
        pub fn $name(a: F80, b: F80, control: u16) -> (F80, u16) {
            let (a, b, mut r) = (Raw::new(a), Raw::new(b), Raw::ZERO);
            let status = x87!(control, ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]", $mnemonic],
                ["fstp tbyte ptr [{r}]"], a = &a, b = &b, r = &mut r);
            (r.value(), status)
        }
    )*};
}

two_operands! {
    scale "fscale"; remainder "fprem"; remainder_ieee "fprem1"; arctangent "fpatan"; logarithm "fyl2x"; logarithm_plus_one "fyl2xp1";
}

macro_rules! two_results {
    ($($name:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "` with st = a: (new st(1), new st).")]
        pub fn $name(a: F80, control: u16) -> ((F80, F80), u16) {
            let (a, mut low, mut top) = (Raw::new(a), Raw::ZERO, Raw::ZERO);
            let status = x87!(control, ["fld tbyte ptr [{a}]", $mnemonic],
                ["fstp tbyte ptr [{top}]", "fstp tbyte ptr [{low}]"], a = &a, low = &mut low, top = &mut top);
            ((low.value(), top.value()), status)
        }
    )*};
}

two_results! {
    extract "fxtract"; tangent "fptan"; sine_cosine "fsincos";
}

macro_rules! load {
    ($($name:ident $type:ty, $instruction:literal;)*) => {$(
        #[doc = concat!("`", $instruction, "`.")]
        pub fn $name(m: $type, control: u16) -> (F80, u16) {
            let mut r = Raw::ZERO;
            let status = x87!(control, [concat!($instruction, " ptr [{m}]")], ["fstp tbyte ptr [{r}]"], m = &m, r = &mut r);
            (r.value(), status)
        }
    )*};
}

load! {
    load_single u32, "fld dword"; load_double u64, "fld qword";
    load_int16 u16, "fild word"; load_int32 u32, "fild dword"; load_int64 u64, "fild qword";
}

macro_rules! store {
    ($($name:ident $type:ty, $instruction:literal;)*) => {$(
        #[doc = concat!("`", $instruction, "` with st = a.")]
        pub fn $name(a: F80, control: u16) -> ($type, u16) {
            let a = Raw::new(a);
            let mut m: $type = 0;
            let status = x87!(control, ["fld tbyte ptr [{a}]", concat!($instruction, " ptr [{m}]")], [], a = &a, m = &mut m);
            (m, status)
        }
    )*};
}

store! {
    store_single u32, "fstp dword"; store_double u64, "fstp qword";
    store_int16 u16, "fistp word"; store_int32 u32, "fistp dword"; store_int64 u64, "fistp qword";
    truncate_int16 u16, "fisttp word"; truncate_int32 u32, "fisttp dword"; truncate_int64 u64, "fisttp qword";
}

/// FBLD of ten packed bytes.
pub fn load_decimal(m: F80, control: u16) -> (F80, u16) {
    let (m, mut r) = (Raw::new(m), Raw::ZERO);
    let status = x87!(control, ["fbld tbyte ptr [{m}]"], ["fstp tbyte ptr [{r}]"], m = &m, r = &mut r);
    (r.value(), status)
}

/// FBSTP: ten packed bytes.
pub fn store_decimal(a: F80, control: u16) -> (F80, u16) {
    let (a, mut m) = (Raw::new(a), Raw::ZERO);
    let status = x87!(control, ["fld tbyte ptr [{a}]", "fbstp tbyte ptr [{m}]"], [], a = &a, m = &mut m);
    (m.value(), status)
}

/// FXAM of a valid register: C3, C2, C0 and C1 as in the status word.
pub fn examine(a: F80) -> u16 {
    let a = Raw::new(a);
    x87!(0x37f, ["fld tbyte ptr [{a}]", "fxam"], [], a = &a) & 0x4700
}
