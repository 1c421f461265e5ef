//! The pinhole camera on the robot's base, whose poses are planar.
//!
//! Map frame (REP-103): x and y on the floor, z up, metres; yaw in radians, counter-clockwise from x.
//! Camera optical frame: x right, y down, z forward.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

pub use mindseye_base::planar::{Pose2, wrap_angle};

/// A pinhole camera fixed to the robot's base, with square pixels and the principal point in the middle.
///
/// Image coordinates are continuous: pixel `(i, j)` covers `[i, i + 1) x [j, j + 1)`, so the image's middle is
/// `(width / 2, height / 2)`. [`Camera::intrinsics`] gives the matrix in the ROS convention, in which integers are
/// the pixels' centres.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Camera {
    /// Image width (pixels).
    pub width: usize,
    /// Image height (pixels).
    pub height: usize,
    /// Horizontal field of view (rad).
    pub hfov_rad: f64,
    /// Height of the optical centre above the floor (m).
    pub mount_height_m: f64,
    /// Optical centre ahead of the base's origin, along base x (m).
    pub mount_forward_m: f64,
    /// Downward pitch of the optical axis (rad), positive looks down.
    pub pitch_rad: f64,
}

impl Camera {
    /// A camera of the house robot: 90 degrees wide, 1 m above the floor, over the base's origin, 14 degrees down.
    #[must_use]
    pub const fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            hfov_rad: std::f64::consts::FRAC_PI_2,
            mount_height_m: 1.0,
            mount_forward_m: 0.0,
            pitch_rad: 14.0 * PI / 180.0,
        }
    }

    /// Focal length in pixels (the same in x and y).
    #[must_use]
    pub fn focal_px(&self) -> f64 {
        self.width as f64 * 0.5 / (self.hfov_rad * 0.5).tan()
    }

    /// `[fx, fy, cx, cy]` for pixel coordinates whose integers are pixel centres (sensor_msgs/CameraInfo).
    #[must_use]
    pub fn intrinsics(&self) -> [f64; 4] {
        let f = self.focal_px();
        [f, f, self.width as f64 * 0.5 - 0.5, self.height as f64 * 0.5 - 0.5]
    }

    /// `base_from_camera` (optical frame) as a row-major rotation and a translation (m).
    #[must_use]
    pub fn base_from_camera(&self) -> ([[f64; 3]; 3], [f64; 3]) {
        let (s, c) = self.pitch_rad.sin_cos();
        // Columns: the optical axes x (right), y (down), z (forward) in the base frame.
        ([[0.0, -s, c], [-1.0, 0.0, 0.0], [0.0, -c, -s]], [self.mount_forward_m, 0.0, self.mount_height_m])
    }

    /// `map_from_camera` (optical frame) for a base at `pose`: row-major rotation and translation (m).
    #[must_use]
    pub fn map_from_camera(&self, pose: Pose2) -> ([[f64; 3]; 3], [f64; 3]) {
        let (r, t) = self.base_from_camera();
        let (s, c) = pose.yaw.sin_cos();
        let rotate = |row0: f64, row1: f64| (c * row0 - s * row1, s * row0 + c * row1);
        let mut out = r;
        for k in 0..3 {
            (out[0][k], out[1][k]) = rotate(r[0][k], r[1][k]);
        }
        let (tx, ty) = rotate(t[0], t[1]);
        (out, [pose.x + tx, pose.y + ty, t[2]])
    }

    /// Projects a map point: `[x, y]` in continuous pixels and the planar depth (m), which is not positive for
    /// points behind the camera.
    #[must_use]
    pub fn project(&self, pose: Pose2, point_in_map: [f64; 3]) -> ([f64; 2], f64) {
        let (r, t) = self.map_from_camera(pose);
        let d = [point_in_map[0] - t[0], point_in_map[1] - t[1], point_in_map[2] - t[2]];
        let in_camera = |k: usize| r[0][k] * d[0] + r[1][k] * d[1] + r[2][k] * d[2];
        let z = in_camera(2);
        let f = self.focal_px();
        ([self.width as f64 * 0.5 + f * in_camera(0) / z, self.height as f64 * 0.5 + f * in_camera(1) / z], z)
    }
}
