//! One Zenoh session with ROS nodes on it. What is declared on it (publishers, subscribers, services, queryables)
//! stands in their own files and adds its methods to [`RosSession`]; the session knows none of them.

use super::RosError;
use super::config::{Distro, KeyStyle, RosConfig};
use super::graph::Graph;
use super::keys::{self, EndpointKind, Qos, Token, TokenEndpoint, check_name, gid_of};
use super::lock;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use zenoh::Wait;
use zenoh::liveliness::LivelinessToken;
use zenoh::sample::SampleKind;

/// A node in the ROS graph over a Zenoh session. Cheap to clone; the session closes with the last clone
/// and the last endpoint. Zenoh reconnects by itself; the loss and the return of the last link are logged
/// once each and counted.
#[derive(Clone)]
pub struct RosSession {
    pub(super) shared: Arc<Shared>,
    node: Arc<Node>,
}

pub(super) struct Shared {
    pub zenoh: zenoh::Session,
    pub domain: u32,
    pub style: KeyStyle,
    pub distro: Distro,
    zid: String,
    next_id: AtomicU32,
    graph: Option<Graph>,
    links: Arc<Links>,
    closed: AtomicBool,
}

struct Node {
    name: String,
    namespace: String,
    nid: u32,
    _token: Option<LivelinessToken>,
}

#[derive(Default)]
struct Links {
    /// The session has no address to connect to: others come and go as they like.
    only_listens: bool,
    open: Mutex<BTreeSet<String>>,
    losses: AtomicU64,
    returns: AtomicU64,
}

impl Links {
    fn event(&self, kind: SampleKind, peer: String) {
        let mut open = lock(&self.open);
        match kind {
            SampleKind::Put => {
                let first = open.is_empty();
                open.insert(peer);
                if first && self.losses.load(Ordering::Relaxed) > self.returns.load(Ordering::Relaxed) {
                    self.returns.fetch_add(1, Ordering::Relaxed);
                    if !self.only_listens {
                        tracing::info!("zenoh link is back");
                    }
                }
            }
            SampleKind::Delete => {
                if open.remove(&peer) && open.is_empty() {
                    self.losses.fetch_add(1, Ordering::Relaxed);
                    if self.only_listens {
                        tracing::debug!("the last zenoh peer has left; listening on");
                    } else {
                        tracing::warn!("the last zenoh link is lost; connecting again in the background");
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for RosSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RosSession({} on {})", self.node.name, self.shared.zid)
    }
}

impl RosSession {
    /// Opens a Zenoh session and puts a node on it.
    ///
    /// # Errors
    /// [`RosError::Config`] for a wrong setting, [`RosError::Zenoh`] when a port is taken or a router that
    /// must be there is not.
    pub fn open(config: &RosConfig) -> Result<Self, RosError> {
        let zenoh = config.to_zenoh()?;
        // As JSON: a list, or one list per mode (router, peer, client).
        let addresses = zenoh.get_json("connect/endpoints").unwrap_or_default();
        let only_listens = !addresses.contains('/');
        let session = zenoh::open(zenoh).wait().map_err(RosError::zenoh(format!(
            "open a session (connect {:?}, listen {:?})",
            config.zenoh.connect.as_deref().unwrap_or_default(),
            config.zenoh.listen.as_deref().unwrap_or_default()
        )))?;
        Self::watched(session, config, only_listens)
    }

    /// Puts a node on a session that is already open; its timestamping must be on where transient-local
    /// topics are published.
    ///
    /// # Errors
    /// [`RosError::Key`] for a wrong name, [`RosError::Zenoh`].
    pub fn on(session: zenoh::Session, config: &RosConfig) -> Result<Self, RosError> {
        Self::watched(session, config, false)
    }

    fn watched(session: zenoh::Session, config: &RosConfig, only_listens: bool) -> Result<Self, RosError> {
        let graph = match config.key_style {
            KeyStyle::RmwZenoh => Some(Graph::watch(&session, config.domain_id)?),
            KeyStyle::Ros2Dds | KeyStyle::Raw => None,
        };
        let links = Arc::new(Links { only_listens, ..Links::default() });
        let watched = links.clone();
        session
            .info()
            .transport_events_listener()
            .history(true)
            .callback(move |event| {
                let transport = event.transport();
                // Clients call; nobody connects to them again.
                if transport.whatami() != zenoh::config::WhatAmI::Client {
                    watched.event(event.kind(), transport.zid().to_string());
                }
            })
            .background()
            .wait()
            .map_err(RosError::zenoh("watch its links"))?;
        let shared = Arc::new(Shared {
            zid: session.zid().to_string(),
            domain: config.domain_id,
            style: config.key_style,
            distro: config.distro,
            zenoh: session,
            next_id: AtomicU32::new(0),
            graph,
            links,
            closed: AtomicBool::new(false),
        });
        Self::node_on(shared, &config.node, &config.namespace)
    }

    /// Another node on the same session.
    ///
    /// # Errors
    /// As [`RosSession::on`].
    pub fn another_node(&self, name: &str, namespace: &str) -> Result<Self, RosError> {
        Self::node_on(self.shared.clone(), name, namespace)
    }

    fn node_on(shared: Arc<Shared>, name: &str, namespace: &str) -> Result<Self, RosError> {
        let name = check_name("node", name, KeyStyle::RmwZenoh)?[1..].to_owned();
        if name.contains('/') {
            let cause = "must not contain /; use the namespace";
            return Err(keys::KeyError { what: "node", name, cause }.into());
        }
        let namespace = match namespace.trim_matches('/') {
            "" => "/".to_owned(),
            inner => check_name("namespace", inner, KeyStyle::RmwZenoh)?,
        };
        let nid = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut node = Node { name, namespace, nid, _token: None };
        if shared.style == KeyStyle::RmwZenoh {
            let token = shared.token(&node, nid, EndpointKind::Node, None);
            node._token = Some(shared.declare_token(&token)?);
        }
        Ok(Self { shared, node: Arc::new(node) })
    }

    /// The Zenoh session underneath.
    #[must_use]
    pub fn zenoh(&self) -> &zenoh::Session {
        &self.shared.zenoh
    }

    /// How topics become keys.
    #[must_use]
    pub fn key_style(&self) -> KeyStyle {
        self.shared.style
    }

    /// The session's id as in tokens.
    #[must_use]
    pub fn zid(&self) -> &str {
        &self.shared.zid
    }

    /// The ROS graph as far as tokens tell it; `None` in styles without tokens.
    #[must_use]
    pub fn graph(&self) -> Option<&Graph> {
        self.shared.graph.as_ref()
    }

    /// Open links to routers and peers.
    #[must_use]
    pub fn links(&self) -> usize {
        lock(&self.shared.links.open).len()
    }

    /// How often the last link was lost, and came back.
    #[must_use]
    pub fn link_losses(&self) -> (u64, u64) {
        let l = &self.shared.links;
        (l.losses.load(Ordering::Relaxed), l.returns.load(Ordering::Relaxed))
    }

    /// The fully qualified name of a topic: relative names are put into the node's namespace.
    #[must_use]
    pub fn resolve(&self, name: &str) -> String {
        match (name.strip_prefix('/'), self.node.namespace.as_str()) {
            (Some(_), _) => name.to_owned(),
            (None, "/") => format!("/{name}"),
            (None, namespace) => format!("{namespace}/{name}"),
        }
    }

    /// Closes the session: every endpoint ends, waiting consumers wake up.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn close(&self) -> Result<(), RosError> {
        if self.shared.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.shared.zenoh.close().wait().map_err(RosError::zenoh("close the session"))
    }

    /// Names an endpoint and declares its token. Gives the GID, which is stable without a token as well.
    pub(super) fn endpoint(
        &self,
        kind: EndpointKind,
        topic: &str,
        type_name: &str,
        hash: &str,
        qos: Qos,
    ) -> Result<(Option<LivelinessToken>, [u8; 16]), RosError> {
        let eid = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let endpoint = TokenEndpoint {
            topic: topic.to_owned(),
            type_name: type_name.to_owned(),
            hash: self.shared.distro.hash(hash).to_owned(),
            qos: Some(qos),
            backends: None,
        };
        let token = self.shared.token(&self.node, eid, kind, Some(endpoint));
        let gid = gid_of(&token.key());
        let declared = match self.shared.style {
            KeyStyle::RmwZenoh => Some(self.shared.declare_token(&token)?),
            KeyStyle::Ros2Dds | KeyStyle::Raw => None,
        };
        Ok((declared, gid))
    }

    pub(super) fn topic_key(&self, topic: &str, type_name: &str, hash: &str) -> Result<String, RosError> {
        let s = &self.shared;
        Ok(keys::topic_key(s.style, s.distro, s.domain, topic, type_name, hash)?)
    }
}

impl Shared {
    fn token(&self, node: &Node, eid: u32, kind: EndpointKind, endpoint: Option<TokenEndpoint>) -> Token {
        Token {
            domain: self.domain,
            zid: self.zid.clone(),
            nid: node.nid,
            eid,
            kind,
            namespace: node.namespace.clone(),
            node: node.name.clone(),
            endpoint,
        }
    }

    fn declare_token(&self, token: &Token) -> Result<LivelinessToken, RosError> {
        let key = token.key();
        let what = format!("declare the token {key}");
        self.zenoh.liveliness().declare_token(key).wait().map_err(RosError::zenoh(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_link_counts_once() {
        let l = Links::default();
        let counts = |l: &Links| (l.losses.load(Ordering::Relaxed), l.returns.load(Ordering::Relaxed));
        let (put, delete) = (SampleKind::Put, SampleKind::Delete);
        for (kind, peer, want) in [
            (put, "a", (0, 0)),
            (put, "b", (0, 0)),
            (delete, "a", (0, 0)),
            (delete, "a", (0, 0)),
            (delete, "b", (1, 0)),
            (put, "c", (1, 1)),
            (put, "d", (1, 1)),
            (delete, "c", (1, 1)),
            (delete, "d", (2, 1)),
        ] {
            l.event(kind, peer.to_owned());
            assert_eq!(counts(&l), want, "{kind:?} {peer}");
        }
    }
}
