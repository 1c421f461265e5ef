//! The networks around the denoiser as graphs; for the denoiser see [`super::denoiser_graph`].
//!
//! | component | inputs | outputs |
//! |---|---|---|
//! | `text_encoder` | `ids` i64 `[1, length]`, `mask_bias` `[1, 1, 1, length]`, `keep` `[1, length, 1]` | `rows` `[1, length, d_model]` |
//! | `vae_encoder` (linear codec) | `frames` `[groups, 4, 3, H, W]` | `latent` `[groups, C, 1, h, w]` |
//! | `vae_decoder` (linear codec) | `latent` `[groups, C, 1, h, w]` | `frames` `[groups, 4, 3, H, W]` |
//! | `depth` | `picture` `[1, 3, H, W]` | `log_depth` `[1, H, W]` |
//! | `vae_encoder_first` | `frames` `[1, 3, H, W]` | `latent` `[1, z, h, w]`, `new_cache.{i}` |
//! | `vae_encoder_next` | `frames` `[4, 3, H, W]`, `cache.{i}` | `latent`, `new_cache.{i}` |
//! | `vae_decoder_first` | `latent` `[1, z, h, w]` | `frames` `[1, 3, H, W]`, `new_cache.{i}` |
//! | `vae_decoder_next` | `latent`, `cache.{i}` | `frames` `[4, 3, H, W]`, `new_cache.{i}` |

use std::sync::Arc;

use super::{GraphBuilder, NodeValue, WeightSource};
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

/// The linear codec's encoder.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn codec_encoder_graph(
    cfg: &LinearCodecConfig,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new("vae_encoder", weights);
    let (frames_dims, latent_dims) = codec_dims(cfg);
    let frames = ops.input("frames", &frames_dims);
    let latent = codec::encode(&mut ops, cfg, &frames);
    ops.output("latent", &latent, &latent_dims);
    ops.finish()
}

/// The linear codec's decoder.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn codec_decoder_graph(
    cfg: &LinearCodecConfig,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let mut ops = GraphBuilder::new("vae_decoder", weights);
    let (frames_dims, latent_dims) = codec_dims(cfg);
    let latent = ops.input("latent", &latent_dims);
    let frames = codec::decode(&mut ops, cfg, &latent);
    ops.output("frames", &frames, &frames_dims);
    ops.finish()
}

fn codec_dims(cfg: &LinearCodecConfig) -> (Vec<Dim>, Vec<Dim>) {
    let (h, w) = cfg.latent_size();
    let groups = |rest: &[usize]| [vec![Dim::from("groups")], fixed(rest)].concat();
    (groups(&[GROUP, 3, cfg.height, cfg.width]), groups(&[cfg.channels, 1, h, w]))
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

fn caches(ops: &mut GraphBuilder, chunk: Chunk, shapes: &[[usize; 4]]) -> Vec<NodeValue> {
    if chunk == Chunk::First {
        return Vec::new();
    }
    shapes.iter().enumerate().map(|(i, s)| ops.input(&format!("cache.{i}"), &fixed(s))).collect()
}

fn put_caches(ops: &mut GraphBuilder, new: &[NodeValue], shapes: &[[usize; 4]]) {
    for (i, (cache, shape)) in new.iter().zip(shapes).enumerate() {
        ops.output(&format!("new_cache.{i}"), cache, &fixed(shape));
    }
}

/// One step of the streaming VAE encoder, for latents of height and width `latent`.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn vae_encoder_graph(
    cfg: &VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let (name, count) = match chunk {
        Chunk::First => ("vae_encoder_first", 1),
        Chunk::Next => ("vae_encoder_next", cfg.temporal_factor()),
    };
    let mut ops = GraphBuilder::new(name, weights);
    let [height, width] = latent.map(|s| s * cfg.spatial_factor());
    let frames = ops.input("frames", &fixed(&[count, 3, height, width]));
    let shapes = cfg.encoder_caches(latent);
    let old = caches(&mut ops, chunk, &shapes);
    let out = vae::encode(&mut ops, cfg, latent, chunk, &frames, &old);
    ops.output("latent", &out.latent, &fixed(&[1, cfg.z_dim, latent[0], latent[1]]));
    put_caches(&mut ops, &out.caches, &shapes);
    ops.finish()
}

/// One step of the streaming VAE decoder, for latents of height and width `latent`.
///
/// # Errors
/// As [`text_encoder_graph`].
pub fn vae_decoder_graph(
    cfg: &VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    weights: Arc<dyn WeightSource>,
) -> Result<Model, OnnxError> {
    let (name, count) = match chunk {
        Chunk::First => ("vae_decoder_first", 1),
        Chunk::Next => ("vae_decoder_next", cfg.temporal_factor()),
    };
    let mut ops = GraphBuilder::new(name, weights);
    let [height, width] = latent.map(|s| s * cfg.spatial_factor());
    let z = ops.input("latent", &fixed(&[1, cfg.z_dim, latent[0], latent[1]]));
    let shapes = cfg.decoder_caches(latent);
    let old = caches(&mut ops, chunk, &shapes);
    let out = vae::decode(&mut ops, cfg, latent, chunk, &z, &old);
    ops.output("frames", &out.frames, &fixed(&[count, 3, height, width]));
    put_caches(&mut ops, &out.caches, &shapes);
    ops.finish()
}
