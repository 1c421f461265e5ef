//! `mindseye-tools train`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use mindseye_train::trainer::{Metrics, TrainConfig, Trainer};

/// Arguments of `train`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools train configs/train/house-tiny.toml --out runs/house-tiny\n\
                        Run it again to go on after a stop; metrics.jsonl and curve.png are in the directory.")]
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
    /// Print the last metrics as one JSON document at the end.
    #[arg(long)]
    pub json: bool,
}

/// Runs `train`.
///
/// # Errors
/// A configuration or checkpoint that cannot be used, a loss that is no number, a full disk.
pub fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    let (mut config, model) = TrainConfig::load(&args.config)?;
    let total = config.steps;
    let decays = config.clone();
    if let Some(until) = args.until {
        config.steps = config.steps.min(until);
        // The schedule is that of the whole run.
        config.decay_from = decays.decay_from;
    }
    let mut trainer = Trainer::open(config, model, &args.out)?;
    trainer.schedule_steps(total);
    if let Some(bundle) = &args.init {
        let fresh = trainer.start_from(&crate::ship::weights_of(bundle)?, bundle)?;
        eprintln!("weights of {}; {fresh} that it does not have are fresh", bundle.display());
    }
    eprintln!("training {} from step {} to {total}", args.config.display(), trainer.state.step);
    let stop = AtomicBool::new(false);
    let terminal = std::io::stderr().is_terminal();
    let mut last: Option<Metrics> = None;
    trainer.run(&stop, |m, rate| {
        let left = (total - m.step) as f64 * (m.samples as f64 / m.step.max(1) as f64) / rate.max(1e-9);
        let l = &m.losses;
        eprintln!(
            "{}step {} of {total}, {rate:.1} samples/s, {:.0} min left, loss {:.3} (video {:.4}, mask {:.3}, \
             poses {:.3} {:.3}, place {:.3}){}",
            if terminal { "\r" } else { "" },
            m.step,
            left / 60.0,
            l.total,
            l.video,
            l.mask,
            l.context_pose,
            l.target_pose,
            l.locate,
            m.eval.map_or_else(String::new, |e| format!(
                "; unseen houses: heading {:.1} deg, within 25 deg {:.2}, position {:.2} m, absent AUC {:.3}",
                e.mask_yaw_deg, e.mask_within_25, e.mask_position_m, e.absent_auc
            )),
        );
        last = Some(m.clone());
    })?;
    mindseye_train::curve::plot(&args.out)?;
    if args.json
        && let Some(last) = last
    {
        println!("{}", serde_json::to_string(&last)?);
    }
    Ok(ExitCode::SUCCESS)
}
