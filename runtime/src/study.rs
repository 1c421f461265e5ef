//! Kept frames looked at in full: landmarks and a detector's boxes, beside the intake that never waits for them.
//!
//! ```text
//! senses ─► frames that wait for the odometry of their time (few) ─► one place, latest wins ─► thread
//!        thread: features ─► landmarks;  detector ─► boxes ─► things in the map
//! ```
//! A bag is studied in the same order without a thread, so that the same bag gives the same answer. Everything is in the
//! odometry's frame, by full poses (roll, pitch and height included), and is forgotten when these jump.

use crate::config::RobotConfig;
use crate::context::SegmentReason;
use crate::ground::MindSpec;
use crate::imagine::Clock;
use crate::planar::is_jump;
use crate::profile::Profile;
use mindseye_base::scale::Scaler;
use mindseye_base::sync::lock;
use mindseye_bridge::camera::CameraIntrinsics;
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::detector::{Detector, DetectorError};
use mindseye_landmarks::{
    Camera, CameraError, Extractor, ExtractorConfig, Gray, LandmarkMap, MapConfig, MapCounts, MapObject,
    ObjectConfig, ObjectCounts, ObjectMap, SeenBox,
};
use nalgebra::Isometry3;
use serde::Serialize;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What kept frames are studied for. Nothing by default.
#[derive(Clone, Debug, PartialEq)]
pub struct StudyConfig {
    /// Keep landmarks, at most so many (about 2 kB each).
    pub landmarks_max: Option<usize>,
    /// Frames are studied at most this often, each for itself: landmarks, detector.
    pub period: [TimeDelta; 2],
    /// Least score of a box that counts, 0..1.
    pub score_min: f64,
    /// Distance from a thing's middle at which the base stands (metres).
    pub standoff_m: f64,
}

impl Default for StudyConfig {
    fn default() -> Self {
        Self {
            landmarks_max: None,
            period: [TimeDelta::from_millis(100), TimeDelta::from_millis(200)],
            score_min: 0.4,
            standoff_m: 1.2,
        }
    }
}

/// A kept frame as the camera gave it.
#[derive(Clone, Debug)]
pub struct FullFrame {
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
    /// Width and height (pixels).
    pub size: (usize, usize),
    /// When it was taken.
    pub captured_at: Timestamp,
    /// The camera, of this size.
    pub camera: Camera,
    /// Where it was.
    pub odom_from_camera: Isometry3<f64>,
}

/// What became of the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StudyCounts {
    /// Frames studied.
    pub studied: u64,
    /// Frames let go of because a newer one came before they were looked at.
    pub dropped: u64,
    /// Frames of which no pose was known in time: no odometry, or no mounting of the camera.
    pub without_pose: u64,
    /// Frames without intrinsics, or with such as cannot be used.
    pub without_intrinsics: u64,
    /// Frames in which there is nothing to recognise: blurred, dark or without texture.
    pub without_features: u64,
    /// Frames that could not be matched for lack of one from elsewhere: the robot only turned, or stood.
    pub without_baseline: u64,
    /// Frames that the detector saw.
    pub detected: u64,
    /// Frames on which it failed.
    pub detector_failed: u64,
    /// Boxes that it drew.
    pub boxes: u64,
    /// Times that the poses jumped, and everything was forgotten.
    pub jumps: u64,
    /// Landmarks at present.
    pub landmarks: usize,
    /// Things at present.
    pub objects: usize,
}

impl std::fmt::Display for StudyCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} frames studied: {} landmarks, {} things of {} boxes",
            self.studied, self.landmarks, self.objects, self.boxes
        )?;
        for (count, what) in [
            (self.dropped, "dropped"),
            (self.without_pose, "without a pose"),
            (self.without_intrinsics, "without usable intrinsics"),
            (self.without_features, "without features"),
            (self.detector_failed, "failed in the detector"),
            (self.jumps, "jumps of odometry"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

/// What studying has given: a copy, for one goal.
#[derive(Clone, Debug, Default)]
pub struct Studied {
    /// Landmarks, where they are kept.
    pub landmarks: Option<Box<LandmarkMap>>,
    /// Things that the detector saw.
    pub objects: Vec<MapObject>,
    /// Classes that it knows; `None` without a detector.
    pub classes: Option<Arc<[String]>>,
    /// The camera of the newest frame studied, at the size of landmarks.
    pub camera: Option<Camera>,
    /// The size of the camera's own pictures.
    pub source: Option<(usize, usize)>,
    /// What became of the frames.
    pub counts: StudyCounts,
    /// What is wrong with the camera, in words.
    pub fault: Option<String>,
    /// Distance from a thing's middle at which the base stands (metres).
    pub standoff_m: f64,
}

/// The camera of pictures of a size, by its calibration.
///
/// # Errors
/// [`CameraError`], for a lens that is not known here by its name.
pub fn camera_of(known: &CameraIntrinsics, size: (usize, usize)) -> Result<Camera, CameraError> {
    let k = known.resized(size.0 as u32, size.1 as u32);
    Camera::pinhole(k.width, k.height, k.fx, k.fy, k.cx, k.cy)?
        .with_distortion(&k.distortion_model, &k.distortion)
}

/// Largest width at which features are looked for (pixels).
const FEATURE_WIDTH_MAX: usize = 416;
/// Smallest one: below it pictures say nothing.
pub const FEATURE_WIDTH_MIN: usize = 160;

/// The size at which features of a picture are looked for (pixels).
fn feature_size((w, h): (usize, usize)) -> (usize, usize) {
    let width = w.min(FEATURE_WIDTH_MAX);
    (width, (h * width).div_ceil(w.max(1)).max(1))
}

/// Looks at frames; what comes of it is shared.
struct Student {
    config: StudyConfig,
    detector: Option<Detector>,
    extractor: Extractor,
    scaler: Option<Scaler>,
    last: Option<(Timestamp, Isometry3<f64>)>,
    due: [Option<Timestamp>; 2],
    epoch: u64,
    shared: Arc<Shared>,
}

/// What the thread writes and goals read.
struct Shared {
    state: Mutex<State>,
    /// For the thread.
    news: Condvar,
    desk: Mutex<Desk>,
}

struct State {
    landmarks: Option<LandmarkMap>,
    objects: ObjectMap,
    classes: Option<Arc<[String]>>,
    camera: Option<Camera>,
    source: Option<(usize, usize)>,
    counts: StudyCounts,
    fault: Option<String>,
    standoff_m: f64,
    profile: Profile,
}

/// What waits for the thread.
#[derive(Default)]
struct Desk {
    frame: Option<FullFrame>,
    /// Buffers of frames that were looked at.
    spare: Vec<Vec<u8>>,
    /// Counts forgettings: what was begun before one is not kept.
    epoch: u64,
    stop: bool,
}

impl Student {
    fn study(&mut self, frame: &FullFrame, epoch: u64, clock: &dyn Clock) {
        if self.jumped(frame) || epoch != self.epoch {
            self.epoch = epoch;
            self.due = [None; 2];
            lock(&self.shared.state).clear();
        }
        self.last = Some((frame.captured_at, frame.odom_from_camera));
        {
            let (width, height) = feature_size(frame.size);
            let mut state = lock(&self.shared.state);
            state.camera = Some(frame.camera.resized(width as u32, height as u32));
            state.source = Some(frame.size);
        }
        let mut is_due = [false; 2];
        for (k, due) in self.due.iter_mut().enumerate() {
            is_due[k] = due.is_none_or(|at| frame.captured_at >= at);
            if is_due[k] {
                *due = Some(frame.captured_at + self.config.period[k]);
            }
        }
        if is_due[0] && self.config.landmarks_max.is_some() {
            self.landmarks(frame, clock);
        }
        if is_due[1] && self.detector.is_some() {
            self.boxes(frame, clock);
        }
        let mut state = lock(&self.shared.state);
        state.counts.studied += 1;
        state.counts.landmarks = state.landmarks.as_ref().map_or(0, LandmarkMap::len);
        state.counts.objects = state.objects.objects().len();
    }

    /// Whether the poses jumped since the last frame.
    fn jumped(&mut self, frame: &FullFrame) -> bool {
        let Some((at, before)) = self.last else { return false };
        let apart = before.inverse() * frame.odom_from_camera;
        let metres = apart.translation.vector.norm();
        let jumped = is_jump(metres, apart.rotation.angle(), frame.captured_at.since(at));
        if jumped {
            lock(&self.shared.state).counts.jumps += 1;
            tracing::warn!("odometry jumped by {metres:.1} m: landmarks and things are forgotten");
        }
        jumped
    }

    fn landmarks(&mut self, frame: &FullFrame, clock: &dyn Clock) {
        let began = clock.now();
        let size = feature_size(frame.size);
        if self.scaler.as_ref().is_none_or(|s| s.from() != frame.size || s.to() != size) {
            self.scaler = Some(Scaler::new(frame.size, size));
        }
        let Some(scaler) = &mut self.scaler else { return };
        let mut luma = Vec::with_capacity(size.0 * size.1);
        let put = |[r, g, b]: [f32; 3]| luma.push((0.299 * r + 0.587 * g + 0.114 * b) / 255.0);
        if scaler.scale(&frame.rgb, put).is_err() {
            return;
        }
        let features = self.extractor.extract(&Gray::new(size.0, size.1, luma));
        let extracted = clock.now();
        let camera = frame.camera.resized(size.0 as u32, size.1 as u32);
        let mut state = lock(&self.shared.state);
        let landmarks_max = self.config.landmarks_max.unwrap_or(1);
        let map = state.landmarks.get_or_insert_with(|| {
            LandmarkMap::new(MapConfig { landmarks_max, ..MapConfig::for_width(size.0 as u32) })
        });
        map.insert(&features, &camera, &frame.odom_from_camera);
        let MapCounts { frames_without_features, frames_without_baseline, .. } = map.counts();
        state.counts.without_features = frames_without_features;
        state.counts.without_baseline = frames_without_baseline;
        state.profile.push("features", (extracted - began).as_millis_f64());
        state.profile.push("landmarks", (clock.now() - extracted).as_millis_f64());
    }

    fn boxes(&mut self, frame: &FullFrame, clock: &dyn Clock) {
        let Some(detector) = &mut self.detector else { return };
        let began = clock.now();
        let found = detector.detect(&frame.rgb, frame.size, self.config.score_min as f32);
        let took = clock.now() - began;
        let mut state = lock(&self.shared.state);
        state.profile.push("detect", took.as_millis_f64());
        match found {
            Ok(found) => {
                let boxes: Vec<SeenBox> = found
                    .iter()
                    .map(|d| SeenBox {
                        class: d.class,
                        score: f64::from(d.score),
                        area: d.area.map(f64::from),
                    })
                    .collect();
                state.counts.detected += 1;
                state.counts.boxes += boxes.len() as u64;
                state.objects.insert(&boxes, &frame.camera, &frame.odom_from_camera);
            }
            Err(error) => {
                state.counts.detector_failed += 1;
                if state.counts.detector_failed.is_power_of_two() {
                    tracing::warn!(%error, times = state.counts.detector_failed, "the detector failed");
                }
            }
        }
    }
}

impl State {
    fn clear(&mut self) {
        self.objects.clear();
        if let Some(map) = &mut self.landmarks {
            map.clear();
        }
    }
}

/// How frames are looked at.
enum Desktop {
    /// As they come, by whoever brings them.
    Inline(Box<Student>),
    /// By a thread; the newest wins.
    Thread(Option<JoinHandle<()>>),
}

/// Kept frames in, landmarks and things out.
pub struct Study {
    shared: Arc<Shared>,
    desktop: Desktop,
    period: TimeDelta,
    due: Option<Timestamp>,
}

/// A handle on what studying gives.
#[derive(Clone)]
pub struct StudyResults(Arc<Shared>);

impl std::fmt::Debug for StudyResults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StudyResults({:?})", self.counts())
    }
}

impl StudyResults {
    /// A copy of everything.
    pub fn studied(&self) -> Studied {
        let state = lock(&self.0.state);
        Studied {
            landmarks: state.landmarks.clone().map(Box::new),
            objects: state.objects.objects().to_vec(),
            classes: state.classes.clone(),
            camera: state.camera,
            source: state.source,
            counts: state.counts,
            fault: state.fault.clone(),
            standoff_m: state.standoff_m,
        }
    }

    /// What became of the frames.
    pub fn counts(&self) -> StudyCounts {
        lock(&self.0.state).counts
    }

    /// What became of the boxes.
    pub fn object_counts(&self) -> ObjectCounts {
        lock(&self.0.state).objects.counts()
    }

    /// Stage times.
    pub fn profile(&self) -> Profile {
        lock(&self.0.state).profile.clone()
    }

    /// What is wrong with the camera, in words.
    pub fn fault(&self) -> Option<String> {
        lock(&self.0.state).fault.clone()
    }
}

impl Study {
    /// Looks at frames as they come: the same frames give the same result.
    pub fn inline(config: StudyConfig, detector: Option<Detector>) -> Self {
        let (student, period) = student(config, detector);
        let shared = student.shared.clone();
        Self { shared, desktop: Desktop::Inline(Box::new(student)), period, due: None }
    }

    /// Looks at frames on a thread of its own; a frame that was not begun when a newer one comes is let go of and counted.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn threaded(
        config: StudyConfig,
        detector: Option<Detector>,
        clock: impl Clock + Send + 'static,
    ) -> std::io::Result<Self> {
        let (mut student, period) = student(config, detector);
        let shared = student.shared.clone();
        let thread = std::thread::Builder::new().name("study".into()).spawn(move || {
            let shared = student.shared.clone();
            loop {
                let mut desk = lock(&shared.desk);
                let (frame, epoch) = loop {
                    if desk.stop {
                        return;
                    }
                    match desk.frame.take() {
                        Some(frame) => break (frame, desk.epoch),
                        None => desk = shared.news.wait(desk).unwrap_or_else(PoisonError::into_inner),
                    }
                };
                drop(desk);
                student.study(&frame, epoch, &clock);
                let mut desk = lock(&shared.desk);
                if desk.spare.len() < 4 {
                    desk.spare.push(frame.rgb);
                }
            }
        })?;
        Ok(Self { shared, desktop: Desktop::Thread(Some(thread)), period, due: None })
    }

    /// A handle for goals.
    pub fn results(&self) -> StudyResults {
        StudyResults(self.shared.clone())
    }

    /// Whether a frame of this time would be looked at at all.
    pub fn wants(&self, captured_at: Timestamp) -> bool {
        self.due.is_none_or(|due| captured_at >= due)
    }

    /// A buffer for a frame's pixels; used again where possible.
    pub fn buffer(&self) -> Vec<u8> {
        lock(&self.shared.desk).spare.pop().unwrap_or_default()
    }

    /// Takes a buffer back.
    pub fn recycle(&self, buffer: Vec<u8>) {
        let mut desk = lock(&self.shared.desk);
        if desk.spare.len() < 4 {
            desk.spare.push(buffer);
        }
    }

    /// Notes that a frame of this time will be offered: the next one is wanted a period later.
    pub fn promised(&mut self, captured_at: Timestamp) {
        self.due = Some(captured_at + self.period);
    }

    /// Takes a frame.
    pub fn offer(&mut self, frame: FullFrame, clock: &dyn Clock) {
        match &mut self.desktop {
            Desktop::Inline(student) => {
                let epoch = lock(&self.shared.desk).epoch;
                student.study(&frame, epoch, clock);
                self.recycle(frame.rgb);
            }
            Desktop::Thread(_) => {
                let mut desk = lock(&self.shared.desk);
                let before = desk.frame.replace(frame);
                if let Some(before) = before {
                    if desk.spare.len() < 4 {
                        desk.spare.push(before.rgb);
                    }
                    drop(desk);
                    lock(&self.shared.state).counts.dropped += 1;
                }
                self.shared.news.notify_one();
            }
        }
    }

    /// Forgets everything where a segment's poses have nothing to do with the earlier ones. Across a gap in the pictures
    /// odometry goes on, and what was learned by it stays.
    pub fn segment(&mut self, reason: SegmentReason) {
        if reason.keeps_history() {
            return;
        }
        self.due = None;
        let mut desk = lock(&self.shared.desk);
        desk.epoch += 1;
        desk.frame = None;
        drop(desk);
        lock(&self.shared.state).clear();
    }

    /// A frame came without a pose.
    pub fn without_pose(&self) {
        lock(&self.shared.state).counts.without_pose += 1;
    }

    /// A frame came without intrinsics, or with such as cannot be used.
    pub fn without_intrinsics(&self, fault: impl FnOnce() -> String) {
        let mut state = lock(&self.shared.state);
        state.counts.without_intrinsics += 1;
        if state.fault.is_none() {
            let fault = fault();
            tracing::warn!("{fault}");
            state.fault = Some(fault);
        }
    }
}

impl Drop for Study {
    fn drop(&mut self) {
        if let Desktop::Thread(thread) = &mut self.desktop {
            lock(&self.shared.desk).stop = true;
            self.shared.news.notify_one();
            if thread.take().is_some_and(|thread| thread.join().is_err()) {
                tracing::error!("the study's thread panicked");
            }
        }
    }
}

fn student(config: StudyConfig, detector: Option<Detector>) -> (Student, TimeDelta) {
    let wanted = [config.landmarks_max.is_some(), detector.is_some()];
    let periods = config.period.iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(p, _)| *p);
    let period = periods.min().unwrap_or(config.period[0]);
    let classes = detector.as_ref().map(|d| Arc::from(d.classes()));
    let state = State {
        landmarks: None,
        objects: ObjectMap::new(ObjectConfig::default()),
        classes,
        camera: None,
        source: None,
        counts: StudyCounts::default(),
        fault: None,
        standoff_m: config.standoff_m,
        profile: Profile::default(),
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        news: Condvar::new(),
        desk: Mutex::new(Desk::default()),
    });
    let student = Student {
        config,
        detector,
        extractor: Extractor::new(ExtractorConfig::default()),
        scaler: None,
        last: None,
        due: [None; 2],
        epoch: 0,
        shared,
    };
    (student, period)
}

/// What a configuration and a model want of kept frames: a detector, and landmarks where the model has no lift heads but
/// pictures large enough to be placed by them.
///
/// # Errors
/// [`DetectorError`] when the detector cannot be used.
pub fn wanted(
    config: &RobotConfig,
    spec: &MindSpec,
) -> Result<Option<(StudyConfig, Option<Detector>)>, DetectorError> {
    let detector = config.load_detector()?;
    let by_geometry = spec.lift.is_none() && spec.camera.width >= FEATURE_WIDTH_MIN;
    let landmarks_max = by_geometry.then(|| MapConfig::default().landmarks_max);
    let any = detector.is_some() || landmarks_max.is_some();
    Ok(any.then(|| (config.study(landmarks_max), detector)))
}

#[cfg(test)]
mod tests;
