//! Memory stays flat and every frame is accounted for, at simulated speed.

use crate::fake::{FakeEncoder, FakeMind, config, image, odometry, resident_bytes};
use mindseye::node::{Node, NodeParts};
use mindseye_bridge::msg::{Image, Odometry};
use mindseye_bridge::ros::{Publisher, Qos, RosConfig, RosSession};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Thirty pictures a simulated second beside goals that never stop, for `secs` simulated seconds.
fn run(secs: u64) {
    let robot_side = RosSession::open(&RosConfig::in_process("robot")).unwrap();
    let runtime_side = robot_side.another_node("mindseye", "/").unwrap();
    let images: Publisher<Image> = robot_side.publisher("/camera/image_raw", &Qos::SENSOR_DATA).unwrap();
    let odom: Publisher<Odometry> = robot_side.publisher("/odom", &Qos::SENSOR_DATA).unwrap();
    let parts = NodeParts {
        config: config(),
        mind: Box::new(FakeMind::new(Duration::from_micros(200))),
        encoder: Box::new(FakeEncoder),
        record: None,
        observer: None,
    };
    let node = Node::start(&runtime_side, parts).unwrap();
    assert!(images.wait_for_subscribers(Duration::from_secs(5)));

    let stop = Arc::new(AtomicBool::new(false));
    let asker = std::thread::spawn({
        let (client, stop) = (robot_side.clone(), stop.clone());
        move || {
            let mut answers = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let body = r#"{"text": "the chair"}"#;
                let text = client.query_json("mindseye/test/ground", body, Duration::from_secs(10)).unwrap();
                assert!(text.contains("status"), "{text}");
                answers += 1;
            }
            answers
        }
    });

    let total = secs * 30;
    let mut stamp = Timestamp(1_700_000_000_000_000_000);
    let mut warm = 0;
    for sent in 1..=total {
        stamp = stamp + TimeDelta(33_333_333);
        odom.publish(&odometry(stamp)).unwrap();
        images.publish(&image(stamp, 96, 64)).unwrap();
        // A little ahead of the intake, as a busy camera would be; its queue holds 16.
        while sent.saturating_sub(node.counts().context.offered + node.counts().camera_dropped) > 8 {
            std::thread::yield_now();
        }
        if sent == total / 4 {
            warm = resident_bytes();
        }
    }
    for _ in 0..500 {
        let counts = node.counts();
        if counts.context.offered + counts.camera_dropped >= total {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let end = resident_bytes();
    stop.store(true, Ordering::Relaxed);
    let answers = asker.join().unwrap();
    let counts = node.counts();
    let growth = end.saturating_sub(warm) as f64 / 1e6;
    println!(
        "{secs} simulated seconds: {total} frames, {answers} answers, {counts:?}, resident {:.1} MB, \
         {growth:.1} MB more than after a quarter",
        end as f64 / 1e6
    );
    assert_eq!(counts.camera_received, total);
    let context = counts.context;
    assert_eq!(context.offered + counts.camera_dropped, total, "no frame is lost without being counted");
    assert_eq!(context.offered, context.kept + context.skipped);
    assert!(counts.latents <= 16);
    assert!(answers > 0);
    assert!(growth < 16.0, "memory grew by {growth:.1} MB");
    node.stop();
}

#[test]
fn memory_is_flat_over_ten_minutes() {
    run(600);
}
