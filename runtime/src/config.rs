//! `configs/robots/*.toml`: which topics, which model, which limits.
//!
//! Unknown keys are refused. What is left out has the value of [`RobotConfig::default`], which is also the
//! table of topics in the design.

use crate::agent::{AgentConfig, DriveLimits, GoalStamp};
use crate::context::Keep;
use crate::ground::MindSpec;
use crate::planar::OdometryNoise;
use crate::senses::{Sense, SensesConfig};
use crate::study::StudyConfig;
use mindseye_bridge::camera::CameraIntrinsics;
use mindseye_bridge::ros::RosConfig;
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::detector::{Detector, DetectorError};
use nalgebra::{Isometry3, Translation3, UnitQuaternion};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// One robot.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RobotConfig {
    /// Name in the keys of the plain queryables, `mindseye/<robot>/ground`.
    pub robot: String,
    /// The session: node name, domain, key style, Zenoh endpoints.
    pub ros: RosConfig,
    /// Topics in and out.
    pub topics: Topics,
    /// Names of frames.
    pub frames: Frames,
    /// What odometry is off, as a random walk: standard deviations (m, rad) after one metre, and after one radian of turns.
    pub odometry: OdometryNoise,
    /// What is remembered.
    pub context: ContextTable,
    /// Deadlines and ages.
    pub goals: GoalTable,
    /// How a goal that was found is driven to.
    pub navigate: NavigateTable,
    /// The model.
    pub model: ModelTable,
    /// The detector; none without its table.
    pub detector: Option<DetectorTable>,
    /// The camera, where the robot's topics do not say.
    pub camera: Option<CameraTable>,
    /// Milliseconds between two status messages; 0 = none.
    pub status_period_ms: u64,
}

/// Topics; relative names are under the session's namespace. An empty name switches one off.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)] // each is the topic of its name
pub struct Topics {
    pub image: String,
    pub compressed: String,
    pub camera_info: String,
    pub odom: String,
    pub tf: String,
    pub tf_static: String,
    pub goal_text: String,
    pub goal_waypoints: String,
    pub goal_cancel: String,
    pub goal_pose: String,
    pub target: String,
    pub path: String,
    pub detection: String,
    pub imagination: String,
    pub status: String,
    pub diagnostics: String,
}

impl Topics {
    /// The topic of a sense; empty when it is switched off.
    pub fn of(&self, sense: Sense) -> &String {
        match sense {
            Sense::Image => &self.image,
            Sense::Compressed => &self.compressed,
            Sense::CameraInfo => &self.camera_info,
            Sense::Odometry => &self.odom,
            Sense::Tf => &self.tf,
            Sense::TfStatic => &self.tf_static,
        }
    }

    /// As [`Topics::of`], to be changed.
    pub fn of_mut(&mut self, sense: Sense) -> &mut String {
        match sense {
            Sense::Image => &mut self.image,
            Sense::Compressed => &mut self.compressed,
            Sense::CameraInfo => &mut self.camera_info,
            Sense::Odometry => &mut self.odom,
            Sense::Tf => &mut self.tf,
            Sense::TfStatic => &mut self.tf_static,
        }
    }
}

/// Frames of reference.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Frames {
    /// The frame of odometry.
    pub odom: String,
    /// The robot's base.
    pub base: String,
}

/// What is remembered.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContextTable {
    /// Every k-th frame is kept; 0 = as many a second as the model was trained with.
    pub keep_every: usize,
    /// Latents kept.
    pub capacity: usize,
    /// Newest latents that are never evicted.
    pub recent: usize,
    /// A longer pause between frames starts a new segment.
    pub max_gap_ms: i64,
    /// Odometry may be this much older or newer than a frame.
    pub pose_slack_ms: i64,
    /// A camera of which no pixel has changed, or whose stamps have not advanced, for longer is frozen: goals are
    /// answered `stale`. 0 = never, for simulated cameras without noise.
    pub frozen_after_ms: i64,
    /// The frame that is common to several robots, usually `map`: what is remembered is shared with them, and theirs is
    /// looked at, too ([`crate::served::shared`]). Empty: nothing is shared. Anybody on the network may read what is shared,
    /// unless the router's access control says otherwise: see [`RosConfig`]'s module for an example.
    pub share: String,
}

/// Defaults for goals.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GoalTable {
    /// Time allowed from arrival to answer.
    pub deadline_ms: i64,
    /// Oldest newest-frame allowed.
    pub max_frame_age_ms: i64,
    /// Kept back for decoding, lifting and publishing.
    pub reserve_ms: i64,
    /// The same pose is published again only after this long.
    pub republish_after_ms: i64,
    /// The stamp of goal poses: the robot's clock, or zero.
    pub stamp: GoalStamp,
    /// How long nav2 keeps transforms (its own default: 10 s). A goal whose frame was not heard of for longer is refused.
    pub tf_buffer_ms: i64,
}

/// How a goal that was found is driven to.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NavigateTable {
    /// A `nav2_msgs/action/NavigateToPose` server, usually `/navigate_to_pose`. Empty: the pose is published on
    /// `topics.goal_pose`. Never both: nav2 takes a pose on its topic for a new goal and would give up the first.
    pub action: String,
    /// nav2's behaviour tree; empty for its default.
    pub behavior_tree: String,
    /// Longest time to wait for the server to accept.
    pub accept_ms: i64,
    /// A drive that lasts longer is cancelled.
    pub longest_ms: i64,
    /// A drive of which nothing is heard for this long is cancelled.
    pub contact_ms: i64,
    /// Where a drive ends, what was asked for is looked at once more. The arrival is confirmed when the goal's pose is at
    /// most this far from there, metres; else the goal is asked again, once.
    pub within_m: f64,
    /// The same of its heading, degrees.
    pub within_deg: f64,
}

/// The model.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelTable {
    /// Directory of the bundle; looked for in the usual places when left out.
    pub bundle: Option<PathBuf>,
    /// Backend that runs it.
    pub backend: String,
    /// Threads of one evaluation; 0 = the backend's choice.
    pub threads: usize,
    /// Seed of goals that give none.
    pub seed: u64,
    /// Most context latents that a goal looks at; as many as in training when left out. More than that is extrapolation:
    /// answers from it say so.
    pub context_latents: Option<usize>,
}

/// An object detector that sees things in kept frames.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetectorTable {
    /// The ONNX file; layouts: [`mindseye_engines::detector`].
    pub model: PathBuf,
    /// Names of its classes, one a line, where they are neither in the file nor beside it.
    #[serde(default)]
    pub classes: Option<PathBuf>,
    /// Frames a second at most.
    #[serde(default = "DetectorTable::rate_hz")]
    pub rate_hz: f64,
    /// Least score of a box that counts.
    #[serde(default = "DetectorTable::score_min")]
    pub score_min: f64,
    /// Threads of one run; 0 = the backend's choice.
    #[serde(default = "DetectorTable::threads")]
    pub threads: usize,
    /// Distance from a thing's middle at which the base stands (metres).
    #[serde(default = "DetectorTable::standoff_m")]
    pub standoff_m: f64,
}

impl DetectorTable {
    fn rate_hz() -> f64 {
        5.0
    }

    fn score_min() -> f64 {
        0.4
    }

    fn threads() -> usize {
        1
    }

    fn standoff_m() -> f64 {
        1.2
    }

    /// A detector as configured by nothing but its file.
    pub fn of(model: PathBuf) -> Self {
        Self {
            model,
            classes: None,
            rate_hz: Self::rate_hz(),
            score_min: Self::score_min(),
            threads: Self::threads(),
            standoff_m: Self::standoff_m(),
        }
    }
}

/// A camera's intrinsics and mounting.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CameraTable {
    /// Pixels per row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Horizontal field of view in degrees; square pixels, centred.
    pub horizontal_fov_deg: f64,
    /// Position of the camera in the base frame, metres.
    #[serde(default)]
    pub position_m: [f64; 3],
    /// Downward pitch in degrees.
    #[serde(default)]
    pub pitch_deg: f64,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path:?}: {source}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a wrong type.
    #[error("configuration {path:?}: {reason}")]
    Toml {
        /// Its path.
        path: PathBuf,
        /// The parser's words, with the place.
        reason: String,
    },
    /// A value out of range.
    #[error("configuration: {key} is {got}; wanted {want}")]
    Range {
        /// Which key.
        key: &'static str,
        /// What it is.
        got: String,
        /// What would be right.
        want: &'static str,
    },
}

impl Default for RobotConfig {
    fn default() -> Self {
        Self {
            robot: "robot".into(),
            ros: RosConfig::robot("mindseye"),
            topics: Topics::default(),
            frames: Frames::default(),
            odometry: OdometryNoise::typical(),
            context: ContextTable::default(),
            goals: GoalTable::default(),
            navigate: NavigateTable::default(),
            model: ModelTable::default(),
            detector: None,
            camera: None,
            status_period_ms: 1000,
        }
    }
}

impl Default for Topics {
    fn default() -> Self {
        Self {
            image: "/camera/image_raw".into(),
            compressed: "/camera/image_raw/compressed".into(),
            camera_info: "/camera/camera_info".into(),
            odom: "/odom".into(),
            tf: "/tf".into(),
            tf_static: "/tf_static".into(),
            goal_text: "/mindseye/goal/text".into(),
            goal_waypoints: "/mindseye/goal/waypoints".into(),
            goal_cancel: "/mindseye/goal/cancel".into(),
            goal_pose: "/goal_pose".into(),
            target: "/mindseye/target".into(),
            path: "/mindseye/path".into(),
            detection: "/mindseye/detection".into(),
            imagination: "/mindseye/imagination/compressed".into(),
            status: "/mindseye/status".into(),
            diagnostics: "/diagnostics".into(),
        }
    }
}

impl Default for Frames {
    fn default() -> Self {
        Self { odom: "odom".into(), base: "base_link".into() }
    }
}

impl Default for ContextTable {
    fn default() -> Self {
        Self {
            keep_every: 0,
            capacity: 256,
            recent: 2,
            max_gap_ms: 2000,
            pose_slack_ms: 250,
            frozen_after_ms: 5000,
            share: String::new(),
        }
    }
}

impl Default for GoalTable {
    fn default() -> Self {
        Self {
            deadline_ms: 15_000,
            max_frame_age_ms: 1000,
            reserve_ms: 250,
            republish_after_ms: 10_000,
            stamp: GoalStamp::default(),
            tf_buffer_ms: 10_000,
        }
    }
}

impl Default for NavigateTable {
    fn default() -> Self {
        Self {
            action: String::new(),
            behavior_tree: String::new(),
            accept_ms: 5000,
            longest_ms: 600_000,
            contact_ms: 10_000,
            within_m: 0.1,
            within_deg: 10.0,
        }
    }
}

impl Default for ModelTable {
    fn default() -> Self {
        Self { bundle: None, backend: "rten".into(), threads: 2, seed: 0, context_latents: None }
    }
}

/// What is wrong with a TOML text, and where.
fn in_one_line(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', ", ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => {
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            format!("line {line}, column {column}: {message}")
        }
        None => message,
    }
}

impl RobotConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the key and what was wanted.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|error| match error {
            ConfigError::Toml { reason, .. } => ConfigError::Toml { path: path.to_owned(), reason },
            other => other,
        })
    }

    /// Reads and checks TOML text.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|e| ConfigError::Toml { path: PathBuf::new(), reason: in_one_line(&e, text) })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let range = |key, ok: bool, got: String, want| {
            if ok { Ok(()) } else { Err(ConfigError::Range { key, got, want }) }
        };
        let c = &self.context;
        let name_ok = !self.robot.is_empty()
            && self.robot.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        range("robot", name_ok, format!("{:?}", self.robot), "letters, digits, _ and -")?;
        let o = &self.odometry;
        for (key, value) in [
            ("odometry.metres_per_metre", o.metres_per_metre),
            ("odometry.radians_per_metre", o.radians_per_metre),
            ("odometry.radians_per_radian", o.radians_per_radian),
        ] {
            range(key, (0.0..=10.0).contains(&value), value.to_string(), "0 to 10")?;
        }
        range("context.keep_every", c.keep_every <= 1000, c.keep_every.to_string(), "0 to 1000")?;
        range("context.capacity", (2..=4096).contains(&c.capacity), c.capacity.to_string(), "2 to 4096")?;
        let recent = (1..c.capacity).contains(&c.recent);
        range("context.recent", recent, c.recent.to_string(), "at least 1, less than context.capacity")?;
        for (key, millis) in [
            ("context.max_gap_ms", c.max_gap_ms),
            ("goals.deadline_ms", self.goals.deadline_ms),
            ("goals.max_frame_age_ms", self.goals.max_frame_age_ms),
            ("goals.tf_buffer_ms", self.goals.tf_buffer_ms),
            ("navigate.accept_ms", self.navigate.accept_ms),
            ("navigate.longest_ms", self.navigate.longest_ms),
            ("navigate.contact_ms", self.navigate.contact_ms),
        ] {
            range(key, (1..=3_600_000).contains(&millis), millis.to_string(), "1 to 3600000")?;
        }
        for (key, millis) in [
            ("context.pose_slack_ms", c.pose_slack_ms),
            ("context.frozen_after_ms", c.frozen_after_ms),
            ("goals.reserve_ms", self.goals.reserve_ms),
            ("goals.republish_after_ms", self.goals.republish_after_ms),
        ] {
            range(key, (0..=3_600_000).contains(&millis), millis.to_string(), "0 to 3600000")?;
        }
        let n = &self.navigate;
        let metres = n.within_m > 0.0 && n.within_m <= 100.0;
        range("navigate.within_m", metres, n.within_m.to_string(), "more than 0, at most 100")?;
        let degrees = n.within_deg > 0.0 && n.within_deg <= 180.0;
        range("navigate.within_deg", degrees, n.within_deg.to_string(), "more than 0, at most 180")?;
        range("model.threads", self.model.threads <= 1024, self.model.threads.to_string(), "0 to 1024")?;
        if let Some(d) = &self.detector {
            let rate = d.rate_hz > 0.0 && d.rate_hz <= 1000.0;
            range("detector.rate_hz", rate, d.rate_hz.to_string(), "more than 0, at most 1000")?;
            let score = (0.0..=1.0).contains(&d.score_min);
            range("detector.score_min", score, d.score_min.to_string(), "0 to 1")?;
            let standoff = d.standoff_m > 0.0 && d.standoff_m <= 10.0;
            range("detector.standoff_m", standoff, d.standoff_m.to_string(), "more than 0, at most 10")?;
            range("detector.threads", d.threads <= 1024, d.threads.to_string(), "0 to 1024")?;
        }
        if let Some(camera) = &self.camera {
            let fov = camera.horizontal_fov_deg;
            range("camera.horizontal_fov_deg", fov > 1.0 && fov < 179.0, fov.to_string(), "1 to 179")?;
            let size = camera.width > 0 && camera.height > 0;
            range("camera.width", size, format!("{}x{}", camera.width, camera.height), "a picture size")?;
            let finite = camera.position_m.iter().chain([&camera.pitch_deg]).all(|v| v.is_finite());
            range("camera.position_m", finite, format!("{:?}", camera.position_m), "finite numbers")?;
        }
        Ok(())
    }

    /// The senses' part, for a model that was trained with one frame per `frame_period`.
    pub fn senses(&self, spec: &MindSpec) -> SensesConfig {
        let c = &self.context;
        SensesConfig {
            keep: if c.keep_every == 0 { Keep::Period(spec.frame_period) } else { Keep::Every(c.keep_every) },
            capacity: c.capacity,
            recent: c.recent,
            detail: spec.detail,
            max_gap: TimeDelta::from_millis(c.max_gap_ms),
            pose_slack: TimeDelta::from_millis(c.pose_slack_ms),
            odom_frame: self.frames.odom.clone(),
            base_frame: self.frames.base.clone(),
            intrinsics: self.camera.as_ref().map(CameraTable::intrinsics),
            odometry_noise: self.odometry,
            base_from_camera: self.camera.as_ref().map(CameraTable::mounting),
            frozen_after: TimeDelta::from_millis(c.frozen_after_ms),
            share: c.share.clone(),
        }
    }

    /// What kept frames are studied for, beside what the model needs; `landmarks_max` says how many landmarks are kept.
    pub fn study(&self, landmarks_max: Option<usize>) -> StudyConfig {
        let own = StudyConfig { landmarks_max, ..StudyConfig::default() };
        match &self.detector {
            Some(d) => StudyConfig {
                period: [own.period[0], TimeDelta::from_secs_f64(1.0 / d.rate_hz)],
                score_min: d.score_min,
                standoff_m: d.standoff_m,
                ..own
            },
            None => own,
        }
    }

    /// Takes another detector file than the configuration's, where one is given.
    pub fn detect_with(&mut self, model: Option<&Path>) {
        match (model, &mut self.detector) {
            (Some(model), Some(table)) => model.clone_into(&mut table.model),
            (Some(model), none) => *none = Some(DetectorTable::of(model.to_owned())),
            (None, _) => {}
        }
    }

    /// Loads the detector, where there is one.
    ///
    /// # Errors
    /// [`DetectorError`].
    pub fn load_detector(&self) -> Result<Option<Detector>, DetectorError> {
        let Some(d) = &self.detector else { return Ok(None) };
        Detector::open(&d.model, d.classes.as_deref(), d.threads).map(Some)
    }

    /// The agent's part.
    pub fn agent(&self) -> AgentConfig {
        AgentConfig {
            deadline: TimeDelta::from_millis(self.goals.deadline_ms),
            max_frame_age: TimeDelta::from_millis(self.goals.max_frame_age_ms),
            reserve: TimeDelta::from_millis(self.goals.reserve_ms),
            republish_after: TimeDelta::from_millis(self.goals.republish_after_ms),
            drives: self.navigate.limits(),
            stamp: self.goals.stamp,
            tf_buffer: TimeDelta::from_millis(self.goals.tf_buffer_ms),
        }
    }
}

impl NavigateTable {
    /// The limits of driving by an action, where one is configured.
    fn limits(&self) -> Option<DriveLimits> {
        (!self.action.is_empty()).then(|| DriveLimits {
            action: self.action.clone(),
            accept: TimeDelta::from_millis(self.accept_ms),
            longest: TimeDelta::from_millis(self.longest_ms),
            contact: TimeDelta::from_millis(self.contact_ms),
            within_m: self.within_m,
            within_rad: self.within_deg.to_radians(),
        })
    }
}

impl CameraTable {
    fn intrinsics(&self) -> CameraIntrinsics {
        let focal = f64::from(self.width) / (2.0 * (self.horizontal_fov_deg.to_radians() / 2.0).tan());
        CameraIntrinsics {
            frame_id: String::new(),
            width: self.width,
            height: self.height,
            fx: focal,
            fy: focal,
            cx: (f64::from(self.width) - 1.0) / 2.0,
            cy: (f64::from(self.height) - 1.0) / 2.0,
            distortion_model: String::new(),
            distortion: Vec::new(),
        }
    }

    /// `base_from_camera` (optical).
    fn mounting(&self) -> Isometry3<f64> {
        let [x, y, z] = self.position_m;
        let pitch = UnitQuaternion::from_euler_angles(0.0, self.pitch_deg.to_radians(), 0.0);
        Isometry3::from_parts(
            Translation3::new(x, y, z),
            pitch * mindseye_bridge::geometry::body_from_optical(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_checked() {
        let check = |text: &str, want: Result<(), &str>| match (RobotConfig::parse(text), want) {
            (Ok(_), Ok(())) => {}
            (Err(e), Err(want)) => assert!(e.to_string().contains(want), "{text}: {e}"),
            (got, want) => panic!("{text}: {got:?}, wanted {want:?}"),
        };
        check("", Ok(()));
        check("robot = \"bot-1\"\n[context]\nkeep_every = 2\n[topics]\nimage = \"/front/image\"", Ok(()));
        check("robot = \"a/b\"", Err("robot is \"a/b\""));
        check("[context]\ncapacity = 1", Err("context.capacity is 1"));
        check("[context]\nrecent = 256", Err("context.recent is 256"));
        check("[goals]\ndeadline_ms = 0", Err("goals.deadline_ms is 0"));
        check("[navigate]\naction = \"/navigate_to_pose\"", Ok(()));
        check("[navigate]\nlongest_ms = 0", Err("navigate.longest_ms is 0"));
        check("[navigate]\ncontact_ms = 0", Err("navigate.contact_ms is 0"));
        check("[navigate]\nwithin_m = nan", Err("navigate.within_m is NaN"));
        check("[navigate]\nwithin_deg = 181", Err("navigate.within_deg is 181"));
        check("[goals]\nstamp = \"zero\"\ntf_buffer_ms = 30000", Ok(()));
        check("[goals]\nstamp = \"wall\"", Err("wall"));
        let odometry = "[odometry]\nmetres_per_metre = 0.02\nradians_per_metre = 0.01\nradians_per_radian = ";
        check(&format!("{odometry}0.03"), Ok(()));
        check(&format!("{odometry}-0.03"), Err("odometry.radians_per_radian is -0.03"));
        check("[odometry]\nmetres_per_metre = 0.02", Err("radians_per_metre"));
        check("[topics]\nimagee = \"/x\"", Err("imagee"));
        check("[camera]\nwidth = 4\nheight = 2\nhorizontal_fov_deg = nan", Err("horizontal_fov_deg"));
        check("not toml", Err("configuration"));
        check("robot = \"x\"\n[topics]\nimage = 3\n", Err("line 3, column 9: invalid type"));
        for text in ["not toml", "robot = \"x\n", "[topics]\nimagee = 1", "[context]\ncapacity = -1"] {
            let error = RobotConfig::parse(text).unwrap_err().to_string();
            assert!(!error.contains('\n') && error.contains("line "), "{error}");
        }
    }

    #[test]
    fn every_shipped_robot_is_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/robots");
        let mut robots = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            robots.push(RobotConfig::load(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).robot);
        }
        robots.sort();
        assert_eq!(robots, ["sim", "turtlebot4"]);
    }

    #[test]
    fn a_pitched_camera_looks_down_and_ahead() {
        let table = CameraTable {
            width: 48,
            height: 32,
            horizontal_fov_deg: 90.0,
            position_m: [0.1, 0.0, 1.0],
            pitch_deg: 12.0,
        };
        let forward = table.mounting().rotation * nalgebra::Vector3::z();
        let (s, c) = 12f64.to_radians().sin_cos();
        assert!((forward - nalgebra::Vector3::new(c, 0.0, -s)).norm() < 1e-12, "{forward}");
        assert!((table.intrinsics().fx - 24.0).abs() < 1e-9);
    }
}
