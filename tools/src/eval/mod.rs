//! `mindseye-tools eval`: success rates on houses that training never saw, through the same code as the robot's.
//!
//! # Figures of `eval grounding`
//! * **goal**: heading and place of the answer's pose against the pose at the standoff from the named object; what
//!   each witness alone would have said stands beside it.
//! * **IF** and its forms, **IF(SD < d)**: see [`judge`].
//! * **SD**, metres: see [`space`]; the networks that it rests on: see [`examiner`]. SD also grows with blur and noise
//!   alone: beside it stand the SD of true drives that are blurred, or have noise, to the model's PSNR in the same house
//!   ([`degrade`]), the differences, and the mean over a drive's pictures in place of the largest.
//! * **arrival**: a simulated robot drives to the pose of a `found` answer; it has arrived when the named object is in
//!   its view and the object's edge is within 1 m, or within 1.2 m in the second figure (drives in training end 1.2 m
//!   from the object's centre, which leaves up to 1 m to the edge). **SPL** weighs the first by shortest over driven path.
//! * **PSNR, SSIM, LPIPS**: of the imagined drive against the true one, image by image; LPIPS only where weights are given.
//! * **DD** (dynamic degree): the share of drives whose motion (mean absolute difference of neighbouring images) is at
//!   least a quarter of the median true drive's.
//! * **absent**: the same houses, asked for a thing that they do not have (any, or *swapped*: the colour of one of their
//!   things with the shape of another); **AUC** compares the largest mask logit.
//!
//! Beside the model stand, from the same command: two controls (the memories of another house with the true first
//! picture; another house altogether; neither has such a thing), a true drive to a random object (chance), the nearest
//! remembered picture and a copy of the first one (trivial answers), and true drives here and in another house, which
//! say what SD, IF and the examiner are worth.
//!
//! Intervals are 95 % (Wilson for shares, bootstrap for medians, means and areas).

pub mod ablation;
pub mod altered;
pub mod compare;
pub mod degrade;
pub mod examiner;
pub mod examiner_cache;
pub mod grounding;
pub mod judge;
pub mod landmarks;
pub mod localise;
pub mod navigation;
pub mod objects;
pub mod picture;
pub mod plot;
pub mod report;
pub mod space;
pub mod stats;
pub mod visit;

use std::process::ExitCode;

/// Arguments of `eval`.
#[derive(clap::Args, Debug)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(clap::Subcommand, Debug)]
enum EvalCommand {
    /// Go to named objects.
    #[command(after_help = "Examples: mindseye-tools eval grounding --houses 200 --seed 900000 --json\n\
                            \x20         mindseye-tools eval grounding --houses 60 --sheet sheet.png --markdown table.md\n\
                            \x20         mindseye-tools eval grounding --absent --houses 50 --json")]
    Grounding(grounding::GroundingArgs),
    /// Drive along given poses.
    #[command(after_help = "Example: mindseye-tools eval navigation --houses 100 --seed 900000 --json")]
    Navigation(visit::CommonArgs),
    /// What each part of the recipe is worth.
    #[command(
        mut_arg("houses", |a| a.default_value("60")),
        after_help = "Example: mindseye-tools eval ablation --houses 60 --out runs/ablation\n\
                      Run it again to go on after a stop."
    )]
    Ablation(ablation::AblationArgs),
    /// Several bundles side by side: what their drives are worth and what they cost.
    #[command(
        mut_arg("houses", |a| a.default_value("60")),
        mut_arg("bundle", |a| a.hide(true)),
        after_help = "Example: mindseye-tools eval compare models/house-tiny runs/house-tiny-student --houses 60"
    )]
    Compare(compare::CompareArgs),
    /// Place photographs by landmarks of other photographs.
    #[command(
        after_help = "Example: mindseye-tools eval localise kitchen --context 0:700:10 --query 705:1000:15 --width 416"
    )]
    Localise(localise::LocaliseArgs),
    /// Place things from a detector's boxes, against depth.
    #[command(
        after_help = "Example: mindseye-tools eval objects kitchen --context 0:500:5 --query 505:1000:5 --detector d.onnx"
    )]
    Objects(objects::ObjectsArgs),
    /// Goals by landmarks alone, true renders in the network's place.
    #[command(after_help = "Example: mindseye-tools eval landmarks --houses 20 --json")]
    Landmarks(landmarks::LandmarksArgs),
}

/// Runs `eval`.
///
/// # Errors
/// A bundle that cannot be loaded, an unknown difficulty or backend, a file that cannot be read or written.
pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        EvalCommand::Grounding(args) => grounding::run(&args),
        EvalCommand::Navigation(args) => navigation::run(&args),
        EvalCommand::Ablation(args) => ablation::run(&args),
        EvalCommand::Compare(args) => compare::run(&args),
        EvalCommand::Localise(args) => localise::run(&args),
        EvalCommand::Objects(args) => objects::run(&args),
        EvalCommand::Landmarks(args) => landmarks::run(&args),
    }
}
