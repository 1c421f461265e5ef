//! A mind of which something is put in another's place, to see what answers rest on.
//!
//! * [`Altered::replacement`] takes the place of what the denoiser predicts for the video; what the heads say stays the
//!   network's own. So the sampler ends with a drive that shows nothing, noise, another house, or the right way to another
//!   place, while all other witnesses are what they were: the control that the drive decides.
//! * [`Altered::with_true_depth`] reads depth from the house itself, with a given error, in place of the bundle's reader.

use std::collections::HashMap;
use std::ops::Range;

use mindseye::context::EncodeError;
use mindseye::ground::{Mind, MindError, MindSpec, RaysError};
use mindseye::image::RgbImage;
use mindseye::visit::Visit;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::plucker::Intrinsics;
use mindseye_world::{Camera, Frame, RenderOptions, Rng, render_with};
use nalgebra::Isometry3;

/// What takes the place of a part of a drive.
#[derive(Clone, Debug, PartialEq)]
pub struct Replacement {
    /// Latents of the rollout, the given first one being 0.
    pub latents: Range<usize>,
    /// Their values, `[latents, channels, height, width]`.
    pub values: Vec<f32>,
}

/// Depth that is known from the house.
struct TrueDepth {
    /// What it is off by, as a share of the distance: one factor per picture and one per pixel, alike.
    error: f64,
    known: HashMap<Vec<u8>, Vec<f32>>,
}

/// See the module.
pub struct Altered {
    mind: Box<dyn Mind>,
    spec: MindSpec,
    config: DitConfig,
    depth: Option<TrueDepth>,
    /// What takes the place of a part of all drives that are sampled from now on.
    pub replacement: Option<Replacement>,
}

impl Altered {
    /// The mind as it is.
    #[must_use]
    pub fn new(mut mind: Box<dyn Mind>) -> Self {
        let (spec, config) = (mind.spec().clone(), mind.denoiser().config().clone());
        Self { mind, spec, config, depth: None, replacement: None }
    }

    /// Depth is that of the visited houses ([`Self::learn_depth`]), off by this share.
    #[must_use]
    pub fn with_true_depth(mut self, error: f64) -> Self {
        self.depth = Some(TrueDepth { error, known: HashMap::new() });
        self.spec.detail = Some((2 * self.spec.camera.width, 2 * self.spec.camera.height));
        self
    }

    /// Learns the depth of a visit's pictures, where depth is true; forgets those of others before.
    pub fn learn_depth(&mut self, visits: &[&Visit], camera: &Camera) {
        let Some(depth) = &mut self.depth else { return };
        depth.known.clear();
        let fine = Camera { width: 2 * camera.width, height: 2 * camera.height, ..*camera };
        let options = RenderOptions { rgb: false, ids: false, ..RenderOptions::default() };
        let mut frame = Frame::new();
        for visit in visits {
            let mut rng = Rng::new(visit.house.seed ^ 0xdeb7);
            let kept = visit.memory.iter().filter_map(|c| {
                Some((
                    c.detail.as_ref()?,
                    *visit.sweep.get(mindseye::context::GROUP * c.info.index as usize)?,
                ))
            });
            for (picture, pose) in kept.chain([(&visit.newest_detail, visit.here)]) {
                render_with(&visit.house, pose, &fine, options, &mut frame);
                let each = depth.error / std::f64::consts::SQRT_2;
                let whole = 1.0 + each * rng.normal();
                let noisy = |z: &f32| (f64::from(*z) * whole * (1.0 + each * rng.normal())) as f32;
                depth.known.insert(picture.data.clone(), frame.depth.iter().map(noisy).collect());
            }
        }
    }
}

impl Mind for Altered {
    fn spec(&self) -> &MindSpec {
        &self.spec
    }

    fn encode_text(&mut self, text: &str) -> Result<Vec<f32>, MindError> {
        self.mind.encode_text(text)
    }

    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        self.mind.encode_still(frame)
    }

    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        self.mind.decode(latents)
    }

    fn depth(&mut self, picture: &RgbImage) -> Result<Option<Vec<f32>>, MindError> {
        match &self.depth {
            Some(depth) => Ok(depth.known.get(&picture.data).cloned()),
            None => self.mind.depth(picture),
        }
    }

    fn encode_frames(&mut self, frames: &[RgbImage]) -> Result<Option<Vec<f32>>, MindError> {
        self.mind.encode_frames(frames)
    }

    fn decodes_alone(&self) -> bool {
        self.mind.decodes_alone()
    }

    fn camera_rays(
        &self,
        here_from_camera: &[Isometry3<f64>],
        intrinsics: Option<&Intrinsics>,
    ) -> Result<Vec<f32>, RaysError> {
        self.mind.camera_rays(here_from_camera, intrinsics)
    }

    fn denoiser(&mut self) -> &mut dyn Denoise {
        self
    }
}

impl Denoise for Altered {
    fn config(&self) -> &DitConfig {
        &self.config
    }

    fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        let mut out = self.mind.denoiser().denoise(step)?;
        let Some(replacement) = &self.replacement else { return Ok(out) };
        let frame = self.config.in_channels * self.config.latent_height * self.config.latent_width;
        let targets = self.spec.settings.target_latents;
        let first = step.frames().saturating_sub(targets) + replacement.latents.start;
        let sigma = step.timesteps.last().map_or(1.0, |t| (t / 1000.0) as f32).max(1e-6);
        let values = replacement.values.iter().take(replacement.latents.len() * frame);
        for (at, value) in values.enumerate().map(|(i, v)| (first * frame + i, v)) {
            let (Some(out), Some(x)) = (out.prediction.get_mut(at), step.latents.get(at)) else { break };
            *out = match self.config.prediction {
                Prediction::X0 => *value,
                Prediction::Velocity => (x - value) / sigma,
            };
        }
        Ok(out)
    }
}
