//! Answers by a detector alone: a fake one of each layout, named so, that draws a box around what is red, and a robot that
//! drives past a red thing in a rendered room.

use crate::shipped::program;
use mindseye::config::{DetectorTable, RobotConfig};
use mindseye::node::MonotonicClock;
use mindseye::replay::{Replay, Replayed, replay_without_model};
use mindseye::topics::Wanted;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::bag::{ChannelId, McapWriter, offered_qos, schema};
use mindseye_bridge::geometry::{Isometry3, Pose2};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::msg::{
    CameraInfo, Header, Image, Odometry, Pose, PoseWithCovariance, RosType, TFMessage, TransformStamped,
};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::onnx::{
    Attribute, AttributeValue, DataType, Dim, Graph, Initializer, Model, Node, SaveOptions, ValueInfo,
};
use mindseye_world::{Camera, Colour, Difficulty, Frame, House, Object, RenderOptions, Shape, render_with};
use nalgebra::{Matrix3, Rotation3, Translation3, UnitQuaternion};
use std::path::{Path, PathBuf};

/// Layouts of [`red_detector`].
const LAYOUTS: [&str; 3] = ["detr", "rows", "columns"];
const SIDE: usize = 96;

fn node(kind: &str, inputs: &[&str], outputs: &[&str]) -> Node {
    Node::new(outputs[0], kind, inputs, outputs)
}

/// A fake detector: one box around what is red in a picture, by its mean and spread; the class is called `class`.
fn red_detector(path: &Path, layout: &str, class: &str) {
    let info = |name: &str, dtype, shape: &[usize]| ValueInfo {
        name: name.into(),
        dtype: Some(dtype),
        shape: Some(shape.iter().map(|n| Dim::from(*n)).collect()),
    };
    let mut graph = Graph { name: "fake detector of red things".into(), ..Graph::default() };
    graph.inputs.push(info("images", DataType::F32, &[1, 3, SIDE, SIDE]));
    // Sums of redness times 1, x, y, x², y², in pixels of the input.
    let moments: Vec<f32> = (0..SIDE * SIDE)
        .flat_map(|k| {
            let (x, y) = ((k % SIDE) as f32 + 0.5, (k / SIDE) as f32 + 0.5);
            [1.0, x, y, x * x, y * y]
        })
        .collect();
    let floats = |name: &str, shape: &[usize], values: &[f32]| Initializer::from_f32(name, shape, values);
    let ints = |name: &str, values: &[i64]| Initializer::from_i64(name, &[values.len()], values);
    graph.initializers.extend([
        ints("three", &[1, 1, 1]),
        ints("flat", &[1, (SIDE * SIDE) as i64]),
        floats("moments", &[SIDE * SIDE, 5], &moments),
        floats("pale", &[], &[0.25]),
        floats("little", &[], &[1e-3]),
        floats("some", &[], &[5.0]),
        floats("root3", &[], &[3f32.sqrt()]),
        floats("half", &[], &[0.5]),
        floats("twice", &[], &[2.0]),
        floats("one", &[1, 1], &[1.0]),
        floats("side", &[], &[SIDE as f32]),
        ints("parts", &[1, 2, 2]),
        ints("as_boxes", &[1, 1, 4]),
        ints("as_row", &[1, 1, -1]),
        ints("as_column", &[1, -1, 1]),
        Initializer::from_i64("which", &[1, 1], &[0]),
        floats("nothing", &[1, 7, 1], &[0.0; 7]),
    ]);
    let split = |input: &str, sizes: &str, outputs: &[&str]| {
        node("Split", &[input, sizes], outputs).with(Attribute::int("axis", 1))
    };
    let concat = |inputs: &[&str], output: &str, axis: i64| {
        node("Concat", inputs, &[output]).with(Attribute::int("axis", axis))
    };
    graph.nodes.extend([
        split("images", "three", &["r", "g", "b"]),
        node("Max", &["g", "b"], &["other"]),
        node("Sub", &["r", "other"], &["over"]),
        node("Sub", &["over", "pale"], &["reddish"]),
        node("Relu", &["reddish"], &["red"]),
        node("Reshape", &["red", "flat"], &["row"]),
        node("MatMul", &["row", "moments"], &["sums"]),
        split("sums", "parts", &["all", "first", "second"]),
        node("Add", &["all", "little"], &["weight"]),
        node("Div", &["first", "weight"], &["middle"]),
        node("Div", &["second", "weight"], &["square"]),
        node("Mul", &["middle", "middle"], &["middle2"]),
        node("Sub", &["square", "middle2"], &["var0"]),
        node("Relu", &["var0"], &["var"]),
        node("Sqrt", &["var"], &["sd"]),
        node("Mul", &["sd", "root3"], &["reach"]),
        node("Add", &["weight", "some"], &["enough"]),
        node("Div", &["weight", "enough"], &["sure"]),
    ]);
    match layout {
        "detr" => {
            graph.inputs.push(info("orig_target_sizes", DataType::I64, &[1, 2]));
            let mut cast = node("Cast", &["orig_target_sizes"], &["size"]);
            cast.attributes.push(Attribute { name: "to".into(), value: AttributeValue::Int(1) });
            graph.nodes.extend([
                cast,
                node("Div", &["size", "side"], &["scale"]),
                node("Sub", &["middle", "reach"], &["low0"]),
                node("Add", &["middle", "reach"], &["high0"]),
                node("Mul", &["low0", "scale"], &["low"]),
                node("Mul", &["high0", "scale"], &["high"]),
                concat(&["low", "high"], "corners", 1),
                node("Reshape", &["corners", "as_boxes"], &["boxes"]),
                node("Identity", &["sure"], &["scores"]),
                node("Identity", &["which"], &["labels"]),
            ]);
            graph.outputs.extend([
                info("labels", DataType::I64, &[1, 1]),
                info("boxes", DataType::F32, &[1, 1, 4]),
                info("scores", DataType::F32, &[1, 1]),
            ]);
        }
        yolo => {
            // Six more boxes of nothing, so that the shape says which axis is which.
            graph.nodes.extend([node("Mul", &["reach", "twice"], &["extent"])]);
            let (parts, shape): (&[&str], &str) = match yolo {
                "rows" => (&["middle", "extent", "one", "sure"], "as_row"),
                _ => (&["middle", "extent", "sure"], "as_column"),
            };
            graph
                .nodes
                .extend([concat(parts, "flat_box", 1), node("Reshape", &["flat_box", shape], &["box"])]);
            let attributes = if yolo == "rows" { 6 } else { 5 };
            let (pad, axis, shape) = match yolo {
                "rows" => ([1, 8, attributes], 1, [1, 9, attributes]),
                _ => ([1, attributes, 8], 2, [1, attributes, 9]),
            };
            graph.initializers.push(floats("padding", &pad, &vec![0.0; 8 * attributes]));
            graph.nodes.push(concat(&["box", "padding"], "output0", axis));
            graph.outputs.push(info("output0", DataType::F32, &shape));
        }
    }
    graph.drop_unused_initializers();
    let mut model = Model::new(graph);
    model.metadata.push(("names".into(), format!("{{0: '{class}'}}")));
    model.save(path, &SaveOptions::default()).unwrap();
}

fn channel<T: RosType>(writer: &mut McapWriter, topic: &str, latched: bool) -> ChannelId {
    let qos = offered_qos(true, latched, 1);
    writer.add_channel(topic, T::NAME, schema::ros2msg(T::NAME).unwrap(), Some(T::HASH), &qos).unwrap()
}

fn mount(camera: &Camera) -> Isometry3<f64> {
    let (r, t) = camera.base_from_camera();
    let rotation = Rotation3::from_matrix_unchecked(Matrix3::from_fn(|i, j| r[i][j]));
    Isometry3::from_parts(Translation3::from(t), UnitQuaternion::from_rotation_matrix(&rotation))
}

/// What a bag leaves out.
#[derive(Clone, Copy, PartialEq)]
enum Without {
    Nothing,
    Intrinsics,
    Odometry,
    Mounting,
    /// The robot only turns on the spot.
    Parallax,
    /// Odometry starts again elsewhere in the middle.
    Steadiness,
}

/// A room with one red thing that is neither a bed nor a lamp.
fn room() -> (House, usize) {
    let small =
        |o: &Object| o.colour == Colour::Red && [Shape::Ball, Shape::Box, Shape::Cone].contains(&o.shape);
    for seed in 100.. {
        let house = House::generate(seed, &Difficulty::plain());
        let red: Vec<usize> =
            (0..house.objects.len()).filter(|k| house.objects[*k].colour == Colour::Red).collect();
        if let [one] = red[..]
            && small(&house.objects[one])
        {
            return (house, one);
        }
    }
    unreachable!("some room has a red ball")
}

/// A bag of a drive around the red thing, on the side where there is most room.
fn bag(path: &Path, house: &House, thing: usize, without: Without) {
    let camera = Camera::new(208, 128);
    let object = &house.objects[thing];
    let (cx, cy) = house.rooms[object.room].rect.centre();
    let towards = (cy - object.y).atan2(cx - object.x);
    let mut writer = McapWriter::create(path).unwrap();
    let tf_static = channel::<TFMessage>(&mut writer, "/tf_static", true);
    let odom = channel::<Odometry>(&mut writer, "/odom", false);
    let info = channel::<CameraInfo>(&mut writer, "/camera/camera_info", false);
    let image = channel::<Image>(&mut writer, "/camera/image_raw", false);
    let optical = "camera_optical_frame";
    let mut frame = Frame::new();
    for k in 0..40i64 {
        let at = Timestamp(1_700_000_000_000_000_000) + TimeDelta::from_millis(100 * k);
        let ns = at.as_nanos();
        let part = k as f64 / 39.0;
        let angle = towards + 1.2 * (part - 0.5);
        let pose = match without {
            Without::Parallax => {
                let from = (object.x + 2.0 * towards.cos(), object.y + 2.0 * towards.sin());
                Pose2::new(from.0, from.1, towards + std::f64::consts::PI + 0.4 * (part - 0.5))
            }
            _ => Pose2::new(
                object.x + 2.0 * angle.cos(),
                object.y + 2.0 * angle.sin(),
                angle + std::f64::consts::PI + 0.1 * (7.0 * part).sin(),
            ),
        };
        if k == 0 && without != Without::Mounting {
            let mounted = TransformStamped::new(at, "base_link", optical, &mount(&camera));
            writer.write(tf_static, ns, ns, &TFMessage { transforms: vec![mounted] }.encode()).unwrap();
        }
        let seen = mindseye_world::Pose2::unwrapped(pose.x, pose.y, pose.yaw);
        render_with(house, seen, &camera, RenderOptions::rgb_only(), &mut frame);
        let shift = if without == Without::Steadiness && k >= 20 { 30.0 } else { 0.0 };
        let odometry = Odometry {
            header: Header::new(at, "odom"),
            child_frame_id: "base_link".into(),
            pose: PoseWithCovariance {
                pose: Pose::from_pose2(Pose2::new(pose.x + shift, pose.y, pose.yaw)),
                ..PoseWithCovariance::default()
            },
            ..Odometry::default()
        };
        if without != Without::Odometry {
            writer.write(odom, ns, ns, &odometry.encode()).unwrap();
        }
        let [fx, fy, cx, cy] = camera.intrinsics();
        let (width, height) = (208, 128);
        let k = [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0];
        let header = Header::new(at, optical);
        let camera_info = CameraInfo { header: header.clone(), width, height, k, ..CameraInfo::default() };
        if without != Without::Intrinsics {
            writer.write(info, ns, ns, &camera_info.encode()).unwrap();
        }
        let data = frame.rgb.clone();
        let picture = Image {
            header,
            height,
            width,
            encoding: "rgb8".into(),
            step: 3 * width,
            data,
            ..Image::default()
        };
        writer.write(image, ns, ns, &picture.encode()).unwrap();
    }
    writer.finish().unwrap();
}

fn asked(bag: &Path, detector: &Path, goal: &str) -> Replayed {
    let table = DetectorTable { rate_hz: 10.0, ..DetectorTable::of(detector.to_owned()) };
    let config = RobotConfig { detector: Some(table), ..RobotConfig::default() };
    let replay = Replay {
        bag: bag.to_owned(),
        config,
        wanted: Wanted::default(),
        goal: Some(Goal::text("g", goal).unwrap()),
        at_secs: None,
        deadline: None,
    };
    replay_without_model(&replay, &MonotonicClock, &mut |_| (), &|| true).unwrap()
}

/// The pose faces the thing from the standoff, within what can be told from a box.
fn check_pose(name: &str, answer: &Answer, object: &Object) {
    assert_eq!(answer.status, Status::Found, "{name}: {answer:?}");
    let pose = answer.pose.as_ref().unwrap();
    let (dx, dy) = (object.x - pose.x, object.y - pose.y);
    let off = dx.hypot(dy) - 1.2;
    assert!(off.abs() < 0.15, "{name}: {:.2} m before it", dx.hypot(dy));
    let turn = mindseye::planar::wrap_angle(dy.atan2(dx) - pose.yaw).to_degrees();
    assert!(turn.abs() < 6.0, "{name}: {turn} degrees past it");
    let covariance = answer.covariance.as_ref().unwrap();
    assert_eq!(covariance.len(), 36);
    let sigma = covariance[0].max(covariance[7]).sqrt();
    assert!((0.01..0.4).contains(&sigma), "{name}: {sigma} m");
    assert!(!answer.imagined && answer.consistency.is_none(), "{name}: {answer:?}");
    assert!(answer.views.unwrap() >= 3, "{name}: {answer:?}");
    assert_eq!(pose.frame, "odom");
}

#[test]
fn a_detector_alone_answers_with_a_pose() {
    let dir = tempfile::tempdir().unwrap();
    let (house, thing) = room();
    let path = dir.path().join("room.mcap");
    bag(&path, &house, thing, Without::Nothing);
    for layout in LAYOUTS {
        let detector = dir.path().join(format!("{layout}.onnx"));
        red_detector(&detector, layout, "sofa");
        let replayed = asked(&path, &detector, "Find the couch!");
        let answer = replayed.answer.as_ref().unwrap();
        check_pose(layout, answer, &house.objects[thing]);
        assert_eq!(answer.class.as_deref(), Some("sofa"));
        let reason = answer.reason.as_ref().unwrap();
        assert!(reason.starts_with("the detector alone") && reason.contains("no model bundle"), "{reason}");
        let counts = replayed.study.unwrap();
        assert_eq!((counts.studied, counts.objects, counts.dropped), (40, 1, 0), "{layout}: {counts:?}");
        assert!(replayed.profile.summary().contains_key("detect"));
        let mut again = asked(&path, &detector, "Find the couch!").answer.unwrap();
        again.timings_ms.clone_from(&answer.timings_ms);
        assert_eq!(again, *answer, "the same bag gives the same answer");
        let refused = asked(&path, &detector, "find the vase").answer.unwrap();
        assert_eq!(refused.status, Status::Failed);
        let reason = refused.reason.unwrap();
        assert!(reason.contains("the detector does not know \"vase\""), "{reason}");
    }
}

#[test]
fn what_a_detector_needs_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (house, thing) = room();
    let detector = dir.path().join("red.onnx");
    red_detector(&detector, "detr", "sofa");
    let ask = |without| {
        let path = dir.path().join("bag.mcap");
        bag(&path, &house, thing, without);
        asked(&path, &detector, "find the sofa")
    };
    let check = |name: &str, without, want: &str| {
        let replayed = ask(without);
        let answer = replayed.answer.unwrap();
        assert_eq!(answer.status, Status::NotInContext, "{name}: {answer:?}");
        let reason = answer.reason.unwrap();
        assert!(answer.pose.is_none() && reason.contains(want), "{name}: {reason}");
    };
    check("no intrinsics", Without::Intrinsics, "no intrinsics: neither landmarks nor things can be placed");
    check("no odometry", Without::Odometry, "40 came without a pose of the camera");
    check("no mounting", Without::Mounting, "without a pose of the camera");
    check("no parallax", Without::Parallax, "has placed no sofa: 40 boxes in 40 frames");
    // After a jump everything counts from there.
    let replayed = ask(Without::Steadiness);
    assert_eq!(replayed.study.unwrap().jumps, 1);
    let pose = replayed.answer.unwrap().pose.unwrap();
    let object = &house.objects[thing];
    let away = (pose.x - 30.0 - object.x).hypot(pose.y - object.y);
    assert!((away - 1.2).abs() < 0.3, "{away} m before it in the odometry after the jump");
}

#[test]
fn the_program_answers_with_a_detector_beside_a_model_without_the_word() {
    let dir = tempfile::tempdir().unwrap();
    let (house, thing) = room();
    let path = dir.path().join("room.mcap");
    bag(&path, &house, thing, Without::Nothing);
    let detector = dir.path().join("red.onnx");
    red_detector(&detector, "columns", "vase");
    let run = |detector: &Path| {
        program()
            .args(["replay", path.to_str().unwrap(), "--goal", "find the vase", "--json", "--profile"])
            .args(["--bundle", concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny")])
            .args(["--detector", detector.to_str().unwrap()])
            .output()
            .unwrap()
    };
    let output = run(&detector);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let answer: Answer = serde_json::from_value(document["answer"].clone()).unwrap();
    check_pose("replay", &answer, &house.objects[thing]);
    assert!(answer.reason.unwrap().contains("does not know \"vase\""), "{document}");
    assert_eq!(document["answer"]["imagined"], false);
    assert!(document["profile_ms"]["detect"]["count"].as_u64().unwrap() >= 10, "{document}");
    let missing = run(&dir.path().join("nothing.onnx"));
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(missing.status.code() == Some(1) && said.contains("nothing.onnx"), "{said}");
}

/// A file that users bring: `MINDSEYE_DETECTOR`, or the one beside the repository.
fn brought() -> Option<PathBuf> {
    let beside =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/detectors/deimv2_hgnetv2_femto_coco.onnx");
    let given = std::env::var_os("MINDSEYE_DETECTOR").map(PathBuf::from);
    given.or(Some(beside)).filter(|path| path.is_file())
}

#[test]
fn a_published_detector_answers_on_a_bag_of_photographs() {
    let bag = std::env::var_os("MINDSEYE_PHOTOGRAPHS").map(PathBuf::from);
    let (Some(detector), Some(bag)) = (brought(), bag) else {
        eprintln!(
            "not run: MINDSEYE_DETECTOR names no detector file, or MINDSEYE_PHOTOGRAPHS no bag that `mindseye-tools bag` made of \
             photographs with chairs"
        );
        return;
    };
    let output = program()
        .args(["replay", bag.to_str().unwrap(), "--goal", "find the chair", "--json"])
        .args(["--bundle", concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny")])
        .args(["--detector", detector.to_str().unwrap()])
        .output()
        .unwrap();
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let answer: Answer = serde_json::from_value(document["answer"].clone()).unwrap();
    assert_eq!((answer.status, answer.imagined), (Status::Found, false), "{document}");
    assert_eq!(answer.class.as_deref(), Some("chair"));
    assert!(answer.pose.is_some() && answer.covariance.unwrap().len() == 36);
    assert!(answer.views.unwrap() >= 3, "{document}");
}
