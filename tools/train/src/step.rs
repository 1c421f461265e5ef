//! One optimiser step: workers take samples and make gradients of a fixed share of the batch each, the sums are taken in
//! their order, and all weights are changed.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::ahead::{Made, Supply};
use crate::autograd::{Autograd, DeviceError};
use crate::checkpoint::State;
use crate::config::TrainConfig;
use crate::distill::Teacher;
use crate::eager::backward::accumulate;
use crate::eager::{Params, is_chosen};
use crate::error::TrainError;
use crate::family::HouseModel;
use crate::net::{self, Losses};
use crate::optim::{self, Moments, OptimConfig};
use crate::ranks::Ranks;

/// What one worker brings back from a step.
pub(crate) struct Share {
    pub(crate) losses: Losses,
    pub(crate) grads: Vec<Vec<f32>>,
}

/// What one worker works with.
pub(crate) struct Worker<A> {
    pub(crate) interpreter: A,
    pub(crate) supply: Supply,
}

/// What a worker's thread brought back; a device that failed unwinds (see [`Autograd`]).
pub(crate) fn joined<T>(handle: std::thread::ScopedJoinHandle<'_, T>) -> Result<T, TrainError> {
    handle.join().map_err(|payload| match payload.downcast::<DeviceError>() {
        Ok(error) => TrainError::Device(*error),
        Err(payload) => std::panic::resume_unwind(payload),
    })
}

/// What all workers of a step read.
#[derive(Clone, Copy)]
pub(crate) struct Recipe<'a> {
    pub(crate) config: &'a TrainConfig,
    pub(crate) model: &'a HouseModel,
    pub(crate) teacher: Option<&'a Teacher>,
}

impl Recipe<'_> {
    /// The shares of all workers in their order; none when `stop` came between two passes.
    pub(crate) fn shares<A: Autograd + Send>(
        self,
        workers: &mut [Worker<A>],
        params: &Arc<Params>,
        step: u64,
        stop: &AtomicBool,
    ) -> Result<Option<Vec<Share>>, TrainError> {
        std::thread::scope(|scope| {
            let handles: Vec<_> = workers
                .iter_mut()
                .map(|worker| {
                    let params = params.clone();
                    scope.spawn(move || self.share(worker, &params, step, stop))
                })
                .collect();
            // All are waited for, whatever the first one says.
            let done: Vec<_> = handles.into_iter().map(|h| joined(h)?).collect();
            done.into_iter().collect()
        })
    }

    fn share<A: Autograd>(
        self,
        worker: &mut Worker<A>,
        params: &Arc<Params>,
        step: u64,
        stop: &AtomicBool,
    ) -> Result<Option<Share>, TrainError> {
        let config = self.config;
        let Made { samples, mut draws, mut rng } = worker.supply.take(step)?;
        if let Some(teacher) = self.teacher {
            teacher.teach(&mut worker.interpreter, &mut rng, &samples, &mut draws);
        }
        let part = samples.len() / config.accumulate;
        let (mut losses, e) = (Losses::default(), &mut worker.interpreter);
        for (samples, draws) in samples.chunks(part).zip(draws.chunks(part)) {
            if stop.load(Ordering::Relaxed) {
                // What the parts before have summed belongs to no step.
                e.take_grads();
                return Ok(None);
            }
            e.restart(params.clone());
            let out = net::forward(e, self.model, samples, draws);
            let (part, grads) = net::losses(e, self.model, samples, draws, &out, &config.loss, config.batch);
            e.backward(grads);
            losses.add(&part);
        }
        let grads = e.take_grads();
        e.clear();
        Ok(Some(Share { losses, grads }))
    }
}

/// Sums of losses and gradients of a batch.
struct Total {
    losses: Losses,
    /// Norm of all gradients together.
    norm: f64,
    /// By weight; empty where a weight has none.
    grads: Vec<Vec<f32>>,
}

/// Sums the shares in their order.
pub(crate) fn sums(shares: Vec<Share>, weights: usize) -> Share {
    let mut sum = Share { losses: Losses::default(), grads: vec![Vec::new(); weights] };
    for share in shares {
        sum.losses.add(&share.losses);
        add_grads(&mut sum.grads, share.grads);
    }
    sum
}

impl Total {
    /// The whole batch.
    fn of(Share { losses, grads }: Share) -> Self {
        let norm = grads.iter().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        Self { losses, norm, grads }
    }

    fn is_finite(&self) -> bool {
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
#[derive(Clone, Copy)]
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
    /// Which weights this rank changes; empty = all.
    pub(crate) mine: &'a [bool],
}

/// Whether a weight is trained: it is chosen, and not the codec's.
pub(crate) fn is_trained(only: &[String], name: &str) -> bool {
    is_chosen(only, name) && !name.starts_with("codec.")
}

/// Changes all weights by their gradients and counts the step.
fn apply(state: &mut State, config: &Change<'_>, total: Total) {
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
    for (i, (((((weights, ema), moments), grad), rule), (name, shape))) in params
        .all_values_mut()
        .zip(state.ema.all_values_mut())
        .zip(&mut state.moments)
        .zip(total.grads)
        .zip(rules)
        .zip(shapes)
        .enumerate()
    {
        let mine = config.mine.get(i).copied().unwrap_or(true);
        if grad.is_empty() || !mine || !is_trained(config.only, &name) {
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

/// Ends a step with the sum of this process's shares: sums over ranks, changes the weights, gives them to the other ranks.
/// Losses and gradient norm of the whole batch.
///
/// # Errors
/// [`TrainError::Diverged`] where a loss or gradient is no number; nothing has changed then. A rank that is lost.
pub(crate) fn finish(
    state: &mut State,
    ranks: Option<&mut Ranks>,
    change: &Change<'_>,
    mut sum: Share,
) -> Result<(Losses, f64), TrainError> {
    let Some(ranks) = ranks else { return change_all(state, change, sum) };
    ranks.sum(&mut sum.losses, &mut sum.grads, &state.params)?;
    let done = change_all(state, &Change { mine: ranks.mine(), ..*change }, sum)?;
    ranks.exchange(Arc::make_mut(&mut state.params))?;
    Ok(done)
}

fn change_all(state: &mut State, change: &Change<'_>, sum: Share) -> Result<(Losses, f64), TrainError> {
    let total = Total::of(sum);
    if !total.is_finite() {
        return Err(TrainError::Diverged(state.step + 1));
    }
    let done = (total.losses, total.norm);
    apply(state, change, total);
    Ok(done)
}

/// Writes the checkpoint of a run, of which every rank has a part.
pub(crate) fn save(
    state: &mut State,
    ranks: Option<&mut Ranks>,
    path: &Path,
    config: &impl Serialize,
) -> Result<(), TrainError> {
    match ranks {
        None => state.save(path, config),
        Some(ranks) => ranks.with_whole(state, |whole| whole.save(path, config)),
    }
}

fn add_grads(sums: &mut Vec<Vec<f32>>, grads: Vec<Vec<f32>>) {
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
