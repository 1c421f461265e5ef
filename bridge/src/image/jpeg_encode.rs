//! Baseline JPEG (ITU-T T.81), for pictures that people look at: 4:2:0, the standard tables.

use super::jpeg::STANDARD;
use mindseye_base::picture::RgbImage;

/// T.81, tables K.1 and K.2: steps of the quantiser at quality 50, rows of rising frequency.
const STEPS: [[u8; 64]; 2] = [
    [
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14,
        17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49,
        64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ],
    [
        17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47,
        66, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
        99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    ],
];

/// Places of a block's coefficients in the order in which they are written (T.81, figure A.6).
fn zigzag() -> [usize; 64] {
    let mut order: [usize; 64] = std::array::from_fn(|i| i);
    // Along each diagonal upward and downward by turns.
    order.sort_by_key(|at| {
        let (x, y) = (at % 8, at / 8);
        (x + y, if (x + y) % 2 == 0 { x } else { y })
    });
    order
}

/// The picture as a JPEG file's bytes, `quality` from 1 to 100 as the Independent JPEG Group counts it. `None` for a
/// picture with a side of zero or above 65 535, or whose pixels do not fit its size.
#[must_use]
pub fn encode_jpeg(picture: &RgbImage, quality: u8) -> Option<Vec<u8>> {
    let RgbImage { width, height, data } = picture;
    let (w, h) = (u16::try_from(*width).ok()?.to_be_bytes(), u16::try_from(*height).ok()?.to_be_bytes());
    if *width == 0 || *height == 0 || data.len() != width * height * 3 {
        return None;
    }
    let scale = match u32::from(quality.clamp(1, 100)) {
        q @ ..50 => 5000 / q,
        q => 200 - 2 * q,
    };
    let steps = STEPS.map(|table| table.map(|s| ((u32::from(s) * scale + 50) / 100).clamp(1, 255) as u8));
    let order = zigzag();

    let mut out = vec![0xff, 0xd8];
    let mut segment = |code: u8, content: &[u8]| {
        out.extend([0xff, code]);
        out.extend((content.len() as u16 + 2).to_be_bytes());
        out.extend(content);
    };
    segment(0xe0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0");
    for (i, table) in steps.iter().enumerate() {
        let in_order: Vec<u8> = std::iter::once(i as u8).chain(order.map(|at| table[at])).collect();
        segment(0xdb, &in_order);
    }
    segment(0xc0, &[8, h[0], h[1], w[0], w[1], 3, 1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1]);
    for table in &STANDARD {
        segment(0xc4, &[&[table.class][..], &table.lengths, table.values].concat());
    }
    segment(0xda, &[3, 1, 0x00, 2, 0x11, 3, 0x11, 0, 63, 0]);

    let codes = STANDARD.each_ref().map(|table| Codes::of(&table.lengths, table.values));
    let mut scan = Scan { cosines: cosines(), order, bits: Bits { out, held: 0, count: 0 } };
    let mut before = [0; 3];
    for (top, left) in (0..*height).step_by(16).flat_map(|y| (0..*width).step_by(16).map(move |x| (y, x))) {
        let [luma, blue, red] = unit(picture, left, top);
        let quarter = |x: usize, y: usize| std::array::from_fn(|i| luma[(y + i / 8) * 16 + x + i % 8]);
        for (x, y) in [(0, 0), (8, 0), (0, 8), (8, 8)] {
            before[0] = scan.block(&quarter(x, y), &steps[0], before[0], [&codes[0], &codes[1]]);
        }
        for (i, plane) in [(1, &blue), (2, &red)] {
            // The mean of four pixels each.
            let at = |i: usize| 2 * (i / 8) * 16 + 2 * (i % 8);
            let block = std::array::from_fn(|i| {
                [0, 1, 16, 17].map(|next| plane[at(i) + next]).iter().sum::<f32>() / 4.0
            });
            before[i] = scan.block(&block, &steps[1], before[i], [&codes[2], &codes[3]]);
        }
    }
    let mut out = scan.bits.end();
    out.extend([0xff, 0xd9]);
    Some(out)
}

/// 16 x 16 pixels as luminance and two chrominances about zero; beyond the picture its last pixels go on.
fn unit(picture: &RgbImage, left: usize, top: usize) -> [[f32; 256]; 3] {
    let mut planes = [[0.0; 256]; 3];
    for i in 0..256 {
        let (x, y) = ((left + i % 16).min(picture.width - 1), (top + i / 16).min(picture.height - 1));
        let [r, g, b] = picture.pixel(x, y).map(f32::from);
        let luma = 0.299 * r + 0.587 * g + 0.114 * b;
        planes[0][i] = luma - 128.0;
        planes[1][i] = 0.564 * (b - luma);
        planes[2][i] = 0.713 * (r - luma);
    }
    planes
}

/// `[frequency][place]` of the one-dimensional transform.
fn cosines() -> [[f32; 8]; 8] {
    std::array::from_fn(|u| {
        let norm = if u == 0 { 0.125f32.sqrt() } else { 0.5 };
        std::array::from_fn(|x| norm * ((2 * x + 1) as f32 * u as f32 * std::f32::consts::PI / 16.0).cos())
    })
}

/// Code and length in bits by value.
struct Codes([(u16, u8); 256]);

impl Codes {
    /// T.81, annex C: codes of one length follow each other, a longer one begins where the shorter ones end.
    fn of(lengths: &[u8; 16], values: &[u8]) -> Self {
        let (mut codes, mut next, mut values) = ([(0, 0); 256], 0u16, values.iter());
        for (length, count) in (1u8..).zip(lengths) {
            for value in values.by_ref().take(usize::from(*count)) {
                codes[usize::from(*value)] = (next, length);
                next += 1;
            }
            next <<= 1;
        }
        Self(codes)
    }
}

/// Bits in a scan's bytes: a byte of ones is followed by a byte of zeros.
struct Bits {
    out: Vec<u8>,
    held: u32,
    count: u8,
}

impl Bits {
    fn put(&mut self, bits: u16, count: u8) {
        self.held = (self.held << count) | u32::from(bits);
        self.count += count;
        while self.count >= 8 {
            self.count -= 8;
            let byte = (self.held >> self.count) as u8;
            self.out.push(byte);
            if byte == 0xff {
                self.out.push(0);
            }
        }
    }

    /// Fills the last byte with ones.
    fn end(mut self) -> Vec<u8> {
        self.put(0x7f, 7);
        self.out
    }
}

struct Scan {
    cosines: [[f32; 8]; 8],
    order: [usize; 64],
    bits: Bits,
}

impl Scan {
    /// Writes one block; gives its first coefficient, which the next one is counted from. `codes`: DC, AC.
    fn block(&mut self, pixels: &[f32; 64], steps: &[u8; 64], before: i32, codes: [&Codes; 2]) -> i32 {
        let mut rows = [0.0; 64];
        for i in 0..64 {
            rows[i] = (0..8).map(|x| self.cosines[i % 8][x] * pixels[i / 8 * 8 + x]).sum();
        }
        let coefficient = |at: usize| {
            let sum: f32 = (0..8).map(|y| self.cosines[at / 8][y] * rows[y * 8 + at % 8]).sum();
            (sum / f32::from(steps[at])).round() as i32
        };
        let values = self.order.map(coefficient);
        self.number(0, values[0] - before, codes[0]);
        let mut zeros = 0u8;
        for value in &values[1..] {
            if *value == 0 {
                zeros += 1;
                continue;
            }
            while zeros >= 16 {
                self.code(0xf0, codes[1]);
                zeros -= 16;
            }
            self.number(zeros, *value, codes[1]);
            zeros = 0;
        }
        if zeros > 0 {
            self.code(0, codes[1]);
        }
        values[0]
    }

    /// A number after some zeros: the code of both lengths, then the number's bits.
    fn number(&mut self, zeros: u8, value: i32, codes: &Codes) {
        let length = (32 - value.unsigned_abs().leading_zeros()) as u8;
        self.code(zeros << 4 | length, codes);
        let bits = if value < 0 { value + (1 << length) - 1 } else { value };
        self.bits.put(bits as u16, length);
    }

    fn code(&mut self, symbol: u8, codes: &Codes) {
        let (code, length) = codes.0[usize::from(symbol)];
        self.bits.put(code, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Limits, decode_compressed_rgb8};

    #[test]
    fn the_order_begins_and_ends_as_the_figure_says() {
        let order = zigzag();
        assert_eq!(order[..10], [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]);
        assert_eq!(order[60..], [47, 55, 62, 63]);
    }

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
