//! The command line of `mindseye-tools`.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::train::TrainArgs;
use mindseye_engines::onnx::Storage;
use mindseye_train::finetune::FineTuneConfig;

use crate::{curate, eval, export, golden, import, model, replayable, ship, world};
use clap::{Parser, Subcommand};

/// World rendering, training, export, evaluation and checks for mindseye.
#[derive(Parser)]
#[command(version, after_help = "Example: mindseye-tools world render --seed 7 --out room.png")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The procedural house: pictures and recordings.
    World(world::WorldArgs),
    /// Train a model from a configuration, or go on where a run stopped.
    Train(TrainArgs),
    /// Turn a training run into the bundle that the runtime loads.
    Ship(ShipArgs),
    /// Turn a bundle of weights, or a folder of safetensors, into ONNX graphs.
    Export(export::ExportArgs),
    /// Read a published checkpoint into a bundle of weights.
    Import(import::ImportArgs),
    /// What a model costs to run.
    Model(ModelArgs),
    /// Success rates on unseen houses.
    Eval(eval::EvalArgs),
    /// Indoor scans to grounding clips.
    Curate(curate::CurateArgs),
    /// A recording of a dataset as a bag that the runtime replays.
    Bag(replayable::BagArgs),
    /// Compare with vectors of the reference implementations.
    Golden(golden::GoldenArgs),
}

#[derive(clap::Args)]
#[command(
    after_help = "Example: mindseye-tools ship runs/house-tiny --config configs/train/house-tiny.toml \
                        --out models/house-tiny\n         \
                        mindseye-tools ship --add-depth runs/house-tiny-depth --out models/house-tiny"
)]
struct ShipArgs {
    /// Directory of the training run.
    #[arg(required_unless_present = "add_depth")]
    run: Option<PathBuf>,
    /// The run's configuration.
    #[arg(long, required_unless_present = "add_depth")]
    config: Option<PathBuf>,
    /// Where the bundle is put.
    #[arg(long)]
    out: PathBuf,
    /// Also the depth reader of this run.
    #[arg(long, value_name = "RUN")]
    depth: Option<PathBuf>,
    /// Only put the depth reader of this run into the bundle that is at --out; its other files stay as they are.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["run", "config", "depth", "raw", "cached", "steps", "guidance"])]
    add_depth: Option<PathBuf>,
    /// The last weights instead of the averaged ones.
    #[arg(long)]
    raw: bool,
    /// How weights are stored; they are computed with in f32. "f16" rounds them to half precision, "int8" also the matrices of
    /// denoiser and depth reader to one byte each, with a scale per channel.
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    weights: Weights,
    /// Also the halves for the one-way mask; always there when the run was trained with it.
    #[arg(long)]
    cached: bool,
    /// Denoising steps of the bundle's sampler; 12 when left out, a student's own when it was distilled.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    steps: Option<u64>,
    /// Guidance of the bundle's sampler; 2 when left out, 1 for a student.
    #[arg(long)]
    guidance: Option<f64>,
}

/// See [`ShipArgs::weights`].
#[derive(Clone, Copy, clap::ValueEnum)]
enum Weights {
    F32,
    F16,
    Int8,
}

impl Weights {
    fn storage(self) -> Storage {
        match self {
            Self::F32 => Storage::Whole,
            Self::F16 => Storage::Halves,
            Self::Int8 => Storage::Codes,
        }
    }
}

#[derive(clap::Args)]
struct ModelArgs {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Arithmetic, bytes and roofline times.
    Cost(model::CostArgs),
}

/// Runs the command that this process was started with. `train` may know of more devices than [`crate::train::run`].
pub fn main(train: fn(&TrainArgs) -> anyhow::Result<ExitCode>) -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    let result = match Cli::parse().command {
        Command::World(args) => world::run(args),
        Command::Train(args) => train(&args),
        Command::Ship(args) => {
            let options = ship::ShipOptions {
                raw: args.raw,
                cached: args.cached,
                steps: args.steps.map(|n| n as usize),
                guidance: args.guidance,
                depth: args.depth,
                storage: args.weights.storage(),
                ..Default::default()
            };
            let shipped = match (args.add_depth, args.run, args.config) {
                (Some(run), ..) => ship::add_depth(&run, &args.out, args.weights.storage()),
                (None, Some(run), Some(config)) if FineTuneConfig::is_meant(&config) => {
                    match options.not_for_fine_tunes() {
                        Some(option) => Err(anyhow::anyhow!(
                            "{}: a run with [finetune] ships its averaged weights as published ones; it takes no {option}",
                            config.display()
                        )),
                        None => ship::ship_fine_tune(&run, &config, &args.out),
                    }
                }
                (None, Some(run), Some(config)) => ship::ship(&run, &config, &args.out, &options),
                _ => Err(anyhow::anyhow!("ship: give a run and its --config, or --add-depth")),
            };
            shipped.map(|bundle| {
                println!("{} {}", bundle.directory().display(), bundle.hash());
                ExitCode::SUCCESS
            })
        }
        Command::Export(args) => export::run(args).map(|()| ExitCode::SUCCESS),
        Command::Import(args) => import::run(args),
        Command::Model(ModelArgs { command: ModelCommand::Cost(args) }) => {
            model::run(&args).map(|()| ExitCode::SUCCESS)
        }
        Command::Eval(args) => eval::run(args),
        Command::Curate(args) => curate::run(args),
        Command::Bag(args) => replayable::run(&args),
        Command::Golden(args) => golden::run(args),
    };
    result.unwrap_or_else(|e| {
        eprintln!("error: {}", mindseye::cli::one_line(&e));
        ExitCode::FAILURE
    })
}
