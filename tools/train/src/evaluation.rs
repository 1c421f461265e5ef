//! Goal poses on unseen houses, measured while training goes on.

use std::sync::Arc;

use mindseye_base::stats::median;
use mindseye_world::{Difficulty, Pose2, Rng, STANDOFF_M, wrap_angle};
use serde::{Deserialize, Serialize};

use crate::codec_fit::codec_of;
use crate::data::{Sample, Source, Task};
use crate::eager::{Eager, Params};
use crate::family::HouseModel;
use crate::net::{self, Draw};

/// Errors of goal poses on unseen houses, one pass at t = 0.97, no guidance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Eval {
    /// Median heading error of the pose head (degrees).
    pub head_yaw_deg: f64,
    /// Share within 25 degrees.
    pub head_within_25: f64,
    /// Median position error of the pose head (m).
    pub head_position_m: f64,
    /// Median heading error of mask and place with known poses (degrees).
    pub mask_yaw_deg: f64,
    /// Share within 25 degrees.
    pub mask_within_25: f64,
    /// Median position error (m).
    pub mask_position_m: f64,
    /// Area under the curve: largest mask value of present against absent names.
    pub absent_auc: f64,
    /// Median heading error of context poses (degrees).
    pub context_yaw_deg: f64,
}

/// Errors of one kind, over goals.
#[derive(Default)]
struct Errors {
    yaw_deg: Vec<f64>,
    position_m: Vec<f64>,
}

impl Errors {
    fn push(&mut self, yaw_deg: f64, position_m: f64) {
        self.yaw_deg.push(yaw_deg);
        self.position_m.push(position_m);
    }

    fn within_25(&self) -> f64 {
        let hits = self.yaw_deg.iter().filter(|e| **e <= 25.0).count();
        hits as f64 / self.yaw_deg.len().max(1) as f64
    }
}

/// Goal poses on unseen houses from one pass at t = 0.97.
#[must_use]
pub fn evaluate(model: &HouseModel, difficulty: &Difficulty, params: &Arc<Params>, houses: usize) -> Eval {
    let mut source = Source::new(model, difficulty.clone(), codec_of(params));
    let (last, context, tokens) =
        (model.latents() - 1, model.layout.context_latents, model.dit.tokens_per_frame());
    let (mut head, mut mask) = (Errors::default(), Errors::default());
    let mut context_yaw = Vec::new();
    let (mut present, mut absent) = (Vec::new(), Vec::new());
    let mut e = Eager::new(params.clone(), false);
    for i in 0..houses {
        let seed = 0xe0a1_0000 + i as u64;
        for task in [Task::Ground, Task::Absent] {
            let sample = source.sample(seed, task, false);
            let mut rng = Rng::new(seed);
            let mut draw = Draw::new(&mut rng, sample.latents.len(), 1.0, 1.0, 0.0, false);
            draw.s = 0.97;
            e.restart(params.clone());
            let out = net::forward(&mut e, model, std::slice::from_ref(&sample), &[draw]);
            let logits = &e.value(out.mask).1[..(context + 1) * tokens];
            let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            if task == Task::Absent {
                absent.push(top);
                continue;
            }
            present.push(top);
            let pose = e.value(out.pose).1;
            let (yaw, position) = pose_error(&pose[last * 4..], sample.pose[last]);
            head.push(yaw, position);
            for (t, truth) in sample.pose[..context].iter().enumerate() {
                context_yaw.push(pose_error(&pose[t * 4..], *truth).0);
            }
            let (x, y) = object_by_mask(&sample, logits, e.value(out.locate).1, tokens);
            let (yaw, position) = standoff_error((x, y), sample.pose[last]);
            mask.push(yaw, position);
        }
    }
    Eval {
        head_within_25: head.within_25(),
        head_yaw_deg: median(&mut head.yaw_deg),
        head_position_m: median(&mut head.position_m),
        mask_within_25: mask.within_25(),
        mask_yaw_deg: median(&mut mask.yaw_deg),
        mask_position_m: median(&mut mask.position_m),
        absent_auc: area_under_curve(&present, &absent),
        context_yaw_deg: median(&mut context_yaw),
    }
}

/// Heading (degrees) and place (m) of a pose head's `(x, y, cos, sin)` against the truth.
fn pose_error(head: &[f32], truth: Pose2) -> (f64, f64) {
    let yaw = f64::from(head[3]).atan2(f64::from(head[2]));
    let turn = wrap_angle(yaw - truth.yaw).abs().to_degrees();
    (turn, (f64::from(head[0]) - truth.x).hypot(f64::from(head[1]) - truth.y))
}

/// The object's place from the start (m): places of all tokens, weighted by their masks and carried by the true poses
/// of the context.
fn object_by_mask(sample: &Sample, logits: &[f32], locate: &[f32], tokens: usize) -> (f64, f64) {
    let (mut x, mut y, mut w) = (0.0, 0.0, 0.0);
    for (at, logit) in logits.iter().enumerate() {
        let k = f64::from(logit.min(20.0)).exp();
        let seen = Pose2::unwrapped(f64::from(locate[at * 2]), f64::from(locate[at * 2 + 1]), 0.0);
        let place = sample.pose[at / tokens].compose(seen);
        x += k * place.x;
        y += k * place.y;
        w += k;
    }
    (x / w, y / w)
}

/// Heading (degrees) and place (m) of the pose at the standoff from an object, come from the start, against the goal.
fn standoff_error((x, y): (f64, f64), goal: Pose2) -> (f64, f64) {
    let distance = x.hypot(y);
    let stand = (distance - STANDOFF_M) / distance.max(1e-6);
    let turn = wrap_angle(y.atan2(x) - goal.yaw).abs().to_degrees();
    (turn, (x * stand - goal.x).hypot(y * stand - goal.y))
}

/// How often a present name's value is above an absent one's; ties count half. 0 where there are none.
fn area_under_curve(present: &[f64], absent: &[f64]) -> f64 {
    let won = |p: &f64, a: &f64| if p > a { 1.0 } else { f64::from(u8::from(p == a)) * 0.5 };
    let wins: f64 = present.iter().flat_map(|p| absent.iter().map(move |a| won(p, a))).sum();
    wins / (present.len() * absent.len()).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_heads_by_hand() {
        // Facing left (90 degrees) at (3, 4), against looking ahead from the origin.
        let (turn, far) = pose_error(&[3.0, 4.0, 0.0, 2.0], Pose2::default());
        assert!((turn - 90.0).abs() < 1e-9 && (far - 5.0).abs() < 1e-9);
        // An object 3 m to the left: the robot stands the standoff before it, facing left.
        let (turn, far) =
            standoff_error((0.0, 3.0), Pose2::unwrapped(0.0, 3.0 - STANDOFF_M, 90f64.to_radians()));
        assert!(turn < 1e-9 && far < 1e-9, "{turn} {far}");
        let (turn, far) = standoff_error((0.0, 3.0), Pose2::unwrapped(0.3, 3.0 - STANDOFF_M, 0.0));
        assert!((turn - 90.0).abs() < 1e-9 && (far - 0.3).abs() < 1e-9);
        assert_eq!(area_under_curve(&[1.0, 2.0], &[1.0, 0.0]), 0.875);
        assert_eq!(area_under_curve(&[], &[1.0]), 0.0);
        let errors = Errors { yaw_deg: vec![1.0, 25.0, 25.1, 90.0], position_m: Vec::new() };
        assert_eq!(errors.within_25(), 0.5);
    }
}
