//! Where the messages of an MCAP file lie: by the summary where it is good, by going through the records where it is
//! not.

use std::collections::HashMap;

use super::codec::Codec;
use super::error::ReadError;
use super::mcap_file::{Piece, Place};
use super::mcap_records::{
    ATTACHMENT, CHANNEL, CHUNK, CHUNK_HEAD_MAX, CHUNK_INDEX, ChunkIndex, DATA_END, FOOTER, Fields, HEADER,
    MAGIC, MESSAGE, MESSAGE_HEAD, MESSAGE_INDEX, METADATA, PRIVATE, RECORD_HEAD, Registry, SCHEMA,
    STATISTICS, Statistics, attachment_head, chunk_head, index_range, message_head, message_index,
    next_record, parse_chunk_index, parse_metadata, parse_statistics, read_chunk, stamp,
};
use super::side::{Attachment, SideRecords};
use super::source::{Source, Window};
use super::{ChunkMeta, Damage};

/// Messages outside chunks are read in runs of about this many bytes.
const RUN_BYTES: u64 = 1 << 20;
/// Longest name and media type of an attachment that are believed.
const ATTACHMENT_HEAD_MAX: u64 = 64 << 10;
/// Attachments up to this size are checked against their CRC when the file is opened.
const ATTACHMENT_CHECKED_BYTES: u64 = 4 << 20;
/// Message indexes of one chunk that are believed.
const INDEX_BYTES_MAX: u64 = 256 << 20;

/// What is found out about a file on opening it.
pub(super) struct Scan<'a> {
    source: &'a Source,
    pub label: String,
    pub registry: Registry,
    pub pieces: Vec<Piece>,
    pub metas: Vec<ChunkMeta>,
    pub codecs: Vec<Codec>,
    pub side: SideRecords,
    pub profile: String,
    pub damage: Vec<Damage>,
    size_max: usize,
}

fn form<T>(what: &'static str) -> Result<T, ReadError> {
    Err(ReadError::Form(what))
}

/// Records of the summary that are of use.
#[derive(Default)]
struct Summary {
    /// Where it starts in the file.
    at: u64,
    statistics: Option<Statistics>,
    indexes: Vec<ChunkIndex>,
}

impl<'a> Scan<'a> {
    pub fn new(source: &'a Source, label: &str, size_max: usize) -> Self {
        Self {
            source,
            label: label.to_owned(),
            registry: Registry::default(),
            pieces: Vec::new(),
            metas: Vec::new(),
            codecs: Vec::new(),
            side: SideRecords::default(),
            profile: String::new(),
            damage: Vec::new(),
            size_max,
        }
    }

    fn told(&self, what: impl Into<String>) -> Damage {
        Damage::new(&self.label, what)
    }

    /// Takes everything from the summary at the end of the file. An error: it cannot be trusted, start afresh with
    /// [`by_records`](Self::by_records).
    pub fn by_summary(&mut self) -> Result<(), ReadError> {
        let summary = self.read_summary()?;
        let Some(statistics) = summary.statistics.or_else(|| self.count_by_indexes(&summary.indexes)) else {
            return form("the summary does not count the messages");
        };
        if statistics.messages > 0 && summary.indexes.is_empty() {
            return form("the summary has no index of chunks");
        }
        if statistics.chunks as usize != summary.indexes.len() {
            return form("the summary misses chunks");
        }
        let mut by_topic = vec![0; self.registry.topics.len()];
        for (channel, count) in &statistics.by_channel {
            let topic = self.registry.topic(*channel);
            let topic = topic.ok_or(ReadError::Form("the summary misses channels"))?;
            by_topic[topic as usize] += *count;
        }
        if by_topic.iter().sum::<u64>() != statistics.messages {
            return form("the counts of the summary disagree");
        }
        self.between_chunks(&summary.indexes, summary.at)?;
        self.place_chunks(summary.indexes, statistics.messages)?;
        for (topic, count) in self.registry.topics.iter_mut().zip(by_topic) {
            topic.count = count;
        }
        self.tell_problems();
        Ok(())
    }

    /// Reads the records between the start of the summary and the footer.
    fn read_summary(&mut self) -> Result<Summary, ReadError> {
        let len = self.source.len();
        let footer_len = RECORD_HEAD + 20;
        let footer_at = len.checked_sub(footer_len + 8);
        let footer_at = footer_at.ok_or(ReadError::Form("the file ends after the magic"))?;
        let tail = self.source.read_vec(footer_at..len)?;
        if tail.len() as u64 != footer_len + 8 || tail[footer_len as usize..] != MAGIC {
            return form("the magic at the end is missing");
        }
        let mut f = Fields(&tail);
        let head = (f.bytes(1), f.u64());
        if head != (Some(&[FOOTER]), Some(20)) {
            return form("the footer is missing");
        }
        let (Some(start), Some(_), Some(crc)) = (f.u64(), f.u64(), f.u32()) else {
            return form("the footer is short");
        };
        if start == 0 {
            return form("there is no summary");
        }
        if start < 8 || start > footer_at || footer_at - start > self.size_max as u64 {
            return form("the footer points nowhere");
        }
        let bytes = self.source.read_vec(start..footer_at + footer_len - 4)?;
        if crc != 0 && crc32fast::hash(&bytes) != crc {
            return form("the CRC of the summary is wrong");
        }
        let records = &bytes[..bytes.len().saturating_sub(footer_len as usize - 4)];
        let mut summary = Summary { at: start, ..Summary::default() };
        let mut channels = Vec::new();
        let mut f = Fields(records);
        while !f.0.is_empty() {
            let (op, body) = next_record(&mut f).ok_or(ReadError::Form("a record of the summary is cut"))?;
            let read = match op {
                SCHEMA => self.registry.schema(body),
                CHANNEL => {
                    channels.push(body);
                    Some(())
                }
                STATISTICS => parse_statistics(body).map(|s| summary.statistics = Some(s)),
                CHUNK_INDEX => parse_chunk_index(body).map(|i| summary.indexes.push(i)),
                _ => Some(()),
            };
            read.ok_or(ReadError::Form("a record of the summary is short"))?;
        }
        // The groups of the summary may come in any order.
        for body in channels {
            self.registry.channel(body).ok_or(ReadError::Form("a record of the summary is short"))?;
        }
        summary.indexes.sort_by_key(|i| i.at);
        Ok(summary)
    }

    /// Goes through what lies before, between and after the chunks of the index: attachments, metadata, and, where
    /// the index is not complete, messages, which is an error.
    fn between_chunks(&mut self, indexes: &[ChunkIndex], end: u64) -> Result<(), ReadError> {
        let mut at = MAGIC.len() as u64;
        let mut window = Window::small(self.source);
        for index in indexes {
            if index.at < at || index.end_at().is_none_or(|after| after > end) {
                return form("an index of the summary points nowhere");
            }
            self.side_records(&mut window, at, index.at)?;
            at = index.end_at().unwrap_or(end);
        }
        self.side_records(&mut window, at, end)
    }

    fn side_records(&mut self, window: &mut Window<'_>, from: u64, to: u64) -> Result<(), ReadError> {
        let mut at = from;
        while at < to {
            let head = window.get(at, RECORD_HEAD as usize);
            let op = head.first().copied().unwrap_or(0);
            let size = Fields(head.get(1..).unwrap_or(&[])).u64();
            let next = size.and_then(|n| n.checked_add(at + RECORD_HEAD)).filter(|next| *next <= to);
            let next = next.ok_or(ReadError::Form("a record between the chunks is broken"))?;
            match op {
                MESSAGE => return form("there are messages outside the chunks"),
                CHUNK => return form("there are chunks that the index does not name"),
                SCHEMA | CHANNEL | MESSAGE_INDEX | DATA_END => {}
                op => self.side_record(op, at, next),
            }
            at = next;
        }
        Ok(())
    }

    /// Keeps a record that holds no messages.
    fn side_record(&mut self, op: u8, at: u64, next: u64) {
        let body = at + RECORD_HEAD;
        let short = next - body <= self.size_max as u64;
        match op {
            ATTACHMENT => {
                if let Err(what) = self.attachment(body, next) {
                    self.damage.push(self.told(what).messages(Some(0)));
                }
            }
            HEADER if short => {
                let body = self.source.read_vec(body..next).unwrap_or_default();
                if self.profile.is_empty() {
                    self.profile = Fields(&body).text().unwrap_or_default();
                }
            }
            METADATA if short => {
                let body = self.source.read_vec(body..next).unwrap_or_default();
                match parse_metadata(&body) {
                    Some(record) => self.side.metadata.push(record),
                    None => self.damage.push(self.told("a metadata record is broken").messages(Some(0))),
                }
            }
            PRIVATE.. if short => {
                let body = self.source.read_vec(body..next).unwrap_or_default();
                if !self.side.keep_private(op, &body) {
                    self.tell_once("there are more private records than are kept", 0);
                }
            }
            _ => {}
        }
    }

    fn attachment(&mut self, body: u64, next: u64) -> Result<(), &'static str> {
        let broken = "an attachment record is broken";
        let head = self.source.read_vec(body..next.min(body + ATTACHMENT_HEAD_MAX)).map_err(|_| broken)?;
        let head = attachment_head(&head).ok_or(broken)?;
        let content = body + head.head_len;
        if content.checked_add(head.size).and_then(|end| end.checked_add(4)) != Some(next) {
            return Err(broken);
        }
        let names = (head.name, head.media_type);
        let attachment = Attachment::in_file(names, (head.log_time, head.create_time), content, head.size);
        self.side.attachments.push(attachment);
        if next - body <= ATTACHMENT_CHECKED_BYTES {
            let record = self.source.read_vec(body..next).map_err(|_| broken)?;
            let (fields, crc) = record.split_at(record.len().saturating_sub(4));
            let want = Fields(crc).u32().unwrap_or(0);
            if want != 0 && crc32fast::hash(fields) != want {
                return Err("the CRC of an attachment is wrong; it is kept as it is");
            }
        }
        Ok(())
    }

    /// Lists the chunks of the index that hold messages.
    fn place_chunks(&mut self, indexes: Vec<ChunkIndex>, messages: u64) -> Result<(), ReadError> {
        let told: u64 = indexes.iter().filter_map(ChunkIndex::messages).sum();
        let all_told = indexes.iter().all(|i| i.messages().is_some() || i.channels.is_empty());
        if told > messages || (told < messages && indexes.iter().all(|i| i.messages().is_some())) {
            return form("the index and the statistics disagree");
        }
        let ranges = if self.ranges_hold(&indexes) { None } else { Some(self.true_ranges(&indexes)?) };
        for (number, index) in indexes.iter().enumerate() {
            let expected = index.messages();
            // A chunk without messages has no time of its own.
            if expected == Some(0) || (expected.is_none() && all_told && told == messages) {
                continue;
            }
            let (start, end) = ranges.as_ref().map_or((index.start, index.end), |ranges| ranges[number]);
            if expected.is_none() && start == 0 {
                return form("the index does not say what its chunks hold");
            }
            let channels = index.channels.iter().filter_map(|c| self.registry.topic(*c));
            let topics = (!index.channels.is_empty()).then(|| channels.collect());
            self.codecs.extend(Codec::from_name(&index.codec));
            self.metas.push(ChunkMeta { start_ns: stamp(start), end_ns: stamp(end) });
            let place = Place::Chunk { at: index.at, len: index.len };
            self.pieces.push(Piece { place, number: number as u64, topics, expected, scanned: false });
        }
        Ok(())
    }

    /// Looks whether the first and the last chunk lie where the index says. Some writers take a log time of 0 for none
    /// and leave it out of the range.
    fn ranges_hold(&self, indexes: &[ChunkIndex]) -> bool {
        if indexes.iter().any(|i| i.start == 0 && i.messages().is_some_and(|n| n > 0)) {
            return false;
        }
        let ends = indexes.iter().take(1).chain(indexes.iter().skip(1).last());
        ends.into_iter().all(|index| {
            let range = read_range(self.source, index).unwrap_or((index.start, index.end));
            index.messages().is_none() || (index.start <= range.0 && range.1 <= index.end)
        })
    }

    /// Smallest and largest log time of each chunk, by its message indexes.
    fn true_ranges(&self, indexes: &[ChunkIndex]) -> Result<Vec<(u64, u64)>, ReadError> {
        let of = |index: &ChunkIndex| match index.messages() {
            Some(0) | None => Ok((index.start, index.end)),
            Some(_) => {
                read_range(self.source, index).ok_or(ReadError::Form("an index of messages is broken"))
            }
        };
        indexes.iter().map(of).collect()
    }

    /// Counts the messages by the message indexes after each chunk.
    fn count_by_indexes(&self, indexes: &[ChunkIndex]) -> Option<Statistics> {
        let mut counts: HashMap<u16, u64> = HashMap::new();
        let mut total = 0;
        for index in indexes {
            each_message_index(self.source, index, |body| {
                let (channel, count) = message_index(body)?;
                *counts.entry(channel).or_default() += count;
                total += count;
                Some(())
            })?;
        }
        (total > 0).then(|| Statistics {
            messages: total,
            chunks: indexes.len() as u32,
            by_channel: counts.into_iter().collect(),
        })
    }

    /// Goes through all records; true when the file ends as it should.
    pub fn by_records(&mut self) -> bool {
        let mut walk = Walk::default();
        let len = self.source.len();
        let mut window = Window::new(self.source);
        let mut at = MAGIC.len() as u64;
        while at < len {
            let head = window.get(at, RECORD_HEAD as usize);
            let op = head.first().copied().unwrap_or(0);
            let size = Fields(head.get(1..).unwrap_or(&[])).u64();
            if walk.closed && len - at <= MAGIC.len() as u64 {
                break;
            }
            let known = (HEADER..=DATA_END).contains(&op) || op >= PRIVATE;
            let next = size.and_then(|n| n.checked_add(at + RECORD_HEAD)).filter(|_| known);
            let Some(next) = next else {
                at = self.resynchronise(at, &mut walk.run, "the record is broken");
                continue;
            };
            if op != MESSAGE_INDEX {
                self.settle(&mut walk.lost);
            }
            if next > len {
                // Cut here, or the length is wrong and good chunks follow.
                if let Some(follows) = self.next_chunk(at + 1) {
                    let what = self.told("the length of a record is broken").bytes(follows - at);
                    self.damage.push(what);
                    walk.run.finish(self, at);
                    at = follows;
                    continue;
                }
                self.cut_record(op, at, &mut walk);
                self.compare(walk.statistics.as_ref());
                self.tell_problems();
                return false;
            }
            self.record(op, at, next, &mut window, &mut walk);
            at = next;
        }
        self.settle(&mut walk.lost);
        walk.run.finish(self, len);
        let tail = self.source.read_vec(len.saturating_sub(8)..len).unwrap_or_default();
        let complete = walk.closed && tail == MAGIC;
        if !complete {
            let what = if walk.closed {
                "the magic at the end is missing"
            } else {
                "the file ends without a footer: the recorder was stopped"
            };
            self.damage.push(self.told(what).messages(Some(0)));
        }
        self.compare(walk.statistics.as_ref());
        self.tell_problems();
        complete
    }

    /// Takes in the record between `at` and `next`.
    fn record(&mut self, op: u8, at: u64, next: u64, window: &mut Window<'_>, walk: &mut Walk) {
        match op {
            CHUNK => {
                walk.run.finish(self, at);
                self.chunk(at, next - at, walk.number, false, &mut walk.lost);
                walk.number += 1;
            }
            MESSAGE => {
                let head = message_head(window.get(at + RECORD_HEAD, MESSAGE_HEAD));
                match head.and_then(|head| Some((self.registry.topic(head.channel)?, head.log))) {
                    Some((topic, log)) => walk.run.add(self, topic, stamp(log), at, next),
                    None => {
                        self.tell_once("messages of channels that are not declared, outside chunks", 1);
                        walk.run.finish(self, at);
                    }
                }
            }
            SCHEMA | CHANNEL if next - at <= self.size_max as u64 => {
                let body = self.source.read_vec(at + RECORD_HEAD..next).unwrap_or_default();
                let read =
                    if op == SCHEMA { self.registry.schema(&body) } else { self.registry.channel(&body) };
                if read.is_none() {
                    self.damage.push(self.told("a schema or channel record is broken"));
                }
            }
            MESSAGE_INDEX => {
                if let Some((count, _)) = &mut walk.lost {
                    let body = self.source.read_vec(at + RECORD_HEAD..next).unwrap_or_default();
                    *count += message_index(&body).map_or(0, |(_, n)| n);
                }
            }
            STATISTICS => {
                let body = self.source.read_vec(at + RECORD_HEAD..next).unwrap_or_default();
                walk.statistics = parse_statistics(&body).or(walk.statistics.take());
            }
            DATA_END => {
                walk.run.finish(self, at);
                walk.closed = true;
            }
            FOOTER => walk.closed = true,
            op => {
                walk.run.finish(self, at);
                self.side_record(op, at, next);
            }
        }
    }

    /// The last record of the file, which is cut.
    fn cut_record(&mut self, op: u8, at: u64, walk: &mut Walk) {
        let rest = self.source.len() - at;
        walk.run.finish(self, at);
        if op == CHUNK {
            self.chunk(at, rest, walk.number, true, &mut walk.lost);
            self.settle(&mut walk.lost);
        } else if walk.closed {
            self.damage.push(self.told("the summary is cut").messages(Some(0)));
        } else {
            let what = if op == MESSAGE { "the file is cut inside a message" } else { "the file is cut" };
            let lost = (op == MESSAGE).then_some(1);
            self.damage.push(self.told(what).messages(lost).bytes(rest));
        }
    }

    /// Holds what was found against the statistics record, if there is one.
    fn compare(&mut self, statistics: Option<&Statistics>) {
        let Some(statistics) = statistics else { return };
        let found: u64 = self.registry.topics.iter().map(|t| t.count).sum();
        let lost: u64 = self.damage.iter().filter_map(|d| d.messages_lost).sum();
        if found + lost != statistics.messages {
            let what = format!("the statistics count {} messages, {found} were found", statistics.messages);
            let missing = statistics.messages.saturating_sub(found + lost);
            self.damage.push(self.told(what).messages(Some(missing)));
        }
    }

    /// Tells declarations that contradict each other.
    fn tell_problems(&mut self) {
        for problem in std::mem::take(&mut self.registry.problems) {
            self.damage.push(self.told(problem).messages(Some(0)));
        }
    }

    /// Adds `lost` messages to the damage of this reason.
    fn tell_once(&mut self, reason: &str, lost: u64) {
        match self.damage.iter_mut().find(|d| d.reason == reason) {
            Some(damage) => damage.messages_lost = damage.messages_lost.map(|n| n + lost),
            None => self.damage.push(self.told(reason).messages(Some(lost))),
        }
    }

    /// Records that a chunk is lost, with the number of its messages if its index states it.
    fn settle(&mut self, lost: &mut Option<(u64, Damage)>) {
        if let Some((count, damage)) = lost.take() {
            let known = (count > 0).then_some(count);
            self.damage.push(damage.messages(known));
        }
    }

    fn resynchronise(&mut self, at: u64, run: &mut Run, what: &str) -> u64 {
        run.finish(self, at);
        let next = self.next_chunk(at + 1).unwrap_or(self.source.len());
        self.damage.push(self.told(what).bytes(next - at));
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
                let inside = (at + start as u64).checked_add(size).is_some_and(|end| end < len);
                if agrees && head.codec.is_some() && head.start <= head.end && inside {
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
        let mut data = Vec::new();
        let read = match self.source.read_vec(at..at + len) {
            Ok(record) => read_chunk(&record, cut, self.size_max, &mut data).map(|()| record),
            Err(e) => Err(e.into()),
        };
        let record = match read {
            Ok(record) => record,
            Err(reason) => {
                let told = self.told(reason.to_string()).at(number).bytes(len);
                *lost = Some((0, told));
                return;
            }
        };
        self.codecs
            .extend(chunk_head(record.get(RECORD_HEAD as usize..).unwrap_or(&[])).and_then(|h| h.codec));
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
                    let head = message_head(body);
                    match head.and_then(|head| Some((self.registry.topic(head.channel)?, head.log))) {
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
            let place = Place::Chunk { at, len };
            self.pieces.push(Piece { place, number, topics: None, expected: None, scanned: true });
        }
        if cut {
            let reason = if !self.pieces.is_empty() {
                "the file is cut inside the chunk; what came before the cut is kept"
            } else {
                "the file is cut inside the chunk, before the end of its first message"
            };
            self.damage.push(self.told(reason).at(number).bytes(len));
        } else if !whole {
            self.damage.push(self.told("a record of the chunk is broken").at(number).bytes(len));
        }
        if unknown > 0 {
            let what = self.told("messages of channels that are not declared");
            self.damage.push(what.at(number).messages(Some(unknown)));
        }
    }
}

/// How far going through the records has come.
#[derive(Default)]
struct Walk {
    /// Chunks so far.
    number: u64,
    run: Run,
    /// The last chunk that could not be read, waiting for its message indexes.
    lost: Option<(u64, Damage)>,
    /// The end of the data was seen.
    closed: bool,
    statistics: Option<Statistics>,
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
            scan.pieces.push(Piece { place, number, topics: None, expected: None, scanned: true });
            scan.metas.push(meta);
        }
    }
}

/// Calls `each` with the body of every message index of a chunk; `None` when they are broken.
fn each_message_index(
    source: &Source,
    index: &ChunkIndex,
    mut each: impl FnMut(&[u8]) -> Option<()>,
) -> Option<()> {
    if index.index_len > INDEX_BYTES_MAX {
        return None;
    }
    let from = index.at.checked_add(index.len)?;
    let bytes = source.read_vec(from..from.checked_add(index.index_len)?).ok()?;
    let mut f = Fields(&bytes);
    while !f.0.is_empty() {
        let (op, body) = next_record(&mut f)?;
        if op != MESSAGE_INDEX {
            return None;
        }
        each(body)?;
    }
    Some(())
}

/// Smallest and largest log time of a chunk, by its message indexes.
fn read_range(source: &Source, index: &ChunkIndex) -> Option<(u64, u64)> {
    let mut range: Option<(u64, u64)> = None;
    each_message_index(source, index, |body| {
        if let Some((low, high)) = index_range(body) {
            range = Some(range.map_or((low, high), |(a, b)| (a.min(low), b.max(high))));
        }
        Some(())
    })?;
    range
}
