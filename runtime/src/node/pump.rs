//! The senses' thread: messages out of the subscribers' queues, through [`Senses`], into the memory.

use super::figures::{Figures, lock};
use super::{MonotonicClock, NodeEvent, Observer};
use crate::agent::{Event, OdometryHeard};
use crate::config::{Frames, Topics};
use crate::planar::Pose2;
use crate::profile::Profile;
use crate::record::RecordSender;
use crate::senses::{Outcome, Sense, Senses, is_camera};
use mindseye_bridge::clock;
use mindseye_bridge::msg::{CameraInfo, CompressedImage, Image, Odometry, RosType, TFMessage};
use mindseye_bridge::ros::{Qos, QueuePolicy, RawSubscriber, RosError, RosSession, SubscriberCounts};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use ringbuf::HeapProd;
use ringbuf::traits::Producer;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Raw images that wait for the senses.
const IMAGES_WAITING: usize = 16;
/// Odometry and tf messages that wait for the senses.
const POSES_WAITING: usize = 512;
/// Longest wait for a picture: odometry waits that long at most.
const IDLE_FOR: Duration = Duration::from_millis(3);

/// The robot's topics.
pub(super) type Inputs = Vec<(Sense, RawSubscriber)>;

/// Subscribes to the topics of `senses`, where they have a name.
pub(super) fn subscribe(session: &RosSession, topics: &Topics, senses: &[Sense]) -> Result<Inputs, RosError> {
    let mut inputs = Inputs::new();
    for sense in senses {
        let (queue, qos) = match sense {
            Sense::TfStatic => (POSES_WAITING, Qos::latched(10)),
            Sense::Odometry | Sense::Tf => (POSES_WAITING, Qos::SENSOR_DATA),
            Sense::Image | Sense::Compressed | Sense::CameraInfo => (IMAGES_WAITING, Qos::SENSOR_DATA),
        };
        let ((name, hash), topic) = (type_of(*sense), topics.of(*sense));
        if !topic.is_empty() {
            let queue = QueuePolicy::KeepLast(queue);
            inputs.push((*sense, session.raw_subscriber(topic, name, Some(hash), &qos, queue)?));
        }
    }
    Ok(inputs)
}

/// Name and hash of the messages of a sense.
fn type_of(sense: Sense) -> (&'static str, &'static str) {
    match sense {
        Sense::Image => (Image::NAME, Image::HASH),
        Sense::Compressed => (CompressedImage::NAME, CompressedImage::HASH),
        Sense::CameraInfo => (CameraInfo::NAME, CameraInfo::HASH),
        Sense::Odometry => (Odometry::NAME, Odometry::HASH),
        Sense::Tf | Sense::TfStatic => (TFMessage::NAME, TFMessage::HASH),
    }
}

/// Topics that replace those of the same senses.
#[derive(Default)]
pub(super) struct Replaced {
    pub senses: Vec<Sense>,
    pub inputs: Inputs,
}

/// What the thread holds.
pub(super) struct SensesPump {
    pub senses: Senses,
    pub inputs: Inputs,
    pub replaced: Arc<Mutex<Replaced>>,
    pub events: HeapProd<Event>,
    pub figures: Arc<Figures>,
    pub record: Option<RecordSender>,
    pub observer: Arc<Observer>,
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
            let Replaced { senses, inputs } = std::mem::take(&mut *lock(&self.replaced));
            if !senses.is_empty() {
                self.inputs.retain(|(sense, _)| !senses.contains(sense));
                self.inputs.extend(inputs);
            }
            let mut idle = true;
            // Poses before pictures, so that a frame finds the odometry of its own time.
            idle &= !self.drain_others(&mut scratch);
            for sense in [Sense::Image, Sense::Compressed] {
                let Some(sample) = self.input(sense).and_then(RawSubscriber::try_recv) else { continue };
                idle = false;
                self.take(sense, sample.bytes(&mut scratch), sample.info.received_at);
            }
            self.report();
            if idle {
                // Woken by whichever camera delivers.
                let sense = if self.input(Sense::Image).is_some() { Sense::Image } else { Sense::Compressed };
                let Some(camera) = self.input(sense) else {
                    std::thread::sleep(IDLE_FOR);
                    continue;
                };
                if let Some(sample) = camera.recv_timeout(IDLE_FOR) {
                    self.drain_others(&mut scratch);
                    self.take(sense, sample.bytes(&mut scratch), sample.info.received_at);
                }
            }
        }
    }

    fn input(&self, sense: Sense) -> Option<&RawSubscriber> {
        self.inputs.iter().find(|(s, _)| *s == sense).map(|(_, subscriber)| subscriber)
    }

    fn drain_others(&mut self, scratch: &mut Vec<u8>) -> bool {
        let mut any = false;
        for i in 0..self.inputs.len() {
            let sense = self.inputs[i].0;
            if is_camera(sense) {
                continue;
            }
            while let Some(sample) = self.inputs[i].1.try_recv() {
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
            Ok(outcome) => {
                let pose = self.senses.pose().map(|(_, pose)| pose);
                let picture = self.senses.picture();
                (self.observer)(NodeEvent::Sensed { sense, cdr, outcome: &outcome, pose, picture });
                self.tell(&outcome);
            }
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
        let (name, hash) = type_of(sense);
        if let Some(input) = self.input(sense) {
            record.cdr(input.topic(), name, hash, clock::now().as_nanos(), cdr);
        }
    }

    fn send(&mut self, event: Event) {
        if self.events.try_push(event).is_err() {
            self.figures.events_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell(&mut self, outcome: &Outcome) {
        if let Some(segment) = outcome.segment {
            tracing::info!(reason = %segment, "new segment");
            *lock(&self.figures.segments) = segment.to_string();
            if !segment.keeps_history() {
                self.send(Event::ContextLost);
            }
        }
        if let Some(eviction) = outcome.eviction {
            tracing::debug!(%eviction, "latent evicted");
        }
        if outcome.latent.is_some() {
            let latents = self.senses.context().latents();
            self.send(Event::ContextReady { latents });
        }
        if let Some(captured_at) = outcome.frame {
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
        let mut poses = 0;
        for (sense, input) in &self.inputs {
            let counts = input.counts();
            if is_camera(*sense) {
                camera.received += counts.received;
                camera.dropped += counts.dropped;
                camera.missed += counts.missed;
                camera.wrong_hash += counts.wrong_hash;
            } else {
                poses += counts.dropped;
            }
        }
        *lock(&self.figures.camera) = camera;
        self.figures.poses_dropped.store(poses, Ordering::Relaxed);
    }
}
