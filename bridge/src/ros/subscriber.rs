//! Subscribers: bounded queues of undecoded messages.

use super::graph::Presence;
use super::keys::{Attachment, Durability, EndpointKind, Qos, Reliability};
use super::lock;
use super::queue::{Queue, QueuePolicy};
use super::session::RosSession;
use super::{KeyStyle, RosError};
use crate::cdr::CdrError;
use crate::clock;
use crate::msg::{CompressedImageView, HASH_NOT_SUPPORTED, ImageView, Pieced, RosType};
use crate::time::Timestamp;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zenoh::Wait;
use zenoh::bytes::ZBytes;
use zenoh::liveliness::LivelinessToken;
use zenoh::sample::{Sample, SampleFields, SampleKind};
use zenoh_ext::{AdvancedSubscriber, AdvancedSubscriberBuilderExt, HistoryConfig, RecoveryConfig};

impl RosSession {
    /// A typed subscriber. Senders of every distribution are heard; a sender whose type hash is another
    /// one is counted and not decoded.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn subscriber<T: RosType>(
        &self,
        topic: &str,
        qos: &Qos,
        queue: QueuePolicy,
    ) -> Result<Subscriber<T>, RosError> {
        let hash = (!T::OPEN_ENDED).then_some(T::HASH);
        let raw = self.raw_subscriber(topic, T::NAME, hash, qos, queue)?;
        Ok(Subscriber { raw, scratch: Mutex::default(), message: PhantomData })
    }

    /// A subscriber that gives CDR messages as they come. With `hash: None` any hash is taken.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn raw_subscriber(
        &self,
        topic: &str,
        type_name: &str,
        hash: Option<&str>,
        qos: &Qos,
        queue: QueuePolicy,
    ) -> Result<RawSubscriber, RosError> {
        RawSubscriber::declare(self, topic, type_name, hash, qos, queue)
    }
}

/// What is known about a message besides its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleInfo {
    /// When it arrived here, on this machine's wall clock.
    pub received_at: Timestamp,
    /// Sequence number, send time and sender, where the sender attached them.
    pub attachment: Option<Attachment>,
}

/// A message as it came.
#[derive(Debug, Clone)]
pub struct RawSample {
    /// CDR, header included. It may lie in several pieces; see [`RawSample::bytes`].
    pub payload: ZBytes,
    /// What else is known.
    pub info: SampleInfo,
}

impl RawSample {
    /// The CDR in one piece: borrowed where it came so, otherwise gathered into `scratch`, whose memory is
    /// kept between messages.
    #[must_use]
    pub fn bytes<'a>(&'a self, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        contiguous(&self.payload, scratch)
    }

    /// Reads a `sensor_msgs/msg/CompressedImage` without copying: its fields (with `data` empty) and the
    /// picture in the pieces that it came in. `None`: the fields are themselves in pieces; use
    /// [`RawSample::bytes`].
    ///
    /// # Errors
    /// [`CdrError`] with the field and the offset.
    pub fn compressed_image(&self) -> Result<Option<(CompressedImageView<'_>, Pieces<'_>)>, CdrError> {
        let first = self.payload.slices().next().unwrap_or_default();
        let head = CompressedImageView::head(first, self.payload.len())?;
        Ok(head.map(|(view, range)| (view, Pieces { payload: &self.payload, range })))
    }

    /// As [`RawSample::compressed_image`], for a `sensor_msgs/msg/Image`.
    ///
    /// # Errors
    /// [`CdrError`] with the field and the offset.
    pub fn image(&self) -> Result<Option<(ImageView<'_>, Pieces<'_>)>, CdrError> {
        let first = self.payload.slices().next().unwrap_or_default();
        let head = ImageView::head(first, self.payload.len())?;
        Ok(head.map(|(view, range)| (view, Pieces { payload: &self.payload, range })))
    }
}

/// Bytes of a message that were not copied; large ones come from a network in several pieces.
#[derive(Debug, Clone)]
pub struct Pieces<'a> {
    payload: &'a ZBytes,
    range: Range<usize>,
}

impl<'a> Pieces<'a> {
    /// All bytes together.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The pieces in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        let (mut skip, mut left) = (self.range.start, self.range.len());
        self.payload.slices().filter_map(move |slice| {
            let from = skip.min(slice.len());
            skip -= from;
            let take = left.min(slice.len() - from);
            left -= take;
            (take > 0).then(|| &slice[from..from + take])
        })
    }

    /// The bytes in one piece: borrowed where they came so, otherwise gathered into `scratch`.
    #[must_use]
    pub fn gather<'s>(&'s self, scratch: &'s mut Vec<u8>) -> &'s [u8] {
        let mut pieces = self.iter();
        let first = pieces.next().unwrap_or_default();
        if first.len() == self.len() {
            return first;
        }
        scratch.clear();
        scratch.reserve(self.len());
        scratch.extend_from_slice(first);
        pieces.for_each(|piece| scratch.extend_from_slice(piece));
        scratch
    }
}

pub(super) fn contiguous<'a>(payload: &'a ZBytes, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    let mut slices = payload.slices();
    let Some(first) = slices.next() else { return &[] };
    if first.len() == payload.len() {
        return first;
    }
    scratch.clear();
    scratch.reserve(payload.len());
    scratch.extend_from_slice(first);
    for slice in slices {
        scratch.extend_from_slice(slice);
    }
    scratch
}

/// Running totals of a subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SubscriberCounts {
    /// Arrived, the dropped ones included.
    pub received: u64,
    /// Lost because the consumer was slower than the sender.
    pub dropped: u64,
    /// Missing in the senders' sequence numbers: lost on the way.
    pub missed: u64,
    /// Refused because the sender's type hash is another one.
    pub wrong_hash: u64,
    /// Taken out but not decodable.
    pub bad: u64,
}

/// Takes CDR messages of a topic.
pub struct RawSubscriber {
    // In this order: first out of the graph, then deaf.
    _token: Option<LivelinessToken>,
    _kind: Kind,
    inner: Arc<Inner>,
    presence: Option<Arc<Presence>>,
    topic: String,
    _session: RosSession,
}

#[allow(dead_code)] // held for their Drop
enum Kind {
    Plain(zenoh::pubsub::Subscriber<()>),
    Advanced(Box<AdvancedSubscriber<()>>),
}

struct Inner {
    queue: Queue<RawSample>,
    hash: Option<String>,
    wrong_hash: AtomicU64,
    missed: AtomicU64,
    bad: AtomicU64,
    senders: Mutex<Vec<([u8; 16], i64)>>,
    topic: String,
}

/// Senders whose sequence numbers are followed; more are not.
const MAX_SENDERS: usize = 32;

impl Inner {
    fn take(&self, sample: Sample) {
        if sample.kind() != SampleKind::Put {
            return;
        }
        if let Some(want) = &self.hash {
            let got = sample.key_expr().as_str().rsplit('/').next().unwrap_or("");
            if got != want && got != HASH_NOT_SUPPORTED {
                if self.wrong_hash.fetch_add(1, Ordering::Relaxed) == 0 {
                    tracing::warn!(topic = self.topic, got, want, "publisher has another type hash: ignored");
                }
                return;
            }
        }
        // Taken apart, because cloning a payload of several pieces allocates.
        let SampleFields { payload, attachment, .. } = sample.into();
        let attachment = attachment.and_then(|a| Attachment::from_bytes(&a.to_bytes()));
        if let Some(a) = attachment {
            self.follow(a);
        }
        let info = SampleInfo { received_at: clock::now(), attachment };
        self.queue.push(RawSample { payload, info });
    }

    fn follow(&self, a: Attachment) {
        let mut senders = lock(&self.senders);
        match senders.iter_mut().find(|(gid, _)| *gid == a.gid) {
            Some((_, last)) => {
                let gap = a.sequence.saturating_sub(*last).saturating_sub(1);
                if gap > 0 {
                    self.missed.fetch_add(gap as u64, Ordering::Relaxed);
                }
                *last = (*last).max(a.sequence);
            }
            None => {
                if senders.len() >= MAX_SENDERS {
                    senders.remove(0);
                }
                senders.push((a.gid, a.sequence));
            }
        }
    }
}

impl RawSubscriber {
    fn declare(
        session: &RosSession,
        topic: &str,
        type_name: &str,
        hash: Option<&str>,
        qos: &Qos,
        queue: QueuePolicy,
    ) -> Result<Self, RosError> {
        let topic = session.resolve(topic);
        let key = session.topic_key(&topic, type_name, "*")?;
        let what = || format!("declare a subscriber on {key}");
        let rmw = session.key_style() == KeyStyle::RmwZenoh;
        let inner = Arc::new(Inner {
            queue: Queue::new(queue.capacity()),
            hash: hash.filter(|_| rmw).map(str::to_owned),
            wrong_hash: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            bad: AtomicU64::new(0),
            senders: Mutex::new(Vec::with_capacity(MAX_SENDERS)),
            topic: topic.clone(),
        });
        let taker = inner.clone();
        let builder =
            session.zenoh().declare_subscriber(key.clone()).callback(move |sample| taker.take(sample));
        let kind = match qos.durability {
            Durability::Volatile => Kind::Plain(builder.wait().map_err(RosError::zenoh(what()))?),
            Durability::TransientLocal => {
                let history = HistoryConfig::default().detect_late_publishers().max_samples(qos.depth());
                let mut b = builder.advanced().subscriber_detection().history(history);
                if qos.reliability == Reliability::Reliable {
                    b = b.recovery(RecoveryConfig::default().heartbeat());
                }
                Kind::Advanced(Box::new(b.wait().map_err(RosError::zenoh(what()))?))
            }
        };
        // Best effort and volatile whatever is asked, so that it matches (and wakes) every publisher; a
        // latched topic says what it is, so that tools show it right.
        let shown = match qos.durability {
            Durability::Volatile => Qos::ANY_PUBLISHER,
            Durability::TransientLocal => *qos,
        };
        let shown_hash = hash.or_else(|| crate::msg::type_hash(type_name)).unwrap_or(HASH_NOT_SUPPORTED);
        let (token, _) =
            session.endpoint(EndpointKind::Subscription, &topic, type_name, shown_hash, shown)?;
        let presence = session.graph().map(|g| g.presence(&topic));
        Ok(Self { _token: token, _kind: kind, inner, presence, topic, _session: session.clone() })
    }

    /// Waits for the next message; `None` when none came in time.
    #[must_use]
    pub fn recv_timeout(&self, timeout: Duration) -> Option<RawSample> {
        self.inner.queue.pop_timeout(timeout)
    }

    /// The next message that is there already.
    #[must_use]
    pub fn try_recv(&self) -> Option<RawSample> {
        self.inner.queue.try_pop()
    }

    /// Waits for the next message. Cancel-safe.
    pub async fn recv(&self) -> Option<RawSample> {
        self.inner.queue.pop().await
    }

    /// Messages waiting.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inner.queue.len()
    }

    /// Running totals.
    #[must_use]
    pub fn counts(&self) -> SubscriberCounts {
        SubscriberCounts {
            received: self.inner.queue.received(),
            dropped: self.inner.queue.dropped(),
            missed: self.inner.missed.load(Ordering::Relaxed),
            wrong_hash: self.inner.wrong_hash.load(Ordering::Relaxed),
            bad: self.inner.bad.load(Ordering::Relaxed),
        }
    }

    /// How many publishers of the topic the graph knows; `None` in styles without tokens.
    #[must_use]
    pub fn publishers(&self) -> Option<usize> {
        self.presence.as_ref().map(|p| p.now())
    }

    /// How often the topic's last publisher went away, and one came back.
    #[must_use]
    pub fn publisher_losses(&self) -> (u64, u64) {
        self.presence.as_ref().map_or((0, 0), |p| p.losses())
    }

    /// The topic, fully qualified.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }

    fn count_bad(&self) -> u64 {
        self.inner.bad.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for RawSubscriber {
    fn drop(&mut self) {
        self.inner.queue.close();
    }
}

impl std::fmt::Debug for RawSubscriber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RawSubscriber({})", self.topic)
    }
}

/// A decoded message and what is known about it.
#[derive(Debug, Clone)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// What else is known.
    pub info: SampleInfo,
}

/// Takes messages of one type. Decoding happens on the consumer's side.
pub struct Subscriber<T> {
    raw: RawSubscriber,
    // Where messages that came in pieces are put together.
    scratch: Mutex<Vec<u8>>,
    message: PhantomData<fn() -> T>,
}

impl<T: RosType> Subscriber<T> {
    fn decode(&self, sample: RawSample) -> Result<Received<T>, RosError> {
        let payload = &sample.payload;
        let decoded = match T::decode_pieces(&mut payload.slices(), payload.len()) {
            Pieced::Done(message) => Ok(message),
            Pieced::Failed(e) => Err(e),
            Pieced::Gather => T::decode(contiguous(payload, &mut lock(&self.scratch))),
        };
        match decoded {
            Ok(message) => Ok(Received { message, info: sample.info }),
            Err(cause) => {
                self.raw.count_bad();
                Err(RosError::Decode { topic: self.raw.topic.clone(), type_name: T::NAME, cause })
            }
        }
    }

    /// Waits for the next message; `Ok(None)` when none came in time.
    ///
    /// # Errors
    /// [`RosError::Decode`]: that message is lost and counted; the next call goes on.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Option<Received<T>>, RosError> {
        self.raw.recv_timeout(timeout).map(|s| self.decode(s)).transpose()
    }

    /// The next message that is there already.
    ///
    /// # Errors
    /// As [`Subscriber::recv_timeout`].
    pub fn try_recv(&self) -> Result<Option<Received<T>>, RosError> {
        self.raw.try_recv().map(|s| self.decode(s)).transpose()
    }

    /// Waits for the next message. Cancel-safe.
    ///
    /// # Errors
    /// [`RosError::Decode`], as [`Subscriber::recv_timeout`]; [`RosError::Closed`].
    pub async fn recv(&self) -> Result<Received<T>, RosError> {
        match self.raw.recv().await {
            Some(sample) => self.decode(sample),
            None => Err(RosError::Closed),
        }
    }

    /// The subscriber underneath: counters, presence of publishers.
    #[must_use]
    pub fn raw(&self) -> &RawSubscriber {
        &self.raw
    }

    /// Running totals.
    #[must_use]
    pub fn counts(&self) -> SubscriberCounts {
        self.raw.counts()
    }
}

impl<T> std::fmt::Debug for Subscriber<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.raw.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msg::{CompressedImage, Header};

    #[test]
    fn pieces_of_a_picture() {
        let data: Vec<u8> = (0..=255).collect();
        let message =
            CompressedImage { header: Header::new(Timestamp(3), "cam"), format: "png".into(), data };
        let bytes = message.encode();
        for cuts in [vec![], vec![60], vec![100, 101, 200], vec![48, 150]] {
            let mut writer = ZBytes::writer();
            let mut from = 0;
            for to in cuts.iter().copied().chain([bytes.len()]) {
                writer.append(bytes[from..to].to_vec().into());
                from = to;
            }
            let info = SampleInfo { received_at: Timestamp(0), attachment: None };
            let sample = RawSample { payload: writer.finish(), info };
            let mut scratch = Vec::new();
            assert_eq!(sample.bytes(&mut scratch), bytes);
            let (view, pieces) = sample.compressed_image().unwrap().unwrap();
            assert_eq!((view.header.frame_id, view.format, pieces.len()), ("cam", "png", 256));
            assert_eq!(pieces.iter().flatten().copied().collect::<Vec<u8>>(), message.data, "{cuts:?}");
            let mut scratch = Vec::new();
            assert_eq!(pieces.gather(&mut scratch), message.data, "{cuts:?}");
            assert_eq!(scratch.is_empty(), cuts.is_empty(), "{cuts:?}");
            assert!(!matches!(sample.image(), Ok(Some(_))), "another type");
        }
        let info = SampleInfo { received_at: Timestamp(0), attachment: None };
        let empty = RawSample { payload: ZBytes::new(), info };
        assert!(empty.compressed_image().is_err());
    }
}
