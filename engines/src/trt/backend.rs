//! TensorRT engines behind the same traits as the CPU backends.

use std::path::Path;
use std::sync::Arc;

use super::abi::Abi;
use super::library::{Library, LoadOptions};
use super::run::{Arenas, DType, DeviceState, Io, RunError, RunOptions, TrtContext, TrtEngine};
use crate::backend::{
    Backend, BackendError, Elements, Engine, Port, PrepareOptions, RunTimes, Session, State, Tensor,
    check_inputs, is_state,
};
use crate::cuda::{CudaDevice, Device};
use crate::onnx::{DataType, Dim};
use crate::passport::{Passport, Present, jetson_release};

const NAME: &str = "tensorrt";

/// Runs engines built by `engine build`. Their passports are checked before they are loaded.
pub struct TensorRtBackend {
    library: Arc<Library>,
    device: Arc<dyn Device>,
    /// How contexts are made.
    pub options: RunOptions,
    /// Hash of the bundle in use; passports must carry it. None checks the machine only.
    pub bundle_sha256: Option<String>,
}

fn unavailable(what: impl ToString) -> BackendError {
    BackendError::Unavailable { backend: NAME, what: what.to_string() }
}

impl TensorRtBackend {
    /// Finds the library and opens a GPU.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`]: no library, no driver, no device.
    pub fn open(options: &LoadOptions, ordinal: usize) -> Result<Self, BackendError> {
        let library = Library::find(options).map_err(unavailable)?;
        let device = CudaDevice::open(ordinal).map_err(unavailable)?;
        Ok(TensorRtBackend::new(Arc::new(library), device))
    }

    /// With an opened library and device. Sessions that one thread runs share its memory.
    #[must_use]
    pub fn new(library: Arc<Library>, device: Arc<dyn Device>) -> Self {
        let options = RunOptions { arenas: Some(Arenas::new(&device)), ..RunOptions::default() };
        TensorRtBackend { library, device, options, bundle_sha256: None }
    }

    /// TensorRT's own description of an engine's layers, JSON.
    ///
    /// # Errors
    /// The engine does not load here.
    pub fn layers(&self, path: &Path) -> Result<String, BackendError> {
        let fail = |what: String| BackendError::Prepare { backend: NAME, path: path.to_owned(), what };
        let passport = Passport::read(path).map_err(|e| fail(e.to_string()))?;
        let host_code = passport.builder_flags.get("version_compatible").is_some_and(|v| v == "true");
        let engine =
            TrtEngine::load(&self.library, &self.device, path, host_code).map_err(|e| fail(e.to_string()))?;
        engine.inspect().ok_or_else(|| fail("the library describes no layers".into()))
    }

    /// The library.
    #[must_use]
    pub fn library(&self) -> &Arc<Library> {
        &self.library
    }
}

/// `tensorrt` or `tensorrt-rtx`, as passports say it.
#[must_use]
pub fn library_name(library: &Library) -> &'static str {
    if library.abi() == Abi::Rtx17 { "tensorrt-rtx" } else { "tensorrt" }
}

impl Backend for TensorRtBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        self.library.version().to_string()
    }

    fn prepare(&self, path: &Path, _options: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError> {
        let fail = |what: String| BackendError::Prepare { backend: NAME, path: path.to_owned(), what };
        let passport = Passport::read(path).map_err(|e| fail(e.to_string()))?;
        let version = self.library.version().to_string();
        let jetson = jetson_release();
        let present = Present {
            bundle_sha256: self.bundle_sha256.as_deref(),
            compute_capability: Some(self.device.info().compute_capability),
            library: Some(library_name(&self.library)),
            library_version: Some(&version),
            driver_version: self.library.driver().map(|d| d.cuda_version),
            jetson_release: jetson.as_deref(),
        };
        passport.check(path, &present).map_err(|e| fail(e.to_string()))?;
        let host_code = passport.builder_flags.get("version_compatible").is_some_and(|v| v == "true");
        let engine =
            TrtEngine::load(&self.library, &self.device, path, host_code).map_err(|e| fail(e.to_string()))?;
        let ports = |input: bool| {
            engine.io().iter().filter(|io| io.input == input).map(port).collect::<Result<Vec<_>, _>>()
        };
        let unknown = |e: UnknownElements| fail(e.to_string());
        let (inputs, outputs) = (ports(true).map_err(unknown)?, ports(false).map_err(unknown)?);
        Ok(Arc::new(LoadedEngine { engine, inputs, outputs, options: self.options.clone() }))
    }
}

/// An input or output whose elements no caller can give or take.
#[derive(Debug, thiserror::Error)]
#[error("{name:?} has elements of {dtype:?}; engines are built with f32 and integers")]
struct UnknownElements {
    name: String,
    dtype: DType,
}

fn port(io: &Io) -> Result<Port, UnknownElements> {
    let dtype = match io.dtype {
        DType::F32 => DataType::F32,
        DType::I32 => DataType::I32,
        DType::I64 => DataType::I64,
        // State stays on the device, as wide as the engine wants it.
        DType::F16 | DType::Bf16 if is_state(&io.name) => DataType::F32,
        dtype => return Err(UnknownElements { name: io.name.clone(), dtype }),
    };
    // Symbols are lost in an engine: sizes that differ between calls are unknown here.
    let dim = |&d: &i64| usize::try_from(d).map_or(Dim::Unknown, Dim::Fixed);
    Ok(Port { name: io.name.clone(), dtype, shape: io.shape.iter().map(dim).collect() })
}

#[derive(Clone)]
struct LoadedEngine {
    engine: Arc<TrtEngine>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    options: RunOptions,
}

impl Engine for LoadedEngine {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn session(&self) -> Result<Box<dyn Session>, BackendError> {
        let context = self.engine.context(&self.options).map_err(unavailable)?;
        Ok(Box::new(TrtSession { owner: self.clone(), context, bytes: Vec::new() }))
    }
}

struct TrtSession {
    owner: LoadedEngine,
    context: TrtContext,
    /// One buffer of bytes per input, reused.
    bytes: Vec<Vec<u8>>,
}

fn run_error(e: &RunError) -> BackendError {
    BackendError::Run { backend: NAME, what: e.to_string() }
}

impl Session for TrtSession {
    fn times(&self) -> Option<RunTimes> {
        self.context.times()
    }

    fn engine(&self) -> &dyn Engine {
        &self.owner
    }

    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError> {
        self.run_with_state(inputs, outputs, None, None)
    }

    fn run_with_state(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
        from: Option<&State>,
        to: Option<&mut State>,
    ) -> Result<(), BackendError> {
        let elsewhere = || BackendError::Run {
            backend: NAME,
            what: "state that a run of another backend left cannot be read here".into(),
        };
        let from = match from {
            Some(state) => Some(state.device::<DeviceState>().ok_or_else(elsewhere)?),
            None => None,
        };
        let to = match to {
            Some(state) => Some(state.device_mut::<DeviceState>().ok_or_else(elsewhere)?),
            None => None,
        };
        let mut ports = self.owner.inputs.clone();
        ports.retain(|p| from.is_none() || !is_state(&p.name));
        check_inputs(&ports, inputs)?;
        for (name, _) in outputs.iter() {
            if !self.owner.outputs.iter().any(|p| p.name == *name) {
                return Err(BackendError::Output {
                    name: (*name).to_owned(),
                    expected: "an output of the engine".into(),
                    got: "a name that the engine lacks".into(),
                });
            }
        }
        self.bytes.resize_with(inputs.len(), Vec::new);
        let mut shapes = Vec::with_capacity(inputs.len());
        for ((name, tensor), bytes) in inputs.iter().zip(&mut self.bytes) {
            let wanted =
                self.owner.engine.io().iter().find(|io| io.input && io.name == *name).map(|io| io.dtype);
            write_bytes(name, &tensor.data, wanted, bytes)?;
            shapes
                .push(tensor.shape.iter().map(|&d| i64::try_from(d).unwrap_or(i64::MAX)).collect::<Vec<_>>());
        }
        let given: Vec<(&str, &[i64], &[u8])> = inputs
            .iter()
            .zip(&shapes)
            .zip(&self.bytes)
            .map(|(((name, _), shape), bytes)| (*name, shape.as_slice(), bytes.as_slice()))
            .collect();
        let names: Vec<String> = outputs.iter().map(|(name, _)| (*name).to_owned()).collect();
        let wanted = |name: &str| names.iter().any(|n| n == name);
        self.context
            .run_with_state(&given, from, to, &wanted, &mut |io, shape, bytes| {
                let Some((_, out)) = outputs.iter_mut().find(|(name, _)| *name == io.name) else { return };
                let shape = shape.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
                **out = Tensor { shape, data: read_bytes(io.dtype, bytes) };
            })
            .map_err(|e| run_error(&e))
    }
}

/// The little-endian bytes of a tensor in the engine's element type.
fn write_bytes(
    name: &str,
    data: &Elements,
    wanted: Option<DType>,
    bytes: &mut Vec<u8>,
) -> Result<(), BackendError> {
    bytes.clear();
    match (data, wanted) {
        (Elements::F32(v), Some(DType::F16)) => {
            bytes.extend(v.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()));
        }
        (Elements::F32(v), Some(DType::Bf16)) => {
            bytes.extend(v.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()));
        }
        (Elements::F32(v), _) => bytes.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        (Elements::I64(v), Some(DType::I32)) => {
            for &x in v {
                let x = i32::try_from(x).map_err(|_| BackendError::Input {
                    name: name.to_owned(),
                    expected: "integers of 32 bits".into(),
                    got: x.to_string(),
                })?;
                bytes.extend(x.to_le_bytes());
            }
        }
        (Elements::I64(v), _) => bytes.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        (Elements::I32(v), Some(DType::I64)) => {
            bytes.extend(v.iter().flat_map(|&x| i64::from(x).to_le_bytes()));
        }
        (Elements::I32(v), _) => bytes.extend(v.iter().flat_map(|x| x.to_le_bytes())),
    }
    Ok(())
}

/// What an engine's output holds.
fn read_bytes(dtype: DType, bytes: &[u8]) -> Elements {
    fn four<T>(b: &[u8], f: fn([u8; 4]) -> T) -> Vec<T> {
        b.chunks_exact(4).map(|c| f([c[0], c[1], c[2], c[3]])).collect()
    }
    let two = |f: fn([u8; 2]) -> f32| bytes.chunks_exact(2).map(|c| f([c[0], c[1]])).collect();
    match dtype {
        DType::I32 => Elements::I32(four(bytes, i32::from_le_bytes)),
        DType::I64 => Elements::I64(
            bytes
                .chunks_exact(8)
                .map(|c| i64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]))
                .collect(),
        ),
        DType::F16 => Elements::F32(two(|b| half::f16::from_le_bytes(b).to_f32())),
        DType::Bf16 => Elements::F32(two(|b| half::bf16::from_le_bytes(b).to_f32())),
        _ => Elements::F32(four(bytes, f32::from_le_bytes)),
    }
}
