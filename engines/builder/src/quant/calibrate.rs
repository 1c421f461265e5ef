//! Ranges of activations: seen while the fp32 graph runs over calibration inputs.

use super::QuantError;
use mindseye_engines::backend::{Elements, Tensor};

/// How a per-tensor range is chosen from what was seen.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Calibrator {
    /// The largest magnitude.
    Max,
    /// The magnitude below which this percentage of all values lies (99.99, say).
    Percentile(f64),
    /// The magnitude that loses the least information (Kullback-Leibler divergence between the histogram of
    /// magnitudes and its 128-level form; Migacz, "8-bit inference with TensorRT", 2017).
    Entropy,
}

const BINS: usize = 2048;
const LEVELS: usize = 128;

/// What was seen of one value: magnitudes per channel (last axis), and a histogram of all magnitudes.
#[derive(Clone, Debug)]
pub(super) struct Observer {
    pub(super) channel_max: Vec<f32>,
    pub(super) max: f32,
    bins: Vec<u64>,
    range: f32,
    total: u64,
}

impl Observer {
    pub(super) fn new(channels: usize) -> Self {
        Observer { channel_max: vec![0.0; channels], max: 0.0, bins: vec![0; BINS], range: 0.0, total: 0 }
    }

    /// As tensors.
    pub(super) fn save(&self) -> [(String, Tensor); 4] {
        let floats = |v: &[f32]| Tensor::f32(&[v.len()], v.to_vec());
        let counts: Vec<i64> = self.bins.iter().map(|n| n.cast_signed()).collect();
        [
            ("channels".into(), floats(&self.channel_max)),
            ("range".into(), floats(&[self.max, self.range])),
            ("bins".into(), Tensor::i64(&[BINS], counts)),
            ("total".into(), Tensor::i64(&[1], vec![self.total.cast_signed()])),
        ]
    }

    /// What [`Observer::save`] gave; none where the tensors are others or of another number of channels.
    pub(super) fn load(&self, tensors: &[(String, Tensor)]) -> Option<Observer> {
        let data = |i: usize| tensors.get(i).map(|(_, t)| &t.data);
        let (Elements::F32(channels), Elements::F32(range)) = (data(0)?, data(1)?) else { return None };
        let (Elements::I64(bins), Elements::I64(total)) = (data(2)?, data(3)?) else { return None };
        let (&[max, range], &[total]) = (range.as_slice(), total.as_slice()) else { return None };
        let fits = channels.len() == self.channel_max.len() && bins.len() == BINS;
        fits.then(|| Observer {
            channel_max: channels.clone(),
            max,
            bins: bins.iter().map(|n| n.cast_unsigned()).collect(),
            range,
            total: total.cast_unsigned(),
        })
    }

    /// Adds values laid out with the channels last.
    pub(super) fn add(&mut self, name: &str, values: &[f32]) -> Result<(), QuantError> {
        let channels = self.channel_max.len().max(1);
        let mut max = self.max;
        for row in values.chunks(channels) {
            for (seen, &v) in self.channel_max.iter_mut().zip(row) {
                let a = v.abs();
                if !a.is_finite() {
                    return Err(QuantError::NotFinite { value: name.to_owned() });
                }
                *seen = seen.max(a);
                max = max.max(a);
            }
        }
        self.max = max;
        self.total += values.len() as u64;
        if max == 0.0 {
            self.bins[0] += values.len() as u64;
            return Ok(());
        }
        if self.range == 0.0 {
            self.range = max;
        }
        while self.range < max {
            // Double the range: two bins become one.
            for i in 0..BINS / 2 {
                self.bins[i] = self.bins[2 * i] + self.bins[2 * i + 1];
            }
            self.bins[BINS / 2..].fill(0);
            self.range *= 2.0;
        }
        let scale = BINS as f32 / self.range;
        for v in values {
            self.bins[((v.abs() * scale) as usize).min(BINS - 1)] += 1;
        }
        Ok(())
    }

    /// The largest magnitude after each channel is divided by its factor.
    pub(super) fn smoothed_max(&self, factors: Option<&[f32]>) -> f32 {
        match factors {
            None => self.max,
            Some(factors) => self.channel_max.iter().zip(factors).map(|(m, s)| m / s).fold(0.0, f32::max),
        }
    }

    /// The range of a calibrator; zero when nothing but zeros was seen.
    pub(super) fn range(&self, calibrator: Calibrator) -> f32 {
        if self.max == 0.0 {
            return 0.0;
        }
        let edge = |bin: usize| (self.range * (bin as f32 / BINS as f32)).min(self.max);
        match calibrator {
            Calibrator::Max => self.max,
            Calibrator::Percentile(p) => {
                let wanted = (p / 100.0 * self.total as f64).ceil() as u64;
                let mut seen = 0;
                for (i, &n) in self.bins.iter().enumerate() {
                    seen += n;
                    if seen >= wanted {
                        return edge(i + 1);
                    }
                }
                self.max
            }
            Calibrator::Entropy => edge(entropy_bins(&self.bins)),
        }
    }
}

/// Number of bins whose upper edge loses the least information.
fn entropy_bins(bins: &[u64]) -> usize {
    let last = bins.iter().rposition(|&n| n > 0).map_or(1, |i| i + 1);
    let total: u64 = bins.iter().sum();
    let mut best = (f64::INFINITY, last);
    let mut start = LEVELS.min(last);
    // The first bin holds the zeros of padding and dead channels: it says nothing about the range.
    loop {
        let end = start;
        let outside: u64 = bins[end..].iter().sum();
        let width = end as f64 / LEVELS as f64;
        let mut divergence = 0.0;
        for level in 0..LEVELS {
            let (a, b) = ((level as f64 * width) as usize, (((level + 1) as f64 * width) as usize).min(end));
            if a >= b {
                continue;
            }
            let inside = &bins[a..b];
            let filled = inside.iter().filter(|&&n| n > 0).count();
            let sum: u64 = inside.iter().sum();
            for (i, &n) in inside.iter().enumerate() {
                let p = n + if a + i + 1 == end { outside } else { 0 };
                if p == 0 {
                    continue;
                }
                // Where the clipped mass falls on an empty bin the quantised form has nothing: a large, finite cost.
                let q = if n > 0 { sum as f64 / filled as f64 } else { 1e-3 };
                divergence += p as f64 / total as f64 * (p as f64 / q).ln();
            }
        }
        // Mass that Q lacks, since it is not clipped into the last bin.
        divergence += ((total - outside).max(1) as f64 / total as f64).ln();
        if divergence < best.0 {
            best = (divergence, end);
        }
        if end >= last {
            return best.1;
        }
        start = (end + 8).min(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(n: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut uniform = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
        };
        (0..n).map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos()).collect()
    }

    #[test]
    fn calibrators_on_a_normal_with_an_outlier() {
        let mut values = normal(100_000);
        values.push(40.0);
        let mut o = Observer::new(1);
        for part in values.chunks(777) {
            o.add("x", part).unwrap();
        }
        assert_eq!(o.range(Calibrator::Max), 40.0);
        // 99.9 % of |N(0,1)| lies below 3.29.
        let p = o.range(Calibrator::Percentile(99.9));
        assert!((p - 3.29).abs() < 0.15, "{p}");
        let e = o.range(Calibrator::Entropy);
        assert!((2.5..10.0).contains(&e), "{e}");
        assert_eq!(o.range(Calibrator::Percentile(100.0)), 40.0);
    }

    #[test]
    fn channels_zeros_and_nan() {
        let mut o = Observer::new(3);
        o.add("x", &[0.0, -2.0, 1.0, 0.0, 1.5, -3.0]).unwrap();
        assert_eq!(o.channel_max, [0.0, 2.0, 3.0]);
        let mut zeros = Observer::new(2);
        zeros.add("x", &[0.0; 8]).unwrap();
        for c in [Calibrator::Max, Calibrator::Percentile(99.0), Calibrator::Entropy] {
            assert_eq!(zeros.range(c), 0.0);
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let error = Observer::new(1).add("blocks.0.in", &[1.0, bad]).unwrap_err().to_string();
            assert!(error.contains("blocks.0.in"), "{error}");
        }
    }
}
