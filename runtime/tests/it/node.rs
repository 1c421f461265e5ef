//! A client on the other end of a loopback TCP connection.

use crate::fake::{FakeRobot, OBJECT_AHEAD_M, STANDOFF_M, STANDS, session, start, wait_for_latents};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::msg::{Header, Path, Pose, PoseStamped, StringMsg};
use mindseye_bridge::ros::{Qos, QueuePolicy, RosSession};
use mindseye_bridge::time::Timestamp;
use std::time::{Duration, Instant};

fn ask(client: &RosSession, key: &str, body: serde_json::Value) -> Answer {
    let text = client.query_json(key, &body.to_string(), Duration::from_secs(20)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn check_pose(x: f64, y: f64) {
    // The object is two metres ahead of a base that looks along +y.
    assert!((x - STANDS.0).abs() < 0.02, "x {x}");
    assert!((y - (STANDS.1 + OBJECT_AHEAD_M - STANDOFF_M)).abs() < 0.02, "y {y}");
}

#[test]
fn goals_come_by_topic_and_by_query() {
    let (node, _robot_session, port) = start(Duration::from_millis(2));
    let client = session("client", None, Some(port));
    let goal_pose =
        client.subscriber::<PoseStamped>("/goal_pose", &Qos::default(), QueuePolicy::KeepLast(10)).unwrap();
    let status =
        client.subscriber::<StringMsg>("/mindseye/status", &Qos::default(), QueuePolicy::Latest).unwrap();
    let text = client.publisher::<StringMsg>("/mindseye/goal/text", &Qos::default()).unwrap();
    let _robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 2);
    assert!(text.wait_for_subscribers(Duration::from_secs(5)));

    text.publish(&StringMsg { data: "find the chair".into() }).unwrap();
    let got = goal_pose.recv_timeout(Duration::from_secs(10)).unwrap().expect("a goal pose");
    assert_eq!(got.message.header.frame_id, "odom");
    check_pose(got.message.pose.position.x, got.message.pose.position.y);

    // Asking only is answered, and moves nobody.
    let answer = ask(&client, "mindseye/test/ground", serde_json::json!({"text": "the table"}));
    assert_eq!(answer.status, Status::Found, "{answer:?}");
    let pose = answer.pose.clone().unwrap();
    check_pose(pose.x, pose.y);
    let covariance = answer.covariance.unwrap();
    assert!(covariance.len() == 36 && covariance[0] > 0.0 && covariance[35] > 0.0);
    assert!(answer.consistency.unwrap() > 0.5);
    assert!(answer.timings_ms.contains_key("denoise") && answer.timings_ms.contains_key("total"));
    assert!(goal_pose.recv_timeout(Duration::from_millis(300)).unwrap().is_none(), "nothing was published");

    // Navigating to the same pose again so soon restarts nobody's action; the answer comes all the same.
    let answer = ask(&client, "mindseye/test/navigate", serde_json::json!({"text": "the chair"}));
    assert_eq!(answer.status, Status::Found);
    assert!(goal_pose.recv_timeout(Duration::from_millis(300)).unwrap().is_none());

    let document = client.query_json("mindseye/test/status", "", Duration::from_secs(5)).unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["goals"]["goals"], 3);
    assert_eq!(document["goals"]["answers"], 3);
    assert_eq!(document["goals"]["published"], 1);
    assert!(document["context"]["latents"].as_u64().unwrap() >= 2);
    assert!(status.recv_timeout(Duration::from_secs(2)).unwrap().is_some(), "status is published");
}

#[test]
fn waypoints_come_by_topic() {
    let (node, _robot_session, port) = start(Duration::from_millis(1));
    let client = session("client", None, Some(port));
    let goal_pose =
        client.subscriber::<PoseStamped>("/goal_pose", &Qos::default(), QueuePolicy::Latest).unwrap();
    let waypoints = client.publisher::<Path>("/mindseye/goal/waypoints", &Qos::default()).unwrap();
    let _robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 2);
    assert!(waypoints.wait_for_subscribers(Duration::from_secs(5)));
    let header = Header::new(Timestamp::ZERO, "base_link");
    let stop = |x: f64| PoseStamped {
        header: header.clone(),
        pose: Pose::from_pose2(mindseye::planar::Pose2::new(x, 0.0, 0.0)),
    };
    // The fake's drive ends 0.9 m ahead: so does this route.
    waypoints.publish(&Path { header: header.clone(), poses: vec![stop(0.4), stop(0.9)] }).unwrap();
    let got = goal_pose.recv_timeout(Duration::from_secs(10)).unwrap().expect("a goal pose");
    assert!((got.message.pose.position.x - STANDS.0).abs() < 1e-6);
    assert!((got.message.pose.position.y - STANDS.1 - 0.9).abs() < 1e-6);
    // A route that the imagination does not follow is withheld.
    let answer = ask(
        &client,
        "mindseye/test/navigate",
        serde_json::json!({"waypoints": [[1.0, 1.0, 0.0], [4.0, 4.0, 0.0]]}),
    );
    assert_eq!(answer.status, Status::Inconsistent, "{answer:?}");
    assert!(answer.pose.is_none());
}

#[test]
fn a_stalled_camera_is_stale_and_recovers() {
    let (node, _robot_session, port) = start(Duration::from_millis(1));
    let client = session("client", None, Some(port));
    let nothing = ask(&client, "mindseye/test/ground", serde_json::json!({"text": "the chair"}));
    assert_eq!(nothing.status, Status::Stale, "no frame at all: {nothing:?}");
    assert!(nothing.reason.unwrap().contains("no camera frame"));
    let mut robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 1);
    robot.stall();
    std::thread::sleep(Duration::from_millis(700));
    let answer = ask(&client, "mindseye/test/ground", serde_json::json!({"text": "the chair"}));
    assert_eq!(answer.status, Status::Stale, "{answer:?}");
    assert!(answer.pose.is_none());
    let patient = serde_json::json!({"text": "the chair", "max_age_ms": 60000});
    assert_eq!(ask(&client, "mindseye/test/ground", patient).status, Status::Found);
}

#[test]
fn deadlines_and_cancellation_are_kept() {
    // One step takes two evaluations of 40 ms: a full drive takes more than 800 ms.
    let (node, _robot_session, port) = start(Duration::from_millis(40));
    let client = session("client", None, Some(port));
    let cancel = client.publisher::<StringMsg>("/mindseye/goal/cancel", &Qos::default()).unwrap();
    let _robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 2);
    assert!(cancel.wait_for_subscribers(Duration::from_secs(5)));

    for deadline_ms in [50, 300] {
        let body = serde_json::json!({"text": "the chair", "deadline_ms": deadline_ms});
        let began = Instant::now();
        let answer = ask(&client, "mindseye/test/ground", body);
        let took = began.elapsed().as_millis() as u64;
        let reduced = answer.status == Status::Found && (answer.steps as usize) < crate::fake::STEPS;
        assert!(answer.status == Status::Late || reduced, "{deadline_ms} ms: {answer:?}");
        assert!(took <= deadline_ms + 200, "{deadline_ms} ms: answered after {took} ms");
        if reduced {
            assert!(answer.reason.is_some(), "what was left out is said");
        }
    }

    let asked = std::thread::spawn({
        let other = session("other", None, Some(port));
        move || {
            let answer = ask(&other, "mindseye/test/ground", serde_json::json!({"text": "the chair"}));
            (answer, Instant::now())
        }
    });
    std::thread::sleep(Duration::from_millis(350));
    let began = Instant::now();
    cancel.publish(&StringMsg { data: String::new() }).unwrap();
    let (answer, at) = asked.join().unwrap();
    assert_eq!(answer.status, Status::Cancelled, "{answer:?}");
    let took = at.saturating_duration_since(began);
    assert!(took < Duration::from_millis(80 + 120), "cancelled after {took:?}");

    // The next goal is served at once, not after the cancelled one has run to its end.
    let began = Instant::now();
    let answer =
        ask(&client, "mindseye/test/ground", serde_json::json!({"text": "the chair", "deadline_ms": 5000}));
    assert_eq!(answer.status, Status::Found);
    assert!(began.elapsed() < Duration::from_millis(2000), "{:?}", began.elapsed());
}

#[test]
fn bad_goals_fail_clearly_and_the_next_one_works() {
    let (node, _robot_session, port) = start(Duration::from_millis(1));
    let client = session("client", None, Some(port));
    let _robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 1);
    let key = "mindseye/test/ground";
    let cases = [
        (serde_json::json!({"text": ""}), "empty"),
        (serde_json::json!({"text": "   "}), "empty"),
        (serde_json::json!({"text": "x".repeat(10_000)}), "10000 characters"),
        (serde_json::json!({"text": "find the fridge"}), "it knows chair, table"),
        (serde_json::json!({"waypoints": [[1000.0, 0.0, 0.0]]}), "1000.0 m away"),
        (serde_json::json!({"waypoints": [[null, 0.0, 0.0]]}), "JSON"),
        (serde_json::json!({"waypoints": []}), "no waypoints"),
        (serde_json::json!({"text": "chair", "colour": "red"}), "colour"),
        (serde_json::json!([1, 2]), "JSON"),
    ];
    for (body, want) in cases {
        let answer = ask(&client, key, body.clone());
        assert_eq!(answer.status, Status::Failed, "{body}: {answer:?}");
        let reason = answer.reason.unwrap();
        assert!(reason.contains(want), "{body}: {reason}");
        assert!(!reason.contains('\n'), "one line: {reason}");
        let next = ask(&client, key, serde_json::json!({"text": "the chair"}));
        assert_eq!(next.status, Status::Found, "after {body}: {next:?}");
    }
    let waypoint = planar_pose_with_nan();
    assert!(waypoint.is_err());
}

/// NaN cannot travel in JSON; by topic it is refused before it reaches the agent.
fn planar_pose_with_nan() -> Result<mindseye_bridge::Goal, mindseye_bridge::goal::GoalError> {
    let mut pose = PoseStamped::default();
    pose.pose.orientation.w = 1.0;
    pose.pose.position.x = f64::NAN;
    mindseye_bridge::Goal::from_path("x", &Path { header: Header::default(), poses: vec![pose] })
}
