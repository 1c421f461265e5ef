//! `mindseye-tools import`: published weights to a bundle of weights.
//!
//! Both layouts are read: that of diffusers and transformers (`transformer/`, `vae/`, `text_encoder/`, `tokenizer/`)
//! and that of the original Wan release (shards and an index at the top, `*VAE*.pth`, `models_t5*.pth`,
//! `google/umt5-xxl/`). Names and shapes of all tensors are checked before the first byte is copied; values keep
//! their type and are copied in pieces, so no model is ever in memory. `.pth` files are read without executing
//! anything.
//!
//! The result holds weights. `mindseye-tools export BUNDLE --out DIR` turns it into the graphs that
//! `mindseye replay --bundle DIR` runs.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail, ensure};
use mindseye_builder::checkpoint::{
    Checkpoint, Dtype,
    names::{Component, Layout, Located, dit_params, locate},
};
use mindseye_engines::{
    bundle::{
        BoundingBoxSpec, BundleWriter, CameraSpec, ComponentFormat, Evaluation, FORMAT, ImageSpec,
        LatentSpec, LayoutSpec, Limits, Manifest, Networks, Provenance, RopeSpec, SamplerSpec, TextSpec,
    },
    model::{ParamSpec, dit::DitConfig, umt5::Umt5Config, vae::VaeConfig},
    sampler::{Grid, Solver},
    text::Tokenizer,
};
use serde::Deserialize;

/// The preset that is used without `--model`.
const WAN22: &str = include_str!("../../configs/models/wan22-5b.toml");
/// Every how many camera frames one is kept, and at which rate (Video4Spatial samples every third frame).
const FRAME_STRIDE: usize = 3;
const FRAMES_PER_SECOND: f64 = 30.0;
/// Context latents in the training of Video4Spatial: 169 frames.
const CONTEXT_TRAINED: usize = 43;
/// Bytes copied at once.
const CHUNK: usize = 4 << 20;

/// Turn published Wan2.2 weights into a bundle of weights; `export` then makes it runnable.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: mindseye-tools import Wan2.2-TI2V-5B-Diffusers --out bundles/wan22-5b\n  \
                        mindseye-tools export bundles/wan22-5b --out bundles/wan22-5b-graphs\n  \
                        mindseye replay drive.mcap --goal \"find the red chair\" --bundle bundles/wan22-5b-graphs")]
pub struct ImportArgs {
    /// Directory with the weights, in the layout of diffusers or of the original release.
    pub dir: PathBuf,
    /// Where the bundle is put.
    #[arg(long)]
    pub out: PathBuf,
    /// Model configuration (TOML with `dit`, `vae`, `umt5`, `layout`, `sampler`); Wan2.2 TI2V-5B without it.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Parts to import, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    pub parts: Vec<Part>,
    /// Licence of the weights as an SPDX expression (Wan2.2 itself is under Apache-2.0).
    #[arg(long, default_value = "NOASSERTION")]
    pub license: String,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// A part of a bundle.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The diffusion transformer.
    Denoiser,
    /// The video autoencoder.
    Vae,
    /// The text encoder.
    TextEncoder,
    /// The tokenizer.
    Tokenizer,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 4] = [Self::Denoiser, Self::Vae, Self::TextEncoder, Self::Tokenizer];

    /// Name of the component in the bundle.
    fn name(self) -> &'static str {
        match self {
            Self::Denoiser => "denoiser",
            Self::Vae => "vae",
            Self::TextEncoder => "text_encoder",
            Self::Tokenizer => "tokenizer",
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(if *self == Self::TextEncoder { "text-encoder" } else { self.name() })
    }
}

/// What a model configuration says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    name: String,
    dit: DitConfig,
    vae: VaeConfig,
    umt5: Umt5Config,
    layout: ModelLayout,
    sampler: ModelSampler,
    bounding_box: BoundingBoxSpec,
    text: Option<ModelText>,
    camera: Option<CameraSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelText {
    prompt: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelLayout {
    /// Images of the longest recording of inference.
    #[serde(default, rename = "recording_images")]
    _recording_images: Option<usize>,
    context_latents: usize,
    motion_latents: usize,
    box_latents: usize,
    gap: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelSampler {
    grid: Grid,
    solver: Solver,
    shift: f64,
    steps: usize,
    guidance: f64,
}

/// What was imported, for the report.
#[derive(serde::Serialize)]
struct Imported {
    component: &'static str,
    source: String,
    layout: Option<&'static str>,
    tensors: usize,
    parameters: u64,
    dtypes: BTreeMap<&'static str, usize>,
}

/// A network found and checked.
struct Found {
    part: Part,
    checkpoint: Checkpoint,
    layout: Layout,
    tensors: Vec<Located>,
}

/// Runs `import`.
///
/// # Errors
/// What is missing, left over or misshapen, naming file and tensor. Nothing is written then.
pub fn run(args: ImportArgs) -> anyhow::Result<ExitCode> {
    let imported = import(&args)?;
    if args.json {
        println!(
            "{:#}",
            serde_json::json!({ "bundle": args.out.display().to_string(), "components": imported })
        );
    } else {
        for i in &imported {
            let layout = i.layout.map(|l| format!(", {l} names")).unwrap_or_default();
            println!(
                "{:<13} {} tensors, {} values{layout}, from {}",
                i.component, i.tensors, i.parameters, i.source
            );
        }
        println!("{}", args.out.display());
        println!("next: mindseye-tools export {} --out DIR", args.out.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn import(args: &ImportArgs) -> anyhow::Result<Vec<Imported>> {
    ensure!(
        args.dir.is_dir(),
        "{}: not a directory; expected one with published weights",
        args.dir.display()
    );
    let text = match &args.model {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => WAN22.to_owned(),
    };
    let place = args.model.as_ref().map_or("built-in wan22-5b.toml".to_owned(), |p| p.display().to_string());
    let model: Model = toml::from_str(&text).with_context(|| place.clone())?;
    model
        .dit
        .validate()
        .and_then(|()| model.vae.validate())
        .and_then(|()| model.umt5.validate())
        .map_err(|what| anyhow::anyhow!("{place}: {what}"))?;
    ensure!(
        model.umt5.d_model == model.dit.text_dim && model.vae.z_dim == model.dit.in_channels,
        "{place}: widths of text encoder ({}), autoencoder ({}) and dit ({}, {}) do not fit",
        model.umt5.d_model,
        model.vae.z_dim,
        model.dit.text_dim,
        model.dit.in_channels
    );

    // Everything is found and checked before anything is written.
    let mut networks = Vec::new();
    let mut tokenizer = None;
    for part in Part::ALL.into_iter().filter(|part| args.parts.contains(part)) {
        if part == Part::Tokenizer {
            let path = find_tokenizer(&args.dir)?;
            let vocabulary = Tokenizer::open(&path)?.vocabulary();
            ensure!(
                vocabulary <= model.umt5.vocab_size,
                "{}: {vocabulary} pieces, but the text encoder has {} rows",
                path.display(),
                model.umt5.vocab_size
            );
            tokenizer = Some((path, vocabulary));
            continue;
        }
        let checkpoint = find(&args.dir, part)?;
        let (component, specs): (Component, Vec<ParamSpec>) = match part {
            Part::Denoiser => (Component::Dit, dit_params(&model.dit)),
            Part::Vae => (Component::Vae, model.vae.params()),
            Part::TextEncoder | Part::Tokenizer => (Component::TextEncoder, model.umt5.params()),
        };
        let (layout, tensors) = locate(component, &specs, &checkpoint)?;
        networks.push(Found { part, checkpoint, layout, tensors });
    }

    let mut writer = BundleWriter::create(&args.out, manifest(&model, args, &networks)?)?;
    let mut report = Vec::new();
    for found in &networks {
        let file = format!("{}.safetensors", found.part.name());
        write_safetensors(&found.checkpoint, &found.tensors, &writer.path(&file))?;
        writer.add(found.part.name(), ComponentFormat::Safetensors, &[&file])?;
        let mut dtypes = BTreeMap::new();
        for tensor in &found.tensors {
            *dtypes.entry(tensor.dtype.name()).or_default() += 1;
        }
        report.push(Imported {
            component: found.part.name(),
            source: found.checkpoint.path().display().to_string(),
            layout: Some(if found.layout == Layout::Diffusers { "diffusers" } else { "original" }),
            tensors: found.tensors.len(),
            parameters: found.tensors.iter().map(|t| t.spec.shape.iter().product::<usize>() as u64).sum(),
            dtypes,
        });
    }
    if let Some((path, vocabulary)) = tokenizer {
        let file = "tokenizer.model";
        std::fs::copy(&path, writer.path(file)).with_context(|| path.display().to_string())?;
        writer.add("tokenizer", ComponentFormat::Sentencepiece, &[file])?;
        report.push(Imported {
            component: "tokenizer",
            source: path.display().to_string(),
            layout: None,
            tensors: 0,
            parameters: vocabulary as u64,
            dtypes: BTreeMap::new(),
        });
    }
    writer.finish()?;
    Ok(report)
}

/// Files in a directory whose names a test accepts, sorted.
fn files(dir: &Path, accept: impl Fn(&str) -> bool) -> anyhow::Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.file_name().and_then(|n| n.to_str()).is_some_and(&accept) {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

/// The checkpoint of one network.
fn find(dir: &Path, part: Part) -> anyhow::Result<Checkpoint> {
    let (folder, single): (&str, fn(&str) -> bool) = match part {
        Part::Denoiser => ("transformer", |_| false),
        Part::Vae => ("vae", |n| n.contains("VAE") && (n.ends_with(".pth") || n.ends_with(".safetensors"))),
        Part::TextEncoder | Part::Tokenizer => ("text_encoder", |n| {
            n.starts_with("models_t5") && (n.ends_with(".pth") || n.ends_with(".safetensors"))
        }),
    };
    let sub = dir.join(folder);
    if sub.is_dir() {
        return Ok(Checkpoint::open_dir(&sub)?);
    }
    if part == Part::Denoiser {
        let found = files(dir, |n| n.ends_with(".safetensors.index.json"))?;
        let found = if found.is_empty() {
            files(dir, |n| n.ends_with(".safetensors") && !n.contains("VAE") && !n.starts_with("models_t5"))?
        } else {
            found
        };
        return match found.as_slice() {
            [one] => Ok(Checkpoint::open(one)?),
            [] => bail!(
                "{}: no denoiser here; expected transformer/ or diffusion_pytorch_model*.safetensors",
                dir.display()
            ),
            many => bail!("{}: {} candidates for the denoiser, expected one", dir.display(), many.len()),
        };
    }
    match files(dir, single)?.as_slice() {
        [one] => Ok(Checkpoint::open(one)?),
        found => bail!(
            "{}: {} candidates for {}; expected {folder}/ or one {} (or leave it out with --parts)",
            dir.display(),
            found.len(),
            part.name(),
            if part == Part::Vae { "*VAE*.pth" } else { "models_t5*.pth" }
        ),
    }
}

fn find_tokenizer(dir: &Path) -> anyhow::Result<PathBuf> {
    for folder in ["tokenizer", "google/umt5-xxl"] {
        let sub = dir.join(folder);
        if !sub.is_dir() {
            continue;
        }
        return match files(&sub, |n| n.ends_with(".model"))?.as_slice() {
            [one] => Ok(one.clone()),
            found => bail!("{}: {} SentencePiece models (*.model), expected one", sub.display(), found.len()),
        };
    }
    bail!("{}: no tokenizer here; expected tokenizer/ or google/umt5-xxl/ with spiece.model", dir.display())
}

fn manifest(model: &Model, args: &ImportArgs, networks: &[Found]) -> anyhow::Result<Manifest> {
    let mut dtypes: Vec<Dtype> = Vec::new();
    for tensor in networks.iter().flat_map(|n| &n.tensors) {
        if !dtypes.contains(&tensor.dtype) {
            dtypes.push(tensor.dtype);
        }
    }
    let precision = match dtypes.as_slice() {
        [] => "none".to_owned(),
        [one] => one.name().to_ascii_lowercase(),
        _ => "mixed".to_owned(),
    };
    let target = 1 + model.layout.motion_latents + model.layout.box_latents;
    let spatial = model.vae.spatial_factor();
    Ok(Manifest {
        format: FORMAT,
        name: model.name.clone(),
        precision,
        target: "any".to_owned(),
        license: args.license.clone(),
        image: ImageSpec {
            width: model.dit.latent_width * spatial,
            height: model.dit.latent_height * spatial,
            frame_stride: FRAME_STRIDE,
            frames_per_second: FRAMES_PER_SECOND,
        },
        latent: LatentSpec {
            channels: model.dit.out_channels,
            height: model.dit.latent_height,
            width: model.dit.latent_width,
            frames: model.vae.temporal_factor(),
            mean: model.vae.latents_mean.clone(),
            std: model.vae.latents_std.clone(),
        },
        rope: RopeSpec { gap: model.layout.gap },
        limits: Limits {
            context_trained: CONTEXT_TRAINED.min(model.layout.context_latents),
            context_allowed: model.layout.context_latents,
            target_trained: target,
            target_allowed: target,
        },
        sampler: SamplerSpec {
            grid: model.sampler.grid,
            solver: model.sampler.solver,
            shift: model.sampler.shift,
            steps: model.sampler.steps,
            guidance: model.sampler.guidance,
            prediction: model.dit.prediction,
        },
        provenance: Provenance {
            source: format!("imported from {}", args.dir.file_name().unwrap_or_default().to_string_lossy()),
            ..Provenance::default()
        },
        dit: model.dit.clone(),
        networks: Networks {
            camera: model.camera,
            layout: Some(LayoutSpec {
                motion_latents: model.layout.motion_latents,
                box_latents: model.layout.box_latents,
                // The longest recording of the paper's inference is no bound of training: source indices are kept.
                recording_images: None,
            }),
            // How the text is put; a published checkpoint does not say.
            text: model.text.as_ref().map(|text| TextSpec::Sentence { prompt: text.prompt.clone() }),
            codec: None,
            vae: Some(model.vae.clone()),
            umt5: Some(model.umt5.clone()),
        },
        bounding_box: model.bounding_box,
        lift: None,
        evaluation: Evaluation::default(),
        component: BTreeMap::new(),
    })
}

/// Copies tensors under their canonical names, value types as they are.
fn write_safetensors(checkpoint: &Checkpoint, tensors: &[Located], path: &Path) -> anyhow::Result<()> {
    let mut header = serde_json::Map::new();
    let mut offset = 0u64;
    for tensor in tensors {
        let bytes = tensor.spec.shape.iter().product::<usize>() as u64 * tensor.dtype.size() as u64;
        header.insert(
            tensor.spec.name.clone(),
            serde_json::json!({
                "dtype": tensor.dtype.name(),
                "shape": tensor.spec.shape,
                "data_offsets": [offset, offset + bytes],
            }),
        );
        offset += bytes;
    }
    let mut header = serde_json::to_vec(&header)?;
    // Data starts at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    let place = || path.display().to_string();
    let mut out = BufWriter::new(File::create(path).with_context(place)?);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| out.write_all(&header))
        .with_context(place)?;
    let mut buffer = vec![0; CHUNK];
    for tensor in tensors {
        let bytes = tensor.spec.shape.iter().product::<usize>() as u64 * tensor.dtype.size() as u64;
        let mut done = 0;
        while done < bytes {
            let len = usize::try_from(bytes - done).unwrap_or(CHUNK).min(CHUNK);
            checkpoint.read_bytes(&tensor.source, done, &mut buffer[..len])?;
            out.write_all(&buffer[..len]).with_context(place)?;
            done += len as u64;
        }
    }
    out.into_inner()
        .map_err(std::io::IntoInnerError::into_error)
        .and_then(|f| f.sync_all())
        .with_context(place)
}
