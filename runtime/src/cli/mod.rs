//! The command line: `mindseye demo | run | serve | replay | goal | top | bag | engine | doctor`.
//!
//! Every command prints people's text, or with `--json` one document, on stdout; logs and progress go to stderr.
//! Exit status: 0 done, 1 refused or failed (one clear line), 2 usage.

mod bag;
#[cfg(feature = "demo")]
mod demo;
mod doctor;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "view")]
mod facts;
mod goal;
#[cfg(feature = "demo")]
mod picture;
mod progress;
mod replay;
mod run;
#[cfg(feature = "engine")]
mod scenes;
mod serve;
#[cfg(feature = "top")]
mod top;
mod view;

use crate::config::RobotConfig;
use crate::mind::{LoadError, Pipeline, find_bundle};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use serve::MindArgs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The command that a newcomer tries first, where it is built in.
const FIRST_EXAMPLE: &str = if cfg!(feature = "demo") { "  mindseye demo\n" } else { "" };

#[derive(Parser)]
#[command(
    name = "mindseye",
    version,
    about = "Camera frames in, an imagined drive, a grounded goal pose out",
    after_help = format!("Examples:\n{FIRST_EXAMPLE}  mindseye run --config configs/robots/sim.toml\n  \
                  mindseye goal \"find the red chair\"\n  mindseye replay drive.mcap --goal \"find the blue table\" --json")
)]
struct Cli {
    /// More on stderr: -v information, -vv everything. RUST_LOG overrides it.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A simulated robot explores a house, asks for a thing, and drives to it.
    #[cfg(feature = "demo")]
    Demo(demo::DemoArgs),
    /// Serves a robot: topics and queries over Zenoh.
    Run(run::RunArgs),
    /// Imagines for robots that have no denoiser (`run --mind zenoh:NAME`), over Zenoh.
    Serve(serve::ServeArgs),
    /// Feeds a recorded bag to the runtime and asks for a thing.
    Replay(replay::ReplayArgs),
    /// Asks a running mindseye.
    Goal(goal::GoalArgs),
    /// Every node on the network: state, last goal, rates, drops, ages.
    #[cfg(feature = "top")]
    Top(top::TopArgs),
    /// Recorded bags: info, play, verify, recover, convert.
    Bag(bag::BagArgs),
    /// Engines for a target machine: build, inspect, verify, bench.
    #[cfg(feature = "engine")]
    Engine(engine::EngineArgs),
    /// Checks the model bundle, the machine and the network.
    Doctor(doctor::DoctorArgs),
}

/// Which model, and how to run it.
#[derive(Args, Clone, Debug)]
struct ModelArgs {
    /// Directory of the model bundle [default: MINDSEYE_BUNDLE, or models/house-tiny here, beside the program or
    /// in its source tree].
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Backend that runs it: rten or onnxruntime on the CPU, cuda (products in bf16) or cuda-f32 on a GPU.
    #[arg(long, default_value = "rten")]
    backend: String,
    /// Engines of this bundle, made by `mindseye engine build`, in place of its graphs.
    #[arg(long, value_name = "DIR")]
    engines: Option<PathBuf>,
    /// Threads of one evaluation; 0 = the backend's choice.
    #[arg(long, default_value_t = 2, value_name = "N")]
    threads: usize,
}

/// The bundle's folder; `None` where there is none, none was asked for, and a detector is configured, which can answer alone.
fn found_or_detecting(
    found: Result<PathBuf, LoadError>,
    config: &RobotConfig,
) -> Result<Option<PathBuf>, LoadError> {
    match found {
        // Several places were looked through: none was named.
        Err(LoadError::NotFound { looked }) if looked.len() > 1 && config.detector.is_some() => Ok(None),
        found => found.map(Some),
    }
}

impl ModelArgs {
    /// The model; `None` where there is none and a detector answers alone.
    fn load_or_detect(&self, config: &RobotConfig, mind: &MindArgs) -> anyhow::Result<Option<Pipeline>> {
        let found = find_bundle(self.bundle.as_deref(), |name| std::env::var(name).ok());
        match found_or_detecting(found, config)? {
            Some(directory) if mind.is_served() => {
                Ok(Some(mind.load(&directory, (&self.backend, self.threads))?))
            }
            Some(directory) => self.load_from(&directory).map(Some),
            None => Ok(None),
        }
    }

    /// The model; where none is named, this one of those that ship.
    #[cfg(feature = "demo")]
    fn load_or(&self, shipped: &str) -> anyhow::Result<Pipeline> {
        let given = self.bundle.as_deref();
        self.load_from(&crate::mind::find_bundle_or(shipped, given, |name| std::env::var(name).ok())?)
    }

    fn load_from(&self, directory: &Path) -> anyhow::Result<Pipeline> {
        if self.backend == "tensorrt" {
            anyhow::bail!(
                "--backend tensorrt: TensorRT runs engines; build them with `mindseye engine build` and give their \
                 folder with --engines DIR"
            );
        }
        match &self.engines {
            Some(engines) => Ok(Pipeline::load_engines(directory, engines, &self.backend, self.threads)?),
            None => Ok(Pipeline::load(directory, &self.backend, self.threads)?),
        }
    }
}

/// An error and its causes as one line; what the line says already is not said again.
#[must_use]
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if text.contains(&line) {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

/// Parses the arguments, runs the command and turns its result into an exit status.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // A node says by itself what happens to it: links, publishers, segments, answers.
    let least = usize::from(matches!(cli.command, Command::Run(_)));
    let level = ["warn", "info", "debug"][usize::from(cli.verbose.min(2)).max(least)];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| {
        tracing_subscriber::EnvFilter::new(format!("{level},zenoh=error,zenoh_transport=error"))
    });
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(colours)
        .init();
    let result = match cli.command {
        #[cfg(feature = "demo")]
        Command::Demo(args) => demo::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Goal(args) => goal::run(&args),
        #[cfg(feature = "top")]
        Command::Top(args) => top::run(&args),
        Command::Bag(args) => bag::run(&args),
        #[cfg(feature = "engine")]
        Command::Engine(args) => engine::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // A reader that went away is no failure worth words.
            let pipe = error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe);
            if !pipe {
                eprintln!("mindseye: {}", one_line(&error));
            }
            ExitCode::FAILURE
        }
    }
}

/// One line (or document) on stdout.
fn say(text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout().lock(), "{text}").context("stdout")
}

/// Sets the flag on Ctrl-C or SIGTERM; the second time the process ends at once.
fn stop_flag() -> anyhow::Result<std::sync::Arc<std::sync::atomic::AtomicBool>> {
    use std::sync::atomic::{AtomicBool, Ordering};
    let flag = std::sync::Arc::new(AtomicBool::new(false));
    let shared = flag.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                let mut terminate =
                    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
                loop {
                    let term = async {
                        match terminate.as_mut() {
                            Some(signal) => {
                                signal.recv().await;
                            }
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        _ = tokio::signal::ctrl_c() => {}
                        () = term => {}
                    }
                    if shared.swap(true, Ordering::Relaxed) {
                        std::process::exit(130);
                    }
                }
            });
        })
        .context("signals")?;
    Ok(flag)
}
