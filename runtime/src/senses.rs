//! From ROS messages to memory: what one robot's topics say, in the order in which they come.
//!
//! The same code serves a live robot, a bag and the tests: it takes CDR bytes and reads no clock (durations are
//! measured with the injected one). Frames that subsampling leaves out are not decoded.

use crate::context::{
    ContextCounts, ContextIntake, ContextMemory, Eviction, FrameSampler, GroupEncoder, Keep, LatentInfo,
    SegmentReason,
};
use crate::ground::Scene;
use crate::image::{ModelCamera, RgbImage, look_through};
use crate::imagine::Clock;
use crate::planar::{Pose2, PoseHistory};
use crate::profile::Profile;
use mindseye_bridge::camera::CameraIntrinsics;
use mindseye_bridge::geometry::TfTree;
use mindseye_bridge::image::{Limits, RawImage, decode_compressed_rgb8, decode_raw_rgb8};
use mindseye_bridge::msg::{CameraInfo, CompressedImageView, ImageView, Odometry, RosType, TFMessage};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use nalgebra::Isometry3;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sense {
    /// sensor_msgs/msg/Image.
    Image,
    /// sensor_msgs/msg/CompressedImage.
    Compressed,
    /// sensor_msgs/msg/CameraInfo.
    CameraInfo,
    /// nav_msgs/msg/Odometry.
    Odometry,
    /// tf2_msgs/msg/TFMessage.
    Tf,
    /// tf2_msgs/msg/TFMessage, latched.
    TfStatic,
}

/// How the context is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct SensesConfig {
    /// Which frames are kept.
    pub keep: Keep,
    /// Latents kept.
    pub capacity: usize,
    /// Newest latents that are never evicted.
    pub recent: usize,
    /// A longer pause between frames starts a new segment.
    pub max_gap: TimeDelta,
    /// Odometry may be this much older or newer than a frame.
    pub pose_slack: TimeDelta,
    /// Name of the odometry frame until a message names it.
    pub odom_frame: String,
    /// Name of the base frame until a message names it.
    pub base_frame: String,
    /// Intrinsics used when no CameraInfo comes.
    pub intrinsics: Option<CameraIntrinsics>,
    /// Mounting used when tf does not know it, `base_from_camera` (optical).
    pub base_from_camera: Option<Isometry3<f64>>,
}

impl Default for SensesConfig {
    fn default() -> Self {
        Self {
            keep: Keep::Every(3),
            capacity: 64,
            recent: 2,
            max_gap: TimeDelta::from_millis(2000),
            pose_slack: TimeDelta::from_millis(250),
            odom_frame: "odom".into(),
            base_frame: "base_link".into(),
            intrinsics: None,
            base_from_camera: None,
        }
    }
}

/// What became of a message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Took {
    /// A camera frame came with this stamp (kept or not).
    pub frame: Option<Timestamp>,
    /// A new segment began.
    pub segment: Option<SegmentReason>,
    /// A latent was stored.
    pub latent: Option<LatentInfo>,
    /// Another one left for it.
    pub eviction: Option<Eviction>,
}

/// Why a message was dropped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SenseError {
    /// Not the type that it should be.
    #[error("{sense:?}: {reason}")]
    Message {
        /// Which topic.
        sense: Sense,
        /// What is wrong.
        reason: String,
    },
    /// The picture cannot be used.
    #[error("camera frame: {0}")]
    Frame(String),
    /// The encoder failed.
    #[error(transparent)]
    Encode(#[from] crate::context::EncodeError),
}

/// The newest kept frame.
#[derive(Clone, Debug)]
struct Newest {
    picture: RgbImage,
    captured_at: Timestamp,
    odom_from_base: Option<Pose2>,
    /// Odometry of its own time has come.
    settled: bool,
}

/// What a goal can see: shared between the thread that fills it and the one that asks.
#[derive(Debug)]
pub struct Shared {
    memory: ContextMemory,
    newest: Option<Newest>,
    odom_frame: String,
    base_frame: String,
    base_from_camera: Option<Isometry3<f64>>,
}

/// A handle on what was seen.
#[derive(Clone, Debug)]
pub struct Seen(Arc<Mutex<Shared>>);

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // What a panicking holder left behind is whole: every change is one store.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of everything, for one goal; `None` before the first frame.
    pub fn scene(&self) -> Option<Scene> {
        let shared = self.lock();
        let newest = shared.newest.clone()?;
        Some(Scene {
            memory: shared.memory.snapshot(),
            newest: newest.picture,
            captured_at: newest.captured_at,
            odom_from_base: newest.odom_from_base,
            odom_frame: shared.odom_frame.clone(),
            base_frame: shared.base_frame.clone(),
            base_from_camera: shared.base_from_camera,
        })
    }

    /// Latents held now.
    pub fn latents(&self) -> usize {
        self.lock().memory.len()
    }

    /// Latents evicted so far.
    pub fn evicted(&self) -> u64 {
        self.lock().memory.evicted()
    }
}

/// One robot's senses.
pub struct Senses {
    config: SensesConfig,
    camera: ModelCamera,
    encoder: Box<dyn GroupEncoder + Send>,
    intake: ContextIntake,
    seen: Seen,
    poses: PoseHistory,
    tf: TfTree,
    tf_odometry: bool,
    intrinsics: Option<CameraIntrinsics>,
    camera_topic: Option<Sense>,
    pixels: Vec<u8>,
    ignored: u64,
    /// Latents whose odometry had not come when they were stored: index and stamp.
    unsettled: VecDeque<(u64, Timestamp)>,
}

/// Puts a picture's RGB bytes into a buffer and gives width and height.
type Decode<'a> = dyn FnMut(&mut Vec<u8>) -> Result<(u32, u32), String> + 'a;

/// Latents that wait for their odometry.
const UNSETTLED_MAX: usize = 16;

impl Senses {
    /// Senses for a model that looks through `camera`. All memory of the context is taken here.
    pub fn new(config: SensesConfig, camera: ModelCamera, encoder: Box<dyn GroupEncoder + Send>) -> Self {
        let latent_len = encoder.latent_len();
        let memory =
            ContextMemory::new(config.capacity, config.recent, latent_len, (camera.width, camera.height));
        let shared = Shared {
            memory,
            newest: None,
            odom_frame: config.odom_frame.clone(),
            base_frame: config.base_frame.clone(),
            base_from_camera: config.base_from_camera,
        };
        Self {
            intake: ContextIntake::new(FrameSampler::new(config.keep, config.max_gap), latent_len),
            seen: Seen(Arc::new(Mutex::new(shared))),
            poses: PoseHistory::new(4096),
            tf: TfTree::new(),
            tf_odometry: true,
            intrinsics: config.intrinsics.clone(),
            camera_topic: None,
            pixels: Vec::new(),
            ignored: 0,
            unsettled: VecDeque::with_capacity(UNSETTLED_MAX),
            config,
            camera,
            encoder,
        }
    }

    /// A handle for goals.
    pub fn seen(&self) -> Seen {
        self.seen.clone()
    }

    /// Counts of frames.
    pub fn counts(&self) -> ContextCounts {
        self.intake.counts()
    }

    /// Frames of a second camera topic that were ignored because the first one delivers.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Whether intrinsics are known, by CameraInfo or configuration.
    pub fn has_intrinsics(&self) -> bool {
        self.intrinsics.is_some()
    }

    /// The newest pose of odometry.
    pub fn pose(&self) -> Option<(Timestamp, Pose2)> {
        self.poses.newest().map(|(stamp, pose)| (Timestamp(stamp), pose))
    }

    /// Takes one message, as CDR.
    ///
    /// # Errors
    /// [`SenseError`]; the message is dropped (a frame is counted as failed) and the next one can be taken.
    pub fn take(
        &mut self,
        sense: Sense,
        cdr: &[u8],
        clock: &dyn Clock,
        profile: &mut Profile,
    ) -> Result<Took, SenseError> {
        let bad = |reason: String| SenseError::Message { sense, reason };
        match sense {
            Sense::Image => {
                let image = ImageView::decode(cdr).map_err(|e| bad(e.to_string()))?;
                let size = (image.width, image.height);
                let raw = RawImage::from(&image);
                let stamp = Timestamp::from_ros(image.header.stamp.sec, image.header.stamp.nanosec);
                self.frame(sense, stamp, image.header.frame_id, size, clock, profile, &mut |pixels| {
                    decode_raw_rgb8(&raw, &Limits::default(), pixels)
                        .map(|s| (s.width, s.height))
                        .map_err(|e| e.to_string())
                })
            }
            Sense::Compressed => {
                let image = CompressedImageView::decode(cdr).map_err(|e| bad(e.to_string()))?;
                let size = compressed_size(image.data)
                    .ok_or_else(|| bad("neither a JPEG nor a PNG picture; send one of these".into()))?;
                let stamp = Timestamp::from_ros(image.header.stamp.sec, image.header.stamp.nanosec);
                self.frame(sense, stamp, image.header.frame_id, size, clock, profile, &mut |pixels| {
                    decode_compressed_rgb8(image.data, &Limits::default(), pixels)
                        .map(|s| (s.width, s.height))
                        .map_err(|e| e.to_string())
                })
            }
            Sense::CameraInfo => {
                let info = CameraInfo::decode(cdr).map_err(|e| bad(e.to_string()))?;
                self.intrinsics =
                    Some(CameraIntrinsics::from_camera_info(&info).map_err(|e| bad(e.to_string()))?);
                Ok(Took::default())
            }
            Sense::Odometry => {
                let odometry = Odometry::decode(cdr).map_err(|e| bad(e.to_string()))?;
                let pose = odometry.pose.pose.isometry().map_err(|e| bad(e.to_string()))?;
                if self.tf_odometry {
                    // The topic is the better source: tf may carry the same poses late.
                    self.tf_odometry = false;
                    let mut shared = self.seen.lock();
                    shared.odom_frame = plain(&odometry.header.frame_id, &self.config.odom_frame);
                    shared.base_frame = plain(&odometry.child_frame_id, &self.config.base_frame);
                }
                self.poses.push(odometry.header.stamp.timestamp().as_nanos(), planar(&pose));
                self.settle();
                Ok(Took::default())
            }
            Sense::Tf | Sense::TfStatic => {
                let message = TFMessage::decode(cdr).map_err(|e| bad(e.to_string()))?;
                let refused = self.tf.insert_message(&message, sense == Sense::TfStatic);
                if self.tf_odometry && sense == Sense::Tf {
                    for t in &message.transforms {
                        let is = |name: &str, wanted: &str| name.trim_start_matches('/') == wanted;
                        if is(&t.header.frame_id, &self.config.odom_frame)
                            && is(&t.child_frame_id, &self.config.base_frame)
                        {
                            let stamp = t.header.stamp.timestamp();
                            if let Ok(pose) =
                                self.tf.lookup(&self.config.odom_frame, &self.config.base_frame, stamp)
                            {
                                self.poses.push(stamp.as_nanos(), planar(&pose));
                                self.settle();
                            }
                        }
                    }
                }
                match refused.first() {
                    Some(error) => Err(bad(error.to_string())),
                    None => Ok(Took::default()),
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // a private step of `take`
    fn frame(
        &mut self,
        sense: Sense,
        captured_at: Timestamp,
        frame_id: &str,
        size: (u32, u32),
        clock: &dyn Clock,
        profile: &mut Profile,
        decode: &mut Decode<'_>,
    ) -> Result<Took, SenseError> {
        if *self.camera_topic.get_or_insert(sense) != sense {
            self.ignored += 1;
            return Ok(Took::default());
        }
        let offer = self.intake.offer(captured_at, size, self.encoder.as_mut());
        let mut took = Took { frame: Some(captured_at), segment: offer.segment, ..Took::default() };
        if offer.segment.is_some_and(|reason| !reason.keeps_history()) {
            let mut shared = self.seen.lock();
            shared.memory.clear();
            shared.newest = None;
        }
        if !offer.keep {
            return Ok(took);
        }
        let began = clock.now();
        let decoded = decode(&mut self.pixels);
        let picture = match decoded {
            Ok((w, h)) => {
                look_through(self.camera, &self.pixels, w as usize, h as usize, self.intrinsics.as_ref())
                    .ok_or_else(|| format!("{w}x{h} pixels do not fit the intrinsics"))
            }
            Err(reason) => Err(reason),
        };
        let picture = match picture {
            Ok(picture) => picture,
            Err(reason) => {
                self.intake.frame_failed();
                return Err(SenseError::Frame(reason));
            }
        };
        profile.push("decode", (clock.now() - began).as_millis_f64());
        let pose = self.poses.at(captured_at.as_nanos(), self.config.pose_slack.as_nanos());
        {
            let mut shared = self.seen.lock();
            shared.newest = Some(Newest {
                picture: picture.clone(),
                captured_at,
                odom_from_base: pose,
                settled: self.poses.newest().is_some_and(|(stamp, _)| stamp >= captured_at.as_nanos()),
            });
            if shared.base_from_camera.is_none() {
                shared.base_from_camera = self.tf.lookup(&shared.base_frame, frame_id, Timestamp::ZERO).ok();
            }
        }
        let began = clock.now();
        if let Some(encoded) = self.intake.push(picture, captured_at, pose, self.encoder.as_mut())? {
            profile.push("encode", (clock.now() - began).as_millis_f64());
            took.latent = Some(encoded.info);
            if self.poses.newest().is_none_or(|(stamp, _)| stamp < captured_at.as_nanos()) {
                if self.unsettled.len() == UNSETTLED_MAX {
                    self.unsettled.pop_front();
                }
                self.unsettled.push_back((encoded.info.index, captured_at));
            }
            let stored = self.seen.lock().memory.store(encoded.info, encoded.latent, &encoded.picture);
            took.eviction = stored.map_err(|e| SenseError::Frame(e.to_string()))?;
        }
        Ok(took)
    }
}

impl Senses {
    /// Corrects the poses of frames that came before the odometry of their own time.
    fn settle(&mut self) {
        let Some((known_until, _)) = self.poses.newest() else { return };
        let slack = self.config.pose_slack.as_nanos();
        let mut shared = self.seen.lock();
        while let Some((index, captured_at)) = self.unsettled.front().copied() {
            if captured_at.as_nanos() > known_until {
                break;
            }
            self.unsettled.pop_front();
            if let Some(pose) = self.poses.at(captured_at.as_nanos(), slack) {
                shared.memory.set_pose(index, pose);
            }
        }
        if let Some(newest) = shared.newest.as_mut().filter(|n| !n.settled) {
            let stamp = newest.captured_at.as_nanos();
            newest.settled = stamp <= known_until;
            newest.odom_from_base = self.poses.at(stamp, slack).or(newest.odom_from_base);
        }
    }
}

fn plain(name: &str, fallback: &str) -> String {
    let name = name.trim_start_matches('/');
    if name.is_empty() { fallback.to_owned() } else { name.to_owned() }
}

fn planar(pose: &Isometry3<f64>) -> Pose2 {
    let forward = pose.rotation * nalgebra::Vector3::x();
    Pose2::new(pose.translation.x, pose.translation.y, forward.y.atan2(forward.x))
}

/// Width and height of a JPEG or PNG picture from its header, without decoding it.
fn compressed_size(bytes: &[u8]) -> Option<(u32, u32)> {
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        let number = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        return Some((number(16)?, number(20)?));
    }
    if !bytes.starts_with(&[0xff, 0xd8]) {
        return None;
    }
    let mut at = 2;
    loop {
        // Markers are 0xff (with fill bytes), a code, and a length that includes its own two bytes.
        while *bytes.get(at)? == 0xff && *bytes.get(at + 1)? == 0xff {
            at += 1;
        }
        let (&start, &code) = (bytes.get(at)?, bytes.get(at + 1)?);
        if start != 0xff {
            return None;
        }
        let number = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let is_frame = (0xc0..=0xcf).contains(&code) && ![0xc4, 0xc8, 0xcc].contains(&code);
        if is_frame {
            return Some((u32::from(number(at + 7)?), u32::from(number(at + 5)?)));
        }
        let length = usize::from(number(at + 2)?);
        if length < 2 {
            return None;
        }
        at += 2 + length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::EncodeError;
    use crate::imagine::NoClock;
    use mindseye_bridge::msg::{CompressedImage, Header, Image, Pose, PoseWithCovariance};

    /// A fake encoder: the first byte of the last frame.
    struct FirstByte;

    impl GroupEncoder for FirstByte {
        fn latent_len(&self) -> usize {
            1
        }
        fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
            latent[0] = f32::from(frames[frames.len() - 1].data[0]);
            Ok(())
        }
        fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
            latent[0] = f32::from(frame.data[0]);
            Ok(())
        }
        fn reset(&mut self) {}
    }

    fn senses() -> Senses {
        let config = SensesConfig { keep: Keep::Every(1), capacity: 4, ..SensesConfig::default() };
        Senses::new(config, ModelCamera { width: 4, height: 2, focal_px: Some(2.0) }, Box::new(FirstByte))
    }

    fn image(millis: i64, width: u32, height: u32, value: u8) -> Vec<u8> {
        Image {
            header: Header::new(Timestamp::ZERO + TimeDelta::from_millis(millis), "cam"),
            width,
            height,
            encoding: "rgb8".into(),
            step: width * 3,
            data: vec![value; (width * height * 3) as usize],
            ..Image::default()
        }
        .encode()
    }

    fn odometry(millis: i64, x: f64) -> Vec<u8> {
        Odometry {
            header: Header::new(Timestamp::ZERO + TimeDelta::from_millis(millis), "odom"),
            child_frame_id: "base_footprint".into(),
            pose: PoseWithCovariance {
                pose: Pose::from_pose2(Pose2::new(x, 0.0, 0.5)),
                ..PoseWithCovariance::default()
            },
            ..Odometry::default()
        }
        .encode()
    }

    fn take(senses: &mut Senses, sense: Sense, cdr: &[u8]) -> Result<Took, SenseError> {
        senses.take(sense, cdr, &NoClock, &mut Profile::default())
    }

    #[test]
    fn frames_become_latents_with_poses() {
        let mut s = senses();
        assert!(s.seen().scene().is_none(), "nothing was seen yet");
        for i in 0..4 {
            take(&mut s, Sense::Odometry, &odometry(100 * i, i as f64)).unwrap();
            let took = take(&mut s, Sense::Image, &image(100 * i + 50, 8, 4, i as u8)).unwrap();
            assert_eq!(took.frame, Some(Timestamp::ZERO + TimeDelta::from_millis(100 * i + 50)));
            assert_eq!(took.latent.is_some(), i == 3);
        }
        let scene = s.seen().scene().unwrap();
        assert_eq!(scene.memory.len(), 1);
        assert_eq!(scene.memory[0].latent, [3.0]);
        assert_eq!((scene.odom_frame.as_str(), scene.base_frame.as_str()), ("odom", "base_footprint"));
        let pose = scene.odom_from_base.unwrap();
        assert!((pose.x - 3.0).abs() < 1e-9 && (pose.yaw - 0.5).abs() < 1e-9);
        // A changed size starts a new segment and forgets.
        let took = take(&mut s, Sense::Image, &image(500, 16, 8, 9)).unwrap();
        assert!(matches!(took.segment, Some(SegmentReason::Resolution { .. })));
        assert_eq!(s.seen().latents(), 0);
        // So does a clock that goes back.
        let took = take(&mut s, Sense::Image, &image(100, 16, 8, 9)).unwrap();
        assert!(matches!(took.segment, Some(SegmentReason::ClockBackwards { .. })));
    }

    #[test]
    fn odometry_that_comes_late_is_heeded() {
        let mut s = senses();
        take(&mut s, Sense::Odometry, &odometry(0, 0.0)).unwrap();
        for i in 1..=4 {
            take(&mut s, Sense::Image, &image(100 * i, 8, 4, 0)).unwrap();
            take(&mut s, Sense::Odometry, &odometry(100 * i, i as f64)).unwrap();
        }
        let scene = s.seen().scene().unwrap();
        assert_eq!(scene.memory[0].info.odom_from_base.unwrap().x, 4.0, "not the pose of 100 ms before");
        assert_eq!(scene.odom_from_base.unwrap().x, 4.0);
    }

    #[test]
    fn broken_messages_are_counted_and_the_next_one_works() {
        let mut s = senses();
        for sense in
            [Sense::Image, Sense::Compressed, Sense::CameraInfo, Sense::Odometry, Sense::Tf, Sense::TfStatic]
        {
            for bytes in [&b""[..], b"\0\x01\0\0", b"\0\x01\0\0garbage that is no message at all ....."] {
                assert!(
                    take(&mut s, sense, bytes).is_err() || sense == Sense::Tf || sense == Sense::TfStatic
                );
            }
        }
        let mut lies = image(0, 8, 4, 1);
        lies.truncate(lies.len() - 10);
        assert!(take(&mut s, Sense::Image, &lies).is_err());
        let uncalibrated = CameraInfo::default().encode();
        let error = take(&mut s, Sense::CameraInfo, &uncalibrated).unwrap_err();
        assert!(error.to_string().contains("uncalibrated"), "{error}");
        let short = Image {
            header: Header::new(Timestamp(5), "cam"),
            width: 8,
            height: 4,
            encoding: "rgb8".into(),
            step: 24,
            data: vec![0; 5],
            ..Image::default()
        };
        assert!(take(&mut s, Sense::Image, &short.encode()).is_err());
        assert_eq!(s.counts().failed, 1);
        assert!(take(&mut s, Sense::Image, &image(10, 8, 4, 1)).is_ok());
        // A second camera topic is ignored, not mixed in.
        let png = RgbImage::filled(8, 4, [7; 3]).to_png().unwrap();
        let compressed =
            CompressedImage { header: Header::new(Timestamp(99), "cam"), format: "png".into(), data: png };
        assert_eq!(take(&mut s, Sense::Compressed, &compressed.encode()).unwrap(), Took::default());
        assert_eq!(s.ignored(), 1);
    }

    #[test]
    fn sizes_are_read_from_headers() {
        let png = RgbImage::filled(9, 5, [7; 3]).to_png().unwrap();
        let jpeg = [
            &[0xff, 0xd8, 0xff, 0xe0, 0, 4, 1, 2][..],
            &[0xff, 0xc0, 0, 11, 8, 0x01, 0x80, 0x02, 0x00, 1, 0, 0, 0],
        ]
        .concat();
        type Size = Option<(u32, u32)>;
        let cases: [(&[u8], Size); 6] = [
            (&png, Some((9, 5))),
            (&jpeg, Some((512, 384))),
            (&jpeg[..10], None),
            (&[0xff, 0xd8, 0xff, 0xe0, 0, 0], None),
            (b"GIF89a", None),
            (b"", None),
        ];
        for (i, (bytes, want)) in cases.into_iter().enumerate() {
            assert_eq!(compressed_size(bytes), want, "case {i}");
        }
    }
}
