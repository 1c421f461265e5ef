//! The umT5 text encoder (`wan/modules/t5.py` of Wan2.2): token ids to text rows.
//!
//! Pre-norm blocks, RMS norms, no biases, no attention scale, and a relative-position table in *every* layer. With
//! `num_layers = 0` what remains is the embedding and the final norm: the small model's text encoder.
//!
//! What depends on length and mask is computed on the host ([`host_inputs`]), so the graph itself holds no sizes.

use serde::{Deserialize, Serialize};

use super::{ConfigError, Ops};

/// Added to the score of a padded key.
pub const MASKED: f32 = -1e9;

/// Sizes of a umT5 encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Umt5Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of a text row.
    pub d_model: usize,
    /// Width of one head.
    pub d_kv: usize,
    /// Inner width of the feed-forward part.
    pub d_ff: usize,
    /// Blocks; 0 is allowed.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Relative-position buckets.
    pub buckets: usize,
    /// Distance from which on all positions share a bucket.
    pub max_distance: usize,
    /// Epsilon of the norms.
    pub eps: f32,
}

impl Umt5Config {
    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [("vocab_size", self.vocab_size), ("d_model", self.d_model)];
        let inner = [
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_heads", self.num_heads),
            ("buckets", self.buckets),
            ("max_distance", self.max_distance),
        ];
        let inner = inner.into_iter().filter(|_| self.num_layers > 0);
        ConfigError::check_sizes("umt5", sizes.into_iter().chain(inner), 1 << 24)?;
        let exact = self.buckets / 4;
        if self.num_layers > 0 && (!self.buckets.is_multiple_of(4) || self.max_distance <= exact) {
            return Err(ConfigError::new(
                "umt5.buckets",
                format!("{} with max_distance {}", self.buckets, self.max_distance),
                "a multiple of 4, and max_distance more than a quarter of it",
            ));
        }
        Ok(())
    }

    /// Bucket of the relative position `key - query`.
    #[must_use]
    pub fn bucket(&self, key_minus_query: i64) -> usize {
        let side = self.buckets / 2;
        let exact = side / 2;
        let base = if key_minus_query > 0 { side } else { 0 };
        let distance = usize::try_from(key_minus_query.unsigned_abs()).unwrap_or(usize::MAX);
        if distance < exact {
            return base + distance;
        }
        // In f32, as the original computes it.
        let log = (distance as f32 / exact as f32).ln();
        let whole = (self.max_distance as f64 / exact as f64).ln() as f32;
        let far = exact + (log / whole * (side - exact) as f32) as usize;
        base + far.min(side - 1)
    }

    /// Buckets `[length, length]` (query, key).
    #[must_use]
    pub fn bucket_table(&self, length: usize) -> Vec<usize> {
        if self.num_layers == 0 {
            return vec![0; length * length];
        }
        (0..length * length).map(|i| self.bucket((i % length) as i64 - (i / length) as i64)).collect()
    }
}

/// Inputs of the encoder.
pub struct Umt5Inputs<'a, O: Ops> {
    /// Token ids `[batch, length]`.
    pub ids: &'a O::Index,
    /// Relative-position buckets `[length, length]` (query, key).
    pub buckets: &'a O::Index,
    /// `[batch, 1, 1, length]`: 0 for a token, very negative for padding.
    pub mask_bias: &'a O::Tensor,
    /// `[batch, length, 1]`: 1 for a token, 0 for padding.
    pub keep: &'a O::Tensor,
}

/// Results of the encoder.
pub struct Umt5Outputs<O: Ops> {
    /// `[batch, length, d_model]`, padded rows included.
    pub hidden: O::Tensor,
    /// The same with padded rows set to zero: what the denoiser takes.
    pub rows: O::Tensor,
}

/// Mask inputs on the host: `mask_bias` and `keep` from the number of tokens in each batch entry.
#[must_use]
pub fn host_inputs(lengths: &[usize], length: usize) -> (Vec<f32>, Vec<f32>) {
    let mut bias = Vec::with_capacity(lengths.len() * length);
    let mut keep = Vec::with_capacity(lengths.len() * length);
    for used in lengths {
        for at in 0..length {
            bias.push(if at < *used { 0.0 } else { MASKED });
            keep.push(if at < *used { 1.0 } else { 0.0 });
        }
    }
    (bias, keep)
}

/// The forward pass.
pub fn encode<O: Ops>(o: &mut O, cfg: &Umt5Config, inputs: &Umt5Inputs<O>) -> Umt5Outputs<O> {
    let (d, heads, head_dim) = (cfg.d_model, cfg.num_heads, cfg.d_kv);
    let inner = heads * head_dim;
    let table = o.param("shared.weight", &[cfg.vocab_size, d]);
    let mut x = o.gather(&table, inputs.ids); // (batch, length, d)
    for layer in 0..cfg.num_layers {
        let name = |part: &str| format!("encoder.block.{layer}.layer.{part}.weight");
        let weight = o.param(&name("0.layer_norm"), &[d]);
        let h = o.rms_norm(&x, &weight, cfg.eps);
        let mut project = |part: &str| {
            let w = o.param(&name(&format!("0.SelfAttention.{part}")), &[inner, d]);
            let y = o.linear(&h, &w, None);
            o.reshape(&y, &[0, 0, heads as i64, head_dim as i64])
        };
        let (q, k, v) = (project("q"), project("k"), project("v"));
        let positions = o.param(&name("0.SelfAttention.relative_attention_bias"), &[cfg.buckets, heads]);
        let positions = o.gather(&positions, inputs.buckets); // (query, key, heads)
        let positions = o.permute(&positions, &[2, 0, 1]);
        o.mark(&format!("encoder.block.{layer}.positions"), &positions);
        let bias = o.add(&positions, inputs.mask_bias); // (batch, heads, query, key)
        let a = o.attention(&q, &k, &v, 1.0, Some(&bias), heads, head_dim);
        let w = o.param(&name("0.SelfAttention.o"), &[d, inner]);
        let a = o.linear(&a, &w, None);
        x = o.add(&x, &a);

        let weight = o.param(&name("1.layer_norm"), &[d]);
        let h = o.rms_norm(&x, &weight, cfg.eps);
        let w = o.param(&name("1.DenseReluDense.wi_0"), &[cfg.d_ff, d]);
        let gate = o.linear(&h, &w, None);
        let gate = o.gelu_tanh(&gate);
        let w = o.param(&name("1.DenseReluDense.wi_1"), &[cfg.d_ff, d]);
        let h = o.linear(&h, &w, None);
        let h = o.mul(&gate, &h);
        let w = o.param(&name("1.DenseReluDense.wo"), &[d, cfg.d_ff]);
        let h = o.linear(&h, &w, None);
        x = o.add(&x, &h);
        o.mark(&format!("encoder.block.{layer}.out"), &x);
    }
    let weight = o.param("encoder.final_layer_norm.weight", &[d]);
    let hidden = o.rms_norm(&x, &weight, cfg.eps);
    let rows = o.mul(&hidden, inputs.keep);
    Umt5Outputs { hidden, rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Umt5Config {
        Umt5Config {
            vocab_size: 10,
            d_model: 8,
            d_kv: 4,
            d_ff: 6,
            num_layers: 1,
            num_heads: 2,
            buckets: 32,
            max_distance: 128,
            eps: 1e-6,
        }
    }

    #[test]
    fn buckets_at_the_edges() {
        let cases = [
            (0, 0),
            (-1, 1),
            (1, 17),
            (-7, 7),
            (-8, 8),
            (8, 24),
            (-16, 10),
            (127, 31),
            (-128, 15),
            (5000, 31),
        ];
        for (r, bucket) in cases {
            assert_eq!(config().bucket(r), bucket, "{r}");
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert!(config().validate().is_ok());
        assert!(Umt5Config { d_ff: 0, ..config() }.validate().unwrap_err().field.contains("d_ff"));
        let only_embedding =
            Umt5Config { num_layers: 0, d_ff: 0, d_kv: 0, num_heads: 0, buckets: 0, ..config() };
        assert!(only_embedding.validate().is_ok());
    }
}
