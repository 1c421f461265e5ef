//! Where weights come from, one tensor (or part of one) at a time.

use std::collections::BTreeMap;

use mindseye_engines::model::ParamSpec;
use mindseye_engines::onnx::{DataType, WeightError};

use crate::checkpoint::names::{Component, locate};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, to_f32};

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

/// Weights of a checkpoint on disk, read in place: nothing but names and shapes stays in memory.
#[derive(Debug)]
pub struct CheckpointWeights {
    checkpoint: Checkpoint,
    /// Our name to the checkpoint's.
    names: BTreeMap<String, String>,
}

impl CheckpointWeights {
    /// All tensors under the names that they have.
    pub fn plain(checkpoint: Checkpoint) -> Self {
        let names = checkpoint.tensors().map(|(name, _)| (name.to_owned(), name.to_owned())).collect();
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
        let (_, located) = locate(component, specs, &checkpoint)?;
        let names = located.into_iter().map(|l| (l.spec.name, l.source)).collect();
        Ok(Self { checkpoint, names })
    }
}

/// Bytes that are read at once.
const CHUNK: usize = 4 << 20;

impl WeightSource for CheckpointWeights {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<WeightMeta> {
        let entry = self.checkpoint.get(self.names.get(name)?)?;
        let dtype = match entry.dtype {
            Dtype::F32 => DataType::F32,
            Dtype::F16 => DataType::F16,
            Dtype::Bf16 => DataType::BF16,
            Dtype::F64 => DataType::F64,
            _ => return None,
        };
        Some(WeightMeta { dtype, shape: entry.shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, out: &mut [f32]) -> Result<(), WeightError> {
        let missing = || WeightError::Missing { name: name.into() };
        let stored = self.names.get(name).ok_or_else(missing)?;
        let dtype = self.checkpoint.get(stored).ok_or_else(missing)?.dtype;
        let fail = |what: String| WeightError::Data { name: name.into(), what };
        let width = dtype.size();
        let mut bytes = vec![0u8; CHUNK.min(out.len() * width)];
        let mut position =
            offset.checked_mul(width as u64).ok_or_else(|| fail(format!("no element {offset}")))?;
        for part in out.chunks_mut(CHUNK / width) {
            let bytes = &mut bytes[..part.len() * width];
            self.checkpoint.read_bytes(stored, position, bytes).map_err(|e| fail(e.to_string()))?;
            position += bytes.len() as u64;
            let values =
                to_f32(bytes, dtype).ok_or_else(|| fail(format!("holds {}, not floats", dtype.name())))?;
            part.copy_from_slice(&values);
        }
        Ok(())
    }
}
