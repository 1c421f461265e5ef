//! The small model's video codec: a linear map of `4 x s x s` pixel blocks, grouped in time like the Wan VAE.
//!
//! Latent 0 holds the first frame (repeated four times), latent `k` the frames `4k-3 ..= 4k`. Every block of four
//! frames, three channels and `s x s` pixels is one vector of `12 s s` values in the order (frame, channel, row,
//! column); its latent is `scale * basis * (block - mean)` with orthonormal rows in `basis` (principal components
//! of blocks of training frames), so that `mean + basis^T * latent / scale` is the best linear reconstruction.
//!
//! The codec keeps no state: unlike the VAE it needs no caches between groups.

use crate::model::{ConfigError, Ops};

/// Name of the basis among the weights: `[channels, 12 * block * block]`, orthonormal rows.
pub const BASIS: &str = "codec.basis";
/// Name of the mean block among the weights: `[12 * block * block]`.
pub const MEAN: &str = "codec.mean";

/// Frames per latent.
pub const GROUP: usize = 4;

/// Sizes of a linear codec.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearCodecConfig {
    /// Side of a block in pixels (`s`).
    pub block: usize,
    /// Latent channels.
    pub channels: usize,
    /// Image height in pixels, a multiple of `block`.
    pub height: usize,
    /// Image width in pixels, a multiple of `block`.
    pub width: usize,
    /// Factor on all latents (brings them to unit variance).
    pub scale: f32,
}

impl LinearCodecConfig {
    /// Says what is wrong with the sizes, if anything.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("block", self.block),
            ("channels", self.channels),
            ("height", self.height),
            ("width", self.width),
        ];
        ConfigError::check_sizes("codec", sizes, 1 << 20)?;
        if !self.height.is_multiple_of(self.block) || !self.width.is_multiple_of(self.block) {
            return Err(ConfigError::new(
                "codec.width, codec.height",
                format!("{}, {}", self.width, self.height),
                format!("whole numbers of {}-pixel blocks", self.block),
            ));
        }
        if self.channels > self.block_values() {
            return Err(ConfigError::new(
                "codec.channels",
                self.channels,
                format!("at most the {} values of a block", self.block_values()),
            ));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(ConfigError::new("codec.scale", self.scale, "a positive number"));
        }
        Ok(())
    }

    /// Values in one block: `4 * 3 * s * s`.
    #[must_use]
    pub fn block_values(&self) -> usize {
        GROUP * 3 * self.block * self.block
    }

    /// Latent height and width.
    #[must_use]
    pub fn latent_size(&self) -> (usize, usize) {
        (self.height / self.block, self.width / self.block)
    }
}

/// Frames `[b, 4, 3, H, W]` in `[-1, 1]` to latents `[b, C, 1, H/s, W/s]`.
pub fn encode<O: Ops>(ops: &mut O, config: &LinearCodecConfig, frames: &O::Tensor) -> O::Tensor {
    let (h, w) = config.latent_size();
    let (s, c, k) = (config.block as i64, config.channels as i64, config.block_values() as i64);
    let (h, w) = (h as i64, w as i64);
    let basis = ops.param(BASIS, &[config.channels, config.block_values()]);
    let mean = ops.param(MEAN, &[config.block_values()]);
    let x = ops.reshape(frames, &[-1, 12, h, s, w, s]); // (b, frame * channel, h, row, w, col)
    let x = ops.permute(&x, &[0, 2, 4, 1, 3, 5]); // (b, h, w, frame * channel, row, col)
    let x = ops.reshape(&x, &[-1, h * w, k]);
    let x = ops.sub(&x, &mean);
    let x = ops.linear(&x, &basis, None); // (b, h * w, c)
    let x = if config.scale == 1.0 { x } else { ops.scale(&x, config.scale) };
    let x = ops.permute(&x, &[0, 2, 1]);
    ops.reshape(&x, &[-1, c, 1, h, w])
}

/// Latents `[b, C, 1, H/s, W/s]` to frames `[b, 4, 3, H, W]`, not clamped.
pub fn decode<O: Ops>(ops: &mut O, config: &LinearCodecConfig, latent: &O::Tensor) -> O::Tensor {
    let (h, w) = config.latent_size();
    let (s, c) = (config.block as i64, config.channels as i64);
    let (h, w) = (h as i64, w as i64);
    let basis = ops.param(BASIS, &[config.channels, config.block_values()]);
    let mean = ops.param(MEAN, &[config.block_values()]);
    let transposed = ops.permute(&basis, &[1, 0]); // (k, c)
    let x = ops.reshape(latent, &[-1, c, h * w]);
    let x = ops.permute(&x, &[0, 2, 1]); // (b, h * w, c)
    let x = if config.scale == 1.0 { x } else { ops.scale(&x, 1.0 / config.scale) };
    let x = ops.linear(&x, &transposed, Some(&mean)); // (b, h * w, k)
    let x = ops.reshape(&x, &[-1, h, w, 12, s, s]);
    let x = ops.permute(&x, &[0, 3, 1, 4, 2, 5]); // (b, 12, h, row, w, col)
    ops.reshape(&x, &[-1, 4, 3, h * s, w * s])
}

/// The same codec in plain loops, for data preparation.
#[derive(Clone, Debug)]
pub struct LinearCodec {
    config: LinearCodecConfig,
    basis: Vec<f32>,
    mean: Vec<f32>,
}

impl LinearCodec {
    /// A codec from its weights: `basis[C, 12 s s]`, `mean[12 s s]`, row-major.
    ///
    /// # Errors
    /// [`ConfigError`] naming the size that does not fit.
    pub fn new(config: LinearCodecConfig, basis: Vec<f32>, mean: Vec<f32>) -> Result<Self, ConfigError> {
        config.validate()?;
        let k = config.block_values();
        for (name, got, wanted) in [(BASIS, basis.len(), config.channels * k), (MEAN, mean.len(), k)] {
            if got != wanted {
                return Err(ConfigError::new(name, format!("{got} values"), format!("{wanted} values")));
            }
        }
        Ok(Self { config, basis, mean })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &LinearCodecConfig {
        &self.config
    }

    /// Cuts `frames[4, 3, H, W]` into blocks `[H/s * W/s, 12 s s]`.
    ///
    /// # Panics
    /// If `frames` does not hold four images.
    #[must_use]
    pub fn blocks(config: &LinearCodecConfig, frames: &[f32]) -> Vec<f32> {
        let (s, width) = (config.block, config.width);
        let (h, w) = config.latent_size();
        let plane = config.height * width;
        assert_eq!(frames.len(), 12 * plane, "four RGB images are needed");
        let mut out = Vec::with_capacity(frames.len());
        for by in 0..h {
            for bx in 0..w {
                for image_channel in 0..12 {
                    for row in 0..s {
                        let at = image_channel * plane + (by * s + row) * width + bx * s;
                        out.extend_from_slice(&frames[at..at + s]);
                    }
                }
            }
        }
        out
    }

    /// Four frames `[4, 3, H, W]` in `[-1, 1]` to one latent `[C, H/s, W/s]`.
    ///
    /// # Panics
    /// If `frames` does not hold four images.
    #[must_use]
    pub fn encode_group(&self, frames: &[f32]) -> Vec<f32> {
        let (h, w) = self.config.latent_size();
        let k = self.config.block_values();
        let mut blocks = Self::blocks(&self.config, frames);
        let mut out = vec![0.0; self.config.channels * h * w];
        for (cell, block) in blocks.chunks_exact_mut(k).enumerate() {
            for (v, m) in block.iter_mut().zip(&self.mean) {
                *v -= m;
            }
            for (c, row) in self.basis.chunks_exact(k).enumerate() {
                out[c * h * w + cell] = self.config.scale * dot(row, block);
            }
        }
        out
    }

    /// The first frame `[3, H, W]` of a clip to its latent `[C, H/s, W/s]`.
    ///
    /// # Panics
    /// If `frame` is not one image.
    #[must_use]
    pub fn encode_first(&self, frame: &[f32]) -> Vec<f32> {
        self.encode_group(&frame.repeat(GROUP))
    }

    /// One latent `[C, H/s, W/s]` to four frames `[4, 3, H, W]`, not clamped.
    ///
    /// # Panics
    /// If `latent` has another size.
    #[must_use]
    pub fn decode_group(&self, latent: &[f32]) -> Vec<f32> {
        let (s, width) = (self.config.block, self.config.width);
        let (h, w) = self.config.latent_size();
        let k = self.config.block_values();
        let plane = self.config.height * width;
        assert_eq!(latent.len(), self.config.channels * h * w, "one latent is needed");
        let mut out = vec![0.0; 12 * plane];
        let mut block = vec![0.0; k];
        for cell in 0..h * w {
            block.copy_from_slice(&self.mean);
            for (c, row) in self.basis.chunks_exact(k).enumerate() {
                let z = latent[c * h * w + cell] / self.config.scale;
                for (v, b) in block.iter_mut().zip(row) {
                    *v += z * b;
                }
            }
            let (by, bx) = (cell / w, cell % w);
            for (line, values) in block.chunks_exact(s).enumerate() {
                let (image_channel, row) = (line / s, line % s);
                let at = image_channel * plane + (by * s + row) * width + bx * s;
                out[at..at + s].copy_from_slice(values);
            }
        }
        out
    }
}

/// Dot product in eight running sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (head_a, tail_a) = a.split_at(a.len() / 8 * 8);
    let (head_b, tail_b) = b.split_at(head_a.len());
    for (x, y) in head_a.chunks_exact(8).zip(head_b.chunks_exact(8)) {
        for i in 0..8 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().sum::<f32>() + tail_a.iter().zip(tail_b).map(|(x, y)| x * y).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codec() -> LinearCodec {
        // Rows of the identity: channel c keeps value c of every block.
        let config = LinearCodecConfig { block: 2, channels: 48, height: 4, width: 6, scale: 0.5 };
        let k = config.block_values();
        let mut basis = vec![0.0; config.channels * k];
        for c in 0..config.channels {
            basis[c * k + c] = 1.0;
        }
        LinearCodec::new(config, basis, (0..k).map(|i| i as f32 / 100.0).collect()).unwrap()
    }

    #[test]
    fn block_order_is_frame_channel_row_column() {
        let codec = codec();
        let frames: Vec<f32> = (0..4 * 3 * 4 * 6).map(|i| i as f32).collect();
        let z = codec.encode_group(&frames);
        // channel 17 = frame 1, colour 1, row 0, column 1; cell (1, 2) starts at pixel (2, 4)
        let pixel = ((3 + 1) * 4 + 2) * 6 + 5;
        assert_eq!(z[17 * 6 + 5], 0.5 * (pixel as f32 - 0.17));
    }

    #[test]
    fn a_full_basis_reconstructs() {
        let codec = codec();
        let frames: Vec<f32> = (0..288).map(|i| ((i * 37 % 101) as f32) / 50.0 - 1.0).collect();
        let back = codec.decode_group(&codec.encode_group(&frames));
        let worst = frames.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn bad_sizes_are_named() {
        let good = LinearCodecConfig { block: 2, channels: 4, height: 4, width: 6, scale: 1.0 };
        let cases = [
            (LinearCodecConfig { block: 0, ..good }, "block"),
            (LinearCodecConfig { width: 7, ..good }, "7, 4"),
            (LinearCodecConfig { channels: 49, ..good }, "codec.channels = 49"),
            (LinearCodecConfig { scale: f32::NAN, ..good }, "scale"),
        ];
        for (config, word) in cases {
            let error = config.validate().unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
