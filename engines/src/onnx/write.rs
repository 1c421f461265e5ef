//! Writing ONNX files: same model, same bytes; weights are streamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::ir::{AttributeValue, Dim, Graph, Initializer, Model, ValueInfo};
use super::proto::{
    EXTERNAL, attribute, attribute_type, entry, graph, model, node, opset, shape, tensor as tensor_proto,
    tensor_type, value_info, value_type,
};
use super::{OnnxError, Storage};
use crate::protobuf::Writer;

/// Start of each tensor in a file of external data, so that it can be mapped.
const ALIGNMENT: u64 = 4096;
/// Smaller tensors stay in the graph: shape arguments must be there for onnxruntime and TensorRT.
const SMALL: u64 = 1024;
/// From this size on [`ExternalData::Auto`] puts weights beside the graph (protobuf ends at 2 GiB).
const AUTO: u64 = 1_500_000_000;

/// Where large constants go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ExternalData {
    /// Into the file where all together are below 1.5 GB, else beside it.
    #[default]
    Auto,
    /// Beside it, in `<file>.data`.
    Always,
    /// Into the file; an error from 2 GiB on.
    Never,
}

/// How [`Model::save`] writes.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Where large constants go.
    pub external: ExternalData,
    /// How f32 weights are stored; [`Model::load`] gives them back as f32.
    pub storage: Storage,
}

/// What [`Model::save`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedFiles {
    /// The graph.
    pub model: PathBuf,
    /// The weights beside it.
    pub data: Option<PathBuf>,
    /// Bytes of both.
    pub bytes: u64,
}

/// Where one tensor of the main graph goes.
enum Place<'a> {
    Inside,
    Outside { location: &'a str, offset: u64 },
}

impl Model {
    /// Writes the model to `path`, and large constants to `<path>.data` where `options` say so. Files are written
    /// under temporary names and renamed; no more than one tensor is in memory at a time.
    ///
    /// # Errors
    /// [`OnnxError::Io`] with the file, [`OnnxError::Tensor`] with the constant whose data cannot be had,
    /// [`OnnxError::Limit`] where the file would reach 2 GiB.
    pub fn save(&self, path: impl AsRef<Path>, options: &SaveOptions) -> Result<SavedFiles, OnnxError> {
        let path = path.as_ref();
        if options.storage != Storage::Whole {
            let mut smaller = self.clone();
            smaller.graph.store(options.storage)?;
            return smaller.save(path, &SaveOptions { storage: Storage::Whole, ..options.clone() });
        }
        check_attributes(&self.graph)?;
        let outside = match options.external {
            ExternalData::Auto => self.weight_bytes() >= AUTO,
            ExternalData::Always => true,
            ExternalData::Never => false,
        };
        let named = |suffix: &str| {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(suffix);
            path.with_file_name(name)
        };
        let data_path = named(".data");
        let location = data_path.file_name().unwrap_or_default().to_string_lossy().into_owned();

        let mut offset = 0u64;
        let mut places = Vec::with_capacity(self.graph.initializers.len());
        for tensor in &self.graph.initializers {
            if outside && tensor.byte_len() >= SMALL {
                places.push(Place::Outside { location: &location, offset });
                offset = (offset + tensor.byte_len()).next_multiple_of(ALIGNMENT);
            } else {
                places.push(Place::Inside);
            }
        }

        let mut saved = SavedFiles { model: path.to_owned(), data: None, bytes: 0 };
        let model_tmp = Temporary(named(".tmp"));
        saved.bytes += write_file(&model_tmp.0, |sink| self.write_graph_file(sink, &places))?;
        if offset > 0 {
            let data_tmp = Temporary(named(".data.tmp"));
            saved.bytes += write_file(&data_tmp.0, |sink| {
                for (tensor, place) in self.graph.initializers.iter().zip(&places) {
                    if let Place::Outside { offset, .. } = place {
                        let gap = offset - sink.written;
                        sink.write_all(&vec![0; gap as usize]).map_err(|e| sink.error(e))?;
                        tensor.write_to(sink)?;
                    }
                }
                Ok(())
            })?;
            rename(&data_tmp.0, &data_path)?;
            saved.data = Some(data_path);
        }
        rename(&model_tmp.0, path)?;
        Ok(saved)
    }

    /// The file as bytes, all constants inside.
    ///
    /// # Errors
    /// As [`Model::save`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, OnnxError> {
        check_attributes(&self.graph)?;
        let mut bytes = Vec::new();
        let places: Vec<Place<'_>> = self.graph.initializers.iter().map(|_| Place::Inside).collect();
        let mut sink = Sink { inner: &mut bytes, written: 0, path: Path::new("") };
        self.write_graph_file(&mut sink, &places)?;
        Ok(bytes)
    }

    fn write_graph_file(&self, sink: &mut Sink<'_>, places: &[Place<'_>]) -> Result<(), OnnxError> {
        // Heads first, so that the length of the graph is known before any weight is read.
        let mut before = Writer::default();
        for node in &self.graph.nodes {
            before.message(graph::NODE, |w| write_node(w, node));
        }
        before.text(graph::NAME, &self.graph.name);
        let heads: Vec<Writer> = self
            .graph
            .initializers
            .iter()
            .zip(places)
            .map(|(tensor, place)| tensor_field(tensor, place))
            .collect();
        let mut after = Writer::default();
        write_infos(&mut after, &self.graph);
        let inside: u64 = self
            .graph
            .initializers
            .iter()
            .zip(places)
            .filter(|(_, p)| matches!(p, Place::Inside))
            .map(|(t, _)| t.byte_len())
            .fold(0, u64::saturating_add);
        let heads_length: usize = heads.iter().map(|h| h.bytes.len()).sum();
        let graph_length =
            inside.saturating_add((before.bytes.len() + heads_length + after.bytes.len()) as u64);

        let mut top = Writer::default();
        top.int(model::IR_VERSION, self.ir_version);
        top.text(model::PRODUCER_NAME, &self.producer);
        top.text(model::PRODUCER_VERSION, &self.producer_version);
        let mut tail = Writer::default();
        for (domain, version) in &self.opsets {
            tail.message(model::OPSET_IMPORT, |w| {
                w.text(opset::DOMAIN, domain);
                w.int(opset::VERSION, *version);
            });
        }
        for (key, value) in &self.metadata {
            write_pair(&mut tail, model::METADATA_PROPS, key, value);
        }
        top.prefix(model::GRAPH, graph_length);
        if graph_length + (top.bytes.len() + tail.bytes.len()) as u64 >= 1 << 31 {
            return Err(OnnxError::Limit {
                what: "bytes (put the weights beside the graph)",
                limit: 1 << 31,
            });
        }
        sink.put(&top.bytes)?;
        sink.put(&before.bytes)?;
        for ((tensor, place), head) in self.graph.initializers.iter().zip(places).zip(&heads) {
            sink.put(&head.bytes)?;
            if matches!(place, Place::Inside) {
                tensor.write_to(sink)?;
            }
        }
        sink.put(&after.bytes)?;
        sink.put(&tail.bytes)
    }
}

/// Reads the tensors inside attributes and subgraphs once, so that what cannot be had is an error.
fn check_attributes(graph: &Graph) -> Result<(), OnnxError> {
    for attribute in graph.nodes.iter().flat_map(|n| &n.attributes) {
        match &attribute.value {
            AttributeValue::Tensor(tensor) => drop(tensor.bytes()?),
            AttributeValue::Graph(inner) => {
                inner.initializers.iter().try_for_each(|t| t.bytes().map(drop))?;
                check_attributes(inner)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the file unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

struct Sink<'a> {
    inner: &'a mut dyn Write,
    written: u64,
    path: &'a Path,
}

impl Sink<'_> {
    fn error(&self, source: io::Error) -> OnnxError {
        OnnxError::Io { path: self.path.to_owned(), source }
    }
    fn put(&mut self, bytes: &[u8]) -> Result<(), OnnxError> {
        self.write_all(bytes).map_err(|e| self.error(e))
    }
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn write_file(
    path: &Path,
    build: impl FnOnce(&mut Sink<'_>) -> Result<(), OnnxError>,
) -> Result<u64, OnnxError> {
    let io = |source| OnnxError::Io { path: path.to_owned(), source };
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    let mut sink = Sink { inner: &mut file, written: 0, path };
    build(&mut sink)?;
    let written = sink.written;
    let file = file.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync_all().map_err(io)?;
    Ok(written)
}

fn rename(from: &Path, to: &Path) -> Result<(), OnnxError> {
    fs::rename(from, to).map_err(|source| OnnxError::Io { path: to.to_owned(), source })
}

/// The initializer's field in the graph, up to and without the raw bytes of one that stays inside.
fn tensor_field(tensor: &Initializer, place: &Place<'_>) -> Writer {
    let mut body = Writer::default();
    write_tensor_head(&mut body, tensor);
    let mut raw = 0;
    match place {
        Place::Inside => {
            raw = tensor.byte_len();
            body.prefix(tensor_proto::RAW_DATA, raw);
        }
        Place::Outside { location, offset } => {
            let length = tensor.byte_len().to_string();
            for (key, value) in
                [("location", *location), ("offset", &offset.to_string()), ("length", &length)]
            {
                write_pair(&mut body, tensor_proto::EXTERNAL_DATA, key, value);
            }
            body.int(tensor_proto::DATA_LOCATION, EXTERNAL);
        }
    }
    let mut field = Writer::default();
    field.prefix(graph::INITIALIZER, body.bytes.len() as u64 + raw);
    field.bytes.append(&mut body.bytes);
    field
}

fn write_tensor_head(w: &mut Writer, tensor: &Initializer) {
    // onnx.proto is proto2: one key per number.
    tensor.shape.iter().for_each(|&size| w.int(tensor_proto::DIMS, size as i64));
    w.int(tensor_proto::DATA_TYPE, tensor.dtype as i64);
    w.text(tensor_proto::NAME, &tensor.name);
    for (key, value) in tensor.origin.iter().flat_map(|o| o.metadata()) {
        write_pair(w, tensor_proto::METADATA_PROPS, key, &value);
    }
}

fn write_pair(w: &mut Writer, field: u32, key: &str, value: &str) {
    w.message(field, |w| {
        w.text(entry::KEY, key);
        w.text(entry::VALUE, value);
    });
}

fn write_node(w: &mut Writer, n: &super::Node) {
    for input in &n.inputs {
        w.data(node::INPUT, input.as_bytes()); // empty ones hold a place
    }
    for output in &n.outputs {
        w.data(node::OUTPUT, output.as_bytes());
    }
    w.text(node::NAME, &n.name);
    w.text(node::OP_TYPE, &n.op_type);
    for attribute in &n.attributes {
        w.message(node::ATTRIBUTE, |w| write_attribute(w, attribute));
    }
    w.text(node::DOMAIN, &n.domain);
}

fn write_attribute(w: &mut Writer, a: &super::Attribute) {
    w.text(attribute::NAME, &a.name);
    let kind = match &a.value {
        AttributeValue::Float(v) => {
            w.float(attribute::FLOAT, *v);
            attribute_type::FLOAT
        }
        AttributeValue::Int(v) => {
            w.int(attribute::INT, *v);
            attribute_type::INT
        }
        AttributeValue::String(v) => {
            w.data(attribute::STRING, v);
            attribute_type::STRING
        }
        AttributeValue::Tensor(t) => {
            w.message(attribute::TENSOR, |w| write_tensor(w, t));
            attribute_type::TENSOR
        }
        AttributeValue::Graph(g) => {
            w.message(attribute::GRAPH, |w| write_subgraph(w, g));
            attribute_type::GRAPH
        }
        AttributeValue::Floats(values) => {
            values.iter().for_each(|&v| w.float(attribute::FLOATS, v));
            attribute_type::FLOATS
        }
        AttributeValue::Ints(values) => {
            values.iter().for_each(|&v| w.int(attribute::INTS, v));
            attribute_type::INTS
        }
        AttributeValue::Strings(values) => {
            values.iter().for_each(|v| w.data(attribute::STRINGS, v));
            attribute_type::STRINGS
        }
    };
    w.int(attribute::TYPE, kind);
}

/// A tensor inside an attribute or subgraph; that its bytes can be had was checked before ([`check_attributes`]).
fn write_tensor(w: &mut Writer, tensor: &Initializer) {
    write_tensor_head(w, tensor);
    w.data(tensor_proto::RAW_DATA, &tensor.bytes().unwrap_or_default());
}

fn write_subgraph(w: &mut Writer, inner: &Graph) {
    for node in &inner.nodes {
        w.message(graph::NODE, |w| write_node(w, node));
    }
    w.text(graph::NAME, &inner.name);
    for tensor in &inner.initializers {
        w.message(graph::INITIALIZER, |w| write_tensor(w, tensor));
    }
    write_infos(w, inner);
}

fn write_infos(w: &mut Writer, g: &Graph) {
    for (field, infos) in
        [(graph::INPUT, &g.inputs), (graph::OUTPUT, &g.outputs), (graph::VALUE_INFO, &g.value_infos)]
    {
        for info in infos {
            w.message(field, |w| write_info(w, info));
        }
    }
}

fn write_info(w: &mut Writer, info: &ValueInfo) {
    w.text(value_info::NAME, &info.name);
    if info.dtype.is_none() && info.shape.is_none() {
        return;
    }
    w.message(value_info::TYPE, |w| {
        w.message(value_type::TENSOR, |w| {
            if let Some(dtype) = info.dtype {
                w.int(tensor_type::ELEM_TYPE, dtype as i64);
            }
            if let Some(sizes) = &info.shape {
                w.message(tensor_type::SHAPE, |w| {
                    for dim in sizes {
                        w.message(shape::DIM, |w| match dim {
                            Dim::Fixed(size) => w.int(shape::DIM_VALUE, *size as i64),
                            Dim::Symbol(name) => w.text(shape::DIM_PARAM, name),
                            Dim::Unknown => {}
                        });
                    }
                });
            }
        });
    });
}
