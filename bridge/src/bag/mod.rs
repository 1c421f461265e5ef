//! Recorded bags: rosbag v2.0, rosbag2 (sqlite3, MCAP, directories with `metadata.yaml`) and plain MCAP.
//!
//! [`open`] takes a file or a directory and gives a [`Bag`]; [`Bag::messages`] streams its messages in
//! order across files. Chunks are decompressed ahead on a few threads; memory scales with the chunks that
//! overlap in time, not with the file. What is damaged is skipped, and said in numbers ([`Damage`]).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use mindseye_bridge::bag::{self, CdrConverter, OpenOptions, ReadOptions};
//! let bag = bag::open("recording", &OpenOptions::default())?;
//! let mut converter = CdrConverter::new(bag.info());
//! let mut messages = bag.messages(&ReadOptions::default());
//! for message in &mut messages {
//!     let topic = bag.info().topic(message.topic);
//!     let cdr = converter.convert(&message)?;
//!     println!("{} {} {} bytes", message.log_time_ns, topic.name, cdr.len());
//! }
//! for damage in messages.damage() {
//!     eprintln!("{damage}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Reading never changes the files: a sqlite file with a write-ahead log or a hot journal is copied to a
//! temporary directory first, a `.zstd` file is decompressed into one.

mod cdr;
mod codec;
mod convert;
mod definitions;
mod directory;
mod error;
mod ffi;
mod latch;
mod layout;
mod mcap_file;
mod mcap_records;
mod mcap_scan;
pub mod play;
mod qos;
mod read;
pub mod report;
mod ros1;
pub mod schema;
mod side;
mod source;
mod sqlite;
mod sqlite_pages;
mod sqlite_rows;
mod verify;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cdr::{CdrConverter, ConvertError, FieldProblem, TranscodeError};
pub use convert::{ConvertReport, RewriteError, rewrite_as_mcap};
#[doc(hidden)]
pub use directory::parses_as_metadata;
pub use error::{DecompressError, ReadError};
pub use latch::PublisherSlots;
pub use layout::{HashBasis, TypeKey, TypeKeyError, type_key};
pub use qos::QosProfile;
pub use read::{Messages, Order, RawMessage, ReadOptions};
pub use side::{Attachment, MetadataRecord, PrivateRecord};
pub use source::Payload;
pub use verify::{ImageReport, TopicReport, VerifyReport, verify};
pub use writer::{ChannelId, ForeignSchema, McapWriter, WriteBagError, offered_qos};

use source::Source;

/// How a bag is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Largest chunk or message that is decompressed, in bytes. Larger claims are damage.
    pub chunk_bytes_max: usize,
    /// Where temporary copies go (write-ahead logs, whole-file compression); `None`: the system's place.
    pub temporary: Option<PathBuf>,
}

impl Default for OpenOptions {
    /// Chunks of at most 1 GiB.
    fn default() -> Self {
        Self { chunk_bytes_max: 1 << 30, temporary: None }
    }
}

/// Why a bag could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenBagError {
    /// The path cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file has no bytes.
    #[error("{path}: the file is empty")]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// The file starts with no known magic.
    #[error("{path}: not a bag: it starts with {start:02x?}, which is neither rosbag v2.0, sqlite3 nor MCAP")]
    UnknownFormat {
        /// The path.
        path: PathBuf,
        /// The first bytes, at most 8.
        start: Vec<u8>,
    },
    /// The format is known but too old, or the like.
    #[error("{path}: {what}")]
    Unsupported {
        /// The path.
        path: PathBuf,
        /// What is not supported, and what to do.
        what: String,
    },
    /// The directory holds no bag.
    #[error("{path}: no .bag, .db3 or .mcap file in this directory")]
    NoFiles {
        /// The path.
        path: PathBuf,
    },
    /// The directory holds several bags that are not parts of one recording.
    #[error(
        "{path}: {} bags that are not parts of one recording ({}); name one of them, or add the metadata.yaml that joins \
         them",
        files.len(),
        shorten(files)
    )]
    Unrelated {
        /// The path.
        path: PathBuf,
        /// Names of the bag files in it.
        files: Vec<String>,
    },
    /// Nothing of the file can be read.
    #[error("{path}: damaged, nothing can be recovered: {reason}")]
    Damaged {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        reason: ReadError,
    },
}

/// The first names of a list.
fn shorten(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let text = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{text}, …") } else { text }
}

/// Storage format of a bag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// ROS 1 rosbag v2.0 (`.bag`).
    Rosbag1,
    /// rosbag2 with sqlite3 storage (`.db3`).
    Sqlite3,
    /// MCAP, by rosbag2 or others (`.mcap`).
    Mcap,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rosbag1 => "rosbag_v2",
            Self::Sqlite3 => "sqlite3",
            Self::Mcap => "mcap",
        })
    }
}

/// Encoding of the messages of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Encoding {
    /// CDR with a 4-byte header (ROS 2).
    Cdr,
    /// ROS 1 serialisation.
    Ros1,
    /// JSON text.
    Json,
    /// Protocol buffers.
    Protobuf,
    /// Anything else, by the name that the bag gives it.
    Other(String),
}

impl Encoding {
    fn from_name(name: &str) -> Self {
        match name {
            "cdr" => Self::Cdr,
            "ros1" => Self::Ros1,
            "json" => Self::Json,
            "protobuf" => Self::Protobuf,
            other => Self::Other(other.to_owned()),
        }
    }

    /// True for the serialisations of ROS 1 and ROS 2.
    #[must_use]
    pub fn is_ros(&self) -> bool {
        matches!(self, Self::Cdr | Self::Ros1)
    }

    /// The name that MCAP uses.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Cdr => "cdr",
            Self::Ros1 => "ros1",
            Self::Json => "json",
            Self::Protobuf => "protobuf",
            Self::Other(name) => name,
        }
    }
}

/// The definition of a message type as the bag carries it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SchemaText {
    /// `ros2msg`, `ros2idl`, `ros1msg`, `jsonschema`, `protobuf`, …
    pub encoding: String,
    /// The definition.
    pub data: Arc<[u8]>,
}

impl SchemaText {
    /// The definition as text, if it is text.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.data).ok()
    }
}

/// Place of a topic in [`BagInfo::topics`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicId(pub u32);

/// A publisher of a topic, as far as the format distinguishes them: a ROS 1 connection, an MCAP channel, a
/// row of a sqlite3 bag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublisherInfo {
    /// Metadata of the channel or fields of the connection header, as recorded.
    pub metadata: BTreeMap<String, String>,
    /// Keeps its last messages for late subscribers.
    pub latched: bool,
}

/// A topic of a bag.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicInfo {
    /// Name as recorded.
    pub name: String,
    /// Type as `pkg/msg/Name`.
    pub type_name: String,
    /// Type as recorded: `pkg/Name`, `pkg/msg/Name`, `module::Name`, …
    pub recorded_type: String,
    /// Encoding of the messages.
    pub encoding: Encoding,
    /// Definition of the type, if the bag carries one.
    pub schema: Option<SchemaText>,
    /// `RIHS01_…`, if the bag carries it.
    pub type_hash: Option<String>,
    /// Quality of service that the publishers offered, as rosbag2's YAML text; may be empty.
    pub offered_qos: String,
    /// The publisher keeps its last messages for late subscribers (transient local; ROS 1: latching).
    pub latched: bool,
    /// Its publishers; empty only where none was recorded.
    pub publishers: Vec<PublisherInfo>,
    /// Number of messages: from the index where there is a good one, counted otherwise.
    pub count: u64,
}

impl TopicInfo {
    /// A topic of which only name and type are known.
    pub(crate) fn new(name: &str, type_name: &str, encoding: Encoding) -> Self {
        Self {
            name: name.to_owned(),
            type_name: schema::normalize_type(type_name),
            recorded_type: type_name.to_owned(),
            encoding,
            schema: None,
            type_hash: None,
            offered_qos: String::new(),
            latched: false,
            publishers: Vec::new(),
            count: 0,
        }
    }

    /// The quality of service that each publisher offered; empty when it was not recorded.
    #[must_use]
    pub fn qos_profiles(&self) -> Vec<QosProfile> {
        qos::profiles(&self.offered_qos)
    }

    /// Takes over what another file or channel says of the same topic.
    fn merge(&mut self, other: &Self) {
        self.latched |= other.latched;
        let better = self.schema.as_ref().is_none_or(|s| s.data.is_empty()) && other.schema.is_some();
        if better {
            self.schema.clone_from(&other.schema);
        }
        if self.type_hash.is_none() {
            self.type_hash.clone_from(&other.type_hash);
        }
        if self.offered_qos.is_empty() {
            self.offered_qos.clone_from(&other.offered_qos);
        }
    }

    /// Definitions of CDR serve big-endian messages only: one that is absent is that of the other.
    fn same_definition(&self, other: &Self) -> bool {
        let text = |t: &Self| t.schema.as_ref().filter(|s| !s.data.is_empty()).map(|s| s.data.clone());
        match (text(self), text(other)) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        }
    }

    fn same_channel(&self, other: &Self) -> bool {
        self.name == other.name
            && self.type_name == other.type_name
            && self.encoding == other.encoding
            && (self.encoding.is_ros() || self.recorded_type == other.recorded_type)
            && (self.schema == other.schema || self.encoding == Encoding::Cdr && self.same_definition(other))
    }
}

/// Topic and publisher of a channel or connection, as the file counts them.
type ChannelPlace = (u32, u32);

/// Adds a channel (a connection of ROS 1) to the topic that it belongs to, which may be new.
fn add_publisher(topics: &mut Vec<TopicInfo>, topic: TopicInfo, publisher: PublisherInfo) -> ChannelPlace {
    let at = match topics.iter().position(|t| t.same_channel(&topic)) {
        Some(at) => {
            topics[at].merge(&topic);
            at
        }
        None => {
            topics.push(topic);
            topics.len() - 1
        }
    };
    let publishers = &mut topics[at].publishers;
    publishers.push(publisher);
    (at as u32, publishers.len() as u32 - 1)
}

/// Something that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// File name without directories.
    pub file: String,
    /// Chunk, counted from 0, where there are chunks.
    pub chunk: Option<u64>,
    /// Messages lost, where the number is known.
    pub messages_lost: Option<u64>,
    /// Bytes that were skipped, where the number is known.
    pub bytes_lost: Option<u64>,
    /// What is wrong.
    pub reason: String,
}

impl Damage {
    fn new(file: &str, reason: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            chunk: None,
            messages_lost: None,
            bytes_lost: None,
            reason: reason.into(),
        }
    }

    fn at(mut self, chunk: u64) -> Self {
        self.chunk = Some(chunk);
        self
    }

    fn messages(mut self, lost: Option<u64>) -> Self {
        self.messages_lost = lost;
        self
    }

    fn bytes(mut self, lost: u64) -> Self {
        self.bytes_lost = Some(lost);
        self
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.messages_lost, self.bytes_lost) {
            (Some(n), _) => write!(f, "messages lost: {n}")?,
            (None, Some(n)) => write!(f, "bytes lost: {n}")?,
            (None, None) => write!(f, "messages lost: unknown")?,
        }
        if let Some(chunk) = self.chunk {
            write!(f, " in chunk {chunk}")?;
        }
        write!(f, " of {} ({})", self.file, self.reason)
    }
}

/// What a bag holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BagInfo {
    /// Storage format.
    pub format: Format,
    /// `none`, `bz2`, `lz4`, `zstd`, several joined by `+`.
    pub compression: String,
    /// What is compressed: `chunk`, `message`, `file`; empty with `none`.
    pub compression_mode: String,
    /// Number of messages, as [`TopicInfo::count`].
    pub messages: u64,
    /// Smallest log time in nanoseconds since the Unix epoch; 0 without messages.
    pub start_ns: i64,
    /// Largest log time; 0 without messages.
    pub end_ns: i64,
    /// Files that were put beside the messages.
    pub attachments: Vec<Attachment>,
    /// Metadata records.
    pub metadata: Vec<MetadataRecord>,
    /// Records that only their writer understands.
    pub private: Vec<PrivateRecord>,
    /// Profile of an MCAP file (`ros2`, `ros1`, …); empty otherwise.
    pub profile: String,
    /// The topics.
    pub topics: Vec<TopicInfo>,
    /// Damage that opening found; reading may find more.
    pub damage: Vec<Damage>,
    /// The files that were opened, in order.
    pub files: Vec<PathBuf>,
}

impl BagInfo {
    /// The topic of a message.
    #[must_use]
    pub fn topic(&self, id: TopicId) -> &TopicInfo {
        &self.topics[id.0 as usize]
    }
}

/// An open bag. Cheap to clone; clones share the files.
#[derive(Clone)]
pub struct Bag {
    info: Arc<BagInfo>,
    files: Arc<Vec<OpenFile>>,
}

impl fmt::Debug for Bag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bag").field("info", &self.info).finish_non_exhaustive()
    }
}

struct OpenFile {
    file: Box<dyn BagFile>,
    /// From the topics of the file to those of the bag.
    topics: Vec<TopicId>,
    /// From the publishers of each topic of the file to those of the topic of the bag.
    publishers: Vec<Vec<u32>>,
    /// Number of messages, as the index states it.
    messages: u64,
}

/// Where a chunk lies in time, and what is in it.
#[derive(Clone, Copy, Debug)]
struct ChunkMeta {
    start_ns: i64,
    end_ns: i64,
}

/// One message of a loaded chunk.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Topic of the file.
    topic: u32,
    /// Publisher of the topic.
    publisher: u32,
    /// Sequence number that the recorder gave it; 0 where the format has none.
    sequence: u32,
    log_ns: i64,
    publish_ns: i64,
    start: usize,
    len: usize,
}

/// A chunk in memory.
#[derive(Default)]
struct Chunk {
    data: Vec<u8>,
    entries: Vec<Entry>,
    /// Records among the messages that only their writer understands.
    private: Vec<PrivateRecord>,
    damage: Vec<Damage>,
}

/// One file of a bag: a list of chunks that can be loaded in any order, from any thread.
trait BagFile: Send + Sync {
    fn chunks(&self) -> &[ChunkMeta];
    /// Loads a chunk into `chunk`, whose buffers may be reused.
    fn load(&self, index: usize, chunk: &mut Chunk);
    /// True when the chunk may hold messages of one of these topics of the file.
    fn may_hold(&self, _index: usize, _wanted: &dyn Fn(u32) -> bool) -> bool {
        true
    }
    /// Bytes of the file, for what lies beside the messages.
    fn read_at(&self, _at: u64, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// What opening one file gives.
struct Opened {
    file: Box<dyn BagFile>,
    format: Format,
    topics: Vec<TopicInfo>,
    /// Codec names and what they compress.
    compression: Vec<(&'static str, &'static str)>,
    side: side::SideRecords,
    profile: String,
    damage: Vec<Damage>,
}

/// Opens a bag: a `.bag`, `.db3`, `.mcap` file, one of these compressed with zstd, or a directory with
/// `metadata.yaml` or with such files.
///
/// # Errors
/// The path cannot be read, is not a bag, or holds nothing that can be recovered. Partial damage is not an error:
/// see [`BagInfo::damage`] and [`Messages::damage`].
pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Bag, OpenBagError> {
    let path = path.as_ref();
    let io = |source| OpenBagError::Io { path: path.to_path_buf(), source };
    let meta = std::fs::metadata(path).map_err(io)?;
    let is_metadata = path.file_name().is_some_and(|n| n == "metadata.yaml");
    if meta.is_dir() {
        directory::open(path, options)
    } else if is_metadata {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        directory::open(parent, options)
    } else {
        let opened = open_file(path, options)?;
        Ok(assemble(vec![opened], vec![path.to_path_buf()], Vec::new()))
    }
}

/// Opens the bytes of a `.bag` or `.mcap` file.
///
/// # Errors
/// As [`open`]; sqlite3 needs a file and is refused.
pub fn open_bytes(name: &str, bytes: &[u8], options: &OpenOptions) -> Result<Bag, OpenBagError> {
    let path = PathBuf::from(name);
    let source = Source::Memory(Arc::from(bytes));
    let opened = match &bytes[..bytes.len().min(16)] {
        [] => return Err(OpenBagError::Empty { path }),
        start if start.starts_with(&mcap_file::MAGIC) => mcap_file::open(source, &path, options)?,
        start if start.starts_with(b"#ROSBAG V") => ros1::open(source, &path, options)?,
        start if start.starts_with(sqlite_pages::MAGIC) => sqlite_pages::open(source, &path, options, None)?,
        start => {
            return Err(OpenBagError::UnknownFormat { path, start: start[..start.len().min(8)].to_vec() });
        }
    };
    Ok(assemble(vec![opened], vec![path], Vec::new()))
}

fn file_label(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

fn open_file(path: &Path, options: &OpenOptions) -> Result<Opened, OpenBagError> {
    let io = |source| OpenBagError::Io { path: path.to_path_buf(), source };
    let source = Source::open(path).map_err(io)?;
    let start = source.read_vec(0..16).map_err(io)?;
    if start.is_empty() && !sqlite::has_log(path) {
        return Err(OpenBagError::Empty { path: path.to_path_buf() });
    }
    if start.starts_with(&codec::ZSTD_MAGIC) {
        return open_compressed(path, options);
    }
    if start.starts_with(&mcap_file::MAGIC) {
        mcap_file::open(source, path, options)
    } else if start.starts_with(b"#ROSBAG V") {
        ros1::open(source, path, options)
    } else if start.starts_with(sqlite_pages::MAGIC) || start.is_empty() {
        sqlite::open(source, path, options, None)
    } else {
        let start = start[..start.len().min(8)].to_vec();
        Err(OpenBagError::UnknownFormat { path: path.to_path_buf(), start })
    }
}

/// rosbag2's FILE compression: the whole file is one zstd stream.
fn open_compressed(path: &Path, options: &OpenOptions) -> Result<Opened, OpenBagError> {
    let io = |source| OpenBagError::Io { path: path.to_path_buf(), source };
    let dir = temporary_dir(options).map_err(io)?;
    let stem = path.file_stem().unwrap_or(path.as_os_str());
    let plain = dir.path().join(stem);
    let mut decoder = zstd::stream::read::Decoder::new(std::fs::File::open(path).map_err(io)?).map_err(io)?;
    let mut out = std::fs::File::create(&plain).map_err(io)?;
    // What came before a break in the stream is a truncated bag, and read as one.
    let broken = io::copy(&mut decoder, &mut out).err();
    drop(out);
    let source = Source::open(&plain).map_err(io)?;
    let start = source.read_vec(0..16).map_err(io)?;
    let label = file_label(path);
    let mut opened = if start.starts_with(&mcap_file::MAGIC) {
        mcap_file::open(source, path, options)
    } else if start.starts_with(b"#ROSBAG V") {
        ros1::open(source, path, options)
    } else if start.starts_with(sqlite_pages::MAGIC) {
        sqlite::open(source, &plain, options, Some(path))
    } else if let Some(broken) = broken {
        return Err(OpenBagError::Damaged { path: path.to_path_buf(), reason: broken.into() });
    } else {
        let reason = ReadError::Form("no bag inside the zstd stream");
        return Err(OpenBagError::Damaged { path: path.to_path_buf(), reason });
    }?;
    opened.file = Box::new(Held { file: opened.file, _dir: dir });
    opened.compression = vec![("zstd", "file")];
    if let Some(e) = broken {
        opened.damage.insert(0, Damage::new(&label, format!("the zstd stream of the file breaks off: {e}")));
    }
    Ok(opened)
}

fn temporary_dir(options: &OpenOptions) -> io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("mindseye-bag-");
    match &options.temporary {
        Some(place) => builder.tempdir_in(place),
        None => builder.tempdir(),
    }
}

/// A file that lives in a temporary directory.
struct Held {
    file: Box<dyn BagFile>,
    _dir: tempfile::TempDir,
}

impl BagFile for Held {
    fn chunks(&self) -> &[ChunkMeta] {
        self.file.chunks()
    }
    fn load(&self, index: usize, chunk: &mut Chunk) {
        self.file.load(index, chunk);
    }
    fn may_hold(&self, index: usize, wanted: &dyn Fn(u32) -> bool) -> bool {
        self.file.may_hold(index, wanted)
    }
    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(at, buffer)
    }
}

/// Joins the files of a bag: topics with the same name, type and encoding become one.
fn assemble(opened: Vec<Opened>, paths: Vec<PathBuf>, damage: Vec<Damage>) -> Bag {
    let mut topics: Vec<TopicInfo> = Vec::new();
    let mut files = Vec::new();
    let mut codecs: Vec<&str> = Vec::new();
    let mut modes: Vec<&str> = Vec::new();
    let mut info = BagInfo {
        format: opened.first().map_or(Format::Mcap, |o| o.format),
        compression: String::new(),
        compression_mode: String::new(),
        messages: 0,
        start_ns: i64::MAX,
        end_ns: i64::MIN,
        attachments: Vec::new(),
        metadata: Vec::new(),
        private: Vec::new(),
        profile: String::new(),
        topics: Vec::new(),
        damage,
        files: paths,
    };
    for (file, one) in opened.into_iter().enumerate() {
        let mut map = Vec::with_capacity(one.topics.len());
        let mut publishers = Vec::with_capacity(one.topics.len());
        let messages = one.topics.iter().map(|t| t.count).sum();
        for topic in one.topics {
            info.messages += topic.count;
            let at = match topics.iter_mut().position(|t| t.same_channel(&topic)) {
                Some(at) => {
                    let known = &mut topics[at];
                    known.count += topic.count;
                    known.merge(&topic);
                    publishers.push(join_publishers(&mut known.publishers, topic.publishers));
                    at
                }
                None => {
                    publishers.push((0..topic.publishers.len() as u32).collect());
                    topics.push(topic);
                    topics.len() - 1
                }
            };
            map.push(TopicId(at as u32));
        }
        let side::SideRecords { attachments, metadata, private, .. } = one.side;
        info.attachments.extend(attachments.into_iter().map(|a| a.of_file(file)));
        info.metadata.extend(metadata);
        info.private.extend(private);
        if info.profile.is_empty() {
            info.profile = one.profile;
        }
        for chunk in one.file.chunks() {
            info.start_ns = info.start_ns.min(chunk.start_ns);
            info.end_ns = info.end_ns.max(chunk.end_ns);
        }
        for (codec, mode) in one.compression {
            if !codecs.contains(&codec) {
                codecs.push(codec);
            }
            if codec != "none" && !modes.contains(&mode) {
                modes.push(mode);
            }
        }
        info.damage.extend(one.damage);
        files.push(OpenFile { file: one.file, topics: map, publishers, messages });
    }
    if codecs.len() > 1 {
        codecs.retain(|c| *c != "none");
    }
    info.compression = if codecs.is_empty() { "none".to_owned() } else { codecs.join("+") };
    info.compression_mode = modes.join("+");
    if info.start_ns > info.end_ns {
        (info.start_ns, info.end_ns) = (0, 0);
    }
    info.topics = topics;
    Bag { info: Arc::new(info), files: Arc::new(files) }
}

/// Finds the publishers of a topic of another file among those that are known already, and adds those that are not.
/// Publishers with equal metadata are matched by their order.
fn join_publishers(known: &mut Vec<PublisherInfo>, others: Vec<PublisherInfo>) -> Vec<u32> {
    let mut taken = vec![false; known.len()];
    let mut map = Vec::with_capacity(others.len());
    for other in others {
        let at = known.iter().zip(&taken).position(|(k, taken)| !taken && *k == other);
        let at = at.unwrap_or_else(|| {
            known.push(other);
            taken.push(false);
            known.len() - 1
        });
        taken[at] = true;
        map.push(at as u32);
    }
    map
}

impl Bag {
    /// What the bag holds.
    #[must_use]
    pub fn info(&self) -> &BagInfo {
        &self.info
    }

    /// Hands the bytes of an attachment to `each`, piece by piece.
    ///
    /// # Errors
    /// The file cannot be read, or ends early; or what `each` gave.
    pub fn read_attachment<E: From<io::Error>>(
        &self,
        attachment: &Attachment,
        each: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        side::read_attachment(&self.files, attachment, each)
    }

    /// The smallest log time above 0: where playing starts. Recorders that wait for `/clock` give what comes before
    /// its first message a log time of 0.
    #[must_use]
    pub fn first_stamp_ns(&self) -> i64 {
        let mut first = i64::MAX;
        for open in self.files.iter() {
            for (index, meta) in open.file.chunks().iter().enumerate() {
                if meta.start_ns > 0 {
                    first = first.min(meta.start_ns);
                } else if meta.end_ns > 0 {
                    let mut chunk = Chunk::default();
                    open.file.load(index, &mut chunk);
                    let stamps = chunk.entries.iter().map(|e| e.log_ns).filter(|ns| *ns > 0);
                    first = first.min(stamps.min().unwrap_or(i64::MAX));
                }
            }
        }
        if first == i64::MAX { self.info.start_ns } else { first }
    }

    /// Streams the messages. The iterator is independent of the bag and of other iterators.
    #[must_use]
    pub fn messages(&self, options: &ReadOptions) -> Messages {
        Messages::new(self, options)
    }
}
