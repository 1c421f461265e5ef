//! What detector and model say together, by made-up things and answers.

use super::*;
use crate::image::RgbImage;
use crate::study::{Studied, StudyCounts};
use mindseye_bridge::answer::Answer;
use mindseye_bridge::time::Timestamp;
use mindseye_landmarks::{Camera, ObjectConfig, ObjectMap, SeenBox};
use nalgebra::{Isometry3, UnitQuaternion, Vector3};

/// A camera 1 m above the floor that looks level at a place.
fn looking(from: [f64; 2], to: [f64; 2]) -> Isometry3<f64> {
    let ahead = Vector3::new(to[0] - from[0], to[1] - from[1], 0.0);
    let turn = UnitQuaternion::face_towards(&ahead, &-Vector3::z());
    Isometry3::from_parts(Vector3::new(from[0], from[1], 1.0).into(), turn)
}

/// Things of class 1 at these places, seen from along the x axis.
fn things(places: &[[f64; 2]]) -> Vec<MapObject> {
    let camera = Camera::pinhole(640, 480, 500.0, 500.0, 319.5, 239.5).unwrap();
    let mut map = ObjectMap::new(ObjectConfig::default());
    for k in 0..10 {
        let pose = looking([0.2 * f64::from(k), 0.0], [1.0, 3.0]);
        let boxes: Vec<SeenBox> = places
            .iter()
            .filter_map(|p| {
                let at = pose.inverse_transform_point(&Point3::new(p[0], p[1], 1.0));
                let pixel = camera.project(&at)?;
                let half = 0.2 * 500.0 / at.z;
                let (x, y) = (pixel.x + 0.5, pixel.y + 0.5);
                Some(SeenBox { class: 1, score: 0.8, area: [x - half, y - half, x + half, y + half] })
            })
            .collect();
        map.insert(&boxes, &camera, &pose);
    }
    assert_eq!(map.objects().len(), places.len());
    map.objects().to_vec()
}

fn scene(places: &[[f64; 2]]) -> Scene {
    let classes: Vec<String> = ["cup", "chair"].map(String::from).to_vec();
    Scene {
        memory: Vec::new(),
        newest: RgbImage::filled(1, 1, [0; 3]),
        newest_detail: None,
        captured_at: Timestamp(7),
        odom_from_base: Some(Pose2::new(1.0, 0.0, 0.0)),
        odom_frame: "odom".into(),
        base_frame: "base_link".into(),
        base_from_camera: None,
        odometry_noise: Default::default(),
        intrinsics: None,
        studied: Studied {
            objects: things(places),
            classes: Some(classes.into()),
            counts: StudyCounts { detected: 10, boxes: 20, ..StudyCounts::default() },
            standoff_m: 1.2,
            ..Studied::default()
        },
    }
}

fn answered(status: Status, object: Option<(f64, f64)>) -> Grounded {
    let mut answer = Answer::new("g", status, None);
    answer.imagined = true;
    if status == Status::Found {
        answer.pose = Some(FramedPose2::new("odom", Pose2::new(1.0, 1.8, 1.57)));
        answer.covariance = Some(vec![0.01; 36]);
    }
    Grounded {
        answer,
        lifted: None,
        frames: Vec::new(),
        candidate: 0,
        origin: None,
        explained: Vec::new(),
        found_box: None,
        used: Vec::new(),
        path: Vec::new(),
        registered: Vec::new(),
        object,
        geometry: None,
        guided: None,
        step_ms: Vec::new(),
        reconstruction_error: None,
    }
}

fn joined(mut grounded: Grounded, scene: &Scene, goal: &str, unsuited: bool) -> Answer {
    join(&mut grounded, scene, &Goal::text("g", goal).unwrap(), unsuited, 3.0);
    grounded.answer
}

#[test]
fn alone_the_nearest_thing_is_gone_to_from_the_side_that_was_seen() {
    let scene = scene(&[[0.2, 3.5], [1.2, 3.0]]);
    let got = joined(answered(Status::Failed, None), &scene, "find the chair", true);
    assert_eq!((got.status, got.imagined, got.class.as_deref()), (Status::Found, false, Some("chair")));
    let pose = got.pose.unwrap();
    // By hand: the nearer chair at (1.2, 3), seen from (1, 0) where the robot stands; 1.2 m before it on that line.
    let yaw = 3f64.atan2(0.2);
    let want = [1.2 - 1.2 * yaw.cos(), 3.0 - 1.2 * yaw.sin()];
    let off = (pose.x - want[0]).hypot(pose.y - want[1]);
    assert!(off < 0.05 && (pose.yaw - yaw).abs() < 0.02, "{pose:?}, wanted {want:?} {yaw}");
    assert!(got.reason.unwrap().contains("(the nearest of 2)"));
    assert_eq!((got.stamp_ns, got.covariance.unwrap().len()), (Some(7), 36));
    let none = joined(answered(Status::Failed, None), &scene, "find the cup", true);
    assert_eq!(none.status, Status::NotInContext);
    assert!(none.reason.unwrap().contains("has placed no cup: 20 boxes in 10 frames") && none.pose.is_none());
}

#[test]
fn beside_a_model_both_must_agree() {
    let scene = scene(&[[1.2, 3.0]]);
    let agreed = joined(answered(Status::Found, Some((1.25, 2.9))), &scene, "the chair", false);
    assert_eq!((agreed.status, agreed.imagined), (Status::Found, true));
    assert!(agreed.pose.is_some() && agreed.views.unwrap() >= 3);
    let apart = joined(answered(Status::Found, Some((-1.0, 1.0))), &scene, "the chair", false);
    assert_eq!((apart.status, apart.pose), (Status::Inconsistent, None));
    assert!(apart.reason.unwrap().contains("from where the model places it"));
    let unseen = joined(answered(Status::NotInContext, None), &scene, "the chair", false);
    assert_eq!(unseen.status, Status::Inconsistent);
    assert!(unseen.reason.unwrap().contains("the detector saw a chair in 10 frames"));
    // What the detector has no word for, or has not seen, is the model's affair.
    for goal in ["the red chair", "the cup"] {
        let own = joined(answered(Status::Found, Some((-1.0, 1.0))), &scene, goal, false);
        assert_eq!(own.status, Status::Found, "{goal}");
    }
}
