//! The small model as one differentiable function: text rows, denoiser, lift heads, and their losses.

use std::sync::Arc;

use mindseye_engines::denoise::sinusoid;
use mindseye_engines::model::dit::{self, DitInputs, Prediction};
use mindseye_engines::model::umt5::{self, Umt5Inputs};
use mindseye_world::Rng;

use crate::data::{Known, SEEN_SHARE, Sample, Task};
use crate::eager::{Eager, Params, Var};
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
        self.total += o.total;
        self.video += o.video;
        self.mask += o.mask;
        self.context_pose += o.context_pose;
        self.target_pose += o.target_pose;
        self.locate += o.locate;
        self.attributes += o.attributes;
    }

    /// Multiplies all.
    #[must_use]
    pub fn scaled(&self, k: f64) -> Self {
        Self {
            total: self.total * k,
            video: self.video * k,
            mask: self.mask * k,
            context_pose: self.context_pose * k,
            target_pose: self.target_pose * k,
            locate: self.locate * k,
            attributes: self.attributes * k,
        }
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
    /// Standard normal noise for every latent.
    pub noise: Vec<f32>,
    /// What the clean sample should be said to be, where that is not the sample itself (see [`crate::distill`]).
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
        Self { s, dropped, one_way, noise, target: None }
    }
}

/// The tape values of one forward pass over a batch.
pub struct Forward {
    /// `[batch, channels, latents, h, w]`.
    pub sample: Var,
    /// `[batch, latents, 4]`.
    pub pose: Var,
    /// `[batch, latents, tokens, 1]`.
    pub mask: Var,
    /// `[batch, latents, tokens, 2]`.
    pub locate: Var,
    /// `[batch, latents, tokens, attributes]`.
    pub attributes: Option<Var>,
}

/// Runs the network over a batch of samples with the given draws.
///
/// # Panics
/// When samples do not fit the model.
pub fn forward(e: &mut Eager, model: &HouseModel, samples: &[Sample], draws: &[Draw]) -> Forward {
    let (b, f, cfg) = (samples.len(), model.latents(), &model.dit);
    let hw = cfg.latent_height * cfg.latent_width;
    let (c, tokens, context) = (cfg.in_channels, cfg.tokens_per_frame(), model.layout.context_latents);
    let mut latents = vec![0.0f32; b * c * f * hw];
    let (mut rows, mut time, mut row_batch) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ids, mut keep) = (Vec::new(), Vec::new());
    let mut camera = Vec::new();
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
                    latents[to + p] = a * sample.latents[from + p] + n * draw.noise[from + p];
                }
            }
            rows.push(2 * i + usize::from(t > context));
        }
        let clean = if draw.dropped { 1000.0 } else { 0.0 };
        time.extend(sinusoid(clean, cfg.freq_dim));
        time.extend(sinusoid(1000.0 * draw.s, cfg.freq_dim));
        row_batch.extend([i, i]);
        let mut own = sample.ids.clone();
        if draw.dropped {
            own.fill(0);
            own[0] = END;
        }
        keep.extend(own.iter().map(|id| if *id == 0 { 0.0 } else { 1.0 }));
        ids.extend(own);
        if draw.dropped {
            camera.extend(std::iter::repeat_n(0.0, sample.camera.len()));
        } else {
            camera.extend_from_slice(&sample.camera);
        }
    }
    // All samples of a batch share one rotary table only when their indices agree; they do not, so rotate by
    // tables of the whole batch: batch entries are rows of one longer table.
    let n = f * tokens;
    let half = cfg.head_dim / 2;
    let (mut cos, mut sin) = (Vec::with_capacity(b * n * half), Vec::with_capacity(b * n * half));
    for sample in samples {
        let (x, y) = cfg.rotary_tables(&t_index(model, &sample.context_index));
        cos.extend(x);
        sin.extend(y);
    }
    let latents = e.input(&[b, c, f, cfg.latent_height, cfg.latent_width], latents);
    let time = e.input(&[2 * b, cfg.freq_dim], time);
    let rows = e.index(&[b, f], rows);
    let row_batch = e.index(&[2 * b], row_batch);
    let ids = e.index(&[b, cfg.text_len], ids);
    let lengths: Vec<usize> =
        keep.chunks_exact(cfg.text_len).map(|k| k.iter().filter(|v| **v > 0.0).count()).collect();
    let umt5 = model.umt5();
    let (mask_bias, keep) = umt5::host_inputs(&lengths, cfg.text_len);
    let mask_bias = e.input(&[b, 1, 1, cfg.text_len], mask_bias);
    let keep = e.input(&[b, cfg.text_len, 1], keep);
    let buckets = e.index(&[cfg.text_len, cfg.text_len], umt5.bucket_table(cfg.text_len));
    e.set_prefix("text.");
    let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
    let text = umt5::encode(e, &umt5, &inputs).rows;
    e.set_prefix("");
    let cos = e.input(&[b * n, half], cos);
    let sin = e.input(&[b * n, half], sin);
    let camera = (cfg.camera_channels > 0).then(|| e.input(&[b, f, tokens, cfg.camera_channels], camera));
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

/// Temporal index of every latent: context as recorded, targets after the gap.
#[must_use]
pub fn t_index(model: &HouseModel, context: &[usize]) -> Vec<f64> {
    let last = context.last().copied().unwrap_or(0);
    let targets = (0..model.target_latents()).map(|j| (last + model.layout.gap + j) as f64);
    context.iter().map(|i| *i as f64).chain(targets).collect()
}

fn bce(logit: f32, target: f32) -> (f32, f32) {
    let p = 1.0 / (1.0 + (-logit).exp());
    let loss = logit.max(0.0) - logit * target + (-logit.abs()).exp().ln_1p();
    (loss, p - target)
}

/// Losses of a forward pass and the gradients of its outputs, as means over `total` samples (those of all
/// threads together).
#[must_use]
pub fn losses(
    e: &Eager,
    model: &HouseModel,
    samples: &[Sample],
    draws: &[Draw],
    out: &Forward,
    weights: &LossWeights,
    total: usize,
) -> (Losses, Vec<(Var, Vec<f32>)>) {
    let (f, cfg) = (model.latents(), &model.dit);
    let hw = cfg.latent_height * cfg.latent_width;
    let (c, tokens, context) = (cfg.in_channels, cfg.tokens_per_frame(), model.layout.context_latents);
    let grab = |v: Var| e.value(v).1;
    let (video, pose, mask, locate) = (grab(out.sample), grab(out.pose), grab(out.mask), grab(out.locate));
    let attributes = out.attributes.map(grab);
    let mut g_video = vec![0.0f32; video.len()];
    let mut g_pose = vec![0.0f32; pose.len()];
    let mut g_mask = vec![0.0f32; mask.len()];
    let mut g_locate = vec![0.0f32; locate.len()];
    let mut g_attr = vec![0.0f32; attributes.map_or(0, <[f32]>::len)];
    let mut sum = Losses::default();
    let share = 1.0 / total as f32;
    for (i, (sample, draw)) in samples.iter().zip(draws).enumerate() {
        // Video: clean sample or velocity, by configuration; per pixel value of the four images.
        if sample.task != Task::Absent {
            let s = draw.s as f32;
            let level = match cfg.prediction {
                Prediction::X0 => 1.0 / s.max(0.5).powi(2),
                Prediction::Velocity => 1.0,
            };
            let per = share * level / ((f - context - 1) * hw * model.codec.block_values()) as f32;
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
                        let d = video[to + p] - want;
                        loss += f64::from(d * d * per);
                        g_video[to + p] = 2.0 * d * per * weights.video;
                    }
                }
            }
            sum.video += loss;
        }
        if draw.dropped {
            continue;
        }
        // Poses.
        for t in 0..f {
            if t == context || (t > context && sample.task == Task::Absent) || !sample.known.pose(t) {
                continue;
            }
            let (k, counter) = if t < context {
                (weights.context_pose / context as f32, &mut sum.context_pose)
            } else {
                let last = if t == f - 1 { 3.0 } else { 1.0 };
                (weights.target_pose * last / (f - context + 1) as f32, &mut sum.target_pose)
            };
            let p = &sample.pose[t];
            let want = [p.x as f32, p.y as f32, p.yaw.cos() as f32, p.yaw.sin() as f32];
            for (j, want) in want.iter().enumerate() {
                let at = (i * f + t) * 4 + j;
                let d = pose[at] - want;
                *counter += f64::from(d * d * k * share);
                g_pose[at] = 2.0 * d * k * share;
            }
        }
        // Mask, place, attributes.
        if !sample.known.dense() {
            continue;
        }
        if sample.task != Task::Navigate {
            let n = (context + 1) * tokens;
            let on = sample.seen.iter().filter(|s| **s >= SEEN_SHARE).count();
            for t in 0..=context {
                for p in 0..tokens {
                    let at = (i * f + t) * tokens + p;
                    let seen = sample.seen[t * tokens + p] >= SEEN_SHARE;
                    let k = weights.mask * share / n as f32;
                    let (loss, g) = bce(mask[at], f32::from(u8::from(seen)));
                    sum.mask += f64::from(loss * k);
                    g_mask[at] = g * k;
                    if seen {
                        let k = weights.locate * share / on as f32;
                        for j in 0..2 {
                            // Huber, quadratic within 0.5 m.
                            let d = locate[at * 2 + j] - sample.locate[t][j];
                            let (loss, g) =
                                if d.abs() < 0.5 { (d * d, 2.0 * d) } else { (d.abs() - 0.25, d.signum()) };
                            sum.locate += f64::from(loss * k);
                            g_locate[at * 2 + j] = g * k;
                        }
                    }
                }
            }
        }
        if let Some(values) = attributes {
            let a = cfg.attributes;
            let k = weights.attributes * share / (context * tokens * a) as f32;
            for j in 0..context * tokens * a {
                let at = i * f * tokens * a + j;
                let (loss, g) = bce(values[at], sample.attributes[j]);
                sum.attributes += f64::from(loss * k);
                g_attr[at] = g * k;
            }
        }
    }
    sum.total = f64::from(weights.video) * sum.video
        + sum.mask
        + sum.context_pose
        + sum.target_pose
        + sum.locate
        + sum.attributes;
    let mut grads =
        vec![(out.sample, g_video), (out.pose, g_pose), (out.mask, g_mask), (out.locate, g_locate)];
    if let Some(v) = out.attributes {
        grads.push((v, g_attr));
    }
    (sum, grads)
}

/// Fresh weights: `N(0, 1/fan_in)` matrices, zero output layers and modulation, ones for norms.
#[must_use]
pub fn init(model: &HouseModel, seed: u64) -> Params {
    let mut rng = Rng::new(seed);
    let mut params = Params::new();
    let wanted = collect(model);
    for i in 0..wanted.len() {
        let (name, shape, _) = wanted.get(i);
        let n: usize = shape.iter().product();
        let last = name.rsplit('.').next().unwrap_or_default();
        let norm = name.contains("norm");
        let zero = last == "bias"
            || name == "proj_out.weight"
            || name == "camera_embedding.weight"
            || name.contains("time_proj")
            || name.starts_with("lift.pose")
            || name.starts_with("lift.mask")
            || name.starts_with("lift.locate");
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
        pose: vec![mindseye_world::Pose2::default(); f],
        known: Known::All,
        ids: vec![0; cfg.text_len],
        camera: vec![0.0; f * tokens * cfg.camera_channels],
        seen: vec![0.0; (model.layout.context_latents + 1) * tokens],
        locate: vec![[0.0; 2]; f],
        attributes: vec![0.0; model.layout.context_latents * tokens * cfg.attributes],
        object: 0,
        map_from_start: mindseye_world::Pose2::default(),
    };
    let draw = Draw { s: 0.5, dropped: false, one_way: false, noise: vec![0.0; values], target: None };
    let mut e = Eager::collecting();
    forward(&mut e, model, &[sample], &[draw]);
    e.params().clone()
}

/// An interpreter over shared weights.
#[must_use]
pub fn interpreter(params: &Arc<Params>, train: bool) -> Eager {
    Eager::new(params.clone(), train)
}
