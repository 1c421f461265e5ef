//! The training loop: seeded, resumable exactly, with the same numbers for the same number of workers.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mindseye_base::stats::median;
use mindseye_world::{Difficulty, Rng};
use serde::{Deserialize, Serialize};

use crate::clips::{Clips, DataConfig, Kind};
use crate::data::{Codec, Sample, Source, Task, Variety};
use crate::distill::{DistillConfig, Teacher};
use crate::eager::backward::accumulate;
use crate::eager::ffi::gemm::{View, gemm};
use crate::eager::{Eager, Params};
use crate::family::{HouseModel, parse};
use crate::net::{self, Draw, LossWeights, Losses};
use crate::optim::{self, Moments, OptimConfig};
use crate::resume;

/// `configs/train/*.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Model configuration, relative to this file.
    pub model: PathBuf,
    /// Seed of weights, data and noise.
    pub seed: u64,
    /// Name of the world's difficulty.
    pub difficulty: String,
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
    /// Where samples come from; by default the procedural house.
    #[serde(default, skip_serializing_if = "is_default")]
    pub data: DataConfig,
}

fn one() -> usize {
    1
}

fn is_default(data: &DataConfig) -> bool {
    *data == DataConfig::default()
}

/// Why training could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// A file could not be read or written.
    #[error("{path}: {source}{}", hint(.source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A checkpoint is not of this run.
    #[error("checkpoint {path}: {reason}; remove it or give another --out")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A checkpoint is of another configuration.
    #[error(
        "checkpoint {path} is of another configuration: {differences}; give another --out, or \
         --other-configuration to go on all the same"
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// Where they differ.
        differences: String,
    },
    /// The loss is not a number any more.
    #[error("step {0}: the loss is not finite; lower optim.lr and resume from the last checkpoint")]
    Diverged(u64),
}

fn hint(source: &std::io::Error) -> &'static str {
    if source.kind() == std::io::ErrorKind::StorageFull {
        "; make room and run the same command again, it goes on from the last checkpoint"
    } else {
        ""
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> TrainError + '_ {
    move |source| TrainError::Io { path: path.to_path_buf(), source }
}

impl TrainConfig {
    /// Reads a configuration and the model it names.
    ///
    /// # Errors
    /// A sentence with the file and the field.
    pub fn load(path: &Path) -> Result<(Self, HouseModel), TrainError> {
        let text = fs::read_to_string(path).map_err(io(path))?;
        let config: Self =
            parse(&text).map_err(|e| TrainError::Config(format!("{}: {e}", path.display())))?;
        let model_path = path.parent().unwrap_or(Path::new(".")).join(&config.model);
        let model = HouseModel::load(&model_path).map_err(TrainError::Config)?;
        if config.batch == 0 || config.workers == 0 || !config.batch.is_multiple_of(config.workers) {
            return Err(TrainError::Config(format!(
                "{}: batch = {} must be a positive multiple of workers = {}",
                path.display(),
                config.batch,
                config.workers
            )));
        }
        let share = config.batch / config.workers;
        if config.accumulate == 0 || !share.is_multiple_of(config.accumulate) {
            return Err(TrainError::Config(format!(
                "{}: accumulate = {} must divide batch / workers = {share}",
                path.display(),
                config.accumulate
            )));
        }
        for (name, value) in [
            ("log_every", config.log_every),
            ("checkpoint_every", config.checkpoint_every),
            ("eval_every", config.eval_every),
        ] {
            if value == 0 {
                return Err(TrainError::Config(format!(
                    "{}: {name} = 0: expected 1 or more",
                    path.display()
                )));
            }
        }
        config.data.validate().map_err(|e| TrainError::Config(format!("{}: {e}", path.display())))?;
        if let Some(distill) = &config.distill {
            distill.validate().map_err(|e| TrainError::Config(format!("{}: {e}", path.display())))?;
        }
        if Difficulty::named(&config.difficulty).is_none() {
            return Err(TrainError::Config(format!(
                "{}: difficulty = {:?}: expected \"plain\" or \"house\"",
                path.display(),
                config.difficulty
            )));
        }
        Ok((config, model))
    }

    /// Learning rate of a step in a run of `steps` steps: warm-up, constant, linear decay to zero.
    fn lr(&self, step: u64, steps: u64) -> f64 {
        let warm = (step as f64 / self.warmup.max(1) as f64).min(1.0);
        let left = steps.saturating_sub(step) as f64;
        let decay = (left / steps.saturating_sub(self.decay_from).max(1) as f64).min(1.0);
        self.optim.lr * warm * decay
    }
}

/// Everything that a run needs to go on where it stopped.
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Weights, the codec's included.
    pub params: Arc<Params>,
    /// Averaged weights.
    pub ema: Params,
    moments: Vec<Moments>,
    /// What belongs to the next line of the metrics file.
    pending: Pending,
    /// Configuration and model (TOML) and identity of the data that a checkpoint was written with.
    origin: [String; 3],
}

/// Sums since the last line of the metrics file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pending {
    losses: Losses,
    norm_max: f64,
    steps: u64,
}

impl Pending {
    /// Exact text: the bits of every number.
    fn to_text(self) -> String {
        let l = &self.losses;
        [l.total, l.video, l.mask, l.context_pose, l.target_pose, l.locate, l.attributes, self.norm_max]
            .iter()
            .fold(self.steps.to_string(), |text, v| format!("{text} {:016x}", v.to_bits()))
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let steps = words.next()?.parse().ok()?;
        let mut next = || u64::from_str_radix(words.next()?, 16).ok().map(f64::from_bits);
        let losses = Losses {
            total: next()?,
            video: next()?,
            mask: next()?,
            context_pose: next()?,
            target_pose: next()?,
            locate: next()?,
            attributes: next()?,
        };
        Some(Self { losses, norm_max: next()?, steps })
    }
}

/// One line of the metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Step.
    pub step: u64,
    /// Samples seen.
    pub samples: u64,
    /// Learning rate.
    pub lr: f64,
    /// Losses, means since the last line.
    pub losses: Losses,
    /// Largest gradient norm since the last line.
    pub grad_norm: f64,
    /// Evaluation on unseen houses, on lines where it ran.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval: Option<Eval>,
    /// Losses on clips that are kept apart, on the same lines.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub held_out: Option<Losses>,
}

/// Errors of goal poses on unseen houses, one pass at t = 0.97, no guidance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    /// Median heading error of the pose head (degrees).
    pub head_yaw_deg: f64,
    /// Share within 25 degrees.
    pub head_within_25: f64,
    /// Median position error of the pose head (m).
    pub head_position_m: f64,
    /// Median heading error of mask and place with known poses (degrees).
    pub mask_yaw_deg: f64,
    /// Share within 25 degrees.
    pub mask_within_25: f64,
    /// Median position error (m).
    pub mask_position_m: f64,
    /// Area under the curve: largest mask value of present against absent names.
    pub absent_auc: f64,
    /// Median heading error of context poses (degrees).
    pub context_yaw_deg: f64,
}

/// The codec's basis from rendered blocks: mean and leading principal components.
///
/// # Panics
/// When there are fewer blocks than values in a block.
#[must_use]
pub fn fit_codec(model: &HouseModel, difficulty: &Difficulty, seed: u64, count: usize) -> Codec {
    let mut source = Source::new(model, difficulty.clone(), None);
    fit_codec_to(model, seed, source.blocks(seed ^ 0xc0dec, count))
}

/// The codec's basis from blocks `[count, 12 * block^2]`: mean and leading principal components.
///
/// # Panics
/// When there are fewer blocks than values in a block.
#[must_use]
pub fn fit_codec_to(model: &HouseModel, seed: u64, mut blocks: Vec<f32>) -> Codec {
    let (k, c) = (model.codec.block_values(), model.codec.channels);
    let count = blocks.len() / k;
    assert!(count >= k, "codec_blocks = {count}: at least {k} are needed");
    let mut mean = vec![0.0f64; k];
    for b in blocks.chunks_exact(k) {
        for (m, v) in mean.iter_mut().zip(b) {
            *m += f64::from(*v) / count as f64;
        }
    }
    let mean: Vec<f32> = mean.into_iter().map(|v| v as f32).collect();
    for b in blocks.chunks_exact_mut(k) {
        for (v, m) in b.iter_mut().zip(&mean) {
            *v -= m;
        }
    }
    let mut cov = vec![0.0f32; k * k];
    let bv = View::rows(0, k);
    gemm([k, k, count], &mut cov, bv, 0.0, &blocks, bv.t(), &blocks, bv, 1.0 / count as f32);
    // Orthogonal iteration with Gram-Schmidt, from seeded vectors.
    let mut rng = Rng::new(seed ^ 0xba515);
    let mut basis: Vec<f32> = (0..c * k).map(|_| rng.normal() as f32).collect();
    let mut next = vec![0.0f32; c * k];
    for _ in 0..40 {
        gemm([c, k, k], &mut next, View::rows(0, k), 0.0, &basis, View::rows(0, k), &cov, bv, 1.0);
        std::mem::swap(&mut basis, &mut next);
        for i in 0..c {
            for j in 0..i {
                let (head, tail) = basis.split_at_mut(i * k);
                let (a, b) = (&head[j * k..(j + 1) * k], &mut tail[..k]);
                let dot: f32 = a.iter().zip(b.iter()).map(|(x, y)| x * y).sum();
                for (y, x) in b.iter_mut().zip(a) {
                    *y -= dot * x;
                }
            }
            let row = &mut basis[i * k..(i + 1) * k];
            let len = row.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-20);
            for v in row {
                *v /= len;
            }
        }
    }
    Codec { basis, mean }
}

const BASIS: &str = mindseye_engines::model::codec::BASIS;
const MEAN: &str = mindseye_engines::model::codec::MEAN;

/// The codec among the weights.
#[must_use]
pub fn codec_of(params: &Params) -> Option<Codec> {
    let take = |name: &str| params.position(name).map(|i| params.get(i).2.to_vec());
    Some(Codec { basis: take(BASIS)?, mean: take(MEAN)? })
}

impl State {
    /// Fresh weights; the codec is fitted to houses.
    ///
    /// # Panics
    /// As [`fit_codec`].
    #[must_use]
    pub fn new(config: &TrainConfig, model: &HouseModel, difficulty: &Difficulty) -> Self {
        Self::with_codec(config, model, fit_codec(model, difficulty, config.seed, config.codec_blocks))
    }

    /// Fresh weights; the codec is fitted to clips, and to houses where they are mixed in.
    ///
    /// # Errors
    /// When pixels of clips cannot be read.
    ///
    /// # Panics
    /// As [`fit_codec_to`].
    pub fn from_clips(
        config: &TrainConfig,
        model: &HouseModel,
        difficulty: &Difficulty,
        clips: &Clips,
    ) -> Result<Self, TrainError> {
        let seed = config.seed ^ 0xc0dec;
        let houses = (config.codec_blocks as f64 * config.data.house) as usize;
        let mut blocks = clips.blocks(seed, config.codec_blocks - houses)?;
        if houses > 0 {
            blocks.extend(Source::new(model, difficulty.clone(), None).blocks(seed, houses));
        }
        Ok(Self::with_codec(config, model, fit_codec_to(model, config.seed, blocks)))
    }

    fn with_codec(config: &TrainConfig, model: &HouseModel, codec: Codec) -> Self {
        let mut params = net::init(model, config.seed);
        let k = model.codec.block_values();
        params.insert(BASIS, &[model.codec.channels, k], codec.basis);
        params.insert(MEAN, &[k], codec.mean);
        let ema = params.clone();
        Self {
            step: 0,
            moments: vec![Moments::default(); params.len()],
            params: Arc::new(params),
            ema,
            pending: Pending::default(),
            origin: Default::default(),
        }
    }

    /// Takes the weights of a finished run or bundle in place of fresh ones; moments and step stay at their start.
    /// Weights that `from` lacks (heads that only training has) stay fresh; the number of those is returned.
    ///
    /// # Errors
    /// When a weight has another shape: names it.
    pub fn start_from(&mut self, from: &Params, path: &Path) -> Result<usize, TrainError> {
        let (mut params, mut fresh) = ((*self.params).clone(), 0);
        for i in 0..params.len() {
            let (name, shape, _) = params.get(i);
            let (name, shape) = (name.to_string(), shape.to_vec());
            let Some(at) = from.position(&name) else {
                fresh += 1;
                continue;
            };
            let (_, have, values) = from.get(at);
            // A graph may store a 1x1x1 convolution as the matrix that it is.
            let sides = |s: &[usize]| s.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
            if sides(have) != sides(&shape) {
                return Err(TrainError::Checkpoint {
                    path: path.into(),
                    reason: format!("{name}: expected shape {shape:?}, got {have:?}"),
                });
            }
            params.insert(&name, &shape, values.to_vec());
        }
        if fresh == params.len() {
            return Err(TrainError::Checkpoint {
                path: path.into(),
                reason: "it has no weight of this model".into(),
            });
        }
        self.ema = params.clone();
        self.params = Arc::new(params);
        Ok(fresh)
    }

    /// Writes a checkpoint: to a temporary name, then renamed.
    ///
    /// # Errors
    /// When the file cannot be written; an older checkpoint stays as it was.
    pub fn save(&self, path: &Path, config: &TrainConfig) -> Result<(), TrainError> {
        let [_, model, data] = &self.origin;
        use safetensors::tensor::{Dtype, TensorView};
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut owned: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for i in 0..self.params.len() {
            let (name, shape, data) = self.params.get(i);
            owned.push((format!("weights.{name}"), shape.to_vec(), bytes(data)));
            owned.push((format!("ema.{name}"), shape.to_vec(), bytes(self.ema.get(i).2)));
            for (kind, m) in [("first", &self.moments[i].first), ("second", &self.moments[i].second)] {
                if !m.is_empty() {
                    owned.push((format!("{kind}.{name}"), shape.to_vec(), bytes(m)));
                }
            }
        }
        let views: Vec<(&str, TensorView)> = owned
            .iter()
            .map(|(n, s, d)| {
                (n.as_str(), TensorView::new(Dtype::F32, s.clone(), d).expect("sizes come from the tensors"))
            })
            .collect();
        let meta = std::collections::HashMap::from([
            ("step".to_string(), self.step.to_string()),
            ("config".to_string(), toml::to_string(config).unwrap_or_default()),
            ("model".to_string(), model.clone()),
            ("data".to_string(), data.clone()),
            ("pending".to_string(), self.pending.to_text()),
        ]);
        let data = safetensors::serialize(views, Some(meta))
            .map_err(|e| TrainError::Checkpoint { path: path.into(), reason: e.to_string() })?;
        let temporary = path.with_extension("tmp");
        let written = fs::File::create(&temporary)
            .and_then(|mut file| file.write_all(&data).and_then(|()| file.sync_all()))
            .map_err(io(&temporary))
            .and_then(|()| fs::rename(&temporary, path).map_err(io(path)));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Refuses to go on with another configuration or other data.
    fn agrees(
        &self,
        path: &Path,
        config: &TrainConfig,
        model: &HouseModel,
        identity: &str,
    ) -> Result<(), TrainError> {
        let [stored, stored_model, data] = &self.origin;
        let mut found = resume::differences(stored, stored_model, config, model);
        if data != identity {
            found.push("the clips have changed".to_owned());
        }
        if found.is_empty() {
            return Ok(());
        }
        Err(TrainError::Other { path: path.to_path_buf(), differences: found.join("; ") })
    }

    /// Reads a checkpoint of a run with this model.
    ///
    /// # Errors
    /// When it cannot be read or is of another model: names the tensor.
    pub fn load(path: &Path, model: &HouseModel) -> Result<Self, TrainError> {
        let fail = |reason: String| TrainError::Checkpoint { path: path.into(), reason };
        let data = fs::read(path).map_err(io(path))?;
        let (_, meta) = safetensors::SafeTensors::read_metadata(&data).map_err(|e| fail(e.to_string()))?;
        let file = safetensors::SafeTensors::deserialize(&data).map_err(|e| fail(e.to_string()))?;
        let note = |key: &str| meta.metadata().as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default();
        let step = note("step").parse().map_err(|_| fail("no step recorded".into()))?;
        let pending = Pending::from_text(&note("pending")).unwrap_or_default();
        let origin = ["config", "model", "data"].map(note);
        let get = |kind: &str, name: &str, shape: &[usize]| -> Result<Option<Vec<f32>>, TrainError> {
            let Ok(t) = file.tensor(&format!("{kind}.{name}")) else { return Ok(None) };
            if t.shape() != shape || t.dtype() != safetensors::Dtype::F32 {
                return Err(fail(format!(
                    "{name}: expected f32 {shape:?}, got {:?} {:?}",
                    t.dtype(),
                    t.shape()
                )));
            }
            Ok(Some(t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
        };
        let mut wanted = net::collect(model);
        let k = model.codec.block_values();
        wanted.insert(BASIS, &[model.codec.channels, k], vec![0.0; model.codec.channels * k]);
        wanted.insert(MEAN, &[k], vec![0.0; k]);
        let (mut params, mut ema, mut moments) = (Params::new(), Params::new(), Vec::new());
        for i in 0..wanted.len() {
            let (name, shape, _) = wanted.get(i);
            let missing = || fail(format!("{name}: missing"));
            params.insert(name, shape, get("weights", name, shape)?.ok_or_else(missing)?);
            ema.insert(name, shape, get("ema", name, shape)?.ok_or_else(missing)?);
            moments.push(Moments {
                first: get("first", name, shape)?.unwrap_or_default(),
                second: get("second", name, shape)?.unwrap_or_default(),
            });
        }
        Ok(Self { step, params: Arc::new(params), ema, moments, pending, origin })
    }
}

/// What one worker brings back from a step.
struct Share {
    losses: Losses,
    grads: Vec<Vec<f32>>,
}

/// What one worker works with.
struct Worker {
    eager: Eager,
    source: Source,
    /// For the teacher's passes: records nothing.
    teaching: Eager,
}

/// A run in a directory: `checkpoint.safetensors`, `metrics.jsonl`.
pub struct Trainer {
    /// Configuration.
    pub config: TrainConfig,
    /// Model.
    pub model: HouseModel,
    /// Weights and optimiser.
    pub state: State,
    difficulty: Difficulty,
    workers: Vec<Worker>,
    teacher: Option<Teacher>,
    clips: Option<(Clips, Codec)>,
    out: PathBuf,
    schedule: u64,
}

/// What a run is opened with, besides its configuration.
#[derive(Default)]
pub struct OpenOptions {
    /// Clips to train on, where the configuration asks for them.
    pub clips: Option<Clips>,
    /// Weights of the teacher, where the configuration asks for one.
    pub teacher: Option<Params>,
    /// Go on even from a checkpoint of another configuration or other data, as long as its weights fit.
    pub other_configuration: bool,
}

impl Trainer {
    /// Opens a run: goes on from its checkpoint, or starts.
    ///
    /// # Errors
    /// When the directory cannot be used or holds a checkpoint of another model, configuration or other data.
    pub fn open(config: TrainConfig, model: HouseModel, out: &Path) -> Result<Self, TrainError> {
        Self::open_with(config, model, out, OpenOptions::default())
    }

    /// [`Trainer::open`] with options.
    ///
    /// # Errors
    /// As [`Trainer::open`]; also when the configuration asks for clips and none are given.
    pub fn open_with(
        config: TrainConfig,
        model: HouseModel,
        out: &Path,
        options: OpenOptions,
    ) -> Result<Self, TrainError> {
        let OpenOptions { clips, teacher, other_configuration } = options;
        if (config.data.kind == Kind::Clips) != clips.is_some() {
            return Err(TrainError::Config("data.kind = \"clips\" and clips go together".to_owned()));
        }
        let teacher = match (&config.distill, teacher) {
            (Some(distill), Some(params)) => {
                let teacher = Teacher::new(distill, &model, config.shift, &params);
                Some((teacher.map_err(TrainError::Config)?, params))
            }
            (None, None) => None,
            _ => return Err(TrainError::Config("[distill] and a teacher go together".to_owned())),
        };
        fs::create_dir_all(out).map_err(io(out))?;
        let difficulty = Difficulty::named(&config.difficulty)
            .ok_or_else(|| TrainError::Config(format!("unknown difficulty {:?}", config.difficulty)))?;
        let checkpoint = out.join("checkpoint.safetensors");
        let identity = clips.as_ref().map_or_else(String::new, |c| c.identity().to_owned());
        let mut state = if checkpoint.exists() {
            let state = State::load(&checkpoint, &model)?;
            if !other_configuration {
                state.agrees(&checkpoint, &config, &model, &identity)?;
            }
            state
        } else if let Some(clips) = &clips {
            State::from_clips(&config, &model, &difficulty, clips)?
        } else {
            State::new(&config, &model, &difficulty)
        };
        state.origin = [String::new(), toml::to_string(&model).unwrap_or_default(), identity];
        let codec = codec_of(&state.params);
        let workers = (0..config.workers)
            .map(|_| {
                let source = Source::new(&model, difficulty.clone(), codec.clone()).varied(config.variety);
                let [eager, teaching] = [true, false].map(|train| Eager::new(Arc::default(), train));
                Worker { eager, source, teaching }
            })
            .collect();
        let schedule = config.steps;
        let clips = clips.zip(codec);
        let out = out.to_path_buf();
        let mut trainer =
            Self { config, model, state, difficulty, workers, teacher: None, clips, out, schedule };
        if let Some((teacher, params)) = teacher {
            trainer.start_from(&params, Path::new("distill.teacher"))?;
            trainer.teacher = Some(teacher);
        }
        trainer.trim_metrics()?;
        Ok(trainer)
    }

    /// Begins a run with the weights of `from` (see [`State::start_from`]) instead of fresh ones; a run that has
    /// begun already goes on as it is.
    ///
    /// # Errors
    /// When a weight has another shape.
    pub fn start_from(&mut self, from: &Params, path: &Path) -> Result<usize, TrainError> {
        if self.state.step > 0 {
            return Ok(0);
        }
        let fresh = self.state.start_from(from, path)?;
        let codec = codec_of(&self.state.params);
        if let (Some((_, own)), Some(codec)) = (&mut self.clips, &codec) {
            own.clone_from(codec);
        }
        for worker in &mut self.workers {
            worker.source =
                Source::new(&self.model, self.difficulty.clone(), codec.clone()).varied(self.config.variety);
        }
        Ok(fresh)
    }

    /// The learning rate follows a run of this many steps, even when fewer are done now.
    pub fn schedule_steps(&mut self, steps: u64) {
        self.schedule = steps;
    }

    /// Lines after the checkpoint's step are those of a run that was killed: they will be written again.
    fn trim_metrics(&self) -> Result<(), TrainError> {
        let path = self.out.join("metrics.jsonl");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let kept: String = text
            .lines()
            .filter(|l| serde_json::from_str::<Metrics>(l).is_ok_and(|m| m.step <= self.state.step))
            .flat_map(|l| [l, "\n"])
            .collect();
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, kept).map_err(io(&temporary))?;
        fs::rename(&temporary, &path).map_err(io(&path))
    }

    /// Runs until the configured number of steps or until `stop`, which takes effect between two passes; the
    /// checkpoint is written then, and a run that goes on from it is the same run. `progress` gets every metrics
    /// line and the samples per second.
    ///
    /// # Errors
    /// When the loss is no longer finite or a file cannot be written.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        mut progress: impl FnMut(&Metrics, f64),
    ) -> Result<(), TrainError> {
        let checkpoint = self.out.join("checkpoint.safetensors");
        let metrics_path = self.out.join("metrics.jsonl");
        let mut since = (Instant::now(), 0);
        let mut saved = self.state.step;
        while self.state.step < self.config.steps && !stop.load(Ordering::Relaxed) {
            let Some((losses, norm)) = self.step(stop)? else { break };
            let pending = &mut self.state.pending;
            pending.losses.add(&losses);
            pending.norm_max = pending.norm_max.max(norm);
            pending.steps += 1;
            since.1 += 1;
            let step = self.state.step;
            if step.is_multiple_of(self.config.log_every) {
                let rate = (since.1 * self.config.batch as u64) as f64 / since.0.elapsed().as_secs_f64();
                let eval = step.is_multiple_of(self.config.eval_every);
                let houses = self.config.data.kind == Kind::House || self.config.data.house > 0.0;
                let pending = std::mem::take(&mut self.state.pending);
                let line = Metrics {
                    step,
                    samples: step * self.config.batch as u64,
                    lr: self.config.lr(step, self.schedule),
                    losses: pending.losses.scaled(1.0 / pending.steps as f64),
                    grad_norm: pending.norm_max,
                    eval: (eval && houses).then(|| {
                        evaluate(&self.model, &self.difficulty, &self.state.params, self.config.eval_houses)
                    }),
                    held_out: if eval { self.held_out()? } else { None },
                };
                let mut text = serde_json::to_string(&line).map_err(|e| TrainError::Config(e.to_string()))?;
                text.push('\n');
                let mut file = fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(&metrics_path)
                    .map_err(io(&metrics_path))?;
                file.write_all(text.as_bytes()).map_err(io(&metrics_path))?;
                progress(&line, rate);
                since = (Instant::now(), 0);
            }
            if step.is_multiple_of(self.config.checkpoint_every) {
                self.state.save(&checkpoint, &self.config)?;
                saved = step;
            }
        }
        if self.state.step != saved {
            self.state.save(&checkpoint, &self.config)?;
        }
        Ok(())
    }

    /// Losses on clips that are kept apart: as many as `eval_houses`, always the same, without dropping.
    fn held_out(&self) -> Result<Option<Losses>, TrainError> {
        let Some((clips, codec)) = self.clips.as_ref().filter(|(c, _)| c.has_held_out()) else {
            return Ok(None);
        };
        let (c, count) = (&self.config, self.config.eval_houses.max(1));
        let mut eager = Eager::new(self.state.params.clone(), false);
        let mut sum = Losses::default();
        for i in 0..count {
            let mut rng = Rng::new(0x4e1d_0000 + i as u64);
            let samples = [clips.sample(rng.next_u64(), c.navigate, false, codec)?];
            let values = samples[0].latents.len();
            let draws = [Draw::new(&mut rng, values, c.high_noise, c.shift, 0.0, c.one_way)];
            eager.restart(self.state.params.clone());
            let out = net::forward(&mut eager, &self.model, &samples, &draws);
            sum.add(&net::losses(&eager, &self.model, &samples, &draws, &out, &c.loss, count).0);
        }
        Ok(Some(sum))
    }

    /// One optimiser step; none when `stop` came between two passes, and then nothing has changed.
    fn step(&mut self, stop: &AtomicBool) -> Result<Option<(Losses, f64)>, TrainError> {
        let step = self.state.step + 1;
        let (config, model, params) = (&self.config, &self.model, &self.state.params);
        let per = config.batch / config.workers;
        let clips = self.clips.as_ref();
        let teacher = self.teacher.as_ref();
        let shares: Result<Option<Vec<Share>>, TrainError> = std::thread::scope(|scope| {
            let handles: Vec<_> = self
                .workers
                .iter_mut()
                .enumerate()
                .map(|(w, Worker { eager, source, teaching })| {
                    let params = params.clone();
                    scope.spawn(move || {
                        let mut rng = Rng::new(config.seed ^ (step << 8) ^ w as u64);
                        let samples: Vec<Sample> = (0..per)
                            .map(|_| {
                                if let Some((clips, codec)) = clips
                                    && !(config.data.house > 0.0 && rng.chance(config.data.house))
                                {
                                    return clips.sample(rng.next_u64(), config.navigate, true, codec);
                                }
                                let task = if rng.chance(config.navigate) {
                                    Task::Navigate
                                } else if rng.chance(config.absent) {
                                    Task::Absent
                                } else {
                                    Task::Ground
                                };
                                Ok(source.sample(rng.next_u64(), task, true))
                            })
                            .collect::<Result<_, _>>()?;
                        let mut draws: Vec<Draw> = samples
                            .iter()
                            .map(|s| {
                                let values = s.latents.len();
                                let c = config;
                                Draw::new(&mut rng, values, c.high_noise, c.shift, c.drop, c.one_way)
                            })
                            .collect();
                        if let Some(teacher) = teacher {
                            teacher.teach(teaching, &mut rng, &samples, &mut draws);
                        }
                        let mut share = Share { losses: Losses::default(), grads: Vec::new() };
                        let part = per / config.accumulate;
                        for (samples, draws) in samples.chunks(part).zip(draws.chunks(part)) {
                            if stop.load(Ordering::Relaxed) {
                                return Ok(None);
                            }
                            eager.restart(params.clone());
                            let out = net::forward(eager, model, samples, draws);
                            let (losses, grads) =
                                net::losses(eager, model, samples, draws, &out, &config.loss, config.batch);
                            eager.backward(grads);
                            share.losses.add(&losses);
                            add_grads(&mut share.grads, eager.take_grads());
                        }
                        eager.clear();
                        Ok(Some(share))
                    })
                })
                .collect();
            handles.into_iter().map(|h| h.join().expect("a training worker panicked")).collect()
        });
        let Some(shares) = shares? else { return Ok(None) };
        let mut losses = Losses::default();
        let mut grads: Vec<Vec<f32>> = vec![Vec::new(); self.state.params.len()];
        for share in shares {
            losses.add(&share.losses);
            add_grads(&mut grads, share.grads);
        }
        let norm = grads.iter().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        if !losses.total.is_finite() || !norm.is_finite() {
            return Err(TrainError::Diverged(step));
        }
        let clip = (config.optim.clip / norm.max(1e-12)).min(1.0) as f32;
        let lr = config.lr(step, self.schedule);
        let rules = optim::rules(&config.optim, &self.state.params);
        let params = Arc::make_mut(&mut self.state.params);
        let ema_decay = self.config.ema.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;

        // Weights are updated by all workers, each taking every n-th of its rule.
        struct Job<'a> {
            rule: optim::Rule,
            shape: Vec<usize>,
            weights: &'a mut Vec<f32>,
            ema: &'a mut Vec<f32>,
            moments: &'a mut Moments,
            grad: Vec<f32>,
        }
        let shapes: Vec<(String, Vec<usize>)> =
            (0..params.len()).map(|i| (params.get(i).0.to_string(), params.get(i).1.to_vec())).collect();
        let mut lanes: Vec<Vec<Job>> = (0..config.workers).map(|_| Vec::new()).collect();
        let mut turn = [0usize; 2];
        for (((((weights, ema), moments), grad), rule), (name, shape)) in params
            .all_values_mut()
            .zip(self.state.ema.all_values_mut())
            .zip(&mut self.state.moments)
            .zip(grads)
            .zip(rules)
            .zip(shapes)
        {
            let chosen = config.only.is_empty() || config.only.iter().any(|o| name.contains(o.as_str()));
            if grad.is_empty() || !chosen || name.starts_with("codec.") {
                continue;
            }
            let kind = usize::from(rule == optim::Rule::Muon);
            lanes[turn[kind] % config.workers].push(Job { rule, shape, weights, ema, moments, grad });
            turn[kind] += 1;
        }
        std::thread::scope(|scope| {
            for lane in &mut lanes {
                scope.spawn(move || {
                    for job in lane {
                        for g in &mut job.grad {
                            *g *= clip;
                        }
                        optim::update(
                            &config.optim,
                            job.rule,
                            &job.shape,
                            job.weights,
                            &job.grad,
                            job.moments,
                            lr,
                            step,
                        );
                        for (e, w) in job.ema.iter_mut().zip(job.weights.iter()) {
                            *e = ema_decay * *e + (1.0 - ema_decay) * w;
                        }
                    }
                });
            }
        });
        self.state.step = step;
        Ok(Some((losses, norm)))
    }
}

fn add_grads(sums: &mut Vec<Vec<f32>>, grads: Vec<Vec<f32>>) {
    if sums.is_empty() {
        *sums = grads;
        return;
    }
    for (sum, g) in sums.iter_mut().zip(grads) {
        if sum.is_empty() {
            *sum = g;
        } else if !g.is_empty() {
            accumulate(sum, &g);
        }
    }
}

/// Goal poses on unseen houses from one pass at t = 0.97.
#[must_use]
pub fn evaluate(model: &HouseModel, difficulty: &Difficulty, params: &Arc<Params>, houses: usize) -> Eval {
    let mut source = Source::new(model, difficulty.clone(), codec_of(params));
    let (f, context, tokens) = (model.latents(), model.layout.context_latents, model.dit.tokens_per_frame());
    let mut head = (Vec::new(), Vec::new());
    let mut mask = (Vec::new(), Vec::new());
    let mut context_yaw = Vec::new();
    let (mut present, mut absent) = (Vec::new(), Vec::new());
    let mut e = Eager::new(params.clone(), false);
    for i in 0..houses {
        let seed = 0xe0a1_0000 + i as u64;
        for task in [Task::Ground, Task::Absent] {
            let sample = source.sample(seed, task, false);
            let mut rng = Rng::new(seed);
            let mut draw = Draw::new(&mut rng, sample.latents.len(), 1.0, 1.0, 0.0, false);
            draw.s = 0.97;
            e.restart(params.clone());
            let out = net::forward(&mut e, model, std::slice::from_ref(&sample), &[draw]);
            let logits = e.value(out.mask).1;
            let logits = &logits[..(context + 1) * tokens];
            let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            if task == Task::Absent {
                absent.push(top);
                continue;
            }
            present.push(top);
            let pose = e.value(out.pose).1;
            let error = |p: &[f32], t: usize| {
                let want = sample.pose[t];
                let yaw = f64::from(p[3]).atan2(f64::from(p[2]));
                let dy = mindseye_world::wrap_angle(yaw - want.yaw).abs().to_degrees();
                (dy, (f64::from(p[0]) - want.x).hypot(f64::from(p[1]) - want.y))
            };
            let (yaw, position) = error(&pose[(f - 1) * 4..], f - 1);
            head.0.push(yaw);
            head.1.push(position);
            for t in 0..context {
                context_yaw.push(error(&pose[t * 4..], t).0);
            }
            // Mask and place, carried by the true poses of the context to the start.
            let locate = e.value(out.locate).1;
            let (mut x, mut y, mut w) = (0.0, 0.0, 0.0);
            for t in 0..=context {
                for p in 0..tokens {
                    let k = f64::from(logits[t * tokens + p].min(20.0)).exp();
                    let at = (t * tokens + p) * 2;
                    let place = sample.pose[t].compose(mindseye_world::Pose2::unwrapped(
                        f64::from(locate[at]),
                        f64::from(locate[at + 1]),
                        0.0,
                    ));
                    x += k * place.x;
                    y += k * place.y;
                    w += k;
                }
            }
            let (x, y) = (x / w, y / w);
            let goal = sample.pose[f - 1];
            let distance = x.hypot(y);
            let stand = (distance - mindseye_world::STANDOFF_M) / distance.max(1e-6);
            let bearing = y.atan2(x);
            mask.0.push(mindseye_world::wrap_angle(bearing - goal.yaw).abs().to_degrees());
            mask.1.push((x * stand - goal.x).hypot(y * stand - goal.y));
        }
    }
    let within = |v: &[f64]| v.iter().filter(|e| **e <= 25.0).count() as f64 / v.len().max(1) as f64;
    let wins: f64 = present
        .iter()
        .flat_map(|p| {
            absent.iter().map(move |a| {
                if p > a {
                    1.0
                } else if p == a {
                    0.5
                } else {
                    0.0
                }
            })
        })
        .sum();
    Eval {
        head_within_25: within(&head.0),
        head_yaw_deg: median(&mut head.0),
        head_position_m: median(&mut head.1),
        mask_within_25: within(&mask.0),
        mask_yaw_deg: median(&mut mask.0),
        mask_position_m: median(&mut mask.1),
        absent_auc: wins / (present.len() * absent.len()).max(1) as f64,
        context_yaw_deg: median(&mut context_yaw),
    }
}
