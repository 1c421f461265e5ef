//! `mindseye bag` as scripts and people use it: exit status, what is said, signals, latched topics.

use crate::fake::free_port;
use crate::shipped::program;
use mindseye::config::RobotConfig;
use mindseye::node::{MonotonicClock, NodeEvent};
use mindseye::replay::{Replay, Told, replay_without_model, watch_rest};
use mindseye::topics::Wanted;
use mindseye_bridge::bag::{McapWriter, offered_qos, schema};
use mindseye_bridge::ros::{
    Durability, History, Mode, Qos, QueuePolicy, Reliability, RosConfig, RosSession, ZenohSettings,
};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const S: i64 = 1_000_000_000;
const START: i64 = 1_700_000_000 * S;

fn mindseye(args: &[&str]) -> Output {
    let mut command = program();
    command.args(args).stdin(Stdio::null()).output().expect("the binary starts")
}

/// Everything that was printed.
fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn endpoint(port: u16) -> String {
    format!("tcp/127.0.0.1:{port}")
}

/// A router on `port`, or a client of it.
fn session(mode: Mode, port: u16) -> RosSession {
    let here = Some(vec![endpoint(port)]);
    let (connect, listen) = match mode {
        Mode::Router => (Some(Vec::new()), here),
        _ => (here, Some(Vec::new())),
    };
    let zenoh = ZenohSettings { mode: Some(mode), connect, listen, ..ZenohSettings::default() };
    RosSession::open(&RosConfig { zenoh, ..RosConfig::in_process("bags") }).expect("a session")
}

/// A string as CDR.
fn string(content: &str) -> Vec<u8> {
    let mut cdr = vec![0, 1, 0, 0];
    cdr.extend((content.len() as u32 + 1).to_le_bytes());
    cdr.extend(content.as_bytes());
    cdr.push(0);
    cdr
}

/// Strings on `/a` and `/b`, ten a second for `seconds` seconds.
fn made(dir: &Path, seconds: i64) -> PathBuf {
    let path = dir.join("made.mcap");
    let mut writer = McapWriter::create(&path).unwrap();
    let kind = "std_msgs/msg/String";
    let mut add = |topic| {
        let text = schema::ros2msg(kind).unwrap();
        writer.add_channel(topic, kind, text, None, &offered_qos(true, false, 5)).unwrap()
    };
    let channels = [add("/a"), add("/b")];
    for n in 0..=seconds * 10 {
        let stamp = START + n * S / 10;
        for channel in channels {
            writer.write(channel, stamp, stamp, &string("x")).unwrap();
        }
    }
    writer.finish().unwrap();
    path
}

#[test]
fn every_end_has_its_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let bag = made(dir.path(), 2);
    let bag = text(&bag);
    let bytes = std::fs::read(bag).unwrap();
    let cut = dir.path().join("cut.mcap");
    std::fs::write(&cut, &bytes[..bytes.len() - 200]).unwrap();
    let cut = text(&cut);
    let none = dir.path().join("none.mcap");
    let mut writer = McapWriter::create(&none).unwrap();
    writer.add_channel("/a", "std_msgs/msg/String", "string data", None, "").unwrap();
    writer.finish().unwrap();
    let none = text(&none);
    let out = dir.path().join("out.mcap");
    let out = text(&out);
    let bags = dir.path().join("bags");
    std::fs::create_dir(&bags).unwrap();
    for name in ["one.mcap", "other.mcap"] {
        std::fs::write(bags.join(name), &bytes).unwrap();
    }
    // arguments, exit status, what is said
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (vec!["verify", bag], 0, "messages:    42"),
        (vec!["verify", cut], 1, "damage: "),
        (vec!["verify", cut, "--strict"], 1, "damage: "),
        (vec!["info", cut], 0, "damage: "),
        (vec!["convert", bag, out, "--force"], 0, "42 messages"),
        (vec!["convert", bag, out, "--force", "--topics", "a"], 0, "21 messages"),
        (vec!["convert", bag, out, "--force", "--topics", "/a", "/typo"], 0, "there is no topic /typo"),
        (vec!["convert", bag, out, "--force", "--exclude-topics", "b"], 0, "21 messages"),
        (vec!["convert", bag, out, "--force", "--regex", "^/b$"], 0, "21 messages"),
        (
            vec!["convert", bag, out, "--force", "--topics", "/typo"],
            1,
            "no topic is chosen /typo; it has /a, /b",
        ),
        (vec!["convert", bag, out], 1, "the file exists"),
        (vec!["convert", none, out, "--force"], 1, "nothing of it can be written"),
        (vec!["play", bag, "--topics", "/typo"], 1, "no topic is chosen /typo; it has /a, /b"),
        (vec!["play", bag, "--start-offset", "3"], 1, "is 2.000 s long"),
        (vec!["play", bag, "--playback-until-sec", "1600000000"], 1, "playing starts later"),
        (vec!["info", text(&bags)], 1, "2 bags that are not parts of one recording"),
    ];
    for (args, status, said) in cases {
        let output = mindseye(&[&["bag"], &args[..]].concat());
        let printed = printed(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {printed}");
        assert!(printed.contains(said), "{args:?}: {printed}");
    }
    assert!(std::fs::metadata(out).is_ok(), "the last good file stays");
}

#[test]
fn info_says_dates_sizes_encodings_and_quality_of_service() {
    let dir = tempfile::tempdir().unwrap();
    let bag = made(dir.path(), 2);
    let printed = printed(&mindseye(&["bag", "info", text(&bag)]));
    for want in [
        "2023-11-14T22:13:20.000000000Z",
        "2023-11-14T22:13:22.000000000Z",
        "1700000000.000000000 s",
        " bytes)",
        "profile ros2",
        "std_msgs/msg/String  cdr (ros2msg)  reliable, depth 5",
    ] {
        assert!(printed.contains(want), "{want}: {printed}");
    }
    let json = mindseye(&["bag", "info", text(&bag), "--json"]);
    let document: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(document["start"], "2023-11-14T22:13:20.000000000Z");
    assert_eq!(document["bytes"], std::fs::metadata(&bag).unwrap().len());
    assert_eq!(document["topics"][0]["qos"][0]["depth"], 5);
}

#[test]
fn a_signal_ends_playing_with_its_report() {
    let dir = tempfile::tempdir().unwrap();
    let bag = made(dir.path(), 60);
    for (signal, more) in
        [("INT", &[][..]), ("TERM", &[]), ("INT", &["--start-paused"]), ("INT", &["--loop"])]
    {
        let mut command = program();
        let nobody = endpoint(free_port());
        command
            .args(["bag", "play", text(&bag), "--listen", "tcp/127.0.0.1:0", "--connect", &nobody])
            .args(more);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = child.spawn().expect("the binary starts");
        std::thread::sleep(Duration::from_millis(2500));
        let kill = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
        assert!(kill.is_ok_and(|s| s.success()));
        let asked = Instant::now();
        let output = child.wait_with_output().expect("it ends");
        let (took, printed) = (asked.elapsed(), printed(&output));
        // A second, and what a busy machine adds.
        assert!(took < Duration::from_secs(3), "{signal} {more:?}: {took:?}");
        assert_eq!(output.status.code(), Some(0), "{signal} {more:?}: {printed}");
        for want in ["messages published", "stopped before the end", "rate 1.00", "no keys: Ctrl-C ends"] {
            assert!(printed.contains(want), "{signal} {more:?}: {want}: {printed}");
        }
    }
}

/// A `tf2_msgs/msg/TFMessage` with one transform from `base` to `child`; both names have seven letters.
fn transform(child: &str) -> Vec<u8> {
    let mut cdr = vec![0, 1, 0, 0, 1, 0, 0, 0];
    cdr.extend([0; 8]);
    for name in ["basebas", child] {
        assert_eq!(name.len(), 7);
        cdr.extend(8u32.to_le_bytes());
        cdr.extend(name.as_bytes());
        cdr.push(0);
    }
    let body = cdr.len() - 4;
    cdr.resize(4 + body.next_multiple_of(8), 0);
    for value in [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 1.0f64] {
        cdr.extend(value.to_le_bytes());
    }
    cdr
}

#[test]
fn a_late_subscriber_gets_what_every_original_publisher_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latched.mcap");
    let mut writer = McapWriter::create(&path).unwrap();
    let (tf, kind) = ("tf2_msgs/msg/TFMessage", "std_msgs/msg/String");
    let qos = offered_qos(true, true, 1).repeat(3);
    let latched = writer.add_channel("/tf_static", tf, schema::ros2msg(tf).unwrap(), None, &qos).unwrap();
    let map = writer.add_channel("/map", kind, schema::ros2msg(kind).unwrap(), None, &qos).unwrap();
    let tick = writer.add_channel("/tick", kind, schema::ros2msg(kind).unwrap(), None, "").unwrap();
    for (n, child) in ["camera_", "laser__", "imulink"].iter().enumerate() {
        let stamp = START + n as i64;
        writer.write(latched, stamp, stamp, &transform(child)).unwrap();
        writer.write(map, stamp, stamp, &string(child)).unwrap();
    }
    (0..300).for_each(|n| writer.write(tick, START + n * S / 10, START + n * S / 10, &string("t")).unwrap());
    writer.finish().unwrap();
    let port = free_port();
    let _router = session(Mode::Router, port);
    let mut command = program();
    command.args(["bag", "play", text(&path), "--connect", &endpoint(port), "--listen", "tcp/127.0.0.1:0"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(3000));
    let session = session(Mode::Client, port);
    let qos = Qos {
        reliability: Reliability::Reliable,
        durability: Durability::TransientLocal,
        // One of each publisher: as the listeners of ROS ask for latched topics.
        history: History::KeepLast(1),
    };
    let mut got = [Vec::new(), Vec::new()];
    let subscriptions = [("/tf_static", tf), ("/map", kind)].map(|(topic, kind)| {
        session.raw_subscriber(topic, kind, None, &qos, QueuePolicy::KeepLast(100)).unwrap()
    });
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until && got.iter().any(|g: &Vec<Vec<u8>>| g.len() < 3) {
        for (got, subscription) in got.iter_mut().zip(&subscriptions) {
            got.extend(subscription.try_recv().map(|sample| sample.bytes(&mut Vec::new()).to_vec()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    for (got, want) in got.iter_mut().zip([transform as fn(&str) -> Vec<u8>, string]) {
        got.sort();
        let mut want: Vec<Vec<u8>> = ["camera_", "laser__", "imulink"].iter().map(|c| want(c)).collect();
        want.sort();
        assert_eq!(*got, want);
    }
}

#[test]
fn what_comes_after_the_goal_is_watched_too() {
    let count = |at_secs: Option<f64>| {
        let bag = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/runtime/room.mcap");
        let replay = Replay {
            bag,
            config: RobotConfig::default(),
            wanted: Wanted::default(),
            goal: None,
            at_secs,
            deadline: None,
        };
        let frames = |event: NodeEvent<'_>| match event {
            NodeEvent::Sensed { outcome, .. } => usize::from(outcome.frame.is_some()),
            _ => 0,
        };
        let (mut before, mut after) = (0, 0);
        let mut told = |told: Told<'_>| {
            if let Told::Event(event) = told {
                before += frames(event);
            }
        };
        replay_without_model(&replay, &MonotonicClock, &mut told, &|| true).unwrap();
        watch_rest(&replay, &MonotonicClock, &mut |event| after += frames(event), &|| true).unwrap();
        (before, after)
    };
    let (all, none) = count(None);
    assert!(all > 50 && none == 0, "{all} {none}");
    let (before, after) = count(Some(5.0));
    assert!(before > 20 && after > 20 && before + after == all, "{before} and {after} of {all}");
}
