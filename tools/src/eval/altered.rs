//! A mind of which something is put in another's place, to see what answers rest on.
//!
//! * [`Altered::replacement`] takes the place of what the denoiser predicts for the video; what the heads say stays the
//!   network's own. So the sampler ends with a drive that shows nothing, noise, another house, or the right way to another
//!   place, while all other witnesses are what they were: the control that the drive decides.
//! * [`Altered::mind`] with an error reads depth from the house itself, with a given error, in place of the bundle's reader.

use std::collections::HashMap;
use std::ops::Range;

use mindseye::ground::{Mind, MindError};
use mindseye::image::RgbImage;
use mindseye::interpose::{Interpose, Interposed};
use mindseye::visit::Visit;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::Prediction;
use mindseye_world::{Camera, Frame, RenderOptions, Rng, render_with};

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
#[derive(Default)]
pub struct Altered {
    depth: Option<TrueDepth>,
    /// Latents of a rollout.
    targets: usize,
    /// What takes the place of a part of all drives that are sampled from now on.
    pub replacement: Option<Replacement>,
}

impl Altered {
    /// A mind as it is. With an error (a share of the distance), depth is that of the visited houses
    /// ([`Self::learn_depth`]).
    #[must_use]
    pub fn mind(mind: Box<dyn Mind>, depth_error: Option<f64>) -> Interposed<Self> {
        let mut mind = Interposed::new(mind, Self::default());
        mind.by.targets = mind.spec.settings.target_latents;
        mind.by.read_depth(depth_error);
        if depth_error.is_some() {
            mind.spec.detail = Some((2 * mind.spec.camera.width, 2 * mind.spec.camera.height));
        }
        mind
    }

    /// From now on depth is that of the visited houses, with this error (a share of the distance), or the bundle's. None is
    /// learned yet.
    pub fn read_depth(&mut self, error: Option<f64>) {
        self.depth = error.map(|error| TrueDepth { error, known: HashMap::new() });
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

impl Interpose for Altered {
    fn denoise(&mut self, denoiser: &mut dyn Denoise, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        let mut out = denoiser.denoise(step)?;
        let Some(replacement) = &self.replacement else { return Ok(out) };
        let config = denoiser.config();
        let frame = config.in_channels * config.latent_height * config.latent_width;
        let first = step.frames().saturating_sub(self.targets) + replacement.latents.start;
        let sigma = step.timesteps.last().map_or(1.0, |t| (t / 1000.0) as f32).max(1e-6);
        let values = replacement.values.iter().take(replacement.latents.len() * frame);
        for (at, value) in values.enumerate().map(|(i, v)| (first * frame + i, v)) {
            let (Some(out), Some(x)) = (out.prediction.get_mut(at), step.latents.get(at)) else { break };
            *out = match config.prediction {
                Prediction::X0 => *value,
                Prediction::Velocity => (x - value) / sigma,
            };
        }
        Ok(out)
    }

    fn depth(&mut self, mind: &mut dyn Mind, picture: &RgbImage) -> Result<Option<Vec<f32>>, MindError> {
        match &self.depth {
            Some(depth) => Ok(depth.known.get(&picture.data).cloned()),
            None => mind.depth(picture),
        }
    }
}
