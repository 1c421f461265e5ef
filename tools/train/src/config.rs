//! The configuration of a training run, `configs/train/*.toml`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mindseye_world::Difficulty;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::{Variety, Worlds};
use crate::family::{HouseModel, LoadModelError, ParseError, parse};
use crate::guide::GuideConfig;
use crate::net::LossWeights;
use crate::optim::OptimConfig;
use crate::run::learning_rate;

/// Why a training configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The file is no such configuration.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: ParseError,
    },
    /// A setting is out of range.
    #[error("{path}: {source}")]
    Setting {
        /// The file.
        path: PathBuf,
        /// Which one.
        source: SettingError,
    },
    /// The model that it names cannot be used.
    #[error(transparent)]
    Model(#[from] LoadModelError),
}

/// A setting that is out of range or does not fit another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SettingError {
    /// A value is out of range.
    #[error("{name} = {value}: expected {expected}")]
    Range {
        /// Its name, with that of its table.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// The batch cannot be shared among the workers.
    #[error("batch = {batch} must be a positive multiple of workers = {workers}")]
    Batch {
        /// Samples per step.
        batch: usize,
        /// Parallel workers.
        workers: usize,
    },
    /// A worker's share cannot be taken in equal parts.
    #[error("accumulate = {accumulate} must divide batch / workers = {share}")]
    Accumulate {
        /// Passes per step.
        accumulate: usize,
        /// Samples of one worker in one step.
        share: usize,
    },
    /// The student's noise levels are not among the teacher's.
    #[error("distill.steps = {steps} must divide distill.teacher_steps = {teacher_steps}")]
    DistillSteps {
        /// Steps of the student.
        steps: usize,
        /// Steps of the teacher.
        teacher_steps: usize,
    },
    /// Sizes of the depth reader.
    #[error(transparent)]
    Depth(#[from] mindseye_engines::model::ConfigError),
    /// The configuration and its model do not agree on a guide.
    #[error("{0}")]
    Guide(&'static str),
    /// A fine-tune of which only the arithmetic is given.
    #[error("it can only be planned (--plan): a run needs the tables [course] and [latents]")]
    Plan,
    /// Clips are asked for, but not where they are.
    #[error("data.path: missing; kind = \"clips\" needs a directory")]
    ClipsPath,
    /// Settings of clips beside the procedural house.
    #[error("data: kind = \"house\" takes no other setting")]
    HouseData,
}

/// `configs/train/*.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Model configuration, relative to this file.
    pub model: PathBuf,
    /// Seed of weights, data and noise.
    pub seed: u64,
    /// The world that houses are drawn from.
    pub difficulty: Difficulties,
    /// Optimiser steps.
    pub steps: u64,
    /// Samples per step.
    pub batch: usize,
    /// Parallel workers; part of the result, since sums are taken in their order.
    pub workers: usize,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Step at which the linear decay to zero begins.
    pub decay_from: u64,
    /// Decay of the averaged weights.
    pub ema: f64,
    /// Share of navigation samples.
    pub navigate: f64,
    /// Share of grounding samples whose name is absent.
    pub absent: f64,
    /// Share of samples whose context, first image and name are dropped together.
    pub drop: f64,
    /// Share of samples with a noise level in [0.9, 1].
    pub high_noise: f64,
    /// Shift of the other noise levels.
    pub shift: f64,
    /// Trains the one-way mask instead of the joint forward.
    #[serde(default)]
    pub one_way: bool,
    /// Only weights whose names contain one of these are trained; empty = all.
    #[serde(default)]
    pub only: Vec<String>,
    /// Blocks that the codec's basis is computed from.
    pub codec_blocks: usize,
    /// Steps between checkpoints and between lines of the metrics file.
    pub checkpoint_every: u64,
    /// Steps between metrics lines.
    pub log_every: u64,
    /// Steps between evaluations on unseen houses.
    pub eval_every: u64,
    /// Unseen houses per evaluation.
    pub eval_houses: usize,
    /// Passes per step: a worker's share of the batch is taken in this many parts and the gradients are summed.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Keeps for gradients only what passes between blocks and computes the rest again, where the device can: less memory,
    /// more arithmetic, the same step.
    #[serde(default)]
    pub checkpoint_blocks: bool,
    /// Products in bfloat16, weights and sums in f32; the eager interpreter refuses it.
    #[serde(default)]
    pub bf16: bool,
    /// Threads per worker that make samples ahead of the step that uses them, which changes nothing but the time that a
    /// device waits; 0 = the worker makes its own.
    #[serde(default)]
    pub render_threads: usize,
    /// Draws of noise for each sample: a worker's share has this many times fewer samples. A device that is faster than
    /// rendering waits less and sees each recording more often.
    #[serde(default = "one")]
    pub noise_draws: usize,
    /// How varied pictures and recordings are.
    #[serde(default)]
    pub variety: Variety,
    /// Loss weights.
    pub loss: LossWeights,
    /// Optimiser.
    pub optim: OptimConfig,
    /// Learns from a guided teacher to need fewer steps, instead of from the samples alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillConfig>,
    /// What the samples' guides are like; there exactly where the model takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guide: Option<GuideConfig>,
    /// Where samples come from; by default the procedural house.
    #[serde(default, skip_serializing_if = "is_default")]
    pub data: DataConfig,
}

/// `difficulty` of a training configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Difficulties {
    /// The name of one.
    One(String),
    /// Several by their names, with the share of houses that each has: `{ plain = 1, house = 2 }`.
    Shares(BTreeMap<String, f64>),
}

impl Difficulties {
    /// The worlds.
    ///
    /// # Errors
    /// When a name is unknown, a share is not above 0, or there is none.
    pub fn worlds(&self) -> Result<Worlds, SettingError> {
        let named = |name: &String| {
            Difficulty::named(name).ok_or_else(|| SettingError::Range {
                name: "difficulty",
                value: format!("{name:?}"),
                expected: "\"plain\", \"house\", \"furnished\" or \"apartment\"",
            })
        };
        match self {
            Self::One(name) => Ok(named(name)?.into()),
            Self::Shares(shares) => {
                let worlds: Result<_, SettingError> =
                    shares.iter().map(|(name, share)| Ok((*share, named(name)?))).collect();
                Worlds::mixed(worlds?).ok_or_else(|| SettingError::Range {
                    name: "difficulty",
                    value: format!("{shares:?}"),
                    expected: "at least one name, each with a share above 0",
                })
            }
        }
    }
}

impl std::fmt::Display for Difficulties {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::One(name) => f.write_str(name),
            Self::Shares(shares) => f.write_str(&shares.keys().cloned().collect::<Vec<_>>().join(" and ")),
        }
    }
}

fn one() -> usize {
    1
}

fn is_default(data: &DataConfig) -> bool {
    *data == DataConfig::default()
}

/// Whether a configuration file has a table of this name; one that cannot be read has none.
pub(crate) fn has_table(path: &Path, name: &str) -> bool {
    let table: toml::Table = fs::read_to_string(path).ok().and_then(|t| t.parse().ok()).unwrap_or_default();
    table.contains_key(name)
}

/// Reads a configuration file and checks its settings.
pub(crate) fn read<C: DeserializeOwned>(
    path: &Path,
    validate: impl FnOnce(&C) -> Result<(), SettingError>,
) -> Result<C, ConfigError> {
    let at = || path.to_path_buf();
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Io { path: at(), source })?;
    let config = parse(&text).map_err(|source| ConfigError::Parse { path: at(), source })?;
    validate(&config).map_err(|source| ConfigError::Setting { path: at(), source })?;
    Ok(config)
}

impl TrainConfig {
    /// Reads a configuration and the model that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field.
    pub fn load(path: &Path) -> Result<(Self, HouseModel), ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Io { path: path.to_path_buf(), source })?;
        let config: Self =
            parse(&text).map_err(|source| ConfigError::Parse { path: path.to_path_buf(), source })?;
        let model = HouseModel::load(&path.parent().unwrap_or(Path::new(".")).join(&config.model))?;
        let disagreement = match (&config.guide, &model.dit.guide) {
            (Some(_), None) => Err(SettingError::Guide("[guide] is set, but the model's [dit] has no guide")),
            (None, Some(_)) => {
                Err(SettingError::Guide("the model's [dit] has a guide, but [guide] is missing"))
            }
            _ => Ok(()),
        };
        config
            .validate()
            .and(disagreement)
            .map_err(|source| ConfigError::Setting { path: path.to_path_buf(), source })?;
        Ok((config, model))
    }

    /// Checks that the settings are in range and fit each other.
    ///
    /// # Errors
    /// [`SettingError`] names the setting.
    pub fn validate(&self) -> Result<(), SettingError> {
        let (batch, workers, accumulate) = (self.batch, self.workers, self.accumulate);
        if batch == 0 || workers == 0 || !batch.is_multiple_of(workers) {
            return Err(SettingError::Batch { batch, workers });
        }
        let share = batch / workers;
        if accumulate == 0 || !share.is_multiple_of(accumulate) {
            return Err(SettingError::Accumulate { accumulate, share });
        }
        if self.noise_draws == 0 || !share.is_multiple_of(self.noise_draws) {
            return Err(SettingError::Range {
                name: "noise_draws",
                value: self.noise_draws.to_string(),
                expected: "a divisor of batch / workers",
            });
        }
        for (name, value) in [
            ("log_every", self.log_every),
            ("checkpoint_every", self.checkpoint_every),
            ("eval_every", self.eval_every),
        ] {
            if value == 0 {
                return Err(SettingError::Range { name, value: "0".to_owned(), expected: "1 or more" });
            }
        }
        self.data.validate()?;
        if let Some(guide) = &self.guide {
            guide.validate()?;
        }
        if let Some(distill) = &self.distill {
            distill.validate()?;
        }
        self.world()?;
        Ok(())
    }

    /// The worlds that houses are drawn from.
    ///
    /// # Errors
    /// As [`Difficulties::worlds`].
    pub fn world(&self) -> Result<Worlds, SettingError> {
        self.difficulty.worlds()
    }

    /// Learning rate of a step in a run of `steps` steps: warm-up, constant, linear decay to zero.
    #[must_use]
    pub fn lr(&self, step: u64, steps: u64) -> f64 {
        learning_rate(self.optim.lr, self.warmup, self.decay_from, step, steps)
    }
}

/// `[data]` of `configs/train/*.toml`: where samples come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Kind of the source.
    pub kind: Kind,
    /// Directory of the clips, relative to the configuration.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// Where decoded images are kept, relative to the configuration; by default `images` in the run's directory.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub cache: PathBuf,
    /// Share of samples from the procedural house beside the clips.
    #[serde(default)]
    pub house: f64,
    /// Which recording context is taken from.
    #[serde(default)]
    pub context: ContextFrom,
    /// Share of places that are kept apart for the held-out loss.
    #[serde(default)]
    pub held_out: f64,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// Kind of a source of samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The procedural house.
    #[default]
    House,
    /// Recorded videos.
    Clips,
}

/// Which recording context is taken from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContextFrom {
    /// Another recording of the place where there is one with enough images, else the clip's own.
    #[default]
    Auto,
    /// The clip's own recording, outside the clip.
    Same,
    /// Another recording of the same place.
    Other,
    /// Any recording of the place.
    Both,
}

impl DataConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`SettingError`] names the field.
    pub fn validate(&self) -> Result<(), SettingError> {
        for (name, value) in [("data.house", self.house), ("data.held_out", self.held_out)] {
            if !(0.0..1.0).contains(&value) {
                let expected = "0 or more, and less than 1";
                return Err(SettingError::Range { name, value: value.to_string(), expected });
            }
        }
        match self.kind {
            Kind::Clips if is_empty(&self.path) => Err(SettingError::ClipsPath),
            Kind::House if *self != Self::default() => Err(SettingError::HouseData),
            _ => Ok(()),
        }
    }
}

/// `[distill]` of a training configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillConfig {
    /// Bundle of the teacher, relative to the configuration file. The student begins with its weights.
    pub teacher: PathBuf,
    /// Guidance weight of the teacher.
    pub guidance: f32,
    /// Steps of the teacher from noise to image.
    pub teacher_steps: usize,
    /// Steps of the student; they divide those of the teacher.
    pub steps: usize,
    /// Share of the samples that the teacher answers for.
    pub share: f64,
}

impl DistillConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`SettingError`] names the field.
    pub fn validate(&self) -> Result<(), SettingError> {
        let (steps, teacher_steps) = (self.steps, self.teacher_steps);
        if steps == 0 || teacher_steps == 0 || !teacher_steps.is_multiple_of(steps) {
            return Err(SettingError::DistillSteps { steps, teacher_steps });
        }
        let range = |name, value: f64, expected| {
            Err(SettingError::Range { name, value: value.to_string(), expected })
        };
        if !(0.0..=1.0).contains(&self.share) {
            return range("distill.share", self.share, "0 to 1");
        }
        if !self.guidance.is_finite() {
            return range("distill.guidance", f64::from(self.guidance), "a number");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::depth::DepthTrainConfig;
    use crate::finetune::FineTuneConfig;

    fn shipped() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/train")
    }

    #[test]
    fn every_shipped_configuration_can_be_used() {
        let mut count = 0;
        for entry in fs::read_dir(shipped()).expect("the folder") {
            let path = entry.expect("an entry").path();
            let loaded = if DepthTrainConfig::is_meant(&path) {
                DepthTrainConfig::load(&path).map(|_| ())
            } else if FineTuneConfig::is_meant(&path) {
                FineTuneConfig::load(&path).map(|_| ())
            } else {
                TrainConfig::load(&path).map(|_| ())
            };
            if let Err(e) = loaded {
                panic!("{e}");
            }
            count += 1;
        }
        assert!(count >= 9, "{count} configurations");
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let (good, _) = TrainConfig::load(&shipped().join("house-tiny.toml")).expect("it is shipped");
        let check = |change: &dyn Fn(&mut TrainConfig), wanted: &str| {
            let mut config = good.clone();
            change(&mut config);
            let said = config.validate().expect_err(wanted).to_string();
            assert!(said.contains(wanted), "{said}");
        };
        check(&|c| c.batch = c.workers + 1, "batch =");
        check(&|c| c.workers = 0, "workers = 0");
        check(&|c| c.accumulate = 0, "accumulate = 0 must divide");
        check(&|c| c.noise_draws = 0, "noise_draws = 0: expected a divisor");
        check(&|c| c.noise_draws = c.batch + 1, "expected a divisor of batch / workers");
        check(&|c| c.eval_every = 0, "eval_every = 0: expected 1 or more");
        check(
            &|c| c.difficulty = Difficulties::One("castle".into()),
            "difficulty = \"castle\": expected \"plain\", \"house\", \"furnished\" or \"apartment\"",
        );
        let shares = |shares: &[(&str, f64)]| {
            Difficulties::Shares(shares.iter().map(|(name, share)| ((*name).to_owned(), *share)).collect())
        };
        check(&|c| c.difficulty = shares(&[("plain", 1.0), ("castle", 1.0)]), "difficulty = \"castle\"");
        check(&|c| c.difficulty = shares(&[("plain", 1.0), ("house", 0.0)]), "each with a share above 0");
        check(&|c| c.difficulty = shares(&[]), "at least one name");
        check(&|c| c.data.held_out = 0.5, "kind = \"house\" takes no other setting");
        check(&|c| c.data.house = 1.0, "data.house = 1: expected 0 or more, and less than 1");
        check(&|c| c.data = DataConfig { kind: Kind::Clips, ..DataConfig::default() }, "data.path: missing");
    }

    #[test]
    fn the_learning_rate_rises_stays_and_falls() {
        let (mut c, _) = TrainConfig::load(&shipped().join("house-tiny.toml")).expect("it is shipped");
        (c.warmup, c.decay_from, c.optim.lr) = (10, 60, 0.5);
        let near = |step: u64, wanted: f64| assert!((c.lr(step, 100) - wanted).abs() < 1e-12, "step {step}");
        near(0, 0.0);
        near(5, 0.25);
        near(10, 0.5);
        near(60, 0.5);
        near(80, 0.25);
        near(100, 0.0);
    }
}
