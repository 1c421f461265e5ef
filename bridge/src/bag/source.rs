//! Bytes that can be read at any place, and the buffers they are read into.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// A file, or the bytes of one.
pub(crate) enum Source {
    File { file: File, len: u64 },
    Memory(Arc<[u8]>),
}

impl Source {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok(Self::File { file, len })
    }

    pub fn len(&self) -> u64 {
        match self {
            Self::File { len, .. } => *len,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Fills as much of `buffer` as there is; gives the number of bytes.
    pub fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File { file, .. } => {
                let mut done = 0;
                while done < buffer.len() {
                    match file.read_at(&mut buffer[done..], at + done as u64) {
                        Ok(0) => break,
                        Ok(n) => done += n,
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(e),
                    }
                }
                Ok(done)
            }
            Self::Memory(bytes) => {
                let start = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
                let n = buffer.len().min(bytes.len() - start);
                buffer[..n].copy_from_slice(&bytes[start..start + n]);
                Ok(n)
            }
        }
    }

    /// Makes `buffer` hold the bytes of `range`, or fewer at the end of the file.
    pub fn read_into(&self, range: Range<u64>, buffer: &mut Vec<u8>) -> io::Result<()> {
        let end = range.end.min(self.len());
        let n = usize::try_from(end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        buffer.resize(n, 0);
        let got = self.read_at(range.start, buffer)?;
        buffer.truncate(got);
        Ok(())
    }

    pub fn read_vec(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut buffer = Vec::new();
        self.read_into(range, &mut buffer)?;
        Ok(buffer)
    }
}

/// Gives `work` a buffer of this thread that keeps its memory: compressed chunks are read into it.
pub(crate) fn with_scratch<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    thread_local! {
        static SCRATCH: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let result = work(scratch);
        if scratch.capacity() > POOLED_BYTES {
            *scratch = Vec::new();
        }
        result
    })
}

/// Reads small records one after the other without a system call for each.
pub(crate) struct Window<'a> {
    source: &'a Source,
    start: u64,
    bytes: Vec<u8>,
    /// Bytes that one system call reads, at least.
    ahead: u64,
}

const WINDOW_BYTES: u64 = 128 << 10;
/// For records that are few and far apart.
const SMALL_WINDOW_BYTES: u64 = 4 << 10;

impl<'a> Window<'a> {
    pub fn new(source: &'a Source) -> Self {
        Self { source, start: 0, bytes: Vec::new(), ahead: WINDOW_BYTES }
    }

    /// A window that reads little ahead.
    pub fn small(source: &'a Source) -> Self {
        Self { ahead: SMALL_WINDOW_BYTES, ..Self::new(source) }
    }

    /// The bytes from `at` on, at most `len`; fewer at the end of the file or when it cannot be read.
    pub fn get(&mut self, at: u64, len: usize) -> &[u8] {
        let end = at.saturating_add(len as u64);
        if at < self.start || end > self.start + self.bytes.len() as u64 {
            let ahead = self.ahead.max(len as u64);
            let mut bytes = std::mem::take(&mut self.bytes);
            if self.source.read_into(at..at.saturating_add(ahead), &mut bytes).is_err() {
                bytes.clear();
            }
            self.start = at;
            self.bytes = bytes;
        }
        let from = (at - self.start) as usize;
        let from = from.min(self.bytes.len());
        &self.bytes[from..(from + len).min(self.bytes.len())]
    }
}

/// The bytes of one message; shares the chunk that it was read with.
#[derive(Clone)]
pub struct Payload {
    chunk: Arc<Vec<u8>>,
    start: usize,
    len: usize,
}

impl Payload {
    pub(crate) fn new(chunk: Arc<Vec<u8>>, start: usize, len: usize) -> Self {
        Self { chunk, start, len }
    }
}

impl Deref for Payload {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.chunk[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Payload({} bytes)", self.len)
    }
}

/// Buffers that go round between the loading threads and the consumer.
#[derive(Clone, Default)]
pub(crate) struct Pool(Arc<Mutex<Vec<Vec<u8>>>>);

const POOLED_BUFFERS: usize = 8;
/// Larger buffers are given back to the system.
const POOLED_BYTES: usize = 32 << 20;

impl Pool {
    pub fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub fn give(&self, buffer: Vec<u8>) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < POOLED_BUFFERS && buffer.capacity() <= POOLED_BYTES {
            free.push(buffer);
        }
    }
}
