//! The model bundle: the only thing that passes from training to the robot.
//!
//! A directory with `bundle.toml` and one file per component. [`Bundle::load`] refuses what does not match its hash,
//! its shape or its type, naming the field, the value wanted and the value got. [`BundleWriter`] builds a bundle
//! beside its place and renames it, so that a bundle is there whole or not at all.
//!
//! Components: `text_encoder`, `tokenizer`, `vae_encoder` and `vae_decoder` (for a codec without state), or
//! `vae_encoder_first`/`_next` and `vae_decoder_first`/`_second`/`_next` (streaming, caches are inputs and outputs),
//! `denoiser`, and with the one-way mask `denoiser_prefill` and `denoiser_cached`. Before export, weights of encoder
//! and decoder are one component `vae`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component as PathPart, Path, PathBuf};

use mindseye_base::file;
use serde::{Deserialize, Serialize};

use crate::backend::{Engine, Port, describe};
use crate::model::dit::{DitConfig, Prediction};
use crate::onnx::{DataType, Dim, Model};
use crate::sampler::{Grid, Solver};

/// Free-form values of the manifest.
pub use toml::Table;

/// Version of the layout of `bundle.toml`.
pub const FORMAT: u32 = 1;
/// Name of the manifest.
pub const MANIFEST: &str = "bundle.toml";
/// Names that a component may have.
pub const COMPONENTS: &[&str] = &[
    "text_encoder",
    "tokenizer",
    "vae",
    "vae_encoder",
    "vae_encoder_first",
    "vae_encoder_next",
    "vae_decoder",
    "vae_decoder_first",
    "vae_decoder_second",
    "vae_decoder_next",
    "denoiser",
    "denoiser_prefill",
    "denoiser_cached",
    "lifter",
];
/// Longest manifest that is read.
const MAX_MANIFEST: u64 = 4 << 20;

/// Why a bundle is refused or cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The manifest is not the TOML that is expected.
    #[error("{}: {what}", path.display())]
    Manifest {
        /// Which file.
        path: PathBuf,
        /// What is wrong, with the line.
        what: String,
    },
    /// A field has another value than it must have.
    #[error("bundle: {field}: wanted {wanted}, got {got}")]
    Field {
        /// Which field, as in the manifest.
        field: String,
        /// What it must be.
        wanted: String,
        /// What it is.
        got: String,
    },
    /// A component that is asked for is not there.
    #[error("bundle {name:?} has no component {component:?}; it has {}", has.join(", "))]
    Missing {
        /// Name of the bundle.
        name: String,
        /// What is asked for.
        component: String,
        /// What there is.
        has: Vec<String>,
    },
    /// A component's graph cannot be read.
    #[error("component {component:?}: {source}")]
    Onnx {
        /// Which component.
        component: String,
        /// What is wrong with it.
        source: crate::onnx::OnnxError,
    },
}

fn field(field: impl Into<String>, wanted: impl ToString, got: impl ToString) -> BundleError {
    BundleError::Field { field: field.into(), wanted: wanted.to_string(), got: got.to_string() }
}

/// `bundle.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the model.
    pub name: String,
    /// Element type of weights and arithmetic: `f32`, `f16`, `bf16`, `int8`, …
    pub precision: String,
    /// What it was built for: `cpu`, `sm_87`, …
    pub target: String,
    /// SPDX expression.
    pub license: String,
    /// The images.
    pub image: ImageSpec,
    /// The latents.
    pub latent: LatentSpec,
    /// Temporal positions.
    pub rope: RopeSpec,
    /// How much it was trained for, and how much is let through.
    pub limits: Limits,
    /// How to sample when the caller does not say.
    pub sampler: SamplerSpec,
    /// Where it comes from.
    pub provenance: Provenance,
    /// The denoiser's sizes.
    pub dit: DitConfig,
    /// The other networks' configurations, as their own code reads them.
    #[serde(default)]
    pub networks: toml::Table,
    /// Calibration of the lifting stage: values by name.
    #[serde(default)]
    pub lift: BTreeMap<String, f64>,
    /// What was measured before it was shipped: free-form.
    #[serde(default)]
    pub evaluation: toml::Table,
    /// The files.
    #[serde(default)]
    pub component: BTreeMap<String, Component>,
}

/// The images that the model sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Every how many camera frames one is kept.
    pub frame_stride: usize,
    /// Camera frames per second that the stride was chosen for.
    pub frames_per_second: f64,
}

/// The latents that the denoiser sees: `(z - mean) / std` of what the encoder gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSpec {
    /// Channels.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Kept frames per latent.
    pub frames: usize,
    /// Per channel.
    pub mean: Vec<f32>,
    /// Per channel.
    pub std: Vec<f32>,
}

/// Temporal positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeSpec {
    /// Targets start this far after the last context latent.
    pub gap: f64,
}

/// Numbers of latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Context latents in training.
    pub context_trained: usize,
    /// Context latents allowed at most.
    pub context_allowed: usize,
    /// Target latents in training.
    pub target_trained: usize,
    /// Target latents allowed at most.
    pub target_allowed: usize,
}

/// Defaults of the sampler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerSpec {
    /// Noise levels.
    pub grid: Grid,
    /// Update rule.
    pub solver: Solver,
    /// Shift of the noise levels.
    pub shift: f64,
    /// Steps.
    pub steps: usize,
    /// Weight of the joint guidance; 1 is none.
    pub guidance: f64,
    /// What the network predicts; the same as the denoiser's own field.
    pub prediction: Prediction,
}

/// Where a bundle comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// `trained`, or the checkpoint that was imported.
    pub source: String,
    /// The training configuration, whole.
    #[serde(default)]
    pub training: toml::Table,
    /// Seeds of the data.
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// Revision of the code.
    #[serde(default)]
    pub revision: String,
}

/// How a component is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComponentFormat {
    /// An ONNX graph, perhaps with weights beside it.
    Onnx,
    /// Weights only.
    Safetensors,
    /// A built TensorRT engine.
    Tensorrt,
    /// A SentencePiece model.
    Sentencepiece,
    /// Something that its reader knows.
    Other,
}

/// One component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Component {
    /// What the main file is.
    pub format: ComponentFormat,
    /// The main file first.
    pub files: Vec<FileSpec>,
    /// Inputs of a graph.
    #[serde(default)]
    pub inputs: Vec<PortSpec>,
    /// Outputs of a graph.
    #[serde(default)]
    pub outputs: Vec<PortSpec>,
}

/// A file of a component.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Name in the bundle's directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its hash, 64 hexadecimal digits.
    pub sha256: String,
}

/// A size in the manifest: a number or a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SizeSpec {
    /// Always the same.
    Fixed(usize),
    /// Differs between calls.
    Named(String),
}

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// Name.
    pub name: String,
    /// Element type: `f32`, `i64`, …
    pub dtype: String,
    /// Shape, slowest axis first.
    pub shape: Vec<SizeSpec>,
}

impl PortSpec {
    fn from_port(port: &Port) -> Self {
        let size = |d: &Dim| match d {
            Dim::Fixed(size) => SizeSpec::Fixed(*size),
            Dim::Symbol(name) => SizeSpec::Named(name.clone()),
            Dim::Unknown => SizeSpec::Named("?".into()),
        };
        Self {
            name: port.name.clone(),
            dtype: port.dtype.name().into(),
            shape: port.shape.iter().map(size).collect(),
        }
    }

    /// As a backend describes it.
    ///
    /// # Errors
    /// [`BundleError::Field`] for an element type that is not known.
    pub fn to_port(&self) -> Result<Port, BundleError> {
        let dtype = DataType::from_name(&self.dtype).ok_or_else(|| {
            field(format!("{:?}.dtype", self.name), "an element type such as f32", &self.dtype)
        })?;
        let shape = self
            .shape
            .iter()
            .map(|s| match s {
                SizeSpec::Fixed(size) => Dim::Fixed(*size),
                SizeSpec::Named(name) if name == "?" => Dim::Unknown,
                SizeSpec::Named(name) => Dim::Symbol(name.clone()),
            })
            .collect();
        Ok(Port { name: self.name.clone(), dtype, shape })
    }
}

impl Manifest {
    /// Checks every field that can be checked without the files.
    ///
    /// # Errors
    /// [`BundleError::Field`] for the first that does not fit.
    pub fn validate(&self) -> Result<(), BundleError> {
        if self.format != FORMAT {
            return Err(field("format", FORMAT, self.format));
        }
        for (name, value) in [("name", &self.name), ("precision", &self.precision), ("target", &self.target)]
        {
            if value.is_empty() {
                return Err(field(name, "a word", "nothing"));
            }
        }
        self.dit.validate().map_err(|e| field(e.field, e.wanted, e.got))?;
        let same = [
            ("latent.channels", self.dit.out_channels, self.latent.channels),
            ("latent.height", self.dit.latent_height, self.latent.height),
            ("latent.width", self.dit.latent_width, self.latent.width),
            ("latent.mean (length)", self.latent.channels, self.latent.mean.len()),
            ("latent.std (length)", self.latent.channels, self.latent.std.len()),
        ];
        for (name, wanted, got) in same {
            if wanted != got {
                return Err(field(name, wanted, got));
            }
        }
        for (name, size) in [
            ("image.width", self.image.width),
            ("image.height", self.image.height),
            ("image.frame_stride", self.image.frame_stride),
            ("latent.frames", self.latent.frames),
            ("limits.context_allowed", self.limits.context_allowed),
            ("limits.target_allowed", self.limits.target_allowed),
            ("sampler.steps", self.sampler.steps),
        ] {
            if !(1..=1 << 16).contains(&size) {
                return Err(field(name, "1 to 65536", size));
            }
        }
        for (name, pixels, latents) in [
            ("image.width", self.image.width, self.latent.width),
            ("image.height", self.image.height, self.latent.height),
        ] {
            if pixels % latents != 0 {
                return Err(field(name, format!("a multiple of {latents} latent pixels"), pixels));
            }
        }
        if let Some(bad) = self.latent.std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(field("latent.std", "positive numbers", bad));
        }
        if let Some(bad) = self.latent.mean.iter().find(|m| !m.is_finite()) {
            return Err(field("latent.mean", "finite numbers", bad));
        }
        let positive = [
            ("image.frames_per_second", self.image.frames_per_second),
            ("sampler.shift", self.sampler.shift),
            ("sampler.guidance", self.sampler.guidance),
        ];
        for (name, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(field(name, "a positive number", value));
            }
        }
        if !(self.rope.gap.is_finite() && self.rope.gap >= 0.0) {
            return Err(field("rope.gap", "a number from 0 on", self.rope.gap));
        }
        if self.sampler.prediction != self.dit.prediction {
            let name = |p: Prediction| match p {
                Prediction::Velocity => "velocity",
                Prediction::X0 => "x0",
            };
            return Err(field(
                "sampler.prediction",
                name(self.dit.prediction),
                name(self.sampler.prediction),
            ));
        }
        if let Some((name, value)) = self.lift.iter().find(|(_, v)| !v.is_finite()) {
            return Err(field(format!("lift.{name}"), "a finite number", value));
        }
        for (name, component) in &self.component {
            component.validate(name)?;
        }
        Ok(())
    }
}

impl Component {
    fn validate(&self, name: &str) -> Result<(), BundleError> {
        if !COMPONENTS.contains(&name) {
            return Err(field("component", format!("one of {}", COMPONENTS.join(", ")), name));
        }
        let at = |part: &str| format!("component.{name}.{part}");
        if self.files.is_empty() {
            return Err(field(at("files"), "at least one file", 0));
        }
        for file in &self.files {
            if !is_plain_name(&file.name) {
                return Err(field(at("files.name"), "a plain file name", &file.name));
            }
            if file.sha256.len() != 64 || !file.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(field(at("files.sha256"), "64 hexadecimal digits", &file.sha256));
            }
        }
        for (side, ports) in [("inputs", &self.inputs), ("outputs", &self.outputs)] {
            for (i, port) in ports.iter().enumerate() {
                port.to_port()?;
                if ports[..i].iter().any(|p| p.name == port.name) {
                    return Err(field(at(side), "names that differ", &port.name));
                }
            }
        }
        Ok(())
    }

    /// Compares the manifest's inputs and outputs with those that a graph or an engine really has.
    ///
    /// # Errors
    /// [`BundleError::Field`] naming the input or output.
    pub fn check_ports(&self, name: &str, inputs: &[Port], outputs: &[Port]) -> Result<(), BundleError> {
        for (side, stated, real) in [("inputs", &self.inputs, inputs), ("outputs", &self.outputs, outputs)] {
            for spec in stated {
                let port = spec.to_port()?;
                let at = format!("component.{name}.{side}.{}", port.name);
                match real.iter().find(|p| p.name == port.name) {
                    None => return Err(field(at, describe(&port), "nothing of this name")),
                    Some(found) if found.dtype != port.dtype || found.shape != port.shape => {
                        return Err(field(at, describe(&port), describe(found)));
                    }
                    Some(_) => {}
                }
            }
            if let Some(extra) = real.iter().find(|p| !stated.iter().any(|s| s.name == p.name)) {
                return Err(field(
                    format!("component.{name}.{side}.{}", extra.name),
                    "nothing of this name",
                    describe(extra),
                ));
            }
        }
        Ok(())
    }
}

fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    name != MANIFEST && matches!((parts.next(), parts.next()), (Some(PathPart::Normal(p)), None) if p == name)
}

/// A bundle on disk, checked.
#[derive(Clone, Debug)]
pub struct Bundle {
    directory: PathBuf,
    manifest: Manifest,
    hash: String,
}

impl Bundle {
    /// Reads and checks a bundle: manifest, sizes and hashes of all files, and that each ONNX graph has the inputs
    /// and outputs that the manifest states.
    ///
    /// # Errors
    /// [`BundleError`] naming the file or field, the value wanted and the value got.
    pub fn load(directory: impl AsRef<Path>) -> Result<Self, BundleError> {
        let bundle = Self::load_manifest(directory)?;
        for (name, component) in &bundle.manifest.component {
            for file in &component.files {
                let got = sha256_of_file(&bundle.directory.join(&file.name))?;
                if !got.eq_ignore_ascii_case(&file.sha256) {
                    return Err(field(format!("component.{name}.{}.sha256", file.name), &file.sha256, got));
                }
            }
            if component.format == ComponentFormat::Onnx {
                let (inputs, outputs) = onnx_ports(name, &bundle.directory.join(&component.files[0].name))?;
                component.check_ports(name, &inputs, &outputs)?;
            }
        }
        Ok(bundle)
    }

    /// Reads and checks the manifest and the sizes of the files, without hashing them: for looking, not for running.
    ///
    /// # Errors
    /// As [`Bundle::load`].
    pub fn load_manifest(directory: impl AsRef<Path>) -> Result<Self, BundleError> {
        let directory = directory.as_ref().to_owned();
        let path = directory.join(MANIFEST);
        let io = |source| BundleError::Io { path: path.clone(), source };
        let mut bytes = Vec::new();
        File::open(&path).map_err(io)?.take(MAX_MANIFEST + 1).read_to_end(&mut bytes).map_err(io)?;
        let fail = |what: String| BundleError::Manifest { path: path.clone(), what };
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(fail(format!("longer than {MAX_MANIFEST} bytes")));
        }
        let text = std::str::from_utf8(&bytes).map_err(|e| fail(e.to_string()))?;
        let manifest: Manifest = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            fail(format!("line {line}: {}", e.message().replace('\n', ", ")))
        })?;
        manifest.validate()?;
        for (name, component) in &manifest.component {
            for file in &component.files {
                let path = directory.join(&file.name);
                let metadata =
                    fs::metadata(&path).map_err(|source| BundleError::Io { path: path.clone(), source })?;
                if metadata.len() != file.bytes {
                    let at = format!("component.{name}.{}.bytes", file.name);
                    return Err(field(at, file.bytes, metadata.len()));
                }
            }
        }
        let hash = file::sha256(&bytes);
        Ok(Self { directory, manifest, hash })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// SHA-256 of the manifest; since that holds the hashes of all files, of the whole bundle.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Whether there is a component of this name.
    pub fn has(&self, component: &str) -> bool {
        self.manifest.component.contains_key(component)
    }

    /// Path of a component's main file.
    ///
    /// # Errors
    /// [`BundleError::Missing`] listing what there is.
    pub fn path(&self, component: &str) -> Result<PathBuf, BundleError> {
        Ok(self.directory.join(&self.component(component)?.files[0].name))
    }

    /// A component of the manifest.
    ///
    /// # Errors
    /// [`BundleError::Missing`] listing what there is.
    pub fn component(&self, component: &str) -> Result<&Component, BundleError> {
        self.manifest.component.get(component).ok_or_else(|| BundleError::Missing {
            name: self.manifest.name.clone(),
            component: component.to_owned(),
            has: self.manifest.component.keys().cloned().collect(),
        })
    }

    /// Refuses an engine whose inputs and outputs are not those of the manifest.
    ///
    /// # Errors
    /// [`BundleError::Field`] naming the input or output, [`BundleError::Missing`] for an unknown component.
    pub fn check_engine(&self, component: &str, engine: &dyn Engine) -> Result<(), BundleError> {
        self.component(component)?.check_ports(component, engine.inputs(), engine.outputs())
    }
}

/// Builds a bundle beside its place and moves it there when it is whole.
#[derive(Debug)]
pub struct BundleWriter {
    target: PathBuf,
    temporary: PathBuf,
    manifest: Manifest,
    finished: bool,
}

impl BundleWriter {
    /// Starts a bundle that will be at `target`. The manifest's components are ignored; [`BundleWriter::add`] fills
    /// them.
    ///
    /// # Errors
    /// [`BundleError::Field`] where the manifest does not hold together; [`BundleError::Io`].
    pub fn create(target: impl AsRef<Path>, mut manifest: Manifest) -> Result<Self, BundleError> {
        manifest.component.clear();
        manifest.validate()?;
        let target = target.as_ref().to_owned();
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = target.with_file_name(name);
        let io = |source| BundleError::Io { path: temporary.clone(), source };
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(io)?;
        }
        fs::create_dir_all(&temporary).map_err(io)?;
        Ok(Self { target, temporary, manifest, finished: false })
    }

    /// Where to write the file called `name` before it is added.
    pub fn path(&self, name: &str) -> PathBuf {
        self.temporary.join(name)
    }

    /// Adds a component whose files were written to [`BundleWriter::path`], the main one first. An ONNX graph's
    /// inputs and outputs are read from it; weights beside it (`<file>.data`) are found.
    ///
    /// # Errors
    /// [`BundleError::Field`] for a name that is not allowed, [`BundleError::Onnx`] for a graph that cannot be read,
    /// [`BundleError::Io`] for a file that is not there.
    pub fn add(&mut self, name: &str, format: ComponentFormat, files: &[&str]) -> Result<(), BundleError> {
        let mut component = Component { format, files: Vec::new(), inputs: Vec::new(), outputs: Vec::new() };
        let mut names: Vec<String> = files.iter().map(|&f| f.to_owned()).collect();
        if format == ComponentFormat::Onnx
            && let [only] = files
        {
            let beside = format!("{only}.data");
            if self.path(&beside).is_file() {
                names.push(beside);
            }
        }
        for file in names {
            let path = self.path(&file);
            let metadata =
                fs::metadata(&path).map_err(|source| BundleError::Io { path: path.clone(), source })?;
            let sha256 = sha256_of_file(&path)?;
            component.files.push(FileSpec { name: file, bytes: metadata.len(), sha256 });
        }
        if format == ComponentFormat::Onnx
            && let Some(main) = component.files.first()
        {
            let (inputs, outputs) = onnx_ports(name, &self.path(&main.name))?;
            component.inputs = inputs.iter().map(PortSpec::from_port).collect();
            component.outputs = outputs.iter().map(PortSpec::from_port).collect();
        }
        component.validate(name)?;
        self.manifest.component.insert(name.to_owned(), component);
        Ok(())
    }

    /// States a component's inputs and outputs where they cannot be read from its file.
    ///
    /// # Errors
    /// [`BundleError::Missing`] for a component that was not added.
    pub fn set_ports(&mut self, name: &str, inputs: &[Port], outputs: &[Port]) -> Result<(), BundleError> {
        let Some(component) = self.manifest.component.get_mut(name) else {
            return Err(BundleError::Missing {
                name: self.manifest.name.clone(),
                component: name.to_owned(),
                has: self.manifest.component.keys().cloned().collect(),
            });
        };
        component.inputs = inputs.iter().map(PortSpec::from_port).collect();
        component.outputs = outputs.iter().map(PortSpec::from_port).collect();
        Ok(())
    }

    /// Writes the manifest and moves the bundle to its place; an older one there is replaced.
    ///
    /// # Errors
    /// [`BundleError::Manifest`] where the manifest cannot be written as TOML, [`BundleError::Io`].
    pub fn finish(mut self) -> Result<Bundle, BundleError> {
        self.manifest.validate()?;
        let path = self.temporary.join(MANIFEST);
        let text = toml::to_string_pretty(&self.manifest)
            .map_err(|e| BundleError::Manifest { path: path.clone(), what: e.to_string() })?;
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| BundleError::Io { path, source }
        };
        let mut file = File::create(&path).map_err(io(&path))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io(&path))?;
        drop(file);
        if self.target.exists() {
            if !self.target.join(MANIFEST).is_file() {
                let got = format!("{} without a {MANIFEST}", self.target.display());
                return Err(field("target", "a new directory or an older bundle", got));
            }
            let mut name = self.temporary.file_name().unwrap_or_default().to_owned();
            name.push(".old");
            let old = self.temporary.with_file_name(name);
            fs::rename(&self.target, &old).map_err(io(&self.target))?;
            if let Err(source) = fs::rename(&self.temporary, &self.target) {
                let _ = fs::rename(&old, &self.target);
                return Err(BundleError::Io { path: self.target.clone(), source });
            }
            fs::remove_dir_all(&old).map_err(io(&old))?;
        } else {
            fs::rename(&self.temporary, &self.target).map_err(io(&self.target))?;
        }
        self.finished = true;
        Bundle::load_manifest(&self.target)
    }
}

impl Drop for BundleWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

fn onnx_ports(component: &str, path: &Path) -> Result<(Vec<Port>, Vec<Port>), BundleError> {
    let model =
        Model::load(path).map_err(|source| BundleError::Onnx { component: component.to_owned(), source })?;
    let port = |info: &crate::onnx::ValueInfo| -> Result<Port, BundleError> {
        let at = || format!("component.{component}.{}", info.name);
        Ok(Port {
            name: info.name.clone(),
            dtype: info.dtype.ok_or_else(|| field(at(), "an element type", "none"))?,
            shape: info.shape.clone().ok_or_else(|| field(at(), "a shape", "none"))?,
        })
    };
    let given = model.graph.inputs.iter().filter(|i| model.graph.initializer(&i.name).is_none());
    let inputs = given.map(port).collect::<Result<_, _>>()?;
    let outputs = model.graph.outputs.iter().map(port).collect::<Result<_, _>>()?;
    Ok((inputs, outputs))
}

fn sha256_of_file(path: &Path) -> Result<String, BundleError> {
    file::sha256_of_file(path).map_err(|source| BundleError::Io { path: path.to_owned(), source })
}
