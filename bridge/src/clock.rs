//! The only place of the crate that reads clocks. Everything else is given its time.

use crate::time::{TimeDelta, Timestamp};
use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Wall-clock time of the machine (Unix epoch). It may jump; use [`monotonic`] for deadlines.
#[must_use]
pub fn now() -> Timestamp {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(d) => Timestamp::ZERO + TimeDelta::from(d),
        Err(e) => Timestamp::ZERO - TimeDelta::from(e.duration()),
    }
}

/// Time since the first call in this process; never goes backwards. For deadlines and rates.
#[must_use]
pub fn monotonic() -> TimeDelta {
    static START: OnceLock<Instant> = OnceLock::new();
    TimeDelta::from(START.get_or_init(Instant::now).elapsed())
}

/// Watches the wall clock against the monotonic one and reports jumps (NTP steps, a suspended machine,
/// a restarted simulation).
///
/// A pure core: the caller passes both readings, so jumps can be tested without waiting for one.
#[derive(Debug, Clone, Default)]
pub struct ClockWatch {
    last: Option<(Timestamp, TimeDelta)>,
    tolerance: TimeDelta,
}

impl ClockWatch {
    /// A watch that reports steps larger than `tolerance`.
    #[must_use]
    pub fn new(tolerance: TimeDelta) -> Self {
        Self { last: None, tolerance: tolerance.abs() }
    }

    /// Takes a pair of readings; returns the step of the wall clock (positive: forwards) since the last
    /// call when it is larger than the tolerance.
    pub fn observe(&mut self, wall: Timestamp, monotonic: TimeDelta) -> Option<TimeDelta> {
        let step = self
            .last
            .map(|(last_wall, last_mono)| (wall - last_wall) - (monotonic - last_mono))
            .filter(|step| step.abs() > self.tolerance);
        self.last = Some((wall, monotonic));
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_are_told_once() {
        let mut watch = ClockWatch::new(TimeDelta::from_millis(100));
        let ms = TimeDelta::from_millis;
        let t0 = Timestamp(1_764_000_000_000_000_000);
        let cases = [
            (t0, ms(0), None),
            (t0 + ms(50), ms(50), None),
            (t0 + ms(90), ms(150), None), // slewed by 60 ms: tolerated
            (t0 + ms(3_700_190), ms(250), Some(ms(3_700_000))),
            (t0 + ms(3_700_290), ms(350), None),
            (t0 + ms(390), ms(450), Some(ms(-3_700_000))),
        ];
        for (i, (wall, mono, want)) in cases.into_iter().enumerate() {
            assert_eq!(watch.observe(wall, mono), want, "step {i}");
        }
    }

    #[test]
    fn monotonic_does_not_go_back() {
        let a = monotonic();
        assert!(monotonic() >= a);
        assert!(now() > Timestamp(1_700_000_000_000_000_000));
    }
}
