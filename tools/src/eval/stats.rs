//! Figures with their 95 % intervals.

use mindseye_base::stats::median as middle;
use mindseye_world::Rng;
use serde::{Deserialize, Serialize};

/// A figure with its 95 % interval over `n` cases. Not a number when there is no case.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The figure.
    #[serde(deserialize_with = "or_nan")]
    pub value: f64,
    /// Lower end.
    #[serde(deserialize_with = "or_nan")]
    pub low: f64,
    /// Upper end.
    #[serde(deserialize_with = "or_nan")]
    pub high: f64,
    /// Cases.
    pub n: usize,
}

/// JSON has no NaN: it is written as null.
fn or_nan<'de, D: serde::Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

impl Figure {
    const NONE: Self = Self { value: f64::NAN, low: f64::NAN, high: f64::NAN, n: 0 };

    /// `0.650 [0.580, 0.710]` with this many digits; a dash without cases.
    #[must_use]
    pub fn text(&self, digits: usize) -> String {
        if self.n == 0 || !self.value.is_finite() {
            return "-".to_owned();
        }
        format!("{:.digits$} [{:.digits$}, {:.digits$}]", self.value, self.low, self.high)
    }
}

/// A share, with Wilson's interval.
#[must_use]
pub fn share(hits: impl IntoIterator<Item = bool>) -> Figure {
    let (mut k, mut n) = (0.0, 0usize);
    for hit in hits {
        n += 1;
        k += f64::from(u8::from(hit));
    }
    if n == 0 {
        return Figure::NONE;
    }
    let (p, z, m) = (k / n as f64, 1.96f64, n as f64);
    let centre = (p + z * z / (2.0 * m)) / (1.0 + z * z / m);
    let half = z * (p * (1.0 - p) / m + z * z / (4.0 * m * m)).sqrt() / (1.0 + z * z / m);
    Figure { value: p, low: (centre - half).max(0.0), high: (centre + half).min(1.0), n }
}

/// The smallest value that at least this share of the values do not exceed; sorts. NaN when empty.
pub fn quantile_of(v: &mut [f64], share: f64) -> f64 {
    v.sort_by(f64::total_cmp);
    let at = (share * v.len() as f64).ceil() as usize;
    v.get(at.saturating_sub(1).min(v.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

const RESAMPLES: usize = 400;

fn bootstrap(n: usize, value: f64, mut of: impl FnMut(&mut Rng) -> f64) -> Figure {
    let mut rng = Rng::new(1);
    let mut boots: Vec<f64> = (0..RESAMPLES).map(|_| of(&mut rng)).collect();
    boots.sort_by(f64::total_cmp);
    Figure { value, low: boots[RESAMPLES / 40], high: boots[RESAMPLES - 1 - RESAMPLES / 40], n }
}

fn finite(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    values.into_iter().filter(|x| x.is_finite()).collect()
}

/// A median of the finite values, with a bootstrap interval.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> Figure {
    let mut v = finite(values);
    let n = v.len();
    if n == 0 {
        return Figure::NONE;
    }
    let value = middle(&mut v);
    bootstrap(n, value, |rng| middle(&mut (0..n).map(|_| v[rng.below(n)]).collect::<Vec<_>>()))
}

/// A mean of the finite values, with a bootstrap interval.
#[must_use]
pub fn mean(values: impl IntoIterator<Item = f64>) -> Figure {
    let v = finite(values);
    let n = v.len();
    if n == 0 {
        return Figure::NONE;
    }
    let value = v.iter().sum::<f64>() / n as f64;
    bootstrap(n, value, |rng| (0..n).map(|_| v[rng.below(n)]).sum::<f64>() / n as f64)
}

/// The area under the curve: how often a value of `high` is above one of `low` (ties count half), with a bootstrap
/// interval that draws from both again.
#[must_use]
pub fn auc(high: impl IntoIterator<Item = f64>, low: impl IntoIterator<Item = f64>) -> Figure {
    let (high, low) = (finite(high), finite(low));
    if high.is_empty() || low.is_empty() {
        return Figure::NONE;
    }
    // Ranks once; a resample only counts.
    let mut sorted = low.clone();
    sorted.sort_by(f64::total_cmp);
    let below = |counts: &[usize], v: f64| {
        let (a, b) = (sorted.partition_point(|x| *x < v), sorted.partition_point(|x| *x <= v));
        (counts[a] + counts[b]) as f64 / 2.0
    };
    let score = |high: &mut dyn Iterator<Item = f64>, times: &[usize]| {
        let mut counts = vec![0; sorted.len() + 1];
        for (i, t) in times.iter().enumerate() {
            counts[i + 1] = counts[i] + t;
        }
        let (mut sum, mut n) = (0.0, 0usize);
        for v in high {
            sum += below(&counts, v);
            n += 1;
        }
        sum / (n * counts[sorted.len()]).max(1) as f64
    };
    let once = vec![1; sorted.len()];
    let value = score(&mut high.iter().copied(), &once);
    bootstrap(high.len() + low.len(), value, |rng| {
        let mut times = vec![0; sorted.len()];
        for _ in 0..sorted.len() {
            times[rng.below(sorted.len())] += 1;
        }
        let picks: Vec<f64> = (0..high.len()).map(|_| high[rng.below(high.len())]).collect();
        score(&mut picks.into_iter(), &times)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_figures() {
        let f = share((0..100).map(|i| i < 65));
        assert!(
            (f.value - 0.65).abs() < 1e-12 && (f.low - 0.5525).abs() < 2e-3 && (f.high - 0.7364).abs() < 2e-3
        );
        assert_eq!(share(std::iter::empty()).n, 0);
        assert_eq!(median([3.0, 1.0, f64::NAN, 2.0]).value, 2.0);
        let m = mean((0..400).map(|i| f64::from(i % 2)));
        assert!(
            (m.value - 0.5).abs() < 1e-12 && (m.low - 0.451).abs() < 0.02 && (m.high - 0.549).abs() < 0.02
        );
        assert_eq!(quantile_of(&mut [4.0, 1.0, 3.0, 2.0], 0.5), 2.0);
        assert!(quantile_of(&mut [], 0.5).is_nan());
    }

    #[test]
    fn auc_counts_wins() {
        let check = |high: &[f64], low: &[f64], want: f64| {
            let got = auc(high.iter().copied(), low.iter().copied());
            assert!((got.value - want).abs() < 1e-12, "{high:?} {low:?}: {got:?}");
            assert!(got.low <= got.value && got.value <= got.high);
        };
        check(&[2.0, 3.0], &[0.0, 1.0], 1.0);
        check(&[0.0, 3.0], &[1.0, 2.0], 0.5);
        check(&[1.0], &[1.0, 1.0], 0.5);
        check(&[2.0, 1.0, 0.0], &[1.0], 0.5);
    }

    #[test]
    fn nothing_survives_json_as_nothing() -> Result<(), serde_json::Error> {
        let text = serde_json::to_string(&median([]))?;
        let back: Figure = serde_json::from_str(&text)?;
        assert!(back.value.is_nan() && back.n == 0, "{text}");
        assert_eq!(back.text(2), "-");
        Ok(())
    }
}
