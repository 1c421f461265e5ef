//! The depth reader: how far away is what one picture shows, pixel by pixel.
//!
//! A small transformer over square patches with learned positions: the training camera stands at one height and pitch,
//! so that a place in the picture says much about the distance of the floor there. It gives the logarithm of the planar
//! depth (metres along the optical axis), so that errors count in shares of the distance.

use serde::{Deserialize, Serialize};

use super::dit::dense;
use super::{ConfigError, Ops};

/// Sizes of a depth reader.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DepthConfig {
    /// Picture height in pixels, a multiple of `patch`.
    pub height: usize,
    /// Picture width in pixels, a multiple of `patch`.
    pub width: usize,
    /// Side of a patch in pixels; one token each.
    pub patch: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of one head; the model width is `heads * head_dim`.
    pub head_dim: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Inner width of the feed-forward part.
    pub ffn_dim: usize,
    /// Epsilon of every norm.
    pub eps: f32,
}

/// Depth that fresh weights give (m): its logarithm is added to the output, so that training begins near the truth.
pub const TYPICAL_DEPTH_M: f32 = 2.0;

impl DepthConfig {
    /// Model width.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Pixels of a picture.
    #[must_use]
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("height", self.height),
            ("width", self.width),
            ("patch", self.patch),
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("layers", self.layers),
            ("ffn_dim", self.ffn_dim),
        ];
        ConfigError::check_sizes("depth", sizes, 1 << 12)?;
        if !self.height.is_multiple_of(self.patch) || !self.width.is_multiple_of(self.patch) {
            return Err(ConfigError::new(
                "depth.width, depth.height",
                format!("{}, {}", self.width, self.height),
                format!("whole numbers of {}-pixel patches", self.patch),
            ));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(ConfigError::new("depth.eps", self.eps, "a positive number"));
        }
        Ok(())
    }
}

/// Logarithms of planar depth in metres, `[pictures, height, width]`, of RGB pictures `[pictures, 3, height, width]` in
/// [-1, 1].
///
/// # Panics
/// When the pictures have another size than the configuration.
pub fn log_depth<O: Ops>(o: &mut O, cfg: &DepthConfig, pictures: &O::Tensor) -> O::Tensor {
    let (dim, p, heads, head_dim) = (cfg.dim(), cfg.patch, cfg.heads, cfg.head_dim);
    let (rows, cols) = (cfg.height / p, cfg.width / p);
    let i = |n: usize| n as i64;
    let x = o.reshape(pictures, &[0, 3, i(rows), i(p), i(cols), i(p)]);
    let x = o.permute(&x, &[0, 2, 4, 1, 3, 5]); // (picture, rows, cols, channel, p, p)
    let x = o.reshape(&x, &[0, i(rows * cols), i(3 * p * p)]);
    let x = dense(o, &x, "patch_embedding", 3 * p * p, dim);
    let position = o.param("position", &[1, rows * cols, dim]);
    let mut x = o.add(&x, &position);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for layer in 0..cfg.layers {
        let name = |part: &str| format!("blocks.{layer}.{part}");
        let h = o.layer_norm(&x, cfg.eps);
        let mut branch = |part: &str, normed: bool| {
            let y = dense(o, &h, &name(&format!("attn1.to_{part}")), dim, dim);
            let y = if normed {
                let w = o.param(&name(&format!("attn1.norm_{part}.weight")), &[dim]);
                o.rms_norm(&y, &w, cfg.eps)
            } else {
                y
            };
            o.reshape(&y, &[0, 0, i(heads), i(head_dim)])
        };
        let (q, k, v) = (branch("q", true), branch("k", true), branch("v", false));
        let a = o.attention(&q, &k, &v, scale, None, heads, head_dim);
        let a = dense(o, &a, &name("attn1.to_out.0"), dim, dim);
        x = o.add(&x, &a);
        let h = o.layer_norm(&x, cfg.eps);
        let h = dense(o, &h, &name("ffn.net.0.proj"), dim, cfg.ffn_dim);
        let h = o.gelu_tanh(&h);
        let h = dense(o, &h, &name("ffn.net.2"), cfg.ffn_dim, dim);
        x = o.add(&x, &h);
        o.mark(&name("out"), &x);
    }
    let y = o.layer_norm(&x, cfg.eps);
    let y = dense(o, &y, "proj_out", dim, p * p);
    let y = o.offset(&y, TYPICAL_DEPTH_M.ln());
    let y = o.reshape(&y, &[0, i(rows), i(cols), i(p), i(p)]);
    let y = o.permute(&y, &[0, 1, 3, 2, 4]);
    o.reshape(&y, &[0, i(cfg.height), i(cfg.width)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_sizes_are_named() {
        let good = DepthConfig {
            height: 32,
            width: 48,
            patch: 4,
            heads: 2,
            head_dim: 8,
            layers: 1,
            ffn_dim: 16,
            eps: 1e-6,
        };
        good.validate().unwrap();
        let cases = [
            (DepthConfig { layers: 0, ..good.clone() }, "depth.layers = 0"),
            (DepthConfig { width: 50, ..good.clone() }, "50, 32: expected whole numbers of 4-pixel patches"),
            (DepthConfig { eps: f32::NAN, ..good.clone() }, "depth.eps = NaN"),
            (DepthConfig { heads: 1 << 20, ..good }, "depth.heads = 1048576"),
        ];
        for (config, word) in cases {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
