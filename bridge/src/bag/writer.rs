//! Writing MCAP files that rosbag2, Foxglove and the Python `mcap` package read.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use mcap::records::{AttachmentHeader, MessageHeader};

use super::{Attachment, Bag, MetadataRecord, PrivateRecord};

/// A channel of an [`McapWriter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChannelId(u16);

/// Why a bag could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteBagError {
    /// The file could not be created, written, flushed or renamed.
    #[error("{path}: {source}")]
    Io {
        /// The file that was meant to be written.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The MCAP library refused, for example after an earlier failed write.
    #[error("{path}: {source}")]
    Mcap {
        /// The file that was meant to be written.
        path: PathBuf,
        /// What the library said.
        source: mcap::McapError,
    },
    /// An attachment of a bag that is being rewritten cannot be read.
    #[error("{path}: attachment {name}: {source}")]
    Attachment {
        /// The file that was meant to be written.
        path: PathBuf,
        /// Name of the attachment.
        name: String,
        /// What is wrong.
        source: CopyError,
    },
    /// A stamp before 1970 has no place in an MCAP file.
    #[error("{path}: stamp {stamp_ns} ns is before 1970; give a stamp of the Unix epoch")]
    NegativeStamp {
        /// The file that was meant to be written.
        path: PathBuf,
        /// The stamp that was given, in nanoseconds since the Unix epoch.
        stamp_ns: i64,
    },
}

/// Why an attachment could not be copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] mcap::McapError),
}

/// Encoding of the messages of a channel that is not ROS 2, as MCAP names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignSchema<'a> {
    /// Message encoding: `json`, `protobuf`, `ros1`, …
    pub message_encoding: &'a str,
    /// Schema encoding: `jsonschema`, `protobuf`, `ros1msg`, …
    pub schema_encoding: &'a str,
    /// Schema name as the other side knows it, for example `foxglove.CompressedImage`.
    pub schema_name: &'a str,
    /// Schema bytes.
    pub schema: &'a [u8],
}

impl ForeignSchema<'_> {
    /// The number of the schema in the file; 0 for none.
    fn add_to(&self, writer: &mut mcap::Writer<BufWriter<File>>) -> mcap::McapResult<u16> {
        if self.schema_name.is_empty() && self.schema_encoding.is_empty() && self.schema.is_empty() {
            return Ok(0);
        }
        writer.add_schema(self.schema_name, self.schema_encoding, self.schema)
    }
}

/// Writes one MCAP file with profile `ros2`: `ros2msg` schemas, CDR messages, zstd chunks with CRCs,
/// message indexes and a summary.
///
/// The file is written under a temporary name in the same directory and takes its own name in
/// [`finish`](Self::finish); a writer that is dropped before leaves nothing behind.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("out.mcap");
/// use mindseye_bridge::bag::{McapWriter, schema};
/// let mut writer = McapWriter::create(&path)?;
/// let text = schema::ros2msg("std_msgs/msg/String").ok_or("unknown type")?;
/// let channel = writer.add_channel("/chatter", "std_msgs/msg/String", text, None, "")?;
/// writer.write(channel, 1_000, 1_000, b"\x00\x01\x00\x00\x03\x00\x00\x00hi\x00")?;
/// assert_eq!(writer.finish()?, 1);
/// # Ok(())
/// # }
/// ```
pub struct McapWriter {
    writer: mcap::Writer<BufWriter<File>>,
    path: PathBuf,
    /// Removed when the writer is dropped.
    partial: tempfile::TempPath,
    sequences: BTreeMap<u16, u32>,
    last_channel: u16,
    messages: u64,
}

impl McapWriter {
    /// Starts a file that will be called `path`.
    ///
    /// # Errors
    /// The temporary file cannot be created in the directory of `path`.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, WriteBagError> {
        Self::create_with_profile(path, "ros2")
    }

    /// As [`create`](Self::create), with another profile; empty for none.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_with_profile(path: impl AsRef<Path>, profile: &str) -> Result<Self, WriteBagError> {
        let path = path.as_ref().to_path_buf();
        let io = |source| WriteBagError::Io { path: path.clone(), source };
        let Some(name) = path.file_name() else {
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, "not a file name")));
        };
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        // Without these rights only the owner could read the file; the process's mask still applies.
        builder.prefix(&prefix).suffix(".tmp").permissions(Permissions::from_mode(0o666));
        let (file, partial) = builder.tempfile_in(folder).map_err(io)?.into_parts();
        let options = mcap::WriteOptions::new()
            .profile(profile)
            .library(concat!("mindseye ", env!("CARGO_PKG_VERSION")))
            .compression(Some(mcap::Compression::Zstd))
            .compression_threads(0);
        let made = options.create(BufWriter::with_capacity(1 << 18, file));
        let writer = made.map_err(|source| WriteBagError::Mcap { path: path.clone(), source })?;
        Ok(Self { writer, path, partial, sequences: BTreeMap::new(), last_channel: 0, messages: 0 })
    }

    /// Declares a ROS 2 topic.
    ///
    /// `type_name` is `pkg/msg/Name`; `schema_text` the concatenated message definition (see
    /// [`schema::ros2msg`](super::schema::ros2msg)), empty when it is not known; `type_hash` is `RIHS01_…`;
    /// `offered_qos` is the YAML list that rosbag2 stores (see [`offered_qos`](super::offered_qos)), empty
    /// when it is not known.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add_channel(
        &mut self,
        topic: &str,
        type_name: &str,
        schema_text: &str,
        type_hash: Option<&str>,
        offered_qos: &str,
    ) -> Result<ChannelId, WriteBagError> {
        let mut metadata = BTreeMap::from([("offered_qos_profiles".to_owned(), offered_qos.to_owned())]);
        if let Some(hash) = type_hash {
            metadata.insert("topic_type_hash".to_owned(), hash.to_owned());
        }
        let foreign = ForeignSchema {
            message_encoding: "cdr",
            schema_encoding: "ros2msg",
            schema_name: type_name,
            schema: schema_text.as_bytes(),
        };
        self.add(topic, &foreign, &metadata)
    }

    /// Declares a topic whose messages are not CDR and are copied as they are.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add_foreign_channel(
        &mut self,
        topic: &str,
        schema: &ForeignSchema<'_>,
    ) -> Result<ChannelId, WriteBagError> {
        self.add(topic, schema, &BTreeMap::new())
    }

    fn add(
        &mut self,
        topic: &str,
        schema: &ForeignSchema<'_>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<ChannelId, WriteBagError> {
        let path = self.path.clone();
        let mcap = |source| WriteBagError::Mcap { path, source };
        let writer = &mut self.writer;
        let result = (|| {
            let schema_id = schema.add_to(writer)?;
            writer.add_channel(schema_id, topic, schema.message_encoding, metadata)
        })();
        result.map(ChannelId).map_err(mcap)
    }

    /// Declares a channel of a bag that is being rewritten, with its metadata. It is a channel of its own also where
    /// another one looks the same: it may be another publisher.
    pub(super) fn add_recorded(
        &mut self,
        topic: &str,
        schema: &ForeignSchema<'_>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<ChannelId, WriteBagError> {
        let path = self.path.clone();
        let mcap = |source| WriteBagError::Mcap { path, source };
        let writer = &mut self.writer;
        let id = self.last_channel.checked_add(1);
        let result = (|| {
            let id = id.ok_or(mcap::McapError::TooManyChannels)?;
            let schema_id = schema.add_to(writer)?;
            writer.add_channel_with_id(id, schema_id, topic, schema.message_encoding, metadata)
        })();
        let id = result.map_err(mcap)?;
        self.last_channel = id;
        Ok(ChannelId(id))
    }

    /// Copies an attachment of `bag`.
    pub(super) fn attach(&mut self, bag: &Bag, attachment: &Attachment) -> Result<(), WriteBagError> {
        let writer = &mut self.writer;
        let header = AttachmentHeader {
            log_time: attachment.log_time_ns,
            create_time: attachment.create_time_ns,
            name: attachment.name.clone(),
            media_type: attachment.media_type.clone(),
        };
        let copied = (|| -> Result<(), CopyError> {
            writer.start_attachment(attachment.bytes, header)?;
            let mut put = |piece: &[u8]| -> Result<(), CopyError> { Ok(writer.put_attachment_bytes(piece)?) };
            bag.read_attachment(attachment, &mut put)?;
            Ok(writer.finish_attachment()?)
        })();
        let (path, name) = (self.path.clone(), attachment.name.clone());
        copied.map_err(|source| WriteBagError::Attachment { path, name, source })
    }

    /// Copies a metadata record.
    pub(super) fn write_metadata(&mut self, record: &MetadataRecord) -> Result<(), WriteBagError> {
        let writer = &mut self.writer;
        let record = mcap::records::Metadata { name: record.name.clone(), metadata: record.entries.clone() };
        writer
            .write_metadata(&record)
            .map_err(|source| WriteBagError::Mcap { path: self.path.clone(), source })
    }

    /// Copies a record of a private kind.
    pub(super) fn write_private(&mut self, record: &PrivateRecord) -> Result<(), WriteBagError> {
        let writer = &mut self.writer;
        writer
            .write_private_record(record.opcode, &record.data, Default::default())
            .map_err(|source| WriteBagError::Mcap { path: self.path.clone(), source })
    }

    /// Appends one message; stamps in nanoseconds since the Unix epoch. Messages of a channel are numbered from 0.
    ///
    /// # Errors
    /// The disk is full, a stamp is before 1970. The file is then not usable any more: drop the writer.
    pub fn write(
        &mut self,
        channel: ChannelId,
        log_time_ns: i64,
        publish_time_ns: i64,
        data: &[u8],
    ) -> Result<(), WriteBagError> {
        let next = self.sequences.entry(channel.0).or_insert(0);
        let sequence = *next;
        *next = next.wrapping_add(1);
        self.write_numbered(channel, sequence, (log_time_ns, publish_time_ns), data)
    }

    /// As [`write`](Self::write), with the number that the message has already.
    pub(super) fn write_numbered(
        &mut self,
        channel: ChannelId,
        sequence: u32,
        (log_time_ns, publish_time_ns): (i64, i64),
        data: &[u8],
    ) -> Result<(), WriteBagError> {
        let stamp = |ns: i64| {
            u64::try_from(ns)
                .map_err(|_| WriteBagError::NegativeStamp { path: self.path.clone(), stamp_ns: ns })
        };
        let (log_time, publish_time) = (stamp(log_time_ns)?, stamp(publish_time_ns)?);
        let header = MessageHeader { channel_id: channel.0, sequence, log_time, publish_time };
        let writer = &mut self.writer;
        writer
            .write_to_known_channel(&header, data)
            .map_err(|source| WriteBagError::Mcap { path: self.path.clone(), source })?;
        self.messages += 1;
        Ok(())
    }

    /// Closes the current chunk, so that everything written so far survives a crash (under the temporary
    /// name, readable by `mindseye bag recover`).
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<(), WriteBagError> {
        let writer = &mut self.writer;
        writer.flush().map_err(|source| WriteBagError::Mcap { path: self.path.clone(), source })
    }

    /// Number of messages written so far.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// Writes the summary, flushes to the disk and gives the file its name. Returns the number of messages.
    ///
    /// # Errors
    /// The file cannot be written or renamed; nothing is left behind then.
    pub fn finish(mut self) -> Result<u64, WriteBagError> {
        let path = self.path;
        self.writer.finish().map_err(|source| WriteBagError::Mcap { path: path.clone(), source })?;
        let mut buffered = self.writer.into_inner();
        let end = buffered.flush().and_then(|()| buffered.get_ref().sync_all());
        drop(buffered);
        end.and_then(|()| self.partial.persist(&path).map_err(|e| e.error))
            .map_err(|source| WriteBagError::Io { path, source })?;
        Ok(self.messages)
    }
}

/// The YAML text in which rosbag2 stores the quality of service that a publisher offered.
///
/// ```
/// let text = mindseye_bridge::bag::offered_qos(true, true, 1);
/// assert!(text.starts_with("- history: 1\n  depth: 1\n  reliability: 1\n  durability: 1\n"));
/// ```
#[must_use]
pub fn offered_qos(reliable: bool, transient_local: bool, depth: u32) -> String {
    let reliability = if reliable { 1 } else { 2 };
    let durability = if transient_local { 1 } else { 2 };
    let forever = "\n    sec: 9223372036\n    nsec: 854775807\n";
    format!(
        "- history: 1\n  depth: {depth}\n  reliability: {reliability}\n  durability: {durability}\n  \
         deadline:{forever}  lifespan:{forever}  liveliness: 1\n  liveliness_lease_duration:{forever}  \
         avoid_ros_namespace_conventions: false\n"
    )
}
