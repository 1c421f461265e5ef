//! The protobuf wire format (protobuf.dev, "Encoding"), as far as ONNX and SentencePiece files need it.
//!
//! Reading never trusts a length: every access is checked against the message that holds it, and errors say at
//! which byte of the file and in which field they arose.

/// Bytes that are not the protobuf message that they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}, {message} field {field}: {what}")]
pub struct WireError {
    /// Where in the file.
    pub offset: u64,
    /// Which message.
    pub message: &'static str,
    /// Which field number; 0 where it is not known yet.
    pub field: u32,
    /// What is wrong.
    pub what: String,
}

/// A field's value as it lies on the wire.
#[derive(Clone, Copy, Debug)]
pub enum Value {
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
#[derive(Debug)]
pub struct Reader<'a> {
    buffer: &'a [u8],
    position: usize,
    end: usize,
    message: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads all of `buffer` as a `message`.
    #[must_use]
    pub fn new(buffer: &'a [u8], message: &'static str) -> Self {
        Self { buffer, position: 0, end: buffer.len(), message }
    }

    /// An error at the current position.
    #[must_use]
    pub fn error(&self, field: u32, what: impl Into<String>) -> WireError {
        WireError { offset: self.position as u64, message: self.message, field, what: what.into() }
    }

    fn varint(&mut self, field: u32) -> Result<u64, WireError> {
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

    fn take(&mut self, field: u32, length: u64) -> Result<(usize, usize), WireError> {
        let left = (self.end - self.position) as u64;
        if length > left {
            return Err(self.error(field, format!("needs {length} bytes, only {left} are left")));
        }
        let start = self.position;
        self.position += length as usize;
        Ok((start, self.position))
    }

    /// The next field, or `None` at the end of the message.
    ///
    /// # Errors
    /// [`WireError`] where the bytes are not a field.
    #[allow(clippy::should_implement_trait)] // an iterator would hide the message that `message` and `ints` need
    pub fn next(&mut self) -> Result<Option<(u32, Value)>, WireError> {
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
            other => return Err(self.error(field, format!("wire type {other} is not read"))),
        };
        Ok(Some((field, value)))
    }

    /// The value as a signed integer.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind.
    pub fn int(&self, field: u32, value: Value) -> Result<i64, WireError> {
        match value {
            Value::Varint(v) => Ok(v as i64),
            _ => Err(self.error(field, "an integer is expected")),
        }
    }

    /// The value as an `f32`.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind.
    pub fn float(&self, field: u32, value: Value) -> Result<f32, WireError> {
        match value {
            Value::Fixed32(v) => Ok(f32::from_bits(v)),
            _ => Err(self.error(field, "a 32-bit float is expected")),
        }
    }

    /// The value as a range of the buffer.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind.
    pub fn range(&self, field: u32, value: Value) -> Result<(usize, usize), WireError> {
        match value {
            Value::Bytes(start, end) => Ok((start, end)),
            _ => Err(self.error(field, "bytes are expected")),
        }
    }

    /// The value as bytes.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind.
    pub fn bytes(&self, field: u32, value: Value) -> Result<&'a [u8], WireError> {
        let (start, end) = self.range(field, value)?;
        Ok(&self.buffer[start..end])
    }

    /// The value as text.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind.
    pub fn text(&self, field: u32, value: Value) -> Result<String, WireError> {
        let bytes = self.bytes(field, value)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error(field, "text is not UTF-8")),
        }
    }

    /// The value as a nested message.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind.
    pub fn message(&self, field: u32, value: Value, message: &'static str) -> Result<Reader<'a>, WireError> {
        let (start, end) = self.range(field, value)?;
        Ok(Reader { buffer: self.buffer, position: start, end, message })
    }

    /// Appends a repeated integer, packed or not; at most `limit` values in all.
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind, and past the limit.
    pub fn ints(&self, field: u32, value: Value, limit: usize, out: &mut Vec<i64>) -> Result<(), WireError> {
        match value {
            Value::Varint(v) => {
                if out.len() >= limit {
                    return Err(self.error(field, format!("more than {limit} numbers")));
                }
                out.push(v as i64);
            }
            Value::Bytes(start, end) => {
                let mut inner = Reader { buffer: self.buffer, position: start, end, message: self.message };
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
    ///
    /// # Errors
    /// [`WireError`] for a value of another kind, and past the limit.
    pub fn fixed(
        &self,
        field: u32,
        value: Value,
        width: usize,
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), WireError> {
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
#[derive(Clone, Debug, Default)]
pub struct Writer {
    /// What was written so far.
    pub bytes: Vec<u8>,
}

impl Writer {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push((value as u8 & 0x7f) | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn key(&mut self, field: u32, wire: u64) {
        self.varint((u64::from(field) << 3) | wire);
    }

    /// An integer (`int32`, `int64`, `uint32`, `uint64`, `bool` or an enumeration).
    pub fn int(&mut self, field: u32, value: i64) {
        self.key(field, 0);
        self.varint(value as u64);
    }

    /// A `float`.
    pub fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A `double`.
    pub fn double(&mut self, field: u32, value: f64) {
        self.key(field, 1);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Key and length of a field whose `length` bytes follow.
    pub fn prefix(&mut self, field: u32, length: u64) {
        self.key(field, 2);
        self.varint(length);
    }

    /// Bytes.
    pub fn data(&mut self, field: u32, value: &[u8]) {
        self.prefix(field, value.len() as u64);
        self.bytes.extend_from_slice(value);
    }

    /// Text; nothing is written for an empty one.
    pub fn text(&mut self, field: u32, value: &str) {
        if !value.is_empty() {
            self.data(field, value.as_bytes());
        }
    }

    /// A message that `build` writes.
    pub fn message(&mut self, field: u32, build: impl FnOnce(&mut Writer)) {
        let mut inner = Writer::default();
        build(&mut inner);
        self.data(field, &inner.bytes);
    }
}
