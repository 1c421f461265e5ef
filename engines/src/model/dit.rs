//! The diffusion transformer of the Wan2.2 family, with the Video4Spatial additions.
//!
//! One text for every size and use: joint forward (context and targets attend to each other), the one-way mask,
//! and its two cached halves [`forward`] with [`DitInputs::memory`] (context keys and values computed once).
//! Tokens keep the axes `(batch, frame, token, channel)`, so modulation is one row per frame, never per token.
//!
//! Source: Wan2.2 TI2V-5B (forward order, layouts), Video4Spatial sections 3 and 6 (context at t = 0, source
//! indices, gap of 50, Plücker rays).

use serde::{Deserialize, Serialize};

use super::{ConfigError, Ops};

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// `noise - clean` (Wan2.2).
    Velocity,
    /// The clean sample.
    X0,
}

/// What else the network is given of its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guide {
    /// Latents of remembered pictures that were carried into the targets' views, and how far they are to be trusted: the
    /// base of the prediction.
    Warp,
}

/// Sizes and options of a diffusion transformer; a new size is a TOML file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DitConfig {
    /// Latent channels in.
    pub in_channels: usize,
    /// Latent channels out.
    pub out_channels: usize,
    /// Latent height in latent pixels.
    pub latent_height: usize,
    /// Latent width in latent pixels.
    pub latent_width: usize,
    /// Patch height and width in latent pixels (the temporal patch is 1).
    pub patch: [usize; 2],
    /// Attention heads.
    pub heads: usize,
    /// Width of one head; the model width is `heads * head_dim`.
    pub head_dim: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Inner width of the feed-forward part.
    pub ffn_dim: usize,
    /// Width of the text rows.
    pub text_dim: usize,
    /// Number of text rows, padding included.
    pub text_len: usize,
    /// Width of the timestep sinusoid.
    pub freq_dim: usize,
    /// Epsilon of every norm.
    pub eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// What the output is.
    pub prediction: Prediction,
    /// Channels of the camera rays per token; 0 = no camera conditioning.
    #[serde(default)]
    pub camera_channels: usize,
    /// Adds the mean of the embedded text rows to the timestep embedding.
    #[serde(default)]
    pub pooled_text: bool,
    /// Pose, mask and location heads.
    #[serde(default)]
    pub lift: bool,
    /// Attribute logits per token (training only, not exported); 0 = none.
    #[serde(default)]
    pub attributes: usize,
    /// What else the network is given of its targets; nothing by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guide: Option<Guide>,
}

impl DitConfig {
    /// The smallest member, with nothing switched on: what other small ones are written as changes of.
    pub const SMALLEST: Self = Self {
        in_channels: 1,
        out_channels: 1,
        latent_height: 1,
        latent_width: 1,
        patch: [1, 1],
        heads: 1,
        head_dim: 2,
        layers: 1,
        ffn_dim: 1,
        text_dim: 1,
        text_len: 1,
        freq_dim: 2,
        eps: 1e-6,
        rope_theta: 10_000.0,
        prediction: Prediction::X0,
        camera_channels: 0,
        pooled_text: false,
        lift: false,
        attributes: 0,
        guide: None,
    };

    /// Model width.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Token rows and columns of one latent frame.
    #[must_use]
    pub fn grid(&self) -> [usize; 2] {
        [self.latent_height / self.patch[0], self.latent_width / self.patch[1]]
    }

    /// Tokens of one latent frame.
    #[must_use]
    pub fn tokens_per_frame(&self) -> usize {
        let [h, w] = self.grid();
        h * w
    }

    /// Values that a guide has for one token: those of its carried latents in the order (row, column, channel), and how
    /// far they are to be trusted, 0 to 1. 0 where there is no guide.
    #[must_use]
    pub fn guide_channels(&self) -> usize {
        self.guide.map_or(0, |Guide::Warp| self.out_channels * self.patch[0] * self.patch[1] + 1)
    }

    /// Widths of the temporal, vertical and horizontal parts of a head: `h = w = 2 * (head_dim / 6)`, the rest is
    /// temporal.
    #[must_use]
    pub fn rotary_split(&self) -> [usize; 3] {
        let hw = 2 * (self.head_dim / 6);
        [self.head_dim - 2 * hw, hw, hw]
    }

    /// Rotary cosines and sines `[frames * tokens, head_dim / 2]` at explicit temporal indices; rows and columns
    /// count from the top-left token.
    #[must_use]
    pub fn rotary_tables(&self, t_index: &[f64]) -> (Vec<f32>, Vec<f32>) {
        let [rows, cols] = self.grid();
        let split = self.rotary_split();
        let n = t_index.len() * rows * cols * self.head_dim / 2;
        let (mut cos, mut sin) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for t in t_index {
            for y in 0..rows {
                for x in 0..cols {
                    for (width, position) in split.into_iter().zip([*t, y as f64, x as f64]) {
                        for j in 0..width / 2 {
                            let angle = position * self.rope_theta.powf(-2.0 * j as f64 / width as f64);
                            cos.push(angle.cos() as f32);
                            sin.push(angle.sin() as f32);
                        }
                    }
                }
            }
        }
        (cos, sin)
    }

    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_height", self.latent_height),
            ("latent_width", self.latent_width),
            ("patch[0]", self.patch[0]),
            ("patch[1]", self.patch[1]),
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("layers", self.layers),
            ("ffn_dim", self.ffn_dim),
            ("text_dim", self.text_dim),
            ("text_len", self.text_len),
            ("freq_dim", self.freq_dim),
        ];
        ConfigError::check_sizes("dit", positive, 1 << 20)?;
        for (name, value) in [("dit.head_dim", self.head_dim), ("dit.freq_dim", self.freq_dim)] {
            if !value.is_multiple_of(2) {
                return Err(ConfigError::new(name, value, "an even number"));
            }
        }
        if !self.latent_height.is_multiple_of(self.patch[0])
            || !self.latent_width.is_multiple_of(self.patch[1])
        {
            return Err(ConfigError::new(
                "dit.latent_height, dit.latent_width",
                format!("{}, {}", self.latent_height, self.latent_width),
                format!("multiples of the patch's {} and {}", self.patch[0], self.patch[1]),
            ));
        }
        if self.guide.is_some() && self.prediction != Prediction::X0 {
            return Err(ConfigError::new(
                "dit.guide",
                "\"warp\" with prediction = \"velocity\"",
                "prediction = \"x0\": what is carried is clean",
            ));
        }
        Ok(())
    }
}

/// Inputs of one forward pass.
pub struct DitInputs<'a, O: Ops> {
    /// Latents `[batch, in_channels, frames, latent_height, latent_width]`.
    pub latents: &'a O::Tensor,
    /// Sinusoids of the distinct timesteps `[rows, freq_dim]`.
    pub time: &'a O::Tensor,
    /// Row of every frame `[batch, frames]`.
    pub rows: &'a O::Index,
    /// Which batch entry each timestep row belongs to, `[rows]`; needed with `pooled_text` only.
    pub row_batch: Option<&'a O::Index>,
    /// Text rows `[batch, text_len, text_dim]`.
    pub text: &'a O::Tensor,
    /// Rotary tables `[frames * tokens, head_dim / 2]`.
    pub cos: &'a O::Tensor,
    /// See `cos`.
    pub sin: &'a O::Tensor,
    /// Camera rays `[batch, frames, tokens, camera_channels]`.
    pub camera: Option<&'a O::Tensor>,
    /// Carried latents and their trust `[batch, frames, tokens, guide_channels]`, zero where there are none.
    pub guide: Option<&'a O::Tensor>,
    /// Added to the self-attention scores, broadcasting to `[batch, heads, queries, keys]`; a large negative value
    /// where a query may not look.
    pub bias: Option<&'a O::Tensor>,
    /// Keys and values of earlier tokens, one pair per block, `[batch, tokens, heads, head_dim]`, put before our own.
    pub memory: Option<&'a [(O::Tensor, O::Tensor)]>,
}

/// Results of one forward pass.
pub struct DitOutputs<O: Ops> {
    /// `[batch, out_channels, frames, latent_height, latent_width]`.
    pub sample: O::Tensor,
    /// Lift heads, when configured.
    pub lift: Option<LiftOutputs<O>>,
    /// This pass's own keys (rotated) and values per block, `[batch, tokens, heads, head_dim]`.
    pub memory: Vec<(O::Tensor, O::Tensor)>,
}

/// Outputs of the lift heads; meanings in [`crate::denoise::Denoised`].
pub struct LiftOutputs<O: Ops> {
    /// `[batch, frames, 4]`.
    pub pose: O::Tensor,
    /// `[batch, frames, tokens, 1]`.
    pub mask: O::Tensor,
    /// `[batch, frames, tokens, 2]`.
    pub locate: O::Tensor,
    /// `[batch, frames, tokens, attributes]`, training only.
    pub attributes: Option<O::Tensor>,
}

/// A linear layer by name.
pub fn dense<O: Ops>(o: &mut O, x: &O::Tensor, name: &str, from: usize, to: usize) -> O::Tensor {
    let w = o.param(&format!("{name}.weight"), &[to, from]);
    let b = o.param(&format!("{name}.bias"), &[to]);
    o.linear(x, &w, Some(&b))
}

/// Shift, scale and gate rows of one table, each `[batch, frames, 1, dim]`.
fn modulation<O: Ops>(
    o: &mut O,
    table: &str,
    count: usize,
    dim: usize,
    rows: &O::Tensor,
    index: &O::Index,
) -> Vec<O::Tensor> {
    let table = o.param(table, &[1, count, dim]);
    let all = o.add(rows, &table); // (rows, count, dim)
    (0..count as i64)
        .map(|i| {
            let one = o.slice(&all, 1, i, Some(i + 1)); // (rows, 1, dim)
            o.gather(&one, index) // (batch, frames, 1, dim)
        })
        .collect()
}

/// The forward pass. One function, though a long one: it is the network's definition, read from top to bottom, and each
/// step hands its tensors to the next.
///
/// # Panics
/// When an input's shape disagrees with the configuration, or camera rays / `row_batch` are missing where the
/// configuration asks for them.
pub fn forward<O: Ops>(o: &mut O, cfg: &DitConfig, inputs: &DitInputs<O>) -> DitOutputs<O> {
    let (dim, tokens) = (cfg.dim(), cfg.tokens_per_frame());
    let (heads, head_dim, eps) = (cfg.heads, cfg.head_dim, cfg.eps);
    let [rows, cols] = cfg.grid();
    let [ph, pw] = cfg.patch;

    // Patch embedding: a linear layer over (channel, row, column) of each patch.
    let patch_in = cfg.in_channels * ph * pw;
    let i = |n: usize| n as i64;
    let x = o.reshape(inputs.latents, &[0, i(cfg.in_channels), -1, i(rows), i(ph), i(cols), i(pw)]);
    let x = o.permute(&x, &[0, 2, 3, 5, 1, 4, 6]); // (batch, frame, rows, cols, channel, ph, pw)
    let x = o.reshape(&x, &[0, 0, i(tokens), i(patch_in)]);
    let w = o.param("patch_embedding.weight", &[dim, cfg.in_channels, 1, ph, pw]);
    let w = o.reshape(&w, &[i(dim), i(patch_in)]);
    let b = o.param("patch_embedding.bias", &[dim]);
    let mut x = o.linear(&x, &w, Some(&b)); // (batch, frame, token, dim)
    if cfg.camera_channels > 0 {
        let rays = inputs.camera.expect("the configuration has camera conditioning: rays must be given");
        let rays = dense(o, rays, "camera_embedding", cfg.camera_channels, dim);
        x = o.add(&x, &rays);
    }
    let guide = (cfg.guide_channels() > 0)
        .then(|| inputs.guide.expect("the configuration has a guide: it must be given"));
    if let Some(guide) = guide {
        // Without a bias: no guide, no difference.
        let w = o.param("guide.embedding.weight", &[dim, cfg.guide_channels()]);
        let guide = o.linear(guide, &w, None);
        x = o.add(&x, &guide);
    }
    o.mark("patch_embed", &x);

    // Text, then time: the time rows may carry the pooled text.
    let text = dense(o, inputs.text, "condition_embedder.text_embedder.linear_1", cfg.text_dim, dim);
    let text = o.gelu_tanh(&text);
    let text = dense(o, &text, "condition_embedder.text_embedder.linear_2", dim, dim);
    o.mark("text_embed", &text);
    let temb = dense(o, inputs.time, "condition_embedder.time_embedder.linear_1", cfg.freq_dim, dim);
    let temb = o.silu(&temb);
    let mut temb = dense(o, &temb, "condition_embedder.time_embedder.linear_2", dim, dim); // (rows, dim)
    if cfg.pooled_text {
        let row_batch = inputs.row_batch.expect("the configuration pools text: row_batch must be given");
        let pooled = o.mean(&text, 1);
        let pooled = o.reshape(&pooled, &[-1, i(dim)]);
        let pooled = dense(o, &pooled, "condition_embedder.text_pool", dim, dim);
        let pooled = o.gather(&pooled, row_batch);
        temb = o.add(&temb, &pooled);
    }
    let time = o.silu(&temb);
    let time = dense(o, &time, "condition_embedder.time_proj", dim, 6 * dim);
    let time = o.reshape(&time, &[-1, 6, i(dim)]); // (rows, 6, dim)

    let mut memory = Vec::with_capacity(cfg.layers);
    let self_scale = 1.0 / (head_dim as f32).sqrt();
    for layer in 0..cfg.layers {
        let name = |part: &str| format!("blocks.{layer}.{part}");
        let m = modulation(o, &name("scale_shift_table"), 6, dim, &time, inputs.rows);
        let [shift_1, scale_1, gate_1, shift_2, scale_2, gate_2] = m.as_slice() else {
            unreachable!("six rows were asked for");
        };
        let split = [0, -1, i(heads), i(head_dim)];

        // Self-attention over all frames.
        let h = o.modulated_norm(&x, shift_1, scale_1, eps);
        let q = dense(o, &h, &name("attn1.to_q"), dim, dim);
        let k = dense(o, &h, &name("attn1.to_k"), dim, dim);
        let v = dense(o, &h, &name("attn1.to_v"), dim, dim);
        let w = o.param(&name("attn1.norm_q.weight"), &[dim]);
        let q = o.rms_norm(&q, &w, eps);
        let w = o.param(&name("attn1.norm_k.weight"), &[dim]);
        let k = o.rms_norm(&k, &w, eps);
        let q = o.reshape(&q, &split);
        let k = o.reshape(&k, &split);
        let v = o.reshape(&v, &split);
        let q = o.rotate(&q, inputs.cos, inputs.sin, heads, head_dim);
        let k = o.rotate(&k, inputs.cos, inputs.sin, heads, head_dim);
        let (all_k, all_v) = match inputs.memory {
            Some(m) => {
                (o.concat(&[m[layer].0.clone(), k.clone()], 1), o.concat(&[m[layer].1.clone(), v.clone()], 1))
            }
            None => (k.clone(), v.clone()),
        };
        let a = o.attention(&q, &all_k, &all_v, self_scale, inputs.bias, heads, head_dim);
        let a = dense(o, &a, &name("attn1.to_out.0"), dim, dim);
        let a = o.reshape(&a, &[0, -1, i(tokens), i(dim)]);
        o.mark(&name("attn1"), &a);
        x = o.gated_add(&x, &a, gate_1);
        memory.push((k, v));

        // Cross-attention to the text: its own affine norm, no rotation, no gate.
        let h = o.layer_norm(&x, eps);
        let w = o.param(&name("norm2.weight"), &[dim]);
        let b = o.param(&name("norm2.bias"), &[dim]);
        let h = o.mul(&h, &w);
        let h = o.add(&h, &b);
        let q = dense(o, &h, &name("attn2.to_q"), dim, dim);
        let k = dense(o, &text, &name("attn2.to_k"), dim, dim);
        let v = dense(o, &text, &name("attn2.to_v"), dim, dim);
        let w = o.param(&name("attn2.norm_q.weight"), &[dim]);
        let q = o.rms_norm(&q, &w, eps);
        let w = o.param(&name("attn2.norm_k.weight"), &[dim]);
        let k = o.rms_norm(&k, &w, eps);
        let q = o.reshape(&q, &split);
        let k = o.reshape(&k, &split);
        let v = o.reshape(&v, &split);
        let a = o.attention(&q, &k, &v, self_scale, None, heads, head_dim);
        let a = dense(o, &a, &name("attn2.to_out.0"), dim, dim);
        let a = o.reshape(&a, &[0, -1, i(tokens), i(dim)]);
        o.mark(&name("attn2"), &a);
        x = o.add(&x, &a);

        // Feed-forward.
        let h = o.modulated_norm(&x, shift_2, scale_2, eps);
        let h = dense(o, &h, &name("ffn.net.0.proj"), dim, cfg.ffn_dim);
        let h = o.gelu_tanh(&h);
        let h = dense(o, &h, &name("ffn.net.2"), cfg.ffn_dim, dim);
        o.mark(&name("ffn"), &h);
        x = o.gated_add(&x, &h, gate_2);
        o.mark(&name("out"), &x);
    }

    // Head: the time embedding itself modulates, then patches go back to pixels.
    let temb = o.reshape(&temb, &[-1, 1, i(dim)]);
    let m = modulation(o, "scale_shift_table", 2, dim, &temb, inputs.rows);
    let y = o.modulated_norm(&x, &m[0], &m[1], eps);
    let tokens_out = dense(o, &y, "proj_out", dim, cfg.out_channels * ph * pw);
    o.mark("proj_out", &tokens_out);
    let y = match guide {
        Some(guide) => guided(o, cfg, guide, &y, &tokens_out),
        None => tokens_out,
    };
    let y = o.reshape(&y, &[0, 0, i(rows), i(cols), i(ph), i(pw), i(cfg.out_channels)]);
    let y = o.permute(&y, &[0, 6, 1, 2, 4, 3, 5]); // (batch, channel, frame, rows, ph, cols, pw)
    let sample = o.reshape(&y, &[0, 0, -1, i(cfg.latent_height), i(cfg.latent_width)]);

    let lift = cfg.lift.then(|| lift_heads(o, cfg, &x));
    DitOutputs { sample, lift, memory }
}

/// Carried latents as the base of the prediction: `x0 = y + g ((c - y)(1 + trust) + correction)`, with the network's own
/// prediction `y`, carried latents `c` and their trust `g`. Fresh weights of `trust` and `correction` are zero: what was
/// carried where it was seen, the network elsewhere. Where `g` is zero the network predicts alone, exactly.
fn guided<O: Ops>(
    o: &mut O,
    cfg: &DitConfig,
    guide: &O::Tensor,
    hidden: &O::Tensor,
    y: &O::Tensor,
) -> O::Tensor {
    let values = cfg.guide_channels() - 1;
    let carried = o.slice(guide, 3, 0, Some(values as i64));
    let g = o.slice(guide, 3, values as i64, None);
    let trust = dense(o, hidden, "guide.trust", cfg.dim(), 1);
    let trust = o.offset(&trust, 1.0);
    let correction = dense(o, hidden, "guide.correction", cfg.dim(), values);
    let toward = o.sub(&carried, y);
    let toward = o.mul(&toward, &trust);
    let toward = o.add(&toward, &correction);
    let toward = o.mul(&toward, &g);
    o.add(y, &toward)
}

/// Pose per frame, mask and location per token, read from the last block's tokens `[batch, frame, token, dim]`.
fn lift_heads<O: Ops>(o: &mut O, cfg: &DitConfig, x: &O::Tensor) -> LiftOutputs<O> {
    let dim = cfg.dim();
    let h = o.layer_norm(x, cfg.eps);
    let token = dense(o, &h, "lift.token", dim, dim);
    let token = o.silu(&token);
    let mask = dense(o, &token, "lift.mask", dim, 1);
    let locate = dense(o, &token, "lift.locate", dim, 2);
    let attributes = (cfg.attributes > 0).then(|| dense(o, &token, "lift.attributes", dim, cfg.attributes));
    let frame = o.mean(&h, 2); // (batch, frame, 1, dim)
    let frame = o.reshape(&frame, &[0, 0, dim as i64]);
    let frame = dense(o, &frame, "lift.frame", dim, dim);
    let frame = o.silu(&frame);
    let pose = dense(o, &frame, "lift.pose", dim, 4);
    LiftOutputs { pose, mask, locate, attributes }
}
