//! `mindseye-tools export`: a bundle of weights becomes a bundle of graphs that run, and stream.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use mindseye_builder::checkpoint::names::{umt5_params, vae_params};
use mindseye_engines::backend::{PrepareOptions, Session, Tensor, by_name};
use mindseye_engines::bundle::{
    BoundingBoxSpec, Bundle, BundleWriter, ComponentFormat, Evaluation, FORMAT, Guide, ImageSpec, LatentSpec,
    Limits, Manifest, Networks, Provenance, RopeSpec, SamplerSpec,
};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::VaeConfig;
use mindseye_engines::sampler::{Grid, Solver};
use mindseye_tools::export::{ExportArgs, run};

fn dit() -> DitConfig {
    DitConfig {
        in_channels: 4,
        out_channels: 4,
        latent_height: 2,
        latent_width: 4,
        patch: [2, 2],
        heads: 2,
        head_dim: 12,
        ffn_dim: 32,
        text_dim: 8,
        text_len: 5,
        freq_dim: 16,
        prediction: Prediction::Velocity,
        ..DitConfig::SMALLEST
    }
}

fn vae() -> VaeConfig {
    VaeConfig {
        base_dim: 4,
        decoder_base_dim: 4,
        z_dim: 4,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temporal_downsample: vec![true, true],
        patch_size: 2,
        latents_mean: vec![0.1; 4],
        latents_std: vec![0.5; 4],
    }
}

fn umt5() -> Umt5Config {
    Umt5Config {
        vocab_size: 20,
        d_model: 8,
        d_kv: 4,
        d_ff: 12,
        num_layers: 2,
        num_heads: 2,
        buckets: 8,
        max_distance: 16,
        eps: 1e-6,
    }
}

/// A safetensors file of half-precision noise.
fn weights(path: &Path, params: &[ParamSpec]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut state = 1u64;
    for p in params {
        let start = data.len();
        for _ in 0..p.shape.iter().product::<usize>() {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // A bfloat16 in 0.125..0.25 with either sign.
            data.extend_from_slice(&(0x3e00 | (state >> 40) as u16 & 0x807f).to_le_bytes());
        }
        let entry =
            serde_json::json!({"dtype": "BF16", "shape": p.shape, "data_offsets": [start, data.len()]});
        header.insert(p.name.clone(), entry);
    }
    let json = serde_json::to_vec(&header).unwrap();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(json.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&json).unwrap();
    file.write_all(&data).unwrap();
}

fn source(target: &Path) {
    let networks = Networks { vae: Some(vae()), umt5: Some(umt5()), ..Networks::default() };
    let manifest = Manifest {
        format: FORMAT,
        name: "tiny".into(),
        precision: "bf16".into(),
        target: "cpu".into(),
        license: "Apache-2.0".into(),
        image: ImageSpec { width: 32, height: 16, frame_stride: 3, frames_per_second: 30.0 },
        latent: LatentSpec {
            channels: 4,
            height: 2,
            width: 4,
            frames: 4,
            mean: vec![0.1; 4],
            std: vec![0.5; 4],
        },
        rope: RopeSpec { gap: 50.0 },
        limits: Limits { context_trained: 6, context_allowed: 6, target_trained: 6, target_allowed: 6 },
        sampler: SamplerSpec {
            grid: Grid::WanUnipc,
            solver: Solver::UniPc,
            shift: 5.0,
            steps: 4,
            guidance: 5.0,
            prediction: Prediction::Velocity,
            guide: Guide::None,
        },
        provenance: Provenance { source: "noise".into(), ..Provenance::default() },
        dit: dit(),
        networks,
        bounding_box: BoundingBoxSpec { score_min: 0.3 },
        lift: None,
        evaluation: Evaluation::default(),
        component: BTreeMap::new(),
    };
    let mut writer = BundleWriter::create(target, manifest).unwrap();
    let dit_params = count_denoiser(&dit(), 2, 0, 2).params().to_vec();
    for (name, params) in
        [("denoiser", dit_params), ("vae", vae_params(&vae())), ("text_encoder", umt5_params(&umt5()))]
    {
        let file = format!("{name}.safetensors");
        weights(&writer.path(&file), &params);
        writer.add(name, ComponentFormat::Safetensors, &[&file]).unwrap();
    }
    std::fs::write(writer.path("tokenizer.model"), b"pieces").unwrap();
    writer.add("tokenizer", ComponentFormat::Sentencepiece, &["tokenizer.model"]).unwrap();
    writer.finish().unwrap();
}

fn args(source: &Path, out: &Path) -> ExportArgs {
    ExportArgs {
        source: source.to_owned(),
        out: out.to_owned(),
        model: None,
        cached: true,
        external: false,
        vectors: true,
    }
}

fn session(bundle: &Bundle, component: &str) -> Box<dyn Session> {
    let options = PrepareOptions::default().with_threads(1);
    let path = bundle.path(component).unwrap();
    let engine = by_name("rten").unwrap().prepare(&path, &options).unwrap();
    bundle.check_engine(component, engine.as_ref()).unwrap();
    engine.session().unwrap()
}

/// Feeds the caches that one call gave to the next one.
fn step(
    session: &mut dyn Session,
    input: (&str, Tensor),
    caches: Vec<(String, Tensor)>,
) -> (Tensor, Vec<(String, Tensor)>) {
    let mut given = vec![(input.0, &input.1)];
    given.extend(caches.iter().map(|(n, t)| (n.strip_prefix("new_").unwrap(), t)));
    let mut out = session.run(&given).unwrap();
    let result = out.remove(0).1;
    (result, out)
}

#[test]
fn a_bundle_of_weights_becomes_a_bundle_of_graphs() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("weights"), dir.path().join("graphs"));
    source(&from);
    run(args(&from, &to)).unwrap();
    let bundle = Bundle::load(&to).unwrap();
    assert_eq!(bundle.manifest().precision, "f32");
    assert_eq!(bundle.manifest().dit, dit());
    let names: Vec<&str> = bundle.manifest().component.keys().map(String::as_str).collect();
    let wanted = [
        "denoiser",
        "denoiser_cached",
        "denoiser_prefill",
        "text_encoder",
        "tokenizer",
        "vae_decoder_first",
        "vae_decoder_next",
        "vae_encoder_first",
        "vae_encoder_next",
    ];
    assert_eq!(names, wanted);
    for name in wanted.iter().filter(|n| **n != "tokenizer") {
        let vectors = format!("{name}.onnx.vectors.safetensors");
        assert!(to.join(&vectors).is_file(), "{vectors}");
    }
    assert_eq!(std::fs::read(to.join("tokenizer.model")).unwrap(), b"pieces");

    // The streaming halves fit together: first frame, then two groups; and back.
    let frames =
        |n: usize| Tensor::f32(&[n, 3, 16, 32], (0..n * 1536).map(|i| (i % 7) as f32 / 7.0).collect());
    let mut latents = Vec::new();
    let (latent, mut caches) =
        step(session(&bundle, "vae_encoder_first").as_mut(), ("frames", frames(1)), vec![]);
    latents.push(latent);
    let mut next = session(&bundle, "vae_encoder_next");
    for _ in 0..2 {
        let (latent, new) = step(next.as_mut(), ("frames", frames(4)), caches);
        caches = new;
        latents.push(latent);
    }
    let finite = |t: &Tensor| t.as_f32().unwrap().iter().all(|v| v.is_finite());
    assert!(latents.iter().all(|l| l.shape == [1, 4, 2, 4] && finite(l)), "{latents:?}");
    assert_ne!(latents[1], latents[2], "the same frames after another past are another latent");
    let mut decoder = session(&bundle, "vae_decoder_next");
    let mut state = (Tensor::empty(), Vec::new());
    for (i, latent) in latents.into_iter().enumerate() {
        let first = i == 0;
        state = if first {
            step(session(&bundle, "vae_decoder_first").as_mut(), ("latent", latent), state.1)
        } else {
            step(decoder.as_mut(), ("latent", latent), state.1)
        };
        assert_eq!(state.0.shape, [if first { 1 } else { 4 }, 3, 16, 32]);
        assert!(finite(&state.0));
    }

    // What holds no weights any more cannot be exported again, and says so.
    let error = run(args(&to, &dir.path().join("again"))).unwrap_err().to_string();
    assert!(error.contains("nothing to export"), "{error}");
}

#[test]
fn what_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    let error = format!("{:#}", run(args(&nowhere, &dir.path().join("out"))).unwrap_err());
    assert!(error.contains("nowhere") && error.contains("--model"), "{error}");

    // One weight of the denoiser has another shape.
    let path = dir.path().join("w.safetensors");
    let mut params = count_denoiser(&dit(), 2, 0, 2).params().to_vec();
    let wrong = params.iter_mut().find(|p| p.name == "blocks.0.attn1.to_k.weight").unwrap();
    wrong.shape = vec![24, 23];
    weights(&path, &params);
    let model = dir.path().join("model.toml");
    let mut table = toml::Table::new();
    table.insert("dit".into(), toml::Value::try_from(dit()).unwrap());
    std::fs::write(&model, toml::to_string(&table).unwrap()).unwrap();
    let mut arguments = args(&path, &dir.path().join("out"));
    arguments.model = Some(model);
    let error = format!("{:#}", run(arguments.clone()).unwrap_err());
    assert!(error.contains("blocks.0.attn1.to_k.weight") && error.contains("[24, 23]"), "{error}");
    assert!(!dir.path().join("out/denoiser.onnx").exists());

    params.iter_mut().find(|p| p.shape == [24, 23]).unwrap().shape = vec![24, 24];
    weights(&path, &params);
    run(arguments).unwrap();
    assert!(dir.path().join("out/denoiser_prefill.onnx").exists());
}
