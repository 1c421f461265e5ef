//! `mindseye run` while the world around it breaks: a router that is killed, a robot that dies, a clock that jumps. It
//! goes on by itself each time, and says so once.

use crate::fake::{free_port, image, odometry};
use crate::shipped::program;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::msg::{Image, Odometry};
use mindseye_bridge::ros::{Mode, Publisher, Qos, RosConfig, RosSession, ZenohSettings};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

/// A process that is killed with SIGKILL when it is dropped, and what it said on stderr.
struct Process {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Process {
    fn start(args: &[&str]) -> Self {
        let mut child =
            program().args(args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program");
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let (lines, err) = (said.clone(), child.stderr.take().expect("piped"));
        std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Self { child, said }
    }

    fn lines(&self) -> Vec<String> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn times(&self, text: &str) -> usize {
        self.lines().iter().filter(|l| l.contains(text)).count()
    }

    fn wait_for(&self, text: &str) {
        let until = Instant::now() + LONG;
        while self.times(text) == 0 {
            assert!(Instant::now() < until, "{text:?} within {LONG:?}: {:#?}", self.lines());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what} did not happen within {LONG:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn endpoint(port: u16) -> String {
    format!("tcp/127.0.0.1:{port}")
}

/// A session that hangs on the router alone, as every process here does: without it nobody reaches anybody.
fn at_router(node: &str, port: u16) -> RosSession {
    session(Mode::Client, node, port)
}

fn session(mode: Mode, node: &str, port: u16) -> RosSession {
    let zenoh = ZenohSettings {
        mode: Some(mode),
        connect: Some(vec![endpoint(port)]),
        listen: Some(Vec::new()),
        overrides: Some("connect/retry={period_init_ms: 100, period_max_ms: 500}".into()),
        ..ZenohSettings::default()
    };
    RosSession::open(&RosConfig { zenoh, ..RosConfig::in_process(node) }).expect("a session")
}

fn router(port: u16) -> RosSession {
    let zenoh = ZenohSettings {
        mode: Some(Mode::Router),
        connect: Some(Vec::new()),
        listen: Some(vec![endpoint(port)]),
        ..ZenohSettings::default()
    };
    RosSession::open(&RosConfig { zenoh, ..RosConfig::in_process("router") }).expect("a router")
}

/// `mindseye run` as a client of the router on `port`.
fn run_at_router(dir: &Path, port: u16) -> Process {
    let config = dir.join("robot.toml");
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    let text = format!(
        "robot = \"test\"\n[ros.zenoh]\nmode = \"client\"\nconnect = [\"{}\"]\nlisten = []\n\
         overrides = \"connect/retry={{period_init_ms: 100, period_max_ms: 500}}\"\n\
         [model]\nbundle = {bundle:?}\n",
        endpoint(port)
    );
    std::fs::write(&config, text).expect("a file");
    let process = Process::start(&["run", "--config", config.to_str().expect("UTF-8")]);
    process.wait_for("Ctrl-C stops");
    process
}

/// A robot that sends one picture with its odometry whenever it is told to.
struct Robot {
    images: Publisher<Image>,
    odometry: Publisher<Odometry>,
    stamp: Timestamp,
}

impl Robot {
    fn new(session: &RosSession) -> Self {
        Self {
            images: session.publisher("/camera/image_raw", &Qos::SENSOR_DATA).expect("a publisher"),
            odometry: session.publisher("/odom", &Qos::SENSOR_DATA).expect("a publisher"),
            stamp: Timestamp(1_700_000_000_000_000_000),
        }
    }

    /// Publishing never fails and never blocks, whatever happened to the router.
    fn send(&mut self, seconds: f64) {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < until {
            self.stamp = self.stamp + TimeDelta::from_millis(50);
            self.odometry.publish(&odometry(self.stamp)).expect("odometry goes out");
            self.images.publish(&image(self.stamp, 48, 32)).expect("a picture goes out");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sends until a goal is answered from fresh frames of this robot.
    fn until_answered(&mut self, client: &RosSession) -> Answer {
        let until = Instant::now() + LONG;
        loop {
            self.send(0.5);
            let body = r#"{"text": "find the red chair", "deadline_ms": 4000}"#;
            let asked = client.query_json("mindseye/test/ground", body, Duration::from_secs(5));
            let answer = asked.ok().and_then(|text| serde_json::from_str::<Answer>(&text).ok());
            let last = format!("{answer:?}");
            if let Some(answer) = answer.filter(|a| !matches!(a.status, Status::Stale | Status::Failed)) {
                return answer;
            }
            assert!(Instant::now() < until, "no answer from fresh frames within {LONG:?}: {last}");
        }
    }
}

#[test]
fn a_router_is_killed_and_restarted_while_frames_flow() {
    let (dir, port) = (tempfile::tempdir().expect("a directory"), free_port());
    let first = router(port);
    let node = run_at_router(dir.path(), port);
    let session = at_router("robot", port);
    let mut robot = Robot::new(&session);
    robot.until_answered(&session);
    assert_eq!(node.times("zenoh link"), 0, "{:#?}", node.lines());
    first.close().expect("the router stops");
    // Frames keep flowing into the void.
    robot.send(1.5);
    node.wait_for("the last zenoh link is lost");
    let second = router(port);
    let answer = robot.until_answered(&session);
    assert_ne!(answer.status, Status::Found, "grey pictures show nothing: {answer:?}");
    for (text, times) in [("the last zenoh link is lost", 1), ("zenoh link is back", 1)] {
        assert_eq!(node.times(text), times, "{text}: {:#?}", node.lines());
    }
    second.close().expect("the router stops");
}

#[test]
fn clients_of_a_listening_node_come_and_go_without_a_warning() {
    let port = free_port();
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("robot.toml");
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    let text = format!(
        "robot = \"sim\"\n[ros.zenoh]\nconnect = []\nlisten = [\"{}\"]\n[model]\nbundle = {bundle:?}\n",
        endpoint(port)
    );
    std::fs::write(&config, text).expect("a file");
    let node = Process::start(&["run", "--config", config.to_str().expect("UTF-8")]);
    node.wait_for("Ctrl-C stops");
    for mode in [Mode::Client, Mode::Client, Mode::Peer] {
        let client = session(mode, "client", port);
        let status = client.query_json("mindseye/sim/status", "", Duration::from_secs(10));
        assert!(status.is_ok_and(|s| s.contains("last_answer")), "{:#?}", node.lines());
        client.close().expect("the client leaves");
    }
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(node.times("link"), 0, "{:#?}", node.lines());
}

#[test]
fn a_robot_dies_in_mid_stream_and_another_one_takes_over() {
    let (dir, port) = (tempfile::tempdir().expect("a directory"), free_port());
    let _router = router(port);
    let node = run_at_router(dir.path(), port);
    let client = at_router("client", port);
    let bag = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/runtime/house.mcap");
    let (bag, connect) = (bag.to_str().expect("UTF-8").to_owned(), endpoint(port));
    let play =
        || Process::start(&["bag", "play", &bag, "--connect", &connect, "--disable-keyboard-controls"]);
    let frames = || {
        let text = client.query_json("mindseye/test/status", "", Duration::from_secs(5));
        let status: serde_json::Value =
            text.ok().and_then(|t| serde_json::from_str(&t).ok()).unwrap_or_default();
        status["frames"]["received"].as_u64().unwrap_or(0)
    };
    let player = play();
    eventually("frames of the first player", || frames() >= 20);
    let gone = "the last publisher is gone topic=\"/camera/image_raw\"";
    assert_eq!(node.times(gone), 0, "{:#?}", node.lines());
    drop(player); // SIGKILL
    node.wait_for(gone);
    std::thread::sleep(Duration::from_millis(1200));
    let ask = || {
        let body = r#"{"text": "find the red chair", "deadline_ms": 4000}"#;
        let text = client.query_json("mindseye/test/ground", body, LONG).expect("the node answers");
        serde_json::from_str::<Answer>(&text).expect("an answer")
    };
    assert_eq!(ask().status, Status::Stale, "nothing new was seen");
    let before = frames();
    let _player = play();
    eventually("frames of the second player", || frames() >= before + 20);
    let answer = ask();
    assert!(!matches!(answer.status, Status::Stale | Status::Failed), "{answer:?}");
    for text in [gone, "a publisher is back topic=\"/camera/image_raw\"", "stamps went back by"] {
        assert_eq!(node.times(text), 1, "{text}: {:#?}", node.lines());
    }
}

#[test]
fn the_clock_of_the_robot_jumps() {
    let (dir, port) = (tempfile::tempdir().expect("a directory"), free_port());
    let _router = router(port);
    let node = run_at_router(dir.path(), port);
    let session = at_router("robot", port);
    let mut robot = Robot::new(&session);
    robot.until_answered(&session);
    let hour = TimeDelta::from_millis(3_600_000);
    robot.stamp = robot.stamp + hour;
    robot.until_answered(&session);
    robot.send(0.5);
    robot.stamp = robot.stamp - hour - hour;
    robot.until_answered(&session);
    robot.send(0.5);
    for (text, times) in [("no frame for 3600", 1), ("stamps went back by 7", 1), ("new segment", 3)] {
        assert_eq!(node.times(text), times, "{text}: {:#?}", node.lines());
    }
}
