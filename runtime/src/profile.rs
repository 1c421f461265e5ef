//! How long the stages take, as the robot feels it: median, 99th percentile and maximum.

use serde::Serialize;
use std::collections::BTreeMap;

/// Durations of one stage: a fixed window of the newest, and the maximum of all.
#[derive(Clone, Debug)]
pub struct Durations {
    window: Vec<f64>,
    next: usize,
    count: u64,
    max: f64,
}

/// Durations kept per stage.
pub const WINDOW: usize = 4096;

impl Default for Durations {
    fn default() -> Self {
        Self { window: Vec::new(), next: 0, count: 0, max: 0.0 }
    }
}

impl Durations {
    /// Adds one duration in milliseconds.
    pub fn push(&mut self, millis: f64) {
        if self.window.len() < WINDOW {
            // All at once, so that a stage that runs for long does not allocate now and then.
            self.window.reserve_exact(WINDOW - self.window.len());
            self.window.push(millis);
        } else {
            self.window[self.next] = millis;
            self.next = (self.next + 1) % WINDOW;
        }
        self.count += 1;
        self.max = self.max.max(millis);
    }

    /// Figures over the window; `None` when nothing was measured.
    pub fn summary(&self) -> Option<StageSummary> {
        let mut sorted = self.window.clone();
        sorted.sort_by(f64::total_cmp);
        // Nearest rank: the smallest value that at least this share does not exceed.
        let rank = |share: f64| {
            let at = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(at.clamp(1, sorted.len().max(1)) - 1).copied()
        };
        Some(StageSummary { count: self.count, p50: rank(0.5)?, p99: rank(0.99)?, max: self.max })
    }
}

/// Figures of one stage, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StageSummary {
    /// Times that the stage ran.
    pub count: u64,
    /// Median of the newest [`WINDOW`].
    pub p50: f64,
    /// 99th percentile of the newest [`WINDOW`].
    pub p99: f64,
    /// Largest of all.
    pub max: f64,
}

/// Durations by stage.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    stages: BTreeMap<String, Durations>,
}

impl Profile {
    /// Adds one duration in milliseconds to a stage.
    pub fn push(&mut self, stage: &str, millis: f64) {
        match self.stages.get_mut(stage) {
            Some(durations) => durations.push(millis),
            None => self.stages.entry(stage.to_owned()).or_default().push(millis),
        }
    }

    /// Takes over the stages of another profile that this one lacks.
    pub fn absorb(&mut self, other: &Profile) {
        for (name, durations) in &other.stages {
            self.stages.entry(name.clone()).or_insert_with(|| durations.clone());
        }
    }

    /// Figures by stage.
    pub fn summary(&self) -> BTreeMap<String, StageSummary> {
        self.stages.iter().filter_map(|(name, d)| Some((name.clone(), d.summary()?))).collect()
    }

    /// A table for a terminal, one line per stage.
    pub fn table(&self) -> String {
        let mut text =
            format!("{:<16}{:>8}{:>12}{:>12}{:>12}\n", "stage", "runs", "p50 ms", "p99 ms", "max ms");
        for (name, s) in self.summary() {
            text += &format!("{name:<16}{:>8}{:>12.3}{:>12.3}{:>12.3}\n", s.count, s.p50, s.p99, s.max);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let check = |values: &[f64], p50: f64, p99: f64, max: f64| {
            let mut d = Durations::default();
            values.iter().for_each(|v| d.push(*v));
            let s = d.summary().unwrap();
            assert_eq!((s.count, s.p50, s.p99, s.max), (values.len() as u64, p50, p99, max), "{values:?}");
        };
        check(&[3.0], 3.0, 3.0, 3.0);
        check(&[4.0, 1.0, 3.0, 2.0], 2.0, 4.0, 4.0);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        check(&hundred, 50.0, 99.0, 100.0);
        assert!(Durations::default().summary().is_none());
    }

    #[test]
    fn the_window_is_bounded_and_the_maximum_is_not_forgotten() {
        let mut d = Durations::default();
        d.push(1e6);
        for _ in 0..3 * WINDOW {
            d.push(1.0);
        }
        let s = d.summary().unwrap();
        assert_eq!((d.window.len(), s.p99, s.max), (WINDOW, 1.0, 1e6));
    }
}
