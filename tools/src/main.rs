//! `mindseye-tools`: everything that happens before the robot.

use std::process::ExitCode;

fn main() -> ExitCode {
    mindseye_tools::cli::main(mindseye_tools::train::run)
}
