//! What `eval grounding` writes into a bundle: the `[lift]` table from what was measured, and the figures.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use mindseye::lift::{LiftParams, Registered, RegistrationParams, Spreads};
use mindseye_base::stats::median;
use mindseye_engines::bundle::{MANIFEST, Manifest, Measured};

use super::super::report::write_atomically;
use super::super::stats::quantile_of;
use super::super::visit::CommonArgs;
use super::goal::{Absent, Outcome};
use super::odometry::Regime;

/// 90 % of a planar normal lie within this squared Mahalanobis distance.
pub(super) const ELLIPSE_90: f64 = 4.605;

/// Robots' cameras and odometry are worse than the clean views of calibration: what decides about withholding is wider
/// than what is seen there.
const WIDER: f64 = 1.5;

/// Writes figures as `name = [value, low, high]` into the `[evaluation.grounding]` table of a bundle.
///
/// # Errors
/// A manifest that cannot be read or written.
pub(super) fn store(
    directory: &Path,
    args: &CommonArgs,
    bundle: &str,
    figures: &serde_json::Value,
) -> anyhow::Result<()> {
    let mut stored = BTreeMap::new();
    for (name, figure) in figures.as_object().into_iter().flatten() {
        let ends = ["value", "low", "high"].map(|k| figure.get(k).and_then(serde_json::Value::as_f64));
        if let [Some(value), Some(low), Some(high)] = ends {
            stored.insert(name.clone(), [value, low, high].map(|v| (v * 1e4).round() / 1e4));
        }
    }
    let command = format!(
        "mindseye-tools eval grounding --houses {} --seed {} --difficulty {}",
        args.houses, args.seed, args.difficulty
    );
    change(directory, |manifest| {
        let measured = Measured { command, measured_bundle: bundle.to_owned(), figures: stored };
        manifest.evaluation.grounding = Some(measured);
        Ok(())
    })
}

/// Changes the manifest of a bundle.
fn change(directory: &Path, how: impl FnOnce(&mut Manifest) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let path = directory.join(MANIFEST);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut manifest = Manifest::from_toml(&text, &path)?;
    how(&mut manifest)?;
    manifest.validate()?;
    write_atomically(&path, manifest.to_toml()?.as_bytes())
}

/// Rewrites the `[lift]` table of a bundle from what was measured.
///
/// # Errors
/// A manifest that cannot be read or written, or has no such table.
pub(super) fn calibrate(
    directory: &Path,
    odometry: Regime,
    present: &[Outcome],
    absent: &[Absent],
) -> anyhow::Result<()> {
    change(directory, |manifest| {
        let lift = manifest.lift.as_mut().context("the bundle has no [lift] table to be calibrated")?;
        match odometry {
            Regime::None => calibrated_without_odometry(lift, present),
            _ => calibrated(lift, present, absent),
        }
        Ok(())
    })
}

/// Rewrites what witnesses share and what the variances are multiplied by, and nothing else, so that the 90 % ellipse holds
/// 90 % of true goals: with odometry of all kinds together, as nearly as can be with each of them, and without.
///
/// # Errors
/// As [`calibrate`].
pub(super) fn calibrate_scales(directory: &Path, measured: &[(Regime, Vec<Outcome>)]) -> anyhow::Result<()> {
    change(directory, |manifest| {
        let lift = manifest.lift.as_mut().context("the bundle has no [lift] table to be calibrated")?;
        let now = (lift.variance_scale, lift.shared_sigma_m.unwrap_or(0.0));
        let posed: Vec<Vec<Miss>> = measured
            .iter()
            .filter(|(regime, _)| *regime != Regime::None)
            .map(|(_, outcomes)| misses(outcomes, now))
            .collect();
        let all = posed.concat();
        // The furthest of the kinds from 90 %, by what they share (mm) and the scale that it asks for.
        let furthest = |shared: f64| {
            let scale = scale_for(&all, shared)?;
            let off = |misses: &Vec<Miss>| (held(misses, scale, shared) - 0.9).abs();
            Some((posed.iter().map(off).fold(0.0, f64::max), scale, shared))
        };
        let choices = (0..=SHARED_MAX_MM).filter_map(|mm| furthest(f64::from(mm) * 1e-3));
        if let Some((_, scale, shared)) = choices.min_by(|a, b| a.0.total_cmp(&b.0)) {
            lift.variance_scale = clamped(scale);
            lift.shared_sigma_m = (shared > 0.0).then_some(shared);
        }
        let shared = lift.shared_sigma_m.unwrap_or(0.0);
        if let Some(spreads) = &mut lift.without_odometry {
            let blind = measured.iter().filter(|(regime, _)| *regime == Regime::None);
            let now = (spreads.variance_scale, now.1);
            let all: Vec<Miss> = blind.flat_map(|(_, outcomes)| misses(outcomes, now)).collect();
            spreads.variance_scale = scale_for(&all, shared).map_or(spreads.variance_scale, clamped);
        }
        Ok(())
    })
}

/// Witnesses share at most this much, millimetres.
const SHARED_MAX_MM: u32 = 100;

/// One answer beside the truth.
#[derive(Clone, Copy)]
struct Miss {
    /// How far the answer is off, squared (m²).
    squared_m: f64,
    /// Its variance before it was scaled and what is shared was added (m²).
    variance: f64,
}

/// Answers that were given with this scale and this shared deviation.
fn misses<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>, (scale, shared): (f64, f64)) -> Vec<Miss> {
    let of = |o: &Outcome| {
        let squared_m = o.answer?[1].powi(2);
        let variance = (squared_m / o.squared_spreads? - shared.powi(2)) / scale;
        (variance > 0.0).then_some(Miss { squared_m, variance })
    };
    outcomes.into_iter().filter_map(of).collect()
}

/// What variances must be multiplied by so that nine in ten true places lie inside the 90 % ellipse; none of no answers.
fn scale_for(misses: &[Miss], shared: f64) -> Option<f64> {
    let wanted = |m: &Miss| (m.squared_m / ELLIPSE_90 - shared.powi(2)) / m.variance;
    let mut scales: Vec<f64> = misses.iter().map(wanted).collect();
    scales.sort_by(f64::total_cmp);
    scales.get(scales.len() * 9 / 10).copied()
}

/// The share of true places inside the 90 % ellipse.
fn held(misses: &[Miss], scale: f64, shared: f64) -> f64 {
    let inside = |m: &&Miss| m.squared_m <= ELLIPSE_90 * (scale * m.variance + shared.powi(2));
    misses.iter().filter(inside).count() as f64 / misses.len().max(1) as f64
}

/// The scale after answers that were given with this one.
fn rescaled(seen: &[&Outcome], scale: f64, shared: Option<f64>) -> f64 {
    let shared = shared.unwrap_or(0.0);
    scale_for(&misses(seen.iter().copied(), (scale, shared)), shared).map_or(scale, clamped)
}

/// A scale of variances that a bundle may hold.
fn clamped(scale: f64) -> f64 {
    rounded(scale.clamp(0.05, 20.0))
}

/// To three digits after the point.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// The spreads for a robot without odometry, and nothing else.
fn calibrated_without_odometry(lift: &mut LiftParams, present: &[Outcome]) {
    let now = lift.unposed();
    let seen: Vec<&Outcome> = present.iter().filter(|o| o.mask_max >= lift.mask_present).collect();
    // The median distance of a planar normal error is 1.1774 sigma, that of a heading 0.6745.
    let middle = |get: &dyn Fn(&Outcome) -> Option<f64>, share: f64, before: f64| {
        let mut v: Vec<f64> = seen.iter().filter_map(|o| get(o)).collect();
        if v.is_empty() { before } else { rounded(median(&mut v) / share) }
    };
    lift.without_odometry = Some(Spreads {
        plan_sigma_m: middle(&|o| o.object[0], 1.1774, now.plan_sigma_m),
        memory_sigma_m: middle(&|o| o.object[1], 1.1774, now.memory_sigma_m),
        yaw_sigma_rad: middle(&|o| o.answer.map(|e| e[0].to_radians()), 0.6745, now.yaw_sigma_rad),
        variance_scale: rescaled(&seen, now.variance_scale, now.shared_sigma_m),
    });
}

fn calibrated(lift: &mut LiftParams, present: &[Outcome], absent: &[Absent]) {
    // The threshold that tells present from absent best (balanced accuracy).
    let mut cuts: Vec<f64> =
        present.iter().map(|o| o.mask_max).chain(absent.iter().map(|o| o.mask_max)).collect();
    cuts.sort_by(f64::total_cmp);
    let score = |c: f64| {
        let hit = present.iter().filter(|o| o.mask_max >= c).count() as f64 / present.len().max(1) as f64;
        let miss = absent.iter().filter(|o| o.mask_max < c).count() as f64 / absent.len().max(1) as f64;
        hit + miss
    };
    let best = cuts.iter().copied().max_by(|a, b| score(*a).total_cmp(&score(*b))).unwrap_or(0.0);
    lift.mask_present = rounded(best);
    lift.mask_vote = rounded(best - 1.0);
    // Robust spreads: the median distance of a planar normal error is 1.1774 sigma.
    let seen: Vec<&Outcome> = present.iter().filter(|o| o.mask_max >= best).collect();
    let sigmas = [&mut lift.plan_sigma_m, &mut lift.memory_sigma_m, &mut lift.rollout_sigma_m];
    for (i, sigma) in sigmas.into_iter().enumerate() {
        let mut v: Vec<f64> = seen.iter().filter_map(|o| o.object[i]).collect();
        if !v.is_empty() {
            *sigma = rounded(median(&mut v) / 1.1774);
        }
    }
    if let Some(registration) = &mut lift.registration {
        calibrate_registration(registration, &seen);
    }
    // Agreement and consistency: what nearly all goals that were located well reach.
    let well: Vec<&&Outcome> = seen.iter().filter(|o| o.object[1].is_some_and(|e| e < 0.4)).collect();
    let mut apart: Vec<f64> = well.iter().filter_map(|o| o.disagreement).collect();
    apart.sort_by(f64::total_cmp);
    if let Some(p) = apart.get(apart.len().saturating_sub(1).min(apart.len() * 96 / 100)) {
        lift.agree_max = rounded(WIDER * p);
    }
    let mut consistency: Vec<f64> = well.iter().filter_map(|o| o.consistency).collect();
    consistency.sort_by(f64::total_cmp);
    if let Some(p) = consistency.get(consistency.len() * 2 / 100) {
        lift.consistency_min = rounded(p / WIDER.powi(2));
    }
    let mut yaw: Vec<f64> = seen.iter().filter_map(|o| o.answer).map(|e| e[0].to_radians()).collect();
    if !yaw.is_empty() {
        lift.yaw_sigma_rad = rounded(median(&mut yaw) / 0.6745);
    }
    // The share of true places inside the 90 % ellipse comes out right; a second calibration settles it, since the
    // spreads above are new.
    lift.variance_scale = rescaled(&seen, lift.variance_scale, lift.shared_sigma_m);
    // Nearly all houses are of the kind that was trained on; half as much again is not.
    let mut codec: Vec<f64> = present.iter().filter_map(|o| o.reconstruction_error).collect();
    if !codec.is_empty() {
        lift.reconstruction_max = Some(rounded(WIDER * quantile_of(&mut codec, 0.995)));
    }
    let mut places: Vec<f64> = present.iter().filter_map(|o| o.localisation_m).collect();
    if !places.is_empty() {
        let middle = median(&mut places);
        lift.localisation_sigma_m = rounded(WIDER.powi(2) * middle);
        lift.localisation_max_m = rounded(2.0 * WIDER * places[places.len() * 98 / 100]);
    }
}

/// What is explained worse than nearly all right drives, with this factor, is not believed. Little, since drives of other
/// rooms are not far away.
const DRIVE_WIDER: f64 = 1.12;

/// What registration of right drives is worth: of those that end at the named thing.
fn calibrate_registration(registration: &mut RegistrationParams, seen: &[&Outcome]) {
    let right: Vec<&&Outcome> = seen
        .iter()
        .filter(|o| {
            o.object[2].is_some_and(|e| e < 0.4) && o.registered.is_some_and(|r| r.box_score.is_some())
        })
        .collect();
    if right.is_empty() {
        return;
    }
    let sorted = |get: &dyn Fn(&Outcome) -> Option<f64>| {
        let mut values: Vec<f64> = right.iter().filter_map(|o| get(o)).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let at = |values: &[f64], percent: usize| values.get(values.len() * percent / 100).copied();
    let limit = |get: &dyn Fn(&Registered) -> Option<f64>| {
        at(&sorted(&|o| get(o.registered.as_ref()?)), 99).map(|v| rounded(DRIVE_WIDER * v).min(1.0))
    };
    let set = |into: &mut f64, value: Option<f64>| {
        if let Some(value) = value.filter(|v| *v > 0.0) {
            *into = value;
        }
    };
    // 90 % of a planar normal error lie within 2.146 standard deviations: its tail counts, small pictures of bare walls are
    // placed less well than most.
    set(&mut registration.sigma_m, at(&sorted(&|o| o.object[2]), 90).map(|v| rounded(v / 2.146)));
    let heading = sorted(&|o| o.drive.map(|e| e[0].to_radians()));
    set(&mut registration.yaw_sigma_rad, at(&heading, 50).map(|v| rounded(v / 0.6745)));
    set(&mut registration.end_error_max, limit(&|r| Some(r.end_error)));
    set(&mut registration.way_error_max, limit(&|r| Some(r.way_error)));
    set(&mut registration.thing_error_max, limit(&|r| r.thing_error));
    set(&mut registration.agree_max, at(&sorted(&|o| o.drive_apart), 98).map(rounded));
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::outcome;
    use super::*;

    #[test]
    fn calibration_by_hand() {
        // Four present things are seen more clearly than any of the absent ones.
        let mut present: Vec<Outcome> = Vec::new();
        for k in 0..4 {
            let n = f64::from(k) + 1.0;
            let mut o = outcome(2.0 + n, 0.2 * n);
            o.object = [Some(0.11774 * n), Some(0.11774), Some(1.1774)];
            o.disagreement = Some(n);
            o.answer = Some([6.745, 0.1]);
            o.squared_spreads = Some([1.0, 2.0, 3.0, 9.21][k as usize]);
            o.localisation_m = Some(0.1 * n);
            o.reconstruction_error = Some(0.01 * n);
            present.push(o);
        }
        let absent = [0.0, 1.0, 2.0].map(Absent::with_mask);
        let mut lift = LiftParams::uncalibrated();
        calibrated(&mut lift, &present, &absent);
        for (key, got, wanted) in [
            // The least clear sight of a present thing; votes count from one below.
            ("mask_present", lift.mask_present, 3.0),
            ("mask_vote", lift.mask_vote, 2.0),
            // A planar normal error has its median at 1.1774 standard deviations; the upper one of two middle values.
            ("plan_sigma_m", lift.plan_sigma_m, 0.3),
            ("memory_sigma_m", lift.memory_sigma_m, 0.1),
            ("rollout_sigma_m", lift.rollout_sigma_m, 1.0),
            // The largest disagreement, half as much again; the least consistency, divided by 1.5 squared.
            ("agree_max", lift.agree_max, 6.0),
            ("consistency_min", lift.consistency_min, 0.089),
            // The median of a normal's absolute error is 0.6745 standard deviations: 10 degrees.
            ("yaw_sigma_rad", lift.yaw_sigma_rad, 0.175),
            // 9.21 is twice 4.605.
            ("variance_scale", lift.variance_scale, 2.0),
            ("localisation_sigma_m", lift.localisation_sigma_m, 0.675),
            ("localisation_max_m", lift.localisation_max_m, 1.2),
        ] {
            assert!((got - wanted).abs() < 1e-9, "{key} = {got} instead of {wanted}");
        }
        assert_eq!(lift.reconstruction_max, Some(0.06));
        // Without odometry only its own spreads change.
        let mut unposed = lift.clone();
        calibrated_without_odometry(&mut unposed, &present);
        let spreads = unposed.without_odometry.take().expect("measured");
        assert_eq!(unposed, lift);
        let Spreads { plan_sigma_m, memory_sigma_m, yaw_sigma_rad, variance_scale } = spreads;
        assert_eq!((plan_sigma_m, memory_sigma_m, yaw_sigma_rad), (0.3, 0.1, 0.175));
        assert_eq!(variance_scale, 4.0, "twice the scale of before");
        // A second calibration starts from the first one's scale.
        calibrated(&mut lift, &present, &absent);
        assert_eq!(lift.variance_scale, 4.0);
    }
    #[test]
    fn what_witnesses_share_is_told_from_their_own_spread() {
        let dir = tempfile::tempdir().expect("a directory");
        let bundle = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny/bundle.toml");
        let text = std::fs::read_to_string(bundle).expect("the shipped bundle");
        let mut before = Manifest::from_toml(&text, Path::new(MANIFEST)).expect("a manifest");
        let lift = before.lift.as_mut().expect("it has lift heads");
        (lift.variance_scale, lift.shared_sigma_m) = (0.5, Some(0.03));
        lift.without_odometry.as_mut().expect("it was measured").variance_scale = 1.0;
        std::fs::write(dir.path().join(MANIFEST), before.to_toml().expect("a document"))
            .expect("it is written");
        // Planar normal errors of variance `scale * own + 0.04^2`, at their quantiles; published with the bundle's figures.
        let answers = |own: f64, scale: f64, published: f64| -> Vec<Outcome> {
            let one = |k: u32| {
                let squared_m = -2.0 * (1.0 - (f64::from(k) + 0.5) / 200.0).ln() * (scale * own + 0.0016);
                let squared_spreads = Some(squared_m / (published * own + 0.0009));
                Outcome { answer: Some([0.0, squared_m.sqrt()]), squared_spreads, ..outcome(9.0, 0.1) }
            };
            (0..200).map(one).collect()
        };
        let measured = [
            (Regime::Exact, answers(0.0004, 1.0, 0.5)),
            (Regime::Five, answers(0.0040, 1.0, 0.5)),
            (Regime::None, answers(0.0040, 2.0, 1.0)),
        ];
        calibrate_scales(dir.path(), &measured).expect("it is calibrated");
        let text = std::fs::read_to_string(dir.path().join(MANIFEST)).expect("it is there");
        let mut after = Manifest::from_toml(&text, Path::new(MANIFEST)).expect("a manifest");
        let lift = after.lift.as_mut().expect("it has lift heads");
        let blind = lift.without_odometry.as_mut().expect("it was measured");
        let near = |got: f64, wanted: f64, by: f64| assert!((got - wanted).abs() < by, "{got}, not {wanted}");
        near(lift.shared_sigma_m.expect("measured"), 0.04, 0.003);
        near(lift.variance_scale, 1.0, 0.05);
        near(blind.variance_scale, 2.0, 0.1);
        // Nothing else has changed.
        (lift.variance_scale, lift.shared_sigma_m, blind.variance_scale) = (0.5, Some(0.03), 1.0);
        assert_eq!(after.lift, before.lift);
    }
}
