//! Where weights come from, one tensor (or part of one) at a time.

use std::collections::BTreeMap;

use mindseye_engines::model::ParamSpec;
use mindseye_engines::onnx::{DataType, WeightError};

use crate::checkpoint::names::{Component, locate};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype};

/// Type and shape of a stored weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMeta {
    /// How it is stored.
    pub dtype: DataType,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
}

/// Named weights that can be read in parts, so that no model needs to be in memory.
pub trait WeightSource: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Type and shape of a weight; `None` where there is none of this name.
    fn meta(&self, name: &str) -> Option<WeightMeta>;

    /// Fills `out` with the elements from number `offset` on, converted to `f32`.
    ///
    /// # Errors
    /// [`WeightError`] naming the weight.
    fn read(&self, name: &str, offset: u64, out: &mut [f32]) -> Result<(), WeightError>;
}

/// Weights in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryWeights {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl MemoryWeights {
    /// No weights.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a weight.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape.
    pub fn insert(&mut self, name: impl Into<String>, shape: Vec<usize>, values: Vec<f32>) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of a weight must fill its shape");
        self.tensors.insert(name.into(), (shape, values));
    }
}

impl<N: Into<String>, const C: usize> From<[(N, Vec<usize>, Vec<f32>); C]> for MemoryWeights {
    fn from(tensors: [(N, Vec<usize>, Vec<f32>); C]) -> Self {
        let mut weights = Self::new();
        for (name, shape, values) in tensors {
            weights.insert(name, shape, values);
        }
        weights
    }
}

impl WeightSource for MemoryWeights {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<WeightMeta> {
        let (shape, _) = self.tensors.get(name)?;
        Some(WeightMeta { dtype: DataType::F32, shape: shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, out: &mut [f32]) -> Result<(), WeightError> {
        let Some((_, values)) = self.tensors.get(name) else {
            return Err(WeightError::Missing { name: name.into() });
        };
        let part = usize::try_from(offset).ok().and_then(|o| values.get(o..o.checked_add(out.len())?));
        let Some(part) = part else {
            return Err(WeightError::Data { name: name.into(), what: format!("no element {offset}") });
        };
        out.copy_from_slice(part);
        Ok(())
    }
}

/// Names and shapes without values: enough to write a network down, not to save it.
#[derive(Clone, Debug, Default)]
pub struct DeclaredWeights {
    shapes: BTreeMap<String, Vec<usize>>,
}

impl DeclaredWeights {
    /// The weights that a network asks for.
    #[must_use]
    pub fn new(specs: &[ParamSpec]) -> Self {
        Self { shapes: specs.iter().map(|s| (s.name.clone(), s.shape.clone())).collect() }
    }
}

impl WeightSource for DeclaredWeights {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<WeightMeta> {
        self.shapes.get(name).map(|shape| WeightMeta { dtype: DataType::F32, shape: shape.clone() })
    }

    fn read(&self, name: &str, _offset: u64, _out: &mut [f32]) -> Result<(), WeightError> {
        Err(WeightError::Data { name: name.into(), what: "only its shape is known".into() })
    }
}

/// Weights of a checkpoint on disk, read in place: nothing but names and shapes stays in memory.
#[derive(Debug)]
pub struct CheckpointWeights {
    checkpoint: Checkpoint,
    /// Our name to the checkpoint's, and what its values are multiplied with.
    names: BTreeMap<String, (String, Option<f32>)>,
}

impl CheckpointWeights {
    /// All tensors under the names that they have.
    pub fn plain(checkpoint: Checkpoint) -> Self {
        let own = |(name, _): (&str, _)| (name.to_owned(), (name.to_owned(), None));
        let names = checkpoint.tensors().map(own).collect();
        Self { checkpoint, names }
    }

    /// The weights of one network, whichever of the known layouts the checkpoint has; every name and shape is
    /// checked.
    ///
    /// # Errors
    /// [`CheckpointError`] naming the tensor that is missing, left over or misshapen.
    pub fn locate(
        checkpoint: Checkpoint,
        component: Component,
        specs: &[ParamSpec],
    ) -> Result<Self, CheckpointError> {
        let found = locate(component, specs, &checkpoint)?;
        let names = found.tensors.into_iter().map(|l| (l.spec.name, (l.source, l.scale))).collect();
        Ok(Self { checkpoint, names })
    }
}

/// Values that are read at once.
const CHUNK: usize = 1 << 20;

impl WeightSource for CheckpointWeights {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<WeightMeta> {
        let entry = self.checkpoint.get(&self.names.get(name)?.0)?;
        let dtype = match entry.dtype {
            Dtype::F32 => DataType::F32,
            Dtype::F16 => DataType::F16,
            Dtype::Bf16 => DataType::BF16,
            Dtype::F64 => DataType::F64,
            Dtype::F8E4M3 => DataType::F8E4M3,
            Dtype::F8E5M2 => DataType::F8E5M2,
            _ => return None,
        };
        Some(WeightMeta { dtype, shape: entry.shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, out: &mut [f32]) -> Result<(), WeightError> {
        let missing = || WeightError::Missing { name: name.into() };
        let (stored, scale) = self.names.get(name).ok_or_else(missing)?;
        for (i, part) in out.chunks_mut(CHUNK).enumerate() {
            let from = offset.saturating_add((i * CHUNK) as u64);
            self.checkpoint.read_finite(stored, from, part).map_err(|e| match e {
                CheckpointError::NoTensor { .. } => missing(),
                e => WeightError::Data { name: name.into(), what: e.to_string() },
            })?;
            if let Some(k) = scale {
                part.iter_mut().for_each(|v| *v *= k);
            }
        }
        Ok(())
    }
}
