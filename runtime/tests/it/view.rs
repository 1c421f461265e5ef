//! The live page over HTTP and its WebSocket, as browsers and others use it.

use crate::fake::{
    FakeEncoder, FakeMind, FakeRobot, config, free_port, image, noise, session, wait_for_latents,
};
use mindseye::context::{LatentInfo, SegmentReason};
use mindseye::image::RgbImage;
use mindseye::node::{Node, NodeEvent, NodeParts};
use mindseye::planar::Pose2;
use mindseye::record::Recorder;
use mindseye::senses::{Outcome, Sense};
use mindseye::view::foxglove::{Foxglove, FoxgloveConfig, Topic};
use mindseye::view::{
    About, ReportFacts, Reporter, Request, RequestError, VIEWERS_MAX, View, ViewConfig, ViewError, to_node,
};
use mindseye_bridge::msg::RosType;
use mindseye_bridge::ros::RosSession;
use mindseye_bridge::time::Timestamp;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn view_on(address: &str, control: bool) -> View {
    View::start(ViewConfig {
        address: address.parse().unwrap(),
        control,
        about: About { robot: "test".into(), boxed_frames: 4, ..About::default() },
        decoder: Some(Box::new(|latents| {
            Ok(vec![RgbImage::filled(24, 16, [200, 90, 10]); latents.len() / 12 * 4])
        })),
    })
    .unwrap()
}

/// The server's address as seen from this machine.
fn local(view: &View) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], view.address().port()))
}

/// A request with these header lines; gives status, head and body.
fn http(to: SocketAddr, path: &str, headers: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let host = if headers.contains("Host:") { String::new() } else { format!("Host: {to}\r\n") };
    write!(stream, "GET {path} HTTP/1.1\r\n{host}{headers}Connection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_owned(), body.to_owned())
}

/// A client's end of a WebSocket.
struct Socket(TcpStream);

enum Message {
    Text(String),
    Binary(Vec<u8>),
}

impl Socket {
    fn send(&mut self, opcode: u8, content: &[u8]) -> std::io::Result<()> {
        let mut frame = vec![0x80 | opcode, 0x80 | 127];
        frame.extend((content.len() as u64).to_be_bytes());
        frame.extend([0; 4]); // a mask that changes nothing
        frame.extend(content);
        self.0.write_all(&frame)
    }

    fn read(&mut self) -> std::io::Result<Message> {
        let mut head = [0; 2];
        self.0.read_exact(&mut head)?;
        let mut long = [0; 8];
        let length = match head[1] {
            126 => {
                self.0.read_exact(&mut long[6..])?;
                u64::from_be_bytes(long)
            }
            127 => {
                self.0.read_exact(&mut long)?;
                u64::from_be_bytes(long)
            }
            n => u64::from(n),
        };
        let mut content = vec![0; length as usize];
        self.0.read_exact(&mut content)?;
        match head[0] {
            0x81 => Ok(Message::Text(String::from_utf8(content).unwrap())),
            0x82 => Ok(Message::Binary(content)),
            other => Err(std::io::Error::other(format!("closed: {other}"))),
        }
    }
}

/// Opens a WebSocket, or gives the status that it was refused with.
fn open_with(to: SocketAddr, path: &str, origin: Option<&str>) -> Result<Socket, u16> {
    open_as(to, path, origin, "").map(|(socket, _)| socket)
}

/// As [`open_with`], with more header lines; gives the head of the answer, too.
fn open_as(to: SocketAddr, path: &str, origin: Option<&str>, more: &str) -> Result<(Socket, String), u16> {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let origin = origin.map(|origin| format!("Origin: {origin}\r\n")).unwrap_or_default();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {to}\r\n{origin}Upgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
    )
    .unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    match head[9..12].parse().unwrap() {
        101 => {
            assert!(head.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{head}");
            Ok((Socket(stream), head))
        }
        status => Err(status),
    }
}

fn open(view: &View) -> Socket {
    open_with(local(view), "/live", None).unwrap()
}

/// Reads until a document satisfies `wanted`; pictures are counted.
fn read_until(socket: &mut Socket, pictures: &mut usize, wanted: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(30) {
        match socket.read().unwrap() {
            Message::Text(text) => {
                let document: Value = serde_json::from_str(&text).unwrap();
                if wanted(&document) {
                    return document;
                }
            }
            Message::Binary(file) => {
                assert!(file.starts_with(b"\x89PNG") || file.starts_with(&[0xff, 0xd8]));
                *pictures += 1;
            }
        }
    }
    panic!("it did not come");
}

fn kind(document: &Value, name: &str) -> bool {
    document["kind"] == name
}

fn tell(socket: &mut Socket, text: &str) -> Value {
    socket.send(1, text.as_bytes()).unwrap();
    read_until(socket, &mut 0, |d| kind(d, "reply"))
}

/// A node with the fake model, and a page that watches it.
fn watched(delay: Duration) -> (View, Node, RosSession, RosSession) {
    let view = view_on("127.0.0.1:0", false);
    let port = free_port();
    let session_of_node = session("mindseye", Some(port), None);
    let tap = view.tap();
    let parts = NodeParts {
        config: config(),
        mind: Box::new(FakeMind::new(delay)),
        encoder: Box::new(FakeEncoder),
        record: None,
        observer: Some(Box::new(move |event| tap.hear(event))),
    };
    let node = Node::start(&session_of_node, parts).unwrap();
    view.handle_requests(to_node(node.requester()));
    let client = session("client", None, Some(port));
    (view, node, session_of_node, client)
}

#[test]
fn a_viewer_sees_asks_and_is_answered() {
    let (view, node, _session, client) = watched(Duration::from_millis(30));
    let mut socket = open(&view);
    let mut pictures = 0;
    let hello = read_until(&mut socket, &mut pictures, |d| kind(d, "hello"));
    assert_eq!((&hello["control"], &hello["about"]["robot"]), (&Value::Bool(true), &"test".into()));
    let _robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 2);
    let memory = read_until(&mut socket, &mut pictures, |d| {
        kind(d, "memory") && d["moments"].as_array().is_some_and(|m| m.len() >= 2)
    });
    assert_eq!(memory["pictures"]["frames"], memory["moments"].as_array().unwrap().len());
    assert!(memory["pictures"]["url"].as_str().unwrap().starts_with("data:image/png;base64,"));
    let map = read_until(&mut socket, &mut pictures, |d| kind(d, "map") && !d["here"].is_null());
    assert_eq!(map["here"], serde_json::json!([1.0, 2.0, 1.571]));
    read_until(&mut socket, &mut pictures, |d| {
        kind(d, "status") && d["node"]["frames"]["received"].as_u64() > Some(3)
    });

    // HTML in a goal is text.
    let words = "find the <img src=x onerror=alert(1)> chair";
    assert_eq!(tell(&mut socket, &serde_json::json!({"ask": words}).to_string())["ok"], true);
    // A drive is seen while it is imagined: the goal is not over then.
    let candidate = read_until(&mut socket, &mut pictures, |d| {
        kind(d, "candidate") && d["step"].as_u64() < d["steps"].as_u64()
    });
    assert_eq!((&candidate["drive"]["frames"], &candidate["steps"]), (&12.into(), &10.into()));
    let goal = read_until(&mut socket, &mut pictures, |d| kind(d, "goal") && d["over"] == true);
    assert_eq!((&goal["words"], &goal["answer"]["status"]), (&words.into(), &"found".into()), "{goal}");
    assert_eq!((&goal["chosen"], &goal["parts"][0]["value"].is_number()), (&0.into(), &true));
    assert!(goal["deadline_ms"].as_f64() > goal["elapsed_ms"].as_f64(), "{goal}");
    let mut stages: Vec<&str> =
        goal["stages"].as_array().unwrap().iter().filter_map(|s| s[0].as_str()).collect();
    // More than six moments are looked through first.
    stages.retain(|stage| *stage != "look through memory");
    assert_eq!(stages, ["text", "encode", "draft", "imagine", "decode", "lift"].as_slice(), "{goal}");
    assert!(
        goal["witnesses"].as_array().unwrap().len() >= 2 && goal["imagined"].as_array().unwrap().len() == 3
    );
    assert!(pictures > 0, "the camera's pictures came");

    // The goal is kept, whole.
    let (status, head, body) = http(local(&view), &format!("/goal/{}", goal["number"]), "");
    let whole: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &whole["answer"]), (200, &goal["answer"]));
    assert_eq!(whole["drives"].as_array().unwrap().len(), 1);
    assert!(head.contains("application/json") && head.contains("nosniff"));

    // A goal that is refused has its reason.
    tell(&mut socket, "{\"ask\": \"find the zebra\"}");
    let refused = read_until(&mut socket, &mut 0, |d| {
        kind(d, "goal") && d["over"] == true && d["words"] == "find the zebra"
    });
    assert_eq!(refused["answer"]["status"], "failed");
    assert!(refused["answer"]["reason"].as_str().unwrap().contains("knows chair, table"), "{refused}");
    // And one that is cancelled.
    tell(&mut socket, "{\"ask\": \"find the table\"}");
    read_until(&mut socket, &mut 0, |d| {
        kind(d, "goal") && d["words"] == "find the table" && !d["stages"][0].is_null()
    });
    assert_eq!(tell(&mut socket, "{\"cancel\": true}")["ok"], true);
    let over = read_until(&mut socket, &mut 0, |d| {
        kind(d, "goal") && d["words"] == "find the table" && d["over"] == true
    });
    assert_eq!(over["answer"]["status"], "cancelled");
    // The list came with the goal and was read over: who comes later gets it, too.
    let mut late = open(&view);
    let history = read_until(&mut late, &mut 0, |d| kind(d, "history"));
    assert_eq!(history["goals"][2][2], "cancelled", "{history}");
    assert_eq!((history["goals"].as_array().unwrap().len(), &history["goals"][0][2]), (3, &"found".into()));
}

/// The document that a report holds.
fn reported(html: &str) -> Value {
    let (_, rest) = html.split_once("id=\"report\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn a_report_is_what_a_viewer_would_have_seen() {
    let about = About { robot: "test".into(), boxed_frames: 4, ..About::default() };
    let decoder = |latents: &[f32]| Ok(vec![RgbImage::filled(24, 16, [200, 90, 10]); latents.len() / 12 * 4]);
    let reporter = Arc::new(Reporter::new(&about, Some(Box::new(decoder))));
    let port = free_port();
    let session_of_node = session("mindseye", Some(port), None);
    let (hears, answered) = (reporter.clone(), Arc::new(Mutex::new(0)));
    let answers = answered.clone();
    let parts = NodeParts {
        config: config(),
        mind: Box::new(FakeMind::new(Duration::from_millis(1))),
        encoder: Box::new(FakeEncoder),
        record: None,
        observer: Some(Box::new(move |event| {
            hears.hear(event);
            *answers.lock().unwrap() += u32::from(matches!(event, NodeEvent::Answered(_)));
        })),
    };
    let node = Node::start(&session_of_node, parts).unwrap();
    let client = session("client", None, Some(port));
    let _robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 2);
    let words = "find the </script><b> chair";
    let goals = ["find the table", words];
    for (i, goal) in (1..).zip(goals) {
        node.requester().ask(mindseye_bridge::goal::Goal::text(format!("g{i}"), goal).unwrap()).unwrap();
        let began = Instant::now();
        while *answered.lock().unwrap() < i {
            assert!(began.elapsed() < Duration::from_secs(20), "{goal} is answered");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let tables = vec![("Model".to_owned(), vec![("name".to_owned(), "<i>x</i>".to_owned())])];
    let html = reporter.html(&ReportFacts { command: "mindseye replay 'a b'".into(), tables });
    assert!(html.len() < 5_000_000, "{}", html.len());
    let report = reported(&html);
    assert_eq!(
        (&report["command"], &report["facts"][0][1][0][1]),
        (&"mindseye replay 'a b'".into(), &"<i>x</i>".into())
    );
    let of = |name: &str| {
        let all = report["messages"].as_array().unwrap();
        all.iter().filter(|m| m["kind"] == name).cloned().collect::<Vec<_>>()
    };
    assert_eq!(of("hello")[0]["about"]["robot"], "test");
    let goal = &of("goal")[0];
    assert_eq!((&goal["words"], &goal["answer"]["status"]), (&words.into(), &"found".into()));
    assert!(goal["evidence"].as_array().unwrap().len() >= 2, "{goal}");
    // Every candidate is there although nobody looked while they were imagined.
    let drives = of("candidate");
    assert!(
        !drives.is_empty() && drives.iter().all(|d| d["drive"]["frames"] == 12 && d["drive"]["total"] == 12)
    );
    assert!(of("memory")[0]["moments"].as_array().unwrap().len() >= 2 && of("map").len() == 1);
    assert_eq!(report["goals"]["1"]["words"], goals[0]);
    let video = report["video"]["frames"].as_array().unwrap();
    // As many as it took tenths of a second to answer.
    assert!(video.len() >= 2, "{} pictures", video.len());
    assert!(
        video.windows(2).all(|w| w[1][0].as_f64() >= w[0][0].as_f64().map(|s| s + 0.099)),
        "ten a second"
    );
    assert!(video.iter().all(|v| v[2].as_str().unwrap().starts_with("data:image/")));
    assert_eq!(video.last().unwrap()[1], serde_json::json!([1.0, 2.0, 1.571]));
    assert!(report["video"]["asked_s"].as_f64() > Some(0.0));
}

#[test]
fn what_makes_no_sense_is_refused_and_the_viewer_stays() {
    let view = view_on("127.0.0.1:0", false);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let kept = asked.clone();
    let mut socket = open(&view);
    assert!(tell(&mut socket, "{\"ask\": \"the chair\"}")["reason"].as_str().unwrap().contains("starting"));
    view.handle_requests(Box::new(move |request| {
        kept.lock().unwrap().push(request);
        if kept.lock().unwrap().len() > 1 { Err(RequestError::Busy) } else { Ok(()) }
    }));
    let long = format!("{{\"ask\": \"{}\"}}", "x".repeat(10_000));
    for (text, want) in [
        ("{\"ask\": ", "not JSON"),
        ("[]", "known requests"),
        ("{\"ask\": 5}", "known requests"),
        ("{\"ask\": \"x\", \"cancel\": true}", "known requests"),
        ("{\"ask\": \" \"}", "empty"),
        (&long, "has 10000 characters; at most 1000"),
    ] {
        let reply = tell(&mut socket, text);
        assert_eq!(reply["ok"], false, "{text}");
        assert!(reply["reason"].as_str().unwrap().contains(want), "{text}: {reply}");
    }
    socket.send(2, &[1, 2, 3]).unwrap();
    assert_eq!(read_until(&mut socket, &mut 0, |d| kind(d, "reply"))["ok"], false);
    assert_eq!(tell(&mut socket, "{\"ask\": \"the chair\"}")["ok"], true);
    assert!(tell(&mut socket, "{\"ask\": \"the chair\"}")["reason"].as_str().unwrap().contains("busy"));
    assert!(matches!(&asked.lock().unwrap()[0], Request::Ask(goal) if goal.id.starts_with("page-")));
    // Far too much at once ends the connection, and only that one.
    let mut rude = open(&view);
    let _ = rude.send(1, "x".repeat(200_000).as_bytes());
    while rude.read().is_ok() {}
    assert!(tell(&mut socket, "{\"cancel\": true}")["reason"].as_str().unwrap().contains("busy"));
}

#[test]
fn other_origins_and_other_names_get_nothing() {
    let view = view_on("127.0.0.1:0", false);
    let to = local(&view);
    let (status, head, body) = http(to, "/", "");
    assert!(status == 200 && body.contains("<title>mindseye</title>"), "{head}");
    assert!(head.contains("Content-Security-Policy: default-src 'none'; script-src 'self'"), "{head}");
    assert!(!head.contains("Set-Cookie"));
    for path in ["/page.js", "/page.css"] {
        assert_eq!(http(to, path, "").0, 200, "{path}");
    }
    for path in ["/nothing", "/../Cargo.toml", "/goal/1", "/goal/x", "/goal/18446744073709551616"] {
        assert_eq!(http(to, path, "").0, 404, "{path}");
    }
    for path in ["/", "/live", "/goal/1"] {
        assert_eq!(http(to, path, "Origin: http://evil.example\r\n").0, 403, "{path}");
        assert_eq!(http(to, path, "Host: evil.example:8642\r\n").0, 403, "{path}");
    }
    let own = format!("http://{to}");
    assert!(open_with(to, "/live", Some(&own)).is_ok());
    for origin in ["http://evil.example", "null", "http://localhost:1"] {
        assert_eq!(open_with(to, "/live", Some(origin)).err(), Some(403), "{origin}");
    }
}

#[test]
fn elsewhere_a_token_is_needed_and_asking_is_off() {
    for control in [false, true] {
        // Not loopback, though this machine reaches it there.
        let view = view_on("0.0.0.0:0", control);
        view.handle_requests(Box::new(|_| Ok(())));
        let (to, url) = (local(&view), view.url());
        let token = url.split_once("token=").unwrap().1.to_owned();
        assert_eq!(token.len(), 32);
        let wrong: String = token.chars().rev().collect();
        for path in [
            "/".to_owned(),
            "/page.js".into(),
            "/goal/1".into(),
            format!("/?token={wrong}"),
            "/?token=".into(),
        ] {
            assert_eq!(http(to, &path, "").0, 401, "{path}");
        }
        assert_eq!(open_with(to, "/live", None).err(), Some(401));
        assert_eq!(open_with(to, &format!("/live?token={wrong}"), None).err(), Some(401));
        let (status, head, _) = http(to, &format!("/?token={token}"), "");
        assert_eq!(status, 200);
        let cookie = head.lines().find_map(|l| l.strip_prefix("Set-Cookie: ")).unwrap();
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
        let pair = cookie.split(';').next().unwrap();
        assert_eq!(http(to, "/page.js", &format!("Cookie: other=1; {pair}\r\n")).0, 200);
        let mut socket = open_with(to, &format!("/live?token={token}"), None).unwrap();
        let hello = read_until(&mut socket, &mut 0, |d| kind(d, "hello"));
        assert_eq!(hello["control"], control);
        let reply = tell(&mut socket, "{\"ask\": \"the chair\"}");
        assert_eq!(reply["ok"], control, "{reply}");
        assert_ne!(
            view_on("0.0.0.0:0", control).url().split_once("token=").unwrap().1,
            token,
            "another each time"
        );
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let view = view_on("127.0.0.1:0", false);
    let taken =
        ViewConfig { address: view.address(), control: false, about: About::default(), decoder: None };
    let Err(error @ ViewError::Listen { .. }) = View::start(taken) else { panic!("it is taken") };
    let said = error.to_string();
    assert!(said.contains(&view.address().to_string()) && said.contains("--view=ADDR"), "{said}");
}

#[test]
fn more_viewers_than_places_are_refused() {
    let view = view_on("127.0.0.1:0", false);
    let to = local(&view);
    let all: Vec<Result<Socket, u16>> = (0..100).map(|_| open_with(to, "/live", None)).collect();
    let refused = all.iter().filter(|socket| matches!(socket, Err(503))).count();
    assert_eq!(
        (refused, all.iter().filter(|socket| socket.is_ok()).count()),
        (100 - VIEWERS_MAX, VIEWERS_MAX)
    );
    assert_eq!((view.counts().viewers, view.counts().refused), (VIEWERS_MAX, refused as u64));
    assert_eq!(http(to, "/", "").0, 200, "the page itself says why");
    drop(all);
    let began = Instant::now();
    while view.counts().viewers > 0 {
        assert!(began.elapsed() < Duration::from_secs(5), "places are given back");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(open_with(to, "/live", None).is_ok());
}

#[test]
fn a_viewer_that_never_reads_holds_up_nobody() {
    let view = view_on("127.0.0.1:0", false);
    let tap = view.tap();
    let _never_reads = open(&view);
    let mut reads = open(&view);
    read_until(&mut reads, &mut 0, |d| kind(d, "hello"));
    let picture = RgbImage::filled(24, 16, [1, 2, 3]);
    let (mut longest, mut pictures) = (Duration::ZERO, 0);
    for i in 0..300u64 {
        let stamp = Timestamp(1_700_000_000_000_000_000 + i as i64 * 33_000_000);
        let cdr = if i % 2 == 0 { noise(stamp, 320, 240) } else { image(stamp, 320, 240) }.encode();
        let info = LatentInfo { index: i, segment: 0, captured_at: stamp, odom_from_base: None };
        let outcome = Outcome {
            frame: Some(stamp),
            segment: (i == 0).then_some(SegmentReason::First),
            latent: Some(info),
            eviction: None,
        };
        let pose = Some(Pose2::new(i as f64, 0.0, 0.0));
        let began = Instant::now();
        tap.hear(NodeEvent::Sensed {
            sense: Sense::Image,
            cdr: &cdr,
            outcome: &outcome,
            pose,
            picture: &picture,
        });
        longest = longest.max(began.elapsed());
        std::thread::sleep(Duration::from_millis(10));
    }
    let map =
        read_until(&mut reads, &mut pictures, |d| kind(d, "map") && d["here"][0].as_f64() == Some(299.0));
    assert_eq!(map["path"].as_array().unwrap().len(), 300);
    assert!(pictures >= 5, "{pictures} pictures came");
    // Copies only; the bound leaves room for a machine that is busy with other things.
    assert!(longest < Duration::from_millis(200), "{longest:?}");
    let began = Instant::now();
    drop(view);
    assert!(began.elapsed() < Duration::from_secs(2), "the page ends at once");
}

/// Foxglove's channels, fed by a node with the fake model that a fake robot drives, until its first answer.
fn fed(config_of: FoxgloveConfig) -> (Foxglove, Node, RosSession, RosSession, FakeRobot) {
    let foxglove = Foxglove::start(config_of).unwrap();
    let port = free_port();
    let session_of_node = session("mindseye", Some(port), None);
    let tap = foxglove.tap();
    let parts = NodeParts {
        config: config(),
        mind: Box::new(FakeMind::new(Duration::from_millis(1))),
        encoder: Box::new(FakeEncoder),
        record: None,
        observer: Some(Box::new(move |event| tap.hear(event))),
    };
    let node = Node::start(&session_of_node, parts).unwrap();
    let client = session("client", None, Some(port));
    let robot = FakeRobot::start(&client, 30.0);
    wait_for_latents(&node, 2);
    node.requester().ask(mindseye_bridge::goal::Goal::text("g", "find the chair").unwrap()).unwrap();
    (foxglove, node, session_of_node, client, robot)
}

#[test]
fn foxglove_gets_what_it_subscribes_to() {
    let address = Some("127.0.0.1:0".parse().unwrap());
    let (foxglove, _node, _session, _client, _robot) =
        fed(FoxgloveConfig { address, record: None, odom_frame: "odom".into() });
    let to = foxglove.address().unwrap();
    let protocol = "Sec-WebSocket-Protocol: x, foxglove.sdk.v1\r\n";
    assert_eq!(open_as(to, "/", None, "").err(), Some(400), "the protocol must be offered");
    assert_eq!(open_as(to, "/", Some("http://evil.example"), protocol).err(), Some(403));
    assert!(open_as(to, "/", Some("https://app.foxglove.dev"), protocol).is_ok());
    let (mut socket, head) = open_as(to, "/", None, protocol).unwrap();
    assert!(head.contains("Sec-WebSocket-Protocol: foxglove.sdk.v1\r\n"), "{head}");
    let op = |d: &Value, op: &str| d["op"] == op;
    read_until(&mut socket, &mut 0, |d| op(d, "serverInfo"));
    let offered = read_until(&mut socket, &mut 0, |d| op(d, "advertise"));
    let channels = offered["channels"].as_array().unwrap();
    assert_eq!(channels.len(), Topic::ALL.len());
    socket.send(1, b"{\"op\": \"advertise\"}").unwrap();
    let refused = read_until(&mut socket, &mut 0, |d| op(d, "status"));
    assert!(refused["message"].as_str().unwrap().contains("only subscriptions"));
    // The newest scene and camera picture: what was sent before is kept for those who come later.
    for (subscription, topic) in [(40, Topic::Scene), (41, Topic::Camera)] {
        let id = channels.iter().position(|c| c["topic"] == topic.name()).unwrap();
        let wanted =
            serde_json::json!({"op": "subscribe", "subscriptions": [{"id": subscription, "channelId": id}]});
        socket.send(1, wanted.to_string().as_bytes()).unwrap();
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < Duration::from_secs(20), "{topic:?} comes");
            let Message::Binary(bytes) = socket.read().unwrap() else { continue };
            assert_eq!(bytes[0], 1, "message data");
            if bytes[1..5] == u32::to_le_bytes(subscription) {
                let stamp = i64::from_le_bytes(bytes[5..13].try_into().unwrap());
                assert!(stamp > 1_600_000_000_000_000_000, "{stamp}");
                break;
            }
        }
    }
    let taken = FoxgloveConfig { address: Some(to), record: None, odom_frame: String::new() };
    let error = Foxglove::start(taken).err().unwrap().to_string();
    assert!(error.contains("--foxglove=ADDR"), "{error}");
}

#[test]
fn recordings_carry_foxgloves_channels() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mcap");
    let recorder = Recorder::start(&path).unwrap();
    let config_of = FoxgloveConfig { address: None, record: recorder.sender(), odom_frame: "odom".into() };
    let (foxglove, node, session, client, robot) = fed(config_of);
    assert!(foxglove.address().is_none() && foxglove.url().is_none());
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(50));
    }
    drop((robot, client));
    node.stop();
    drop((foxglove, session));
    assert!(recorder.finish().unwrap() > 10);
    let bag = mindseye_bridge::bag::open(&path, &Default::default()).unwrap();
    let counts: std::collections::BTreeMap<&str, (&str, u64)> =
        bag.info().topics.iter().map(|t| (t.name.as_str(), (t.type_name.as_str(), t.count))).collect();
    for topic in Topic::ALL {
        let (schema, count) = counts[topic.name()];
        assert_eq!(schema, topic.kind().name());
        assert!(count > 0, "{topic:?}");
    }
    let (_, pictures) = counts[Topic::Imagined.name()];
    assert_eq!(pictures, 12, "the whole drive, though the recording ended");
}
