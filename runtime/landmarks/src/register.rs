//! Where a camera was, from one picture and the landmarks.

use std::collections::BTreeMap;

use nalgebra::{Isometry3, Matrix3, Matrix3x6, Matrix6, Translation3, UnitQuaternion, Vector2, Vector3};

use crate::camera::Camera;
use crate::features::Features;
use crate::grid::Grid;
use crate::map::{DESCRIPTORS_MAX, Landmark, LandmarkMap, NONE, is_of_scale};
use crate::pnp::{RansacConfig, Sighting, inliers, moved_by_points, ransac, refine};
use crate::triangulate::moved_by_sights;

/// Settings of [`LandmarkMap::register`]. Pixels are those of the picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RegisterConfig {
    /// Largest residual of an inlier (pixels).
    pub inlier_px: f64,
    /// Standard deviation of a feature's place (pixels).
    pub feature_sigma_px: f64,
    /// Samples of three at most.
    pub samples_max: usize,
    /// A match is at most this share as far as the second best, in descriptor space.
    pub ratio_max: f64,
    /// Largest distance of matching descriptors; they are 512 long.
    pub distance_max: f64,
    /// The same of a feature and the landmark that is expected where it is. What looks alike by chance is further apart.
    pub distance_expected_max: f64,
    /// How far from where they are expected landmarks are looked for, once a pose is guessed (pixels).
    pub search_px: f64,
    /// Fewest inliers.
    pub inliers_min: usize,
    /// Smallest share of the landmarks that seem to be within four times `inlier_px` of where they are expected that are
    /// within `inlier_px`: by chance it would be a sixteenth.
    pub share_min: f64,
    /// Least standard deviation of what is wrong with all landmarks alike (metres), and cannot be seen in residuals: drift of
    /// the odometry between the frames that made them and now. What the map has measured counts where it is more
    /// ([`LandmarkMap::pose_sigma`]).
    pub drift_sigma_m: f64,
    /// The same of directions (radians).
    pub drift_sigma_rad: f64,
    /// Largest standard deviation of the place along its worst axis (metres).
    pub position_sigma_max_m: f64,
    /// Seed of the samples.
    pub seed: u64,
}

impl Default for RegisterConfig {
    fn default() -> Self {
        Self {
            inlier_px: 3.0,
            feature_sigma_px: 1.0,
            samples_max: 600,
            ratio_max: 0.85,
            distance_max: 330.0,
            distance_expected_max: 250.0,
            search_px: 6.0,
            inliers_min: 15,
            share_min: 0.2,
            drift_sigma_m: 0.01,
            drift_sigma_rad: 0.005,
            position_sigma_max_m: 0.3,
            seed: 1,
        }
    }
}

impl RegisterConfig {
    /// The defaults, in pixels of pictures that are this wide.
    #[must_use]
    pub fn for_width(width: u32) -> Self {
        let factor = (f64::from(width) / f64::from(crate::map::WIDTH)).max(0.75);
        let own = Self::default();
        Self {
            inlier_px: own.inlier_px * factor,
            feature_sigma_px: own.feature_sigma_px * factor,
            search_px: own.search_px * factor,
            ..own
        }
    }
}

/// A picture that was placed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Registration {
    /// Where the camera was.
    pub map_from_camera: Isometry3<f64>,
    /// Covariance of a small motion of the camera: translation (m²) and rotation (rad²), along and about its own axes.
    pub covariance: Matrix6<f64>,
    /// Matches by appearance alone; 0 when the pose was found from a guess.
    pub matches: usize,
    /// Share of the landmarks found near where they are expected that are exactly there ([`RegisterConfig::share_min`]).
    pub share: f64,
    /// Landmarks found where they should be.
    pub inliers: usize,
    /// Root mean square of the inliers' residuals (pixels).
    pub rms_px: f64,
    /// What the focal length should be multiplied by to fit the inliers best; near 1 for a calibrated camera. `None` where
    /// they do not say, for example all on a wall straight ahead.
    pub focal_factor: Option<f64>,
}

/// Why a picture was not placed.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unregistered {
    /// Nothing to recognise in the picture.
    #[error("the picture has {features} features; it is blurred, dark or without texture")]
    NoFeatures {
        /// Features found.
        features: usize,
    },
    /// There is nothing to compare with.
    #[error("there are {landmarks} landmarks; the camera has to move sideways before there are more")]
    NoLandmarks {
        /// Landmarks in the map.
        landmarks: usize,
    },
    /// It looks like nothing in the map.
    #[error("{matches} features look like landmarks; {wanted} are needed")]
    FewMatches {
        /// Features that look like a landmark.
        matches: usize,
        /// How many are needed.
        wanted: usize,
    },
    /// What looks alike does not fit together.
    #[error("{inliers} of {matches} matches fit one pose; {wanted} are needed")]
    FewInliers {
        /// Matches that fit.
        inliers: usize,
        /// Matches in all.
        matches: usize,
        /// How many are needed.
        wanted: usize,
    },
    /// As many landmarks seem to be near where they are expected as are there: by chance.
    #[error(
        "{inliers} of {near} landmarks that seem to be near where they are expected are there: it may be chance"
    )]
    ByChance {
        /// Landmarks that are where they are expected.
        inliers: usize,
        /// Landmarks that seem to be near.
        near: usize,
    },
    /// The same landmarks are where they should be from another side too: they lie almost in one plane, far away.
    #[error(
        "{other} landmarks fit a pose that is turned by {turn_deg:.0} degrees against the one that {inliers} fit: too few lie \
         out of one plane"
    )]
    TwoPoses {
        /// Landmarks that fit the better pose.
        inliers: usize,
        /// Landmarks that fit the other one.
        other: usize,
        /// The angle between both (degrees).
        turn_deg: f64,
    },
    /// The pose is not determined well enough.
    #[error("the place is known within {sigma_m:.2} m only; {wanted_m:.2} m is needed")]
    Uncertain {
        /// Standard deviation along the worst axis.
        sigma_m: f64,
        /// Largest one that is believed.
        wanted_m: f64,
    },
}

impl LandmarkMap {
    /// Places a picture. With a guess, landmarks are first looked for where it says; otherwise, or when that fails,
    /// features are recognised by what they look like.
    ///
    /// # Errors
    /// [`Unregistered`] says what is missing; nothing is placed on weak evidence.
    pub fn register(
        &mut self,
        features: &Features,
        camera: &Camera,
        guess: Option<&Isometry3<f64>>,
        config: &RegisterConfig,
    ) -> Result<Registration, Unregistered> {
        if features.len() < config.inliers_min {
            return Err(Unregistered::NoFeatures { features: features.len() });
        }
        if self.len() < config.inliers_min {
            return Err(Unregistered::NoLandmarks { landmarks: self.len() });
        }
        let view = View::new(features, camera);
        if let Some(guess) = guess {
            let camera_from_map = guess.inverse();
            if let Some(fit) = self.guided(&view, &camera_from_map, 3.0 * config.search_px, config) {
                let found = self.finish(&view, fit, 0, config);
                if found.is_ok() {
                    return found;
                }
            }
        }
        let alike = self.alike(&view, config);
        let matches = self.unlike_others(&view, &alike, config, |_| true);
        let found = self.sampled(&view, &matches, config);
        if found.is_ok_and(|f| f.inliers >= SURE * config.inliers_min) {
            return found;
        }
        // Among all landmarks few are like no other: once more among those that one part of the place shows.
        let mut best = found;
        for frame in self.voted(&matches) {
            let beside = self.shown_beside(frame);
            let local = self.unlike_others(&view, &alike, config, |slot| beside[slot as usize]);
            let again = self.sampled(&view, &local, config);
            let more = |a: &Registration| best.as_ref().is_ok_and(|b| b.inliers >= a.inliers);
            if again.is_ok_and(|a| !more(&a)) {
                best = again;
            }
        }
        best
    }

    /// Squared distance (m²) and angle (rad²) of a pose from where the landmarks put its picture, less what that is uncertain by;
    /// `None` where the picture shows too few of them.
    pub(crate) fn pose_error(
        &self,
        features: &Features,
        camera: &Camera,
        map_from_camera: &Isometry3<f64>,
    ) -> Option<[f64; 2]> {
        let config = RegisterConfig::for_width(camera.size().0);
        if self.len() < config.inliers_min {
            return None;
        }
        let view = View::new(features, camera);
        let fit = self.guided(&view, &map_from_camera.inverse(), 3.0 * config.search_px, &config)?;
        if fit.sightings.len() < SURE * config.inliers_min {
            return None;
        }
        let off = fit.camera_from_map * map_from_camera;
        let known = |first: usize| fit.covariance.fixed_view::<3, 3>(first, first).trace();
        Some([
            (off.translation.vector.norm_squared() - known(0)).max(0.0),
            (off.rotation.angle().powi(2) - known(3)).max(0.0),
        ])
    }

    /// The pose by random samples of matches, refined on all landmarks that should be seen.
    fn sampled(
        &self,
        view: &View<'_>,
        matches: &[Match],
        config: &RegisterConfig,
    ) -> Result<Registration, Unregistered> {
        if matches.len() < config.inliers_min {
            return Err(Unregistered::FewMatches { matches: matches.len(), wanted: config.inliers_min });
        }
        let sightings: Vec<Sighting> = matches.iter().map(|m| m.sighting).collect();
        let focal = view.camera.focal_mean();
        let few = |inliers| Unregistered::FewInliers {
            inliers,
            matches: matches.len(),
            wanted: config.inliers_min,
        };
        let sampling = RansacConfig {
            threshold: config.inlier_px / focal,
            samples_max: config.samples_max,
            confidence: 0.999,
            seed: config.seed,
        };
        let (start, agreeing) = ransac(&sightings, &sampling).ok_or_else(|| few(0))?;
        let sigma = config.feature_sigma_px / focal;
        let start = refine(&sightings, &agreeing, &start, sigma, 20)
            .ok_or_else(|| few(agreeing.len()))?
            .camera_from_map;
        let fit = self.guided(view, &start, config.search_px, config).ok_or_else(|| few(agreeing.len()))?;
        let fit = self.the_better_side(view, fit, config)?;
        self.finish(view, fit, matches.len(), config)
    }

    /// Points near one plane that are seen from afar look almost the same from two sides, mirror images about the line of sight
    /// (Schweighofer and Pinz 2006): the pose of the two that more landmarks fit, or neither where nearly as many fit the other.
    fn the_better_side(
        &self,
        view: &View<'_>,
        fit: Fit,
        config: &RegisterConfig,
    ) -> Result<Fit, Unregistered> {
        let turned = turned_over(&fit.sightings, &fit.camera_from_map);
        let Some(other) = turned.and_then(|t| self.guided(view, &t, config.search_px, config)) else {
            return Ok(fit);
        };
        let turn_deg = fit.camera_from_map.rotation.angle_to(&other.camera_from_map.rotation).to_degrees();
        if turn_deg < SIDES_APART_DEG {
            return Ok(fit);
        }
        let (better, worse) =
            if other.sightings.len() > fit.sightings.len() { (other, fit) } else { (fit, other) };
        let (inliers, other) = (better.sightings.len(), worse.sightings.len());
        if other as f64 > OTHER_SIDE_MAX * inliers as f64 {
            return Err(Unregistered::TwoPoses { inliers, other, turn_deg });
        }
        Ok(better)
    }

    /// The kept frames that most matches point to, best first: at most [`VOTED`], no two of one part of the place.
    fn voted(&self, matches: &[Match]) -> Vec<usize> {
        let mut votes = vec![0usize; self.frames.len()];
        let first = self.frames.front().map_or(0, |f| f.id);
        for m in matches {
            let Some(landmark) = self.slots.get(m.slot as usize).and_then(Option::as_ref) else { continue };
            for (id, _) in &landmark.sights {
                if let Some(vote) = id.checked_sub(first).and_then(|k| votes.get_mut(k as usize)) {
                    *vote += 1;
                }
            }
        }
        let mut order: Vec<usize> = (0..votes.len()).filter(|k| votes[*k] >= 4).collect();
        order.sort_by_key(|k| std::cmp::Reverse(votes[*k]));
        let mut out: Vec<usize> = Vec::new();
        for k in order {
            if out.len() < VOTED && !out.iter().any(|o| self.is_beside(*o, k)) {
                out.push(k);
            }
        }
        out
    }

    /// Whether two kept frames show about the same.
    fn is_beside(&self, a: usize, b: usize) -> bool {
        let apart = self.frames[a].map_from_camera.inverse() * self.frames[b].map_from_camera;
        apart.translation.vector.norm() < BESIDE.0 && apart.rotation.angle() < BESIDE.1
    }

    /// For each landmark, whether a kept frame or those beside it show it.
    fn shown_beside(&self, frame: usize) -> Vec<bool> {
        let mut shown = vec![false; self.slots.len()];
        for k in (0..self.frames.len()).filter(|k| self.is_beside(frame, *k)) {
            for slot in self.frames[k].landmarks.iter().filter(|slot| **slot != NONE) {
                shown[*slot as usize] = true;
            }
        }
        shown
    }

    /// For each of the strongest features the landmarks that it may be, or be mistaken for, with their squared distances.
    fn alike(&mut self, view: &View<'_>, config: &RegisterConfig) -> Vec<Vec<(u32, u32)>> {
        // What is further away is no match, and makes none doubtful.
        let most = (config.distance_max / config.ratio_max).powi(2) as u32;
        let of_feature = |descriptor| {
            let mut out = Vec::new();
            self.index.near(descriptor, |entry, d| {
                if d < most {
                    out.push((entry / DESCRIPTORS_MAX as u32, d));
                }
            });
            out
        };
        view.features.descriptors.iter().take(RECOGNISED_MAX).map(of_feature).collect()
    }

    /// Features whose nearest landmark, of those that are `wanted`, is much nearer than any that lies elsewhere.
    fn unlike_others(
        &self,
        view: &View<'_>,
        alike: &[Vec<(u32, u32)>],
        config: &RegisterConfig,
        wanted: impl Fn(u32) -> bool,
    ) -> Vec<Match> {
        let most = (config.distance_max * config.distance_max) as u32;
        let ratio = config.ratio_max * config.ratio_max;
        let slots = &self.slots;
        let mut out = Vec::new();
        for (ray, alike) in view.rays.iter().zip(alike) {
            let Some(ray) = ray else { continue };
            let (mut best, mut second) = ((NONE, u32::MAX), u32::MAX);
            for (slot, d) in alike.iter().copied().filter(|(slot, _)| wanted(*slot)) {
                if d < best.1 {
                    // Two landmarks at one place are one thing seen twice.
                    if best.0 != NONE && !same_place(slots, best.0, slot) {
                        second = best.1;
                    }
                    best = (slot, d);
                } else if d < second && !same_place(slots, best.0, slot) {
                    second = d;
                }
            }
            if best.1 < most
                && f64::from(best.1) < ratio * f64::from(second)
                && let Some(landmark) = &slots[best.0 as usize]
            {
                out.push(Match { slot: best.0, sighting: landmark.sighting(best.0, *ray) });
            }
        }
        out
    }

    /// Looks for landmarks where a pose says that they are, and refines it; twice, nearer the second time.
    fn guided(
        &self,
        view: &View<'_>,
        camera_from_map: &Isometry3<f64>,
        radius_px: f64,
        config: &RegisterConfig,
    ) -> Option<Fit> {
        let focal = view.camera.focal_mean();
        let sigma = config.feature_sigma_px / focal;
        let mut pose = *camera_from_map;
        let mut fit = None;
        for radius in [radius_px, config.search_px, config.search_px] {
            let sightings = self.expected(view, &pose, radius, config);
            // From a rough guess, what fits it best comes first.
            let within = (radius / focal).max(config.inlier_px / focal);
            let first = inliers(&sightings, &pose, within);
            let rough = refine(&sightings, &first, &pose, sigma, 15)?;
            let chosen = inliers(&sightings, &rough.camera_from_map, config.inlier_px / focal);
            let refined = refine(&sightings, &chosen, &rough.camera_from_map, sigma, 15)?;
            pose = refined.camera_from_map;
            let chosen = inliers(&sightings, &pose, config.inlier_px / focal);
            fit = Some(Fit {
                camera_from_map: pose,
                covariance: refined.covariance,
                rms: refined.rms,
                sightings: chosen.iter().map(|k| sightings[*k]).collect(),
            });
        }
        fit.filter(|f| f.sightings.len() >= 4)
    }

    /// Features near where landmarks should be, and like them: at most one feature each.
    fn expected(
        &self,
        view: &View<'_>,
        camera_from_map: &Isometry3<f64>,
        radius_px: f64,
        config: &RegisterConfig,
    ) -> Vec<Sighting> {
        let most = (config.distance_expected_max * config.distance_expected_max) as u32;
        let map_from_camera = camera_from_map.inverse();
        let mut best: Vec<(u32, u32)> = vec![(NONE, most); view.features.len()];
        for (slot, landmark) in self.slots.iter().enumerate() {
            let Some(landmark) = landmark else { continue };
            let Some((pixel, scale)) = landmark.expected(view.camera, &map_from_camera) else { continue };
            let mut nearest = (NONE, most);
            view.grid.within(pixel, radius_px, |k| {
                if is_of_scale(f64::from(view.features.keypoints[k as usize].scale), scale) {
                    let d = self.distance(slot, landmark, &view.features.descriptors[k as usize]);
                    if d < nearest.1 {
                        nearest = (k, d);
                    }
                }
            });
            if nearest.0 != NONE && nearest.1 < best[nearest.0 as usize].1 {
                best[nearest.0 as usize] = (slot as u32, nearest.1);
            }
        }
        best.iter()
            .enumerate()
            .filter_map(|(k, (slot, _))| {
                let landmark = self.slots.get(*slot as usize)?.as_ref()?;
                Some(landmark.sighting(*slot, view.rays[k]?))
            })
            .collect()
    }

    /// Judges a fit.
    fn finish(
        &self,
        view: &View<'_>,
        fit: Fit,
        matches: usize,
        config: &RegisterConfig,
    ) -> Result<Registration, Unregistered> {
        let n = fit.sightings.len();
        if n < config.inliers_min {
            return Err(Unregistered::FewInliers { inliers: n, matches, wanted: config.inliers_min });
        }
        let around = self.expected(view, &fit.camera_from_map, 4.0 * config.inlier_px, config);
        let exact = inliers(&around, &fit.camera_from_map, config.inlier_px / view.camera.focal_mean()).len();
        let share = exact as f64 / around.len().max(1) as f64;
        if share < config.share_min {
            return Err(Unregistered::ByChance { inliers: exact, near: around.len() });
        }
        let drift = (config.drift_sigma_m, config.drift_sigma_rad);
        let measured = self.pose_sigma().unwrap_or(drift);
        let mut covariance = fit.covariance + self.by_frames(&fit, view, measured, config);
        for k in 0..3 {
            covariance[(k, k)] += drift.0.max(measured.0).powi(2);
            covariance[(k + 3, k + 3)] += drift.1.max(measured.1).powi(2);
        }
        let place = covariance.fixed_view::<3, 3>(0, 0).into_owned();
        let sigma_m = place.symmetric_eigenvalues().max().sqrt();
        if sigma_m.is_nan() || sigma_m > config.position_sigma_max_m {
            return Err(Unregistered::Uncertain { sigma_m, wanted_m: config.position_sigma_max_m });
        }
        Ok(Registration {
            map_from_camera: fit.camera_from_map.inverse(),
            covariance,
            matches,
            share,
            inliers: n,
            rms_px: fit.rms * view.camera.focal_mean(),
            focal_factor: focal_factor(&fit, config.feature_sigma_px / view.camera.focal_mean()),
        })
    }
}

impl LandmarkMap {
    /// Covariance of a fit by what the poses of kept frames are off, each for itself, along (metres) and about (radians) each
    /// axis. All landmarks that two frames made are off together then, by much where the frames were close together: their
    /// residuals do not show it, and many of them do not make it less.
    fn by_frames(
        &self,
        fit: &Fit,
        view: &View<'_>,
        (metres, radians): (f64, f64),
        config: &RegisterConfig,
    ) -> Matrix6<f64> {
        let sigma = config.feature_sigma_px / view.camera.focal_mean();
        let Some(moved) = moved_by_points(&fit.sightings, &fit.camera_from_map, sigma) else {
            return Matrix6::zeros();
        };
        let mut of_frames: BTreeMap<u64, Matrix6<f64>> = BTreeMap::new();
        for (sighting, moved) in fit.sightings.iter().zip(moved) {
            let Some(landmark) = self.slots.get(sighting.id as usize).and_then(Option::as_ref) else {
                continue;
            };
            let sights = landmark.sights.iter().map(|s| &s.1);
            for ((frame, sight), by_sight) in
                landmark.sights.iter().zip(moved_by_sights(&landmark.position, sights))
            {
                // A camera that is moved and turned sees a point as if the point were moved the other way.
                let arm = landmark.position.coords - sight.map_from_camera.translation.vector;
                let mut other_way = Matrix3x6::zeros();
                other_way.fixed_view_mut::<3, 3>(0, 0).copy_from(&-Matrix3::identity());
                other_way.fixed_view_mut::<3, 3>(0, 3).copy_from(&arm.cross_matrix());
                *of_frames.entry(*frame).or_insert_with(Matrix6::zeros) += moved * (by_sight * other_way);
            }
        }
        let (m, r) = (metres * metres, radians * radians);
        let own = Matrix6::from_diagonal(&nalgebra::Vector6::new(m, m, m, r, r, r));
        of_frames.values().map(|by_frame| by_frame * own * by_frame.transpose()).sum()
    }
}

/// A picture's features with their rays.
struct View<'a> {
    features: &'a Features,
    camera: &'a Camera,
    rays: Vec<Option<Vector2<f64>>>,
    grid: Grid,
}

impl<'a> View<'a> {
    fn new(features: &'a Features, camera: &'a Camera) -> Self {
        let ray = |k: &crate::features::Keypoint| camera.ray(Vector2::new(f64::from(k.x), f64::from(k.y)));
        Self {
            features,
            camera,
            rays: features.keypoints.iter().map(ray).collect(),
            grid: Grid::new(&features.keypoints, camera.size()),
        }
    }
}

/// A feature that looks like a landmark.
struct Match {
    slot: u32,
    sighting: Sighting,
}

/// Features of a picture, the strongest, that are compared with landmarks wherever these are; the others are looked for where
/// they are expected.
const RECOGNISED_MAX: usize = 500;
/// Poses that differ by less (degrees) are the same one.
const SIDES_APART_DEG: f64 = 4.0;
/// A pose counts where the one from the other side fits at most this share of as many landmarks.
const OTHER_SIDE_MAX: f64 = 0.7;
/// With so many times the fewest inliers a picture is placed at the first attempt.
const SURE: usize = 3;
/// Parts of the place that a picture is compared with one by one, when the first attempt fails.
const VOTED: usize = 2;
/// Kept frames whose cameras are at most this far apart (metres) and aside (radians) show about the same.
const BESIDE: (f64, f64) = (0.6, 0.6);

/// A pose and what agrees with it.
struct Fit {
    camera_from_map: Isometry3<f64>,
    covariance: Matrix6<f64>,
    rms: f64,
    sightings: Vec<Sighting>,
}

impl Landmark {
    fn sighting(&self, slot: u32, ray: Vector2<f64>) -> Sighting {
        Sighting { ray, point: self.position, covariance: self.covariance, id: slot }
    }
}

fn same_place(slots: &[Option<Landmark>], a: u32, b: u32) -> bool {
    let at = |s: u32| slots.get(s as usize).and_then(Option::as_ref).map(|l| l.position);
    a == b || at(a).zip(at(b)).is_some_and(|(a, b)| (a - b).norm() < 0.1)
}

/// The pose from which the plane that points lie in seems to be the same, but tilted the other way about the line of sight to
/// their middle. `None` where it is seen straight on, or there is no plane.
fn turned_over(sightings: &[Sighting], camera_from_map: &Isometry3<f64>) -> Option<Isometry3<f64>> {
    let points: Vec<Vector3<f64>> = sightings.iter().map(|s| (camera_from_map * s.point).coords).collect();
    let middle = points.iter().sum::<Vector3<f64>>() / points.len().max(1) as f64;
    let spread: Matrix3<f64> = points.iter().map(|p| (p - middle) * (p - middle).transpose()).sum();
    let axes = spread.symmetric_eigen();
    let normal = axes.eigenvectors.column(axes.eigenvalues.imin()).into_owned();
    let sight = middle.try_normalize(1e-9)?;
    let mirrored = 2.0 * normal.dot(&sight) * sight - normal;
    let turn = UnitQuaternion::rotation_between(&normal, &mirrored)?;
    let about_middle = Translation3::from(middle) * turn * Translation3::from(-middle);
    Some(about_middle * camera_from_map)
}

/// Largest standard deviation of a factor that is told.
const FOCAL_SIGMA_MAX: f64 = 0.015;

/// The factor of the focal length with which a refined pose has the smallest residuals: a parabola through three tries.
fn focal_factor(fit: &Fit, sigma: f64) -> Option<f64> {
    const STEP: f64 = 0.02;
    let all: Vec<usize> = (0..fit.sightings.len()).collect();
    let cost = |factor: f64| {
        let scaled: Vec<Sighting> =
            fit.sightings.iter().map(|s| Sighting { ray: s.ray / factor, ..*s }).collect();
        refine(&scaled, &all, &fit.camera_from_map, sigma, 10).map(|r| (r.rms * factor).powi(2))
    };
    let (less, here, more) = (cost(1.0 - STEP)?, cost(1.0)?, cost(1.0 + STEP)?);
    let bend = (less - 2.0 * here + more) / (STEP * STEP);
    if bend <= 0.0 || here / (all.len() as f64 * bend) > FOCAL_SIGMA_MAX * FOCAL_SIGMA_MAX {
        return None;
    }
    Some(1.0 + (0.5 * (less - more) / (STEP * bend)).clamp(-0.3, 0.3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::Point3;

    #[test]
    fn a_plane_far_away_looks_the_same_from_the_other_side() {
        // 40 cm of a plane that is tilted by 0.3, 4 m away.
        let camera_from_map = Isometry3::new(Vector3::new(0.1, -0.2, 4.0), Vector3::new(0.0, 0.3, 0.0));
        let seen = |pose: &Isometry3<f64>, point: &Point3<f64>| {
            let p = pose * point;
            Vector2::new(p.x, p.y) / p.z
        };
        let points =
            (0..25).map(|k| Point3::new(0.1 * f64::from(k % 5) - 0.2, 0.1 * f64::from(k / 5) - 0.2, 0.0));
        let sightings: Vec<Sighting> = points
            .map(|point| {
                let ray = seen(&camera_from_map, &point);
                Sighting { ray, point, covariance: Matrix3::zeros(), id: 0 }
            })
            .collect();
        let other = turned_over(&sightings, &camera_from_map).unwrap();
        let turn = other.rotation.angle_to(&camera_from_map.rotation);
        // The line of sight to the middle is tilted by .1 / 4 itself.
        assert!((turn - 2.0 * (0.3 - 0.025)).abs() < 0.01, "{turn}");
        for s in &sightings {
            let apart = (seen(&other, &s.point) - s.ray).norm();
            assert!(apart < 0.0036, "{apart}: more than a pixel and a half at a focal length of 416");
        }
    }
}
