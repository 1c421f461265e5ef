//! What was seen, with the depth that the model reads in it, carried into other views: what imagined pictures are held
//! against, and what a guided drive is held to.
//!
//! All poses are relative to the base where the rollout begins ("here": x forward, y left, metres and radians).
//!
//! # Reading a drive
//! [`Recall::read`] looks at the pictures of a sampled drive and at nothing else of it. Its last pictures, less the red
//! outline, are placed among all that was seen: *where the drive ends*, by imagined pixels alone. The pictures on the way
//! are placed one after the other, each near the one before, so that a way through another place is noticed wherever it
//! is. What the box holds is held against what was seen there.

use crate::boxes::FoundBox;
use crate::context::{ContextLatent, GROUP};
use crate::ground::{Mind, MindError};
use crate::image::RgbImage;
use crate::imagine::{Budget, ContextLatents, ImagineError, Prompt, RolloutSettings, pick};
use crate::lift::{Registered, pose_of};
use crate::planar::{Pose2, is_jump, wrap_angle};
use crate::served::Inputs;
use mindseye_bridge::geometry::{planar_isometry, planar_pose};
use mindseye_bridge::time::Timestamp;
use mindseye_landmarks::{
    Camera, Carried, Carrier, CarryConfig, Look, PlaceConfig, Placed, Placer, Remembered,
};
use nalgebra::Isometry3;

/// Most views that are carried; of more an even spread.
pub const VIEWS_MAX: usize = 32;

/// How pictures are carried that are shown: chosen in 16 simulated rooms with typical odometry and smeared depth, where
/// pictures of twice the model's pixels, reduced, are 3.2 dB above those carried in the model's own, leaving out what lies
/// between surfaces brings 0.7 dB, and the rest little.
const SHOWN: CarryConfig = CarryConfig {
    same_share: 0.1,
    same_m: 0.1,
    side_min_px: 1.0,
    side_max_px: 12.0,
    near_m: 0.3,
    preference: 2,
    agree: 0.15,
};

/// How far from the end's pose a thing may be looked at (metres, radians).
const THING_AHEAD_M: f64 = 0.12;
const THING_TURN_RAD: f64 = 0.07;

/// A remembered picture and where the base stood.
#[derive(Clone, Copy, Debug)]
pub struct RecallView<'a> {
    /// In the pixels of which the model reads depth.
    pub picture: &'a RgbImage,
    /// Relative to here.
    pub here_from_base: Pose2,
}

/// How many of the views, newest first, come after the last jump of odometry: times and poses in one frame, oldest
/// first. A robot stands or drives between two of them; what cannot be driven in the time between is a jump.
pub fn since_jump(poses: &[(Timestamp, Pose2)]) -> usize {
    let jumped = |pair: &[(Timestamp, Pose2)]| {
        let [(before, a), (after, b)] = [pair[0], pair[1]];
        is_jump(a.distance(b), wrap_angle(b.yaw - a.yaw), after.since(before))
    };
    let after = poses.windows(2).rposition(jumped).map_or(0, |i| i + 1);
    poses.len() - after
}

/// What a drive's pictures show.
pub struct Read {
    /// Its end, and what the rest rests on.
    pub registered: Registered,
    /// Where its pictures were taken: one pose per latent.
    pub path: Vec<Pose2>,
    /// How much of a picture (its place among the frames) what was seen explains, 0 to 1: the last one of each latent on
    /// the way, and the end.
    pub explained: Vec<(usize, f64)>,
}

/// See the module.
pub struct Recall {
    /// As the model reads depth: for pictures that are shown.
    fine: Remembered,
    /// A quarter of the pixels: for comparisons, of which there are many.
    memory: Remembered,
    placer: Placer,
    base_from_camera: Isometry3<f64>,
    size: (usize, usize),
    /// For pictures that are shown: the model's camera with `finer` times its pixels each way.
    shown: (Carrier, Camera),
    finer: usize,
}

impl Recall {
    /// Reads the depth of remembered views (at most [`VIEWS_MAX`], an even spread of more) for a camera that sits so on its
    /// base. `None` when the model reads no depth, when its camera is any, and without a view.
    ///
    /// # Errors
    /// When depth cannot be read.
    pub fn new(
        mind: &mut dyn Mind,
        views: &[RecallView<'_>],
        base_from_camera: &Isometry3<f64>,
    ) -> Result<Option<Self>, MindError> {
        let camera = mind.spec().camera;
        let Some(target) = camera.pinhole() else { return Ok(None) };
        let chosen = crate::context::spread(views.len(), VIEWS_MAX);
        let pixels: usize = chosen.iter().map(|i| views[*i].picture.data.len() / 3).sum();
        let (mut fine, mut memory) = (Remembered::new(pixels), Remembered::new(pixels));
        for view in chosen.into_iter().map(|i| &views[i]) {
            let picture = view.picture;
            let Some(depth) = mind.depth(picture)? else { return Ok(None) };
            let Some(source) = camera.resized(picture.width, picture.height).pinhole() else {
                return Ok(None);
            };
            let here_from_camera = planar_isometry(view.here_from_base) * base_from_camera;
            // A view whose pose is no number is one that was not seen.
            let shown = surfaces(&depth, picture.width);
            if fine.insert(picture, &shown, &source, &here_from_camera).is_err() {
                continue;
            }
            let (small, depth) = halved(picture, &depth);
            let camera = source.resized(small.width as u32, small.height as u32);
            // Sizes and pose are right, and there is room: the larger one was taken.
            let _ = memory.insert(&small, &depth, &camera, &here_from_camera);
        }
        if memory.is_empty() {
            return Ok(None);
        }
        let mut placer = Placer::new(target, *base_from_camera, PlaceConfig::default());
        placer.survey(&memory);
        let finer = mind.spec().detail.map_or(1, |detail| finer(detail, (camera.width, camera.height)));
        let Some(shown) = camera.resized(finer * camera.width, finer * camera.height).pinhole() else {
            return Ok(None);
        };
        Ok(Some(Self {
            fine,
            memory,
            placer,
            base_from_camera: *base_from_camera,
            size: (camera.width, camera.height),
            shown: (Carrier::new(SHOWN), shown),
            finer,
        }))
    }

    /// Where the camera is when the base is there.
    pub fn camera_at(&self, here_from_base: Pose2) -> Isometry3<f64> {
        planar_isometry(here_from_base) * self.base_from_camera
    }

    /// What a camera would see, as far as it was seen before, in [`Recall::finer`] times the model's pixels each way.
    pub fn carry(&mut self, here_from_camera: &Isometry3<f64>) -> &mut Carried {
        let (carrier, camera) = &mut self.shown;
        carrier.carry(&self.fine, camera, here_from_camera)
    }

    /// How many times the model's pixels, each way, carried pictures have.
    pub fn finer(&self) -> usize {
        self.finer
    }

    /// Reads a drive: decoded frames (the given first one [`GROUP`] times, then those of each latent), the last `boxed`
    /// of which show the box `found`. `starts` are poses to begin looking for its end from; `way` are poses where each
    /// latent may end, from the given first one on. `None` when the frames are not the model's.
    pub fn read(
        &mut self,
        frames: &[RgbImage],
        boxed: usize,
        found: Option<&FoundBox>,
        starts: &[Pose2],
        way: &[Pose2],
    ) -> Option<Read> {
        let last = frames.len().checked_sub(boxed.max(1))?;
        let tail: Vec<&RgbImage> = frames.get(last..)?.iter().collect();
        let first = tail.first()?;
        if (first.width, first.height) != self.size {
            return None;
        }
        let outline = found.map(|b| Outline::of(b, &tail));
        let on_outline = |x: usize, y: usize| outline.as_ref().is_some_and(|o| o.holds(x, y));
        let look = Look::of(&tail, on_outline)?;
        let end = self.placer.place(&self.memory, &look, starts)?;
        let thing_error = found.and_then(|b| {
            let inside = |x: usize, y: usize| x > b.x0 && x < b.x1 && y > b.y0 && y < b.y1;
            let thing = Look::of(&tail, |x, y| !inside(x, y) || on_outline(x, y))?;
            self.thing_error(&thing, end.pose)
        });
        let mut path = vec![Pose2::default()];
        let mut errors: Vec<(usize, f64)> = Vec::new();
        for (latent, at) in (2 * GROUP..=last).step_by(GROUP).enumerate() {
            let placed = self.place_on_way(&frames[at - 1], &path, way.get(latent + 1))?;
            errors.push((at - 1, placed.error));
            path.push(placed.pose);
        }
        path.extend(std::iter::repeat_n(end.pose, boxed / GROUP));
        // The first of the worst.
        let worse = |worst: (usize, f64), next: &(usize, f64)| if next.1 > worst.1 { *next } else { worst };
        let worst = errors.iter().fold((frames.len() - 1, 0.0), worse);
        errors.push((frames.len() - 1, end.error));
        let registered = Registered {
            pose: end.pose,
            end_frame: last,
            end_error: end.error,
            covered: end.covered,
            distinct: end.distinct,
            elsewhere: end.elsewhere,
            way_frame: worst.0,
            way_error: worst.1,
            mean_error: errors.iter().map(|(_, error)| error).sum::<f64>() / errors.len() as f64,
            box_score: found.map(|b| b.score),
            thing_error,
        };
        let explained = errors.into_iter().map(|(at, error)| (at, 1.0 - error)).collect();
        Some(Read { registered, path, explained })
    }

    /// The least error of what a box holds from poses near the end's: the whole picture says where the end is to within a
    /// pixel or two, and a thing's edges are steep.
    fn thing_error(&mut self, thing: &Look, end: Pose2) -> Option<f64> {
        let mut least: Option<f64> = None;
        for (ahead, turn) in [-1.0, 0.0, 1.0].into_iter().flat_map(|a| [-1.0, 0.0, 1.0].map(|t| (a, t))) {
            let near = end.compose(Pose2::new(THING_AHEAD_M * ahead, 0.0, THING_TURN_RAD * turn));
            let (error, _) = self.placer.error_at(&self.memory, thing, near)?;
            least = Some(least.map_or(error, |l| l.min(error)));
        }
        least
    }

    /// Places a picture on the way near where the one before was, and near where the way may lead.
    fn place_on_way(&mut self, frame: &RgbImage, path: &[Pose2], way: Option<&Pose2>) -> Option<Placed> {
        let look = Look::of(&[frame], |_, _| false)?;
        let before = path.last().copied();
        // As fast as it went so far.
        let onward = match path {
            [.., a, b] => Some(b.compose(a.relative(*b))),
            _ => None,
        };
        let starts: Vec<Pose2> = [before, onward, way.copied()].into_iter().flatten().collect();
        self.placer.place_near(&self.memory, &look, &starts)
    }

    /// How much of the frames along a given way is not explained from where they claim to be, and how far off they are: for
    /// the last frame of each latent of a drive along these camera poses (one for the first frame and one for each of the
    /// others), the frame, its error near that pose, and the base's pose there. `None` for a camera that leaves the height
    /// and tilt that it has on the base: pictures are placed in the plane.
    pub fn follow(
        &mut self,
        frames: &[RgbImage],
        cameras: &[Isometry3<f64>],
    ) -> Option<Vec<(usize, f64, Pose2)>> {
        let bases: Vec<Isometry3<f64>> =
            cameras.iter().map(|c| c * self.base_from_camera.inverse()).collect();
        let level = |b: &Isometry3<f64>| {
            b.translation.z.abs() < 0.02 && (b.rotation * nalgebra::Vector3::z()).xy().norm() < 0.02
        };
        if !bases.iter().all(level) {
            return None;
        }
        let mut out = Vec::new();
        for at in (2 * GROUP - 1..frames.len()).step_by(GROUP) {
            let look = Look::of(&[&frames[at]], |_, _| false)?;
            let claimed = planar_pose(bases.get(at + 1 - GROUP)?);
            let placed = self.placer.place_near(&self.memory, &look, &[claimed])?;
            out.push((at, placed.error, placed.pose));
        }
        Some(out)
    }
}

/// Depth beside which there is depth of this many times as much is at an edge.
const EDGE: f32 = 1.3;
/// At an edge, depth that differs from both sides by this share lies between surfaces.
const BETWEEN: f32 = 0.04;

/// Depth of which pixels between two surfaces are left out (not a number): a depth reader smears edges, and what it puts
/// between hangs in the air when it is carried.
fn surfaces(depth_m: &[f32], width: usize) -> Vec<f32> {
    let beside = |at: usize| {
        let (x, row) = (at % width, at - at % width);
        let across = [(x > 0).then(|| at - 1), (x + 1 < width).then(|| at + 1)];
        let along = [row.checked_sub(width).map(|above| above + x), Some(at + width)];
        across.into_iter().chain(along).flatten().filter_map(|at| depth_m.get(at).copied())
    };
    let keep = |(at, depth): (usize, &f32)| {
        let (near, far) = beside(at).fold((*depth, *depth), |(near, far), d| (near.min(d), far.max(d)));
        let between = *depth > near * (1.0 + BETWEEN) && *depth < far / (1.0 + BETWEEN);
        if far > near * EDGE && between { f32::NAN } else { *depth }
    };
    depth_m.iter().enumerate().map(keep).collect()
}

/// Times the model's pixels each way that remembered pictures have; 1 where that is no whole number.
fn finer(detail: (usize, usize), model: (usize, usize)) -> usize {
    let times = detail.0 / model.0.max(1);
    if times > 0 && detail == (times * model.0, times * model.1) { times } else { 1 }
}

/// A picture with half as many pixels each way (a last odd row or column is left out), and its depth: of four pixels the
/// second nearest, which is of the surface that most of them show and not between two.
fn halved(picture: &RgbImage, depth_m: &[f32]) -> (RgbImage, Vec<f32>) {
    let (width, height) = (picture.width / 2, picture.height / 2);
    let mut out = RgbImage { width, height, data: Vec::with_capacity(width * height * 3) };
    let mut depth = Vec::with_capacity(width * height);
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        let four = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(dx, dy)| (2 * x + dx, 2 * y + dy));
        let pixels = four.map(|(x, y)| picture.pixel(x, y));
        out.data.extend([0, 1, 2].map(|c| (pixels.iter().map(|p| u32::from(p[c])).sum::<u32>() / 4) as u8));
        let mut depths = four.map(|(x, y)| depth_m.get(y * picture.width + x).copied().unwrap_or(f32::NAN));
        depths.sort_by(f32::total_cmp);
        depth.push(depths[1]);
    }
    (out, depth)
}

/// The pixels of a red outline, and red ones beside it.
pub(crate) struct Outline {
    edges: [usize; 4],
    width: usize,
    red: Vec<bool>,
}

/// What red has over the brighter of the two others in pixels beside an outline that belong to it (0..255).
const RED: f32 = 45.0;

impl Outline {
    /// Of a box in the mean of pictures.
    pub(crate) fn of(found: &FoundBox, pictures: &[&RgbImage]) -> Self {
        let width = pictures.first().map_or(1, |p| p.width);
        let pixels = pictures.first().map_or(0, |p| p.data.len() / 3);
        let mut over = vec![0.0f32; pixels];
        for picture in pictures {
            for (sum, rgb) in over.iter_mut().zip(picture.data.chunks_exact(3)) {
                *sum += f32::from(rgb[0]) - f32::from(rgb[1].max(rgb[2]));
            }
        }
        let red = over.iter().map(|v| *v > RED * pictures.len() as f32).collect();
        Self { edges: [found.x0, found.y0, found.x1, found.y1], width, red }
    }

    /// Whether a pixel is of it.
    pub(crate) fn holds(&self, x: usize, y: usize) -> bool {
        let [x0, y0, x1, y1] = self.edges;
        let ring = |grow: usize, shrink: usize| {
            let within = x + grow >= x0 && x <= x1 + grow && y + grow >= y0 && y <= y1 + grow;
            let inner = x > x0 + shrink && x + shrink < x1 && y > y0 + shrink && y + shrink < y1;
            within && !inner
        };
        ring(0, 0) || (ring(1, 1) && self.red.get(y * self.width + x) == Some(&true))
    }
}

/// Where the pose head puts the base at the end of each remembered latent, relative to here: glanced at in parts that fit
/// into one evaluation. `None` for those that there was no time for, and all of them from a model without heads.
///
/// # Errors
/// As [`crate::imagine::imagine`].
pub fn poses_by_head(
    mind: &mut dyn Mind,
    memory: &ContextLatents,
    prompt: Prompt<'_>,
    settings: &RolloutSettings,
    budget: Budget<'_>,
) -> Result<Vec<Option<Pose2>>, ImagineError> {
    let (len, most, frame) = (memory.index.len(), mind.spec().context_max.max(1), mind.spec().latent_len);
    let once = RolloutSettings { candidates: 1, ..settings.clone() };
    let parts = len.div_ceil(most);
    let mut poses = vec![None; len];
    for part in 0..parts {
        let positions: Vec<usize> = (part..len).step_by(parts).collect();
        let seen = pick(memory, &positions, frame);
        let glances = mind.imaginer().glance(Inputs { seen: &seen, prompt, settings: &once, budget })?;
        let heads = glances.iter().flat_map(|heads| heads.pose.iter().take(heads.context));
        for (position, head) in positions.iter().zip(heads) {
            poses[*position] = Some(pose_of(*head).0);
        }
    }
    Ok(poses)
}

/// The views of a stretch of the memory whose pictures and poses are known, relative to `origin` (`odom_from_base` here),
/// after the last jump of odometry before `now` (stamp and pose of the newest view of all); and how many were left out.
pub fn views_of<'a>(
    stretch: &'a [ContextLatent],
    now: (Timestamp, Pose2),
    origin: Pose2,
) -> (Vec<RecallView<'a>>, usize) {
    let posed: Vec<(&ContextLatent, Pose2)> =
        stretch.iter().filter_map(|c| Some((c, c.info.odom_from_base?))).collect();
    let mut poses: Vec<(Timestamp, Pose2)> = posed.iter().map(|(c, p)| (c.info.captured_at, *p)).collect();
    poses.push(now);
    let left_out = poses.len() - since_jump(&poses);
    let views = posed[left_out.min(posed.len())..].iter().filter_map(|(c, pose)| {
        Some(RecallView { picture: c.detail.as_ref()?, here_from_base: origin.relative(*pose) })
    });
    (views.collect(), left_out)
}

#[cfg(test)]
#[path = "recall_tests.rs"]
mod tests;
