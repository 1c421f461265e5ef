//! RGB pictures in memory and as PNG files.

use crate::file::write_atomically;
use std::io::{self, Write};
use std::path::Path;

/// An RGB8 picture, rows from top to bottom, no padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

impl RgbImage {
    /// A picture of one colour.
    #[must_use]
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, data: colour.repeat(width * height) }
    }

    /// Takes `width * height * 3` bytes; `None` when the length disagrees or a side is zero.
    #[must_use]
    pub fn from_rgb(width: usize, height: usize, data: Vec<u8>) -> Option<Self> {
        let want = width.checked_mul(height)?.checked_mul(3)?;
        (want > 0 && data.len() == want).then_some(Self { width, height, data })
    }

    /// Becomes a copy of another picture in the memory that it has.
    pub fn copy_from(&mut self, other: &RgbImage) {
        (self.width, self.height) = (other.width, other.height);
        self.data.clear();
        self.data.extend_from_slice(&other.data);
    }

    /// The pixel at (x, y).
    ///
    /// # Panics
    /// When (x, y) lies outside the picture.
    #[must_use]
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * 3;
        [self.data[at], self.data[at + 1], self.data[at + 2]]
    }

    /// Copies `source`, enlarged `scale` times without smoothing, so that its corner is at (x, y). What
    /// would lie outside is cut off.
    pub fn paste_scaled(&mut self, source: &RgbImage, x: usize, y: usize, scale: usize) {
        for row in 0..(source.height * scale).min(self.height.saturating_sub(y)) {
            for column in 0..(source.width * scale).min(self.width.saturating_sub(x)) {
                let pixel = source.pixel(column / scale, row / scale);
                let at = ((y + row) * self.width + x + column) * 3;
                self.data[at..at + 3].copy_from_slice(&pixel);
            }
        }
    }

    /// The picture as the PNG file's bytes.
    ///
    /// # Errors
    /// When the encoder refuses the size.
    pub fn to_png(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        write_png(&mut bytes, self.width, self.height, &self.data)?;
        Ok(bytes)
    }

    /// Writes the picture as a PNG file, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_png(&self, path: &Path) -> io::Result<()> {
        save_png(path, self.width, self.height, &self.data)
    }
}

/// Writes RGB8 pixels (`height * width * 3` bytes, rows from top to bottom) as PNG.
///
/// # Errors
/// `out` fails, a side is zero or too large, or the number of bytes disagrees with the size.
pub fn write_png(out: impl Write, width: usize, height: usize, rgb: &[u8]) -> io::Result<()> {
    let side =
        |n| u32::try_from(n).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "picture too large"));
    let mut encoder = png::Encoder::new(out, side(width)?, side(height)?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(io::Error::other)?;
    writer.write_image_data(rgb).map_err(io::Error::other)?;
    writer.finish().map_err(io::Error::other)
}

/// Writes RGB8 pixels as a PNG file, whole or not at all.
///
/// # Errors
/// As [`write_png`] and [`write_atomically`].
pub fn save_png(path: &Path, width: usize, height: usize, rgb: &[u8]) -> io::Result<()> {
    write_atomically(path, |out| write_png(out, width, height, rgb))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> (u32, u32, Vec<u8>) {
        let mut reader = png::Decoder::new(io::Cursor::new(bytes)).read_info().expect("a PNG");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        let info = reader.next_frame(&mut pixels).expect("pixels");
        (info.width, info.height, pixels)
    }

    #[test]
    fn png_holds_the_pixels() {
        let mut image = RgbImage::filled(5, 3, [10, 20, 30]);
        image.paste_scaled(&RgbImage::filled(1, 1, [1, 2, 3]), 3, 1, 4);
        assert_eq!(
            (image.pixel(2, 1), image.pixel(3, 1), image.pixel(4, 2)),
            ([10, 20, 30], [1, 2, 3], [1, 2, 3])
        );
        assert_eq!(read(&image.to_png().expect("encodes")), (5, 3, image.data.clone()));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("p.png");
        image.save_png(&path).expect("written");
        assert_eq!(read(&std::fs::read(&path).expect("there")), (5, 3, image.data.clone()));
    }

    #[test]
    fn sizes_that_disagree_are_refused() {
        assert!(RgbImage::from_rgb(2, 2, vec![0; 11]).is_none());
        assert!(RgbImage::from_rgb(0, 2, vec![]).is_none());
        assert!(RgbImage::from_rgb(usize::MAX, 2, vec![]).is_none());
        assert!(write_png(Vec::new(), 2, 2, &[0; 11]).is_err());
        assert!(write_png(Vec::new(), 0, 2, &[]).is_err());
    }
}
