//! A recorded bag instead of a robot: read it, remember what it shows, answer one goal.
//!
//! The same bag, configuration, bundle, goal and seed give the same answer, bit for bit, times aside (and without a
//! deadline, which makes the answer depend on the machine's speed).

use crate::config::RobotConfig;
use crate::context::ContextCounts;
use crate::ground::{Grounded, Scene, Stage, ground};
use crate::imagine::{Clock, Flow};
use crate::mind::{LoadError, Pipeline};
use crate::profile::Profile;
use crate::senses::{Sense, Senses};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::bag::{BagInfo, CdrConverter, OpenBagError, OpenOptions, ReadOptions, TopicId, open};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::time::TimeDelta;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What a replay is about.
#[derive(Clone, Debug)]
pub struct Replay {
    /// A file, or a rosbag2 directory.
    pub bag: PathBuf,
    /// Topics, context, camera.
    pub config: RobotConfig,
    /// What to ask; `None`: only read.
    pub goal: Option<Goal>,
    /// Ask this many seconds after the start of the bag instead of at its end.
    pub at_secs: Option<f64>,
    /// Time allowed for the goal.
    pub deadline: Option<TimeDelta>,
}

/// What happens meanwhile.
#[derive(Clone, Debug)]
pub enum Told<'a> {
    /// Something worth a line.
    Line(String),
    /// Work in progress: what, done, of.
    Bar(&'a str, usize, usize),
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// What became of the frames.
    pub counts: ContextCounts,
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
}

/// Why a bag could not be replayed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// It cannot be opened.
    #[error(transparent)]
    Bag(#[from] OpenBagError),
    /// The model's sessions cannot be made.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// No pictures.
    #[error(
        "{}: no camera topic {image} or {compressed} and no single topic of these types{among}; name it in a \
         --config", bag.display()
    )]
    NoCamera {
        /// The bag.
        bag: PathBuf,
        /// Raw topic looked for.
        image: String,
        /// Compressed topic looked for.
        compressed: String,
        /// What there is.
        among: String,
    },
    /// The caller said stop.
    #[error("stopped")]
    Stopped,
}

/// Which topic is which: the configuration's names where the bag has them, else the only topic of a type.
pub(crate) fn topics(
    info: &BagInfo,
    config: &RobotConfig,
    tell: &mut dyn FnMut(Told<'_>),
) -> HashMap<TopicId, Sense> {
    let t = &config.topics;
    let wanted = [
        (Sense::Image, &t.image, "sensor_msgs/Image"),
        (Sense::Compressed, &t.compressed, "sensor_msgs/CompressedImage"),
        (Sense::CameraInfo, &t.camera_info, "sensor_msgs/CameraInfo"),
        (Sense::Odometry, &t.odom, "nav_msgs/Odometry"),
        (Sense::Tf, &t.tf, "tf2_msgs/TFMessage"),
        (Sense::TfStatic, &t.tf_static, "tf2_msgs/TFMessage"),
    ];
    let mut found = HashMap::new();
    for (sense, name, type_name) in wanted {
        let of_type = of_type(info, type_name);
        let named = of_type.iter().copied().find(|i| info.topics[*i].name == *name);
        let by_type = |only: &[usize]| match only {
            [one] if sense != Sense::Tf && sense != Sense::TfStatic => Some(*one),
            _ => None,
        };
        let Some(i) = named.or_else(|| by_type(&of_type)) else { continue };
        if named.is_none() {
            tell(Told::Line(format!("{} instead of {name}", info.topics[i].name)));
        }
        found.insert(TopicId(i as u32), sense);
    }
    // Pictures come once: the topic with more messages.
    let count = |sense: Sense, found: &HashMap<TopicId, Sense>| {
        found.iter().find(|(_, s)| **s == sense).map(|(id, _)| (*id, info.topic(*id).count))
    };
    if let (Some((raw, n)), Some((compressed, m))) =
        (count(Sense::Image, &found), count(Sense::Compressed, &found))
    {
        found.remove(if m > n { &raw } else { &compressed });
    }
    found
}

fn of_type(info: &BagInfo, type_name: &str) -> Vec<usize> {
    (0..info.topics.len()).filter(|i| info.topics[*i].type_name.replace("/msg/", "/") == type_name).collect()
}

fn no_camera(bag: &Path, info: &BagInfo, config: &RobotConfig) -> ReplayError {
    let pictures: Vec<&str> = ["sensor_msgs/Image", "sensor_msgs/CompressedImage"]
        .iter()
        .flat_map(|t| of_type(info, t))
        .map(|i| info.topics[i].name.as_str())
        .collect();
    let among =
        if pictures.is_empty() { String::new() } else { format!(" (there are {})", pictures.join(", ")) };
    ReplayError::NoCamera {
        bag: bag.to_owned(),
        image: config.topics.image.clone(),
        compressed: config.topics.compressed.clone(),
        among,
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
    let Replay { config, .. } = replay;
    let mut mind = pipeline.mind(0)?;
    let mut senses =
        Senses::new(config.senses(mind.spec().frame_period), mind.spec().camera, pipeline.encoder()?);
    let bag = open(&replay.bag, &OpenOptions::default())?;
    let info = bag.info().clone();
    let topics = topics(&info, config, tell);
    if !topics.values().any(|s| matches!(s, Sense::Image | Sense::Compressed)) {
        return Err(no_camera(&replay.bag, &info, config));
    }

    let mut profile = Profile::default();
    let names = topics.keys().map(|id| info.topic(*id).name.clone()).collect();
    let end_ns = replay.at_secs.map(|at| info.start_ns.saturating_add((at * 1e9) as i64));
    let options = ReadOptions { topics: Some(names), end_ns, ..ReadOptions::default() };
    let mut converter = CdrConverter::new(&info);
    let total: u64 = topics.keys().map(|id| info.topic(*id).count).sum();
    let (mut taken, mut refused, mut segments) = (0u64, 0u64, Vec::new());
    for message in bag.messages(&options) {
        if !go_on() {
            return Err(ReplayError::Stopped);
        }
        let Some(sense) = topics.get(&message.topic) else { continue };
        let result = match converter.convert(&message) {
            Ok(cdr) => senses.take(*sense, cdr, clock, &mut profile).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        taken += 1;
        match result {
            Ok(took) => segments.extend(took.segment.map(|s| s.to_string())),
            Err(error) => {
                if refused == 0 {
                    tracing::warn!(%error, "a message was left out");
                }
                refused += 1;
            }
        }
        if taken.is_multiple_of(64) || taken == total {
            tell(Told::Bar("read and encode", taken as usize, total as usize));
        }
    }
    let counts = senses.counts();
    tell(Told::Line(format!(
        "{} frames, {} kept, {} latents in memory{}",
        counts.offered,
        counts.kept,
        senses.seen().latents(),
        if refused > 0 { format!(", {refused} messages left out") } else { String::new() },
    )));

    let scene = senses.seen().scene();
    let mut grounded = None;
    let answer = match &replay.goal {
        None => None,
        Some(goal) => Some(match &scene {
            None => {
                let reason = "the bag holds no usable camera frame";
                Answer::new(&goal.id, Status::Stale, Some(reason.into()))
            }
            Some(scene) if scene.memory.is_empty() => {
                let reason = "not enough has been seen: the memory needs at least four kept frames";
                Answer::new(&goal.id, Status::Failed, Some(reason.into()))
            }
            Some(scene) => {
                let until = replay.deadline.map(|allowed| clock.now() + allowed);
                let began = clock.now();
                let mut show = |stage: Stage<'_>| {
                    if matches!(stage, Stage::Scan(..) | Stage::Step { .. }) {
                        let (what, done, of) = stage.bar();
                        tell(Told::Bar(what, done, of));
                    }
                    if go_on() { Flow::Continue } else { Flow::Stop }
                };
                let Ok(mut found) = ground(mind.as_mut(), scene, goal, clock, until, &mut show) else {
                    return Err(ReplayError::Stopped);
                };
                for (stage, millis) in &found.answer.timings_ms {
                    profile.push(stage, *millis);
                }
                found.step_ms.iter().for_each(|millis| profile.push("denoise_step", *millis));
                let total = (clock.now() - began).as_millis_f64();
                found.answer.timings_ms.insert("total".into(), total);
                let answer = found.answer.clone();
                grounded = Some(Box::new(found));
                answer
            }
        }),
    };
    Ok(Replayed {
        counts,
        scene,
        segments,
        refused,
        odometry: senses.pose().is_some(),
        camera_info: senses.has_intrinsics(),
        answer,
        grounded,
        profile,
    })
}
