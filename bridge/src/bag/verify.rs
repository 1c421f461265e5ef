//! Reading everything of a bag: counts, digests per topic, decoded images.

use mindseye_base::file::{hex, sha256};
use sha2::{Digest, Sha256};

use super::cdr::{CdrConverter, ConvertError};
use super::{Bag, Damage, Encoding, RawMessage, ReadOptions, TopicInfo};
use crate::image::{self, ImageError, Limits, RawImage};

/// What reading one topic through gave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicReport {
    /// Messages that were read.
    pub count: u64,
    /// SHA-256 over all messages one after the other, as little-endian CDR with header; messages that are
    /// not ROS as they are.
    pub sha256: String,
    /// Messages whose bytes do not fit their type.
    pub misfits: u64,
    /// Why the first of them does not.
    pub first_misfit: Option<String>,
}

/// Cells of the grid of mean colours: columns and rows.
pub const GRID: (usize, usize) = (8, 6);

/// One decoded image.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ImageReport {
    /// Topic name.
    pub topic: String,
    /// Log time in nanoseconds since the Unix epoch.
    pub log_time_ns: i64,
    /// Width in pixels; 0 when the image could not be decoded.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// SHA-256 of the RGB8 pixels; `None` for depth images and for images that could not be decoded.
    pub rgb_sha256: Option<String>,
    /// Depth images: SHA-256 of the samples as recorded, without padding, in little-endian order.
    pub depth_sha256: Option<String>,
    /// Colour images: mean red, green and blue of each cell, rows from the top.
    pub grid8x6: Option<[[[f64; 3]; 8]; 6]>,
    /// Why the image could not be decoded.
    pub error: Option<String>,
}

/// What reading a bag through gave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyReport {
    /// By topic, in the order of [`BagInfo::topics`](super::BagInfo::topics).
    pub topics: Vec<TopicReport>,
    /// Messages that were read.
    pub messages: u64,
    /// Smallest log time that was read; 0 without messages.
    pub start_ns: i64,
    /// Largest log time that was read.
    pub end_ns: i64,
    /// Messages whose log time is 0: the recorder had no time yet.
    pub unstamped: u64,
    /// Damage met on opening and on reading.
    pub damage: Vec<Damage>,
}

/// Reads everything that `options` select. With `on_image`, decodes every image message and reports it;
/// `on_message` is called with the number of messages so far.
pub fn verify(
    bag: &Bag,
    options: &ReadOptions,
    mut on_image: Option<&mut dyn FnMut(ImageReport)>,
    on_message: &mut dyn FnMut(u64),
) -> VerifyReport {
    struct Count {
        hash: Sha256,
        count: u64,
        misfits: u64,
        first: Option<String>,
    }
    let info = bag.info();
    let fresh = || Count { hash: Sha256::new(), count: 0, misfits: 0, first: None };
    let mut topics: Vec<Count> = info.topics.iter().map(|_| fresh()).collect();
    let mut converter = CdrConverter::new(info);
    let mut decoder = ImageDecoder::default();
    let (mut start_ns, mut end_ns, mut total, mut unstamped) = (i64::MAX, i64::MIN, 0, 0);
    let mut messages = bag.messages(options);
    for message in &mut messages {
        let topic = info.topic(message.topic);
        let entry = &mut topics[message.topic.0 as usize];
        entry.count += 1;
        total += 1;
        unstamped += u64::from(message.log_time_ns == 0);
        on_message(total);
        start_ns = start_ns.min(message.log_time_ns);
        end_ns = end_ns.max(message.log_time_ns);
        let bytes = match converter.convert(&message) {
            Ok(cdr) => cdr,
            Err(ConvertError::Foreign { .. }) => &message.data,
            Err(e) => {
                entry.misfits += 1;
                entry.first.get_or_insert_with(|| e.to_string());
                &message.data
            }
        };
        entry.hash.update(bytes);
        if let Some(on_image) = &mut on_image
            && let Some(report) = decoder.report(topic, &message, bytes)
        {
            on_image(report);
        }
    }
    if total == 0 {
        (start_ns, end_ns) = (0, 0);
    }
    let damage = info.damage.iter().chain(messages.damage()).cloned().collect();
    let topics = topics
        .into_iter()
        .map(|c| TopicReport {
            count: c.count,
            sha256: hex(&c.hash.finalize()),
            misfits: c.misfits,
            first_misfit: c.first,
        })
        .collect();
    VerifyReport { topics, messages: total, start_ns, end_ns, unstamped, damage }
}

/// Image messages of the kinds that bags hold.
enum Picture<'a> {
    Raw(RawImage<'a>),
    Compressed { format: String, data: std::borrow::Cow<'a, [u8]> },
}

#[derive(Default)]
struct ImageDecoder {
    rgb: Vec<u8>,
    depth: Vec<f32>,
}

impl ImageDecoder {
    /// `None` when the topic holds no images.
    fn report(&mut self, topic: &TopicInfo, message: &RawMessage, cdr: &[u8]) -> Option<ImageReport> {
        let compressed = match topic.type_name.rsplit(['/', '.']).next()? {
            "CompressedImage" => true,
            "Image" | "RawImage" => false,
            _ => return None,
        };
        let mut json = JsonImage::default();
        let picture = match topic.encoding {
            Encoding::Cdr | Encoding::Ros1 => parse_ros(cdr, compressed),
            Encoding::Json => parse_json(&message.data, compressed, &mut json),
            Encoding::Protobuf => parse_protobuf(&message.data, compressed),
            Encoding::Other(_) => None,
        };
        let mut report = ImageReport {
            topic: topic.name.clone(),
            log_time_ns: message.log_time_ns,
            width: 0,
            height: 0,
            rgb_sha256: None,
            depth_sha256: None,
            grid8x6: None,
            error: None,
        };
        let Some(picture) = picture else {
            report.error = Some(format!("the bytes do not fit {}", topic.type_name));
            return Some(report);
        };
        if let Err(e) = self.decode(&picture, &mut report) {
            report.error = Some(e.to_string());
        }
        Some(report)
    }

    fn decode(&mut self, picture: &Picture<'_>, report: &mut ImageReport) -> Result<(), ImageError> {
        let limits = Limits::default();
        let is_depth = match picture {
            Picture::Raw(raw) => image::is_depth_encoding(raw.encoding),
            Picture::Compressed { format, data } => {
                image::sniff(data) == Some(image::Compressed::DepthPng)
                    || ["16UC1", "32FC1"].iter().any(|d| format.starts_with(d))
            }
        };
        let size = match (picture, is_depth) {
            (Picture::Raw(raw), false) => image::decode_raw_rgb8(raw, &limits, &mut self.rgb)?,
            (Picture::Raw(raw), true) => {
                let size = image::decode_raw_depth(raw, &limits, &mut self.depth)?;
                report.depth_sha256 = Some(depth_digest(raw));
                size
            }
            (Picture::Compressed { data, .. }, false) => {
                image::decode_compressed_rgb8(data, &limits, &mut self.rgb)?
            }
            (Picture::Compressed { format, data }, true) => {
                let size = image::decode_compressed_depth(data, format, &limits, &mut self.depth)?;
                let bytes: Vec<u8> = self.depth.iter().flat_map(|m| m.to_le_bytes()).collect();
                report.depth_sha256 = Some(sha256(&bytes));
                size
            }
        };
        (report.width, report.height) = (size.width, size.height);
        if !is_depth {
            report.rgb_sha256 = Some(sha256(&self.rgb));
            report.grid8x6 = Some(grid(&self.rgb, size.width as usize, size.height as usize));
        }
        Ok(())
    }
}

/// The samples of a depth image that was decoded before: the sizes are good.
fn depth_digest(raw: &RawImage<'_>) -> String {
    let bytes = if raw.encoding == "32FC1" { 4 } else { 2 };
    let row = raw.width as usize * bytes;
    let step = if raw.step == 0 { row } else { raw.step as usize };
    let mut hash = Sha256::new();
    for y in 0..raw.height as usize {
        let from = &raw.data[y * step..y * step + row];
        if raw.is_bigendian {
            let swapped: Vec<u8> = from.chunks_exact(bytes).flat_map(|s| s.iter().rev().copied()).collect();
            hash.update(&swapped);
        } else {
            hash.update(from);
        }
    }
    hex(&hash.finalize())
}

/// Which pixels of a line of `length` belong to part `at` of `parts`, and how much of each: a pixel on a
/// boundary is shared by area.
fn shares(at: usize, parts: usize, length: usize) -> Vec<(usize, f64)> {
    let scale = length as f64 / parts as f64;
    let (low, high) = (at as f64 * scale, (at + 1) as f64 * scale);
    (low as usize..(high.ceil() as usize).min(length))
        .map(|x| (x, (high.min(x as f64 + 1.0) - low.max(x as f64)).max(0.0)))
        .collect()
}

/// Mean colour of each cell; cells have equal areas.
fn grid(rgb: &[u8], width: usize, height: usize) -> [[[f64; 3]; 8]; 6] {
    let columns: Vec<_> = (0..GRID.0).map(|i| shares(i, GRID.0, width)).collect();
    let mut grid = [[[0.0; 3]; 8]; 6];
    let area = (width as f64 / GRID.0 as f64) * (height as f64 / GRID.1 as f64);
    for (j, row) in grid.iter_mut().enumerate() {
        let mut sums = [[0.0; 3]; 8];
        for (y, of_row) in shares(j, GRID.1, height) {
            let line = &rgb[y * width * 3..][..width * 3];
            for (sum, column) in sums.iter_mut().zip(&columns) {
                for (x, of_column) in column {
                    for (s, value) in sum.iter_mut().zip(&line[x * 3..x * 3 + 3]) {
                        *s += of_row * of_column * f64::from(*value);
                    }
                }
            }
        }
        *row = sums.map(|sum| sum.map(|s| (s / area * 100.0).round() / 100.0));
    }
    grid
}

/// Fields of a little-endian CDR message.
struct Cdr<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Cdr<'a> {
    fn u32(&mut self) -> Option<u32> {
        let at = self.at.next_multiple_of(4);
        let bytes = self.body.get(at..at + 4)?;
        self.at = at + 4;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
    fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = self.u32()? as usize;
        let bytes = self.body.get(self.at..self.at.checked_add(n)?)?;
        self.at += n;
        Some(bytes)
    }
    fn text(&mut self) -> Option<&'a str> {
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes.strip_suffix(b"\0").unwrap_or(bytes)).ok()
    }
}

/// `sensor_msgs/msg/Image` or `CompressedImage`.
fn parse_ros(cdr: &[u8], compressed: bool) -> Option<Picture<'_>> {
    let mut c = Cdr { body: cdr.get(4..)?, at: 0 };
    let (_sec, _nanosec, _frame) = (c.u32()?, c.u32()?, c.text()?);
    if compressed {
        let format = c.text()?.to_owned();
        return Some(Picture::Compressed { format, data: c.bytes()?.into() });
    }
    let (height, width, encoding) = (c.u32()?, c.u32()?, c.text()?);
    let is_bigendian = *c.body.get(c.at)? != 0;
    c.at += 1;
    let step = c.u32()?;
    Some(Picture::Raw(RawImage { width, height, encoding, step, is_bigendian, data: c.bytes()? }))
}

/// What a JSON document holds of an image, out of its text.
#[derive(Default)]
struct JsonImage {
    encoding: String,
    pixels: Vec<u8>,
}

/// `foxglove.CompressedImage` or `foxglove.RawImage` as JSON; pixels are base64. A step that is left out stands for rows
/// without padding.
fn parse_json<'a>(bytes: &[u8], compressed: bool, held: &'a mut JsonImage) -> Option<Picture<'a>> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let text = |name: &str| value.get(name).and_then(|f| f.as_str()).unwrap_or_default().to_owned();
    held.pixels = base64(value.get("data")?.as_str()?.as_bytes())?;
    if compressed {
        return Some(Picture::Compressed { format: text("format"), data: held.pixels.as_slice().into() });
    }
    held.encoding = text("encoding");
    let number = |name: &str| u32::try_from(value.get(name)?.as_u64()?).ok();
    Some(Picture::Raw(RawImage {
        width: number("width")?,
        height: number("height")?,
        encoding: &held.encoding,
        step: number("step").unwrap_or(0),
        is_bigendian: false,
        data: &held.pixels,
    }))
}

/// `foxglove.CompressedImage` or `foxglove.RawImage` as protocol buffers.
fn parse_protobuf(mut bytes: &[u8], compressed: bool) -> Option<Picture<'_>> {
    let mut numbers = [0u32; 8];
    let mut blobs: [&[u8]; 8] = [&[]; 8];
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let field = usize::try_from(key >> 3).ok()?;
        let slot = field.min(7);
        match key & 7 {
            0 => numbers[slot] = varint(&mut bytes)? as u32,
            1 => bytes = bytes.get(8..)?,
            2 => {
                let n = usize::try_from(varint(&mut bytes)?).ok()?;
                let (blob, rest) = bytes.split_at_checked(n)?;
                blobs[slot] = blob;
                bytes = rest;
            }
            5 => {
                let (word, rest) = bytes.split_at_checked(4)?;
                numbers[slot] = u32::from_le_bytes(word.try_into().ok()?);
                bytes = rest;
            }
            _ => return None,
        }
    }
    if compressed {
        // timestamp 1, data 2, format 3, frame_id 4.
        let format = String::from_utf8_lossy(blobs[3]).into_owned();
        return Some(Picture::Compressed { format, data: blobs[2].into() });
    }
    // timestamp 1, width 2, height 3, encoding 4, step 5, data 6, frame_id 7.
    let encoding = std::str::from_utf8(blobs[4]).ok()?;
    let (width, height, step) = (numbers[2], numbers[3], numbers[5]);
    Some(Picture::Raw(RawImage { width, height, encoding, step, is_bigendian: false, data: blobs[6] }))
}

/// RFC 4648, with or without padding.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0u32, 0);
    for c in text.iter().filter(|c| **c != b'=') {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_follows_the_rfc() {
        // RFC 4648, section 10.
        for (text, want) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYg", "foob")] {
            assert_eq!(base64(text.as_bytes()).unwrap(), want.as_bytes(), "{text}");
        }
        assert_eq!(base64(b"Z*=="), None);
    }

    #[test]
    fn encodings_of_other_formats_are_named() {
        let json = br#"{"width": 2, "height": 1, "encoding": "yuv9", "step": 2, "data": "AAA="}"#;
        let protobuf = b"\x15\x02\0\0\0\x1d\x01\0\0\0\x22\x04yuv9\x2d\x02\0\0\0\x32\x02\x07\x08";
        let mut held = JsonImage::default();
        for picture in [parse_json(json, false, &mut held), parse_protobuf(protobuf, false)] {
            let Some(Picture::Raw(raw)) = picture else { panic!("no image") };
            let got = image::decode_raw_rgb8(&raw, &Limits::default(), &mut Vec::new());
            assert_eq!(got, Err(ImageError::UnknownEncoding { encoding: "yuv9".into() }));
        }
        let bare = br#"{"width": 1, "height": 1, "encoding": "rgb8", "data": "AAAA"}"#;
        let Some(Picture::Raw(raw)) = parse_json(bare, false, &mut held) else { panic!("no image") };
        assert_eq!((raw.step, raw.data), (0, &[0; 3][..]));
    }

    #[test]
    fn foxglove_protobuf_images_are_found() {
        // width 2, height 1 (fixed32), encoding mono8, step 2, data 07 08.
        let bytes = b"\x15\x02\0\0\0\x1d\x01\0\0\0\x22\x05mono8\x2d\x02\0\0\0\x32\x02\x07\x08";
        let Some(Picture::Raw(raw)) = parse_protobuf(bytes, false) else { panic!("no image") };
        assert_eq!(
            (raw.width, raw.height, raw.encoding, raw.step, raw.data),
            (2, 1, "mono8", 2, &[7, 8][..])
        );
    }
}
