//! The ROS graph, read from liveliness tokens: nodes, topics, their types and hashes.

use super::RosError;
use super::keys::{EndpointKind, TOKEN_PREFIX, Token, TokenEndpoint, gid_of};
use super::lock;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::sample::SampleKind;

/// Most tokens kept.
const MAX_TOKENS: usize = 65_536;

/// A node of the graph.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeName {
    /// `/` for the root.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// One endpoint of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    /// Its token.
    pub token: Token,
    /// Its GID, as in attachments.
    pub gid: [u8; 16],
}

/// A topic (or service) of the graph with one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicInfo {
    /// Fully qualified name.
    pub name: String,
    /// `pkg/msg/Name`.
    pub type_name: String,
    /// Type hash.
    pub hash: String,
    /// Publishers (servers of a service).
    pub publishers: usize,
    /// Subscriptions (clients of a service).
    pub subscriptions: usize,
}

/// A live picture of the graph.
pub struct Graph {
    inner: Arc<Inner>,
    _subscriber: zenoh::pubsub::Subscriber<()>,
}

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    tokens: BTreeMap<String, Token>,
    watched: Vec<Weak<Presence>>,
}

impl Graph {
    pub(super) fn watch(session: &zenoh::Session, domain: u32) -> Result<Self, RosError> {
        let inner = Arc::new(Inner { state: Mutex::default(), changed: Condvar::new() });
        let taker = inner.clone();
        let subscriber = session
            .liveliness()
            .declare_subscriber(format!("{TOKEN_PREFIX}/{domain}/**"))
            .history(true)
            .callback(move |sample| taker.take(sample.key_expr().as_str(), sample.kind()))
            .wait()
            .map_err(RosError::zenoh("watch the ROS graph"))?;
        Ok(Self { inner, _subscriber: subscriber })
    }

    /// Every endpoint now, by token key.
    #[must_use]
    pub fn entities(&self) -> Vec<Entity> {
        let state = lock(&self.inner.state);
        state.tokens.iter().map(|(key, t)| Entity { token: t.clone(), gid: gid_of(key) }).collect()
    }

    /// Nodes, sorted.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeName> {
        let names: BTreeSet<NodeName> = lock(&self.inner.state)
            .tokens
            .values()
            .filter(|t| t.kind == EndpointKind::Node)
            .map(|t| NodeName { namespace: t.namespace.clone(), name: t.node.clone() })
            .collect();
        names.into_iter().collect()
    }

    /// Topics by name, one row for each type and hash in use; `services()` likewise.
    #[must_use]
    pub fn topics(&self) -> Vec<TopicInfo> {
        self.rows(EndpointKind::Publisher, EndpointKind::Subscription)
    }

    /// Services by name.
    #[must_use]
    pub fn services(&self) -> Vec<TopicInfo> {
        self.rows(EndpointKind::Service, EndpointKind::Client)
    }

    fn rows(&self, give: EndpointKind, take: EndpointKind) -> Vec<TopicInfo> {
        let mut rows: BTreeMap<(String, String, String), (usize, usize)> = BTreeMap::new();
        for t in lock(&self.inner.state).tokens.values().filter(|t| t.kind == give || t.kind == take) {
            if let Some(e) = &t.endpoint {
                let row = rows.entry((e.topic.clone(), e.type_name.clone(), e.hash.clone())).or_default();
                if t.kind == give {
                    row.0 += 1;
                } else {
                    row.1 += 1;
                }
            }
        }
        rows.into_iter()
            .map(|((name, type_name, hash), (publishers, subscriptions))| TopicInfo {
                name,
                type_name,
                hash,
                publishers,
                subscriptions,
            })
            .collect()
    }

    /// What is published on a topic.
    #[must_use]
    pub fn publishers_of(&self, topic: &str) -> Vec<TokenEndpoint> {
        let state = lock(&self.inner.state);
        state
            .tokens
            .values()
            .filter(|t| t.kind == EndpointKind::Publisher)
            .filter_map(|t| t.endpoint.clone())
            .filter(|e| e.topic == topic)
            .collect()
    }

    /// Waits until `done` says so of the graph; gives its last answer.
    #[must_use]
    pub fn wait_until(&self, timeout: Duration, mut done: impl FnMut(&Self) -> bool) -> bool {
        let until = Instant::now() + timeout;
        loop {
            if done(self) {
                return true;
            }
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                return false;
            };
            let state = lock(&self.inner.state);
            // Bounded, because a change between the look and the wait would otherwise be slept through.
            drop(self.inner.changed.wait_timeout(state, left.min(Duration::from_millis(20))));
        }
    }

    /// Follows the publishers of a topic.
    pub(super) fn presence(&self, topic: &str) -> Arc<Presence> {
        let presence = Arc::new(Presence { topic: topic.to_owned(), ..Presence::default() });
        let mut state = lock(&self.inner.state);
        let now = state.tokens.values().filter(|t| presence.matches(t)).count();
        presence.count.store(now, Ordering::Relaxed);
        state.watched.retain(|w| w.strong_count() > 0);
        state.watched.push(Arc::downgrade(&presence));
        presence
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph({} tokens)", lock(&self.inner.state).tokens.len())
    }
}

impl Inner {
    fn take(&self, key: &str, kind: SampleKind) {
        let Some(token) = Token::parse(key) else {
            tracing::debug!(key, "liveliness token does not parse: ignored");
            return;
        };
        let mut state = lock(&self.state);
        let change = match kind {
            SampleKind::Put if state.tokens.len() >= MAX_TOKENS => false,
            SampleKind::Put => state.tokens.insert(key.to_owned(), token.clone()).is_none(),
            SampleKind::Delete => state.tokens.remove(key).is_some(),
        };
        if !change {
            return;
        }
        for watched in state.watched.iter().filter_map(Weak::upgrade) {
            if watched.matches(&token) {
                watched.change(kind);
            }
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// The publishers of one topic, followed; their loss and return are logged once.
#[derive(Debug, Default)]
pub(super) struct Presence {
    topic: String,
    count: AtomicUsize,
    losses: AtomicU64,
    returns: AtomicU64,
}

impl Presence {
    fn matches(&self, t: &Token) -> bool {
        t.kind == EndpointKind::Publisher && t.endpoint.as_ref().is_some_and(|e| e.topic == self.topic)
    }

    // Called under the graph's lock: one at a time.
    fn change(&self, kind: SampleKind) {
        match kind {
            SampleKind::Put => {
                let before = self.count.fetch_add(1, Ordering::Relaxed);
                if before == 0 && self.losses.load(Ordering::Relaxed) > self.returns.load(Ordering::Relaxed) {
                    self.returns.fetch_add(1, Ordering::Relaxed);
                    tracing::info!(topic = self.topic, "a publisher is back");
                }
            }
            SampleKind::Delete => {
                let before = self.count.load(Ordering::Relaxed);
                self.count.store(before.saturating_sub(1), Ordering::Relaxed);
                if before == 1 {
                    self.losses.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(topic = self.topic, "the last publisher is gone");
                }
            }
        }
    }

    pub fn now(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub fn losses(&self) -> (u64, u64) {
        (self.losses.load(Ordering::Relaxed), self.returns.load(Ordering::Relaxed))
    }
}
