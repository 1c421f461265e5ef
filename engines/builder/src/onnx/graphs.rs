//! The networks around the denoiser as graphs; for the denoiser see [`super::denoiser_graph`].
//!
//! | component | inputs | outputs |
//! |---|---|---|
//! | `text_encoder` | `ids` i64 `[1, length]`, `mask_bias` `[1, 1, 1, length]`, `keep` `[1, length, 1]` | `rows` `[1, length, d_model]` |
//! | `depth` | `picture` `[1, 3, H, W]` | `log_depth` `[1, H, W]` |
//! | `vae_encoder` (linear codec) | `frames` `[groups, 4, 3, H, W]` | `latent` `[groups, C, 1, h, w]` |
//! | `vae_decoder` (linear codec) | `latent` `[groups, C, 1, h, w]` | `frames` `[groups, 4, 3, H, W]` |
//! | `vae_encoder_first` | `frames` `[1, 3, H, W]` | `latent` `[1, z, h, w]`, `new_cache.{i}` |
//! | `vae_encoder_next` | `frames` `[4, 3, H, W]`, `cache.{i}` | `latent`, `new_cache.{i}` |
//! | `vae_decoder_first` | `latent` `[1, z, h, w]` | `frames` `[1, 3, H, W]`, `new_cache.{i}` |
//! | `vae_decoder_next` | `latent`, `cache.{i}` | `frames` `[4, 3, H, W]`, `new_cache.{i}` |

use std::sync::Arc;

use super::{GraphBuilder, WeightSource};
use mindseye_engines::count::{vae_decoder_caches, vae_encoder_caches};
use mindseye_engines::model::codec::{self, GROUP, LinearCodecConfig};
use mindseye_engines::model::depth::{self, DepthConfig};
use mindseye_engines::model::umt5::{self, Umt5Config, Umt5Inputs};
use mindseye_engines::model::vae::{self, Chunk, VaeConfig};
use mindseye_engines::onnx::{Dim, Model, OnnxError};

fn fixed(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&s| Dim::Fixed(s)).collect()
}

/// The text encoder for token rows of a fixed `length`; positions are part of the graph.
///
/// # Errors
/// [`OnnxError::Weight`] for a weight that is missing or has another shape.
pub fn text_encoder_graph(
    cfg: &Umt5Config,
    length: usize,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new("text_encoder", weights);
    let ids = ops.index_input("ids", &fixed(&[1, length]));
    let mask_bias = ops.input("mask_bias", &fixed(&[1, 1, 1, length]));
    let keep = ops.input("keep", &fixed(&[1, length, 1]));
    let table: Vec<i64> = cfg.bucket_table(length).into_iter().map(|b| b as i64).collect();
    let buckets = ops.index_constant(&[length, length], &table);
    let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
    let out = umt5::encode(&mut ops, cfg, &inputs);
    ops.output("rows", &out.rows, &fixed(&[1, length, cfg.d_model]));
    ops.finish()
}

/// Which way a codec goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Frames to latents.
    Encode,
    /// Latents to frames.
    Decode,
}

impl Way {
    /// Name of the component in a bundle.
    #[must_use]
    pub fn component(self) -> &'static str {
        match self {
            Way::Encode => "vae_encoder",
            Way::Decode => "vae_decoder",
        }
    }
}

/// One way of the linear codec.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn codec_graph(
    cfg: &LinearCodecConfig,
    way: Way,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new(way.component(), weights);
    let (h, w) = cfg.latent_size();
    let groups = |rest: &[usize]| [vec![Dim::from("groups")], fixed(rest)].concat();
    let (frames, latent) = (groups(&[GROUP, 3, cfg.height, cfg.width]), groups(&[cfg.channels, 1, h, w]));
    if way == Way::Encode {
        let input = ops.input("frames", &frames);
        let out = codec::encode(&mut ops, cfg, &input);
        ops.output("latent", &out, &latent);
    } else {
        let input = ops.input("latent", &latent);
        let out = codec::decode(&mut ops, cfg, &input);
        ops.output("frames", &out, &frames);
    }
    ops.finish()
}

/// The depth reader, for one picture.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn depth_graph(cfg: &DepthConfig, weights: Arc<dyn WeightSource>) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new("depth", weights);
    let picture = ops.input("picture", &fixed(&[1, 3, cfg.height, cfg.width]));
    let log_depth = depth::log_depth(&mut ops, cfg, &picture);
    ops.output("log_depth", &log_depth, &fixed(&[1, cfg.height, cfg.width]));
    ops.finish()
}

/// Name of one step of a streaming codec in a bundle.
#[must_use]
pub fn step_component(way: Way, chunk: Chunk) -> String {
    let step = if chunk == Chunk::First { "first" } else { "next" };
    format!("{}_{step}", way.component())
}

/// One step of the streaming VAE, for latents of height and width `latent`.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn vae_graph(
    cfg: &VaeConfig,
    latent: [usize; 2],
    way: Way,
    chunk: Chunk,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new(&step_component(way, chunk), weights);
    let count = if chunk == Chunk::First { 1 } else { cfg.temporal_factor() };
    let [height, width] = latent.map(|s| s * cfg.spatial_factor());
    let frames_dims = fixed(&[count, 3, height, width]);
    let latent_dims = fixed(&[1, cfg.z_dim, latent[0], latent[1]]);
    let (input, shapes) = match way {
        Way::Encode => (ops.input("frames", &frames_dims), vae_encoder_caches(cfg, latent)),
        Way::Decode => (ops.input("latent", &latent_dims), vae_decoder_caches(cfg, latent)),
    };
    let mut old = Vec::new();
    if chunk == Chunk::Next {
        let caches = shapes.iter().enumerate();
        old = caches.map(|(i, s)| ops.input(&format!("cache.{i}"), &fixed(s))).collect();
    }
    let new = match way {
        Way::Encode => {
            let out = vae::encode(&mut ops, cfg, latent, chunk, &input, &old);
            ops.output("latent", &out.latent, &latent_dims);
            out.caches
        }
        Way::Decode => {
            let out = vae::decode(&mut ops, cfg, latent, chunk, &input, &old);
            ops.output("frames", &out.frames, &frames_dims);
            out.caches
        }
    };
    for (i, (cache, shape)) in new.iter().zip(&shapes).enumerate() {
        ops.output(&format!("new_cache.{i}"), cache, &fixed(shape));
    }
    ops.finish()
}
