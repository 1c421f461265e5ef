//! The full-size denoiser through the exporter, from sharded checkpoints of zeros in sparse files: memory and time.
//!
//! Slow (writes 20 GB for a minute or two), so not part of the ordinary run:
//!
//! ```sh
//! cargo test --release -p mindseye-tests --test onnx_export_5b --no-run
//! /usr/bin/time -v cargo test --release -p mindseye-tests --test onnx_export_5b -- --ignored --nocapture
//! ```

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use mindseye_builder::checkpoint::Checkpoint;
use mindseye_builder::checkpoint::names::{Component, dit_params};
use mindseye_builder::onnx::CheckpointWeights;
use mindseye_builder::onnx::denoiser_graph;
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::onnx::{Dim, Model, SaveOptions};
use mindseye_engines::session_denoiser::DenoiserKind;

/// A safetensors file of zeros that takes no room: the header is written, the rest is a hole.
fn sparse_shard(path: &Path, params: &[ParamSpec]) -> u64 {
    let mut header = serde_json::Map::new();
    let mut offset = 0u64;
    for p in params {
        let end = offset + 2 * p.shape.iter().map(|&s| s as u64).product::<u64>();
        let entry = serde_json::json!({"dtype": "BF16", "shape": p.shape, "data_offsets": [offset, end]});
        header.insert(p.name.clone(), entry);
        offset = end;
    }
    let json = serde_json::to_vec(&header).unwrap();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(json.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&json).unwrap();
    file.set_len(8 + json.len() as u64 + offset).unwrap();
    offset
}

/// Peak resident memory of this process in bytes, where the system says it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(1024 * line.split_whitespace().nth(1)?.parse::<u64>().ok()?)
}

#[test]
#[ignore = "slow: writes 20 GB"]
fn the_full_denoiser_is_exported_in_little_memory() {
    let preset = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../configs/models/wan22-5b.toml");
    let table: toml::Table = toml::from_str(&std::fs::read_to_string(preset).unwrap()).unwrap();
    let mut cfg: DitConfig = table["dit"].clone().try_into().unwrap();
    cfg.camera_channels = 0; // as published
    let params = dit_params(&cfg);
    let dir = tempfile::tempdir().unwrap();
    let (mut bytes, mut map) = (0, serde_json::Map::new());
    for (i, shard) in params.chunks(params.len().div_ceil(3)).enumerate() {
        let name = format!("diffusion_pytorch_model-{:05}-of-00003.safetensors", i + 1);
        bytes += sparse_shard(&dir.path().join(&name), shard);
        map.extend(shard.iter().map(|p| (p.name.clone(), name.clone().into())));
    }
    assert_eq!(bytes, 2 * 4_999_787_712);
    let index = dir.path().join("diffusion_pytorch_model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({"weight_map": map}).to_string()).unwrap();

    let start = Instant::now();
    let checkpoint = Checkpoint::open(&index).unwrap();
    let weights = CheckpointWeights::locate(checkpoint, Component::Dit, &params).unwrap();
    let model = denoiser_graph(&cfg, Arc::new(weights), DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    let path = dir.path().join("denoiser.onnx");
    let saved = model.save(&path, &SaveOptions::default()).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    let memory = peak_memory();
    println!(
        "{} nodes, {:.2} GB written in {seconds:.0} s, peak memory {} MB",
        model.graph.nodes.len(),
        saved.bytes as f64 / 1e9,
        memory.map_or("?".into(), |m| (m / 1_000_000).to_string()),
    );
    assert!(saved.data.is_some(), "weights of this size lie beside the graph");
    assert!(saved.bytes >= 4 * 4_999_787_712);
    assert!(seconds < 600.0, "{seconds} s");
    assert!(memory.is_none_or(|m| m < 2_000_000_000), "{memory:?} bytes");
    let read = Model::load(&path).unwrap();
    assert_eq!(read.graph.nodes.len(), model.graph.nodes.len());
    assert_eq!(read.graph.initializers.len(), model.graph.initializers.len());
}
