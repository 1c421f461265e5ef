//! The node: threads and Zenoh around the pure parts.
//!
//! ```text
//! subscribers (bounded queues) ─► senses thread ─ ringbuf ─► agent thread ─► publishers, replies, recording
//! goals, cancels, queries (tokio tasks) ───────── channel ──►    │    ▲
//!                                                                ▼    │ drafts, answers
//!                                                           mind thread (denoiser)
//! ```
//!
//! With `[navigate] action` a task drives by nav2's action ([`crate::navigate`]); its news goes to the agent's thread.
//!
//! Invariant: the senses thread never waits for the mind: they share only the context memory, whose lock
//! is held while a latent is copied. Every queue is bounded; what is dropped is counted and reported.

use crate::agent::{Action, Agent, AgentCounts, Event, Ticket};
use crate::config::{RobotConfig, Topics};
use crate::context::{ContextCounts, GroupEncoder};
use crate::ground::{Grounded, Mind, Stage, ground};
use crate::image::{ModelCamera, RgbImage};
use crate::imagine::{Clock, Flow};
use crate::navigate::{Command, Drive, DriveState, Navigator, NavigatorSettings};
use crate::planar::Pose2;
use crate::profile::Profile;
use crate::record::RecordSender;
use crate::senses::{Seen, Sense, SenseFaults, Senses, Took};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::clock;
use mindseye_bridge::geometry::Covariance6;
use mindseye_bridge::goal::Goal;
use mindseye_bridge::msg::{
    self, CameraInfo, CompressedImage, Cov36, Detection2D, Detection2DArray, DiagnosticArray,
    DiagnosticStatus, Header, Image, KeyValue, Odometry, Pose, PoseStamped, PoseWithCovariance,
    PoseWithCovarianceStamped, RosType, StringMsg, TFMessage,
};
use mindseye_bridge::ros::{
    JsonRequest, Publisher, Qos, QueuePolicy, RawSubscriber, RosError, RosSession, Subscriber,
    SubscriberCounts,
};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use ringbuf::HeapRb;
use ringbuf::traits::{Consumer, Producer, Split};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Raw images that wait for the senses.
const IMAGES_WAITING: usize = 16;
/// Odometry and tf messages that wait for the senses.
const POSES_WAITING: usize = 512;
/// Events from the senses that wait for the agent.
const EVENTS_WAITING: usize = 256;
/// Requests that wait for the agent.
const REQUESTS_WAITING: usize = 64;
/// News of a drive that wait for the agent, which looks every few milliseconds.
const DRIVES_WAITING: usize = 256;
/// Queries that wait for a robot to arrive; more are answered at once.
const ARRIVALS_WAITING: usize = 64;
/// A drive is cancelled within this when the node stops.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// The process's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> TimeDelta {
        clock::monotonic()
    }
}

/// What someone in the same process may want to see of a goal in work.
#[derive(Clone, Debug)]
pub enum Note {
    /// A goal was begun.
    Begun {
        /// The client's id.
        id: String,
        /// What is wanted, for a person.
        wish: String,
    },
    /// A stage came to its end, or a step was done: done, of.
    Stage(&'static str, usize, usize),
    /// The worker's evidence; the answer follows.
    Evidence(Box<Grounded>),
    /// The answer.
    Answered(Box<Answer>),
}

/// Gets the notes; must not block.
pub type Observer = Box<dyn Fn(Note) + Send + Sync>;

/// Who asked.
enum Origin {
    Topic,
    Query(JsonRequest),
}

enum Inbox {
    Goal { goal: Goal, origin: Origin, publish: bool, wait: bool },
    Bad { id: String, reason: String, origin: Origin },
    Cancel { id: String },
    Status(JsonRequest),
    Draft { ticket: Ticket, answer: Box<Answer> },
    Done { ticket: Ticket, grounded: Option<Box<Grounded>> },
    Stop,
}

struct Job {
    ticket: Ticket,
    goal: Box<Goal>,
    until: TimeDelta,
}

/// Figures that the threads share.
#[derive(Default)]
struct Figures {
    context: Mutex<ContextCounts>,
    profile: Mutex<Profile>,
    /// The senses' own, copied over now and then: nobody waits for a lock while a frame is encoded.
    senses_profile: Mutex<Profile>,
    camera: Mutex<SubscriberCounts>,
    poses_dropped: AtomicU64,
    events_dropped: AtomicU64,
    bad_messages: AtomicU64,
    ignored_frames: AtomicU64,
    segments: Mutex<String>,
    /// What is wrong with the senses.
    faults: Mutex<SenseFaults>,
}

impl Figures {
    fn profile(&self) -> Profile {
        let mut all = lock(&self.profile).clone();
        all.absorb(&lock(&self.senses_profile));
        all
    }
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
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
    seen: Seen,
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
    /// The system gave no thread.
    #[error("cannot start the {0} thread: {1}")]
    Thread(&'static str, std::io::Error),
}

struct Inputs {
    image: Option<RawSubscriber>,
    compressed: Option<RawSubscriber>,
    others: Vec<(Sense, RawSubscriber)>,
}

struct Outputs {
    goal_pose: Option<Publisher<PoseStamped>>,
    target: Option<Publisher<PoseWithCovarianceStamped>>,
    path: Option<Publisher<msg::Path>>,
    detection: Option<Publisher<Detection2DArray>>,
    imagination: Option<Publisher<CompressedImage>>,
    status: Option<Publisher<StringMsg>>,
    diagnostics: Option<Publisher<DiagnosticArray>>,
    record: Option<RecordSender>,
}

impl Outputs {
    fn send<T: RosType>(&self, publisher: Option<&Publisher<T>>, message: &T) {
        let Some(publisher) = publisher else { return };
        let topic = publisher.raw().topic();
        if let Err(error) = publisher.publish(message) {
            tracing::warn!(topic, %error, "not published");
        }
        if let Some(record) = &self.record {
            record.message(topic, clock::now().as_nanos(), message);
        }
    }
}

impl Node {
    /// Declares topics and queryables on `session` and starts the threads.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn start(session: &RosSession, parts: NodeParts) -> Result<Self, NodeError> {
        let NodeParts { config, mind, encoder, record, observer } = parts;
        let observer: Arc<Observer> = Arc::new(observer.unwrap_or_else(|| Box::new(|_| ())));
        let inputs = inputs(session, &config)?;
        let outputs = outputs(session, &config, record.clone())?;
        let asked = record.clone();
        let (drives_in, drives_out) = sync_channel::<(Ticket, Drive)>(DRIVES_WAITING);
        let navigator = navigator(session, &config, drives_in)?;
        let (navigator, commands) = navigator.unzip();
        let text = subscribe::<StringMsg>(session, &config.topics.goal_text)?;
        let waypoints = subscribe::<msg::Path>(session, &config.topics.goal_waypoints)?;
        let cancel = subscribe::<StringMsg>(session, &config.topics.goal_cancel)?;
        let queryables = [
            session.json_queryable(&format!("mindseye/{}/ground", config.robot))?,
            session.json_queryable(&format!("mindseye/{}/navigate", config.robot))?,
            session.json_queryable(&format!("mindseye/{}/status", config.robot))?,
            session.json_queryable(&format!("mindseye/{}/cancel", config.robot))?,
        ];

        let camera: ModelCamera = mind.spec().camera;
        let senses = Senses::new(config.senses(mind.spec().frame_period), camera, encoder);
        let seen = senses.seen();
        let figures = Arc::new(Figures::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (inbox, requests) = sync_channel(REQUESTS_WAITING);
        let (events_in, events_out) = HeapRb::<Event>::new(EVENTS_WAITING).split();
        let (jobs_in, jobs_out) = sync_channel::<Job>(4);
        let wanted = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let mut spawn = |name: &'static str, body: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(body);
            threads.push(thread.map_err(|e| NodeError::Thread(name, e))?);
            Ok::<(), NodeError>(())
        };

        let (s, f) = (stop.clone(), figures.clone());
        let mut pump = SensesPump {
            senses,
            inputs,
            events: events_in,
            figures: f,
            record,
            stop: s,
            profile: Profile::default(),
            copied: TimeDelta::ZERO,
        };
        spawn("senses", Box::new(move || pump.run()))?;

        let worker = Worker {
            mind,
            seen: seen.clone(),
            jobs: jobs_out,
            inbox: inbox.clone(),
            wanted: wanted.clone(),
            figures: figures.clone(),
            observer: observer.clone(),
        };
        spawn("mind", Box::new(move || worker.run()))?;

        let agent = AgentLoop {
            agent: Agent::new(config.agent()),
            robot: config.robot.clone(),
            period: Duration::from_millis(config.status_period_ms),
            requests,
            events: events_out,
            jobs: jobs_in,
            wanted,
            outputs,
            commands,
            drives: drives_out,
            drive: None,
            arrivals: HashMap::new(),
            origins: HashMap::new(),
            next_ticket: 1,
            last: None,
            figures: figures.clone(),
            seen: seen.clone(),
            observer,
            stop: stop.clone(),
        };
        spawn("agent", Box::new(move || agent.run()))?;

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("requests")
            .enable_time()
            .build()
            .map_err(|e| NodeError::Thread("requests", e))?;
        let diary = Diary { record: asked, robot: config.robot.clone(), topics: config.topics.clone() };
        listen(&runtime, &inbox, &Arc::new(diary), text, waypoints, cancel, queryables);
        let navigator = navigator.map(|navigator| runtime.spawn(navigator.run()));
        Ok(Self { stop, inbox, threads, runtime: Some(runtime), navigator, figures, seen })
    }

    /// Counts so far.
    pub fn counts(&self) -> NodeCounts {
        let camera = *lock(&self.figures.camera);
        NodeCounts {
            context: *lock(&self.figures.context),
            camera_received: camera.received,
            camera_dropped: camera.dropped + camera.missed,
            latents: self.seen.latents(),
            bad_messages: self.figures.bad_messages.load(Ordering::Relaxed),
        }
    }

    /// Durations per stage so far.
    pub fn profile(&self) -> Profile {
        self.figures.profile()
    }

    /// What the goals can see.
    pub fn seen(&self) -> Seen {
        self.seen.clone()
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

impl Drop for Node {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn inputs(session: &RosSession, config: &RobotConfig) -> Result<Inputs, RosError> {
    let raw = |topic: &str, name: &str, hash: &str, qos: Qos, queue: usize| {
        if topic.is_empty() {
            return Ok(None);
        }
        session.raw_subscriber(topic, name, Some(hash), &qos, QueuePolicy::KeepLast(queue)).map(Some)
    };
    let t = &config.topics;
    let sensor = Qos::SENSOR_DATA;
    let (images, poses) = (IMAGES_WAITING, POSES_WAITING);
    let mut others = Vec::new();
    for (sense, subscriber) in [
        (Sense::TfStatic, raw(&t.tf_static, TFMessage::NAME, TFMessage::HASH, Qos::latched(10), poses)?),
        (Sense::CameraInfo, raw(&t.camera_info, CameraInfo::NAME, CameraInfo::HASH, sensor, images)?),
        (Sense::Odometry, raw(&t.odom, Odometry::NAME, Odometry::HASH, sensor, poses)?),
        (Sense::Tf, raw(&t.tf, TFMessage::NAME, TFMessage::HASH, sensor, poses)?),
    ] {
        others.extend(subscriber.map(|s| (sense, s)));
    }
    Ok(Inputs {
        image: raw(&t.image, Image::NAME, Image::HASH, sensor, images)?,
        compressed: raw(&t.compressed, CompressedImage::NAME, CompressedImage::HASH, sensor, images)?,
        others,
    })
}

fn publish<T: RosType>(
    session: &RosSession,
    topic: &str,
    qos: &Qos,
) -> Result<Option<Publisher<T>>, RosError> {
    if topic.is_empty() { Ok(None) } else { session.publisher(topic, qos).map(Some) }
}

fn subscribe<T: RosType>(session: &RosSession, topic: &str) -> Result<Option<Subscriber<T>>, RosError> {
    if topic.is_empty() {
        return Ok(None);
    }
    session.subscriber(topic, &Qos::default(), QueuePolicy::KeepLast(16)).map(Some)
}

fn outputs(
    session: &RosSession,
    config: &RobotConfig,
    record: Option<RecordSender>,
) -> Result<Outputs, RosError> {
    let t = &config.topics;
    let qos = Qos::default();
    Ok(Outputs {
        goal_pose: publish(session, &t.goal_pose, &qos)?,
        target: publish(session, &t.target, &qos)?,
        path: publish(session, &t.path, &qos)?,
        detection: publish(session, &t.detection, &qos)?,
        imagination: publish(session, &t.imagination, &qos)?,
        status: publish(session, &t.status, &qos)?,
        diagnostics: publish(session, &t.diagnostics, &qos)?,
        record,
    })
}

/// The navigator and the way to command it, where one is configured.
fn navigator(
    session: &RosSession,
    config: &RobotConfig,
    drives: SyncSender<(Ticket, Drive)>,
) -> Result<Option<(Navigator, tokio::sync::mpsc::Sender<Command>)>, RosError> {
    let table = &config.navigate;
    if table.action.is_empty() {
        return Ok(None);
    }
    let millis = |ms: i64| TimeDelta::from_millis(ms).to_std();
    let settings = NavigatorSettings {
        action: table.action.clone(),
        behavior_tree: table.behavior_tree.clone(),
        accept: millis(table.accept_ms),
        longest: millis(table.longest_ms),
    };
    let report = move |ticket, drive| {
        if drives.try_send((ticket, drive)).is_err() {
            tracing::warn!("news of a drive was dropped");
        }
    };
    Ok(Some(Navigator::new(session.navigate_client(&table.action)?, settings, Box::new(report))))
}

/// The body of a `navigate` query: a goal, and `"wait": true` to be answered when the robot has arrived (or will not).
fn navigate_request(id: &str, body: &[u8]) -> Result<(Goal, bool), String> {
    let mut wait = false;
    let mut body = std::borrow::Cow::Borrowed(body);
    if let Ok(serde_json::Value::Object(mut object)) = serde_json::from_slice(&body)
        && let Some(value) = object.remove("wait")
    {
        wait = value.as_bool().ok_or_else(|| format!("goal wait is {value}; wanted true or false"))?;
        body = serde_json::Value::Object(object).to_string().into_bytes().into();
    }
    Goal::from_json(id, &body).map(|goal| (goal, wait)).map_err(|e| e.to_string())
}

/// Writes requests into the recording, so that it holds the question to every answer.
struct Diary {
    record: Option<RecordSender>,
    robot: String,
    topics: Topics,
}

impl Diary {
    fn topic<T: RosType>(&self, topic: &str, message: &T) {
        if let Some(record) = &self.record {
            record.message(topic, clock::now().as_nanos(), message);
        }
    }

    /// Queries have no topic: their bodies are recorded as text on `/mindseye/<robot>/<kind>/request`.
    fn query(&self, kind: &str, body: &[u8]) {
        if self.record.is_some() {
            let data = String::from_utf8_lossy(body).into_owned();
            self.topic(&format!("/mindseye/{}/{kind}/request", self.robot), &StringMsg { data });
        }
    }
}

/// Hands a request over without blocking the task's thread; a full inbox is a refusal.
fn hand(inbox: &SyncSender<Inbox>, request: Inbox) {
    if let Err(std::sync::mpsc::TrySendError::Full(refused)) = inbox.try_send(request) {
        match refused {
            Inbox::Goal { origin: Origin::Query(query), .. }
            | Inbox::Bad { origin: Origin::Query(query), .. }
            | Inbox::Status(query) => query.refuse("busy: too many requests are waiting; ask again"),
            _ => tracing::warn!("a request was dropped: too many are waiting"),
        }
    }
}

/// Records the messages of a topic and hands them over as requests.
fn relay<T: RosType + Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    inbox: &SyncSender<Inbox>,
    diary: &Arc<Diary>,
    subscriber: Option<Subscriber<T>>,
    topic: &str,
    request: impl Fn(&T) -> Inbox + Send + 'static,
) {
    let Some(subscriber) = subscriber else { return };
    let (inbox, diary, topic) = (inbox.clone(), diary.clone(), topic.to_owned());
    runtime.spawn(async move {
        loop {
            match subscriber.recv().await {
                Ok(received) => {
                    diary.topic(&topic, &received.message);
                    hand(&inbox, request(&received.message));
                }
                Err(RosError::Closed) => break,
                Err(error) => tracing::warn!(%topic, %error, "a request was dropped"),
            }
        }
    });
}

/// The tasks that turn topics and queries into requests.
fn listen(
    runtime: &tokio::runtime::Runtime,
    inbox: &SyncSender<Inbox>,
    diary: &Arc<Diary>,
    text: Option<Subscriber<StringMsg>>,
    waypoints: Option<Subscriber<msg::Path>>,
    cancel: Option<Subscriber<StringMsg>>,
    queryables: [mindseye_bridge::ros::JsonQueryable; 4],
) {
    fn topic_goal(goal: Result<Goal, mindseye_bridge::goal::GoalError>, id: String) -> Inbox {
        match goal {
            Ok(goal) => Inbox::Goal { goal, origin: Origin::Topic, publish: true, wait: false },
            Err(error) => Inbox::Bad { id, reason: error.to_string(), origin: Origin::Topic },
        }
    }
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let fresh = |kind: &str| format!("{kind}-{}", NEXT.fetch_add(1, Ordering::Relaxed));

    let topics = &diary.topics;
    relay(runtime, inbox, diary, text, &topics.goal_text, move |m| {
        let id = fresh("text");
        topic_goal(Goal::text(id.clone(), &m.data), id)
    });
    relay(runtime, inbox, diary, waypoints, &topics.goal_waypoints, move |m| {
        let id = fresh("waypoints");
        topic_goal(Goal::from_path(id.clone(), m), id)
    });
    relay(runtime, inbox, diary, cancel, &topics.goal_cancel, |m| Inbox::Cancel {
        id: m.data.trim().to_owned(),
    });
    let [ground, navigate, status, cancel] = queryables;
    for (queryable, kind, publish) in [(ground, "ground", false), (navigate, "navigate", true)] {
        let (inbox, diary) = (inbox.clone(), diary.clone());
        runtime.spawn(async move {
            while let Some(request) = queryable.recv().await {
                diary.query(kind, request.body());
                let id = fresh(kind);
                let goal = if publish {
                    navigate_request(&id, request.body())
                } else {
                    Goal::from_json(id.clone(), request.body()).map(|g| (g, false)).map_err(|e| e.to_string())
                };
                let origin = Origin::Query(request);
                hand(
                    &inbox,
                    match goal {
                        Ok((goal, wait)) => Inbox::Goal { goal, origin, publish, wait },
                        Err(reason) => Inbox::Bad { id, reason, origin },
                    },
                );
            }
        });
    }
    let to = inbox.clone();
    runtime.spawn(async move {
        while let Some(request) = status.recv().await {
            hand(&to, Inbox::Status(request));
        }
    });
    let (to, diary) = (inbox.clone(), diary.clone());
    runtime.spawn(async move {
        while let Some(request) = cancel.recv().await {
            diary.query("cancel", request.body());
            // The body is the id of a goal; empty stops whatever is in work.
            let id = String::from_utf8_lossy(request.body()).trim().trim_matches('"').to_owned();
            hand(&to, Inbox::Cancel { id });
            if let Err(error) = request.reply("{\"cancel\": \"requested\"}") {
                tracing::debug!(%error, "client is gone");
            }
        }
    });
}

struct SensesPump {
    senses: Senses,
    inputs: Inputs,
    events: ringbuf::HeapProd<Event>,
    figures: Arc<Figures>,
    record: Option<RecordSender>,
    stop: Arc<AtomicBool>,
    profile: Profile,
    copied: TimeDelta,
}

impl SensesPump {
    fn run(&mut self) {
        let mut scratch = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let mut idle = true;
            // Poses before pictures, so that a frame finds the odometry of its own time.
            idle &= !self.drain_others(&mut scratch);
            for sense in [Sense::Image, Sense::Compressed] {
                let Some(sample) = self.camera(sense).and_then(RawSubscriber::try_recv) else { continue };
                idle = false;
                self.take(sense, sample.bytes(&mut scratch), sample.info.received_at);
            }
            self.report();
            if idle {
                // Woken by whichever camera delivers; odometry waits that long at most.
                let waiting = self.inputs.image.as_ref().or(self.inputs.compressed.as_ref());
                let sense = if self.inputs.image.is_some() { Sense::Image } else { Sense::Compressed };
                let sample = match waiting {
                    Some(camera) => camera.recv_timeout(Duration::from_millis(3)),
                    None => {
                        std::thread::sleep(Duration::from_millis(3));
                        None
                    }
                };
                if let Some(sample) = sample {
                    self.drain_others(&mut scratch);
                    self.take(sense, sample.bytes(&mut scratch), sample.info.received_at);
                }
            }
        }
    }

    fn camera(&self, sense: Sense) -> Option<&RawSubscriber> {
        if sense == Sense::Image { self.inputs.image.as_ref() } else { self.inputs.compressed.as_ref() }
    }

    fn drain_others(&mut self, scratch: &mut Vec<u8>) -> bool {
        let mut any = false;
        for i in 0..self.inputs.others.len() {
            let sense = self.inputs.others[i].0;
            while let Some(sample) = self.inputs.others[i].1.try_recv() {
                any = true;
                self.take(sense, sample.bytes(scratch), sample.info.received_at);
            }
        }
        any
    }

    fn take(&mut self, sense: Sense, cdr: &[u8], received_at: Timestamp) {
        let taken = self.senses.take(sense, cdr, received_at, &MonotonicClock, &mut self.profile);
        self.faults();
        if let Some(record) = &self.record {
            self.record(record, sense, cdr);
        }
        match taken {
            Ok(took) => self.tell(&took),
            Err(error) => {
                let before = self.figures.bad_messages.fetch_add(1, Ordering::Relaxed);
                // Broken senders repeat themselves: every power of two is enough.
                if (before + 1).is_power_of_two() {
                    tracing::warn!(%error, times = before + 1, "a message was dropped");
                }
            }
        }
    }

    /// Says what has become wrong with the senses, or right again.
    fn faults(&mut self) {
        let faults = self.senses.faults();
        let before = std::mem::replace(&mut *lock(&self.figures.faults), faults);
        if let Some(motion) = faults.motion.filter(|_| faults.motion != before.motion) {
            tracing::warn!("{motion}");
        }
        if faults.camera != before.camera {
            let reason = faults.camera.map(|fault| fault.to_string());
            match &reason {
                Some(reason) => tracing::warn!("{reason}"),
                None => tracing::info!("the camera is alive again"),
            }
            if self.events.try_push(Event::CameraFault { reason }).is_err() {
                self.figures.events_dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn record(&self, record: &RecordSender, sense: Sense, cdr: &[u8]) {
        let stamp = clock::now().as_nanos();
        let (name, hash) = match sense {
            Sense::Image => (Image::NAME, Image::HASH),
            Sense::Compressed => (CompressedImage::NAME, CompressedImage::HASH),
            Sense::CameraInfo => (CameraInfo::NAME, CameraInfo::HASH),
            Sense::Odometry => (Odometry::NAME, Odometry::HASH),
            Sense::Tf | Sense::TfStatic => (TFMessage::NAME, TFMessage::HASH),
        };
        let topic = match sense {
            Sense::Image | Sense::Compressed => self.camera(sense).map(RawSubscriber::topic),
            _ => self.inputs.others.iter().find(|(s, _)| *s == sense).map(|(_, sub)| sub.topic()),
        };
        if let Some(topic) = topic {
            record.cdr(topic, name, hash, stamp, cdr);
        }
    }

    fn tell(&mut self, took: &Took) {
        let mut send = |event: Event| {
            if self.events.try_push(event).is_err() {
                self.figures.events_dropped.fetch_add(1, Ordering::Relaxed);
            }
        };
        if let Some(segment) = took.segment {
            tracing::info!(reason = %segment, "new segment");
            *lock(&self.figures.segments) = segment.to_string();
            if !segment.keeps_history() {
                send(Event::ContextLost);
            }
        }
        if let Some(eviction) = took.eviction {
            tracing::debug!(%eviction, "latent evicted");
        }
        if took.latent.is_some() {
            send(Event::ContextReady { latents: self.senses.seen().latents() });
        }
        if let Some(captured_at) = took.frame {
            send(Event::Frame { captured_at });
        }
    }

    fn report(&mut self) {
        let now = clock::monotonic();
        if now - self.copied > TimeDelta::from_millis(500) {
            self.copied = now;
            lock(&self.figures.senses_profile).clone_from(&self.profile);
        }
        *lock(&self.figures.context) = self.senses.counts();
        self.figures.ignored_frames.store(self.senses.ignored(), Ordering::Relaxed);
        let mut camera = SubscriberCounts::default();
        for sense in [Sense::Image, Sense::Compressed] {
            if let Some(counts) = self.camera(sense).map(RawSubscriber::counts) {
                camera.received += counts.received;
                camera.dropped += counts.dropped;
                camera.missed += counts.missed;
                camera.wrong_hash += counts.wrong_hash;
            }
        }
        *lock(&self.figures.camera) = camera;
        let poses = self.inputs.others.iter().map(|(_, s)| s.counts().dropped).sum();
        self.figures.poses_dropped.store(poses, Ordering::Relaxed);
    }
}

struct Worker {
    mind: Box<dyn Mind>,
    seen: Seen,
    jobs: Receiver<Job>,
    inbox: SyncSender<Inbox>,
    /// Ticket of the goal that is still wanted; 0 = none.
    wanted: Arc<AtomicU64>,
    figures: Arc<Figures>,
    observer: Arc<Observer>,
}

impl Worker {
    fn run(mut self) {
        while let Ok(job) = self.jobs.recv() {
            if self.wanted.load(Ordering::Relaxed) != job.ticket.0 {
                continue;
            }
            let grounded = self.work(&job);
            if self.inbox.send(Inbox::Done { ticket: job.ticket, grounded }).is_err() {
                break;
            }
        }
    }

    fn work(&mut self, job: &Job) -> Option<Box<Grounded>> {
        let wish = match &job.goal.kind {
            mindseye_bridge::goal::GoalKind::Text(text) => text.clone(),
            mindseye_bridge::goal::GoalKind::Waypoints(poses) => format!("{} waypoints", poses.len()),
        };
        (self.observer)(Note::Begun { id: job.goal.id.clone(), wish });
        let scene = self.seen.scene()?;
        let (wanted, observer, inbox) = (&self.wanted, &self.observer, &self.inbox);
        let mut progress = |stage: Stage<'_>| {
            match stage {
                Stage::Text => observer(Note::Stage("text", 1, 1)),
                Stage::Encode => observer(Note::Stage("encode", 1, 1)),
                Stage::Scan(part, parts) => observer(Note::Stage("look through memory", part, parts)),
                Stage::Draft(answer) => {
                    let draft = Inbox::Draft { ticket: job.ticket, answer: Box::new(answer.clone()) };
                    // A draft is a courtesy; when the inbox is full it is not worth waiting.
                    let _ = inbox.try_send(draft);
                    observer(Note::Stage("first opinion", 1, 1));
                }
                Stage::Step { candidate, candidates, step, steps } => {
                    observer(Note::Stage("imagine", candidate * steps + step, candidates * steps));
                }
                Stage::Decode => observer(Note::Stage("decode", 1, 1)),
                Stage::Lift => observer(Note::Stage("lift", 1, 1)),
            }
            if wanted.load(Ordering::Relaxed) == job.ticket.0 { Flow::Continue } else { Flow::Stop }
        };
        let result =
            ground(self.mind.as_mut(), &scene, &job.goal, &MonotonicClock, Some(job.until), &mut progress);
        let grounded = Box::new(result.ok()?);
        let mut profile = lock(&self.figures.profile);
        for (stage, millis) in &grounded.answer.timings_ms {
            profile.push(stage, *millis);
        }
        for millis in &grounded.step_ms {
            profile.push("denoise_step", *millis);
        }
        drop(profile);
        (self.observer)(Note::Evidence(grounded.clone()));
        Some(grounded)
    }
}

/// A query that is answered when its drive is over.
#[derive(Default)]
struct Arrival {
    held: Option<(JsonRequest, Box<Answer>)>,
}

struct AgentLoop {
    agent: Agent,
    robot: String,
    period: Duration,
    requests: Receiver<Inbox>,
    events: ringbuf::HeapCons<Event>,
    jobs: SyncSender<Job>,
    wanted: Arc<AtomicU64>,
    outputs: Outputs,
    commands: Option<tokio::sync::mpsc::Sender<Command>>,
    drives: Receiver<(Ticket, Drive)>,
    /// The newest drive.
    drive: Option<(Ticket, Drive)>,
    /// Queries that wait for the end of a drive, with their answer.
    arrivals: HashMap<Ticket, Arrival>,
    origins: HashMap<Ticket, Origin>,
    next_ticket: u64,
    last: Option<Box<Answer>>,
    figures: Arc<Figures>,
    seen: Seen,
    observer: Arc<Observer>,
    stop: Arc<AtomicBool>,
}

impl AgentLoop {
    fn run(mut self) {
        let period = TimeDelta::from(self.period);
        let mut status_due = clock::monotonic();
        loop {
            let now = clock::monotonic();
            let tick = self.agent.next_tick().map_or(TimeDelta::MAX, |at| at - now);
            let wait = TimeDelta::from_millis(5).min(tick).to_std();
            let request = match self.requests.recv_timeout(wait) {
                Ok(Inbox::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(request) => Some(request),
                Err(RecvTimeoutError::Timeout) => None,
            };
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            // What the senses saw before the request counts for it.
            while let Some(event) = self.events.try_pop() {
                self.step(event, None);
            }
            while let Ok((ticket, drive)) = self.drives.try_recv() {
                self.drove(ticket, drive);
            }
            match request {
                Some(request) => self.request(request),
                None => self.step(Event::Tick, None),
            }
            if period > TimeDelta::ZERO && clock::monotonic() >= status_due {
                status_due = clock::monotonic() + period;
                self.publish_status();
            }
        }
        self.step(Event::Cancel { id: String::new() }, None);
        self.wanted.store(0, Ordering::Relaxed);
        for (_, arrival) in std::mem::take(&mut self.arrivals) {
            if let Some((query, answer)) = arrival.held {
                let mut drive = Drive::requested(answer.goal_id.clone());
                drive.state = DriveState::Cancelled;
                drive.reason = Some("the runtime stops".into());
                reply(query, &answer, Some(&drive));
            }
        }
    }

    /// News of a drive.
    fn drove(&mut self, ticket: Ticket, drive: Drive) {
        if drive.state.is_over() {
            tracing::info!(goal = drive.goal_id, state = ?drive.state, reason = drive.reason, "drive is over");
            self.step(Event::DriveOver { ticket }, None);
            if let Some((query, answer)) = self.arrivals.remove(&ticket).and_then(|a| a.held) {
                reply(query, &answer, Some(&drive));
            }
        }
        // An older drive's end may come after a newer one's beginning.
        if self.drive.as_ref().is_none_or(|(newest, _)| newest.0 <= ticket.0) {
            let changed = self.drive.as_ref().is_none_or(|(_, last)| last.state != drive.state);
            self.drive = Some((ticket, drive));
            if changed {
                self.publish_status();
            }
        }
    }

    fn request(&mut self, request: Inbox) {
        match request {
            Inbox::Goal { goal, origin, publish, wait } => {
                let ticket = self.ticket(origin);
                if wait && self.commands.is_some() && self.arrivals.len() < ARRIVALS_WAITING {
                    self.arrivals.insert(ticket, Arrival::default());
                }
                self.step(Event::Goal { ticket, goal, publish }, None);
            }
            Inbox::Bad { id, reason, origin } => {
                let ticket = self.ticket(origin);
                self.step(Event::BadGoal { ticket, id, reason }, None);
            }
            Inbox::Cancel { id } => self.step(Event::Cancel { id }, None),
            Inbox::Status(query) => {
                if let Err(error) = query.reply(&self.status().to_string()) {
                    tracing::debug!(%error, "client is gone");
                }
            }
            Inbox::Draft { ticket, answer } => self.step(Event::Draft { ticket, answer }, None),
            Inbox::Done { ticket, grounded } => match grounded {
                Some(grounded) => {
                    let answer = Box::new(grounded.answer.clone());
                    self.step(Event::Done { ticket, answer }, Some(&grounded));
                }
                None => {
                    // Stopped on demand, which was answered then; or the memory was lost meanwhile.
                    let id = self.agent.active().map(|(_, id)| id.to_owned()).unwrap_or_default();
                    let reason = "what was seen got lost meanwhile: the camera's stream began anew";
                    let answer = Box::new(Answer::new(id, Status::Failed, Some(reason.into())));
                    self.step(Event::Done { ticket, answer }, None);
                }
            },
            Inbox::Stop => {}
        }
    }

    fn ticket(&mut self, origin: Origin) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.origins.insert(ticket, origin);
        ticket
    }

    fn step(&mut self, event: Event, evidence: Option<&Grounded>) {
        for action in self.agent.step(event, clock::monotonic()) {
            match action {
                Action::Begin { ticket, goal, until } => {
                    self.wanted.store(ticket.0, Ordering::Relaxed);
                    if self.jobs.try_send(Job { ticket, goal, until }).is_err() {
                        // The mind is still letting go of earlier goals.
                        let reason = "busy: too many goals in a row; ask again".to_owned();
                        let answer = Box::new(Answer::new(String::new(), Status::Failed, Some(reason)));
                        self.step(Event::Done { ticket, answer }, None);
                    }
                }
                Action::Halt { .. } => self.wanted.store(0, Ordering::Relaxed),
                Action::PublishGoal { ticket, answer } => self.publish_goal(ticket, &answer),
                Action::StopDrive { ticket } => self.command(Command::Stop { ticket }),
                Action::Answer { ticket, answer } => {
                    let began = clock::monotonic();
                    if let Some(grounded) = evidence {
                        self.publish_evidence(&answer, grounded);
                    }
                    self.answer(ticket, answer);
                    let took = (clock::monotonic() - began).as_millis_f64();
                    lock(&self.figures.profile).push("publish", took);
                }
            }
        }
    }

    /// By the action where one is configured, else on the topic.
    fn publish_goal(&mut self, ticket: Ticket, answer: &Answer) {
        let Some(pose) = &answer.pose else { return };
        let stamped = PoseStamped {
            header: Header::new(clock::now(), pose.frame.clone()),
            pose: Pose::from_pose2(pose.pose2()),
        };
        if self.commands.is_none() {
            return self.outputs.send(self.outputs.goal_pose.as_ref(), &stamped);
        }
        let goal_id = answer.goal_id.clone();
        self.drive = Some((ticket, Drive::requested(goal_id.clone())));
        self.command(Command::Go { ticket, goal_id, pose: Box::new(stamped) });
    }

    fn command(&mut self, command: Command) {
        let Some(commands) = &self.commands else { return };
        let Err(refused) = commands.try_send(command) else { return };
        let (Command::Go { ticket, .. } | Command::Stop { ticket }) = refused.into_inner();
        // Only a server that answers nothing for long lets commands pile up.
        if let Some((_, drive)) = self.drive.as_ref().filter(|(newest, _)| *newest == ticket) {
            let mut drive = drive.clone();
            drive.state = DriveState::Failed;
            drive.reason = Some("the navigation server is too slow: commands pile up".into());
            self.drove(ticket, drive);
        }
    }

    /// Target with covariance, path, box and imagined frames: what the answer rests on.
    fn publish_evidence(&self, answer: &Answer, grounded: &Grounded) {
        let stamp = answer.stamp_ns.map_or(Timestamp::ZERO, Timestamp);
        if let (Some(pose), Some(covariance)) = (&answer.pose, &answer.covariance) {
            let mut numbers = Covariance6::unknown().0;
            numbers.iter_mut().zip(covariance).for_each(|(to, from)| *to = *from);
            let target = PoseWithCovarianceStamped {
                header: Header::new(stamp, pose.frame.clone()),
                pose: PoseWithCovariance { pose: Pose::from_pose2(pose.pose2()), covariance: Cov36(numbers) },
            };
            self.outputs.send(self.outputs.target.as_ref(), &target);
            let path = path_message(stamp, &pose.frame, &grounded.path);
            self.outputs.send(self.outputs.path.as_ref(), &path);
        }
        if let Some(found) = grounded.found_box {
            let [x0, y0, x1, y1] = found.edges();
            let mut detection =
                Detection2D { header: Header::new(stamp, "imagined_camera"), ..Detection2D::default() };
            detection.bbox.center.position.x = (x0 + x1) / 2.0;
            detection.bbox.center.position.y = (y0 + y1) / 2.0;
            detection.bbox.size_x = x1 - x0;
            detection.bbox.size_y = y1 - y0;
            let message = Detection2DArray { header: detection.header.clone(), detections: vec![detection] };
            self.outputs.send(self.outputs.detection.as_ref(), &message);
        }
        if let Some(strip) = strip(&grounded.frames)
            && let Ok(data) = strip.to_png()
        {
            let message =
                CompressedImage { header: Header::new(stamp, "imagined_camera"), format: "png".into(), data };
            self.outputs.send(self.outputs.imagination.as_ref(), &message);
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Box<Answer>) {
        match answer.status {
            Status::Found => tracing::info!(goal = answer.goal_id, "found"),
            status => tracing::info!(goal = answer.goal_id, %status, reason = answer.reason, "answered"),
        }
        let drive = self.drive.as_ref().filter(|(newest, _)| *newest == ticket).map(|(_, drive)| drive);
        let under_way = drive.is_some_and(|drive| !drive.state.is_over());
        let wants_arrival = self.arrivals.contains_key(&ticket);
        if let Some(Origin::Query(query)) = self.origins.remove(&ticket) {
            match self.arrivals.get_mut(&ticket) {
                Some(arrival) if under_way => arrival.held = Some((query, answer.clone())),
                _ => reply(query, &answer, drive),
            }
        }
        if wants_arrival && !under_way {
            self.arrivals.remove(&ticket);
        }
        (self.observer)(Note::Answered(answer.clone()));
        self.last = Some(answer);
        self.publish_status();
    }

    fn status(&self) -> serde_json::Value {
        let counts: AgentCounts = self.agent.counts();
        let camera = *lock(&self.figures.camera);
        let age = self.agent.frame_age(clock::monotonic());
        serde_json::json!({
            "robot": self.robot,
            "goal": self.agent.active().map(|(_, id)| id),
            "last_answer": self.last,
            "drive": self.drive.as_ref().map(|(_, drive)| drive),
            "goals": counts,
            "frames": {
                "age_ms": age.map(|a| a.as_millis_f64()),
                "received": camera.received,
                "dropped": camera.dropped,
                "missed": camera.missed,
                "wrong_type": camera.wrong_hash,
                "ignored": self.figures.ignored_frames.load(Ordering::Relaxed),
                "bad_messages": self.figures.bad_messages.load(Ordering::Relaxed),
                "poses_dropped": self.figures.poses_dropped.load(Ordering::Relaxed),
                "events_dropped": self.figures.events_dropped.load(Ordering::Relaxed),
            },
            "faults": lock(&self.figures.faults).sentences(),
            "context": {
                "latents": self.seen.latents(),
                "evicted": self.seen.evicted(),
                "frames": *lock(&self.figures.context),
                "segment": *lock(&self.figures.segments),
            },
            "recording_dropped": self.outputs.record.as_ref().map(RecordSender::dropped),
            "stages_ms": self.figures.profile().summary(),
        })
    }

    fn publish_status(&self) {
        let status = self.status();
        self.outputs.send(self.outputs.status.as_ref(), &StringMsg { data: status.to_string() });
        let faults = lock(&self.figures.faults).sentences();
        let (level, message) = match self.agent.frame_age(clock::monotonic()) {
            None => (1, "no camera frame yet".to_owned()),
            Some(age) if age > TimeDelta::from_millis(1000) => {
                (1, format!("the newest camera frame came {:.1} s ago", age.as_secs_f64()))
            }
            Some(_) if !faults.is_empty() => (1, faults.join("; ")),
            Some(_) => (0, "ok".to_owned()),
        };
        let value = |key: &str, value: String| KeyValue { key: key.into(), value };
        let camera = *lock(&self.figures.camera);
        let diagnostics = DiagnosticArray {
            header: Header::new(clock::now(), ""),
            status: vec![DiagnosticStatus {
                level,
                name: format!("mindseye: {}", self.robot),
                message,
                hardware_id: self.robot.clone(),
                values: vec![
                    value("latents", self.seen.latents().to_string()),
                    value("frames received", camera.received.to_string()),
                    value("frames dropped", (camera.dropped + camera.missed).to_string()),
                    value("goals", self.agent.counts().goals.to_string()),
                    value("answers", self.agent.counts().answers.to_string()),
                ],
            }],
        };
        self.outputs.send(self.outputs.diagnostics.as_ref(), &diagnostics);
    }
}

/// Answers a query: the answer, and where the drive to it stands.
fn reply(query: JsonRequest, answer: &Answer, drive: Option<&Drive>) {
    let text = match drive {
        None => answer.to_json(),
        Some(drive) => match (serde_json::to_value(answer), serde_json::to_value(drive)) {
            (Ok(serde_json::Value::Object(mut document)), Ok(drive)) => {
                document.insert("drive".into(), drive);
                serde_json::Value::Object(document).to_string()
            }
            _ => answer.to_json(),
        },
    };
    if let Err(error) = query.reply(&text) {
        tracing::debug!(%error, "client is gone before its answer");
    }
}

/// A path of planar poses as a message.
pub fn path_message(stamp: Timestamp, frame: &str, poses: &[Pose2]) -> msg::Path {
    let header = Header::new(stamp, frame);
    let poses =
        poses.iter().map(|p| PoseStamped { header: header.clone(), pose: Pose::from_pose2(*p) }).collect();
    msg::Path { header, poses }
}

/// The last frame of each imagined latent side by side, enlarged to be readable.
pub fn strip(frames: &[RgbImage]) -> Option<RgbImage> {
    let shown: Vec<&RgbImage> = frames.iter().skip(3).step_by(4).collect();
    let first = shown.first()?;
    let scale = (160 / first.width.max(1)).max(1);
    let (w, h) = (first.width * scale, first.height * scale);
    let mut out = RgbImage::filled(w * shown.len() + 4 * (shown.len() - 1), h, [20, 20, 24]);
    for (i, frame) in shown.iter().enumerate() {
        out.paste_scaled(frame, i * (w + 4), 0, scale);
    }
    Some(out)
}
