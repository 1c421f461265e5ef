//! Meaning of messages: numbers that decode but cannot be right are flagged, with topic, stamp and field.

use super::*;
use crate::time::{TimeDelta, Timestamp};

/// Something wrong in a message that decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Flag {
    /// Where it came from.
    pub topic: String,
    /// The message's own stamp; zero where it has none.
    pub stamp: Timestamp,
    /// Path of the field.
    pub field: String,
    /// What is wrong.
    pub problem: Problem,
}

impl std::fmt::Display for Flag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {} ns: {} {}", self.topic, self.stamp.0, self.field, self.problem)
    }
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// NaN or infinite.
    #[error("is not finite")]
    NotFinite,
    /// No rotation.
    #[error("has norm {0}, wanted 1")]
    QuaternionNorm(f64),
    /// A nanosecond part of a second or more, or a negative second.
    #[error("is no time")]
    BrokenStamp,
    /// Long before now.
    #[error("is {0:.1} s in the past")]
    PastStamp(f64),
    /// After now.
    #[error("is {0:.1} s in the future")]
    FutureStamp(f64),
    /// K\[0\] = 0 (REP-104).
    #[error("is 0: the camera is uncalibrated")]
    Uncalibrated,
    /// A negative variance.
    #[error("is a negative variance")]
    NegativeVariance,
    /// A picture whose data do not fit its size.
    #[error("does not fit width, height and step")]
    ImageSize,
}

/// What stamps may be, for [`flags`].
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The clock that stamps are held against; `None` leaves past and future unchecked (simulated time).
    pub now: Option<Timestamp>,
    /// How far before now a stamp may be.
    pub max_past: TimeDelta,
    /// How far after now a stamp may be.
    pub max_future: TimeDelta,
}

impl Default for Limits {
    /// No clock; one hour back, ten seconds ahead.
    fn default() -> Self {
        Self {
            now: None,
            max_past: TimeDelta::from_millis(3_600_000),
            max_future: TimeDelta::from_millis(10_000),
        }
    }
}

/// Collects flags of one message.
#[derive(Debug)]
pub struct Checker<'a> {
    limits: &'a Limits,
    path: Vec<&'static str>,
    found: Vec<(String, Problem)>,
}

const MAX_FLAGS: usize = 16;

impl Checker<'_> {
    fn flag(&mut self, field: &str, problem: Problem) {
        if self.found.len() < MAX_FLAGS {
            let mut path = self.path.join(".");
            if !path.is_empty() && !field.is_empty() {
                path.push('.');
            }
            self.found.push((path + field, problem));
        }
    }

    fn within(&mut self, field: &'static str, f: impl FnOnce(&mut Self)) {
        self.path.push(field);
        f(self);
        self.path.pop();
    }

    fn finite<const N: usize>(&mut self, fields: [(&str, f64); N]) {
        for (name, v) in fields {
            if !v.is_finite() {
                self.flag(name, Problem::NotFinite);
            }
        }
    }

    fn stamp(&mut self, stamp: &Time) {
        if stamp.nanosec >= 1_000_000_000 || stamp.sec < 0 {
            return self.flag("stamp", Problem::BrokenStamp);
        }
        let t = stamp.timestamp();
        let Some(now) = self.limits.now.filter(|_| t != Timestamp::ZERO) else {
            return;
        };
        let ahead = t - now;
        if ahead > self.limits.max_future {
            self.flag("stamp", Problem::FutureStamp(ahead.as_secs_f64()));
        } else if -ahead > self.limits.max_past {
            self.flag("stamp", Problem::PastStamp(-ahead.as_secs_f64()));
        }
    }

    fn covariance(&mut self, c: &Cov36) {
        if c.0.iter().any(|v| !v.is_finite()) {
            self.flag("covariance", Problem::NotFinite);
        } else if (0..6).any(|i| c.0[i * 7] < 0.0) {
            self.flag("covariance", Problem::NegativeVariance);
        }
    }
}

/// A message whose meaning can be checked.
pub trait Validate {
    /// The message's stamp; zero where it has none.
    fn stamp(&self) -> Timestamp;
    /// Looks at every field.
    fn check(&self, c: &mut Checker<'_>);
}

/// Everything that is wrong with a message; at most 16 flags.
#[must_use]
pub fn flags<T: Validate + ?Sized>(topic: &str, message: &T, limits: &Limits) -> Vec<Flag> {
    let mut c = Checker { limits, path: Vec::new(), found: Vec::new() };
    message.check(&mut c);
    let stamp = message.stamp();
    c.found
        .into_iter()
        .map(|(field, problem)| Flag { topic: topic.to_owned(), stamp, field, problem })
        .collect()
}

/// Parts that have no stamp of their own.
trait Part {
    fn look(&self, c: &mut Checker<'_>);
}

impl Part for Header {
    fn look(&self, c: &mut Checker<'_>) {
        c.within("header", |c| c.stamp(&self.stamp));
    }
}

impl Part for HeaderView<'_> {
    fn look(&self, c: &mut Checker<'_>) {
        c.within("header", |c| c.stamp(&self.stamp));
    }
}

impl Part for Quaternion {
    fn look(&self, c: &mut Checker<'_>) {
        let norm = (self.x * self.x + self.y * self.y + self.z * self.z + self.w * self.w).sqrt();
        if !norm.is_finite() {
            c.flag("", Problem::NotFinite);
        } else if (norm - 1.0).abs() > 0.01 {
            c.flag("", Problem::QuaternionNorm(norm));
        }
    }
}

impl Part for Pose {
    fn look(&self, c: &mut Checker<'_>) {
        c.within("pose", |c| {
            c.within("position", |c| {
                let p = &self.position;
                c.finite([("x", p.x), ("y", p.y), ("z", p.z)]);
            });
            c.within("orientation", |c| self.orientation.look(c));
        });
    }
}

impl Part for Twist {
    fn look(&self, c: &mut Checker<'_>) {
        c.within("twist", |c| {
            for (name, v) in [("linear", &self.linear), ("angular", &self.angular)] {
                c.within(name, |c| c.finite([("x", v.x), ("y", v.y), ("z", v.z)]));
            }
        });
    }
}

macro_rules! validate {
    ($($ty:ty: |$m:ident, $c:ident| $body:block)*) => {$(
        impl Validate for $ty {
            fn stamp(&self) -> Timestamp {
                self.header.stamp.timestamp()
            }
            fn check(&self, $c: &mut Checker<'_>) {
                let $m = self;
                $m.header.look($c);
                $body
            }
        }
    )*};
}

validate! {
    PoseStamped: |m, c| { m.pose.look(c); }
    PoseWithCovarianceStamped: |m, c| {
        c.within("pose", |c| { m.pose.pose.look(c); c.covariance(&m.pose.covariance); });
    }
    Odometry: |m, c| {
        c.within("pose", |c| { m.pose.pose.look(c); c.covariance(&m.pose.covariance); });
        c.within("twist", |c| { m.twist.twist.look(c); });
    }
    Path: |m, c| { c.within("poses", |c| for p in &m.poses { p.pose.look(c); }); }
    TransformStamped: |m, c| {
        c.within("transform", |c| {
            let t = &m.transform.translation;
            c.within("translation", |c| c.finite([("x", t.x), ("y", t.y), ("z", t.z)]));
            c.within("rotation", |c| m.transform.rotation.look(c));
        });
    }
    CameraInfo: |m, c| {
        if m.k[0] == 0.0 { c.flag("k[0]", Problem::Uncalibrated); }
        if m.k.iter().any(|v| !v.is_finite()) { c.flag("k", Problem::NotFinite); }
        if m.d.iter().any(|v| !v.is_finite()) { c.flag("d", Problem::NotFinite); }
    }
    ImageView<'_>: |m, c| {
        if u64::from(m.step) * u64::from(m.height) > m.data.len() as u64 || m.width == 0 || m.height == 0 {
            c.flag("data", Problem::ImageSize);
        }
    }
    CompressedImageView<'_>: |m, c| { if m.data.is_empty() { c.flag("data", Problem::ImageSize); } }
}

impl Validate for TFMessage {
    fn stamp(&self) -> Timestamp {
        self.transforms.first().map_or(Timestamp::ZERO, |t| t.header.stamp.timestamp())
    }
    fn check(&self, c: &mut Checker<'_>) {
        c.within("transforms", |c| {
            for t in &self.transforms {
                t.check(c);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Validate>(what: &str, message: &T, limits: &Limits, want: &[&str]) {
        let got: Vec<String> = flags("/t", message, limits).iter().map(ToString::to_string).collect();
        assert_eq!(got, want, "{what}");
    }

    #[test]
    fn meaning() {
        let now = Timestamp(1_764_000_000_000_000_000);
        let limits = Limits { now: Some(now), ..Limits::default() };
        let none = Limits::default();
        let at = |t: Timestamp| PoseStamped { header: Header::new(t, "map"), ..Default::default() };
        check("good", &at(now), &limits, &[]);
        check("zero stamp", &at(Timestamp::ZERO), &limits, &[]);
        check("simulated", &at(Timestamp(5)), &none, &[]);
        check(
            "past",
            &at(Timestamp(1_000_000_000)),
            &limits,
            &["/t at 1000000000 ns: header.stamp is 1763999999.0 s in the past"],
        );
        check(
            "future",
            &at(now + TimeDelta::from_millis(60_000)),
            &limits,
            &["/t at 1764000060000000000 ns: header.stamp is 60.0 s in the future"],
        );
        let mut m = at(Timestamp(1));
        m.header.stamp.nanosec = 2_000_000_000;
        check("nanosec", &m, &none, &["/t at 2000000000 ns: header.stamp is no time"]);
        let mut m = at(Timestamp(1));
        m.pose.orientation.w = 0.0;
        check("norm", &m, &none, &["/t at 1 ns: pose.orientation has norm 0, wanted 1"]);
        m.pose.orientation.w = f64::NAN;
        m.pose.position.y = f64::INFINITY;
        check(
            "nan",
            &m,
            &none,
            &["/t at 1 ns: pose.position.y is not finite", "/t at 1 ns: pose.orientation is not finite"],
        );
        check(
            "camera",
            &CameraInfo::default(),
            &none,
            &["/t at 0 ns: k[0] is 0: the camera is uncalibrated"],
        );
        let mut o = Odometry::default();
        o.pose.covariance.0[7] = -1.0;
        o.twist.twist.angular.z = f64::NAN;
        check(
            "odometry",
            &o,
            &none,
            &[
                "/t at 0 ns: pose.covariance is a negative variance",
                "/t at 0 ns: twist.twist.angular.z is not finite",
            ],
        );
        let image = ImageView { width: 4, height: 4, step: 12, data: &[0; 47], ..Default::default() };
        check("image", &image, &none, &["/t at 0 ns: data does not fit width, height and step"]);
        let path = Path { poses: vec![m; 100], ..Default::default() };
        assert_eq!(flags("/t", &path, &none).len(), 16);
    }
}
