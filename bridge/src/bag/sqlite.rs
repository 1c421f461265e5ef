//! Reading rosbag2's sqlite3 storage through SQLite itself. Files that SQLite refuses go to
//! [`sqlite_pages`](super::sqlite_pages).

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, MAIN_DB, OpenFlags};

use super::codec::ZSTD_MAGIC;
use super::error::ReadError;
use super::side::{Attachment, SideRecords};
use super::source::Source;
use super::sqlite_rows::{GROUP_BYTES, push_message, topic_info};
use super::{
    BagFile, Chunk, ChunkMeta, Damage, Entry, Format, Held, OpenBagError, OpenOptions, Opened, SchemaText,
    TopicInfo, file_label, schema, sqlite_pages, temporary_dir,
};

/// From this mean size on, blobs are read straight into the buffer: a statement for each costs less than SQLite's own
/// copy of it.
const LARGE_BYTES: usize = 16 << 10;

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(ending);
    PathBuf::from(name)
}

/// True when a write-ahead log or a rollback journal with content lies beside the file: the recorder was
/// killed, and the file alone does not show everything.
pub(super) fn has_log(path: &Path) -> bool {
    ["-wal", "-journal"].iter().any(|e| fs::metadata(beside(path, e)).is_ok_and(|m| m.len() > 0))
}

/// Opens `path`; `shown` is the name for messages where the file is a temporary copy.
pub(super) fn open(
    source: Source,
    path: &Path,
    options: &OpenOptions,
    shown: Option<&Path>,
) -> Result<Opened, OpenBagError> {
    let named = shown.unwrap_or(path);
    let io = |source| OpenBagError::Io { path: named.to_path_buf(), source };
    if has_log(path) {
        // Applying the log writes: it is done on a copy, which also works for read-only directories.
        let dir = temporary_dir(options).map_err(io)?;
        let copy = dir.path().join(path.file_name().unwrap_or_default());
        fs::copy(path, &copy).map_err(io)?;
        for ending in ["-wal", "-journal"] {
            let log = beside(path, ending);
            if log.exists() {
                fs::copy(log, beside(&copy, ending)).map_err(io)?;
            }
        }
        let mut opened = match by_sqlite(&copy, true, named, options) {
            Ok(opened) => opened,
            Err(reason) => {
                let source = Source::open(&copy).map_err(io)?;
                sqlite_pages::open(source, named, options, Some(reason))?
            }
        };
        opened.file = Box::new(Held { file: opened.file, _dir: dir });
        return Ok(opened);
    }
    match by_sqlite(path, false, named, options) {
        Ok(opened) => Ok(opened),
        Err(reason) => sqlite_pages::open(source, named, options, Some(reason)),
    }
}

/// Percent-encodes what has a meaning in the `file:` names of SQLite.
fn uri(path: &Path) -> Option<String> {
    let absolute = std::path::absolute(path).ok()?;
    let text = absolute.to_str()?;
    let mut out = String::from("file:");
    for c in text.chars() {
        match c {
            '%' => out.push_str("%25"),
            '?' => out.push_str("%3f"),
            '#' => out.push_str("%23"),
            c => out.push(c),
        }
    }
    out.push_str("?immutable=1");
    Some(out)
}

fn columns(connection: &Connection, table: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare("SELECT name FROM pragma_table_info(?1)")?;
    let names = statement.query_map([table], |row| row.get(0))?;
    names.collect()
}

struct Group {
    first: i64,
    last: i64,
    rows: u64,
    bytes: usize,
}

struct SqliteFile {
    /// Connections that no thread uses now; each thread takes its own.
    connections: Mutex<Vec<Connection>>,
    path: PathBuf,
    writable: bool,
    label: String,
    groups: Vec<Group>,
    metas: Vec<ChunkMeta>,
    /// From the id of the table to the topic of the file.
    topics: HashMap<i64, u32>,
    size_max: usize,
    file_bytes: usize,
}

fn connect(path: &Path, writable: bool) -> rusqlite::Result<Connection> {
    let connection = match uri(path).filter(|_| !writable) {
        Some(uri) => {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
            Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        }
        None => Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE),
    }?;
    // A hostile schema must not run code; a broken file must not cost memory.
    connection
        .execute_batch("PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON; PRAGMA cache_size=-4096;")?;
    Ok(connection)
}

fn by_sqlite(path: &Path, writable: bool, named: &Path, options: &OpenOptions) -> Result<Opened, ReadError> {
    let connection = connect(path, writable)?;
    let (mut topics, ids) = read_topics(&connection)?;
    let Grouped { groups, metas, orphans, compressed } = group_rows(&connection, &mut topics, &ids)?;
    let label = file_label(named);
    let mut damage = Vec::new();
    if orphans > 0 {
        damage.push(Damage::new(&label, "messages of topics that are not declared").messages(Some(orphans)));
    }
    let side = read_metadata(&connection).unwrap_or_default();
    let compression = if compressed { vec![("zstd", "message")] } else { vec![("none", "")] };
    let file = SqliteFile {
        connections: Mutex::new(vec![connection]),
        path: path.to_path_buf(),
        writable,
        label,
        groups,
        metas,
        topics: ids,
        size_max: options.chunk_bytes_max,
        file_bytes: fs::metadata(path).map_or(0, |m| usize::try_from(m.len()).unwrap_or(usize::MAX)),
    };
    let (file, format, profile) = (Box::new(file), Format::Sqlite3, String::new());
    Ok(Opened { file, format, topics, compression, side, profile, damage })
}

/// The rows of `messages`, in groups that are read together.
#[derive(Default)]
struct Grouped {
    groups: Vec<Group>,
    metas: Vec<ChunkMeta>,
    /// Rows of topics that are not declared.
    orphans: u64,
    /// Messages are zstd frames.
    compressed: bool,
}

fn group_rows(
    connection: &Connection,
    topics: &mut [TopicInfo],
    ids: &HashMap<i64, u32>,
) -> rusqlite::Result<Grouped> {
    let mut found = Grouped::default();
    let mut statement =
        connection.prepare("SELECT rowid, topic_id, timestamp, length(data) FROM messages ORDER BY rowid")?;
    let mut rows = statement.query([])?;
    let mut bytes = i64::MAX / 2;
    while let Some(row) = rows.next()? {
        let integer = |at: usize| match row.get_ref(at) {
            Ok(ValueRef::Integer(n)) => Some(n),
            _ => None,
        };
        let (Some(id), Some(topic), Some(time)) = (integer(0), integer(1), integer(2)) else {
            found.orphans += 1;
            continue;
        };
        let Some(topic) = ids.get(&topic) else {
            found.orphans += 1;
            continue;
        };
        topics[*topic as usize].count += 1;
        let len = integer(3).unwrap_or(0);
        if bytes >= GROUP_BYTES {
            found.groups.push(Group { first: id, last: id, rows: 0, bytes: 0 });
            found.metas.push(ChunkMeta { start_ns: time, end_ns: time });
            bytes = 0;
        }
        if let (Some(group), Some(meta)) = (found.groups.last_mut(), found.metas.last_mut()) {
            group.last = id;
            group.rows += 1;
            group.bytes += usize::try_from(len).unwrap_or(0);
            meta.start_ns = meta.start_ns.min(time);
            meta.end_ns = meta.end_ns.max(time);
        }
        bytes += len + 64;
    }
    let mut first = connection.prepare("SELECT data FROM messages ORDER BY rowid LIMIT 1")?;
    let mut rows = first.query([])?;
    while let Some(row) = rows.next()? {
        found.compressed |=
            row.get_ref(0).is_ok_and(|v| v.as_blob().is_ok_and(|b| b.starts_with(&ZSTD_MAGIC)));
    }
    Ok(found)
}

/// The copy of `metadata.yaml` that newer recorders keep in the file.
fn read_metadata(connection: &Connection) -> rusqlite::Result<SideRecords> {
    let mut side = SideRecords::default();
    if columns(connection, "metadata")?.iter().any(|c| c == "metadata") {
        let mut statement = connection.prepare("SELECT metadata FROM metadata ORDER BY rowid LIMIT 16")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            if let ValueRef::Text(text) = row.get_ref(0)?
                && !text.is_empty()
            {
                side.attachments.push(Attachment::in_memory(
                    "metadata.yaml",
                    "application/yaml",
                    text.to_vec(),
                ));
            }
        }
    }
    Ok(side)
}

fn read_topics(connection: &Connection) -> rusqlite::Result<(Vec<TopicInfo>, HashMap<i64, u32>)> {
    let names = columns(connection, "topics")?;
    let has = |name: &str| names.iter().any(|n| n == name);
    let column = |name: &'static str| if has(name) { name } else { "''" };
    let mut definitions: HashMap<String, SchemaText> = HashMap::new();
    if columns(connection, "message_definitions")?.iter().any(|c| c == "encoded_message_definition") {
        let mut statement = connection
            .prepare("SELECT topic_type, encoding, encoded_message_definition FROM message_definitions")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (name, encoding, text): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            if !text.is_empty() {
                let data = text.into_bytes().into();
                definitions.insert(schema::normalize_type(&name), SchemaText { encoding, data });
            }
        }
    }
    let query = format!(
        "SELECT id, name, type, {}, {}, {} FROM topics ORDER BY id",
        column("serialization_format"),
        column("offered_qos_profiles"),
        column("type_description_hash"),
    );
    let mut statement = connection.prepare(&query)?;
    let mut rows = statement.query([])?;
    let (mut topics, mut ids) = (Vec::<TopicInfo>::new(), HashMap::new());
    while let Some(row) = rows.next()? {
        let text = |at: usize| -> rusqlite::Result<String> {
            Ok(match row.get_ref(at)? {
                ValueRef::Text(t) => String::from_utf8_lossy(t).into_owned(),
                _ => String::new(),
            })
        };
        let id: i64 = row.get(0)?;
        let fields = [text(1)?, text(2)?, text(3)?, text(4)?, text(5)?];
        let topic = topic_info(fields, &definitions);
        ids.insert(id, topics.len() as u32);
        topics.push(topic);
    }
    Ok((topics, ids))
}

/// Rows of a group that could not be read.
#[derive(Default)]
struct Failed {
    rows: u64,
    /// Of the last one.
    why: Option<ReadError>,
}

impl SqliteFile {
    /// Calls `read` with a connection that no other thread uses.
    fn with_connection<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let free = self.connections.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match free {
            Some(connection) => connection,
            None => connect(&self.path, self.writable)?,
        };
        let result = read(&connection);
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        result
    }

    fn rows(&self, first: i64, last: i64, chunk: &mut Chunk, failed: &mut Failed) -> rusqlite::Result<()> {
        self.with_connection(|connection| self.rows_with(connection, (first, last), chunk, failed))
    }

    /// As [`rows`](Self::rows), without SQLite's copy of each blob. Any trouble is an error: the other way then finds
    /// out what can be had.
    fn large_rows(&self, first: i64, last: i64, chunk: &mut Chunk) -> rusqlite::Result<()> {
        self.with_connection(|connection| {
            let mut statement = connection.prepare(
                "SELECT rowid, topic_id, timestamp FROM messages WHERE rowid BETWEEN ?1 AND ?2 ORDER BY rowid",
            )?;
            let mut rows = statement.query([first, last])?;
            let mut blob = None;
            let mut end = 0;
            while let Some(row) = rows.next()? {
                let (ValueRef::Integer(id), ValueRef::Integer(topic), ValueRef::Integer(time)) =
                    (row.get_ref(0)?, row.get_ref(1)?, row.get_ref(2)?)
                else {
                    continue;
                };
                let Some(topic) = self.topics.get(&topic) else { continue };
                let blob = match &mut blob {
                    None => blob.insert(connection.blob_open(MAIN_DB, "messages", "data", id, true)?),
                    Some(blob) => {
                        blob.reopen(id)?;
                        blob
                    }
                };
                let (start, len) = (end, blob.len());
                end += len;
                // Nothing is longer than the file it is in.
                if end > self.file_bytes {
                    return Err(rusqlite::Error::InvalidQuery);
                }
                // The memory of a used buffer is not cleared.
                if chunk.data.len() < end {
                    chunk.data.resize(end, 0);
                }
                let to = &mut chunk.data[start..end];
                blob.read_at_exact(to, 0)?;
                if to.starts_with(&ZSTD_MAGIC) {
                    return Err(rusqlite::Error::InvalidQuery);
                }
                let (topic, publisher, sequence) = (*topic, 0, 0);
                chunk.entries.push(Entry {
                    topic,
                    publisher,
                    sequence,
                    log_ns: time,
                    publish_ns: time,
                    start,
                    len,
                });
            }
            chunk.data.truncate(end);
            Ok(())
        })
    }

    fn rows_with(
        &self,
        connection: &Connection,
        (first, last): (i64, i64),
        chunk: &mut Chunk,
        failed: &mut Failed,
    ) -> rusqlite::Result<()> {
        let mut statement = connection.prepare(
            "SELECT topic_id, timestamp, data FROM messages WHERE rowid BETWEEN ?1 AND ?2 ORDER BY rowid",
        )?;
        let mut rows = statement.query([first, last])?;
        while let Some(row) = rows.next()? {
            let (ValueRef::Integer(topic), ValueRef::Integer(time)) = (row.get_ref(0)?, row.get_ref(1)?)
            else {
                continue;
            };
            let Some(topic) = self.topics.get(&topic) else { continue };
            let blob = match row.get_ref(2)? {
                ValueRef::Blob(b) | ValueRef::Text(b) => b,
                _ => &[],
            };
            if let Err(e) = push_message(chunk, (*topic, time), blob, self.size_max) {
                failed.rows += 1;
                failed.why = Some(ReadError::Decompress { codec: "zstd", source: e });
            }
        }
        Ok(())
    }
}

impl BagFile for SqliteFile {
    fn chunks(&self) -> &[ChunkMeta] {
        &self.metas
    }

    fn load(&self, index: usize, chunk: &mut Chunk) {
        let group = &self.groups[index];
        if group.bytes >= LARGE_BYTES * usize::try_from(group.rows).unwrap_or(usize::MAX) {
            if self.large_rows(group.first, group.last, chunk).is_ok() {
                return;
            }
            chunk.entries.clear();
        }
        chunk.data.clear();
        chunk.data.reserve(group.bytes.min(2 * GROUP_BYTES as usize));
        let mut failed = Failed::default();
        if let Err(e) = self.rows(group.first, group.last, chunk, &mut failed) {
            // One bad row must not hide the others of the group.
            chunk.data.clear();
            chunk.entries.clear();
            failed.why = Some(e.into());
            let span = group.last.abs_diff(group.first);
            if span < 4 * group.rows + 1024 {
                for id in group.first..=group.last {
                    let _ = self.rows(id, id, chunk, &mut failed);
                }
            }
            failed.rows = group.rows.saturating_sub(chunk.entries.len() as u64);
        }
        if failed.rows > 0 {
            let why = failed.why.map_or_else(String::new, |why| format!(": {why}"));
            let what = format!("rows {} to {}{why}", group.first, group.last);
            chunk.damage.push(Damage::new(&self.label, what).messages(Some(failed.rows)));
        }
    }
}
