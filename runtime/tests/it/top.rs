//! `mindseye top` over a router, from another process, as a person runs it.

use crate::fake::{FakeEncoder, FakeMind, FakeRobot, config, wait_for_latents};
use crate::served::{at, client, router};
use crate::shipped::program;
use mindseye::node::{Node, NodeParts};
use mindseye_bridge::ros::RosSession;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

fn node(robot: &str, port: u16) -> (Node, RosSession) {
    let mut config = config();
    config.robot = robot.into();
    let session = client(robot, port);
    let (mind, encoder) = (Box::new(FakeMind::new(Duration::ZERO)), Box::new(FakeEncoder));
    let parts = NodeParts { config, mind, encoder, record: None, observer: None };
    (Node::start(&session, parts).unwrap(), session)
}

fn top(port: u16, more: &[&str]) -> (bool, String) {
    let output = program()
        .args(["top", "--once", "--every", "0.4", "--connect", &at(port)])
        .args(more)
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

/// The word in the second column for each robot.
fn states(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .skip(2)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?))
        })
        .collect()
}

#[test]
fn three_nodes_are_seen_and_one_that_leaves_is_not() {
    let (_router, port) = router();
    let (sees, blind, leaves) = (node("sees", port), node("blind", port), node("leaves", port));
    // Nodes of one domain hear the same topics: these two listen to none that anybody publishes.
    for (node, session) in [&blind, &leaves] {
        let mut topics = config().topics;
        (topics.image, topics.compressed) = ("/none".into(), "/none/compressed".into());
        node.listen_to(
            session,
            &topics,
            &[mindseye::senses::Sense::Image, mindseye::senses::Sense::Compressed],
        )
        .unwrap();
    }
    let camera = client("camera", port);
    let _robot = FakeRobot::start(&camera, 30.0);
    wait_for_latents(&sees.0, 2);
    sees.0.requester().ask(mindseye_bridge::goal::Goal::text("g7", "find the chair").unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(300));

    let (good, text) = top(port, &[]);
    assert!(good && text.starts_with("mindseye top: 3 nodes, 1 link"), "{text}");
    let all = BTreeMap::from([("sees", "ready"), ("blind", "blind"), ("leaves", "blind")]);
    assert_eq!(states(&text), all, "{text}");
    let line = text.lines().find(|line| line.starts_with("sees")).unwrap();
    assert!(line.contains("/s ") && line.ends_with("g7: found"), "{line}");

    let (good, text) = top(port, &["--json"]);
    let document: Value = serde_json::from_str(&text).unwrap();
    assert!(good && document["nodes"] == 3, "{text}");
    let robots: Vec<&str> =
        document["statuses"].as_array().unwrap().iter().map(|s| s["robot"].as_str().unwrap()).collect();
    assert_eq!(robots.len(), 3, "{robots:?}");

    let (node, session) = leaves;
    node.stop();
    session.close().unwrap();
    let began = Instant::now();
    while top(port, &["--json"]).1.matches("\"robot\":").count() > 2 {
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    let (_, text) = top(port, &[]);
    assert_eq!(states(&text).keys().copied().collect::<Vec<_>>(), ["blind", "sees"], "{text}");
}

#[test]
fn nobody_is_a_failure_that_says_so() {
    let (_router, port) = router();
    let (good, text) = top(port, &[]);
    assert!(!good && text.contains("no node is there"), "{text}");
}
