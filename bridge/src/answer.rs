//! What the runtime answers to a goal: exactly one [`Answer`] each.

use crate::geometry::Pose2;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How a goal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The pose was published.
    Found,
    /// Nothing like it was seen.
    NotInContext,
    /// Imagined, but it disagrees with what was seen: withheld.
    Inconsistent,
    /// The newest frame is older than the goal allows.
    Stale,
    /// The deadline passed; the best so far is attached and not published.
    Late,
    /// Cancelled by a client or by a newer goal.
    Cancelled,
    /// Something broke; the reason says what.
    Failed,
}

impl Status {
    /// The word used in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::NotInContext => "not_in_context",
            Self::Inconsistent => "inconsistent",
            Self::Stale => "stale",
            Self::Late => "late",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where the base should stand: planar, in the named frame (`map` or `odom`), metres and radians.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FramedPose2 {
    /// Frame of reference.
    pub frame: String,
    /// Metres.
    pub x: f64,
    /// Metres.
    pub y: f64,
    /// Radians, counter-clockwise.
    pub yaw: f64,
}

impl FramedPose2 {
    /// A planar pose in a named frame.
    #[must_use]
    pub fn new(frame: impl Into<String>, pose: Pose2) -> Self {
        Self { frame: frame.into(), x: pose.x, y: pose.y, yaw: pose.yaw }
    }

    /// The numbers without the frame.
    #[must_use]
    pub fn pose2(&self) -> Pose2 {
        Pose2::new(self.x, self.y, self.yaw)
    }
}

/// A pose in space in the named frame: metres, unit quaternion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FramedPose3 {
    /// Frame of reference.
    pub frame: String,
    /// x, y, z in metres.
    pub position: [f64; 3],
    /// Quaternion x, y, z, w.
    pub orientation: [f64; 4],
}

impl FramedPose3 {
    /// `frame_from_body` in a named frame.
    #[must_use]
    pub fn new(frame: impl Into<String>, frame_from_body: &nalgebra::Isometry3<f64>) -> Self {
        let t = frame_from_body.translation.vector;
        let q = frame_from_body.rotation.coords;
        Self { frame: frame.into(), position: [t.x, t.y, t.z], orientation: [q.x, q.y, q.z, q.w] }
    }
}

/// The answer to one goal. Serialises to one JSON object; what is not known is `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Id of the goal.
    pub goal_id: String,
    /// How it ended.
    pub status: Status,
    /// One sentence for a person; always given unless `found`.
    pub reason: Option<String>,
    /// Where the base should stand.
    pub pose: Option<FramedPose2>,
    /// Where the camera ended in the imagined drive (optical frame).
    pub camera_pose: Option<FramedPose3>,
    /// Stamp of the camera frame that the answer was derived from.
    pub stamp_ns: Option<i64>,
    /// 6x6 row-major in ROS order (x, y, z, rotations; m^2, rad^2), in the pose's frame.
    pub covariance: Option<Vec<f64>>,
    /// Whether an imagined drive stands behind the answer; false where only a detector's things do.
    #[serde(default)]
    pub imagined: bool,
    /// Class of the thing, where a detector knows it.
    #[serde(default)]
    pub class: Option<String>,
    /// Frames in which the detector saw the thing.
    #[serde(default)]
    pub views: Option<u32>,
    /// Robots whose memories the answer rests on, beside the robot's own; empty where none were shared.
    #[serde(default)]
    pub eyes: Vec<String>,
    /// Why a small model on the robot answered in the place of a server; `None` where it did not.
    #[serde(default)]
    pub fallback: Option<String>,
    /// Goal in the last imagined frame: x0, y0, x1, y1 in its pixels.
    #[serde(rename = "box")]
    pub bounding_box: Option<[f64; 4]>,
    /// Agreement of the imagination with what was seen, 0 (none) to 1.
    pub consistency: Option<f64>,
    /// Seed used.
    pub seed: u64,
    /// Denoising steps done.
    pub steps: u32,
    /// Imaginations drawn.
    pub candidates: u32,
    /// Context latents that were looked at.
    #[serde(default)]
    pub context_latents: u32,
    /// Which model bundle.
    pub bundle_sha256: String,
    /// Which engine.
    pub engine_sha256: String,
    /// Milliseconds per stage, by name.
    pub timings_ms: BTreeMap<String, f64>,
}

impl Answer {
    /// An answer with a status and a reason and nothing else.
    #[must_use]
    pub fn new(goal_id: impl Into<String>, status: Status, reason: Option<String>) -> Self {
        Self {
            goal_id: goal_id.into(),
            status,
            reason,
            pose: None,
            camera_pose: None,
            stamp_ns: None,
            covariance: None,
            imagined: false,
            class: None,
            views: None,
            eyes: Vec::new(),
            fallback: None,
            bounding_box: None,
            consistency: None,
            seed: 0,
            steps: 0,
            candidates: 0,
            context_latents: 0,
            bundle_sha256: String::new(),
            engine_sha256: String::new(),
            timings_ms: BTreeMap::new(),
        }
    }

    /// As one line of JSON. Numbers that JSON cannot hold (NaN) become `null`.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings, numbers and string-keyed maps always serialise")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_shape() {
        let mut a = Answer::new("g1", Status::Found, None);
        a.pose = Some(FramedPose2::new("map", Pose2::new(1.0, -2.0, 0.5)));
        a.bounding_box = Some([1.0, 2.0, 3.0, 4.0]);
        a.covariance = Some(vec![0.0; 36]);
        a.stamp_ns = Some(7);
        a.timings_ms.insert("denoise".into(), 12.5);
        let json: serde_json::Value = serde_json::from_str(&a.to_json()).unwrap();
        assert_eq!(json["status"], "found");
        assert_eq!(json["pose"], serde_json::json!({"frame": "map", "x": 1.0, "y": -2.0, "yaw": 0.5}));
        assert_eq!(json["box"], serde_json::json!([1.0, 2.0, 3.0, 4.0]));
        assert_eq!(json["covariance"].as_array().unwrap().len(), 36);
        let mut keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        assert_eq!(
            keys.join(" "),
            "box bundle_sha256 camera_pose candidates class consistency context_latents covariance engine_sha256 eyes \
             fallback goal_id imagined pose reason seed stamp_ns status steps timings_ms views"
        );
        assert_eq!(serde_json::from_value::<Answer>(json).unwrap(), a);
    }

    #[test]
    fn every_status_has_its_word() {
        for (status, word) in [
            (Status::Found, "found"),
            (Status::NotInContext, "not_in_context"),
            (Status::Inconsistent, "inconsistent"),
            (Status::Stale, "stale"),
            (Status::Late, "late"),
            (Status::Cancelled, "cancelled"),
            (Status::Failed, "failed"),
        ] {
            assert_eq!(status.as_str(), word);
            assert_eq!(serde_json::to_value(status).unwrap(), word);
        }
    }
}
