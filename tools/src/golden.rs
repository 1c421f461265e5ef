//! Golden vectors: runs our networks, samplers and tokenizer on inputs whose outputs the reference implementations
//! (diffusers, transformers, sentencepiece, ftfy) have computed, and compares.
//!
//! A set of cases is a directory with any of `dit/ vae/ umt5/ sched/ plucker/ rope_time/ tokenizer/ pipeline/`; it is
//! found in the given directory or below it. Networks are described by `config.json`, weights and cases are safetensors files. Sizes, seeds and step counts come from the files.

mod engine;
mod host;
mod networks;
mod onnx;
mod pipeline;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail, ensure};
use mindseye_builder::checkpoint::Checkpoint;
use mindseye_engines::{model::dit::DitConfig, model::umt5::Umt5Config, model::vae::VaeConfig};
use serde::{Deserialize, Serialize};

pub use engine::Via;

/// Compare this build with vectors of the reference implementations.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools golden check tests/data/golden --via all")]
pub struct GoldenArgs {
    #[command(subcommand)]
    command: GoldenCommand,
}

#[derive(clap::Subcommand, Debug)]
enum GoldenCommand {
    /// Run every case in a directory of golden vectors.
    #[command(after_help = "Example: mindseye-tools golden check tests/data/golden --via all --json")]
    Check {
        /// Directory with dit/, vae/, umt5/, sched/, plucker/, rope_time/, tokenizer/, pipeline/ (those that exist), or
        /// with such directories below it.
        dir: PathBuf,
        /// Interpreter that computes the networks.
        #[arg(long, value_enum, default_value_t = ViaArg::Eager)]
        via: ViaArg,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
enum ViaArg {
    /// The eager interpreter.
    Eager,
    /// Export to ONNX and run on the embedded CPU backend.
    Onnx,
    /// Both.
    All,
}

/// Outcome of one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseResult {
    /// Directory and name, for example `dit/ctx_gap50_cond`.
    pub case: String,
    /// What computed it: `eager`, `onnx`, or `host` for what needs no network.
    pub via: String,
    /// Largest absolute difference; `null` in JSON when a value was not a number or the case failed to run.
    pub worst: Option<f64>,
    /// Tensor with the largest difference.
    pub at: String,
    /// Tensors compared.
    pub tensors: usize,
    /// Largest difference that passes.
    pub tolerance: f64,
    /// Whether it passed.
    pub pass: bool,
    /// Why the case could not be run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Collects the comparisons of one case.
pub(crate) struct Case {
    name: String,
    tolerance: f64,
    worst: f64,
    at: String,
    tensors: usize,
}

impl Case {
    pub(crate) fn new(name: impl Into<String>, tolerance: f64) -> Self {
        Self { name: name.into(), tolerance, worst: 0.0, at: String::new(), tensors: 0 }
    }

    /// Compares two tensors element by element.
    pub(crate) fn compare<A: Copy + Into<f64>, B: Copy + Into<f64>>(
        &mut self,
        what: &str,
        got: &[A],
        wanted: &[B],
    ) -> anyhow::Result<()> {
        ensure!(
            got.len() == wanted.len(),
            "{what}: {} values, the reference has {}",
            got.len(),
            wanted.len()
        );
        ensure!(!got.is_empty(), "{what}: nothing to compare");
        self.tensors += 1;
        let mut worst = 0.0f64;
        for (a, b) in got.iter().zip(wanted) {
            let d = ((*a).into() - (*b).into()).abs();
            worst = if d.is_nan() { f64::INFINITY } else { worst.max(d) };
        }
        tracing::trace!(case = self.name, what, worst, "compared");
        if worst > self.worst || self.at.is_empty() {
            self.worst = worst;
            self.at = what.to_owned();
        }
        Ok(())
    }

    /// Demands that two values are equal.
    pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        what: &str,
        got: T,
        wanted: T,
    ) -> anyhow::Result<()> {
        self.tensors += 1;
        ensure!(got == wanted, "{what}: {got:?}, the reference has {wanted:?}");
        Ok(())
    }

    fn finish(self, via: &str, outcome: anyhow::Result<()>) -> CaseResult {
        let error = match outcome {
            Ok(()) if self.tensors == 0 => Some("nothing was compared".to_owned()),
            Ok(()) => None,
            Err(error) => Some(format!("{error:#}")),
        };
        CaseResult {
            case: self.name,
            via: via.to_owned(),
            worst: (error.is_none() && self.worst.is_finite()).then_some(self.worst),
            at: self.at,
            tensors: self.tensors,
            tolerance: self.tolerance,
            pass: error.is_none() && self.worst <= self.tolerance,
            error,
        }
    }
}

/// Results of a run.
#[derive(Default)]
pub(crate) struct Report(Vec<CaseResult>);

impl Report {
    /// Runs one case; its errors are part of the report.
    pub(crate) fn case(
        &mut self,
        via: &str,
        mut case: Case,
        run: impl FnOnce(&mut Case) -> anyhow::Result<()>,
    ) {
        let outcome = run(&mut case);
        self.0.push(case.finish(via, outcome));
    }
}

/// Runs `golden`.
///
/// # Errors
/// When the directory cannot be read or holds no cases. Failed cases are not errors: exit status 1.
pub fn run(args: GoldenArgs) -> anyhow::Result<ExitCode> {
    let GoldenCommand::Check { dir, via, json } = args.command;
    let vias: &[Via] = match via {
        ViaArg::Eager => &[Via::Eager],
        ViaArg::Onnx => &[Via::Onnx],
        ViaArg::All => &[Via::Eager, Via::Onnx],
    };
    let results = check(&dir, vias)?;
    let failed = results.iter().filter(|r| !r.pass).count();
    if json {
        let document = serde_json::json!({
            "dir": dir.display().to_string(),
            "passed": results.len() - failed,
            "failed": failed,
            "cases": results,
        });
        println!("{document:#}");
    } else {
        for r in &results {
            let verdict = if r.pass { "pass" } else { "FAIL" };
            let worst = r.worst.map_or("-".to_owned(), |w| format!("{w:.2e}"));
            println!(
                "{verdict}  {:<34} {:<6} worst {worst:<9} tolerance {:.1e}  {} tensors, worst in {}",
                r.case, r.via, r.tolerance, r.tensors, r.at
            );
            if let Some(error) = &r.error {
                println!("      {error}");
            }
        }
        println!("{} passed, {failed} failed", results.len() - failed);
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Folders that hold cases.
const CASES: [&str; 8] = ["dit", "vae", "umt5", "sched", "plucker", "rope_time", "tokenizer", "pipeline"];
/// Folders below the given one that are looked through for sets.
const DEPTH_MAX: usize = 8;

/// Sets of cases in `dir`: itself, where it holds any of [`CASES`], and those in its folders otherwise, in the order of
/// their names.
fn sets(dir: &Path, depth: usize) -> std::io::Result<Vec<PathBuf>> {
    if CASES.iter().any(|name| dir.join(name).is_dir()) {
        return Ok(vec![dir.to_owned()]);
    }
    let mut below = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            below.push(path);
        }
    }
    below.sort();
    let mut found = Vec::new();
    for path in below.iter().filter(|_| depth > 0) {
        found.extend(sets(path, depth - 1)?);
    }
    Ok(found)
}

/// Runs every case in `dir` and in the folders below it: what needs no network once, the networks once per interpreter.
/// Cases of a folder below are named with it: `set1/dit/joint_cfg`.
///
/// # Errors
/// When a directory cannot be read or there are no cases.
pub fn check(dir: &Path, vias: &[Via]) -> anyhow::Result<Vec<CaseResult>> {
    ensure!(dir.is_dir(), "{}: not a directory; expected one with dit/, vae/, ...", dir.display());
    let mut all = Vec::new();
    for set in sets(dir, DEPTH_MAX).with_context(|| dir.display().to_string())? {
        let below = set.strip_prefix(dir).unwrap_or(Path::new(""));
        for mut result in check_set(&set, vias) {
            result.case = below.join(&result.case).display().to_string();
            all.push(result);
        }
    }
    ensure!(
        !all.is_empty(),
        "{}: no golden cases here or in the folders below; expected dit/, vae/, umt5/, ...",
        dir.display()
    );
    Ok(all)
}

/// Runs every case of one set.
fn check_set(dir: &Path, vias: &[Via]) -> Vec<CaseResult> {
    let mut report = Report::default();
    host::schedules(dir, &mut report);
    host::plucker(dir, &mut report);
    host::rope_time(dir, &mut report);
    host::tokenizer(dir, &mut report);
    for via in vias {
        networks::dit(dir, *via, &mut report);
        networks::umt5(dir, *via, &mut report);
        networks::vae(dir, *via, &mut report);
        pipeline::pipeline(dir, *via, &mut report);
    }
    report.0
}

/// A file of vectors.
pub(crate) struct Vectors(Checkpoint);

impl Vectors {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(Checkpoint::open(path)?))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.tensors().map(|(name, _)| name)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    pub(crate) fn shape(&self, name: &str) -> anyhow::Result<&[usize]> {
        Ok(&self.0.get(name).with_context(|| format!("no tensor {name}"))?.shape)
    }

    /// The shape as exactly `N` sizes.
    pub(crate) fn sizes<const N: usize>(&self, name: &str) -> anyhow::Result<[usize; N]> {
        let shape = self.shape(name)?;
        shape.try_into().with_context(|| format!("tensor {name} has shape {shape:?}, expected {N} axes"))
    }

    pub(crate) fn f32(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        Ok(self.0.read_f32(name)?)
    }

    pub(crate) fn f64(&self, name: &str) -> anyhow::Result<Vec<f64>> {
        Ok(self.0.read_f64(name)?)
    }

    pub(crate) fn i64(&self, name: &str) -> anyhow::Result<Vec<i64>> {
        Ok(self.0.read_i64(name)?)
    }

    pub(crate) fn rows(&self, name: &str) -> anyhow::Result<Vec<usize>> {
        let rows = self.i64(name)?.into_iter().map(usize::try_from).collect::<Result<_, _>>();
        rows.with_context(|| format!("tensor {name} holds a negative number"))
    }

    pub(crate) fn number(&self, key: &str) -> anyhow::Result<f64> {
        let text = self.0.metadata().get(key).with_context(|| format!("no metadata {key}"))?;
        text.parse().with_context(|| format!("metadata {key} = {text:?} is not a number"))
    }

    /// All tensors as weights.
    pub(crate) fn params(&self) -> anyhow::Result<crate::eager::Params> {
        let mut out = crate::eager::Params::new();
        for (name, entry) in self.0.tensors() {
            out.insert(name, &entry.shape, self.0.read_f32(name)?);
        }
        Ok(out)
    }
}

/// `config.json` of a network.
pub(crate) struct Json(serde_json::Value, PathBuf);

impl Json {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(Self(serde_json::from_str(&text).with_context(|| path.display().to_string())?, path.to_owned()))
    }

    fn get<'a, T: Deserialize<'a>>(&'a self, key: &str) -> anyhow::Result<T> {
        let value = self.0.get(key).with_context(|| format!("{}: no {key}", self.1.display()))?;
        T::deserialize(value).with_context(|| format!("{}: {key} = {value}", self.1.display()))
    }

    fn size(&self, key: &str) -> anyhow::Result<usize> {
        self.get(key)
    }

    fn want<T: for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(
        &self,
        key: &str,
        wanted: T,
    ) -> anyhow::Result<()> {
        let got: T = self.get(key)?;
        ensure!(got == wanted, "{}: {key} = {got:?}, only {wanted:?} is supported", self.1.display());
        Ok(())
    }

    /// A `WanTransformer3DModel` for latents of this height and width and this many text rows.
    pub(crate) fn dit(&self, latent: [usize; 2], text_len: usize) -> anyhow::Result<DitConfig> {
        self.want("_class", "WanTransformer3DModel".to_owned())?;
        let [patch_t, ph, pw]: [usize; 3] = self.get("patch_size")?;
        ensure!(patch_t == 1, "temporal patches of {patch_t} are not supported");
        self.want("cross_attn_norm", true)?;
        self.want("qk_norm", "rms_norm_across_heads".to_owned())?;
        let cfg = DitConfig {
            in_channels: self.size("in_channels")?,
            out_channels: self.size("out_channels")?,
            latent_height: latent[0],
            latent_width: latent[1],
            patch: [ph, pw],
            heads: self.size("num_attention_heads")?,
            head_dim: self.size("attention_head_dim")?,
            layers: self.size("num_layers")?,
            ffn_dim: self.size("ffn_dim")?,
            text_dim: self.size("text_dim")?,
            text_len,
            freq_dim: self.size("freq_dim")?,
            eps: self.get("eps")?,
            rope_theta: 10_000.0,
            prediction: mindseye_engines::model::dit::Prediction::Velocity,
            camera_channels: 0,
            pooled_text: false,
            lift: false,
            attributes: 0,
            guide: None,
        };
        cfg.validate().map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(cfg)
    }

    /// A `UMT5EncoderModel`.
    pub(crate) fn umt5(&self) -> anyhow::Result<Umt5Config> {
        self.want("_class", "UMT5EncoderModel".to_owned())?;
        self.want("feed_forward_proj", "gated-gelu".to_owned())?;
        let cfg = Umt5Config {
            vocab_size: self.size("vocab_size")?,
            d_model: self.size("d_model")?,
            d_kv: self.size("d_kv")?,
            d_ff: self.size("d_ff")?,
            num_layers: self.size("num_layers")?,
            num_heads: self.size("num_heads")?,
            buckets: self.size("relative_attention_num_buckets")?,
            max_distance: self.size("relative_attention_max_distance")?,
            eps: self.get("layer_norm_epsilon")?,
        };
        cfg.validate().map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(cfg)
    }

    /// An `AutoencoderKLWan` of the 2.2 kind.
    pub(crate) fn vae(&self) -> anyhow::Result<VaeConfig> {
        self.want("_class", "AutoencoderKLWan".to_owned())?;
        self.want("is_residual", true)?;
        let scales: Vec<f64> = self.get("attn_scales")?;
        if !scales.is_empty() {
            bail!("{}: attention outside the middle is not supported", self.1.display());
        }
        let cfg = VaeConfig {
            base_dim: self.size("base_dim")?,
            decoder_base_dim: self.size("decoder_base_dim")?,
            z_dim: self.size("z_dim")?,
            dim_mult: self.get("dim_mult")?,
            num_res_blocks: self.size("num_res_blocks")?,
            temporal_downsample: self.get("temperal_downsample")?,
            patch_size: self.size("patch_size")?,
            latents_mean: self.get("latents_mean")?,
            latents_std: self.get("latents_std")?,
        };
        cfg.validate().map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(cfg)
    }
}
