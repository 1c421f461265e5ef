//! Camera intrinsics. The camera frame of reference is the *optical* one: x right, y down, z forward (REP-103).

/// Pin-hole intrinsics in pixels, from a `sensor_msgs/msg/CameraInfo` (REP-104). Pixel centres are at
/// integer coordinates; the origin is the top left pixel.
#[derive(Debug, Clone, PartialEq)]
pub struct CameraIntrinsics {
    /// Optical frame of reference.
    pub frame_id: String,
    /// Pixels per row that the calibration is for.
    pub width: u32,
    /// Rows that the calibration is for.
    pub height: u32,
    /// Focal length along x, pixels.
    pub fx: f64,
    /// Focal length along y, pixels.
    pub fy: f64,
    /// Principal point x, pixels.
    pub cx: f64,
    /// Principal point y, pixels.
    pub cy: f64,
    /// Distortion model as the message names it (`plumb_bob`, `rational_polynomial`, `equidistant`).
    pub distortion_model: String,
    /// Distortion coefficients in that model's order; empty = none.
    pub distortion: Vec<f64>,
}

/// Why a CameraInfo gives no intrinsics.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IntrinsicsError {
    /// `K[0]` is zero: the driver says that it was never calibrated (REP-104).
    #[error(
        "camera_info of {frame_id:?}: k[0] is 0, the camera is uncalibrated; calibrate it or give the intrinsics by configuration"
    )]
    Uncalibrated {
        /// Optical frame of reference.
        frame_id: String,
    },
    /// A value that no camera can have.
    #[error("camera_info of {frame_id:?}: {field} is {value}; wanted {want}")]
    Invalid {
        /// Optical frame of reference.
        frame_id: String,
        /// Field of the message.
        field: &'static str,
        /// Value got.
        value: f64,
        /// What would be right.
        want: &'static str,
    },
}

impl CameraIntrinsics {
    /// Reads K, D and the size of a message.
    ///
    /// # Errors
    /// [`IntrinsicsError::Uncalibrated`] when `K[0]` is 0; [`IntrinsicsError::Invalid`] for NaN, negative
    /// focal lengths or a size of zero.
    pub fn from_camera_info(info: &crate::msg::CameraInfo) -> Result<Self, IntrinsicsError> {
        let id = || info.header.frame_id.clone();
        let k = &info.k;
        if k[0] == 0.0 {
            return Err(IntrinsicsError::Uncalibrated { frame_id: id() });
        }
        let focal = [("k[0]", k[0]), ("k[4]", k[4])];
        if let Some(&(field, value)) = focal.iter().find(|(_, v)| !(v.is_finite() && *v > 0.0)) {
            return Err(IntrinsicsError::Invalid {
                frame_id: id(),
                field,
                value,
                want: "a positive focal length in pixels",
            });
        }
        let centre = [("k[2]", k[2]), ("k[5]", k[5])];
        if let Some(&(field, value)) = centre.iter().find(|(_, v)| !v.is_finite()) {
            return Err(IntrinsicsError::Invalid { frame_id: id(), field, value, want: "a finite pixel" });
        }
        let size = [("width", info.width), ("height", info.height)];
        if let Some(&(field, _)) = size.iter().find(|(_, v)| *v == 0) {
            return Err(IntrinsicsError::Invalid { frame_id: id(), field, value: 0.0, want: "at least 1" });
        }
        if let Some(&value) = info.d.iter().find(|v| !v.is_finite()) {
            return Err(IntrinsicsError::Invalid {
                frame_id: id(),
                field: "d",
                value,
                want: "finite coefficients",
            });
        }
        Ok(Self {
            frame_id: id(),
            width: info.width,
            height: info.height,
            fx: k[0],
            fy: k[4],
            cx: k[2],
            cy: k[5],
            distortion_model: info.distortion_model.clone(),
            distortion: info.d.clone(),
        })
    }

    /// The same camera for a picture resized to `width` x `height` (pixel centres at integers, so the
    /// half pixel is taken into account).
    #[must_use]
    pub fn resized(&self, width: u32, height: u32) -> Self {
        let sx = f64::from(width) / f64::from(self.width);
        let sy = f64::from(height) / f64::from(self.height);
        Self {
            width,
            height,
            fx: self.fx * sx,
            fy: self.fy * sy,
            cx: (self.cx + 0.5) * sx - 0.5,
            cy: (self.cy + 0.5) * sy - 0.5,
            ..self.clone()
        }
    }

    /// Horizontal field of view in radians, distortion ignored.
    #[must_use]
    pub fn horizontal_fov_rad(&self) -> f64 {
        2.0 * (f64::from(self.width) / (2.0 * self.fx)).atan()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intrinsics() {
        let mut info = crate::msg::CameraInfo { width: 640, height: 480, ..Default::default() };
        info.k = [0.0; 9];
        assert!(matches!(
            CameraIntrinsics::from_camera_info(&info),
            Err(IntrinsicsError::Uncalibrated { .. })
        ));
        info.k = [500.0, 0.0, 319.5, 0.0, 510.0, 239.5, 0.0, 0.0, 1.0];
        let k = CameraIntrinsics::from_camera_info(&info).unwrap();
        assert_eq!((k.fx, k.fy, k.cx, k.cy), (500.0, 510.0, 319.5, 239.5));
        let half = k.resized(320, 240);
        assert_eq!((half.fx, half.cx, half.cy), (250.0, 159.5, 119.5));
        for (i, bad) in [(0, f64::NAN), (4, -1.0), (2, f64::INFINITY)] {
            let mut wrong = info.clone();
            wrong.k[i] = bad;
            assert!(
                matches!(CameraIntrinsics::from_camera_info(&wrong), Err(IntrinsicsError::Invalid { .. })),
                "k[{i}] = {bad}"
            );
        }
        info.width = 0;
        assert!(CameraIntrinsics::from_camera_info(&info).is_err());
    }
}
