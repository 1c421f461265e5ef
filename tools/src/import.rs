//! `mindseye-tools import`: published weights to a bundle of weights.
//!
//! Three layouts are read: that of diffusers and transformers (`transformer/`, `vae/`, `text_encoder/`, `tokenizer/`),
//! that of the original Wan release (shards and an index at the top, `*VAE*.pth`, `models_t5*.pth`,
//! `google/umt5-xxl/`), and ComfyUI's single files, in its folders (`diffusion_models/`, `vae/`, `text_encoders/`) or
//! all in one; upper and lower case are the same. Names and shapes of all tensors are checked before the first byte is
//! copied; values keep their type (8-bit floats become F16, or F32 with their factors) and are copied in pieces, so no
//! model is ever in memory. NaN and infinities are refused. `.pth` and `.pt` files are read without executing
//! anything.
//!
//! The result holds weights. `mindseye-tools export BUNDLE --out DIR` turns it into the graphs that
//! `mindseye replay --bundle DIR` runs.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail, ensure};
use mindseye_builder::checkpoint::{
    Checkpoint, CheckpointError, Dtype, is_apple_double,
    lora::Lora,
    names::{
        Component, Layout, Located, Location, camera_params, dit_params, head_params, locate, umt5_params,
        vae_params,
    },
};
use mindseye_builder::onnx::{CheckpointWeights, WeightSource};
use mindseye_engines::{
    bundle::{
        BoundingBoxSpec, BundleWriter, CameraSpec, ComponentFormat, Evaluation, FORMAT, Guide, ImageSpec,
        LatentSpec, LayoutSpec, LiftParams, Limits, Manifest, Networks, Provenance, RopeSpec, SamplerSpec,
        TextSpec,
    },
    model::{ParamSpec, dit::DitConfig, umt5::Umt5Config, vae::VaeConfig},
    sampler::{Grid, Solver},
    text::Tokenizer,
};
use mindseye_train::eager::Params;
use serde::Deserialize;

/// The preset that is used without `--model`.
const WAN22: &str = include_str!("../../configs/models/wan22-5b.toml");
/// Every how many camera frames one is kept, and at which rate (Video4Spatial samples every third frame).
const FRAME_STRIDE: usize = 3;
const FRAMES_PER_SECOND: f64 = 30.0;
/// Context latents in the training of Video4Spatial: 169 frames.
const CONTEXT_TRAINED: usize = 43;
/// Values copied at once.
const CHUNK: usize = 1 << 20;

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
    /// A LoRA for the denoiser (safetensors), added to its weights.
    #[arg(long, requires = "lora_strength")]
    pub lora: Option<PathBuf>,
    /// How strongly it is added: 1 as it was trained.
    #[arg(long, requires = "lora")]
    pub lora_strength: Option<f32>,
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
    /// Model files of earlier versions have `[lift] box_min` here.
    #[serde(alias = "lift")]
    bounding_box: ModelBox,
    text: Option<ModelText>,
    camera: Option<CameraSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelBox {
    #[serde(alias = "box_min")]
    score_min: f64,
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
#[derive(Default, serde::Serialize)]
struct Imported {
    component: &'static str,
    source: String,
    layout: Option<&'static str>,
    /// What stood before all names.
    #[serde(skip_serializing_if = "str::is_empty")]
    prefix: &'static str,
    /// Tensors of other networks in the same file, which were passed over.
    #[serde(skip_serializing_if = "is_zero")]
    others: usize,
    /// Tensors that the checkpoint lacks and that were filled with zeros: they change nothing before they are trained.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    zero_filled: Vec<String>,
    /// Matrices that a LoRA was added to.
    #[serde(skip_serializing_if = "is_zero")]
    adapted: usize,
    tensors: usize,
    parameters: u64,
    dtypes: BTreeMap<&'static str, usize>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// A network found and checked.
struct Found {
    part: Part,
    checkpoint: Checkpoint,
    location: Location,
    lora: Option<Lora>,
    /// What the checkpoint lacks and begins with zeros, as diffusers' control networks do.
    zeros: Vec<ParamSpec>,
}

impl Found {
    /// How zeros are stored: as the tensors beside them.
    fn zeros_dtype(&self) -> Dtype {
        self.location.tensors.first().map_or(Dtype::F32, |tensor| self.dtype(tensor))
    }

    fn report(&self) -> Imported {
        let tensors = &self.location.tensors;
        let mut dtypes = BTreeMap::new();
        for tensor in tensors {
            *dtypes.entry(tensor.dtype.name()).or_default() += 1;
        }
        Imported {
            component: self.part.name(),
            source: self.checkpoint.path().display().to_string(),
            layout: Some(if self.location.layout == Layout::Diffusers { "diffusers" } else { "original" }),
            prefix: self.location.prefix,
            others: self.location.others,
            zero_filled: self.zeros.iter().map(|z| z.name.clone()).collect(),
            adapted: self.lora.as_ref().map_or(0, Lora::len),
            tensors: tensors.len(),
            parameters: tensors.iter().map(|t| t.spec.shape.iter().product::<usize>() as u64).sum(),
            dtypes,
        }
    }

    /// How a tensor is stored: one that a LoRA changes as F32, all others without loss.
    fn dtype(&self, tensor: &Located) -> Dtype {
        match &self.lora {
            Some(lora) if lora.changes(&tensor.spec.name) => Dtype::F32,
            _ => tensor.exact_dtype(),
        }
    }
}

/// Where a tokenizer was found.
enum Pieces {
    File(PathBuf),
    /// In the text encoder's file, as ComfyUI keeps it.
    Inside(PathBuf, Vec<u8>),
}

impl Pieces {
    fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Inside(path, _) => path,
        }
    }
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
            let prefix = if i.prefix.is_empty() { String::new() } else { format!(" after {:?}", i.prefix) };
            let lora = if i.adapted > 0 { format!(", LoRA added to {}", i.adapted) } else { String::new() };
            let others = if i.others > 0 {
                format!(", {} of other networks left out", i.others)
            } else {
                String::new()
            };
            println!(
                "{:<13} {} tensors, {} values{layout}{prefix}{lora}{others}, from {}",
                i.component, i.tensors, i.parameters, i.source
            );
            if !i.zero_filled.is_empty() {
                println!(
                    "{:<13} {} filled with zeros: not in the checkpoint; paths have no effect until they are trained",
                    "",
                    i.zero_filled.join(", ")
                );
            }
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
    let model = read_model(args.model.as_deref())?;
    // Everything is found and checked before anything is written.
    let wanted = |part: &Part| args.parts.contains(part);
    let networks = Part::ALL.into_iter().filter(|part| wanted(part) && *part != Part::Tokenizer);
    let networks: Vec<Found> =
        networks.map(|part| find_network(args, &model, part)).collect::<anyhow::Result<_>>()?;
    let tokenizer = wanted(&Part::Tokenizer).then(|| find_vocabulary(&args.dir, &model)).transpose()?;

    let mut writer = BundleWriter::create(&args.out, manifest(&model, args, &networks)?)?;
    let mut report = Vec::new();
    for found in &networks {
        let file = format!("{}.safetensors", found.part.name());
        write_safetensors(found, &writer.path(&file))?;
        writer.add(found.part.name(), ComponentFormat::Safetensors, &[&file])?;
        report.push(found.report());
    }
    if let Some((pieces, vocabulary)) = tokenizer {
        let file = "tokenizer.model";
        match &pieces {
            Pieces::File(path) => std::fs::copy(path, writer.path(file)).map(drop),
            Pieces::Inside(_, bytes) => std::fs::write(writer.path(file), bytes),
        }
        .with_context(|| pieces.path().display().to_string())?;
        writer.add("tokenizer", ComponentFormat::Sentencepiece, &[file])?;
        report.push(Imported {
            component: "tokenizer",
            source: pieces.path().display().to_string(),
            parameters: vocabulary as u64,
            ..Imported::default()
        });
    }
    writer.finish()?;
    Ok(report)
}

/// The model configuration in `path`, or the preset; its networks fit each other.
fn read_model(path: Option<&Path>) -> anyhow::Result<Model> {
    let text = match path {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => WAN22.to_owned(),
    };
    let place = path.map_or("built-in wan22-5b.toml".to_owned(), |p| p.display().to_string());
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
    Ok(model)
}

/// The tokenizer and the number of its pieces, for each of which the text encoder has a row.
fn find_vocabulary(dir: &Path, model: &Model) -> anyhow::Result<(Pieces, usize)> {
    let pieces = find_tokenizer(dir)?;
    let tokenizer = match &pieces {
        Pieces::File(path) => Tokenizer::open(path)?,
        Pieces::Inside(_, bytes) => Tokenizer::from_bytes(bytes)?,
    };
    let vocabulary = tokenizer.vocabulary();
    ensure!(
        vocabulary <= model.umt5.vocab_size,
        "{}: {vocabulary} pieces, but the text encoder has {} rows",
        pieces.path().display(),
        model.umt5.vocab_size
    );
    Ok((pieces, vocabulary))
}

/// Weights of a denoiser that a checkpoint has, and those that it lacks because they are this project's: the projection of
/// camera rays, lift heads.
pub(crate) fn denoiser_params(dit: &DitConfig, checkpoint: &Checkpoint) -> (Vec<ParamSpec>, Vec<ParamSpec>) {
    let (mut specs, mut lacking) = (dit_params(dit), Vec::new());
    // A checkpoint that was trained here has them.
    for own in [camera_params(dit), head_params(dit)] {
        let there = own.first().is_some_and(|c| checkpoint.tensors().any(|(n, _)| n.ends_with(&c.name)));
        if there { &mut specs } else { &mut lacking }.extend(own);
    }
    (specs, lacking)
}

/// The weights of one network in a folder with published weights or in a bundle of weights; of a denoiser those that it has of
/// `dit`.
///
/// # Errors
/// A folder without, a tensor that is missing, left over or misshapen.
pub(crate) fn weights(
    dir: &Path,
    part: Part,
    specs: impl FnOnce(&Checkpoint) -> (Component, Vec<ParamSpec>),
) -> anyhow::Result<Params> {
    ensure!(dir.is_dir(), "{}: not a directory; expected one with published weights", dir.display());
    let own = dir.join(format!("{}.safetensors", part.name()));
    let checkpoint = if own.is_file() { Checkpoint::open(&own)? } else { find(dir, part)? };
    let (component, specs) = specs(&checkpoint);
    let weights = CheckpointWeights::locate(checkpoint, component, &specs)?;
    let mut params = Params::new();
    for spec in specs {
        let mut values = vec![0.0; spec.shape.iter().product()];
        weights.read(&spec.name, 0, &mut values).with_context(|| dir.display().to_string())?;
        params.insert(&spec.name, &spec.shape, values);
    }
    Ok(params)
}

/// The checkpoint of one network, with all its tensors located.
fn find_network(args: &ImportArgs, model: &Model, part: Part) -> anyhow::Result<Found> {
    let checkpoint = find(&args.dir, part)?;
    let mut zeros = Vec::new();
    let (component, specs): (Component, Vec<ParamSpec>) = match part {
        Part::Denoiser => {
            let (specs, lacking) = denoiser_params(&model.dit, &checkpoint);
            // Zeros in the place of heads would be answers.
            if let Some(head) = lacking.iter().find(|spec| spec.name.starts_with("lift.")) {
                bail!(
                    "{}: it lacks {}, but the model has lift = true in [dit]; train heads first, or remove it",
                    checkpoint.path().display(),
                    head.name
                );
            }
            zeros = lacking;
            (Component::Dit, specs)
        }
        Part::Vae => (Component::Vae, vae_params(&model.vae)),
        Part::TextEncoder | Part::Tokenizer => (Component::TextEncoder, umt5_params(&model.umt5)),
    };
    let location = locate(component, &specs, &checkpoint)?;
    let lora = match (part, &args.lora, args.lora_strength) {
        (Part::Denoiser, Some(path), Some(strength)) => {
            Some(Lora::read(&Checkpoint::open(path)?, component, &specs, strength)?)
        }
        _ => None,
    };
    Ok(Found { part, checkpoint, location, lora, zeros })
}

/// Files in a directory whose names, in lower case, a test accepts, sorted. What macOS puts beside them is passed over.
fn files(dir: &Path, accept: impl Fn(&str) -> bool) -> anyhow::Result<Vec<PathBuf>> {
    entries(dir, |path, name| !is_apple_double(name) && path.is_file() && accept(name))
}

/// Folders in a directory with one of these names, in any case.
fn folders(dir: &Path, names: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    entries(dir, |path, name| names.contains(&name) && path.is_dir())
}

fn entries(dir: &Path, accept: impl Fn(&Path, &str) -> bool) -> anyhow::Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).map(str::to_lowercase);
        if name.is_some_and(|name| accept(&path, &name)) {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

fn is_weights(name: &str) -> bool {
    [".safetensors", ".pth", ".pt"].iter().any(|end| name.ends_with(end))
}

fn is_vae(name: &str) -> bool {
    name.contains("vae")
}

fn is_text_encoder(name: &str) -> bool {
    name.starts_with("models_t5") || name.contains("umt5")
}

/// The checkpoint of one network: in its own folder, else beside the others.
fn find(dir: &Path, part: Part) -> anyhow::Result<Checkpoint> {
    let (own, expected): (&[&str], &str) = match part {
        Part::Denoiser => (
            &["transformer", "diffusion_models", "unet"],
            "transformer/, diffusion_models/ or diffusion_pytorch_model*.safetensors",
        ),
        Part::Vae => (&["vae"], "vae/ or one *VAE*.pth or *vae*.safetensors"),
        Part::TextEncoder | Part::Tokenizer => (
            &["text_encoder", "text_encoders", "clip"],
            "text_encoder/, text_encoders/ or one models_t5*.pth",
        ),
    };
    let accept = |name: &str| {
        is_weights(name)
            && match part {
                Part::Denoiser => !is_vae(name) && !is_text_encoder(name),
                Part::Vae => is_vae(name),
                Part::TextEncoder | Part::Tokenizer => is_text_encoder(name),
            }
    };
    match folders(dir, own)?.as_slice() {
        [one] => return Ok(Checkpoint::open_dir(one)?),
        [] => {}
        [first, second, ..] => {
            bail!("{} and {} both may hold the {}", first.display(), second.display(), part.name())
        }
    }
    let mut found = Vec::new();
    if part == Part::Denoiser {
        found = files(dir, |n| n.ends_with(".safetensors.index.json"))?;
    }
    if found.is_empty() {
        found = files(dir, accept)?;
    }
    match (part, found.as_slice()) {
        (_, [one]) => Ok(Checkpoint::open(one)?),
        (Part::Denoiser, []) => bail!("{}: no denoiser here; expected {expected}", dir.display()),
        (_, many) => bail!(
            "{}: {} candidates for {}; expected {expected} (or leave it out with --parts)",
            dir.display(),
            many.len(),
            part.name()
        ),
    }
}

fn find_tokenizer(dir: &Path) -> anyhow::Result<Pieces> {
    for folder in ["tokenizer", "google/umt5-xxl"] {
        let sub = dir.join(folder);
        if !sub.is_dir() {
            continue;
        }
        return match files(&sub, |n| n.ends_with(".model"))?.as_slice() {
            [one] => Ok(Pieces::File(one.clone())),
            found => bail!("{}: {} SentencePiece models (*.model), expected one", sub.display(), found.len()),
        };
    }
    if let Ok(checkpoint) = find(dir, Part::TextEncoder)
        && let Some(entry) = checkpoint.get("spiece_model")
    {
        let mut bytes = vec![0; usize::try_from(entry.bytes()).unwrap_or(usize::MAX)];
        checkpoint.read_bytes("spiece_model", 0, &mut bytes)?;
        return Ok(Pieces::Inside(checkpoint.path().to_owned(), bytes));
    }
    bail!("{}: no tokenizer here; expected tokenizer/ or google/umt5-xxl/ with spiece.model", dir.display())
}

/// The bundle's manifest without components. Long, since it names every field once.
fn manifest(model: &Model, args: &ImportArgs, networks: &[Found]) -> anyhow::Result<Manifest> {
    let mut dtypes: Vec<Dtype> = Vec::new();
    for found in networks {
        for dtype in found.location.tensors.iter().map(|t| found.dtype(t)) {
            if !dtypes.contains(&dtype) {
                dtypes.push(dtype);
            }
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
            guide: Guide::None,
        },
        provenance: Provenance {
            source: format!(
                "imported from {}{}",
                args.dir.file_name().unwrap_or_default().to_string_lossy(),
                if networks.iter().any(|n| !n.zeros.is_empty()) {
                    "; camera_embedding begins with zeros"
                } else {
                    ""
                }
            ),
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
            depth: None,
        },
        bounding_box: BoundingBoxSpec { score_min: model.bounding_box.score_min },
        lift: model.dit.lift.then(LiftParams::uncalibrated),
        evaluation: Evaluation::default(),
        component: BTreeMap::new(),
    })
}

/// Copies tensors under their canonical names, without loss; a LoRA is added on the way.
fn write_safetensors(found: &Found, path: &Path) -> anyhow::Result<()> {
    let tensors = &found.location.tensors;
    let mut header = serde_json::Map::new();
    let mut offset = 0u64;
    let mut add = |spec: &ParamSpec, dtype: Dtype| {
        let bytes = spec.shape.iter().product::<usize>() as u64 * dtype.size() as u64;
        header.insert(
            spec.name.clone(),
            serde_json::json!({
                "dtype": dtype.name(),
                "shape": spec.shape,
                "data_offsets": [offset, offset + bytes],
            }),
        );
        offset += bytes;
        bytes
    };
    for tensor in tensors {
        add(&tensor.spec, found.dtype(tensor));
    }
    let zeros: u64 = found.zeros.iter().map(|spec| add(spec, found.zeros_dtype())).sum();
    let mut header = serde_json::to_vec(&header)?;
    // Data starts at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    let place = || path.display().to_string();
    let mut out = BufWriter::new(File::create(path).with_context(place)?);
    out.write_all(&(header.len() as u64).to_le_bytes())
        .and_then(|()| out.write_all(&header))
        .with_context(place)?;
    for tensor in tensors {
        copy_values(found, tensor, &mut |bytes| out.write_all(bytes).with_context(place))?;
    }
    std::io::copy(&mut std::io::repeat(0).take(zeros), &mut out).with_context(place)?;
    out.into_inner()
        .map_err(std::io::IntoInnerError::into_error)
        .and_then(|f| f.sync_all())
        .with_context(place)
}

/// Gives all values of a tensor to `sink` in pieces, in the type that they are stored in; all must be finite.
fn copy_values(
    found: &Found,
    tensor: &Located,
    sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let total: usize = tensor.spec.shape.iter().product();
    let (from, to) = (tensor.dtype, found.dtype(tensor));
    let mut values = vec![0f32; CHUNK.min(total)];
    let mut bytes = vec![0; CHUNK.min(total) * from.size()];
    let mut done = 0;
    while done < total {
        let n = CHUNK.min(total - done);
        let values = &mut values[..n];
        // Also where bytes are copied: this is what finds NaN and infinities.
        found.checkpoint.read_finite(&tensor.source, done as u64, values)?;
        if from == to && to != Dtype::F32 {
            let bytes = &mut bytes[..n * from.size()];
            found.checkpoint.read_bytes(&tensor.source, (done * from.size()) as u64, bytes)?;
            sink(bytes)?;
        } else {
            if let Some(scale) = tensor.scale {
                values.iter_mut().for_each(|v| *v *= scale);
            }
            if let Some(lora) = &found.lora {
                lora.add_to(&tensor.spec.name, done as u64, values);
            }
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(CheckpointError::NotFinite {
                    path: found.checkpoint.path().to_owned(),
                    name: tensor.source.clone(),
                    element: (done + at) as u64,
                    value: values[at],
                }
                .into());
            }
            let half = |v: &f32| half::f16::from_f32(*v).to_le_bytes();
            let out: Vec<u8> = match to {
                Dtype::F16 => values.iter().flat_map(half).collect(),
                _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            };
            sink(&out)?;
        }
        done += n;
    }
    Ok(())
}
