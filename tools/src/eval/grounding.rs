//! `eval grounding`.

mod adds;
mod calibrate;
mod figures;
mod goal;
mod html;
mod odometry;
mod render;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};

use self::calibrate::{calibrate, calibrate_scales, store};
use self::figures::{Figures, Summary, counts, refused};
use self::goal::{Absent, AbsentKind, Setup, absent_goal, present_goal};
use super::picture::Lpips;
use super::report::write_atomically;
use super::visit::{Bench, CommonArgs};

pub use self::goal::{Outcome, ROWS, Reached, Row};
pub use self::odometry::Regime;
pub(in crate::eval) use self::odometry::Told;
use self::odometry::{RegimeRow, table};

/// Arguments of `eval grounding`.
#[derive(clap::Args, Debug, Clone)]
pub struct GroundingArgs {
    /// Shared arguments.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Only ask for things that are not there, and report how often a pose is given all the same.
    #[arg(long)]
    pub absent: bool,
    /// Only the model's own figures: no examiner (so no SD), no controls, no absent names (but those that --calibrate
    /// needs).
    #[arg(long, conflicts_with = "absent")]
    pub quick: bool,
    /// With --quick: destroyed drives too.
    #[arg(long, requires = "quick")]
    pub destroyed: bool,
    /// Every named thing is moved before the goal is given: 1.5 m or more, in its room. All figures hold the answer against
    /// where it is now.
    #[arg(long, conflicts_with_all = ["absent", "store", "calibrate"])]
    pub moved: bool,
    /// Candidates per goal instead of the runtime's.
    #[arg(long)]
    pub candidates: Option<u32>,
    /// What the runtime is told of the robot's motion.
    #[arg(long, value_enum, default_value = "exact")]
    pub odometry: Regime,
    /// Every kind of odometry, one table; with no other figures. With --calibrate only what the variances are multiplied by
    /// is measured: one figure for all kinds of odometry, one for none.
    #[arg(long, conflicts_with_all = ["odometry", "absent", "store", "sheet"])]
    pub regimes: bool,
    /// Measure the `[lift]` table on these houses and write it into this bundle directory.
    #[arg(long)]
    pub calibrate: Option<PathBuf>,
    /// Write the model's figures into the `[evaluation]` table of this bundle directory.
    #[arg(long, value_name = "BUNDLE", conflicts_with_all = ["absent", "quick", "calibrate"])]
    pub store: Option<PathBuf>,
    /// Write a picture of the first houses' imaginations.
    #[arg(long)]
    pub sheet: Option<PathBuf>,
    /// Write the figures as one HTML file, in which every house is a row that opens.
    #[arg(long, value_name = "HTML", conflicts_with_all = ["absent", "regimes"])]
    pub report: Option<PathBuf>,
}

/// Runs `eval grounding`. Long, since the document and the text name every figure once.
///
/// # Errors
/// A bundle or a file that cannot be used.
pub fn run(args: &GroundingArgs) -> anyhow::Result<ExitCode> {
    let bench = Bench::new(&args.common)?;
    bench.knows_things()?;
    if args.regimes {
        return regimes(&bench, args);
    }
    let lpips = args.common.lpips.as_deref().map(Lpips::open).transpose()?;
    let began = Instant::now();
    let examiner = if args.quick || args.absent { None } else { Some(bench.examiner(&args.common)?) };
    let examiner_secs = began.elapsed().as_secs_f64();
    let setup = Setup { bench: &bench, args, examiner: examiner.as_ref(), lpips: lpips.as_ref() };
    let absent_of = |kind: AbsentKind| -> anyhow::Result<Vec<Absent>> {
        let all = bench.each(&args.common, |tools, seed| absent_goal(&setup, tools, seed, kind))?;
        Ok(all.into_iter().flatten().collect())
    };
    let (absent, swapped) = if args.quick && args.calibrate.is_none() {
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
    let outcomes: Vec<Outcome> = results.iter().map(|(o, _)| o.clone()).collect();
    if let Some(directory) = &args.calibrate {
        let not_there = [&absent[..], &swapped[..]].concat();
        calibrate(directory, args.odometry, &outcomes, &not_there)?;
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
    if let Some(path) = &args.report {
        html::report(path, &text, &results)?;
    }
    if args.common.json {
        let rows: BTreeMap<&str, &Summary> = figures.rows.iter().map(|(key, _, s)| (*key, s)).collect();
        let document = json!({
            "figures": model,
            "rows": rows,
            "rulers": figures.rulers,
            "goal_pose": figures.poses,
            "parts": figures.parts,
            "what_imagination_adds": figures.added,
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

/// Runs `eval grounding --regimes`.
fn regimes(bench: &Bench, args: &GroundingArgs) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    let mut all = BTreeMap::new();
    let mut measured = Vec::new();
    for odometry in Regime::ALL {
        let args = GroundingArgs { odometry, quick: true, ..args.clone() };
        let setup = Setup { bench, args: &args, examiner: None, lpips: None };
        let results = bench.each(&args.common, |tools, seed| present_goal(&setup, tools, seed))?;
        let outcomes: Vec<Outcome> = results.into_iter().map(|(o, _)| o).collect();
        rows.push(RegimeRow::of(odometry, &outcomes));
        measured.push((odometry, outcomes.clone()));
        all.insert(serde_json::to_value(odometry)?.as_str().unwrap_or_default().to_owned(), outcomes);
    }
    if let Some(directory) = &args.calibrate {
        calibrate_scales(directory, &measured)?;
    }
    if let Some(path) = &args.common.markdown {
        write_atomically(path, table(&rows).as_bytes())?;
    }
    if args.common.json {
        let document = json!({ "regimes": rows, "outcomes": all });
        println!("{}", with_run(document, bench, &args.common));
    } else {
        print!("{}", table(&rows));
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
