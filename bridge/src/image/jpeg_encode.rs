//! JPEG, for pictures that people look at.

use jpeg_encoder::{ColorType, Encoder};
use mindseye_base::picture::RgbImage;

/// The picture as a JPEG file's bytes (baseline; 4:2:0 below quality 90), `quality` from 1 to 100 as the Independent JPEG
/// Group counts it. `None` for a picture with a side of zero or above 65 535, or whose pixels do not fit its size.
#[must_use]
pub fn encode_jpeg(picture: &RgbImage, quality: u8) -> Option<Vec<u8>> {
    let RgbImage { width, height, data } = picture;
    let (w, h) = (u16::try_from(*width).ok()?, u16::try_from(*height).ok()?);
    let mut out = Vec::new();
    Encoder::new(&mut out, quality.clamp(1, 100)).encode(data, w, h, ColorType::Rgb).ok()?;
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Limits, decode_compressed_rgb8};

    #[test]
    fn another_decoder_reads_what_was_drawn() {
        // Sizes that are no multiples of a unit, smooth colours with an edge, and noise.
        let mut random = mindseye_base::random::Rng::new(5);
        for (width, height, noise, worst) in [(1, 1, 0.0, 6.0), (37, 21, 0.0, 8.0), (64, 48, 60.0, 40.0)] {
            let mut data = Vec::new();
            for i in 0..width * height {
                let (x, y) = ((i % width) as f64, (i / width) as f64);
                let edge = if x > y { 60.0 } else { 0.0 };
                for value in [40.0 + 2.0 * x, 200.0 - 3.0 * y, 90.0 + edge] {
                    data.push((value + noise * (random.unit() - 0.5)).clamp(0.0, 255.0) as u8);
                }
            }
            let picture = RgbImage::from_rgb(width, height, data).unwrap();
            let mut sizes = Vec::new();
            for quality in [95, 40] {
                let file = encode_jpeg(&picture, quality).unwrap();
                let mut decoded = Vec::new();
                let size = decode_compressed_rgb8(&file, &Limits::default(), &mut decoded).unwrap();
                assert_eq!((size.width as usize, size.height as usize), (width, height));
                let luma = |rgb: &[u8]| {
                    0.299 * f64::from(rgb[0]) + 0.587 * f64::from(rgb[1]) + 0.114 * f64::from(rgb[2])
                };
                let pairs = picture.data.chunks(3).zip(decoded.chunks(3));
                let squares: f64 = pairs.map(|(a, b)| (luma(a) - luma(b)).powi(2)).sum();
                let off = (squares / (width * height) as f64).sqrt();
                assert!(
                    off < worst * if quality == 95 { 0.35 } else { 1.0 },
                    "{width}x{height} at {quality}: {off}"
                );
                sizes.push(file.len());
            }
            assert!(sizes[1] <= sizes[0], "{sizes:?}");
        }
    }

    #[test]
    fn a_picture_without_a_size_is_none() {
        assert!(encode_jpeg(&RgbImage { width: 0, height: 3, data: Vec::new() }, 80).is_none());
        assert!(encode_jpeg(&RgbImage { width: 2, height: 2, data: vec![0; 11] }, 80).is_none());
        assert!(encode_jpeg(&RgbImage::filled(65_536, 1, [0; 3]), 80).is_none());
    }
}
