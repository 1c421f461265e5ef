//! `mindseye-tools`: everything that happens before the robot.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mindseye_tools::{curate, eval, export, golden, import, model, ship, train, world};

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
    Train(train::TrainArgs),
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
    /// Compare with vectors of the reference implementations.
    Golden(golden::GoldenArgs),
}

#[derive(clap::Args)]
#[command(
    after_help = "Example: mindseye-tools ship runs/house-tiny --config configs/train/house-tiny.toml \
                        --out models/house-tiny"
)]
struct ShipArgs {
    /// Directory of the training run.
    run: PathBuf,
    /// The run's configuration.
    #[arg(long)]
    config: PathBuf,
    /// Where the bundle is put.
    #[arg(long)]
    out: PathBuf,
    /// The last weights instead of the averaged ones.
    #[arg(long)]
    raw: bool,
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

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    let result = match Cli::parse().command {
        Command::World(args) => world::run(args),
        Command::Train(args) => train::run(&args),
        Command::Ship(args) => {
            let options = ship::ShipOptions {
                raw: args.raw,
                cached: args.cached,
                steps: args.steps.map(|n| n as usize),
                guidance: args.guidance,
                ..Default::default()
            };
            ship::ship(&args.run, &args.config, &args.out, &options).map(|bundle| {
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
        Command::Golden(args) => golden::run(args),
    };
    result.unwrap_or_else(|e| {
        eprintln!("error: {}", mindseye::cli::one_line(&e));
        ExitCode::FAILURE
    })
}
