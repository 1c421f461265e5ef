//! The program and the bundle of the repository, from outside: processes, exit statuses, documents.

use crate::fake::{FakeRobot, free_port, noise, session};
use mindseye_bridge::msg::{RosType, StringMsg};
use mindseye_bridge::ros::{Publisher, Qos};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mindseye"));
    command.env_remove("ROS_DOMAIN_ID").env_remove("ZENOH_CONFIG_OVERRIDE").env_remove("MINDSEYE_BUNDLE");
    command
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn bundle() -> PathBuf {
    repository().join("models/house-tiny")
}

fn text(output: &Output) -> (String, String) {
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

fn document(output: &Output) -> serde_json::Value {
    let (out, err) = text(output);
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out:?} {err:?}"))
}

#[test]
fn help_and_wrong_usage_have_their_exit_status() {
    for command in [
        &["--help"][..],
        &["demo", "--help"],
        &["run", "--help"],
        &["replay", "--help"],
        &["goal", "--help"],
        &["doctor", "--help"],
    ] {
        let output = program().args(command).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{command:?}");
        assert!(text(&output).0.contains("Examples:"), "{command:?} shows an example");
    }
    for wrong in [&["--nonsense"][..], &["replay"], &["goal"], &["fly"]] {
        assert_eq!(program().args(wrong).output().unwrap().status.code(), Some(2), "{wrong:?}");
    }
}

/// Without a GPU each command says so in one line, and the doctor finds nothing wrong with that.
#[test]
fn a_missing_gpu_is_told_in_one_line() {
    let run = |args: &[&str]| {
        program().args(args).env("MINDSEYE_CUDA_LIBRARY", "/nowhere/libcuda.so.1").output().unwrap()
    };
    for (backend, command) in [
        ("cuda", &["demo"][..]),
        ("cuda-f32", &["replay", "x.mcap", "--goal", "chair"]),
        ("cuda", &["run"]),
        ("cuda", &["engine", "bench", "engines"]),
    ] {
        let output = run(&[command, &["--backend", backend]].concat());
        let (_, err) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {err}");
        assert_eq!(err.trim().lines().count(), 1, "{command:?}: {err}");
        let wanted = format!("backend {backend}: MINDSEYE_CUDA_LIBRARY names /nowhere/libcuda.so.1");
        assert!(err.contains(&wanted), "{command:?}: {err}");
    }
    let output = run(&["doctor", "--wait", "0", "--json"]);
    let checks = document(&output)["checks"].as_array().unwrap().clone();
    let gpu = checks.iter().find(|c| c["check"] == "gpu").unwrap();
    assert_eq!(gpu["verdict"], "ok");
    assert!(gpu["text"].as_str().unwrap().starts_with("none, the CPU is used: "), "{gpu}");
}

#[test]
fn refusals_are_one_clear_line() {
    let check = |name: &str, args: &[&str], want: &str| {
        let output = program().args(args).output().unwrap();
        let (out, err) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{name}: {out} {err}");
        assert_eq!(err.trim().lines().count(), 1, "{name}: {err}");
        assert!(err.contains(want), "{name}: {err}");
    };
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("broken.toml");
    std::fs::write(&broken, "[context]\ncapacity = 1\n").unwrap();
    check("no bundle", &["demo", "--bundle", "/nowhere"], "/nowhere");
    check("no bag", &["replay", "/nowhere.mcap", "--goal", "red chair"], "/nowhere.mcap");
    check("a wrong configuration", &["run", "--config", broken.to_str().unwrap()], "context.capacity is 1");
    check("an empty goal", &["replay", "x.mcap", "--goal", " "], "empty");
    check("a time before the bag", &["replay", "x.mcap", "--goal", "chair", "--at", "-1"], "0 or more");
    let nobody = ["goal", "red chair", "--robot", "nobody", "--connect", "tcp/127.0.0.1:1"];
    check("nobody there", &nobody, "nobody is reached at [tcp/127.0.0.1:1]");
    std::fs::write(&broken, "[topics]\nimage = 3\n").unwrap();
    check("a wrong type", &["run", "--config", broken.to_str().unwrap()], "line 2, column 9");
    check("a waypoint of letters", &["goal", "--waypoint", "a,b,c"], "not X,Y,YAW");

    // A bundle with one byte changed.
    let changed = dir.path().join("changed");
    std::fs::create_dir(&changed).unwrap();
    let mut files: Vec<PathBuf> = std::fs::read_dir(bundle()).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for file in &files {
        std::fs::copy(file, changed.join(file.file_name().unwrap())).unwrap();
    }
    let victim = changed.join("denoiser.onnx");
    let mut bytes = std::fs::read(&victim).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&victim, bytes).unwrap();
    check("a wrong hash", &["demo", "--bundle", changed.to_str().unwrap()], "sha256");

    // A port that somebody else has.
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("tcp/127.0.0.1:{}", holder.local_addr().unwrap().port());
    let output = program().args(["run", "--listen", &listen, "--seconds", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?}", text(&output));
    assert!(text(&output).1.contains("cannot open the Zenoh session"), "{:?}", text(&output));
}

#[test]
fn the_same_bag_and_seed_give_the_same_document() {
    let bag = repository().join("tests/data/runtime/house.mcap");
    let run = |seed: &str| {
        let output = program()
            .args(["replay", bag.to_str().unwrap(), "--goal", "find the red chair", "--seed", seed, "--json"])
            .args(["--bundle", bundle().to_str().unwrap()])
            .output()
            .unwrap();
        let mut document = document(&output);
        assert!(document["answer"]["timings_ms"]["total"].as_f64().unwrap() < 10_000.0, "{document}");
        document["answer"]["timings_ms"] = serde_json::Value::Null;
        document.to_string()
    };
    let first = run("1");
    assert_eq!(first, run("1"), "byte for byte");
    assert_ne!(first.replace("\"seed\":1", ""), run("2").replace("\"seed\":2", ""), "another seed differs");
}

/// Goals of training name a colour and a kind; what people leave out is found out.
#[test]
fn a_goal_without_a_colour_is_for_the_thing_that_is_there() {
    let bag = repository().join("tests/data/runtime/house.mcap");
    let ask = |goal: &str| {
        let output = program()
            .args(["replay", bag.to_str().unwrap(), "--goal", goal, "--candidates", "1", "--json"])
            .args(["--bundle", bundle().to_str().unwrap()])
            .output()
            .unwrap();
        document(&output)["answer"].clone()
    };
    let (whole, short) = (ask("find the purple chair"), ask("find the chair"));
    assert_eq!(whole["status"], "found", "{whole}");
    assert_eq!(short["goal_pose"], whole["goal_pose"], "{short}");
    assert!(whole["reason"].is_null(), "{whole}");
    let note = "6 of 6 things that this may mean were looked for; \"purple chair\" was seen most clearly";
    assert!(short["reason"].as_str().is_some_and(|reason| reason.starts_with(note)), "{short}");
}

#[test]
fn a_time_past_the_end_of_the_bag_is_refused() {
    let bag = repository().join("tests/data/runtime/house.mcap");
    let output = program()
        .args(["replay", bag.to_str().unwrap(), "--goal", "find the red chair", "--at", "1000"])
        .args(["--bundle", bundle().to_str().unwrap()])
        .output()
        .unwrap();
    let (_, said) = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("1000 s after the start lie past the end of the bag, which is "), "{said}");
}

#[test]
fn the_demo_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let output = program()
        .args(["demo", "--fast", "--json", "--out", dir.path().to_str().unwrap()])
        .args(["--bundle", bundle().to_str().unwrap()])
        .output()
        .unwrap();
    let document = document(&output);
    assert_eq!(document["arrived"], true, "{document}");
    let error = document["error"]["position_m"].as_f64().expect("a pose was given");
    assert!(error < 0.3, "{error} m off: {document}");
}

#[test]
fn a_foreign_bag_gets_no_confident_pose() {
    let bag = repository().join("tests/data/bags/crafted/corridor_zstd.mcap");
    for goal in ["find the red chair", "find the blue table", "find the green plant", "find the lamp"] {
        let output = program()
            .args(["replay", bag.to_str().unwrap(), "--goal", goal, "--json"])
            .args(["--bundle", bundle().to_str().unwrap()])
            .output()
            .unwrap();
        let document = document(&output);
        let status = document["answer"]["status"].as_str().unwrap();
        assert!(["not_in_context", "inconsistent", "failed"].contains(&status), "{goal}: {document}");
        assert!(document["answer"]["pose"].is_null(), "{goal}: {document}");
        assert!(document["answer"]["reason"].is_string(), "{goal}: {document}");
    }
}

struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `mindseye run` on a loopback port, ready to be asked.
fn serve(extra: &[&str], wrap: Option<&str>) -> (Served, u16) {
    let port = free_port();
    let endpoint = format!("tcp/127.0.0.1:{port}");
    let mut command = match wrap {
        None => program(),
        Some(script) => {
            let mut shell = Command::new("bash");
            shell.args(["-c", &format!("{script} exec \"$@\""), "bash", env!("CARGO_BIN_EXE_mindseye")]);
            shell
        }
    };
    let config = repository().join("configs/robots/sim.toml");
    let mut child = command
        .args(["run", "--config", config.to_str().unwrap(), "--bundle", bundle().to_str().unwrap()])
        .args(["--listen", &endpoint])
        .args(extra)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains("Ctrl-C stops"));
    assert!(ready, "the node says that it serves");
    // Keep reading, so that the child never waits for us.
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
    (Served(child), port)
}

#[test]
fn another_process_is_served_over_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let recording = dir.path().join("session.mcap");
    let (mut served, port) = serve(&["--json", "--record", recording.to_str().unwrap()], None);
    let client = session("client", None, Some(port));
    let mut robot = FakeRobot::start(&client, 30.0);
    let endpoint = format!("tcp/127.0.0.1:{port}");
    let ask = |extra: &[&str]| {
        let output = program()
            .args(["goal", "find the red chair", "--robot", "sim", "--connect", &endpoint, "--json"])
            .args(extra)
            .output()
            .unwrap();
        document(&output)
    };
    // Until there is a memory the answer is a clear no.
    let began = Instant::now();
    let answer = loop {
        let answer = ask(&["--ask-only"]);
        let ready = answer["status"] != "failed" && answer["status"] != "stale";
        if ready || began.elapsed() > Duration::from_secs(30) {
            break answer;
        }
    };
    // Grey pictures show no chair.
    assert!(["not_in_context", "inconsistent"].contains(&answer["status"].as_str().unwrap()), "{answer}");
    assert!(answer["pose"].is_null());
    let began = Instant::now();
    let answer = ask(&["--deadline-ms", "50"]);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(answer["timings_ms"]["total"].as_f64().unwrap() < 250.0, "{answer}");
    robot.stall();
    std::thread::sleep(Duration::from_millis(1300));
    assert_eq!(ask(&[])["status"], "stale");
    let wanted: Publisher<StringMsg> = client.publisher("/mindseye/goal/text", &Qos::default()).unwrap();
    assert!(wanted.wait_for_subscribers(Duration::from_secs(5)));
    wanted.publish(&StringMsg { data: "find the blue ball".into() }).unwrap();
    let began = Instant::now();
    while !client.query_json("mindseye/sim/status", "", Duration::from_secs(5)).unwrap().contains("text-") {
        assert!(began.elapsed() < Duration::from_secs(20), "the goal on the topic is answered");
        std::thread::sleep(Duration::from_millis(50));
    }

    // SIGTERM ends it cleanly, with its document.
    let pid = served.0.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    let mut out = String::new();
    served.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(served.0.wait().unwrap().code(), Some(0));
    let document: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(document["frames"]["received"].as_u64().unwrap() > 10, "{document}");

    // The recording holds what came in, and the question to every answer.
    let bag = mindseye_bridge::bag::open(&recording, &Default::default()).unwrap();
    let texts = |topic: &str| -> Vec<String> {
        bag.messages(&Default::default())
            .filter(|m| bag.info().topic(m.topic).name == topic)
            .map(|m| StringMsg::decode(&m.data).unwrap().data)
            .collect()
    };
    for (kind, least) in [("ground", 1), ("navigate", 2)] {
        let asked = texts(&format!("/mindseye/sim/{kind}/request"));
        let same = asked.iter().all(|a| a.contains("find the red chair"));
        assert!(asked.len() >= least && same, "{kind}: {asked:?}");
    }
    assert_eq!(texts("/mindseye/goal/text"), ["find the blue ball"]);
    let frames = bag.info().topics.iter().find(|t| t.name == "/camera/image_raw");
    assert!(frames.is_some_and(|t| t.count > 10), "{:?}", bag.info().topics);
}

#[test]
fn a_full_disk_ends_the_recording_and_not_the_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.mcap");
    // Files of at most 64 KiB; the signal that would kill is ignored, so that writing fails as on a full disk.
    let limit = "trap '' XFSZ; ulimit -f 64;";
    let (mut served, port) = serve(&["--record", path.to_str().unwrap()], Some(limit));
    let client = session("client", None, Some(port));
    let robot = FakeRobot::with(&client, 30.0, |stamp| noise(stamp, 320, 240));
    let received = || {
        let status = client.query_json("mindseye/sim/status", "", Duration::from_secs(5)).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["frames"]["received"].as_u64().unwrap()
    };
    // Thirty pictures are seven megabytes: the disk was full long before.
    let began = Instant::now();
    while received() < 30 && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(100));
    }
    let before = received();
    std::thread::sleep(Duration::from_millis(500));
    assert!(received() > before, "frames are still taken in");
    drop(robot);
    let pid = served.0.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    assert_eq!(served.0.wait().unwrap().code(), Some(1), "the lost recording is a failure in the end");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half-written is left behind");
}
