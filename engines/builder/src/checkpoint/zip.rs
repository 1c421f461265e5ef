//! Zip archives, as far as `torch.save` writes them: entries without compression, zip64.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt};

/// Largest central directory that is read.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// Why an archive was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZipError {
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No end record.
    #[error("no zip archive; .pth files written before PyTorch 1.6 must be converted")]
    NoArchive,
    /// Something lies outside the file.
    #[error("zip: {length} bytes at {offset} lie beyond the end of the file ({size} bytes)")]
    Beyond {
        /// Bytes wanted.
        length: u64,
        /// Where.
        offset: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// The central directory does not hold together.
    #[error("zip: broken central directory")]
    Directory,
    /// The central directory is too large.
    #[error("zip: directory of {bytes} bytes, at most {MAX_DIRECTORY_BYTES} are read")]
    DirectorySize {
        /// Its size.
        bytes: u64,
    },
    /// Two entries have one name.
    #[error("zip: {name:?} is there twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// An entry's own header does not hold together.
    #[error("zip: broken local header at {offset}")]
    Header {
        /// Where.
        offset: u64,
    },
    /// An entry's data lie outside the file.
    #[error("zip: entry at {offset} lies beyond the end of the file")]
    Entry {
        /// Where its header is.
        offset: u64,
    },
    /// An entry that must be read whole cannot be.
    #[error("zip: entry of {bytes} bytes is compressed or larger than {limit}")]
    Unreadable {
        /// Its size.
        bytes: u64,
        /// Most that is read.
        limit: u64,
    },
}

/// A file inside a zip archive, stored without compression.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    /// Offset of the local header.
    header: u64,
    /// Bytes of data.
    pub(super) size: u64,
    /// Stored in another form than as it is.
    pub(super) compressed: bool,
}

/// An open archive.
pub(super) struct Archive<'a> {
    file: &'a File,
    size: u64,
}

fn u16_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u16::from_le_bytes(*b.get(at..)?.first_chunk()?)))
}

fn u32_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from(u32::from_le_bytes(*b.get(at..)?.first_chunk()?)))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*b.get(at..)?.first_chunk()?))
}

impl<'a> Archive<'a> {
    /// The archive in this file.
    pub(super) fn new(file: &'a File) -> Result<Self, ZipError> {
        Ok(Self { file, size: file.metadata()?.len() })
    }

    fn at(&self, offset: u64, len: u64) -> Result<Vec<u8>, ZipError> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(ZipError::Beyond { length: len, offset, size: self.size });
        }
        // Within the file, so it fits the address space wherever the file does.
        let mut out = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut out, offset)?;
        Ok(out)
    }

    /// The central directory, zip64 included.
    pub(super) fn directory(&self) -> Result<HashMap<String, Stored>, ZipError> {
        let broken = || ZipError::Directory;
        let tail_len = self.size.min(22 + 0xffff);
        let tail_at = self.size - tail_len;
        let tail = self.at(tail_at, tail_len)?;
        let Some(end) = tail.windows(4).rposition(|w| w == b"PK\x05\x06") else {
            return Err(ZipError::NoArchive);
        };
        let record = &tail[end..];
        let mut count = u16_at(record, 10).ok_or_else(broken)?;
        let mut len = u32_at(record, 12).ok_or_else(broken)?;
        let mut offset = u32_at(record, 16).ok_or_else(broken)?;
        if count == 0xffff || len == 0xffff_ffff || offset == 0xffff_ffff {
            let at = (tail_at + end as u64).checked_sub(20).ok_or_else(broken)?;
            let locator = self.at(at, 20)?;
            if &locator[..4] != b"PK\x06\x07" {
                return Err(broken());
            }
            let record = self.at(u64_at(&locator, 8).ok_or_else(broken)?, 56)?;
            if &record[..4] != b"PK\x06\x06" {
                return Err(broken());
            }
            count = u64_at(&record, 32).ok_or_else(broken)?;
            len = u64_at(&record, 40).ok_or_else(broken)?;
            offset = u64_at(&record, 48).ok_or_else(broken)?;
        }
        if len > MAX_DIRECTORY_BYTES {
            return Err(ZipError::DirectorySize { bytes: len });
        }
        let bytes = self.at(offset, len)?;
        let mut rest = bytes.as_slice();
        let mut out = HashMap::new();
        for _ in 0..count {
            let (name, stored, used) = directory_entry(rest).ok_or_else(broken)?;
            rest = &rest[used..];
            if out.insert(name.clone(), stored).is_some() {
                return Err(ZipError::Twice { name });
            }
        }
        Ok(out)
    }

    /// First byte of an entry's data.
    pub(super) fn start(&self, entry: &Stored) -> Result<u64, ZipError> {
        let header = self.at(entry.header, 30)?;
        let broken = || ZipError::Header { offset: entry.header };
        if &header[..4] != b"PK\x03\x04" {
            return Err(broken());
        }
        let skip = 30 + u16_at(&header, 26).ok_or_else(broken)? + u16_at(&header, 28).ok_or_else(broken)?;
        let start = entry.header + skip;
        if start.checked_add(entry.size).is_none_or(|end| end > self.size) {
            return Err(ZipError::Entry { offset: entry.header });
        }
        Ok(start)
    }

    /// All bytes of an entry that is stored as it is.
    pub(super) fn read(&self, entry: &Stored, limit: u64) -> Result<Vec<u8>, ZipError> {
        if entry.compressed || entry.size > limit {
            return Err(ZipError::Unreadable { bytes: entry.size, limit });
        }
        self.at(self.start(entry)?, entry.size)
    }
}

/// Name, place and length of one central directory record.
fn directory_entry(b: &[u8]) -> Option<(String, Stored, usize)> {
    if b.get(..4)? != b"PK\x01\x02" {
        return None;
    }
    let method = u16_at(b, 10)?;
    let packed = u32_at(b, 20)?;
    let mut size = u32_at(b, 24)?;
    let (name_len, extra_len, comment_len) =
        (u16_at(b, 28)? as usize, u16_at(b, 30)? as usize, u16_at(b, 32)? as usize);
    let mut header = u32_at(b, 42)?;
    let name = String::from_utf8(b.get(46..46 + name_len)?.to_vec()).ok()?;
    let mut extra = b.get(46 + name_len..46 + name_len + extra_len)?;
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0)?, u16_at(extra, 2)? as usize);
        let mut body = extra.get(4..4 + len)?;
        if id == 1 {
            let mut next = || {
                let value = u64_at(body, 0)?;
                body = &body[8..];
                Some(value)
            };
            if size == 0xffff_ffff {
                size = next()?;
            }
            if packed == 0xffff_ffff {
                next()?;
            }
            if header == 0xffff_ffff {
                header = next()?;
            }
        }
        extra = &extra[4 + len..];
    }
    let used = 46 + name_len + extra_len + comment_len;
    b.get(..used)?;
    Some((name, Stored { header, size, compressed: method != 0 }, used))
}
