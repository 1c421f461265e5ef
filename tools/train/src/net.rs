//! The small model as one differentiable function: text rows, denoiser, lift heads, and their losses.

use std::sync::Arc;

use mindseye_engines::denoise::sinusoid;
use mindseye_engines::model::dit::{self, DitInputs, Prediction};
use mindseye_engines::model::umt5::{self, Umt5Inputs};
use mindseye_world::{Pose2, Rng};

use crate::autograd::{Autograd, OutputGrads};
use crate::data::{Known, SEEN_SHARE, Sample, Task};
use crate::eager::{Eager, Params};
use crate::family::{END, HouseModel};

/// Weights of the losses, all summed.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossWeights {
    /// Flow matching, per latent value, weighted by `1 / max(t, 0.5)^2`.
    pub video: f32,
    /// Mask of the named object on context and first-image tokens (cross-entropy).
    pub mask: f32,
    /// Pose of each context latent.
    pub context_pose: f32,
    /// Pose of each target latent, the last one counted three times.
    pub target_pose: f32,
    /// Place of the named object where it is seen.
    pub locate: f32,
    /// Colours and shapes on context tokens (cross-entropy).
    pub attributes: f32,
    /// With a guide: how much more a pixel counts in `video` where nothing was carried; with 1, twice as much.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub holes: f32,
}

/// Weights of the losses of the lift heads; see [`LossWeights`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct HeadWeights {
    pub(crate) mask: f32,
    pub(crate) context_pose: f32,
    pub(crate) target_pose: f32,
    pub(crate) locate: f32,
}

impl LossWeights {
    fn heads(&self) -> HeadWeights {
        let Self { mask, context_pose, target_pose, locate, .. } = *self;
        HeadWeights { mask, context_pose, target_pose, locate }
    }
}

fn is_zero(value: &f32) -> bool {
    *value == 0.0
}

/// Sums of losses of a batch, each as a mean over samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Losses {
    /// All, weighted.
    pub total: f64,
    /// See [`LossWeights`].
    pub video: f64,
    /// See [`LossWeights`].
    pub mask: f64,
    /// See [`LossWeights`].
    pub context_pose: f64,
    /// See [`LossWeights`].
    pub target_pose: f64,
    /// See [`LossWeights`].
    pub locate: f64,
    /// See [`LossWeights`].
    pub attributes: f64,
}

impl Losses {
    /// Adds another batch.
    pub fn add(&mut self, o: &Self) {
        let (ours, theirs) = (self.values(), o.values());
        let sums: [f64; 7] = std::array::from_fn(|i| ours[i] + theirs[i]);
        *self = Self::from_values(&sums);
    }

    /// All of them, in the order of the fields.
    pub(crate) fn values(&self) -> [f64; 7] {
        let Self { total, video, mask, context_pose, target_pose, locate, attributes } = *self;
        [total, video, mask, context_pose, target_pose, locate, attributes]
    }

    /// Losses from their values in the order of the fields; those that are missing are 0.
    pub(crate) fn from_values(values: &[f64]) -> Self {
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        let [total, video, mask, context_pose, target_pose, locate, attributes] = std::array::from_fn(at);
        Self { total, video, mask, context_pose, target_pose, locate, attributes }
    }

    /// Multiplies all.
    #[must_use]
    pub fn scaled(&self, k: f64) -> Self {
        Self::from_values(&self.values().map(|v| v * k))
    }
}

/// Noise level and noise of one sample.
#[derive(Clone, Debug)]
pub struct Draw {
    /// Noise level of the target, 0..1.
    pub s: f64,
    /// Context, first image and name are dropped together.
    pub dropped: bool,
    /// One-way attention: context does not see targets.
    pub one_way: bool,
    /// The sample's guide is given, where it has one.
    pub guided: bool,
    /// Standard normal noise for every latent.
    pub noise: Vec<f32>,
    /// Target for the clean sample where it is not the sample itself (see [`crate::distill`]).
    pub target: Option<Vec<f32>>,
}

impl Draw {
    /// Draws a level (a share uniform in [0.9, 1], the rest a shifted logistic-normal) and noise.
    #[must_use]
    pub fn new(rng: &mut Rng, values: usize, high_share: f64, shift: f64, drop: f64, one_way: bool) -> Self {
        let s = if rng.chance(high_share) {
            rng.range(0.9, 1.0)
        } else {
            let u = 1.0 / (1.0 + (-rng.normal()).exp());
            shift * u / (1.0 + (shift - 1.0) * u)
        };
        let dropped = rng.chance(drop);
        let noise = (0..values).map(|_| rng.normal() as f32).collect();
        Self { s, dropped, one_way, guided: false, noise, target: None }
    }
}

/// The tape values of one forward pass over a batch.
pub struct Forward<T> {
    /// `[batch, channels, latents, h, w]`.
    pub sample: T,
    /// `[batch, latents, 4]`.
    pub pose: T,
    /// `[batch, latents, tokens, 1]`.
    pub mask: T,
    /// `[batch, latents, tokens, 2]`.
    pub locate: T,
    /// `[batch, latents, tokens, attributes]`.
    pub attributes: Option<T>,
}

/// What the network is given of a batch, computed on the host.
#[derive(Default)]
struct HostBatch {
    /// `[batch, channels, latents, h, w]`.
    latents: Vec<f32>,
    /// Sinusoids of the timesteps, two rows per sample: of what is given, and of what is imagined.
    time: Vec<f32>,
    /// Row of `time` of every latent, `[batch, latents]`.
    rows: Vec<usize>,
    /// Sample of every row of `time`.
    row_batch: Vec<usize>,
    /// Token ids `[batch, text_len]`.
    ids: Vec<usize>,
    /// Camera rays `[batch, latents, tokens, channels]`.
    camera: Vec<f32>,
    /// Carried latents and their trust `[batch, latents, tokens, guide_channels]`.
    guide: Vec<f32>,
    /// Rotary tables `[batch * latents * tokens, head_dim / 2]`: the indices of samples differ, so the entries of the
    /// batch are rows of one longer table.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl HostBatch {
    fn new(model: &HouseModel, samples: &[Sample], draws: &[Draw]) -> Self {
        let (f, cfg) = (model.latents(), &model.dit);
        let hw = cfg.latent_height * cfg.latent_width;
        let (c, context) = (cfg.in_channels, model.layout.context_latents);
        let mut out = Self { latents: vec![0.0f32; samples.len() * c * f * hw], ..Self::default() };
        for (i, (sample, draw)) in samples.iter().zip(draws).enumerate() {
            for t in 0..f {
                let (a, n) = if t <= context {
                    if draw.dropped { (0.0, 1.0) } else { (1.0, 0.0) }
                } else {
                    (1.0 - draw.s as f32, draw.s as f32)
                };
                for ch in 0..c {
                    let from = (t * c + ch) * hw;
                    let to = ((i * c + ch) * f + t) * hw;
                    for p in 0..hw {
                        out.latents[to + p] = a * sample.latents[from + p] + n * draw.noise[from + p];
                    }
                }
                out.rows.push(2 * i + usize::from(t > context));
            }
            out.time.extend(sinusoid(given_timestep(draw), cfg.freq_dim));
            out.time.extend(sinusoid(1000.0 * draw.s, cfg.freq_dim));
            out.row_batch.extend([i, i]);
            if draw.dropped {
                out.ids.push(END);
                out.ids.extend(std::iter::repeat_n(0, sample.ids.len() - 1));
                out.camera.extend(std::iter::repeat_n(0.0, sample.camera.len()));
            } else {
                out.ids.extend_from_slice(&sample.ids);
                out.camera.extend_from_slice(&sample.camera);
            }
            if draw.guided && !draw.dropped && !sample.guide.is_empty() {
                out.guide.extend_from_slice(&sample.guide);
            } else {
                let values = f * cfg.tokens_per_frame() * cfg.guide_channels();
                out.guide.extend(std::iter::repeat_n(0.0, values));
            }
            let (cos, sin) = cfg.rotary_tables(&t_index(model, &sample.context_index));
            out.cos.extend(cos);
            out.sin.extend(sin);
        }
        out
    }
}

/// Timestep of context and first image: 0 as they are given, 1000 where they are dropped for noise.
fn given_timestep(draw: &Draw) -> f64 {
    if draw.dropped { 1000.0 } else { 0.0 }
}

/// Runs the network over a batch of samples with the given draws.
///
/// # Panics
/// When samples do not fit the model.
pub fn forward<A: Autograd>(
    e: &mut A,
    model: &HouseModel,
    samples: &[Sample],
    draws: &[Draw],
) -> Forward<A::Tensor> {
    let (b, f, cfg) = (samples.len(), model.latents(), &model.dit);
    let (c, tokens, context) = (cfg.in_channels, cfg.tokens_per_frame(), model.layout.context_latents);
    let (n, half) = (f * tokens, cfg.head_dim / 2);
    let host = HostBatch::new(model, samples, draws);
    let latents = e.input(&[b, c, f, cfg.latent_height, cfg.latent_width], host.latents);
    let time = e.input(&[2 * b, cfg.freq_dim], host.time);
    let rows = e.index(&[b, f], host.rows);
    let row_batch = e.index(&[2 * b], host.row_batch);
    let text = encode_text(e, model, host.ids);
    let cos = e.input(&[b * n, half], host.cos);
    let sin = e.input(&[b * n, half], host.sin);
    let camera =
        (cfg.camera_channels > 0).then(|| e.input(&[b, f, tokens, cfg.camera_channels], host.camera));
    let guide =
        (cfg.guide_channels() > 0).then(|| e.input(&[b, f, tokens, cfg.guide_channels()], host.guide));
    let bias = draws[0].one_way.then(|| {
        let split = (context + 1) * tokens;
        let values =
            (0..n * n).map(|at| if at / n < split && at % n >= split { -1e9 } else { 0.0 }).collect();
        e.input(&[1, 1, n, n], values)
    });
    let inputs = DitInputs {
        latents: &latents,
        time: &time,
        rows: &rows,
        row_batch: Some(&row_batch),
        text: &text,
        cos: &cos,
        sin: &sin,
        camera: camera.as_ref(),
        guide: guide.as_ref(),
        bias: bias.as_ref(),
        memory: None,
    };
    let out = dit::forward(e, cfg, &inputs);
    let lift = out.lift.expect("the small model has lift heads");
    Forward {
        sample: out.sample,
        pose: lift.pose,
        mask: lift.mask,
        locate: lift.locate,
        attributes: lift.attributes,
    }
}

/// Rows of text of a batch, from ids `[batch, text_len]`, zero-padded.
fn encode_text<A: Autograd>(e: &mut A, model: &HouseModel, ids: Vec<usize>) -> A::Tensor {
    let len = model.dit.text_len;
    let lengths: Vec<usize> =
        ids.chunks_exact(len).map(|row| row.iter().filter(|id| **id != 0).count()).collect();
    let b = lengths.len();
    let ids = e.index(&[b, len], ids);
    let umt5 = model.umt5();
    let (mask_bias, keep) = umt5::host_inputs(&lengths, len);
    let mask_bias = e.input(&[b, 1, 1, len], mask_bias);
    let keep = e.input(&[b, len, 1], keep);
    let buckets = e.index(&[len, len], umt5.bucket_table(len));
    e.set_prefix("text.");
    let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
    let text = umt5::encode(e, &umt5, &inputs).rows;
    e.set_prefix("");
    text
}

/// Temporal index of every latent: context as recorded, targets after the gap.
#[must_use]
pub fn t_index(model: &HouseModel, context: &[usize]) -> Vec<f64> {
    let last = context.last().copied().unwrap_or(0);
    let targets = (0..model.target_latents()).map(|j| (last + model.layout.gap + j) as f64);
    context.iter().map(|i| *i as f64).chain(targets).collect()
}

/// Binary cross-entropy of a logit, and its derivative.
fn bce(logit: f32, target: f32) -> (f32, f32) {
    let p = 1.0 / (1.0 + (-logit).exp());
    let loss = logit.max(0.0) - logit * target + (-logit.abs()).exp().ln_1p();
    (loss, p - target)
}

/// Huber's loss, quadratic within 0.5, and its derivative.
fn huber(d: f32) -> (f32, f32) {
    if d.abs() < 0.5 { (d * d, 2.0 * d) } else { (d.abs() - 0.25, d.signum()) }
}

/// What the lift heads ought to say of one sample.
pub(crate) struct HeadTruth<'a> {
    /// Context latents.
    pub(crate) context: usize,
    /// Of each latent, the base's pose from that of the first image, where it is known.
    pub(crate) poses: Vec<Option<Pose2>>,
    /// Share of each token that shows the thing `[context + 1, tokens]`.
    pub(crate) seen: &'a [f32],
    /// The thing's centre (forward, left; m) from the base at each latent.
    pub(crate) locate: &'a [[f32; 2]],
}

impl HeadTruth<'_> {
    /// Poses of the latents where they are known, got as `[latents, 4]`; not of the first image, whose pose is zero by
    /// definition.
    pub(crate) fn poses(
        &self,
        weights: &HeadWeights,
        share: f32,
        got: &[f32],
        gradient: &mut [f32],
        sum: &mut Losses,
    ) {
        let (f, context) = (self.poses.len(), self.context);
        for (t, pose) in self.poses.iter().enumerate().filter(|(t, _)| *t != context) {
            let Some(p) = pose else { continue };
            let (k, counter) = if t < context {
                (weights.context_pose / context as f32, &mut sum.context_pose)
            } else {
                let last = if t == f - 1 { 3.0 } else { 1.0 };
                (weights.target_pose * last / (f - context + 1) as f32, &mut sum.target_pose)
            };
            let want = [p.x as f32, p.y as f32, p.yaw.cos() as f32, p.yaw.sin() as f32];
            for (j, want) in want.iter().enumerate() {
                let at = t * 4 + j;
                let (loss, g) = huber(got[at] - want);
                *counter += f64::from(loss * k * share);
                gradient[at] = g * k * share;
            }
        }
    }

    /// Mask `[latents, tokens]` on context and first image, and the thing's place `[latents, tokens, 2]` where it is seen.
    pub(crate) fn mask_and_place(
        &self,
        weights: &HeadWeights,
        share: f32,
        (mask, place): (&[f32], &[f32]),
        (g_mask, g_place): (&mut [f32], &mut [f32]),
        sum: &mut Losses,
    ) {
        let (n, tokens) = (self.seen.len(), self.seen.len() / (self.context + 1));
        let on = self.seen.iter().filter(|s| **s >= SEEN_SHARE).count();
        for (at, share_seen) in self.seen.iter().enumerate() {
            let seen = *share_seen >= SEEN_SHARE;
            let k = weights.mask * share / n as f32;
            let (loss, g) = bce(mask[at], f32::from(u8::from(seen)));
            sum.mask += f64::from(loss * k);
            g_mask[at] = g * k;
            if seen {
                let k = weights.locate * share / on as f32;
                for j in 0..2 {
                    let (loss, g) = huber(place[at * 2 + j] - self.locate[at / tokens][j]);
                    sum.locate += f64::from(loss * k);
                    g_place[at * 2 + j] = g * k;
                }
            }
        }
    }
}

/// Outputs of a forward pass with their gradients, and what has been summed so far.
struct LossSums<'a> {
    model: &'a HouseModel,
    weights: &'a LossWeights,
    holes: f32,
    /// One sample's share of a mean.
    share: f32,
    video: &'a [f32],
    pose: &'a [f32],
    mask: &'a [f32],
    locate: &'a [f32],
    attributes: Option<&'a [f32]>,
    g_video: Vec<f32>,
    g_pose: Vec<f32>,
    g_mask: Vec<f32>,
    g_locate: Vec<f32>,
    g_attributes: Vec<f32>,
    sum: Losses,
}

impl LossSums<'_> {
    /// How much each latent pixel counts `[latents, h, w]`, where a guide is given: more where nothing was carried.
    fn counts(&self, sample: &Sample, draw: &Draw) -> Vec<f32> {
        let cfg = &self.model.dit;
        if !draw.guided || draw.dropped || sample.guide.is_empty() {
            return Vec::new();
        }
        let ([_, cols], channels, tokens) = (cfg.grid(), cfg.guide_channels(), cfg.tokens_per_frame());
        let (h, w) = (cfg.latent_height, cfg.latent_width);
        (0..self.model.latents() * h * w)
            .map(|at| {
                let (t, y, x) = (at / (h * w), at / w % h, at % w);
                let token = t * tokens + y / cfg.patch[0] * cols + x / cfg.patch[1];
                1.0 + self.holes * (1.0 - sample.guide[token * channels + channels - 1])
            })
            .collect()
    }

    /// Clean sample or velocity, by configuration; per pixel value of the four images.
    fn video(&mut self, i: usize, sample: &Sample, draw: &Draw) {
        let (f, cfg, context) = (self.model.latents(), &self.model.dit, self.model.layout.context_latents);
        let (c, hw) = (cfg.in_channels, cfg.latent_height * cfg.latent_width);
        let s = draw.s as f32;
        let level = match cfg.prediction {
            Prediction::X0 => 1.0 / s.max(0.5).powi(2),
            Prediction::Velocity => 1.0,
        };
        let values = (f - context - 1) * hw * self.model.codec.block_values();
        let per = self.share * level / values as f32;
        let counts = self.counts(sample, draw);
        let mut loss = 0.0f64;
        for t in context + 1..f {
            for ch in 0..c {
                let from = (t * c + ch) * hw;
                let to = ((i * c + ch) * f + t) * hw;
                for p in 0..hw {
                    let at = from + p;
                    let clean = sample.latents[at];
                    let want = match (&draw.target, cfg.prediction) {
                        (Some(target), Prediction::X0) => target[at],
                        (Some(target), Prediction::Velocity) => {
                            draw.noise[at] + ((1.0 - s) * clean - target[at]) / s
                        }
                        (None, Prediction::X0) => clean,
                        (None, Prediction::Velocity) => draw.noise[at] - clean,
                    };
                    let d = self.video[to + p] - want;
                    let per = per * counts.get(t * hw + p).copied().unwrap_or(1.0);
                    loss += f64::from(d * d * per);
                    self.g_video[to + p] = 2.0 * d * per * self.weights.video;
                }
            }
        }
        self.sum.video += loss;
    }

    /// What the lift heads say of one sample.
    fn heads(&mut self, i: usize, sample: &Sample) {
        let (f, context, tokens) =
            (self.model.latents(), self.model.layout.context_latents, self.model.dit.tokens_per_frame());
        let truth = HeadTruth {
            context,
            poses: (0..f)
                .map(|t| {
                    let known = (t < context || sample.task != Task::Absent) && sample.known.pose(t);
                    known.then(|| sample.pose[t])
                })
                .collect(),
            seen: &sample.seen,
            locate: &sample.locate,
        };
        let (weights, share) = (self.weights.heads(), self.share);
        let at = i * f * 4..(i + 1) * f * 4;
        truth.poses(&weights, share, &self.pose[at.clone()], &mut self.g_pose[at], &mut self.sum);
        if sample.known.dense() && sample.task != Task::Navigate {
            let (one, two) =
                (i * f * tokens..(i + 1) * f * tokens, i * f * tokens * 2..(i + 1) * f * tokens * 2);
            let got = (&self.mask[one.clone()], &self.locate[two.clone()]);
            let gradients = (&mut self.g_mask[one], &mut self.g_locate[two]);
            truth.mask_and_place(&weights, share, got, gradients, &mut self.sum);
        }
    }

    /// Colours and shapes on context tokens.
    fn attributes(&mut self, i: usize, sample: &Sample) {
        let Some(values) = self.attributes else { return };
        let (f, context) = (self.model.latents(), self.model.layout.context_latents);
        let (tokens, a) = (self.model.dit.tokens_per_frame(), self.model.dit.attributes);
        let k = self.weights.attributes * self.share / (context * tokens * a) as f32;
        for j in 0..context * tokens * a {
            let at = i * f * tokens * a + j;
            let (loss, g) = bce(values[at], sample.attributes[j]);
            self.sum.attributes += f64::from(loss * k);
            self.g_attributes[at] = g * k;
        }
    }
}

/// Losses of a forward pass and the gradients of its outputs, as means over `total` samples (those of all
/// threads together).
#[must_use]
pub fn losses<A: Autograd>(
    e: &A,
    model: &HouseModel,
    samples: &[Sample],
    draws: &[Draw],
    out: &Forward<A::Tensor>,
    weights: &LossWeights,
    total: usize,
) -> (Losses, OutputGrads<A::Tensor>) {
    let [video, pose, mask, locate] = [&out.sample, &out.pose, &out.mask, &out.locate].map(|v| e.value(v));
    let attributes = out.attributes.as_ref().map(|v| e.value(v));
    let zeros = |values: &[f32]| vec![0.0f32; values.len()];
    let mut all = LossSums {
        model,
        weights,
        holes: weights.holes,
        share: 1.0 / total as f32,
        video: &video,
        pose: &pose,
        mask: &mask,
        locate: &locate,
        attributes: attributes.as_deref(),
        g_video: zeros(&video),
        g_pose: zeros(&pose),
        g_mask: zeros(&mask),
        g_locate: zeros(&locate),
        g_attributes: attributes.as_deref().map_or_else(Vec::new, zeros),
        sum: Losses::default(),
    };
    for (i, (sample, draw)) in samples.iter().zip(draws).enumerate() {
        if sample.task != Task::Absent {
            all.video(i, sample, draw);
        }
        if draw.dropped {
            continue;
        }
        all.heads(i, sample);
        if sample.known.dense() {
            all.attributes(i, sample);
        }
    }
    let mut sum = all.sum;
    sum.total = f64::from(weights.video) * sum.video
        + sum.mask
        + sum.context_pose
        + sum.target_pose
        + sum.locate
        + sum.attributes;
    let mut grads = vec![
        (out.sample.clone(), all.g_video),
        (out.pose.clone(), all.g_pose),
        (out.mask.clone(), all.g_mask),
        (out.locate.clone(), all.g_locate),
    ];
    if let Some(v) = &out.attributes {
        grads.push((v.clone(), all.g_attributes));
    }
    (sum, grads)
}

/// Fresh weights of a model: `N(0, 1/fan_in)` matrices, zero output layers and modulation, ones for norms.
#[must_use]
pub fn init(model: &HouseModel, seed: u64) -> Params {
    initialise(&collect(model), seed)
}

/// Fresh weights: `N(0, 1/fan_in)` matrices, zero output layers and modulation, ones for norms.
#[must_use]
pub(crate) fn initialise(wanted: &Params, seed: u64) -> Params {
    let mut rng = Rng::new(seed);
    let mut params = Params::new();
    for i in 0..wanted.len() {
        let (name, shape, _) = wanted.get(i);
        let n: usize = shape.iter().product();
        let last = name.rsplit('.').next().unwrap_or_default();
        let norm = name.contains("norm");
        let zero = last == "bias"
            || name == "proj_out.weight"
            || name == "camera_embedding.weight"
            || name.ends_with("lora_B.weight")
            || name.contains("time_proj")
            || name.starts_with("lift.pose")
            || name.starts_with("lift.mask")
            || name.starts_with("lift.locate")
            || name.starts_with("guide.");
        let values = if norm && last == "weight" {
            vec![1.0; n]
        } else if zero {
            vec![0.0; n]
        } else if last == "scale_shift_table" {
            // Gates begin at a small positive value so that every block learns from the first step.
            let (rows, dim) = (shape[1], shape[2]);
            (0..n).map(|i| if rows == 6 && matches!(i / dim, 2 | 5) { 0.3 } else { 0.0 }).collect()
        } else if name.starts_with("text.") {
            (0..n).map(|_| rng.normal() as f32).collect()
        } else {
            let fan: usize = shape[1..].iter().product();
            let k = 1.0 / (fan as f32).sqrt();
            (0..n).map(|_| rng.normal() as f32 * k).collect()
        };
        params.insert(name, shape, values);
    }
    params
}

/// Zeros for every weight that the network asks for.
#[must_use]
pub fn collect(model: &HouseModel) -> Params {
    let (f, cfg) = (model.latents(), &model.dit);
    let values = f * cfg.in_channels * cfg.latent_height * cfg.latent_width;
    let tokens = cfg.tokens_per_frame();
    let sample = Sample {
        task: Task::Ground,
        house_seed: 0,
        latents: vec![0.0; values],
        context_index: (1..=model.layout.context_latents).collect(),
        pose: vec![Pose2::default(); f],
        known: Known::All,
        ids: vec![0; cfg.text_len],
        camera: vec![0.0; f * tokens * cfg.camera_channels],
        seen: vec![0.0; (model.layout.context_latents + 1) * tokens],
        locate: vec![[0.0; 2]; f],
        attributes: vec![0.0; model.layout.context_latents * tokens * cfg.attributes],
        object: 0,
        map_from_start: mindseye_world::Pose2::default(),
        guide: Vec::new(),
    };
    let draw = Draw {
        s: 0.5,
        dropped: false,
        one_way: false,
        guided: false,
        noise: vec![0.0; values],
        target: None,
    };
    let mut e = Eager::collecting();
    forward(&mut e, model, &[sample], &[draw]);
    e.params().clone()
}

/// An interpreter over shared weights.
#[must_use]
pub fn interpreter(params: &Arc<Params>, train: bool) -> Eager {
    Eager::new(params.clone(), train)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Source;
    use mindseye_world::Difficulty;

    fn model() -> HouseModel {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/train/model.toml");
        HouseModel::load(std::path::Path::new(path)).expect("a configuration")
    }

    /// A sample with latents that are all 2, and a draw with noise that is all 5.
    fn stage(dropped: bool) -> (HouseModel, Sample, Draw) {
        let model = model();
        let mut sample = Source::new(&model, Difficulty::plain(), None).sample(1, Task::Navigate, false);
        let cfg = &model.dit;
        let values = model.latents() * cfg.in_channels * cfg.latent_height * cfg.latent_width;
        sample.latents = vec![2.0; values];
        let draw =
            Draw { s: 0.25, dropped, one_way: false, guided: false, noise: vec![5.0; values], target: None };
        (model, sample, draw)
    }

    #[test]
    fn temporal_indices_leave_the_gap() {
        let mut model = model();
        model.layout.gap = 50;
        let targets = model.target_latents();
        let wanted: Vec<f64> = [3.0, 7.0].into_iter().chain((0..targets).map(|j| 57.0 + j as f64)).collect();
        assert_eq!(t_index(&model, &[3, 7]), wanted);
        model.layout.gap = 1;
        assert_eq!(t_index(&model, &[3, 7])[2], 8.0);
        // And they are what positions are rotated by.
        let (model, sample, draw) = stage(false);
        let host = HostBatch::new(&model, std::slice::from_ref(&sample), &[draw]);
        let last = *sample.context_index.last().expect("context") as f64;
        let mut index: Vec<f64> = sample.context_index.iter().map(|i| *i as f64).collect();
        index.extend((0..model.target_latents()).map(|j| last + model.layout.gap as f64 + j as f64));
        assert_eq!((host.cos, host.sin), model.dit.rotary_tables(&index));
    }

    #[test]
    fn context_is_clean_at_time_zero_and_noise_at_time_1000_when_dropped() {
        for dropped in [false, true] {
            let (model, sample, draw) = stage(dropped);
            let host = HostBatch::new(&model, std::slice::from_ref(&sample), std::slice::from_ref(&draw));
            let (freq, given) = (model.dit.freq_dim, if dropped { 1000.0 } else { 0.0 });
            assert_eq!(host.time[..freq], sinusoid(given, freq)[..], "given frames, dropped: {dropped}");
            assert_eq!(host.time[freq..], sinusoid(250.0, freq)[..], "imagined frames");
            let (f, context) = (model.latents(), model.layout.context_latents);
            let rows: Vec<usize> = (0..f).map(|t| usize::from(t > context)).collect();
            assert_eq!((host.rows, host.row_batch), (rows, vec![0, 0]));
            // Context and first image are given as they are or are noise; the rest is mixed by its level.
            let hw = model.dit.latent_height * model.dit.latent_width;
            for (at, v) in host.latents.iter().enumerate() {
                let t = at / hw % f;
                let wanted = match (t <= context, dropped) {
                    (true, false) => 2.0,
                    (true, true) => 5.0,
                    (false, _) => 0.75 * 2.0 + 0.25 * 5.0,
                };
                assert!((v - wanted).abs() < 1e-6, "latent {t}: {v}");
            }
            let rays = host.camera.iter().any(|v| *v != 0.0);
            assert_eq!(rays, !dropped && sample.camera.iter().any(|v| *v != 0.0));
            assert_eq!(host.ids[0], END);
        }
    }

    #[test]
    fn losses_by_hand() {
        let (loss, g) = bce(0.0, 1.0);
        assert!((loss - std::f32::consts::LN_2).abs() < 1e-6 && (g + 0.5).abs() < 1e-6);
        let (loss, g) = bce(3.0f32.ln(), 0.0);
        assert!((loss - 4.0f32.ln()).abs() < 1e-6 && (g - 0.75).abs() < 1e-6);
        assert_eq!(huber(0.2), (0.2 * 0.2, 0.4));
        assert_eq!(huber(-1.0), (0.75, -1.0));
        assert_eq!(huber(2.0), (1.75, 1.0));
        let one = Losses { total: 1.0, video: 2.0, ..Losses::default() };
        let mut sum = one;
        sum.add(&one);
        assert_eq!(sum.scaled(0.5), one);
    }
}
