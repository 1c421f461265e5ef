//! The model bundle: the only thing that passes from training to the robot.
//!
//! A directory with `bundle.toml` and one file per component. [`Bundle::load`] refuses what does not match its hash,
//! its shape or its type, naming the field, the value wanted and the value got. [`BundleWriter`] builds a bundle
//! beside its place and renames it, so that a bundle is there whole or not at all.
//!
//! Components: `text_encoder`, `tokenizer`, `vae_encoder` and `vae_decoder` (for a codec without state), or
//! `vae_encoder_first`/`_next` and `vae_decoder_first`/`_second`/`_next` (streaming, caches are inputs and outputs),
//! `denoiser`, and with the one-way mask `denoiser_prefill` and `denoiser_cached`; some have `depth`, which reads how far
//! away things are. Before export, weights of encoder and decoder are one component `vae`.

mod manifest;
mod reader;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use mindseye_base::file;

use crate::backend::{Engine, Port};
use crate::onnx::Model;

pub use manifest::{
    BoundingBoxSpec, CameraSpec, Component, ComponentFormat, DriveRule, Evaluation, FileSpec, Guide,
    ImageSpec, LatentSpec, LayoutSpec, LiftParams, Limits, Manifest, Measured, Networks, PortSpec,
    Provenance, RegistrationParams, RopeSpec, SamplerSpec, SizeSpec, Spreads, TextSpec,
};

/// Version of the layout of `bundle.toml`.
pub const FORMAT: u32 = 2;
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
    "depth",
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
    /// The manifest is not TOML.
    #[error("{}: line {line}: {}", file.display(), source.message().replace('\n', ", "))]
    Syntax {
        /// Which file.
        file: PathBuf,
        /// Line of the mistake, from 1.
        line: usize,
        /// What is wrong there.
        source: toml::de::Error,
    },
    /// The manifest is longer than any that is written.
    #[error("{}: longer than {MAX_MANIFEST} bytes", file.display())]
    Long {
        /// Which file.
        file: PathBuf,
    },
    /// The manifest is not text.
    #[error("{}: {source}", file.display())]
    Text {
        /// Which file.
        file: PathBuf,
        /// Where it stops being text.
        source: std::string::FromUtf8Error,
    },
    /// A key of the manifest is unknown, missing or of another type.
    #[error("{}: {}{key}: wanted {wanted}, got {got}", file.display(), bracketed(table))]
    Key {
        /// Which file.
        file: PathBuf,
        /// Which table, empty at the top.
        table: String,
        /// Which key.
        key: String,
        /// What it must be; for a key that does not exist, those that do.
        wanted: String,
        /// What it is.
        got: String,
    },
    /// The manifest cannot be written as TOML.
    #[error("bundle: {0}")]
    Write(#[from] toml::ser::Error),
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

fn bracketed(table: &str) -> String {
    if table.is_empty() { String::new() } else { format!("[{table}] ") }
}

fn field(field: impl Into<String>, wanted: impl ToString, got: impl ToString) -> BundleError {
    BundleError::Field { field: field.into(), wanted: wanted.to_string(), got: got.to_string() }
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
        Self::load_parts(directory, &|_| true)
    }

    /// As [`Bundle::load`], but only what `wanted` says of a component's name is looked at, and need be there. The hash is
    /// that of the whole.
    ///
    /// # Errors
    /// As [`Bundle::load`].
    pub fn load_parts(
        directory: impl AsRef<Path>,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Self, BundleError> {
        let bundle = Self::read(directory, wanted)?;
        for (name, component) in bundle.manifest.component.iter().filter(|(name, _)| wanted(name)) {
            for file in &component.files {
                let got = sha256_of_file(&bundle.directory.join(&file.name))?;
                if !got.eq_ignore_ascii_case(&file.sha256) {
                    return Err(field(format!("component.{name}.{}.sha256", file.name), &file.sha256, got));
                }
            }
            if component.format == ComponentFormat::Onnx {
                let graph = load_graph(name, &bundle.directory.join(&component.files[0].name))?;
                let (inputs, outputs) = onnx_ports(name, &graph)?;
                component.check_ports(name, &inputs, &outputs)?;
                // What is not listed is not hashed.
                let listed = |file: &String| component.files.iter().any(|f| f.name == *file);
                if let Some(file) = graph.external_files().into_iter().find(|file| !listed(file)) {
                    let at = format!("component.{name}.files");
                    return Err(field(at, format!("{file:?}, which the graph reads"), "a list without it"));
                }
            }
        }
        Ok(bundle)
    }

    /// Reads and checks the manifest and the sizes of the files, without hashing them: for looking, not for running.
    ///
    /// # Errors
    /// As [`Bundle::load`].
    pub fn load_manifest(directory: impl AsRef<Path>) -> Result<Self, BundleError> {
        Self::read(directory, &|_| true)
    }

    fn read(directory: impl AsRef<Path>, wanted: &dyn Fn(&str) -> bool) -> Result<Self, BundleError> {
        let directory = directory.as_ref().to_owned();
        let path = directory.join(MANIFEST);
        let io = |source| BundleError::Io { path: path.clone(), source };
        let mut bytes = Vec::new();
        File::open(&path).map_err(io)?.take(MAX_MANIFEST + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(BundleError::Long { file: path });
        }
        let hash = file::sha256(&bytes);
        let text =
            String::from_utf8(bytes).map_err(|source| BundleError::Text { file: path.clone(), source })?;
        let manifest = Manifest::from_toml(&text, &path)?;
        for (name, component) in manifest.component.iter().filter(|(name, _)| wanted(name)) {
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
            let (inputs, outputs) = onnx_ports(name, &load_graph(name, &self.path(&main.name))?)?;
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
    /// [`BundleError::Write`] where the manifest cannot be written as TOML, [`BundleError::Io`].
    pub fn finish(mut self) -> Result<Bundle, BundleError> {
        self.manifest.validate()?;
        let path = self.temporary.join(MANIFEST);
        let text = self.manifest.to_toml()?;
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

fn load_graph(component: &str, path: &Path) -> Result<Model, BundleError> {
    Model::load(path).map_err(|source| BundleError::Onnx { component: component.to_owned(), source })
}

fn onnx_ports(component: &str, model: &Model) -> Result<(Vec<Port>, Vec<Port>), BundleError> {
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
