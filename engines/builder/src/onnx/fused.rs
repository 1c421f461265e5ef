//! Graphs for GPU engines, in opset 23: what a network spells out node by node becomes one operator where the set has one.
//!
//! | operator | nodes |
//! |---|---|
//! | `Attention` | `Softmax(scale q k + bias) v`, the transposes around it and the joining of its heads |
//! | `RMSNormalization` | `x / sqrt(mean(x^2) + eps) w` |
//! | `RotaryEmbedding` | rotation of the two halves of each head |
//!
//! Heads stay where linear layers leave and want them, in rows of `[batch, tokens, heads * head_dim]`. The values are
//! those of the graph that went in; 16-bit floats come afterwards ([`crate::quant::to_float16`]). Our CUDA engine,
//! onnxruntime and rten have these operators; TensorRT is given the graphs of opset 21, which it fuses by itself.

use std::sync::Arc;

use mindseye_engines::onnx::{Attribute, AttributeValue, Dim, Model, Node};

use super::MemoryWeights;
use super::optimize::Pattern::{self, Either, Exactly, Filled, Integers, Node as Made, Value};
use super::optimize::{Fusion, Match, Replacement, Rewriter, inverse_rms, run_passes};
use super::weights::WeightSource;

/// The operator set that has the operators.
const OPSET: i64 = 23;
/// The file format that belongs to it.
const IR_VERSION: i64 = 11;

/// Queries, scaled or not, times keys: `[b, heads, nq, nk]`.
const SCORES: Pattern = Made(
    "",
    "MatMul",
    &[
        Either(&[
            Made("", "Mul", &[Made("turned q", "Transpose", &[Value("q")]), Value("scale")]),
            Made("turned q", "Transpose", &[Value("q")]),
        ]),
        Made("turned k", "Transpose", &[Value("k")]),
    ],
);

const ATTENTION: Fusion = Fusion {
    pattern: Made(
        "root",
        "Reshape",
        &[
            Made(
                "turned",
                "Transpose",
                &[Made(
                    "",
                    "MatMul",
                    &[
                        Made(
                            "weights",
                            "Softmax",
                            &[Either(&[Made("", "Add", &[SCORES, Value("bias")]), SCORES])],
                        ),
                        Made("turned v", "Transpose", &[Value("v")]),
                    ],
                )],
            ),
            Integers("whole"),
        ],
    ),
    replace: attention,
    allowed: |_, _| true,
};

const RMS_NORM: Fusion = Fusion {
    pattern: Made("root", "Mul", &[Made("", "Mul", &[Value("x"), inverse_rms!(Value("x"))]), Value("w")]),
    replace: rms_norm,
    allowed: |_, _| true,
};

const ROTATION: Fusion = Fusion {
    pattern: Made(
        "root",
        "Add",
        &[
            Made("", "Mul", &[Value("x"), Value("cos")]),
            Made(
                "",
                "Mul",
                &[
                    Made(
                        "swapped",
                        "Concat",
                        &[
                            Made(
                                "",
                                "Slice",
                                &[Value("x"), Integers("middle"), Exactly(&[i64::MAX]), Exactly(&[3])],
                            ),
                            Made(
                                "",
                                "Slice",
                                &[Value("x"), Exactly(&[0]), Integers("middle"), Exactly(&[3])],
                            ),
                        ],
                    ),
                    Value("sin"),
                ],
            ),
        ],
    ),
    replace: rotation,
    // Tables of `[1, tokens, half]` go with one batch.
    allowed: |rewriter, _| {
        let of = |dim: &Dim| matches!(dim, Dim::Symbol(name) if name == "batch");
        !rewriter.graph.inputs.iter().filter_map(|i| i.shape.as_ref()).flatten().any(of)
    },
};

/// Heads that are split and joined again.
const JOINED: Fusion = Fusion {
    pattern: Made(
        "root",
        "Reshape",
        &[Made("", "Reshape", &[Value("x"), Integers("split")]), Integers("joined")],
    ),
    replace: joined,
    allowed: |_, _| true,
};

/// The same network in opset 23, with fewer and larger operators.
#[must_use]
pub fn fused(model: &Model) -> Model {
    let mut out = model.clone();
    let weights: Arc<dyn WeightSource> = Arc::new(MemoryWeights::new());
    run_passes(&mut out.graph, &weights, &[&RMS_NORM, &ATTENTION, &ROTATION, &JOINED]);
    out.graph.value_infos.clear();
    out.graph.drop_unused_initializers();
    for (domain, version) in &mut out.opsets {
        if domain.is_empty() || domain == "ai.onnx" {
            *version = OPSET.max(*version);
        }
    }
    out.ir_version = IR_VERSION.max(out.ir_version);
    out
}

fn perm_is(rewriter: &Rewriter<'_>, value: &str, wanted: &[i64]) -> bool {
    let perm = rewriter.made_by(value).and_then(|n| n.attribute("perm"));
    matches!(perm, Some(AttributeValue::Ints(perm)) if perm == wanted)
}

/// A float constant of one element.
fn number(rewriter: &Rewriter<'_>, value: &str) -> Option<f32> {
    let constant = rewriter.constant(value).filter(|c| c.elements() == 1)?;
    constant.to_f32().ok()?.first().copied()
}

/// `value` of `[batch, tokens, heads, head_dim]` with its heads in one row.
fn in_rows(
    rewriter: &mut Rewriter<'_>,
    place: &str,
    value: &str,
    sizes: &str,
    nodes: &mut Vec<Node>,
) -> String {
    let node = rewriter.node(place, "Reshape", &[value, sizes]);
    nodes.push(node.clone());
    node.name
}

fn attention(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let same = [0, 2, 1, 3];
    let turned = perm_is(rewriter, found.get("turned q"), &same)
        && perm_is(rewriter, found.get("turned k"), &[0, 2, 3, 1])
        && perm_is(rewriter, found.get("turned v"), &same)
        && perm_is(rewriter, found.get("turned"), &same);
    let over_keys = matches!(rewriter.made_by(found.get("weights"))?.int("axis"), None | Some(-1 | 3));
    let (true, &[0, 0, width]) = (turned && over_keys, rewriter.integers(found.get("whole"))?.as_slice())
    else {
        return None;
    };
    let heads = heads_of(rewriter, found.get("q")).or_else(|| heads_of(rewriter, found.get("k")))?;
    let (scale, bias) = (found.get("scale"), found.get("bias"));
    let scale = if scale.is_empty() { 1.0 } else { number(rewriter, scale)? };
    let root = rewriter.made_by(found.get("root"))?.clone();
    (width % heads == 0).then_some(())?;
    let sizes = rewriter.integer_constant(&[0, 0, width]);
    let mut nodes = Vec::new();
    let mut inputs =
        ["q", "k", "v"].map(|x| in_rows(rewriter, &root.name, found.get(x), &sizes, &mut nodes)).to_vec();
    inputs.extend((!bias.is_empty()).then(|| bias.to_owned()));
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let mut node = rewriter.node(&root.name, "Attention", &inputs);
    node.attributes = vec![
        Attribute::float("scale", scale),
        Attribute::int("q_num_heads", heads),
        Attribute::int("kv_num_heads", heads),
    ];
    node.outputs = root.outputs;
    nodes.push(node);
    Some(Replacement::Nodes(nodes))
}

/// How many heads a value of `[batch, tokens, heads, head_dim]` has, by the sizes that it was last given.
fn heads_of(rewriter: &Rewriter<'_>, value: &str) -> Option<i64> {
    let node = rewriter.made_by(value)?;
    match node.op_type.as_str() {
        "Reshape" => match rewriter.integers(&node.inputs[1])?.as_slice() {
            &[_, _, heads, _] if heads > 0 => Some(heads),
            _ => None,
        },
        // Rotated; behind what was kept.
        "Add" | "Mul" | "Concat" => node.inputs.iter().find_map(|input| heads_of(rewriter, input)),
        _ => None,
    }
}

fn rms_norm(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let keeps = rewriter.made_by(found.get("mean"))?.int("keepdims").unwrap_or(1) == 1;
    let row = rewriter.constant(found.get("w")).is_some_and(|w| w.shape.len() == 1);
    let epsilon = number(rewriter, found.get("eps")).filter(|_| keeps && row)?;
    let root = rewriter.made_by(found.get("root"))?.clone();
    let mut node = Node::new(&root.name, "RMSNormalization", &[found.get("x"), found.get("w")], &[]);
    node.attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", epsilon)];
    node.outputs = root.outputs;
    Some(Replacement::Nodes(vec![node]))
}

fn rotation(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let last =
        |node: &&Node| node.op_type == "Concat" && node.inputs.len() == 2 && node.int("axis") == Some(3);
    let halves = |value: &str| {
        let node = rewriter.made_by(value).filter(last)?;
        Some((node.inputs[0].clone(), node.inputs[1].clone()))
    };
    let table = |value: &str| {
        let node = rewriter.made_by(value).filter(|n| n.op_type == "Reshape")?;
        match rewriter.integers(&node.inputs[1])?.as_slice() {
            &[1, -1, 1, half] => Some((node.inputs[0].clone(), half)),
            _ => None,
        }
    };
    halves(found.get("swapped"))?;
    let ((c, c2), (minus, s)) = (halves(found.get("cos"))?, halves(found.get("sin"))?);
    let negated = rewriter.made_by(&minus).is_some_and(|n| n.op_type == "Neg" && n.inputs[0] == s);
    let ((cos, half), (sin, sin_half)) = (table(&c)?, table(&s)?);
    let same = c == c2 && negated && half == sin_half && rewriter.integers(found.get("middle"))? == [half];
    let heads = heads_of(rewriter, found.get("x")).filter(|_| same)?;
    let root = rewriter.made_by(found.get("root"))?.clone();
    let (mut nodes, place) = (Vec::new(), root.name.as_str());
    let key = (cos.clone(), sin.clone());
    let (cos, sin) = if let Some(known) = rewriter.tables.get(&key) {
        known.clone()
    } else {
        let sizes = rewriter.integer_constant(&[1, -1, half]);
        let mut made = |table| in_rows(rewriter, place, table, &sizes, &mut nodes);
        let made = (made(&cos), made(&sin));
        rewriter.tables.insert(key, made.clone());
        made
    };
    let sizes = rewriter.integer_constant(&[0, 0, heads * 2 * half]);
    let x = in_rows(rewriter, place, found.get("x"), &sizes, &mut nodes);
    let mut node = rewriter.node(place, "RotaryEmbedding", &[&x, &cos, &sin]);
    node.attributes = vec![Attribute::int("num_heads", heads)];
    let sizes = rewriter.integer_constant(&[0, 0, heads, 2 * half]);
    let mut split = rewriter.node(place, "Reshape", &[&node.name, &sizes]);
    split.outputs = root.outputs.clone();
    nodes.extend([node, split]);
    Some(Replacement::Nodes(nodes))
}

fn joined(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let (split, sizes) = (rewriter.integers(found.get("split"))?, rewriter.integers(found.get("joined"))?);
    let (&[0, 0, heads, d], &[0, 0, width]) = (split.as_slice(), sizes.as_slice()) else { return None };
    (heads > 0 && d > 0 && heads * d == width).then_some(())?;
    let x = found.get("x");
    // The operator leaves its rows as it found them.
    if rewriter.made_by(x).is_some_and(|n| n.op_type == "RotaryEmbedding")
        && !rewriter.is_output(found.get("root"))
    {
        return Some(Replacement::Alias(x.to_owned()));
    }
    let root = rewriter.made_by(found.get("root"))?;
    let inputs = vec![x.to_owned(), root.inputs[1].clone()];
    Some(Replacement::Nodes(vec![Node { inputs, ..root.clone() }]))
}
