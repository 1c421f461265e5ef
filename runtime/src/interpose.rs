//! A mind between which and its user something is put: what its denoiser says is watched, or changed. All else is the
//! mind's own, so that what a mind learns to do is never lost on the way.

use crate::context::EncodeError;
use crate::ground::{Mind, MindError, MindSpec, RaysError};
use crate::image::RgbImage;
use crate::served::{Here, Imagine};
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::plucker::Intrinsics;
use nalgebra::Isometry3;

/// What is put between.
pub trait Interpose: Send {
    /// An evaluation of the denoiser.
    ///
    /// # Errors
    /// As [`Denoise::denoise`].
    fn denoise(&mut self, denoiser: &mut dyn Denoise, step: &DenoiseStep) -> Result<Denoised, DenoiseError>;

    /// As [`Mind::begin`].
    fn begin(&mut self, _left: Option<TimeDelta>) {}

    /// Rows of a text; the mind's own where nothing else is said.
    ///
    /// # Errors
    /// As [`Mind::encode_text`].
    fn encode_text(&mut self, mind: &mut dyn Mind, text: &str) -> Result<Vec<f32>, MindError> {
        mind.encode_text(text)
    }

    /// Who imagines; the denoiser, by [`Interpose::denoise`], where nothing else is said.
    fn imaginer(interposed: &mut Interposed<Self>) -> Box<dyn Imagine + '_>
    where
        Self: Sized,
    {
        Box::new(Here(interposed))
    }

    /// As [`Mind::instead`].
    fn instead(&mut self) -> Option<(&mut dyn Mind, String)> {
        None
    }

    /// Depth of a picture; the mind's own where nothing else is said.
    ///
    /// # Errors
    /// As [`Mind::depth`].
    fn depth(&mut self, mind: &mut dyn Mind, picture: &RgbImage) -> Result<Option<Vec<f32>>, MindError> {
        mind.depth(picture)
    }
}

/// See the module.
pub struct Interposed<I> {
    mind: Box<dyn Mind>,
    /// What it says about itself.
    pub spec: MindSpec,
    config: DitConfig,
    /// What is put between.
    pub by: I,
}

impl<I: Interpose> Interposed<I> {
    /// Puts `by` before a mind.
    pub fn new(mut mind: Box<dyn Mind>, by: I) -> Self {
        let (spec, config) = (mind.spec().clone(), mind.denoiser().config().clone());
        Self { mind, spec, config, by }
    }
}

impl<I: Interpose> Mind for Interposed<I> {
    fn spec(&self) -> &MindSpec {
        &self.spec
    }

    fn begin(&mut self, left: Option<TimeDelta>) {
        self.mind.begin(left);
        self.by.begin(left);
    }

    fn encode_text(&mut self, text: &str) -> Result<Vec<f32>, MindError> {
        self.by.encode_text(self.mind.as_mut(), text)
    }

    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        self.mind.encode_still(frame)
    }

    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        self.mind.decode(latents)
    }

    fn depth(&mut self, picture: &RgbImage) -> Result<Option<Vec<f32>>, MindError> {
        self.by.depth(self.mind.as_mut(), picture)
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

    fn imaginer(&mut self) -> Box<dyn Imagine + '_> {
        I::imaginer(self)
    }

    fn instead(&mut self) -> Option<(&mut dyn Mind, String)> {
        self.by.instead()
    }
}

impl<I: Interpose> Denoise for Interposed<I> {
    fn config(&self) -> &DitConfig {
        &self.config
    }

    fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        self.by.denoise(self.mind.denoiser(), step)
    }
}
