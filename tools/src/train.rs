//! `mindseye-tools train`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use mindseye_engines::target::Target;
use mindseye_train::autoencoder::{AutoencoderConfig, AutoencoderTrainer};
use mindseye_train::autograd::{Device, EagerDevice};
use mindseye_train::clips::Clips;
use mindseye_train::config::{Kind, TrainConfig};
use mindseye_train::depth::{DepthMetrics, DepthTrainConfig, DepthTrainer};
use mindseye_train::evaluation::{Eval, Sharpness};
use mindseye_train::family::HouseModel;
use mindseye_train::finetune::{self, FineTuneConfig, FineTuneTrainer};
use mindseye_train::plan::{self, Job};
use mindseye_train::ranks::{Place, Ranks};
use mindseye_train::run::Speed;
use mindseye_train::task::TaskMetrics;
use mindseye_train::trainer::{Metrics, OpenOptions, Trainer};

use crate::clips;

/// Arguments of `train`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools train configs/train/house-tiny.toml --out runs/house-tiny\n\
                        Run it again to go on after a stop (Ctrl-C, kill, full disk): the run is the same as if it had \
                        not stopped. metrics.jsonl and curve.png are in the directory.\n\
                        With [data] kind = \"clips\", path = \"DIR\" it trains on recorded videos, such as those that \
                        curate writes. A configuration with a table [depth] trains the depth reader, with [autoencoder] a \
                        video autoencoder, with [finetune] a model of the large family on latents that it encodes first.\n\
                        mindseye-tools train configs/train/wan22-5b-ground.toml --plan --target h100 --devices 8")]
pub struct TrainArgs {
    /// Training configuration (TOML).
    pub config: PathBuf,
    /// Directory of the run: checkpoint, metrics, curve.
    #[arg(long, required_unless_present = "plan")]
    pub out: Option<PathBuf>,
    /// Only say what the run would take on devices of a target: memory, arithmetic, time. Refuses what does not fit.
    #[arg(long)]
    pub plan: bool,
    /// The target of --plan: a name of `mindseye engine targets`, or a file.
    #[arg(long, default_value = "h100", requires = "plan")]
    pub target: String,
    /// The number of devices of --plan.
    #[arg(long, default_value_t = 1, requires = "plan")]
    pub devices: u64,
    /// Where to compute: "eager" is this program's own interpreter on the CPU; "cpu" and "cuda:N" are libtorch's, which
    /// only the program has that tools/train/torch/build.sh builds. A run can go on on another device.
    #[arg(long, value_name = "DEVICE", default_value = EAGER)]
    pub device: String,
    /// Begin with the weights of this bundle instead of fresh ones; a fine-tune also with published weights.
    #[arg(long, value_name = "DIR")]
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
    /// Print the last metrics (with --prepare: what there is; with --plan: the plan) as one JSON document at the end.
    #[arg(long)]
    pub json: bool,
}

impl TrainArgs {
    /// The run's directory.
    fn out(&self) -> anyhow::Result<&Path> {
        self.out.as_deref().context("--out: give the run's directory")
    }
}

/// Name of the device that is always there.
pub const EAGER: &str = "eager";

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
    out: &Path,
    config: &TrainConfig,
    model: &HouseModel,
    stop: &AtomicBool,
) -> anyhow::Result<Option<(Clips, clips::Report)>> {
    if config.data.kind != Kind::Clips {
        return Ok(None);
    }
    let base = args.config.parent().unwrap_or(Path::new("."));
    let cache = if config.data.cache.as_os_str().is_empty() {
        out.join("images")
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

/// Runs `train` on the device that every build has.
///
/// # Errors
/// Another device; otherwise as [`run_on`].
pub fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    if args.device != EAGER {
        bail!(
            "--device {}: this program has \"{EAGER}\" only; tools/train/torch/build.sh builds the one with libtorch",
            args.device
        );
    }
    run_on(&EagerDevice, args)
}

/// Runs `train` on a device.
///
/// # Errors
/// A configuration or checkpoint that cannot be used, a loss that is no number, a full disk, a device that fails.
pub fn run_on<D: Device>(device: &D, args: &TrainArgs) -> anyhow::Result<ExitCode> {
    if args.plan {
        return plan(args);
    }
    let out = args.out()?;
    let place = Place::from_environment(|name| std::env::var(name).ok())?;
    if place.is_some() && DepthTrainConfig::is_meant(&args.config) {
        bail!("{}: the depth reader trains on one device; unset WORLD_SIZE", args.config.display());
    }
    if DepthTrainConfig::is_meant(&args.config) {
        return run_depth(device, args, out);
    }
    if AutoencoderConfig::is_meant(&args.config) {
        return run_autoencoder(device, args, out, place);
    }
    if FineTuneConfig::is_meant(&args.config) {
        return run_fine_tune(device, args, out, place);
    }
    run_diffusion(device, args, out, place)
}

/// Trains a small model of the house family: on procedural rooms, clips, or a teacher's drives.
///
/// # Errors
/// A configuration or checkpoint that cannot be used, a loss that is no number, a full disk, a device that fails.
fn run_diffusion<D: Device>(
    device: &D,
    args: &TrainArgs,
    out: &Path,
    place: Option<Place>,
) -> anyhow::Result<ExitCode> {
    let (mut config, model) = TrainConfig::load(&args.config)?;
    let total = config.steps;
    let decays = config.clone();
    if let Some(until) = args.until {
        config.steps = config.steps.min(until);
        // The schedule is that of the whole run.
        config.decay_from = decays.decay_from;
    }
    let stop = stop_flag()?;
    let mut ranks = place.map(|place| Ranks::join(place, device)).transpose()?;
    // The first rank decodes the clips, the others then find them decoded.
    let clips = first_rank_first(&mut ranks, || open_clips(args, out, &config, &model, &stop))?;
    let leads = ranks.as_ref().is_none_or(Ranks::leads);
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
        ranks,
    };
    let mut trainer = Trainer::open_on(device, config, model, out, options)?;
    trainer.schedule_steps(total);
    if let Some(bundle) = &args.init {
        let fresh = trainer.start_from(&crate::retrain::weights_of(bundle)?, bundle)?;
        eprintln!("weights of {}; fresh are: {}", bundle.display(), listed(&fresh));
    }
    eprintln!("training {} from step {} to {total}", args.config.display(), trainer.state.step);
    let terminal = std::io::stderr().is_terminal();
    let mut last: Option<Metrics> = None;
    trainer.run(&stop, |m, speed| {
        eprintln!("{}{}", if terminal { "\r" } else { "" }, progress_line(m, &speed, total));
        last = Some(m.clone());
    })?;
    if leads {
        mindseye_train::curve::plot(out)?;
    }
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

/// The names of weights that `--init` had nothing for.
fn listed(fresh: &[String]) -> String {
    if fresh.is_empty() { "none".to_owned() } else { fresh.join(", ") }
}

/// Lets the first rank do what the others then find done.
fn first_rank_first<R>(
    ranks: &mut Option<Ranks>,
    work: impl FnOnce() -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let leads = ranks.as_ref().is_none_or(Ranks::leads);
    if let Some(ranks) = ranks.as_mut().filter(|_| !leads) {
        ranks.wait()?;
    }
    let done = work()?;
    if let Some(ranks) = ranks.as_mut().filter(|_| leads) {
        ranks.wait()?;
    }
    Ok(done)
}

/// What the terminal says of a step.
fn progress_line(m: &Metrics, speed: &Speed, total: u64) -> String {
    let rate = speed.samples_per_sec;
    let left = (total - m.step) as f64 * (m.samples as f64 / m.step.max(1) as f64) / rate.max(1e-9);
    let l = &m.losses;
    format!(
        "step {} of {total}, {rate:.1} samples/s, waiting {:.0} %, {:.0} min left, loss {:.3} (video {:.4}, mask {:.3}, \
         poses {:.3} {:.3}, place {:.3}){}{}",
        m.step,
        100.0 * speed.waiting,
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
    )
}

/// Says what a run would take.
fn plan(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    let target = Target::named(&args.target)?;
    let plan = if FineTuneConfig::is_meant(&args.config) {
        let (config, model) = FineTuneConfig::load(&args.config)?;
        plan::plan(&config.job(&model), &target, args.devices)?
    } else if DepthTrainConfig::is_meant(&args.config) {
        bail!("{}: plans are of denoisers; the depth reader is small", args.config.display());
    } else {
        let (config, model) = TrainConfig::load(&args.config)?;
        let TrainConfig { batch, steps, only, optim, .. } = &config;
        let (latents, batch) = (model.latents(), *batch as u64);
        let (model, dit, steps) = (&model.name, &model.dit, *steps);
        let job = Job { model, dit, latents, batch, steps, only, adapted: None, optim };
        plan::plan(&job, &target, args.devices)?
    };
    if args.json {
        println!("{}", serde_json::to_string(&plan)?);
    } else {
        print!("{}", plan.table());
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

/// Says how far a run is and, at the end, its last line; the exit status.
fn end(args: &TrainArgs, stopped: bool, step: u64, last: Option<&TaskMetrics>) -> anyhow::Result<ExitCode> {
    if stopped {
        eprintln!("stopped after step {step}; run the same command again to go on");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if args.json
        && let Some(last) = last
    {
        println!("{}", serde_json::to_string(last)?);
    }
    Ok(ExitCode::SUCCESS)
}

fn say(m: &TaskMetrics, speed: Speed, total: u64) {
    let rate = speed.samples_per_sec;
    let left =
        (total - m.step.min(total)) as f64 * (m.samples as f64 / m.step.max(1) as f64) / rate.max(1e-9);
    let terms = m.losses.map_or_else(String::new, |l| {
        let (poses, place) = (l.context_pose + l.target_pose, l.locate);
        format!(" (video {:.5}, mask {:.4}, poses {poses:.4}, place {place:.4})", l.video, l.mask)
    });
    eprintln!(
        "step {} of {total}, {rate:.1} samples/s, {:.0} min left, loss {:.5}{terms}",
        m.step,
        left / 60.0,
        m.loss
    );
}

/// Trains the video autoencoder.
fn run_autoencoder<D: Device>(
    device: &D,
    args: &TrainArgs,
    out: &Path,
    place: Option<Place>,
) -> anyhow::Result<ExitCode> {
    if args.init.is_some() || args.prepare {
        bail!("{}: an autoencoder begins with fresh weights and needs no preparing", args.config.display());
    }
    let (config, model) = AutoencoderConfig::load(&args.config)?;
    let (total, stop) = (config.steps, stop_flag()?);
    let ranks = place.map(|place| Ranks::join(place, device)).transpose()?;
    let mut trainer = AutoencoderTrainer::open(device, (config, model), out, ranks)?;
    let mut last = None;
    trainer.run(args.until, &stop, |m, speed| {
        say(m, speed, total);
        last = Some(m.clone());
    })?;
    let step = trainer.step();
    end(args, stop.load(Ordering::Relaxed) && step < total, step, last.as_ref())
}

/// Encodes the samples of a fine-tune where that is not done, and trains on them.
fn run_fine_tune<D: Device>(
    device: &D,
    args: &TrainArgs,
    out: &Path,
    place: Option<Place>,
) -> anyhow::Result<ExitCode> {
    let (config, model) = FineTuneConfig::load_to_train(&args.config)?;
    if config.heads.is_some() && !config.has_heads() {
        eprintln!("[heads] stay off: the latents have no poses (latents.poses = false)");
    }
    let (total, stop) = (config.steps, stop_flag()?);
    let encoders = crate::retrain::encoders_of(&args.config, &config, &model)?;
    let mut ranks = place.map(|place| Ranks::join(place, device)).transpose()?;
    // The first rank encodes, the others then find it done.
    let latents = first_rank_first(&mut ranks, || {
        let began = Instant::now();
        let latents =
            finetune::encode(&args.config, &config, &model, &encoders, &out.join("latents"), &stop)?;
        let encoded = began.elapsed();
        let began = Instant::now();
        (0..latents.len()).try_for_each(|i| latents.sample(i).map(drop))?;
        eprintln!(
            "{} samples encoded or checked in {:.1} s; read in {:.3} s",
            latents.len(),
            encoded.as_secs_f64(),
            began.elapsed().as_secs_f64()
        );
        Ok(latents)
    })?;
    if args.prepare {
        return Ok(ExitCode::SUCCESS);
    }
    let init = args.init.as_deref();
    let init = init.map(|dir| Ok::<_, anyhow::Error>((crate::retrain::denoiser_of(dir, &model.dit)?, dir)));
    let init = init.transpose()?;
    let start = init.as_ref().map(|(weights, dir)| (weights, *dir));
    let both = (config, model);
    let mut trainer =
        FineTuneTrainer::open(device, &args.config, both, &encoders, latents, out, start, ranks)?;
    if let Some(dir) = init.map(|(_, dir)| dir).filter(|_| trainer.step() == 0) {
        eprintln!("weights of {}; fresh are: {}", dir.display(), listed(&trainer.fresh));
    }
    let mut last = None;
    trainer.run(args.until, &stop, |m, speed| {
        say(m, speed, total);
        last = Some(m.clone());
    })?;
    let step = trainer.step();
    end(args, stop.load(Ordering::Relaxed) && step < total, step, last.as_ref())
}

/// Trains the depth reader.
fn run_depth<D: Device>(device: &D, args: &TrainArgs, out: &Path) -> anyhow::Result<ExitCode> {
    if args.prepare {
        bail!("{}: the depth reader needs no preparing", args.config.display());
    }
    let mut config = DepthTrainConfig::load(&args.config)?;
    let total = config.steps;
    config.steps = config.steps.min(args.until.unwrap_or(total));
    let stop = stop_flag()?;
    let mut trainer = DepthTrainer::open_on(device, config, out, args.other_configuration)?;
    trainer.schedule_steps(total);
    if let Some(bundle) = args.init.as_ref().filter(|_| trainer.state.step == 0) {
        let fresh = trainer.state.start_from(&crate::retrain::depth_of(bundle)?, bundle)?;
        eprintln!("depth reader of {}; fresh are: {}", bundle.display(), listed(&fresh));
    }
    eprintln!("training {} from step {} to {total}", args.config.display(), trainer.state.step);
    let batch = trainer.config.batch as f64;
    let mut last: Option<DepthMetrics> = None;
    trainer.run(&stop, |m, speed| {
        let (rate, waiting) = (speed.samples_per_sec, 100.0 * speed.waiting);
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
            "step {} of {total}, {rate:.1} pictures/s, waiting {waiting:.0} %, {left:.0} min left, loss {:.4}{eval}",
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
