//! `mindseye engine`: targets, plans, builds, and looks at engines.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use mindseye_engines::backend::{PrepareOptions, RtenBackend, Tensor, by_name};
use mindseye_engines::bundle::{Bundle, MANIFEST};
use mindseye_engines::passport::Passport;
use mindseye_engines::plan::{ModelSpec, PlanOptions, plan};
use mindseye_engines::quant::{CalibrationSource, Calibrator, SyntheticDenoiser, TaskEvaluation};
use mindseye_engines::target::{Precision, PrecisionRequest, Target};
use mindseye_engines::trt::{
    self, Library, LoadOptions, Progress, Request, Settings, Stage, TensorRtBackend, Verified,
};
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
    Verify {
        /// Folder of engines.
        dir: PathBuf,
        /// The bundle, where it has moved since the build.
        #[arg(long, value_name = "DIR")]
        bundle: Option<PathBuf>,
        /// CPU backend that runs both graphs.
        #[arg(long, default_value = "rten")]
        backend: String,
        /// Run the grounding task with both, too.
        #[arg(long)]
        task: bool,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Times built engines on this machine.
    Bench {
        /// Folder of engines.
        dir: PathBuf,
        /// TensorRT's library or its folder.
        #[arg(long, value_name = "PATH")]
        lib: Option<PathBuf>,
        /// Runs that are timed.
        #[arg(long, default_value_t = 20, value_name = "N")]
        runs: usize,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
struct PlanArgs {
    /// A bundle's folder, or a model file (configs/models/*.toml).
    bundle: PathBuf,
    /// Machine: a name of `engine targets`, or a target file.
    #[arg(long)]
    target: String,
    /// fp32, fp16, bf16, int8, int4w, fp8 or auto.
    #[arg(long, default_value = "auto")]
    precision: String,
    /// Context latents [default: what it was trained for].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Target latents [default: what it was trained for].
    #[arg(long, value_name = "N")]
    targets: Option<usize>,
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
    /// SmoothQuant's alpha for int8; 0 switches it off.
    #[arg(long, default_value_t = 0.8, value_name = "ALPHA")]
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
    /// Calibration items.
    #[arg(long, default_value_t = 16, value_name = "N")]
    calibration_items: u64,
    /// Seed of the calibration items.
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    calibration_seed: u64,
    /// Items that the check runs over.
    #[arg(long, default_value_t = 4, value_name = "N")]
    verify_items: u64,
    /// Context latents at most [default: the bundle's limit].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Target latents at most [default: the bundle's limit].
    #[arg(long, value_name = "N")]
    targets: Option<usize>,
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
    /// Run the grounding task with fp32 and with the quantised graph.
    #[arg(long)]
    task: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Calibration inputs of a bundle's denoiser: number of items and seed in, a source out.
pub type Calibrate<'a> = dyn Fn(&Bundle, u64, u64) -> anyhow::Result<Box<dyn CalibrationSource>> + 'a;

/// The grounding evaluation around a bundle's denoiser.
pub type Task<'a> = dyn Fn(&Bundle) -> anyhow::Result<Box<dyn TaskEvaluation>> + 'a;

/// What the rest of the program lends to `engine`: calibration inputs that look like what the robot sees, and the
/// grounding evaluation. Without them calibration uses seeded noise, and `--task` is refused.
#[derive(Default, Clone, Copy)]
pub struct Hooks<'a> {
    /// Calibration inputs.
    pub calibrate: Option<&'a Calibrate<'a>>,
    /// The grounding evaluation of a bundle with another denoiser.
    pub task: Option<&'a Task<'a>>,
}

/// Runs `mindseye engine` without hooks.
///
/// # Errors
/// What was refused or failed, in one line.
pub fn run(args: &EngineArgs) -> anyhow::Result<ExitCode> {
    run_with(args, Hooks::default())
}

/// Runs `mindseye engine`.
///
/// # Errors
/// What was refused or failed, in one line.
pub fn run_with(args: &EngineArgs, hooks: Hooks<'_>) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Targets { json } => targets(*json),
        Command::Plan(args) => plan_command(args),
        Command::Build(args) => build(args, hooks),
        Command::Inspect { dir, lib, json } => inspect(dir, lib.as_deref(), *json),
        Command::Verify { dir, bundle, backend, task, json } => {
            verify(dir, bundle.as_deref(), backend, *task, *json, hooks)
        }
        Command::Bench { dir, lib, runs, json } => bench(dir, lib.as_deref(), *runs, *json),
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
        "{:<10} {:<24} {:>5} {:>8} {:>10}  {:<38} {:<8} builds",
        "name", "machine", "sm", "memory", "GB/s", "precisions (auto)", "TensorRT"
    ))?;
    for t in all {
        let precisions: Vec<&str> = t.precisions.iter().map(|p| p.name()).collect();
        let majors: Vec<String> = t.tensorrt_majors.iter().map(u32::to_string).collect();
        let builds = match (t.compute_capability, t.tensorrt_rtx) {
            (None, _) => "graphs only",
            (_, true) => "anywhere with TensorRT-RTX, or on it",
            (_, false) => "on it",
        };
        out(&format!(
            "{:<10} {:<24} {:>5} {:>5} GB {:>10}  {:<38} {:<8} {builds}",
            t.name,
            t.title,
            t.compute_capability.map_or("-".into(), |c| c.to_string()),
            t.memory_bytes / 1_000_000_000,
            t.bandwidth_bytes_per_sec.map_or("-".into(), |b| format!("{:.0}", b / 1e9)),
            format!("{} ({})", precisions.join(" "), t.best_precision()),
            majors.join(", ")
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn resolve(target: &str, precision: &str) -> anyhow::Result<(Target, Precision)> {
    let target = Target::named(target)?;
    let request: PrecisionRequest = precision.parse()?;
    let precision = target.resolve(request)?;
    Ok((target, precision))
}

fn plan_command(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let (target, precision) = resolve(&args.target, &args.precision)?;
    let mut model = if args.bundle.is_dir() {
        let bundle = Bundle::load_manifest(&args.bundle)?;
        ModelSpec::from_manifest(bundle.manifest()).map_err(anyhow::Error::msg)?
    } else {
        let text =
            std::fs::read_to_string(&args.bundle).with_context(|| args.bundle.display().to_string())?;
        ModelSpec::from_toml(&text).map_err(|e| {
            anyhow::anyhow!("{} is neither a bundle nor a model file: {e}", args.bundle.display())
        })?
    };
    if let Some(n) = args.context {
        model.workload.context_latents = n as u64;
    }
    if let Some(n) = args.targets {
        model.workload.target_latents = n as u64;
    }
    model.check().map_err(anyhow::Error::msg)?;
    let planned = plan(&model, &target, precision, &PlanOptions::default())?;
    let refusal = planned.refusal();
    if args.json {
        document(&json!({ "plan": planned, "refusal": refusal }))?;
    } else {
        out(planned.table().trim_end())?;
    }
    match refusal {
        None => Ok(ExitCode::SUCCESS),
        Some(text) => bail!(text),
    }
}

fn calibration(
    bundle: &Bundle,
    settings: &Settings,
    hooks: Hooks<'_>,
) -> anyhow::Result<Box<dyn CalibrationSource>> {
    let (items, seed) = (settings.calibration_items, settings.calibration_seed);
    if let Some(calibrate) = hooks.calibrate {
        return calibrate(bundle, items, seed);
    }
    let m = bundle.manifest();
    let (context, targets) = (m.limits.context_trained.max(1), m.limits.target_trained.max(1));
    Ok(Box::new(SyntheticDenoiser::new(m.dit.clone(), context, targets, m.rope.gap, items, seed)))
}

fn calibrator(text: &str) -> anyhow::Result<Calibrator> {
    match text.split_once(':') {
        None if text == "max" => Ok(Calibrator::Max),
        None if text == "entropy" => Ok(Calibrator::Entropy),
        Some(("percentile", p)) => Ok(Calibrator::Percentile(p.parse().context("--calibrator percentile")?)),
        _ => bail!("--calibrator {text}: use max, entropy or percentile:99.99"),
    }
}

/// Sets a flag on Ctrl-C; the build ends at its next step.
fn cancel_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&flag);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                if shared.swap(true, Ordering::Relaxed) {
                    // Asked twice: no more patience.
                    std::process::exit(130);
                }
            }
        })
        .context("signals")?;
    Ok(flag)
}

/// Progress on stderr: a bar on a terminal, one line per component elsewhere.
fn reporter(quiet: bool) -> Arc<dyn Fn(Stage) + Send + Sync> {
    let terminal = std::io::stderr().is_terminal();
    let component = Mutex::new(String::new());
    Arc::new(move |stage| {
        let mut component = component.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = |what: &str, done: u64, of: u64| {
            if terminal && !quiet {
                let filled = (20 * done.min(of) / of.max(1)) as usize;
                eprint!("\r\x1b[K{} [{}{}] {what}", component, "#".repeat(filled), ".".repeat(20 - filled));
                // A bar that cannot be drawn is not worth an error.
                let _ = std::io::stderr().flush();
            }
        };
        match stage {
            Stage::Component(name, index, count) => {
                *component = name;
                if !quiet {
                    eprintln!(
                        "{}{component} ({} of {count})",
                        if terminal { "\r\x1b[K" } else { "" },
                        index + 1
                    );
                }
            }
            Stage::Calibrate(done, of) => bar("calibrating", done, of.unwrap_or(done)),
            Stage::Verify => bar("comparing with fp32", 1, 1),
            Stage::Build(Progress::Step { name, done, steps }) => bar(&name, done.into(), steps.into()),
            Stage::Build(Progress::Phase { name, steps }) => bar(&name, 0, steps.into()),
            Stage::Build(_) => {}
        }
    })
}

fn task_for(
    wanted: bool,
    bundle: &Bundle,
    hooks: Hooks<'_>,
) -> anyhow::Result<Option<Box<dyn TaskEvaluation>>> {
    match (wanted, hooks.task) {
        (false, _) => Ok(None),
        (true, Some(task)) => Ok(Some(task(bundle)?)),
        (true, None) => {
            bail!("--task: this program has no grounding evaluation built in; use mindseye-tools")
        }
    }
}

fn build(args: &BuildArgs, hooks: Hooks<'_>) -> anyhow::Result<ExitCode> {
    let (target, precision) = resolve(&args.target, &args.precision)?;
    let bundle = Bundle::load(&args.bundle)?;
    let mut settings = Settings::new(&args.bundle, &args.target, precision);
    if precision == Precision::Int8 {
        settings.smooth_alpha = (args.smooth > 0.0).then_some(args.smooth);
    }
    settings.calibrator = calibrator(&args.calibrator)?;
    settings.block = args.block;
    settings.keep_first_blocks = args.keep_first;
    settings.keep_last_blocks = args.keep_last;
    settings.keep.clone_from(&args.keep);
    settings.calibration_items = args.calibration_items;
    settings.calibration_seed = args.calibration_seed;
    settings.verify_items = args.verify_items;
    settings.context_latents = args.context;
    settings.target_latents = args.targets;
    let planned = trt::plan_bundle(&bundle, &target, &settings)?;
    if let Some(refusal) = planned.refusal() {
        bail!(refusal);
    }
    let library = match target.compute_capability {
        None => None,
        Some(_) => Some(Library::find(&LoadOptions::at(args.lib.clone()))?),
    };
    let mut source = calibration(&bundle, &settings, hooks)?;
    let task = task_for(args.task, &bundle, hooks)?;
    let cancel = cancel_flag()?;
    let built = trt::build_bundle(Request {
        bundle: &bundle,
        settings,
        target: &target,
        out: &args.out,
        library: library.as_ref(),
        cpu: &RtenBackend,
        calibration: source.as_mut(),
        task: task.as_deref(),
        auto_exclude: args.auto_exclude,
        keep_onnx: args.keep_onnx,
        workspace_bytes: args.workspace.map(|m| m << 20),
        timing_cache: args.timing_cache.clone(),
        hardware_compatible: args.hardware_compatible,
        version_compatible: args.version_compatible,
        cancel,
        progress: reporter(args.json),
    })?;
    if args.json {
        document(
            &json!({ "target": target.name, "precision": precision, "out": args.out, "engines": built }),
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    for b in &built {
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
        if let Some(inputs) = &b.calibration {
            out(&format!("  calibrated with {inputs}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_task(report: &mindseye_engines::quant::Report) -> anyhow::Result<()> {
    if let Some((fp32, low)) = &report.task {
        out(&format!(
            "  task over {} scenes: success {:.3} -> {:.3} ({:+.3}), consistency {:.3} -> {:.3} ({:+.3})",
            low.scenes,
            fp32.success,
            low.success,
            low.success - fp32.success,
            fp32.consistency,
            low.consistency,
            low.consistency - fp32.consistency
        ))?;
    }
    Ok(())
}

fn inspect(dir: &Path, lib: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let engines = trt::engines_in(dir)?;
    // Layers need a GPU: without one the passports are all there is to see.
    let backend = TensorRtBackend::open(&LoadOptions::at(lib.map(Path::to_owned)), 0);
    let mut layers = Vec::new();
    for (file, passport) in &engines {
        let text = match (&backend, passport.library.starts_with("tensorrt")) {
            (Ok(backend), true) => Some(backend.layers(file)?),
            _ => None,
        };
        layers.push(text);
    }
    if json {
        let all: Vec<_> = engines
            .iter()
            .zip(&layers)
            .map(|((file, passport), layers)| json!({ "file": file, "passport": passport, "layers": layers }))
            .collect();
        document(&json!({ "engines": all }))?;
        return Ok(ExitCode::SUCCESS);
    }
    for ((file, p), layers) in engines.iter().zip(&layers) {
        print_passport(file, p)?;
        if let Some(text) = layers {
            out(&format!("  {text}"))?;
        }
    }
    if let Err(reason) = backend {
        eprintln!("layers not shown: {reason}");
    }
    Ok(ExitCode::SUCCESS)
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

fn verify(
    dir: &Path,
    bundle: Option<&Path>,
    backend: &str,
    task: bool,
    json: bool,
    hooks: Hooks<'_>,
) -> anyhow::Result<ExitCode> {
    let settings = trt::settings_of(dir)?;
    let place = bundle.unwrap_or(&settings.bundle);
    if !place.join(MANIFEST).is_file() {
        bail!("{} is no bundle (any more): pass --bundle", place.display());
    }
    let bundle = Bundle::load(place)?;
    let target = Target::named(&settings.target)?;
    let cpu = by_name(backend)?;
    let mut source = calibration(&bundle, &settings, hooks)?;
    let task = task_for(task, &bundle, hooks)?;
    let all = trt::verify_built(dir, &bundle, &target, cpu.as_ref(), source.as_mut(), task.as_deref())?;
    if json {
        document(&json!({ "backend": cpu.name(), "limits": target.limits, "verified": all }))?;
    } else {
        if all.is_empty() {
            out("nothing was quantised here: there is nothing to compare")?;
        }
        for v in &all {
            print_verified(v)?;
        }
    }
    match all.iter().find_map(|v| v.past.as_ref()) {
        None => Ok(ExitCode::SUCCESS),
        Some((what, got, limit)) => bail!("{what} has relative L2 error {got:.4}, the limit is {limit}"),
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
    print_task(&v.report)
}

fn bench(dir: &Path, lib: Option<&Path>, runs: usize, json: bool) -> anyhow::Result<ExitCode> {
    let settings = trt::settings_of(dir)?;
    let engines = trt::engines_in(dir)?;
    let mut rows = Vec::new();
    for (file, passport) in &engines {
        let backend: Arc<dyn mindseye_engines::backend::Backend> = if passport.library == "onnx" {
            Arc::new(RtenBackend)
        } else {
            Arc::new(TensorRtBackend::open(&LoadOptions::at(lib.map(Path::to_owned)), 0)?)
        };
        let engine = backend.prepare(file, &PrepareOptions::default())?;
        let mut session = engine.session()?;
        let inputs = bench_inputs(&settings, passport)?;
        let Some(inputs) = inputs else { continue };
        let views: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut millis = Vec::with_capacity(runs.max(1));
        for run in 0..runs.max(1) + 3 {
            let started = Instant::now();
            session.run(&views)?;
            // The first runs warm up and record the graph.
            if run >= 3 {
                millis.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        millis.sort_by(f64::total_cmp);
        let at = |p: f64| millis[((millis.len() - 1) as f64 * p) as usize];
        rows.push((
            passport.component.clone(),
            passport.precision,
            backend.name(),
            at(0.5),
            at(0.99),
            at(1.0),
        ));
    }
    if json {
        let all: Vec<_> = rows
            .iter()
            .map(|(c, p, b, p50, p99, max)| {
                json!({ "component": c, "precision": p, "backend": b,
                        "millis_p50": p50, "millis_p99": p99, "millis_max": max })
            })
            .collect();
        document(&json!({ "runs": runs, "engines": all }))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (component, precision, backend, p50, p99, max) in &rows {
        out(&format!(
            "{component:<16} {precision:<5} {backend:<10} p50 {p50:.2} ms  p99 {p99:.2} ms  max {max:.2} ms"
        ))?;
    }
    if rows.is_empty() {
        bail!("{} holds no denoiser: only denoisers are timed", dir.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// One input of the sizes that the bundle was trained for; none for components that need a stream.
fn bench_inputs(
    settings: &Settings,
    passport: &Passport,
) -> anyhow::Result<Option<mindseye_engines::quant::Inputs>> {
    if passport.component != "denoiser" {
        return Ok(None);
    }
    let bundle = Bundle::load_manifest(&settings.bundle)?;
    let mut source = calibration(&bundle, settings, Hooks::default())?;
    source.next().map_err(anyhow::Error::msg)
}
