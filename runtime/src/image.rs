//! Small RGB pictures: resampling camera frames to what the model looks at, and writing pictures.

pub use mindseye_base::picture::RgbImage;
use mindseye_bridge::camera::CameraIntrinsics;

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

    /// Any camera: frames fill the model's picture, the middle of what does not fit is taken.
    pub fn any(width: usize, height: usize) -> Self {
        Self { width, height, focal_px: None }
    }
}

/// What one model pixel covers along one axis of the source: cells and their shares.
fn coverage(out: usize, out_focal: f64, source: usize, source_focal: f64, source_centre: f64) -> Vec<Span> {
    let ratio = source_focal / out_focal;
    let middle = (out as f64 - 1.0) / 2.0;
    (0..out)
        .map(|i| {
            // Edges of the model pixel, as source coordinates with cell k covering [k, k + 1).
            let from = source_centre + 0.5 + (i as f64 - 0.5 - middle) * ratio;
            let to = source_centre + 0.5 + (i as f64 + 0.5 - middle) * ratio;
            Span::new(from, to, source)
        })
        .collect()
}

struct Span {
    first: usize,
    weights: Vec<f32>,
    /// Share of the model pixel that lies inside the source, 0..1.
    inside: f32,
}

impl Span {
    fn new(from: f64, to: f64, cells: usize) -> Self {
        let (a, b) = (from.max(0.0), to.min(cells as f64));
        if b <= a {
            return Self { first: 0, weights: Vec::new(), inside: 0.0 };
        }
        let first = (a.floor() as usize).min(cells - 1);
        let last = ((b.ceil() as usize).max(first + 1)).min(cells);
        let length = to - from;
        let weights: Vec<f32> = (first..last)
            .map(|k| (((b.min(k as f64 + 1.0) - a.max(k as f64)).max(0.0)) / length) as f32)
            .collect();
        let inside = weights.iter().sum();
        Self { first, weights, inside }
    }
}

/// Looks at a camera frame with the model's camera: area averaging, the fields of view lined up.
///
/// With `intrinsics` (for the frame's size, or scaled to it) a model pixel averages exactly the part of the
/// source that it would see; what lies outside the source is black. Lens distortion is not undone. Without
/// intrinsics the source is taken to have the model's horizontal field of view and square pixels, so that a
/// taller source is cropped and a wider one gets bars. A model without a field of view of its own
/// ([`ModelCamera::any`]) takes the largest middle part of the source that has its shape.
///
/// `rgb` holds `width * height * 3` bytes. Returns `None` when sizes disagree or are zero.
pub fn look_through(
    camera: ModelCamera,
    rgb: &[u8],
    width: usize,
    height: usize,
    intrinsics: Option<&CameraIntrinsics>,
) -> Option<RgbImage> {
    let want = width.checked_mul(height)?.checked_mul(3)?;
    if want == 0 || rgb.len() != want || camera.width == 0 || camera.height == 0 {
        return None;
    }
    let (middle_x, middle_y) = ((width as f64 - 1.0) / 2.0, (height as f64 - 1.0) / 2.0);
    let scale = [width as f64 / camera.width as f64, height as f64 / camera.height as f64];
    let (model_focal, (fx, fy, cx, cy)) = match (camera.focal_px, intrinsics) {
        (Some(focal), Some(k)) => {
            let k = k.resized(u32::try_from(width).ok()?, u32::try_from(height).ok()?);
            (focal, (k.fx, k.fy, k.cx, k.cy))
        }
        (Some(focal), None) => (focal, (focal * scale[0], focal * scale[0], middle_x, middle_y)),
        (None, _) => {
            let fill = scale[0].min(scale[1]);
            (1.0, (fill, fill, middle_x, middle_y))
        }
    };
    if ![fx, fy, cx, cy].iter().all(|v| v.is_finite()) || fx <= 0.0 || fy <= 0.0 {
        return None;
    }
    let columns = coverage(camera.width, model_focal, width, fx, cx);
    let rows = coverage(camera.height, model_focal, height, fy, cy);
    let mut data = Vec::with_capacity(camera.width * camera.height * 3);
    // Rows first: one weighted source row per model row, then columns.
    let mut line = vec![0.0f32; width * 3];
    for row in &rows {
        line.fill(0.0);
        for (k, weight) in row.weights.iter().enumerate() {
            let source = &rgb[(row.first + k) * width * 3..][..width * 3];
            for (sum, value) in line.iter_mut().zip(source) {
                *sum += weight * f32::from(*value);
            }
        }
        for column in &columns {
            let mut sum = [0.0f32; 3];
            for (k, weight) in column.weights.iter().enumerate() {
                let at = (column.first + k) * 3;
                for (s, v) in sum.iter_mut().zip(&line[at..at + 3]) {
                    *s += weight * v;
                }
            }
            // A pixel that lies mostly inside keeps its brightness; one outside is black.
            let covered = row.inside * column.inside;
            let gain = if covered > 0.5 { 1.0 / covered } else { 1.0 };
            data.extend(sum.iter().map(|s| (s * gain).round().clamp(0.0, 255.0) as u8));
        }
    }
    RgbImage::from_rgb(camera.width, camera.height, data)
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
    fn nonsense_is_refused() {
        let camera = ModelCamera { width: 4, height: 2, focal_px: Some(3.0) };
        assert!(look_through(camera, &[0; 11], 2, 2, None).is_none());
        assert!(look_through(camera, &[], 0, 2, None).is_none());
        assert!(look_through(camera, &[], usize::MAX, 3, None).is_none());
        assert!(look_through(camera, &[0; 12], 2, 2, Some(&intrinsics(2, 2, f64::NAN))).is_none());
    }
}
