//! The interpreter that counts: shapes, parameters and arithmetic of a network, without computing anything.
//!
//! One multiplication with its addition is 2 FLOP. Products (linear layers, matrix products, convolutions) are exact
//! counts; everything else is one FLOP per element made, which is small beside them.

use std::collections::HashMap;

use crate::model::dit::{DitConfig, DitInputs, forward};
use crate::model::umt5::{self, Umt5Config, Umt5Inputs};
use crate::model::vae::{self, Chunk, VaeConfig};
use crate::model::{Ops, ParamSpec};

/// Arithmetic by kind, in FLOP.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Flops {
    /// Products with a weight matrix.
    pub linear: f64,
    /// Products of two activations: attention scores and sums.
    pub attention: f64,
    /// Convolutions.
    pub convolution: f64,
    /// Everything else.
    pub elementwise: f64,
}

impl Flops {
    /// Products only: what cost models count.
    #[must_use]
    pub fn products(&self) -> f64 {
        self.linear + self.attention + self.convolution
    }
}

/// An implementation of [`Ops`] whose tensors are shapes.
///
/// ```
/// use mindseye_engines::count::CountOps;
/// use mindseye_engines::model::Ops;
///
/// let mut ops = CountOps::new();
/// let x = ops.input(&[10, 3]);
/// let w = ops.param("w", &[4, 3]);
/// let y = ops.linear(&x, &w, None);
/// assert_eq!(y, [10, 4]);
/// assert_eq!(ops.flops().linear, 240.0);
/// assert_eq!(ops.parameters(), 12);
/// ```
#[derive(Clone, Debug, Default)]
pub struct CountOps {
    params: Vec<ParamSpec>,
    known: HashMap<String, usize>,
    flops: Flops,
    largest: usize,
}

impl CountOps {
    /// Nothing counted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// An input of this shape.
    pub fn input(&self, shape: &[usize]) -> Vec<usize> {
        shape.to_vec()
    }

    /// The weights asked for, each once, in the order of first use.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// Number of values in all weights.
    pub fn parameters(&self) -> u64 {
        self.params.iter().map(|p| p.shape.iter().map(|&s| s as u64).product::<u64>()).sum()
    }

    /// Arithmetic so far.
    pub fn flops(&self) -> Flops {
        self.flops
    }

    /// Elements of the largest tensor made so far.
    pub fn largest(&self) -> usize {
        self.largest
    }

    fn made(&mut self, shape: Vec<usize>) -> Vec<usize> {
        self.largest = self.largest.max(shape.iter().product());
        shape
    }

    fn each(&mut self, shape: Vec<usize>) -> Vec<usize> {
        self.flops.elementwise += elements(&shape);
        self.made(shape)
    }

    fn broadcast(&mut self, a: &[usize], b: &[usize]) -> Vec<usize> {
        let rank = a.len().max(b.len());
        let at = |s: &[usize], i: usize| if i + s.len() >= rank { s[i + s.len() - rank] } else { 1 };
        let shape = (0..rank)
            .map(|i| match (at(a, i), at(b, i)) {
                (x, y) if x == y || y == 1 => x,
                (1, y) => y,
                (x, y) => panic!("{a:?} and {b:?} do not broadcast: {x} against {y}"),
            })
            .collect();
        self.each(shape)
    }
}

fn elements(shape: &[usize]) -> f64 {
    shape.iter().map(|&s| s as f64).product()
}

impl Ops for CountOps {
    type Tensor = Vec<usize>;
    type Index = Vec<usize>;

    fn param(&mut self, name: &str, shape: &[usize]) -> Vec<usize> {
        match self.known.get(name) {
            Some(&i) => assert_eq!(self.params[i].shape, shape, "{name} is asked for with two shapes"),
            None => {
                self.known.insert(name.into(), self.params.len());
                self.params.push(ParamSpec { name: name.into(), shape: shape.to_vec() });
            }
        }
        shape.to_vec()
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> Vec<usize> {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "values of a constant must fill its shape");
        shape.to_vec()
    }

    fn add(&mut self, a: &Vec<usize>, b: &Vec<usize>) -> Vec<usize> {
        self.broadcast(a, b)
    }

    fn sub(&mut self, a: &Vec<usize>, b: &Vec<usize>) -> Vec<usize> {
        self.broadcast(a, b)
    }

    fn mul(&mut self, a: &Vec<usize>, b: &Vec<usize>) -> Vec<usize> {
        self.broadcast(a, b)
    }

    fn scale(&mut self, x: &Vec<usize>, _k: f32) -> Vec<usize> {
        self.each(x.clone())
    }

    fn offset(&mut self, x: &Vec<usize>, _k: f32) -> Vec<usize> {
        self.each(x.clone())
    }

    fn linear(&mut self, x: &Vec<usize>, w: &Vec<usize>, b: Option<&Vec<usize>>) -> Vec<usize> {
        let [out, inner] = w[..] else { panic!("a weight matrix has two axes, not {w:?}") };
        assert_eq!(x.last(), Some(&inner), "{x:?} into a linear layer {w:?}");
        assert!(b.is_none_or(|b| *b == [out]), "bias {b:?} of a linear layer {w:?}");
        let mut shape = x.clone();
        *shape.last_mut().expect("checked above") = out;
        self.flops.linear += 2.0 * elements(x) * out as f64;
        self.made(shape)
    }

    fn matmul(&mut self, a: &Vec<usize>, b: &Vec<usize>) -> Vec<usize> {
        let (ra, rb) = (a.len(), b.len());
        assert_eq!(a[..ra - 2], b[..rb - 2], "leading axes of a product of {a:?} and {b:?}");
        assert_eq!(a[ra - 1], b[rb - 2], "inner axes of a product of {a:?} and {b:?}");
        let mut shape = a.clone();
        shape[ra - 1] = b[rb - 1];
        self.flops.attention += 2.0 * elements(a) * b[rb - 1] as f64;
        self.made(shape)
    }

    fn reshape(&mut self, x: &Vec<usize>, dims: &[i64]) -> Vec<usize> {
        let total: usize = x.iter().product();
        let mut shape: Vec<usize> = dims
            .iter()
            .enumerate()
            .map(|(i, &d)| match d {
                0 => x[i],
                -1 => 1,
                d => d as usize,
            })
            .collect();
        if let Some(hole) = dims.iter().position(|&d| d == -1) {
            let rest: usize = shape.iter().product();
            shape[hole] = total / rest.max(1);
        }
        assert_eq!(shape.iter().product::<usize>(), total, "reshape of {x:?} to {dims:?}");
        shape
    }

    fn permute(&mut self, x: &Vec<usize>, perm: &[usize]) -> Vec<usize> {
        assert_eq!(x.len(), perm.len(), "permutation {perm:?} of {x:?}");
        perm.iter().map(|&p| x[p]).collect()
    }

    fn concat(&mut self, xs: &[Vec<usize>], axis: usize) -> Vec<usize> {
        let mut shape = xs[0].clone();
        shape[axis] = xs.iter().map(|x| x[axis]).sum();
        for x in xs {
            let same = x.iter().zip(&shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
            assert!(same && x.len() == shape.len(), "concatenation of {xs:?} along {axis}");
        }
        self.made(shape)
    }

    fn slice(&mut self, x: &Vec<usize>, axis: usize, start: i64, end: Option<i64>) -> Vec<usize> {
        let n = x[axis] as i64;
        let at = |p: i64| if p < 0 { p + n } else { p }.clamp(0, n);
        let (start, end) = (at(start), end.map_or(n, at));
        let mut shape = x.clone();
        shape[axis] = (end - start).max(0) as usize;
        shape
    }

    fn gather(&mut self, table: &Vec<usize>, index: &Vec<usize>) -> Vec<usize> {
        let shape = [index, &table[1..]].concat();
        self.made(shape)
    }

    fn softmax(&mut self, x: &Vec<usize>) -> Vec<usize> {
        self.each(x.clone())
    }

    fn layer_norm(&mut self, x: &Vec<usize>, _eps: f32) -> Vec<usize> {
        self.each(x.clone())
    }

    fn rms_norm(&mut self, x: &Vec<usize>, weight: &Vec<usize>, _eps: f32) -> Vec<usize> {
        assert_eq!(x.last(), weight.last(), "norm {weight:?} of {x:?}");
        self.each(x.clone())
    }

    fn channel_norm(&mut self, x: &Vec<usize>, gamma: &Vec<usize>, channels: usize) -> Vec<usize> {
        assert_eq!((x[1], gamma.iter().product()), (channels, channels), "norm {gamma:?} of {x:?}");
        self.each(x.clone())
    }

    fn mean(&mut self, x: &Vec<usize>, axis: usize) -> Vec<usize> {
        self.flops.elementwise += elements(x);
        let mut shape = x.clone();
        shape[axis] = 1;
        shape
    }

    fn gelu_tanh(&mut self, x: &Vec<usize>) -> Vec<usize> {
        self.each(x.clone())
    }

    fn silu(&mut self, x: &Vec<usize>) -> Vec<usize> {
        self.each(x.clone())
    }

    fn conv2d(
        &mut self,
        x: &Vec<usize>,
        w: &Vec<usize>,
        b: Option<&Vec<usize>>,
        stride: [usize; 2],
        pads: [usize; 4],
    ) -> Vec<usize> {
        assert_eq!(x[1], w[1], "{x:?} into a convolution {w:?}");
        assert!(b.is_none_or(|b| *b == [w[0]]), "bias {b:?} of a convolution {w:?}");
        let out = |axis: usize| (x[2 + axis] + pads[axis] + pads[axis + 2] - w[2 + axis]) / stride[axis] + 1;
        let shape = vec![x[0], w[0], out(0), out(1)];
        self.flops.convolution += 2.0 * elements(&shape) * elements(&w[1..]);
        self.made(shape)
    }

    fn upsample2(&mut self, x: &Vec<usize>) -> Vec<usize> {
        self.made(vec![x[0], x[1], 2 * x[2], 2 * x[3]])
    }
}

/// Counts one forward pass of the denoiser over `frames` latents that also look at `memory` cached ones, with
/// `timesteps` distinct timesteps, at batch 1.
///
/// # Panics
/// When `cfg` does not pass [`DitConfig::validate`].
pub fn count_denoiser(cfg: &DitConfig, frames: usize, memory: usize, timesteps: usize) -> CountOps {
    let mut ops = CountOps::new();
    let tokens = cfg.tokens_per_frame();
    let latents = vec![1, cfg.in_channels, frames, cfg.latent_height, cfg.latent_width];
    let (time, rows, row_batch) = (vec![timesteps, cfg.freq_dim], vec![1, frames], vec![timesteps]);
    let text = vec![1, cfg.text_len, cfg.text_dim];
    let table = vec![frames * tokens, cfg.head_dim / 2];
    let camera = vec![1, frames, tokens, cfg.camera_channels];
    let cache = vec![1, memory * tokens, cfg.heads, cfg.head_dim];
    let cached: Vec<_> = (0..cfg.layers).map(|_| (cache.clone(), cache.clone())).collect();
    let inputs = DitInputs {
        latents: &latents,
        time: &time,
        rows: &rows,
        row_batch: Some(&row_batch),
        text: &text,
        cos: &table,
        sin: &table,
        camera: (cfg.camera_channels > 0).then_some(&camera),
        bias: None,
        memory: (memory > 0).then_some(cached.as_slice()),
    };
    forward(&mut ops, cfg, &inputs);
    ops
}

/// Counts one pass of the text encoder over `length` tokens.
///
/// # Panics
/// When `cfg` does not pass [`Umt5Config::validate`].
pub fn count_text(cfg: &Umt5Config, length: usize) -> CountOps {
    let mut ops = CountOps::new();
    let (ids, buckets) = (vec![1, length], vec![length, length]);
    let (mask_bias, keep) = (vec![1, 1, 1, length], vec![1, length, 1]);
    let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
    umt5::encode(&mut ops, cfg, &inputs);
    ops
}

/// Counts one step of the VAE encoder for latents of height and width `latent`.
///
/// # Panics
/// When `cfg` does not pass [`VaeConfig::validate`].
pub fn count_vae_encoder(cfg: &VaeConfig, latent: [usize; 2], chunk: Chunk) -> CountOps {
    let mut ops = CountOps::new();
    let frames = if chunk == Chunk::First { 1 } else { cfg.temporal_factor() };
    let [height, width] = latent.map(|s| s * cfg.spatial_factor());
    let caches: Vec<Vec<usize>> = cfg.encoder_caches(latent).iter().map(|s| s.to_vec()).collect();
    let caches = if chunk == Chunk::First { &[][..] } else { &caches };
    vae::encode(&mut ops, cfg, latent, chunk, &vec![frames, 3, height, width], caches);
    ops
}

/// Counts one step of the VAE decoder for latents of height and width `latent`.
///
/// # Panics
/// When `cfg` does not pass [`VaeConfig::validate`].
pub fn count_vae_decoder(cfg: &VaeConfig, latent: [usize; 2], chunk: Chunk) -> CountOps {
    let mut ops = CountOps::new();
    let caches: Vec<Vec<usize>> = cfg.decoder_caches(latent).iter().map(|s| s.to_vec()).collect();
    let caches = if chunk == Chunk::First { &[][..] } else { &caches };
    vae::decode(&mut ops, cfg, latent, chunk, &vec![1, cfg.z_dim, latent[0], latent[1]], caches);
    ops
}
