//! CDR against vectors of an independent implementation (tests/data/ros/SOURCES.md), and against damage.

use mindseye_bridge::Timestamp;
use mindseye_bridge::msg::*;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path as FilePath;

struct Vector {
    type_name: String,
    hash: String,
    little: Vec<u8>,
    big: Vec<u8>,
}

fn vectors() -> BTreeMap<String, Vector> {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("data/ros/cdr_vectors.txt");
    let hex = |s: &str| -> Vec<u8> {
        (0..s.len() / 2).map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap()).collect()
    };
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| {
            let f: Vec<&str> = line.split(' ').collect();
            let v = Vector { type_name: f[1].into(), hash: f[2].into(), little: hex(f[3]), big: hex(f[4]) };
            (f[0].to_owned(), v)
        })
        .collect()
}

fn header(frame: &str) -> Header {
    Header::new(Timestamp(1_764_000_000_123_456_789), frame)
}

fn pose() -> Pose {
    Pose {
        position: Point { x: 1.5, y: -2.25, z: 0.125 },
        orientation: Quaternion { x: 0.0, y: 0.0, z: 0.6, w: 0.8 },
    }
}

fn covariance() -> Cov36 {
    let mut c = Cov36::default();
    for (i, v) in c.0.iter_mut().enumerate() {
        *v = i as f64 / 4.0;
    }
    c
}

fn pose_cov() -> PoseWithCovariance {
    PoseWithCovariance { pose: pose(), covariance: covariance() }
}

fn twist() -> Twist {
    Twist { linear: Vector3 { x: 0.5, y: 0.0, z: 0.0 }, angular: Vector3 { x: 0.0, y: 0.0, z: -0.25 } }
}

fn transform(child: &str) -> TransformStamped {
    TransformStamped {
        header: header("odom"),
        child_frame_id: child.into(),
        transform: TransformMsg {
            translation: Vector3 { x: 1.5, y: -2.25, z: 0.125 },
            rotation: pose().orientation,
        },
    }
}

fn image() -> Image {
    Image {
        header: header("cam"),
        height: 2,
        width: 4,
        encoding: "rgb8".into(),
        is_bigendian: 0,
        step: 12,
        data: (0..24).collect(),
    }
}

fn compressed() -> CompressedImage {
    CompressedImage { header: header("cam"), format: "jpeg".into(), data: (0..7).collect() }
}

fn detections() -> Detection2DArray {
    Detection2DArray {
        header: header("cam"),
        detections: vec![Detection2D {
            header: header("cam"),
            results: vec![ObjectHypothesisWithPose {
                hypothesis: ObjectHypothesis { class_id: "chair".into(), score: 0.875 },
                pose: pose_cov(),
            }],
            bbox: BoundingBox2D {
                center: Pose2D { position: Point2D { x: 10.5, y: 20.5 }, theta: 0.0 },
                size_x: 5.0,
                size_y: 6.0,
            },
            id: "g1".into(),
        }],
    }
}

#[test]
fn same_bytes_as_another_implementation() {
    let mut left = vectors();
    let mut seen = 0;
    let mut take = |case: &str| {
        seen += 1;
        left.remove(case).unwrap_or_else(|| panic!("no vector {case}"))
    };
    fn check<T: RosType + PartialEq + Debug>(case: &str, v: &Vector, value: &T) {
        assert_eq!(v.type_name, T::NAME, "{case}");
        assert_eq!(v.hash, T::HASH, "{case}");
        assert_eq!(value.encode(), v.little, "{case}: bytes");
        assert_eq!(&T::decode(&v.little).unwrap(), value, "{case}: little-endian");
        assert_eq!(&T::decode(&v.big).unwrap(), value, "{case}: big-endian");
    }
    check("text", &take("text"), &StringMsg { data: "find the red chair".into() });
    check("empty_text", &take("empty_text"), &StringMsg::default());
    check("clock", &take("clock"), &Clock { clock: Time { sec: -5, nanosec: 999_999_999 } });
    check("pose", &take("pose"), &PoseStamped { header: header("map"), pose: pose() });
    check("target", &take("target"), &PoseWithCovarianceStamped { header: header("odom"), pose: pose_cov() });
    check("twist", &take("twist"), &twist());
    check(
        "twist_stamped",
        &take("twist_stamped"),
        &TwistStamped { header: header("base_link"), twist: twist() },
    );
    check("tf", &take("tf"), &TFMessage { transforms: vec![transform("base_link"), transform("b")] });
    check(
        "odometry",
        &take("odometry"),
        &Odometry {
            header: header("odom"),
            child_frame_id: "base_link".into(),
            pose: pose_cov(),
            twist: TwistWithCovariance { twist: twist(), covariance: covariance() },
        },
    );
    let poses = ["map", "", "odom"].map(|f| PoseStamped { header: header(f), pose: pose() }).to_vec();
    check("path", &take("path"), &Path { header: header("map"), poses });
    let ramp = |scale: f64| move |i: usize| i as f64 * scale;
    check(
        "camera_info",
        &take("camera_info"),
        &CameraInfo {
            header: header("cam"),
            height: 480,
            width: 640,
            distortion_model: "plumb_bob".into(),
            d: vec![0.1, -0.2, 0.001, 0.002, 0.0],
            k: std::array::from_fn(ramp(1.0)),
            r: std::array::from_fn(ramp(2.0)),
            p: std::array::from_fn(ramp(3.0)),
            binning_x: 1,
            binning_y: 2,
            roi: RegionOfInterest { x_offset: 3, y_offset: 4, height: 5, width: 6, do_rectify: true },
        },
    );
    check("image", &take("image"), &image());
    check("compressed", &take("compressed"), &compressed());
    check(
        "diagnostics",
        &take("diagnostics"),
        &DiagnosticArray {
            header: header(""),
            status: vec![DiagnosticStatus {
                level: 2,
                name: "agent".into(),
                message: "stale".into(),
                hardware_id: "hw".into(),
                values: vec![KeyValue { key: "age".into(), value: "1.5".into() }],
            }],
        },
    );
    check("detections", &take("detections"), &detections());
    assert!(left.is_empty() && seen == 15, "vectors without a check: {:?}", left.keys());
}

#[test]
fn borrowed_views_see_the_same() {
    let v = vectors();
    for bytes in [&v["image"].little, &v["image"].big] {
        let view = ImageView::decode(bytes).unwrap();
        let own = image();
        assert_eq!((view.width, view.height, view.step), (own.width, own.height, own.step));
        assert_eq!((view.encoding, view.data), (own.encoding.as_str(), own.data.as_slice()));
        assert!(bytes.as_ptr_range().contains(&view.data.as_ptr()), "borrowed");
    }
    let view = CompressedImageView::decode(&v["compressed"].big).unwrap();
    assert_eq!((view.header.frame_id, view.format, view.data), ("cam", "jpeg", &compressed().data[..]));
}

/// Every decoder on damaged messages: an answer at once, never a panic, never memory that a length asked
/// for. What still decodes encodes again to something that decodes to the same.
#[test]
fn damaged_messages() {
    fn try_all(bytes: &[u8]) -> usize {
        fn one<T: RosType>(bytes: &[u8]) -> usize {
            let Ok(value) = T::decode(bytes) else { return 0 };
            // NaN differs from itself, so the bytes are compared.
            let again = value.encode();
            let twice = T::decode(&again).unwrap_or_else(|e| panic!("{}: {e}", T::NAME)).encode();
            assert_eq!(again, twice, "{}", T::NAME);
            1
        }
        let views = usize::from(ImageView::decode(bytes).is_ok());
        views
            + usize::from(CompressedImageView::decode(bytes).is_ok())
            + one::<StringMsg>(bytes)
            + one::<PoseStamped>(bytes)
            + one::<PoseWithCovarianceStamped>(bytes)
            + one::<TFMessage>(bytes)
            + one::<Odometry>(bytes)
            + one::<Path>(bytes)
            + one::<CameraInfo>(bytes)
            + one::<Image>(bytes)
            + one::<CompressedImage>(bytes)
            + one::<DiagnosticArray>(bytes)
            + one::<Detection2DArray>(bytes)
            + one::<GoalStatusArray>(bytes)
            + one::<CancelGoalResponse>(bytes)
            + one::<NavigateSendGoalRequest>(bytes)
            + one::<NavigateGetResultResponse>(bytes)
            + one::<NavigateFeedback>(bytes)
    }
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (mut tried, mut decoded) = (0u32, 0usize);
    for v in vectors().into_values() {
        for original in [v.little, v.big] {
            for cut in 0..original.len() {
                decoded += try_all(&original[..cut]);
                tried += 1;
            }
            for at in (4..original.len().saturating_sub(3)).step_by(4) {
                for huge in [u32::MAX, 0x7fff_ffff, 0xffff, original.len() as u32] {
                    let mut bytes = original.clone();
                    bytes[at..at + 4].copy_from_slice(&huge.to_le_bytes());
                    decoded += try_all(&bytes);
                    tried += 1;
                }
            }
            for _ in 0..300 {
                let mut bytes = original.clone();
                for _ in 0..1 + next() % 4 {
                    let at = next() as usize % bytes.len();
                    bytes[at] = next() as u8;
                }
                decoded += try_all(&bytes);
                tried += 1;
            }
        }
    }
    assert!(tried > 10_000 && decoded > 1_000, "{tried} tried, {decoded} decoded");
}
