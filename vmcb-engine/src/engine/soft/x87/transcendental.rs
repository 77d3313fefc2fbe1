//! FSIN, FCOS, FSINCOS, FPTAN, FPATAN, F2XM1, FYL2X, FYL2XP1 (APM5), by integers: processors differ in their last bits, and
//! a guest must compute the same wherever it runs.
//!
//! Results are those of the exact function, rounded as the control word says, but for cases closer to a boundary than some
//! 2^-50 of a unit. Arguments of the circular functions are reduced by as many bits of pi as they need, where processors
//! have 66 or 68. Outside of what the manual defines: F2XM1 leaves arguments beyond one alone, FYL2XP1 takes any above -1 and
//! answers others as an invalid operation. What is exact or an exception by the manual (zeros, infinities, NaNs) is done by
//! the host's processor as in [`super::native`]: there all agree.

use super::native::{self as n, F80};
use super::stack::{INDEFINITE, status};
use super::wide::{DE, Wide, fraction_product};

const IE: u16 = 1;
const ONE: F80 = (1 << 63, 0x3fff);
const PI: Wide = Wide::new(1, PI_BITS);
const HALF_PI: Wide = Wide::new(0, PI_BITS);
const QUARTER_PI: Wide = Wide::new(-1, PI_BITS);
const THREE_QUARTERS_PI: Wide = Wide::new(1, 0x96cb_e3f9_990e_91a7_9394_c9e8_a0a5_159c);
const PI_BITS: u128 = 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1;
const LN_2: Wide = Wide::new(-1, 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af);
const LOG2_E: Wide = Wide::new(0, 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88);
/// 2/pi as a fraction of 2^256, lowest word first.
const TWO_OVER_PI: [u64; 4] =
    [0xfe51_63ab_debb_c561, 0xdb62_9599_3c43_9041, 0xfc27_57d1_f534_ddc0, 0xa2f9_836e_4e44_1529];
/// Arctangents of sixteenths, from 1/16 to 1.
const ARCTANGENTS: [Wide; 16] = [
    Wide::new(-5, 0xffaa_ddb9_67ef_4e36_cb27_92dc_0e2e_0d51),
    Wide::new(-4, 0xfead_d4d5_617b_6e32_c897_989f_3e88_8ef7),
    Wide::new(-3, 0xbdcb_da5e_72d8_1134_7b0b_4f88_1c9c_7487),
    Wide::new(-3, 0xfadb_afc9_6406_eb15_6dc7_9ef5_f7a2_17e5),
    Wide::new(-2, 0x9b13_b9b8_3f5e_5e69_c5ab_b498_d27a_f328),
    Wide::new(-2, 0xb7b0_ca0f_26f7_8473_8aa3_2122_dcfe_4483),
    Wide::new(-2, 0xd327_761e_611f_e5b6_427c_95e9_001e_7136),
    Wide::new(-2, 0xed63_382b_0dda_7b45_6fe4_45ec_bc3a_8d03),
    Wide::new(-1, 0x832b_f4a6_d986_7e2a_4b6a_09cb_61a5_15c0),
    Wide::new(-1, 0x8f00_5d5e_f7f5_9f9b_5c83_5e16_65c4_3747),
    Wide::new(-1, 0x9a2f_80e6_71bd_da20_4226_f8e2_204f_f3bc),
    Wide::new(-1, 0xa4bc_7d19_34f7_0924_19a8_7f2a_457d_ac9e),
    Wide::new(-1, 0xaeac_4c38_b4d8_c080_1472_5e2f_3e52_070a),
    Wide::new(-1, 0xb805_3e2b_c231_9e73_cb2d_a552_10a4_443d),
    Wide::new(-1, 0xc0ce_85b8_ac52_6640_89dd_62c4_6e92_fa24),
    Wide::new(-1, PI_BITS),
];
/// One, where fractions of 2^127 are summed.
const UNIT: u128 = 1 << 127;

/// NaN, infinity, or an encoding that is no number.
fn is_wild((significand, sign_exponent): F80) -> bool {
    let exponent = sign_exponent & 0x7fff;
    exponent == 0x7fff || (exponent != 0 && significand >> 63 == 0)
}

fn is_special(a: F80) -> bool {
    is_wild(a) || a.0 == 0
}

fn is_infinite((significand, sign_exponent): F80) -> bool {
    significand == 1 << 63 && sign_exponent & 0x7fff == 0x7fff
}

/// DE for an operand without a full exponent.
fn denormal((significand, sign_exponent): F80) -> u16 {
    if sign_exponent & 0x7fff == 0 && significand != 0 { DE } else { 0 }
}

/// What is left of an angle by multiples of a quarter turn: how many (of four), and the rest, at most an eighth of a turn.
fn reduce(angle: Wide) -> (u64, Wide) {
    if angle.exponent < -1 {
        return (0, angle);
    }
    // significand * 2/pi: five words with the point 319 - exponent bits above the lowest.
    let significand = u128::from((angle.bits >> 64) as u64);
    let (mut words, mut carry) = ([0u64; 6], 0u128);
    for (word, part) in words.iter_mut().zip(TWO_OVER_PI) {
        carry += significand * u128::from(part);
        *word = carry as u64;
        carry >>= 64;
    }
    words[4] = carry as u64;
    // Moved up so that the point is between the fifth and the sixth word.
    let up = (angle.exponent + 1).unsigned_abs();
    if up > 0 && up < 64 {
        for at in (1..6).rev() {
            words[at] = words[at] << up | words[at - 1] >> (64 - up);
        }
        words[0] <<= up;
    }
    let mut turns = words[5];
    let above_half = words[4] >> 63 != 0;
    if above_half {
        turns = turns.wrapping_add(1);
        let mut borrow = true;
        for word in &mut words[..5] {
            let (negated, carried) = (!*word).overflowing_add(u64::from(borrow));
            (*word, borrow) = (negated, carried);
        }
    }
    // The top 128 bits that are not zero.
    let mut scale = 0;
    while words[4] == 0 && scale > -256 {
        words.copy_within(0..4, 1);
        words[0] = 0;
        scale -= 64;
    }
    let shift = words[4].leading_zeros();
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let mut bits = pair(words[4], words[3]);
    if shift > 0 && shift < 64 {
        bits = bits << shift | u128::from(words[2] >> (64 - shift));
    }
    let rest = Wide::from_fraction(bits, scale - shift as i32).mul(HALF_PI).negated(above_half);
    let turns = if angle.negative { turns.wrapping_neg() } else { turns };
    (turns & 3, rest.negated(angle.negative))
}

/// `1 - z/(a(a+1)) (1 - z/((a+2)(a+3)) (1 - ...))`, z a fraction of 2^128, as a fraction of 2^127.
fn alternating(z: u128, first: u128) -> u128 {
    let mut sum = UNIT;
    for term in (0..17).rev() {
        let a = first + 2 * term;
        sum = UNIT - fraction_product(z, sum) / (a * (a + 1));
    }
    sum
}

/// Sine of at most an eighth of a turn.
fn sine_of(angle: Wide) -> Wide {
    let z = angle.mul(angle).fraction();
    angle.mul(Wide::from_fraction(alternating(z, 2), 1)).nudged(true)
}

/// Cosine of at most an eighth of a turn.
fn cosine_of(angle: Wide) -> Wide {
    let z = angle.mul(angle).fraction();
    Wide::from_fraction(alternating(z, 1), 1).nudged(true)
}

/// Sine and cosine of any angle.
fn circle(angle: Wide) -> (Wide, Wide) {
    let (turns, rest) = reduce(angle);
    let (sine, cosine) = (sine_of(rest), cosine_of(rest));
    match turns {
        0 => (sine, cosine),
        1 => (cosine, sine.negated(true)),
        2 => (sine.negated(true), cosine.negated(true)),
        _ => (cosine.negated(true), sine),
    }
}

/// Beyond 2^63: nothing is computed, and C2 says so.
fn is_far(a: F80) -> bool {
    a.1 & 0x7fff >= 0x3fff + 63
}

/// FSIN.
pub fn sine(a: F80, control: u16) -> (F80, u16) {
    if is_special(a) {
        let (value, host) = n::sine(a, control);
        return (value, host & !status::C2);
    }
    if is_far(a) {
        return (a, status::C2);
    }
    let (value, flags) = circle(Wide::from_f80(a)).0.round(control, false);
    (value, flags | denormal(a))
}

/// FCOS.
pub fn cosine(a: F80, control: u16) -> (F80, u16) {
    if is_special(a) {
        let (value, host) = n::cosine(a, control);
        return (value, host & !status::C2);
    }
    if is_far(a) {
        return (a, status::C2);
    }
    let (value, flags) = circle(Wide::from_f80(a)).1.round(control, false);
    (value, flags | denormal(a))
}

/// FSINCOS: (sine, cosine), which is on top. C1 is of the cosine.
pub fn sine_cosine(a: F80, control: u16) -> ((F80, F80), u16) {
    if is_special(a) {
        let (values, host) = n::sine_cosine(a, control);
        return (values, host & !status::C2);
    }
    if is_far(a) {
        return ((a, a), status::C2);
    }
    let (sine, cosine) = circle(Wide::from_f80(a));
    let ((sine, of_sine), (cosine, of_cosine)) = (sine.round(control, false), cosine.round(control, false));
    ((sine, cosine), of_sine & !status::C1 | of_cosine | denormal(a))
}

/// FPTAN: (tangent, one), which is on top.
pub fn tangent(a: F80, control: u16) -> ((F80, F80), u16) {
    if is_special(a) {
        let (values, host) = n::tangent(a, control);
        return (values, host & !status::C2);
    }
    if is_far(a) {
        return ((a, a), status::C2);
    }
    let (sine, cosine) = circle(Wide::from_f80(a));
    let angle = Wide::from_f80(a);
    // A tiny angle's tangent is above it, though its sine is below.
    let tangent = if angle.exponent < -40 { small_tangent(angle) } else { sine.div(cosine) };
    let (value, flags) = tangent.round(control, false);
    ((value, ONE), flags | denormal(a))
}

/// x + x^3/3; what follows is below the 128th bit.
fn small_tangent(angle: Wide) -> Wide {
    let third = Wide::from_int(1).div(Wide::from_int(3));
    let cube = angle.mul(angle).mul(angle).mul(third);
    angle.add(cube).nudged(false)
}

/// Arctangent of 0 < q <= 1.
fn arctangent_of(q: Wide) -> Wide {
    // To the nearest sixteenth.
    let sixteenths = (q.fraction_of_two() + (1 << 121)) >> 122;
    let at = Wide::from_int(sixteenths as i32).scaled(-4);
    let rest = if sixteenths == 0 { q } else { q.add(at.negated(true)).div(Wide::from_int(1).add(q.mul(at))) };
    let z = rest.mul(rest).fraction();
    let mut sum = UNIT / 31;
    for term in (0..15u128).rev() {
        sum = UNIT / (2 * term + 1) - fraction_product(z, sum);
    }
    let small = rest.mul(Wide::from_fraction(sum, 1));
    match sixteenths {
        0 => small.nudged(true),
        _ => ARCTANGENTS[sixteenths as usize - 1].add(small),
    }
}

/// FPATAN: the angle of the point (a, b), b = st(1).
pub fn arctangent(a: F80, b: F80, control: u16) -> (F80, u16) {
    let nan = |value| is_wild(value) && !is_infinite(value);
    if nan(a) || nan(b) {
        return n::arctangent(a, b, control);
    }
    let (negative, left) = (b.1 >> 15 != 0, a.1 >> 15 != 0);
    let flags_of_operands = denormal(a) | denormal(b);
    let angle = match (is_infinite(a), is_infinite(b)) {
        (true, true) if left => THREE_QUARTERS_PI,
        (true, true) => QUARTER_PI,
        (false, true) => HALF_PI,
        (true, false) if left => PI,
        (true, false) => return ((0, b.1 & 0x8000), flags_of_operands),
        (false, false) if b.0 == 0 && left => PI,
        (false, false) if b.0 == 0 => return ((0, b.1 & 0x8000), flags_of_operands),
        (false, false) if a.0 == 0 => HALF_PI,
        (false, false) => angle_of(Wide::from_f80(a), Wide::from_f80(b).abs()),
    };
    let (value, flags) = angle.negated(negative).round(control, false);
    (value, flags | flags_of_operands)
}

/// The angle of a point above the axis.
fn angle_of(x: Wide, y: Wide) -> Wide {
    let (left, x) = (x.negative, x.abs());
    let steep = (y.exponent, y.bits) > (x.exponent, x.bits);
    let angle = if steep { arctangent_of(x.div(y)) } else { arctangent_of(y.div(x)) };
    match (steep, left) {
        (false, false) => angle,
        (false, true) => PI.add(angle.negated(true)),
        (true, false) => HALF_PI.add(angle.negated(true)),
        (true, true) => HALF_PI.add(angle),
    }
}

/// FYL2X with y = 1, of x > 0: not zero for x other than 1.
fn log2(x: Wide) -> Wide {
    // x = m * 2^k with m between the roots of 1/2 and 2.
    const ROOT: u128 = 0xb504_f333_f9de_6484_597d_89b3_754a_be9f;
    let above = x.bits > ROOT;
    let m = Wide { exponent: if above { -1 } else { 0 }, ..x };
    let k = x.exponent + i32::from(above);
    let one = Wide::from_int(1);
    let u = m.add(one.negated(true)).div(m.add(one));
    log2_ratio(u).add(Wide::from_int(k))
}

/// log2((1 + u) / (1 - u)) for small u.
fn log2_ratio(u: Wide) -> Wide {
    let z = u.mul(u).fraction();
    let mut sum = 0;
    for term in (0..28u128).rev() {
        sum = UNIT / (2 * term + 1) + fraction_product(z, sum);
    }
    u.mul(Wide::from_fraction(sum, 1)).mul(LOG2_E).scaled(1)
}

/// The exponent of an exact power of two.
fn power(x: Wide) -> Option<i32> {
    (x.bits == UNIT).then_some(x.exponent)
}

/// FYL2X: b * log2(a).
pub fn logarithm(a: F80, b: F80, control: u16) -> (F80, u16) {
    if is_special(a) || is_special(b) || a.1 >> 15 != 0 || a == ONE {
        return n::logarithm(a, b, control);
    }
    let (x, y) = (Wide::from_f80(a), Wide::from_f80(b));
    let (value, flags) = match power(x) {
        Some(k) => Wide::from_int(k).mul(y).round(control, true),
        None => log2(x).mul(y).round(control, false),
    };
    (value, flags | denormal(a) | denormal(b))
}

/// FYL2XP1: b * log2(a + 1).
pub fn logarithm_plus_one(a: F80, b: F80, control: u16) -> (F80, u16) {
    if is_wild(a) && !is_infinite(a) || is_wild(b) && !is_infinite(b) {
        return n::logarithm_plus_one(a, b, control);
    }
    let below = a.1 >> 15 != 0 && (a.1 & 0x7fff) >= 0x3fff;
    if below {
        return (INDEFINITE, IE);
    }
    if is_special(a) || is_special(b) {
        return n::logarithm_plus_one(a, b, control);
    }
    let (x, y, one) = (Wide::from_f80(a), Wide::from_f80(b), Wide::from_int(1));
    let near = x.exponent < -3;
    let sum = x.add(one);
    let (value, flags) = match power(sum).filter(|_| !near) {
        Some(k) if x.exponent < 64 => Wide::from_int(k).mul(y).round(control, true),
        _ if near => log2_ratio(x.div(x.add(one.scaled(1)))).mul(y).round(control, false),
        _ => log2(sum).mul(y).round(control, false),
    };
    (value, flags | denormal(a) | denormal(b))
}

/// F2XM1: 2^a - 1.
pub fn power_of_two(a: F80, control: u16) -> (F80, u16) {
    if is_special(a) {
        return n::power_of_two(a, control);
    }
    let x = Wide::from_f80(a);
    if (x.exponent, x.bits) >= (0, UNIT) {
        return match (power(x), x.negative) {
            (Some(0), false) => (ONE, 0),
            (Some(0), true) => ((1 << 63, 0xbffe), 0),
            _ => (a, 0),
        };
    }
    // e^t - 1 = t (1 + t/2 (1 + t/3 (1 + ...))), in fractions of 2^126.
    let t = x.abs().mul(LN_2);
    let (fraction, one) = (t.fraction(), 1u128 << 126);
    let mut sum = one;
    for term in (2..36u128).rev() {
        sum = one + fraction_product(fraction, sum) / term;
    }
    let grown = t.mul(Wide::from_fraction(sum, 2));
    // e^-t - 1 = -(e^t - 1) / e^t.
    let result = if x.negative { grown.div(grown.add(Wide::from_int(1))).negated(true) } else { grown };
    let (value, flags) = result.round(control, false);
    (value, flags | denormal(a))
}

#[cfg(test)]
mod tests;
