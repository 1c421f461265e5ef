//! Weights in half precision in the file, of a graph that computes in f32.
//!
//! A constant `w` is stored as `w.f16` and a `Cast` to f32 that makes `w`, which every runtime of ONNX understands. Only
//! constants whose values are all halves are stored so: nothing is lost, and [`Model::load`](super::Model::load) gives the
//! graph as it was before.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;

use super::{Attribute, DataType, Graph, Initializer, LazyTensor, Node, OnnxError, TensorData};

/// What is added to the name of the constant.
const SUFFIX: &str = ".f16";
/// Smaller constants stay: sizes and other arguments must be there for those who read graphs.
const SMALL: u64 = 1024;
/// Elements that are widened at a time.
const CHUNK: usize = 1 << 16;

impl Graph {
    /// Stores the f32 constants that are halves exactly as halves.
    ///
    /// # Errors
    /// A constant whose bytes cannot be had.
    pub(super) fn store_halves(&mut self) -> Result<(), OnnxError> {
        let given: HashSet<String> = self.inputs.iter().map(|i| i.name.clone()).collect();
        let mut casts = Vec::new();
        for constant in &mut self.initializers {
            let large = constant.dtype == DataType::F32 && constant.byte_len() >= SMALL;
            if !large || given.contains(&constant.name) {
                continue;
            }
            let Some(bytes) = halves(&constant.to_f32()?) else { continue };
            let stored = format!("{}{SUFFIX}", constant.name);
            let to = Attribute::int("to", DataType::F32 as i64);
            casts.push(Node::new(&stored, "Cast", &[&stored], &[&constant.name]).with(to));
            let origin = constant.origin.take();
            *constant = Initializer {
                origin,
                ..Initializer::from_bytes(stored, DataType::F16, &constant.shape, bytes)
            };
        }
        self.nodes.splice(0..0, casts);
        Ok(())
    }

    /// Undoes [`Graph::store_halves`]: halves become f32 constants that are widened when they are wanted.
    pub(super) fn widen_halves(&mut self) {
        let mut readers: HashMap<&str, usize> = HashMap::new();
        for input in self.nodes.iter().flat_map(|n| &n.inputs) {
            *readers.entry(input).or_default() += 1;
        }
        let stored: HashSet<&str> = self
            .initializers
            .iter()
            .filter(|c| c.dtype == DataType::F16 && readers.get(c.name.as_str()) == Some(&1))
            .map(|c| c.name.as_str())
            .collect();
        let widens = |n: &Node| match (&n.inputs[..], &n.outputs[..]) {
            ([from], [to]) => {
                n.op_type == "Cast"
                    && n.domain.is_empty()
                    && n.int("to") == Some(DataType::F32 as i64)
                    && stored.contains(from.as_str())
                    && from.strip_suffix(SUFFIX) == Some(to)
            }
            _ => false,
        };
        let widened: HashSet<String> =
            self.nodes.iter().filter(|n| widens(n)).map(|n| n.inputs[0].clone()).collect();
        if widened.is_empty() {
            return;
        }
        self.nodes.retain(|n| !(n.op_type == "Cast" && n.inputs.iter().any(|i| widened.contains(i))));
        for constant in self.initializers.iter_mut().filter(|c| widened.contains(&c.name)) {
            let name = constant.name.strip_suffix(SUFFIX).unwrap_or(&constant.name).to_owned();
            let stored = constant.clone();
            *constant = Initializer {
                name,
                dtype: DataType::F32,
                shape: stored.shape.clone(),
                origin: stored.origin.clone(),
                data: TensorData::Lazy(Arc::new(Widened(stored))),
            };
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

#[cfg(test)]
mod tests {
    use super::super::{Model, SaveOptions, ValueInfo};
    use super::*;

    fn info(name: &str) -> ValueInfo {
        ValueInfo { name: name.into(), dtype: Some(DataType::F32), shape: Some(vec![300.into()]) }
    }

    /// `y = (x + halves + thirds) * few`.
    fn model() -> Model {
        let halves: Vec<f32> = (0..300).map(|i| (i as f32 - 150.0) / 64.0).collect();
        let thirds: Vec<f32> = (0..300).map(|i| i as f32 / 3.0).collect();
        let nodes = vec![
            Node::new("a", "Add", &["x", "halves"], &["a"]),
            Node::new("b", "Add", &["a", "thirds"], &["b"]),
            Node::new("c", "Mul", &["b", "few"], &["y"]),
        ];
        let initializers = vec![
            Initializer::from_f32("halves", &[300], &halves),
            Initializer::from_f32("thirds", &[300], &thirds),
            Initializer::from_f32("few", &[1], &[0.5]),
        ];
        let name = "g".to_owned();
        let (inputs, outputs) = (vec![info("x")], vec![info("y")]);
        Model::new(Graph { name, nodes, initializers, inputs, outputs, value_infos: Vec::new() })
    }

    #[test]
    fn what_is_exactly_a_half_is_stored_so_and_comes_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let (plain, small) = (dir.path().join("plain.onnx"), dir.path().join("small.onnx"));
        let whole = model();
        let written = whole.save(&plain, &SaveOptions::default()).expect("it is written").bytes;
        let halved =
            whole.save(&small, &SaveOptions { halves: true, ..SaveOptions::default() }).expect("too");
        assert!((550..600).contains(&(written - halved.bytes)), "{written} {}", halved.bytes);

        let back = Model::load(&small).expect("it is read");
        assert_eq!(back.graph.nodes.len(), 3, "no cast is left");
        for (a, b) in whole.graph.initializers.iter().zip(&back.graph.initializers) {
            assert_eq!((&a.name, a.dtype, &a.shape), (&b.name, b.dtype, &b.shape));
            assert_eq!(a.bytes().expect("bytes"), b.bytes().expect("bytes"));
        }
        // What was read is what was written.
        assert_eq!(back.to_bytes().expect("bytes"), whole.to_bytes().expect("bytes"));
    }

    #[test]
    fn the_embedded_backend_computes_the_same_from_halves() {
        use crate::backend::{PrepareOptions, Tensor, by_name};
        let dir = tempfile::tempdir().expect("a directory");
        let x = Tensor::f32(&[300], (0..300).map(|i| (i as f32).sin()).collect());
        let results: Vec<Vec<f32>> = [false, true]
            .into_iter()
            .map(|halves| {
                let path = dir.path().join(format!("{halves}.onnx"));
                model().save(&path, &SaveOptions { halves, ..SaveOptions::default() }).expect("written");
                let engine =
                    by_name("rten").expect("rten").prepare(&path, &PrepareOptions::default()).expect("ready");
                let out = engine.session().expect("a session").run(&[("x", &x)], &["y"]).expect("it runs");
                out[0].as_f32().expect("floats").to_vec()
            })
            .collect();
        assert_eq!(results[0], results[1]);
        assert!(results[0][299] > 40.0);
    }

    #[test]
    fn casts_of_others_are_left_alone() {
        let mut graph = model().graph;
        graph.store_halves().expect("it is stored");
        graph.nodes.push(Node::new("d", "Cast", &["halves.f16"], &["z"]).with(Attribute::int("to", 1)));
        let before = graph.nodes.len();
        graph.widen_halves();
        assert_eq!(graph.nodes.len(), before, "halves that someone else reads stay halves");
    }
}
