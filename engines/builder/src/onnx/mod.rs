//! Networks as ONNX graphs: the interpreter that writes a network down, and where its weights come from.
//!
//! [`GraphBuilder`] implements [`mindseye_engines::model::Ops`]: running a network on it writes the network down.
//!
//! ```
//! use mindseye_builder::onnx::{GraphBuilder, MemoryWeights};
//! use mindseye_engines::model::Ops;
//! use mindseye_engines::onnx::Dim;
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

use std::collections::{HashMap, HashSet};

mod build;
mod denoiser;
mod fused;
mod graphs;
mod optimize;
mod stored;
mod weights;

pub use build::{GraphBuilder, IndexValue, NodeValue};
pub use denoiser::{denoiser_graph, write_denoiser};
pub use fused::fused;
pub use graphs::{Way, codec_graph, depth_graph, step_component, text_encoder_graph, vae_graph};
pub use weights::{CheckpointWeights, DeclaredWeights, MemoryWeights, WeightMeta, WeightSource};

/// Names of values and nodes that are taken.
#[derive(Default)]
struct Names {
    taken: HashSet<String>,
    /// Last number that was put behind each name.
    numbers: HashMap<String, usize>,
}

impl Names {
    /// Takes a name; false where it was taken before.
    fn insert(&mut self, name: &str) -> bool {
        self.taken.insert(name.to_owned())
    }

    fn contains(&self, name: &str) -> bool {
        self.taken.contains(name)
    }

    /// `base`, or `base` with a number behind it where that is taken.
    fn unique(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        while !self.taken.insert(name.clone()) {
            let number = self.numbers.entry(base.to_owned()).or_insert(0);
            *number += 1;
            name = format!("{base}_{number}");
        }
        name
    }
}
