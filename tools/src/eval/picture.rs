//! How alike pictures are, and how much a video moves.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use mindseye::image::RgbImage;
use mindseye_engines::backend::{DataType, Dim, Engine, PrepareOptions, Session, Tensor, by_name};

/// Mean squared difference of two pictures of one size, in 8-bit values squared.
#[must_use]
pub fn squared_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let n = a.data.len().max(1) as f64;
    a.data.iter().zip(&b.data).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>() / n
}

/// Peak signal-to-noise ratio (dB) of a mean squared difference; at most 60.
#[must_use]
pub fn psnr(mse: f64) -> f64 {
    (10.0 * (255.0f64 * 255.0 / mse.max(1e-9)).log10()).min(60.0)
}

/// Luma (BT.601), 0..255.
fn luma(image: &RgbImage) -> Vec<f64> {
    image
        .data
        .chunks_exact(3)
        .map(|p| 0.299 * f64::from(p[0]) + 0.587 * f64::from(p[1]) + 0.114 * f64::from(p[2]))
        .collect()
}

/// Structural similarity of the luma (Wang et al. 2004) with a flat window of 7x7 pixels, the mean over all windows
/// inside the picture; constants (0.01 · 255)² and (0.03 · 255)². Pictures smaller than the window give one window.
#[must_use]
pub fn ssim(a: &RgbImage, b: &RgbImage) -> f64 {
    const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
    const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);
    let (w, h) = (a.width, a.height);
    if (b.width, b.height) != (w, h) || w == 0 || h == 0 {
        return f64::NAN;
    }
    let (x, y) = (luma(a), luma(b));
    let (kw, kh) = (7.min(w), 7.min(h));
    let (mut sum, mut count) = (0.0, 0.0);
    for top in 0..=h - kh {
        for left in 0..=w - kw {
            let (mut sx, mut sy, mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0);
            for r in top..top + kh {
                for c in left..left + kw {
                    let (p, q) = (x[r * w + c], y[r * w + c]);
                    sx += p;
                    sy += q;
                    xx += p * p;
                    yy += q * q;
                    xy += p * q;
                }
            }
            let n = (kw * kh) as f64;
            let (mx, my) = (sx / n, sy / n);
            let (vx, vy, cov) = (xx / n - mx * mx, yy / n - my * my, xy / n - mx * my);
            sum += ((2.0 * mx * my + C1) * (2.0 * cov + C2)) / ((mx * mx + my * my + C1) * (vx + vy + C2));
            count += 1.0;
        }
    }
    sum / count
}

/// Mean absolute difference of neighbouring pictures, 0..1, the mean over all pairs; 0 for fewer than two.
#[must_use]
pub fn motion(frames: &[RgbImage]) -> f64 {
    let pairs: Vec<f64> = frames
        .windows(2)
        .map(|p| {
            let n = p[0].data.len().max(1) as f64 * 255.0;
            p[0].data.iter().zip(&p[1].data).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / n
        })
        .collect();
    if pairs.is_empty() { 0.0 } else { pairs.iter().sum::<f64>() / pairs.len() as f64 }
}

/// A learned perceptual distance from an ONNX file: two inputs `[1, 3, height, width]` of RGB in -1..1, one output
/// with one value (the usual export of LPIPS).
#[derive(Clone)]
pub struct Lpips {
    engine: Arc<dyn Engine>,
    names: [String; 2],
    output: String,
    /// Height and width that the graph wants; pictures are enlarged to it.
    size: Option<(usize, usize)>,
}

/// Enlargement of pictures where the graph takes any size: its convolutions shrink a picture 16 to 32 times.
const LPIPS_LEAST_SIDE: usize = 128;

impl Lpips {
    /// Opens the file on the embedded backend.
    ///
    /// # Errors
    /// A file that cannot be loaded, or a graph of another form.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let context = || format!("--lpips {}", path.display());
        let engine = by_name("rten")?
            .prepare(path, &PrepareOptions::default().with_threads(1))
            .with_context(context)?;
        let (inputs, outputs) = (engine.inputs().to_vec(), engine.outputs().to_vec());
        let picture = |dims: &[Dim]| {
            dims.len() == 4 && matches!(dims[1], Dim::Fixed(3) | Dim::Symbol(_) | Dim::Unknown)
        };
        let fits = inputs.len() == 2
            && !outputs.is_empty()
            && inputs.iter().all(|p| p.dtype == DataType::F32 && picture(&p.shape));
        if !fits {
            let got: Vec<String> = inputs.iter().map(mindseye_engines::backend::describe).collect();
            bail!(
                "{}: expected two f32 inputs [1, 3, height, width] and one output, got inputs {}",
                context(),
                got.join(", ")
            );
        }
        let fixed = |d: &Dim| match d {
            Dim::Fixed(n) => Some(*n),
            _ => None,
        };
        let size = fixed(&inputs[0].shape[2]).zip(fixed(&inputs[0].shape[3]));
        let names = [inputs[0].name.clone(), inputs[1].name.clone()];
        Ok(Self { engine, names, output: outputs[0].name.clone(), size })
    }

    /// A session for one thread.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn session(&self) -> anyhow::Result<LpipsSession> {
        Ok(LpipsSession { session: self.engine.session()?, shared: self.clone() })
    }
}

/// See [`Lpips::session`].
pub struct LpipsSession {
    session: Box<dyn Session>,
    shared: Lpips,
}

impl LpipsSession {
    /// The distance of two pictures of one size.
    ///
    /// # Errors
    /// When the backend fails or gives no number.
    pub fn distance(&mut self, a: &RgbImage, b: &RgbImage) -> anyhow::Result<f64> {
        let zoom = LPIPS_LEAST_SIDE.div_ceil(a.width.min(a.height).max(1));
        let (h, w) = self.shared.size.unwrap_or((a.height * zoom, a.width * zoom));
        let tensor = |image: &RgbImage| {
            let mut out = vec![0.0; 3 * h * w];
            for c in 0..3 {
                for y in 0..h {
                    for x in 0..w {
                        let at = (y * image.height / h * image.width + x * image.width / w) * 3 + c;
                        out[(c * h + y) * w + x] = f32::from(image.data[at]) / 127.5 - 1.0;
                    }
                }
            }
            Tensor::f32(&[1, 3, h, w], out)
        };
        let (x, y) = (tensor(a), tensor(b));
        let mut out = Tensor::empty();
        let inputs = [(self.shared.names[0].as_str(), &x), (self.shared.names[1].as_str(), &y)];
        self.session.run_into(&inputs, &mut [(self.shared.output.as_str(), &mut out)])?;
        let value =
            out.as_f32().and_then(|v| v.first().copied()).context("--lpips: the graph gave no number")?;
        Ok(f64::from(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(shift: usize, noise: usize) -> RgbImage {
        let (width, height) = (24, 16);
        let data = (0..width * height * 3)
            .map(|i| {
                let (p, c) = (i / 3, i % 3);
                let (x, y) = (p % width, p / width);
                ((x + shift) * 9 + y * 3 + c * 11 + (p * 7919 % 13) * noise).min(255) as u8
            })
            .collect();
        RgbImage { width, height, data }
    }

    #[test]
    fn likeness_has_its_known_ends() {
        let a = ramp(0, 0);
        assert_eq!(psnr(squared_difference(&a, &a)), 60.0);
        assert!((psnr(255.0 * 255.0)).abs() < 1e-9);
        assert!((ssim(&a, &a) - 1.0).abs() < 1e-12);
        let (near, far) = (ssim(&a, &ramp(0, 1)), ssim(&a, &ramp(0, 6)));
        assert!(1.0 > near && near > far, "{near} {far}");
        let flat = RgbImage { data: vec![90; a.data.len()], ..a.clone() };
        assert!(ssim(&a, &flat) < 0.6, "no structure left: {}", ssim(&a, &flat));
    }

    #[test]
    fn stills_do_not_move() {
        let a = ramp(0, 0);
        assert_eq!(motion(&[a.clone(), a.clone()]), 0.0);
        assert_eq!(motion(&[]), 0.0);
        let moved = motion(&[a, ramp(1, 0)]);
        assert!((moved - 9.0 / 255.0).abs() < 3e-3, "{moved}");
    }
}
