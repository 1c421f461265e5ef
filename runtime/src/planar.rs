//! Planar poses of the robot's base.
//!
//! The runtime reasons about where a wheeled base stands: x forward, y left, yaw counter-clockwise from x
//! (REP-103), metres and radians. The pose type and the full 3-D transforms are the bridge's.

pub use mindseye_base::planar::OdometryNoise;
pub use mindseye_bridge::geometry::{Pose2, wrap_angle};
use mindseye_bridge::time::TimeDelta;
use nalgebra::Isometry3;

/// Maps a point given in the axes of `world_from_body` (metres) into the world.
pub fn point_from(world_from_body: Pose2, x: f64, y: f64) -> (f64, f64) {
    let (s, c) = world_from_body.yaw.sin_cos();
    (world_from_body.x + c * x - s * y, world_from_body.y + s * x + c * y)
}

/// True when all three numbers are finite.
pub fn is_finite(pose: Pose2) -> bool {
    pose.x.is_finite() && pose.y.is_finite() && pose.yaw.is_finite()
}

/// The pose between two poses at `part` in [0, 1]: positions on the straight line, headings along the shorter
/// arc.
pub fn between(a: Pose2, b: Pose2, part: f64) -> Pose2 {
    Pose2::new(a.x + part * (b.x - a.x), a.y + part * (b.y - a.y), a.yaw + part * wrap_angle(b.yaw - a.yaw))
}

/// What odometry may correct at once (m, rad), and how fast no robot with wheels drives or turns (m/s, rad/s).
const CORRECTION: [f64; 2] = [0.5, 0.5];
const SPEED_MAX: [f64; 2] = [5.0, 6.0];

/// Whether odometry jumped: no robot drives `metres`, or turns by `radians`, in the time between two poses.
pub fn is_jump(metres: f64, radians: f64, elapsed: TimeDelta) -> bool {
    let secs = elapsed.as_secs_f64().max(0.0);
    metres > CORRECTION[0] + SPEED_MAX[0] * secs || radians.abs() > CORRECTION[1] + SPEED_MAX[1] * secs
}

/// A pose that a [`PoseHistory`] can hold.
pub trait TimedPose: Copy {
    /// Whether all its numbers are finite.
    fn is_finite(&self) -> bool;

    /// The pose between this one and another at `part` in [0, 1].
    #[must_use]
    fn between(&self, other: &Self, part: f64) -> Self;
}

impl TimedPose for Pose2 {
    fn is_finite(&self) -> bool {
        is_finite(*self)
    }

    fn between(&self, other: &Self, part: f64) -> Self {
        between(*self, *other, part)
    }
}

impl TimedPose for Isometry3<f64> {
    fn is_finite(&self) -> bool {
        self.translation.vector.iter().chain(self.rotation.coords.iter()).all(|v| v.is_finite())
    }

    fn between(&self, other: &Self, part: f64) -> Self {
        mindseye_bridge::geometry::interpolate(self, other, part)
    }
}

/// Poses by time, so that a frame's pose can be asked for after the fact.
///
/// A fixed ring: the oldest pose leaves when a new one finds it full. A pose that comes a little late is put in its
/// place; stamps that jump back further clear it, because poses before and after such a jump belong to different drives.
#[derive(Debug)]
pub struct PoseHistory<P = Pose2> {
    entries: std::collections::VecDeque<(i64, P)>,
    capacity: usize,
}

impl<P: TimedPose> PoseHistory<P> {
    /// A history of at most `capacity` poses (at least 2); all memory is taken here.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(2);
        Self { entries: std::collections::VecDeque::with_capacity(capacity), capacity }
    }

    /// Poses up to this far behind the newest one are late, in nanoseconds.
    const LATE_MAX_NS: i64 = 1_000_000_000;

    /// Stores a pose valid at `stamp_ns`. A pose that is not finite, or repeats a stamp, is ignored.
    pub fn push(&mut self, stamp_ns: i64, pose: P) {
        if !pose.is_finite() {
            return;
        }
        if let Some(&(newest, _)) = self.entries.back()
            && stamp_ns <= newest
        {
            if newest.saturating_sub(stamp_ns) <= Self::LATE_MAX_NS {
                let at = self.entries.partition_point(|&(stamp, _)| stamp < stamp_ns);
                let known = self.entries.get(at).is_some_and(|&(stamp, _)| stamp == stamp_ns);
                if !known && self.entries.len() < self.capacity {
                    self.entries.insert(at, (stamp_ns, pose));
                }
                return;
            }
            self.entries.clear();
        }
        if self.entries.len() == self.capacity {
            self.entries.pop_front();
        }
        self.entries.push_back((stamp_ns, pose));
    }

    /// The pose at `stamp_ns`, interpolated between its neighbours; outside the history the nearest end, but
    /// only within `slack_ns` of it. `None` when nothing is known about that time.
    pub fn at(&self, stamp_ns: i64, slack_ns: i64) -> Option<P> {
        let after = self.entries.partition_point(|&(stamp, _)| stamp < stamp_ns);
        match (after.checked_sub(1).and_then(|i| self.entries.get(i)), self.entries.get(after)) {
            (Some(&(t0, p0)), Some(&(t1, p1))) => {
                let part = stamp_ns.saturating_sub(t0) as f64 / t1.saturating_sub(t0).max(1) as f64;
                Some(p0.between(&p1, part))
            }
            (Some(&(t, p)), None) | (None, Some(&(t, p))) => {
                (stamp_ns.saturating_sub(t).saturating_abs() <= slack_ns).then_some(p)
            }
            (None, None) => None,
        }
    }

    /// The newest pose and its stamp.
    pub fn newest(&self) -> Option<(i64, P)> {
        self.entries.back().copied()
    }

    /// Forgets every pose; the memory stays allocated.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Number of poses held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when no pose is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::PI;

    #[test]
    fn history_interpolates_and_knows_its_limits() {
        let mut history = PoseHistory::new(3);
        assert!(history.at(0, 100).is_none());
        for (stamp, x) in [(100, 1.0), (200, 2.0), (300, 3.0), (400, 4.0)] {
            history.push(stamp, Pose2::new(x, 0.0, 0.0));
        }
        let cases: [(i64, i64, Option<f64>); 6] = [
            (250, 0, Some(2.5)),
            (400, 0, Some(4.0)),
            (410, 10, Some(4.0)),
            (411, 10, None),
            (195, 5, Some(2.0)), // 100 has left the ring
            (100, 5, None),
        ];
        for (stamp, slack, want) in cases {
            assert_eq!(history.at(stamp, slack).map(|p| p.x), want, "at {stamp} with slack {slack}");
        }
        let second = 1_000_000_000;
        history.push(3 * second, Pose2::new(9.0, 0.0, 0.0));
        history.push(second, Pose2::new(9.0, 0.0, 0.0));
        assert_eq!(history.len(), 1, "a stamp far behind starts anew");
        history.push(second + 10, Pose2::new(f64::NAN, 0.0, 0.0));
        assert_eq!(history.len(), 1);
    }

    #[test]
    fn a_late_pose_is_put_in_its_place() {
        let mut history = PoseHistory::new(5);
        for (stamp, x) in [(100, 1.0), (300, 3.0), (200, 2.5), (200, 7.0), (400, 4.0)] {
            history.push(stamp, Pose2::new(x, 0.0, 0.0));
        }
        assert_eq!(history.at(200, 0).map(|p| p.x), Some(2.5));
        assert_eq!(history.at(350, 0).map(|p| p.x), Some(3.5));
        assert_eq!((history.len(), history.newest().unwrap().0), (4, 400));
    }

    #[test]
    fn headings_take_the_shorter_arc() {
        let a = Pose2::new(0.0, 0.0, 3.0);
        let b = Pose2::new(0.0, 0.0, -3.0);
        assert!((between(a, b, 0.5).yaw.abs() - PI).abs() < 1e-9);
    }
}
