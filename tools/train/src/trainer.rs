//! The training loop: seeded, resumable exactly, with the same numbers for the same number of workers.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use mindseye_world::{Colour, Rng};
use serde::{Deserialize, Serialize};

use crate::ahead::{Maker, Supply};
use crate::autograd::{Device, EagerDevice, Settings};
use crate::checkpoint::{Origin, Pending, State};
use crate::clips::Clips;
use crate::codec_fit::codec_of;
use crate::config::{Difficulties, Kind, TrainConfig};
use crate::data::{Codec, Source, Worlds};
use crate::distill::Teacher;
use crate::eager::{Eager, Params};
use crate::error::{TrainError, io};
use crate::evaluation::{Eval, evaluate};
use crate::family::HouseModel;
use crate::net::{self, Draw, Losses};
use crate::ranks::{RankError, Ranks};
use crate::run::{self, CHECKPOINT, Pace, Run, Speed};
use crate::step::{Change, Recipe, Worker, finish, save, sums};

/// One line of the metrics file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Step.
    pub step: u64,
    /// Samples seen.
    pub samples: u64,
    /// Learning rate.
    pub lr: f64,
    /// Losses, means since the last line.
    pub losses: Losses,
    /// Largest gradient norm since the last line.
    pub grad_norm: f64,
    /// Evaluation on unseen houses, on lines where it ran.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval: Option<Eval>,
    /// The same in each of several worlds by itself.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub worlds: BTreeMap<String, Eval>,
    /// Losses on clips that are kept apart, on the same lines.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub held_out: Option<Losses>,
}

/// A run in a directory: `checkpoint.safetensors`, `metrics.jsonl`.
pub struct Trainer<D: Device = EagerDevice> {
    /// Configuration.
    pub config: TrainConfig,
    /// Model.
    pub model: HouseModel,
    /// Weights and optimiser.
    pub state: State,
    worlds: Worlds,
    workers: Vec<Worker<D::Interpreter>>,
    teacher: Option<Teacher>,
    clips: Option<(Arc<Clips>, Codec)>,
    ranks: Option<Ranks>,
    out: PathBuf,
    schedule: u64,
}

/// Where each of these workers gets its samples from.
fn supplies(
    workers: Range<usize>,
    config: &TrainConfig,
    model: &HouseModel,
    worlds: &Worlds,
    codec: Option<&Codec>,
    clips: Option<&(Arc<Clips>, Codec)>,
) -> Vec<Supply> {
    let shared = Arc::new(config.clone());
    workers
        .map(|worker| {
            let (config, model, worlds) = (shared.clone(), model.clone(), worlds.clone());
            let (codec, clips) = (codec.cloned(), clips.cloned());
            Supply::new(shared.render_threads, move || Maker {
                config: config.clone(),
                clips: clips.clone(),
                worker,
                source: Source::new(&model, &worlds, codec.clone())
                    .varied(config.variety)
                    .guided(config.guide),
            })
        })
        .collect()
}

/// What a run is opened with, besides its configuration.
#[derive(Default)]
pub struct OpenOptions {
    /// Clips to train on, where the configuration asks for them.
    pub clips: Option<Clips>,
    /// Weights of the teacher, where the configuration asks for one.
    pub teacher: Option<Params>,
    /// Go on even from a checkpoint of another configuration or other data, as long as its weights fit.
    pub other_configuration: bool,
    /// This process among those that train together, where there are several. The configuration's workers are those of
    /// all ranks.
    pub ranks: Option<Ranks>,
}

/// This process's workers among those of the configuration.
fn own_workers(config: &TrainConfig, ranks: Option<&Ranks>) -> Result<Range<usize>, RankError> {
    ranks.map_or(Ok(0..config.workers), |ranks| ranks.workers(config.workers))
}

/// What must be the same in all ranks, besides the step.
fn note(config: &TrainConfig, origin: &Origin) -> String {
    format!("{} {} {}", toml::to_string(config).unwrap_or_default(), origin.model, origin.data)
}

/// Ids of words are made from the indices of colours and kinds: the model's list has to be in their order.
fn check_words(name: &Difficulties, worlds: &Worlds, words: &[String]) -> Result<(), TrainError> {
    let wanted = Colour::ALL.iter().map(|c| c.name()).chain(worlds.nouns().iter().map(|k| k.name()));
    for (at, wanted) in wanted.enumerate() {
        let found = words.get(at).map_or("", String::as_str);
        if found != wanted {
            return Err(TrainError::Words {
                difficulty: name.to_string(),
                at,
                found: found.to_owned(),
                wanted,
            });
        }
    }
    Ok(())
}

impl Trainer {
    /// Opens a run on the CPU: goes on from its checkpoint, or starts.
    ///
    /// # Errors
    /// When the directory cannot be used or holds a checkpoint of another model, configuration or other data.
    pub fn open(config: TrainConfig, model: HouseModel, out: &Path) -> Result<Self, TrainError> {
        Self::open_on(&EagerDevice, config, model, out, OpenOptions::default())
    }
}

impl<D: Device> Trainer<D> {
    /// [`Trainer::open`] on any device, with options.
    ///
    /// # Errors
    /// As [`Trainer::open`]; also when the configuration asks for clips and none are given.
    pub fn open_on(
        device: &D,
        config: TrainConfig,
        model: HouseModel,
        out: &Path,
        options: OpenOptions,
    ) -> Result<Self, TrainError> {
        let OpenOptions { clips, teacher, other_configuration, mut ranks } = options;
        if (config.data.kind == Kind::Clips) != clips.is_some() {
            return Err(TrainError::Options("data.kind = \"clips\" and clips go together"));
        }
        let teacher = match (&config.distill, teacher) {
            (Some(distill), Some(params)) => {
                Some((Teacher::new(distill, &model, config.shift, &params)?, params))
            }
            (None, None) => None,
            _ => return Err(TrainError::Options("[distill] and a teacher go together")),
        };
        fs::create_dir_all(out).map_err(io(out))?;
        let worlds = config.world()?;
        if clips.is_none() {
            check_words(&config.difficulty, &worlds, &model.text.words)?;
        }
        let checkpoint = out.join(CHECKPOINT);
        let identity = clips.as_ref().map_or_else(String::new, |c| c.identity().to_owned());
        let mut state = if checkpoint.exists() {
            let state = State::load(&checkpoint, &model)?;
            if !other_configuration {
                state.agrees(&checkpoint, &config, &model, &identity)?;
            }
            state
        } else if let Some(clips) = &clips {
            State::from_clips(&config, &model, &worlds, clips)?
        } else {
            State::new(&config, &model, &worlds)
        };
        state.origin.model = toml::to_string(&model).unwrap_or_default();
        state.origin.data = identity;
        let codec = codec_of(&state.params);
        let clips = clips.map(Arc::new).zip(codec.clone());
        if let Some(ranks) = &mut ranks {
            let note = note(&config, &state.origin);
            ranks.begin(&mut state, &config.only, &note)?;
        }
        let own = own_workers(&config, ranks.as_ref())?;
        let supplies = supplies(own, &config, &model, &worlds, codec.as_ref(), clips.as_ref());
        let workers = supplies
            .into_iter()
            .map(|supply| {
                let TrainConfig { only, checkpoint_blocks, bf16, .. } = &config;
                let settings = Settings { only, checkpoint_blocks: *checkpoint_blocks, bf16: *bf16 };
                Ok(Worker { interpreter: device.interpreter(settings)?, supply })
            })
            .collect::<Result<_, TrainError>>()?;
        let schedule = config.steps;
        let out = out.to_path_buf();
        let leads = ranks.as_ref().is_none_or(Ranks::leads);
        let mut trainer =
            Self { config, model, state, worlds, workers, teacher: None, clips, ranks, out, schedule };
        if let Some((teacher, params)) = teacher {
            trainer.start_from(&params, Path::new("distill.teacher"))?;
            trainer.teacher = Some(teacher);
        }
        if leads {
            run::trim_metrics(&trainer.out, trainer.state.step)?;
        }
        Ok(trainer)
    }

    /// Begins a run with the weights of `from` (see [`State::start_from`]) instead of fresh ones; a run that has
    /// begun already goes on as it is.
    ///
    /// # Errors
    /// When no weight fits.
    pub fn start_from(&mut self, from: &Params, path: &Path) -> Result<Vec<String>, TrainError> {
        if self.state.step > 0 {
            return Ok(Vec::new());
        }
        let fresh = self.state.start_from(from, path)?;
        if let Some(ranks) = &mut self.ranks {
            let note = note(&self.config, &self.state.origin);
            ranks.begin(&mut self.state, &self.config.only, &note)?;
        }
        let codec = codec_of(&self.state.params);
        if let (Some((_, own)), Some(codec)) = (&mut self.clips, &codec) {
            own.clone_from(codec);
        }
        let own = own_workers(&self.config, self.ranks.as_ref())?;
        let supplies =
            supplies(own, &self.config, &self.model, &self.worlds, codec.as_ref(), self.clips.as_ref());
        for (worker, supply) in self.workers.iter_mut().zip(supplies) {
            worker.supply = supply;
        }
        Ok(fresh)
    }

    /// The learning rate follows a run of this many steps, even when fewer are done now.
    pub fn schedule_steps(&mut self, steps: u64) {
        self.schedule = steps;
    }

    /// Runs until the configured number of steps or until `stop`, which takes effect between two passes; the
    /// checkpoint is written then, and a run that goes on from it is the same run. `progress` gets every metrics
    /// line and the speed.
    ///
    /// # Errors
    /// When the loss is no longer finite or a file cannot be written.
    pub fn run(
        &mut self,
        stop: &AtomicBool,
        progress: impl FnMut(&Metrics, Speed),
    ) -> Result<(), TrainError> {
        run::drive(self, stop, progress)?;
        if let Some(ranks) = &mut self.ranks {
            ranks.leave();
        }
        Ok(())
    }

    /// Losses on clips that are kept apart: as many as `eval_houses`, always the same, without dropping.
    fn held_out(&self) -> Result<Option<Losses>, TrainError> {
        let Some((clips, codec)) = self.clips.as_ref().filter(|(c, _)| c.has_held_out()) else {
            return Ok(None);
        };
        let (c, count) = (&self.config, self.config.eval_houses.max(1));
        let mut eager = Eager::new(self.state.params.clone(), false);
        let mut sum = Losses::default();
        for i in 0..count {
            let mut rng = Rng::new(0x4e1d_0000 + i as u64);
            let samples = [clips.sample(rng.next_u64(), c.navigate, false, codec)?];
            let values = samples[0].latents.len();
            let draws = [Draw::new(&mut rng, values, c.high_noise, c.shift, 0.0, c.one_way)];
            eager.restart(self.state.params.clone());
            let out = net::forward(&mut eager, &self.model, &samples, &draws);
            sum.add(&net::losses(&eager, &self.model, &samples, &draws, &out, &c.loss, count).0);
        }
        Ok(Some(sum))
    }
}

impl<D: Device> Run for Trainer<D> {
    type Line = Metrics;

    fn pace(&self) -> Pace {
        let TrainConfig { steps, batch, log_every, checkpoint_every, .. } = self.config;
        Pace { steps, batch, log_every, checkpoint_every }
    }

    fn state(&mut self) -> &mut State {
        &mut self.state
    }

    fn step(&mut self, stop: &AtomicBool) -> Result<Option<(Losses, f64)>, TrainError> {
        let step = self.state.step + 1;
        let recipe = Recipe { config: &self.config, model: &self.model, teacher: self.teacher.as_ref() };
        // Ranks have agreed to make this step: only the loss of one breaks it off.
        let stop = self.ranks.as_ref().map_or(stop, Ranks::lost);
        let shares = recipe.shares(&mut self.workers, &self.state.params, step, stop)?;
        let Some(shares) = shares else {
            return self.ranks.as_ref().map_or(Ok(None), |r| Err(r.loss().into()));
        };
        let sum = sums(shares, self.state.params.len());
        let (TrainConfig { optim, ema, only, .. }, workers) = (&self.config, self.workers.len());
        let lr = self.config.lr(step, self.schedule);
        let change = Change { optim, ema: *ema, only, workers, lr, mine: &[] };
        finish(&mut self.state, self.ranks.as_mut(), &change, sum).map(Some)
    }

    fn waited(&mut self) -> Duration {
        let workers = self.workers.len() as u32;
        self.workers.iter_mut().map(|w| w.supply.waited()).sum::<Duration>() / workers
    }

    fn line(&mut self, since: Pending) -> Result<Metrics, TrainError> {
        let step = self.state.step;
        let eval = step.is_multiple_of(self.config.eval_every);
        let houses = self.config.data.kind == Kind::House || self.config.data.house > 0.0;
        let measure = |worlds: &Worlds| {
            let houses = self.config.eval_houses;
            evaluate(&self.model, worlds, &self.state.params, houses, self.config.guide)
        };
        let mut worlds = BTreeMap::new();
        if let (true, true, Difficulties::Shares(shares)) = (eval, houses, &self.config.difficulty) {
            for name in shares.keys() {
                worlds.insert(name.clone(), measure(&Difficulties::One(name.clone()).worlds()?));
            }
        }
        Ok(Metrics {
            step,
            samples: step * self.config.batch as u64,
            lr: self.config.lr(step, self.schedule),
            losses: since.losses.scaled(1.0 / since.steps as f64),
            grad_norm: since.norm_max,
            eval: (eval && houses).then(|| measure(&self.worlds)),
            worlds,
            held_out: if eval { self.held_out()? } else { None },
        })
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let path = self.out.join(CHECKPOINT);
        save(&mut self.state, self.ranks.as_mut(), &path, &self.config)
    }

    fn ranks(&mut self) -> Option<&mut Ranks> {
        self.ranks.as_mut()
    }

    fn directory(&self) -> &Path {
        &self.out
    }
}
