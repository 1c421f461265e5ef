//! Running graphs: one interface, several machines underneath.
//!
//! A [`Backend`] prepares a file into an [`Engine`], which is shared between threads; each thread runs its own
//! [`Session`]. Tensors are named, dense and row-major. Backends are found by name with [`by_name`]:
//!
//! | name | what | needs |
//! |---|---|---|
//! | `rten` | embedded CPU, the default | nothing |
//! | `onnxruntime` | CPU | its shared library, opened at run time |
//! | `cuda` | NVIDIA GPUs, products in bf16 | a driver (555 or newer) |
//! | `cuda-f32` | the same, all in f32 | the same |
//! | `tensorrt` | NVIDIA GPUs | an engine built before, TensorRT, a driver |
//!
//! To add one: implement the three traits, add an arm to [`by_name`] and a name to [`NAMES`].

mod ort;
mod rten;

pub use self::ort::{OrtBackend, PATH_VARIABLE as ORT_PATH_VARIABLE};
pub use self::rten::RtenBackend;

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "cuda")]
use crate::cuda::CudaBackend;
pub use crate::onnx::{DataType, Dim};
use crate::sampler::Factors;
#[cfg(feature = "cuda")]
use crate::target::Precision;

/// Names that [`by_name`] knows.
pub const NAMES: &[&str] = &["rten", "onnxruntime", "cuda", "cuda-f32", "tensorrt"];

/// The elements of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit integers.
    I64(Vec<i64>),
    /// 32-bit integers.
    I32(Vec<i32>),
}

impl Elements {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(v) => v.len(),
            Elements::I64(v) => v.len(),
            Elements::I32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> DataType {
        match self {
            Elements::F32(_) => DataType::F32,
            Elements::I64(_) => DataType::I64,
            Elements::I32(_) => DataType::I32,
        }
    }
}

/// A dense tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
    /// As many elements as the shape asks for.
    pub data: Elements,
}

impl Tensor {
    /// A float tensor.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape.
    pub fn f32(shape: &[usize], values: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values must fill the shape {shape:?}");
        Self { shape: shape.to_vec(), data: Elements::F32(values) }
    }

    /// An integer tensor.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape.
    pub fn i64(shape: &[usize], values: Vec<i64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values must fill the shape {shape:?}");
        Self { shape: shape.to_vec(), data: Elements::I64(values) }
    }

    /// A tensor of no elements, to be filled by [`Session::run_into`].
    pub fn empty() -> Self {
        Self { shape: vec![0], data: Elements::F32(Vec::new()) }
    }

    /// The floats, where they are floats.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Elements::F32(v) => Some(v),
            _ => None,
        }
    }

    /// The floats, where they are floats.
    pub fn into_f32(self) -> Option<Vec<f32>> {
        match self.data {
            Elements::F32(v) => Some(v),
            _ => None,
        }
    }
}

/// A named input or output of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name.
    pub name: String,
    /// Element type that callers give or get.
    pub dtype: DataType,
    /// Shape; sizes that differ between calls are symbols.
    pub shape: Vec<Dim>,
}

/// How an engine is prepared and run.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PrepareOptions {
    /// Threads of one run; 0 lets the backend choose.
    pub threads: usize,
}

impl PrepareOptions {
    /// Runs on this many threads; 0 lets the backend choose.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }
}

/// Why something cannot be prepared or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// No backend of this name.
    #[error("backend {name:?} is not known; known are {}", NAMES.join(", "))]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The backend needs something that this machine lacks.
    #[error("backend {backend}: {what}")]
    Unavailable {
        /// Which backend.
        backend: &'static str,
        /// What is missing and how to get it.
        what: String,
    },
    /// The model cannot be prepared.
    #[error("{backend} cannot prepare {}: {what}", path.display())]
    Prepare {
        /// Which backend.
        backend: &'static str,
        /// The model.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// An input is missing, not known, or has another type or shape.
    #[error("input {name:?}: expected {expected}, got {got}")]
    Input {
        /// Which input.
        name: String,
        /// What the engine takes.
        expected: String,
        /// What was given.
        got: String,
    },
    /// An output is not known or has another type or shape than stated.
    #[error("output {name:?}: expected {expected}, got {got}")]
    Output {
        /// Which output.
        name: String,
        /// What was expected.
        expected: String,
        /// What came.
        got: String,
    },
    /// The run failed inside the backend.
    #[error("{backend} failed: {what}")]
    Run {
        /// Which backend.
        backend: &'static str,
        /// What it says.
        what: String,
    },
}

/// A way to run graphs.
pub trait Backend: Send + Sync {
    /// Its name in [`NAMES`].
    fn name(&self) -> &'static str;

    /// Version of what runs underneath, for reports.
    fn version(&self) -> String;

    /// Reads a model (`rten`, `onnxruntime`: ONNX, `tensorrt`: a built engine) and makes it ready to run.
    ///
    /// # Errors
    /// [`BackendError::Prepare`] with the file and, where an operator is lacking, its name;
    /// [`BackendError::Unavailable`] where the machine lacks something.
    fn prepare(&self, model: &Path, options: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError>;
}

/// A prepared model: weights and plan, shared by all sessions.
pub trait Engine: Send + Sync {
    /// Inputs in the order of the file.
    fn inputs(&self) -> &[Port];

    /// Outputs in the order of the file.
    fn outputs(&self) -> &[Port];

    /// A session for one thread.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`] or [`BackendError::Run`] where memory for it cannot be had.
    fn session(&self) -> Result<Box<dyn Session>, BackendError>;
}

/// Indices of the wanted outputs among an engine's.
///
/// # Errors
/// [`BackendError::Output`] for a name that the engine lacks.
fn wanted_outputs(ports: &[Port], outputs: &[(&str, &mut Tensor)]) -> Result<Vec<usize>, BackendError> {
    let find = |(name, _): &(&str, &mut Tensor)| {
        ports.iter().position(|p| p.name == *name).ok_or_else(|| BackendError::Output {
            name: (*name).to_owned(),
            expected: format!(
                "one of {}",
                ports.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ")
            ),
            got: "a name that the engine lacks".into(),
        })
    };
    outputs.iter().map(find).collect()
}

/// Refuses an output that is not of its port's shape.
fn check_output(port: &Port, out: &Tensor) -> Result<(), BackendError> {
    let fits = out.shape.len() == port.shape.len()
        && port.shape.iter().zip(&out.shape).all(|(d, &s)| !matches!(d, Dim::Fixed(n) if *n != s));
    if fits {
        return Ok(());
    }
    Err(BackendError::Output {
        name: port.name.clone(),
        expected: describe(port),
        got: format!("{} {:?}", out.data.dtype().name(), out.shape),
    })
}

/// Whether a tensor of this name is state that one run leaves for later ones: streaming caches (`new_cache.{i}` is the
/// next run's `cache.{i}`), keys and values of the context (`memory.{i}.k`, `memory.{i}.v`).
#[must_use]
pub fn is_state(name: &str) -> bool {
    ["memory.", "cache.", "new_cache."].iter().any(|start| name.starts_with(start))
}

/// Name of the input that reads what an output of state leaves.
#[must_use]
pub fn state_input(output: &str) -> String {
    output.strip_prefix("new_").unwrap_or(output).to_owned()
}

/// State that a run left. The backend decides where it is stored: on the host, or on the device, so that it is never
/// copied between them.
#[derive(Default)]
pub struct State(StateKind);

enum StateKind {
    /// By the name of the input that reads it.
    Host(Vec<(String, Tensor)>),
    Device(Box<dyn Any + Send>),
}

impl Default for StateKind {
    fn default() -> Self {
        StateKind::Host(Vec::new())
    }
}

impl State {
    /// Whether no run has left anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(&self.0, StateKind::Host(tensors) if tensors.is_empty())
    }

    /// What a backend put on its device.
    pub(crate) fn device<T: 'static>(&self) -> Option<&T> {
        match &self.0 {
            StateKind::Device(state) => state.downcast_ref(),
            StateKind::Host(_) => None,
        }
    }

    /// As [`State::device`], made where there is none yet.
    pub(crate) fn device_mut<T: Default + Send + 'static>(&mut self) -> Option<&mut T> {
        if self.device::<T>().is_none() {
            self.0 = StateKind::Device(Box::<T>::default());
        }
        match &mut self.0 {
            StateKind::Device(state) => state.downcast_mut(),
            StateKind::Host(_) => None,
        }
    }
}

/// What a sampler's step does to a sample that stays on a device: [`Resident::sample`].
pub struct SampleStep<'a> {
    /// The sample's own tensors: `x`, `m1`, `m2` and `previous` (`[frames, channels, pixels]`, f32) and, for each branch,
    /// `times.{branch}`: what `time` is in each step, `[steps, n]`.
    pub sample: &'a State,
    /// The conditional branch and, with guidance, the unconditional one: what a run left (`sample`), and the inputs
    /// (`latents`, `time`) into which the next pass's are written.
    pub branches: &'a [[&'a State; 2]],
    /// Frames, channels, pixels of the sample.
    pub shape: [usize; 3],
    /// Frames of a pass.
    pub pass_frames: usize,
    /// Which frame of a pass is the sample's first; -1 where that one is given and in no pass.
    pub first: i32,
    /// Numbers of the step.
    pub factors: Factors,
    /// Whether the network predicts the clean sample, not the velocity.
    pub predicts_clean: bool,
    /// Weight of guidance.
    pub guidance: f32,
    /// The step after this one, where there is one.
    pub next: Option<usize>,
}

/// A session whose inputs and outputs may stay on its device, from one run to the next. Work is queued, in order;
/// [`Resident::get`] waits for it.
pub trait Resident {
    /// Puts a tensor on the device, for the input of that name, in the place of one of that name and size.
    ///
    /// # Errors
    /// [`BackendError::Run`] where memory for it cannot be had; integers of more than 32 bits.
    fn put(&mut self, on: &mut State, name: &str, tensor: &Tensor) -> Result<(), BackendError>;

    /// Runs from what is on the device alone, and leaves the `outputs` there, under their own names.
    ///
    /// # Errors
    /// [`BackendError::Input`] for an input that is not in `from`, or does not fit; as [`Session::run_into`].
    fn queue(&mut self, from: &[&State], outputs: &[&str], to: &mut State) -> Result<(), BackendError>;

    /// Moves a sample on; its arithmetic is that of [`crate::sampler::Sampler::step`], to the bit.
    ///
    /// # Errors
    /// [`BackendError::Run`] for a tensor that is missing or of another size.
    fn sample(&mut self, step: &SampleStep<'_>) -> Result<(), BackendError>;

    /// Reads a tensor, when all that was queued is done.
    ///
    /// # Errors
    /// [`BackendError::Output`] for a name that is not there; also what was queued fails with.
    fn get(&mut self, from: &State, name: &str) -> Result<Tensor, BackendError>;
}

/// How long the steps of one run took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunTimes {
    /// Inputs to the device.
    pub copy_in: Duration,
    /// The work itself.
    pub compute: Duration,
    /// Outputs from the device.
    pub copy_out: Duration,
}

/// One thread's way to run an engine.
pub trait Session: Send {
    /// How long the steps of the last run took; none where the backend does not time them separately.
    fn times(&self) -> Option<RunTimes> {
        None
    }

    /// Runs once. `outputs` names what is wanted; each tensor there is overwritten, its memory reused where the
    /// backend can.
    ///
    /// # Errors
    /// [`BackendError::Input`] with name, expectation and what was given; [`BackendError::Output`] for a name that
    /// the engine lacks; [`BackendError::Run`] where the backend fails.
    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError>;

    /// As [`Session::run_into`], with state: inputs that are state ([`is_state`]) come from `from`, and outputs that are
    /// state go to `to`, whose memory is reused where the backend can. `from` is left as it is.
    ///
    /// # Errors
    /// As [`Session::run_into`]; also [`BackendError::Run`] for state that another backend left.
    fn run_with_state(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
        from: Option<&State>,
        to: Option<&mut State>,
    ) -> Result<(), BackendError> {
        let mut given = inputs.to_vec();
        match from.map(|s| &s.0) {
            Some(StateKind::Host(tensors)) => given.extend(tensors.iter().map(|(n, t)| (n.as_str(), t))),
            Some(StateKind::Device(_)) => {
                let what = "state that a run on another device left cannot be read here".into();
                return Err(BackendError::Run { backend: "host", what });
            }
            None => {}
        }
        let Some(to) = to else { return self.run_into(&given, outputs) };
        let names: Vec<String> =
            self.engine().outputs().iter().map(|p| p.name.clone()).filter(|n| is_state(n)).collect();
        let mut left = match std::mem::take(&mut to.0) {
            StateKind::Host(tensors) if tensors.len() == names.len() => tensors,
            _ => names.iter().map(|n| (state_input(n), Tensor::empty())).collect(),
        };
        let mut wanted: Vec<(&str, &mut Tensor)> =
            outputs.iter_mut().map(|(name, tensor)| (*name, &mut **tensor)).collect();
        wanted.extend(names.iter().map(String::as_str).zip(left.iter_mut().map(|(_, t)| t)));
        self.run_into(&given, &mut wanted)?;
        to.0 = StateKind::Host(left);
        Ok(())
    }

    /// The session as one whose tensors stay on its device, where it is.
    fn resident(&mut self) -> Option<&mut dyn Resident> {
        None
    }

    /// Inputs and outputs of the engine.
    fn engine(&self) -> &dyn Engine;

    /// Runs once and returns all outputs in the order of the file.
    ///
    /// # Errors
    /// As [`Session::run_into`].
    fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, BackendError> {
        let mut results: Vec<(String, Tensor)> =
            self.engine().outputs().iter().map(|p| (p.name.clone(), Tensor::empty())).collect();
        let mut wanted: Vec<(&str, &mut Tensor)> = results.iter_mut().map(|(n, t)| (n.as_str(), t)).collect();
        self.run_into(inputs, &mut wanted)?;
        Ok(results)
    }
}

/// The backend called `name`.
///
/// # Errors
/// [`BackendError::Unknown`] listing the known ones; [`BackendError::Unavailable`] where its library is missing.
pub fn by_name(name: &str) -> Result<Arc<dyn Backend>, BackendError> {
    match name {
        "rten" => Ok(Arc::new(RtenBackend)),
        "onnxruntime" => Ok(Arc::new(OrtBackend::open()?)),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Arc::new(CudaBackend::open(Precision::Bf16, 0)?)),
        #[cfg(feature = "cuda")]
        "cuda-f32" => Ok(Arc::new(CudaBackend::open(Precision::Fp32, 0)?)),
        #[cfg(not(feature = "cuda"))]
        "cuda" | "cuda-f32" => {
            let what = crate::cuda::CudaError::LeftOut.to_string();
            Err(BackendError::Unavailable { backend: "cuda", what })
        }
        "tensorrt" => {
            Ok(Arc::new(crate::trt::TensorRtBackend::open(&crate::trt::LoadOptions::default(), 0)?))
        }
        _ => Err(BackendError::Unknown { name: name.to_owned() }),
    }
}

/// Checks inputs against an engine's ports: every port is given once, with its element type, its rank, its fixed
/// sizes, and one size per symbol. Backends call this before they run.
///
/// # Errors
/// [`BackendError::Input`] for the first that does not fit.
pub fn check_inputs(ports: &[Port], inputs: &[(&str, &Tensor)]) -> Result<(), BackendError> {
    let fail = |name: &str, expected: String, got: String| {
        Err(BackendError::Input { name: name.to_owned(), expected, got })
    };
    for (i, (name, tensor)) in inputs.iter().enumerate() {
        if !ports.iter().any(|p| p.name == *name) {
            let known: Vec<&str> = ports.iter().map(|p| p.name.as_str()).collect();
            return fail(name, format!("one of {}", known.join(", ")), "a name that the engine lacks".into());
        }
        if inputs[..i].iter().any(|(n, _)| n == name) {
            return fail(name, "one tensor".into(), "a second one".into());
        }
        let elements = tensor.shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        if elements != Some(tensor.data.len()) {
            let got = format!("{} values for shape {:?}", tensor.data.len(), tensor.shape);
            return fail(name, "as many values as the shape asks for".into(), got);
        }
    }
    let mut symbols: Vec<(&str, usize, &str)> = Vec::new();
    for port in ports {
        let Some((_, tensor)) = inputs.iter().find(|(n, _)| *n == port.name) else {
            return fail(&port.name, describe(port), "nothing".into());
        };
        let got = || format!("{} {:?}", tensor.data.dtype().name(), tensor.shape);
        let given = tensor.data.dtype();
        let integers = [DataType::I32, DataType::I64];
        if given != port.dtype && !(integers.contains(&given) && integers.contains(&port.dtype)) {
            return fail(&port.name, describe(port), got());
        }
        if tensor.shape.len() != port.shape.len() {
            return fail(&port.name, describe(port), got());
        }
        for (dim, &size) in port.shape.iter().zip(&tensor.shape) {
            match dim {
                Dim::Fixed(wanted) if *wanted != size => return fail(&port.name, describe(port), got()),
                Dim::Symbol(symbol) => match symbols.iter().find(|(s, ..)| s == symbol) {
                    Some((_, known, other)) if *known != size => {
                        let expected = format!("{} with {symbol} = {known} as in {other:?}", describe(port));
                        return fail(&port.name, expected, got());
                    }
                    Some(_) => {}
                    None => symbols.push((symbol, size, &port.name)),
                },
                _ => {}
            }
        }
    }
    Ok(())
}

/// `f32 [1, frames, 48]`.
pub fn describe(port: &Port) -> String {
    let dims: Vec<String> = port
        .shape
        .iter()
        .map(|d| match d {
            Dim::Fixed(size) => size.to_string(),
            Dim::Symbol(name) => name.clone(),
            Dim::Unknown => "?".into(),
        })
        .collect();
    format!("{} [{}]", port.dtype.name(), dims.join(", "))
}
