//! Decodes arbitrary bytes as every message type and encodes what decoded again.
#![no_main]
#![allow(dead_code, unused_imports)]

include!("vocabulary.rs");

use libfuzzer_sys::fuzz_target;
use msg::*;

fn one<T: RosType>(bytes: &[u8]) -> Option<T> {
    let value = T::decode(bytes).ok()?;
    let again = value.encode();
    // At most what a sequence of empty strings grows by.
    assert!(again.len() <= 4 * bytes.len() + 4_096, "{}: {} from {}", T::NAME, again.len(), bytes.len());
    // NaN differs from itself, so the bytes are compared.
    let twice = T::decode(&again).unwrap_or_else(|e| panic!("{}: {e}", T::NAME)).encode();
    assert_eq!(again, twice, "{}", T::NAME);
    Some(value)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    match kind % 20 {
        0 => drop(one::<StringMsg>(bytes)),
        1 => drop(one::<PoseStamped>(bytes)),
        2 => drop(one::<PoseWithCovarianceStamped>(bytes)),
        3 => {
            if let Some(m) = one::<TFMessage>(bytes) {
                let mut tree = geometry::TfTree::new();
                let _ = tree.insert_message(&m, false);
                for t in &m.transforms {
                    let _ = tree.lookup(&t.header.frame_id, &t.child_frame_id, t.header.stamp.timestamp());
                }
            }
        }
        4 => drop(one::<Odometry>(bytes)),
        5 => drop(one::<Path>(bytes).map(|m| goal::Goal::from_path("g", &m))),
        6 => drop(one::<CameraInfo>(bytes).map(|m| camera::CameraIntrinsics::from_camera_info(&m))),
        7 => drop(one::<Image>(bytes)),
        8 => drop(one::<CompressedImage>(bytes)),
        9 => drop(one::<DiagnosticArray>(bytes)),
        10 => drop(one::<Detection2DArray>(bytes)),
        11 => drop(one::<GoalStatusArray>(bytes)),
        12 => drop(one::<CancelGoalResponse>(bytes)),
        13 => drop(one::<NavigateSendGoalRequest>(bytes)),
        14 => drop(one::<NavigateGetResultResponse>(bytes)),
        15 => drop(one::<NavigateFeedback>(bytes)),
        16 => drop(one::<TwistStamped>(bytes)),
        17 => drop(ImageView::decode(bytes)),
        18 => drop(CompressedImageView::decode(bytes)),
        _ => drop(one::<Clock>(bytes)),
    }
});
