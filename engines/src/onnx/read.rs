//! Reading ONNX files that may be damaged or hostile.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::OnnxError;
use super::ir::{
    Attribute, AttributeValue, DataType, Dim, Graph, Initializer, Model, Node, TensorData, ValueInfo,
};
use super::origin;
use super::proto::{
    EXTERNAL, attribute, attribute_type, entry, graph as graph_field, model as model_field,
    node as node_field, opset, shape, tensor as tensor_field, tensor_type, value_info, value_type,
};
use crate::protobuf::{Reader, Value};

/// Protobuf itself allows no more in one message.
const MAX_FILE: u64 = 1 << 31;
/// Nodes, tensors, attributes, names and sizes together.
const MAX_OBJECTS: u64 = 4_000_000;
/// Graphs inside graphs.
const MAX_DEPTH: usize = 8;
/// Numbers of a tensor that are written one by one; each takes more memory than it takes in the file.
const MAX_NUMBERS: usize = 64 << 20;
/// Axes of a tensor.
const MAX_RANK: usize = 64;

/// The folder of a model that was named without one is the working directory.
fn folder_or_here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

impl Model {
    /// Reads a file; weights beside it are opened, not read.
    ///
    /// # Errors
    /// [`OnnxError`] naming the file or, in the file, byte, message and field, or the tensor. Weights outside the
    /// model's own folder are refused.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, OnnxError> {
        let path = path.as_ref();
        let io = |source| OnnxError::Io { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length > MAX_FILE {
            return Err(OnnxError::Limit { what: "bytes outside of external data", limit: MAX_FILE });
        }
        let mut bytes = Vec::with_capacity(length as usize);
        file.by_ref().take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(io)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        Self::parse(bytes, Some(folder))
    }

    /// Reads a model from memory. External data are looked for in `folder`; without one they are refused.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn parse(bytes: Vec<u8>, folder: Option<&Path>) -> Result<Self, OnnxError> {
        let bytes = Arc::new(bytes);
        let mut parser = Parser {
            bytes: bytes.clone(),
            folder: folder.map(Path::to_owned),
            files: Vec::new(),
            objects: 0,
        };
        let mut model = parser.model(Reader::new(&bytes, "ModelProto"))?;
        check_names(&model.graph)?;
        model.graph.widen();
        Ok(model)
    }
}

/// Every value is made once and before it is used.
fn check_names(graph: &Graph) -> Result<(), OnnxError> {
    let fail = |what: String| Err(OnnxError::Graph { what });
    let mut known: HashSet<&str> = HashSet::new();
    for info in &graph.inputs {
        if !known.insert(&info.name) {
            return fail(format!("input {:?} is named twice", info.name));
        }
    }
    let mut constants: HashSet<&str> = HashSet::new();
    for tensor in &graph.initializers {
        if !constants.insert(&tensor.name) {
            return fail(format!("initializer {:?} is named twice", tensor.name));
        }
        known.insert(&tensor.name); // older files list constants among the inputs as well
    }
    let place = |n: &Node| format!("node {:?} ({})", n.name, n.op_type);
    for node in &graph.nodes {
        for input in node.inputs.iter().filter(|i| !i.is_empty()) {
            if !known.contains(input.as_str()) {
                return fail(format!("{} reads {input:?}, which nothing before it makes", place(node)));
            }
        }
        for output in node.outputs.iter().filter(|o| !o.is_empty()) {
            if !known.insert(output) {
                return fail(format!("{} makes {output:?}, which exists already", place(node)));
            }
        }
    }
    for output in &graph.outputs {
        if !known.contains(output.name.as_str()) {
            return fail(format!("output {:?} is made by nothing", output.name));
        }
    }
    Ok(())
}

struct Parser {
    bytes: Arc<Vec<u8>>,
    folder: Option<PathBuf>,
    files: Vec<(String, PathBuf, Arc<File>, u64)>,
    objects: u64,
}

impl Parser {
    fn count(&mut self, n: u64) -> Result<(), OnnxError> {
        self.objects += n;
        if self.objects > MAX_OBJECTS {
            return Err(OnnxError::Limit {
                what: "nodes, tensors, attributes and names",
                limit: MAX_OBJECTS,
            });
        }
        Ok(())
    }

    fn model(&mut self, mut r: Reader<'_>) -> Result<Model, OnnxError> {
        let mut model = Model {
            ir_version: 0,
            opsets: Vec::new(),
            producer: String::new(),
            producer_version: String::new(),
            metadata: Vec::new(),
            graph: Graph::default(),
        };
        let mut has_graph = false;
        while let Some((field, value)) = r.next()? {
            match field {
                model_field::IR_VERSION => model.ir_version = r.int(field, value)?,
                model_field::PRODUCER_NAME => model.producer = r.text(field, value)?,
                model_field::PRODUCER_VERSION => model.producer_version = r.text(field, value)?,
                model_field::GRAPH if has_graph => return Err(r.error(field, "a second graph").into()),
                model_field::GRAPH => {
                    model.graph = self.graph(r.message(field, value, "GraphProto")?, 0)?;
                    has_graph = true;
                }
                model_field::OPSET_IMPORT => {
                    self.count(1)?;
                    let mut inner = r.message(field, value, "OperatorSetIdProto")?;
                    let mut set = (String::new(), 0);
                    while let Some((f, v)) = inner.next()? {
                        match f {
                            opset::DOMAIN => set.0 = inner.text(f, v)?,
                            opset::VERSION => set.1 = inner.int(f, v)?,
                            _ => {}
                        }
                    }
                    model.opsets.push(set);
                }
                model_field::METADATA_PROPS => {
                    self.count(1)?;
                    model.metadata.push(pair(&r, field, value)?);
                }
                model_field::TRAINING_INFO => return Err(unsupported("training information", "")),
                model_field::FUNCTIONS => return Err(unsupported("a model-local function", "")),
                _ => {}
            }
        }
        if !has_graph {
            return Err(r.error(model_field::GRAPH, "the model has no graph").into());
        }
        Ok(model)
    }

    fn graph(&mut self, mut r: Reader<'_>, depth: usize) -> Result<Graph, OnnxError> {
        if depth >= MAX_DEPTH {
            return Err(OnnxError::Limit { what: "graphs inside each other", limit: MAX_DEPTH as u64 });
        }
        let mut graph = Graph::default();
        while let Some((field, value)) = r.next()? {
            match field {
                graph_field::NODE => {
                    graph.nodes.push(self.node(r.message(field, value, "NodeProto")?, depth)?)
                }
                graph_field::NAME => graph.name = r.text(field, value)?,
                graph_field::INITIALIZER => {
                    graph.initializers.push(self.tensor(r.message(field, value, "TensorProto")?)?)
                }
                graph_field::INPUT => {
                    graph.inputs.push(self.info(r.message(field, value, "ValueInfoProto")?)?)
                }
                graph_field::OUTPUT => {
                    graph.outputs.push(self.info(r.message(field, value, "ValueInfoProto")?)?)
                }
                graph_field::VALUE_INFO => {
                    graph.value_infos.push(self.info(r.message(field, value, "ValueInfoProto")?)?)
                }
                graph_field::SPARSE_INITIALIZER => {
                    return Err(unsupported("a sparse initializer", &graph.name));
                }
                _ => {}
            }
        }
        Ok(graph)
    }

    fn node(&mut self, mut r: Reader<'_>, depth: usize) -> Result<Node, OnnxError> {
        self.count(1)?;
        let mut node = Node::default();
        while let Some((field, value)) = r.next()? {
            match field {
                node_field::INPUT => {
                    self.count(1)?;
                    node.inputs.push(r.text(field, value)?);
                }
                node_field::OUTPUT => {
                    self.count(1)?;
                    node.outputs.push(r.text(field, value)?);
                }
                node_field::NAME => node.name = r.text(field, value)?,
                node_field::OP_TYPE => node.op_type = r.text(field, value)?,
                node_field::ATTRIBUTE => {
                    node.attributes.push(self.attribute(r.message(field, value, "AttributeProto")?, depth)?)
                }
                node_field::DOMAIN => node.domain = r.text(field, value)?,
                node_field::OVERLOAD if !r.text(field, value)?.is_empty() => {
                    return Err(unsupported("an overloaded operator", &node.op_type));
                }
                _ => {}
            }
        }
        if node.op_type.is_empty() {
            return Err(r.error(node_field::OP_TYPE, format!("node {:?} has no operator", node.name)).into());
        }
        Ok(node)
    }

    fn attribute(&mut self, mut r: Reader<'_>, depth: usize) -> Result<Attribute, OnnxError> {
        self.count(1)?;
        let (mut name, mut kind) = (String::new(), 0);
        let (mut int, mut float, mut text) = (0, 0.0, Vec::new());
        let (mut tensor, mut graph) = (None, None);
        let (mut ints, mut floats, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        while let Some((field, value)) = r.next()? {
            match field {
                attribute::NAME => name = r.text(field, value)?,
                attribute::FLOAT => float = r.float(field, value)?,
                attribute::INT => int = r.int(field, value)?,
                attribute::STRING => text = r.bytes(field, value)?.to_vec(),
                attribute::TENSOR => tensor = Some(self.tensor(r.message(field, value, "TensorProto")?)?),
                attribute::GRAPH => {
                    graph = Some(self.graph(r.message(field, value, "GraphProto")?, depth + 1)?)
                }
                attribute::FLOATS => r.fixed(field, value, 4, 4 * MAX_OBJECTS as usize, &mut floats)?,
                attribute::INTS => {
                    let before = ints.len();
                    r.ints(field, value, MAX_OBJECTS as usize, &mut ints)?;
                    self.count((ints.len() - before) as u64)?;
                }
                attribute::STRINGS => {
                    self.count(1)?;
                    texts.push(r.bytes(field, value)?.to_vec());
                }
                attribute::TYPE => kind = r.int(field, value)?,
                attribute::REF_ATTR_NAME if !r.bytes(field, value)?.is_empty() => {
                    return Err(unsupported("a reference to a function's attribute", &name));
                }
                _ => {}
            }
        }
        let missing = |what: &str| r.error(attribute::TYPE, format!("attribute {name:?} lacks its {what}"));
        let value = match kind {
            attribute_type::FLOAT => AttributeValue::Float(float),
            attribute_type::INT => AttributeValue::Int(int),
            attribute_type::STRING => AttributeValue::String(text),
            attribute_type::TENSOR => {
                AttributeValue::Tensor(Box::new(tensor.ok_or_else(|| missing("tensor"))?))
            }
            attribute_type::GRAPH => AttributeValue::Graph(Box::new(graph.ok_or_else(|| missing("graph"))?)),
            attribute_type::FLOATS => AttributeValue::Floats(
                floats.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
            ),
            attribute_type::INTS => AttributeValue::Ints(ints),
            attribute_type::STRINGS => AttributeValue::Strings(texts),
            other => return Err(unsupported(&format!("attribute type {other}"), &name)),
        };
        Ok(Attribute { name, value })
    }

    fn tensor(&mut self, mut r: Reader<'_>) -> Result<Initializer, OnnxError> {
        self.count(1)?;
        let (mut name, mut code, mut dims) = (String::new(), 0, Vec::new());
        let mut raw = None;
        let (mut fixed, mut fixed_width) = (Vec::new(), 0usize);
        let (mut small, mut wide) = (Vec::new(), Vec::new());
        let (mut location, mut external, mut metadata) = (0, Vec::new(), Vec::new());
        let data_limit = self.bytes.len();
        let number_limit = data_limit.min(MAX_NUMBERS);
        while let Some((field, value)) = r.next()? {
            match field {
                tensor_field::DIMS => r.ints(field, value, MAX_RANK, &mut dims)?,
                tensor_field::DATA_TYPE => code = r.int(field, value)?,
                tensor_field::SEGMENT => return Err(unsupported("a segmented tensor", &name)),
                tensor_field::FLOAT_DATA | tensor_field::DOUBLE_DATA => {
                    let width = if field == tensor_field::FLOAT_DATA { 4 } else { 8 };
                    if fixed_width != 0 && fixed_width != width {
                        return Err(r.error(field, "float and double data in one tensor").into());
                    }
                    fixed_width = width;
                    r.fixed(field, value, width, data_limit, &mut fixed)?;
                }
                tensor_field::INT32_DATA => r.ints(field, value, number_limit, &mut small)?,
                tensor_field::STRING_DATA => return Err(unsupported("a tensor of strings", &name)),
                tensor_field::INT64_DATA | tensor_field::UINT64_DATA => {
                    r.ints(field, value, number_limit, &mut wide)?
                }
                tensor_field::NAME => name = r.text(field, value)?,
                tensor_field::RAW_DATA => raw = Some(r.range(field, value)?),
                tensor_field::EXTERNAL_DATA => {
                    self.count(1)?;
                    external.push(pair(&r, field, value)?);
                }
                tensor_field::DATA_LOCATION => location = r.int(field, value)?,
                tensor_field::METADATA_PROPS => {
                    self.count(1)?;
                    metadata.push(pair(&r, field, value)?);
                }
                _ => {}
            }
        }
        let fail = |what: String| OnnxError::Tensor { name: name.clone(), what };
        let dtype =
            DataType::from_code(code).ok_or_else(|| fail(format!("element type {code} is not known")))?;
        let mut shape = Vec::with_capacity(dims.len());
        let mut elements = 1u64;
        for &dim in &dims {
            let size = usize::try_from(dim).map_err(|_| fail(format!("negative size in {dims:?}")))?;
            elements = elements
                .checked_mul(size as u64)
                .filter(|&e| e < 1 << 48)
                .ok_or_else(|| fail(format!("shape {dims:?} is too large")))?;
            shape.push(size);
        }
        let wanted = dtype.bytes_for(elements).ok_or_else(|| fail(format!("shape {dims:?} is too large")))?;
        let data = if location == EXTERNAL {
            self.external(&name, &external, wanted)?
        } else if let Some((start, end)) = raw {
            TensorData::Memory(self.bytes.clone(), start..end)
        } else {
            let bytes = typed_bytes(dtype, fixed, &small, &wide).map_err(|e| fail(e.to_string()))?;
            let range = 0..bytes.len();
            TensorData::Memory(Arc::new(bytes), range)
        };
        if let TensorData::Memory(_, range) = &data
            && range.len() as u64 != wanted
        {
            return Err(fail(format!(
                "{} bytes, but {} {shape:?} needs {wanted}",
                range.len(),
                dtype.name()
            )));
        }
        let origin = origin::read(&name, dtype, &metadata, &shape)?;
        Ok(Initializer { name, dtype, shape, data, origin })
    }

    fn external(
        &mut self,
        name: &str,
        entries: &[(String, String)],
        wanted: u64,
    ) -> Result<TensorData, OnnxError> {
        let fail = |what: String| OnnxError::Tensor { name: name.to_owned(), what };
        let number = |key: &str| -> Result<Option<u64>, OnnxError> {
            match entries.iter().find(|(k, _)| k == key) {
                None => Ok(None),
                Some((_, v)) => match v.parse() {
                    Ok(n) => Ok(Some(n)),
                    Err(_) => Err(fail(format!("external {key} {v:?} is not a number"))),
                },
            }
        };
        let Some((_, location)) = entries.iter().find(|(k, _)| k == "location") else {
            return Err(fail("external data without a location".into()));
        };
        let offset = number("offset")?.unwrap_or(0);
        let Some(folder) = &self.folder else {
            return Err(fail(format!("data lie in {location:?}, but the model was not read from a file")));
        };
        let mut parts = Path::new(location).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(fail(format!("external file {location:?} is not in the model's own folder")));
        }
        let known = self.files.iter().position(|(l, ..)| l == location);
        let index = match known {
            Some(index) => index,
            None => {
                if self.files.len() >= 256 {
                    return Err(OnnxError::Limit { what: "external files", limit: 256 });
                }
                let path = folder.join(location);
                let io = |source| OnnxError::Io { path: path.clone(), source };
                // A link may lead to another file of the folder, and not out of it.
                let (real, home) =
                    (path.canonicalize().map_err(io)?, folder_or_here(folder).canonicalize().map_err(io)?);
                if !real.starts_with(&home) {
                    return Err(fail(format!(
                        "external file {location:?} is a link to {}, outside of the model's own folder",
                        real.display()
                    )));
                }
                let file = File::open(&real).map_err(io)?;
                let metadata = file.metadata().map_err(io)?;
                if !metadata.is_file() {
                    return Err(fail(format!("external file {location:?} is not a plain file")));
                }
                self.files.push((location.clone(), path, Arc::new(file), metadata.len()));
                self.files.len() - 1
            }
        };
        let (_, path, file, size) = &self.files[index];
        let length = number("length")?.unwrap_or(wanted);
        if length != wanted {
            return Err(fail(format!("external length {length}, but type and shape need {wanted}")));
        }
        if offset.checked_add(length).is_none_or(|end| end > *size) {
            return Err(fail(format!("bytes {offset}+{length} of {location:?}, which has only {size}")));
        }
        Ok(TensorData::File { file: file.clone(), path: path.clone(), offset, length })
    }

    fn info(&mut self, mut r: Reader<'_>) -> Result<ValueInfo, OnnxError> {
        self.count(1)?;
        let mut info = ValueInfo { name: String::new(), dtype: None, shape: None };
        while let Some((field, value)) = r.next()? {
            match field {
                value_info::NAME => info.name = r.text(field, value)?,
                value_info::TYPE => {
                    let mut kind = r.message(field, value, "TypeProto")?;
                    while let Some((f, v)) = kind.next()? {
                        match f {
                            value_type::TENSOR => {
                                self.tensor_type(kind.message(f, v, "TypeProto.Tensor")?, &mut info)?
                            }
                            value_type::SEQUENCE
                            | value_type::MAP
                            | value_type::SPARSE_TENSOR
                            | value_type::OPTIONAL => {
                                return Err(unsupported("a value that is not a tensor", &info.name));
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(info)
    }

    fn tensor_type(&mut self, mut r: Reader<'_>, info: &mut ValueInfo) -> Result<(), OnnxError> {
        while let Some((field, value)) = r.next()? {
            match field {
                tensor_type::ELEM_TYPE => {
                    let code = r.int(field, value)?;
                    let Some(dtype) = DataType::from_code(code) else {
                        return Err(unsupported(&format!("element type {code}"), &info.name));
                    };
                    info.dtype = Some(dtype);
                }
                tensor_type::SHAPE => {
                    let mut sizes = Vec::new();
                    let mut dims = r.message(field, value, "TensorShapeProto")?;
                    while let Some((f, v)) = dims.next()? {
                        if f != shape::DIM {
                            continue;
                        }
                        self.count(1)?;
                        if sizes.len() >= MAX_RANK {
                            return Err(OnnxError::Limit { what: "axes of a value", limit: MAX_RANK as u64 });
                        }
                        let mut dim = Dim::Unknown;
                        let mut inner = dims.message(f, v, "TensorShapeProto.Dimension")?;
                        while let Some((f, v)) = inner.next()? {
                            match f {
                                shape::DIM_VALUE => {
                                    let size = inner.int(f, v)?;
                                    dim = match usize::try_from(size) {
                                        Ok(size) => Dim::Fixed(size),
                                        Err(_) if size == -1 => Dim::Unknown,
                                        Err(_) => return Err(inner.error(f, format!("size {size}")).into()),
                                    };
                                }
                                shape::DIM_PARAM => {
                                    let name = inner.text(f, v)?;
                                    dim = if name.is_empty() { Dim::Unknown } else { Dim::Symbol(name) };
                                }
                                _ => {}
                            }
                        }
                        sizes.push(dim);
                    }
                    info.shape = Some(sizes);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A number of a tensor that its element type cannot hold.
#[derive(Debug, thiserror::Error)]
#[error("{value} does not fit {dtype}")]
struct OutOfRange {
    value: i64,
    dtype: &'static str,
}

/// Little-endian bytes from the fields that hold numbers one by one (onnx.proto, `TensorProto`).
fn typed_bytes(dtype: DataType, fixed: Vec<u8>, small: &[i64], wide: &[i64]) -> Result<Vec<u8>, OutOfRange> {
    use DataType::*;
    let range = |lo: i64, hi: i64| match small.iter().find(|v| !(lo..=hi).contains(v)) {
        Some(&value) => Err(OutOfRange { value, dtype: dtype.name() }),
        None => Ok(()),
    };
    match dtype {
        F32 | F64 => return Ok(fixed),
        I32 => range(i64::from(i32::MIN), i64::from(i32::MAX))?,
        I16 => range(-32768, 32767)?,
        U16 | F16 | BF16 => range(0, 65535)?,
        I8 => range(-128, 127)?,
        U8 | F8E4M3 | F8E5M2 | U4 | I4 => range(-128, 255)?,
        Bool => range(0, 1)?,
        I64 | U32 | U64 => {}
    }
    Ok(match dtype {
        I32 => small.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
        I16 | U16 | F16 | BF16 => small.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
        I64 | U64 => wide.iter().flat_map(|v| v.to_le_bytes()).collect(),
        U32 => wide.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        _ => small.iter().map(|&v| v as u8).collect(),
    })
}

fn pair(r: &Reader<'_>, field: u32, value: Value) -> Result<(String, String), OnnxError> {
    let mut inner = r.message(field, value, "StringStringEntryProto")?;
    let mut pair = (String::new(), String::new());
    while let Some((f, v)) = inner.next()? {
        match f {
            entry::KEY => pair.0 = inner.text(f, v)?,
            entry::VALUE => pair.1 = inner.text(f, v)?,
            _ => {}
        }
    }
    Ok(pair)
}

fn unsupported(what: &str, place: &str) -> OnnxError {
    OnnxError::Unsupported { what: what.to_owned(), place: place.to_owned() }
}
