//! A fake model and a fake robot.
//!
//! The model sees one object two metres ahead of wherever the base stands, knows the words "chair" and "table",
//! and takes as long per evaluation as it is told to.

use mindseye::config::RobotConfig;
use mindseye::context::{EncodeError, GroupEncoder};
use mindseye::ground::{Mind, MindError, MindSpec, RaysError};
use mindseye::image::{ModelCamera, RgbImage};
use mindseye::imagine::{Dropped, RolloutSettings, Rope};
use mindseye::lift::{DriveRule, LiftParams};
use mindseye::node::{Node, NodeParts};
use mindseye::planar::Pose2;
use mindseye_bridge::msg::{Header, Image, Odometry, Pose, PoseWithCovariance};
use mindseye_bridge::ros::{Publisher, Qos, RosConfig, RosSession, ZenohSettings};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::plucker::Intrinsics;
use mindseye_engines::sampler::{Grid, Solver};
use nalgebra::Isometry3;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub const OBJECT_AHEAD_M: f64 = 2.0;
pub const STANDOFF_M: f64 = 1.1;
pub const STEPS: usize = 10;

pub struct FakeEncoder;

impl GroupEncoder for FakeEncoder {
    fn latent_len(&self) -> usize {
        12
    }
    fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
        latent.fill(f32::from(frames[0].data[0]) / 255.0);
        Ok(())
    }
    fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
        latent.fill(f32::from(frame.data[0]) / 255.0);
        Ok(())
    }
    fn reset(&mut self) {}
}

struct FakeDenoiser {
    config: DitConfig,
    delay: Duration,
}

impl Denoise for FakeDenoiser {
    fn config(&self) -> &DitConfig {
        &self.config
    }
    fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        std::thread::sleep(self.delay);
        let (frames, tokens) = (step.frames(), self.config.tokens_per_frame());
        let known = step.text[0] > 0.5;
        let mut pose = vec![[0.0, 0.0, 1.0, 0.0]; frames];
        pose[frames - 1] = [(OBJECT_AHEAD_M - STANDOFF_M) as f32, 0.0, 1.0, 0.0];
        Ok(Denoised {
            prediction: step.latents.iter().map(|x| 0.5 + 0.1 * x).collect(),
            pose,
            mask: vec![if known { 5.0 } else { -5.0 }; frames * tokens],
            locate: vec![[OBJECT_AHEAD_M as f32, 0.0]; frames * tokens],
        })
    }
}

/// What a test wants a network to say.
pub type Says = dyn FnMut(&DenoiseStep<'_>) -> Denoised + Send;

struct Scripted {
    config: DitConfig,
    says: Box<Says>,
}

impl Denoise for Scripted {
    fn config(&self) -> &DitConfig {
        &self.config
    }
    fn denoise(&mut self, step: &DenoiseStep<'_>) -> Result<Denoised, DenoiseError> {
        Ok((self.says)(step))
    }
}

pub struct FakeMind {
    pub spec: MindSpec,
    /// Camera poses relative to here of the paths that rays were asked for.
    pub paths: Arc<Mutex<Vec<Vec<Isometry3<f64>>>>>,
    denoiser: Box<dyn Denoise + Send>,
}

impl FakeMind {
    /// A model whose every evaluation takes `delay`.
    pub fn new(delay: Duration) -> Self {
        Self::of(|config| Box::new(FakeDenoiser { config, delay }))
    }

    /// A model whose network says what a test wants.
    pub fn saying(says: impl FnMut(&DenoiseStep<'_>) -> Denoised + Send + 'static) -> Self {
        Self::of(|config| Box::new(Scripted { config, says: Box::new(says) }))
    }

    fn of(denoiser: impl FnOnce(DitConfig) -> Box<dyn Denoise + Send>) -> Self {
        let config = DitConfig {
            in_channels: 2,
            out_channels: 2,
            latent_height: 2,
            latent_width: 3,
            patch: [1, 1],
            heads: 1,
            head_dim: 12,
            layers: 1,
            ffn_dim: 8,
            text_dim: 3,
            text_len: 2,
            freq_dim: 8,
            eps: 1e-6,
            rope_theta: 10000.0,
            prediction: Prediction::X0,
            camera_channels: 24,
            pooled_text: false,
            lift: true,
            attributes: 0,
            guide: None,
        };
        let lift = LiftParams {
            glance_timestep: 950.0,
            standoff_m: STANDOFF_M,
            mask_present: 0.0,
            mask_vote: 0.0,
            plan_sigma_m: 0.2,
            memory_sigma_m: 0.15,
            rollout_sigma_m: 0.3,
            yaw_sigma_rad: 0.1,
            agree_max: 3.0,
            localisation_sigma_m: 0.3,
            localisation_max_m: 1.0,
            consistency_min: 0.3,
            drive: DriveRule::Optional,
            registration: None,
            variance_scale: 1.0,
            shared_sigma_m: None,
            reconstruction_max: None,
            without_odometry: None,
            standoff_by_word_m: Default::default(),
        };
        let spec = MindSpec {
            camera: ModelCamera::from_fov(24, 16, std::f64::consts::FRAC_PI_2),
            frame_period: TimeDelta::from_millis(100),
            latent_len: 12,
            mounting: Some(Isometry3::identity()),
            context_max: 6,
            context_trained: 6,
            settings: RolloutSettings {
                target_latents: 3,
                gap: 50.0,
                max_span: None,
                steps: STEPS,
                min_steps: 3,
                guidance: 2.0,
                dropped: Dropped::default(),
                rope: Rope::default(),
                grid: Grid::Plain,
                shift: 3.0,
                solver: Solver::Euler,
                glance_timestep: 950.0,
                candidates: 1,
                seed: 0,
            },
            lift: Some(lift),
            detail: None,
            guide: mindseye::ground::Guide::None,
            attributes: Vec::new(),
            box_min: 0.2,
            box_latents: 1,
            bundle_sha256: "fake".into(),
            engine_sha256: "fake".into(),
        };
        Self { spec, paths: Arc::default(), denoiser: denoiser(config) }
    }
}

impl Mind for FakeMind {
    fn spec(&self) -> &MindSpec {
        &self.spec
    }
    fn encode_text(&mut self, text: &str) -> Result<Vec<f32>, MindError> {
        let known = ["chair", "table"].iter().any(|w| text.contains(w));
        if !known && !text.is_empty() {
            return Err(MindError::Nothing { known: vec!["chair".into(), "table".into()] });
        }
        Ok(vec![if known { 1.0 } else { 0.0 }; 6])
    }
    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        let mut latent = vec![0.0; 12];
        FakeEncoder.encode_still(frame, &mut latent)?;
        Ok(latent)
    }
    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        Ok(vec![RgbImage::filled(24, 16, [128; 3]); latents.len() / 12 * 4])
    }
    fn camera_rays(&self, poses: &[Isometry3<f64>], _: Option<&Intrinsics>) -> Result<Vec<f32>, RaysError> {
        self.paths.lock().unwrap().push(poses.to_vec());
        Ok(vec![0.0; (1 + (poses.len() - 1) / 4) * 6 * 24])
    }
    fn denoiser(&mut self) -> &mut dyn Denoise {
        self.denoiser.as_mut()
    }
}

/// A free loopback port.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn session(node: &str, listen: Option<u16>, connect: Option<u16>) -> RosSession {
    let endpoint = |port: u16| vec![format!("tcp/127.0.0.1:{port}")];
    let zenoh = ZenohSettings {
        listen: Some(listen.map(endpoint).unwrap_or_default()),
        connect: Some(connect.map(endpoint).unwrap_or_default()),
        ..ZenohSettings::default()
    };
    RosSession::open(&RosConfig { zenoh, ..RosConfig::in_process(node) }).unwrap()
}

/// Configuration for tests: every frame is kept, answers are quick to be stale.
pub fn config() -> RobotConfig {
    let mut config = RobotConfig { robot: "test".into(), status_period_ms: 200, ..RobotConfig::default() };
    config.context.keep_every = 1;
    config.context.capacity = 16;
    config.goals.max_frame_age_ms = 500;
    config
}

/// A node with the fake model that listens on a loopback port.
pub fn start(delay: Duration) -> (Node, RosSession, u16) {
    start_with(config(), delay)
}

/// As [`start`], configured otherwise.
pub fn start_with(config: RobotConfig, delay: Duration) -> (Node, RosSession, u16) {
    let port = free_port();
    let session = session("mindseye", Some(port), None);
    let parts = NodeParts {
        config,
        mind: Box::new(FakeMind::new(delay)),
        encoder: Box::new(FakeEncoder),
        record: None,
        observer: None,
    };
    let node = Node::start(&session, parts).unwrap();
    (node, session, port)
}

/// Where the fake robot stands.
pub const STANDS: (f64, f64, f64) = (1.0, 2.0, std::f64::consts::FRAC_PI_2);

/// A robot that stands still and publishes pictures and odometry until it is dropped or stalled.
pub struct FakeRobot {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

pub fn image(stamp: Timestamp, width: u32, height: u32) -> Image {
    let mut data = vec![90; (width * height * 3) as usize];
    // Like a camera's, no two pictures are the same to the bit.
    data[0] = (stamp.as_nanos() >> 20) as u8;
    Image {
        header: Header::new(stamp, "camera_optical_frame"),
        width,
        height,
        encoding: "rgb8".into(),
        step: width * 3,
        data,
        ..Image::default()
    }
}

pub fn odometry(stamp: Timestamp) -> Odometry {
    let (x, y, yaw) = STANDS;
    Odometry {
        header: Header::new(stamp, "odom"),
        child_frame_id: "base_link".into(),
        pose: PoseWithCovariance {
            pose: Pose::from_pose2(Pose2::new(x, y, yaw)),
            ..PoseWithCovariance::default()
        },
        ..Odometry::default()
    }
}

/// A picture that does not compress.
pub fn noise(stamp: Timestamp, width: u32, height: u32) -> Image {
    let mut picture = image(stamp, width, height);
    let mut state = stamp.as_nanos() as u64 | 1;
    for byte in &mut picture.data {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    picture
}

impl FakeRobot {
    pub fn start(session: &RosSession, rate_hz: f64) -> Self {
        Self::with(session, rate_hz, |stamp| image(stamp, 48, 32))
    }

    pub fn with(
        session: &RosSession,
        rate_hz: f64,
        picture: impl Fn(Timestamp) -> Image + Send + 'static,
    ) -> Self {
        let images: Publisher<Image> = session.publisher("/camera/image_raw", &Qos::SENSOR_DATA).unwrap();
        let odom: Publisher<Odometry> = session.publisher("/odom", &Qos::SENSOR_DATA).unwrap();
        assert!(images.wait_for_subscribers(Duration::from_secs(5)), "the node's subscription appears");
        assert!(odom.wait_for_subscribers(Duration::from_secs(5)));
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut stamp = Timestamp(1_700_000_000_000_000_000);
            let mut sent = 0;
            while !flag.load(Ordering::Relaxed) {
                stamp = stamp + TimeDelta::from_secs_f64(1.0 / rate_hz);
                odom.publish(&odometry(stamp)).unwrap();
                images.publish(&picture(stamp)).unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_secs_f64(1.0 / rate_hz));
            }
            sent
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops publishing; gives the number of pictures sent.
    pub fn stall(&mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(0, |t| t.join().unwrap())
    }
}

impl Drop for FakeRobot {
    fn drop(&mut self) {
        self.stall();
    }
}

/// Waits until the node has latents to work with.
pub fn wait_for_latents(node: &Node, count: usize) {
    for _ in 0..500 {
        if node.counts().latents >= count {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("no latents: {:?}", node.counts());
}

/// Resident memory of this process, bytes.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
