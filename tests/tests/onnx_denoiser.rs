//! The denoiser's graphs on rten: the two cached halves equal the masked joint pass, lengths are dynamic, and what
//! does not fit is named.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::path::Path;
use std::sync::Arc;

use mindseye_builder::onnx::MemoryWeights;
use mindseye_builder::onnx::denoiser_graph;
use mindseye_engines::backend::{PrepareOptions, Session, Tensor, by_name};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::denoise::{Denoise, DenoiseStep, HostInputs};
use mindseye_engines::model::dit::{DitConfig, Guide};
use mindseye_engines::onnx::{Dim, SaveOptions};
use mindseye_engines::session_denoiser::{CachedDenoiser, DenoiserKind, SessionDenoiser, SplitDenoiser};

/// Everything that a configuration can switch on.
fn config() -> DitConfig {
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
        camera_channels: 7,
        pooled_text: true,
        lift: true,
        guide: Some(Guide::Warp),
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

fn session(kind: DenoiserKind, folder: &Path) -> Box<dyn Session> {
    session_of(&config(), kind, folder)
}

fn session_of(cfg: &DitConfig, kind: DenoiserKind, folder: &Path) -> Box<dyn Session> {
    let mut weights = MemoryWeights::new();
    for (i, p) in count_denoiser(&config(), 2, 0, 2).params().iter().enumerate() {
        let scale = 1.5 / (*p.shape.last().unwrap() as f32).sqrt();
        let values = noise(p.shape.iter().product(), i as u64).iter().map(|v| v * scale).collect();
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    let path = folder.join(format!("{}.onnx", kind.component()));
    let model = denoiser_graph(cfg, Arc::new(weights), kind, Dim::Fixed(1)).unwrap();
    model.save(&path, &SaveOptions::default()).unwrap();
    let options = PrepareOptions::default().with_threads(1);
    by_name("rten").unwrap().prepare(&path, &options).unwrap().session().unwrap()
}

/// The inputs of `frames` latents, `context` of them clean context.
struct Case {
    latents: Vec<f32>,
    text: Vec<f32>,
    camera: Vec<f32>,
    /// Zero for the context.
    guide: Vec<f32>,
    rows: Vec<usize>,
    t_index: Vec<f64>,
    context: usize,
}

impl Case {
    fn new(context: usize, targets: usize) -> Self {
        let cfg = config();
        let frames = context + targets;
        let gap = |f: usize| if f < context { 3 * f } else { 3 * context + 50 + f - context };
        Self {
            latents: noise(frames * cfg.in_channels * 24, 100),
            text: noise(cfg.text_len * cfg.text_dim, 101),
            camera: noise(frames * cfg.tokens_per_frame() * cfg.camera_channels, 102),
            guide: {
                let token = cfg.tokens_per_frame() * cfg.guide_channels();
                [vec![0.0; context * token], noise(targets * token, 103)].concat()
            },
            rows: (0..frames).map(|f| usize::from(f >= context)).collect(),
            t_index: (0..frames).map(|f| gap(f) as f64).collect(),
            context,
        }
    }

    fn step(&self, from: usize, to: usize) -> DenoiseStep<'_> {
        let cfg = config();
        let (frame, rays) = (cfg.in_channels * 24, cfg.tokens_per_frame() * cfg.camera_channels);
        let carried = cfg.tokens_per_frame() * cfg.guide_channels();
        DenoiseStep {
            latents: &self.latents[from * frame..to * frame],
            timesteps: &[0.0, 700.0],
            rows: &self.rows[from..to],
            t_index: &self.t_index[from..to],
            text: &self.text,
            camera: Some(&self.camera[rays * from..rays * to]),
            guide: Some(&self.guide[carried * from..carried * to]),
        }
    }

    fn frames(&self) -> usize {
        self.rows.len()
    }
}

#[track_caller]
fn close(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    assert!(!a.is_empty(), "{what} is empty");
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{what} differs by {worst}");
}

#[test]
fn prefill_and_cached_equal_the_masked_joint_pass() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let case = Case::new(3, 2);
    let (frames, tokens) = (case.frames(), case.frames() * cfg.tokens_per_frame());
    let seen = case.context * cfg.tokens_per_frame();

    // The joint pass in which context does not see targets, run by hand: the bias is an extra input.
    let host = HostInputs::new(&cfg, &case.step(0, frames)).unwrap();
    let bias = (0..tokens * tokens).map(|i| if i / tokens < seen && i % tokens >= seen { -1e9 } else { 0.0 });
    let inputs = [
        ("latents", Tensor::f32(&[1, cfg.in_channels, frames, 4, 6], host.latents)),
        ("time", Tensor::f32(&[2, cfg.freq_dim], host.time)),
        ("rows", Tensor::i64(&[1, frames], host.rows)),
        ("row_batch", Tensor::i64(&[2], vec![0, 0])),
        ("text", Tensor::f32(&[1, cfg.text_len, cfg.text_dim], case.text.clone())),
        ("cos", Tensor::f32(&[tokens, cfg.head_dim / 2], host.cos)),
        ("sin", Tensor::f32(&[tokens, cfg.head_dim / 2], host.sin)),
        ("camera", Tensor::f32(&[1, frames, cfg.tokens_per_frame(), cfg.camera_channels], host.camera)),
        ("guide", Tensor::f32(&[1, frames, cfg.tokens_per_frame(), cfg.guide_channels()], host.guide)),
        ("bias", Tensor::f32(&[1, 1, tokens, tokens], bias.collect())),
    ];
    let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
    let joint = session(DenoiserKind::Masked, dir.path()).run(&given).unwrap();
    let output = |name: &str| joint.iter().find(|(n, _)| n == name).unwrap().1.as_f32().unwrap().to_vec();
    let sample = mindseye_engines::denoise::frames_first(&output("sample"), cfg.out_channels, frames, 24);

    let (prefill, cached) =
        (session(DenoiserKind::Prefill, dir.path()), session(DenoiserKind::Cached, dir.path()));
    let mut denoiser = CachedDenoiser::new(cfg.clone(), prefill, cached).unwrap();
    let targets = case.step(case.context, frames);
    assert!(denoiser.denoise(&targets).unwrap_err().to_string().contains("set_context"));
    denoiser.set_context(&case.step(0, case.context)).unwrap();
    let out = denoiser.denoise(&targets).unwrap();
    close("sample", &out.prediction, &sample[case.context * cfg.out_channels * 24..]);
    close("mask", &out.mask, &output("mask")[seen..]);
    close("pose", &out.pose.concat(), &output("pose")[4 * case.context..]);
    close("locate", &out.locate.concat(), &output("locate")[2 * seen..]);

    // Without the mask the result is another one: the comparison above means something.
    let mut free = SessionDenoiser::new(cfg, session(DenoiserKind::Joint, dir.path())).unwrap();
    let out = free.denoise(&case.step(0, frames)).unwrap();
    let worst = out.prediction.iter().zip(&sample).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst > 1e-3, "masked and unmasked differ by only {worst}");
}

/// The halves behind the interface of the whole: given context and targets together, they say what the masked joint
/// pass says, and compute a context once.
#[test]
fn split_steps_compute_their_context_once() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = config();
    let (mut case, targets) = (Case::new(4, 2), 2);
    let (frames, tokens, given) = (6, 6 * cfg.tokens_per_frame(), 4 * cfg.tokens_per_frame());
    let masked = |case: &Case, session: &mut dyn Session| {
        let host = HostInputs::new(&cfg, &case.step(0, frames)).unwrap();
        let bias = (0..tokens * tokens)
            .map(|i| if i / tokens < given && i % tokens >= given { -1e9 } else { 0.0 })
            .collect();
        let inputs = [
            ("latents", Tensor::f32(&[1, cfg.in_channels, frames, 4, 6], host.latents)),
            ("time", Tensor::f32(&[2, cfg.freq_dim], host.time)),
            ("rows", Tensor::i64(&[1, frames], host.rows)),
            ("row_batch", Tensor::i64(&[2], vec![0, 0])),
            ("text", Tensor::f32(&[1, cfg.text_len, cfg.text_dim], case.text.clone())),
            ("cos", Tensor::f32(&[tokens, cfg.head_dim / 2], host.cos)),
            ("sin", Tensor::f32(&[tokens, cfg.head_dim / 2], host.sin)),
            ("camera", Tensor::f32(&[1, frames, cfg.tokens_per_frame(), 7], host.camera)),
            ("guide", Tensor::f32(&[1, frames, cfg.tokens_per_frame(), cfg.guide_channels()], host.guide)),
            ("bias", Tensor::f32(&[1, 1, tokens, tokens], bias)),
        ];
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (*n, t)).collect();
        session.run(&given).unwrap()
    };
    let mut joint = session(DenoiserKind::Masked, dir.path());
    let halves = CachedDenoiser::new(
        cfg.clone(),
        session(DenoiserKind::Prefill, dir.path()),
        session(DenoiserKind::Cached, dir.path()),
    );
    let mut split = SplitDenoiser::new(halves.unwrap());
    let frame = cfg.in_channels * 24;
    let texts = [noise(cfg.text_len * cfg.text_dim, 7), noise(cfg.text_len * cfg.text_dim, 8)];
    // Two branches in turn, as joint guidance asks, with targets that change from step to step.
    for step in 0..3u64 {
        for text in &texts {
            case.text.clone_from(text);
            case.latents[4 * frame..].copy_from_slice(&noise(targets * frame, 50 + step));
            let wanted = masked(&case, joint.as_mut());
            let output =
                |name: &str| wanted.iter().find(|(n, _)| n == name).unwrap().1.as_f32().unwrap().to_vec();
            let sample = mindseye_engines::denoise::frames_first(&output("sample"), 5, frames, 24);
            let out = split.denoise(&case.step(0, frames)).unwrap();
            assert_eq!(out.prediction.len(), frames * frame);
            assert!(out.prediction[..4 * frame].iter().all(|v| *v == 0.0), "given frames are not predicted");
            close("sample", &out.prediction[4 * frame..], &sample[4 * frame..]);
            close("mask", &out.mask, &output("mask"));
            close("pose", &out.pose.concat(), &output("pose"));
            close("locate", &out.locate.concat(), &output("locate"));
        }
    }
    assert_eq!(split.prefills(), 2, "one per branch");
    case.latents[0] += 0.5;
    split.denoise(&case.step(0, frames)).unwrap();
    assert_eq!(split.prefills(), 3, "another context");
    let error = split.denoise(&case.step(0, 4)).unwrap_err().to_string();
    assert!(error.contains("nothing tells given frames from targets"), "{error}");
}

/// Without a guide, or where it is not trusted, the network predicts as one that knows none: bit for bit.
#[test]
fn a_guide_that_is_not_trusted_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (case, plain) = (Case::new(2, 2), DitConfig { guide: None, ..config() });
    let mut alone =
        SessionDenoiser::new(plain.clone(), session_of(&plain, DenoiserKind::Joint, dir.path())).unwrap();
    let wanted = alone.denoise(&DenoiseStep { guide: None, ..case.step(0, 4) }).unwrap();
    let mut guided = SessionDenoiser::new(config(), session(DenoiserKind::Joint, dir.path())).unwrap();
    let none = guided.denoise(&DenoiseStep { guide: None, ..case.step(0, 4) }).unwrap();
    assert_eq!(none, wanted);
    let with = guided.denoise(&case.step(0, 4)).unwrap();
    assert_ne!(with.prediction, wanted.prediction, "a trusted guide counts");
    let short = DenoiseStep { guide: Some(&case.guide[1..]), ..case.step(0, 4) };
    let error = guided.denoise(&short).unwrap_err().to_string();
    assert!(error.contains("`guide`"), "{error}");
}

#[test]
fn lengths_are_dynamic_and_runs_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let mut denoiser = SessionDenoiser::new(config(), session(DenoiserKind::Joint, dir.path())).unwrap();
    let mut results = Vec::new();
    for (context, targets) in [(1, 1), (4, 3), (1, 1)] {
        let case = Case::new(context, targets);
        let out = denoiser.denoise(&case.step(0, case.frames())).unwrap();
        assert_eq!(out.prediction.len(), case.latents.len());
        assert_eq!((out.pose.len(), out.mask.len()), (case.frames(), case.frames() * 6));
        assert!(out.prediction.iter().all(|v| v.is_finite()));
        results.push(out);
    }
    assert_eq!(results[0], results[2], "same inputs, same bits, whatever ran in between");
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let case = Case::new(1, 1);
    let mut denoiser = SessionDenoiser::new(config(), session(DenoiserKind::Joint, dir.path())).unwrap();
    let mut short = case.step(0, 2);
    short.text = &short.text[1..];
    let error = denoiser.denoise(&short).unwrap_err().to_string();
    assert!(error.contains("`text`") && error.contains("expected 48 values, got 47"), "{error}");

    let mut other = config();
    other.latent_width = 8;
    let error =
        SessionDenoiser::new(other, session(DenoiserKind::Joint, dir.path())).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("\"latents\" has size 6 on axis 4"), "{error}");
    let mut other = config();
    other.layers = 3;
    let (a, b) = (session(DenoiserKind::Prefill, dir.path()), session(DenoiserKind::Cached, dir.path()));
    let error = CachedDenoiser::new(other, a, b).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("memory.2.k"), "{error}");
    let error = SessionDenoiser::new(config(), session(DenoiserKind::Prefill, dir.path())).map(|_| ());
    assert!(error.unwrap_err().to_string().contains("\"sample\""));
}
