//! A bundle in, a folder of engines with passports out.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::onnx::fused;
use crate::plan::{self, ModelSpec, Plan, PlanOptions, SpecError, plan};
use crate::quant::{
    self, CalibrationSource, Checks, Float16, QuantConfig, QuantError, Quantised, Ranges, Report, Runner,
    TaskChange, TaskEvaluation, Work,
};
use crate::state::narrow_state;
use mindseye_base::file::sha256_of_file;
use mindseye_engines::backend::BackendError;
use mindseye_engines::bundle::{Bundle, BundleError, ComponentFormat};
use mindseye_engines::onnx::{DataType, Dim, Model, OnnxError, SaveOptions};
use mindseye_engines::passport::{
    FORMAT, Passport, PassportError, Present, engines_in, files_read_by, jetson_release,
};
use mindseye_engines::residency::{Keep, SETTINGS_FILE};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::{ComputeCapability, Limits, Precision, Release, Target, TargetError};
use mindseye_engines::trt::{BuildError, BuildOptions, InputProfile, Library, Progress, build, library_name};

/// How engines of a bundle are built. Stored beside them as `build.json`, so that they can be verified later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The bundle's folder; in the file relative to the folder of engines.
    pub bundle: PathBuf,
    /// Target name or file.
    pub target: String,
    /// Precision of the large products.
    pub precision: Precision,
    /// SmoothQuant's alpha (INT8); none without.
    pub smooth_alpha: Option<f32>,
    /// Choice of ranges (INT8).
    pub calibrator: quant::Calibrator,
    /// Weights per scale (INT4).
    pub block: usize,
    /// Blocks kept in float at the start.
    pub keep_first_blocks: usize,
    /// Blocks kept in float at the end.
    pub keep_last_blocks: usize,
    /// Further layers kept in float: names or parts of names.
    pub keep: Vec<String>,
    /// What the calibration inputs are: `scenes`, `noise`, or a bag's path.
    #[serde(default = "noise")]
    pub calibration: String,
    /// What is asked for while a bag is replayed.
    #[serde(default)]
    pub calibration_goals: Vec<String>,
    /// Number of calibration items.
    pub calibration_items: u64,
    /// Seed of the calibration items.
    pub calibration_seed: u64,
    /// Most memory that measuring may take, bytes.
    #[serde(default = "default_memory")]
    pub calibration_memory: u64,
    /// Number of items that the check runs over.
    pub verify_items: u64,
    /// Context latents at most; the bundle's limit where none.
    pub context_latents: Option<usize>,
    /// Target latents at most; the bundle's limit where none.
    pub target_latents: Option<usize>,
    /// What the runtime keeps in memory between uses; where none, the plan's choice, which is stored.
    #[serde(default)]
    pub keep_loaded: Option<Keep>,
    /// Effort of the builder, 0 to 5; TensorRT's own default where none.
    #[serde(default)]
    pub optimization_level: Option<u8>,
    /// Graphs in opset 23 with its larger operators ([`fused`]), for backends that have them.
    #[serde(default)]
    pub fused: bool,
}

/// Names of calibration inputs that are not paths.
const GIVEN_NAMES: [&str; 2] = ["noise", "scenes"];

fn default_memory() -> u64 {
    quant::MEMORY_BYTES
}

fn noise() -> String {
    GIVEN_NAMES[0].into()
}

impl Settings {
    /// The recipe for a precision.
    #[must_use]
    pub fn new(bundle: &Path, target: &str, precision: Precision) -> Self {
        let recipe = QuantConfig::new(precision);
        Settings {
            bundle: bundle.to_owned(),
            target: target.to_owned(),
            precision,
            smooth_alpha: recipe.smooth_alpha,
            calibrator: recipe.calibrator,
            block: recipe.block,
            keep_first_blocks: recipe.keep_first_blocks,
            keep_last_blocks: recipe.keep_last_blocks,
            keep: Vec::new(),
            calibration: noise(),
            calibration_goals: Vec::new(),
            calibration_items: 16,
            calibration_seed: 1,
            calibration_memory: quant::MEMORY_BYTES,
            verify_items: 4,
            context_latents: None,
            target_latents: None,
            keep_loaded: None,
            optimization_level: None,
            fused: false,
        }
    }

    fn quant(&self, head_dim: usize) -> QuantConfig {
        QuantConfig {
            precision: self.precision,
            smooth_alpha: self.smooth_alpha,
            calibrator: self.calibrator,
            block: self.block,
            keep_first_blocks: self.keep_first_blocks,
            keep_last_blocks: self.keep_last_blocks,
            keep: self.keep.clone(),
            attention_head_dim: Some(head_dim),
        }
    }
}

/// Options of one build that are not part of its result.
pub struct Request<'a> {
    /// The bundle.
    pub bundle: &'a Bundle,
    /// What to build.
    pub settings: Settings,
    /// For what.
    pub target: &'a Target,
    /// Folder to make.
    pub out: &'a Path,
    /// TensorRT; none where graphs are wanted ([`Request::graphs_only`], and always for the `cpu` target).
    pub library: Option<&'a Library>,
    /// Quantise and check only: the folder gets ONNX graphs, and engines are built from the bundle on the target.
    pub graphs_only: bool,
    /// Runs graphs for calibration and checks.
    pub runner: &'a Runner,
    /// Calibration inputs of the denoiser.
    pub calibration: &'a mut dyn CalibrationSource,
    /// Inputs for the comparison with fp32; others than those of the calibration.
    pub held_out: &'a mut dyn CalibrationSource,
    /// The task, where it is to be run.
    pub task: Option<&'a dyn TaskEvaluation>,
    /// Keep the worst layers high where limits are passed.
    pub auto_exclude: bool,
    /// Leave the quantised graphs beside the engines.
    pub keep_onnx: bool,
    /// Most scratch memory for kernels.
    pub workspace_bytes: Option<u64>,
    /// Kernel timings.
    pub timing_cache: Option<PathBuf>,
    /// Run on other Ampere and later GPUs too.
    pub hardware_compatible: bool,
    /// Run on later TensorRT versions of the same major.
    pub version_compatible: bool,
    /// Set to stop.
    pub cancel: Arc<AtomicBool>,
    /// Called with progress.
    pub progress: Arc<dyn Fn(BuildEvent) + Send + Sync>,
}

/// What is being done.
#[derive(Clone, Debug)]
pub enum BuildEvent {
    /// A component is begun: name, index, number of components.
    Component(String, usize, usize),
    /// The denoiser is calibrated and compared with fp32.
    Quantise(Work),
    /// TensorRT at work.
    Build(Progress),
}

/// One engine of a finished build.
#[derive(Clone, Debug, Serialize)]
pub struct BuiltComponent {
    /// The passport.
    pub passport: Passport,
    /// The engine or graph.
    pub file: PathBuf,
    /// Errors against fp32, where it was quantised.
    pub report: Option<Report>,
    /// What was calibrated with.
    pub calibration: Option<String>,
    /// Seconds for quantising and checking.
    pub quantise_seconds: f64,
}

/// Why a build was refused or failed. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The target or precision.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The bundle's sizes.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A graph.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// Quantisation.
    #[error("{component}: {source}")]
    Quant {
        /// Component.
        component: String,
        /// Cause.
        source: QuantError,
    },
    /// TensorRT.
    #[error("{component}: {source}")]
    Build {
        /// Component.
        component: String,
        /// Cause.
        source: BuildError,
    },
    /// The passport.
    #[error(transparent)]
    Passport(#[from] PassportError),
    /// A CPU backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// It does not fit, or the request contradicts itself.
    #[error("{0}")]
    Refused(String),
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// File.
        path: String,
        /// Cause.
        source: std::io::Error,
    },
    /// Stopped on request.
    #[error("cancelled; nothing was written")]
    Cancelled,
}

/// What a plan of a bundle counts: its manifest, with the settings' sizes.
///
/// # Errors
/// [`PipelineError::Refused`] for sizes outside the bundle's limits, [`PipelineError::Spec`].
pub fn spec_of(bundle: &Bundle, settings: &Settings) -> Result<ModelSpec, PipelineError> {
    let limits = &bundle.manifest().limits;
    let mut model = ModelSpec::from_manifest(bundle.manifest())?;
    let w = &mut model.workload;
    for (what, asked, allowed, size) in [
        ("context", settings.context_latents, limits.context_allowed, &mut w.context_latents),
        ("target", settings.target_latents, limits.target_allowed, &mut w.target_latents),
    ] {
        if let Some(n) = asked {
            if n == 0 || n > allowed {
                return Err(PipelineError::Refused(format!(
                    "{n} {what} latents are outside the bundle's limits (1 to {allowed})"
                )));
            }
            *size = n as u64;
        }
    }
    Ok(model)
}

/// The plan of a bundle for a target.
///
/// # Errors
/// The target lacks the precision, or the bundle's sizes do not hold together.
pub fn plan_bundle(bundle: &Bundle, target: &Target, settings: &Settings) -> Result<Plan, PipelineError> {
    let options = PlanOptions {
        keep_first_blocks: settings.keep_first_blocks as u64,
        keep_last_blocks: settings.keep_last_blocks as u64,
        workspace_bytes: None,
        keep: settings.keep_loaded,
    };
    Ok(plan(&spec_of(bundle, settings)?, target, settings.precision, &options)?)
}

/// Sizes that each named size of a component's shapes may take: least, usual, most. The most are those of the plan.
#[must_use]
pub fn profile_sizes(bundle: &Bundle, model: &ModelSpec, component: &str) -> BTreeMap<String, [i64; 3]> {
    let limits = &bundle.manifest().limits;
    let n = |latents: u64| i64::try_from(latents).unwrap_or(i64::MAX);
    let (context, targets) = (n(model.workload.context_latents), n(model.workload.target_latents));
    let usual_context = n(limits.context_trained as u64).clamp(1, context.max(1));
    let usual_targets = n(limits.target_trained as u64).clamp(1, targets);
    // The first target latent is given: halves see it with the context.
    let given = [1, usual_context + 1, context + 1];
    let frames = match component {
        "denoiser_prefill" => given,
        "denoiser_cached" => [1, (usual_targets - 1).max(1), (targets - 1).max(1)],
        _ => [1, usual_context + usual_targets, context + targets],
    };
    let groups = match component {
        "vae_decoder" => [1, usual_targets, targets.max(context)],
        _ => [1; 3],
    };
    let per_frame = bundle.manifest().dit.tokens_per_frame() as i64;
    BTreeMap::from([
        ("batch".into(), [1; 3]),
        ("timesteps".into(), [1, 2, 4]),
        ("groups".into(), groups),
        ("frames".into(), frames),
        ("tokens".into(), frames.map(|n| n * per_frame)),
        ("context_tokens".into(), given.map(|n| n * per_frame)),
    ])
}

fn profiles(
    component: &str,
    model: &Model,
    symbols: &BTreeMap<String, [i64; 3]>,
) -> Result<Vec<InputProfile>, PipelineError> {
    let mut all = Vec::new();
    for input in &model.graph.inputs {
        let dims = input.shape.clone().unwrap_or_default();
        if dims.iter().all(|d| matches!(d, Dim::Fixed(_))) {
            continue;
        }
        let mut shapes = [Vec::new(), Vec::new(), Vec::new()];
        for d in &dims {
            let sizes = match d {
                Dim::Fixed(n) => [*n as i64; 3],
                Dim::Symbol(name) => *symbols.get(name).ok_or_else(|| {
                    PipelineError::Refused(format!(
                        "{component}: input {:?} has the size {name:?}, for which the bundle gives no limits",
                        input.name
                    ))
                })?,
                Dim::Unknown => {
                    let what = format!("{component}: input {:?} has a size without a name", input.name);
                    return Err(PipelineError::Refused(what));
                }
            };
            shapes.iter_mut().zip(sizes).for_each(|(s, n)| s.push(n));
        }
        let [min, opt, max] = shapes;
        all.push(InputProfile { name: input.name.clone(), min, opt, max });
    }
    Ok(all)
}

/// Refuses what cannot be built, or has no place to go.
fn check_request(request: &Request<'_>) -> Result<(), PipelineError> {
    check_library(request.target, request.library, request.graphs_only)?;
    if request.settings.fused && request.library.is_some_and(|_| !request.graphs_only) {
        return Err(PipelineError::Refused(
            "engines of TensorRT are built from graphs of opset 21: --fused goes with --graphs-only".into(),
        ));
    }
    if request.hardware_compatible
        && request.target.compute_capability.is_some_and(ComputeCapability::is_jetson)
    {
        return Err(PipelineError::Refused(format!(
            "TensorRT has no hardware-compatible mode on a Jetson: build for {} without --hardware-compatible",
            request.target.name
        )));
    }
    if request.out.exists() && !request.out.join(SETTINGS_FILE).is_file() {
        let empty = std::fs::read_dir(request.out)
            .map_err(|source| PipelineError::Io { path: request.out.display().to_string(), source })?
            .next()
            .is_none();
        if !empty {
            return Err(PipelineError::Refused(format!(
                "{} exists and holds something other than engines",
                request.out.display()
            )));
        }
    }
    Ok(())
}

/// Builds every graph of a bundle into `request.out`. The folder appears when all of it is there.
///
/// # Errors
/// [`PipelineError`]; then `request.out` is as it was.
pub fn build_bundle(mut request: Request<'_>) -> Result<Vec<BuiltComponent>, PipelineError> {
    request.target.check_precision(request.settings.precision)?;
    let planned = plan_bundle(request.bundle, request.target, &request.settings)?;
    if let Some(refusal) = planned.refusal() {
        return Err(PipelineError::Refused(refusal));
    }
    check_request(&request)?;
    let model = spec_of(request.bundle, &request.settings)?;
    request.settings.keep_loaded = Some(planned.memory.keep);
    let io = |path: &Path, source| PipelineError::Io { path: path.display().to_string(), source };
    let mut name = request.out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".part-{}", std::process::id()));
    let staging = Staging(request.out.with_file_name(name));
    std::fs::create_dir_all(&staging.0).map_err(|e| io(&staging.0, e))?;

    let graphs: Vec<String> = request
        .bundle
        .manifest()
        .component
        .iter()
        .filter(|(_, c)| c.format == ComponentFormat::Onnx)
        .map(|(n, _)| n.clone())
        .collect();
    if graphs.is_empty() {
        return Err(PipelineError::Refused("the bundle holds no ONNX graphs".into()));
    }
    let mut built = Vec::new();
    // The joint denoiser comes before its halves, in the order of names.
    let mut ranges = None;
    for (i, component) in graphs.iter().enumerate() {
        (request.progress)(BuildEvent::Component(component.clone(), i, graphs.len()));
        let symbols = profile_sizes(request.bundle, &model, component);
        built.push(build_component(&mut request, component, &symbols, &staging.0, &mut ranges)?);
        if request.cancel.load(Ordering::Relaxed) {
            return Err(PipelineError::Cancelled);
        }
    }
    // What is a path works from elsewhere, too; names of targets and kinds of inputs stay.
    let there = |text: &String, is_path: bool| match is_path {
        true => relative_to(request.out, Path::new(text)).display().to_string(),
        false => text.clone(),
    };
    let (target, inputs) = (&request.settings.target, &request.settings.calibration);
    let settings = Settings {
        bundle: relative_to(request.out, &request.settings.bundle),
        target: there(target, Path::new(target).is_file()),
        calibration: there(inputs, !GIVEN_NAMES.contains(&inputs.as_str()) && Path::new(inputs).exists()),
        ..request.settings.clone()
    };
    let settings = serde_json::to_string_pretty(&settings)
        .map_err(|e| PipelineError::Refused(format!("{SETTINGS_FILE}: {e}")))?;
    let path = staging.0.join(SETTINGS_FILE);
    std::fs::write(&path, settings).map_err(|e| io(&path, e))?;
    if request.out.exists() {
        // Engines of an earlier build: out of the way only now that the new ones are whole.
        std::fs::remove_dir_all(request.out).map_err(|e| io(request.out, e))?;
    }
    std::fs::rename(&staging.0, request.out).map_err(|e| io(request.out, e))?;
    for b in &mut built {
        b.file = request.out.join(b.file.file_name().unwrap_or_default());
    }
    Ok(built)
}

/// A path as seen from a folder that need not exist yet: relative where both are below one directory other than the root, so that they can be moved together and found from any working directory; else absolute.
fn relative_to(folder: &Path, path: &Path) -> PathBuf {
    let whole = |p: &Path| std::path::absolute(p).unwrap_or_else(|_| p.to_owned());
    let real = |p: &Path| p.canonicalize().unwrap_or_else(|_| whole(p));
    let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = real(parent).join(folder.file_name().unwrap_or_default());
    let path = real(path);
    let (from, to): (Vec<_>, Vec<_>) = (folder.components().collect(), path.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    // The root alone is nothing in common.
    if common < 2 {
        return path;
    }
    let up = from[common..].iter().map(|_| Path::new(".."));
    up.chain(to[common..].iter().map(|c| Path::new(c.as_os_str()))).collect()
}

struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // After a success the folder has moved away; best effort otherwise.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether a library can build for a target. None is right for graphs, which need no library.
///
/// # Errors
/// [`PipelineError::Refused`] with the reason and what to do.
pub fn check_library(
    target: &Target,
    library: Option<&Library>,
    graphs_only: bool,
) -> Result<(), PipelineError> {
    let Some(library) = library.filter(|_| !graphs_only) else {
        return if target.compute_capability.is_none() || graphs_only {
            Ok(())
        } else {
            Err(PipelineError::Refused(format!("{} needs TensorRT: pass --lib", target.name)))
        };
    };
    let version = library.version();
    if library_name(library) == "tensorrt-rtx" {
        if !target.tensorrt_rtx {
            return Err(PipelineError::Refused(format!(
                "TensorRT-RTX {version} does not know {}{}: build on the target itself with TensorRT {}, or write the \
                 quantised graphs here with --graphs-only",
                target.name,
                target.compute_capability.map(|c| format!(" (compute capability {c})")).unwrap_or_default(),
                target.tensorrt.iter().map(Release::to_string).collect::<Vec<_>>().join(" or ")
            )));
        }
    } else {
        target.check_tensorrt(Release { major: version.major, minor: version.minor })?;
    }
    Ok(())
}

/// What quantising a component came to.
struct Low {
    model: Model,
    quantised: Option<Quantised>,
    report: Option<Report>,
    precision: Precision,
}

/// Quantises the denoiser and its cached halves, which take the ranges of the joint graph, and converts floats. Other
/// parts get the float format. `ranges` are those of the joint graph, once it was quantised.
fn lower(
    request: &mut Request<'_>,
    component: &str,
    fp32: &Model,
    ranges: &mut Option<Ranges>,
) -> Result<Low, PipelineError> {
    let failed = |source| failed_in(component, source);
    let wanted = request.settings.precision;
    let float = if request.target.compute_capability.is_none() { Precision::Fp32 } else { wanted.float() };
    let (cancel, progress) = (Arc::clone(&request.cancel), Arc::clone(&request.progress));
    let mut tell = |work| {
        progress(BuildEvent::Quantise(work));
        !cancel.load(Ordering::Relaxed)
    };
    let samples = request.settings.verify_items.max(1);
    let runner = request.runner.of_graph(&graph_hash(request.bundle, component)?);
    quant::check_weights(fp32, &mut tell).map_err(failed)?;
    let high = high_of(request.bundle, component, fp32, float, &runner, request.held_out, samples, &mut tell)
        .map_err(failed)?;
    let larger = request.settings.fused;
    let convert = |model: &Model| {
        let model = if larger { fused(model) } else { model.clone() };
        match float {
            Precision::Fp32 => Ok(model),
            _ => Float16::new(&model, float, &high).map(|low| low.deploy),
        }
    };
    if !quantises(wanted, component) {
        let model = convert(fp32).map_err(failed)?;
        return Ok(Low { model, quantised: None, report: None, precision: float });
    }
    let config = request.settings.quant(request.bundle.manifest().dit.head_dim);
    if component != DenoiserKind::Joint.component() {
        let ranges = ranges.as_ref().ok_or_else(|| {
            PipelineError::Refused(format!(
                "{component} in {wanted} needs the joint denoiser in the bundle: its ranges are measured there"
            ))
        })?;
        let quantised = quant::quantise_half(fp32, &config, ranges, &mut tell).map_err(failed)?;
        let model = convert(&quantised.deploy).map_err(failed)?;
        return Ok(Low { model, quantised: Some(quantised), report: None, precision: wanted });
    }
    let mut checks = Checks {
        runner: &runner,
        calibration: &mut *request.calibration,
        held_out: &mut *request.held_out,
        samples,
        tell: &mut tell,
    };
    let limits = request.target.limits.of(wanted);
    let (quantised, mut report) = if request.auto_exclude {
        let (quantised, report, used) =
            quant::auto_exclude(fp32, &config, &limits, &mut checks).map_err(failed)?;
        request.settings.keep = used.keep;
        (quantised, report)
    } else {
        quantised_within(fp32, &config, &limits, &mut checks).map_err(failed)?
    };
    if let Some(task) = request.task {
        let mut tell = |graph| {
            progress(BuildEvent::Quantise(Work::Task(graph)));
            !cancel.load(Ordering::Relaxed)
        };
        report.task = Some(run_task(task, fp32, &quantised.emulated, &mut tell).map_err(failed)?);
    }
    let model = convert(&quantised.deploy).map_err(failed)?;
    *ranges = Some(quantised.ranges.clone());
    Ok(Low { model, quantised: Some(quantised), report: Some(report), precision: wanted })
}

/// Hash of all files of a component.
fn graph_hash(bundle: &Bundle, component: &str) -> Result<String, BundleError> {
    Ok(bundle.component(component)?.files.iter().map(|f| f.sha256.as_str()).collect())
}

/// Whether a part is quantised in this precision; others get its float format.
fn quantises(wanted: Precision, component: &str) -> bool {
    matches!(wanted, Precision::Int8 | Precision::Fp8 | Precision::Int4w) && component.starts_with("denoiser")
}

fn failed_in(component: &str, source: QuantError) -> PipelineError {
    match source {
        QuantError::Cancelled => PipelineError::Cancelled,
        source => PipelineError::Quant { component: component.to_owned(), source },
    }
}

/// Values of a part that stay in fp32 where its floats are put into `float`.
fn high_of(
    bundle: &Bundle,
    component: &str,
    fp32: &Model,
    float: Precision,
    runner: &Runner,
    joint: &mut dyn CalibrationSource,
    samples: u64,
    tell: &mut quant::Tell<'_>,
) -> Result<HashSet<String>, QuantError> {
    if float != Precision::Fp16 {
        return Ok(HashSet::new());
    }
    let mut inputs = quant::part_inputs(bundle, component, fp32, runner, joint, samples)?;
    quant::kept_high(fp32, float, runner, inputs.as_mut(), samples, tell)
}

/// Quantises and compares with fp32.
fn quantised_within(
    fp32: &Model,
    config: &QuantConfig,
    limits: &Limits,
    checks: &mut Checks<'_>,
) -> Result<(Quantised, Report), QuantError> {
    let observed = quant::observe_for(fp32, config, checks)?;
    let (runner, inputs) = (checks.runner, &mut *checks.calibration);
    let quantised = quant::quantise_observed(fp32, config, observed.as_ref(), runner, inputs, checks.tell)?;
    let emulated = &quantised.emulated;
    let report = quant::verify(fp32, emulated, checks.runner, checks.held_out, checks.samples, checks.tell)?;
    if let Some(past) = report.past(limits) {
        let worst = quant::sensitivities(fp32, config, observed.as_ref(), &quantised.layers, checks)?;
        return Err(quant::past_limit(fp32, config, &quantised.ranges, past, &worst, checks)?);
    }
    Ok((quantised, report))
}

/// The task with fp32 and with the quantised graph.
fn run_task(
    task: &dyn TaskEvaluation,
    fp32: &Model,
    quantised: &Model,
    tell: &mut dyn FnMut(&'static str) -> bool,
) -> Result<TaskChange, QuantError> {
    let folder = quant::Scratch::new()?;
    let mut run = |name: &'static str, model: &Model| {
        if !tell(name) {
            return Err(QuantError::Cancelled);
        }
        let path = folder.0.join(format!("{name}.onnx"));
        model.save(&path, &SaveOptions::default())?;
        let figures = task.evaluate(&path);
        if !tell(name) {
            return Err(QuantError::Cancelled);
        }
        figures.map_err(QuantError::Task)
    };
    Ok(TaskChange::new(run("fp32", fp32)?, run("quantised", quantised)?))
}

fn build_component(
    request: &mut Request<'_>,
    component: &str,
    symbols: &BTreeMap<String, [i64; 3]>,
    folder: &Path,
    ranges: &mut Option<Ranges>,
) -> Result<BuiltComponent, PipelineError> {
    let source = request.bundle.path(component)?;
    let fp32 = Model::load(&source)?;
    if fp32.graph.inputs.iter().any(|i| i.dtype == Some(DataType::F16)) {
        return Err(PipelineError::Refused(format!("{component}: engines are built from fp32 bundles")));
    }
    let profiles = profiles(component, &fp32, symbols)?;
    let started = std::time::Instant::now();
    let mut low = lower(request, component, &fp32, ranges)?;
    let quantise_seconds = started.elapsed().as_secs_f64();
    drop(fp32);
    let library = request.library.filter(|_| !request.graphs_only);
    if library.is_some() {
        match low.precision.float() {
            Precision::Fp16 => narrow_state(&mut low.model, DataType::F16),
            Precision::Bf16 => narrow_state(&mut low.model, DataType::BF16),
            _ => {}
        }
    }
    let onnx = folder.join(format!("{component}.onnx"));
    low.model.save(&onnx, &SaveOptions::default())?;
    let flags = builder_flags(request, &profiles);
    let (file, build_seconds) = match library {
        None => (onnx, quantise_seconds),
        Some(library) => build_engine(request, library, component, &onnx, profiles)?,
    };
    let passport = passport_of(request, component, &low, &file, library, flags, build_seconds)?;
    passport.write(&file)?;
    let calibration = low.quantised.and_then(|q| q.calibration);
    Ok(BuiltComponent { passport, file, report: low.report, calibration, quantise_seconds })
}

/// The builder's options, as a passport states them.
fn builder_flags(request: &Request<'_>, profiles: &[InputProfile]) -> BTreeMap<String, String> {
    let mut flags = BTreeMap::from([
        ("strongly_typed".into(), "true".into()),
        ("hardware_compatible".into(), request.hardware_compatible.to_string()),
        ("version_compatible".into(), request.version_compatible.to_string()),
    ]);
    if let Some(bytes) = request.workspace_bytes {
        flags.insert("workspace_bytes".into(), bytes.to_string());
    }
    if let Some(level) = request.settings.optimization_level {
        flags.insert("optimization_level".into(), level.to_string());
    }
    for p in profiles {
        flags.insert(format!("profile.{}", p.name), format!("{:?} {:?} {:?}", p.min, p.opt, p.max));
    }
    flags
}

/// Builds the engine of a graph beside it: its file, and the seconds that it took.
fn build_engine(
    request: &Request<'_>,
    library: &Library,
    component: &str,
    onnx: &Path,
    profiles: Vec<InputProfile>,
) -> Result<(PathBuf, f64), PipelineError> {
    let engine = onnx.with_file_name(format!("{component}.engine"));
    let progress = Arc::clone(&request.progress);
    let options = BuildOptions {
        workspace_bytes: request.workspace_bytes,
        profiles,
        compute_capability: request.target.compute_capability,
        timing_cache: request.timing_cache.clone(),
        hardware_compatible: request.hardware_compatible,
        version_compatible: request.version_compatible,
        optimization_level: request.settings.optimization_level,
        cancel: Arc::clone(&request.cancel),
        progress: Some(Arc::new(move |p| progress(BuildEvent::Build(p)))),
    };
    let done = build(library, onnx, &engine, &options).map_err(|source| match source {
        BuildError::Cancelled => PipelineError::Cancelled,
        source => PipelineError::Build { component: component.to_owned(), source },
    })?;
    if !request.keep_onnx {
        for path in [onnx.to_owned(), onnx.with_file_name(format!("{component}.onnx.data"))] {
            if path.exists() {
                std::fs::remove_file(&path)
                    .map_err(|source| PipelineError::Io { path: path.display().to_string(), source })?;
            }
        }
    }
    Ok((engine, done.seconds))
}

/// What a built engine or graph was made from, with the hash of every file that is read with it.
fn passport_of(
    request: &Request<'_>,
    component: &str,
    low: &Low,
    file: &Path,
    library: Option<&Library>,
    builder_flags: BTreeMap<String, String>,
    build_seconds: f64,
) -> Result<Passport, PipelineError> {
    let io = |path: &Path, source| PipelineError::Io { path: path.display().to_string(), source };
    let sources = &request.bundle.component(component)?.files;
    let graph_sha256 = sources.first().map(|f| f.sha256.clone()).unwrap_or_default();
    let mut files = BTreeMap::new();
    if library.is_none() {
        for name in files_read_by(file)? {
            let path = file.with_file_name(&name);
            files.insert(name, sha256_of_file(&path).map_err(|e| io(&path, e))?);
        }
    }
    let passport = Passport {
        format: FORMAT,
        component: component.to_owned(),
        bundle_sha256: request.bundle.hash().to_owned(),
        weights_sha256: sources.get(1).map_or_else(|| graph_sha256.clone(), |f| f.sha256.clone()),
        graph_sha256,
        calibration_sha256: low.quantised.as_ref().and_then(|q| q.calibration_sha256.clone()),
        scales_sha256: low.quantised.as_ref().map(|q| q.scales_sha256.clone()),
        engine_sha256: sha256_of_file(file).map_err(|e| io(file, e))?,
        files,
        precision: low.precision,
        kept_high: low.quantised.as_ref().map(|q| q.kept.clone()).unwrap_or_default(),
        target: request.target.name.clone(),
        compute_capability: request.target.compute_capability,
        library: library.map_or("onnx", library_name).to_owned(),
        library_version: library.map_or_else(String::new, |l| l.version().to_string()),
        os: std::env::consts::OS.to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        jetson_release: library.and_then(|_| jetson_release()),
        driver_version: library.and_then(Library::driver).map(|d| d.cuda_version),
        builder_flags,
        verification: low.report.as_ref().map(Report::for_passport),
        build_seconds,
        engine_bytes: std::fs::metadata(file).map_err(|e| io(file, e))?.len(),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok(passport.rounded())
}

/// The settings of a folder of engines.
///
/// # Errors
/// The file is missing or not in order.
pub fn settings_of(folder: &Path) -> Result<Settings, PipelineError> {
    let path = folder.join(SETTINGS_FILE);
    let io = |source| PipelineError::Io { path: path.display().to_string(), source };
    let text = std::fs::read_to_string(&path).map_err(io)?;
    let settings: Settings = serde_json::from_str(&text)
        .map_err(|e| PipelineError::Refused(format!("{}: {e}", path.display())))?;
    // Relative to the folder of engines, whatever the working directory is.
    let found = |text: &String| {
        let path = folder.join(text);
        let is_path = !GIVEN_NAMES.contains(&text.as_str()) && path.exists();
        if is_path { path.display().to_string() } else { text.clone() }
    };
    let (target, calibration) = (found(&settings.target), found(&settings.calibration));
    Ok(Settings { bundle: folder.join(&settings.bundle), target, calibration, ..settings })
}

/// What [`verify_built`] found.
#[derive(Clone, Debug, Serialize)]
pub struct Verified {
    /// Component.
    pub component: String,
    /// Its precision.
    pub precision: Precision,
    /// Errors against fp32.
    pub report: Report,
    /// Without SmoothQuant, for comparison (INT8 with it).
    pub without_smoothing: Option<Report>,
    /// What the inputs were.
    pub inputs: String,
    /// Limits passed, if any: name, figure, limit.
    pub past: Option<(String, f64, f64)>,
    /// Its layers, where they were asked for.
    pub layers: Vec<LayerReport>,
}

/// One layer of a built part: a weight that takes part in products.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// Name of the layer.
    pub name: String,
    /// Precision of its products.
    pub precision: Precision,
    /// Bytes of its weights in the engine, the bias aside.
    pub bytes: u64,
    /// 10^9 operations in one call at the largest sizes.
    pub gigaflop: f64,
    /// Relative L2 error of the outputs (the largest among them) when this layer alone is quantised.
    pub error: Option<f64>,
    /// Its part in the sum of all layers' squared errors, 0 to 1.
    pub error_share: Option<f64>,
}

/// What [`verify_built`] works with.
pub struct Verify<'a> {
    /// The bundle that the engines were built from.
    pub bundle: &'a Bundle,
    /// The target, for its limits.
    pub target: &'a Target,
    /// What it is compared with: backend and inputs, the calibration's being those of the build.
    pub checks: Checks<'a>,
    /// The task, where it is to be run.
    pub task: Option<&'a dyn TaskEvaluation>,
    /// Report each layer, and measure what each quantised one adds to the error.
    pub layers: bool,
}

/// Error of the outputs when one layer alone is quantised, by layer.
type LayerErrors = Vec<(String, f64)>;

/// The layers of a part, with what was measured of them.
fn layer_reports(
    with: &Verify<'_>,
    settings: &Settings,
    passport: &Passport,
    errors: &[(String, f64)],
) -> Result<Vec<LayerReport>, PipelineError> {
    let mut model = spec_of(with.bundle, settings)?;
    model.workload.cached_context &= passport.component != DenoiserKind::Joint.component();
    let options = PlanOptions {
        keep_first_blocks: settings.keep_first_blocks as u64,
        keep_last_blocks: settings.keep_last_blocks as u64,
        ..PlanOptions::default()
    };
    let squares: f64 = errors.iter().map(|(_, e)| e * e).sum();
    let all = plan::layers(&model, with.target, settings.precision, &options)?;
    Ok(all
        .into_iter()
        .filter(|layer| layer.component == passport.component)
        .map(|layer| {
            let name = layer.name.trim_end_matches(".weight").to_owned();
            let error = errors.iter().find(|(n, _)| *n == name).map(|(_, e)| *e);
            let kept = passport.kept_high.contains(&name);
            let precision = if kept { passport.precision.float() } else { layer.precision };
            LayerReport {
                bytes: (layer.parameters as f64 * precision.weight_bytes()) as u64,
                gigaflop: layer.gigaflop,
                error_share: error.filter(|_| squares > 0.0).map(|e| e * e / squares),
                name,
                precision,
                error,
            }
        })
        .collect())
}

/// Puts every part of the bundle into the folder's precision again, as its settings say, checks that scales are those of
/// the passport, and compares each with fp32 on the CPU.
///
/// # Errors
/// The bundle, the passport's hashes, or a backend; a part that gives NaN or infinity, by name.
pub fn verify_built(folder: &Path, mut with: Verify<'_>) -> Result<Vec<Verified>, PipelineError> {
    let settings = settings_of(folder)?;
    let bundle = with.bundle;
    let mut all = Vec::new();
    let mut ranges = None;
    for (engine, passport) in engines_in(folder)? {
        passport.check(&engine, &Present { bundle_sha256: Some(bundle.hash()), ..Present::default() })?;
        let component = passport.component.as_str();
        let failed = |source| failed_in(component, source);
        let fp32 = Model::load(bundle.path(component)?)?;
        let runner = with.checks.runner.of_graph(&graph_hash(bundle, component)?);
        quant::check_weights(&fp32, with.checks.tell).map_err(failed)?;
        let config = settings.quant(bundle.manifest().dit.head_dim);
        let mut errors = LayerErrors::new();
        let mut verified = if !quantises(passport.precision, component) {
            verify_floats(&engine, &passport, &fp32, &runner, &mut with).map_err(failed)?
        } else if component == DenoiserKind::Joint.component() {
            let (quantised, verified, measured) =
                verify_joint(&engine, &passport, &fp32, config, &runner, &mut with)?;
            ranges = Some(quantised.ranges);
            errors = measured;
            verified
        } else {
            let ranges = ranges.as_ref().ok_or_else(|| {
                PipelineError::Refused(format!("{component} cannot be verified without the joint denoiser"))
            })?;
            let quantised = quant::quantise_half(&fp32, &config, ranges, with.checks.tell).map_err(failed)?;
            check_scales(&engine, &passport, &quantised)?;
            compare_part(&passport, &fp32, &quantised.emulated, &runner, &mut with).map_err(failed)?
        };
        if with.layers {
            verified.layers = layer_reports(&with, &settings, &passport, &errors)?;
        }
        all.push(verified);
    }
    Ok(all)
}

/// Compares a part in a float format with fp32, each value rounded as a 16-bit format rounds it. In fp32 it is the graph that
/// was written that is run, where there is one.
fn verify_floats(
    engine: &Path,
    passport: &Passport,
    fp32: &Model,
    runner: &Runner,
    with: &mut Verify<'_>,
) -> Result<Verified, QuantError> {
    let float = passport.precision;
    if float == Precision::Fp32 {
        let built = if passport.library == "onnx" { Model::load(engine)? } else { fp32.clone() };
        return compare_part(passport, fp32, &built, runner, with);
    }
    let checks = &mut with.checks;
    let (component, samples) = (passport.component.as_str(), checks.samples.max(1));
    let high = high_of(with.bundle, component, fp32, float, runner, checks.held_out, samples, checks.tell)?;
    let low = Float16::new(fp32, float, &high)?.emulated()?;
    compare_part(passport, fp32, &low, runner, with)
}

/// Compares a part's emulation with fp32 on the part's own inputs.
fn compare_part(
    passport: &Passport,
    fp32: &Model,
    emulated: &Model,
    runner: &Runner,
    with: &mut Verify<'_>,
) -> Result<Verified, QuantError> {
    let (component, checks) = (passport.component.as_str(), &mut with.checks);
    let samples = checks.samples.max(1);
    let mut inputs = quant::part_inputs(with.bundle, component, fp32, runner, checks.held_out, samples)?;
    let report = quant::verify(fp32, emulated, runner, inputs.as_mut(), samples, checks.tell)?;
    Ok(Verified {
        component: component.to_owned(),
        precision: passport.precision,
        past: report.past(&with.target.limits.of(passport.precision)),
        report,
        without_smoothing: None,
        inputs: inputs.describe(),
        layers: Vec::new(),
    })
}

/// Refuses scales and calibration inputs that are not those of the passport.
fn check_scales(engine: &Path, passport: &Passport, done: &Quantised) -> Result<(), PassportError> {
    let got = [("calibration_sha256", &passport.calibration_sha256, &done.calibration_sha256)];
    let scales = Some(done.scales_sha256.clone());
    for (field, got, want) in got.into_iter().chain([("scales_sha256", &passport.scales_sha256, &scales)]) {
        if let (Some(got), Some(want)) = (got, want)
            && got != want
        {
            return Err(PassportError::Mismatch {
                path: engine.display().to_string(),
                field: field.to_owned(),
                got: got.clone(),
                want: want.clone(),
            });
        }
    }
    Ok(())
}

/// Quantises the joint denoiser again and compares it with fp32, and with itself without SmoothQuant.
fn verify_joint(
    engine: &Path,
    passport: &Passport,
    fp32: &Model,
    config: QuantConfig,
    runner: &Runner,
    with: &mut Verify<'_>,
) -> Result<(Quantised, Verified, LayerErrors), PipelineError> {
    let failed = |source| failed_in(&passport.component, source);
    let checks = &mut with.checks;
    let observed = match config.precision {
        Precision::Int4w => None,
        _ => {
            let all = quant::observe_all(fp32, &config, runner, checks.calibration, checks.tell);
            Some(all.map_err(failed)?)
        }
    };
    let quantise = |config: &QuantConfig, checks: &mut Checks<'_>| {
        let inputs = &mut *checks.calibration;
        quant::quantise_observed(fp32, config, observed.as_ref(), runner, inputs, checks.tell)
    };
    let done = quantise(&config, checks).map_err(failed)?;
    check_scales(engine, passport, &done)?;
    let samples = checks.samples.max(1);
    let reference = quant::Reference::new(fp32, runner, checks.held_out, samples, checks.tell);
    let reference = reference.map_err(failed)?;
    let compare = |graph: &Model, checks: &mut Checks<'_>| {
        reference.compare(graph, runner, checks.held_out, checks.tell)
    };
    let mut report = compare(&done.emulated, checks).map_err(failed)?;
    let mut without_smoothing = None;
    if config.precision == Precision::Int8 && config.smooth_alpha.is_some() {
        let plain = QuantConfig { smooth_alpha: None, ..config.clone() };
        let plain = quantise(&plain, checks).map_err(failed)?;
        without_smoothing = Some(compare(&plain.emulated, checks).map_err(failed)?);
    }
    let inputs = format!("{}; calibrated with {}", checks.held_out.describe(), checks.calibration.describe());
    if let Some(task) = with.task {
        let mut tell = |graph| (checks.tell)(Work::Task(graph));
        report.task = Some(run_task(task, fp32, &done.emulated, &mut tell).map_err(failed)?);
    }
    let verified = Verified {
        component: passport.component.clone(),
        precision: passport.precision,
        past: report.past(&with.target.limits.of(passport.precision)),
        report,
        without_smoothing,
        inputs,
        layers: Vec::new(),
    };
    let errors = match with.layers {
        true => quant::sensitivities(fp32, &config, observed.as_ref(), &done.layers, &mut with.checks),
        false => Ok(Vec::new()),
    };
    Ok((done, verified, errors.map_err(failed)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundle_is_found_from_any_working_directory() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = folder.path().join("models/house");
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::create_dir_all(folder.path().join("engines")).unwrap();
        let out = folder.path().join("engines/a100");
        let stored = relative_to(&out, &bundle);
        assert_eq!(stored, Path::new("../../models/house"));
        std::fs::create_dir(&out).unwrap();
        let mut settings = Settings::new(&stored, "a100", Precision::Fp16);
        settings.keep_loaded = Some(Keep::Halves);
        std::fs::write(out.join(SETTINGS_FILE), serde_json::to_vec(&settings).unwrap()).unwrap();
        let read = settings_of(&out).unwrap();
        assert_eq!(read.bundle.canonicalize().unwrap(), bundle.canonicalize().unwrap());
        assert_eq!(mindseye_engines::residency::keep_of(&out).unwrap(), Keep::Halves);
        assert!(relative_to(Path::new("/one/engines"), Path::new("/two/bundle")).is_absolute());
        // Target files and bags, too; names stay names.
        assert_eq!((read.target.as_str(), read.calibration.as_str()), ("a100", "noise"));
        std::fs::write(folder.path().join("mine.toml"), "").unwrap();
        std::fs::create_dir(folder.path().join("models/bag")).unwrap();
        settings.target = relative_to(&out, &folder.path().join("mine.toml")).display().to_string();
        settings.calibration = relative_to(&out, &folder.path().join("models/bag")).display().to_string();
        std::fs::write(out.join(SETTINGS_FILE), serde_json::to_vec(&settings).unwrap()).unwrap();
        let read = settings_of(&out).unwrap();
        assert!(Path::new(&read.target).is_file() && Path::new(&read.calibration).is_dir(), "{read:?}");
    }
}
