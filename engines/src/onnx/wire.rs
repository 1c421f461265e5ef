//! The protobuf wire format, as far as ONNX needs it.
//!
//! Reading never trusts a length: every access is checked against the message that holds it, and errors say at
//! which byte of the file and in which field they arose.

use super::OnnxError;

/// A field's value as it lies on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 5.
    Fixed32(u32),
    /// Wire type 1.
    Fixed64(u64),
    /// Wire type 2: a range of the whole buffer.
    Bytes(usize, usize),
}

/// Walks over one message inside a larger buffer.
pub(super) struct Reader<'a> {
    buffer: &'a [u8],
    position: usize,
    end: usize,
    message: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `buffer[start..end]` as a `message`.
    pub(super) fn new(buffer: &'a [u8], start: usize, end: usize, message: &'static str) -> Self {
        debug_assert!(start <= end && end <= buffer.len());
        Self { buffer, position: start, end, message }
    }

    /// An error at the current position.
    pub(super) fn error(&self, field: u32, what: impl Into<String>) -> OnnxError {
        OnnxError::Wire { offset: self.position as u64, message: self.message, field, what: what.into() }
    }

    fn varint(&mut self, field: u32) -> Result<u64, OnnxError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            if self.position >= self.end {
                return Err(self.error(field, "the message ends inside a number"));
            }
            let byte = self.buffer[self.position];
            self.position += 1;
            if shift == 63 && byte > 1 {
                return Err(self.error(field, "a number has more than 64 bits"));
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.error(field, "a number has more than 10 bytes"))
    }

    fn take(&mut self, field: u32, length: u64) -> Result<(usize, usize), OnnxError> {
        let left = (self.end - self.position) as u64;
        if length > left {
            return Err(self.error(field, format!("needs {length} bytes, only {left} are left")));
        }
        let start = self.position;
        self.position += length as usize;
        Ok((start, self.position))
    }

    /// The next field, or `None` at the end of the message.
    pub(super) fn next(&mut self) -> Result<Option<(u32, Value)>, OnnxError> {
        if self.position == self.end {
            return Ok(None);
        }
        let key = self.varint(0)?;
        let field = u32::try_from(key >> 3).map_err(|_| self.error(0, "field number too large"))?;
        if field == 0 {
            return Err(self.error(0, "field number 0"));
        }
        let value = match key & 7 {
            0 => Value::Varint(self.varint(field)?),
            1 => {
                let (start, end) = self.take(field, 8)?;
                Value::Fixed64(u64::from_le_bytes(
                    self.buffer[start..end].try_into().expect("eight bytes were taken"),
                ))
            }
            2 => {
                let length = self.varint(field)?;
                let (start, end) = self.take(field, length)?;
                Value::Bytes(start, end)
            }
            5 => {
                let (start, end) = self.take(field, 4)?;
                Value::Fixed32(u32::from_le_bytes(
                    self.buffer[start..end].try_into().expect("four bytes were taken"),
                ))
            }
            other => return Err(self.error(field, format!("wire type {other} is not used by ONNX"))),
        };
        Ok(Some((field, value)))
    }

    /// The value as a signed integer.
    pub(super) fn int(&self, field: u32, value: Value) -> Result<i64, OnnxError> {
        match value {
            Value::Varint(v) => Ok(v as i64),
            _ => Err(self.error(field, "an integer is expected")),
        }
    }

    /// The value as an `f32`.
    pub(super) fn float(&self, field: u32, value: Value) -> Result<f32, OnnxError> {
        match value {
            Value::Fixed32(v) => Ok(f32::from_bits(v)),
            _ => Err(self.error(field, "a 32-bit float is expected")),
        }
    }

    /// The value as a range of the buffer.
    pub(super) fn range(&self, field: u32, value: Value) -> Result<(usize, usize), OnnxError> {
        match value {
            Value::Bytes(start, end) => Ok((start, end)),
            _ => Err(self.error(field, "bytes are expected")),
        }
    }

    /// The value as bytes.
    pub(super) fn bytes(&self, field: u32, value: Value) -> Result<&'a [u8], OnnxError> {
        let (start, end) = self.range(field, value)?;
        Ok(&self.buffer[start..end])
    }

    /// The value as text.
    pub(super) fn text(&self, field: u32, value: Value) -> Result<String, OnnxError> {
        let bytes = self.bytes(field, value)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error(field, "text is not UTF-8")),
        }
    }

    /// The value as a nested message.
    pub(super) fn message(
        &self,
        field: u32,
        value: Value,
        message: &'static str,
    ) -> Result<Reader<'a>, OnnxError> {
        let (start, end) = self.range(field, value)?;
        Ok(Reader::new(self.buffer, start, end, message))
    }

    /// Appends a repeated integer, packed or not; at most `limit` values in all.
    pub(super) fn ints(
        &self,
        field: u32,
        value: Value,
        limit: usize,
        out: &mut Vec<i64>,
    ) -> Result<(), OnnxError> {
        match value {
            Value::Varint(v) => {
                if out.len() >= limit {
                    return Err(self.error(field, format!("more than {limit} numbers")));
                }
                out.push(v as i64);
            }
            Value::Bytes(start, end) => {
                let mut inner = Reader::new(self.buffer, start, end, self.message);
                while inner.position < inner.end {
                    if out.len() >= limit {
                        return Err(inner.error(field, format!("more than {limit} numbers")));
                    }
                    out.push(inner.varint(field)? as i64);
                }
            }
            _ => return Err(self.error(field, "integers are expected")),
        }
        Ok(())
    }

    /// Appends a repeated fixed-width number of `width` (4 or 8) bytes to `out` as little-endian bytes; at most
    /// `limit` bytes in all.
    pub(super) fn fixed(
        &self,
        field: u32,
        value: Value,
        width: usize,
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), OnnxError> {
        match value {
            Value::Fixed32(v) if width == 4 => out.extend_from_slice(&v.to_le_bytes()),
            Value::Fixed64(v) if width == 8 => out.extend_from_slice(&v.to_le_bytes()),
            Value::Bytes(start, end) if (end - start) % width == 0 => {
                out.extend_from_slice(&self.buffer[start..end]);
            }
            _ => return Err(self.error(field, format!("{width}-byte numbers are expected"))),
        }
        if out.len() > limit {
            return Err(self.error(field, format!("more than {limit} bytes of numbers")));
        }
        Ok(())
    }
}

/// Appends protobuf fields to a byte vector.
#[derive(Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push((value as u8 & 0x7f) | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn key(&mut self, field: u32, wire: u64) {
        self.varint((u64::from(field) << 3) | wire);
    }

    pub(super) fn int(&mut self, field: u32, value: i64) {
        self.key(field, 0);
        self.varint(value as u64);
    }

    pub(super) fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Key and length of a field whose `length` bytes follow.
    pub(super) fn prefix(&mut self, field: u32, length: u64) {
        self.key(field, 2);
        self.varint(length);
    }

    pub(super) fn data(&mut self, field: u32, value: &[u8]) {
        self.prefix(field, value.len() as u64);
        self.bytes.extend_from_slice(value);
    }

    /// Text; nothing is written for an empty one.
    pub(super) fn text(&mut self, field: u32, value: &str) {
        if !value.is_empty() {
            self.data(field, value.as_bytes());
        }
    }

    pub(super) fn message(&mut self, field: u32, build: impl FnOnce(&mut Writer)) {
        let mut inner = Writer::default();
        build(&mut inner);
        self.data(field, &inner.bytes);
    }
}
