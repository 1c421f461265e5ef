//! A rendered house as a robot knows it after looking around once: what `engine` calibrates and judges with, and what
//! evaluations ask for things in.

use crate::context::{ContextLatent, EncodeError, GROUP, GroupEncoder, LatentInfo};
use crate::ground::Scene;
use crate::image::RgbImage;
use crate::planar;
use mindseye_bridge::time::Timestamp;
use mindseye_world::{Camera, Frame, House, Pose2, RenderOptions, Rng, exploration_drive, render_with};

/// Images of one look around in a room: what the small models were trained with.
pub const SWEEP: usize = 97;

/// See the module.
pub struct Visit {
    /// The house.
    pub house: House,
    /// What was seen: one latent for every four images, the first image left out.
    pub memory: Vec<ContextLatent>,
    /// Base poses of all images of the recording, in the map (m, rad).
    pub sweep: Vec<Pose2>,
    /// The newest image.
    pub newest: RgbImage,
    /// The same in twice as many pixels each way.
    pub newest_detail: RgbImage,
    /// Where it was taken.
    pub here: Pose2,
    /// For everything random that follows.
    pub rng: Rng,
}

/// The same pose in the runtime's type.
pub fn plain_pose(p: Pose2) -> planar::Pose2 {
    planar::Pose2::new(p.x, p.y, p.yaw)
}

/// And back.
pub fn world_pose(p: planar::Pose2) -> Pose2 {
    Pose2::unwrapped(p.x, p.y, p.yaw)
}

/// A colour picture from a base pose.
pub fn picture(house: &House, pose: Pose2, camera: &Camera, frame: &mut Frame) -> RgbImage {
    render_with(house, pose, camera, RenderOptions::rgb_only(), frame);
    RgbImage { width: camera.width, height: camera.height, data: frame.rgb.clone() }
}

/// Time of an image of a recording: ten a second from an arbitrary beginning.
fn stamp(image: usize) -> Timestamp {
    Timestamp(1_700_000_000_000_000_000 + image as i64 * 100_000_000)
}

impl Visit {
    /// Looks around a house once, in `images` images for each turn: one in every room.
    ///
    /// # Errors
    /// When the encoder fails.
    ///
    /// # Panics
    /// When `images` is 0.
    pub fn new(
        house: House,
        mut rng: Rng,
        camera: &Camera,
        encoder: &mut dyn GroupEncoder,
        images: usize,
    ) -> Result<Self, EncodeError> {
        let sweep = exploration_drive(&house, &mut rng, images);
        let mut frame = Frame::new();
        let fine = Camera { width: 2 * camera.width, height: 2 * camera.height, ..*camera };
        let mut memory = Vec::new();
        for k in 1..=(sweep.len() - 1) / GROUP {
            let poses = &sweep[GROUP * k - (GROUP - 1)..=GROUP * k];
            let frames: Vec<RgbImage> =
                poses.iter().map(|p| picture(&house, *p, camera, &mut frame)).collect();
            let mut latent = vec![0.0; encoder.latent_len()];
            encoder.encode_group(&frames, &mut latent)?;
            let info = LatentInfo {
                index: k as u64,
                segment: 0,
                captured_at: stamp(GROUP * k),
                odom_from_base: Some(plain_pose(sweep[GROUP * k])),
            };
            let detail = Some(picture(&house, sweep[GROUP * k], &fine, &mut frame));
            memory.extend(frames.into_iter().next_back().map(|picture| ContextLatent {
                info,
                latent,
                picture,
                detail,
                by: None,
            }));
        }
        let here = sweep[sweep.len() - 1];
        let newest = picture(&house, here, camera, &mut frame);
        let newest_detail = picture(&house, here, &fine, &mut frame);
        Ok(Self { house, memory, sweep, newest, newest_detail, here, rng })
    }

    /// The same memories from another place.
    pub fn moved_to(&self, here: Pose2, camera: &Camera) -> Self {
        let fine = Camera { width: 2 * camera.width, height: 2 * camera.height, ..*camera };
        Self {
            house: self.house.clone(),
            memory: self.memory.clone(),
            sweep: self.sweep.clone(),
            newest: picture(&self.house, here, camera, &mut Frame::new()),
            newest_detail: picture(&self.house, here, &fine, &mut Frame::new()),
            here,
            rng: self.rng.clone(),
        }
    }

    /// The visit as the runtime is told of it; odometry is the map.
    pub fn scene(&self) -> Scene {
        Scene {
            memory: self.memory.clone(),
            newest: self.newest.clone(),
            newest_detail: Some(self.newest_detail.clone()),
            captured_at: stamp(self.sweep.len() - 1),
            odom_from_base: Some(plain_pose(self.here)),
            odom_frame: "odom".into(),
            base_frame: "base_link".into(),
            base_from_camera: None,
            odometry_noise: planar::OdometryNoise::default(),
            intrinsics: None,
            studied: Default::default(),
        }
    }
}
