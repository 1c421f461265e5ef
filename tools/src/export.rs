//! `mindseye-tools export`: from weights to the graphs that backends run.
//!
//! Weights are read and written tensor by tensor: no model is ever in memory. A bundle of weights becomes a bundle of
//! graphs, which is what `mindseye replay --bundle DIR`, `run` and `engine build` take; a checkpoint with a
//! configuration becomes the denoiser's graphs alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use mindseye_builder::checkpoint::Checkpoint;
use mindseye_builder::checkpoint::names::Component;
use mindseye_builder::onnx::denoiser_graph;
use mindseye_builder::onnx::{
    CheckpointWeights, GraphBuilder, Way, WeightSource, codec_graph, step_component, text_encoder_graph,
    vae_graph,
};
use mindseye_engines::backend::{DataType, Elements, PrepareOptions, Tensor, by_name};
use mindseye_engines::bundle::{Bundle, BundleWriter, ComponentFormat, MANIFEST};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::vae::Chunk;
use mindseye_engines::onnx::{Dim, ExternalData, Model, SaveOptions, SavedFiles};
use mindseye_engines::sampler::Noise;
use mindseye_engines::session_denoiser::DenoiserKind;

/// Arguments of `export`.
///
/// Example: `mindseye-tools export bundles/wan22-5b --out bundles/wan22-5b-onnx --cached`
#[derive(Clone, Debug, clap::Args)]
pub struct ExportArgs {
    /// A bundle of weights, or a file or folder with the denoiser's weights (then `--model` is needed).
    pub source: PathBuf,
    /// Where the bundle, or the graphs, are put.
    #[arg(long)]
    pub out: PathBuf,
    /// Model configuration (TOML), for weights without a bundle.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Also write the two halves, `denoiser_prefill` and `denoiser_cached`, which the runtime then prefers. Right only
    /// for weights that were trained with the one-way mask (published Wan2.2 weights were not).
    #[arg(long)]
    pub cached: bool,
    /// Put weights beside the graph even below 1.5 GB.
    #[arg(long)]
    pub external: bool,
    /// Also write seeded inputs and the embedded backend's outputs beside every graph
    /// (`<graph>.vectors.safetensors`), to check other runtimes with.
    #[arg(long)]
    pub vectors: bool,
}

/// Writes whatever `network` does with the builder as a graph to `path`.
///
/// # Errors
/// A weight that is missing or has another shape; a file that cannot be written.
pub fn export_graph(
    name: &str,
    weights: Arc<dyn WeightSource>,
    options: &SaveOptions,
    path: &Path,
    network: impl FnOnce(&mut GraphBuilder),
) -> anyhow::Result<SavedFiles> {
    let mut ops = GraphBuilder::new(name, weights);
    network(&mut ops);
    save(&ops.finish().with_context(|| format!("graph {name}"))?, path, options)
}

/// Writes one of the denoiser's graphs to `path`; `batch` is the first size of its inputs.
///
/// # Errors
/// As [`export_graph`].
pub fn export_dit(
    cfg: &DitConfig,
    weights: Arc<dyn WeightSource>,
    kind: DenoiserKind,
    batch: Dim,
    options: &SaveOptions,
    path: &Path,
) -> anyhow::Result<SavedFiles> {
    if let Err(what) = cfg.validate() {
        bail!("{what}");
    }
    let model = denoiser_graph(cfg, weights, kind, batch).with_context(|| kind.component().to_owned())?;
    save(&model, path, options)
}

fn save(model: &Model, path: &Path, options: &SaveOptions) -> anyhow::Result<SavedFiles> {
    let saved = model.save(path, options)?;
    tracing::info!(path = %saved.model.display(), bytes = saved.bytes, nodes = model.graph.nodes.len(), "graph written");
    Ok(saved)
}

/// The denoiser's weights in a file or folder, in any layout and file format that `import` reads.
///
/// # Errors
/// A file that cannot be read; a tensor that is missing, left over or misshapen.
pub fn open_dit(path: &Path, cfg: &DitConfig) -> anyhow::Result<Arc<dyn WeightSource>> {
    if !path.exists() {
        bail!("{}: no such file or folder", path.display());
    }
    let checkpoint = if path.is_dir() { Checkpoint::open_dir(path) } else { Checkpoint::open(path) }?;
    Ok(Arc::new(CheckpointWeights::locate(
        checkpoint,
        Component::Dit,
        count_denoiser(cfg, 2, 0, 2).params(),
    )?))
}

/// Runs a graph on the embedded backend with seeded inputs and writes both to `<path>.vectors.safetensors` (`in.*`,
/// `out.*`). `tokens` is the number of tokens per latent frame, 1 where that means nothing.
///
/// # Errors
/// A graph that the embedded backend does not run; a file that cannot be written.
pub fn write_vectors(path: &Path, tokens: usize) -> anyhow::Result<PathBuf> {
    use safetensors::tensor::{Dtype, TensorView};
    let engine = by_name("rten")?.prepare(path, &PrepareOptions::default())?;
    let size = |dim: &Dim| match dim {
        Dim::Fixed(size) => *size,
        Dim::Symbol(name) if name == "frames" => 3,
        Dim::Symbol(name) if name == "tokens" => 3 * tokens,
        Dim::Symbol(name) if name == "context_tokens" => 2 * tokens,
        Dim::Symbol(name) if name == "batch" => 1,
        _ => 2,
    };
    let mut noise = Noise::new(0, 0);
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for port in engine.inputs() {
        let shape: Vec<usize> = port.shape.iter().map(size).collect();
        let count = shape.iter().product();
        let tensor = match (port.dtype, port.name.as_str()) {
            (DataType::F32, "keep") => Tensor::f32(&shape, vec![1.0; count]),
            (DataType::F32, "mask_bias") => Tensor::f32(&shape, vec![0.0; count]),
            (DataType::F32, _) => Tensor::f32(&shape, (0..count).map(|_| noise.sample()).collect()),
            // Rows of timesteps or tokens: 0 and 1 are always there; batch entries: only 0.
            (_, "row_batch") => Tensor::i64(&shape, vec![0; count]),
            _ => Tensor::i64(&shape, (0..count as i64).map(|i| i % 2).collect()),
        };
        tensors.push((port.name.clone(), tensor));
    }
    let given: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let results = engine.session()?.run(&given)?;
    let named = |prefix: &'static str| move |(name, t): (String, Tensor)| (format!("{prefix}.{name}"), t);
    let all: Vec<(String, Tensor)> =
        tensors.into_iter().map(named("in")).chain(results.into_iter().map(named("out"))).collect();
    let bytes: Vec<(Dtype, Vec<u8>)> = all
        .iter()
        .map(|(name, tensor)| match &tensor.data {
            Elements::F32(v) => Ok((Dtype::F32, v.iter().flat_map(|v| v.to_le_bytes()).collect())),
            Elements::I64(v) => Ok((Dtype::I64, v.iter().flat_map(|v| v.to_le_bytes()).collect())),
            _ => bail!("{name}: neither floats nor 64-bit integers"),
        })
        .collect::<anyhow::Result<_>>()?;
    let views = all
        .iter()
        .zip(&bytes)
        .map(|((name, tensor), (dtype, data))| {
            Ok((name.as_str(), TensorView::new(*dtype, tensor.shape.clone(), data)?))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut file = path.as_os_str().to_owned();
    file.push(".vectors.safetensors");
    let file = PathBuf::from(file);
    mindseye_base::file::replace(&file, &safetensors::serialize(views, None)?)
        .with_context(|| file.display().to_string())?;
    Ok(file)
}

fn denoiser_kinds(cached: bool) -> &'static [DenoiserKind] {
    if cached {
        &[DenoiserKind::Joint, DenoiserKind::Prefill, DenoiserKind::Cached]
    } else {
        &[DenoiserKind::Joint]
    }
}

/// Runs `export`.
///
/// # Errors
/// What is missing or does not fit, naming file and tensor.
pub fn run(args: ExportArgs) -> anyhow::Result<()> {
    let options = SaveOptions {
        external: if args.external { ExternalData::Always } else { ExternalData::Auto },
        ..SaveOptions::default()
    };
    if args.source.join(MANIFEST).is_file() {
        return export_bundle(&args, &options);
    }
    let Some(model) = &args.model else {
        bail!(
            "{}: no {MANIFEST} there; for a checkpoint say which model it is with --model",
            args.source.display()
        );
    };
    let text = std::fs::read_to_string(model).with_context(|| model.display().to_string())?;
    let table: toml::Table = toml::from_str(&text).with_context(|| model.display().to_string())?;
    let dit = table.get("dit").cloned().with_context(|| format!("{}: no [dit] table", model.display()))?;
    let cfg: DitConfig = dit.try_into().with_context(|| format!("{}: [dit]", model.display()))?;
    if let Err(what) = cfg.validate() {
        bail!("{}: {what}", model.display());
    }
    let weights = open_dit(&args.source, &cfg)?;
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    for kind in denoiser_kinds(args.cached) {
        let path = args.out.join(format!("{}.onnx", kind.component()));
        let saved = export_dit(&cfg, weights.clone(), *kind, Dim::Fixed(1), &options, &path)?;
        println!("{} {} bytes", saved.model.display(), saved.bytes);
        if args.vectors {
            println!("{}", write_vectors(&path, cfg.tokens_per_frame())?.display());
        }
    }
    Ok(())
}

/// Weights of a component that is stored as such; `None` where there is no such component or it is a graph already.
fn weights_of(bundle: &Bundle, name: &str) -> anyhow::Result<Option<Arc<dyn WeightSource>>> {
    let Some(component) = bundle.manifest().component.get(name) else {
        return Ok(None);
    };
    if component.format != ComponentFormat::Safetensors {
        return Ok(None);
    }
    let checkpoint = Checkpoint::open(&bundle.directory().join(&component.files[0].name))?;
    Ok(Some(Arc::new(CheckpointWeights::plain(checkpoint))))
}

const WAYS: [Way; 2] = [Way::Encode, Way::Decode];

fn export_bundle(args: &ExportArgs, options: &SaveOptions) -> anyhow::Result<()> {
    let bundle = Bundle::load(&args.source)?;
    // Graphs are written in f32, whatever the weights are stored in; `engine build` lowers them.
    let mut manifest = bundle.manifest().clone();
    manifest.precision = "f32".into();
    let manifest = &manifest;
    let mut writer = BundleWriter::create(&args.out, manifest.clone())?;
    let mut graph = |name: &str, model: Model| -> anyhow::Result<()> {
        let file = format!("{name}.onnx");
        let saved = save(&model, &writer.path(&file), options)?;
        println!("{file} {} bytes", saved.bytes);
        writer.add(name, ComponentFormat::Onnx, &[&file])?;
        Ok(())
    };
    let mut done = 0;
    if let Some(weights) = weights_of(&bundle, "denoiser")? {
        for kind in denoiser_kinds(args.cached) {
            let model = denoiser_graph(&manifest.dit, weights.clone(), *kind, Dim::Fixed(1))?;
            graph(kind.component(), model)?;
        }
        done += 1;
    }
    if let Some(weights) = weights_of(&bundle, "text_encoder")? {
        let Some(cfg) = &manifest.networks.umt5 else {
            bail!("{}: a text encoder without networks.umt5", args.source.display());
        };
        graph("text_encoder", text_encoder_graph(cfg, manifest.dit.text_len, weights)?)?;
        done += 1;
    }
    if let Some(weights) = weights_of(&bundle, "vae")? {
        let latent = [manifest.latent.height, manifest.latent.width];
        if let Some(cfg) = &manifest.networks.vae {
            for (chunk, way) in [Chunk::First, Chunk::Next].into_iter().flat_map(|c| WAYS.map(|w| (c, w))) {
                graph(&step_component(way, chunk), vae_graph(cfg, latent, way, chunk, weights.clone())?)?;
            }
        } else if let Some(cfg) = &manifest.networks.codec {
            for way in WAYS {
                graph(way.component(), codec_graph(cfg, way, weights.clone())?)?;
            }
        } else {
            bail!("{}: a VAE without networks.vae or networks.codec", args.source.display());
        }
        done += 1;
    }
    if done == 0 {
        bail!("{}: no component holds weights; nothing to export", args.source.display());
    }
    // What is no network is taken over as it is.
    for (name, component) in &manifest.component {
        if component.format == ComponentFormat::Safetensors {
            continue;
        }
        let names: Vec<&str> = component.files.iter().map(|f| f.name.as_str()).collect();
        for file in &names {
            let from = bundle.directory().join(file);
            std::fs::copy(&from, writer.path(file)).with_context(|| from.display().to_string())?;
        }
        writer.add(name, component.format, &names)?;
    }
    let written = writer.finish()?;
    if args.vectors {
        for (name, component) in &written.manifest().component {
            if component.format == ComponentFormat::Onnx {
                let file = write_vectors(&written.path(name)?, written.manifest().dit.tokens_per_frame())?;
                println!("{}", file.display());
            }
        }
    }
    println!("{} {}", written.directory().display(), written.hash());
    Ok(())
}
