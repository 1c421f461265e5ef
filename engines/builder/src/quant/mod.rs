//! Quantisation: explicit Q/DQ in the ONNX graph, for strongly typed engines.
//!
//! | precision | weights | activations | attention products |
//! |---|---|---|---|
//! | `int8` | per output channel, symmetric | per tensor, symmetric, after SmoothQuant | float |
//! | `fp8` | per tensor, E4M3 | per tensor, largest magnitude | E4M3 where the head size is a multiple of 16 |
//! | `int4w` | per block of 64 or 128 along the inner axis | float | float |
//! | `fp16`, `bf16` | float | float | float |
//!
//! Only linear layers inside `blocks.N` are quantised; embedders, time MLP, modulation and head stay high, and so do
//! the first and last blocks and any layer by configuration ([`QuantConfig`]).
//!
//! [`quantise`] returns two graphs of the same arithmetic: one to deploy, with Q/DQ nodes and packed weights, and one
//! for the CPU that rounds in plain float operators (any backend runs it; E4M3 bit-exactly). [`verify`] compares the
//! second against fp32.

mod calibrate;
mod float;
mod lower;
mod parts;
mod pieces;
mod rewrite;
mod spool;
#[cfg(test)]
mod tests;
mod verify;

pub use calibrate::Calibrator;
pub use float::{Float16, MEASURED_LIMIT, to_float16};
pub use lower::{kept_high, large_values, part_inputs};
pub use parts::{HalfInputs, PartInputs, SyntheticDenoiser};
pub use pieces::{MEMORY_BYTES, Runner, frames_within};
pub use rewrite::{
    Observed, QuantConfig, Quantised, Ranges, ScaleRecord, calibrate_and_quantise as quantise, check_weights,
    layers, observe_all, quantise_half, quantise_observed,
};
pub use spool::Spooled;
pub(crate) use verify::past_limit;
pub use verify::{
    Checks, Reference, Report, TaskAnswer, TaskChange, TaskEvaluation, TaskFigures, auto_exclude,
    observe_for, sensitivities, verify,
};

use mindseye_engines::backend::{Backend, BackendError, PrepareOptions, Session, Tensor};
pub use mindseye_engines::e4m3;
use mindseye_engines::onnx::{ExternalData, Model, OnnxError, SaveOptions};

/// Progress of quantising and checking, reported between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // done and of count items, layers or tries
pub enum Work {
    /// Weights are read and looked at.
    Weights { done: u64, of: u64 },
    /// Inputs are made.
    Inputs { done: u64, of: Option<u64> },
    /// The fp32 graph is run over calibration inputs; counts pieces of a graph that runs in pieces.
    Calibrate { done: u64, of: Option<u64> },
    /// Factors of SmoothQuant are worked out.
    Smooth { done: u64, of: u64 },
    /// Weights are packed.
    Pack { done: u64, of: u64 },
    /// Both graphs are run over inputs and compared.
    Compare { done: u64, of: u64 },
    /// Each layer alone is quantised, to find those that lose most.
    Layers { done: u64, of: u64 },
    /// The task is run with a graph, `fp32` or `quantised`.
    Task(&'static str),
}

/// Called with progress; returns false to cancel.
pub type Tell<'a> = dyn FnMut(Work) -> bool + 'a;

fn go_on(tell: &mut Tell<'_>, work: Work) -> Result<(), QuantError> {
    if tell(work) { Ok(()) } else { Err(QuantError::Cancelled) }
}

/// What failed in something that the caller supplies: a source of inputs, a task.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SuppliedError(Box<dyn std::error::Error + Send + Sync>);

impl SuppliedError {
    /// From any error, or from text.
    pub fn new(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(cause.into())
    }
}

/// Named inputs of one run.
pub type Inputs = Vec<(String, Tensor)>;

/// Where calibration inputs come from: rendered scenes, a bag, recorded tensors. Streamed: only one item is in memory.
pub trait CalibrationSource {
    /// A description of the inputs, with the seed, for reports and for the passport.
    fn describe(&self) -> String;
    /// Number of items, where known.
    fn count(&self) -> Option<u64>;
    /// Starts again from the first item. The items must be the same each time.
    ///
    /// # Errors
    /// Why it cannot.
    fn restart(&mut self) -> Result<(), SuppliedError>;
    /// The next item, none at the end.
    ///
    /// # Errors
    /// Why it cannot be read.
    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError>;
}

/// Calibration inputs held in memory.
#[derive(Clone, Debug, Default)]
pub struct InMemory {
    /// What they are.
    pub name: String,
    /// The items.
    pub items: Vec<Inputs>,
    /// Index of the next one.
    pub position: usize,
}

impl InMemory {
    /// Inputs with a name.
    #[must_use]
    pub fn new(name: &str, items: Vec<Inputs>) -> Self {
        InMemory { name: name.to_owned(), items, position: 0 }
    }
}

impl CalibrationSource for InMemory {
    fn describe(&self) -> String {
        self.name.clone()
    }

    fn count(&self) -> Option<u64> {
        Some(self.items.len() as u64)
    }

    fn restart(&mut self) -> Result<(), SuppliedError> {
        self.position = 0;
        Ok(())
    }

    fn next(&mut self) -> Result<Option<Inputs>, SuppliedError> {
        let item = self.items.get(self.position).cloned();
        self.position += usize::from(item.is_some());
        Ok(item)
    }
}

/// Why a graph cannot be quantised or checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// The graph cannot be read or written.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The CPU backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// NaN or infinity among the calibration inputs.
    #[error("calibration: input {input:?} is NaN or infinite; check the calibration inputs")]
    InputNotFinite {
        /// Name of the graph's input.
        input: String,
    },
    /// NaN or infinity among the activations, from finite inputs and weights.
    #[error("calibration: value {value:?} becomes NaN or infinite in fp32, from finite inputs and weights")]
    NotFinite {
        /// Name of the value in the graph.
        value: String,
    },
    /// A weight is NaN or infinite.
    #[error("weight {weight:?} is NaN or infinite; import or train the bundle again")]
    WeightNotFinite {
        /// Name of the constant.
        weight: String,
    },
    /// A weight is too large for the float format.
    #[error("weight {weight:?} reaches {largest}, past the largest half; use bf16")]
    TooLarge {
        /// Name of the constant.
        weight: String,
        /// Its largest magnitude.
        largest: f32,
    },
    /// A graph gives NaN or infinity where fp32 gives a number.
    #[error("output {output:?} is NaN or infinite in this precision, and finite in fp32")]
    OutputNotFinite {
        /// Name of the output.
        output: String,
    },
    /// A layer that was to be kept high does not exist.
    #[error("no linear layer's name contains {name:?} (--keep); layers are called as {example:?}")]
    NoSuchLayer {
        /// What was asked for.
        name: String,
        /// A layer that there is.
        example: String,
    },
    /// The source gave nothing or failed.
    #[error("calibration: {0}")]
    Source(#[source] SuppliedError),
    /// The task could not be run.
    #[error("task: {0}")]
    Task(#[source] SuppliedError),
    /// The precision is not one that this graph can take.
    #[error("{0}")]
    Unsupported(String),
    /// A temporary file.
    #[error("temporary file: {0}")]
    Io(#[from] std::io::Error),
    /// The errors are larger than the target allows.
    #[error("{what} has relative L2 error {got:.4}, the limit is {limit:.3}; worst layers: {worst}{advice}")]
    Limit {
        /// Output or block.
        what: String,
        /// Measured.
        got: f64,
        /// Allowed.
        limit: f64,
        /// Names and figures.
        worst: String,
        /// What would help, where that is known; begins with a semicolon.
        advice: String,
    },
    /// Stopped on request.
    #[error("cancelled")]
    Cancelled,
}

/// Prepares a graph on a backend, through a temporary file.
pub(crate) fn session(model: &Model, backend: &dyn Backend) -> Result<Box<dyn Session>, QuantError> {
    let folder = Scratch::new()?;
    let path = folder.0.join("graph.onnx");
    // Large weights beside the graph: readers then take one tensor at a time.
    let external = if model.weight_bytes() > 64 << 20 { ExternalData::Always } else { ExternalData::Auto };
    model.save(&path, &SaveOptions { external, ..SaveOptions::default() })?;
    Ok(backend.prepare(&path, &PrepareOptions::default())?.session()?)
}

/// A folder that goes away with its owner.
pub(crate) struct Scratch(pub(crate) std::path::PathBuf);

impl Scratch {
    pub(crate) fn new() -> std::io::Result<Scratch> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("mindseye-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: the system clears its temporary folder anyway.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
