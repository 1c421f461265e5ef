//! The interpreter that writes a network down as a graph, operation by operation.

use std::collections::HashMap;
use std::sync::Arc;

use mindseye_engines::model::Ops;
use mindseye_engines::onnx::{
    Attribute, DataType, Dim, Graph, Initializer, Model, Node, OnnxError, Origin, ValueInfo, WeightError,
};

use super::Names;
use super::optimize::optimize;
use super::stored::stored_weight;
use super::weights::WeightSource;

/// A float tensor of the graph under construction.
#[derive(Clone, Debug)]
pub struct NodeValue(usize);

/// An integer tensor of the graph under construction.
#[derive(Clone, Debug)]
pub struct IndexValue(usize);

/// What is known of a shape while building; `None` differs between calls.
type Shape = Vec<Option<usize>>;

struct Value {
    name: String,
    shape: Shape,
    /// Made by a node, so that it can be given another name.
    by_node: bool,
    /// The weight that it is, or is a rearranged form of: layers are named after it.
    weight: Option<String>,
}

/// An implementation of [`Ops`] that writes an ONNX graph.
///
/// Every operation becomes the nodes that it means, in the forms that rten, onnxruntime and TensorRT all run and fuse;
/// weights are stored as the network has them, under its names. What can be computed once, fused or reordered is left
/// to the passes that [`GraphBuilder::finish`] runs over the finished graph (`optimize.rs`). Batch is whatever the
/// inputs say.
pub struct GraphBuilder {
    graph: Graph,
    weights: Arc<dyn WeightSource>,
    values: Vec<Value>,
    /// Weights in the order of first use.
    stored: Vec<Initializer>,
    literals: HashMap<(Vec<usize>, Vec<u32>), usize>,
    integers: HashMap<Vec<i64>, String>,
    names: Names,
    renamed: HashMap<String, String>,
    /// Where in the network the last weight belongs: nameless nodes are named after it.
    scope: String,
    error: Option<OnnxError>,
}

impl GraphBuilder {
    /// An empty graph that takes its weights from `weights`.
    pub fn new(name: &str, weights: Arc<dyn WeightSource>) -> Self {
        Self {
            graph: Graph { name: name.to_owned(), ..Graph::default() },
            weights,
            values: Vec::new(),
            stored: Vec::new(),
            literals: HashMap::new(),
            integers: HashMap::new(),
            names: Names::default(),
            renamed: HashMap::new(),
            scope: String::new(),
            error: None,
        }
    }

    /// Declares a float input.
    pub fn input(&mut self, name: &str, dims: &[Dim]) -> NodeValue {
        NodeValue(self.declare(name, DataType::F32, dims))
    }

    /// Declares an integer input (`i64` in the file).
    pub fn index_input(&mut self, name: &str, dims: &[Dim]) -> IndexValue {
        IndexValue(self.declare(name, DataType::I64, dims))
    }

    fn declare(&mut self, name: &str, dtype: DataType, dims: &[Dim]) -> usize {
        if !self.names.insert(name) {
            self.fail(OnnxError::Graph { what: format!("input {name:?} is declared twice") });
        }
        self.graph.inputs.push(ValueInfo {
            name: name.into(),
            dtype: Some(dtype),
            shape: Some(dims.to_vec()),
        });
        let shape = dims.iter().map(|d| if let Dim::Fixed(n) = d { Some(*n) } else { None }).collect();
        self.add_value(name.to_owned(), shape, false)
    }

    /// Integers that are part of the graph.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape.
    pub fn index_constant(&mut self, shape: &[usize], values: &[i64]) -> IndexValue {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of a constant must fill its shape");
        let name = self.names.unique("index");
        self.graph.initializers.push(Initializer::from_i64(name.clone(), shape, values));
        IndexValue(self.add_value(name, shape.iter().map(|&s| Some(s)).collect(), false))
    }

    /// Makes `x` the output called `name`.
    pub fn output(&mut self, name: &str, x: &NodeValue, dims: &[Dim]) {
        let Value { name: value, by_node, .. } = &self.values[x.0];
        let (value, by_node) = (value.clone(), *by_node);
        let already = self.renamed.get(&value).cloned();
        let is_output = self.graph.outputs.iter().any(|o| o.name == value);
        if already.as_deref() != Some(name) && self.names.contains(name) {
            self.fail(OnnxError::Graph { what: format!("output {name:?} has a name that is taken") });
        }
        let source = if by_node && !is_output && already.is_none_or(|n| n == name) {
            self.renamed.insert(value.clone(), name.to_owned());
            value
        } else {
            self.graph.nodes.push(Node::new(&format!("{name}/Identity"), "Identity", &[&value], &[name]));
            name.to_owned()
        };
        self.names.insert(name);
        self.graph.outputs.push(ValueInfo {
            name: source,
            dtype: Some(DataType::F32),
            shape: Some(dims.to_vec()),
        });
    }

    /// The finished model, optimised. Weights are read when it is saved.
    ///
    /// # Errors
    /// [`OnnxError::Weight`] for the first weight that is missing or has another shape; [`OnnxError::Graph`] where
    /// names clash.
    pub fn finish(self) -> Result<Model, OnnxError> {
        let weights = self.weights.clone();
        let mut graph = self.written()?;
        optimize(&mut graph, &weights);
        Ok(Model::new(graph))
    }

    /// The model as it was written down, without any pass over it: what passes are tested against.
    ///
    /// # Errors
    /// As [`GraphBuilder::finish`].
    pub fn finish_plain(self) -> Result<Model, OnnxError> {
        Ok(Model::new(self.written()?))
    }

    fn written(mut self) -> Result<Graph, OnnxError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.graph.initializers.append(&mut self.stored);
        let rename = |name: &mut String| {
            if let Some(new) = self.renamed.get(name) {
                name.clone_from(new);
            }
        };
        for node in &mut self.graph.nodes {
            node.inputs.iter_mut().for_each(rename);
            node.outputs.iter_mut().for_each(rename);
        }
        self.graph.outputs.iter_mut().for_each(|o| rename(&mut o.name));
        self.graph.drop_dead_nodes();
        Ok(self.graph)
    }

    fn fail(&mut self, error: OnnxError) {
        self.error.get_or_insert(error);
    }

    fn add_value(&mut self, name: String, shape: Shape, by_node: bool) -> usize {
        self.values.push(Value { name, shape, by_node, weight: None });
        self.values.len() - 1
    }

    fn name(&self, x: &NodeValue) -> String {
        self.values[x.0].name.clone()
    }

    fn literal(&mut self, shape: &[usize], data: &[f32]) -> NodeValue {
        let key = (shape.to_vec(), data.iter().map(|v| v.to_bits()).collect());
        if let Some(&id) = self.literals.get(&key) {
            return NodeValue(id);
        }
        let name = self.names.unique("const");
        self.graph.initializers.push(Initializer::from_f32(name.clone(), shape, data));
        let id = self.add_value(name, shape.iter().map(|&s| Some(s)).collect(), false);
        self.literals.insert(key, id);
        NodeValue(id)
    }

    fn integers(&mut self, values: &[i64]) -> String {
        if let Some(name) = self.integers.get(values) {
            return name.clone();
        }
        let name = self.names.unique("shape");
        self.graph.initializers.push(Initializer::from_i64(name.clone(), &[values.len()], values));
        self.integers.insert(values.to_vec(), name.clone());
        name
    }

    /// Adds a node named after what it makes.
    fn node(
        &mut self,
        base: Option<&str>,
        op: &str,
        inputs: &[&str],
        attributes: &[Attribute],
        shape: Shape,
    ) -> NodeValue {
        let name = match base {
            Some(base) => self.names.unique(&format!("{base}/{op}")),
            None => {
                let base = if self.scope.is_empty() { op.to_owned() } else { format!("{}/{op}", self.scope) };
                self.names.unique(&base)
            }
        };
        let mut node = Node::new(&name, op, inputs, &[&name]);
        node.attributes = attributes.to_vec();
        self.graph.nodes.push(node);
        NodeValue(self.add_value(name, shape, true))
    }

    /// A node that only moves the elements of `x`: what it makes of a weight still belongs to that weight's layer.
    fn moved(
        &mut self,
        x: &NodeValue,
        op: &str,
        inputs: &[&str],
        attributes: &[Attribute],
        shape: Shape,
    ) -> NodeValue {
        let out = self.node(None, op, inputs, attributes, shape);
        self.values[out.0].weight = self.values[x.0].weight.clone();
        out
    }

    fn binary(&mut self, base: Option<&str>, op: &str, a: &NodeValue, b: &NodeValue) -> NodeValue {
        let shape = broadcast(&self.values[a.0].shape, &self.values[b.0].shape);
        let (a, b) = (self.name(a), self.name(b));
        self.node(base, op, &[&a, &b], &[], shape)
    }

    fn unary(&mut self, op: &str, x: &NodeValue, attributes: &[Attribute]) -> NodeValue {
        let (name, shape) = (self.name(x), self.values[x.0].shape.clone());
        self.node(None, op, &[&name], attributes, shape)
    }

    fn reduce(&mut self, op: &str, x: &NodeValue, axis: usize) -> NodeValue {
        let mut shape = self.values[x.0].shape.clone();
        shape[axis] = Some(1);
        // Counted from the end where it is the last axis: the form that fusions look for.
        let from_end = axis + 1 == shape.len();
        let axes = self.integers(&[if from_end { -1 } else { axis as i64 }]);
        let x = self.name(x);
        self.node(None, op, &[&x, &axes], &[Attribute::int("keepdims", 1)], shape)
    }

    /// The layer that a weight belongs to: `blocks.0.attn1.to_q` of `blocks.0.attn1.to_q.weight`.
    fn layer(&self, weight: &NodeValue) -> Option<String> {
        self.values[weight.0].weight.as_ref().map(|w| w.trim_end_matches(".weight").to_owned())
    }
}

fn broadcast(a: &Shape, b: &Shape) -> Shape {
    let rank = a.len().max(b.len());
    let at = |s: &Shape, i: usize| {
        if i + s.len() >= rank { s[i + s.len() - rank] } else { Some(1) }
    };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (Some(1), other) | (other, Some(1)) => other,
            (Some(n), _) | (_, Some(n)) => Some(n),
            (None, None) => None,
        })
        .collect()
}

impl Ops for GraphBuilder {
    type Tensor = NodeValue;
    type Index = IndexValue;

    fn param(&mut self, name: &str, shape: &[usize]) -> NodeValue {
        // `blocks.3.attn1.to_q.weight` belongs to `blocks.3`, `proj_out.weight` to `proj_out`.
        let mut parts = name.split('.');
        self.scope = parts.next().unwrap_or_default().to_owned();
        if let Some(number) = parts.next().filter(|p| p.bytes().all(|b| b.is_ascii_digit())) {
            self.scope = format!("{}.{number}", self.scope);
        }
        match self.weights.meta(name) {
            None => self.fail(WeightError::Missing { name: name.into() }.into()),
            Some(meta) if meta.shape != shape => {
                let error = WeightError::Shape { name: name.into(), wanted: shape.to_vec(), got: meta.shape };
                self.fail(error.into());
            }
            Some(_) => {}
        }
        let sizes = shape.iter().map(|&s| Some(s)).collect();
        let known = self.values.iter().position(|v| !v.by_node && v.weight.as_deref() == Some(name));
        let id = known.unwrap_or_else(|| {
            let stored = self.names.unique(name);
            self.stored.push(stored_weight(&stored, Origin::whole(name, shape), &self.weights));
            self.add_value(stored, sizes, false)
        });
        self.values[id].weight = Some(name.to_owned());
        NodeValue(id)
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> NodeValue {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "values of a constant must fill its shape");
        self.literal(shape, &data)
    }

    fn add(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        self.binary(None, "Add", a, b)
    }

    fn sub(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        self.binary(None, "Sub", a, b)
    }

    fn mul(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        self.binary(None, "Mul", a, b)
    }

    fn scale(&mut self, x: &NodeValue, k: f32) -> NodeValue {
        let k = self.literal(&[], &[k]);
        let out = self.binary(None, "Mul", x, &k);
        self.values[out.0].weight = self.values[x.0].weight.clone();
        out
    }

    fn offset(&mut self, x: &NodeValue, k: f32) -> NodeValue {
        let k = self.literal(&[], &[k]);
        self.binary(None, "Add", x, &k)
    }

    fn linear(&mut self, x: &NodeValue, w: &NodeValue, b: Option<&NodeValue>) -> NodeValue {
        let wt = self.permute(w, &[1, 0]);
        let base = self.layer(w);
        let base = base.as_deref();
        let (inner, wanted) = (self.values[x.0].shape.last().copied().flatten(), self.values[wt.0].shape[0]);
        assert!(
            inner.is_none() || wanted.is_none() || inner == wanted,
            "linear {base:?}: {inner:?} into {wanted:?}"
        );
        let mut shape = self.values[x.0].shape.clone();
        *shape.last_mut().expect("the input of a linear layer has an axis") = self.values[wt.0].shape[1];
        let (x, wt) = (self.name(x), self.name(&wt));
        let out = self.node(base, "MatMul", &[&x, &wt], &[], shape);
        match b {
            Some(b) => self.binary(base, "Add", &out, b),
            None => out,
        }
    }

    fn matmul(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        let (sa, sb) = (&self.values[a.0].shape, &self.values[b.0].shape);
        let (ra, rb) = (sa.len(), sb.len());
        let mut shape = broadcast(&sa[..ra - 2].to_vec(), &sb[..rb - 2].to_vec());
        shape.extend([sa[ra - 2], sb[rb - 1]]);
        let (a, b) = (self.name(a), self.name(b));
        self.node(None, "MatMul", &[&a, &b], &[], shape)
    }

    fn reshape(&mut self, x: &NodeValue, dims: &[i64]) -> NodeValue {
        let old = self.values[x.0].shape.clone();
        let mut shape: Shape = dims
            .iter()
            .enumerate()
            .map(|(i, &d)| match d {
                0 => old[i],
                -1 => None,
                d => Some(d as usize),
            })
            .collect();
        let total = old.iter().copied().try_fold(1, |n, s| s.map(|s| n * s));
        if let (Some(total), Some(hole)) = (total, dims.iter().position(|&d| d == -1)) {
            let rest = shape
                .iter()
                .enumerate()
                .filter(|(i, _)| *i != hole)
                .try_fold(1, |n, (_, s)| s.map(|s| n * s));
            shape[hole] = rest.filter(|&r| r > 0).map(|r| total / r);
        }
        if let (Some(total), Some(new)) = (total, shape.iter().try_fold(1, |n, s| s.map(|s| n * s))) {
            assert_eq!(new, total, "reshape of {old:?} to {dims:?}");
        }
        let target = self.integers(dims);
        let name = self.name(x);
        self.moved(x, "Reshape", &[&name, &target], &[], shape)
    }

    fn permute(&mut self, x: &NodeValue, perm: &[usize]) -> NodeValue {
        let shape = perm.iter().map(|&p| self.values[x.0].shape[p]).collect();
        let perm: Vec<i64> = perm.iter().map(|&p| p as i64).collect();
        let name = self.name(x);
        self.moved(x, "Transpose", &[&name], &[Attribute::ints("perm", &perm)], shape)
    }

    fn concat(&mut self, xs: &[NodeValue], axis: usize) -> NodeValue {
        if let [one] = xs {
            return one.clone();
        }
        let mut shape = self.values[xs[0].0].shape.clone();
        shape[axis] = xs.iter().try_fold(0, |n, x| self.values[x.0].shape[axis].map(|s| n + s));
        let names: Vec<String> = xs.iter().map(|x| self.name(x)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.node(None, "Concat", &names, &[Attribute::int("axis", axis as i64)], shape)
    }

    fn slice(&mut self, x: &NodeValue, axis: usize, start: i64, end: Option<i64>) -> NodeValue {
        let mut shape = self.values[x.0].shape.clone();
        shape[axis] = shape[axis].map(|n| {
            let n = n as i64;
            let at = |p: i64| if p < 0 { p + n } else { p }.clamp(0, n);
            let (start, end) = (at(start), end.map_or(n, at));
            (end - start).max(0) as usize
        });
        let starts = self.integers(&[start]);
        let ends = self.integers(&[end.unwrap_or(i64::MAX)]);
        let axes = self.integers(&[axis as i64]);
        let name = self.name(x);
        self.moved(x, "Slice", &[&name, &starts, &ends, &axes], &[], shape)
    }

    fn gather(&mut self, table: &NodeValue, index: &IndexValue) -> NodeValue {
        let mut shape = self.values[index.0].shape.clone();
        shape.extend_from_slice(&self.values[table.0].shape[1..]);
        let (table, index) = (self.name(table), self.values[index.0].name.clone());
        self.node(None, "Gather", &[&table, &index], &[Attribute::int("axis", 0)], shape)
    }

    fn softmax(&mut self, x: &NodeValue) -> NodeValue {
        self.unary("Softmax", x, &[Attribute::int("axis", -1)])
    }

    fn layer_norm(&mut self, x: &NodeValue, eps: f32) -> NodeValue {
        let shape = self.values[x.0].shape.clone();
        let width = shape.last().copied().flatten().expect("the width of a norm is fixed");
        let ones = self.literal(&[width], &vec![1.0; width]);
        let (x, ones) = (self.name(x), self.name(&ones));
        let attributes = [Attribute::int("axis", -1), Attribute::float("epsilon", eps)];
        self.node(None, "LayerNormalization", &[&x, &ones], &attributes, shape)
    }

    fn rms_norm(&mut self, x: &NodeValue, weight: &NodeValue, eps: f32) -> NodeValue {
        // Spelled out: the operator exists from opset 23 only. All three runtimes fuse this form.
        let two = self.literal(&[], &[2.0]);
        let square = self.binary(None, "Pow", x, &two);
        let axis = self.values[x.0].shape.len() - 1;
        let mean = self.reduce("ReduceMean", &square, axis);
        let eps = self.literal(&[], &[eps]);
        let mean = self.binary(None, "Add", &mean, &eps);
        let root = self.unary("Sqrt", &mean, &[]);
        let inverse = self.unary("Reciprocal", &root, &[]);
        let scaled = self.binary(None, "Mul", x, &inverse);
        let base = self.layer(weight);
        self.binary(base.as_deref(), "Mul", &scaled, weight)
    }

    fn channel_norm(&mut self, x: &NodeValue, gamma: &NodeValue, channels: usize) -> NodeValue {
        let norm = self.reduce("ReduceL2", x, 1);
        let least = self.literal(&[], &[1e-12]);
        let norm = self.binary(None, "Max", &norm, &least);
        let unit = self.binary(None, "Div", x, &norm);
        let gamma = self.scale(gamma, (channels as f32).sqrt());
        let gamma = self.reshape(&gamma, &[1, channels as i64, 1, 1]);
        self.binary(None, "Mul", &unit, &gamma)
    }

    fn mean(&mut self, x: &NodeValue, axis: usize) -> NodeValue {
        self.reduce("ReduceMean", x, axis)
    }

    fn gelu_tanh(&mut self, x: &NodeValue) -> NodeValue {
        self.unary("Gelu", x, &[Attribute::text("approximate", "tanh")])
    }

    fn silu(&mut self, x: &NodeValue) -> NodeValue {
        let gate = self.unary("Sigmoid", x, &[]);
        self.binary(None, "Mul", x, &gate)
    }

    fn conv2d(
        &mut self,
        x: &NodeValue,
        w: &NodeValue,
        b: Option<&NodeValue>,
        stride: [usize; 2],
        pads: [usize; 4],
    ) -> NodeValue {
        let known = |s: Option<usize>| s.expect("the sizes of a convolution's weight are known");
        let ws: Vec<usize> = self.values[w.0].shape.iter().map(|&s| known(s)).collect();
        let xs = self.values[x.0].shape.clone();
        assert!(xs[1].is_none_or(|c| c == ws[1]), "conv2d: {:?} channels into weight {ws:?}", xs[1]);
        let out = |axis: usize| {
            xs[2 + axis].map(|s| (s + pads[axis] + pads[axis + 2] - ws[2 + axis]) / stride[axis] + 1)
        };
        let shape = vec![xs[0], Some(ws[0]), out(0), out(1)];
        let ints = |v: &[usize]| v.iter().map(|&n| n as i64).collect::<Vec<_>>();
        let attributes = [
            Attribute::ints("kernel_shape", &ints(&ws[2..])),
            Attribute::ints("strides", &ints(&stride)),
            Attribute::ints("pads", &ints(&pads)),
        ];
        let base = self.layer(w);
        let mut inputs = vec![self.name(x), self.name(w)];
        inputs.extend(b.map(|b| self.name(b)));
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        self.node(base.as_deref(), "Conv", &inputs, &attributes, shape)
    }

    fn upsample2(&mut self, x: &NodeValue) -> NodeValue {
        let s = &self.values[x.0].shape;
        let shape = vec![s[0], s[1], s[2].map(|n| 2 * n), s[3].map(|n| 2 * n)];
        let scales = self.literal(&[4], &[1.0, 1.0, 2.0, 2.0]);
        let (x, scales) = (self.name(x), self.name(&scales));
        let attributes = [
            Attribute::text("mode", "nearest"),
            Attribute::text("coordinate_transformation_mode", "asymmetric"),
            Attribute::text("nearest_mode", "floor"),
        ];
        self.node(None, "Resize", &[&x, "", &scales], &attributes, shape)
    }

    fn mark(&mut self, name: &str, x: &NodeValue) {
        let Value { name: value, by_node, .. } = &self.values[x.0];
        if *by_node && !self.renamed.contains_key(value) && self.names.insert(name) {
            self.renamed.insert(value.clone(), name.to_owned());
        }
    }
}
