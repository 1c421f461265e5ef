//! Foreign weights: safetensors files (sharded or not) and PyTorch `.pth` archives, read without executing anything.
//!
//! Only headers are kept in memory; tensors are read one at a time from their file. [`names`] knows what a
//! component's tensors are called in both layouts and checks that all of them are there, of the right shape, and no
//! others.

pub mod lora;
pub mod names;
mod pickle;
mod safetensors;
mod zip;

pub use pickle::PickleError;
pub use zip::ZipError;

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::quant::e4m3;

/// Largest number of axes of a tensor.
const MAX_AXES: usize = 8;
/// Largest index file that is read, in bytes.
const MAX_INDEX_BYTES: u64 = 16 << 20;
/// Largest number of shards.
const MAX_SHARDS: usize = 1000;

/// Why a checkpoint was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it claims to be, or holds something that is not accepted.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// A `.pth` or `.pt` file is not a readable archive.
    #[error("{path}: {source}")]
    Zip {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ZipError,
    },
    /// The description of the tensors in a `.pth` or `.pt` file is refused.
    #[error("{path}: data.pkl: {source}")]
    Pickle {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: PickleError,
    },
    /// Two shards hold a tensor of the same name.
    #[error("tensor {name}: in both {first} and {second}")]
    Duplicate {
        /// The tensor.
        name: String,
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },
    /// There are no weights here.
    #[error("{path}: no weights here; expected {expected}")]
    Nothing {
        /// The directory.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
    /// A tensor that was asked for is not there.
    #[error("tensor {name}: not in {path}")]
    NoTensor {
        /// The tensor.
        name: String,
        /// The checkpoint.
        path: PathBuf,
    },
    /// The tensors are adapters of a low-rank adaptation, which change a network and are none.
    #[error(
        "{path}: this is a LoRA (it holds {name}), not the weights of a network; import the network that it was made \
         for and name this file with --lora FILE --lora-strength S"
    )]
    Adapters {
        /// The checkpoint.
        path: PathBuf,
        /// One of its tensors.
        name: String,
    },
    /// A weight is NaN or infinite.
    #[error("{path}: tensor {name}: element {element} is {value}; the file is damaged, or the weights are")]
    NotFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Which element, row-major.
        element: u64,
        /// NaN or an infinity.
        value: f32,
    },
    /// The adapters of a LoRA do not fit the network.
    #[error("{path}: {name}: {what}")]
    AdapterMismatch {
        /// The LoRA.
        path: PathBuf,
        /// Tensor or layer.
        name: String,
        /// What does not fit.
        what: String,
    },
    /// The tensors are not those of the network.
    #[error("{path}: {what}")]
    Mismatch {
        /// The checkpoint.
        path: PathBuf,
        /// Missing, extra and misshapen tensors by name.
        what: String,
    },
}

/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit float (IEEE).
    F16,
    /// 16-bit float (bfloat16).
    Bf16,
    /// 64-bit float.
    F64,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// Byte.
    U8,
    /// Truth value, one byte.
    Bool,
    /// 8-bit float, 4 exponent bits, no infinities.
    F8E4M3,
    /// 8-bit float, 5 exponent bits.
    F8E5M2,
}

impl Dtype {
    /// Bytes per element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::U8 | Self::Bool | Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// The name that safetensors uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
        }
    }

    /// Whether it is an 8-bit float.
    #[must_use]
    pub fn is_float8(self) -> bool {
        matches!(self, Self::F8E4M3 | Self::F8E5M2)
    }

    fn from_safetensors(name: &str) -> Option<Self> {
        use Dtype::*;
        [F32, F16, Bf16, F64, I64, I32, U8, Bool, F8E4M3, F8E5M2]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the file in the checkpoint.
    file: usize,
    /// First byte in the file.
    offset: u64,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
}

impl Entry {
    /// Number of elements.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count() as u64 * self.dtype.size() as u64
    }
}

/// Shape and number of bytes, if both fit their types and the shape has a sane number of axes.
fn checked_shape(shape: &[u64], dtype: Dtype) -> Option<(Vec<usize>, u64)> {
    if shape.len() > MAX_AXES {
        return None;
    }
    let mut bytes = dtype.size() as u64;
    let mut out = Vec::with_capacity(shape.len());
    for &size in shape {
        // A zero axis must not hide another one that would overflow.
        bytes = bytes.checked_mul(size)?;
        out.push(usize::try_from(size).ok()?);
    }
    Some((out, bytes))
}

/// Names are printed: one with control characters, which a terminal would obey, is refused and shown escaped.
fn check_name(path: &Path, name: &str) -> Result<(), CheckpointError> {
    if name.chars().any(char::is_control) {
        let what = format!("tensor {name:?}: a name with control characters");
        return Err(CheckpointError::Malformed { path: path.to_owned(), what });
    }
    Ok(())
}

/// A set of named tensors in one or more files.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens one `.safetensors` or `.pth` / `.pt` file, or all shards named by an index (`*.index.json`).
    ///
    /// # Errors
    /// See [`CheckpointError`].
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.ends_with(".index.json") {
            return Self::open_index(path);
        }
        Self::open_files(path, &[path.to_owned()])
    }

    /// Opens the weights in a directory: an index if there is one, else the only `.safetensors` file, else the only
    /// `.pth` or `.pt` file. A directory with several and no index is refused. What macOS puts beside files on other
    /// systems' disks (`._name`) is skipped.
    ///
    /// # Errors
    /// See [`CheckpointError`].
    pub fn open_dir(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            names.extend(name.to_str().filter(|name| !is_apple_double(name)).map(str::to_owned));
        }
        names.sort();
        for suffix in [".safetensors.index.json", ".safetensors", ".pth", ".pt"] {
            let found: Vec<&String> = names.iter().filter(|name| name.ends_with(suffix)).collect();
            match found.as_slice() {
                [] => {}
                [one] => return Self::open(&path.join(one)),
                many => {
                    return Err(CheckpointError::Malformed {
                        path: path.to_owned(),
                        what: format!("{} files end in {suffix}; name one, or add an index", many.len()),
                    });
                }
            }
        }
        Err(CheckpointError::Nothing {
            path: path.to_owned(),
            expected: "*.safetensors.index.json, one *.safetensors, one *.pth or one *.pt",
        })
    }

    fn open_index(path: &Path) -> Result<Self, CheckpointError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let bad = |what: String| CheckpointError::Malformed { path: path.to_owned(), what };
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > MAX_INDEX_BYTES {
            return Err(bad(format!("index of {size} bytes, at most {MAX_INDEX_BYTES} are read")));
        }
        let text = std::fs::read(path).map_err(io)?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| bad(format!("index: {e}")))?;
        let mut shards: Vec<&str> = index.weight_map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        if shards.len() > MAX_SHARDS {
            return Err(bad(format!("{} shards, at most {MAX_SHARDS} are read", shards.len())));
        }
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut paths = Vec::new();
        for shard in shards {
            // A shard lies beside its index; nothing else is opened on its behalf.
            if shard.is_empty()
                || shard.contains(['/', '\\'])
                || shard == ".."
                || !shard.ends_with(".safetensors")
            {
                return Err(bad(format!("shard {shard:?} is not a .safetensors file name")));
            }
            paths.push(dir.join(shard));
        }
        let out = Self::open_files(path, &paths)?;
        for (name, shard) in &index.weight_map {
            match out.tensors.get(name) {
                None => {
                    return Err(bad(format!("tensor {name:?} is listed for {shard:?}, but is not in it")));
                }
                Some(entry) if out.files[entry.file].0 != dir.join(shard) => {
                    return Err(bad(format!(
                        "tensor {name:?} is listed for {shard:?}, but is in another shard"
                    )));
                }
                Some(_) => {}
            }
        }
        if let Some(name) = out.tensors.keys().find(|name| !index.weight_map.contains_key(*name)) {
            return Err(bad(format!("tensor {name} is in a shard, but not listed")));
        }
        Ok(out)
    }

    fn open_files(path: &Path, paths: &[PathBuf]) -> Result<Self, CheckpointError> {
        let mut out = Self {
            path: path.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        for file in paths {
            let mut entries = Vec::new();
            let number = out.files.len();
            match file.extension().and_then(|e| e.to_str()) {
                Some("safetensors") => {
                    out.metadata.extend(safetensors::read_header(file, number, &mut entries)?);
                }
                Some("pth" | "pt") => pickle::read_archive(file, number, &mut entries)?,
                _ => {
                    return Err(CheckpointError::Malformed {
                        path: file.clone(),
                        what: "not a .safetensors, .pth or .pt file".to_owned(),
                    });
                }
            }
            let open =
                File::open(file).map_err(|source| CheckpointError::Io { path: file.clone(), source })?;
            out.files.push((file.clone(), open));
            for (name, entry) in entries {
                if let Some(other) = out.tensors.get(&name) {
                    return Err(CheckpointError::Duplicate {
                        first: out.files[other.file].0.clone(),
                        second: file.clone(),
                        name,
                    });
                }
                out.tensors.insert(name, entry);
            }
        }
        Ok(out)
    }

    /// What was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors in order of name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// Free-form text stored beside the tensors of safetensors files.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// One tensor's description.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// Raw little-endian bytes `from..from + buffer.len()` of a tensor, for copying in pieces.
    ///
    /// # Errors
    /// [`CheckpointError::NoTensor`], [`CheckpointError::Io`], [`CheckpointError::Malformed`] beyond its end.
    pub fn read_bytes(&self, name: &str, from: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        let entry = self.entry(name)?;
        let (path, file) = &self.files[entry.file];
        if from.checked_add(buffer.len() as u64).is_none_or(|end| end > entry.bytes()) {
            return Err(CheckpointError::Malformed {
                path: path.clone(),
                what: format!("tensor {name} has only {} bytes", entry.bytes()),
            });
        }
        file.read_exact_at(buffer, entry.offset + from)
            .map_err(|source| CheckpointError::Io { path: path.clone(), source })
    }

    /// `values.len()` values of a floating-point tensor from number `from` on.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32`], and [`CheckpointError::NotFinite`] for the first NaN or infinity.
    pub fn read_finite(&self, name: &str, from: u64, values: &mut [f32]) -> Result<(), CheckpointError> {
        let dtype = self.entry(name)?.dtype;
        let mut bytes = vec![0; values.len() * dtype.size()];
        self.read_bytes(name, from.saturating_mul(dtype.size() as u64), &mut bytes)?;
        let read = to_f32(&bytes, dtype).ok_or_else(|| self.no_floats(name, dtype))?;
        if let Some(at) = read.iter().position(|v| !v.is_finite()) {
            return Err(CheckpointError::NotFinite {
                path: self.path.clone(),
                name: name.to_owned(),
                element: from + at as u64,
                value: read[at],
            });
        }
        values.copy_from_slice(&read);
        Ok(())
    }

    fn no_floats(&self, name: &str, dtype: Dtype) -> CheckpointError {
        CheckpointError::Malformed {
            path: self.path.clone(),
            what: format!("tensor {name} is {}, expected floats", dtype.name()),
        }
    }

    /// All values of a floating-point tensor as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`], or when the tensor does not hold floats.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.entry(name)?;
        let mut bytes = vec![0; usize::try_from(entry.bytes()).unwrap_or(usize::MAX)];
        self.read_bytes(name, 0, &mut bytes)?;
        to_f32(&bytes, entry.dtype).ok_or_else(|| self.no_floats(name, entry.dtype))
    }

    /// All values of a floating-point tensor as f64.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32`].
    pub fn read_f64(&self, name: &str) -> Result<Vec<f64>, CheckpointError> {
        let entry = self.entry(name)?;
        if entry.dtype != Dtype::F64 {
            return Ok(self.read_f32(name)?.into_iter().map(f64::from).collect());
        }
        let mut bytes = vec![0; usize::try_from(entry.bytes()).unwrap_or(usize::MAX)];
        self.read_bytes(name, 0, &mut bytes)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
    }

    /// All values of an integer tensor.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`], or when the tensor does not hold integers.
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>, CheckpointError> {
        let entry = self.entry(name)?;
        let mut bytes = vec![0; usize::try_from(entry.bytes()).unwrap_or(usize::MAX)];
        self.read_bytes(name, 0, &mut bytes)?;
        Ok(match entry.dtype {
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            Dtype::I32 => {
                bytes.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect()
            }
            Dtype::U8 | Dtype::Bool => bytes.iter().map(|b| i64::from(*b)).collect(),
            _ => {
                return Err(CheckpointError::Malformed {
                    path: self.files[entry.file].0.clone(),
                    what: format!("tensor {name} is {}, expected integers", entry.dtype.name()),
                });
            }
        })
    }

    fn entry(&self, name: &str) -> Result<&Entry, CheckpointError> {
        self.tensors
            .get(name)
            .ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned(), path: self.path.clone() })
    }
}

/// Whether a file name is that of an AppleDouble file: attributes that macOS keeps beside a file.
#[must_use]
pub fn is_apple_double(name: &str) -> bool {
    name.starts_with("._")
}

/// Little-endian floats as f32; `None` for integer types.
#[must_use]
pub fn to_f32(bytes: &[u8], dtype: Dtype) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::Bf16 => {
            bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        Dtype::F8E4M3 => bytes.iter().map(|b| e4m3::to_f32(*b)).collect(),
        // The upper byte of a half.
        Dtype::F8E5M2 => bytes.iter().map(|b| half::f16::from_le_bytes([0, *b]).to_f32()).collect(),
        _ => return None,
    })
}
