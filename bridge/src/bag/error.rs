//! What can be wrong with the bytes of a bag.

use std::io;

/// Why bytes cannot be decompressed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecompressError {
    /// The decompressor found an error in its stream.
    #[error(transparent)]
    Stream(#[from] io::Error),
    /// liblz4 found an error in a frame.
    #[error("{0}")]
    Lz4(String),
    /// The stream ended early.
    #[error("{got} of {want} bytes after decompression")]
    Short {
        /// Bytes that came out.
        got: usize,
        /// Bytes that the header claims.
        want: usize,
    },
    /// The content is larger than is allowed.
    #[error("more than {limit} bytes")]
    TooLarge {
        /// Bytes that are allowed.
        limit: usize,
    },
}

/// Why a part of a bag, or all of it, cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file does not have the form that its format asks for.
    #[error("{0}")]
    Form(&'static str),
    /// The operating system gave an error.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// SQLite refused.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// A chunk is compressed by something that is not known.
    #[error("compression {name:?} is not known")]
    UnknownCompression {
        /// The name that the chunk gives.
        name: String,
    },
    /// A chunk claims to be larger than is allowed.
    #[error("the chunk claims {claimed} bytes, {allowed} are allowed")]
    TooLarge {
        /// Bytes that it claims.
        claimed: u64,
        /// [`OpenOptions::chunk_bytes_max`](super::OpenOptions::chunk_bytes_max).
        allowed: usize,
    },
    /// The content of a chunk is not what was written.
    #[error("CRC is {got:08x}, the chunk says {want:08x}")]
    Crc {
        /// CRC of the content.
        got: u32,
        /// CRC that the chunk gives.
        want: u32,
    },
    /// A chunk cannot be decompressed.
    #[error("{codec} cannot be decompressed: {source}")]
    Decompress {
        /// Name of the compression.
        codec: &'static str,
        /// What is wrong.
        source: DecompressError,
    },
}
