//! `mindseye-tools train`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use mindseye_train::clips::Clips;
use mindseye_train::config::{Kind, TrainConfig};
use mindseye_train::depth::{DepthMetrics, DepthTrainConfig, DepthTrainer};
use mindseye_train::evaluation::{Eval, Sharpness};
use mindseye_train::family::HouseModel;
use mindseye_train::trainer::{Metrics, OpenOptions, Trainer};

use crate::clips;

/// Arguments of `train`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools train configs/train/house-tiny.toml --out runs/house-tiny\n\
                        Run it again to go on after a stop (Ctrl-C, kill, full disk): the run is the same as if it had \
                        not stopped. metrics.jsonl and curve.png are in the directory.\n\
                        With [data] kind = \"clips\", path = \"DIR\" it trains on recorded videos, such as those that \
                        curate writes. A configuration with a table [depth] trains the depth reader.")]
pub struct TrainArgs {
    /// Training configuration (TOML).
    pub config: PathBuf,
    /// Directory of the run: checkpoint, metrics, curve.
    #[arg(long)]
    pub out: PathBuf,
    /// Begin with the weights of this bundle instead of fresh ones.
    #[arg(long, value_name = "BUNDLE")]
    pub init: Option<PathBuf>,
    /// Stop after this step, as if interrupted, whatever the configuration says.
    #[arg(long)]
    pub until: Option<u64>,
    /// Only decode the clips of the configuration and say what there is; nothing is trained.
    #[arg(long)]
    pub prepare: bool,
    /// Go on from a checkpoint that was written with another configuration or other data.
    #[arg(long)]
    pub other_configuration: bool,
    /// Print the last metrics (with --prepare: what there is) as one JSON document at the end.
    #[arg(long)]
    pub json: bool,
}

/// Exit status after Ctrl-C or SIGTERM.
const INTERRUPTED: u8 = 130;

/// Sets the flag on Ctrl-C or SIGTERM; the second time the process ends at once.
fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let flag = Arc::new(AtomicBool::new(false));
    let shared = flag.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("signals")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("signals")?,
            signal(SignalKind::terminate()).context("signals")?,
        )
    };
    let wait = move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if shared.swap(true, Ordering::Relaxed) {
                    std::process::exit(i32::from(INTERRUPTED));
                }
                eprintln!("stopping after this pass; once more to stop at once");
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).context("signals")?;
    Ok(flag)
}

/// The clips of a configuration, if it asks for any.
fn open_clips(
    args: &TrainArgs,
    config: &TrainConfig,
    model: &HouseModel,
    stop: &AtomicBool,
) -> anyhow::Result<Option<(Clips, clips::Report)>> {
    if config.data.kind != Kind::Clips {
        return Ok(None);
    }
    let base = args.config.parent().unwrap_or(Path::new("."));
    let cache = if config.data.cache.as_os_str().is_empty() {
        args.out.join("images")
    } else {
        base.join(&config.data.cache)
    };
    let dir = base.join(&config.data.path);
    let (clips, report) =
        clips::prepare(&dir, &cache, model, &config.data, stop, &mut |line| eprintln!("{line}"))?;
    for line in report.lines() {
        eprintln!("{line}");
    }
    for problem in &report.problems {
        eprintln!("  {problem}");
    }
    Ok(Some((clips, report)))
}

/// Runs `train`.
///
/// # Errors
/// A configuration or checkpoint that cannot be used, a loss that is no number, a full disk.
pub fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    if DepthTrainConfig::is_meant(&args.config) {
        return run_depth(args);
    }
    let (mut config, model) = TrainConfig::load(&args.config)?;
    let total = config.steps;
    let decays = config.clone();
    if let Some(until) = args.until {
        config.steps = config.steps.min(until);
        // The schedule is that of the whole run.
        config.decay_from = decays.decay_from;
    }
    let stop = stop_flag()?;
    let clips = open_clips(args, &config, &model, &stop)?;
    if args.prepare {
        if args.json {
            println!("{}", serde_json::to_string(&clips.map(|(_, report)| report))?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let teacher = match &config.distill {
        Some(distill) => {
            let bundle = args.config.parent().unwrap_or(Path::new(".")).join(&distill.teacher);
            Some(crate::retrain::weights_of(&bundle).context("distill.teacher")?)
        }
        None => None,
    };
    let options = OpenOptions {
        clips: clips.map(|(clips, _)| clips),
        teacher,
        other_configuration: args.other_configuration,
    };
    let mut trainer = Trainer::open_with(config, model, &args.out, options)?;
    trainer.schedule_steps(total);
    if let Some(bundle) = &args.init {
        let fresh = trainer.start_from(&crate::retrain::weights_of(bundle)?, bundle)?;
        let which = if fresh.is_empty() { "none".to_owned() } else { fresh.join(", ") };
        eprintln!("weights of {}; fresh are: {which}", bundle.display());
    }
    eprintln!("training {} from step {} to {total}", args.config.display(), trainer.state.step);
    let terminal = std::io::stderr().is_terminal();
    let mut last: Option<Metrics> = None;
    trainer.run(&stop, |m, rate| {
        let left = (total - m.step) as f64 * (m.samples as f64 / m.step.max(1) as f64) / rate.max(1e-9);
        let l = &m.losses;
        eprintln!(
            "{}step {} of {total}, {rate:.1} samples/s, {:.0} min left, loss {:.3} (video {:.4}, mask {:.3}, \
             poses {:.3} {:.3}, place {:.3}){}{}",
            if terminal { "\r" } else { "" },
            m.step,
            left / 60.0,
            l.total,
            l.video,
            l.mask,
            l.context_pose,
            l.target_pose,
            l.locate,
            m.eval.as_ref().map_or_else(String::new, unseen),
            m.held_out.map_or_else(String::new, |h| format!(
                "; held-out clips: loss {:.3} (video {:.4})",
                h.total, h.video
            )),
        );
        last = Some(m.clone());
    })?;
    mindseye_train::curve::plot(&args.out)?;
    if stop.load(Ordering::Relaxed) && trainer.state.step < trainer.config.steps {
        eprintln!("stopped after step {}; run the same command again to go on", trainer.state.step);
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if args.json
        && let Some(last) = last
    {
        println!("{}", serde_json::to_string(&last)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// What was measured on unseen houses.
fn unseen(e: &Eval) -> String {
    let pictures = |name: &str, s: Sharpness| {
        format!(", {name} {:.1} dB (worst frame {:.1})", s.psnr_db, s.psnr_worst_db)
    };
    format!(
        "; unseen houses: heading {:.1} deg, within 25 deg {:.2}, position {:.2} m, absent AUC {:.3}{}{}{}",
        e.mask_yaw_deg,
        e.mask_within_25,
        e.mask_position_m,
        e.absent_auc,
        pictures("pictures in one pass", e.paths),
        e.guided.map_or_else(String::new, |s| pictures("guided", s)),
        e.carried.map_or_else(String::new, |s| pictures("carried alone", s)),
    )
}

/// Trains the depth reader.
fn run_depth(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    if args.init.is_some() || args.prepare {
        bail!("{}: the depth reader begins with fresh weights and needs no preparing", args.config.display());
    }
    let mut config = DepthTrainConfig::load(&args.config)?;
    let total = config.steps;
    config.steps = config.steps.min(args.until.unwrap_or(total));
    let stop = stop_flag()?;
    let mut trainer = DepthTrainer::open(config, &args.out, args.other_configuration)?;
    trainer.schedule_steps(total);
    eprintln!("training {} from step {} to {total}", args.config.display(), trainer.state.step);
    let batch = trainer.config.batch as f64;
    let mut last: Option<DepthMetrics> = None;
    trainer.run(&stop, |m, rate| {
        let left = (total - m.step) as f64 * batch / rate.max(1e-9) / 60.0;
        let eval = m.eval.map_or_else(String::new, |e| {
            format!(
                "; unseen rooms: error of depth, median {:.1} %, mean {:.1} % ({:.1} % inside surfaces), within 5 % {:.2}",
                100.0 * e.median,
                100.0 * e.mean,
                100.0 * e.mean_inside,
                e.within_5
            )
        });
        eprintln!(
            "step {} of {total}, {rate:.1} pictures/s, {left:.0} min left, loss {:.4}{eval}",
            m.step, m.loss
        );
        last = Some(m.clone());
    })?;
    if stop.load(Ordering::Relaxed) && trainer.state.step < trainer.config.steps {
        eprintln!("stopped after step {}; run the same command again to go on", trainer.state.step);
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if args.json
        && let Some(last) = last
    {
        println!("{}", serde_json::to_string(&last)?);
    }
    Ok(ExitCode::SUCCESS)
}
