//! The Wan2.2 video autoencoder (`wan/modules/vae2_2.py` of Wan2.2): streaming encoder and decoder, caches as explicit state.
//!
//! The reference itself works chunk by chunk (one frame, then groups of four) with a cache per temporal convolution;
//! concatenating the chunks *is* the encode. So there is one text for both: [`encode`] and [`decode`] take one chunk
//! and the caches, and give the result and the new caches. A whole clip is a loop over them.
//!
//! A chunk is `[frames, channels, height, width]`, batch 1. A causal 3-D convolution is a 2-D convolution over
//! three time-shifted copies of the frames joined on the channel axis, so every backend with `Conv` runs it. A cache
//! always holds two frames (zeros at the start of a clip); that of a temporal downsampling holds one.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Ops};

/// Sizes of the autoencoder, and the statistics of its latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeConfig {
    /// Width of the encoder's first stage.
    pub base_dim: usize,
    /// Width of the decoder's last stage.
    pub decoder_base_dim: usize,
    /// Latent channels.
    pub z_dim: usize,
    /// Stage widths in multiples of the base.
    pub dim_mult: Vec<usize>,
    /// Residual blocks per encoder stage (the decoder has one more).
    pub num_res_blocks: usize,
    /// Which stages halve the frame rate; one entry less than `dim_mult`.
    pub temporal_downsample: Vec<bool>,
    /// Side of the pixel squares that become channels.
    pub patch_size: usize,
    /// Mean of each latent channel.
    pub latents_mean: Vec<f32>,
    /// Standard deviation of each latent channel.
    pub latents_std: Vec<f32>,
}

/// Mean of the 48 latent channels of Wan2.2 (`vae2_2.py`).
const WAN22_MEAN: [f32; 48] = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
];

/// Standard deviation of the 48 latent channels of Wan2.2 (`vae2_2.py`).
const WAN22_STD: [f32; 48] = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885,
    0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338,
    0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458,
    1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
];

/// One stage: widths, and what it does to space and time at its end.
#[derive(Clone, Copy, Debug)]
struct Stage {
    from: usize,
    to: usize,
    space: bool,
    time: bool,
}

impl VaeConfig {
    /// The published Wan2.2 autoencoder.
    #[must_use]
    pub fn wan22() -> Self {
        Self {
            base_dim: 160,
            decoder_base_dim: 256,
            z_dim: 48,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            temporal_downsample: vec![false, true, true],
            patch_size: 2,
            latents_mean: WAN22_MEAN.to_vec(),
            latents_std: WAN22_STD.to_vec(),
        }
    }

    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("base_dim", self.base_dim),
            ("decoder_base_dim", self.decoder_base_dim),
            ("z_dim", self.z_dim),
            ("num_res_blocks", self.num_res_blocks),
            ("patch_size", self.patch_size),
        ];
        ConfigError::check_sizes("vae", positive, 1 << 16)?;
        if self.dim_mult.is_empty()
            || self.dim_mult.len() > 8
            || self.dim_mult.iter().any(|m| *m == 0 || *m > 64)
        {
            let got = format!("{:?}", self.dim_mult);
            return Err(ConfigError::new("vae.dim_mult", got, "1 to 8 factors from 1 to 64"));
        }
        if self.temporal_downsample.len() + 1 != self.dim_mult.len() {
            return Err(ConfigError::new(
                "vae.temporal_downsample",
                format!("{} entries", self.temporal_downsample.len()),
                format!("one less than dim_mult's {}", self.dim_mult.len()),
            ));
        }
        for (name, values) in [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)] {
            if values.len() != self.z_dim || values.iter().any(|v| !v.is_finite()) {
                let got = format!("{} numbers", values.len());
                return Err(ConfigError::new(
                    format!("vae.{name}"),
                    got,
                    format!("{} finite numbers", self.z_dim),
                ));
            }
        }
        if self.latents_std.iter().any(|v| *v <= 0.0) {
            return Err(ConfigError::new("vae.latents_std", "not positive", "positive numbers"));
        }
        let fits = |s: &Stage, down: bool| {
            let factor = if s.space { 4 } else { 1 } * if s.time { 2 } else { 1 };
            if down { (s.from * factor).is_multiple_of(s.to) } else { (s.to * factor).is_multiple_of(s.from) }
        };
        if let Some(s) = self.encoder_stages().iter().find(|s| !fits(s, true)) {
            let got = format!("a step from {} to {} channels in the encoder", s.from, s.to);
            return Err(ConfigError::new(
                "vae.dim_mult",
                got,
                "channels that the averaging shortcut divides",
            ));
        }
        let ups = self.decoder_stages();
        if let Some(s) = ups.iter().filter(|s| s.space).find(|s| !fits(s, false)) {
            let got = format!("a step from {} to {} channels in the decoder", s.from, s.to);
            return Err(ConfigError::new(
                "vae.dim_mult",
                got,
                "channels that the repeating shortcut divides",
            ));
        }
        Ok(())
    }

    /// Image pixels per latent pixel, each way.
    #[must_use]
    pub fn spatial_factor(&self) -> usize {
        self.patch_size << (self.dim_mult.len() - 1)
    }

    /// Frames per latent after the first.
    #[must_use]
    pub fn temporal_factor(&self) -> usize {
        1 << self.temporal_downsample.iter().filter(|t| **t).count()
    }

    fn image_channels(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    fn encoder_stages(&self) -> Vec<Stage> {
        let last = self.dim_mult.len() - 1;
        let mut from = self.base_dim;
        let stage = |(i, m): (usize, &usize)| {
            let to = self.base_dim * m;
            let s = Stage { from, to, space: i < last, time: i < last && self.temporal_downsample[i] };
            from = to;
            s
        };
        self.dim_mult.iter().enumerate().map(stage).collect()
    }

    fn decoder_stages(&self) -> Vec<Stage> {
        let last = self.dim_mult.len() - 1;
        let mut from = self.decoder_base_dim * self.dim_mult[last];
        let stage = |(i, m): (usize, &usize)| {
            let to = self.decoder_base_dim * m;
            let s =
                Stage { from, to, space: i < last, time: i < last && self.temporal_downsample[last - 1 - i] };
            from = to;
            s
        };
        self.dim_mult.iter().rev().enumerate().map(stage).collect()
    }
}

/// Which part of the stream a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// The first frame (encoder) or latent (decoder): no past, temporal resampling skipped, caches not read.
    First,
    /// Any later group of frames or latent.
    Next,
}

/// Result of [`encode`].
pub struct Encoded<O: Ops> {
    /// Mean and log-variance `[1, 2 z, h, w]`.
    pub moments: O::Tensor,
    /// Normalised latent `[1, z, h, w]`: what the denoiser sees.
    pub latent: O::Tensor,
    /// New caches.
    pub caches: Vec<O::Tensor>,
}

/// Result of [`decode`].
pub struct Decoded<O: Ops> {
    /// Frames `[1 or temporal_factor, 3, H, W]`, nominally in `[-1, 1]`, not clamped.
    pub frames: O::Tensor,
    /// New caches.
    pub caches: Vec<O::Tensor>,
}

/// A walk through a network: the interpreter, the caches read so far and the caches written.
struct Walk<'a, O: Ops> {
    o: &'a mut O,
    chunk: Chunk,
    old: std::slice::Iter<'a, O::Tensor>,
    new: Vec<O::Tensor>,
    /// Height and width at this point.
    size: [usize; 2],
    /// Frames at this point.
    frames: usize,
}

impl<O: Ops> Walk<'_, O> {
    /// The cache of the next convolution; `None` in the first chunk.
    fn cache(&mut self) -> Option<O::Tensor> {
        match self.chunk {
            Chunk::First => None,
            Chunk::Next => Some(self.old.next().expect("as many caches as an earlier chunk gave").clone()),
        }
    }

    /// A zero frame `[1, channels, h, w]`.
    fn zeros(&mut self, channels: usize) -> O::Tensor {
        let [h, w] = self.size;
        self.o.constant(&[1, channels, h, w], vec![0.0; channels * h * w])
    }

    /// Weight `[co, ci, kt, kh, kw]` as `[co, kt * ci, kh, kw]`; in the first chunk only its last tap.
    fn weight(&mut self, name: &str, [co, ci, kt, k]: [usize; 4]) -> (O::Tensor, O::Tensor) {
        let w = self.o.param(&format!("{name}.weight"), &[co, ci, kt, k, k]);
        let b = self.o.param(&format!("{name}.bias"), &[co]);
        let w = self.o.permute(&w, &[0, 2, 1, 3, 4]);
        let (w, taps) = match self.chunk {
            Chunk::First if kt > 1 => (self.o.slice(&w, 1, -1, None), 1),
            _ => (w, kt),
        };
        let w = self.o.reshape(&w, &[co as i64, (taps * ci) as i64, k as i64, k as i64]);
        (w, b)
    }

    /// Causal convolution with kernel `(3, k, k)`.
    fn causal(&mut self, x: &O::Tensor, name: &str, ci: usize, co: usize, k: usize) -> O::Tensor {
        let (w, b) = self.weight(name, [co, ci, 3, k]);
        let pad = k / 2;
        let joined;
        let stacked = match self.cache() {
            None => {
                let zeros = self.zeros(ci);
                joined = self.o.concat(&[zeros, x.clone()], 0);
                x.clone()
            }
            Some(past) => {
                joined = self.o.concat(&[past, x.clone()], 0); // (2 + frames, ci, h, w)
                let n = self.frames as i64;
                let taps: Vec<_> = (0..3).map(|k| self.o.slice(&joined, 0, k, Some(k + n))).collect();
                self.o.concat(&taps, 1) // (frames, 3 * ci, h, w)
            }
        };
        let cache = self.o.slice(&joined, 0, -2, None);
        self.new.push(cache);
        self.o.conv2d(&stacked, &w, Some(&b), [1, 1], [pad; 4])
    }

    /// 2-D convolution, frame by frame.
    fn conv(
        &mut self,
        x: &O::Tensor,
        name: &str,
        [co, ci, k]: [usize; 3],
        stride: usize,
        pads: [usize; 4],
    ) -> O::Tensor {
        let w = self.o.param(&format!("{name}.weight"), &[co, ci, k, k]);
        let b = self.o.param(&format!("{name}.bias"), &[co]);
        self.o.conv2d(x, &w, Some(&b), [stride, stride], pads)
    }

    /// 1x1x1 convolution of a weight with five axes.
    fn pointwise(&mut self, x: &O::Tensor, name: &str, ci: usize, co: usize) -> O::Tensor {
        let w = self.o.param(&format!("{name}.weight"), &[co, ci, 1, 1, 1]);
        let w = self.o.reshape(&w, &[co as i64, ci as i64, 1, 1]);
        let b = self.o.param(&format!("{name}.bias"), &[co]);
        self.o.conv2d(x, &w, Some(&b), [1, 1], [0; 4])
    }

    /// Channel norm with a weight of `axes` axes.
    fn norm(&mut self, x: &O::Tensor, name: &str, channels: usize, axes: usize) -> O::Tensor {
        let mut shape = vec![1; axes];
        shape[0] = channels;
        let gamma = self.o.param(&format!("{name}.gamma"), &shape);
        let gamma = self.o.reshape(&gamma, &[channels as i64]);
        self.o.channel_norm(x, &gamma, channels)
    }

    fn residual(&mut self, x: &O::Tensor, name: &str, from: usize, to: usize) -> O::Tensor {
        let h = self.norm(x, &format!("{name}.norm1"), from, 4);
        let h = self.o.silu(&h);
        let h = self.causal(&h, &format!("{name}.conv1"), from, to, 3);
        let h = self.norm(&h, &format!("{name}.norm2"), to, 4);
        let h = self.o.silu(&h);
        let h = self.causal(&h, &format!("{name}.conv2"), to, to, 3);
        if from == to {
            self.o.add(&h, x)
        } else {
            let shortcut = self.pointwise(x, &format!("{name}.conv_shortcut"), from, to);
            self.o.add(&h, &shortcut)
        }
    }

    /// Attention over the pixels of each frame, one head.
    fn attention(&mut self, x: &O::Tensor, name: &str, c: usize) -> O::Tensor {
        let [h, w] = self.size;
        let (ci, hi, wi) = (c as i64, h as i64, w as i64);
        let y = self.norm(x, &format!("{name}.norm"), c, 3);
        let y = self.conv(&y, &format!("{name}.to_qkv"), [3 * c, c, 1], 1, [0; 4]);
        let y = self.o.reshape(&y, &[0, 3, ci, hi * wi]);
        let y = self.o.permute(&y, &[1, 0, 3, 2]); // (q k v, frame, pixel, channel)
        let mut part = |i: i64| {
            let p = self.o.slice(&y, 0, i, Some(i + 1));
            self.o.reshape(&p, &[-1, hi * wi, 1, ci])
        };
        let (q, k, v) = (part(0), part(1), part(2));
        let a = self.o.attention(&q, &k, &v, 1.0 / (c as f32).sqrt(), None, 1, c); // (frame, pixel, channel)
        let a = self.o.permute(&a, &[0, 2, 1]);
        let a = self.o.reshape(&a, &[0, 0, hi, wi]);
        let a = self.conv(&a, &format!("{name}.proj"), [c, c, 1], 1, [0; 4]);
        self.o.add(x, &a)
    }

    fn middle(&mut self, x: &O::Tensor, name: &str, c: usize) -> O::Tensor {
        let x = self.residual(x, &format!("{name}.resnets.0"), c, c);
        let x = self.attention(&x, &format!("{name}.attentions.0"), c);
        let x = self.residual(&x, &format!("{name}.resnets.1"), c, c);
        self.o.mark(name, &x);
        x
    }

    /// Halves height and width, and the frame rate where asked.
    fn downsample(&mut self, x: &O::Tensor, name: &str, c: usize, time: bool) -> O::Tensor {
        let x = self.conv(x, &format!("{name}.resample.1"), [c, c, 3], 2, [0, 0, 1, 1]);
        self.size = self.size.map(|s| s / 2);
        if !time {
            return x;
        }
        let past = self.cache();
        let cache = self.o.slice(&x, 0, -1, None);
        self.new.push(cache);
        let Some(past) = past else { return x };
        let (w, b) = self.weight(&format!("{name}.time_conv"), [c, c, 3, 1]);
        let frames = self.o.concat(&[past, x], 0); // (1 + frames, c, h, w)
        self.frames /= 2;
        let [h, w_] = self.size;
        let windows: Vec<_> = (0..self.frames as i64)
            .map(|i| {
                let three = self.o.slice(&frames, 0, 2 * i, Some(2 * i + 3));
                self.o.reshape(&three, &[1, 3 * c as i64, h as i64, w_ as i64])
            })
            .collect();
        let stacked = if windows.len() == 1 { windows[0].clone() } else { self.o.concat(&windows, 0) };
        self.o.conv2d(&stacked, &w, Some(&b), [1, 1], [0; 4])
    }

    /// Doubles the frame rate where asked (not in the first chunk), then height and width.
    fn upsample(&mut self, x: &O::Tensor, name: &str, c: usize, time: bool) -> O::Tensor {
        let [h, w] = self.size.map(|s| s as i64);
        let x = match (time, self.chunk) {
            (false, _) => x.clone(),
            (true, Chunk::First) => {
                let zero = self.zeros(c);
                let cache = self.o.concat(&[zero.clone(), zero], 0);
                self.new.push(cache);
                x.clone()
            }
            (true, Chunk::Next) => {
                let y = self.causal(x, &format!("{name}.time_conv"), c, 2 * c, 1); // (frames, 2 c, h, w)
                self.frames *= 2;
                self.o.reshape(&y, &[-1, c as i64, h, w]) // even frame, odd frame
            }
        };
        self.size = self.size.map(|s| s * 2);
        let x = self.o.upsample2(&x);
        self.conv(&x, &format!("{name}.resample.1"), [c, c, 3], 1, [1; 4])
    }

    /// Mean over groups of (channel, frame, row, column), zero frames put before an incomplete first group.
    fn average(&mut self, x: &O::Tensor, s: &Stage) -> O::Tensor {
        let (ft, fs) = (1 + usize::from(s.time), 1 + usize::from(s.space));
        let [h, w] = self.size;
        let missing = (ft - self.frames % ft) % ft;
        let x = if missing == 0 {
            x.clone()
        } else {
            let zeros = self.o.constant(&[missing, s.from, h, w], vec![0.0; missing * s.from * h * w]);
            self.o.concat(&[zeros, x.clone()], 0)
        };
        let i = |n: usize| n as i64;
        let x = self.o.reshape(&x, &[-1, i(ft), i(s.from), i(h / fs), i(fs), i(w / fs), i(fs)]);
        let x = self.o.permute(&x, &[0, 2, 1, 4, 6, 3, 5]); // (frame, channel, ft, fs, fs, h, w)
        let group = s.from * ft * fs * fs / s.to;
        let x = self.o.reshape(&x, &[-1, i(s.to), i(group), i(h / fs), i(w / fs)]);
        let x = self.o.mean(&x, 2);
        self.o.reshape(&x, &[-1, i(s.to), i(h / fs), i(w / fs)])
    }

    /// Repeats channels and spreads them over (frame, row, column); in the first chunk only the last frame stays.
    fn repeat(&mut self, x: &O::Tensor, s: &Stage) -> O::Tensor {
        let ft = 1 + usize::from(s.time);
        let [h, w] = self.size;
        let i = |n: usize| n as i64;
        let copies = s.to * ft * 4 / s.from;
        let x = self.o.reshape(x, &[-1, i(s.from), 1, i(h), i(w)]);
        let x = self.o.concat(&vec![x; copies], 2);
        let x = self.o.reshape(&x, &[-1, i(s.to), i(ft), 2, 2, i(h), i(w)]);
        let x = self.o.permute(&x, &[0, 2, 1, 5, 3, 6, 4]); // (frame, ft, channel, h, fs, w, fs)
        let x = self.o.reshape(&x, &[-1, i(s.to), i(2 * h), i(2 * w)]);
        if self.chunk == Chunk::First && ft > 1 { self.o.slice(&x, 0, ft as i64 - 1, None) } else { x }
    }

    /// A constant per latent channel, `[1, z, 1, 1]`.
    fn per_channel(&mut self, values: Vec<f32>) -> O::Tensor {
        self.o.constant(&[1, values.len(), 1, 1], values)
    }
}

/// Frames `[1 or temporal_factor, 3, H, W]` in `[-1, 1]` to one latent of height and width `latent`.
///
/// # Panics
/// If `caches` are fewer than an earlier chunk gave (in the first one they are not read).
pub fn encode<O: Ops>(
    o: &mut O,
    cfg: &VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    frames: &O::Tensor,
    caches: &[O::Tensor],
) -> Encoded<O> {
    let p = cfg.patch_size;
    let stages = cfg.encoder_stages();
    let size = latent.map(|s| s << (stages.len() - 1));
    let count = if chunk == Chunk::First { 1 } else { cfg.temporal_factor() };
    let i = |n: usize| n as i64;
    let x = o.reshape(frames, &[-1, 3, i(size[0]), i(p), i(size[1]), i(p)]);
    let x = o.permute(&x, &[0, 1, 5, 3, 2, 4]); // (frame, colour, column, row, h, w)
    let x = o.reshape(&x, &[-1, i(cfg.image_channels()), i(size[0]), i(size[1])]);
    o.mark("encoder.patchify", &x);
    let mut walk = Walk { o, chunk, old: caches.iter(), new: Vec::new(), size, frames: count };
    let mut x = walk.causal(&x, "encoder.conv_in", cfg.image_channels(), cfg.base_dim, 3);
    walk.o.mark("encoder.conv_in", &x);
    for (i, s) in stages.iter().enumerate() {
        let name = format!("encoder.down_blocks.{i}");
        let shortcut = walk.average(&x, s);
        walk.o.mark(&format!("{name}.avg_shortcut"), &shortcut);
        for r in 0..cfg.num_res_blocks {
            let from = if r == 0 { s.from } else { s.to };
            x = walk.residual(&x, &format!("{name}.resnets.{r}"), from, s.to);
        }
        if s.space {
            x = walk.downsample(&x, &format!("{name}.downsampler"), s.to, s.time);
        }
        x = walk.o.add(&x, &shortcut);
        walk.o.mark(&name, &x);
    }
    let top = cfg.base_dim * cfg.dim_mult[cfg.dim_mult.len() - 1];
    let z = cfg.z_dim;
    let x = walk.middle(&x, "encoder.mid_block", top);
    let x = walk.norm(&x, "encoder.norm_out", top, 4);
    let x = walk.o.silu(&x);
    let x = walk.causal(&x, "encoder.conv_out", top, 2 * z, 3);
    let moments = walk.pointwise(&x, "quant_conv", 2 * z, 2 * z);
    let mu = walk.o.slice(&moments, 1, 0, Some(i(z)));
    let mean = walk.per_channel(cfg.latents_mean.clone());
    let rate = walk.per_channel(cfg.latents_std.iter().map(|s| 1.0 / s).collect());
    let mu = walk.o.sub(&mu, &mean);
    let latent = walk.o.mul(&mu, &rate);
    Encoded { moments, latent, caches: walk.new }
}

/// A whole clip `[1 + k * temporal_factor, 3, H, W]` to its `1 + k` latents, each `[1, z, h, w]`: the loop over
/// [`encode`] in one graph. Frames that do not fill a group are ignored, as in the reference.
///
/// # Panics
/// If `frames` is 0 or more than the clip holds.
pub fn encode_clip<O: Ops>(
    o: &mut O,
    cfg: &VaeConfig,
    latent: [usize; 2],
    clip: &O::Tensor,
    frames: usize,
) -> Vec<O::Tensor> {
    let group = cfg.temporal_factor() as i64;
    let mut caches = Vec::new();
    let mut latents = Vec::new();
    for i in 0..1 + (frames as i64 - 1) / group {
        let (chunk, from, to) =
            if i == 0 { (Chunk::First, 0, 1) } else { (Chunk::Next, 1 + (i - 1) * group, 1 + i * group) };
        let x = o.slice(clip, 0, from, Some(to));
        let out = encode(o, cfg, latent, chunk, &x, &caches);
        caches = out.caches;
        latents.push(out.latent);
    }
    latents
}

/// One normalised latent `[1, z, h, w]` to frames.
///
/// # Panics
/// If `caches` are fewer than an earlier chunk gave (in the first one they are not read).
pub fn decode<O: Ops>(
    o: &mut O,
    cfg: &VaeConfig,
    latent: [usize; 2],
    chunk: Chunk,
    z: &O::Tensor,
    caches: &[O::Tensor],
) -> Decoded<O> {
    let i = |n: usize| n as i64;
    let stages = cfg.decoder_stages();
    let mut walk = Walk { o, chunk, old: caches.iter(), new: Vec::new(), size: latent, frames: 1 };
    let std = walk.per_channel(cfg.latents_std.clone());
    let mean = walk.per_channel(cfg.latents_mean.clone());
    let x = walk.o.mul(z, &std);
    let x = walk.o.add(&x, &mean);
    let x = walk.pointwise(&x, "post_quant_conv", cfg.z_dim, cfg.z_dim);
    let top = cfg.decoder_base_dim * cfg.dim_mult[cfg.dim_mult.len() - 1];
    let x = walk.causal(&x, "decoder.conv_in", cfg.z_dim, top, 3);
    walk.o.mark("decoder.conv_in", &x);
    let mut x = walk.middle(&x, "decoder.mid_block", top);
    for (i, s) in stages.iter().enumerate() {
        let name = format!("decoder.up_blocks.{i}");
        let shortcut = s.space.then(|| walk.repeat(&x, s));
        for r in 0..=cfg.num_res_blocks {
            let from = if r == 0 { s.from } else { s.to };
            x = walk.residual(&x, &format!("{name}.resnets.{r}"), from, s.to);
        }
        if let Some(shortcut) = shortcut {
            x = walk.upsample(&x, &format!("{name}.upsampler"), s.to, s.time);
            x = walk.o.add(&x, &shortcut);
        }
        walk.o.mark(&name, &x);
    }
    let bottom = cfg.decoder_base_dim * cfg.dim_mult[0];
    let x = walk.norm(&x, "decoder.norm_out", bottom, 4);
    let x = walk.o.silu(&x);
    let x = walk.causal(&x, "decoder.conv_out", bottom, cfg.image_channels(), 3);
    let p = cfg.patch_size;
    let [h, w] = walk.size;
    let x = walk.o.reshape(&x, &[-1, 3, i(p), i(p), i(h), i(w)]);
    let x = walk.o.permute(&x, &[0, 1, 4, 3, 5, 2]); // (frame, colour, h, row, w, column)
    let frames = walk.o.reshape(&x, &[-1, 3, i(h * p), i(w * p)]);
    Decoded { frames, caches: walk.new }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sizes() {
        let cfg = VaeConfig::wan22();
        assert_eq!(cfg.validate(), Ok(()));
        assert_eq!((cfg.spatial_factor(), cfg.temporal_factor()), (16, 4));
    }

    #[test]
    fn bad_sizes_are_named() {
        let good = VaeConfig::wan22;
        let cases = [
            (VaeConfig { z_dim: 0, ..good() }, "z_dim"),
            (VaeConfig { dim_mult: vec![], ..good() }, "dim_mult"),
            (VaeConfig { temporal_downsample: vec![true], ..good() }, "temporal_downsample"),
            (VaeConfig { latents_std: vec![0.0; 48], ..good() }, "latents_std"),
            (VaeConfig { dim_mult: vec![1, 3, 4, 4], ..good() }, "shortcut"),
        ];
        for (cfg, word) in cases {
            let error = cfg.validate().unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
