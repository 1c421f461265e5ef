//! State in 16 bits: streaming caches, keys and values never leave the device, so nothing asks for them in 32.

use mindseye_engines::backend::is_state;
use mindseye_engines::onnx::{Attribute, AttributeValue, DataType, Model, Node};

/// The type that a `Cast` casts to.
fn cast_to(node: &Node) -> Option<i64> {
    let to = node.attributes.iter().find(|a| a.name == "to").filter(|_| node.op_type == "Cast")?;
    match to.value {
        AttributeValue::Int(to) => Some(to),
        _ => None,
    }
}

fn rename(nodes: &mut [Node], from: &str, to: &str) {
    for value in nodes.iter_mut().flat_map(|n| n.inputs.iter_mut().chain(&mut n.outputs)) {
        if value == from {
            to.clone_into(value);
        }
    }
}

fn cast(name: String, from: &str, to: &str, dtype: DataType) -> Node {
    Node::new(&name, "Cast", &[from], &[to]).with(Attribute::int("to", dtype as i64))
}

/// Makes inputs and outputs of a 16-bit graph that are state ([`is_state`]) as narrow as the values inside.
pub(crate) fn narrow_state(model: &mut Model, low: DataType) {
    let graph = &mut model.graph;
    for input in graph.inputs.iter_mut().filter(|i| is_state(&i.name) && i.dtype == Some(DataType::F32)) {
        input.dtype = Some(low);
        narrow_input(&mut graph.nodes, &input.name, low);
    }
    for output in graph.outputs.iter_mut().filter(|o| is_state(&o.name) && o.dtype == Some(DataType::F32)) {
        output.dtype = Some(low);
        let name = output.name.clone();
        let Some(at) = graph.nodes.iter().position(|n| n.outputs.contains(&name)) else { continue };
        let inner = graph.nodes[at].inputs.first().cloned().unwrap_or_default();
        let made = graph.nodes.iter().any(|n| n.outputs.contains(&inner));
        if cast_to(&graph.nodes[at]) == Some(DataType::F32 as i64) && made {
            // What was widened at the edge only.
            graph.nodes.remove(at);
            rename(&mut graph.nodes, &inner, &name);
        } else {
            let wide = format!("{name}/wide");
            rename(&mut graph.nodes, &name, &wide);
            graph.nodes.insert(at + 1, cast(format!("{name}/narrow"), &wide, &name, low));
        }
    }
}

/// Casts to the narrow type are what the input is now; whatever else reads it wants it wide.
fn narrow_input(nodes: &mut Vec<Node>, name: &str, low: DataType) {
    let narrows = |n: &Node| n.inputs.iter().any(|i| i == name) && cast_to(n) == Some(low as i64);
    let wide = format!("{name}/wide");
    let mut wanted_wide = false;
    for node in nodes.iter_mut().filter(|n| !narrows(n)) {
        for input in node.inputs.iter_mut().filter(|i| *i == name) {
            input.clone_from(&wide);
            wanted_wide = true;
        }
    }
    while let Some(at) = nodes.iter().position(narrows) {
        let gone = nodes.remove(at);
        rename(nodes, &gone.outputs[0], name);
    }
    if wanted_wide {
        nodes.insert(0, cast(format!("{name}/widen"), name, &wide, DataType::F32));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::onnx::{MemoryWeights, denoiser_graph};
    use crate::quant::to_float16;
    use mindseye_engines::count::count_denoiser;
    use mindseye_engines::model::dit::DitConfig;
    use mindseye_engines::onnx::Dim;
    use mindseye_engines::session_denoiser::DenoiserKind;
    use mindseye_engines::target::Precision;

    fn config() -> DitConfig {
        DitConfig {
            in_channels: 4,
            out_channels: 4,
            latent_height: 2,
            latent_width: 2,
            heads: 2,
            head_dim: 6,
            layers: 2,
            ffn_dim: 16,
            text_dim: 8,
            text_len: 3,
            freq_dim: 8,
            ..DitConfig::SMALLEST
        }
    }

    /// Types of all values as the operators of these graphs give them, and that both inputs of each product and sum
    /// have one type.
    fn check_types(model: &Model, low: DataType) {
        let mut types: std::collections::HashMap<&str, DataType> = std::collections::HashMap::new();
        types.extend(model.graph.inputs.iter().map(|i| (i.name.as_str(), i.dtype.unwrap())));
        types.extend(model.graph.initializers.iter().map(|i| (i.name.as_str(), i.dtype)));
        for node in &model.graph.nodes {
            let floats: Vec<DataType> = node
                .inputs
                .iter()
                .filter(|i| !i.is_empty())
                .map(|i| *types.get(i.as_str()).unwrap_or_else(|| panic!("{}: {i} is made later", node.name)))
                .filter(|t| [DataType::F32, low].contains(t))
                .collect();
            if ["Concat", "MatMul", "Add", "Mul", "Sub"].contains(&node.op_type.as_str()) {
                assert!(
                    floats.windows(2).all(|w| w[0] == w[1]),
                    "{} {}: {floats:?}",
                    node.op_type,
                    node.name
                );
            }
            let result = match cast_to(node) {
                Some(to) if to == low as i64 => low,
                Some(to) if to == DataType::F32 as i64 => DataType::F32,
                Some(_) => DataType::I64,
                None if node.op_type == "Shape" => DataType::I64,
                None => floats.first().copied().unwrap_or(DataType::I64),
            };
            types.extend(node.outputs.iter().map(|o| (o.as_str(), result)));
        }
        for output in &model.graph.outputs {
            assert_eq!(Some(types[output.name.as_str()]), output.dtype, "{}", output.name);
        }
    }

    #[test]
    fn keys_and_values_become_narrow_and_the_rest_stays() {
        let cfg = config();
        let weights = count_denoiser(&cfg, 2, 0, 2);
        let mut all = MemoryWeights::new();
        for p in weights.params() {
            all.insert(p.name.clone(), p.shape.clone(), vec![0.1; p.shape.iter().product()]);
        }
        let weights = Arc::new(all);
        for (precision, low) in [(Precision::Fp16, DataType::F16), (Precision::Bf16, DataType::BF16)] {
            for kind in [DenoiserKind::Prefill, DenoiserKind::Cached] {
                let wide = denoiser_graph(&cfg, weights.clone(), kind, Dim::Fixed(1)).unwrap();
                let mut model = to_float16(&wide, precision).unwrap();
                check_types(&model, low);
                narrow_state(&mut model, low);
                check_types(&model, low);
                let state = |values: &[mindseye_engines::onnx::ValueInfo], narrow: bool| {
                    let of_kind = values.iter().filter(|v| is_state(&v.name));
                    of_kind.filter(|v| (v.dtype == Some(low)) == narrow).count()
                };
                let graph = &model.graph;
                let (ins, outs) = if kind == DenoiserKind::Cached { (4, 0) } else { (0, 4) };
                assert_eq!(
                    (state(&graph.inputs, true), state(&graph.outputs, true)),
                    (ins, outs),
                    "{kind:?}"
                );
                assert_eq!(state(&graph.inputs, false) + state(&graph.outputs, false), 0);
                let latents = graph.inputs.iter().find(|i| i.name == "latents").unwrap();
                assert_eq!(latents.dtype, Some(DataType::F32), "what the host gives stays wide");
            }
        }
    }
}
