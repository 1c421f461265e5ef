//! The JSON documents of `mindseye bag info` and `mindseye bag verify`.

use serde_json::{Value, json};

use super::{Bag, Damage, ImageReport, TopicInfo, VerifyReport};

fn damage_json(damage: &[Damage]) -> Vec<Value> {
    let one = |d: &Damage| {
        json!({
            "file": d.file,
            "chunk": d.chunk,
            "messages_lost": d.messages_lost,
            "bytes_lost": d.bytes_lost,
            "text": d.to_string(),
        })
    };
    damage.iter().map(one).collect()
}

fn topic_json(topic: &TopicInfo, count: u64) -> Value {
    json!({
        "name": topic.name,
        "type": topic.type_name,
        "count": count,
        "encoding": topic.encoding.name(),
        "latched": topic.latched,
        "hash": topic.type_hash,
    })
}

/// The document of `bag info`. With a [`VerifyReport`], its counts, times and damage take the place of those
/// of the index.
#[must_use]
pub fn info_json(bag: &Bag, read: Option<&VerifyReport>) -> Value {
    let info = bag.info();
    let topics: Vec<Value> = info
        .topics
        .iter()
        .enumerate()
        .map(|(at, topic)| topic_json(topic, read.map_or(topic.count, |r| r.topics[at].count)))
        .collect();
    json!({
        "format": info.format.to_string(),
        "compression": info.compression,
        "compression_mode": info.compression_mode,
        "messages": read.map_or(info.messages, |r| r.messages),
        "start_ns": read.map_or(info.start_ns, |r| r.start_ns),
        "end_ns": read.map_or(info.end_ns, |r| r.end_ns),
        "files": info.files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>(),
        "topics": topics,
        "damage": damage_json(read.map_or(&info.damage, |r| &r.damage)),
    })
}

/// The document of `bag verify`: that of `bag info`, with the digest of each topic and, where they were
/// asked for, the images.
#[must_use]
pub fn verify_json(bag: &Bag, read: &VerifyReport, images: Option<&[ImageReport]>) -> Value {
    let mut document = info_json(bag, Some(read));
    if let Some(topics) = document.get_mut("topics").and_then(Value::as_array_mut) {
        for (topic, report) in topics.iter_mut().zip(&read.topics) {
            topic["sha256"] = json!(report.sha256);
            topic["misfits"] = json!(report.misfits);
            if let Some(first) = &report.first_misfit {
                topic["first_misfit"] = json!(first);
            }
        }
    }
    if let Some(images) = images {
        document["images"] = images.iter().map(image_json).collect();
    }
    document
}

/// One image of `bag verify --images`.
#[must_use]
pub fn image_json(image: &ImageReport) -> Value {
    let mut value = json!({
        "topic": image.topic,
        "log_time": image.log_time_ns,
        "width": image.width,
        "height": image.height,
        "rgb_sha256": image.rgb_sha256,
    });
    if let Some(digest) = &image.depth_sha256 {
        value["depth_sha256"] = json!(digest);
    }
    if let Some(grid) = &image.grid8x6 {
        value["grid8x6"] = json!(grid);
    }
    if let Some(error) = &image.error {
        value["error"] = json!(error);
    }
    value
}
