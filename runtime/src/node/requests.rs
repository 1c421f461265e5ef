//! What clients ask, by topics and by queries, and who gets the answers.

use crate::agent::{Drive, Ticket};
use crate::config::{RobotConfig, Topics};
use crate::ground::Grounded;
use crate::planar::Pose2;
use crate::record::RecordSender;
use mindseye_bridge::answer::Answer;
use mindseye_bridge::clock;
use mindseye_bridge::goal::{Goal, GoalError};
use mindseye_bridge::msg::{self, RosType, StringMsg};
use mindseye_bridge::ros::{JsonQueryable, JsonRequest, Qos, QueuePolicy, RosError, RosSession, Subscriber};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};

/// Who asked.
pub(super) enum Origin {
    Topic,
    Query(JsonRequest),
}

/// What waits for the agent.
pub(super) enum Inbox {
    Goal { goal: Goal, origin: Origin, publish: bool, wait: bool },
    Bad { id: String, reason: String, origin: Origin },
    Cancel { id: String },
    Status(JsonRequest),
    Draft { ticket: Ticket, answer: Box<Answer> },
    Done { ticket: Ticket, grounded: Option<Box<Grounded>> },
    Looked { ticket: Ticket, base_from_goal: Option<Pose2> },
    Stop,
}

/// Clients that wait for their answer, by ticket.
#[derive(Default)]
pub(super) struct Clients {
    waiting: HashMap<Ticket, JsonRequest>,
    last_ticket: u64,
}

impl Clients {
    /// A fresh ticket for whoever asked.
    pub fn register(&mut self, origin: Origin) -> Ticket {
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        if let Origin::Query(query) = origin {
            self.waiting.insert(ticket, query);
        }
        ticket
    }

    /// Lets whoever asked go without an answer: another node gives it.
    pub fn leave(&mut self, ticket: Ticket) {
        self.waiting.remove(&ticket);
    }

    /// Answers whoever asked; goals of a topic have nobody to answer.
    pub fn reply(&mut self, ticket: Ticket, answer: &Answer, drive: Option<&Drive>) {
        if let Some(query) = self.waiting.remove(&ticket) {
            reply(query, answer, drive);
        }
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

/// The topics and queryables on which clients ask.
pub(super) struct Questions {
    text: Option<Subscriber<StringMsg>>,
    waypoints: Option<Subscriber<msg::Path>>,
    cancel: Option<Subscriber<StringMsg>>,
    queryables: [JsonQueryable; 4],
}

impl Questions {
    /// Declares them.
    pub fn declare(session: &RosSession, config: &RobotConfig) -> Result<Self, RosError> {
        let queryable = |kind: &str| session.json_queryable(&format!("mindseye/{}/{kind}", config.robot));
        Ok(Self {
            text: subscribe(session, &config.topics.goal_text)?,
            waypoints: subscribe(session, &config.topics.goal_waypoints)?,
            cancel: subscribe(session, &config.topics.goal_cancel)?,
            queryables: [
                queryable("ground")?,
                queryable("navigate")?,
                queryable("status")?,
                queryable("cancel")?,
            ],
        })
    }
}

fn subscribe<T: RosType>(session: &RosSession, topic: &str) -> Result<Option<Subscriber<T>>, RosError> {
    if topic.is_empty() {
        return Ok(None);
    }
    session.subscriber(topic, &Qos::default(), QueuePolicy::KeepLast(16)).map(Some)
}

/// The runtime of the tasks that take requests.
pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("requests")
        .enable_time()
        .build()
}

/// Why a query is no goal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum RequestError {
    /// The goal itself.
    #[error(transparent)]
    Goal(#[from] GoalError),
    /// `wait` is neither true nor false.
    #[error("goal wait is {got}; wanted true or false")]
    Wait { got: serde_json::Value },
}

/// The body of a `navigate` query: a goal, and `"wait": true` to be answered when the robot has arrived (or will not).
fn navigate_request(id: &str, body: &[u8]) -> Result<(Goal, bool), RequestError> {
    let mut wait = false;
    let mut body = std::borrow::Cow::Borrowed(body);
    if let Ok(serde_json::Value::Object(mut object)) = serde_json::from_slice(&body)
        && let Some(value) = object.remove("wait")
    {
        wait = value.as_bool().ok_or(RequestError::Wait { got: value })?;
        body = serde_json::Value::Object(object).to_string().into_bytes().into();
    }
    Ok((Goal::from_json(id, &body)?, wait))
}

/// Writes requests into the recording, so that it holds the question to every answer.
pub(super) struct Diary {
    record: Option<RecordSender>,
    robot: String,
    topics: Topics,
}

impl Diary {
    /// A diary of this robot's requests.
    pub fn new(config: &RobotConfig, record: Option<RecordSender>) -> Self {
        Self { record, robot: config.robot.clone(), topics: config.topics.clone() }
    }

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
    if let Err(TrySendError::Full(refused)) = inbox.try_send(request) {
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
pub(super) fn listen(
    runtime: &tokio::runtime::Runtime,
    inbox: &SyncSender<Inbox>,
    diary: &Arc<Diary>,
    questions: Questions,
) {
    let Questions { text, waypoints, cancel, queryables } = questions;
    fn topic_goal(goal: Result<Goal, GoalError>, id: String) -> Inbox {
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
                    Goal::from_json(id.clone(), request.body()).map(|goal| (goal, false)).map_err(Into::into)
                };
                let origin = Origin::Query(request);
                hand(
                    &inbox,
                    match goal {
                        Ok((goal, wait)) => Inbox::Goal { goal, origin, publish, wait },
                        Err(error) => Inbox::Bad { id, reason: error.to_string(), origin },
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
