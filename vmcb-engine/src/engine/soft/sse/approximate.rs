//! RCPPS, RCPSS, RSQRTPS, RSQRTSS: the instructions whose results are not specified to the bit, and differ between
//! processors. Here they are the correctly rounded result cut to 12 bits of fraction, computed by integers, so that every
//! host computes the same (APM4: relative error at most 1.5 * 2^-12).

const SIGN: u32 = 1 << 31;
const INFINITY: u32 = 0x7f80_0000;
const QUIET: u32 = 1 << 22;
const INDEFINITE: u32 = 0xffc0_0000;

/// Applies to all four elements.
pub fn packed(source: u128, f: fn(u32) -> u32) -> u128 {
    (0..4).fold(0, |all, i| all | u128::from(f((source >> (32 * i)) as u32)) << (32 * i))
}

/// Applies to the lowest element, and keeps the others of the destination.
pub fn scalar(destination: u128, source: u128, f: fn(u32) -> u32) -> u128 {
    destination >> 32 << 32 | u128::from(f(source as u32))
}

/// 1 / x. Denormals count as zero, and so do results too small to be normal.
pub fn reciprocal(x: u32) -> u32 {
    let (sign, exponent, fraction) = (x & SIGN, x >> 23 & 0xff, x & 0x7f_ffff);
    match (exponent, fraction) {
        (0, _) => sign | INFINITY,
        (0xff, 0) => sign,
        (0xff, _) => x | QUIET,
        _ => {
            // x = m * 2^(e-127-23), m in [2^23, 2^24): 2^47 / m is in (2^23, 2^24].
            let quotient = (1u64 << 47) / u64::from(1 << 23 | fraction);
            let (mantissa, result) =
                if fraction == 0 { (1 << 23, 254 - exponent as i32) } else { (quotient, 253 - exponent as i32) };
            if result <= 0 { sign } else { sign | (result as u32) << 23 | (mantissa as u32 & 0x7f_f800) }
        }
    }
}

/// 1 / sqrt(x). Denormals count as zero.
pub fn reciprocal_root(x: u32) -> u32 {
    let (sign, exponent, fraction) = (x & SIGN, x >> 23 & 0xff, x & 0x7f_ffff);
    match (exponent, fraction) {
        (0, _) => sign | INFINITY,
        (0xff, f) if f != 0 => x | QUIET,
        _ if sign != 0 => INDEFINITE,
        (0xff, _) => 0,
        _ => {
            // x = m * 2^(e-150), made an even power: x = n * 2^(2k), n in [2^23, 2^25).
            let unbiased = exponent as i32 - 150;
            let odd = unbiased & 1;
            let n = u64::from(1 << 23 | fraction) << odd;
            let k = (unbiased - odd) / 2;
            // 1/sqrt(n) * 2^36 is in (2^23.5, 2^24.5].
            let root = ((1u128 << 72) / u128::from(n)).isqrt() as u64;
            let high = root >> 24 != 0;
            let mantissa = if high { root >> 1 } else { root };
            let result = -k - 36 + 150 + i32::from(high);
            (result as u32) << 23 | (mantissa as u32 & 0x7f_f800)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_stay_within_the_manual() {
        for i in 0..2_000_000u32 {
            let x = f32::from_bits(0x0080_0000 + i.wrapping_mul(2_654_435_761) % 0x7e00_0000);
            let error = |approximate: u32, exact: f64| ((f64::from(f32::from_bits(approximate)) - exact) / exact).abs();
            if f64::from(x) < 8e37 {
                assert!(error(reciprocal(x.to_bits()), 1.0 / f64::from(x)) < 1.5 / 4096.0, "1/{x:e}");
            }
            assert!(error(reciprocal_root(x.to_bits()), 1.0 / f64::from(x).sqrt()) < 1.5 / 4096.0, "rsqrt {x:e}");
        }
    }

    #[test]
    fn special_values() {
        let f = f32::to_bits;
        assert_eq!(reciprocal(f(1.0)), f(1.0));
        assert_eq!(reciprocal(f(-0.0)), f(f32::NEG_INFINITY));
        assert_eq!(reciprocal(f(f32::INFINITY)), 0);
        assert_eq!(reciprocal_root(f(4.0)), f(0.5));
        assert_eq!(reciprocal_root(f(-4.0)), INDEFINITE);
        assert_eq!(reciprocal_root(f(f32::INFINITY)), 0);
    }
}
