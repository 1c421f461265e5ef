//! The node: threads and Zenoh around the pure parts.
//!
//! ```text
//! subscribers (bounded queues) ─► senses thread ─ ringbuf ─► agent thread ─► publishers, replies, recording
//! goals, cancels, queries (tokio tasks) ───────── channel ──►    │    ▲
//!                                                                ▼    │ drafts, answers
//!                                                           mind thread (denoiser)
//! ```
//!
//! With `[navigate] action` a task carries commands to nav2's action and brings its news to the agent's thread.
//! Everything is decided by [`crate::agent::Agent`]; here it is only carried out.
//!
//! Invariant: the senses thread never waits for the mind: they share only the context memory, whose lock
//! is held while a latent is copied. Every queue is bounded; what is dropped is counted and reported.

mod agent_loop;
mod figures;
mod navigate;
mod publish;
mod pump;
mod requests;
mod worker;

pub use publish::{path_message, strip};

use crate::agent::{Agent, DriveNews, Event, Ticket};
use crate::config::{RobotConfig, Topics};
use crate::context::{ContextCounts, GroupEncoder};
use crate::ground::{Grounded, Mind, MindSpec, Scene, Stage};
use crate::image::RgbImage;
use crate::imagine::Clock;
use crate::planar::Pose2;
use crate::profile::Profile;
use crate::record::RecordSender;
use crate::senses::{ContextHandle, Outcome, Sense, Senses};
use crate::served::ServedError;
use crate::served::shared::{Share, ShareConfig};
use crate::study::{self, Study};
use agent_loop::AgentLoop;
use figures::Figures;
use mindseye_bridge::answer::Answer;
use mindseye_bridge::clock;
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_bridge::ros::{Claim, RosError, RosSession};
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::detector::DetectorError;
use navigate::{Command, Navigator};
use publish::Outputs;
use pump::{Inputs, OdometryNews, Replaced, SensesPump};
use requests::{Clients, Diary, Inbox, Origin, Questions};
use ringbuf::HeapRb;
use ringbuf::traits::Split;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::mpsc;
use worker::{Job, Worker};

/// Events from the senses that wait for the agent.
const EVENTS_WAITING: usize = 256;
/// Requests that wait for the agent.
const REQUESTS_WAITING: usize = 64;
/// Goals that wait for the mind: those that are let go of.
const JOBS_WAITING: usize = 4;
/// News of drives that wait for the agent, which looks every few milliseconds.
const DRIVES_WAITING: usize = 256;
/// Drives are cancelled within this when the node stops.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// The process's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> TimeDelta {
        clock::monotonic()
    }
}

/// What someone in the same process may want to see of the node's work. Of one goal they come in this order; those of
/// the senses come in between, from another thread.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum NodeEvent<'a> {
    /// A message was taken in.
    Sensed {
        /// What it is.
        sense: Sense,
        /// As it came.
        cdr: &'a [u8],
        /// What became of it.
        outcome: &'a Outcome,
        /// The newest pose of odometry.
        pose: Option<Pose2>,
        /// The newest kept frame, as the model looks at it.
        picture: &'a RgbImage,
    },
    /// A goal came. It may be refused without being begun.
    Asked(&'a Goal),
    /// A goal was begun.
    Begun {
        /// What is wanted.
        goal: &'a Goal,
        /// What is known.
        scene: &'a Scene,
        /// When the answer must be there, on [`MonotonicClock`].
        until: Option<TimeDelta>,
    },
    /// A stage came to its end, or a step was done.
    Stage(Stage<'a>),
    /// What the answer rests on; the answer follows.
    Evidence(&'a Grounded),
    /// The answer.
    Answered(&'a Answer),
    /// The status document, when it is published.
    Status(&'a serde_json::Value),
}

/// Hears what happens; must not block.
pub type Observer = Box<dyn Fn(NodeEvent<'_>) + Send + Sync>;

/// A goal for a person.
pub fn goal_in_words(goal: &Goal) -> String {
    match &goal.kind {
        GoalKind::Text(text) => text.clone(),
        GoalKind::Waypoints(poses) => format!("{} waypoints", poses.len()),
    }
}

/// Counts of a running node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeCounts {
    /// Frames, by what became of them.
    pub context: ContextCounts,
    /// Camera messages arrived, the dropped ones included.
    pub camera_received: u64,
    /// Camera messages dropped because the senses were busy.
    pub camera_dropped: u64,
    /// Latents in memory.
    pub latents: usize,
    /// Messages that could not be read.
    pub bad_messages: u64,
}

/// A running node. Dropping it stops it.
pub struct Node {
    stop: Arc<AtomicBool>,
    inbox: SyncSender<Inbox>,
    threads: Vec<JoinHandle<()>>,
    runtime: Option<tokio::runtime::Runtime>,
    navigator: Option<tokio::task::JoinHandle<()>>,
    figures: Arc<Figures>,
    context: ContextHandle,
    replaced: Arc<Mutex<Replaced>>,
    _share: Option<Share>,
}

/// What a node needs to start.
pub struct NodeParts {
    /// Its configuration.
    pub config: RobotConfig,
    /// The model, for the mind's thread.
    pub mind: Box<dyn Mind>,
    /// The model's encoder, for the senses' thread.
    pub encoder: Box<dyn GroupEncoder + Send>,
    /// Where to record, if anywhere.
    pub record: Option<RecordSender>,
    /// Who watches, if anyone.
    pub observer: Option<Observer>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// Zenoh or a topic.
    #[error(transparent)]
    Ros(#[from] RosError),
    /// The detector cannot be used.
    #[error(transparent)]
    Detector(#[from] DetectorError),
    /// Memories cannot be shared.
    #[error(transparent)]
    Share(#[from] ServedError),
    /// The system gave no thread.
    #[error("cannot start the {0} thread: {1}")]
    Thread(&'static str, std::io::Error),
}

/// What a node declares on its session.
struct Keys {
    inputs: Inputs,
    outputs: Outputs,
    navigator: Option<Navigator>,
    commands: Option<mpsc::Sender<Command>>,
    drives: mpsc::Receiver<(Ticket, DriveNews)>,
    questions: Questions,
    claim: Claim,
}

impl Keys {
    fn declare(
        session: &RosSession,
        config: &RobotConfig,
        record: Option<RecordSender>,
    ) -> Result<Self, NodeError> {
        let inputs = pump::subscribe(session, &config.topics, &Sense::ALL)?;
        let outputs = Outputs::declare(session, config, record)?;
        let (news, drives) = mpsc::channel(DRIVES_WAITING);
        let (navigator, commands) = Navigator::new(session, &config.navigate, news)?.unzip();
        let questions = Questions::declare(session, config)?;
        let claim = session.claim(&format!("mindseye/{}/node", config.robot))?;
        Ok(Self { inputs, outputs, navigator, commands, drives, questions, claim })
    }
}

/// The senses, which study frames in full where that is wanted.
fn senses_of(
    config: &RobotConfig,
    spec: &MindSpec,
    encoder: Box<dyn GroupEncoder + Send>,
) -> Result<Senses, NodeError> {
    let senses = Senses::new(config.senses(spec), spec.camera, encoder);
    let Some((study, detector)) = study::wanted(config, spec)? else { return Ok(senses) };
    let study = Study::threaded(study, detector, MonotonicClock);
    Ok(senses.with_study(study.map_err(|e| NodeError::Thread("study", e))?))
}

/// The sharing of memories, where it is wanted.
fn share_of(
    session: &RosSession,
    config: &RobotConfig,
    spec: &MindSpec,
    context: &ContextHandle,
) -> Result<Option<Share>, NodeError> {
    if config.context.share.is_empty() {
        return Ok(None);
    }
    let share = ShareConfig::of(&config.robot, &config.context.share, spec);
    Ok(Some(Share::start(session, share, context.clone())?))
}

fn spawn(name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, NodeError> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map_err(|e| NodeError::Thread(name, e))
}

impl Node {
    /// Declares topics and queryables on `session` and starts the threads.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn start(session: &RosSession, parts: NodeParts) -> Result<Self, NodeError> {
        let NodeParts { config, mind, encoder, record, observer } = parts;
        let observer: Arc<Observer> = Arc::new(observer.unwrap_or_else(|| Box::new(|_| ())));
        let Keys { inputs, outputs, navigator, commands, drives, questions, claim } =
            Keys::declare(session, &config, record.clone())?;
        let replaced: Arc<Mutex<Replaced>> = Arc::default();
        let diary = Diary::new(&config, record.clone());
        let senses = senses_of(&config, mind.spec(), encoder)?;
        let context = senses.context();
        let share = share_of(session, &config, mind.spec(), &context)?;
        let figures = Arc::new(Figures::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (inbox, requests) = sync_channel(REQUESTS_WAITING);
        let (events_in, events_out) = HeapRb::<Event>::new(EVENTS_WAITING).split();
        let (jobs_in, jobs_out) = sync_channel::<Job>(JOBS_WAITING);
        let wanted = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let mut pump = SensesPump {
            senses,
            inputs,
            replaced: replaced.clone(),
            events: events_in,
            figures: figures.clone(),
            record,
            observer: observer.clone(),
            stop: stop.clone(),
            profile: Profile::default(),
            copied: TimeDelta::ZERO,
            odometry: OdometryNews::new(&config.frames),
        };
        threads.push(spawn("senses", move || pump.run())?);
        let worker = Worker {
            mind,
            context: context.clone(),
            jobs: jobs_out,
            inbox: inbox.clone(),
            wanted: wanted.clone(),
            figures: figures.clone(),
            observer: observer.clone(),
        };
        threads.push(spawn("mind", move || worker.run())?);
        let agent = AgentLoop {
            agent: Agent::new(config.agent()),
            robot: config.robot.clone(),
            period: TimeDelta::from(Duration::from_millis(config.status_period_ms)),
            requests,
            events: events_out,
            jobs: jobs_in,
            wanted,
            outputs,
            commands,
            drives,
            clients: Clients::default(),
            claim,
            claim_changes: 0,
            figures: figures.clone(),
            context: context.clone(),
            observer,
            stop: stop.clone(),
        };
        threads.push(spawn("agent", move || agent.run())?);
        let runtime = requests::runtime().map_err(|e| NodeError::Thread("requests", e))?;
        requests::listen(&runtime, &inbox, &Arc::new(diary), questions);
        let navigator = navigator.map(|navigator| runtime.spawn(navigator.run()));
        Ok(Self {
            stop,
            inbox,
            threads,
            runtime: Some(runtime),
            navigator,
            figures,
            context,
            replaced,
            _share: share,
        })
    }

    /// Counts so far.
    pub fn counts(&self) -> NodeCounts {
        self.figures.counts(&self.context)
    }

    /// Durations per stage so far.
    pub fn profile(&self) -> Profile {
        let mut profile = self.figures.profile();
        if let Some(study) = self.context.study() {
            profile.absorb(&study.profile());
        }
        profile
    }

    /// What the goals can see.
    pub fn context(&self) -> ContextHandle {
        self.context.clone()
    }

    /// Listens to other topics for these senses from now on; those without a name are heard no more. What still waits
    /// in the queues of the topics before is let go of, and the counts of these senses begin anew.
    ///
    /// # Errors
    /// A topic cannot be subscribed to; all stay as they are.
    pub fn listen_to(
        &self,
        session: &RosSession,
        topics: &Topics,
        senses: &[Sense],
    ) -> Result<(), NodeError> {
        let inputs = pump::subscribe(session, topics, senses)?;
        let mut replaced = figures::lock(&self.replaced);
        replaced.inputs.retain(|(sense, _)| !senses.contains(sense));
        replaced.inputs.extend(inputs);
        replaced.senses.extend(senses);
        Ok(())
    }

    /// A handle to ask and cancel with, from the same process.
    pub fn requester(&self) -> Requester {
        Requester(self.inbox.clone())
    }

    /// Stops the threads; a goal in work is answered `cancelled`.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A full inbox is drained by the agent, which sees the flag by itself.
        let _ = self.inbox.try_send(Inbox::Stop);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the node panicked");
            }
        }
        let Some(runtime) = self.runtime.take() else { return };
        // The agent's end of the commands is gone: the navigator cancels its drive and ends.
        if let Some(navigator) = self.navigator.take() {
            let over = runtime.block_on(async { tokio::time::timeout(STOP_WITHIN, navigator).await });
            if over.is_err() {
                tracing::warn!("the navigation server did not confirm that the drive is cancelled");
            }
        }
        runtime.shutdown_background();
    }
}

/// Asks a node of the same process, as the topics and queries do, without waiting.
#[derive(Clone)]
pub struct Requester(SyncSender<Inbox>);

/// Too many requests wait, or the node is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("busy: too many requests are waiting; ask again")]
pub struct Busy;

impl Requester {
    /// Hands a goal over, whose pose is published when it is found. Its answer comes to the [`Observer`].
    ///
    /// # Errors
    /// [`Busy`].
    pub fn ask(&self, goal: Goal) -> Result<(), Busy> {
        self.request(Inbox::Goal { goal, origin: Origin::Topic, publish: true, wait: false })
    }

    /// Stops the goal with this id; whichever is in work when it is empty.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn cancel(&self, id: String) -> Result<(), Busy> {
        self.request(Inbox::Cancel { id })
    }

    fn request(&self, request: Inbox) -> Result<(), Busy> {
        self.0.try_send(request).map_err(|_| Busy)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shut_down();
    }
}
