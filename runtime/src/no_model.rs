//! In the place of a model where there is none: frames are kept, and what can be answered is what a detector saw.

use crate::context::{EncodeError, GroupEncoder};
use crate::ground::{Mind, MindError, MindSpec, RaysError};
use crate::image::{ModelCamera, RgbImage};
use crate::imagine::{Dropped, RolloutSettings, Rope};
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::bundle::Guide;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::plucker::Intrinsics;
use mindseye_engines::sampler::{Grid, Solver};
use nalgebra::Isometry3;

/// Width and height of the pictures that are kept, for a person to look at.
const PICTURE: (usize, usize) = (104, 64);

/// A mind that knows no word, and an encoder that remembers nothing but the pictures themselves.
pub(crate) fn no_model() -> (Box<dyn Mind>, Box<dyn GroupEncoder + Send>) {
    let settings = RolloutSettings {
        target_latents: 1,
        gap: 0.0,
        max_span: None,
        steps: 1,
        min_steps: 1,
        guidance: 1.0,
        dropped: Dropped::default(),
        rope: Rope::default(),
        grid: Grid::Plain,
        shift: 1.0,
        solver: Solver::Euler,
        glance_timestep: 0.0,
        candidates: 1,
        seed: 0,
    };
    let spec = MindSpec {
        camera: ModelCamera::any(PICTURE.0, PICTURE.1),
        mounting: None,
        frame_period: TimeDelta::from_millis(100),
        latent_len: 1,
        context_max: 1,
        context_trained: 1,
        settings,
        lift: None,
        attributes: Vec::new(),
        box_min: 1.0,
        box_latents: 1,
        detail: None,
        guide: Guide::None,
        bundle_sha256: String::new(),
        engine_sha256: String::new(),
    };
    let config = DitConfig { layers: 0, ..DitConfig::SMALLEST };
    (Box::new(NoModel { spec, denoiser: NoDenoiser(config) }), Box::new(NoEncoder))
}

struct NoModel {
    spec: MindSpec,
    denoiser: NoDenoiser,
}

impl Mind for NoModel {
    fn spec(&self) -> &MindSpec {
        &self.spec
    }

    fn encode_text(&mut self, _: &str) -> Result<Vec<f32>, MindError> {
        Err(MindError::NoModel)
    }

    fn encode_still(&mut self, _: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        Ok(vec![0.0])
    }

    fn decode(&mut self, _: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        Err(MindError::NoModel)
    }

    fn camera_rays(&self, _: &[Isometry3<f64>], _: Option<&Intrinsics>) -> Result<Vec<f32>, RaysError> {
        Err(RaysError::NotTrained)
    }

    fn denoiser(&mut self) -> &mut dyn Denoise {
        &mut self.denoiser
    }
}

/// A network's sizes without the network.
pub(crate) struct NoDenoiser(pub DitConfig);

impl Denoise for NoDenoiser {
    fn config(&self) -> &DitConfig {
        &self.0
    }

    fn denoise(&mut self, _: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        Err(DenoiseError::Backend(MindError::NoModel.to_string()))
    }
}

struct NoEncoder;

impl GroupEncoder for NoEncoder {
    fn latent_len(&self) -> usize {
        1
    }

    fn encode_group(&mut self, _: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
        latent.fill(0.0);
        Ok(())
    }

    fn encode_still(&mut self, _: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
        latent.fill(0.0);
        Ok(())
    }

    fn reset(&mut self) {}
}
