//! The CUDA backend over a driver whose device is the emulator of `tests/cuda-emulator`: library, kernels, plans, graphs
//! and errors are those of a machine with a GPU, and only the device's arithmetic is done on the CPU. Skipped, in one
//! line, where g++ is missing.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mindseye_builder::checkpoint::names::{umt5_params, vae_params};
use mindseye_builder::onnx::{
    DeclaredWeights, GraphBuilder, MemoryWeights, Way, denoiser_graph, fused, step_component,
    text_encoder_graph, vae_graph,
};
use mindseye_builder::plan::{ModelSpec, cuda_needs, declared_graphs};
use mindseye_builder::quant::{QuantConfig, Runner, SyntheticDenoiser, quantise, to_float16};
use mindseye_engines::backend::{Backend, PrepareOptions, Session, State, Tensor, by_name, is_state};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::cuda::{CudaBackend, CudaDevice, Memory, check_kernels, graph_needs, product_library};
use mindseye_engines::denoise::{Denoise, DenoiseStep, WalkPlan};
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::{Chunk, VaeConfig};
use mindseye_engines::model::{Ops, ParamSpec};
use mindseye_engines::onnx::{
    Attribute, DataType, Dim, Graph, Initializer, Model, Node, SaveOptions, ValueInfo,
};
use mindseye_engines::sampler::{Grid, Sampler, Schedule, Solver, guide};
use mindseye_engines::session_denoiser::{CachedDenoiser, DenoiserKind, SessionDenoiser, SplitDenoiser};
use mindseye_engines::target::Precision;

#[path = "../cuda-emulator/driver.rs"]
mod emulated;
use emulated::driver;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A copy of the driver with other settings; a copy has a device of its own.
fn driver_with(folder: &Path, settings: &str) -> Option<PathBuf> {
    let copy = folder.join("libcuda.so.1");
    std::fs::copy(driver()?, &copy).unwrap();
    std::fs::write(folder.join("device"), settings).unwrap();
    Some(copy)
}

/// A driver with the fake of cuBLASLt beside it, and with these settings of the fake.
fn driver_with_products(folder: &Path, settings: &str) -> Option<PathBuf> {
    static FAKE: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let library = driver_with(folder, "")?;
    let fake = FAKE.get_or_init(|| {
        let name = format!("fake-cublaslt-{}.so", std::process::id());
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let mut gxx = std::process::Command::new("g++");
        gxx.args(["-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-o"]).arg(&out);
        let done = gxx.arg(root().join("tests/cuda-emulator/cublaslt.cpp")).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        out
    });
    std::fs::copy(fake, folder.join("libcublasLt.so.13")).unwrap();
    std::fs::write(folder.join("products"), settings).unwrap();
    Some(library)
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

/// Noise that keeps values in bounds; gains near one.
fn weights(params: &[ParamSpec]) -> Arc<MemoryWeights> {
    let mut weights = MemoryWeights::new();
    for (i, p) in params.iter().enumerate() {
        let gain = p.name.ends_with("gamma") || p.name.contains("layer_norm");
        let fan_in = if p.shape.len() > 2 { p.shape[1..].iter().product() } else { *p.shape.last().unwrap() };
        let scale = if gain { 0.2 } else { 1.5 / (fan_in as f32).sqrt() };
        let values = noise(p.shape.iter().product(), i as u64);
        let values = values.iter().map(|v| v * scale + f32::from(u8::from(gain))).collect();
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    Arc::new(weights)
}

fn saved(folder: &Path, name: &str, model: Model) -> PathBuf {
    let path = folder.join(format!("{name}.onnx"));
    model.save(&path, &SaveOptions::default()).unwrap();
    path
}

fn denoiser(folder: &Path, cfg: &DitConfig, kind: DenoiserKind) -> PathBuf {
    let weights = weights(count_denoiser(cfg, 2, 0, 2).params());
    saved(folder, kind.component(), denoiser_graph(cfg, weights, kind, Dim::Fixed(1)).unwrap())
}

/// A small video autoencoder of the Wan family, pictures of 64 x 32: widths at which some convolutions fit the tensor
/// cores and some do not.
fn vae() -> VaeConfig {
    VaeConfig {
        base_dim: 8,
        decoder_base_dim: 8,
        z_dim: 4,
        dim_mult: vec![1, 2, 4, 4],
        num_res_blocks: 1,
        temporal_downsample: vec![false, true, true],
        patch_size: 2,
        latents_mean: vec![0.0, 0.1, 0.2, 0.3],
        latents_std: vec![1.0, 1.0, 1.0, 2.0],
    }
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
    agrees_with(path, path, sizes);
}

/// As [`agrees_with_rten`], which runs another graph of the same network.
fn agrees_with(reference: &Path, path: &Path, sizes: &[(&str, usize)]) {
    let mut rten = session(by_name("rten").unwrap().as_ref(), reference);
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

/// Pictures through the streaming autoencoder of the Wan family, both ways: the first frame, then groups of four, whose
/// caches stay on the device, in turns with another stream. And the same bytes when it is done again.
#[test]
fn the_video_autoencoder_agrees_with_rten() {
    let (dir, cfg, latent) = (tempfile::tempdir().unwrap(), vae(), [2, 4]);
    let weights = weights(&vae_params(&cfg));
    let file = |way: Way, chunk: Chunk| {
        let model = vae_graph(&cfg, latent, way, chunk, weights.clone()).unwrap();
        saved(dir.path(), &step_component(way, chunk), model)
    };
    let run = |session: &mut dyn Session, given: &Tensor, from: &State, to: &mut State| -> Tensor {
        let input = session.engine().inputs().iter().find(|p| !is_state(&p.name)).unwrap().name.clone();
        let output = session.engine().outputs().iter().find(|p| !is_state(&p.name)).unwrap().name.clone();
        let mut out = Tensor::empty();
        session.run_with_state(&[(&input, given)], &mut [(&output, &mut out)], Some(from), Some(to)).unwrap();
        out
    };
    for (way, shapes) in
        [(Way::Encode, [[1, 3, 32, 64], [4, 3, 32, 64]]), (Way::Decode, [[1, 4, 2, 4], [1, 4, 2, 4]])]
    {
        let files = [Chunk::First, Chunk::Next].map(|chunk| file(way, chunk));
        let stream = |backend: &dyn Backend, seed: u64| {
            let [mut first, mut next] = files.each_ref().map(|f| session(backend, f));
            let (mut from, mut to) = (State::default(), State::default());
            let mut results = Vec::new();
            for group in 0..3 {
                let shape = &shapes[usize::from(group > 0)];
                let given = Tensor::f32(shape, noise(shape.iter().product(), seed + group));
                let session = if group == 0 { &mut first } else { &mut next };
                results.push(run(session.as_mut(), &given, &from, &mut to));
                std::mem::swap(&mut from, &mut to);
            }
            results
        };
        let wanted = stream(by_name("rten").unwrap().as_ref(), 7);
        for (precision, limit) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 2e-2)] {
            let Some(backend) = backend(precision) else { return };
            let got = stream(&backend, 7);
            for (group, (got, right)) in got.iter().zip(&wanted).enumerate() {
                assert_eq!(got.shape, right.shape);
                let error = relative(got.as_f32().unwrap(), right.as_f32().unwrap());
                println!("{way:?} {} group {group}: relative L2 {error:.1e}", precision.name());
                assert!(error < limit, "{way:?} {} group {group}: {error}", precision.name());
            }
            if precision == Precision::Bf16 {
                assert!(stream(&backend, 7) == got, "the same pictures gave other bytes");
            }
        }
    }
}

/// What a graph of the family has beside the denoiser: the text encoder, and heads too large for one kernel.
#[test]
fn text_and_large_heads_agree_with_rten() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = Umt5Config {
        vocab_size: 40,
        d_model: 32,
        d_kv: 16,
        d_ff: 48,
        num_layers: 2,
        num_heads: 2,
        buckets: 32,
        max_distance: 128,
        eps: 1e-6,
    };
    let graph = text_encoder_graph(&cfg, 20, weights(&umt5_params(&cfg))).unwrap();
    agrees_with_rten(&saved(dir.path(), "text_encoder", graph), &[]);

    let mut ops = GraphBuilder::new("heads", Arc::new(MemoryWeights::new()));
    let inputs = ["q", "k", "v"].map(|name| ops.input(name, &[2, 11, 1, 320].map(Dim::Fixed)));
    let [q, k, v] = &inputs;
    let out = ops.attention(q, k, v, 0.2, None, 1, 320);
    ops.output("out", &out, &[2, 11, 320].map(Dim::Fixed));
    agrees_with_rten(&saved(dir.path(), "heads", ops.finish().unwrap()), &[]);
}

/// Every operator of every graph of every model configuration has a kernel; and so have the files that ship.
#[test]
fn every_exported_graph_has_its_kernels() {
    let mut operators = std::collections::BTreeMap::<String, usize>::new();
    let mut count = |model: &Model| {
        model.graph.nodes.iter().for_each(|n| *operators.entry(n.op_type.clone()).or_default() += 1);
    };
    let mut configurations = 0;
    for entry in std::fs::read_dir(root().join("configs/models")).unwrap() {
        let path = entry.unwrap().path();
        let mut spec = ModelSpec::from_toml(&std::fs::read_to_string(&path).unwrap()).unwrap();
        configurations += 1;
        // Two blocks say what thirty do, and small latents what large ones do.
        spec.dit.layers = spec.dit.layers.min(2);
        if spec.vae.is_some() {
            (spec.dit.latent_height, spec.dit.latent_width) = (2, 4);
        }
        if let Some(text) = &mut spec.text_encoder {
            text.num_layers = text.num_layers.min(2);
        }
        for cached in [false, true] {
            spec.workload.cached_context = cached;
            for c in cuda_needs(&spec, Precision::Bf16).unwrap() {
                assert!(c.needs.launches > 0 && c.needs.arena_bytes > 0, "{}", c.component);
            }
        }
        declared_graphs(&spec).unwrap().iter().for_each(|(_, model)| count(model));
        let declared = Arc::new(DeclaredWeights::new(count_denoiser(&spec.dit, 2, 0, 2).params()));
        let masked = denoiser_graph(&spec.dit, declared, DenoiserKind::Masked, Dim::Fixed(1)).unwrap();
        count(&masked);
        let tokens = 3 * spec.dit.tokens_per_frame();
        graph_needs(&masked.graph, Precision::Bf16, &|s| Some(if s == "tokens" { tokens } else { 3 }))
            .unwrap();
    }
    assert!(configurations >= 3);
    let mut shipped = 0;
    for entry in std::fs::read_dir(root().join("models/house-tiny")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "onnx") {
            let model = Model::load(&path).unwrap();
            count(&model);
            // Six tokens a frame.
            let size = |symbol: &str| Some(if symbol == "tokens" { 72 } else { 12 });
            let needs = graph_needs(&model.graph, Precision::Bf16, &size);
            needs.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            shipped += 1;
        }
    }
    assert!(shipped >= 4);
    println!(
        "{} operators in {configurations} configurations and {shipped} files: {operators:?}",
        operators.len()
    );
    assert!(operators.contains_key("Conv") && operators.contains_key("Resize"));
}

/// Codes of 4 bits have no kernel: their graphs are refused by their operators, not run as something else.
#[test]
fn graphs_of_four_bits_are_refused_by_name() {
    let info = |name: &str| ValueInfo {
        name: name.into(),
        dtype: Some(DataType::F32),
        shape: Some(vec![Dim::Fixed(64)]),
    };
    let restored = Node::new("w/dequantise", "DequantizeLinear", &["packed", "scale"], &["w"])
        .with(Attribute::int("axis", 0))
        .with(Attribute::int("block_size", 64));
    let graph = Graph {
        nodes: vec![restored, Node::new("product", "MatMul", &["x", "w"], &["y"])],
        initializers: vec![
            Initializer::from_bytes("packed", DataType::I4, &[64, 8], vec![0; 256]),
            Initializer::from_f32("scale", &[1, 8], &[1.0; 8]),
        ],
        inputs: vec![info("x")],
        outputs: vec![info("y")],
        ..Graph::default()
    };
    let error = graph_needs(&graph, Precision::Bf16, &|_| None).unwrap_err().to_string();
    let named = r#"DequantizeLinear (node "w/dequantise")"#;
    assert_eq!(error, format!("no CUDA kernel for {named}; use another backend"));
}

/// What the quantiser makes of a denoiser, int8 and fp8 (with attention), with its other floats as they are and in 16
/// bits: products of codes, against the same arithmetic in rten's floats. A value on a boundary may be rounded either
/// way, so what is apart is held against what quantising loses.
#[test]
fn quantised_denoisers_agree_with_their_emulation() {
    let Some(cuda) = backend(Precision::Fp32) else { return };
    let dir = tempfile::tempdir().unwrap();
    let cfg = DitConfig { layers: 3, camera_channels: 24, ..config() };
    let weights = weights(count_denoiser(&cfg, 2, 0, 2).params());
    let fp32 = denoiser_graph(&cfg, weights, DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    let mut source = SyntheticDenoiser::new(cfg.clone(), 1, 2, 50.0, 2, 1);
    let runner = Runner::new(by_name("rten").unwrap());
    let rten = by_name("rten").unwrap();
    let run = |backend: &dyn Backend, name: &str, model: &Model| {
        let mut session = session(backend, &saved(dir.path(), name, model.clone()));
        let given = inputs(session.as_ref(), &[("frames", 2), ("tokens", 12), ("timesteps", 2)], 3);
        let views: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        session.run(&views).unwrap()
    };
    for precision in [Precision::Int8, Precision::Fp8] {
        let mut quant = QuantConfig::new(precision);
        quant.attention_head_dim = Some(cfg.head_dim);
        let q = quantise(&fp32, &quant, &runner, &mut source, &mut |_| true).unwrap();
        assert!(q.layers.len() >= 8, "{:?}", q.layers);
        let wanted = run(rten.as_ref(), "emulated", &q.emulated);
        let unquantised = run(rten.as_ref(), "fp32", &fp32);
        let halves = to_float16(&q.deploy, Precision::Fp16).unwrap();
        for (name, model, share) in [("deploy", &q.deploy, 0.1), ("halves", &halves, 0.6)] {
            let got = run(&cuda, name, model);
            let error =
                |to: &[(String, Tensor)]| relative(got[0].1.as_f32().unwrap(), to[0].1.as_f32().unwrap());
            let (error, lost) = (error(&wanted), error(&unquantised));
            println!("{precision} {name}: {error:.1e} from its emulation, {lost:.1e} from fp32");
            assert!(error < share * lost && lost > 1e-3, "{precision} {name}: {error} {lost}");
            assert!(run(&cuda, name, model) == got, "the same inputs gave other bytes");
        }
    }
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

/// Latents and timesteps of one pass.
type Pass = (Vec<f32>, [f64; 2]);

impl Case {
    /// A branch of guidance: the unconditional one knows neither the instruction nor the rays.
    fn branch<'a>(&'a self, pass: &'a Pass, null_text: &'a [f32], conditional: bool) -> DenoiseStep<'a> {
        DenoiseStep {
            latents: &pass.0,
            timesteps: &pass.1,
            text: if conditional { &self.text } else { null_text },
            camera: conditional.then_some(self.camera.as_slice()),
            ..self.step()
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

/// The address of a function of a library that is open.
#[allow(unsafe_code)]
fn symbol(library: &Path, name: &std::ffi::CStr) -> *mut std::ffi::c_void {
    unsafe extern "C" {
        fn dlopen(name: *const std::ffi::c_char, flags: i32) -> *mut std::ffi::c_void;
        fn dlsym(handle: *mut std::ffi::c_void, name: *const std::ffi::c_char) -> *mut std::ffi::c_void;
    }
    let library = std::ffi::CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: the library is loaded already and never closed.
    let found = unsafe { dlsym(dlopen(library.as_ptr(), 2), name.as_ptr()) };
    assert!(!found.is_null());
    found
}

/// Products that the fake of cuBLASLt beside a driver has queued since it was asked last.
#[allow(unsafe_code)]
fn products(library: &Path) -> u64 {
    let symbol = symbol(&library.with_file_name("libcublasLt.so.13"), c"fakeProducts");
    // SAFETY: the symbol is `extern "C" uint64_t ()` in cublaslt.cpp.
    unsafe { std::mem::transmute::<*mut std::ffi::c_void, extern "C" fn() -> u64>(symbol)() }
}

/// Copies between host and device that the emulated driver has queued, either way, since it was asked last.
#[allow(unsafe_code)]
fn copies(library: &Path) -> [u64; 2] {
    let symbol = symbol(library, c"emulatorCopies");
    let mut counts = [0u64; 2];
    // SAFETY: the symbol is `extern "C" int (uint64_t*)` in driver.cpp, and writes two integers.
    unsafe {
        let count: extern "C" fn(*mut u64) -> i32 =
            std::mem::transmute::<*mut std::ffi::c_void, extern "C" fn(*mut u64) -> i32>(symbol);
        count(counts.as_mut_ptr());
    }
    counts
}

/// What crosses between host and device in a denoising step: what the sampler has changed goes in, what it reads comes
/// out, and nothing on the way. Text, camera rays, rotary tables, keys and values stay where they are.
#[test]
fn a_step_copies_latents_in_and_the_prediction_out() {
    let Some(_) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let library = driver_with(dir.path(), "").unwrap();
    let device = CudaDevice::with_kernels(0, Some(&library)).unwrap();
    let cuda = CudaBackend::on(device, Precision::Fp32).unwrap();
    let cfg = config();
    let mut joint =
        SessionDenoiser::new(cfg.clone(), session(&cuda, &denoiser(dir.path(), &cfg, DenoiserKind::Joint)))
            .unwrap();
    let [prefill, cached] = [DenoiserKind::Prefill, DenoiserKind::Cached]
        .map(|kind| session(&cuda, &denoiser(dir.path(), &cfg, kind)));
    let mut split = SplitDenoiser::new(CachedDenoiser::new(cfg.clone(), prefill, cached).unwrap());
    let mut case = Case::new(&cfg, 3, 2);
    let mut answers = Vec::new();
    for step in 0..3 {
        // As the sampler goes on: other latents of the targets, another noise level.
        let last = case.latents.len() - 1;
        case.latents[last] = step as f32;
        let timesteps = [0.0, 700.0 - f64::from(step)];
        for split_up in [false, true] {
            let denoiser: &mut dyn Denoise = if split_up { &mut split } else { &mut joint };
            copies(&library);
            let given = DenoiseStep { timesteps: &timesteps, ..case.step() };
            let out = denoiser.denoise(&given).unwrap();
            let [there, back] = copies(&library);
            // The context is computed in the first step.
            if step > 0 {
                assert_eq!(there, 2, "latents and timesteps, step {step}, split {split_up}");
                // Prediction, pose, mask and places of the thing.
                assert_eq!(back, 4, "step {step}, split {split_up}");
            }
            answers.push(out);
        }
    }
    // Nothing was left out that had changed.
    let fresh = || session(&cuda, &dir.path().join("denoiser.onnx"));
    for step in 0..3 {
        let last = case.latents.len() - 1;
        case.latents[last] = step as f32;
        let timesteps = [0.0, 700.0 - f64::from(step)];
        let given = DenoiseStep { timesteps: &timesteps, ..case.step() };
        let mut joint = SessionDenoiser::new(cfg.clone(), fresh()).unwrap();
        assert!(joint.denoise(&given).unwrap() == answers[2 * step as usize], "step {step}");
    }
    std::mem::forget(dir);
}

/// A sample that is walked on the device, estimate by estimate, against the same predictions and the sampler of the host:
/// the same bytes. Nothing is copied in a step but the estimate that those who watch are shown.
#[test]
fn a_sample_is_walked_on_the_device_as_on_the_host() {
    let Some(_) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let library = driver_with(dir.path(), "").unwrap();
    let device = CudaDevice::with_kernels(0, Some(&library)).unwrap();
    let cuda = CudaBackend::on(device, Precision::Fp32).unwrap();
    for (split_up, prediction, solver, guidance) in [
        (false, Prediction::Velocity, Solver::UniPc, 3.0),
        (true, Prediction::X0, Solver::UniPc, 2.5),
        (false, Prediction::X0, Solver::Euler, 1.0),
    ] {
        let cfg = DitConfig { prediction, heads: 1, layers: 1, ..config() };
        let mut denoiser: Box<dyn Denoise> = if split_up {
            let [prefill, cached] = [DenoiserKind::Prefill, DenoiserKind::Cached]
                .map(|kind| session(&cuda, &denoiser(dir.path(), &cfg, kind)));
            Box::new(SplitDenoiser::new(CachedDenoiser::new(cfg.clone(), prefill, cached).unwrap()))
        } else {
            let joint = session(&cuda, &denoiser(dir.path(), &cfg, DenoiserKind::Joint));
            Box::new(SessionDenoiser::new(cfg.clone(), joint).unwrap())
        };
        // Context and the given first frame, then the rest of the sample.
        let (context, targets) = (2, 3);
        let frame = cfg.in_channels * cfg.latent_height * cfg.latent_width;
        let mut case = Case::new(&cfg, context, targets);
        case.rows[context] = 0;
        let null_text = vec![0.0; cfg.text_len * cfg.text_dim];
        let noised: Vec<f32> = case.latents.iter().map(|v| 0.5 - v).collect();
        let beginning = noise(targets * frame, 9);
        let schedule = Schedule::new(Grid::WanUnipc, 4, 5.0).unwrap();
        let guided = guidance != 1.0;
        let branch = |x: &[f32], t: f64, conditional: bool| {
            let given = if conditional { &case.latents } else { &noised };
            let latents = [&given[..(context + 1) * frame], &x[frame..]].concat();
            (latents, [if conditional { 0.0 } else { 1000.0 }, t])
        };

        let (mut x, mut sampler) = (beginning.clone(), Sampler::new(schedule.clone(), solver));
        let (mut estimates, mut heads) = (Vec::new(), None);
        while let Some(at) = sampler.next_step() {
            let mut velocity = |denoiser: &mut dyn Denoise, conditional: bool| {
                let given = branch(&x, f64::from(at.timestep), conditional);
                let out = denoiser.denoise(&case.branch(&given, &null_text, conditional)).unwrap();
                let v: Vec<f32> = match prediction {
                    Prediction::Velocity => out.prediction[context * frame..].to_vec(),
                    Prediction::X0 => {
                        let clean = &out.prediction[context * frame..];
                        clean.iter().zip(&x).map(|(x0, x)| (x - x0) / at.sigma.max(1e-6)).collect()
                    }
                };
                heads = conditional.then_some(out).or(heads.take());
                v
            };
            let mut v = velocity(denoiser.as_mut(), true);
            if guided {
                let mut u = velocity(denoiser.as_mut(), false);
                guide(&mut u, &v, guidance);
                v = u;
            }
            estimates.push(x.iter().zip(&v).map(|(x, v)| x - at.sigma * v).collect::<Vec<f32>>());
            sampler.step(&v, &mut x).unwrap();
        }

        let first = [true, false].map(|c| branch(&beginning, f64::from(schedule.timesteps[0]), c));
        let branches = if guided { 2 } else { 1 };
        let plan = WalkPlan {
            branches: (0..branches).map(|i| case.branch(&first[i], &null_text, i == 0)).collect(),
            sample: &beginning,
            schedule: &schedule,
            solver,
            guidance,
        };
        let mut walk = denoiser.walk(&plan).unwrap().expect("the device can");
        for (i, wanted) in estimates.iter().enumerate() {
            copies(&library);
            assert!(walk.step().unwrap() == *wanted, "split {split_up}, step {i}");
            assert_eq!(copies(&library), [0, 1], "split {split_up}, step {i}");
        }
        assert!(walk.step().is_err(), "all steps were made");
        let (sample, said) = walk.end().unwrap();
        let heads = heads.unwrap();
        assert!(sample == x);
        assert_eq!((said.pose, said.mask, said.locate), (heads.pose, heads.mask, heads.locate));
    }
    std::mem::forget(dir);
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
    let Some(_) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let library = driver_with_products(dir.path(), "").unwrap();
    let device = CudaDevice::with_kernels(0, Some(&library)).unwrap();
    let reports = check_kernels(&device, true).unwrap();
    assert_eq!(
        reports.len(),
        2 + 21,
        "two products, and all but the sampler's kernel, which has a test of its own"
    );
    std::mem::forget(dir);
    for r in &reports {
        println!("{:<20} {:<40} relative error {:.1e}", r.kernel, r.shape, r.relative_error);
        assert!(r.relative_error < r.allowed, "{}: {}", r.kernel, r.relative_error);
        assert!(r.millis > 0.0 && r.rate.is_finite());
    }
}

/// Linear layers that are large enough go to the library of products, with their bias and their GELU: described as its
/// manual wants it (the fake refuses all else), with the same bytes every time, launched, recorded and replayed. What it
/// has no algorithm for stays with our kernels.
#[test]
fn large_linear_layers_are_left_to_cublaslt() {
    let Some(_) = driver() else { return };
    let (dir, none) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let library = driver_with_products(dir.path(), "").unwrap();
    let device = CudaDevice::with_kernels(0, Some(&library)).unwrap();
    assert!(device.products().unwrap().starts_with("cuBLASLt 13.1.0 (/"), "{:?}", device.products());
    let cuda = CudaBackend::on(device, Precision::Bf16).unwrap();
    assert!(cuda.version().contains(", cuBLASLt 13.1.0"), "{}", cuda.version());
    let path = denoiser(dir.path(), &config(), DenoiserKind::Joint);
    // 66 rows: above the least.
    let sizes = [("frames", 11), ("tokens", 66), ("timesteps", 2)];
    let mut rten = session(by_name("rten").unwrap().as_ref(), &path);
    let given = inputs(rten.as_ref(), &sizes, 3);
    let views: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let wanted = rten.run(&views).unwrap();
    let mut session_of = session(&cuda, &path);
    let first = session_of.run(&views).unwrap();
    let queued = products(&library);
    for ((name, got), (_, right)) in first.iter().zip(&wanted) {
        let error = relative(got.as_f32().unwrap(), right.as_f32().unwrap());
        println!("{name}: relative L2 {error:.1e} with {queued} products by the fake");
        assert!(error < 2e-2, "{name}: {error}");
    }
    // Queries, keys, values and results of two blocks, queries and results of their text, and two for each GELU.
    assert!(queued >= 16, "{queued}");
    assert!(session_of.run(&views).unwrap() == first);
    assert_eq!(products(&library), queued, "recorded");
    assert!(session_of.run(&views).unwrap() == first);
    assert_eq!(products(&library), 0, "replayed");

    let library = driver_with_products(none.path(), "algorithms 0").unwrap();
    let refusing =
        CudaBackend::on(CudaDevice::with_kernels(0, Some(&library)).unwrap(), Precision::Bf16).unwrap();
    let alone = backend(Precision::Bf16).unwrap();
    let ours = session(&alone, &path).run(&views).unwrap();
    assert!(session(&refusing, &path).run(&views).unwrap() == ours);
    assert_eq!(products(&library), 0);
    std::mem::forget((dir, none));
}

/// A library of products that fails, or that counts its attributes otherwise, is named or left alone.
#[test]
fn a_library_of_products_that_cannot_be_used_is_told() {
    let Some(_) = driver() else { return };
    let open = |settings: &str| {
        let dir = tempfile::tempdir().unwrap();
        let library = driver_with_products(dir.path(), settings).unwrap();
        let device = CudaDevice::with_kernels(0, Some(&library)).unwrap();
        std::mem::forget(dir);
        (library, device)
    };
    for settings in ["fail cublasLtCreate", "confused 1"] {
        assert_eq!(open(settings).1.products(), None, "{settings}: our own kernels multiply");
    }
    let (library, device) = open("fail cublasLtMatmul");
    let reports = check_kernels(&device, true);
    let wanted = "cuda cublasLtMatmul failed: CUBLAS_STATUS_EXECUTION_FAILED";
    assert_eq!(reports.unwrap_err().to_string(), wanted);

    assert_eq!(product_library(&library.with_file_name("libcublasLt.so.13")).unwrap(), "13.1.0");
    let error = product_library(&library).unwrap_err().to_string();
    assert!(error.ends_with("has no cublasLtGetVersion: it is not cuBLASLt 12 or 13"), "{error}");
}

/// NVIDIA's own library, where one is at hand: it reads back what products are described by, without a device.
#[test]
fn cublaslt_understands_how_products_are_described() {
    match std::env::var_os("MINDSEYE_TEST_CUBLASLT") {
        None => println!("SKIP: MINDSEYE_TEST_CUBLASLT names no libcublasLt.so.12 or 13"),
        Some(file) => {
            println!("cuBLASLt {} reads all attributes back", product_library(Path::new(&file)).unwrap())
        }
    }
}

/// The same networks in opset 23: the values of the plain graphs, on rten and on the kernels, of which no more are launched
/// than our own fusions leave.
#[test]
fn the_operators_of_opset_23_agree_with_rten() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let weights = weights(count_denoiser(&cfg, 2, 0, 2).params());
    let sizes = [("frames", 2), ("tokens", 12), ("timesteps", 2), ("context_tokens", 6)];
    for kind in [DenoiserKind::Joint, DenoiserKind::Masked, DenoiserKind::Prefill, DenoiserKind::Cached] {
        let plain = denoiser_graph(&cfg, weights.clone(), kind, Dim::Fixed(1)).unwrap();
        let larger = fused(&plain);
        assert_eq!(larger.opset(), 23);
        let count = |op: &str| larger.graph.nodes.iter().filter(|n| n.op_type == op).count();
        println!("{kind:?}: {} nodes of {}", larger.graph.nodes.len(), plain.graph.nodes.len());
        // Queries and keys of two kinds in each of two blocks are normalised, of one kind rotated.
        let operators = ["Attention", "RMSNormalization", "RotaryEmbedding", "Softmax", "Reciprocal"];
        assert_eq!(operators.map(count), [4, 8, 4, 0, 0], "{kind:?}");
        let needs = |model: &Model| {
            let size = |s: &str| sizes.iter().find(|(name, _)| *name == s).map(|(_, n)| *n);
            graph_needs(&model.graph, Precision::Bf16, &size).unwrap().launches
        };
        assert!(needs(&larger) <= needs(&plain), "{kind:?}: {} and {}", needs(&larger), needs(&plain));
        let reference = saved(dir.path(), kind.component(), plain);
        let path = saved(dir.path(), &format!("fused-{}", kind.component()), larger);
        let mut runs = [&reference, &path].map(|file| session(by_name("rten").unwrap().as_ref(), file));
        let given = inputs(runs[0].as_ref(), &sizes, 3);
        let views: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let [wanted, got] = [0, 1].map(|i| runs[i].run(&views).unwrap());
        for ((name, got), (_, right)) in got.iter().zip(&wanted) {
            let error = relative(got.as_f32().unwrap(), right.as_f32().unwrap());
            assert!(error < 2e-6, "{kind:?} {name} on rten: {error}");
        }
        agrees_with(&reference, &path, &sizes);
    }
}

/// A device that is lost in the middle of a goal: this goal and all after it say so, and nothing hangs or panics.
#[test]
fn a_lost_device_is_told() {
    let Some(_) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let path = denoiser(dir.path(), &cfg, DenoiserKind::Joint);
    let library = driver_with(dir.path(), "lose 40").unwrap();
    let cuda =
        CudaBackend::on(CudaDevice::with_kernels(0, Some(&library)).unwrap(), Precision::Bf16).unwrap();
    let mut denoiser = SessionDenoiser::new(cfg.clone(), session(&cuda, &path)).unwrap();
    let case = Case::new(&cfg, 1, 1);
    let lost = (0..4).map(|_| denoiser.denoise(&case.step())).find_map(Result::err).unwrap().to_string();
    assert!(lost.contains("the GPU was lost in ") && lost.contains("CUDA_ERROR_LAUNCH_FAILED"), "{lost}");
    assert!(lost.ends_with("goals fail until this program is started again"), "{lost}");
    let again = denoiser.denoise(&case.step()).unwrap_err().to_string();
    assert!(again.contains("the GPU was lost in "), "{again}");
    std::mem::forget(dir);
}

/// Memory that another program holds is told with what it was wanted for, before anything is computed.
#[test]
fn memory_that_another_program_holds_is_told() {
    let Some(_) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = denoiser(dir.path(), &config(), DenoiserKind::Joint);
    let library = driver_with(dir.path(), "memory 2000000000 held 1999900000").unwrap();
    let cuda =
        CudaBackend::on(CudaDevice::with_kernels(0, Some(&library)).unwrap(), Precision::Bf16).unwrap();
    let error = cuda.prepare(&path, &PrepareOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("bytes wanted for weights, 100000 free of 2000000000"), "{error}");
    assert!(error.ends_with("nvidia-smi lists the programs that hold the rest"), "{error}");
    std::mem::forget(dir);
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
        dtype: Some(DataType::F32),
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
