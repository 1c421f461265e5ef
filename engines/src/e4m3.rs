//! The 8-bit float E4M3 ("FN": no infinities), bit by bit: round to nearest even, saturate at 448, NaN stays NaN.
//!
//! One sign bit, four exponent bits with bias 7, three mantissa bits. `0x7f` and `0xff` are NaN; the largest finite
//! value is `0x7e` = 448; the smallest above zero is `0x01` = 2^-9. (Micikevicius et al., "FP8 formats for deep
//! learning", table 1.)

/// Largest finite value.
pub const MAX: f32 = 448.0;

/// Nearest E4M3 code, ties to even, saturating.
///
/// ```
/// use mindseye_engines::e4m3;
/// assert_eq!(e4m3::to_f32(e4m3::from_f32(17.0)), 16.0); // halfway between 16 and 18: to the even mantissa
/// assert_eq!(e4m3::to_f32(e4m3::from_f32(1e9)), 448.0);
/// ```
#[must_use]
pub fn from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let a = x.abs();
    if a >= MAX {
        return sign | 0x7e;
    }
    // Steps of 2^-9 below 2^-5 (subnormals and the first binade), then of 2^(e-3). Scaling by a power of two is exact.
    let exponent = if a < 2f32.powi(-6) { -6 } else { (a.to_bits() >> 23) as i32 - 127 };
    let steps = (a * 2f32.powi(3 - exponent)).round_ties_even() as u32;
    // `steps` counts from zero: 8 steps make the implicit leading bit, and a carry into the next binade adds up right.
    let code = ((exponent + 6) as u32) * 8 + steps;
    sign | u8::try_from(code.min(0x7e)).unwrap_or(0x7e)
}

/// Value of a code.
#[must_use]
pub fn to_f32(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from((code >> 3) & 0xf), f32::from(code & 7));
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    sign * if exponent == 0 { mantissa * 2f32.powi(-9) } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) }
}

/// Nearest value that E4M3 has.
#[must_use]
pub fn round(x: f32) -> f32 {
    to_f32(from_f32(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nearest by search over all codes, ties to the even code: independent of the arithmetic above.
    fn by_search(x: f32) -> f32 {
        let a = f64::from(x.abs());
        let best = (0u8..=0x7e)
            .min_by(|&p, &q| {
                let d = |c: u8| (f64::from(to_f32(c)) - a).abs();
                d(p).total_cmp(&d(q)).then((p & 1).cmp(&(q & 1)))
            })
            .unwrap();
        to_f32(best).copysign(x)
    }

    #[test]
    fn all_256_codes_make_the_round_trip() {
        for code in 0..=255u8 {
            let value = to_f32(code);
            if code & 0x7f == 0x7f {
                assert!(value.is_nan());
                assert_eq!(from_f32(value) & 0x7f, 0x7f);
            } else {
                assert_eq!(from_f32(value), code, "{code:#04x} = {value}");
            }
        }
        // Values printed in the format's description.
        for (code, value) in [
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(to_f32(code), value);
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_saturates() {
        let mut values: Vec<f32> = vec![0.0, -0.0, 447.9, 448.0, 449.0, 1e9, -1e9, f32::MIN_POSITIVE];
        // Every neighbour pair's midpoint (a tie), and the floats next to it.
        for code in 0..0x7e {
            let mid = (to_f32(code) + to_f32(code + 1)) / 2.0;
            values.extend([mid, mid.next_up(), mid.next_down(), -mid]);
        }
        let mut state = 1u32;
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push(f32::from_bits((state & 0x8fff_ffff) | 0x3000_0000));
        }
        for x in values.into_iter().filter(|x| !x.is_nan()) {
            assert_eq!(round(x), by_search(x), "{x}");
        }
        assert!(round(f32::NAN).is_nan());
        assert_eq!(round(f32::NEG_INFINITY), -MAX);
    }
}
