//! CDR, the wire format of ROS 2 messages: XCDR version 1, little-endian written, both read.
//!
//! A message is a 4-byte header (`00 01 00 00` little-endian, `00 00 00 00` big-endian; the last two
//! bytes are options and ignored) and a body. Numbers are aligned to their size, counted from the byte
//! after the header. A string is its length including a closing NUL, the bytes, the NUL; a sequence its
//! length and its items; a fixed array its items only; a struct without fields one dummy byte.
//!
//! Nothing here allocates what a length field asks for: a sequence's length is first held against the
//! bytes that are left. Byte sequences and strings can be borrowed from the message.

use std::fmt;

/// Length of the encapsulation header.
pub const HEADER_LEN: usize = 4;
/// The header that is written: plain CDR, little-endian.
pub const HEADER_LE: [u8; HEADER_LEN] = [0, 1, 0, 0];
/// Bytes allowed after the last field (writers pad to 4 or 8).
pub const MAX_TRAILING: usize = 7;

/// Why bytes are not the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field:?} at byte {offset}: {kind}")]
pub struct CdrError {
    /// Path of the field, e.g. `header.frame_id`; empty for the message itself.
    pub field: String,
    /// Byte offset in the message, the header included.
    pub offset: usize,
    /// What is wrong.
    pub kind: CdrErrorKind,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CdrErrorKind {
    /// The message ends too early.
    #[error("needs {need} bytes, {left} are left")]
    Short {
        /// Bytes wanted.
        need: usize,
        /// Bytes there.
        left: usize,
    },
    /// A sequence claims more items than the rest of the message can hold.
    #[error("claims {count} items, the {left} bytes left hold fewer")]
    TooMany {
        /// Items claimed.
        count: usize,
        /// Bytes there.
        left: usize,
    },
    /// The header is not one of plain CDR.
    #[error("header {0:02x?} is not plain CDR (00 00 or 00 01)")]
    Header([u8; 2]),
    /// A string's last byte must be NUL.
    #[error("string does not end with NUL")]
    NoNul,
    /// Text is UTF-8.
    #[error("string is not UTF-8")]
    Utf8,
    /// A bool is 0 or 1.
    #[error("bool is {0}")]
    Bool(u8),
    /// The type ends before the message does: most likely another type.
    #[error("{0} bytes are left after the last field; the message is probably of another type")]
    Trailing(usize),
}

impl CdrError {
    /// The same error, seen from the struct that holds the field.
    #[must_use]
    pub fn within(mut self, parent: &str) -> Self {
        if self.field.is_empty() {
            parent.clone_into(&mut self.field);
        } else {
            let dot = if self.field.starts_with('[') { "" } else { "." };
            self.field = format!("{parent}{dot}{}", self.field);
        }
        self
    }
}

/// Reads the body of one message.
#[derive(Clone)]
pub struct CdrReader<'a> {
    body: &'a [u8],
    at: usize,
    big_endian: bool,
}

impl fmt::Debug for CdrReader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CdrReader({} of {} bytes)", self.at, self.body.len())
    }
}

macro_rules! read_number {
    ($($name:ident $ty:ty),*) => {$(
        #[doc = concat!("Reads one aligned `", stringify!($ty), "`.\n\n# Errors\n[`CdrErrorKind::Short`].")]
        #[inline]
        pub fn $name(&mut self) -> Result<$ty, CdrError> {
            const N: usize = size_of::<$ty>();
            let bytes: [u8; N] = self.take_aligned(N)?.try_into().expect("took that many bytes");
            Ok(if self.big_endian { <$ty>::from_be_bytes(bytes) } else { <$ty>::from_le_bytes(bytes) })
        }
    )*};
}

impl<'a> CdrReader<'a> {
    /// Opens a message; the header says the byte order.
    ///
    /// # Errors
    /// [`CdrErrorKind::Short`] or [`CdrErrorKind::Header`].
    pub fn new(message: &'a [u8]) -> Result<Self, CdrError> {
        let error = |kind| CdrError { field: String::new(), offset: 0, kind };
        let Some((header, body)) = message.split_first_chunk::<HEADER_LEN>() else {
            return Err(error(CdrErrorKind::Short { need: HEADER_LEN, left: message.len() }));
        };
        let big_endian = match header {
            [0, 0, ..] => true,
            [0, 1, ..] => false,
            [a, b, ..] => return Err(error(CdrErrorKind::Header([*a, *b]))),
        };
        Ok(Self { body, at: 0, big_endian })
    }

    fn error(&self, kind: CdrErrorKind) -> CdrError {
        CdrError { field: String::new(), offset: HEADER_LEN + self.at, kind }
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.body.len() - self.at
    }

    /// Skips padding up to a multiple of `align`.
    fn align(&mut self, align: usize) {
        self.at = self.at.next_multiple_of(align).min(self.body.len());
    }

    #[inline]
    fn take(&mut self, n: usize) -> Result<&'a [u8], CdrError> {
        match self.body.get(self.at..).and_then(|rest| rest.get(..n)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => Err(self.error(CdrErrorKind::Short { need: n, left: self.left() })),
        }
    }

    #[inline]
    fn take_aligned(&mut self, n: usize) -> Result<&'a [u8], CdrError> {
        self.align(n);
        self.take(n)
    }

    read_number!(u8 u8, i8 i8, u16 u16, i16 i16, u32 u32, i32 i32, u64 u64, i64 i64, f32 f32, f64 f64);

    /// Reads a bool.
    ///
    /// # Errors
    /// [`CdrErrorKind::Short`], [`CdrErrorKind::Bool`].
    pub fn bool(&mut self) -> Result<bool, CdrError> {
        let offset = self.at;
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            v => {
                self.at = offset;
                Err(self.error(CdrErrorKind::Bool(v)))
            }
        }
    }

    /// Reads a sequence's length and checks that so many items of at least `min_item_bytes` can follow.
    ///
    /// # Errors
    /// [`CdrErrorKind::Short`], [`CdrErrorKind::TooMany`].
    pub fn count(&mut self, min_item_bytes: usize) -> Result<usize, CdrError> {
        let count = self.u32()? as usize;
        if count.checked_mul(min_item_bytes.max(1)).is_none_or(|need| need > self.left()) {
            self.at -= 4;
            return Err(self.error(CdrErrorKind::TooMany { count, left: self.left() - 4 }));
        }
        Ok(count)
    }

    /// Borrows a sequence of bytes.
    ///
    /// # Errors
    /// [`CdrErrorKind::Short`], [`CdrErrorKind::TooMany`].
    pub fn bytes(&mut self) -> Result<&'a [u8], CdrError> {
        let n = self.count(1)?;
        self.take(n)
    }

    /// Borrows a string. A length of 0 (written by some for the empty string) is taken as empty.
    ///
    /// # Errors
    /// [`CdrErrorKind::Short`], [`CdrErrorKind::TooMany`], [`CdrErrorKind::NoNul`], [`CdrErrorKind::Utf8`].
    pub fn str(&mut self) -> Result<&'a str, CdrError> {
        let bytes = self.bytes()?;
        let Some((last, text)) = bytes.split_last() else {
            return Ok("");
        };
        if *last != 0 {
            self.at -= 1;
            return Err(self.error(CdrErrorKind::NoNul));
        }
        std::str::from_utf8(text).map_err(|_| {
            self.at -= bytes.len();
            self.error(CdrErrorKind::Utf8)
        })
    }

    /// Reads a value as the field `name`, which errors then carry.
    ///
    /// # Errors
    /// Whatever the type's reading gives.
    #[inline]
    pub fn field<T: CdrRead<'a>>(&mut self, name: &str) -> Result<T, CdrError> {
        T::read(self).map_err(|e| e.within(name))
    }

    /// Checks that nothing but padding is left.
    ///
    /// # Errors
    /// [`CdrErrorKind::Trailing`].
    pub fn finish(self) -> Result<(), CdrError> {
        match self.left() {
            0..=MAX_TRAILING => Ok(()),
            n => Err(self.error(CdrErrorKind::Trailing(n))),
        }
    }
}

/// Writes one message, little-endian.
#[derive(Debug, Clone)]
pub struct CdrWriter {
    out: Vec<u8>,
}

impl Default for CdrWriter {
    fn default() -> Self {
        Self::with_capacity(256)
    }
}

macro_rules! write_number {
    ($($name:ident $ty:ty),*) => {$(
        #[doc = concat!("Writes one aligned `", stringify!($ty), "`.")]
        #[inline]
        pub fn $name(&mut self, v: $ty) {
            self.align(size_of::<$ty>());
            self.out.extend_from_slice(&v.to_le_bytes());
        }
    )*};
}

impl CdrWriter {
    /// A writer whose header is written, with room for `body` more bytes.
    #[must_use]
    pub fn with_capacity(body: usize) -> Self {
        let mut out = Vec::with_capacity(HEADER_LEN + body);
        out.extend_from_slice(&HEADER_LE);
        Self { out }
    }

    /// As [`CdrWriter::with_capacity`], in a buffer used before.
    #[must_use]
    pub fn reuse(mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        buffer.extend_from_slice(&HEADER_LE);
        Self { out: buffer }
    }

    fn align(&mut self, align: usize) {
        let body = self.out.len() - HEADER_LEN;
        self.out.resize(HEADER_LEN + body.next_multiple_of(align), 0);
    }

    write_number!(u8 u8, i8 i8, u16 u16, i16 i16, u32 u32, i32 i32, u64 u64, i64 i64, f32 f32, f64 f64);

    /// Writes a sequence's length; more than a `u32` holds cannot be sent and is cut by the caller.
    pub fn count(&mut self, n: usize) {
        self.u32(u32::try_from(n).unwrap_or(u32::MAX));
    }

    /// Writes a sequence of bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.out.extend_from_slice(bytes);
    }

    /// Writes a string. An inner NUL would end it early for readers, so it is cut there.
    pub fn str(&mut self, text: &str) {
        let text = text.split('\0').next().unwrap_or("");
        self.count(text.len() + 1);
        self.out.extend_from_slice(text.as_bytes());
        self.out.push(0);
    }

    /// The message, header included.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// A value that can be read; `'a` is the life of the message, for borrowed ones.
pub trait CdrRead<'a>: Sized {
    /// Fewest bytes that a value takes, alignment not counted.
    const MIN_BYTES: usize;

    /// Reads one value.
    ///
    /// # Errors
    /// [`CdrError`] with the field's path and offset.
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError>;

    /// Reads `n` values; the number has been checked against the bytes left.
    ///
    /// # Errors
    /// As [`CdrRead::read`].
    fn read_many(r: &mut CdrReader<'a>, n: usize) -> Result<Vec<Self>, CdrError> {
        let mut out = Vec::with_capacity(n.min(4_096));
        for i in 0..n {
            out.push(Self::read(r).map_err(|e| e.within(&format!("[{i}]")))?);
        }
        Ok(out)
    }
}

/// A value that can be written.
pub trait CdrWrite {
    /// Writes one value.
    fn write(&self, w: &mut CdrWriter);

    /// Writes several values one after the other.
    fn write_many(items: &[Self], w: &mut CdrWriter)
    where
        Self: Sized,
    {
        for item in items {
            item.write(w);
        }
    }

    /// About how many bytes the value takes, to size the buffer once.
    fn size_hint(&self) -> usize {
        64
    }
}

macro_rules! numbers {
    ($($ty:ident),*) => {$(
        impl CdrRead<'_> for $ty {
            const MIN_BYTES: usize = size_of::<$ty>();
            #[inline]
            fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
                r.$ty()
            }
        }
        impl CdrWrite for $ty {
            #[inline]
            fn write(&self, w: &mut CdrWriter) {
                w.$ty(*self);
            }
            fn size_hint(&self) -> usize {
                size_of::<$ty>()
            }
        }
    )*};
}
numbers!(i8, u16, i16, u32, i32, u64, i64, f32, f64);

impl CdrRead<'_> for u8 {
    const MIN_BYTES: usize = 1;
    #[inline]
    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        r.u8()
    }
    fn read_many(r: &mut CdrReader<'_>, n: usize) -> Result<Vec<Self>, CdrError> {
        r.take(n).map(<[u8]>::to_vec)
    }
}

impl CdrWrite for u8 {
    #[inline]
    fn write(&self, w: &mut CdrWriter) {
        w.u8(*self);
    }
    fn write_many(items: &[Self], w: &mut CdrWriter) {
        w.out.extend_from_slice(items);
    }
    fn size_hint(&self) -> usize {
        1
    }
}

impl CdrRead<'_> for bool {
    const MIN_BYTES: usize = 1;
    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        r.bool()
    }
}

impl CdrWrite for bool {
    fn write(&self, w: &mut CdrWriter) {
        w.u8(u8::from(*self));
    }
    fn size_hint(&self) -> usize {
        1
    }
}

impl CdrRead<'_> for String {
    const MIN_BYTES: usize = 4;
    fn read(r: &mut CdrReader<'_>) -> Result<Self, CdrError> {
        r.str().map(str::to_owned)
    }
}

impl CdrWrite for String {
    fn write(&self, w: &mut CdrWriter) {
        w.str(self);
    }
    fn size_hint(&self) -> usize {
        self.len() + 8
    }
}

impl<'a> CdrRead<'a> for &'a str {
    const MIN_BYTES: usize = 4;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        r.str()
    }
}

impl CdrWrite for &str {
    fn write(&self, w: &mut CdrWriter) {
        w.str(self);
    }
    fn size_hint(&self) -> usize {
        self.len() + 8
    }
}

impl<'a> CdrRead<'a> for &'a [u8] {
    const MIN_BYTES: usize = 4;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        r.bytes()
    }
}

impl CdrWrite for &[u8] {
    fn write(&self, w: &mut CdrWriter) {
        w.bytes(self);
    }
    fn size_hint(&self) -> usize {
        self.len() + 8
    }
}

impl<'a, T: CdrRead<'a>> CdrRead<'a> for Vec<T> {
    const MIN_BYTES: usize = 4;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        let n = r.count(T::MIN_BYTES)?;
        T::read_many(r, n)
    }
}

impl<T: CdrWrite> CdrWrite for Vec<T> {
    fn write(&self, w: &mut CdrWriter) {
        w.count(self.len());
        T::write_many(self, w);
    }
    fn size_hint(&self) -> usize {
        8 + self.first().map_or(0, |first| self.len() * (first.size_hint() + 4))
    }
}

impl<'a, T: CdrRead<'a> + Copy + Default, const N: usize> CdrRead<'a> for [T; N] {
    const MIN_BYTES: usize = N * T::MIN_BYTES;
    fn read(r: &mut CdrReader<'a>) -> Result<Self, CdrError> {
        let mut out = [T::default(); N];
        for (i, slot) in out.iter_mut().enumerate() {
            *slot = T::read(r).map_err(|e| e.within(&format!("[{i}]")))?;
        }
        Ok(out)
    }
}

impl<T: CdrWrite, const N: usize> CdrWrite for [T; N] {
    fn write(&self, w: &mut CdrWriter) {
        T::write_many(self, w);
    }
    fn size_hint(&self) -> usize {
        self.first().map_or(0, |first| N * first.size_hint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T>(
        bytes: &[u8],
        f: impl FnOnce(&mut CdrReader<'_>) -> Result<T, CdrError>,
    ) -> Result<T, CdrError> {
        f(&mut CdrReader::new(bytes)?)
    }

    #[test]
    fn alignment_counts_from_the_body() {
        let mut w = CdrWriter::default();
        w.u8(1);
        w.f64(1.5);
        w.u16(7);
        w.u32(9);
        let bytes = w.finish();
        assert_eq!(
            bytes,
            [0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xf8, 0x3f, 7, 0, 0, 0, 9, 0, 0, 0]
        );
        let mut r = CdrReader::new(&bytes).unwrap();
        assert_eq!((r.u8(), r.f64(), r.u16(), r.u32()), (Ok(1), Ok(1.5), Ok(7), Ok(9)));
        assert_eq!(r.left(), 0);
    }

    #[test]
    fn big_endian_and_options() {
        let bytes = [0, 0, 9, 9, 0, 0, 0, 3, b'h', b'i', 0, 0, 0, 0, 0, 42];
        let mut r = CdrReader::new(&bytes).unwrap();
        assert_eq!(r.str().unwrap(), "hi");
        assert_eq!(r.u32().unwrap(), 42);
    }

    #[test]
    fn hostile() {
        let check = |body: &[u8], what: &str, got: Result<(), CdrError>| {
            let text = got.expect_err(what).to_string();
            assert!(text.contains(what), "{body:?}: {text}");
        };
        let msg = |body: &[u8]| [&HEADER_LE[..], body].concat();
        for n in 0..4 {
            assert!(matches!(
                CdrReader::new(&[0, 1, 0, 0][..n]).unwrap_err().kind,
                CdrErrorKind::Short { need: 4, .. }
            ));
        }
        assert_eq!(CdrReader::new(&[0, 2, 0, 0]).unwrap_err().kind, CdrErrorKind::Header([0, 2]));
        let body = [0xff, 0xff, 0xff, 0xff, 1, 2];
        check(&body, "claims 4294967295 items", read(&msg(&body), |r| r.field::<Vec<f64>>("d").map(drop)));
        check(&body, "claims 4294967295 items", read(&msg(&body), |r| r.field::<&[u8]>("data").map(drop)));
        check(&body, "claims 4294967295 items", read(&msg(&body), |r| r.field::<String>("s").map(drop)));
        let body = [2, 0, 0, 0, b'a', b'b'];
        check(&body, "NUL", read(&msg(&body), |r| r.str().map(drop)));
        let body = [2, 0, 0, 0, 0xff, 0];
        check(&body, "UTF-8", read(&msg(&body), |r| r.str().map(drop)));
        check(&[2], "bool is 2", read(&msg(&[2]), |r| r.bool().map(drop)));
        check(&[1, 2, 3], "needs 4 bytes, 3 are left", read(&msg(&[1, 2, 3]), |r| r.u32().map(drop)));
        // Alignment beyond the end.
        check(
            &[1, 2],
            "needs 8 bytes, 0 are left",
            read(&msg(&[1, 2]), |r| {
                r.u8()?;
                r.f64().map(drop)
            }),
        );
        check(&[0; 8], "8 bytes are left", CdrReader::new(&msg(&[0; 8])).unwrap().finish());
        assert!(CdrReader::new(&msg(&[0; 7])).unwrap().finish().is_ok());
        assert_eq!(read(&msg(&[0; 4]), |r| r.str().map(str::to_owned)).unwrap(), "");
    }

    #[test]
    fn errors_name_the_path_and_the_offset() {
        let mut w = CdrWriter::default();
        w.count(2);
        w.str("ok");
        w.u32(3);
        let e = read(&w.finish(), |r| r.field::<Vec<String>>("names")).unwrap_err();
        assert_eq!(
            e.to_string(),
            "field \"names[1]\" at byte 16: claims 3 items, the 0 bytes left hold fewer"
        );
    }

    #[test]
    fn inner_nul_is_cut() {
        let mut w = CdrWriter::default();
        w.str("a\0b");
        assert_eq!(read(&w.finish(), |r| r.str().map(str::to_owned)).unwrap(), "a");
    }
}
