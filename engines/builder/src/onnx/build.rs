//! The interpreter that writes a network down as a graph.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;

use super::weights::WeightSource;
use mindseye_engines::model::Ops;
use mindseye_engines::onnx::{
    Attribute, DataType, Dim, Graph, Initializer, LazyTensor, Model, Node, OnnxError, TensorData, ValueInfo,
    WeightError,
};

/// A float tensor of the graph under construction.
#[derive(Clone, Debug)]
pub struct NodeValue(usize);

/// An integer tensor of the graph under construction.
#[derive(Clone, Debug)]
pub struct IndexValue(usize);

/// What is known of a shape while building; `None` differs between calls.
type Shape = Vec<Option<usize>>;

/// A weight after steps that are done once, while it is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Constant {
    weight: String,
    stored: Vec<usize>,
    shape: Vec<usize>,
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Reshape(Vec<usize>),
    Permute(Vec<usize>),
    Slice {
        axis: usize,
        start: usize,
        end: usize,
    },
    /// Times the `f32` of these bits.
    Scale(u32),
}

enum Origin {
    Input,
    Node(usize),
    Weight(Constant),
    Literal,
}

struct Value {
    name: String,
    origin: Origin,
    shape: Shape,
    /// How often nodes and outputs read it.
    uses: usize,
    /// Constants whose last axis runs along this value's channels; see [`GraphBuilder::rotate`].
    channels: Option<Channels>,
}

/// The constants whose last axis can be reordered to reorder a value's channels, and the values in between with the
/// number of their readers.
#[derive(Clone)]
struct Channels {
    constants: Vec<usize>,
    values: Vec<(usize, usize)>,
}

struct Stored {
    name: String,
    constant: Constant,
    uses: usize,
    /// Element `j` of the last axis is element `order[j]` of the constant.
    order: Option<Vec<usize>>,
}

/// An implementation of [`Ops`] that writes an ONNX graph.
///
/// Weights are named as in the network; a matrix that is stored transposed has `.T` appended. Linear layers are
/// `MatMul` and `Add`; norms, gelu and attention are written in the forms that rten, onnxruntime and TensorRT all
/// run and fuse. Batch is whatever the inputs say.
///
/// Rotation pairs adjacent channels. Strided access is slow everywhere, so the rows of the query and key weights
/// (and of their biases and norms) are reordered once, here, so that a pair is `(j, j + half)`. Scores are sums
/// over channels and do not change; rotated keys that leave the graph (a cache) are in this order, which a graph
/// that reads them shares.
pub struct GraphBuilder {
    graph: Graph,
    weights: Arc<dyn WeightSource>,
    values: Vec<Value>,
    stored: Vec<Stored>,
    by_constant: HashMap<Constant, usize>,
    literals: HashMap<(Vec<usize>, Vec<u32>), usize>,
    integers: HashMap<Vec<i64>, String>,
    names: HashSet<String>,
    counters: HashMap<String, usize>,
    tables: HashMap<(usize, usize), (usize, usize)>,
    reordered: Vec<Channels>,
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
            by_constant: HashMap::new(),
            literals: HashMap::new(),
            integers: HashMap::new(),
            names: HashSet::new(),
            counters: HashMap::new(),
            tables: HashMap::new(),
            reordered: Vec::new(),
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
        if !self.names.insert(name.to_owned()) {
            self.fail(OnnxError::Graph { what: format!("input {name:?} is declared twice") });
        }
        self.graph.inputs.push(ValueInfo {
            name: name.into(),
            dtype: Some(dtype),
            shape: Some(dims.to_vec()),
        });
        let shape = dims.iter().map(|d| if let Dim::Fixed(n) = d { Some(*n) } else { None }).collect();
        self.add_value(name.to_owned(), Origin::Input, shape)
    }

    /// Integers that are part of the graph.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape.
    pub fn index_constant(&mut self, shape: &[usize], values: &[i64]) -> IndexValue {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of a constant must fill its shape");
        let name = self.unique("index");
        self.graph.initializers.push(Initializer::from_i64(name.clone(), shape, values));
        IndexValue(self.add_value(name, Origin::Literal, shape.iter().map(|&s| Some(s)).collect()))
    }

    /// Makes `x` the output called `name`.
    pub fn output(&mut self, name: &str, x: &NodeValue, dims: &[Dim]) {
        let value = self.use_value(x.0);
        let already = self.renamed.get(&value).cloned();
        let is_output = self.graph.outputs.iter().any(|o| o.name == value);
        let is_node = matches!(self.values[x.0].origin, Origin::Node(_));
        if already.as_deref() != Some(name) && self.names.contains(name) {
            self.fail(OnnxError::Graph { what: format!("output {name:?} has a name that is taken") });
        }
        let source = if is_node && !is_output && already.is_none_or(|n| n == name) {
            self.renamed.insert(value.clone(), name.to_owned());
            value
        } else {
            self.graph.nodes.push(Node::new(&format!("{name}/Identity"), "Identity", &[&value], &[name]));
            name.to_owned()
        };
        self.names.insert(name.to_owned());
        self.graph.outputs.push(ValueInfo {
            name: source,
            dtype: Some(DataType::F32),
            shape: Some(dims.to_vec()),
        });
    }

    /// The finished model. Weights are read when it is saved.
    ///
    /// # Errors
    /// [`OnnxError::Weight`] for the first weight that is missing or has another shape; [`OnnxError::Graph`] where
    /// names clash.
    pub fn finish(mut self) -> Result<Model, OnnxError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        for channels in &self.reordered {
            for &(value, uses) in &channels.values {
                if self.values[value].uses != uses {
                    let what = format!("{:?} is read both rotated and unrotated", self.values[value].name);
                    return Err(OnnxError::Graph { what });
                }
            }
            for &constant in &channels.constants {
                if self.stored[constant].uses != 1 {
                    let what = format!("{:?} is used rotated and elsewhere", self.stored[constant].name);
                    return Err(OnnxError::Graph { what });
                }
            }
        }
        self.drop_dead_nodes();
        for stored in self.stored {
            self.graph.initializers.push(Initializer {
                name: stored.name,
                dtype: DataType::F32,
                shape: stored.constant.shape.clone(),
                data: TensorData::Lazy(Arc::new(WeightTensor {
                    source: self.weights.clone(),
                    constant: stored.constant,
                    order: stored.order,
                })),
            });
        }
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
        self.graph.drop_unused_initializers();
        Ok(Model::new(self.graph))
    }

    fn drop_dead_nodes(&mut self) {
        let mut wanted: HashSet<String> = self.graph.outputs.iter().map(|o| o.name.clone()).collect();
        let mut kept = Vec::with_capacity(self.graph.nodes.len());
        for node in std::mem::take(&mut self.graph.nodes).into_iter().rev() {
            if node.outputs.iter().any(|o| wanted.contains(o)) {
                wanted.extend(node.inputs.iter().cloned());
                kept.push(node);
            }
        }
        kept.reverse();
        self.graph.nodes = kept;
    }

    fn fail(&mut self, error: OnnxError) {
        self.error.get_or_insert(error);
    }

    fn add_value(&mut self, name: String, origin: Origin, shape: Shape) -> usize {
        self.values.push(Value { name, origin, shape, uses: 0, channels: None });
        self.values.len() - 1
    }

    fn unique(&mut self, base: &str) -> String {
        if self.names.insert(base.to_owned()) {
            return base.to_owned();
        }
        loop {
            let n = self.counters.entry(base.to_owned()).or_insert(0);
            *n += 1;
            let name = format!("{base}_{n}");
            if self.names.insert(name.clone()) {
                return name;
            }
        }
    }

    /// The value's name in the graph, counted as one use; weights become initializers here.
    fn use_value(&mut self, id: usize) -> String {
        self.values[id].uses += 1;
        if let Origin::Weight(constant) = &self.values[id].origin {
            let constant = constant.clone();
            let index = self.store(&constant);
            self.stored[index].uses += 1;
            return self.stored[index].name.clone();
        }
        self.values[id].name.clone()
    }

    fn store(&mut self, constant: &Constant) -> usize {
        if let Some(&index) = self.by_constant.get(constant) {
            return index;
        }
        let transposed = matches!(constant.steps.last(), Some(Step::Permute(p)) if *p == [1, 0]);
        let base = if transposed { format!("{}.T", constant.weight) } else { constant.weight.clone() };
        let name = self.unique(&base);
        self.stored.push(Stored { name, constant: constant.clone(), uses: 0, order: None });
        self.by_constant.insert(constant.clone(), self.stored.len() - 1);
        self.stored.len() - 1
    }

    fn literal(&mut self, shape: &[usize], data: &[f32]) -> usize {
        let key = (shape.to_vec(), data.iter().map(|v| v.to_bits()).collect());
        if let Some(&id) = self.literals.get(&key) {
            return id;
        }
        let name = self.unique("const");
        self.graph.initializers.push(Initializer::from_f32(name.clone(), shape, data));
        let id = self.add_value(name, Origin::Literal, shape.iter().map(|&s| Some(s)).collect());
        self.literals.insert(key, id);
        id
    }

    fn integers(&mut self, values: &[i64]) -> String {
        if let Some(name) = self.integers.get(values) {
            return name.clone();
        }
        let name = self.unique("shape");
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
    ) -> usize {
        let name = match base {
            Some(base) => self.unique(&format!("{base}/{op}")),
            None => {
                let base = if self.scope.is_empty() { op.to_owned() } else { format!("{}/{op}", self.scope) };
                self.unique(&base)
            }
        };
        let mut node = Node::new(&name, op, inputs, &[&name]);
        node.attributes = attributes.to_vec();
        self.graph.nodes.push(node);
        self.add_value(name, Origin::Node(self.graph.nodes.len() - 1), shape)
    }

    fn binary(&mut self, base: Option<&str>, op: &str, a: usize, b: usize) -> usize {
        let shape = broadcast(&self.values[a].shape, &self.values[b].shape);
        let (a, b) = (self.use_value(a), self.use_value(b));
        self.node(base, op, &[&a, &b], &[], shape)
    }

    fn unary(&mut self, op: &str, x: usize, attributes: &[Attribute]) -> usize {
        let shape = self.values[x].shape.clone();
        let x = self.use_value(x);
        self.node(None, op, &[&x], attributes, shape)
    }

    fn reduce(&mut self, op: &str, x: usize, axis: usize) -> usize {
        let mut shape = self.values[x].shape.clone();
        shape[axis] = Some(1);
        // Counted from the end where it is the last axis: the form that fusions look for.
        let from_end = axis + 1 == shape.len();
        let axes = self.integers(&[if from_end { -1 } else { axis as i64 }]);
        let x = self.use_value(x);
        self.node(None, op, &[&x, &axes], &[Attribute::int("keepdims", 1)], shape)
    }

    /// The weight behind a value, where it is one.
    fn constant_of(&self, id: usize) -> Option<&Constant> {
        match &self.values[id].origin {
            Origin::Weight(constant) => Some(constant),
            _ => None,
        }
    }

    fn weight_value(&mut self, constant: Constant) -> usize {
        let shape = constant.shape.iter().map(|&s| Some(s)).collect();
        self.add_value(String::new(), Origin::Weight(constant), shape)
    }

    /// The `LayerNormalization` node behind a value, where it has `inputs` inputs and nothing else reads it.
    fn layer_norm_of(&self, id: usize, inputs: usize) -> Option<Node> {
        let Origin::Node(index) = self.values[id].origin else {
            return None;
        };
        let node = &self.graph.nodes[index];
        let fits =
            node.op_type == "LayerNormalization" && node.inputs.len() == inputs && self.values[id].uses == 0;
        fits.then(|| node.clone())
    }

    /// Replaces a norm's unit weight, or adds its bias, instead of a separate node.
    fn absorb(&mut self, norm: usize, weight: usize, bias: bool) -> Option<usize> {
        let node = self.layer_norm_of(norm, if bias { 3 } else { 2 })?;
        let width = self.values[norm].shape.last().copied().flatten()?;
        (self.constant_of(weight)?.shape == [width]).then_some(())?;
        // The slot must still hold what stands for "none".
        let (slot, neutral) = if bias { (2, 0.0) } else { (1, 1.0) };
        let neutral = self.literal(&[width], &vec![neutral; width]);
        (node.inputs[slot] == self.values[neutral].name).then_some(())?;
        let mut inputs = node.inputs;
        inputs[slot] = self.use_value(weight);
        if inputs.len() == 2 {
            let zeros = self.literal(&[width], &vec![0.0; width]);
            inputs.push(self.values[zeros].name.clone());
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let shape = self.values[norm].shape.clone();
        Some(self.node(None, "LayerNormalization", &inputs, &node.attributes, shape))
    }

    /// `cos` and `sin` `[n, half]` as `[cos | cos]` and `[-sin | sin]` of shape `[1, n, 1, 2 half]`, once per table.
    fn rotation_tables(&mut self, cos: usize, sin: usize, half: usize) -> (usize, usize) {
        if let Some(&tables) = self.tables.get(&(cos, sin)) {
            return tables;
        }
        let dims = [1, -1, 1, half as i64];
        let (cos4, sin4) = (self.reshape(&NodeValue(cos), &dims), self.reshape(&NodeValue(sin), &dims));
        let minus = self.unary("Neg", sin4.0, &[]);
        let c = self.concat(&[cos4.clone(), cos4], 3).0;
        let s = self.concat(&[NodeValue(minus), sin4], 3).0;
        self.tables.insert((cos, sin), (c, s));
        (c, s)
    }

    /// Reorders the constants behind `x[.., heads, head_dim]` so that pairs are `(j, j + half)`. `false` where the
    /// channels of `x` do not come straight from a linear layer that nothing else reads.
    fn reorder(&mut self, x: usize, heads: usize, head_dim: usize) -> bool {
        let Some(channels) = self.values[x].channels.clone() else {
            return false;
        };
        let width = heads * head_dim;
        let fits = channels.values.iter().all(|&(v, uses)| self.values[v].uses == uses)
            && channels.constants.iter().all(|&c| {
                let s = &self.stored[c];
                s.uses == 1 && s.order.is_none() && s.constant.shape.last() == Some(&width)
            })
            && self.values[x].shape.len() >= 2
            && self.values[x].shape[self.values[x].shape.len() - 2..] == [Some(heads), Some(head_dim)];
        if !fits {
            return false;
        }
        let half = head_dim / 2;
        let order: Vec<usize> = (0..width)
            .map(|j| {
                let (head, d) = (j / head_dim, j % head_dim);
                head * head_dim + if d < half { 2 * d } else { 2 * (d - half) + 1 }
            })
            .collect();
        for &c in &channels.constants {
            self.stored[c].order = Some(order.clone());
        }
        self.reordered.push(channels);
        true
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
        NodeValue(self.weight_value(Constant {
            weight: name.into(),
            stored: shape.to_vec(),
            shape: shape.to_vec(),
            steps: Vec::new(),
        }))
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> NodeValue {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "values of a constant must fill its shape");
        NodeValue(self.literal(shape, &data))
    }

    fn add(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        if let Some(norm) = self.absorb(a.0, b.0, true) {
            return NodeValue(norm);
        }
        NodeValue(self.binary(None, "Add", a.0, b.0))
    }

    fn sub(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        NodeValue(self.binary(None, "Sub", a.0, b.0))
    }

    fn mul(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        if let Some(norm) = self.absorb(a.0, b.0, false) {
            return NodeValue(norm);
        }
        NodeValue(self.binary(None, "Mul", a.0, b.0))
    }

    fn scale(&mut self, x: &NodeValue, k: f32) -> NodeValue {
        if let Some(constant) = self.constant_of(x.0) {
            let mut constant = constant.clone();
            constant.steps.push(Step::Scale(k.to_bits()));
            return NodeValue(self.weight_value(constant));
        }
        let k = self.literal(&[], &[k]);
        NodeValue(self.binary(None, "Mul", x.0, k))
    }

    fn offset(&mut self, x: &NodeValue, k: f32) -> NodeValue {
        let k = self.literal(&[], &[k]);
        NodeValue(self.binary(None, "Add", x.0, k))
    }

    fn linear(&mut self, x: &NodeValue, w: &NodeValue, b: Option<&NodeValue>) -> NodeValue {
        let wt = self.permute(w, &[1, 0]);
        let base = self.constant_of(w.0).map(|c| c.weight.trim_end_matches(".weight").to_owned());
        let base = base.as_deref();
        let (inner, wanted) = (self.values[x.0].shape.last().copied().flatten(), self.values[wt.0].shape[0]);
        assert!(
            inner.is_none() || wanted.is_none() || inner == wanted,
            "linear {base:?}: {inner:?} into {wanted:?}"
        );
        let mut shape = self.values[x.0].shape.clone();
        *shape.last_mut().expect("the input of a linear layer has an axis") = self.values[wt.0].shape[1];
        let inputs = [self.use_value(x.0), self.use_value(wt.0)];
        let mut out = self.node(base, "MatMul", &[&inputs[0], &inputs[1]], &[], shape);
        let mut channels = self
            .constant_of(wt.0)
            .cloned()
            .map(|c| Channels { constants: vec![self.store(&c)], values: Vec::new() });
        if let Some(b) = b {
            let product = out;
            out = self.binary(base, "Add", product, b.0);
            channels = match (channels, self.constant_of(b.0).cloned()) {
                (Some(mut channels), Some(bias)) => {
                    channels.constants.push(self.store(&bias));
                    channels.values.push((product, self.values[product].uses));
                    Some(channels)
                }
                _ => None,
            };
        }
        self.values[out].channels = channels;
        NodeValue(out)
    }

    fn matmul(&mut self, a: &NodeValue, b: &NodeValue) -> NodeValue {
        let (sa, sb) = (&self.values[a.0].shape, &self.values[b.0].shape);
        let (ra, rb) = (sa.len(), sb.len());
        let mut shape = broadcast(&sa[..ra - 2].to_vec(), &sb[..rb - 2].to_vec());
        shape.extend([sa[ra - 2], sb[rb - 1]]);
        let (a, b) = (self.use_value(a.0), self.use_value(b.0));
        NodeValue(self.node(None, "MatMul", &[&a, &b], &[], shape))
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
        if let (Some(total), Some(hole)) =
            (old.iter().copied().try_fold(1, |n, s| s.map(|s| n * s)), dims.iter().position(|&d| d == -1))
        {
            let rest = shape
                .iter()
                .enumerate()
                .filter(|(i, _)| *i != hole)
                .try_fold(1, |n, (_, s)| s.map(|s| n * s));
            shape[hole] = rest.filter(|&r| r > 0).map(|r| total / r);
        }
        if let Some(constant) = self.constant_of(x.0) {
            let mut constant = constant.clone();
            let new: Vec<usize> =
                shape.iter().map(|s| s.expect("the sizes of a reshaped weight are known")).collect();
            assert_eq!(
                new.iter().product::<usize>(),
                constant.shape.iter().product::<usize>(),
                "reshape of {constant:?}"
            );
            constant.shape.clone_from(&new);
            constant.steps.push(Step::Reshape(new));
            return NodeValue(self.weight_value(constant));
        }
        let target = self.integers(dims);
        let name = self.use_value(x.0);
        let out = self.node(None, "Reshape", &[&name, &target], &[], shape.clone());
        // Splitting the channels into heads keeps their order.
        let width = old.last().copied().flatten();
        let split = match shape.as_slice() {
            [.., Some(a), Some(b)] => Some(a * b),
            _ => None,
        };
        if split.is_some()
            && width == split
            && let Some(mut channels) = self.values[x.0].channels.clone()
        {
            channels.values.push((x.0, self.values[x.0].uses));
            self.values[out].channels = Some(channels);
        }
        NodeValue(out)
    }

    fn permute(&mut self, x: &NodeValue, perm: &[usize]) -> NodeValue {
        if let Some(constant) = self.constant_of(x.0) {
            let mut constant = constant.clone();
            constant.shape = perm.iter().map(|&p| constant.shape[p]).collect();
            constant.steps.push(Step::Permute(perm.to_vec()));
            return NodeValue(self.weight_value(constant));
        }
        let shape = perm.iter().map(|&p| self.values[x.0].shape[p]).collect();
        let perm: Vec<i64> = perm.iter().map(|&p| p as i64).collect();
        let name = self.use_value(x.0);
        NodeValue(self.node(None, "Transpose", &[&name], &[Attribute::ints("perm", &perm)], shape))
    }

    fn concat(&mut self, xs: &[NodeValue], axis: usize) -> NodeValue {
        if let [one] = xs {
            return one.clone();
        }
        let mut shape = self.values[xs[0].0].shape.clone();
        shape[axis] = xs.iter().try_fold(0, |n, x| self.values[x.0].shape[axis].map(|s| n + s));
        let names: Vec<String> = xs.iter().map(|x| self.use_value(x.0)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        NodeValue(self.node(None, "Concat", &names, &[Attribute::int("axis", axis as i64)], shape))
    }

    fn slice(&mut self, x: &NodeValue, axis: usize, start: i64, end: Option<i64>) -> NodeValue {
        let mut shape = self.values[x.0].shape.clone();
        let size = shape[axis];
        let bounds = size.map(|n| {
            let n = n as i64;
            let at = |p: i64| if p < 0 { p + n } else { p }.clamp(0, n);
            let (start, end) = (at(start), end.map_or(n, at));
            (start as usize, end.max(start) as usize)
        });
        shape[axis] = bounds.map(|(start, end)| end - start);
        if let (Some(constant), Some((start, end))) = (self.constant_of(x.0), bounds) {
            let mut constant = constant.clone();
            constant.shape[axis] = end - start;
            constant.steps.push(Step::Slice { axis, start, end });
            return NodeValue(self.weight_value(constant));
        }
        let starts = self.integers(&[start]);
        let ends = self.integers(&[end.unwrap_or(i64::MAX)]);
        let axes = self.integers(&[axis as i64]);
        let name = self.use_value(x.0);
        NodeValue(self.node(None, "Slice", &[&name, &starts, &ends, &axes], &[], shape))
    }

    fn gather(&mut self, table: &NodeValue, index: &IndexValue) -> NodeValue {
        let mut shape = self.values[index.0].shape.clone();
        shape.extend_from_slice(&self.values[table.0].shape[1..]);
        let (table, index) = (self.use_value(table.0), self.use_value(index.0));
        NodeValue(self.node(None, "Gather", &[&table, &index], &[Attribute::int("axis", 0)], shape))
    }

    fn softmax(&mut self, x: &NodeValue) -> NodeValue {
        NodeValue(self.unary("Softmax", x.0, &[Attribute::int("axis", -1)]))
    }

    fn layer_norm(&mut self, x: &NodeValue, eps: f32) -> NodeValue {
        let shape = self.values[x.0].shape.clone();
        let width = shape.last().copied().flatten().expect("the width of a norm is fixed");
        let ones = self.literal(&[width], &vec![1.0; width]);
        let (x, ones) = (self.use_value(x.0), self.use_value(ones));
        let attributes = [Attribute::int("axis", -1), Attribute::float("epsilon", eps)];
        NodeValue(self.node(None, "LayerNormalization", &[&x, &ones], &attributes, shape))
    }

    fn rms_norm(&mut self, x: &NodeValue, weight: &NodeValue, eps: f32) -> NodeValue {
        // Spelled out: the operator exists from opset 23 only. All three runtimes fuse this form.
        let two = self.literal(&[], &[2.0]);
        let square = self.binary(None, "Pow", x.0, two);
        let axis = self.values[x.0].shape.len() - 1;
        let mean = self.reduce("ReduceMean", square, axis);
        let eps = self.literal(&[], &[eps]);
        let mean = self.binary(None, "Add", mean, eps);
        let root = self.unary("Sqrt", mean, &[]);
        let inverse = self.unary("Reciprocal", root, &[]);
        let scaled = self.binary(None, "Mul", x.0, inverse);
        let base = self.constant_of(weight.0).map(|c| c.weight.trim_end_matches(".weight").to_owned());
        let out = self.binary(base.as_deref(), "Mul", scaled, weight.0);
        if let (Some(mut channels), Some(constant)) =
            (self.values[x.0].channels.clone(), self.constant_of(weight.0).cloned())
        {
            channels.constants.push(self.store(&constant));
            channels.values.extend([(x.0, self.values[x.0].uses), (scaled, self.values[scaled].uses)]);
            self.values[out].channels = Some(channels);
        }
        NodeValue(out)
    }

    fn channel_norm(&mut self, x: &NodeValue, gamma: &NodeValue, channels: usize) -> NodeValue {
        let norm = self.reduce("ReduceL2", x.0, 1);
        let least = self.literal(&[], &[1e-12]);
        let norm = self.binary(None, "Max", norm, least);
        let unit = self.binary(None, "Div", x.0, norm);
        let gamma = self.scale(gamma, (channels as f32).sqrt());
        let gamma = self.reshape(&gamma, &[1, channels as i64, 1, 1]);
        NodeValue(self.binary(None, "Mul", unit, gamma.0))
    }

    fn mean(&mut self, x: &NodeValue, axis: usize) -> NodeValue {
        NodeValue(self.reduce("ReduceMean", x.0, axis))
    }

    fn gelu_tanh(&mut self, x: &NodeValue) -> NodeValue {
        NodeValue(self.unary("Gelu", x.0, &[Attribute::text("approximate", "tanh")]))
    }

    fn silu(&mut self, x: &NodeValue) -> NodeValue {
        let gate = self.unary("Sigmoid", x.0, &[]);
        NodeValue(self.binary(None, "Mul", x.0, gate))
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
        let base = self.constant_of(w.0).map(|c| c.weight.trim_end_matches(".weight").to_owned());
        let mut inputs = vec![self.use_value(x.0), self.use_value(w.0)];
        inputs.extend(b.map(|b| self.use_value(b.0)));
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        NodeValue(self.node(base.as_deref(), "Conv", &inputs, &attributes, shape))
    }

    fn upsample2(&mut self, x: &NodeValue) -> NodeValue {
        let s = &self.values[x.0].shape;
        let shape = vec![s[0], s[1], s[2].map(|n| 2 * n), s[3].map(|n| 2 * n)];
        let scales = self.literal(&[4], &[1.0, 1.0, 2.0, 2.0]);
        let (x, scales) = (self.use_value(x.0), self.use_value(scales));
        let attributes = [
            Attribute::text("mode", "nearest"),
            Attribute::text("coordinate_transformation_mode", "asymmetric"),
            Attribute::text("nearest_mode", "floor"),
        ];
        NodeValue(self.node(None, "Resize", &[&x, "", &scales], &attributes, shape))
    }

    fn rotate(
        &mut self,
        x: &NodeValue,
        cos: &NodeValue,
        sin: &NodeValue,
        heads: usize,
        head_dim: usize,
    ) -> NodeValue {
        let half = head_dim / 2;
        let (cos, sin) = self.rotation_tables(cos.0, sin.0, half);
        let reordered = self.reorder(x.0, heads, head_dim);
        let x = if reordered {
            x.clone()
        } else {
            // The channels come from elsewhere: reorder the value itself.
            let (h, d) = (heads as i64, head_dim as i64);
            let pairs = self.reshape(x, &[0, 0, h, d / 2, 2]);
            let split = self.permute(&pairs, &[0, 1, 2, 4, 3]);
            self.reshape(&split, &[0, 0, h, d])
        };
        let last = self.values[x.0].shape.len() - 1;
        let first = self.slice(&x, last, 0, Some(half as i64));
        let second = self.slice(&x, last, half as i64, None);
        let swapped = self.concat(&[second, first], last);
        let a = self.binary(None, "Mul", x.0, cos);
        let b = self.binary(None, "Mul", swapped.0, sin);
        let out = self.binary(None, "Add", a, b);
        if reordered && let Some(channels) = self.reordered.last_mut() {
            channels.values.push((x.0, self.values[x.0].uses)); // nothing else may read it from now on
        }
        NodeValue(out)
    }

    fn mark(&mut self, name: &str, x: &NodeValue) {
        let value = self.values[x.0].name.clone();
        let is_node = matches!(self.values[x.0].origin, Origin::Node(_));
        if is_node && !self.renamed.contains_key(&value) && self.names.insert(name.to_owned()) {
            self.renamed.insert(value, name.to_owned());
        }
    }
}

/// A weight, read and rearranged while it is written.
struct WeightTensor {
    source: Arc<dyn WeightSource>,
    constant: Constant,
    order: Option<Vec<usize>>,
}

/// Elements per write where a weight is copied as it is.
const CHUNK: usize = 1 << 20;

fn put(values: &[f32], bytes: &mut Vec<u8>, sink: &mut dyn Write) -> io::Result<()> {
    for part in values.chunks(CHUNK) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|v| v.to_le_bytes()));
        sink.write_all(bytes)?;
    }
    Ok(())
}

impl LazyTensor for WeightTensor {
    fn write_to(&self, sink: &mut dyn Write) -> io::Result<()> {
        let total: usize = self.constant.stored.iter().product();
        let name = &self.constant.weight;
        let read = |offset: usize, out: &mut [f32]| {
            self.source.read(name, offset as u64, out).map_err(io::Error::other)
        };
        thread_local! {
            // One buffer of bytes for all tensors that a thread writes.
            static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        BYTES.with_borrow_mut(|bytes| {
            let steps: Vec<&Step> =
                self.constant.steps.iter().filter(|s| !matches!(s, Step::Reshape(_))).collect();
            if steps.is_empty() && self.order.is_none() {
                let mut buffer = vec![0f32; total.min(CHUNK)];
                let mut done = 0;
                while done < total {
                    let n = buffer.len().min(total - done);
                    read(done, &mut buffer[..n])?;
                    put(&buffer[..n], bytes, sink)?;
                    done += n;
                }
                return Ok(());
            }
            let mut data = vec![0f32; total];
            read(0, &mut data)?;
            if let ([Step::Permute(p)], [columns, rows]) = (steps.as_slice(), matrix(&self.constant))
                && *p == [1, 0]
            {
                return put_transposed(&data, rows, columns, self.order.as_deref(), bytes, sink);
            }
            let mut shape = self.constant.stored.clone();
            for step in &self.constant.steps {
                (shape, data) = apply(step, shape, data);
            }
            if let Some(order) = &self.order {
                let mut row = vec![0f32; order.len()];
                for part in data.chunks_mut(order.len()) {
                    row.copy_from_slice(part);
                    part.iter_mut().zip(order).for_each(|(o, &from)| *o = row[from]);
                }
            }
            put(&data, bytes, sink)
        })
    }
}

/// Rows and columns of the constant; zeros where it is no matrix.
fn matrix(constant: &Constant) -> [usize; 2] {
    match constant.shape.as_slice() {
        [rows, columns] => [*columns, *rows],
        _ => [0, 0],
    }
}

/// Writes the `[rows, columns]` transpose of `data[columns, rows]`, a few rows in memory at a time.
fn put_transposed(
    data: &[f32],
    rows: usize,
    columns: usize,
    order: Option<&[usize]>,
    bytes: &mut Vec<u8>,
    sink: &mut dyn Write,
) -> io::Result<()> {
    const BLOCK: usize = 64;
    let mut buffer = vec![0f32; BLOCK * columns];
    for first in (0..rows).step_by(BLOCK) {
        let n = BLOCK.min(rows - first);
        for column in 0..columns {
            let from = order.map_or(column, |o| o[column]) * rows + first;
            for (i, &v) in data[from..from + n].iter().enumerate() {
                buffer[i * columns + column] = v;
            }
        }
        put(&buffer[..n * columns], bytes, sink)?;
    }
    Ok(())
}

fn apply(step: &Step, shape: Vec<usize>, data: Vec<f32>) -> (Vec<usize>, Vec<f32>) {
    match step {
        Step::Reshape(new) => (new.clone(), data),
        Step::Scale(bits) => {
            let k = f32::from_bits(*bits);
            (shape, data.into_iter().map(|v| v * k).collect())
        }
        Step::Slice { axis, start, end } => {
            let inner: usize = shape[axis + 1..].iter().product();
            let (row, from, to) = (shape[*axis] * inner, start * inner, end * inner);
            let data = data.chunks(row.max(1)).flat_map(|r| &r[from..to]).copied().collect();
            let mut shape = shape;
            shape[*axis] = end - start;
            (shape, data)
        }
        Step::Permute(perm) => {
            let mut strides = vec![1; shape.len()];
            for i in (0..shape.len().saturating_sub(1)).rev() {
                strides[i] = strides[i + 1] * shape[i + 1];
            }
            let new: Vec<usize> = perm.iter().map(|&p| shape[p]).collect();
            let steps: Vec<usize> = perm.iter().map(|&p| strides[p]).collect();
            let mut out = Vec::with_capacity(data.len());
            let mut at = vec![0usize; new.len()];
            let mut position = 0;
            for _ in 0..data.len() {
                out.push(data[position]);
                for axis in (0..new.len()).rev() {
                    at[axis] += 1;
                    position += steps[axis];
                    if at[axis] < new[axis] {
                        break;
                    }
                    position -= steps[axis] * new[axis];
                    at[axis] = 0;
                }
            }
            (new, out)
        }
    }
}
