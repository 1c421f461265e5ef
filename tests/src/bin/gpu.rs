//! What is measured on a machine with a GPU, by `tests/gpu/run.sh`: the device, every kernel's error and rate, products of
//! cuBLASLt where it is found, the shipped model and a small video autoencoder against rten, blocks of the large model and
//! its autoencoder. Each line is printed as it comes; `--out FILE` keeps all as one JSON document. `--small` is for the
//! emulator: small sizes, few repetitions, no large model; with `--whole` the shipped model at its whole size all the same
//! (minutes).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use mindseye_builder::onnx::{MemoryWeights, Way, denoiser_graph, step_component, vae_graph};
use mindseye_engines::backend::{
    Backend, BackendError, PrepareOptions, RtenBackend, Session, State, Tensor, is_state,
};
use mindseye_engines::bundle::Bundle;
use mindseye_engines::count::{count_denoiser, count_vae_decoder, count_vae_encoder};
use mindseye_engines::cuda::{
    CudaBackend, CudaDevice, Device, Memory, Pinned, check_kernels, library, probe,
};
use mindseye_engines::denoise::{Denoise, DenoiseStep, WalkPlan};
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::vae::{Chunk, VaeConfig};
use mindseye_engines::onnx::{Dim, SaveOptions};
use mindseye_engines::sampler::{Grid, Noise, Schedule, Solver};
use mindseye_engines::session_denoiser::{DenoiserKind, SessionDenoiser};
use mindseye_engines::target::Precision;
use serde_json::{Map, Value, json};

type Failure = Box<dyn std::error::Error>;

/// The document so far; written again after every part, so that what was measured is kept whatever happens next.
struct Document {
    out: Option<PathBuf>,
    parts: Map<String, Value>,
}

impl Document {
    fn add(&mut self, name: &str, value: Value) -> Result<(), Failure> {
        println!("{name}: {value}");
        self.parts.insert(name.to_owned(), value);
        if let Some(out) = &self.out {
            mindseye_base::file::replace(out, &serde_json::to_vec_pretty(&self.parts)?)?;
        }
        Ok(())
    }
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => std::process::ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gpu: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// False when a figure is past its limit.
fn run() -> Result<bool, Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let small = arguments.iter().any(|a| a == "--small");
    let out =
        arguments.iter().position(|a| a == "--out").and_then(|i| arguments.get(i + 1)).map(PathBuf::from);
    let mut document = Document { out, parts: Map::new() };
    let driver = probe()?;
    document.add(
        "driver",
        json!({ "library": library()?, "cuda": driver.cuda_version, "devices": driver.devices }),
    )?;
    let began = Instant::now();
    let device = CudaDevice::with_kernels(0, None)?;
    document.add("kernels_loaded_s", json!(began.elapsed().as_secs_f64()))?;
    document.add("products", json!(device.products()))?;
    document.add("copies", copies(&device, if small { 1 << 20 } else { 256 << 20 })?)?;
    let reports = check_kernels(&device, small)?;
    let mut good = reports.iter().all(|r| r.relative_error < r.allowed);
    for report in &reports {
        let name = format!("kernel {} {}", report.kernel, report.timed_shape);
        document.add(&name, serde_json::to_value(report)?)?;
    }
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    let models = if models.is_dir() { models } else { PathBuf::from("models/house-tiny") };
    for (precision, limit) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 2e-2)] {
        let whole = !small || arguments.iter().any(|a| a == "--whole");
        let figures = shipped_model(&device, precision, &models, whole, small)?;
        good &= within(&figures, limit);
        document.add(&format!("house-tiny {}", precision.name()), figures)?;
        let figures = video_autoencoder(&device, precision, &small_autoencoder(), [2, 4], true)?;
        good &= within(&figures, limit);
        document.add(&format!("small video autoencoder {}", precision.name()), figures)?;
    }
    if !small {
        document.add("wan22-5b", large_model(&device)?)?;
        let large = VaeConfig::wan22();
        let figures = video_autoencoder(&device, Precision::Bf16, &large, [16, 26], false)?;
        document.add("wan22 video autoencoder bf16", figures)?;
    }
    println!(
        "{}",
        if good { "all figures are within their limits" } else { "SOME FIGURES ARE PAST THEIR LIMITS" }
    );
    Ok(good)
}

/// Whether all errors are below their limit, and the same inputs gave the same bytes.
fn within(figures: &Value, limit: f64) -> bool {
    let small = |e: &Value| e.as_f64().is_some_and(|e| e < limit);
    figures["relative_l2"].as_object().is_some_and(|all| all.values().all(small))
        && figures["same_bytes"] == true
}

/// L2 of the difference over L2 of what is right.
fn relative(got: &[f32], right: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v).powi(2);
    let difference: f64 = got.iter().zip(right).map(|(a, b)| square(a - b)).sum();
    (difference / right.iter().map(|&v| square(v)).sum::<f64>()).sqrt()
}

/// Random weights that keep values in bounds, gains near one. One stretch of noise, read from another place for every
/// weight and repeated: no sampling by the billion.
fn random_weights(params: &[ParamSpec]) -> MemoryWeights {
    let mut noise = Noise::new(2, 0);
    let stretch: Vec<f32> = (0..(1 << 20) + 7).map(|_| noise.sample()).collect();
    let mut weights = MemoryWeights::new();
    for (i, p) in params.iter().enumerate() {
        let (gain, count) = (p.name.ends_with("gamma"), p.shape.iter().product::<usize>());
        let (scale, middle) = match gain {
            true => (0.1, 1.0),
            false => (1.0 / (p.shape[1..].iter().product::<usize>().max(1) as f32).sqrt(), 0.0),
        };
        let (before, after) = stretch.split_at(i * 997 % stretch.len());
        let once = after.iter().chain(before).take(count).map(|v| v * scale + middle);
        let once: Vec<f32> = once.collect();
        let mut values = Vec::with_capacity(count);
        while values.len() < count {
            values.extend_from_slice(&once[..once.len().min(count - values.len())]);
        }
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    weights
}

/// The Wan2.2 autoencoder in small: pictures of 64 x 32 for latents of 4 x 2.
fn small_autoencoder() -> VaeConfig {
    VaeConfig {
        base_dim: 8,
        decoder_base_dim: 8,
        z_dim: 4,
        num_res_blocks: 1,
        latents_mean: vec![0.0; 4],
        latents_std: vec![1.0; 4],
        ..VaeConfig::wan22()
    }
}

/// Three chunks through the streaming autoencoder, both ways, caches on the device; against rten where `compared`.
fn video_autoencoder(
    device: &Arc<dyn Device>,
    precision: Precision,
    cfg: &VaeConfig,
    latent: [usize; 2],
    compared: bool,
) -> Result<Value, Failure> {
    let folder = std::env::temp_dir().join(format!("mindseye-gpu-vae-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let cuda = CudaBackend::on(Arc::clone(device), precision)?;
    let [height, width] = latent.map(|s| s * cfg.spatial_factor());
    let (mut errors, mut same_bytes) = (Map::new(), true);
    let (mut millis, mut first_ms) = (Map::new(), Map::new());
    for way in [Way::Encode, Way::Decode] {
        let counted = match way {
            Way::Encode => count_vae_encoder(cfg, [1, 1], Chunk::Next),
            Way::Decode => count_vae_decoder(cfg, [1, 1], Chunk::Next),
        };
        let weights = Arc::new(random_weights(counted.params()));
        let mut files = Vec::new();
        for chunk in [Chunk::First, Chunk::Next] {
            let file = folder.join(format!("{}.onnx", step_component(way, chunk)));
            vae_graph(cfg, latent, way, chunk, weights.clone())?.save(&file, &SaveOptions::default())?;
            files.push(file);
        }
        let stream = |backend: &dyn Backend| -> Result<(Vec<Tensor>, Vec<f64>), Failure> {
            let mut sessions = [session(backend, &files[0])?, session(backend, &files[1])?];
            let (mut from, mut to) = (State::default(), State::default());
            let (mut results, mut millis, mut noise) = (Vec::new(), Vec::new(), Noise::new(3, 0));
            for chunk in 0..6 {
                let session = &mut sessions[chunk.min(1)];
                let shape = match way {
                    Way::Encode => [if chunk == 0 { 1 } else { cfg.temporal_factor() }, 3, height, width],
                    Way::Decode => [1, cfg.z_dim, latent[0], latent[1]],
                };
                let given = Tensor::f32(&shape, noise.draw(shape.iter().product()));
                let port = |ports: &[mindseye_engines::backend::Port]| {
                    ports.iter().find(|p| !is_state(&p.name)).map(|p| p.name.clone())
                };
                let input = port(session.engine().inputs()).ok_or("no input")?;
                let output = port(session.engine().outputs()).ok_or("no output")?;
                let mut out = Tensor::empty();
                let began = Instant::now();
                session.run_with_state(
                    &[(&input, &given)],
                    &mut [(&output, &mut out)],
                    Some(&from),
                    Some(&mut to),
                )?;
                millis.push(began.elapsed().as_secs_f64() * 1e3);
                std::mem::swap(&mut from, &mut to);
                results.push(out);
            }
            Ok((results, millis))
        };
        let (got, times) = stream(&cuda)?;
        same_bytes &= stream(&cuda)?.0 == got;
        first_ms.insert(way.component().into(), json!(times[0]));
        // The first of a kind warms up, the second is recorded.
        millis.insert(way.component().into(), json!(median(times[3..].to_vec())));
        if compared {
            let worst = |(got, right): (&Tensor, &Tensor)| {
                relative(got.as_f32().unwrap_or_default(), right.as_f32().unwrap_or_default())
            };
            let (wanted, _) = stream(&RtenBackend)?;
            let worst = got.iter().zip(&wanted).map(worst).fold(0.0, f64::max);
            errors.insert(way.component().into(), json!(worst));
        }
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(json!({
        "pictures": [width, height], "relative_l2": errors, "same_bytes": same_bytes, "first_chunk_ms": first_ms,
        "chunk_ms": millis,
    }))
}

/// Bytes there and back, and how fast.
fn copies(device: &Arc<dyn Device>, bytes: usize) -> Result<Value, Failure> {
    let memory = Memory::new(device, bytes, "a copy")?;
    let seconds = mindseye_engines::cuda::round_trip(device, &memory, &mut Pinned::new(device, bytes)?)?;
    let rate = |s: f64| bytes as f64 / s / 1e9;
    Ok(json!({ "bytes": bytes, "to_device_gb_s": rate(seconds[0]), "to_host_gb_s": rate(seconds[1]) }))
}

fn session(backend: &dyn Backend, file: &Path) -> Result<Box<dyn Session>, BackendError> {
    backend.prepare(file, &PrepareOptions::default())?.session()
}

/// Noise for a denoiser's inputs: `context` frames at the first timestep, the rest at the second.
fn inputs(session: &dyn Session, context: usize, frames: usize, tokens: usize) -> Vec<(String, Tensor)> {
    let mut noise = Noise::new(1, 0);
    let made = session.engine().inputs().iter().map(|port| {
        let size = |d: &Dim| match d {
            Dim::Fixed(n) => *n,
            Dim::Symbol(s) if s == "frames" => frames,
            Dim::Symbol(s) if s == "tokens" => frames * tokens,
            _ => 2,
        };
        let shape: Vec<usize> = port.shape.iter().map(size).collect();
        let count = shape.iter().product();
        let tensor = match port.name.as_str() {
            "rows" => Tensor::i64(&shape, (0..count).map(|f| i64::from(f >= context)).collect()),
            "row_batch" => Tensor::i64(&shape, vec![0; count]),
            _ => Tensor::f32(&shape, (0..count).map(|_| noise.sample()).collect()),
        };
        (port.name.clone(), tensor)
    });
    made.collect()
}

/// Milliseconds of each of some runs, in order.
fn timed(session: &mut dyn Session, given: &[(&str, &Tensor)], runs: usize) -> Result<Vec<f64>, Failure> {
    let mut millis = Vec::new();
    for _ in 0..runs {
        let began = Instant::now();
        session.run(given)?;
        millis.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(millis)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Context and targets as a goal has them, with noise for what was seen, against rten.
fn shipped_model(
    device: &Arc<dyn Device>,
    precision: Precision,
    models: &Path,
    whole: bool,
    small: bool,
) -> Result<Value, Failure> {
    let (context, frames) = if whole { (25, 45) } else { (2, 4) };
    let runs = match (whole, small) {
        (true, true) => 1,
        (false, true) => 3,
        _ => 50,
    };
    let cfg = Bundle::load(models)?.manifest().dit.clone();
    let file = models.join("denoiser.onnx");
    let mut noise = Noise::new(1, 0);
    let latents = noise.draw(frames * cfg.in_channels * cfg.latent_height * cfg.latent_width);
    let text = noise.draw(cfg.text_len * cfg.text_dim);
    let camera = noise.draw(frames * cfg.tokens_per_frame() * cfg.camera_channels);
    let rows: Vec<usize> = (0..frames).map(|f| usize::from(f >= context)).collect();
    let t_index: Vec<f64> = (0..frames).map(|f| if f < context { f } else { f + 50 } as f64).collect();
    let step = DenoiseStep {
        latents: &latents,
        timesteps: &[0.0, 700.0],
        rows: &rows,
        t_index: &t_index,
        text: &text,
        camera: (cfg.camera_channels > 0).then_some(camera.as_slice()),
        guide: None,
    };
    let denoiser = |backend: &dyn Backend| -> Result<SessionDenoiser, Failure> {
        Ok(SessionDenoiser::new(cfg.clone(), session(backend, &file)?)?)
    };
    let mut rten = denoiser(&RtenBackend)?;
    let mut cuda = denoiser(&CudaBackend::on(Arc::clone(device), precision)?)?;
    let wanted = rten.denoise(&step)?;
    let began = Instant::now();
    let got = cuda.denoise(&step)?;
    let first_ms = began.elapsed().as_secs_f64() * 1e3;
    let errors = json!({
        "sample": relative(&got.prediction, &wanted.prediction),
        "pose": relative(&got.pose.concat(), &wanted.pose.concat()),
        "mask": relative(&got.mask, &wanted.mask),
        "locate": relative(&got.locate.concat(), &wanted.locate.concat()),
    });
    // The second run records the graph, those after it only launch it.
    let same_bytes = cuda.denoise(&step)? == got && cuda.denoise(&step)? == got;
    // The targets and the given frame before them, moved on where the network runs.
    let from = (context - 1) * cfg.in_channels * cfg.latent_height * cfg.latent_width;
    let schedule = Schedule::new(Grid::Plain, if small { 2 } else { 12 }, 5.0)?;
    let plan = WalkPlan {
        branches: vec![step.clone()],
        sample: &latents[from..],
        schedule: &schedule,
        solver: Solver::UniPc,
        guidance: 1.0,
    };
    let mut walked = || -> Result<(Vec<f32>, f64), Failure> {
        let mut walk = cuda.walk(&plan)?.ok_or("the sample stays on the host")?;
        let mut millis = Vec::new();
        for _ in 0..schedule.steps() {
            let began = Instant::now();
            walk.step()?;
            millis.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok((walk.end()?.0, median(millis)))
    };
    let (first, again) = (walked()?, walked()?);
    let same_bytes = same_bytes && first.0 == again.0;
    let millis = |denoiser: &mut SessionDenoiser, runs: usize| -> Result<f64, Failure> {
        let mut all = Vec::new();
        for _ in 0..runs {
            let began = Instant::now();
            denoiser.denoise(&step)?;
            all.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(median(all))
    };
    Ok(json!({
        "frames": frames, "context": context, "relative_l2": errors, "same_bytes": same_bytes, "first_run_ms": first_ms,
        "walk_step_ms": again.1, "graph_ms": millis(&mut cuda, runs)?, "rten_ms": millis(&mut rten, runs.min(5))?,
    }))
}

/// The large model's joint pass at 85 + 46 latents, from 1 and from 3 of its 30 blocks with random weights: the
/// difference is two blocks.
fn large_model(device: &Arc<dyn Device>) -> Result<Value, Failure> {
    let preset = Path::new("configs/models/wan22-5b.toml");
    let table: toml::Table = toml::from_str(&std::fs::read_to_string(preset)?)?;
    let cfg: DitConfig = table.get("dit").ok_or("the preset has no [dit]")?.clone().try_into()?;
    let (context, frames) = (85, 131);
    let mut millis = Vec::new();
    let mut loads = Vec::new();
    let folder = std::env::temp_dir().join(format!("mindseye-gpu-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    for layers in [1, 3] {
        let cfg = DitConfig { layers, ..cfg.clone() };
        let weights = random_weights(count_denoiser(&cfg, 2, 0, 2).params());
        let file = folder.join("denoiser.onnx");
        let model = denoiser_graph(&cfg, Arc::new(weights), DenoiserKind::Joint, Dim::Fixed(1))?;
        model.save(&file, &SaveOptions::default())?;
        drop(model);
        let began = Instant::now();
        let mut cuda = session(&CudaBackend::on(Arc::clone(device), Precision::Bf16)?, &file)?;
        loads.push(began.elapsed().as_secs_f64());
        let given = inputs(cuda.as_ref(), context, frames, cfg.tokens_per_frame());
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(n, t)| (n.as_str(), t)).collect();
        timed(cuda.as_mut(), &given, 3)?;
        millis.push(median(timed(cuda.as_mut(), &given, 7)?));
    }
    std::fs::remove_dir_all(&folder)?;
    let block = (millis[1] - millis[0]) / 2.0;
    let flop = |layers| count_denoiser(&DitConfig { layers, ..cfg.clone() }, frames, 0, 2).flops().products();
    Ok(json!({
        "latents": [context, frames - context], "one_block_model_ms": millis[0], "three_block_model_ms": millis[1],
        "block_ms": block, "block_tflop_s": (flop(3) - flop(1)) / 2.0 / block / 1e9,
        "thirty_blocks_ms_by_extrapolation": millis[0] + 29.0 * block, "load_s": loads,
    }))
}
