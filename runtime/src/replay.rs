//! A recorded bag instead of a robot: read it, remember what it shows, answer one goal.
//!
//! The same bag, configuration, bundle, goal and seed give the same answer, bit for bit, times aside (and without a
//! deadline, which makes the answer depend on the machine's speed).

use crate::agent::time_for_sampling;
use crate::config::RobotConfig;
use crate::context::{ContextCounts, GroupEncoder};
use crate::ground::{Grounded, Mind, Scene, Stage, ground};
use crate::imagine::{Clock, Flow};
use crate::mind::{LoadError, Pipeline};
use crate::no_model::no_model;
use crate::node::NodeEvent;
use crate::profile::Profile;
use crate::senses::{Outcome, Sense, SenseFaults, Senses};
use crate::study::{Study, StudyCounts, wanted};
use crate::topics::{ChooseError, Offered, Wanted, choose};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::bag::{Bag, CdrConverter, OpenBagError, OpenOptions, ReadOptions, TopicId, open};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::image::{PixelKind, compressed_kind, pixel_kind};
use mindseye_bridge::msg::{CameraInfo, CompressedImageView, HeaderView, ImageView, RosType};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::detector::DetectorError;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// What a replay is about.
#[derive(Clone, Debug)]
pub struct Replay {
    /// A file, or a rosbag2 directory.
    pub bag: PathBuf,
    /// Topics, context, camera.
    pub config: RobotConfig,
    /// Topics that are used whatever the configuration says.
    pub wanted: Wanted,
    /// What to ask; `None`: only read.
    pub goal: Option<Goal>,
    /// Ask this many seconds after the start of the bag instead of at its end.
    pub at_secs: Option<f64>,
    /// Time allowed for the goal.
    pub deadline: Option<TimeDelta>,
}

impl Replay {
    /// Of the time allowed, what sampling may take, as on a robot; `None`: no limit.
    pub fn time_for_sampling(&self) -> Option<TimeDelta> {
        let reserve = TimeDelta::from_millis(self.config.goals.reserve_ms);
        self.deadline.map(|allowed| time_for_sampling(allowed, reserve))
    }
}

/// What happens meanwhile.
#[derive(Clone, Debug)]
pub enum Told<'a> {
    /// Something worth a line.
    Line(String),
    /// Work in progress: what, done, of.
    Bar(&'a str, usize, usize),
    /// What a node would tell its observer.
    Event(NodeEvent<'a>),
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// What became of the frames.
    pub counts: ContextCounts,
    /// The topics that were read.
    pub topics: BTreeMap<String, Sense>,
    /// What was wrong with the senses at the end.
    pub faults: SenseFaults,
    /// What was known when the goal was asked; `None` without a usable frame.
    pub scene: Option<Scene>,
    /// Why segments began.
    pub segments: Vec<String>,
    /// Messages that could not be used.
    pub refused: u64,
    /// Whether odometry was there.
    pub odometry: bool,
    /// Whether intrinsics were there.
    pub camera_info: bool,
    /// The answer, if something was asked.
    pub answer: Option<Answer>,
    /// What it rests on; `None` where there was nothing to work on.
    pub grounded: Option<Box<Grounded>>,
    /// Times by stage.
    pub profile: Profile,
    /// What became of frames that were studied in full; `None` where none were.
    pub study: Option<StudyCounts>,
}

/// Why a bag could not be replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// It cannot be opened.
    #[error(transparent)]
    Bag(#[from] OpenBagError),
    /// The detector cannot be used.
    #[error(transparent)]
    Detector(#[from] DetectorError),
    /// The model's sessions cannot be made.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// No camera, or not one.
    #[error("{}: {source}", bag.display())]
    Topics {
        /// The bag.
        bag: PathBuf,
        /// What there is.
        source: ChooseError,
    },
    /// The goal would be asked after the end.
    #[error("{at_secs} s after the start lie past the end of the bag, which is {:.3} s long", length.as_secs_f64())]
    PastEnd {
        /// When it was to be asked, seconds after the start.
        at_secs: f64,
        /// From the first message to the last.
        length: TimeDelta,
    },
    /// The caller said stop.
    #[error("stopped")]
    Stopped,
}

/// Which topic of a bag is which.
///
/// # Errors
/// [`ReplayError::Topics`].
pub(crate) fn topics(
    bag: &Bag,
    path: &Path,
    config: &RobotConfig,
    wanted: &Wanted,
    tell: &mut dyn FnMut(Told<'_>),
) -> Result<HashMap<TopicId, Sense>, ReplayError> {
    let offered = offered(bag);
    let chosen = choose(&offered, &config.topics, wanted)
        .map_err(|source| ReplayError::Topics { bag: path.to_owned(), source })?;
    let t = &config.topics;
    for (i, sense) in &chosen.topics {
        let name = &offered[*i].name;
        let configured = match sense {
            Sense::Image | Sense::Compressed if *name == t.image || *name == t.compressed => name,
            sense => t.of(*sense),
        };
        if name != configured {
            tell(Told::Line(format!("{name} instead of {configured}")));
        }
    }
    Ok(chosen.topics.into_iter().map(|(i, sense)| (TopicId(i as u32), sense)).collect())
}

/// The topics of a bag, with a look at the first messages of cameras.
fn offered(bag: &Bag) -> Vec<Offered> {
    let info = bag.info();
    let mut converter = CdrConverter::new(info);
    info.topics
        .iter()
        .map(|topic| {
            let mut offered = Offered {
                name: topic.name.clone(),
                type_name: topic.type_name.clone(),
                messages: topic.count,
                ..Offered::default()
            };
            look(bag, &mut converter, &mut offered);
            offered
        })
        .collect()
}

/// Messages that are looked at for what a camera's pictures are: the first may be empty.
const LOOKED_AT: usize = 3;

fn look(bag: &Bag, converter: &mut CdrConverter, offered: &mut Offered) {
    let type_name = offered.type_name.replace("/msg/", "/");
    if !["sensor_msgs/Image", "sensor_msgs/CompressedImage", "sensor_msgs/CameraInfo"].contains(&&*type_name)
    {
        return;
    }
    if type_name != "sensor_msgs/CameraInfo" {
        offered.pixels = Some(PixelKind::Other);
    }
    let options =
        ReadOptions { topics: Some(vec![offered.name.clone()]), threads: Some(0), ..ReadOptions::default() };
    for message in bag.messages(&options).take(LOOKED_AT) {
        let Ok(cdr) = converter.convert(&message) else { continue };
        let header = match type_name.as_str() {
            "sensor_msgs/Image" => ImageView::decode(cdr).ok().map(|image| {
                offered.pixels = Some(pixel_kind(image.encoding));
                image.header
            }),
            "sensor_msgs/CompressedImage" => CompressedImageView::decode(cdr).ok().map(|image| {
                offered.pixels = Some(compressed_kind(image.data, image.format));
                image.header
            }),
            _ => CameraInfo::decode(cdr).ok().map(|camera| {
                offered.frame_id = camera.header.frame_id;
                HeaderView::default()
            }),
        };
        if let Some(header) = header.filter(|header| !header.frame_id.is_empty()) {
            header.frame_id.clone_into(&mut offered.frame_id);
        }
        if offered.pixels != Some(PixelKind::Other) {
            return;
        }
    }
}

/// Replays a bag. `go_on` is asked often; when it says no, the replay ends with [`ReplayError::Stopped`].
///
/// # Errors
/// [`ReplayError`]. A goal that cannot be met is no error: see [`Replayed::answer`].
pub fn replay(
    pipeline: &Pipeline,
    replay: &Replay,
    clock: &dyn Clock,
    tell: &mut dyn FnMut(Told<'_>),
    go_on: &dyn Fn() -> bool,
) -> Result<Replayed, ReplayError> {
    replay_with(pipeline.mind(0)?, pipeline.encoder()?, replay, clock, tell, go_on)
}

/// As [`replay`], without a model: what can be answered is what a detector saw.
///
/// # Errors
/// As [`replay`].
pub fn replay_without_model(
    replay: &Replay,
    clock: &dyn Clock,
    tell: &mut dyn FnMut(Told<'_>),
    go_on: &dyn Fn() -> bool,
) -> Result<Replayed, ReplayError> {
    let (mind, encoder) = no_model();
    replay_with(mind, encoder, replay, clock, tell, go_on)
}

/// As [`replay`], with any model.
///
/// # Errors
/// As [`replay`].
pub fn replay_with(
    mut mind: Box<dyn Mind>,
    encoder: Box<dyn GroupEncoder + Send>,
    replay: &Replay,
    clock: &dyn Clock,
    tell: &mut dyn FnMut(Told<'_>),
    go_on: &dyn Fn() -> bool,
) -> Result<Replayed, ReplayError> {
    let Replay { config, .. } = replay;
    let mut senses = Senses::new(config.senses(mind.spec()), mind.spec().camera, encoder);
    if let Some((study, detector)) = wanted(config, mind.spec())? {
        senses = senses.with_study(Study::inline(study, detector));
    }
    let bag = open(&replay.bag, &OpenOptions::default())?;
    let topics = topics(&bag, &replay.bag, config, &replay.wanted, tell)?;
    let mut profile = Profile::default();
    let read = read(&bag, replay, &topics, &mut senses, &mut profile, clock, tell, go_on)?;
    senses.finish(clock);
    let study = senses.context().study();
    if let Some(study) = &study {
        profile.absorb(&study.profile());
    }
    let counts = senses.counts();
    tell(Told::Line(format!(
        "{} frames, {} kept, {} latents in memory{}{}",
        counts.offered,
        counts.kept,
        senses.context().latents(),
        if counts.late > 0 { format!(", {} out of order", counts.late) } else { String::new() },
        if read.refused > 0 { format!(", {} messages left out", read.refused) } else { String::new() },
    )));
    let faults = senses.faults();
    for fault in faults.sentences() {
        tell(Told::Line(fault));
    }
    let study = study.map(|study| study.counts());
    if let Some(study) = &study {
        tell(Told::Line(study.to_string()));
    }

    let scene = senses.context().scene();
    let mut replayed = Replayed {
        counts,
        topics: topics.iter().map(|(id, s)| (bag.info().topic(*id).name.clone(), *s)).collect(),
        faults,
        segments: read.segments,
        refused: read.refused,
        odometry: senses.pose().is_some(),
        camera_info: senses.has_intrinsics(),
        answer: None,
        grounded: None,
        scene,
        profile,
        study,
    };
    tell(Told::Event(NodeEvent::Status(&replayed.status())));
    if let Some(goal) = &replay.goal {
        replayed.ask(mind.as_mut(), goal, replay.time_for_sampling(), clock, tell, go_on)?;
    }
    Ok(replayed)
}

/// Watches what comes in a bag after the goal was asked, with no mind at work: what a report shows of the way that was
/// really driven. Nothing is told where the goal was asked at the end.
///
/// # Errors
/// [`ReplayError::Bag`], [`ReplayError::Topics`], [`ReplayError::Stopped`].
pub fn watch_rest(
    replay: &Replay,
    clock: &dyn Clock,
    tell: &mut dyn FnMut(NodeEvent<'_>),
    go_on: &dyn Fn() -> bool,
) -> Result<(), ReplayError> {
    let Some(at_secs) = replay.at_secs else { return Ok(()) };
    let (mind, encoder) = no_model();
    let mut senses = Senses::new(replay.config.senses(mind.spec()), mind.spec().camera, encoder);
    let bag = open(&replay.bag, &OpenOptions::default())?;
    // What was chosen was said before.
    let topics = topics(&bag, &replay.bag, &replay.config, &replay.wanted, &mut |_| ())?;
    let info = bag.info();
    let options = ReadOptions {
        topics: Some(topics.keys().map(|id| info.topic(*id).name.clone()).collect()),
        start_ns: Some(bag.first_stamp_ns().saturating_add((at_secs * 1e9) as i64).saturating_add(1)),
        ..ReadOptions::default()
    };
    let (mut converter, mut profile) = (CdrConverter::new(info), Profile::default());
    for message in bag.messages(&options) {
        if !go_on() {
            return Err(ReplayError::Stopped);
        }
        let Some(sense) = topics.get(&message.topic) else { continue };
        // Messages that cannot be used were counted before the goal; here they show nothing.
        let Ok(cdr) = converter.convert(&message) else { continue };
        let logged_at = Timestamp(message.log_time_ns);
        let Ok(taken) = senses.take(*sense, cdr, logged_at, clock, &mut profile) else { continue };
        let outcome = Outcome { frame: taken.frame, segment: None, latent: None, eviction: None };
        let pose = senses.pose().map(|(_, pose)| pose);
        tell(NodeEvent::Sensed { sense: *sense, cdr, outcome: &outcome, pose, picture: senses.picture() });
    }
    Ok(())
}

/// What reading gave besides what was seen.
struct Read {
    refused: u64,
    segments: Vec<String>,
}

#[allow(clippy::too_many_arguments)] // a private step of `replay`
fn read(
    bag: &Bag,
    replay: &Replay,
    topics: &HashMap<TopicId, Sense>,
    senses: &mut Senses,
    profile: &mut Profile,
    clock: &dyn Clock,
    tell: &mut dyn FnMut(Told<'_>),
    go_on: &dyn Fn() -> bool,
) -> Result<Read, ReplayError> {
    let info = bag.info();
    let names = topics.keys().map(|id| info.topic(*id).name.clone()).collect();
    let start_ns = bag.first_stamp_ns();
    let end_ns = replay.at_secs.map(|at| start_ns.saturating_add((at * 1e9) as i64));
    if let Some(at_secs) = replay.at_secs.filter(|_| end_ns > Some(info.end_ns)) {
        return Err(ReplayError::PastEnd { at_secs, length: TimeDelta(info.end_ns - start_ns) });
    }
    let options = ReadOptions { topics: Some(names), end_ns, ..ReadOptions::default() };
    let mut converter = CdrConverter::new(info);
    let total: u64 = topics.keys().map(|id| info.topic(*id).count).sum();
    let (mut taken, mut read) = (0u64, Read { refused: 0, segments: Vec::new() });
    for message in bag.messages(&options) {
        if !go_on() {
            return Err(ReplayError::Stopped);
        }
        let Some(sense) = topics.get(&message.topic) else { continue };
        let logged_at = Timestamp(message.log_time_ns);
        let result = match converter.convert(&message) {
            Ok(cdr) => {
                let taken = senses.take(*sense, cdr, logged_at, clock, profile);
                if let Ok(outcome) = &taken {
                    let pose = senses.pose().map(|(_, pose)| pose);
                    let picture = senses.picture();
                    tell(Told::Event(NodeEvent::Sensed { sense: *sense, cdr, outcome, pose, picture }));
                }
                taken.map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        taken += 1;
        match result {
            Ok(outcome) => read.segments.extend(outcome.segment.map(|s| s.to_string())),
            Err(error) => {
                if read.refused == 0 {
                    tracing::warn!(%error, "a message was left out");
                }
                read.refused += 1;
            }
        }
        if taken.is_multiple_of(64) || taken == total {
            tell(Told::Bar("read and encode", taken as usize, total as usize));
        }
    }
    Ok(read)
}

impl Replayed {
    /// The part of a node's status document that a bag has.
    fn status(&self) -> serde_json::Value {
        let latents = self.scene.as_ref().map_or(0, |scene| scene.memory.len());
        serde_json::json!({
            "frames": {"received": self.counts.offered, "bad_messages": self.refused},
            "context": {"latents": latents},
            "faults": self.faults.sentences(),
        })
    }

    /// Answers a goal from what was seen; `sampling` may take so long ([`Replay::time_for_sampling`]).
    ///
    /// # Errors
    /// [`ReplayError::Stopped`]: `go_on` said no.
    pub fn ask(
        &mut self,
        mind: &mut dyn Mind,
        goal: &Goal,
        sampling: Option<TimeDelta>,
        clock: &dyn Clock,
        tell: &mut dyn FnMut(Told<'_>),
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), ReplayError> {
        tell(Told::Event(NodeEvent::Asked(goal)));
        let grounded = match (&self.scene, self.faults.camera) {
            (None, _) => Err((Status::Stale, "the bag holds no usable camera frame".to_owned())),
            (_, Some(fault)) => Err((Status::Stale, fault.to_string())),
            (Some(scene), _) if scene.memory.is_empty() => Err((
                Status::Failed,
                "not enough has been seen: the memory needs at least four kept frames".to_owned(),
            )),
            (Some(scene), None) => {
                let began = clock.now();
                let until = sampling.map(|sampling| began + sampling);
                tell(Told::Event(NodeEvent::Begun { goal, scene, until }));
                let mut show = |stage: Stage<'_>| {
                    tell(Told::Event(NodeEvent::Stage(stage)));
                    if matches!(stage, Stage::Scan(..) | Stage::Step { .. }) {
                        let (what, done, of) = stage.bar();
                        tell(Told::Bar(what, done, of));
                    }
                    if go_on() { Flow::Continue } else { Flow::Stop }
                };
                let found = ground(mind, scene, goal, clock, until, &mut show);
                let mut found = found.map_err(|_| ReplayError::Stopped)?;
                let total = (clock.now() - began).as_millis_f64();
                for (stage, millis) in &found.answer.timings_ms {
                    self.profile.push(stage, *millis);
                }
                found.step_ms.iter().for_each(|millis| self.profile.push("denoise_step", *millis));
                found.answer.timings_ms.insert("total".into(), total);
                tell(Told::Event(NodeEvent::Evidence(&found)));
                Ok(Box::new(found))
            }
        };
        let answer = match &grounded {
            Ok(found) => found.answer.clone(),
            Err((status, reason)) => Answer::new(&goal.id, *status, Some(reason.clone())),
        };
        tell(Told::Event(NodeEvent::Answered(&answer)));
        (self.answer, self.grounded) = (Some(answer), grounded.ok());
        Ok(())
    }
}
