//! Where a stored constant comes from: the weight's own name and shape, and the steps from it to what is stored.
//!
//! Written as `metadata_props` of the tensor (onnx.proto, field 16 of `TensorProto`), which other readers pass over:
//!
//! | key | value |
//! |---|---|
//! | `mindseye.weight` | name of the weight in the network |
//! | `mindseye.shape` | its shape there: sizes with a space between them |
//! | `mindseye.steps` | what was done to it: `permute 1 0; reshape 4 2 3; slice 0 2 4; scale 0.5` |
//!
//! Retraining goes the way back: [`Graph::stored_weights`] undoes the steps, so it needs no names of layers. Graphs
//! that were written without this take it over from the same network written anew, [`Graph::adopt_origins`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::{self, Write as _};

use super::{DataType, Graph, Initializer, OnnxError};

/// Key of the weight's name.
pub(super) const WEIGHT: &str = "mindseye.weight";
/// Key of the weight's shape.
pub(super) const SHAPE: &str = "mindseye.shape";
/// Key of the steps.
pub(super) const STEPS: &str = "mindseye.steps";

/// What is done once to a weight while it is written, instead of at every run.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Step {
    /// The same elements with other sizes.
    Reshape(Vec<usize>),
    /// Axis `i` of the result is axis `perm[i]`.
    Permute(Vec<usize>),
    /// The part `start..end` of an axis.
    Slice {
        /// Which axis.
        axis: usize,
        /// First index.
        start: usize,
        /// Index after the last one.
        end: usize,
    },
    /// All elements times this.
    Scale(f32),
}

impl Step {
    /// The shape after this step; `None` where it does not fit `shape`.
    #[must_use]
    pub fn shape(&self, shape: &[usize]) -> Option<Vec<usize>> {
        match self {
            Step::Reshape(new) => (count(new)? == count(shape)?).then(|| new.clone()),
            Step::Permute(perm) => {
                let distinct: HashSet<&usize> = perm.iter().collect();
                let fits = perm.len() == shape.len() && distinct.len() == perm.len();
                fits.then(|| perm.iter().map(|&p| shape.get(p).copied()).collect())?
            }
            Step::Slice { axis, start, end } => {
                let mut out = shape.to_vec();
                let size = out.get_mut(*axis)?;
                (start <= end && *end <= *size).then_some(())?;
                *size = end - start;
                Some(out)
            }
            Step::Scale(_) => Some(shape.to_vec()),
        }
    }

    /// The elements in their new order, with their new shape. Values are not changed: a scale is nothing here.
    ///
    /// # Panics
    /// When `shape` is not that of `data`, or the step does not fit it ([`Step::shape`]).
    #[must_use]
    pub fn rearrange<T: Copy>(&self, shape: &[usize], data: Vec<T>) -> (Vec<usize>, Vec<T>) {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "elements must fill their shape");
        match self {
            Step::Reshape(new) => (new.clone(), data),
            Step::Scale(_) => (shape.to_vec(), data),
            Step::Slice { axis, start, end } => {
                let inner: usize = shape[axis + 1..].iter().product();
                let (row, from, to) = (shape[*axis] * inner, start * inner, end * inner);
                let data = data.chunks(row.max(1)).flat_map(|r| &r[from..to]).copied().collect();
                let mut shape = shape.to_vec();
                shape[*axis] = end - start;
                (shape, data)
            }
            Step::Permute(perm) => permute(perm, shape, &data),
        }
    }
}

fn permute<T: Copy>(perm: &[usize], shape: &[usize], data: &[T]) -> (Vec<usize>, Vec<T>) {
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

fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &s| n.checked_mul(s))
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = |word: &str, numbers: &[usize]| {
            f.write_str(word)?;
            numbers.iter().try_for_each(|n| write!(f, " {n}"))
        };
        match self {
            Step::Reshape(new) => list("reshape", new),
            Step::Permute(perm) => list("permute", perm),
            Step::Slice { axis, start, end } => list("slice", &[*axis, *start, *end]),
            Step::Scale(k) => write!(f, "scale {k}"), // the shortest digits that give the same number back
        }
    }
}

impl std::str::FromStr for Step {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let unknown = || OriginError::Step { text: text.to_owned() };
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        if word == "scale" {
            return rest.parse().ok().filter(|k: &f32| k.is_finite()).map(Step::Scale).ok_or_else(unknown);
        }
        let numbers = sizes(rest).ok_or_else(unknown)?;
        match (word, numbers.as_slice()) {
            ("reshape", _) => Ok(Step::Reshape(numbers)),
            ("permute", _) => Ok(Step::Permute(numbers)),
            ("slice", &[axis, start, end]) => Ok(Step::Slice { axis, start, end }),
            _ => Err(unknown()),
        }
    }
}

fn sizes(text: &str) -> Option<Vec<usize>> {
    text.split_ascii_whitespace().map(|n| n.parse().ok()).collect()
}

/// What is wrong with what a file says about a tensor's origin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OriginError {
    /// A step that is not known.
    #[error("{STEPS}: {text:?} is not a step; expected reshape, permute, slice or scale with their numbers")]
    Step {
        /// As written.
        text: String,
    },
    /// The shape is not a list of sizes.
    #[error("{SHAPE}: {text:?} is not a list of sizes")]
    Shape {
        /// As written.
        text: String,
    },
    /// The steps do not lead to the stored shape.
    #[error("{WEIGHT} {weight:?}: its steps do not lead from {from:?} to the stored {to:?}")]
    Steps {
        /// Name of the weight.
        weight: String,
        /// Its own shape.
        from: Vec<usize>,
        /// The tensor's shape.
        to: Vec<usize>,
    },
}

/// A weight of the network, and what was done to it before it was stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// Name in the network.
    pub weight: String,
    /// Shape in the network.
    pub shape: Vec<usize>,
    /// In order.
    pub steps: Vec<Step>,
}

impl Origin {
    /// The weight as it is.
    #[must_use]
    pub fn whole(weight: &str, shape: &[usize]) -> Self {
        Self { weight: weight.to_owned(), shape: shape.to_vec(), steps: Vec::new() }
    }

    /// The shape after all steps; `None` where one does not fit.
    #[must_use]
    pub fn stored_shape(&self) -> Option<Vec<usize>> {
        self.steps.iter().try_fold(self.shape.clone(), |shape, step| step.shape(&shape))
    }

    /// One step more; `None` where it does not fit.
    #[must_use]
    pub fn then(&self, step: Step) -> Option<Self> {
        let mut out = self.clone();
        out.steps.push(step);
        out.stored_shape().map(|_| out)
    }

    /// Index in the weight of each stored element.
    fn positions(&self) -> Vec<usize> {
        let all: Vec<usize> = (0..self.shape.iter().product()).collect();
        self.steps.iter().fold((self.shape.clone(), all), |(s, d), step| step.rearrange(&s, d)).1
    }

    /// As pairs of key and value.
    pub(super) fn metadata(&self) -> Vec<(&'static str, String)> {
        let spaced = |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
        let mut out = vec![(WEIGHT, self.weight.clone()), (SHAPE, spaced(&self.shape))];
        if !self.steps.is_empty() {
            let mut text = String::new();
            for (i, step) in self.steps.iter().enumerate() {
                let _ = write!(text, "{}{step}", if i == 0 { "" } else { "; " });
            }
            out.push((STEPS, text));
        }
        out
    }

    /// From pairs of key and value, for a tensor of this shape; `None` where they say nothing of an origin.
    pub(super) fn from_metadata(
        pairs: &[(String, String)],
        stored: &[usize],
    ) -> Result<Option<Self>, OriginError> {
        let get = |key: &str| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let Some(weight) = get(WEIGHT) else { return Ok(None) };
        let shape = get(SHAPE).unwrap_or_default();
        let shape = sizes(shape).ok_or_else(|| OriginError::Shape { text: shape.to_owned() })?;
        let steps = get(STEPS).unwrap_or_default();
        let steps = steps.split(';').map(str::trim).filter(|s| !s.is_empty()).map(str::parse);
        let origin = Self { weight: weight.to_owned(), shape, steps: steps.collect::<Result<_, _>>()? };
        // Sizes past what a weight can have would only be found out when memory is asked for.
        let fits = count(&origin.shape).is_some_and(|n| n < 1 << 40);
        if !fits || origin.stored_shape().as_deref() != Some(stored) {
            let (from, to) = (origin.shape, stored.to_vec());
            return Err(OriginError::Steps { weight: origin.weight, from, to });
        }
        Ok(Some(origin))
    }
}

/// Shape and values of weights by their names in the network.
pub type StoredWeights = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A weight put together again.
struct Gathered {
    shape: Vec<usize>,
    values: Vec<f32>,
    seen: Vec<bool>,
}

impl Graph {
    /// Whether any constant says where it comes from.
    #[must_use]
    pub fn has_origins(&self) -> bool {
        self.initializers.iter().any(|i| i.origin.is_some())
    }

    /// The network's weights under their own names and in their own shapes, from constants that say where they come
    /// from; a weight that is stored in parts is put together.
    ///
    /// # Errors
    /// [`OnnxError::Tensor`] naming the constant or weight where a part is missing, where it was scaled (the way back
    /// would round), and where its values cannot be had as floats.
    pub fn stored_weights(&self) -> Result<StoredWeights, OnnxError> {
        let mut found: BTreeMap<String, Gathered> = BTreeMap::new();
        for tensor in &self.initializers {
            let Some(origin) = &tensor.origin else { continue };
            let fail = |what: String| OnnxError::Tensor { name: tensor.name.clone(), what };
            if origin.steps.iter().any(|s| matches!(s, Step::Scale(_))) {
                return Err(fail(format!("weight {:?} is stored scaled", origin.weight)));
            }
            if count(&origin.shape).is_none_or(|n| n as u64 > tensor.elements().saturating_mul(64)) {
                return Err(fail(format!("too small a part of weight {:?}", origin.weight)));
            }
            let values = tensor.to_f32()?;
            let total = origin.shape.iter().product();
            let weight = found.entry(origin.weight.clone()).or_insert_with(|| Gathered {
                shape: origin.shape.clone(),
                values: vec![0.0; total],
                seen: vec![false; total],
            });
            if weight.shape != origin.shape {
                let (a, b) = (&weight.shape, &origin.shape);
                return Err(fail(format!("weight {:?} has two shapes, {a:?} and {b:?}", origin.weight)));
            }
            for (at, value) in origin.positions().into_iter().zip(values) {
                weight.values[at] = value;
                weight.seen[at] = true;
            }
        }
        found
            .into_iter()
            .map(|(name, weight)| match weight.seen.iter().filter(|s| !**s).count() {
                0 => Ok((name, (weight.shape, weight.values))),
                missing => {
                    let what = format!("{missing} of {} values are not stored", weight.seen.len());
                    Err(OnnxError::Tensor { name, what })
                }
            })
            .collect()
    }

    /// Takes over the origins of `reference`: the same network, written anew. Both are walked from the outputs (paired
    /// by name) to the inputs, node by node; names in between do not matter, so a layer may have been renamed.
    ///
    /// # Errors
    /// [`OnnxError::Graph`] naming the first value that differs. Nothing is taken over then.
    pub fn adopt_origins(&mut self, reference: &Graph) -> Result<(), OnnxError> {
        let (mine, theirs) = (Index::new(self), Index::new(reference));
        let fail = |what: String| Err(OnnxError::Graph { what });
        let mut waiting: Vec<(&str, &str)> = Vec::new();
        for output in &reference.outputs {
            if !self.outputs.iter().any(|o| o.name == output.name) {
                return fail(format!("output {:?} of this network is missing", output.name));
            }
            waiting.push((&output.name, &output.name));
        }
        let mut seen: HashSet<(&str, &str)> = HashSet::new();
        let mut adopted: Vec<(usize, Origin)> = Vec::new();
        while let Some((a, b)) = waiting.pop() {
            if !seen.insert((a, b)) {
                continue;
            }
            match (mine.get(a), theirs.get(b)) {
                (Source::Node(n, i), Source::Node(m, j)) => {
                    if n.op_type != m.op_type || i != j || n.inputs.len() != m.inputs.len() {
                        let (op, other) = (&n.op_type, &m.op_type);
                        return fail(format!(
                            "{a:?} is made by {op}, this network has {other} ({b:?}) there"
                        ));
                    }
                    waiting
                        .extend(n.inputs.iter().map(String::as_str).zip(m.inputs.iter().map(String::as_str)));
                }
                (Source::Constant(at), Source::Constant(to)) => {
                    let (x, y) = (&self.initializers[at], &reference.initializers[to]);
                    if x.shape != y.shape || x.dtype != y.dtype {
                        let place = |t: &Initializer| format!("{} {:?}", t.dtype.name(), t.shape);
                        let (x, y) = (place(x), place(y));
                        return fail(format!("{a:?} is {x}, this network has {y} ({b:?}) there"));
                    }
                    adopted.extend(y.origin.clone().map(|origin| (at, origin)));
                }
                (Source::Outside, Source::Outside) if a == b => {}
                _ => return fail(format!("{a:?} does not correspond to {b:?} of this network")),
            }
        }
        for (at, origin) in adopted {
            self.initializers[at].origin = Some(origin);
        }
        Ok(())
    }
}

/// What makes a value.
enum Source<'a> {
    Node(&'a super::Node, usize),
    Constant(usize),
    /// An input, or nothing (a left-out optional input).
    Outside,
}

struct Index<'a> {
    graph: &'a Graph,
    nodes: HashMap<&'a str, (usize, usize)>,
    constants: HashMap<&'a str, usize>,
}

impl<'a> Index<'a> {
    fn new(graph: &'a Graph) -> Self {
        let made = |(n, node): (usize, &'a super::Node)| {
            node.outputs.iter().enumerate().map(move |(i, o)| (o.as_str(), (n, i)))
        };
        let nodes = graph.nodes.iter().enumerate().flat_map(made).collect();
        let constants = graph.initializers.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        Self { graph, nodes, constants }
    }

    fn get(&self, value: &str) -> Source<'a> {
        if let Some(&(node, output)) = self.nodes.get(value) {
            return Source::Node(&self.graph.nodes[node], output);
        }
        self.constants.get(value).map_or(Source::Outside, |&at| Source::Constant(at))
    }
}

/// The origin of a file's tensor, if it says one.
pub(super) fn read(
    name: &str,
    dtype: DataType,
    pairs: &[(String, String)],
    shape: &[usize],
) -> Result<Option<Origin>, OnnxError> {
    if pairs.is_empty() || dtype.bits() < 8 {
        return Ok(None);
    }
    Origin::from_metadata(pairs, shape)
        .map_err(|e| OnnxError::Tensor { name: name.to_owned(), what: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        let steps = vec![
            Step::Permute(vec![1, 0]),
            Step::Reshape(vec![3, 2, 2]),
            Step::Permute(vec![0, 2, 1]),
            Step::Reshape(vec![3, 4]),
        ];
        Origin { weight: "blocks.0.to_q.weight".into(), shape: vec![4, 3], steps }
    }

    fn pairs(origin: &Origin) -> Vec<(String, String)> {
        origin.metadata().into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }

    #[test]
    fn as_text_and_back() {
        let mut all = origin();
        assert_eq!(Origin::from_metadata(&pairs(&all), &[3, 4]).unwrap().as_ref(), Some(&all));
        all.steps.extend([Step::Slice { axis: 1, start: 1, end: 3 }, Step::Scale(1.0 / 3.0)]);
        assert_eq!(Origin::from_metadata(&pairs(&all), &[3, 2]).unwrap(), Some(all));
        assert_eq!(Origin::from_metadata(&[("other".into(), "x".into())], &[3, 2]).unwrap(), None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let cases = [
            (STEPS, "transpose 1 0", "not a step"),
            (STEPS, "slice 0 1", "not a step"),
            (STEPS, "scale inf", "not a step"),
            (STEPS, "permute 0 0", "do not lead"),
            (STEPS, "slice 0 2 9", "do not lead"),
            (STEPS, "reshape 18446744073709551615 18446744073709551615", "do not lead"),
            (SHAPE, "4 x", "not a list of sizes"),
            (SHAPE, "4294967295 4294967295 4294967295", "do not lead"),
        ];
        for (key, value, word) in cases {
            let mut pairs = pairs(&origin());
            pairs.iter_mut().filter(|(k, _)| k == key).for_each(|(_, v)| *v = value.to_owned());
            let error = Origin::from_metadata(&pairs, &[3, 4]).unwrap_err().to_string();
            assert!(error.contains(word), "{key} = {value}: {error}");
        }
    }

    #[test]
    fn parts_are_put_together() {
        let part = |start: usize, end: usize| {
            let steps = vec![Step::Slice { axis: 0, start, end }, Step::Permute(vec![1, 0])];
            let origin = Origin { weight: "w".into(), shape: vec![3, 2], steps };
            // Row r, column c of the weight is 10 r + c.
            let values: Vec<f32> =
                (0..2).flat_map(|c| (start..end).map(move |r| (10 * r + c) as f32)).collect();
            let mut tensor = Initializer::from_f32(format!("w_{start}"), &[2, end - start], &values);
            tensor.origin = Some(origin);
            tensor
        };
        let mut graph = Graph { initializers: vec![part(1, 3), part(0, 1)], ..Graph::default() };
        let weights = graph.stored_weights().unwrap();
        assert_eq!(weights["w"], (vec![3, 2], vec![0.0, 1.0, 10.0, 11.0, 20.0, 21.0]));
        graph.initializers.pop();
        let error = graph.stored_weights().unwrap_err().to_string();
        assert!(error.contains("2 of 6 values"), "{error}");
        let origin = graph.initializers[0].origin.as_mut().unwrap();
        origin.steps.push(Step::Scale(2.0));
        let error = graph.stored_weights().unwrap_err().to_string();
        assert!(error.contains("scaled"), "{error}");
    }
}
