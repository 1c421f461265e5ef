//! fp16 and bf16 graphs, strongly typed: every value has a type of its own, and casts stand where types meet.

use std::collections::{HashMap, HashSet};

use half::{bf16, f16};

use super::QuantError;
use mindseye_engines::onnx::{Attribute, AttributeValue, DataType, Initializer, Model, Node};
use mindseye_engines::target::Precision;

/// Operators that sum or square long rows: they stay in fp32, between casts.
const HIGH: [&str; 13] = [
    "LayerNormalization",
    "RMSNormalization",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Sin",
    "Cos",
    "Exp",
    "Log",
];

/// Layers that stay in fp32, by a part of their constants' names: the time path, whose values reach thousands, and what
/// its authors keep in fp32 of a T5 encoder (`_keep_in_fp32_modules` of transformers' `T5PreTrainedModel`).
const HIGH_CONSTANTS: [&str; 3] = ["time_embedder", "time_proj", "DenseReluDense.wo"];

/// Largest magnitude of a half.
const MAX_HALF: f32 = 65_504.0;

/// Magnitude from which on values are kept in fp32: what was measured over some inputs may be passed by others.
pub const MEASURED_LIMIT: f32 = MAX_HALF / 4.0;

/// Converts the float parts of a graph to `fp16` or `bf16`. Graph inputs and outputs stay fp32 and are cast just
/// inside; norms and the time path compute in fp32.
///
/// # Errors
/// Another precision, a subgraph, a constant that cannot be read, or one that is NaN, infinite or too large for a half.
pub fn to_float16(model: &Model, float: Precision) -> Result<Model, QuantError> {
    Ok(Float16::new(model, float, &HashSet::new())?.deploy)
}

/// A graph in 16-bit floats, twice.
#[derive(Clone, Debug)]
pub struct Float16 {
    /// Strongly typed, to deploy.
    pub deploy: Model,
    /// Element type of each of its values.
    types: HashMap<String, DataType>,
    low: DataType,
}

impl Float16 {
    /// Converts as [`to_float16`] does; nodes that read or make one of the values `high` compute in fp32.
    ///
    /// # Errors
    /// As [`to_float16`].
    pub fn new(model: &Model, float: Precision, high: &HashSet<String>) -> Result<Self, QuantError> {
        let low = low_type(float)?;
        let (deploy, types) = convert_graph(model, low, high)?;
        Ok(Self { deploy, types, low })
    }

    /// The same arithmetic for CPU backends, which know no 16-bit floats: every value that the deployed graph holds in
    /// 16 bits is computed in fp32 and rounded as that format rounds, with its overflow to infinity.
    ///
    /// # Errors
    /// A constant that cannot be read.
    pub fn emulated(&self) -> Result<Model, QuantError> {
        let mut out = self.deploy.clone();
        let mut nodes = Vec::with_capacity(4 * out.graph.nodes.len());
        let is_low = |name: &String| self.types.get(name) == Some(&self.low);
        for mut node in std::mem::take(&mut out.graph.nodes) {
            if node.op_type == "Cast" && node.inputs.iter().chain(&node.outputs).any(is_low) {
                let (from, to) = (node.inputs[0].clone(), node.outputs[0].clone());
                if is_low(&to) {
                    nodes.extend(rounding(&from, &to, self.low));
                } else {
                    nodes.push(Node::new(&node.name, "Identity", &[&from], &[&to]));
                }
                continue;
            }
            let exact = |name: &str| format!("{name}/exact");
            let rounded: Vec<String> = node.outputs.iter().filter(|o| is_low(o)).cloned().collect();
            for output in node.outputs.iter_mut().filter(|o| is_low(o)) {
                *output = exact(output);
            }
            nodes.push(node);
            for value in rounded {
                nodes.extend(rounding(&exact(&value), &value, self.low));
            }
        }
        out.graph.nodes = nodes;
        for constant in out.graph.initializers.iter_mut().filter(|c| c.dtype == self.low) {
            *constant = Initializer::from_f32(constant.name.clone(), &constant.shape, &constant.to_f32()?);
        }
        out.graph.initializers.extend(rounding_constants(self.low));
        out.graph.value_infos.clear();
        out.graph.drop_unused_initializers();
        Ok(out)
    }
}

/// Constants of [`rounding`].
fn rounding_constants(low: DataType) -> Vec<Initializer> {
    let constant = |name: &str, v: f32| Initializer::from_f32(name, &[], &[v]);
    if low == DataType::BF16 {
        return vec![constant("float16.split", 65_537.0)]; // 2^16 + 1: eight bits are left
    }
    vec![
        constant("float16.split", 8_193.0), // 2^13 + 1: eleven bits are left
        constant("float16.least", 2f32.powi(-14)),
        // Floats between 1/2 and 1 are multiples of 2^-24, as the smallest halves are.
        constant("float16.steps", 0.75),
        constant("float16.over", 65_520.0), // halfway to what would be the next half
        constant("float16.one", 1.0),
        constant("float16.zero", 0.0),
    ]
}

/// Nodes that round `from` to the nearest 16-bit float, in fp32: splitting after Veltkamp (Dekker 1971, "A
/// floating-point technique for extending the available precision", section 5); below the least normal half to whole
/// steps of 2^-24; past the largest one to infinity. Ties may go to either side.
fn rounding(from: &str, to: &str, low: DataType) -> Vec<Node> {
    let n = |part: &str| format!("{to}/float16.{part}");
    let op = |part: &str, op: &str, inputs: &[&str]| Node::new(&n(part), op, inputs, &[&n(part)]);
    let mut nodes =
        vec![op("times", "Mul", &[from, "float16.split"]), op("rest", "Sub", &[&n("times"), from])];
    if low == DataType::BF16 {
        nodes.push(Node::new(&n("round"), "Sub", &[&n("times"), &n("rest")], &[to]));
        return nodes;
    }
    nodes.extend([
        op("normal", "Sub", &[&n("times"), &n("rest")]),
        op("raised", "Add", &[from, "float16.steps"]),
        op("subnormal", "Sub", &[&n("raised"), "float16.steps"]),
        op("size", "Abs", &[from]),
        op("is_small", "Less", &[&n("size"), "float16.least"]),
        op("rounded", "Where", &[&n("is_small"), &n("subnormal"), &n("normal")]),
        op("is_over", "GreaterOrEqual", &[&n("size"), "float16.over"]),
        op("kept", "Where", &[&n("is_over"), from, &n("rounded")]),
        op("divisor", "Where", &[&n("is_over"), "float16.zero", "float16.one"]),
        Node::new(&n("value"), "Div", &[&n("kept"), &n("divisor")], &[to]),
    ]);
    nodes
}

fn low_type(float: Precision) -> Result<DataType, QuantError> {
    match float {
        Precision::Fp16 => Ok(DataType::F16),
        Precision::Bf16 => Ok(DataType::BF16),
        other => Err(QuantError::Unsupported(format!("{other} is not a 16-bit float format"))),
    }
}

/// The graph with `low` floats, and the element types of its values.
fn convert_graph(
    model: &Model,
    low: DataType,
    keep: &HashSet<String>,
) -> Result<(Model, HashMap<String, DataType>), QuantError> {
    let mut out = model.clone();
    out.graph.value_infos.clear();
    let mut caster = Caster::new(model, low);
    let high_nodes = high_nodes(model, keep);
    for (index, mut node) in std::mem::take(&mut out.graph.nodes).into_iter().enumerate() {
        if node.attributes.iter().any(|a| matches!(a.value, AttributeValue::Graph(_))) {
            return Err(QuantError::Unsupported(format!("node {:?} has a subgraph", node.name)));
        }
        let float = if high_nodes.contains(&index) { DataType::F32 } else { low };
        caster.cast_inputs(&mut node, float);
        let casts = caster.cast_outputs(&mut node, float);
        caster.nodes.push(node);
        caster.nodes.extend(casts);
    }
    out.graph.nodes = caster.nodes;
    let mut initializers = Vec::new();
    for i in std::mem::take(&mut out.graph.initializers) {
        let Some(types) = caster.wanted.get(&i.name) else {
            initializers.push(i);
            continue;
        };
        if types.contains(&low) {
            initializers.push(convert(&i, low)?);
        }
        if types.contains(&DataType::F32) {
            initializers.push(i);
        }
    }
    out.graph.initializers = initializers;
    out.graph.drop_unused_initializers();
    let constants = out.graph.initializers.iter().map(|c| (c.name.clone(), c.dtype));
    caster.types.extend(constants);
    Ok((out, caster.types))
}

/// Nodes that compute in fp32: those whose kind asks for it, and those that read or make a value of `keep`.
fn high_nodes(model: &Model, keep: &HashSet<String>) -> HashSet<usize> {
    let mut high = HashSet::new();
    let mut residual: HashSet<&str> = HashSet::new();
    let makers: HashMap<&str, usize> = model
        .graph
        .nodes
        .iter()
        .enumerate()
        .flat_map(|(n, node)| node.outputs.iter().map(move |o| (o.as_str(), n)))
        .collect();
    let made_by = |value: &String| makers.get(value.as_str()).map(|&n| model.graph.nodes[n].op_type.as_str());
    let mut values: HashSet<&str> = HashSet::new();
    for (index, node) in model.graph.nodes.iter().enumerate() {
        let by_constant = node.inputs.iter().any(|i| HIGH_CONSTANTS.iter().any(|h| i.contains(h)));
        // Between the mean of squares and its root, an epsilon is added: it would vanish in a half.
        let epsilon = matches!(node.op_type.as_str(), "Add" | "Max")
            && node.inputs.iter().any(|i| {
                values.contains(i.as_str()) && made_by(i).is_some_and(|op| op.starts_with("Reduce"))
            });
        // The sum of squares is divided out in fp32 too.
        let divide = matches!(node.op_type.as_str(), "Mul" | "Div")
            && node.inputs.iter().any(|i| matches!(made_by(i), Some("Sqrt" | "Reciprocal")));
        // The activation of the time path: between two of its layers.
        let silu = matches!(node.op_type.as_str(), "Sigmoid" | "Mul")
            && node.inputs.iter().any(|i| i.contains("time_embedder"));
        // The sum that a layer kept in fp32 is added to, all along the way.
        let sum = node.op_type == "Add"
            && node.inputs.iter().any(|i| residual.contains(i.as_str()) || i.contains("DenseReluDense.wo"));
        if sum {
            residual.extend(node.outputs.iter().map(String::as_str));
        }
        let large = sum || node.inputs.iter().chain(&node.outputs).any(|v| keep.contains(v));
        if HIGH.contains(&node.op_type.as_str()) || by_constant || epsilon || divide || silu || large {
            high.insert(index);
            values.extend(node.outputs.iter().map(String::as_str));
        }
    }
    high
}

/// A graph on its way to `low` floats.
struct Caster {
    low: DataType,
    /// Element types of all values so far.
    types: HashMap<String, DataType>,
    casts: HashMap<(String, DataType), String>,
    /// Types that each float constant is wanted in; it may be both.
    wanted: HashMap<String, HashSet<DataType>>,
    constants: HashSet<String>,
    /// By output of the graph, the name of its value in `low`.
    outputs: HashMap<String, String>,
    nodes: Vec<Node>,
}

impl Caster {
    fn new(model: &Model, low: DataType) -> Self {
        let graph = &model.graph;
        let inputs = graph.inputs.iter().map(|i| (i.name.clone(), i.dtype.unwrap_or(DataType::F32)));
        let constants = graph.initializers.iter().map(|i| (i.name.clone(), i.dtype));
        Self {
            low,
            types: inputs.chain(constants).collect(),
            casts: HashMap::new(),
            wanted: HashMap::new(),
            constants: graph.initializers.iter().map(|i| i.name.clone()).collect(),
            outputs: graph.outputs.iter().map(|o| (o.name.clone(), format!("{}/low", o.name))).collect(),
            nodes: Vec::new(),
        }
    }

    /// Makes a node read its float inputs in `float`.
    fn cast_inputs(&mut self, node: &mut Node, float: DataType) {
        for (slot, input) in node.inputs.iter_mut().enumerate().filter(|(_, i)| !i.is_empty()) {
            // Scales of Resize are fp32 by definition.
            let float = if node.op_type == "Resize" && slot > 0 { DataType::F32 } else { float };
            let have = self.types.get(input.as_str()).copied().unwrap_or(self.low);
            if !is_float(have) {
                continue;
            }
            if self.constants.contains(input.as_str()) {
                self.wanted.entry(input.clone()).or_default().insert(float);
                if float != DataType::F32 {
                    *input = format!("{input}/low");
                }
            } else if have != float {
                *input = self.cast(input, float);
            }
        }
    }

    /// Notes the types of a node's outputs. One in `low` that the graph gives stays low inside, under a name of its own:
    /// the nodes that make the graph's fp32 copies.
    fn cast_outputs(&mut self, node: &mut Node, float: DataType) -> Vec<Node> {
        let result = self.result_type(node, float);
        let mut casts = Vec::new();
        for (slot, output) in node.outputs.iter_mut().enumerate() {
            let dtype = if slot == 0 { result } else { float };
            let Some(inner) = self.outputs.get(output.as_str()).filter(|_| dtype == self.low) else {
                self.types.insert(output.clone(), dtype);
                continue;
            };
            self.types.insert(inner.clone(), dtype);
            self.types.insert(output.clone(), DataType::F32);
            self.casts.insert((output.clone(), self.low), inner.clone());
            let cast = Node::new(&format!("{output}/cast"), "Cast", &[inner], &[output]);
            casts.push(cast.with(Attribute::int("to", DataType::F32 as i64)));
            output.clone_from(inner);
        }
        casts
    }

    fn cast(&mut self, value: &str, to: DataType) -> String {
        if let Some(name) = self.casts.get(&(value.to_owned(), to)) {
            return name.clone();
        }
        let name = format!("{value}/{}", to.name());
        let cast = Node::new(&format!("{name}/cast"), "Cast", &[value], &[&name]);
        self.nodes.push(cast.with(Attribute::int("to", to as i64)));
        self.types.insert(name.clone(), to);
        self.casts.insert((value.to_owned(), to), name.clone());
        name
    }

    /// Element type of a node's first output; changes `Cast` to the float format of the graph.
    fn result_type(&self, node: &mut Node, float: DataType) -> DataType {
        let result = result_type(node, &self.types, float);
        if node.op_type == "Cast" && result == DataType::F32 && float != DataType::F32 {
            node.attributes = vec![Attribute::int("to", float as i64)];
            return float;
        }
        result
    }
}

/// Element type of a node's first output where floats are `float`.
fn result_type(node: &Node, types: &HashMap<String, DataType>, float: DataType) -> DataType {
    let of = |i: usize| node.inputs.get(i).and_then(|n| types.get(n)).copied();
    match node.op_type.as_str() {
        "Cast" => DataType::from_code(node.int("to").unwrap_or(1)).unwrap_or(DataType::F32),
        "QuantizeLinear" => of(2).unwrap_or(DataType::U8),
        "DequantizeLinear" => float,
        "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Not" | "IsNaN" => {
            DataType::Bool
        }
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => DataType::I64,
        "Where" => {
            let t = of(1).unwrap_or(float);
            if is_float(t) { float } else { t }
        }
        _ => match of(0) {
            Some(t) if !is_float(t) => t,
            _ => float,
        },
    }
}

/// Element types of the values of an fp32 graph.
pub(super) fn value_types(model: &Model) -> HashMap<String, DataType> {
    let inputs = model.graph.inputs.iter().map(|i| (i.name.clone(), i.dtype.unwrap_or(DataType::F32)));
    let constants = model.graph.initializers.iter().map(|i| (i.name.clone(), i.dtype));
    let mut types: HashMap<String, DataType> = inputs.chain(constants).collect();
    for node in &model.graph.nodes {
        let result = result_type(node, &types, DataType::F32);
        let of = |slot| if slot == 0 { result } else { DataType::F32 };
        types.extend(node.outputs.iter().enumerate().map(|(slot, o)| (o.clone(), of(slot))));
    }
    types
}

fn is_float(t: DataType) -> bool {
    matches!(t, DataType::F32 | DataType::F16 | DataType::BF16)
}

fn convert(i: &Initializer, low: DataType) -> Result<Initializer, QuantError> {
    let values = i.to_f32()?;
    if values.iter().any(|v| !v.is_finite()) {
        return Err(QuantError::WeightNotFinite { weight: i.name.clone() });
    }
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    // A mask's "minus infinity" may be cut; a weight that large would make another network.
    if low == DataType::F16 && largest > MAX_HALF && i.origin.is_some() {
        return Err(QuantError::TooLarge { weight: i.name.clone(), largest });
    }
    let bytes = values
        .iter()
        .flat_map(|&v| match low {
            DataType::F16 => f16::from_f32(v.clamp(-MAX_HALF, MAX_HALF)).to_bits().to_le_bytes(),
            _ => bf16::from_f32(v).to_bits().to_le_bytes(),
        })
        .collect();
    Ok(Initializer::from_bytes(format!("{}/low", i.name), low, &i.shape, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::session;
    use mindseye_engines::backend::{RtenBackend, Tensor};
    use mindseye_engines::onnx::{Dim, Graph, ValueInfo};

    /// Rounds on the CPU as the formats themselves do.
    #[test]
    fn rounding_is_that_of_the_format() {
        let mut values: Vec<f32> = Vec::new();
        let mut state = 9u64;
        for exponent in -30..18 {
            for _ in 0..40 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let unit = 1.0 + (state >> 40) as f32 / (1u64 << 24) as f32;
                values.extend([unit * 2f32.powi(exponent), -unit * 2f32.powi(exponent)]);
            }
        }
        values.extend([0.0, 65_504.0, 65_519.0, 65_521.0, 1e9, -1e9]);
        let infinities = [f32::INFINITY, f32::NEG_INFINITY];
        let info = |name: &str| ValueInfo {
            name: name.into(),
            dtype: Some(DataType::F32),
            shape: Some(vec![Dim::Fixed(values.len())]),
        };
        for low in [DataType::F16, DataType::BF16] {
            let graph = Graph {
                nodes: rounding("x", "y", low),
                initializers: rounding_constants(low),
                inputs: vec![info("x")],
                outputs: vec![info("y")],
                ..Graph::default()
            };
            let mut session = session(&Model::new(graph), &RtenBackend).unwrap();
            // bfloat16 has the range of a float: no finite value becomes infinite there.
            let mut values = values.clone();
            if low == DataType::F16 {
                values[..2].copy_from_slice(&infinities);
            }
            let x = Tensor::f32(&[values.len()], values.clone());
            let got = session.run(&[("x", &x)]).unwrap().remove(0).1.into_f32().unwrap();
            for (x, y) in values.iter().zip(got) {
                let want = match low {
                    DataType::F16 => f16::from_f32(*x).to_f32(),
                    _ => bf16::from_f32(*x).to_f32(),
                };
                assert_eq!(y, want, "{x} as {}", low.name());
            }
        }
    }
}
