//! Bundles to engines: quantisation, the ONNX that goes to TensorRT, and real builds with TensorRT-RTX.
//!
//! TensorRT-RTX builds engines for an A100 on a machine without a GPU. Its library is proprietary and not in the
//! repository: `pip download --no-deps tensorrt-rtx-cu12-libs==1.7.1.116`, unpack, and set
//! `MINDSEYE_TENSORRT_LIB_DIR`. Where it is missing, those tests say so on one line and are skipped.
#![allow(clippy::unwrap_used)] // a failed step is a failed test

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use mindseye_builder::onnx::{MemoryWeights, WeightMeta, WeightSource, denoiser_graph, fused};
use mindseye_builder::pipeline::{self, PipelineError, Request, Settings, Verify};
use mindseye_builder::plan::ModelSpec;
use mindseye_builder::quant::{
    self, CalibrationSource, Checks, QuantConfig, Runner, SuppliedError, SyntheticDenoiser, TaskEvaluation,
    TaskFigures, e4m3, to_float16,
};
use mindseye_engines::backend::{Backend, OrtBackend, PrepareOptions, RtenBackend, Tensor};
use mindseye_engines::bundle::{
    BoundingBoxSpec, Bundle, BundleWriter, ComponentFormat, FORMAT, Guide, ImageSpec, LatentSpec, LiftParams,
    Limits, Manifest, Provenance, RopeSpec, SamplerSpec,
};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::onnx::{DataType, Dim, ExternalData, Model, SaveOptions, Storage, WeightError};
use mindseye_engines::passport::Passport;
use mindseye_engines::sampler::{Grid, Solver};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::{Precision, Target};
use mindseye_engines::trt::{self, Library, LoadOptions};
use mindseye_tools::export::write_vectors;

/// Says on a line of its own, which the test program does not hold back, that a test is skipped and why.
macro_rules! skipped {
    ($($why:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}", format_args!($($why)*));
    }};
}

fn config(heads: usize, head_dim: usize, layers: usize) -> DitConfig {
    DitConfig {
        in_channels: 16,
        out_channels: 16,
        latent_height: 2,
        latent_width: 3,
        heads,
        head_dim,
        layers,
        ffn_dim: 4 * heads * head_dim,
        text_dim: 32,
        text_len: 4,
        freq_dim: 64,
        camera_channels: 24,
        pooled_text: true,
        lift: true,
        ..DitConfig::SMALLEST
    }
}

fn weights(cfg: &DitConfig) -> MemoryWeights {
    let mut state = 99u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f32 / (1u64 << 31) as f32) * 2.0 - 1.0
    };
    let mut weights = MemoryWeights::new();
    for p in count_denoiser(cfg, 4, 0, 2).params() {
        let n: usize = p.shape.iter().product();
        let fan_in: usize = p.shape[1..].iter().product::<usize>().max(1);
        let norm = p.name.contains("norm") && p.name.ends_with("weight");
        let scale = match () {
            () if norm => 0.1,
            () if p.name.ends_with("bias") => 0.02,
            () => (3.0 / fan_in as f32).sqrt(),
        };
        let values = (0..n).map(|_| uniform() * scale + if norm { 1.0 } else { 0.0 }).collect();
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    weights
}

/// A bundle of one denoiser with random weights.
fn bundle(folder: &Path, cfg: &DitConfig) -> Bundle {
    bundle_of(folder, cfg, &[DenoiserKind::Joint])
}

/// A bundle of graphs of one denoiser.
fn bundle_of(folder: &Path, cfg: &DitConfig, kinds: &[DenoiserKind]) -> Bundle {
    let manifest = Manifest {
        format: FORMAT,
        name: "random".into(),
        precision: "f32".into(),
        target: "cpu".into(),
        license: "CC0-1.0".into(),
        image: ImageSpec { width: 24, height: 16, frame_stride: 3, frames_per_second: 10.0 },
        latent: LatentSpec {
            channels: cfg.out_channels,
            height: cfg.latent_height,
            width: cfg.latent_width,
            frames: 4,
            mean: vec![0.0; cfg.out_channels],
            std: vec![1.0; cfg.out_channels],
        },
        rope: RopeSpec { gap: 50.0 },
        limits: Limits { context_trained: 3, context_allowed: 6, target_trained: 2, target_allowed: 4 },
        sampler: SamplerSpec {
            grid: Grid::Plain,
            solver: Solver::Euler,
            shift: 1.0,
            steps: 4,
            guidance: 1.0,
            prediction: cfg.prediction,
            guide: Guide::None,
        },
        provenance: Provenance { source: "random weights".into(), ..Provenance::default() },
        dit: cfg.clone(),
        networks: Default::default(),
        bounding_box: BoundingBoxSpec { score_min: 0.3 },
        lift: cfg.lift.then(LiftParams::uncalibrated),
        evaluation: Default::default(),
        component: BTreeMap::new(),
    };
    let mut writer = BundleWriter::create(folder.join("bundle"), manifest).unwrap();
    // Large weights go beside the graph, as they do in large bundles.
    let external = if cfg.layers > 8 { ExternalData::Always } else { ExternalData::Auto };
    for &kind in kinds {
        let graph = denoiser_graph(cfg, Arc::new(weights(cfg)), kind, Dim::Fixed(1)).unwrap();
        let file = format!("{}.onnx", kind.component());
        graph.save(writer.path(&file), &SaveOptions { external, ..SaveOptions::default() }).unwrap();
        writer.add(kind.component(), ComponentFormat::Onnx, &[&file]).unwrap();
    }
    writer.finish().unwrap()
}

fn runner() -> Runner {
    Runner::new(Arc::new(RtenBackend))
}

fn source(cfg: &DitConfig, items: u64) -> SyntheticDenoiser {
    SyntheticDenoiser::new(cfg.clone(), 3, 2, 50.0, items, 1)
}

/// Two of the calibration's own items: with random weights and noise there is nothing to generalise to.
fn held_out(cfg: &DitConfig) -> SyntheticDenoiser {
    source(cfg, 2)
}

/// TensorRT-RTX, or a line that says why not.
fn rtx() -> Option<Library> {
    if std::env::var_os("MINDSEYE_TENSORRT_LIB_DIR").is_none_or(|v| v.is_empty()) {
        skipped!("MINDSEYE_TENSORRT_LIB_DIR is not set, no TensorRT-RTX here");
        return None;
    }
    match Library::find(&LoadOptions::default()) {
        Ok(library) => Some(library),
        Err(e) => {
            skipped!("{e}");
            None
        }
    }
}

struct Fixed;

impl TaskEvaluation for Fixed {
    fn evaluate(&self, denoiser: &Path) -> Result<TaskFigures, SuppliedError> {
        let quantised = denoiser.file_name().is_some_and(|n| n == "quantised.onnx");
        Model::load(denoiser).map_err(SuppliedError::new)?;
        let success = if quantised { 0.75 } else { 0.8 };
        Ok(TaskFigures { success, consistency: 0.9, scenes: 20, answers: Vec::new() })
    }
}

struct Case<'a> {
    bundle: &'a Bundle,
    library: Option<&'a Library>,
    graphs_only: bool,
    target: &'a str,
    precision: Precision,
    out: PathBuf,
}

fn build(
    case: &Case<'_>,
    edit: impl FnOnce(&mut Settings),
) -> Result<Vec<pipeline::BuiltComponent>, PipelineError> {
    let mut settings = Settings::new(case.bundle.directory(), case.target, case.precision);
    settings.calibration_items = 3;
    settings.verify_items = 2;
    edit(&mut settings);
    let target = Target::named(case.target).unwrap();
    pipeline::build_bundle(Request {
        bundle: case.bundle,
        settings,
        target: &target,
        out: &case.out,
        library: case.library,
        graphs_only: case.graphs_only,
        runner: &runner(),
        calibration: &mut source(&case.bundle.manifest().dit, 3),
        held_out: &mut held_out(&case.bundle.manifest().dit),
        task: Some(&Fixed),
        auto_exclude: false,
        keep_onnx: true,
        workspace_bytes: Some(1 << 30),
        timing_cache: None,
        hardware_compatible: false,
        version_compatible: false,
        cancel: Arc::new(AtomicBool::new(false)),
        progress: Arc::new(|_| {}),
    })
}

#[test]
fn rtx_builds_every_precision_for_the_a100_and_fp8_for_the_l4() {
    let Some(library) = rtx() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cfg = config(4, 48, 4);
    let bundle = bundle(folder.path(), &cfg);
    let mut sizes = BTreeMap::new();
    for (target, precision) in [
        ("a100", Precision::Fp16),
        ("a100", Precision::Bf16),
        ("a100", Precision::Int8),
        ("a100", Precision::Int4w),
        ("l4", Precision::Fp8),
    ] {
        let out = folder.path().join(format!("{target}-{precision}"));
        let case = Case {
            bundle: &bundle,
            library: Some(&library),
            graphs_only: false,
            target,
            precision,
            out: out.clone(),
        };
        let built = build(&case, |_| {}).unwrap_or_else(|e| panic!("{target} {precision}: {e}"));
        let [b] = built.as_slice() else { panic!("one component") };
        let bytes = std::fs::read(&b.file).unwrap();
        assert_eq!(&bytes[..4], &trt::RTX_ENGINE_MAGIC, "{target} {precision}");
        let p = Passport::read(&b.file).unwrap();
        assert_eq!(p, b.passport);
        assert_eq!((p.precision, p.engine_bytes), (precision, bytes.len() as u64));
        assert_eq!(p.bundle_sha256, bundle.hash());
        assert_eq!(p.library, "tensorrt-rtx");
        assert_eq!(p.target, target);
        let quantised = !matches!(precision, Precision::Fp16 | Precision::Bf16);
        assert_eq!(p.scales_sha256.is_some(), quantised);
        assert_eq!(p.calibration_sha256.is_some(), quantised && precision != Precision::Int4w);
        assert_eq!(p.verification.is_some(), quantised);
        if let Some(v) = &p.verification {
            assert_eq!(v.task["scenes"], 20.0);
            assert!(v.outputs["sample"] > 0.0 && v.outputs["sample"] < 0.15);
        }
        println!(
            "{target} {precision}: {} bytes, {:.1} s, {:?}",
            p.engine_bytes, p.build_seconds, p.verification
        );
        sizes.insert((target, precision), p.engine_bytes);
        assert_eq!(pipeline::settings_of(&out).unwrap().precision, precision);
    }
    // Kernels outweigh the weights of a network this small; four bits still show.
    assert!(sizes[&("a100", Precision::Int4w)] < sizes[&("a100", Precision::Fp16)], "{sizes:?}");
}

#[test]
fn what_cannot_be_built_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cfg = config(2, 32, 3);
    let bundle = bundle(folder.path(), &cfg);
    let library = rtx();
    let mut cases: Vec<(&str, Precision, &str)> = vec![
        ("a100", Precision::Fp8, "compute capability 8.9"),
        ("orin-agx", Precision::Fp8, "--precision int8"),
    ];
    if library.is_some() {
        cases.push(("orin-agx", Precision::Int8, "TensorRT-RTX"));
        cases.push(("h100", Precision::Fp16, "TensorRT-RTX"));
    } else {
        cases.push(("orin-agx", Precision::Int8, "--lib"));
    }
    for (target, precision, want) in cases {
        let out = folder.path().join("engines");
        let case = Case {
            bundle: &bundle,
            library: library.as_ref(),
            graphs_only: false,
            target,
            precision,
            out: out.clone(),
        };
        let text = build(&case, |_| {}).unwrap_err().to_string();
        assert!(text.contains(want), "{target} {precision}: {text}");
        assert!(!out.exists());
    }
    let out = folder.path().join("engines");
    let case = Case {
        bundle: &bundle,
        library: None,
        graphs_only: false,
        target: "cpu",
        precision: Precision::Int8,
        out: out.clone(),
    };
    let text = build(&case, |s| s.context_latents = Some(7)).unwrap_err().to_string();
    assert!(text.contains("7 context latents are outside the bundle's limits (1 to 6)"), "{text}");
    // Limits past which no quantised graph goes: the worst layers are named, and nothing is left.
    let file = folder.path().join("strict.toml");
    let strict = include_str!("../../configs/targets/cpu.toml")
        .replace("output_relative_l2 = 0.05", "output_relative_l2 = 1e-7");
    std::fs::write(&file, strict).unwrap();
    let case = Case { target: file.to_str().unwrap(), ..case };
    let text = build(&case, |_| {}).unwrap_err().to_string();
    assert!(text.contains("relative L2") && text.contains("worst layers: blocks.1."), "{text}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("photos"), b"mine").unwrap();
    let case = Case { target: "cpu", ..case };
    assert!(build(&case, |_| {}).unwrap_err().to_string().contains("something other than engines"));
    assert!(out.join("photos").exists());
}

#[test]
fn cpu_int8_is_built_verified_and_checked_against_its_passport() {
    let folder = tempfile::tempdir().unwrap();
    let cfg = config(2, 32, 4);
    let bundle = bundle(folder.path(), &cfg);
    let out = folder.path().join("engines");
    let case = Case {
        bundle: &bundle,
        library: None,
        graphs_only: false,
        target: "cpu",
        precision: Precision::Int8,
        out: out.clone(),
    };
    build(&case, |_| {}).unwrap();
    // A second build replaces the first.
    build(&case, |_| {}).unwrap();
    let target = Target::named("cpu").unwrap();
    let verify = |bundle: &Bundle, items| {
        let checks = Checks {
            runner: &runner(),
            calibration: &mut source(&cfg, items),
            held_out: &mut held_out(&cfg),
            samples: 2,
            tell: &mut |_| true,
        };
        pipeline::verify_built(
            &out,
            Verify { bundle, target: &target, checks, task: Some(&Fixed), layers: true },
        )
    };
    let all = verify(&bundle, 3).unwrap();
    let v = &all[0];
    assert!(v.past.is_none());
    assert!(v.report.outputs["sample"] < 0.05);
    assert!(v.without_smoothing.is_some());
    // Every quantised layer has its part in the error, and the parts are all of it.
    let quantised: Vec<_> = v.layers.iter().filter(|l| l.precision == Precision::Int8).collect();
    assert_eq!(quantised.len(), 2 * 10, "{:?}", v.layers);
    assert!(quantised.iter().all(|l| l.error.is_some_and(|e| e > 0.0) && l.bytes > 0 && l.gigaflop > 0.0));
    let shares: f64 = v.layers.iter().filter_map(|l| l.error_share).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");
    let task = v.report.task.as_ref().unwrap();
    assert_eq!((task.quantised.scenes, task.fp32.success, task.quantised.success), (20, 0.8, 0.75));
    // Other calibration inputs than at build time are noticed, and so are another bundle and a changed graph.
    let text = verify(&bundle, 2).unwrap_err().to_string();
    assert!(text.contains("calibration_sha256"), "{text}");
    let elsewhere = tempfile::tempdir().unwrap();
    let another = self::bundle(elsewhere.path(), &config(2, 32, 3));
    let text = verify(&another, 3).unwrap_err().to_string();
    assert!(text.contains("bundle_sha256 is") && text.contains(another.hash()), "{text}");
    let graph = out.join("denoiser.onnx");
    let mut bytes = std::fs::read(&graph).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&graph, bytes).unwrap();
    let text = verify(&bundle, 3).unwrap_err().to_string();
    assert!(text.contains("engine_sha256 is"), "{text}");
}

/// Graphs for a machine that this one cannot build engines for: quantised and checked here, no library asked.
#[test]
fn graphs_of_any_target_are_written_and_verified_without_tensorrt() {
    let folder = tempfile::tempdir().unwrap();
    let cfg = config(2, 32, 4);
    let bundle = bundle(folder.path(), &cfg);
    for (target, precision) in [("orin-agx", Precision::Int4w), ("l4", Precision::Fp8)] {
        let out = folder.path().join(target);
        let case =
            Case { bundle: &bundle, library: None, graphs_only: true, target, precision, out: out.clone() };
        let built = build(&case, |_| {}).unwrap();
        let p = &built[0].passport;
        assert_eq!((p.library.as_str(), p.target.as_str(), p.precision), ("onnx", target, precision));
        assert!(built[0].file.ends_with("denoiser.onnx"));
        let target = Target::named(target).unwrap();
        let checks = Checks {
            runner: &runner(),
            calibration: &mut source(&cfg, 3),
            held_out: &mut held_out(&cfg),
            samples: 2,
            tell: &mut |_| true,
        };
        let all = pipeline::verify_built(
            &out,
            Verify { bundle: &bundle, target: &target, checks, task: None, layers: false },
        );
        let v = &all.unwrap()[0];
        assert_eq!((v.precision, v.past.clone()), (precision, None));
        assert_eq!(v.report.outputs, built[0].report.as_ref().unwrap().outputs);
    }
    let out = folder.path().join("refused");
    let case = Case {
        bundle: &bundle,
        library: None,
        graphs_only: true,
        target: "orin-agx",
        precision: Precision::Fp8,
        out,
    };
    assert!(build(&case, |_| {}).unwrap_err().to_string().contains("compute capability 8.9"));
}

/// The cached halves are built in the precision that was asked for, and compared with fp32 by what `verify` runs.
#[test]
fn cached_halves_are_verified_in_every_precision() {
    let folder = tempfile::tempdir().unwrap();
    let cfg = config(2, 32, 3);
    let bundle =
        bundle_of(folder.path(), &cfg, &[DenoiserKind::Joint, DenoiserKind::Prefill, DenoiserKind::Cached]);
    for (target, precision, limit) in [
        ("cpu", Precision::Fp32, 1e-9),
        ("orin-agx", Precision::Fp16, 0.005),
        ("orin-agx", Precision::Bf16, 0.03),
        ("orin-agx", Precision::Int8, 0.05),
        ("orin-agx", Precision::Int4w, 0.3),
        ("l4", Precision::Fp8, 0.15),
    ] {
        let out = folder.path().join(precision.name());
        let library = None;
        build(
            &Case { bundle: &bundle, library, graphs_only: true, target, precision, out: out.clone() },
            |_| {},
        )
        .unwrap();
        let checks = Checks {
            runner: &runner(),
            calibration: &mut source(&cfg, 3),
            held_out: &mut held_out(&cfg),
            samples: 2,
            tell: &mut |_| true,
        };
        let target = Target::named(target).unwrap();
        let verify = Verify { bundle: &bundle, target: &target, checks, task: None, layers: false };
        let all = pipeline::verify_built(&out, verify).unwrap();
        let parts: Vec<&str> = all.iter().map(|v| v.component.as_str()).collect();
        assert_eq!(parts, ["denoiser", "denoiser_cached", "denoiser_prefill"]);
        for v in &all {
            let errors = &v.report.outputs;
            assert_eq!((v.precision, v.report.samples), (precision, 2), "{}", v.component);
            assert!(errors.values().all(|e| *e < limit), "{precision} {}: {errors:?}", v.component);
            let rounded = errors.values().any(|e| *e > 1e-5);
            assert_eq!(rounded, precision != Precision::Fp32, "{precision} {}: {errors:?}", v.component);
            assert!(!errors.is_empty());
        }
    }
}

/// E4M3 against an implementation that is not ours: all 256 codes, and the rounding of all 16-bit floats.
#[test]
fn e4m3_is_that_of_ml_dtypes() {
    let values = include_str!("../data/e4m3/values.txt");
    assert_eq!(values.lines().count(), 256);
    for (code, line) in values.lines().enumerate() {
        let want: f32 = line.parse().unwrap();
        let got = e4m3::to_f32(code as u8);
        assert!(
            got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
            "{code:#04x}: {got} {want}"
        );
    }
    let rounded = include_bytes!("../data/e4m3/rounded.bin");
    for bits in 0..=u16::MAX {
        // A 16-bit float by hand: sign, five bits of exponent, ten of mantissa.
        let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f32::from(bits & 1023));
        let magnitude = match exponent {
            0 => mantissa * 2f32.powi(-24),
            31 if mantissa == 0.0 => f32::INFINITY,
            31 => f32::NAN,
            _ => (1024.0 + mantissa) * 2f32.powi(exponent - 25),
        };
        let x = if bits >> 15 == 1 { -magnitude } else { magnitude };
        let got = e4m3::from_f32(x) & if x.is_nan() { 0x7f } else { 0xff };
        assert_eq!(got, rounded[usize::from(bits)], "{x}");
    }
}

/// onnxruntime, or a line that says why not.
fn onnxruntime() -> Option<OrtBackend> {
    OrtBackend::open().map_err(|e| skipped!("{e}")).ok()
}

fn run(backend: &dyn Backend, model: &Model, cfg: &DitConfig) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("graph.onnx");
    model.save(&path, &SaveOptions::default()).unwrap();
    let engine = backend.prepare(&path, &PrepareOptions::default().with_threads(1)).unwrap();
    let inputs = source(cfg, 1).next().unwrap().unwrap();
    let views: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut out = engine.session().unwrap().run(&views).unwrap();
    out.remove(0).1.into_f32().unwrap()
}

fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum = |f: &dyn Fn(usize) -> f64| (0..want.len()).map(|i| f(i).powi(2)).sum::<f64>();
    (sum(&|i| f64::from(got[i]) - f64::from(want[i])) / sum(&|i| f64::from(want[i]))).sqrt()
}

#[test]
fn onnxruntime_agrees_with_rten_and_with_the_emulation_of_every_precision() {
    let Some(ort) = onnxruntime() else { return };
    let cfg = config(4, 48, 3);
    let fp32 = denoiser_graph(&cfg, Arc::new(weights(&cfg)), DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    let wanted = run(&RtenBackend, &fp32, &cfg);
    let error = relative(&run(&ort, &fp32, &cfg), &wanted);
    println!("fp32, onnxruntime against rten: {error:.1e}");
    assert!(error < 1e-5);
    let error = relative(&run(&ort, &to_float16(&fp32, Precision::Fp16).unwrap(), &cfg), &wanted);
    println!("fp16, onnxruntime against fp32: {error:.1e}");
    assert!(error < 5e-3);
    let error = relative(&run(&ort, &fused(&fp32), &cfg), &wanted);
    println!("opset 23, onnxruntime against rten: {error:.1e}");
    assert!(error < 1e-5);
    for precision in [Precision::Int8, Precision::Int4w, Precision::Fp8] {
        let mut c = QuantConfig::new(precision);
        c.attention_head_dim = Some(cfg.head_dim);
        let q = quant::quantise(&fp32, &c, &runner(), &mut source(&cfg, 2), &mut |_| true).unwrap();
        let emulated = run(&RtenBackend, &q.emulated, &cfg);
        let deployed = run(&ort, &q.deploy, &cfg);
        let (between, lost) = (relative(&deployed, &emulated), relative(&emulated, &wanted));
        println!("{precision}: deployed against emulated {between:.1e}, emulated against fp32 {lost:.1e}");
        // A value on a rounding boundary may fall either way between two libraries.
        assert!(between < 0.1 * lost + 1e-5, "{precision}: {between} {lost}");
        let half = run(&ort, &to_float16(&q.deploy, Precision::Fp16).unwrap(), &cfg);
        let error = relative(&half, &wanted);
        println!("{precision} with fp16 floats: {error:.1e} against fp32");
        assert!(error < 1.5 * lost + 5e-3, "{precision}: {error}");
    }
}

/// Writes the shipped denoiser in every precision to the folder named by `MINDSEYE_ONNX_OUT`, each with inputs and with
/// what the emulation gives for them, for `tests/python/check_onnx.py`.
#[test]
#[ignore = "writes files for other tools; run by tests/python/run.sh"]
fn write_graphs_for_other_tools() {
    let Some(folder) = std::env::var_os("MINDSEYE_ONNX_OUT").map(PathBuf::from) else {
        skipped!("MINDSEYE_ONNX_OUT is not set");
        return;
    };
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    let bundle = Bundle::load(shipped).unwrap();
    let cfg = bundle.manifest().dit.clone();
    let fp32 = Model::load(bundle.path("denoiser").unwrap()).unwrap();
    // Vectors are made by running the graph at the path where the one to check is put after.
    let save = |name: &str, graph: &Model, emulated: Option<&Model>| {
        let path = folder.join(name);
        if let Some(emulated) = emulated {
            emulated.save(&path, &SaveOptions::default()).unwrap();
            write_vectors(&path, cfg.tokens_per_frame()).unwrap();
        }
        graph.save(&path, &SaveOptions::default()).unwrap();
    };
    save("fp32.onnx", &fp32, Some(&fp32));
    let codes = SaveOptions { storage: Storage::Codes, ..SaveOptions::default() };
    fp32.save(folder.join("codes.onnx"), &codes).unwrap();
    write_vectors(&folder.join("codes.onnx"), cfg.tokens_per_frame()).unwrap();
    save("fp16.onnx", &to_float16(&fp32, Precision::Fp16).unwrap(), Some(&fp32));
    // onnxruntime's CPU kernels know no bf16: the checker alone sees these.
    save("bf16.onnx", &to_float16(&fp32, Precision::Bf16).unwrap(), None);
    let larger = fused(&fp32);
    save("fused.onnx", &larger, Some(&fp32));
    save("fused-fp16.onnx", &to_float16(&larger, Precision::Fp16).unwrap(), Some(&fp32));
    save("fused-bf16.onnx", &to_float16(&larger, Precision::Bf16).unwrap(), None);
    for precision in [Precision::Int8, Precision::Int4w, Precision::Fp8] {
        let mut c = QuantConfig::new(precision);
        c.attention_head_dim = Some(cfg.head_dim);
        let mut noise = SyntheticDenoiser::new(cfg.clone(), 6, 6, 50.0, 2, 1);
        let q = quant::quantise(&fp32, &c, &runner(), &mut noise, &mut |_| true).unwrap();
        save(&format!("{precision}.onnx"), &q.deploy, Some(&q.emulated));
        let half = to_float16(&q.deploy, Precision::Fp16).unwrap();
        save(&format!("{precision}-fp16.onnx"), &half, Some(&q.emulated));
        save(&format!("{precision}-bf16.onnx"), &to_float16(&q.deploy, Precision::Bf16).unwrap(), None);
    }
}

/// A transformer of 12 layers and width 1024 builds for the A100 in INT8 within 5 minutes and 3 GB.
#[test]
#[ignore = "slow: a minute or more, and 3 GB of memory"]
fn rtx_builds_a_large_transformer_within_time_and_memory() {
    let Some(library) = rtx() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cfg = config(16, 64, 12);
    let bundle = bundle(folder.path(), &cfg);
    let out = folder.path().join("engines");
    let case = Case {
        bundle: &bundle,
        library: Some(&library),
        graphs_only: false,
        target: "a100",
        precision: Precision::Int8,
        out,
    };
    let started = Instant::now();
    let built = build(&case, |s| s.verify_items = 1).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak: f64 = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or(0.0);
    println!("{} bytes, {seconds:.0} s, peak {:.2} GB", built[0].passport.engine_bytes, peak / 1e6);
    assert!(seconds < 300.0 && peak < 3e6, "{seconds} s, {peak} kB");
}

/// Random weights that are made when they are read.
struct Seeded(BTreeMap<String, Vec<usize>>);

impl WeightSource for Seeded {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<WeightMeta> {
        self.0.get(name).map(|shape| WeightMeta { dtype: DataType::F32, shape: shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, out: &mut [f32]) -> Result<(), WeightError> {
        let shape = &self.0[name];
        let norm = name.contains("norm") && name.ends_with("weight");
        let fan_in = shape[1..].iter().product::<usize>().max(1) as f32;
        let scale = if name.ends_with("bias") { 0.02 } else { (3.0 / fan_in).sqrt() };
        let seed = name.bytes().fold(7u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        for (i, v) in out.iter_mut().enumerate() {
            let mut x = (seed ^ (offset + i as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let unit = (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            *v = if norm { 1.0 } else { scale * unit };
        }
        Ok(())
    }
}

/// Largest resident memory of this process so far, bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Calibrates a member with seeded weights block by block, stops after `stop_after` runs of a block, goes on, packs the
/// weights, and holds the peak to the stated memory.
fn calibrated_in_two_goes(cfg: DitConfig, [context, targets]: [usize; 2], items: u64, stop_after: u64) {
    let folder = tempfile::tempdir().unwrap();
    let params = count_denoiser(&cfg, 2, 0, 2);
    let weights = Seeded(params.params().iter().map(|p| (p.name.clone(), p.shape.clone())).collect());
    let graph = denoiser_graph(&cfg, Arc::new(weights), DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    let file = folder.path().join("denoiser.onnx");
    graph.save(&file, &SaveOptions { external: ExternalData::Always, ..SaveOptions::default() }).unwrap();
    drop(graph);
    let fp32 = Model::load(&file).unwrap();
    let kept = runner().keeping(Some(folder.path().join("cache"))).of_graph("random");
    let pieces = cfg.layers as u64 + 1;
    let tokens = cfg.tokens_per_frame();
    let mut inputs = SyntheticDenoiser::new(cfg, context, targets, 50.0, items, 1);
    let c = QuantConfig::new(Precision::Int8);
    let started = Instant::now();
    let mut half = |work| !matches!(work, quant::Work::Calibrate { done, .. } if done >= stop_after);
    let stopped = quant::observe_all(&fp32, &c, &kept, &mut inputs, &mut half);
    assert!(matches!(stopped, Err(quant::QuantError::Cancelled)));
    let first = started.elapsed().as_secs_f64();
    let mut calls = std::collections::BTreeSet::new();
    let mut tell = |work| {
        if let quant::Work::Calibrate { done, .. } = work {
            calls.insert(done);
        }
        true
    };
    let observed = quant::observe_all(&fp32, &c, &kept, &mut inputs, &mut tell).unwrap();
    let all = started.elapsed().as_secs_f64();
    // At most the piece that was under way is run again.
    assert!(calls.first() >= Some(&(stop_after - items)), "it went on where it was stopped: {calls:?}");
    assert_eq!(calls.last(), Some(&(items * pieces)));
    let packed =
        quant::quantise_observed(&fp32, &c, Some(&observed), &kept, &mut inputs, &mut |_| true).unwrap();
    println!(
        "{} parameters, {items} items of {} latents of {tokens} tokens: calibrated in {all:.0} s (stopped after \
         {first:.0} s), {} layers packed in {:.0} s, peak {:.2} GB",
        params.parameters(),
        context + targets,
        packed.layers.len(),
        started.elapsed().as_secs_f64() - all,
        peak_bytes() as f64 / 1e9
    );
    assert!(peak_bytes() < quant::MEMORY_BYTES, "{}", peak_bytes());
}

/// A member of the family with 10^9 parameters.
#[test]
#[ignore = "writes 5 GB and takes minutes"]
fn a_large_member_is_calibrated_within_the_stated_memory() {
    let cfg = DitConfig {
        in_channels: 48,
        out_channels: 48,
        latent_height: 8,
        latent_width: 16,
        patch: [2, 2],
        ffn_dim: 8960,
        text_dim: 1024,
        text_len: 64,
        freq_dim: 256,
        camera_channels: 0,
        pooled_text: false,
        lift: false,
        ..config(12, 128, 22)
    };
    assert!(count_denoiser(&cfg, 2, 0, 2).parameters() > 1_000_000_000);
    calibrated_in_two_goes(cfg, [2, 2], 2, 22);
}

/// Memory does not grow with the number of blocks: four of the largest member's, with as many latents as
/// [`quant::frames_within`] allows for the stated memory.
#[test]
#[ignore = "writes 4 GB and takes minutes"]
fn blocks_of_the_largest_member_are_calibrated_within_the_stated_memory() {
    let model = ModelSpec::from_toml(include_str!("../../configs/models/wan22-5b.toml")).unwrap();
    let cfg = DitConfig { layers: 4, ..model.dit };
    let frames = quant::frames_within(&cfg, 131, quant::MEMORY_BYTES);
    assert!((10..131).contains(&frames), "{frames}");
    calibrated_in_two_goes(cfg, [frames - 6, 6], 1, 2);
}
