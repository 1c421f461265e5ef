//! The interpreter of [`Ops`] on libtorch.
//!
//! Values live in a table of nodes, one per operation. Without checkpoints libtorch's own tape records them, and going
//! back is one call. With checkpoints nothing is recorded: every operation is kept as a closure over its inputs, and when
//! a block ends (the network marks it `*.out`) the values inside it are dropped. Going back computes one block at a time
//! again from what went into it, this time recorded. A dropped value that is read from outside its block (text rows, time
//! rows) is computed once more and kept.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use mindseye_engines::model::Ops;
use mindseye_train::autograd::{Autograd, DeviceError, OutputGrads, Settings, low_rank};
use mindseye_train::eager::{Params, is_chosen};
use tch::{Kind, TchError, Tensor};

/// A value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

/// Row numbers with their shape.
#[derive(Debug)]
pub struct Rows {
    shape: Vec<i64>,
    rows: Tensor,
}

impl Clone for Rows {
    fn clone(&self) -> Self {
        Self { shape: self.shape.clone(), rows: self.rows.shallow_clone() }
    }
}

type Compute = Box<dyn Fn(&[&Tensor]) -> Result<Tensor, TchError> + Send>;

/// How a value is made.
struct Recipe {
    operation: &'static str,
    from: Vec<usize>,
    compute: Compute,
}

struct Node {
    /// None where it was dropped.
    value: Option<Tensor>,
    shape: Vec<i64>,
    /// None for inputs and weights, and where libtorch's tape records.
    recipe: Option<Recipe>,
    /// Which weight it is.
    weight: Option<usize>,
    /// A gradient passes through it.
    needs: bool,
}

/// The interpreter; see the module.
pub struct TorchOps {
    device: tch::Device,
    only: Vec<String>,
    checkpoints: bool,
    bf16: bool,
    /// Gradients are wanted.
    record: bool,
    params: Arc<Params>,
    prefix: String,
    /// Weights on the device, as far as they were asked for.
    weights: HashMap<usize, Tensor>,
    nodes: Vec<Node>,
    /// Node of each weight.
    known: HashMap<usize, Var>,
    /// See [`Autograd::adapt`], by weight.
    adapters: HashMap<usize, (Var, Var, f32)>,
    /// Nodes in bfloat16.
    lowered: HashMap<usize, Var>,
    /// Where blocks end.
    ends: Vec<usize>,
    grads: HashMap<usize, Tensor>,
}

fn ints(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|n| *n as i64).collect()
}

/// The last axis.
fn last(x: &Tensor) -> i64 {
    x.size().last().copied().unwrap_or(1)
}

/// As a term of a sum or norm.
fn float(x: &Tensor) -> Result<Tensor, TchError> {
    if x.kind() == Kind::Float { Ok(x.shallow_clone()) } else { x.f_to_kind(Kind::Float) }
}

impl TorchOps {
    pub(crate) fn new(device: tch::Device, settings: Settings<'_>) -> Self {
        Self {
            device,
            only: settings.only.to_vec(),
            checkpoints: settings.checkpoint_blocks,
            bf16: settings.bf16,
            record: true,
            params: Arc::default(),
            prefix: String::new(),
            weights: HashMap::new(),
            nodes: Vec::new(),
            known: HashMap::new(),
            adapters: HashMap::new(),
            lowered: HashMap::new(),
            ends: Vec::new(),
            grads: HashMap::new(),
        }
    }

    /// Unwinds to the trainer (see [`Autograd`]) where libtorch failed.
    fn done<T>(&self, operation: &'static str, shape: &[i64], result: Result<T, TchError>) -> T {
        result.unwrap_or_else(|error| {
            let text = error.to_string();
            let reason = text.trim_start_matches("Internal torch error: ").lines().next().unwrap_or_default();
            DeviceError::Operation {
                device: match self.device {
                    tch::Device::Cuda(n) => format!("cuda:{n}"),
                    other => format!("{other:?}").to_lowercase(),
                },
                operation,
                shape: shape.iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect(),
                reason: reason.to_owned(),
            }
            .raise()
        })
    }

    fn on_device(&self, operation: &'static str, shape: &[usize], data: &[f32]) -> Tensor {
        let shape = ints(shape);
        let made = Tensor::f_from_slice(data)
            .and_then(|x| x.f_reshape(&shape))
            .and_then(|x| x.f_to_device_(self.device, Kind::Float, false, false));
        self.done(operation, &shape, made)
    }

    fn leaf(&mut self, value: Tensor, weight: Option<usize>, needs: bool) -> Var {
        let shape = value.size();
        self.nodes.push(Node { value: Some(value), shape, recipe: None, weight, needs });
        Var(self.nodes.len() - 1)
    }

    /// The value of a node; one that was dropped is computed again and kept.
    fn value_of(&mut self, at: usize) -> Tensor {
        let value = self.computed(at, &mut HashMap::new());
        self.nodes[at].value = Some(value.shallow_clone());
        value
    }

    /// The value of a node; what was dropped is computed again, each once, into `made`.
    fn computed(&self, at: usize, made: &mut HashMap<usize, Tensor>) -> Tensor {
        let node = &self.nodes[at];
        if let Some(value) = node.value.as_ref().or_else(|| made.get(&at)) {
            return value.shallow_clone();
        }
        let recipe = node.recipe.as_ref().expect("only what can be computed again is dropped");
        let from: Vec<Tensor> = recipe.from.iter().map(|i| self.computed(*i, made)).collect();
        let value = tch::no_grad(|| (recipe.compute)(&from.iter().collect::<Vec<_>>()));
        let value = self.done(recipe.operation, &node.shape, value);
        made.insert(at, value.shallow_clone());
        value
    }

    fn apply(
        &mut self,
        operation: &'static str,
        from: &[&Var],
        compute: impl Fn(&[&Tensor]) -> Result<Tensor, TchError> + Send + 'static,
    ) -> Var {
        let from: Vec<usize> = from.iter().map(|v| v.0).collect();
        let values: Vec<Tensor> = from.iter().map(|i| self.value_of(*i)).collect();
        let needs = self.record && from.iter().any(|i| self.nodes[*i].needs);
        let given: Vec<&Tensor> = values.iter().collect();
        let taped = needs && !self.checkpoints;
        let result = if taped { compute(&given) } else { tch::no_grad(|| compute(&given)) };
        let shape = values.first().map(Tensor::size).unwrap_or_default();
        let value = self.done(operation, &shape, result);
        let recipe =
            (self.record && self.checkpoints).then(|| Recipe { operation, from, compute: Box::new(compute) });
        let shape = value.size();
        self.nodes.push(Node { value: Some(value), shape, recipe, weight: None, needs });
        Var(self.nodes.len() - 1)
    }

    /// As a factor of a product: in bfloat16 where products are, once for all products.
    fn factor(&mut self, x: &Var) -> Var {
        if !self.bf16 || self.value_of(x.0).kind() == Kind::BFloat16 {
            return *x;
        }
        if let Some(lowered) = self.lowered.get(&x.0) {
            return *lowered;
        }
        let lowered = self.apply("cast", &[x], |x| x[0].f_to_kind(Kind::BFloat16));
        self.lowered.insert(x.0, lowered);
        lowered
    }

    /// A linear layer as it is.
    fn layer(&mut self, x: &Var, w: &Var, b: Option<&Var>) -> Var {
        let from: Vec<Var> = [x, w].into_iter().chain(b).map(|v| self.factor(v)).collect();
        let from: Vec<&Var> = from.iter().collect();
        self.apply("linear layer", &from, |x| x[0].f_linear(x[1], x.get(2).copied()))
    }

    /// Adds to the gradient of a weight.
    fn add_grad(&mut self, weight: usize, grad: Tensor) {
        if !grad.defined() {
            return;
        }
        let sum = match self.grads.remove(&weight) {
            Some(mut sum) => {
                let added = tch::no_grad(|| sum.f_add_(&grad));
                self.done("sum of gradients", &sum.size(), added)
            }
            None => grad,
        };
        self.grads.insert(weight, sum);
    }

    /// Gradients of `inputs` from values and their gradients.
    fn back(&self, outputs: &[(Tensor, Tensor)], inputs: &[Tensor]) -> Vec<Tensor> {
        let went = || {
            let mut sum: Option<Tensor> = None;
            for (value, grad) in outputs {
                let part = (float(value)?.f_mul(grad)?).f_sum(Kind::Float)?;
                sum = Some(match sum {
                    Some(sum) => sum.f_add(&part)?,
                    None => part,
                });
            }
            match sum {
                Some(sum) => Tensor::f_run_backward(&[sum], inputs, false, false),
                None => Ok(Vec::new()),
            }
        };
        self.done("backward", &outputs.first().map(|(v, _)| v.size()).unwrap_or_default(), went())
    }

    /// Goes back over libtorch's own tape.
    fn back_over_tape(&mut self, outputs: Vec<(usize, Tensor)>) {
        let outputs: Vec<(Tensor, Tensor)> =
            outputs.into_iter().map(|(at, grad)| (self.value_of(at), grad)).collect();
        let weights: Vec<usize> = self.nodes.iter().filter(|n| n.needs).filter_map(|n| n.weight).collect();
        let leaves: Vec<Tensor> = weights.iter().map(|w| self.weights[w].shallow_clone()).collect();
        for (weight, grad) in weights.into_iter().zip(self.back(&outputs, &leaves)) {
            self.add_grad(weight, grad);
        }
    }

    /// Goes back block by block, each computed again.
    fn back_over_blocks(&mut self, outputs: Vec<(usize, Tensor)>) {
        let mut pending: HashMap<usize, Tensor> = HashMap::new();
        let mut ends = std::mem::take(&mut self.ends);
        ends.retain(|end| *end < self.nodes.len());
        ends.push(self.nodes.len());
        for (at, grad) in outputs {
            self.add_pending(&mut pending, at, grad);
        }
        for i in (0..ends.len()).rev() {
            let block = if i == 0 { 0 } else { ends[i - 1] }..ends[i];
            self.back_over_block(block, &mut pending);
        }
    }

    fn add_pending(&self, pending: &mut HashMap<usize, Tensor>, at: usize, grad: Tensor) {
        let sum = match pending.remove(&at) {
            Some(sum) => self.done("sum of gradients", &grad.size(), sum.f_add(&grad)),
            None => grad,
        };
        pending.insert(at, sum);
    }

    fn back_over_block(&mut self, block: Range<usize>, pending: &mut HashMap<usize, Tensor>) {
        let targets: Vec<usize> = block.clone().filter(|at| pending.contains_key(at)).collect();
        // What the targets come from, inside the block.
        let mut wanted = vec![false; block.len()];
        for at in block.clone().rev() {
            if !targets.contains(&at) && !wanted[at - block.start] {
                continue;
            }
            wanted[at - block.start] = true;
            if let Some(recipe) = &self.nodes[at].recipe {
                recipe.from.iter().filter(|i| block.contains(i)).for_each(|i| wanted[i - block.start] = true);
            }
        }
        let (mut values, mut inputs): (HashMap<usize, Tensor>, Vec<usize>) = (HashMap::new(), Vec::new());
        for at in block.clone().filter(|at| wanted[at - block.start]) {
            let Some(recipe) = self.nodes[at].recipe.take() else { continue };
            for i in &recipe.from {
                if values.contains_key(i) {
                    continue;
                }
                // A weight, or what an earlier block made: gradients end here.
                let mut value = self.value_of(*i);
                if self.nodes[*i].needs {
                    if self.nodes[*i].weight.is_none() {
                        value = value.detach().set_requires_grad(true);
                    }
                    inputs.push(*i);
                }
                values.insert(*i, value);
            }
            let from: Vec<&Tensor> = recipe.from.iter().map(|i| &values[i]).collect();
            let value = self.done(recipe.operation, &self.nodes[at].shape, (recipe.compute)(&from));
            self.nodes[at].recipe = Some(recipe);
            values.insert(at, value);
        }
        let outputs: Vec<(Tensor, Tensor)> = targets
            .iter()
            .filter_map(|at| pending.remove(at).map(|grad| (at, grad)))
            .filter(|(at, _)| self.nodes[**at].needs && self.nodes[**at].weight.is_none())
            .map(|(at, grad)| (values[at].shallow_clone(), grad))
            .collect();
        if outputs.is_empty() || inputs.is_empty() {
            return;
        }
        let leaves: Vec<Tensor> = inputs.iter().map(|i| values[i].shallow_clone()).collect();
        for (at, grad) in inputs.iter().zip(self.back(&outputs, &leaves)) {
            match self.nodes[*at].weight {
                Some(weight) => self.add_grad(weight, grad),
                None if grad.defined() => self.add_pending(pending, *at, grad),
                None => {}
            }
        }
    }
}

impl Autograd for TorchOps {
    fn restart(&mut self, params: Arc<Params>) {
        self.nodes.clear();
        self.known.clear();
        self.adapters.clear();
        self.lowered.clear();
        self.ends.clear();
        if !Arc::ptr_eq(&self.params, &params) {
            self.weights.clear();
            self.params = params;
        }
    }

    fn clear(&mut self) {
        self.restart(Arc::default());
    }

    fn set_prefix(&mut self, prefix: &str) {
        self.prefix = prefix.to_owned();
    }

    fn input(&mut self, shape: &[usize], data: Vec<f32>) -> Var {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "input of shape {shape:?}");
        let value = self.on_device("input", shape, &data);
        self.leaf(value, None, false)
    }

    fn index(&mut self, shape: &[usize], rows: Vec<usize>) -> Rows {
        assert_eq!(shape.iter().product::<usize>(), rows.len(), "index of shape {shape:?}");
        let shape = ints(shape);
        let made = Tensor::f_from_slice(&ints(&rows))
            .and_then(|x| x.f_to_device_(self.device, Kind::Int64, false, false));
        Rows { rows: self.done("index", &shape, made), shape }
    }

    fn value<'a>(&'a self, x: &'a Var) -> Cow<'a, [f32]> {
        let node = &self.nodes[x.0];
        let value = self.computed(x.0, &mut HashMap::new());
        let mut out = vec![0.0f32; value.numel()];
        let copied = float(&value.detach()).and_then(|v| {
            let n = out.len();
            v.f_copy_data(&mut out, n)
        });
        self.done("value", &node.shape, copied);
        Cow::Owned(out)
    }

    fn adapt(&mut self, w: &Var, down: Var, up: Var, scale: f32) {
        self.adapters.insert(w.0, (down, up, scale));
    }

    fn backward(&mut self, outputs: OutputGrads<Var>) {
        let outputs: Vec<(usize, Tensor)> = outputs
            .into_iter()
            .filter(|(x, _)| self.nodes[x.0].needs)
            .map(|(x, grad)| {
                let shape: Vec<usize> = self.nodes[x.0].shape.iter().map(|n| *n as usize).collect();
                assert_eq!(shape.iter().product::<usize>(), grad.len(), "gradient of shape {shape:?}");
                (x.0, self.on_device("gradient", &shape, &grad))
            })
            .collect();
        if outputs.is_empty() {
            return;
        }
        if self.checkpoints { self.back_over_blocks(outputs) } else { self.back_over_tape(outputs) }
    }

    fn take_grads(&mut self) -> Vec<Vec<f32>> {
        if self.grads.is_empty() {
            return Vec::new();
        }
        let mut out = vec![Vec::new(); self.params.len()];
        for (weight, grad) in std::mem::take(&mut self.grads) {
            let mut values = vec![0.0f32; grad.numel()];
            let n = values.len();
            self.done("gradient", &grad.size(), float(&grad).and_then(|g| g.f_copy_data(&mut values, n)));
            out[weight] = values;
        }
        out
    }

    fn no_grad<R>(&mut self, compute: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.record, false);
        let out = compute(self);
        self.record = before;
        out
    }
}

impl Ops for TorchOps {
    type Tensor = Var;
    type Index = Rows;

    fn param(&mut self, name: &str, shape: &[usize]) -> Var {
        let name = format!("{}{name}", self.prefix);
        let at = self.params.position(&name).unwrap_or_else(|| panic!("weight `{name}` is missing"));
        if let Some(known) = self.known.get(&at) {
            return *known;
        }
        let needs = self.record && is_chosen(&self.only, &name);
        let value = match self.weights.get(&at) {
            Some(value) => value.shallow_clone(),
            None => {
                let (_, have, values) = self.params.get(at);
                assert_eq!(have, shape, "shape of weight `{name}`");
                let value = self.on_device("weight", shape, values);
                self.weights.insert(at, value.shallow_clone());
                value
            }
        };
        let value = value.set_requires_grad(needs);
        let var = self.leaf(value, Some(at), needs);
        self.known.insert(at, var);
        var
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> Var {
        self.input(shape, data)
    }

    fn add(&mut self, a: &Var, b: &Var) -> Var {
        self.apply("addition", &[a, b], |x| x[0].f_add(x[1]))
    }

    fn sub(&mut self, a: &Var, b: &Var) -> Var {
        self.apply("subtraction", &[a, b], |x| x[0].f_sub(x[1]))
    }

    fn mul(&mut self, a: &Var, b: &Var) -> Var {
        self.apply("multiplication", &[a, b], |x| x[0].f_mul(x[1]))
    }

    fn scale(&mut self, x: &Var, k: f32) -> Var {
        self.apply("scale", &[x], move |x| x[0].f_mul_scalar(f64::from(k)))
    }

    fn offset(&mut self, x: &Var, k: f32) -> Var {
        self.apply("offset", &[x], move |x| x[0].f_add_scalar(f64::from(k)))
    }

    fn linear(&mut self, x: &Var, w: &Var, b: Option<&Var>) -> Var {
        let y = self.layer(x, w, b);
        let Some((down, up, scale)) = self.adapters.get(&w.0).copied() else { return y };
        let low = low_rank(self, x, (&down, &up, scale));
        self.add(&y, &low)
    }

    fn matmul(&mut self, a: &Var, b: &Var) -> Var {
        let (a, b) = (self.factor(a), self.factor(b));
        self.apply("matrix product", &[&a, &b], |x| x[0].f_matmul(x[1]))
    }

    fn reshape(&mut self, x: &Var, dims: &[i64]) -> Var {
        let dims = dims.to_vec();
        self.apply("reshape", &[x], move |x| {
            let old = x[0].size();
            let dims: Vec<i64> =
                dims.iter().enumerate().map(|(i, d)| if *d == 0 { old[i] } else { *d }).collect();
            x[0].f_reshape(&dims)
        })
    }

    fn permute(&mut self, x: &Var, perm: &[usize]) -> Var {
        let perm = ints(perm);
        self.apply("permutation", &[x], move |x| x[0].f_permute(&perm))
    }

    fn concat(&mut self, xs: &[Var], axis: usize) -> Var {
        let from: Vec<&Var> = xs.iter().collect();
        self.apply("concatenation", &from, move |x| Tensor::f_cat(x, axis as i64))
    }

    fn slice(&mut self, x: &Var, axis: usize, start: i64, end: Option<i64>) -> Var {
        self.apply("slice", &[x], move |x| {
            let size = x[0].size()[axis];
            let clip = |at: i64| (if at < 0 { at + size } else { at }).clamp(0, size);
            let (start, end) = (clip(start), clip(end.unwrap_or(size)));
            x[0].f_narrow(axis as i64, start, (end - start).max(0))
        })
    }

    fn gather(&mut self, table: &Var, index: &Rows) -> Var {
        let index = index.clone();
        self.apply("gather", &[table], move |x| {
            let size = x[0].size();
            // An embedding: its gradient has a fixed order of sums on every device.
            let table = x[0].f_reshape([size[0], -1])?;
            let rows = Tensor::f_embedding(&table, &index.rows, -1, false, false)?;
            rows.f_reshape([&index.shape, &size[1..]].concat())
        })
    }

    fn softmax(&mut self, x: &Var) -> Var {
        self.apply("softmax", &[x], |x| x[0].f_softmax(-1, Kind::Float))
    }

    fn layer_norm(&mut self, x: &Var, eps: f32) -> Var {
        self.apply("layer norm", &[x], move |x| {
            float(x[0])?.f_layer_norm([last(x[0])], None::<&Tensor>, None::<&Tensor>, f64::from(eps), true)
        })
    }

    fn rms_norm(&mut self, x: &Var, weight: &Var, eps: f32) -> Var {
        self.apply("rms norm", &[x, weight], move |x| {
            float(x[0])?.f_rms_norm([last(x[0])], Some(x[1]), f64::from(eps))
        })
    }

    fn channel_norm(&mut self, x: &Var, gamma: &Var, channels: usize) -> Var {
        let k = (channels as f64).sqrt();
        self.apply("channel norm", &[x, gamma], move |x| {
            let v = float(x[0])?;
            let norm = v.f_norm_scalaropt_dim(2, [1i64], true)?.f_clamp_min(1e-12)?;
            let gamma = x[1].f_reshape([1, -1, 1, 1])?.f_mul_scalar(k)?;
            v.f_div(&norm)?.f_mul(&gamma)
        })
    }

    fn mean(&mut self, x: &Var, axis: usize) -> Var {
        self.apply("mean", &[x], move |x| x[0].f_mean_dim([axis as i64].as_slice(), true, Kind::Float))
    }

    fn gelu_tanh(&mut self, x: &Var) -> Var {
        self.apply("gelu", &[x], |x| x[0].f_gelu("tanh"))
    }

    fn silu(&mut self, x: &Var) -> Var {
        self.apply("silu", &[x], |x| x[0].f_silu())
    }

    fn conv2d(&mut self, x: &Var, w: &Var, b: Option<&Var>, stride: [usize; 2], pads: [usize; 4]) -> Var {
        let from: Vec<Var> = [x, w].into_iter().chain(b).map(|v| self.factor(v)).collect();
        let from: Vec<&Var> = from.iter().collect();
        let (stride, [top, left, bottom, right]) = (stride.map(|n| n as i64), pads.map(|n| n as i64));
        self.apply("convolution", &from, move |x| {
            let bias = x.get(2).copied();
            if top == bottom && left == right {
                return x[0].f_conv2d(x[1], bias, stride, [top, left], [1, 1], 1);
            }
            let padded = x[0].f_constant_pad_nd([left, right, top, bottom])?;
            padded.f_conv2d(x[1], bias, stride, [0, 0], [1, 1], 1)
        })
    }

    fn upsample2(&mut self, x: &Var) -> Var {
        self.apply("upsampling", &[x], |x| {
            let size = x[0].size();
            x[0].f_upsample_nearest2d([2 * size[2], 2 * size[3]], None, None)
        })
    }

    fn rotate(&mut self, x: &Var, cos: &Var, sin: &Var, heads: usize, head_dim: usize) -> Var {
        let (heads, head_dim) = (heads as i64, head_dim as i64);
        self.apply("rotation", &[x, cos, sin], move |x| {
            let (size, half) = (x[0].size(), head_dim / 2);
            let pairs = float(x[0])?.f_reshape([size[0], -1, heads, half, 2])?; // (b, n, heads, half, 2)
            // One table for all batch entries, or one for each.
            let table = |t: &Tensor| t.f_reshape([-1, pairs.size()[1], 1, half]);
            let (cos, sin) = (table(x[1])?, table(x[2])?);
            let (a, b) = (pairs.f_select(4, 0)?, pairs.f_select(4, 1)?);
            let first = a.f_mul(&cos)?.f_sub(&b.f_mul(&sin)?)?;
            let second = a.f_mul(&sin)?.f_add(&b.f_mul(&cos)?)?;
            Tensor::f_stack(&[first, second], 4)?.f_reshape(&size)
        })
    }

    fn attention(
        &mut self,
        q: &Var,
        k: &Var,
        v: &Var,
        scale: f32,
        bias: Option<&Var>,
        heads: usize,
        head_dim: usize,
    ) -> Var {
        let (heads, head_dim) = (heads as i64, head_dim as i64);
        let from: Vec<Var> = [q, k, v].into_iter().chain(bias).map(|v| self.factor(v)).collect();
        let from: Vec<&Var> = from.iter().collect();
        self.apply("attention", &from, move |x| {
            let split = |t: &Tensor| t.f_reshape([t.size()[0], -1, heads, head_dim])?.f_transpose(1, 2);
            let (q, k, v) = (split(x[0])?, split(x[1])?, split(x[2])?); // (b, heads, n, d)
            let bias = x.get(3).copied();
            let out = Tensor::f_scaled_dot_product_attention(
                &q,
                &k,
                &v,
                bias,
                0.0,
                false,
                f64::from(scale),
                false,
            )?;
            out.f_transpose(1, 2)?.f_reshape([q.size()[0], -1, heads * head_dim])
        })
    }

    fn gated_add(&mut self, x: &Var, y: &Var, gate: &Var) -> Var {
        self.apply("gated addition", &[x, y, gate], |x| x[0].f_addcmul(&float(x[1])?, x[2]))
    }

    fn mark(&mut self, name: &str, x: &Var) {
        if !(self.checkpoints && self.record && name.ends_with(".out")) {
            return;
        }
        let begin = self.ends.last().copied().unwrap_or(0);
        for (at, node) in self.nodes.iter_mut().enumerate().skip(begin) {
            if node.recipe.is_some() && at != x.0 {
                node.value = None;
            }
        }
        self.ends.push(self.nodes.len());
    }
}
