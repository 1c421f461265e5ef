//! Rows of a sqlite3 bag, whichever way they were found.

use std::collections::HashMap;

use super::codec::{ZSTD_MAGIC, append_zstd};
use super::error::DecompressError;
use super::qos::offers_transient_local;
use super::{Chunk, Encoding, Entry, PublisherInfo, SchemaText, TopicInfo};

/// Rows are read in groups of about this many bytes.
pub(super) const GROUP_BYTES: i64 = 1 << 20;

/// Name, type, serialisation, quality of service and hash of a row of `topics`.
pub(super) fn topic_info(fields: [String; 5], definitions: &HashMap<String, SchemaText>) -> TopicInfo {
    let [name, type_name, format, offered_qos, hash] = fields;
    let encoding = if format.is_empty() { Encoding::Cdr } else { Encoding::from_name(&format) };
    let mut topic = TopicInfo::new(&name, &type_name, encoding);
    topic.schema = definitions.get(&topic.type_name).cloned();
    topic.type_hash = Some(hash).filter(|h| h.starts_with("RIHS"));
    topic.latched = offers_transient_local(&offered_qos);
    topic.publishers = vec![PublisherInfo { latched: topic.latched, ..PublisherInfo::default() }];
    topic.offered_qos = offered_qos;
    topic
}

/// Appends the blob of a message, decompressed if it is a zstd frame, and its entry.
pub(super) fn push_message(
    chunk: &mut Chunk,
    (topic, time): (u32, i64),
    blob: &[u8],
    limit: usize,
) -> Result<(), DecompressError> {
    let start = chunk.data.len();
    let len = if blob.starts_with(&ZSTD_MAGIC) {
        append_zstd(blob, limit, &mut chunk.data)?
    } else {
        chunk.data.extend_from_slice(blob);
        blob.len()
    };
    chunk.entries.push(Entry {
        topic,
        publisher: 0,
        sequence: 0,
        log_ns: time,
        publish_ns: time,
        start,
        len,
    });
    Ok(())
}
