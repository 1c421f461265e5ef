//! Reading MCAP files (<https://mcap.dev/spec>): by the summary where it is good, by going through the
//! records where it is not.

use std::collections::HashMap;
use std::path::Path;

use super::codec::{Codec, ZSTD_MAGIC, append_zstd, decompress};
use super::source::{Source, Window, with_scratch};
use super::{
    BagFile, Chunk, ChunkMeta, Damage, Encoding, Entry, Format, OpenBagError, OpenOptions, Opened,
    SchemaText, TopicInfo, file_label, offers_transient_local, schema,
};

pub(super) const MAGIC: [u8; 8] = [0x89, b'M', b'C', b'A', b'P', b'0', b'\r', b'\n'];

const HEADER: u8 = 0x01;
const FOOTER: u8 = 0x02;
const SCHEMA: u8 = 0x03;
const CHANNEL: u8 = 0x04;
const MESSAGE: u8 = 0x05;
const CHUNK: u8 = 0x06;
const MESSAGE_INDEX: u8 = 0x07;
const CHUNK_INDEX: u8 = 0x08;
const STATISTICS: u8 = 0x0b;
const DATA_END: u8 = 0x0f;

/// Opcode and length.
const RECORD_HEAD: u64 = 9;
/// Channel, sequence, log time, publish time.
const MESSAGE_HEAD: usize = 2 + 4 + 8 + 8;
/// Messages outside chunks are read in runs of about this many bytes.
const RUN_BYTES: u64 = 1 << 20;
/// Longest header of a chunk record that is believed: the compression name is the only part that varies.
const CHUNK_HEAD_MAX: usize = 8 + 8 + 8 + 4 + 4 + 64 + 8;

/// Little-endian fields one after the other; `None` past the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes(2)?.try_into().ok()?))
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }
    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }
    fn prefixed(&mut self) -> Option<&'a [u8]> {
        let n = self.u32()? as usize;
        self.bytes(n)
    }
    fn text(&mut self) -> Option<String> {
        Some(String::from_utf8_lossy(self.prefixed()?).into_owned())
    }
}

fn stamp(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

#[derive(Clone, Copy)]
enum Place {
    /// A chunk record: its first byte and its length with the head.
    Chunk { at: u64, len: u64 },
    /// Bare records.
    Run { at: u64, len: u64 },
}

struct Piece {
    place: Place,
    /// Number in the file, counted from 0.
    number: u64,
    /// Messages by channel, where the index tells; the key is the topic of the file.
    counts: Option<Vec<(u32, u64)>>,
}

struct ChunkHead {
    start: u64,
    end: u64,
    size: u64,
    crc: u32,
    codec: Result<Codec, String>,
    /// Bytes of the head itself and of the compressed records.
    head_len: usize,
    records_len: u64,
}

fn chunk_head(body: &[u8]) -> Option<ChunkHead> {
    let mut f = Fields(body);
    let (start, end, size, crc) = (f.u64()?, f.u64()?, f.u64()?, f.u32()?);
    let name = f.prefixed()?;
    let records_len = f.u64()?;
    let codec = match Codec::from_name(name) {
        Some(codec) if codec != Codec::Bz2 => Ok(codec),
        _ => Err(format!("compression {:?} is not known", String::from_utf8_lossy(name))),
    };
    Some(ChunkHead { start, end, size, crc, codec, head_len: 32 + name.len() + 8, records_len })
}

/// Schemas and channels as they come by.
#[derive(Default)]
struct Registry {
    schemas: HashMap<u16, (String, SchemaText)>,
    channels: HashMap<u16, u32>,
    topics: Vec<TopicInfo>,
}

impl Registry {
    fn schema(&mut self, body: &[u8]) -> Option<()> {
        let mut f = Fields(body);
        let (id, name, encoding) = (f.u16()?, f.text()?, f.text()?);
        let data = f.prefixed()?;
        self.schemas.entry(id).or_insert_with(|| (name, SchemaText { encoding, data: data.into() }));
        Some(())
    }

    fn channel(&mut self, body: &[u8]) -> Option<()> {
        let mut f = Fields(body);
        let (id, schema_id, name, encoding) = (f.u16()?, f.u16()?, f.text()?, f.text()?);
        if self.channels.contains_key(&id) {
            return Some(());
        }
        let mut pairs = Fields(f.prefixed()?);
        let mut metadata = HashMap::new();
        while !pairs.0.is_empty() {
            let (key, value) = (pairs.text()?, pairs.text()?);
            metadata.insert(key, value);
        }
        let schema = self.schemas.get(&schema_id);
        let offered_qos = metadata.remove("offered_qos_profiles").unwrap_or_default();
        let latching = metadata.get("latching").is_some_and(|v| v == "1" || v == "true");
        let latched = latching || offers_transient_local(&offered_qos);
        let topic = TopicInfo {
            name,
            type_name: schema.map(|(n, _)| schema::normalize_type(n)).unwrap_or_default(),
            encoding: Encoding::from_name(&encoding),
            schema: schema.map(|(_, text)| text.clone()).filter(|t| !t.data.is_empty()),
            type_hash: metadata.remove("topic_type_hash").filter(|h| !h.is_empty()),
            offered_qos,
            latched,
            count: 0,
        };
        let at = match self.topics.iter().position(|t| t.same_channel(&topic)) {
            Some(at) => at,
            None => {
                self.topics.push(topic);
                self.topics.len() - 1
            }
        };
        self.channels.insert(id, at as u32);
        Some(())
    }
}

pub(super) struct McapFile {
    source: Source,
    label: String,
    pieces: Vec<Piece>,
    metas: Vec<ChunkMeta>,
    /// Topic of each channel id; `u32::MAX` for ids that are not declared.
    channels: Vec<u32>,
    /// Whether a message may be a zstd frame, by topic.
    sniff: Vec<bool>,
    size_max: usize,
}

pub(super) fn open(source: Source, path: &Path, options: &OpenOptions) -> Result<Opened, OpenBagError> {
    let mut scan = Scan {
        source: &source,
        label: file_label(path),
        registry: Registry::default(),
        pieces: Vec::new(),
        metas: Vec::new(),
        codecs: Vec::new(),
        damage: Vec::new(),
        size_max: options.chunk_bytes_max,
    };
    if let Err(reason) = scan.by_summary() {
        let label = scan.label;
        scan = Scan {
            source: &source,
            label: label.clone(),
            registry: Registry::default(),
            pieces: Vec::new(),
            metas: Vec::new(),
            codecs: Vec::new(),
            damage: Vec::new(),
            size_max: options.chunk_bytes_max,
        };
        let clean = scan.by_records();
        if scan.registry.topics.is_empty() && !(clean && scan.damage.is_empty()) {
            let why = scan.damage.first().map_or(reason, |d| d.reason.clone());
            return Err(OpenBagError::Damaged { path: path.to_path_buf(), reason: why });
        }
    }
    let Scan { label, registry, pieces, metas, mut codecs, damage, .. } = scan;
    let sniff: Vec<bool> = registry.topics.iter().map(|t| t.encoding == Encoding::Cdr).collect();
    let width = registry.channels.keys().max().map_or(0, |id| usize::from(*id) + 1);
    let mut channels = vec![u32::MAX; width];
    for (id, topic) in &registry.channels {
        channels[usize::from(*id)] = *topic;
    }
    codecs.sort_unstable();
    codecs.dedup();
    let mut compression: Vec<_> = codecs.iter().map(|c| (c.name(), "chunk")).collect();
    let file = McapFile { source, label, pieces, metas, channels, sniff, size_max: options.chunk_bytes_max };
    if file.has_compressed_messages() {
        compression.retain(|(codec, _)| *codec != "none");
        compression.push(("zstd", "message"));
    }
    Ok(Opened { file: Box::new(file), format: Format::Mcap, topics: registry.topics, compression, damage })
}

struct Scan<'a> {
    source: &'a Source,
    label: String,
    registry: Registry,
    pieces: Vec<Piece>,
    metas: Vec<ChunkMeta>,
    codecs: Vec<Codec>,
    damage: Vec<Damage>,
    size_max: usize,
}

impl Scan<'_> {
    /// Takes everything from the summary at the end of the file.
    fn by_summary(&mut self) -> Result<(), String> {
        let len = self.source.len();
        let footer_len = RECORD_HEAD + 20;
        let footer_at = len.checked_sub(footer_len + 8).ok_or("the file ends after the magic")?;
        let io = |e: std::io::Error| e.to_string();
        let tail = self.source.read_vec(footer_at..len).map_err(io)?;
        if tail.len() as u64 != footer_len + 8 || tail[footer_len as usize..] != MAGIC {
            return Err("the magic at the end is missing".to_owned());
        }
        let mut f = Fields(&tail);
        let head = (f.bytes(1), f.u64());
        if head != (Some(&[FOOTER]), Some(20)) {
            return Err("the footer is missing".to_owned());
        }
        let (Some(start), Some(_), Some(crc)) = (f.u64(), f.u64(), f.u32()) else {
            return Err("the footer is short".to_owned());
        };
        if start == 0 {
            return Err("there is no summary".to_owned());
        }
        if start < 8 || start > footer_at || footer_at - start > self.size_max as u64 {
            return Err("the footer points nowhere".to_owned());
        }
        let summary = self.source.read_vec(start..footer_at + footer_len - 4).map_err(io)?;
        if crc != 0 && crc32fast::hash(&summary) != crc {
            return Err("the CRC of the summary is wrong".to_owned());
        }
        let records = &summary[..summary.len().saturating_sub(footer_len as usize - 4)];
        let mut statistics = None;
        let mut indexes = Vec::new();
        let mut f = Fields(records);
        while !f.0.is_empty() {
            let record = (|| {
                let op = f.bytes(1)?[0];
                let n = usize::try_from(f.u64()?).ok()?;
                Some((op, f.bytes(n)?))
            })();
            let (op, body) = record.ok_or("a record of the summary is cut")?;
            let read = match op {
                SCHEMA => self.registry.schema(body),
                CHANNEL => self.registry.channel(body),
                STATISTICS => parse_statistics(body).map(|s| statistics = Some(s)),
                CHUNK_INDEX => parse_chunk_index(body).map(|i| indexes.push(i)),
                _ => Some(()),
            };
            read.ok_or("a record of the summary is short")?;
        }
        let Some(statistics) = statistics.or_else(|| self.count_by_indexes(&indexes)) else {
            return Err("the summary does not count the messages".to_owned());
        };
        if statistics.messages > 0 && indexes.is_empty() {
            return Err("the summary has no index of chunks".to_owned());
        }
        if statistics.chunks as usize != indexes.len() {
            return Err("the summary misses chunks".to_owned());
        }
        indexes.sort_by_key(|i| i.at);
        let mut by_topic = vec![0; self.registry.topics.len()];
        for (channel, count) in &statistics.by_channel {
            let topic = self.registry.channels.get(channel).ok_or("the summary misses channels")?;
            by_topic[*topic as usize] += *count;
        }
        if by_topic.iter().sum::<u64>() != statistics.messages {
            return Err("the counts of the summary disagree".to_owned());
        }
        for (number, index) in indexes.iter().enumerate() {
            if index.at < 8 || index.at.saturating_add(index.len) > start {
                return Err("an index of the summary points nowhere".to_owned());
            }
            let channels = index.channels.iter().filter_map(|c| self.registry.channels.get(c));
            let counts = (!index.channels.is_empty()).then(|| channels.map(|c| (*c, 0)).collect());
            self.codecs.extend(Codec::from_name(&index.codec));
            self.metas.push(ChunkMeta { start_ns: stamp(index.start), end_ns: stamp(index.end) });
            let place = Place::Chunk { at: index.at, len: index.len };
            self.pieces.push(Piece { place, number: number as u64, counts });
        }
        for (topic, count) in self.registry.topics.iter_mut().zip(by_topic) {
            topic.count = count;
        }
        // Chunks without messages have no time of their own.
        let mut keep = self.metas.iter().map(|m| !(m.start_ns == 0 && m.end_ns == 0));
        self.pieces.retain(|_| keep.next().unwrap_or(true));
        self.metas.retain(|m| !(m.start_ns == 0 && m.end_ns == 0));
        Ok(())
    }

    /// Counts the messages by the message indexes after each chunk.
    fn count_by_indexes(&self, indexes: &[ChunkIndex]) -> Option<Statistics> {
        let mut counts: HashMap<u16, u64> = HashMap::new();
        let mut total = 0;
        for index in indexes {
            let from = index.at.checked_add(index.len)?;
            for (channel, count) in read_message_indexes(self.source, from, index.index_len)? {
                *counts.entry(channel).or_default() += count;
                total += count;
            }
        }
        (total > 0).then(|| Statistics {
            messages: total,
            chunks: indexes.len() as u32,
            by_channel: counts.into_iter().collect(),
        })
    }

    /// Goes through all records; true when the file ends as it should.
    fn by_records(&mut self) -> bool {
        let len = self.source.len();
        let mut window = Window::new(self.source);
        let mut at = MAGIC.len() as u64;
        let mut number = 0;
        let mut run = Run::default();
        // The last chunk that could not be read, waiting for its message indexes.
        let mut lost: Option<(u64, Damage)> = None;
        let mut closed = false;
        while at < len {
            let head = window.get(at, RECORD_HEAD as usize);
            let op = head.first().copied().unwrap_or(0);
            let size = Fields(head.get(1..).unwrap_or(&[])).u64();
            if closed && len - at <= MAGIC.len() as u64 {
                break;
            }
            let known = (HEADER..=DATA_END).contains(&op) || op >= 0x80;
            let next = size.and_then(|n| n.checked_add(at + RECORD_HEAD));
            let (Some(size), Some(next)) = (size, next.filter(|_| known)) else {
                at = self.resynchronise(at, &mut run, "the record is broken");
                continue;
            };
            if op != MESSAGE_INDEX {
                self.settle(&mut lost);
            }
            if next > len {
                // Cut here, or the length is wrong and good chunks follow.
                let follows = self.next_chunk(at + 1);
                if let Some(follows) = follows {
                    let what = Damage::new(&self.label, "the length of a record is broken");
                    self.damage.push(what.bytes(follows - at));
                    run.finish(self, at);
                    at = follows;
                    continue;
                }
                run.finish(self, at);
                if op == CHUNK {
                    self.chunk(at, len - at, number, true, &mut lost);
                    self.settle(&mut lost);
                } else if closed {
                    self.damage.push(Damage::new(&self.label, "the summary is cut").messages(Some(0)));
                } else {
                    let what =
                        if op == MESSAGE { "the file is cut inside a message" } else { "the file is cut" };
                    let lost = (op == MESSAGE).then_some(1);
                    self.damage.push(Damage::new(&self.label, what).messages(lost).bytes(len - at));
                }
                return false;
            }
            match op {
                CHUNK => {
                    run.finish(self, at);
                    self.chunk(at, next - at, number, false, &mut lost);
                    number += 1;
                }
                MESSAGE => {
                    let head = window.get(at + RECORD_HEAD, MESSAGE_HEAD);
                    let mut f = Fields(head);
                    let parsed = (|| Some((f.u16()?, f.u32()?, f.u64()?, f.u64()?)))();
                    match parsed.and_then(|(c, _, log, _)| Some((*self.registry.channels.get(&c)?, log))) {
                        Some((topic, log)) => run.add(self, topic, stamp(log), at, next),
                        None => {
                            let what =
                                Damage::new(&self.label, "a message of a channel that is not declared");
                            self.damage.push(what.messages(Some(1)));
                            run.finish(self, at);
                        }
                    }
                }
                SCHEMA | CHANNEL if size <= self.size_max as u64 => {
                    let body = self.source.read_vec(at + RECORD_HEAD..next).unwrap_or_default();
                    let read =
                        if op == SCHEMA { self.registry.schema(&body) } else { self.registry.channel(&body) };
                    if read.is_none() {
                        self.damage.push(Damage::new(&self.label, "a schema or channel record is broken"));
                    }
                }
                MESSAGE_INDEX => {
                    if let Some((count, _)) = &mut lost {
                        let body = self.source.read_vec(at + RECORD_HEAD..next).unwrap_or_default();
                        *count += message_index(&body).map_or(0, |(_, n)| n);
                    }
                }
                DATA_END => {
                    run.finish(self, at);
                    closed = true;
                }
                FOOTER => closed = true,
                _ => {}
            }
            at = next;
        }
        self.settle(&mut lost);
        run.finish(self, len);
        let tail = self.source.read_vec(len.saturating_sub(8)..len).unwrap_or_default();
        let complete = closed && tail == MAGIC;
        if !complete {
            let what = if closed {
                "the magic at the end is missing"
            } else {
                "the file ends without a footer: the recorder was stopped"
            };
            self.damage.push(Damage::new(&self.label, what).messages(Some(0)));
        }
        complete
    }

    /// Says that a chunk is lost, with the number of its messages if its index told it.
    fn settle(&mut self, lost: &mut Option<(u64, Damage)>) {
        if let Some((count, damage)) = lost.take() {
            let known = (count > 0).then_some(count);
            self.damage.push(damage.messages(known));
        }
    }

    fn resynchronise(&mut self, at: u64, run: &mut Run, what: &str) -> u64 {
        run.finish(self, at);
        let next = self.next_chunk(at + 1).unwrap_or(self.source.len());
        self.damage.push(Damage::new(&self.label, what).bytes(next - at));
        next
    }

    /// The next place that can only be a chunk: opcode, and two lengths that agree.
    fn next_chunk(&self, from: u64) -> Option<u64> {
        let len = self.source.len();
        let mut block = Vec::new();
        let mut at = from;
        let overlap = RECORD_HEAD as usize + CHUNK_HEAD_MAX;
        while at < len {
            self.source.read_into(at..at + (1 << 20), &mut block).ok()?;
            if block.is_empty() {
                return None;
            }
            let last = at + block.len() as u64 >= len;
            let usable = if last { block.len() } else { block.len().saturating_sub(overlap) };
            for start in 0..usable {
                if block[start] != CHUNK {
                    continue;
                }
                let mut f = Fields(&block[start + 1..]);
                let Some(size) = f.u64() else { continue };
                let Some(head) = chunk_head(f.0) else { continue };
                let agrees = (head.head_len as u64).checked_add(head.records_len) == Some(size);
                if agrees && head.codec.is_ok() && head.start <= head.end && at + start as u64 + size < len {
                    return Some(at + start as u64);
                }
            }
            if last {
                return None;
            }
            at += usable.max(1) as u64;
        }
        None
    }

    /// Reads a chunk through: its channels, and how many messages of which time it holds.
    fn chunk(&mut self, at: u64, len: u64, number: u64, cut: bool, lost: &mut Option<(u64, Damage)>) {
        let record = match self.source.read_vec(at..at + len) {
            Ok(record) => record,
            Err(e) => {
                let damage = Damage::new(&self.label, e.to_string()).at(number).bytes(len);
                *lost = Some((0, damage));
                return;
            }
        };
        let mut data = Vec::new();
        let read = read_chunk(&record, cut, self.size_max, &mut data);
        let failed = |reason: String, label: &str| Damage::new(label, reason).at(number).bytes(len);
        if let Err(reason) = read {
            *lost = Some((0, failed(reason, &self.label)));
            return;
        }
        if let Some(Ok(codec)) =
            chunk_head(record.get(RECORD_HEAD as usize..).unwrap_or(&[])).map(|h| h.codec)
        {
            self.codecs.push(codec);
        }
        let (mut start, mut end) = (i64::MAX, i64::MIN);
        let mut unknown = 0;
        let mut f = Fields(&data);
        let whole = loop {
            if f.0.is_empty() {
                break true;
            }
            let Some((op, body)) = next_record(&mut f) else { break false };
            match op {
                SCHEMA => drop(self.registry.schema(body)),
                CHANNEL => drop(self.registry.channel(body)),
                MESSAGE => {
                    let mut f = Fields(body);
                    let parsed = (|| Some((f.u16()?, f.u32()?, f.u64()?, f.u64()?)))();
                    match parsed.and_then(|(c, _, log, _)| Some((*self.registry.channels.get(&c)?, log))) {
                        Some((topic, log)) => {
                            self.registry.topics[topic as usize].count += 1;
                            start = start.min(stamp(log));
                            end = end.max(stamp(log));
                        }
                        None => unknown += 1,
                    }
                }
                _ => {}
            }
        };
        if start <= end {
            self.metas.push(ChunkMeta { start_ns: start, end_ns: end });
            self.pieces.push(Piece { place: Place::Chunk { at, len }, number, counts: None });
        }
        if cut {
            let reason = "the file is cut inside the chunk; what came before the cut is kept";
            self.damage.push(failed(reason.to_owned(), &self.label));
        } else if !whole {
            self.damage.push(failed("a record of the chunk is broken".to_owned(), &self.label));
        }
        if unknown > 0 {
            let what = Damage::new(&self.label, "messages of channels that are not declared");
            self.damage.push(what.at(number).messages(Some(unknown)));
        }
    }
}

/// A run of bare messages.
#[derive(Default)]
struct Run {
    open: Option<(u64, ChunkMeta)>,
}

impl Run {
    fn add(&mut self, scan: &mut Scan<'_>, topic: u32, log: i64, at: u64, next: u64) {
        if self.open.as_ref().is_some_and(|(start, _)| next - start > RUN_BYTES) {
            self.finish(scan, at);
        }
        let (_, meta) = self.open.get_or_insert((at, ChunkMeta { start_ns: log, end_ns: log }));
        meta.start_ns = meta.start_ns.min(log);
        meta.end_ns = meta.end_ns.max(log);
        scan.registry.topics[topic as usize].count += 1;
        scan.codecs.push(Codec::None);
        scan.codecs.dedup();
    }

    fn finish(&mut self, scan: &mut Scan<'_>, end: u64) {
        if let Some((at, meta)) = self.open.take() {
            let place = Place::Run { at, len: end - at };
            let number = scan.pieces.len() as u64;
            scan.pieces.push(Piece { place, number, counts: None });
            scan.metas.push(meta);
        }
    }
}

struct Statistics {
    messages: u64,
    chunks: u32,
    by_channel: Vec<(u16, u64)>,
}

fn parse_statistics(body: &[u8]) -> Option<Statistics> {
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

struct ChunkIndex {
    start: u64,
    end: u64,
    at: u64,
    len: u64,
    channels: Vec<u16>,
    index_len: u64,
    codec: Vec<u8>,
}

fn parse_chunk_index(body: &[u8]) -> Option<ChunkIndex> {
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

fn message_index(body: &[u8]) -> Option<(u16, u64)> {
    let mut f = Fields(body);
    let channel = f.u16()?;
    Some((channel, u64::from(f.u32()?) / 16))
}

/// Channels and counts of the message indexes that follow a chunk.
fn read_message_indexes(source: &Source, from: u64, len: u64) -> Option<Vec<(u16, u64)>> {
    if len > 256 << 20 {
        return None;
    }
    let bytes = source.read_vec(from..from.checked_add(len)?).ok()?;
    let mut counts = Vec::new();
    let mut f = Fields(&bytes);
    while !f.0.is_empty() {
        let (op, body) = next_record(&mut f)?;
        if op != MESSAGE_INDEX {
            return None;
        }
        counts.push(message_index(body)?);
    }
    Some(counts)
}

fn next_record<'a>(f: &mut Fields<'a>) -> Option<(u8, &'a [u8])> {
    let op = f.bytes(1)?[0];
    let n = usize::try_from(f.u64()?).ok()?;
    Some((op, f.bytes(n)?))
}

/// Decompresses a chunk record into `data` and checks its CRC. A cut chunk gives what there is of it.
fn read_chunk(record: &[u8], cut: bool, size_max: usize, data: &mut Vec<u8>) -> Result<(), String> {
    data.clear();
    let body = record.get(RECORD_HEAD as usize..).unwrap_or(&[]);
    let head = chunk_head(body).filter(|_| record[0] == CHUNK).ok_or("there is no chunk here")?;
    let codec = head.codec?;
    let size = usize::try_from(head.size).ok().filter(|n| *n <= size_max);
    let size = size.ok_or_else(|| format!("the chunk claims {} bytes, {size_max} are allowed", head.size))?;
    let stored = &body[head.head_len..];
    let stored = match usize::try_from(head.records_len).ok().filter(|n| *n <= stored.len()) {
        Some(n) => &stored[..n],
        None if cut => stored,
        None => return Err("the chunk is longer than its record".to_owned()),
    };
    let done = decompress(codec, stored, size, cut || head.crc == 0, data);
    if cut {
        return Ok(());
    }
    if let Some(error) = done.error {
        return Err(format!("{} cannot be decompressed: {error}", codec.name()));
    }
    let crc = crc32fast::hash(data);
    if head.crc != 0 && crc != head.crc {
        return Err(format!("CRC is {crc:08x}, the chunk says {:08x}", head.crc));
    }
    Ok(())
}

impl McapFile {
    /// Looks into the first piece for messages that are zstd frames of their own.
    fn has_compressed_messages(&self) -> bool {
        (0..self.pieces.len().min(1)).any(|index| {
            let mut chunk = Chunk::default();
            self.read(index, &mut chunk);
            let messages = chunk.entries.iter().take(64);
            messages.clone().any(|e| {
                self.sniff[e.topic as usize] && chunk.data[e.start..e.start + e.len].starts_with(&ZSTD_MAGIC)
            })
        })
    }

    /// Messages of a chunk according to its indexes.
    fn count_of(&self, piece: &Piece) -> Option<u64> {
        let Place::Chunk { at, len } = piece.place else { return None };
        let mut count = 0;
        let mut window = Window::new(&self.source);
        let mut at = at + len;
        loop {
            let head = window.get(at, RECORD_HEAD as usize);
            let size = Fields(head.get(1..)?).u64()?;
            if head[0] != MESSAGE_INDEX {
                break;
            }
            let body = window.get(at + RECORD_HEAD, 6);
            count += message_index(body)?.1;
            at = at.checked_add(RECORD_HEAD)?.checked_add(size)?;
        }
        (count > 0).then_some(count)
    }

    fn read(&self, index: usize, chunk: &mut Chunk) {
        let piece = &self.pieces[index];
        let Chunk { data, entries, damage } = chunk;
        let (at, len) = match piece.place {
            Place::Chunk { at, len } | Place::Run { at, len } => (at, len),
        };
        let lose = |reason: String| {
            let lost = Damage::new(&self.label, reason).at(piece.number).messages(self.count_of(piece));
            lost.bytes(len)
        };
        let cut = at + len >= self.source.len();
        if let Place::Chunk { .. } = piece.place {
            // Stored chunks are read straight into the buffer, the others by way of the record.
            match self.stored_chunk(at, len, data) {
                Some(Ok(())) => {}
                Some(Err(reason)) => return damage.push(lose(reason)),
                None => {
                    let read = with_scratch(|record| {
                        self.source.read_into(at..at + len, record).map_err(|e| e.to_string())?;
                        read_chunk(record, cut, self.size_max, data)
                    });
                    if let Err(reason) = read {
                        return damage.push(lose(reason));
                    }
                }
            }
        } else if let Err(e) = self.source.read_into(at..at + len, data) {
            return damage.push(lose(e.to_string()));
        }
        let mut position = 0;
        let mut unknown = 0;
        while position < data.len() {
            let mut f = Fields(&data[position..]);
            let Some((op, body)) = next_record(&mut f) else {
                if !cut {
                    damage.push(Damage::new(&self.label, "a record of the chunk is broken").at(piece.number));
                }
                break;
            };
            if op == MESSAGE {
                let mut f = Fields(body);
                let head = (|| Some((f.u16()?, f.u32()?, f.u64()?, f.u64()?)))();
                let topic = head.and_then(|(c, ..)| self.channels.get(usize::from(c)));
                match (head, topic) {
                    (Some((_, _, log, publish)), Some(topic)) if *topic != u32::MAX => entries.push(Entry {
                        topic: *topic,
                        log_ns: stamp(log),
                        publish_ns: stamp(publish),
                        start: position + RECORD_HEAD as usize + MESSAGE_HEAD,
                        len: body.len() - MESSAGE_HEAD,
                    }),
                    _ => unknown += 1,
                }
            }
            position += RECORD_HEAD as usize + body.len();
        }
        if unknown > 0 && matches!(piece.place, Place::Chunk { .. }) && piece.counts.is_some() {
            let what = Damage::new(&self.label, "messages of channels that are not declared");
            damage.push(what.at(piece.number).messages(Some(unknown)));
        }
    }

    /// Reads a chunk that is not compressed without a second copy; `None` when it is compressed or odd.
    fn stored_chunk(&self, at: u64, len: u64, data: &mut Vec<u8>) -> Option<Result<(), String>> {
        let head_bytes = self.source.read_vec(at..at + RECORD_HEAD + CHUNK_HEAD_MAX as u64).ok()?;
        let head = chunk_head(head_bytes.get(RECORD_HEAD as usize..)?)?;
        if head_bytes[0] != CHUNK || head.codec.as_ref().ok() != Some(&Codec::None) {
            return None;
        }
        let records = at + RECORD_HEAD + head.head_len as u64;
        if head.records_len != head.size || records + head.size > at + len || head.size > self.size_max as u64
        {
            return None;
        }
        if let Err(e) = self.source.read_into(records..records + head.size, data) {
            return Some(Err(e.to_string()));
        }
        if data.len() as u64 != head.size {
            return None;
        }
        let crc = if head.crc == 0 { 0 } else { crc32fast::hash(data) };
        if crc != head.crc {
            return Some(Err(format!("CRC is {crc:08x}, the chunk says {:08x}", head.crc)));
        }
        Some(Ok(()))
    }
}

/// Undoes message compression in place: the content goes to the end of the buffer.
pub(super) fn expand_messages(chunk: &mut Chunk, label: &str, limit: usize, sniff: impl Fn(u32) -> bool) {
    let Chunk { data, entries, damage } = chunk;
    let mut failed = 0;
    let mut why = String::new();
    let mut frame = Vec::new();
    entries.retain_mut(|entry| {
        let bytes = &data[entry.start..entry.start + entry.len];
        if !sniff(entry.topic) || !bytes.starts_with(&ZSTD_MAGIC) {
            return true;
        }
        frame.clear();
        frame.extend_from_slice(bytes);
        let start = data.len();
        match append_zstd(&frame, limit, data) {
            Ok(len) => {
                (entry.start, entry.len) = (start, len);
                true
            }
            Err(e) => {
                failed += 1;
                why = e;
                false
            }
        }
    });
    if failed > 0 {
        let what = Damage::new(label, format!("zstd of messages cannot be decompressed: {why}"));
        damage.push(what.messages(Some(failed)));
    }
}

impl BagFile for McapFile {
    fn chunks(&self) -> &[ChunkMeta] {
        &self.metas
    }

    fn load(&self, index: usize, chunk: &mut Chunk) {
        self.read(index, chunk);
        expand_messages(chunk, &self.label, self.size_max, |topic| self.sniff[topic as usize]);
    }

    fn may_hold(&self, index: usize, wanted: &dyn Fn(u32) -> bool) -> bool {
        self.pieces[index].counts.as_ref().is_none_or(|counts| counts.iter().any(|(topic, _)| wanted(*topic)))
    }
}
