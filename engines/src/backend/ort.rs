//! onnxruntime on the CPU, opened at run time: nothing of it is needed to build.
//!
//! The library is looked for in `ORT_DYLIB_PATH`, then by name through the loader, then in the usual folders, then
//! in an installed Python wheel (`pip install onnxruntime` puts it into `onnxruntime/capi`).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ort::environment::Environment;
use ort::session::{Session as OrtSession, SessionInputValue};
use ort::value::{Tensor as OrtTensor, TensorRef};

use super::{
    Backend, BackendError, Elements, Engine, Port, PrepareOptions, Session, Tensor, check_inputs,
    check_output, wanted_outputs,
};
use crate::onnx::{DataType, Model, ValueInfo};
use crate::python::{children, python_packages};

const NAME: &str = "onnxruntime";

/// The environment variable that names the library.
pub const PATH_VARIABLE: &str = "ORT_DYLIB_PATH";

/// See the module.
#[derive(Clone)]
pub struct OrtBackend {
    environment: Environment,
    library: PathBuf,
}

impl std::fmt::Debug for OrtBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "onnxruntime at {}", self.library.display())
    }
}

fn unavailable(what: impl ToString) -> BackendError {
    BackendError::Unavailable { backend: NAME, what: what.to_string() }
}

impl OrtBackend {
    /// Finds and opens the library; once per process, later calls give the same.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`] with the places looked in, or why the library cannot be used.
    pub fn open() -> Result<Self, BackendError> {
        static OPENED: OnceLock<Result<OrtBackend, OpenError>> = OnceLock::new();
        OPENED
            .get_or_init(|| {
                let library = find()?;
                let refused = |e: &dyn std::fmt::Display| OpenError::Refused {
                    library: library.clone(),
                    what: e.to_string(),
                };
                let builder = ort::init_from(&library).map_err(|e| refused(&e))?;
                let environment = builder.with_name("mindseye").build().map_err(|e| refused(&e))?;
                Ok(OrtBackend { environment, library })
            })
            .clone()
            .map_err(unavailable)
    }

    /// The library in use.
    #[must_use]
    pub fn library(&self) -> &Path {
        &self.library
    }
}

/// Why the library cannot be used; the same at each call.
#[derive(Clone, Debug, thiserror::Error)]
enum OpenError {
    #[error("{PATH_VARIABLE} names {}, which is not a file", .0.display())]
    NoFile(PathBuf),
    #[error(
        "libonnxruntime.so was not found; `pip install onnxruntime`, or set {PATH_VARIABLE} (looked in {})",
        .0.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NotFound(Vec<PathBuf>),
    #[error("{}: {what}", library.display())]
    Refused { library: PathBuf, what: String },
}

/// The library's file.
fn find() -> Result<PathBuf, OpenError> {
    if let Some(path) = std::env::var_os(PATH_VARIABLE).filter(|p| !p.is_empty()) {
        let path = PathBuf::from(path);
        return if path.is_file() { Ok(path) } else { Err(OpenError::NoFile(path)) };
    }
    let mut folders: Vec<PathBuf> = ["/usr/lib", "/usr/local/lib", "/usr/lib64", "/opt/onnxruntime/lib"]
        .into_iter()
        .chain(["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/opt/homebrew/lib"])
        .map(PathBuf::from)
        .collect();
    if let Some(paths) = std::env::var_os("LD_LIBRARY_PATH") {
        folders.splice(0..0, std::env::split_paths(&paths));
    }
    folders.extend(wheels());
    for folder in &folders {
        if let Some(file) = library_in(folder) {
            return Ok(file);
        }
    }
    Err(OpenError::NotFound(folders))
}

/// `libonnxruntime.so`, or the newest `libonnxruntime.so.1.x`.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = children(folder)
        .filter(|p| {
            let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            name == "libonnxruntime.so"
                || name.starts_with("libonnxruntime.so.1")
                || name == "libonnxruntime.dylib"
        })
        .collect();
    found.sort();
    found.pop()
}

/// `onnxruntime/capi` in the Python environments of this user and machine.
fn wheels() -> Vec<PathBuf> {
    let folders = python_packages().into_iter().map(|packages| packages.join("onnxruntime/capi"));
    folders.filter(|folder| folder.is_dir()).collect()
}

impl Backend for OrtBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        // "ORT Build Info: git-branch=..., ..."; the file name carries the version where the wheel is used.
        let file = self.library.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        file.split_once(".so.").map_or_else(|| ort::info().to_owned(), |(_, version)| version.to_owned())
    }

    fn prepare(&self, path: &Path, options: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError> {
        let fail = |what: String| BackendError::Prepare { backend: NAME, path: path.to_owned(), what };
        // Our own reader first: it does not trust the file.
        let model = Model::load(path).map_err(|e| fail(e.to_string()))?;
        let port = |info: &ValueInfo| match (info.dtype, info.shape.clone()) {
            (Some(dtype @ (DataType::F32 | DataType::I64 | DataType::I32)), Some(shape)) => {
                Ok(Port { name: info.name.clone(), dtype, shape })
            }
            (dtype, _) => Err(fail(format!(
                "value {:?} has no shape or elements of {}",
                info.name,
                dtype.map_or("no type", DataType::name)
            ))),
        };
        let constant = |name: &str| model.graph.initializer(name).is_some();
        let inputs = model
            .graph
            .inputs
            .iter()
            .filter(|i| !constant(&i.name))
            .map(port)
            .collect::<Result<Vec<_>, _>>()?;
        let outputs = model.graph.outputs.iter().map(port).collect::<Result<Vec<_>, _>>()?;
        drop(model);
        let mut builder = OrtSession::builder(&self.environment).map_err(|e| fail(e.to_string()))?;
        // Signed 8-bit Q/DQ stays signed. Without this, onnxruntime 1.32 on x86 rewrites it to unsigned and then
        // refuses its own graph where a bias is fused.
        builder =
            builder.with_config_entry("session.qdqisint8allowed", "1").map_err(|e| fail(e.to_string()))?;
        if options.threads > 0 {
            builder = builder.with_intra_threads(options.threads).map_err(|e| fail(e.to_string()))?;
        }
        let session = builder.commit_from_file(path).map_err(|e| fail(e.to_string()))?;
        Ok(Arc::new(OrtEngine(Arc::new(Shared { session: Mutex::new(session), inputs, outputs }))))
    }
}

struct Shared {
    /// One onnxruntime session holds the weights; runs take turns.
    session: Mutex<OrtSession>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

#[derive(Clone)]
struct OrtEngine(Arc<Shared>);

impl Engine for OrtEngine {
    fn inputs(&self) -> &[Port] {
        &self.0.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.0.outputs
    }

    fn session(&self) -> Result<Box<dyn Session>, BackendError> {
        Ok(Box::new(OrtRun { engine: self.clone() }))
    }
}

struct OrtRun {
    engine: OrtEngine,
}

fn run_error(what: impl ToString) -> BackendError {
    BackendError::Run { backend: NAME, what: what.to_string() }
}

impl Session for OrtRun {
    fn engine(&self) -> &dyn Engine {
        &self.engine
    }

    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError> {
        let shared = &*self.engine.0;
        check_inputs(&shared.inputs, inputs)?;
        let wanted = wanted_outputs(&shared.outputs, outputs)?;
        let mut values: Vec<(String, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for (name, tensor) in inputs {
            let wanted = shared.inputs.iter().find(|p| p.name == *name).map(|p| p.dtype);
            let shape = tensor.shape.clone();
            let value: SessionInputValue<'_> = match (&tensor.data, wanted) {
                (Elements::F32(v), _) => {
                    TensorRef::from_array_view((shape, v.as_slice())).map_err(run_error)?.into()
                }
                (Elements::I64(v), Some(DataType::I32)) => {
                    let narrow: Result<Vec<i32>, _> = v.iter().map(|&x| i32::try_from(x)).collect();
                    OrtTensor::from_array((shape, narrow.map_err(run_error)?)).map_err(run_error)?.into()
                }
                (Elements::I64(v), _) => {
                    TensorRef::from_array_view((shape, v.as_slice())).map_err(run_error)?.into()
                }
                (Elements::I32(v), Some(DataType::I64)) => {
                    let wide: Vec<i64> = v.iter().map(|&x| i64::from(x)).collect();
                    OrtTensor::from_array((shape, wide)).map_err(run_error)?.into()
                }
                (Elements::I32(v), _) => {
                    TensorRef::from_array_view((shape, v.as_slice())).map_err(run_error)?.into()
                }
            };
            values.push(((*name).to_owned(), value));
        }
        let mut session = shared.session.lock().unwrap_or_else(PoisonError::into_inner);
        let results = session.run(values).map_err(run_error)?;
        for ((name, out), index) in outputs.iter_mut().zip(wanted) {
            let Some(value) = results.get(*name) else {
                return Err(run_error(format!("output {name:?} did not come back")));
            };
            let port = &shared.outputs[index];
            let sizes =
                |shape: &[i64]| shape.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect::<Vec<_>>();
            **out = match port.dtype {
                DataType::I64 => {
                    let (shape, v) = value.try_extract_tensor::<i64>().map_err(run_error)?;
                    Tensor { shape: sizes(shape), data: Elements::I64(v.to_vec()) }
                }
                DataType::I32 => {
                    let (shape, v) = value.try_extract_tensor::<i32>().map_err(run_error)?;
                    Tensor { shape: sizes(shape), data: Elements::I32(v.to_vec()) }
                }
                _ => {
                    let (shape, v) = value.try_extract_tensor::<f32>().map_err(run_error)?;
                    Tensor { shape: sizes(shape), data: Elements::F32(v.to_vec()) }
                }
            };
            check_output(port, out)?;
        }
        Ok(())
    }
}
