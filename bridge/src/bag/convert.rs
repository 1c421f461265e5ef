//! Writing what can be read of a bag as a clean MCAP file.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::cdr::CdrConverter;
use super::layout::definition_for;
use super::writer::{ForeignSchema, McapWriter, WriteBagError};
use super::{
    Bag, BagInfo, ChannelId, Damage, Encoding, Format, RawMessage, ReadOptions, TopicInfo, file_label, schema,
};

/// What [`rewrite_as_mcap`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConvertReport {
    /// Messages written.
    pub messages: u64,
    /// Attachments written.
    pub attachments: u64,
    /// Metadata records and private records written.
    pub records: u64,
    /// The caller ended it early; what was written until then is a good file.
    pub stopped: bool,
    /// What was kept byte for byte because it is not understood.
    pub kept: Vec<String>,
    /// What could not be read, or has no place in the file.
    pub damage: Vec<Damage>,
}

/// Why a bag could not be rewritten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// The output cannot be written.
    #[error(transparent)]
    Write(#[from] WriteBagError),
    /// The output is one of the files that are read.
    #[error("{path}: this file is being read; give another name for the output")]
    SameFile {
        /// The output.
        path: PathBuf,
    },
    /// There is nothing to write.
    #[error("{path}: nothing of it can be written{}", why.as_ref().map_or(String::new(), |why| format!(": {why}")))]
    Nothing {
        /// The bag.
        path: PathBuf,
        /// The first thing that is wrong with it.
        why: Option<Damage>,
    },
}

/// Writes the messages of `bag` that `options` select to a new MCAP file: ROS messages as little-endian CDR with
/// `ros2msg` definitions, others as they are. Stamps, sequence numbers, channels and their metadata, attachments,
/// metadata records and private records are kept; what is not understood is kept byte for byte, and
/// [`ConvertReport::kept`] says so.
///
/// `go_on` is called with the number of messages so far; when it says false the file is finished early.
///
/// # Errors
/// The output cannot be written, is an input, or would hold nothing. Nothing is left behind then.
pub fn rewrite_as_mcap(
    bag: &Bag,
    out: &Path,
    options: &ReadOptions,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> Result<ConvertReport, RewriteError> {
    let info = bag.info();
    if let Ok(target) = out.canonicalize()
        && info.files.iter().any(|f| f.canonicalize().is_ok_and(|f| f == target))
    {
        return Err(RewriteError::SameFile { path: out.to_path_buf() });
    }
    let mut rewriter = Rewriter {
        info,
        writer: McapWriter::create_with_profile(out, &profile(info))?,
        converter: CdrConverter::new(info),
        channels: HashMap::new(),
        as_recorded: vec![None; info.topics.len()],
        early: 0,
    };
    let mut report = ConvertReport::default();
    rewriter.beside(bag, &mut report)?;
    let mut messages = bag.messages(options);
    for message in &mut messages {
        rewriter.message(&message)?;
        if !go_on(rewriter.writer.messages()) {
            report.stopped = true;
            break;
        }
    }
    for record in messages.private_records() {
        rewriter.writer.write_private(record)?;
        report.records += 1;
    }
    let wanted = |t: &TopicInfo| options.topics.as_ref().is_none_or(|names| names.contains(&t.name));
    for at in (0..info.topics.len()).filter(|at| wanted(&info.topics[*at])) {
        rewriter.silent_topic(at)?;
    }
    report.damage = info.damage.iter().chain(messages.damage()).cloned().collect();
    rewriter.finish(report)
}

/// Topic, publisher, and whether its messages are copied as they were recorded.
type ChannelKey = (usize, u32, bool);

struct Rewriter<'a> {
    info: &'a BagInfo,
    writer: McapWriter,
    converter: CdrConverter,
    channels: HashMap<ChannelKey, ChannelId>,
    /// By topic: messages that are kept as recorded, and why the first of them is.
    as_recorded: Vec<Option<(u64, String)>>,
    /// Messages with stamps before 1970.
    early: u64,
}

impl Rewriter<'_> {
    /// Copies what lies beside the messages.
    fn beside(&mut self, bag: &Bag, report: &mut ConvertReport) -> Result<(), WriteBagError> {
        for attachment in &self.info.attachments {
            self.writer.attach(bag, attachment)?;
            report.attachments += 1;
        }
        for record in &self.info.metadata {
            self.writer.write_metadata(record)?;
            report.records += 1;
        }
        for record in &self.info.private {
            self.writer.write_private(record)?;
            report.records += 1;
        }
        Ok(())
    }

    fn message(&mut self, message: &RawMessage) -> Result<(), WriteBagError> {
        if message.log_time_ns < 0 || message.publish_time_ns < 0 {
            self.early += 1;
            return Ok(());
        }
        let at = message.topic.0 as usize;
        let topic = &self.info.topics[at];
        let converted = if topic.encoding.is_ros() { Some(self.converter.convert(message)) } else { None };
        let (bytes, raw) = match converted {
            Some(Ok(cdr)) => (cdr, false),
            Some(Err(e)) => {
                let (count, _) = self.as_recorded[at].get_or_insert_with(|| (0, e.to_string()));
                *count += 1;
                (&message.data[..], true)
            }
            None => (&message.data[..], true),
        };
        let key = (at, message.publisher, raw);
        let channel = match self.channels.get(&key) {
            Some(channel) => *channel,
            None => {
                let channel = add_channel(&mut self.writer, topic, key, Some(bytes))?;
                *self.channels.entry(key).or_insert(channel)
            }
        };
        let times = (message.log_time_ns, message.publish_time_ns);
        if self.info.format == Format::Mcap {
            self.writer.write_numbered(channel, message.sequence, times, bytes)
        } else {
            self.writer.write(channel, times.0, times.1, bytes)
        }
    }

    /// Keeps the channels of a topic that sent nothing.
    fn silent_topic(&mut self, at: usize) -> Result<(), WriteBagError> {
        let topic = &self.info.topics[at];
        for publisher in 0..topic.publishers.len().max(1) as u32 {
            let keys = [false, true].map(|raw| (at, publisher, raw));
            if keys.iter().any(|key| self.channels.contains_key(key)) {
                continue;
            }
            let text = topic.schema.as_ref().map(|s| String::from_utf8_lossy(&s.data)).unwrap_or_default();
            let raw = match topic.encoding {
                Encoding::Cdr => false,
                Encoding::Ros1 => schema::ros2msg_from_ros1(&topic.type_name, &text).is_err(),
                _ => true,
            };
            let key = (at, publisher, raw);
            let channel = add_channel(&mut self.writer, topic, key, None)?;
            self.channels.insert(key, channel);
        }
        Ok(())
    }

    fn finish(self, mut report: ConvertReport) -> Result<ConvertReport, RewriteError> {
        let path = self.info.files.first().cloned().unwrap_or_default();
        let name = file_label(&path);
        for (topic, kept) in self.info.topics.iter().zip(&self.as_recorded) {
            if let Some((count, why)) = kept {
                let encoding = topic.encoding.name();
                report.kept.push(format!("{count} messages of {} as {encoding}: {why}", topic.name));
            } else if !topic.encoding.is_ros() {
                report.kept.push(format!("{}: {} is not ROS", topic.name, topic.encoding.name()));
            } else if let Some(schema) = foreign_schema(topic) {
                report.kept.push(format!("{}: its definition, which is {schema}", topic.name));
            }
        }
        if self.early > 0 {
            let what = Damage::new(&name, "stamps before 1970 have no place in MCAP");
            report.damage.push(what.messages(Some(self.early)));
        }
        report.messages = self.writer.messages();
        if report.messages == 0 && report.attachments == 0 && report.records == 0 {
            return Err(RewriteError::Nothing { path, why: report.damage.into_iter().next() });
        }
        self.writer.finish()?;
        Ok(report)
    }
}

/// The profile of the output: that of ROS 2 where every topic follows it.
fn profile(info: &BagInfo) -> String {
    let ros = |topic: &TopicInfo| topic.encoding.is_ros() && foreign_schema(topic).is_none();
    match info.profile.as_str() {
        _ if info.topics.iter().all(ros) => "ros2".to_owned(),
        "ros1" => String::new(),
        recorded => recorded.to_owned(),
    }
}

/// The language of a definition that is none of those of ROS.
fn foreign_schema(topic: &TopicInfo) -> Option<&str> {
    let encoding = topic.schema.as_ref()?.encoding.as_str();
    (!matches!(encoding, "" | "ros1msg" | "ros2msg" | "ros2idl")).then_some(encoding)
}

/// Adds the channel of a publisher of a topic. `sample` is its first message.
fn add_channel(
    writer: &mut McapWriter,
    topic: &TopicInfo,
    (_, publisher, raw): ChannelKey,
    sample: Option<&[u8]>,
) -> Result<ChannelId, WriteBagError> {
    let recorded = topic.schema.as_ref();
    let (encoding, data) = recorded.map_or(("", &[][..]), |s| (s.encoding.as_str(), &s.data[..]));
    let text = String::from_utf8_lossy(data);
    let as_recorded = ForeignSchema {
        message_encoding: topic.encoding.name(),
        schema_encoding: encoding,
        schema_name: &topic.recorded_type,
        schema: data,
    };
    let translated: String;
    let ros2 = |text| ForeignSchema {
        message_encoding: "cdr",
        schema_encoding: "ros2msg",
        schema_name: &topic.type_name,
        schema: text,
    };
    let schema = match (&topic.encoding, encoding, raw) {
        (Encoding::Ros1, _, false) => {
            translated = schema::ros2msg_from_ros1(&topic.type_name, &text).unwrap_or_default();
            ros2(translated.as_bytes())
        }
        (Encoding::Cdr, "ros2msg", _) if !data.is_empty() => {
            ForeignSchema { schema_name: &topic.type_name, ..as_recorded }
        }
        // Recorders that find no definition write an empty one.
        (Encoding::Cdr, "" | "ros2msg", _) => {
            let samples: Vec<&[u8]> = sample.into_iter().collect();
            match definition_for(&topic.type_name, &samples) {
                Some(text) => ros2(text.as_bytes()),
                None if topic.type_name.is_empty() => as_recorded,
                None => ros2(&[]),
            }
        }
        _ => as_recorded,
    };
    writer.add_recorded(&topic.name, &schema, &metadata(topic, publisher, raw))
}

/// Metadata of a channel: as recorded, and what rosbag2 asks for.
fn metadata(topic: &TopicInfo, publisher: u32, raw: bool) -> BTreeMap<String, String> {
    let recorded = topic.publishers.get(publisher as usize);
    let mut metadata = recorded.map(|p| p.metadata.clone()).unwrap_or_default();
    if topic.encoding == Encoding::Ros1 {
        // The channel says these itself.
        for name in ["topic", "type"] {
            metadata.remove(name);
        }
    }
    if !raw {
        let latched = recorded.map_or(topic.latched, |p| p.latched);
        let qos = match topic.offered_qos.as_str() {
            "" if latched => super::offered_qos(true, true, 1),
            text => text.to_owned(),
        };
        metadata.entry("offered_qos_profiles".to_owned()).or_insert(qos);
        if let Some(hash) = &topic.type_hash {
            metadata.entry("topic_type_hash".to_owned()).or_insert_with(|| hash.clone());
        }
    }
    metadata
}
