//! `mindseye-tools model cost`: arithmetic, memory and roofline times of a configuration, one forward pass a row.
//!
//! Numbers are counted by running the networks on the counting interpreter; rates are those of `configs/targets`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use mindseye_builder::plan::ModelSpec;
use mindseye_engines::count::{
    CountOps, Kernels, count_denoiser, count_prefill, count_text, count_vae_decoder, count_vae_encoder,
};
use mindseye_engines::model::vae::Chunk;
use mindseye_engines::target::{Precision, Target};
use serde::Serialize;

/// Arguments of `model cost`.
///
/// Example: `mindseye-tools model cost configs/models/wan22-5b.toml --json`
#[derive(Clone, Debug, clap::Args)]
pub struct CostArgs {
    /// Model configuration (TOML).
    pub model: PathBuf,
    /// One JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Machines that times are shown for.
const TARGETS: [&str; 3] = ["a100", "h200", "orin-agx"];

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CostRow {
    /// What is done.
    pub what: String,
    /// Products with weights, TFLOP.
    pub linear_tflop: f64,
    /// Attention products, TFLOP.
    pub attention_tflop: f64,
    /// Convolutions, TFLOP.
    pub convolution_tflop: f64,
    /// All products, TFLOP.
    pub tflop: f64,
    /// Weights read, GB at 16 bits.
    pub weights_gb: f64,
    /// Activations at their peak, GB at 16 bits, attention in one kernel.
    pub activations_gb: f64,
    /// Caches, keys and values in and out, GB at 16 bits.
    pub state_gb: f64,
    /// Roofline seconds by target, 16 bits.
    pub seconds: Vec<(String, f64)>,
}

/// What a configuration costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelCost {
    /// Name of the model.
    pub name: String,
    /// Context latents of one inference.
    pub context_latents: usize,
    /// Target latents of one inference.
    pub target_latents: usize,
    /// Tokens per latent.
    pub tokens_per_latent: usize,
    /// Parameters of the denoiser.
    pub dit_parameters: u64,
    /// Parameters of the VAE, where there is one.
    pub vae_parameters: Option<u64>,
    /// Parameters of the text encoder, where there is one.
    pub text_parameters: Option<u64>,
    /// Arithmetic of a joint step over that of a cached step.
    pub joint_over_cached: f64,
    /// One row per forward pass.
    pub rows: Vec<CostRow>,
}

fn row(what: String, count: &CountOps, targets: &[Target]) -> CostRow {
    let flops = count.flops();
    let gb = |values: u64| 2.0 * values as f64 / 1e9;
    let weights = 2.0 * (count.parameters() - count.looked_up()) as f64;
    let edge = count.edge();
    let seconds = |t: &Target| {
        let (seconds, _) = t.roofline(&[(flops.products(), Precision::Fp16)], weights)?;
        Some((t.name.clone(), seconds))
    };
    CostRow {
        what,
        linear_tflop: flops.linear / 1e12,
        attention_tflop: flops.attention / 1e12,
        convolution_tflop: flops.convolution / 1e12,
        tflop: flops.products() / 1e12,
        weights_gb: gb(count.parameters()),
        activations_gb: gb(count.activations(Kernels::Fused)),
        state_gb: gb(edge.state_in + edge.state_out),
        seconds: targets.iter().filter_map(seconds).collect(),
    }
}

/// Counts a configuration.
///
/// # Errors
/// What is wrong with the file, and where.
pub fn cost(model: &Path) -> anyhow::Result<ModelCost> {
    let place = || model.display().to_string();
    let text = std::fs::read_to_string(model).with_context(place)?;
    let spec = ModelSpec::from_toml(&text).with_context(place)?;
    let targets = TARGETS.iter().map(|t| Target::named(t)).collect::<Result<Vec<_>, _>>()?;
    let dit = &spec.dit;
    let size = |n: u64| usize::try_from(n).with_context(place);
    let (context, target) = (size(spec.workload.context_latents)?, size(spec.workload.target_latents)?);
    let joint = count_denoiser(dit, context + target, 0, 2);
    let prefill = count_prefill(dit, context);
    let cached = count_denoiser(dit, target, context, 2);
    let joint_over_cached = joint.flops().products() / cached.flops().products();
    let mut passes = vec![
        (format!("denoiser, joint: {} latents", context + target), joint),
        (format!("denoiser, prefill: {context} context latents"), prefill),
        (format!("denoiser, cached: {target} target latents see {context}"), cached),
        (format!("denoiser, {target} target latents alone"), count_denoiser(dit, target, 0, 2)),
    ];
    let dit_parameters = passes[0].1.parameters();
    let latent = [dit.latent_height, dit.latent_width];
    let mut vae_parameters = None;
    if let Some(vae) = &spec.vae {
        let (encoder, decoder) =
            (count_vae_encoder(vae, latent, Chunk::Next), count_vae_decoder(vae, latent, Chunk::Next));
        vae_parameters = Some(encoder.parameters() + decoder.parameters());
        passes.push(("VAE encode: first frame".into(), count_vae_encoder(vae, latent, Chunk::First)));
        passes.push(("VAE encode: one group of frames".into(), encoder));
        passes.push(("VAE decode: first latent".into(), count_vae_decoder(vae, latent, Chunk::First)));
        passes.push(("VAE decode: one latent".into(), decoder));
    }
    let mut text_parameters = None;
    if let Some(umt5) = &spec.text_encoder {
        let count = count_text(umt5, dit.text_len);
        text_parameters = Some(count.parameters());
        passes.push((format!("text encoder: {} tokens", dit.text_len), count));
    }
    Ok(ModelCost {
        name: spec.name.clone(),
        context_latents: context,
        target_latents: target,
        tokens_per_latent: dit.tokens_per_frame(),
        dit_parameters,
        vae_parameters,
        text_parameters,
        joint_over_cached,
        rows: passes.into_iter().map(|(what, count)| row(what, &count, &targets)).collect(),
    })
}

/// A figure of three or four digits, whatever its size.
fn figure(value: f64) -> String {
    match value {
        0.0 => "-".into(),
        v if v >= 100.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.3}"),
        v => format!("{v:.2e}"),
    }
}

/// A number with its thousands apart.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let parts: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|c| std::str::from_utf8(c).unwrap_or("")).collect();
    parts.join(" ")
}

/// The table for people.
pub fn table(cost: &ModelCost) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}: {} parameters in the denoiser, {} tokens per latent",
        cost.name,
        grouped(cost.dit_parameters),
        cost.tokens_per_latent
    );
    for (what, parameters) in [("VAE", cost.vae_parameters), ("text encoder", cost.text_parameters)] {
        if let Some(parameters) = parameters {
            let _ = writeln!(out, "{} parameters in the {what}", grouped(parameters));
        }
    }
    let _ = writeln!(
        out,
        "\n{:52} {:>9} {:>9} {:>9} {:>9} | {:>29} | roofline seconds, 16 bits",
        "one pass, TFLOP", "linear", "attention", "conv", "all", "GB at 16 bits"
    );
    let names: Vec<String> = TARGETS.iter().map(|name| format!("{name:>9}")).collect();
    let _ = writeln!(
        out,
        "{:52} {:>39} | {:>9} {:>9} {:>9} | {}",
        "",
        "",
        "weights",
        "activat.",
        "state",
        names.join(" ")
    );
    for row in &cost.rows {
        let seconds: Vec<String> = row.seconds.iter().map(|(_, s)| format!("{:>9}", figure(*s))).collect();
        let _ = writeln!(
            out,
            "{:52} {:>9} {:>9} {:>9} {:>9} | {:>9} {:>9} {:>9} | {}",
            row.what,
            figure(row.linear_tflop),
            figure(row.attention_tflop),
            figure(row.convolution_tflop),
            figure(row.tflop),
            figure(row.weights_gb),
            figure(row.activations_gb),
            figure(row.state_gb),
            seconds.join(" ")
        );
    }
    let _ = writeln!(
        out,
        "\none step with the context cached does {:.2} times less arithmetic than the joint step",
        cost.joint_over_cached
    );
    out
}

/// Runs `model cost`.
///
/// # Errors
/// What is wrong with the configuration, and where.
pub fn run(args: &CostArgs) -> anyhow::Result<()> {
    let cost = cost(&args.model)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&cost)?);
    } else {
        print!("{}", table(&cost));
    }
    Ok(())
}
