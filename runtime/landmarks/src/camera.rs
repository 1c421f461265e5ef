//! Pinhole cameras with lens distortion.

use nalgebra::{Point3, Vector2};

/// How a lens bends the ideal pinhole picture. Coefficients are in the order of a ROS `CameraInfo`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Distortion {
    /// A rectified picture.
    None,
    /// `plumb_bob`: `k1, k2, p1, p2, k3`.
    PlumbBob([f64; 5]),
    /// `rational_polynomial`: `k1, k2, p1, p2, k3, k4, k5, k6`.
    Rational([f64; 8]),
    /// `equidistant` or `fisheye`: `k1, k2, k3, k4` in powers of the angle from the optical axis.
    Equidistant([f64; 4]),
}

/// Why a camera cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CameraError {
    /// The distortion model is not known here.
    #[error(
        "camera: distortion model {model:?} is not supported; rectify the pictures, or use plumb_bob, \
         rational_polynomial or equidistant"
    )]
    UnknownModel {
        /// Its name.
        model: String,
    },
    /// The model takes another number of coefficients.
    #[error("camera: {got} coefficients of distortion model {model:?}; {want} are wanted")]
    CoefficientCount {
        /// Name of the model.
        model: String,
        /// Coefficients given.
        got: usize,
        /// Coefficients that the model has.
        want: &'static str,
    },
    /// A number that no camera has.
    #[error("camera: {what} is {value}; a positive, finite number is wanted")]
    Invalid {
        /// The number's name.
        what: &'static str,
        /// The number.
        value: f64,
    },
}

/// A calibrated camera. Its axes: x right, y down, z forward. Pixel centres are at integers, the origin is the centre
/// of the top left pixel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Camera {
    width: u32,
    height: u32,
    /// Focal lengths (pixels).
    focal: Vector2<f64>,
    /// Principal point (pixels).
    centre: Vector2<f64>,
    distortion: Distortion,
}

/// Largest angle from the optical axis at which a fisheye pixel is used (radians): beyond it the plane `z = 1`, in which
/// residuals are taken, is stretched too much.
const FISHEYE_ANGLE_MAX_RAD: f64 = 1.3;

impl Camera {
    /// A camera without distortion; sizes, focal lengths and principal point in pixels.
    ///
    /// # Errors
    /// [`CameraError::Invalid`] for an empty picture, focal lengths that are not positive, a principal point that is not
    /// finite.
    pub fn pinhole(width: u32, height: u32, fx: f64, fy: f64, cx: f64, cy: f64) -> Result<Self, CameraError> {
        let positive = |what, value: f64| {
            if value.is_finite() && value > 0.0 { Ok(()) } else { Err(CameraError::Invalid { what, value }) }
        };
        positive("width", f64::from(width))?;
        positive("height", f64::from(height))?;
        positive("fx", fx)?;
        positive("fy", fy)?;
        for (what, value) in [("cx", cx), ("cy", cy)] {
            if !value.is_finite() {
                return Err(CameraError::Invalid { what, value });
            }
        }
        Ok(Self {
            width,
            height,
            focal: Vector2::new(fx, fy),
            centre: Vector2::new(cx, cy),
            distortion: Distortion::None,
        })
    }

    /// The same camera with a lens, by the name and coefficients of a ROS `CameraInfo`. No coefficients, or only zeros,
    /// are a rectified picture whatever the name.
    ///
    /// # Errors
    /// [`CameraError::UnknownModel`], [`CameraError::CoefficientCount`], [`CameraError::Invalid`] for a coefficient that
    /// is not finite.
    pub fn with_distortion(self, model: &str, coefficients: &[f64]) -> Result<Self, CameraError> {
        if let Some(value) = coefficients.iter().copied().find(|v| !v.is_finite()) {
            return Err(CameraError::Invalid { what: "distortion coefficient", value });
        }
        if coefficients.iter().all(|v| *v == 0.0) {
            return Ok(Self { distortion: Distortion::None, ..self });
        }
        let count =
            |want| CameraError::CoefficientCount { model: model.to_owned(), got: coefficients.len(), want };
        // Trailing zeros are what a driver appends to fill a fixed array.
        let used = coefficients.iter().rposition(|v| *v != 0.0).map_or(0, |k| k + 1);
        fn fill<const N: usize>(used: &[f64]) -> [f64; N] {
            std::array::from_fn(|k| used.get(k).copied().unwrap_or(0.0))
        }
        let given = &coefficients[..used];
        let distortion = match model {
            "plumb_bob" | "radtan" if used <= 5 && coefficients.len() >= 4 => {
                Distortion::PlumbBob(fill(given))
            }
            "plumb_bob" | "radtan" => return Err(count("4 or 5")),
            "rational_polynomial" if used <= 8 && coefficients.len() >= 8 => {
                Distortion::Rational(fill(given))
            }
            "rational_polynomial" => return Err(count("8")),
            "equidistant" | "fisheye" if used <= 4 && coefficients.len() >= 4 => {
                Distortion::Equidistant(fill(given))
            }
            "equidistant" | "fisheye" => return Err(count("4")),
            _ => return Err(CameraError::UnknownModel { model: model.to_owned() }),
        };
        Ok(Self { distortion, ..self })
    }

    /// Pixels per row and rows.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Focal lengths along x and y (pixels).
    #[must_use]
    pub fn focal(&self) -> (f64, f64) {
        (self.focal.x, self.focal.y)
    }

    /// Principal point (pixels).
    #[must_use]
    pub fn centre(&self) -> Vector2<f64> {
        self.centre
    }

    /// Mean focal length (pixels): what turns residuals in the plane `z = 1` into pixels.
    #[must_use]
    pub fn focal_mean(&self) -> f64 {
        0.5 * (self.focal.x + self.focal.y)
    }

    /// The lens.
    #[must_use]
    pub fn distortion(&self) -> Distortion {
        self.distortion
    }

    /// The same camera with both focal lengths multiplied.
    #[must_use]
    pub fn with_focal_scaled(&self, factor: f64) -> Self {
        Self { focal: self.focal * factor, ..*self }
    }

    /// The same camera behind another's lens.
    #[must_use]
    pub fn with_lens_of(&self, other: &Self) -> Self {
        Self { distortion: other.distortion, ..*self }
    }

    /// The camera of the largest middle part of its picture that has this shape, at this size (pixels).
    #[must_use]
    pub fn filling(&self, width: u32, height: u32) -> Self {
        let middle = |w: u32, h: u32| Vector2::new(0.5 * (f64::from(w) - 1.0), 0.5 * (f64::from(h) - 1.0));
        let fill = (f64::from(self.width) / f64::from(width)).min(f64::from(self.height) / f64::from(height));
        Self {
            width,
            height,
            focal: self.focal / fill,
            centre: (self.centre - middle(self.width, self.height)) / fill + middle(width, height),
            distortion: self.distortion,
        }
    }

    /// Share of another camera's picture that this one sees from the same place; lenses count as straight.
    #[must_use]
    pub fn share_seen_of(&self, other: &Self) -> f64 {
        let reach = |camera: &Self, axis: usize| {
            let pixels = f64::from([camera.width, camera.height][axis]);
            [-0.5, pixels - 0.5].map(|edge| (edge - camera.centre[axis]) / camera.focal[axis])
        };
        let along = |axis: usize| {
            let ([a0, a1], [b0, b1]) = (reach(self, axis), reach(other, axis));
            (a1.min(b1) - a0.max(b0)).max(0.0) / (b1 - b0)
        };
        along(0) * along(1)
    }

    /// The camera of the same picture at another size.
    #[must_use]
    pub fn resized(&self, width: u32, height: u32) -> Self {
        let scale = Vector2::new(
            f64::from(width) / f64::from(self.width),
            f64::from(height) / f64::from(self.height),
        );
        let half = Vector2::new(0.5, 0.5);
        Self {
            width,
            height,
            focal: self.focal.component_mul(&scale),
            centre: (self.centre + half).component_mul(&scale) - half,
            distortion: self.distortion,
        }
    }

    /// Where a point in the camera's axes (metres) is seen (pixels); `None` behind the camera or outside the picture.
    #[must_use]
    pub fn project(&self, point: &Point3<f64>) -> Option<Vector2<f64>> {
        if point.z <= 1e-6 {
            return None;
        }
        let ideal = Vector2::new(point.x / point.z, point.y / point.z);
        let pixel = self.bend(ideal).component_mul(&self.focal) + self.centre;
        let inside = pixel.x >= -0.5
            && pixel.y >= -0.5
            && pixel.x < f64::from(self.width) - 0.5
            && pixel.y < f64::from(self.height) - 0.5;
        inside.then_some(pixel)
    }

    /// Direction in which a pixel looks, as the point where it meets the plane `z = 1`. `None` where the lens cannot be
    /// undone, or looks too far aside.
    #[must_use]
    pub fn ray(&self, pixel: Vector2<f64>) -> Option<Vector2<f64>> {
        let bent = (pixel - self.centre).component_div(&self.focal);
        if !bent.iter().all(|v| v.is_finite()) {
            return None;
        }
        match self.distortion {
            Distortion::None => Some(bent),
            Distortion::Equidistant(k) => {
                let radius = bent.norm();
                if radius < 1e-12 {
                    return Some(bent);
                }
                let mut angle = radius.min(FISHEYE_ANGLE_MAX_RAD);
                for _ in 0..20 {
                    let (value, slope) = equidistant(angle, k);
                    angle -= (value - radius) / slope.max(1e-3);
                }
                let solved = (equidistant(angle, k).0 - radius).abs() < 1e-9;
                (solved && (0.0..FISHEYE_ANGLE_MAX_RAD).contains(&angle))
                    .then(|| bent * (angle.tan() / radius))
            }
            Distortion::PlumbBob(_) | Distortion::Rational(_) => {
                // Newton's iteration with the slope taken from differences.
                let mut at = bent;
                for _ in 0..20 {
                    let off = self.bend(at) - bent;
                    if off.norm_squared() < 1e-24 {
                        return Some(at);
                    }
                    let h = 1e-6;
                    let column =
                        |d: Vector2<f64>| (self.bend(at + d * h) - self.bend(at - d * h)) / (2.0 * h);
                    let slope =
                        nalgebra::Matrix2::from_columns(&[column(Vector2::x()), column(Vector2::y())]);
                    at -= slope.try_inverse()? * off;
                    if !at.iter().all(|v| v.abs() < 10.0) {
                        return None;
                    }
                }
                ((self.bend(at) - bent).norm() < 1e-6).then_some(at)
            }
        }
    }

    /// From the ideal point in the plane `z = 1` to the bent one.
    fn bend(&self, p: Vector2<f64>) -> Vector2<f64> {
        let r2 = p.norm_squared();
        let (radial, p1, p2) = match self.distortion {
            Distortion::None => return p,
            Distortion::PlumbBob([k1, k2, p1, p2, k3]) => (1.0 + r2 * (k1 + r2 * (k2 + r2 * k3)), p1, p2),
            Distortion::Rational([k1, k2, p1, p2, k3, k4, k5, k6]) => {
                let over = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3));
                (over / (1.0 + r2 * (k4 + r2 * (k5 + r2 * k6))), p1, p2)
            }
            Distortion::Equidistant(k) => {
                let radius = r2.sqrt();
                if radius < 1e-12 {
                    return p;
                }
                return p * (equidistant(radius.atan(), k).0 / radius);
            }
        };
        Vector2::new(
            p.x * radial + 2.0 * p1 * p.x * p.y + p2 * (r2 + 2.0 * p.x * p.x),
            p.y * radial + p1 * (r2 + 2.0 * p.y * p.y) + 2.0 * p2 * p.x * p.y,
        )
    }
}

/// Distance from the principal point in the bent plane of a ray at this angle, and its slope.
fn equidistant(angle: f64, [k1, k2, k3, k4]: [f64; 4]) -> (f64, f64) {
    let t = angle * angle;
    (
        angle * (1.0 + t * (k1 + t * (k2 + t * (k3 + t * k4)))),
        1.0 + t * (3.0 * k1 + t * (5.0 * k2 + t * (7.0 * k3 + t * 9.0 * k4))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn camera() -> Camera {
        Camera::pinhole(640, 480, 500.0, 510.0, 319.5, 239.5).unwrap()
    }

    #[test]
    fn points_are_where_hand_computation_says() {
        let check = |camera: Camera, point: [f64; 3], want: [f64; 2]| {
            let got = camera.project(&Point3::from(point)).unwrap();
            assert!((got - Vector2::from(want)).norm() < 1e-9, "{point:?}: {got:?}, wanted {want:?}");
        };
        check(camera(), [0.0, 0.0, 2.0], [319.5, 239.5]);
        check(camera(), [1.0, -0.5, 4.0], [319.5 + 125.0, 239.5 - 63.75]);
        // r² = .05; radial = 1 + .1 * .05 = 1.005; p1 = .01: x += 2 * .01 * .2 * .1, y += .01 * (.05 + 2 * .01)
        let lens = camera().with_distortion("plumb_bob", &[0.1, 0.0, 0.01, 0.0, 0.0]).unwrap();
        check(lens, [0.2, 0.1, 1.0], [319.5 + 500.0 * (0.201 + 0.0004), 239.5 + 510.0 * (0.1005 + 0.0007)]);
        // (1 + .1 * .05) / (1 + .2 * .05)
        let lens =
            camera().with_distortion("rational_polynomial", &[0.1, 0., 0., 0., 0., 0.2, 0., 0.]).unwrap();
        let radial = 1.005 / 1.01;
        check(lens, [0.2, 0.1, 1.0], [319.5 + 500.0 * 0.2 * radial, 239.5 + 510.0 * 0.1 * radial]);
        let lens = camera().with_distortion("equidistant", &[0.1, 0.0, 0.0, 0.0]).unwrap();
        let angle = 0.3f64.atan();
        check(lens, [0.3, 0.0, 1.0], [319.5 + 500.0 * (angle + 0.1 * angle.powi(3)), 239.5]);
        let half = camera().resized(320, 240);
        check(half, [0.0, 0.0, 1.0], [159.5, 119.5]);
        check(half, [0.1, 0.0, 1.0], [159.5 + 25.0, 119.5]);
    }

    #[test]
    fn rays_undo_projection() {
        let lenses = [
            camera(),
            camera().with_distortion("plumb_bob", &[-0.28, 0.07, 0.001, -0.0005, 0.01]).unwrap(),
            camera()
                .with_distortion("rational_polynomial", &[0.4, -0.1, 1e-3, -1e-3, 0.01, 0.5, 0.02, 0.001])
                .unwrap(),
            camera().with_distortion("fisheye", &[-0.01, 0.02, -0.003, 0.0004]).unwrap(),
        ];
        for lens in lenses {
            for (x, y) in [(0.0, 0.0), (0.3, -0.2), (-0.5, 0.4), (0.01, 0.39)] {
                let pixel = lens.project(&Point3::new(2.0 * x, 2.0 * y, 2.0)).unwrap();
                let ray = lens.ray(pixel).unwrap();
                assert!(
                    (ray - Vector2::new(x, y)).norm() < 1e-9,
                    "{:?} at {x} {y}: {ray:?}",
                    lens.distortion()
                );
            }
        }
    }

    #[test]
    fn a_longer_lens_sees_less() {
        let wide = Camera::pinhole(100, 80, 50.0, 50.0, 49.5, 39.5).unwrap();
        let long = Camera::pinhole(200, 80, 200.0, 100.0, 99.5, 39.5).unwrap();
        // Half of the width, half of the height.
        assert!((long.share_seen_of(&wide) - 0.25).abs() < 1e-12);
        assert!((wide.share_seen_of(&long) - 1.0).abs() < 1e-12);
        assert!((wide.share_seen_of(&wide.resized(50, 40)) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_behind_or_outside_is_not_seen() {
        assert_eq!(camera().project(&Point3::new(0.0, 0.0, -1.0)), None);
        assert_eq!(camera().project(&Point3::new(1.0, 0.0, 1.0)), None);
    }

    #[test]
    fn cameras_that_cannot_be_used_are_named() {
        let error = |r: Result<Camera, CameraError>| r.unwrap_err().to_string();
        assert!(error(Camera::pinhole(640, 480, 0.0, 1.0, 0.0, 0.0)).contains("fx is 0"));
        assert!(error(Camera::pinhole(640, 0, 1.0, 1.0, 0.0, 0.0)).contains("height is 0"));
        assert!(
            error(camera().with_distortion("thin_prism", &[1.0])).contains("\"thin_prism\" is not supported")
        );
        assert!(error(camera().with_distortion("equidistant", &[1.0])).contains("1 coefficients"));
        assert!(error(camera().with_distortion("plumb_bob", &[f64::NAN, 0., 0., 0., 0.])).contains("NaN"));
        let rectified = camera().with_distortion("anything", &[0.0; 5]).unwrap();
        assert_eq!(rectified.distortion(), Distortion::None);
        // 14 numbers of which the last six are unused.
        let mut long = [0.0; 14];
        long[..8].copy_from_slice(&[0.1; 8]);
        assert!(camera().with_distortion("rational_polynomial", &long).is_ok());
        long[9] = 0.1;
        assert!(camera().with_distortion("rational_polynomial", &long).is_err());
    }
}
