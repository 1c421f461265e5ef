//! Spatial distance: do the surfaces in imagined pictures stand where the house has surfaces?
//!
//! `SD = max_i mean_{p in P_i} min_{q in Q} |p - q|`, metres, over the imagined pictures `i` of a drive (Video4Spatial
//! equation 3; the given first picture is left out). `Q` is the true cloud. An imagined picture has neither depth
//! nor pose, so its points `P_i` are obtained in two steps, in the paper's order:
//! 1. **Registration**, as the paper does with anchor frames: the path on which renders of the *true* house are most
//!    like the pictures. Candidates are all free places and headings on a grid; the best path through them (dynamic
//!    programming from the known start, jumps cost up to a bound) is then refined picture by picture. The model's own
//!    pose heads have no say.
//! 2. **Depth** of each pixel by the [`Examiner`], from the picture alone, which knows nothing of the true house; pixels
//!    are carried to the map by that depth and pose.
//!
//! So a true drive has the depth error of the examiner as its SD (true pictures are registered within a few centimetres),
//! and pictures of another room cannot hide: at the best place for them their walls and things still stand where this
//! house has air, or far behind its walls. Both are reported with every evaluation as controls: what true drives reach
//! is the ceiling of IF(SD < d).

use mindseye::image::RgbImage;
use mindseye_train::eager::Eager;
use mindseye_world::{Camera, Frame, House, Pose2, ROBOT_RADIUS_M, RenderOptions, render_with, wrap_angle};

use super::examiner::Examiner;

/// Points in cubes, for the distance to the nearest.
struct Cloud {
    origin: [f32; 3],
    size: [usize; 3],
    /// First point of each cube, and one more.
    starts: Vec<u32>,
    points: Vec<[f32; 3]>,
}

const CUBE_M: f32 = 0.15;
/// Points closer than this are one.
const GRAIN_M: f32 = 0.03;

impl Cloud {
    /// All surfaces that a robot can see in the house: depth pictures from all over the floor.
    fn of(house: &House, camera: &Camera) -> Self {
        let eye = Camera { width: 96, height: 96 * camera.height / camera.width.max(1), ..*camera };
        let options = RenderOptions { rgb: false, depth: true, ids: false, ..RenderOptions::default() };
        let mut frame = Frame::new();
        let mut seen = std::collections::HashSet::new();
        let mut all: Vec<[f32; 3]> = Vec::new();
        for (x, y) in places(house, 1.0) {
            for k in 0..6 {
                let pose = Pose2::unwrapped(x, y, f64::from(k) * std::f64::consts::FRAC_PI_3);
                render_with(house, pose, &eye, options, &mut frame);
                carry(&eye, pose, &frame.depth, |p| {
                    if seen.insert(p.map(|v| (v / GRAIN_M).floor() as i32)) {
                        all.push(p);
                    }
                });
            }
        }
        let corner = |f: fn(f32, f32) -> f32, start: f32| -> [f32; 3] {
            std::array::from_fn(|k| all.iter().map(|p| p[k]).fold(start, f))
        };
        let (origin, end) = (corner(f32::min, f32::INFINITY), corner(f32::max, f32::NEG_INFINITY));
        if all.is_empty() {
            return Self { origin: [0.0; 3], size: [0; 3], starts: vec![0], points: all };
        }
        let size: [usize; 3] = std::array::from_fn(|k| ((end[k] - origin[k]) / CUBE_M) as usize + 1);
        let mut out =
            Self { origin, size, starts: vec![0; size.iter().product::<usize>() + 1], points: Vec::new() };
        let cube = |p: &[f32; 3]| {
            let c = out.cell(*p).map(|c| c as usize);
            (c[2] * size[1] + c[1]) * size[0] + c[0]
        };
        all.sort_by_cached_key(cube);
        let cubes: Vec<usize> = all.iter().map(cube).collect();
        let mut at = 0;
        for c in 0..out.starts.len() {
            while at < cubes.len() && cubes[at] < c {
                at += 1;
            }
            out.starts[c] = at as u32;
        }
        out.points = all;
        out
    }

    fn cell(&self, p: [f32; 3]) -> [i32; 3] {
        std::array::from_fn(|k| {
            (((p[k] - self.origin[k]) / CUBE_M).floor() as i32).clamp(0, self.size[k] as i32 - 1)
        })
    }

    /// Distance of a point to the nearest of the cloud (m).
    fn distance(&self, p: [f32; 3]) -> f32 {
        let centre = self.cell(p);
        let mut best = f32::INFINITY;
        let widest = self.size.iter().copied().max().unwrap_or(0) as i32;
        for ring in 0..=widest {
            // Cubes of ring r are at least (r - 1) cubes away (one less: the point is anywhere in its own).
            if (ring - 1).max(0) as f32 * CUBE_M > best.sqrt() {
                break;
            }
            let range =
                |k: usize| (centre[k] - ring).max(0)..=(centre[k] + ring).min(self.size[k] as i32 - 1);
            for z in range(2) {
                for y in range(1) {
                    let inner = (z - centre[2]).abs() < ring && (y - centre[1]).abs() < ring;
                    for x in range(0) {
                        if inner && (x - centre[0]).abs() < ring {
                            continue;
                        }
                        let c = (z as usize * self.size[1] + y as usize) * self.size[0] + x as usize;
                        for q in &self.points[self.starts[c] as usize..self.starts[c + 1] as usize] {
                            let d: f32 = (0..3).map(|k| (p[k] - q[k]) * (p[k] - q[k])).sum();
                            best = best.min(d);
                        }
                    }
                }
            }
        }
        best.sqrt()
    }
}

/// Free places on a square grid of this spacing (m).
fn places(house: &House, spacing: f64) -> Vec<(f64, f64)> {
    let b = &house.bounds;
    let (nx, ny) = ((b.width() / spacing).ceil() as usize, (b.depth() / spacing).ceil() as usize);
    let mut out = Vec::new();
    for j in 0..ny {
        for i in 0..nx {
            let x = b.x0 + b.width() * (i as f64 + 0.5) / nx as f64;
            let y = b.y0 + b.depth() * (j as f64 + 0.5) / ny as f64;
            if house.clearance(x, y) >= ROBOT_RADIUS_M {
                out.push((x, y));
            }
        }
    }
    out
}

/// The map points (m) of a picture's pixel centres.
fn carry(camera: &Camera, pose: Pose2, depth: &[f32], mut f: impl FnMut([f32; 3])) {
    let (r, t) = camera.map_from_camera(pose);
    let focal = camera.focal_px();
    for (p, z) in depth.iter().enumerate() {
        let (px, py) = ((p % camera.width) as f64 + 0.5, (p / camera.width) as f64 + 0.5);
        let z = f64::from(*z);
        let v =
            [z * (px - camera.width as f64 * 0.5) / focal, z * (py - camera.height as f64 * 0.5) / focal, z];
        f(std::array::from_fn(|k| (t[k] + r[k][0] * v[0] + r[k][1] * v[1] + r[k][2] * v[2]) as f32));
    }
}

/// A picture reduced to the means of square cells, and which cells count.
struct Look {
    values: Vec<f32>,
    counts: Vec<bool>,
}

/// Grid views that each picture may be registered to.
const CANDIDATES: usize = 48;

/// What going from one pose to the next costs, in units of [`Look::difference`]: little for what a drive does between two
/// pictures, and never more than a bound, so that pictures that show another place are not held back.
fn jump(a: Pose2, b: Pose2) -> f32 {
    const EACH: f64 = 150.0;
    const MOST: f64 = 12.0;
    let (far, turn) = (a.distance(b) / 0.45, wrap_angle(a.yaw - b.yaw) / 25f64.to_radians());
    (EACH * (far * far + turn * turn).min(MOST)) as f32
}

/// Cells across a reduced picture.
const CELLS: usize = 12;

/// A house to register pictures in.
pub struct Space<'a> {
    house: &'a House,
    camera: Camera,
    cloud: Cloud,
    views: Vec<(Pose2, Vec<f32>)>,
    frame: Frame,
}

/// What came of one drive.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// Registered base pose of each picture, in the map.
    pub poses: Vec<Pose2>,
    /// Mean distance of each picture's points to the true cloud (m).
    pub per_picture: Vec<f64>,
    /// The largest of them: SD (m); NaN when there is none.
    pub sd: f64,
    /// Their mean (m); NaN when there is none.
    pub mean: f64,
}

impl Distance {
    /// SD and mean of the distances of the pictures.
    fn of(poses: Vec<Pose2>, per_picture: Vec<f64>) -> Self {
        let sd = per_picture.iter().copied().fold(f64::NAN, f64::max);
        let mean = per_picture.iter().sum::<f64>() / per_picture.len() as f64;
        Self { poses, per_picture, sd, mean }
    }
}

impl<'a> Space<'a> {
    /// Prepares a house: its cloud, and reduced views from all over it.
    #[must_use]
    pub fn new(house: &'a House, camera: &Camera) -> Self {
        let mut out = Self {
            house,
            camera: *camera,
            cloud: Cloud::of(house, camera),
            views: Vec::new(),
            frame: Frame::new(),
        };
        for (x, y) in places(house, 0.45) {
            for k in 0..24 {
                let pose = Pose2::unwrapped(x, y, wrap_angle(f64::from(k) * std::f64::consts::TAU / 24.0));
                let view = out.view(pose);
                out.views.push((pose, view));
            }
        }
        out
    }

    fn view(&mut self, pose: Pose2) -> Vec<f32> {
        render_with(self.house, pose, &self.camera, RenderOptions::rgb_only(), &mut self.frame);
        reduce(&self.frame.rgb, self.camera.width, self.camera.height)
    }

    /// Registers the pictures of a drive that begins at `start`: for each the pose from which the house looks most like it,
    /// as far as a drive can go from one to the next. `outlines` are boxes whose outlines do not count.
    pub fn register(
        &mut self,
        pictures: &[&RgbImage],
        start: Option<Pose2>,
        outlines: &[Option<[f64; 4]>],
    ) -> Vec<Pose2> {
        let looks: Vec<Look> = pictures
            .iter()
            .enumerate()
            .map(|(i, p)| Look::of(p, outlines.get(i).copied().flatten()))
            .collect();
        // The best candidates of each picture, and what the cheapest path to each costs.
        let mut layers: Vec<Vec<(f32, Pose2, usize)>> = Vec::new();
        for look in &looks {
            let mut scored: Vec<(f32, Pose2)> =
                self.views.iter().map(|(pose, view)| (look.difference(view), *pose)).collect();
            let keep = CANDIDATES.min(scored.len());
            if keep == 0 {
                return vec![start.unwrap_or_default(); pictures.len()];
            }
            scored.select_nth_unstable_by(keep - 1, |a, b| a.0.total_cmp(&b.0));
            scored.truncate(keep);
            let layer = scored
                .into_iter()
                .map(|(look, pose)| {
                    let (way, from) = match layers.last() {
                        Some(before) => before
                            .iter()
                            .enumerate()
                            .map(|(k, (cost, p, _))| (cost + jump(*p, pose), k))
                            .min_by(|a, b| a.0.total_cmp(&b.0))
                            .unwrap_or_default(),
                        None => (start.map_or(0.0, |p| jump(p, pose)), 0),
                    };
                    (way + look, pose, from)
                })
                .collect();
            layers.push(layer);
        }
        let mut path = Vec::new();
        let mut at =
            layers.last().and_then(|l| (0..l.len()).min_by(|a, b| l[*a].0.total_cmp(&l[*b].0))).unwrap_or(0);
        for layer in layers.iter().rev() {
            path.push(layer[at].1);
            at = layer[at].2;
        }
        path.reverse();
        // Then finely, also from where the picture before was found.
        let mut out: Vec<Pose2> = Vec::new();
        for (i, look) in looks.iter().enumerate() {
            if i > 0 && pictures[i].data == pictures[i - 1].data && outlines.get(i) == outlines.get(i - 1) {
                out.push(out[i - 1]);
                continue;
            }
            let mut best = (f32::INFINITY, path[i]);
            for from in [Some(path[i]), out.last().copied().or(start)].into_iter().flatten() {
                let view = self.view(from);
                let found = self.refine(look, (look.difference(&view), from));
                if found.0 < best.0 {
                    best = found;
                }
            }
            out.push(best.1);
        }
        out
    }

    /// Pattern search: forward, sideways, turn, with steps that halve.
    fn refine(&mut self, look: &Look, start: (f32, Pose2)) -> (f32, Pose2) {
        let mut best = start;
        let (mut step, mut turn) = (0.2, 8f64.to_radians());
        for _ in 0..3 {
            for _ in 0..2 {
                let from = best.0;
                let moves = [
                    Pose2::unwrapped(0.0, 0.0, turn),
                    Pose2::unwrapped(0.0, 0.0, -turn),
                    Pose2::unwrapped(step, 0.0, 0.0),
                    Pose2::unwrapped(-step, 0.0, 0.0),
                    Pose2::unwrapped(0.0, step, 0.0),
                    Pose2::unwrapped(0.0, -step, 0.0),
                ];
                for by in moves {
                    let pose = best.1.compose(by);
                    if self.house.clearance(pose.x, pose.y) < 0.5 * ROBOT_RADIUS_M {
                        continue;
                    }
                    let view = self.view(pose);
                    let d = look.difference(&view);
                    if d < best.0 {
                        best = (d, pose);
                    }
                }
                if best.0 >= from {
                    break;
                }
            }
            step *= 0.5;
            turn *= 0.5;
        }
        best
    }

    /// The distance of a drive's pictures (the given first one not among them). The last `boxed` pictures carry a box
    /// with these edges; its outline does not count in the registration.
    pub fn distance(
        &mut self,
        examiner: &Examiner,
        eager: &mut Eager,
        pictures: &[RgbImage],
        start: Pose2,
        boxed: usize,
        outline: Option<[f64; 4]>,
    ) -> Distance {
        let all: Vec<&RgbImage> = pictures.iter().collect();
        let depths = examiner.depth(eager, &all);
        let outlines: Vec<_> =
            (0..pictures.len()).map(|i| outline.filter(|_| i + boxed >= pictures.len())).collect();
        let poses = self.register(&all, Some(start), &outlines);
        let per_picture = poses.iter().zip(&depths).map(|(p, d)| self.picture_distance(*p, d)).collect();
        Distance::of(poses, per_picture)
    }

    /// Mean distance of one picture's points at a pose (m).
    #[must_use]
    pub fn picture_distance(&self, pose: Pose2, depth: &[f32]) -> f64 {
        let (mut sum, mut n) = (0.0, 0.0);
        carry(&self.camera, pose, depth, |p| {
            sum += f64::from(self.cloud.distance(p));
            n += 1.0;
        });
        sum / n
    }
}

/// Means over square cells, `CELLS` across.
fn reduce(rgb: &[u8], width: usize, height: usize) -> Vec<f32> {
    let cell = (width / CELLS).max(1);
    let (nx, ny) = (width / cell, height / cell);
    let mut out = vec![0.0; nx * ny * 3];
    for y in 0..ny * cell {
        for x in 0..nx * cell {
            for c in 0..3 {
                out[(y / cell * nx + x / cell) * 3 + c] += f32::from(rgb[(y * width + x) * 3 + c]);
            }
        }
    }
    let k = 1.0 / (cell * cell) as f32;
    out.iter_mut().for_each(|v| *v *= k);
    out
}

impl Look {
    fn of(picture: &RgbImage, outline: Option<[f64; 4]>) -> Self {
        let values = reduce(&picture.data, picture.width, picture.height);
        let cell = (picture.width / CELLS).max(1);
        let (nx, ny) = (picture.width / cell, picture.height / cell);
        let mut counts = vec![true; nx * ny];
        if let Some(edges) = outline {
            let [x0, y0, x1, y1] = edges.map(|v| v.max(0.0) as usize);
            let (x1, y1) = (x1.saturating_sub(1).max(x0), y1.saturating_sub(1).max(y0));
            let mut drop = |x: usize, y: usize| {
                if x / cell < nx && y / cell < ny {
                    counts[y / cell * nx + x / cell] = false;
                }
            };
            for x in x0..=x1 {
                drop(x, y0);
                drop(x, y1);
            }
            for y in y0..=y1 {
                drop(x0, y);
                drop(x1, y);
            }
        }
        Self { values, counts }
    }

    fn difference(&self, view: &[f32]) -> f32 {
        let (mut sum, mut n) = (0.0, 0.0);
        for ((a, b), counts) in self.values.chunks_exact(3).zip(view.chunks_exact(3)).zip(&self.counts) {
            if *counts {
                sum += (a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2) + (a[2] - b[2]).powi(2);
                n += 1.0;
            }
        }
        if n > 0.0 { sum / n } else { f32::INFINITY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_world::{Difficulty, Rng, approach, random_pose};

    #[test]
    fn true_depth_lies_on_the_cloud_and_lifted_points_do_not() {
        let house = House::generate(3, &Difficulty::plain());
        let camera = Camera::new(24, 16);
        let space = Space::new(&house, &camera);
        let mut rng = Rng::new(3);
        let mut frame = Frame::new();
        for _ in 0..5 {
            let pose = random_pose(&house, &mut rng);
            render_with(&house, pose, &camera, RenderOptions::default(), &mut frame);
            let near = space.picture_distance(pose, &frame.depth);
            assert!(near < 0.06, "{near} m at {pose:?}");
            let half: Vec<f32> = frame.depth.iter().map(|d| 0.6 * d).collect();
            let far = space.picture_distance(pose, &half);
            assert!(far > 0.25, "{far} m at {pose:?}");
        }
    }

    #[test]
    fn the_largest_distance_of_a_picture_is_that_of_the_drive() {
        let d = Distance::of(vec![Pose2::default(); 3], vec![0.25, 1.5, 0.5]);
        assert_eq!((d.sd, d.mean), (1.5, 0.75));
        let none = Distance::of(Vec::new(), Vec::new());
        assert!(none.sd.is_nan() && none.mean.is_nan());
    }

    #[test]
    fn nearest_is_the_nearest() {
        let house = House::generate(5, &Difficulty::plain());
        let cloud = Cloud::of(&house, &Camera::new(24, 16));
        let mut rng = Rng::new(5);
        for _ in 0..200 {
            let p = [rng.range(-3.5, 3.5) as f32, rng.range(-3.5, 3.5) as f32, rng.range(-0.5, 3.0) as f32];
            let slow = cloud
                .points
                .iter()
                .map(|q| (0..3).map(|k| (p[k] - q[k]).powi(2)).sum::<f32>())
                .fold(f32::INFINITY, f32::min)
                .sqrt();
            let fast = cloud.distance(p);
            assert!((fast - slow).abs() < 1e-4, "{p:?}: {fast} instead of {slow}");
        }
    }

    #[test]
    fn views_are_registered_where_they_were_taken() {
        let house = House::generate(7, &Difficulty::plain());
        let camera = Camera::new(24, 16);
        let mut space = Space::new(&house, &camera);
        let mut rng = Rng::new(7);
        let mut frame = Frame::new();
        let mut near = 0;
        for _ in 0..8 {
            let pose = random_pose(&house, &mut rng);
            render_with(&house, pose, &camera, RenderOptions::rgb_only(), &mut frame);
            let picture = RgbImage { width: 24, height: 16, data: frame.rgb.clone() };
            let found = space.register(&[&picture], None, &[])[0];
            let (off, turn) = (found.distance(pose), wrap_angle(found.yaw - pose.yaw).abs().to_degrees());
            near += usize::from(off < 0.3 && turn < 6.0);
        }
        // A single view of a bare wall fits in more than one place; a drive has more to go by.
        assert!(near >= 5, "{near} of 8 within 0.3 m and 6 degrees");
        let drive = approach(&house, random_pose(&house, &mut rng), 0, 13).poses;
        let pictures: Vec<RgbImage> = drive
            .iter()
            .map(|p| {
                render_with(&house, *p, &camera, RenderOptions::rgb_only(), &mut frame);
                RgbImage { width: 24, height: 16, data: frame.rgb.clone() }
            })
            .collect();
        let found = space.register(&pictures.iter().collect::<Vec<_>>(), Some(drive[0]), &[]);
        let close = found.iter().zip(&drive).filter(|(a, b)| a.distance(**b) < 0.3).count();
        assert!(close >= 11, "{close} of 13 within 0.3 m");
    }
}
