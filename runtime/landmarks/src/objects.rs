//! Things in the map, from boxes that a detector draws in frames whose poses are known.
//!
//! The middle of a box is a bearing. Bearings of one class that meet in a point, from at least three frames and with boxes
//! that say one size, are a thing; later boxes are added to the thing that they fit. Several things of one class stay apart
//! by place and size. A thing outlives the frames that it was made from; one that is not seen again where it should be is
//! forgotten.

use std::collections::VecDeque;

use nalgebra::{Isometry3, Matrix2, Matrix2x3, Matrix3, Point3, Vector2};

use crate::camera::Camera;
use crate::triangulate::{Sight, residual, triangulate};

/// A box in a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeenBox {
    /// Class of what is in it.
    pub class: usize,
    /// How sure the detector is, 0..1.
    pub score: f64,
    /// Left, top, right and bottom edge (pixels); 0 is the edge of the first pixel.
    pub area: [f64; 4],
}

/// Settings of an [`ObjectMap`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ObjectConfig {
    /// Things at most; the one seen least makes room.
    pub objects_max: usize,
    /// Bearings of no thing yet that are kept, of all classes together; the oldest makes room.
    pub bearings_max: usize,
    /// Fewest frames that make a thing.
    pub views_min: usize,
    /// Standard deviation of a box's middle as a bearing of the thing's middle, as a share of the box's longer side.
    pub middle_sigma: f64,
    /// Smallest such standard deviation (pixels).
    pub middle_sigma_min_px: f64,
    /// Bearings from places that are nearer to each other than this (metres) count once.
    pub baseline_min_m: f64,
    /// Smallest angle between two bearings of a new thing (radians).
    pub parallax_min_rad: f64,
    /// Boxes of one thing say sizes that differ by at most this factor.
    pub size_factor_max: f64,
    /// Largest standard deviation of a thing's place along its worst axis (metres).
    pub sigma_max_m: f64,
    /// Things are nearer to the camera than this (metres).
    pub distance_max_m: f64,
    /// Share of a thing's size by which its middle may differ from the middles of its boxes: a bearing from one side is not
    /// the bearing from the other.
    pub middle_share: f64,
}

impl Default for ObjectConfig {
    fn default() -> Self {
        Self {
            objects_max: 256,
            bearings_max: 512,
            views_min: 3,
            middle_sigma: 0.08,
            middle_sigma_min_px: 2.0,
            baseline_min_m: 0.05,
            parallax_min_rad: 3f64.to_radians(),
            size_factor_max: 1.6,
            sigma_max_m: 0.4,
            distance_max_m: 10.0,
            middle_share: 0.15,
        }
    }
}

/// A thing in the map.
#[derive(Clone, Debug, PartialEq)]
pub struct MapObject {
    /// Its class.
    pub class: usize,
    /// Its middle (metres).
    pub position: Point3<f64>,
    /// Covariance of the middle (m²).
    pub covariance: Matrix3<f64>,
    /// Width and height as boxes say them (metres).
    pub size: [f64; 2],
    /// Frames that saw it.
    pub views: u32,
    /// Frames that should have seen it and did not.
    pub missed: u32,
    /// Mean score of its boxes.
    pub score: f64,
    bearings: Vec<Bearing>,
}

impl MapObject {
    /// Where the cameras were that saw it (metres): at most two dozen, no two at one place.
    pub fn seen_from(&self) -> impl Iterator<Item = Point3<f64>> {
        self.bearings.iter().map(|b| Point3::from(b.sight.map_from_camera.translation.vector))
    }

    /// Standard deviation of the middle along its worst axis (metres).
    #[must_use]
    pub fn sigma_m(&self) -> f64 {
        worst_sigma(&self.covariance)
    }
}

/// Bearings kept of a thing.
const BEARINGS_OF_ONE: usize = 24;
/// Square of a Mahalanobis distance in two dimensions that 99 of 100 bearings stay below.
const GATE: f64 = 9.21;
/// Largest residual of a bearing of a thing, in its standard deviations.
const RESIDUAL_MAX: f64 = 3.0;
/// A box this near to the edge (pixels) may be cut off: its middle says nothing.
const EDGE_PX: f64 = 1.5;
/// Nearest distance at which a thing is believed (metres).
const DISTANCE_MIN_M: f64 = 0.2;

/// A box as a bearing.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bearing {
    class: usize,
    score: f64,
    sight: Sight,
    /// Width and height of the box in the plane `z = 1`.
    extent: [f64; 2],
    frame: u64,
}

impl Bearing {
    /// Size of what fills the box at a place; `None` behind or too near to the camera.
    fn size_at(&self, place: &Point3<f64>) -> Option<[f64; 2]> {
        let depth = self.sight.map_from_camera.inverse_transform_point(place).z;
        (depth > DISTANCE_MIN_M).then(|| self.extent.map(|e| e * depth))
    }

    fn fits(&self, place: &Point3<f64>, size: &[f64; 2], config: &ObjectConfig) -> bool {
        let near = residual(place, &self.sight).is_some_and(|r| r < RESIDUAL_MAX);
        near && self.size_at(place).is_some_and(|own| alike(&own, size, config.size_factor_max))
    }
}

/// Whether two sizes differ by at most a factor; the height of a thing changes less with the side that it is seen from than
/// its width, which may change by the square.
fn alike(a: &[f64; 2], b: &[f64; 2], factor: f64) -> bool {
    let apart = |k: usize| (a[k] / b[k]).ln().abs();
    apart(1) < factor.ln() && apart(0) < 2.0 * factor.ln()
}

fn worst_sigma(covariance: &Matrix3<f64>) -> f64 {
    covariance.symmetric_eigenvalues().max().max(0.0).sqrt()
}

/// Sums over all frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectCounts {
    /// Frames put in.
    pub frames: u64,
    /// Boxes in them.
    pub boxes: u64,
    /// Boxes that the picture's edge may cut off.
    pub cut_off: u64,
    /// Boxes of things that were known.
    pub seen_again: u64,
    /// Things made.
    pub created: u64,
    /// Things that turned out to be one.
    pub merged: u64,
    /// Things that were not seen again where they should be, or made room.
    pub forgotten: u64,
    /// Bearings of no thing that made room.
    pub bearings_dropped: u64,
}

/// Things, bounded in number, and bearings that are not yet a thing.
#[derive(Clone, Debug)]
pub struct ObjectMap {
    config: ObjectConfig,
    objects: Vec<MapObject>,
    bearings: VecDeque<Bearing>,
    counts: ObjectCounts,
}

impl ObjectMap {
    /// An empty map.
    #[must_use]
    pub fn new(config: ObjectConfig) -> Self {
        Self { config, objects: Vec::new(), bearings: VecDeque::new(), counts: ObjectCounts::default() }
    }

    /// All things.
    #[must_use]
    pub fn objects(&self) -> &[MapObject] {
        &self.objects
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> ObjectCounts {
        self.counts
    }

    /// Forgets everything but the counts: later poses have nothing to do with the earlier ones.
    pub fn clear(&mut self) {
        self.counts.forgotten += self.objects.len() as u64;
        self.objects.clear();
        self.bearings.clear();
    }

    /// Takes the boxes of a frame.
    pub fn insert(&mut self, boxes: &[SeenBox], camera: &Camera, map_from_camera: &Isometry3<f64>) {
        self.counts.frames += 1;
        self.counts.boxes += boxes.len() as u64;
        let frame = self.counts.frames;
        let (whole, cut): (Vec<SeenBox>, Vec<SeenBox>) = boxes.iter().partition(|b| is_whole(b, camera));
        self.counts.cut_off += cut.len() as u64;
        let bearings: Vec<Bearing> =
            whole.iter().filter_map(|b| self.bearing(b, camera, map_from_camera, frame)).collect();
        let seen = self.assign(&bearings);
        let mut seen_objects = vec![false; self.objects.len()];
        for (bearing, object) in bearings.iter().zip(&seen) {
            if let Some(k) = object {
                seen_objects[*k] = true;
                self.counts.seen_again += 1;
                self.objects[*k].see_again(*bearing, &self.config);
            }
        }
        self.miss(&seen_objects, &cut, camera, map_from_camera);
        for (bearing, object) in bearings.iter().zip(&seen) {
            if object.is_none() {
                self.keep(*bearing);
            }
        }
        self.merge();
        self.forget();
    }

    fn bearing(
        &self,
        seen: &SeenBox,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
        frame: u64,
    ) -> Option<Bearing> {
        let [x0, y0, x1, y1] = seen.area;
        // Edges of pixels to their centres at integers.
        let middle = Vector2::new(0.5 * (x0 + x1) - 0.5, 0.5 * (y0 + y1) - 0.5);
        let (fx, fy) = camera.focal();
        let longer = (x1 - x0).max(y1 - y0);
        let sigma_px = (self.config.middle_sigma * longer).max(self.config.middle_sigma_min_px);
        let sight = Sight {
            map_from_camera: *map_from_camera,
            ray: camera.ray(middle)?,
            sigma: sigma_px / camera.focal_mean(),
        };
        let extent = [(x1 - x0) / fx, (y1 - y0) / fy];
        let usable = extent.iter().all(|e| e.is_finite() && *e > 0.0) && seen.score.is_finite();
        usable.then_some(Bearing { class: seen.class, score: seen.score, sight, extent, frame })
    }

    /// The thing that each bearing belongs to: the nearest pairs first, each thing and bearing once.
    fn assign(&self, bearings: &[Bearing]) -> Vec<Option<usize>> {
        let mut pairs = Vec::new();
        for (b, bearing) in bearings.iter().enumerate() {
            for (k, object) in self.objects.iter().enumerate() {
                if object.class == bearing.class
                    && let Some(apart) = object.apart(bearing)
                    && apart < GATE
                    && bearing
                        .size_at(&object.position)
                        .is_some_and(|size| alike(&size, &object.size, self.config.size_factor_max))
                {
                    pairs.push((apart, b, k));
                }
            }
        }
        pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut of = vec![None; bearings.len()];
        let mut taken = vec![false; self.objects.len()];
        for (_, b, k) in pairs {
            if of[b].is_none() && !taken[k] {
                (of[b], taken[k]) = (Some(k), true);
            }
        }
        of
    }

    /// Notes which things a frame should have shown and did not.
    fn miss(
        &mut self,
        seen: &[bool],
        cut_off: &[SeenBox],
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) {
        let (width, height) = camera.size();
        for (object, seen) in self.objects.iter_mut().zip(seen) {
            if *seen || !object.should_be_seen_from(map_from_camera) {
                continue;
            }
            let at = map_from_camera.inverse_transform_point(&object.position);
            let Some(pixel) = camera.project(&at) else { continue };
            let (fx, fy) = camera.focal();
            let half = [0.5 * object.size[0] * fx / at.z, 0.5 * object.size[1] * fy / at.z];
            let inside = pixel.x > half[0]
                && pixel.x + half[0] < f64::from(width)
                && pixel.y > half[1]
                && pixel.y + half[1] < f64::from(height);
            let in_box = |b: &SeenBox| {
                b.class == object.class
                    && (b.area[0]..b.area[2]).contains(&pixel.x)
                    && (b.area[1]..b.area[3]).contains(&pixel.y)
            };
            object.missed += u32::from(inside && !cut_off.iter().any(in_box));
        }
    }

    /// Makes a thing of a bearing and those that are kept, or keeps it.
    fn keep(&mut self, bearing: Bearing) {
        if let Some((object, used)) = self.made_with(&bearing) {
            let mut at = 0;
            self.bearings.retain(|_| {
                at += 1;
                !used.contains(&(at - 1))
            });
            self.objects.push(object);
            self.counts.created += 1;
            return;
        }
        if self.bearings.len() >= self.config.bearings_max.max(1) {
            self.bearings.pop_front();
            self.counts.bearings_dropped += 1;
        }
        self.bearings.push_back(bearing);
    }

    /// The thing that most kept bearings agree about with this one, and which they are.
    fn made_with(&self, bearing: &Bearing) -> Option<(MapObject, Vec<usize>)> {
        let config = &self.config;
        let others: Vec<(usize, &Bearing)> = self
            .bearings
            .iter()
            .enumerate()
            .filter(|(_, b)| b.class == bearing.class && b.frame != bearing.frame)
            .collect();
        let mut best: Option<(Vec<usize>, f64)> = None;
        for (_, other) in &others {
            let Some((place, size)) = meeting(bearing, other, config) else { continue };
            let mut frames = vec![bearing.frame];
            let mut agreeing = Vec::new();
            for (k, third) in &others {
                if !frames.contains(&third.frame) && third.fits(&place, &size, config) {
                    frames.push(third.frame);
                    agreeing.push(*k);
                }
            }
            let off = residual(&place, &bearing.sight).unwrap_or(f64::INFINITY);
            let better = best
                .as_ref()
                .is_none_or(|(b, o)| agreeing.len() > b.len() || (agreeing.len() == b.len() && off < *o));
            if frames.len() >= config.views_min && better {
                best = Some((agreeing, off));
            }
        }
        let (used, _) = best?;
        let mut object = MapObject {
            class: bearing.class,
            position: Point3::origin(),
            covariance: Matrix3::zeros(),
            size: [0.0; 2],
            views: 0,
            missed: 0,
            score: 0.0,
            bearings: Vec::new(),
        };
        for b in used.iter().map(|k| self.bearings[*k]).chain([*bearing]) {
            object.add(b, config);
        }
        let known = object.place(config) && object.sigma_m() <= config.sigma_max_m;
        known.then_some((object, used))
    }

    /// Joins things that are one.
    fn merge(&mut self) {
        let mut k = 0;
        while k < self.objects.len() {
            let twin = (k + 1..self.objects.len()).find(|j| self.objects[k].is_one_with(&self.objects[*j]));
            let Some(j) = twin else {
                k += 1;
                continue;
            };
            let other = self.objects.swap_remove(j);
            self.counts.merged += 1;
            let own = &mut self.objects[k];
            let before = own.clone();
            for bearing in other.bearings {
                own.add(bearing, &self.config);
            }
            if !own.place(&self.config) {
                *own = before;
            }
            own.views = own.views.max(1) + other.views.saturating_sub(1);
            own.missed = own.missed.min(other.missed);
        }
    }

    /// Lets go of what is not there, and of the least known when there are too many.
    fn forget(&mut self) {
        let before = self.objects.len();
        self.objects.retain(|o| {
            let (hits, all) = (f64::from(o.views), f64::from(o.views + o.missed));
            all < 12.0 || hits >= 0.15 * all
        });
        while self.objects.len() > self.config.objects_max.max(1) {
            let least = (0..self.objects.len()).min_by_key(|k| self.objects[*k].views).unwrap_or(0);
            self.objects.swap_remove(least);
        }
        self.counts.forgotten += (before - self.objects.len()) as u64;
    }
}

/// Whether the whole thing is in the picture, as far as the box can tell.
fn is_whole(seen: &SeenBox, camera: &Camera) -> bool {
    let (width, height) = camera.size();
    let [x0, y0, x1, y1] = seen.area;
    x0 > EDGE_PX && y0 > EDGE_PX && x1 < f64::from(width) - EDGE_PX && y1 < f64::from(height) - EDGE_PX
}

/// Where two bearings meet, and the size of what is there; `None` where they do not, or disagree about the size.
fn meeting(a: &Bearing, b: &Bearing, config: &ObjectConfig) -> Option<(Point3<f64>, [f64; 2])> {
    let shift = a.sight.map_from_camera.translation.vector - b.sight.map_from_camera.translation.vector;
    if shift.norm() < config.baseline_min_m {
        return None;
    }
    let met = triangulate(&[a.sight, b.sight]).ok()?;
    let (own, other) = (a.size_at(&met.position)?, b.size_at(&met.position)?);
    let far = (met.position.coords - a.sight.map_from_camera.translation.vector).norm();
    let believed = met.parallax_rad >= config.parallax_min_rad
        && met.residual < RESIDUAL_MAX
        && far < config.distance_max_m
        && alike(&own, &other, config.size_factor_max);
    let size = [(own[0] * other[0]).sqrt(), (own[1] * other[1]).sqrt()];
    believed.then_some((met.position, size))
}

impl MapObject {
    /// Square of the Mahalanobis distance of a bearing from where this thing should be seen; `None` behind the camera.
    fn apart(&self, bearing: &Bearing) -> Option<f64> {
        let at = bearing.sight.map_from_camera.inverse_transform_point(&self.position);
        if at.z <= DISTANCE_MIN_M {
            return None;
        }
        let ideal = Vector2::new(at.x, at.y) / at.z;
        let slope = Matrix2x3::new(1.0, 0.0, -ideal.x, 0.0, 1.0, -ideal.y) / at.z;
        let turn = bearing.sight.map_from_camera.rotation.inverse().to_rotation_matrix();
        let slope = slope * turn.matrix();
        let spread =
            slope * self.covariance * slope.transpose() + Matrix2::identity() * bearing.sight.sigma.powi(2);
        let off = ideal - bearing.sight.ray;
        Some((off.transpose() * spread.try_inverse()? * off)[0])
    }

    fn see_again(&mut self, bearing: Bearing, config: &ObjectConfig) {
        let before = self.clone();
        self.add(bearing, config);
        if !self.place(config) {
            *self = Self { views: self.views, score: self.score, ..before };
        }
    }

    /// Adds a bearing to those that are kept; of those from one place the surest is.
    fn add(&mut self, bearing: Bearing, config: &ObjectConfig) {
        self.views += 1;
        self.score += (bearing.score - self.score) / f64::from(self.views);
        let eye = |b: &Bearing| b.sight.map_from_camera.translation.vector;
        let nearest = (0..self.bearings.len())
            .map(|k| (k, (eye(&self.bearings[k]) - eye(&bearing)).norm()))
            .min_by(|a, b| a.1.total_cmp(&b.1));
        match nearest {
            Some((k, apart)) if apart < config.baseline_min_m => {
                if self.bearings[k].score < bearing.score {
                    self.bearings[k] = bearing;
                }
            }
            Some((k, _)) if self.bearings.len() >= BEARINGS_OF_ONE => self.bearings[k] = bearing,
            _ => self.bearings.push(bearing),
        }
    }

    /// Places it anew by its bearings, without those that do not fit; false when they give no place.
    fn place(&mut self, config: &ObjectConfig) -> bool {
        let mut chosen: Vec<usize> = (0..self.bearings.len()).collect();
        loop {
            let sights: Vec<Sight> = chosen.iter().map(|k| self.bearings[*k].sight).collect();
            let Ok(met) = triangulate(&sights) else { return false };
            let off = |k: &usize| residual(&met.position, &self.bearings[*k].sight).unwrap_or(f64::INFINITY);
            let worst = (0..chosen.len()).max_by(|a, b| off(&chosen[*a]).total_cmp(&off(&chosen[*b])));
            if let Some(worst) = worst.filter(|w| off(&chosen[*w]) > RESIDUAL_MAX && chosen.len() > 2) {
                chosen.swap_remove(worst);
                continue;
            }
            let sizes: Vec<[f64; 2]> =
                chosen.iter().filter_map(|k| self.bearings[*k].size_at(&met.position)).collect();
            if sizes.is_empty() || met.residual > RESIDUAL_MAX {
                return false;
            }
            let median = |axis: usize| {
                let mut all: Vec<f64> = sizes.iter().map(|s| s[axis]).collect();
                mindseye_base::stats::median(&mut all)
            };
            self.size = [median(0), median(1)];
            self.position = met.position;
            let own = (config.middle_share * self.size[0].max(self.size[1])).powi(2);
            self.covariance = met.covariance * met.residual.powi(2).max(1.0) + Matrix3::identity() * own;
            // What did not fit was another thing.
            chosen.sort_unstable();
            self.bearings = chosen.iter().map(|k| self.bearings[*k]).collect();
            return true;
        }
    }

    /// Whether a camera looks at it much as one did that saw it: from about as far, and from about the same side.
    fn should_be_seen_from(&self, map_from_camera: &Isometry3<f64>) -> bool {
        let to = map_from_camera.translation.vector - self.position.coords;
        self.bearings.iter().any(|b| {
            let from = b.sight.map_from_camera.translation.vector - self.position.coords;
            from.angle(&to) < 0.35 && (0.67..1.5).contains(&(to.norm() / from.norm().max(1e-6)))
        })
    }

    /// Whether another thing is this one: of its class, and nearer than two of that size could stand.
    fn is_one_with(&self, other: &Self) -> bool {
        let mean = 0.25 * (self.size[0] + self.size[1] + other.size[0] + other.size[1]);
        let apart = self.position - other.position;
        let spread = self.covariance + other.covariance;
        let close = spread.try_inverse().is_some_and(|s| (apart.transpose() * s * apart)[0] < 6.25);
        self.class == other.class && (apart.norm() < 0.4 * mean || (close && apart.norm() < 0.7 * mean))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_base::random::Rng;
    use nalgebra::{UnitQuaternion, Vector3};

    fn camera() -> Camera {
        Camera::pinhole(640, 480, 525.0, 525.0, 319.5, 239.5).unwrap()
    }

    /// At a place, level, looking at another place; z is up.
    fn looking(from: [f64; 2], to: [f64; 2]) -> Isometry3<f64> {
        let ahead = Vector3::new(to[0] - from[0], to[1] - from[1], 0.0);
        let turn = UnitQuaternion::face_towards(&ahead, &-Vector3::z());
        Isometry3::from_parts(Vector3::new(from[0], from[1], 1.0).into(), turn)
    }

    /// The box around a ball in the map.
    fn ball(
        class: usize,
        at: Point3<f64>,
        size: f64,
        pose: &Isometry3<f64>,
        noise: &mut Rng,
    ) -> Option<SeenBox> {
        let p = pose.inverse_transform_point(&at);
        let pixel = camera().project(&p)?;
        let half = 0.5 * size * 525.0 / p.z;
        let mut shake = || noise.normal() * 0.05 * half;
        let (x, y) = (pixel.x + 0.5 + shake(), pixel.y + 0.5 + shake());
        let area = [x - half, y - half, x + half, y + half];
        let inside = area[0] > 2.0 && area[1] > 2.0 && area[2] < 638.0 && area[3] < 478.0;
        inside.then_some(SeenBox { class, score: 0.7, area })
    }

    fn walk() -> Vec<Isometry3<f64>> {
        (0..12).map(|k| looking([0.15 * f64::from(k), 0.05 * f64::from(k % 3)], [1.0, 3.0])).collect()
    }

    #[test]
    fn things_of_one_class_are_kept_apart_and_placed() {
        let truth = [
            (0, Point3::new(0.6, 3.0, 0.8), 0.5),
            (0, Point3::new(1.5, 2.8, 0.8), 0.5),
            (1, Point3::new(1.0, 3.4, 1.2), 0.2),
        ];
        let mut rng = Rng::new(5);
        let mut map = ObjectMap::new(ObjectConfig::default());
        for pose in walk() {
            let boxes: Vec<SeenBox> =
                truth.iter().filter_map(|(c, at, s)| ball(*c, *at, *s, &pose, &mut rng)).collect();
            map.insert(&boxes, &camera(), &pose);
        }
        assert_eq!(map.objects().len(), 3, "{:?}", map.objects());
        for (class, at, size) in truth {
            let near = |o: &&MapObject| o.class == class && (o.position - at).norm() < 0.12;
            let Some(found) = map.objects().iter().find(near) else {
                panic!("{class} at {at} is missing: {:?}", map.objects())
            };
            assert!((found.size[1] / size - 1.0).abs() < 0.1, "{:?}", found.size);
            assert!(found.views >= 8 && found.missed == 0, "{found:?}");
            let off = found.position - at;
            let d2 = (off.transpose() * found.covariance.try_inverse().unwrap() * off)[0];
            assert!(d2 < 11.3, "outside the 99 % ellipsoid: {d2}");
        }
        assert_eq!(map.counts().created, 3, "{:?}", map.counts());
    }

    #[test]
    fn turning_on_the_spot_and_cut_off_boxes_make_nothing() {
        let mut rng = Rng::new(6);
        let at = Point3::new(0.1, 3.0, 1.0);
        let mut map = ObjectMap::new(ObjectConfig::default());
        for k in 0..10 {
            let pose = looking([0.0, 0.0], [0.05 * f64::from(k), 3.0]);
            let seen: Vec<SeenBox> = ball(0, at, 0.5, &pose, &mut rng).into_iter().collect();
            map.insert(&seen, &camera(), &pose);
        }
        assert_eq!((map.objects().len(), map.counts().boxes), (0, 10));
        for pose in walk() {
            map.insert(&[SeenBox { class: 0, score: 0.9, area: [0.0, 40.0, 90.0, 200.0] }], &camera(), &pose);
        }
        assert_eq!((map.objects().len(), map.counts().cut_off), (0, 12));
    }

    #[test]
    fn what_is_not_seen_again_is_forgotten_and_memory_is_bounded() {
        let mut rng = Rng::new(7);
        let at = Point3::new(1.0, 3.0, 1.0);
        let config = ObjectConfig { bearings_max: 20, objects_max: 4, ..ObjectConfig::default() };
        let mut map = ObjectMap::new(config);
        for pose in walk() {
            let seen: Vec<SeenBox> = ball(0, at, 0.4, &pose, &mut rng).into_iter().collect();
            map.insert(&seen, &camera(), &pose);
        }
        assert_eq!(map.objects().len(), 1);
        // It is carried away.
        for _ in 0..8 {
            for pose in walk() {
                map.insert(&[], &camera(), &pose);
            }
        }
        assert_eq!((map.objects().len(), map.counts().forgotten), (0, 1));
        for k in 0..2000 {
            let pose = walk()[k % 12];
            let mut side = || 40.0 + 400.0 * rng.unit();
            let (x, y) = (side(), side().min(380.0));
            let seen = SeenBox { class: k % 3, score: 0.5, area: [x, y, x + 60.0, y + 60.0] };
            map.insert(&[seen], &camera(), &pose);
            assert!(map.bearings.len() <= 20 && map.objects().len() <= 4);
        }
        assert!(map.counts().bearings_dropped > 0);
        map.clear();
        assert!(map.objects().is_empty() && map.bearings.is_empty());
    }
}
