//! Training of the depth reader: pictures of unseen rooms with the true distance of every pixel.
//!
//! Pictures are a pure function of a seed, seen by the same camera as the videos and as varied in colour: from anywhere in
//! a room, along sweeps, and along drives, which end close to things. The loss is Huber's on the logarithm of depth.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mindseye_base::stats::median;
use mindseye_engines::model::depth::{DepthConfig, log_depth};
use mindseye_world::{
    Camera, Frame, House, Pose2, RenderOptions, Rng, approach, exploration_sweep, random_pose, render_with,
};
use serde::{Deserialize, Serialize};

use crate::autograd::{Autograd, Device, EagerDevice, Settings};
use crate::checkpoint::{Pending, State};
use crate::config::{ConfigError, Difficulties, SettingError, has_table, read};
use crate::data::{Look, Worlds};
use crate::eager::{Eager, Params};
use crate::error::{TrainError, io};
use crate::family::parse;
use crate::net::{self, Losses};
use crate::optim::OptimConfig;
use crate::run::{self, CHECKPOINT, Pace, Run, Speed, learning_rate};
use crate::step::{Change, Share, finish, joined, sums};

/// `configs/train/*-depth.toml`: a training configuration with a table `[depth]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DepthTrainConfig {
    /// Seed of weights and data.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Pictures per step.
    pub batch: usize,
    /// Parallel workers; part of the result, since sums are taken in their order.
    pub workers: usize,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Step at which the linear decay to zero begins.
    pub decay_from: u64,
    /// Decay of the averaged weights.
    pub ema: f64,
    /// World that rooms are drawn from, or several with their shares; also that of the evaluation.
    pub difficulty: Difficulties,
    /// Share of pictures with 4x4 instead of 2x2 rays per pixel.
    pub fine: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Steps between metrics lines.
    pub log_every: u64,
    /// Steps between evaluations on unseen rooms.
    pub eval_every: u64,
    /// Unseen rooms per evaluation.
    pub eval_houses: usize,
    /// Optimiser.
    pub optim: OptimConfig,
    /// The network.
    pub depth: DepthConfig,
}

impl DepthTrainConfig {
    /// Whether a configuration file is one of the depth reader; one that cannot be read is not.
    #[must_use]
    pub fn is_meant(path: &Path) -> bool {
        has_table(path, "depth")
    }

    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        read(path, Self::validate)
    }

    /// Checks that the settings are in range and fit each other.
    ///
    /// # Errors
    /// [`SettingError`] names the setting.
    pub fn validate(&self) -> Result<(), SettingError> {
        let (batch, workers) = (self.batch, self.workers);
        if batch == 0 || workers == 0 || !batch.is_multiple_of(workers) {
            return Err(SettingError::Batch { batch, workers });
        }
        for (name, value) in [
            ("log_every", self.log_every),
            ("checkpoint_every", self.checkpoint_every),
            ("eval_every", self.eval_every),
        ] {
            if value == 0 {
                return Err(SettingError::Range { name, value: "0".to_owned(), expected: "1 or more" });
            }
        }
        if !(0.0..=1.0).contains(&self.fine) {
            let value = self.fine.to_string();
            return Err(SettingError::Range { name: "fine", value, expected: "0 to 1" });
        }
        self.difficulty.worlds()?;
        Ok(self.depth.validate()?)
    }
}

/// A picture and how far away each of its pixels is.
#[derive(Clone, Debug, PartialEq)]
pub struct DepthSample {
    /// `[3, height, width]` in [-1, 1].
    pub picture: Vec<f32>,
    /// Planar depth at the pixels' centres (m), `[height, width]`.
    pub depth: Vec<f32>,
}

/// Pictures that are taken in one room.
const PER_ROOM: usize = 4;

/// Makes samples; holds the buffers that rendering reuses.
pub struct DepthSource {
    camera: Camera,
    worlds: Worlds,
    fine: f64,
    frame: Frame,
}

impl DepthSource {
    /// A source of samples for this configuration.
    ///
    /// # Errors
    /// A difficulty that there is not.
    pub fn new(config: &DepthTrainConfig) -> Result<Self, SettingError> {
        Ok(Self {
            camera: Camera::new(config.depth.width, config.depth.height),
            worlds: config.difficulty.worlds()?,
            fine: config.fine,
            frame: Frame::new(),
        })
    }

    /// The camera that samples are rendered with.
    #[must_use]
    pub fn camera(&self) -> &Camera {
        &self.camera
    }

    /// The samples with this seed, all of one place; `augment` permutes colours and mirrors.
    #[must_use]
    pub fn samples(&mut self, seed: u64, augment: bool) -> Vec<DepthSample> {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xdeb7);
        let house = self.worlds.house(rng.next_u64() >> 1);
        let way = match rng.below(4) {
            0 => exploration_sweep(&house, &mut rng, 97),
            1 | 2 => {
                let (start, object) = (random_pose(&house, &mut rng), rng.below(house.objects.len()));
                approach(&house, start, object, 17).poses
            }
            _ => (0..PER_ROOM).map(|_| random_pose(&house, &mut rng)).collect(),
        };
        (0..PER_ROOM)
            .map(|_| {
                let pose = way[rng.below(way.len())];
                let look = Look::draw(&mut rng, augment);
                let coarse = RenderOptions::rgb_only().supersample;
                let supersample = if rng.chance(self.fine) { 2 * coarse } else { coarse };
                self.sample(&house, pose, supersample, &look)
            })
            .collect()
    }

    fn sample(&mut self, house: &House, pose: Pose2, supersample: usize, look: &Look) -> DepthSample {
        let options = RenderOptions { supersample, depth: true, ..RenderOptions::rgb_only() };
        render_with(house, pose, &self.camera, options, &mut self.frame);
        let mut picture = Vec::with_capacity(3 * self.frame.depth.len());
        look.pixels(&self.frame, &mut picture);
        let mut depth = self.frame.depth.clone();
        if look.mirror {
            depth.chunks_exact_mut(self.frame.width).for_each(<[f32]>::reverse);
        }
        DepthSample { picture, depth }
    }
}

/// Where Huber's loss goes over from quadratic to linear: an error of 5 %.
const KNEE: f32 = 0.05;

/// Huber's loss of an error of log depth, in units of the error where it is linear, and its derivative.
fn huber(d: f32) -> (f32, f32) {
    if d.abs() < KNEE { (d * d / (2.0 * KNEE), d / KNEE) } else { (d.abs() - KNEE / 2.0, d.signum()) }
}

/// Loss of log depths against the truth, as a mean over `total` pixels, and its gradient. Pixels without a true depth
/// count as right.
fn loss(log_depth: &[f32], truth: impl Iterator<Item = f32>, total: usize) -> (f64, Vec<f32>) {
    let share = 1.0 / total as f32;
    let (mut sum, mut gradient) = (0.0, Vec::with_capacity(log_depth.len()));
    for (got, want) in log_depth.iter().zip(truth) {
        let want = want.ln();
        let (loss, slope) = if want.is_finite() { huber(got - want) } else { (0.0, 0.0) };
        sum += f64::from(loss * share);
        gradient.push(slope * share);
    }
    (sum, gradient)
}

/// The network over a batch of pictures.
fn forward<A: Autograd>(e: &mut A, config: &DepthConfig, samples: &[DepthSample]) -> A::Tensor {
    let pixels = samples.iter().flat_map(|s| &s.picture).copied().collect();
    let pictures = e.input(&[samples.len(), 3, config.height, config.width], pixels);
    log_depth(e, config, &pictures)
}

/// Zeros for every weight that the network asks for.
fn collect(config: &DepthConfig) -> Params {
    let mut e = Eager::collecting();
    let blank = DepthSample { picture: vec![0.0; 3 * config.pixels()], depth: Vec::new() };
    forward(&mut e, config, &[blank]);
    e.params().clone()
}

/// Errors on unseen rooms, as shares of the true depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DepthEval {
    /// Median over all pixels.
    pub median: f64,
    /// Mean over all pixels.
    pub mean: f64,
    /// Mean over pixels inside surfaces (see [`inside`]).
    pub mean_inside: f64,
    /// Share of pixels inside surfaces.
    pub inside: f64,
    /// Share of pixels with an error of at most 5 %.
    pub within_5: f64,
}

/// Pixels inside surfaces: inverse depth runs straight from each neighbour to the opposite one, as it does on a plane,
/// within 2 %. Pixels at the picture's edge are not inside.
#[must_use]
pub fn inside(depth: &[f32], width: usize) -> Vec<bool> {
    let height = depth.len() / width.max(1);
    let straight = |a: f32, b: f32, c: f32| (b / a + b / c - 2.0).abs() < 0.02;
    (0..depth.len())
        .map(|at| {
            let (x, y) = (at % width, at / width);
            x > 0
                && y > 0
                && x + 1 < width
                && y + 1 < height
                && straight(depth[at - 1], depth[at], depth[at + 1])
                && straight(depth[at - width], depth[at], depth[at + width])
        })
        .collect()
}

/// Errors of depths against true ones, both of whole pictures of this width.
#[must_use]
pub fn errors(depth: &[f32], truth: &[f32], width: usize, height: usize) -> DepthEval {
    let mut relative: Vec<f64> =
        depth.iter().zip(truth).map(|(d, t)| f64::from((d / t - 1.0).abs())).collect();
    let inside: Vec<bool> = truth.chunks(width * height).flat_map(|t| inside(t, width)).collect();
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (sum, n) = values.fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
        (sum / n.max(1) as f64, n)
    };
    let n = relative.len().max(1) as f64;
    let (mean_inside, count) =
        mean(&mut relative.iter().zip(&inside).filter(|(_, inside)| **inside).map(|(e, _)| *e));
    DepthEval {
        mean: mean(&mut relative.iter().copied()).0,
        mean_inside,
        inside: count as f64 / n,
        within_5: relative.iter().filter(|e| **e <= 0.05).count() as f64 / n,
        median: median(&mut relative),
    }
}

/// One line of the metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DepthMetrics {
    /// Step.
    pub step: u64,
    /// Pictures seen.
    pub samples: u64,
    /// Learning rate.
    pub lr: f64,
    /// Mean loss since the last line.
    pub loss: f64,
    /// Largest gradient norm since the last line.
    pub grad_norm: f64,
    /// Errors of the averaged weights on unseen rooms, on lines where they were measured.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval: Option<DepthEval>,
}

/// A run in a directory: `checkpoint.safetensors`, `metrics.jsonl`.
pub struct DepthTrainer<D: Device = EagerDevice> {
    /// Configuration.
    pub config: DepthTrainConfig,
    /// Weights and optimiser.
    pub state: State,
    workers: Vec<(D::Interpreter, DepthSource, Duration)>,
    out: PathBuf,
    schedule: u64,
}

impl DepthTrainer {
    /// Opens a run on the CPU: goes on from its checkpoint, or starts. `other_configuration` goes on even from a
    /// checkpoint of another configuration, as long as its weights fit.
    ///
    /// # Errors
    /// When the directory cannot be used or holds a checkpoint of another network or configuration.
    pub fn open(config: DepthTrainConfig, out: &Path, other_configuration: bool) -> Result<Self, TrainError> {
        Self::open_on(&EagerDevice, config, out, other_configuration)
    }
}

impl<D: Device> DepthTrainer<D> {
    /// [`DepthTrainer::open`] on any device.
    ///
    /// # Errors
    /// As [`DepthTrainer::open`].
    pub fn open_on(
        device: &D,
        config: DepthTrainConfig,
        out: &Path,
        other_configuration: bool,
    ) -> Result<Self, TrainError> {
        fs::create_dir_all(out).map_err(io(out))?;
        let (checkpoint, wanted) = (out.join(CHECKPOINT), collect(&config.depth));
        let state = if checkpoint.exists() {
            let state = State::read(&checkpoint, &wanted)?;
            if !other_configuration {
                // The network is part of the configuration.
                state.agrees(&checkpoint, &config, &config, "")?;
            }
            state
        } else {
            State::fresh(net::initialise(&wanted, config.seed))
        };
        run::trim_metrics(out, state.step)?;
        let workers = (0..config.workers)
            .map(|_| {
                Ok((device.interpreter(Settings::default())?, DepthSource::new(&config)?, Duration::ZERO))
            })
            .collect::<Result<_, TrainError>>()?;
        Ok(Self { schedule: config.steps, out: out.to_path_buf(), config, state, workers })
    }

    /// The learning rate follows a run of this many steps, even when fewer are done now.
    pub fn schedule_steps(&mut self, steps: u64) {
        self.schedule = steps;
    }

    /// As [`crate::trainer::Trainer::run`].
    ///
    /// # Errors
    /// As there.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        progress: impl FnMut(&DepthMetrics, Speed),
    ) -> Result<(), TrainError> {
        run::drive(self, stop, progress)
    }

    fn lr(&self, step: u64) -> f64 {
        let c = &self.config;
        learning_rate(c.optim.lr, c.warmup, c.decay_from, step, self.schedule)
    }
}

/// The configuration and averaged weights of a run of the depth reader.
///
/// # Errors
/// A checkpoint that cannot be read, or is of another kind of run.
pub fn finished(run: &Path) -> Result<(DepthTrainConfig, State), TrainError> {
    let path = run.join(CHECKPOINT);
    let note = crate::checkpoint::configuration(&path)?;
    let config: DepthTrainConfig = parse(&note).map_err(|e| TrainError::Checkpoint {
        path: path.clone(),
        reason: format!("not of a run of the depth reader: its configuration, {e}"),
    })?;
    config.validate()?;
    let state = State::read(&path, &collect(&config.depth))?;
    Ok((config, state))
}

/// Errors of these weights on unseen rooms: as many as `houses`, always the same.
///
/// # Errors
/// A difficulty that there is not.
pub fn evaluate(
    config: &DepthTrainConfig,
    params: &Arc<Params>,
    houses: usize,
) -> Result<DepthEval, SettingError> {
    let mut source = DepthSource::new(config)?;
    let mut e = Eager::new(Arc::default(), false);
    let (mut depth, mut truth) = (Vec::new(), Vec::new());
    for seed in 0..houses as u64 {
        let samples = source.samples(0xde97_0000 + seed, false);
        e.restart(params.clone());
        let out = forward(&mut e, &config.depth, &samples);
        depth.extend(e.value(out).1.iter().map(|v| v.exp()));
        truth.extend(samples.iter().flat_map(|s| &s.depth));
    }
    Ok(errors(&depth, &truth, config.depth.width, config.depth.height))
}

impl<D: Device> Run for DepthTrainer<D> {
    type Line = DepthMetrics;

    fn pace(&self) -> Pace {
        let DepthTrainConfig { steps, batch, log_every, checkpoint_every, .. } = self.config;
        Pace { steps, batch, log_every, checkpoint_every }
    }

    fn state(&mut self) -> &mut State {
        &mut self.state
    }

    fn step(&mut self, stop: &AtomicBool) -> Result<Option<(Losses, f64)>, TrainError> {
        let (config, params) = (&self.config, &self.state.params);
        let step = self.state.step + 1;
        let (per, total) = (config.batch / config.workers, config.batch * config.depth.pixels());
        let shares: Result<Vec<Share>, TrainError> = std::thread::scope(|scope| {
            let handles: Vec<_> = self
                .workers
                .iter_mut()
                .enumerate()
                .map(|(w, (e, source, waited))| {
                    let mut rng = Rng::new(config.seed ^ (step << 8) ^ w as u64);
                    scope.spawn(move || {
                        let (mut samples, began): (Vec<DepthSample>, _) = (Vec::new(), Instant::now());
                        while samples.len() < per {
                            samples.extend(source.samples(rng.next_u64(), true));
                        }
                        samples.truncate(per);
                        *waited += began.elapsed();
                        e.restart(params.clone());
                        let out = forward(e, &config.depth, &samples);
                        let truth = samples.iter().flat_map(|s| &s.depth).copied();
                        let (loss, gradient) = loss(&e.value(&out), truth, total);
                        e.backward(vec![(out, gradient)]);
                        let grads = e.take_grads();
                        e.clear();
                        Share { losses: Losses { total: loss, ..Losses::default() }, grads }
                    })
                })
                .collect();
            let done: Vec<_> = handles.into_iter().map(joined).collect();
            done.into_iter().collect()
        });
        let shares = shares?;
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let sum = sums(shares, params.len());
        let lr = self.lr(step);
        let DepthTrainConfig { optim, ema, workers, .. } = &self.config;
        let change = Change { optim, ema: *ema, only: &[], workers: *workers, lr, mine: &[] };
        finish(&mut self.state, None, &change, sum).map(Some)
    }

    fn waited(&mut self) -> Duration {
        let workers = self.workers.len() as u32;
        self.workers.iter_mut().map(|(.., waited)| std::mem::take(waited)).sum::<Duration>() / workers
    }

    fn line(&mut self, since: Pending) -> Result<DepthMetrics, TrainError> {
        let step = self.state.step;
        let eval = step.is_multiple_of(self.config.eval_every);
        Ok(DepthMetrics {
            step,
            samples: step * self.config.batch as u64,
            lr: self.lr(step),
            loss: since.losses.total / since.steps as f64,
            grad_norm: since.norm_max,
            eval: eval
                .then(|| evaluate(&self.config, &Arc::new(self.state.ema.clone()), self.config.eval_houses))
                .transpose()?,
        })
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.state.save(&self.out.join(CHECKPOINT), &self.config)
    }

    fn directory(&self) -> &Path {
        &self.out
    }
}

#[cfg(test)]
mod tests {
    use mindseye_world::Difficulty;

    use super::*;

    fn tiny() -> DepthTrainConfig {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/train/depth.toml");
        DepthTrainConfig::load(Path::new(path)).expect("a configuration")
    }

    #[test]
    fn losses_by_hand() {
        // Twice as far, 1 % too far, right, and a pixel that shows nothing.
        let (loss, gradient) =
            loss(&[2f32.ln(), 0.01, 0.0, 3.0], [1.0, 1.0, 1.0, f32::INFINITY].into_iter(), 4);
        let wanted = (2f64.ln() - 0.025 + 0.01 * 0.01 / 0.1) / 4.0;
        assert!((loss - wanted).abs() < 1e-6, "{loss}");
        for (got, want) in gradient.iter().zip([0.25, 0.05, 0.0, 0.0]) {
            assert!((got - want).abs() < 1e-6, "{gradient:?}");
        }
    }

    #[test]
    fn errors_by_hand() {
        // A wall at 2 m in 4x3 pixels, with one pixel of a thing at 1 m in its right column.
        let mut truth = vec![2.0; 12];
        truth[7] = 1.0;
        let read: Vec<f32> =
            truth.iter().enumerate().map(|(i, t)| if i == 5 { t * 1.1 } else { *t }).collect();
        // Of the two pixels that are not at the edge, one is beside the thing.
        let flags = inside(&truth, 4);
        assert_eq!(flags.iter().enumerate().filter(|(_, f)| **f).map(|(i, _)| i).collect::<Vec<_>>(), [5]);
        let e = errors(&read, &truth, 4, 3);
        assert!((e.mean - 0.1 / 12.0).abs() < 1e-6 && (e.mean_inside - 0.1).abs() < 1e-6, "{e:?}");
        assert!((e.inside - 1.0 / 12.0).abs() < 1e-9 && (e.within_5 - 11.0 / 12.0).abs() < 1e-9, "{e:?}");
        assert_eq!(e.median, 0.0);
        // A floor's inverse depth is affine in the row: inside, although its depth is not straight.
        let floor: Vec<f32> = (0..20).map(|i| 1.0 / (0.1 + (i / 4) as f32)).collect();
        assert!(inside(&floor, 4)[5] && inside(&floor, 4)[10]);
    }

    #[test]
    fn samples_are_a_function_of_the_seed_and_their_depth_is_that_of_the_world() {
        let config = tiny();
        let mut source = DepthSource::new(&config).expect("its worlds");
        let (a, b) = (source.samples(7, true), source.samples(8, true));
        assert_eq!(a, DepthSource::new(&config).expect("its worlds").samples(7, true));
        assert_ne!(a, b);
        // Every ray ends at a distance that fits the room: the floor below the horizon is where the camera's height and
        // pitch put it.
        let camera = *source.camera();
        let (f, pitch) = (camera.focal_px(), camera.pitch_rad);
        let mut on_floor = 0;
        for sample in a.iter().chain(&b) {
            assert!(sample.depth.iter().all(|d| *d > 0.05 && *d < 40.0));
            assert!(sample.picture.iter().all(|v| (-1.0..=1.0).contains(v)));
            for (at, depth) in sample.depth.iter().enumerate() {
                let v = ((at / camera.width) as f64 + 0.5 - camera.height as f64 / 2.0) / f;
                let down = pitch.sin() + v * pitch.cos();
                if down <= 0.0 {
                    continue;
                }
                let floor = camera.mount_height_m / down;
                assert!(f64::from(*depth) < floor * 1.001, "nothing is seen through the floor");
                on_floor += usize::from((f64::from(*depth) - floor).abs() < 1e-3 * floor);
            }
        }
        assert!(on_floor > 100, "{on_floor} pixels show the floor");
    }

    #[test]
    fn mirrored_samples_have_mirrored_depth() {
        let config = tiny();
        let mut source = DepthSource::new(&config).expect("its worlds");
        let house = House::generate(5, &Difficulty::plain());
        let pose = random_pose(&house, &mut Rng::new(5));
        let mut looks = [Look::draw(&mut Rng::new(1), false), Look::draw(&mut Rng::new(1), false)];
        looks[1].mirror = true;
        let [plain, mirrored] = looks.map(|look| source.sample(&house, pose, 2, &look));
        let w = config.depth.width;
        for (a, b) in plain.depth.chunks(w).zip(mirrored.depth.chunks(w)) {
            assert!(a.iter().eq(b.iter().rev()));
        }
        for (a, b) in plain.picture.chunks(w).zip(mirrored.picture.chunks(w)) {
            assert!(a.iter().eq(b.iter().rev()));
        }
        assert_ne!(plain.depth, mirrored.depth, "the room is not symmetric");
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let check = |change: &dyn Fn(&mut DepthTrainConfig), wanted: &str| {
            let mut config = tiny();
            change(&mut config);
            let said = config.validate().expect_err(wanted).to_string();
            assert!(said.contains(wanted), "{said}");
        };
        check(&|c| c.batch = 3, "batch = 3 must be a positive multiple of workers = 2");
        check(&|c| c.log_every = 0, "log_every = 0");
        check(&|c| c.fine = f64::NAN, "fine = NaN: expected 0 to 1");
        check(&|c| c.difficulty = Difficulties::One("hall".into()), "difficulty = \"hall\"");
        check(&|c| c.depth.patch = 5, "depth.width, depth.height");
    }

    #[test]
    fn a_stopped_run_goes_on_as_if_nothing_had_happened_and_learns() {
        let dir = tempfile::tempdir().expect("a directory");
        let open =
            |run: &str| DepthTrainer::open(tiny(), &dir.path().join(run), false).expect("the run opens");
        let until = |trainer: &mut DepthTrainer, step: u64| {
            let stop = AtomicBool::new(false);
            trainer.run(&stop, |m, _| stop.store(m.step >= step, Ordering::Relaxed)).expect("it goes on");
        };
        let metrics =
            |run: &str| fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).expect("metrics");
        until(&mut open("whole"), 60);
        until(&mut open("stopped"), 30);
        let mut again = open("stopped");
        assert_eq!(again.state.step, 30);
        until(&mut again, 60);
        assert_eq!(metrics("whole"), metrics("stopped"));
        let lines: Vec<DepthMetrics> =
            metrics("whole").lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
        assert!(lines[lines.len() - 1].loss < 0.8 * lines[0].loss, "{lines:?}");
        assert!(lines.iter().any(|l| l.eval.is_some_and(|e| e.mean > 0.0)));

        let other = DepthTrainConfig { fine: 1.0, ..tiny() };
        let error = DepthTrainer::open(other, &dir.path().join("whole"), false).err().expect("another run");
        assert!(error.to_string().contains("fine = 0.25 there, 1.0 here"), "{error}");
        let (config, state) = finished(&dir.path().join("whole")).expect("it can be shipped");
        assert_eq!((config, state.step), (tiny(), 60));
    }
}
