//! The JSON documents of `mindseye bag info` and `mindseye bag verify`.

use serde_json::{Value, json};

use super::{Attachment, Bag, Damage, ImageReport, MetadataRecord, TopicInfo, VerifyReport};

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
        "definition": topic.schema.as_ref().map(|s| s.encoding.as_str()),
        "publishers": topic.publishers.len(),
        "qos": topic.qos_profiles().iter().map(|p| json!({
            "reliable": p.reliable,
            "transient_local": p.transient_local,
            "depth": p.depth,
        })).collect::<Vec<_>>(),
    })
}

fn attachment_json(attachment: &Attachment) -> Value {
    json!({
        "name": attachment.name,
        "media_type": attachment.media_type,
        "bytes": attachment.bytes,
        "log_time_ns": attachment.log_time_ns,
        "create_time_ns": attachment.create_time_ns,
    })
}

fn metadata_json(record: &MetadataRecord) -> Value {
    json!({ "name": record.name, "entries": record.entries })
}

/// A time in nanoseconds since the Unix epoch as ISO 8601 in UTC, with nanoseconds.
///
/// ```
/// use mindseye_bridge::bag::report::utc;
/// assert_eq!(utc(1_700_000_000_000_000_001), "2023-11-14T22:13:20.000000001Z");
/// ```
#[must_use]
pub fn utc(ns: i64) -> String {
    const DAY: i64 = 86_400;
    let (seconds, nanos) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
    // Days since 0000-03-01 in eras of 400 years, so that the leap day is the last one of a year.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + carry;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
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
    let (start_ns, end_ns) = read.map_or((info.start_ns, info.end_ns), |r| (r.start_ns, r.end_ns));
    json!({
        "format": info.format.to_string(),
        "profile": info.profile,
        "compression": info.compression,
        "compression_mode": info.compression_mode,
        "messages": read.map_or(info.messages, |r| r.messages),
        "start_ns": start_ns,
        "end_ns": end_ns,
        "start": utc(start_ns),
        "end": utc(end_ns),
        "unstamped": read.map(|r| r.unstamped),
        "files": info.files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>(),
        "topics": topics,
        "attachments": info.attachments.iter().map(attachment_json).collect::<Vec<_>>(),
        "metadata": info.metadata.iter().map(metadata_json).collect::<Vec<_>>(),
        "private_records": info.private.len(),
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
    value["error"] = json!(image.error);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        const S: i64 = 1_000_000_000;
        // seconds, date
        let cases = [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
            (-1, "1969-12-31T23:59:59.000000000Z"),
        ];
        for (seconds, want) in cases {
            assert_eq!(utc(seconds * S), want);
        }
    }
}
