//! Small RGB pictures: resampling camera frames to what the model looks at, and writing pictures.

pub use mindseye_base::picture::RgbImage;
use mindseye_base::scale::{Scaler, Taps};
use mindseye_bridge::camera::CameraIntrinsics;
use mindseye_engines::plucker::Intrinsics;
use mindseye_landmarks::Camera;

/// The pin-hole camera that the model was trained with. Pixel centres are at integer coordinates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelCamera {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Focal length in pixels, the same along both axes. `None`: trained on whatever cameras see, so that frames
    /// are only scaled and cropped.
    pub focal_px: Option<f64>,
}

impl ModelCamera {
    /// The camera with the given horizontal field of view (radians) and square pixels.
    pub fn from_fov(width: usize, height: usize, horizontal_fov_rad: f64) -> Self {
        let focal_px = Some(width as f64 / (2.0 * (horizontal_fov_rad / 2.0).tan()));
        Self { width, height, focal_px }
    }

    /// The same camera with other numbers of pixels over the same field of view.
    pub fn resized(&self, width: usize, height: usize) -> Self {
        let scale = width as f64 / self.width.max(1) as f64;
        Self { width, height, focal_px: self.focal_px.map(|focal| focal * scale) }
    }

    /// Any camera: frames fill the model's picture, the middle of what does not fit is taken.
    pub fn any(width: usize, height: usize) -> Self {
        Self { width, height, focal_px: None }
    }

    /// As pictures are placed with it; `None` where it has no focal length of its own, or no pixel.
    pub fn pinhole(&self) -> Option<Camera> {
        let focal = self.focal_px?;
        let middle = |n: usize| 0.5 * (n as f64 - 1.0);
        let (width, height) = (u32::try_from(self.width).ok()?, u32::try_from(self.height).ok()?);
        Camera::pinhole(width, height, focal, focal, middle(self.width), middle(self.height)).ok()
    }

    /// Its pin-hole, where it has one of its own.
    pub fn intrinsics(&self) -> Option<Intrinsics> {
        let (cx, cy) = (self.width as f64 / 2.0, self.height as f64 / 2.0);
        self.focal_px.map(|focal| Intrinsics { fx: focal, fy: focal, cx, cy })
    }
}

/// What each model pixel covers along one axis of the source.
fn coverage(out: usize, out_focal: f64, source: usize, source_focal: f64, source_centre: f64) -> Vec<Taps> {
    let ratio = source_focal / out_focal;
    let middle = (out as f64 - 1.0) / 2.0;
    (0..out)
        .map(|i| {
            // Edges of the model pixel, as source coordinates with cell k covering [k, k + 1).
            let from = source_centre + 0.5 + (i as f64 - 0.5 - middle) * ratio;
            let to = source_centre + 0.5 + (i as f64 + 0.5 - middle) * ratio;
            Taps::covering(from, to, source)
        })
        .collect()
}

/// The picture does not suit the calibration, or has no pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{width}x{height} pixels do not fit the intrinsics")]
pub struct Misfit {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// Looks at camera frames with the model's camera: area averaging, the fields of view lined up.
///
/// With intrinsics (for the frame's size, or scaled to it) a model pixel averages exactly the part of the
/// source that it would see; what lies outside the source is black. Lens distortion is not undone. Without
/// intrinsics the source is taken to have the model's horizontal field of view and square pixels, so that a
/// taller source is cropped and a wider one gets bars. A model without a field of view of its own
/// ([`ModelCamera::any`]) takes the largest middle part of the source that has its shape.
///
/// Which pixels make up which is found once for each size and calibration; later frames allocate nothing.
#[derive(Debug)]
pub struct Lens {
    camera: ModelCamera,
    /// What is scaled with what: width, height, intrinsics.
    source: Option<(usize, usize, Option<CameraIntrinsics>)>,
    scaler: Scaler,
    /// What each pixel is brightened by: one that lies mostly inside the source keeps its brightness; one outside is black.
    gains: Vec<f32>,
}

impl Lens {
    /// A lens of the model's camera.
    pub fn new(camera: ModelCamera) -> Self {
        Self {
            camera,
            source: None,
            scaler: Scaler::with_taps((0, 0), Vec::new(), Vec::new()),
            gains: Vec::new(),
        }
    }

    /// Intrinsics of the pictures that it makes; `None` before the first one, and for a model without a camera of its
    /// own that looks at frames of unknown calibration.
    pub fn intrinsics(&self) -> Option<Intrinsics> {
        let (width, height, known) = self.source.as_ref()?;
        if let Some(own) = self.camera.intrinsics() {
            return Some(own);
        }
        let k = known.as_ref()?.resized(u32::try_from(*width).ok()?, u32::try_from(*height).ok()?);
        // Source pixels for each of ours, and the middle of both lined up: see `line_up`.
        let (_, [fill, _, middle_x, middle_y]) = line_up(self.camera, *width, *height, None)?;
        Some(Intrinsics {
            fx: k.fx / fill,
            fy: k.fy / fill,
            cx: self.camera.width as f64 / 2.0 + (k.cx - middle_x) / fill,
            cy: self.camera.height as f64 / 2.0 + (k.cy - middle_y) / fill,
        })
    }

    /// Puts what the model's camera would see of a frame into `out`. `rgb` holds `width * height * 3` bytes.
    ///
    /// # Errors
    /// [`Misfit`] when sizes disagree or are zero, or the intrinsics are none; `out` is then as it was.
    pub fn look(
        &mut self,
        rgb: &[u8],
        width: usize,
        height: usize,
        intrinsics: Option<&CameraIntrinsics>,
        out: &mut RgbImage,
    ) -> Result<(), Misfit> {
        let misfit = Misfit { width, height };
        let want = width.checked_mul(height).and_then(|n| n.checked_mul(3)).ok_or(misfit)?;
        let camera = self.camera;
        if want == 0 || rgb.len() != want || camera.width == 0 || camera.height == 0 {
            return Err(misfit);
        }
        let known =
            self.source.as_ref().is_some_and(|(w, h, k)| (*w, *h, k.as_ref()) == (width, height, intrinsics));
        if !known {
            let (model_focal, [fx, fy, cx, cy]) = line_up(camera, width, height, intrinsics).ok_or(misfit)?;
            let columns = coverage(camera.width, model_focal, width, fx, cx);
            let rows = coverage(camera.height, model_focal, height, fy, cy);
            let pairs =
                rows.iter().flat_map(|row| columns.iter().map(|column| row.inside() * column.inside()));
            self.gains = pairs.map(|inside| if inside > 0.5 { 1.0 / inside } else { 1.0 }).collect();
            self.scaler = Scaler::with_taps((width, height), columns, rows);
            self.source = Some((width, height, intrinsics.cloned()));
        }
        (out.width, out.height) = (camera.width, camera.height);
        out.data.clear();
        out.data.reserve(camera.width * camera.height * 3);
        let mut gains = self.gains.iter();
        let put = |sum: [f32; 3]| {
            let gain = gains.next().copied().unwrap_or(1.0);
            out.data.extend(sum.map(|s| (s * gain).round().clamp(0.0, 255.0) as u8));
        };
        self.scaler.scale(rgb, put).map_err(|_| misfit)
    }
}

/// The model's focal length and the source's focal lengths and principal point that line up, in pixels.
fn line_up(
    camera: ModelCamera,
    width: usize,
    height: usize,
    intrinsics: Option<&CameraIntrinsics>,
) -> Option<(f64, [f64; 4])> {
    let (middle_x, middle_y) = ((width as f64 - 1.0) / 2.0, (height as f64 - 1.0) / 2.0);
    let scale = [width as f64 / camera.width as f64, height as f64 / camera.height as f64];
    let (model_focal, source) = match (camera.focal_px, intrinsics) {
        (Some(focal), Some(k)) => {
            let k = k.resized(u32::try_from(width).ok()?, u32::try_from(height).ok()?);
            (focal, [k.fx, k.fy, k.cx, k.cy])
        }
        (Some(focal), None) => (focal, [focal * scale[0], focal * scale[0], middle_x, middle_y]),
        (None, _) => {
            let fill = scale[0].min(scale[1]);
            (1.0, [fill, fill, middle_x, middle_y])
        }
    };
    let [fx, fy, ..] = source;
    (source.iter().all(|v| v.is_finite()) && fx > 0.0 && fy > 0.0).then_some((model_focal, source))
}

/// Mean absolute difference of two pictures of one size, 0..1 of full scale; `None` when sizes differ.
pub fn mean_difference(a: &RgbImage, b: &RgbImage) -> Option<f64> {
    if (a.width, a.height) != (b.width, b.height) || a.data.is_empty() {
        return None;
    }
    let sum: u64 = a.data.iter().zip(&b.data).map(|(x, y)| u64::from(x.abs_diff(*y))).sum();
    Some(sum as f64 / a.data.len() as f64 / 255.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: usize, height: usize) -> RgbImage {
        let mut data = Vec::new();
        for y in 0..height {
            for x in 0..width {
                data.extend([(x * 255 / (width - 1)) as u8, (y * 255 / (height - 1)) as u8, 128]);
            }
        }
        RgbImage { width, height, data }
    }

    fn intrinsics(width: u32, height: u32, focal: f64) -> CameraIntrinsics {
        CameraIntrinsics {
            frame_id: "cam".into(),
            width,
            height,
            fx: focal,
            fy: focal,
            cx: (f64::from(width) - 1.0) / 2.0,
            cy: (f64::from(height) - 1.0) / 2.0,
            distortion_model: "plumb_bob".into(),
            distortion: vec![],
        }
    }

    fn look_through(
        camera: ModelCamera,
        rgb: &[u8],
        width: usize,
        height: usize,
        intrinsics: Option<&CameraIntrinsics>,
    ) -> Option<RgbImage> {
        let mut out = RgbImage::filled(1, 1, [9; 3]);
        Lens::new(camera).look(rgb, width, height, intrinsics, &mut out).ok().map(|()| out)
    }

    #[test]
    fn a_lens_follows_the_camera() {
        // The same lens for other sizes and calibrations gives what a fresh one does.
        let camera = ModelCamera { width: 4, height: 2, focal_px: Some(3.0) };
        let mut lens = Lens::new(camera);
        let mut out = RgbImage::filled(1, 1, [0; 3]);
        let narrow = intrinsics(12, 8, 20.0);
        for (width, height, known) in [(12, 8, None), (12, 8, Some(&narrow)), (9, 5, None), (12, 8, None)] {
            let picture = gradient(width, height);
            lens.look(&picture.data, width, height, known, &mut out).unwrap();
            let want = look_through(camera, &picture.data, width, height, known).unwrap();
            assert_eq!(out, want, "{width}x{height}, {known:?}");
        }
        assert_eq!(lens.look(&[0; 5], 2, 2, None, &mut out), Err(Misfit { width: 2, height: 2 }));
    }

    #[test]
    fn same_camera_is_the_identity() {
        let picture = gradient(24, 16);
        let camera = ModelCamera { width: 24, height: 16, focal_px: Some(12.0) };
        let same = look_through(camera, &picture.data, 24, 16, Some(&intrinsics(24, 16, 12.0))).unwrap();
        assert_eq!(same, picture);
        assert_eq!(look_through(camera, &picture.data, 24, 16, None).unwrap(), picture);
    }

    #[test]
    fn an_exact_reduction_averages_blocks() {
        // 2 x 2 source blocks with a known mean.
        let mut data = Vec::new();
        for y in 0..4usize {
            for x in 0..8usize {
                data.extend([(10 * (x / 2) + y % 2 * 4) as u8, 7, if x % 2 == 0 { 0 } else { 100 }]);
            }
        }
        let camera = ModelCamera { width: 4, height: 2, focal_px: Some(3.0) };
        let small = look_through(camera, &data, 8, 4, Some(&intrinsics(8, 4, 6.0))).unwrap();
        for y in 0..2 {
            for x in 0..4 {
                assert_eq!(small.pixel(x, y), [10 * x as u8 + 2, 7, 50], "({x}, {y})");
            }
        }
    }

    #[test]
    fn fields_of_view_are_lined_up() {
        // A source that sees less than the model is surrounded by black; one that sees more is cropped.
        let white = RgbImage::filled(100, 100, [255; 3]);
        let camera = ModelCamera { width: 20, height: 20, focal_px: Some(10.0) };
        let narrow = look_through(camera, &white.data, 100, 100, Some(&intrinsics(100, 100, 100.0))).unwrap();
        assert_eq!((narrow.pixel(0, 10), narrow.pixel(10, 10)), ([0; 3], [255; 3]));
        let lit = narrow.data.iter().filter(|v| **v == 255).count() / 3;
        assert_eq!(lit, 100, "half the field of view per axis is a quarter of the picture");
        let wide = look_through(camera, &white.data, 100, 100, Some(&intrinsics(100, 100, 25.0))).unwrap();
        assert!(wide.data.iter().all(|v| *v == 255));
    }

    #[test]
    fn a_model_for_any_camera_takes_the_middle() {
        // Columns 0..100 and 140..240 are black, the middle is white; the model is square.
        let mut wide = RgbImage::filled(240, 40, [0; 3]);
        for y in 0..40 {
            for x in 100..140 {
                wide.data[(y * 240 + x) * 3..][..3].copy_from_slice(&[255; 3]);
            }
        }
        for known in [None, Some(intrinsics(240, 40, 500.0))] {
            let seen = look_through(ModelCamera::any(8, 8), &wide.data, 240, 40, known.as_ref()).unwrap();
            assert!(seen.data.iter().all(|v| *v == 255), "no bars, whatever the intrinsics: {known:?}");
        }
    }

    #[test]
    fn pictures_have_the_intrinsics_that_are_told() {
        // A camera whose principal point is off the middle looks at a point; the lens shows it where its own intrinsics
        // project it.
        let mut k = intrinsics(240, 80, 100.0);
        (k.cx, k.cy) = (150.0, 30.0);
        let (x, y) = (0.22, 0.08);
        let (u, v) = (k.cx + k.fx * x, k.cy + k.fy * y);
        let mut source = RgbImage::filled(240, 80, [0; 3]);
        for row in -5i32..=5 {
            for column in -5i32..=5 {
                let at = ((v.round() as i32 + row) * 240 + u.round() as i32 + column) * 3;
                source.data[at as usize..][..3].copy_from_slice(&[255; 3]);
            }
        }
        let mut lens = Lens::new(ModelCamera::any(16, 8));
        assert_eq!(lens.intrinsics(), None);
        let mut out = RgbImage::filled(1, 1, [0; 3]);
        lens.look(&source.data, 240, 80, Some(&k), &mut out).unwrap();
        let ours = lens.intrinsics().unwrap();
        assert_eq!((ours.fx, ours.fy), (10.0, 10.0), "ten pixels become one");
        let mut middle = [0.0; 3];
        for row in 0..8 {
            for column in 0..16 {
                let light = f64::from(out.pixel(column, row)[0]);
                middle[0] += light * (column as f64 + 0.5);
                middle[1] += light * (row as f64 + 0.5);
                middle[2] += light;
            }
        }
        let (wanted_u, wanted_v) = (ours.cx + ours.fx * x, ours.cy + ours.fy * y);
        assert!((middle[0] / middle[2] - wanted_u).abs() < 0.06, "{middle:?} {wanted_u}");
        assert!((middle[1] / middle[2] - wanted_v).abs() < 0.06, "{middle:?} {wanted_v}");
        lens.look(&source.data, 240, 80, None, &mut out).unwrap();
        assert_eq!(lens.intrinsics(), None, "nothing is known of this camera");
    }

    #[test]
    fn nonsense_is_refused() {
        let camera = ModelCamera { width: 4, height: 2, focal_px: Some(3.0) };
        assert!(look_through(camera, &[0; 11], 2, 2, None).is_none());
        assert!(look_through(camera, &[], 0, 2, None).is_none());
        assert!(look_through(camera, &[], usize::MAX, 3, None).is_none());
        assert!(look_through(camera, &[0; 12], 2, 2, Some(&intrinsics(2, 2, f64::NAN))).is_none());
    }
}
