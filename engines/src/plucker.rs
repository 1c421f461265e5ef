//! Camera poses to Plücker features for the denoiser (Video4Spatial, navigation along given poses).
//!
//! Camera axes: x right, y down, z forward; metres, radians; pixel centres at +0.5. A pixel's line is `(m, d)`:
//! moment `m = o x d` first, then the unit direction `d`, both in the frame of the reference camera. Four frames make
//! one latent: frame 0 four times, then groups of four; channel = slot * 6 + component, 24 in all.

/// A rigid transform as a row-major 4x4 matrix, `world_from_camera`.
pub type Pose = [[f64; 4]; 4];

/// Channels of the features.
pub const CHANNELS: usize = 24;

/// Pinhole intrinsics in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Intrinsics {
    /// Focal length along x.
    pub fx: f64,
    /// Focal length along y.
    pub fy: f64,
    /// Principal point, x.
    pub cx: f64,
    /// Principal point, y.
    pub cy: f64,
}

/// Why features could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PluckerError {
    /// The number of poses is not `1 + 4 k`.
    #[error("plücker: {0} poses, expected 1 + 4 k of them")]
    Frames(usize),
    /// The reference pose does not exist.
    #[error("plücker: reference pose {reference} of {count} does not exist")]
    Reference {
        /// Index asked for.
        reference: usize,
        /// Poses given.
        count: usize,
    },
    /// The image is not a whole number of cells.
    #[error("plücker: image of {width}x{height} is not a whole number of {cell}-pixel cells")]
    Cells {
        /// Image width in pixels.
        width: usize,
        /// Image height in pixels.
        height: usize,
        /// Side of a cell in pixels.
        cell: usize,
    },
    /// A pose or the intrinsics hold a value that is not finite, or a focal length that is not positive.
    #[error("plücker: {0} is not finite or not positive")]
    Value(&'static str),
}

/// Pose from yaw (about y), pitch (about x), roll (about z), applied in the order `yaw * pitch * roll`, and position.
#[must_use]
pub fn pose(yaw_rad: f64, pitch_rad: f64, roll_rad: f64, position_m: [f64; 3]) -> Pose {
    let (sy, cy) = yaw_rad.sin_cos();
    let (sp, cp) = pitch_rad.sin_cos();
    let (sr, cr) = roll_rad.sin_cos();
    let about_y = [[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]];
    let about_x = [[1.0, 0.0, 0.0], [0.0, cp, -sp], [0.0, sp, cp]];
    let about_z = [[cr, -sr, 0.0], [sr, cr, 0.0], [0.0, 0.0, 1.0]];
    let r = multiply3(&multiply3(&about_y, &about_x), &about_z);
    let mut out = [[0.0; 4]; 4];
    for i in 0..3 {
        out[i][..3].copy_from_slice(&r[i]);
        out[i][3] = position_m[i];
    }
    out[3][3] = 1.0;
    out
}

fn multiply3(a: &[[f64; 3]; 3], b: &[[f64; 3]; 3]) -> [[f64; 3]; 3] {
    std::array::from_fn(|i| std::array::from_fn(|j| (0..3).map(|k| a[i][k] * b[k][j]).sum()))
}

/// `inverse(world_from_reference) * world_from_camera`: the camera's pose in the reference camera's frame.
#[must_use]
pub fn relative(world_from_reference: &Pose, world_from_camera: &Pose) -> Pose {
    let (a, b) = (world_from_reference, world_from_camera);
    let mut out = [[0.0; 4]; 4];
    for i in 0..3 {
        for j in 0..3 {
            out[i][j] = (0..3).map(|k| a[k][i] * b[k][j]).sum();
        }
        out[i][3] = (0..3).map(|k| a[k][i] * (b[k][3] - a[k][3])).sum();
    }
    out[3][3] = 1.0;
    out
}

/// Lines of all pixels of one camera: `[6, height, width]`, moment first.
#[must_use]
pub fn rays(reference_from_camera: &Pose, k: &Intrinsics, height: usize, width: usize) -> Vec<f64> {
    let mut out = vec![0.0; 6 * height * width];
    let plane = height * width;
    for v in 0..height {
        for u in 0..width {
            let line = ray(reference_from_camera, k, u as f64 + 0.5, v as f64 + 0.5);
            for (c, value) in line.into_iter().enumerate() {
                out[c * plane + v * width + u] = value;
            }
        }
    }
    out
}

/// Line `(m, d)` through the image point `(u, v)` in pixels.
#[must_use]
pub fn ray(reference_from_camera: &Pose, k: &Intrinsics, u: f64, v: f64) -> [f64; 6] {
    let p = reference_from_camera;
    let in_camera = [(u - k.cx) / k.fx, (v - k.cy) / k.fy, 1.0];
    let norm = in_camera.iter().map(|x| x * x).sum::<f64>().sqrt();
    let d: [f64; 3] = std::array::from_fn(|i| (0..3).map(|j| p[i][j] * in_camera[j] / norm).sum());
    let o = [p[0][3], p[1][3], p[2][3]];
    [o[1] * d[2] - o[2] * d[1], o[2] * d[0] - o[0] * d[2], o[0] * d[1] - o[1] * d[0], d[0], d[1], d[2]]
}

/// Features of a clip, averaged over square cells: `[24, latents, height / cell, width / cell]`, where
/// `latents = 1 + (poses - 1) / 4`. `cell` is 32 pixels for one value per token of Wan2.2.
///
/// # Errors
/// See [`PluckerError`].
pub fn features(
    world_from_camera: &[Pose],
    reference: usize,
    k: &Intrinsics,
    height: usize,
    width: usize,
    cell: usize,
) -> Result<Vec<f32>, PluckerError> {
    let count = world_from_camera.len();
    if count % 4 != 1 {
        return Err(PluckerError::Frames(count));
    }
    let origin = world_from_camera.get(reference).ok_or(PluckerError::Reference { reference, count })?;
    if cell == 0 || height == 0 || width == 0 || !height.is_multiple_of(cell) || !width.is_multiple_of(cell) {
        return Err(PluckerError::Cells { width, height, cell });
    }
    if !(k.fx.is_finite() && k.fy.is_finite() && k.fx > 0.0 && k.fy > 0.0) {
        return Err(PluckerError::Value("focal length"));
    }
    if !(k.cx.is_finite() && k.cy.is_finite()) {
        return Err(PluckerError::Value("principal point"));
    }
    if world_from_camera.iter().flatten().flatten().any(|x| !x.is_finite()) {
        return Err(PluckerError::Value("pose"));
    }
    let (rows, columns) = (height / cell, width / cell);
    let latents = 1 + (count - 1) / 4;
    let plane = rows * columns;
    let mut out = vec![0.0f32; CHANNELS * latents * plane];
    for (frame, world_from_this) in world_from_camera.iter().enumerate() {
        let pooled = pooled(&relative(origin, world_from_this), k, rows, columns, cell);
        let slots = if frame == 0 { 0..4 } else { (frame - 1) % 4..(frame - 1) % 4 + 1 };
        let latent = frame.div_ceil(4);
        for slot in slots {
            for c in 0..6 {
                let at = ((slot * 6 + c) * latents + latent) * plane;
                for (to, from) in out[at..at + plane].iter_mut().zip(&pooled[c * plane..]) {
                    *to = *from as f32;
                }
            }
        }
    }
    Ok(out)
}

/// Mean line per cell, `[6, rows, columns]`.
fn pooled(
    reference_from_camera: &Pose,
    k: &Intrinsics,
    rows: usize,
    columns: usize,
    cell: usize,
) -> Vec<f64> {
    let plane = rows * columns;
    let share = 1.0 / (cell * cell) as f64;
    let mut out = vec![0.0; 6 * plane];
    for v in 0..rows * cell {
        for u in 0..columns * cell {
            let line = ray(reference_from_camera, k, u as f64 + 0.5, v as f64 + 0.5);
            let at = v / cell * columns + u / cell;
            for (c, value) in line.into_iter().enumerate() {
                out[c * plane + at] += value * share;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: Intrinsics = Intrinsics { fx: 50.0, fy: 50.0, cx: 32.0, cy: 32.0 };

    #[test]
    fn a_line_is_orthogonal_to_its_moment_and_of_unit_length() {
        let p = pose(0.3, -0.2, 0.1, [1.0, 2.0, 3.0]);
        for (u, v) in [(0.5, 0.5), (32.0, 32.0), (63.5, 10.5)] {
            let l = ray(&p, &K, u, v);
            let dot: f64 = (0..3).map(|i| l[i] * l[i + 3]).sum();
            let norm: f64 = l[3..].iter().map(|x| x * x).sum();
            assert!(dot.abs() < 1e-12 && (norm - 1.0).abs() < 1e-12, "{l:?}");
        }
    }

    #[test]
    fn relative_of_a_pose_to_itself_is_the_identity() {
        let p = pose(0.3, -0.2, 0.1, [1.0, 2.0, 3.0]);
        let r = relative(&p, &p);
        for (i, row) in r.iter().enumerate() {
            for (j, x) in row.iter().enumerate() {
                assert!((x - f64::from(u8::from(i == j))).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn bad_requests_are_refused() {
        let p = pose(0.0, 0.0, 0.0, [0.0; 3]);
        assert_eq!(features(&[p; 4], 0, &K, 64, 64, 32), Err(PluckerError::Frames(4)));
        assert_eq!(
            features(&[p; 5], 5, &K, 64, 64, 32),
            Err(PluckerError::Reference { reference: 5, count: 5 })
        );
        assert!(matches!(features(&[p; 5], 0, &K, 60, 64, 32), Err(PluckerError::Cells { .. })));
        let nan = pose(f64::NAN, 0.0, 0.0, [0.0; 3]);
        assert_eq!(features(&[nan], 0, &K, 64, 64, 32), Err(PluckerError::Value("pose")));
    }
}
