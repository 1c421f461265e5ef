//! What the passes over a graph change, and what they must not: results, names of weights, the way back to them.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use mindseye_builder::checkpoint::names::{umt5_params, vae_params};
use mindseye_builder::onnx::{
    GraphBuilder, MemoryWeights, Way, WeightSource, codec_graph, denoiser_graph, text_encoder_graph,
    vae_graph, write_denoiser,
};
use mindseye_engines::backend::{Elements, PrepareOptions, Tensor, by_name};
use mindseye_engines::bundle::Bundle;
use mindseye_engines::count::count_denoiser;
use mindseye_engines::model::Ops;
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::{Chunk, VaeConfig};
use mindseye_engines::onnx::{DataType, Dim, Graph, Model, Node, SaveOptions};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_tools::retrain::weights_of;

/// Everything that a configuration can switch on.
fn dit() -> DitConfig {
    DitConfig {
        in_channels: 5,
        out_channels: 5,
        latent_height: 4,
        latent_width: 6,
        patch: [2, 2],
        heads: 3,
        head_dim: 16,
        layers: 2,
        ffn_dim: 40,
        text_dim: 12,
        text_len: 4,
        freq_dim: 16,
        prediction: Prediction::Velocity,
        camera_channels: 7,
        pooled_text: true,
        lift: true,
        ..DitConfig::SMALLEST
    }
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

fn dit_weights(cfg: &DitConfig) -> MemoryWeights {
    let mut weights = MemoryWeights::new();
    for (i, p) in count_denoiser(cfg, 2, 0, 2).params().iter().enumerate() {
        let scale = 1.5 / (*p.shape.last().unwrap() as f32).sqrt();
        let values = noise(p.shape.iter().product(), i as u64).iter().map(|v| v * scale).collect();
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    weights
}

/// Runs a graph with seeded inputs; sizes that differ between calls are three frames.
fn results(model: &Model, tokens: usize) -> Vec<(String, Tensor)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("graph.onnx");
    model.save(&path, &SaveOptions::default()).unwrap();
    let options = PrepareOptions::default().with_threads(1);
    let engine = by_name("rten").unwrap().prepare(&path, &options).unwrap();
    let size = |dim: &Dim| match dim {
        Dim::Fixed(n) => *n,
        Dim::Symbol(name) if name == "frames" => 3,
        Dim::Symbol(name) if name == "tokens" => 3 * tokens,
        Dim::Symbol(name) if name == "context_tokens" => 2 * tokens,
        _ => 2,
    };
    let mut inputs = Vec::new();
    for (i, port) in engine.inputs().iter().enumerate() {
        let shape: Vec<usize> = port.shape.iter().map(size).collect();
        let count = shape.iter().product();
        let tensor = match port.dtype {
            mindseye_engines::backend::DataType::F32 => Tensor::f32(&shape, noise(count, 1000 + i as u64)),
            _ if port.name == "row_batch" => Tensor::i64(&shape, vec![0; count]),
            _ => Tensor::i64(&shape, (0..count as i64).map(|i| i % 2).collect()),
        };
        inputs.push((port.name.clone(), tensor));
    }
    let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    engine.session().unwrap().run(&given).unwrap()
}

#[track_caller]
fn close(what: &str, a: &[(String, Tensor)], b: &[(String, Tensor)]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!((name, &a.shape), (other, &b.shape), "{what}");
        let (Elements::F32(a), Elements::F32(b)) = (&a.data, &b.data) else { panic!("{what} {name}") };
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = a.iter().fold(1f32, |m, v| m.max(v.abs()));
        assert!(worst < 1e-4 * largest, "{what} {name}: off by {worst} of {largest}");
    }
}

fn count(model: &Model, op: &str) -> usize {
    model.graph.nodes.iter().filter(|n| n.op_type == op).count()
}

#[test]
fn passes_keep_the_results_of_the_denoiser() {
    let cfg = dit();
    let weights: Arc<dyn WeightSource> = Arc::new(dit_weights(&cfg));
    for kind in [DenoiserKind::Joint, DenoiserKind::Masked, DenoiserKind::Prefill, DenoiserKind::Cached] {
        let write = || {
            let mut ops = GraphBuilder::new(kind.component(), weights.clone());
            write_denoiser(&mut ops, &cfg, kind, Dim::Fixed(1));
            ops
        };
        let (plain, fast) = (write().finish_plain().unwrap(), write().finish().unwrap());
        assert!(fast.graph.nodes.len() < plain.graph.nodes.len());
        // Only the rotary tables and the heads are still reshaped; no weight is turned at run time.
        for node in &fast.graph.nodes {
            let of_weight = node.inputs.first().is_some_and(|i| fast.graph.initializer(i).is_some());
            assert!(!(node.op_type == "Transpose" && of_weight), "{}", node.name);
        }
        assert_eq!(count(&plain, "Neg"), 0);
        assert_eq!(count(&fast, "Neg"), usize::from(cfg.layers > 0), "one table for all layers");
        if kind == DenoiserKind::Prefill {
            continue; // rotated keys are in another order, by intent: see the next test
        }
        if kind == DenoiserKind::Cached {
            continue; // reads such keys
        }
        let tokens = cfg.tokens_per_frame();
        close(kind.component(), &results(&fast, tokens), &results(&plain, tokens));
    }
}

/// Rotated keys that leave the graph are the plain graph's with each head's channels in halves.
#[test]
fn rotated_keys_leave_in_halves() {
    let cfg = dit();
    let weights: Arc<dyn WeightSource> = Arc::new(dit_weights(&cfg));
    let write = || {
        let mut ops = GraphBuilder::new("prefill", weights.clone());
        write_denoiser(&mut ops, &cfg, DenoiserKind::Prefill, Dim::Fixed(1));
        ops
    };
    let tokens = cfg.tokens_per_frame();
    let fast = results(&write().finish().unwrap(), tokens);
    let mut plain = results(&write().finish_plain().unwrap(), tokens);
    for (name, tensor) in &mut plain {
        let Elements::F32(values) = &mut tensor.data else { panic!("{name}") };
        if name.ends_with(".k") {
            for head in values.chunks_exact_mut(cfg.head_dim) {
                let pairs = head.to_vec();
                for (j, v) in head.iter_mut().enumerate() {
                    let half = cfg.head_dim / 2;
                    *v = pairs[if j < half { 2 * j } else { 2 * (j - half) + 1 }];
                }
            }
        }
    }
    close("prefill", &fast, &plain);
}

#[test]
fn passes_keep_the_results_of_text_encoder_and_autoencoder() {
    let fill = |specs: &[mindseye_engines::model::ParamSpec]| -> Arc<dyn WeightSource> {
        let mut weights = MemoryWeights::new();
        for (i, p) in specs.iter().enumerate() {
            let values = noise(p.shape.iter().product(), i as u64).iter().map(|v| 0.4 * v).collect();
            weights.insert(p.name.clone(), p.shape.clone(), values);
        }
        Arc::new(weights)
    };
    let text = Umt5Config {
        vocab_size: 20,
        d_model: 8,
        d_kv: 4,
        d_ff: 12,
        num_layers: 2,
        num_heads: 2,
        buckets: 8,
        max_distance: 16,
        eps: 1e-6,
    };
    let vae = VaeConfig {
        base_dim: 4,
        decoder_base_dim: 4,
        z_dim: 4,
        dim_mult: vec![1, 2, 2],
        num_res_blocks: 1,
        temporal_downsample: vec![true, true],
        patch_size: 2,
        latents_mean: vec![0.1; 4],
        latents_std: vec![0.5; 4],
    };
    let text_weights = fill(&umt5_params(&text));
    let model = text_encoder_graph(&text, 6, text_weights.clone()).unwrap();
    assert_eq!(count(&model, "Transpose"), 2 * 5, "of attention, none of weights");
    let model = vae_graph(&vae, [2, 4], Way::Encode, Chunk::Next, fill(&vae_params(&vae))).unwrap();
    for node in model.graph.nodes.iter().filter(|n| n.op_type == "Conv") {
        assert!(model.graph.initializer(&node.inputs[1]).is_some(), "{} reads a stored weight", node.name);
    }
}

/// A value that is read both rotated and as it is keeps its order, and the result is right.
#[test]
fn a_rotated_value_that_is_read_elsewhere_keeps_its_order() {
    let weights = Arc::new(MemoryWeights::from([("w", vec![4, 4], noise(16, 1))]));
    let write = || {
        let mut o = GraphBuilder::new("test", weights.clone());
        let x = o.input("x", &[Dim::from(1), Dim::from("n"), Dim::from(4)]);
        let cos = o.input("cos", &[Dim::from("n"), Dim::from(2)]);
        let w = o.param("w", &[4, 4]);
        let q = o.linear(&x, &w, None);
        let q = o.reshape(&q, &[0, 0, 1, 4]);
        let r = o.rotate(&q, &cos, &cos, 1, 4);
        // Pairs of the rotation against the same channels unrotated: both in the network's order.
        let unturned = o.reshape(&q, &[0, 0, 1, 2, 2]);
        let turned = o.reshape(&r, &[0, 0, 1, 2, 2]);
        let turned = o.permute(&turned, &[0, 1, 2, 4, 3]);
        let scores = o.matmul(&unturned, &turned);
        o.output("scores", &scores, &vec![Dim::Unknown; 5]);
        o
    };
    let fast = write().finish().unwrap();
    assert_eq!(fast.graph.nodes.len() + 1, write().finish_plain().unwrap().graph.nodes.len(), "only folded");
    let origin = fast.graph.initializers.iter().find_map(|i| i.origin.as_ref()).unwrap();
    assert_eq!(origin.steps.len(), 1, "transposed, not reordered: {:?}", origin.steps);
}

/// All constants and nodes of two graphs, walked from the outputs: the same operations, attributes and bytes.
fn same_graph(a: &Graph, b: &Graph) -> usize {
    fn makers(g: &Graph) -> HashMap<&str, &Node> {
        g.nodes.iter().flat_map(|n| n.outputs.iter().map(move |o| (o.as_str(), n))).collect()
    }
    let (of_a, of_b) = (makers(a), makers(b));
    let names = |g: &Graph| g.outputs.iter().map(|o| o.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(a), names(b));
    let mut waiting: Vec<(&str, &str)> =
        a.outputs.iter().zip(&b.outputs).map(|(a, b)| (a.name.as_str(), b.name.as_str())).collect();
    let mut seen = BTreeMap::new();
    while let Some((x, y)) = waiting.pop() {
        if let Some(known) = seen.insert(x, y) {
            assert_eq!(known, y, "{x}");
            continue;
        }
        match (of_a.get(x), of_b.get(y)) {
            (Some(n), Some(m)) => {
                let form = |n: &Node| {
                    let mut attributes: Vec<String> = n.attributes.iter().map(|a| format!("{a:?}")).collect();
                    attributes.sort();
                    (n.op_type.clone(), attributes, n.inputs.len())
                };
                assert_eq!(form(n), form(m), "{x} and {y}");
                waiting.extend(n.inputs.iter().map(String::as_str).zip(m.inputs.iter().map(String::as_str)));
            }
            (None, None) => match (a.initializer(x), b.initializer(y)) {
                (Some(i), Some(j)) => {
                    assert_eq!((i.dtype, &i.shape), (j.dtype, &j.shape), "{x} and {y}");
                    assert_eq!(i.bytes().unwrap(), j.bytes().unwrap(), "values of {x} and {y}");
                }
                (None, None) => assert_eq!(x, y),
                _ => panic!("{x} is a constant in one graph only"),
            },
            _ => panic!("{x} is made by a node in one graph only"),
        }
    }
    assert_eq!(a.nodes.len(), b.nodes.len());
    a.nodes.len()
}

/// The shipped graphs, from before passes and origins: taken back to weights and written anew they are the same, to
/// the bit.
#[test]
fn shipped_graphs_come_out_the_same() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    let bundle = Bundle::load(&shipped).unwrap();
    let params = weights_of(&shipped).unwrap();
    let mut weights = MemoryWeights::new();
    for i in 0..params.len() {
        let (name, shape, values) = params.get(i);
        weights.insert(name, shape.to_vec(), values.to_vec());
    }
    let weights: Arc<dyn WeightSource> = Arc::new(weights);
    let old = |name: &str| Model::load(bundle.path(name).unwrap()).unwrap();
    let dit = &bundle.manifest().dit;
    let new = denoiser_graph(dit, weights.clone(), DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    assert!(same_graph(&new.graph, &old("denoiser").graph) > 500);
    let codec = bundle.manifest().networks.codec.unwrap();
    let new = codec_graph(&codec, Way::Encode, weights).unwrap();
    same_graph(&new.graph, &old("vae_encoder").graph);
}

/// What is exported is read back as it was, from the file alone; other readers see an ordinary file.
#[test]
fn weights_come_back_from_a_file() {
    let cfg = dit();
    let source = dit_weights(&cfg);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("denoiser.onnx");
    let model = denoiser_graph(&cfg, Arc::new(source.clone()), DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    model.save(&path, &SaveOptions::default()).unwrap();
    let read = Model::load(&path).unwrap();
    assert_eq!(read.to_bytes().unwrap(), model.to_bytes().unwrap(), "origins are read and written again");
    let weights = read.graph.stored_weights().unwrap();
    assert_eq!(weights.keys().cloned().collect::<Vec<_>>(), source.names());
    for (name, (shape, values)) in &weights {
        let mut want = vec![0.0; values.len()];
        source.read(name, 0, &mut want).unwrap();
        assert_eq!(*shape, source.meta(name).unwrap().shape, "{name}");
        assert_eq!(*values, want, "{name}");
    }
}

/// A layer that has another name now: its weights are found by where they are in the graph.
#[test]
fn a_renamed_layer_is_found_by_its_place() {
    let network = |q: &str| {
        let weights = MemoryWeights::from([
            (q.to_owned(), vec![4, 4], noise(16, 7)),
            (format!("{q}.bias"), vec![4], noise(4, 8)),
        ]);
        let mut o = GraphBuilder::new("test", Arc::new(weights));
        let x = o.input("x", &[Dim::from(1), Dim::from("n"), Dim::from(4)]);
        let cos = o.input("cos", &[Dim::from("n"), Dim::from(1)]);
        let (w, b) = (o.param(q, &[4, 4]), o.param(&format!("{q}.bias"), &[4]));
        let h = o.linear(&x, &w, Some(&b));
        let h = o.reshape(&h, &[0, 0, 2, 2]);
        let y = o.rotate(&h, &cos, &cos, 2, 2);
        o.output("y", &y, &vec![Dim::Unknown; 4]);
        o.finish().unwrap()
    };
    let mut old = network("blocks.0.attn1.to_q.weight");
    old.graph.initializers.iter_mut().for_each(|i| i.origin = None);
    assert!(!old.graph.has_origins());
    old.graph.adopt_origins(&network("layers.0.query").graph).unwrap();
    let weights = old.graph.stored_weights().unwrap();
    assert_eq!(weights["layers.0.query"], (vec![4, 4], noise(16, 7)));
    assert_eq!(weights["layers.0.query.bias"], (vec![4], noise(4, 8)));

    // Another network is not mistaken for it.
    let mut other = network("w");
    other.graph.initializers.iter_mut().for_each(|i| i.origin = None);
    let at = other.graph.nodes.iter().position(|n| n.op_type == "MatMul").unwrap();
    other.graph.nodes[at].op_type = "Gemm".into();
    let error = other.graph.adopt_origins(&network("w").graph).unwrap_err().to_string();
    assert!(error.contains("Gemm") && error.contains("MatMul"), "{error}");
    assert!(!other.graph.has_origins(), "nothing is taken over");
    assert!(other.graph.initializers.iter().any(|i| i.dtype == DataType::F32));
}
