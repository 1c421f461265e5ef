//! Reading MCAP files (<https://mcap.dev/spec>).

use std::path::Path;

use super::codec::{Codec, ZSTD_MAGIC, append_zstd};
use super::error::{DecompressError, ReadError};
use super::mcap_records::{
    CHUNK, CHUNK_HEAD_MAX, Fields, MESSAGE, MESSAGE_HEAD, MESSAGE_INDEX, PRIVATE, RECORD_HEAD, check_crc,
    chunk_head, message_head, message_index, next_record, read_chunk, stamp,
};
use super::mcap_scan::Scan;
use super::side::PrivateRecord;
use super::source::{Source, Window, with_scratch};
use super::{
    BagFile, ChannelPlace, Chunk, ChunkMeta, Damage, Encoding, Entry, Format, OpenBagError, OpenOptions,
    Opened, file_label,
};

pub(super) use super::mcap_records::MAGIC;

#[derive(Clone, Copy)]
pub(super) enum Place {
    /// A chunk record: its first byte and its length with the head.
    Chunk { at: u64, len: u64 },
    /// Bare records.
    Run { at: u64, len: u64 },
}

/// A part of the file that holds messages.
pub(super) struct Piece {
    pub place: Place,
    /// Number in the file, counted from 0.
    pub number: u64,
    /// Topics of the file that it may hold; `None`: any.
    pub topics: Option<Vec<u32>>,
    /// Number of messages, where the index states it.
    pub expected: Option<u64>,
    /// It was scanned on opening, so its damage is reported already.
    pub scanned: bool,
}

pub(super) struct McapFile {
    source: Source,
    label: String,
    pieces: Vec<Piece>,
    metas: Vec<ChunkMeta>,
    /// Place of each channel id; `None` for ids that are not declared.
    channels: Vec<Option<ChannelPlace>>,
    /// Whether a message may be a zstd frame, by topic.
    sniff: Vec<bool>,
    size_max: usize,
}

pub(super) fn open(source: Source, path: &Path, options: &OpenOptions) -> Result<Opened, OpenBagError> {
    let label = file_label(path);
    let mut scan = Scan::new(&source, &label, options.chunk_bytes_max);
    if let Err(reason) = scan.by_summary() {
        scan = Scan::new(&source, &label, options.chunk_bytes_max);
        let clean = scan.by_records();
        let bare = scan.registry.topics.is_empty() && scan.side.attachments.is_empty();
        if bare && !(clean && scan.damage.is_empty()) {
            return Err(OpenBagError::Damaged { path: path.to_path_buf(), reason });
        }
    }
    let Scan { label, registry, pieces, metas, mut codecs, side, profile, damage, .. } = scan;
    let sniff: Vec<bool> = registry.topics.iter().map(|t| t.encoding == Encoding::Cdr).collect();
    let width = registry.channels.keys().max().map_or(0, |id| usize::from(*id) + 1);
    let mut channels = vec![None; width];
    for (id, place) in &registry.channels {
        channels[usize::from(*id)] = Some(*place);
    }
    codecs.sort_unstable();
    codecs.dedup();
    let mut compression: Vec<_> = codecs.iter().map(|c| (c.name(), "chunk")).collect();
    let file = McapFile { source, label, pieces, metas, channels, sniff, size_max: options.chunk_bytes_max };
    if file.has_compressed_messages() {
        compression.retain(|(codec, _)| *codec != "none");
        compression.push(("zstd", "message"));
    }
    let (file, format, topics) = (Box::new(file), Format::Mcap, registry.topics);
    Ok(Opened { file, format, topics, compression, side, profile, damage })
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
        if piece.expected.is_some() {
            return piece.expected;
        }
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

    /// The records of a piece, decompressed.
    fn records_of(&self, piece: &Piece, cut: bool, data: &mut Vec<u8>) -> Result<(), ReadError> {
        match piece.place {
            Place::Run { at, len } => Ok(self.source.read_into(at..at + len, data)?),
            // Stored chunks are read straight into the buffer, the others by way of the record.
            Place::Chunk { at, len } => self.stored_chunk(at, len, data).unwrap_or_else(|| {
                with_scratch(|record| {
                    self.source.read_into(at..at + len, record)?;
                    read_chunk(record, cut, self.size_max, data)
                })
            }),
        }
    }

    fn read(&self, index: usize, chunk: &mut Chunk) {
        let piece = &self.pieces[index];
        let Chunk { data, entries, private, damage } = chunk;
        let (Place::Chunk { at, len } | Place::Run { at, len }) = piece.place;
        let in_chunk = matches!(piece.place, Place::Chunk { .. });
        let cut = at + len >= self.source.len();
        let told = |what: String| Damage::new(&self.label, what).at(piece.number);
        if let Err(reason) = self.records_of(piece, cut, data) {
            let lost = told(reason.to_string()).messages(self.count_of(piece));
            return damage.push(lost.bytes(len));
        }
        let mut position = 0;
        let mut unknown = 0;
        let mut broken = false;
        while position < data.len() {
            let mut f = Fields(&data[position..]);
            let Some((op, body)) = next_record(&mut f) else {
                broken = !cut;
                break;
            };
            if op == MESSAGE {
                let head = message_head(body);
                let place = head.and_then(|h| *self.channels.get(usize::from(h.channel))?);
                match (head, place) {
                    (Some(head), Some((topic, publisher))) => entries.push(Entry {
                        topic,
                        publisher,
                        sequence: head.sequence,
                        log_ns: stamp(head.log),
                        publish_ns: stamp(head.publish),
                        start: position + RECORD_HEAD as usize + MESSAGE_HEAD,
                        len: body.len() - MESSAGE_HEAD,
                    }),
                    _ => unknown += 1,
                }
            } else if op >= PRIVATE && in_chunk {
                private.push(PrivateRecord { opcode: op, data: body.into() });
            }
            position += RECORD_HEAD as usize + body.len();
        }
        let got = entries.len() as u64 + unknown;
        match piece.expected {
            Some(expected) if got != expected => {
                let what = if broken { ", and a record of it is broken" } else { "" };
                let what = format!("the index counts {expected} messages, the chunk holds {got}{what}");
                damage.push(told(what).messages(Some(expected.saturating_sub(got))));
            }
            _ if broken && !piece.scanned => damage.push(told("a record of the chunk is broken".to_owned())),
            _ => {}
        }
        if unknown > 0 && in_chunk && !piece.scanned {
            let what = told("messages of channels that are not declared".to_owned());
            damage.push(what.messages(Some(unknown)));
        }
    }

    /// Reads a chunk that is not compressed without a second copy; `None` when it is compressed or odd.
    fn stored_chunk(&self, at: u64, len: u64, data: &mut Vec<u8>) -> Option<Result<(), ReadError>> {
        let head_bytes = self.source.read_vec(at..at + RECORD_HEAD + CHUNK_HEAD_MAX as u64).ok()?;
        let head = chunk_head(head_bytes.get(RECORD_HEAD as usize..)?)?;
        if head_bytes[0] != CHUNK || head.codec != Some(Codec::None) {
            return None;
        }
        let records = at + RECORD_HEAD + head.head_len as u64;
        let end = records.checked_add(head.size)?;
        if head.records_len != head.size || end > at + len || head.size > self.size_max as u64 {
            return None;
        }
        if let Err(e) = self.source.read_into(records..end, data) {
            return Some(Err(e.into()));
        }
        if data.len() as u64 != head.size {
            return None;
        }
        Some(check_crc(data, head.crc))
    }
}

/// Undoes message compression in place: the content goes to the end of the buffer.
fn expand_messages(chunk: &mut Chunk, label: &str, limit: usize, sniff: impl Fn(u32) -> bool) {
    let Chunk { data, entries, damage, .. } = chunk;
    let mut failed = 0;
    let mut why: Option<DecompressError> = None;
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
                why = Some(e);
                false
            }
        }
    });
    if let Some(why) = why {
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
        self.pieces[index].topics.as_ref().is_none_or(|topics| topics.iter().any(|topic| wanted(*topic)))
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.source.read_at(at, buffer)
    }
}
