//! ROS 2 over Zenoh: our session against itself and against plain Zenoh sessions that see the raw keys,
//! over TCP on the loopback, without scouting.

use mindseye_bridge::image::{Limits, decode_compressed_rgb8};
use mindseye_bridge::msg::{
    CancelGoalRequest, CancelGoalResponse, CompressedImage, CompressedImageView, Header, Image, ImageView,
    NavigateFeedback, NavigateGetResultRequest, NavigateGetResultResponse, NavigateSendGoalRequest,
    NavigateSendGoalResponse, PoseStamped, RosType, StringMsg, TFMessage, TransformStamped,
};
use mindseye_bridge::ros::{
    Attachment, CancelOutcome, Distro, Durability, EndpointKind, History, KeyStyle, Mode, NavResult, Qos,
    QueuePolicy, Reliability, RosConfig, RosError, RosSession, Token, gid_of,
};
use mindseye_bridge::{TimeDelta, Timestamp};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use zenoh::Wait;

/// Waits instead of dropping, so that a busy machine loses nothing in a test that counts.
const LOSSLESS: Qos =
    Qos { reliability: Reliability::Reliable, durability: Durability::Volatile, history: History::KeepAll };
const SECOND: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(10);

fn free_endpoint() -> String {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("tcp/127.0.0.1:{port}")
}

fn listening(node: &str, endpoint: &str) -> RosConfig {
    let mut c = RosConfig::in_process(node);
    c.zenoh.listen = Some(vec![endpoint.to_owned()]);
    c
}

fn connecting(node: &str, endpoint: &str) -> RosConfig {
    let mut c = RosConfig::in_process(node);
    c.zenoh.connect = Some(vec![endpoint.to_owned()]);
    c
}

/// Two sessions of ours, linked over TCP.
fn pair() -> (RosSession, RosSession) {
    let endpoint = free_endpoint();
    let a = RosSession::open(&listening("robot", &endpoint)).unwrap();
    let b = RosSession::open(&connecting("agent", &endpoint)).unwrap();
    (a, b)
}

/// Waits until `from` knows what `to` subscribes to: until then Zenoh sends everything to a new peer, and what was published
/// before a subscription may still arrive after it.
fn greeted(from: &RosSession, to: &RosSession) {
    let publisher = from.publisher::<StringMsg>("greeting", &Qos::default()).unwrap();
    let _subscriber = to.subscriber::<StringMsg>("greeting", &Qos::default(), QueuePolicy::Latest).unwrap();
    assert!(publisher.wait_for_subscribers(LONG), "the two sessions are not linked");
}

/// A plain Zenoh session that listens, and one of ours connected to it.
fn with_plain(config: impl Fn(&mut RosConfig)) -> (zenoh::Session, RosSession) {
    let endpoint = free_endpoint();
    let plain = zenoh::open(listening("unused", &endpoint).to_zenoh().unwrap()).wait().unwrap();
    let mut c = connecting("agent", &endpoint);
    config(&mut c);
    (plain, RosSession::open(&c).unwrap())
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what} did not happen within {LONG:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the other side's subscription to a key is known here.
fn wait_for_subscription(plain: &zenoh::Session, key: &str) {
    let publisher = plain.declare_publisher(key.to_owned()).wait().unwrap();
    eventually("subscription", || publisher.matching_status().wait().unwrap().matching());
}

fn pose(x: f64) -> PoseStamped {
    let mut p = PoseStamped { header: Header::new(Timestamp(7_000_000_009), "map"), ..Default::default() };
    p.pose.position.x = x;
    p
}

#[test]
fn poses_travel_with_key_attachment_and_token() {
    let (plain, ours) = with_plain(|_| {});
    let (tx, rx) = mpsc::channel();
    let _sub = plain.declare_subscriber("0/**").callback(move |s| tx.send(s).unwrap()).wait().unwrap();
    let publisher = ours.publisher::<PoseStamped>("/goal_pose", &Qos::default()).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    for i in 1..=3 {
        assert_eq!(publisher.publish(&pose(f64::from(i))).unwrap(), i64::from(i));
    }
    let mut tokens: Vec<Token> = Vec::new();
    eventually("tokens", || {
        let replies = plain.liveliness().get("@ros2_lv/0/**").wait().unwrap();
        tokens = replies
            .into_iter()
            .filter_map(|r| Token::parse(r.into_result().ok()?.key_expr().as_str()))
            .collect();
        tokens.len() == 2
    });
    let token = tokens.iter().find(|t| t.kind == EndpointKind::Publisher).expect("publisher token");
    assert!(tokens.iter().any(|t| t.kind == EndpointKind::Node && t.node == "agent"));
    let endpoint = token.endpoint.as_ref().unwrap();
    assert_eq!((endpoint.topic.as_str(), endpoint.type_name.as_str()), ("/goal_pose", PoseStamped::NAME));
    assert_eq!(endpoint.qos, Some(Qos::default()));
    for i in 1..=3i64 {
        let s = rx.recv_timeout(LONG).unwrap();
        assert_eq!(
            s.key_expr().as_str(),
            "0/goal_pose/geometry_msgs::msg::dds_::PoseStamped_/RIHS01_10f3786d7d40fd2b54367835614bff85d4ad3b5dab62bf8bca0cc232d73b4cd8"
        );
        assert_eq!(s.payload().len(), 76);
        assert_eq!(PoseStamped::decode(&s.payload().to_bytes()).unwrap(), pose(i as f64));
        let bytes = s.attachment().unwrap().to_bytes();
        assert_eq!(bytes.len(), 33);
        let a = Attachment::from_bytes(&bytes).unwrap();
        assert_eq!((a.sequence, a.gid), (i, gid_of(&token.key())));
        let age = mindseye_bridge::clock::now().0 - a.source_stamp_ns;
        assert!((0..60_000_000_000).contains(&age), "{age}");
    }
}

#[test]
fn both_ways_and_the_graph() {
    let (robot, agent) = pair();
    let publisher = robot.publisher::<StringMsg>("chatter", &Qos::default()).unwrap();
    let subscriber =
        agent.subscriber::<StringMsg>("/chatter", &Qos::default(), QueuePolicy::KeepLast(8)).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    for text in ["a", "", "grün"] {
        publisher.publish(&StringMsg { data: text.into() }).unwrap();
        let got = subscriber.recv_timeout(LONG).unwrap().unwrap();
        assert_eq!(got.message.data, text);
        assert_eq!(got.info.attachment.unwrap().gid, publisher.raw().gid());
    }
    let graph = agent.graph().unwrap();
    assert!(graph.wait_until(LONG, |g| {
        g.nodes().len() == 2
            && g.topics().iter().any(|t| {
                t.name == "/chatter"
                    && t.type_name == StringMsg::NAME
                    && t.hash == StringMsg::HASH
                    && (t.publishers, t.subscriptions) == (1, 1)
            })
    }));
    let names: Vec<String> = graph.nodes().into_iter().map(|n| n.name).collect();
    assert_eq!(names, ["agent", "robot"]);

    // A second node, in a namespace, on the same session.
    let arm = robot.another_node("arm", "/bot1").unwrap();
    let lamp = arm.publisher::<StringMsg>("lamp", &Qos::default()).unwrap();
    assert_eq!(lamp.raw().topic(), "/bot1/lamp");
    assert!(graph.wait_until(LONG, |g| g.publishers_of("/bot1/lamp").len() == 1));
    assert!(graph.nodes().iter().any(|n| n.namespace == "/bot1" && n.name == "arm"));
    drop((lamp, arm));
    assert!(graph.wait_until(LONG, |g| g.publishers_of("/bot1/lamp").is_empty() && g.nodes().len() == 2));
}

#[test]
fn latched_topics_reach_late_subscribers() {
    let (robot, agent) = pair();
    greeted(&robot, &agent);
    let publisher = robot.publisher::<TFMessage>("/tf_static", &Qos::latched(3)).unwrap();
    let message = |i: i64| TFMessage {
        transforms: vec![TransformStamped::new(Timestamp(i), "base_link", "camera", &Default::default())],
    };
    for i in 1..=5 {
        publisher.publish(&message(i)).unwrap();
    }
    let late =
        agent.subscriber::<TFMessage>("/tf_static", &Qos::latched(3), QueuePolicy::KeepLast(10)).unwrap();
    for i in 3..=5 {
        assert_eq!(late.recv_timeout(LONG).unwrap().expect("latched").message, message(i));
    }
    publisher.publish(&message(6)).unwrap();
    assert_eq!(late.recv_timeout(LONG).unwrap().unwrap().message, message(6));
    assert!(late.recv_timeout(Duration::from_millis(200)).unwrap().is_none());
}

#[test]
fn a_slow_consumer_costs_messages_and_they_are_counted() {
    let (robot, agent) = pair();
    let publisher = robot.publisher::<PoseStamped>("/p", &LOSSLESS).unwrap();
    let latest = agent.subscriber::<PoseStamped>("/p", &Qos::default(), QueuePolicy::Latest).unwrap();
    let five = agent.subscriber::<PoseStamped>("/p", &Qos::default(), QueuePolicy::KeepLast(5)).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    for i in 0..100 {
        publisher.publish(&pose(f64::from(i))).unwrap();
    }
    eventually("arrival", || latest.counts().received == 100 && five.counts().received == 100);
    assert_eq!((latest.counts().dropped, five.counts().dropped), (99, 95));
    assert_eq!(latest.recv_timeout(SECOND).unwrap().unwrap().message, pose(99.0));
    let kept: Vec<f64> =
        std::iter::from_fn(|| five.try_recv().unwrap()).map(|r| r.message.pose.position.x).collect();
    assert_eq!(kept, [95.0, 96.0, 97.0, 98.0, 99.0]);
    assert_eq!(latest.counts().missed, 0);
}

#[test]
fn distributions_and_wrong_types() {
    let (plain, ours) = with_plain(|_| {});
    let subscriber = ours.subscriber::<PoseStamped>("/g", &Qos::default(), QueuePolicy::KeepLast(9)).unwrap();
    let put = |hash: &str, payload: Vec<u8>| {
        let key = format!("0/g/geometry_msgs::msg::dds_::PoseStamped_/{hash}");
        plain.put(key, payload).wait().unwrap();
    };
    wait_for_subscription(&plain, "0/g/geometry_msgs::msg::dds_::PoseStamped_/x");
    put("TypeHashNotSupported", pose(1.0).encode());
    put(PoseStamped::HASH, pose(2.0).encode());
    put("RIHS01_0000000000000000000000000000000000000000000000000000000000000000", pose(3.0).encode());
    put(PoseStamped::HASH, vec![0, 1, 0, 0, 1]);
    put(PoseStamped::HASH, StringMsg { data: "not a pose".into() }.encode());
    put(PoseStamped::HASH, pose(4.0).encode());
    assert_eq!(subscriber.recv_timeout(LONG).unwrap().unwrap().message, pose(1.0));
    assert_eq!(subscriber.recv_timeout(LONG).unwrap().unwrap().message, pose(2.0));
    for want in ["header.stamp.sec", "header"] {
        let error = subscriber.recv_timeout(LONG).unwrap_err();
        assert!(matches!(error, RosError::Decode { .. }) && error.to_string().contains(want), "{error}");
    }
    // Without an attachment the message counts as well.
    let last = subscriber.recv_timeout(LONG).unwrap().unwrap();
    assert_eq!((last.message, last.info.attachment), (pose(4.0), None));
    let counts = subscriber.counts();
    assert_eq!((counts.wrong_hash, counts.bad), (1, 2));
}

#[test]
fn humble_keys() {
    let (plain, ours) = with_plain(|c| c.distro = Distro::Humble);
    let (tx, rx) = mpsc::channel();
    let _sub = plain.declare_subscriber("0/**").callback(move |s| tx.send(s).unwrap()).wait().unwrap();
    let publisher = ours.publisher::<PoseStamped>("/goal_pose", &Qos::default()).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    publisher.publish(&pose(1.0)).unwrap();
    let key = rx.recv_timeout(LONG).unwrap().key_expr().to_string();
    assert_eq!(key, "0/goal_pose/geometry_msgs::msg::dds_::PoseStamped_/TypeHashNotSupported");
}

#[test]
fn plain_keys_of_bridges() {
    for (style, key) in [(KeyStyle::Ros2Dds, "bot1/goal_pose"), (KeyStyle::Raw, "bot1/goal_pose")] {
        let (plain, ours) = with_plain(|c| {
            c.key_style = style;
            c.namespace = "/bot1".into();
        });
        let (tx, rx) = mpsc::channel();
        let all = plain.declare_subscriber("**").callback(move |s| tx.send(s).unwrap()).wait().unwrap();
        let publisher = ours.publisher::<PoseStamped>("goal_pose", &Qos::default()).unwrap();
        assert!(publisher.wait_for_subscribers(LONG));
        publisher.publish(&pose(1.0)).unwrap();
        let s = rx.recv_timeout(LONG).unwrap();
        assert_eq!((s.key_expr().as_str(), s.attachment().is_none()), (key, true));
        let subscriber = ours.subscriber::<StringMsg>("/text", &Qos::default(), QueuePolicy::Latest).unwrap();
        // Its own subscription to everything would match at once.
        all.undeclare().wait().unwrap();
        wait_for_subscription(&plain, "text");
        plain.put("text", StringMsg { data: "go".into() }.encode()).wait().unwrap();
        assert_eq!(subscriber.recv_timeout(LONG).unwrap().unwrap().message.data, "go");
        assert!(ours.graph().is_none());
        let tokens = plain.liveliness().get("**").timeout(SECOND).wait().unwrap().into_iter().count();
        assert_eq!(tokens, 0);
    }
}

/// A camera of Lyrical or newer sends on the plain key only while the graph holds a subscription without
/// `backends:` whose QoS matches its own; it is best effort.
#[test]
fn buffer_aware_cameras_are_woken() {
    let (plain, ours) = with_plain(|_| {});
    let (tx, rx) = mpsc::channel();
    let _watch = plain
        .liveliness()
        .declare_subscriber("@ros2_lv/0/**")
        .history(true)
        .callback(move |s| tx.send(s.key_expr().to_string()).unwrap())
        .wait()
        .unwrap();
    let topic = "/camera/image_raw/compressed";
    let (name, hash) = (CompressedImage::NAME, CompressedImage::HASH);
    let camera =
        ours.raw_subscriber(topic, name, Some(hash), &Qos::SENSOR_DATA, QueuePolicy::KeepLast(16)).unwrap();
    let token = std::iter::from_fn(|| rx.recv_timeout(LONG).ok())
        .filter_map(|k| Token::parse(&k))
        .find(|t| t.kind == EndpointKind::Subscription)
        .expect("subscription token");
    assert!(token.key().ends_with("/2::,10:,:,:,,"), "{}", token.key());
    let e = token.endpoint.unwrap();
    assert_eq!((e.topic.as_str(), e.backends), ("/camera/image_raw/compressed", None));
    assert_eq!(e.type_name, CompressedImage::NAME);

    let key = format!("0/camera/image_raw/compressed/sensor_msgs::msg::dds_::CompressedImage_/{}", e.hash);
    let image =
        CompressedImage { header: Header::new(Timestamp(5), "cam"), format: "png".into(), data: png() };
    plain.put(&key, image.encode()).wait().unwrap();
    let next = || {
        let sample = camera.recv_timeout(LONG).expect("frame");
        let (mut scratch, mut rgb) = (Vec::new(), Vec::new());
        let view = CompressedImageView::decode(sample.bytes(&mut scratch)).unwrap();
        decode_compressed_rgb8(view.data, &Limits::default(), &mut rgb)
            .map(|size| (size.width, size.height, rgb))
    };
    assert_eq!(next(), Ok((2, 1, vec![255, 0, 0, 0, 0, 255])));
    plain.put(&key, CompressedImage { data: vec![1, 2, 3], ..image.clone() }.encode()).wait().unwrap();
    assert!(next().is_err());
    plain.put(&key, image.encode()).wait().unwrap();
    assert!(next().is_ok());
    let c = camera.counts();
    assert_eq!((c.received, c.dropped), (3, 0));
}

/// A PNG of 2 x 1 pixels, red and blue, written by hand: stored (uncompressed) deflate block.
fn png() -> Vec<u8> {
    let mut out = vec![0x89, b'P', b'N', b'G', 13, 10, 26, 10];
    let mut chunk = |name: &[u8; 4], data: &[u8]| {
        out.extend((data.len() as u32).to_be_bytes());
        let body = [&name[..], data].concat();
        out.extend(&body);
        out.extend(crc32(&body).to_be_bytes());
    };
    chunk(b"IHDR", &[0, 0, 0, 2, 0, 0, 0, 1, 8, 2, 0, 0, 0]);
    let raw = [0u8, 255, 0, 0, 0, 0, 255];
    let (mut a, mut b) = (1u32, 0u32);
    for v in raw {
        a = (a + u32::from(v)) % 65_521;
        b = (b + a) % 65_521;
    }
    let mut zlib = vec![0x78, 1, 1, 7, 0, 0xf8, 0xff];
    zlib.extend(raw);
    zlib.extend((b << 16 | a).to_be_bytes());
    chunk(b"IDAT", &zlib);
    chunk(b"IEND", &[]);
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| {
        (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

#[test]
fn a_stalled_consumer_gets_the_newest_pictures() {
    let (robot, agent) = pair();
    let topic = "/camera/image_raw";
    let camera = robot.publisher::<Image>(topic, &LOSSLESS).unwrap();
    let pictures = agent
        .raw_subscriber(topic, Image::NAME, Some(Image::HASH), &Qos::SENSOR_DATA, QueuePolicy::KeepLast(2))
        .unwrap();
    assert!(camera.wait_for_subscribers(LONG));
    let image = |i: u8| Image {
        header: Header::new(Timestamp(i64::from(i)), "cam"),
        height: 480,
        width: 640,
        encoding: "rgb8".into(),
        step: 640 * 3,
        data: vec![i; 640 * 480 * 3],
        ..Default::default()
    };
    let mut scratch = Vec::new();
    let mut stamp_of = |sample: &mindseye_bridge::ros::RawSample| {
        let view = ImageView::decode(sample.bytes(&mut scratch)).unwrap();
        let stamp = view.header.stamp.timestamp();
        assert!(view.data.len() == 640 * 480 * 3 && view.data.iter().all(|v| i64::from(*v) == stamp.0));
        stamp.0
    };
    for i in 0..20 {
        camera.publish(&image(i)).unwrap();
        assert_eq!(stamp_of(&pictures.recv_timeout(LONG).expect("frame")), i64::from(i));
    }
    for i in 20..40 {
        camera.publish(&image(i)).unwrap();
    }
    // Everything is counted, the two newest wait.
    eventually("the rest", || pictures.counts().received == 40);
    assert_eq!(pictures.counts().dropped, 18);
    let left: Vec<i64> = std::iter::from_fn(|| pictures.try_recv()).map(|s| stamp_of(&s)).collect();
    assert_eq!(left, [38, 39]);
}

#[test]
fn json_queries() {
    let (robot, agent) = pair();
    let server = agent.json_queryable("mindseye/bot1/ground").unwrap();
    let thread = std::thread::spawn(move || {
        let first = server.recv_timeout(LONG).unwrap();
        let body: serde_json::Value = serde_json::from_slice(first.body()).unwrap();
        first.reply(&serde_json::json!({"echo": body["text"]}).to_string()).unwrap();
        server.recv_timeout(LONG).unwrap().refuse("text is empty");
        drop(server.recv_timeout(LONG).unwrap());
    });
    let ask = |body: &str, timeout| robot.query_json("mindseye/bot1/ground", body, timeout);
    let mut first = ask(r#"{"text": "chair"}"#, LONG);
    let until = Instant::now() + LONG;
    // The queryable's declaration may still be on its way.
    while matches!(first, Err(RosError::Timeout { .. })) && Instant::now() < until {
        first = ask(r#"{"text": "chair"}"#, LONG);
    }
    assert_eq!(first.unwrap(), r#"{"echo":"chair"}"#);
    let refused = ask("{}", LONG).unwrap_err().to_string();
    assert!(refused.contains("text is empty"), "{refused}");
    let huge = "x".repeat(2 << 20);
    let refused = ask(&huge, LONG).unwrap_err().to_string();
    assert!(refused.contains("2097152 bytes"), "{refused}");
    // It lets go of the request, and is gone.
    assert!(matches!(
        ask("{}", SECOND),
        Err(RosError::Timeout { .. } | RosError::Unanswered { .. } | RosError::NoServer { .. })
    ));
    thread.join().unwrap();
    let nobody = robot.query_json("mindseye/bot1/nothing", "{}", SECOND);
    assert!(matches!(nobody, Err(RosError::NoServer { .. })), "{nobody:?}");
}

/// A peer that asks as soon as its session is open does not know yet who serves the key; one answer in five got lost.
#[test]
fn a_fresh_session_is_answered_every_time() {
    let endpoint = free_endpoint();
    let mut c = listening("router", &endpoint);
    c.zenoh.mode = Some(Mode::Router);
    let _router = zenoh::open(c.to_zenoh().unwrap()).wait().unwrap();
    // Peers reach each other directly; the router tells them where.
    let mut c = connecting("robot", &endpoint);
    c.zenoh.listen = Some(vec!["tcp/127.0.0.1:0".into()]);
    let robot = RosSession::open(&c).unwrap();
    let server = robot.json_queryable("mindseye/bot1/status").unwrap();
    let thread = std::thread::spawn(move || {
        let mut answered = 0;
        while let Some(request) = server.recv_timeout(LONG) {
            match request.body() {
                b"stop" => {
                    request.reply("{}").unwrap();
                    break;
                }
                // Let go: whoever asks asks again.
                _ if answered == 7 => answered += 1,
                _ => {
                    request.reply("{}").unwrap();
                    answered += 1;
                }
            }
        }
    });
    for mode in [Mode::Peer, Mode::Client] {
        for round in 0..15 {
            let mut c = connecting("client", &endpoint);
            c.zenoh.mode = Some(mode);
            let client = RosSession::open(&c).unwrap();
            let answer = client.query_json("mindseye/bot1/status", "", LONG);
            assert!(answer.is_ok(), "{mode:?}, round {round}: {answer:?}");
            client.close().unwrap();
        }
    }
    robot.query_json("mindseye/bot1/status", "stop", LONG).unwrap();
    thread.join().unwrap();
}

#[test]
fn claims_of_one_name_find_each_other() {
    let (a, b) = pair();
    let first = a.claim("mindseye/bot1/node").unwrap();
    assert_eq!((first.others(), first.changes()), (vec![], 0));
    let second = b.claim("mindseye/bot1/node").unwrap();
    let other = b.claim("mindseye/bot2/node").unwrap();
    eventually("both know", || first.others().len() == 1 && second.others().len() == 1);
    assert_eq!((&first.others()[0], &second.others()[0]), (second.own(), first.own()));
    assert!(first.own() < second.own(), "who was there first is less");
    assert!(other.others().is_empty(), "another name");
    drop(second);
    eventually("it is gone", || first.others().is_empty() && first.changes() == 2);
}

#[test]
fn navigation_action() {
    let (robot, agent) = pair();
    let part = |name: &str| format!("/navigate_to_pose/_action/{name}");
    let send = robot
        .service_server::<NavigateSendGoalRequest, NavigateSendGoalResponse>(&part("send_goal"))
        .unwrap();
    let result = robot
        .service_server::<NavigateGetResultRequest, NavigateGetResultResponse>(&part("get_result"))
        .unwrap();
    let cancel = robot.service_server::<CancelGoalRequest, CancelGoalResponse>(&part("cancel_goal")).unwrap();
    let feedback = robot.publisher::<NavigateFeedback>(&part("feedback"), &Qos::default()).unwrap();
    let client = agent.navigate_client("/navigate_to_pose").unwrap();
    assert!(agent.graph().unwrap().wait_until(LONG, |g| g.services().len() == 3
        && g.services().iter().all(|s| (s.publishers, s.subscriptions) == (1, 1))));
    assert!(feedback.wait_for_subscribers(LONG));
    let server = std::thread::spawn(move || {
        let refused = send.recv_timeout(LONG).unwrap().unwrap();
        refused.respond(&NavigateSendGoalResponse::default()).unwrap();
        let goal = send.recv_timeout(LONG).unwrap().unwrap();
        let id = goal.request.goal_id;
        assert_eq!(goal.request.pose, pose(2.0));
        let stamp = Timestamp(99).into();
        goal.respond(&NavigateSendGoalResponse { accepted: true, stamp }).unwrap();
        feedback
            .publish(&NavigateFeedback { goal_id: id, distance_remaining: 1.5, ..Default::default() })
            .unwrap();
        let asked = cancel.recv_timeout(LONG).unwrap().unwrap();
        assert_eq!(asked.request.goal_info.goal_id, id);
        asked.respond(&CancelGoalResponse { return_code: 3, ..Default::default() }).unwrap();
        let waiting = result.recv_timeout(LONG).unwrap().unwrap();
        assert_eq!(waiting.request.goal_id, id);
        waiting
            .respond(&NavigateGetResultResponse { status: 6, error_code: 9, error_msg: "stuck".into() })
            .unwrap();
    });
    assert!(client.send_goal(&pose(1.0), "", LONG).unwrap_err().to_string().contains("rejected"));
    let goal = client.send_goal(&pose(2.0), "", LONG).unwrap();
    assert_eq!((goal.accepted_at, goal.id[6] >> 4, goal.id[8] >> 6), (Timestamp(99), 4, 2));
    let told = client.feedback().recv_timeout(LONG).unwrap().unwrap().message;
    assert_eq!((told.goal_id, told.distance_remaining), (goal.id, 1.5));
    assert_eq!(client.cancel(goal.id, LONG).unwrap(), CancelOutcome::AlreadyOver);
    let ended = client.result(goal.id, LONG).unwrap();
    assert_eq!(ended, NavResult::Aborted { code: 9, message: "stuck".into() });
    server.join().unwrap();
    // The server is gone now.
    assert!(client.send_goal(&pose(1.0), "", Duration::from_millis(300)).is_err());
}

#[test]
fn a_router_dies_and_returns_while_messages_flow() {
    let endpoint = free_endpoint();
    let router = || {
        let mut c = listening("router", &endpoint);
        c.zenoh.mode = Some(Mode::Router);
        zenoh::open(c.to_zenoh().unwrap()).wait().unwrap()
    };
    let client = |node: &str| {
        let mut c = connecting(node, &endpoint);
        c.zenoh.mode = Some(Mode::Client);
        c.zenoh.overrides = Some("connect/retry={period_init_ms: 100, period_max_ms: 200}".into());
        RosSession::open(&c).unwrap()
    };
    let first = router();
    let (robot, agent) = (client("robot"), client("agent"));
    let publisher = robot.publisher::<PoseStamped>("/odd", &Qos::default()).unwrap();
    let subscriber = agent.subscriber::<PoseStamped>("/odd", &Qos::default(), QueuePolicy::Latest).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    let flows = |what: &str| {
        eventually(what, || {
            publisher.publish(&pose(1.0)).unwrap();
            matches!(subscriber.recv_timeout(Duration::from_millis(50)), Ok(Some(_)))
        });
    };
    flows("first message");
    assert_eq!((robot.link_losses(), agent.link_losses()), ((0, 0), (0, 0)));
    first.close().wait().unwrap();
    eventually("loss", || robot.link_losses().0 == 1 && agent.link_losses().0 == 1);
    for i in 0..20 {
        // Publishing into the void neither fails nor blocks.
        publisher.publish(&pose(f64::from(i))).unwrap();
    }
    let second = router();
    flows("message after the restart");
    assert_eq!((robot.link_losses(), agent.link_losses()), ((1, 1), (1, 1)));
    assert!(agent.graph().unwrap().wait_until(LONG, |g| g.publishers_of("/odd").len() == 1));
    second.close().wait().unwrap();
}

/// The sender's clock jumps by an hour, forth and back, in the attachment and in the headers: nothing is lost,
/// and the jumps are there to be read.
#[test]
fn clocks_jump() {
    let (plain, ours) = with_plain(|_| {});
    let subscriber =
        ours.subscriber::<PoseStamped>("/g", &Qos::default(), QueuePolicy::KeepLast(99)).unwrap();
    let key = format!("0/g/geometry_msgs::msg::dds_::PoseStamped_/{}", PoseStamped::HASH);
    wait_for_subscription(&plain, &key);
    let now = mindseye_bridge::clock::now();
    let hour = TimeDelta::from_millis(3_600_000);
    let stamps = [now, now + hour, now - hour - hour, Timestamp::ZERO, now];
    for (i, stamp) in stamps.into_iter().enumerate() {
        let message = PoseStamped { header: Header::new(stamp, "map"), ..Default::default() };
        let attachment = Attachment { sequence: i as i64 + 1, source_stamp_ns: stamp.0, gid: [1; 16] };
        plain.put(&key, message.encode()).attachment(attachment.to_bytes()).wait().unwrap();
    }
    for stamp in stamps {
        let got = subscriber.recv_timeout(LONG).unwrap().expect("message");
        assert_eq!(got.message.header.stamp.timestamp(), stamp);
        assert_eq!(got.info.attachment.unwrap().source_stamp_ns, stamp.0);
        assert!((got.info.received_at - now).abs() < TimeDelta::from_millis(60_000));
    }
    assert_eq!(subscriber.counts().missed, 0);
}

#[test]
fn a_publisher_dies_and_returns() {
    let (robot, agent) = pair();
    let subscriber = agent.subscriber::<PoseStamped>("/p", &Qos::default(), QueuePolicy::Latest).unwrap();
    assert_eq!(subscriber.raw().publishers(), Some(0));
    for round in 0..3u64 {
        let publisher = robot.publisher::<PoseStamped>("/p", &Qos::default()).unwrap();
        eventually("publisher", || subscriber.raw().publishers() == Some(1));
        assert!(publisher.wait_for_subscribers(LONG));
        publisher.publish(&pose(1.0)).unwrap();
        assert!(subscriber.recv_timeout(LONG).unwrap().is_some());
        assert_eq!(subscriber.raw().publisher_losses(), (round, round));
        drop(publisher);
        eventually("its end", || subscriber.raw().publisher_losses().0 == round + 1);
        assert_eq!(subscriber.raw().publishers(), Some(0));
    }
    assert_eq!(subscriber.counts().missed, 0);
    // The whole robot goes.
    let publisher = robot.publisher::<PoseStamped>("/p", &Qos::default()).unwrap();
    eventually("publisher", || subscriber.raw().publishers() == Some(1));
    robot.close().unwrap();
    eventually("its end", || subscriber.raw().publishers() == Some(0));
    eventually("lost link", || agent.link_losses().0 == 1);
    assert!(publisher.publish(&pose(1.0)).is_err());
}

#[test]
fn bad_settings_are_refused_in_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("tcp/{}", taken.local_addr().unwrap());
    let check = |config: RosConfig, part: &str| {
        let error = RosSession::open(&config).expect_err(part).to_string();
        assert!(error.contains(part) && !error.contains('\n') && !error.contains(".rs:"), "{error}");
        println!("{error}");
    };
    check(listening("n", &endpoint), &endpoint);
    check(listening("n", "nonsense"), "nonsense");
    check(RosConfig::in_process("a b"), "node");
    check(RosConfig::in_process("a/b"), "namespace");
    check(RosConfig { namespace: "/a//b".into(), ..RosConfig::in_process("n") }, "namespace");
    check(RosConfig { domain_id: 999, ..RosConfig::in_process("n") }, "999");
    let session = RosSession::open(&RosConfig::in_process("n")).unwrap();
    assert!(session.publisher::<PoseStamped>("/a b", &Qos::default()).is_err());
    assert!(session.json_queryable("a//b").is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_can_wait() {
    let session = RosSession::open(&RosConfig::in_process("n")).unwrap();
    let publisher = session.publisher::<StringMsg>("/t", &Qos::default()).unwrap();
    let subscriber =
        session.subscriber::<StringMsg>("/t", &Qos::default(), QueuePolicy::KeepLast(4)).unwrap();
    let queryable = session.json_queryable("mindseye/n/status").unwrap();
    publisher.publish(&StringMsg { data: "one".into() }).unwrap();
    let got = tokio::time::timeout(LONG, subscriber.recv()).await.unwrap().unwrap();
    assert_eq!(got.message.data, "one");
    let asker = session.clone();
    let asked = tokio::task::spawn_blocking(move || asker.query_json("mindseye/n/status", "", LONG).unwrap());
    let request = tokio::time::timeout(LONG, queryable.recv()).await.unwrap().unwrap();
    assert!(request.body().is_empty());
    request.reply("{}").unwrap();
    assert_eq!(asked.await.unwrap(), "{}");
}
