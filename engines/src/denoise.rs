//! The denoiser as its callers see it: latents in, a prediction and the lift heads out.
//!
//! Everything that a graph does not compute itself is computed here, on the host and in `f64`: rotary tables at
//! explicit temporal indices, the sinusoids of the distinct timesteps, and which row each frame uses.

use crate::model::dit::DitConfig;
use crate::sampler::{Schedule, Solver};

/// One evaluation of the network, batch 1.
#[derive(Clone, Debug)]
pub struct DenoiseStep<'a> {
    /// Latents `[frames, channels, height, width]`, context first, frame by frame.
    pub latents: &'a [f32],
    /// The distinct timesteps of this call, 0..1000 (0 = clean).
    pub timesteps: &'a [f64],
    /// For every frame, which of `timesteps` it has.
    pub rows: &'a [usize],
    /// Temporal index of every frame (source latent index; targets start `gap` after the last).
    pub t_index: &'a [f64],
    /// Text rows `[text_len, text_dim]`, zero-padded.
    pub text: &'a [f32],
    /// Camera rays `[frames, tokens, camera_channels]`, zero where no pose is given; `None` = all zero.
    pub camera: Option<&'a [f32]>,
    /// Carried latents and their trust `[frames, tokens, guide_channels]` (see [`DitConfig::guide_channels`]); `None` =
    /// all zero: the network predicts alone.
    pub guide: Option<&'a [f32]>,
}

impl DenoiseStep<'_> {
    /// Number of latent frames.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.rows.len()
    }
}

/// What the network says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Denoised {
    /// Velocity or clean sample, as the configuration's `prediction` says: `[frames, channels, height, width]`.
    pub prediction: Vec<f32>,
    /// `(x, y, cos yaw, sin yaw)` of the base at the last image of each latent frame, relative to the base at the
    /// first target frame (x forward, y left, metres). The length of the (cos, sin) part is a confidence. Empty
    /// when the network has no lift heads.
    pub pose: Vec<[f32; 4]>,
    /// Logit, per frame and token, that the named object is seen there: `[frames, tokens]`.
    pub mask: Vec<f32>,
    /// `(forward, left)` of the named object's centre from the base at the last image of each latent frame,
    /// metres, per token: `[frames, tokens, 2]`. Meant where the mask is on.
    pub locate: Vec<[f32; 2]>,
}

/// A sample to be walked down the noise levels where the network runs.
#[derive(Clone, Debug)]
pub struct WalkPlan<'a> {
    /// The pass of the first step and, with guidance, the unconditional branch's: given frames at the first of two
    /// timesteps, then all frames of the sample but its first, which is the last of those given.
    pub branches: Vec<DenoiseStep<'a>>,
    /// The sample `[frames, channels, height, width]`.
    pub sample: &'a [f32],
    /// Noise levels to visit.
    pub schedule: &'a Schedule,
    /// How to go from level to level.
    pub solver: Solver,
    /// Weight of guidance.
    pub guidance: f32,
}

/// A sample on its way, on the device on which the network runs. What it computes is what [`crate::sampler::Sampler`]
/// and [`crate::sampler::guide`] do with the same predictions, to the bit.
pub trait Walk {
    /// Makes the next step; returns its estimate of the clean sample, which is all that is copied.
    ///
    /// # Errors
    /// The backend fails, or all steps were made.
    fn step(&mut self) -> Result<Vec<f32>, DenoiseError>;

    /// The sample as it is now, and what the heads said in the last step (no prediction).
    ///
    /// # Errors
    /// The backend fails, or no step was made.
    fn end(&mut self) -> Result<(Vec<f32>, Denoised), DenoiseError>;
}

/// Something that can evaluate the denoiser: a backend's session, or the eager interpreter.
pub trait Denoise {
    /// The configuration of the network.
    fn config(&self) -> &DitConfig;
    /// Evaluates the network once.
    ///
    /// # Errors
    /// When a size disagrees with the configuration or the backend fails.
    fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError>;

    /// Puts a sample where the network runs, to be moved on there; `None` where that is the host.
    ///
    /// # Errors
    /// As [`Denoise::denoise`].
    fn walk<'s>(&'s mut self, plan: &WalkPlan<'_>) -> Result<Option<Box<dyn Walk + 's>>, DenoiseError> {
        let _ = plan;
        Ok(None)
    }
}

/// Why a denoiser evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DenoiseError {
    /// An input has the wrong number of elements.
    #[error("denoiser input `{name}`: expected {expected} values, got {got}")]
    Size {
        /// Input.
        name: &'static str,
        /// Wanted number of values.
        expected: usize,
        /// Given number of values.
        got: usize,
    },
    /// The configuration describes no network.
    #[error(transparent)]
    Config(#[from] crate::model::ConfigError),
    /// The backend failed.
    #[error("denoiser: {0}")]
    Backend(String),
}

/// Host-computed inputs of the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct HostInputs {
    /// `[channels, frames, height, width]`: the graph's layout of the latents.
    pub latents: Vec<f32>,
    /// Sinusoids `[timesteps, freq_dim]`.
    pub time: Vec<f32>,
    /// Row of each frame `[frames]`.
    pub rows: Vec<i64>,
    /// Rotary cosines `[frames * tokens, head_dim / 2]`.
    pub cos: Vec<f32>,
    /// Rotary sines, same shape.
    pub sin: Vec<f32>,
    /// Camera rays `[frames, tokens, camera_channels]`; empty when the network takes none.
    pub camera: Vec<f32>,
    /// Carried latents and their trust `[frames, tokens, guide_channels]`; empty when the network takes none.
    pub guide: Vec<f32>,
}

impl HostInputs {
    /// Checks the sizes of a step and computes what the graph expects.
    ///
    /// # Errors
    /// [`DenoiseError::Size`] naming the input that does not fit.
    pub fn new(cfg: &DitConfig, step: &DenoiseStep) -> Result<Self, DenoiseError> {
        let f = step.frames();
        let hw = cfg.latent_height * cfg.latent_width;
        let check = |name, expected: usize, got: usize| {
            if expected == got { Ok(()) } else { Err(DenoiseError::Size { name, expected, got }) }
        };
        check("latents", f * cfg.in_channels * hw, step.latents.len())?;
        check("t_index", f, step.t_index.len())?;
        check("text", cfg.text_len * cfg.text_dim, step.text.len())?;
        if let Some(bad) = step.rows.iter().find(|r| **r >= step.timesteps.len()) {
            return Err(DenoiseError::Size { name: "rows", expected: step.timesteps.len(), got: *bad });
        }
        // What the network takes for each token, zero where it is not given.
        let per_token = |name, channels: usize, given: Option<&[f32]>| {
            let n = f * cfg.tokens_per_frame() * channels;
            match given.filter(|_| channels > 0) {
                Some(values) => check(name, n, values.len()).map(|()| values.to_vec()),
                None => Ok(vec![0.0; n]),
            }
        };
        let camera = per_token("camera", cfg.camera_channels, step.camera)?;
        let guide = per_token("guide", cfg.guide_channels(), step.guide)?;
        let mut latents = vec![0.0; step.latents.len()];
        for t in 0..f {
            for c in 0..cfg.in_channels {
                let from = (t * cfg.in_channels + c) * hw;
                let to = (c * f + t) * hw;
                latents[to..to + hw].copy_from_slice(&step.latents[from..from + hw]);
            }
        }
        let (cos, sin) = cfg.rotary_tables(step.t_index);
        Ok(Self {
            latents,
            time: step.timesteps.iter().flat_map(|t| sinusoid(*t, cfg.freq_dim)).collect(),
            rows: step.rows.iter().map(|r| *r as i64).collect(),
            cos,
            sin,
            camera,
            guide,
        })
    }
}

/// Sinusoidal features of a timestep in 0..1000: `[cos(half) | sin(half)]`, angles `t * 10000^(-i/half)` in `f64`
/// (Wan2.2; cosines first).
#[must_use]
pub fn sinusoid(t: f64, width: usize) -> Vec<f32> {
    let half = width / 2;
    let angle = |i: usize| t * 10000f64.powf(-(i as f64) / half as f64);
    (0..half).map(|i| angle(i).cos() as f32).chain((0..half).map(|i| angle(i).sin() as f32)).collect()
}

/// Reorders `[channels, frames, h, w]` to `[frames, channels, h, w]`.
#[must_use]
pub fn frames_first(x: &[f32], channels: usize, frames: usize, hw: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for c in 0..channels {
        for t in 0..frames {
            let (from, to) = ((c * frames + t) * hw, (t * channels + c) * hw);
            out[to..to + hw].copy_from_slice(&x[from..from + hw]);
        }
    }
    out
}
