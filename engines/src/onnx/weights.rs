//! Where weights come from, one tensor (or part of one) at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::{DataType, read_exact_at};

/// Type and shape of a stored weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMeta {
    /// How it is stored.
    pub dtype: DataType,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
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
    /// The stored bytes cannot be used.
    #[error("weight {name:?}: {what}")]
    Data {
        /// Which.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A file of weights is broken or cannot be read.
    #[error("{}: {what}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
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

struct Stored {
    file: usize,
    offset: u64,
    meta: WeightMeta,
}

/// Weights in safetensors files, read in place: nothing but the headers stays in memory.
pub struct SafetensorsWeights {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Stored>,
}

/// Longest header that is read; real ones have at most a few megabytes.
const MAX_HEADER: u64 = 64 << 20;

impl SafetensorsWeights {
    /// Opens one or several `.safetensors` files as one set of weights.
    ///
    /// # Errors
    /// [`WeightError::File`] naming the file (and the tensor) for a header that is longer than the file, is not
    /// JSON, names an unknown element type, or whose offsets overlap or do not match the shape; also for a tensor
    /// that two files hold.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self, WeightError> {
        let mut weights = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            weights.add(path.as_ref())?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> Result<(), WeightError> {
        let fail = |what: String| WeightError::File { path: path.to_owned(), what };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        let size = file.metadata().map_err(|e| fail(e.to_string()))?.len();
        let mut head = [0u8; 8];
        read_exact_at(&file, &mut head, 0).map_err(|_| fail("shorter than 8 bytes".into()))?;
        let length = u64::from_le_bytes(head);
        if length > MAX_HEADER || length + 8 > size {
            return Err(fail(format!("header of {length} bytes in a file of {size}")));
        }
        let mut json = vec![0u8; length as usize];
        read_exact_at(&file, &mut json, 8).map_err(|e| fail(e.to_string()))?;
        let header: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&json).map_err(|e| fail(format!("header: {e}")))?;
        let data_start = 8 + length;
        let data_length = size - data_start;
        let mut ranges = Vec::new();
        for (name, entry) in header {
            if name == "__metadata__" {
                continue;
            }
            let bad = |what: &str| fail(format!("tensor {name:?}: {what}"));
            let dtype = match entry["dtype"].as_str() {
                Some("F32") => DataType::F32,
                Some("F16") => DataType::F16,
                Some("BF16") => DataType::BF16,
                Some(other) => return Err(bad(&format!("element type {other}, F32, F16 or BF16 is wanted"))),
                None => return Err(bad("no element type")),
            };
            let numbers = |key: &str| -> Option<Vec<u64>> {
                entry[key].as_array()?.iter().map(serde_json::Value::as_u64).collect()
            };
            let shape = numbers("shape").ok_or_else(|| bad("no shape"))?;
            let offsets = numbers("data_offsets").ok_or_else(|| bad("no data_offsets"))?;
            let &[start, end] = offsets.as_slice() else {
                return Err(bad("data_offsets must be two numbers"));
            };
            let elements = shape.iter().try_fold(1u64, |n, &s| n.checked_mul(s).filter(|&n| n < 1 << 44));
            let wanted =
                elements.and_then(|n| dtype.bytes_for(n)).ok_or_else(|| bad("shape is too large"))?;
            if start > end || end > data_length || end - start != wanted {
                return Err(bad(&format!(
                    "bytes {start}..{end} of {data_length}, but {} {shape:?} needs {wanted}",
                    dtype.name()
                )));
            }
            ranges.push((start, end, name.clone()));
            let shape = shape.iter().map(|&s| s as usize).collect();
            let stored = Stored {
                file: self.files.len(),
                offset: data_start + start,
                meta: WeightMeta { dtype, shape },
            };
            if self.tensors.insert(name.clone(), stored).is_some() {
                return Err(fail(format!("tensor {name:?} is in another file as well")));
            }
        }
        ranges.sort();
        if let Some(pair) = ranges.windows(2).find(|p| p[0].1 > p[1].0) {
            return Err(fail(format!("tensors {:?} and {:?} overlap", pair[0].2, pair[1].2)));
        }
        self.files.push((path.to_owned(), file));
        Ok(())
    }
}

impl WeightSource for SafetensorsWeights {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn meta(&self, name: &str) -> Option<WeightMeta> {
        self.tensors.get(name).map(|t| t.meta.clone())
    }

    fn read(&self, name: &str, offset: u64, out: &mut [f32]) -> Result<(), WeightError> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(WeightError::Missing { name: name.into() });
        };
        let fail = |what: String| WeightError::Data { name: name.into(), what };
        let elements: u64 = stored.meta.shape.iter().map(|&s| s as u64).product();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > elements) {
            return Err(fail(format!("no element {offset}+{}", out.len())));
        }
        let width = stored.meta.dtype.bits() as u64 / 8;
        let (path, file) = &self.files[stored.file];
        let mut bytes = vec![0u8; (1 << 20).min(out.len() * width as usize)];
        let mut position = stored.offset + offset * width;
        for part in out.chunks_mut((1 << 20) / width as usize) {
            let bytes = &mut bytes[..part.len() * width as usize];
            read_exact_at(file, bytes, position).map_err(|e| fail(format!("{}: {e}", path.display())))?;
            position += bytes.len() as u64;
            let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
            match stored.meta.dtype {
                DataType::F16 => {
                    for (o, b) in part.iter_mut().zip(bytes.chunks_exact(2)) {
                        *o = half::f16::from_bits(half(b)).to_f32();
                    }
                }
                DataType::BF16 => {
                    for (o, b) in part.iter_mut().zip(bytes.chunks_exact(2)) {
                        *o = half::bf16::from_bits(half(b)).to_f32();
                    }
                }
                _ => {
                    for (o, b) in part.iter_mut().zip(bytes.chunks_exact(4)) {
                        *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
            }
        }
        Ok(())
    }
}
