//! Passes over a graph that was written down operation by operation.
//!
//! A fusion is data: a [`Pattern`] of nodes and constants, and what replaces the value at its root. A pass tries one
//! fusion at every node, in order. Values in between are replaced only where nothing else reads them, so a network
//! that uses one of them elsewhere keeps the longer form and the right result.
//!
//! | fusion | from | to |
//! |---|---|---|
//! | [`FOLD`] | a weight that is reshaped, transposed, cut or scaled | a stored constant |
//! | [`NORM_WEIGHT`], [`NORM_BIAS`] | a norm, then times a weight, then plus a weight | the norm's own inputs |
//! | [`ROTATION`] | rotation of adjacent channels | rotation of the two halves of each head |
//! | [`CHANNEL_ORDER`] | channels of a linear layer put into halves | rows of its weights in that order |
//!
//! Rotation pairs adjacent channels in the network. Strided access is slow everywhere, so each head's channels are put
//! into halves (first all first channels of the pairs, then all second ones), which costs nothing once the query and
//! key weights, their biases and norms are stored in that order. Scores are sums over channels and stay the same; a
//! graph in which anything but scores reads a rotated value is left as it is. Rotated keys that leave the graph (a
//! cache) are in this order, which the graph that takes them in shares. What was done to a weight is in its [`Origin`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mindseye_engines::onnx::{Attribute, AttributeValue, DataType, Graph, Initializer, Node, Origin, Step};

use super::Names;
use super::stored::stored_weight;
use super::weights::WeightSource;

/// What a value must be.
#[derive(Debug)]
pub(super) enum Pattern {
    /// Any value.
    Value(&'static str),
    /// A weight of the network.
    Weight(&'static str),
    /// A float constant all of whose elements are this number.
    Filled(&'static str, f32),
    /// An integer constant.
    Integers(&'static str),
    /// These integers.
    Exactly(&'static [i64]),
    /// The result of an operation on such inputs; the two inputs of `Add` and `Mul` in either order.
    Node(&'static str, &'static str, &'static [Pattern]),
    /// The first of these that fits.
    Either(&'static [Pattern]),
}

use Pattern::{Either, Exactly, Filled, Integers, Node as Made, Value, Weight};

/// What takes the place of the value at the root of a match.
pub(super) enum Replacement {
    /// Nodes, the last of which makes the value.
    Nodes(Vec<Node>),
    /// A value that exists already.
    Alias(String),
}

/// One rewriting rule.
pub(super) struct Fusion {
    /// What is looked for; names in it are keys of the match.
    pub pattern: Pattern,
    /// What replaces it; `None` where the sizes do not fit.
    pub replace: fn(&mut Rewriter<'_>, &Match) -> Option<Replacement>,
    /// Whether the graph as a whole allows it.
    pub allowed: fn(&Rewriter<'_>, &Pattern) -> bool,
}

/// Reshapes, transposes, cuts and scales of weights are done once, while the weight is written.
const FOLD: Fusion = Fusion {
    pattern: Either(&[
        Made("root", "Transpose", &[Weight("w")]),
        Made("root", "Reshape", &[Weight("w"), Integers("sizes")]),
        Made("root", "Slice", &[Weight("w"), Integers("starts"), Integers("ends"), Integers("axes")]),
        Made("root", "Mul", &[Weight("w"), Value("factor")]),
    ]),
    replace: fold,
    allowed: |_, _| true,
};

/// A norm without weights, times a weight.
const NORM_WEIGHT: Fusion = Fusion {
    pattern: Made(
        "root",
        "Mul",
        &[Made("norm", "LayerNormalization", &[Value("x"), Filled("ones", 1.0)]), Weight("w")],
    ),
    replace: |rewriter, found| rewriter.extended_norm(found, &["w"]),
    allowed: |_, _| true,
};

/// A norm with a weight but no bias, plus a weight.
const NORM_BIAS: Fusion = Fusion {
    pattern: Made(
        "root",
        "Add",
        &[Made("norm", "LayerNormalization", &[Value("x"), Weight("w")]), Weight("b")],
    ),
    replace: |rewriter, found| rewriter.extended_norm(found, &["w", "b"]),
    allowed: |_, _| true,
};

/// The channels of a pair, of `x[b, n, heads, head_dim]`.
macro_rules! channel {
    ($label:literal, $from:literal, $to:literal) => {
        Made(
            $label,
            "Slice",
            &[
                Made("pairs", "Reshape", &[Value("x"), Integers("split")]),
                Exactly(&[$from]),
                Exactly(&[$to]),
                Exactly(&[4]),
            ],
        )
    };
}

/// A product of one channel of the pair with the cosines or sines.
macro_rules! turned {
    ($channel:expr, $table:literal, $label:literal) => {
        Made("", "Mul", &[$channel, Made($label, "Reshape", &[Value($table), Integers("table")])])
    };
}

const ROTATION: Fusion = Fusion {
    pattern: Made(
        "root",
        "Reshape",
        &[
            Made(
                "joined",
                "Concat",
                &[
                    Made(
                        "",
                        "Sub",
                        &[
                            turned!(channel!("a", 0, 1), "cos", "cos4"),
                            turned!(channel!("b", 1, 2), "sin", "sin4"),
                        ],
                    ),
                    Made(
                        "",
                        "Add",
                        &[
                            turned!(channel!("a", 0, 1), "sin", "sin4"),
                            turned!(channel!("b", 1, 2), "cos", "cos4"),
                        ],
                    ),
                ],
            ),
            Integers("whole"),
        ],
    ),
    replace: rotate_halves,
    allowed: only_scores_read,
};

/// A linear layer, with or without a bias.
const LINEAR: Pattern = Either(&[
    Made("linear", "Add", &[Made("product", "MatMul", &[Value("in"), Weight("w")]), Weight("b")]),
    Made("linear", "MatMul", &[Value("in"), Weight("w")]),
]);

/// `1 / sqrt(mean(x^2) + eps)` over the last axis; the mean is called "mean".
macro_rules! inverse_rms {
    ($x:expr) => {
        Made(
            "",
            "Reciprocal",
            &[Made(
                "",
                "Sqrt",
                &[Made(
                    "",
                    "Add",
                    &[
                        Made(
                            "mean",
                            "ReduceMean",
                            &[Made("", "Pow", &[$x, Filled("two", 2.0)]), Exactly(&[-1])],
                        ),
                        Value("eps"),
                    ],
                )],
            )],
        )
    };
}
pub(super) use inverse_rms;

/// A norm over all channels: whatever their order, its factor is the same.
const NORMED: Pattern =
    Made("", "Mul", &[Made("scaled", "Mul", &[LINEAR, inverse_rms!(LINEAR)]), Weight("n")]);

const CHANNEL_ORDER: Fusion = Fusion {
    pattern: Made(
        "root",
        "Reshape",
        &[
            Made(
                "turned",
                "Transpose",
                &[Made(
                    "pairs",
                    "Reshape",
                    &[
                        Made("heads", "Reshape", &[Either(&[NORMED, LINEAR]), Integers("heads_of")]),
                        Integers("split"),
                    ],
                )],
            ),
            Integers("whole"),
        ],
    ),
    replace: order_weights,
    allowed: |_, _| true,
};

/// All passes, in order; weights are folded first, since other fusions look for them.
const PASSES: [&Fusion; 5] = [&FOLD, &NORM_WEIGHT, &NORM_BIAS, &ROTATION, &CHANNEL_ORDER];

/// Runs all passes.
pub(super) fn optimize(graph: &mut Graph, weights: &Arc<dyn WeightSource>) {
    run_passes(graph, weights, &PASSES);
    name_weights(graph);
}

/// Runs passes over the whole graph, in order.
pub(super) fn run_passes(graph: &mut Graph, weights: &Arc<dyn WeightSource>, passes: &[&Fusion]) {
    for fusion in passes {
        let rewriter = Rewriter::new(graph, weights);
        if (fusion.allowed)(&rewriter, &fusion.pattern) {
            rewriter.run(fusion);
            graph.drop_dead_nodes();
        }
    }
}

/// What a pattern was found to be: names of values by the pattern's names.
#[derive(Clone, Debug, Default)]
pub(super) struct Match {
    values: HashMap<&'static str, String>,
    /// Indices of the nodes that belong to it.
    nodes: HashSet<usize>,
}

impl Match {
    /// Binds a name; false where it is bound to another value. The empty name is never bound.
    fn bind(&mut self, name: &'static str, value: &str) -> bool {
        if name.is_empty() {
            return true;
        }
        self.values.entry(name).or_insert_with(|| value.to_owned()) == value
    }

    pub fn get(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }
}

/// One pass over a graph.
pub(super) struct Rewriter<'a> {
    pub graph: &'a mut Graph,
    weights: &'a Arc<dyn WeightSource>,
    /// By value: the node that makes it, as an index of the graph before this pass.
    makers: HashMap<String, usize>,
    /// By value: the nodes that read it, once for each time.
    readers: HashMap<String, Vec<usize>>,
    constants: HashMap<String, usize>,
    outputs: HashSet<String>,
    /// All names of nodes and values.
    names: Names,
    /// Values that were replaced by others.
    aliases: HashMap<String, String>,
    /// Folded weights by origin.
    folded: HashMap<String, String>,
    /// Rotary tables as a rotation wants them, by cosines and sines.
    pub tables: HashMap<(String, String), (String, String)>,
}

impl<'a> Rewriter<'a> {
    fn new(graph: &'a mut Graph, weights: &'a Arc<dyn WeightSource>) -> Self {
        let mut out = Self {
            makers: HashMap::new(),
            readers: HashMap::new(),
            constants: HashMap::new(),
            outputs: graph.outputs.iter().map(|o| o.name.clone()).collect(),
            names: Names::default(),
            aliases: HashMap::new(),
            folded: HashMap::new(),
            tables: HashMap::new(),
            weights,
            graph,
        };
        for input in &out.graph.inputs {
            out.names.insert(&input.name);
        }
        for (at, constant) in out.graph.initializers.iter().enumerate() {
            out.names.insert(&constant.name);
            out.constants.insert(constant.name.clone(), at);
        }
        for (at, node) in out.graph.nodes.iter().enumerate() {
            out.names.insert(&node.name);
            for output in &node.outputs {
                out.names.insert(output);
                out.makers.insert(output.clone(), at);
            }
            for input in &node.inputs {
                out.readers.entry(input.clone()).or_default().push(at);
            }
        }
        out
    }

    /// Tries the fusion at every node.
    fn run(mut self, fusion: &Fusion) {
        let count = self.graph.nodes.len();
        let mut made: Vec<Vec<Node>> = Vec::with_capacity(count);
        for at in 0..count {
            // What an earlier match replaced is read under its new name.
            for slot in 0..self.graph.nodes[at].inputs.len() {
                let old = &self.graph.nodes[at].inputs[slot];
                if let Some(new) = self.aliases.get(old).cloned() {
                    self.readers.entry(new.clone()).or_default().push(at);
                    self.graph.nodes[at].inputs[slot] = new;
                }
            }
            let replacement =
                self.find(at, &fusion.pattern).and_then(|found| (fusion.replace)(&mut self, &found));
            made.push(match replacement {
                None => vec![self.graph.nodes[at].clone()],
                Some(Replacement::Nodes(nodes)) => nodes,
                Some(Replacement::Alias(value)) => {
                    self.aliases.insert(self.graph.nodes[at].outputs[0].clone(), value);
                    Vec::new()
                }
            });
        }
        self.graph.nodes = made.into_iter().flatten().collect();
    }

    /// A match whose root is the node's only output and whose inner values nothing else reads.
    fn find(&self, at: usize, pattern: &Pattern) -> Option<Match> {
        let [root] = self.graph.nodes[at].outputs.as_slice() else { return None };
        let found = self.matched(pattern, root, &Match::default())?;
        let inner = found.nodes.iter().filter(|&&n| n != at).all(|&n| {
            self.graph.nodes[n].outputs.iter().all(|value| {
                let readers = self.readers.get(value);
                !self.outputs.contains(value)
                    && readers.is_none_or(|r| r.iter().all(|reader| found.nodes.contains(reader)))
            })
        });
        inner.then_some(found)
    }

    fn matched(&self, pattern: &Pattern, value: &str, so_far: &Match) -> Option<Match> {
        let mut found = so_far.clone();
        let bound = |mut found: Match, name| found.bind(name, value).then_some(found);
        match pattern {
            Value(name) => bound(found, name),
            Weight(name) => self.constant(value)?.origin.is_some().then(|| bound(found, name))?,
            Filled(name, number) => {
                let constant = self.constant(value)?;
                let is_own = constant.origin.is_none() && constant.dtype == DataType::F32;
                let filled = is_own && constant.to_f32().ok()?.iter().all(|v| v == number);
                filled.then(|| bound(found, name))?
            }
            Integers(name) => self.integers(value).is_some().then(|| bound(found, name))?,
            Exactly(numbers) => (self.integers(value)? == *numbers).then_some(found),
            Either(all) => all.iter().find_map(|one| self.matched(one, value, so_far)),
            Made(name, op, inputs) => {
                let &at = self.makers.get(value)?;
                let node = &self.graph.nodes[at];
                if node.op_type != *op || node.inputs.len() != inputs.len() || !node.domain.is_empty() {
                    return None;
                }
                found.nodes.insert(at);
                let found = bound(found, name)?;
                let fits = |order: &[usize]| {
                    order.iter().zip(*inputs).try_fold(found.clone(), |found, (&slot, inner)| {
                        self.matched(inner, &node.inputs[slot], &found)
                    })
                };
                let straight: Vec<usize> = (0..inputs.len()).collect();
                let commutes = matches!(*op, "Add" | "Mul");
                fits(&straight).or_else(|| commutes.then(|| fits(&[1, 0])).flatten())
            }
        }
    }

    pub fn constant(&self, name: &str) -> Option<&Initializer> {
        self.constants.get(name).map(|&at| &self.graph.initializers[at])
    }

    pub fn integers(&self, name: &str) -> Option<Vec<i64>> {
        self.constant(name).filter(|c| c.dtype == DataType::I64)?.to_i64().ok()
    }

    pub fn made_by(&self, value: &str) -> Option<&Node> {
        self.makers.get(value).map(|&at| &self.graph.nodes[at])
    }

    pub fn is_output(&self, value: &str) -> bool {
        self.outputs.contains(value)
    }

    fn add_constant(&mut self, constant: Initializer) {
        self.constants.insert(constant.name.clone(), self.graph.initializers.len());
        self.graph.initializers.push(constant);
    }

    /// An integer constant of these values, a new one where there is none.
    pub fn integer_constant(&mut self, values: &[i64]) -> String {
        let known = self.graph.initializers.iter().find(|c| {
            c.dtype == DataType::I64 && c.shape == [values.len()] && c.to_i64().is_ok_and(|v| v == values)
        });
        if let Some(known) = known {
            return known.name.clone();
        }
        let name = self.names.unique("shape");
        self.add_constant(Initializer::from_i64(name.clone(), &[values.len()], values));
        name
    }

    /// A node named after its operation, beside `place`.
    pub fn node(&mut self, place: &str, op: &str, inputs: &[&str]) -> Node {
        let base = place.rsplit_once('/').map_or(op.to_owned(), |(scope, _)| format!("{scope}/{op}"));
        let name = self.names.unique(&base);
        Node::new(&name, op, inputs, &[&name])
    }

    /// The norm of the match with these weights as its inputs, where each is one row of its width.
    fn extended_norm(&mut self, found: &Match, weights: &[&str]) -> Option<Replacement> {
        let norm = self.made_by(found.get("norm"))?;
        let width = &self.constant(&norm.inputs[1])?.shape;
        let fits = weights.iter().all(|w| self.constant(found.get(w)).is_some_and(|c| c.shape == *width));
        fits.then_some(())?;
        let root = self.made_by(found.get("root"))?;
        let mut out = Node { name: root.name.clone(), outputs: root.outputs.clone(), ..norm.clone() };
        out.inputs.truncate(1);
        out.inputs.extend(weights.iter().map(|w| found.get(w).to_owned()));
        Some(Replacement::Nodes(vec![out]))
    }
}

/// Where a bound of a slice lies on an axis of this size.
fn bound(position: i64, size: usize) -> usize {
    let size = size as i64;
    (if position < 0 { position.saturating_add(size) } else { position }).clamp(0, size) as usize
}

fn fold(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let root = rewriter.made_by(found.get("root"))?;
    if rewriter.is_output(found.get("root")) {
        return None; // a constant cannot be an output under its own name
    }
    let weight = rewriter.constant(found.get("w"))?;
    let integers = |name: &str| rewriter.integers(found.get(name));
    let step = match root.op_type.as_str() {
        "Transpose" => {
            let Some(AttributeValue::Ints(perm)) = root.attribute("perm") else { return None };
            Step::Permute(perm.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<_>>()?)
        }
        "Reshape" => Step::Reshape(resolved(&weight.shape, &integers("sizes")?)?),
        "Slice" => {
            let (starts, ends, axes) = (integers("starts")?, integers("ends")?, integers("axes")?);
            let (&[start], &[end], &[axis]) = (starts.as_slice(), ends.as_slice(), axes.as_slice()) else {
                return None;
            };
            let axis = usize::try_from(axis).ok()?;
            let &size = weight.shape.get(axis)?;
            let (start, end) = (bound(start, size), bound(end, size));
            Step::Slice { axis, start, end: end.max(start) }
        }
        _ => {
            let factor = rewriter.constant(found.get("factor"))?;
            let is_number =
                factor.origin.is_none() && factor.shape.is_empty() && factor.dtype == DataType::F32;
            is_number.then_some(())?;
            Step::Scale(*factor.to_f32().ok()?.first()?)
        }
    };
    let origin = weight.origin.as_ref()?.then(step)?;
    let key = format!("{origin:?}");
    if let Some(known) = rewriter.folded.get(&key) {
        return Some(Replacement::Alias(known.clone()));
    }
    let name = rewriter.names.unique(&origin.weight);
    rewriter.add_constant(stored_weight(&name, origin, rewriter.weights));
    rewriter.folded.insert(key, name.clone());
    Some(Replacement::Alias(name))
}

/// The sizes that a `Reshape` gives: 0 copies, -1 is inferred.
fn resolved(shape: &[usize], sizes: &[i64]) -> Option<Vec<usize>> {
    let total: usize = shape.iter().product();
    let mut out: Vec<usize> = sizes
        .iter()
        .enumerate()
        .map(|(i, &d)| match d {
            0 => shape.get(i).copied(),
            -1 => Some(1),
            d => usize::try_from(d).ok(),
        })
        .collect::<Option<_>>()?;
    if let Some(hole) = sizes.iter().position(|&d| d == -1) {
        let rest: usize = out.iter().product();
        (rest > 0 && total.is_multiple_of(rest)).then_some(())?;
        out[hole] = total / rest;
    }
    (out.iter().product::<usize>() == total).then_some(out)
}

/// Heads and half of their width, where sizes say that `[b, n, heads, 2 * half]` is split into pairs of channels.
fn pairs(split: &[i64], whole: &[i64]) -> Option<(i64, i64)> {
    match (split, whole) {
        (&[0, 0, heads, half, 2], &[0, 0, h, width]) if h == heads && width == 2 * half && half > 0 => {
            Some((heads, half))
        }
        _ => None,
    }
}

/// Whether what reads the values at the pattern's roots does not depend on the order of their channels: only products
/// of two of them do, and outputs of the graph.
fn only_scores_read(rewriter: &Rewriter<'_>, pattern: &Pattern) -> bool {
    let given: HashSet<&str> = rewriter.graph.inputs.iter().map(|i| i.name.as_str()).collect();
    let is_number =
        |name: &str| rewriter.constant(name).is_some_and(|c| c.origin.is_none() && c.elements() == 1);
    let mut ordered: HashSet<&str> = HashSet::new();
    for (at, node) in rewriter.graph.nodes.iter().enumerate() {
        let mut is_ordered = false;
        if node.inputs.iter().any(|i| ordered.contains(i.as_str())) {
            let all = |also: &dyn Fn(&str) -> bool| {
                node.inputs.iter().all(|i| ordered.contains(i.as_str()) || also(i))
            };
            let channels_are_last = node.int("axis").is_some_and(|axis| axis == 3 || axis == -1);
            match node.op_type.as_str() {
                "Transpose" => is_ordered = true,
                "Mul" if all(&is_number) => is_ordered = true,
                // A cache of rotated keys goes before our own.
                "Concat" if !channels_are_last && all(&|i| given.contains(i)) => is_ordered = true,
                "MatMul" if all(&|_| false) => {}
                _ => return false,
            }
        }
        if is_ordered || rewriter.find(at, pattern).is_some() {
            ordered.extend(node.outputs.iter().map(String::as_str));
        }
    }
    true
}

/// `x cos + swapped(x) sin`, where the channels of `x` are in halves, and the tables `[cos | cos]` and `[-sin | sin]`
/// of shape `[1, n, 1, head_dim]` are made once for all rotations.
fn rotate_halves(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let (split, whole) = (rewriter.integers(found.get("split"))?, rewriter.integers(found.get("whole"))?);
    let (_, half) = pairs(&split, &whole)?;
    (rewriter.integers(found.get("table"))? == [1, -1, 1, half, 1]).then_some(())?;
    (rewriter.made_by(found.get("joined"))?.int("axis") == Some(4)).then_some(())?;
    let root = rewriter.made_by(found.get("root"))?.clone();
    let place = root.name.clone();
    let mut nodes = Vec::new();
    let (cos, sin) = halved_tables(rewriter, &place, [found.get("cos"), found.get("sin")], half, &mut nodes);

    let mut push = |rewriter: &mut Rewriter<'_>, op: &str, inputs: &[&str], attribute: Option<Attribute>| {
        let mut node = rewriter.node(&place, op, inputs);
        node.attributes.extend(attribute);
        nodes.push(node.clone());
        node.name
    };
    let (split, whole) = (found.get("split"), found.get("whole"));
    let paired = push(rewriter, "Reshape", &[found.get("x"), split], None);
    let turned = Attribute::ints("perm", &[0, 1, 2, 4, 3]);
    let turned = push(rewriter, "Transpose", &[&paired], Some(turned));
    let x = push(rewriter, "Reshape", &[&turned, whole], None);

    let [zero, middle, end, axis] = [0, half, i64::MAX, 3].map(|v| rewriter.integer_constant(&[v]));
    let first = push(rewriter, "Slice", &[&x, &zero, &middle, &axis], None);
    let second = push(rewriter, "Slice", &[&x, &middle, &end, &axis], None);
    let swapped = push(rewriter, "Concat", &[&second, &first], Some(Attribute::int("axis", 3)));
    let a = push(rewriter, "Mul", &[&x, &cos], None);
    let b = push(rewriter, "Mul", &[&swapped, &sin], None);
    let mut sum = rewriter.node(&place, "Add", &[&a, &b]);
    sum.outputs = root.outputs;
    nodes.push(sum);
    Some(Replacement::Nodes(nodes))
}

fn halved_tables(
    rewriter: &mut Rewriter<'_>,
    place: &str,
    [cos, sin]: [&str; 2],
    half: i64,
    nodes: &mut Vec<Node>,
) -> (String, String) {
    let key = (cos.to_owned(), sin.to_owned());
    if let Some(known) = rewriter.tables.get(&key) {
        return known.clone();
    }
    let sizes = rewriter.integer_constant(&[1, -1, 1, half]);
    let mut push = |rewriter: &mut Rewriter<'_>, op: &str, inputs: &[&str]| {
        let mut node = rewriter.node(place, op, inputs);
        if op == "Concat" {
            node.attributes.push(Attribute::int("axis", 3));
        }
        nodes.push(node.clone());
        node.name
    };
    let cos = push(rewriter, "Reshape", &[cos, &sizes]);
    let sin = push(rewriter, "Reshape", &[sin, &sizes]);
    let minus = push(rewriter, "Neg", &[&sin]);
    let made = (push(rewriter, "Concat", &[&cos, &cos]), push(rewriter, "Concat", &[&minus, &sin]));
    rewriter.tables.insert(key, made.clone());
    made
}

/// Stores the weights of the layer that makes `heads` with each head's channels in halves, instead of reordering the
/// channels at every run. Only where nothing else reads these weights.
fn order_weights(rewriter: &mut Rewriter<'_>, found: &Match) -> Option<Replacement> {
    let (split, whole) = (rewriter.integers(found.get("split"))?, rewriter.integers(found.get("whole"))?);
    let (heads, half) = pairs(&split, &whole)?;
    let Some(AttributeValue::Ints(perm)) = rewriter.made_by(found.get("turned"))?.attribute("perm") else {
        return None;
    };
    (*perm == [0, 1, 2, 4, 3]).then_some(())?;
    rewriter.integers(found.get("heads_of"))?.ends_with(&[heads, 2 * half]).then_some(())?;
    let (heads, half) = (usize::try_from(heads).ok()?, usize::try_from(half).ok()?);

    let mut ordered = Vec::new();
    for name in ["w", "b", "n"].map(|label| found.get(label)).into_iter().filter(|name| !name.is_empty()) {
        let &at = rewriter.constants.get(name)?;
        let constant = &rewriter.graph.initializers[at];
        let (&width, lead) = constant.shape.split_last()?;
        let alone = rewriter.readers.get(name).is_some_and(|r| r.len() == 1);
        (width == heads * 2 * half && alone).then_some(())?;
        let pairs = [lead, &[heads, half, 2]].concat();
        let mut perm: Vec<usize> = (0..pairs.len()).collect();
        perm.swap(lead.len() + 1, lead.len() + 2);
        let steps = [Step::Reshape(pairs), Step::Permute(perm), Step::Reshape(constant.shape.clone())];
        let origin = steps.into_iter().try_fold(constant.origin.clone()?, |o: Origin, step| o.then(step))?;
        ordered.push((at, stored_weight(name, origin, rewriter.weights)));
    }
    for (at, constant) in ordered {
        rewriter.graph.initializers[at] = constant;
    }
    Some(Replacement::Alias(found.get("heads").to_owned()))
}

/// Names stored weights after the network's: a matrix that is stored transposed has `.T` appended, further forms of
/// one weight a number.
fn name_weights(graph: &mut Graph) {
    let mut names: HashSet<String> = graph.inputs.iter().map(|i| i.name.clone()).collect();
    names.extend(graph.initializers.iter().filter(|c| c.origin.is_none()).map(|c| c.name.clone()));
    names.extend(graph.nodes.iter().flat_map(|n| n.outputs.iter().cloned()));
    let mut renamed: HashMap<String, String> = HashMap::new();
    for constant in &mut graph.initializers {
        let Some(origin) = &constant.origin else { continue };
        // Transposed, whatever was done to its rows after that.
        let is_turned = |s: &Step| *s == Step::Permute(vec![1, 0]);
        let base = if constant.shape.len() == 2 && origin.steps.iter().any(is_turned) {
            format!("{}.T", origin.weight)
        } else {
            origin.weight.clone()
        };
        let mut name = base.clone();
        for n in 1.. {
            if names.insert(name.clone()) {
                break;
            }
            name = format!("{base}_{n}");
        }
        renamed.insert(std::mem::replace(&mut constant.name, name.clone()), name);
    }
    for node in &mut graph.nodes {
        for input in &mut node.inputs {
            if let Some(new) = renamed.get(input) {
                input.clone_from(new);
            }
        }
    }
}
