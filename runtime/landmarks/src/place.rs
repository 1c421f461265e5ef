//! Where a picture was taken, by remembered pictures that are carried into the view.
//!
//! The camera is on a base that stands on the floor: x, y and yaw are looked for. [`Placer::survey`] looks around from a
//! grid of places once; [`Placer::place`] compares a picture with all of these looks in all headings, and refines the most
//! alike, and any pose that the caller thinks of, by direct alignment (Gauss-Newton on colours, the remembered surfaces
//! being carried anew between rounds). Pictures may be small and blurred: both sides are smoothed a little, and a pixel
//! that is not explained at all counts no more than one that is explained badly.
//!
//! The result says how well the picture is explained ([`Placed::error`]), how well as compared to a view from anywhere
//! ([`Placed::distinct`]), and by the curvature of the error how exactly the place is known.

use mindseye_base::picture::RgbImage;
use mindseye_base::planar::{Pose2, wrap_angle};
use nalgebra::{Isometry3, Matrix3, Point3, Translation3, UnitQuaternion, Vector2, Vector3};

use crate::camera::Camera;
use crate::carry::{Carried, Carrier, Remembered};

/// Settings of [`Placer`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlaceConfig {
    /// Distance of the surveyed places (metres); wider where there would be more than [`Self::places_max`].
    pub spacing_m: f64,
    /// Places are surveyed this far around where views were taken (metres).
    pub margin_m: f64,
    /// Most places.
    pub places_max: usize,
    /// Surveyed places that are looked at more closely.
    pub starts: usize,
    /// Places from which a picture is refined, the most alike of these and of the caller's.
    pub refined: usize,
    /// Rounds of refinement, each of which carries the memory once.
    pub rounds: usize,
    /// Colour difference (0..1, root mean square over the channels) that is half explained.
    pub half: f32,
    /// What a pixel counts that nothing was carried into: an error from 0 to 1.
    pub unseen: f32,
}

impl Default for PlaceConfig {
    fn default() -> Self {
        Self {
            spacing_m: 0.45,
            margin_m: 4.0,
            places_max: 400,
            starts: 6,
            refined: 3,
            rounds: 4,
            half: 0.1,
            unseen: 0.5,
        }
    }
}

/// Where a picture was taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placed {
    /// `map_from_base` (metres, radians).
    pub pose: Pose2,
    /// Covariance of x, y (m²) and yaw (rad²) along the axes of the base, from the curvature of the error alone: to be
    /// scaled by what calibration finds.
    pub covariance: Matrix3<f64>,
    /// How much of the picture is not explained, 0 (nothing) to 1.
    pub error: f64,
    /// Share of the picture into which something was carried, 0..1.
    pub covered: f64,
    /// How much better this place explains the picture than the median place does: 1 - error / median, by the survey.
    pub distinct: f64,
    /// Error at the best place that is more than half a metre or 20 degrees away, where one was tried.
    pub elsewhere: Option<f64>,
}

/// A picture prepared for comparison.
#[derive(Clone, Debug)]
pub struct Look {
    width: usize,
    height: usize,
    /// Smoothed.
    rgb: Vec<[f32; 3]>,
    /// Slopes of `rgb` along x and y, per pixel.
    slope: Vec<[[f32; 3]; 2]>,
    /// What each pixel counts, 0..1.
    weight: Vec<f32>,
    /// Means of square cells, and what each counts.
    cells: Vec<([f32; 3], f32)>,
}

/// Cells of a reduced picture per row.
const CELLS: usize = 12;

/// Pixels of a cell's side.
fn cell_side(width: usize) -> usize {
    (width / CELLS).max(1)
}

impl Look {
    /// The mean of pictures of one size (the first one's) of which the pixels marked `omitted` do not count: outlines that
    /// were drawn over them. `None` without a picture, when sizes differ, or when a side is under three pixels.
    #[must_use]
    pub fn of(pictures: &[&RgbImage], omitted: impl Fn(usize, usize) -> bool) -> Option<Self> {
        let first = pictures.first()?;
        let (width, height) = (first.width, first.height);
        let fits = |p: &&RgbImage| (p.width, p.height, p.data.len()) == (width, height, width * height * 3);
        if width < 3 || height < 3 || !pictures.iter().all(fits) {
            return None;
        }
        let scale = 1.0 / (255.0 * pictures.len() as f32);
        let mut plain = vec![[0.0f32; 3]; width * height];
        for picture in pictures {
            for (sum, rgb) in plain.iter_mut().zip(picture.data.chunks_exact(3)) {
                (0..3).for_each(|c| sum[c] += scale * f32::from(rgb[c]));
            }
        }
        let weight: Vec<f32> =
            (0..width * height).map(|i| if omitted(i % width, i / width) { 0.0 } else { 1.0 }).collect();
        let mut rgb = Vec::new();
        smooth(&plain, &weight, width, height, &mut rgb);
        let at = |x: usize, y: usize| rgb[y * width + x];
        let slope = (0..width * height)
            .map(|i| {
                let (x, y) = (i % width, i / width);
                let (l, r) = (x.saturating_sub(1), (x + 1).min(width - 1));
                let (u, d) = (y.saturating_sub(1), (y + 1).min(height - 1));
                let across = |a: [f32; 3], b: [f32; 3], n: usize| {
                    std::array::from_fn(|c| (b[c] - a[c]) / n.max(1) as f32)
                };
                [across(at(l, y), at(r, y), r - l), across(at(x, u), at(x, d), d - u)]
            })
            .collect();
        let cells = reduce(&plain, &weight, width, height);
        Some(Self { width, height, rgb, slope, weight, cells })
    }

    /// Colour and slopes between pixels; `None` outside the outermost pixels' centres.
    fn between(&self, u: f32, v: f32) -> Option<Between> {
        let (right, bottom) = ((self.width - 1) as f32, (self.height - 1) as f32);
        if !(u >= 0.0 && v >= 0.0 && u <= right && v <= bottom) {
            return None;
        }
        let (x, y) = ((u as usize).min(self.width - 2), (v as usize).min(self.height - 2));
        let (fx, fy) = (u - x as f32, v - y as f32);
        let corners = [
            (y * self.width + x, (1.0 - fx) * (1.0 - fy)),
            (y * self.width + x + 1, fx * (1.0 - fy)),
            ((y + 1) * self.width + x, (1.0 - fx) * fy),
            ((y + 1) * self.width + x + 1, fx * fy),
        ];
        let mut out = Between::default();
        for (i, k) in corners {
            for c in 0..3 {
                out.colour[c] += k * self.rgb[i][c];
                out.slope[0][c] += k * self.slope[i][0][c];
                out.slope[1][c] += k * self.slope[i][1][c];
            }
            out.weight += k * self.weight[i];
        }
        Some(out)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Between {
    colour: [f32; 3],
    slope: [[f32; 3]; 2],
    weight: f32,
}

/// Weighted binomial mean of each pixel and its neighbours.
fn smooth(plain: &[[f32; 3]], weight: &[f32], width: usize, height: usize, out: &mut Vec<[f32; 3]>) {
    out.clear();
    for y in 0..height {
        for x in 0..width {
            let (mut sum, mut all) = ([0.0f32; 3], 0.0);
            for ny in y.saturating_sub(1)..(y + 2).min(height) {
                for nx in x.saturating_sub(1)..(x + 2).min(width) {
                    let near = |a: usize, b: usize| if a == b { 2.0 } else { 1.0 };
                    let i = ny * width + nx;
                    let k = near(x, nx) * near(y, ny) * weight[i];
                    (0..3).for_each(|c| sum[c] += k * plain[i][c]);
                    all += k;
                }
            }
            out.push(if all > 0.0 { sum.map(|v| v / all) } else { plain[y * width + x] });
        }
    }
}

/// Weighted means of square cells, with the mean weight.
fn reduce(plain: &[[f32; 3]], weight: &[f32], width: usize, height: usize) -> Vec<([f32; 3], f32)> {
    let side = cell_side(width);
    let mut cells = Vec::new();
    for cy in 0..height / side {
        for cx in 0..width / side {
            let (mut sum, mut all) = ([0.0f32; 3], 0.0);
            for y in cy * side..(cy + 1) * side {
                for x in cx * side..(cx + 1) * side {
                    let i = y * width + x;
                    (0..3).for_each(|c| sum[c] += weight[i] * plain[i][c]);
                    all += weight[i];
                }
            }
            let mean = if all > 0.0 { sum.map(|v| v / all) } else { [0.0; 3] };
            cells.push((mean, all / (side * side) as f32));
        }
    }
    cells
}

/// Columns of a panorama, one for each heading that is tried.
const HEADINGS: usize = 72;
/// Angle between two columns or rows (radians).
const CELL_RAD: f32 = std::f32::consts::TAU / HEADINGS as f32;
/// Rows of a panorama: from straight down to straight up.
const ROWS: usize = HEADINGS / 2;

/// What is seen from one place all around: colour, and whether anything is (0 or 255).
struct Panorama {
    /// Optical centre (metres).
    at: [f64; 2],
    cells: Vec<[u8; 4]>,
}

/// Places pictures, with memory that is used again.
pub struct Placer {
    /// The camera of the pictures.
    camera: Camera,
    base_from_camera: Isometry3<f64>,
    config: PlaceConfig,
    carrier: Carrier,
    panoramas: Vec<Panorama>,
    /// Row of a panorama and column at heading 0 for each cell of a picture.
    cells: Vec<(usize, usize)>,
    smoothed: Vec<[f32; 3]>,
    scores: Vec<f32>,
}

/// An angle of which the tangent is `y / x`, to half a degree.
fn angle(y: f32, x: f32) -> f32 {
    let (ax, ay) = (x.abs(), y.abs());
    let (low, high) = if ax < ay { (ax, ay) } else { (ay, ax) };
    let q = low / high.max(1e-12);
    let a = q * (0.9724 - 0.1919 * q * q);
    let a = if ay > ax { std::f32::consts::FRAC_PI_2 - a } else { a };
    let a = if x < 0.0 { std::f32::consts::PI - a } else { a };
    if y < 0.0 { -a } else { a }
}

/// `map_from_base` as a transform in space.
fn isometry(pose: Pose2) -> Isometry3<f64> {
    Isometry3::from_parts(
        Translation3::new(pose.x, pose.y, 0.0),
        UnitQuaternion::from_axis_angle(&Vector3::z_axis(), pose.yaw),
    )
}

/// Whether two poses are of one place: within half a metre and 20 degrees.
fn same_place(a: Pose2, b: Pose2) -> bool {
    a.distance(b) < 0.5 && wrap_angle(a.yaw - b.yaw).abs() < 20f64.to_radians()
}

impl Placer {
    /// For pictures of a camera (its lens is taken as rectified) that sits so on its base.
    #[must_use]
    pub fn new(camera: Camera, base_from_camera: Isometry3<f64>, config: PlaceConfig) -> Self {
        let (width, height) = (camera.size().0 as usize, camera.size().1 as usize);
        let side = cell_side(width);
        let mut cells = Vec::new();
        for cy in 0..height / side {
            for cx in 0..width / side {
                let middle = |c: usize| (c * side) as f64 + 0.5 * (side as f64 - 1.0);
                let ray = camera.ray(Vector2::new(middle(cx), middle(cy))).unwrap_or_default();
                let d = base_from_camera.rotation * Vector3::new(ray.x, ray.y, 1.0);
                let up = (d.z.atan2(d.x.hypot(d.y)) + std::f64::consts::FRAC_PI_2) as f32 / CELL_RAD;
                let around = d.y.atan2(d.x) as f32 / CELL_RAD;
                let row = (up as usize).min(ROWS - 1);
                cells.push((row, (around.round() as isize).rem_euclid(HEADINGS as isize) as usize));
            }
        }
        Self {
            camera,
            base_from_camera,
            config,
            carrier: Carrier::default(),
            panoramas: Vec::new(),
            cells,
            smoothed: Vec::new(),
            scores: Vec::new(),
        }
    }

    /// What the camera would see from a pose.
    pub fn carry(&mut self, memory: &Remembered, map_from_camera: &Isometry3<f64>) -> &mut Carried {
        self.carrier.carry(memory, &self.camera, map_from_camera)
    }

    /// Looks around from a grid of places within reach of the remembered views. Without it pictures are compared with the
    /// poses that the caller gives alone.
    pub fn survey(&mut self, memory: &Remembered) {
        self.panoramas.clear();
        let step = (memory.squares() / 6000).max(1) | 1;
        // A step that does not divide a row: else whole columns of the pictures would be left out.
        let step = if step.is_multiple_of(3) { step + 2 } else { step };
        let squares: Vec<_> = memory.thinned(step).collect();
        let range = |axis: usize| -> Option<(f64, f64)> {
            let mut v: Vec<f32> = squares.iter().map(|s| s.0[axis]).collect();
            v.sort_by(f32::total_cmp);
            let at = |share: usize| v.get(v.len() * share / 100).map(|v| f64::from(*v));
            let taken = || memory.poses().map(|p| p.translation.vector[axis]);
            let low = at(2)?.max(taken().fold(f64::INFINITY, f64::min) - self.config.margin_m);
            let high = at(98)?.min(taken().fold(f64::NEG_INFINITY, f64::max) + self.config.margin_m);
            (high > low).then_some((low, high))
        };
        let (Some((x0, x1)), Some((y0, y1))) = (range(0), range(1)) else { return };
        let fewest = ((x1 - x0) * (y1 - y0) / self.config.places_max.max(1) as f64).sqrt();
        let spacing = self.config.spacing_m.max(fewest).max(0.05);
        let count = |a: f64, b: f64| ((b - a) / spacing).ceil().max(1.0) as usize;
        let (nx, ny) = (count(x0, x1), count(y0, y1));
        let height = memory.poses().next().map_or(0.0, |p| p.translation.vector.z);
        for j in 0..ny {
            for i in 0..nx {
                let at = [
                    x0 + (x1 - x0) * (i as f64 + 0.5) / nx as f64,
                    y0 + (y1 - y0) * (j as f64 + 0.5) / ny as f64,
                ];
                self.panoramas.extend(panorama(&squares, at, height));
            }
        }
    }

    /// Where a picture was taken: over all surveyed places and headings, and `starts` (`map_from_base`). `None` when there
    /// is neither, or when the picture is not of the camera's size.
    pub fn place(&mut self, memory: &Remembered, look: &Look, starts: &[Pose2]) -> Option<Placed> {
        if !self.fits(look) || memory.is_empty() {
            return None;
        }
        self.score_survey(look);
        let mut from = starts.to_vec();
        from.extend(self.best_of_survey());
        let compared = self.compared(memory, look, from);
        let mut refined: Vec<Placed> = compared
            .iter()
            .take(self.config.refined.max(1))
            .map(|(_, pose)| self.refine(memory, look, *pose))
            .collect();
        refined.sort_by(|a, b| a.error.total_cmp(&b.error));
        let mut best = *refined.first()?;
        let others = refined.iter().map(|p| (p.error, p.pose)).chain(compared);
        let elsewhere = others.filter(|(_, pose)| !same_place(*pose, best.pose)).map(|(error, _)| error);
        best.elsewhere = elsewhere.min_by(f64::total_cmp);
        best.distinct = self.distinct(best.pose);
        Some(best)
    }

    /// As [`Self::place`], near the one of these poses that explains the picture best, and without a word on how distinct
    /// it is (0).
    pub fn place_near(&mut self, memory: &Remembered, look: &Look, starts: &[Pose2]) -> Option<Placed> {
        if !self.fits(look) || memory.is_empty() {
            return None;
        }
        let start = self.compared(memory, look, starts.to_vec()).first()?.1;
        Some(self.refine(memory, look, start))
    }

    /// The poses with the errors there, the least first.
    fn compared(&mut self, memory: &Remembered, look: &Look, poses: Vec<Pose2>) -> Vec<(f64, Pose2)> {
        let mut out: Vec<(f64, Pose2)> =
            poses.into_iter().map(|pose| (self.compare(memory, look, pose).0, pose)).collect();
        out.sort_by(|a, b| a.0.total_cmp(&b.0));
        out
    }

    /// How much of a picture is not explained by what would be seen from a pose (0..1), and how much of it is covered.
    pub fn error_at(&mut self, memory: &Remembered, look: &Look, pose: Pose2) -> Option<(f64, f64)> {
        self.fits(look).then(|| self.compare(memory, look, pose))
    }

    fn fits(&self, look: &Look) -> bool {
        (look.width as u32, look.height as u32) == self.camera.size()
    }

    /// The error of each surveyed place and heading, by cells.
    fn score_survey(&mut self, look: &Look) {
        let (half, unseen) = (self.config.half.powi(2), self.config.unseen);
        let all: f32 = look.cells.iter().map(|c| c.1).sum::<f32>().max(1e-6);
        self.scores.clear();
        for panorama in &self.panoramas {
            for heading in 0..HEADINGS {
                let mut sum = 0.0;
                for ((mean, weight), (row, column)) in look.cells.iter().zip(&self.cells) {
                    let column = (column + heading) % HEADINGS;
                    let [r, g, b, seen] = panorama.cells[row * HEADINGS + column];
                    let off = |a: f32, b: u8| (a - f32::from(b) / 255.0).powi(2);
                    let e = (off(mean[0], r) + off(mean[1], g) + off(mean[2], b)) / 3.0;
                    sum += weight * if seen > 0 { e / (e + half) } else { unseen };
                }
                self.scores.push(sum / all);
            }
        }
    }

    /// Base pose of a surveyed place and heading.
    fn surveyed(&self, index: usize) -> Pose2 {
        let [x, y] = self.panoramas[index / HEADINGS].at;
        let yaw = wrap_angle(f64::from(CELL_RAD) * (index % HEADINGS) as f64);
        // The camera may sit before the base's origin.
        let (s, c) = yaw.sin_cos();
        let t = self.base_from_camera.translation.vector;
        Pose2::new(x - c * t.x + s * t.y, y - s * t.x - c * t.y, yaw)
    }

    /// The surveyed poses that explain the picture best, no two of one place.
    fn best_of_survey(&self) -> Vec<Pose2> {
        let mut order: Vec<usize> = (0..self.scores.len()).collect();
        let some = (8 * self.config.starts.max(1)).min(order.len());
        if some == 0 {
            return Vec::new();
        }
        if some < order.len() {
            order.select_nth_unstable_by(some, |a, b| self.scores[*a].total_cmp(&self.scores[*b]));
            order.truncate(some);
        }
        order.sort_by(|a, b| self.scores[*a].total_cmp(&self.scores[*b]).then(a.cmp(b)));
        let mut out: Vec<Pose2> = Vec::new();
        for pose in order.into_iter().map(|i| self.surveyed(i)) {
            if out.len() < self.config.starts && !out.iter().any(|p| same_place(*p, pose)) {
                out.push(pose);
            }
        }
        out
    }

    /// See [`Placed::distinct`].
    fn distinct(&self, pose: Pose2) -> f64 {
        let mut all = self.scores.clone();
        if all.is_empty() {
            return 0.0;
        }
        let near = (0..all.len()).filter(|i| same_place(self.surveyed(*i), pose));
        let near = near.map(|i| self.scores[i]).fold(f32::INFINITY, f32::min);
        let middle = all.len() / 2;
        let median = *all.select_nth_unstable_by(middle, f32::total_cmp).1;
        (1.0 - f64::from(near.min(1.0) / median.max(1e-6))).clamp(-1.0, 1.0)
    }

    /// Error and cover of a picture at a pose; what was carried stays in the carrier, its smoothed colours in `smoothed`.
    fn compare(&mut self, memory: &Remembered, look: &Look, pose: Pose2) -> (f64, f64) {
        let map_from_camera = isometry(pose) * self.base_from_camera;
        let carried = self.carrier.carry(memory, &self.camera, &map_from_camera);
        carried.fill();
        let ones = &look.weight;
        let (width, height) = (carried.width, carried.height);
        // The same pixels are left out on both sides, so that both means are of the same.
        smooth(&carried.rgb, ones, width, height, &mut self.smoothed);
        let (half, unseen) = (self.config.half.powi(2), self.config.unseen);
        let (mut sum, mut covered, mut all) = (0.0f32, 0.0f32, 1e-6f32);
        for (i, trust) in carried.trust.iter().enumerate() {
            let weight = look.weight[i];
            let e = difference(look.rgb[i], self.smoothed[i]);
            sum += weight * (trust * e / (e + half) + (1.0 - trust) * unseen);
            covered += weight * trust;
            all += weight;
        }
        (f64::from(sum / all), f64::from(covered / all))
    }

    /// Gauss-Newton from a pose; the best pose on the way.
    fn refine(&mut self, memory: &Remembered, look: &Look, start: Pose2) -> Placed {
        let mut best = Placed {
            pose: start,
            covariance: Matrix3::identity(),
            error: f64::INFINITY,
            covered: 0.0,
            distinct: 0.0,
            elsewhere: None,
        };
        let mut pose = start;
        let mut last: Vector3<f64> = Vector3::zeros();
        for _ in 0..=self.config.rounds {
            let (error, covered) = self.compare(memory, look, pose);
            if error < best.error {
                let (step, covariance) = self.step(look);
                best = Placed { pose, covariance, error, covered, ..best };
                last = step;
            } else {
                // Too far: half the way back.
                last *= 0.4;
            }
            if last.xy().norm() < 2e-3 && last.z.abs() < 2e-3 {
                break;
            }
            pose = best.pose.compose(Pose2::new(last.x, last.y, last.z));
        }
        best
    }

    /// The motion of the base (its own axes) that explains the picture better, by what was carried last, and the covariance
    /// of the pose by the curvature there.
    fn step(&self, look: &Look) -> (Vector3<f64>, Matrix3<f64>) {
        let carried = self.carrier.carried();
        let (focal, centre) = (self.camera.focal(), self.camera.centre());
        let camera_from_base = self.base_from_camera.inverse();
        let half = f64::from(self.config.half).powi(2);
        let mut delta: Vector3<f64> = Vector3::zeros();
        let mut covariance = Matrix3::identity();
        for _ in 0..4 {
            let (mut h, mut g): (Matrix3<f64>, Vector3<f64>) = (Matrix3::zeros(), Vector3::zeros());
            let (mut squares, mut weights) = (0.0, 0.0);
            let turn = nalgebra::Rotation3::from_axis_angle(&Vector3::z_axis(), -delta.z);
            for (i, trust) in carried.trust.iter().enumerate().filter(|(_, t)| **t > 0.05) {
                let z = f64::from(carried.depth_m[i]);
                let (x, y) = ((i % carried.width) as f64, (i / carried.width) as f64);
                let seen = Point3::new((x - centre.x) / focal.0 * z, (y - centre.y) / focal.1 * z, z);
                let before: Point3<f64> = self.base_from_camera * seen;
                let after: Point3<f64> = turn * (before - Vector3::new(delta.x, delta.y, 0.0));
                let q: Point3<f64> = camera_from_base * after;
                if q.z < 0.05 {
                    continue;
                }
                let (u, v) = (focal.0 * q.x / q.z + centre.x, focal.1 * q.y / q.z + centre.y);
                let Some(at) = look.between(u as f32, v as f32) else { continue };
                let e = f64::from(difference(at.colour, self.smoothed[i]));
                // The slope of e / (e + half), less its factor 1 / half: 1 where the pixel is explained.
                let k = f64::from(trust * at.weight) * (half / (e + half)).powi(2);
                // How the pixel moves with the base: forward, left, turn.
                let moved = [
                    Vector3::new(-1.0, 0.0, 0.0),
                    Vector3::new(0.0, -1.0, 0.0),
                    Vector3::new(after.y, -after.x, 0.0),
                ]
                .map(|d| camera_from_base.rotation * d);
                let pixel = moved.map(|d| {
                    [focal.0 * (d.x - d.z * q.x / q.z) / q.z, focal.1 * (d.y - d.z * q.y / q.z) / q.z]
                });
                for c in 0..3 {
                    let slope = [f64::from(at.slope[0][c]), f64::from(at.slope[1][c])];
                    let j = Vector3::from(pixel.map(|[du, dv]| slope[0] * du + slope[1] * dv));
                    let r = f64::from(at.colour[c] - self.smoothed[i][c]);
                    h += k * j * j.transpose();
                    g += k * r * j;
                }
                squares += k * e;
                weights += k;
            }
            let damped = h + Matrix3::from_diagonal(&(h.diagonal() * 1e-2 + Vector3::repeat(1e-6)));
            let Some(inverse) = damped.try_inverse() else { break };
            let step = -(inverse * g);
            delta += step;
            delta.x = delta.x.clamp(-0.4, 0.4);
            delta.y = delta.y.clamp(-0.4, 0.4);
            delta.z = delta.z.clamp(-0.25, 0.25);
            covariance = inverse * (squares / weights.max(1e-9));
            if step.xy().norm() < 1e-3 && step.z.abs() < 1e-3 {
                break;
            }
        }
        (delta, covariance)
    }
}

/// Mean square of the channels' differences.
fn difference(a: [f32; 3], b: [f32; 3]) -> f32 {
    ((a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2) + (a[2] - b[2]).powi(2)) / 3.0
}

/// The view all around from a place at a height (metres); `None` inside a thing, or where hardly anything is seen.
fn panorama(squares: &[([f32; 3], [f32; 3], f32)], at: [f64; 2], height: f64) -> Option<Panorama> {
    #[derive(Clone, Copy, Default)]
    struct Cell {
        colour: [f32; 3],
        weight: f32,
        near: f32,
    }
    let from = [at[0] as f32, at[1] as f32, height as f32];
    let mut cells = vec![Cell { near: f32::INFINITY, ..Cell::default() }; ROWS * HEADINGS];
    for (place, colour, side) in squares {
        let d: [f32; 3] = std::array::from_fn(|k| place[k] - from[k]);
        let flat = (d[0] * d[0] + d[1] * d[1]).sqrt();
        let far = (flat * flat + d[2] * d[2]).sqrt().max(1e-3);
        let around = angle(d[1], d[0]) / CELL_RAD;
        let up = (angle(d[2], flat) + std::f32::consts::FRAC_PI_2) / CELL_RAD;
        let half = (0.5 * side / far / CELL_RAD).clamp(0.2, 2.0);
        let wide = (half * far / flat.max(0.05 * far)).min(6.0);
        // A cell that is barely touched is not hit.
        let (half, wide) = ((half - 0.3).max(0.0), (wide - 0.3).max(0.0));
        let rows = ((up - half).max(0.0) as usize)..=((up + half) as usize);
        let columns = ((around - wide).round() as isize)..=((around + wide).round() as isize);
        for row in rows.filter(|r| *r < ROWS) {
            for column in columns.clone() {
                let cell = &mut cells[row * HEADINGS + column.rem_euclid(HEADINGS as isize) as usize];
                if far < 0.85 * cell.near {
                    *cell = Cell { near: far, ..Cell::default() };
                } else if far > 1.15 * cell.near {
                    continue;
                }
                cell.near = cell.near.min(far);
                (0..3).for_each(|c| cell.colour[c] += colour[c]);
                cell.weight += 1.0;
            }
        }
    }
    let seen = cells.iter().filter(|c| c.weight > 0.0).count();
    let close = cells.iter().filter(|c| c.near < 0.25).count();
    // Half of the sphere is never looked at by a level camera.
    if seen * 6 < cells.len() || close * 8 > seen {
        return None;
    }
    let byte = |v: f32| (v * 255.0).round().clamp(0.0, 255.0) as u8;
    let cells = cells
        .iter()
        .map(|c| {
            let [r, g, b] = c.colour.map(|v| byte(v / c.weight.max(1.0)));
            [r, g, b, if c.weight > 0.0 { 255 } else { 0 }]
        })
        .collect();
    Some(Panorama { at, cells })
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
