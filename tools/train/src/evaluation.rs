//! Goal poses on unseen houses, measured while training goes on.

use std::sync::Arc;

use mindseye_base::stats::median;
use mindseye_engines::denoise::frames_first;
use mindseye_engines::model::codec::{GROUP, LinearCodec};
use mindseye_engines::model::dit::Prediction;
use mindseye_world::{Pose2, Rng, STANDOFF_M, wrap_angle};
use serde::{Deserialize, Serialize};

use crate::codec_fit::codec_of;
use crate::data::{Sample, Source, Task, Worlds};
use crate::eager::{Eager, Params};
use crate::family::HouseModel;
use crate::guide::{self, GuideConfig};
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
    /// Given paths, without a guide.
    #[serde(default)]
    pub paths: Sharpness,
    /// Given paths with a guide, where the model takes one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub guided: Option<Sharpness>,
    /// The guide alone, without a network: what was carried, holes filled from their neighbours.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub carried: Option<Sharpness>,
}

/// How well pictures of one pass at t = 1 agree with the truth, both through the codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sharpness {
    /// PSNR of a frame (dB), mean over frames and paths.
    pub psnr_db: f64,
    /// PSNR of a path's worst frame (dB), mean over paths.
    pub psnr_worst_db: f64,
}

/// PSNR (dB) of each frame of target latents `[latents, channels, h, w]` against others, both decoded.
fn frame_psnr(codec: &LinearCodec, latents: &[f32], truth: &[f32]) -> Vec<f64> {
    let config = codec.config();
    let (h, w) = config.latent_size();
    let each = config.channels * h * w;
    let frame = 3 * config.height * config.width;
    let decoded = |z: &[f32]| codec.decode_group(z);
    latents
        .chunks_exact(each)
        .zip(truth.chunks_exact(each))
        .flat_map(|(a, b)| {
            let (a, b) = (decoded(a), decoded(b));
            (0..GROUP).map(move |k| {
                let (a, b) = (&a[k * frame..(k + 1) * frame], &b[k * frame..(k + 1) * frame]);
                // Of values in [-1, 1]; the peak is 2.
                let error = |(a, b): (&f32, &f32)| f64::from(a.clamp(-1.0, 1.0) - b.clamp(-1.0, 1.0)).powi(2);
                let mean = a.iter().zip(b).map(error).sum::<f64>() / frame as f64;
                10.0 * (4.0 / mean.max(1e-10)).log10()
            })
        })
        .collect()
}

/// [`Sharpness`] of what was imagined of paths: PSNR of the frames of each.
fn sharpness(paths: &[Vec<f64>]) -> Sharpness {
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (sum, n) = values.fold((0.0, 0usize), |(s, n), v| (s + v, n + 1));
        sum / n.max(1) as f64
    };
    Sharpness {
        psnr_db: mean(&mut paths.iter().flatten().copied()),
        psnr_worst_db: mean(&mut paths.iter().map(|p| p.iter().copied().fold(f64::INFINITY, f64::min))),
    }
}

/// What [`Sharpness`] is measured of, each over the same paths.
struct Pictures {
    alone: Sharpness,
    guided: Option<Sharpness>,
    carried: Option<Sharpness>,
}

/// Pictures on given paths from one pass at t = 1.
fn pictures(
    model: &HouseModel,
    source: &mut Source,
    codec: &LinearCodec,
    params: &Arc<Params>,
    houses: usize,
) -> Pictures {
    let (f, first) = (model.latents(), model.layout.context_latents + 1);
    let (c, hw) = (model.dit.in_channels, model.dit.latent_height * model.dit.latent_width);
    let (mut alone, mut guided, mut carried) = (Vec::new(), Vec::new(), Vec::new());
    let mut e = Eager::new(params.clone(), false);
    for i in 0..houses {
        let seed = 0xe0a1_0000 + i as u64;
        let sample = source.sample(seed, Task::Navigate, false);
        let mut draw = Draw::new(&mut Rng::new(seed), sample.latents.len(), 1.0, 1.0, 0.0, false);
        draw.s = 1.0;
        let truth = &sample.latents[first * c * hw..];
        let mut pass = |guide: bool| {
            e.restart(params.clone());
            draw.guided = guide;
            let out = net::forward(&mut e, model, std::slice::from_ref(&sample), std::slice::from_ref(&draw));
            let values = frames_first(e.value(out.sample).1, c, f, hw);
            let clean: Vec<f32> = match model.dit.prediction {
                Prediction::X0 => values,
                Prediction::Velocity => values.iter().zip(&draw.noise).map(|(v, n)| n - v).collect(),
            };
            frame_psnr(codec, &clean[first * c * hw..], truth)
        };
        alone.push(pass(false));
        if !sample.guide.is_empty() {
            guided.push(pass(true));
            carried.push(frame_psnr(
                codec,
                &guide::latents(&model.dit, &sample.guide)[first * c * hw..],
                truth,
            ));
        }
    }
    let some = |paths: Vec<Vec<f64>>| (!paths.is_empty()).then(|| sharpness(&paths));
    Pictures { alone: sharpness(&alone), guided: some(guided), carried: some(carried) }
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
pub fn evaluate(
    model: &HouseModel,
    worlds: impl Into<Worlds>,
    params: &Arc<Params>,
    houses: usize,
    guide: Option<GuideConfig>,
) -> Eval {
    let codec = codec_of(params);
    let mut source = Source::new(model, worlds, codec.clone()).guided(guide);
    let plain = codec.and_then(|c| LinearCodec::new(model.codec, c.basis, c.mean).ok());
    let pictures = plain.map(|codec| pictures(model, &mut source, &codec, params, houses));
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
        paths: pictures.as_ref().map(|p| p.alone).unwrap_or_default(),
        guided: pictures.as_ref().and_then(|p| p.guided),
        carried: pictures.as_ref().and_then(|p| p.carried),
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
    use mindseye_engines::model::codec::LinearCodecConfig;

    #[test]
    fn sharpness_by_hand() {
        // One block of one pixel: four frames, three colours, each its own channel.
        let config = LinearCodecConfig { block: 1, channels: 12, height: 1, width: 1, scale: 1.0 };
        let identity = (0..144).map(|i| f32::from(u8::from(i % 13 == 0))).collect();
        let codec = LinearCodec::new(config, identity, vec![0.0; 12]).expect("a codec");
        let truth = vec![0.5; 12];
        let mut read = truth.clone();
        // Frame 1: off by 0.2 of 2 in all colours: 20 dB. Frame 2: beyond white, which is white: 0.5 of 2 in one of three.
        read[3..6].fill(0.7);
        read[6] = 4.0;
        let psnr = frame_psnr(&codec, &read, &truth);
        let wanted = [0.0, 20.0, 10.0 * (4.0f64 / (0.25 / 3.0)).log10(), 0.0];
        for k in [1, 2] {
            assert!((psnr[k] - wanted[k]).abs() < 1e-4, "{psnr:?}");
        }
        assert!(psnr[0] > 100.0 && psnr[3] > 100.0, "{psnr:?}");
        let all = sharpness(&[vec![20.0, 30.0], vec![10.0, 40.0]]);
        assert_eq!(all, Sharpness { psnr_db: 25.0, psnr_worst_db: 15.0 });
    }

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
