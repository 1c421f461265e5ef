//! From ROS messages to memory: what one robot's topics say, in the order in which they come.
//!
//! The same code serves a live robot, a bag and the tests: it takes CDR bytes and reads no clock (durations are
//! measured with the injected one). Frames that subsampling leaves out are not decoded.

use crate::context::{
    ContextCounts, ContextIntake, ContextLatent, ContextMemory, EncodeError, Eviction, FrameSampler,
    GroupEncoder, Keep, LatentInfo, SegmentReason, StoreError,
};
use crate::frames::{self, BaseFrames};
use crate::ground::Scene;
use crate::image::{Lens, Misfit, ModelCamera, RgbImage};
use crate::imagine::Clock;
use crate::planar::{OdometryNoise, Pose2, PoseHistory};
use crate::profile::Profile;
use crate::served::shared::Others;
use crate::stamps::{StampFault, Stamps};
use crate::study::{FullFrame, Studied, Study, StudyResults, camera_of};
use crate::watch::{CameraFault, CameraWatch, MotionFault, MotionWatch};
use mindseye_bridge::camera::{CameraIntrinsics, IntrinsicsError};
use mindseye_bridge::cdr::CdrError;
use mindseye_bridge::geometry::{PoseError, TfError, TfTree, planar_pose};
use mindseye_bridge::image::{
    ImageError, Limits, PixelKind, RawImage, Size, compressed_size, decode_compressed_rgb8, decode_raw_rgb8,
    pixel_kind,
};
use mindseye_bridge::msg::{
    CameraInfo, CompressedImageView, HeaderView, ImageView, Odometry, RosType, TFMessage,
};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::plucker::Intrinsics;
use mindseye_landmarks::Camera;
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

impl Sense {
    /// All of them; what pictures need comes before pictures.
    pub const ALL: [Self; 6] =
        [Self::TfStatic, Self::CameraInfo, Self::Odometry, Self::Tf, Self::Image, Self::Compressed];
}

/// Whether the messages are pictures.
pub fn is_camera(sense: Sense) -> bool {
    matches!(sense, Sense::Image | Sense::Compressed)
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
    /// Width and height in which frames are kept as well, for a model that reads depth from them.
    pub detail: Option<(usize, usize)>,
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
    /// What odometry is known to be off.
    pub odometry_noise: OdometryNoise,
    /// Mounting used when tf does not know it, `base_from_camera` (optical).
    pub base_from_camera: Option<Isometry3<f64>>,
    /// A camera whose pixels do not change, or whose stamps do not advance, for longer is frozen; zero: never.
    pub frozen_after: TimeDelta,
    /// The frame in which memories are shared with other robots; empty: they are not.
    pub share: String,
}

impl Default for SensesConfig {
    fn default() -> Self {
        Self {
            keep: Keep::Every(3),
            capacity: 64,
            recent: 2,
            detail: None,
            max_gap: TimeDelta::from_millis(2000),
            pose_slack: TimeDelta::from_millis(250),
            odom_frame: "odom".into(),
            base_frame: "base_link".into(),
            intrinsics: None,
            odometry_noise: OdometryNoise::default(),
            base_from_camera: None,
            frozen_after: TimeDelta::from_millis(5000),
            share: String::new(),
        }
    }
}

/// What became of a message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
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
    #[error("{sense:?}: {source}")]
    Message {
        /// Which topic.
        sense: Sense,
        /// What is wrong.
        source: CdrError,
    },
    /// The numbers of odometry are no pose.
    #[error("odometry: {0}")]
    Pose(#[from] PoseError),
    /// A transform was refused; the others of its message are used.
    #[error("transforms: {0}")]
    Transform(#[from] TfError),
    /// The calibration cannot be used.
    #[error(transparent)]
    Intrinsics(#[from] IntrinsicsError),
    /// The picture cannot be decoded.
    #[error("camera frame: {0}")]
    Picture(#[from] ImageError),
    /// The picture does not suit the calibration.
    #[error("camera frame: {0}")]
    Misfit(#[from] Misfit),
    /// The encoder failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The latent does not fit the memory.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is wrong with the senses, though messages come. Nothing: all `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SenseFaults {
    /// The camera is frozen: what it shows does not count.
    pub camera: Option<CameraFault>,
    /// Odometry and pictures contradict each other.
    pub motion: Option<MotionFault>,
    /// Stamps of the camera were replaced.
    pub camera_stamps: Option<StampFault>,
    /// Stamps of odometry were replaced.
    pub odometry_stamps: Option<StampFault>,
}

impl SenseFaults {
    /// A sentence for each.
    pub fn sentences(&self) -> Vec<String> {
        let camera = self.camera.map(|f| f.to_string());
        let motion = self.motion.map(|f| f.to_string());
        let stamps = [self.camera_stamps, self.odometry_stamps].map(|f| f.map(|f| f.to_string()));
        [camera, motion].into_iter().chain(stamps).flatten().collect()
    }
}

/// The newest kept frame.
#[derive(Clone, Debug)]
struct Newest {
    picture: RgbImage,
    captured_at: Timestamp,
    /// In the pixels of which the model reads depth, where it does.
    detail: Option<RgbImage>,
    odom_from_base: Option<Pose2>,
    /// Odometry of its own time has come.
    settled: bool,
    /// Of the picture.
    intrinsics: Option<Intrinsics>,
}

/// What a goal can see: shared between the thread that fills it and the one that asks.
#[derive(Debug)]
pub struct Shared {
    memory: ContextMemory,
    newest: Option<Newest>,
    odom_frame: String,
    base_frame: String,
    base_from_camera: Option<Isometry3<f64>>,
    odometry_noise: OdometryNoise,
    study: Option<StudyResults>,
    /// Where odometry is in the frame that is shared with other robots, where that is known.
    frame_from_odom: Option<Pose2>,
    /// What they have seen.
    others: Option<Arc<Mutex<Others>>>,
}

/// A handle on the context: what was seen.
#[derive(Clone, Debug)]
pub struct ContextHandle(Arc<Mutex<Shared>>);

impl ContextHandle {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        // What a panicking holder left behind is whole: every change is one store.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of everything, for one goal; `None` before the first frame.
    pub fn scene(&self) -> Option<Scene> {
        let shared = self.lock();
        let newest = shared.newest.clone()?;
        let study = shared.study.clone();
        let others = shared.others.clone().zip(shared.frame_from_odom);
        let mut scene = Scene {
            memory: shared.memory.snapshot(),
            newest: newest.picture,
            newest_detail: newest.detail,
            captured_at: newest.captured_at,
            odom_from_base: newest.odom_from_base,
            odom_frame: shared.odom_frame.clone(),
            base_frame: shared.base_frame.clone(),
            base_from_camera: shared.base_from_camera,
            odometry_noise: shared.odometry_noise,
            intrinsics: newest.intrinsics,
            studied: Studied::default(),
        };
        drop(shared);
        if let Some(study) = study {
            scene.studied = study.studied();
        }
        if let Some((others, frame_from_odom)) = others {
            mindseye_base::sync::lock(&others).join(&mut scene, frame_from_odom);
        }
        Some(scene)
    }

    /// What becomes of frames that are studied in full; `None` where none are.
    pub fn study(&self) -> Option<StudyResults> {
        self.lock().study.clone()
    }

    /// Latents held now.
    pub fn latents(&self) -> usize {
        self.lock().memory.len()
    }

    /// Joins what other robots have seen to every scene from now on, while it is known where odometry is in the common frame.
    pub fn join_others(&self, others: Arc<Mutex<Others>>) {
        self.lock().others = Some(others);
    }

    /// Where odometry is in the frame that is shared with other robots; `None` where that is not known, or nothing is shared.
    pub fn frame_from_odom(&self) -> Option<Pose2> {
        self.lock().frame_from_odom
    }

    /// What was remembered after this index, the oldest first, at most so many.
    pub fn seen_after(&self, index: Option<u64>, at_most: usize) -> Vec<ContextLatent> {
        let shared = self.lock();
        let is_new = |i: &usize| {
            let info = shared.memory.info(*i);
            info.is_some_and(|info| index.is_none_or(|index| info.index > index))
        };
        let new = (0..shared.memory.len()).filter(is_new);
        new.filter_map(|i| shared.memory.copy(i)).take(at_most).collect()
    }

    /// Latents evicted so far.
    pub fn evicted(&self) -> u64 {
        self.lock().memory.evicted()
    }
}

/// One robot's senses.
pub struct Senses {
    config: SensesConfig,
    lens: Lens,
    /// Looks in the pixels of which the model reads depth, and what it saw last.
    detail: Option<(Lens, RgbImage)>,
    encoder: Box<dyn GroupEncoder + Send>,
    intake: ContextIntake,
    context: ContextHandle,
    poses: PoseHistory,
    /// The same in space.
    poses_in_space: PoseHistory<Isometry3<f64>>,
    study: Option<Study>,
    /// Frames to be studied that wait for the odometry of their time.
    waiting: VecDeque<Waiting>,
    tf: TfTree,
    base: BaseNames,
    stamps: Stamps,
    camera_watch: CameraWatch,
    motion_watch: MotionWatch,
    /// The newest stamp of the camera, kept or not.
    newest_frame: Option<Timestamp>,
    camera_frame: String,
    faults: SenseFaults,
    intrinsics: Option<CameraIntrinsics>,
    camera_topic: Option<Sense>,
    pixels: Vec<u8>,
    /// The newest kept frame at the model's size.
    picture: RgbImage,
    /// Edges of tf when the camera's mounting was looked for in vain.
    mounting_sought: Option<usize>,
    ignored: u64,
    /// Latents whose odometry had not come when they were stored: index and stamp.
    unsettled: VecDeque<(u64, Timestamp)>,
}

/// Where the base's pose comes from, and the names of its frames.
#[derive(Debug)]
struct BaseNames {
    configured: BaseFrames,
    /// As odometry's messages name them; the topic is a better source than tf, which may carry the same poses late.
    of_topic: Option<BaseFrames>,
    /// As tf names them, for robots without a topic of odometry.
    of_tf: Option<BaseFrames>,
    /// Edges of tf, and whether the camera's frame was known, when the names were looked for.
    looked_at: Option<(usize, bool)>,
}

/// A camera message before its pixels are decoded.
struct Frame<'a> {
    sense: Sense,
    header: HeaderView<'a>,
    size: Size,
    received_at: Timestamp,
}

/// Puts a picture's RGB bytes into a buffer.
type Decode<'a> = dyn FnMut(&mut Vec<u8>) -> Result<Size, ImageError> + 'a;

/// Latents that wait for their odometry.
const UNSETTLED_MAX: usize = 16;
/// Full frames that wait for their odometry.
const WAITING_MAX: usize = 4;

/// A frame to be studied.
struct Waiting {
    rgb: Vec<u8>,
    size: (usize, usize),
    captured_at: Timestamp,
    camera: Camera,
}

impl Senses {
    /// Senses for a model that looks through `camera`. All memory of the context is taken here.
    pub fn new(config: SensesConfig, camera: ModelCamera, encoder: Box<dyn GroupEncoder + Send>) -> Self {
        let latent_len = encoder.latent_len();
        let (size, detail) = ((camera.width, camera.height), config.detail);
        let memory = ContextMemory::new(config.capacity, config.recent, latent_len, size, detail);
        let detail = detail.map(|(width, height)| {
            (Lens::new(camera.resized(width, height)), RgbImage::filled(width, height, [0; 3]))
        });
        let shared = Shared {
            memory,
            newest: None,
            odom_frame: config.odom_frame.clone(),
            base_frame: config.base_frame.clone(),
            base_from_camera: config.base_from_camera,
            odometry_noise: config.odometry_noise,
            study: None,
            frame_from_odom: None,
            others: None,
        };
        let configured = BaseFrames { odom: config.odom_frame.clone(), base: config.base_frame.clone() };
        Self {
            intake: ContextIntake::new(FrameSampler::new(config.keep, config.max_gap), latent_len),
            context: ContextHandle(Arc::new(Mutex::new(shared))),
            poses: PoseHistory::new(4096),
            poses_in_space: PoseHistory::new(4096),
            study: None,
            waiting: VecDeque::new(),
            tf: TfTree::new(),
            base: BaseNames { configured, of_topic: None, of_tf: None, looked_at: None },
            stamps: Stamps::default(),
            camera_watch: CameraWatch::new(config.frozen_after),
            motion_watch: MotionWatch::default(),
            newest_frame: None,
            camera_frame: String::new(),
            faults: SenseFaults::default(),
            intrinsics: config.intrinsics.clone(),
            camera_topic: None,
            pixels: Vec::new(),
            picture: RgbImage::filled(camera.width, camera.height, [0; 3]),
            mounting_sought: None,
            ignored: 0,
            unsettled: VecDeque::with_capacity(UNSETTLED_MAX),
            config,
            lens: Lens::new(camera),
            detail,
            encoder,
        }
    }

    /// With kept frames studied in full.
    #[must_use]
    pub fn with_study(mut self, study: Study) -> Self {
        self.context.lock().study = Some(study.results());
        self.study = Some(study);
        self
    }

    /// A handle for goals.
    pub fn context(&self) -> ContextHandle {
        self.context.clone()
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

    /// The newest kept frame, as the model looks at it; black before the first one.
    pub fn picture(&self) -> &RgbImage {
        &self.picture
    }

    /// What is wrong at present.
    pub fn faults(&self) -> SenseFaults {
        let (camera, motion) = (self.camera_watch.fault(), self.motion_watch.fault());
        SenseFaults { camera, motion, ..self.faults }
    }

    /// Takes one message, as CDR, that was received (in a bag: logged) at `received_at`.
    ///
    /// # Errors
    /// [`SenseError`]; the message is dropped (a frame is counted as failed) and the next one can be taken.
    pub fn take(
        &mut self,
        sense: Sense,
        cdr: &[u8],
        received_at: Timestamp,
        clock: &dyn Clock,
        profile: &mut Profile,
    ) -> Result<Outcome, SenseError> {
        let outcome = self.take_message(sense, cdr, received_at, clock, profile);
        self.hand_over(clock, false);
        outcome
    }

    /// Nothing comes any more: frames that still wait for odometry are studied with the nearest there is.
    pub fn finish(&mut self, clock: &dyn Clock) {
        self.hand_over(clock, true);
    }

    fn take_message(
        &mut self,
        sense: Sense,
        cdr: &[u8],
        received_at: Timestamp,
        clock: &dyn Clock,
        profile: &mut Profile,
    ) -> Result<Outcome, SenseError> {
        let unread = |source| SenseError::Message { sense, source };
        match sense {
            Sense::Image => {
                let image = ImageView::decode(cdr).map_err(unread)?;
                let raw = RawImage::from(&image);
                let mut decode = |out: &mut Vec<u8>| decode_raw_rgb8(&raw, &Limits::default(), out);
                if pixel_kind(image.encoding) < PixelKind::Grey {
                    // Such a topic is not the camera, and must not keep another one from being it.
                    decode(&mut self.pixels)?;
                }
                let size = Size { width: image.width, height: image.height };
                let frame = Frame { sense, header: image.header, size, received_at };
                self.frame(&frame, clock, profile, &mut decode)
            }
            Sense::Compressed => {
                let image = CompressedImageView::decode(cdr).map_err(unread)?;
                let mut decode =
                    |out: &mut Vec<u8>| decode_compressed_rgb8(image.data, &Limits::default(), out);
                let size = match compressed_size(image.data) {
                    Some(size) => size,
                    None => decode(&mut self.pixels)?,
                };
                let frame = Frame { sense, header: image.header.clone(), size, received_at };
                self.frame(&frame, clock, profile, &mut decode)
            }
            Sense::CameraInfo => {
                let info = CameraInfo::decode(cdr).map_err(unread)?;
                self.intrinsics = Some(CameraIntrinsics::from_camera_info(&info)?);
                Ok(Outcome::default())
            }
            Sense::Odometry => {
                self.odometry(&Odometry::decode(cdr).map_err(unread)?, received_at)?;
                Ok(Outcome::default())
            }
            Sense::Tf | Sense::TfStatic => {
                let message = TFMessage::decode(cdr).map_err(unread)?;
                self.transforms(&message, sense == Sense::TfStatic, received_at)?;
                Ok(Outcome::default())
            }
        }
    }

    fn frame(
        &mut self,
        frame: &Frame<'_>,
        clock: &dyn Clock,
        profile: &mut Profile,
        decode: &mut Decode<'_>,
    ) -> Result<Outcome, SenseError> {
        if *self.camera_topic.get_or_insert(frame.sense) != frame.sense {
            self.ignored += 1;
            return Ok(Outcome::default());
        }
        let (captured_at, fault) = self.stamps.camera(frame.header.stamp.timestamp(), frame.received_at);
        note(&mut self.faults.camera_stamps, fault);
        let size = (frame.size.width, frame.size.height);
        let offer = self.intake.offer(captured_at, size, self.encoder.as_mut());
        self.camera_watch.frame(frame.received_at, !offer.late && self.newest_frame != Some(captured_at));
        if !offer.late {
            self.newest_frame = Some(captured_at);
        }
        let mut outcome = Outcome { frame: Some(captured_at), segment: offer.segment, ..Outcome::default() };
        if let (Some(study), Some(reason)) = (&mut self.study, offer.segment) {
            study.segment(reason);
        }
        if offer.segment.is_some_and(|reason| !reason.keeps_history()) {
            self.waiting.clear();
            let mut shared = self.context.lock();
            shared.memory.clear();
            shared.newest = None;
        }
        if !offer.keep {
            return Ok(outcome);
        }
        let began = clock.now();
        self.look(decode).inspect_err(|_| self.intake.frame_failed())?;
        profile.push("decode", (clock.now() - began).as_millis_f64());
        self.camera_watch.pixels(captured_at, &self.pixels);
        let pose = self.poses.at(captured_at.as_nanos(), self.config.pose_slack.as_nanos());
        self.motion_watch.frame(captured_at, pose, &self.picture);
        self.show(captured_at, pose, frame.header.frame_id);
        self.wait_for_pose(captured_at, (size.0 as usize, size.1 as usize));
        let began = clock.now();
        if let Some(encoded) = self.intake.push(&self.picture, captured_at, pose, self.encoder.as_mut())? {
            profile.push("encode", (clock.now() - began).as_millis_f64());
            outcome.latent = Some(encoded.info);
            if self.poses.newest().is_none_or(|(stamp, _)| stamp < captured_at.as_nanos()) {
                if self.unsettled.len() == UNSETTLED_MAX {
                    self.unsettled.pop_front();
                }
                self.unsettled.push_back((encoded.info.index, captured_at));
            }
            let detail = self.detail.as_ref().map(|(_, picture)| picture);
            let mut shared = self.context.lock();
            outcome.eviction = shared.memory.store(encoded.info, encoded.latent, encoded.picture, detail)?;
        }
        Ok(outcome)
    }

    /// Keeps a copy of a frame that is to be studied until the odometry of its time has come.
    fn wait_for_pose(&mut self, captured_at: Timestamp, size: (usize, usize)) {
        let Some(study) = self.study.as_mut().filter(|study| study.wants(captured_at)) else { return };
        let camera = match &self.intrinsics {
            Some(known) => camera_of(known, size).map_err(|e| e.to_string()),
            None => Err("camera: no intrinsics: neither landmarks nor things can be placed; publish camera_info, or give \
                         [camera] in the configuration"
                .into()),
        };
        let camera = match camera {
            Ok(camera) => camera,
            Err(fault) => return study.without_intrinsics(|| fault),
        };
        study.promised(captured_at);
        if self.waiting.len() >= WAITING_MAX
            && let Some(oldest) = self.waiting.pop_front()
        {
            study.without_pose();
            study.recycle(oldest.rgb);
        }
        let mut rgb = study.buffer();
        rgb.clone_from(&self.pixels);
        self.waiting.push_back(Waiting { rgb, size, captured_at, camera });
    }

    /// Has those frames studied whose odometry has come; at the end all.
    fn hand_over(&mut self, clock: &dyn Clock, at_the_end: bool) {
        let Some(study) = &mut self.study else { return };
        let known_until = self.poses_in_space.newest().map(|(stamp, _)| stamp);
        let come = |w: &Waiting| at_the_end || known_until.is_some_and(|t| t >= w.captured_at.as_nanos());
        while let Some(Waiting { rgb, size, captured_at, camera }) = self.waiting.pop_front_if(|w| come(w)) {
            let slack = self.config.pose_slack.as_nanos();
            let pose = self.poses_in_space.at(captured_at.as_nanos(), slack);
            let mounting = self.context.lock().base_from_camera;
            let Some((odom_from_base, base_from_camera)) = pose.zip(mounting) else {
                study.without_pose();
                study.recycle(rgb);
                continue;
            };
            let odom_from_camera = odom_from_base * base_from_camera;
            study.offer(FullFrame { rgb, size, captured_at, camera, odom_from_camera }, clock);
        }
    }

    /// Decodes a frame and looks at it with the model's camera.
    fn look(&mut self, decode: &mut Decode<'_>) -> Result<(), SenseError> {
        let Size { width, height } = decode(&mut self.pixels)?;
        let (width, height) = (width as usize, height as usize);
        self.lens.look(&self.pixels, width, height, self.intrinsics.as_ref(), &mut self.picture)?;
        if let Some((lens, picture)) = &mut self.detail {
            lens.look(&self.pixels, width, height, self.intrinsics.as_ref(), picture)?;
        }
        Ok(())
    }

    /// Shows goals the newest frame.
    fn show(&mut self, captured_at: Timestamp, odom_from_base: Option<Pose2>, frame_id: &str) {
        if self.camera_frame != frame_id {
            frame_id.clone_into(&mut self.camera_frame);
            self.mounting_sought = None;
        }
        let settled = self.poses.newest().is_some_and(|(stamp, _)| stamp >= captured_at.as_nanos());
        let mut shared = self.context.lock();
        match &mut shared.newest {
            Some(newest) => {
                newest.picture.copy_from(&self.picture);
                if let (Some(newest), Some((_, picture))) = (&mut newest.detail, &self.detail) {
                    newest.copy_from(picture);
                }
                (newest.captured_at, newest.odom_from_base, newest.settled) =
                    (captured_at, odom_from_base, settled);
            }
            none => {
                let detail = self.detail.as_ref().map(|(_, picture)| picture.clone());
                let (picture, intrinsics) = (self.picture.clone(), self.lens.intrinsics());
                *none = Some(Newest { picture, captured_at, detail, odom_from_base, settled, intrinsics });
            }
        }
        if shared.base_from_camera.is_none() {
            let edges = self.tf.edges().count();
            if self.mounting_sought.replace(edges) != Some(edges) {
                shared.base_from_camera = frames::mounting(&self.tf, &shared.base_frame, frame_id);
            }
        }
    }

    fn odometry(&mut self, odometry: &Odometry, received_at: Timestamp) -> Result<(), SenseError> {
        let pose = odometry.pose.pose.isometry()?;
        if self.base.of_topic.is_none() {
            self.base.of_topic = Some(BaseFrames {
                odom: plain(&odometry.header.frame_id, &self.config.odom_frame),
                base: plain(&odometry.child_frame_id, &self.config.base_frame),
            });
            self.base.looked_at = None;
            self.poses.clear();
            self.poses_in_space.clear();
            self.name_frames();
            self.find_common_frame();
        }
        self.pose_came(odometry.header.stamp.timestamp(), received_at, &pose);
        Ok(())
    }

    fn transforms(
        &mut self,
        message: &TFMessage,
        is_static: bool,
        received_at: Timestamp,
    ) -> Result<(), SenseError> {
        let refused = self.tf.insert_message(message, is_static);
        self.name_frames();
        self.find_common_frame();
        if let (None, Some(found), false) = (&self.base.of_topic, &self.base.of_tf, is_static) {
            let found = found.clone();
            for t in &message.transforms {
                if !frames::moves(&self.tf, &found, &t.child_frame_id) {
                    continue;
                }
                let stamp = t.header.stamp.timestamp();
                // Other transforms between the two may not have come that far.
                let pose = self
                    .tf
                    .lookup(&found.odom, &found.base, stamp)
                    .or_else(|_| self.tf.lookup(&found.odom, &found.base, Timestamp::ZERO));
                if let Ok(pose) = pose {
                    self.pose_came(stamp, received_at, &pose);
                }
            }
        }
        match refused.into_iter().next() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    fn pose_came(&mut self, stamp: Timestamp, received_at: Timestamp, odom_from_base: &Isometry3<f64>) {
        let (at, fault) = self.stamps.odometry(stamp, received_at);
        note(&mut self.faults.odometry_stamps, fault);
        self.poses.push(at.as_nanos(), planar_pose(odom_from_base));
        self.poses_in_space.push(at.as_nanos(), *odom_from_base);
        self.settle();
    }

    /// Finds out where odometry is in the frame that is shared with other robots: the newest that tf says of it.
    fn find_common_frame(&mut self) {
        if self.config.share.is_empty() {
            return;
        }
        let mut shared = self.context.lock();
        let is_odometry = plain(&self.config.share, "") == plain(&shared.odom_frame, "");
        shared.frame_from_odom = match is_odometry {
            true => Some(Pose2::default()),
            false => self
                .tf
                .lookup(&self.config.share, &shared.odom_frame, Timestamp::ZERO)
                .ok()
                .as_ref()
                .map(planar_pose),
        };
    }

    /// Finds out how the robot calls odometry's frame and the base, when more of it is known than before.
    fn name_frames(&mut self) {
        let camera = Some(self.camera_frame.as_str()).filter(|name| !name.is_empty());
        let known = (self.tf.edges().count(), camera.is_some());
        if self.base.looked_at.replace(known) == Some(known) {
            return;
        }
        let names = match &self.base.of_topic {
            Some(named) => {
                // A topic without a prefix beside transforms with one.
                let near = camera.unwrap_or(&named.base);
                let in_tree =
                    |name: &str| frames::in_tree(&self.tf, name, near).unwrap_or_else(|| name.into());
                Some(BaseFrames { odom: in_tree(&named.odom), base: in_tree(&named.base) })
            }
            None => {
                let found = frames::find(&self.tf, &self.base.configured, camera);
                if found != self.base.of_tf {
                    self.poses.clear();
                    self.poses_in_space.clear();
                    self.base.of_tf.clone_from(&found);
                }
                found
            }
        };
        if let Some(BaseFrames { odom, base }) = names {
            let mut shared = self.context.lock();
            (shared.odom_frame, shared.base_frame) = (odom, base);
            self.mounting_sought = None;
        }
    }
}

/// Remembers the first fault of its kind, and says it once.
fn note(known: &mut Option<StampFault>, fault: Option<StampFault>) {
    if known.is_none()
        && let Some(fault) = fault
    {
        tracing::warn!("{fault}");
        *known = Some(fault);
    }
}

impl Senses {
    /// Corrects the poses of frames that came before the odometry of their own time.
    fn settle(&mut self) {
        let Some((known_until, _)) = self.poses.newest() else { return };
        let slack = self.config.pose_slack.as_nanos();
        let mut shared = self.context.lock();
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

    fn at(millis: i64) -> Timestamp {
        Timestamp::ZERO + TimeDelta::from_millis(millis)
    }

    fn image(millis: i64, width: u32, height: u32, value: u8) -> Vec<u8> {
        Image {
            header: Header::new(at(millis), "cam"),
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
            header: Header::new(at(millis), "odom"),
            child_frame_id: "base_footprint".into(),
            pose: PoseWithCovariance {
                pose: Pose::from_pose2(Pose2::new(x, 0.0, 0.5)),
                ..PoseWithCovariance::default()
            },
            ..Odometry::default()
        }
        .encode()
    }

    fn take(senses: &mut Senses, sense: Sense, cdr: &[u8]) -> Result<Outcome, SenseError> {
        take_at(senses, sense, cdr, Timestamp::ZERO)
    }

    fn take_at(
        senses: &mut Senses,
        sense: Sense,
        cdr: &[u8],
        received_at: Timestamp,
    ) -> Result<Outcome, SenseError> {
        senses.take(sense, cdr, received_at, &NoClock, &mut Profile::default())
    }

    #[test]
    fn frames_become_latents_with_poses() {
        let mut s = senses();
        assert!(s.context().scene().is_none(), "nothing was seen yet");
        for i in 0..4 {
            take(&mut s, Sense::Odometry, &odometry(100 * i, i as f64)).unwrap();
            let outcome = take(&mut s, Sense::Image, &image(100 * i + 50, 8, 4, i as u8)).unwrap();
            assert_eq!(outcome.frame, Some(at(100 * i + 50)));
            assert_eq!(outcome.latent.is_some(), i == 3);
        }
        let scene = s.context().scene().unwrap();
        assert_eq!(scene.memory.len(), 1);
        assert_eq!(scene.memory[0].latent, [3.0]);
        assert_eq!((scene.odom_frame.as_str(), scene.base_frame.as_str()), ("odom", "base_footprint"));
        let pose = scene.odom_from_base.unwrap();
        assert!((pose.x - 3.0).abs() < 1e-9 && (pose.yaw - 0.5).abs() < 1e-9);
        // A changed size starts a new segment and forgets, once a second frame has it.
        let outcome = take(&mut s, Sense::Image, &image(5000, 16, 8, 9)).unwrap();
        assert_eq!((outcome.segment, s.context().latents()), (None, 1));
        let outcome = take(&mut s, Sense::Image, &image(5100, 16, 8, 9)).unwrap();
        assert!(matches!(outcome.segment, Some(SegmentReason::Resolution { .. })));
        assert_eq!(s.context().latents(), 0);
        // So does a clock that goes back.
        take(&mut s, Sense::Image, &image(100, 16, 8, 9)).unwrap();
        let outcome = take(&mut s, Sense::Image, &image(200, 16, 8, 9)).unwrap();
        assert!(matches!(outcome.segment, Some(SegmentReason::ClockBackwards { .. })));
        assert_eq!(s.counts().late, 2);
    }

    #[test]
    fn one_frame_out_of_order_costs_one_frame() {
        let mut s = senses();
        for (i, millis) in [100, 200, 300, 400, 600, 500, 700, 800, 900].into_iter().enumerate() {
            let outcome = take(&mut s, Sense::Image, &image(millis, 8, 4, i as u8)).unwrap();
            assert_eq!(outcome.segment.is_some(), i == 0, "{millis}");
        }
        assert_eq!((s.counts().late, s.counts().kept, s.context().latents()), (1, 8, 2));
    }

    #[test]
    fn frames_without_stamps_find_their_pose() {
        let mut s = senses();
        for i in 1..=8 {
            let now = at(100 * i);
            take_at(&mut s, Sense::Odometry, &odometry(100 * i, i as f64), now).unwrap();
            let outcome = take_at(&mut s, Sense::Image, &image(0, 8, 4, i as u8), now).unwrap();
            assert_eq!(outcome.frame, Some(now));
        }
        let scene = s.context().scene().unwrap();
        assert_eq!((scene.memory.len(), scene.memory[1].info.odom_from_base.unwrap().x), (2, 8.0));
        let said = s.faults().sentences();
        assert_eq!(said, ["camera frames carry no stamp; the time of reception is used instead"]);
    }

    #[test]
    fn stamps_since_boot_find_their_pose() {
        let mut s = senses();
        let boot = 1_700_000_000_000;
        for i in 1..=8 {
            let now = at(boot + 100 * i);
            take_at(&mut s, Sense::Odometry, &odometry(boot + 100 * i, i as f64), now).unwrap();
            take_at(&mut s, Sense::Image, &image(40_000 + 100 * i, 8, 4, i as u8), now).unwrap();
        }
        let scene = s.context().scene().unwrap();
        assert_eq!(
            (scene.captured_at, scene.memory[1].info.odom_from_base.unwrap().x),
            (at(boot + 800), 8.0)
        );
        assert!(matches!(s.faults().camera_stamps, Some(StampFault::CameraClock { .. })));
    }

    #[test]
    fn a_frozen_camera_is_noticed() {
        let mut s = senses();
        for i in 0..=51 {
            take_at(&mut s, Sense::Image, &image(1000 + 100 * i, 8, 4, 7), at(1000 + 100 * i)).unwrap();
            assert_eq!(s.faults().camera.is_some(), i > 50, "frame {i}");
        }
        take_at(&mut s, Sense::Image, &image(6200, 8, 4, 8), at(6200)).unwrap();
        assert_eq!(s.faults().camera, None);
        // The same stamp again and again, whatever the pixels.
        for i in 1..=51 {
            take_at(&mut s, Sense::Image, &image(6200, 8, 4, i as u8), at(6200 + 100 * i)).unwrap();
            let limit = TimeDelta::from_millis(5000);
            let want = Some(CameraFault::FrozenStamps { limit }).filter(|_| i > 50);
            assert_eq!(s.faults().camera, want, "frame {i}");
        }
    }

    #[test]
    fn dead_odometry_is_named() {
        let mut s = senses();
        for i in 0..60 {
            take_at(&mut s, Sense::Odometry, &odometry(100 * i, 1.0), at(100 * i)).unwrap();
            take_at(&mut s, Sense::Image, &image(100 * i + 1, 8, 4, 4 * i as u8), at(100 * i)).unwrap();
        }
        assert_eq!(s.faults().motion, Some(MotionFault::OdometryStands));
    }

    #[test]
    fn a_depth_image_does_not_become_the_camera() {
        let mut s = senses();
        let depth = Image {
            header: Header::new(at(100), "depth"),
            width: 8,
            height: 4,
            encoding: "16UC1".into(),
            step: 16,
            data: vec![0; 64],
            ..Image::default()
        };
        let error = take(&mut s, Sense::Image, &depth.encode()).unwrap_err();
        assert!(error.to_string().contains("\"16UC1\" is depth"), "{error}");
        let png = RgbImage::filled(8, 4, [7; 3]).to_png().unwrap();
        let colour = CompressedImage { header: Header::new(at(200), "cam"), format: "png".into(), data: png };
        assert_eq!(take(&mut s, Sense::Compressed, &colour.encode()).unwrap().frame, Some(at(200)));
        assert_eq!((s.ignored(), s.counts().offered), (0, 1));
    }

    /// A message of transforms at 1 m along x, and x along the path for those with stamps.
    fn transforms(millis: i64, edges: &[(&str, &str, f64)]) -> Vec<u8> {
        let transforms = edges
            .iter()
            .map(|(parent, child, x)| {
                let mut t = mindseye_bridge::msg::TransformStamped {
                    header: Header::new(at(millis), *parent),
                    child_frame_id: (*child).into(),
                    ..Default::default()
                };
                t.transform.translation.x = *x;
                t.transform.rotation.w = 1.0;
                t
            })
            .collect();
        TFMessage { transforms }.encode()
    }

    #[test]
    fn a_robot_with_prefixed_frames_and_no_topic_of_odometry() {
        let mut s = senses();
        let fixed = transforms(
            1,
            &[("robot1/base_footprint", "robot1/base_link", 0.0), ("robot1/base_link", "robot1/cam", 0.2)],
        );
        take(&mut s, Sense::TfStatic, &fixed).unwrap();
        for i in 1..=4 {
            let moving = transforms(100 * i, &[("robot1/odom", "robot1/base_footprint", i as f64)]);
            take(&mut s, Sense::Tf, &moving).unwrap();
            // The driver does not know the prefix.
            take(&mut s, Sense::Image, &image(100 * i, 8, 4, 0)).unwrap();
        }
        let scene = s.context().scene().unwrap();
        assert_eq!(
            (scene.odom_frame.as_str(), scene.base_frame.as_str()),
            ("robot1/odom", "robot1/base_link")
        );
        assert_eq!(scene.memory[0].info.odom_from_base.unwrap().x, 4.0);
        assert_eq!(scene.base_from_camera.unwrap().translation.x, 0.2);
    }

    #[test]
    fn odometry_without_a_prefix_beside_transforms_with_one() {
        let mut s = senses();
        take(&mut s, Sense::Odometry, &odometry(50, 1.0)).unwrap();
        let moving =
            transforms(60, &[("r/odom", "r/base_footprint", 1.0), ("r/base_footprint", "r/cam", 0.2)]);
        take(&mut s, Sense::Tf, &moving).unwrap();
        take(&mut s, Sense::Image, &image(60, 8, 4, 0)).unwrap();
        let scene = s.context().scene().unwrap();
        assert_eq!((scene.odom_frame.as_str(), scene.base_frame.as_str()), ("r/odom", "r/base_footprint"));
        assert!(scene.base_from_camera.is_some());
    }

    #[test]
    fn odometry_that_comes_late_is_heeded() {
        let mut s = senses();
        take(&mut s, Sense::Odometry, &odometry(0, 0.0)).unwrap();
        for i in 1..=4 {
            take(&mut s, Sense::Image, &image(100 * i, 8, 4, 0)).unwrap();
            take(&mut s, Sense::Odometry, &odometry(100 * i, i as f64)).unwrap();
        }
        let scene = s.context().scene().unwrap();
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
        assert_eq!(take(&mut s, Sense::Compressed, &compressed.encode()).unwrap(), Outcome::default());
        assert_eq!(s.ignored(), 1);
    }
}
