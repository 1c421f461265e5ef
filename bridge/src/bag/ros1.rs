//! Reading rosbag v2.0 (<http://wiki.ros.org/Bags/Format/2.0>): by the index at the end where it is good,
//! by going through the chunks where it is not.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::codec::{Codec, decompress};
use super::error::ReadError;
use super::side::SideRecords;
use super::source::{Source, Window, with_scratch};
use super::{
    BagFile, ChannelPlace, Chunk, ChunkMeta, Damage, Encoding, Entry, Format, OpenBagError, OpenOptions,
    Opened, PublisherInfo, SchemaText, TopicInfo, add_publisher, file_label,
};

const MAGIC: &[u8] = b"#ROSBAG V2.0\n";

const MSG_DATA: u8 = 2;
const BAG_HEADER: u8 = 3;
const INDEX_DATA: u8 = 4;
const CHUNK: u8 = 5;
const CHUNK_INFO: u8 = 6;
const CONNECTION: u8 = 7;

/// Longest header that is believed; connection headers carry the message definition.
const HEADER_MAX: usize = 16 << 20;

/// Fields of a record header that are of use.
#[derive(Default)]
struct Header<'a> {
    op: u8,
    connection: Option<u32>,
    time: Option<i64>,
    compression: Option<&'a [u8]>,
    size: Option<u32>,
    topic: Option<&'a [u8]>,
    count: Option<u32>,
    index_pos: Option<u64>,
    connections: Option<u32>,
    chunks: Option<u32>,
    chunk_pos: Option<u64>,
    start: Option<i64>,
    end: Option<i64>,
}

fn le32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn le64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?))
}

fn time(bytes: &[u8]) -> Option<i64> {
    let (seconds, nanos) = (le32(bytes)?, le32(bytes.get(4..)?)?);
    Some(i64::from(seconds) * 1_000_000_000 + i64::from(nanos))
}

/// Calls `each` with name and value of every field; `None` when the bytes are not a header.
fn fields<'a>(mut bytes: &'a [u8], mut each: impl FnMut(&'a [u8], &'a [u8])) -> Option<()> {
    while !bytes.is_empty() {
        let n = le32(bytes)? as usize;
        let field = bytes.get(4..4usize.checked_add(n)?)?;
        let equals = field.iter().position(|b| *b == b'=')?;
        each(&field[..equals], &field[equals + 1..]);
        bytes = &bytes[4 + n..];
    }
    Some(())
}

fn header(bytes: &[u8]) -> Option<Header<'_>> {
    let mut h = Header::default();
    fields(bytes, |name, value| match name {
        b"op" => h.op = value.first().copied().unwrap_or(0),
        b"conn" => h.connection = le32(value),
        b"time" => h.time = time(value),
        b"compression" => h.compression = Some(value),
        b"size" => h.size = le32(value),
        b"topic" => h.topic = Some(value),
        b"count" => h.count = le32(value),
        b"index_pos" => h.index_pos = le64(value),
        b"conn_count" => h.connections = le32(value),
        b"chunk_count" => h.chunks = le32(value),
        b"chunk_pos" => h.chunk_pos = le64(value),
        b"start_time" => h.start = time(value),
        b"end_time" => h.end = time(value),
        _ => {}
    })?;
    (h.op != 0).then_some(h)
}

/// A record at the start of `bytes`: header, data, and the length of both.
fn record(bytes: &[u8]) -> Option<(Header<'_>, &[u8], usize)> {
    let header_len = le32(bytes)? as usize;
    let header_end = 4usize.checked_add(header_len)?;
    let h = header(bytes.get(4..header_end)?)?;
    let data_len = le32(bytes.get(header_end..)?)? as usize;
    let end = (header_end + 4).checked_add(data_len)?;
    let data = bytes.get(header_end + 4..end)?;
    Some((h, data, end))
}

struct Piece {
    at: u64,
    /// Bytes of the chunk record, or of the bare records.
    len: u64,
    number: u64,
    cut: bool,
    /// Records outside chunks.
    bare: bool,
    /// Messages by topic, where the index states it.
    counts: Option<Vec<(u32, u64)>>,
}

#[derive(Default)]
struct Registry {
    connections: HashMap<u32, ChannelPlace>,
    topics: Vec<TopicInfo>,
}

impl Registry {
    fn add(&mut self, h: &Header<'_>, data: &[u8]) -> Option<()> {
        let id = h.connection?;
        if self.connections.contains_key(&id) {
            return Some(());
        }
        let name = String::from_utf8_lossy(h.topic?).into_owned();
        let mut definition = None;
        let mut metadata = BTreeMap::new();
        fields(data, |key, value| match key {
            b"message_definition" => definition = Some(value),
            key => {
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                metadata.insert(text(key), text(value));
            }
        })?;
        let recorded = metadata.get("type").map_or("", String::as_str);
        let mut topic = TopicInfo::new(&name, recorded, Encoding::Ros1);
        topic.schema =
            definition.map(|data| SchemaText { encoding: "ros1msg".to_owned(), data: data.into() });
        topic.latched = metadata.get("latching").is_some_and(|v| v == "1");
        let publisher = PublisherInfo { metadata, latched: topic.latched };
        self.connections.insert(id, add_publisher(&mut self.topics, topic, publisher));
        Some(())
    }

    /// The topic of the connection that a message names.
    fn topic(&self, h: &Header<'_>) -> Option<u32> {
        self.connections.get(&h.connection?).map(|(topic, _)| *topic)
    }
}

pub(super) struct Ros1File {
    source: Source,
    label: String,
    pieces: Vec<Piece>,
    metas: Vec<ChunkMeta>,
    connections: HashMap<u32, ChannelPlace>,
    size_max: usize,
}

pub(super) fn open(source: Source, path: &Path, options: &OpenOptions) -> Result<Opened, OpenBagError> {
    let start = source
        .read_vec(0..MAGIC.len() as u64)
        .map_err(|source| OpenBagError::Io { path: path.to_path_buf(), source })?;
    if start != MAGIC {
        let version =
            String::from_utf8_lossy(start.strip_prefix(b"#ROSBAG V").unwrap_or(&start)).trim().to_owned();
        let what = format!("rosbag version {version:?} is not supported: convert it with `rosbag fix` first");
        return Err(OpenBagError::Unsupported { path: path.to_path_buf(), what });
    }
    let mut scan = Scan::new(&source, path, options);
    let indexed = scan.by_index();
    if let Err(reason) = indexed {
        scan = Scan::new(&source, path, options);
        scan.by_records(&reason);
        if scan.registry.topics.is_empty() {
            return Err(OpenBagError::Damaged { path: path.to_path_buf(), reason });
        }
    }
    let Scan { label, registry, pieces, metas, mut codecs, damage, .. } = scan;
    codecs.sort_unstable();
    codecs.dedup();
    let Registry { connections, topics } = registry;
    let compression = codecs.iter().map(|c| (c.name(), "chunk")).collect();
    let file = Ros1File { source, label, pieces, metas, connections, size_max: options.chunk_bytes_max };
    let (file, format) = (Box::new(file), Format::Rosbag1);
    let (side, profile) = (SideRecords::default(), String::new());
    Ok(Opened { file, format, topics, compression, side, profile, damage })
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

/// A chunk as the index describes it.
struct IndexedChunk {
    at: u64,
    start_ns: i64,
    end_ns: i64,
    /// Connections and numbers of messages.
    counts: Vec<(u32, u32)>,
}

impl<'a> Scan<'a> {
    fn new(source: &'a Source, path: &Path, options: &OpenOptions) -> Self {
        Self {
            source,
            label: file_label(path),
            registry: Registry::default(),
            pieces: Vec::new(),
            metas: Vec::new(),
            codecs: Vec::new(),
            damage: Vec::new(),
            size_max: options.chunk_bytes_max,
        }
    }

    /// Header bytes and the place and length of the data of the record at `at`.
    fn head(&self, window: &mut Window<'_>, at: u64) -> Option<(Vec<u8>, u64, u64)> {
        let header_len = le32(window.get(at, 4))? as usize;
        if header_len > HEADER_MAX {
            return None;
        }
        let bytes = window.get(at + 4, header_len + 4);
        let data_len = u64::from(le32(bytes.get(header_len..)?)?);
        Some((bytes[..header_len].to_vec(), at + 8 + header_len as u64, data_len))
    }

    /// Takes everything from the index. An error: it cannot be trusted, start afresh with
    /// [`by_records`](Self::by_records).
    fn by_index(&mut self) -> Result<(), ReadError> {
        let mut window = Window::new(self.source);
        let first = MAGIC.len() as u64;
        let broken = ReadError::Form("the bag header is broken");
        let Some((bytes, data_at, data_len)) = self.head(&mut window, first) else { return Err(broken) };
        let Some(h) = header(&bytes).filter(|h| h.op == BAG_HEADER) else { return Err(broken) };
        let (Some(index_pos), Some(connections), Some(chunks)) = (h.index_pos, h.connections, h.chunks)
        else {
            return Err(broken);
        };
        if index_pos == 0 {
            return Err(ReadError::Form("the bag has no index: the recorder was stopped"));
        }
        if index_pos > self.source.len() {
            return Err(ReadError::Form("the file is cut: the index is missing"));
        }
        let infos = self.read_index(&mut window, index_pos)?;
        if infos.len() != chunks as usize || self.registry.connections.len() != connections as usize {
            return Err(ReadError::Form("the index is not complete"));
        }
        let mut after = data_at.saturating_add(data_len);
        let mut between = Window::small(self.source);
        for (number, info) in infos.into_iter().enumerate() {
            self.between_chunks(&mut between, after, info.at)?;
            after = self.indexed_chunk(&mut window, number as u64, info, index_pos)?;
        }
        self.between_chunks(&mut between, after, index_pos)
    }

    /// Connections and chunks of the index, which fills the end of the file; chunks in the order of the file.
    fn read_index(
        &mut self,
        window: &mut Window<'_>,
        index_pos: u64,
    ) -> Result<Vec<IndexedChunk>, ReadError> {
        let len = self.source.len();
        let broken = || ReadError::Form("the index is broken");
        let mut at = index_pos;
        let mut infos = Vec::new();
        while at < len {
            let (bytes, data_at, data_len) = self.head(window, at).ok_or_else(broken)?;
            let h = header(&bytes).ok_or_else(broken)?;
            let end = data_at.checked_add(data_len).filter(|e| *e <= len).ok_or_else(broken)?;
            let data = self.source.read_vec(data_at..end)?;
            match h.op {
                CONNECTION => self.registry.add(&h, &data).ok_or_else(broken)?,
                CHUNK_INFO => {
                    let (Some(at), Some(start_ns), Some(end_ns)) = (h.chunk_pos, h.start, h.end) else {
                        return Err(broken());
                    };
                    let counts: Vec<(u32, u32)> =
                        data.chunks_exact(8).filter_map(|c| Some((le32(c)?, le32(&c[4..])?))).collect();
                    infos.push(IndexedChunk { at, start_ns, end_ns, counts });
                }
                _ => return Err(broken()),
            }
            at = end;
        }
        infos.sort_by_key(|i| i.at);
        Ok(infos)
    }

    /// Looks for messages outside chunks, which the index does not know of.
    fn between_chunks(&self, window: &mut Window<'_>, from: u64, to: u64) -> Result<(), ReadError> {
        let mut at = from;
        while at < to {
            let broken = || ReadError::Form("a record between the chunks is broken");
            let (bytes, data_at, data_len) = self.head(window, at).ok_or_else(broken)?;
            let h = header(&bytes).ok_or_else(broken)?;
            match h.op {
                MSG_DATA => return Err(ReadError::Form("there are messages outside the chunks")),
                CHUNK => return Err(ReadError::Form("there are chunks that the index does not name")),
                _ => {}
            }
            at = data_at.checked_add(data_len).ok_or_else(broken)?;
        }
        Ok(())
    }

    /// Takes in a chunk that the index names; gives the first byte after it.
    fn indexed_chunk(
        &mut self,
        window: &mut Window<'_>,
        number: u64,
        info: IndexedChunk,
        index_pos: u64,
    ) -> Result<u64, ReadError> {
        let IndexedChunk { at, start_ns, end_ns, counts } = info;
        let no_chunk = || ReadError::Form("the index points to no chunk");
        let (bytes, data_at, data_len) = self.head(window, at).ok_or_else(no_chunk)?;
        let h = header(&bytes).filter(|h| h.op == CHUNK).ok_or_else(no_chunk)?;
        let end = data_at.checked_add(data_len).filter(|end| *end <= index_pos);
        let end = end.ok_or(ReadError::Form("a chunk reaches into the index"))?;
        let mut by_topic = Vec::new();
        for (connection, count) in counts {
            let place = self.registry.connections.get(&connection);
            let (topic, _) = *place.ok_or(ReadError::Form("the index is not complete"))?;
            by_topic.push((topic, u64::from(count)));
        }
        let len = end - at;
        if by_topic.iter().all(|(_, n)| *n == 0) {
            // The index says that it is empty: it is not taken at its word.
            let mut lost = None;
            self.chunk(at, len, number, false, &mut lost);
            self.settle(&mut lost);
            return Ok(end);
        }
        self.codecs.extend(h.compression.and_then(Codec::from_name));
        for (topic, count) in &by_topic {
            self.registry.topics[*topic as usize].count += count;
        }
        self.pieces.push(Piece { at, len, number, cut: false, bare: false, counts: Some(by_topic) });
        self.metas.push(ChunkMeta { start_ns, end_ns });
        Ok(end)
    }

    /// Goes through all records after the magic.
    fn by_records(&mut self, reason: &ReadError) {
        let len = self.source.len();
        let mut window = Window::new(self.source);
        let mut at = MAGIC.len() as u64;
        let mut number = 0;
        // A chunk that could not be read, waiting for its index records.
        let mut lost: Option<(u64, Damage)> = None;
        let mut bare = BareRun::default();
        self.damage
            .push(Damage::new(&self.label, format!("{reason}; rebuilt from the chunks")).messages(Some(0)));
        while at < len {
            let head = self.head(&mut window, at);
            let parsed = head.as_ref().and_then(|(bytes, data_at, data_len)| {
                Some((header(bytes)?, *data_at, data_at.checked_add(*data_len)?))
            });
            let Some((h, data_at, end)) = parsed else {
                self.settle(&mut lost);
                bare.finish(self);
                let next = self.next_chunk(at + 1).unwrap_or(len);
                self.damage.push(Damage::new(&self.label, "a record is broken").bytes(next - at));
                at = next;
                continue;
            };
            if h.op != INDEX_DATA {
                self.settle(&mut lost);
            }
            if h.op != MSG_DATA {
                bare.finish(self);
            }
            if end > len {
                if let Some(next) = self.next_chunk(at + 1) {
                    let what = Damage::new(&self.label, "the length of a record is broken");
                    self.damage.push(what.bytes(next - at));
                    at = next;
                    continue;
                }
                if h.op == CHUNK {
                    self.chunk(at, len - at, number, true, &mut lost);
                    self.settle(&mut lost);
                } else if h.op == MSG_DATA {
                    let what = Damage::new(&self.label, "the file is cut inside a message");
                    self.damage.push(what.messages(Some(1)).bytes(len - at));
                }
                return;
            }
            match h.op {
                CHUNK => {
                    self.chunk(at, end - at, number, false, &mut lost);
                    number += 1;
                }
                INDEX_DATA => {
                    if let Some((count, _)) = &mut lost {
                        *count += u64::from(h.count.unwrap_or(0));
                    }
                }
                CONNECTION => {
                    let data = self.source.read_vec(data_at..end).unwrap_or_default();
                    if self.registry.add(&h, &data).is_none() {
                        self.damage.push(Damage::new(&self.label, "a connection record is broken"));
                    }
                }
                MSG_DATA => bare.add(self, &h, at, end),
                _ => {}
            }
            at = end;
        }
        bare.finish(self);
        self.settle(&mut lost);
    }

    fn settle(&mut self, lost: &mut Option<(u64, Damage)>) {
        if let Some((count, damage)) = lost.take() {
            self.damage.push(damage.messages((count > 0).then_some(count)));
        }
    }

    /// The next place where a chunk record starts.
    fn next_chunk(&self, from: u64) -> Option<u64> {
        const OP: &[u8] = b"\x04\x00\x00\x00op=\x05";
        /// A chunk header holds op, compression and size: less than 100 bytes.
        const BACK: usize = 128;
        let len = self.source.len();
        let mut block = Vec::new();
        let mut at = from;
        while at < len {
            self.source.read_into(at..at + (1 << 20), &mut block).ok()?;
            let last = at + block.len() as u64 >= len;
            let mut search = 0;
            while let Some(found) = find(&block[search..], OP) {
                let op_at = search + found;
                search = op_at + 1;
                for start in op_at.saturating_sub(BACK)..op_at {
                    let Some(n) = le32(&block[start..]).map(|n| n as usize) else { continue };
                    if n > 2 * BACK || start + 4 + n < op_at + OP.len() {
                        continue;
                    }
                    let Some(h) = block.get(start + 4..start + 4 + n).and_then(header) else { continue };
                    let known = h.compression.and_then(Codec::from_name).is_some_and(|c| c != Codec::Zstd);
                    if h.op == CHUNK && known && h.size.is_some() {
                        return Some(at + start as u64);
                    }
                }
            }
            if last {
                return None;
            }
            at += (block.len() - 4 * BACK) as u64;
        }
        None
    }

    /// Reads a chunk through: its connections, and how many messages of which time it holds.
    fn chunk(&mut self, at: u64, len: u64, number: u64, cut: bool, lost: &mut Option<(u64, Damage)>) {
        let mut data = Vec::new();
        let read = match self.source.read_vec(at..at + len) {
            Ok(record) => read_chunk(&record, cut, self.size_max, &mut data),
            Err(e) => Err(e.into()),
        };
        let codec = match read {
            Ok(codec) => codec,
            Err(reason) => {
                *lost = Some((0, Damage::new(&self.label, reason.to_string()).at(number).bytes(len)));
                return;
            }
        };
        let (mut start, mut end) = (i64::MAX, i64::MIN);
        let mut unknown = 0;
        let mut rest = &data[..];
        while let Some((h, body, n)) = record(rest) {
            match h.op {
                CONNECTION => {
                    let known = self.registry.add(&h, body);
                    let broken = || Damage::new(&self.label, "a connection record is broken").at(number);
                    self.damage.extend(known.is_none().then(broken));
                }
                MSG_DATA => match (self.registry.topic(&h), h.time) {
                    (Some(topic), Some(time)) => {
                        self.registry.topics[topic as usize].count += 1;
                        start = start.min(time);
                        end = end.max(time);
                    }
                    _ => unknown += 1,
                },
                _ => {}
            }
            rest = &rest[n..];
        }
        if start <= end {
            self.codecs.push(codec);
            self.metas.push(ChunkMeta { start_ns: start, end_ns: end });
            self.pieces.push(Piece { at, len, number, cut, bare: false, counts: None });
        }
        if cut {
            let reason = if !self.pieces.is_empty() {
                "the file is cut inside the chunk; what came before the cut is kept"
            } else {
                "the file is cut inside the chunk, before the end of its first message"
            };
            self.damage.push(Damage::new(&self.label, reason).at(number).bytes(len));
        } else if !rest.is_empty() {
            let what = Damage::new(&self.label, "a record of the chunk is broken");
            self.damage.push(what.at(number).bytes(rest.len() as u64));
        }
        if unknown > 0 {
            let what = Damage::new(&self.label, "messages of connections that are not declared");
            self.damage.push(what.at(number).messages(Some(unknown)));
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// Decompresses a chunk record. A cut chunk gives what there is of it.
fn read_chunk(bytes: &[u8], cut: bool, size_max: usize, data: &mut Vec<u8>) -> Result<Codec, ReadError> {
    let none = || ReadError::Form("there is no chunk here");
    let header_len = le32(bytes).ok_or_else(none)? as usize;
    let header_end = header_len.checked_add(4).ok_or_else(none)?;
    let h = bytes.get(4..header_end).and_then(header).filter(|h| h.op == CHUNK).ok_or_else(none)?;
    let stored_len = bytes.get(header_end..).and_then(le32).ok_or_else(none)? as usize;
    let stored = bytes.get(header_end + 4..).unwrap_or(&[]);
    let stored = match stored.get(..stored_len) {
        Some(stored) => stored,
        None if cut => stored,
        None => return Err(ReadError::Form("the chunk is longer than its record")),
    };
    let name = h.compression.unwrap_or(b"");
    let codec = Codec::from_name(name).filter(|c| *c != Codec::Zstd);
    let unknown = || ReadError::UnknownCompression { name: String::from_utf8_lossy(name).into_owned() };
    let codec = codec.ok_or_else(unknown)?;
    let size = h.size.ok_or(ReadError::Form("the chunk has no size"))? as usize;
    if size > size_max {
        return Err(ReadError::TooLarge { claimed: size as u64, allowed: size_max });
    }
    let done = decompress(codec, stored, size, true, data);
    match done.error {
        Some(source) if !cut => Err(ReadError::Decompress { codec: codec.name(), source }),
        _ => Ok(codec),
    }
}

/// Messages outside chunks that follow each other.
#[derive(Default)]
struct BareRun {
    open: Option<(u64, u64, ChunkMeta)>,
}

impl BareRun {
    fn add(&mut self, scan: &mut Scan<'_>, h: &Header<'_>, at: u64, end: u64) {
        const RUN_BYTES: u64 = 1 << 20;
        let (Some(topic), Some(time)) = (scan.registry.topic(h), h.time) else {
            let what =
                Damage::new(&scan.label, "a message outside chunks, of a connection that is not declared");
            scan.damage.push(what.messages(Some(1)));
            return self.finish(scan);
        };
        if self.open.as_ref().is_some_and(|(start, ..)| end - start > RUN_BYTES) {
            self.finish(scan);
        }
        let (_, last, meta) = self.open.get_or_insert((at, at, ChunkMeta { start_ns: time, end_ns: time }));
        *last = end;
        meta.start_ns = meta.start_ns.min(time);
        meta.end_ns = meta.end_ns.max(time);
        scan.registry.topics[topic as usize].count += 1;
    }

    fn finish(&mut self, scan: &mut Scan<'_>) {
        if let Some((at, end, meta)) = self.open.take() {
            let number = scan.pieces.len() as u64;
            let len = end - at;
            scan.pieces.push(Piece { at, len, number, cut: false, bare: true, counts: None });
            scan.metas.push(meta);
        }
    }
}

impl BagFile for Ros1File {
    fn chunks(&self) -> &[ChunkMeta] {
        &self.metas
    }

    fn load(&self, index: usize, chunk: &mut Chunk) {
        let piece = &self.pieces[index];
        let Chunk { data, entries, damage, .. } = chunk;
        let expected = piece.counts.as_ref().map(|counts| counts.iter().map(|(_, n)| n).sum::<u64>());
        let range = piece.at..piece.at + piece.len;
        let read: Result<(), ReadError> = if piece.bare {
            self.source.read_into(range, data).map_err(ReadError::from)
        } else {
            with_scratch(|record| {
                self.source.read_into(range, record)?;
                read_chunk(record, piece.cut, self.size_max, data).map(drop)
            })
        };
        if let Err(reason) = read {
            let lost = Damage::new(&self.label, reason.to_string()).at(piece.number).messages(expected);
            return damage.push(lost.bytes(piece.len));
        }
        let mut rest = &data[..];
        let mut unknown = 0;
        while let Some((h, body, n)) = record(rest) {
            if h.op == MSG_DATA {
                let place = h.connection.and_then(|c| self.connections.get(&c));
                match (place, h.time) {
                    (Some((topic, publisher)), Some(time)) => entries.push(Entry {
                        topic: *topic,
                        publisher: *publisher,
                        sequence: 0,
                        log_ns: time,
                        publish_ns: time,
                        start: data.len() - rest.len() + n - body.len(),
                        len: body.len(),
                    }),
                    _ => unknown += 1,
                }
            }
            rest = &rest[n..];
        }
        if let Some(expected) = expected {
            let got = entries.len() as u64 + unknown;
            if got < expected {
                let what = Damage::new(&self.label, "a record of the chunk is broken").at(piece.number);
                damage.push(what.messages(Some(expected - got)));
            } else if got > expected {
                let what = format!("the index counts {expected} messages, the chunk holds {got}");
                damage.push(Damage::new(&self.label, what).at(piece.number).messages(Some(0)));
            }
            if unknown > 0 {
                let what = Damage::new(&self.label, "messages of connections that are not declared");
                damage.push(what.at(piece.number).messages(Some(unknown)));
            }
        }
    }

    fn may_hold(&self, index: usize, wanted: &dyn Fn(u32) -> bool) -> bool {
        self.pieces[index].counts.as_ref().is_none_or(|counts| counts.iter().any(|(topic, _)| wanted(*topic)))
    }
}
