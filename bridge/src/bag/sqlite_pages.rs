//! Reading the rows of a sqlite3 bag straight from its pages, for files that SQLite itself refuses: cut
//! short, or with damaged inner pages. Layout: <https://www.sqlite.org/fileformat2.html>.
//!
//! Rows of `messages` are found on every leaf page of the file, whatever the state of the tree above it.

use std::collections::HashMap;
use std::path::Path;

use super::codec::ZSTD_MAGIC;
use super::error::ReadError;
use super::side::SideRecords;
use super::source::Source;
use super::sqlite_rows::{GROUP_BYTES, push_message, topic_info};
use super::{
    BagFile, Chunk, ChunkMeta, Damage, Format, OpenBagError, OpenOptions, Opened, SchemaText, TopicInfo,
    file_label,
};

pub(super) const MAGIC: &[u8] = b"SQLite format 3\0";

const LEAF_TABLE: u8 = 0x0d;
const INNER_TABLE: u8 = 0x05;
/// Bytes of the file header on the first page.
const FILE_HEADER: usize = 100;

/// A value of a record.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Null,
    Integer(i64),
    Real,
    Text(String),
    /// Place and length in the payload.
    Blob(usize, usize),
}

/// Where a row lies.
#[derive(Clone, Copy)]
struct Cell {
    page: u32,
    /// Of the cell on its page.
    offset: u16,
}

struct Pages {
    source: Source,
    page_bytes: usize,
    usable: usize,
    count: u32,
    size_max: usize,
}

fn be16(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A number of 1 to 9 bytes; gives it and its length.
fn varint(bytes: &[u8]) -> Option<(i64, usize)> {
    let mut value: u64 = 0;
    for (at, byte) in bytes.iter().take(9).enumerate() {
        if at == 8 {
            return Some((((value << 8) | u64::from(*byte)) as i64, 9));
        }
        value = (value << 7) | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((value as i64, at + 1));
        }
    }
    None
}

fn serial_len(kind: i64) -> Option<usize> {
    Some(match kind {
        0 | 8 | 9 => 0,
        1..=4 => kind as usize,
        5 => 6,
        6 | 7 => 8,
        n if n >= 12 => usize::try_from((n - 12) / 2).ok()?,
        _ => return None,
    })
}

/// The serial types of a record and the place where its values start.
fn record_header(payload: &[u8]) -> Option<(Vec<i64>, usize)> {
    let (header_len, mut at) = varint(payload)?;
    let header_len = usize::try_from(header_len).ok().filter(|n| *n <= 4096)?;
    let mut kinds = Vec::new();
    while at < header_len {
        let (kind, n) = varint(payload.get(at..header_len)?)?;
        serial_len(kind)?;
        kinds.push(kind);
        at += n;
    }
    Some((kinds, header_len))
}

fn record(payload: &[u8]) -> Option<Vec<Value>> {
    let (kinds, mut at) = record_header(payload)?;
    let mut values = Vec::with_capacity(kinds.len());
    for kind in kinds {
        let len = serial_len(kind)?;
        let bytes = payload.get(at..at.checked_add(len)?)?;
        values.push(match kind {
            0 => Value::Null,
            1..=6 => {
                let negative = bytes.first().is_some_and(|b| b & 0x80 != 0);
                Value::Integer(
                    bytes.iter().fold(if negative { -1 } else { 0 }, |n, b| (n << 8) | i64::from(*b)),
                )
            }
            7 => Value::Real,
            8 => Value::Integer(0),
            9 => Value::Integer(1),
            n if n % 2 == 0 => Value::Blob(at, len),
            _ => Value::Text(String::from_utf8_lossy(bytes).into_owned()),
        });
        at += len;
    }
    Some(values)
}

impl Pages {
    fn page(&self, number: u32) -> Option<Vec<u8>> {
        if number == 0 || number > self.count {
            return None;
        }
        let at = u64::from(number - 1) * self.page_bytes as u64;
        let bytes = self.source.read_vec(at..at + self.page_bytes as u64).ok()?;
        (bytes.len() == self.page_bytes).then_some(bytes)
    }

    /// Kind of a tree page and the offsets of its cells.
    fn cells(&self, number: u32, page: &[u8]) -> Option<(u8, Vec<u16>)> {
        let start = if number == 1 { FILE_HEADER } else { 0 };
        let kind = *page.get(start)?;
        let head = match kind {
            LEAF_TABLE => 8,
            INNER_TABLE => 12,
            _ => return None,
        };
        let count = be16(page, start + 3)?;
        if start + head + 2 * count > self.usable {
            return None;
        }
        let offsets = (0..count).filter_map(|i| be16(page, start + head + 2 * i));
        let offsets: Vec<u16> = offsets
            .filter(|o| *o >= start + head + 2 * count && *o < self.usable)
            .map(|o| o as u16)
            .collect();
        Some((kind, offsets))
    }

    /// Row id, length of the payload and its part on the page; then the page of the overflow, if any.
    fn local<'a>(&self, page: &'a [u8], offset: u16) -> Option<(i64, usize, &'a [u8], Option<u32>)> {
        let bytes = page.get(usize::from(offset)..self.usable)?;
        let (len, n) = varint(bytes)?;
        let (row, m) = varint(&bytes[n..])?;
        let len = usize::try_from(len).ok().filter(|l| *l <= self.size_max)?;
        // Nothing is longer than the file it is in.
        let len = Some(len).filter(|l| *l as u64 <= self.source.len())?;
        let rest = &bytes[n + m..];
        let largest = self.usable - 35;
        if len <= largest {
            return Some((row, len, rest.get(..len)?, None));
        }
        let smallest = (self.usable - 12) * 32 / 255 - 23;
        let wanted = smallest + (len - smallest) % (self.usable - 4);
        let here = if wanted <= largest { wanted } else { smallest };
        Some((row, len, rest.get(..here)?, Some(be32(rest, here)?)))
    }

    /// The whole payload of a cell.
    fn payload(&self, page: &[u8], offset: u16, out: &mut Vec<u8>) -> Option<i64> {
        let (row, len, local, mut next) = self.local(page, offset)?;
        out.clear();
        out.extend_from_slice(local);
        while let Some(number) = next {
            let page = self.page(number)?;
            let n = (len - out.len()).min(self.usable - 4);
            if n == 0 {
                return None;
            }
            out.extend_from_slice(page.get(4..4 + n)?);
            next = (out.len() < len).then_some(be32(&page, 0)?);
        }
        Some(row)
    }

    /// True when the chain of overflow pages of a cell lies inside the file. Recorders write a chain in
    /// ascending order, so the pages are not read: a chain that is broken shows when the row is loaded.
    fn complete(&self, len: usize, local: usize, next: Option<u32>) -> bool {
        let Some(first) = next else { return true };
        let pages = (len - local).div_ceil(self.usable - 4) as u64;
        u64::from(first) + pages - 1 <= u64::from(self.count)
    }

    /// All rows of a small table, by its root page.
    fn table(&self, root: u32) -> Vec<(i64, Vec<u8>, Vec<Value>)> {
        let mut rows = Vec::new();
        let mut queue = vec![root];
        let mut visited = 0;
        while let Some(number) = queue.pop() {
            visited += 1;
            if visited > 4096 {
                break;
            }
            let Some(page) = self.page(number) else { continue };
            let Some((kind, offsets)) = self.cells(number, &page) else { continue };
            if kind == INNER_TABLE {
                let start = if number == 1 { FILE_HEADER } else { 0 };
                queue.extend(be32(&page, start + 8));
                queue.extend(offsets.iter().rev().filter_map(|o| be32(&page, usize::from(*o))));
                continue;
            }
            for offset in offsets {
                let mut payload = Vec::new();
                let Some(row) = self.payload(&page, offset, &mut payload) else { continue };
                if let Some(values) = record(&payload) {
                    rows.push((row, payload, values));
                }
            }
        }
        rows
    }
}

/// Names of the columns of a `CREATE TABLE`.
fn column_names(sql: &str) -> Vec<String> {
    let inner = sql.split_once('(').map_or("", |(_, rest)| rest);
    let mut names = Vec::new();
    let (mut depth, mut word, mut done) = (0, String::new(), false);
    for c in inner.chars() {
        match c {
            '(' => depth += 1,
            ')' if depth == 0 => break,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                names.push(std::mem::take(&mut word));
                done = false;
            }
            c if depth == 0 && !done => {
                if c.is_alphanumeric() || c == '_' {
                    word.push(c);
                } else if !word.is_empty() {
                    done = true;
                }
            }
            _ => {}
        }
    }
    names.push(word);
    names.retain(|n| !n.is_empty());
    names
}

struct Group {
    cells: Vec<Cell>,
}

struct PagesFile {
    pages: Pages,
    label: String,
    groups: Vec<Group>,
    metas: Vec<ChunkMeta>,
    topics: HashMap<i64, u32>,
}

/// Topics and definitions by the schema on the first page.
fn read_topics(pages: &Pages) -> (Vec<TopicInfo>, HashMap<i64, u32>) {
    let mut tables: HashMap<String, (u32, Vec<String>)> = HashMap::new();
    for (_, _, values) in pages.table(1) {
        if let [Value::Text(kind), Value::Text(name), _, Value::Integer(root), Value::Text(sql)] = &values[..]
            && kind == "table"
            && let Ok(root) = u32::try_from(*root)
        {
            tables.insert(name.clone(), (root, column_names(sql)));
        }
    }
    let rows = |table: &str| {
        let (root, names) = tables.get(table).cloned().unwrap_or_default();
        let rows = if root == 0 { Vec::new() } else { pages.table(root) };
        (names, rows)
    };
    let field = |names: &[String], values: &[Value], name: &str| {
        let at = names.iter().position(|n| n == name);
        match at.and_then(|at| values.get(at)) {
            Some(Value::Text(text)) => text.clone(),
            _ => String::new(),
        }
    };
    let mut definitions = HashMap::new();
    let (names, found) = rows("message_definitions");
    for (_, _, values) in found {
        let text = field(&names, &values, "encoded_message_definition");
        if !text.is_empty() {
            let name = super::schema::normalize_type(&field(&names, &values, "topic_type"));
            let encoding = field(&names, &values, "encoding");
            definitions.insert(name, SchemaText { encoding, data: text.into_bytes().into() });
        }
    }
    let (mut topics, mut ids) = (Vec::new(), HashMap::new());
    let (names, found) = rows("topics");
    for (row, _, values) in found {
        let text = |name: &str| field(&names, &values, name);
        let id = match values.first() {
            Some(Value::Integer(id)) => *id,
            _ => row,
        };
        let fields = [
            text("name"),
            text("type"),
            text("serialization_format"),
            text("offered_qos_profiles"),
            text("type_description_hash"),
        ];
        ids.insert(id, topics.len() as u32);
        topics.push(topic_info(fields, &definitions));
    }
    (topics, ids)
}

/// True for the record of a row of `messages`: id, topic, time, data.
fn message_shape(kinds: &[i64]) -> bool {
    matches!(kinds, [0 | 1..=6 | 8 | 9, 1..=6 | 8 | 9, 4..=6, data] if *data >= 12 && data % 2 == 0)
}

/// Opens a file by its pages; `reason` is why SQLite refused it.
pub(super) fn open(
    source: Source,
    path: &Path,
    options: &OpenOptions,
    reason: Option<ReadError>,
) -> Result<Opened, OpenBagError> {
    let damaged = |reason| OpenBagError::Damaged { path: path.to_path_buf(), reason };
    let why = reason.unwrap_or(ReadError::Form("read by pages"));
    let head = source.read_vec(0..FILE_HEADER as u64).unwrap_or_default();
    if head.len() < FILE_HEADER || !head.starts_with(MAGIC) {
        return Err(damaged(why));
    }
    let broken = || damaged(ReadError::Form("the page size of the sqlite file is broken"));
    let page_bytes = match be16(&head, 16) {
        Some(1) => 65_536,
        Some(n) if n >= 512 && n.is_power_of_two() => n,
        _ => return Err(broken()),
    };
    let usable = page_bytes - usize::from(head[20]);
    if usable < 480 {
        return Err(broken());
    }
    let claimed = be32(&head, 28).unwrap_or(0);
    let count = u32::try_from(source.len() / page_bytes as u64).unwrap_or(u32::MAX);
    let pages = Pages { source, page_bytes, usable, count, size_max: options.chunk_bytes_max };
    let (mut topics, ids) = read_topics(&pages);
    let label = file_label(path);
    let Found { groups, metas, cut, orphans, compressed } = find_rows(&pages, &mut topics, &ids);
    if groups.is_empty() && topics.is_empty() {
        return Err(damaged(why));
    }
    let mut damage = vec![Damage::new(&label, format!("{why}; read page by page")).messages(Some(0))];
    if cut > 0 {
        damage.push(Damage::new(&label, "the pages of these messages are missing").messages(Some(cut)));
    }
    if orphans > 0 {
        damage.push(Damage::new(&label, "messages of topics that are not declared").messages(Some(orphans)));
    }
    let missing = u64::from(claimed).saturating_sub(u64::from(count)) * page_bytes as u64;
    if missing > 0 {
        let what = "the file is cut: pages at the end are missing, with messages that cannot be counted";
        damage.push(Damage::new(&label, what).bytes(missing));
    }
    let compression = if compressed { vec![("zstd", "message")] } else { vec![("none", "")] };
    let file = Box::new(PagesFile { pages, label, groups, metas, topics: ids });
    let (side, profile) = (SideRecords::default(), String::new());
    Ok(Opened { file, format: Format::Sqlite3, topics, compression, side, profile, damage })
}

/// Rows of `messages` that lie on the pages.
#[derive(Default)]
struct Found {
    groups: Vec<Group>,
    metas: Vec<ChunkMeta>,
    /// Rows whose overflow pages are missing.
    cut: u64,
    /// Rows of topics that are not declared.
    orphans: u64,
    /// Messages are zstd frames.
    compressed: bool,
}

fn find_rows(pages: &Pages, topics: &mut [TopicInfo], ids: &HashMap<i64, u32>) -> Found {
    let mut found = Found::default();
    let mut bytes = i64::MAX / 2;
    for number in 1..=pages.count {
        let Some(page) = pages.page(number) else { continue };
        let Some((LEAF_TABLE, offsets)) = pages.cells(number, &page) else { continue };
        for offset in offsets {
            let Some((_, len, local, next)) = pages.local(&page, offset) else { continue };
            let Some((kinds, at)) = record_header(local) else { continue };
            if !message_shape(&kinds) {
                continue;
            }
            // Topic and time are always on the page itself: they come before the data.
            let Some((topic, time, data)) = head_of(&kinds, at, local) else { continue };
            if at + kinds.iter().filter_map(|k| serial_len(*k)).sum::<usize>() != len {
                continue;
            }
            let Some(topic) = ids.get(&topic) else {
                found.orphans += 1;
                continue;
            };
            if !pages.complete(len, local.len(), next) {
                found.cut += 1;
                continue;
            }
            topics[*topic as usize].count += 1;
            found.compressed |= data.starts_with(&ZSTD_MAGIC);
            if bytes >= GROUP_BYTES {
                found.groups.push(Group { cells: Vec::new() });
                found.metas.push(ChunkMeta { start_ns: time, end_ns: time });
                bytes = 0;
            }
            if let (Some(group), Some(meta)) = (found.groups.last_mut(), found.metas.last_mut()) {
                group.cells.push(Cell { page: number, offset });
                meta.start_ns = meta.start_ns.min(time);
                meta.end_ns = meta.end_ns.max(time);
            }
            bytes += len as i64;
        }
    }
    found
}

/// Topic, time and the start of the data of a `messages` row.
fn head_of<'a>(kinds: &[i64], mut at: usize, payload: &'a [u8]) -> Option<(i64, i64, &'a [u8])> {
    let mut integers = [0; 3];
    for (kind, slot) in kinds.iter().zip(&mut integers) {
        let len = serial_len(*kind)?;
        let bytes = payload.get(at..at + len)?;
        let negative = bytes.first().is_some_and(|b| b & 0x80 != 0);
        *slot = match kind {
            9 => 1,
            _ => bytes.iter().fold(if negative { -1 } else { 0 }, |n, b| (n << 8) | i64::from(*b)),
        };
        at += len;
    }
    Some((integers[1], integers[2], payload.get(at..)?))
}

impl BagFile for PagesFile {
    fn chunks(&self) -> &[ChunkMeta] {
        &self.metas
    }

    fn load(&self, index: usize, chunk: &mut Chunk) {
        chunk.data.clear();
        let mut payload = Vec::new();
        let (mut lost, mut page_number, mut page) = (0, 0, Vec::new());
        for cell in &self.groups[index].cells {
            if cell.page != page_number {
                page = self.pages.page(cell.page).unwrap_or_default();
                page_number = cell.page;
            }
            let pushed = (|| {
                self.pages.payload(&page, cell.offset, &mut payload)?;
                let values = record(&payload)?;
                let [_, Value::Integer(topic), Value::Integer(time), Value::Blob(at, len)] = values[..]
                else {
                    return None;
                };
                let topic = *self.topics.get(&topic)?;
                push_message(chunk, (topic, time), &payload[at..at + len], self.pages.size_max).ok()
            })();
            if pushed.is_none() {
                lost += 1;
            }
        }
        if lost > 0 {
            let what = Damage::new(&self.label, "the overflow pages of these messages are broken");
            chunk.damage.push(what.messages(Some(lost)));
        }
    }
}
