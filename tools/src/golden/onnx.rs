//! Runs a network as an exported ONNX graph on the embedded backend.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Context;
use mindseye_builder::onnx::{GraphBuilder, MemoryWeights};
use mindseye_engines::{
    backend::{Engine, PrepareOptions, Tensor, by_name},
    onnx::{Dim, SaveOptions},
};

use super::engine::{Array, Inputs, Program};
use crate::eager::Params;

/// Weights, a scratch folder and the graphs made so far.
pub(super) struct OnnxEngine {
    weights: Arc<MemoryWeights>,
    folder: Scratch,
    graphs: BTreeMap<String, Arc<dyn Engine>>,
}

impl OnnxEngine {
    pub(super) fn new(params: &Params) -> anyhow::Result<Self> {
        let mut weights = MemoryWeights::new();
        for i in 0..params.len() {
            let (name, shape, data) = params.get(i);
            weights.insert(name, shape.to_vec(), data.to_vec());
        }
        Ok(Self { weights: Arc::new(weights), folder: Scratch::new()?, graphs: BTreeMap::new() })
    }

    pub(super) fn run<P: Program>(
        &mut self,
        program: &P,
        inputs: &Inputs,
    ) -> anyhow::Result<BTreeMap<String, Array>> {
        let dims: Vec<(String, Vec<Dim>)> = inputs
            .tensors
            .iter()
            .map(|(name, (shape, _))| (name.clone(), program.dims(name, shape)))
            .collect();
        let index_dims: Vec<(String, Vec<Dim>)> = inputs
            .indices
            .iter()
            .map(|(name, (shape, _))| (name.clone(), program.dims(name, shape)))
            .collect();
        let key = format!("{} {dims:?} {index_dims:?}", program.key());
        if !self.graphs.contains_key(&key) {
            let mut builder = GraphBuilder::new("golden", self.weights.clone());
            let tensors: Vec<_> = dims.iter().map(|(name, dims)| builder.input(name, dims)).collect();
            let indices: Vec<_> =
                index_dims.iter().map(|(name, dims)| builder.index_input(name, dims)).collect();
            for (name, value) in program.build(&mut builder, &tensors, &indices) {
                builder.output(&name, &value, &vec![Dim::Unknown; program.rank(&name)]);
            }
            let path = self.folder.0.join(format!("{}.onnx", self.graphs.len()));
            builder.finish().context("export")?.save(&path, &SaveOptions::default()).context("export")?;
            let engine = by_name("rten")?.prepare(&path, &PrepareOptions::default())?;
            self.graphs.insert(key.clone(), engine);
        }
        let tensors: Vec<(&str, Tensor)> = inputs
            .tensors
            .iter()
            .map(|(name, (shape, data))| (name.as_str(), Tensor::f32(shape, data.clone())))
            .chain(inputs.indices.iter().map(|(name, (shape, rows))| {
                (name.as_str(), Tensor::i64(shape, rows.iter().map(|r| *r as i64).collect()))
            }))
            .collect();
        let given: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let results = self.graphs[&key].session()?.run(&given)?;
        results
            .into_iter()
            .map(|(name, tensor)| {
                let shape = tensor.shape.clone();
                let data = tensor.into_f32().with_context(|| format!("output {name} holds no floats"))?;
                Ok((name, (shape, data)))
            })
            .collect()
    }
}

/// A folder that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mindseye-golden-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing can be done about a folder that stays.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
