//! What `engine` calibrates and judges with: the robot's own way from pictures to a goal pose, in rendered houses or
//! along a bag. Calibration inputs are what the denoiser is really given on that way; the task is whether the pose
//! that comes out is right.

use crate::config::RobotConfig;
use crate::context::GroupEncoder;
use crate::ground::{Grounded, Scene, ground, settings_for};
use crate::imagine::{Flow, NoClock};
use crate::interpose::{Interpose, Interposed};
use crate::mind::Pipeline;
use crate::planar::Pose2;
use crate::profile::Profile;
use crate::replay::topics;
use crate::senses::Senses;
use crate::topics::Wanted;
use crate::visit::{SWEEP, Visit, plain_pose};
use anyhow::{Context as _, bail};
use mindseye_bridge::answer::Status;
use mindseye_bridge::bag::{CdrConverter, OpenOptions, ReadOptions, open};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::time::Timestamp;
use mindseye_builder::quant::{
    CalibrationSource, Inputs, SuppliedError, TaskAnswer, TaskEvaluation, TaskFigures,
};
use mindseye_engines::backend::RtenBackend;
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::session_denoiser::step_tensors;
use mindseye_world as world;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Calibration inputs taken from one goal: a few of all its evaluations, so that many scenes are seen.
const PER_GOAL: usize = 4;
/// First seeds of houses, far from those of training examples, `eval` and each other.
const CALIBRATION_SEED: u64 = 0x0ca1_0000_0000;
const HELD_OUT_SEED: u64 = 0x0ca2_0000_0000;
const TASK_SEED: u64 = 0x7a5c_0000_0000;
/// A pose is right within these bounds of the pose that looks at the named thing from the stand-off.
const RIGHT_WITHIN_M: f64 = 0.5;
const RIGHT_WITHIN_DEG: f64 = 25.0;

/// Which inputs of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// For calibration.
    Calibration,
    /// For the comparison with fp32: other houses, or other moments of the bag.
    HeldOut,
}

/// Whether the words of a bundle are those of the rendered houses.
pub fn knows_houses(words: &[String]) -> bool {
    let known = |name: &str| words.iter().any(|w| w == name);
    world::Colour::ALL.iter().all(|c| known(c.name())) && world::Shape::PLAIN.iter().all(|s| known(s.name()))
}

/// A robot that has looked around a house is asked for a thing in it.
struct Asked {
    scene: Scene,
    goal: Goal,
    /// Where it should stand; none where nobody can stand before the thing.
    truth: Option<Pose2>,
}

/// `asked` counts the words that were asked for before: the thing whose words are rarest among them is chosen.
fn ask(
    seed: u64,
    camera: &world::Camera,
    encoder: &mut dyn GroupEncoder,
    asked: &mut HashMap<String, usize>,
) -> anyhow::Result<Asked> {
    let house = world::House::generate(seed, &world::Difficulty::plain());
    let mut visit = Visit::new(house, world::Rng::new(seed), camera, encoder, SWEEP)?;
    let scene = visit.scene();
    let (house, here) = (&visit.house, visit.here);
    // A thing that somebody can stand before; any where there is none.
    let mut order: Vec<usize> = (0..house.objects.len()).collect();
    visit.rng.shuffle(&mut order);
    let pose = |i: usize| world::goal_pose(house, here, i);
    let times = |i: usize| -> usize {
        house.objects[i].name.split(' ').map(|word| asked.get(word).copied().unwrap_or(0)).sum()
    };
    let object = order.iter().copied().min_by_key(|&i| (pose(i).is_none(), times(i)));
    let object = object.context("the house is empty")?;
    let name = &house.objects[object].name;
    for word in name.split(' ') {
        *asked.entry(word.to_owned()).or_default() += 1;
    }
    let mut goal = Goal::text("engine", &format!("find the {name}"))?;
    goal.seed = Some(seed);
    Ok(Asked { scene, goal, truth: pose(object).map(plain_pose) })
}

/// The camera that the houses are rendered with: the model's own.
fn camera(pipeline: &Pipeline) -> world::Camera {
    let image = &pipeline.bundle().manifest().image;
    world::Camera::new(image.width, image.height)
}

/// Keeps some of what a denoiser is given.
#[derive(Default)]
struct Recorder {
    /// Evaluations of the present goal so far, and those to keep.
    seen: usize,
    keep: Vec<usize>,
    kept: Vec<Inputs>,
}

/// Which of `evaluations` to keep in goal number `goal`: over the goals all of them come up, those of one goal being
/// far apart. All noise levels and both branches of the guidance must be calibrated with. Ascends.
fn chosen(goal: u64, evaluations: usize) -> Vec<usize> {
    let golden = 0.618_033_988_749_895;
    let at = |n: u64| ((n as f64 * golden).fract() * evaluations as f64) as usize;
    let first = goal * PER_GOAL as u64;
    let mut keep: Vec<usize> = (first..first + PER_GOAL as u64).map(at).collect();
    keep.sort_unstable();
    keep.dedup();
    keep
}

impl Interpose for Recorder {
    fn denoise(&mut self, denoiser: &mut dyn Denoise, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        if self.keep.contains(&self.seen) {
            let inputs = step_tensors(denoiser.config(), step)?;
            self.kept.push(inputs);
        }
        self.seen += 1;
        denoiser.denoise(step)
    }
}

/// Makes the scene and goal of an index.
type Scenes = dyn FnMut(u64) -> Result<(Scene, Goal), SuppliedError>;

/// Denoiser inputs as they come up while goals are grounded. To be used through
/// [`Spooled`](mindseye_builder::quant::Spooled): making them takes a goal's time for every four.
struct GroundingInputs {
    mind: Interposed<Recorder>,
    scenes: Box<Scenes>,
    goals: u64,
    items: u64,
    given: u64,
    ready: VecDeque<Inputs>,
    description: String,
}

impl GroundingInputs {
    fn new(
        pipeline: &Pipeline,
        seed: u64,
        items: u64,
        scenes: Box<Scenes>,
        description: String,
    ) -> anyhow::Result<Self> {
        let mind = Interposed::new(pipeline.mind(seed)?, Recorder::default());
        Ok(Self { mind, scenes, goals: 0, items, given: 0, ready: VecDeque::new(), description })
    }
}

impl CalibrationSource for GroundingInputs {
    fn describe(&self) -> String {
        self.description.clone()
    }

    fn count(&self) -> Option<u64> {
        Some(self.items)
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        if self.given == 0 {
            Ok(())
        } else {
            Err(SuppliedError::new("these inputs are made once: spool them"))
        }
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        if self.given == self.items {
            return Ok(None);
        }
        if self.ready.is_empty() {
            let (scene, mut goal) = (self.scenes)(self.goals)?;
            // One drive shows the denoiser all noise levels.
            goal.candidates = Some(1);
            let settings = settings_for(&self.mind.spec, &goal);
            let (memory, part) = (scene.memory.len(), self.mind.spec.context_max);
            let looks =
                if memory > part && self.mind.spec.lift.is_some() { memory.div_ceil(part) } else { 0 };
            let branches = if settings.guidance == 1.0 { 1 } else { 2 };
            self.mind.by.keep = chosen(self.goals, looks + 1 + branches * settings.steps);
            (self.mind.by.seen, self.mind.by.kept) = (0, Vec::new());
            let out = ground(&mut self.mind, &scene, &goal, &NoClock, None, &mut |_| Flow::Continue)
                .map_err(SuppliedError::new)?;
            if out.answer.status == Status::Failed {
                return Err(SuppliedError::new(
                    out.answer.reason.unwrap_or_else(|| "the goal failed".into()),
                ));
            }
            self.goals += 1;
            self.ready.extend(std::mem::take(&mut self.mind.by.kept));
        }
        self.given += 1;
        match self.ready.pop_front() {
            Some(item) => Ok(Some(item)),
            None => Err(SuppliedError::new("the goal was answered without asking the denoiser")),
        }
    }
}

/// Calibration inputs from rendered houses, four from each; all words of the model come up among the goals.
///
/// # Errors
/// The bundle's sessions cannot be made.
pub fn from_houses(
    pipeline: &Pipeline,
    share: Share,
    seed: u64,
    items: u64,
) -> anyhow::Result<Box<dyn CalibrationSource>> {
    let base = match share {
        Share::Calibration => CALIBRATION_SEED,
        Share::HeldOut => HELD_OUT_SEED,
    };
    let base = base.wrapping_add(seed.wrapping_mul(1 << 16));
    let (camera, mut encoder) = (camera(pipeline), pipeline.encoder()?);
    let mut asked = HashMap::new();
    let scenes = Box::new(move |i: u64| {
        let seed = base.wrapping_add(i);
        let v = ask(seed, &camera, encoder.as_mut(), &mut asked).map_err(SuppliedError::new)?;
        Ok((v.scene, v.goal))
    });
    let houses = items.div_ceil(PER_GOAL as u64);
    let description = format!("{items} denoiser inputs from goals in {houses} rendered houses, seed {seed}");
    Ok(Box::new(GroundingInputs::new(pipeline, base, items, scenes, description)?))
}

/// Calibration inputs from a bag: it is read once, and at moments spread over it a goal is asked, one after the other.
/// Held-out inputs are taken at moments between those of the calibration.
///
/// # Errors
/// The bag cannot be read, has no camera topic, or shows too little.
pub fn from_bag(
    pipeline: &Pipeline,
    bag: &Path,
    goals: &[String],
    share: Share,
    seed: u64,
    items: u64,
) -> anyhow::Result<Box<dyn CalibrationSource>> {
    if goals.is_empty() {
        bail!("{}: say what to look for in it with --calibration-goal TEXT", bag.display());
    }
    let moments = items.div_ceil(PER_GOAL as u64).max(1);
    let shift = match share {
        Share::Calibration => 1.0,
        Share::HeldOut => 0.5,
    };
    let scenes = bag_scenes(pipeline, bag, moments, shift)?;
    let goals: Vec<Goal> = goals.iter().map(|g| Goal::text("engine", g)).collect::<Result<_, _>>()?;
    let next = Box::new(move |i: u64| {
        let at = usize::try_from(i).unwrap_or(0);
        let mut goal = goals[at % goals.len()].clone();
        goal.seed = Some(seed.wrapping_add(i));
        Ok((scenes[at % scenes.len()].clone(), goal))
    });
    let description =
        format!("{items} denoiser inputs from goals at {moments} moments of {}, seed {seed}", bag.display());
    Ok(Box::new(GroundingInputs::new(pipeline, seed, items, next, description)?))
}

/// What the robot knew at moments spread over a bag; moments at which it knew nothing are left out.
fn bag_scenes(pipeline: &Pipeline, path: &Path, moments: u64, shift: f64) -> anyhow::Result<Vec<Scene>> {
    let config = RobotConfig::default();
    let spec = pipeline.spec();
    let mut senses = Senses::new(config.senses(spec), spec.camera, pipeline.encoder()?);
    let bag = open(path, &OpenOptions::default()).with_context(|| path.display().to_string())?;
    let info = bag.info().clone();
    let topics = topics(&bag, path, &config, &Wanted::default(), &mut |_| {})?;
    let names = topics.keys().map(|id| info.topic(*id).name.clone()).collect();
    let total: u64 = topics.keys().map(|id| info.topic(*id).count).sum();
    let mut due: VecDeque<u64> =
        (0..moments).map(|m| ((m as f64 + shift) / moments as f64 * total as f64) as u64).collect();
    let options = ReadOptions { topics: Some(names), ..ReadOptions::default() };
    let mut converter = CdrConverter::new(&info);
    let (mut scenes, mut taken) = (Vec::new(), 0u64);
    for message in bag.messages(&options) {
        let Some(sense) = topics.get(&message.topic) else { continue };
        let logged_at = Timestamp(message.log_time_ns);
        if let Ok(cdr) = converter.convert(&message)
            && let Err(error) = senses.take(*sense, cdr, logged_at, &NoClock, &mut Profile::default())
        {
            tracing::warn!(%error, "a message was left out");
        }
        taken += 1;
        while due.front().is_some_and(|d| taken >= *d) {
            due.pop_front();
            scenes.extend(senses.context().scene().filter(|s| !s.memory.is_empty()));
        }
    }
    if scenes.is_empty() {
        bail!("{}: not enough is seen in it: the memory needs at least four kept frames", path.display());
    }
    Ok(scenes)
}

/// The grounding task in rendered houses that training never saw: one goal in each, with the runtime's own sampler
/// settings. A scene succeeds when the answer is `found` and its pose lies within 0.5 m and 25 degrees of the pose
/// that looks at the named thing from the stand-off.
pub struct HouseTask {
    bundle: PathBuf,
    houses: u64,
    cancel: Arc<AtomicBool>,
    progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
}

impl HouseTask {
    /// `houses` of them; `progress` is told houses done and their number.
    pub fn new(
        bundle: &Path,
        houses: u64,
        cancel: Arc<AtomicBool>,
        progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
    ) -> Self {
        Self { bundle: bundle.to_owned(), houses: houses.max(1), cancel, progress }
    }

    fn run(&self, denoiser: &Path) -> anyhow::Result<TaskFigures> {
        let mut pipeline = Pipeline::load(&self.bundle, "rten", 1)?;
        if !knows_houses(pipeline.words()) {
            bail!(
                "{} does not know the things of the rendered houses: there is no task to run it on",
                self.bundle.display()
            );
        }
        pipeline.replace_denoiser(&RtenBackend, denoiser, 1)?;
        let camera = camera(&pipeline);
        let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).clamp(1, 8);
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = || -> anyhow::Result<Vec<(usize, TaskAnswer, f64)>> {
            let (mut mind, mut encoder) = (pipeline.mind(0)?, pipeline.encoder()?);
            let mut out = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i as u64 >= self.houses {
                    return Ok(out);
                }
                let v = ask(TASK_SEED + i as u64, &camera, encoder.as_mut(), &mut HashMap::new())?;
                let mut go_on = |_: crate::ground::Stage<'_>| {
                    if self.cancel.load(Ordering::Relaxed) { Flow::Stop } else { Flow::Continue }
                };
                let grounded = ground(mind.as_mut(), &v.scene, &v.goal, &NoClock, None, &mut go_on)?;
                let (answer, consistency) = judge(&grounded, v.truth)?;
                out.push((i, answer, consistency));
                (self.progress)(done.fetch_add(1, Ordering::Relaxed) as u64 + 1, self.houses);
            }
        };
        let mut all = Vec::new();
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            for handle in handles {
                match handle.join() {
                    Ok(part) => all.extend(part?),
                    Err(_) => bail!("a scene panicked"),
                }
            }
            Ok(())
        })?;
        all.sort_by_key(|(i, ..)| *i);
        let count = all.len().max(1) as f64;
        Ok(TaskFigures {
            success: all.iter().filter(|(_, a, _)| a.succeeded).count() as f64 / count,
            consistency: all.iter().map(|(.., c)| c).sum::<f64>() / count,
            scenes: all.len() as u64,
            answers: all.into_iter().map(|(_, answer, _)| answer).collect(),
        })
    }
}

fn judge(grounded: &Grounded, truth: Option<Pose2>) -> anyhow::Result<(TaskAnswer, f64)> {
    let answer = &grounded.answer;
    if answer.status == Status::Failed {
        bail!("{}", answer.reason.as_deref().unwrap_or("the goal failed"));
    }
    let pose = answer.pose.as_ref().map(|p| Pose2::new(p.x, p.y, p.yaw));
    let right = |p: Pose2, t: Pose2| {
        let turn = crate::planar::wrap_angle(p.yaw - t.yaw).abs().to_degrees();
        p.distance(t) <= RIGHT_WITHIN_M && turn <= RIGHT_WITHIN_DEG
    };
    let succeeded = answer.status == Status::Found && pose.zip(truth).is_some_and(|(p, t)| right(p, t));
    let pose = pose.map(|p| [p.x, p.y, p.yaw]);
    let status = answer.status.to_string();
    Ok((TaskAnswer { succeeded, status, pose }, answer.consistency.unwrap_or(0.0)))
}

impl TaskEvaluation for HouseTask {
    fn evaluate(&self, denoiser: &Path) -> Result<TaskFigures, SuppliedError> {
        self.run(denoiser).map_err(|e| SuppliedError::new(super::one_line(&e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_evaluation_comes_up_among_the_goals() {
        for evaluations in [1, 5, 29, 60] {
            let mut seen = vec![0usize; evaluations];
            for goal in 0..evaluations as u64 {
                let keep = chosen(goal, evaluations);
                assert!(!keep.is_empty() && keep.windows(2).all(|w| w[0] < w[1]), "{keep:?}");
                keep.into_iter().for_each(|i| seen[i] += 1);
            }
            assert!(seen.iter().all(|n| *n > 0), "{evaluations}: {seen:?}");
        }
    }
}
