//! Camera intake: a latest-wins queue of undecoded messages, decoded off Zenoh's threads into pooled
//! buffers. In the steady state our side allocates nothing per raw frame.

use super::queue::Queue;
use super::subscriber::{RawSubscriber, SubscriberCounts};
use super::{Qos, QueuePolicy, RosError, RosSession};
use crate::camera::{CameraFrame, FramePool};
use crate::cdr::CdrError;
use crate::image::{ImageError, Limits, RawImage, decode_compressed_rgb8, decode_raw_rgb8};
use crate::msg::{CompressedImage, CompressedImageView, Image, ImageView, RosType};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Which message the camera sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    Compressed,
}

/// Takes the pictures of one camera topic.
pub struct CameraIntake {
    subscriber: RawSubscriber,
    kind: Kind,
    pool: FramePool,
    limits: Limits,
    scratch: Vec<u8>,
    decoded: Arc<AtomicU64>,
    bad: Arc<AtomicU64>,
}

/// Running totals of an intake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IntakeCounts {
    /// Arrived, the dropped ones included.
    pub received: u64,
    /// Lost because decoding (or the consumer behind it) was slower than the camera.
    pub dropped: u64,
    /// Missing in the camera's sequence numbers: lost on the way.
    pub missed: u64,
    /// Given out.
    pub decoded: u64,
    /// Not decodable.
    pub bad: u64,
}

/// Why one picture was not decoded. The intake goes on with the next.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IntakeError {
    /// The message is none.
    #[error("{topic}: {cause}")]
    Message {
        /// Where it came from.
        topic: String,
        /// What is wrong.
        cause: CdrError,
    },
    /// The picture in it is none.
    #[error("{topic}: picture at {stamp_ns} ns: {cause}")]
    Picture {
        /// Where it came from.
        topic: String,
        /// Header stamp.
        stamp_ns: i64,
        /// What is wrong.
        cause: ImageError,
    },
}

impl CameraIntake {
    /// Subscribes to `sensor_msgs/msg/Image`, or to `CompressedImage` when the topic ends in
    /// `/compressed`. Only the newest message waits; `pool` gives the buffers.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn subscribe(session: &RosSession, topic: &str, pool: FramePool) -> Result<Self, RosError> {
        let (kind, name, hash) = if topic.ends_with("/compressed") {
            (Kind::Compressed, CompressedImage::NAME, CompressedImage::HASH)
        } else {
            (Kind::Raw, Image::NAME, Image::HASH)
        };
        let subscriber =
            session.raw_subscriber(topic, name, Some(hash), &Qos::SENSOR_DATA, QueuePolicy::Latest)?;
        Ok(Self {
            subscriber,
            kind,
            pool,
            limits: Limits::default(),
            scratch: Vec::new(),
            decoded: Arc::default(),
            bad: Arc::default(),
        })
    }

    /// Waits for the newest picture and decodes it here; `None` when none came in time.
    pub fn next(&mut self, timeout: Duration) -> Option<Result<CameraFrame, IntakeError>> {
        let sample = self.subscriber.recv_timeout(timeout)?;
        let bytes = super::subscriber::contiguous(&sample.payload, &mut self.scratch);
        let mut frame = self.pool.take();
        let result = decode(bytes, self.kind, &self.limits, &mut frame, self.subscriber.topic());
        Some(match result {
            Ok(()) => {
                self.decoded.fetch_add(1, Ordering::Relaxed);
                Ok(frame)
            }
            Err(error) => {
                self.bad.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        })
    }

    /// Running totals.
    #[must_use]
    pub fn counts(&self) -> IntakeCounts {
        counts(&self.subscriber.counts(), &self.decoded, &self.bad, 0)
    }

    /// The subscriber underneath: presence of the camera.
    #[must_use]
    pub fn subscriber(&self) -> &RawSubscriber {
        &self.subscriber
    }

    /// Decodes on a thread of its own; at most `waiting` decoded frames wait for the consumer, the newest
    /// win. Pictures that do not decode are logged (the first of each run of them) and counted.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(mut self, waiting: usize) -> std::io::Result<FrameStream> {
        let frames = Arc::new(Queue::new(waiting.clamp(1, 256)));
        let stop = Arc::new(AtomicBool::new(false));
        let live = Arc::new(std::sync::Mutex::new(SubscriberCounts::default()));
        let mut stream = FrameStream {
            frames: frames.clone(),
            stop: stop.clone(),
            live: live.clone(),
            decoded: self.decoded.clone(),
            bad: self.bad.clone(),
            thread: None,
        };
        let thread = std::thread::Builder::new().name("camera-intake".into()).spawn(move || {
            let mut bad_run = false;
            while !stop.load(Ordering::Relaxed) {
                let got = self.next(Duration::from_millis(50));
                *crate::camera::lock(&live) = self.subscriber.counts();
                match got {
                    Some(Ok(frame)) => {
                        bad_run = false;
                        frames.push(frame);
                    }
                    Some(Err(error)) => {
                        if !bad_run {
                            tracing::warn!(%error, "picture dropped");
                        }
                        bad_run = true;
                    }
                    None => {}
                }
            }
            frames.close();
        })?;
        stream.thread = Some(thread);
        Ok(stream)
    }
}

impl std::fmt::Debug for CameraIntake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CameraIntake({})", self.subscriber.topic())
    }
}

fn counts(s: &SubscriberCounts, decoded: &AtomicU64, bad: &AtomicU64, late: u64) -> IntakeCounts {
    IntakeCounts {
        received: s.received,
        dropped: s.dropped + late,
        missed: s.missed,
        decoded: decoded.load(Ordering::Relaxed),
        bad: bad.load(Ordering::Relaxed),
    }
}

fn decode(
    bytes: &[u8],
    kind: Kind,
    limits: &Limits,
    frame: &mut CameraFrame,
    topic: &str,
) -> Result<(), IntakeError> {
    let message = |cause| IntakeError::Message { topic: topic.to_owned(), cause };
    let (header, size) = match kind {
        Kind::Raw => {
            let view = ImageView::decode(bytes).map_err(message)?;
            let size = decode_raw_rgb8(&RawImage::from(&view), limits, &mut frame.rgb);
            (view.header, size)
        }
        Kind::Compressed => {
            let view = CompressedImageView::decode(bytes).map_err(message)?;
            let size = decode_compressed_rgb8(view.data, limits, &mut frame.rgb);
            (view.header, size)
        }
    };
    let stamp = header.stamp.timestamp();
    let size =
        size.map_err(|cause| IntakeError::Picture { topic: topic.to_owned(), stamp_ns: stamp.0, cause })?;
    frame.captured_at = stamp;
    frame.frame_id.clear();
    frame.frame_id.push_str(header.frame_id);
    frame.width = size.width;
    frame.height = size.height;
    Ok(())
}

/// Decoded pictures, newest first to survive. Dropping it ends the intake.
pub struct FrameStream {
    frames: Arc<Queue<CameraFrame>>,
    stop: Arc<AtomicBool>,
    live: Arc<std::sync::Mutex<SubscriberCounts>>,
    decoded: Arc<AtomicU64>,
    bad: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FrameStream {
    /// The next picture; `None` when none came in time.
    #[must_use]
    pub fn recv_timeout(&self, timeout: Duration) -> Option<CameraFrame> {
        self.frames.pop_timeout(timeout)
    }

    /// The next picture; `None` when the intake ended. Cancel-safe.
    pub async fn recv(&self) -> Option<CameraFrame> {
        self.frames.pop().await
    }

    /// Running totals; `dropped` counts what was lost before and after decoding.
    #[must_use]
    pub fn counts(&self) -> IntakeCounts {
        counts(&crate::camera::lock(&self.live), &self.decoded, &self.bad, self.frames.dropped())
    }
}

impl Drop for FrameStream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It looks at the flag every 50 ms.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for FrameStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameStream({:?})", self.counts())
    }
}
