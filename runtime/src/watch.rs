//! Whether what the senses say can be true: a camera that is frozen, odometry that contradicts the pictures.

use crate::image::RgbImage;
use crate::planar::{Pose2, wrap_angle};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use std::fmt;
use xxhash_rust::xxh3::xxh3_64;

/// Why the camera's pictures do not count, though they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CameraFault {
    /// Not one pixel has changed for longer than this.
    FrozenPixels {
        /// The limit of the configuration.
        limit: TimeDelta,
    },
    /// No stamp was later than the ones before for longer than this.
    FrozenStamps {
        /// The limit of the configuration.
        limit: TimeDelta,
    },
}

impl fmt::Display for CameraFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FrozenPixels { limit } => write!(
                f,
                "the camera is frozen: not one pixel has changed for more than {:.1} s; restart its driver (for a \
                 simulated camera without noise set context.frozen_after_ms = 0)",
                limit.as_secs_f64()
            ),
            Self::FrozenStamps { limit } => write!(
                f,
                "the camera is frozen: its stamps have not advanced for more than {:.1} s; restart its driver",
                limit.as_secs_f64()
            ),
        }
    }
}

/// How odometry and pictures contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MotionFault {
    /// The pictures change as a whole, odometry does not.
    OdometryStands,
    /// Odometry moves, the pictures do not change.
    PicturesStand,
}

impl fmt::Display for MotionFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OdometryStands => {
                "odometry stands still while the pictures turn: it may be dead, or of another robot"
            }
            Self::PicturesStand => {
                "odometry moves while the pictures stand still: the wheels may slip, or the camera may be frozen or covered"
            }
        })
    }
}

/// Watches the frames of a camera for signs that it is frozen.
#[derive(Clone, Debug)]
pub struct CameraWatch {
    /// Zero: never frozen.
    limit: TimeDelta,
    /// Digest of the newest pixels, and the time of the first frame that had them.
    pixels: Option<(u64, Timestamp)>,
    pixels_frozen: bool,
    /// When the last frame came whose stamp was later than those before.
    advanced_at: Option<Timestamp>,
    stamps_frozen: bool,
}

impl CameraWatch {
    /// A watch that calls a camera frozen after `limit`; zero switches it off.
    pub fn new(limit: TimeDelta) -> Self {
        Self { limit, pixels: None, pixels_frozen: false, advanced_at: None, stamps_frozen: false }
    }

    /// A frame came; `advances` when its stamp continues the stream or begins a new one.
    pub fn frame(&mut self, received_at: Timestamp, advances: bool) {
        if advances {
            self.advanced_at = Some(received_at);
        }
        let since = self.advanced_at.map_or(TimeDelta::ZERO, |at| received_at - at);
        self.stamps_frozen = self.limit > TimeDelta::ZERO && since > self.limit;
    }

    /// The pixels of a decoded frame.
    pub fn pixels(&mut self, captured_at: Timestamp, pixels: &[u8]) {
        if self.limit <= TimeDelta::ZERO {
            return;
        }
        let digest = xxh3_64(pixels);
        match self.pixels {
            Some((same, since)) if same == digest && since <= captured_at => {
                self.pixels_frozen = captured_at - since > self.limit;
            }
            _ => {
                self.pixels = Some((digest, captured_at));
                self.pixels_frozen = false;
            }
        }
    }

    /// Why the newest frame does not count, if it does not.
    pub fn fault(&self) -> Option<CameraFault> {
        let limit = self.limit;
        match (self.stamps_frozen, self.pixels_frozen) {
            (true, _) => Some(CameraFault::FrozenStamps { limit }),
            (false, true) => Some(CameraFault::FrozenPixels { limit }),
            (false, false) => None,
        }
    }
}

/// Time between the two frames that are compared.
const STRETCH: TimeDelta = TimeDelta::from_millis(1000);
/// So many comparisons in a row must say the same.
const STRETCHES: u32 = 3;
/// A pixel has changed when one of its values did by more than this.
const PIXEL_CHANGE: u8 = 20;

/// Compares how odometry moves with how the pictures change.
///
/// A hint, not a proof: a scene that moves as a whole looks like a turning camera, and a blank wall like a frozen one.
#[derive(Clone, Debug, Default)]
pub struct MotionWatch {
    anchor: Option<(Timestamp, Option<Pose2>)>,
    picture: Option<RgbImage>,
    suspected: Option<MotionFault>,
    times: u32,
}

impl MotionWatch {
    /// A kept frame at the model's size, with the base's pose at its stamp.
    pub fn frame(&mut self, captured_at: Timestamp, pose: Option<Pose2>, picture: &RgbImage) {
        let (Some((since, before)), Some(earlier)) = (self.anchor, &mut self.picture) else {
            self.anchor = Some((captured_at, pose));
            self.picture = Some(picture.clone());
            return;
        };
        let passed = captured_at - since;
        if passed >= TimeDelta::ZERO && passed < STRETCH {
            return;
        }
        let changed = changed_share(earlier, picture);
        earlier.copy_from(picture);
        self.anchor = Some((captured_at, pose));
        // Frames far apart, or on both sides of a jump, say nothing.
        let (Some(before), Some(pose), Some(changed)) = (before, pose, changed) else { return };
        if passed < TimeDelta::ZERO || passed > TimeDelta(STRETCH.0 * 3) {
            return;
        }
        let turned = wrap_angle(pose.yaw - before.yaw).abs().to_degrees();
        let moved = before.distance(pose);
        let stands = moved < 0.01 && turned < 1.0;
        let moves = moved > 0.1 || turned > 10.0;
        let now = match (changed > 0.5, changed < 0.02) {
            (true, _) if stands => Some(MotionFault::OdometryStands),
            (_, true) if moves => Some(MotionFault::PicturesStand),
            (true, _) if moves => None,
            (_, true) if stands => None,
            _ => return,
        };
        self.times = if now == self.suspected { self.times + 1 } else { 1 };
        self.suspected = now;
    }

    /// The contradiction, once it has lasted.
    pub fn fault(&self) -> Option<MotionFault> {
        self.suspected.filter(|_| self.times >= STRETCHES)
    }
}

/// Share of pixels that differ clearly between two pictures of one size, 0..1; `None` when the sizes differ.
fn changed_share(a: &RgbImage, b: &RgbImage) -> Option<f64> {
    if (a.width, a.height) != (b.width, b.height) || a.data.is_empty() {
        return None;
    }
    let pixels = a.data.chunks_exact(3).zip(b.data.chunks_exact(3));
    let changed =
        pixels.filter(|(p, q)| p.iter().zip(*q).any(|(x, y)| x.abs_diff(*y) > PIXEL_CHANGE)).count();
    Some(changed as f64 * 3.0 / a.data.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp(1_700_000_000_000_000_000) + TimeDelta::from_millis(millis)
    }

    #[test]
    fn pixels_that_never_change_are_frozen_after_the_limit() {
        let limit = TimeDelta::from_millis(2000);
        let mut watch = CameraWatch::new(limit);
        for i in 0..=20 {
            watch.pixels(at(100 * i), &[1, 2, 3]);
            assert_eq!(watch.fault(), None, "{i}");
        }
        watch.pixels(at(2100), &[1, 2, 3]);
        assert_eq!(watch.fault(), Some(CameraFault::FrozenPixels { limit }));
        watch.pixels(at(2200), &[1, 2, 4]);
        assert_eq!(watch.fault(), None, "one bit of noise is life");
        let mut off = CameraWatch::new(TimeDelta::ZERO);
        off.pixels(at(0), &[1]);
        off.pixels(at(60_000), &[1]);
        off.frame(at(0), true);
        off.frame(at(60_000), false);
        assert_eq!(off.fault(), None);
    }

    #[test]
    fn stamps_that_do_not_advance_are_frozen() {
        let limit = TimeDelta::from_millis(2000);
        let mut watch = CameraWatch::new(limit);
        watch.frame(at(0), true);
        for i in 1..=20 {
            watch.frame(at(100 * i), false);
            assert_eq!(watch.fault(), None, "{i}");
        }
        watch.frame(at(2100), false);
        assert_eq!(watch.fault(), Some(CameraFault::FrozenStamps { limit }));
        watch.frame(at(2200), true);
        assert_eq!(watch.fault(), None);
    }

    #[test]
    fn odometry_and_pictures_are_held_against_each_other() {
        // turn of odometry and change of the pictures by second -> what is said after six seconds
        let check = |what: &str, turn: f64, change: u8, want: Option<MotionFault>| {
            let mut watch = MotionWatch::default();
            for i in 0..=60 {
                let pose = Pose2::new(1.0, 2.0, turn * i as f64 / 10.0);
                let picture = RgbImage::filled(8, 6, [change.wrapping_mul((i / 10) as u8), 100, 100]);
                watch.frame(at(100 * i), Some(pose), &picture);
            }
            assert_eq!(watch.fault(), want, "{what}");
        };
        check("turns", 0.5, 40, None);
        check("stands", 0.0, 0, None);
        check("dead odometry", 0.0, 40, Some(MotionFault::OdometryStands));
        check("slipping wheels", 0.5, 0, Some(MotionFault::PicturesStand));
        check("a little noise", 0.5, 3, Some(MotionFault::PicturesStand));
    }

    #[test]
    fn half_a_picture_or_half_a_second_prove_nothing() {
        let mut watch = MotionWatch::default();
        for i in 0..=60u8 {
            let mut picture = RgbImage::filled(8, 6, [0; 3]);
            // Someone walks through a third of the picture.
            picture.data[..8 * 6].fill(i * 4);
            watch.frame(at(100 * i64::from(i)), Some(Pose2::default()), &picture);
        }
        assert_eq!(watch.fault(), None);
        for i in 0..3i64 {
            let picture = RgbImage::filled(8, 6, [50 * i as u8; 3]);
            watch.frame(at(10_000 + 1000 * i), Some(Pose2::default()), &picture);
        }
        assert_eq!(watch.fault(), None, "two seconds");
        // Without odometry there is nothing to compare.
        for i in 0..20i64 {
            watch.frame(at(20_000 + 1000 * i), None, &RgbImage::filled(8, 6, [50 * i as u8; 3]));
        }
        assert_eq!(watch.fault(), None);
    }
}
