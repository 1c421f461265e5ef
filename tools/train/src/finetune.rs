//! The fine-tune of a model of the large family: which weights, on what sequences, for how long. It can be planned
//! ([`crate::plan`]), and trained on pre-encoded latents ([`crate::latents`]) where the configuration says what on.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use mindseye_base::file::sha256;
use mindseye_engines::count::count_denoiser;
use mindseye_engines::denoise::sinusoid;
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::dit::{self, DitConfig, DitInputs, DitOutputs, LiftOutputs, Prediction};
use mindseye_engines::text::{Tokenizer, TokenizerError};
use mindseye_world::{Camera, Difficulty, Pose2, Rng};
use serde::{Deserialize, Serialize};

use crate::autoencoder::{Autoencoder, save_weights};
use crate::autograd::{Autograd, Device, OutputGrads};
use crate::checkpoint::State;
use crate::config::{ConfigError, SettingError, has_table, read};
use crate::eager::ffi::gemm::{View, gemm};
use crate::eager::{Params, is_chosen};
use crate::error::{TrainError, io};
use crate::family::{LoadModelError, parse};
use crate::latents::{LatentSample, Latents};
use crate::net::{self, Draw, HeadTruth, HeadWeights, Losses};
use crate::optim::OptimConfig;
use crate::plan::Job;
use crate::ranks::Ranks;
use crate::run::{CHECKPOINT, Speed};
use crate::task::{Course, Phase, Task, TaskMetrics, TaskRun};
use crate::wan::{FootageSource, Labels, WanModel, place};

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
    /// Only weights whose names contain one of these are trained; empty = all. With `lora` the matrices among them stay, and
    /// what is added to them is trained.
    pub only: Vec<String>,
    /// What a sample is.
    pub finetune: SampleConfig,
    /// Optimiser.
    pub optim: OptimConfig,
    /// How long and how fast; a configuration without can only be planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub course: Option<Course>,
    /// What is trained on; a configuration without can only be planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latents: Option<LatentConfig>,
    /// Adds lift heads to the network, where the data has poses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<HeadConfig>,
    /// Adds products of low rank to matrices instead of training them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
}

/// `[heads]`: lift heads (pose, mask, place) on a network that has none, and the weights of their losses; that of the video
/// counts 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadConfig {
    /// Until this step only the heads are trained, then the rest (see [`FineTuneConfig::only`]), too.
    pub trunk_from: u64,
    /// See [`crate::net::LossWeights`].
    pub mask: f32,
    /// See [`crate::net::LossWeights`].
    pub context_pose: f32,
    /// See [`crate::net::LossWeights`].
    pub target_pose: f32,
    /// See [`crate::net::LossWeights`].
    pub locate: f32,
}

/// `[lora]`: matrices have a product of low rank added.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank.
    pub rank: usize,
    /// The product counts `alpha / rank`.
    pub alpha: f32,
}

impl LoraConfig {
    fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

/// Names of the two matrices that a weight has added, down and up.
pub(crate) fn adapter_names(weight: &str) -> [String; 2] {
    let layer = weight.strip_suffix(".weight").unwrap_or(weight);
    [format!("{layer}.lora_A.weight"), format!("{layer}.lora_B.weight")]
}

/// Part of the names of heads, and of what [`LoraConfig`] adds.
const HEADS: &str = "lift.";
const ADAPTERS: &str = ".lora_";

/// `[latents]`: samples that are encoded once, of the procedural house.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentConfig {
    /// Run of the autoencoder, or published weights (`vae/`, `text_encoder/`), relative to this file.
    pub autoencoder: PathBuf,
    /// Sentencepiece model, relative to this file.
    pub tokenizer: PathBuf,
    /// Name of the world's difficulty.
    pub difficulty: String,
    /// Rooms, of each of which one drive is encoded.
    pub samples: u64,
    /// Samples in one file.
    pub per_shard: u64,
    /// Latents of one recording, of which `finetune.context_latents` are taken each time.
    pub recorded_latents: usize,
    /// Share of samples whose context, first image and text are dropped together.
    pub drop: f64,
    /// Share of samples with a noise level in [0.9, 1].
    pub high_noise: f64,
    /// Shift of the other noise levels.
    pub shift: f64,
    /// Whether samples know where the base was and where the thing is seen, which heads learn from; without, heads stay off.
    #[serde(default = "yes")]
    pub poses: bool,
}

fn yes() -> bool {
    true
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
    /// The denoiser, with its heads.
    pub dit: DitConfig,
    /// Weights that are trained at the end (see [`is_chosen`]).
    pub only: Vec<String>,
}

impl FineTuneConfig {
    /// Whether a configuration file is one of a fine-tune; one that cannot be read is not.
    #[must_use]
    pub fn is_meant(path: &Path) -> bool {
        has_table(path, "finetune")
    }

    /// Reads a configuration that can be trained, and the model that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field; [`SettingError::Plan`] where it can only be planned.
    pub fn load_to_train(path: &Path) -> Result<(Self, WanModel), ConfigError> {
        let (config, _) = Self::load(path)?;
        config.trained(path)?;
        let mut model = WanModel::load(&place(&config.model, path))?;
        model.dit.lift |= config.has_heads();
        Ok((config, model))
    }

    /// Reads a configuration and what it needs of the model that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field.
    pub fn load(path: &Path) -> Result<(Self, FineTuneModel), ConfigError> {
        let config = read(path, Self::validate)?;
        let (name, mut dit) = read_model(&place(&config.model, path))?;
        dit.lift |= config.has_heads();
        let only = config.phases().pop().map(|phase| phase.only).unwrap_or_default();
        Ok((config, FineTuneModel { name, dit, only }))
    }

    /// Whether heads are trained: they are asked for, and there is something that they can learn from.
    #[must_use]
    pub fn has_heads(&self) -> bool {
        self.heads.is_some() && self.latents.as_ref().is_none_or(|latents| latents.poses)
    }

    /// Which weights are trained when.
    fn phases(&self) -> Vec<Phase> {
        let heads = self.heads.filter(|_| self.has_heads());
        let mut only = if self.lora.is_some() { vec![ADAPTERS.to_owned()] } else { self.only.clone() };
        if heads.is_some() && !only.is_empty() {
            only.push(HEADS.to_owned());
        }
        let first = heads.filter(|heads| heads.trunk_from > 0);
        let first = first.map(|_| Phase { after: 0, only: vec![HEADS.to_owned()] });
        let after = heads.map_or(0, |heads| heads.trunk_from);
        // A run that ends before has one phase.
        let last = (after < self.steps).then_some(Phase { after, only });
        first.into_iter().chain(last).collect()
    }

    /// Whether weights are left as they are at the start, for some of the run at least.
    #[must_use]
    pub fn leaves_weights(&self) -> bool {
        self.phases().iter().any(|phase| !phase.only.is_empty())
    }

    /// The matrices that have a product of low rank added: name and shape.
    fn adapted(&self, dit: &DitConfig) -> Vec<(String, [usize; 2])> {
        let specs = count_denoiser(dit, 2, 0, 2);
        let chosen = specs.params().iter().filter(|spec| self.lora.is_some() && is_adapted(&self.only, spec));
        chosen.map(|spec| (spec.name.clone(), [spec.shape[0], spec.shape[1]])).collect()
    }

    /// Zeros for every weight that a run has.
    fn weights(&self, dit: &DitConfig) -> Params {
        let mut params = Params::new();
        for spec in count_denoiser(dit, 2, 0, 2).params() {
            params.insert(&spec.name, &spec.shape, vec![0.0; spec.shape.iter().product()]);
        }
        let rank = self.lora.map_or(0, |lora| lora.rank);
        for (name, [out, from]) in self.adapted(dit) {
            for (name, shape) in adapter_names(&name).iter().zip([[rank, from], [out, rank]]) {
                params.insert(name, &shape, vec![0.0; shape[0] * shape[1]]);
            }
        }
        params
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
        if let Some(course) = &self.course {
            course.validate(self.batch as usize)?;
        }
        let rank = self.lora.map_or(1, |lora| lora.rank);
        if rank == 0 {
            return Err(SettingError::Range { name: "lora.rank", value: "0".to_owned(), expected });
        }
        if let Some(latents) = &self.latents {
            let recorded = latents.recorded_latents;
            if recorded < context_latents {
                let name = "latents.recorded_latents";
                let expected = "at least finetune.context_latents";
                return Err(SettingError::Range { name, value: recorded.to_string(), expected });
            }
            if latents.samples == 0 {
                return Err(SettingError::Range { name: "latents.samples", value: "0".to_owned(), expected });
            }
            latents.world()?;
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
            only: &model.only,
            adapted: self.lora.map(|lora| (&self.only[..], lora.rank)),
            optim: &self.optim,
        }
    }
}

/// Whether a weight has a product of low rank added, where any has: a chosen matrix of a linear layer, but none of the heads.
pub(crate) fn is_adapted(only: &[String], weight: &ParamSpec) -> bool {
    weight.shape.len() == 2 && is_chosen(only, &weight.name) && !weight.name.starts_with(HEADS)
}

impl LatentConfig {
    fn world(&self) -> Result<Difficulty, SettingError> {
        Difficulty::named(&self.difficulty).ok_or_else(|| SettingError::Range {
            name: "latents.difficulty",
            value: format!("{:?}", self.difficulty),
            expected: "\"plain\", \"house\", \"furnished\" or \"apartment\"",
        })
    }
}

/// Networks that are run once, before training.
pub struct Encoders {
    /// The autoencoder.
    pub autoencoder: Autoencoder,
    /// Weights of the text encoder.
    pub umt5: Params,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl Encoders {
    /// The encoders of a configuration file: the trained autoencoder that it names, and a text encoder with seeded weights.
    ///
    /// # Errors
    /// A run or tokenizer that cannot be read.
    pub fn load(path: &Path, config: &FineTuneConfig, model: &WanModel) -> Result<Self, TrainError> {
        let (course, latents) = config.trained(path)?;
        let file = place(&latents.tokenizer, path);
        Ok(Self {
            autoencoder: Autoencoder::of_run(&place(&latents.autoencoder, path), model)?,
            umt5: net::initialise(&model.umt5_weights(), course.seed ^ 0x7e57),
            tokenizer: Tokenizer::open(&file)
                .map_err(|source| TrainError::Tokenizer { path: file, source })?,
        })
    }

    /// Text rows of a prompt; of nothing where it is empty.
    fn text(&self, model: &WanModel, thing: &str) -> Result<Vec<f32>, TokenizerError> {
        let mut ids = vec![self.tokenizer.end() as usize];
        if !thing.is_empty() {
            let prompt = model.text.prompt.replacen("{}", thing, 1);
            let encoded = self.tokenizer.encode_prompt(&prompt, model.dit.text_len)?;
            ids = encoded.ids[..encoded.length].iter().map(|id| *id as usize).collect();
        }
        Ok(model.text_rows(&self.umt5, &ids))
    }

    /// What latents and text rows are told apart by.
    fn identity(&self, config: &FineTuneConfig, model: &WanModel) -> String {
        let mut bytes = self.autoencoder.identity.clone().into_bytes();
        for i in 0..self.umt5.len() {
            bytes.extend(self.umt5.get(i).2.iter().flat_map(|v| v.to_le_bytes()));
        }
        let latents = config.latents.as_ref().map(|l| (l.difficulty.clone(), l.recorded_latents, l.poses));
        bytes.extend(format!("{latents:?} {:?} {:?}", config.finetune, model.text).into_bytes());
        sha256(&bytes)
    }
}

impl FineTuneConfig {
    /// Course and data of a configuration that can be trained.
    fn trained(&self, path: &Path) -> Result<(&Course, &LatentConfig), ConfigError> {
        self.course
            .as_ref()
            .zip(self.latents.as_ref())
            .ok_or_else(|| ConfigError::Setting { path: path.to_path_buf(), source: SettingError::Plan })
    }
}

/// Encodes the samples of a configuration file into `dir`, or goes on with it, and opens them.
///
/// # Errors
/// Files that cannot be read or written, latents of another autoencoder, `stop`.
pub fn encode(
    path: &Path,
    config: &FineTuneConfig,
    model: &WanModel,
    encoders: &Encoders,
    dir: &Path,
    stop: &AtomicBool,
) -> Result<Latents, TrainError> {
    let (_, latents) = config.trained(path)?;
    let model = WanModel { vae: encoders.autoencoder.vae.clone(), ..model.clone() };
    let SampleConfig { target_latents, box_latents, .. } = config.finetune;
    let mut source = FootageSource::new(&model, latents.world()?);
    let weights = &encoders.autoencoder.weights;
    let (recorded, moving) = (model.images(latents.recorded_latents), model.images(target_latents));
    let identity = encoders.identity(config, &model);
    let counts = (latents.samples, latents.per_shard);
    Latents::encode(dir, &identity, counts, stop, |n| {
        let still = box_latents * model.vae.temporal_factor();
        let footage = source.footage(n, recorded, moving, still);
        let text = encoders.text(&model, &footage.thing);
        let mut sample = LatentSample {
            context: model.encode(weights, &footage.context),
            target: model.encode(weights, &footage.target),
            text: text.map_err(|source| TrainError::Tokenizer { path: latents.tokenizer.clone(), source })?,
            ..LatentSample::default()
        };
        if latents.poses {
            let Labels { poses, seen, place } = footage.labels;
            sample.poses = poses.iter().flat_map(|p| [p.x, p.y, p.yaw].map(|v| v as f32)).collect();
            sample.place = place.map(|v| v as f32).to_vec();
            sample.seen = seen;
        }
        Ok::<_, TrainError>(sample)
    })
}

/// One sample as the network sees it.
struct Sequence<'a> {
    /// Clean latents, frame by frame: context, then targets.
    latents: Vec<f32>,
    index: &'a [usize],
    sample: &'a LatentSample,
}

impl Sequence<'_> {
    /// What heads ought to say, where it is known: poses are from that of the first image.
    fn truth<R>(&self, recorded: usize, tokens: usize, then: impl FnOnce(&HeadTruth<'_>) -> R) -> Option<R> {
        let LatentSample { poses, seen, place, .. } = self.sample;
        let (pose, context) = (
            |at: usize| {
                let [x, y, yaw] = [0, 1, 2].map(|i| f64::from(poses[3 * at + i]));
                Pose2::unwrapped(x, y, yaw)
            },
            self.index.len(),
        );
        if poses.is_empty() {
            return None;
        }
        let (targets, start) = (recorded..poses.len() / 3, pose(recorded));
        let thing = Pose2::unwrapped(f64::from(place[0]), f64::from(place[1]), 0.0);
        let all: Vec<Pose2> = self.index.iter().copied().chain(targets).map(pose).collect();
        let locate: Vec<[f32; 2]> =
            all.iter().map(|p| p.relative(thing)).map(|t| [t.x as f32, t.y as f32]).collect();
        let rows = self.index.iter().chain([&recorded]);
        let seen: Vec<f32> = rows.flat_map(|row| &seen[row * tokens..(row + 1) * tokens]).copied().collect();
        Some(then(&HeadTruth {
            context,
            poses: all.iter().map(|p| Some(start.relative(*p))).collect(),
            seen: &seen,
            locate: &locate,
        }))
    }
}

struct Flow {
    config: FineTuneConfig,
    course: Course,
    data: LatentConfig,
    model: WanModel,
    latents: Latents,
    null_text: Vec<f32>,
    adapted: Vec<(String, [usize; 2])>,
}

impl Flow {
    /// Adds the products of low rank to their layers.
    fn adapt<A: Autograd>(&self, e: &mut A) {
        let Some(lora) = &self.config.lora else { return };
        for (name, [out, from]) in &self.adapted {
            let [down, up] = adapter_names(name);
            let (w, down) = (e.param(name, &[*out, *from]), e.param(&down, &[lora.rank, *from]));
            let up = e.param(&up, &[*out, lora.rank]);
            e.adapt(&w, down, up, lora.scale());
        }
    }

    fn forward<A: Autograd>(&self, e: &mut A, sequence: &Sequence<'_>, draw: &Draw) -> DitOutputs<A> {
        let (cfg, context) = (&self.model.dit, sequence.index.len());
        let (hw, c) = (cfg.latent_height * cfg.latent_width, cfg.in_channels);
        let f = sequence.latents.len() / (c * hw);
        let mut latents = vec![0.0; sequence.latents.len()];
        for t in 0..f {
            let (clean, noise) = match (t <= context, draw.dropped) {
                (true, false) => (1.0, 0.0),
                (true, true) => (0.0, 1.0),
                (false, _) => (1.0 - draw.s as f32, draw.s as f32),
            };
            for (ch, p) in (0..c).flat_map(|ch| (0..hw).map(move |p| (ch, p))) {
                let from = (t * c + ch) * hw + p;
                latents[(ch * f + t) * hw + p] = clean * sequence.latents[from] + noise * draw.noise[from];
            }
        }
        let first = sequence.index.first().copied().unwrap_or(0);
        let index: Vec<f64> = sequence.index.iter().map(|i| (i - first) as f64).collect();
        let begin = index.last().copied().unwrap_or(0.0) + self.model.layout.gap as f64;
        let index: Vec<f64> = index.into_iter().chain((0..f - context).map(|j| begin + j as f64)).collect();
        let (cos, sin) = cfg.rotary_tables(&index);
        let table = [f * cfg.tokens_per_frame(), cfg.head_dim / 2];
        let (cos, sin) = (e.input(&table, cos), e.input(&table, sin));
        let given = if draw.dropped { 1000.0 } else { 0.0 };
        let time = [given, 1000.0 * draw.s].map(|t| sinusoid(t, cfg.freq_dim)).concat();
        let time = e.input(&[2, cfg.freq_dim], time);
        let rows = e.index(&[1, f], (0..f).map(|t| usize::from(t > context)).collect());
        let row_batch = e.index(&[2], vec![0, 0]);
        let text = if draw.dropped { &self.null_text } else { &sequence.sample.text };
        let text = e.input(&[1, cfg.text_len, cfg.text_dim], text.to_vec());
        let latents = e.input(&[1, c, f, cfg.latent_height, cfg.latent_width], latents);
        let rays = [1, f, cfg.tokens_per_frame(), cfg.camera_channels];
        let camera =
            (cfg.camera_channels > 0).then(|| e.input(&rays, vec![0.0; rays.iter().product::<usize>()]));
        let inputs = DitInputs {
            latents: &latents,
            time: &time,
            rows: &rows,
            row_batch: Some(&row_batch),
            text: &text,
            cos: &cos,
            sin: &sin,
            camera: camera.as_ref(),
            guide: None,
            bias: None,
            memory: None,
        };
        self.adapt(e);
        dit::forward(e, cfg, &inputs)
    }

    /// Losses of the heads and gradients of what they said.
    fn heads<A: Autograd>(
        &self,
        e: &A,
        sequence: &Sequence<'_>,
        said: &LiftOutputs<A>,
        share: f32,
        sum: &mut Losses,
    ) -> OutputGrads<A::Tensor> {
        let Some(heads) = self.config.heads else { return Vec::new() };
        let HeadConfig { mask, context_pose, target_pose, locate, .. } = heads;
        let weights = HeadWeights { mask, context_pose, target_pose, locate };
        let [pose, mask, place] = [&said.pose, &said.mask, &said.locate].map(|v| e.value(v));
        let zeros = |values: &[f32]| vec![0.0f32; values.len()];
        let (mut g_pose, mut g_mask, mut g_place) = (zeros(&pose), zeros(&mask), zeros(&place));
        let learnt = sequence.truth(self.data.recorded_latents, self.model.dit.tokens_per_frame(), |truth| {
            truth.poses(&weights, share, &pose, &mut g_pose, sum);
            truth.mask_and_place(&weights, share, (&mask, &place), (&mut g_mask, &mut g_place), sum);
        });
        if learnt.is_none() {
            return Vec::new();
        }
        vec![(said.pose.clone(), g_pose), (said.mask.clone(), g_mask), (said.locate.clone(), g_place)]
    }

    /// Squared error of the velocity of the imagined latents, or of the clean sample, as the model predicts; a mean.
    fn loss(&self, sequence: &Sequence<'_>, draw: &Draw, got: &[f32], share: f32) -> (f64, Vec<f32>) {
        let (cfg, context) = (&self.model.dit, sequence.index.len());
        let (hw, c) = (cfg.latent_height * cfg.latent_width, cfg.in_channels);
        let f = got.len() / (c * hw);
        let per = share / ((f - context - 1) * c * hw) as f32;
        let (mut loss, mut gradient) = (0.0, vec![0.0; got.len()]);
        for t in context + 1..f {
            for (ch, p) in (0..c).flat_map(|ch| (0..hw).map(move |p| (ch, p))) {
                let (from, to) = ((t * c + ch) * hw + p, (ch * f + t) * hw + p);
                let clean = sequence.latents[from];
                let wanted = match cfg.prediction {
                    Prediction::X0 => clean,
                    Prediction::Velocity => draw.noise[from] - clean,
                };
                let off = got[to] - wanted;
                loss += f64::from(off * off * per);
                gradient[to] = 2.0 * off * per;
            }
        }
        (loss, gradient)
    }
}

impl Task for Flow {
    type Config = FineTuneConfig;

    fn config(&self) -> &FineTuneConfig {
        &self.config
    }

    fn course(&self) -> &Course {
        &self.course
    }

    fn optim(&self) -> &OptimConfig {
        &self.config.optim
    }

    fn steps(&self) -> u64 {
        self.config.steps
    }

    fn batch(&self) -> usize {
        self.config.batch as usize
    }

    fn phases(&self) -> Vec<Phase> {
        self.config.phases()
    }

    fn identity(&self) -> &str {
        self.latents.identity()
    }

    fn pass<A: Autograd>(
        &self,
        e: &mut A,
        rng: &mut Rng,
        share: f32,
    ) -> Result<(Losses, OutputGrads<A::Tensor>), TrainError> {
        let sample = self.latents.sample(rng.below(self.latents.len()))?;
        let frame = self.model.dit.in_channels * self.model.dit.latent_height * self.model.dit.latent_width;
        let mut index: Vec<usize> = (0..self.data.recorded_latents).collect();
        rng.shuffle(&mut index);
        index.truncate(self.config.finetune.context_latents);
        index.sort_unstable();
        let context = index.iter().flat_map(|i| &sample.context[i * frame..(i + 1) * frame]);
        let latents: Vec<f32> = context.chain(&sample.target).copied().collect();
        let LatentConfig { high_noise, shift, drop, .. } = self.data;
        let draw = Draw::new(rng, latents.len(), high_noise, shift, drop, false);
        let sequence = Sequence { latents, index: &index, sample: &sample };
        let out = self.forward(e, &sequence, &draw);
        let (video, gradient) = self.loss(&sequence, &draw, &e.value(&out.sample), share);
        let (mut sum, mut outputs) = (Losses { video, ..Losses::default() }, vec![(out.sample, gradient)]);
        if let Some(said) = out.lift.filter(|_| !draw.dropped) {
            outputs.extend(self.heads(e, &sequence, &said, share, &mut sum));
        }
        sum.total = sum.video + sum.mask + sum.context_pose + sum.target_pose + sum.locate;
        Ok((sum, outputs))
    }
}

/// A fine-tune in a directory: `checkpoint.safetensors`, `metrics.jsonl`.
pub struct FineTuneTrainer<D: Device> {
    run: TaskRun<Flow, D>,
    /// Weights that the start lacked, by name and shape: heads, projections of camera rays. What `[lora]` adds is always new.
    pub fresh: Vec<String>,
}

impl<D: Device> FineTuneTrainer<D> {
    /// Opens a run of the configuration file `path`: goes on from its checkpoint, or starts with the weights `init`, of this
    /// file, or with fresh ones.
    ///
    /// # Errors
    /// When the configuration can only be planned, or the directory cannot be used or is of another run; when weights that
    /// stay as they are would be random.
    pub fn open(
        device: &D,
        path: &Path,
        (config, model): (FineTuneConfig, WanModel),
        encoders: &Encoders,
        latents: Latents,
        out: &Path,
        init: Option<(&Params, &Path)>,
        ranks: Option<Ranks>,
    ) -> Result<Self, TrainError> {
        let (course, data) = config.trained(path)?;
        let (course, data) = (course.clone(), data.clone());
        let null_text = encoders.text(&model, "");
        let null_text =
            null_text.map_err(|source| TrainError::Tokenizer { path: data.tokenizer.clone(), source })?;
        let adapted = config.adapted(&model.dit);
        let wanted = config.weights(&model.dit);
        let flow = Flow { config, course, data, model, latents, null_text, adapted };
        let mut start = State::fresh(net::initialise(&wanted, flow.course.seed));
        let begun = out.join(CHECKPOINT).exists();
        let fresh = match init.filter(|_| !begun) {
            Some((from, file)) => start.start_from(from, file)?,
            None if begun || !flow.config.leaves_weights() => Vec::new(),
            None => return Err(TrainError::Options(NO_INIT)),
        };
        // Heads, products and camera rays begin from nothing; a trunk does not.
        let own =
            |name: &str| name.starts_with(HEADS) || name.contains(ADAPTERS) || name.starts_with("camera_");
        if let (Some(lacking), Some((_, file))) = (fresh.iter().find(|name| !own(name)), init) {
            let (path, reason) = (file.to_path_buf(), format!("it lacks {lacking} of the model"));
            return Err(TrainError::Checkpoint { path, reason });
        }
        let fresh = fresh.into_iter().filter(|name| !name.contains(ADAPTERS)).collect();
        let start = std::sync::Arc::unwrap_or_clone(start.params);
        Ok(Self { run: TaskRun::open(device, flow, out, ranks, start)?, fresh })
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
        self.run.run(until, stop, progress)
    }

    /// Steps done.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.run.state.step
    }
}

/// Why a run does not start.
const NO_INIT: &str = "only, [lora] or [heads] leave weights as they are, and fresh ones are noise: give --init DIR, published \
                       weights or a bundle";

/// The averaged weights of the denoiser of a run, with what was added to them.
///
/// # Errors
/// A checkpoint that cannot be read, or is of another network.
pub fn finished(run: &Path, config: &FineTuneConfig, model: &WanModel) -> Result<Params, TrainError> {
    let mut all = State::read(&run.join(CHECKPOINT), &config.weights(&model.dit))?.ema;
    for (name, [out, from]) in config.adapted(&model.dit) {
        let Some(lora) = &config.lora else { continue };
        let [down, up] =
            adapter_names(&name).map(|name| all.position(&name).map(|at| all.get(at).2.to_vec()));
        let (Some(down), Some(up), Some(at)) = (down, up, all.position(&name)) else { continue };
        let (rows, columns) = (View::rows(0, lora.rank), View::rows(0, from));
        gemm(
            [out, from, lora.rank],
            all.values_mut(at),
            columns,
            1.0,
            &up,
            rows,
            &down,
            columns,
            lora.scale(),
        );
    }
    let mut params = Params::new();
    for (name, shape, values) in
        (0..all.len()).map(|i| all.get(i)).filter(|(name, ..)| !name.contains(ADAPTERS))
    {
        params.insert(name, shape, values.to_vec());
    }
    Ok(params)
}

/// Writes a finished run in the layout of published weights (`transformer/`, `vae/`, `text_encoder/`, `tokenizer/`) with its
/// `model.toml`: what `mindseye-tools import` reads.
///
/// # Errors
/// A run that cannot be read, files that cannot be written.
pub fn publish(
    path: &Path,
    config: &FineTuneConfig,
    encoders: &Encoders,
    weights: &Params,
    out: &Path,
) -> Result<(), TrainError> {
    let (_, latents) = config.trained(path)?;
    let parts: [(&str, &Params); 3] =
        [("transformer", weights), ("vae", &encoders.autoencoder.weights), ("text_encoder", &encoders.umt5)];
    for (folder, weights) in parts {
        let folder = out.join(folder);
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        save_weights(weights, &folder.join("model.safetensors"))?;
    }
    let folder = out.join("tokenizer");
    fs::create_dir_all(&folder).map_err(io(&folder))?;
    let file = place(&latents.tokenizer, path);
    fs::copy(&file, folder.join("spiece.model")).map_err(io(&file))?;
    // The model's own file, with the statistics of these latents.
    let source = place(&config.model, path);
    let text = fs::read_to_string(&source).map_err(io(&source))?;
    let mut table: toml::Table = toml::from_str(&text).unwrap_or_default();
    let vae = &encoders.autoencoder.vae;
    if let Some(toml::Value::Table(written)) = table.get_mut("vae") {
        for (name, values) in [("latents_mean", &vae.latents_mean), ("latents_std", &vae.latents_std)] {
            let values = values.iter().map(|v| toml::Value::Float(f64::from(*v))).collect();
            written.insert(name.to_owned(), toml::Value::Array(values));
        }
    }
    if config.has_heads() {
        if let Some(toml::Value::Table(dit)) = table.get_mut("dit") {
            dit.insert("lift".to_owned(), toml::Value::Boolean(true));
        }
        // Poses are the base's: where the camera is on it belongs to them.
        let camera = Camera::new(1, 1);
        let values = [
            ("horizontal_fov_deg", camera.hfov_rad.to_degrees()),
            ("pitch_deg", camera.pitch_rad.to_degrees()),
            ("height_m", camera.mount_height_m),
        ];
        let values = values.map(|(name, value)| (name.to_owned(), toml::Value::Float(value)));
        table.insert("camera".to_owned(), toml::Value::Table(values.into_iter().collect()));
    }
    let written = out.join("model.toml");
    mindseye_base::file::replace(&written, toml::to_string(&table).unwrap_or_default().as_bytes())
        .map_err(io(&written))?;
    Ok(())
}

/// Name and denoiser of a model configuration of any member of the family.
fn read_model(path: &Path) -> Result<(String, DitConfig), LoadModelError> {
    #[derive(Deserialize)]
    struct Model {
        name: String,
        dit: DitConfig,
    }
    let at = || path.to_path_buf();
    let text = fs::read_to_string(path).map_err(|source| LoadModelError::Io { path: at(), source })?;
    let Model { name, dit } = parse(&text).map_err(|source| LoadModelError::Parse { path: at(), source })?;
    dit.validate().map_err(|e| LoadModelError::Invalid { path: at(), source: e.into() })?;
    Ok((name, dit))
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
