//! The robot's vocabulary of mindseye and its ways in and out: time, frames of reference,
//! goals and answers; CDR; ROS 2 and plain clients over Zenoh; bags; image decoding.
//!
//! * [`time`], [`clock`]: instants, spans, and the only reading of clocks.
//! * [`geometry`]: planar poses, covariances, the transform buffer.
//! * [`camera`]: intrinsics; [`image`]: pixels.
//! * [`goal`], [`answer`]: what clients ask and what they get.
//! * [`cdr`], [`msg`]: ROS 2 messages on the wire.
//! * [`ros`]: sessions, topics, services and actions over Zenoh.

pub mod answer;
pub mod bag;
pub mod camera;
pub mod cdr;
pub mod clock;
pub mod geometry;
pub mod goal;
pub mod image;
pub mod msg;
pub mod ros;
pub mod time;

pub use answer::{Answer, FramedPose2, FramedPose3, Status};
pub use camera::CameraIntrinsics;
pub use goal::{Goal, GoalKind};
pub use ros::{RosConfig, RosSession};
pub use time::{TimeDelta, Timestamp};
