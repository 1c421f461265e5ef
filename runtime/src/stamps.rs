//! One clock for camera and odometry.
//!
//! Stamps are compared with each other: a frame's pose is the odometry of its time. Some drivers leave the stamp at 0,
//! others count from the start of the machine while odometry has Unix time. Such stamps are replaced by the time at
//! which the message was received (in a bag: logged), told in the clock of odometry.

use mindseye_bridge::time::{TimeDelta, Timestamp};
use std::fmt;

/// Clocks that are further apart than this, by their stamps and by when these came, are different clocks.
const APART: TimeDelta = TimeDelta::from_millis(10_000);
/// So many frames in a row must say so before a clock that was trusted is given up, and the other way about.
const FRAMES_TO_CHANGE: u32 = 10;

/// Why a stamp was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StampFault {
    /// The camera's is 0 or negative.
    CameraUnstamped,
    /// The camera's is of another clock than odometry's.
    CameraClock {
        /// How far apart they were when it was noticed; positive: the camera's is ahead.
        apart: TimeDelta,
    },
    /// Odometry's is 0 or negative.
    OdometryUnstamped,
}

impl fmt::Display for StampFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CameraUnstamped => write!(f, "camera frames carry no stamp")?,
            Self::CameraClock { apart } => {
                write!(f, "stamps of the camera are {:.0} s from those of odometry", apart.as_secs_f64())?;
            }
            Self::OdometryUnstamped => write!(f, "odometry carries no stamp")?,
        }
        write!(f, "; the time of reception is used instead")
    }
}

/// A message's stamp, as sent and as received.
#[derive(Clone, Copy, Debug)]
struct Pair {
    stamp: Timestamp,
    received_at: Timestamp,
}

/// Finds the time of every message.
#[derive(Clone, Debug, Default)]
pub struct Stamps {
    /// The newest stamps that were used as they were.
    camera: Option<Pair>,
    odometry: Option<Pair>,
    /// The camera's clock is not odometry's.
    foreign: bool,
    /// The two were compared before.
    compared: bool,
    /// Frames in a row that speak against `foreign`.
    against: u32,
}

impl Stamps {
    /// The time of an odometry message.
    pub fn odometry(&mut self, stamp: Timestamp, received_at: Timestamp) -> (Timestamp, Option<StampFault>) {
        if stamp <= Timestamp::ZERO {
            return (in_clock_of(self.camera, received_at), Some(StampFault::OdometryUnstamped));
        }
        self.odometry = Some(Pair { stamp, received_at });
        (stamp, None)
    }

    /// The time of a camera frame.
    pub fn camera(&mut self, stamp: Timestamp, received_at: Timestamp) -> (Timestamp, Option<StampFault>) {
        if stamp <= Timestamp::ZERO {
            return (in_clock_of(self.odometry, received_at), Some(StampFault::CameraUnstamped));
        }
        let mut apart = TimeDelta::ZERO;
        if let Some(odometry) = self.odometry {
            apart = stamp - odometry.stamp;
            let drift = apart - (received_at - odometry.received_at);
            let foreign = apart.abs() > APART && drift.abs() > APART;
            self.against = if foreign == self.foreign { 0 } else { self.against + 1 };
            if self.against >= if self.compared { FRAMES_TO_CHANGE } else { 1 } {
                self.foreign = foreign;
                self.against = 0;
            }
            self.compared = true;
        }
        if self.foreign {
            return (in_clock_of(self.odometry, received_at), Some(StampFault::CameraClock { apart }));
        }
        self.camera = Some(Pair { stamp, received_at });
        (stamp, None)
    }
}

/// A time of reception in the clock of another stream; as it is where there is none.
fn in_clock_of(stream: Option<Pair>, received_at: Timestamp) -> Timestamp {
    match stream {
        Some(pair) => pair.stamp + (received_at - pair.received_at),
        None => received_at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unix time, milliseconds after some moment.
    fn unix(millis: i64) -> Timestamp {
        Timestamp(1_700_000_000_000_000_000) + TimeDelta::from_millis(millis)
    }

    fn secs(secs: f64) -> Timestamp {
        Timestamp::from_secs_f64(secs)
    }

    #[test]
    fn good_stamps_are_used_as_they_are() {
        // Real time, simulated time, and an old bag played today; the camera is 80 ms late.
        for (base, rate) in [(unix(0), 1), (secs(100.0), 4), (secs(1.0e9), 1)] {
            let mut stamps = Stamps::default();
            for i in 0..100 {
                let at = base + TimeDelta::from_millis(100 * i);
                let received = unix(100 * i / rate);
                assert_eq!(stamps.odometry(at, received), (at, None));
                let late = received + TimeDelta::from_millis(80);
                assert_eq!(stamps.camera(at, late), (at, None));
            }
        }
    }

    #[test]
    fn unstamped_frames_get_the_time_of_reception() {
        let mut stamps = Stamps::default();
        let none = Some(StampFault::CameraUnstamped);
        assert_eq!(stamps.camera(Timestamp::ZERO, unix(5)), (unix(5), none), "no odometry yet");
        stamps.odometry(unix(990), unix(1000));
        assert_eq!(stamps.camera(Timestamp::ZERO, unix(1050)), (unix(1040), none));
        // On simulated time, in odometry's clock.
        stamps.odometry(secs(100.0), unix(2000));
        assert_eq!(stamps.camera(Timestamp::ZERO, unix(2500)), (secs(100.5), none));
        // Odometry without stamps follows the camera's clock.
        let mut stamps = Stamps::default();
        stamps.camera(secs(7.0), unix(0));
        assert_eq!(
            stamps.odometry(Timestamp::ZERO, unix(30)),
            (secs(7.03), Some(StampFault::OdometryUnstamped))
        );
    }

    #[test]
    fn stamps_since_boot_beside_unix_time() {
        let mut stamps = Stamps::default();
        // Before odometry nothing is known.
        assert_eq!(stamps.camera(secs(50.0), unix(0)).0, secs(50.0));
        for i in 1..50 {
            stamps.odometry(unix(100 * i), unix(100 * i + 3));
            let (at, fault) = stamps.camera(secs(50.0 + 0.1 * i as f64), unix(100 * i + 20));
            assert_eq!(at, unix(100 * i + 17), "frame {i}");
            assert!(matches!(fault, Some(StampFault::CameraClock { .. })), "{fault:?}");
        }
        assert!(
            StampFault::CameraClock { apart: TimeDelta::from_millis(-25_000) }
                .to_string()
                .starts_with("stamps of the camera are -25 s from those of odometry; ")
        );
    }

    #[test]
    fn a_restarted_simulation_is_no_foreign_clock() {
        let mut stamps = Stamps::default();
        stamps.odometry(secs(100.0), unix(0));
        stamps.camera(secs(100.0), unix(1));
        // The camera restarts a little before odometry.
        for i in 0..5 {
            assert_eq!(stamps.camera(secs(0.1 * i as f64 + 0.1), unix(100 * i)).1, None);
        }
        for i in 5..60 {
            stamps.odometry(secs(0.1 * i as f64), unix(100 * i));
            assert_eq!(stamps.camera(secs(0.1 * i as f64), unix(100 * i)).1, None);
        }
    }
}
