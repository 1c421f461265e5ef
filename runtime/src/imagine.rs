//! Imagination: the sampler over the denoiser, with joint classifier-free guidance.
//!
//! A *rollout* is a short video of going to the goal, in latents: the first frame (given), motion, and at the end
//! the frames with a box around the goal. Before rollouts are sampled, each candidate is *glanced* at: a single pass at
//! a high noise level, of which only the lift heads are read. It is the best place to read the goal's pose from, and a
//! draft of the answer that a tight deadline can have. A model without heads has nothing to be glanced at: it is
//! evaluated only where a deadline makes it necessary to know what one pass costs.
//!
//! Nothing here reads a clock, draws unseeded numbers or knows a backend: the denoiser is a
//! `&mut dyn Denoise`, time comes through [`Clock`], and the caller is asked between two evaluations whether to
//! go on. The same inputs and seed give the same bits.
//!
//! Sources: Video4Spatial equations 1 and 2 and joint guidance ("both dropped together", one weight), Wan2.2's
//! first-frame conditioning, flow matching `x_s = (1 - s) x_0 + s n`.

use crate::served::{Imagine, Inputs, ServedError};
use mindseye_bridge::answer::Answer;
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised, Walk, WalkPlan};
use mindseye_engines::model::dit::Prediction;
use mindseye_engines::sampler::{
    Grid, NOISED_CONTEXT_T, Noise, Sampler, SamplerError, Schedule, Solver, Step, guide,
};
use serde::{Deserialize, Serialize};

/// Monotonic time, injected.
pub trait Clock {
    /// Time since some fixed moment; never goes backwards.
    fn now(&self) -> TimeDelta;
}

/// A clock that stands still: for tests, and where no deadline exists.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoClock;

impl Clock for NoClock {
    fn now(&self) -> TimeDelta {
        TimeDelta::ZERO
    }
}

/// What the unconditional branch of the guidance leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dropped {
    /// Context, first frame and instruction together: joint guidance.
    #[default]
    Both,
    /// The instruction alone; the context stays clean (the paper's "without context CFG").
    Instruction,
    /// Context and first frame alone; the instruction stays.
    Context,
}

/// Where the context's temporal indices come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rope {
    /// From the recording: what lies far apart there is far apart here.
    #[default]
    Source,
    /// 0, 1, 2, ... whatever was left out between; with a gap of 1 this is the usual rotary embedding.
    Consecutive,
}

/// How to imagine. Sampler defaults come from the model bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutSettings {
    /// Latents of one rollout, the given first one included.
    pub target_latents: usize,
    /// Distance between the last context index and the first target index (Video4Spatial: 50).
    pub gap: f64,
    /// Largest distance between context indices; longer histories are squeezed. `None`: as they are.
    pub max_span: Option<f64>,
    /// Denoising steps per rollout.
    pub steps: usize,
    /// Fewest steps worth doing; with less time no rollout is sampled at all.
    pub min_steps: usize,
    /// Guidance weight; 1 is purely conditional.
    pub guidance: f32,
    /// What guidance pulls away from.
    pub dropped: Dropped,
    /// Temporal indices of the context.
    pub rope: Rope,
    /// Noise levels to visit.
    pub grid: Grid,
    /// Shift of the noise levels.
    pub shift: f64,
    /// How to go from level to level.
    pub solver: Solver,
    /// Timestep (0..1000) of the single pass of a glance.
    pub glance_timestep: f64,
    /// Rollouts to imagine, each from its own noise.
    pub candidates: usize,
    /// Seed of all noise.
    pub seed: u64,
}

/// The context chosen for one goal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContextLatents {
    /// Source latent index of every context latent, ascending.
    pub index: Vec<u64>,
    /// `[n, channels, height, width]`, in the same order.
    pub latents: Vec<f32>,
    /// The first target latent: the newest frame, `[channels, height, width]`.
    pub first: Vec<f32>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Text rows `[text_len, text_dim]`.
    pub text: &'a [f32],
    /// Text rows of the empty prompt.
    pub null_text: &'a [f32],
    /// Camera rays of the target latents `[target_latents, tokens, camera_channels]`.
    pub camera: Option<&'a [f32]>,
}

/// What the lift heads said in one pass; meanings as in [`Denoised`], context frames first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heads {
    /// Number of context frames before the first target frame.
    pub context: usize,
    /// See [`Denoised::pose`].
    pub pose: Vec<[f32; 4]>,
    /// See [`Denoised::mask`].
    pub mask: Vec<f32>,
    /// See [`Denoised::locate`].
    pub locate: Vec<[f32; 2]>,
}

impl Heads {
    fn of(denoised: &mut Denoised, context: usize) -> Self {
        Self {
            context,
            pose: std::mem::take(&mut denoised.pose),
            mask: std::mem::take(&mut denoised.mask),
            locate: std::mem::take(&mut denoised.locate),
        }
    }
}

/// One imagined video.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// `[target_latents, channels, height, width]`, the given first one included.
    pub latents: Vec<f32>,
    /// What the heads said in the last step.
    pub heads: Heads,
    /// Steps done.
    pub steps: usize,
}

/// What came of one goal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imagined {
    /// What the heads said at a glance, one per candidate; none from a model without heads.
    pub glances: Vec<Heads>,
    /// Rollouts; fewer than asked, or none, when time was short.
    pub rollouts: Vec<Rollout>,
    /// Steps planned for each rollout.
    pub steps: usize,
    /// Why less was done than asked for.
    pub reduced: Option<String>,
    /// Denoiser evaluations, all told.
    pub evaluations: usize,
    /// Duration of each denoising step (both branches), as the clock saw it.
    pub step_times: Vec<TimeDelta>,
}

/// What was just done on the way to an answer: goes unchanged from where it is done to whoever watches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage<'a> {
    /// The text is encoded.
    Text,
    /// A server has it in work, and says nothing new.
    Waiting,
    /// The context is chosen, or a candidate was glanced at for which there is no draft.
    Encode,
    /// The memory is looked through: part, parts.
    Scan(usize, usize),
    /// A draft of the answer, from the candidates glanced at so far.
    Draft(&'a Answer),
    /// A denoising step was done.
    Step {
        /// Candidate, from 0.
        candidate: usize,
        /// Candidates planned.
        candidates: usize,
        /// Steps done.
        step: usize,
        /// Steps planned.
        steps: usize,
        /// The present estimate of the clean rollout, `[target_latents, channels, height, width]`.
        estimate: &'a [f32],
    },
    /// The rollout is decoded.
    Decode,
    /// The pose is read and checked.
    Lift,
}

impl Stage<'_> {
    /// A name for a person, and how much of it is done, of how much.
    pub fn bar(&self) -> (&'static str, usize, usize) {
        match *self {
            Self::Text => ("text", 1, 1),
            Self::Waiting => ("wait for the server", 0, 1),
            Self::Encode => ("encode", 1, 1),
            Self::Scan(part, parts) => ("look through memory", part, parts),
            Self::Draft(_) => ("draft", 1, 1),
            Self::Step { candidate, candidates, step, steps, .. } => {
                ("imagine", candidate * steps + step, candidates * steps)
            }
            Self::Decode => ("decode", 1, 1),
            Self::Lift => ("lift", 1, 1),
        }
    }
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop now; the goal was cancelled.
    Stop,
}

/// Why there is no imagination.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImagineError {
    /// The caller said stop.
    #[error("imagination stopped")]
    Stopped,
    /// An input has the wrong size.
    #[error("imagination: {what} has {got} values, expected {expected}")]
    Size {
        /// Which.
        what: &'static str,
        /// Wanted.
        expected: usize,
        /// Got.
        got: usize,
    },
    /// A setting makes no sense.
    #[error("imagination: {0}")]
    Setting(String),
    /// The denoiser failed.
    #[error(transparent)]
    Denoise(#[from] DenoiseError),
    /// The sampler refused.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// An estimate could not be held to what was seen.
    #[error("imagination: the drive cannot be held to what was seen: {0}")]
    Hold(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What is imagined elsewhere could not be had.
    #[error(transparent)]
    Served(#[from] ServedError),
    /// The network returned numbers that are not finite.
    #[error(
        "imagination: the denoiser returned a value that is not finite; the bundle or the backend is broken"
    )]
    NotFinite,
}

/// Time left for sampling, and the clock to measure it with.
#[derive(Clone, Copy)]
pub struct Budget<'a> {
    /// The clock.
    pub clock: &'a dyn Clock,
    /// When sampling must be over, on that clock; decoding and lifting come after it. `None`: no limit.
    pub until: Option<TimeDelta>,
}

impl Budget<'_> {
    /// Time left, where there is a limit.
    pub fn left(&self) -> Option<TimeDelta> {
        self.until.map(|until| until - self.clock.now())
    }

    /// Whether one more of what was done `times` since `began` leaves as much time as all of it takes: looking must leave at
    /// least half of the time to imagining.
    pub fn lasts_for_more(&self, began: TimeDelta, times: usize) -> bool {
        let spent = (self.clock.now() - began).0;
        self.left().is_none_or(|left| left.0 >= spent + 2 * spent / times.max(1) as i64)
    }

    /// How many spans of `each` fit into what is left; `usize::MAX` without a limit.
    fn fits(&self, each: TimeDelta) -> usize {
        match self.left() {
            None => usize::MAX,
            Some(left) => (left.0.max(0) / each.0.max(1)) as usize,
        }
    }
}

/// The denoiser with everything that stays the same for one goal.
struct Evaluator<'a> {
    model: &'a mut dyn Denoise,
    seen: &'a ContextLatents,
    prompt: Prompt<'a>,
    settings: &'a RolloutSettings,
    /// Values per latent frame.
    frame: usize,
    t_index: Vec<f64>,
    camera: Option<Vec<f32>>,
    evaluations: usize,
}

/// What one branch of the guidance leaves out.
#[derive(Clone, Copy, Default)]
struct Omitted<'a> {
    /// Context and first frame: this noise takes their place.
    context: Option<&'a [f32]>,
    /// The instruction: the empty text and no camera rays take its place.
    instruction: bool,
}

/// Temporal indices: context as in its source, less the smallest; targets `gap` after the last.
fn temporal_indices(index: &[u64], targets: usize, gap: f64, max_span: Option<f64>) -> Vec<f64> {
    let (first, last) = (index.first().copied().unwrap_or(0), index.last().copied().unwrap_or(0));
    let span = last.saturating_sub(first) as f64;
    let squeeze = max_span.filter(|max| span > *max).map_or(1.0, |max| max / span);
    let context = index.iter().map(|i| (i.saturating_sub(first) as f64 * squeeze).round());
    let end = (span * squeeze).round();
    context.chain((0..targets).map(|j| end + gap + j as f64)).collect()
}

impl<'a> Evaluator<'a> {
    fn new(
        model: &'a mut dyn Denoise,
        seen: &'a ContextLatents,
        prompt: Prompt<'a>,
        settings: &'a RolloutSettings,
    ) -> Result<Self, ImagineError> {
        let cfg = model.config();
        let frame = cfg.in_channels * cfg.latent_height * cfg.latent_width;
        let camera_len = cfg.tokens_per_frame() * cfg.camera_channels;
        let context = seen.index.len();
        let targets = settings.target_latents;
        let check = |what, expected: usize, got: usize| {
            if expected == got { Ok(()) } else { Err(ImagineError::Size { what, expected, got }) }
        };
        check("context", context * frame, seen.latents.len())?;
        check("first frame", frame, seen.first.len())?;
        check("text", cfg.text_len * cfg.text_dim, prompt.text.len())?;
        check("empty text", cfg.text_len * cfg.text_dim, prompt.null_text.len())?;
        if targets < 2 {
            let got =
                format!("target_latents is {targets}; at least the first frame and one more are needed");
            return Err(ImagineError::Setting(got));
        }
        if cfg.in_channels != cfg.out_channels {
            let got = format!("the denoiser maps {} channels to {}", cfg.in_channels, cfg.out_channels);
            return Err(ImagineError::Setting(got));
        }
        if !seen.index.windows(2).all(|w| w[0] < w[1]) {
            return Err(ImagineError::Setting("context indices must ascend".into()));
        }
        let camera = match prompt.camera {
            Some(rays) if camera_len > 0 => {
                check("camera rays", targets * camera_len, rays.len())?;
                let mut all = vec![0.0; context * camera_len];
                all.extend_from_slice(rays);
                Some(all)
            }
            _ => None,
        };
        let t_index = match settings.rope {
            Rope::Source => temporal_indices(&seen.index, targets, settings.gap, settings.max_span),
            Rope::Consecutive => {
                let index: Vec<u64> = (0..context as u64).collect();
                temporal_indices(&index, targets, settings.gap, None)
            }
        };
        Ok(Self { model, seen, prompt, settings, frame, t_index, camera, evaluations: 0 })
    }

    fn context(&self) -> usize {
        self.seen.index.len()
    }

    /// What one branch is evaluated at. `x` is the whole target sample.
    fn pass(&self, x: &[f32], t: f64, omitted: Omitted<'_>) -> Pass {
        let noise = omitted.context;
        let given = (self.context() + 1) * self.frame;
        let mut latents = Vec::with_capacity(given - self.frame + x.len());
        match noise {
            Some(noise) => latents.extend_from_slice(noise),
            None => {
                latents.extend_from_slice(&self.seen.latents);
                latents.extend_from_slice(&self.seen.first);
            }
        }
        latents.extend_from_slice(&x[self.frame..]);
        let given_t = if noise.is_some() { f64::from(NOISED_CONTEXT_T) } else { 0.0 };
        let mut rows = vec![0; self.context() + 1];
        rows.resize(self.t_index.len(), 1);
        Pass { latents, timesteps: [given_t, t], rows, instruction: !omitted.instruction }
    }

    /// Evaluates one branch at timestep `t`. `x` is the whole target sample.
    fn evaluate(&mut self, x: &[f32], t: f64, omitted: Omitted<'_>) -> Result<Denoised, ImagineError> {
        let pass = self.pass(x, t, omitted);
        let out = self.model.denoise(&pass.step(self.prompt, self.camera.as_deref(), &self.t_index))?;
        self.evaluations += 1;
        if out.prediction.len() != pass.latents.len() {
            let (expected, got) = (pass.latents.len(), out.prediction.len());
            return Err(ImagineError::Size { what: "prediction", expected, got });
        }
        if !heads_finite(&out) || !out.prediction.iter().all(|v| v.is_finite()) {
            return Err(ImagineError::NotFinite);
        }
        Ok(out)
    }

    /// The sample `x` on the device on which the denoiser runs; `None` where that is the host.
    fn on_device(
        &mut self,
        x: &[f32],
        schedule: &Schedule,
        noise: Option<&[f32]>,
    ) -> Result<Option<OnDevice<'_>>, ImagineError> {
        let Some(&t) = schedule.timesteps.first() else { return Ok(None) };
        let mut passes = vec![self.pass(x, f64::from(t), Omitted::default())];
        if self.is_guided() {
            let instruction = self.settings.dropped != Dropped::Context;
            passes.push(self.pass(x, f64::from(t), Omitted { context: noise, instruction }));
        }
        let (camera, context) = (self.camera.as_deref(), self.context());
        let plan = WalkPlan {
            branches: passes.iter().map(|p| p.step(self.prompt, camera, &self.t_index)).collect(),
            sample: x,
            schedule,
            solver: self.settings.solver,
            guidance: self.settings.guidance,
        };
        Ok(self.model.walk(&plan)?.map(|walk| OnDevice { walk, context }))
    }

    /// The target part of a prediction as a velocity `(x - x_0) / s`.
    fn velocity(&self, denoised: &Denoised, x: &[f32], sigma: f32) -> Vec<f32> {
        let target = &denoised.prediction[self.context() * self.frame..];
        match self.model.config().prediction {
            Prediction::Velocity => target.to_vec(),
            Prediction::X0 => target.iter().zip(x).map(|(x0, x)| (x - x0) / sigma.max(1e-6)).collect(),
        }
    }

    fn targets_len(&self) -> usize {
        self.settings.target_latents * self.frame
    }

    /// What the heads say at a glance: one pass on noise alone.
    fn glance_at(&mut self, noise: &[f32]) -> Result<Heads, ImagineError> {
        let t = self.settings.glance_timestep;
        let s = (t / 1000.0) as f32;
        let x: Vec<f32> = noise.iter().map(|n| n * s).collect();
        let mut out = self.evaluate(&x, t, Omitted::default())?;
        Ok(Heads::of(&mut out, self.context()))
    }

    fn beginning(&self, candidate: usize) -> Vec<f32> {
        beginning(self.settings, candidate, self.frame)
    }

    /// What takes the place of context and first frame for a candidate, where guidance drops them.
    fn context_noise(&self, candidate: usize) -> Option<Vec<f32>> {
        let drops_context = self.is_guided() && self.settings.dropped != Dropped::Instruction;
        let given = (self.context() + 1) * self.frame;
        drops_context.then(|| Noise::new(self.settings.seed, 2 * candidate as u64 + 1).draw(given))
    }

    /// A glance at a candidate, and how long it took.
    fn glance(&mut self, candidate: usize, clock: &dyn Clock) -> Result<(Heads, TimeDelta), ImagineError> {
        let noise = self.beginning(candidate);
        let began = clock.now();
        let heads = self.glance_at(&noise)?;
        Ok((heads, (clock.now() - began).max(TimeDelta(1))))
    }

    /// The guided velocity at one step, and what the heads say there. `noise` takes the place of context and first
    /// frame in the unconditional branch, where guidance drops them.
    fn guided(
        &mut self,
        x: &[f32],
        step: Step,
        noise: Option<&[f32]>,
    ) -> Result<(Vec<f32>, Heads), ImagineError> {
        let t = f64::from(step.timestep);
        let mut conditional = self.evaluate(x, t, Omitted::default())?;
        let mut v = self.velocity(&conditional, x, step.sigma);
        if self.is_guided() {
            let instruction = self.settings.dropped != Dropped::Context;
            let unconditional = self.evaluate(x, t, Omitted { context: noise, instruction })?;
            let mut u = self.velocity(&unconditional, x, step.sigma);
            guide(&mut u, &v, self.settings.guidance);
            v = u;
        }
        Ok((v, Heads::of(&mut conditional, self.context())))
    }

    fn is_guided(&self) -> bool {
        self.settings.guidance != 1.0
    }
}

/// What stays the same of a pass while it is evaluated, and whether it knows the instruction.
struct Pass {
    latents: Vec<f32>,
    timesteps: [f64; 2],
    rows: Vec<usize>,
    instruction: bool,
}

impl Pass {
    fn step<'b>(
        &'b self,
        prompt: Prompt<'b>,
        camera: Option<&'b [f32]>,
        t_index: &'b [f64],
    ) -> DenoiseStep<'b> {
        DenoiseStep {
            latents: &self.latents,
            timesteps: &self.timesteps,
            rows: &self.rows,
            t_index,
            text: if self.instruction { prompt.text } else { prompt.null_text },
            camera: camera.filter(|_| self.instruction),
            guide: None,
        }
    }
}

fn heads_finite(out: &Denoised) -> bool {
    let finite = |v: &f32| v.is_finite();
    out.pose.iter().flatten().all(finite)
        && out.mask.iter().all(finite)
        && out.locate.iter().flatten().all(finite)
}

/// The noise that a candidate begins with; `frame` values for each latent.
fn beginning(settings: &RolloutSettings, candidate: usize, frame: usize) -> Vec<f32> {
    Noise::new(settings.seed, 2 * candidate as u64).draw(settings.target_latents * frame)
}

/// The guided velocity `[target_latents, channels, height, width]` of one step, as the rollouts take it, for a target
/// sample `x` of that shape. `noise` (`seen`'s latents and first frame in size) takes the place of what guidance drops.
///
/// # Errors
/// As [`imagine`].
pub fn guided_velocity(
    model: &mut dyn Denoise,
    seen: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    x: &[f32],
    step: Step,
    noise: &[f32],
) -> Result<Vec<f32>, ImagineError> {
    Ok(Evaluator::new(model, seen, prompt, settings)?.guided(x, step, Some(noise))?.0)
}

/// The guided velocity and what the heads say at one step of a candidate's rollout, for a target sample `x`
/// `[target_latents, channels, height, width]`: what [`roll_out_held`] evaluates at each step.
///
/// # Errors
/// As [`imagine`].
pub fn guided(
    model: &mut dyn Denoise,
    seen: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    candidate: usize,
    (x, step): (&[f32], Step),
) -> Result<(Vec<f32>, Heads), ImagineError> {
    let mut evaluator = Evaluator::new(model, seen, prompt, settings)?;
    let (expected, got) = (evaluator.targets_len(), x.len());
    if expected != got {
        return Err(ImagineError::Size { what: "sample", expected, got });
    }
    let noise = evaluator.context_noise(candidate);
    evaluator.guided(x, step, noise.as_deref())
}

/// Which of many remembered latents to work with: looks at all of them in parts of `count`, one pass each, and
/// takes those in which the heads see the goal most clearly (half of `count`), the newest one, and an even
/// spread of the others. Positions ascend. With at most `count` latents, or without lift heads, this is
/// [`crate::context::spread`].
///
/// # Errors
/// As [`imagine`].
pub fn choose_context(
    model: &mut dyn Denoise,
    memory: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    count: usize,
    budget: Budget<'_>,
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Vec<usize>, ImagineError> {
    let len = memory.index.len();
    if len <= count || count < 2 || !model.config().lift {
        return Ok(crate::context::spread(len, count));
    }
    let parts = len.div_ceil(count);
    let frame = memory.first.len();
    let mut score = vec![f32::NEG_INFINITY; len];
    let began = budget.clock.now();
    for part in 0..parts {
        let each = TimeDelta((budget.clock.now() - began).0 / part.max(1) as i64);
        // Looking must leave time for at least as many passes again.
        if part > 0 && budget.fits(each) < 2 * (parts - part) + 2 {
            return Ok(crate::context::spread(len, count));
        }
        let positions: Vec<usize> = (part..len).step_by(parts).collect();
        let seen = pick(memory, &positions, frame);
        let noise = Noise::new(settings.seed, u64::MAX - part as u64).draw(settings.target_latents * frame);
        let heads = Evaluator::new(model, &seen, prompt, settings)?.glance_at(&noise)?;
        let tokens = model.config().tokens_per_frame();
        for (i, position) in positions.iter().enumerate() {
            let cells = heads.mask.get(i * tokens..(i + 1) * tokens).unwrap_or_default();
            score[*position] = cells.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        }
        if progress(Stage::Scan(part + 1, parts)) == Flow::Stop {
            return Err(ImagineError::Stopped);
        }
    }
    Ok(best_and_spread(&score, count))
}

/// Half of `count` by score, the newest, and the rest evenly spread over what remains.
fn best_and_spread(score: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..score.len()).collect();
    order.sort_by(|a, b| score[*b].total_cmp(&score[*a]).then(a.cmp(b)));
    let mut chosen: Vec<usize> = order.into_iter().take(count / 2).collect();
    if !chosen.contains(&(score.len() - 1)) {
        chosen.push(score.len() - 1);
    }
    let rest: Vec<usize> = (0..score.len()).filter(|i| !chosen.contains(i)).collect();
    let more = count - chosen.len();
    chosen.extend(crate::context::spread(rest.len(), more).into_iter().map(|i| rest[i]));
    chosen.sort_unstable();
    chosen
}

/// The latents at `positions` of `memory`, with its first frame.
pub fn pick(memory: &ContextLatents, positions: &[usize], frame: usize) -> ContextLatents {
    ContextLatents {
        index: positions.iter().filter_map(|p| memory.index.get(*p).copied()).collect(),
        latents: positions
            .iter()
            .filter_map(|p| memory.latents.get(p * frame..(p + 1) * frame))
            .flatten()
            .copied()
            .collect(),
        first: memory.first.clone(),
    }
}

/// Glances at the candidates: what [`imagine`] begins with, for the same seed bit for bit the same.
/// Fewer, but at least one, when the budget is tight; none from a model without heads.
///
/// # Errors
/// As [`imagine`].
pub fn glance(
    model: &mut dyn Denoise,
    seen: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    budget: Budget<'_>,
) -> Result<Vec<Heads>, ImagineError> {
    let mut evaluator = Evaluator::new(model, seen, prompt, settings)?;
    let mut glances = Vec::new();
    if !evaluator.model.config().lift {
        return Ok(glances);
    }
    let mut pass = TimeDelta(1);
    for candidate in 0..settings.candidates.max(1) {
        if candidate > 0 && budget.fits(pass) < 2 {
            break;
        }
        let (heads, took) = evaluator.glance(candidate, budget.clock)?;
        glances.push(heads);
        pass = took;
    }
    Ok(glances)
}

/// Imagines going to the goal: [`Imagination::glance`], then [`Imagination::roll_out`].
///
/// # Errors
/// [`ImagineError`]; sizes are checked before anything is computed.
pub fn imagine(
    model: &mut dyn Denoise,
    seen: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    budget: Budget<'_>,
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Imagined, ImagineError> {
    let mut imagination = Imagination::new(model, seen, prompt, settings, budget)?;
    imagination.glance(&mut |_| progress(Stage::Encode))?;
    imagination.roll_out(progress)
}

/// The work on one goal. When the budget does not allow all of it, candidates are given up first, then steps, then the
/// rollouts; [`Imagined::reduced`] says so.
pub struct Imagination<'a> {
    evaluator: Evaluator<'a>,
    budget: Budget<'a>,
    /// Candidates that there was time to begin with.
    candidates: usize,
    /// How long one evaluation takes.
    pass: TimeDelta,
    result: Imagined,
}

/// One sampled rollout, and whether it was cut short.
struct Sampled {
    rollout: Rollout,
    cut_short: bool,
}

impl<'a> Imagination<'a> {
    /// Checks the sizes of all inputs.
    ///
    /// # Errors
    /// [`ImagineError::Size`], [`ImagineError::Setting`].
    pub fn new(
        model: &'a mut dyn Denoise,
        seen: &'a ContextLatents,
        prompt: Prompt<'a>,
        settings: &'a RolloutSettings,
        budget: Budget<'a>,
    ) -> Result<Self, ImagineError> {
        let evaluator = Evaluator::new(model, seen, prompt, settings)?;
        let candidates = settings.candidates.max(1);
        Ok(Self { evaluator, budget, candidates, pass: TimeDelta(1), result: Imagined::default() })
    }

    /// One pass per candidate, as many as there is time for, at least one; none of a model without heads, but one to
    /// know what it costs where there is a deadline. `each` gets what the heads said so far and may stop the work.
    ///
    /// # Errors
    /// [`ImagineError`].
    pub fn glance(&mut self, each: &mut dyn FnMut(&[Heads]) -> Flow) -> Result<&[Heads], ImagineError> {
        let wanted = self.evaluator.settings.candidates.max(1);
        let has_heads = self.evaluator.model.config().lift;
        if !has_heads {
            if self.budget.until.is_some() {
                (_, self.pass) = self.evaluator.glance(0, self.budget.clock)?;
            }
            return Ok(&[]);
        }
        for candidate in 0..wanted {
            if candidate > 0 && self.budget.fits(self.pass) < 1 {
                break;
            }
            let (heads, took) = self.evaluator.glance(candidate, self.budget.clock)?;
            self.pass = took;
            self.candidates = candidate + 1;
            self.result.glances.push(heads);
            if each(&self.result.glances) == Flow::Stop {
                return Err(ImagineError::Stopped);
            }
        }
        Ok(&self.result.glances)
    }

    /// Samples the rollouts. `progress` is called after every step and may stop the work.
    ///
    /// # Errors
    /// [`ImagineError`].
    pub fn roll_out(mut self, progress: &mut dyn FnMut(Stage<'_>) -> Flow) -> Result<Imagined, ImagineError> {
        let settings = self.evaluator.settings;
        let (wanted, all_steps) = (settings.candidates.max(1), settings.steps.max(1));
        let affordable = self.affordable();
        let (candidates, steps) = plan(self.candidates, all_steps, settings.min_steps, affordable);
        if (candidates, steps) != (wanted, all_steps) {
            self.result.reduced = Some(match candidates {
                0 if !self.evaluator.model.config().lift => "no time to imagine the drive".to_owned(),
                0 => "no time to imagine the drive: the answer rests on the first pass".to_owned(),
                _ => format!(
                    "{candidates} of {wanted} candidates and {steps} of {all_steps} steps, to meet the deadline"
                ),
            });
        }
        self.result.steps = if candidates == 0 { 0 } else { steps };
        for candidate in 0..candidates {
            let mut stepped = |step, estimate: &[f32]| {
                progress(Stage::Step { candidate, candidates, step, steps, estimate })
            };
            let Sampled { rollout, cut_short } = self.sample(candidate, steps, &mut stepped)?;
            if cut_short {
                let done = rollout.steps;
                self.result.reduced =
                    Some(format!("stopped after {done} of {steps} steps, to meet the deadline"));
            }
            self.result.rollouts.push(rollout);
            if candidate + 1 < candidates && self.affordable() < settings.min_steps {
                self.result.reduced =
                    Some(format!("{} of {wanted} candidates, to meet the deadline", candidate + 1));
                break;
            }
        }
        self.result.evaluations = self.evaluator.evaluations;
        Ok(self.result)
    }

    /// Steps that fit into the time left.
    fn affordable(&self) -> usize {
        let branches = if self.evaluator.is_guided() { 2 } else { 1 };
        self.budget.fits(TimeDelta(self.pass.0.saturating_mul(branches)))
    }

    /// Samples one rollout.
    fn sample(
        &mut self,
        candidate: usize,
        steps: usize,
        stepped: &mut dyn FnMut(usize, &[f32]) -> Flow,
    ) -> Result<Sampled, ImagineError> {
        let (evaluator, budget) = (&mut self.evaluator, self.budget);
        let settings = evaluator.settings;
        let context_noise = evaluator.context_noise(candidate);
        let x = evaluator.beginning(candidate);
        let schedule = Schedule::new(settings.grid, steps, settings.shift)?;
        let first = &evaluator.seen.first;
        let branches = if evaluator.is_guided() { 2 } else { 1 };
        let on_device = match evaluator.on_device(&x, &schedule, context_noise.as_deref())? {
            Some(mut device) => Some(walk(&schedule, first, budget, stepped, &mut device)?),
            None => None,
        };
        let walked = match on_device {
            Some(walked) => {
                evaluator.evaluations += branches * walked.rollout.steps;
                walked
            }
            None => {
                let mut guided = |x: &[f32], step: Step| evaluator.guided(x, step, context_noise.as_deref());
                walk(
                    &schedule,
                    first,
                    budget,
                    stepped,
                    &mut OnHost::new(&schedule, settings, x, &mut guided),
                )?
            }
        };
        self.result.step_times.extend(walked.step_times);
        Ok(Sampled { rollout: walked.rollout, cut_short: walked.cut_short })
    }
}

/// A sample that was walked down the noise levels.
struct Walked {
    rollout: Rollout,
    cut_short: bool,
    step_times: Vec<TimeDelta>,
}

/// What is known of a sample at a step: the guided velocity, and what the heads say.
type Evaluate<'a> = dyn FnMut(&[f32], Step) -> Result<(Vec<f32>, Heads), ImagineError> + 'a;

/// Who makes the steps of a sample.
trait Steps {
    /// Makes one; returns its estimate of the clean sample.
    fn step(&mut self, step: Step) -> Result<Vec<f32>, ImagineError>;

    /// The sample, and what the heads said in the last step.
    fn end(&mut self) -> Result<(Vec<f32>, Heads), ImagineError>;
}

/// A sample here.
struct OnHost<'e, 'f> {
    sampler: Sampler,
    x: Vec<f32>,
    heads: Heads,
    evaluate: &'e mut Evaluate<'f>,
}

impl<'e, 'f> OnHost<'e, 'f> {
    fn new(
        schedule: &Schedule,
        settings: &RolloutSettings,
        x: Vec<f32>,
        evaluate: &'e mut Evaluate<'f>,
    ) -> Self {
        let sampler = Sampler::new(schedule.clone(), settings.solver);
        Self { sampler, x, heads: Heads::default(), evaluate }
    }
}

impl Steps for OnHost<'_, '_> {
    fn step(&mut self, step: Step) -> Result<Vec<f32>, ImagineError> {
        let v;
        (v, self.heads) = (self.evaluate)(&self.x, step)?;
        let clean = self.x.iter().zip(&v).map(|(x, v)| x - step.sigma * v).collect();
        self.sampler.step(&v, &mut self.x)?;
        Ok(clean)
    }

    fn end(&mut self) -> Result<(Vec<f32>, Heads), ImagineError> {
        Ok((std::mem::take(&mut self.x), std::mem::take(&mut self.heads)))
    }
}

/// A sample on the device on which the denoiser runs.
struct OnDevice<'e> {
    walk: Box<dyn Walk + 'e>,
    /// Frames before its first.
    context: usize,
}

impl Steps for OnDevice<'_> {
    fn step(&mut self, _: Step) -> Result<Vec<f32>, ImagineError> {
        let clean = self.walk.step()?;
        // A value that is not finite stays so in the estimate.
        if clean.iter().all(|v| v.is_finite()) { Ok(clean) } else { Err(ImagineError::NotFinite) }
    }

    fn end(&mut self) -> Result<(Vec<f32>, Heads), ImagineError> {
        let (x, mut heads) = self.walk.end()?;
        if heads_finite(&heads) {
            Ok((x, Heads::of(&mut heads, self.context)))
        } else {
            Err(ImagineError::NotFinite)
        }
    }
}

/// Walks a sample from noise to the end, where its first latent is `first`. When a step takes longer than the time left,
/// the last estimate of the clean sample is the result.
fn walk(
    schedule: &Schedule,
    first: &[f32],
    budget: Budget<'_>,
    stepped: &mut dyn FnMut(usize, &[f32]) -> Flow,
    sample: &mut dyn Steps,
) -> Result<Walked, ImagineError> {
    let (mut done, mut took, mut clean) = (0, TimeDelta(1), Vec::new());
    let (mut cut_short, mut step_times) = (false, Vec::new());
    while let Some(step) = schedule.step(done) {
        if done > 0 && budget.fits(took) < 1 {
            cut_short = true;
            break;
        }
        let began = budget.clock.now();
        clean = sample.step(step)?;
        took = (budget.clock.now() - began).max(TimeDelta(1));
        done += 1;
        step_times.push(took);
        if stepped(done, &clean) == Flow::Stop {
            return Err(ImagineError::Stopped);
        }
    }
    let (mut x, heads) = sample.end()?;
    if cut_short {
        x = clean;
    }
    x[..first.len()].copy_from_slice(first);
    if !x.iter().all(|v| v.is_finite()) {
        return Err(ImagineError::NotFinite);
    }
    Ok(Walked { rollout: Rollout { latents: x, heads, steps: done }, cut_short, step_times })
}

/// A denoiser whose estimates of the clean sample are put right before the sampler goes on.
pub trait Held {
    /// Who evaluates the network.
    fn imaginer(&mut self) -> Box<dyn Imagine + '_>;

    /// Puts an estimate right: `[target_latents, channels, height, width]`, the given first one included.
    ///
    /// # Errors
    /// When it cannot be: nothing is sampled then.
    fn hold(&mut self, clean: &mut [f32]) -> Result<(), ImagineError>;
}

/// Samples one rollout from the noise of a candidate, each step's estimate of the clean sample being put right by `held`.
/// `None` when there is no time for `settings.min_steps` steps of a duration of `step`.
///
/// # Errors
/// [`ImagineError`].
pub fn roll_out_held(
    held: &mut dyn Held,
    seen: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    candidate: usize,
    (budget, step): (Budget<'_>, TimeDelta),
    stepped: &mut dyn FnMut(usize, &[f32]) -> Flow,
) -> Result<Option<Rollout>, ImagineError> {
    let steps = settings.steps.max(1).min(budget.fits(step));
    if steps < settings.min_steps.max(1) {
        return Ok(None);
    }
    let x = beginning(settings, candidate, seen.first.len());
    let inputs = Inputs { seen, prompt, settings, budget };
    let mut guided = |x: &[f32], step: Step| {
        let (mut v, heads) = held.imaginer().guided(inputs, candidate, (x, step))?;
        let mut clean: Vec<f32> = x.iter().zip(&v).map(|(x, v)| x - step.sigma * v).collect();
        clean[..seen.first.len()].copy_from_slice(&seen.first);
        held.hold(&mut clean)?;
        for ((v, x), clean) in v.iter_mut().zip(x).zip(&clean) {
            *v = (x - clean) / step.sigma.max(1e-6);
        }
        Ok((v, heads))
    };
    let schedule = Schedule::new(settings.grid, steps, settings.shift)?;
    let mut sample = OnHost::new(&schedule, settings, x, &mut guided);
    Ok(Some(walk(&schedule, &seen.first, budget, stepped, &mut sample)?.rollout))
}

/// Candidates and steps that fit into `affordable` steps: candidates go first, then steps, then everything.
fn plan(candidates: usize, steps: usize, min_steps: usize, affordable: usize) -> (usize, usize) {
    let min_steps = min_steps.clamp(1, steps);
    if affordable >= candidates.saturating_mul(steps) {
        (candidates, steps)
    } else if affordable >= steps {
        ((affordable / steps).max(1), steps)
    } else if affordable >= min_steps {
        (1, affordable)
    } else {
        (0, steps)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use mindseye_engines::model::dit::DitConfig;
    use std::cell::Cell;

    pub(crate) fn config(prediction: Prediction) -> DitConfig {
        DitConfig {
            in_channels: 2,
            out_channels: 2,
            latent_height: 2,
            latent_width: 3,
            patch: [1, 1],
            heads: 1,
            head_dim: 12,
            layers: 1,
            ffn_dim: 8,
            text_dim: 3,
            text_len: 2,
            freq_dim: 8,
            eps: 1e-6,
            rope_theta: 10000.0,
            prediction,
            camera_channels: 24,
            pooled_text: false,
            lift: true,
            attributes: 0,
            guide: None,
        }
    }

    /// A fake denoiser: it knows the clean sample that it wants, which depends on the text only (and on `echo` times
    /// what it is shown), and records what it was asked.
    pub(crate) struct Fake {
        pub config: DitConfig,
        pub echo: f32,
        pub calls: Vec<(Vec<f64>, Vec<f64>, f32)>,
        pub clock: std::rc::Rc<Cell<i64>>,
        pub cost: i64,
        pub broken: bool,
    }

    impl Fake {
        pub(crate) fn new(prediction: Prediction) -> Self {
            Self {
                config: config(prediction),
                echo: 0.0,
                calls: Vec::new(),
                clock: std::rc::Rc::default(),
                cost: 1_000_000,
                broken: false,
            }
        }
    }

    pub(crate) struct FakeClock(pub std::rc::Rc<Cell<i64>>);

    impl Clock for FakeClock {
        fn now(&self) -> TimeDelta {
            TimeDelta(self.0.get())
        }
    }

    impl Denoise for Fake {
        fn config(&self) -> &DitConfig {
            &self.config
        }

        fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
            self.clock.set(self.clock.get() + self.cost);
            let times = step.rows.iter().map(|r| step.timesteps[*r]).collect();
            self.calls.push((times, step.t_index.to_vec(), step.text[0]));
            let sigma = (*step.timesteps.last().unwrap() / 1000.0) as f32;
            let wanted = step.text[0];
            let prediction = match self.config.prediction {
                Prediction::X0 => step.latents.iter().map(|x| wanted + self.echo * x).collect(),
                Prediction::Velocity => step.latents.iter().map(|x| (x - wanted) / sigma).collect(),
            };
            let (frames, tokens) = (step.frames(), self.config.tokens_per_frame());
            Ok(Denoised {
                prediction: if self.broken { vec![f32::NAN; step.latents.len()] } else { prediction },
                pose: vec![[1.0, 2.0, 1.0, 0.0]; frames],
                mask: (0..frames * tokens).map(|i| step.latents[i / tokens * 12]).collect(),
                locate: vec![[1.0, 0.0]; frames * tokens],
            })
        }
    }

    pub(crate) fn settings() -> RolloutSettings {
        RolloutSettings {
            target_latents: 3,
            gap: 50.0,
            max_span: None,
            steps: 8,
            min_steps: 3,
            guidance: 2.0,
            dropped: Dropped::default(),
            rope: Rope::default(),
            grid: Grid::Plain,
            shift: 3.0,
            solver: Solver::Euler,
            glance_timestep: 950.0,
            candidates: 2,
            seed: 7,
        }
    }

    fn seen(n: usize) -> ContextLatents {
        ContextLatents {
            index: (0..n as u64).map(|i| 10 + 3 * i).collect(),
            latents: (0..n).flat_map(|i| vec![i as f32; 12]).collect(),
            first: vec![0.25; 12],
        }
    }

    const TEXT: [f32; 6] = [0.75; 6];
    const NULL: [f32; 6] = [0.5; 6];
    const PROMPT: Prompt<'static> = Prompt { text: &TEXT, null_text: &NULL, camera: None };

    fn go_on(_: Stage<'_>) -> Flow {
        Flow::Continue
    }

    fn free() -> Budget<'static> {
        Budget { clock: &NoClock, until: None }
    }

    #[test]
    fn samples_end_at_the_guided_clean_sample() {
        for prediction in [Prediction::X0, Prediction::Velocity] {
            for solver in [Solver::Euler, Solver::UniPc] {
                for guidance in [1.0, 2.0, 4.0] {
                    let mut fake = Fake::new(prediction);
                    let s = RolloutSettings { solver, guidance, ..settings() };
                    let out = imagine(&mut fake, &seen(4), PROMPT, &s, free(), &mut go_on).unwrap();
                    let want = 0.5 + guidance * (0.75 - 0.5);
                    let name = format!("{prediction:?} {solver:?} {guidance}");
                    assert_eq!(out.rollouts.len(), 2, "{name}");
                    for rollout in &out.rollouts {
                        assert_eq!(rollout.latents[..12], [0.25; 12], "{name}: the first frame is given");
                        for v in &rollout.latents[12..] {
                            assert!((v - want).abs() < 1e-3, "{name}: {v} instead of {want}");
                        }
                    }
                    let branches = if guidance == 1.0 { 1 } else { 2 };
                    assert_eq!(out.evaluations, 2 + 2 * 8 * branches, "{name}");
                    assert_eq!(out.reduced, None);
                }
            }
        }
    }

    #[test]
    fn each_branch_is_told_the_truth() {
        let mut fake = Fake::new(Prediction::X0);
        let s = RolloutSettings { candidates: 1, steps: 2, min_steps: 1, ..settings() };
        imagine(&mut fake, &seen(2), PROMPT, &s, free(), &mut go_on).unwrap();
        let (glance, conditional, unconditional) = (&fake.calls[0], &fake.calls[1], &fake.calls[2]);
        assert_eq!(glance.0, [0.0, 0.0, 0.0, 950.0, 950.0]);
        assert_eq!(conditional.0, [0.0, 0.0, 0.0, 1000.0, 1000.0]);
        assert_eq!(unconditional.0, [1000.0; 5]);
        assert_eq!((conditional.2, unconditional.2), (0.75, 0.5));
        assert_eq!(conditional.1, [0.0, 3.0, 53.0, 54.0, 55.0], "indices less the smallest, then the gap");
    }

    #[test]
    fn guidance_drops_what_it_is_asked_to() {
        // Timestep of the context, first word of the text: in the second branch.
        let cases = [
            (Dropped::Both, 1000.0, 0.5),
            (Dropped::Instruction, 0.0, 0.5),
            (Dropped::Context, 1000.0, 0.75),
        ];
        for (dropped, context, word) in cases {
            let mut fake = Fake::new(Prediction::X0);
            let s = RolloutSettings { candidates: 1, steps: 2, min_steps: 1, dropped, ..settings() };
            imagine(&mut fake, &seen(2), PROMPT, &s, free(), &mut go_on).unwrap();
            assert_eq!(fake.calls.len(), 5);
            assert_eq!(fake.calls[2].0, [context, context, context, 1000.0, 1000.0], "{dropped:?}");
            assert_eq!(fake.calls[2].2, word, "{dropped:?}");
            assert_eq!(fake.calls[1].2, 0.75, "{dropped:?}: the first branch is told everything");
        }
    }

    #[test]
    fn consecutive_indices_forget_the_source() {
        for (gap, want) in [(50.0, [0.0, 1.0, 2.0, 52.0, 53.0, 54.0]), (1.0, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])]
        {
            let mut fake = Fake::new(Prediction::X0);
            let s = RolloutSettings { candidates: 1, gap, rope: Rope::Consecutive, ..settings() };
            imagine(&mut fake, &seen(3), PROMPT, &s, free(), &mut go_on).unwrap();
            assert!(fake.calls.iter().all(|c| c.1 == want), "gap {gap}: {:?}", fake.calls[0].1);
        }
    }

    #[test]
    fn indices_are_squeezed_into_the_trained_span() {
        let cases: [(&[u64], Option<f64>, &[f64]); 4] = [
            (&[5, 9], None, &[0.0, 4.0, 54.0]),
            (&[5, 9, 105], Some(20.0), &[0.0, 1.0, 20.0, 70.0]),
            (&[5, 9], Some(20.0), &[0.0, 4.0, 54.0]),
            (&[], None, &[50.0]),
        ];
        for (index, span, want) in cases {
            assert_eq!(temporal_indices(index, 1, 50.0, span), want, "{index:?} {span:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_bits() {
        let run = |seed| {
            // What is left of the noise shows in glances (their masks) and, by the echo, in the drives.
            let s = RolloutSettings { seed, steps: 2, min_steps: 1, glance_timestep: 500.0, ..settings() };
            let mut fake = Fake { echo: 0.25, ..Fake::new(Prediction::X0) };
            let out = imagine(&mut fake, &seen(2), PROMPT, &s, free(), &mut go_on).unwrap();
            (out.glances, out.rollouts)
        };
        let (one, other) = (run(1), run(2));
        assert_eq!(one, run(1));
        assert_ne!(one.0, other.0, "another seed, other glances");
        assert_ne!(one.1, other.1, "another seed, other drives");
        assert_ne!(one.0[0], one.0[1], "candidates glance at noise of their own");
        assert_ne!(one.1[0].latents, one.1[1].latents, "candidates drive from noise of their own");
    }

    #[test]
    fn less_time_means_less_work() {
        // One evaluation costs 1 ms, one step 2 ms, the first passes 1 ms per candidate.
        let cases: [(i64, usize, usize, usize, bool); 7] = [
            // until ms, glances, rollouts, steps, reduced
            (1000, 2, 2, 8, false),
            (34, 2, 2, 8, false),
            (30, 2, 1, 8, true),
            (12, 2, 1, 5, true),
            (8, 2, 1, 3, true),
            (6, 2, 0, 0, true),
            (0, 1, 0, 0, true),
        ];
        for (until, glances, rollouts, steps, reduced) in cases {
            let mut fake = Fake::new(Prediction::X0);
            let clock = FakeClock(fake.clock.clone());
            let budget = Budget { clock: &clock, until: Some(TimeDelta::from_millis(until)) };
            let out = imagine(&mut fake, &seen(4), PROMPT, &settings(), budget, &mut go_on).unwrap();
            assert_eq!(out.glances.len(), glances, "{until} ms");
            assert_eq!((out.rollouts.len(), out.steps), (rollouts, steps), "{until} ms: {:?}", out.reduced);
            assert_eq!(out.reduced.is_some(), reduced, "{until} ms");
            assert!(clock.0.get() <= until.max(1) * 1_000_000, "{until} ms: took {} ns", clock.0.get());
        }
    }

    #[test]
    fn a_denoiser_that_becomes_slow_is_cut_short() {
        let mut fake = Fake::new(Prediction::X0);
        let shared = fake.clock.clone();
        let clock = FakeClock(fake.clock.clone());
        let budget = Budget { clock: &clock, until: Some(TimeDelta::from_millis(60)) };
        let s = RolloutSettings { candidates: 1, ..settings() };
        let out = imagine(&mut fake, &seen(4), PROMPT, &s, budget, &mut |p| {
            if matches!(p, Stage::Step { .. }) {
                shared.set(shared.get() + 20_000_000);
            }
            Flow::Continue
        })
        .unwrap();
        assert!(out.rollouts[0].steps < 8, "{}", out.rollouts[0].steps);
        assert!(out.reduced.unwrap().contains("stopped after"));
    }

    #[test]
    fn stop_takes_effect_between_two_evaluations() {
        for at in 0..6 {
            let mut fake = Fake::new(Prediction::X0);
            let mut calls = 0;
            let out = imagine(&mut fake, &seen(4), PROMPT, &settings(), free(), &mut |_| {
                calls += 1;
                if calls > at { Flow::Stop } else { Flow::Continue }
            });
            assert!(matches!(out, Err(ImagineError::Stopped)));
            assert_eq!(calls, at + 1);
            assert!(fake.calls.len() <= 2 * calls);
        }
    }

    #[test]
    fn wrong_inputs_are_named() {
        let check = |seen: ContextLatents, text: &[f32], s: RolloutSettings, want: &str| {
            let mut fake = Fake::new(Prediction::X0);
            let prompt = Prompt { text, null_text: &NULL, camera: None };
            let error = imagine(&mut fake, &seen, prompt, &s, free(), &mut go_on).unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
            assert!(fake.calls.is_empty());
        };
        check(
            ContextLatents { first: vec![0.0; 3], ..seen(2) },
            &TEXT,
            settings(),
            "first frame has 3 values, expected 12",
        );
        check(
            ContextLatents { latents: vec![], ..seen(2) },
            &TEXT,
            settings(),
            "context has 0 values, expected 24",
        );
        check(ContextLatents { index: vec![4, 2], ..seen(2) }, &TEXT, settings(), "ascend");
        check(seen(2), &[0.0; 5], settings(), "text has 5 values, expected 6");
        check(seen(2), &TEXT, RolloutSettings { target_latents: 1, ..settings() }, "target_latents is 1");
        let mut fake = Fake::new(Prediction::X0);
        fake.broken = true;
        let error = imagine(&mut fake, &seen(2), PROMPT, &settings(), free(), &mut go_on).unwrap_err();
        assert!(matches!(error, ImagineError::NotFinite));
    }

    #[test]
    fn the_context_with_the_goal_in_it_is_chosen() {
        // The fake's mask is the latent's first value; latents 5 and 13 of 20 show the goal.
        let mut memory = seen(20);
        memory.latents.fill(-3.0);
        for at in [5, 13] {
            memory.latents[at * 12..(at + 1) * 12].fill(4.0);
        }
        let mut fake = Fake::new(Prediction::X0);
        let chosen = choose_context(&mut fake, &memory, PROMPT, &settings(), 6, free(), &mut go_on).unwrap();
        assert_eq!(chosen.len(), 6);
        assert!(chosen.contains(&5) && chosen.contains(&13) && chosen.contains(&19), "{chosen:?}");
        assert_eq!(fake.calls.len(), 4, "four parts of at most six");
        let few = seen(3);
        let all = choose_context(&mut fake, &few, PROMPT, &settings(), 6, free(), &mut go_on).unwrap();
        assert_eq!(all, [0, 1, 2]);
    }
}
