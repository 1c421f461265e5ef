//! What an engine will weigh and how fast it can be at best, before anything is built.
//!
//! Work is counted from the sizes of the networks (1 multiply-add = 2 operations), memory from weights, activations,
//! context keys and values, streaming caches and scratch. Times are rooflines: the larger of work at the target's
//! dense rate and bytes at its bandwidth; real engines reach 40 to 60 % of them.
//!
//! ```
//! use mindseye_engines::plan::{ModelSpec, plan};
//! use mindseye_engines::target::{Precision, Target};
//! let model = ModelSpec::from_toml(include_str!("../../../configs/models/wan22-5b.toml")).unwrap();
//! let nano = plan(&model, &Target::named("orin-nano").unwrap(), Precision::Bf16, &Default::default()).unwrap();
//! assert!(nano.refusal().unwrap().contains("does not fit"));
//! ```

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use mindseye_engines::bundle::Manifest;
use mindseye_engines::model::codec::LinearCodecConfig;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::VaeConfig;
use mindseye_engines::target::{Precision, Target, TargetError};

/// Sizes of a streaming video VAE of the Wan2.2 family: causal 3x3x3 convolutions, four stages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeShape {
    /// Width of the encoder's first stage (160).
    pub encoder_width: u64,
    /// Width of the decoder's last stage (256).
    pub decoder_width: u64,
    /// Factors of the four stages (1, 2, 4, 4).
    pub multipliers: [u64; 4],
    /// Residual blocks per encoder stage (2).
    pub encoder_blocks: u64,
    /// Residual blocks per decoder stage (3).
    pub decoder_blocks: u64,
    /// Latent channels (48).
    pub latent_channels: u64,
    /// Image height, pixels.
    pub height: u64,
    /// Image width, pixels.
    pub width: u64,
}

/// Sizes of a T5-like text encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextShape {
    /// Layers.
    pub layers: u64,
    /// Width.
    pub width: u64,
    /// Inner width of the gated feed-forward part (three matrices).
    pub ffn: u64,
    /// Vocabulary.
    pub vocabulary: u64,
    /// Rows encoded.
    pub length: u64,
}

/// How the model is run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Latent frames of context.
    pub context_latents: u64,
    /// Latent frames imagined.
    pub target_latents: u64,
    /// Denoising steps.
    pub steps: u64,
    /// Forward passes per step (2 with classifier-free guidance).
    pub branches: u64,
    /// True when context keys and values are computed once (one-way mask).
    pub cached_context: bool,
}

/// Everything that a plan needs to know of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSpec {
    /// Name.
    pub name: String,
    /// The denoiser.
    pub dit: DitConfig,
    /// The video VAE, if that is the codec.
    pub vae: Option<VaeShape>,
    /// The linear codec, if that is the codec.
    pub codec: Option<LinearCodecConfig>,
    /// The text encoder.
    pub text_encoder: Option<TextShape>,
    /// How it is run.
    pub workload: Workload,
}

/// A model file (`configs/models/*.toml`); tables that a plan does not need are passed over.
#[derive(Deserialize)]
struct Wire {
    name: String,
    dit: DitConfig,
    vae: Option<VaeConfig>,
    umt5: Option<Umt5Config>,
    codec: Option<LinearCodecConfig>,
    layout: Layout,
    sampler: Option<Sampler>,
}

#[derive(Deserialize)]
struct Layout {
    context_latents: u64,
    motion_latents: u64,
    box_latents: u64,
}

#[derive(Deserialize)]
struct Sampler {
    steps: u64,
    guidance: f64,
}

fn vae_shape(v: &VaeConfig, dit: &DitConfig) -> Result<VaeShape, String> {
    let [a, b, c, d] = v.dim_mult[..] else {
        return Err(format!("vae.dim_mult has {} stages, a plan counts 4", v.dim_mult.len()));
    };
    // Three of the four stages halve the image, after pixels were gathered in squares.
    let factor = 8 * v.patch_size;
    Ok(VaeShape {
        encoder_width: v.base_dim as u64,
        decoder_width: v.decoder_base_dim as u64,
        multipliers: [a as u64, b as u64, c as u64, d as u64],
        encoder_blocks: v.num_res_blocks as u64,
        decoder_blocks: v.num_res_blocks as u64 + 1,
        latent_channels: v.z_dim as u64,
        height: (dit.latent_height * factor) as u64,
        width: (dit.latent_width * factor) as u64,
    })
}

fn text_shape(t: &Umt5Config, dit: &DitConfig) -> Option<TextShape> {
    (t.num_layers > 0).then_some(TextShape {
        layers: t.num_layers as u64,
        width: t.d_model as u64,
        ffn: t.d_ff as u64,
        vocabulary: t.vocab_size as u64,
        length: dit.text_len as u64,
    })
}

impl ModelSpec {
    /// Reads a model file.
    ///
    /// # Errors
    /// The key and what is wrong with it.
    pub fn from_toml(text: &str) -> Result<ModelSpec, String> {
        let wire: Wire = toml::from_str(text).map_err(|e| e.to_string().trim().replace('\n', " "))?;
        let sampler = wire.sampler.unwrap_or(Sampler { steps: 1, guidance: 1.0 });
        let spec = ModelSpec {
            vae: wire.vae.as_ref().map(|v| vae_shape(v, &wire.dit)).transpose()?,
            text_encoder: wire.umt5.as_ref().and_then(|t| text_shape(t, &wire.dit)),
            codec: wire.codec,
            workload: Workload {
                context_latents: wire.layout.context_latents,
                // The first image of the motion is a latent of its own.
                target_latents: wire.layout.motion_latents + wire.layout.box_latents + 1,
                steps: sampler.steps,
                branches: if sampler.guidance == 1.0 { 1 } else { 2 },
                cached_context: false,
            },
            name: wire.name,
            dit: wire.dit,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Reads a bundle's manifest: sizes for which it was trained, its sampler's defaults.
    ///
    /// # Errors
    /// The field and what is wrong with it.
    pub fn from_manifest(manifest: &Manifest) -> Result<ModelSpec, String> {
        let networks = &manifest.networks;
        let dit = manifest.dit.clone();
        let spec = ModelSpec {
            name: manifest.name.clone(),
            vae: networks.vae.as_ref().map(|v| vae_shape(v, &dit)).transpose()?,
            text_encoder: networks.umt5.as_ref().and_then(|t| text_shape(t, &dit)),
            codec: networks.codec,
            workload: Workload {
                context_latents: manifest.limits.context_trained as u64,
                target_latents: manifest.limits.target_trained as u64,
                steps: manifest.sampler.steps as u64,
                branches: if manifest.sampler.guidance == 1.0 { 1 } else { 2 },
                cached_context: manifest.component.contains_key("denoiser_cached"),
            },
            dit,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Checks sizes.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.dit.validate().map_err(|e| e.to_string())?;
        if let Some(codec) = &self.codec {
            codec.validate().map_err(|e| e.to_string())?;
        }
        let w = &self.workload;
        for (name, v) in [("target_latents", w.target_latents), ("steps", w.steps), ("branches", w.branches)]
        {
            if v == 0 || v > 1 << 20 {
                return Err(format!("workload.{name} = {v} is not between 1 and 2^20"));
            }
        }
        if w.context_latents > 1 << 20 {
            return Err(format!("workload.context_latents = {} is more than 2^20", w.context_latents));
        }
        Ok(())
    }
}

/// Choices of a plan that are not the model's or the target's.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOptions {
    /// First blocks kept in the float format.
    pub keep_first_blocks: u64,
    /// Last blocks kept in the float format.
    pub keep_last_blocks: u64,
    /// Scratch memory for kernels, bytes; none: 1 GiB or a twentieth of the memory, whichever is less.
    pub workspace_bytes: Option<u64>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions { keep_first_blocks: 1, keep_last_blocks: 1, workspace_bytes: None }
    }
}

/// One component's part of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComponentPlan {
    /// Component of the bundle.
    pub name: String,
    /// What one call does.
    pub unit: String,
    /// Precision of its large matrix products.
    pub precision: Precision,
    /// Parameters.
    pub parameters: u64,
    /// Bytes of its weights in the engine.
    pub weight_bytes: u64,
    /// Bytes of activations at their peak.
    pub activation_bytes: u64,
    /// Bytes of state kept between calls (streaming caches, context keys and values).
    pub state_bytes: u64,
    /// 10^12 operations in one call.
    pub teraflop: f64,
    /// Of these, in attention scores and weighted sums.
    pub teraflop_attention: f64,
    /// Calls in one answer.
    pub calls: u64,
    /// Seconds for one call at best; none where rates are not known.
    pub seconds: Option<f64>,
    /// Seconds for one call with every operation at the precision's rate.
    pub seconds_all_at_rate: Option<f64>,
    /// True when memory bandwidth, not arithmetic, sets the time.
    pub memory_bound: bool,
}

/// The memory sum.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// Weights that stay loaded.
    pub weights: u64,
    /// Largest activations among components.
    pub activations: u64,
    /// Context keys and values, streaming caches.
    pub state: u64,
    /// Scratch.
    pub workspace: u64,
    /// Their sum: while the imagination runs.
    pub run_total: u64,
    /// Weights, activations and scratch of the text encoder, which runs once and is dropped.
    pub text_total: u64,
    /// The larger of the two.
    pub peak: u64,
    /// What the target leaves.
    pub usable: u64,
}

/// A plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Model name.
    pub model: String,
    /// Target name.
    pub target: String,
    /// Precision asked for and granted.
    pub precision: Precision,
    /// Components in the order of their use.
    pub components: Vec<ComponentPlan>,
    /// The memory sum.
    pub memory: MemoryPlan,
    /// 10^12 operations of the denoiser in one answer.
    pub denoiser_teraflop_total: f64,
    /// Seconds of one answer at best: all calls of all components.
    pub seconds_total: Option<f64>,
    /// True when the peak fits.
    pub fits: bool,
}

/// Counts of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    parameters: f64,
    flop: f64,
    attention: f64,
    cache_values: f64,
    peak_values: f64,
}

/// Parameters of a transformer by whether a quantised plan keeps them high.
fn dit_parameters(c: &DitConfig, keep_blocks: u64) -> (f64, f64) {
    let (d, f) = (c.dim() as f64, c.ffn_dim as f64);
    let patch = (c.in_channels * c.patch[0] * c.patch[1]) as f64;
    let out = (c.out_channels * c.patch[0] * c.patch[1]) as f64;
    let linear = |i: f64, o: f64| i * o + o;
    let matrices = 8.0 * linear(d, d) + linear(d, f) + linear(f, d);
    // Four RMSNorm weights, one LayerNorm with bias, six modulation rows.
    let rest = 4.0 * d + 2.0 * d + 6.0 * d;
    let edges = linear(patch, d)
        + linear(c.freq_dim as f64, d)
        + linear(d, d)
        + linear(d, 6.0 * d)
        + linear(c.text_dim as f64, d)
        + linear(d, d)
        + 2.0 * d
        + linear(d, out);
    let layers = c.layers as f64;
    let kept = (keep_blocks as f64).min(layers);
    (matrices * (layers - kept), edges + layers * rest + kept * matrices)
}

/// Operations of the blocks for `n` query tokens over `kv` keys: (linear, attention, text keys and values).
fn dit_flop(c: &DitConfig, n: f64, kv: f64) -> (f64, f64, f64) {
    let (d, f, layers, text) = (c.dim() as f64, c.ffn_dim as f64, c.layers as f64, c.text_len as f64);
    let linear = n * (8.0 * d * d + 4.0 * d * d + 4.0 * d * f) * layers;
    let attention = (4.0 * n * kv * d + 4.0 * n * text * d) * layers;
    (linear, attention, 4.0 * text * d * d * layers)
}

impl Count {
    fn conv(&mut self, cin: u64, cout: u64, kernel: u64, pixels: u64, frames: u64) {
        let (cin, cout, k, px, t) = (cin as f64, cout as f64, kernel as f64, pixels as f64, frames as f64);
        self.parameters += cin * cout * k + cout;
        self.flop += 2.0 * cin * cout * k * px * t;
        self.peak_values = self.peak_values.max((cin + cout) * px * t);
    }

    fn causal(&mut self, cin: u64, cout: u64, pixels: u64, frames: u64) {
        self.conv(cin, cout, 27, pixels, frames);
        self.cache_values += 2.0 * cin as f64 * pixels as f64;
    }

    fn residual(&mut self, cin: u64, cout: u64, pixels: u64, frames: u64) {
        self.causal(cin, cout, pixels, frames);
        self.causal(cout, cout, pixels, frames);
        self.parameters += (cin + cout) as f64;
        if cin != cout {
            self.conv(cin, cout, 1, pixels, frames);
        }
    }

    fn middle(&mut self, c: u64, pixels: u64, frames: u64) {
        self.residual(c, c, pixels, frames);
        self.conv(c, 3 * c, 1, pixels, frames);
        self.conv(c, c, 1, pixels, frames);
        self.parameters += c as f64;
        let attention = 4.0 * (pixels as f64).powi(2) * c as f64 * frames as f64;
        self.flop += attention;
        self.attention += attention;
        self.residual(c, c, pixels, frames);
    }
}

/// One streamed group of the encoder (four frames), or its first frame.
fn vae_encode(v: &VaeShape, first: bool) -> Count {
    let mut n = Count::default();
    let mut pixels = v.height * v.width / 4;
    let mut frames = if first { 1 } else { 4 };
    let w = v.multipliers.map(|m| v.encoder_width * m);
    n.causal(12, w[0], pixels, frames);
    let mut cin = w[0];
    for (stage, &cout) in w.iter().enumerate() {
        for _ in 0..v.encoder_blocks {
            n.residual(cin, cout, pixels, frames);
            cin = cout;
        }
        if stage < 3 {
            pixels /= 4;
            n.conv(cout, cout, 9, pixels, frames);
        }
        if stage == 1 || stage == 2 {
            if first {
                n.parameters += (cout * cout * 3 + cout) as f64;
            } else {
                frames /= 2;
                n.conv(cout, cout, 3, pixels, frames);
            }
            n.cache_values += (cout * pixels) as f64;
        }
    }
    n.middle(cin, pixels, frames);
    n.causal(cin, 2 * v.latent_channels, pixels, frames);
    n.conv(2 * v.latent_channels, 2 * v.latent_channels, 1, pixels, frames);
    n.parameters += cin as f64;
    n
}

/// One latent of the decoder (four frames out), or the first (one frame out).
fn vae_decode(v: &VaeShape, first: bool) -> Count {
    let mut n = Count::default();
    let mut pixels = v.height * v.width / 256;
    let mut frames = 1;
    let m = v.multipliers.map(|m| v.decoder_width * m);
    let (top, outs) = (m[3], [m[3], m[2], m[1], m[0]]);
    n.conv(v.latent_channels, v.latent_channels, 1, pixels, 1);
    n.causal(v.latent_channels, top, pixels, 1);
    n.middle(top, pixels, 1);
    let mut cin = top;
    for (stage, &cout) in outs.iter().enumerate() {
        for _ in 0..=v.decoder_blocks.saturating_sub(1) {
            n.residual(cin, cout, pixels, frames);
            cin = cout;
        }
        if stage < 2 {
            if first {
                n.parameters += (cout * 2 * cout * 3 + 2 * cout) as f64;
            } else {
                n.conv(cout, 2 * cout, 3, pixels, frames);
                frames *= 2;
            }
            n.cache_values += 2.0 * (cout * pixels) as f64;
        }
        if stage < 3 {
            pixels *= 4;
            n.conv(cout, cout, 9, pixels, frames);
        }
    }
    n.causal(cin, 12, pixels, frames);
    n.parameters += cin as f64;
    n
}

/// Makes a plan. It may turn out not to fit: see [`Plan::refusal`].
///
/// # Errors
/// The target has no hardware for the precision.
pub fn plan(
    model: &ModelSpec,
    target: &Target,
    precision: Precision,
    options: &PlanOptions,
) -> Result<Plan, TargetError> {
    target.check_precision(precision)?;
    let w = &model.workload;
    let mut components = Vec::new();
    if let Some(t) = &model.text_encoder {
        components.push(text_component(t, target, precision.float()));
    }
    let frames = w.context_latents + w.target_latents;
    if let Some(v) = &model.vae {
        let float = precision.float();
        let calls = w.context_latents;
        components.push(vae_component("vae_encoder", "4 frames", vae_encode(v, false), calls, target, float));
        let calls = w.target_latents;
        components.push(vae_component("vae_decoder", "1 latent", vae_decode(v, false), calls, target, float));
    }
    if let Some(c) = &model.codec {
        // One matrix, applied to every block; its transpose decodes.
        let (h, width) = c.latent_size();
        let values = (c.channels * c.block_values()) as f64;
        let count = Count {
            parameters: values + c.block_values() as f64,
            flop: 2.0 * values * (h * width) as f64,
            attention: 0.0,
            cache_values: 0.0,
            peak_values: 2.0 * (12 * c.height * c.width) as f64,
        };
        let float = precision.float();
        components.push(vae_component("vae_encoder", "4 frames", count, frames, target, float));
        components.push(vae_component("vae_decoder", "1 latent", count, w.target_latents, target, float));
    }
    let denoiser = denoiser_component(model, target, precision, options);
    let denoiser_teraflop_total = denoiser.teraflop * denoiser.calls as f64;
    components.push(denoiser);

    let workspace = options.workspace_bytes.unwrap_or_else(|| (1 << 30).min(target.usable_bytes() / 20));
    let (text, run): (Vec<_>, Vec<_>) = components.iter().partition(|c| c.name == "text_encoder");
    let sum = |f: fn(&ComponentPlan) -> u64| run.iter().map(|c| f(c)).sum::<u64>();
    let weights = sum(|c| c.weight_bytes);
    let state = sum(|c| c.state_bytes);
    let activations = run.iter().map(|c| c.activation_bytes).max().unwrap_or(0);
    let run_total = weights + activations + state + workspace;
    let text_total = text.iter().map(|c| c.weight_bytes + c.activation_bytes + workspace).sum();
    let usable = target.usable_bytes();
    let peak = run_total.max(text_total);
    let seconds_total = components.iter().map(|c| c.seconds.map(|s| s * c.calls as f64)).sum();
    Ok(Plan {
        model: model.name.clone(),
        target: target.name.clone(),
        precision,
        components,
        memory: MemoryPlan { weights, activations, state, workspace, run_total, text_total, peak, usable },
        denoiser_teraflop_total,
        seconds_total,
        fits: peak <= usable,
    })
}

/// Roofline: (seconds, all operations at the precision's rate, bound by memory).
fn roofline(
    target: &Target,
    linear: f64,
    // Of it, in layers that are kept in the float format.
    kept: f64,
    attention: f64,
    precision: Precision,
    attention_precision: Precision,
    bytes: f64,
) -> (Option<f64>, Option<f64>, bool) {
    let rates = (target.rate(precision), target.rate(attention_precision), target.bandwidth_bytes_per_sec);
    let (Some(rate), Some(attention_rate), Some(bandwidth)) = rates else {
        return (None, None, false);
    };
    let float_rate = target.rate(precision.float()).unwrap_or(rate);
    let compute = (linear - kept) / rate + kept / float_rate + attention / attention_rate;
    let memory = bytes / bandwidth;
    (Some(compute.max(memory)), Some((linear + attention) / rate), memory > compute)
}

fn denoiser_component(
    model: &ModelSpec,
    target: &Target,
    precision: Precision,
    options: &PlanOptions,
) -> ComponentPlan {
    let (c, w) = (&model.dit, &model.workload);
    let float = precision.float();
    let quantised = precision != float;
    let keep = if quantised { options.keep_first_blocks + options.keep_last_blocks } else { 0 };
    let (low, high) = dit_parameters(c, keep);
    let weight_bytes = low * precision.weight_bytes() + high * float.weight_bytes();
    let (d, f) = (c.dim() as f64, c.ffn_dim as f64);
    let per_frame = c.tokens_per_frame() as f64;
    let context = w.context_latents as f64 * per_frame;
    let all = (w.context_latents + w.target_latents) as f64 * per_frame;
    let queries = if w.cached_context { all - context } else { all };
    let (linear, attention, text) = dit_flop(c, queries, all);
    // 8-bit attention: FP8 only, where the head size is a multiple of 16.
    let attention_precision =
        if precision == Precision::Fp8 && c.head_dim % 16 == 0 { Precision::Fp8 } else { float };
    let element = float.weight_bytes();
    let activation_bytes = queries * (4.0 * d + element * d) + element * queries * f.max(4.0 * d);
    let state_bytes = if w.cached_context {
        context * 2.0 * d * c.layers as f64 * element * w.branches as f64
    } else {
        0.0
    };
    let (seconds, at_rate, memory_bound) = roofline(
        target,
        linear + text,
        (linear + text) * (keep as f64).min(c.layers as f64) / c.layers as f64,
        attention,
        precision,
        attention_precision,
        weight_bytes + state_bytes,
    );
    ComponentPlan {
        name: "denoiser".into(),
        unit: format!("{} + {} latents", w.context_latents, w.target_latents),
        precision,
        parameters: (low + high) as u64,
        weight_bytes: weight_bytes as u64,
        activation_bytes: activation_bytes as u64,
        state_bytes: state_bytes as u64,
        teraflop: (linear + attention + text) / 1e12,
        teraflop_attention: attention / 1e12,
        calls: w.steps * w.branches,
        seconds,
        seconds_all_at_rate: at_rate,
        memory_bound,
    }
}

fn vae_component(
    name: &str,
    unit: &str,
    count: Count,
    calls: u64,
    target: &Target,
    float: Precision,
) -> ComponentPlan {
    let bytes = float.weight_bytes();
    let weight_bytes = count.parameters * bytes;
    let (seconds, at_rate, memory_bound) = roofline(
        target,
        count.flop - count.attention,
        0.0,
        count.attention,
        float,
        float,
        weight_bytes + 2.0 * count.cache_values * bytes,
    );
    ComponentPlan {
        name: name.into(),
        unit: unit.into(),
        precision: float,
        parameters: count.parameters as u64,
        weight_bytes: weight_bytes as u64,
        // Input and output of the largest convolution, and its time-shifted input.
        activation_bytes: (2.0 * count.peak_values * bytes) as u64,
        state_bytes: (count.cache_values * bytes) as u64,
        teraflop: count.flop / 1e12,
        teraflop_attention: count.attention / 1e12,
        calls,
        seconds,
        seconds_all_at_rate: at_rate,
        memory_bound,
    }
}

fn text_component(t: &TextShape, target: &Target, float: Precision) -> ComponentPlan {
    let (layers, d, f, n) = (t.layers as f64, t.width as f64, t.ffn as f64, t.length as f64);
    let matrices = layers * (4.0 * d * d + 3.0 * d * f);
    let parameters = matrices + t.vocabulary as f64 * d;
    let attention = 4.0 * n * n * d * layers;
    let bytes = float.weight_bytes();
    let (seconds, at_rate, memory_bound) =
        roofline(target, 2.0 * matrices * n, 0.0, attention, float, float, matrices * bytes);
    ComponentPlan {
        name: "text_encoder".into(),
        unit: format!("{} rows", t.length),
        precision: float,
        parameters: parameters as u64,
        weight_bytes: (parameters * bytes) as u64,
        activation_bytes: ((2.0 * f + 4.0 * d) * n * bytes) as u64,
        state_bytes: 0,
        teraflop: (2.0 * matrices * n + attention) / 1e12,
        teraflop_attention: attention / 1e12,
        calls: 1,
        seconds,
        seconds_all_at_rate: at_rate,
        memory_bound,
    }
}

fn gb(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 0.995e8 => format!("{:.2} GB", b / 1e9),
        b => format!("{:.2} MB", b / 1e6),
    }
}

impl Plan {
    /// Why the plan cannot be built, with the arithmetic; none when it fits.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        if self.fits {
            return None;
        }
        let m = &self.memory;
        let run = format!(
            "weights {} + activations {} + context K/V and caches {} + workspace {} = {}",
            gb(m.weights),
            gb(m.activations),
            gb(m.state),
            gb(m.workspace),
            gb(m.run_total)
        );
        let text = if m.text_total > m.usable {
            format!("; the text encoder alone takes {} (cache its output per prompt)", gb(m.text_total))
        } else {
            String::new()
        };
        Some(format!(
            "{} in {} does not fit {}: {run}, {} usable{text}",
            self.model,
            self.precision,
            self.target,
            gb(m.usable)
        ))
    }

    /// A table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = format!("{} on {} in {}\n", self.model, self.target, self.precision);
        let time = |s: Option<f64>| match s {
            None => "-".into(),
            Some(s) if s < 1e-4 => format!("{:.2} us", s * 1e6),
            Some(s) if s < 0.1 => format!("{:.2} ms", s * 1e3),
            Some(s) => format!("{s:.2} s"),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<13} {:<17} {:<5} {:>11} {:>11} {:>11} {:>10} {:>6} {:>11} {:>11}",
            "component",
            "one call",
            "prec",
            "weights",
            "activations",
            "state",
            "TFLOP",
            "calls",
            "roofline",
            "at rate"
        );
        for c in &self.components {
            let _ = writeln!(
                out,
                "{:<13} {:<17} {:<5} {:>11} {:>11} {:>11} {:>10} {:>6} {:>11} {:>11}{}",
                c.name,
                c.unit,
                c.precision.name(),
                gb(c.weight_bytes),
                gb(c.activation_bytes),
                gb(c.state_bytes),
                if c.teraflop >= 0.01 { format!("{:.2}", c.teraflop) } else { format!("{:.2e}", c.teraflop) },
                c.calls,
                time(c.seconds),
                time(c.seconds_all_at_rate),
                if c.memory_bound { " (memory)" } else { "" }
            );
        }
        let m = &self.memory;
        let _ = writeln!(
            out,
            "memory: weights {} + activations {} + context K/V and caches {} + workspace {} = {}; text encoder {} (runs \
             first, then dropped); usable {}",
            gb(m.weights),
            gb(m.activations),
            gb(m.state),
            gb(m.workspace),
            gb(m.run_total),
            gb(m.text_total),
            gb(m.usable)
        );
        let _ = writeln!(
            out,
            "one answer: denoiser {:.1} TFLOP; all components {} at best (engines reach 40 to 60 % of a roofline)",
            self.denoiser_teraflop_total,
            time(self.seconds_total)
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wan() -> ModelSpec {
        ModelSpec::from_toml(include_str!("../../../configs/models/wan22-5b.toml")).unwrap()
    }

    #[test]
    fn the_small_model_fits_everywhere() {
        let m = ModelSpec::from_toml(include_str!("../../../configs/models/house-tiny.toml")).unwrap();
        for t in Target::all() {
            let p = plan(&m, &t, t.best_precision(), &PlanOptions::default()).unwrap();
            assert!(p.fits, "{}", p.table());
        }
    }

    fn close(got: f64, want: f64, tolerance: f64, what: &str) {
        assert!((got / want - 1.0).abs() < tolerance, "{what}: {got} against {want}");
    }

    #[test]
    fn counts_agree_with_the_cost_model() {
        let m = wan();
        let (low, high) = dit_parameters(&m.dit, 0);
        assert_eq!((low + high) as u64, 4_999_787_712);
        // Work of the joint forward, the prefill, the cached forward and targets alone (TFLOP).
        let per = m.dit.tokens_per_frame() as f64;
        for (queries, keys, want) in
            [(131.0, 131.0, 189.9), (85.0, 85.0, 107.8), (46.0, 131.0, 66.5), (46.0, 46.0, 50.9)]
        {
            let (linear, attention, text) = dit_flop(&m.dit, queries * per, keys * per);
            // The printed figures of cached forwards leave out the text keys and values (0.6).
            close((linear + attention + text) / 1e12, want, 0.015, "denoiser");
        }
        let v = m.vae.unwrap();
        for (count, want, what) in [
            (vae_encode(&v, true), 0.495, "encode first"),
            (vae_encode(&v, false), 1.487, "encode group"),
            (vae_decode(&v, true), 2.43, "decode first"),
            (vae_decode(&v, false), 7.836, "decode latent"),
        ] {
            close(count.flop / 1e12, want, 0.01, what);
        }
        close(vae_encode(&v, false).parameters, 149.6e6, 0.01, "encoder parameters");
        close(vae_decode(&v, false).parameters, 555.1e6, 0.01, "decoder parameters");
        close(vae_encode(&v, false).cache_values, 62.7e6, 0.05, "encoder caches");
        close(vae_decode(&v, false).cache_values, 190e6, 0.05, "decoder caches");
    }

    #[test]
    fn rooflines_agree_with_the_cost_model() {
        // wan22 section 6, rows A (50 steps x 2, joint), and G (8 steps, cached, one branch), seconds at peak.
        let m = wan();
        let mut cached = wan();
        cached.workload = Workload { steps: 8, branches: 1, cached_context: true, ..m.workload.clone() };
        for (target, precision, joint, vae_group, decode) in [
            ("a100", Precision::Bf16, 61.0, 0.005, 1.1),
            ("h200", Precision::Bf16, 24.0, 0.002, 0.45),
            ("orin-agx", Precision::Fp16, 447.0, 0.035, 8.4),
            ("orin-agx", Precision::Int8, 223.0, 0.035, 8.4),
        ] {
            let t = Target::named(target).unwrap();
            let p = plan(&m, &t, precision, &PlanOptions::default()).unwrap();
            let part = |name: &str| p.components.iter().find(|c| c.name == name).unwrap();
            let d = part("denoiser");
            close(d.seconds_all_at_rate.unwrap() * 100.0, joint, 0.05, target);
            close(p.denoiser_teraflop_total, 18_989.0, 0.01, "total");
            // Two decimals are printed there, so allow half a unit of the last.
            let e = part("vae_encoder").seconds.unwrap();
            assert!((e - vae_group).abs() < 0.05 * vae_group + 0.0005, "{target} {e}");
            let e = part("vae_decoder").seconds.unwrap() * 45.0;
            assert!((e - decode).abs() < 0.05 * decode + 0.05, "{target} {e}");
        }
        let a100 = Target::named("a100").unwrap();
        let p = plan(&cached, &a100, Precision::Bf16, &PlanOptions::default()).unwrap();
        let d = p.components.last().unwrap();
        // 107.8 of prefill come on top of these 8 x 66.5.
        close((d.seconds_all_at_rate.unwrap() * 8.0 * 312.0 + 107.8) / 312.0, 2.1, 0.05, "row G");
        close(d.state_bytes as f64, 3.26e9, 0.01, "context K/V");
        // INT8 on linears only gains 1.45 (section 6, remarks).
        let t = Target::named("orin-agx").unwrap();
        let s =
            |p| plan(&m, &t, p, &PlanOptions::default()).unwrap().components.last().unwrap().seconds.unwrap();
        close(s(Precision::Fp16) / s(Precision::Int8), 1.45, 0.05, "int8 gain");
    }

    #[test]
    fn memory_agrees_and_what_does_not_fit_is_refused_with_figures() {
        let m = wan();
        for (target, precision, fits) in [
            ("orin-nano", Precision::Bf16, false),
            ("orin-agx", Precision::Int8, true),
            ("a100", Precision::Bf16, true),
            ("h200", Precision::Fp8, true),
        ] {
            let p = plan(&m, &Target::named(target).unwrap(), precision, &PlanOptions::default()).unwrap();
            assert_eq!(p.fits, fits, "{target} {}", p.table());
            assert_eq!(p.refusal().is_none(), fits);
            let weight =
                |name: &str| p.components.iter().find(|c| c.name == name).unwrap().weight_bytes as f64;
            if precision == Precision::Bf16 {
                close(weight("denoiser"), 10.0e9, 0.01, "denoiser");
                close(weight("text_encoder"), 11.4e9, 0.01, "text encoder");
                close(weight("vae_encoder") + weight("vae_decoder"), 1.4e9, 0.01, "vae");
            }
        }
        let nano = Target::named("orin-nano").unwrap();
        let text = plan(&m, &nano, Precision::Bf16, &PlanOptions::default()).unwrap().refusal().unwrap();
        for part in ["weights 11.", "activations", "context K/V", "workspace", "6.50 GB usable"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let fp8 = plan(&m, &nano, Precision::Fp8, &PlanOptions::default()).unwrap_err().to_string();
        assert!(fp8.contains("8.9"), "{fp8}");
    }
}
