//! One goal from end to end: what was seen and what is asked go in, an answer with its evidence comes out.
//!
//! This is the whole path without threads, sockets and clocks; the node, `replay`, and evaluation all call
//! [`ground`]. The model is behind [`Mind`], so that tests can put a fake in its place.
//!
//! # Models without lift heads
//! A published Wan2.2 checkpoint has no heads for pose, mask and place. It can imagine the way, and the red box in
//! its last frames can say that it found the thing:
//! * a box: the imagined frames are placed by landmarks of the kept ones ([`crate::geometric`]); where there are none,
//!   `failed`, with the reason; box and imagined frames are given, and no pose is made up;
//! * no box: `not_in_context`.

use crate::boxes::{FoundBox, find_box};
use crate::codec::CodecError;
use crate::context::{ContextLatent, EncodeError, GROUP, stretches};
use crate::geometric;
use crate::guide::{self, Carry, HeldMind};
use crate::image::{ModelCamera, RgbImage, mean_difference};
use crate::imagine::{
    Budget, Clock, ContextLatents, Flow, Heads, ImagineError, Imagined, Prompt, RolloutSettings, pick,
    roll_out_held,
};
use crate::lift::{
    Decision, Drift, DriveRule, Estimate, Evidence, LiftParams, Lifted, Registered, distinct, lift,
    seen_from_here, verify,
};
use crate::planar::{OdometryNoise, Pose2, wrap_angle};
use crate::recall::{Recall, RecallView, poses_by_head, views_of};
use crate::served::{Here, Imagine, Inputs, News, ServedError};
use crate::study::Studied;
use crate::witness;
use mindseye_bridge::answer::{Answer, FramedPose2, FramedPose3, Status};
use mindseye_bridge::geometry::{Covariance6, interpolate, planar_isometry};
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::backend::BackendError;
pub use mindseye_engines::bundle::Guide;
use mindseye_engines::denoise::Denoise;
use mindseye_engines::plucker::{Intrinsics, PluckerError};
use mindseye_engines::text::{FIRST_WORD, TokenizerError, UnknownWord, class_of, word_ids};
use mindseye_landmarks::PictureLift;
use nalgebra::Isometry3;
use std::collections::BTreeSet;

pub use crate::imagine::Stage;

/// What a loaded model says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct MindSpec {
    /// The camera that frames are looked at with.
    pub camera: ModelCamera,
    /// Time between two kept frames in training.
    pub frame_period: TimeDelta,
    /// Values per latent.
    pub latent_len: usize,
    /// `base_from_camera` (optical) of the training pictures, where the model was trained for one camera.
    pub mounting: Option<Isometry3<f64>>,
    /// Most context latents in one evaluation.
    pub context_max: usize,
    /// Most context latents of training; an answer from more says so.
    pub context_trained: usize,
    /// Sampler defaults.
    pub settings: RolloutSettings,
    /// Calibration of the lift; `None` for a model without lift heads.
    pub lift: Option<LiftParams>,
    /// Width and height of the pictures of which it reads depth ([`Mind::depth`]): frames are kept in these pixels too.
    pub detail: Option<(usize, usize)>,
    /// What the drive that is shown is held to.
    pub guide: Guide,
    /// Groups of words of which a goal names one each; what it leaves out is tried.
    pub attributes: Vec<Vec<String>>,
    /// Smallest score (0..1) of a box that is reported.
    pub box_min: f64,
    /// Latents at the end of a rollout that show the box (at least 1).
    pub box_latents: usize,
    /// Which bundle.
    pub bundle_sha256: String,
    /// Which engine.
    pub engine_sha256: String,
}

/// The model's parts that one goal needs, for one thread.
pub trait Mind: Send {
    /// What it says about itself.
    fn spec(&self) -> &MindSpec;

    /// A goal begins, whose work must be done in the time `left`; `None`: no limit.
    fn begin(&mut self, _left: Option<TimeDelta>) {}

    /// Encodes a text into rows for the denoiser; the empty text gives the rows of the unconditional branch.
    ///
    /// # Errors
    /// [`MindError::Unknown`], [`MindError::Nothing`] or [`MindError::Several`] where the model has no words for it.
    fn encode_text(&mut self, text: &str) -> Result<Vec<f32>, MindError>;

    /// Encodes one still frame (of the model's size) as a first latent.
    ///
    /// # Errors
    /// When the backend fails.
    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError>;

    /// Decodes a clip `[n, channels, height, width]` into `4 n` frames; frame `4 i + 3` is the last of latent `i`.
    /// Where the first latent of a clip is a single frame (streaming autoencoders) it is given four times.
    ///
    /// # Errors
    /// When the backend fails.
    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError>;

    /// Planar depth (metres along the optical axis) of each pixel of a picture of the training camera, row by row, in the
    /// size that the bundle's `[networks.depth]` states. `None` when the model reads no depth.
    ///
    /// # Errors
    /// [`MindError::DepthSize`] for a picture of another size, [`MindError::Depth`] when the backend fails,
    /// [`MindError::DepthValues`] for what is no depth.
    fn depth(&mut self, _picture: &RgbImage) -> Result<Option<Vec<f32>>, MindError> {
        Ok(None)
    }

    /// Encodes frames of the model's size, [`GROUP`] for each latent, none of them a given first one:
    /// `[frames / GROUP, channels, height, width]`. `None` when the codec cannot encode a clip's frames by themselves.
    ///
    /// # Errors
    /// When the backend fails.
    fn encode_frames(&mut self, _frames: &[RgbImage]) -> Result<Option<Vec<f32>>, MindError> {
        Ok(None)
    }

    /// Whether [`Mind::decode`] also works on latents that do not follow each other.
    fn decodes_alone(&self) -> bool {
        true
    }

    /// Camera rays `[target_latents, tokens, camera_channels]` for a path of camera poses (optical frames) relative to
    /// here: one for the first frame and one for each of the `4 (target_latents - 1)` others. `intrinsics` are those
    /// of the robot's pictures at the model's size, for models that were not trained for one camera.
    ///
    /// # Errors
    /// [`RaysError`]: the model takes none, or the path or the camera cannot be used.
    fn camera_rays(
        &self,
        here_from_camera: &[Isometry3<f64>],
        intrinsics: Option<&Intrinsics>,
    ) -> Result<Vec<f32>, RaysError>;

    /// The denoiser.
    fn denoiser(&mut self) -> &mut dyn Denoise;

    /// Who imagines with it: the denoiser here, unless imagination is served.
    fn imaginer(&mut self) -> Box<dyn Imagine + '_> {
        Box::new(Here(self.denoiser()))
    }

    /// Asked once after each goal: another mind to answer it with, and why, where this one was out of reach.
    fn instead(&mut self) -> Option<(&mut dyn Mind, String)> {
        None
    }
}

/// Why the model cannot serve a goal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MindError {
    /// The text holds words that the model never learned.
    #[error("{}; it knows {}", named(unknown), known.join(", "))]
    Unknown {
        /// The words, each with the known word nearest to it; at least one.
        unknown: Vec<UnknownWord>,
        /// All words that it knows.
        known: Vec<String>,
    },
    /// The text names no thing.
    #[error("the goal names nothing that this model knows; it knows {}", known.join(", "))]
    Nothing {
        /// All words that it knows.
        known: Vec<String>,
    },
    /// The text has more words that the model knows than fit.
    #[error("one thing at a time, by at most {most} of the words {}", known.join(", "))]
    Several {
        /// Words that fit.
        most: usize,
        /// All words that it knows.
        known: Vec<String>,
    },
    /// There is no model.
    #[error("no model bundle is loaded")]
    NoModel,
    /// The tokenizer refused the text.
    #[error("tokenizer: {0}")]
    Tokenizer(#[from] TokenizerError),
    /// The text encoder failed.
    #[error("text encoder: {0}")]
    TextEncoder(#[source] BackendError),
    /// The text encoder gave another number of values than the denoiser takes.
    #[error("text encoder: gave {got} values, expected {expected}")]
    TextRows {
        /// Wanted.
        expected: usize,
        /// Got.
        got: usize,
    },
    /// The depth reader failed.
    #[error("depth reader: {0}")]
    Depth(#[source] BackendError),
    /// The depth reader was given a picture of another size.
    #[error("depth reader: a picture of {}x{} pixels, expected {}x{}", got[0], got[1], expected[0], expected[1])]
    DepthSize {
        /// Wanted width and height.
        expected: [usize; 2],
        /// Width and height of the picture.
        got: [usize; 2],
    },
    /// The depth reader gave something other than a distance for each pixel.
    #[error("depth reader: wanted {expected} finite values, got {got} values, {unusable} of them not finite")]
    DepthValues {
        /// Pixels.
        expected: usize,
        /// Values.
        got: usize,
        /// Values that are no number or no distance.
        unusable: usize,
    },
    /// A frame could not be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A clip could not be decoded.
    #[error(transparent)]
    Decode(#[from] CodecError),
    /// What is done elsewhere could not be had.
    #[error(transparent)]
    Served(#[from] ServedError),
}

impl MindError {
    /// Whether the model lacks words for the goal, or there is no model: nothing that it could have seen.
    pub fn is_about_words(&self) -> bool {
        matches!(self, Self::Unknown { .. } | Self::Nothing { .. } | Self::Several { .. } | Self::NoModel)
    }
}

/// Why a model has no rays for a path.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RaysError {
    /// It takes none.
    #[error("this model was not trained to follow waypoints; ask by text")]
    NotTrained,
    /// It takes rays of any camera, and the robot's is not known.
    #[error(
        "the camera's focal length is not known, so no waypoints can be followed; wanted camera_info, or [camera] in \
         the configuration"
    )]
    NoIntrinsics,
    /// The path or the camera cannot be used.
    #[error(transparent)]
    Plucker(#[from] PluckerError),
}

fn named(unknown: &[UnknownWord]) -> String {
    let each = |u: &UnknownWord| format!("{:?} (the nearest known word is {:?})", u.word, u.nearest);
    format!("this model does not know {}", unknown.iter().map(each).collect::<Vec<_>>().join(" and "))
}

/// What is known when a goal arrives.
#[derive(Clone, Debug)]
pub struct Scene {
    /// What was seen, oldest first.
    pub memory: Vec<ContextLatent>,
    /// The newest frame at the model's size.
    pub newest: RgbImage,
    /// The same frame in the pixels of which the model reads depth, where it does.
    pub newest_detail: Option<RgbImage>,
    /// Its stamp.
    pub captured_at: Timestamp,
    /// `odom_from_base` at that stamp; `None` without odometry.
    pub odom_from_base: Option<Pose2>,
    /// Name of the frame that odometry is in.
    pub odom_frame: String,
    /// Name of the robot's base frame: answers without odometry are relative to it.
    pub base_frame: String,
    /// The camera's mounting, `base_from_camera` (optical); `None` when it is not known.
    pub base_from_camera: Option<Isometry3<f64>>,
    /// What odometry is known to be off, as a random walk.
    pub odometry_noise: OdometryNoise,
    /// Intrinsics of the pictures at the model's size, pixel centres at +0.5; `None` when they are not known.
    pub intrinsics: Option<Intrinsics>,
    /// What studying frames in full has given; empty where none are.
    pub studied: Studied,
}

/// An answer with its evidence.
#[derive(Clone, Debug)]
pub struct Grounded {
    /// The answer.
    pub answer: Answer,
    /// What the lift found, relative to the base where the rollout begins: at the newest frame, or where an older view
    /// of the thing was had.
    pub lifted: Option<Lifted>,
    /// Frames of the drive that is shown; empty when none was sampled.
    pub frames: Vec<RgbImage>,
    /// Where the drive that is shown was held to what was seen: the same drive before, from the video alone, and what was
    /// carried alone.
    pub guided: Option<Guided>,
    /// Which candidate that drive is, from 0; a guided one comes after all others.
    pub candidate: usize,
    /// The base where the rollout begins, in the answer's frame; `None` without odometry: it begins at the newest frame.
    pub origin: Option<Pose2>,
    /// How much of a picture of the sampled drive what was seen explains: frame, 0 to 1; empty where it was not registered.
    pub explained: Vec<(usize, f64)>,
    /// The box in the last frames.
    pub found_box: Option<FoundBox>,
    /// Positions in the scene's memory that were used.
    pub used: Vec<usize>,
    /// Path of the base in the rollout, in the answer's frame.
    pub path: Vec<Pose2>,
    /// Where the sampled drive's frames were registered among what was seen, or by landmarks: poses of the base in the answer's
    /// frame, one per latent; empty where they were not.
    pub registered: Vec<Pose2>,
    /// The object's place in the answer's frame.
    pub object: Option<(f64, f64)>,
    /// What placing the imagined frames by landmarks gave; `None` where it was not tried.
    pub geometry: Option<PictureLift>,
    /// Duration of each denoising step, ms.
    pub step_ms: Vec<f64>,
    /// Mean absolute error (0..1) of the codec on the frames in use, where the bundle limits it.
    pub reconstruction_error: Option<f64>,
}

/// What a guided drive was made of.
#[derive(Clone, Debug)]
pub struct Guided {
    /// Which of the sampled drives that is, from 0.
    pub candidate: usize,
    /// Frames of the drive that was sampled from the video alone: the witness.
    pub video_only: Vec<RgbImage>,
    /// What was seen, carried into the drive's views, holes filled: no network had a part in it. As many frames as the
    /// drive has, the given first one being the newest view itself.
    pub carried: Vec<RgbImage>,
    /// The drive in the pixels of remembered pictures, as many frames: what a person looks at.
    pub detail: Vec<RgbImage>,
    /// Where the base stands in the answer's frame, for the given first frame and each of those after it; empty for a goal
    /// by waypoints, whose poses are given.
    pub way: Vec<Pose2>,
}

impl Grounded {
    /// The drive that is shown in as many pixels as there are: what a person looks at.
    pub fn shown(&self) -> &[RgbImage] {
        let detail = self.guided.as_ref().map(|guided| &guided.detail[..]);
        detail.filter(|detail| detail.len() == self.frames.len()).unwrap_or(&self.frames)
    }
}

/// The settings of one goal: the bundle's defaults with what the goal asks for.
pub fn settings_for(spec: &MindSpec, goal: &Goal) -> RolloutSettings {
    let mut settings = spec.settings.clone();
    if let Some(lift) = &spec.lift {
        settings.glance_timestep = lift.glance_timestep;
    }
    if let Some(candidates) = goal.candidates {
        settings.candidates = (candidates as usize).max(1);
    }
    if let Some(seed) = goal.seed {
        settings.seed = seed;
    }
    settings
}

/// The caller said stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped")]
pub struct Stopped;

/// Why a goal has no answer of its own.
#[derive(Debug, thiserror::Error)]
enum GroundError {
    #[error(transparent)]
    Stopped(#[from] Stopped),
    #[error(transparent)]
    Mind(#[from] MindError),
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error(transparent)]
    Imagine(ImagineError),
    #[error("nothing has been seen yet")]
    NothingSeen,
    #[error(
        "the camera's mounting is not known, so no waypoints can be followed; wanted tf_static, or [camera] in the \
         configuration"
    )]
    Mounting,
    #[error(transparent)]
    Rays(#[from] RaysError),
    #[error("the camera sees {seen:.2} of what the model looks at; {wanted:.2} is needed")]
    FieldOfView { seen: f64, wanted: f64 },
}

impl From<ImagineError> for GroundError {
    fn from(e: ImagineError) -> Self {
        match e {
            ImagineError::Stopped => Self::Stopped(Stopped),
            other => Self::Imagine(other),
        }
    }
}

/// What stays the same for one goal.
struct Job<'a> {
    scene: &'a Scene,
    goal: &'a Goal,
    /// The standoff is that of the thing that is asked for.
    spec: MindSpec,
    settings: RolloutSettings,
    budget: Budget<'a>,
    views: Views,
}

/// Where a rollout may begin.
#[derive(Clone, Copy, PartialEq)]
enum Views {
    /// At the end of any stretch of the memory.
    OfAllStretches,
    /// Where the robot is.
    FromHere,
}

impl Job<'_> {
    fn by_text(&self) -> bool {
        matches!(self.goal.kind, GoalKind::Text(_))
    }

    fn inputs<'b>(&'b self, seen: &'b ContextLatents, request: &'b Request) -> Inputs<'b> {
        Inputs { seen, prompt: request.prompt(), settings: &self.settings, budget: self.budget }
    }

    /// Time for sampling. Where drives are registered among what was seen, the last third of what is left is for that.
    fn sampling(&self) -> Budget<'_> {
        let registers = self.spec.lift.as_ref().is_some_and(|lift| lift.registration.is_some());
        let until = self.budget.until.filter(|_| registers).zip(self.budget.left());
        let until = until.map(|(until, left)| until - TimeDelta(left.0.max(0) / 3));
        Budget { until: until.or(self.budget.until), ..self.budget }
    }

    /// Whether there is time for the fewest steps worth doing of one more drive: for less nothing is carried.
    fn has_time(&self, imagined: &Imagined) -> bool {
        let step = imagined.step_times.iter().copied().max().unwrap_or(TimeDelta(1));
        let least = TimeDelta(step.0.saturating_mul(self.settings.min_steps.max(1) as i64));
        self.budget.left().is_none_or(|left| left >= least)
    }

    /// Imagined frames that show the box, at the end of a rollout.
    fn boxed_frames(&self) -> usize {
        self.spec.box_latents.max(1) * GROUP
    }
}

/// The answer so far, and who watches.
struct Report<'a> {
    grounded: Grounded,
    clock: &'a dyn Clock,
    last: TimeDelta,
    progress: &'a mut dyn FnMut(Stage<'_>) -> Flow,
}

impl Report<'_> {
    /// Tells that a stage is done, unless there is nothing to tell, and notes under `name` how long it took.
    fn done(&mut self, name: &str, stage: Option<Stage<'_>>) -> Result<(), Stopped> {
        let now = self.clock.now();
        self.grounded.answer.timings_ms.insert(name.into(), (now - self.last).as_millis_f64());
        self.last = now;
        match stage.map(|stage| (self.progress)(stage)) {
            Some(Flow::Stop) => Err(Stopped),
            _ => Ok(()),
        }
    }

    /// Notes how long registering by landmarks took, where that was tried.
    fn registered(&mut self) -> Result<(), Stopped> {
        if self.grounded.geometry.is_some() { self.done("register", None) } else { Ok(()) }
    }

    /// Notes where the rollout begins and what is looked at.
    fn begins(&mut self, scene: &Scene, view: &View) -> Result<(), Stopped> {
        self.grounded.used.clone_from(&view.used);
        self.grounded.origin = view.origin;
        let answer = &mut self.grounded.answer;
        answer.context_latents = view.used.len() as u32;
        let eyes = view.used.iter().filter_map(|p| scene.memory.get(*p)?.by.as_deref());
        answer.eyes = eyes.collect::<BTreeSet<_>>().into_iter().map(str::to_owned).collect();
        if let Some(start) = view.start.and_then(|p| scene.memory.get(p)) {
            answer.stamp_ns = Some(start.info.captured_at.as_nanos());
        }
        self.done("select", Some(Stage::Encode))
    }

    /// Notes what was sampled.
    fn sampled(&mut self, imagined: &Imagined) -> Result<(), Stopped> {
        self.done("denoise", None)?;
        let Grounded { answer, step_ms, .. } = &mut self.grounded;
        *step_ms = imagined.step_times.iter().map(|t| t.as_millis_f64()).collect();
        answer.steps = imagined.rollouts.iter().map(|r| r.steps as u32).max().unwrap_or(0);
        answer.imagined = !imagined.rollouts.is_empty();
        answer.candidates = imagined.glances.len().max(imagined.rollouts.len()) as u32;
        Ok(())
    }
}

/// Grounds one goal. `until` is the time on `clock` by which sampling must be over.
///
/// Everything that can go wrong with the goal or the model ends in an answer with a status and a reason.
///
/// # Errors
/// [`Stopped`] only: `progress` said stop, and the agent has answered already.
pub fn ground(
    mind: &mut dyn Mind,
    scene: &Scene,
    goal: &Goal,
    clock: &dyn Clock,
    until: Option<TimeDelta>,
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Grounded, Stopped> {
    let grounded = ground_by(mind, scene, goal, clock, until, progress)?;
    let instead = mind.instead().filter(|_| grounded.answer.status == Status::Failed);
    let Some((other, why)) = instead else { return Ok(grounded) };
    let mut grounded = ground_by(other, scene, goal, clock, until, progress)?;
    grounded.answer.fallback = Some(why);
    Ok(grounded)
}

fn ground_by(
    mind: &mut dyn Mind,
    scene: &Scene,
    goal: &Goal,
    clock: &dyn Clock,
    until: Option<TimeDelta>,
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Grounded, Stopped> {
    let settings = settings_for(mind.spec(), goal);
    let mut answer = Answer::new(&goal.id, Status::Failed, None);
    answer.seed = settings.seed;
    answer.stamp_ns = Some(scene.captured_at.as_nanos());
    answer.bundle_sha256.clone_from(&mind.spec().bundle_sha256);
    answer.engine_sha256.clone_from(&mind.spec().engine_sha256);
    let grounded = Grounded {
        answer,
        lifted: None,
        frames: Vec::new(),
        guided: None,
        candidate: 0,
        origin: None,
        explained: Vec::new(),
        found_box: None,
        used: Vec::new(),
        path: Vec::new(),
        registered: Vec::new(),
        object: None,
        geometry: None,
        step_ms: Vec::new(),
        reconstruction_error: None,
    };
    let spec = spec_for(mind.spec(), goal_text(goal));
    let budget = Budget { clock, until };
    let job = Job { scene, goal, spec, settings, budget, views: Views::OfAllStretches };
    let mut report = Report { grounded, clock, last: clock.now(), progress };
    mind.begin(job.budget.left());
    let attempted = match narrow_view(&job) {
        Some(narrow) => Err(narrow),
        None => attempt(mind, &job, &mut report),
    };
    let mut unsuited = unsuited(&report.grounded, &job.spec);
    match attempted {
        Ok(()) => {
            state_context(&mut report.grounded, &job.spec);
        }
        Err(GroundError::Stopped(stopped)) => return Err(stopped),
        Err(error) => {
            report.grounded.answer.status = Status::Failed;
            report.grounded.answer.reason = Some(error.to_string());
            unsuited |= match &error {
                GroundError::Mind(e) => e.is_about_words(),
                error => matches!(error, GroundError::FieldOfView { .. }),
            };
        }
    }
    if job.by_text() {
        let agree_max = job.spec.lift.as_ref().map_or(DEFAULT_AGREE_MAX, |lift| lift.agree_max);
        witness::join(&mut report.grounded, scene, goal, unsuited, agree_max);
    }
    Ok(report.grounded)
}

/// A newest frame shows the thing where the mask says that it is more likely than not in one of its tokens (a logit above 0). Whether
/// anything is remembered is asked of many tokens and needs more. In 31 ends of drives to things that had been moved away the
/// logit was below -2.4, where things were there above 4.8.
const SEEN_MIN: f64 = 0.0;

/// Looks once more at what was asked for, by glances alone: where the goal's pose is, relative to the base at the newest
/// frame. `None` when it is not believed, cannot be told, or the newest frame does not show the thing: what is
/// remembered says where it was, not that it is still there.
pub fn look(mind: &mut dyn Mind, scene: &Scene, goal: &Goal, budget: Budget<'_>) -> Option<Pose2> {
    let spec = spec_for(mind.spec(), goal_text(goal));
    let settings = settings_for(&spec, goal);
    let job = Job { scene, goal, settings, spec, budget, views: Views::OfAllStretches };
    mind.begin(budget.left());
    let request = encode(mind, &job, goal_text(goal)).ok()?;
    let Asked { request, view, spec, .. } = ask(mind, &job, request, &mut |_| Flow::Continue).ok()?;
    let params = spec.lift?;
    let glances = mind.imaginer().glance(job.inputs(&view.seen, &request)).ok()?;
    let lifted = verify(view.lift(&glances, &params), &[], Evidence::default(), &params);
    let pose = lifted.estimate.pose.filter(|_| lifted.decision == Decision::Found)?;
    let seen = match view.start {
        None => seen_from_here(&glances),
        // Where the thing is was told from an older view; whether it is there is seen from here.
        Some(_) => {
            let from_here =
                Job { settings: job.settings.clone(), spec: job.spec.clone(), views: Views::FromHere, ..job };
            let (here, _) = choose_view(mind, &from_here, &request, &mut |_| Flow::Continue).ok()?;
            seen_from_here(&mind.imaginer().glance(job.inputs(&here.seen, &request)).ok()?)
        }
    };
    if seen <= SEEN_MIN {
        return None;
    }
    match (view.start, view.origin, scene.odom_from_base) {
        (None, ..) => Some(pose),
        (Some(_), Some(origin), Some(here)) => Some(here.relative(origin.compose(pose))),
        _ => None,
    }
}

/// Spreads by which witnesses may differ where the bundle does not say.
const DEFAULT_AGREE_MAX: f64 = 3.0;

/// Smallest share of what the model looks at that the camera has to see; the rest is black in its pictures.
const FIELD_SEEN_MIN: f64 = 0.6;

/// That the camera sees too little of what the model looks at, where a detector can answer in the model's place.
fn narrow_view(job: &Job<'_>) -> Option<GroundError> {
    let (GoalKind::Text(text), Some(classes)) = (&job.goal.kind, &job.scene.studied.classes) else {
        return None;
    };
    class_of(classes, text).ok()?;
    let seen = job.scene.studied.camera?.share_seen_of(&job.spec.camera.pinhole()?);
    (seen < FIELD_SEEN_MIN).then_some(GroundError::FieldOfView { seen, wanted: FIELD_SEEN_MIN })
}

/// Whether the model has nothing to say of this place: its pictures are unlike those that it was trained on, or nothing of
/// it gives a pose.
fn unsuited(grounded: &Grounded, spec: &MindSpec) -> bool {
    let limit = spec.lift.as_ref().and_then(|lift| lift.reconstruction_max);
    let unlike = grounded.reconstruction_error.zip(limit).is_some_and(|(error, most)| error > most);
    unlike || (spec.lift.is_none() && grounded.answer.status == Status::Failed)
}

/// The steps, one after the other; `report` holds what is known when one fails.
fn attempt(mind: &mut dyn Mind, job: &Job<'_>, report: &mut Report<'_>) -> Result<(), GroundError> {
    let request = encode(mind, job, goal_text(job.goal))?;
    report.done("text", Some(Stage::Text))?;

    let Asked { request, view, spec, note } = ask(mind, job, request, report.progress)?;
    let job = &Job { spec, settings: job.settings.clone(), ..*job };
    report.begins(job.scene, &view)?;

    let mut imagined = imagine(mind, job, &request, &view, report)?;
    report.sampled(&imagined)?;

    let params = job.spec.lift.as_ref();
    let estimate = params.map(|params| view.lift(&imagined.glances, params));
    let goal_pose = |pose| if job.by_text() { pose } else { request.route.last().copied() };
    let end = estimate.as_ref().and_then(|estimate| goal_pose(estimate.pose));
    let (mut recall, unregistered) = match imagined.rollouts.is_empty() {
        true => (None, Unregistered::default()),
        false => recall(mind, job, &view)?,
    };
    report.done("recall", None)?;

    let (drive, hurried) = choose_drive(mind, job, &view, (&mut imagined, end), recall.as_mut(), report)?;
    report.done("decode_video", Some(Stage::Decode))?;

    let Some((params, estimate)) = params.zip(estimate) else {
        answer_without_heads(job, &imagined, drive.clearest, report);
        report.registered()?;
        report.done("lift", Some(Stage::Lift))?;
        return Ok(());
    };
    let evidence = Evidence {
        registered: drive.registered,
        likeness_error: likeness_error(job, &view, &report.grounded.frames, end),
        reconstruction_error: report.grounded.reconstruction_error,
    };
    let mut lifted = verify(estimate, &imagined.rollouts, evidence, params);
    if !job.by_text() {
        let way = recall.as_mut().and_then(|r| r.follow(&report.grounded.frames, &request.cameras));
        follow(&mut lifted, &imagined, &request.route, way.as_deref(), params);
        let explained = way.iter().flatten().map(|(frame, error, _)| (*frame, 1.0 - error));
        report.grounded.explained = explained.collect();
    } else if !drive.path.is_empty() {
        lifted.path = drive.path;
    }
    if lifted.decision == Decision::Found && job.spec.guide != Guide::None && job.has_time(&imagined) {
        let recall = match recall {
            None if view.origin.is_none() => recall_by_head(mind, job, (&request, &view))?,
            known => known,
        };
        if let Some(mut recall) = recall.filter(|_| !imagined.rollouts.is_empty()) {
            guide(mind, job, (&request, &view), &imagined, (&lifted, &mut recall), report)?;
        }
        report.done("guide", None)?;
    }
    publish(&mut report.grounded, job, &view, &request, lifted);
    if job.by_text() {
        geometric::vote(&mut report.grounded, job.scene, &job.spec, job.boxed_frames(), params.agree_max);
        report.registered()?;
    }
    let required = params.drive == DriveRule::Required && !imagined.rollouts.is_empty();
    for note in [note, imagined.reduced, hurried, unregistered.note(required)].into_iter().flatten() {
        let answer = &mut report.grounded.answer;
        answer.reason = Some(with_reduction(answer.reason.take(), Some(&note)));
    }
    report.done("lift", Some(Stage::Lift))?;
    Ok(())
}

/// Reads the sampled drives and notes the one that shows the most, which becomes the first one of `imagined`; `end` is a
/// pose to begin looking for their ends from. Also why less was looked at.
fn choose_drive(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    view: &View,
    (imagined, end): (&mut Imagined, Option<Pose2>),
    recall: Option<&mut Recall>,
    report: &mut Report<'_>,
) -> Result<(Shown, Option<String>), GroundError> {
    let mut drives = look_at(mind, job, imagined, (recall, end), report.progress)?;
    let (looked_at, sampled) = (drives.len(), imagined.rollouts.len());
    let hurried = (looked_at < sampled)
        .then(|| format!("{looked_at} of {sampled} imagined drives were looked at, to meet the deadline"));
    let best = best_drive(&drives);
    let mut drive = if drives.is_empty() { Shown::default() } else { drives.swap_remove(best) };
    let grounded = &mut report.grounded;
    if !imagined.rollouts.is_empty() {
        imagined.rollouts.swap(0, best);
        grounded.candidate = best;
    }
    grounded.found_box = drive.clearest.filter(|b| b.score >= job.spec.box_min);
    grounded.answer.bounding_box = grounded.found_box.map(|b| b.edges());
    grounded.frames = std::mem::take(&mut drive.frames);
    grounded.explained = std::mem::take(&mut drive.explained);
    let origin = view.origin.unwrap_or_default();
    grounded.registered = drive.path.iter().map(|pose| origin.compose(*pose)).collect();
    grounded.reconstruction_error = match job.spec.lift.as_ref().and_then(|lift| lift.reconstruction_max) {
        Some(_) if mind.decodes_alone() => reconstruction_error(mind, job.scene, view)?,
        _ => None,
    };
    Ok((drive, hurried))
}

/// The answer of a model without lift heads: see the head of this file.
fn answer_without_heads(
    job: &Job<'_>,
    imagined: &Imagined,
    clearest: Option<FoundBox>,
    report: &mut Report<'_>,
) {
    let (status, reason) = if job.by_text() {
        without_heads(imagined, clearest, job.spec.box_min)
    } else {
        let reason = "the drive along the waypoints was imagined, but this model has no heads to tell whether it \
                      went there: no pose can be given; the imagined frames are attached";
        (Status::Failed, reason.into())
    };
    report.grounded.answer.status = status;
    report.grounded.answer.reason = Some(with_reduction(Some(reason), imagined.reduced.as_deref()));
    if job.by_text() {
        geometric::answer(&mut report.grounded, job.scene, &job.spec, job.boxed_frames());
    }
}

/// What is asked for, as the denoiser takes it.
struct Request {
    text: Vec<f32>,
    null_text: Vec<f32>,
    /// Camera rays along the waypoints.
    rays: Option<Vec<f32>>,
    /// Base poses at the waypoints, relative to here; empty for a goal by text.
    route: Vec<Pose2>,
    /// The camera's poses along the route, relative to here, one for the first frame and one for each of the others; none for
    /// a goal by text.
    cameras: Vec<Isometry3<f64>>,
}

impl Request {
    fn prompt(&self) -> Prompt<'_> {
        Prompt { text: &self.text, null_text: &self.null_text, camera: self.rays.as_deref() }
    }
}

/// Encodes the goal; one by text in the words of `text`.
fn encode(mind: &mut dyn Mind, job: &Job<'_>, text: &str) -> Result<Request, GroundError> {
    let null_text = mind.encode_text("")?;
    match &job.goal.kind {
        GoalKind::Text(_) => {
            let text = mind.encode_text(text)?;
            Ok(Request { text, null_text, rays: None, route: Vec::new(), cameras: Vec::new() })
        }
        GoalKind::Waypoints(poses) => {
            let mount = job.scene.base_from_camera.or(job.spec.mounting).ok_or(GroundError::Mounting)?;
            let route = base_route(poses, &mount);
            let images = 1 + (job.settings.target_latents - 1) * GROUP;
            let cameras = camera_path(poses, &route, &mount, images);
            let rays = Some(mind.camera_rays(&cameras, job.scene.intrinsics.as_ref())?);
            Ok(Request { text: null_text.clone(), null_text, rays, route, cameras })
        }
    }
}

/// The text of a goal; empty for waypoints.
fn goal_text(goal: &Goal) -> &str {
    match &goal.kind {
        GoalKind::Text(text) => text,
        GoalKind::Waypoints(_) => "",
    }
}

/// One thing that a goal may mean.
#[derive(Debug, PartialEq)]
struct Meaning {
    /// The thing, as training named it: "yellow cone".
    thing: String,
    /// The goal's text with the words that it leaves out.
    text: String,
}

/// What a text may mean for a model whose goals name one word of each group: itself where it does so, or names none at
/// all; else every choice of the words that it leaves out, in the order of the groups.
fn meanings(groups: &[Vec<String>], text: &str) -> Vec<Meaning> {
    fn named_in<'a>(text: &str, group: &'a [String]) -> Option<&'a String> {
        word_ids(group, text).first().map(|id| &group[id - FIRST_WORD])
    }
    let named = |group| named_in(text, group);
    let whole =
        groups.iter().all(|group| named(group).is_some()) || groups.iter().all(|g| named(g).is_none());
    let mut all = vec![Meaning { thing: String::new(), text: text.to_owned() }];
    for group in groups.iter().filter(|_| !whole) {
        let words = match named(group) {
            Some(word) => std::slice::from_ref(word),
            None => group,
        };
        let with = |m: &Meaning, word: &String| Meaning {
            thing: format!("{} {word}", m.thing).trim_start().to_owned(),
            text: if named(group).is_some() { m.text.clone() } else { format!("{word} {}", m.text) },
        };
        all = all.iter().flat_map(|m| words.iter().map(|word| with(m, word))).collect();
    }
    all
}

/// A goal as the model is asked for it.
struct Asked {
    request: Request,
    view: View,
    /// The standoff is that of the thing.
    spec: MindSpec,
    /// What the goal was taken for, where it leaves words out.
    note: Option<String>,
}

/// Chooses the view for a goal that was encoded as it was given. One that leaves out words that training's goals have (a
/// colour) is tried with each of them while half of the time is left: the thing that would be believed wins; of several, the
/// one with the clearest sight.
fn ask(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    request: Request,
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Asked, GroundError> {
    let all = meanings(&job.spec.attributes, goal_text(job.goal));
    let Some(params) = job.spec.lift.as_ref().filter(|_| all.len() > 1) else {
        let (view, _) = choose_view(mind, job, &request, progress)?;
        return Ok(Asked { request, view, spec: job.spec.clone(), note: None });
    };
    let began = job.budget.clock.now();
    let mut tried = Vec::new();
    for (i, meaning) in all.iter().enumerate() {
        if i > 0 && !job.budget.lasts_for_more(began, i) {
            break;
        }
        let mut scan = |stage: Stage<'_>| match stage {
            Stage::Scan(part, parts) => progress(Stage::Scan(i * parts + part, all.len() * parts)),
            other => progress(other),
        };
        let request = encode(mind, job, &meaning.text)?;
        let (view, known) = choose_view(mind, job, &request, &mut scan)?;
        let clear = match known {
            Some(clear) => clear,
            None => clearness(mind, job, &request, &view, params)?,
        };
        tried.push((clear, meaning, request, view));
    }
    let looked_for = tried.len();
    tried.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal));
    let others: Vec<&str> =
        tried.iter().skip(1).filter(|(clear, ..)| clear.0).map(|(_, m, ..)| m.thing.as_str()).collect();
    let mut note = format!("{looked_for} of {} things that this may mean were looked for", all.len());
    let Some(((believed, _), meaning, request, view)) = tried.into_iter().next() else {
        return Err(GroundError::NothingSeen);
    };
    if believed {
        note += &format!("; \"{}\" was seen most clearly", meaning.thing);
    }
    if !others.is_empty() {
        note += &format!(" (also there: {})", others.join(", "));
    }
    Ok(Asked { request, view, spec: spec_for(mind.spec(), &meaning.text), note: Some(note) })
}

/// Whether what is seen of the goal from a view would be believed, and how clearly it is seen, by glances.
fn clearness(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    request: &Request,
    view: &View,
    params: &LiftParams,
) -> Result<(bool, f64), GroundError> {
    let glances = mind.imaginer().glance(job.inputs(&view.seen, request))?;
    let lifted = verify(view.lift(&glances, params), &[], Evidence::default(), params);
    Ok((lifted.decision == Decision::Found, lifted.estimate.mask_max))
}

/// Glances at the candidates, with a draft of the answer after each, and samples the rollouts.
fn imagine(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    request: &Request,
    view: &View,
    report: &mut Report<'_>,
) -> Result<Imagined, GroundError> {
    let template = report.grounded.answer.clone();
    let mut progress = |news: News<'_>| {
        let glances = match news {
            News::Glanced(glances) => glances,
            News::Stage(stage) => return (report.progress)(stage),
        };
        let Some(params) = job.spec.lift.as_ref().filter(|_| job.by_text()) else {
            return (report.progress)(Stage::Encode);
        };
        let estimate = view.lift(glances, params);
        let mut draft = template.clone();
        fill(&mut draft, job.scene, view, &verify(estimate, &[], Evidence::default(), params));
        draft.candidates = glances.len() as u32;
        (report.progress)(Stage::Draft(&draft))
    };
    let inputs = Inputs { budget: job.sampling(), ..job.inputs(&view.seen, request) };
    Ok(mind.imaginer().imagine(inputs, &mut progress)?)
}

/// What one sampled drive shows.
#[derive(Default)]
struct Shown {
    frames: Vec<RgbImage>,
    /// The clearest box in the last frames, good enough or not.
    clearest: Option<FoundBox>,
    registered: Option<Registered>,
    /// Where its pictures were taken: one pose per latent; empty when they were not registered.
    path: Vec<Pose2>,
    /// See [`Grounded::explained`].
    explained: Vec<(usize, f64)>,
}

/// Decodes the sampled drives and reads them; `end` is a pose to begin looking for their ends from. The first is read in
/// any case, the others while there is time.
fn look_at(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    imagined: &Imagined,
    (mut recall, end): (Option<&mut Recall>, Option<Pose2>),
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Vec<Shown>, GroundError> {
    let mut out = Vec::new();
    let (mut last, mut longest) = (job.budget.clock.now(), TimeDelta::ZERO);
    for rollout in &imagined.rollouts {
        if !out.is_empty() {
            let now = job.budget.clock.now();
            (longest, last) = (longest.max(now - last), now);
            if job.budget.left().is_some_and(|left| left < longest) {
                break;
            }
            if progress(Stage::Decode) == Flow::Stop {
                return Err(Stopped.into());
            }
        }
        let frames = mind.decode(&rollout.latents)?;
        let clearest = find_box(&frames[frames.len().saturating_sub(job.boxed_frames())..]);
        let found = clearest.filter(|b| b.score >= job.spec.box_min);
        let heads = rollout.heads.pose.iter().skip(rollout.heads.context);
        let way: Vec<Pose2> = heads
            .map(|[x, y, c, s]| Pose2::new(f64::from(*x), f64::from(*y), f64::from(*s).atan2(f64::from(*c))))
            .collect();
        let starts: Vec<Pose2> = end.into_iter().chain(way.last().copied()).collect();
        let boxed = if job.by_text() { job.boxed_frames() } else { GROUP };
        let read = recall.as_mut().and_then(|r| r.read(&frames, boxed, found.as_ref(), &starts, &way));
        let shown = Shown { frames, clearest, ..Shown::default() };
        out.push(match read {
            Some(read) => Shown {
                registered: Some(read.registered),
                path: read.path,
                explained: read.explained,
                ..shown
            },
            None => shown,
        });
    }
    Ok(out)
}

/// The drive whose pictures show the most: what was seen explains them, and they end with a box; where they are not
/// registered, the one with the clearest box. The first of several.
fn best_drive(drives: &[Shown]) -> usize {
    let cost = |d: &Shown| match &d.registered {
        Some(shown) => shown.cost(),
        None => 10.0 - d.clearest.map_or(0.0, |b| b.score),
    };
    let costs: Vec<f64> = drives.iter().map(cost).collect();
    (0..costs.len()).min_by(|a, b| costs[*a].total_cmp(&costs[*b])).unwrap_or(0)
}

/// Why pictures are not, or only partly, held against what was seen.
#[derive(Default)]
struct Unregistered {
    why: Option<&'static str>,
    /// Views before a jump of odometry.
    left_out: usize,
}

impl Unregistered {
    /// For the answer; nothing when the drive was held against everything, or `required` says that nobody asked.
    fn note(&self, required: bool) -> Option<String> {
        match self.why {
            Some(why) if required => {
                Some(format!("{why}: the imagined drive was compared with the nearest remembered view only"))
            }
            None if self.left_out > 0 => Some(format!(
                "odometry jumped: {} remembered views from before were left out when the imagined drive was checked",
                self.left_out
            )),
            _ => None,
        }
    }
}

/// What was seen in the stretch that the rollout begins in, with depth and poses.
fn recall(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    view: &View,
) -> Result<(Option<Recall>, Unregistered), GroundError> {
    let because = |why| Ok((None, Unregistered { why: Some(why), left_out: 0 }));
    let (scene, spec) = (job.scene, &job.spec);
    if spec.lift.as_ref().is_none_or(|lift| lift.registration.is_none()) || spec.detail.is_none() {
        return because("this model reads no depth");
    }
    let Some(origin) = view.origin else { return because("there is no odometry") };
    let Some(mounting) = scene.base_from_camera.or(spec.mounting) else {
        return because("the camera's mounting is not known");
    };
    let (begin, end) = view.stretch;
    let stretch = &scene.memory[begin..=end];
    let now = match (view.start.and_then(|p| scene.memory.get(p)), scene.odom_from_base) {
        (Some(start), _) => (start.info.captured_at, origin),
        (None, Some(odom_from_base)) => (scene.captured_at, odom_from_base),
        (None, None) => return because("there is no odometry"),
    };
    let (mut views, left_out) = views_of(stretch, now, origin);
    if let (None, Some(newest)) = (view.start, &scene.newest_detail) {
        views.push(RecallView { picture: newest, here_from_base: Pose2::default() });
    }
    match Recall::new(mind, &views, &mounting)? {
        Some(recall) => Ok((Some(recall), Unregistered { why: None, left_out })),
        None => because("this model reads no depth"),
    }
}

/// What was seen, where the pose head puts it: for a drive that is shown without odometry, and for nothing else.
fn recall_by_head(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    (request, view): (&Request, &View),
) -> Result<Option<Recall>, GroundError> {
    let (scene, spec) = (job.scene, &job.spec);
    let mounting = scene.base_from_camera.or(spec.mounting).filter(|_| spec.detail.is_some());
    let Some(mounting) = mounting.filter(|_| view.start.is_none()) else { return Ok(None) };
    let stretch = &scene.memory[view.stretch.0..=view.stretch.1];
    let memory = ContextLatents {
        index: stretch.iter().map(|c| c.info.index).collect(),
        latents: stretch.iter().flat_map(|c| c.latent.iter().copied()).collect(),
        first: view.seen.first.clone(),
    };
    let poses = poses_by_head(mind, &memory, request.prompt(), &job.settings, job.budget)?;
    let posed = stretch.iter().zip(poses).filter_map(|(seen, here_from_base)| {
        Some(RecallView { picture: seen.detail.as_ref()?, here_from_base: here_from_base? })
    });
    let here_from_base = Pose2::default();
    let newest = scene.newest_detail.iter().map(|picture| RecallView { picture, here_from_base });
    let views: Vec<RecallView<'_>> = posed.chain(newest).collect();
    Ok(Recall::new(mind, &views, &mounting)?)
}

/// Samples the drive that is shown: along the answer's path, held to what was seen.
fn guide(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    (request, view): (&Request, &View),
    imagined: &Imagined,
    (lifted, recall): (&Lifted, &mut Recall),
    report: &mut Report<'_>,
) -> Result<(), GroundError> {
    let candidate = report.grounded.candidate;
    let boxed = if job.by_text() { job.boxed_frames() } else { 0 };
    let way = match job.by_text() {
        true => {
            let path = mean_path(&imagined.glances, job.settings.target_latents);
            guide::along(&path, boxed / GROUP, lifted.estimate.pose)
        }
        false => Vec::new(),
    };
    let cameras = match job.by_text() {
        true => way.iter().map(|base| recall.camera_at(*base)).collect(),
        false => request.cameras.clone(),
    };
    let drawn = report.grounded.found_box.map(|found| (found, &report.grounded.frames[..]));
    let carry = Carry::new(recall, &cameras, boxed, drawn);
    let step = imagined.step_times.iter().copied().max().unwrap_or(TimeDelta(1));
    let (candidates, steps) = (imagined.rollouts.len(), job.settings.steps);
    let mut stepped = |step, estimate: &[f32]| {
        let candidate = candidates;
        (report.progress)(Stage::Step { candidate, candidates: candidates + 1, step, steps, estimate })
    };
    let mut held = HeldMind { mind, carry: &carry };
    let budget = (job.budget, step);
    let (seen, prompt) = (&view.seen, request.prompt());
    let rollout = roll_out_held(&mut held, seen, prompt, &job.settings, candidate, budget, &mut stepped);
    // The place is known without it: the drive from the video alone is shown, as where there is no time.
    let Some(rollout) =
        rollout.or_else(|e| if matches!(e, ImagineError::Served(_)) { Ok(None) } else { Err(e) })?
    else {
        return Ok(());
    };
    let mut frames = mind.decode(&rollout.latents)?;
    carry.hold(&mut frames, job.spec.box_min);
    let first = match view.start {
        Some(start) => job.scene.memory.get(start).and_then(|seen| seen.detail.as_ref()),
        None => job.scene.newest_detail.as_ref(),
    };
    let detail = carry.in_detail(&frames, first, job.spec.box_min);
    let grounded = &mut report.grounded;
    let shown = find_box(&frames[frames.len().saturating_sub(boxed)..]);
    if let Some(found) = shown.filter(|b| boxed > 0 && b.score >= job.spec.box_min) {
        grounded.found_box = Some(found);
        grounded.answer.bounding_box = Some(found.edges());
    }
    let first = frames.first().cloned();
    let carried = first.into_iter().flat_map(|f| std::iter::repeat_n(f, GROUP)).chain(carry.pictures());
    let carried = carried.collect();
    grounded.candidate = candidates;
    let video_only = std::mem::replace(&mut grounded.frames, frames);
    let origin = view.origin.unwrap_or_default();
    let way = way.into_iter().map(|pose| origin.compose(pose)).collect();
    grounded.guided = Some(Guided { candidate, video_only, carried, detail, way });
    Ok(())
}

/// The mean over glances of where the pose head puts the end of each target latent; the first one is here.
fn mean_path(glances: &[Heads], targets: usize) -> Vec<Pose2> {
    let mean = |latent: usize| {
        let heads = glances.iter().filter_map(|h| h.pose.get(h.context + latent));
        let sum = heads.fold([0.0f64; 4], |sum, h| std::array::from_fn(|i| sum[i] + f64::from(h[i])));
        let n = glances.len().max(1) as f64;
        Pose2::new(sum[0] / n, sum[1] / n, sum[3].atan2(sum[2]))
    };
    std::iter::once(Pose2::default()).chain((1..targets).map(mean)).collect()
}

/// How much the rollout's last view without a box differs from the remembered view nearest to where it ends, 0..1.
fn likeness_error(job: &Job<'_>, view: &View, frames: &[RgbImage], end: Option<Pose2>) -> Option<f64> {
    let last = frames.get(frames.len().saturating_sub(job.boxed_frames() + 1))?;
    let nearest = nearest_view(&view.context, end?)?;
    mean_difference(last, &job.scene.memory.get(view.used[nearest])?.picture)
}

/// Puts what the lift found into the answer and its evidence, in the answer's frame.
fn publish(grounded: &mut Grounded, job: &Job<'_>, view: &View, request: &Request, lifted: Lifted) {
    fill(&mut grounded.answer, job.scene, view, &lifted);
    let origin = view.origin.unwrap_or_default();
    if let Some((camera, end)) = grounded.answer.camera_pose.as_mut().zip(request.cameras.last().copied()) {
        // The base drives below; the camera was asked for in space.
        *camera = FramedPose3::new(camera.frame.clone(), &(planar_isometry(origin) * end));
    }
    let route = if job.by_text() { &lifted.path } else { &request.route };
    grounded.path = route.iter().map(|p| origin.compose(*p)).collect();
    grounded.object = lifted.estimate.object.map(|(x, y)| crate::planar::point_from(origin, x, y));
    grounded.lifted = Some(lifted);
}

/// The specification for one goal: the lift's standoff is that of the thing that is asked for.
fn spec_for(spec: &MindSpec, text: &str) -> MindSpec {
    let mut spec = spec.clone();
    if let Some(lift) = &mut spec.lift {
        lift.standoff_m = lift.standoff_for(text);
    }
    spec
}

/// What can be said about a goal by a model that has no lift heads: see the head of this file.
fn without_heads(imagined: &Imagined, clearest: Option<FoundBox>, box_min: f64) -> (Status, String) {
    if imagined.rollouts.is_empty() {
        return (Status::Failed, "this model answers by imagining the drive only".into());
    }
    match clearest {
        Some(found) if found.score >= box_min => (
            Status::Failed,
            format!(
                "the drive was imagined and ends with a box around the goal (score {:.2}), but this model has no \
                 heads to read a pose from: no pose can be given; box and imagined frames are attached",
                found.score
            ),
        ),
        _ => {
            let (clearest, wanted) = distinct(clearest.map_or(0.0, |b| b.score), box_min);
            let reason = format!(
                "the last imagined frames show no box around anything (clearest {clearest}, {wanted} is needed)"
            );
            (Status::NotInContext, reason)
        }
    }
}

/// Says how much was looked at, and when that is more than training did.
fn state_context(grounded: &mut Grounded, spec: &MindSpec) {
    let (used, trained) = (grounded.used.len(), spec.context_trained);
    if used > trained {
        let longer = format!("a context of {used} latents was looked at; {trained} were trained");
        let answer = &mut grounded.answer;
        answer.reason = Some(with_reduction(answer.reason.take(), Some(&longer)));
    }
}

/// A reason, and why less was done than asked for.
fn with_reduction(reason: Option<String>, reduced: Option<&str>) -> String {
    [reason.as_deref(), reduced].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Where a rollout begins, and what it is imagined from.
struct View {
    /// Position in the memory of the view that it begins with; `None`: the newest frame.
    start: Option<usize>,
    /// `odom_from_base` there.
    origin: Option<Pose2>,
    /// The first and the last position of the memory that there was to choose from.
    stretch: (usize, usize),
    /// Positions in the memory that were chosen.
    used: Vec<usize>,
    /// Their latents, and the first one of the rollout.
    seen: ContextLatents,
    /// For each of them `start_from_base`, where known.
    context: Vec<Option<Pose2>>,
    /// For each of them what odometry may be off by the start.
    drift: Vec<Drift>,
    /// What it may be off from there to where the robot is now.
    since: Drift,
}

impl View {
    fn lift(&self, glances: &[Heads], params: &LiftParams) -> Estimate {
        lift(glances, &self.context, &self.drift, params)
    }
}

/// What odometry may be off at the end of a way, for each pose on it: as much as the way from pose to pose says, which is
/// no longer than the one that was driven. Poses that are not known are passed over.
fn drifts(way: &[Option<Pose2>], noise: OdometryNoise) -> Vec<Drift> {
    let (mut next, mut way_m, mut turn_rad) = (None::<Pose2>, 0.0, 0.0);
    let mut out: Vec<Drift> = way
        .iter()
        .rev()
        .map(|pose| {
            if let (Some(pose), Some(next)) = (pose, next) {
                way_m += pose.distance(next);
                turn_rad += wrap_angle(next.yaw - pose.yaw).abs();
            }
            next = pose.or(next);
            let (way_m, heading_rad) = noise.after(way_m, turn_rad);
            Drift { way_m, heading_rad }
        })
        .collect();
    out.reverse();
    out
}

/// Chooses where to begin and what to look at.
///
/// A history no longer than the recordings that the model was trained on is taken whole, and the rollout begins here.
/// A longer one is looked through in stretches of that length ([`stretches`]): inside each the rollout begins with the
/// stretch's own last view, whose place odometry knows, so that context and start are what they were in training.
/// The stretch that would be believed wins; of several, the one with the clearest sight of the thing. This also lets
/// a model that knows single rooms find things in rooms that the robot has left, and in those that others have seen: their
/// memories are stretches of their own. Without odometry nothing can be
/// carried from there to here, and without lift heads nothing tells one stretch from another: then the whole history
/// is taken, evenly. Waypoints begin here. Beside the view, its [`clearness`] where several were compared.
fn choose_view(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    request: &Request,
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<(View, Option<(bool, f64)>), GroundError> {
    let Job { scene, spec, settings, budget, .. } = job;
    // Without a view of its own the robot has nowhere to begin.
    scene.memory.last().filter(|newest| newest.by.is_none()).ok_or(GroundError::NothingSeen)?;
    let params = spec.lift.as_ref().filter(|_| scene.odom_from_base.is_some());
    let mut all = Vec::new();
    for (begin, end) in robots(&scene.memory) {
        let index: Vec<u64> = scene.memory[begin..=end].iter().map(|c| c.info.index).collect();
        match (params, settings.max_span) {
            (Some(_), Some(span)) => all.extend(
                stretches(&index, span as u64, spec.context_max)
                    .into_iter()
                    .map(|(b, e)| (begin + b, begin + e)),
            ),
            _ if all.is_empty() => all.push((begin, end)),
            _ => {}
        }
    }
    // The newest stretch comes first; it ends here.
    let all = if job.by_text() && job.views == Views::OfAllStretches { &all[..] } else { &all[..1] };
    let began = budget.clock.now();
    let mut best: Option<((bool, f64), View)> = None;
    for (i, stretch) in all.iter().enumerate() {
        if best.is_some() && !budget.lasts_for_more(began, i) {
            break;
        }
        let mut scan = |stage: Stage<'_>| match stage {
            Stage::Scan(part, parts) => progress(Stage::Scan(i * parts + part, all.len() * parts)),
            _ => Flow::Continue,
        };
        let Some(view) = view_of(mind, job, request, *stretch, &mut scan)? else { continue };
        let Some(params) = params.filter(|_| all.len() > 1) else { return Ok((view, None)) };
        let clear = clearness(mind, job, request, &view, params)?;
        if best.as_ref().is_none_or(|(other, _)| clear > *other) {
            best = Some((clear, view));
        }
    }
    best.map(|(clear, view)| (view, Some(clear))).ok_or(GroundError::NothingSeen)
}

/// The first and last position of each robot's memories, this robot's own first.
fn robots(memory: &[ContextLatent]) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for (at, seen) in memory.iter().enumerate().rev() {
        match all.last_mut() {
            Some((begin, _)) if memory[*begin].by == seen.by => *begin = at,
            _ => all.push((at, at)),
        }
    }
    all
}

/// The view from the end of a stretch of the memory, `None` where odometry does not know that place.
fn view_of(
    mind: &mut dyn Mind,
    job: &Job<'_>,
    request: &Request,
    (begin, end): (usize, usize),
    progress: &mut dyn FnMut(Stage<'_>) -> Flow,
) -> Result<Option<View>, GroundError> {
    let Job { scene, spec, .. } = job;
    let start = (end + 1 < scene.memory.len()).then_some(end);
    let origin = start.map_or(scene.odom_from_base, |p| scene.memory[p].info.odom_from_base);
    if start.is_some() && origin.is_none() {
        return Ok(None);
    }
    let stretch = &scene.memory[begin..=end];
    let memory = ContextLatents {
        index: stretch.iter().map(|c| c.info.index).collect(),
        latents: stretch.iter().flat_map(|c| c.latent.iter().copied()).collect(),
        first: mind.encode_still(start.map_or(&scene.newest, |p| &scene.memory[p].picture))?,
    };
    let count = spec.context_max;
    let chosen = if job.by_text() {
        mind.imaginer().choose_context(job.inputs(&memory, request), count, progress)?
    } else {
        crate::context::spread(stretch.len(), count)
    };
    let start_from_odom = origin.map(Pose2::inverse);
    let place = |p: &usize| Some(start_from_odom?.compose(stretch.get(*p)?.info.odom_from_base?));
    let way: Vec<Option<Pose2>> =
        stretch.iter().map(|c| c.info.odom_from_base).chain(std::iter::once(origin)).collect();
    let drift = drifts(&way, scene.odometry_noise);
    let since = start.map_or_else(Drift::default, |start| {
        let own = scene.memory[start..].iter().filter(|c| c.by == scene.memory[start].by);
        let way: Vec<Option<Pose2>> =
            own.map(|c| c.info.odom_from_base).chain(std::iter::once(scene.odom_from_base)).collect();
        drifts(&way, scene.odometry_noise).first().copied().unwrap_or_default()
    });
    Ok(Some(View {
        since,
        start,
        origin,
        stretch: (begin, end),
        seen: pick(&memory, &chosen, spec.latent_len),
        context: chosen.iter().map(place).collect(),
        drift: chosen.iter().map(|p| drift[*p]).collect(),
        used: chosen.into_iter().map(|p| begin + p).collect(),
    }))
}

/// Carries what the lift found over from where the rollout begins into the answer's frame. What odometry may have drifted
/// since moves the goal against the robot, and widens the covariance.
fn fill(answer: &mut Answer, scene: &Scene, view: &View, lifted: &Lifted) {
    let (status, reason) = match &lifted.decision {
        Decision::Found => (Status::Found, None),
        Decision::NotInContext(reason) => (Status::NotInContext, Some(reason.clone())),
        Decision::Inconsistent(reason) => (Status::Inconsistent, Some(reason.clone())),
    };
    answer.status = status;
    answer.reason = reason;
    answer.consistency = Some(lifted.consistency);
    // What is not believed is not handed out as a pose: a robot could drive to it.
    let Some(pose) = lifted.estimate.pose.filter(|_| status == Status::Found) else {
        return;
    };
    let (frame, origin) = match view.origin {
        Some(origin) => (&scene.odom_frame, origin),
        None => {
            answer.reason = Some(
                "no odometry: the pose is relative to the base at the newest frame, its scale learned".into(),
            );
            (&scene.base_frame, Pose2::default())
        }
    };
    let pose = origin.compose(pose);
    answer.pose = Some(FramedPose2::new(frame.clone(), pose));
    let [x, y, yaw] = lifted.estimate.variances;
    let since = view.since.variance(scene.odom_from_base.map_or(0.0, |here| here.distance(pose)));
    let turned = view.since.heading_rad.powi(2);
    answer.covariance = Some(Covariance6::planar(x + since, y + since, yaw + turned).0.to_vec());
    answer.camera_pose = scene
        .base_from_camera
        .map(|mounting| FramedPose3::new(frame.clone(), &(planar_isometry(pose) * mounting)));
}

/// Waypoints are camera poses relative to the base, in body axes (x forward); the base's own route needs the mounting,
/// which shifts them. Height, pitch and roll are the camera's alone: the base stays on the floor.
fn base_route(waypoints: &[Isometry3<f64>], mount: &Isometry3<f64>) -> Vec<Pose2> {
    let [shift_x, shift_y] = [mount.translation.x, mount.translation.y];
    waypoints
        .iter()
        .map(|pose| {
            let forward = pose.rotation * nalgebra::Vector3::x();
            let yaw = forward.y.atan2(forward.x);
            let (s, c) = yaw.sin_cos();
            let x = pose.translation.x - c * shift_x + s * shift_y + shift_x;
            let y = pose.translation.y - s * shift_x - c * shift_y + shift_y;
            Pose2::new(x, y, yaw)
        })
        .collect()
}

/// `count` camera poses (optical) from here along the waypoints, relative to here. Waypoints in the plane are passed as
/// the base passes its route; others are joined in space, positions on straight lines and rotations along shorter arcs.
fn camera_path(
    waypoints: &[Isometry3<f64>],
    route: &[Pose2],
    mount: &Isometry3<f64>,
    count: usize,
) -> Vec<Isometry3<f64>> {
    let flat = |w: &Isometry3<f64>| w.translation.z == 0.0 && w.rotation.i == 0.0 && w.rotation.j == 0.0;
    if waypoints.iter().all(flat) {
        let cost = |a: Pose2, b: Pose2| a.distance(b) + 0.5 * wrap_angle(b.yaw - a.yaw).abs();
        let along = resample(Pose2::default(), route, count, cost, crate::planar::between);
        return along.into_iter().map(|base| planar_isometry(base) * mount).collect();
    }
    type Pose = Isometry3<f64>;
    let cost = |a: Pose, b: Pose| {
        (a.translation.vector - b.translation.vector).norm() + 0.5 * a.rotation.angle_to(&b.rotation)
    };
    let between = |a: Pose, b: Pose, part: f64| interpolate(&a, &b, part);
    let along = resample(Pose::identity(), waypoints, count, cost, between);
    along.into_iter().map(|pose| mount.translation * pose * mount.rotation).collect()
}

/// `count` poses from `start` along the route, evenly spaced by `cost` (metres, and half a metre for a radian). A route
/// too short to be divided stays where it is.
fn resample<P: Copy>(
    start: P,
    route: &[P],
    count: usize,
    cost: impl Fn(P, P) -> f64,
    between: impl Fn(P, P, f64) -> P,
) -> Vec<P> {
    let mut points = vec![start];
    points.extend_from_slice(route);
    let mut sums = vec![0.0];
    for pair in points.windows(2) {
        sums.push(sums[sums.len() - 1] + cost(pair[0], pair[1]));
    }
    let total = sums[sums.len() - 1];
    (0..count)
        .map(|i| {
            let at = total * i as f64 / count.saturating_sub(1).max(1) as f64;
            let after = sums.partition_point(|s| *s < at).clamp(1, points.len() - 1);
            let span = (sums[after] - sums[after - 1]).max(1e-12);
            between(points[after - 1], points[after], ((at - sums[after - 1]) / span).clamp(0.0, 1.0))
        })
        .collect()
}

/// For waypoints the place is given; what can be doubted is whether the network went along: by its pictures, registered
/// along the way ([`Recall::follow`]: frame, error, pose for each latent), else by its pose head.
fn follow(
    lifted: &mut Lifted,
    imagined: &Imagined,
    route: &[Pose2],
    way: Option<&[(usize, f64, Pose2)]>,
    params: &LiftParams,
) {
    let Some(goal) = route.last().copied() else { return };
    lifted.estimate.pose = Some(goal);
    lifted.estimate.object = None;
    let heads = imagined.rollouts.first().map(|r| &r.heads).or(imagined.glances.first());
    let by_head =
        heads.and_then(|h| h.pose.last()).map(|h| Pose2::new(f64::from(h[0]), f64::from(h[1]), 0.0));
    let by_pictures = way.and_then(|way| way.last()).map(|(_, _, pose)| *pose);
    let registration = params.registration.filter(|_| by_pictures.is_some());
    let Some(end) = by_pictures.or(by_head) else {
        lifted.decision = Decision::Found;
        return;
    };
    let off = goal.distance(end);
    let sigma = registration.map_or(params.rollout_sigma_m, |r| r.sigma_m).max(1e-6);
    let bell = |d: f64| (-0.5 * d * d).exp();
    let orientation =
        lifted.estimate.localisation_m.map_or(1.0, |e| bell(e / params.localisation_sigma_m.max(1e-6)));
    lifted.consistency = 0.5 * bell(off / sigma) + 0.5 * orientation;
    lifted.estimate.variances = [sigma.powi(2), sigma.powi(2), params.yaw_sigma_rad.powi(2)];
    let worst = way.unwrap_or_default().iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let required = registration.filter(|_| params.drive == DriveRule::Required);
    lifted.decision = match (lifted.estimate.localisation_m, worst.zip(required)) {
        (Some(error), _) if error > params.localisation_max_m => Decision::Inconsistent(format!(
            "the network misplaces its own context by {error:.2} m against odometry"
        )),
        (_, Some(((frame, error, _), limits))) if *error > limits.way_error_max => {
            let (explained, wanted) = distinct(1.0 - error, 1.0 - limits.way_error_max);
            Decision::Inconsistent(format!(
                "the imagined drive leads through another place: what was seen explains frame {frame} to {explained}, \
                 {wanted} is needed"
            ))
        }
        _ if off > registration.map_or(params.agree_max, |r| r.agree_max) * sigma => {
            Decision::Inconsistent(format!("the imagined drive ends {off:.2} m from the last waypoint"))
        }
        _ => Decision::Found,
    };
}

/// The context frame that looks most like the end of the rollout by its pose: within 0.8 m and 30 degrees.
fn nearest_view(context: &[Option<Pose2>], end: Pose2) -> Option<usize> {
    let cost = |p: Pose2| {
        let turn = wrap_angle(p.yaw - end.yaw).abs();
        let away = p.distance(end);
        (away < 0.8 && turn < 30f64.to_radians()).then_some(away + turn)
    };
    context
        .iter()
        .enumerate()
        .filter_map(|(i, p)| Some((i, cost((*p)?)?)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map(|(i, _)| i)
}

/// How badly the codec reproduces the frames in use, 0..1.
fn reconstruction_error(mind: &mut dyn Mind, scene: &Scene, view: &View) -> Result<Option<f64>, GroundError> {
    let frames = mind.decode(&view.seen.latents)?;
    let decoded = frames.iter().skip(GROUP - 1).step_by(GROUP);
    let errors: Vec<f64> = view
        .used
        .iter()
        .zip(decoded)
        .filter_map(|(p, decoded)| mean_difference(decoded, &scene.memory.get(*p)?.picture))
        .collect();
    Ok((!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::{Translation3, UnitQuaternion};

    #[test]
    fn what_a_goal_leaves_out_is_every_word_of_its_group() {
        let groups = [&["red", "blue"][..], &["chair", "bed", "cone"]]
            .map(|g| g.iter().map(|w| (*w).into()).collect());
        let things = |text: &str| -> Vec<(String, String)> {
            meanings(&groups, text).into_iter().map(|m| (m.thing, m.text)).collect()
        };
        let same = |text: &str| assert_eq!(things(text), [(String::new(), text.to_owned())]);
        same("find the red chair");
        same("go there");
        same("");
        let pair = |thing: &str, text: &str| (thing.to_owned(), text.to_owned());
        assert_eq!(
            things("find the Chairs!"),
            [pair("red chair", "red find the Chairs!"), pair("blue chair", "blue find the Chairs!")]
        );
        assert_eq!(
            things("the blue one"),
            [
                pair("blue chair", "chair the blue one"),
                pair("blue bed", "bed the blue one"),
                pair("blue cone", "cone the blue one"),
            ]
        );
        assert_eq!(meanings(&[], "find the chair").len(), 1);
    }

    #[test]
    fn waypoints_in_the_plane_move_the_camera_as_the_base_carries_it() {
        let pitch = UnitQuaternion::from_euler_angles(0.0, 0.3, 0.0);
        let mount = Isometry3::from_parts(Translation3::new(0.2, -0.1, 1.1), pitch);
        let stops = [Pose2::new(0.7, 0.1, 0.4), Pose2::new(1.2, 0.9, 2.9), Pose2::new(0.3, 1.0, -3.0)];
        let flat = stops.map(planar_isometry);
        let route = base_route(&flat, &mount);
        let path = camera_path(&flat, &route, &mount, 13);
        // To the bit: what models for one camera were always told.
        let cost = |a: Pose2, b: Pose2| a.distance(b) + 0.5 * wrap_angle(b.yaw - a.yaw).abs();
        let bases = resample(Pose2::default(), &route, 13, cost, crate::planar::between);
        assert_eq!(path, bases.iter().map(|b| planar_isometry(*b) * mount).collect::<Vec<_>>());
        assert_eq!(bases[0], Pose2::default());
        let end = bases[12].relative(route[2]);
        assert!(end.distance(Pose2::default()) < 1e-12 && end.yaw.abs() < 1e-12, "{end:?}");
        // A waypoint that is lifted by next to nothing is passed in space, nearly as before: at its ends to rounding.
        let mut lifted = flat;
        lifted[1].translation.z = 1e-9;
        let lifted = camera_path(&lifted, &route, &mount, 13);
        for (a, b) in [(path[0], lifted[0]), (path[12], lifted[12])] {
            assert!((a.to_homogeneous() - b.to_homogeneous()).norm() < 1e-8, "{a} {b}");
        }
    }

    #[test]
    fn the_drive_whose_pictures_show_most_is_shown() {
        let boxed = |score: f64| FoundBox { x0: 8, y0: 5, x1: 15, y1: 10, score };
        let registered = |mean_error: f64, box_score: Option<f64>| {
            let thing_error = box_score.map(|_| 0.2);
            let errors = Registered { mean_error, end_error: mean_error, box_score, thing_error, ..NOWHERE };
            Shown { registered: Some(errors), ..Shown::default() }
        };
        // Costs 0.7, 0.3, 1.2 (nothing is boxed) by hand: errors, half of what the box holds, half of what it lacks.
        let drives = [registered(0.25, Some(0.8)), registered(0.05, Some(0.8)), registered(0.1, None)];
        assert_eq!(best_drive(&drives), 1);
        // Where none is registered the clearest box counts, and the first of two that are alike.
        let seen = |score| Shown { clearest: Some(boxed(score)), ..Shown::default() };
        assert_eq!(best_drive(&[seen(0.2), seen(0.9), seen(0.9), Shown::default()]), 1);
        assert_eq!(best_drive(&[seen(0.9), registered(0.9, None)]), 1, "a registered one before all others");
        assert_eq!(best_drive(&[]), 0);
    }

    /// Registered in no place, with no error.
    const NOWHERE: Registered = Registered {
        pose: Pose2 { x: 0.0, y: 0.0, yaw: 0.0 },
        end_frame: 0,
        end_error: 0.0,
        covered: 1.0,
        distinct: 1.0,
        elsewhere: None,
        way_frame: 0,
        way_error: 0.0,
        mean_error: 0.0,
        box_score: None,
        thing_error: None,
    };

    #[test]
    fn odometry_drifts_with_the_way_and_the_turns() {
        let noise = OdometryNoise { metres_per_metre: 0.1, radians_per_metre: 0.2, radians_per_radian: 0.3 };
        // 3 m and then 1 m, with half a radian at the corner; the pose in between is not known.
        let way =
            [Some(Pose2::default()), None, Some(Pose2::new(3.0, 0.0, 0.5)), Some(Pose2::new(3.0, 1.0, 0.5))];
        let got = drifts(&way, noise);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{got:?}");
        near(got[0].way_m, 0.1 * 2.0);
        near(got[0].heading_rad, (0.04 * 4.0 + 0.09 * 0.5f64).sqrt());
        near(got[2].way_m, 0.1);
        near(got[2].heading_rad, 0.2);
        assert_eq!(got[3], Drift::default());
        assert_eq!(drifts(&way, OdometryNoise::default()), [Drift::default(); 4]);
    }

    #[test]
    fn a_route_is_divided_by_its_length() {
        let cost = |a: f64, b: f64| (b - a).abs();
        let between = |a: f64, b: f64, part: f64| a + part * (b - a);
        assert_eq!(resample(0.0, &[1.0, -2.0], 5, cost, between), [0.0, 1.0, 0.0, -1.0, -2.0]);
        assert_eq!(resample(0.0, &[0.0], 3, cost, between), [0.0; 3], "nowhere to go");
    }
}
