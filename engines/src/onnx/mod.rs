//! ONNX files: reading, rewriting, writing, and the interpreter that turns a network into a graph.
//!
//! [`Model`] is the file as plain data. [`Model::load`] reads foreign files without trusting them,
//! [`Model::save`] streams weights to disk, beside the graph where they are large. [`GraphBuilder`] implements
//! [`crate::model::Ops`]: running a network on it writes the network down.
//!
//! ```
//! use mindseye_engines::model::Ops;
//! use mindseye_engines::onnx::{Dim, GraphBuilder, MemoryWeights};
//! use std::sync::Arc;
//!
//! let weights = MemoryWeights::from([("w", vec![2, 3], vec![1.0; 6])]);
//! let mut ops = GraphBuilder::new("example", Arc::new(weights));
//! let x = ops.input("x", &[Dim::from("tokens"), Dim::from(3)]);
//! let w = ops.param("w", &[2, 3]);
//! let y = ops.linear(&x, &w, None);
//! ops.output("y", &y, &[Dim::from("tokens"), Dim::from(2)]);
//! let model = ops.finish()?;
//! assert_eq!(model.graph.outputs[0].name, "y");
//! # Ok::<(), mindseye_engines::onnx::OnnxError>(())
//! ```

mod build;
mod graphs;
mod ir;
mod optimize;
mod origin;
mod proto;
mod read;
mod stored;
mod weights;
mod write;

pub use build::{GraphBuilder, IndexValue, NodeValue};
pub use graphs::{
    codec_decoder_graph, codec_encoder_graph, text_encoder_graph, vae_decoder_graph, vae_encoder_graph,
};
pub use ir::{
    Attribute, AttributeValue, DataType, Dim, Graph, Initializer, LazyTensor, Model, Node, TensorData,
    ValueInfo,
};
pub use origin::{Origin, OriginError, Step};
pub use weights::{CheckpointWeights, DeclaredWeights, MemoryWeights, WeightError, WeightMeta, WeightSource};
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
