//! `mindseye-tools` with libtorch's devices beside its own interpreter.

use std::process::ExitCode;

use mindseye_tools::train::{self, TrainArgs};
use mindseye_torch::TorchDevice;

fn on_any_device(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    if args.device == train::EAGER {
        return train::run(args);
    }
    train::run_on(&TorchDevice::open(&args.device)?, args)
}

fn main() -> ExitCode {
    mindseye_tools::cli::main(on_any_device)
}
