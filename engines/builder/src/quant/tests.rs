//! End to end on a small transformer: calibrate, rewrite, run on the CPU, compare.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::onnx::{MemoryWeights, denoiser_graph};
use mindseye_engines::backend::{Elements, Engine, Port, RtenBackend, Tensor};
use mindseye_engines::count::{count_denoiser, count_text};
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::onnx::{DataType, Dim, Graph, Initializer, Node, ValueInfo};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::{Limits, Precision};

fn config() -> DitConfig {
    DitConfig {
        in_channels: 8,
        out_channels: 8,
        latent_height: 2,
        latent_width: 3,
        heads: 4,
        head_dim: 16,
        layers: 4,
        ffn_dim: 128,
        text_dim: 16,
        text_len: 3,
        freq_dim: 32,
        prediction: Prediction::Velocity,
        pooled_text: true,
        ..DitConfig::SMALLEST
    }
}

/// Random weights; `outliers` makes a few channels of every norm large, as trained transformers have them.
fn model(outliers: bool) -> Model {
    let cfg = config();
    let mut state = 12345u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f32 / (1u64 << 31) as f32) * 2.0 - 1.0
    };
    let mut weights = MemoryWeights::new();
    for p in count_denoiser(&cfg, 4, 0, 2).params() {
        let n: usize = p.shape.iter().product();
        let fan_in: usize = p.shape[1..].iter().product::<usize>().max(1);
        let scale = match p.name.as_str() {
            name if name.contains("norm") && name.ends_with("weight") => 0.1,
            name if name.ends_with("bias") => 0.02,
            _ => (3.0 / fan_in as f32).sqrt(),
        };
        let mut values: Vec<f32> = (0..n).map(|_| uniform() * scale).collect();
        if p.name.contains("norm") && p.name.ends_with("weight") {
            values.iter_mut().for_each(|v| *v += 1.0);
            if outliers && p.name.contains("norm2") {
                values.iter_mut().step_by(17).for_each(|v| *v *= 30.0);
            }
        }
        if outliers && p.name.contains("scale_shift_table") && p.shape.len() == 3 {
            // Scale rows of the two modulated norms: a few channels fifty times the rest.
            values.iter_mut().skip(64).step_by(19).for_each(|v| *v *= 50.0);
        }
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    denoiser_graph(&cfg, Arc::new(weights), DenoiserKind::Joint, Dim::Fixed(1)).unwrap()
}

fn runner() -> Runner {
    Runner::new(Arc::new(RtenBackend))
}

fn source(items: u64) -> SyntheticDenoiser {
    SyntheticDenoiser::new(config(), 3, 2, 50.0, items, 7)
}

fn held_out() -> SyntheticDenoiser {
    SyntheticDenoiser::new(config(), 3, 2, 50.0, 4, 8)
}

/// Compared on the inputs of the calibration: this is about the arithmetic, not about how well four inputs of noise stand for
/// others.
fn run(config: &QuantConfig, model: &Model) -> (Quantised, Report) {
    let q = quantise(model, config, &runner(), &mut source(4), &mut |_| true).unwrap();
    let report = verify(model, &q.emulated, &runner(), &mut source(4), 4, &mut |_| true).unwrap();
    (q, report)
}

#[test]
fn every_precision_stays_close_and_writes_sound_scales() {
    let fp32 = model(false);
    let all = layers(&fp32).len();
    for (precision, limit) in [(Precision::Int8, 0.03), (Precision::Fp8, 0.08), (Precision::Int4w, 0.2)] {
        let mut c = QuantConfig::new(precision);
        c.attention_head_dim = Some(16);
        let (q, report) = run(&c, &fp32);
        println!("{precision}: {report:?}");
        let error = report.outputs["sample"];
        assert!(error > 1e-5 && error < limit, "{precision}: {error}");
        assert_eq!(report.blocks.len(), 4);
        assert_eq!(q.layers.len() + q.kept.len(), all);
        assert_eq!(q.layers.len(), all / 2, "two of four blocks are kept");
        assert!(q.scales.iter().all(|s| s.min > 0.0 && s.max.is_finite()), "{:?}", q.scales);
        assert_eq!(q.attention_products, if precision == Precision::Fp8 { 8 } else { 0 });
        let count = |op: &str| q.deploy.graph.nodes.iter().filter(|n| n.op_type == op).count();
        assert!(count("DequantizeLinear") >= q.layers.len());
        assert_eq!(count("QuantizeLinear") == 0, precision == Precision::Int4w);
        let packed = match precision {
            Precision::Int8 => DataType::I8,
            Precision::Fp8 => DataType::F8E4M3,
            _ => DataType::I4,
        };
        assert!(q.deploy.graph.initializers.iter().any(|i| i.dtype == packed && i.shape.len() == 2));
        let again = quantise(&fp32, &c, &runner(), &mut source(4), &mut |_| true).unwrap();
        assert_eq!(again.scales_sha256, q.scales_sha256);
        assert_eq!(again.calibration_sha256, q.calibration_sha256);
        // The deployed graph converts to both 16-bit formats.
        for float in [Precision::Fp16, Precision::Bf16] {
            let low = to_float16(&q.deploy, float).unwrap();
            assert!(low.graph.nodes.iter().any(|n| n.op_type == "Cast"));
            low.to_bytes().unwrap();
        }
    }
}

#[test]
fn smoothquant_lowers_the_error_where_channels_differ() {
    let fp32 = model(true);
    let mut with = QuantConfig::new(Precision::Int8);
    with.smooth_alpha = Some(0.8);
    let mut without = with.clone();
    without.smooth_alpha = None;
    let (smooth, plain) = (run(&with, &fp32).1, run(&without, &fp32).1);
    println!("with {smooth:?}, without {plain:?}");
    assert!(smooth.outputs["sample"] < plain.outputs["sample"]);
}

#[test]
fn calibrators_run_on_the_smoothed_graph() {
    let fp32 = model(true);
    for calibrator in [Calibrator::Percentile(99.99), Calibrator::Entropy] {
        let mut c = QuantConfig::new(Precision::Int8);
        c.calibrator = calibrator;
        let error = run(&c, &fp32).1.outputs["sample"];
        assert!(error < 0.3, "{calibrator:?} {error}");
    }
}

#[test]
fn limits_are_met_by_keeping_the_worst_layers() {
    let fp32 = model(false);
    let mut c = QuantConfig::new(Precision::Int4w);
    c.block = 64;
    let (_, report) = run(&c, &fp32);
    let error = report.outputs["sample"];
    let limits = Limits {
        output_relative_l2: error * 0.9,
        block_relative_l2: 1.0,
        int4w_factor: 1.0,
        fp8_factor: 1.0,
    };
    assert_eq!(report.past(&limits).unwrap().0, "sample");
    let mut seen = Vec::new();
    let search = |limits: &Limits, tell: &mut Tell<'_>| {
        let mut checks = Checks {
            runner: &runner(),
            calibration: &mut source(2),
            held_out: &mut held_out(),
            samples: 4,
            tell,
        };
        auto_exclude(&fp32, &c, limits, &mut checks)
    };
    let mut note = |work| {
        seen.push(work);
        true
    };
    let (q, report, used) = search(&limits, &mut note).unwrap();
    let layers = q.layers.len() as u64 + used.keep.len() as u64;
    assert!(seen.contains(&Work::Layers { done: layers, of: layers }), "{seen:?}");
    assert!(report.past(&limits).is_none());
    assert!(!used.keep.is_empty() && used.keep.iter().all(|k| q.kept.contains(k)), "{:?}", used.keep);
    let impossible =
        Limits { output_relative_l2: 1e-9, block_relative_l2: 1.0, int4w_factor: 1.0, fp8_factor: 1.0 };
    let text = search(&impossible, &mut |_| true).unwrap_err().to_string();
    assert!(text.contains("sample") && text.contains("blocks."), "{text}");
}

/// Where the compared inputs leave the calibrated ranges, the refusal says of which layer, by how much, and what to do.
#[test]
fn inputs_past_the_calibrated_ranges_are_named_in_the_refusal() {
    let fp32 = model(false);
    let c = QuantConfig::new(Precision::Int8);
    let quiet = |scale: f32| {
        let item = source(1).next().unwrap().unwrap().into_iter().map(|(name, mut tensor)| {
            if let Elements::F32(values) = &mut tensor.data
                && ["latents", "text"].contains(&name.as_str())
            {
                values.iter_mut().for_each(|v| *v *= scale);
            }
            (name, tensor)
        });
        InMemory::new("one item", vec![item.collect()])
    };
    let refusal = |held_out: f32| {
        let mut checks = Checks {
            runner: &runner(),
            calibration: &mut quiet(1.0),
            held_out: &mut quiet(held_out),
            samples: 1,
            tell: &mut |_| true,
        };
        let q = quantise(&fp32, &c, &runner(), checks.calibration, &mut |_| true).unwrap();
        let past = ("sample".to_owned(), 0.5, 0.05);
        past_limit(&fp32, &c, &q.ranges, past, &[("blocks.1.a".to_owned(), 0.4)], &mut checks)
            .unwrap()
            .to_string()
    };
    let text = refusal(4.0);
    assert!(text.contains("worst layers: blocks.1.a (0.4000); other inputs reach "), "{text}");
    assert!(
        text.contains(" times the range that blocks.") && text.ends_with("calibrate with more items"),
        "{text}"
    );
    assert!(refusal(1.0).ends_with("worst layers: blocks.1.a (0.4000)"), "{}", refusal(1.0));
}

#[test]
fn bad_calibration_is_refused() {
    let fp32 = model(false);
    let c = QuantConfig::new(Precision::Int8);
    let mut empty = InMemory::new("nothing", vec![]);
    let text = |source: &mut dyn CalibrationSource| {
        quantise(&fp32, &c, &runner(), source, &mut |_| true).unwrap_err().to_string()
    };
    assert!(text(&mut empty).contains("no inputs"));
    let mut item = source(1).next().unwrap().unwrap();
    if let mindseye_engines::backend::Elements::F32(v) = &mut item[0].1.data {
        v[3] = f32::NAN;
    }
    let message = text(&mut InMemory::new("nan", vec![item]));
    assert!(message.contains("latents") && message.contains("NaN"), "{message}");
    let mut second = |work| !matches!(work, Work::Calibrate { done: 2.., .. });
    let stopped = quantise(&fp32, &c, &runner(), &mut source(3), &mut second).unwrap_err();
    assert!(matches!(stopped, QuantError::Cancelled));
    let mut early = |work| !matches!(work, Work::Layers { .. });
    let mut checks = Checks {
        runner: &runner(),
        calibration: &mut source(1),
        held_out: &mut held_out(),
        samples: 1,
        tell: &mut early,
    };
    let middle: Vec<String> = layers(&fp32).into_iter().filter(|l| l.starts_with("blocks.1.")).collect();
    let observed = observe_for(&fp32, &c, &mut checks).unwrap();
    let stopped = sensitivities(&fp32, &c, observed.as_ref(), &middle, &mut checks).unwrap_err();
    assert!(matches!(stopped, QuantError::Cancelled));
}

#[test]
fn the_task_is_compared_scene_by_scene() {
    let figures = |answers: &[(bool, &str, Option<[f64; 3]>)]| TaskFigures {
        success: 0.0,
        consistency: 0.5,
        scenes: answers.len() as u64,
        answers: answers
            .iter()
            .map(|&(succeeded, status, pose)| TaskAnswer { succeeded, status: status.into(), pose })
            .collect(),
    };
    let fp32 = figures(&[
        (true, "found", Some([0.0, 0.0, 3.1])),
        (false, "found", Some([1.0, 1.0, 0.0])),
        (true, "found", Some([1.0, 2.0, 0.0])),
        (false, "inconsistent", None),
    ]);
    let low = figures(&[
        (true, "found", Some([0.3, 0.4, -3.1])),
        (true, "found", Some([1.0, 1.1, 0.1])),
        (false, "not_in_context", None),
        (false, "inconsistent", None),
    ]);
    let change = TaskChange::new(fp32, low);
    assert_eq!((change.success_changed, change.status_changed), (2, 1));
    assert!((change.pose_shift_m.unwrap() - 0.5).abs() < 1e-12, "of 0.1 and 0.5 the upper");
    let turn = (std::f64::consts::TAU - 6.2).to_degrees();
    assert!((change.pose_shift_deg.unwrap() - 0.1f64.to_degrees().max(turn)).abs() < 1e-9);
    let empty = TaskChange::new(figures(&[]), figures(&[]));
    assert_eq!((empty.success_changed, empty.pose_shift_m), (0, None));
}

/// The emulation as a graph gives the codec's values, bit by bit, on every code, every tie and its neighbours, and on
/// every 16-bit float.
#[test]
fn e4m3_in_a_graph_is_bit_exact() {
    let mut values: Vec<f32> = vec![0.0, 1e-9, -1e-9, 500.0, -500.0, 1e9];
    for code in 0..=255u8 {
        let v = e4m3::to_f32(code);
        if v.is_nan() {
            continue;
        }
        values.push(v);
        let next = e4m3::to_f32((code & 0x80) | ((code & 0x7f) + 1).min(0x7e));
        let mid = (v + next) / 2.0;
        values.extend([mid, mid.next_up(), mid.next_down()]);
    }
    values.extend((0..=u16::MAX).map(|b| half::f16::from_bits(b).to_f32()).filter(|v| v.is_finite()));
    let info = |name: &str| ValueInfo {
        name: name.into(),
        dtype: Some(DataType::F32),
        shape: Some(vec![Dim::from("n")]),
    };
    let graph = Graph {
        name: "e4m3".into(),
        nodes: rewrite::e4m3_nodes("x", "y", "t"),
        initializers: rewrite::e4m3_constants(),
        inputs: vec![info("x")],
        outputs: vec![info("y")],
        value_infos: vec![],
    };
    let mut session = session(&Model::new(graph), &RtenBackend).unwrap();
    let x = mindseye_engines::backend::Tensor::f32(&[values.len()], values.clone());
    let y = session.run(&[("x", &x)]).unwrap().remove(0).1.into_f32().unwrap();
    for (x, y) in values.iter().zip(y) {
        assert_eq!(e4m3::round(*x).to_bits() & 0x7fff_ffff, y.to_bits() & 0x7fff_ffff, "{x} gave {y}");
        assert!(y == 0.0 || y.is_sign_negative() == x.is_sign_negative());
    }
}

/// One linear layer by hand: packed weights and scales as worked out on paper.
#[test]
fn packed_weights_of_one_layer() {
    let w: Vec<f32> = (0..64 * 2).map(|i| if i % 2 == 0 { (i / 2) as f32 - 32.0 } else { 0.0 }).collect();
    let info = |name: &str, n: usize| ValueInfo {
        name: name.into(),
        dtype: Some(DataType::F32),
        shape: Some(vec![Dim::from("rows"), Dim::Fixed(n)]),
    };
    let graph = Graph {
        name: "one".into(),
        nodes: vec![Node::new("m", "MatMul", &["x", "blocks.0.a.weight.T"], &["y"])],
        initializers: vec![Initializer::from_f32("blocks.0.a.weight.T", &[64, 2], &w)],
        inputs: vec![info("x", 64)],
        outputs: vec![info("y", 2)],
        value_infos: vec![],
    };
    let model = Model::new(graph);
    let x: Vec<f32> = (0..64).map(|i| i as f32 / 63.0).collect();
    let mut source =
        InMemory::new("one", vec![vec![("x".into(), mindseye_engines::backend::Tensor::f32(&[1, 64], x))]]);
    let mut by_precision = BTreeMap::new();
    for precision in [Precision::Int8, Precision::Int4w, Precision::Fp8] {
        let mut c = QuantConfig::new(precision);
        (c.keep_first_blocks, c.keep_last_blocks, c.smooth_alpha, c.block) = (0, 0, None, 64);
        let q = quantise(&model, &c, &runner(), &mut source, &mut |_| true).unwrap();
        let find = |end: &str| {
            let i = q.deploy.graph.initializers.iter().find(|i| i.name.ends_with(end)).unwrap();
            i.bytes().unwrap().into_owned()
        };
        by_precision.insert(precision, (find(".T/packed"), find(".T/scale")));
    }
    let f32s = |b: &[u8]| b.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect::<Vec<_>>();
    let (codes, scales) = &by_precision[&Precision::Int8];
    // Column 0 runs from -32 to 31: scale 32/127 rounded up to a half; column 1 is dead: scale 1, codes 0.
    let scale = half::f16::from_bits(half::f16::from_f32(32.0 / 127.0).to_bits());
    let scale = if scale.to_f32() < 32.0 / 127.0 { half::f16::from_bits(scale.to_bits() + 1) } else { scale };
    assert_eq!(f32s(scales), [scale.to_f32(), 1.0]);
    assert_eq!(codes[0].cast_signed(), -127);
    assert_eq!(codes[2 * 32], 0);
    assert!(codes.iter().skip(1).step_by(2).all(|&c| c == 0));
    // INT4: two codes per byte, low half first: column 0 in the low halves, dead column 1 in the high ones.
    let (codes, scales) = &by_precision[&Precision::Int4w];
    assert_eq!((codes.len(), f32s(scales).len()), (64, 2));
    assert!(codes.iter().all(|b| b >> 4 == 0));
    assert_eq!(codes[0] & 0xf, (-7i8).cast_unsigned() & 0xf);
    assert_eq!(codes[63] & 0xf, 7);
    let (codes, scales) = &by_precision[&Precision::Fp8];
    assert_eq!(f32s(scales).len(), 1);
    assert_eq!(e4m3::to_f32(codes[2 * 32]), 0.0);
    assert!((e4m3::to_f32(codes[0]) + 448.0).abs() <= 32.0);
}

fn graph(kind: DenoiserKind) -> Model {
    let cfg = config();
    let mut weights = MemoryWeights::new();
    for (i, p) in count_denoiser(&cfg, 4, 0, 2).params().iter().enumerate() {
        let fan_in: usize = p.shape[1..].iter().product::<usize>().max(1);
        let scale = 1.0 / (fan_in as f32).sqrt();
        let n: usize = p.shape.iter().product();
        let values = (0..n).map(|j| ((i * 37 + j * 11) as f32).sin() * scale);
        weights.insert(p.name.clone(), p.shape.clone(), values.collect());
    }
    denoiser_graph(&cfg, Arc::new(weights), kind, Dim::Fixed(1)).unwrap()
}

/// The cached halves are quantised with what was measured of the joint graph, and stay as close to fp32.
#[test]
fn halves_take_the_ranges_of_the_joint_graph() {
    let joint = graph(DenoiserKind::Joint);
    for (precision, limit) in [(Precision::Int8, 0.05), (Precision::Fp8, 0.15), (Precision::Int4w, 0.3)] {
        let mut c = QuantConfig::new(precision);
        c.attention_head_dim = Some(16);
        let whole = quantise(&joint, &c, &runner(), &mut source(4), &mut |_| true).unwrap();
        let tokens = config().tokens_per_frame();
        for kind in [DenoiserKind::Prefill, DenoiserKind::Cached] {
            let fp32 = graph(kind);
            let half = quantise_half(&fp32, &c, &whole.ranges, &mut |_| true).unwrap();
            let count = |m: &Model, op: &str| m.graph.nodes.iter().filter(|n| n.op_type == op).count();
            assert!(count(&half.deploy, "DequantizeLinear") > 0, "{precision} {kind:?}");
            if precision != Precision::Int4w {
                assert!(count(&half.deploy, "QuantizeLinear") > 0, "{precision} {kind:?}");
            }
            // The same layers with the same scales.
            let scale = |q: &Quantised, name: &str| {
                q.deploy.graph.initializer(name).unwrap_or_else(|| panic!("{name}")).to_f32().unwrap()
            };
            for layer in &half.layers {
                assert!(whole.layers.contains(layer), "{layer}");
                let name = format!("{layer}.weight.T/scale");
                assert_eq!(scale(&half, &name), scale(&whole, &name), "{precision} {kind:?} {layer}");
            }
            assert_eq!(half.calibration_sha256, whole.calibration_sha256);
            let mut inner = source(4);
            let mut inputs: Box<dyn CalibrationSource> = if kind == DenoiserKind::Prefill {
                Box::new(HalfInputs::context(&mut inner, tokens))
            } else {
                let prefill = session(&graph(DenoiserKind::Prefill), &RtenBackend).unwrap();
                Box::new(HalfInputs::targets(&mut inner, tokens, prefill))
            };
            let report = verify(&fp32, &half.emulated, &runner(), inputs.as_mut(), 2, &mut |_| true).unwrap();
            for (name, error) in &report.outputs {
                assert!(*error < limit, "{precision} {kind:?} {name}: {error}");
            }
            assert!(report.outputs.values().any(|e| *e > 1e-5), "{precision} {kind:?}: nothing is rounded");
        }
    }
}

#[test]
fn a_layer_to_keep_that_does_not_exist_is_named() {
    let mut c = QuantConfig::new(Precision::Int8);
    c.keep = vec!["attn2.to_k".into(), "atn1.to_q".into()];
    let error =
        quantise(&graph(DenoiserKind::Joint), &c, &runner(), &mut source(1), &mut |_| true).unwrap_err();
    assert!(matches!(&error, QuantError::NoSuchLayer { name, .. } if name == "atn1.to_q"), "{error}");
    assert!(error.to_string().contains("blocks.0.attn1.to_q"), "{error}");
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let good = graph(DenoiserKind::Joint);
    check_weights(&good, &mut |_| true).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut broken = good.clone();
        let at = broken.graph.initializers.iter().position(|i| i.name == "proj_out.weight.T").unwrap();
        let tensor = &mut broken.graph.initializers[at];
        let mut values = tensor.to_f32().unwrap();
        *values.last_mut().unwrap() = bad;
        *tensor = Initializer::from_f32(tensor.name.clone(), &tensor.shape.clone(), &values);
        let error = check_weights(&broken, &mut |_| true).unwrap_err();
        assert!(matches!(&error, QuantError::WeightNotFinite { weight } if weight == "proj_out.weight.T"));
        let error = to_float16(&broken, Precision::Fp16).unwrap_err();
        assert!(error.to_string().contains("proj_out.weight.T"), "{error}");
    }
}

/// A text encoder whose feed-forward sums pass the largest half, as those of T5 do.
#[test]
fn values_too_large_for_halves_stay_in_fp32() {
    use crate::onnx::text_encoder_graph;
    use mindseye_engines::model::umt5::Umt5Config;
    let cfg = Umt5Config {
        vocab_size: 32,
        d_model: 16,
        d_kv: 8,
        d_ff: 24,
        num_layers: 2,
        num_heads: 2,
        buckets: 8,
        max_distance: 16,
        eps: 1e-6,
    };
    let mut rng = mindseye_base::random::Rng::new(5);
    let mut weights = MemoryWeights::new();
    for p in count_text(&cfg, 4).params().to_vec() {
        let factor = match p.name.as_str() {
            name if name.contains("DenseReluDense.wo") => 2e4,
            name if name.contains("DenseReluDense.wi") => 4.0,
            _ => 1.0,
        };
        let n: usize = p.shape.iter().product();
        let values = match p.shape.as_slice() {
            [_] => vec![1.0; n],
            [.., fan_in] => {
                let scale = factor / (*fan_in as f64).sqrt();
                (0..n).map(|_| (scale * rng.normal()) as f32).collect()
            }
            [] => Vec::new(),
        };
        weights.insert(p.name, p.shape, values);
    }
    let fp32 = text_encoder_graph(&cfg, 6, Arc::new(weights)).unwrap();
    let inputs = || PartInputs::new(&fp32, &BTreeMap::new(), 3, 1);
    let compare = |low: &Model| verify(&fp32, low, &runner(), &mut inputs(), 3, &mut |_| true);
    for float in [Precision::Fp16, Precision::Bf16] {
        let high = kept_high(&fp32, float, &runner(), &mut inputs(), 3, &mut |_| true).unwrap();
        let low = Float16::new(&fp32, float, &high).unwrap();
        let report = compare(&low.emulated().unwrap()).unwrap();
        let error = report.outputs["rows"];
        assert!(error > 1e-6 && error < 0.05, "{float}: {error}");
    }
    // The same network under names that no rule knows: without a measurement it overflows, and that is said.
    let mut renamed = fp32.clone();
    let rename = |name: &mut String| *name = name.replace("DenseReluDense.wo", "mlp.down");
    renamed.graph.initializers.iter_mut().for_each(|i| rename(&mut i.name));
    for node in &mut renamed.graph.nodes {
        node.inputs.iter_mut().for_each(rename);
        node.outputs.iter_mut().for_each(rename);
    }
    let blind = Float16::new(&renamed, Precision::Fp16, &Default::default()).unwrap();
    let error = compare(&blind.emulated().unwrap()).unwrap_err();
    assert!(matches!(&error, QuantError::OutputNotFinite { output } if output == "rows"), "{error}");
    let high = kept_high(&renamed, Precision::Fp16, &runner(), &mut inputs(), 3, &mut |_| true).unwrap();
    assert!(!high.is_empty());
    let low = Float16::new(&renamed, Precision::Fp16, &high).unwrap();
    let error = compare(&low.emulated().unwrap()).unwrap().outputs["rows"];
    assert!(error > 1e-6 && error < 0.05, "{error}");
}

/// The CPU backend, counting runs and taking at least so long for each.
#[derive(Clone, Default)]
struct Counted {
    runs: Arc<AtomicUsize>,
    at_least: Duration,
}

struct CountedEngine(Counted, Arc<dyn Engine>);

struct CountedSession(Counted, Box<dyn Session>);

impl Backend for Counted {
    fn name(&self) -> &'static str {
        RtenBackend.name()
    }
    fn version(&self) -> String {
        RtenBackend.version()
    }
    fn prepare(&self, path: &Path, options: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError> {
        Ok(Arc::new(CountedEngine(self.clone(), RtenBackend.prepare(path, options)?)))
    }
}

impl Engine for CountedEngine {
    fn inputs(&self) -> &[Port] {
        self.1.inputs()
    }
    fn outputs(&self) -> &[Port] {
        self.1.outputs()
    }
    fn session(&self) -> Result<Box<dyn Session>, BackendError> {
        Ok(Box::new(CountedSession(self.0.clone(), self.1.session()?)))
    }
}

impl Session for CountedSession {
    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError> {
        self.0.runs.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.0.at_least);
        self.1.run_into(inputs, outputs)
    }
    fn engine(&self) -> &dyn Engine {
        self.1.engine()
    }
}

fn in_pieces(backend: impl Backend + 'static) -> Runner {
    let mut runner = Runner::new(Arc::new(backend));
    runner.whole_bytes = 0;
    runner
}

/// Block by block, with what lies between the blocks on disk, everything is as in one run of the whole graph.
#[test]
fn pieces_give_the_ranges_and_errors_of_the_whole() {
    let fp32 = model(true);
    for (precision, calibrator) in [
        (Precision::Int8, Calibrator::Max),
        (Precision::Int8, Calibrator::Entropy),
        (Precision::Fp8, Calibrator::Max),
    ] {
        let mut c = QuantConfig::new(precision);
        (c.calibrator, c.attention_head_dim) = (calibrator, Some(16));
        let (whole, report) = run(&c, &fp32);
        let cut = Counted::default();
        let cut_runner = in_pieces(cut.clone());
        let q = quantise(&fp32, &c, &cut_runner, &mut source(4), &mut |_| true).unwrap();
        // Four blocks and what comes before them; the smoothed graph is not run past the last block that is quantised.
        let pieces = if calibrator == Calibrator::Max { 5 } else { 5 + 4 };
        assert_eq!(cut.runs.load(Ordering::SeqCst), 4 * pieces, "{precision}");
        assert_eq!(q.calibration_sha256, whole.calibration_sha256);
        for (a, b) in q.scales.iter().zip(&whole.scales) {
            let close = |x: f32, y: f32| (x - y).abs() <= 1e-6 * y.abs();
            assert!(a.name == b.name && close(a.min, b.min) && close(a.max, b.max), "{a:?} {b:?}");
        }
        assert_eq!(q.scales_sha256, whole.scales_sha256, "{precision} {calibrator:?}");
        let compared = verify(&fp32, &q.emulated, &cut_runner, &mut source(4), 4, &mut |_| true).unwrap();
        for (name, error) in report.outputs.iter().chain(&report.blocks) {
            let got = compared.outputs.get(name).or_else(|| compared.blocks.get(name)).unwrap();
            assert!((got - error).abs() <= 1e-6 * error, "{name}: {got} {error}");
        }
    }
    let values = |runner: &Runner| {
        kept_high(&fp32, Precision::Fp16, runner, &mut source(2), 2, &mut |_| true).unwrap()
    };
    assert_eq!(values(&in_pieces(RtenBackend)), values(&runner()));
}

#[test]
fn a_stopped_calibration_goes_on_and_a_finished_one_is_kept() {
    let fp32 = model(false);
    let c = QuantConfig::new(Precision::Int8);
    let folder = tempfile::tempdir().unwrap();
    let counted = Counted::default();
    let runs = || counted.runs.swap(0, Ordering::SeqCst);
    let kept = || in_pieces(counted.clone()).keeping(Some(folder.path().to_owned())).of_graph("one");
    let quantised = |runner: &Runner, items: u64, tell: &mut Tell<'_>| {
        quantise(&fp32, &c, runner, &mut source(items), tell)
    };
    // Stopped in the fourth of five pieces.
    let mut stop = |work| !matches!(work, Work::Calibrate { done: 14.., .. });
    assert!(matches!(quantised(&kept(), 4, &mut stop), Err(QuantError::Cancelled)));
    let first = runs();
    assert_eq!(first, 14);
    let waiting = || {
        let work = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path().join("work");
        std::fs::read_dir(work).unwrap().count()
    };
    assert!(waiting() >= 4, "what the fourth piece reads");
    let went_on = quantised(&kept(), 4, &mut |_| true).unwrap();
    assert_eq!(runs(), 8, "two pieces");
    assert_eq!(waiting(), 0);
    let plain = quantised(&runner(), 4, &mut |_| true).unwrap();
    assert_eq!(went_on.scales_sha256, plain.scales_sha256);
    let again = quantised(&kept(), 4, &mut |_| true).unwrap();
    assert_eq!((runs(), again.scales_sha256), (0, plain.scales_sha256), "kept");
    // Other data, another graph, and values that are missing are measured anew.
    quantised(&kept(), 3, &mut |_| true).unwrap();
    assert_eq!(runs(), 15);
    quantised(&kept().of_graph("two"), 4, &mut |_| true).unwrap();
    assert_eq!(runs(), 20);
    let mut stop = |work| !matches!(work, Work::Calibrate { done: 8.., .. });
    quantised(&kept().of_graph("three"), 4, &mut stop).unwrap_err();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        for file in std::fs::read_dir(entry.unwrap().path().join("work")).unwrap() {
            std::fs::remove_file(file.unwrap().path()).unwrap();
        }
    }
    runs();
    quantised(&kept().of_graph("three"), 4, &mut |_| true).unwrap();
    assert_eq!(runs(), 20);
    // A damaged file is no measurement.
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        std::fs::write(entry.unwrap().path().join("measured"), b"\x01\0\0\0\0\0\0\0damaged").unwrap();
    }
    let again = quantised(&kept(), 4, &mut |_| true).unwrap();
    assert_eq!((runs(), again.scales_sha256), (20, went_on.scales_sha256));
}

#[test]
fn a_stop_is_seen_while_a_graph_runs() {
    let fp32 = model(false);
    let slow = Counted { at_least: Duration::from_secs(20), ..Counted::default() };
    let runs = Arc::clone(&slow.runs);
    let started = Instant::now();
    let mut asked = None;
    let mut tell = |_| {
        if runs.load(Ordering::SeqCst) > 0 {
            asked.get_or_insert_with(Instant::now);
        }
        asked.is_none()
    };
    let c = QuantConfig::new(Precision::Int8);
    let stopped = quantise(&fp32, &c, &in_pieces(slow), &mut source(1), &mut tell);
    assert!(matches!(stopped, Err(QuantError::Cancelled)));
    assert!(asked.unwrap().elapsed() < Duration::from_secs(1) && started.elapsed() < Duration::from_secs(10));
}
