//! Whether an imagined drive went to what was asked for: the forms of IF, and everything else that is measured on
//! its pictures.
//!
//! # Instruction following
//! All forms want the red box (the best outline in the mean of the box frames, of at least the bundle's score) with
//! its centre within 0.6 of the half size: `|x - W/2| <= 0.6 W/2`, the same for y. They differ in what else:
//! * **boxed** asks nothing more.
//! * **named** (the paper's form): the [`Examiner`] says that what the box holds has the colour and the shape that were
//!   asked for. A model that paints the thing anywhere passes: the paper's IF rises when the context is taken away.
//! * **IF** (strict, the headline): the mean of the box frames is nearer (mean squared difference) to the true boxed view
//!   of the named object than to that of any other object of the house.
//! * **in place**: it is nearer to the named object *where it stands* than to any object of the house set in the place of
//!   any other (all pairs of object and place, each as a boxed view, each in nine slightly different poses).
//!   Painting the right thing before the wrong wall does not pass.
//!
//! `IF(SD < d)` is the share of all drives that pass IF and have `SD < d` (the paper's joint count).

use mindseye::boxes::{FoundBox, find_box};
use mindseye::context::GROUP;
use mindseye::image::RgbImage;
use mindseye_train::eager::Eager;
use mindseye_world::{Camera, Colour, Frame, House, Pose2, Shape, approach, goal_pose, project_box};
use serde::{Deserialize, Serialize};

use super::examiner::{Examiner, best};
use super::picture::{LpipsSession, motion, psnr, squared_difference, ssim};
use super::space::Space;
use super::stats::{Figure, mean, share};
use super::visit::{boxed_picture, picture};

/// Share of the half size within which a box's centre must lie.
pub const CENTRE: f64 = 0.6;

/// What is said about one drive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// There is a box and it is centred.
    pub boxed: bool,
    /// See the module.
    pub named: bool,
    /// Strict IF.
    pub followed: bool,
    /// See the module.
    pub in_place: bool,
    /// Of the object and the place that the end is nearest to, whether each is the right one.
    #[serde(default)]
    pub right: [bool; 2],
    /// Whether the last picture is nearest to the named object's view, box or not.
    pub nearest: bool,
    /// Spatial distance (m), the largest over the pictures; none without an examiner.
    pub sd: Option<f64>,
    /// The mean over the pictures in place of the largest (m).
    #[serde(default)]
    pub sd_mean: Option<f64>,
    /// Against the true drive, over all images after the first (dB; -).
    pub psnr: f64,
    /// See [`Verdict::psnr`].
    pub ssim: f64,
    /// Where weights were given.
    pub lpips: Option<f64>,
    /// Mean absolute difference of neighbouring images, 0..1.
    pub motion: f64,
}

/// The figures of many drives.
#[derive(Clone, Debug, Serialize)]
pub struct Scores {
    /// SD, mean over drives (m).
    pub sd_m: Figure,
    /// The mean over the pictures of a drive in place of the largest, mean over drives (m).
    pub sd_mean_m: Figure,
    /// IF.
    pub instruction_followed: Figure,
    /// IF(SD < 0.2 m).
    pub followed_sd_0_2: Figure,
    /// IF(SD < 0.1 m).
    pub followed_sd_0_1: Figure,
    /// See the module.
    pub in_place: Figure,
    /// See [`Verdict::named`].
    pub named: Figure,
    /// See [`Verdict::boxed`].
    pub box_centred: Figure,
    /// See [`Verdict::nearest`].
    pub nearest_view: Figure,
    /// Mean (dB).
    pub psnr_db: Figure,
    /// Mean.
    pub ssim: Figure,
    /// Mean, where weights were given.
    pub lpips: Figure,
}

impl Scores {
    /// Of these drives; what only an examiner can say has no case without one.
    #[must_use]
    pub fn of(drives: &[Verdict]) -> Self {
        let is = |f: &dyn Fn(&Verdict) -> bool| share(drives.iter().map(f));
        let examined = drives.iter().any(|v| v.sd.is_some());
        let by_examiner = |f: &dyn Fn(&Verdict) -> bool| if examined { is(f) } else { share([]) };
        let joint = |d: f64| by_examiner(&|v| v.followed_within(d));
        Self {
            sd_m: mean(drives.iter().filter_map(|v| v.sd)),
            sd_mean_m: mean(drives.iter().filter_map(|v| v.sd_mean)),
            instruction_followed: is(&|v| v.followed),
            followed_sd_0_2: joint(0.2),
            followed_sd_0_1: joint(0.1),
            in_place: is(&|v| v.in_place),
            named: by_examiner(&|v| v.named),
            box_centred: is(&|v| v.boxed),
            nearest_view: is(&|v| v.nearest),
            psnr_db: mean(drives.iter().map(|v| v.psnr)),
            ssim: mean(drives.iter().map(|v| v.ssim)),
            lpips: mean(drives.iter().filter_map(|v| v.lpips)),
        }
    }
}

impl Verdict {
    /// IF(SD < d).
    #[must_use]
    pub fn followed_within(&self, d: f64) -> bool {
        self.followed && self.sd.is_some_and(|sd| sd < d)
    }
}

/// How to judge, the same for all drives.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// The robot's camera.
    pub camera: &'a Camera,
    /// For SD and names.
    pub examiner: Option<&'a Examiner>,
    /// Latents that show the box at the end of a drive.
    pub box_latents: usize,
    /// Least score of a box.
    pub box_min: f64,
}

/// One goal in one house: the true drive, the views that an end is compared with.
pub struct Judge<'a> {
    rules: Rules<'a>,
    object: usize,
    colour: Colour,
    shape: Shape,
    start: Pose2,
    /// Boxed true view of each object that can be stood before.
    views: Vec<(usize, RgbImage)>,
    /// `(object, place)` and the poses' views.
    placed: Vec<((usize, usize), Vec<RgbImage>)>,
    space: Option<Space<'a>>,
    /// Where the pictures of the drive that was judged last stand in the house (the given first one not among them): base
    /// poses in the map. Empty without an examiner.
    pub registered: Vec<Pose2>,
    /// Images of the true drive, the first one included.
    pub truth: Vec<RgbImage>,
    /// Where it ends.
    pub goal: Option<Pose2>,
}

/// Images of the true drive to an object, boxed at the end, with `1 + 4k` images.
pub fn true_drive(
    house: &House,
    start: Pose2,
    object: usize,
    rules: &Rules<'_>,
    target_latents: usize,
) -> Vec<RgbImage> {
    let mut frame = Frame::new();
    let moving = 1 + GROUP * (target_latents - 1).saturating_sub(rules.box_latents);
    let poses = approach(house, start, object, moving).poses;
    let mut images: Vec<RgbImage> =
        poses.iter().map(|p| picture(house, *p, rules.camera, &mut frame)).collect();
    if let Some(end) = poses.last() {
        let view = boxed_picture(house, *end, rules.camera, object, &mut frame);
        images.resize(1 + GROUP * (target_latents - 1), view);
    }
    images
}

/// `house` with object `a` where `b` stands and the other way round.
fn exchanged(house: &House, a: usize, b: usize) -> House {
    let mut out = house.clone();
    let (pa, pb) = ((house.objects[a].x, house.objects[a].y), (house.objects[b].x, house.objects[b].y));
    (out.objects[a].x, out.objects[a].y) = pb;
    (out.objects[b].x, out.objects[b].y) = pa;
    out
}

impl<'a> Judge<'a> {
    /// Prepares the views for a goal asked for at `start`.
    #[must_use]
    pub fn new(
        rules: Rules<'a>,
        house: &'a House,
        start: Pose2,
        object: usize,
        target_latents: usize,
    ) -> Self {
        let mut frame = Frame::new();
        let goals: Vec<Option<Pose2>> =
            (0..house.objects.len()).map(|i| goal_pose(house, start, i)).collect();
        let (mut views, mut placed) = (Vec::new(), Vec::new());
        for (place, goal) in goals.iter().enumerate() {
            let Some(goal) = goal else { continue };
            views.push((place, boxed_picture(house, *goal, rules.camera, place, &mut frame)));
            for thing in 0..house.objects.len() {
                let set = exchanged(house, thing, place);
                let poses = [-1.0, 0.0, 1.0].into_iter().flat_map(|ahead| {
                    [-1.0, 0.0, 1.0].map(|turn| {
                        goal.compose(Pose2::unwrapped(0.2 * ahead, 0.0, 8f64.to_radians() * turn))
                    })
                });
                let shots = poses.map(|p| boxed_picture(&set, p, rules.camera, thing, &mut frame)).collect();
                placed.push(((thing, place), shots));
            }
        }
        let named = &house.objects[object];
        Self {
            rules,
            object,
            colour: named.colour,
            shape: named.shape,
            start,
            views,
            placed,
            space: rules.examiner.map(|_| Space::new(house, rules.camera)),
            registered: Vec::new(),
            truth: true_drive(house, start, object, &rules, target_latents),
            goal: goals[object],
        }
    }

    /// The box of a drive's last pictures, where it is good enough.
    #[must_use]
    pub fn find_box(&self, frames: &[RgbImage]) -> Option<FoundBox> {
        let boxed = frames.len().saturating_sub(self.rules.box_latents.max(1) * GROUP);
        find_box(&frames[boxed..]).filter(|b| b.score >= self.rules.box_min)
    }

    /// Judges a drive of decoded frames (the first image four times, then groups of four).
    ///
    /// # Errors
    /// When the graph of LPIPS fails.
    pub fn verdict(
        &mut self,
        frames: &[RgbImage],
        eager: &mut Eager,
        lpips: Option<&mut LpipsSession>,
    ) -> anyhow::Result<Verdict> {
        let mut out = Verdict::default();
        let still = last_still(frames, self.rules.box_latents);
        let found = self.find_box(frames);
        let camera = self.rules.camera;
        out.boxed = found.is_some_and(|b| centred(b.edges(), [camera.width as f64, camera.height as f64]));
        if let Some(still) = &still {
            let by = |views: &[(usize, RgbImage)]| {
                let d = views.iter().map(|(i, v)| (squared_difference(still, v), *i));
                d.min_by(|a, b| a.0.total_cmp(&b.0)).map(|d| d.1)
            };
            out.nearest = by(&self.views) == Some(self.object);
            let place = self
                .placed
                .iter()
                .map(|(which, views)| {
                    let d = views.iter().map(|v| squared_difference(still, v)).fold(f64::INFINITY, f64::min);
                    (d, *which)
                })
                .min_by(|a, b| a.0.total_cmp(&b.0));
            let (thing, at) = place.map_or((usize::MAX, usize::MAX), |p| p.1);
            out.right = [thing == self.object, at == self.object];
            out.in_place = out.boxed && out.right == [true; 2];
            if let (Some(examiner), Some(b)) = (self.rules.examiner, found) {
                let (colour, shape) = examiner.name(eager, still, b.edges());
                out.named =
                    out.boxed && best(&colour) == self.colour.index() && best(&shape) == self.shape.index();
            }
        }
        out.followed = out.boxed && out.nearest;
        let imagined = frames.get(GROUP..).unwrap_or_default();
        if let (Some(examiner), Some(space)) = (self.rules.examiner, &mut self.space) {
            let boxed = self.rules.box_latents * GROUP;
            let edges = found.map(|b| b.edges());
            let d = space.distance(examiner, eager, imagined, self.start, boxed, edges);
            out.sd = d.sd.is_finite().then_some(d.sd);
            out.sd_mean = d.mean.is_finite().then_some(d.mean);
            self.registered = d.poses;
        }
        let pairs: Vec<(&RgbImage, &RgbImage)> = imagined.iter().zip(self.truth.iter().skip(1)).collect();
        let n = pairs.len().max(1) as f64;
        out.psnr = psnr(pairs.iter().map(|(a, b)| squared_difference(a, b)).sum::<f64>() / n);
        out.ssim = pairs.iter().map(|(a, b)| ssim(a, b)).sum::<f64>() / n;
        if let Some(lpips) = lpips {
            let mut sum = 0.0;
            for (a, b) in &pairs {
                sum += lpips.distance(a, b)?;
            }
            out.lpips = Some(sum / n);
        }
        let moving = imagined.len().saturating_sub(self.rules.box_latents * GROUP);
        out.motion = motion(frames.get(GROUP - 1..GROUP + moving).unwrap_or_default());
        Ok(out)
    }

    /// The true box at the goal, in continuous pixels.
    #[must_use]
    pub fn true_box(&self, house: &House) -> Option<[f32; 4]> {
        project_box(house, self.goal?, self.rules.camera, self.object)
    }
}

/// Whether the centre of a box (`x0, y0, x1, y1` in continuous pixels) is within [`CENTRE`] of the half size.
#[must_use]
pub fn centred([x0, y0, x1, y1]: [f64; 4], [width, height]: [f64; 2]) -> bool {
    let near =
        |low: f64, high: f64, size: f64| ((low + high) / 2.0 - size / 2.0).abs() <= CENTRE * size / 2.0;
    near(x0, x1, width) && near(y0, y1, height)
}

/// The mean of the box frames.
#[must_use]
pub fn last_still(frames: &[RgbImage], box_latents: usize) -> Option<RgbImage> {
    let tail = &frames[frames.len().saturating_sub(box_latents.max(1) * GROUP)..];
    let first = tail.first()?;
    let mut sum = vec![0u32; first.data.len()];
    for f in tail {
        for (s, v) in sum.iter_mut().zip(&f.data) {
            *s += u32::from(*v);
        }
    }
    let data = sum.iter().map(|s| (s / tail.len() as u32) as u8).collect();
    Some(RgbImage { width: first.width, height: first.height, data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_world::{Difficulty, Rng, random_pose};
    use std::sync::Arc;

    #[test]
    fn a_box_is_centred_within_six_tenths_of_the_half_size() {
        // 24x16: the middle is (12, 8), the limits 7.2 and 4.8 pixels from it.
        let check = |x: f64, y: f64, wanted: bool| {
            let got = centred([x - 2.0, y - 1.0, x + 2.0, y + 1.0], [24.0, 16.0]);
            assert_eq!(got, wanted, "a box around ({x}, {y})");
        };
        check(12.0, 8.0, true);
        for (x, wanted) in [(19.1, true), (19.3, false), (4.9, true), (4.7, false)] {
            check(x, 8.0, wanted);
        }
        for (y, wanted) in [(12.7, true), (12.9, false), (3.3, true), (3.1, false)] {
            check(12.0, y, wanted);
        }
    }

    /// Frames as a decoder gives them: the first image four times.
    fn frames(images: &[RgbImage]) -> Vec<RgbImage> {
        [vec![images[0].clone(); GROUP - 1], images.to_vec()].concat()
    }

    #[test]
    fn true_drives_are_followed_and_those_to_something_else_are_not() {
        const TARGETS: usize = 5;
        let camera = Camera::new(24, 16);
        let rules = Rules { camera: &camera, examiner: None, box_latents: 1, box_min: 0.2 };
        let mut e = Eager::new(Arc::default(), false);
        let (mut boxed, mut wrong_boxed, mut moved_boxed) = (0, 0, 0);
        for seed in 0..8 {
            let house = House::generate(seed, &Difficulty::plain());
            let start = random_pose(&house, &mut Rng::new(seed));
            let reachable: Vec<usize> =
                (0..house.objects.len()).filter(|o| goal_pose(&house, start, *o).is_some()).collect();
            let [named, other] = reachable[..2] else {
                panic!("house {seed} has two things to stand before")
            };
            let mut judge = Judge::new(rules, &house, start, named, TARGETS);
            let truth = true_drive(&house, start, named, &rules, TARGETS);
            assert_eq!(truth.len(), 1 + GROUP * (TARGETS - 1));
            let right = judge.verdict(&frames(&truth), &mut e, None).expect("a verdict");
            assert_eq!((right.psnr, right.sd, right.lpips), (60.0, None, None), "house {seed}");
            assert!((right.ssim - 1.0).abs() < 1e-9 && right.nearest && right.motion > 0.0, "{right:?}");
            assert_eq!(
                (right.followed, right.in_place),
                (right.boxed, right.boxed),
                "house {seed}: {right:?}"
            );
            boxed += usize::from(right.boxed);

            // Another thing in its box: boxed, but not what was asked for.
            let drive = frames(&true_drive(&house, start, other, &rules, TARGETS));
            let wrong = judge.verdict(&drive, &mut e, None).expect("a verdict");
            assert!(!wrong.nearest && !wrong.followed && !wrong.in_place, "house {seed}: {wrong:?}");
            assert!(wrong.psnr < 40.0, "house {seed}: {wrong:?}");
            wrong_boxed += usize::from(wrong.boxed);

            // The right thing in another's place: not in place.
            let moved = exchanged(&house, named, other);
            let drive = frames(&true_drive(&moved, start, named, &rules, TARGETS));
            let moved = judge.verdict(&drive, &mut e, None).expect("a verdict");
            assert!(!moved.in_place, "house {seed}: {moved:?}");
            moved_boxed += usize::from(moved.boxed);

            // No box: nothing is followed, however near the view is.
            let mut frame = Frame::new();
            let end = picture(&house, judge.goal.expect("a goal"), &camera, &mut frame);
            let still = judge.verdict(&vec![end; GROUP * TARGETS], &mut e, None).expect("a verdict");
            assert!(!still.boxed && !still.followed && !still.in_place, "house {seed}: {still:?}");
            assert_eq!(still.motion, 0.0);
        }
        assert!(
            boxed >= 6 && wrong_boxed >= 4 && moved_boxed >= 4,
            "{boxed} {wrong_boxed} {moved_boxed} of 8"
        );
    }

    #[test]
    fn scores_count_drives_and_join_conditions() {
        let verdict = |followed: bool, sd: f64, mean: f64, boxed: bool| Verdict {
            followed,
            boxed,
            sd: Some(sd),
            sd_mean: Some(mean),
            ..Verdict::default()
        };
        let all = [
            verdict(true, 0.05, 0.04, true),
            verdict(true, 0.15, 0.05, true),
            verdict(true, 0.5, 0.1, true),
            verdict(false, 0.05, 0.01, true),
        ];
        let s = Scores::of(&all);
        assert_eq!((s.instruction_followed.value, s.box_centred.value), (0.75, 1.0));
        assert_eq!((s.followed_sd_0_2.value, s.followed_sd_0_1.value), (0.5, 0.25));
        assert!((s.sd_m.value - 0.1875).abs() < 1e-12 && (s.sd_mean_m.value - 0.05).abs() < 1e-12);
        // Without an examiner there is no joint count.
        let blind = Scores::of(&all.map(|v| Verdict { sd: None, ..v }));
        assert_eq!((blind.followed_sd_0_2.n, blind.sd_m.n, blind.instruction_followed.n), (0, 0, 4));
    }
}
