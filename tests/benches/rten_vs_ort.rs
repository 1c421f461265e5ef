//! The exported small denoiser on rten and on onnxruntime: same file, one thread, paired runs.
//!
//! `cargo bench -p mindseye-tests --bench rten_vs_ort`; onnxruntime is looked for as its backend says
//! (`ORT_DYLIB_PATH`, or `pip install onnxruntime`). Without it one line says so and nothing is measured.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use mindseye_builder::onnx::MemoryWeights;
use mindseye_builder::onnx::denoiser_graph;
use mindseye_engines::backend::{Dim, PrepareOptions, Session, Tensor, by_name};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::onnx::SaveOptions;
use mindseye_engines::session_denoiser::DenoiserKind;

const ROUNDS: usize = 15;
const WANTED: f64 = 1.6;

/// 512 tokens of width 256, 8 layers: the graph whose ratio is on record.
fn width_256() -> (DitConfig, usize) {
    let cfg = DitConfig {
        in_channels: 16,
        out_channels: 16,
        latent_height: 8,
        latent_width: 16,
        patch: [2, 2],
        heads: 4,
        head_dim: 64,
        layers: 8,
        ffn_dim: 1024,
        text_dim: 128,
        text_len: 32,
        freq_dim: 256,
        camera_channels: 24,
        pooled_text: true,
        lift: true,
        ..DitConfig::SMALLEST
    };
    (cfg, 16)
}

fn house_tiny() -> (DitConfig, usize) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../configs/models/house-tiny.toml");
    let text = std::fs::read_to_string(path).expect("the preset is in the repository");
    let table: toml::Table = toml::from_str(&text).expect("the preset is TOML");
    (table["dit"].clone().try_into().expect("the preset has a [dit] table"), 12)
}

fn noise(count: usize, seed: &mut u64) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn measure(what: &str, cfg: &DitConfig, frames: usize, folder: &Path) {
    let mut seed = 1;
    let mut weights = MemoryWeights::new();
    for p in count_denoiser(cfg, 2, 0, 2).params() {
        let fan_in = p.shape.last().map_or(1, |&n| n) as f32;
        let values = noise(p.shape.iter().product(), &mut seed);
        weights.insert(p.name.clone(), p.shape.clone(), values.iter().map(|v| v / fan_in.sqrt()).collect());
    }
    let path = folder.join("denoiser.onnx");
    denoiser_graph(cfg, Arc::new(weights), DenoiserKind::Joint, Dim::Fixed(1))
        .and_then(|model| model.save(&path, &SaveOptions::default()))
        .expect("the graph can be written");
    let options = PrepareOptions::default().with_threads(1);
    let open = |backend: &str| by_name(backend).and_then(|b| b.prepare(&path, &options)?.session());
    let mut rten = open("rten").expect("the embedded backend runs our graphs");
    let mut other = match open("onnxruntime") {
        Ok(session) => session,
        Err(error) => {
            println!("{what}: skipped, onnxruntime cannot be used: {error}");
            return;
        }
    };
    let size = |dim: &Dim| match dim {
        Dim::Fixed(n) => *n,
        Dim::Symbol(s) if s == "frames" => frames,
        Dim::Symbol(s) if s == "tokens" => frames * cfg.tokens_per_frame(),
        _ => 2,
    };
    let inputs: Vec<(String, Tensor)> = rten
        .engine()
        .inputs()
        .iter()
        .map(|port| {
            let shape: Vec<usize> = port.shape.iter().map(size).collect();
            let count = shape.iter().product();
            let tensor = match port.name.as_str() {
                "rows" => Tensor::i64(&shape, (0..count as i64).map(|i| i % 2).collect()),
                "row_batch" => Tensor::i64(&shape, vec![0; count]),
                _ => Tensor::f32(&shape, noise(count, &mut seed)),
            };
            (port.name.clone(), tensor)
        })
        .collect();
    let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let run = |session: &mut dyn Session| {
        let start = Instant::now();
        let out = session.run(&given).expect("the graph runs");
        (start.elapsed().as_secs_f64() * 1e3, out)
    };
    let (a, b) = (run(rten.as_mut()).1, run(other.as_mut()).1);
    let mut worst = 0f32;
    for (name, tensor) in &a {
        let (_, theirs) = b.iter().find(|(n, _)| n == name).expect("both have the same outputs");
        let pairs = tensor.as_f32().unwrap_or(&[]).iter().zip(theirs.as_f32().unwrap_or(&[]));
        worst = pairs.map(|(x, y)| (x - y).abs()).fold(worst, f32::max);
    }
    let (mut ratios, mut best) = (Vec::new(), [f64::MAX; 2]);
    for _ in 0..ROUNDS {
        let times = [run(rten.as_mut()).0, run(other.as_mut()).0];
        best = [best[0].min(times[0]), best[1].min(times[1])];
        ratios.push(times[0] / times[1]);
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ROUNDS / 2];
    println!(
        "{what}: rten {:.1} ms, onnxruntime {:.1} ms (best of {ROUNDS}), ratio {median:.2} (median of pairs; wanted at \
         most {WANTED}), outputs differ by {worst:.1e}",
        best[0], best[1]
    );
}

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (what, (cfg, frames)) in
        [("width 256, 512 tokens", width_256()), ("house-tiny, 12 latents", house_tiny())]
    {
        measure(what, &cfg, frames, folder.path());
    }
}
