//! Frames of reference: planar poses, covariances and the transform buffer.
//!
//! An isometry named `a_from_b` takes coordinates in `b` to coordinates in `a`, and neighbours match:
//! `map_from_odom * odom_from_base`. Units are metres and radians, axes those of REP-103 (right-handed; body: x forward,
//! y left, z up). Frames are named by text, as ROS names them.

use crate::time::{TimeDelta, Timestamp};
pub use mindseye_base::planar::{Pose2, wrap_angle};
pub use nalgebra::Isometry3;
use nalgebra::{Matrix3, Matrix6, Quaternion, Translation3, UnitQuaternion, Vector3};
use std::collections::{BTreeMap, VecDeque};

/// Rotation of an optical frame (x right, y down, z forward) in the body axes of its mounting
/// (x forward, y left, z up): quaternion xyzw (-0.5, 0.5, -0.5, 0.5).
#[must_use]
pub fn body_from_optical() -> UnitQuaternion<f64> {
    UnitQuaternion::from_quaternion(Quaternion::new(0.5, -0.5, 0.5, -0.5))
}

/// Why numbers are not a pose.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PoseError {
    /// NaN or infinite.
    #[error("{field} is {value}; wanted a finite number")]
    NotFinite {
        /// Which number.
        field: &'static str,
        /// What it is.
        value: f64,
    },
    /// A rotation must be a unit quaternion.
    #[error("quaternion norm is {norm}; wanted 1 within 1 %")]
    QuaternionNorm {
        /// The norm found.
        norm: f64,
    },
}

/// Builds an isometry from a translation (metres) and a quaternion `[x, y, z, w]`, normalising small
/// rounding away.
///
/// # Errors
/// [`PoseError`] when a number is not finite or the quaternion's norm is off by more than 1 %.
pub fn isometry(translation: [f64; 3], quaternion_xyzw: [f64; 4]) -> Result<Isometry3<f64>, PoseError> {
    let names = [
        "position.x",
        "position.y",
        "position.z",
        "orientation.x",
        "orientation.y",
        "orientation.z",
        "orientation.w",
    ];
    for (field, &value) in names.into_iter().zip(translation.iter().chain(&quaternion_xyzw)) {
        if !value.is_finite() {
            return Err(PoseError::NotFinite { field, value });
        }
    }
    let [x, y, z, w] = quaternion_xyzw;
    let q = Quaternion::new(w, x, y, z);
    let norm = q.norm();
    if (norm - 1.0).abs() > 0.01 {
        return Err(PoseError::QuaternionNorm { norm });
    }
    Ok(Isometry3::from_parts(Translation3::from(translation), UnitQuaternion::from_quaternion(q)))
}

/// A planar pose as a transform in the plane z = 0.
#[must_use]
pub fn planar_isometry(pose: Pose2) -> Isometry3<f64> {
    Isometry3::from_parts(
        Translation3::new(pose.x, pose.y, 0.0),
        UnitQuaternion::from_axis_angle(&Vector3::z_axis(), pose.yaw),
    )
}

/// Drops height, roll and pitch: x and y in metres, and the heading of the x axis.
#[must_use]
pub fn planar_pose(isometry: &Isometry3<f64>) -> Pose2 {
    let forward = isometry.rotation * Vector3::x();
    Pose2::new(isometry.translation.x, isometry.translation.y, forward.y.atan2(forward.x))
}

/// 6x6 covariance in ROS order, row-major: x, y, z (m^2), rotation about x, y, z (rad^2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Covariance6(pub [f64; 36]);

/// Variance that says "not known" (m^2 or rad^2).
pub const UNKNOWN_VARIANCE: f64 = 1e6;

impl Covariance6 {
    /// Independent axes with these variances.
    #[must_use]
    pub fn from_diagonal(variances: [f64; 6]) -> Self {
        let mut m = [0.0; 36];
        for (i, v) in variances.into_iter().enumerate() {
            m[i * 7] = v;
        }
        Self(m)
    }

    /// A planar estimate: the other axes are constrained to the ground and get a small variance.
    #[must_use]
    pub fn planar(x: f64, y: f64, yaw: f64) -> Self {
        const GROUND: f64 = 1e-6;
        Self::from_diagonal([x, y, GROUND, GROUND, GROUND, yaw])
    }

    /// Nothing is known.
    #[must_use]
    pub fn unknown() -> Self {
        Self::from_diagonal([UNKNOWN_VARIANCE; 6])
    }

    /// The same uncertainty expressed in axes rotated by `a_from_b`.
    #[must_use]
    pub fn rotated(&self, a_from_b: &UnitQuaternion<f64>) -> Self {
        let r: Matrix3<f64> = a_from_b.to_rotation_matrix().into_inner();
        let mut block = Matrix6::zeros();
        block.fixed_view_mut::<3, 3>(0, 0).copy_from(&r);
        block.fixed_view_mut::<3, 3>(3, 3).copy_from(&r);
        let m = block * Matrix6::from_row_slice(&self.0) * block.transpose();
        let mut out = [0.0; 36];
        for (i, v) in out.iter_mut().enumerate() {
            *v = m[(i / 6, i % 6)];
        }
        Self(out)
    }
}

/// The pose `fraction` (0..1) of the way from `a` to `b`: positions on the straight line, rotations along the shorter arc.
#[must_use]
pub fn interpolate(a: &Isometry3<f64>, b: &Isometry3<f64>, fraction: f64) -> Isometry3<f64> {
    let t = a.translation.vector.lerp(&b.translation.vector, fraction);
    // Opposite quaternions are the same rotation; `try_slerp` refuses only rotations half a turn apart.
    let r = a.rotation.try_slerp(&b.rotation, fraction, 1e-9).unwrap_or(if fraction < 0.5 {
        a.rotation
    } else {
        b.rotation
    });
    Isometry3::from_parts(t.into(), r)
}

/// What a lookup or an insertion into the transform buffer could not do. Ordinary answers, not faults.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TfError {
    /// Never heard of.
    #[error("frame {frame:?} is not in the transform tree")]
    UnknownFrame {
        /// The frame asked for.
        frame: String,
    },
    /// Both are known, but in trees that do not touch.
    #[error("frames {target:?} and {source_frame:?} are not connected")]
    Disconnected {
        /// Frame asked for.
        target: String,
        /// Frame it should come from.
        source_frame: String,
    },
    /// The edge would make a loop, or a frame its own parent.
    #[error("transform {parent:?} from {child:?} would close a loop")]
    Cycle {
        /// Parent of the refused edge.
        parent: String,
        /// Child of the refused edge.
        child: String,
    },
    /// The edge has samples, all of them later.
    #[error("{frame:?} at {wanted_ns} ns is older than the buffer, which begins at {oldest_ns} ns")]
    TooOld {
        /// Child of the edge.
        frame: String,
        /// Time asked for.
        wanted_ns: i64,
        /// Oldest sample kept.
        oldest_ns: i64,
    },
    /// The edge has samples, all of them earlier. Wait and ask again.
    #[error("{frame:?} at {wanted_ns} ns is not there yet; the newest sample is at {newest_ns} ns")]
    TooNew {
        /// Child of the edge.
        frame: String,
        /// Time asked for.
        wanted_ns: i64,
        /// Newest sample.
        newest_ns: i64,
    },
    /// The numbers are not a transform.
    #[error("transform {parent:?} from {child:?}: {cause}")]
    Invalid {
        /// Parent of the refused edge.
        parent: String,
        /// Child of the refused edge.
        child: String,
        /// What is wrong.
        cause: PoseError,
    },
    /// More frames than the buffer holds.
    #[error("the transform buffer holds {limit} frames already; {frame:?} was not added")]
    Full {
        /// The refused frame.
        frame: String,
        /// The limit.
        limit: usize,
    },
}

/// Buffer of `/tf` and `/tf_static`: a forest of frames, each dynamic edge with a bounded history.
///
/// Frame names are compared without a leading slash. Memory is bounded: [`TfTree::MAX_FRAMES`] frames,
/// [`TfTree::MAX_SAMPLES`] samples per edge, and nothing older than [`TfTree::HISTORY`].
#[derive(Debug, Clone, Default)]
pub struct TfTree {
    edges: BTreeMap<String, Edge>, // by child
}

#[derive(Debug, Clone)]
struct Edge {
    parent: String,
    is_static: bool,
    samples: VecDeque<(Timestamp, Isometry3<f64>)>, // ascending
}

impl TfTree {
    /// How far back a dynamic edge remembers.
    pub const HISTORY: TimeDelta = TimeDelta(10 * crate::time::NANOS_PER_SEC);
    /// Most samples per edge (10 s at 200 Hz).
    pub const MAX_SAMPLES: usize = 2_000;
    /// Most edges.
    pub const MAX_FRAMES: usize = 1_024;
    const MAX_DEPTH: usize = 64;

    /// An empty buffer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes every transform of a message. Refused ones do not hinder the others; they are returned.
    pub fn insert_message(&mut self, message: &crate::msg::TFMessage, is_static: bool) -> Vec<TfError> {
        message.transforms.iter().filter_map(|t| self.insert(t, is_static).err()).collect()
    }

    /// Takes one transform.
    ///
    /// # Errors
    /// [`TfError::Invalid`], [`TfError::Cycle`], [`TfError::Full`]; the buffer is then unchanged.
    pub fn insert(&mut self, stamped: &crate::msg::TransformStamped, is_static: bool) -> Result<(), TfError> {
        let t = &stamped.transform;
        let iso = isometry(
            [t.translation.x, t.translation.y, t.translation.z],
            [t.rotation.x, t.rotation.y, t.rotation.z, t.rotation.w],
        )
        .map_err(|cause| TfError::Invalid {
            parent: stamped.header.frame_id.clone(),
            child: stamped.child_frame_id.clone(),
            cause,
        })?;
        self.insert_isometry(
            &stamped.header.frame_id,
            &stamped.child_frame_id,
            stamped.header.stamp.timestamp(),
            iso,
            is_static,
        )
    }

    /// Takes `parent_from_child` at a stamp. A stamp earlier than the history of its edge (a restarted
    /// simulation, a looped bag) empties that edge first.
    ///
    /// # Errors
    /// As [`TfTree::insert`].
    pub fn insert_isometry(
        &mut self,
        parent: &str,
        child: &str,
        stamp: Timestamp,
        parent_from_child: Isometry3<f64>,
        is_static: bool,
    ) -> Result<(), TfError> {
        let (parent, child) = (plain(parent), plain(child));
        if child.is_empty() || parent == child || self.ancestors(parent).any(|(name, _)| name == child) {
            return Err(TfError::Cycle { parent: parent.into(), child: child.into() });
        }
        if !self.edges.contains_key(child) && self.edges.len() >= Self::MAX_FRAMES {
            return Err(TfError::Full { frame: child.into(), limit: Self::MAX_FRAMES });
        }
        if !self.edges.contains_key(child) {
            self.edges.insert(
                child.to_owned(),
                Edge { parent: parent.to_owned(), is_static, samples: VecDeque::new() },
            );
        }
        let Some(edge) = self.edges.get_mut(child) else {
            return Ok(());
        };
        if edge.parent != parent || edge.is_static != is_static {
            edge.parent = parent.to_owned();
            edge.is_static = is_static;
            edge.samples.clear();
        }
        if is_static {
            edge.samples.clear();
            edge.samples.push_back((stamp, parent_from_child));
            return Ok(());
        }
        if edge.samples.back().is_some_and(|(newest, _)| *newest - stamp > Self::HISTORY) {
            edge.samples.clear();
        }
        let at = edge.samples.partition_point(|(t, _)| *t < stamp);
        match edge.samples.get_mut(at) {
            Some(slot) if slot.0 == stamp => slot.1 = parent_from_child,
            _ => edge.samples.insert(at, (stamp, parent_from_child)),
        }
        let newest = edge.samples.back().map_or(stamp, |(t, _)| *t);
        while edge.samples.len() > Self::MAX_SAMPLES
            || edge.samples.front().is_some_and(|(t, _)| newest - *t > Self::HISTORY)
        {
            edge.samples.pop_front();
        }
        Ok(())
    }

    /// `target_from_source` at `stamp`; [`Timestamp::ZERO`] asks for the latest of each edge.
    ///
    /// # Errors
    /// [`TfError::UnknownFrame`], [`TfError::Disconnected`], [`TfError::TooOld`], [`TfError::TooNew`].
    pub fn lookup(&self, target: &str, source: &str, stamp: Timestamp) -> Result<Isometry3<f64>, TfError> {
        let (target, source) = (plain(target), plain(source));
        for frame in [target, source] {
            if !self.knows(frame) {
                return Err(TfError::UnknownFrame { frame: frame.into() });
            }
        }
        let up_target: Vec<&str> =
            std::iter::once(target).chain(self.ancestors(target).map(|(name, _)| name)).collect();
        let up_source = std::iter::once(source).chain(self.ancestors(source).map(|(name, _)| name));
        let common = up_source
            .into_iter()
            .find(|frame| up_target.contains(frame))
            .ok_or_else(|| TfError::Disconnected { target: target.into(), source_frame: source.into() })?;
        let common_from_source = self.climb(source, common, stamp)?;
        let common_from_target = self.climb(target, common, stamp)?;
        Ok(common_from_target.inverse() * common_from_source)
    }

    /// Whether the frame occurs, as a parent or a child.
    #[must_use]
    pub fn knows(&self, frame: &str) -> bool {
        let frame = plain(frame);
        self.edges.contains_key(frame) || self.edges.values().any(|e| e.parent == frame)
    }

    /// The frames above a frame, nearest first.
    pub fn above<'a>(&'a self, frame: &'a str) -> impl Iterator<Item = &'a str> {
        self.ancestors(plain(frame)).map(|(name, _)| name)
    }

    /// Every edge as `(parent, child, is_static)`, by child.
    pub fn edges(&self) -> impl Iterator<Item = (&str, &str, bool)> {
        self.edges.iter().map(|(child, e)| (e.parent.as_str(), child.as_str(), e.is_static))
    }

    fn ancestors<'a>(&'a self, frame: &'a str) -> impl Iterator<Item = (&'a str, &'a Edge)> {
        let mut at = frame;
        std::iter::from_fn(move || {
            let edge = self.edges.get(at)?;
            at = &edge.parent;
            Some((at, edge))
        })
        .take(Self::MAX_DEPTH)
    }

    /// `ancestor_from_frame`.
    fn climb(&self, frame: &str, ancestor: &str, stamp: Timestamp) -> Result<Isometry3<f64>, TfError> {
        let mut iso = Isometry3::identity();
        let mut at = frame;
        while at != ancestor {
            let Some(edge) = self.edges.get(at) else { break };
            iso = edge.at(at, stamp)? * iso;
            at = &edge.parent;
        }
        Ok(iso)
    }
}

impl Edge {
    fn at(&self, child: &str, stamp: Timestamp) -> Result<Isometry3<f64>, TfError> {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return Err(TfError::UnknownFrame { frame: child.into() });
        };
        if self.is_static || stamp == Timestamp::ZERO {
            return Ok(last.1);
        }
        if stamp < first.0 {
            return Err(TfError::TooOld { frame: child.into(), wanted_ns: stamp.0, oldest_ns: first.0.0 });
        }
        if stamp > last.0 {
            return Err(TfError::TooNew { frame: child.into(), wanted_ns: stamp.0, newest_ns: last.0.0 });
        }
        let after = self.samples.partition_point(|(t, _)| *t < stamp);
        let b = &self.samples[after];
        if b.0 == stamp || after == 0 {
            return Ok(b.1);
        }
        let a = &self.samples[after - 1];
        let fraction = (stamp - a.0).as_secs_f64() / (b.0 - a.0).as_secs_f64();
        Ok(interpolate(&a.1, &b.1, fraction))
    }
}

fn plain(frame: &str) -> &str {
    frame.strip_prefix('/').unwrap_or(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::f64::consts::{FRAC_PI_2, PI};

    fn s(secs: f64) -> Timestamp {
        Timestamp::from_secs_f64(1_000.0 + secs)
    }

    fn close(a: &Isometry3<f64>, b: &Isometry3<f64>, tolerance: f64) -> bool {
        (a.translation.vector - b.translation.vector).norm() < tolerance
            && a.rotation.angle_to(&b.rotation) < tolerance
    }

    #[test]
    fn optical_axes() {
        // The camera looks along the body's x axis; its right is the body's -y, its down the body's -z.
        let r = body_from_optical();
        assert!((r * Vector3::z() - Vector3::x()).norm() < 1e-12);
        assert!((r * Vector3::x() + Vector3::y()).norm() < 1e-12);
        assert!((r * Vector3::y() + Vector3::z()).norm() < 1e-12);
    }

    #[test]
    fn angles() {
        for (angle, want) in [(0.0, 0.0), (PI, PI), (-PI, PI), (3.0 * PI, PI), (7.0, 7.0 - 2.0 * PI)] {
            assert!((wrap_angle(angle) - want).abs() < 1e-12, "{angle}");
        }
        assert!(wrap_angle(f64::NAN).is_nan());
    }

    #[test]
    fn bad_poses() {
        assert_eq!(isometry([0.0; 3], [0.0; 4]).unwrap_err(), PoseError::QuaternionNorm { norm: 0.0 });
        assert!(isometry([f64::NAN, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]).is_err());
        assert!(isometry([0.0; 3], [0.0, 0.0, f64::INFINITY, 1.0]).is_err());
        assert!(isometry([1.0; 3], [0.0, 0.0, 0.0, 1.0001]).is_ok());
    }

    #[test]
    fn tree_lookup() {
        let mut tf = TfTree::new();
        let p = |x, y, yaw| planar_isometry(Pose2::new(x, y, yaw));
        tf.insert_isometry("map", "odom", s(0.0), p(10.0, 0.0, 0.0), false).unwrap();
        tf.insert_isometry("map", "odom", s(2.0), p(10.0, 0.0, 0.0), false).unwrap();
        tf.insert_isometry("odom", "base_link", s(0.0), p(0.0, 0.0, 0.0), false).unwrap();
        tf.insert_isometry("odom", "base_link", s(2.0), p(2.0, 0.0, FRAC_PI_2), false).unwrap();
        tf.insert_isometry("/base_link", "camera", s(-900.0), p(0.2, 0.0, 0.0), true).unwrap();
        let got = tf.lookup("map", "camera", s(1.0)).unwrap();
        let half = FRAC_PI_2 / 2.0;
        assert!(close(&got, &p(11.0 + 0.2 * half.cos(), 0.2 * half.sin(), half), 1e-9), "{got:?}");
        let back = tf.lookup("camera", "map", s(1.0)).unwrap();
        assert!(close(&(got * back), &Isometry3::identity(), 1e-9));
        // Zero asks for the latest.
        let latest = tf.lookup("odom", "base_link", Timestamp::ZERO).unwrap();
        assert!(close(&latest, &p(2.0, 0.0, FRAC_PI_2), 1e-9));

        assert!(matches!(tf.lookup("map", "camera", s(3.0)), Err(TfError::TooNew { .. })));
        assert!(matches!(tf.lookup("map", "camera", s(-1.0)), Err(TfError::TooOld { .. })));
        assert!(matches!(tf.lookup("map", "moon", s(1.0)), Err(TfError::UnknownFrame { .. })));
        tf.insert_isometry("moon", "rover", s(0.0), p(0.0, 0.0, 0.0), true).unwrap();
        assert!(matches!(tf.lookup("map", "rover", s(1.0)), Err(TfError::Disconnected { .. })));
        assert!(matches!(
            tf.insert_isometry("camera", "map", s(0.0), Isometry3::identity(), false),
            Err(TfError::Cycle { .. })
        ));
        assert!(matches!(
            tf.insert_isometry("map", "map", s(0.0), Isometry3::identity(), false),
            Err(TfError::Cycle { .. })
        ));
        assert_eq!(tf.edges().count(), 4);
    }

    #[test]
    fn history_is_bounded_and_survives_a_looped_bag() {
        let mut tf = TfTree::new();
        for i in 0..5_000 {
            let stamp = s(f64::from(i) * 0.001);
            tf.insert_isometry("odom", "base", stamp, Isometry3::identity(), false).unwrap();
        }
        assert_eq!(tf.edges["base"].samples.len(), TfTree::MAX_SAMPLES);
        for i in 0..100 {
            tf.insert_isometry("odom", "base", s(f64::from(i)), Isometry3::identity(), false).unwrap();
        }
        assert!(tf.edges["base"].samples.len() <= 11);
        tf.insert_isometry("odom", "base", s(0.0), Isometry3::translation(1.0, 0.0, 0.0), false).unwrap();
        assert_eq!(tf.edges["base"].samples.len(), 1);
        for i in 0..2_000 {
            let _ = tf.insert_isometry("odom", &format!("f{i}"), s(0.0), Isometry3::identity(), true);
        }
        assert_eq!(tf.edges.len(), TfTree::MAX_FRAMES);
    }

    prop_compose! {
        fn any_isometry()(t in prop::array::uniform3(-50.0..50.0f64), e in prop::array::uniform3(-3.0..3.0f64))
            -> Isometry3<f64> {
            Isometry3::from_parts(t.into(), UnitQuaternion::from_euler_angles(e[0], e[1], e[2]))
        }
    }

    proptest! {
        #[test]
        fn planar_matches_spatial(a in prop::array::uniform3(-9.0..9.0f64), b in prop::array::uniform3(-9.0..9.0f64)) {
            let (a, b) = (Pose2::new(a[0], a[1], a[2]), Pose2::new(b[0], b[1], b[2]));
            let spatial = planar_pose(&(planar_isometry(a) * planar_isometry(b)));
            let planar = a.compose(b);
            prop_assert!(planar.distance(spatial) < 1e-9);
            prop_assert!(wrap_angle(planar.yaw - spatial.yaw).abs() < 1e-9);
            let none = a.compose(a.inverse());
            prop_assert!(none.distance(Pose2::default()) < 1e-9 && wrap_angle(none.yaw).abs() < 1e-9);
        }

        #[test]
        fn rotating_a_covariance_keeps_its_trace(q in any_isometry(), d in prop::array::uniform6(0.01..4.0f64)) {
            let c = Covariance6::from_diagonal(d);
            let r = c.rotated(&q.rotation);
            for block in [0, 3] {
                let trace = |m: &Covariance6| (block..block + 3).map(|i| m.0[i * 7]).sum::<f64>();
                prop_assert!((trace(&c) - trace(&r)).abs() < 1e-9);
            }
            let back = r.rotated(&q.rotation.inverse());
            prop_assert!(c.0.iter().zip(&back.0).all(|(a, b)| (a - b).abs() < 1e-9));
        }
    }
}
