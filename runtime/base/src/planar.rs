//! Poses on the floor.
//!
//! x forward, y left, yaw counter-clockwise from x (REP-103); metres and radians.

use serde::{Deserialize, Serialize};
use std::f64::consts::{PI, TAU};

/// Noise of odometry: standard deviations of a random walk, each growing with the square root of the way.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OdometryNoise {
    /// Error along the way after one metre (m).
    pub metres_per_metre: f64,
    /// Heading error after one metre (rad).
    pub radians_per_metre: f64,
    /// Heading error after turning one radian (rad).
    pub radians_per_radian: f64,
}

impl OdometryNoise {
    /// A fair indoor robot: 1 cm and 0.5 degrees per metre, 1 degree per radian.
    #[must_use]
    pub fn typical() -> Self {
        Self {
            metres_per_metre: 0.01,
            radians_per_metre: 0.5f64.to_radians(),
            radians_per_radian: 1.0f64.to_radians(),
        }
    }

    /// Noise of this many times the standard deviations.
    #[must_use]
    pub fn times(self, k: f64) -> Self {
        Self {
            metres_per_metre: k * self.metres_per_metre,
            radians_per_metre: k * self.radians_per_metre,
            radians_per_radian: k * self.radians_per_radian,
        }
    }

    /// Standard deviations of the way (m) and of the heading (rad) after driving `way_m` and turning by `turn_rad` in all.
    #[must_use]
    pub fn after(&self, way_m: f64, turn_rad: f64) -> (f64, f64) {
        let heading = self.radians_per_metre.powi(2) * way_m + self.radians_per_radian.powi(2) * turn_rad;
        (self.metres_per_metre * way_m.sqrt(), heading.sqrt())
    }
}

/// A pose on the floor, of a base in a map or of one pose in the axes of another.
///
/// ```
/// use mindseye_base::planar::Pose2;
/// let map_from_base = Pose2::new(1.0, 2.0, std::f64::consts::FRAC_PI_2);
/// let base_from_goal = Pose2::new(3.0, 0.0, 0.0);
/// let map_from_goal = map_from_base.compose(base_from_goal);
/// assert!((map_from_goal.y - 5.0).abs() < 1e-12);
/// assert!(map_from_base.relative(map_from_goal).distance(base_from_goal) < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Pose2 {
    /// Metres.
    pub x: f64,
    /// Metres.
    pub y: f64,
    /// Counter-clockwise from the x axis, radians.
    pub yaw: f64,
}

impl Pose2 {
    /// A pose; the angle is brought into `(-pi, pi]`.
    #[must_use]
    pub fn new(x: f64, y: f64, yaw: f64) -> Self {
        Self { x, y, yaw: wrap_angle(yaw) }
    }

    /// A pose whose angle is kept as it is: for headings that are accumulated, and for constants.
    #[must_use]
    pub const fn unwrapped(x: f64, y: f64, yaw: f64) -> Self {
        Self { x, y, yaw }
    }

    /// `map_from_a.compose(a_from_b) = map_from_b`.
    #[must_use]
    pub fn compose(self, other: Self) -> Self {
        let (s, c) = self.yaw.sin_cos();
        Self::new(
            self.x + c * other.x - s * other.y,
            self.y + s * other.x + c * other.y,
            self.yaw + other.yaw,
        )
    }

    /// `map_from_a.inverse() = a_from_map`.
    #[must_use]
    pub fn inverse(self) -> Self {
        let (s, c) = self.yaw.sin_cos();
        Self::new(-c * self.x - s * self.y, s * self.x - c * self.y, -self.yaw)
    }

    /// `map_from_a.relative(map_from_b) = a_from_b`: where `other` is, seen from `self`.
    #[must_use]
    pub fn relative(self, other: Self) -> Self {
        self.inverse().compose(other)
    }

    /// Distance on the floor between the two positions (m).
    #[must_use]
    pub fn distance(self, other: Self) -> f64 {
        (self.x - other.x).hypot(self.y - other.y)
    }

    /// Direction from this position to the point, in the axes that the pose is given in (rad).
    #[must_use]
    pub fn bearing_to(self, x: f64, y: f64) -> f64 {
        (y - self.y).atan2(x - self.x)
    }

    /// True when all three numbers are finite.
    #[must_use]
    pub fn is_finite(self) -> bool {
        self.x.is_finite() && self.y.is_finite() && self.yaw.is_finite()
    }
}

/// Brings an angle (radians) into `(-pi, pi]`. NaN stays NaN.
#[must_use]
pub fn wrap_angle(angle: f64) -> f64 {
    let wrapped = angle.rem_euclid(TAU);
    if wrapped > PI { wrapped - TAU } else { wrapped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_wrapped_into_a_half_open_turn() {
        for (angle, want) in [(0.0, 0.0), (PI, PI), (-PI, PI), (3.0 * PI, PI), (1.5 * PI, -0.5 * PI)] {
            assert!((wrap_angle(angle) - want).abs() < 1e-12, "{angle}");
        }
        assert!(wrap_angle(f64::NAN).is_nan());
        assert_eq!(Pose2::unwrapped(0.0, 0.0, 7.0).yaw, 7.0);
        assert!((Pose2::new(0.0, 0.0, 7.0).yaw - (7.0 - TAU)).abs() < 1e-12);
    }

    #[test]
    fn composition_has_inverses() {
        let (a, b) = (Pose2::new(1.0, -2.0, 2.5), Pose2::new(-0.3, 4.0, -1.9));
        for (got, want) in [
            (a.compose(a.inverse()), Pose2::default()),
            (a.inverse().compose(a), Pose2::default()),
            (a.compose(a.relative(b)), b),
        ] {
            assert!(got.distance(want) < 1e-12 && wrap_angle(got.yaw - want.yaw).abs() < 1e-12, "{got:?}");
        }
        // By hand: a quarter turn to the left puts "ahead" to the map's y.
        let turned = Pose2::new(1.0, 2.0, PI / 2.0).compose(Pose2::new(3.0, 1.0, PI));
        assert!((turned.x - 0.0).abs() < 1e-12 && (turned.y - 5.0).abs() < 1e-12, "{turned:?}");
        assert!((turned.yaw + PI / 2.0).abs() < 1e-12);
        assert!((Pose2::new(1.0, 1.0, 0.3).bearing_to(1.0, 4.0) - PI / 2.0).abs() < 1e-12);
    }
}
