//! The interpreter that counts: shapes, parameters, arithmetic and memory of a network, without computing anything.
//!
//! One multiplication with its addition is 2 FLOP. Products (linear layers, matrix products, convolutions) are exact
//! counts; everything else is one FLOP per element made, which is small beside them.
//!
//! Memory is counted in values (elements), since the caller knows how wide they are. The interpreter writes down when
//! each intermediate result is made and when it is read for the last time; [`CountOps::activations`] is the largest
//! sum of results that are needed at one moment. Views (reshape, slice) take no memory, element-wise operations and
//! norms write over an input that is not read again.

use std::collections::HashMap;
use std::ops::Deref;

use crate::model::codec::{self, GROUP, LinearCodecConfig};
use crate::model::depth::{self, DepthConfig};
use crate::model::dit::{DitConfig, DitInputs, DitOutputs, forward};
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

/// How attention and rotation are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// In one kernel each, without the matrix of scores: GPUs.
    Fused,
    /// Step by step, every intermediate result in memory: CPU backends.
    Stepwise,
}

/// A tensor of the counting interpreter: its shape, and the buffer that holds it (none for weights and constants).
#[derive(Clone, Debug)]
pub struct Counted {
    shape: Vec<usize>,
    buffer: Option<usize>,
    /// Which weight it is, or a view of.
    weight: Option<usize>,
}

impl Deref for Counted {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.shape
    }
}

/// When a buffer is needed: from the step that makes it to the last step that reads it.
#[derive(Clone, Debug)]
struct Buffer {
    values: u64,
    made: usize,
    last_read: usize,
    /// Inputs and outputs are the caller's memory.
    callers: bool,
    /// Buffers that its step may write over.
    may_replace: Vec<usize>,
    /// Values that its step needs besides, where it is not one kernel.
    beside: u64,
}

/// Values that cross the edge of one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Edge {
    /// Inputs, state aside.
    pub inputs: u64,
    /// Outputs, state aside.
    pub outputs: u64,
    /// Inputs that an earlier pass made: streaming caches, keys and values of the context.
    pub state_in: u64,
    /// Outputs that are kept for a later pass.
    pub state_out: u64,
}

/// An implementation of [`Ops`] whose tensors are shapes.
///
/// ```
/// use mindseye_engines::count::{CountOps, Kernels};
/// use mindseye_engines::model::Ops;
///
/// let mut ops = CountOps::new();
/// let x = ops.input(&[10, 3]);
/// let w = ops.param("w", &[4, 3]);
/// let y = ops.linear(&x, &w, None);
/// let y = ops.silu(&y);
/// ops.output(&y);
/// assert_eq!(y[..], [10, 4]);
/// assert_eq!(ops.flops().linear, 240.0);
/// assert_eq!(ops.parameters(), 12);
/// assert_eq!(ops.activations(Kernels::Fused), 40, "the linear layer's result; the last one is the caller's");
/// ```
#[derive(Clone, Debug, Default)]
pub struct CountOps {
    params: Vec<ParamSpec>,
    /// FLOP of products with each of `params`.
    products: Vec<f64>,
    known: HashMap<String, usize>,
    constants: u64,
    looked_up: u64,
    flops: Flops,
    buffers: Vec<Buffer>,
    steps: usize,
    edge: Edge,
    /// Bytes of each input and output, state aside.
    places: Vec<u64>,
}

impl CountOps {
    /// Nothing counted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// An input of this shape.
    pub fn input(&mut self, shape: &[usize]) -> Counted {
        let input = self.callers(shape);
        self.edge.inputs += values(shape);
        self.places.push(4 * values(shape));
        input
    }

    /// An input of 64-bit integers of this shape.
    pub fn index(&mut self, shape: &[usize]) -> Vec<usize> {
        self.places.push(8 * values(shape));
        shape.to_vec()
    }

    /// An input that an earlier pass made.
    pub fn state(&mut self, shape: &[usize]) -> Counted {
        let input = self.callers(shape);
        self.edge.state_in += values(shape);
        input
    }

    fn callers(&mut self, shape: &[usize]) -> Counted {
        self.buffers.push(Buffer {
            values: values(shape),
            made: 0,
            last_read: 0,
            callers: true,
            may_replace: Vec::new(),
            beside: 0,
        });
        Counted { shape: shape.to_vec(), buffer: Some(self.buffers.len() - 1), weight: None }
    }

    /// Marks a result as an output: its memory is the caller's.
    pub fn output(&mut self, result: &Counted) {
        self.edge.outputs += values(result);
        self.places.push(4 * values(result));
        self.give(result);
    }

    /// Marks a result as an output that is kept for a later pass.
    pub fn keep(&mut self, result: &Counted) {
        self.edge.state_out += values(result);
        self.give(result);
    }

    fn give(&mut self, result: &Counted) {
        // A view of a larger result is copied out of it as soon as that is there.
        if let Some(buffer) = result.buffer.map(|b| &mut self.buffers[b])
            && buffer.values == values(result)
        {
            buffer.callers = true;
        }
    }

    /// The weights asked for, each once, in the order of first use.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// FLOP of the products with each weight, in the order of [`CountOps::params`]; zero for those that are not matrices.
    pub fn products(&self) -> &[f64] {
        &self.products
    }

    /// Number of values in all weights.
    pub fn parameters(&self) -> u64 {
        self.params.iter().map(|p| values(&p.shape)).sum()
    }

    /// Number of values in all constants.
    pub fn constants(&self) -> u64 {
        self.constants
    }

    /// Number of values in tables of which a pass reads some rows only.
    pub fn looked_up(&self) -> u64 {
        self.looked_up
    }

    /// Arithmetic so far.
    pub fn flops(&self) -> Flops {
        self.flops
    }

    /// Inputs and outputs so far.
    pub fn edge(&self) -> Edge {
        self.edge
    }

    /// Bytes of inputs and outputs, state aside, each beginning at a multiple of `align`: floats of 32 bits, integers of
    /// 64.
    pub fn io_bytes(&self, align: u64) -> u64 {
        self.places.iter().map(|bytes| bytes.next_multiple_of(align)).sum()
    }

    /// Most values of intermediate results that are needed at one moment, inputs and outputs aside.
    pub fn activations(&self, kernels: Kernels) -> u64 {
        let mut dying: Vec<Vec<usize>> = vec![Vec::new(); self.steps + 1];
        for (i, b) in self.buffers.iter().enumerate().filter(|(_, b)| !b.callers) {
            dying[b.last_read].push(i);
        }
        let (mut live, mut most) = (0u64, 0u64);
        for b in self.buffers.iter().filter(|b| b.made > 0) {
            let step = b.made;
            let beside = if kernels == Kernels::Stepwise { b.beside } else { 0 };
            let replaced = dying[step].iter().position(|&d| {
                !b.callers && b.may_replace.contains(&d) && self.buffers[d].values == b.values
            });
            match replaced {
                Some(at) => drop(dying[step].swap_remove(at)),
                None if !b.callers => live += b.values,
                None => {}
            }
            most = most.max(live + beside);
            live -= dying[step].iter().map(|&d| self.buffers[d].values).sum::<u64>();
        }
        most
    }

    /// A result in memory of its own, made from `from`.
    fn made(&mut self, shape: Vec<usize>, from: &[&Counted]) -> Counted {
        self.step(shape, from, false, 0)
    }

    /// A result with one FLOP per element that may take the place of one of `from`.
    fn each(&mut self, shape: Vec<usize>, from: &[&Counted]) -> Counted {
        self.flops.elementwise += elements(&shape);
        self.step(shape, from, true, 0)
    }

    fn step(&mut self, shape: Vec<usize>, from: &[&Counted], replaces: bool, beside: u64) -> Counted {
        self.steps += 1;
        let read: Vec<usize> = from.iter().filter_map(|x| x.buffer).collect();
        for &b in &read {
            self.buffers[b].last_read = self.buffers[b].last_read.max(self.steps);
        }
        self.buffers.push(Buffer {
            values: values(&shape),
            made: self.steps,
            last_read: self.steps,
            callers: false,
            may_replace: if replaces { read } else { Vec::new() },
            beside,
        });
        Counted { shape, buffer: Some(self.buffers.len() - 1), weight: None }
    }

    fn add_product(&mut self, weight: &Counted, flop: f64) {
        if let Some(at) = weight.weight {
            self.products[at] += flop;
        }
    }

    fn broadcast(&mut self, a: &Counted, b: &Counted) -> Counted {
        let rank = a.len().max(b.len());
        let at = |s: &[usize], i: usize| if i + s.len() >= rank { s[i + s.len() - rank] } else { 1 };
        let shape = (0..rank)
            .map(|i| match (at(a, i), at(b, i)) {
                (x, y) if x == y || y == 1 => x,
                (1, y) => y,
                (x, y) => panic!("{a:?} and {b:?} do not broadcast: {x} against {y}"),
            })
            .collect();
        self.each(shape, &[a, b])
    }
}

fn values(shape: &[usize]) -> u64 {
    shape.iter().map(|&s| s as u64).product()
}

fn elements(shape: &[usize]) -> f64 {
    shape.iter().map(|&s| s as f64).product()
}

impl Ops for CountOps {
    type Tensor = Counted;
    type Index = Vec<usize>;

    fn param(&mut self, name: &str, shape: &[usize]) -> Counted {
        let weight = match self.known.get(name) {
            Some(&i) => {
                assert_eq!(self.params[i].shape, shape, "{name} is asked for with two shapes");
                i
            }
            None => {
                self.known.insert(name.into(), self.params.len());
                self.params.push(ParamSpec { name: name.into(), shape: shape.to_vec() });
                self.products.push(0.0);
                self.params.len() - 1
            }
        };
        Counted { shape: shape.to_vec(), buffer: None, weight: Some(weight) }
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> Counted {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "values of a constant must fill its shape");
        self.constants += values(shape);
        Counted { shape: shape.to_vec(), buffer: None, weight: None }
    }

    fn add(&mut self, a: &Counted, b: &Counted) -> Counted {
        self.broadcast(a, b)
    }

    fn sub(&mut self, a: &Counted, b: &Counted) -> Counted {
        self.broadcast(a, b)
    }

    fn mul(&mut self, a: &Counted, b: &Counted) -> Counted {
        self.broadcast(a, b)
    }

    fn scale(&mut self, x: &Counted, _k: f32) -> Counted {
        self.each(x.shape.clone(), &[x])
    }

    fn offset(&mut self, x: &Counted, _k: f32) -> Counted {
        self.each(x.shape.clone(), &[x])
    }

    fn linear(&mut self, x: &Counted, w: &Counted, b: Option<&Counted>) -> Counted {
        let [out, inner] = w[..] else { panic!("a weight matrix has two axes, not {w:?}") };
        assert_eq!(x.last(), Some(&inner), "{x:?} into a linear layer {w:?}");
        assert!(b.is_none_or(|b| b[..] == [out]), "bias {b:?} of a linear layer {w:?}");
        let mut shape = x.shape.clone();
        *shape.last_mut().expect("checked above") = out;
        let flop = 2.0 * elements(x) * out as f64;
        self.flops.linear += flop;
        self.add_product(w, flop);
        self.made(shape, &[x])
    }

    fn matmul(&mut self, a: &Counted, b: &Counted) -> Counted {
        let (ra, rb) = (a.len(), b.len());
        assert_eq!(a[..ra - 2], b[..rb - 2], "leading axes of a product of {a:?} and {b:?}");
        assert_eq!(a[ra - 1], b[rb - 2], "inner axes of a product of {a:?} and {b:?}");
        let mut shape = a.shape.clone();
        shape[ra - 1] = b[rb - 1];
        self.flops.attention += 2.0 * elements(a) * b[rb - 1] as f64;
        self.made(shape, &[a, b])
    }

    fn reshape(&mut self, x: &Counted, dims: &[i64]) -> Counted {
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
        Counted { shape, buffer: x.buffer, weight: x.weight }
    }

    fn permute(&mut self, x: &Counted, perm: &[usize]) -> Counted {
        assert_eq!(x.len(), perm.len(), "permutation {perm:?} of {x:?}");
        let shape: Vec<usize> = perm.iter().map(|&p| x[p]).collect();
        // A weight is permuted when the graph is prepared.
        if x.buffer.is_some() {
            self.made(shape, &[x])
        } else {
            Counted { shape, buffer: None, weight: x.weight }
        }
    }

    fn concat(&mut self, xs: &[Counted], axis: usize) -> Counted {
        let mut shape = xs[0].shape.clone();
        shape[axis] = xs.iter().map(|x| x[axis]).sum();
        for x in xs {
            let same = x.iter().zip(&shape).enumerate().all(|(i, (a, b))| i == axis || a == b);
            assert!(same && x.len() == shape.len(), "concatenation of {xs:?} along {axis}");
        }
        self.made(shape, &xs.iter().collect::<Vec<_>>())
    }

    fn slice(&mut self, x: &Counted, axis: usize, start: i64, end: Option<i64>) -> Counted {
        let n = x[axis] as i64;
        let at = |p: i64| if p < 0 { p + n } else { p }.clamp(0, n);
        let (start, end) = (at(start), end.map_or(n, at));
        let mut shape = x.shape.clone();
        shape[axis] = (end - start).max(0) as usize;
        Counted { shape, buffer: x.buffer, weight: x.weight }
    }

    fn gather(&mut self, table: &Counted, index: &Vec<usize>) -> Counted {
        let shape = [index, &table[1..]].concat();
        if table.buffer.is_none() {
            self.looked_up += values(table);
        }
        self.made(shape, &[table])
    }

    fn softmax(&mut self, x: &Counted) -> Counted {
        self.each(x.shape.clone(), &[x])
    }

    fn layer_norm(&mut self, x: &Counted, _eps: f32) -> Counted {
        self.each(x.shape.clone(), &[x])
    }

    fn rms_norm(&mut self, x: &Counted, weight: &Counted, _eps: f32) -> Counted {
        assert_eq!(x.last(), weight.last(), "norm {weight:?} of {x:?}");
        self.each(x.shape.clone(), &[x])
    }

    fn channel_norm(&mut self, x: &Counted, gamma: &Counted, channels: usize) -> Counted {
        assert_eq!((x[1], gamma.iter().product()), (channels, channels), "norm {gamma:?} of {x:?}");
        self.each(x.shape.clone(), &[x])
    }

    fn mean(&mut self, x: &Counted, axis: usize) -> Counted {
        self.flops.elementwise += elements(x);
        let mut shape = x.shape.clone();
        shape[axis] = 1;
        self.made(shape, &[x])
    }

    fn gelu_tanh(&mut self, x: &Counted) -> Counted {
        self.each(x.shape.clone(), &[x])
    }

    fn silu(&mut self, x: &Counted) -> Counted {
        self.each(x.shape.clone(), &[x])
    }

    fn conv2d(
        &mut self,
        x: &Counted,
        w: &Counted,
        b: Option<&Counted>,
        stride: [usize; 2],
        pads: [usize; 4],
    ) -> Counted {
        assert_eq!(x[1], w[1], "{x:?} into a convolution {w:?}");
        assert!(b.is_none_or(|b| b[..] == [w[0]]), "bias {b:?} of a convolution {w:?}");
        let out = |axis: usize| (x[2 + axis] + pads[axis] + pads[axis + 2] - w[2 + axis]) / stride[axis] + 1;
        let shape = vec![x[0], w[0], out(0), out(1)];
        let flop = 2.0 * elements(&shape) * elements(&w[1..]);
        self.flops.convolution += flop;
        self.add_product(w, flop);
        self.made(shape, &[x])
    }

    fn upsample2(&mut self, x: &Counted) -> Counted {
        self.made(vec![x[0], x[1], 2 * x[2], 2 * x[3]], &[x])
    }

    fn rotate(
        &mut self,
        x: &Counted,
        cos: &Counted,
        sin: &Counted,
        _heads: usize,
        _head_dim: usize,
    ) -> Counted {
        // Four products, a difference and a sum, each of half the elements.
        self.flops.elementwise += 3.0 * elements(x);
        self.step(x.shape.clone(), &[x, cos, sin], true, 2 * values(x))
    }

    fn attention(
        &mut self,
        q: &Counted,
        k: &Counted,
        v: &Counted,
        scale: f32,
        bias: Option<&Counted>,
        heads: usize,
        head_dim: usize,
    ) -> Counted {
        let [batch, queries] = [q[0], q[1]];
        let scores = vec![batch, heads, queries, k[1]];
        let one = 2.0 * elements(&scores) * head_dim as f64;
        self.flops.attention += 2.0 * one;
        let scaled = if scale == 1.0 { 0.0 } else { elements(q) };
        let passes = if bias.is_some() { 2.0 } else { 1.0 };
        self.flops.elementwise += scaled + passes * elements(&scores);
        let beside = values(&scores) + values(q) + values(k) + values(v);
        let from: Vec<&Counted> = [q, k, v].into_iter().chain(bias).collect();
        self.step(vec![batch, queries, heads * head_dim], &from, false, beside)
    }
}

/// Inputs of the denoiser for `frames` latents at batch 1.
fn denoise(
    ops: &mut CountOps,
    cfg: &DitConfig,
    frames: usize,
    memory: usize,
    timesteps: usize,
) -> DitOutputs<CountOps> {
    let tokens = cfg.tokens_per_frame();
    let latents = ops.input(&[1, cfg.in_channels, frames, cfg.latent_height, cfg.latent_width]);
    let time = ops.input(&[timesteps, cfg.freq_dim]);
    let rows = ops.index(&[1, frames]);
    let row_batch = if cfg.pooled_text { ops.index(&[timesteps]) } else { vec![timesteps] };
    let text = ops.input(&[1, cfg.text_len, cfg.text_dim]);
    let table = [frames * tokens, cfg.head_dim / 2];
    let (cos, sin) = (ops.input(&table), ops.input(&table));
    let camera = (cfg.camera_channels > 0).then(|| ops.input(&[1, frames, tokens, cfg.camera_channels]));
    let guide = (cfg.guide_channels() > 0).then(|| ops.input(&[1, frames, tokens, cfg.guide_channels()]));
    let cache = [1, memory * tokens, cfg.heads, cfg.head_dim];
    let cached: Vec<_> = if memory == 0 {
        Vec::new()
    } else {
        (0..cfg.layers).map(|_| (ops.state(&cache), ops.state(&cache))).collect()
    };
    let inputs = DitInputs {
        latents: &latents,
        time: &time,
        rows: &rows,
        row_batch: Some(&row_batch),
        text: &text,
        cos: &cos,
        sin: &sin,
        camera: camera.as_ref(),
        guide: guide.as_ref(),
        bias: None,
        memory: (memory > 0).then_some(cached.as_slice()),
    };
    forward(ops, cfg, &inputs)
}

fn give_heads(ops: &mut CountOps, out: &DitOutputs<CountOps>) {
    if let Some(lift) = &out.lift {
        for head in [&lift.pose, &lift.mask, &lift.locate] {
            ops.output(head);
        }
    }
}

/// Counts one forward pass of the denoiser over `frames` latents that also look at `memory` cached ones, with
/// `timesteps` distinct timesteps, at batch 1.
///
/// # Panics
/// When `cfg` does not pass [`DitConfig::validate`].
pub fn count_denoiser(cfg: &DitConfig, frames: usize, memory: usize, timesteps: usize) -> CountOps {
    let mut ops = CountOps::new();
    let out = denoise(&mut ops, cfg, frames, memory, timesteps);
    ops.output(&out.sample);
    give_heads(&mut ops, &out);
    ops
}

/// Counts the pass over `frames` context latents whose results are their keys and values, at batch 1.
///
/// # Panics
/// When `cfg` does not pass [`DitConfig::validate`].
pub fn count_prefill(cfg: &DitConfig, frames: usize) -> CountOps {
    let mut ops = CountOps::new();
    let out = denoise(&mut ops, cfg, frames, 0, 1);
    for (k, v) in &out.memory {
        ops.keep(k);
        ops.keep(v);
    }
    give_heads(&mut ops, &out);
    ops
}

/// Counts one pass of the text encoder over `length` tokens.
///
/// # Panics
/// When `cfg` does not pass [`Umt5Config::validate`].
pub fn count_text(cfg: &Umt5Config, length: usize) -> CountOps {
    let mut ops = CountOps::new();
    // Buckets are a constant of the graph.
    let (ids, buckets) = (ops.index(&[1, length]), vec![length, length]);
    let (mask_bias, keep) = (ops.input(&[1, 1, 1, length]), ops.input(&[1, length, 1]));
    let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
    let out = umt5::encode(&mut ops, cfg, &inputs);
    ops.output(&out.rows);
    ops
}

/// Counts the linear codec's encoder on one group of frames.
///
/// # Panics
/// When `cfg` does not pass [`LinearCodecConfig::validate`].
pub fn count_codec_encoder(cfg: &LinearCodecConfig, groups: usize) -> CountOps {
    let mut ops = CountOps::new();
    let frames = ops.input(&[groups, GROUP, 3, cfg.height, cfg.width]);
    let latent = codec::encode(&mut ops, cfg, &frames);
    ops.output(&latent);
    ops
}

/// Counts the linear codec's decoder on `latents` latents.
///
/// # Panics
/// When `cfg` does not pass [`LinearCodecConfig::validate`].
pub fn count_codec_decoder(cfg: &LinearCodecConfig, latents: usize) -> CountOps {
    let mut ops = CountOps::new();
    let (height, width) = cfg.latent_size();
    let latent = ops.input(&[latents, cfg.channels, 1, height, width]);
    let frames = codec::decode(&mut ops, cfg, &latent);
    ops.output(&frames);
    ops
}

/// Counts one pass of the depth reader over one picture.
///
/// # Panics
/// When `cfg` does not pass [`DepthConfig::validate`].
pub fn count_depth(cfg: &DepthConfig) -> CountOps {
    let mut ops = CountOps::new();
    let picture = ops.input(&[1, 3, cfg.height, cfg.width]);
    let depth = depth::log_depth(&mut ops, cfg, &picture);
    ops.output(&depth);
    ops
}

/// Counts one step of the VAE encoder for latents of height and width `latent`.
///
/// # Panics
/// When `cfg` does not pass [`VaeConfig::validate`].
pub fn count_vae_encoder(cfg: &VaeConfig, latent: [usize; 2], chunk: Chunk) -> CountOps {
    let mut ops = CountOps::new();
    let caches = caches(&mut ops, chunk, || vae_encoder_caches(cfg, latent));
    let out = vae_encoded(&mut ops, cfg, latent, chunk, &caches);
    ops.output(&out.latent);
    out.caches.iter().for_each(|c| ops.keep(c));
    ops
}

/// Counts one step of the VAE decoder for latents of height and width `latent`.
///
/// # Panics
/// When `cfg` does not pass [`VaeConfig::validate`].
pub fn count_vae_decoder(cfg: &VaeConfig, latent: [usize; 2], chunk: Chunk) -> CountOps {
    let mut ops = CountOps::new();
    let caches = caches(&mut ops, chunk, || vae_decoder_caches(cfg, latent));
    let out = vae_decoded(&mut ops, cfg, latent, chunk, &caches);
    ops.output(&out.frames);
    out.caches.iter().for_each(|c| ops.keep(c));
    ops
}

/// Shapes `[frames, channels, height, width]` of the VAE encoder's caches for latents of height and width `latent`, in the
/// order in which the convolutions run.
///
/// # Panics
/// When `cfg` does not pass [`VaeConfig::validate`].
pub fn vae_encoder_caches(cfg: &VaeConfig, latent: [usize; 2]) -> Vec<Vec<usize>> {
    shapes(vae_encoded(&mut CountOps::new(), cfg, latent, Chunk::First, &[]).caches)
}

/// Shapes of the VAE decoder's caches, as [`vae_encoder_caches`].
///
/// # Panics
/// When `cfg` does not pass [`VaeConfig::validate`].
pub fn vae_decoder_caches(cfg: &VaeConfig, latent: [usize; 2]) -> Vec<Vec<usize>> {
    shapes(vae_decoded(&mut CountOps::new(), cfg, latent, Chunk::First, &[]).caches)
}

fn vae_encoded(
    ops: &mut CountOps,
    cfg: &VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    caches: &[Counted],
) -> vae::Encoded<CountOps> {
    let frames = if chunk == Chunk::First { 1 } else { cfg.temporal_factor() };
    let [height, width] = latent.map(|s| s * cfg.spatial_factor());
    let frames = ops.input(&[frames, 3, height, width]);
    vae::encode(ops, cfg, latent, chunk, &frames, caches)
}

fn vae_decoded(
    ops: &mut CountOps,
    cfg: &VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    caches: &[Counted],
) -> vae::Decoded<CountOps> {
    let latents = ops.input(&[1, cfg.z_dim, latent[0], latent[1]]);
    vae::decode(ops, cfg, latent, chunk, &latents, caches)
}

fn shapes(caches: Vec<Counted>) -> Vec<Vec<usize>> {
    caches.into_iter().map(|c| c.shape).collect()
}

fn caches(ops: &mut CountOps, chunk: Chunk, shapes: impl FnOnce() -> Vec<Vec<usize>>) -> Vec<Counted> {
    if chunk == Chunk::First { Vec::new() } else { shapes().iter().map(|s| ops.state(s)).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_that_is_needed_at_once_is_counted() {
        // Worked out by hand: x is the caller's.
        let mut ops = CountOps::new();
        let x = ops.input(&[2, 8]);
        let w = ops.param("w", &[32, 8]);
        let v = ops.param("v", &[8, 32]);
        let h = ops.linear(&x, &w, None); // 64
        let h = ops.gelu_tanh(&h); // writes over it
        let y = ops.linear(&h, &v, None); // 64 + 16
        let y = ops.add(&y, &x); // over y
        let z = ops.concat(&[y.clone(), y.clone()], 1); // 16 + 32, the output
        ops.output(&z);
        assert_eq!(ops.activations(Kernels::Fused), 80);
        assert_eq!(ops.edge(), Edge { inputs: 16, outputs: 32, state_in: 0, state_out: 0 });
        assert_eq!((ops.io_bytes(1), ops.io_bytes(256)), (192, 512));
        assert_eq!(ops.products(), [2.0 * 2.0 * 8.0 * 32.0, 2.0 * 2.0 * 32.0 * 8.0]);
    }

    #[test]
    fn a_result_that_is_read_later_is_not_written_over() {
        let mut ops = CountOps::new();
        let x = ops.input(&[4]);
        let a = ops.silu(&x); // 4: an input is never written over
        let b = ops.silu(&a); // 8: a is read below
        let c = ops.silu(&b); // over b
        let d = ops.add(&a, &c); // over a or c
        ops.output(&d);
        assert_eq!(ops.activations(Kernels::Fused), 8);
    }

    #[test]
    fn scores_take_memory_only_where_attention_is_done_stepwise() {
        let mut ops = CountOps::new();
        let q = ops.input(&[1, 10, 2, 4]);
        let y = ops.attention(&q, &q, &q, 0.5, None, 2, 4);
        ops.output(&y);
        assert_eq!(y[..], [1, 10, 8]);
        assert_eq!(ops.activations(Kernels::Fused), 0);
        assert_eq!(ops.activations(Kernels::Stepwise), 2 * 10 * 10 + 3 * 80);
        assert_eq!(ops.flops().attention, 2.0 * 2.0 * 200.0 * 4.0);
    }

    #[test]
    fn keys_values_and_caches_are_state() {
        let cfg = crate::model::dit::DitConfig {
            in_channels: 4,
            out_channels: 4,
            latent_height: 2,
            latent_width: 2,
            heads: 2,
            head_dim: 6,
            layers: 3,
            ffn_dim: 16,
            text_dim: 8,
            text_len: 5,
            freq_dim: 8,
            pooled_text: true,
            lift: true,
            ..DitConfig::SMALLEST
        };
        // Keys and values: 7 latents of 4 tokens, width 12, 3 layers.
        let (prefill, cached) = (count_prefill(&cfg, 7), count_denoiser(&cfg, 2, 7, 1));
        assert_eq!(prefill.edge().state_out, 7 * 4 * 12 * 2 * 3);
        assert_eq!(cached.edge().state_in, prefill.edge().state_out);
        assert_eq!(cached.parameters(), prefill.parameters());
        let vae = VaeConfig::wan22();
        // Latents of 26 x 16 for images of 416 x 256: 24 caches, 62.7 M values; 32 caches, 190 M values.
        let count = |shapes: Vec<Vec<usize>>| (shapes.len(), shapes.iter().map(|s| values(s)).sum::<u64>());
        let (encoder, decoder) = (vae_encoder_caches(&vae, [16, 26]), vae_decoder_caches(&vae, [16, 26]));
        let ((encoders, encoded), (decoders, decoded)) = (count(encoder), count(decoder));
        assert_eq!((encoders, (encoded + 50_000) / 100_000), (24, 627), "{encoded}");
        assert_eq!((decoders, (decoded + 500_000) / 1_000_000), (32, 190), "{decoded}");
        // A chunk gives caches of the shapes that it reads, whether or not there is a past.
        for (count, caches) in [
            (count_vae_encoder as fn(&VaeConfig, [usize; 2], Chunk) -> CountOps, encoded),
            (count_vae_decoder, decoded),
        ] {
            let (first, next) = (count(&vae, [16, 26], Chunk::First), count(&vae, [16, 26], Chunk::Next));
            assert_eq!((first.edge().state_in, first.edge().state_out), (0, caches));
            assert_eq!((next.edge().state_in, next.edge().state_out), (caches, caches));
        }
    }
}
