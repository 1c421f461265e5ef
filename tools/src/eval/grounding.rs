//! `eval grounding`.

mod figures;
mod goal;
mod render;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use serde_json::{Value, json};

use self::figures::{Figures, Summary, counts, refused};
use self::goal::{Absent, AbsentKind, Setup, absent_goal, present_goal};
use super::picture::Lpips;
use super::report::write_atomically;
use super::visit::{Bench, CommonArgs};

pub use self::goal::{Outcome, ROWS, Reached, Row};

/// Arguments of `eval grounding`.
#[derive(clap::Args, Debug, Clone)]
pub struct GroundingArgs {
    /// Shared arguments.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Only ask for things that are not there, and report how often a pose is given all the same.
    #[arg(long)]
    pub absent: bool,
    /// Only the model's own figures: no examiner (so no SD), no controls, no absent names.
    #[arg(long, conflicts_with_all = ["absent", "calibrate"])]
    pub quick: bool,
    /// Candidates per goal instead of the runtime's.
    #[arg(long)]
    pub candidates: Option<u32>,
    /// Measure the `[lift]` table on these houses and write it into this bundle directory.
    #[arg(long)]
    pub calibrate: Option<PathBuf>,
    /// Write the model's figures into the `[evaluation]` table of this bundle directory.
    #[arg(long, value_name = "BUNDLE", conflicts_with_all = ["absent", "quick", "calibrate"])]
    pub store: Option<PathBuf>,
    /// Write a picture of the first houses' imaginations.
    #[arg(long)]
    pub sheet: Option<PathBuf>,
}

/// Runs `eval grounding`.
///
/// # Errors
/// A bundle or a file that cannot be used.
pub fn run(args: &GroundingArgs) -> anyhow::Result<ExitCode> {
    let bench = Bench::new(&args.common)?;
    let lpips = args.common.lpips.as_deref().map(Lpips::open).transpose()?;
    let began = Instant::now();
    let examiner = if args.quick || args.absent { None } else { Some(bench.examiner(&args.common)?) };
    let examiner_secs = began.elapsed().as_secs_f64();
    let setup = Setup { bench: &bench, args, examiner: examiner.as_ref(), lpips: lpips.as_ref() };
    let absent_of = |kind: AbsentKind| -> anyhow::Result<Vec<Absent>> {
        let all = bench.each(&args.common, |tools, seed| absent_goal(&setup, tools, seed, kind))?;
        Ok(all.into_iter().flatten().collect())
    };
    let (absent, swapped) = if args.quick {
        (Vec::new(), Vec::new())
    } else {
        (absent_of(AbsentKind::Any)?, absent_of(AbsentKind::Swapped)?)
    };
    if args.absent {
        print_absent(&bench, &args.common, &absent, &swapped, began.elapsed().as_secs_f64());
        return Ok(ExitCode::SUCCESS);
    }
    let results = bench.each(&args.common, |tools, seed| present_goal(&setup, tools, seed))?;
    if let Some(path) = &args.sheet {
        render::sheet(path, &results, &bench)?;
    }
    let outcomes: Vec<Outcome> = results.into_iter().map(|(o, _)| o).collect();
    if let Some(directory) = &args.calibrate {
        calibrate(directory, &outcomes, &absent)?;
    }
    let figures = Figures::of(&outcomes, &absent, &swapped, examiner.as_ref().map(|e| e.quality));
    let model = model_figures(&figures)?;
    if let Some(directory) = &args.store {
        store(directory, &args.common, bench.pipeline.bundle().hash(), &model)?;
    }
    let secs = began.elapsed().as_secs_f64();
    let head = format!(
        "Grounding: {} houses ({}) from seed {}, bundle {}, {:.0} s. 95 % intervals in brackets.\n\n",
        args.common.houses,
        args.common.difficulty,
        args.common.seed,
        bench.pipeline.bundle().hash(),
        secs
    );
    let text = render::markdown(&head, &figures, lpips.is_some(), examiner_secs);
    if let Some(path) = &args.common.markdown {
        write_atomically(path, text.as_bytes())?;
    }
    if args.common.json {
        let rows: BTreeMap<&str, &Summary> = figures.rows.iter().map(|(key, _, s)| (*key, s)).collect();
        let document = json!({
            "figures": model,
            "rows": rows,
            "rulers": figures.rulers,
            "goal_pose": figures.poses,
            "parts": figures.parts,
            "statuses": counts(outcomes.iter().map(|o| o.status)),
            "absent_statuses": counts(absent.iter().map(|o| o.status)),
            "swapped_statuses": counts(swapped.iter().map(|o| o.status)),
            "examiner": figures.examiner,
            "sd_tells_rooms_apart_auc": figures.sd_tells_rooms_apart,
            "lpips": if lpips.is_some() { "given" } else { "left out: no --lpips" },
            "seconds": secs,
            "examiner_seconds": examiner_secs,
            "outcomes": outcomes,
            "absent": absent,
            "swapped": swapped,
        });
        println!("{}", with_run(document, &bench, &args.common));
    } else {
        print!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}

/// A document with what it was measured on.
fn with_run(mut document: Value, bench: &Bench, args: &CommonArgs) -> Value {
    if let Some(map) = document.as_object_mut() {
        map.insert("bundle".into(), bench.pipeline.bundle().hash().into());
        map.insert("houses".into(), args.houses.into());
        map.insert("seed".into(), args.seed.into());
        map.insert("difficulty".into(), args.difficulty.clone().into());
    }
    document
}

fn print_absent(bench: &Bench, args: &CommonArgs, absent: &[Absent], swapped: &[Absent], secs: f64) {
    if args.json {
        let document = json!({
            "refused": refused(absent),
            "statuses": counts(absent.iter().map(|o| o.status)),
            "swapped_refused": refused(swapped),
            "swapped_statuses": counts(swapped.iter().map(|o| o.status)),
            "seconds": secs,
        });
        println!("{}", with_run(document, bench, args));
    } else {
        println!("asked for absent things: refused {}", refused(absent).text(3));
        println!("colour of one thing, shape of another: refused {}", refused(swapped).text(3));
    }
}

/// The model's row and the gate, each figure under its plain name.
fn model_figures(figures: &Figures) -> serde_json::Result<Value> {
    let mut out = serde_json::to_value(&figures.rows[0].2)?;
    if let Some(map) = out.as_object_mut() {
        for (name, figure) in &figures.gate {
            map.insert((*name).to_owned(), serde_json::to_value(figure)?);
        }
    }
    Ok(out)
}

/// 90 % of a planar normal lie within this squared Mahalanobis distance.
const ELLIPSE_90: f64 = 4.605;

/// Writes figures as `name = [value, low, high]` into the `[evaluation.grounding]` table of a bundle.
fn store(
    directory: &Path,
    args: &CommonArgs,
    bundle: &str,
    figures: &serde_json::Value,
) -> anyhow::Result<()> {
    let mut table = toml::Table::new();
    for (name, figure) in figures.as_object().into_iter().flatten() {
        let ends = ["value", "low", "high"].map(|k| figure.get(k).and_then(serde_json::Value::as_f64));
        if let [Some(value), Some(low), Some(high)] = ends {
            let rounded = [value, low, high].map(|v| toml::Value::Float((v * 1e4).round() / 1e4));
            table.insert(name.clone(), toml::Value::Array(rounded.to_vec()));
        }
    }
    let command = format!(
        "mindseye-tools eval grounding --houses {} --seed {} --difficulty {}",
        args.houses, args.seed, args.difficulty
    );
    table.insert("command".into(), command.into());
    // The hash is that of the manifest, which changes with this table.
    table.insert("measured_bundle".into(), bundle.into());
    change(directory, |manifest| {
        manifest.evaluation.insert("grounding".into(), table.into());
    })
}

/// Changes the manifest of a bundle.
fn change(directory: &Path, how: impl FnOnce(&mut mindseye_engines::bundle::Manifest)) -> anyhow::Result<()> {
    let path = directory.join(mindseye_engines::bundle::MANIFEST);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut manifest = toml::from_str(&text).with_context(|| path.display().to_string())?;
    how(&mut manifest);
    write_atomically(&path, toml::to_string_pretty(&manifest)?.as_bytes())
}

/// Rewrites the `[lift]` table of a bundle from what was measured.
fn calibrate(directory: &Path, present: &[Outcome], absent: &[Absent]) -> anyhow::Result<()> {
    change(directory, |manifest| calibrated(&mut manifest.lift, present, absent))
}

fn calibrated(lift: &mut BTreeMap<String, f64>, present: &[Outcome], absent: &[Absent]) {
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
    lift.insert("mask_present".into(), (best * 1e3).round() / 1e3);
    lift.insert("mask_vote".into(), ((best - 1.0) * 1e3).round() / 1e3);
    // Robust spreads: the median distance of a planar normal error is 1.1774 sigma.
    let seen: Vec<&Outcome> = present.iter().filter(|o| o.mask_max >= best).collect();
    for (i, key) in ["plan_sigma_m", "memory_sigma_m", "drive_sigma_m"].into_iter().enumerate() {
        let mut v: Vec<f64> = seen.iter().filter_map(|o| o.object[i]).collect();
        if !v.is_empty() {
            lift.insert(key.into(), (mindseye_base::stats::median(&mut v) / 1.1774 * 1e3).round() / 1e3);
        }
    }
    // Agreement and consistency: what nearly all goals that were located well reach. Robots' cameras and odometry are
    // worse than these clean views, so what decides about withholding is wider than what is seen here.
    const WIDER: f64 = 1.5;
    let well: Vec<&&Outcome> = seen.iter().filter(|o| o.object[1].is_some_and(|e| e < 0.4)).collect();
    let mut apart: Vec<f64> = well.iter().filter_map(|o| o.disagreement).collect();
    apart.sort_by(f64::total_cmp);
    if let Some(p) = apart.get(apart.len().saturating_sub(1).min(apart.len() * 96 / 100)) {
        lift.insert("agree_max".into(), (WIDER * p * 1e3).round() / 1e3);
    }
    let mut consistency: Vec<f64> = well.iter().filter_map(|o| o.consistency).collect();
    consistency.sort_by(f64::total_cmp);
    if let Some(p) = consistency.get(consistency.len() * 2 / 100) {
        lift.insert("consistency_min".into(), (p / WIDER.powi(2) * 1e3).round() / 1e3);
    }
    let mut yaw: Vec<f64> = seen.iter().filter_map(|o| o.answer).map(|e| e[0].to_radians()).collect();
    if !yaw.is_empty() {
        lift.insert(
            "yaw_sigma_rad".into(),
            (mindseye_base::stats::median(&mut yaw) / 0.6745 * 1e3).round() / 1e3,
        );
    }
    // The share of true places inside the 90 % ellipse comes out right; a second calibration settles it, since the
    // spreads above are new.
    let mut spreads: Vec<f64> = seen.iter().filter_map(|o| o.squared_spreads).collect();
    spreads.sort_by(f64::total_cmp);
    if let Some(d) = spreads.get(spreads.len() * 9 / 10) {
        let scale = lift.get("variance_scale").copied().unwrap_or(1.0) * d / ELLIPSE_90;
        lift.insert("variance_scale".into(), (scale.clamp(0.05, 20.0) * 1e3).round() / 1e3);
    }
    let mut places: Vec<f64> = present.iter().filter_map(|o| o.localisation_m).collect();
    if !places.is_empty() {
        let middle = mindseye_base::stats::median(&mut places);
        lift.insert("localisation_sigma_m".into(), (WIDER.powi(2) * middle * 1e3).round() / 1e3);
        lift.insert(
            "localisation_max_m".into(),
            (2.0 * WIDER * places[places.len() * 98 / 100] * 1e3).round() / 1e3,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::figures::tests::outcome;
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
            present.push(o);
        }
        let absent = [0.0, 1.0, 2.0].map(|m| Absent::with_mask(m));
        let mut lift = BTreeMap::new();
        calibrated(&mut lift, &present, &absent);
        for (key, wanted) in [
            // The least clear sight of a present thing; votes count from one below.
            ("mask_present", 3.0),
            ("mask_vote", 2.0),
            // A planar normal error has its median at 1.1774 standard deviations; the upper one of two middle values.
            ("plan_sigma_m", 0.3),
            ("memory_sigma_m", 0.1),
            ("drive_sigma_m", 1.0),
            // The largest disagreement, half as much again; the least consistency, divided by 1.5 squared.
            ("agree_max", 6.0),
            ("consistency_min", 0.089),
            // The median of a normal's absolute error is 0.6745 standard deviations: 10 degrees.
            ("yaw_sigma_rad", 0.175),
            // 9.21 is twice 4.605.
            ("variance_scale", 2.0),
            ("localisation_sigma_m", 0.675),
            ("localisation_max_m", 1.2),
        ] {
            let got = lift.get(key).copied().unwrap_or(f64::NAN);
            assert!((got - wanted).abs() < 1e-9, "{key} = {got} instead of {wanted}");
        }
        // A second calibration starts from the first one's scale.
        calibrated(&mut lift, &present, &absent);
        assert_eq!(lift["variance_scale"], 4.0);
    }
}
