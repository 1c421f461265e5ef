//! The denoiser as a graph. Names and shapes of inputs and outputs are those of
//! [`mindseye_engines::session_denoiser`], which runs it.

use std::sync::Arc;

use super::{GraphBuilder, WeightSource};
use mindseye_engines::model::dit::{DitConfig, DitInputs, forward};
use mindseye_engines::onnx::{Dim, Model, OnnxError};
use mindseye_engines::session_denoiser::DenoiserKind;

/// Writes the denoiser down; `batch` is the first size of every input (1 for robots).
///
/// # Errors
/// [`OnnxError::Weight`] for a weight that is missing or has another shape than the configuration asks for.
///
/// # Panics
/// When `cfg` does not pass [`DitConfig::validate`].
pub fn denoiser_graph(
    cfg: &DitConfig,
    weights: Arc<dyn WeightSource>,
    kind: DenoiserKind,
    batch: Dim,
) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new(kind.component(), weights);
    write_denoiser(&mut ops, cfg, kind, batch);
    ops.finish()
}

/// Writes the denoiser down with `o`, inputs and outputs included; see [`denoiser_graph`].
///
/// # Panics
/// When `cfg` does not pass [`DitConfig::validate`].
pub fn write_denoiser(o: &mut GraphBuilder, cfg: &DitConfig, kind: DenoiserKind, batch: Dim) {
    let fixed = Dim::Fixed;
    let (tokens, frames) = (Dim::from("tokens"), Dim::from("frames"));
    let per_frame = fixed(cfg.tokens_per_frame());
    let half = fixed(cfg.head_dim / 2);
    let pixels = [fixed(cfg.latent_height), fixed(cfg.latent_width)];
    let image = |channels: usize| {
        [batch.clone(), fixed(channels), frames.clone(), pixels[0].clone(), pixels[1].clone()]
    };
    let latents = o.input("latents", &image(cfg.in_channels));
    let time = o.input("time", &["timesteps".into(), fixed(cfg.freq_dim)]);
    let rows = o.index_input("rows", &[batch.clone(), frames.clone()]);
    let row_batch = cfg.pooled_text.then(|| o.index_input("row_batch", &["timesteps".into()]));
    let text = o.input("text", &[batch.clone(), fixed(cfg.text_len), fixed(cfg.text_dim)]);
    let cos = o.input("cos", &[tokens.clone(), half.clone()]);
    let sin = o.input("sin", &[tokens.clone(), half]);
    let camera = (cfg.camera_channels > 0).then(|| {
        o.input("camera", &[batch.clone(), frames.clone(), per_frame.clone(), fixed(cfg.camera_channels)])
    });
    let guide = (cfg.guide_channels() > 0).then(|| {
        o.input("guide", &[batch.clone(), frames.clone(), per_frame.clone(), fixed(cfg.guide_channels())])
    });
    let bias = (kind == DenoiserKind::Masked)
        .then(|| o.input("bias", &[fixed(1), fixed(1), tokens.clone(), tokens.clone()]));
    let memory_dims = |tokens: &Dim| [batch.clone(), tokens.clone(), fixed(cfg.heads), fixed(cfg.head_dim)];
    let memory: Option<Vec<_>> = (kind == DenoiserKind::Cached).then(|| {
        let dims = memory_dims(&"context_tokens".into());
        let pair = |i| (o.input(&format!("memory.{i}.k"), &dims), o.input(&format!("memory.{i}.v"), &dims));
        (0..cfg.layers).map(pair).collect()
    });
    let inputs = DitInputs {
        latents: &latents,
        time: &time,
        rows: &rows,
        row_batch: row_batch.as_ref(),
        text: &text,
        cos: &cos,
        sin: &sin,
        camera: camera.as_ref(),
        guide: guide.as_ref(),
        bias: bias.as_ref(),
        memory: memory.as_deref(),
    };
    let out = forward(o, cfg, &inputs);
    if kind == DenoiserKind::Prefill {
        let dims = memory_dims(&tokens);
        for (i, (k, v)) in out.memory.iter().enumerate() {
            o.output(&format!("memory.{i}.k"), k, &dims);
            o.output(&format!("memory.{i}.v"), v, &dims);
        }
    } else {
        o.output("sample", &out.sample, &image(cfg.out_channels));
    }
    if let Some(lift) = &out.lift {
        let lead = [batch.clone(), frames.clone()];
        o.output("pose", &lift.pose, &[&lead[..], &[fixed(4)]].concat());
        o.output("mask", &lift.mask, &[&lead[..], &[per_frame.clone(), fixed(1)]].concat());
        o.output("locate", &lift.locate, &[&lead[..], &[per_frame.clone(), fixed(2)]].concat());
    }
}
