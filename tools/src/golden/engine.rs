//! Runs a network through either interpreter on plain arrays.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context;
use mindseye_engines::{model::Ops, onnx::Dim};

use super::Vectors;
use crate::eager::{Eager, Params};

/// Which interpreter computes a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The eager interpreter.
    Eager,
    /// ONNX export, run on the embedded CPU backend.
    Onnx,
}

impl Via {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Onnx => "onnx",
        }
    }

    /// Tolerance for this interpreter, given that of the eager one.
    pub(super) fn tolerance(self, eager: f64) -> f64 {
        match self {
            Self::Eager => eager,
            Self::Onnx => 3.0 * eager,
        }
    }
}

/// A network with its inputs left open.
pub(super) trait Program {
    /// Tells graphs apart.
    fn key(&self) -> String;
    /// Sizes of an input of the exported graph, where they may differ between calls; fixed otherwise.
    fn dims(&self, _input: &str, shape: &[usize]) -> Vec<Dim> {
        shape.iter().map(|s| Dim::Fixed(*s)).collect()
    }
    /// Number of axes of an output.
    fn rank(&self, output: &str) -> usize;
    /// Writes the network down; inputs come in the order of [`Inputs`].
    fn build<O: Ops>(
        &self,
        o: &mut O,
        tensors: &[O::Tensor],
        indices: &[O::Index],
    ) -> Vec<(String, O::Tensor)>;
}

/// Shape and values.
pub(super) type Array = (Vec<usize>, Vec<f32>);
/// Shape and row numbers.
pub(super) type Rows = (Vec<usize>, Vec<usize>);

/// Inputs of one run.
#[derive(Clone, Debug, Default)]
pub(super) struct Inputs {
    pub(super) tensors: Vec<(String, Array)>,
    pub(super) indices: Vec<(String, Rows)>,
}

impl Inputs {
    pub(super) fn tensor(&mut self, name: &str, shape: &[usize], data: Vec<f32>) {
        self.tensors.push((name.to_owned(), (shape.to_vec(), data)));
    }

    pub(super) fn index(&mut self, name: &str, shape: &[usize], rows: Vec<usize>) {
        self.indices.push((name.to_owned(), (shape.to_vec(), rows)));
    }
}

/// Outputs by name; `marks` are the values that the network named on its way (eager only).
#[derive(Debug, Default)]
pub(super) struct Outputs {
    outputs: BTreeMap<String, Array>,
    pub(super) marks: BTreeMap<String, Array>,
}

impl Outputs {
    pub(super) fn get(&self, name: &str) -> anyhow::Result<&Array> {
        self.outputs.get(name).with_context(|| format!("no output {name}"))
    }

    pub(super) fn data(&self, name: &str) -> anyhow::Result<&[f32]> {
        Ok(&self.get(name)?.1)
    }
}

/// An interpreter with weights.
pub(super) enum Engine {
    Eager(Arc<Params>),
    Onnx(super::onnx::OnnxEngine),
}

impl Engine {
    pub(super) fn new(via: Via, weights: &Vectors) -> anyhow::Result<Self> {
        let params = Arc::new(weights.params()?);
        Ok(match via {
            Via::Eager => Self::Eager(params),
            Via::Onnx => Self::Onnx(super::onnx::OnnxEngine::new(&params)?),
        })
    }

    pub(super) fn run<P: Program>(&mut self, program: &P, inputs: &Inputs) -> anyhow::Result<Outputs> {
        match self {
            Self::Eager(params) => Ok(run_eager(params.clone(), program, inputs)),
            Self::Onnx(engine) => {
                Ok(Outputs { outputs: engine.run(program, inputs)?, marks: BTreeMap::new() })
            }
        }
    }
}

fn run_eager<P: Program>(params: Arc<Params>, program: &P, inputs: &Inputs) -> Outputs {
    let mut eager = Eager::new(params, false);
    eager.record_marks();
    let tensors: Vec<_> =
        inputs.tensors.iter().map(|(_, (shape, data))| eager.input(shape, data.clone())).collect();
    let indices: Vec<_> =
        inputs.indices.iter().map(|(_, (shape, rows))| eager.index(shape, rows.clone())).collect();
    let outputs = program.build(&mut eager, &tensors, &indices);
    let read = |var| {
        let (shape, data) = eager.value(var);
        (shape.to_vec(), data.to_vec())
    };
    Outputs {
        outputs: outputs.into_iter().map(|(name, var)| (name, read(var))).collect(),
        marks: eager.marks().iter().map(|(name, var)| (name.clone(), read(*var))).collect(),
    }
}
