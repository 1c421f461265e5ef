//! Writing MCAP files that rosbag2, Foxglove and the Python `mcap` package read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use mcap::records::MessageHeader;

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
    /// A stamp before 1970 has no place in an MCAP file.
    #[error("{path}: stamp {stamp_ns} ns is before 1970; give a stamp of the Unix epoch")]
    NegativeStamp {
        /// The file that was meant to be written.
        path: PathBuf,
        /// The stamp that was given, in nanoseconds since the Unix epoch.
        stamp_ns: i64,
    },
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
    writer: Option<mcap::Writer<BufWriter<File>>>,
    path: PathBuf,
    partial: PathBuf,
    sequences: BTreeMap<u16, u32>,
    messages: u64,
}

impl McapWriter {
    /// Starts a file that will be called `path`.
    ///
    /// # Errors
    /// The temporary file cannot be created in the directory of `path`.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, WriteBagError> {
        let path = path.as_ref().to_path_buf();
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_else(|| std::ffi::OsStr::new("bag.mcap")));
        name.push(format!(".{}.tmp", std::process::id()));
        let partial = path.with_file_name(name);
        let io = |source| WriteBagError::Io { path: path.clone(), source };
        if path.file_name().is_none() {
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, "not a file name")));
        }
        let file = File::create(&partial).map_err(io)?;
        let options = mcap::WriteOptions::new()
            .profile("ros2")
            .library(concat!("mindseye ", env!("CARGO_PKG_VERSION")))
            .compression(Some(mcap::Compression::Zstd))
            .compression_threads(0);
        let made = options.create(BufWriter::with_capacity(1 << 18, file));
        let writer = match made {
            Ok(writer) => writer,
            Err(source) => {
                let _ = fs::remove_file(&partial);
                return Err(WriteBagError::Mcap { path, source });
            }
        };
        Ok(Self { writer: Some(writer), path, partial, sequences: BTreeMap::new(), messages: 0 })
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
        let writer = self.writer.as_mut().expect("the writer lives until finish() consumes self");
        let result = (|| {
            let no_schema = schema.schema_name.is_empty() && schema.schema.is_empty();
            let id = if no_schema {
                0
            } else {
                writer.add_schema(schema.schema_name, schema.schema_encoding, schema.schema)?
            };
            writer.add_channel(id, topic, schema.message_encoding, metadata)
        })();
        result.map(ChannelId).map_err(mcap)
    }

    /// Appends one message; stamps in nanoseconds since the Unix epoch.
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
        let stamp = |ns: i64| {
            u64::try_from(ns)
                .map_err(|_| WriteBagError::NegativeStamp { path: self.path.clone(), stamp_ns: ns })
        };
        let (log_time, publish_time) = (stamp(log_time_ns)?, stamp(publish_time_ns)?);
        let sequence = self.sequences.entry(channel.0).or_insert(0);
        let header = MessageHeader { channel_id: channel.0, sequence: *sequence, log_time, publish_time };
        *sequence = sequence.wrapping_add(1);
        let writer = self.writer.as_mut().expect("the writer lives until finish() consumes self");
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
        let writer = self.writer.as_mut().expect("the writer lives until finish() consumes self");
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
        let mut writer = self.writer.take().expect("the writer lives until finish() consumes self");
        let finished = writer.finish();
        let path = self.path.clone();
        finished.map_err(|source| WriteBagError::Mcap { path: path.clone(), source })?;
        let mut buffered = writer.into_inner();
        let end = buffered.flush().and_then(|()| buffered.get_ref().sync_all());
        drop(buffered);
        end.and_then(|()| fs::rename(&self.partial, &self.path))
            .map_err(|source| WriteBagError::Io { path, source })?;
        Ok(self.messages)
    }
}

impl Drop for McapWriter {
    fn drop(&mut self) {
        drop(self.writer.take());
        let _ = fs::remove_file(&self.partial);
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
