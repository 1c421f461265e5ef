//! Samples of a step, and threads that make them ahead of it.
//!
//! What a step trains on is a function of its number, so it does not matter who makes it, or when: a run is the same with
//! any number of threads. Thread `i` of a worker makes every `render_threads`-th of its steps and waits while one that
//! nobody has taken is ready, so as many steps are in memory as there are threads, and the ones being made.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use mindseye_world::Rng;

use crate::clips::Clips;
use crate::config::TrainConfig;
use crate::data::{Codec, Sample, Source, Task};
use crate::error::TrainError;
use crate::net::Draw;

/// What one worker trains on in one step.
pub(crate) struct Made {
    pub(crate) samples: Vec<Sample>,
    pub(crate) draws: Vec<Draw>,
    /// For what the worker draws besides.
    pub(crate) rng: Rng,
}

/// Makes what one worker trains on.
pub(crate) struct Maker {
    pub(crate) config: Arc<TrainConfig>,
    pub(crate) clips: Option<(Arc<Clips>, Codec)>,
    pub(crate) worker: usize,
    pub(crate) source: Source,
}

impl Maker {
    fn make(&mut self, step: u64) -> Result<Made, TrainError> {
        let config = self.config.clone();
        let mut rng = Rng::new(config.seed ^ (step << 8) ^ self.worker as u64);
        let (per, repeated) = (config.batch / config.workers, config.noise_draws);
        let mut samples = Vec::with_capacity(per);
        while samples.len() < per {
            let sample = self.sample(&mut rng)?;
            samples.extend(std::iter::repeat_n(sample, repeated));
        }
        let draws = samples
            .iter()
            .map(|s| {
                let (values, c) = (s.latents.len(), &config);
                let draw = Draw::new(&mut rng, values, c.high_noise, c.shift, c.drop, c.one_way);
                Draw { guided: c.guide.is_some_and(|guide| !rng.chance(guide.dropped)), ..draw }
            })
            .collect();
        Ok(Made { samples, draws, rng })
    }

    /// One sample of a clip, or of a house where there are no clips or houses are mixed in.
    fn sample(&mut self, rng: &mut Rng) -> Result<Sample, TrainError> {
        let config = &self.config;
        if let Some((clips, codec)) = &self.clips
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
        Ok(self.source.sample(rng.next_u64(), task, true))
    }
}

type Lane = Receiver<(u64, Result<Made, TrainError>)>;

/// A thread that makes every `stride`-th step from `first` on, until nobody takes them.
fn lane(mut maker: Maker, first: u64, stride: u64) -> Lane {
    let (give, take) = sync_channel(0);
    std::thread::spawn(move || {
        let mut step = first;
        while give.send((step, maker.make(step))).is_ok() {
            step += stride;
        }
    });
    take
}

/// Where a worker gets its samples from.
pub(crate) struct Supply {
    maker: Box<dyn Fn() -> Maker + Send>,
    /// Makes samples where there are no threads.
    here: Option<Maker>,
    threads: u64,
    lanes: Vec<Lane>,
    /// Step that the first lane began with, and the next step.
    first: u64,
    next: u64,
    waited: Duration,
}

impl Supply {
    /// Samples made by this many threads; by the worker itself where there are none.
    pub(crate) fn new(threads: usize, maker: impl Fn() -> Maker + Send + 'static) -> Self {
        Self {
            maker: Box::new(maker),
            here: None,
            threads: threads as u64,
            lanes: Vec::new(),
            first: 0,
            next: 0,
            waited: Duration::ZERO,
        }
    }

    /// What this step trains on.
    pub(crate) fn take(&mut self, step: u64) -> Result<Made, TrainError> {
        let began = Instant::now();
        let made = self.get(step);
        self.waited += began.elapsed();
        made
    }

    /// How long [`Supply::take`] has taken since the last call: the device waited.
    pub(crate) fn waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    fn get(&mut self, step: u64) -> Result<Made, TrainError> {
        if self.threads == 0 {
            return self.here.get_or_insert_with(&self.maker).make(step);
        }
        // A step that was broken off is asked for again: the threads begin anew.
        if self.lanes.is_empty() || step != self.next {
            self.first = step;
            self.lanes = (0..self.threads).map(|i| lane((self.maker)(), step + i, self.threads)).collect();
        }
        self.next = step + 1;
        let lane = &self.lanes[((step - self.first) % self.threads) as usize];
        let (made_for, made) = lane.recv().expect("a thread that makes samples panicked");
        assert_eq!(made_for, step, "steps are taken in turn");
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_world::Difficulty;

    /// What tells samples apart that are not encoded.
    fn shown(made: &Made) -> Vec<(u64, Vec<f32>, Vec<usize>)> {
        made.samples.iter().map(|s| (s.house_seed, s.camera.clone(), s.context_index.clone())).collect()
    }

    fn supply(threads: usize, change: impl Fn(&mut TrainConfig)) -> Supply {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/train/model.toml");
        let model = crate::family::HouseModel::load(std::path::Path::new(path)).expect("a configuration");
        let text = include_str!("../../../tests/data/train/train.toml");
        let mut config: TrainConfig = toml::from_str(text).expect("a configuration");
        change(&mut config);
        let config = Arc::new(config);
        Supply::new(threads, move || Maker {
            config: config.clone(),
            clips: None,
            worker: 1,
            source: Source::new(&model, Difficulty::plain(), None),
        })
    }

    #[test]
    fn samples_are_the_same_with_any_number_of_threads_and_from_any_step_on() {
        let mut here = supply(0, |_| {});
        let wanted: Vec<Made> = (5..12).map(|step| here.take(step).expect("houses")).collect();
        assert!(here.waited() > Duration::ZERO && here.waited() == Duration::ZERO);
        for threads in [1, 3] {
            let mut ahead = supply(threads, |_| {});
            // Steps 7 and 8 are asked for twice, as after a step that was broken off.
            for step in [5, 6, 7, 8, 7, 8, 9, 10, 11] {
                let (got, wanted) = (ahead.take(step).expect("houses"), &wanted[step as usize - 5]);
                assert_eq!(shown(&got), shown(wanted), "step {step}, {threads} threads");
                assert!(got.draws.iter().zip(&wanted.draws).all(|(a, b)| a.noise == b.noise && a.s == b.s));
            }
        }
        assert_ne!(shown(&wanted[0]), shown(&wanted[1]));
    }

    #[test]
    fn a_sample_serves_for_several_draws_of_noise() {
        let made = supply(0, |c| (c.batch, c.workers, c.noise_draws) = (8, 2, 2)).take(3).expect("houses");
        assert_eq!((made.samples.len(), made.draws.len()), (4, 4));
        let shown = shown(&made);
        assert_eq!(shown[0], shown[1]);
        assert_ne!(shown[1], shown[2]);
        // Latents are empty without a codec, so the levels tell draws apart.
        assert_ne!(made.draws[0].s, made.draws[1].s);
    }
}
