//! `mindseye-tools model cost`: arithmetic, memory traffic and roofline times of a configuration.
//!
//! Numbers are counted by running the networks on [`CountOps`], not estimated. Roofline seconds are the larger of
//! arithmetic at peak and weights at full bandwidth; real runs reach 40 to 60 % of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use mindseye_engines::count::{CountOps, count_denoiser, count_text, count_vae_decoder, count_vae_encoder};
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::{Chunk, VaeConfig};
use serde::{Deserialize, Serialize};

/// Arguments of `model cost`.
///
/// Example: `mindseye-tools model cost configs/models/wan22-5b.toml --json`
#[derive(Clone, Debug, clap::Args)]
pub struct ModelCostArgs {
    /// Model configuration (TOML).
    pub model: PathBuf,
    /// One JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

/// The tables of a model configuration that have a cost.
#[derive(Clone, Debug, Deserialize)]
struct CostConfig {
    name: String,
    dit: DitConfig,
    vae: Option<VaeConfig>,
    umt5: Option<Umt5Config>,
    layout: Layout,
}

#[derive(Clone, Debug, Deserialize)]
struct Layout {
    context_latents: usize,
    motion_latents: usize,
    box_latents: usize,
}

/// A machine: dense peaks and memory bandwidth.
struct Machine {
    name: &'static str,
    /// FLOP/s with 16-bit floats.
    flops: f64,
    /// Bytes/s.
    bandwidth: f64,
}

/// A100: 312 TFLOP/s bf16, 2.04 TB/s (80 GB). H200: 790 TFLOP/s as measured (989 on the sheet), 4.8 TB/s. Orin: AGX
/// 64 GB at 1.3 GHz, 42.5 TFLOP/s fp16, 204.8 GB/s.
const MACHINES: [Machine; 3] = [
    Machine { name: "A100", flops: 312e12, bandwidth: 2.039e12 },
    Machine { name: "H200", flops: 790e12, bandwidth: 4.8e12 },
    Machine { name: "Orin", flops: 42.5e12, bandwidth: 204.8e9 },
];

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
    /// Roofline seconds by machine.
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
    /// Parameters of the text encoder, where it is a umT5.
    pub text_parameters: Option<u64>,
    /// Arithmetic of a joint step over that of a cached step.
    pub joint_over_cached: f64,
    /// One row per forward pass.
    pub rows: Vec<CostRow>,
}

fn row(what: String, count: &CountOps) -> CostRow {
    let flops = count.flops();
    let bytes = 2.0 * count.parameters() as f64;
    let seconds = MACHINES
        .iter()
        .map(|m| (m.name.to_owned(), (flops.products() / m.flops).max(bytes / m.bandwidth)))
        .collect();
    CostRow {
        what,
        linear_tflop: flops.linear / 1e12,
        attention_tflop: flops.attention / 1e12,
        convolution_tflop: flops.convolution / 1e12,
        tflop: flops.products() / 1e12,
        weights_gb: bytes / 1e9,
        seconds,
    }
}

/// Counts a configuration.
///
/// # Errors
/// What is wrong with the file, and where.
pub fn cost(model: &Path) -> anyhow::Result<ModelCost> {
    let text = std::fs::read_to_string(model).with_context(|| model.display().to_string())?;
    let config: CostConfig = toml::from_str(&text).with_context(|| model.display().to_string())?;
    let place = || model.display().to_string();
    let dit = &config.dit;
    for result in [
        dit.validate(),
        config.vae.as_ref().map_or(Ok(()), VaeConfig::validate),
        config.umt5.as_ref().map_or(Ok(()), Umt5Config::validate),
    ] {
        if let Err(what) = result {
            bail!("{}: {what}", place());
        }
    }
    let context = config.layout.context_latents;
    let target = 1 + config.layout.motion_latents + config.layout.box_latents;
    if context == 0 || context + target > 100_000 {
        bail!("{}: layout: {context} context and {target} target latents", place());
    }
    let joint = count_denoiser(dit, context + target, 0, 2);
    let prefill = count_denoiser(dit, context, 0, 1);
    let cached = count_denoiser(dit, target, context, 2);
    let alone = count_denoiser(dit, target, 0, 2);
    let joint_over_cached = joint.flops().products() / cached.flops().products();
    let mut rows = vec![
        row(format!("denoiser, joint: {} latents", context + target), &joint),
        row(format!("denoiser, prefill: {context} context latents"), &prefill),
        row(format!("denoiser, cached: {target} target latents see {context}"), &cached),
        row(format!("denoiser, {target} target latents alone"), &alone),
    ];
    let latent = [dit.latent_height, dit.latent_width];
    let mut vae_parameters = None;
    if let Some(vae) = &config.vae {
        let encoder = count_vae_encoder(vae, latent, Chunk::Next);
        let decoder = count_vae_decoder(vae, latent, Chunk::Next);
        vae_parameters = Some(encoder.parameters() + decoder.parameters());
        rows.push(row("VAE encode: first frame".into(), &count_vae_encoder(vae, latent, Chunk::First)));
        rows.push(row("VAE encode: one group of frames".into(), &encoder));
        rows.push(row("VAE decode: first latent".into(), &count_vae_decoder(vae, latent, Chunk::First)));
        rows.push(row("VAE decode: one latent".into(), &decoder));
    }
    let mut text_parameters = None;
    if let Some(umt5) = &config.umt5 {
        let count = count_text(umt5, dit.text_len);
        text_parameters = Some(count.parameters());
        rows.push(row(format!("text encoder: {} tokens", dit.text_len), &count));
    }
    Ok(ModelCost {
        name: config.name,
        context_latents: context,
        target_latents: target,
        tokens_per_latent: dit.tokens_per_frame(),
        dit_parameters: joint.parameters(),
        vae_parameters,
        text_parameters,
        joint_over_cached,
        rows,
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

/// The table for people.
pub fn table(cost: &ModelCost) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let count = |n: u64| {
        let digits = n.to_string();
        let parts: Vec<&str> =
            digits.as_bytes().rchunks(3).rev().map(|c| std::str::from_utf8(c).unwrap_or("")).collect();
        parts.join(" ")
    };
    let _ = writeln!(
        out,
        "{}: {} parameters in the denoiser, {} tokens per latent",
        cost.name,
        count(cost.dit_parameters),
        cost.tokens_per_latent
    );
    for (what, parameters) in [("VAE", cost.vae_parameters), ("text encoder", cost.text_parameters)] {
        if let Some(parameters) = parameters {
            let _ = writeln!(out, "{} parameters in the {what}", count(parameters));
        }
    }
    let _ = writeln!(
        out,
        "\n{:52} {:>9} {:>9} {:>9} {:>9} | roofline seconds, 16 bits",
        "one pass, TFLOP", "linear", "attention", "conv", "all"
    );
    let names: Vec<String> = MACHINES.iter().map(|m| format!("{:>9}", m.name)).collect();
    let _ = writeln!(out, "{:52} {:>39} | {}", "", "", names.join(" "));
    for row in &cost.rows {
        let seconds: Vec<String> = row.seconds.iter().map(|(_, s)| format!("{:>9}", figure(*s))).collect();
        let _ = writeln!(
            out,
            "{:52} {:>9} {:>9} {:>9} {:>9} | {}",
            row.what,
            figure(row.linear_tflop),
            figure(row.attention_tflop),
            figure(row.convolution_tflop),
            figure(row.tflop),
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
pub fn run(args: ModelCostArgs) -> anyhow::Result<()> {
    let cost = cost(&args.model)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&cost)?);
    } else {
        print!("{}", table(&cost));
    }
    Ok(())
}
