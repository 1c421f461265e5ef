//! Medians.

/// The middle value, the upper one of two; NaN for no values. Sorts in place; NaN counts as the largest.
///
/// ```
/// use mindseye_base::stats::median;
/// assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
/// assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 3.0);
/// assert!(median(&mut []).is_nan());
/// ```
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
