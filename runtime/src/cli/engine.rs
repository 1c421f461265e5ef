//! `mindseye engine`: targets, plans, builds, and looks at engines.

use super::progress::ProgressBar;
use super::{scenes, stop_flag};
use crate::mind::Pipeline;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use mindseye_base::sync::lock;
use mindseye_builder::pipeline::{self, BuildEvent, BuiltComponent, Request, Settings, Verified, Verify};
use mindseye_builder::plan::{self, CudaNeeds, ModelSpec, PlanOptions, alternatives, plan};
use mindseye_builder::quant::{
    CalibrationSource, Calibrator, Checks, Inputs, Report, Runner, Spooled, SyntheticDenoiser, TaskChange,
    Work, frames_within, part_inputs,
};
use mindseye_engines::backend::{
    Backend, PrepareOptions, RtenBackend, Session, State, Tensor, by_name, is_state,
};
use mindseye_engines::bundle::{Bundle, MANIFEST, TextSpec};
use mindseye_engines::onnx::Model;
use mindseye_engines::passport::{Passport, engines_in};
use mindseye_engines::residency::Keep;
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::{Precision, PrecisionRequest, Target};
use mindseye_engines::trt::{Library, LoadOptions, Progress, TensorRtBackend};
use serde_json::json;

/// Arguments of `mindseye engine`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  mindseye engine targets\n  mindseye engine plan models/house-tiny --target orin-agx\n  \
                  mindseye engine build models/house-tiny --target a100 --precision int8 --out engines/a100"
)]
pub struct EngineArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Machines that engines can be built for.
    Targets {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// What an engine would weigh and how fast it could be, without building it.
    Plan(PlanArgs),
    /// Quantises a bundle, checks it against fp32 and builds its engines.
    Build(Box<BuildArgs>),
    /// Passports of built engines, and their layers where a GPU is there.
    Inspect {
        /// Folder of engines.
        dir: PathBuf,
        /// TensorRT's library or its folder.
        #[arg(long, value_name = "PATH")]
        lib: Option<PathBuf>,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Compares the quantised graphs of built engines with fp32 on the CPU.
    Verify(VerifyArgs),
    /// Times built engines on this machine.
    Bench(BenchArgs),
}

#[derive(Args, Debug)]
struct TaskArgs {
    /// Run the grounding task with fp32 and with the quantised graph, too.
    #[arg(long)]
    task: bool,
    /// Houses of the task.
    #[arg(long, default_value_t = 24, value_name = "N")]
    task_houses: u64,
}

#[derive(Args, Debug)]
struct CacheArgs {
    /// Folder in which what was measured is kept, so that a stopped calibration goes on and a finished one is not made
    /// again [default: mindseye/calibration in XDG_CACHE_HOME or ~/.cache].
    #[arg(long, value_name = "DIR")]
    calibration_cache: Option<PathBuf>,
}

impl CacheArgs {
    fn folder(&self) -> Option<PathBuf> {
        self.calibration_cache.clone().or_else(|| {
            let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
            let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
            Some(cache.join("mindseye/calibration"))
        })
    }
}

#[derive(Args, Debug)]
struct VerifyArgs {
    /// Folder of engines.
    dir: PathBuf,
    /// The bundle, where it has moved since the build.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// The bag that was calibrated with, where it has moved since the build.
    #[arg(long, value_name = "BAG")]
    bag: Option<PathBuf>,
    /// CPU backend that runs both graphs.
    #[arg(long, default_value = "rten")]
    backend: String,
    /// Also every layer: its precision, what it adds to the error, bytes and arithmetic.
    #[arg(long)]
    layers: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    task: TaskArgs,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct BenchArgs {
    /// Folder of engines.
    dir: PathBuf,
    /// The bundle, where it has moved since the build.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// TensorRT's library or its folder.
    #[arg(long, value_name = "PATH")]
    lib: Option<PathBuf>,
    /// Backend for graphs: rten, onnxruntime, cuda or cuda-f32.
    #[arg(long, default_value = "rten")]
    backend: String,
    /// Runs that are timed.
    #[arg(long, default_value_t = 20, value_name = "N")]
    runs: usize,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct PlanArgs {
    /// A bundle's folder, or a model file (configs/models/*.toml).
    bundle: PathBuf,
    /// Machine: a name of `engine targets`, or a target file. With --compare: all machines where none is named.
    #[arg(long, required_unless_present_any = ["compare", "backend"])]
    target: Option<String>,
    /// Instead of engines that are built: what cuda (products in bf16) or cuda-f32 needs to run the graphs.
    #[arg(long, value_name = "cuda|cuda-f32", conflicts_with_all = ["compare", "layers"])]
    backend: Option<String>,
    /// fp32, fp16, bf16, int8, int4w, fp8 or auto.
    #[arg(long, default_value = "auto")]
    precision: String,
    /// Context latents [default: the most that it allows, as in the engines' profiles].
    #[arg(long, value_name = "N")]
    context: Option<u64>,
    /// Target latents [default: the most that it allows, as in the engines' profiles].
    #[arg(long, value_name = "N")]
    targets: Option<u64>,
    /// Denoising steps [default: the sampler's].
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Guidance weight; 1 is one pass per step, any other two [default: the sampler's].
    #[arg(long, value_name = "W")]
    guidance: Option<f64>,
    /// Rollouts per answer [default: 4 with pose heads, 1 without].
    #[arg(long, value_name = "N")]
    candidates: Option<u64>,
    /// The context's keys and values are computed once (a model trained with the one-way mask).
    #[arg(long, conflicts_with = "joint")]
    cached: bool,
    /// Context and targets at every step [default: what the bundle holds; joint for a model file].
    #[arg(long)]
    joint: bool,
    /// What stays in memory between its uses: all, halves, one, or auto (the most that fits).
    #[arg(long, default_value = "auto", value_name = "all|halves|one|auto")]
    keep_loaded: String,
    /// One table over all precisions, joint and cached, of all machines or of the one named.
    #[arg(long)]
    compare: bool,
    /// Also every layer: its precision, bytes and arithmetic.
    #[arg(long, conflicts_with = "compare")]
    layers: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct BuildArgs {
    /// The bundle's folder.
    bundle: PathBuf,
    /// Machine: a name of `engine targets`, or a target file.
    #[arg(long)]
    target: String,
    /// fp32, fp16, bf16, int8, int4w, fp8 or auto.
    #[arg(long, default_value = "auto")]
    precision: String,
    /// Folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// TensorRT's library or its folder [default: MINDSEYE_TENSORRT_LIB_DIR, then the usual places].
    #[arg(long, value_name = "PATH")]
    lib: Option<PathBuf>,
    /// Quantise and check only, and write the ONNX graphs: works without TensorRT, for any target.
    #[arg(long)]
    graphs_only: bool,
    /// Graphs in opset 23, with Attention, RMSNormalization and RotaryEmbedding where the network has them.
    #[arg(long, requires = "graphs_only")]
    fused: bool,
    /// SmoothQuant's alpha for int8; 0 switches it off.
    #[arg(long, default_value_t = 0.5, value_name = "ALPHA")]
    smooth: f32,
    /// Choice of int8 ranges: max, entropy, or percentile:99.99.
    #[arg(long, default_value = "max")]
    calibrator: String,
    /// Weights per scale of int4w: 64 or 128.
    #[arg(long, default_value_t = 128, value_name = "N")]
    block: usize,
    /// Blocks kept in float at the start.
    #[arg(long, default_value_t = 1, value_name = "N")]
    keep_first: usize,
    /// Blocks kept in float at the end.
    #[arg(long, default_value_t = 1, value_name = "N")]
    keep_last: usize,
    /// A layer to keep in float (a name or a part of one); may be given several times.
    #[arg(long, value_name = "LAYER")]
    keep: Vec<String>,
    /// Keep the worst layers in float until the target's limits are met.
    #[arg(long)]
    auto_exclude: bool,
    /// What to calibrate with: scenes (rendered houses), noise, or a bag's path [default: scenes where the bundle
    /// knows their things, else noise].
    #[arg(long, value_name = "scenes|noise|BAG")]
    calibrate_with: Option<String>,
    /// What to look for while calibrating with a bag; may be given several times.
    #[arg(long, value_name = "TEXT")]
    calibration_goal: Vec<String>,
    /// Calibration items.
    #[arg(long, default_value_t = 32, value_name = "N")]
    calibration_items: u64,
    /// Seed of the calibration items.
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    calibration_seed: u64,
    /// Most memory for calibration and checks, GB: scenes and bags need four times the denoiser's weights, noise is made
    /// of as many latents as fit.
    #[arg(long, default_value_t = 8.0, value_name = "GB")]
    calibration_memory: f64,
    /// Items that the check runs over; others than those of the calibration.
    #[arg(long, default_value_t = 8, value_name = "N")]
    verify_items: u64,
    /// Context latents at most [default: the bundle's limit].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Target latents at most [default: the bundle's limit].
    #[arg(long, value_name = "N")]
    targets: Option<usize>,
    /// What the runtime keeps in memory between its uses: all, halves, one, or auto (the most that fits).
    #[arg(long, default_value = "auto", value_name = "all|halves|one|auto")]
    keep_loaded: String,
    /// The builder's effort, 0 to 5 [default: TensorRT's own].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=5))]
    optimization_level: Option<u8>,
    /// Scratch memory for kernels, MiB [default: TensorRT's choice].
    #[arg(long, value_name = "MIB")]
    workspace: Option<u64>,
    /// File of kernel timings, read if there and written back.
    #[arg(long, value_name = "FILE")]
    timing_cache: Option<PathBuf>,
    /// Let the engine run on other Ampere and later GPUs.
    #[arg(long)]
    hardware_compatible: bool,
    /// Let the engine run on later TensorRT versions of the same major.
    #[arg(long)]
    version_compatible: bool,
    /// Leave the quantised ONNX graphs beside the engines.
    #[arg(long)]
    keep_onnx: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    task: TaskArgs,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Runs `mindseye engine`.
///
/// # Errors
/// What was refused or failed, in one line.
pub fn run(args: &EngineArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Targets { json } => targets(*json),
        Command::Plan(args) => plan_command(args),
        Command::Build(args) => build(args),
        Command::Inspect { dir, lib, json } => inspect(dir, lib.as_deref(), *json),
        Command::Verify(args) => verify(args),
        Command::Bench(args) => bench(args),
    }
}

fn out(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("stdout")
}

fn document(value: &serde_json::Value) -> anyhow::Result<()> {
    out(&serde_json::to_string_pretty(value).context("json")?)
}

fn targets(json: bool) -> anyhow::Result<ExitCode> {
    let all = Target::all();
    if json {
        document(&json!({ "targets": all }))?;
        return Ok(ExitCode::SUCCESS);
    }
    out(&format!(
        "{:<15} {:<32} {:>5} {:>8} {:>6}  {:<38} {:<11} builds",
        "name", "machine", "sm", "memory", "GB/s", "precisions (auto)", "TensorRT"
    ))?;
    for t in all {
        let precisions: Vec<&str> = t.precisions.iter().map(|p| p.name()).collect();
        let releases: Vec<String> = t.tensorrt.iter().map(ToString::to_string).collect();
        let builds = match (t.compute_capability, t.tensorrt_rtx, t.tensorrt_rtx_supported) {
            (None, ..) => "graphs only",
            (_, true, true) => "anywhere with TensorRT-RTX, or on it",
            (_, true, false) => "anywhere with TensorRT-RTX (builds, unsupported), or on it",
            (_, false, _) => "on it",
        };
        out(&format!(
            "{:<15} {:<32} {:>5} {:>5} GB {:>6}  {:<38} {:<11} {builds}",
            t.name,
            t.title,
            t.compute_capability.map_or("-".into(), |c| c.to_string()),
            t.memory_bytes / 1_000_000_000,
            t.bandwidth_bytes_per_sec.map_or("-".into(), |b| format!("{:.0}", b / 1e9)),
            format!("{} ({})", precisions.join(" "), t.best_precision()),
            if releases.is_empty() { "-".into() } else { releases.join(", ") }
        ))?;
    }
    out("TensorRT: the lowest release of each major that runs there.")?;
    Ok(ExitCode::SUCCESS)
}

fn resolve(target: &str, precision: &str) -> anyhow::Result<(Target, Precision)> {
    let target = Target::named(target)?;
    let request: PrecisionRequest = precision.parse()?;
    let precision = target.resolve(request)?;
    Ok((target, precision))
}

/// The model that is planned for, run as the arguments say.
fn planned_model(args: &PlanArgs) -> anyhow::Result<ModelSpec> {
    let mut model = if args.bundle.is_dir() {
        ModelSpec::from_manifest(Bundle::load_manifest(&args.bundle)?.manifest())?
    } else {
        let place = || args.bundle.display().to_string();
        let text = std::fs::read_to_string(&args.bundle).with_context(place)?;
        ModelSpec::from_toml(&text)
            .with_context(|| format!("{} is neither a bundle nor a model file", place()))?
    };
    let w = &mut model.workload;
    for (given, size) in [
        (args.context, &mut w.context_latents),
        (args.targets, &mut w.target_latents),
        (args.steps, &mut w.steps),
        (args.candidates, &mut w.candidates),
    ] {
        *size = given.unwrap_or(*size);
    }
    match args.guidance {
        Some(g) if !(g.is_finite() && g > 0.0) => bail!("--guidance {g} is not a positive number"),
        Some(g) => w.branches = if g == 1.0 { 1 } else { 2 },
        None => {}
    }
    w.cached_context = args.cached || (w.cached_context && !args.joint);
    model.check()?;
    Ok(model)
}

/// What stays in memory; `auto` leaves it to the plan.
fn keep_loaded(text: &str) -> anyhow::Result<Option<Keep>> {
    match text {
        "auto" => Ok(None),
        way => Ok(Some(way.parse()?)),
    }
}

fn plan_command(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let model = planned_model(args)?;
    let keep = keep_loaded(&args.keep_loaded)?;
    let options = PlanOptions { keep, ..PlanOptions::default() };
    if args.compare {
        return compare(&model, args, &options);
    }
    if let Some(backend) = &args.backend {
        return cuda_plan(&model, backend, args);
    }
    let name = args.target.as_deref().context("--target is missing")?;
    let (target, precision) = resolve(name, &args.precision)?;
    let planned = plan(&model, &target, precision, &options)?;
    let layers = args
        .layers
        .then(|| plan::layers(&model, &target, precision, &options))
        .transpose()?
        .unwrap_or_default();
    let Some(refusal) = planned.refusal() else {
        if args.json {
            document(&json!({ "plan": planned, "refusal": null, "layers": layers }))?;
        } else {
            out(planned.table().trim_end())?;
            print_layers(&layers)?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let fitting = alternatives(&model, &target, precision, &options)?;
    if args.json {
        let fitting: Vec<_> =
            fitting.iter().map(|c| json!({ "options": c.options, "plan": c.plan })).collect();
        document(&json!({ "plan": planned, "refusal": refusal, "would_fit": fitting }))?;
    } else {
        out(planned.table().trim_end())?;
    }
    let names: Vec<&str> = fitting.iter().map(|c| c.options.as_str()).collect();
    match names.as_slice() {
        [] => bail!("{refusal}; no other precision, kept context or shorter context fits either"),
        names => bail!("{refusal}; what would fit: {}", names.join(", or ")),
    }
}

/// What the CUDA engine of our own needs: nothing is built for it, so there are graphs and memory to plan only.
fn cuda_plan(model: &ModelSpec, backend: &str, args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let precision = match backend {
        "cuda" => Precision::Bf16,
        "cuda-f32" => Precision::Fp32,
        other => bail!("--backend {other}: cuda and cuda-f32 are planned for; TensorRT by --target"),
    };
    let target = args.target.as_deref().map(Target::named).transpose()?;
    let all = plan::cuda_needs(model, precision)?;
    let bytes = |c: &plan::CudaNeeds| c.needs.weight_bytes + c.needs.arena_bytes + c.needs.state_bytes;
    let total: u64 = all.iter().map(bytes).sum();
    let refusal = target.filter(|t| total > t.memory_bytes).map(|t| {
        let (wanted, there) = (total as f64 / 1e9, t.memory_bytes as f64 / 1e9);
        format!("{} does not fit on {}: {wanted:.2} GB wanted, {there:.0} GB there", model.name, t.name)
    });
    if args.json {
        document(&json!({ "backend": backend, "components": all, "bytes": total, "refusal": refusal }))?;
    } else {
        out(&format!(
            "{:<20} {:>12} {:>12} {:>12} {:>8}",
            "component", "weights, MB", "values, MB", "state, MB", "kernels"
        ))?;
        for CudaNeeds { component, needs: n } in &all {
            let mb = |bytes: u64| bytes as f64 / 1e6;
            out(&format!(
                "{component:<20} {:>12.1} {:>12.1} {:>12.1} {:>8}",
                mb(n.weight_bytes),
                mb(n.arena_bytes),
                mb(n.state_bytes),
                n.launches
            ))?;
        }
        out(&format!("all of it at once: {:.2} GB", total as f64 / 1e9))?;
    }
    match refusal {
        None => Ok(ExitCode::SUCCESS),
        Some(refusal) => bail!("{refusal}"),
    }
}

fn print_layers(layers: &[plan::LayerPlan]) -> anyhow::Result<()> {
    for l in layers {
        out(&format!(
            "{:<17} {:<58} {:<5} {:>10.3} MB {:>12.3} GFLOP",
            l.component,
            l.name,
            l.precision.name(),
            l.bytes as f64 / 1e6,
            l.gigaflop
        ))?;
    }
    Ok(())
}

/// One table over targets and precisions.
fn compare(model: &ModelSpec, args: &PlanArgs, options: &PlanOptions) -> anyhow::Result<ExitCode> {
    let targets = match &args.target {
        Some(name) => vec![Target::named(name)?],
        None => Target::all(),
    };
    if args.json {
        document(&json!({ "plans": plan::compare(model, &targets, options)? }))?;
    } else {
        out(plan::compared_document(model, &targets, options)?.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

const SCENES: &str = "scenes";
const NOISE: &str = "noise";
/// Memory of answering goals on the CPU, per byte of the denoiser: its weights as read and as the kernels want them, and the
/// rest of the model.
const DENOISER_COPIES: f64 = 4.0;

/// Bytes of the denoiser's weights.
fn denoiser_bytes(bundle: &Bundle) -> u64 {
    let files = |c| bundle.component(c).map_or(0, |c| c.files.iter().map(|f| f.bytes).sum());
    files(DenoiserKind::Joint.component())
}

/// What to calibrate with when nothing was said: rendered houses where the bundle can be asked for their things.
fn default_calibration(bundle: &Bundle, screen: &Mutex<ProgressBar>) -> String {
    let why = match &bundle.manifest().networks.text {
        Some(TextSpec::Closed { words, .. }) if scenes::knows_houses(words) => return SCENES.into(),
        _ => "the bundle does not know the things of the rendered houses",
    };
    lock(screen).line(&format!(
        "calibrating with noise, not with scenes: {why}; a bag is better: --calibrate-with BAG"
    ));
    NOISE.into()
}

type Source = Box<dyn CalibrationSource>;

/// Inputs for the calibration, and others for the comparison. Noise has the sizes that were asked for, else those of the
/// training, as far as they fit into the memory that measuring may take.
fn sources(
    bundle: &Bundle,
    settings: &Settings,
    screen: &Mutex<ProgressBar>,
) -> anyhow::Result<(Source, Source)> {
    use scenes::Share::{Calibration, HeldOut};
    let (items, held_out, seed) =
        (settings.calibration_items, settings.verify_items.max(1), settings.calibration_seed);
    let (m, memory) = (bundle.manifest(), settings.calibration_memory as f64 / 1e9);
    if settings.calibration == NOISE {
        let context = settings.context_latents.unwrap_or(m.limits.context_trained).max(1);
        let targets = settings.target_latents.unwrap_or(m.limits.target_trained).max(1);
        let frames = frames_within(&m.dit, context + targets, settings.calibration_memory);
        let targets = targets.min(frames - 1);
        if frames - targets < context {
            lock(screen).line(&format!(
                "noise of {} + {targets} latents: more do not fit into the {memory:.1} GB that measuring may take \
                 (--calibration-memory)",
                frames - targets
            ));
        }
        let context = frames - targets;
        let noise =
            |items, seed| SyntheticDenoiser::new(m.dit.clone(), context, targets, m.rope.gap, items, seed);
        return Ok((Box::new(noise(items, seed)), Box::new(noise(held_out, !seed))));
    }
    // Scenes and bags are answered by the whole network, on the CPU.
    let needed = DENOISER_COPIES * denoiser_bytes(bundle) as f64 / 1e9;
    if needed > memory {
        bail!(
            "answering goals takes about {needed:.1} GB with this denoiser, of {memory:.1} GB that calibration may take: \
             allow more with --calibration-memory, or use --calibrate-with noise"
        );
    }
    let pipeline = Pipeline::load(bundle.directory(), "rten", 0)?;
    let (calibration, held_out) = if settings.calibration == SCENES {
        if !scenes::knows_houses(pipeline.words()) {
            bail!(
                "{} does not know the things of the rendered houses: use --calibrate-with BAG or noise",
                bundle.directory().display()
            );
        }
        (
            scenes::from_houses(&pipeline, Calibration, seed, items)?,
            scenes::from_houses(&pipeline, HeldOut, seed, held_out)?,
        )
    } else {
        let (bag, goals) = (Path::new(&settings.calibration), settings.calibration_goals.as_slice());
        (
            scenes::from_bag(&pipeline, bag, goals, Calibration, seed, items)?,
            scenes::from_bag(&pipeline, bag, goals, HeldOut, seed, held_out)?,
        )
    };
    let spool = |inner| Spooled::new(inner).map_err(anyhow::Error::msg);
    Ok((Box::new(spool(calibration)?), Box::new(spool(held_out)?)))
}

fn calibrator(text: &str) -> anyhow::Result<Calibrator> {
    match text.split_once(':') {
        None if text == "max" => Ok(Calibrator::Max),
        None if text == "entropy" => Ok(Calibrator::Entropy),
        Some(("percentile", p)) => Ok(Calibrator::Percentile(p.parse().context("--calibrator percentile")?)),
        _ => bail!("--calibrator {text}: use max, entropy or percentile:99.99"),
    }
}

fn size(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// Shows work on the screen.
fn show(screen: &Mutex<ProgressBar>, work: Work) {
    let (what, done, of) = match work {
        Work::Weights { done, of } => ("read weights", done, of),
        Work::Inputs { done, of } => ("make inputs", done, of.unwrap_or(done)),
        Work::Calibrate { done, of } => ("calibrate", done, of.unwrap_or(done)),
        Work::Smooth { done, of } => ("smooth", done, of),
        Work::Pack { done, of } => ("pack weights", done, of),
        Work::Compare { done, of } => ("compare with fp32", done, of),
        Work::Layers { done, of } => ("look for the worst layers", done, of),
        // The houses have a bar of their own.
        Work::Task(_) => return,
    };
    lock(screen).bar(what, size(done), size(of));
}

/// Shows a build: a bar on a terminal, one line per component elsewhere.
fn reporter(screen: &Arc<Mutex<ProgressBar>>) -> Arc<dyn Fn(BuildEvent) + Send + Sync> {
    let terminal = std::io::stderr().is_terminal();
    let screen = Arc::clone(screen);
    Arc::new(move |stage| match stage {
        BuildEvent::Component(name, index, count) => {
            lock(&screen).line(&format!("{name} ({} of {count})", index + 1));
        }
        BuildEvent::Quantise(work) => show(&screen, work),
        // TensorRT's phases are many and small: only a person watching wants them.
        BuildEvent::Build(Progress::Step { name, done, steps }) if terminal && done < steps => {
            lock(&screen).bar(&name, done as usize, steps as usize);
        }
        BuildEvent::Build(_) => {}
    })
}

fn task(
    args: &TaskArgs,
    bundle: &Bundle,
    cancel: &Arc<AtomicBool>,
    screen: &Arc<Mutex<ProgressBar>>,
) -> Option<scenes::HouseTask> {
    args.task.then(|| {
        let screen = Arc::clone(screen);
        let progress = Arc::new(move |done, of| lock(&screen).bar("task", size(done), size(of)));
        scenes::HouseTask::new(bundle.directory(), args.task_houses, Arc::clone(cancel), progress)
    })
}

/// The settings that the arguments make; what to calibrate with is chosen later.
fn build_settings(args: &BuildArgs, precision: Precision) -> anyhow::Result<Settings> {
    let mut settings = Settings::new(&args.bundle, &args.target, precision);
    if precision == Precision::Int8 {
        settings.smooth_alpha = (args.smooth > 0.0).then_some(args.smooth);
    }
    settings.calibrator = calibrator(&args.calibrator)?;
    settings.block = args.block;
    settings.keep_first_blocks = args.keep_first;
    settings.keep_last_blocks = args.keep_last;
    settings.keep.clone_from(&args.keep);
    settings.calibration_goals.clone_from(&args.calibration_goal);
    settings.calibration_items = args.calibration_items.max(1);
    settings.calibration_seed = args.calibration_seed;
    if !(args.calibration_memory.is_finite() && args.calibration_memory > 0.0) {
        bail!("--calibration-memory {} is not a positive number of GB", args.calibration_memory);
    }
    settings.calibration_memory = (args.calibration_memory * 1e9) as u64;
    settings.verify_items = args.verify_items.max(1);
    settings.context_latents = args.context;
    settings.target_latents = args.targets;
    settings.keep_loaded = keep_loaded(&args.keep_loaded)?;
    settings.optimization_level = args.optimization_level;
    settings.fused = args.fused;
    Ok(settings)
}

fn build(args: &BuildArgs) -> anyhow::Result<ExitCode> {
    let (target, precision) = resolve(&args.target, &args.precision)?;
    let bundle = Bundle::load(&args.bundle)?;
    let screen = Arc::new(Mutex::new(ProgressBar::new(args.json)));
    let mut settings = build_settings(args, precision)?;
    let planned = pipeline::plan_bundle(&bundle, &target, &settings)?;
    if let Some(refusal) = planned.refusal() {
        bail!(refusal);
    }
    let library = match target.compute_capability {
        Some(_) if !args.graphs_only => Some(Library::find(&LoadOptions::at(args.lib.clone()))?),
        _ => None,
    };
    // What the library cannot build is said before minutes of calibration.
    pipeline::check_library(&target, library.as_ref(), args.graphs_only)?;
    settings.calibration = match (&args.calibrate_with, precision) {
        (Some(with), _) => with.clone(),
        (None, Precision::Int8 | Precision::Fp8 | Precision::Int4w) => default_calibration(&bundle, &screen),
        (None, _) => NOISE.into(),
    };
    let (mut calibration, mut held_out) = sources(&bundle, &settings, &screen)?;
    let runner = Runner::new(Arc::new(RtenBackend)).keeping(args.cache.folder());
    let cancel = stop_flag()?;
    let task = task(&args.task, &bundle, &cancel, &screen);
    if !args.json {
        let with = match precision {
            Precision::Int8 | Precision::Fp8 => format!(", calibrated with {}", calibration.describe()),
            _ => String::new(),
        };
        out(&format!("{} in {precision} for {}{with}", bundle.manifest().name, target.name))?;
    }
    let built = pipeline::build_bundle(Request {
        bundle: &bundle,
        settings,
        target: &target,
        out: &args.out,
        library: library.as_ref(),
        graphs_only: args.graphs_only,
        runner: &runner,
        calibration: calibration.as_mut(),
        held_out: held_out.as_mut(),
        task: task.as_ref().map(|t| t as _),
        auto_exclude: args.auto_exclude,
        keep_onnx: args.keep_onnx,
        workspace_bytes: args.workspace.map(|m| m << 20),
        timing_cache: args.timing_cache.clone(),
        hardware_compatible: args.hardware_compatible,
        version_compatible: args.version_compatible,
        cancel,
        progress: reporter(&screen),
    })?;
    if args.json {
        document(
            &json!({ "target": target.name, "precision": precision, "out": args.out, "engines": built }),
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    for engine in &built {
        print_built(engine)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_built(b: &BuiltComponent) -> anyhow::Result<()> {
    let p = &b.passport;
    out(&format!(
        "{:<16} {:<5} {:>9.2} MB {:>7.1} s  {}",
        p.component,
        p.precision,
        p.engine_bytes as f64 / 1e6,
        p.build_seconds + b.quantise_seconds,
        b.file.display()
    ))?;
    if let Some(report) = &b.report {
        for (name, error) in &report.outputs {
            out(&format!("  {name}: relative L2 {error:.5} against fp32 over {} items", report.samples))?;
        }
        print_task(report)?;
    }
    Ok(())
}

fn print_task(report: &Report) -> anyhow::Result<()> {
    let Some(change) = &report.task else { return Ok(()) };
    let TaskChange { fp32, quantised: low, .. } = change;
    out(&format!(
        "  task in {} houses: success {:.3} -> {:.3} ({:+.3}; changed in {}), consistency {:.3} -> {:.3} ({:+.3})",
        low.scenes,
        fp32.success,
        low.success,
        low.success - fp32.success,
        change.success_changed,
        fp32.consistency,
        low.consistency,
        low.consistency - fp32.consistency
    ))?;
    if let (Some(metres), Some(degrees)) = (change.pose_shift_m, change.pose_shift_deg) {
        out(&format!(
            "    answers move by {metres:.3} m and {degrees:.1} degrees (medians); status changed in {}",
            change.status_changed
        ))?;
    }
    Ok(())
}

fn inspect(dir: &Path, lib: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let engines = engines_in(dir)?;
    // Layers need a GPU: without one the passports are all there is to see.
    let backend = TensorRtBackend::open(&LoadOptions::at(lib.map(Path::to_owned)), 0);
    let (mut layers, mut problems) = (Vec::new(), Vec::new());
    for (file, passport) in &engines {
        let problem = passport.check_files(file).err().map(|e| e.to_string());
        let text = match (&backend, passport.library.starts_with("tensorrt"), &problem) {
            (Ok(backend), true, None) => Some(backend.layers(file)?),
            _ => None,
        };
        layers.push(text);
        problems.push(problem);
    }
    if json {
        let all: Vec<_> = engines
            .iter()
            .zip(&layers)
            .zip(&problems)
            .map(|(((file, passport), layers), problem)| {
                json!({ "file": file, "passport": passport, "layers": layers, "problem": problem })
            })
            .collect();
        document(&json!({ "engines": all }))?;
    } else {
        for (((file, p), layers), problem) in engines.iter().zip(&layers).zip(&problems) {
            print_passport(file, p)?;
            if let Some(text) = layers {
                out(&format!("  {text}"))?;
            }
            if let Some(problem) = problem {
                out(&format!("  not usable: {problem}"))?;
            }
        }
        if let Err(reason) = backend {
            eprintln!("layers not shown: {reason}");
        }
    }
    match problems.into_iter().flatten().next() {
        None => Ok(ExitCode::SUCCESS),
        Some(problem) => bail!(problem),
    }
}

fn print_passport(file: &Path, p: &Passport) -> anyhow::Result<()> {
    out(&format!("{} ({:.2} MB)", file.display(), p.engine_bytes as f64 / 1e6))?;
    let cc = p.compute_capability.map_or("-".into(), |c| c.to_string());
    out(&format!("  {} in {} for {} (compute capability {cc})", p.component, p.precision, p.target))?;
    out(&format!(
        "  {} {}, built in {:.1} s by {}",
        p.library, p.library_version, p.build_seconds, p.tool_version
    ))?;
    out(&format!("  bundle {}  graph {}", &short(&p.bundle_sha256), &short(&p.graph_sha256)))?;
    if !p.kept_high.is_empty() {
        out(&format!("  {} layers kept in {}", p.kept_high.len(), p.precision.float()))?;
    }
    if let Some(v) = &p.verification {
        for (name, error) in &v.outputs {
            out(&format!("  {name}: relative L2 {error:.5} over {} items", v.samples))?;
        }
    }
    Ok(())
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// The bundle of a folder of engines.
fn bundle_of(settings: &Settings, given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let place = given.unwrap_or(&settings.bundle);
    if !place.join(MANIFEST).is_file() {
        bail!("{} is no bundle (any more): pass --bundle", place.display());
    }
    Ok(place.to_owned())
}

fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let mut settings = pipeline::settings_of(&args.dir)?;
    let bundle = Bundle::load(bundle_of(&settings, args.bundle.as_deref())?)?;
    let target = Target::named(&settings.target)?;
    let cpu = by_name(&args.backend)?;
    if settings.calibration != SCENES && settings.calibration != NOISE {
        if let Some(bag) = &args.bag {
            settings.calibration = bag.display().to_string();
        } else if !Path::new(&settings.calibration).exists() {
            bail!("{} is not there (any more): pass --bag", settings.calibration);
        }
    }
    let screen = Arc::new(Mutex::new(ProgressBar::new(args.json)));
    let (mut calibration, mut held_out) = sources(&bundle, &settings, &screen)?;
    let runner = Runner::new(Arc::clone(&cpu)).keeping(args.cache.folder());
    let cancel = stop_flag()?;
    let task = task(&args.task, &bundle, &cancel, &screen);
    let mut tell = |work| {
        show(&screen, work);
        !cancel.load(Ordering::Relaxed)
    };
    let checks = Checks {
        runner: &runner,
        calibration: calibration.as_mut(),
        held_out: held_out.as_mut(),
        samples: settings.verify_items.max(1),
        tell: &mut tell,
    };
    let all = pipeline::verify_built(
        &args.dir,
        Verify {
            bundle: &bundle,
            target: &target,
            checks,
            task: task.as_ref().map(|t| t as _),
            layers: args.layers,
        },
    )?;
    if args.json {
        document(&json!({ "backend": cpu.name(), "limits": target.limits, "verified": all }))?;
    } else {
        for v in &all {
            print_verified(v)?;
        }
    }
    match all.iter().find_map(|v| v.past.as_ref()) {
        None => Ok(ExitCode::SUCCESS),
        Some((what, got, limit)) => bail!("{what} has relative L2 error {got:.4}, the limit is {limit:.3}"),
    }
}

fn print_verified(v: &Verified) -> anyhow::Result<()> {
    out(&format!("{} in {} over {} items ({})", v.component, v.precision, v.report.samples, v.inputs))?;
    for (name, error) in v.report.outputs.iter().chain(&v.report.blocks) {
        let plain = v
            .without_smoothing
            .as_ref()
            .and_then(|r| r.outputs.get(name).or_else(|| r.blocks.get(name)))
            .map_or(String::new(), |e| format!(" (without SmoothQuant {e:.5})"));
        out(&format!("  {name}: relative L2 {error:.5}{plain}"))?;
    }
    for l in &v.layers {
        let share = l.error_share.map_or("-".into(), |share| format!("{:.1} %", 100.0 * share));
        out(&format!(
            "  {:<46} {:<5} {:>8} of the error {:>10.3} MB {:>12.3} GFLOP",
            l.name,
            l.precision.name(),
            share,
            l.bytes as f64 / 1e6,
            l.gigaflop
        ))?;
    }
    print_task(&v.report)
}

/// Times of one engine, milliseconds, sorted.
struct Timed {
    component: String,
    precision: Precision,
    backend: &'static str,
    millis: Vec<f64>,
    /// Copies in, work, copies out, where the backend tells them apart.
    steps: Option<[Vec<f64>; 3]>,
    /// Of the bundle's own fp32 graph, in turns with the engine (CPU only).
    fp32_millis: Option<Vec<f64>>,
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    sorted.get((sorted.len().saturating_sub(1) as f64 * p) as usize).copied().unwrap_or(f64::NAN)
}

/// What engines are timed with.
struct Bench<'a> {
    bundle: &'a Bundle,
    settings: Settings,
    engines: Vec<(PathBuf, Passport)>,
    runner: Runner,
    /// TensorRT, where there are engines of it.
    gpu: Option<TensorRtBackend>,
    runs: usize,
}

/// The part that leaves the state which a part reads.
fn maker(component: &str) -> Option<String> {
    if component == DenoiserKind::Cached.component() {
        return Some(DenoiserKind::Prefill.component().into());
    }
    component.strip_suffix("_next").map(|part| format!("{part}_first"))
}

impl Bench<'_> {
    fn backend(&self, passport: &Passport) -> &dyn Backend {
        match &self.gpu {
            Some(gpu) if passport.library != "onnx" => gpu,
            _ => self.runner.backend(),
        }
    }

    fn session(&self, component: &str) -> anyhow::Result<Box<dyn Session>> {
        let found = self.engines.iter().find(|(_, p)| p.component == component);
        let (file, passport) = found.with_context(|| format!("there is no engine of {component:?}"))?;
        Ok(self.backend(passport).prepare(file, &PrepareOptions::default())?.session()?)
    }

    /// Inputs of a part, state aside: noise of the sizes that were built for, as far as the training knows them.
    fn inputs(&self, component: &str) -> anyhow::Result<Inputs> {
        let fp32 = Model::load(self.bundle.path(component)?)?;
        let settings = Settings { calibration: NOISE.into(), ..self.settings.clone() };
        let (mut joint, _) = sources(self.bundle, &settings, &Mutex::new(ProgressBar::new(true)))?;
        let mut source = part_inputs(self.bundle, component, &fp32, &self.runner, joint.as_mut(), 1)?;
        let mut inputs = source.next().map_err(anyhow::Error::msg)?.context("no inputs")?;
        inputs.retain(|(name, _)| !is_state(name));
        Ok(inputs)
    }

    /// Times one engine; a graph in turns with the bundle's own. State stays where the backend keeps it.
    fn time(&self, passport: &Passport) -> anyhow::Result<Timed> {
        let component = passport.component.as_str();
        let inputs = self.inputs(component)?;
        let mut engine = Timing::new(self.session(component)?);
        let mut fp32 = None;
        if passport.library == "onnx" {
            let file = self.bundle.path(component)?;
            fp32 = Some(Timing::new(
                self.runner.backend().prepare(&file, &PrepareOptions::default())?.session()?,
            ));
        }
        if let Some(before) = maker(component) {
            let inputs = self.inputs(&before)?;
            for timing in std::iter::once(&mut engine).chain(&mut fp32) {
                let mut first = Timing::new(self.session(&before)?);
                first.run(&inputs)?;
                timing.from = first.to;
            }
        }
        let (mut millis, mut of_fp32) = (Vec::new(), Vec::new());
        let mut steps: [Vec<f64>; 3] = Default::default();
        for run in 0..self.runs.max(1) + 3 {
            let time = engine.run(&inputs)?;
            let other = fp32.as_mut().map(|s| s.run(&inputs)).transpose()?;
            // The first runs warm up and record the graph.
            if run >= 3 {
                millis.push(time);
                of_fp32.extend(other);
                if let Some(t) = engine.session.times() {
                    let of = [t.copy_in, t.compute, t.copy_out];
                    steps.iter_mut().zip(of).for_each(|(all, d)| all.push(d.as_secs_f64() * 1e3));
                }
            }
        }
        let sorted = |mut all: Vec<f64>| {
            all.sort_by(f64::total_cmp);
            all
        };
        Ok(Timed {
            component: component.to_owned(),
            precision: passport.precision,
            backend: self.backend(passport).name(),
            millis: sorted(millis),
            steps: (!steps[0].is_empty()).then(|| steps.map(sorted)),
            fp32_millis: fp32.map(|_| sorted(of_fp32)),
        })
    }
}

/// A session that is timed, with the state that it reads and leaves.
struct Timing {
    session: Box<dyn Session>,
    outputs: Vec<(String, Tensor)>,
    from: State,
    to: State,
}

impl Timing {
    fn new(session: Box<dyn Session>) -> Self {
        let ports = session.engine().outputs().iter().filter(|p| !is_state(&p.name));
        let outputs = ports.map(|p| (p.name.clone(), Tensor::empty())).collect();
        Self { session, outputs, from: State::default(), to: State::default() }
    }

    /// Milliseconds of one run.
    fn run(&mut self, inputs: &Inputs) -> anyhow::Result<f64> {
        let views: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut outputs: Vec<(&str, &mut Tensor)> =
            self.outputs.iter_mut().map(|(n, t)| (n.as_str(), t)).collect();
        let leaves = self.session.engine().outputs().iter().any(|p| is_state(&p.name));
        let (from, to) = ((!self.from.is_empty()).then_some(&self.from), leaves.then_some(&mut self.to));
        let started = Instant::now();
        self.session.run_with_state(&views, &mut outputs, from, to)?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    }
}

fn bench(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    // Before any file is read: what the machine lacks is told first.
    let runner = Runner::new(by_name(&args.backend)?);
    let settings = pipeline::settings_of(&args.dir)?;
    let place = bundle_of(&settings, args.bundle.as_deref())?;
    let bundle = Bundle::load_manifest(&place)?;
    let engines = engines_in(&args.dir)?;
    let mut gpu = None;
    if engines.iter().any(|(_, p)| p.library != "onnx") {
        let mut backend = TensorRtBackend::open(&LoadOptions::at(args.lib.clone()), 0)?;
        backend.options.timed = true;
        gpu = Some(backend);
    }
    let bench = Bench { bundle: &bundle, settings, engines, runner, gpu, runs: args.runs };
    let rows: Vec<Timed> =
        bench.engines.iter().map(|(_, passport)| bench.time(passport)).collect::<anyhow::Result<_>>()?;
    if rows.is_empty() {
        bail!("{} holds no engines", args.dir.display());
    }
    let ratio = |r: &Timed| r.fp32_millis.as_ref().map(|f| percentile(&r.millis, 0.5) / percentile(f, 0.5));
    let steps = |r: &Timed| r.steps.as_ref().map(|s| s.each_ref().map(|all| percentile(all, 0.5)));
    if args.json {
        let all: Vec<_> = rows
            .iter()
            .map(|r| {
                let at = |p| percentile(&r.millis, p);
                let [copy_in, compute, copy_out] = steps(r).map_or([None; 3], |s| s.map(Some));
                json!({ "component": r.component, "precision": r.precision, "backend": r.backend,
                        "millis_p50": at(0.5), "millis_p99": at(0.99), "millis_max": at(1.0),
                        "copy_in_millis_p50": copy_in, "compute_millis_p50": compute,
                        "copy_out_millis_p50": copy_out, "to_fp32": ratio(r) })
            })
            .collect();
        document(&json!({ "runs": args.runs, "engines": all }))?;
        return Ok(ExitCode::SUCCESS);
    }
    for r in &rows {
        let at = |p| percentile(&r.millis, p);
        let to_fp32 = ratio(r).map_or(String::new(), |x| format!("  {x:.2} of fp32"));
        let steps = steps(r).map_or(String::new(), |[i, c, o]| {
            format!("  (copy in {i:.2}, compute {c:.2}, copy out {o:.2} ms)")
        });
        out(&format!(
            "{:<18} {:<5} {:<11} p50 {:.2} ms  p99 {:.2} ms  max {:.2} ms{steps}{to_fp32}",
            r.component,
            r.precision,
            r.backend,
            at(0.5),
            at(0.99),
            at(1.0)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
