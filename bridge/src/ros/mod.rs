//! ROS 2 over Zenoh without ROS: topics, services, actions and the graph as `rmw_zenoh` speaks them; the
//! key styles of `zenoh-bridge-ros2dds` and of plain keys by configuration; JSON queryables for plain
//! clients.
//!
//! Calls that declare or send are synchronous and quick; they may be made from any thread and from tasks
//! of a multi-threaded tokio runtime. What arrives is put, undecoded, into bounded queues by Zenoh's
//! threads and decoded where it is taken out: by [`Subscriber::recv_timeout`] on a thread or
//! [`Subscriber::recv`] in a task.
//!
//! ```no_run
//! use mindseye_bridge::msg::{PoseStamped, StringMsg};
//! use mindseye_bridge::ros::{Qos, QueuePolicy, RosConfig, RosSession};
//! use std::time::Duration;
//! let session = RosSession::open(&RosConfig::robot("agent"))?;
//! let goals = session.publisher::<PoseStamped>("/goal_pose", &Qos::default())?;
//! let asked = session.subscriber::<StringMsg>("/mindseye/goal/text", &Qos::default(), QueuePolicy::Latest)?;
//! if let Some(text) = asked.recv_timeout(Duration::from_secs(1))? {
//!     println!("{}", text.message.data);
//!     goals.publish(&PoseStamped::default())?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod action;
mod claim;
mod config;
mod graph;
mod json;
mod keys;
mod plain;
mod publisher;
mod queue;
mod route;
mod service;
mod session;
mod subscriber;

pub use action::{CancelOutcome, GoalHandle, GoalId, GoalState, NavError, NavResult, NavigateClient};
pub use claim::{Claim, Claimant};
pub use config::{ConfigError, Distro, KeyStyle, Mode, RosConfig, ZenohSettings};
pub use graph::{Entity, Graph, NodeName, TopicInfo};
pub use json::{JsonQueryable, JsonRequest};
pub use keys::{
    Attachment, Durability, EndpointKind, History, KeyError, Qos, Reliability, Token, gid_of, service_key,
    topic_key,
};
pub(crate) use mindseye_base::sync::lock;
pub use plain::{Declared, Question};
pub use publisher::{Publisher, RawPublisher};
pub use queue::QueuePolicy;
pub use service::{PendingReply, ServiceClient, ServiceRequest, ServiceServer};
pub use session::RosSession;
pub use subscriber::{Pieces, RawSample, RawSubscriber, Received, SampleInfo, Subscriber, SubscriberCounts};
pub use zenoh::bytes::ZBytes;

use crate::cdr::CdrError;
use std::time::Duration;

/// What a session, a topic or a service could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RosError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A name is not a valid topic, service or node name.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Zenoh refused; the text is Zenoh's.
    #[error("zenoh could not {what}: {cause}")]
    Zenoh {
        /// What was tried.
        what: String,
        /// Zenoh's own words.
        #[source]
        cause: ZenohCause,
    },
    /// A message does not decode; it was dropped and counted.
    #[error("{topic}: message of {type_name} does not decode: {cause}")]
    Decode {
        /// Where it came from.
        topic: String,
        /// What it should have been.
        type_name: &'static str,
        /// What is wrong.
        #[source]
        cause: CdrError,
    },
    /// Nobody serves this, or cannot be reached.
    #[error("{what}: no server was found within {waited:.1?}; is it running, and its name right?")]
    NoServer {
        /// What was asked.
        what: String,
        /// How long it was looked for.
        waited: Duration,
    },
    /// The question ended without an answer before its time was up: the server went away, or let it go.
    #[error("{what}: the question ended after {after:.1?} without an answer; did the server stop?")]
    Unanswered {
        /// What was asked.
        what: String,
        /// How long that took.
        after: Duration,
    },
    /// Nobody answered in time.
    #[error("{what}: no answer within {waited:.1?}; is the server running and its name right?")]
    Timeout {
        /// What was asked.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The other side answered with an error.
    #[error("{what}: the server refused: {cause}")]
    Refused {
        /// What was asked.
        what: String,
        /// Its words.
        cause: String,
    },
    /// The session was closed.
    #[error("the zenoh session is closed")]
    Closed,
}

impl RosError {
    /// A question that ended without an answer after `after`, of `timeout` that were allowed.
    fn no_reply(what: String, after: Duration, timeout: Duration) -> Self {
        if after >= timeout {
            Self::Timeout { what, waited: after }
        } else {
            Self::Unanswered { what, after }
        }
    }

    pub(crate) fn zenoh(what: impl Into<String>) -> impl FnOnce(zenoh::Error) -> Self {
        let what = what.into();
        move |cause| Self::Zenoh { what, cause: ZenohCause::new(&cause) }
    }
}

/// Zenoh's words on one line, without the places in its source code ("... at /path/file.rs:12.").
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ZenohCause(String);

impl ZenohCause {
    fn new(error: &zenoh::Error) -> Self {
        let mut text = error.to_string().replace('\n', " ");
        while let Some(end) = text.find(".rs:") {
            let digits = text[end + 4..].find(|c: char| !c.is_ascii_digit());
            let after = digits.map_or(text.len(), |n| end + 4 + n);
            let Some(start) = text[..end].rfind(" at ") else { break };
            let after = if text[after..].starts_with('.') { after + 1 } else { after };
            text.replace_range(start..after, "");
        }
        Self(text)
    }
}
