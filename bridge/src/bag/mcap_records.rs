//! Records of MCAP files (<https://mcap.dev/spec>), taken apart.

use std::collections::{BTreeMap, HashMap};

use super::codec::{Codec, decompress};
use super::error::ReadError;
use super::qos::offers_transient_local;
use super::side::MetadataRecord;
use super::{ChannelPlace, Encoding, PublisherInfo, SchemaText, TopicInfo, add_publisher};

pub(super) const MAGIC: [u8; 8] = [0x89, b'M', b'C', b'A', b'P', b'0', b'\r', b'\n'];

pub(super) const HEADER: u8 = 0x01;
pub(super) const FOOTER: u8 = 0x02;
pub(super) const SCHEMA: u8 = 0x03;
pub(super) const CHANNEL: u8 = 0x04;
pub(super) const MESSAGE: u8 = 0x05;
pub(super) const CHUNK: u8 = 0x06;
pub(super) const MESSAGE_INDEX: u8 = 0x07;
pub(super) const CHUNK_INDEX: u8 = 0x08;
pub(super) const ATTACHMENT: u8 = 0x09;
pub(super) const STATISTICS: u8 = 0x0b;
pub(super) const METADATA: u8 = 0x0c;
pub(super) const DATA_END: u8 = 0x0f;
/// From here on, applications give records a meaning of their own.
pub(super) const PRIVATE: u8 = 0x80;

/// Opcode and length.
pub(super) const RECORD_HEAD: u64 = 9;
/// Channel, sequence, log time, publish time.
pub(super) const MESSAGE_HEAD: usize = 2 + 4 + 8 + 8;
/// Longest header of a chunk record that is believed: the compression name is the only part that varies.
pub(super) const CHUNK_HEAD_MAX: usize = 8 + 8 + 8 + 4 + 4 + 64 + 8;

/// Little-endian fields one after the other; `None` past the end.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    pub fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes(2)?.try_into().ok()?))
    }
    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }
    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }
    pub fn prefixed(&mut self) -> Option<&'a [u8]> {
        let n = self.u32()? as usize;
        self.bytes(n)
    }
    pub fn text(&mut self) -> Option<String> {
        Some(String::from_utf8_lossy(self.prefixed()?).into_owned())
    }
    /// A map of texts.
    fn map(&mut self) -> Option<BTreeMap<String, String>> {
        let mut pairs = Fields(self.prefixed()?);
        let mut map = BTreeMap::new();
        while !pairs.0.is_empty() {
            let (key, value) = (pairs.text()?, pairs.text()?);
            map.insert(key, value);
        }
        Some(map)
    }
}

/// Log times beyond the year 2262 are taken for its last moment.
pub(super) fn stamp(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

pub(super) fn next_record<'a>(f: &mut Fields<'a>) -> Option<(u8, &'a [u8])> {
    let op = f.bytes(1)?[0];
    let n = usize::try_from(f.u64()?).ok()?;
    Some((op, f.bytes(n)?))
}

/// The fields before the data of a message.
#[derive(Clone, Copy)]
pub(super) struct MessageHead {
    pub channel: u16,
    pub sequence: u32,
    pub log: u64,
    pub publish: u64,
}

pub(super) fn message_head(body: &[u8]) -> Option<MessageHead> {
    let mut f = Fields(body);
    Some(MessageHead { channel: f.u16()?, sequence: f.u32()?, log: f.u64()?, publish: f.u64()? })
}

pub(super) struct ChunkHead {
    pub start: u64,
    pub end: u64,
    pub size: u64,
    pub crc: u32,
    /// `None`: a compression that is not known.
    pub codec: Option<Codec>,
    codec_name: String,
    /// Bytes of the head itself and of the compressed records.
    pub head_len: usize,
    pub records_len: u64,
}

pub(super) fn chunk_head(body: &[u8]) -> Option<ChunkHead> {
    let mut f = Fields(body);
    let (start, end, size, crc) = (f.u64()?, f.u64()?, f.u64()?, f.u32()?);
    let name = f.prefixed()?;
    let records_len = f.u64()?;
    let codec = Codec::from_name(name).filter(|codec| *codec != Codec::Bz2);
    let codec_name = String::from_utf8_lossy(name).into_owned();
    Some(ChunkHead { start, end, size, crc, codec, codec_name, head_len: 32 + name.len() + 8, records_len })
}

/// Decompresses a chunk record into `data` and checks its CRC. A cut chunk gives what there is of it.
pub(super) fn read_chunk(
    record: &[u8],
    cut: bool,
    size_max: usize,
    data: &mut Vec<u8>,
) -> Result<(), ReadError> {
    data.clear();
    let body = record.get(RECORD_HEAD as usize..).unwrap_or(&[]);
    let head = chunk_head(body).filter(|_| record[0] == CHUNK);
    let head = head.ok_or(ReadError::Form("there is no chunk here"))?;
    let codec = head.codec.ok_or_else(|| ReadError::UnknownCompression { name: head.codec_name.clone() })?;
    let size = usize::try_from(head.size).ok().filter(|n| *n <= size_max);
    let size = size.ok_or(ReadError::TooLarge { claimed: head.size, allowed: size_max })?;
    let stored = &body[head.head_len..];
    let stored = match usize::try_from(head.records_len).ok().filter(|n| *n <= stored.len()) {
        Some(n) => &stored[..n],
        None if cut => stored,
        None => return Err(ReadError::Form("the chunk is longer than its record")),
    };
    let done = decompress(codec, stored, size, cut || head.crc == 0, data);
    if cut {
        return Ok(());
    }
    if let Some(source) = done.error {
        return Err(ReadError::Decompress { codec: codec.name(), source });
    }
    check_crc(data, head.crc)
}

/// Compares content with the CRC that a chunk gives; 0 means none.
pub(super) fn check_crc(data: &[u8], want: u32) -> Result<(), ReadError> {
    let got = if want == 0 { 0 } else { crc32fast::hash(data) };
    if got == want { Ok(()) } else { Err(ReadError::Crc { got, want }) }
}

/// Schemas and channels as they come by.
#[derive(Default)]
pub(super) struct Registry {
    schemas: HashMap<u16, (String, SchemaText)>,
    pub channels: HashMap<u16, ChannelPlace>,
    /// CRC of each channel record, to see whether it changes.
    declared: HashMap<u16, u32>,
    pub topics: Vec<TopicInfo>,
    /// Declarations that contradict each other.
    pub problems: Vec<String>,
}

impl Registry {
    pub fn schema(&mut self, body: &[u8]) -> Option<()> {
        let mut f = Fields(body);
        let (id, name, encoding) = (f.u16()?, f.text()?, f.text()?);
        let data = f.prefixed()?;
        self.schemas.entry(id).or_insert_with(|| (name, SchemaText { encoding, data: data.into() }));
        Some(())
    }

    pub fn channel(&mut self, body: &[u8]) -> Option<()> {
        let mut f = Fields(body);
        let (id, schema_id, name, encoding) = (f.u16()?, f.u16()?, f.text()?, f.text()?);
        let metadata = f.map()?;
        let crc = crc32fast::hash(body);
        if let Some(before) = self.declared.insert(id, crc) {
            if before != crc {
                self.problem(format!(
                    "channel {id} ({name}) is declared twice, in different ways: its messages count as those of the \
                     first"
                ));
            }
            return Some(());
        }
        let schema = self.schemas.get(&schema_id);
        let mut topic = TopicInfo::new(
            &name,
            schema.map_or("", |(type_name, _)| type_name),
            Encoding::from_name(&encoding),
        );
        topic.schema =
            schema.map(|(_, text)| text.clone()).filter(|t| !t.data.is_empty() || !t.encoding.is_empty());
        let text = |key: &str| metadata.get(key).cloned().unwrap_or_default();
        topic.offered_qos = text("offered_qos_profiles");
        topic.type_hash = Some(text("topic_type_hash")).filter(|h| !h.is_empty());
        topic.latched =
            matches!(text("latching").as_str(), "1" | "true") || offers_transient_local(&topic.offered_qos);
        if schema_id != 0 && schema.is_none() {
            self.problem(format!("channel {id} ({name}) names schema {schema_id}, which is not in the file"));
        }
        let publisher = PublisherInfo { metadata, latched: topic.latched };
        self.channels.insert(id, add_publisher(&mut self.topics, topic, publisher));
        Some(())
    }

    fn problem(&mut self, text: String) {
        if !self.problems.contains(&text) && self.problems.len() < 64 {
            self.problems.push(text);
        }
    }

    /// The topic of a channel.
    pub fn topic(&self, channel: u16) -> Option<u32> {
        self.channels.get(&channel).map(|(topic, _)| *topic)
    }
}

pub(super) struct Statistics {
    pub messages: u64,
    pub chunks: u32,
    pub by_channel: Vec<(u16, u64)>,
}

pub(super) fn parse_statistics(body: &[u8]) -> Option<Statistics> {
    let mut f = Fields(body);
    let messages = f.u64()?;
    let (_schemas, _channels, _attachments, _metadata) = (f.u16()?, f.u32()?, f.u32()?, f.u32()?);
    let chunks = f.u32()?;
    let (_start, _end) = (f.u64()?, f.u64()?);
    let mut pairs = Fields(f.prefixed()?);
    let mut by_channel = Vec::new();
    while !pairs.0.is_empty() {
        by_channel.push((pairs.u16()?, pairs.u64()?));
    }
    Some(Statistics { messages, chunks, by_channel })
}

pub(super) struct ChunkIndex {
    pub start: u64,
    pub end: u64,
    pub at: u64,
    pub len: u64,
    pub channels: Vec<u16>,
    /// Bytes of the message indexes that follow the chunk.
    pub index_len: u64,
    pub codec: Vec<u8>,
}

impl ChunkIndex {
    /// The number of messages, by the length of the message indexes: 9 + 2 + 4 bytes for each channel and 16 for each
    /// message. `None` without message indexes.
    pub fn messages(&self) -> Option<u64> {
        let heads = (RECORD_HEAD + 6) * self.channels.len() as u64;
        let entries = self.index_len.checked_sub(heads).filter(|_| !self.channels.is_empty())?;
        (entries % 16 == 0).then_some(entries / 16)
    }

    /// The first byte after the chunk and its message indexes.
    pub fn end_at(&self) -> Option<u64> {
        self.at.checked_add(self.len)?.checked_add(self.index_len)
    }
}

pub(super) fn parse_chunk_index(body: &[u8]) -> Option<ChunkIndex> {
    let mut f = Fields(body);
    let (start, end, at, len) = (f.u64()?, f.u64()?, f.u64()?, f.u64()?);
    let mut offsets = Fields(f.prefixed()?);
    let mut channels = Vec::new();
    while !offsets.0.is_empty() {
        channels.push(offsets.u16()?);
        offsets.u64()?;
    }
    let index_len = f.u64()?;
    let codec = f.prefixed()?.to_vec();
    Some(ChunkIndex { start, end, at, len, channels, index_len, codec })
}

/// Channel and number of messages of a message index.
pub(super) fn message_index(body: &[u8]) -> Option<(u16, u64)> {
    let mut f = Fields(body);
    let channel = f.u16()?;
    Some((channel, u64::from(f.u32()?) / 16))
}

/// Smallest and largest log time of a message index; `None` without entries.
pub(super) fn index_range(body: &[u8]) -> Option<(u64, u64)> {
    let mut f = Fields(body);
    f.u16()?;
    let entries = f.prefixed()?;
    let stamps = entries.chunks_exact(16).filter_map(|entry| Fields(entry).u64());
    stamps.fold(None, |range, ns| match range {
        None => Some((ns, ns)),
        Some((low, high)) => Some((ns.min(low), ns.max(high))),
    })
}

pub(super) fn parse_metadata(body: &[u8]) -> Option<MetadataRecord> {
    let mut f = Fields(body);
    Some(MetadataRecord { name: f.text()?, entries: f.map()? })
}

/// What comes before the content of an attachment.
pub(super) struct AttachmentHead {
    pub log_time: u64,
    pub create_time: u64,
    pub name: String,
    pub media_type: String,
    pub size: u64,
    /// Bytes of all this.
    pub head_len: u64,
}

pub(super) fn attachment_head(body: &[u8]) -> Option<AttachmentHead> {
    let mut f = Fields(body);
    let (log_time, create_time) = (f.u64()?, f.u64()?);
    let (name, media_type, size) = (f.text()?, f.text()?, f.u64()?);
    let head_len = (body.len() - f.0.len()) as u64;
    Some(AttachmentHead { log_time, create_time, name, media_type, size, head_len })
}
