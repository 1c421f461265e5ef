//! The trainer of a network whose samples are a pure function of the step and their place in the batch: the video
//! autoencoder ([`crate::autoencoder`]) and the fine-tune ([`crate::finetune`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mindseye_world::Rng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::autograd::{Autograd, Device, OutputGrads, Settings};
use crate::checkpoint::{Pending, State};
use crate::config::SettingError;
use crate::eager::Params;
use crate::error::{TrainError, io};
use crate::net::Losses;
use crate::optim::OptimConfig;
use crate::ranks::Ranks;
use crate::run::{self, CHECKPOINT, Pace, Run, Speed, learning_rate};
use crate::step::{Change, Share, finish, joined, save, sums};

/// `[course]`: how long a run is and what it writes on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Course {
    /// Seed of weights, samples and noise.
    pub seed: u64,
    /// Parallel workers over all ranks, each of which takes as many samples of a batch, one after the other; part of the
    /// result, since sums are taken in their order.
    pub workers: usize,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Step at which the linear decay to zero begins.
    pub decay_from: u64,
    /// Decay of the averaged weights.
    pub ema: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Steps between metrics lines.
    pub log_every: u64,
    /// See [`crate::config::TrainConfig::checkpoint_blocks`].
    #[serde(default)]
    pub checkpoint_blocks: bool,
    /// See [`crate::config::TrainConfig::bf16`].
    #[serde(default)]
    pub bf16: bool,
}

impl Course {
    pub(crate) fn validate(&self, batch: usize) -> Result<(), SettingError> {
        let workers = self.workers;
        if batch == 0 || workers == 0 || !batch.is_multiple_of(workers) {
            return Err(SettingError::Batch { batch, workers });
        }
        for (name, value) in
            [("course.log_every", self.log_every), ("course.checkpoint_every", self.checkpoint_every)]
        {
            if value == 0 {
                return Err(SettingError::Range { name, value: "0".to_owned(), expected: "1 or more" });
            }
        }
        Ok(())
    }
}

/// What is trained, and on what.
pub(crate) trait Task: Sync {
    /// What a checkpoint notes, and must agree when a run goes on.
    type Config: Serialize + DeserializeOwned;

    fn config(&self) -> &Self::Config;
    fn course(&self) -> &Course;
    fn optim(&self) -> &OptimConfig;
    fn steps(&self) -> u64;
    fn batch(&self) -> usize;
    /// Which weights are trained when, in order; all of them always unless it says otherwise.
    fn phases(&self) -> Vec<Phase> {
        vec![Phase::default()]
    }
    /// Identity of the data; empty where the configuration says it all.
    fn identity(&self) -> &str;
    /// The losses of one sample, times its `share` of the batch, and their gradients.
    fn pass<A: Autograd>(
        &self,
        e: &mut A,
        rng: &mut Rng,
        share: f32,
    ) -> Result<(Losses, OutputGrads<A::Tensor>), TrainError>;
}

/// A part of a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Phase {
    /// It begins after this step.
    pub(crate) after: u64,
    /// Weights that are trained; see [`crate::eager::is_chosen`].
    pub(crate) only: Vec<String>,
}

/// One line of the metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskMetrics {
    /// Step.
    pub step: u64,
    /// Samples seen.
    pub samples: u64,
    /// Learning rate.
    pub lr: f64,
    /// Mean loss since the last line.
    pub loss: f64,
    /// Its terms, where it has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub losses: Option<Losses>,
    /// Largest gradient norm since the last line.
    pub grad_norm: f64,
}

/// A run in a directory: `checkpoint.safetensors`, `metrics.jsonl`.
pub(crate) struct TaskRun<T, D: Device> {
    pub(crate) task: T,
    pub(crate) state: State,
    /// Each with an interpreter for every worker.
    phases: Vec<(Phase, Vec<D::Interpreter>)>,
    /// Number of the first of this process's workers.
    first: usize,
    ranks: Option<Ranks>,
    out: PathBuf,
    steps: u64,
}

impl<T: Task, D: Device> TaskRun<T, D> {
    /// Goes on from the run's checkpoint, or starts with `fresh` weights.
    pub(crate) fn open(
        device: &D,
        task: T,
        out: &Path,
        mut ranks: Option<Ranks>,
        fresh: Params,
    ) -> Result<Self, TrainError> {
        fs::create_dir_all(out).map_err(io(out))?;
        let checkpoint = out.join(CHECKPOINT);
        let mut state = if checkpoint.exists() {
            let state = State::read(&checkpoint, &fresh)?;
            state.agrees(&checkpoint, task.config(), task.config(), task.identity())?;
            state
        } else {
            State::fresh(fresh)
        };
        state.origin.data = task.identity().to_owned();
        let course = task.course();
        let mut own = 0..course.workers;
        if let Some(ranks) = &mut ranks {
            let note = format!("{} {}", toml::to_string(task.config()).unwrap_or_default(), task.identity());
            // Every weight that is trained at some time has a rank that it is with.
            let phases = task.phases();
            let all = phases.iter().any(|phase| phase.only.is_empty());
            let only: Vec<String> =
                phases.into_iter().flat_map(|phase| phase.only).filter(|_| !all).collect();
            ranks.begin(&mut state, &only, &note)?;
            own = ranks.workers(course.workers)?;
        }
        if ranks.as_ref().is_none_or(Ranks::leads) {
            run::trim_metrics(out, state.step)?;
        }
        let Course { checkpoint_blocks, bf16, .. } = *course;
        let first = own.start;
        let phases = task.phases().into_iter().map(|phase| {
            let settings = Settings { only: &phase.only, checkpoint_blocks, bf16 };
            let interpreters = own.clone().map(|_| device.interpreter(settings)).collect::<Result<_, _>>()?;
            Ok((phase, interpreters))
        });
        let phases = phases.collect::<Result<_, TrainError>>()?;
        Ok(Self { steps: task.steps(), task, state, phases, first, ranks, out: out.to_path_buf() })
    }

    /// As [`crate::trainer::Trainer::run`]; ends after step `until`, whatever the configuration says.
    pub(crate) fn run(
        &mut self,
        until: Option<u64>,
        stop: &AtomicBool,
        progress: impl FnMut(&TaskMetrics, Speed),
    ) -> Result<(), TrainError> {
        self.steps = self.task.steps().min(until.unwrap_or(u64::MAX));
        run::drive(self, stop, progress)?;
        if let Some(ranks) = &mut self.ranks {
            ranks.leave();
        }
        Ok(())
    }

    fn lr(&self, step: u64) -> f64 {
        let c = self.task.course();
        learning_rate(self.task.optim().lr, c.warmup, c.decay_from, step, self.task.steps())
    }

    /// Number of the phase of a step.
    fn phase(&self, step: u64) -> usize {
        self.phases.iter().rposition(|(phase, _)| phase.after < step).unwrap_or(0)
    }

    /// The shares of this process's workers; none when `stop` came between two samples.
    fn shares(&mut self, step: u64, stop: &AtomicBool) -> Result<Option<Vec<Share>>, TrainError> {
        let phase = self.phase(step);
        let (task, params, first) = (&self.task, &self.state.params, self.first);
        let each = task.batch() / task.course().workers;
        std::thread::scope(|scope| {
            let handles: Vec<_> = self.phases[phase]
                .1
                .iter_mut()
                .enumerate()
                .map(|(i, e)| {
                    scope.spawn(move || {
                        let mut losses = Losses::default();
                        for item in (first + i) * each..(first + i + 1) * each {
                            if stop.load(Ordering::Relaxed) {
                                e.take_grads();
                                return Ok(None);
                            }
                            let mut rng = Rng::new(task.course().seed ^ (step << 20) ^ item as u64);
                            e.restart(params.clone());
                            let (part, outputs) = task.pass(e, &mut rng, 1.0 / task.batch() as f32)?;
                            e.backward(outputs);
                            losses.add(&part);
                        }
                        let grads = e.take_grads();
                        e.clear();
                        Ok(Some(Share { losses, grads }))
                    })
                })
                .collect();
            let done: Vec<Result<Option<Share>, TrainError>> =
                handles.into_iter().map(|h| joined(h)?).collect();
            done.into_iter().collect()
        })
    }
}

impl<T: Task, D: Device> Run for TaskRun<T, D> {
    type Line = TaskMetrics;

    fn pace(&self) -> Pace {
        let Course { log_every, checkpoint_every, .. } = *self.task.course();
        Pace { steps: self.steps, batch: self.task.batch(), log_every, checkpoint_every }
    }

    fn state(&mut self) -> &mut State {
        &mut self.state
    }

    fn step(&mut self, stop: &AtomicBool) -> Result<Option<(Losses, f64)>, TrainError> {
        let step = self.state.step + 1;
        // Ranks have agreed to make this step: only the loss of one breaks it off.
        let ranks = self.ranks.take();
        let shares = self.shares(step, ranks.as_ref().map_or(stop, Ranks::lost));
        self.ranks = ranks;
        let Some(shares) = shares? else {
            return self.ranks.as_ref().map_or(Ok(None), |r| Err(r.loss().into()));
        };
        let sum = sums(shares, self.state.params.len());
        let (phase, interpreters) = &self.phases[self.phase(step)];
        let (lr, workers) = (self.lr(step), interpreters.len());
        let (optim, ema, only) = (self.task.optim(), self.task.course().ema, &phase.only);
        let change = Change { optim, ema, only, workers, lr, mine: &[] };
        finish(&mut self.state, self.ranks.as_mut(), &change, sum).map(Some)
    }

    fn waited(&mut self) -> Duration {
        Duration::ZERO
    }

    fn line(&mut self, since: Pending) -> Result<TaskMetrics, TrainError> {
        let step = self.state.step;
        Ok(TaskMetrics {
            step,
            samples: step * self.task.batch() as u64,
            lr: self.lr(step),
            loss: since.losses.total / since.steps as f64,
            losses: (since.losses.total != since.losses.video && since.losses.video != 0.0)
                .then(|| since.losses.scaled(1.0 / since.steps as f64)),
            grad_norm: since.norm_max,
        })
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let path = self.out.join(CHECKPOINT);
        save(&mut self.state, self.ranks.as_mut(), &path, self.task.config())
    }

    fn ranks(&mut self) -> Option<&mut Ranks> {
        self.ranks.as_mut()
    }

    fn directory(&self) -> &Path {
        &self.out
    }
}
