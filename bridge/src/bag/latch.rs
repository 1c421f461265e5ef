//! Latched topics: which of the original publishers a message came from, so that each of them can have a publisher of
//! its own and a late subscriber gets what all of them kept.
//!
//! ROS 1 bags and some MCAP recorders tell the publishers apart. rosbag2 does not: it keeps the quality of service that
//! each of them offered, and puts their messages into one channel. There, transforms are told apart by their child
//! frames, and other messages are taken to come from the publishers in turn.

use super::{BagInfo, QosProfile, RawMessage, TopicInfo};

/// Most publishers that one topic gets; the last one carries all further ones.
const SLOTS_MAX: usize = 64;

/// True for topics whose earlier messages matter to those who come later.
pub(super) fn keeps_for_late(topic: &TopicInfo) -> bool {
    topic.latched || topic.name.trim_start_matches('/').ends_with("tf_static")
}

fn holds_transforms(topic: &TopicInfo) -> bool {
    topic.type_name.ends_with("/TFMessage") || topic.type_name.ends_with("/tfMessage")
}

/// One original publisher, as far as it is known.
#[derive(Clone, Debug)]
struct Slot {
    /// Publisher of the topic in the bag.
    recorded: u32,
    /// Child frames of its transforms.
    frames: Vec<String>,
}

#[derive(Debug)]
struct TopicSlots {
    keeps: bool,
    transforms: bool,
    profiles: Vec<QosProfile>,
    slots: Vec<Slot>,
    /// Messages so far, for those that are given out in turn.
    turn: usize,
}

impl TopicSlots {
    fn new(topic: &TopicInfo) -> Self {
        let profiles = topic.qos_profiles();
        let count = topic.publishers.len().max(profiles.len()).clamp(1, SLOTS_MAX);
        let (keeps, transforms) = (keeps_for_late(topic), holds_transforms(topic));
        let slots = if keeps {
            let several = topic.publishers.len() > 1;
            let slot = |at: usize| Slot { recorded: if several { at as u32 } else { 0 }, frames: Vec::new() };
            (0..count).map(slot).collect()
        } else {
            vec![Slot { recorded: 0, frames: Vec::new() }]
        };
        Self { keeps, transforms, profiles, slots, turn: 0 }
    }

    fn of(&mut self, recorded: u32, cdr: &[u8]) -> usize {
        if !self.keeps {
            return 0;
        }
        if self.transforms {
            return self.of_transforms(recorded, child_frames(cdr).unwrap_or_default());
        }
        let mine: Vec<usize> =
            (0..self.slots.len()).filter(|at| self.slots[*at].recorded == recorded).collect();
        self.turn += 1;
        // More publishers than there is room for.
        mine.get((self.turn - 1) % mine.len().max(1)).copied().unwrap_or(self.slots.len() - 1)
    }

    /// A broadcaster sends what it sent before once more, with what is new.
    fn of_transforms(&mut self, recorded: u32, frames: Vec<String>) -> usize {
        let continues = |slot: &Slot| {
            slot.recorded == recorded
                && !slot.frames.is_empty()
                && slot.frames.iter().all(|f| frames.contains(f))
        };
        let free = |slot: &Slot| slot.recorded == recorded && slot.frames.is_empty();
        let at = self.slots.iter().position(continues).or_else(|| self.slots.iter().position(free));
        let at = at.unwrap_or_else(|| {
            if self.slots.len() < SLOTS_MAX {
                self.slots.push(Slot { recorded, frames: Vec::new() });
            }
            self.slots.len() - 1
        });
        self.slots[at].frames = frames;
        at
    }
}

/// Gives every message of a bag a publisher of its topic: 0 for topics that are not latched.
#[derive(Debug)]
pub struct PublisherSlots {
    topics: Vec<TopicSlots>,
}

impl PublisherSlots {
    /// Prepares the topics of a bag.
    #[must_use]
    pub fn new(info: &BagInfo) -> Self {
        Self { topics: info.topics.iter().map(TopicSlots::new).collect() }
    }

    /// How many publishers a topic has, as far as is known by now.
    #[must_use]
    pub fn count(&self, topic: super::TopicId) -> usize {
        self.topics[topic.0 as usize].slots.len()
    }

    /// The quality of service that one publisher of a topic offered; `None` when it was not recorded.
    #[must_use]
    pub fn profile(&self, topic: super::TopicId, slot: usize) -> Option<QosProfile> {
        let profiles = &self.topics[topic.0 as usize].profiles;
        profiles.get(slot).or(profiles.last()).copied()
    }

    /// The publisher of a message. Messages must be given in the order in which they are sent; `cdr` is the message as
    /// little-endian CDR.
    pub fn of(&mut self, message: &RawMessage, cdr: &[u8]) -> usize {
        self.topics[message.topic.0 as usize].of(message.publisher, cdr)
    }
}

/// How many messages each recorded publisher of a latched topic keeps for late subscribers; `None`: all of them.
pub(super) fn kept_depth(topic: &TopicInfo) -> Option<usize> {
    /// More than this no publisher keeps.
    const DEPTH_MAX: usize = 1000;
    if holds_transforms(topic) {
        return None;
    }
    let profiles = topic.qos_profiles();
    let depth = |profile: &QosProfile| profile.depth.map_or(DEPTH_MAX, |d| d as usize);
    let depth = match profiles.first() {
        None => 1,
        Some(first) if topic.publishers.len() > 1 => depth(first),
        // The messages of all of them are in one channel.
        Some(_) => profiles.iter().filter(|p| p.transient_local).map(depth).sum(),
    };
    Some(depth.clamp(1, DEPTH_MAX))
}

/// Child frames of a `tf2_msgs/msg/TFMessage` (little-endian CDR), sorted.
fn child_frames(cdr: &[u8]) -> Option<Vec<String>> {
    /// Translation and rotation.
    const TRANSFORM_BYTES: usize = 7 * 8;
    let body = cdr.get(4..)?;
    let mut at = 0;
    let count = word(body, &mut at)?;
    let mut frames = Vec::new();
    for _ in 0..count {
        at = at.next_multiple_of(4) + 8;
        let parent = word(body, &mut at)? as usize;
        at = at.checked_add(parent)?;
        let len = word(body, &mut at)? as usize;
        let text = body.get(at..at.checked_add(len)?)?;
        frames.push(String::from_utf8_lossy(text.strip_suffix(b"\0").unwrap_or(text)).into_owned());
        at = (at + len).next_multiple_of(8) + TRANSFORM_BYTES;
    }
    frames.sort();
    Some(frames)
}

/// A 4-byte number at the next place where one can stand.
fn word(body: &[u8], at: &mut usize) -> Option<u32> {
    let start = at.next_multiple_of(4);
    *at = start.checked_add(4)?;
    Some(u32::from_le_bytes(body.get(start..*at)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bag::{Encoding, PublisherInfo, offered_qos};

    fn transforms(children: &[&str]) -> Vec<u8> {
        let mut body = (children.len() as u32).to_le_bytes().to_vec();
        let text = |body: &mut Vec<u8>, text: &str| {
            body.resize(body.len().next_multiple_of(4), 0);
            body.extend((text.len() as u32 + 1).to_le_bytes());
            body.extend(text.as_bytes());
            body.push(0);
        };
        for child in children {
            body.resize(body.len().next_multiple_of(4) + 8, 0);
            text(&mut body, "base_link");
            text(&mut body, child);
            body.resize(body.len().next_multiple_of(8) + 56, 0);
        }
        [&[0, 1, 0, 0][..], &body].concat()
    }

    #[test]
    fn child_frames_are_found() {
        assert_eq!(
            child_frames(&transforms(&["laser", "imu_link", "c"])).unwrap(),
            ["c", "imu_link", "laser"]
        );
        assert_eq!(child_frames(&transforms(&[])).unwrap(), Vec::<String>::new());
        assert_eq!(child_frames(&transforms(&["laser"])[..30]), None);
        assert_eq!(child_frames(&[0, 1, 0, 0, 255, 255, 255, 255]), None);
    }

    #[test]
    fn every_original_publisher_has_a_slot() {
        let mut tf = TopicInfo::new("/tf_static", "tf2_msgs/msg/TFMessage", Encoding::Cdr);
        tf.offered_qos = offered_qos(true, true, 1).repeat(2);
        tf.publishers = vec![PublisherInfo::default()];
        let mut slots = TopicSlots::new(&tf);
        assert_eq!(slots.slots.len(), 2);
        // children, slot
        let sent: [(&[&str], usize); 5] =
            [(&["a"], 0), (&["b"], 1), (&["a", "c"], 0), (&["d"], 2), (&["b"], 1)];
        for (children, want) in sent {
            assert_eq!(slots.of(0, &transforms(children)), want, "{children:?}");
        }
        let mut map = TopicInfo::new("/map", "std_msgs/msg/String", Encoding::Cdr);
        map.latched = true;
        map.offered_qos = offered_qos(true, true, 1).repeat(3);
        map.publishers = vec![PublisherInfo::default()];
        let mut slots = TopicSlots::new(&map);
        assert_eq!([slots.of(0, &[]), slots.of(0, &[]), slots.of(0, &[]), slots.of(0, &[])], [0, 1, 2, 0]);
        assert_eq!((kept_depth(&map), kept_depth(&tf)), (Some(3), None));
        // Recorded apart: the last one of each.
        map.offered_qos = String::new();
        map.publishers = vec![PublisherInfo::default(); 2];
        let mut slots = TopicSlots::new(&map);
        assert_eq!([slots.of(1, &[]), slots.of(1, &[]), slots.of(0, &[])], [1, 1, 0]);
        assert_eq!(kept_depth(&map), Some(1));
        let plain = TopicInfo::new("/a", "std_msgs/msg/String", Encoding::Cdr);
        assert_eq!(TopicSlots::new(&plain).of(3, &[]), 0);
    }
}
