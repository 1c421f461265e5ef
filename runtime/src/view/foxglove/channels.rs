//! The newest messages of each topic, for those who look: whoever is slow skips what was replaced meanwhile.

use super::schema::Kind;
use mindseye_base::sync::lock;
use mindseye_bridge::bag::ForeignSchema;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// Lines of the log that are kept for those who come later.
const LINES_KEPT: usize = 100;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// What the camera sees.
    Camera,
    /// The imagined drive, picture by picture.
    Imagined,
    /// The way driven.
    Way,
    /// The imagined way.
    Drive,
    /// Where to stand; no pose where none was given.
    Goal,
    /// What the page's map shows.
    Scene,
    /// What happens, in words.
    Log,
}

impl Topic {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Camera, Self::Imagined, Self::Way, Self::Drive, Self::Goal, Self::Scene, Self::Log];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Camera => "/mindseye/foxglove/camera",
            Self::Imagined => "/mindseye/foxglove/imagined",
            Self::Way => "/mindseye/foxglove/way",
            Self::Drive => "/mindseye/foxglove/imagined_way",
            Self::Goal => "/mindseye/foxglove/goal",
            Self::Scene => "/mindseye/foxglove/scene",
            Self::Log => "/mindseye/foxglove/log",
        }
    }

    /// Its schema.
    pub fn kind(self) -> Kind {
        match self {
            Self::Camera | Self::Imagined => Kind::CompressedImage,
            Self::Way | Self::Drive | Self::Goal => Kind::PosesInFrame,
            Self::Scene => Kind::SceneUpdate,
            Self::Log => Kind::Log,
        }
    }

    /// Its schema, as a recording names it.
    pub fn schema(self) -> ForeignSchema<'static> {
        ForeignSchema {
            message_encoding: "protobuf",
            schema_encoding: "protobuf",
            schema_name: self.kind().name(),
            schema: self.kind().descriptors(),
        }
    }

    /// Most messages that are kept.
    fn kept(self) -> usize {
        if self == Self::Log { LINES_KEPT } else { 1 }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Message {
    pub stamp_ns: i64,
    pub bytes: Arc<[u8]>,
}

#[derive(Default)]
struct Line {
    /// Messages so far.
    count: u64,
    kept: VecDeque<Message>,
}

#[derive(Default)]
pub(super) struct Channels(Mutex<BTreeMap<Topic, Line>>);

impl Channels {
    pub fn put(&self, topic: Topic, stamp_ns: i64, bytes: Vec<u8>) {
        let mut lines = lock(&self.0);
        let line = lines.entry(topic).or_default();
        line.count += 1;
        line.kept.push_back(Message { stamp_ns, bytes: bytes.into() });
        if line.kept.len() > topic.kept() {
            line.kept.pop_front();
        }
    }

    /// What came after the first `known` messages, as far as it is kept; `known` is then all.
    pub fn newer(&self, topic: Topic, known: &mut u64) -> Vec<Message> {
        let lines = lock(&self.0);
        let Some(line) = lines.get(&topic) else { return Vec::new() };
        let new = line.count.saturating_sub(std::mem::replace(known, line.count));
        let kept = line.kept.len();
        line.kept.iter().skip(kept.saturating_sub(new as usize)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_skipped_and_lines_of_the_log_are_not() {
        let channels = Channels::default();
        let (mut camera, mut log) = (0, 0);
        assert!(channels.newer(Topic::Camera, &mut camera).is_empty());
        for i in 0..5u8 {
            channels.put(Topic::Camera, i64::from(i), vec![i]);
            channels.put(Topic::Log, i64::from(i), vec![i]);
        }
        let stamps = |messages: Vec<Message>| messages.iter().map(|m| m.stamp_ns).collect::<Vec<_>>();
        assert_eq!(stamps(channels.newer(Topic::Camera, &mut camera)), [4]);
        assert_eq!(stamps(channels.newer(Topic::Log, &mut log)), [0, 1, 2, 3, 4]);
        assert!(channels.newer(Topic::Log, &mut log).is_empty());
        for i in 5..250 {
            channels.put(Topic::Log, i, vec![0]);
        }
        let late = stamps(channels.newer(Topic::Log, &mut log));
        assert_eq!((late.len(), late[0], late[99]), (LINES_KEPT, 150, 249));
    }
}
