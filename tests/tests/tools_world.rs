//! `mindseye-tools world`: pictures and recordings.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mindseye_base::picture::save_png;
use mindseye_bridge::bag::{OpenOptions, ReadOptions, open};
use mindseye_bridge::geometry::TfTree;
use mindseye_bridge::msg::{CameraInfo, ImageView, Odometry, RosType, TFMessage};
use mindseye_bridge::time::Timestamp;
use mindseye_tools::world::{FIRST_STAMP, RecordOptions, drive, picture, record, truth_path};
use mindseye_world::{Difficulty, House, Pose2, ROBOT_RADIUS_M, wrap_angle};
use serde_json::Value;

fn options(seed: u64, difficulty: &str, seconds: f64) -> RecordOptions {
    RecordOptions { seed, difficulty: difficulty.into(), seconds, rate: 10.0, width: 48, height: 32 }
}

/// Messages of a bag by topic: stamp of the log and CDR bytes.
fn messages(path: &Path) -> BTreeMap<String, Vec<(i64, Vec<u8>)>> {
    let bag = open(path, &OpenOptions::default()).unwrap();
    let mut out: BTreeMap<String, Vec<(i64, Vec<u8>)>> = BTreeMap::new();
    for message in bag.messages(&ReadOptions::default()) {
        let topic = bag.info().topic(message.topic).name.clone();
        out.entry(topic).or_default().push((message.log_time_ns, message.data.to_vec()));
    }
    out
}

#[test]
fn recordings_are_consistent() {
    for (difficulty, seconds) in [("plain", 3.0), ("house", 2.0)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.mcap");
        let done = record(&path, &options(5, difficulty, seconds)).unwrap();
        let frames = (seconds * 10.0) as usize + 1;
        assert_eq!(done.frames, frames);
        assert_eq!(done.messages, 1 + 4 * frames as u64);
        let truth: Value = serde_json::from_slice(&fs::read(truth_path(&path)).unwrap()).unwrap();
        assert_eq!(truth["frames"].as_array().unwrap().len(), frames);
        let house = House::generate(5, &Difficulty::named(difficulty).unwrap());
        let names: Vec<&str> =
            truth["objects"].as_array().unwrap().iter().map(|o| o["name"].as_str().unwrap()).collect();
        assert_eq!(names, house.objects.iter().map(|o| o.name.as_str()).collect::<Vec<_>>());

        let topics = messages(&path);
        assert_eq!(
            topics.keys().map(String::as_str).collect::<Vec<_>>(),
            ["/camera/camera_info", "/camera/image_raw", "/odom", "/tf", "/tf_static"]
        );
        let mut tree = TfTree::new();
        for (topic, fixed) in [("/tf_static", true), ("/tf", false)] {
            for (_, data) in &topics[topic] {
                let problems = tree.insert_message(&TFMessage::decode(data).unwrap(), fixed);
                assert!(problems.is_empty(), "{topic}: {problems:?}");
            }
        }
        for k in 0..frames {
            let stamp = FIRST_STAMP.as_nanos() + k as i64 * 100_000_000;
            let expected = &truth["frames"][k];
            assert_eq!(expected["stamp_ns"], stamp);
            for topic in ["/camera/camera_info", "/camera/image_raw", "/odom", "/tf"] {
                assert_eq!(topics[topic][k].0, stamp, "{topic} {k}");
            }
            let image = ImageView::decode(&topics["/camera/image_raw"][k].1).unwrap();
            assert_eq!((image.width, image.height, image.step, image.encoding), (48, 32, 144, "rgb8"));
            assert_eq!(image.header.stamp.timestamp(), Timestamp(stamp));
            assert_eq!(image.header.frame_id, "camera_optical_frame");
            assert_eq!(image.data.len(), 144 * 32);
            let info = CameraInfo::decode(&topics["/camera/camera_info"][k].1).unwrap();
            assert_eq!(info.header.stamp, image.header.stamp);
            // 90 degrees wide: the focal length is half the width.
            for (got, wanted) in info.k.iter().zip([24.0, 0.0, 23.5, 0.0, 24.0, 15.5, 0.0, 0.0, 1.0]) {
                assert!((got - wanted).abs() < 1e-9, "{:?}", info.k);
            }
            let odometry = Odometry::decode(&topics["/odom"][k].1).unwrap();
            assert_eq!(
                (odometry.header.frame_id.as_str(), odometry.child_frame_id.as_str()),
                ("odom", "base_link")
            );
            let number = |at: &str| expected.pointer(at).and_then(Value::as_f64).unwrap();
            let position = &odometry.pose.pose.position;
            assert!((position.x - number("/base/x")).abs() < 1e-9);
            assert!((position.y - number("/base/y")).abs() < 1e-9);

            // Through tf the camera is where the truth says, and an object on its axis would be in the middle.
            if let Ok(camera) = tree.lookup("odom", "camera_optical_frame", Timestamp(stamp)) {
                for (axis, value) in camera.translation.vector.iter().enumerate() {
                    assert!((value - number(&format!("/camera/position/{axis}"))).abs() < 1e-9);
                }
                let forward = camera.rotation.to_rotation_matrix().matrix().column(2).into_owned();
                let (yaw, pitch) = (number("/base/yaw"), truth["camera"]["pitch_rad"].as_f64().unwrap());
                assert!((wrap_angle(forward[1].atan2(forward[0]) - yaw)).abs() < 1e-9, "looks ahead");
                assert!((forward[2] + pitch.sin()).abs() < 1e-9, "looks down by the pitch");
                let down = camera.rotation.to_rotation_matrix().matrix().column(1).into_owned();
                assert!((down[2] + pitch.cos()).abs() < 1e-9, "y is down");
            } else {
                panic!("no transform at frame {k}");
            }
        }
        // The twist fits the poses.
        let yaw = |k: usize| truth["frames"][k]["base"]["yaw"].as_f64().unwrap();
        let mid = Odometry::decode(&topics["/odom"][10].1).unwrap();
        let rate = wrap_angle(yaw(11) - yaw(9)) / 0.2;
        assert!((mid.twist.twist.angular.z - rate).abs() < 1e-9);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}

/// Objects lie in the images where tf, intrinsics and truth say: at their projected centres is their colour.
#[test]
fn objects_are_where_the_truth_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.mcap");
    let (mut hits, mut tried) = (0, 0);
    for seed in [7, 8, 9] {
        record(&path, &RecordOptions { width: 96, height: 64, rate: 4.0, ..options(seed, "plain", 9.0) })
            .unwrap();
        let truth: Value = serde_json::from_slice(&fs::read(truth_path(&path)).unwrap()).unwrap();
        let topics = messages(&path);
        let mut tree = TfTree::new();
        for (topic, fixed) in [("/tf_static", true), ("/tf", false)] {
            for (_, data) in &topics[topic] {
                tree.insert_message(&TFMessage::decode(data).unwrap(), fixed);
            }
        }
        let k = CameraInfo::decode(&topics["/camera/camera_info"][0].1).unwrap().k;
        for (stamp, data) in &topics["/camera/image_raw"] {
            let image = ImageView::decode(data).unwrap();
            let from_camera = tree.lookup("odom", "camera_optical_frame", Timestamp(*stamp)).unwrap();
            // Round things: nothing shines through their middle.
            let solid = |o: &&Value| ["ball", "box"].contains(&o["shape"].as_str().unwrap());
            for object in truth["objects"].as_array().unwrap().iter().filter(solid) {
                let at: Vec<f64> =
                    object["position"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
                let p = from_camera.inverse_transform_point(&[at[0], at[1], at[2]].into());
                let (u, v) = (k[0] * p.x / p.z + k[2], k[4] * p.y / p.z + k[5]);
                if p.z < 0.5 || !(2.0..93.0).contains(&u) || !(2.0..61.0).contains(&v) {
                    continue;
                }
                let pixel = (v.round() as usize * 96 + u.round() as usize) * 3;
                let rgb: Vec<i32> = image.data[pixel..pixel + 3].iter().map(|c| i32::from(*c)).collect();
                let wanted: [bool; 3] = match object["colour"].as_str().unwrap() {
                    "red" => [true, false, false],
                    "green" => [false, true, false],
                    "blue" => [false, false, true],
                    "yellow" => [true, true, false],
                    "purple" => [true, false, true],
                    _ => [false, true, true],
                };
                let low = (0..3).filter(|c| !wanted[*c]).map(|c| rgb[c]).max().unwrap();
                let high = (0..3).filter(|c| wanted[*c]).map(|c| rgb[c]).min().unwrap();
                tried += 1;
                hits += usize::from(high > 2 * low);
            }
        }
    }
    // Other objects may stand in front.
    assert!(tried >= 20 && hits * 10 >= tried * 8, "{hits} of {tried}");
}

#[test]
fn a_seed_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |seed: u64, name: &str| {
        let path = dir.path().join(name);
        record(&path, &options(seed, "plain", 1.0)).unwrap();
        (fs::read(&path).unwrap(), fs::read(truth_path(&path)).unwrap())
    };
    assert_eq!(bytes(3, "a.mcap"), bytes(3, "b.mcap"));
    let (a, b) = (bytes(3, "c.mcap"), bytes(4, "d.mcap"));
    assert!(a.0 != b.0 && a.1 != b.1);
}

#[test]
fn drives_turn_all_the_way_and_go_on() {
    let check = |difficulty: &str, seed: u64, secs: f64, turn_secs: f64| {
        let house = House::generate(seed, &Difficulty::named(difficulty).unwrap());
        let frames = (secs * 10.0) as usize + 1;
        let poses: Vec<Pose2> = drive(&house, seed, frames, 10.0);
        assert_eq!(poses.len(), frames);
        for (k, pose) in poses.iter().enumerate() {
            let clear = house.clearance(pose.x, pose.y);
            assert!(clear >= ROBOT_RADIUS_M - 0.02, "{difficulty} {seed} frame {k}: {clear:.3} m");
        }
        let turned: f64 =
            poses.windows(2).take((turn_secs * 10.0) as usize).map(|w| wrap_angle(w[1].yaw - w[0].yaw)).sum();
        assert!(
            turned.abs() >= 325f64.to_radians(),
            "{difficulty} {seed}: {:.0} degrees",
            turned.to_degrees()
        );
        for (k, w) in poses.windows(2).enumerate() {
            let (step, turn) = (w[0].distance(w[1]), wrap_angle(w[1].yaw - w[0].yaw).abs());
            assert!(step < 0.1 && turn < 0.2, "{difficulty} {seed} frame {k}: {step:.3} m, {turn:.3} rad");
        }
    };
    for seed in 0..4 {
        check("plain", seed, 10.0, 9.6);
        check("plain", seed, 25.0, 9.6);
        check("house", seed, 70.0, 9.6);
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.mcap");
    let good = options(1, "plain", 1.0);
    for (bad, wanted) in [
        (RecordOptions { seconds: f64::NAN, ..good.clone() }, "seconds"),
        (RecordOptions { seconds: 1e9, ..good.clone() }, "seconds"),
        (RecordOptions { rate: 0.0, ..good.clone() }, "rate"),
        (RecordOptions { rate: f64::INFINITY, ..good.clone() }, "rate"),
        (RecordOptions { width: 0, ..good.clone() }, "0x32"),
        (RecordOptions { height: 1 << 40, ..good.clone() }, "images of"),
        (RecordOptions { difficulty: "castle".into(), ..good.clone() }, "castle"),
    ] {
        let error = record(&path, &bad).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let error = record(&dir.path().join("none/x.mcap"), &good).unwrap_err().to_string();
    assert!(error.contains("none/x.mcap"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn pictures_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    for difficulty in ["plain", "house"] {
        let house = House::generate(2, &Difficulty::named(difficulty).unwrap());
        let canvas = picture(&house, difficulty);
        assert_eq!(canvas.rgb.len(), canvas.width * canvas.height * 3);
        // Every object's own colour is on the map and in the list.
        for object in &house.objects {
            let colour = house.palette.objects[object.colour.index()];
            let count = canvas.rgb.chunks_exact(3).filter(|p| *p == colour).count();
            assert!(count > 100, "{difficulty}: {} pixels of {}", count, object.name);
        }
        if difficulty == "plain" {
            assert_eq!(canvas, picture(&house, difficulty), "the same every time");
        }
        let path = dir.path().join(format!("{difficulty}.png"));
        save_png(&path, canvas.width, canvas.height, &canvas.rgb).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 100_000);
    }
    assert!(save_png(&dir.path().join("none/x.png"), 1, 1, &[0; 3]).is_err());
    assert!(save_png(&dir.path().join("x.png"), 2, 2, &[0; 3]).is_err(), "too few pixels");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left behind");
}
