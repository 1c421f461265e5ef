//! Weights that are stored smaller than the f32 that a graph computes in.
//!
//! | [`Storage`] | constant `w` becomes | which |
//! |---|---|---|
//! | `Halves` | `w.f16` and a `Cast` to f32 that makes `w` | values that are all halves: nothing is lost |
//! | `Codes` | `w.i8`, `w.scale` and a `DequantizeLinear` that makes `w` | matrices, to the nearest of 255 multiples of each channel's scale; all else as `Halves` |
//!
//! Every runtime of ONNX understands both and folds them when it loads. [`Model::load`](super::Model::load) gives the
//! constants back as f32, with the same values that a runtime computes, under their own names.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;

use super::{Attribute, DataType, Graph, Initializer, LazyTensor, Node, OnnxError, TensorData};

/// How [`Model::save`](super::Model::save) stores f32 weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Storage {
    /// As they are.
    #[default]
    Whole,
    /// Two bytes each, where nothing is lost by it.
    Halves,
    /// Matrices in one byte each and a scale per channel, which rounds them: by .7 % (root mean square) of weights that are normally
    /// distributed. All else as `Halves`.
    Codes,
}

const HALF: &str = ".f16";
const CODES: &str = ".i8";
const SCALE: &str = ".scale";
/// Smaller constants stay: sizes and other arguments must be there for those who read graphs.
const SMALL: u64 = 1024;
/// Smaller matrices are not rounded to codes (bytes of f32).
const SMALL_MATRIX: u64 = 16 << 10;
/// Elements that are widened at a time.
const CHUNK: usize = 1 << 16;
/// The largest code; the least is its negative.
const MOST: f32 = 127.0;

impl Graph {
    /// Stores f32 constants smaller.
    ///
    /// # Errors
    /// A constant whose bytes cannot be had.
    pub(super) fn store(&mut self, storage: Storage) -> Result<(), OnnxError> {
        let given: HashSet<String> = self.inputs.iter().map(|i| i.name.clone()).collect();
        let (mut nodes, mut scales) = (Vec::new(), Vec::new());
        for constant in &mut self.initializers {
            let large = constant.dtype == DataType::F32 && constant.byte_len() >= SMALL;
            if storage == Storage::Whole || !large || given.contains(&constant.name) {
                continue;
            }
            let (values, name) = (constant.to_f32()?, constant.name.clone());
            let matrix = constant.shape.len() == 2 && constant.byte_len() >= SMALL_MATRIX;
            let stored = if storage == Storage::Codes && matrix {
                let coded = Coded::nearest(&values, constant.shape[1]);
                let (codes, scale) = (name.clone() + CODES, name.clone() + SCALE);
                let axis = Attribute::int("axis", coded.axis as i64);
                nodes.push(Node::new(&codes, "DequantizeLinear", &[&codes, &scale], &[&name]).with(axis));
                scales.push(Initializer::from_f32(scale, &[coded.scale.len()], &coded.scale));
                Initializer::from_bytes(codes, DataType::I8, &constant.shape, coded.codes)
            } else if let Some(halves) = halves(&values) {
                let half = name.clone() + HALF;
                let to = Attribute::int("to", DataType::F32 as i64);
                nodes.push(Node::new(&half, "Cast", &[&half], &[&name]).with(to));
                Initializer::from_bytes(half, DataType::F16, &constant.shape, halves)
            } else {
                continue;
            };
            *constant = Initializer { origin: constant.origin.take(), ..stored };
        }
        self.initializers.append(&mut scales);
        self.nodes.splice(0..0, nodes);
        Ok(())
    }

    /// Undoes [`Graph::store`]: what was stored smaller becomes f32 constants that are computed when they are wanted.
    pub(super) fn widen(&mut self) {
        let mut readers: HashMap<&str, usize> = HashMap::new();
        for input in self.nodes.iter().flat_map(|n| &n.inputs) {
            *readers.entry(input).or_default() += 1;
        }
        let constants: HashMap<&str, &Initializer> = self
            .initializers
            .iter()
            .filter(|c| readers.get(c.name.as_str()) == Some(&1))
            .map(|c| (c.name.as_str(), c))
            .collect();
        let mut widened: HashMap<String, Initializer> = HashMap::new();
        let mut gone: HashSet<String> = HashSet::new();
        for node in self.nodes.iter().filter(|n| n.domain.is_empty() && n.outputs.len() == 1) {
            let (name, from) = (&node.outputs[0], node.inputs.first().map_or("", String::as_str));
            let Some(stored) = constants.get(from).filter(|_| from.strip_prefix(name.as_str()).is_some())
            else {
                continue;
            };
            let lazy: Arc<dyn LazyTensor> =
                match (node.op_type.as_str(), &from[name.len()..], &node.inputs[..]) {
                    ("Cast", HALF, [_])
                        if stored.dtype == DataType::F16 && node.int("to") == Some(DataType::F32 as i64) =>
                    {
                        Arc::new(Widened((*stored).clone()))
                    }
                    ("DequantizeLinear", CODES, [_, scale]) if *scale == format!("{name}{SCALE}") => {
                        let axis = node.int("axis").and_then(|axis| usize::try_from(axis).ok());
                        let (Some(scale), Some(axis)) = (constants.get(scale.as_str()), axis) else {
                            continue;
                        };
                        let fits = stored.dtype == DataType::I8
                            && stored.shape.len() == 2
                            && stored.shape.get(axis) == scale.shape.first()
                            && (scale.dtype, scale.shape.len()) == (DataType::F32, 1);
                        if !fits {
                            continue;
                        }
                        gone.insert(scale.name.clone());
                        Arc::new(Decoded { codes: (*stored).clone(), scale: (*scale).clone(), axis })
                    }
                    _ => continue,
                };
            let constant = Initializer {
                name: name.clone(),
                dtype: DataType::F32,
                shape: stored.shape.clone(),
                origin: stored.origin.clone(),
                data: TensorData::Lazy(lazy),
            };
            widened.insert(from.to_owned(), constant);
        }
        if widened.is_empty() {
            return;
        }
        let made: HashSet<String> = widened.values().map(|c| c.name.clone()).collect();
        self.nodes.retain(|n| !n.outputs.iter().any(|o| made.contains(o)));
        self.initializers.retain(|c| !gone.contains(&c.name));
        for constant in &mut self.initializers {
            if let Some(wide) = widened.remove(&constant.name) {
                *constant = wide;
            }
        }
    }
}

/// The values as halves, `None` where one is not exactly a half.
fn halves(values: &[f32]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(2 * values.len());
    for value in values {
        let half = half::f16::from_f32(*value);
        if half.to_f32().to_bits() != value.to_bits() {
            return None;
        }
        bytes.extend(half.to_bits().to_le_bytes());
    }
    Some(bytes)
}

/// A matrix as codes of one byte.
struct Coded {
    codes: Vec<u8>,
    /// Of each channel.
    scale: Vec<f32>,
    /// The axis of channels.
    axis: usize,
}

impl Coded {
    /// The codes that are nearest to the values, with channels along the axis that is better for it.
    fn nearest(values: &[f32], columns: usize) -> Self {
        let [(off_rows, rows), (off_columns, along_columns)] =
            [0, 1].map(|axis| Self::along(values, columns, axis));
        if off_rows < off_columns { rows } else { along_columns }
    }

    /// What the values are off in all (squared), and the codes.
    fn along(values: &[f32], columns: usize, axis: usize) -> (f64, Self) {
        let channel = |at: usize| if axis == 0 { at / columns } else { at % columns };
        let mut scale = vec![0f32; if axis == 0 { values.len() / columns } else { columns }];
        for (at, value) in values.iter().enumerate() {
            let most = &mut scale[channel(at)];
            *most = most.max(value.abs() / MOST);
        }
        scale.iter_mut().filter(|s| **s == 0.0).for_each(|s| *s = 1.0);
        let (mut off, mut codes) = (0.0, Vec::with_capacity(values.len()));
        for (at, value) in values.iter().enumerate() {
            let scale = scale[channel(at)];
            let code = (value / scale).round().clamp(-MOST, MOST);
            off += f64::from(value - code * scale).powi(2);
            codes.push((code as i8).cast_unsigned());
        }
        (off, Self { codes, scale, axis })
    }
}

/// A constant of halves, as f32.
struct Widened(Initializer);

impl LazyTensor for Widened {
    fn write_to(&self, sink: &mut dyn Write) -> io::Result<()> {
        let bytes = self.0.bytes().map_err(io::Error::other)?;
        let mut wide = Vec::with_capacity(4 * CHUNK);
        for chunk in bytes.chunks(2 * CHUNK) {
            wide.clear();
            let values =
                chunk.chunks_exact(2).map(|c| half::f16::from_bits(u16::from_le_bytes([c[0], c[1]])));
            wide.extend(values.flat_map(|v| v.to_f32().to_le_bytes()));
            sink.write_all(&wide)?;
        }
        Ok(())
    }
}

/// A matrix of codes, as f32.
struct Decoded {
    codes: Initializer,
    scale: Initializer,
    axis: usize,
}

impl LazyTensor for Decoded {
    fn write_to(&self, sink: &mut dyn Write) -> io::Result<()> {
        let codes = self.codes.bytes().map_err(io::Error::other)?;
        let scale = self.scale.to_f32().map_err(io::Error::other)?;
        let columns = self.codes.shape.get(1).copied().unwrap_or(1).max(1);
        let mut wide = Vec::with_capacity(4 * columns);
        for (row, codes) in codes.chunks(columns).enumerate() {
            wide.clear();
            let values = codes.iter().enumerate().map(|(column, code)| {
                f32::from(code.cast_signed()) * scale[if self.axis == 0 { row } else { column }]
            });
            wide.extend(values.flat_map(f32::to_le_bytes));
            sink.write_all(&wide)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Model, SaveOptions, ValueInfo};
    use super::*;

    const ROWS: usize = 80;
    const COLUMNS: usize = 60;

    fn info(name: &str, columns: usize) -> ValueInfo {
        let shape = Some(vec![1.into(), columns.into()]);
        ValueInfo { name: name.into(), dtype: Some(DataType::F32), shape }
    }

    /// `y = (x matrix + halves) few + thirds`; the columns of the matrix differ in size.
    fn model() -> Model {
        let halves: Vec<f32> = (0..300).map(|i| (i as f32 - 150.0) / 64.0).collect();
        let thirds: Vec<f32> = (0..300).map(|i| i as f32 / 3.0).collect();
        let matrix = (0..ROWS * COLUMNS).map(|i| ((i * 7919) as f32).sin() * 10f32.powi(i as i32 % 3 - 1));
        let pads = Initializer::from_i64("pads", &[4], &[0, 0, 0, (300 - COLUMNS) as i64]);
        let nodes = vec![
            Node::new("m", "MatMul", &["x", "matrix"], &["m"]),
            Node::new("p", "Pad", &["m", "pads"], &["p"]),
            Node::new("a", "Add", &["p", "halves"], &["a"]),
            Node::new("f", "Mul", &["a", "few"], &["f"]),
            Node::new("b", "Add", &["f", "thirds"], &["y"]),
        ];
        let initializers = vec![
            Initializer::from_f32("matrix", &[ROWS, COLUMNS], &matrix.collect::<Vec<_>>()),
            pads,
            Initializer::from_f32("halves", &[300], &halves),
            Initializer::from_f32("thirds", &[300], &thirds),
            Initializer::from_f32("few", &[1], &[0.5]),
        ];
        let (inputs, outputs) = (vec![info("x", ROWS)], vec![info("y", 300)]);
        Model::new(Graph {
            name: "g".to_owned(),
            nodes,
            initializers,
            inputs,
            outputs,
            value_infos: Vec::new(),
        })
    }

    fn saved(dir: &std::path::Path, storage: Storage) -> (std::path::PathBuf, u64) {
        let path = dir.join(format!("{storage:?}.onnx"));
        let options = SaveOptions { storage, ..SaveOptions::default() };
        let bytes = model().save(&path, &options).expect("it is written").bytes;
        (path, bytes)
    }

    #[test]
    fn what_is_exactly_a_half_is_stored_so_and_comes_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let (_, whole) = saved(dir.path(), Storage::Whole);
        let (path, halved) = saved(dir.path(), Storage::Halves);
        // 300 values of two bytes less, and the words for it.
        assert!((500..600).contains(&(whole - halved)), "{whole} {halved}");
        let (back, whole) = (Model::load(path).expect("it is read"), model());
        // What was read is what was written, to the last bit and in the same order.
        assert_eq!(back.to_bytes().expect("bytes"), whole.to_bytes().expect("bytes"));
    }

    #[test]
    fn matrices_are_rounded_by_half_a_step_of_their_channel() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, coded) = saved(dir.path(), Storage::Codes);
        let (_, whole) = saved(dir.path(), Storage::Whole);
        assert!(whole - coded > 3 * (ROWS * COLUMNS) as u64, "{whole} {coded}");
        let (back, whole) = (Model::load(path).expect("it is read"), model());
        assert_eq!(
            back.graph.nodes.len(),
            whole.graph.nodes.len(),
            "nothing is left of how they were stored"
        );
        assert_eq!(back.graph.initializers.len(), whole.graph.initializers.len());
        for constant in &whole.graph.initializers {
            let read = back.graph.initializer(&constant.name).expect("it is there");
            assert_eq!((read.dtype, &read.shape), (constant.dtype, &constant.shape));
            if constant.name != "matrix" {
                assert_eq!(read.bytes().expect("bytes"), constant.bytes().expect("bytes"), "{}", read.name);
                continue;
            }
            let (read, wanted) = (read.to_f32().expect("floats"), constant.to_f32().expect("floats"));
            for column in 0..COLUMNS {
                let of = |m: &[f32]| m.iter().skip(column).step_by(COLUMNS).copied().collect::<Vec<f32>>();
                let (read, wanted) = (of(&read), of(&wanted));
                let most = wanted.iter().fold(0f32, |a, v| a.max(v.abs()));
                let worst = read.iter().zip(&wanted).fold(0f32, |a, (r, w)| a.max((r - w).abs()));
                assert!(worst > 0.0 && worst <= 0.501 * most / MOST, "column {column}: {worst} of {most}");
            }
        }
    }

    #[test]
    fn the_embedded_backend_computes_what_the_reader_gives() {
        use crate::backend::{PrepareOptions, Tensor, by_name};
        let dir = tempfile::tempdir().expect("a directory");
        let x = Tensor::f32(&[1, ROWS], (0..ROWS).map(|i| (i as f32).sin()).collect());
        let computed = |path: &std::path::Path| {
            let engine =
                by_name("rten").expect("rten").prepare(path, &PrepareOptions::default()).expect("ready");
            let out = engine.session().expect("a session").run(&[("x", &x)]).expect("it runs");
            out[0].1.as_f32().expect("floats").to_vec()
        };
        let exact = computed(&saved(dir.path(), Storage::Whole).0);
        assert_eq!(computed(&saved(dir.path(), Storage::Halves).0), exact);
        let (path, _) = saved(dir.path(), Storage::Codes);
        // Read and written whole again, it is the same network.
        let plain = dir.path().join("plain.onnx");
        Model::load(&path).expect("it is read").save(&plain, &SaveOptions::default()).expect("written");
        let coded = computed(&path);
        assert_eq!(coded, computed(&plain));
        let off = coded.iter().zip(&exact).fold(0f32, |a, (c, e)| a.max((c - e).abs()));
        // Half a step of the largest columns is .04; eighty of them, of either sign, times .5.
        assert!(off > 0.0 && off < 0.3 && exact[299] > 99.0, "{off} {}", exact[299]);
    }

    #[test]
    fn graphs_of_others_are_left_alone() {
        let mut graph = model().graph;
        graph.store(Storage::Codes).expect("it is stored");
        let cast = |from: &str, to: &str| Node::new(to, "Cast", &[from], &[to]).with(Attribute::int("to", 1));
        graph.nodes.push(cast("halves.f16", "z"));
        graph.nodes.push(cast("matrix.scale", "s"));
        let before = graph.nodes.len();
        graph.widen();
        assert_eq!(graph.nodes.len(), before, "what someone else reads stays as it is");
    }
}
