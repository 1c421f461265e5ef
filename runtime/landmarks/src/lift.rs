//! From imagined pictures to a goal pose, by geometry alone.
//!
//! Every picture is placed by the landmarks ([`LandmarkMap::register`]); together they are the path of the imagined
//! drive. Three things tell an invented drive from a remembered place:
//! * pictures that cannot be placed, or whose places jump;
//! * **SD** (Video4Spatial, equation 3), here without a reference cloud: points triangulated between the imagined
//!   pictures, and their mean distance to the nearest landmark; one-sided, the maximum over pictures;
//! * **holes**: regions of a picture in which landmarks that the nearest kept frames saw are not found, although they are
//!   elsewhere in the same picture: something was painted over them.
//!
//! The object is where landmarks lie inside its box in the last pictures, and the base stands before it.

use nalgebra::{Isometry3, Matrix3, Matrix6, Point3, Vector2, Vector3};

use crate::camera::Camera;
use crate::features::Features;
use crate::grid::Grid;
use crate::map::{LandmarkMap, MapConfig, NONE};
use crate::register::{RegisterConfig, Registration, Unregistered};

/// One imagined picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImaginedFrame {
    /// Its features.
    pub features: Features,
    /// Box of the object, `[x0, y0, x1, y1]` in pixels, where there is one.
    pub area: Option<[f64; 4]>,
}

/// Settings of [`GeometricLift`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LiftConfig {
    /// How pictures are placed.
    pub register: RegisterConfig,
    /// Smallest share of the pictures that have to be placed.
    pub placed_min: f64,
    /// Largest distance between the places of neighbouring pictures (metres).
    pub jump_max_m: f64,
    /// Largest SD (metres); 0.2 and 0.1 are the paper's.
    pub sd_max_m: f64,
    /// A region is a hole when so few of its landmarks are found with a probability of less than that of this many
    /// standard deviations.
    pub hole_sigmas: f64,
    /// Fewest landmarks or triangulated points in the object's box.
    pub object_points_min: usize,
    /// Distance from the object at which the base stands (metres).
    pub standoff_m: f64,
}

impl Default for LiftConfig {
    fn default() -> Self {
        Self {
            register: RegisterConfig::default(),
            placed_min: 0.7,
            jump_max_m: 0.8,
            sd_max_m: 0.2,
            hole_sigmas: 5.0,
            object_points_min: 3,
            standoff_m: 1.2,
        }
    }
}

/// A region of a picture in which landmarks are missing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hole {
    /// `[x0, y0, x1, y1]` (pixels).
    pub area: [f64; 4],
    /// Landmarks that should be seen there.
    pub expected: usize,
    /// Of them, found.
    pub found: usize,
    /// Features that are there.
    pub features: usize,
    /// Of them, explained by a landmark.
    pub explained: usize,
    /// How unlikely the landmarks' share is (standard deviations below the picture's own).
    pub missing_sigmas: f64,
    /// How unlikely the features' share is.
    pub strange_sigmas: f64,
}

impl Hole {
    /// How unlikely both are together (standard deviations).
    #[must_use]
    pub fn sigmas(&self) -> f64 {
        (self.missing_sigmas + self.strange_sigmas) * std::f64::consts::FRAC_1_SQRT_2
    }
}

/// What is known of one imagined picture.
#[derive(Clone, Debug, PartialEq)]
pub struct FrameReport {
    /// Where it was taken.
    pub placed: Result<Registration, Unregistered>,
    /// Points triangulated with the other pictures.
    pub points: usize,
    /// Their mean distance to the nearest landmark (metres).
    pub distance_m: Option<f64>,
    /// The least likely region.
    pub hole: Option<Hole>,
}

/// Why an imagined drive is not believed.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Inconsistent {
    /// There is nothing to judge.
    #[error("no picture was imagined")]
    NoFrames,
    /// Too many pictures are of no place that is known.
    #[error("picture {frame} cannot be placed: {reason}")]
    NotPlaced {
        /// The first such picture.
        frame: usize,
        /// Why.
        reason: Unregistered,
    },
    /// The camera would have jumped.
    #[error("the camera jumps {distance_m:.2} m before picture {frame}; {wanted_m:.2} m is the most")]
    Jump {
        /// The picture after the jump.
        frame: usize,
        /// How far.
        distance_m: f64,
        /// Largest distance that is believed.
        wanted_m: f64,
    },
    /// Surfaces where there are none.
    #[error(
        "points of picture {frame} are {distance_m:.2} m off the known surfaces; {wanted_m:.2} m is the most"
    )]
    Distance {
        /// The picture with the largest distance.
        frame: usize,
        /// Mean distance of its points.
        distance_m: f64,
        /// Largest one that is believed.
        wanted_m: f64,
    },
    /// Something stands before what should be seen.
    #[error("{} of {} known points are missing in a region of picture {frame}, and {} of {} features there are unknown", hole.expected - hole.found, hole.expected, hole.features - hole.explained, hole.features)]
    Hole {
        /// The picture.
        frame: usize,
        /// The region.
        hole: Hole,
    },
    /// No box, or nothing known in it.
    #[error("the object's box holds {points} known points; {wanted} are needed")]
    NoObject {
        /// Points in the best box.
        points: usize,
        /// How many are needed.
        wanted: usize,
    },
}

/// Where the object is and where the base should stand. The map is level: z is up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LiftedGoal {
    /// Middle of the object's front (metres).
    pub object: Point3<f64>,
    /// Its covariance (m²).
    pub object_covariance: Matrix3<f64>,
    /// Where the base stands: x, y (metres), yaw (radians), facing the object.
    pub base: [f64; 3],
    /// Covariance of the base in the order x, y, z, roll, pitch, yaw; what a planar pose does not have is 0.
    pub covariance: Matrix6<f64>,
    /// Points that the object's distance rests on.
    pub points: usize,
}

/// The lift's result.
#[derive(Clone, Debug, PartialEq)]
pub struct PictureLift {
    /// `Ok` when the drive is believed.
    pub verdict: Result<(), Inconsistent>,
    /// One report per picture.
    pub frames: Vec<FrameReport>,
    /// The largest of the pictures' distances (metres).
    pub sd_m: Option<f64>,
    /// The goal, also of a drive that is not believed.
    pub goal: Option<LiftedGoal>,
}

/// Something that makes a goal pose of imagined pictures.
pub trait Lift {
    /// Judges a drive, its first picture being the nearest to the start.
    fn lift(&mut self, frames: &[ImaginedFrame]) -> PictureLift;
}

/// [`Lift`] by landmarks.
#[derive(Debug)]
pub struct GeometricLift<'a> {
    /// What is known of the place.
    pub map: &'a mut LandmarkMap,
    /// The camera of the imagined pictures: that of the frames that were given to the model, at its size.
    pub camera: Camera,
    /// Where the drive begins, if it is known.
    pub map_from_start: Option<Isometry3<f64>>,
    /// Settings.
    pub config: LiftConfig,
}

impl Lift for GeometricLift<'_> {
    fn lift(&mut self, frames: &[ImaginedFrame]) -> PictureLift {
        let mut reports = self.place(frames);
        let own = self.own_points(frames, &mut reports);
        let goal = self.goal(frames, &reports, &own);
        let sd_m = reports.iter().filter_map(|r| r.distance_m).max_by(f64::total_cmp);
        let verdict = self.judge(&reports).and(match &goal {
            Ok(_) => Ok(()),
            Err(points) => {
                Err(Inconsistent::NoObject { points: *points, wanted: self.config.object_points_min })
            }
        });
        PictureLift { verdict, frames: reports, sd_m, goal: goal.ok() }
    }
}

impl GeometricLift<'_> {
    /// Places every picture, each with the one before as a guess.
    fn place(&mut self, frames: &[ImaginedFrame]) -> Vec<FrameReport> {
        let mut guess = self.map_from_start;
        let mut out = Vec::with_capacity(frames.len());
        for frame in frames {
            let placed =
                self.map.register(&frame.features, &self.camera, guess.as_ref(), &self.config.register);
            let hole = placed.ok().and_then(|p| {
                self.map.least_likely_region(&frame.features, &self.camera, &p.map_from_camera)
            });
            if let Ok(p) = &placed {
                guess = Some(p.map_from_camera);
            }
            out.push(FrameReport { placed, points: 0, distance_m: None, hole });
        }
        out
    }

    /// Triangulates between the pictures that were placed, and measures how far off the landmarks that lies.
    fn own_points(&self, frames: &[ImaginedFrame], reports: &mut [FrameReport]) -> LandmarkMap {
        let config = MapConfig {
            landmarks_max: 4000,
            frames_max: frames.len().max(1),
            neighbours: 4,
            baseline_min_m: 0.04,
            ..self.map.config
        };
        let mut own = LandmarkMap::new(config);
        let mut kept = Vec::new();
        for (k, (frame, report)) in frames.iter().zip(reports.iter()).enumerate() {
            if let Ok(placed) = &report.placed
                && !frame.features.is_empty()
            {
                own.insert(&frame.features, &self.camera, &placed.map_from_camera);
                kept.push(k);
            }
        }
        let known: Vec<Point3<f64>> = self.map.landmarks().map(|l| l.position).collect();
        let nearest = |p: &Point3<f64>| {
            known.iter().map(|q| (q - p).norm_squared()).min_by(f64::total_cmp).map(f64::sqrt)
        };
        for (frame, k) in own.frames.iter().zip(kept) {
            let points: Vec<f64> = frame
                .landmarks
                .iter()
                .filter(|l| **l != NONE)
                .filter_map(|l| own.slots.get(*l as usize)?.as_ref())
                .filter(|l| well_known(&l.position, &l.covariance, &frame.map_from_camera))
                .filter_map(|l| nearest(&l.position))
                .collect();
            reports[k].points = points.len();
            if points.len() >= 8 {
                reports[k].distance_m = Some(points.iter().sum::<f64>() / points.len() as f64);
            }
        }
        own
    }

    fn judge(&self, reports: &[FrameReport]) -> Result<(), Inconsistent> {
        if reports.is_empty() {
            return Err(Inconsistent::NoFrames);
        }
        let missing = reports.iter().enumerate().find_map(|(k, r)| Some((k, r.placed.err()?)));
        let placed = reports.iter().filter(|r| r.placed.is_ok()).count();
        if let Some((frame, reason)) = missing
            && (placed as f64) < self.config.placed_min * reports.len() as f64
        {
            return Err(Inconsistent::NotPlaced { frame, reason });
        }
        let mut before: Option<(usize, Point3<f64>)> = None;
        for (frame, report) in reports.iter().enumerate() {
            let Ok(placed) = &report.placed else { continue };
            let at = Point3::from(placed.map_from_camera.translation.vector);
            if let Some((last, from)) = before {
                let (distance_m, wanted_m) =
                    ((at - from).norm(), self.config.jump_max_m * (frame - last) as f64);
                if distance_m > wanted_m {
                    return Err(Inconsistent::Jump { frame, distance_m, wanted_m });
                }
            }
            before = Some((frame, at));
        }
        let worst = reports
            .iter()
            .enumerate()
            .filter_map(|(k, r)| Some((k, r.distance_m?)))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((frame, distance_m)) = worst
            && distance_m > self.config.sd_max_m
        {
            return Err(Inconsistent::Distance { frame, distance_m, wanted_m: self.config.sd_max_m });
        }
        let holes = reports.iter().enumerate().filter_map(|(k, r)| Some((k, r.hole?)));
        if let Some((frame, hole)) = holes.max_by(|a, b| a.1.sigmas().total_cmp(&b.1.sigmas()))
            && hole.sigmas() > self.config.hole_sigmas
        {
            return Err(Inconsistent::Hole { frame, hole });
        }
        Ok(())
    }

    /// The goal by the box of the last picture that has one and was placed; the number of known points in it when they
    /// are too few.
    fn goal(
        &self,
        frames: &[ImaginedFrame],
        reports: &[FrameReport],
        own: &LandmarkMap,
    ) -> Result<LiftedGoal, usize> {
        let mut most = 0;
        for (frame, report) in frames.iter().zip(reports).rev() {
            let (Some(area), Ok(placed)) = (frame.area, &report.placed) else { continue };
            let mut depths = depths_in(self.map, &self.camera, &placed.map_from_camera, area);
            if depths.len() < self.config.object_points_min {
                depths.extend(depths_in(own, &self.camera, &placed.map_from_camera, area));
            }
            most = most.max(depths.len());
            if depths.len() >= self.config.object_points_min
                && let Some(goal) = self.before(area, placed, depths)
            {
                return Ok(goal);
            }
        }
        Err(most)
    }

    /// The pose before an object at the depths (metres along the optical axis) that were seen in its box.
    fn before(&self, area: [f64; 4], placed: &Registration, mut depths: Vec<f64>) -> Option<LiftedGoal> {
        depths.sort_by(f64::total_cmp);
        // Behind an object there is background, before it rarely anything: the nearer half is its own.
        let near = &depths[..depths.len().div_ceil(2)];
        let depth = near[near.len() / 2];
        let spread = (near[near.len() - 1] - near[0]) / 2.0;
        let middle = Vector2::new(0.5 * (area[0] + area[2]), 0.5 * (area[1] + area[3]));
        let ray = self.camera.ray(middle)?;
        let in_camera = Point3::new(ray.x * depth, ray.y * depth, depth);
        let object = placed.map_from_camera * in_camera;
        let aside = |size: f64, focal: f64| (0.15 * size * depth / focal).max(0.01);
        let (fx, fy) = self.camera.focal();
        let own = Matrix3::from_diagonal(&Vector3::new(
            aside(area[2] - area[0], fx).powi(2),
            aside(area[3] - area[1], fy).powi(2),
            (spread / 2.0).max(0.02).powi(2),
        ));
        // A small motion of the camera moves the object by translation + rotation x its place.
        let place = placed.covariance.fixed_view::<3, 3>(0, 0);
        let turn = placed.covariance.fixed_view::<3, 3>(3, 3);
        let both = placed.covariance.fixed_view::<3, 3>(0, 3);
        let lever = -in_camera.coords.cross_matrix();
        let camera =
            place + both * lever.transpose() + lever * both.transpose() + lever * turn * lever.transpose();
        let to_map = placed.map_from_camera.rotation.to_rotation_matrix();
        let object_covariance = to_map.matrix() * (own + camera) * to_map.matrix().transpose();
        let eye = Point3::from(placed.map_from_camera.translation.vector);
        let Standing { base, covariance } =
            stand_before(&object, &object_covariance, &eye, self.config.standoff_m)?;
        Some(LiftedGoal { object, object_covariance, base, covariance, points: depths.len() })
    }
}

/// Where the base stands before an object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Standing {
    /// x, y (metres), yaw (radians), facing the object.
    pub base: [f64; 3],
    /// Covariance in the order x, y, z, roll, pitch, yaw; what a planar pose does not have is 0.
    pub covariance: Matrix6<f64>,
}

/// The pose before an object on the line from where it is seen; z is up. `None` right above or below it.
#[must_use]
pub fn stand_before(
    object: &Point3<f64>,
    object_covariance: &Matrix3<f64>,
    eye: &Point3<f64>,
    standoff_m: f64,
) -> Option<Standing> {
    let (dx, dy) = (object.x - eye.x, object.y - eye.y);
    let distance = dx.hypot(dy);
    if distance < 1e-3 || !distance.is_finite() {
        return None;
    }
    let yaw = dy.atan2(dx);
    let base = [object.x - standoff_m * yaw.cos(), object.y - standoff_m * yaw.sin(), yaw];
    // The heading is as uncertain as the direction from the camera to the object.
    let across = Vector3::new(-dy, dx, 0.0) / distance;
    let yaw_variance = (across.transpose() * object_covariance * across)[0] / (distance * distance);
    let mut covariance = Matrix6::zeros();
    covariance.fixed_view_mut::<2, 2>(0, 0).copy_from(&object_covariance.fixed_view::<2, 2>(0, 0));
    let swing = Vector2::new(yaw.sin(), -yaw.cos()) * standoff_m;
    let turned = swing * swing.transpose() * yaw_variance;
    for i in 0..2 {
        for j in 0..2 {
            covariance[(i, j)] += turned[(i, j)];
        }
        covariance[(i, 5)] = swing[i] * yaw_variance;
        covariance[(5, i)] = swing[i] * yaw_variance;
    }
    covariance[(5, 5)] = yaw_variance;
    Some(Standing { base, covariance })
}

/// Whether a triangulated point is known to a fifth of its distance.
fn well_known(position: &Point3<f64>, covariance: &Matrix3<f64>, map_from_camera: &Isometry3<f64>) -> bool {
    let distance = (position.coords - map_from_camera.translation.vector).norm();
    covariance.trace().sqrt() < 0.05 * distance
}

/// Distances along the optical axis (metres) of the landmarks that are seen in the middle of a box.
fn depths_in(
    map: &LandmarkMap,
    camera: &Camera,
    map_from_camera: &Isometry3<f64>,
    [x0, y0, x1, y1]: [f64; 4],
) -> Vec<f64> {
    let (w, h) = (0.1 * (x1 - x0), 0.1 * (y1 - y0));
    map.landmarks()
        .filter(|l| well_known(&l.position, &l.covariance, map_from_camera))
        .filter_map(|l| {
            let (pixel, _) = l.expected(camera, map_from_camera)?;
            let inside = (x0 + w..=x1 - w).contains(&pixel.x) && (y0 + h..=y1 - h).contains(&pixel.y);
            inside.then(|| map_from_camera.inverse_transform_point(&l.position).z)
        })
        .collect()
}

/// Kept frames whose landmarks a picture should show.
const NEAREST_FRAMES: usize = 3;
/// Their cameras are at most this far away (metres), and look at most this far aside (radians).
const NEAREST_MAX: (f64, f64) = (0.8, 0.6);
/// Fewest landmarks of a region that is judged, and fewest features whose share counts.
const MISSING_MIN: usize = 10;
const STRANGE_MIN: usize = 6;
/// Regions per side; each is twice as wide and high as its step.
const REGIONS: usize = 6;

impl LandmarkMap {
    /// The region of a placed picture in which the fewest of the landmarks are found that the nearest kept frames saw, and the
    /// fewest features are those of a landmark. `None` where there is no such frame near, or too few landmarks in every
    /// region.
    #[must_use]
    pub fn least_likely_region(
        &self,
        features: &Features,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Option<Hole> {
        let regions = self.regions(features, camera, map_from_camera);
        regions.into_iter().max_by(|a, b| a.sigmas().total_cmp(&b.sigmas()))
    }

    /// All regions of a placed picture that show enough landmarks.
    #[must_use]
    pub fn regions(
        &self,
        features: &Features,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Vec<Hole> {
        let (wanted, own) = self.found_and_explained(features, camera, map_from_camera);
        // A picture that hardly shows anything again is for the registration to judge.
        let share = |of: &[(Vector2<f64>, bool)]| {
            (of.iter().filter(|s| s.1).count() as f64 / of.len().max(1) as f64).clamp(0.05, 0.9)
        };
        let shares = [share(&wanted), share(&own)];
        let (width, height) = camera.size();
        let step = (f64::from(width) / (REGIONS + 1) as f64, f64::from(height) / (REGIONS + 1) as f64);
        let region = |k: usize| {
            let (x0, y0) = ((k % REGIONS) as f64 * step.0, (k / REGIONS) as f64 * step.1);
            let area = [x0, y0, x0 + 2.0 * step.0, y0 + 2.0 * step.1];
            let inside =
                |p: &Vector2<f64>| (area[0]..area[2]).contains(&p.x) && (area[1]..area[3]).contains(&p.y);
            let count = |of: &[(Vector2<f64>, bool)]| {
                let here = of.iter().filter(|s| inside(&s.0));
                here.fold((0, 0), |(all, hits), s| (all + 1, hits + usize::from(s.1)))
            };
            let ((expected, found), (features, explained)) = (count(&wanted), count(&own));
            let sigmas = |all: usize, hits: usize, share: f64| {
                let n = all.max(1) as f64;
                (n * share - hits as f64) / (n * share * (1.0 - share)).sqrt()
            };
            let strange = if features < STRANGE_MIN { 0.0 } else { sigmas(features, explained, shares[1]) };
            (expected >= MISSING_MIN).then(|| Hole {
                area,
                expected,
                found,
                features,
                explained,
                missing_sigmas: sigmas(expected, found, shares[0]),
                strange_sigmas: strange,
            })
        };
        (0..REGIONS * REGIONS).filter_map(region).collect()
    }

    /// Landmarks of the nearest kept frames that a picture should show: where, and whether they are found there; and the
    /// picture's features: where, and whether a landmark explains them.
    fn found_and_explained(
        &self,
        features: &Features,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> (Vec<(Vector2<f64>, bool)>, Vec<(Vector2<f64>, bool)>) {
        let mut near: Vec<(f64, usize)> = self
            .frames
            .iter()
            .enumerate()
            .filter_map(|(k, f)| {
                let apart = map_from_camera.inverse() * f.map_from_camera;
                let (shift, turn) = (apart.translation.vector.norm(), apart.rotation.angle());
                (shift < NEAREST_MAX.0 && turn < NEAREST_MAX.1).then_some((shift + turn, k))
            })
            .collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut is_wanted = vec![false; self.slots.len()];
        for (_, k) in near.iter().take(NEAREST_FRAMES) {
            for slot in self.frames[*k].landmarks.iter().filter(|l| **l != NONE) {
                is_wanted[*slot as usize] = true;
            }
        }
        let grid = Grid::new(&features.keypoints, camera.size());
        let most = (self.config.distance_seen_max * self.config.distance_seen_max) as u32;
        let radius = 2.0 * self.config.residual_max_px;
        let mut wanted = Vec::new();
        let mut explained = vec![false; features.len()];
        for (slot, landmark) in self.slots.iter().enumerate() {
            let Some(landmark) = landmark else { continue };
            let Some((pixel, _)) = landmark.expected(camera, map_from_camera) else { continue };
            let mut found = false;
            grid.within(pixel, radius, |k| {
                if self.distance(slot, landmark, &features.descriptors[k as usize]) < most {
                    found = true;
                    explained[k as usize] = true;
                }
            });
            if is_wanted[slot] {
                wanted.push((pixel, found));
            }
        }
        let place = |k: &crate::features::Keypoint| Vector2::new(f64::from(k.x), f64::from(k.y));
        (wanted, features.keypoints.iter().map(place).zip(explained).collect())
    }
}
