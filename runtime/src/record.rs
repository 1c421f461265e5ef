//! Recording to MCAP, on a thread of its own behind a bounded queue: a slow or full disk never holds up the
//! runtime. What does not fit into the queue is dropped and counted; after a write error recording ends with one
//! clear line and the runtime goes on.

use mindseye_bridge::bag::{ChannelId, ForeignSchema, McapWriter, WriteBagError, schema};
use mindseye_bridge::msg::RosType;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

/// Messages that may wait for the disk.
const QUEUE: usize = 512;

struct Item {
    topic: String,
    kind: Kind,
    stamp_ns: i64,
    bytes: Vec<u8>,
}

/// What the bytes are.
enum Kind {
    /// CDR of a type with its hash.
    Cdr(&'static str, &'static str),
    /// Of another middleware.
    Foreign(ForeignSchema<'static>),
}

/// A handle for those who have something to record.
#[derive(Clone)]
pub struct RecordSender {
    sender: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
    failed: Arc<AtomicBool>,
}

impl RecordSender {
    /// Records one message, or counts it as dropped.
    pub fn message<T: RosType>(&self, topic: &str, stamp_ns: i64, message: &T) {
        self.cdr(topic, T::NAME, T::HASH, stamp_ns, &message.encode());
    }

    /// Records one message that is CDR already.
    pub fn cdr(&self, topic: &str, type_name: &'static str, hash: &'static str, stamp_ns: i64, cdr: &[u8]) {
        self.send(topic, Kind::Cdr(type_name, hash), stamp_ns, cdr.to_vec());
    }

    /// Records one message of another middleware, or counts it as dropped.
    pub fn foreign(&self, topic: &str, schema: ForeignSchema<'static>, stamp_ns: i64, bytes: Vec<u8>) {
        self.send(topic, Kind::Foreign(schema), stamp_ns, bytes);
    }

    fn send(&self, topic: &str, kind: Kind, stamp_ns: i64, bytes: Vec<u8>) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        let item = Item { topic: topic.to_owned(), kind, stamp_ns, bytes };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.sender.try_send(item) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records one message, waiting for the disk when the queue is full. Not for live robots.
    pub fn message_waiting<T: RosType>(&self, topic: &str, stamp_ns: i64, message: &T) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        let (kind, bytes) = (Kind::Cdr(T::NAME, T::HASH), message.encode());
        let item = Item { topic: topic.to_owned(), kind, stamp_ns, bytes };
        if self.sender.send(item).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Messages dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// A recording in progress.
pub struct Recorder {
    sender: Option<RecordSender>,
    thread: Option<JoinHandle<Result<u64, WriteBagError>>>,
}

impl Recorder {
    /// Starts recording to `path`.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn start(path: &Path) -> Result<Self, WriteBagError> {
        Self::write(McapWriter::create(path)?, path)
    }

    /// The file beside the recording `path` that holds what is not ROS's: `NAME.foxglove.mcap`.
    pub fn beside(path: &Path) -> PathBuf {
        path.with_extension("foxglove.mcap")
    }

    /// Starts recording what is not ROS's to a file of its own ([`Recorder::beside`]): rosbag2 refuses a file whose
    /// topics are encoded differently.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn start_beside(path: &Path) -> Result<Self, WriteBagError> {
        let path = Self::beside(path);
        Self::write(McapWriter::create_with_profile(&path, "")?, &path)
    }

    fn write(writer: McapWriter, path: &Path) -> Result<Self, WriteBagError> {
        let (sender, receiver) = sync_channel(QUEUE);
        let failed = Arc::new(AtomicBool::new(false));
        let flag = failed.clone();
        let thread = std::thread::Builder::new()
            .name("record".into())
            .spawn(move || {
                let result = write_all(writer, &receiver);
                if let Err(error) = &result {
                    flag.store(true, Ordering::Relaxed);
                    tracing::error!(%error, "recording ended; the runtime goes on without it");
                    // Senders notice the flag; what is queued is let go.
                    while receiver.recv().is_ok() {}
                }
                result
            })
            .map_err(|source| WriteBagError::Io { path: path.to_owned(), source })?;
        let sender = RecordSender { sender, dropped: Arc::default(), failed };
        Ok(Self { sender: Some(sender), thread: Some(thread) })
    }

    /// A handle for another thread. All handles must be gone before [`Recorder::finish`] returns.
    pub fn sender(&self) -> Option<RecordSender> {
        self.sender.clone()
    }

    /// Writes the rest and the summary; returns the number of messages written.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn finish(mut self) -> Result<u64, WriteBagError> {
        self.sender = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Ok(0), // the writer's thread panicked; it has said so
        }
    }
}

fn write_all(mut writer: McapWriter, receiver: &Receiver<Item>) -> Result<u64, WriteBagError> {
    let mut channels: HashMap<String, ChannelId> = HashMap::new();
    while let Ok(item) = receiver.recv() {
        let channel = match channels.get(&item.topic) {
            Some(channel) => *channel,
            None => {
                let channel = match &item.kind {
                    Kind::Cdr(name, hash) => {
                        let text = schema::ros2msg(name).unwrap_or_default();
                        writer.add_channel(&item.topic, name, text, Some(hash), "")?
                    }
                    Kind::Foreign(schema) => writer.add_foreign_channel(&item.topic, schema)?,
                };
                channels.insert(item.topic.clone(), channel);
                channel
            }
        };
        writer.write(channel, item.stamp_ns.max(0), item.stamp_ns.max(0), &item.bytes)?;
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_bridge::msg::StringMsg;

    #[test]
    fn messages_are_written_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.mcap");
        let recorder = Recorder::start(&path).unwrap();
        let sender = recorder.sender().unwrap();
        for i in 0..100 {
            sender.message_waiting("/a", i, &StringMsg { data: "x".into() });
            sender.message_waiting("/b", i, &StringMsg { data: "y".into() });
        }
        drop(sender);
        assert_eq!(recorder.finish().unwrap(), 200);
        assert!(path.exists());
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Recorder::start(&dir.path().join("none/a.mcap")).err().unwrap();
        assert!(error.to_string().contains("a.mcap"), "{error}");
    }

    /// A full disk: `/dev/full` refuses every write.
    #[test]
    fn a_full_disk_ends_the_recording_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let recorder = Recorder::start(&dir.path().join("a.mcap")).unwrap();
        let sender = recorder.sender().unwrap();
        sender.failed.store(true, Ordering::Relaxed);
        for i in 0..10_000 {
            sender.message("/a", i, &StringMsg { data: "x".into() });
        }
        assert_eq!(sender.dropped(), 0, "after a failure nothing is queued");
        drop(sender);
        recorder.finish().unwrap();
    }
}
