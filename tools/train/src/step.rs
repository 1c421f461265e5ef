//! One optimiser step: workers make samples and gradients of a fixed share of the batch each, the sums are taken in their
//! order, and all weights are changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mindseye_world::Rng;

use crate::checkpoint::State;
use crate::clips::Clips;
use crate::config::TrainConfig;
use crate::data::{Codec, Sample, Source, Task};
use crate::distill::Teacher;
use crate::eager::backward::accumulate;
use crate::eager::{Eager, Params, is_chosen};
use crate::error::TrainError;
use crate::family::HouseModel;
use crate::net::{self, Draw, Losses};
use crate::optim::{self, Moments, OptimConfig};

/// What one worker brings back from a step.
pub(crate) struct Share {
    pub(crate) losses: Losses,
    pub(crate) grads: Vec<Vec<f32>>,
}

/// What one worker works with.
pub(crate) struct Worker {
    pub(crate) eager: Eager,
    pub(crate) source: Source,
    /// For the teacher's passes: records nothing.
    pub(crate) teaching: Eager,
}

/// What all workers of a step read.
#[derive(Clone, Copy)]
pub(crate) struct Recipe<'a> {
    pub(crate) config: &'a TrainConfig,
    pub(crate) model: &'a HouseModel,
    pub(crate) clips: Option<&'a (Clips, Codec)>,
    pub(crate) teacher: Option<&'a Teacher>,
}

impl Recipe<'_> {
    /// The shares of all workers in their order; none when `stop` came between two passes.
    pub(crate) fn shares(
        self,
        workers: &mut [Worker],
        params: &Arc<Params>,
        step: u64,
        stop: &AtomicBool,
    ) -> Result<Option<Vec<Share>>, TrainError> {
        std::thread::scope(|scope| {
            let handles: Vec<_> = workers
                .iter_mut()
                .enumerate()
                .map(|(w, worker)| {
                    let params = params.clone();
                    let rng = Rng::new(self.config.seed ^ (step << 8) ^ w as u64);
                    scope.spawn(move || self.share(worker, &params, rng, stop))
                })
                .collect();
            handles.into_iter().map(|h| h.join().expect("a training worker panicked")).collect()
        })
    }

    fn share(
        self,
        worker: &mut Worker,
        params: &Arc<Params>,
        mut rng: Rng,
        stop: &AtomicBool,
    ) -> Result<Option<Share>, TrainError> {
        let config = self.config;
        let per = config.batch / config.workers;
        let samples: Vec<Sample> =
            (0..per).map(|_| self.sample(&mut worker.source, &mut rng)).collect::<Result<_, _>>()?;
        let mut draws: Vec<Draw> = samples
            .iter()
            .map(|s| {
                let (values, c) = (s.latents.len(), config);
                let draw = Draw::new(&mut rng, values, c.high_noise, c.shift, c.drop, c.one_way);
                Draw { guided: c.guide.is_some_and(|guide| !rng.chance(guide.dropped)), ..draw }
            })
            .collect();
        if let Some(teacher) = self.teacher {
            teacher.teach(&mut worker.teaching, &mut rng, &samples, &mut draws);
        }
        let mut share = Share { losses: Losses::default(), grads: Vec::new() };
        let part = per / config.accumulate;
        let eager = &mut worker.eager;
        for (samples, draws) in samples.chunks(part).zip(draws.chunks(part)) {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            eager.restart(params.clone());
            let out = net::forward(eager, self.model, samples, draws);
            let (losses, grads) =
                net::losses(eager, self.model, samples, draws, &out, &config.loss, config.batch);
            eager.backward(grads);
            share.losses.add(&losses);
            add_grads(&mut share.grads, eager.take_grads());
        }
        eager.clear();
        Ok(Some(share))
    }

    /// One sample of a clip, or of a house where there are no clips or houses are mixed in.
    fn sample(self, source: &mut Source, rng: &mut Rng) -> Result<Sample, TrainError> {
        let config = self.config;
        if let Some((clips, codec)) = self.clips
            && !(config.data.house > 0.0 && rng.chance(config.data.house))
        {
            return clips.sample(rng.next_u64(), config.navigate, true, codec);
        }
        let task = if rng.chance(config.navigate) {
            Task::Navigate
        } else if rng.chance(config.absent) {
            Task::Absent
        } else {
            Task::Ground
        };
        Ok(source.sample(rng.next_u64(), task, true))
    }
}

/// Sums of losses and gradients of a batch.
pub(crate) struct Total {
    pub(crate) losses: Losses,
    /// Norm of all gradients together.
    pub(crate) norm: f64,
    /// By weight; empty where a weight has none.
    grads: Vec<Vec<f32>>,
}

impl Total {
    /// Sums the shares in their order.
    pub(crate) fn of(shares: Vec<Share>, weights: usize) -> Self {
        let mut losses = Losses::default();
        let mut grads: Vec<Vec<f32>> = vec![Vec::new(); weights];
        for share in shares {
            losses.add(&share.losses);
            add_grads(&mut grads, share.grads);
        }
        let norm = grads.iter().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        Self { losses, norm, grads }
    }

    pub(crate) fn is_finite(&self) -> bool {
        self.losses.total.is_finite() && self.norm.is_finite()
    }
}

/// One weight to change.
struct Job<'a> {
    rule: optim::Rule,
    shape: Vec<usize>,
    weights: &'a mut Vec<f32>,
    ema: &'a mut Vec<f32>,
    moments: &'a mut Moments,
    grad: Vec<f32>,
}

/// How a step changes weights.
pub(crate) struct Change<'a> {
    pub(crate) optim: &'a OptimConfig,
    /// Decay of the averaged weights.
    pub(crate) ema: f64,
    /// Only weights whose names contain one of these change; empty = all.
    pub(crate) only: &'a [String],
    /// Threads.
    pub(crate) workers: usize,
    /// Learning rate.
    pub(crate) lr: f64,
}

/// Changes all weights by their gradients and counts the step.
pub(crate) fn apply(state: &mut State, config: &Change<'_>, total: Total) {
    let (step, lr) = (state.step + 1, config.lr);
    let clip = (config.optim.clip / total.norm.max(1e-12)).min(1.0) as f32;
    let rules = optim::rules(config.optim, &state.params);
    let params = Arc::make_mut(&mut state.params);
    let ema_decay = config.ema.min((1.0 + step as f64) / (10.0 + step as f64)) as f32;
    let shapes: Vec<(String, Vec<usize>)> =
        (0..params.len()).map(|i| (params.get(i).0.to_string(), params.get(i).1.to_vec())).collect();
    // Weights are changed by all workers, each taking every n-th of its rule.
    let mut lanes: Vec<Vec<Job>> = (0..config.workers).map(|_| Vec::new()).collect();
    let mut turn = [0usize; 2];
    for (((((weights, ema), moments), grad), rule), (name, shape)) in params
        .all_values_mut()
        .zip(state.ema.all_values_mut())
        .zip(&mut state.moments)
        .zip(total.grads)
        .zip(rules)
        .zip(shapes)
    {
        if grad.is_empty() || !is_chosen(config.only, &name) || name.starts_with("codec.") {
            continue;
        }
        let kind = usize::from(rule == optim::Rule::Muon);
        lanes[turn[kind] % config.workers].push(Job { rule, shape, weights, ema, moments, grad });
        turn[kind] += 1;
    }
    std::thread::scope(|scope| {
        for lane in &mut lanes {
            scope.spawn(move || {
                for job in lane {
                    for g in &mut job.grad {
                        *g *= clip;
                    }
                    let optim = config.optim;
                    optim::update(optim, job.rule, &job.shape, job.weights, &job.grad, job.moments, lr, step);
                    for (e, w) in job.ema.iter_mut().zip(job.weights.iter()) {
                        *e = ema_decay * *e + (1.0 - ema_decay) * w;
                    }
                }
            });
        }
    });
    state.step = step;
}

pub(crate) fn add_grads(sums: &mut Vec<Vec<f32>>, grads: Vec<Vec<f32>>) {
    if sums.is_empty() {
        *sums = grads;
        return;
    }
    for (sum, g) in sums.iter_mut().zip(grads) {
        if sum.is_empty() {
            *sum = g;
        } else if !g.is_empty() {
            accumulate(sum, &g);
        }
    }
}
