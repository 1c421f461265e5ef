//! What a training run takes, before anything is trained: parameters, memory of one device, arithmetic, time.
//!
//! The network is run on an interpreter that counts ([`mindseye_engines::count::CountOps`] does the arithmetic) and
//! follows gradients: which values a way back reads, and which products it makes. The rules are those of the libtorch
//! interpreter with bfloat16 products and data parallelism with a sharded optimiser (ZeRO-1):
//!
//! * weights are there in bfloat16; those that are trained have a master, an average and moments in f32, a share of them on
//!   each device, and a gradient in f32 on every device;
//! * products and attention give bfloat16, norms and sums give f32; attention keeps its inputs, its result and one number
//!   per row, and computes its scores again on the way back (2.5 times the products of the way there);
//! * a product keeps its input where its weight is trained, and costs the same again for each of the two gradients that is
//!   wanted;
//! * with checkpoints, what passes between blocks is kept and one block at a time is computed again.
//!
//! What moves between devices, fragmentation, and the library itself (about 1 GB) are not counted. Time is a roofline.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;

use mindseye_engines::count::{CountOps, Counted, Kernels};
use mindseye_engines::model::dit::{DitConfig, DitInputs, forward};
use mindseye_engines::model::{Ops, ParamSpec};
use mindseye_engines::target::{Precision, Target};
use serde::Serialize;

use crate::eager::is_chosen;
use crate::finetune::{adapter_names, is_adapted};
use crate::optim::{OptimConfig, Rule, rule};

/// What is to be trained, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Its denoiser. Latents and text rows are encoded once, before: their networks are in no device's memory.
    pub dit: &'a DitConfig,
    /// Latents of one sample: context, first image, targets.
    pub latents: usize,
    /// Samples per step, over all devices.
    pub batch: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Weights that are trained (see [`is_chosen`]).
    pub only: &'a [String],
    /// Weights among which matrices have a product added (see [`is_chosen`]), and its rank.
    pub adapted: Option<(&'a [String], usize)>,
    /// Optimiser.
    pub optim: &'a OptimConfig,
}

/// Why a run cannot be planned, or does not fit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A target that has no rate for bfloat16 products.
    #[error("{target}: no rate for bf16 in its file: plans are for machines with one")]
    Rate {
        /// The target.
        target: String,
    },
    /// The samples of a step cannot be shared out.
    #[error("--devices {devices}: must divide batch = {batch}")]
    Devices {
        /// Devices asked for.
        devices: u64,
        /// Samples per step.
        batch: u64,
    },
    /// Nothing would be trained.
    #[error("only = {only:?}: no weight of {model} has such a name")]
    Nothing {
        /// The model.
        model: String,
        /// What was chosen.
        only: Vec<String>,
    },
    /// Too large even with checkpoints.
    #[error(
        "{target}: one sample with checkpoints takes {needed:.1} GB of {usable:.1} GB usable on each of {devices} \
         devices ({resident:.1} GB of them weights, gradients and optimiser); train fewer weights (only), shorten the \
         sample, or give more devices"
    )]
    TooLarge {
        /// The target.
        target: String,
        /// Devices.
        devices: u64,
        /// GB needed.
        needed: f64,
        /// GB of them that do not depend on the sample.
        resident: f64,
        /// GB that can be used.
        usable: f64,
    },
}

/// Bytes on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bytes {
    /// All weights in bfloat16.
    pub weights: u64,
    /// Gradients of trained weights, f32.
    pub gradients: u64,
    /// This device's share of masters, averages and moments of trained weights, f32.
    pub optimiser: u64,
    /// Kept for gradients of one sample, everything.
    pub activations: u64,
    /// Kept for gradients of one sample with checkpoints, the block that is computed again included.
    pub checkpointed: u64,
    /// Most intermediate results of one sample that are needed at one moment on the way there.
    pub working: u64,
}

impl Bytes {
    /// What does not depend on the sample.
    #[must_use]
    pub fn resident(&self) -> u64 {
        self.weights + self.gradients + self.optimiser
    }

    /// All that is needed at once, with or without checkpoints.
    #[must_use]
    pub fn peak(&self, checkpoints: bool) -> u64 {
        let kept = if checkpoints { self.checkpointed } else { self.activations };
        self.resident() + kept + self.working
    }
}

/// Products of one sample, FLOP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Products {
    /// The way there.
    pub forward: f64,
    /// Gradients of trained weights.
    pub weights: f64,
    /// Gradients of values.
    pub values: f64,
    /// What checkpoints compute again.
    pub again: f64,
}

impl Products {
    /// All, with or without checkpoints.
    #[must_use]
    pub fn total(&self, checkpoints: bool) -> f64 {
        self.forward + self.weights + self.values + if checkpoints { self.again } else { 0.0 }
    }
}

/// A plan of a run on some devices of a target.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainPlan {
    /// Name of the model.
    pub model: String,
    /// Name of the target.
    pub target: String,
    /// Devices.
    pub devices: u64,
    /// Tokens of one sample.
    pub tokens: u64,
    /// Samples per step, over all devices.
    pub batch: u64,
    /// Passes of one sample per device and step.
    pub passes: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Values of trained weights.
    pub trained: u64,
    /// Values of the other weights.
    pub frozen: u64,
    /// On one device.
    pub bytes: Bytes,
    /// Bytes that can be used there.
    pub usable: u64,
    /// Whether blocks have to be computed again.
    pub checkpoints: bool,
    /// Of one sample.
    pub products: Products,
    /// Seconds of a step at best.
    pub step_seconds: f64,
    /// Days of the run at best.
    pub days: f64,
}

/// Plans a run.
///
/// # Errors
/// [`PlanError`]; what does not fit is refused with the arithmetic.
///
/// # Panics
/// When the denoiser's configuration does not pass [`DitConfig::validate`].
pub fn plan(job: &Job<'_>, target: &Target, devices: u64) -> Result<TrainPlan, PlanError> {
    if devices == 0 || !job.batch.is_multiple_of(devices) {
        return Err(PlanError::Devices { devices, batch: job.batch });
    }
    let walk = walk(job);
    let (mut trained, mut frozen, mut optimiser) = (0u64, 0u64, 0u64);
    for spec in walk.count.params() {
        let n = values(&spec.shape);
        if is_chosen(job.only, &spec.name) {
            let moments = if rule(job.optim, &spec.name, &spec.shape) == Rule::Muon { 1 } else { 2 };
            trained += n;
            optimiser += 4 * n * (2 + moments);
        } else {
            frozen += n;
        }
    }
    if trained == 0 {
        return Err(PlanError::Nothing { model: job.model.to_owned(), only: job.only.to_vec() });
    }
    let (kept, checkpointed) = walk.kept();
    let bytes = Bytes {
        weights: 2 * (trained + frozen),
        gradients: 4 * trained,
        optimiser: optimiser.div_ceil(devices),
        activations: kept,
        checkpointed,
        working: 4 * walk.count.activations(Kernels::Fused),
    };
    let usable = target.usable_bytes();
    let checkpoints = bytes.peak(false) > usable;
    if bytes.peak(true) > usable && checkpoints {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        return Err(PlanError::TooLarge {
            target: target.name.clone(),
            devices,
            needed: gb(bytes.peak(true)),
            resident: gb(bytes.resident()),
            usable: gb(usable),
        });
    }
    let passes = job.batch / devices;
    // Weights are read there and back; optimiser state is read and written once a step.
    let traffic =
        passes as f64 * 2.0 * bytes.weights as f64 + 2.0 * (bytes.gradients + bytes.optimiser) as f64;
    let products = walk.products;
    let flop = passes as f64 * products.total(checkpoints);
    let (step_seconds, _) = target
        .roofline(&[(flop, Precision::Bf16)], traffic)
        .ok_or_else(|| PlanError::Rate { target: target.name.clone() })?;
    Ok(TrainPlan {
        model: job.model.to_owned(),
        target: target.name.clone(),
        devices,
        tokens: (job.latents * job.dit.tokens_per_frame()) as u64,
        batch: job.batch,
        passes,
        steps: job.steps,
        trained,
        frozen,
        bytes,
        usable,
        checkpoints,
        products,
        step_seconds,
        days: step_seconds * job.steps as f64 / 86_400.0,
    })
}

impl TrainPlan {
    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
        let (b, p) = (&self.bytes, &self.products);
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{name:34} {value}");
        };
        line("model", format!("{}: {} trained, {} frozen values", self.model, self.trained, self.frozen));
        line("devices", format!("{} x {}, {} usable on each", self.devices, self.target, gb(self.usable)));
        line(
            "step",
            format!("{} samples of {} tokens, {} passes per device", self.batch, self.tokens, self.passes),
        );
        line("weights (bf16)", gb(b.weights));
        line("gradients (f32)", gb(b.gradients));
        line("masters, average, moments (share)", gb(b.optimiser));
        line("activations kept", gb(b.activations));
        line("activations kept, checkpoints", gb(b.checkpointed));
        line("at work", gb(b.working));
        line("peak", gb(b.peak(false)));
        line("peak, checkpoints", gb(b.peak(true)));
        line("checkpoints", if self.checkpoints { "needed" } else { "not needed" }.to_owned());
        line(
            "products per sample",
            format!(
                "{:.1} TFLOP there, {:.1} + {:.1} back (weights, values), {:.1} again with checkpoints",
                p.forward / 1e12,
                p.weights / 1e12,
                p.values / 1e12,
                p.again / 1e12
            ),
        );
        line("step at best", format!("{:.2} s", self.step_seconds));
        line(
            &format!("{} steps at best", self.steps),
            format!("{:.2} days; at half of it {:.2} days", self.days, 2.0 * self.days),
        );
        out
    }
}

/// A value and whether a gradient passes through it.
#[derive(Clone, Debug)]
struct Value {
    counted: Counted,
    /// The memory that it is, or is a view of; none for weights.
    memory: Option<usize>,
    needs: bool,
    wide: bool,
    /// A weight that has a product added: its name and the product's rank.
    adapter: Option<(String, usize)>,
}

/// Bytes of one value of a tensor.
fn width(wide: bool) -> u64 {
    if wide { 4 } else { 2 }
}

fn values(shape: &[usize]) -> u64 {
    shape.iter().map(|n| *n as u64).product()
}

/// The interpreter that follows gradients.
struct Walk<'a> {
    count: CountOps,
    only: &'a [String],
    adapted: Option<(&'a [String], usize)>,
    products: Products,
    /// Block in which each memory was made.
    made_in: Vec<usize>,
    block: usize,
    /// What the way back reads: (memory, wide) and its bytes, by the block that reads it.
    kept: Vec<HashMap<(usize, bool), u64>>,
    /// What passes between blocks: bytes by memory.
    between: BTreeMap<usize, u64>,
    /// FLOP of products before the last operation, and before this block.
    before: f64,
    block_began: f64,
}

fn walk<'a>(job: &Job<'a>) -> Walk<'a> {
    let cfg = job.dit;
    let mut w = Walk {
        count: CountOps::new(),
        only: job.only,
        adapted: job.adapted,
        products: Products::default(),
        made_in: Vec::new(),
        block: 0,
        kept: vec![HashMap::new()],
        between: BTreeMap::new(),
        before: 0.0,
        block_began: 0.0,
    };
    let tokens = cfg.tokens_per_frame();
    let (latents, time) = (
        w.input(&[1, cfg.in_channels, job.latents, cfg.latent_height, cfg.latent_width]),
        w.input(&[2, cfg.freq_dim]),
    );
    let (rows, row_batch) = (w.count.index(&[1, job.latents]), w.count.index(&[2]));
    let text = w.input(&[1, cfg.text_len, cfg.text_dim]);
    let table = [job.latents * tokens, cfg.head_dim / 2];
    let (cos, sin) = (w.input(&table), w.input(&table));
    let beside = |w: &mut Walk<'_>, n: usize| (n > 0).then(|| w.input(&[1, job.latents, tokens, n]));
    let (camera, guide) = (beside(&mut w, cfg.camera_channels), beside(&mut w, cfg.guide_channels()));
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
        bias: None,
        memory: None,
    };
    forward(&mut w, cfg, &inputs);
    w.products.forward = w.count.flops().products();
    w
}

impl Walk<'_> {
    fn input(&mut self, shape: &[usize]) -> Value {
        let counted = self.count.input(shape);
        self.made(counted, &[], true)
    }

    /// A result in memory of its own.
    fn made(&mut self, counted: Counted, from: &[&Value], wide: bool) -> Value {
        for x in from {
            self.reads(x);
        }
        self.made_in.push(self.block);
        let memory = Some(self.made_in.len() - 1);
        Value { counted, memory, needs: from.iter().any(|x| x.needs), wide, adapter: None }
    }

    fn view(&self, counted: Counted, x: &Value) -> Value {
        Value { counted, ..x.clone() }
    }

    /// What another block made passes into this one.
    fn reads(&mut self, x: &Value) {
        if let Some(memory) = x.memory
            && self.made_in[memory] != self.block
        {
            let bytes = width(x.wide) * values(&x.counted);
            let most = self.between.entry(memory).or_default();
            *most = bytes.max(*most);
        }
    }

    /// The way back reads this value, as it is or in another width.
    fn keep(&mut self, x: &Value, wide: bool) {
        if let Some(memory) = x.memory {
            let bytes = width(wide) * values(&x.counted);
            let most = self.kept[self.block].entry((memory, wide)).or_default();
            *most = bytes.max(*most);
        }
    }

    /// A product with a weight or of two values.
    fn product(&mut self, a: &Value, b: &Value, flop: f64) {
        if b.needs {
            self.keep(a, false);
        }
        if a.needs {
            self.keep(b, false);
        }
        for x in [a, b].into_iter().filter(|x| x.needs) {
            if x.memory.is_none() { self.products.weights += flop } else { self.products.values += flop }
        }
    }

    /// FLOP of products since the last call.
    fn flop(&mut self) -> f64 {
        let now = self.count.flops().products();
        now - std::mem::replace(&mut self.before, now)
    }

    /// Bytes that are kept without and with checkpoints.
    fn kept(&self) -> (u64, u64) {
        // What two blocks read is there once.
        let mut seen = HashSet::new();
        let all = self.kept.iter().flatten().filter(|(key, _)| seen.insert(**key)).map(|(_, n)| n).sum();
        let largest = self.kept.iter().map(|block| block.values().sum::<u64>()).max().unwrap_or(0);
        (all, self.between.values().sum::<u64>() + largest)
    }
}

impl Ops for Walk<'_> {
    type Tensor = Value;
    type Index = Vec<usize>;

    fn param(&mut self, name: &str, shape: &[usize]) -> Value {
        let counted = self.count.param(name, shape);
        let spec = ParamSpec { name: name.to_owned(), shape: shape.to_vec() };
        let adapter = self.adapted.filter(|(only, _)| is_adapted(only, &spec) && !name.contains(".lora_"));
        let adapter = adapter.map(|(_, rank)| (spec.name, rank));
        Value { counted, memory: None, needs: is_chosen(self.only, name), wide: true, adapter }
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> Value {
        let counted = self.count.constant(shape, data);
        self.made(counted, &[], true)
    }

    fn add(&mut self, a: &Value, b: &Value) -> Value {
        let counted = self.count.add(&a.counted, &b.counted);
        self.made(counted, &[a, b], true)
    }

    fn sub(&mut self, a: &Value, b: &Value) -> Value {
        self.add(a, b)
    }

    fn mul(&mut self, a: &Value, b: &Value) -> Value {
        if b.needs {
            self.keep(a, a.wide);
        }
        if a.needs {
            self.keep(b, b.wide);
        }
        let counted = self.count.mul(&a.counted, &b.counted);
        self.made(counted, &[a, b], true)
    }

    fn scale(&mut self, x: &Value, k: f32) -> Value {
        let counted = self.count.scale(&x.counted, k);
        self.made(counted, &[x], x.wide)
    }

    fn offset(&mut self, x: &Value, k: f32) -> Value {
        let counted = self.count.offset(&x.counted, k);
        self.made(counted, &[x], x.wide)
    }

    fn linear(&mut self, x: &Value, w: &Value, b: Option<&Value>) -> Value {
        let counted = self.count.linear(&x.counted, &w.counted, b.map(|b| &b.counted));
        let flop = self.flop();
        self.product(x, w, flop);
        let from: Vec<&Value> = [x, w].into_iter().chain(b).collect();
        let y = self.made(counted, &from, false);
        let Some((name, rank)) = &w.adapter else { return y };
        let [down, up] = adapter_names(name);
        let down = self.param(&down, &[*rank, w.counted[1]]);
        let up = self.param(&up, &[w.counted[0], *rank]);
        let low = self.linear(x, &down, None);
        let low = self.linear(&low, &up, None);
        let low = self.scale(&low, 1.0);
        self.add(&y, &low)
    }

    fn matmul(&mut self, a: &Value, b: &Value) -> Value {
        let counted = self.count.matmul(&a.counted, &b.counted);
        let flop = self.flop();
        self.product(a, b, flop);
        self.made(counted, &[a, b], false)
    }

    fn reshape(&mut self, x: &Value, dims: &[i64]) -> Value {
        let counted = self.count.reshape(&x.counted, dims);
        self.view(counted, x)
    }

    fn permute(&mut self, x: &Value, perm: &[usize]) -> Value {
        let counted = self.count.permute(&x.counted, perm);
        self.view(counted, x)
    }

    fn concat(&mut self, xs: &[Value], axis: usize) -> Value {
        let parts: Vec<Counted> = xs.iter().map(|x| x.counted.clone()).collect();
        let counted = self.count.concat(&parts, axis);
        self.made(counted, &xs.iter().collect::<Vec<_>>(), xs.iter().any(|x| x.wide))
    }

    fn slice(&mut self, x: &Value, axis: usize, start: i64, end: Option<i64>) -> Value {
        let counted = self.count.slice(&x.counted, axis, start, end);
        self.view(counted, x)
    }

    fn gather(&mut self, table: &Value, index: &Vec<usize>) -> Value {
        let counted = self.count.gather(&table.counted, index);
        self.made(counted, &[table], table.wide)
    }

    fn softmax(&mut self, x: &Value) -> Value {
        let counted = self.count.softmax(&x.counted);
        let out = self.made(counted, &[x], true);
        if x.needs {
            self.keep(&out, true);
        }
        out
    }

    fn layer_norm(&mut self, x: &Value, eps: f32) -> Value {
        if x.needs {
            self.keep(x, true);
        }
        let counted = self.count.layer_norm(&x.counted, eps);
        self.made(counted, &[x], true)
    }

    fn rms_norm(&mut self, x: &Value, weight: &Value, eps: f32) -> Value {
        if x.needs || weight.needs {
            self.keep(x, true);
        }
        let counted = self.count.rms_norm(&x.counted, &weight.counted, eps);
        self.made(counted, &[x, weight], true)
    }

    fn channel_norm(&mut self, x: &Value, gamma: &Value, channels: usize) -> Value {
        if x.needs || gamma.needs {
            self.keep(x, true);
        }
        let counted = self.count.channel_norm(&x.counted, &gamma.counted, channels);
        self.made(counted, &[x, gamma], true)
    }

    fn mean(&mut self, x: &Value, axis: usize) -> Value {
        let counted = self.count.mean(&x.counted, axis);
        self.made(counted, &[x], true)
    }

    fn gelu_tanh(&mut self, x: &Value) -> Value {
        if x.needs {
            self.keep(x, x.wide);
        }
        let counted = self.count.gelu_tanh(&x.counted);
        self.made(counted, &[x], x.wide)
    }

    fn silu(&mut self, x: &Value) -> Value {
        if x.needs {
            self.keep(x, x.wide);
        }
        let counted = self.count.silu(&x.counted);
        self.made(counted, &[x], x.wide)
    }

    fn conv2d(
        &mut self,
        x: &Value,
        w: &Value,
        b: Option<&Value>,
        stride: [usize; 2],
        pads: [usize; 4],
    ) -> Value {
        let counted = self.count.conv2d(&x.counted, &w.counted, b.map(|b| &b.counted), stride, pads);
        let flop = self.flop();
        self.product(x, w, flop);
        let from: Vec<&Value> = [x, w].into_iter().chain(b).collect();
        self.made(counted, &from, false)
    }

    fn upsample2(&mut self, x: &Value) -> Value {
        let counted = self.count.upsample2(&x.counted);
        self.made(counted, &[x], x.wide)
    }

    fn rotate(&mut self, x: &Value, cos: &Value, sin: &Value, heads: usize, head_dim: usize) -> Value {
        let counted = self.count.rotate(&x.counted, &cos.counted, &sin.counted, heads, head_dim);
        self.made(counted, &[x, cos, sin], true)
    }

    fn attention(
        &mut self,
        q: &Value,
        k: &Value,
        v: &Value,
        scale: f32,
        bias: Option<&Value>,
        heads: usize,
        head_dim: usize,
    ) -> Value {
        let bias_counted = bias.map(|b| &b.counted);
        let rows = values(&[q.counted[0], q.counted[1], heads]);
        let counted =
            self.count.attention(&q.counted, &k.counted, &v.counted, scale, bias_counted, heads, head_dim);
        let flop = self.flop();
        let from: Vec<&Value> = [q, k, v].into_iter().chain(bias).collect();
        let out = self.made(counted, &from, false);
        if out.needs {
            // Scores again, then four products for the gradients of scores, queries, keys and values.
            self.products.values += 2.5 * flop;
            [q, k, v, &out].into_iter().for_each(|x| self.keep(x, false));
            if let Some(memory) = out.memory {
                // One number per row beside its result.
                self.kept[self.block].insert((memory, true), 4 * rows);
            }
        }
        out
    }

    fn gated_add(&mut self, x: &Value, y: &Value, gate: &Value) -> Value {
        if gate.needs {
            self.keep(y, true);
        }
        if y.needs {
            self.keep(gate, true);
        }
        let counted = self.count.gated_add(&x.counted, &y.counted, &gate.counted);
        self.made(counted, &[x, y, gate], true)
    }

    fn mark(&mut self, name: &str, x: &Value) {
        if name.ends_with(".out") {
            // A block through which no gradient passes is not computed again.
            let now = self.count.flops().products();
            if x.needs {
                self.products.again += now - self.block_began;
            }
            self.block_began = now;
            self.block += 1;
            self.kept.push(HashMap::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::FineTuneConfig;
    use mindseye_engines::count::count_denoiser;
    use mindseye_engines::model::dit::Prediction;

    fn dit() -> DitConfig {
        DitConfig {
            in_channels: 4,
            out_channels: 4,
            latent_height: 2,
            latent_width: 4,
            patch: [2, 2],
            heads: 2,
            head_dim: 12,
            layers: 3,
            ffn_dim: 40,
            text_dim: 16,
            text_len: 6,
            freq_dim: 16,
            eps: 1e-6,
            rope_theta: 1e4,
            prediction: Prediction::Velocity,
            camera_channels: 0,
            pooled_text: false,
            lift: false,
            attributes: 0,
            guide: None,
        }
    }

    fn optim(muon: bool) -> OptimConfig {
        OptimConfig { lr: 1e-4, weight_decay: 0.0, momentum: 0.95, betas: [0.9, 0.99], clip: 1.0, muon }
    }

    fn job<'a>(dit: &'a DitConfig, only: &'a [String], optim: &'a OptimConfig) -> Job<'a> {
        Job { model: "tiny", dit, latents: 5, batch: 16, steps: 1000, only, adapted: None, optim }
    }

    #[test]
    fn arithmetic_is_that_of_the_counting_interpreter_and_its_derivatives() {
        let (dit, optim, target) = (dit(), optim(false), Target::named("h100").expect("it is there"));
        let count = count_denoiser(&dit, 5, 0, 2);
        let flops = count.flops();
        let got = plan(&job(&dit, &[], &optim), &target, 8).expect("it fits");
        assert_eq!(got.trained, count.parameters());
        assert_eq!((got.frozen, got.tokens, got.passes), (0, 5 * 2, 2));
        let p = got.products;
        assert_eq!(p.forward, flops.products());
        // Every weight is trained: each product with one again for its gradient.
        assert_eq!(p.weights, flops.linear);
        // Inputs have no gradient: not the patches, the text rows and the sinusoids.
        let (d, inputs) = (dit.dim() as f64, 10.0 * 16.0 + 6.0 * 16.0 + 2.0 * 16.0);
        let values = flops.linear - 2.0 * d * inputs + 2.5 * flops.attention;
        assert!((p.values - values).abs() < 1e-6 * values, "{} {values}", p.values);
        // The head, after the last block, is not computed again.
        let head = 2.0 * 10.0 * d * 16.0;
        assert!((p.again - (p.forward - head)).abs() < 1e-6 * head, "{} {}", p.again, p.forward);
        let seconds = 2.0 * p.total(false) / 989e12;
        let traffic =
            (2.0 * 2.0 * 2.0 * got.trained as f64 + 2.0 * (4.0 + 2.0) * got.trained as f64) / 3350e9;
        assert!((got.step_seconds - seconds.max(traffic)).abs() < 1e-3 * got.step_seconds);
        assert!((got.days - got.step_seconds * 1000.0 / 86_400.0).abs() < 1e-12);
    }

    #[test]
    fn memory_by_hand() {
        let (dit, target) = (dit(), Target::named("h100").expect("it is there"));
        let n = count_denoiser(&dit, 5, 0, 2).parameters();
        let all = plan(&job(&dit, &[], &optim(false)), &target, 4).expect("it fits");
        assert_eq!((all.bytes.weights, all.bytes.gradients), (2 * n, 4 * n));
        assert_eq!(all.bytes.optimiser, 4 * n, "master, average and two moments, of which a quarter is here");
        // Attention of the last block alone: way back through the norms and the feed-forward of that block only.
        let only = ["blocks.2.attn1.to_v".to_owned()];
        let optim = optim(true);
        let one = plan(&job(&dit, &only, &optim), &target, 1).expect("it fits");
        let d = dit.dim() as u64;
        assert_eq!(one.trained, d * d + d);
        // Muon's matrix has one moment, the bias two.
        assert_eq!(one.bytes.optimiser, 4 * (3 * d * d + 4 * d));
        let t = 10; // tokens
        let text = 6;
        let heads = 2;
        let kept = [
            2 * t * d,                  // input of to_v
            2 * 4 * t * d,              // q, k, v and result of attention
            4 * t * heads,              // one number per row
            4 * 5 * d,                  // gate of attention (rows of five frames)
            4 * t * d,                  // before the norm of cross-attention
            4 * t * d,                  // before the norm of its queries
            2 * (2 * t + 2 * text) * d, // q, k, v and result of cross-attention
            4 * t * heads,              // one number per row
            4 * t * d,                  // before the feed-forward's norm
            4 * 5 * d,                  // 1 + scale
            2 * t * 40,                 // before gelu
            4 * 5 * d,                  // gate
            4 * t * d,                  // before the head's norm
            4 * 5 * d,                  // 1 + scale
        ];
        assert_eq!(one.bytes.activations, kept.iter().sum::<u64>());
        assert!(one.bytes.checkpointed >= one.bytes.activations);
        assert_eq!(one.products.weights, 2.0 * (t * d * d) as f64);
    }

    #[test]
    fn heads_and_products_of_low_rank_are_counted() {
        let (dit, optim, target) = (dit(), optim(false), Target::named("h100").expect("it is there"));
        let dit = DitConfig { lift: true, ..dit };
        let (chosen, only) = (["attn1.to_q".to_owned()], [".lora_".to_owned(), "lift.".to_owned()]);
        let (t, d, rank) = (10.0, dit.dim() as f64, 3);
        let heads = 2 * (dit.dim() * dit.dim() + dit.dim()) + 7 * (dit.dim() + 1);
        let job = Job { adapted: Some((&chosen, rank)), ..job(&dit, &only, &optim) };
        let got = plan(&job, &target, 1).expect("it fits");
        let added = dit.layers * rank * 2 * dit.dim();
        assert_eq!(got.trained, (heads + added) as u64);
        assert_eq!(got.frozen, count_denoiser(&dit, 5, 0, 2).parameters() - heads as u64);
        // Gradients of weights: the heads' products, and those that were added.
        let of_heads = 2.0 * (t * d * d + 3.0 * t * d + 5.0 * (d * d + 4.0 * d));
        let of_added = dit.layers as f64 * 2.0 * t * 2.0 * rank as f64 * d;
        assert!((got.products.weights - of_heads - of_added).abs() < 1.0, "{}", got.products.weights);
    }

    /// The plans of docs/training.md.
    fn documented() -> String {
        let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut out = String::new();
        for (config, target, devices) in [
            ("wan22-5b-ground", "h100", 1),
            ("wan22-5b-ground", "h100", 8),
            ("wan22-5b-ground", "a100", 8),
            ("wan22-5b-navigate", "h100", 8),
            ("wan22-5b-heads", "h100", 1),
        ] {
            let path = repository.join(format!("configs/train/{config}.toml"));
            let (config_, model) = FineTuneConfig::load(&path).expect("it is shipped");
            let target_ = Target::named(target).expect("it is there");
            out += &format!(
                "\n    mindseye-tools train configs/train/{config}.toml --plan --target {target} --devices {devices}\n\n"
            );
            match plan(&config_.job(&model), &target_, devices) {
                Ok(plan) => plan.table().lines().for_each(|line| out += &format!("    {line}\n")),
                Err(error) => out += &format!("    error: {error}\n"),
            }
        }
        out
    }

    #[test]
    fn the_documented_training_plans_are_those_of_the_program() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/training.md");
        let text = std::fs::read_to_string(&path).expect("it is there");
        let (head, _) = text.split_once("\n## Plans\n").expect("a heading");
        let wanted = format!("{head}\n## Plans\n{}", documented());
        if std::env::var_os("MINDSEYE_WRITE_DOCS").is_some() {
            std::fs::write(&path, &wanted).expect("it is written");
        }
        let now = std::fs::read_to_string(&path).expect("it is there");
        assert!(now == wanted, "docs/training.md is old: run docs/plans.sh");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_arithmetic() {
        let (dit, optim) = (dit(), optim(false));
        let target = Target::named("h100").expect("it is there");
        let refused = |job: &Job<'_>, target: &Target, devices: u64| {
            plan(job, target, devices).expect_err("refused").to_string()
        };
        assert!(refused(&job(&dit, &[], &optim), &target, 3).contains("--devices 3: must divide batch = 16"));
        let only = ["attention".to_owned()];
        assert!(refused(&job(&dit, &only, &optim), &target, 1).contains("no weight of tiny"));
        let cpu = Target::named("cpu").expect("it is there");
        let said = refused(&job(&dit, &[], &optim), &cpu, 1);
        assert!(said.contains("no rate for bf16"), "{said}");
        let whole = plan(&job(&dit, &[], &optim), &target, 1).expect("it fits");
        // Between the two peaks checkpoints are needed; below both it is refused.
        let small = |bytes: u64| Target { memory_bytes: bytes, reserved_bytes: 0, ..target.clone() };
        let (most, least) = (whole.bytes.peak(false), whole.bytes.peak(true));
        assert!(least < most && !whole.checkpoints);
        let between = plan(&job(&dit, &[], &optim), &small(least), 1).expect("with checkpoints");
        assert!(between.checkpoints && between.products == whole.products);
        let said = refused(&job(&dit, &[], &optim), &small(least - 1), 1);
        assert!(said.contains("h100: one sample with checkpoints takes") && said.contains("only"), "{said}");
    }
}
