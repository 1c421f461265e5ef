//! From what was imagined to where the base should stand, and whether to believe it.
//!
//! Everything is expressed relative to the base at the first target frame ("here": x forward, y left, metres);
//! [`Lifted`] is carried over to the odometry frame by the caller who knows where "here" is.
//!
//! # Witnesses
//! * **The plan**: the pose head on the last target frame of a glance (one pass at a high noise level). It names the
//!   pose where the rollout will end. One standoff ahead of it lies the object that it means.
//! * **The memory**: the mask head says in which context tokens the named object is seen, the location head
//!   where it is from there, and the context's own poses (odometry; without it the pose head's guess) carry
//!   all of these votes into one frame. What odometry may have drifted since ([`Drift`]) makes a vote count less and
//!   widens the witness.
//! * **The drive**: the place of the sampled rollout's last pictures among what was seen ([`crate::recall`]). It rests on
//!   imagined pixels alone. Where no depth or no poses are known, the pose head at the rollout's end takes its place, and
//!   does not move the answer.
//!
//! [`lift`] joins plan and memory, which need no rollout, into an [`Estimate`]; [`verify`] holds it against the rollouts
//! and what else is known, joins the drive to it, and decides.
//!
//! # Consistency
//! A figure in 0..1: the mean, weighted 4 : 3 : 2 : 1, of
//! 1. *agreement* of plan and memory about the object's place, `exp(-d² / 2)` with `d` their distance in spreads;
//! 2. *orientation*: how well the pose head finds the context's own places, of which odometry knows the truth:
//!    `exp(-e² / 2)`, `e` the median error over [`LiftParams::localisation_sigma_m`]; left out without odometry;
//! 3. *arrival*: agreement of the drive with the place that plan and memory found; left out when none was sampled;
//! 4. *likeness*: the share of the drive's pictures that what was seen explains; where they are not registered,
//!    `1 - 4 m`, at least 0, with `m` the mean absolute difference between the end of the rollout and the nearest
//!    remembered view; left out when there is none.
//!
//! # Decision
//! `not_in_context` when the mask stays below its threshold everywhere, or when the pictures are unlike anything
//! that the model was trained on; `inconsistent` when plan and memory differ by more than their spreads allow, when the
//! network cannot place its own context, or when the figure is too low; otherwise `found`. Where a drive is required
//! ([`DriveRule`]) and was sampled, it must show the thing in its place: a drive without a box, through or to another
//! place, or to another thing is `inconsistent`, whatever the other witnesses say. Such a drive also takes the place of a
//! plan that is lost, which is what a network makes of rooms that it cannot keep apart: where odometry says that it misplaces
//! its own context, or the plan goes elsewhere than the memory, memory and drive must agree. All numbers come from the bundle's
//! `[lift]` table, where calibration measured them.

use crate::imagine::{Heads, Rollout};
use crate::planar::{Pose2, is_finite, point_from, wrap_angle};
use mindseye_base::stats;
use serde::Serialize;

pub use mindseye_engines::bundle::{DriveRule, LiftParams, RegistrationParams, Spreads};

/// What the pictures of a rollout show, by registration alone: poses are relative to "here", frames are decoded ones, and
/// errors are shares of a picture that are not explained by what was seen, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Registered {
    /// Where the last pictures were taken.
    pub pose: Pose2,
    /// The first of the last pictures.
    pub end_frame: usize,
    /// Error of the last pictures there.
    pub end_error: f64,
    /// Share of the last pictures that was seen before.
    pub covered: f64,
    /// How much better this place explains them than the median place does, at most 1.
    pub distinct: f64,
    /// Error at the best place that is another one, where one was tried.
    pub elsewhere: Option<f64>,
    /// The picture on the way that is explained worst.
    pub way_frame: usize,
    /// Its error.
    pub way_error: f64,
    /// Mean error over the way and the end.
    pub mean_error: f64,
    /// Score of the box in the last pictures; none when it is not good enough.
    pub box_score: Option<f64>,
    /// Error of what the box holds, against what was seen there.
    pub thing_error: Option<f64>,
}

impl Registered {
    /// What candidates are ranked by, the least first: how badly the memory explains the drive along the whole way and at
    /// its end, and what its box lacks.
    pub fn cost(&self) -> f64 {
        let lacks = 0.5 * (1.0 - self.box_score.unwrap_or(0.0));
        self.mean_error + self.end_error + 0.5 * self.thing_error.unwrap_or(1.0) + lacks
    }
}

/// What the pictures say of an estimate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evidence {
    /// What the drive's pictures show, where they can be registered.
    pub registered: Option<Registered>,
    /// Mean absolute difference (0..1) of the end of the rollout and the nearest remembered view.
    pub likeness_error: Option<f64>,
    /// Mean absolute error (0..1) of the codec on the context's frames.
    pub reconstruction_error: Option<f64>,
}

/// What the answer's status should be, as far as the pictures can tell.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Believed.
    Found,
    /// Nothing like it was seen.
    NotInContext(String),
    /// Imagined, but at odds with what was seen.
    Inconsistent(String),
}

/// One witness: where the object is and where the base should stand, relative to "here".
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Witness {
    /// Object's centre, metres.
    pub object: (f64, f64),
    /// Where the base should stand before it.
    pub pose: Pose2,
    /// Standard deviation of `object`, metres.
    pub sigma_m: f64,
}

/// Where the base should stand as far as glances and odometry know, relative to "here".
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Where the base should stand, the best guess even when it is not believed.
    pub pose: Option<Pose2>,
    /// Variances of x, y (m²) and yaw (rad²).
    pub variances: [f64; 3],
    /// Object's centre, metres.
    pub object: Option<(f64, f64)>,
    /// Largest mask logit over context and first frame.
    pub mask_max: f64,
    /// The plan.
    pub plan: Option<Witness>,
    /// The memory.
    pub memory: Option<Witness>,
    /// Distance of plan and memory in combined spreads.
    pub disagreement: Option<f64>,
    /// Median error of the context's places by the pose head against odometry, metres.
    pub localisation_m: Option<f64>,
}

/// An estimate that was held against the rollouts, relative to "here".
#[derive(Clone, Debug, PartialEq)]
pub struct Lifted {
    /// What to say.
    pub decision: Decision,
    /// The consistency figure, 0..1: the weighted mean of its parts.
    pub consistency: f64,
    /// The parts of the figure.
    pub parts: [Agreement; 4],
    /// Where the base should stand.
    pub estimate: Estimate,
    /// Where the drive ends: by registration, else by the rollouts' pose heads.
    pub rollout: Option<Witness>,
    /// What its pictures show, where they could be registered.
    pub registered: Option<Registered>,
    /// Distance of the drive's end from plan and memory, in combined spreads.
    pub drive_apart: Option<f64>,
    /// Path of the base in the first rollout, one pose per target latent; empty without a rollout.
    pub path: Vec<Pose2>,
}

/// Pose and confidence out of a head's `(x, y, cos, sin)`.
pub(crate) fn pose_of(head: [f32; 4]) -> (Pose2, f64) {
    let [x, y, c, s] = head.map(f64::from);
    (Pose2::new(x, y, s.atan2(c)), s.hypot(c))
}

/// Mean of several poses; headings weighted by the length of their vectors. The second value is the spread of
/// the positions about their mean, metres.
fn mean_pose(heads: impl Iterator<Item = [f32; 4]>) -> Option<(Pose2, f64)> {
    let all: Vec<[f64; 4]> = heads.map(|h| h.map(f64::from)).collect();
    let n = all.len() as f64;
    if all.is_empty() {
        return None;
    }
    let mean: [f64; 4] = std::array::from_fn(|i| all.iter().map(|h| h[i]).sum::<f64>() / n);
    let spread =
        (all.iter().map(|h| (h[0] - mean[0]).powi(2) + (h[1] - mean[1]).powi(2)).sum::<f64>() / n).sqrt();
    let pose = Pose2::new(mean[0], mean[1], mean[3].atan2(mean[2]));
    is_finite(pose).then_some((pose, spread))
}

/// The object that a pose means: one stand-off ahead of it.
fn object_ahead(pose: Pose2, standoff_m: f64) -> (f64, f64) {
    point_from(pose, standoff_m, 0.0)
}

/// The pose at `standoff_m` from `object` on the side of `from`, facing it.
fn stand_before(object: (f64, f64), from: (f64, f64), standoff_m: f64) -> Pose2 {
    let (dx, dy) = (object.0 - from.0, object.1 - from.1);
    let yaw = if dx == 0.0 && dy == 0.0 { 0.0 } else { dy.atan2(dx) };
    let (s, c) = yaw.sin_cos();
    Pose2::new(object.0 - standoff_m * c, object.1 - standoff_m * s, yaw)
}

fn distance(a: (f64, f64), b: (f64, f64)) -> f64 {
    (a.0 - b.0).hypot(a.1 - b.1)
}

fn median(values: &mut [f64]) -> Option<f64> {
    (!values.is_empty()).then(|| stats::median(values))
}

/// What odometry may be off between a context frame and here.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Drift {
    /// Standard deviation of the way, metres.
    pub way_m: f64,
    /// Standard deviation of the heading, radians.
    pub heading_rad: f64,
}

impl Drift {
    /// Variance (m² along each axis) that it adds to the place of something `range_m` from here: the way is off along one
    /// axis, and the place is turned about the robot along the other.
    pub(crate) fn variance(self, range_m: f64) -> f64 {
        0.5 * (self.way_m.powi(2) + (self.heading_rad * range_m).powi(2))
    }
}

/// A token's opinion.
struct Vote {
    place: (f64, f64),
    weight: f64,
    seen_from: usize,
    /// What odometry adds, m².
    variance: f64,
}

/// Weighted geometric median (Weiszfeld's iteration): wrong votes pull it little.
fn geometric_median(votes: &[Vote]) -> Option<(f64, f64)> {
    let total: f64 = votes.iter().map(|v| v.weight).sum();
    if votes.is_empty() || total <= 0.0 {
        return None;
    }
    let sum = |f: &dyn Fn(&Vote) -> f64| votes.iter().map(f).sum::<f64>();
    let mut at = (sum(&|v| v.weight * v.place.0) / total, sum(&|v| v.weight * v.place.1) / total);
    for _ in 0..30 {
        let near = |v: &Vote| v.weight / distance(v.place, at).max(1e-3);
        let all = sum(&near);
        at = (sum(&|v| near(v) * v.place.0) / all, sum(&|v| near(v) * v.place.1) / all);
    }
    Some(at)
}

/// Reads plan and memory from what the heads said at a glance and joins them. `context` is `here_from_base` by
/// odometry, where known, for each context frame in the order of the heads, and `drift` what it may be off. Without any
/// odometry the spreads are those that were measured without. Sizes that disagree are treated as missing evidence.
pub fn lift(glances: &[Heads], context: &[Option<Pose2>], drift: &[Drift], params: &LiftParams) -> Estimate {
    let unposed = (!context.iter().any(Option::is_some)).then(|| params.unposed());
    let params = unposed.as_ref().unwrap_or(params);
    let logits = glances.iter().flat_map(seen_part).map(|v| f64::from(*v));
    let mut estimate = Estimate {
        pose: None,
        variances: [0.0; 3],
        object: None,
        mask_max: logits.fold(f64::NEG_INFINITY, f64::max),
        plan: plan_witness(glances, params),
        memory: memory_witness(glances, context, drift, params),
        disagreement: None,
        localisation_m: localisation(glances, context),
    };
    fuse(&mut estimate, None, params);
    estimate
}

impl Estimate {
    /// The same by plan and memory alone: what it was before a drive was heard.
    pub fn without_drive(&self, params: &LiftParams) -> Self {
        let mut out = self.clone();
        fuse(&mut out, None, params);
        out
    }
}

/// A network that misplaces its own context by more than this many times the usual limit is in another place altogether:
/// memory and drive are then of one mind about the wrong thing. Chosen on 30 houses of several rooms.
const ALTOGETHER: f64 = 2.0;

/// Holds an estimate against the rollouts (none: a draft) and what the pictures say, and decides.
pub fn verify(estimate: Estimate, rollouts: &[Rollout], evidence: Evidence, params: &LiftParams) -> Lifted {
    let lost = estimate.localisation_m.is_some_and(|error| error > params.localisation_max_m)
        || estimate.disagreement.is_some_and(|apart| apart > params.agree_max);
    let without_plan = match (lost, params.drive, estimate.localisation_m) {
        (true, DriveRule::Required, Some(error)) if error <= ALTOGETHER * params.localisation_max_m => {
            without_plan(&estimate, rollouts, evidence, params)
        }
        _ => None,
    };
    without_plan.unwrap_or_else(|| hold(estimate, rollouts, evidence, params))
}

/// What memory and drive say by themselves, where they are believed.
fn without_plan(
    estimate: &Estimate,
    rollouts: &[Rollout],
    evidence: Evidence,
    params: &LiftParams,
) -> Option<Lifted> {
    let (shown, worth) = evidence.registered.zip(params.registration)?;
    let plan = Some(drive_witness(&shown, &worth, params)?);
    let mut two = Estimate { plan, localisation_m: None, ..estimate.clone() };
    estimate.memory?;
    fuse(&mut two, None, params);
    let Estimate { plan, disagreement, localisation_m, .. } = *estimate;
    let lifted = hold(two.clone(), rollouts, evidence, params);
    let estimate = Estimate { plan, disagreement, localisation_m, ..two };
    (lifted.decision == Decision::Found).then_some(Lifted { estimate, ..lifted })
}

fn hold(mut estimate: Estimate, rollouts: &[Rollout], evidence: Evidence, params: &LiftParams) -> Lifted {
    let registered = evidence.registered.zip(params.registration);
    let drive = registered.and_then(|(shown, worth)| drive_witness(&shown, &worth, params));
    let rollout = drive.or_else(|| rollout_witness(rollouts, params));
    let mut path = Vec::new();
    if let Some(first) = rollouts.first() {
        path.extend(first.heads.pose.iter().skip(first.heads.context).map(|h| pose_of(*h).0));
        // The rollout begins here, whatever the head says about the given frame.
        if let Some(first) = path.first_mut() {
            *first = Pose2::default();
        }
    }
    let drive_apart = rollout.zip(estimate.object).map(|(rollout, object)| {
        let spread = rollout.sigma_m.hypot(estimate.variances[0].sqrt()).max(1e-6);
        distance(rollout.object, object) / spread
    });
    let parts = agreements(&estimate, drive_apart, evidence, params);
    let consistency = consistency(&parts);
    let decision = match (decide(&estimate, &parts, evidence, params), registered, params.drive) {
        (Decision::Found, Some((shown, worth)), DriveRule::Required) => {
            refused(&shown, &worth, drive_apart).map_or(Decision::Found, Decision::Inconsistent)
        }
        (decision, ..) => decision,
    };
    if let (Decision::Found, Some(drive)) = (&decision, drive) {
        fuse(&mut estimate, Some(drive), params);
    }
    let registered = evidence.registered;
    Lifted { decision, consistency, parts, estimate, rollout, registered, drive_apart, path }
}

/// Why a drive that has to show the thing in its place does not; `None` when it does.
fn refused(shown: &Registered, worth: &RegistrationParams, apart: Option<f64>) -> Option<String> {
    let end = shown.end_frame;
    if shown.box_score.is_none() {
        return Some(format!("the imagined drive shows nothing: no box in the pictures from frame {end} on"));
    }
    for (what, frame, error, most) in [
        (
            "the imagined drive ends in another place: what was seen explains",
            end,
            shown.end_error,
            worth.end_error_max,
        ),
        (
            "the imagined drive leads through another place: what was seen explains",
            shown.way_frame,
            shown.way_error,
            worth.way_error_max,
        ),
        (
            "the imagined drive ends at another thing: what was seen explains in the box of",
            end,
            shown.thing_error.unwrap_or(1.0),
            worth.thing_error_max,
        ),
    ] {
        if error > most {
            let (explained, wanted) = distinct(1.0 - error, 1.0 - most);
            return Some(format!("{what} frame {frame} to {explained}, {wanted} is needed"));
        }
    }
    let apart = apart.filter(|apart| *apart > worth.agree_max)?;
    Some(format!(
        "the imagined drive ends elsewhere: frame {end} is {apart:.1} spreads from the plan's and the memory's place, at \
         most {:.1} are allowed",
        worth.agree_max
    ))
}

/// The drive as a witness, by where its last pictures were taken.
fn drive_witness(shown: &Registered, worth: &RegistrationParams, params: &LiftParams) -> Option<Witness> {
    let object = object_ahead(shown.pose, params.standoff_m);
    is_finite(shown.pose).then_some(Witness { object, pose: shown.pose, sigma_m: worth.sigma_m })
}

/// Mask logits of context and first frame.
fn seen_part(heads: &Heads) -> &[f32] {
    let tokens = tokens_a_frame(heads);
    heads.mask.get(..(heads.context + 1) * tokens).unwrap_or_default()
}

fn tokens_a_frame(heads: &Heads) -> usize {
    heads.mask.len() / heads.pose.len().max(1)
}

/// Largest mask logit of the first frame, which was taken where the rollouts begin; minus infinity without masks.
pub fn seen_from_here(glances: &[Heads]) -> f64 {
    let first =
        glances.iter().flat_map(|heads| seen_part(heads).iter().skip(heads.context * tokens_a_frame(heads)));
    first.map(|v| f64::from(*v)).fold(f64::NEG_INFINITY, f64::max)
}

fn localisation(glances: &[Heads], context: &[Option<Pose2>]) -> Option<f64> {
    let mut errors: Vec<f64> = glances
        .iter()
        .flat_map(|heads| heads.pose.iter().take(heads.context).zip(context))
        .filter_map(|(head, truth)| Some(pose_of(*head).0.distance((*truth)?)))
        .collect();
    median(&mut errors)
}

fn plan_witness(glances: &[Heads], params: &LiftParams) -> Option<Witness> {
    let (pose, spread) = mean_pose(glances.iter().filter_map(|h| h.pose.last().copied()))?;
    let object = object_ahead(pose, params.standoff_m);
    Some(Witness { object, pose, sigma_m: params.plan_sigma_m.hypot(spread) })
}

fn memory_witness(
    glances: &[Heads],
    context: &[Option<Pose2>],
    drift: &[Drift],
    params: &LiftParams,
) -> Option<Witness> {
    let best = glances.iter().flat_map(seen_part).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut votes = Vec::new();
    let mut viewpoints: Vec<Pose2> = Vec::new();
    for heads in glances {
        let tokens = heads.mask.len() / heads.pose.len().max(1);
        for frame in 0..=heads.context {
            let here_from_base = if frame == heads.context {
                Pose2::default()
            } else {
                match context.get(frame) {
                    Some(Some(pose)) => *pose,
                    _ => heads.pose.get(frame).map(|h| pose_of(*h).0).unwrap_or_default(),
                }
            };
            if viewpoints.len() <= frame {
                viewpoints.push(here_from_base);
            }
            for token in frame * tokens..(frame + 1) * tokens {
                let (Some(logit), Some(place)) = (heads.mask.get(token), heads.locate.get(token)) else {
                    continue;
                };
                if f64::from(*logit) < params.mask_vote {
                    continue;
                }
                // The clearest sight counts most: a token that shows a corner of the thing knows less.
                let place = point_from(here_from_base, f64::from(place[0]), f64::from(place[1]));
                let drift = drift.get(frame).filter(|_| frame < heads.context).copied().unwrap_or_default();
                let variance = drift.variance(place.0.hypot(place.1));
                let own = params.memory_sigma_m.powi(2);
                let weight = f64::from(logit - best).exp() * own / (own + variance);
                votes.push(Vote { place, weight, seen_from: frame, variance });
            }
        }
    }
    let object = geometric_median(&votes)?;
    let total: f64 = votes.iter().map(|v| v.weight).sum();
    let mut errors: Vec<f64> = votes.iter().map(|v| distance(v.place, object)).collect();
    // The median distance of the votes, less what many votes average away.
    let spread = median(&mut errors)? / (votes.len() as f64).sqrt();
    // Stand on the side that it was seen from: from here when it is seen from here (nothing stands between),
    // else from where the most certain view of it was.
    let weight_from = |frame| votes.iter().filter(|v| v.seen_from == frame).map(|v| v.weight).sum::<f64>();
    let here = viewpoints.len() - 1;
    let from = if weight_from(here) > 0.05 * total {
        here
    } else {
        (0..viewpoints.len()).max_by(|a, b| weight_from(*a).total_cmp(&weight_from(*b))).unwrap_or(here)
    };
    let viewpoint = viewpoints[from];
    let pose = stand_before(object, (viewpoint.x, viewpoint.y), params.standoff_m);
    // Views share most of their odometry: what it adds does not average away.
    let drifted = votes.iter().map(|v| v.weight * v.variance).sum::<f64>() / total;
    let sigma_m = params.memory_sigma_m.hypot(spread).hypot(drifted.sqrt());
    (is_finite(pose) && sigma_m.is_finite()).then_some(Witness { object, pose, sigma_m })
}

fn rollout_witness(rollouts: &[Rollout], params: &LiftParams) -> Option<Witness> {
    let (pose, spread) = mean_pose(rollouts.iter().filter_map(|r| r.heads.pose.last().copied()))?;
    let object = object_ahead(pose, params.standoff_m);
    Some(Witness { object, pose, sigma_m: params.rollout_sigma_m.hypot(spread) })
}

/// Joins plan, memory and drive by their variances; the side to stand on is the plan's when the memory does not contradict
/// it, moved towards the drive's by what the drive's heading is worth.
fn fuse(out: &mut Estimate, drive: Option<Witness>, params: &LiftParams) {
    let yaw_variance = params.yaw_sigma_rad.powi(2);
    let (mut object, mut direction, mut variance) = match (out.plan, out.memory) {
        (Some(a), Some(b)) => {
            let combined = a.sigma_m.hypot(b.sigma_m);
            let apart = distance(a.object, b.object) / combined.max(1e-9);
            out.disagreement = Some(apart);
            let (wa, wb) = (a.sigma_m.powi(-2), b.sigma_m.powi(-2));
            let join = |p: f64, q: f64| (wa * p + wb * q) / (wa + wb);
            let object = (join(a.object.0, b.object.0), join(a.object.1, b.object.1));
            // Within 75 degrees the two sides are averaged; further apart the plan goes round the object
            // and only the memory's side is known to be free.
            let turn = wrap_angle(a.pose.yaw - b.pose.yaw);
            let direction = if turn.abs() < 75f64.to_radians() {
                wrap_angle(b.pose.yaw + 0.5 * turn)
            } else {
                b.pose.yaw
            };
            // Honest when they differ: half the squared distance is added.
            let variance = 1.0 / (wa + wb) + 0.5 * distance(a.object, b.object).powi(2) / 2.0;
            (object, direction, variance)
        }
        (Some(w), None) | (None, Some(w)) => (w.object, w.pose.yaw, w.sigma_m.powi(2)),
        (None, None) => return,
    };
    if let Some(drive) = drive {
        // What the two differ by widens the answer, but gives the drive no weight.
        let weight = |w: Option<Witness>| w.map_or(0.0, |w| w.sigma_m.powi(-2));
        let (w, own) = (drive.sigma_m.powi(-2), weight(out.plan) + weight(out.memory));
        let differ = variance - 1.0 / own;
        let apart = distance(object, drive.object);
        let join = |p: f64, q: f64| (own * p + w * q) / (own + w);
        object = (join(object.0, drive.object.0), join(object.1, drive.object.1));
        // As above: a quarter of the squared distance, in the shares with which the two count.
        let share = own / (own + w);
        variance = 1.0 / (own + w) + share.powi(2) * differ + share * (1.0 - share) * apart.powi(2);
        let turn = wrap_angle(drive.pose.yaw - direction);
        let heading = params.registration.map_or(f64::INFINITY, |r| r.yaw_sigma_rad.powi(2));
        if turn.abs() < 75f64.to_radians() {
            direction = wrap_angle(direction + turn * yaw_variance / (yaw_variance + heading));
        }
    }
    let (s, c) = direction.sin_cos();
    let pose = Pose2::new(object.0 - params.standoff_m * c, object.1 - params.standoff_m * s, direction);
    if is_finite(pose) {
        out.object = Some(object);
        out.pose = Some(pose);
        let spread = variance * params.variance_scale + params.shared_sigma_m.unwrap_or(0.0).powi(2);
        out.variances = [spread, spread, yaw_variance + variance / params.standoff_m.max(0.1).powi(2) / 4.0];
    }
}

/// One part of the consistency figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// What is compared, for a person.
    pub what: &'static str,
    /// How much it counts.
    pub weight: f64,
    /// 0 (none) to 1; `None`: not known, and not counted.
    pub value: Option<f64>,
}

fn agreements(
    estimate: &Estimate,
    drive_apart: Option<f64>,
    evidence: Evidence,
    params: &LiftParams,
) -> [Agreement; 4] {
    let bell = |d: f64| (-0.5 * d * d).exp();
    let agreement = estimate.disagreement.map_or(0.0, bell);
    let orientation = estimate.localisation_m.map(|e| bell(e / params.localisation_sigma_m.max(1e-6)));
    let arrival = drive_apart.map(bell);
    let explained = evidence.registered.map(|shown| 1.0 - shown.mean_error);
    let likeness = explained.or(evidence.likeness_error.map(|m| (1.0 - 4.0 * m).max(0.0)));
    let part = |what, weight, value| Agreement { what, weight, value };
    [
        part("plan and memory about the place", 4.0, Some(agreement)),
        part("the network and odometry about the context's poses", 3.0, orientation),
        part("the drive's end and the place", 2.0, arrival),
        part("the drive's pictures and the memory", 1.0, likeness),
    ]
}

/// The weighted mean of what is known.
fn consistency(parts: &[Agreement]) -> f64 {
    let known = || parts.iter().filter_map(|part| part.value.map(|value| (part.weight, value)));
    let value = known().map(|(w, p)| w * p).sum::<f64>() / known().map(|(w, _)| w).sum::<f64>();
    value.clamp(0.0, 1.0)
}

/// Two numbers with as many decimals, at least two, as it takes to tell them apart.
pub(crate) fn distinct(a: f64, b: f64) -> (String, String) {
    let shown = |decimals: usize| (format!("{a:.decimals$}"), format!("{b:.decimals$}"));
    (2..=12).map(shown).find(|(a, b)| a != b).unwrap_or_else(|| shown(12))
}

fn decide(estimate: &Estimate, parts: &[Agreement], evidence: Evidence, params: &LiftParams) -> Decision {
    if let (Some(error), Some(max)) = (evidence.reconstruction_error, params.reconstruction_max)
        && error > max
    {
        return Decision::NotInContext(format!(
            "the camera's pictures are unlike those that the model was trained on (codec error {error:.3}, \
             at most {max:.3} is usual)"
        ));
    }
    if estimate.mask_max < params.mask_present {
        let (seen, wanted) = distinct(estimate.mask_max, params.mask_present);
        return Decision::NotInContext(format!(
            "nothing like it was seen (clearest sight {seen}, {wanted} is needed)"
        ));
    }
    if estimate.pose.is_none() {
        return Decision::Inconsistent("the network gave no pose".into());
    }
    let Some(apart) = estimate.disagreement else {
        return Decision::Inconsistent(
            "something like it was seen, but not clearly enough to place it".into(),
        );
    };
    if let Some(error) = estimate.localisation_m
        && error > params.localisation_max_m
    {
        let (error, most) = distinct(error, params.localisation_max_m);
        return Decision::Inconsistent(format!(
            "the network misplaces its own context by {error} m against odometry (at most {most} m is usual)"
        ));
    }
    if apart > params.agree_max {
        return Decision::Inconsistent(format!(
            "the plan and the memory disagree about the place: {apart:.1} spreads apart, at most {:.1} are allowed",
            params.agree_max
        ));
    }
    let consistency = consistency(parts);
    if consistency < params.consistency_min {
        let (got, wanted) = distinct(consistency, params.consistency_min);
        let known = parts.iter().filter_map(|part| part.value.map(|value| (part.what, value)));
        let worst = known.min_by(|a, b| a.1.total_cmp(&b.1));
        let worst = worst.map(|(what, value)| format!(": least agree {what} ({value:.2} of 1)"));
        let worst = worst.unwrap_or_default();
        return Decision::Inconsistent(format!("consistency {got} is below {wanted}{worst}"));
    }
    Decision::Found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_comparison_has_the_digits_that_it_needs() {
        let check = |a, b, want: (&str, &str)| {
            let (x, y) = distinct(a, b);
            assert_eq!((x.as_str(), y.as_str()), want);
        };
        check(0.2, 0.7, ("0.20", "0.70"));
        check(0.0688, 0.07, ("0.069", "0.070"));
        check(0.069_96, 0.07, ("0.06996", "0.07000"));
        check(0.5, 0.5, ("0.500000000000", "0.500000000000"));
    }

    const TOKENS: usize = 6;

    fn params() -> LiftParams {
        LiftParams {
            glance_timestep: 950.0,
            standoff_m: 0.8,
            mask_present: 0.0,
            mask_vote: 0.0,
            plan_sigma_m: 0.2,
            memory_sigma_m: 0.15,
            rollout_sigma_m: 0.3,
            yaw_sigma_rad: 0.1,
            agree_max: 3.0,
            localisation_sigma_m: 0.3,
            localisation_max_m: 1.0,
            consistency_min: 0.3,
            drive: DriveRule::Required,
            registration: Some(RegistrationParams {
                sigma_m: 0.2,
                yaw_sigma_rad: 0.1,
                end_error_max: 0.4,
                way_error_max: 0.5,
                thing_error_max: 0.6,
                agree_max: 3.0,
            }),
            variance_scale: 1.0,
            shared_sigma_m: None,
            reconstruction_max: Some(0.1),
            without_odometry: None,
            standoff_by_word_m: Default::default(),
        }
    }

    fn head(pose: Pose2) -> [f32; 4] {
        [pose.x as f32, pose.y as f32, pose.yaw.cos() as f32, pose.yaw.sin() as f32]
    }

    /// Perfect heads for an object at `object` (relative to here), seen from the context poses in `seen_from`.
    fn heads(context: &[Pose2], object: (f64, f64), seen_from: &[usize], plan: Pose2) -> Heads {
        let mut h = Heads { context: context.len(), ..Heads::default() };
        for (i, base) in context.iter().chain([&Pose2::default()]).enumerate() {
            let (forward, left) = point_from(base.inverse(), object.0, object.1);
            for token in 0..TOKENS {
                let on = seen_from.contains(&i) && token == 2;
                h.mask.push(if on { 4.0 } else { -5.0 });
                h.locate.push([forward as f32, left as f32]);
            }
            h.pose.push(head(*base));
        }
        for step in 1..=3 {
            h.mask.extend([-9.0; TOKENS]);
            h.locate.extend([[0.0; 2]; TOKENS]);
            h.pose.push(head(crate::planar::between(Pose2::default(), plan, f64::from(step) / 3.0)));
        }
        h
    }

    /// The same heads at a glance and at the end of a rollout, held against the evidence.
    fn lifted(h: &Heads, context: &[Option<Pose2>], evidence: Evidence) -> Lifted {
        let rollout = Rollout { latents: vec![], heads: h.clone(), steps: 4 };
        let estimate = lift(std::slice::from_ref(h), context, &[], &params());
        verify(estimate, &[rollout], evidence, &params())
    }

    fn known(context: &[Pose2]) -> Vec<Option<Pose2>> {
        context.iter().copied().map(Some).collect()
    }

    fn sweep() -> Vec<Pose2> {
        (0..6).map(|i| Pose2::new(0.3 * f64::from(i) - 1.0, 0.2, f64::from(i))).collect()
    }

    proptest! {
        #[test]
        fn agreeing_witnesses_give_the_pose_before_the_object(
            range in 1.5..5.0f64, bearing in -3.0..3.0f64, at in 0usize..6,
        ) {
            let object = (range * bearing.cos(), range * bearing.sin());
            let plan = stand_before(object, (0.0, 0.0), 0.8);
            let context = sweep();
            let h = heads(&context, object, &[at, 6], plan);
            let out = lifted(&h, &known(&context), Evidence::default());
            prop_assert_eq!(&out.decision, &Decision::Found);
            let pose = out.estimate.pose.unwrap();
            prop_assert!(pose.distance(plan) < 1e-3, "{pose:?} instead of {plan:?}");
            prop_assert!(wrap_angle(pose.yaw - plan.yaw).abs() < 1e-3);
            prop_assert!(out.consistency > 0.99 && out.estimate.disagreement.unwrap() < 1e-3);
            prop_assert!(out.estimate.variances[0] < 0.15f64.powi(2));
        }

        #[test]
        fn nothing_breaks_on_odd_numbers(
            numbers in proptest::collection::vec(-1e30..1e30f32, 4),
            context in 0usize..4,
            cut in 0usize..20,
        ) {
            let mut h = heads(&sweep()[..context], (2.0, 0.0), &[0], Pose2::default());
            h.pose.iter_mut().for_each(|p| p.copy_from_slice(&numbers));
            h.mask.truncate(cut);
            h.locate.truncate(cut / 2);
            let out = lifted(&h, &[], Evidence::default());
            prop_assert!((0.0..=1.0).contains(&out.consistency));
            prop_assert!(out.estimate.pose.is_none_or(is_finite));
        }
    }

    #[test]
    fn the_gate_can_say_no() {
        let context = sweep();
        let poses = known(&context);
        let object = (2.0, 1.0);
        let plan = stand_before(object, (0.0, 0.0), 0.8);
        let check = |name: &str, h: Heads, evidence: Evidence, want: &str| {
            let out = lifted(&h, &poses, evidence);
            let got = match &out.decision {
                Decision::Found => "found".to_owned(),
                Decision::NotInContext(reason) => format!("not_in_context: {reason}"),
                Decision::Inconsistent(reason) => format!("inconsistent: {reason}"),
            };
            assert!(got.starts_with(want), "{name}: {got}");
        };
        let evidence = Evidence::default;
        check("all well", heads(&context, object, &[1, 2], plan), evidence(), "found");
        check(
            "never seen",
            heads(&context, object, &[], plan),
            evidence(),
            "not_in_context: nothing like it",
        );
        let elsewhere = stand_before((-2.0, 1.0), (0.0, 0.0), 0.8);
        check(
            "the plan goes elsewhere",
            heads(&context, object, &[1, 2], elsewhere),
            evidence(),
            "inconsistent: the plan and the memory disagree",
        );
        let mut lost = heads(&context, object, &[1, 2], plan);
        for pose in &mut lost.pose[..6] {
            pose[0] += 3.0;
        }
        check("lost", lost, evidence(), "inconsistent: the network misplaces its own context by 3.00 m");
        let strange = Evidence { reconstruction_error: Some(0.2), ..evidence() };
        check("strange pictures", heads(&context, object, &[1], plan), strange, "not_in_context: the camera");
        check("no heads", Heads::default(), evidence(), "not_in_context");
    }

    #[test]
    fn what_is_seen_from_here_is_in_the_first_frame_alone() {
        let (context, object) = (sweep(), (2.0, 1.0));
        let plan = stand_before(object, (0.0, 0.0), 0.8);
        let from = |seen: &[usize]| seen_from_here(&[heads(&context, object, seen, plan)]);
        // The first frame follows the six of the context; what is imagined after it is no sight.
        assert_eq!((from(&[6]), from(&[0, 6])), (4.0, 4.0));
        assert_eq!((from(&[0, 3, 5]), from(&[])), (-5.0, -5.0));
        assert_eq!(seen_from_here(&[Heads::default()]), f64::NEG_INFINITY);
    }

    /// What a right drive that ends at a pose shows.
    fn right(pose: Pose2) -> Registered {
        Registered {
            pose,
            end_frame: 20,
            end_error: 0.1,
            covered: 0.9,
            distinct: 0.7,
            elsewhere: Some(0.4),
            way_frame: 11,
            way_error: 0.2,
            mean_error: 0.15,
            box_score: Some(0.7),
            thing_error: Some(0.2),
        }
    }

    #[test]
    fn three_witnesses_are_joined_by_hand() {
        // Plan 0.3 m, memory 0.4 m, drive 0.2 m: on the line ahead at 2.0, 2.0 and 2.5 m.
        let params = LiftParams { plan_sigma_m: 0.3, memory_sigma_m: 0.4, ..params() };
        let context = sweep();
        let h = heads(&context, (2.0, 0.0), &[6], Pose2::new(1.2, 0.0, 0.0));
        let estimate = lift(std::slice::from_ref(&h), &known(&context), &[], &params);
        // Variances of the two: 1 / (1 / .09 + 1 / .16) = .0576 m².
        assert!((estimate.variances[0] - 0.0576).abs() < 1e-4, "{}", estimate.variances[0]);
        let rollout = Rollout { latents: vec![], heads: h, steps: 4 };
        let shown = right(Pose2::new(1.7, 0.0, 0.0));
        let evidence = Evidence { registered: Some(shown), ..Evidence::default() };
        let out = verify(estimate.clone(), std::slice::from_ref(&rollout), evidence, &params);
        assert_eq!(out.decision, Decision::Found);
        // Weights 17.361 and 25: 2.0 + 0.5 * 25 / 42.361 = 2.2951.
        assert!((out.estimate.object.unwrap().0 - 2.2951).abs() < 1e-3, "{:?}", out.estimate.object);
        assert!((out.estimate.pose.unwrap().x - 1.4951).abs() < 1e-3);
        // 1 / 42.361 + 17.361 * 25 / 42.361² * .25 = .02361 + .06047.
        assert!((out.estimate.variances[0] - 0.08408).abs() < 1e-3, "{}", out.estimate.variances[0]);
        // Half a metre over the hypotenuse of .2 and .24.
        assert!((out.drive_apart.unwrap() - 0.5 / 0.3124).abs() < 1e-2, "{:?}", out.drive_apart);
        assert_eq!((out.rollout.unwrap().pose, out.registered), (shown.pose, Some(shown)));
        // Headings: the drive's counts by its variance, .1² against .1²: half. It turns about the object.
        let turned = right(Pose2::new(1.2, 0.0, 0.2));
        let evidence = Evidence { registered: Some(turned), ..Evidence::default() };
        let out = verify(estimate.clone(), std::slice::from_ref(&rollout), evidence, &params);
        assert!((out.estimate.pose.unwrap().yaw - 0.1).abs() < 1e-2, "{:?}", out.estimate.pose);
        // What is refused moves nothing; neither does a drive that nobody registered.
        let nothing = Registered { box_score: None, ..shown };
        let evidence = Evidence { registered: Some(nothing), ..Evidence::default() };
        let out = verify(estimate.clone(), std::slice::from_ref(&rollout), evidence, &params);
        assert!(matches!(out.decision, Decision::Inconsistent(_)));
        assert_eq!(out.estimate, estimate);
        let out = verify(estimate.clone(), &[rollout], Evidence::default(), &params);
        assert_eq!((out.decision, out.estimate), (Decision::Found, estimate));
    }

    #[test]
    fn a_drive_takes_the_place_of_a_plan_that_is_lost() {
        let context = sweep();
        let object = (2.0, 1.0);
        let right_pose = stand_before(object, (0.0, 0.0), 0.8);
        let elsewhere = stand_before((-2.0, 1.0), (0.0, 0.0), 0.8);
        let lost = |plan: Pose2, off_m: f32| {
            let mut h = heads(&context, object, &[1, 2, 6], plan);
            h.pose[..6].iter_mut().for_each(|pose| pose[0] += off_m);
            h
        };
        let of = |h: &Heads, shown: Option<Registered>, rule: DriveRule, poses: &[Option<Pose2>]| {
            let params = LiftParams { drive: rule, ..params() };
            let rollout = Rollout { latents: vec![], heads: h.clone(), steps: 4 };
            let evidence = Evidence { registered: shown, ..Evidence::default() };
            verify(lift(std::slice::from_ref(h), poses, &[], &params), &[rollout], evidence, &params)
        };
        let (poses, drive) = (known(&context), right(right_pose));
        for (name, h) in [("misplaced", lost(right_pose, 1.9)), ("gone elsewhere", lost(elsewhere, 0.0))] {
            let out = of(&h, Some(drive), DriveRule::Required, &poses);
            assert_eq!(out.decision, Decision::Found, "{name}");
            let pose = out.estimate.pose.expect("a pose");
            assert!(pose.distance(right_pose) < 0.01, "{name}: {pose:?} instead of {right_pose:?}");
            assert!(
                out.estimate.plan.is_some_and(|plan| plan.pose.distance(right_pose) < 1e-3)
                    == (name == "misplaced")
            );
            // By variances of memory .15 and drive .2 m: 1 / (1 / .0225 + 1 / .04).
            assert!((out.estimate.variances[0] - 0.0144).abs() < 1e-3, "{:?}", out.estimate.variances);
            let refused = |shown: Option<Registered>, rule: DriveRule, poses: &[Option<Pose2>]| {
                matches!(of(&h, shown, rule, poses).decision, Decision::Inconsistent(_))
            };
            assert!(refused(None, DriveRule::Required, &poses), "{name}: nobody saw the drive");
            assert!(refused(Some(drive), DriveRule::Optional, &poses), "{name}: nobody asked it");
            for wrong in [
                right(elsewhere),
                Registered { box_score: None, ..drive },
                Registered { end_error: 0.45, ..drive },
                Registered { way_error: 0.7, ..drive },
                Registered { thing_error: Some(0.8), ..drive },
            ] {
                assert!(refused(Some(wrong), DriveRule::Required, &poses), "{name}: {wrong:?}");
            }
        }
        let altogether = of(&lost(right_pose, 2.1), Some(drive), DriveRule::Required, &poses);
        assert!(matches!(altogether.decision, Decision::Inconsistent(_)), "{:?}", altogether.decision);
        // Without odometry the memory rests on the same poses as the plan.
        let out = of(&lost(elsewhere, 0.0), Some(drive), DriveRule::Required, &[]);
        assert!(matches!(out.decision, Decision::Inconsistent(_)), "{:?}", out.decision);
        // What was never seen is not found by a drive.
        let unseen = of(&heads(&context, object, &[], elsewhere), Some(drive), DriveRule::Required, &poses);
        assert!(matches!(unseen.decision, Decision::NotInContext(_)), "{:?}", unseen.decision);
    }

    #[test]
    fn a_drive_that_shows_something_else_is_refused() {
        let context = sweep();
        let plan = stand_before((2.0, 1.0), (0.0, 0.0), 0.8);
        let h = heads(&context, (2.0, 1.0), &[1, 2], plan);
        let check = |name: &str, shown: Registered, rule: DriveRule, want: Option<&str>| {
            let params = LiftParams { drive: rule, consistency_min: 0.0, ..params() };
            let estimate = lift(std::slice::from_ref(&h), &known(&context), &[], &params);
            let rollout = Rollout { latents: vec![], heads: h.clone(), steps: 4 };
            let evidence = Evidence { registered: Some(shown), ..Evidence::default() };
            match (verify(estimate, &[rollout], evidence, &params).decision, want) {
                (Decision::Found, None) => {}
                (Decision::Inconsistent(reason), Some(want)) => assert_eq!(reason, want, "{name}"),
                (got, want) => panic!("{name}: {got:?} instead of {want:?}"),
            }
        };
        let well = right(plan);
        // The last one: 4 m over the hypotenuse of .2 and 1 / sqrt(1 / .04 + 1 / .0225) = .12.
        let wrong: [(&str, Registered, &str); 5] = [
            (
                "nothing",
                Registered { box_score: None, thing_error: None, ..well },
                "the imagined drive shows nothing: no box in the pictures from frame 20 on",
            ),
            (
                "another end",
                Registered { end_error: 0.45, ..well },
                "the imagined drive ends in another place: what was seen explains frame 20 to 0.55, 0.60 is needed",
            ),
            (
                "another way",
                Registered { way_error: 0.7, ..well },
                "the imagined drive leads through another place: what was seen explains frame 11 to 0.30, 0.50 is needed",
            ),
            (
                "another thing",
                Registered { thing_error: Some(0.8), ..well },
                "the imagined drive ends at another thing: what was seen explains in the box of frame 20 to 0.20, 0.40 \
                 is needed",
            ),
            (
                "elsewhere",
                right(stand_before((-2.0, 1.0), (0.0, 0.0), 0.8)),
                "the imagined drive ends elsewhere: frame 20 is 17.1 spreads from the plan's and the memory's place, at \
                 most 3.0 are allowed",
            ),
        ];
        check("well", well, DriveRule::Required, None);
        for (name, shown, reason) in wrong {
            check(name, shown, DriveRule::Required, Some(reason));
            check(name, shown, DriveRule::Optional, None);
        }
        // At its limits it passes.
        let just = Registered { end_error: 0.4, way_error: 0.5, thing_error: Some(0.6), ..well };
        check("just", just, DriveRule::Required, None);
    }

    #[test]
    fn drives_are_ranked_by_what_they_show() {
        let well = right(Pose2::default());
        for (name, worse) in [
            ("end", Registered { end_error: 0.2, ..well }),
            ("way", Registered { mean_error: 0.2, ..well }),
            ("box", Registered { box_score: Some(0.5), ..well }),
            ("no box", Registered { box_score: None, thing_error: None, ..well }),
            ("thing", Registered { thing_error: Some(0.3), ..well }),
        ] {
            assert!(worse.cost() > well.cost(), "{name}");
        }
        // .15 + .1 + .5 * .2 + .5 * .3
        assert!((well.cost() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn odometry_that_drifts_counts_less() {
        // Seen 1.5 m ahead of a view half a metre ahead: 2 m from here. Memory 0.4 m, plan 0.3 m.
        let context = [Some(Pose2::new(0.5, 0.0, 0.0))];
        let params = LiftParams { plan_sigma_m: 0.3, memory_sigma_m: 0.4, ..params() };
        let glance = heads(&[Pose2::new(0.5, 0.0, 0.0)], (2.0, 0.0), &[0], Pose2::new(1.7, 0.0, 0.0));
        let of = |drift: &[Drift]| lift(std::slice::from_ref(&glance), &context, drift, &params);
        let exact = of(&[]);
        assert_eq!(exact, of(&[Drift::default()]), "to the bit");
        assert!((exact.memory.unwrap().sigma_m - 0.4).abs() < 1e-6);
        // 0.4 m along the way, and 0.2 rad at 2 m: half of .16 + .16 is as much as the memory's own.
        let drifted = of(&[Drift { way_m: 0.4, heading_rad: 0.2 }]);
        let memory = drifted.memory.unwrap();
        assert!((memory.sigma_m.powi(2) - 0.32).abs() < 1e-6, "{}", memory.sigma_m);
        assert!(drifted.object.unwrap().0 > exact.object.unwrap().0, "the plan, at 2.5 m, counts more");
        assert!(drifted.variances[0] > exact.variances[0]);
        // A view without drift outvotes one that has drifted elsewhere.
        let two = [Pose2::new(0.5, 0.0, 0.0), Pose2::default()];
        let glance = heads(&two, (2.0, 0.0), &[0, 1], Pose2::new(1.2, 0.0, 0.0));
        let off = [Some(Pose2::new(1.5, 0.0, 0.0)), Some(Pose2::default())];
        let x = |drift: &[Drift]| {
            lift(std::slice::from_ref(&glance), &off, drift, &params).memory.unwrap().object.0
        };
        let much = Drift { way_m: 3.0, heading_rad: 0.0 };
        assert!((x(&[much, Drift::default()]) - 2.0).abs() < 0.01, "{}", x(&[much, Drift::default()]));
        assert!(x(&[]) > 2.2, "{}", x(&[]));
    }

    #[test]
    fn without_odometry_other_spreads_count() {
        let context = [Pose2::new(0.5, 0.0, 0.0)];
        let glance = heads(&context, (2.0, 0.0), &[0], Pose2::new(1.7, 0.0, 0.0));
        let spreads =
            Spreads { plan_sigma_m: 0.1, memory_sigma_m: 0.7, yaw_sigma_rad: 0.2, variance_scale: 2.0 };
        let params = LiftParams { without_odometry: Some(spreads), ..params() };
        let of = |known: &[Option<Pose2>]| lift(std::slice::from_ref(&glance), known, &[], &params);
        let (with, without) = (of(&[Some(context[0])]), of(&[None]));
        let sigmas = |e: &Estimate| [e.plan.unwrap().sigma_m, e.memory.unwrap().sigma_m];
        for (got, wanted) in [(sigmas(&with), [0.2, 0.15]), (sigmas(&without), [0.1, 0.7])] {
            assert!((got[0] - wanted[0]).abs() < 1e-6 && (got[1] - wanted[1]).abs() < 1e-6, "{got:?}");
        }
        // 2 (1 / (1 / .01 + 1 / .49) + .25 * .5 ^ 2) with half a metre between them.
        assert!((without.variances[0] - 2.0 * (0.0098 + 0.0625)).abs() < 1e-3, "{}", without.variances[0]);
        // Where none were measured the others stay.
        let bare = LiftParams { without_odometry: None, ..params.clone() };
        assert_eq!(sigmas(&lift(std::slice::from_ref(&glance), &[None], &[], &bare)), sigmas(&with));
    }

    #[test]
    fn disagreement_widens_the_covariance() {
        let context = sweep();
        let poses = known(&context);
        let mut last = 0.0;
        for shift in [0.0, 0.2, 0.4, 0.8] {
            let plan = stand_before((2.0 + shift, 0.0), (0.0, 0.0), 0.8);
            let glance = heads(&context, (2.0, 0.0), &[1, 2], plan);
            let out = lift(&[glance], &poses, &[], &params());
            assert!(out.variances[0] > last, "shift {shift}");
            last = out.variances[0];
        }
    }

    #[test]
    fn a_thing_behind_a_wall_is_approached_from_where_it_was_seen() {
        // Seen only from context pose 0, which stands north of it; here is far to the south.
        let context = vec![Pose2::new(3.0, 6.0, -std::f64::consts::FRAC_PI_2)];
        let poses = known(&context);
        let object = (3.0, 4.0);
        let h = heads(&context, object, &[0], stand_before(object, (3.0, 6.0), 0.8));
        let pose = lift(&[h], &poses, &[], &params()).pose.unwrap();
        assert!(pose.distance(Pose2::new(3.0, 4.8, 0.0)) < 1e-3, "{pose:?}");
    }
}
