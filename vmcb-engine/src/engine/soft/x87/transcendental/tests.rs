//! Tests of the transcendental functions: bits that never change, and the host's own within its error.
//!
//! The expected bits are those of the exact functions, rounded; they were computed with 700-bit arithmetic of another making.

use proptest::prelude::*;

use self::Function::*;
use super::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Function {
    Sine,
    Cosine,
    Tangent,
    Arctangent,
    PowerOfTwo,
    Logarithm,
    LogarithmPlusOne,
}

const ALL: [Function; 7] = [Sine, Cosine, Tangent, Arctangent, PowerOfTwo, Logarithm, LogarithmPlusOne];

impl Function {
    fn ours(self, a: F80, b: F80, control: u16) -> (F80, u16) {
        match self {
            Sine => sine(a, control),
            Cosine => cosine(a, control),
            Tangent => {
                let ((tangent, one), flags) = tangent(a, control);
                assert!(one == ONE || flags & status::C2 != 0 || is_special(a));
                (tangent, flags)
            }
            Arctangent => arctangent(a, b, control),
            PowerOfTwo => power_of_two(a, control),
            Logarithm => logarithm(a, b, control),
            LogarithmPlusOne => logarithm_plus_one(a, b, control),
        }
    }

    fn hosts(self, a: F80, b: F80, control: u16) -> (F80, u16) {
        match self {
            Sine => n::sine(a, control),
            Cosine => n::cosine(a, control),
            Tangent => {
                let ((tangent, _), flags) = n::tangent(a, control);
                (tangent, flags)
            }
            Arctangent => n::arctangent(a, b, control),
            PowerOfTwo => n::power_of_two(a, control),
            Logarithm => n::logarithm(a, b, control),
            LogarithmPlusOne => n::logarithm_plus_one(a, b, control),
        }
    }

    /// Arguments of which the manual says what the answer is, and for which a processor's short pi does no harm.
    fn is_defined(self, a: F80) -> bool {
        let exponent = i32::from(a.1 & 0x7fff) - 0x3fff;
        match self {
            Sine | Cosine | Tangent => exponent < 0 || is_special(a) || is_far(a),
            PowerOfTwo => exponent < 0 || is_special(a) && !is_wild(a),
            LogarithmPlusOne => exponent < -2,
            Arctangent | Logarithm => true,
        }
    }
}

#[test]
fn results_are_the_exact_ones_rounded() {
    for (function, a, b, mode, expected) in GOLDEN {
        let (value, flags) = function.ours(*a, *b, 0x037f | mode << 10);
        assert_eq!(value, *expected, "{function:?} {a:x?} {b:x?} mode {mode}: {flags:#x}");
        assert_eq!(flags & 0x20, 0x20, "{function:?} {a:x?} {b:x?} is not exact");
    }
}

#[test]
fn exact_results_are_exact() {
    let two = (1 << 63, 0x4000);
    let eight = (1 << 63, 0x4002);
    let half = (1 << 63, 0x3ffe);
    let minus = |value: F80| (value.0, value.1 | 0x8000);
    for (function, a, b, expected) in [
        (PowerOfTwo, ONE, ONE, ONE),
        (PowerOfTwo, minus(ONE), ONE, minus(half)),
        (Logarithm, eight, two, (0xc000_0000_0000_0000, 0x4001)),
        (Logarithm, half, two, minus(two)),
        (Logarithm, ONE, two, (0, 0)),
        (LogarithmPlusOne, minus(half), two, minus(two)),
        (Sine, (0, 0x8000), ONE, (0, 0x8000)),
        (Cosine, (0, 0), ONE, ONE),
        (Arctangent, two, (0, 0x8000), (0, 0x8000)),
    ] {
        let (value, flags) = function.ours(a, b, 0x037f);
        assert_eq!((value, flags & 0x7f), (expected, 0), "{function:?} {a:x?}");
    }
    assert_eq!(LogarithmPlusOne.ours(minus(two), ONE, 0x037f), (INDEFINITE, IE));
    assert_eq!(Sine.ours((1 << 63, 0x403e), ONE, 0x037f), ((1 << 63, 0x403e), status::C2));
}

/// Sine and cosine, one after the other, are what they are together.
#[test]
fn sine_and_cosine_are_the_same_together() {
    for (_, a, _, mode, _) in GOLDEN {
        let control = 0x037f | mode << 10;
        let ((sine_of, cosine_of), _) = sine_cosine(*a, control);
        assert_eq!((sine_of, cosine_of), (sine(*a, control).0, cosine(*a, control).0));
    }
}

/// Numbers of all kinds, most of them near one.
fn number() -> impl Strategy<Value = F80> {
    let near = (any::<u64>(), 0x3fe0u16..0x4020, any::<bool>())
        .prop_map(|(bits, exponent, negative)| (bits | 1 << 63, exponent | u16::from(negative) << 15));
    let any_number = (any::<u64>(), any::<u16>()).prop_map(|(bits, exponent)| (bits, exponent));
    let special = prop_oneof![Just(0u64), Just(1 << 63), Just(3 << 62), Just(u64::MAX), Just(1)];
    let kinds = (
        special,
        prop_oneof![Just(0u16), Just(1), Just(0x3fff), Just(0x7fff), Just(0x8000), Just(0xbfff), Just(0xffff)],
    );
    prop_oneof![6 => near, 1 => any_number, 2 => kinds]
}

/// Distance in units of the last place, of numbers with the same sign and nearly the same exponent.
fn distance(a: F80, b: F80) -> u128 {
    let line = |(significand, exponent): F80| {
        let exponent = u128::from(exponent & 0x7fff).max(1);
        (exponent << 63) + u128::from(significand) - (1 << 63)
    };
    if (a.1 ^ b.1) >> 15 != 0 && (a.0 | b.0) != 0 { u128::MAX } else { line(a).abs_diff(line(b)) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn the_host_agrees_within_its_error(a in number(), b in number(), which in 0usize..7, mode in 0u16..4) {
        let function = ALL[which];
        let small = (a.0 | 1 << 63, a.1 & 0x8000 | (0x3fe0 + (a.1 & 15)));
        let a = if function.is_defined(a) { a } else { small };
        let control = 0x037f | mode << 10;
        let (ours, flags) = function.ours(a, b, control);
        let (hosts, host_flags) = function.hosts(a, b, control);
        let computed = host_flags & status::C2 == 0 || is_special(a);
        prop_assert!(!computed || distance(ours, hosts) <= 2, "{:?} {:x?} {:x?}: {:x?}, host {:x?}", function, a, b, ours, hosts);
        // Invalid, denormal, divide by zero; out of range.
        let told = if is_special(a) { 5 } else { 7 | status::C2 };
        let told = if matches!(function, Sine | Cosine | Tangent) { told } else { told & 7 };
        prop_assert_eq!(flags & told, host_flags & told, "{:?} {:x?} {:x?}", function, a, b);
    }

    #[test]
    fn nothing_panics(a in (any::<u64>(), any::<u16>()), b in (any::<u64>(), any::<u16>()), which in 0usize..7, control in any::<u16>()) {
        let ((significand, exponent), _) = ALL[which].ours(a, b, control);
        prop_assert!(significand >> 63 != 0 || exponent & 0x7fff == 0 || significand == a.0, "a number of the usual form");
    }
}

/// Function, st, st(1), rounding mode, result.
type Golden = (Function, F80, F80, u16, F80);

const GOLDEN: &[Golden] = &[
    (Sine, (0x9e2f_eb89_414c_343c, 0xbffc), (0x8000_0000_0000_0000, 0x3fff), 1, (0x9d8f_0beb_bd57_fb75, 0xbffc)),
    (Cosine, (0x8741_c7a8_7ce4_2c82, 0xbffc), (0x8000_0000_0000_0000, 0x3fff), 3, (0xfdc5_211e_3c23_4faa, 0x3ffe)),
    (Tangent, (0xcd44_7e35_b8b6_d8fe, 0xbfff), (0x8000_0000_0000_0000, 0x3fff), 0, (0xf365_62d4_6c05_3799, 0x4003)),
    (Arctangent, (0x8000_0000_0000_0007, 0x3fb5), (0x876f_3787_b9d1_79e0, 0xc01b), 2, (0xc90f_daa2_2168_c234, 0xbfff)),
    (PowerOfTwo, (0xc2cd_789a_3802_08a9, 0x3ffb), (0x8000_0000_0000_0000, 0x3fff), 1, (0x8b93_dc6d_1b7f_c5b7, 0x3ffb)),
    (Logarithm, (0x8000_0000_0000_0005, 0x4000), (0xd52b_82f6_be3e_dc0a, 0xbffb), 3, (0xd52b_82f6_be3e_dc16, 0xbffb)),
    (
        LogarithmPlusOne,
        (0xcda9_8f1d_3099_fdf5, 0x3ffc),
        (0x96c8_da19_64b2_d2bc, 0xc002),
        3,
        (0x9f41_adcd_516c_6c6c, 0xc000),
    ),
    (Sine, (0x8c7e_134f_5dfb_d3d1, 0xbfe5), (0x8000_0000_0000_0000, 0x3fff), 3, (0x8c7e_134f_5dfb_d20d, 0xbfe5)),
    (Cosine, (0xc748_03e3_1ba1_6215, 0x403b), (0x8000_0000_0000_0000, 0x3fff), 2, (0xd3da_2c12_dfd1_072c, 0xbffe)),
    (Tangent, (0xcefb_c8d6_0b21_fbac, 0xc002), (0x8000_0000_0000_0000, 0x3fff), 3, (0xc6a5_1cc0_92cd_3187, 0xbffd)),
    (Arctangent, (0xba18_90c7_8092_b4d4, 0xbffd), (0xbb6f_e507_8c5f_e8f8, 0xc002), 3, (0xcd08_3380_b84c_4d51, 0xbfff)),
    (PowerOfTwo, (0xc89d_a11b_6239_7bc7, 0xbffb), (0x8000_0000_0000_0000, 0x3fff), 3, (0x8670_c036_742c_6417, 0xbffb)),
    (Logarithm, (0xed14_475b_349a_ae90, 0x4000), (0xf0e6_42f4_3328_ad08, 0x4002), 1, (0xe38e_82e3_5900_5982, 0x4003)),
    (
        LogarithmPlusOne,
        (0x9cc9_af4e_c954_6b43, 0xbffc),
        (0xad5d_b79b_a2a7_ae1f, 0x3ffd),
        0,
        (0xa643_a176_f4f8_001b, 0xbffb),
    ),
    (Sine, (0x8000_0000_0000_0000, 0x3fcb), (0x8000_0000_0000_0000, 0x3fff), 2, (0x8000_0000_0000_0000, 0x3fcb)),
    (Cosine, (0x8000_0000_0000_0001, 0xbfe8), (0x8000_0000_0000_0000, 0x3fff), 1, (0xffff_ffff_fffe_0000, 0x3ffe)),
    (Tangent, (0xb3df_44a4_7467_537a, 0x3fff), (0x8000_0000_0000_0000, 0x3fff), 1, (0xbf88_1725_98af_5d28, 0x4001)),
    (Arctangent, (0xb023_580c_cbd3_f5e0, 0xc01a), (0xb586_fca7_fa0b_8518, 0xc031), 2, (0xc90f_db9a_87c2_514e, 0xbfff)),
    (PowerOfTwo, (0xf5bb_9188_b805_99e9, 0xbfa9), (0x8000_0000_0000_0000, 0x3fff), 0, (0xaa54_3428_118f_cea1, 0xbfa9)),
    (Logarithm, (0xf9c0_8fef_fa1b_1bf1, 0x3ffd), (0x87db_f924_a604_8457, 0x4002), 3, (0x8cb3_c170_82cd_9277, 0xc002)),
    (
        LogarithmPlusOne,
        (0xffff_ffff_ffff_ffff, 0xbfcb),
        (0xeacc_110e_4f73_fd94, 0x3ffb),
        3,
        (0xa95e_ce08_93b0_7eba, 0xbfc9),
    ),
    (Sine, (0xd1c5_1f86_9730_82d6, 0x3fc2), (0x8000_0000_0000_0000, 0x3fff), 2, (0xd1c5_1f86_9730_82d6, 0x3fc2)),
    (Cosine, (0xb34d_e73d_60c2_90d0, 0xbffb), (0x8000_0000_0000_0000, 0x3fff), 1, (0xff04_fcfd_ba08_96eb, 0x3ffe)),
    (Tangent, (0xf01d_bf29_1abb_8ba3, 0x4002), (0x8000_0000_0000_0000, 0x3fff), 3, (0xd7ee_c736_d520_d0ce, 0xbffe)),
    (Arctangent, (0x8000_0000_0000_0001, 0xc015), (0xa298_bdb1_c85f_0d46, 0xc03f), 0, (0xc90f_daa2_2181_f325, 0xbfff)),
    (PowerOfTwo, (0xe1e4_8557_ea19_0b2a, 0xbffd), (0x8000_0000_0000_0000, 0x3fff), 3, (0x86e6_6564_53d5_1a14, 0xbffd)),
    (Logarithm, (0xa20d_672b_15ad_9a9d, 0x6aa), (0x99a7_4924_550d_40dd, 0x62a9), 1, (0x89a4_3e27_c363_9fec, 0xe2b7)),
    (
        LogarithmPlusOne,
        (0xf44d_7e40_c78f_ec45, 0xbff2),
        (0x9ab1_c42f_c52f_4fbe, 0x4002),
        2,
        (0xd501_0f44_8db0_7bdc, 0xbff6),
    ),
    (Sine, (0x9d7c_d4f6_1d5c_4825, 0x4000), (0x8000_0000_0000_0000, 0x3fff), 1, (0xa123_cdf5_bee8_96d0, 0x3ffe)),
    (Cosine, (0xe409_6150_5d69_8c8b, 0x3fff), (0x8000_0000_0000_0000, 0x3fff), 1, (0xd634_3457_8ca4_9bee, 0xbffc)),
    (Tangent, (0xffff_ffff_ffff_fffa, 0x3ffc), (0x8000_0000_0000_0000, 0x3fff), 3, (0x82bc_2d21_e262_af2e, 0x3ffd)),
    (Arctangent, (0xbd58_9cab_301b_a988, 0x3fb9), (0xaad9_a40a_736e_bf51, 0xbfcc), 0, (0xc90f_c8e6_b426_1062, 0xbfff)),
    (PowerOfTwo, (0xc0df_7c9a_8cda_80a3, 0x3ffd), (0x8000_0000_0000_0000, 0x3fff), 3, (0x98c4_5d80_a7b7_b77e, 0x3ffd)),
    (Logarithm, (0xfb8a_99a2_c96f_a758, 0x2d7), (0x8000_0000_0000_0007, 0xc000), 2, (0xf49c_19f4_cd22_4445, 0x400d)),
    (
        LogarithmPlusOne,
        (0xfade_312d_c725_bd97, 0x3ff4),
        (0xc253_75be_5b17_7a38, 0x4004),
        0,
        (0x894c_fefd_b911_b4a7, 0x3ffb),
    ),
    (Sine, (0xffff_ffff_ffff_fffb, 0xc000), (0x8000_0000_0000_0000, 0x3fff), 1, (0xc1bd_ceee_e0f5_7379, 0x3ffe)),
    (Cosine, (0x8000_0000_0000_0001, 0xc001), (0x8000_0000_0000_0000, 0x3fff), 2, (0xa755_3036_d926_061d, 0xbffe)),
    (Tangent, (0x9c84_2b6a_8b52_5b4f, 0x3fd2), (0x8000_0000_0000_0000, 0x3fff), 2, (0x9c84_2b6a_8b52_5b50, 0x3fd2)),
    (Arctangent, (0x9284_0ea1_66da_a365, 0xbfed), (0x8000_0000_0000_0006, 0x3fc2), 1, (0xc90f_daa2_2161_c505, 0x4000)),
    (PowerOfTwo, (0x825f_8542_13bd_488e, 0xbfce), (0x8000_0000_0000_0000, 0x3fff), 1, (0xb4bc_4bc1_a21d_820e, 0xbfcd)),
    (Logarithm, (0x9b5c_56d3_4e3d_4d0f, 0x3ffe), (0x8000_0000_0000_0007, 0xbffc), 1, (0xb874_24ac_7b57_6e18, 0x3ffb)),
    (
        LogarithmPlusOne,
        (0x8000_0000_0000_0006, 0x3fdc),
        (0xf6a0_7500_ae9c_8563, 0x3ffb),
        1,
        (0xb1e7_53a4_f838_9e59, 0x3fd9),
    ),
    (Sine, (0xe54d_479a_02c8_261b, 0x4002), (0x8000_0000_0000_0000, 0x3fff), 3, (0xfb30_1386_a5ef_2741, 0x3ffe)),
    (Cosine, (0x8000_0000_0000_0005, 0x4001), (0x8000_0000_0000_0000, 0x3fff), 0, (0xa755_3036_d926_0605, 0xbffe)),
    (Tangent, (0x9067_04c3_65d6_0b6e, 0x3fff), (0x8000_0000_0000_0000, 0x3fff), 1, (0x8703_95a5_ffec_09ac, 0x4000)),
    (Arctangent, (0x803a_f506_5136_bf62, 0xc036), (0xd01f_c6f4_3d06_1f79, 0x3fe8), 3, (0xc90f_daa2_2168_c234, 0x4000)),
    (PowerOfTwo, (0xa57b_7700_f8ec_2d34, 0xbffd), (0x8000_0000_0000_0000, 0x3fff), 2, (0xcd86_b582_20d5_ef05, 0xbffc)),
    (Logarithm, (0x8000_0000_0000_0001, 0x3fff), (0xaa49_26f0_5f22_1dfc, 0xc831), 2, (0xf5ab_9fd5_fde5_16a6, 0xc7f2)),
    (
        LogarithmPlusOne,
        (0xb7b5_dbac_6d3f_ad4c, 0xbfc5),
        (0xae7f_ba11_7eba_0352, 0x3ffa),
        3,
        (0xb4a8_dbc3_2b11_d045, 0xbfc1),
    ),
    (Sine, (0x8000_0000_0000_0002, 0x3ffb), (0x8000_0000_0000_0000, 0x3fff), 1, (0xffd5_5777_6a76_d5a9, 0x3ffa)),
    (Cosine, (0xc698_06ea_f81f_5c80, 0xbffd), (0x8000_0000_0000_0000, 0x3fff), 0, (0xecfb_8f5a_a7bb_8b9f, 0x3ffe)),
    (Tangent, (0xd9db_30af_f8a1_0e70, 0x3ff6), (0x8000_0000_0000_0000, 0x3fff), 0, (0xd9db_6547_3da3_b6fb, 0x3ff6)),
    (Arctangent, (0xa057_2aeb_7029_3815, 0x4002), (0x99c6_1aa8_6e67_1698, 0xbfcd), 3, (0xf584_029c_f16c_2cee, 0xbfc9)),
    (PowerOfTwo, (0xf5b5_b934_0106_bb05, 0x3fec), (0x8000_0000_0000_0000, 0x3fff), 1, (0xaa50_3524_6f9c_a450, 0x3fec)),
    (Logarithm, (0xd5d8_575d_3e03_6333, 0x4000), (0xcfa6_9611_45f2_1e94, 0x9b27), 0, (0xb4b3_3144_88f7_6e8f, 0x9b28)),
    (
        LogarithmPlusOne,
        (0x8000_0000_0000_0001, 0x3ffb),
        (0xffff_ffff_ffff_fffb, 0xbffd),
        1,
        (0xb31f_b7d6_4898_b3e5, 0xbffa),
    ),
    (Sine, (0x8018_5844_133f_3b0a, 0x3ffd), (0x8000_0000_0000_0000, 0x3fff), 0, (0xfd86_a368_6f46_e07c, 0x3ffc)),
    (Cosine, (0x9fb7_f628_0037_5c0d, 0x4000), (0x8000_0000_0000_0000, 0x3fff), 2, (0xcc6a_c9fc_08ac_c4bd, 0xbffe)),
    (Tangent, (0xa5cd_95e7_1cf3_d179, 0xc037), (0x8000_0000_0000_0000, 0x3fff), 3, (0xa2ee_0d2e_45a2_2d4d, 0x3ffe)),
    (Arctangent, (0xb8e7_df9b_9921_49e8, 0xc001), (0xec5d_f2c7_fcad_3888, 0x3ffd), 0, (0xc3f5_a375_fa91_d7e7, 0x4000)),
    (PowerOfTwo, (0xab39_2034_9eba_8775, 0x3ffe), (0x8000_0000_0000_0000, 0x3fff), 2, (0x96fc_c819_bb27_e74c, 0x3ffe)),
    (Logarithm, (0xdc7a_9283_5604_c3b6, 0x3fff), (0xfcd5_8c0f_7e21_b8aa, 0xbffb), 3, (0xc658_f0c2_cfac_d9a9, 0xbffb)),
    (
        LogarithmPlusOne,
        (0xa23c_4b27_27f5_2fa9, 0x3ff5),
        (0x92cb_2f3f_c47a_ddc9, 0x3ffc),
        0,
        (0x8620_c10b_ba3a_1c2a, 0x3ff3),
    ),
];
