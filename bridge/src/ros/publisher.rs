//! Publishers.

use super::keys::{Attachment, Durability, EndpointKind, History, Qos, Reliability};
use super::lock;
use super::session::RosSession;
use super::{KeyStyle, RosError};
use crate::clock;
use crate::msg::RosType;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::bytes::ZBytes;
use zenoh::liveliness::LivelinessToken;
use zenoh::qos::CongestionControl;
use zenoh_ext::{AdvancedPublisher, AdvancedPublisherBuilderExt, CacheConfig, MissDetectionConfig};

impl RosSession {
    /// A typed publisher.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn publisher<T: RosType>(&self, topic: &str, qos: &Qos) -> Result<Publisher<T>, RosError> {
        let raw = self.raw_publisher(topic, T::NAME, T::HASH, qos)?;
        Ok(Publisher { raw, message: PhantomData })
    }

    /// A publisher of finished CDR messages, by type name (`pkg/msg/Name`) and hash.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn raw_publisher(
        &self,
        topic: &str,
        type_name: &str,
        hash: &str,
        qos: &Qos,
    ) -> Result<RawPublisher, RosError> {
        RawPublisher::declare(self, topic, type_name, hash, qos)
    }
}

/// Publishes finished CDR messages (header included). Cheap to clone; clones share the sequence numbers.
#[derive(Clone)]
pub struct RawPublisher {
    inner: Arc<Inner>,
}

struct Inner {
    // Before the publisher: the token leaves the graph first.
    _token: Option<LivelinessToken>,
    kind: Kind,
    topic: String,
    key: String,
    gid: [u8; 16],
    attach: bool,
    last_sequence: Mutex<i64>,
    // Keeps the node's token and the session.
    _session: RosSession,
}

enum Kind {
    Plain(zenoh::pubsub::Publisher<'static>),
    Cached(Box<AdvancedPublisher<'static>>),
}

impl RawPublisher {
    fn declare(
        session: &RosSession,
        topic: &str,
        type_name: &str,
        hash: &str,
        qos: &Qos,
    ) -> Result<Self, RosError> {
        let topic = session.resolve(topic);
        let key = session.topic_key(&topic, type_name, hash)?;
        let what = || format!("declare a publisher on {key}");
        let reliable = qos.reliability == Reliability::Reliable;
        let congestion = match (qos.reliability, qos.history) {
            (Reliability::Reliable, History::KeepAll) => CongestionControl::Block,
            _ => CongestionControl::Drop,
        };
        let builder =
            session.zenoh().declare_publisher(key.clone()).congestion_control(congestion).reliability(
                if reliable {
                    zenoh::qos::Reliability::Reliable
                } else {
                    zenoh::qos::Reliability::BestEffort
                },
            );
        let kind = match qos.durability {
            Durability::Volatile => Kind::Plain(builder.wait().map_err(RosError::zenoh(what()))?),
            Durability::TransientLocal => {
                let mut b = builder
                    .advanced()
                    .publisher_detection()
                    .cache(CacheConfig::default().max_samples(qos.depth()));
                if reliable {
                    let beat = Duration::from_millis(500);
                    b = b.sample_miss_detection(MissDetectionConfig::default().sporadic_heartbeat(beat));
                }
                Kind::Cached(Box::new(b.wait().map_err(RosError::zenoh(what()))?))
            }
        };
        let (token, gid) = session.endpoint(EndpointKind::Publisher, &topic, type_name, hash, *qos)?;
        Ok(Self {
            inner: Arc::new(Inner {
                _token: token,
                kind,
                topic,
                key,
                gid,
                attach: session.key_style() == KeyStyle::RmwZenoh,
                last_sequence: Mutex::new(0),
                _session: session.clone(),
            }),
        })
    }

    /// Sends one message; gives its sequence number, from 1. A vector or `ZBytes` is not copied.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the session is closed.
    pub fn publish(&self, cdr: impl Into<ZBytes>) -> Result<i64, RosError> {
        let i = &*self.inner;
        let payload = cdr.into();
        // Held while sending, so that numbers go out in order.
        let mut last = lock(&i.last_sequence);
        let sequence = *last + 1;
        let attachment =
            i.attach.then(|| Attachment { sequence, source_stamp_ns: clock::now().0, gid: i.gid }.to_bytes());
        let sent = match &i.kind {
            Kind::Plain(p) => p.put(payload).attachment(attachment).wait(),
            Kind::Cached(p) => p.put(payload).attachment(attachment).wait(),
        };
        sent.map_err(RosError::zenoh(format!("publish on {}", i.topic)))?;
        *last = sequence;
        Ok(sequence)
    }

    /// Whether anyone listens.
    #[must_use]
    pub fn has_subscribers(&self) -> bool {
        let status = match &self.inner.kind {
            Kind::Plain(p) => p.matching_status().wait(),
            Kind::Cached(p) => p.matching_status().wait(),
        };
        status.is_ok_and(|s| s.matching())
    }

    /// Waits until someone listens; false when nobody did in time.
    #[must_use]
    pub fn wait_for_subscribers(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        loop {
            if self.has_subscribers() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The topic, fully qualified.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.inner.topic
    }

    /// The Zenoh key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.inner.key
    }

    /// The publisher's GID, as in its attachments.
    #[must_use]
    pub fn gid(&self) -> [u8; 16] {
        self.inner.gid
    }
}

impl std::fmt::Debug for RawPublisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RawPublisher({})", self.inner.key)
    }
}

/// Publishes messages of one type.
pub struct Publisher<T> {
    raw: RawPublisher,
    message: PhantomData<fn(&T)>,
}

impl<T> Clone for Publisher<T> {
    fn clone(&self) -> Self {
        Self { raw: self.raw.clone(), message: PhantomData }
    }
}

impl<T: RosType> Publisher<T> {
    /// Sends one message; gives its sequence number, from 1.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the session is closed.
    pub fn publish(&self, message: &T) -> Result<i64, RosError> {
        self.raw.publish(message.encode())
    }

    /// As [`Publisher::publish`], for a message that is not needed any more: a picture's bytes are handed
    /// over instead of copied.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the session is closed.
    pub fn publish_owned(&self, message: T) -> Result<i64, RosError> {
        let (head, tail) = message.encode_split();
        if tail.is_empty() {
            return self.raw.publish(head);
        }
        let mut payload = ZBytes::writer();
        payload.append(head.into());
        payload.append(tail.into());
        self.raw.publish(payload.finish())
    }

    /// The publisher underneath, for CDR that is there already.
    #[must_use]
    pub fn raw(&self) -> &RawPublisher {
        &self.raw
    }

    /// As [`RawPublisher::wait_for_subscribers`].
    #[must_use]
    pub fn wait_for_subscribers(&self, timeout: Duration) -> bool {
        self.raw.wait_for_subscribers(timeout)
    }
}

impl<T> std::fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.raw.fmt(f)
    }
}
