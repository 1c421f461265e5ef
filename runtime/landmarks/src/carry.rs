//! Remembered pictures carried into another view.
//!
//! A remembered picture with the depth of its pixels is a cloud of small coloured squares. [`Carrier::carry`] looks at the
//! squares of all remembered views from another camera: the nearest surface is seen, squares of it are blended, those of
//! views that were taken nearby count more, and every pixel says how far it is to be trusted. What no view ever saw stays
//! a hole ([`Carried::fill`] closes holes from their neighbours, for those who need a whole picture).
//!
//! Pure geometry: no network, no file, no clock. The squares of a [`Remembered`] are bounded, and a [`Carrier`] uses its
//! memory again.

use mindseye_base::picture::RgbImage;
use nalgebra::{Isometry3, Point3, Vector2, Vector3};

use crate::camera::Camera;

/// Why a view cannot be remembered.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CarryError {
    /// Picture, camera and depth are not of one size.
    #[error("carried view: {what} has {got} pixels, expected {expected}")]
    Size {
        /// Which.
        what: &'static str,
        /// Wanted.
        expected: usize,
        /// Got.
        got: usize,
    },
    /// There is no room for it.
    #[error("carried view: {got} pixels do not fit into the {left} that are left of {most}")]
    Full {
        /// Pixels of the view.
        got: usize,
        /// Pixels left.
        left: usize,
        /// Most pixels of all views.
        most: usize,
    },
    /// The pose is not one.
    #[error("carried view: the pose is not finite")]
    Pose,
}

/// One remembered pixel.
#[derive(Clone, Copy, Debug)]
struct Square {
    /// In the map (metres).
    at: [f32; 3],
    /// 0..1.
    colour: [f32; 3],
    /// Side (metres).
    side: f32,
    view: u16,
}

/// Where a view was taken.
#[derive(Clone, Copy, Debug)]
struct Viewpoint {
    /// Optical centre in the map (metres).
    at: Vector3<f64>,
    /// Direction of the optical axis.
    axis: Vector3<f64>,
    map_from_camera: Isometry3<f64>,
}

/// Remembered views as one cloud of squares.
#[derive(Clone, Debug)]
pub struct Remembered {
    squares: Vec<Square>,
    views: Vec<Viewpoint>,
    most: usize,
}

/// Surfaces nearer than this to a camera are not carried (metres).
const NEAR_M: f32 = 0.05;
/// Surfaces farther away are not believed (metres).
const FAR_M: f32 = 100.0;

impl Remembered {
    /// An empty memory for at most `most` pixels of all views together.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { squares: Vec::new(), views: Vec::new(), most }
    }

    /// Forgets all views; the memory stays allocated.
    pub fn clear(&mut self) {
        self.squares.clear();
        self.views.clear();
    }

    /// Remembers a picture: `depth_m` is planar (along the optical axis, metres), one value per pixel, rows from the top.
    /// Pixels whose depth is no positive number are left out.
    ///
    /// # Errors
    /// [`CarryError`]; nothing is remembered then.
    pub fn insert(
        &mut self,
        picture: &RgbImage,
        depth_m: &[f32],
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Result<(), CarryError> {
        let (width, height) = camera.size();
        let expected = width as usize * height as usize;
        for (what, got) in [("picture", picture.data.len() / 3), ("depth", depth_m.len())] {
            if got != expected {
                return Err(CarryError::Size { what, expected, got });
            }
        }
        let left = self.most - self.squares.len();
        if expected > left || self.views.len() > usize::from(u16::MAX) {
            return Err(CarryError::Full { got: expected, left, most: self.most });
        }
        let centre = map_from_camera.translation.vector;
        if !centre.iter().chain(map_from_camera.rotation.coords.iter()).all(|v| v.is_finite()) {
            return Err(CarryError::Pose);
        }
        let view = self.views.len() as u16;
        let axis = map_from_camera.rotation * Vector3::z();
        self.views.push(Viewpoint { at: centre, axis, map_from_camera: *map_from_camera });
        let focal = camera.focal_mean() as f32;
        let pixels = picture.data.chunks_exact(3).zip(depth_m).enumerate();
        for (i, (rgb, depth)) in pixels.filter(|(_, (_, d))| (NEAR_M..FAR_M).contains(*d)) {
            let pixel = Vector2::new((i % width as usize) as f64, (i / width as usize) as f64);
            let Some(ray) = camera.ray(pixel) else { continue };
            let z = f64::from(*depth);
            let p = map_from_camera * Point3::new(ray.x * z, ray.y * z, z);
            self.squares.push(Square {
                at: [p.x as f32, p.y as f32, p.z as f32],
                colour: std::array::from_fn(|c| f32::from(rgb[c]) / 255.0),
                side: depth / focal,
                view,
            });
        }
        Ok(())
    }

    /// Views remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.views.len()
    }

    /// True when no view is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.views.is_empty()
    }

    /// Where the views were taken.
    pub fn poses(&self) -> impl Iterator<Item = &Isometry3<f64>> {
        self.views.iter().map(|v| &v.map_from_camera)
    }

    /// Bytes taken.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.squares.capacity() * size_of::<Square>() + self.views.capacity() * size_of::<Viewpoint>()
    }

    /// Every `step`-th square: place in the map (metres), colour (0..1), side (metres; the same share of the surface is
    /// covered).
    pub(crate) fn thinned(&self, step: usize) -> impl Iterator<Item = ([f32; 3], [f32; 3], f32)> {
        let wider = (step as f32).sqrt();
        self.squares.iter().step_by(step.max(1)).map(move |s| (s.at, s.colour, s.side * wider))
    }

    /// Number of squares.
    pub(crate) fn squares(&self) -> usize {
        self.squares.len()
    }
}

/// What a camera would see of remembered views. Values are by pixel, rows from the top.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Carried {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Colour, 0..1; 0 in holes until they are filled.
    pub rgb: Vec<[f32; 3]>,
    /// How far the pixel is to be trusted, 0 (a hole) to 1: how much of it is covered, by views that agree and saw it at
    /// least as closely.
    pub trust: Vec<f32>,
    /// Planar depth (metres); 0 in holes until they are filled.
    pub depth_m: Vec<f32>,
}

impl Carried {
    /// Mean trust, 0..1.
    #[must_use]
    pub fn covered(&self) -> f64 {
        self.trust.iter().map(|t| f64::from(*t)).sum::<f64>() / self.trust.len().max(1) as f64
    }

    /// The picture.
    #[must_use]
    pub fn picture(&self) -> RgbImage {
        let byte = |v: f32| (v * 255.0).round().clamp(0.0, 255.0) as u8;
        let data = self.rgb.iter().flat_map(|c| c.map(byte)).collect();
        RgbImage { width: self.width, height: self.height, data }
    }

    /// The same view in `by` times fewer pixels each way, the mean of each block; what is left over at the right and at the
    /// bottom is left out.
    #[must_use]
    pub fn reduced(&self, by: usize) -> Self {
        let by = by.max(1);
        let (width, height) = (self.width / by, self.height / by);
        let share = 1.0 / (by * by) as f32;
        let n = width * height;
        let mut out =
            Self { width, height, rgb: vec![[0.0; 3]; n], trust: vec![0.0; n], depth_m: vec![0.0; n] };
        for (y, x) in (0..height * by).flat_map(|y| (0..width * by).map(move |x| (y, x))) {
            let (from, to) = (y * self.width + x, y / by * width + x / by);
            (0..3).for_each(|c| out.rgb[to][c] += share * self.rgb[from][c]);
            out.trust[to] += share * self.trust[from];
            out.depth_m[to] += share * self.depth_m[from];
        }
        out
    }

    /// Closes holes from their edges inwards: each pixel of a hole becomes the mean of those of its eight neighbours that
    /// are known. Trust stays what it is. A picture that is all hole becomes grey.
    pub fn fill(&mut self) {
        let (w, h) = (self.width, self.height);
        let mut known: Vec<bool> = self.trust.iter().map(|t| *t > 0.0).collect();
        if !known.iter().any(|k| *k) {
            self.rgb.fill([0.5; 3]);
            return;
        }
        let mut ring: Vec<(usize, [f32; 3], f32)> = Vec::new();
        while known.iter().any(|k| !*k) {
            ring.clear();
            for at in (0..w * h).filter(|at| !known[*at]) {
                let (x, y) = (at % w, at / w);
                let (mut sum, mut depth, mut n) = ([0.0f32; 3], 0.0, 0.0);
                for ny in y.saturating_sub(1)..(y + 2).min(h) {
                    for nx in x.saturating_sub(1)..(x + 2).min(w) {
                        let from = ny * w + nx;
                        if known[from] {
                            (0..3).for_each(|c| sum[c] += self.rgb[from][c]);
                            depth += self.depth_m[from];
                            n += 1.0;
                        }
                    }
                }
                if n > 0.0 {
                    ring.push((at, sum.map(|v| v / n), depth / n));
                }
            }
            for (at, colour, depth) in &ring {
                (self.rgb[*at], self.depth_m[*at], known[*at]) = (*colour, *depth, true);
            }
        }
    }
}

/// Settings of [`Carrier`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CarryConfig {
    /// Surfaces up to this much behind the nearest one, as a share of its distance, are the same surface: what depth is
    /// off by.
    pub same_share: f32,
    /// The same, as a length (metres).
    pub same_m: f32,
    /// Smallest side of a square (pixels of the target).
    pub side_min_px: f32,
    /// Largest side (pixels of the target): what was seen from afar only is left with holes when seen from close by.
    pub side_max_px: f32,
    /// Views this far away (metres; half a radian of turn counts as much as half a metre) count half.
    pub near_m: f64,
    /// How sharply nearer views are preferred: the power of the falling weight.
    pub preference: i32,
    /// Standard deviation of colours that blended views may have, 0..1; beyond it they are trusted less.
    pub agree: f32,
}

impl Default for CarryConfig {
    fn default() -> Self {
        Self {
            same_share: 0.06,
            same_m: 0.05,
            side_min_px: 1.0,
            side_max_px: 6.0,
            near_m: 0.25,
            preference: 2,
            agree: 0.15,
        }
    }
}

/// A square as the target camera sees it.
#[derive(Clone, Copy, Debug)]
struct Splat {
    /// Centre (pixels).
    u: f32,
    v: f32,
    half: f32,
    z: f32,
    square: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    colour: [f32; 3],
    square: [f32; 3],
    depth: f32,
    weight: f32,
    area: f32,
    wide: f32,
}

/// Carries remembered views into cameras, with memory that is used again.
#[derive(Clone, Debug, Default)]
pub struct Carrier {
    /// Settings.
    pub config: CarryConfig,
    splats: Vec<Splat>,
    weights: Vec<f32>,
    nearest: Vec<f32>,
    sums: Vec<Sum>,
    out: Carried,
}

/// The pixels of one axis that an interval of it touches.
fn pixels(centre: f32, half: f32, count: usize) -> std::ops::Range<usize> {
    // Pixel i covers [i - 0.5, i + 0.5).
    let first = (centre - half + 0.5).floor().max(0.0) as usize;
    let end = (centre + half + 0.5).ceil().clamp(0.0, count as f32) as usize;
    first..end
}

/// How much of pixel `i` an interval covers, 0..1.
fn overlap(i: usize, centre: f32, half: f32) -> f32 {
    let i = i as f32;
    ((centre + half).min(i + 0.5) - (centre - half).max(i - 0.5)).max(0.0)
}

impl Carrier {
    /// With these settings.
    #[must_use]
    pub fn new(config: CarryConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// What `camera` would see of the remembered views from a pose. The camera's lens is left out: the result is a
    /// rectified picture of its size and focal length.
    pub fn carry(
        &mut self,
        memory: &Remembered,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> &mut Carried {
        let (width, height) = camera.size();
        let (w, h) = (width as usize, height as usize);
        self.weigh(memory, map_from_camera);
        self.nearest.clear();
        self.nearest.resize(w * h, f32::INFINITY);
        self.project(memory, camera, map_from_camera);
        self.blend(memory, (w, h));
        self.finish((w, h));
        &mut self.out
    }

    /// What was carried last.
    #[must_use]
    pub fn carried(&self) -> &Carried {
        &self.out
    }

    /// How much each view counts.
    fn weigh(&mut self, memory: &Remembered, map_from_camera: &Isometry3<f64>) {
        let (at, axis) = (map_from_camera.translation.vector, map_from_camera.rotation * Vector3::z());
        self.weights.clear();
        self.weights.extend(memory.views.iter().map(|view| {
            let turn = view.axis.dot(&axis).clamp(-1.0, 1.0).acos();
            let far = (view.at - at).norm().hypot(turn) / self.config.near_m;
            (1.0 / (1.0 + far * far)).powi(self.config.preference) as f32
        }));
    }

    /// Where each square is seen, and the nearest surface of each pixel.
    fn project(&mut self, memory: &Remembered, camera: &Camera, map_from_camera: &Isometry3<f64>) {
        let (w, h) = (camera.size().0 as usize, camera.size().1 as usize);
        let camera_from_map = map_from_camera.inverse();
        let r = camera_from_map.rotation.to_rotation_matrix();
        let r: [[f32; 3]; 3] = std::array::from_fn(|i| std::array::from_fn(|j| r[(i, j)] as f32));
        let t: [f32; 3] = std::array::from_fn(|i| camera_from_map.translation.vector[i] as f32);
        let (fx, fy) = (camera.focal().0 as f32, camera.focal().1 as f32);
        let centre = camera.centre();
        let (cx, cy) = (centre.x as f32, centre.y as f32);
        let focal = 0.5 * (fx + fy);
        let (right, bottom) = (w as f32 - 0.5, h as f32 - 0.5);
        self.splats.clear();
        for (k, s) in memory.squares.iter().enumerate() {
            let [x, y, z]: [f32; 3] =
                std::array::from_fn(|i| r[i][0] * s.at[0] + r[i][1] * s.at[1] + r[i][2] * s.at[2] + t[i]);
            if z < NEAR_M {
                continue;
            }
            let (u, v) = (fx * x / z + cx, fy * y / z + cy);
            let side = (s.side * focal / z).clamp(self.config.side_min_px, self.config.side_max_px);
            let half = 0.5 * side;
            if u + half < -0.5 || v + half < -0.5 || u - half >= right || v - half >= bottom {
                continue;
            }
            self.splats.push(Splat { u, v, half, z, square: k as u32 });
            // The surface hides what is behind it in the pixels of which it covers the most.
            for py in pixels(v, half, h) {
                for px in pixels(u, half, w) {
                    let covers = overlap(px, u, half) * overlap(py, v, half);
                    let nearest = &mut self.nearest[py * w + px];
                    if covers > 0.3 && z < *nearest {
                        *nearest = z;
                    }
                }
            }
        }
    }

    /// Adds up the squares of each pixel's nearest surface.
    fn blend(&mut self, memory: &Remembered, (w, h): (usize, usize)) {
        self.sums.clear();
        self.sums.resize(w * h, Sum::default());
        for splat in &self.splats {
            let square = &memory.squares[splat.square as usize];
            let weight = self.weights[usize::from(square.view)];
            for py in pixels(splat.v, splat.half, h) {
                let row = overlap(py, splat.v, splat.half);
                for px in pixels(splat.u, splat.half, w) {
                    let at = py * w + px;
                    let same = self.nearest[at] * (1.0 + self.config.same_share) + self.config.same_m;
                    let area = row * overlap(px, splat.u, splat.half);
                    if splat.z > same || area <= 0.0 {
                        continue;
                    }
                    let sum = &mut self.sums[at];
                    let k = weight * area;
                    for c in 0..3 {
                        sum.colour[c] += k * square.colour[c];
                        sum.square[c] += k * square.colour[c] * square.colour[c];
                    }
                    sum.depth += k * splat.z;
                    sum.weight += k;
                    sum.area += area;
                    sum.wide += k * splat.half;
                }
            }
        }
    }

    fn finish(&mut self, (w, h): (usize, usize)) {
        let out = &mut self.out;
        (out.width, out.height) = (w, h);
        out.rgb.clear();
        out.trust.clear();
        out.depth_m.clear();
        for sum in &self.sums {
            if sum.weight <= 1e-12 || sum.area < 0.05 {
                out.rgb.push([0.0; 3]);
                out.trust.push(0.0);
                out.depth_m.push(0.0);
                continue;
            }
            let mean = sum.colour.map(|v| v / sum.weight);
            let spread: f32 =
                (0..3).map(|c| (sum.square[c] / sum.weight - mean[c] * mean[c]).max(0.0)).sum::<f32>() / 3.0;
            let agree = 1.0 / (1.0 + spread / self.config.agree.powi(2));
            let wide = (2.0 * sum.wide / sum.weight).max(1.0);
            out.rgb.push(mean);
            out.trust.push(sum.area.min(1.0) * agree / wide.sqrt());
            out.depth_m.push(sum.depth / sum.weight);
        }
    }
}

#[cfg(test)]
#[path = "carry_tests.rs"]
pub(crate) mod tests;
