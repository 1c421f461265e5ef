//! The fine-tune of a published model: which weights, on what sequences, for how long. It can be planned ([`crate::plan`]);
//! there is no trainer for it yet.

use std::fs;
use std::path::{Path, PathBuf};

use mindseye_engines::model::dit::DitConfig;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, SettingError};
use crate::family::{LoadModelError, parse};
use crate::optim::OptimConfig;
use crate::plan::Job;

/// `configs/train/wan22-*.toml`: a training configuration with a table `[finetune]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FineTuneConfig {
    /// Model configuration, relative to this file.
    pub model: PathBuf,
    /// Optimiser steps.
    pub steps: u64,
    /// Samples per step, over all devices and passes.
    pub batch: u64,
    /// Only weights whose names contain one of these are trained.
    pub only: Vec<String>,
    /// What a sample is.
    pub finetune: SampleConfig,
    /// Optimiser.
    pub optim: OptimConfig,
}

/// `[finetune]`: what a sample is, in latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleConfig {
    /// Context.
    pub context_latents: usize,
    /// The first image and the motion after it.
    pub target_latents: usize,
    /// Still images with the red box at the end.
    pub box_latents: usize,
}

/// What a fine-tune needs to know of its model.
#[derive(Clone, Debug, PartialEq)]
pub struct FineTuneModel {
    /// Name.
    pub name: String,
    /// The denoiser.
    pub dit: DitConfig,
}

impl FineTuneConfig {
    /// Whether a configuration file is one of a fine-tune; one that cannot be read is not.
    #[must_use]
    pub fn is_meant(path: &Path) -> bool {
        let table: toml::Table =
            fs::read_to_string(path).ok().and_then(|t| t.parse().ok()).unwrap_or_default();
        table.contains_key("finetune")
    }

    /// Reads a configuration and what it needs of the model that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field.
    pub fn load(path: &Path) -> Result<(Self, FineTuneModel), ConfigError> {
        let at = || path.to_path_buf();
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Io { path: at(), source })?;
        let config: Self = parse(&text).map_err(|source| ConfigError::Parse { path: at(), source })?;
        config.validate().map_err(|source| ConfigError::Setting { path: at(), source })?;
        let model = read_model(&path.parent().unwrap_or(Path::new(".")).join(&config.model))?;
        Ok((config, model))
    }

    fn validate(&self) -> Result<(), SettingError> {
        let expected = "1 or more";
        let SampleConfig { context_latents, target_latents, .. } = self.finetune;
        for (name, value) in [
            ("steps", self.steps),
            ("batch", self.batch),
            ("finetune.context_latents", context_latents as u64),
            ("finetune.target_latents", target_latents as u64),
        ] {
            if value == 0 {
                return Err(SettingError::Range { name, value: value.to_string(), expected });
            }
        }
        Ok(())
    }

    /// What there is to be planned.
    #[must_use]
    pub fn job<'a>(&'a self, model: &'a FineTuneModel) -> Job<'a> {
        let SampleConfig { context_latents, target_latents, box_latents } = self.finetune;
        Job {
            model: &model.name,
            dit: &model.dit,
            latents: context_latents + target_latents + box_latents,
            batch: self.batch,
            steps: self.steps,
            only: &self.only,
            optim: &self.optim,
        }
    }
}

/// Name and denoiser of a model configuration of any member of the family.
fn read_model(path: &Path) -> Result<FineTuneModel, LoadModelError> {
    #[derive(Deserialize)]
    struct Model {
        name: String,
        dit: DitConfig,
    }
    let at = || path.to_path_buf();
    let text = fs::read_to_string(path).map_err(|source| LoadModelError::Io { path: at(), source })?;
    let Model { name, dit } = parse(&text).map_err(|source| LoadModelError::Parse { path: at(), source })?;
    dit.validate().map_err(|e| LoadModelError::Invalid { path: at(), source: e.into() })?;
    Ok(FineTuneModel { name, dit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_is_that_of_the_paper() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/train");
        let load = |name: &str| FineTuneConfig::load(&configs.join(name)).expect("it is shipped");
        let ((ground, model), (navigate, _)) = (load("wan22-5b-ground.toml"), load("wan22-5b-navigate.toml"));
        assert_eq!((ground.batch, ground.steps, navigate.batch, navigate.steps), (160, 20_000, 160, 10_000));
        assert_eq!((ground.optim.lr, navigate.optim.lr), (1e-4, 1e-4));
        // 169 context frames, 161 of motion, 20 with the box.
        assert_eq!((ground.job(&model).latents, navigate.job(&model).latents), (43 + 41 + 5, 43 + 41));
        assert_eq!(model.dit.layers, 30);
        assert!(navigate.only.iter().any(|o| o == "camera_embedding"));
    }
}
