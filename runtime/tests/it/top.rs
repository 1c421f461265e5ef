//! `mindseye top`: nodes are found and told apart.

use crate::fake::{FakeEncoder, FakeMind, FakeRobot, config, free_port, session, wait_for_latents};
use mindseye::node::{Node, NodeParts};
use mindseye::top::{Fleet, screen};
use mindseye_bridge::clock;
use mindseye_bridge::ros::{Mode, RosConfig, RosSession, ZenohSettings};
use std::time::{Duration, Instant};

#[test]
fn three_nodes_are_seen_and_the_second_of_a_name_waits() {
    let port = free_port();
    let zenoh = ZenohSettings {
        mode: Some(Mode::Router),
        listen: Some(vec![format!("tcp/127.0.0.1:{port}")]),
        connect: Some(vec![]),
        ..ZenohSettings::default()
    };
    let hub = RosSession::open(&RosConfig { zenoh, ..RosConfig::in_process("hub") }).unwrap();
    let start = |robot: &str| {
        let session = session(&format!("node_{robot}"), None, Some(port));
        let parts = NodeParts {
            config: mindseye::config::RobotConfig { robot: robot.into(), ..config() },
            mind: Box::new(FakeMind::new(Duration::from_millis(1))),
            encoder: Box::new(FakeEncoder),
            record: None,
            observer: None,
        };
        (Node::start(&session, parts).unwrap(), session)
    };
    let (ant, bee) = (start("ant"), start("bee"));
    let second = start("bee");
    let _robot = FakeRobot::start(&hub, 30.0);
    wait_for_latents(&ant.0, 1);
    let client = session("top", None, Some(port));
    let mut fleet = Fleet::default();
    let began = Instant::now();
    let lines = loop {
        let documents = client.query_all_json("mindseye/*/status", Duration::from_millis(500)).unwrap();
        let documents = documents.iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        let mut alive = client.claimants("mindseye/*/node", Duration::from_millis(500)).unwrap();
        alive.iter_mut().for_each(|(name, _)| *name = name.split('/').nth(1).unwrap().to_owned());
        fleet.take(clock::monotonic(), &alive, documents);
        let lines: Vec<String> =
            screen(&fleet, clock::monotonic(), (160, 30), "").into_iter().map(|line| line.text).collect();
        let has = |robot: &str, state: &str| lines.iter().any(|l| l.starts_with(robot) && l.contains(state));
        if fleet.len() == 3 && has("ant", " ready ") && has("bee", " ready ") && has("bee", " waits ") {
            break lines;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{lines:#?}");
        std::thread::sleep(Duration::from_millis(300));
    };
    assert!(lines.iter().any(|l| l.starts_with("ant") && l.contains("/s ")), "a rate: {lines:#?}");
    drop((bee, second));
}
