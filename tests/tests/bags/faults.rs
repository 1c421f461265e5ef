//! Faults that users report of bags: messages, definitions and records that must not be lost without a word.

use std::fs;
use std::path::Path;

use mindseye_bridge::bag::{
    Bag, HashBasis, OpenOptions, ReadOptions, open, open_bytes, report, rewrite_as_mcap, type_key,
};

use super::made::{Connection, Mcap, attachment, channel, metadata, record, ros1_bag, schema, string_cdr};
use super::{opened, read};

const S: u64 = 1_000_000_000;
const T: u64 = 1_700_000_000 * S;

fn of_bytes(bytes: &[u8]) -> Bag {
    open_bytes("made", bytes, &OpenOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn said(bag: &Bag) -> String {
    read(bag).damage.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// A file of strings on `/a`, channel 1.
fn strings() -> Mcap {
    let mut made = Mcap::new("ros2");
    made.declare(schema(1, "std_msgs/msg/String", "ros2msg", b"string data\n"));
    made.declare(channel(1, 1, "/a", "cdr", &[]));
    made
}

fn put(logs: &[u64]) -> Vec<(u16, u32, u64, Vec<u8>)> {
    logs.iter().zip(5..).map(|(log, n)| (1, n, *log, string_cdr("x"))).collect()
}

#[test]
fn messages_without_a_time_and_outside_chunks_are_read() {
    let unstamped = {
        let mut made = strings();
        made.chunk((0, 0), &put(&[0, 0]), &[], true);
        made.chunk((T, T + S), &put(&[T, T + S]), &[], true);
        made.finish()
    };
    let mixed = {
        // Writers that take 0 for "none" leave it out of the range.
        let mut made = strings();
        made.chunk((T, T + S), &put(&[0, T, T + S]), &[], true);
        made.finish()
    };
    let mixed_later = {
        let mut made = strings();
        made.chunk((0, 0), &put(&[0]), &[], true);
        made.chunk((T, T), &put(&[0, T]), &[], true);
        made.chunk((T + S, T + S), &put(&[T + S]), &[], true);
        made.finish()
    };
    let unindexed = {
        let mut made = strings();
        made.chunk((0, 0), &put(&[0, 0]), &[], false);
        made.chunk((T, T), &put(&[T]), &[], true);
        made.finish()
    };
    let outside = {
        let mut made = strings();
        made.chunk((T, T), &put(&[T]), &[], true);
        made.bare(1, T + S, &string_cdr("y"));
        made.chunk((T + 2 * S, T + 2 * S), &put(&[T + 2 * S]), &[], true);
        made.bare(1, T + 3 * S, &string_cdr("y"));
        made.finish()
    };
    // file, messages, of them without a time, first time, last time
    let cases = [
        ("unstamped", unstamped, 4, 2, 0, T + S),
        ("mixed", mixed, 3, 1, 0, T + S),
        ("mixed later", mixed_later, 4, 2, 0, T + S),
        ("unindexed", unindexed, 3, 2, 0, T),
        ("outside", outside, 4, 0, T, T + 3 * S),
    ];
    for (name, bytes, messages, none, start, end) in cases {
        let bag = of_bytes(&bytes);
        let got = read(&bag);
        assert_eq!((got.messages, got.unstamped), (messages, none), "{name}");
        assert_eq!((got.start_ns as u64, got.end_ns as u64), (start, end), "{name}");
        assert_eq!(bag.info().messages, messages, "{name}: by the index");
        assert_eq!((bag.info().start_ns as u64, bag.first_stamp_ns() as u64), (start, T), "{name}");
        assert_eq!(got.damage, [], "{name}");
        let ordered: Vec<i64> = bag.messages(&ReadOptions::default()).map(|m| m.log_time_ns).collect();
        assert!(ordered.is_sorted(), "{name}: {ordered:?}");
    }
}

#[test]
fn what_is_read_is_held_against_the_statistics() {
    let more = |indexed: bool| {
        let mut made = strings();
        made.chunk((T, T + S), &put(&[T, T + S]), &[], indexed);
        made.more = 3;
        made.finish()
    };
    let renamed = {
        // A channel that names a schema which is not there, and one that changes.
        let mut made = strings();
        made.declare(channel(2, 9, "/b", "cdr", &[]));
        made.put(&channel(1, 1, "/other", "cdr", &[]));
        made.bare(1, T, &string_cdr("x"));
        made.finish()
    };
    let cases = [
        ("indexed", more(true), 2, "messages lost: 3"),
        ("not indexed", more(false), 2, "messages lost: 3"),
        ("no schema", renamed.clone(), 1, "channel 2 (/b) names schema 9, which is not in the file"),
        ("declared twice", renamed, 1, "channel 1 (/other) is declared twice"),
    ];
    for (name, bytes, messages, want) in cases {
        let bag = of_bytes(&bytes);
        assert_eq!(read(&bag).messages, messages, "{name}");
        assert!(said(&bag).contains(want), "{name}: {}", said(&bag));
    }
}

fn converted(bag: &Bag, dir: &Path) -> (Bag, Vec<String>) {
    let out = dir.join("out.mcap");
    let report = rewrite_as_mcap(bag, &out, &ReadOptions::default(), &mut |_| true).unwrap();
    assert_eq!(report.damage, []);
    (opened(&out), report.kept)
}

#[test]
fn rewriting_keeps_everything_that_lies_beside_the_messages() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = strings();
    let private = record(0x91, b"only we know");
    made.put(&attachment("calibration.yaml", "text/yaml", b"fx: 400\n"));
    made.put(&attachment("big.bin", "", &vec![7; 3 << 20]));
    made.put(&metadata("recording", &[("operator", "someone"), ("site", "hall 3")]));
    made.put(&record(0x90, b"between"));
    made.declare(channel(2, 1, "/latched", "cdr", &[("callerid", "/one"), ("latching", "1")]));
    made.declare(channel(3, 1, "/latched", "cdr", &[("callerid", "/two"), ("latching", "1")]));
    made.declare(schema(2, "demo::Reading", "omgidl", b"struct Reading { double value; };"));
    made.declare(channel(4, 2, "/reading", "cdr", &[("unit", "m")]));
    made.declare(channel(5, 0, "/blob", "x-own", &[]));
    let messages = vec![
        (1, 70, T, string_cdr("x")),
        (2, 8, T, string_cdr("a")),
        (3, 9, T, string_cdr("b")),
        (4, 1, T, vec![0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (5, 0, T, vec![1, 2, 3]),
    ];
    made.chunk((T, T), &messages, &private, true);
    let bag = of_bytes(&made.finish());
    let (again, kept) = converted(&bag, dir.path());
    let (was, is) = (bag.info(), again.info());
    assert_eq!(is.metadata, was.metadata);
    assert_eq!(was.attachments.len(), 2);
    let content = |bag: &Bag, at: usize| {
        let mut bytes = Vec::new();
        let attachment = bag.info().attachments[at].clone();
        let mut each = |piece: &[u8]| -> std::io::Result<()> {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        bag.read_attachment(&attachment, &mut each).unwrap();
        (attachment.name, attachment.media_type, attachment.log_time_ns, attachment.create_time_ns, bytes)
    };
    assert_eq!((content(&again, 0), content(&again, 1)), (content(&bag, 0), content(&bag, 1)));
    assert_eq!(content(&again, 0).4, b"fx: 400\n");
    let records: Vec<(u8, &[u8])> = is.private.iter().map(|r| (r.opcode, &r.data[..])).collect();
    assert_eq!(records, [(0x90, &b"between"[..]), (0x91, b"only we know")]);
    let topic = |bag: &Bag, name: &str| bag.info().topics.iter().find(|t| t.name == name).cloned().unwrap();
    assert_eq!(topic(&again, "/reading").schema, topic(&bag, "/reading").schema);
    assert_eq!(topic(&again, "/reading").recorded_type, "demo::Reading");
    assert_eq!(topic(&again, "/reading").publishers[0].metadata["unit"], "m");
    let callers: Vec<String> =
        topic(&again, "/latched").publishers.iter().map(|p| p.metadata["callerid"].clone()).collect();
    assert_eq!(callers, ["/one", "/two"]);
    assert_eq!(topic(&again, "/blob").encoding.name(), "x-own");
    type Row = (String, u32, u32, i64, i64, Vec<u8>);
    let rows = |bag: &Bag| -> Vec<Row> {
        let one = |m: mindseye_bridge::bag::RawMessage| {
            let name = bag.info().topic(m.topic).name.clone();
            (name, m.publisher, m.sequence, m.log_time_ns, m.publish_time_ns, m.data.to_vec())
        };
        let mut rows: Vec<Row> = bag.messages(&ReadOptions::default()).map(one).collect();
        rows.sort();
        rows
    };
    assert_eq!(rows(&again), rows(&bag));
    let kept = kept.join("\n");
    for want in ["/reading: its definition, which is omgidl", "/blob: x-own is not ROS"] {
        assert!(kept.contains(want), "{kept}");
    }
    // What is in the file is told.
    let document = report::info_json(&again, None);
    assert_eq!(document["attachments"][0]["name"], "calibration.yaml");
    assert_eq!(document["metadata"][0]["entries"]["site"], "hall 3");
    assert_eq!((&document["private_records"], &document["topics"][1]["publishers"]), (&2.into(), &2.into()));
}

/// A ROS 1 header and a number.
fn stamped(seconds: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [9, seconds, 5, 1] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes.push(b'c');
    bytes.extend(1.5f64.to_le_bytes());
    bytes
}

#[test]
fn ros1_definitions_that_others_pass_over_are_read() {
    let header =
        format!("{}\nMSG: std_msgs/Header\nuint32 seq\ntime stamp\nstring frame_id\n", "=".repeat(80));
    let mut latin = b"Header header # 20 \xb0C\nfloat64 x\n".to_vec();
    latin.extend(header.as_bytes());
    let backslashes = format!("Header header\n\\\nfloat64 x\n\\\n\\\n\n{header}");
    let cases: Vec<(&str, &str, Vec<u8>, Vec<u8>)> = vec![
        ("without its header", "demo/Level", b"Header header\nfloat64 x\n".to_vec(), stamped(7)),
        ("with backslashes", "demo/Level", backslashes.into_bytes(), stamped(7)),
        ("in Latin-1", "demo/Level", latin, stamped(7)),
        ("empty", "std_msgs/Empty", Vec::new(), Vec::new()),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (name, type_name, definition, data) in cases {
        let connection = Connection { topic: "/t", type_name, definition: &definition, more: &[] };
        let messages = [(0, 7, data.clone()), (0, 8, data)];
        let bag = of_bytes(&ros1_bag(&[connection], &messages, &[], false));
        let got = read(&bag);
        assert_eq!((got.messages, got.topics[0].misfits), (2, 0), "{name}: {:?}", got.topics[0].first_misfit);
        let (again, kept) = converted(&bag, dir.path());
        assert_eq!((read(&again).messages, kept), (2, Vec::<String>::new()), "{name}");
        let topic = &again.info().topics[0];
        assert_eq!(topic.encoding.name(), "cdr", "{name}");
        if type_name == "demo/Level" {
            let mut messages = again.messages(&ReadOptions::default());
            // Stamp 7.000000005, frame "c", padding, 1.5.
            let mut want = vec![0, 1, 0, 0, 7, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0, b'c', 0, 0, 0];
            want.extend(1.5f64.to_le_bytes());
            assert_eq!(&messages.next().unwrap().data[..], want, "{name}");
        }
    }
    // The same in an MCAP of profile ros1.
    let mut made = Mcap::new("ros1");
    made.declare(schema(1, "std_msgs/Empty", "ros1msg", b""));
    made.declare(channel(1, 1, "/start", "ros1", &[]));
    made.chunk((T, T), &[(1, 0, T, Vec::new())], &[], true);
    let (again, _) = converted(&of_bytes(&made.finish()), dir.path());
    assert_eq!(read(&again).messages, 1);
}

#[test]
fn what_cannot_be_translated_is_kept_as_ros1() {
    let connections = [
        Connection { topic: "/odd", type_name: "demo/Odd", definition: b"what is this\n[]\n", more: &[] },
        Connection {
            topic: "/short",
            type_name: "std_msgs/Float64",
            definition: b"float64 data\n",
            more: &[],
        },
    ];
    let messages = [(0, 1, vec![1, 2, 3]), (1, 2, 2.5f64.to_le_bytes().to_vec()), (1, 3, vec![9])];
    let bag = of_bytes(&ros1_bag(&connections, &messages, &[], false));
    let dir = tempfile::tempdir().unwrap();
    let (again, kept) = converted(&bag, dir.path());
    let rows: Vec<(String, String, Vec<u8>)> = again
        .messages(&ReadOptions::default())
        .map(|m| {
            let topic = again.info().topic(m.topic);
            (topic.name.clone(), topic.encoding.name().to_owned(), m.data.to_vec())
        })
        .collect();
    let cdr = [&[0, 1, 0, 0][..], &2.5f64.to_le_bytes()].concat();
    let row = |name: &str, encoding: &str, data: &[u8]| (name.to_owned(), encoding.to_owned(), data.to_vec());
    assert_eq!(
        rows,
        [row("/odd", "ros1", &[1, 2, 3]), row("/short", "cdr", &cdr), row("/short", "ros1", &[9])]
    );
    let odd = again.info().topics.iter().find(|t| t.name == "/odd").unwrap();
    assert_eq!(
        (odd.recorded_type.as_str(), odd.schema.as_ref().unwrap().encoding.as_str()),
        ("demo/Odd", "ros1msg")
    );
    assert_eq!(odd.schema.as_ref().unwrap().text(), Some("what is this\n[]\n"));
    let kept = kept.join("\n");
    assert!(
        kept.contains("1 messages of /odd as ros1") && kept.contains("1 messages of /short as ros1"),
        "{kept}"
    );
}

#[test]
fn ros1_messages_that_the_index_does_not_know_are_read() {
    let connection = |latching: &'static [u8]| {
        let more: &'static [(&str, &[u8])] = match latching {
            b"1" => &[("latching", b"1"), ("callerid", b"/one")],
            _ => &[],
        };
        Connection { topic: "/n", type_name: "std_msgs/UInt8", definition: b"uint8 data\n", more }
    };
    let messages = |n: u8| (0..n).map(|i| (0, u32::from(i) + 1, vec![i])).collect::<Vec<_>>();
    let cases = [
        ("silent index", ros1_bag(&[connection(b"0")], &messages(3), &[], true), 3),
        ("outside the chunk", ros1_bag(&[connection(b"1")], &messages(2), &[(0, 9, vec![9])], false), 3),
    ];
    for (name, bytes, want) in cases {
        let bag = of_bytes(&bytes);
        assert_eq!(read(&bag).messages, want, "{name}: {}", said(&bag));
        assert_eq!(bag.info().messages, want, "{name}");
    }
    let bag = of_bytes(&ros1_bag(&[connection(b"1")], &messages(2), &[], false));
    let topic = &bag.info().topics[0];
    assert!(topic.latched && topic.publishers[0].metadata["callerid"] == "/one");
}

#[test]
fn a_marker_of_another_ros_has_another_hash() {
    let definition = b"string ns\nint32 id\nduration lifetime\n";
    let connection =
        Connection { topic: "/m", type_name: "visualization_msgs/Marker", definition, more: &[] };
    let data = [&[0; 4][..], &[1, 0, 0, 0], &[0; 8]].concat();
    let bag = of_bytes(&ros1_bag(&[connection], &[(0, 1, data)], &[], false));
    let key = type_key(&bag.info().topics[0], &[]).unwrap();
    assert_eq!(
        (key.basis, key.type_name.as_str()),
        (HashBasis::OtherLayout, "visualization_msgs/msg/Marker")
    );
    assert!(key.hash.starts_with("RIHS01_") && !key.hash.contains("45b13ccf"), "{}", key.hash);
}

#[test]
fn a_directory_is_one_recording() {
    let file = |n: u64| {
        let mut made = strings();
        made.chunk((T + n * S, T + n * S), &put(&[T + n * S]), &[], true);
        made.finish()
    };
    let yaml =
        "rosbag2_bagfile_information:\n  version: 9\n  message_count: 5\n  relative_file_paths: [d_0.mcap]\n";
    // files, metadata, messages or what is said of the refusal, what is said of the damage
    type Case<'a> = (&'a [&'a str], Option<&'a str>, Result<u64, &'a str>, &'a str);
    let cases: [Case<'_>; 5] = [
        (&["d_0.mcap", "d_1.mcap"], None, Ok(2), ""),
        (&["a.mcap", "b.mcap"], None, Err("2 bags that are not parts of one recording (a.mcap, b.mcap)"), ""),
        (&["d_0.mcap", "d_1.mcap"], Some(yaml), Ok(1), "of d_1.mcap (the file is a part of the recording"),
        (
            &["d_0.mcap"],
            Some(yaml),
            Ok(1),
            "messages lost: 4 of metadata.yaml (metadata.yaml counts 5 messages",
        ),
        (&["d_0.mcap", "d_0_recovered.mcap"], Some(yaml), Ok(1), "messages lost: 4 of metadata.yaml"),
    ];
    for (files, metadata, want, damage) in cases {
        let dir = tempfile::tempdir().unwrap();
        for (name, n) in files.iter().zip(0..) {
            fs::write(dir.path().join(name), file(n)).unwrap();
        }
        if let Some(text) = metadata {
            fs::write(dir.path().join("metadata.yaml"), text).unwrap();
        }
        match (open(dir.path(), &OpenOptions::default()), want) {
            (Ok(bag), Ok(messages)) => {
                assert_eq!(read(&bag).messages, messages, "{files:?}");
                let said = said(&bag);
                assert!(said.contains(damage) && said.is_empty() == damage.is_empty(), "{files:?}: {said}");
            }
            (Err(e), Err(want)) => assert!(e.to_string().contains(want), "{e}"),
            (got, want) => panic!("{files:?}: got {got:?}, want {want:?}"),
        }
    }
}

#[test]
fn a_file_without_a_whole_message_is_not_said_to_be_kept() {
    let mut made = Mcap::new("ros2");
    made.chunk((T, T), &put(&[T]), &[], true);
    let whole = made.finish();
    let at = whole.windows(3).position(|w| w == b"x\0\x07").unwrap();
    let error = open_bytes("made", &whole[..at - 30], &OpenOptions::default()).map(|_| ()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("damaged, nothing can be recovered") && !text.contains("kept"), "{text}");
    let mut declared = strings();
    declared.chunk((T, T), &put(&[T]), &[], true);
    let whole = declared.finish();
    let at = whole.windows(3).position(|w| w == b"x\0\x07").unwrap();
    let bag = of_bytes(&whole[..at - 30]);
    assert!(said(&bag).contains("before the end of its first message"), "{}", said(&bag));
    // Nothing to write is an error, and leaves nothing behind.
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.mcap");
    let error = rewrite_as_mcap(&bag, &out, &ReadOptions::default(), &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("nothing of it can be written"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
