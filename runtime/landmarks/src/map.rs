//! Landmarks from kept frames whose poses are known.

use std::collections::VecDeque;

use nalgebra::{Isometry3, Matrix3, Point3, Vector2, Vector3};

use crate::camera::Camera;
use crate::features::{Descriptor, Features, Keypoint};
use crate::grid::Grid;
use crate::index::Index;
use crate::triangulate::{Sight, Unplaced, residual, triangulate};

/// Settings of a [`LandmarkMap`]. Pixels are those of the pictures that are put in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MapConfig {
    /// Landmarks at most; the one seen least makes room. About 2 kB each.
    pub landmarks_max: usize,
    /// Frames at most whose features are kept for matching; the oldest makes room. About 160 bytes a feature.
    pub frames_max: usize,
    /// Earlier frames that a new one is matched to.
    pub neighbours: usize,
    /// Smallest distance of two cameras that triangulate (metres).
    pub baseline_min_m: f64,
    /// Smallest angle between two rays of a landmark (radians).
    pub parallax_min_rad: f64,
    /// Largest distance of a sight from where its landmark should be seen (pixels).
    pub residual_max_px: f64,
    /// Standard deviation of a feature's place (pixels), that of the frames' poses included.
    pub feature_sigma_px: f64,
    /// A match is at most this share as far as the second best, in descriptor space.
    pub ratio_max: f64,
    /// Largest distance of matching descriptors; they are 512 long.
    pub distance_max: f64,
    /// The same of a feature and the landmark that is expected where it is, to be added to it.
    pub distance_expected_max: f64,
    /// The same, to call the landmark seen.
    pub distance_seen_max: f64,
}

impl Default for MapConfig {
    fn default() -> Self {
        Self {
            landmarks_max: 20_000,
            frames_max: 100,
            neighbours: 8,
            baseline_min_m: 0.06,
            parallax_min_rad: 1f64.to_radians(),
            residual_max_px: 3.0,
            feature_sigma_px: 1.0,
            ratio_max: 0.8,
            distance_max: 330.0,
            distance_expected_max: 250.0,
            distance_seen_max: 285.0,
        }
    }
}

/// Width of the pictures that default settings in pixels are for.
pub const WIDTH: u32 = 416;

impl MapConfig {
    /// The defaults, in pixels of pictures that are this wide.
    #[must_use]
    pub fn for_width(width: u32) -> Self {
        let factor = (f64::from(width) / f64::from(WIDTH)).max(0.75);
        let own = Self::default();
        Self {
            residual_max_px: own.residual_max_px * factor,
            feature_sigma_px: own.feature_sigma_px * factor,
            ..own
        }
    }
}

/// Descriptors kept of a landmark.
pub(crate) const DESCRIPTORS_MAX: usize = 4;
/// Sights kept of a landmark.
const SIGHTS_MAX: usize = 12;
/// Descriptors nearer than this to one that is kept add nothing.
const DESCRIPTOR_NEWS: u32 = 170 * 170;
/// Viewing directions of frames that are matched differ at most by this.
const TURN_MAX_RAD: f64 = 0.9;
/// A landmark looks alike within this angle of the directions from which it was seen.
pub(crate) const VIEW_MAX_RAD: f64 = 1.0;
/// One kept frame in so many is compared with the landmarks of the others, and the last few are remembered.
const POSE_EVERY: u64 = 3;
const POSE_ERRORS_MAX: usize = 32;
const POSE_ERRORS_MIN: usize = 5;
/// No landmark.
pub(crate) const NONE: u32 = u32::MAX;

/// A place in the map that was seen at least twice.
#[derive(Clone, Debug)]
pub struct Landmark {
    /// Place in the map (metres).
    pub position: Point3<f64>,
    /// Its covariance (m²).
    pub covariance: Matrix3<f64>,
    /// Frames that saw it, those that were dropped since included.
    pub views: u32,
    /// Mean direction from which it was seen, towards the camera; of length 1 where all directions agree.
    pub(crate) towards: Vector3<f64>,
    /// Scale of its feature times its distance (pixels times metres).
    pub(crate) size: f64,
    /// Descriptors in the index.
    pub(crate) descriptors: usize,
    /// Direction and scale of each descriptor's feature, across the direction from which it was seen (metres).
    pub(crate) axes: [Vector3<f64>; DESCRIPTORS_MAX],
    /// The last sights with their frames, those of frames that were dropped included.
    pub(crate) sights: Vec<(u64, Sight)>,
}

/// A frame whose features are kept.
#[derive(Clone, Debug)]
pub(crate) struct KeptFrame {
    pub(crate) id: u64,
    pub(crate) map_from_camera: Isometry3<f64>,
    pub(crate) keypoints: Vec<Keypoint>,
    pub(crate) descriptors: Vec<Descriptor>,
    pub(crate) rays: Vec<Option<Vector2<f64>>>,
    /// The landmark of each feature, or [`NONE`].
    pub(crate) landmarks: Vec<u32>,
    pub(crate) camera: Camera,
}

/// A feature of a kept frame: which frame, which of its features, how it sees the point.
type Partner = (usize, usize, Sight);

/// What a frame brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inserted {
    /// Its features.
    pub features: usize,
    /// Features of landmarks that were known.
    pub seen_again: usize,
    /// New landmarks.
    pub created: usize,
    /// Features matched to earlier ones whose rays have too little parallax.
    pub without_parallax: usize,
    /// Landmarks that made room.
    pub dropped: usize,
}

/// Sums over all frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapCounts {
    /// Frames put in.
    pub frames: u64,
    /// Of them, without a feature: blurred, dark or without texture.
    pub frames_without_features: u64,
    /// Of them, matched to none for lack of a frame that looks the same way from elsewhere.
    pub frames_without_baseline: u64,
    /// Landmarks made.
    pub created: u64,
    /// Landmarks that made room for others.
    pub dropped: u64,
}

/// Landmarks, bounded in number, and the features of the frames that they come from.
#[derive(Clone, Debug)]
pub struct LandmarkMap {
    pub(crate) config: MapConfig,
    pub(crate) frames: VecDeque<KeptFrame>,
    pub(crate) slots: Vec<Option<Landmark>>,
    free: Vec<u32>,
    pub(crate) index: Index,
    counts: MapCounts,
    next_frame: u64,
    hand: usize,
    /// By how much the poses of the last kept frames that were compared are off from where the landmarks put them: squared
    /// metres and squared radians.
    pose_errors: VecDeque<[f64; 2]>,
}

impl LandmarkMap {
    /// An empty map.
    #[must_use]
    pub fn new(config: MapConfig) -> Self {
        let landmarks = config.landmarks_max.clamp(1, NONE as usize / DESCRIPTORS_MAX - 1);
        Self {
            config,
            frames: VecDeque::new(),
            slots: vec![None; landmarks],
            free: (0..landmarks as u32).rev().collect(),
            index: Index::new(landmarks * DESCRIPTORS_MAX),
            counts: MapCounts::default(),
            next_frame: 0,
            hand: 0,
            pose_errors: VecDeque::new(),
        }
    }

    /// Number of landmarks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// True without any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All landmarks.
    pub fn landmarks(&self) -> impl Iterator<Item = &Landmark> {
        self.slots.iter().flatten()
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> MapCounts {
        self.counts
    }

    /// Forgets everything: a new segment, whose poses have nothing to do with the earlier ones.
    pub fn clear(&mut self) {
        *self = Self::new(self.config);
    }

    /// Keeps a frame: finds known landmarks in it, and makes new ones of what earlier frames saw too.
    pub fn insert(
        &mut self,
        features: &Features,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Inserted {
        self.counts.frames += 1;
        let mut report = Inserted { features: features.len(), ..Inserted::default() };
        if features.is_empty() {
            self.counts.frames_without_features += 1;
            return report;
        }
        self.index.learn(&features.descriptors);
        if self.counts.frames.is_multiple_of(POSE_EVERY)
            && let Some(error) = self.pose_error(features, camera, map_from_camera)
        {
            self.pose_errors.truncate(POSE_ERRORS_MAX - 1);
            self.pose_errors.push_front(error);
        }
        let pixel = |k: &Keypoint| camera.ray(Vector2::new(f64::from(k.x), f64::from(k.y)));
        let mut frame = KeptFrame {
            id: self.next_frame,
            map_from_camera: *map_from_camera,
            keypoints: features.keypoints.clone(),
            descriptors: features.descriptors.clone(),
            rays: features.keypoints.iter().map(pixel).collect(),
            landmarks: vec![NONE; features.len()],
            camera: *camera,
        };
        self.next_frame += 1;
        self.find_known(&mut frame, camera);
        report.seen_again = frame.landmarks.iter().filter(|l| **l != NONE).count();
        self.make_new(&mut frame, &mut report);
        self.counts.created += report.created as u64;
        self.counts.dropped += report.dropped as u64;
        if self.frames.len() >= self.config.frames_max.max(1) {
            self.frames.pop_front();
        }
        self.frames.push_back(frame);
        report
    }

    /// Standard deviations, along (metres) and about (radians) each axis, of what the poses of kept frames are off from the
    /// landmarks of the others: odometry's drift, and what is wrong with the camera's mounting or its clock. `None` until a few
    /// could be compared.
    #[must_use]
    pub fn pose_sigma(&self) -> Option<(f64, f64)> {
        // Half of a chi-square with three degrees of freedom is below this.
        const MEDIAN: f64 = 2.366;
        let sigma = |part: usize| {
            let mut all: Vec<f64> = self.pose_errors.iter().map(|e| e[part]).collect();
            (mindseye_base::stats::median(&mut all) / MEDIAN).sqrt()
        };
        (self.pose_errors.len() >= POSE_ERRORS_MIN).then(|| (sigma(0), sigma(1)))
    }

    /// Assigns features to the landmarks that should be seen near them.
    fn find_known(&mut self, frame: &mut KeptFrame, camera: &Camera) {
        let grid = Grid::new(&frame.keypoints, camera.size());
        let mut best: Vec<(u32, u32)> = vec![(NONE, u32::MAX); frame.keypoints.len()];
        let most = (self.config.distance_expected_max * self.config.distance_expected_max) as u32;
        for (slot, landmark) in self.slots.iter().enumerate() {
            let Some(landmark) = landmark else { continue };
            let Some((pixel, scale)) = landmark.expected(camera, &frame.map_from_camera) else { continue };
            let mut nearest = (NONE, most);
            grid.within(pixel, self.config.residual_max_px, |k| {
                if is_of_scale(f64::from(frame.keypoints[k as usize].scale), scale) {
                    let d = self.distance(slot, landmark, &frame.descriptors[k as usize]);
                    if d < nearest.1 {
                        nearest = (k, d);
                    }
                }
            });
            if nearest.0 != NONE && nearest.1 < best[nearest.0 as usize].1 {
                best[nearest.0 as usize] = (slot as u32, nearest.1);
            }
        }
        for (k, (slot, _)) in best.iter().enumerate() {
            if *slot == NONE {
                continue;
            }
            let Some(sight) = frame.sight(k, self.config.feature_sigma_px) else { continue };
            if self.see_again(*slot, frame, k, sight) {
                frame.landmarks[k] = *slot;
            }
        }
    }

    /// Adds a sight to a landmark and places it anew; false when the sight does not fit.
    fn see_again(&mut self, slot: u32, frame: &KeptFrame, feature: usize, sight: Sight) -> bool {
        let limit = self.config.residual_max_px / self.config.feature_sigma_px;
        let oldest = self.frames.front().map_or(0, |f| f.id);
        let Some(landmark) = &mut self.slots[slot as usize] else { return false };
        // Odometry has drifted since the frames that were dropped.
        let of_kept = landmark.sights.iter().filter(|(id, _)| *id >= oldest).map(|s| s.1);
        let sights: Vec<Sight> = of_kept.chain([sight]).collect();
        if sights.len() >= 2
            && let Ok(placed) = triangulate(&sights)
        {
            if residual(&placed.position, &sight).is_none_or(|r| r > limit) {
                return false;
            }
            // Sights of frames that were dropped still count in the covariance that is smaller.
            if placed.covariance.trace() <= landmark.covariance.trace() || sights.len() >= 3 {
                landmark.position = placed.position;
                landmark.covariance = placed.covariance;
            }
        }
        landmark.look_from(&frame.map_from_camera, f64::from(frame.keypoints[feature].scale));
        if landmark.sights.len() >= SIGHTS_MAX {
            // The second is nearest in time to its neighbours; the first keeps the baseline.
            landmark.sights.remove(1);
        }
        landmark.sights.push((frame.id, sight));
        let axis = frame.axis(feature, &landmark.position);
        self.describe(slot, frame.descriptors[feature], axis);
        true
    }

    /// Keeps a descriptor of a landmark, with the axis of its feature, unless it is like those that are kept.
    fn describe(&mut self, slot: u32, descriptor: Descriptor, axis: Vector3<f64>) {
        let Some(landmark) = &mut self.slots[slot as usize] else { return };
        let first = slot * DESCRIPTORS_MAX as u32;
        let mut kept = first..first + landmark.descriptors as u32;
        let end = kept.end;
        if landmark.descriptors < DESCRIPTORS_MAX
            && kept.all(|e| self.index.descriptor(e).distance(&descriptor) > DESCRIPTOR_NEWS)
        {
            landmark.axes[landmark.descriptors] = axis;
            landmark.descriptors += 1;
            self.index.insert(end, &descriptor);
        }
    }

    /// Squared distance of the nearest of a landmark's descriptors.
    pub(crate) fn distance(&self, slot: usize, landmark: &Landmark, descriptor: &Descriptor) -> u32 {
        let first = (slot * DESCRIPTORS_MAX) as u32;
        let kept = first..first + landmark.descriptors as u32;
        kept.map(|e| self.index.descriptor(e).distance(descriptor)).min().unwrap_or(u32::MAX)
    }

    fn distance_max_squared(&self) -> u32 {
        (self.config.distance_max * self.config.distance_max) as u32
    }

    /// Makes landmarks of features that no landmark has, where earlier frames have such ones too.
    fn make_new(&mut self, frame: &mut KeptFrame, report: &mut Inserted) {
        let neighbours = self.neighbours(frame);
        if neighbours.is_empty() {
            self.counts.frames_without_baseline += 1;
        }
        let mut matches: Vec<Vec<(usize, usize)>> = vec![Vec::new(); frame.keypoints.len()];
        for n in neighbours {
            for (k, other) in self.epipolar_matches(frame, &self.frames[n]) {
                matches[k].push((n, other));
            }
        }
        for (k, found) in matches.iter().enumerate() {
            let Some(own) = frame.sight(k, self.config.feature_sigma_px) else { continue };
            if found.is_empty() {
                continue;
            }
            match self.agreed(own, found) {
                Ok((landmark, with)) => {
                    let Some(slot) = self.room(report) else { continue };
                    let position = landmark.position;
                    self.slots[slot as usize] = Some(landmark);
                    self.describe(slot, frame.descriptors[k], frame.axis(k, &position));
                    for (n, other, sight) in with {
                        let neighbour = &mut self.frames[n];
                        neighbour.landmarks[other] = slot;
                        let (id, pose) = (neighbour.id, neighbour.map_from_camera);
                        let (scale, descriptor) =
                            (f64::from(neighbour.keypoints[other].scale), neighbour.descriptors[other]);
                        let axis = neighbour.axis(other, &position);
                        if let Some(landmark) = &mut self.slots[slot as usize] {
                            landmark.look_from(&pose, scale);
                            landmark.sights.push((id, sight));
                        }
                        self.describe(slot, descriptor, axis);
                    }
                    if let Some(landmark) = &mut self.slots[slot as usize] {
                        landmark.look_from(&frame.map_from_camera, f64::from(frame.keypoints[k].scale));
                        landmark.sights.push((frame.id, own));
                    }
                    frame.landmarks[k] = slot;
                    report.created += 1;
                }
                Err(Unplaced::NoParallax) => report.without_parallax += 1,
                Err(Unplaced::Behind) => {}
            }
        }
    }

    /// Triangulates a feature with those that it was matched to; those that do not fit are left out.
    fn agreed(&self, own: Sight, found: &[(usize, usize)]) -> Result<(Landmark, Vec<Partner>), Unplaced> {
        let limit = self.config.residual_max_px / self.config.feature_sigma_px;
        let mut with: Vec<Partner> = found
            .iter()
            .filter(|(n, k)| self.frames[*n].landmarks[*k] == NONE)
            .filter_map(|(n, k)| Some((*n, *k, self.frames[*n].sight(*k, self.config.feature_sigma_px)?)))
            .collect();
        loop {
            if with.is_empty() {
                return Err(Unplaced::Behind);
            }
            let sights: Vec<Sight> = [own].into_iter().chain(with.iter().map(|w| w.2)).collect();
            let placed = triangulate(&sights);
            let worst = placed.ok().and_then(|p| {
                let off = |s: &Sight| residual(&p.position, s).unwrap_or(f64::INFINITY);
                let of = with.iter().enumerate().map(|(i, w)| (i, off(&w.2)));
                let worst = of.max_by(|a, b| a.1.total_cmp(&b.1))?;
                (worst.1.max(off(&own)) > limit).then_some(worst.0)
            });
            match (placed, worst) {
                (Ok(p), None) if p.parallax_rad < self.config.parallax_min_rad => {
                    return Err(Unplaced::NoParallax);
                }
                (Ok(p), None) => {
                    let landmark = Landmark {
                        position: p.position,
                        covariance: p.covariance,
                        views: 0,
                        towards: Vector3::zeros(),
                        size: 0.0,
                        descriptors: 0,
                        axes: [Vector3::zeros(); DESCRIPTORS_MAX],
                        sights: Vec::new(),
                    };
                    return Ok((landmark, with));
                }
                (Ok(_), Some(worst)) => {
                    with.remove(worst);
                }
                (Err(e), _) if with.len() == 1 => return Err(e),
                // With several, the last match is as good a suspect as any.
                (Err(_), _) => {
                    with.pop();
                }
            }
        }
    }

    /// Earlier frames that look the same way from elsewhere: the nearest ones.
    fn neighbours(&self, frame: &KeptFrame) -> Vec<usize> {
        let ahead = |f: &Isometry3<f64>| f.rotation * Vector3::z();
        let mut all: Vec<(usize, f64)> = self
            .frames
            .iter()
            .enumerate()
            .filter_map(|(n, other)| {
                let apart = (other.map_from_camera.translation.vector
                    - frame.map_from_camera.translation.vector)
                    .norm();
                let turn = ahead(&other.map_from_camera).angle(&ahead(&frame.map_from_camera));
                let fits = apart >= self.config.baseline_min_m && turn < TURN_MAX_RAD;
                fits.then_some((n, apart + turn))
            })
            .collect();
        all.sort_by(|a, b| a.1.total_cmp(&b.1));
        all.truncate(self.config.neighbours);
        all.into_iter().map(|(n, _)| n).collect()
    }

    /// Features of two frames that look alike, lie on each other's epipolar lines, and have no landmark yet.
    fn epipolar_matches(&self, frame: &KeptFrame, other: &KeptFrame) -> Vec<(usize, usize)> {
        let other_from_frame = other.map_from_camera.inverse() * frame.map_from_camera;
        let essential = other_from_frame.translation.vector.cross_matrix()
            * other_from_frame.rotation.to_rotation_matrix().matrix();
        let tolerance = self.config.residual_max_px / other.camera.focal_mean();
        let usable: Vec<(usize, Vector2<f64>)> = other
            .rays
            .iter()
            .enumerate()
            .filter(|(k, _)| other.landmarks[*k] == NONE)
            .filter_map(|(k, r)| Some((k, (*r)?)))
            .collect();
        let most = self.distance_max_squared();
        let ratio = self.config.ratio_max * self.config.ratio_max;
        // For each feature of `other`, the best of this frame: a match must be best both ways.
        let mut back: Vec<(u32, usize)> = vec![(u32::MAX, 0); other.rays.len()];
        let mut out = Vec::new();
        for (k, ray) in frame.rays.iter().enumerate() {
            let (Some(ray), NONE) = (ray, frame.landmarks[k]) else { continue };
            let line = essential * Vector3::new(ray.x, ray.y, 1.0);
            let normal = line.xy().norm();
            if normal < 1e-9 {
                continue;
            }
            let scale = frame.keypoints[k].scale;
            let (mut best, mut second) = ((usize::MAX, u32::MAX), u32::MAX);
            for (o, at) in &usable {
                let off = (line.x * at.x + line.y * at.y + line.z).abs();
                if off > tolerance * normal || !(0.4..2.5).contains(&(other.keypoints[*o].scale / scale)) {
                    continue;
                }
                let d = frame.descriptors[k].distance(&other.descriptors[*o]);
                if d < best.1 {
                    second = best.1;
                    best = (*o, d);
                } else {
                    second = second.min(d);
                }
                if d < back[*o].0 {
                    back[*o] = (d, k);
                }
            }
            if best.1 < most && f64::from(best.1) < ratio * f64::from(second) {
                out.push((k, best.0));
            }
        }
        out.retain(|(k, o)| back[*o].1 == *k);
        out
    }

    /// A free slot; the landmark seen least of the next few makes room.
    fn room(&mut self, report: &mut Inserted) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let n = self.slots.len();
        let looked = (0..32.min(n)).map(|k| (self.hand + k) % n);
        let slot = looked.min_by_key(|k| self.slots[*k].as_ref().map_or(0, |l| l.views))?;
        self.hand = (self.hand + 32) % n;
        report.dropped += 1;
        self.remove(slot as u32);
        Some(slot as u32)
    }

    fn remove(&mut self, slot: u32) {
        let Some(landmark) = self.slots[slot as usize].take() else { return };
        for k in 0..landmark.descriptors as u32 {
            self.index.remove(slot * DESCRIPTORS_MAX as u32 + k);
        }
        for frame in &mut self.frames {
            for l in &mut frame.landmarks {
                if *l == slot {
                    *l = NONE;
                }
            }
        }
    }
}

/// Whether a feature is not much larger or smaller than expected.
pub(crate) fn is_of_scale(scale: f64, expected: f64) -> bool {
    const SCALE_MAX: f64 = 2.2255;
    scale < SCALE_MAX * expected && expected < SCALE_MAX * scale
}

impl Landmark {
    /// Where (pixels) and how large a camera should see it; `None` where it does not, or from a side from which nobody
    /// has seen it.
    pub(crate) fn expected(
        &self,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Option<(Vector2<f64>, f64)> {
        let point = map_from_camera.inverse_transform_point(&self.position);
        let pixel = camera.project(&point)?;
        let distance = point.coords.norm();
        let to = map_from_camera.translation.vector - self.position.coords;
        if to.dot(&self.towards) < VIEW_MAX_RAD.cos() * distance * self.towards.norm() {
            return None;
        }
        Some((pixel, self.size / distance))
    }

    /// Where (pixels), how large (pixels) and in which direction (radians) a camera should see the feature of one of its
    /// descriptors.
    pub(crate) fn feature_in(
        &self,
        descriptor: usize,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Option<([f64; 2], f64, f64)> {
        let point = map_from_camera.inverse_transform_point(&self.position);
        let axis = map_from_camera.rotation.inverse() * self.axes[descriptor];
        let (at, tip) = (camera.project(&point)?, camera.project(&(point + axis))?);
        let scale = axis.norm() * camera.focal_mean() / point.z;
        Some(([at.x, at.y], scale, (tip.y - at.y).atan2(tip.x - at.x)))
    }

    /// Notes from where and how large it was seen.
    fn look_from(&mut self, map_from_camera: &Isometry3<f64>, scale: f64) {
        let to = map_from_camera.translation.vector - self.position.coords;
        let distance = to.norm().max(1e-6);
        let n = f64::from(self.views);
        self.towards = (self.towards * n + to / distance) / (n + 1.0);
        self.size = (self.size * n + scale * distance) / (n + 1.0);
        self.views += 1;
    }
}

impl KeptFrame {
    /// Direction and scale of a feature where its landmark is, across the camera's axis (metres).
    fn axis(&self, feature: usize, position: &Point3<f64>) -> Vector3<f64> {
        let keypoint = &self.keypoints[feature];
        let (sin, cos) = f64::from(keypoint.angle).sin_cos();
        let depth = self.map_from_camera.inverse_transform_point(position).z;
        let size = f64::from(keypoint.scale) * depth / self.camera.focal_mean();
        self.map_from_camera.rotation * Vector3::new(cos * size, sin * size, 0.0)
    }

    /// The sight of a feature; `None` where the lens cannot be undone.
    fn sight(&self, feature: usize, sigma_px: f64) -> Option<Sight> {
        let ray = self.rays[feature]?;
        Some(Sight { map_from_camera: self.map_from_camera, ray, sigma: sigma_px / self.camera.focal_mean() })
    }
}
