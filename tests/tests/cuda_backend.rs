//! The CUDA backend over a driver whose device is the emulator of `tests/cuda-emulator`: library, kernels, plans, graphs
//! and errors are those of a machine with a GPU, and only the device's arithmetic is done on the CPU. Skipped, in one
//! line, where g++ is missing.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use mindseye_builder::onnx::{MemoryWeights, denoiser_graph};
use mindseye_engines::backend::{Backend, PrepareOptions, Session, Tensor, by_name};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::cuda::{CudaBackend, CudaDevice, Memory, check_kernels};
use mindseye_engines::denoise::{Denoise, DenoiseStep};
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::onnx::{Dim, Graph, Initializer, Model, Node, SaveOptions, ValueInfo};
use mindseye_engines::session_denoiser::{CachedDenoiser, DenoiserKind, SessionDenoiser, SplitDenoiser};
use mindseye_engines::target::Precision;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The emulated driver, compiled once; `None`, with the reason printed, where g++ is missing.
fn driver() -> Option<&'static Path> {
    static DRIVER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = DRIVER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated-driver");
        std::fs::create_dir_all(&folder).unwrap();
        let (out, emulator) = (folder.join("libcuda.so.1"), root().join("tests/cuda-emulator"));
        let mut gxx = Command::new("g++");
        gxx.args([
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wno-unknown-pragmas",
            "-I",
        ]);
        gxx.arg(root().join("engines/src/cuda/kernels"))
            .arg("-I")
            .arg(&emulator)
            .arg("-o")
            .arg(&out)
            .arg(emulator.join("driver.cpp"));
        match gxx.output() {
            Err(e) => {
                println!("SKIP: kernels are emulated by programs that g++ compiles: {e}");
                None
            }
            Ok(done) => {
                assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
                Some(out)
            }
        }
    });
    made.as_deref()
}

/// A copy of the driver with other settings; a copy has a device of its own.
fn driver_with(folder: &Path, settings: &str) -> Option<PathBuf> {
    let copy = folder.join("libcuda.so.1");
    std::fs::copy(driver()?, &copy).unwrap();
    std::fs::write(folder.join("device"), settings).unwrap();
    Some(copy)
}

fn backend(precision: Precision) -> Option<CudaBackend> {
    let device = CudaDevice::with_kernels(0, Some(driver()?)).unwrap();
    Some(CudaBackend::on(device, precision).unwrap())
}

fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn relative(got: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut got.iter().zip(wanted).map(|(a, b)| f64::from(a - b)));
    (difference / square(&mut wanted.iter().map(|&v| f64::from(v)))).sqrt()
}

/// A member of the Wan family: patches of 2 x 2, velocity, everything that the kernels have a special case for.
fn config() -> DitConfig {
    DitConfig {
        in_channels: 8,
        out_channels: 8,
        latent_height: 4,
        latent_width: 6,
        patch: [2, 2],
        heads: 2,
        head_dim: 64,
        layers: 2,
        ffn_dim: 96,
        text_dim: 24,
        text_len: 5,
        freq_dim: 16,
        eps: 1e-6,
        rope_theta: 10000.0,
        prediction: Prediction::Velocity,
        camera_channels: 7,
        pooled_text: true,
        lift: true,
        attributes: 0,
        guide: None,
    }
}

fn denoiser(folder: &Path, cfg: &DitConfig, kind: DenoiserKind) -> PathBuf {
    let mut weights = MemoryWeights::new();
    for (i, p) in count_denoiser(cfg, 2, 0, 2).params().iter().enumerate() {
        let scale = 1.5 / (*p.shape.last().unwrap() as f32).sqrt();
        let values = noise(p.shape.iter().product(), i as u64).iter().map(|v| v * scale).collect();
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    let path = folder.join(format!("{}.onnx", kind.component()));
    let model = denoiser_graph(cfg, Arc::new(weights), kind, Dim::Fixed(1)).unwrap();
    model.save(&path, &SaveOptions::default()).unwrap();
    path
}

fn session(backend: &dyn Backend, path: &Path) -> Box<dyn Session> {
    backend.prepare(path, &PrepareOptions::default().with_threads(1)).unwrap().session().unwrap()
}

/// Noise for every input of a session, at these sizes for its symbols.
fn inputs(session: &dyn Session, sizes: &[(&str, usize)], seed: u64) -> Vec<(String, Tensor)> {
    let made = session.engine().inputs().iter().enumerate().map(|(i, port)| {
        let size = |d: &Dim| match d {
            Dim::Fixed(n) => *n,
            Dim::Symbol(s) => sizes.iter().find(|(name, _)| name == s).unwrap().1,
            Dim::Unknown => unreachable!("our graphs name every size"),
        };
        let shape: Vec<usize> = port.shape.iter().map(size).collect();
        let values = noise(shape.iter().product(), seed + i as u64);
        let tensor = match port.name.as_str() {
            // Two timesteps, of one entry of the batch.
            "rows" => Tensor::i64(&shape, (0..values.len() as i64).map(|f| i64::from(f > 1)).collect()),
            "row_batch" => Tensor::i64(&shape, vec![0; values.len()]),
            "ids" => Tensor::i64(&shape, values.iter().map(|v| (v.abs() * 9.0) as i64).collect()),
            "keep" | "mask_bias" => Tensor::f32(&shape, vec![1.0; values.len()]),
            _ => Tensor::f32(&shape, values),
        };
        (port.name.clone(), tensor)
    });
    made.collect()
}

/// Both precisions of a graph against rten, three times over: launched, recorded, replayed. Prints and bounds the
/// relative error of every output, and wants the same bytes every time.
fn agrees_with_rten(path: &Path, sizes: &[(&str, usize)]) {
    let mut rten = session(by_name("rten").unwrap().as_ref(), path);
    let given = inputs(rten.as_ref(), sizes, 3);
    let views: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let wanted = rten.run(&views).unwrap();
    for (precision, limit) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 2e-2)] {
        let Some(backend) = backend(precision) else { return };
        let mut cuda = session(&backend, path);
        let first = cuda.run(&views).unwrap();
        for ((name, got), (_, right)) in first.iter().zip(&wanted) {
            assert_eq!(got.shape, right.shape, "{name}");
            let error = relative(got.as_f32().unwrap(), right.as_f32().unwrap());
            println!("{} {name}: relative L2 {error:.1e}", precision.name());
            assert!(error < limit, "{} {name}: {error}", precision.name());
        }
        for _ in 0..2 {
            assert!(cuda.run(&views).unwrap() == first, "the same inputs gave other bytes");
        }
    }
}

#[test]
fn a_denoiser_of_the_wan_family_agrees_with_rten() {
    let dir = tempfile::tempdir().unwrap();
    let path = denoiser(dir.path(), &config(), DenoiserKind::Joint);
    agrees_with_rten(&path, &[("frames", 3), ("tokens", 18), ("timesteps", 2)]);
    let path = denoiser(dir.path(), &config(), DenoiserKind::Masked);
    agrees_with_rten(&path, &[("frames", 2), ("tokens", 12), ("timesteps", 2)]);
    // A head size that has no kernel of its own, and widths that are no multiples of eight.
    let odd = DitConfig {
        heads: 3,
        head_dim: 12,
        ffn_dim: 50,
        camera_channels: 0,
        pooled_text: false,
        lift: false,
        ..config()
    };
    let path = denoiser(dir.path(), &odd, DenoiserKind::Joint);
    agrees_with_rten(&path, &[("frames", 2), ("tokens", 12), ("timesteps", 2)]);
}

/// The shipped model, whole: 24 latents of context and targets take a minute or two in the emulator.
#[test]
#[ignore = "slow: every multiplication of the shipped model in the emulator"]
fn the_shipped_model_agrees_with_rten() {
    let models = root().join("models/house-tiny");
    agrees_with_rten(&models.join("denoiser.onnx"), &[("frames", 24), ("tokens", 144), ("timesteps", 2)]);
    agrees_with_rten(&models.join("text_encoder.onnx"), &[]);
    agrees_with_rten(&models.join("vae_encoder.onnx"), &[("groups", 2)]);
    agrees_with_rten(&models.join("vae_decoder.onnx"), &[("groups", 2)]);
}

#[test]
fn the_small_graphs_of_the_shipped_model_agree_with_rten() {
    let models = root().join("models/house-tiny");
    agrees_with_rten(&models.join("text_encoder.onnx"), &[]);
    agrees_with_rten(&models.join("vae_decoder.onnx"), &[("groups", 1)]);
    agrees_with_rten(&models.join("depth.onnx"), &[]);
    agrees_with_rten(&models.join("denoiser.onnx"), &[("frames", 2), ("tokens", 12), ("timesteps", 2)]);
}

/// Context and targets of one denoising step.
struct Case {
    latents: Vec<f32>,
    text: Vec<f32>,
    camera: Vec<f32>,
    rows: Vec<usize>,
    t_index: Vec<f64>,
}

impl Case {
    fn new(cfg: &DitConfig, context: usize, targets: usize) -> Self {
        let frames = context + targets;
        Case {
            latents: noise(frames * cfg.in_channels * cfg.latent_height * cfg.latent_width, 100),
            text: noise(cfg.text_len * cfg.text_dim, 101),
            camera: noise(frames * cfg.tokens_per_frame() * cfg.camera_channels, 102),
            rows: (0..frames).map(|f| usize::from(f >= context)).collect(),
            t_index: (0..frames).map(|f| (3 * f) as f64).collect(),
        }
    }

    fn step(&self) -> DenoiseStep<'_> {
        DenoiseStep {
            latents: &self.latents,
            timesteps: &[0.0, 700.0],
            rows: &self.rows,
            t_index: &self.t_index,
            text: &self.text,
            camera: Some(&self.camera),
            guide: None,
        }
    }
}

/// Keys and values of the context stay on the device: two contexts in turns, as guidance asks, against rten.
#[test]
fn contexts_stay_on_the_device() {
    let Some(cuda) = backend(Precision::Fp32) else { return };
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let files = [DenoiserKind::Prefill, DenoiserKind::Cached].map(|kind| denoiser(dir.path(), &cfg, kind));
    let split = |backend: &dyn Backend| {
        let [prefill, cached] = files.each_ref().map(|f| session(backend, f));
        SplitDenoiser::new(CachedDenoiser::new(cfg.clone(), prefill, cached).unwrap())
    };
    let (mut cuda, mut rten) = (split(&cuda), split(by_name("rten").unwrap().as_ref()));
    let mut case = Case::new(&cfg, 3, 2);
    let texts = [1, 2].map(|seed| noise(cfg.text_len * cfg.text_dim, seed));
    for round in 0..4 {
        for text in &texts {
            case.text.clone_from(text);
            let last = case.latents.len() - 1;
            case.latents[last] = round as f32;
            let (got, wanted) = (cuda.denoise(&case.step()).unwrap(), rten.denoise(&case.step()).unwrap());
            let error = relative(&got.prediction, &wanted.prediction);
            assert!(error < 1e-4, "round {round}: {error}");
            assert!(relative(&got.pose.concat(), &wanted.pose.concat()) < 1e-4);
        }
    }
    assert_eq!(cuda.prefills(), 2, "each context was computed once");
}

/// Shapes that change keep their own graphs, and one run does not disturb another.
#[test]
fn changing_shapes_give_the_same_answers() {
    let Some(cuda) = backend(Precision::Bf16) else { return };
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let path = denoiser(dir.path(), &cfg, DenoiserKind::Joint);
    let mut denoiser = SessionDenoiser::new(cfg.clone(), session(&cuda, &path)).unwrap();
    let mut answers = Vec::new();
    // The second, larger shape moves the arena under the first one's graph.
    for _ in 0..3 {
        for (context, targets) in [(1, 1), (2, 2)] {
            answers.push(denoiser.denoise(&Case::new(&cfg, context, targets).step()).unwrap());
        }
    }
    for i in 2..answers.len() {
        assert_eq!(answers[i], answers[i % 2], "run {i}");
    }
}

#[test]
fn kernels_are_called_with_the_right_arguments() {
    let Some(driver) = driver() else { return };
    let device = CudaDevice::with_kernels(0, Some(driver)).unwrap();
    let reports = check_kernels(&device, true).unwrap();
    assert_eq!(reports.len(), 13);
    for r in &reports {
        println!("{:<20} {:<40} relative error {:.1e}", r.kernel, r.shape, r.relative_error);
        assert!(r.relative_error < r.allowed, "{}: {}", r.kernel, r.relative_error);
        assert!(r.millis > 0.0 && r.rate.is_finite());
    }
}

fn text(error: &dyn std::error::Error) -> String {
    error.to_string()
}

#[test]
fn what_is_missing_or_too_old_is_told() {
    let Some(_) = driver() else { return };
    let check = |settings: &str, wanted: &str| {
        let dir = tempfile::tempdir().unwrap();
        let library = driver_with(dir.path(), settings).unwrap();
        let Err(e) = CudaDevice::with_kernels(0, Some(&library)) else { panic!("{settings} was accepted") };
        assert_eq!(text(&e), wanted, "{settings}");
        // The copy stays open: its file must outlive it.
        std::mem::forget(dir);
    };
    check("devices 0", "the CUDA driver finds no device");
    let needs = "is too old for the kernels: they need CUDA 12.5, which comes with driver 555";
    check("version 12020", &format!("the driver (CUDA 12.2) {needs}"));
    check("fail cuModuleLoadData", "cuda cuModuleLoadData failed: CUDA_ERROR_UNKNOWN");
    check("fail cuStreamCreate", "cuda cuStreamCreate failed: CUDA_ERROR_UNKNOWN");

    let Err(e) = CudaDevice::with_kernels(0, Some(Path::new("/nowhere/libcuda.so.1"))) else {
        panic!("opened")
    };
    assert!(text(&e).contains("/nowhere/libcuda.so.1"), "{e}");
    // A library that is no driver.
    let libm = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6"];
    if let Some(libm) = libm.into_iter().map(Path::new).find(|p| p.exists()) {
        let Err(e) = CudaDevice::with_kernels(0, Some(libm)) else { panic!("opened") };
        assert_eq!(
            text(&e),
            format!(
                "{} has no cuInit: it is no CUDA driver, or too old; install driver 555 or newer",
                libm.display()
            )
        );
    }
}

/// Out of memory is an answer with its figures, and the session goes on with what fits.
#[test]
fn out_of_memory_in_mid_goal_is_told_and_the_next_goal_works() {
    let Some(_) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let path = denoiser(dir.path(), &cfg, DenoiserKind::Joint);
    let library = driver_with(dir.path(), "memory 1500000").unwrap();
    let device = CudaDevice::with_kernels(0, Some(&library)).unwrap();
    let cuda = CudaBackend::on(Arc::clone(&device), Precision::Bf16).unwrap();
    let mut denoiser = SessionDenoiser::new(cfg.clone(), session(&cuda, &path)).unwrap();
    let small = Case::new(&cfg, 1, 1);
    let answer = denoiser.denoise(&small.step()).unwrap();
    let error = denoiser.denoise(&Case::new(&cfg, 40, 8).step()).unwrap_err().to_string();
    assert!(error.contains("device memory: ") && error.contains("wanted for values of one run"), "{error}");
    assert_eq!(denoiser.denoise(&small.step()).unwrap(), answer);

    // A limit of our own is told with what is wanted.
    let mut limited = CudaBackend::on(Arc::clone(&device), Precision::Bf16).unwrap();
    limited.memory_limit = Some(1000);
    let error = limited.prepare(&path, &PrepareOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("the limit is 1000"), "{error}");

    // Everything is given back.
    let before = device.free_bytes().unwrap();
    drop(Memory::new(&device, 1000, "a test").unwrap());
    assert_eq!(device.free_bytes().unwrap(), before);
    drop(denoiser);
    assert_eq!(device.free_bytes().unwrap(), 1_500_000);
    std::mem::forget(dir);
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let Some(cuda) = backend(Precision::Fp32) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = denoiser(dir.path(), &config(), DenoiserKind::Joint);
    let mut denoiser = session(&cuda, &path);
    let mut given = inputs(denoiser.as_ref(), &[("frames", 2), ("tokens", 12), ("timesteps", 2)], 1);
    let rows = given.iter().position(|(n, _)| n == "rows").unwrap();
    given[rows].1 = Tensor::i64(&[1, 2], vec![0, 2]);
    let views: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let error = denoiser.run(&views).unwrap_err().to_string();
    assert_eq!(error, r#"input "rows": expected rows of a table of 2, got 2"#);
    let error = denoiser.run_into(&views, &mut [("nothing", &mut Tensor::empty())]).unwrap_err().to_string();
    assert!(error.contains("nothing") || error.contains("rows"), "{error}");
}

/// An operator without a kernel is named before a weight is read: the weights' file is not even there.
#[test]
fn unknown_operators_are_named_before_weights_are_loaded() {
    let Some(cuda) = backend(Precision::Bf16) else { return };
    let dir = tempfile::tempdir().unwrap();
    let info = |name: &str| ValueInfo {
        name: name.into(),
        dtype: Some(mindseye_engines::onnx::DataType::F32),
        shape: Some(vec![Dim::Fixed(2)]),
    };
    let model = Model::new(Graph {
        nodes: vec![Node::new("wave", "Sin", &["x"], &["s"]), Node::new("sum", "Add", &["s", "w"], &["y"])],
        initializers: vec![Initializer::from_f32("w", &[2], &[1.0, 2.0])],
        inputs: vec![info("x")],
        outputs: vec![info("y")],
        ..Graph::default()
    });
    let path = dir.path().join("model.onnx");
    model.save(&path, &SaveOptions::default()).unwrap();
    let error = cuda.prepare(&path, &PrepareOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.ends_with(r#"no CUDA kernel for Sin (node "wave"); use another backend"#), "{error}");
}
