//! LZ4 frames straight from one buffer into another. The `lz4` crate's reader goes by way of 32 KiB pieces, which costs a
//! copy of what goes in and of what comes out.

use lz4_sys::{
    LZ4F_VERSION, LZ4F_createDecompressionContext, LZ4F_decompress, LZ4F_freeDecompressionContext,
    LZ4F_getErrorName, LZ4F_isError, LZ4F_resetDecompressionContext, LZ4FDecompressOptions,
    LZ4FDecompressionContext,
};
use std::cell::RefCell;
use std::ffi::CStr;

/// A decompression context; kept by the thread that uses it.
struct Context(LZ4FDecompressionContext);

impl Context {
    fn new() -> Option<Self> {
        let mut raw = LZ4FDecompressionContext(std::ptr::null_mut());
        // SAFETY: the context is written before the call returns, or an error code comes back.
        let code = unsafe { LZ4F_createDecompressionContext(&mut raw, LZ4F_VERSION) };
        (!failed(code) && !raw.0.is_null()).then_some(Self(raw))
    }

    fn reset(&mut self) {
        // SAFETY: the context was made by LZ4F_createDecompressionContext and is freed on drop only.
        unsafe { LZ4F_resetDecompressionContext(self.0) }
    }

    /// One call: bytes taken, bytes given, and what liblz4 wants to see next (0 at the end of a frame).
    fn step(
        &mut self,
        from: &[u8],
        to: &mut [u8],
        options: &LZ4FDecompressOptions,
    ) -> Result<(usize, usize, usize), Lz4Failure> {
        let (mut taken, mut given) = (from.len(), to.len());
        // SAFETY: both lengths are those of the slices, which live through the call and do not overlap; liblz4
        // writes `given` bytes at most. With `stable_dst` the caller keeps its buffer in place, see `decompress`.
        let code = unsafe {
            LZ4F_decompress(self.0, to.as_mut_ptr(), &mut given, from.as_ptr(), &mut taken, options)
        };
        if failed(code) { Err(Lz4Failure(name(code))) } else { Ok((taken, given, code)) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by LZ4F_createDecompressionContext, freed once.
        unsafe { LZ4F_freeDecompressionContext(self.0) };
    }
}

/// What liblz4 says of an error.
#[derive(Debug)]
struct Lz4Failure(String);

fn failed(code: usize) -> bool {
    // SAFETY: looks at the number only.
    unsafe { LZ4F_isError(code) != 0 }
}

fn name(code: usize) -> String {
    // SAFETY: gives a string constant of the library for every code.
    let text = unsafe { CStr::from_ptr(LZ4F_getErrorName(code)) };
    text.to_string_lossy().into_owned()
}

/// Decompresses into the whole of `to`; gives the number of bytes and what went wrong. Without `checked` the checksums
/// of the frames are not looked at: for content that has a better one of its own.
pub(in crate::bag) fn decompress(from: &[u8], to: &mut [u8], checked: bool) -> (usize, Option<String>) {
    // `to` is never moved while a frame is being read, so what liblz4 wrote stays where it looks for it.
    let options = LZ4FDecompressOptions { stable_dst: 1, reserved: [u32::from(!checked), 0, 0] };
    with_context(|context| {
        let (mut read, mut written) = (0, 0);
        while read < from.len() && written < to.len() {
            match context.step(&from[read..], &mut to[written..], &options) {
                Ok((0, 0, _)) => break,
                Ok((taken, given, _)) => {
                    read += taken;
                    written += given;
                }
                Err(error) => return (written, Some(error.0)),
            }
        }
        (written, None)
    })
    .unwrap_or_else(|| (0, Some("liblz4 gives no context".to_owned())))
}

/// Appends what can be had to `out`, up to `size` bytes in all, in small pieces: for damaged frames, of which
/// [`decompress`] gives nothing, and for sizes that are not believed.
pub(in crate::bag) fn salvage(from: &[u8], size: usize, out: &mut Vec<u8>) -> Option<String> {
    const PIECE: usize = 4 << 10;
    let options = LZ4FDecompressOptions { stable_dst: 0, reserved: [0; 3] };
    let mut piece = vec![0; 64 << 10];
    with_context(|context| {
        let mut read = 0;
        while read < from.len() && out.len() < size {
            let room = piece.len().min(size - out.len());
            let end = from.len().min(read + PIECE);
            match context.step(&from[read..end], &mut piece[..room], &options) {
                Ok((0, 0, _)) => break,
                Ok((taken, given, _)) => {
                    out.extend_from_slice(&piece[..given]);
                    read += taken;
                }
                Err(error) => return Some(error.0),
            }
        }
        None
    })
    .unwrap_or_else(|| Some("liblz4 gives no context".to_owned()))
}

fn with_context<T>(work: impl FnOnce(&mut Context) -> T) -> Option<T> {
    thread_local! {
        static CONTEXT: RefCell<Option<Context>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|slot| {
        let context = match slot {
            Some(context) => context,
            None => slot.insert(Context::new()?),
        };
        context.reset();
        Some(work(context))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn packed(content: &[u8], linked: bool) -> Vec<u8> {
        let mode = if linked { lz4::BlockMode::Linked } else { lz4::BlockMode::Independent };
        let mut encoder = lz4::EncoderBuilder::new().block_mode(mode).build(Vec::new()).expect("memory");
        encoder.write_all(content).expect("memory");
        let (bytes, result) = encoder.finish();
        result.expect("memory");
        bytes
    }

    #[test]
    fn frames_come_back_and_damage_keeps_what_came_before() {
        let content: Vec<u8> = (0..700_000u32).map(|i| (i.wrapping_mul(i / 640) >> 9) as u8 & 0x3f).collect();
        for linked in [false, true] {
            let bytes = packed(&content, linked);
            let mut out = vec![1; content.len()];
            assert_eq!(decompress(&bytes, &mut out, true), (content.len(), None));
            assert!(out == content, "linked {linked}");
            let twice = [&bytes[..], &bytes[..]].concat();
            let mut both = vec![0; 2 * content.len()];
            assert_eq!(decompress(&twice, &mut both, false), (2 * content.len(), None));
            assert!(both[content.len()..] == content);
            // A smaller buffer is filled.
            assert_eq!(decompress(&bytes, &mut out[..70_000], true), (70_000, None));
            let mut saved = Vec::new();
            assert_eq!(salvage(&bytes, usize::MAX, &mut saved), None);
            assert!(saved == content);
            saved.clear();
            assert_eq!(salvage(&bytes[..bytes.len() / 2], usize::MAX, &mut saved), None);
            assert!(saved.len() > 100_000 && content.starts_with(&saved), "{}", saved.len());
            // The checksum at the end: seen, or not looked at.
            let mut changed = bytes.clone();
            let last = changed.len() - 1;
            changed[last] ^= 1;
            assert!(decompress(&changed, &mut out, true).1.expect("seen").contains("hecksum"));
            assert_eq!(decompress(&changed, &mut out, false), (content.len(), None));
        }
        assert!(decompress(b"not a frame at all", &mut [0; 9], true).1.is_some());
        assert_eq!(decompress(&[], &mut [0; 9], true), (0, None));
    }
}
