//! Shared memory: robots with a common map frame look at what the others have seen.
//!
//! With `[context] share = "map"` a robot publishes each remembered group, its latent and last pictures, with the pose that
//! the base had in that frame, and keeps what others publish. A goal by text then looks through the others' memories too,
//! one robot's after the other's, as it looks through old stretches of its own: the drive begins at the other robot's last
//! view there, and what is found is carried over by the map. [`Answer::eyes`] names the robots that an answer rests on.
//!
//! Only robots with the same bundle understand each other, and their cameras must sit alike. What the map frame is off
//! between two robots is not known here, and not in the covariance.
//!
//! | key | what |
//! |---|---|
//! | `mindseye/shared/ROBOT/here` | liveliness: this robot shares |
//! | `mindseye/shared/ROBOT/seen` | put: a [`SharedGroup`]; question: all that it remembers, one reply each |
//!
//! Memory is bounded: [`ROBOTS_MAX`] robots, [`GROUPS_MAX`] groups of each, an even spread of more.
//!
//! # Who may read
//! Pictures of a home travel. Nothing is shared unless `share` is set, and who may read it then is Zenoh's access control;
//! the documentation of [`crate::config::ContextTable::share`] has an example.
//!
//! [`Answer::eyes`]: mindseye_bridge::answer::Answer::eyes

use super::wire::{MESSAGE_MAX, WireError, read, write};
use super::{ServedError, spawn};
use crate::context::{ContextLatent, ContextMemory, LatentInfo, StoreError};
use crate::ground::{MindSpec, Scene};
use crate::image::RgbImage;
use crate::planar::{Pose2, is_finite};
use crate::senses::ContextHandle;
use mindseye_base::sync::lock;
use mindseye_bridge::ros::{Declared, Question, RosSession};
use mindseye_bridge::time::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Robots whose memories are kept.
pub const ROBOTS_MAX: usize = 8;
/// Groups that are kept of each.
pub const GROUPS_MAX: usize = 64;
/// Messages that wait to be taken; more are let go of.
const WAITING: usize = 256;
/// The own memory is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Another robot tells all that it remembers within this.
const ALL_WITHIN: Duration = Duration::from_secs(10);
/// Largest picture of a group, pixels.
const PIXELS_MAX: usize = 1 << 24;
/// Indices of others begin here, so that none is also one of the robot's own.
const INDEX_OF_OTHERS: u64 = 1 << 40;

/// A remembered group of another robot, or for one.
#[derive(Clone, Debug)]
pub struct SharedGroup {
    /// Who saw it.
    pub robot: String,
    /// Its process: another number each time that it starts.
    pub process: u64,
    /// The bundle whose codec made the latent.
    pub bundle: String,
    /// The common frame.
    pub frame: String,
    /// What was seen; `info.odom_from_base` is the base in the common frame.
    pub seen: ContextLatent,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupHeader {
    robot: String,
    process: u64,
    bundle: String,
    frame: String,
    index: u64,
    segment: u32,
    captured_at_ns: i64,
    /// x, y, yaw.
    pose: [f64; 3],
    len: usize,
    picture: [usize; 2],
    detail: Option<[usize; 2]>,
}

/// Why what another robot shared is of no use here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// It cannot be read.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Another bundle.
    #[error("robot {robot:?} shares memories of bundle {got}; this one has {wanted}")]
    Bundle {
        /// Whose.
        robot: String,
        /// Its bundle.
        got: String,
        /// Ours.
        wanted: String,
    },
    /// Another frame.
    #[error("robot {robot:?} shares memories in frame {got:?}; this one's are in {wanted:?}")]
    Frame {
        /// Whose.
        robot: String,
        /// Its frame.
        got: String,
        /// Ours.
        wanted: String,
    },
    /// Numbers that are none.
    #[error("robot {robot:?} shares a pose or a latent that is not finite")]
    NotFinite {
        /// Whose.
        robot: String,
    },
    /// Too many robots.
    #[error("robot {robot:?} is one more than the {ROBOTS_MAX} whose memories are kept")]
    Robots {
        /// Whose.
        robot: String,
    },
    /// It does not fit.
    #[error("robot {robot:?}: {source}")]
    Store {
        /// Whose.
        robot: String,
        /// Why.
        #[source]
        source: StoreError,
    },
}

impl SharedGroup {
    /// As a message; `None` for a group without a pose.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let ContextLatent { info, latent, picture, detail, .. } = &self.seen;
        let Pose2 { x, y, yaw } = info.odom_from_base?;
        let header = GroupHeader {
            robot: self.robot.clone(),
            process: self.process,
            bundle: self.bundle.clone(),
            frame: self.frame.clone(),
            index: info.index,
            segment: info.segment,
            captured_at_ns: info.captured_at.as_nanos(),
            pose: [x, y, yaw],
            len: latent.len(),
            picture: [picture.width, picture.height],
            detail: detail.as_ref().map(|d| [d.width, d.height]),
        };
        let detail = detail.as_ref().map(|d| d.data.as_slice()).unwrap_or_default();
        Some(write(&header, &[latent], &[&picture.data, detail]))
    }

    /// From a message.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn from_bytes(message: &[u8]) -> Result<Self, WireError> {
        let (header, mut numbers): (GroupHeader, _) = read(message)?;
        let latent = numbers.floats("latent", header.len)?;
        let mut picture = |[width, height]: [usize; 2]| {
            let pixels = width.checked_mul(height).filter(|pixels| *pixels <= PIXELS_MAX);
            let bytes = pixels.map_or(usize::MAX, |pixels| 3 * pixels);
            let data = numbers.bytes("picture", bytes)?.to_vec();
            Ok::<_, WireError>(RgbImage { width, height, data })
        };
        let (picture, detail) = (picture(header.picture)?, header.detail.map(&mut picture).transpose()?);
        numbers.end()?;
        let [x, y, yaw] = header.pose;
        let info = LatentInfo {
            index: header.index,
            segment: header.segment,
            captured_at: Timestamp(header.captured_at_ns),
            odom_from_base: Some(Pose2::new(x, y, yaw)),
        };
        let seen = ContextLatent { info, latent, picture, detail, by: None };
        let GroupHeader { robot, process, bundle, frame, .. } = header;
        Ok(Self { robot, process, bundle, frame, seen })
    }
}

/// What is shared, and with whom.
#[derive(Clone, Debug, PartialEq)]
pub struct ShareConfig {
    /// This robot.
    pub robot: String,
    /// The common frame.
    pub frame: String,
    /// Its bundle.
    pub bundle: String,
    /// Values of a latent.
    pub latent_len: usize,
    /// Width and height of pictures.
    pub picture: (usize, usize),
    /// Of finer ones, where the model reads depth.
    pub detail: Option<(usize, usize)>,
}

impl ShareConfig {
    /// For a robot with this model.
    pub fn of(robot: &str, frame: &str, spec: &MindSpec) -> Self {
        Self {
            robot: robot.into(),
            frame: frame.into(),
            bundle: spec.bundle_sha256.clone(),
            latent_len: spec.latent_len,
            picture: (spec.camera.width, spec.camera.height),
            detail: spec.detail,
        }
    }
}

/// What other robots have seen.
#[derive(Debug)]
pub struct Others {
    config: ShareConfig,
    /// By name: the process, and what it shared, poses in the common frame.
    robots: BTreeMap<String, (u64, ContextMemory)>,
}

impl Others {
    /// Nothing yet.
    pub fn new(config: ShareConfig) -> Self {
        Self { config, robots: BTreeMap::new() }
    }

    /// Takes what a robot shares. What came before, and its own, is passed over; a robot that began anew begins anew.
    ///
    /// # Errors
    /// [`ShareError`]; nothing is kept of it.
    pub fn take(&mut self, group: SharedGroup) -> Result<(), ShareError> {
        let SharedGroup { robot, process, bundle, frame, seen } = group;
        let c = &self.config;
        if robot == c.robot {
            return Ok(());
        }
        if bundle != c.bundle {
            return Err(ShareError::Bundle { robot, got: bundle, wanted: c.bundle.clone() });
        }
        if frame != c.frame {
            return Err(ShareError::Frame { robot, got: frame, wanted: c.frame.clone() });
        }
        let finite =
            seen.info.odom_from_base.is_some_and(is_finite) && seen.latent.iter().all(|v| v.is_finite());
        if !finite || seen.info.index >= INDEX_OF_OTHERS {
            return Err(ShareError::NotFinite { robot });
        }
        if !self.robots.contains_key(&robot) && self.robots.len() >= ROBOTS_MAX {
            return Err(ShareError::Robots { robot });
        }
        let memory = || ContextMemory::new(GROUPS_MAX, 2, c.latent_len, c.picture, c.detail);
        let known = self.robots.entry(robot.clone()).or_insert_with(|| (process, memory()));
        if known.0 != process {
            *known = (process, memory());
        }
        match known.1.store(seen.info, &seen.latent, &seen.picture, seen.detail.as_ref()) {
            Ok(_) | Err(StoreError::Order { .. }) => Ok(()),
            Err(source) => Err(ShareError::Store { robot, source }),
        }
    }

    /// Puts what others have seen before a scene's own memory, each robot's by itself; `frame_from_odom` is where the
    /// scene's odometry is in the common frame.
    pub fn join(&self, scene: &mut Scene, frame_from_odom: Pose2) {
        let odom_from_frame = frame_from_odom.inverse();
        let mut memory = Vec::new();
        for (k, (robot, (_, theirs))) in self.robots.iter().enumerate() {
            let by: Arc<str> = robot.as_str().into();
            memory.extend(theirs.snapshot().into_iter().map(|mut seen| {
                seen.info.index += INDEX_OF_OTHERS * (k as u64 + 1);
                seen.info.odom_from_base = seen.info.odom_from_base.map(|pose| odom_from_frame.compose(pose));
                seen.by = Some(by.clone());
                seen
            }));
        }
        memory.append(&mut scene.memory);
        scene.memory = memory;
    }

    /// Robots that shared something, and how many groups are kept of each.
    pub fn robots(&self) -> BTreeMap<String, usize> {
        self.robots.iter().map(|(robot, (_, memory))| (robot.clone(), memory.len())).collect()
    }
}

/// What comes to the thread.
enum In {
    Group(Vec<u8>),
    Joined(String),
    Asked(Question),
}

/// Shares a robot's memory until it is dropped.
pub struct Share {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _declared: Vec<Declared>,
}

impl Share {
    /// Publishes what `context` remembers, and joins what others publish to its scenes.
    ///
    /// # Errors
    /// [`ServedError::Ros`], [`ServedError::Thread`].
    pub fn start(
        session: &RosSession,
        config: ShareConfig,
        context: ContextHandle,
    ) -> Result<Self, ServedError> {
        let (inbox, messages) = sync_channel(WAITING);
        let own = format!("mindseye/shared/{}", config.robot);
        let seen = |robot: &str| format!("mindseye/shared/{robot}/seen");
        let to = |inbox: &SyncSender<In>| inbox.clone();
        let (groups, asked, joined) = (to(&inbox), to(&inbox), to(&inbox));
        let others = Arc::new(Mutex::new(Others::new(config.clone())));
        context.join_others(others.clone());
        // What comes while the thread cannot keep up is a gap in another's memory, no more.
        let declared = vec![
            session.hear(&seen("*"), MESSAGE_MAX, move |_, bytes| drop(groups.try_send(In::Group(bytes))))?,
            session
                .questions(&seen(&config.robot), move |question| drop(asked.try_send(In::Asked(question))))?,
            session.be_here(&format!("{own}/here"))?,
            session.who_is_here("mindseye/shared/*/here", move |key, here| {
                if let (true, Some(robot)) = (here, key.rsplit('/').nth(1)) {
                    drop(joined.try_send(In::Joined(robot.to_owned())));
                }
            })?,
        ];
        let stop = Arc::new(AtomicBool::new(false));
        let process = xxhash_rust::xxh3::xxh3_64(
            format!("{} {}", session.zid(), mindseye_bridge::clock::now().as_nanos()).as_bytes(),
        );
        let sharer = Sharer {
            session: session.clone(),
            config,
            process,
            context,
            others,
            messages,
            inbox,
            stop: stop.clone(),
            last: None,
            refused: 0,
        };
        let thread = Some(spawn("share", move || sharer.run())?);
        Ok(Self { stop, thread, _declared: declared })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that shares memories panicked");
        }
    }
}

struct Sharer {
    session: RosSession,
    config: ShareConfig,
    process: u64,
    context: ContextHandle,
    others: Arc<Mutex<Others>>,
    messages: Receiver<In>,
    inbox: SyncSender<In>,
    stop: Arc<AtomicBool>,
    /// Index of the last group that was published.
    last: Option<u64>,
    refused: u64,
}

impl Sharer {
    fn run(mut self) {
        let mut look_at = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            match self.messages.recv_timeout(look_at.saturating_duration_since(Instant::now())) {
                Ok(In::Group(bytes)) => self.take(&bytes),
                Ok(In::Joined(robot)) if robot != self.config.robot => self.ask(&robot),
                Ok(In::Asked(question)) => {
                    for bytes in self.groups(None).into_iter().filter_map(|group| group.to_bytes()) {
                        if question.reply(bytes).is_err() {
                            break;
                        }
                    }
                }
                Ok(In::Joined(_)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= look_at {
                look_at = Instant::now() + LOOK_EVERY;
                self.publish();
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        let taken = SharedGroup::from_bytes(bytes).map_err(ShareError::from);
        if let Err(error) = taken.and_then(|group| lock(&self.others).take(group)) {
            self.refused += 1;
            if self.refused.is_power_of_two() {
                tracing::warn!(%error, times = self.refused, "a shared memory is of no use");
            }
        }
    }

    /// Asks a robot that appeared for all that it remembers.
    fn ask(&self, robot: &str) {
        let inbox = self.inbox.clone();
        let heard = move |reply: Option<Vec<u8>>| {
            if let Some(bytes) = reply {
                drop(inbox.try_send(In::Group(bytes)));
            }
        };
        let key = format!("mindseye/shared/{robot}/seen");
        if let Err(error) = self.session.ask(&key, Vec::new(), ALL_WITHIN, heard) {
            tracing::debug!(%error, "a robot cannot be asked for its memory");
        }
    }

    /// What is remembered after an index, in the common frame; not the newest, whose odometry may still come.
    fn groups(&self, after: Option<u64>) -> Vec<SharedGroup> {
        let Some(frame_from_odom) = self.context.frame_from_odom() else { return Vec::new() };
        let mut seen = self.context.seen_after(after, usize::MAX);
        seen.pop();
        let group = |mut seen: ContextLatent| {
            seen.info.odom_from_base = seen.info.odom_from_base.map(|pose| frame_from_odom.compose(pose));
            let ShareConfig { robot, bundle, frame, .. } = self.config.clone();
            SharedGroup { robot, process: self.process, bundle, frame, seen }
        };
        seen.into_iter().map(group).collect()
    }

    fn publish(&mut self) {
        let key = format!("mindseye/shared/{}/seen", self.config.robot);
        for group in self.groups(self.last) {
            self.last = Some(group.seen.info.index);
            if let Some(bytes) = group.to_bytes()
                && let Err(error) = self.session.put(&key, bytes, false)
            {
                tracing::debug!(%error, "a memory was not shared");
            }
        }
    }
}
