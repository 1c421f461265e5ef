//! `cargo bench -p mindseye-tests --bench zenoh`: what our publishers and subscribers add to bare Zenoh (one way, over
//! TCP on the loopback, variants taking turns in one run), and what the intake of a camera costs.

use mindseye::config::RobotConfig;
use mindseye::mind::Pipeline;
use mindseye::node::{Node, NodeParts};
use mindseye_bridge::Timestamp;
use mindseye_bridge::msg::{CompressedImage, Header, RosType};
use mindseye_bridge::ros::{History, Qos, QueuePolicy, RosConfig, RosSession};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::qos::CongestionControl;

const SIZE: usize = 300_000;
const WARM: usize = 200;
const ROUNDS: usize = 2_000;
const LONG: Duration = Duration::from_secs(10);

fn pair() -> (RosSession, RosSession) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("tcp/127.0.0.1:{port}");
    let mut a = RosConfig::in_process("robot");
    a.zenoh.listen = Some(vec![endpoint.clone()]);
    let mut b = RosConfig::in_process("agent");
    b.zenoh.connect = Some(vec![endpoint]);
    (RosSession::open(&a).unwrap(), RosSession::open(&b).unwrap())
}

/// A thread that tells when each message was there, ready to use.
fn consumer(mut take: impl FnMut() + Send + 'static) -> Receiver<Instant> {
    let (tx, rx): (Sender<Instant>, _) = channel();
    std::thread::spawn(move || {
        loop {
            take();
            if tx.send(Instant::now()).is_err() {
                return;
            }
        }
    });
    rx
}

struct Variant {
    name: &'static str,
    send: Box<dyn FnMut(Vec<u8>) -> Instant>,
    arrived: Receiver<Instant>,
    micros: Vec<f64>,
}

/// Waits instead of dropping when the machine is busy; the bare publishers do the same.
const LOSSLESS: Qos = Qos {
    reliability: mindseye_bridge::ros::Reliability::Reliable,
    durability: mindseye_bridge::ros::Durability::Volatile,
    history: History::KeepAll,
};

fn image(data: Vec<u8>) -> CompressedImage {
    CompressedImage { header: Header::new(Timestamp(5), "cam"), format: "jpeg".into(), data }
}

fn latency() {
    let (robot, agent) = pair();
    let mut variants = Vec::new();

    let (tx, rx) = channel();
    let keep = agent
        .zenoh()
        .declare_subscriber("bare/callback")
        .callback(move |sample| {
            let at = Instant::now();
            assert!(sample.payload().len() >= SIZE);
            let _ = tx.send(at);
        })
        .wait()
        .unwrap();
    let bare = |key: &'static str| {
        let publisher =
            robot.zenoh().declare_publisher(key).congestion_control(CongestionControl::Block).wait().unwrap();
        Box::new(move |data: Vec<u8>| {
            let at = Instant::now();
            publisher.put(data).wait().unwrap();
            at
        })
    };
    variants.push(Variant {
        name: "bare, callback",
        send: bare("bare/callback"),
        arrived: rx,
        micros: vec![],
    });

    let subscriber = agent.zenoh().declare_subscriber("bare/channel").wait().unwrap();
    let arrived = consumer(move || assert!(subscriber.recv().unwrap().payload().len() >= SIZE));
    variants.push(Variant { name: "bare, channel", send: bare("bare/channel"), arrived, micros: vec![] });

    let subscriber =
        agent.subscriber::<CompressedImage>("/typed", &Qos::default(), QueuePolicy::Latest).unwrap();
    let publisher = robot.publisher::<CompressedImage>("/typed", &LOSSLESS).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    let arrived = consumer(move || {
        loop {
            if let Some(got) = subscriber.recv_timeout(LONG).unwrap() {
                assert_eq!(got.message.data.len(), SIZE);
                return;
            }
        }
    });
    let send = Box::new(move |data: Vec<u8>| {
        let message = image(data);
        let at = Instant::now();
        publisher.publish_owned(message).unwrap();
        at
    });
    variants.push(Variant { name: "typed", send, arrived, micros: vec![] });

    let name = CompressedImage::NAME;
    let subscriber = agent.raw_subscriber("/view", name, None, &Qos::default(), QueuePolicy::Latest).unwrap();
    let publisher = robot.publisher::<CompressedImage>("/view", &LOSSLESS).unwrap();
    assert!(publisher.wait_for_subscribers(LONG));
    let arrived = consumer(move || {
        loop {
            if let Some(sample) = subscriber.recv_timeout(LONG) {
                let (view, data) = sample.compressed_image().unwrap().expect("fields in one piece");
                assert_eq!((view.format, data.len()), ("jpeg", SIZE));
                return;
            }
        }
    });
    let send = Box::new(move |data: Vec<u8>| {
        let message = image(data);
        let at = Instant::now();
        publisher.publish_owned(message).unwrap();
        at
    });
    variants.push(Variant { name: "typed, borrowed", send, arrived, micros: vec![] });

    std::thread::sleep(Duration::from_millis(500));
    let data = vec![0x5a; SIZE];
    for round in 0..WARM + ROUNDS {
        for v in &mut variants {
            let sent = (v.send)(data.clone());
            let arrived = v.arrived.recv_timeout(LONG).expect("a message was lost");
            if round >= WARM {
                v.micros.push((arrived - sent).as_secs_f64() * 1e6);
            }
        }
    }
    drop(keep);
    println!("one way, {SIZE} bytes, loopback TCP, {ROUNDS} rounds, variants in turn");
    println!("{:<24} {:>9} {:>9} {:>9}", "", "p50 us", "p90 us", "p99 us");
    let mut p50 = Vec::new();
    for v in &mut variants {
        v.micros.sort_by(f64::total_cmp);
        let at = |q: f64| v.micros[((v.micros.len() - 1) as f64 * q) as usize];
        println!("{:<24} {:>9.1} {:>9.1} {:>9.1}", v.name, at(0.5), at(0.9), at(0.99));
        p50.push(at(0.5));
    }
    for (i, name) in [(2, "typed"), (3, "typed, borrowed")] {
        println!(
            "{name}: p50 {:+.1} % over bare with a channel, {:+.1} % over bare with a callback",
            (p50[i] / p50[1] - 1.0) * 100.0,
            (p50[i] / p50[0] - 1.0) * 100.0
        );
    }
}

/// Nanoseconds on a core so far, of the threads whose name starts so.
fn thread_nanos(name: &str) -> u64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 };
    tasks
        .flatten()
        .filter(|t| std::fs::read_to_string(t.path().join("comm")).is_ok_and(|c| c.starts_with(name)))
        .filter_map(|t| {
            let text = std::fs::read_to_string(t.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        })
        .sum()
}

/// Nanoseconds on a core so far, of the process, ended threads included; in steps of 10 ms.
fn process_nanos() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/stat") else { return 0 };
    // After the name in brackets: user and system time are the 12th and 13th field, in hundredths.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum::<u64>() * 10_000_000
}

/// A node with the shipped model and a camera: what its senses' thread costs, from the queue to the memory.
fn intake() {
    const SECONDS: u64 = 10;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let jpeg = std::fs::read(root.join("data/ros/frame_640x480.jpg")).unwrap();
    let pipeline = Pipeline::load(&root.join("../models/house-tiny"), "rten", 1).unwrap();
    let (robot, agent) = pair();
    let config = RobotConfig::default();
    let camera = robot.publisher::<CompressedImage>(&config.topics.compressed, &Qos::SENSOR_DATA).unwrap();
    let (mind, encoder) = (pipeline.mind(0).unwrap(), pipeline.encoder().unwrap());
    let node =
        Node::start(&agent, NodeParts { config, mind, encoder, record: None, observer: None }).unwrap();
    assert!(camera.wait_for_subscribers(LONG));
    let (all, own) = (process_nanos(), thread_nanos("senses"));
    let start = Instant::now();
    for i in 0..SECONDS * 30 {
        let due = start + Duration::from_nanos(i * 1_000_000_000 / 30);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let stamp = Timestamp(1_000_000_000 + i as i64 * 1_000_000_000 / 30);
        let header = Header::new(stamp, "cam");
        let message = CompressedImage { header, format: "jpeg".into(), data: jpeg.clone() };
        camera.publish_owned(message).unwrap();
    }
    let wall = start.elapsed().as_nanos() as f64;
    let share = |nanos: u64| nanos as f64 / wall * 100.0;
    let own = share(thread_nanos("senses") - own);
    let all = share(process_nanos() - all);
    std::thread::sleep(Duration::from_millis(500));
    println!("intake of 640x480 JPEG ({} kB) at 30 Hz for {SECONDS} s, by a node", jpeg.len() / 1000);
    println!(
        "  senses' thread {own:.2} % of one core; whole process, sender and both Zenoh sides included, {all:.2} %"
    );
    println!("  {:?}", node.counts());
    node.stop();
}

fn main() {
    // `cargo test --benches` passes --test: only show that it runs.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    latency();
    intake();
}
