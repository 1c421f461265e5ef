//! Our networks, samplers and tokenizer against vectors of the reference implementations, and what follows from
//! them: streaming equals whole, a restarted stream re-converges.

use std::{path::PathBuf, sync::Arc};

use mindseye_builder::checkpoint::Checkpoint;
use mindseye_engines::{
    count::vae_encoder_caches,
    model::{
        codec::{self, LinearCodec, LinearCodecConfig},
        vae::{self, Chunk, VaeConfig},
    },
    sampler::Noise,
};
use mindseye_tools::{
    eager::{Eager, Params},
    golden::{Via, check},
};

fn data(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/golden").join(path)
}

/// Runs a set and demands that each of these cases was there and that all passed.
fn passes(set: &str, via: Via, cases: &[&str]) {
    let results = check(&data(set), &[via]).unwrap();
    for case in cases {
        assert!(results.iter().any(|r| r.case == *case), "{set}: no case {case}");
    }
    for r in results {
        assert!(r.pass, "{set}: {} via {}: worst {:?} at {}, {:?}", r.case, r.via, r.worst, r.at, r.error);
        assert!(r.tensors > 0);
    }
}

const DIT: [&str; 9] = [
    "dit/ctx_gap50_cond",
    "dit/ctx_gap50_maskedctx",
    "dit/ctx_gap50_maskedctx (prefill + cached)",
    "dit/ctx_gap50_uncond_t0",
    "dit/ctx_gap50_uncond_t1000",
    "dit/ctx_plain_rope",
    "dit/joint_cfg",
    "dit/t2v_scalar_t",
    "dit/ti2v_first_frame_t0",
];

const SET1: [&str; 8] = [
    "umt5",
    "plucker",
    "tokenizer",
    "rope_time/rope",
    "rope_time/sinusoids",
    "sched/tables",
    "sched/trajectories",
    "sched/training",
];

const SET2: [&str; 7] =
    ["umt5", "vae/encode", "vae/decode", "pipeline", "sched/tables", "sched/trajectories", "sched/training"];

#[test]
fn set1_eager() {
    passes("set1", Via::Eager, &[&DIT[..], &SET1].concat());
}

#[test]
fn set2_eager() {
    passes("set2", Via::Eager, &[&DIT[..], &SET2].concat());
}

#[test]
fn set1_onnx() {
    passes("set1", Via::Onnx, &[&DIT[..], &SET1].concat());
}

#[test]
fn set2_onnx() {
    passes("set2", Via::Onnx, &[&DIT[..], &SET2].concat());
}

#[test]
fn sets_below_a_directory_are_found_and_named() {
    let results = check(&data(""), &[]).unwrap();
    let names: Vec<&str> = results.iter().map(|r| r.case.as_str()).collect();
    for wanted in ["set1/sched/tables", "set2/sched/tables", "set1/plucker", "set1/tokenizer"] {
        assert!(names.contains(&wanted), "{wanted} is missing: {names:?}");
    }
    assert!(results.iter().all(|r| r.pass), "{results:?}");
    // A set by itself keeps its plain names.
    let alone = check(&data("set1"), &[]).unwrap();
    assert!(alone.iter().any(|r| r.case == "sched/tables"), "{alone:?}");
    // Nothing, however deep.
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
    let error = check(dir.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("no golden cases here or in the folders below"), "{error}");
}

#[test]
fn a_wrong_weight_or_vector_is_noticed() {
    // Swaps norm_q and norm_k of one block: same shapes, other values.
    let dir = tempfile::tempdir().unwrap();
    let dit = dir.path().join("dit");
    std::fs::create_dir(&dit).unwrap();
    for name in ["config.json", "case_ctx_gap50_cond.safetensors"] {
        std::fs::copy(data("set2/dit").join(name), dit.join(name)).unwrap();
    }
    let bytes = std::fs::read(data("set2/dit/weights.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    let swapped = header
        .replace("blocks.0.attn1.norm_q", "blocks.0.attn1.norm_X")
        .replace("blocks.0.attn1.norm_k", "blocks.0.attn1.norm_q")
        .replace("blocks.0.attn1.norm_X", "blocks.0.attn1.norm_k");
    assert_ne!(header, swapped);
    let file = [&bytes[..8], swapped.as_bytes(), &bytes[8 + length..]].concat();
    std::fs::write(dit.join("weights.safetensors"), file).unwrap();
    let results = check(dir.path(), &[Via::Eager]).unwrap();
    assert!(!results.is_empty());
    assert!(results.iter().all(|r| !r.pass && r.error.is_none()), "{results:?}");
}

/// The tiny autoencoder of set 2.
fn tiny_vae() -> (VaeConfig, Arc<Params>) {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data("set2/vae/config.json")).unwrap()).unwrap();
    let numbers =
        |key: &str| json[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    let size = |key: &str| json[key].as_u64().unwrap() as usize;
    let cfg = VaeConfig {
        base_dim: size("base_dim"),
        decoder_base_dim: size("decoder_base_dim"),
        z_dim: size("z_dim"),
        dim_mult: json["dim_mult"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect(),
        num_res_blocks: size("num_res_blocks"),
        temporal_downsample: vec![false, true, true],
        patch_size: size("patch_size"),
        latents_mean: numbers("latents_mean"),
        latents_std: numbers("latents_std"),
    };
    let weights = Checkpoint::open(&data("set2/vae/weights.safetensors")).unwrap();
    let mut params = Params::new();
    for (name, entry) in weights.tensors() {
        params.insert(name, &entry.shape, weights.read_f32(name).unwrap());
    }
    (cfg, Arc::new(params))
}

/// Streams `frames[n, 3, 32, 32]`: one interpreter per chunk, caches carried as plain arrays.
fn stream(cfg: &VaeConfig, params: &Arc<Params>, frames: &[f32]) -> Vec<Vec<f32>> {
    let frame = 3 * 32 * 32;
    let shapes = vae_encoder_caches(cfg, [2, 2]);
    let mut caches: Vec<Vec<f32>> = Vec::new();
    let mut latents = Vec::new();
    let (first, rest) = frames.split_at(frame);
    for chunk in std::iter::once(first).chain(rest.chunks_exact(4 * frame)) {
        let mut eager = Eager::new(params.clone(), false);
        let x = eager.input(&[chunk.len() / frame, 3, 32, 32], chunk.to_vec());
        let old: Vec<_> = caches.iter().zip(&shapes).map(|(c, s)| eager.input(s, c.clone())).collect();
        let kind = if old.is_empty() { Chunk::First } else { Chunk::Next };
        let out = vae::encode(&mut eager, cfg, [2, 2], kind, &x, &old);
        latents.push(eager.value(out.latent).1.to_vec());
        caches = out.caches.iter().map(|c| eager.value(*c).1.to_vec()).collect();
    }
    latents
}

#[test]
fn streaming_encode_is_whole_encode() {
    let (cfg, params) = tiny_vae();
    let count = 14; // the last frame does not fill a group
    let clip: Vec<f32> =
        Noise::new(3, 0).draw(count * 3 * 32 * 32).iter().map(|x| (0.5 * x).clamp(-1.0, 1.0)).collect();
    let mut eager = Eager::new(params.clone(), false);
    let x = eager.input(&[count, 3, 32, 32], clip.clone());
    let whole = vae::encode_clip(&mut eager, &cfg, [2, 2], &x, count);
    let whole: Vec<Vec<f32>> = whole.iter().map(|z| eager.value(*z).1.to_vec()).collect();
    assert_eq!(whole.len(), 4);
    assert!(stream(&cfg, &params, &clip) == whole, "streaming differs from the whole encode");
}

#[test]
fn a_stream_restarted_28_groups_earlier_reconverges_exactly() {
    let (cfg, params) = tiny_vae();
    let frame = 3 * 32 * 32;
    let clip: Vec<f32> =
        Noise::new(4, 0).draw((1 + 4 * 34) * frame).iter().map(|x| (0.5 * x).clamp(-1.0, 1.0)).collect();
    let whole = stream(&cfg, &params, &clip);
    // Begins anew at frame 8, as if nothing had been before: latent 2 + k of the clip is latent k of the new stream.
    let again = stream(&cfg, &params, &clip[8 * frame..]);
    let first_equal =
        (0..again.len()).find(|k| again[*k..] == whole[2 + k..]).expect("it never re-converges");
    // A frame reaches its own latent and the next 28: after 28 groups of warm-up nothing of the gap is left.
    assert!(first_equal <= 29, "re-converged only at latent {first_equal}");
    assert!(first_equal > 0, "the restart changed nothing, so this test shows nothing");
}

#[test]
fn codec_loops_agree_with_the_graph() {
    let config = LinearCodecConfig { block: 4, channels: 10, height: 12, width: 20, scale: 0.7 };
    let mut noise = Noise::new(9, 0);
    let (basis, mean) = (noise.draw(10 * config.block_values()), noise.draw(config.block_values()));
    let plain = LinearCodec::new(config, basis.clone(), mean.clone()).unwrap();
    let mut params = Params::new();
    params.insert(codec::BASIS, &[10, config.block_values()], basis);
    params.insert(codec::MEAN, &[config.block_values()], mean);
    let mut eager = Eager::new(Arc::new(params), false);
    let frames = noise.draw(2 * 12 * 12 * 20);
    let x = eager.input(&[2, 4, 3, 12, 20], frames.clone());
    let z = codec::encode(&mut eager, &config, &x);
    let y = codec::decode(&mut eager, &config, &z);
    let close = |name: &str, got: &[f32], wanted: &[f32]| {
        assert_eq!(got.len(), wanted.len(), "{name}");
        let worst = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4, "{name}: {worst}");
    };
    let (shape, latents) = eager.value(z);
    assert_eq!(shape, [2, 10, 1, 3, 5]);
    let plain_latents: Vec<f32> =
        frames.chunks(frames.len() / 2).flat_map(|f| plain.encode_group(f)).collect();
    close("encode", latents, &plain_latents);
    let plain_frames: Vec<f32> =
        plain_latents.chunks(plain_latents.len() / 2).flat_map(|z| plain.decode_group(z)).collect();
    close("decode", eager.value(y).1, &plain_frames);
    // The first frame is a group of itself.
    let one = &frames[..3 * 12 * 20];
    assert_eq!(plain.encode_first(one), plain.encode_group(&[one, one, one, one].concat()));
}

#[test]
fn an_embedding_alone_is_a_text_encoder() {
    use mindseye_engines::model::umt5::{Umt5Config, Umt5Inputs, encode, host_inputs};
    let cfg = Umt5Config {
        vocab_size: 5,
        d_model: 4,
        d_kv: 0,
        d_ff: 0,
        num_layers: 0,
        num_heads: 0,
        buckets: 0,
        max_distance: 0,
        eps: 1e-6,
    };
    cfg.validate().unwrap();
    let mut params = Params::new();
    params.insert("shared.weight", &[5, 4], (0..20).map(|i| i as f32 - 9.0).collect());
    params.insert("encoder.final_layer_norm.weight", &[4], vec![1.0, 2.0, 3.0, 4.0]);
    let mut eager = Eager::new(Arc::new(params), false);
    let (bias, keep) = host_inputs(&[2], 3);
    let (ids, buckets) = (eager.index(&[1, 3], vec![4, 1, 0]), eager.index(&[3, 3], cfg.bucket_table(3)));
    let (mask_bias, keep) = (eager.input(&[1, 1, 1, 3], bias), eager.input(&[1, 3, 1], keep));
    let out = encode(
        &mut eager,
        &cfg,
        &Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep },
    );
    let rms = |row: [f32; 4]| {
        let r = (row.iter().map(|x| x * x).sum::<f32>() / 4.0 + 1e-6).sqrt();
        [row[0] / r, 2.0 * row[1] / r, 3.0 * row[2] / r, 4.0 * row[3] / r]
    };
    let wanted = [rms([7.0, 8.0, 9.0, 10.0]), rms([-5.0, -4.0, -3.0, -2.0]), [0.0; 4]].concat();
    let got = eager.value(out.rows).1;
    assert!(got.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-5), "{got:?} {wanted:?}");
}
