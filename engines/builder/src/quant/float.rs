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

/// Layers that stay in fp32, by a part of their constants' names: the time path, whose values reach thousands.
const HIGH_CONSTANTS: [&str; 2] = ["time_embedder", "time_proj"];

/// Converts the float parts of a graph to `fp16` or `bf16`. Graph inputs and outputs stay fp32 and are cast just
/// inside; norms and the time path compute in fp32.
///
/// # Errors
/// Another precision, a subgraph, or a constant that cannot be read. Values that a half cannot hold are clamped to
/// its largest.
pub fn to_float16(model: &Model, float: Precision) -> Result<Model, QuantError> {
    let low = match float {
        Precision::Fp16 => DataType::F16,
        Precision::Bf16 => DataType::BF16,
        other => return Err(QuantError::Unsupported(format!("{other} is not a 16-bit float format"))),
    };
    let mut out = model.clone();
    out.graph.value_infos.clear();
    let mut builder = Caster { types: HashMap::new(), casts: HashMap::new(), nodes: Vec::new() };
    for input in &out.graph.inputs {
        builder.types.insert(input.name.clone(), input.dtype.unwrap_or(DataType::F32));
    }
    let constants: HashMap<&str, &Initializer> =
        model.graph.initializers.iter().map(|i| (i.name.as_str(), i)).collect();
    for i in constants.values() {
        builder.types.insert(i.name.clone(), i.dtype);
    }
    // Which type each float constant is wanted in; a constant may be wanted in both.
    let mut wanted: HashMap<String, HashSet<DataType>> = HashMap::new();
    let outputs: HashMap<String, String> =
        model.graph.outputs.iter().map(|o| (o.name.clone(), format!("{}/low", o.name))).collect();
    let high_nodes = high_nodes(model);
    for (index, node) in std::mem::take(&mut out.graph.nodes).into_iter().enumerate() {
        if node.attributes.iter().any(|a| matches!(a.value, AttributeValue::Graph(_))) {
            return Err(QuantError::Unsupported(format!("node {:?} has a subgraph", node.name)));
        }
        let float = if high_nodes.contains(&index) { DataType::F32 } else { low };
        let mut node = node;
        for (slot, input) in node.inputs.iter_mut().enumerate() {
            if input.is_empty() {
                continue;
            }
            // Scales of Resize are fp32 by definition.
            let float = if node.op_type == "Resize" && slot > 0 { DataType::F32 } else { float };
            let have = builder.types.get(input.as_str()).copied().unwrap_or(low);
            if !matches!(have, DataType::F32 | DataType::F16 | DataType::BF16) {
                continue;
            }
            if constants.contains_key(input.as_str()) {
                wanted.entry(input.clone()).or_default().insert(float);
                if float != DataType::F32 {
                    *input = format!("{input}/low");
                }
            } else if have != float {
                *input = builder.cast(input, float);
            }
        }
        let result = builder.result_type(&mut node, float);
        for (slot, output) in node.outputs.iter_mut().enumerate() {
            let dtype = if slot == 0 { result } else { float };
            if let Some(inner) = outputs.get(output.as_str()).filter(|_| dtype == low) {
                // Readers inside keep the low value; the graph's output is its fp32 copy.
                builder.types.insert(inner.clone(), dtype);
                builder.types.insert(output.clone(), DataType::F32);
                builder.casts.insert((output.clone(), low), inner.clone());
                output.clone_from(inner);
            } else {
                builder.types.insert(output.clone(), dtype);
            }
        }
        let made: Vec<String> = node.outputs.clone();
        builder.nodes.push(node);
        for name in made {
            if let Some((output, inner)) = outputs.iter().find(|(_, inner)| **inner == name) {
                let to = Attribute::int("to", DataType::F32 as i64);
                let cast =
                    Node::new(&format!("{output}/cast"), "Cast", &[inner.as_str()], &[output.as_str()]);
                builder.nodes.push(cast.with(to));
            }
        }
    }
    out.graph.nodes = builder.nodes;
    let mut initializers = Vec::new();
    for i in std::mem::take(&mut out.graph.initializers) {
        let Some(types) = wanted.get(&i.name) else {
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
    Ok(out)
}

/// Nodes that compute in fp32.
fn high_nodes(model: &Model) -> HashSet<usize> {
    let mut high = HashSet::new();
    let mut values: HashSet<&str> = HashSet::new();
    for (index, node) in model.graph.nodes.iter().enumerate() {
        let by_constant = node.inputs.iter().any(|i| HIGH_CONSTANTS.iter().any(|h| i.contains(h)));
        // Between the mean of squares and its root, an epsilon is added: it would vanish in a half.
        let epsilon = matches!(node.op_type.as_str(), "Add" | "Max")
            && node.inputs.iter().any(|i| {
                values.contains(i.as_str())
                    && model
                        .graph
                        .producer(i)
                        .is_some_and(|p| model.graph.nodes[p].op_type.starts_with("Reduce"))
            });
        // The sum of squares is divided out in fp32 too.
        let divide = matches!(node.op_type.as_str(), "Mul" | "Div")
            && node.inputs.iter().any(|i| {
                model
                    .graph
                    .producer(i)
                    .is_some_and(|p| matches!(model.graph.nodes[p].op_type.as_str(), "Sqrt" | "Reciprocal"))
            });
        // The activation of the time path: between two of its layers.
        let silu = matches!(node.op_type.as_str(), "Sigmoid" | "Mul")
            && node.inputs.iter().any(|i| i.contains("time_embedder"));
        if HIGH.contains(&node.op_type.as_str()) || by_constant || epsilon || divide || silu {
            high.insert(index);
            values.extend(node.outputs.iter().map(String::as_str));
        }
    }
    high
}

struct Caster {
    types: HashMap<String, DataType>,
    casts: HashMap<(String, DataType), String>,
    nodes: Vec<Node>,
}

impl Caster {
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
        let of = |i: usize| node.inputs.get(i).and_then(|n| self.types.get(n)).copied();
        match node.op_type.as_str() {
            "Cast" => {
                let code = node.int("to").unwrap_or(1);
                let to = DataType::from_code(code).unwrap_or(DataType::F32);
                if to == DataType::F32 && float != DataType::F32 {
                    node.attributes = vec![Attribute::int("to", float as i64)];
                    return float;
                }
                to
            }
            "QuantizeLinear" => of(2).unwrap_or(DataType::U8),
            "DequantizeLinear" => float,
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Not"
            | "IsNaN" => DataType::Bool,
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
}

fn is_float(t: DataType) -> bool {
    matches!(t, DataType::F32 | DataType::F16 | DataType::BF16)
}

fn convert(i: &Initializer, low: DataType) -> Result<Initializer, QuantError> {
    let values = i.to_f32()?;
    let bytes = values
        .iter()
        .flat_map(|&v| match low {
            DataType::F16 => f16::from_f32(v.clamp(-65_504.0, 65_504.0)).to_bits().to_le_bytes(),
            _ => bf16::from_f32(v).to_bits().to_le_bytes(),
        })
        .collect();
    Ok(Initializer::from_bytes(format!("{}/low", i.name), low, &i.shape, bytes))
}
