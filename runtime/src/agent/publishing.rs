//! Which poses may be published, and with which stamp.

use crate::planar::{Pose2, is_jump};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use serde::Deserialize;

/// The stamp of a goal pose in the frame of odometry. Such a pose means the same at any time, so that it is stamped when
/// it is published, by the robot's clock and never by this machine's: the robot may run on simulated time. A pose
/// relative to the robot, given when there is no odometry, keeps the stamp of the picture that it was read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoalStamp {
    /// The newest stamp of odometry; of the camera where odometry has none.
    #[default]
    Robot,
    /// Zero: the newest transform, whichever that is.
    Zero,
}

/// What a message of odometry says.
#[derive(Clone, Debug, PartialEq)]
pub struct OdometryHeard {
    /// Its frame.
    pub frame: String,
    /// The robot's frame.
    pub base: String,
    /// Its stamp, on the robot's clock.
    pub stamp: Timestamp,
    /// `frame_from_base`.
    pub pose: Pose2,
}

impl OdometryHeard {
    /// How far, metres, the robot would have had to jump; `None` when it can have driven.
    pub(super) fn jumped_from(&self, before: &Self) -> Option<f64> {
        let by = self.pose.distance(before.pose);
        is_jump(by, 0.0, (self.stamp - before.stamp).abs()).then_some(by)
    }
}

/// Why a pose that was found is not published.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(super) enum Unpublishable {
    #[error("what was seen got lost meanwhile: the camera's stream began anew")]
    MemoryLost,
    #[error(
        "the frame of odometry changed from {from:?} to {to:?} meanwhile: the pose that was found means nothing there; ask again"
    )]
    FrameChanged { from: String, to: String },
    #[error(
        "odometry in {frame:?} jumped by {by:.1} m meanwhile (was localisation restarted?): the pose that was found is not where it was; ask again"
    )]
    Jumped { frame: String, by: f64 },
    #[error("nothing was heard of the frame {frame:?} for {:.1} s, and transforms are kept for {:.1} s: the pose is not published; does odometry still run?", silent.as_secs_f64(), most.as_secs_f64())]
    FrameSilent { frame: String, silent: TimeDelta, most: TimeDelta },
    #[error("the pose is relative to {frame:?} as it was {:.1} s ago, and transforms are kept for {:.1} s: it is not published", age.as_secs_f64(), most.as_secs_f64())]
    Old { frame: String, age: TimeDelta, most: TimeDelta },
    #[error("the node {name} was started earlier and serves this robot: only it publishes goals")]
    Rival { name: String },
}

impl Unpublishable {
    /// The answer without the pose that must not be published, with the reason.
    pub fn refuse(&self, answer: &Answer) -> Answer {
        let status = match self {
            Self::FrameSilent { .. } | Self::Old { .. } => Status::Stale,
            _ => Status::Failed,
        };
        Answer {
            status,
            reason: Some(self.to_string()),
            pose: None,
            camera_pose: None,
            covariance: None,
            ..answer.clone()
        }
    }
}
