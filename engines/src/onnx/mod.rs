//! ONNX files as plain data: reading, rewriting, writing.
//!
//! [`Model`] is the file. [`Model::load`] reads foreign files without trusting them, [`Model::save`] streams weights to
//! disk, beside the graph where they are large. Networks are written as graphs by the `mindseye-builder` crate.

mod ir;
mod origin;
mod proto;
mod read;
mod stored;
mod write;

pub use ir::{
    Attribute, AttributeValue, DataType, Dim, Graph, Initializer, LazyTensor, Model, Node, TensorData,
    ValueInfo,
};
pub use origin::{Origin, OriginError, Step, StoredWeights};
pub use stored::Storage;
pub use write::{ExternalData, SaveOptions, SavedFiles};

use std::path::PathBuf;

use crate::protobuf::WireError;

/// Operator set that graphs are written in: the newest whose operators rten, onnxruntime and TensorRT 10 all run.
pub const OPSET: i64 = 21;
/// File format version that belongs to [`OPSET`].
pub const IR_VERSION: i64 = 10;

/// What is wrong with an ONNX file, or with making one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The bytes are not the protobuf that ONNX defines.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A limit of the reader is exceeded.
    #[error("the model has more than {limit} {what}")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// Something that ONNX allows and this reader does not keep.
    #[error("{what} is not supported{}", if .place.is_empty() { String::new() } else { format!(" (in {})", .place) })]
    Unsupported {
        /// What.
        what: String,
        /// Where.
        place: String,
    },
    /// A tensor's data do not fit its description, or cannot be had.
    #[error("tensor {name:?}: {what}")]
    Tensor {
        /// Which tensor.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The graph contradicts itself.
    #[error("graph: {what}")]
    Graph {
        /// What is wrong.
        what: String,
    },
    /// A weight is missing or has another shape.
    #[error(transparent)]
    Weight(#[from] WeightError),
}

/// Why a weight cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// No such weight.
    #[error("weight {name:?} is missing")]
    Missing {
        /// Which.
        name: String,
    },
    /// Another shape than the network asks for.
    #[error("weight {name:?}: shape {got:?}, the network wants {wanted:?}")]
    Shape {
        /// Which.
        name: String,
        /// What the network asks for.
        wanted: Vec<usize>,
        /// What is stored.
        got: Vec<usize>,
    },
    /// NaN or infinity.
    #[error("weight {name:?}: element {element} is {value}")]
    NotFinite {
        /// Which.
        name: String,
        /// Which element, row-major.
        element: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// The stored bytes cannot be used.
    #[error("weight {name:?}: {what}")]
    Data {
        /// Which.
        name: String,
        /// What is wrong.
        what: String,
    },
}
