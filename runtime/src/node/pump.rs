//! The senses' thread: messages out of the subscribers' queues, through [`Senses`], into the memory.

use super::MonotonicClock;
use super::figures::{Figures, lock};
use crate::agent::{Event, OdometryHeard};
use crate::config::{Frames, RobotConfig};
use crate::planar::Pose2;
use crate::profile::Profile;
use crate::record::RecordSender;
use crate::senses::{Sense, Senses, Took};
use mindseye_bridge::clock;
use mindseye_bridge::msg::{CameraInfo, CompressedImage, Image, Odometry, RosType, TFMessage};
use mindseye_bridge::ros::{Qos, QueuePolicy, RawSubscriber, RosError, RosSession, SubscriberCounts};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use ringbuf::HeapProd;
use ringbuf::traits::Producer;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Raw images that wait for the senses.
const IMAGES_WAITING: usize = 16;
/// Odometry and tf messages that wait for the senses.
const POSES_WAITING: usize = 512;

/// The robot's topics.
pub(super) struct Inputs {
    image: Option<RawSubscriber>,
    compressed: Option<RawSubscriber>,
    others: Vec<(Sense, RawSubscriber)>,
}

impl Inputs {
    /// Subscribes to every topic that has a name.
    pub fn subscribe(session: &RosSession, config: &RobotConfig) -> Result<Self, RosError> {
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
        Ok(Self {
            image: raw(&t.image, Image::NAME, Image::HASH, sensor, images)?,
            compressed: raw(&t.compressed, CompressedImage::NAME, CompressedImage::HASH, sensor, images)?,
            others,
        })
    }
}

/// What the thread holds.
pub(super) struct SensesPump {
    pub senses: Senses,
    pub inputs: Inputs,
    pub events: HeapProd<Event>,
    pub figures: Arc<Figures>,
    pub record: Option<RecordSender>,
    pub stop: Arc<AtomicBool>,
    pub profile: Profile,
    /// When the profile was last copied over.
    pub copied: TimeDelta,
    pub odometry: OdometryNews,
}

/// Odometry for the agent: not every message, but every few.
pub(super) struct OdometryNews {
    frames: Frames,
    /// A topic of odometry is the better source: tf may carry the same poses late.
    by_topic: bool,
    last: Option<TimeDelta>,
}

/// The agent hears of odometry this often.
const ODOMETRY_EVERY: TimeDelta = TimeDelta::from_millis(100);

impl OdometryNews {
    /// Frames have these names where messages do not say.
    pub fn new(frames: &Frames) -> Self {
        Self { frames: frames.clone(), by_topic: false, last: None }
    }

    /// What the agent should hear, after the senses took a message; `known` is their newest pose.
    fn hear(&mut self, sense: Sense, cdr: &[u8], known: Option<(Timestamp, Pose2)>) -> Option<OdometryHeard> {
        self.by_topic |= sense == Sense::Odometry;
        let wanted = match sense {
            Sense::Odometry => true,
            Sense::Tf => !self.by_topic,
            _ => false,
        };
        let now = clock::monotonic();
        if !wanted || self.last.is_some_and(|at| now - at < ODOMETRY_EVERY) {
            return None;
        }
        let (stamp, pose) = known?;
        let named = |name: &str, fallback: &str| match name.trim_start_matches('/') {
            "" => fallback.to_owned(),
            name => name.to_owned(),
        };
        let (frame, base, stamp) = match sense {
            Sense::Odometry => {
                let odometry = Odometry::decode(cdr).ok()?;
                let header = &odometry.header;
                let frame = named(&header.frame_id, &self.frames.odom);
                (frame, named(&odometry.child_frame_id, &self.frames.base), header.stamp.timestamp())
            }
            _ => (self.frames.odom.clone(), self.frames.base.clone(), stamp),
        };
        self.last = Some(now);
        Some(OdometryHeard { frame, base, stamp, pose })
    }
}

impl SensesPump {
    /// Until the node stops.
    pub fn run(&mut self) {
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
        let heard = self.odometry.hear(sense, cdr, self.senses.pose());
        if let Some(heard) = heard.filter(|_| taken.is_ok()) {
            self.send(Event::Odometry(heard));
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

    fn send(&mut self, event: Event) {
        if self.events.try_push(event).is_err() {
            self.figures.events_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell(&mut self, took: &Took) {
        if let Some(segment) = took.segment {
            tracing::info!(reason = %segment, "new segment");
            *lock(&self.figures.segments) = segment.to_string();
            if !segment.keeps_history() {
                self.send(Event::ContextLost);
            }
        }
        if let Some(eviction) = took.eviction {
            tracing::debug!(%eviction, "latent evicted");
        }
        if took.latent.is_some() {
            let latents = self.senses.seen().latents();
            self.send(Event::ContextReady { latents });
        }
        if let Some(captured_at) = took.frame {
            self.send(Event::Frame { captured_at });
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
