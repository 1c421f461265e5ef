//! Medians, and how long a thread has run.

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

/// How long this thread has run on a core (milliseconds); the wall clock where the system does not tell.
#[must_use]
pub fn busy_ms() -> f64 {
    let ran = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let ran = ran.and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
    let since_epoch = || std::time::UNIX_EPOCH.elapsed().map_or(0.0, |t| t.as_secs_f64() * 1e3);
    ran.map_or_else(since_epoch, |nanos| nanos * 1e-6)
}
