//! Training of the video autoencoder: short videos of unseen rooms through the latents and back, by squared error, with
//! latents held near a standard normal distribution (a variational autoencoder).
//!
//! The network has no exponential: a latent is drawn as `mean + log variance * slope + offset`, where slope and offset are
//! numbers of this pass that give the value and the gradient of `mean + exp(log variance / 2) * noise`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mindseye_engines::model::vae::{self, Chunk, VaeConfig};
use mindseye_world::{Difficulty, Rng};
use serde::{Deserialize, Serialize};

use crate::autograd::{Autograd, Device, OutputGrads};
use crate::checkpoint::State;
use crate::config::{ConfigError, SettingError, has_table, read};
use crate::eager::Params;
use crate::error::{TrainError, io};
use crate::family::parse;
use crate::net::{self, Losses};
use crate::optim::OptimConfig;
use crate::ranks::Ranks;
use crate::run::{CHECKPOINT, Speed};
use crate::task::{Course, Task, TaskMetrics, TaskRun};
use crate::wan::{FootageSource, WanModel, place};

/// `configs/train/*-vae.toml`: a training configuration with a table `[autoencoder]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoencoderConfig {
    /// Model configuration, relative to this file.
    pub model: PathBuf,
    /// Optimiser steps.
    pub steps: u64,
    /// Videos per step.
    pub batch: usize,
    /// What is trained on.
    pub autoencoder: VideoConfig,
    /// How long, how fast.
    pub course: Course,
    /// Optimiser.
    pub optim: OptimConfig,
}

/// `[autoencoder]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VideoConfig {
    /// Name of the world's difficulty.
    pub difficulty: String,
    /// Rooms; 0 = another one for every video.
    pub rooms: u64,
    /// Latents of one video.
    pub latents: usize,
    /// Weight of the divergence from a standard normal distribution, per latent value.
    pub kl: f32,
}

impl AutoencoderConfig {
    /// Whether a configuration file is one of an autoencoder; one that cannot be read is not.
    #[must_use]
    pub fn is_meant(path: &Path) -> bool {
        has_table(path, "autoencoder")
    }

    /// Reads a configuration and the model that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field.
    pub fn load(path: &Path) -> Result<(Self, WanModel), ConfigError> {
        let config = read(path, Self::validate)?;
        let model = WanModel::load(&place(&config.model, path))?;
        Ok((config, model))
    }

    fn validate(&self) -> Result<(), SettingError> {
        self.course.validate(self.batch)?;
        if self.autoencoder.latents == 0 {
            let (name, value) = ("autoencoder.latents", "0".to_owned());
            return Err(SettingError::Range { name, value, expected: "1 or more" });
        }
        self.world().map(|_| ())
    }

    fn world(&self) -> Result<Difficulty, SettingError> {
        let name = &self.autoencoder.difficulty;
        Difficulty::named(name).ok_or_else(|| SettingError::Range {
            name: "autoencoder.difficulty",
            value: format!("{name:?}"),
            expected: "\"plain\", \"house\", \"furnished\" or \"apartment\"",
        })
    }
}

struct Reconstruct {
    config: AutoencoderConfig,
    /// With statistics of 0 and 1: latents are what the encoder says.
    model: WanModel,
    world: Difficulty,
}

/// The network's latents are its means.
fn plain(vae: &VaeConfig) -> VaeConfig {
    VaeConfig { latents_mean: vec![0.0; vae.z_dim], latents_std: vec![1.0; vae.z_dim], ..vae.clone() }
}

impl Reconstruct {
    /// One video `[images, 3, H, W]`: of a recording, or of a drive with the box at its end.
    fn video(&self, rng: &mut Rng) -> Vec<f32> {
        let VideoConfig { rooms, latents, .. } = self.config.autoencoder;
        let seed = if rooms == 0 { rng.next_u64() } else { rng.next_u64() % rooms };
        let images = self.model.images(latents);
        let group = self.model.vae.temporal_factor();
        let mut source = FootageSource::new(&self.model, self.world.clone());
        let still = if latents > 1 { group } else { 0 };
        let whole = source.footage(seed, 4 * images, 2 * images, still);
        let per = whole.target.len() / (2 * images + still);
        let all = if rng.chance(0.5) { whole.context } else { whole.target };
        let first = rng.below(all.len() / per - images + 1) * per;
        all[first..first + images * per].to_vec()
    }
}

impl Task for Reconstruct {
    type Config = AutoencoderConfig;

    fn config(&self) -> &AutoencoderConfig {
        &self.config
    }

    fn course(&self) -> &Course {
        &self.config.course
    }

    fn optim(&self) -> &OptimConfig {
        &self.config.optim
    }

    fn steps(&self) -> u64 {
        self.config.steps
    }

    fn batch(&self) -> usize {
        self.config.batch
    }

    fn identity(&self) -> &str {
        ""
    }

    fn pass<A: Autograd>(
        &self,
        e: &mut A,
        rng: &mut Rng,
        share: f32,
    ) -> Result<(Losses, OutputGrads<A::Tensor>), TrainError> {
        let (cfg, latent, z) = (&self.model.vae, self.model.latent(), self.model.vae.z_dim);
        let ([h, w], group) = (self.model.image(), cfg.temporal_factor());
        let video = self.video(rng);
        let images = video.len() / (3 * h * w);
        let clip = e.input(&[images, 3, h, w], video.clone());
        let (mut encoder, mut decoder) = (Vec::new(), Vec::new());
        let (mut loss, mut outputs, mut at) = (0.0, Vec::new(), 0);
        let n = z * latent[0] * latent[1];
        let per_latent = self.config.autoencoder.kl * share / (self.config.autoencoder.latents * n) as f32;
        for i in 0..self.config.autoencoder.latents {
            let (chunk, count) = if i == 0 { (Chunk::First, 1) } else { (Chunk::Next, group) };
            let frames = e.slice(&clip, 0, at as i64, Some((at + count) as i64));
            let encoded = vae::encode(e, cfg, latent, chunk, &frames, &encoder);
            encoder = encoded.caches;
            let moments = e.value(&encoded.moments).into_owned();
            let (mean, log) = moments.split_at(n);
            // Divergence and its gradient.
            let mut gradient: Vec<f32> = mean.iter().map(|m| m * per_latent).collect();
            gradient.extend(log.iter().map(|l| 0.5 * (l.exp() - 1.0) * per_latent));
            let divergence = mean.iter().zip(log).map(|(m, l)| 0.5 * (m * m + l.exp() - 1.0 - l));
            loss += f64::from(divergence.sum::<f32>() * per_latent);
            let noise: Vec<f32> = log.iter().map(|l| (0.5 * l).exp() * rng.normal() as f32).collect();
            let slope: Vec<f32> = noise.iter().map(|v| 0.5 * v).collect();
            let offset = noise.iter().zip(log).zip(&slope).map(|((v, l), s)| v - l * s).collect();
            let shape = [1, z, latent[0], latent[1]];
            let (slope, offset) = (e.input(&shape, slope), e.input(&shape, offset));
            let mu = e.slice(&encoded.moments, 1, 0, Some(z as i64));
            let log = e.slice(&encoded.moments, 1, z as i64, None);
            let spread = e.mul(&log, &slope);
            let drawn = e.add(&mu, &spread);
            let drawn = e.add(&drawn, &offset);
            outputs.push((encoded.moments, gradient));
            let decoded = vae::decode(e, cfg, latent, chunk, &drawn, &decoder);
            decoder = decoded.caches;
            let wanted = &video[at * 3 * h * w..(at + count) * 3 * h * w];
            let per = share / video.len() as f32;
            let got = e.value(&decoded.frames).into_owned();
            let off: Vec<f32> = got.iter().zip(wanted).map(|(a, b)| a - b).collect();
            loss += off.iter().map(|d| f64::from(d * d * per)).sum::<f64>();
            outputs.push((decoded.frames, off.iter().map(|d| 2.0 * d * per).collect()));
            at += count;
        }
        Ok((Losses { total: loss, ..Losses::default() }, outputs))
    }
}

/// A run of the autoencoder in a directory: `checkpoint.safetensors`, `metrics.jsonl`.
pub struct AutoencoderTrainer<D: Device>(TaskRun<Reconstruct, D>);

impl<D: Device> AutoencoderTrainer<D> {
    /// Opens a run: goes on from its checkpoint, or starts.
    ///
    /// # Errors
    /// When the directory cannot be used or holds a checkpoint of another network or configuration.
    pub fn open(
        device: &D,
        (config, mut model): (AutoencoderConfig, WanModel),
        out: &Path,
        ranks: Option<Ranks>,
    ) -> Result<Self, TrainError> {
        let (world, seed) = (config.world()?, config.course.seed);
        model.vae = plain(&model.vae);
        let fresh = net::initialise(&model.vae_weights(), seed);
        Ok(Self(TaskRun::open(device, Reconstruct { config, model, world }, out, ranks, gains(fresh))?))
    }

    /// Runs to the end, to step `until`, or until `stop`, as [`crate::trainer::Trainer::run`].
    ///
    /// # Errors
    /// As there.
    pub fn run(
        &mut self,
        until: Option<u64>,
        stop: &AtomicBool,
        progress: impl FnMut(&TaskMetrics, Speed),
    ) -> Result<(), TrainError> {
        self.0.run(until, stop, progress)
    }

    /// Steps done.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.0.state.step
    }
}

/// Gains of norms begin with one.
fn gains(mut params: Params) -> Params {
    for i in 0..params.len() {
        let (name, shape, values) = params.get(i);
        if name.ends_with(".gamma") {
            let (name, shape, n) = (name.to_owned(), shape.to_vec(), values.len());
            params.insert(&name, &shape, vec![1.0; n]);
        }
    }
    params
}

/// A trained autoencoder: its averaged weights, and its sizes with the statistics of its latents.
#[derive(Clone, Debug)]
pub struct Autoencoder {
    /// Weights.
    pub weights: Arc<Params>,
    /// Sizes and statistics.
    pub vae: VaeConfig,
    /// What latents are told apart by: a hash of the weights and sizes.
    pub identity: String,
}

impl Autoencoder {
    /// Weights and their statistics, measured on `videos` videos that nothing was trained on.
    #[must_use]
    pub fn measured(model: &WanModel, weights: Params, world: &Difficulty, videos: usize) -> Self {
        let (weights, mut model) = (Arc::new(weights), model.clone());
        model.vae = plain(&model.vae);
        let (z, [h, w]) = (model.vae.z_dim, model.latent());
        let (mut sum, mut squares, mut n) = (vec![0.0f64; z], vec![0.0f64; z], 0.0);
        let mut source = FootageSource::new(&model, world.clone());
        for seed in 0..videos as u64 {
            let footage = source.footage(seed, model.images(3), model.images(3), 0);
            let latents = model.encode(&weights, &footage.context);
            for (at, values) in latents.chunks_exact(h * w).enumerate() {
                sum[at % z] += values.iter().map(|v| f64::from(*v)).sum::<f64>();
                squares[at % z] += values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            }
            n += (latents.len() / z) as f64;
        }
        let mean: Vec<f32> = sum.iter().map(|s| (s / n) as f32).collect();
        let deviation =
            squares.iter().zip(&mean).map(|(s, m)| (s / n - f64::from(*m).powi(2)).max(1e-12).sqrt());
        let std = deviation.map(|d| d as f32).collect();
        Self::with(VaeConfig { latents_mean: mean, latents_std: std, ..model.vae }, weights)
    }

    /// Weights with the statistics that the configuration has.
    #[must_use]
    pub fn with(vae: VaeConfig, weights: Arc<Params>) -> Self {
        let mut bytes = toml::to_string(&vae).unwrap_or_default().into_bytes();
        for i in 0..weights.len() {
            let (name, _, values) = weights.get(i);
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        Self { identity: mindseye_base::file::sha256(&bytes), weights, vae }
    }

    /// The averaged weights of a run.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, or is of another kind of run or another network.
    pub fn of_run(run: &Path, model: &WanModel) -> Result<Self, TrainError> {
        let path = run.join(CHECKPOINT);
        let note = crate::checkpoint::configuration(&path)?;
        let config: AutoencoderConfig = parse(&note).map_err(|e| TrainError::Checkpoint {
            path: path.clone(),
            reason: format!("not of a run of an autoencoder: its configuration, {e}"),
        })?;
        let state = State::read(&path, &model.vae_weights())?;
        Ok(Self::measured(model, state.ema, &config.world()?, 32))
    }

    /// Writes the weights under their names.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TrainError> {
        save_weights(&self.weights, path)
    }
}

/// Writes weights as safetensors, under their names.
///
/// # Errors
/// When the file cannot be written.
pub fn save_weights(params: &Params, path: &Path) -> Result<(), TrainError> {
    use safetensors::tensor::{Dtype, TensorView};
    let owned: Vec<(String, Vec<usize>, Vec<u8>)> = (0..params.len())
        .map(|i| {
            let (name, shape, values) = params.get(i);
            (name.to_owned(), shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
        })
        .collect();
    let damaged = |source| TrainError::Damaged { path: path.into(), source };
    let views: Vec<(&str, TensorView<'_>)> = owned
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()
        .map_err(damaged)?;
    let data = safetensors::serialize(views, None).map_err(damaged)?;
    mindseye_base::file::replace(path, &data).map_err(io(path))
}
