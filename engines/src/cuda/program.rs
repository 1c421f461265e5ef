//! An ONNX graph as steps that kernels can do.
//!
//! Groups of nodes that one kernel does at once are found by their shape, from the last node backwards; what is in
//! between is dropped where nothing else reads it, so a graph that looks different runs all the same, in more steps.
//!
//! | step | nodes |
//! |---|---|
//! | linear | `MatMul` with a constant, `Add` of a constant, `Gelu` or `x Sigmoid(x)` |
//! | product of codes | the same between `QuantizeLinear`, `DequantizeLinear` and a constant of codes |
//! | attention | `Softmax(scale q k + bias) v` with the transposes around it |
//! | norm | the RMS norm spelled out; `LayerNormalization`, times `1 + scale`, plus shift |
//! | rotation | of the two halves of each head |
//! | `a + b c` | `Mul` and `Add` |
//! | convolution | `Conv`, and `Resize` by two before it |
//! | nothing | `Cast` from a float to a float: kernels choose the types of what they leave |
//! | the operators of opset 23 | `Attention` and `RotaryEmbedding` over rows of heads, `RMSNormalization` |
//! | norm of channels | division by `ReduceL2` (at least `Max`), `Mul` with a constant, `x Sigmoid(x)` |

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::CudaError;
use super::kernels::{Activation, ElementOp, Kernel};
use crate::onnx::{Attribute, AttributeValue, DataType, Graph, Initializer, Node, ValueInfo};

/// One step; its inputs are names of values, empty where an optional one is left out.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub op: Op,
    pub inputs: Vec<String>,
    pub output: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Op {
    /// `x`, `weight [k, n]`, `bias [n]` or nothing.
    Linear(Activation),
    /// Codes of `x`, codes of the weight `[k, n]`, `bias [n]` or nothing, scales of the columns or nothing. `scale` is that
    /// of `x` or, where columns have none of their own, of the product. Where codes are bytes, those of the weight lie as
    /// `[n, k]`.
    Coded {
        codes: Codes,
        scale: f32,
        activation: Activation,
    },
    /// `a`, `b`; leading axes broadcast.
    MatMul,
    /// `q`, `k`, `v` `[batch, n, heads, d]`, bias or nothing; the result is `[batch, n, heads, d]`. Where `rows_of` says
    /// how many heads there are, all of these are `[batch, n, heads * d]`.
    Attention {
        scale: f32,
        rows_of: Option<usize>,
    },
    /// `x`, weight, bias, scale and shift or nothing, over the last axis.
    Norm {
        centred: bool,
        epsilon: f32,
    },
    /// `x [batch, n, heads, d]`, `cos`, `sin` `[n, d / 2]`. Where `rows_of` says how many heads there are, `x` is
    /// `[batch, n, heads * d]`, and the tables are `[1, n, d / 2]`.
    Rotate {
        rows_of: Option<usize>,
    },
    /// `x [n, ci, h, w]`, weights `[co, ci, kh, kw]`, bias `[co]` or nothing. Pads are those of top, left, bottom, right.
    Conv {
        strides: [usize; 2],
        pads: [usize; 4],
        /// Whether [`Op::Enlarge`] comes first.
        enlarged: bool,
    },
    /// `x [n, c, h, w]` over its length along the channels, which is at least `least`, times `gamma` of `c` elements.
    ChannelNorm {
        least: f32,
        silu: bool,
    },
    /// Each pixel of `[n, c, h, w]` becomes a square of two by two.
    Enlarge,
    /// Over the last axis.
    Softmax,
    /// The mean, or the root of the sum of squares, over one axis.
    Reduce {
        axis: i64,
        keep: bool,
        root_of_squares: bool,
    },
    /// Table, indices; along the first axis.
    Gather,
    /// Arithmetic by element with broadcasting.
    Element(ElementOp),
    /// 0 copies a size, -1 is inferred.
    Reshape(Vec<i64>),
    Transpose(Vec<usize>),
    Slice {
        axis: i64,
        start: i64,
        end: i64,
    },
    Concat {
        axis: i64,
    },
}

/// What quantised values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codes {
    /// Signed bytes.
    Byte,
    /// Values of E4M3, which bf16 has too.
    E4m3,
}

/// Steps in order, and what they read.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub steps: Vec<Step>,
    /// Values that matrix products and attention read: kept in bf16 where those run in bf16.
    pub products: HashSet<String>,
    /// Weights of bytes that lie transposed, `[n, k]`.
    pub transposed: HashSet<String>,
}

impl Program {
    /// The steps that the outputs of a graph depend on.
    ///
    /// # Errors
    /// [`CudaError::Operators`] naming every operator without a kernel, with the first node that has it.
    pub fn of(graph: &Graph) -> Result<Program, CudaError> {
        let graph = &without_casts(graph);
        let mut finder = Finder::new(graph);
        let mut unknown: Vec<(String, String)> = Vec::new();
        for node in &graph.nodes {
            match finder.step(node) {
                Some(step) => {
                    finder.steps.insert(&node.outputs[0], step);
                }
                None if unknown.iter().any(|(op, _)| *op == node.op_type) => {}
                None => unknown.push((node.op_type.clone(), node.name.clone())),
            }
        }
        if !unknown.is_empty() {
            let named = unknown.iter().map(|(op, name)| format!("{op} (node {name:?})")).collect();
            return Err(CudaError::Operators(named));
        }
        let mut wanted: HashSet<String> = graph.outputs.iter().map(|o| o.name.clone()).collect();
        let mut steps = Vec::new();
        for node in graph.nodes.iter().rev() {
            let Some(step) = finder.steps.remove(node.outputs[0].as_str()) else { continue };
            if wanted.contains(&step.output) {
                wanted.extend(step.inputs.iter().filter(|i| !i.is_empty()).cloned());
                steps.push(step);
            }
        }
        steps.reverse();
        let fits = |weight: &str| {
            finder.constants.get(weight).is_some_and(|c| match &c.shape[..] {
                &[_, channels, height, width] => {
                    (channels * height * width).is_multiple_of(8)
                        && height == width
                        && Kernel::conv_bf16(height).is_some()
                }
                sizes => sizes.iter().all(|size| size.is_multiple_of(8)),
            })
        };
        let products = products(&steps, &fits);
        let of_bytes = |s: &&Step| matches!(s.op, Op::Coded { codes: Codes::Byte, .. });
        let transposed = steps.iter().filter(of_bytes).map(|s| s.inputs[1].clone()).collect();
        Ok(Program { steps, products, transposed })
    }
}

/// The graph without casts between floats: what they make is read where it comes from. One that the graph gives stays.
fn without_casts(graph: &Graph) -> Cow<'_, Graph> {
    let integers = |i: &&ValueInfo| !matches!(i.dtype, Some(DataType::F32 | DataType::F16 | DataType::BF16));
    let integers: HashSet<&str> = graph.inputs.iter().filter(integers).map(|i| i.name.as_str()).collect();
    let plain = |n: &Node| {
        let float = n.int("to").is_some_and(|to| FLOATS.iter().any(|f| *f as i64 == to));
        n.op_type == "Cast" && float && n.inputs.len() == 1 && !integers.contains(n.inputs[0].as_str())
    };
    if !graph.nodes.iter().any(plain) {
        return Cow::Borrowed(graph);
    }
    let mut out = graph.clone();
    let mut sources: HashMap<String, String> = HashMap::new();
    out.nodes.clear();
    for node in &graph.nodes {
        let mut node = node.clone();
        for input in &mut node.inputs {
            if let Some(source) = sources.get(input) {
                input.clone_from(source);
            }
        }
        if plain(&node) {
            sources.insert(node.outputs[0].clone(), node.inputs[0].clone());
            if !graph.outputs.iter().any(|o| o.name == node.outputs[0]) {
                continue;
            }
            node = Node::new(&node.name, "Identity", &[&node.inputs[0]], &[&node.outputs[0]]);
        }
        out.nodes.push(node);
    }
    Cow::Owned(out)
}

/// Types of floats; what is kept of them is the kernels' choice.
const FLOATS: [DataType; 3] = [DataType::F32, DataType::F16, DataType::BF16];

/// What products read, and what that is a part or another form of. Layers whose weights do not fit the tensor cores
/// gain nothing from bf16 and are left out.
fn products(steps: &[Step], fits: &dyn Fn(&str) -> bool) -> HashSet<String> {
    let mut found: HashSet<String> = HashSet::new();
    for step in steps.iter().rev() {
        let read = match &step.op {
            Op::Linear(_) | Op::Conv { .. } if !fits(&step.inputs[1]) => &[],
            Op::Linear(_) | Op::Conv { .. } | Op::MatMul => &step.inputs[..2],
            Op::Attention { .. } => &step.inputs[..3],
            Op::Reshape(_) | Op::Transpose(_) | Op::Slice { .. } | Op::Concat { .. } | Op::Enlarge
                if found.contains(&step.output) =>
            {
                &step.inputs[..]
            }
            _ => &[],
        };
        found.extend(read.iter().cloned());
    }
    found
}

/// Looks for groups of nodes.
struct Finder<'a> {
    makers: HashMap<&'a str, &'a Node>,
    /// How often a value is read.
    readers: HashMap<&'a str, usize>,
    constants: HashMap<&'a str, &'a Initializer>,
    /// Steps by their outputs.
    steps: HashMap<&'a str, Step>,
}

/// Both orders of a node's two inputs.
fn either(node: &Node) -> [(&str, &str); 2] {
    let (a, b) = (node.inputs[0].as_str(), node.inputs[1].as_str());
    [(a, b), (b, a)]
}

/// Fewer inputs than this are a damaged file.
fn least_inputs(op: &str) -> usize {
    match op {
        "Add" | "Sub" | "Mul" | "Div" | "Max" | "Pow" | "MatMul" | "Gather" | "Reshape" | "Conv" => 2,
        "QuantizeLinear" | "DequantizeLinear" | "RMSNormalization" => 2,
        "Resize" | "Attention" | "RotaryEmbedding" => 3,
        _ => 1,
    }
}

fn step(op: Op, inputs: &[&str], node: &Node) -> Step {
    let inputs = inputs.iter().map(|&i| i.to_owned()).collect();
    Step { op, inputs, output: node.outputs[0].clone() }
}

fn float(node: &Node, name: &str, default: f32) -> f32 {
    match node.attribute(name) {
        Some(AttributeValue::Float(v)) => *v,
        _ => default,
    }
}

fn ints<'n>(node: &'n Node, name: &str) -> Option<&'n [i64]> {
    match node.attributes.iter().find(|a: &&Attribute| a.name == name).map(|a| &a.value)? {
        AttributeValue::Ints(v) => Some(v),
        _ => None,
    }
}

impl<'a> Finder<'a> {
    fn new(graph: &'a Graph) -> Self {
        let mut readers: HashMap<&str, usize> = HashMap::new();
        let read = graph.nodes.iter().flat_map(|n| n.inputs.iter());
        for name in read.chain(graph.outputs.iter().map(|o| &o.name)) {
            *readers.entry(name).or_default() += 1;
        }
        let whole = graph.nodes.iter().filter(|n| n.inputs.len() >= least_inputs(&n.op_type));
        Finder {
            makers: whole.flat_map(|n| n.outputs.iter().map(move |o| (o.as_str(), n))).collect(),
            readers,
            constants: graph.initializers.iter().map(|i| (i.name.as_str(), i)).collect(),
            steps: HashMap::new(),
        }
    }

    /// The node that makes `value`, where it is one of these operators.
    fn made(&self, value: &str, op: &str) -> Option<&'a Node> {
        self.makers.get(value).copied().filter(|n| n.op_type == op)
    }

    fn integers(&self, value: &str) -> Option<Vec<i64>> {
        self.constants.get(value)?.to_i64().ok()
    }

    fn one_integer(&self, value: &str) -> Option<i64> {
        match self.integers(value)?.as_slice() {
            &[v] => Some(v),
            _ => None,
        }
    }

    fn number(&self, value: &str) -> Option<f32> {
        let constant =
            self.constants.get(value).filter(|c| c.elements() == 1 && FLOATS.contains(&c.dtype))?;
        constant.to_f32().ok()?.first().copied()
    }

    fn rank_of_constant(&self, value: &str) -> Option<usize> {
        self.constants.get(value).map(|c| c.shape.len())
    }

    /// The input of a transposition in this order.
    fn transposed(&self, value: &str, perm: &[i64]) -> Option<&'a str> {
        let node = self.made(value, "Transpose").filter(|n| ints(n, "perm") == Some(perm))?;
        Some(node.inputs[0].as_str())
    }

    /// What a node becomes, alone or with nodes before it. Long, since each operator is one arm.
    fn step(&self, node: &'a Node) -> Option<Step> {
        if !node.domain.is_empty()
            || node.outputs.len() != 1
            || node.inputs.len() < least_inputs(&node.op_type)
        {
            return None;
        }
        let inputs: Vec<&str> = node.inputs.iter().map(String::as_str).collect();
        let element = |op| Some(step(Op::Element(op), &inputs, node));
        match node.op_type.as_str() {
            "Add" => self
                .modulated(node)
                .or_else(|| self.rotation(node))
                .or_else(|| self.biased(node))
                .or_else(|| self.product_added(node))
                .or_else(|| element(ElementOp::Add)),
            "Mul" => self
                .rms_norm(node)
                .or_else(|| self.channel_norm(node))
                .or_else(|| self.silu(node))
                .or_else(|| element(ElementOp::Multiply)),
            "Sub" => element(ElementOp::Subtract),
            "Div" => element(ElementOp::Divide),
            "Max" if inputs.len() == 2 => element(ElementOp::Maximum),
            "Neg" => element(ElementOp::Negate),
            "Sqrt" => element(ElementOp::Sqrt),
            "Reciprocal" => element(ElementOp::Reciprocal),
            "Sigmoid" => element(ElementOp::Sigmoid),
            "Identity" => element(ElementOp::Copy),
            "Pow" if self.number(inputs[1]) == Some(2.0) => {
                Some(step(Op::Element(ElementOp::Square), &inputs[..1], node))
            }
            "Gelu" => {
                let tanh =
                    matches!(node.attribute("approximate"), Some(AttributeValue::String(s)) if s == b"tanh");
                let fused = self.activated(node, inputs[0], 1, Activation::GeluTanh);
                tanh.then(|| fused.or_else(|| element(ElementOp::GeluTanh)))?
            }
            "QuantizeLinear" => {
                let op = match self.codes(node)? {
                    Codes::Byte => ElementOp::ToByte,
                    Codes::E4m3 => ElementOp::ToE4m3,
                };
                self.number(inputs[1])?;
                Some(step(Op::Element(op), &inputs[..2], node))
            }
            "DequantizeLinear" => {
                self.codes(node)?;
                self.scales_of(node)?;
                Some(step(Op::Element(ElementOp::Multiply), &inputs[..2], node))
            }
            "MatMul" if self.made(inputs[1], "DequantizeLinear").is_some() => {
                self.coded(node).or_else(|| Some(step(Op::MatMul, &inputs, node)))
            }
            "MatMul" if self.rank_of_constant(inputs[1]) == Some(2) => {
                Some(step(Op::Linear(Activation::None), &[inputs[0], inputs[1], ""], node))
            }
            "MatMul" => Some(step(Op::MatMul, &inputs, node)),
            "Softmax" => (node.int("axis").unwrap_or(-1) == -1).then(|| step(Op::Softmax, &inputs, node)),
            "LayerNormalization" => self.layer_norm(node, ["", ""]),
            "RMSNormalization" => {
                let op = Op::Norm { centred: false, epsilon: float(node, "epsilon", 1e-5) };
                let last = node.int("axis").unwrap_or(-1) == -1;
                last.then(|| step(op, &[inputs[0], inputs[1], "", "", ""], node))
            }
            "RotaryEmbedding" => {
                let plain =
                    ["interleaved", "rotary_embedding_dim"].iter().all(|a| node.int(a).unwrap_or(0) == 0);
                let rows_of = usize::try_from(node.int("num_heads")?).ok().filter(|heads| *heads > 0)?;
                let op = Op::Rotate { rows_of: Some(rows_of) };
                (plain && inputs.len() == 3).then(|| step(op, &inputs, node))
            }
            "Attention" => self.operator_attention(node),
            "ReduceMean" | "ReduceL2" => {
                let axis = self.one_integer(inputs.get(1)?)?;
                let keep = node.int("keepdims").unwrap_or(1) == 1;
                let op = Op::Reduce { axis, keep, root_of_squares: node.op_type == "ReduceL2" };
                Some(step(op, &inputs[..1], node))
            }
            "Gather" => (node.int("axis").unwrap_or(0) == 0).then(|| step(Op::Gather, &inputs, node)),
            "Reshape" => {
                let zero_copies = node.int("allowzero").unwrap_or(0) == 0;
                let sizes = self.integers(inputs[1]).filter(|_| zero_copies)?;
                Some(step(Op::Reshape(sizes), &inputs[..1], node))
            }
            "Transpose" => self.attention(node).or_else(|| {
                let perm =
                    ints(node, "perm")?.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<_>>()?;
                Some(step(Op::Transpose(perm), &inputs, node))
            }),
            "Slice" => {
                let [start, end, axis] = [1, 2, 3].map(|i| inputs.get(i).and_then(|v| self.one_integer(v)));
                let steps_by_one = inputs.get(4).is_none_or(|v| self.one_integer(v) == Some(1));
                let op = Op::Slice { axis: axis?, start: start?, end: end? };
                steps_by_one.then(|| step(op, &inputs[..1], node))
            }
            "Concat" => Some(step(Op::Concat { axis: node.int("axis")? }, &inputs, node)),
            "Conv" => self.conv(node),
            "Resize" => self.doubles(node).then(|| step(Op::Enlarge, &inputs[..1], node)),
            _ => None,
        }
    }

    /// What a node quantises to, or reads: symmetric codes, each zero point 0.
    fn codes(&self, node: &Node) -> Option<Codes> {
        let zero = self.constants.get(node.inputs.get(2)?.as_str())?;
        let codes = match zero.dtype {
            DataType::I8 => Codes::Byte,
            DataType::F8E4M3 => Codes::E4m3,
            _ => return None,
        };
        let blocked = node.int("block_size").unwrap_or(0) != 0;
        (!blocked && zero.bytes().ok()?.iter().all(|&b| b == 0)).then_some(codes)
    }

    /// How many scales a `DequantizeLinear` has: one, or one for each element of the last axis.
    fn scales_of(&self, node: &Node) -> Option<usize> {
        let scales = self.constants.get(node.inputs[1].as_str())?;
        let rank = self.rank_of_constant(&node.inputs[0]);
        match scales.shape[..] {
            [] => Some(1),
            [n] => {
                let axis = node.int("axis").unwrap_or(1);
                (axis == -1 || usize::try_from(axis).ok()? + 1 == rank?).then_some(n)
            }
            _ => None,
        }
    }

    /// A product of codes: what is quantised is multiplied as it is, and scaled afterwards.
    fn coded(&self, root: &Node) -> Option<Step> {
        let [x, weight] = [0, 1].map(|i| self.made(&root.inputs[i], "DequantizeLinear"));
        let (x, weight) = (x?, weight?);
        let (quantised, codes) = (self.made(&x.inputs[0], "QuantizeLinear")?, self.codes(x)?);
        let same = self.codes(quantised)? == codes && self.codes(weight)? == codes;
        let scale = self.number(&x.inputs[1])?;
        // Read by nothing else, so that they can lie as the kernel wants them.
        let alone =
            [&weight.inputs[0], &weight.outputs[0]].iter().all(|v| self.readers.get(v.as_str()) == Some(&1));
        let &[k, n] = &self.constants.get(weight.inputs[0].as_str())?.shape[..] else { return None };
        let (fits, scale, scales) = match codes {
            Codes::Byte => {
                (k % 16 == 0 && n % 2 == 0 && self.scales_of(weight)? == n, scale, weight.inputs[1].as_str())
            }
            Codes::E4m3 => (k % 8 == 0 && n % 8 == 0, scale * self.number(&weight.inputs[1])?, ""),
        };
        (same && alone && fits).then(|| {
            let op = Op::Coded { codes, scale, activation: Activation::None };
            step(op, &[&x.inputs[0], &weight.inputs[0], "", scales], root)
        })
    }

    /// A convolution of pictures, whole: neither in groups nor dilated.
    fn conv(&self, node: &Node) -> Option<Step> {
        let [x, weights] = [0, 1].map(|i| node.inputs[i].as_str());
        let rank = self.rank_of_constant(weights)?;
        let plain = ints(node, "dilations").is_none_or(|d| d.iter().all(|&d| d == 1))
            && node.int("group").unwrap_or(1) == 1
            && match node.attribute("auto_pad") {
                None => true,
                Some(AttributeValue::String(s)) => s == b"NOTSET",
                Some(_) => false,
            };
        let numbers = |name: &str, default: &[usize]| match ints(node, name) {
            None => Some(default.to_vec()),
            Some(given) => given.iter().map(|&n| usize::try_from(n).ok()).collect(),
        };
        let strides =
            numbers("strides", &[1, 1])?.try_into().ok().filter(|s: &[usize; 2]| !s.contains(&0))?;
        let pads = numbers("pads", &[0; 4])?.try_into().ok()?;
        let enlarged =
            self.readers.get(x) == Some(&1) && self.steps.get(x).is_some_and(|s| s.op == Op::Enlarge);
        let from = if enlarged { self.made(x, "Resize")?.inputs[0].as_str() } else { x };
        let bias = node.inputs.get(2).map_or("", String::as_str);
        let op = Op::Conv { strides, pads, enlarged };
        (plain && rank == 4).then(|| step(op, &[from, weights, bias], node))
    }

    /// Whether a `Resize` doubles height and width by repeating pixels.
    fn doubles(&self, node: &Node) -> bool {
        let text = |name: &str, wanted: &str| match node.attribute(name) {
            Some(AttributeValue::String(s)) => s == wanted.as_bytes(),
            _ => false,
        };
        let scales = self.constants.get(node.inputs[2].as_str()).and_then(|c| c.to_f32().ok());
        node.inputs.len() == 3
            && scales.as_deref() == Some(&[1.0, 1.0, 2.0, 2.0])
            && text("mode", "nearest")
            && text("coordinate_transformation_mode", "asymmetric")
            && text("nearest_mode", "floor")
    }

    /// `x / max(|x|, least) gamma`, the length over the channels of pictures.
    fn channel_norm(&self, root: &Node) -> Option<Step> {
        either(root).into_iter().find_map(|(unit, gamma)| {
            matches!(self.constants.get(gamma)?.shape[..], [1, _, 1, 1]).then_some(())?;
            let unit = self.made(unit, "Div")?;
            let (x, most) = (unit.inputs[0].as_str(), self.made(&unit.inputs[1], "Max")?);
            let (length, least) = either(most)
                .into_iter()
                .find_map(|(length, least)| Some((self.made(length, "ReduceL2")?, self.number(least)?)))?;
            let keeps = length.int("keepdims").unwrap_or(1) == 1;
            let of_x = length.inputs[0] == x && self.one_integer(length.inputs.get(1)?) == Some(1);
            (keeps && of_x).then(|| step(Op::ChannelNorm { least, silu: false }, &[x, gamma], root))
        })
    }

    fn layer_norm(&self, node: &Node, [scale, shift]: [&str; 2]) -> Option<Step> {
        let input = |i: usize| node.inputs.get(i).map_or("", String::as_str);
        let op = Op::Norm { centred: true, epsilon: float(node, "epsilon", 1e-5) };
        let last = node.int("axis").unwrap_or(-1) == -1;
        last.then(|| step(op, &[input(0), input(1), input(2), scale, shift], node))
    }

    /// `norm(x) (1 + scale) + shift`.
    fn modulated(&self, root: &Node) -> Option<Step> {
        for (scaled, shift) in either(root) {
            let Some(product) = self.made(scaled, "Mul") else { continue };
            for (normed, factor) in either(product) {
                let (Some(norm), Some(sum)) =
                    (self.made(normed, "LayerNormalization"), self.made(factor, "Add"))
                else {
                    continue;
                };
                for (scale, one) in either(sum) {
                    if self.number(one) == Some(1.0) {
                        let mut step = self.layer_norm(norm, [scale, shift])?;
                        step.output.clone_from(&root.outputs[0]);
                        return Some(step);
                    }
                }
            }
        }
        None
    }

    /// `x / sqrt(mean(x^2) + eps) w`.
    fn rms_norm(&self, root: &Node) -> Option<Step> {
        for (scaled, weight) in either(root) {
            if self.rank_of_constant(weight) != Some(1) {
                continue;
            }
            let Some(product) = self.made(scaled, "Mul") else { continue };
            for (x, inverse) in either(product) {
                let found = (|| {
                    let root = self.made(&self.made(inverse, "Reciprocal")?.inputs[0], "Sqrt")?;
                    let sum = self.made(&root.inputs[0], "Add")?;
                    either(sum).into_iter().find_map(|(mean, epsilon)| {
                        let epsilon = self.number(epsilon)?;
                        let mean = self.made(mean, "ReduceMean")?;
                        let square = self.made(&mean.inputs[0], "Pow")?;
                        let of_x = square.inputs[0] == x && self.number(&square.inputs[1]) == Some(2.0);
                        let last = self.one_integer(mean.inputs.get(1)?) == Some(-1);
                        (of_x && last).then_some(epsilon)
                    })
                })();
                if let Some(epsilon) = found {
                    let op = Op::Norm { centred: false, epsilon };
                    return Some(step(op, &[x, weight, "", "", ""], root));
                }
            }
        }
        None
    }

    /// `x cos + swapped(x) sin`, the tables `[cos | cos]` and `[-sin | sin]`.
    fn rotation(&self, root: &Node) -> Option<Step> {
        let last = |n: &Node| n.op_type == "Concat" && n.inputs.len() == 2 && n.int("axis") == Some(3);
        let halves = |value: &str| {
            let node = self.made(value, "Concat").filter(|n| last(n))?;
            Some((node.inputs[0].as_str(), node.inputs[1].as_str()))
        };
        let bounds = |value: &str| {
            let node = self.made(value, "Slice")?;
            let at = |i: usize| self.one_integer(node.inputs.get(i)?);
            (at(3) == Some(3)).then_some(())?;
            Some((node.inputs[0].as_str(), at(1)?, at(2)?))
        };
        let table = |value: &str| {
            let node = self.made(value, "Reshape")?;
            let sizes = self.integers(&node.inputs[1])?;
            matches!(sizes.as_slice(), [1, -1, 1, _]).then(|| (node.inputs[0].as_str(), sizes[3]))
        };
        for (straight, crossed) in either(root) {
            let (Some(straight), Some(crossed)) = (self.made(straight, "Mul"), self.made(crossed, "Mul"))
            else {
                continue;
            };
            for (x, cos) in either(straight) {
                for (swapped, sin) in either(crossed) {
                    let found = (|| {
                        let ((c1, c2), (minus, s), (second, first)) =
                            (halves(cos)?, halves(sin)?, halves(swapped)?);
                        let ((cos, half), (sin, _)) = (table(c1)?, table(s)?);
                        let negated = self.made(minus, "Neg")?.inputs[0] == s;
                        let ends = bounds(first)? == (x, 0, half) && bounds(second)? == (x, half, i64::MAX);
                        (c1 == c2 && negated && ends)
                            .then(|| step(Op::Rotate { rows_of: None }, &[x, cos, sin], root))
                    })();
                    if found.is_some() {
                        return found;
                    }
                }
            }
        }
        None
    }

    /// The linear layer without activation, of floats or of codes, that makes `value`.
    fn linear(&self, value: &str) -> Option<Step> {
        let plain = |s: &&Step| {
            matches!(s.op, Op::Linear(Activation::None) | Op::Coded { activation: Activation::None, .. })
        };
        self.steps.get(value).filter(plain).cloned()
    }

    /// A linear layer with its bias.
    fn biased(&self, root: &Node) -> Option<Step> {
        either(root).into_iter().find_map(|(product, bias)| {
            self.made(product, "MatMul")?;
            let mut linear = self.linear(product)?;
            let width = self.constants.get(linear.inputs[1].as_str())?.shape[1];
            let fits = self.constants.get(bias).is_some_and(|b| b.shape == [width]);
            bias.clone_into(&mut linear.inputs[2]);
            linear.output.clone_from(&root.outputs[0]);
            fits.then_some(linear)
        })
    }

    /// A linear layer whose result is read `times` times, all of them by its activation.
    fn activated(&self, root: &Node, x: &str, times: usize, activation: Activation) -> Option<Step> {
        let mut linear = self.linear(x)?;
        linear.output.clone_from(&root.outputs[0]);
        match &mut linear.op {
            Op::Linear(none) | Op::Coded { activation: none, .. } => *none = activation,
            _ => return None,
        }
        (self.readers.get(x) == Some(&times)).then_some(linear)
    }

    /// `x sigmoid(x)`.
    fn silu(&self, root: &Node) -> Option<Step> {
        either(root).into_iter().find_map(|(x, gate)| {
            (self.made(gate, "Sigmoid")?.inputs[0] == x).then_some(())?;
            let normed = || match self.steps.get(x)? {
                Step { op: Op::ChannelNorm { least, silu: false }, inputs, .. }
                    if self.readers.get(x) == Some(&2) =>
                {
                    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                    Some(step(Op::ChannelNorm { least: *least, silu: true }, &inputs, root))
                }
                _ => None,
            };
            self.activated(root, x, 2, Activation::Silu)
                .or_else(normed)
                .or_else(|| Some(step(Op::Element(ElementOp::Silu), &[x], root)))
        })
    }

    /// `a + b c`, where the product is nothing else.
    fn product_added(&self, root: &Node) -> Option<Step> {
        either(root).into_iter().find_map(|(product, a)| {
            let made = self.made(product, "Mul")?;
            let plain = self.steps.get(product)?.op == Op::Element(ElementOp::Multiply);
            let inputs = [a, &made.inputs[0], &made.inputs[1]];
            (plain && self.readers.get(product) == Some(&1))
                .then(|| step(Op::Element(ElementOp::AddProduct), &inputs, root))
        })
    }

    /// Softmax attention of heads, from the transposition of its result backwards.
    fn attention(&self, root: &Node) -> Option<Step> {
        (ints(root, "perm") == Some(&[0, 2, 1, 3])).then_some(())?;
        let weighted = self.made(&root.inputs[0], "MatMul")?;
        let weights =
            self.made(&weighted.inputs[0], "Softmax").filter(|s| s.int("axis").unwrap_or(-1) == -1)?;
        let v = self.transposed(&weighted.inputs[1], &[0, 2, 1, 3])?;
        let scores = weights.inputs[0].as_str();
        let (scores, bias) = match self.made(scores, "MatMul") {
            Some(scores) => (scores, ""),
            None => {
                let sum = self.made(scores, "Add")?;
                either(sum).into_iter().find_map(|(s, bias)| Some((self.made(s, "MatMul")?, bias)))?
            }
        };
        let k = self.transposed(&scores.inputs[1], &[0, 2, 3, 1])?;
        let q = scores.inputs[0].as_str();
        let scaled = self.made(q, "Mul").and_then(|product| {
            either(product).into_iter().find_map(|(q, scale)| Some((q, self.number(scale)?)))
        });
        let (q, scale) = scaled.unwrap_or((q, 1.0));
        let q = self.transposed(q, &[0, 2, 1, 3])?;
        Some(step(Op::Attention { scale, rows_of: None }, &[q, k, v, bias], root))
    }

    /// `Attention` of opset 23 over rows of as many heads each, with a stated scale and at most a bias.
    fn operator_attention(&self, node: &Node) -> Option<Step> {
        let plain = ["is_causal", "qk_matmul_output_mode"].iter().all(|a| node.int(a).unwrap_or(0) == 0)
            && float(node, "softcap", 0.0) == 0.0;
        let heads = node.int("q_num_heads").filter(|heads| node.int("kv_num_heads") == Some(*heads))?;
        let rows_of = usize::try_from(heads).ok().filter(|heads| *heads > 0)?;
        let Some(AttributeValue::Float(scale)) = node.attribute("scale") else { return None };
        let inputs: Vec<&str> = (0..4).map(|i| node.inputs.get(i).map_or("", String::as_str)).collect();
        let op = Op::Attention { scale: *scale, rows_of: Some(rows_of) };
        (plain && node.inputs.len() <= 4).then(|| step(op, &inputs, node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(nodes: Vec<Node>, constants: Vec<Initializer>, output: &str) -> Graph {
        let info = |name: &str| crate::onnx::ValueInfo {
            name: name.into(),
            dtype: Some(DataType::F32),
            shape: None,
        };
        Graph {
            nodes,
            initializers: constants,
            inputs: vec![info("x")],
            outputs: vec![info(output)],
            ..Graph::default()
        }
    }

    #[test]
    fn operators_without_a_kernel_are_named_all_at_once() {
        let nodes = vec![
            Node::new("first", "Tan", &["x"], &["a"]),
            Node::new("second", "Tan", &["a"], &["b"]),
            Node::new("third", "Erf", &["b"], &["c"]),
        ];
        let error = Program::of(&graph(nodes, vec![], "c")).unwrap_err().to_string();
        let wanted = r#"no CUDA kernel for Tan (node "first"), Erf (node "third"); use another backend"#;
        assert_eq!(error, wanted);
    }

    /// The shipped denoiser falls into the steps that have kernels of their own; nothing of what they replace is left.
    #[test]
    fn the_shipped_denoiser_is_fused_whole() {
        let file =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny/denoiser.onnx");
        let model = crate::onnx::Model::load(file).unwrap();
        let program = Program::of(&model.graph).unwrap();
        let count = |wanted: &dyn Fn(&Op) -> bool| program.steps.iter().filter(|s| wanted(&s.op)).count();
        assert_eq!(count(&|op| matches!(op, Op::Attention { .. })), 12);
        assert_eq!(count(&|op| matches!(op, Op::Rotate { .. })), 12);
        assert_eq!(count(&|op| matches!(op, Op::Norm { centred: false, .. })), 24);
        assert_eq!(count(&|op| matches!(op, Op::Norm { centred: true, .. })), 20);
        let modulated = |s: &&Step| matches!(s.op, Op::Norm { .. }) && !s.inputs[3].is_empty();
        assert_eq!(program.steps.iter().filter(modulated).count(), 13);
        assert_eq!(count(&|op| *op == Op::Linear(Activation::GeluTanh)), 7);
        assert_eq!(count(&|op| *op == Op::Element(ElementOp::AddProduct)), 12);
        assert_eq!(count(&|op| matches!(op, Op::Softmax | Op::MatMul | Op::Concat { .. })), 0);
        assert_eq!(count(&|op| matches!(op, Op::Element(ElementOp::Square | ElementOp::Reciprocal))), 0);
    }

    /// Operators of opset 23 as they are exported; forms that no kernel does are refused by name.
    #[test]
    fn larger_operators_are_taken_as_they_are_exported() {
        let constants = || vec![Initializer::from_f32("w", &[8], &[0.5; 8])];
        let heads = |name: &str| Attribute::int(name, 2);
        let attention = |more: &[Attribute]| {
            let node = Node::new("a", "Attention", &["r", "r", "r"], &["y"]);
            [heads("q_num_heads"), heads("kv_num_heads")]
                .into_iter()
                .chain(more.iter().cloned())
                .fold(node, Node::with)
        };
        let before = || {
            vec![
                Node::new("n", "RMSNormalization", &["x", "w"], &["n"])
                    .with(Attribute::float("epsilon", 0.25)),
                Node::new("r", "RotaryEmbedding", &["n", "cos", "sin"], &["r"]).with(heads("num_heads")),
            ]
        };
        let ops = |last: Node| {
            let program = Program::of(&graph([before(), vec![last]].concat(), constants(), "y"));
            program
                .map(|p| p.steps.iter().map(|s| s.op.clone()).collect::<Vec<_>>())
                .map_err(|e| e.to_string())
        };
        let (scale, rows_of) = (Attribute::float("scale", 0.5), Some(2));
        let wanted = [
            Op::Norm { centred: false, epsilon: 0.25 },
            Op::Rotate { rows_of },
            Op::Attention { scale: 0.5, rows_of },
        ];
        assert_eq!(ops(attention(std::slice::from_ref(&scale))).unwrap(), wanted);
        let refused = r#"no CUDA kernel for Attention (node "a"); use another backend"#;
        for more in [
            vec![],
            vec![scale.clone(), Attribute::int("is_causal", 1)],
            vec![scale, Attribute::float("softcap", 1.0)],
        ] {
            assert_eq!(ops(attention(&more)).unwrap_err(), refused, "{more:?}");
        }
    }

    /// Codes are multiplied as codes, with bias and activation, whatever casts there are; where their sizes do not fit the
    /// tensor cores, they are restored first.
    #[test]
    fn products_of_codes_are_found() {
        let check = |dtype: DataType, columns: usize, [k, n]: [usize; 2], wanted: &[Op]| {
            let scales = vec![0.5; columns];
            let shape: &[usize] = if columns == 1 { &[] } else { &[columns] };
            let zeros = |name: &str, shape: &[usize]| {
                Initializer::from_bytes(name, dtype, shape, vec![0; shape.iter().product()])
            };
            let half = |name: &str, shape: &[usize], value: f32| {
                let bytes = half::f16::from_f32(value).to_le_bytes();
                let count = shape.iter().product();
                Initializer::from_bytes(name, DataType::F16, shape, vec![bytes; count].concat())
            };
            let constants = vec![
                half("s", &[], 0.25),
                zeros("z", &[]),
                zeros("packed", &[k, n]),
                Initializer::from_f32("ws", shape, &scales),
                zeros("wz", shape),
                half("b", &[n], 1.0),
            ];
            let axis = Attribute::int("axis", 1);
            let cast = |to: DataType| Attribute::int("to", to as i64);
            let nodes = vec![
                Node::new("low", "Cast", &["x"], &["low"]).with(cast(DataType::F16)),
                Node::new("q", "QuantizeLinear", &["low", "s", "z"], &["q"]),
                Node::new("d", "DequantizeLinear", &["q", "s", "z"], &["d"]),
                Node::new("w", "DequantizeLinear", &["packed", "ws", "wz"], &["w"]).with(axis),
                Node::new("m", "MatMul", &["d", "w"], &["m"]),
                Node::new("a", "Add", &["m", "b"], &["a"]),
                Node::new("sigmoid", "Sigmoid", &["a"], &["sigmoid"]),
                Node::new("silu", "Mul", &["a", "sigmoid"], &["silu"]),
                Node::new("y", "Cast", &["silu"], &["y"]).with(cast(DataType::F32)),
            ];
            let program = Program::of(&graph(nodes, constants, "y")).unwrap();
            assert_eq!(program.steps.iter().map(|s| s.op.clone()).collect::<Vec<_>>(), wanted, "{dtype:?}");
            assert_eq!(program.steps[0].inputs[0], "x", "without the cast");
            program
        };
        let (byte, copy) = (Op::Element(ElementOp::ToByte), Op::Element(ElementOp::Copy));
        let coded = |codes, scale| Op::Coded { codes, scale, activation: Activation::Silu };
        let wanted = [byte.clone(), coded(Codes::Byte, 0.25), copy.clone()];
        let program = check(DataType::I8, 24, [32, 24], &wanted);
        assert_eq!(program.steps[1].inputs, ["q", "packed", "b", "ws"]);
        assert!(program.transposed.contains("packed"));
        let e4m3 = Op::Element(ElementOp::ToE4m3);
        let program = check(DataType::F8E4M3, 1, [32, 24], &[e4m3, coded(Codes::E4m3, 0.125), copy.clone()]);
        assert!(program.transposed.is_empty());
        let (times, add) = (Op::Element(ElementOp::Multiply), Op::Element(ElementOp::Add));
        let silu = Op::Element(ElementOp::Silu);
        let wanted = [byte, times.clone(), times, Op::MatMul, add, silu, copy];
        let program = check(DataType::I8, 24, [20, 24], &wanted);
        assert!(program.transposed.is_empty());
    }

    /// A linear layer swallows its activation only where nothing else reads what is in between.
    #[test]
    fn activations_join_their_layer_where_alone() {
        let constants = || {
            vec![Initializer::from_f32("w", &[8, 8], &[0.5; 64]), Initializer::from_f32("b", &[8], &[1.0; 8])]
        };
        let mut nodes = vec![
            Node::new("m", "MatMul", &["x", "w"], &["m"]),
            Node::new("a", "Add", &["b", "m"], &["a"]),
            Node::new("s", "Sigmoid", &["a"], &["s"]),
            Node::new("y", "Mul", &["s", "a"], &["y"]),
        ];
        let program = Program::of(&graph(nodes.clone(), constants(), "y")).unwrap();
        let ops = |p: &Program| p.steps.iter().map(|s| s.op.clone()).collect::<Vec<_>>();
        assert_eq!(ops(&program), [Op::Linear(Activation::Silu)]);
        assert_eq!(program.steps[0].inputs, ["x", "w", "b"]);
        assert!(
            program.products.contains("w")
                && program.products.contains("x")
                && !program.products.contains("b")
        );

        nodes.push(Node::new("z", "Sub", &["y", "a"], &["z"]));
        let program = Program::of(&graph(nodes, constants(), "z")).unwrap();
        let wanted =
            [Op::Linear(Activation::None), Op::Element(ElementOp::Silu), Op::Element(ElementOp::Subtract)];
        assert_eq!(ops(&program), wanted);
    }
}
