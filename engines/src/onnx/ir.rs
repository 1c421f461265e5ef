//! The graph as plain data, made for rewriting.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::{OnnxError, Origin};

/// Element types, with their numbers in `TensorProto.DataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum DataType {
    /// 32-bit float.
    F32 = 1,
    /// Unsigned byte.
    U8 = 2,
    /// Signed byte.
    I8 = 3,
    /// 16-bit unsigned.
    U16 = 4,
    /// 16-bit signed.
    I16 = 5,
    /// 32-bit signed.
    I32 = 6,
    /// 64-bit signed.
    I64 = 7,
    /// One byte, 0 or 1.
    Bool = 9,
    /// IEEE half.
    F16 = 10,
    /// 64-bit float.
    F64 = 11,
    /// 32-bit unsigned.
    U32 = 12,
    /// 64-bit unsigned.
    U64 = 13,
    /// Truncated `f32`.
    BF16 = 16,
    /// 8-bit float, 4 exponent bits, no infinities.
    F8E4M3 = 17,
    /// 8-bit float, 5 exponent bits.
    F8E5M2 = 19,
    /// Two unsigned values per byte, the first in the low bits.
    U4 = 21,
    /// Two signed values per byte, the first in the low bits.
    I4 = 22,
}

impl DataType {
    /// From the number in the file.
    pub fn from_code(code: i64) -> Option<Self> {
        use DataType::*;
        [F32, U8, I8, U16, I16, I32, I64, Bool, F16, F64, U32, U64, BF16, F8E4M3, F8E5M2, U4, I4]
            .into_iter()
            .find(|d| *d as i64 == code)
    }

    /// Bits per element.
    pub fn bits(self) -> usize {
        use DataType::*;
        match self {
            U4 | I4 => 4,
            U8 | I8 | Bool | F8E4M3 | F8E5M2 => 8,
            U16 | I16 | F16 | BF16 => 16,
            F32 | I32 | U32 => 32,
            I64 | F64 | U64 => 64,
        }
    }

    /// Bytes that `elements` of this type take.
    pub fn bytes_for(self, elements: u64) -> Option<u64> {
        elements.checked_mul(self.bits() as u64).map(|bits| bits.div_ceil(8))
    }

    /// Short name: `f32`, `i64`, …
    pub fn name(self) -> &'static str {
        use DataType::*;
        match self {
            F32 => "f32",
            U8 => "u8",
            I8 => "i8",
            U16 => "u16",
            I16 => "i16",
            I32 => "i32",
            I64 => "i64",
            Bool => "bool",
            F16 => "f16",
            F64 => "f64",
            U32 => "u32",
            U64 => "u64",
            BF16 => "bf16",
            F8E4M3 => "f8e4m3",
            F8E5M2 => "f8e5m2",
            U4 => "u4",
            I4 => "i4",
        }
    }

    /// The inverse of [`DataType::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        (1..=22).filter_map(Self::from_code).find(|d| d.name() == name)
    }
}

/// A size in a value's shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Known.
    Fixed(usize),
    /// Known by name; equal names are equal sizes.
    Symbol(String),
    /// Not known.
    Unknown,
}

impl From<usize> for Dim {
    fn from(size: usize) -> Self {
        Dim::Fixed(size)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Dim::Symbol(name.to_owned())
    }
}

/// Name, type and shape of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueInfo {
    /// The value's name.
    pub name: String,
    /// Element type, where stated.
    pub dtype: Option<DataType>,
    /// Shape, where stated.
    pub shape: Option<Vec<Dim>>,
}

/// A tensor whose bytes are made when they are wanted.
pub trait LazyTensor: Send + Sync {
    /// Writes all bytes (little-endian, row-major), exactly as many as the initializer's type and shape need.
    ///
    /// # Errors
    /// What reading the weights or writing to `sink` failed with.
    fn write_to(&self, sink: &mut dyn Write) -> io::Result<()>;
}

/// Bytes of a tensor, wherever they are. Cloning is cheap.
#[derive(Clone)]
pub enum TensorData {
    /// A part of a buffer in memory.
    Memory(Arc<Vec<u8>>, Range<usize>),
    /// A part of a file, read when wanted.
    File {
        /// The open file.
        file: Arc<File>,
        /// Its path, for messages.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// Made on demand.
    Lazy(Arc<dyn LazyTensor>),
}

impl std::fmt::Debug for TensorData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TensorData::Memory(_, range) => write!(f, "Memory({} bytes)", range.len()),
            TensorData::File { path, offset, length, .. } => {
                write!(f, "File({} @{offset}+{length})", path.display())
            }
            TensorData::Lazy(_) => write!(f, "Lazy"),
        }
    }
}

/// A named constant tensor: a weight, or a constant of the graph.
#[derive(Clone, Debug)]
pub struct Initializer {
    /// Name, unique among the values of its graph.
    pub name: String,
    /// Element type.
    pub dtype: DataType,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
    /// The elements: little-endian, row-major.
    pub data: TensorData,
    /// The weight of the network that this is, where it is one and the file says so.
    pub origin: Option<Origin>,
}

impl Initializer {
    /// A tensor of raw little-endian bytes.
    pub fn from_bytes(name: impl Into<String>, dtype: DataType, shape: &[usize], bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            data: TensorData::Memory(Arc::new(bytes), range),
            origin: None,
        }
    }

    /// An `f32` tensor.
    pub fn from_f32(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::from_bytes(name, DataType::F32, shape, bytes)
    }

    /// An `i64` tensor.
    pub fn from_i64(name: impl Into<String>, shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::from_bytes(name, DataType::I64, shape, bytes)
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&s| s as u64).product()
    }

    /// Number of bytes that type and shape ask for.
    pub fn byte_len(&self) -> u64 {
        self.dtype.bytes_for(self.elements()).unwrap_or(u64::MAX)
    }

    /// Writes the bytes to `sink`, a few megabytes in memory at a time where the source allows it.
    ///
    /// # Errors
    /// [`OnnxError::Tensor`] naming the tensor where its bytes cannot be had or their number is wrong;
    /// [`OnnxError::Io`] never, since the sink's path is not known here.
    pub fn write_to(&self, sink: &mut dyn Write) -> Result<(), OnnxError> {
        let fail = |what: String| OnnxError::Tensor { name: self.name.clone(), what };
        let mut counted = Counted { inner: sink, written: 0 };
        match &self.data {
            TensorData::Memory(buffer, range) => counted.write_all(&buffer[range.clone()]),
            TensorData::File { file, offset, length, .. } => copy_range(file, *offset, *length, &mut counted),
            TensorData::Lazy(lazy) => lazy.write_to(&mut counted),
        }
        .map_err(|e| fail(e.to_string()))?;
        if counted.written != self.byte_len() {
            return Err(fail(format!(
                "{} bytes, but {} {:?} needs {}",
                counted.written,
                self.dtype.name(),
                self.shape,
                self.byte_len()
            )));
        }
        Ok(())
    }

    /// All bytes: borrowed where they are in memory, else read.
    ///
    /// # Errors
    /// As [`Initializer::write_to`].
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>, OnnxError> {
        if let TensorData::Memory(buffer, range) = &self.data {
            return Ok(Cow::Borrowed(&buffer[range.clone()]));
        }
        let mut out = Vec::with_capacity(self.byte_len().min(1 << 32) as usize);
        self.write_to(&mut out)?;
        Ok(Cow::Owned(out))
    }

    /// The elements as `f32`; from `f32`, `f16`, `bf16`, `f64` and E4M3.
    ///
    /// # Errors
    /// [`OnnxError::Tensor`] for another element type, and as [`Initializer::write_to`].
    pub fn to_f32(&self) -> Result<Vec<f32>, OnnxError> {
        let bytes = self.bytes()?;
        let two =
            |f: fn(u16) -> f32| bytes.chunks_exact(2).map(|c| f(u16::from_le_bytes([c[0], c[1]]))).collect();
        Ok(match self.dtype {
            DataType::F32 => {
                bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
            }
            DataType::F16 => two(|b| half::f16::from_bits(b).to_f32()),
            DataType::BF16 => two(|b| half::bf16::from_bits(b).to_f32()),
            DataType::F8E4M3 => bytes.iter().map(|&code| crate::e4m3::to_f32(code)).collect(),
            DataType::F64 => bytes
                .chunks_exact(8)
                .map(|c| f64::from_le_bytes(c.try_into().expect("eight bytes")) as f32)
                .collect(),
            other => {
                return Err(OnnxError::Tensor {
                    name: self.name.clone(),
                    what: format!("holds {}, floats are wanted", other.name()),
                });
            }
        })
    }

    /// The elements as `i64`; from `i64` and `i32`.
    ///
    /// # Errors
    /// [`OnnxError::Tensor`] for another element type, and as [`Initializer::write_to`].
    pub fn to_i64(&self) -> Result<Vec<i64>, OnnxError> {
        let bytes = self.bytes()?;
        match self.dtype {
            DataType::I64 => Ok(bytes
                .chunks_exact(8)
                .map(|c| i64::from_le_bytes(c.try_into().expect("eight bytes")))
                .collect()),
            DataType::I32 => Ok(bytes
                .chunks_exact(4)
                .map(|c| i64::from(i32::from_le_bytes([c[0], c[1], c[2], c[3]])))
                .collect()),
            other => Err(OnnxError::Tensor {
                name: self.name.clone(),
                what: format!("holds {}, integers are wanted", other.name()),
            }),
        }
    }
}

struct Counted<'a> {
    inner: &'a mut dyn Write,
    written: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn copy_range(file: &File, mut offset: u64, mut length: u64, sink: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0u8; length.clamp(1, 4 << 20) as usize];
    while length > 0 {
        let n = length.min(buffer.len() as u64) as usize;
        read_exact_at(file, &mut buffer[..n], offset)?;
        sink.write_all(&buffer[..n])?;
        offset += n as u64;
        length -= n as u64;
    }
    Ok(())
}

/// Reads without moving a shared file's position.
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
    }
    #[cfg(not(unix))]
    {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

/// The value of an attribute.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum AttributeValue {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f32),
    /// Bytes, mostly text.
    String(Vec<u8>),
    /// A tensor.
    Tensor(Box<Initializer>),
    /// A subgraph.
    Graph(Box<Graph>),
    /// Integers.
    Ints(Vec<i64>),
    /// Floats.
    Floats(Vec<f32>),
    /// Byte strings.
    Strings(Vec<Vec<u8>>),
}

/// A named constant of a node.
#[derive(Clone, Debug)]
pub struct Attribute {
    /// Name.
    pub name: String,
    /// Value.
    pub value: AttributeValue,
}

impl Attribute {
    /// An integer attribute.
    pub fn int(name: &str, value: i64) -> Self {
        Self { name: name.into(), value: AttributeValue::Int(value) }
    }
    /// A float attribute.
    pub fn float(name: &str, value: f32) -> Self {
        Self { name: name.into(), value: AttributeValue::Float(value) }
    }
    /// An integer list attribute.
    pub fn ints(name: &str, value: &[i64]) -> Self {
        Self { name: name.into(), value: AttributeValue::Ints(value.to_vec()) }
    }
    /// A text attribute.
    pub fn text(name: &str, value: &str) -> Self {
        Self { name: name.into(), value: AttributeValue::String(value.as_bytes().to_vec()) }
    }
}

/// One operation. Empty names in `inputs` are left-out optional inputs.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Name, unique in its graph (may be empty).
    pub name: String,
    /// Operator.
    pub op_type: String,
    /// Operator set; empty is the standard one.
    pub domain: String,
    /// Names of the values read.
    pub inputs: Vec<String>,
    /// Names of the values made.
    pub outputs: Vec<String>,
    /// Constants.
    pub attributes: Vec<Attribute>,
}

impl Node {
    /// A node of the standard operator set.
    pub fn new(name: &str, op_type: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        let own = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
        Self {
            name: name.into(),
            op_type: op_type.into(),
            domain: String::new(),
            inputs: own(inputs),
            outputs: own(outputs),
            attributes: Vec::new(),
        }
    }

    /// With one more attribute.
    #[must_use]
    pub fn with(mut self, attribute: Attribute) -> Self {
        self.attributes.push(attribute);
        self
    }

    /// The attribute called `name`.
    pub fn attribute(&self, name: &str) -> Option<&AttributeValue> {
        self.attributes.iter().find(|a| a.name == name).map(|a| &a.value)
    }

    /// The integer attribute called `name`.
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.attribute(name)? {
            AttributeValue::Int(v) => Some(*v),
            _ => None,
        }
    }
}

/// Nodes in topological order, and the values they start from and end in.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Name.
    pub name: String,
    /// Operations, each after those whose results it reads.
    pub nodes: Vec<Node>,
    /// Constants.
    pub initializers: Vec<Initializer>,
    /// Values that the caller supplies.
    pub inputs: Vec<ValueInfo>,
    /// Values that the caller gets.
    pub outputs: Vec<ValueInfo>,
    /// Types and shapes of values in between, where stated.
    pub value_infos: Vec<ValueInfo>,
}

impl Graph {
    /// The constant called `name`.
    pub fn initializer(&self, name: &str) -> Option<&Initializer> {
        self.initializers.iter().find(|i| i.name == name)
    }

    /// Index of the node that makes the value `name`.
    pub fn producer(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|n| n.outputs.iter().any(|o| o == name))
    }

    /// Indices of the nodes that read the value `name`.
    pub fn consumers(&self, name: &str) -> Vec<usize> {
        let reads = |n: &Node| n.inputs.iter().any(|i| i == name);
        self.nodes.iter().enumerate().filter(|(_, n)| reads(n)).map(|(i, _)| i).collect()
    }

    /// Drops nodes that no output depends on, then constants that nothing reads.
    pub fn drop_dead_nodes(&mut self) {
        let mut wanted: std::collections::HashSet<String> =
            self.outputs.iter().map(|o| o.name.clone()).collect();
        let mut kept = Vec::with_capacity(self.nodes.len());
        for node in std::mem::take(&mut self.nodes).into_iter().rev() {
            if node.outputs.iter().any(|o| wanted.contains(o)) {
                wanted.extend(node.inputs.iter().cloned());
                kept.push(node);
            }
        }
        kept.reverse();
        self.nodes = kept;
        self.drop_unused_initializers();
    }

    /// Drops constants that no node reads and no output names.
    pub fn drop_unused_initializers(&mut self) {
        let used: std::collections::HashSet<String> = self
            .nodes
            .iter()
            .flat_map(|n| n.inputs.iter().cloned())
            .chain(self.outputs.iter().map(|o| o.name.clone()))
            .collect();
        let has_subgraph = self
            .nodes
            .iter()
            .any(|n| n.attributes.iter().any(|a| matches!(a.value, AttributeValue::Graph(_))));
        if !has_subgraph {
            self.initializers.retain(|i| used.contains(&i.name));
        }
    }
}

/// A whole ONNX file.
#[derive(Clone, Debug)]
pub struct Model {
    /// Version of the file format.
    pub ir_version: i64,
    /// Operator sets: domain (empty: the standard one) and version.
    pub opsets: Vec<(String, i64)>,
    /// Who wrote the file.
    pub producer: String,
    /// Version of the writer.
    pub producer_version: String,
    /// Free-form pairs.
    pub metadata: Vec<(String, String)>,
    /// The graph.
    pub graph: Graph,
}

impl Graph {
    /// Adds the names of the files that hold constants of this graph and its subgraphs.
    fn add_external_files(&self, names: &mut BTreeSet<String>) {
        let mut add = |constant: &Initializer| {
            if let TensorData::File { path, .. } = &constant.data
                && let Some(name) = path.file_name()
            {
                names.insert(name.to_string_lossy().into_owned());
            }
        };
        self.initializers.iter().for_each(&mut add);
        for attribute in self.nodes.iter().flat_map(|n| &n.attributes) {
            if let AttributeValue::Tensor(constant) = &attribute.value {
                add(constant);
            }
        }
        for attribute in self.nodes.iter().flat_map(|n| &n.attributes) {
            if let AttributeValue::Graph(inner) = &attribute.value {
                inner.add_external_files(names);
            }
        }
    }
}

impl Model {
    /// Names of the files beside the model's own that hold its constants; they lie in its folder.
    #[must_use]
    pub fn external_files(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        self.graph.add_external_files(&mut names);
        names
    }

    /// An empty model of the operator set that this crate writes.
    pub fn new(graph: Graph) -> Self {
        Self {
            ir_version: super::IR_VERSION,
            opsets: vec![(String::new(), super::OPSET)],
            producer: "mindseye".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            metadata: Vec::new(),
            graph,
        }
    }

    /// Version of the standard operator set, 0 where none is named.
    pub fn opset(&self) -> i64 {
        self.opsets.iter().find(|(d, _)| d.is_empty() || d == "ai.onnx").map_or(0, |(_, v)| *v)
    }

    /// Bytes of all constants of the main graph.
    pub fn weight_bytes(&self) -> u64 {
        self.graph.initializers.iter().map(Initializer::byte_len).fold(0, u64::saturating_add)
    }
}
