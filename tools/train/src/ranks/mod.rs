//! Ranks: processes that train one model together, each on a device of its own (data parallel).
//!
//! Every rank has all weights and makes the gradients of its workers' shares of a batch; gradients are summed over ranks,
//! so that each has those of the whole batch. Optimiser state is shared out (ZeRO-1): averages and moments of a weight are
//! with one rank, its owner, which changes it and gives it to the others. The first rank writes metrics and checkpoints,
//! for which it collects what the others own; a checkpoint is that of a run with one rank and can go on with any number.
//!
//! `torchrun`, SLURM and Kubernetes start the processes; [`Place::from_environment`] reads what they say. Ranks find each
//! other, and notice that one is lost, over a TCP connection of each to the first (`watch`). What they compute goes through a [`Collective`].

mod watch;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use mindseye_base::file::sha256_bytes;

use crate::autograd::Device;
use crate::checkpoint::State;
use crate::eager::Params;
use crate::net::Losses;
use crate::step::is_trained;
use watch::Watch;

/// What ranks do with values together. All ranks make the same calls in the same order, with as many values.
pub trait Collective: Send {
    /// Replaces the values by their sums over all ranks; every rank gets the same bits.
    ///
    /// # Errors
    /// What failed, in one line; also after [`Collective::aborter`] was called.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), String>;

    /// Replaces the values of all ranks by those of `root`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), String>;

    /// What ends a call that waits for a rank that is lost, from another thread.
    fn aborter(&self) -> Box<dyn Fn() + Send>;
}

/// A library for what ranks do together, such as NCCL.
pub trait Library {
    /// What all ranks need to know before they can begin, made by the first one.
    ///
    /// # Errors
    /// What the library said.
    fn identity(&self) -> Result<Vec<u8>, RankError>;

    /// Begins, in every rank, with the first one's identity.
    ///
    /// # Errors
    /// As [`Library::identity`].
    fn collective(&self, place: &Place, identity: &[u8]) -> Result<Box<dyn Collective>, RankError>;
}

/// Why ranks cannot train together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// A variable of the environment is missing or makes no sense.
    #[error(
        "{name}={value}: expected {expected}; several ranks are started by torchrun, SLURM or Kubernetes"
    )]
    Environment {
        /// The variable.
        name: &'static str,
        /// Its value; empty where it is missing.
        value: String,
        /// What it should be.
        expected: String,
    },
    /// The ranks cannot share out the workers.
    #[error("workers = {workers} must be a multiple of the number of ranks, {ranks}: each has as many")]
    Workers {
        /// Workers of the configuration.
        workers: usize,
        /// Number of ranks.
        ranks: usize,
    },
    /// The first rank cannot be reached, or cannot listen.
    #[error(
        "rank {rank}: {address}: {source}; MASTER_ADDR must name the machine of rank 0, and the port after MASTER_PORT be free there"
    )]
    Meet {
        /// This rank.
        rank: usize,
        /// Where ranks meet.
        address: String,
        /// What happened.
        source: io::Error,
    },
    /// Some ranks did not come.
    #[error("ranks {missing:?} did not come within {seconds:.0} s")]
    Absent {
        /// Who.
        missing: Vec<usize>,
        /// How long they were waited for.
        seconds: f64,
    },
    /// A process that does not belong to these ranks.
    #[error(
        "a process came as rank {rank} of {ranks}, but this is a run of {wanted}, and each rank comes once"
    )]
    Stranger {
        /// What it said it was.
        rank: usize,
        /// Of how many.
        ranks: usize,
        /// Ranks here.
        wanted: usize,
    },
    /// A rank has ended or gives no sign of life.
    #[error(
        "rank {0} is lost: it has ended, or gave no sign of life; this rank ends too. Start all ranks again: the run goes on from the last checkpoint"
    )]
    Lost(usize),
    /// A rank would go on from another state, or with another configuration.
    #[error("rank {0} has another configuration or checkpoint than rank 0: all must read the same files")]
    Other(usize),
    /// What ranks do together failed.
    #[error("rank {rank}: {operation} over all ranks: {reason}")]
    Collective {
        /// This rank.
        rank: usize,
        /// What was done.
        operation: &'static str,
        /// What went wrong, in one line.
        reason: String,
    },
    /// The device's library for ranks cannot be used.
    #[error("{0}")]
    Library(String),
    /// This device computes alone.
    #[error(
        "WORLD_SIZE={ranks}: several ranks need NCCL and one GPU each: --device cuda; this device computes alone"
    )]
    Alone {
        /// Number of ranks.
        ranks: usize,
    },
}

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Until all have come.
    pub meet: Duration,
    /// Between signs of life.
    pub beat: Duration,
    /// Without a sign of life until a rank is lost. One that has ended is lost at once.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let [meet, beat, silence] = [300, 1, 10].map(Duration::from_secs);
        Self { meet, beat, silence }
    }
}

/// Which of how many ranks this process is, and where they meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// Which of the ranks on this machine: the number of its GPU.
    pub local: usize,
    /// Host and port at which rank 0 listens.
    pub address: String,
    /// How long ranks wait for each other.
    pub patience: Patience,
}

impl Place {
    /// The place that `RANK`, `WORLD_SIZE`, `LOCAL_RANK` (0 unless given), `MASTER_ADDR` and `MASTER_PORT` (29500 unless
    /// given) say; none where there is one rank only. Rank 0 listens at the port after `MASTER_PORT`, at which torchrun itself
    /// listens.
    ///
    /// # Errors
    /// [`RankError::Environment`] names the variable.
    pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, RankError> {
        let number = |name: &'static str, otherwise: Option<usize>, most: usize| {
            let value = get(name);
            let parsed = value.as_ref().map_or(otherwise, |text| text.trim().parse().ok());
            parsed.filter(|n| *n <= most).ok_or_else(|| RankError::Environment {
                name,
                value: value.unwrap_or_default(),
                expected: format!("a number up to {most}"),
            })
        };
        if get("WORLD_SIZE").is_none() && get("RANK").is_none() {
            return Ok(None);
        }
        let ranks = number("WORLD_SIZE", None, 1 << 20)?;
        if ranks == 1 {
            return Ok(None);
        }
        let rank = number("RANK", None, ranks.saturating_sub(1))?;
        let local = number("LOCAL_RANK", Some(0), rank)?;
        let host = get("MASTER_ADDR").filter(|host| !host.trim().is_empty()).ok_or_else(|| {
            let expected = "the machine of rank 0".to_owned();
            RankError::Environment { name: "MASTER_ADDR", value: String::new(), expected }
        })?;
        let port = number("MASTER_PORT", Some(29_500), 65_534)? + 1;
        let host = host.trim();
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        Ok(Some(Self { rank, ranks, local, address, patience: Patience::default() }))
    }
}

/// This process among the ranks.
pub struct Ranks {
    place: Place,
    collective: Box<dyn Collective>,
    watch: Watch,
    /// Owner of each weight; none where it is not trained.
    owners: Vec<Option<usize>>,
    mine: Vec<bool>,
}

/// Owner of each weight by size, none where a size is 0: the largest first, each to the rank that has least.
fn owners(sizes: &[usize], ranks: usize) -> Vec<Option<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).filter(|i| sizes[*i] > 0).collect();
    order.sort_by_key(|i| std::cmp::Reverse(sizes[*i]));
    let (mut load, mut out) = (vec![0; ranks], vec![None; sizes.len()]);
    for i in order {
        let least = (0..ranks).min_by_key(|r| load[*r]).unwrap_or(0);
        load[least] += sizes[i];
        out[i] = Some(least);
    }
    out
}

impl Ranks {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// [`RankError`] says who is missing, or what the device lacks.
    pub fn join(place: Place, device: &impl Device) -> Result<Self, RankError> {
        let library = device.library(&place)?;
        let identity = if place.rank == 0 { Some(library.identity()?) } else { None };
        let (watch, identity) = Watch::meet(&place, identity)?;
        let collective = library.collective(&place, &identity)?;
        watch.on_loss(collective.aborter());
        Ok(Self { place, collective, watch, owners: Vec::new(), mine: Vec::new() })
    }

    /// Whether this is the rank that writes files and reports.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.place.rank == 0
    }

    /// Numbers of this rank's workers among all `workers`.
    pub(crate) fn workers(&self, workers: usize) -> Result<std::ops::Range<usize>, RankError> {
        let Place { rank, ranks, .. } = self.place;
        if !workers.is_multiple_of(ranks) {
            return Err(RankError::Workers { workers, ranks });
        }
        let each = workers / ranks;
        Ok(rank * each..(rank + 1) * each)
    }

    /// Set when a rank is lost: what computes ends then.
    pub(crate) fn lost(&self) -> &AtomicBool {
        self.watch.lost()
    }

    /// Who is lost.
    pub(crate) fn loss(&self) -> RankError {
        RankError::Lost(self.watch.who(Duration::ZERO).unwrap_or(self.place.rank))
    }

    /// Says goodbye: the others do not take this rank for lost when it ends.
    pub(crate) fn leave(&mut self) {
        self.watch.leave();
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), RankError> {
        let done = self.collective.all_reduce(values);
        self.done("sum", done)
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), RankError> {
        let done = self.collective.broadcast(root, values);
        self.done("broadcast", done)
    }

    /// A call fails where a rank is lost: then that is said, as soon as it is known.
    fn done(&self, operation: &'static str, done: Result<(), String>) -> Result<(), RankError> {
        let lost = match done {
            Ok(()) => self.watch.who(Duration::ZERO),
            Err(_) => self.watch.who(self.place.patience.silence),
        };
        match (lost, done) {
            (Some(rank), _) => Err(RankError::Lost(rank)),
            (None, Err(reason)) => Err(RankError::Collective { rank: self.place.rank, operation, reason }),
            (None, Ok(())) => Ok(()),
        }
    }

    /// Whether any rank says so.
    pub(crate) fn any(&mut self, here: bool) -> Result<bool, RankError> {
        let mut votes = [f32::from(u8::from(here))];
        self.all_reduce(&mut votes)?;
        Ok(votes[0] > 0.0)
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// When one is lost.
    pub fn wait(&mut self) -> Result<(), RankError> {
        self.any(false).map(|_| ())
    }

    /// Begins or goes on from a state that all ranks have read: refuses ranks with another one, and keeps of averages and
    /// moments what this rank owns. `note` is what must be the same.
    pub(crate) fn begin(&mut self, state: &mut State, only: &[String], note: &str) -> Result<(), RankError> {
        let digest = sha256_bytes(format!("{} {note}", state.step).as_bytes());
        let mut there = digest.map(f32::from);
        self.broadcast(0, &mut there)?;
        let differs = there != digest.map(f32::from);
        let Place { rank, ranks, .. } = self.place;
        let mut others = vec![0.0; ranks];
        others[rank] = f32::from(u8::from(differs));
        let done = self.collective.all_reduce(&mut others);
        // Before who is lost: a rank that has read this sooner ends for the same reason.
        if let Some(other) = others.iter().position(|o| *o > 0.0).filter(|_| done.is_ok()) {
            return Err(RankError::Other(other));
        }
        self.done("sum", done)?;
        let params = Arc::make_mut(&mut state.params);
        let sizes: Vec<usize> = (0..params.len())
            .map(|i| if is_trained(only, params.get(i).0) { params.get(i).2.len() } else { 0 })
            .collect();
        self.owners = owners(&sizes, ranks);
        self.mine = self.owners.iter().map(|owner| *owner == Some(rank)).collect();
        for values in params.all_values_mut() {
            self.broadcast(0, values)?;
        }
        self.keep_own(state);
        Ok(())
    }

    /// Which weights this rank changes.
    pub(crate) fn mine(&self) -> &[bool] {
        &self.mine
    }

    fn keep_own(&self, state: &mut State) {
        for (i, owner) in self.owners.iter().enumerate() {
            if owner.is_some_and(|owner| owner != self.place.rank) {
                state.ema.release(i);
                state.moments[i] = crate::optim::Moments::default();
            }
        }
    }

    /// Sums losses and gradients over all ranks. A weight that has a gradient anywhere has one everywhere.
    pub(crate) fn sum(
        &mut self,
        losses: &mut Losses,
        grads: &mut [Vec<f32>],
        params: &Params,
    ) -> Result<(), RankError> {
        // Each loss as two numbers: single precision is not enough for a mean of many steps.
        let parts = losses.values().map(|v| [v as f32, (v - f64::from(v as f32)) as f32]);
        let mut head: Vec<f32> = parts.into_iter().flatten().collect();
        let flags = head.len();
        head.extend(grads.iter().map(|g| f32::from(u8::from(!g.is_empty()))));
        self.all_reduce(&mut head)?;
        let sums: Vec<f64> =
            head[..flags].chunks_exact(2).map(|p| f64::from(p[0]) + f64::from(p[1])).collect();
        *losses = Losses::from_values(&sums);
        for (i, grad) in grads.iter_mut().enumerate().filter(|(i, _)| head[flags + i] > 0.0) {
            grad.resize(params.get(i).2.len(), 0.0);
            self.all_reduce(grad)?;
        }
        Ok(())
    }

    /// Gives every rank the weights that the others have changed.
    pub(crate) fn exchange(&mut self, params: &mut Params) -> Result<(), RankError> {
        for (i, values) in params.all_values_mut().enumerate() {
            if let Some(owner) = self.owners[i] {
                self.broadcast(owner, values)?;
            }
        }
        Ok(())
    }

    /// Collects averages and moments at the first rank, where `then` sees the whole state; all give back what they do not
    /// own.
    pub(crate) fn with_whole<E: From<RankError>>(
        &mut self,
        state: &mut State,
        then: impl FnOnce(&State) -> Result<(), E>,
    ) -> Result<(), E> {
        self.collect(state)?;
        let done = if self.leads() { then(state) } else { Ok(()) };
        self.keep_own(state);
        done
    }

    fn collect(&mut self, state: &mut State) -> Result<(), RankError> {
        let (rank, leads) = (self.place.rank, self.leads());
        for i in 0..self.owners.len() {
            let Some(root) = self.owners[i].filter(|root| *root != 0) else { continue };
            let moments = &mut state.moments[i];
            let mut there = [&moments.first, &moments.second].map(|m| f32::from(u8::from(!m.is_empty())));
            self.broadcast(root, &mut there)?;
            let n = state.params.get(i).2.len();
            let parts = [
                (1.0, state.ema.values_mut(i)),
                (there[0], &mut moments.first),
                (there[1], &mut moments.second),
            ];
            for (_, values) in parts.into_iter().filter(|(there, _)| *there > 0.0) {
                if root == rank {
                    self.broadcast(root, values)?;
                    continue;
                }
                let mut got = vec![0.0; n];
                self.broadcast(root, &mut got)?;
                if leads {
                    *values = got;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>, String> {
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Place::from_environment(get).map_err(|e| e.to_string())
    }

    #[test]
    fn the_place_is_read_from_the_environment() {
        assert_eq!(place(&[]), Ok(None));
        assert_eq!(place(&[("WORLD_SIZE", "1"), ("RANK", "0")]), Ok(None));
        let four = [("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node0")];
        let wanted = Place {
            rank: 3,
            ranks: 4,
            local: 1,
            address: "node0:29501".into(),
            patience: Patience::default(),
        };
        assert_eq!(place(&four), Ok(Some(wanted.clone())));
        let with = |change: &[(&'static str, &'static str)]| {
            let mut all: Vec<(&str, &str)> = change.to_vec();
            all.extend(four);
            place(&all)
        };
        let v6 = with(&[("MASTER_PORT", " 7000"), ("MASTER_ADDR", "::1")]);
        assert_eq!(v6, Ok(Some(Place { address: "[::1]:7001".into(), ..wanted })));
        for (change, said) in [
            (("WORLD_SIZE", "many"), "WORLD_SIZE=many: expected a number"),
            (("RANK", "4"), "RANK=4: expected a number up to 3"),
            (("RANK", ""), "RANK=: expected"),
            (("LOCAL_RANK", "-1"), "LOCAL_RANK=-1"),
            (("MASTER_ADDR", " "), "MASTER_ADDR=: expected the machine of rank 0"),
            (("MASTER_PORT", "65535"), "MASTER_PORT=65535"),
        ] {
            let got = with(&[change]).expect_err(said);
            assert!(got.contains(said) && !got.contains('\n'), "{got}");
        }
        let got = place(&[("RANK", "1")]).expect_err("half of it");
        assert!(got.starts_with("WORLD_SIZE=: expected"), "{got}");
    }

    #[test]
    fn optimiser_state_is_shared_out_evenly_and_each_weight_has_one_owner() {
        let sizes = [7, 0, 100, 60, 40, 5, 90, 0];
        for ranks in 1..5 {
            let owners = owners(&sizes, ranks);
            let mut load = vec![0; ranks];
            for (size, owner) in sizes.iter().zip(&owners) {
                assert_eq!(*size == 0, owner.is_none());
                if let Some(owner) = owner {
                    load[*owner] += size;
                }
            }
            let (most, least) = (load.iter().max(), load.iter().min());
            assert!(most.zip(least).is_some_and(|(m, l)| m - l <= 100), "{load:?}");
        }
    }
}
