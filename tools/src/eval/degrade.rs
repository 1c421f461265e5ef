//! Pictures made as unlike the truth as others are, to see what a measure makes of that alone.

use mindseye::context::GROUP;
use mindseye::image::RgbImage;
use mindseye_world::Rng;

use super::picture::{psnr, squared_difference};

/// Halvings of the interval in which the strength is looked for.
const HALVINGS: usize = 24;

/// PSNR (dB) of a drive's frames (the first image four times, then groups of four) against the images of the true
/// drive, over all images after the first.
#[must_use]
pub fn drive_psnr(frames: &[RgbImage], truth: &[RgbImage]) -> f64 {
    let pairs = frames.iter().skip(GROUP).zip(truth.iter().skip(1));
    let (mut sum, mut n) = (0.0, 0.0f64);
    for (a, b) in pairs {
        sum += squared_difference(a, b);
        n += 1.0;
    }
    psnr(sum / n.max(1.0))
}

/// Frames blurred (Gaussian) until their PSNR against the truth is `psnr` dB; as they are when it is lower already,
/// blurred to one colour when blur does not bring it so low.
#[must_use]
pub fn blurred_to(frames: &[RgbImage], truth: &[RgbImage], psnr: f64) -> Vec<RgbImage> {
    weakest(frames, truth, psnr, 64.0, |frames, sigma| {
        frames.iter().map(|f| if sigma > 0.0 { blurred(f, sigma) } else { f.clone() }).collect()
    })
}

/// The same with normal noise, drawn from `seed`.
#[must_use]
pub fn noisy_to(frames: &[RgbImage], truth: &[RgbImage], psnr: f64, seed: u64) -> Vec<RgbImage> {
    weakest(frames, truth, psnr, 512.0, |frames, sigma| {
        let mut rng = Rng::new(seed ^ 0x4015e);
        let mut one = |f: &RgbImage| {
            let data = f.data.iter().map(|v| (f64::from(*v) + sigma * rng.normal()).round());
            RgbImage { data: data.map(|v| v.clamp(0.0, 255.0) as u8).collect(), ..*f }
        };
        frames.iter().map(&mut one).collect()
    })
}

/// What the weakest strength in `0..=most` makes of the frames that brings their PSNR down to `wanted` dB.
fn weakest(
    frames: &[RgbImage],
    truth: &[RgbImage],
    wanted: f64,
    most: f64,
    degrade: impl Fn(&[RgbImage], f64) -> Vec<RgbImage>,
) -> Vec<RgbImage> {
    if drive_psnr(frames, truth) <= wanted {
        return frames.to_vec();
    }
    let (mut low, mut high) = (0.0, most);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if drive_psnr(&degrade(frames, middle), truth) > wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    degrade(frames, high)
}

/// Gaussian blur with a standard deviation in pixels; pixels beyond the edge do not count.
fn blurred(image: &RgbImage, sigma: f64) -> RgbImage {
    let (w, h) = (image.width, image.height);
    let weight = |d: usize| (-0.5 * (d as f64 / sigma).powi(2)).exp();
    let plane: Vec<f64> = image.data.iter().map(|v| f64::from(*v)).collect();
    let pass = |from: &[f64], along: usize, stride: usize| -> Vec<f64> {
        let mut out = vec![0.0; from.len()];
        for (at, out) in out.iter_mut().enumerate() {
            let i = at / 3 / stride % along;
            let (mut sum, mut all) = (0.0, 0.0);
            for j in 0..along {
                let k = weight(i.abs_diff(j));
                sum += k * from[at - 3 * stride * i + 3 * stride * j];
                all += k;
            }
            *out = sum / all;
        }
        out
    };
    let rows = pass(&plane, w, 1);
    let both = pass(&rows, h, w);
    RgbImage { data: both.into_iter().map(|v| v.round().clamp(0.0, 255.0) as u8).collect(), ..*image }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive() -> (Vec<RgbImage>, Vec<RgbImage>) {
        let image = |k: usize| {
            let data = (0..24 * 16 * 3).map(|i| ((i / 3 % 24 * 10 + k * 3) ^ (i / 72 * 5)) as u8).collect();
            RgbImage { width: 24, height: 16, data }
        };
        let truth: Vec<RgbImage> = (0..9).map(image).collect();
        let frames = vec![truth[0].clone(); 3].into_iter().chain(truth.clone()).collect();
        (frames, truth)
    }

    #[test]
    fn blur_and_noise_reach_the_wanted_likeness() {
        let (frames, truth) = drive();
        assert_eq!(drive_psnr(&frames, &truth), 60.0);
        for wanted in [30.0, 22.0] {
            for (what, got) in [
                ("blur", blurred_to(&frames, &truth, wanted)),
                ("noise", noisy_to(&frames, &truth, wanted, 5)),
            ] {
                let reached = drive_psnr(&got, &truth);
                assert!((reached - wanted).abs() < 0.2, "{what}: {reached} dB instead of {wanted}");
            }
        }
        // Already as unlike: left alone.
        assert_eq!(blurred_to(&frames, &truth, 60.0), frames);
        assert_eq!(noisy_to(&frames, &truth, 22.0, 5), noisy_to(&frames, &truth, 22.0, 5));
    }

    #[test]
    fn blur_of_one_bright_pixel_by_hand() {
        let mut image = RgbImage::filled(3, 1, [0, 0, 0]);
        image.data[3..6].copy_from_slice(&[200, 100, 0]);
        let k = (-0.5f64).exp();
        let (side, middle) = (k / (1.0 + k + (-2.0f64).exp()), 1.0 / (1.0 + 2.0 * k));
        let wanted = [
            200.0 * side,
            100.0 * side,
            0.0,
            200.0 * middle,
            100.0 * middle,
            0.0,
            200.0 * side,
            100.0 * side,
            0.0,
        ];
        for (got, wanted) in blurred(&image, 1.0).data.iter().zip(wanted) {
            assert!((f64::from(*got) - wanted).abs() <= 0.5, "{got} instead of {wanted}");
        }
    }
}
