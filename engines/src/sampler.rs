//! Flow-matching schedules and samplers.
//!
//! Convention (Wan2.2, `wan/utils/fm_solvers_unipc.py`): `x_s = (1 - s) x_0 + s n` with `n ~ N(0, I)` and `s` in
//! `[0, 1]`; the network
//! predicts the velocity `v = n - x_0 = dx/ds` and is given the timestep `t = 1000 s`. A [`Schedule`] is the list
//! of sigmas, a [`Sampler`] walks along it. Neither knows the network: the caller evaluates `v` and hands it in.
//!
//! ```
//! use mindseye_engines::sampler::{Grid, Sampler, Schedule, Solver};
//!
//! // The field of data that is zero everywhere: x_0 = 0, so v = n = x / s.
//! let mut sampler = Sampler::new(Schedule::new(Grid::Plain, 8, 5.0)?, Solver::UniPc);
//! let mut x = vec![1.0f32, -2.0];
//! while let Some(step) = sampler.next_step() {
//!     let v: Vec<f32> = x.iter().map(|x| x / step.sigma).collect();
//!     sampler.step(&v, &mut x)?;
//! }
//! assert!(x.iter().all(|x| x.abs() < 1e-6));
//! # Ok::<(), mindseye_engines::sampler::SamplerError>(())
//! ```

use mindseye_base::random::SplitMix64;
use serde::{Deserialize, Serialize};

/// Number of discrete training timesteps; `t = TRAIN_STEPS * sigma`.
pub const TRAIN_STEPS: usize = 1000;
/// Timestep that the network gets for noised context: that of pure noise, as its frames are (Video4Spatial, joint
/// guidance).
pub const NOISED_CONTEXT_T: f32 = 1000.0;
/// Largest accepted number of steps.
pub const MAX_STEPS: usize = 10_000;

/// Why a schedule or a step was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// The number of steps is zero or unreasonable.
    #[error("sampler steps: {0} is not between 1 and {MAX_STEPS}")]
    Steps(usize),
    /// The shift is not a positive number.
    #[error("sampler shift: {0} is not a positive number")]
    Shift(f64),
    /// All steps were made already.
    #[error("sampler: all {0} steps were made already")]
    Finished(usize),
    /// Velocity and sample differ in size.
    #[error("sampler: velocity has {velocity} values, sample has {sample}")]
    Size {
        /// Values in the velocity.
        velocity: usize,
        /// Values in the sample (or the sample of the previous step).
        sample: usize,
    },
}

/// Which sigmas to visit; those of Wan2.2 and of diffusers are not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// The Wan repository's UniPC: from 0.999 down, integer timesteps. For parity with 50-step Wan.
    WanUnipc,
    /// diffusers' UniPC with flow sigmas: from 1 (less 1e-6) towards 0.001, integer timesteps.
    UnipcDiffusers,
    /// From 1 to 0, real timesteps. For Euler and few steps.
    Plain,
    /// diffusers' flow-matching Euler: an already shifted grid, shifted again; the last step is far from 0.
    EulerDiffusers,
}

impl Grid {
    /// All grids.
    pub const ALL: [Self; 4] = [Self::WanUnipc, Self::UnipcDiffusers, Self::Plain, Self::EulerDiffusers];

    /// The name used in configuration files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::WanUnipc => "wan_unipc",
            Self::UnipcDiffusers => "unipc_diffusers",
            Self::Plain => "plain",
            Self::EulerDiffusers => "euler_diffusers",
        }
    }
}

/// How to go from one sigma to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Solver {
    /// `x <- x + (s_next - s) v`.
    Euler,
    /// UniPC of order 2, `B(h) = e^h - 1` ("bh2"), data prediction, with corrector, lower order at the end.
    #[serde(rename = "unipc")]
    UniPc,
}

/// Sigmas to visit and the timesteps that the network is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// `steps + 1` sigmas, falling, the last one 0.
    pub sigmas: Vec<f32>,
    /// `steps` timesteps in `[0, 1000]`.
    pub timesteps: Vec<f32>,
}

/// `numpy.linspace(start, stop, count)`.
fn linspace(start: f64, stop: f64, count: usize) -> Vec<f64> {
    let step = (stop - start) / (count.max(2) - 1) as f64;
    let mut out: Vec<f64> = (0..count).map(|i| i as f64 * step + start).collect();
    if count > 1 {
        out[count - 1] = stop;
    }
    out
}

/// `s' = k s / (1 + (k - 1) s)`.
fn shifted(s: f64, k: f64) -> f64 {
    k * s / (1.0 + (k - 1.0) * s)
}

impl Schedule {
    /// The schedule of `steps` steps on `grid` with the given shift (5 for Wan2.2 TI2V-5B).
    ///
    /// # Errors
    /// [`SamplerError::Steps`], [`SamplerError::Shift`].
    pub fn new(grid: Grid, steps: usize, shift: f64) -> Result<Self, SamplerError> {
        if steps == 0 || steps > MAX_STEPS {
            return Err(SamplerError::Steps(steps));
        }
        if !(shift.is_finite() && shift > 0.0) {
            return Err(SamplerError::Shift(shift));
        }
        let train = TRAIN_STEPS as f64;
        let falling = |from: f64, to: f64| {
            let mut s = linspace(from, to, steps + 1);
            s.truncate(steps);
            s.iter_mut().for_each(|s| *s = shifted(*s, shift));
            s
        };
        let (sigmas, timesteps): (Vec<f32>, Vec<f32>) = match grid {
            Grid::WanUnipc => {
                let s = falling(f64::from((1.0 - 1.0 / train) as f32), 0.0);
                s.iter().map(|&s| (s as f32, (s * train).trunc() as f32)).unzip()
            }
            Grid::UnipcDiffusers => {
                let mut s = falling(1.0, 1.0 / train);
                if (s[0] - 1.0).abs() < 1e-6 {
                    s[0] -= 1e-6;
                }
                s.iter().map(|&s| (s as f32, (s * train).trunc() as f32)).unzip()
            }
            Grid::Plain => {
                let s = falling(1.0, 0.0);
                s.iter().map(|&s| (s as f32, (s * train) as f32)).unzip()
            }
            Grid::EulerDiffusers => {
                // The ends of the training grid, in f32 as the original stores them.
                let end = |s: f32| f64::from(shift as f32 * s / (1.0 + (shift as f32 - 1.0) * s));
                let base = linspace(end(1.0) * train, end(1.0 / train as f32) * train, steps);
                base.iter()
                    .map(|&t| {
                        let s = shifted(t / train, shift) as f32;
                        (s, s * train as f32)
                    })
                    .unzip()
            }
        };
        let mut sigmas = sigmas;
        sigmas.push(0.0);
        Ok(Self { sigmas, timesteps })
    }

    /// Number of steps.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// Where the network is evaluated in step `index`; `None` past the last one.
    #[must_use]
    pub fn step(&self, index: usize) -> Option<Step> {
        let timestep = *self.timesteps.get(index)?;
        Some(Step { index, sigma: self.sigmas[index], timestep })
    }
}

/// What the network has to be evaluated at next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Number of the step, from 0.
    pub index: usize,
    /// Noise level of the sample.
    pub sigma: f32,
    /// Timestep for the network.
    pub timestep: f32,
}

/// What one step does to a sample, in numbers: the host's sampler and a device's do the same arithmetic with them.
///
/// With velocity `v` at the sample `x`, the estimate of the clean sample is `m = x - sigma v`; `m1` and `m2` are those
/// of the two steps before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// Noise level of the sample.
    pub sigma: f32,
    /// What comes then.
    pub update: Update,
}

/// See [`Factors`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Update {
    /// `x + by v`.
    Euler {
        /// Difference of the noise levels.
        by: f32,
    },
    /// The previous step is redone, knowing `m`; then the next is made.
    UniPc {
        /// Nothing at the first step.
        correct: Option<Correct>,
        /// Nothing at the last step, where `m` is the result.
        predict: Option<Predict>,
    },
}

/// `x = keep previous + k (m1 + back (m2 - m1) + last (m - m1))`, `previous` being the corrected sample of the step before.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Correct {
    pub keep: f32,
    pub k: f32,
    /// None where the step before was of order 1.
    pub back: Option<f32>,
    pub last: f32,
}

/// `x = keep x + k (m + slope (m1 - m))`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Predict {
    pub keep: f32,
    pub k: f32,
    /// None in a step of order 1.
    pub slope: Option<f32>,
}

impl Schedule {
    /// `a = 1 - s`, `s` and `l = ln a - ln s`, with `a` rounded to f32 as in the original (`fm_solvers_unipc.py`).
    fn level(&self, i: usize) -> (f64, f64, f64) {
        let s = self.sigmas[i];
        let a = f64::from(1.0 - s);
        (a, f64::from(s), a.ln() - f64::from(s).ln())
    }

    /// Order of the predictor of step `i`.
    fn order(&self, i: usize) -> usize {
        2.min(self.steps() - i).min(i + 1)
    }

    /// The numbers of step `i`.
    ///
    /// # Panics
    /// When there is no such step.
    #[must_use]
    pub fn factors(&self, solver: Solver, i: usize) -> Factors {
        let sigma = self.sigmas[i];
        let update = match solver {
            Solver::Euler => Update::Euler { by: self.sigmas[i + 1] - sigma },
            Solver::UniPc => Update::UniPc {
                correct: (i > 0).then(|| self.correct(i)),
                predict: (self.sigmas[i + 1] != 0.0).then(|| self.predict(i)), // at 0: E = -1, a = 1, s = 0
            },
        };
        Factors { sigma, update }
    }

    fn correct(&self, i: usize) -> Correct {
        let (a_i, s_i, l_i) = self.level(i);
        let (_, s_p, l_p) = self.level(i - 1);
        let h = l_i - l_p;
        let e = (-h).exp_m1();
        let first_order = self.order(i - 1) == 1;
        let (rho, rho_last, r) = if first_order {
            (0.0, 0.5, 1.0)
        } else {
            let u = -h;
            let f1 = e / u - 1.0;
            let f2 = f1 / u - 0.5;
            let (b1, b2) = (f1 / e, 2.0 * f2 / e);
            let r = (self.level(i - 2).2 - l_p) / h;
            let rho = (b1 - b2) / (1.0 - r);
            (rho, b1 - rho, r)
        };
        Correct {
            keep: (s_i / s_p) as f32,
            k: (-a_i * e) as f32,
            back: (!first_order).then_some((rho / r) as f32),
            last: rho_last as f32,
        }
    }

    fn predict(&self, i: usize) -> Predict {
        let ((_, s_i, l_i), (a_n, s_n, l_n)) = (self.level(i), self.level(i + 1));
        let h = l_n - l_i;
        let e = (-h).exp_m1();
        Predict {
            keep: (s_n / s_i) as f32,
            k: (-a_n * e) as f32,
            slope: (self.order(i) != 1).then(|| (0.5 * h / (self.level(i - 1).2 - l_i)) as f32),
        }
    }
}

/// Walks a sample along a schedule. Holds at most three copies of the sample.
#[derive(Clone, Debug)]
pub struct Sampler {
    schedule: Schedule,
    solver: Solver,
    index: usize,
    /// Data predictions `m_{i-1}`, `m_{i-2}`, newest first.
    predictions: [Vec<f32>; 2],
    /// Corrected sample of the previous step.
    previous: Vec<f32>,
}

impl Sampler {
    /// A sampler at the first step.
    #[must_use]
    pub fn new(schedule: Schedule, solver: Solver) -> Self {
        Self { schedule, solver, index: 0, predictions: [vec![], vec![]], previous: vec![] }
    }

    /// The schedule.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Where the network has to be evaluated next; `None` when all steps were made.
    #[must_use]
    pub fn next_step(&self) -> Option<Step> {
        self.schedule.step(self.index)
    }

    /// Moves `x` to the next sigma, given the velocity `v` at `x` (guidance included).
    ///
    /// # Errors
    /// [`SamplerError::Finished`], [`SamplerError::Size`]; `x` is untouched then.
    pub fn step(&mut self, v: &[f32], x: &mut [f32]) -> Result<(), SamplerError> {
        let Some(step) = self.next_step() else {
            return Err(SamplerError::Finished(self.schedule.steps()));
        };
        let wrong = |sample| Err(SamplerError::Size { velocity: v.len(), sample });
        if v.len() != x.len() {
            return wrong(x.len());
        }
        if self.solver == Solver::UniPc && step.index > 0 && self.previous.len() != x.len() {
            return wrong(self.previous.len());
        }
        let Factors { sigma, update } = self.schedule.factors(self.solver, step.index);
        match update {
            Update::Euler { by } => x.iter_mut().zip(v).for_each(|(x, v)| *x += by * v),
            Update::UniPc { correct, predict } => self.unipc(sigma, correct, predict, v, x),
        }
        self.index += 1;
        Ok(())
    }

    fn unipc(
        &mut self,
        sigma: f32,
        correct: Option<Correct>,
        predict: Option<Predict>,
        v: &[f32],
        x: &mut [f32],
    ) {
        let m: Vec<f32> = x.iter().zip(v).map(|(x, v)| x - sigma * v).collect();
        let [m1, m2] = &self.predictions;
        if let Some(Correct { keep, k, back, last }) = correct {
            for (j, x) in x.iter_mut().enumerate() {
                let curve = back.map_or(0.0, |back| back * (m2[j] - m1[j]));
                *x = keep * self.previous[j] + k * (m1[j] + curve + last * (m[j] - m1[j]));
            }
        }
        self.previous.clear();
        self.previous.extend_from_slice(x);
        match predict {
            None => x.copy_from_slice(&m),
            Some(Predict { keep, k, slope }) => {
                for (j, x) in x.iter_mut().enumerate() {
                    let p = slope.map_or(0.0, |slope| slope * (m1[j] - m[j]));
                    *x = keep * *x + k * (m[j] + p);
                }
            }
        }
        self.predictions.swap(0, 1);
        self.predictions[0] = m;
    }
}

/// Classifier-free guidance `u + w (c - u)`, written over `unconditional`.
///
/// # Panics
/// If the two differ in size.
pub fn guide(unconditional: &mut [f32], conditional: &[f32], weight: f32) {
    assert_eq!(unconditional.len(), conditional.len(), "both velocities have the same size");
    for (u, c) in unconditional.iter_mut().zip(conditional) {
        *u += weight * (c - *u);
    }
}

/// The 1000 training sigmas for a shift, and the weight of each in the loss (DiffSynth-Studio's fine-tune of Wan).
///
/// Sigmas are `linspace(1, 0, 1001)` without the last, shifted; weights are
/// `exp(-2 ((1000 s - 500) / 1000)^2)` less their smallest, scaled to mean 1.
///
/// # Errors
/// [`SamplerError::Shift`].
pub fn training_table(shift: f64) -> Result<(Vec<f32>, Vec<f32>), SamplerError> {
    if !(shift.is_finite() && shift > 0.0) {
        return Err(SamplerError::Shift(shift));
    }
    let train = TRAIN_STEPS as f64;
    let sigma: Vec<f64> =
        linspace(1.0, 0.0, TRAIN_STEPS + 1)[..TRAIN_STEPS].iter().map(|&s| shifted(s, shift)).collect();
    let bell: Vec<f64> =
        sigma.iter().map(|s| (-2.0 * ((s * train - train / 2.0) / train).powi(2)).exp()).collect();
    let least = bell.iter().copied().fold(f64::INFINITY, f64::min);
    let sum: f64 = bell.iter().map(|y| y - least).sum();
    let weight = bell.iter().map(|y| ((y - least) * train / sum) as f32).collect();
    Ok((sigma.iter().map(|&s| s as f32).collect(), weight))
}

/// Seeded standard normal numbers: SplitMix64 and the Box-Muller transform in f64.
///
/// The same seed gives the same numbers on the same machine, whatever was drawn elsewhere.
#[derive(Clone, Debug)]
pub struct Noise {
    mix: SplitMix64,
    spare: Option<f32>,
}

impl Noise {
    /// A generator; different `stream`s of one `seed` are independent (targets, context noise, ...).
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        let mixed = SplitMix64::new(seed).next_u64() ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03);
        Self { mix: SplitMix64::new(mixed), spare: None }
    }

    /// The next number of N(0, 1).
    pub fn sample(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (first, second) = self.mix.normal_pair();
        self.spare = Some(second as f32);
        first as f32
    }

    /// `count` numbers of N(0, 1).
    #[must_use]
    pub fn draw(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.sample()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Velocity of N(m, q^2) data: the exact solution is known, `x_0 = m + q z` for `x_1 = z`.
    fn gaussian(x: f32, s: f32, m: f32, q: f32) -> f32 {
        let den = (1.0 - s).powi(2) * q * q + s * s;
        let r = x - (1.0 - s) * m;
        s / den * r - (m + q * q * (1.0 - s) / den * r)
    }

    fn run(grid: Grid, solver: Solver, steps: usize) -> f32 {
        let z = [-1.5f32, -0.2, 0.0, 0.7, 2.0];
        let mut x = z;
        let mut sampler = Sampler::new(Schedule::new(grid, steps, 3.0).unwrap(), solver);
        while let Some(step) = sampler.next_step() {
            let v: Vec<f32> = x.iter().map(|&x| gaussian(x, step.sigma, 0.4, 0.7)).collect();
            sampler.step(&v, &mut x).unwrap();
        }
        x.iter().zip(z).map(|(x, z)| (x - (0.4 + 0.7 * z)).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn solvers_reach_the_closed_form() {
        let cases = [
            (Grid::Plain, Solver::Euler, 200, 2e-2),
            (Grid::Plain, Solver::UniPc, 20, 5e-3),
            (Grid::Plain, Solver::UniPc, 80, 4e-3),
            (Grid::WanUnipc, Solver::UniPc, 50, 1e-2),
        ];
        for (grid, solver, steps, tolerance) in cases {
            let worst = run(grid, solver, steps);
            assert!(worst < tolerance, "{grid:?} {solver:?} {steps}: {worst}");
        }
        assert!(run(Grid::Plain, Solver::UniPc, 20) < run(Grid::Plain, Solver::Euler, 20));
    }

    #[test]
    fn bad_requests_are_refused() {
        assert_eq!(Schedule::new(Grid::Plain, 0, 5.0), Err(SamplerError::Steps(0)));
        assert_eq!(Schedule::new(Grid::Plain, 4, 0.0), Err(SamplerError::Shift(0.0)));
        let mut sampler = Sampler::new(Schedule::new(Grid::Plain, 1, 5.0).unwrap(), Solver::UniPc);
        let mut x = [0.0; 3];
        assert_eq!(sampler.step(&[0.0; 2], &mut x), Err(SamplerError::Size { velocity: 2, sample: 3 }));
        sampler.step(&[0.0; 3], &mut x).unwrap();
        assert_eq!(sampler.step(&[0.0; 3], &mut x), Err(SamplerError::Finished(1)));
    }

    #[test]
    fn noise_is_normal_seeded_and_split() {
        let x = Noise::new(7, 0).draw(20_000);
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let var = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        assert!(mean.abs() < 0.03 && (var - 1.0).abs() < 0.04, "{mean} {var}");
        assert_eq!(Noise::new(7, 0).draw(5), Noise::new(7, 0).draw(5));
        assert_ne!(Noise::new(7, 0).draw(5), Noise::new(7, 1).draw(5));
        assert_ne!(Noise::new(7, 0).draw(5), Noise::new(8, 0).draw(5));
    }
}
