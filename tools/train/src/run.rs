//! What every training run does, whatever it trains: steps until the end or a stop, checkpoints, metrics, the learning
//! rate's course.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mindseye_base::file::replace;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Pending, State};
use crate::curve::METRICS;
use crate::error::{TrainError, io};
use crate::net::Losses;
use crate::ranks::Ranks;

/// Name of the checkpoint in a run's directory.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// How long a run is, and what it writes on the way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) steps: u64,
    /// Samples per step.
    pub(crate) batch: usize,
    pub(crate) log_every: u64,
    pub(crate) checkpoint_every: u64,
}

/// How fast a run was since its last line of metrics. It is said and not written: metrics are the same whenever a run is
/// done again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Samples per second.
    pub samples_per_sec: f64,
    /// Share of the time that a worker's device waited for samples, 0 to 1, mean over workers.
    pub waiting: f64,
}

/// A run in a directory.
pub(crate) trait Run {
    /// A line of the metrics file.
    type Line: Serialize;

    fn pace(&self) -> Pace;
    fn state(&mut self) -> &mut State;
    /// One optimiser step: losses and gradient norm; none when `stop` came in between, and then nothing has changed.
    fn step(&mut self, stop: &AtomicBool) -> Result<Option<(Losses, f64)>, TrainError>;
    /// How long its workers have waited for samples since the last call, on average.
    fn waited(&mut self) -> Duration;
    /// The line of the metrics file for the steps since the last one.
    fn line(&mut self, since: Pending) -> Result<Self::Line, TrainError>;
    /// Writes the checkpoint.
    fn save(&mut self) -> Result<(), TrainError>;
    /// The ranks that train together, where there are several: the first writes metrics and says how far it is, and all
    /// stop before the same step.
    fn ranks(&mut self) -> Option<&mut Ranks> {
        None
    }
    /// The run's directory.
    fn directory(&self) -> &Path;
}

/// Runs until the configured number of steps or until `stop`, which takes effect between two passes; the checkpoint is
/// written then. `progress` gets every line of the metrics file and the speed.
pub(crate) fn drive<R: Run>(
    run: &mut R,
    stop: &AtomicBool,
    mut progress: impl FnMut(&R::Line, Speed),
) -> Result<(), TrainError> {
    let pace = run.pace();
    let mut since = (Instant::now(), 0);
    let mut saved = run.state().step;
    while run.state().step < pace.steps {
        let here = stop.load(Ordering::Relaxed);
        if run.ranks().map_or(Ok(here), |ranks| ranks.any(here))? {
            break;
        }
        let Some((losses, norm)) = run.step(stop)? else { break };
        let state = run.state();
        state.pending.losses.add(&losses);
        state.pending.norm_max = state.pending.norm_max.max(norm);
        state.pending.steps += 1;
        let step = state.step;
        since.1 += 1;
        if step.is_multiple_of(pace.log_every) {
            let (secs, samples) = (since.0.elapsed().as_secs_f64(), (since.1 * pace.batch as u64) as f64);
            let waiting = run.waited().as_secs_f64() / secs;
            let speed = Speed { samples_per_sec: samples / secs, waiting };
            let pending = std::mem::take(&mut run.state().pending);
            if run.ranks().is_none_or(|ranks| ranks.leads()) {
                let line = run.line(pending)?;
                append(run.directory(), &line)?;
                progress(&line, speed);
            }
            since = (Instant::now(), 0);
        }
        if step.is_multiple_of(pace.checkpoint_every) {
            run.save()?;
            saved = step;
        }
    }
    if run.state().step != saved {
        run.save()?;
    }
    Ok(())
}

fn append(directory: &Path, line: &impl Serialize) -> Result<(), TrainError> {
    let path = directory.join(METRICS);
    let mut text = serde_json::to_string(line).map_err(|source| TrainError::Metrics {
        path: path.clone(),
        line: 0,
        source,
    })?;
    text.push('\n');
    let mut file = fs::OpenOptions::new().create(true).append(true).open(&path).map_err(io(&path))?;
    file.write_all(text.as_bytes()).map_err(io(&path))
}

/// Lines after step `last` are those of a run that was killed: they will be written again.
pub(crate) fn trim_metrics(directory: &Path, last: u64) -> Result<(), TrainError> {
    #[derive(Deserialize)]
    struct Line {
        step: u64,
    }
    let path: PathBuf = directory.join(METRICS);
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let kept: String = text
        .lines()
        .filter(|l| serde_json::from_str::<Line>(l).is_ok_and(|line| line.step <= last))
        .flat_map(|l| [l, "\n"])
        .collect();
    replace(&path, kept.as_bytes()).map_err(io(&path))
}

/// Learning rate of a step in a run of `steps` steps: linear warm-up, constant, linear decay to zero.
pub(crate) fn learning_rate(peak: f64, warmup: u64, decay_from: u64, step: u64, steps: u64) -> f64 {
    let warm = (step as f64 / warmup.max(1) as f64).min(1.0);
    let left = steps.saturating_sub(step) as f64;
    let decay = (left / steps.saturating_sub(decay_from).max(1) as f64).min(1.0);
    peak * warm * decay
}
