//! Calibration inputs without a recording: seeded noise of the right shapes. Good enough to build and to time an
//! engine; ranges that matter come from rendered scenes or bags.

use mindseye_base::random::SplitMix64;

use super::{CalibrationSource, Inputs, SuppliedError};
use mindseye_engines::backend::Tensor;
use mindseye_engines::denoise::{DenoiseError, DenoiseStep, HostInputs};
use mindseye_engines::model::dit::DitConfig;

/// Inputs of the joint denoiser: normal latents and text rows, context clean, targets at a random timestep.
#[derive(Clone, Debug)]
pub struct SyntheticDenoiser {
    config: DitConfig,
    context: usize,
    targets: usize,
    gap: f64,
    items: u64,
    seed: u64,
    position: u64,
}

impl SyntheticDenoiser {
    /// `items` inputs of `context` and `targets` latents.
    #[must_use]
    pub fn new(config: DitConfig, context: usize, targets: usize, gap: f64, items: u64, seed: u64) -> Self {
        SyntheticDenoiser { config, context, targets, gap, items, seed, position: 0 }
    }
}

fn normal(mix: &mut SplitMix64, n: usize) -> Vec<f32> {
    (0..n).map(|_| mix.normal_pair().0 as f32).collect()
}

/// The named tensors that the joint denoiser's graph takes for one step at batch 1.
///
/// # Errors
/// A size of the step disagrees with the configuration.
pub fn denoiser_inputs(c: &DitConfig, step: &DenoiseStep<'_>) -> Result<Inputs, DenoiseError> {
    let host = HostInputs::new(c, step)?;
    let (f, rows, per_frame) = (step.frames(), step.timesteps.len(), c.tokens_per_frame());
    let shape = [1, c.in_channels, f, c.latent_height, c.latent_width];
    let mut inputs: Inputs = vec![
        ("latents".into(), Tensor::f32(&shape, host.latents)),
        ("time".into(), Tensor::f32(&[rows, c.freq_dim], host.time)),
        ("rows".into(), Tensor::i64(&[1, f], host.rows)),
        ("text".into(), Tensor::f32(&[1, c.text_len, c.text_dim], step.text.to_vec())),
        ("cos".into(), Tensor::f32(&[f * per_frame, c.head_dim / 2], host.cos)),
        ("sin".into(), Tensor::f32(&[f * per_frame, c.head_dim / 2], host.sin)),
    ];
    if c.pooled_text {
        inputs.push(("row_batch".into(), Tensor::i64(&[rows], vec![0; rows])));
    }
    if c.camera_channels > 0 {
        inputs.push(("camera".into(), Tensor::f32(&[1, f, per_frame, c.camera_channels], host.camera)));
    }
    if c.guide_channels() > 0 {
        inputs.push(("guide".into(), Tensor::f32(&[1, f, per_frame, c.guide_channels()], host.guide)));
    }
    Ok(inputs)
}

impl CalibrationSource for SyntheticDenoiser {
    fn describe(&self) -> String {
        format!(
            "synthetic noise, {} items of {} + {} latents, seed {}",
            self.items, self.context, self.targets, self.seed
        )
    }

    fn count(&self) -> Option<u64> {
        Some(self.items)
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        self.position = 0;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        if self.position == self.items {
            return Ok(None);
        }
        self.position += 1;
        let c = &self.config;
        let mut noise = SplitMix64::new(self.seed.wrapping_mul(1_000_003).wrapping_add(self.position));
        let frames = self.context + self.targets;
        let latents = normal(&mut noise, frames * c.in_channels * c.latent_height * c.latent_width);
        let text = normal(&mut noise, c.text_len * c.text_dim);
        let camera = normal(&mut noise, frames * c.tokens_per_frame() * c.camera_channels);
        // Targets have carried latents, trusted anywhere between not at all and wholly.
        let mut guide = normal(&mut noise, frames * c.tokens_per_frame() * c.guide_channels());
        for (i, token) in guide.chunks_exact_mut(c.guide_channels().max(1)).enumerate() {
            if i < self.context * c.tokens_per_frame() {
                token.fill(0.0);
            } else if let Some(trust) = token.last_mut() {
                *trust = 0.5 + 0.5 * trust.tanh();
            }
        }
        let timesteps = [0.0, 1000.0 * noise.unit_above_zero()];
        let rows: Vec<usize> = (0..frames).map(|f| usize::from(f >= self.context)).collect();
        let t_index: Vec<f64> = (0..frames)
            .map(|f| if f < self.context { f as f64 } else { f as f64 - 1.0 + self.gap })
            .collect();
        let step = DenoiseStep {
            latents: &latents,
            timesteps: &timesteps,
            rows: &rows,
            t_index: &t_index,
            text: &text,
            camera: (c.camera_channels > 0).then_some(&camera),
            guide: (c.guide_channels() > 0).then_some(&guide),
        };
        denoiser_inputs(c, &step).map(Some).map_err(SuppliedError::new)
    }
}
