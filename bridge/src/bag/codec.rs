//! Decompression with bounds on what it may produce.

use std::io::{self, Read};

use super::error::DecompressError;
use super::ffi;

/// How a chunk is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Codec {
    None,
    Bz2,
    Lz4,
    Zstd,
}

pub(crate) const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

impl Codec {
    pub fn from_name(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"none" | b"" => Self::None,
            b"bz2" => Self::Bz2,
            b"lz4" => Self::Lz4,
            b"zstd" => Self::Zstd,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Bz2 => "bz2",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Result of [`decompress`]: how far it came.
pub(crate) struct Decompressed {
    /// Why it ended early.
    pub error: Option<DecompressError>,
}

/// Decompresses into `out`, at most `size` bytes (what the header claims). Memory grows with what is really
/// produced, unless the claim is believable for the number of compressed bytes. Without `checked` the checksum of an
/// LZ4 frame may go unseen: for content that has one of its own.
pub(crate) fn decompress(
    codec: Codec,
    compressed: &[u8],
    size: usize,
    checked: bool,
    out: &mut Vec<u8>,
) -> Decompressed {
    let error = match codec {
        Codec::None => {
            out.clear();
            out.extend_from_slice(&compressed[..compressed.len().min(size)]);
            None
        }
        Codec::Zstd => {
            out.clear();
            if believable(compressed.len(), size) {
                out.reserve(size);
                match zstd_bulk(compressed, out) {
                    Ok(()) if out.len() == size => return Decompressed { error: None },
                    // The slow way keeps what can be had of a damaged frame.
                    _ => out.clear(),
                }
            }
            match zstd::stream::read::Decoder::with_buffer(compressed) {
                Ok(decoder) => drain(decoder, size, out),
                Err(e) => Some(e.into()),
            }
        }
        Codec::Lz4 => lz4(compressed, size, checked, out),
        Codec::Bz2 => {
            out.clear();
            if believable(compressed.len(), size) {
                out.reserve(size);
            }
            // What was read before an error stays.
            drain(bzip2::bufread::BzDecoder::new(compressed), size, out)
        }
    };
    let short = (out.len() < size).then_some(DecompressError::Short { got: out.len(), want: size });
    let error = error.or(short);
    Decompressed { error }
}

fn lz4(compressed: &[u8], size: usize, checked: bool, out: &mut Vec<u8>) -> Option<DecompressError> {
    if believable(compressed.len(), size) {
        // The memory of a used buffer is not cleared.
        if out.len() < size {
            out.resize(size, 0);
        } else {
            out.truncate(size);
        }
        let (done, error) = ffi::lz4::decompress(compressed, out, checked);
        if error.is_none() {
            out.truncate(done);
            return None;
        }
    }
    out.clear();
    ffi::lz4::salvage(compressed, size, out).map(DecompressError::Lz4)
}

/// A claim of up to 64 times the compressed bytes is given memory at once.
fn believable(compressed: usize, size: usize) -> bool {
    size <= compressed.saturating_mul(64).saturating_add(1 << 16)
}

fn zstd_bulk(compressed: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
    thread_local! {
        static CONTEXT: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
            const { std::cell::RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|context| {
        let decompressor = match context {
            Some(decompressor) => decompressor,
            None => context.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress_to_buffer(compressed, out).map(drop)
    })
}

fn drain(reader: impl Read, size: usize, out: &mut Vec<u8>) -> Option<DecompressError> {
    reader.take(size as u64).read_to_end(out).err().map(DecompressError::from)
}

/// Appends the content of one zstd frame to `out`, at most `limit` bytes.
pub(crate) fn append_zstd(frame: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<usize, DecompressError> {
    let before = out.len();
    let decoder = zstd::stream::read::Decoder::with_buffer(frame)?;
    let read = decoder.take(limit as u64 + 1).read_to_end(out);
    let grown = out.len() - before;
    match read {
        Ok(_) if grown <= limit => Ok(grown),
        Ok(_) => {
            out.truncate(before);
            Err(DecompressError::TooLarge { limit })
        }
        Err(e) => {
            out.truncate(before);
            Err(e.into())
        }
    }
}
