//! Deterministic random numbers.
//!
//! Own generators rather than a crate's: houses, training samples and answers are functions of a seed, and have to
//! stay the same on every platform and with every version of every dependency. Algorithms: xoshiro256++ (Blackman
//! and Vigna, "Scrambled linear pseudorandom number generators", 2018) and SplitMix64 (Steele, Lea and Flood, "Fast
//! splittable pseudorandom number generators", 2014); normal numbers by Box and Muller.

use std::f64::consts::TAU;

/// SplitMix64: one word of state; for seeding, and for short streams that are told apart by their seeds.
///
/// ```
/// // The published test vector for seed 1234567.
/// let mut mix = mindseye_base::random::SplitMix64::new(1_234_567);
/// assert_eq!(mix.next_u64(), 6_457_827_717_110_365_317);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// A generator whose whole stream is a function of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `(0, 1]`.
    pub fn unit_above_zero(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Two independent standard normal numbers.
    pub fn normal_pair(&mut self) -> (f64, f64) {
        let radius = (-2.0 * self.unit_above_zero().ln()).sqrt();
        let angle = TAU * self.unit_above_zero();
        (radius * angle.cos(), radius * angle.sin())
    }
}

/// xoshiro256++, seeded through [`SplitMix64`]. The same seed gives the same stream on every platform.
///
/// ```
/// let mut a = mindseye_base::random::Rng::new(7);
/// let mut b = mindseye_base::random::Rng::new(7);
/// assert_eq!(a.next_u64(), b.next_u64());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// A generator whose whole stream is a function of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut mix = SplitMix64::new(seed);
        Self { state: std::array::from_fn(|_| mix.next_u64()) }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let out = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        out
    }

    /// Uniform in `[0, 1)`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `[low, high)`; `low` when the range is empty.
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        if high <= low { low } else { low + (high - low) * self.unit() }
    }

    /// Uniform integer in `0..n`; 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { ((u128::from(self.next_u64()) * n as u128) >> 64) as usize }
    }

    /// Uniform integer in `low..=high`; `low` when the range is empty.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        if high <= low { low } else { low + self.below(high - low + 1) }
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (TAU * self.unit()).cos()
    }

    /// Fisher-Yates shuffle in place.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and variance of 100 000 draws, within five standard errors.
    fn check_normal(draws: impl Iterator<Item = f64>) {
        let draws: Vec<f64> = draws.take(100_000).collect();
        let n = draws.len() as f64;
        let mean = draws.iter().sum::<f64>() / n;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 5.0 / n.sqrt(), "mean {mean}");
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "variance {variance}");
    }

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let mut rng = Rng::new(3);
        check_normal(std::iter::repeat_with(|| rng.normal()));
        let mut mix = SplitMix64::new(3);
        check_normal(std::iter::repeat_with(|| mix.normal_pair()).flat_map(|(a, b)| [a, b]));
    }

    #[test]
    fn ranges_hold_their_ends() {
        let mut rng = Rng::new(5);
        let mut seen = [0; 4];
        for _ in 0..1000 {
            seen[rng.between(2, 5) - 2] += 1;
            let x = rng.range(-1.0, 1.0);
            assert!((-1.0..1.0).contains(&x), "{x}");
        }
        assert!(seen.iter().all(|&n| n > 150), "{seen:?}");
        assert_eq!((rng.below(0), rng.between(7, 3), rng.range(2.0, 2.0)), (0, 7, 2.0));
    }
}
