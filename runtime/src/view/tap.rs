//! The end that the robot's threads touch: takes what happens, keeps the newest of it in bounded memory, and never waits.

use super::hub::Hub;
use crate::context::{Eviction, LatentInfo};
use crate::ground::Stage;
use crate::image::{Lens, ModelCamera, RgbImage};
use crate::imagine::Clock;
use crate::lift::Lifted;
use crate::node::{MonotonicClock, NodeEvent, goal_in_words};
use crate::planar::Pose2;
use crate::senses::{Outcome, Sense, is_camera};
use crate::study::Studied;
use mindseye_bridge::answer::Answer;
use mindseye_bridge::time::TimeDelta;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Widest picture that is kept of a frame, pixels.
const KEPT_WIDTH: usize = 96;
/// Most poses of the way driven; when there are more every second one is left out.
const PATH_MAX: usize = 2000;
/// The way driven gets another pose after so much, metres and radians.
const PATH_STEP: (f64, f64) = (0.03, 0.2);
/// Events of goals that wait to be shown.
const GOALS_WAITING: usize = 256;
/// Most landmarks of a goal that are shown: an even choice of more.
const LANDMARKS_SHOWN: usize = 250;
/// Moments that wait to be shown.
const MOMENTS_WAITING: usize = 256;

/// A change of the memory.
#[derive(Debug)]
pub(super) enum Remembered {
    Stored {
        info: LatentInfo,
        picture: RgbImage,
    },
    Evicted(Eviction),
    /// Everything left: the camera's stream began anew.
    Cleared,
}

/// What happened to a goal.
#[derive(Debug)]
pub(super) enum GoalEvent {
    Asked {
        id: String,
        words: String,
    },
    /// With the indices of the latents in memory.
    Begun {
        id: String,
        words: String,
        until: Option<TimeDelta>,
        memory: Vec<u64>,
        surroundings: Surroundings,
    },
    Done {
        what: &'static str,
        done: usize,
        of: usize,
        draft: Option<Box<Answer>>,
    },
    Evidence(Box<Evidence>),
    Answered(Box<Answer>),
}

/// What studying frames has given, on the plane.
#[derive(Debug, Default)]
pub(super) struct Surroundings {
    pub landmarks: Vec<(f64, f64)>,
    /// Class and middle of each thing that the detector saw.
    pub things: Vec<(String, (f64, f64))>,
}

impl Surroundings {
    fn of(studied: &Studied) -> Self {
        let landmarks: Vec<(f64, f64)> = studied
            .landmarks
            .iter()
            .flat_map(|map| map.landmarks())
            .map(|l| (l.position.x, l.position.y))
            .collect();
        let things = studied.objects.iter().map(|thing| {
            let class = studied.classes.as_ref().and_then(|names| names.get(thing.class));
            (class.cloned().unwrap_or_default(), (thing.position.x, thing.position.y))
        });
        let shown = crate::context::spread(landmarks.len(), LANDMARKS_SHOWN);
        Self { landmarks: shown.into_iter().map(|i| landmarks[i]).collect(), things: things.collect() }
    }
}

/// What is shown of a [`Grounded`](crate::ground::Grounded), with small frames.
#[derive(Debug)]
pub(super) struct Evidence {
    pub frames: Vec<RgbImage>,
    pub candidate: usize,
    /// Positions in the memory.
    pub used: Vec<usize>,
    pub origin: Option<Pose2>,
    pub path: Vec<Pose2>,
    pub object: Option<(f64, f64)>,
    pub lifted: Option<Lifted>,
    /// By frame of the sampled drive.
    pub explained: Vec<(usize, f64)>,
    /// Which of the sampled drives the shown one was held along.
    pub guided: Option<usize>,
    pub reconstruction_error: Option<f64>,
}

/// An estimate of a candidate's drive.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Estimate {
    pub step: usize,
    pub steps: usize,
    pub candidates: usize,
    pub latents: Vec<f32>,
}

/// What waits to be shown.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// A camera message, at most as old as the last look.
    pub camera: Option<(Sense, Vec<u8>)>,
    pub memory: VecDeque<Remembered>,
    /// With the time of each on the monotonic clock.
    pub goals: VecDeque<(TimeDelta, GoalEvent)>,
    pub estimates: BTreeMap<usize, Estimate>,
    pub status: Option<String>,
    /// The way driven, when it changed.
    pub path: Option<Vec<Pose2>>,
    pub pose: Option<Pose2>,
}

#[derive(Default)]
struct State {
    waiting: Waiting,
    path: Vec<Pose2>,
    path_changed: bool,
    dropped: u64,
    closing: bool,
}

/// See the head of this file.
pub struct Tap {
    hub: Arc<Hub>,
    state: Mutex<State>,
    woken: Condvar,
    /// Estimates can be decoded.
    decodes: bool,
}

/// A picture as it is kept.
pub(super) fn small(picture: &RgbImage) -> RgbImage {
    no_wider(picture, KEPT_WIDTH)
}

/// A picture, reduced where it is wider than `most`.
pub(super) fn no_wider(picture: &RgbImage, most: usize) -> RgbImage {
    let RgbImage { width, height, data } = picture;
    if *width <= most {
        return picture.clone();
    }
    let mut out = RgbImage::filled(0, 0, [0; 3]);
    let mut lens = Lens::new(ModelCamera::any(most, (height * most / width).max(1)));
    // Pixels that do not fit their size leave it empty.
    let _ = lens.look(data, *width, *height, None, &mut out);
    out
}

impl Tap {
    pub(super) fn new(hub: Arc<Hub>, decodes: bool) -> Self {
        Self { hub, state: Mutex::default(), woken: Condvar::new(), decodes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears what happens; takes a lock that is held for copies only.
    pub fn hear(&self, event: NodeEvent<'_>) {
        match event {
            NodeEvent::Sensed { sense, cdr, outcome, pose, picture } => {
                self.sensed(sense, cdr, outcome, pose, picture);
            }
            NodeEvent::Asked(goal) => {
                self.goal(GoalEvent::Asked { id: goal.id.clone(), words: goal_in_words(goal) });
            }
            NodeEvent::Begun { goal, until, scene } => {
                let memory = scene.memory.iter().map(|c| c.info.index).collect();
                let (id, words) = (goal.id.clone(), goal_in_words(goal));
                let surroundings = Surroundings::of(&scene.studied);
                self.goal(GoalEvent::Begun { id, words, until, memory, surroundings });
            }
            NodeEvent::Stage(stage) => self.stage(stage),
            NodeEvent::Evidence(grounded) => {
                self.goal(GoalEvent::Evidence(Box::new(Evidence {
                    frames: grounded.shown().iter().map(small).collect(),
                    candidate: grounded.candidate,
                    used: grounded.used.clone(),
                    origin: grounded.origin,
                    path: grounded.path.clone(),
                    object: grounded.object,
                    lifted: grounded.lifted.clone(),
                    explained: grounded.explained.clone(),
                    guided: grounded.guided.as_ref().map(|guided| guided.candidate),
                    reconstruction_error: grounded.reconstruction_error,
                })));
            }
            NodeEvent::Answered(answer) => self.goal(GoalEvent::Answered(Box::new(answer.clone()))),
            NodeEvent::Status(document) => self.lock().waiting.status = Some(document.to_string()),
        }
    }

    fn sensed(&self, sense: Sense, cdr: &[u8], outcome: &Outcome, pose: Option<Pose2>, picture: &RgbImage) {
        let watched = self.hub.counts().viewers > 0;
        let stored = outcome.latent.map(|info| Remembered::Stored { info, picture: small(picture) });
        let mut state = self.lock();
        // One picture for each that was taken: frames in between are not even copied.
        if watched && is_camera(sense) && state.waiting.camera.is_none() {
            state.waiting.camera = Some((sense, cdr.to_vec()));
        }
        let cleared = outcome.segment.filter(|s| !s.keeps_history()).map(|_| Remembered::Cleared);
        for change in [cleared, outcome.eviction.map(Remembered::Evicted), stored].into_iter().flatten() {
            if state.waiting.memory.len() == MOMENTS_WAITING {
                state.waiting.memory.pop_front();
                state.dropped += 1;
            }
            state.waiting.memory.push_back(change);
        }
        if let Some(pose) = pose {
            state.waiting.pose = Some(pose);
            let moved = state.path.last().is_none_or(|last| {
                last.distance(pose) > PATH_STEP.0
                    || crate::planar::wrap_angle(last.yaw - pose.yaw).abs() > PATH_STEP.1
            });
            if moved {
                if state.path.len() == PATH_MAX {
                    let mut place = 0;
                    state.path.retain(|_| {
                        place += 1;
                        place % 2 == 1
                    });
                }
                state.path.push(pose);
                state.path_changed = true;
            }
        }
    }

    fn stage(&self, stage: Stage<'_>) {
        if let Stage::Step { candidate, candidates, step, steps, estimate } = stage
            && self.decodes
        {
            let latents = estimate.to_vec();
            self.lock().waiting.estimates.insert(candidate, Estimate { step, steps, candidates, latents });
        }
        let (what, done, of) = stage.bar();
        let draft = if let Stage::Draft(answer) = stage { Some(Box::new(answer.clone())) } else { None };
        self.goal(GoalEvent::Done { what, done, of, draft });
    }

    fn goal(&self, event: GoalEvent) {
        let now = MonotonicClock.now();
        let mut state = self.lock();
        if state.waiting.goals.len() == GOALS_WAITING {
            state.waiting.goals.pop_front();
            state.dropped += 1;
        }
        state.waiting.goals.push_back((now, event));
        drop(state);
        self.woken.notify_one();
    }

    /// Waits until something of a goal happened, but not longer than `at_most`, and takes everything; `None` when the
    /// page is closed.
    pub(super) fn take(&self, at_most: Duration) -> Option<(Waiting, u64)> {
        let mut state = self.lock();
        if state.waiting.goals.is_empty() && !state.closing {
            state = self.woken.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.closing {
            return None;
        }
        let dropped = state.dropped;
        drop(state);
        Some((self.rest(), dropped))
    }

    /// What waits when it is closed.
    pub(super) fn rest(&self) -> Waiting {
        let mut state = self.lock();
        let path = std::mem::take(&mut state.path_changed).then(|| state.path.clone());
        Waiting { path, ..std::mem::take(&mut state.waiting) }
    }

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.woken.notify_one();
    }
}
