//! Camera images: raw and compressed bytes to RGB8, depth images to metres.
//!
//! Every function writes into a buffer of the caller, which keeps its memory between frames. Sizes are
//! checked against [`Limits`] and against the bytes that are really there before anything is allocated.
//!
//! Every name of `sensor_msgs/image_encodings.hpp` is either decoded or refused with the reason: depth has
//! functions of its own, and numbers without a stated range (`32FC3`, `16SC1`, ...) are no colours.
//!
//! `yuv422`, `yuv422_yuy2`, `nv12`, `nv21` and `nv24` are BT.601 with luma from 16 to 235, and pixels that share a colour get
//! the same: what UVC cameras send, and what cv_bridge makes of it (OpenCV's `COLOR_YUV2RGB_UYVY`, `_YUY2`, `_NV12`,
//! `_NV21`, to the bit). `8UC3` and `8UC4` carry BGR order, as OpenCV writes them.

mod jpeg;
mod jpeg_encode;
mod rvl;

pub use jpeg_encode::encode_jpeg;

use std::io::Cursor;

use crate::msg::ImageView;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// The fields of a `sensor_msgs/msg/Image` that describe its pixels.
#[derive(Clone, Copy, Debug)]
pub struct RawImage<'a> {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Encoding name, for example `rgb8` or `16UC1`.
    pub encoding: &'a str,
    /// Bytes from the start of one row to the start of the next; 0 means rows without padding.
    pub step: u32,
    /// Byte order of 16- and 32-bit samples.
    pub is_bigendian: bool,
    /// The rows, `step` bytes each; the padding of the last row may be missing.
    pub data: &'a [u8],
}

impl<'a> From<&ImageView<'a>> for RawImage<'a> {
    fn from(image: &ImageView<'a>) -> Self {
        Self {
            width: image.width,
            height: image.height,
            encoding: image.encoding,
            step: image.step,
            is_bigendian: image.is_bigendian != 0,
            data: image.data,
        }
    }
}

/// Sizes above which an image is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest number of pixels.
    pub pixels_max: u64,
}

impl Default for Limits {
    /// 64 million pixels: 192 MB of RGB8.
    fn default() -> Self {
        Self { pixels_max: 64 << 20 }
    }
}

/// Width and height of a decoded image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

/// Why an image was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Width or height is zero.
    #[error("image is {width}x{height}: nothing to decode")]
    Empty {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// More pixels than the limit.
    #[error("image is {width}x{height}: more than the limit of {pixels_max} pixels")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// The limit.
        pixels_max: u64,
    },
    /// The encoding is not known.
    #[error("encoding {encoding:?} is not known")]
    UnknownEncoding {
        /// The name, shortened to 40 characters.
        encoding: String,
    },
    /// A depth image was asked for as colour.
    #[error("encoding {encoding:?} is depth: decode it as depth")]
    Depth {
        /// The name.
        encoding: String,
    },
    /// The encoding is known, but says not which colours its numbers are.
    #[error("encoding {encoding:?} {reason}")]
    NotColour {
        /// The name.
        encoding: String,
        /// Why it cannot be decoded.
        reason: &'static str,
    },
    /// A known picture format that is not decoded here.
    #[error("{format} is not supported: {bytes} bytes; send JPEG or PNG")]
    UnsupportedFormat {
        /// Name of the format.
        format: &'static str,
        /// Number of bytes.
        bytes: usize,
    },
    /// A colour image was asked for as depth.
    #[error("encoding {encoding:?} is not depth")]
    NotDepth {
        /// The name, shortened to 40 characters.
        encoding: String,
    },
    /// Rows are longer than the step.
    #[error("encoding {encoding}, {width}x{height}: step is {step} bytes, a row needs {row}")]
    ShortStep {
        /// Encoding name.
        encoding: String,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Step of the message, in bytes.
        step: u32,
        /// Bytes that a row takes.
        row: u64,
    },
    /// Fewer bytes than the sizes say.
    #[error("encoding {encoding}, {width}x{height}, step {step}: {got} bytes of data, {want} are needed")]
    ShortData {
        /// Encoding name.
        encoding: String,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Step of the message, in bytes.
        step: u32,
        /// Bytes that are there.
        got: u64,
        /// Bytes that are needed.
        want: u64,
    },
    /// The sizes do not suit the encoding, for example an odd width of a 4:2:0 image.
    #[error("encoding {encoding} cannot be {width}x{height}")]
    BadShape {
        /// Encoding name.
        encoding: String,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// The bytes start with no magic of JPEG or PNG.
    #[error("neither JPEG nor PNG: {bytes} bytes starting with {start:02x?}")]
    UnknownMagic {
        /// Number of bytes.
        bytes: usize,
        /// The first bytes, at most 8.
        start: Vec<u8>,
    },
    /// A JPEG or PNG decoder gave up.
    #[error("{format} of {bytes} bytes cannot be decoded: {reason}")]
    Corrupt {
        /// `JPEG`, `PNG` or `compressedDepth`.
        format: &'static str,
        /// Number of bytes.
        bytes: usize,
        /// What the decoder said.
        reason: String,
    },
}

/// True when an encoding holds distances (`16UC1`, `32FC1`) and not colours.
#[must_use]
pub fn is_depth_encoding(encoding: &str) -> bool {
    matches!(encoding, "16UC1" | "32FC1")
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

fn checked(width: u32, height: u32, limits: &Limits) -> Result<usize, ImageError> {
    if width == 0 || height == 0 {
        return Err(ImageError::Empty { width, height });
    }
    let pixels = u64::from(width) * u64::from(height);
    match usize::try_from(pixels) {
        Ok(n) if pixels <= limits.pixels_max => Ok(n),
        _ => Err(ImageError::TooLarge { width, height, pixels_max: limits.pixels_max }),
    }
}

/// How the bytes of an encoding lie.
#[derive(Clone, Copy)]
enum Layout {
    /// Bytes per pixel, and where red, green and blue are.
    Pixels { bytes: u32, rgb: [usize; 3] },
    /// 16-bit channels: channels per pixel, and which are red, green and blue.
    Wide { channels: u32, rgb: [usize; 3] },
    /// Where red lies in the 2x2 cell: column, row; samples of 1 or 2 bytes.
    Bayer { red: (usize, usize), bytes: u32 },
    /// Offsets of the two lumas, blue and red difference in 4 bytes.
    Yuv422 { y: [usize; 2], u: usize, v: usize },
    /// One luma plane, then one plane of pairs for 2x2 pixels; offset of the blue difference in a pair.
    Yuv420 { u: usize },
    /// One luma plane, then one plane of pairs, blue difference first, one for each pixel.
    Yuv444,
}

fn layout_of(encoding: &str) -> Option<Layout> {
    Some(match encoding {
        "rgb8" => Layout::Pixels { bytes: 3, rgb: [0, 1, 2] },
        "bgr8" | "8UC3" => Layout::Pixels { bytes: 3, rgb: [2, 1, 0] },
        "rgba8" => Layout::Pixels { bytes: 4, rgb: [0, 1, 2] },
        "bgra8" | "8UC4" => Layout::Pixels { bytes: 4, rgb: [2, 1, 0] },
        "mono8" | "8UC1" => Layout::Pixels { bytes: 1, rgb: [0, 0, 0] },
        "mono16" => Layout::Wide { channels: 1, rgb: [0, 0, 0] },
        "rgb16" => Layout::Wide { channels: 3, rgb: [0, 1, 2] },
        "bgr16" | "16UC3" => Layout::Wide { channels: 3, rgb: [2, 1, 0] },
        "rgba16" => Layout::Wide { channels: 4, rgb: [0, 1, 2] },
        "bgra16" | "16UC4" => Layout::Wide { channels: 4, rgb: [2, 1, 0] },
        "bayer_rggb8" => Layout::Bayer { red: (0, 0), bytes: 1 },
        "bayer_grbg8" => Layout::Bayer { red: (1, 0), bytes: 1 },
        "bayer_gbrg8" => Layout::Bayer { red: (0, 1), bytes: 1 },
        "bayer_bggr8" => Layout::Bayer { red: (1, 1), bytes: 1 },
        "bayer_rggb16" => Layout::Bayer { red: (0, 0), bytes: 2 },
        "bayer_grbg16" => Layout::Bayer { red: (1, 0), bytes: 2 },
        "bayer_gbrg16" => Layout::Bayer { red: (0, 1), bytes: 2 },
        "bayer_bggr16" => Layout::Bayer { red: (1, 1), bytes: 2 },
        "yuv422" | "uyvy" => Layout::Yuv422 { y: [1, 3], u: 0, v: 2 },
        "yuv422_yuy2" | "yuyv" => Layout::Yuv422 { y: [0, 2], u: 1, v: 3 },
        "nv12" => Layout::Yuv420 { u: 0 },
        "nv21" => Layout::Yuv420 { u: 1 },
        "nv24" => Layout::Yuv444,
        _ => return None,
    })
}

/// Why an encoding that has no layout is refused: names of OpenCV's matrix types are known, others are not.
fn refused(encoding: &str) -> ImageError {
    let matrix = ["8UC", "8SC", "16UC", "16SC", "32SC", "32FC", "64FC"]
        .iter()
        .find_map(|kind| Some((*kind, encoding.strip_prefix(kind)?.parse::<u16>().ok()?)));
    match matrix {
        Some(("8UC" | "16UC", _)) => ImageError::NotColour {
            encoding: short(encoding),
            reason: "does not say which colours its channels are",
        },
        Some(_) => ImageError::NotColour {
            encoding: short(encoding),
            reason: "holds numbers without a stated range, no colours",
        },
        None => ImageError::UnknownEncoding { encoding: short(encoding) },
    }
}

/// What an encoding's pixels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PixelKind {
    /// Neither colours nor depth, or not known: not decoded.
    Other,
    /// Distances.
    Depth,
    /// One brightness.
    Grey,
    /// Colours, decoded to RGB.
    Colour,
}

/// What the pixels of a raw image of this encoding are, and so which function decodes them.
#[must_use]
pub fn pixel_kind(encoding: &str) -> PixelKind {
    match layout_of(encoding) {
        _ if is_depth_encoding(encoding) => PixelKind::Depth,
        None => PixelKind::Other,
        Some(Layout::Pixels { bytes: 1, .. } | Layout::Wide { channels: 1, .. }) => PixelKind::Grey,
        Some(_) => PixelKind::Colour,
    }
}

/// Checks step and data; gives the true step. `rows` counts the rows of all planes, the last of `last` bytes.
fn rows_of(image: &RawImage<'_>, row: u64, rows: u64, last: u64) -> Result<usize, ImageError> {
    let RawImage { width, height, step, .. } = *image;
    let encoding = || short(image.encoding);
    if step != 0 && u64::from(step) < row {
        return Err(ImageError::ShortStep { encoding: encoding(), width, height, step, row });
    }
    let true_step = if step == 0 { row } else { u64::from(step) };
    let want = true_step * (rows - 1) + last;
    let got = image.data.len() as u64;
    if got < want {
        return Err(ImageError::ShortData { encoding: encoding(), width, height, step, got, want });
    }
    // The data holds at least one step per row but the last, so the step fits a usize.
    Ok(true_step as usize)
}

/// Bytes of a row of pixels that are read, and from one row to the next.
fn row_and_step(image: &RawImage<'_>, layout: Layout) -> Result<(usize, usize), ImageError> {
    let RawImage { width, height, .. } = *image;
    let (odd_width, odd_height) = (!width.is_multiple_of(2), !height.is_multiple_of(2));
    let misshapen = match layout {
        Layout::Bayer { .. } => width < 2 || height < 2,
        Layout::Yuv422 { .. } => odd_width,
        Layout::Yuv420 { .. } => odd_width || odd_height,
        _ => false,
    };
    if misshapen {
        return Err(ImageError::BadShape { encoding: short(image.encoding), width, height });
    }
    let row_bytes = u64::from(width)
        * match layout {
            Layout::Pixels { bytes, .. } | Layout::Bayer { bytes, .. } => u64::from(bytes),
            Layout::Wide { channels, .. } => 2 * u64::from(channels),
            Layout::Yuv422 { .. } => 2,
            Layout::Yuv420 { .. } | Layout::Yuv444 => 1,
        };
    let (rows, last_bytes) = match layout {
        Layout::Yuv420 { .. } => (u64::from(height) + u64::from(height) / 2, row_bytes),
        // A row of the second plane takes two steps; the last one is read as one row.
        Layout::Yuv444 => (u64::from(height) * 3 - 1, 2 * row_bytes),
        _ => (u64::from(height), row_bytes),
    };
    Ok((row_bytes as usize, rows_of(image, row_bytes, rows, last_bytes)?))
}

/// Decodes a raw colour or grey image into RGB8: `out` holds `height * width * 3` bytes afterwards.
///
/// 16-bit channels keep their high byte; Bayer patterns are interpolated bilinearly.
///
/// # Errors
/// The encoding is unknown or depth; sizes, step and bytes disagree; the image is above the limits.
pub fn decode_raw_rgb8(image: &RawImage<'_>, limits: &Limits, out: &mut Vec<u8>) -> Result<Size, ImageError> {
    let RawImage { width, height, data, .. } = *image;
    let pixels = checked(width, height, limits)?;
    if is_depth_encoding(image.encoding) {
        return Err(ImageError::Depth { encoding: image.encoding.to_owned() });
    }
    let Some(layout) = layout_of(image.encoding) else {
        return Err(refused(image.encoding));
    };
    let (w, h) = (width as usize, height as usize);
    let (row_bytes, step) = row_and_step(image, layout)?;
    out.resize(pixels * 3, 0);
    let rows = |out: &mut Vec<u8>, each: &dyn Fn(&[u8], &mut [u8])| {
        for (y, target) in out.chunks_exact_mut(w * 3).enumerate() {
            each(&data[y * step..y * step + row_bytes], target);
        }
    };
    match layout {
        Layout::Pixels { bytes: 3, rgb: [0, 1, 2] } => rows(out, &|from, to| to.copy_from_slice(from)),
        Layout::Pixels { bytes, rgb: [r, g, b] } => rows(out, &|from, to| {
            for (p, t) in from.chunks_exact(bytes as usize).zip(to.chunks_exact_mut(3)) {
                (t[0], t[1], t[2]) = (p[r], p[g], p[b]);
            }
        }),
        Layout::Wide { channels, rgb: [r, g, b] } => {
            let high = usize::from(!image.is_bigendian);
            rows(out, &|from, to| {
                for (p, t) in from.chunks_exact(2 * channels as usize).zip(to.chunks_exact_mut(3)) {
                    (t[0], t[1], t[2]) = (p[2 * r + high], p[2 * g + high], p[2 * b + high]);
                }
            });
        }
        Layout::Bayer { red, bytes: 1 } => {
            demosaic(|x, y| u32::from(data[y * step + x]), 0, (w, h), red, out)
        }
        Layout::Bayer { red, .. } => {
            let big = image.is_bigendian;
            let sample = |x: usize, y: usize| {
                let raw = [data[y * step + 2 * x], data[y * step + 2 * x + 1]];
                u32::from(if big { u16::from_be_bytes(raw) } else { u16::from_le_bytes(raw) })
            };
            demosaic(sample, 8, (w, h), red, out);
        }
        Layout::Yuv422 { y, u, v } => rows(out, &|from, to| {
            for (p, t) in from.chunks_exact(4).zip(to.chunks_exact_mut(6)) {
                t[..3].copy_from_slice(&yuv_to_rgb(p[y[0]], p[u], p[v]));
                t[3..].copy_from_slice(&yuv_to_rgb(p[y[1]], p[u], p[v]));
            }
        }),
        Layout::Yuv444 => {
            let chroma = &data[step * h..];
            for (row, target) in out.chunks_exact_mut(w * 3).enumerate() {
                let luma = &data[row * step..row * step + w];
                let pairs = &chroma[row * 2 * step..row * 2 * step + 2 * w];
                for ((y, c), t) in luma.iter().zip(pairs.chunks_exact(2)).zip(target.chunks_exact_mut(3)) {
                    t.copy_from_slice(&yuv_to_rgb(*y, c[0], c[1]));
                }
            }
        }
        Layout::Yuv420 { u } => {
            let chroma = &data[step * h..];
            for (row, target) in out.chunks_exact_mut(w * 3).enumerate() {
                let luma = &data[row * step..row * step + w];
                let pairs = &chroma[row / 2 * step..row / 2 * step + w];
                let cells = luma.chunks_exact(2).zip(pairs.chunks_exact(2));
                for ((y, c), t) in cells.zip(target.chunks_exact_mut(6)) {
                    t[..3].copy_from_slice(&yuv_to_rgb(y[0], c[u], c[1 - u]));
                    t[3..].copy_from_slice(&yuv_to_rgb(y[1], c[u], c[1 - u]));
                }
            }
        }
    }
    Ok(Size { width, height })
}

/// BT.601, luma 16 to 235, in OpenCV's fixed point: 1.164, 2.018, -0.391, -0.813 and 1.596 times 2^20.
fn yuv_to_rgb(y: u8, u: u8, v: u8) -> [u8; 3] {
    let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
    let y = (i32::from(y) - 16).max(0) * 1_220_542 + (1 << 19);
    let clamp = |value: i32| (value >> 20).clamp(0, 255) as u8;
    [clamp(y + 1_673_527 * v), clamp(y - 409_993 * u - 852_492 * v), clamp(y + 2_116_026 * u)]
}

/// Bilinear interpolation; at the border the mirrored neighbour, which has the same colour. `sample` gives the value
/// at (x, y), of which `drop` low bits are left out afterwards.
fn demosaic(
    sample: impl Fn(usize, usize) -> u32,
    drop: u32,
    (w, h): (usize, usize),
    red: (usize, usize),
    out: &mut [u8],
) {
    for (y, target) in out.chunks_exact_mut(w * 3).enumerate() {
        let up = if y == 0 { 1 } else { y - 1 };
        let down = if y + 1 == h { h - 2 } else { y + 1 };
        let red_row = y % 2 == red.1;
        for (x, t) in target.chunks_exact_mut(3).enumerate() {
            let left = if x == 0 { 1 } else { x - 1 };
            let right = if x + 1 == w { w - 2 } else { x + 1 };
            let here = || sample(x, y);
            let beside = || (sample(left, y) + sample(right, y)).div_ceil(2);
            let above = || (sample(x, up) + sample(x, down)).div_ceil(2);
            let cross = || (sample(x, up) + sample(x, down) + sample(left, y) + sample(right, y) + 2) / 4;
            let corners = || {
                let sum = sample(left, up) + sample(right, up) + sample(left, down) + sample(right, down);
                (sum + 2) / 4
            };
            let rgb = match (red_row, x % 2 == red.0) {
                (true, true) => [here(), cross(), corners()],
                (false, false) => [corners(), cross(), here()],
                (true, false) => [beside(), here(), above()],
                (false, true) => [above(), here(), beside()],
            };
            t.copy_from_slice(&rgb.map(|v| (v >> drop) as u8));
        }
    }
}

/// Decodes a raw depth image (`16UC1` in millimetres, `32FC1` in metres; `mono16` counts as millimetres)
/// into metres, row by row without padding. A depth that is not known (0 mm, not finite) becomes NaN.
///
/// # Errors
/// The encoding is not depth; sizes, step and bytes disagree; the image is above the limits.
pub fn decode_raw_depth(
    image: &RawImage<'_>,
    limits: &Limits,
    out: &mut Vec<f32>,
) -> Result<Size, ImageError> {
    let RawImage { width, height, data, is_bigendian, .. } = *image;
    let pixels = checked(width, height, limits)?;
    let bytes = match image.encoding {
        "16UC1" | "mono16" => 2,
        "32FC1" => 4,
        other => {
            return Err(ImageError::NotDepth { encoding: short(other) });
        }
    };
    let row = u64::from(width) * bytes;
    let step = rows_of(image, row, u64::from(height), row)?;
    out.resize(pixels, 0.0);
    for (y, target) in out.chunks_exact_mut(width as usize).enumerate() {
        let from = &data[y * step..y * step + row as usize];
        if bytes == 2 {
            for (p, t) in from.chunks_exact(2).zip(target) {
                let raw = [p[0], p[1]];
                let mm = if is_bigendian { u16::from_be_bytes(raw) } else { u16::from_le_bytes(raw) };
                *t = millimetres(mm);
            }
        } else {
            for (p, t) in from.chunks_exact(4).zip(target) {
                let raw = [p[0], p[1], p[2], p[3]];
                let m = if is_bigendian { f32::from_be_bytes(raw) } else { f32::from_le_bytes(raw) };
                *t = if m.is_finite() { m } else { f32::NAN };
            }
        }
    }
    Ok(Size { width, height })
}

fn millimetres(mm: u16) -> f32 {
    if mm == 0 { f32::NAN } else { f32::from(mm) * 0.001 }
}

/// What compressed bytes are, by their first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compressed {
    /// A JPEG stream.
    Jpeg,
    /// A PNG stream.
    Png,
    /// The 12-byte header of `compressed_depth_image_transport`, then PNG.
    DepthPng,
}

const JPEG_MAGIC: [u8; 3] = [0xff, 0xd8, 0xff];
const PNG_MAGIC: [u8; 8] = [0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a];
/// Bytes of the header before the PNG of a compressedDepth image.
const DEPTH_HEADER: usize = 12;

/// Tells the kind of compressed bytes; the `format` text of a message is often wrong and is not needed.
#[must_use]
pub fn sniff(bytes: &[u8]) -> Option<Compressed> {
    if bytes.starts_with(&JPEG_MAGIC) {
        Some(Compressed::Jpeg)
    } else if bytes.starts_with(&PNG_MAGIC) {
        Some(Compressed::Png)
    } else if bytes.get(DEPTH_HEADER..).is_some_and(|rest| rest.starts_with(&PNG_MAGIC)) {
        Some(Compressed::DepthPng)
    } else {
        None
    }
}

/// Refuses bytes that are neither JPEG nor PNG, by the name of their format where it is known.
fn unknown_magic(bytes: &[u8]) -> ImageError {
    const FORMATS: [(&[u8], &str); 9] = [
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"\0\0\0\x0cjP", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x01", "video (H.264 or H.265)"),
        (b"\0\0\x01", "video (H.264 or H.265)"),
    ];
    let known = FORMATS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, name)| *name);
    let webp = bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP");
    match known.or(webp.then_some("WebP")) {
        Some(format) => ImageError::UnsupportedFormat { format, bytes: bytes.len() },
        None => ImageError::UnknownMagic { bytes: bytes.len(), start: bytes[..bytes.len().min(8)].to_vec() },
    }
}

/// What the pixels of a `CompressedImage` are, from its bytes and the text of its message, without decoding them.
#[must_use]
pub fn compressed_kind(bytes: &[u8], format: &str) -> PixelKind {
    let names_depth = ["16UC1", "32FC1"].iter().any(|d| format.starts_with(d));
    match sniff(bytes) {
        Some(Compressed::DepthPng) => PixelKind::Depth,
        _ if names_depth || format.contains("compressedDepth") => PixelKind::Depth,
        Some(Compressed::Jpeg) if jpeg::components(bytes) == Some(1) => PixelKind::Grey,
        // Bit depth and colour type of the header; 0 and 4 are grey without and with transparency.
        Some(Compressed::Png) => match bytes.get(25) {
            Some(0 | 4) => PixelKind::Grey,
            _ => PixelKind::Colour,
        },
        Some(Compressed::Jpeg) => PixelKind::Colour,
        None => PixelKind::Other,
    }
}

/// Width and height of a JPEG or PNG picture from its header, in pixels, without decoding it.
#[must_use]
pub fn compressed_size(bytes: &[u8]) -> Option<Size> {
    if bytes.starts_with(&PNG_MAGIC) {
        let number = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        return Some(Size { width: number(16)?, height: number(20)? });
    }
    jpeg::size(bytes).map(|(width, height)| Size { width, height })
}

/// Decodes JPEG or PNG bytes into RGB8: `out` holds `height * width * 3` bytes afterwards. Transparency is
/// dropped, 16-bit channels keep their high byte. A JPEG without Huffman tables, as USB cameras send them, gets the
/// standard ones.
///
/// # Errors
/// The bytes are neither JPEG nor PNG, are damaged, are depth, or the image is above the limits.
pub fn decode_compressed_rgb8(bytes: &[u8], limits: &Limits, out: &mut Vec<u8>) -> Result<Size, ImageError> {
    match sniff(bytes) {
        Some(Compressed::Jpeg) => decode_jpeg(bytes, limits, out),
        Some(Compressed::Png) => decode_png_rgb8(bytes, limits, out),
        Some(Compressed::DepthPng) => Err(ImageError::Depth { encoding: "compressedDepth".to_owned() }),
        None => Err(unknown_magic(bytes)),
    }
}

fn decode_jpeg(bytes: &[u8], limits: &Limits, out: &mut Vec<u8>) -> Result<Size, ImageError> {
    let corrupt =
        |reason: String| ImageError::Corrupt { format: "JPEG", bytes: bytes.len(), reason: reason.clone() };
    let options = DecoderOptions::default()
        .set_max_width(65_535)
        .set_max_height(65_535)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let whole = jpeg::with_tables(bytes);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&*whole), options);
    decoder.decode_headers().map_err(|e| corrupt(e.to_string()))?;
    let info = decoder.info().ok_or_else(|| corrupt("no header".to_owned()))?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    let pixels = checked(width, height, limits)?;
    out.resize(pixels * 3, 0);
    decoder.decode_into(out).map_err(|e| corrupt(e.to_string()))?;
    Ok(Size { width, height })
}

/// A PNG whose header is read, its size, and the bytes that decoding gives.
type OpenPng<'a> = (png::Reader<Cursor<&'a [u8]>>, Size, usize);

fn png_reader<'a>(
    bytes: &'a [u8],
    limits: &Limits,
    transformations: png::Transformations,
) -> Result<OpenPng<'a>, ImageError> {
    let corrupt = |reason: String| ImageError::Corrupt { format: "PNG", bytes: bytes.len(), reason };
    let budget = limits.pixels_max.saturating_mul(8).saturating_add(1 << 20);
    let mut decoder = png::Decoder::new_with_limits(
        Cursor::new(bytes),
        png::Limits { bytes: usize::try_from(budget).unwrap_or(usize::MAX) },
    );
    decoder.set_transformations(transformations);
    let reader = decoder.read_info().map_err(|e| corrupt(e.to_string()))?;
    let (width, height) = (reader.info().width, reader.info().height);
    checked(width, height, limits)?;
    let needed = reader.output_buffer_size().ok_or_else(|| corrupt("size overflows".to_owned()))?;
    Ok((reader, Size { width, height }, needed))
}

fn decode_png_rgb8(bytes: &[u8], limits: &Limits, out: &mut Vec<u8>) -> Result<Size, ImageError> {
    let corrupt = |reason: String| ImageError::Corrupt { format: "PNG", bytes: bytes.len(), reason };
    let transformations = png::Transformations::EXPAND | png::Transformations::STRIP_16;
    let (mut reader, size, needed) = png_reader(bytes, limits, transformations)?;
    let channels = match reader.output_color_type().0 {
        png::ColorType::Grayscale => 1,
        png::ColorType::GrayscaleAlpha => 2,
        png::ColorType::Rgb => 3,
        png::ColorType::Rgba => 4,
        other => return Err(corrupt(format!("colour type {other:?}"))),
    };
    let pixels = size.width as usize * size.height as usize;
    // RGB goes straight into the caller's buffer; the others need the decoder's own layout first.
    if channels == 3 && needed == pixels * 3 {
        out.resize(needed, 0);
        reader.next_frame(out).map_err(|e| corrupt(e.to_string()))?;
        return Ok(size);
    }
    let mut flat = vec![0; needed];
    reader.next_frame(&mut flat).map_err(|e| corrupt(e.to_string()))?;
    out.resize(pixels * 3, 0);
    let (green, blue) = if channels < 3 { (0, 0) } else { (1, 2) };
    for (p, t) in flat.chunks_exact(channels).zip(out.chunks_exact_mut(3)) {
        (t[0], t[1], t[2]) = (p[0], p[green], p[blue]);
    }
    Ok(size)
}

/// Decodes compressed depth into metres: a 16-bit grey PNG in millimetres, or the bytes of a
/// `compressedDepth` topic (12-byte header, then PNG or RVL).
///
/// `format` is the text of the message: when it names `32FC1`, the samples are inverse depth, quantised with
/// the two parameters of the header (`depth = a / (q - b)`). Unknown depth becomes NaN.
///
/// # Errors
/// The bytes are not such a PNG or RVL, are damaged, or the image is above the limits.
pub fn decode_compressed_depth(
    bytes: &[u8],
    format: &str,
    limits: &Limits,
    out: &mut Vec<f32>,
) -> Result<Size, ImageError> {
    let corrupt =
        |reason: String| ImageError::Corrupt { format: "compressedDepth", bytes: bytes.len(), reason };
    let kind = sniff(bytes);
    let (size, samples) = match kind {
        Some(Compressed::Png) => png_depth(bytes, limits)?,
        Some(Compressed::DepthPng) => png_depth(&bytes[DEPTH_HEADER..], limits)?,
        Some(Compressed::Jpeg) => return Err(ImageError::NotDepth { encoding: "JPEG".to_owned() }),
        None if is_rvl(format) => {
            let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
            let sizes = number(DEPTH_HEADER).zip(number(DEPTH_HEADER + 4));
            let (width, height) = sizes.ok_or_else(|| corrupt("the size is missing".to_owned()))?;
            let pixels = checked(width, height, limits)?;
            let data = &bytes[DEPTH_HEADER + 8..];
            // A pixel that is not part of a long run takes half a byte; a picture of zeros takes a few bytes.
            let mut samples = vec![0; pixels];
            rvl::decode(data, &mut samples).map_err(|e| corrupt(format!("RVL: {e}")))?;
            (Size { width, height }, samples)
        }
        None => return Err(unknown_magic(bytes)),
    };
    let float = |at: usize| f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let with_header = kind != Some(Compressed::Png);
    let inverse = (with_header && format.contains("32FC1")).then(|| (float(4), float(8)));
    out.clear();
    out.extend(samples.iter().map(|q| match inverse {
        None => millimetres(*q),
        Some(_) if *q == 0 => f32::NAN,
        Some((a, b)) => {
            let depth = a / (f32::from(*q) - b);
            if depth.is_finite() && depth > 0.0 { depth } else { f32::NAN }
        }
    }));
    Ok(size)
}

/// Whether the text of a message names RVL; nothing in the bytes does.
fn is_rvl(format: &str) -> bool {
    format.split_once("compressedDepth").is_some_and(|(_, codec)| codec.trim().eq_ignore_ascii_case("rvl"))
}

/// The samples of a 16-bit grey PNG.
fn png_depth(bytes: &[u8], limits: &Limits) -> Result<(Size, Vec<u16>), ImageError> {
    let corrupt =
        |reason: String| ImageError::Corrupt { format: "compressedDepth", bytes: bytes.len(), reason };
    let (mut reader, size, needed) = png_reader(bytes, limits, png::Transformations::IDENTITY)?;
    if reader.output_color_type() != (png::ColorType::Grayscale, png::BitDepth::Sixteen) {
        let (color, depth) = reader.output_color_type();
        return Err(corrupt(format!("PNG is {color:?} with {depth:?} bits, 16-bit grey is needed")));
    }
    let mut flat = vec![0; needed];
    reader.next_frame(&mut flat).map_err(|e| corrupt(e.to_string()))?;
    Ok((size, flat.chunks_exact(2).map(|p| u16::from_be_bytes([p[0], p[1]])).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw<'a>(encoding: &'a str, width: u32, height: u32, step: u32, data: &'a [u8]) -> RawImage<'a> {
        RawImage { width, height, encoding, step, is_bigendian: false, data }
    }

    #[test]
    fn raw_encodings_give_rgb() {
        // encoding, width, height, step, data, RGB
        type Case = (&'static str, u32, u32, u32, &'static [u8], &'static [u8]);
        let cases: &[Case] = &[
            ("rgb8", 2, 1, 0, &[1, 2, 3, 4, 5, 6], &[1, 2, 3, 4, 5, 6]),
            ("rgb8", 1, 2, 4, &[1, 2, 3, 9, 4, 5, 6], &[1, 2, 3, 4, 5, 6]),
            ("bgr8", 1, 1, 3, &[1, 2, 3], &[3, 2, 1]),
            ("8UC3", 1, 1, 3, &[1, 2, 3], &[3, 2, 1]),
            ("rgba8", 1, 1, 4, &[1, 2, 3, 4], &[1, 2, 3]),
            ("bgra8", 1, 1, 4, &[1, 2, 3, 4], &[3, 2, 1]),
            ("8UC4", 1, 1, 4, &[1, 2, 3, 4], &[3, 2, 1]),
            ("mono8", 2, 1, 2, &[7, 8], &[7, 7, 7, 8, 8, 8]),
            ("8UC1", 1, 1, 1, &[7], &[7, 7, 7]),
            ("mono16", 1, 1, 2, &[0x34, 0x12], &[0x12, 0x12, 0x12]),
            ("bayer_rggb8", 2, 2, 2, &[10, 20, 20, 30], &[10, 20, 30, 10, 20, 30, 10, 20, 30, 10, 20, 30]),
            ("bayer_bggr8", 2, 2, 2, &[30, 20, 20, 10], &[10, 20, 30, 10, 20, 30, 10, 20, 30, 10, 20, 30]),
            ("bayer_grbg8", 2, 2, 2, &[20, 10, 30, 20], &[10, 20, 30, 10, 20, 30, 10, 20, 30, 10, 20, 30]),
            ("bayer_gbrg8", 2, 2, 2, &[20, 30, 10, 20], &[10, 20, 30, 10, 20, 30, 10, 20, 30, 10, 20, 30]),
            // The next four: what OpenCV 5.0 makes of the same bytes.
            (
                "yuv422",
                4,
                1,
                8,
                &[50, 100, 200, 150, 16, 90, 235, 240],
                &[213, 70, 0, 255, 128, 0, 255, 43, 0, 255, 218, 35],
            ),
            (
                "yuv422_yuy2",
                4,
                1,
                8,
                &[50, 100, 200, 150, 16, 90, 235, 240],
                &[75, 33, 0, 249, 207, 158, 179, 0, 0, 255, 179, 178],
            ),
            (
                "nv12",
                2,
                2,
                2,
                &[50, 200, 16, 235, 100, 150],
                &[75, 33, 0, 249, 207, 158, 35, 0, 0, 255, 248, 198],
            ),
            (
                "nv21",
                2,
                2,
                2,
                &[50, 200, 16, 235, 100, 150],
                &[0, 54, 84, 169, 228, 255, 0, 14, 44, 210, 255, 255],
            ),
        ];
        let mut out = Vec::new();
        for (encoding, width, height, step, data, want) in cases {
            let size =
                decode_raw_rgb8(&raw(encoding, *width, *height, *step, data), &Limits::default(), &mut out);
            assert_eq!(size, Ok(Size { width: *width, height: *height }), "{encoding}");
            assert_eq!(out, *want, "{encoding}");
        }
    }

    #[test]
    fn bad_images_are_refused_by_name() {
        let limits = Limits { pixels_max: 100 };
        let cases: &[(RawImage<'_>, &str)] = &[
            (raw("rgb8", 0, 5, 0, &[]), "image is 0x5: nothing to decode"),
            (raw("rgb8", u32::MAX, u32::MAX, 0, &[]), "more than the limit of 100 pixels"),
            (raw("rgb8", 4, 4, 11, &[0; 48]), "encoding rgb8, 4x4: step is 11 bytes, a row needs 12"),
            (raw("rgb8", 4, 4, 12, &[0; 47]), "step 12: 47 bytes of data, 48 are needed"),
            (raw("rgb8", 4, 4, u32::MAX, &[0; 48]), "48 bytes of data"),
            (raw("theora", 4, 4, 12, &[0; 48]), "encoding \"theora\" is not known"),
            (raw("16UC1", 4, 4, 8, &[0; 32]), "is depth"),
            (raw("nv12", 3, 2, 3, &[0; 9]), "encoding nv12 cannot be 3x2"),
            (raw("bayer_rggb8", 1, 2, 1, &[0; 2]), "cannot be 1x2"),
        ];
        for (image, want) in cases {
            let got = decode_raw_rgb8(image, &limits, &mut Vec::new()).unwrap_err().to_string();
            assert!(got.contains(want), "{got} / {want}");
        }
        let got = decode_compressed_rgb8(b"QOIF89", &limits, &mut Vec::new()).unwrap_err().to_string();
        assert_eq!(got, "neither JPEG nor PNG: 6 bytes starting with [51, 4f, 49, 46, 38, 39]");
    }

    #[test]
    fn every_encoding_of_ros_is_decoded_or_refused_by_name() {
        // All of sensor_msgs/image_encodings.hpp; rows are long enough for any of them.
        let mut names: Vec<String> = ["rgb", "rgba", "bgr", "bgra", "mono"]
            .iter()
            .flat_map(|c| [format!("{c}8"), format!("{c}16")])
            .chain(
                ["rggb", "bggr", "gbrg", "grbg"]
                    .iter()
                    .flat_map(|p| [format!("bayer_{p}8"), format!("bayer_{p}16")]),
            )
            .collect();
        names.extend(["yuv422", "uyvy", "yuv422_yuy2", "yuyv", "nv12", "nv21", "nv24"].map(String::from));
        let decoded = names.len();
        for kind in ["8UC", "8SC", "16UC", "16SC", "32SC", "32FC", "64FC"] {
            names.extend((1..=4).map(|n| format!("{kind}{n}")));
        }
        let data = [0x40; 4 * 4 * 32];
        let mut out = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let image = raw(name, 4, 4, 0, &data);
            let got = decode_raw_rgb8(&image, &Limits::default(), &mut out);
            let kind = pixel_kind(name);
            match &got {
                Ok(_) => {
                    assert!(out.len() == 48 && kind >= PixelKind::Grey, "{name}");
                }
                Err(ImageError::Depth { .. }) => assert_eq!(kind, PixelKind::Depth, "{name}"),
                Err(ImageError::NotColour { encoding, .. }) => {
                    assert!(encoding == name && kind == PixelKind::Other, "{name}");
                }
                Err(e) => panic!("{name}: {e}"),
            }
            assert!(i >= decoded || got.is_ok(), "{name}: {got:?}");
        }
        for name in ["", "BGR8", "CV_8UC3", "16UC", "16UC1; x", "h264"] {
            let got = decode_raw_rgb8(&raw(name, 4, 4, 0, &data), &Limits::default(), &mut out);
            assert_eq!(got, Err(ImageError::UnknownEncoding { encoding: name.into() }));
        }
    }

    #[test]
    fn wide_bayer_patterns_are_those_of_8_bits() {
        let (w, h) = (6u32, 4u32);
        let small: Vec<u8> = (0..w * h).map(|i| (i * 37 % 251) as u8).collect();
        for pattern in ["rggb", "bggr", "gbrg", "grbg"] {
            let mut want = Vec::new();
            let narrow = format!("bayer_{pattern}8");
            decode_raw_rgb8(&raw(&narrow, w, h, 0, &small), &Limits::default(), &mut want).unwrap();
            for is_bigendian in [false, true] {
                // A step with padding, and low bytes that must not be taken for the high ones.
                let step = 2 * w + 3;
                let mut wide = Vec::new();
                for row in small.chunks(w as usize) {
                    wide.extend(row.iter().flat_map(|v| if is_bigendian { [*v, 9] } else { [9, *v] }));
                    wide.extend([255; 3]);
                }
                let encoding = format!("bayer_{pattern}16");
                let image = RawImage { is_bigendian, ..raw(&encoding, w, h, step, &wide) };
                let mut got = Vec::new();
                decode_raw_rgb8(&image, &Limits::default(), &mut got).unwrap();
                let close = got.iter().zip(&want).all(|(a, b)| a.abs_diff(*b) <= 1);
                assert!(close && got.len() == want.len(), "{pattern}: {got:?}, wanted {want:?}");
            }
        }
    }

    #[test]
    fn chroma_of_every_pixel_has_rows_of_two_steps() {
        // 2x2 with a step of 3: luma, padding, then a chroma row of 6 bytes for each row of pixels.
        let data = [50, 200, 99, 16, 235, 99, 100, 150, 90, 240, 99, 99, 100, 150, 90, 240];
        let mut out = Vec::new();
        decode_raw_rgb8(&raw("nv24", 2, 2, 3, &data), &Limits::default(), &mut out).unwrap();
        let want = [yuv_to_rgb(50, 100, 150), yuv_to_rgb(200, 90, 240), yuv_to_rgb(16, 100, 150)];
        assert_eq!(out[..9], want.concat());
        assert_eq!(out[9..], yuv_to_rgb(235, 90, 240));
        let short = decode_raw_rgb8(&raw("nv24", 2, 2, 3, &data[..15]), &Limits::default(), &mut out);
        assert!(matches!(short, Err(ImageError::ShortData { .. })), "{short:?}");
    }

    #[test]
    fn usb_cameras_leave_the_tables_out() {
        // Full-range BT.601, as JFIF has it: grey, a red, a blue.
        let units = [[128, 128, 128], [112, 96, 208], [80, 200, 104]];
        for (across, down) in [(2, 1), (2, 2), (1, 1)] {
            let bytes = jpeg::tests::without_tables(&units, across, down);
            let mut out = Vec::new();
            let size = decode_compressed_rgb8(&bytes, &Limits::default(), &mut out).unwrap();
            let (w, h) = (3 * 8 * usize::from(across), 8 * usize::from(down));
            assert_eq!((size.width as usize, size.height as usize), (w, h));
            assert_eq!(compressed_size(&bytes), Some(size));
            for (i, [y, u, v]) in units.iter().enumerate() {
                let (y, u, v) = (f64::from(*y), f64::from(u - 128), f64::from(v - 128));
                let want = [y + 1.402 * v, y - 0.344_136 * u - 0.714_136 * v, y + 1.772 * u];
                // The middle of the unit, away from where chroma is interpolated.
                let at = (h / 2 * w + i * w / 3 + w / 6) * 3;
                for (got, want) in out[at..at + 3].iter().zip(want) {
                    assert!((f64::from(*got) - want).abs() < 4.0, "{across}x{down}, unit {i}: {out:?}");
                }
            }
        }
    }

    #[test]
    fn formats_are_refused_by_name() {
        for (bytes, want) in [
            (&b"RIFF\x10\0\0\0WEBPVP8 "[..], "WebP is not supported"),
            (b"BM\x10\0", "BMP is not supported"),
            (b"II*\0\x08", "TIFF is not supported"),
            (b"\0\0\0\x01\x67", "video (H.264 or H.265) is not supported"),
            (b"GIF89a", "GIF is not supported: 6 bytes; send JPEG or PNG"),
        ] {
            let got = decode_compressed_rgb8(bytes, &Limits::default(), &mut Vec::new()).unwrap_err();
            assert!(got.to_string().contains(want), "{got}");
        }
    }

    #[test]
    fn rvl_depth_is_read() {
        let samples = [0u16, 0, 1000, 1001, 1000, 998, 0, 2500, 65_535, 0, 0, 7];
        let mut bytes = vec![0; 4];
        bytes.extend(500f32.to_le_bytes());
        bytes.extend(900f32.to_le_bytes());
        bytes.extend(4u32.to_le_bytes());
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(rvl::tests::encode(&samples));
        let mut out = Vec::new();
        let limits = Limits::default();
        let size = decode_compressed_depth(&bytes, "16UC1; compressedDepth rvl", &limits, &mut out);
        assert_eq!(size, Ok(Size { width: 4, height: 3 }));
        for (got, want) in out.iter().zip(samples) {
            assert!(if want == 0 { got.is_nan() } else { (got - f32::from(want) * 1e-3).abs() < 1e-5 });
        }
        decode_compressed_depth(&bytes, "32FC1; compressedDepth RVL", &limits, &mut out).unwrap();
        assert!((out[2] - 5.0).abs() < 1e-5 && out[0].is_nan(), "{out:?}");
        for length in [0, 12, 19, 20, 24] {
            let cut =
                decode_compressed_depth(&bytes[..length], "16UC1; compressedDepth rvl", &limits, &mut out);
            assert!(matches!(cut, Err(ImageError::Corrupt { .. })), "{length} bytes: {cut:?}");
        }
        let huge = Limits { pixels_max: 11 };
        let got = decode_compressed_depth(&bytes, "16UC1; compressedDepth rvl", &huge, &mut out);
        assert!(matches!(got, Err(ImageError::TooLarge { .. })));
    }

    #[test]
    fn depth_is_in_metres_with_nan_for_unknown() {
        let mut out = Vec::new();
        let limits = Limits::default();
        let big = RawImage { is_bigendian: true, ..raw("16UC1", 2, 1, 4, &[0x03, 0xe8, 0, 0]) };
        decode_raw_depth(&big, &limits, &mut out).unwrap();
        assert!((out[0] - 1.0).abs() < 1e-6 && out[1].is_nan());
        let mut bytes = 2.5f32.to_le_bytes().to_vec();
        bytes.extend(f32::INFINITY.to_le_bytes());
        decode_raw_depth(&raw("32FC1", 2, 1, 8, &bytes), &limits, &mut out).unwrap();
        assert!((out[0] - 2.5).abs() < 1e-6 && out[1].is_nan());
        assert!(decode_raw_depth(&raw("rgb8", 1, 1, 3, &[0; 3]), &limits, &mut out).is_err());
    }

    #[test]
    fn compressed_depth_undoes_the_quantisation() {
        let mut png_bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut png_bytes, 2, 1);
        encoder.set_color(png::ColorType::Grayscale);
        encoder.set_depth(png::BitDepth::Sixteen);
        encoder.write_header().unwrap().write_image_data(&[0x03, 0xe8, 0, 0]).unwrap();
        let mut bytes = vec![0; 4];
        bytes.extend(500f32.to_le_bytes());
        bytes.extend(900f32.to_le_bytes());
        bytes.extend(&png_bytes);
        let mut out = Vec::new();
        // format text, first pixel in metres
        for (format, want) in [("16UC1; compressedDepth", 1.0), ("32FC1; compressedDepth png", 5.0)] {
            decode_compressed_depth(&bytes, format, &Limits::default(), &mut out).unwrap();
            assert!((out[0] - want).abs() < 1e-5 && out[1].is_nan(), "{format}: {out:?}");
        }
    }
}
