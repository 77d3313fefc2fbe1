//! Numbers with 128 significant bits, for functions whose 64-bit results must be the same on every host: integers only.
//!
//! Products, quotients and sums are cut, not rounded: each is at most one unit of its 128th bit too small in magnitude.
//! Rounding to 64 bits (APM1 6.4.6) happens once, at the end. What is computed with them is not known here.

use super::native::F80;
use super::stack::status;

/// Bias of an 80-bit exponent.
const BIAS: i32 = 16383;
/// Denormal operand, overflow, underflow, precision.
pub const DE: u16 = 2;
const OE: u16 = 8;
const UE: u16 = 16;
const PE: u16 = 32;

/// `bits * 2^(exponent - 127)`; the top bit is set, or all are clear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wide {
    /// Below zero.
    pub negative: bool,
    /// Of the top bit.
    pub exponent: i32,
    /// Significand.
    pub bits: u128,
}

/// High and low half of a product.
fn product(a: u128, b: u128) -> (u128, u128) {
    const LOW: u128 = u64::MAX as u128;
    let (a1, a0, b1, b0) = (a >> 64, a & LOW, b >> 64, b & LOW);
    let (low, high) = (a0 * b0, a1 * b1);
    let (left, right) = (a1 * b0, a0 * b1);
    let middle = (low >> 64) + (left & LOW) + (right & LOW);
    (high + (left >> 64) + (right >> 64) + (middle >> 64), low & LOW | middle << 64)
}

/// High half of a product: both as fractions of 2^128.
pub fn fraction_product(a: u128, b: u128) -> u128 {
    product(a, b).0
}

impl Wide {
    /// A constant.
    pub const fn new(exponent: i32, bits: u128) -> Self {
        Self { negative: false, exponent, bits }
    }

    /// A finite 80-bit number.
    pub fn from_f80((significand, sign_exponent): F80) -> Self {
        let exponent = i32::from(sign_exponent & 0x7fff).max(1) - BIAS;
        Self { negative: sign_exponent >> 15 != 0, exponent, bits: u128::from(significand) << 64 }.normalised()
    }

    /// An integer.
    pub fn from_int(value: i32) -> Self {
        let bits = u128::from(value.unsigned_abs());
        Self { negative: value < 0, exponent: 127, bits }.normalised()
    }

    fn normalised(self) -> Self {
        let shift = self.bits.leading_zeros();
        if shift == 128 {
            return Self { exponent: 0, ..self };
        }
        Self { exponent: self.exponent - shift as i32, bits: self.bits << shift, ..self }
    }

    /// True if it is zero.
    pub fn is_zero(self) -> bool {
        self.bits == 0
    }

    /// The same with the other sign, if `negate`.
    pub fn negated(self, negate: bool) -> Self {
        Self { negative: self.negative != negate, ..self }
    }

    /// Magnitude.
    pub fn abs(self) -> Self {
        Self { negative: false, ..self }
    }

    /// Times a power of two.
    pub fn scaled(self, by: i32) -> Self {
        Self { exponent: self.exponent + by, ..self }
    }

    /// Product.
    pub fn mul(self, other: Self) -> Self {
        let negative = self.negative != other.negative;
        let (high, low) = product(self.bits, other.bits);
        let exponent = self.exponent + other.exponent;
        if high >> 127 != 0 || high == 0 {
            return Self { negative, exponent: exponent + 1, bits: high }.normalised();
        }
        Self { negative, exponent, bits: high << 1 | low >> 127 }
    }

    /// Quotient; the divisor is not zero.
    pub fn div(self, other: Self) -> Self {
        let negative = self.negative != other.negative;
        if self.is_zero() {
            return Self { negative, ..self };
        }
        let (smaller, divisor) = (self.bits < other.bits, other.bits);
        // The first bit of the quotient is one.
        let mut rest = if smaller { self.bits.wrapping_shl(1).wrapping_sub(divisor) } else { self.bits - divisor };
        let mut bits = 1u128;
        for _ in 0..127 {
            let carry = rest >> 127 != 0;
            rest <<= 1;
            let fits = carry || rest >= divisor;
            if fits {
                rest = rest.wrapping_sub(divisor);
            }
            bits = bits << 1 | u128::from(fits);
        }
        Self { negative, exponent: self.exponent - other.exponent - i32::from(smaller), bits }
    }

    /// Sum.
    pub fn add(self, other: Self) -> Self {
        if self.is_zero() {
            return other;
        }
        if other.is_zero() {
            return self;
        }
        let swap = (other.exponent, other.bits) > (self.exponent, self.bits);
        let (large, small) = if swap { (other, self) } else { (self, other) };
        let shift = large.exponent.abs_diff(small.exponent);
        let shifted = small.bits.checked_shr(shift).unwrap_or(0);
        if large.negative != small.negative {
            return Self { bits: large.bits - shifted, ..large }.normalised();
        }
        match large.bits.checked_add(shifted) {
            Some(bits) => Self { bits, ..large },
            None => {
                let bits = large.bits.wrapping_add(shifted) >> 1 | 1 << 127;
                Self { bits, exponent: large.exponent + 1, ..large }
            }
        }
    }

    /// A magnitude below one as a fraction of 2^128.
    pub fn fraction(self) -> u128 {
        let shift = (-(self.exponent + 1)).unsigned_abs();
        self.bits.checked_shr(shift).unwrap_or(0)
    }

    /// A magnitude of at most one, in units of 2^-126.
    pub fn fraction_of_two(self) -> u128 {
        self.scaled(-2).fraction()
    }

    /// A fraction of `2^128`, times `2^scale`.
    pub fn from_fraction(bits: u128, scale: i32) -> Self {
        Self { negative: false, exponent: scale - 1, bits }.normalised()
    }

    /// Where 64 bits look exact and the true magnitude is a little off: below it, or above it.
    pub fn nudged(self, below: bool) -> Self {
        if self.bits as u64 != 0 || self.is_zero() {
            return self;
        }
        if !below {
            return Self { bits: self.bits | 1, ..self };
        }
        match self.bits {
            // The power of two itself: one unit of the binade below.
            bits if bits == 1 << 127 => Self { bits: u128::MAX, exponent: self.exponent - 1, ..self },
            bits => Self { bits: bits - 1, ..self },
        }
    }

    /// Rounds to 64 bits as the control word says: the number and its flags. `exact`: no bit was lost before.
    pub fn round(self, control: u16, exact: bool) -> (F80, u16) {
        let sign = u16::from(self.negative) << 15;
        if self.is_zero() {
            return ((0, sign), 0);
        }
        let biased = self.exponent + BIAS;
        let tiny = biased <= 0;
        let shift = if tiny { (1 - biased).unsigned_abs() } else { 0 };
        let kept = self.bits.checked_shr(shift).unwrap_or(0);
        let lost = !exact || shift > 127 || kept << shift != self.bits;
        let (significand, rest) = ((kept >> 64) as u64, kept as u64);
        let inexact = lost || rest != 0;
        let half = 1 << 63;
        let up = match control >> 10 & 3 {
            0 => rest > half || rest == half && (lost || significand & 1 != 0),
            1 => inexact && self.negative,
            2 => inexact && !self.negative,
            _ => false,
        };
        let (mut significand, carried) = significand.overflowing_add(u64::from(up));
        let mut exponent = if tiny { 0 } else { biased };
        if carried {
            (significand, exponent) = (half, exponent + 1);
        } else if tiny && significand >= half {
            exponent = 1;
        }
        let mut flags = if inexact { PE } else { 0 } | if up { status::C1 } else { 0 };
        if tiny && inexact {
            flags |= UE;
        }
        if exponent >= 0x7fff {
            // Infinity, or the largest number, as the rounding mode says.
            let to_infinity = match control >> 10 & 3 {
                0 => true,
                1 => self.negative,
                2 => !self.negative,
                _ => false,
            };
            let value = if to_infinity { (half, sign | 0x7fff) } else { (u64::MAX, sign | 0x7ffe) };
            return (value, OE | PE | if to_infinity { status::C1 } else { 0 });
        }
        ((significand, sign | exponent as u16), flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: i32) -> Wide {
        Wide::from_int(value)
    }

    #[test]
    fn arithmetic_of_integers_is_exact() {
        for a in [-7, -1, 1, 2, 3, 1000, 65_537] {
            for b in [-9, -2, 1, 2, 5, 999, 4_096] {
                assert_eq!(number(a).mul(number(b)), number(a * b), "{a} * {b}");
                assert_eq!(number(a * b).div(number(b)), number(a), "{a} * {b} / {b}");
                assert_eq!((number(a).add(number(b))).bits, number(a + b).bits, "{a} + {b}");
                assert!(a + b == 0 || number(a).add(number(b)) == number(a + b), "{a} + {b}");
            }
        }
        let third = number(1).div(number(3));
        assert_eq!((third.exponent, third.bits), (-2, 0xaaaa_aaaa_aaaa_aaaa_aaaa_aaaa_aaaa_aaaa));
        assert_eq!(number(3).div(number(4)), Wide::new(-1, 3 << 126));
        assert_eq!(Wide::from_fraction(1 << 127, 0).fraction(), 1 << 127);
    }

    #[test]
    fn rounding_goes_where_the_control_word_says() {
        let value = Wide::new(0, 1 << 127 | 1 << 63);
        let of = |value: Wide, mode: u16, exact| value.round(mode << 10, exact);
        let one = 1 << 63;
        assert_eq!(of(value, 0, true), ((one, 0x3fff), PE));
        assert_eq!(of(value, 0, false), ((one + 1, 0x3fff), PE | status::C1));
        assert_eq!(of(value, 1, true), ((one, 0x3fff), PE));
        assert_eq!(of(value, 2, true), ((one + 1, 0x3fff), PE | status::C1));
        assert_eq!(of(value.negated(true), 1, true), ((one + 1, 0xbfff), PE | status::C1));
        assert_eq!(of(Wide::new(0, u128::MAX), 0, true), ((one, 0x4000), PE | status::C1));
        assert_eq!(of(Wide::new(-16_383, 1 << 127), 0, true), ((one >> 1, 0), 0));
        assert_eq!(of(Wide::new(-16_383, u128::MAX), 0, true), ((one, 1), PE | UE | status::C1));
        assert_eq!(of(Wide::new(-20_000, 1 << 127), 2, true), ((1, 0), PE | UE | status::C1));
        assert_eq!(of(Wide::new(16_384, 1 << 127), 0, true), ((one, 0x7fff), OE | PE | status::C1));
        assert_eq!(of(Wide::new(16_384, 1 << 127), 3, true), ((u64::MAX, 0x7ffe), OE | PE));
        assert_eq!(Wide::new(0, 1 << 127).nudged(true), Wide::new(-1, u128::MAX));
    }
}
