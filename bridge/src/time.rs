//! Instants and spans of time. [`Timestamp`] and [`TimeDelta`] are different types, so that a point in
//! time is never added to another one by mistake. Nothing here reads a clock; see [`crate::clock`].

use serde::{Deserialize, Serialize};
use std::ops::{Add, Neg, Sub};

/// Nanoseconds per second.
pub const NANOS_PER_SEC: i64 = 1_000_000_000;

/// A point in time: signed nanoseconds since the Unix epoch (in simulation: since the start of the
/// simulated clock).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

/// A signed span of time in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimeDelta(pub i64);

impl Timestamp {
    /// The epoch; in a ROS header it means "no stamp" or "the latest".
    pub const ZERO: Self = Self(0);

    /// From seconds and nanoseconds as a ROS `builtin_interfaces/msg/Time` carries them. Saturates.
    #[must_use]
    pub fn from_ros(sec: i32, nanosec: u32) -> Self {
        Self(i64::from(sec) * NANOS_PER_SEC + i64::from(nanosec))
    }

    /// From seconds since the epoch; NaN gives zero, values out of range saturate.
    #[must_use]
    pub fn from_secs_f64(secs: f64) -> Self {
        Self((secs * NANOS_PER_SEC as f64).round() as i64)
    }

    /// Nanoseconds since the epoch.
    #[must_use]
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// Seconds since the epoch, rounded to what an `f64` holds (about 0.2 us today).
    #[must_use]
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / NANOS_PER_SEC as f64
    }

    /// The ROS pair `(sec, nanosec)`. Instants outside the range of an `i32` of seconds saturate.
    #[must_use]
    pub fn to_ros(self) -> (i32, u32) {
        let sec = self.0.div_euclid(NANOS_PER_SEC);
        let nanos = self.0.rem_euclid(NANOS_PER_SEC) as u32;
        if sec > i64::from(i32::MAX) {
            (i32::MAX, 999_999_999)
        } else if sec < i64::from(i32::MIN) {
            (i32::MIN, 0)
        } else {
            (sec as i32, nanos)
        }
    }

    /// Time passed since `earlier`; negative when `earlier` is later. Saturates.
    #[must_use]
    pub const fn since(self, earlier: Self) -> TimeDelta {
        TimeDelta(self.0.saturating_sub(earlier.0))
    }
}

impl TimeDelta {
    /// No time at all.
    pub const ZERO: Self = Self(0);
    /// The longest span.
    pub const MAX: Self = Self(i64::MAX);

    /// From whole milliseconds. Saturates.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// From seconds; NaN gives zero, values out of range saturate.
    #[must_use]
    pub fn from_secs_f64(secs: f64) -> Self {
        Self((secs * NANOS_PER_SEC as f64).round() as i64)
    }

    /// Nanoseconds.
    #[must_use]
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// Seconds.
    #[must_use]
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / NANOS_PER_SEC as f64
    }

    /// Milliseconds.
    #[must_use]
    pub fn as_millis_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// The span without its sign.
    #[must_use]
    pub const fn abs(self) -> Self {
        Self(self.0.saturating_abs())
    }

    /// As the standard library's unsigned duration; negative spans give zero.
    #[must_use]
    pub fn to_std(self) -> std::time::Duration {
        std::time::Duration::from_nanos(self.0.max(0) as u64)
    }
}

impl From<std::time::Duration> for TimeDelta {
    fn from(d: std::time::Duration) -> Self {
        Self(i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
    }
}

impl Add<TimeDelta> for Timestamp {
    type Output = Self;
    fn add(self, rhs: TimeDelta) -> Self {
        Self(self.0.saturating_add(rhs.0))
    }
}

impl Sub<TimeDelta> for Timestamp {
    type Output = Self;
    fn sub(self, rhs: TimeDelta) -> Self {
        Self(self.0.saturating_sub(rhs.0))
    }
}

impl Sub for Timestamp {
    type Output = TimeDelta;
    fn sub(self, rhs: Self) -> TimeDelta {
        self.since(rhs)
    }
}

impl Add for TimeDelta {
    type Output = Self;
    fn add(self, rhs: Self) -> Self {
        Self(self.0.saturating_add(rhs.0))
    }
}

impl Sub for TimeDelta {
    type Output = Self;
    fn sub(self, rhs: Self) -> Self {
        Self(self.0.saturating_sub(rhs.0))
    }
}

impl Neg for TimeDelta {
    type Output = Self;
    fn neg(self) -> Self {
        Self(self.0.saturating_neg())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ros_pairs() {
        let check = |nanos: i64, pair: (i32, u32)| {
            assert_eq!(Timestamp(nanos).to_ros(), pair, "{nanos}");
            assert_eq!(Timestamp::from_ros(pair.0, pair.1), Timestamp(nanos), "{nanos}");
        };
        check(0, (0, 0));
        check(1, (0, 1));
        check(-1, (-1, 999_999_999));
        check(1_764_000_000_123_456_789, (1_764_000_000, 123_456_789));
        assert_eq!(Timestamp(i64::MAX).to_ros(), (i32::MAX, 999_999_999));
        assert_eq!(Timestamp(i64::MIN).to_ros(), (i32::MIN, 0));
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Timestamp(i64::MAX) + TimeDelta(1), Timestamp(i64::MAX));
        assert_eq!(Timestamp(i64::MIN) - TimeDelta(1), Timestamp(i64::MIN));
        assert_eq!(Timestamp(5) - Timestamp(7), TimeDelta(-2));
        assert_eq!(TimeDelta::from_millis(i64::MAX), TimeDelta::MAX);
        assert_eq!(TimeDelta::from_secs_f64(f64::NAN), TimeDelta::ZERO);
        assert_eq!(TimeDelta(-3).to_std(), std::time::Duration::ZERO);
    }
}
