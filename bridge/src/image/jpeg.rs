//! JPEG streams as cameras send them.
//!
//! Motion-JPEG frames of USB cameras leave out the Huffman tables, because they are always those of ITU-T T.81, Annex K.
//! A decoder needs them in the stream.

use std::borrow::Cow;

/// Values of one table: how many codes of each length from 1 to 16 bits, and what they stand for.
struct Table {
    /// Class (0 = DC, 1 = AC) in the high nibble, destination in the low one.
    class: u8,
    lengths: [u8; 16],
    values: &'static [u8],
}

/// T.81, tables K.3 to K.6.
const STANDARD: [Table; 4] = [
    Table {
        class: 0x00,
        lengths: [0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        values: &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    },
    Table {
        class: 0x10,
        lengths: [0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 0x7d],
        values: &[
            0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07,
            0x22, 0x71, 0x14, 0x32, 0x81, 0x91, 0xa1, 0x08, 0x23, 0x42, 0xb1, 0xc1, 0x15, 0x52, 0xd1, 0xf0,
            0x24, 0x33, 0x62, 0x72, 0x82, 0x09, 0x0a, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x25, 0x26, 0x27, 0x28,
            0x29, 0x2a, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49,
            0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69,
            0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89,
            0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7,
            0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3, 0xc4, 0xc5,
            0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda, 0xe1, 0xe2,
            0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8,
            0xf9, 0xfa,
        ],
    },
    Table {
        class: 0x01,
        lengths: [0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        values: &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    },
    Table {
        class: 0x11,
        lengths: [0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 0x77],
        values: &[
            0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71,
            0x13, 0x22, 0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xa1, 0xb1, 0xc1, 0x09, 0x23, 0x33, 0x52, 0xf0,
            0x15, 0x62, 0x72, 0xd1, 0x0a, 0x16, 0x24, 0x34, 0xe1, 0x25, 0xf1, 0x17, 0x18, 0x19, 0x1a, 0x26,
            0x27, 0x28, 0x29, 0x2a, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3a, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48,
            0x49, 0x4a, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68,
            0x69, 0x6a, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87,
            0x88, 0x89, 0x8a, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9a, 0xa2, 0xa3, 0xa4, 0xa5,
            0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xc2, 0xc3,
            0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xd2, 0xd3, 0xd4, 0xd5, 0xd6, 0xd7, 0xd8, 0xd9, 0xda,
            0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0xe8, 0xe9, 0xea, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7, 0xf8,
            0xf9, 0xfa,
        ],
    },
];

/// A segment of a JPEG stream before its first scan.
struct Segment {
    /// The second byte of its marker.
    code: u8,
    /// Where its marker begins.
    start: usize,
    /// Where its content begins, behind the length.
    content: usize,
}

/// The segments up to and including the first start of scan; ends early where the stream is damaged.
fn segments(bytes: &[u8]) -> impl Iterator<Item = Segment> {
    let mut at = 2;
    let mut over = !bytes.starts_with(&[0xff, 0xd8]);
    std::iter::from_fn(move || {
        if over {
            return None;
        }
        // Fill bytes may stand before a marker.
        while bytes.get(at..at + 2)? == [0xff, 0xff] {
            at += 1;
        }
        let (&mark, &code) = (bytes.get(at)?, bytes.get(at + 1)?);
        let length = usize::from(u16::from_be_bytes(bytes.get(at + 2..at + 4)?.try_into().ok()?));
        if mark != 0xff || length < 2 {
            return None;
        }
        let segment = Segment { code, start: at, content: at + 4 };
        over = code == 0xda;
        at += 2 + length;
        Some(segment)
    })
}

/// The frame header of a JPEG stream, from its sample precision on; `None` where there is none.
fn frame_header(bytes: &[u8]) -> Option<&[u8]> {
    let is_frame = |code: u8| (0xc0..=0xcf).contains(&code) && ![0xc4, 0xc8, 0xcc].contains(&code);
    let frame = segments(bytes).find(|s| is_frame(s.code))?;
    bytes.get(frame.content..)
}

/// Width and height in pixels.
#[must_use]
pub(super) fn size(bytes: &[u8]) -> Option<(u32, u32)> {
    let header = frame_header(bytes)?;
    let number = |at: usize| Some(u32::from(u16::from_be_bytes(header.get(at..at + 2)?.try_into().ok()?)));
    Some((number(3)?, number(1)?))
}

/// Colour components: 1 for grey.
#[must_use]
pub(super) fn components(bytes: &[u8]) -> Option<u8> {
    frame_header(bytes)?.get(5).copied()
}

/// The stream with the standard Huffman tables before its scan where it has none, otherwise as it is.
pub(super) fn with_tables(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut scan = None;
    for segment in segments(bytes) {
        match segment.code {
            // A table, or arithmetic coding (0xc9 to 0xcb), which has none.
            0xc4 | 0xc9..=0xcb => return Cow::Borrowed(bytes),
            0xda => scan = Some(segment.start),
            _ => {}
        }
    }
    let Some(scan) = scan else { return Cow::Borrowed(bytes) };
    let length: usize = 2 + STANDARD.iter().map(|t| 17 + t.values.len()).sum::<usize>();
    let mut whole = Vec::with_capacity(bytes.len() + 2 + length);
    whole.extend_from_slice(&bytes[..scan]);
    whole.extend_from_slice(&[0xff, 0xc4]);
    whole.extend_from_slice(&(length as u16).to_be_bytes());
    for table in &STANDARD {
        whole.push(table.class);
        whole.extend_from_slice(&table.lengths);
        whole.extend_from_slice(table.values);
    }
    whole.extend_from_slice(&bytes[scan..]);
    Cow::Owned(whole)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Codes of T.81 for differences of 0 to 7 bits (tables K.3 and K.4) and for the end of a block (K.5 and K.6),
    /// written out: luminance, chrominance.
    const DC: [[&str; 8]; 2] = [
        ["00", "010", "011", "100", "101", "110", "1110", "11110"],
        ["00", "01", "10", "110", "1110", "11110", "111110", "1111110"],
    ];
    const END: [&str; 2] = ["1010", "00"];

    /// A baseline JPEG without Huffman tables whose blocks are flat: a row of units, each with its luminance and its two
    /// chrominances (0..255, multiples of 8 from 128), subsampled `across` x `down`.
    pub fn without_tables(units: &[[i32; 3]], across: u8, down: u8) -> Vec<u8> {
        let mut bits = String::new();
        let mut before = [0; 3];
        for unit in units {
            for component in 0..3 {
                let blocks = if component == 0 { across * down } else { 1 };
                for _ in 0..blocks {
                    let kind = usize::from(component > 0);
                    // A flat block of value v has the coefficient 8 (v - 128); the quantiser is 8.
                    let value = unit[component] - 128;
                    let step: i32 = value - before[component];
                    before[component] = value;
                    let length = (32 - step.unsigned_abs().leading_zeros()) as usize;
                    bits += DC[kind][length];
                    let coded = if step < 0 { step + (1 << length) - 1 } else { step };
                    if length > 0 {
                        bits += &format!("{coded:0length$b}");
                    }
                    bits += END[kind];
                }
            }
        }
        bits += &"1".repeat(bits.len().next_multiple_of(8) - bits.len());
        let (width, height) = (units.len() * 8 * usize::from(across), 8 * usize::from(down));
        let mut out = vec![0xff, 0xd8];
        let mut segment = |code: u8, content: &[u8]| {
            out.extend([0xff, code]);
            out.extend((content.len() as u16 + 2).to_be_bytes());
            out.extend(content);
        };
        segment(0xdb, &[&[0][..], &[8; 64]].concat());
        let (w, h) = ((width as u16).to_be_bytes(), (height as u16).to_be_bytes());
        let sampling = across << 4 | down;
        segment(0xc0, &[8, h[0], h[1], w[0], w[1], 3, 1, sampling, 0, 2, 0x11, 0, 3, 0x11, 0]);
        segment(0xda, &[3, 1, 0x00, 2, 0x11, 3, 0x11, 0, 63, 0]);
        for byte in bits.as_bytes().chunks(8) {
            let byte = u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap();
            out.push(byte);
            if byte == 0xff {
                out.push(0);
            }
        }
        out.extend([0xff, 0xd9]);
        out
    }

    #[test]
    fn tables_are_put_in_once_and_only_where_they_lack() {
        let bare = without_tables(&[[128; 3]], 2, 1);
        let whole = with_tables(&bare);
        assert_eq!(whole.len(), bare.len() + 2 + 2 + (17 + 12) * 2 + (17 + 162) * 2);
        assert!(matches!(with_tables(&whole), Cow::Borrowed(_)), "they are there now");
        for damaged in [&b""[..], b"\xff\xd8", b"\xff\xd8\xff", &bare[..30], b"\xff\xd8\xff\xc0\0\0"] {
            assert!(matches!(with_tables(damaged), Cow::Borrowed(_)), "{damaged:02x?}");
        }
    }

    #[test]
    fn codes_are_complete() {
        // Kraft: every table uses all codes but the one of ones only.
        for table in &STANDARD {
            let used: u32 = table.lengths.iter().enumerate().map(|(i, n)| u32::from(*n) << (15 - i)).sum();
            assert!(used < 1 << 16, "table {:#x}", table.class);
            let count: usize = table.lengths.iter().map(|n| usize::from(*n)).sum();
            assert_eq!(count, table.values.len(), "table {:#x}", table.class);
            let mut sorted = table.values.to_vec();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), table.values.len(), "table {:#x}: a value stands twice", table.class);
        }
    }
}
