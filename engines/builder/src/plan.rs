//! What the engines of a model will weigh and how fast they can be at best, before anything is built.
//!
//! Arithmetic, weights, activations and state are those of the counting interpreter ([`mindseye_engines::count`]), which runs the
//! networks themselves; what is in memory together is what the runtime loads together ([`mindseye_engines::residency`]). Times are
//! rooflines: the larger of work at the target's dense rate and bytes at its bandwidth; real engines reach 40 to 60 %
//! of them.
//!
//! # Sizes
//! A plan counts, and an engine's profile ends at, the most latents that the bundle allows (`limits.context_allowed`,
//! `limits.target_allowed`; `[layout]` of a model file), or fewer where a caller says so.
//!
//! ```
//! use mindseye_builder::plan::{ModelSpec, plan};
//! use mindseye_engines::target::{Precision, Target};
//! let model = ModelSpec::from_toml(include_str!("../../../configs/models/wan22-5b.toml")).unwrap();
//! let nano = plan(&model, &Target::named("orin-nano").unwrap(), Precision::Bf16, &Default::default()).unwrap();
//! assert!(nano.refusal().unwrap().contains("does not fit"));
//! ```

mod cuda;
mod spec;
mod table;

pub use cuda::{CudaNeeds, CudaPlanError, cuda_needs, declared_graphs};
pub use spec::{ModelSpec, SpecError, Workload};
pub use table::{Choice, alternatives, compare, compared, compared_document, workload_line};

use serde::Serialize;

use mindseye_engines::count::{
    CountOps, Edge, Flops, Kernels, count_codec_decoder, count_codec_encoder, count_denoiser, count_depth,
    count_prefill, count_text, count_vae_decoder, count_vae_encoder,
};
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::vae::Chunk;
use mindseye_engines::residency::{Keep, Lane, Part, parts};
use mindseye_engines::target::{Precision, Target, TargetError};

/// Choices of a plan that are not the model's or the target's.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOptions {
    /// First blocks kept in the float format.
    pub keep_first_blocks: u64,
    /// Last blocks kept in the float format.
    pub keep_last_blocks: u64,
    /// Scratch memory for kernels, bytes; none: 1 GiB or a twentieth of the memory, whichever is less, and nothing on
    /// a CPU.
    pub workspace_bytes: Option<u64>,
    /// What stays in memory; none: the most that fits.
    pub keep: Option<Keep>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions { keep_first_blocks: 1, keep_last_blocks: 1, workspace_bytes: None, keep: None }
    }
}

/// One pass of a component, counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pass {
    /// Component of the bundle.
    pub component: String,
    /// What one call does.
    pub unit: String,
    /// Parameters.
    pub parameters: u64,
    /// Of these, in matrices that a quantised plan makes smaller when no block is kept.
    pub quantisable: u64,
    /// Values of constants.
    pub constants: u64,
    /// Of the parameters, in tables of which a call reads some rows only.
    pub looked_up: u64,
    /// Arithmetic of one call.
    pub flops: Flops,
    /// Values of intermediate results, attention in one kernel.
    pub activations_fused: u64,
    /// Values of intermediate results, attention step by step.
    pub activations_stepwise: u64,
    /// Values in and out.
    pub edge: Edge,
    /// Bytes in and out, state aside, as they lie in an arena.
    pub io_bytes: u64,
    /// Calls in one answer.
    pub calls: u64,
    /// Calls while frames come in, for the context of one answer.
    pub intake_calls: u64,
    /// Times that it is loaded for one answer where it takes turns.
    pub turns: u64,
    /// Its layers: name, block of a transformer, parameters (bias aside), FLOP of one call.
    #[serde(skip)]
    layers: Vec<(String, Option<u64>, u64, f64)>,
}

/// The transformer block that a parameter belongs to, where it is one of its matrices.
fn block_of(p: &ParamSpec) -> Option<u64> {
    let rest = p.name.strip_prefix("blocks.").filter(|_| p.shape.len() == 2)?;
    rest.split('.').next()?.parse().ok()
}

fn size(p: &ParamSpec) -> u64 {
    p.shape.iter().map(|&s| s as u64).product()
}

impl Pass {
    fn new(component: &str, unit: String, ops: &CountOps) -> Self {
        Pass {
            component: component.to_owned(),
            unit,
            parameters: ops.parameters(),
            quantisable: ops.params().iter().filter(|p| block_of(p).is_some()).map(size).sum(),
            constants: ops.constants(),
            looked_up: ops.looked_up(),
            flops: ops.flops(),
            activations_fused: ops.activations(Kernels::Fused),
            activations_stepwise: ops.activations(Kernels::Stepwise),
            edge: ops.edge(),
            io_bytes: ops.io_bytes(ALIGN),
            calls: 0,
            intake_calls: 0,
            turns: 1,
            layers: ops
                .params()
                .iter()
                .zip(ops.products())
                .filter(|(_, flop)| **flop > 0.0)
                .map(|(p, flop)| (p.name.clone(), block_of(p), size(p), *flop))
                .collect(),
        }
    }

    fn calls(self, calls: u64, intake_calls: u64) -> Self {
        Pass { calls, intake_calls, ..self }
    }
}

/// Every pass of one answer, in the order of the components' use.
#[must_use]
pub fn passes(model: &ModelSpec) -> Vec<Pass> {
    let (w, dit) = (&model.workload, &model.dit);
    let latent = [dit.latent_height, dit.latent_width];
    let n = |values: u64| values as usize;
    let mut all = Vec::new();
    if let Some(umt5) = &model.text_encoder {
        let rows = dit.text_len;
        // The goal's text, and the empty one of the other branch.
        all.push(
            Pass::new("text_encoder", format!("{rows} rows"), &count_text(umt5, rows)).calls(w.branches, 0),
        );
    }
    if let Some(vae) = &model.vae {
        let first = count_vae_encoder(vae, latent, Chunk::First);
        let next = count_vae_encoder(vae, latent, Chunk::Next);
        all.push(Pass::new("vae_encoder_first", "1 frame".into(), &first).calls(1, 1));
        let more = w.context_latents.saturating_sub(1);
        let frames = format!("{} frames", vae.temporal_factor());
        all.push(Pass::new("vae_encoder_next", frames, &next).calls(0, more));
    }
    if let Some(codec) = &model.codec {
        let one = count_codec_encoder(codec, 1);
        all.push(Pass::new("vae_encoder", "4 frames".into(), &one).calls(1, w.context_latents));
    }
    all.extend(denoiser_passes(model));
    if let Some(vae) = &model.vae {
        let first = count_vae_decoder(vae, latent, Chunk::First);
        let next = count_vae_decoder(vae, latent, Chunk::Next);
        all.push(Pass::new("vae_decoder_first", "1 latent".into(), &first).calls(1, 0));
        all.push(Pass::new("vae_decoder_next", "1 latent".into(), &next).calls(w.target_latents - 1, 0));
    }
    if let Some(codec) = &model.codec {
        // The imagined clip, and the context to see how well the codec renders it.
        let most = w.target_latents.max(w.context_latents);
        let whole = count_codec_decoder(codec, n(most));
        let unit = format!("{most} latents");
        all.push(Pass::new("vae_decoder", unit, &whole).calls(1, 0));
    }
    if let Some(depth) = &model.depth {
        // A remembered picture for each latent of the context.
        let one = count_depth(depth);
        all.push(Pass::new("depth", "1 picture".into(), &one).calls(w.context_latents, 0));
    }
    all
}

/// The denoiser, or its two halves. Heads give a first opinion per candidate besides the steps.
fn denoiser_passes(model: &ModelSpec) -> Vec<Pass> {
    let (w, dit) = (&model.workload, &model.dit);
    let opinions = if dit.lift { w.candidates } else { 0 };
    let steps = w.steps * w.branches * w.candidates;
    if !w.cached_context {
        let frames = (w.context_latents + w.target_latents) as usize;
        let unit = format!("{} + {} latents", w.context_latents, w.target_latents);
        let joint = count_denoiser(dit, frames, 0, 2);
        return vec![Pass::new("denoiser", unit, &joint).calls(steps + opinions, 0)];
    }
    // The first target latent is given, as the context is.
    let (given, free) = (w.context_latents + 1, (w.target_latents - 1).max(1));
    // Noise takes the context's place in the other branch, drawn for each candidate.
    let contexts = 1 + (w.branches - 1) * w.candidates;
    let prefill = count_prefill(dit, given as usize);
    let cached = count_denoiser(dit, free as usize, given as usize, 2);
    let seen = format!("{free} see {given} latents");
    let prefill = Pass::new("denoiser_prefill", format!("{given} latents"), &prefill).calls(contexts, 0);
    let cached = Pass::new("denoiser_cached", seen, &cached).calls(steps + opinions, 0);
    vec![Pass { turns: contexts, ..prefill }, Pass { turns: contexts, ..cached }]
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
    /// Bytes of the engine's file, as expected from engines that were built.
    pub engine_bytes: u64,
    /// Bytes of activations at their peak.
    pub activation_bytes: u64,
    /// Bytes of inputs and outputs of one call that cross between host and device.
    pub io_bytes: u64,
    /// Bytes of state kept between calls (streaming caches, context keys and values).
    pub state_bytes: u64,
    /// 10^12 operations in one call.
    pub teraflop: f64,
    /// Of these, in attention scores and weighted sums.
    pub teraflop_attention: f64,
    /// Calls in one answer, those of the context's frames included.
    pub calls: u64,
    /// Seconds for one call at best; none where rates are not known.
    pub seconds: Option<f64>,
    /// Seconds for one call with every operation at the precision's rate.
    pub seconds_all_at_rate: Option<f64>,
    /// Seconds for copying the inputs and outputs of one call; none where rates are not known.
    pub copy_seconds: Option<f64>,
    /// True when memory bandwidth, not arithmetic, sets the time.
    pub memory_bound: bool,
}

/// The memory sum.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// What stays in memory between its uses.
    pub keep: Keep,
    /// Weights loaded together while the imagination runs.
    pub weights: u64,
    /// Activations, inputs and outputs of the lanes that run at the same time: of each its largest part.
    pub activations: u64,
    /// Context keys and values, streaming caches.
    pub state: u64,
    /// Scratch, for each lane.
    pub workspace: u64,
    /// Page-locked buffers for copies, where the host shares the device's memory.
    pub staging: u64,
    /// Their sum: while the imagination runs.
    pub run_total: u64,
    /// While a text is encoded: what else is loaded then included.
    pub text_total: u64,
    /// The larger of the two.
    pub peak: u64,
    /// What the target leaves.
    pub usable: u64,
    /// Bytes loaded from disk for one answer, since parts take turns.
    pub loaded_per_answer: u64,
    /// Seconds for that at [`DISK_BYTES_PER_SEC`].
    pub load_seconds: f64,
}

/// One layer of a plan: a weight that takes part in products.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerPlan {
    /// Component of the bundle.
    pub component: String,
    /// Name of the weight.
    pub name: String,
    /// Precision of its products.
    pub precision: Precision,
    /// Parameters, the bias aside.
    pub parameters: u64,
    /// Bytes of them in the engine.
    pub bytes: u64,
    /// 10^9 operations in one call.
    pub gigaflop: f64,
}

/// Every layer of a model in a precision: which it gets, bytes and arithmetic.
///
/// # Errors
/// The target has no hardware for the precision.
pub fn layers(
    model: &ModelSpec,
    target: &Target,
    precision: Precision,
    options: &PlanOptions,
) -> Result<Vec<LayerPlan>, TargetError> {
    target.check_precision(precision)?;
    let count = model.dit.layers as u64;
    let kept = |block: u64| block < options.keep_first_blocks || block + options.keep_last_blocks >= count;
    let gpu = target.compute_capability.is_some();
    let float = if gpu { precision.float() } else { Precision::Fp32 };
    let mut all = Vec::new();
    for pass in passes(model) {
        let denoiser = pass.component.starts_with("denoiser");
        for (name, block, parameters, flop) in pass.layers {
            let quantised = denoiser && block.is_some_and(|b| !kept(b));
            let precision = if quantised { precision } else { float };
            all.push(LayerPlan {
                component: pass.component.clone(),
                name,
                precision,
                parameters,
                bytes: (parameters as f64 * precision.weight_bytes()) as u64,
                gigaflop: flop / 1e9,
            });
        }
    }
    Ok(all)
}

/// What building costs, extrapolated from engines that were built (see [`BUILD_SECONDS_PER_BYTE`]).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BuildPlan {
    /// Bytes of all engines.
    pub engine_bytes: u64,
    /// Seconds of TensorRT-RTX on two cores; TensorRT, which times kernels on the device, takes longer.
    pub seconds: f64,
    /// Most memory of the building process.
    pub host_bytes: u64,
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
    /// How the model is run.
    pub workload: Workload,
    /// Components in the order of their use.
    pub components: Vec<ComponentPlan>,
    /// The memory sum.
    pub memory: MemoryPlan,
    /// What building costs.
    pub build: BuildPlan,
    /// 10^12 operations of the denoiser in one answer.
    pub denoiser_teraflop_total: f64,
    /// Seconds of one answer at best: as `seconds_answer`, and the calls for the context's frames.
    pub seconds_total: Option<f64>,
    /// Seconds from goal to answer at best: the context is encoded by then, and parts that take turns are loaded.
    pub seconds_answer: Option<f64>,
    /// True when the peak fits.
    pub fits: bool,
}

/// Reading engines from an NVMe disk, assumed.
pub const DISK_BYTES_PER_SEC: f64 = 2e9;

/// Building, per byte of engine: a transformer of 12 layers and width 1024 took TensorRT-RTX 1.7 10.6 s for 306 MB on
/// two cores.
pub const BUILD_SECONDS_PER_BYTE: f64 = 10.6 / 306e6;

/// Memory of the building process per byte of weights: 1.2 GB for 302 MB of bf16 there, 0.78 GB for 152 MB of INT8.
const BUILD_HOST_FACTOR: f64 = 5.0;

/// An engine's file per byte of weights (306 and 302 MB, 159 and 152 MB there), and of kernels besides.
const ENGINE_FACTOR: f64 = 1.04;
const ENGINE_KERNELS: f64 = 1e6;

/// The start of a tensor in an arena.
const ALIGN: u64 = 256;

/// A pass with its precision and bytes on a target.
struct Sized {
    pass: Pass,
    precision: Precision,
    float: Precision,
    /// Of the products with weights, the share at the precision's rate.
    quantised_share: f64,
    weight_bytes: f64,
    activation_bytes: u64,
    io_bytes: u64,
    state_bytes: u64,
}

fn sized(
    model: &ModelSpec,
    pass: Pass,
    target: &Target,
    precision: Precision,
    options: &PlanOptions,
) -> Sized {
    let gpu = target.compute_capability.is_some();
    let float = if gpu { precision.float() } else { Precision::Fp32 };
    let denoiser = pass.component.starts_with("denoiser");
    let precision = if denoiser { precision } else { float };
    let layers = model.dit.layers as u64;
    let kept = (options.keep_first_blocks + options.keep_last_blocks).min(layers);
    let quantised = match precision == float {
        true => 0.0,
        false => pass.quantisable as f64 * (layers - kept) as f64 / layers as f64,
    };
    let floats = pass.parameters as f64 - quantised;
    let weight_bytes =
        quantised * precision.weight_bytes() + (floats + pass.constants as f64) * float.weight_bytes();
    let wide = float.weight_bytes() as u64;
    let activations = if gpu { pass.activations_fused } else { pass.activations_stepwise };
    let branches = if pass.component == "denoiser_prefill" { model.workload.branches } else { 1 };
    // Keys and values are made by one half for the other: each context's are counted once, there. New caches are
    // written while the old ones are read; a still's are made and dropped.
    let state_bytes = wide
        * match pass.component.as_str() {
            "denoiser_prefill" => pass.edge.state_out * branches,
            "denoiser_cached" | "vae_decoder_first" => 0,
            _ => pass.edge.state_in + pass.edge.state_out,
        };
    Sized {
        quantised_share: quantised / (pass.quantisable.max(1) as f64),
        precision,
        float,
        weight_bytes,
        activation_bytes: activations * wide,
        io_bytes: pass.io_bytes,
        state_bytes,
        pass,
    }
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
    plan_of(model, passes(model), target, precision, options)
}

/// As [`plan`], of passes that were counted before.
fn plan_of(
    model: &ModelSpec,
    passes: Vec<Pass>,
    target: &Target,
    precision: Precision,
    options: &PlanOptions,
) -> Result<Plan, TargetError> {
    target.check_precision(precision)?;
    let sized: Vec<Sized> =
        passes.into_iter().map(|pass| sized(model, pass, target, precision, options)).collect();
    let components: Vec<ComponentPlan> = sized.iter().map(|s| component(s, model, target)).collect();
    let ways = options.keep.map_or(Keep::ALL.to_vec(), |keep| vec![keep]);
    let mut memory = memory_plan(&sized, target, options, ways[0]);
    for &keep in &ways[1..] {
        if memory.peak > memory.usable {
            memory = memory_plan(&sized, target, options, keep);
        }
    }
    let denoiser = components.iter().filter(|c| c.name.starts_with("denoiser"));
    let denoiser_teraflop_total = denoiser.map(|c| c.teraflop * c.calls as f64).sum();
    let time = |calls: fn(&Pass) -> u64| -> Option<f64> {
        let one = |(c, s): (&ComponentPlan, &Sized)| {
            Some((c.seconds? + c.copy_seconds.unwrap_or(0.0)) * calls(&s.pass) as f64)
        };
        components.iter().zip(&sized).map(one).sum()
    };
    let with_loads = |seconds: Option<f64>| seconds.map(|s| s + memory.load_seconds);
    let seconds_total = with_loads(time(|p| p.calls + p.intake_calls));
    let seconds_answer = with_loads(time(|p| p.calls));
    let engine_bytes = components.iter().map(|c| c.engine_bytes).sum::<u64>();
    let largest = sized.iter().map(|s| s.weight_bytes).fold(0.0, f64::max);
    Ok(Plan {
        model: model.name.clone(),
        target: target.name.clone(),
        precision,
        workload: model.workload.clone(),
        fits: memory.peak <= memory.usable,
        build: BuildPlan {
            engine_bytes,
            seconds: engine_bytes as f64 * BUILD_SECONDS_PER_BYTE,
            host_bytes: (largest * BUILD_HOST_FACTOR) as u64,
        },
        components,
        memory,
        denoiser_teraflop_total,
        seconds_total,
        seconds_answer,
    })
}

/// What one component takes and how long.
fn component(s: &Sized, model: &ModelSpec, target: &Target) -> ComponentPlan {
    let pass = &s.pass;
    // 8-bit attention: FP8 only, where the head size is a multiple of 16.
    let low_attention = s.precision == Precision::Fp8 && model.dit.head_dim.is_multiple_of(16);
    let attention_precision = if low_attention { Precision::Fp8 } else { s.float };
    let work = pass.flops.linear + pass.flops.convolution;
    // Weights are read once, but for the rows of an embedding that are not asked for; state is read and written.
    let weights = s.weight_bytes - pass.looked_up as f64 * s.float.weight_bytes();
    let state = (pass.edge.state_in + pass.edge.state_out) as f64 * s.float.weight_bytes();
    let products = [
        (work * s.quantised_share, s.precision),
        (work * (1.0 - s.quantised_share), s.float),
        (pass.flops.attention, attention_precision),
    ];
    let roofline = target.roofline(&products, weights + state);
    let at_rate = target.roofline(&[(pass.flops.products(), s.precision)], 0.0);
    ComponentPlan {
        name: pass.component.clone(),
        unit: pass.unit.clone(),
        precision: s.precision,
        parameters: pass.parameters,
        weight_bytes: s.weight_bytes as u64,
        engine_bytes: (s.weight_bytes * ENGINE_FACTOR + ENGINE_KERNELS) as u64,
        activation_bytes: s.activation_bytes,
        io_bytes: s.io_bytes,
        state_bytes: s.state_bytes,
        teraflop: pass.flops.products() / 1e12,
        teraflop_attention: pass.flops.attention / 1e12,
        calls: pass.calls + pass.intake_calls,
        seconds: roofline.map(|(seconds, _)| seconds),
        seconds_all_at_rate: at_rate.map(|(seconds, _)| seconds),
        copy_seconds: target.host_link_bytes_per_sec.map(|rate| s.io_bytes as f64 / rate),
        memory_bound: roofline.is_some_and(|(_, bytes)| bytes),
    }
}

/// Adds up what is in memory together when parts are kept in one way.
fn memory_plan(sized: &[Sized], target: &Target, options: &PlanOptions, keep: Keep) -> MemoryPlan {
    let find = |component: &str| sized.iter().find(|s| s.pass.component == component);
    let loaded: Vec<(Part, &Sized)> = parts(keep, &|component| find(component).is_some())
        .into_iter()
        .filter_map(|part| find(part.component).map(|s| (part, s)))
        .collect();
    let gpu = target.compute_capability.is_some();
    let default_workspace = if gpu { (1 << 30).min(target.usable_bytes() / 20) } else { 0 };
    let lanes = [Lane::Intake, Lane::Goal];
    let workspace =
        options.workspace_bytes.unwrap_or(default_workspace) * if gpu { lanes.len() as u64 } else { 0 };
    let of_lane = |lane: Lane, bytes: fn(&Sized) -> u64| {
        loaded.iter().filter(|(p, _)| p.lanes.contains(&lane)).map(|(_, s)| bytes(s)).max().unwrap_or(0)
    };
    let over_lanes = |bytes: fn(&Sized) -> u64| lanes.iter().map(|&lane| of_lane(lane, bytes)).sum::<u64>();
    let activations = over_lanes(|s| s.activation_bytes + s.io_bytes);
    let staging = if gpu && target.unified_memory { over_lanes(|s| s.io_bytes) } else { 0 };
    let state = loaded.iter().map(|(_, s)| s.state_bytes).sum::<u64>();
    // A slot is as large as its largest part. The text encoder, where it is unloaded after use, is there only while it
    // encodes.
    let slots = loaded.iter().map(|(p, _)| p.slot + 1).max().unwrap_or(0);
    let slot = |slot: usize, while_encoding: bool| {
        let members = loaded.iter().filter(|(p, _)| p.slot == slot);
        let there = members.filter(|(p, _)| while_encoding || !p.unloaded_after_use);
        there.map(|(_, s)| s.weight_bytes as u64).max().unwrap_or(0)
    };
    let weights = (0..slots).map(|i| slot(i, false)).sum::<u64>();
    let with_text = (0..slots).map(|i| slot(i, true)).sum::<u64>();
    let beside = activations + state + workspace + staging;
    let (run_total, text_total) = (weights + beside, with_text + beside);
    let takes_turns = |part: &Part| {
        part.unloaded_after_use || loaded.iter().filter(|(p, _)| p.slot == part.slot).count() > 1
    };
    let loaded_per_answer = loaded
        .iter()
        .filter(|(p, _)| takes_turns(p))
        .map(|(_, s)| s.weight_bytes as u64 * s.pass.turns)
        .sum::<u64>();
    MemoryPlan {
        keep,
        weights,
        activations,
        state,
        workspace,
        staging,
        run_total,
        text_total,
        peak: run_total.max(text_total),
        usable: target.usable_bytes(),
        loaded_per_answer,
        load_seconds: loaded_per_answer as f64 / DISK_BYTES_PER_SEC,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wan() -> ModelSpec {
        ModelSpec::from_toml(include_str!("../../../configs/models/wan22-5b.toml")).unwrap()
    }

    fn house() -> ModelSpec {
        ModelSpec::from_toml(include_str!("../../../configs/models/house-tiny.toml")).unwrap()
    }

    fn cached(model: ModelSpec, steps: u64, branches: u64) -> ModelSpec {
        let workload = Workload { steps, branches, cached_context: true, ..model.workload };
        ModelSpec { workload, ..model }
    }

    #[track_caller]
    fn close(got: f64, want: f64, tolerance: f64, what: &str) {
        assert!((got / want - 1.0).abs() < tolerance, "{what}: {got} against {want}");
    }

    fn part<'a>(plan: &'a Plan, name: &str) -> &'a ComponentPlan {
        plan.components.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Independent figures: torch's FLOP counter on the reference implementations, and published parameter counts.
    #[test]
    fn the_large_model_takes_what_its_reference_takes() {
        let target = Target::named("a100").unwrap();
        let plan = plan(&wan(), &target, Precision::Bf16, &PlanOptions::default()).unwrap();
        let denoiser = part(&plan, "denoiser");
        // What is published, and the projection of 24 camera channels to a width of 3072.
        assert_eq!(denoiser.parameters, 4_999_787_712 + 25 * 3072);
        assert_eq!(part(&plan, "text_encoder").parameters, 5_680_910_336);
        let vae = part(&plan, "vae_encoder_next").parameters + part(&plan, "vae_decoder_next").parameters;
        assert_eq!(vae, 704_688_668);
        close(denoiser.teraflop, 189.9, 0.01, "joint");
        close(plan.denoiser_teraflop_total, 18_989.0, 0.01, "50 steps of two branches");
        for (name, want) in [("vae_encoder_next", 1.487), ("vae_decoder_next", 7.836), ("text_encoder", 4.8)]
        {
            close(part(&plan, name).teraflop, want, 0.02, name);
        }
        // Of a first frame the past is zero: a third of each temporal kernel is left, which the reference multiplies whole.
        let first = part(&plan, "vae_encoder_first").teraflop;
        assert!(first > 0.495 / 3.0 && first < 0.495 / 2.5, "{first}");
        for (name, want) in [("denoiser", 10.0e9), ("text_encoder", 11.4e9), ("vae_decoder_next", 1.11e9)] {
            close(part(&plan, name).weight_bytes as f64, want, 0.01, name);
        }
    }

    /// What the hand-made sums of earlier plans forgot: pooled text, heads and camera rays.
    #[test]
    fn every_layer_of_the_small_model_is_counted() {
        let house = house();
        let passes = passes(&house);
        let denoiser = passes.iter().find(|p| p.component == "denoiser").unwrap();
        let exported = count_denoiser(&house.dit, 2, 0, 2);
        assert_eq!(denoiser.parameters, exported.parameters());
        let without = mindseye_engines::model::dit::DitConfig {
            pooled_text: false,
            lift: false,
            attributes: 0,
            guide: None,
            camera_channels: 0,
            ..house.dit.clone()
        };
        assert!(count_denoiser(&without, 2, 0, 2).parameters() < denoiser.parameters);
        // Six latents of context and six targets; four candidates; a first opinion of each.
        assert_eq!(denoiser.unit, "6 + 6 latents");
        let guided = Workload { steps: 6, branches: 2, ..house.workload.clone() };
        let passes = super::passes(&ModelSpec { workload: guided, ..house });
        assert_eq!(passes.iter().find(|p| p.component == "denoiser").unwrap().calls, 48 + 4);
    }

    /// Seconds at peak, worked out from the FLOP and the rates of the sheets.
    #[test]
    fn rooflines_are_work_over_rate() {
        for (target, precision, joint, encode, decode) in [
            ("a100", Precision::Bf16, 61.0, 0.0048, 1.13),
            ("h200", Precision::Bf16, 19.2, 0.0015, 0.357),
            ("orin-agx", Precision::Fp16, 447.0, 0.035, 8.3),
        ] {
            let planned =
                plan(&wan(), &Target::named(target).unwrap(), precision, &PlanOptions::default()).unwrap();
            let d = part(&planned, "denoiser");
            close(d.seconds_all_at_rate.unwrap() * d.calls as f64, joint, 0.02, target);
            close(part(&planned, "vae_encoder_next").seconds.unwrap(), encode, 0.05, target);
            close(part(&planned, "vae_decoder_next").seconds.unwrap() * 45.0, decode, 0.05, target);
        }
        // INT8 on the blocks' linear layers only gains 1.45.
        let orin = Target::named("orin-agx").unwrap();
        let seconds = |p| {
            let planned = plan(&wan(), &orin, p, &PlanOptions::default()).unwrap();
            part(&planned, "denoiser").seconds.unwrap()
        };
        close(seconds(Precision::Fp16) / seconds(Precision::Int8), 1.45, 0.05, "int8");
        for (slow, fast) in [("h100", "h200"), ("orin-nano", "orin-nano-super"), ("orin-nx", "orin-nx-super")]
        {
            let answer = |name: &str| {
                let target = Target::named(name).unwrap();
                let house = house();
                plan(&house, &target, target.best_precision(), &PlanOptions::default())
                    .unwrap()
                    .seconds_total
                    .unwrap()
            };
            assert!(answer(fast) <= answer(slow), "{fast} is no slower than {slow}");
        }
    }

    #[test]
    fn kept_context_is_counted_as_the_runtime_keeps_it() {
        let target = Target::named("a100").unwrap();
        let model = cached(wan(), 8, 2);
        let plan = plan(&model, &target, Precision::Bf16, &PlanOptions::default()).unwrap();
        let (prefill, steps) = (part(&plan, "denoiser_prefill"), part(&plan, "denoiser_cached"));
        // Keys and values of 85 latents and the first target, of both branches, 16 bits.
        assert_eq!(prefill.state_bytes, 2 * 86 * 104 * 2 * 3072 * 30 * 2);
        assert_eq!((prefill.calls, steps.calls), (2, 16));
        close(steps.teraflop, 67.1 * 45.0 / 46.0, 0.01, "45 latents that see 86");
        let weights = |name: &str| part(&plan, name).weight_bytes;
        assert_eq!(weights("denoiser_prefill"), weights("denoiser_cached"));
        // All: the text encoder and both halves of encoder and decoder, with the zeros that stand for the past of a
        // first frame; else one half of the decoder.
        for (keep, copies, least, most) in [(Keep::All, 2, 14.1e9, 14.5e9), (Keep::Halves, 1, 1.8e9, 2.0e9)] {
            let options = PlanOptions { keep: Some(keep), ..PlanOptions::default() };
            let plan = super::plan(&model, &target, Precision::Bf16, &options).unwrap();
            let rest = (plan.memory.weights - copies * weights("denoiser_cached")) as f64;
            assert!(rest > least && rest < most, "{keep}: {rest}");
            assert_eq!(plan.memory.loaded_per_answer > 0, keep == Keep::Halves);
        }
    }

    #[test]
    fn memory_adds_up_and_what_does_not_fit_is_refused_with_figures() {
        let m = wan();
        for (target, precision, fits) in [
            ("orin-nano", Precision::Bf16, false),
            ("orin-nx", Precision::Int8, false),
            ("orin-agx", Precision::Int8, true),
            ("a100", Precision::Bf16, true),
            ("h200", Precision::Fp8, true),
        ] {
            let p = plan(&m, &Target::named(target).unwrap(), precision, &PlanOptions::default()).unwrap();
            assert_eq!(p.fits, fits, "{target} {}", p.table());
            assert_eq!(p.refusal().is_none(), fits);
            let m = &p.memory;
            assert_eq!(m.run_total, m.weights + m.activations + m.state + m.workspace + m.staging);
            // Parts that take turns are loaded in both cases.
            assert!(p.seconds_total > p.seconds_answer, "{}", p.table());
        }
        // The text encoder is loaded while it encodes: a plan that keeps every part counts it all the time.
        let all = PlanOptions { keep: Some(Keep::All), ..PlanOptions::default() };
        let planned = plan(&m, &Target::named("l4").unwrap(), Precision::Int8, &all).unwrap();
        assert!(!planned.fits && planned.memory.peak > 20_000_000_000, "{}", planned.table());
        let nano = Target::named("orin-nano").unwrap();
        let text = plan(&m, &nano, Precision::Bf16, &PlanOptions::default()).unwrap().refusal().unwrap();
        for part in ["weights ", "activations", "context K/V", "workspace", "6.50 GB usable"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let fp8 = plan(&m, &nano, Precision::Fp8, &PlanOptions::default()).unwrap_err().to_string();
        assert!(fp8.contains("8.9"), "{fp8}");
    }

    #[test]
    fn the_small_model_fits_everywhere() {
        for t in Target::all() {
            let p = plan(&house(), &t, t.best_precision(), &PlanOptions::default()).unwrap();
            assert!(p.fits, "{}", p.table());
            assert_eq!(p.memory.keep, Keep::All);
        }
    }

    #[test]
    fn what_would_fit_instead_really_fits() {
        let (m, target) = (wan(), Target::named("a100-40").unwrap());
        let options = PlanOptions { keep: Some(Keep::All), ..PlanOptions::default() };
        let mut large = m.clone();
        large.workload.context_latents = 4000;
        assert!(!plan(&large, &target, Precision::Bf16, &options).unwrap().fits);
        let choices = alternatives(&large, &target, Precision::Bf16, &options).unwrap();
        assert!(choices.iter().any(|c| c.options.starts_with("--context ")), "{choices:?}");
        assert!(choices.iter().all(|c| c.plan.fits));
    }

    #[test]
    fn layers_add_up_to_their_component() {
        let (m, target) = (wan(), Target::named("orin-agx").unwrap());
        let all = layers(&m, &target, Precision::Int8, &PlanOptions::default()).unwrap();
        let of =
            |block: &str| all.iter().find(|l| l.name == format!("blocks.{block}.ffn.net.2.weight")).unwrap();
        for (block, precision) in [("0", Precision::Fp16), ("1", Precision::Int8), ("29", Precision::Fp16)] {
            assert_eq!(of(block).precision, precision, "block {block}");
        }
        assert_eq!((of("1").bytes, of("0").bytes), (3072 * 14336, 2 * 3072 * 14336));
        let planned = plan(&m, &target, Precision::Int8, &PlanOptions::default()).unwrap();
        let denoiser = part(&planned, "denoiser");
        let sum =
            |f: fn(&LayerPlan) -> f64| all.iter().filter(|l| l.component == "denoiser").map(f).sum::<f64>();
        // Biases, norms and tables are no layers.
        close(sum(|l| l.bytes as f64), denoiser.weight_bytes as f64, 0.001, "bytes");
        close(sum(|l| l.gigaflop), 1e3 * (denoiser.teraflop - denoiser.teraflop_attention), 0.001, "FLOP");
    }

    /// The machines that the large model is meant for.
    #[test]
    fn a_configuration_fits_the_large_orin_and_the_small_a100() {
        let targets = [Target::named("orin-agx").unwrap(), Target::named("a100-40").unwrap()];
        let plans = compare(&wan(), &targets, &PlanOptions::default()).unwrap();
        let table = compared(&plans);
        for target in targets {
            assert!(plans.iter().any(|p| p.target == target.name && p.fits && p.seconds_answer.is_some()));
            assert!(
                table.contains(&format!("* {}\n", target.name)) && !table.contains("nothing fits"),
                "{table}"
            );
        }
    }

    /// The table in the documentation is what the program prints. With `MINDSEYE_WRITE_DOCS` set it is written.
    #[test]
    fn the_documented_plans_are_those_of_the_program() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/plans.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (head, _) = text.split_once("\nPlans of ").unwrap();
        let table = compared_document(&wan(), &Target::all(), &PlanOptions::default()).unwrap();
        let wanted = format!("{head}\n{table}");
        if std::env::var_os("MINDSEYE_WRITE_DOCS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        }
        let now = std::fs::read_to_string(&path).unwrap();
        assert!(now == wanted, "docs/plans.md is old: run docs/plans.sh");
    }
}
