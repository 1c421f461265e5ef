//! Writing what can be read of a bag as a clean MCAP file.

use std::path::{Path, PathBuf};

use super::cdr::{CdrConverter, ConvertError};
use super::writer::{ForeignSchema, McapWriter, WriteBagError};
use super::{Bag, ChannelId, Damage, Encoding, ReadOptions, TopicInfo, schema};

/// What [`rewrite_as_mcap`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConvertReport {
    /// Messages written.
    pub messages: u64,
    /// The caller ended it early; what was written until then is a good file.
    pub stopped: bool,
    /// What could not be read, or could not be turned into CDR.
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
}

/// Writes the messages of `bag` that `options` select to a new MCAP file with profile `ros2`: ROS messages as
/// little-endian CDR with `ros2msg` definitions, others as they are. Stamps are kept.
///
/// `go_on` is called with the number of messages so far; when it says false the file is finished early.
///
/// # Errors
/// The output cannot be written, or is an input. Nothing is left behind then.
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
    let mut writer = McapWriter::create(out)?;
    let mut channels = Vec::new();
    for topic in &info.topics {
        let wanted = options.topics.as_ref().is_none_or(|names| names.contains(&topic.name));
        channels.push(if wanted { Some(add_channel(&mut writer, topic)?) } else { None });
    }
    let mut converter = CdrConverter::new(info);
    let mut misfits: Vec<(u64, String)> = vec![(0, String::new()); info.topics.len()];
    let mut early = 0;
    let mut stopped = false;
    let mut messages = bag.messages(options);
    for message in &mut messages {
        let at = message.topic.0 as usize;
        let Some((channel, as_is)) = channels[at] else { continue };
        if message.log_time_ns < 0 || message.publish_time_ns < 0 {
            early += 1;
            continue;
        }
        let bytes = if as_is {
            &message.data[..]
        } else {
            match converter.convert(&message) {
                Ok(cdr) => cdr,
                // Big-endian CDR without a definition, or bytes that do not fit it: kept as recorded.
                Err(_) if info.topics[at].encoding == Encoding::Cdr => &message.data,
                Err(ConvertError::Foreign { .. }) => &message.data,
                Err(e) => {
                    let (count, first) = &mut misfits[at];
                    *count += 1;
                    if first.is_empty() {
                        *first = e.to_string();
                    }
                    continue;
                }
            }
        };
        writer.write(channel, message.log_time_ns, message.publish_time_ns, bytes)?;
        if !go_on(writer.messages()) {
            stopped = true;
            break;
        }
    }
    let mut damage: Vec<Damage> = info.damage.iter().chain(messages.damage()).cloned().collect();
    let name = info.files.first().map(|f| super::file_label(f)).unwrap_or_default();
    for (count, why) in misfits.into_iter().filter(|(count, _)| *count > 0) {
        damage.push(Damage::new(&name, why).messages(Some(count)));
    }
    if early > 0 {
        damage.push(Damage::new(&name, "stamps before 1970 have no place in MCAP").messages(Some(early)));
    }
    let messages = writer.finish()?;
    Ok(ConvertReport { messages, stopped, damage })
}

/// The channel of a topic, and whether its messages are copied as they are.
fn add_channel(writer: &mut McapWriter, topic: &TopicInfo) -> Result<(ChannelId, bool), WriteBagError> {
    let text = topic.schema.as_ref().and_then(|s| s.text()).unwrap_or("");
    let encoding = topic.schema.as_ref().map_or("", |s| s.encoding.as_str());
    let ros1 = schema::ros2msg_from_ros1(&topic.type_name, text);
    let definition = match (&topic.encoding, encoding) {
        (Encoding::Ros1, _) => ros1.ok(),
        (Encoding::Cdr, "ros2msg") => Some(text.to_owned()),
        (Encoding::Cdr, "ros2idl") => None,
        (Encoding::Cdr, _) => Some(schema::ros2msg(&topic.type_name).unwrap_or("").to_owned()),
        _ => None,
    };
    if let Some(definition) = definition {
        let hash = topic.type_hash.as_deref();
        let qos = if topic.offered_qos.is_empty() && topic.latched {
            super::offered_qos(true, true, 1)
        } else {
            topic.offered_qos.clone()
        };
        let channel = writer.add_channel(&topic.name, &topic.type_name, &definition, hash, &qos)?;
        return Ok((channel, false));
    }
    let schema = ForeignSchema {
        message_encoding: topic.encoding.name(),
        schema_encoding: encoding,
        schema_name: &topic.type_name,
        schema: topic.schema.as_ref().map_or(&[], |s| &s.data[..]),
    };
    Ok((writer.add_foreign_channel(&topic.name, &schema)?, true))
}
