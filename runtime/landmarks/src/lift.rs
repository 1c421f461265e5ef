//! From imagined pictures to a goal pose, by geometry alone.
//!
//! Every picture is placed by the landmarks ([`LandmarkMap::register`]); together they are the path of the imagined
//! drive. Three things tell an invented drive from a remembered place:
//! * pictures that cannot be placed, or whose places jump;
//! * **SD** (Video4Spatial, equation 3), here without a reference cloud: points triangulated between the imagined
//!   pictures, and their distance to the nearest landmark; one-sided, the maximum over pictures. The paper's cloud is dense and
//!   takes the mean; here it is the median, since a mean hangs on the few points that are matched wrongly;
//! * **holes**: regions of a picture that do not look as the nearest kept frames saw them, although the rest of it does:
//!   landmarks of theirs are missing, and features are there that they do not have. Something was painted in.
//!
//! The object is where landmarks are found inside its box in the last pictures, and the base stands before it. A landmark is
//! found where what the picture shows looks like it; a thing that was painted in has none.

use nalgebra::{Isometry3, Matrix3, Matrix6, Point3, Vector2, Vector3};

use crate::camera::Camera;
use crate::features::{Descriptor, Extractor, Gray, Keypoint, Picture};
use crate::map::{DESCRIPTORS_MAX, KeptFrame, Landmark, LandmarkMap, MapConfig, NONE};
use crate::register::{RegisterConfig, Registration, Unregistered};

/// One imagined picture.
#[derive(Clone, Debug, PartialEq)]
pub struct ImaginedFrame {
    /// What it shows.
    pub picture: Gray,
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
    /// Largest distance between the places of neighbouring pictures (metres): those that are looked at are a latent apart.
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
            jump_max_m: 1.5,
            sd_max_m: 0.2,
            hole_sigmas: 7.0,
            object_points_min: 3,
            standoff_m: 1.2,
        }
    }
}

/// A region of a picture that does not show what kept frames saw there.
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
    /// Of them, known to a kept frame.
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
    /// Their median distance to the nearest landmark (metres).
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
        /// Median distance of its points.
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
    #[error("the object's box holds {points} known points; {wanted} at one depth are needed")]
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
    /// Finds the pictures' features.
    pub extractor: &'a mut Extractor,
    /// The camera of the imagined pictures: that of the frames that were given to the model, at its size.
    pub camera: Camera,
    /// Where the drive begins, if it is known.
    pub map_from_start: Option<Isometry3<f64>>,
    /// Settings.
    pub config: LiftConfig,
}

impl Lift for GeometricLift<'_> {
    fn lift(&mut self, frames: &[ImaginedFrame]) -> PictureLift {
        let scanned: Vec<Picture> = frames.iter().map(|f| self.extractor.scan(&f.picture)).collect();
        let mut reports = self.place(&scanned);
        let own = self.own_points(&scanned, &mut reports);
        let goal = self.goal(frames, &scanned, &reports, &own);
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
    fn place(&mut self, scanned: &[Picture]) -> Vec<FrameReport> {
        let mut guess = self.map_from_start;
        let mut out = Vec::with_capacity(scanned.len());
        for picture in scanned {
            let placed =
                self.map.register(&picture.features, &self.camera, guess.as_ref(), &self.config.register);
            let hole = placed.ok().and_then(|p| {
                let posed =
                    PosedPicture { picture, camera: &self.camera, map_from_camera: &p.map_from_camera };
                self.map.least_likely_region(&posed)
            });
            if let Ok(p) = &placed {
                guess = Some(p.map_from_camera);
            }
            out.push(FrameReport { placed, points: 0, distance_m: None, hole });
        }
        out
    }

    /// Triangulates between the pictures that were placed, and measures how far off the landmarks that lies.
    fn own_points(&self, scanned: &[Picture], reports: &mut [FrameReport]) -> LandmarkMap {
        let config = MapConfig {
            landmarks_max: 4000,
            frames_max: scanned.len().max(1),
            neighbours: 4,
            baseline_min_m: 0.04,
            ..self.map.config
        };
        let mut own = LandmarkMap::new(config);
        let mut kept = Vec::new();
        for (k, (picture, report)) in scanned.iter().zip(reports.iter()).enumerate() {
            if let Ok(placed) = &report.placed
                && !picture.features.is_empty()
            {
                own.insert(&picture.features, &self.camera, &placed.map_from_camera);
                kept.push(k);
            }
        }
        let known: Vec<Point3<f64>> = self.map.landmarks().map(|l| l.position).collect();
        let nearest = |p: &Point3<f64>| {
            known.iter().map(|q| (q - p).norm_squared()).min_by(f64::total_cmp).map(f64::sqrt)
        };
        for (frame, k) in own.frames.iter().zip(kept) {
            let in_picture = |l: &Landmark| Some(l.expected(&self.camera, &frame.map_from_camera)?.0);
            let seen: Vec<Vector2<f64>> = self.map.landmarks().filter_map(in_picture).collect();
            let radius = REFERENCE_PX * self.map.config.feature_sigma_px;
            // Where no landmark is seen beside it there is nothing to compare a point with.
            let has_reference = |l: &&Landmark| {
                in_picture(l).is_some_and(|at| seen.iter().any(|s| (s - at).norm_squared() < radius * radius))
            };
            let mut points: Vec<f64> = frame
                .landmarks
                .iter()
                .filter(|l| **l != NONE)
                .filter_map(|l| own.slots.get(*l as usize)?.as_ref())
                .filter(|l| well_known(&l.position, &l.covariance, &frame.map_from_camera))
                .filter(has_reference)
                .filter_map(|l| nearest(&l.position))
                .collect();
            reports[k].points = points.len();
            if points.len() >= 8 {
                reports[k].distance_m = Some(mindseye_base::stats::median(&mut points));
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
        scanned: &[Picture],
        reports: &[FrameReport],
        own: &LandmarkMap,
    ) -> Result<LiftedGoal, usize> {
        let mut most = 0;
        for ((frame, picture), report) in frames.iter().zip(scanned).zip(reports).rev() {
            let (Some(area), Ok(placed)) = (frame.area, &report.placed) else { continue };
            let map_from_camera = &placed.map_from_camera;
            let posed = PosedPicture { picture, camera: &self.camera, map_from_camera };
            let mut depths = self.map.depths_in(&posed, area);
            if depths.len() < self.config.object_points_min {
                depths.extend(own.depths_in(&posed, area));
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

    /// The pose before an object whose front is at some of the depths (metres along the optical axis) that were seen in its box.
    fn before(&self, area: [f64; 4], placed: &Registration, depths: Vec<f64>) -> Option<LiftedGoal> {
        let front = front(depths, self.config.object_points_min)?;
        let depth = front[front.len() / 2];
        let spread = front[3 * front.len() / 4] - front[front.len() / 4];
        let middle = Vector2::new(0.5 * (area[0] + area[2]), 0.5 * (area[1] + area[3]));
        let ray = self.camera.ray(middle)?;
        let in_camera = Point3::new(ray.x * depth, ray.y * depth, depth);
        let object = placed.map_from_camera * in_camera;
        let aside = |size: f64, focal: f64| (0.15 * size * depth / focal).max(0.01);
        let (fx, fy) = self.camera.focal();
        let own = Matrix3::from_diagonal(&Vector3::new(
            aside(area[2] - area[0], fx).powi(2),
            aside(area[3] - area[1], fy).powi(2),
            spread.max(0.02).powi(2),
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
        Some(LiftedGoal { object, object_covariance, base, covariance, points: front.len() })
    }
}

/// Behind an object there is background, before it rarely anything: the first of the depths that lie close together, in order,
/// and at least so many. `None` where they are scattered.
fn front(mut depths: Vec<f64>, points_min: usize) -> Option<Vec<f64>> {
    depths.sort_by(f64::total_cmp);
    let together = depths.chunk_by(|a, b| b - a < 0.1 * a).find(|c| c.len() >= points_min)?;
    Some(together.to_vec())
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

/// Points of an imagined picture are compared with the landmarks where one is seen so many times the standard deviation of
/// a feature's place beside them (pixels).
const REFERENCE_PX: f64 = 25.0;
/// Kept frames whose landmarks a picture should show.
const NEAREST_FRAMES: usize = 4;
/// Their cameras are at most this far away (metres), and look at most this far aside (radians).
const NEAREST_MAX: (f64, f64) = (1.5, 1.3);
/// Fewest frames that saw a landmark that is looked for.
const VIEWS_MIN: u32 = 3;
/// Fewest landmarks of a region that is judged, and fewest features whose share counts.
const MISSING_MIN: usize = 10;
const STRANGE_MIN: usize = 6;
/// Regions per side; each is twice as wide and high as its step.
const REGIONS: usize = 6;

/// A landmark hides another that is seen so many times the standard deviation of a feature's place beside it (pixels), where
/// its own depth is less than this share of the other's.
const HIDES_PX: f64 = 25.0;
const BEFORE: f64 = 0.85;

/// A picture with the pose of its camera.
#[derive(Clone, Copy, Debug)]
pub struct PosedPicture<'a> {
    /// The picture.
    pub picture: &'a Picture,
    /// Its camera.
    pub camera: &'a Camera,
    /// Where it was.
    pub map_from_camera: &'a Isometry3<f64>,
}

/// Something that a picture should show, or shows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Judged {
    /// Where (pixels).
    pixel: Vector2<f64>,
    /// Distance along the camera's axis (metres); of a feature, about that.
    depth: f64,
    /// How different it looks from what is known of it, in descriptor space.
    distance: f64,
}

impl LandmarkMap {
    /// The region of a placed picture that shows least of what the nearest kept frames saw. `None` where there is no such
    /// frame near, or too few landmarks in every region.
    #[must_use]
    pub fn least_likely_region(&self, posed: &PosedPicture<'_>) -> Option<Hole> {
        let wanted = self.wanted(posed);
        let own = self.recognised_features(posed, &wanted);
        let regions = regions(&wanted, &own, posed.camera.size(), self.config.distance_seen_max);
        regions.into_iter().max_by(|a, b| a.sigmas().total_cmp(&b.sigmas()))
    }

    /// Kept frames near a pose that look the same way, nearest first.
    fn near(&self, map_from_camera: &Isometry3<f64>) -> Vec<&KeptFrame> {
        let mut near: Vec<(f64, &KeptFrame)> = self
            .frames
            .iter()
            .filter_map(|f| {
                let apart = map_from_camera.inverse() * f.map_from_camera;
                let (shift, turn) = (apart.translation.vector.norm(), apart.rotation.angle());
                (shift < NEAREST_MAX.0 && turn < NEAREST_MAX.1).then_some((shift + 0.5 * turn, f))
            })
            .collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0));
        near.into_iter().take(NEAREST_FRAMES).map(|(_, f)| f).collect()
    }

    /// The picture's features that a near kept frame should show, where the depth about them is that of the nearest of `known` that
    /// is found;
    /// and how different the most similar feature is that lies on their epipolar line there.
    fn recognised_features(&self, posed: &PosedPicture<'_>, known: &[Judged]) -> Vec<Judged> {
        let features = &posed.picture.features;
        let views: Vec<_> = self
            .near(posed.map_from_camera)
            .into_iter()
            .map(|f| (f, f.map_from_camera.inverse() * posed.map_from_camera))
            .collect();
        let judged = |(keypoint, descriptor): (&Keypoint, &Descriptor)| {
            let pixel = Vector2::new(f64::from(keypoint.x), f64::from(keypoint.y));
            let ray = posed.camera.ray(pixel)?;
            let nearest = known.iter().filter(|l| self.is_seen(l)).min_by(|a, b| {
                (a.pixel - pixel).norm_squared().total_cmp(&(b.pixel - pixel).norm_squared())
            })?;
            let point = Point3::new(ray.x, ray.y, 1.0) * nearest.depth;
            let mut distance = None;
            for (frame, other_from_own) in &views {
                if frame.sees_as(&point, other_from_own) {
                    let d = frame.most_similar(
                        &[point * 0.6, point * 1.7].map(|p| other_from_own * p),
                        keypoint.scale,
                        descriptor,
                        2.0 * self.config.residual_max_px,
                    );
                    distance = Some(distance.map_or(d, |n: u32| n.min(d)));
                }
            }
            Some(Judged { pixel, depth: nearest.depth, distance: f64::from(distance?).sqrt() })
        };
        features.keypoints.iter().zip(&features.descriptors).filter_map(judged).collect()
    }

    /// Landmarks that a picture should show as near kept frames saw them: where, and whether they are found there.
    fn wanted(&self, seen: &PosedPicture<'_>) -> Vec<Judged> {
        let mut slots = Vec::new();
        for frame in self.near(seen.map_from_camera) {
            let other_from_own = frame.map_from_camera.inverse() * seen.map_from_camera;
            slots.extend(frame.landmarks.iter().copied().filter(|slot| {
                let landmark = self.slots.get(*slot as usize).and_then(Option::as_ref);
                landmark.is_some_and(|l| {
                    let point = seen.map_from_camera.inverse_transform_point(&l.position);
                    // Two views can agree by chance on a place where nothing is.
                    l.views >= VIEWS_MIN
                        && well_known(&l.position, &l.covariance, seen.map_from_camera)
                        && frame.sees_as(&point, &other_from_own)
                })
            }));
        }
        slots.sort_unstable();
        slots.dedup();
        let all: Vec<Judged> = slots.into_iter().filter_map(|slot| self.looked_for(slot, seen)).collect();
        // What a known thing hides is not missing.
        let hidden = |far: &Judged| {
            all.iter().any(|near| {
                self.is_seen(near)
                    && near.depth < BEFORE * far.depth
                    && (near.pixel - far.pixel).norm() < HIDES_PX * self.config.feature_sigma_px
            })
        };
        all.iter().filter(|l| self.is_seen(l) || !hidden(l)).copied().collect()
    }

    /// Whether what is there looks like what is known of it.
    fn is_seen(&self, judged: &Judged) -> bool {
        judged.distance < self.config.distance_seen_max
    }

    /// Distances along the optical axis (metres) of the landmarks that are found in the middle of a box.
    fn depths_in(&self, seen: &PosedPicture<'_>, [x0, y0, x1, y1]: [f64; 4]) -> Vec<f64> {
        let (w, h) = (0.1 * (x1 - x0), 0.1 * (y1 - y0));
        let inside = |p: &Vector2<f64>| (x0 + w..=x1 - w).contains(&p.x) && (y0 + h..=y1 - h).contains(&p.y);
        let known = |slot: &u32| {
            let landmark = self.slots[*slot as usize].as_ref();
            landmark.is_some_and(|l| {
                well_known(&l.position, &l.covariance, seen.map_from_camera)
                    && l.expected(seen.camera, seen.map_from_camera).is_some_and(|(p, _)| inside(&p))
            })
        };
        (0..self.slots.len() as u32)
            .filter(known)
            .filter_map(|slot| self.looked_for(slot, seen))
            .filter(|l| self.is_seen(l))
            .map(|l| l.depth)
            .collect()
    }

    /// Looks for a landmark where a picture should show it: what is there has to look like it. `None` where the picture does not
    /// show it, or not at a scale at which it can be told.
    fn looked_for(&self, slot: u32, seen: &PosedPicture<'_>) -> Option<Judged> {
        let landmark = self.slots.get(slot as usize)?.as_ref()?;
        let (pixel, _) = landmark.expected(seen.camera, seen.map_from_camera)?;
        let mut nearest = None;
        for k in 0..landmark.descriptors {
            let (at, scale, angle) = landmark.feature_in(k, seen.camera, seen.map_from_camera)?;
            let Some(there) = seen.picture.describe_at(at, scale, angle) else { continue };
            let entry = slot * DESCRIPTORS_MAX as u32 + k as u32;
            let d = self.index.descriptor(entry).distance(&there);
            nearest = Some(nearest.map_or(d, |n: u32| n.min(d)));
        }
        let depth = seen.map_from_camera.inverse_transform_point(&landmark.position).z;
        Some(Judged { pixel, depth, distance: f64::from(nearest?).sqrt() })
    }
}

/// A thing looks alike from directions that differ at most by this (radians), and from distances whose ratio is at most
/// this.
const ALIKE: (f64, f64) = (0.1, 1.25);

impl KeptFrame {
    /// Whether the frame saw a point, which is in another camera's axes, almost as that camera sees it.
    fn sees_as(&self, point: &Point3<f64>, own_from_other: &Isometry3<f64>) -> bool {
        let here = own_from_other * point;
        let turned = own_from_other.rotation * point.coords;
        let ratio = here.coords.norm() / point.coords.norm();
        turned.angle(&here.coords) < ALIKE.0
            && (1.0 / ALIKE.1..ALIKE.1).contains(&ratio)
            && self.camera.project(&here).is_some()
    }

    /// Squared distance of the most similar feature of about a scale near the line between two points, which are in the
    /// camera's axes.
    fn most_similar(
        &self,
        ends: &[Point3<f64>; 2],
        scale: f32,
        descriptor: &Descriptor,
        radius_px: f64,
    ) -> u32 {
        let [a, b] = ends.map(|p| p.coords.xy() / p.z);
        let line = b - a;
        let radius = radius_px / self.camera.focal_mean();
        let mut nearest = u32::MAX;
        for (k, at) in self.rays.iter().enumerate() {
            let Some(at) = at else { continue };
            let off = at - a;
            let t = (off.dot(&line) / line.norm_squared().max(1e-12)).clamp(0.0, 1.0);
            let of_scale = (0.4..2.5).contains(&(self.keypoints[k].scale / scale));
            if of_scale && (off - line * t).norm_squared() < radius * radius {
                nearest = nearest.min(self.descriptors[k].distance(descriptor));
            }
        }
        nearest
    }
}

/// The regions of a picture that should show enough landmarks.
fn regions(wanted: &[Judged], own: &[Judged], size: (u32, u32), distance_max: f64) -> Vec<Hole> {
    let hit = |s: &Judged| s.distance < distance_max;
    // A picture that hardly shows anything again is for the registration to judge.
    let share = |of: &[Judged]| {
        (of.iter().filter(|s| hit(s)).count() as f64 / of.len().max(1) as f64).clamp(0.05, 0.9)
    };
    let shares = [share(wanted), share(own)];
    let step = (f64::from(size.0) / (REGIONS + 1) as f64, f64::from(size.1) / (REGIONS + 1) as f64);
    let region = |k: usize| {
        let (x0, y0) = ((k % REGIONS) as f64 * step.0, (k / REGIONS) as f64 * step.1);
        let area = [x0, y0, x0 + 2.0 * step.0, y0 + 2.0 * step.1];
        let inside =
            |p: &Vector2<f64>| (area[0]..area[2]).contains(&p.x) && (area[1]..area[3]).contains(&p.y);
        let count = |of: &[Judged]| {
            let here = of.iter().filter(|s| inside(&s.pixel));
            here.fold((0, 0), |(all, hits), s| (all + 1, hits + usize::from(hit(s))))
        };
        let ((expected, found), (features, explained)) = (count(wanted), count(own));
        let sigmas = |all: usize, hits: usize, share: f64| {
            let n = all.max(1) as f64;
            (n * share - hits as f64) / (n * share * (1.0 - share)).sqrt()
        };
        let judged = |all, hits, share, min| if all < min { 0.0 } else { sigmas(all, hits, share) };
        (expected >= MISSING_MIN || features >= MISSING_MIN).then(|| Hole {
            area,
            expected,
            found,
            features,
            explained,
            missing_sigmas: judged(expected, found, shares[0], MISSING_MIN),
            strange_sigmas: judged(features, explained, shares[1], STRANGE_MIN),
        })
    };
    (0..REGIONS * REGIONS).filter_map(region).collect()
}
