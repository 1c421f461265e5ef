//! Messages as CDR: XCDR1, little-endian, with the 4-byte header, whatever they were recorded as.
//!
//! ROS 1 serialisation is CDR without alignment, without the NUL of strings and with `seq` in headers
//! (<http://wiki.ros.org/msg>); big-endian CDR differs in the order of bytes. Both are transcoded by the
//! definition of the type, so no type needs to be known beforehand.

use super::schema::{Count, Field, FillIn, Item, Schema, SchemaError};
use super::{BagInfo, Encoding, RawMessage, TopicInfo};

/// Header of little-endian XCDR1.
const LITTLE_ENDIAN: [u8; 4] = [0, 1, 0, 0];

/// Why a message has no CDR.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The topic is neither ROS 1 nor ROS 2.
    #[error("topic {topic}: messages are {encoding}, not ROS")]
    Foreign {
        /// Topic name.
        topic: String,
        /// Encoding of the messages.
        encoding: String,
    },
    /// The definition is missing or cannot be used.
    #[error("topic {topic}: {source}")]
    Schema {
        /// Topic name.
        topic: String,
        /// What is wrong with the definition.
        source: SchemaError,
    },
    /// The bytes do not fit the type.
    #[error("topic {topic}, stamp {log_time_ns} ns: {source}")]
    Message {
        /// Topic name.
        topic: String,
        /// Log time of the message.
        log_time_ns: i64,
        /// Field and reason.
        source: TranscodeError,
    },
}

/// Where and why bytes do not fit a type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TranscodeError {
    /// A field does not fit.
    #[error("field {field} of {type_name}: {problem}")]
    Field {
        /// Path of the field, parts joined by dots.
        field: String,
        /// `pkg/msg/Name`.
        type_name: String,
        /// What is wrong.
        problem: FieldProblem,
    },
    /// Bytes are left over after the last field.
    #[error("{bytes} bytes are left over after {type_name}: the type is wrong")]
    LeftOver {
        /// How many.
        bytes: usize,
        /// `pkg/msg/Name`.
        type_name: String,
    },
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldProblem {
    /// The message ends too early.
    #[error("{needed} bytes are needed, {left} are left")]
    Short {
        /// Bytes that the field needs.
        needed: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// A count of items that the bytes cannot hold.
    #[error("{claimed} items are claimed, {left} bytes are left")]
    Count {
        /// Number of items.
        claimed: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// A string that is longer than the message.
    #[error("a string of {needed} bytes, {left} are left")]
    ShortText {
        /// Bytes of the string.
        needed: usize,
        /// Bytes that there are.
        left: usize,
    },
    /// A string without its end mark.
    #[error("a string does not end with NUL")]
    NoNul,
    /// A string of 4 GiB or more.
    #[error("a string is too long")]
    LongText,
}

/// How the messages of one topic become CDR.
enum Plan {
    /// They are CDR; the definition serves for big-endian ones only.
    Cdr(Result<Schema, SchemaError>),
    Ros1(Result<Schema, SchemaError>),
    Foreign,
}

/// Turns the messages of a bag into CDR; keeps its buffer.
pub struct CdrConverter {
    plans: Vec<(Plan, String, String)>,
    buffer: Vec<u8>,
}

impl CdrConverter {
    /// Prepares the topics of a bag.
    #[must_use]
    pub fn new(info: &BagInfo) -> Self {
        let plans = info
            .topics
            .iter()
            .map(|topic| {
                let plan = match topic.encoding {
                    Encoding::Cdr => Plan::Cdr(schema_of(topic)),
                    Encoding::Ros1 => Plan::Ros1(schema_of(topic)),
                    _ => Plan::Foreign,
                };
                (plan, topic.name.clone(), topic.encoding.name().to_owned())
            })
            .collect();
        Self { plans, buffer: Vec::new() }
    }

    /// The message as little-endian CDR with its 4-byte header: the bytes of the bag where they are that
    /// already, a transcoded copy otherwise.
    ///
    /// # Errors
    /// The topic is not ROS, its definition is missing, or the bytes do not fit it.
    pub fn convert<'a>(&'a mut self, message: &'a RawMessage) -> Result<&'a [u8], ConvertError> {
        let (plan, topic, encoding) = &self.plans[message.topic.0 as usize];
        let (schema, dialect, bytes) = match plan {
            Plan::Cdr(schema) => match message.data.get(..2) {
                // Plain CDR, big-endian.
                Some([0, 0]) => (schema, Dialect::BigEndian, message.data.get(4..).unwrap_or(&[])),
                _ => return Ok(&message.data),
            },
            Plan::Ros1(schema) => (schema, Dialect::Ros1, &message.data[..]),
            Plan::Foreign => {
                return Err(ConvertError::Foreign { topic: topic.clone(), encoding: encoding.clone() });
            }
        };
        let schema = schema
            .as_ref()
            .map_err(|source| ConvertError::Schema { topic: topic.clone(), source: source.clone() })?;
        transcode(schema, dialect, bytes, &mut self.buffer).map_err(|source| ConvertError::Message {
            topic: topic.clone(),
            log_time_ns: message.log_time_ns,
            source,
        })?;
        Ok(&self.buffer)
    }
}

fn schema_of(topic: &TopicInfo) -> Result<Schema, SchemaError> {
    let missing =
        || SchemaError::Missing { type_name: topic.type_name.clone(), missing: topic.type_name.clone() };
    let text = topic.schema.as_ref().filter(|s| matches!(s.encoding.as_str(), "ros1msg" | "ros2msg"));
    match text.map(|s| (s.encoding.as_str(), String::from_utf8_lossy(&s.data))) {
        // Also an empty definition is one: std_msgs/Empty.
        Some(("ros1msg", text)) => Schema::parse(&topic.type_name, &text, FillIn::Ros1),
        Some((_, text)) if !text.trim().is_empty() => Schema::parse(&topic.type_name, &text, FillIn::Ros2),
        // The table of common types describes ROS 2; ROS 1 differs in places.
        _ if topic.encoding == Encoding::Cdr => Schema::current(&topic.type_name).ok_or_else(missing),
        _ => Err(missing()),
    }
}

/// How the input is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dialect {
    /// Packed, little-endian.
    Ros1,
    /// CDR with the high byte first; offsets count after the 4-byte header.
    BigEndian,
    /// CDR with the low byte first, read to see whether it fits the type.
    LittleEndian,
}

impl Dialect {
    fn is_cdr(self) -> bool {
        self != Self::Ros1
    }
}

struct Transcoder<'a> {
    schema: &'a Schema,
    dialect: Dialect,
    input: &'a [u8],
    at: usize,
    out: &'a mut Vec<u8>,
    /// Items that may still be handled: sequences of items without bytes must end.
    budget: usize,
}

/// Says whether a message (CDR with header) is one of the type that `schema` describes. Bytes of other kinds of CDR than
/// the plain ones are believed.
pub(super) fn check_cdr(schema: &Schema, cdr: &[u8]) -> Result<(), TranscodeError> {
    let dialect = match cdr.get(..2) {
        Some([0, 1]) => Dialect::LittleEndian,
        Some([0, 0]) => Dialect::BigEndian,
        _ => return Ok(()),
    };
    // Writers give an empty message one octet or none.
    if schema.types.first().is_none_or(|root| root.fields.is_empty()) {
        return Ok(());
    }
    transcode(schema, dialect, cdr.get(4..).unwrap_or(&[]), &mut Vec::new())
}

/// Writes `input` as little-endian CDR with header to `out`.
fn transcode(
    schema: &Schema,
    dialect: Dialect,
    input: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), TranscodeError> {
    out.clear();
    out.extend_from_slice(&LITTLE_ENDIAN);
    let budget = input.len() * 2 + (1 << 16);
    let mut t = Transcoder { schema, dialect, input, at: 0, out, budget };
    t.message(0).map_err(|e| e.describe(schema))?;
    // CDR may be padded to a multiple of 4 at the end; ROS 1 may not.
    let rest = input.len() - t.at;
    if rest > 3 || (rest > 0 && dialect == Dialect::Ros1) {
        return Err(TranscodeError::LeftOver { bytes: rest, type_name: schema.types[0].name.clone() });
    }
    Ok(())
}

/// Where and why; the path is put together on the way out.
struct Failure {
    path: Vec<String>,
    problem: FieldProblem,
}

impl Failure {
    fn describe(&self, schema: &Schema) -> TranscodeError {
        let mut path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        path.reverse();
        let type_name = schema.types.first().map_or_else(String::new, |t| t.name.clone());
        TranscodeError::Field { field: path.join("."), type_name, problem: self.problem }
    }
}

fn fail<T>(problem: FieldProblem) -> Result<T, Failure> {
    Err(Failure { path: Vec::new(), problem })
}

impl Transcoder<'_> {
    fn message(&mut self, index: usize) -> Result<(), Failure> {
        let schema = self.schema;
        let message = &schema.types[index];
        if message.fields.is_empty() {
            // CDR gives an empty struct one octet.
            if self.dialect.is_cdr() {
                self.bytes(1)?;
            }
            self.out.push(0);
            return Ok(());
        }
        let skip_seq = self.dialect == Dialect::Ros1 && message.name == "std_msgs/msg/Header";
        for field in &message.fields {
            if skip_seq && field.name == "seq" {
                self.bytes(4)?;
                continue;
            }
            self.field(field).map_err(|mut e| {
                e.path.push(field.name.clone());
                e
            })?;
        }
        Ok(())
    }

    fn field(&mut self, field: &Field) -> Result<(), Failure> {
        let count = match field.count {
            Count::One => 1,
            Count::Fixed(n) => n as usize,
            Count::Sequence | Count::Bounded(_) => {
                let n = self.read_u32()?;
                self.write_u32(n);
                n as usize
            }
        };
        match field.item {
            Item::Number(size) => self.numbers(count, usize::from(size)),
            Item::Stamp => self.numbers(count.saturating_mul(2), 4),
            Item::Text => self.each(count, Self::text),
            Item::WideText => self.each(count, |t| {
                let n = t.read_u32()?;
                t.write_u32(n);
                t.numbers(n as usize, 2)
            }),
            Item::Nested(index) => self.each(count, |t| t.message(index)),
        }
    }

    fn each(
        &mut self,
        count: usize,
        mut item: impl FnMut(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if count > self.budget {
            return fail(FieldProblem::Count { claimed: count, left: self.left() });
        }
        self.budget -= count;
        for _ in 0..count {
            item(self)?;
        }
        Ok(())
    }

    fn bytes(&mut self, n: usize) -> Result<&[u8], Failure> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.input.len());
        let Some(end) = end else {
            return fail(FieldProblem::Short { needed: n, left: self.left() });
        };
        let bytes = &self.input[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn left(&self) -> usize {
        self.input.len() - self.at
    }

    fn align_input(&mut self, size: usize) -> Result<(), Failure> {
        if self.dialect.is_cdr() {
            let pad = self.at.next_multiple_of(size) - self.at;
            self.bytes(pad)?;
        }
        Ok(())
    }

    fn align_output(&mut self, size: usize) {
        let body = self.out.len() - LITTLE_ENDIAN.len();
        self.out.resize(LITTLE_ENDIAN.len() + body.next_multiple_of(size), 0);
    }

    fn read_u32(&mut self) -> Result<u32, Failure> {
        self.align_input(4)?;
        let big = self.dialect == Dialect::BigEndian;
        let b = self.bytes(4)?;
        let raw = [b[0], b[1], b[2], b[3]];
        Ok(if big { u32::from_be_bytes(raw) } else { u32::from_le_bytes(raw) })
    }

    fn write_u32(&mut self, value: u32) {
        self.align_output(4);
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    fn numbers(&mut self, count: usize, size: usize) -> Result<(), Failure> {
        if count == 0 {
            return Ok(());
        }
        self.align_input(size)?;
        self.align_output(size);
        let n = count.saturating_mul(size);
        let big = self.dialect == Dialect::BigEndian && size > 1;
        let end = self.at.checked_add(n).filter(|end| *end <= self.input.len());
        let Some(end) = end else {
            return fail(FieldProblem::Short { needed: n, left: self.left() });
        };
        let start = self.out.len();
        self.out.extend_from_slice(&self.input[self.at..end]);
        self.at = end;
        if big {
            self.out[start..].chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        Ok(())
    }

    fn text(&mut self) -> Result<(), Failure> {
        let n = self.read_u32()? as usize;
        let terminated = self.dialect.is_cdr();
        if terminated && n == 0 {
            // Some writers give an empty string no NUL.
            self.write_u32(1);
            self.out.push(0);
            return Ok(());
        }
        let end = self.at.checked_add(n).filter(|end| *end <= self.input.len());
        let Some(end) = end else {
            return fail(FieldProblem::ShortText { needed: n, left: self.left() });
        };
        let mut content = &self.input[self.at..end];
        self.at = end;
        if terminated {
            match content.split_last() {
                Some((0, rest)) => content = rest,
                _ => return fail(FieldProblem::NoNul),
            }
        }
        let Ok(len) = u32::try_from(content.len() + 1) else { return fail(FieldProblem::LongText) };
        self.write_u32(len);
        self.out.extend_from_slice(content);
        self.out.push(0);
        Ok(())
    }
}

/// Where `header.stamp` lies in the messages of a topic.
#[derive(Clone, Copy, Debug)]
pub(super) enum HeaderStamp {
    Cdr,
    Ros1,
}

impl HeaderStamp {
    /// `None` for topics whose type does not start with a header.
    pub fn find(topic: &TopicInfo) -> Option<Self> {
        let schema = schema_of(topic).ok()?;
        if !schema.starts_with_header() {
            return None;
        }
        match topic.encoding {
            Encoding::Cdr => Some(Self::Cdr),
            Encoding::Ros1 => Some(Self::Ros1),
            _ => None,
        }
    }

    /// The stamp in nanoseconds since the Unix epoch.
    pub fn of(self, data: &[u8]) -> Option<i64> {
        let word = |at: usize| -> Option<[u8; 4]> { data.get(at..at + 4)?.try_into().ok() };
        let (seconds, nanos) = match self {
            Self::Ros1 => (i64::from(u32::from_le_bytes(word(4)?)), u32::from_le_bytes(word(8)?)),
            Self::Cdr if matches!(data.get(..2)?, [0, 0]) => {
                (i64::from(i32::from_be_bytes(word(4)?)), u32::from_be_bytes(word(8)?))
            }
            Self::Cdr => (i64::from(i32::from_le_bytes(word(4)?)), u32::from_le_bytes(word(8)?)),
        };
        Some(seconds * 1_000_000_000 + i64::from(nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|p| u8::from_str_radix(std::str::from_utf8(p).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn transcoding_follows_the_definition() {
        let header = format!(
            "Header h\n{}\nMSG: std_msgs/Header\nuint32 seq\ntime stamp\nstring frame_id",
            "=".repeat(80)
        );
        // definition, dialect, input, little-endian CDR after the header or the error
        let cases: &[(&str, Dialect, &str, Result<&str, &str>)] = &[
            (
                "uint8 a\nfloat64 b",
                Dialect::Ros1,
                "01 0203040506070809",
                Ok("01 00000000000000 0203040506070809"),
            ),
            ("string s\nuint16 a", Dialect::Ros1, "02000000 6162 0500", Ok("03000000 616200 00 0500")),
            (
                &header,
                Dialect::Ros1,
                "09000000 01000000 02000000 01000000 63",
                Ok("01000000 02000000 02000000 6300"),
            ),
            (
                "uint8[3] a\nint32[] b",
                Dialect::Ros1,
                "010203 01000000 07000000",
                Ok("010203 00 01000000 07000000"),
            ),
            ("duration d\nbool e", Dialect::Ros1, "01000000 02000000 01", Ok("01000000 02000000 01")),
            ("", Dialect::Ros1, "", Ok("00")),
            ("string[] s", Dialect::Ros1, "01000000 00000000", Ok("01000000 01000000 00")),
            (
                "uint8[] a",
                Dialect::Ros1,
                "ffffffff 00",
                Err("field a of p/msg/T: 4294967295 bytes are needed, 1 are left"),
            ),
            (
                "string[] a",
                Dialect::Ros1,
                "ffffffff 00",
                Err("field a of p/msg/T: 4294967295 items are claimed, 1 bytes are left"),
            ),
            (
                "uint32 a",
                Dialect::Ros1,
                "00000000 00",
                Err("1 bytes are left over after p/msg/T: the type is wrong"),
            ),
            (
                "uint8 a\nuint32 b\nfloat64 c",
                Dialect::BigEndian,
                "01 000000 00000002 3ff0000000000000",
                Ok("01 000000 02000000 000000000000f03f"),
            ),
            (
                "string s\nuint16[2] a",
                Dialect::BigEndian,
                "00000003 616200 00 00010002",
                Ok("03000000 616200 00 01000200"),
            ),
            (
                "string s",
                Dialect::BigEndian,
                "00000002 6162",
                Err("field s of p/msg/T: a string does not end with NUL"),
            ),
        ];
        let mut out = Vec::new();
        for (text, dialect, input, want) in cases {
            let schema = Schema::parse("p/T", text, FillIn::Nothing).unwrap();
            let got = transcode(&schema, *dialect, &hex(input), &mut out);
            match want {
                Ok(want) => assert_eq!((got, &out[4..]), (Ok(()), &hex(want)[..]), "{text}"),
                Err(want) => assert_eq!(got.unwrap_err().to_string(), *want, "{text}"),
            }
        }
    }

    #[test]
    fn items_without_bytes_end() {
        let line = "=".repeat(80);
        let schema = Schema::parse("p/T", &format!("E[] e\n{line}\nMSG: p/E\n"), FillIn::Nothing).unwrap();
        let got = transcode(&schema, Dialect::Ros1, &[0xff, 0xff, 0xff, 0xff], &mut Vec::new());
        assert!(got.unwrap_err().to_string().contains("4294967295 items"));
    }
}
