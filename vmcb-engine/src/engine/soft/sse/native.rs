//! Arithmetic of SSE, done by the host's own SSE: bit-exact on every x86-64-v2 host, because IEEE operations and integer
//! operations are fully specified. What is not (RCP, RSQRT) is computed in `approximate.rs`.
//!
//! Floating-point functions run under the guest's rounding mode, DAZ and FTZ with all exceptions masked, and return the
//! flags that were raised; the caller decides what an unmasked one means.
#![allow(unsafe_code, reason = "host SSE by inline assembly: Rust has no other way to run under a guest's MXCSR")]

use std::arch::asm;
use std::arch::x86_64::__m128i;

/// MXCSR of Rust code.
const HOST_MXCSR: u32 = 0x1f80;

/// Passed for a guest's MXCSR: its modes and masks are those of Rust code, and the host's own MXCSR gathers the flags.
pub const GATHERING: u32 = u32::MAX;

/// True if operations may run with [`GATHERING`] under this MXCSR of the guest.
pub fn can_gather(mxcsr: u32) -> bool {
    mxcsr & !0x3f == HOST_MXCSR
}

/// Begins to gather: no flag is raised yet. Until [`gathered`], no Rust code may compute with floating point on this
/// thread, nor may an operation run with another MXCSR.
pub fn gather() {
    // SAFETY: the modes of Rust code, without flags.
    unsafe { asm!("ldmxcsr [{h}]", h = in(reg) &HOST_MXCSR, options(nostack)) }
}

/// Flags that were raised since [`gather`].
pub fn gathered() -> u32 {
    let mut control = 0u32;
    // SAFETY: stores MXCSR to a local variable.
    unsafe { asm!("stmxcsr [{m}]", m = in(reg) &mut control, options(nostack, preserves_flags)) }
    control & 0x3f
}

#[inline(always)]
fn vector(value: u128) -> __m128i {
    // SAFETY: both are 16 plain bytes.
    unsafe { std::mem::transmute::<u128, __m128i>(value) }
}

#[inline(always)]
fn bits(value: __m128i) -> u128 {
    // SAFETY: both are 16 plain bytes.
    unsafe { std::mem::transmute::<__m128i, u128>(value) }
}

/// MXCSR under which a guest's operation runs: its modes, everything masked, no flags yet.
#[inline(always)]
fn quiet(mxcsr: u32) -> u32 {
    (mxcsr | 0x1f80) & !0x3f
}

macro_rules! integer {
    ($($name:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "`: (destination, source) -> destination.")]
        #[inline(always)]
        pub fn $name(destination: u128, source: u128) -> u128 {
            let mut d = vector(destination);
            // SAFETY: a register-to-register instruction that every x86-64-v2 host has.
            unsafe {
                asm!(concat!($mnemonic, " {d}, {s}"), d = inout(xmm_reg) d, s = in(xmm_reg) vector(source),
                    options(pure, nomem, nostack, preserves_flags));
            }
            bits(d)
        }
    )*};
}

macro_rules! float {
    ($($name:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "`: (destination, source, guest MXCSR) -> (destination, raised flags).")]
        #[inline(always)]
        pub fn $name(destination: u128, source: u128, mxcsr: u32) -> (u128, u32) {
            let mut d = vector(destination);
            if mxcsr == GATHERING {
                // SAFETY: register-to-register; raised flags stay in MXCSR, which `options` does not promise to keep.
                unsafe {
                    asm!(concat!($mnemonic, " {d}, {s}"), d = inout(xmm_reg) d, s = in(xmm_reg) vector(source), options(nomem, nostack));
                }
                return (bits(d), 0);
            }
            let mut control = quiet(mxcsr);
            // SAFETY: register-to-register between two loads of MXCSR; the host's value is put back.
            unsafe {
                asm!("ldmxcsr [{m}]", concat!($mnemonic, " {d}, {s}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                    m = in(reg) &mut control, h = in(reg) &HOST_MXCSR, d = inout(xmm_reg) d,
                    s = in(xmm_reg) vector(source), options(nostack, preserves_flags));
            }
            (bits(d), control & 0x3f)
        }
    )*};
}

integer! {
    paddb "paddb"; paddw "paddw"; paddd "paddd"; paddq "paddq";
    paddsb "paddsb"; paddsw "paddsw"; paddusb "paddusb"; paddusw "paddusw";
    psubb "psubb"; psubw "psubw"; psubd "psubd"; psubq "psubq";
    psubsb "psubsb"; psubsw "psubsw"; psubusb "psubusb"; psubusw "psubusw";
    pmullw "pmullw"; pmulhw "pmulhw"; pmulhuw "pmulhuw"; pmuludq "pmuludq"; pmaddwd "pmaddwd";
    pavgb "pavgb"; pavgw "pavgw"; psadbw "psadbw";
    pminub "pminub"; pmaxub "pmaxub"; pminsw "pminsw"; pmaxsw "pmaxsw";
    pcmpeqb "pcmpeqb"; pcmpeqw "pcmpeqw"; pcmpeqd "pcmpeqd"; pcmpgtb "pcmpgtb"; pcmpgtw "pcmpgtw"; pcmpgtd "pcmpgtd";
    psllw "psllw"; pslld "pslld"; psllq "psllq"; psrlw "psrlw"; psrld "psrld"; psrlq "psrlq"; psraw "psraw"; psrad "psrad";
    packsswb "packsswb"; packssdw "packssdw"; packuswb "packuswb"; packusdw "packusdw";
    punpcklbw "punpcklbw"; punpcklwd "punpcklwd"; punpckldq "punpckldq"; punpcklqdq "punpcklqdq";
    punpckhbw "punpckhbw"; punpckhwd "punpckhwd"; punpckhdq "punpckhdq"; punpckhqdq "punpckhqdq";
    pshufb "pshufb"; phaddw "phaddw"; phaddd "phaddd"; phaddsw "phaddsw"; phsubw "phsubw"; phsubd "phsubd"; phsubsw "phsubsw";
    pmaddubsw "pmaddubsw"; pmulhrsw "pmulhrsw"; psignb "psignb"; psignw "psignw"; psignd "psignd";
    pabsb "pabsb"; pabsw "pabsw"; pabsd "pabsd";
    pminsb "pminsb"; pmaxsb "pmaxsb"; pminuw "pminuw"; pmaxuw "pmaxuw";
    pminsd "pminsd"; pmaxsd "pmaxsd"; pminud "pminud"; pmaxud "pmaxud";
    pmulld "pmulld"; pmuldq "pmuldq"; pcmpeqq "pcmpeqq"; pcmpgtq "pcmpgtq"; phminposuw "phminposuw";
    pmovsxbw "pmovsxbw"; pmovsxbd "pmovsxbd"; pmovsxbq "pmovsxbq"; pmovsxwd "pmovsxwd"; pmovsxwq "pmovsxwq"; pmovsxdq "pmovsxdq";
    pmovzxbw "pmovzxbw"; pmovzxbd "pmovzxbd"; pmovzxbq "pmovzxbq"; pmovzxwd "pmovzxwd"; pmovzxwq "pmovzxwq"; pmovzxdq "pmovzxdq";
    unpcklps "unpcklps"; unpckhps "unpckhps"; unpcklpd "unpcklpd"; unpckhpd "unpckhpd";
    movsldup "movsldup"; movshdup "movshdup"; movddup "movddup";
}

float! {
    addps "addps"; addpd "addpd"; addss "addss"; addsd "addsd";
    subps "subps"; subpd "subpd"; subss "subss"; subsd "subsd";
    mulps "mulps"; mulpd "mulpd"; mulss "mulss"; mulsd "mulsd";
    divps "divps"; divpd "divpd"; divss "divss"; divsd "divsd";
    minps "minps"; minpd "minpd"; minss "minss"; minsd "minsd";
    maxps "maxps"; maxpd "maxpd"; maxss "maxss"; maxsd "maxsd";
    sqrtps "sqrtps"; sqrtpd "sqrtpd"; sqrtss "sqrtss"; sqrtsd "sqrtsd";
    addsubps "addsubps"; addsubpd "addsubpd"; haddps "haddps"; haddpd "haddpd"; hsubps "hsubps"; hsubpd "hsubpd";
    cvtps2pd "cvtps2pd"; cvtpd2ps "cvtpd2ps"; cvtss2sd "cvtss2sd"; cvtsd2ss "cvtsd2ss";
    cvtdq2ps "cvtdq2ps"; cvtps2dq "cvtps2dq"; cvttps2dq "cvttps2dq";
    cvtdq2pd "cvtdq2pd"; cvtpd2dq "cvtpd2dq"; cvttpd2dq "cvttpd2dq";
}

macro_rules! with_immediate {
    ($($name:ident $mnemonic:literal [$($value:literal)*];)*) => {$(
        #[doc = concat!("`", $mnemonic, "` with an immediate: (destination, source, immediate, guest MXCSR) -> (destination, raised flags).")]
        #[inline]
        pub fn $name(destination: u128, source: u128, immediate: u64, mxcsr: u32) -> (u128, u32) {
            let mut d = vector(destination);
            let mut control = quiet(mxcsr);
            match immediate {
                // SAFETY: register-to-register; raised flags stay in MXCSR, which `options` does not promise to keep.
                $($value if mxcsr == GATHERING => unsafe {
                    asm!(concat!($mnemonic, " {d}, {s}, ", $value), d = inout(xmm_reg) d,
                        s = in(xmm_reg) vector(source), options(nomem, nostack));
                    return (bits(d), 0);
                },)*
                // SAFETY: register-to-register between two loads of MXCSR; the host's value is put back.
                $($value => unsafe {
                    asm!("ldmxcsr [{m}]", concat!($mnemonic, " {d}, {s}, ", $value), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                        m = in(reg) &mut control, h = in(reg) &HOST_MXCSR, d = inout(xmm_reg) d,
                        s = in(xmm_reg) vector(source), options(nostack, preserves_flags));
                },)*
                _ => unreachable!("callers mask the immediate"),
            }
            (bits(d), control & 0x3f)
        }
    )*};
}

with_immediate! {
    cmpps "cmpps" [0 1 2 3 4 5 6 7];
    cmppd "cmppd" [0 1 2 3 4 5 6 7];
    cmpss "cmpss" [0 1 2 3 4 5 6 7];
    cmpsd "cmpsd" [0 1 2 3 4 5 6 7];
    roundps "roundps" [4];
    roundpd "roundpd" [4];
    roundss "roundss" [4];
    roundsd "roundsd" [4];
}

macro_rules! ordered_compare {
    ($($name:ident $mnemonic:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "`: (a, b, guest MXCSR) -> (RFLAGS bits CF, PF and ZF, raised flags).")]
        #[inline(always)]
        pub fn $name(a: u128, b: u128, mxcsr: u32) -> (u64, u32) {
            let mut control = quiet(mxcsr);
            let (carry, parity, zero): (u8, u8, u8);
            if mxcsr == GATHERING {
                // SAFETY: compares two registers; raised flags stay in MXCSR, which `options` does not promise to keep.
                unsafe {
                    asm!(concat!($mnemonic, " {a}, {b}"), "setc {c}", "setp {p}", "setz {z}", a = in(xmm_reg) vector(a),
                        b = in(xmm_reg) vector(b), c = out(reg_byte) carry, p = out(reg_byte) parity,
                        z = out(reg_byte) zero, options(nomem, nostack));
                }
                return (u64::from(carry) | u64::from(parity) << 2 | u64::from(zero) << 6, 0);
            }
            // SAFETY: compares two registers between two loads of MXCSR; the host's value is put back.
            unsafe {
                asm!("ldmxcsr [{m}]", concat!($mnemonic, " {a}, {b}"), "setc {c}", "setp {p}", "setz {z}", "stmxcsr [{m}]",
                    "ldmxcsr [{h}]", m = in(reg) &mut control, h = in(reg) &HOST_MXCSR, a = in(xmm_reg) vector(a),
                    b = in(xmm_reg) vector(b), c = out(reg_byte) carry, p = out(reg_byte) parity, z = out(reg_byte) zero,
                    options(nostack));
            }
            (u64::from(carry) | u64::from(parity) << 2 | u64::from(zero) << 6, control & 0x3f)
        }
    )*};
}

ordered_compare! {
    ucomiss "ucomiss"; ucomisd "ucomisd"; comiss "comiss"; comisd "comisd";
}

macro_rules! to_integer {
    ($($name:ident $mnemonic:literal $modifier:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "`: (source, guest MXCSR) -> (integer, raised flags).")]
        #[inline(always)]
        pub fn $name(source: u128, mxcsr: u32) -> (u64, u32) {
            let mut control = quiet(mxcsr);
            let integer: u64;
            if mxcsr == GATHERING {
                // SAFETY: register-to-register; raised flags stay in MXCSR, which `options` does not promise to keep.
                unsafe {
                    asm!(concat!($mnemonic, " {i", $modifier, "}, {s}"), i = out(reg) integer, s = in(xmm_reg) vector(source), options(nomem, nostack));
                }
                return (integer, 0);
            }
            // SAFETY: converts a register between two loads of MXCSR; the host's value is put back. A 32-bit result
            // clears the upper half of its register.
            unsafe {
                asm!("ldmxcsr [{m}]", concat!($mnemonic, " {i", $modifier, "}, {s}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                    m = in(reg) &mut control, h = in(reg) &HOST_MXCSR, i = out(reg) integer, s = in(xmm_reg) vector(source),
                    options(nostack, preserves_flags));
            }
            (integer, control & 0x3f)
        }
    )*};
}

to_integer! {
    cvtss2si32 "cvtss2si" ":e"; cvtss2si64 "cvtss2si" ":r"; cvtsd2si32 "cvtsd2si" ":e"; cvtsd2si64 "cvtsd2si" ":r";
    cvttss2si32 "cvttss2si" ":e"; cvttss2si64 "cvttss2si" ":r"; cvttsd2si32 "cvttsd2si" ":e"; cvttsd2si64 "cvttsd2si" ":r";
}

macro_rules! from_integer {
    ($($name:ident $mnemonic:literal $modifier:literal;)*) => {$(
        #[doc = concat!("`", $mnemonic, "`: (destination, integer, guest MXCSR) -> (destination, raised flags).")]
        #[inline(always)]
        pub fn $name(destination: u128, integer: u64, mxcsr: u32) -> (u128, u32) {
            let mut d = vector(destination);
            if mxcsr == GATHERING {
                // SAFETY: register-to-register; raised flags stay in MXCSR, which `options` does not promise to keep.
                unsafe {
                    asm!(concat!($mnemonic, " {d}, {i", $modifier, "}"), d = inout(xmm_reg) d, i = in(reg) integer, options(nomem, nostack));
                }
                return (bits(d), 0);
            }
            let mut control = quiet(mxcsr);
            // SAFETY: converts a register between two loads of MXCSR; the host's value is put back.
            unsafe {
                asm!("ldmxcsr [{m}]", concat!($mnemonic, " {d}, {i", $modifier, "}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                    m = in(reg) &mut control, h = in(reg) &HOST_MXCSR, i = in(reg) integer, d = inout(xmm_reg) d,
                    options(nostack, preserves_flags));
            }
            (bits(d), control & 0x3f)
        }
    )*};
}

from_integer! {
    cvtsi2ss32 "cvtsi2ss" ":e"; cvtsi2ss64 "cvtsi2ss" ":r"; cvtsi2sd32 "cvtsi2sd" ":e"; cvtsi2sd64 "cvtsi2sd" ":r";
}
