//! The eager interpreter of [`Ops`]: computes numbers at once and, when asked to, gradients.
//!
//! A tape of nodes; buffers are taken from a pool that lives as long as the interpreter, so a training loop reaches
//! a steady state without allocating. One interpreter is one thread; data-parallel training uses several.

pub mod backward;
pub mod ffi;
pub mod math;

use std::collections::HashMap;
use std::sync::Arc;

use ffi::gemm::{View, gemm};
use math::wide;
use mindseye_engines::model::Ops;

use crate::autograd::low_rank;

/// Named weights.
#[derive(Clone, Debug, Default)]
pub struct Params {
    names: Vec<String>,
    shapes: Vec<Vec<usize>>,
    data: Vec<Arc<Vec<f32>>>,
    index: HashMap<String, usize>,
}

impl Params {
    /// No weights.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a weight.
    ///
    /// # Panics
    /// When `data` does not have as many values as `shape`.
    pub fn insert(&mut self, name: &str, shape: &[usize], data: Vec<f32>) {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "weight {name}");
        if let Some(i) = self.index.get(name) {
            self.shapes[*i] = shape.to_vec();
            self.data[*i] = Arc::new(data);
            return;
        }
        self.index.insert(name.to_string(), self.names.len());
        self.names.push(name.to_string());
        self.shapes.push(shape.to_vec());
        self.data.push(Arc::new(data));
    }

    /// Number of weights.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Position of a weight by name.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// Name, shape and values of weight `i`.
    #[must_use]
    pub fn get(&self, i: usize) -> (&str, &[usize], &[f32]) {
        (&self.names[i], &self.shapes[i], &self.data[i])
    }

    /// Values of weight `i`, to change; copies them first if an interpreter still holds them.
    pub fn values_mut(&mut self, i: usize) -> &mut Vec<f32> {
        Arc::make_mut(&mut self.data[i])
    }

    /// Forgets the values of weight `i`, but neither its name nor its shape.
    pub(crate) fn release(&mut self, i: usize) {
        self.data[i] = Arc::default();
    }
}

impl Params {
    /// The values of all weights, to change, in order.
    pub fn all_values_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.data.iter_mut().map(Arc::make_mut)
    }
}

/// A value on the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var(usize);

/// Row numbers with their shape.
#[derive(Clone, Debug)]
pub struct IndexVar {
    shape: Vec<usize>,
    rows: Arc<Vec<usize>>,
}

enum Op {
    Leaf,
    Param(usize),
    /// a + k b
    Add(Var, Var, f32),
    Mul(Var, Var),
    Scale(Var, f32),
    Pass(Var),
    Linear {
        x: Var,
        w: Var,
        b: Option<Var>,
    },
    MatMul(Var, Var),
    Permute(Var, Vec<usize>),
    Concat(Vec<Var>, usize),
    Slice {
        x: Var,
        axis: usize,
        start: usize,
    },
    Gather(Var, Arc<Vec<usize>>),
    Softmax(Var),
    /// saved: 1/std per row
    LayerNorm {
        x: Var,
        rstd: Vec<f32>,
    },
    RmsNorm {
        x: Var,
        w: Var,
        rstd: Vec<f32>,
    },
    /// saved: normalised x, 1/std per row
    ModNorm {
        x: Var,
        shift: Var,
        scale: Var,
        norm: Vec<f32>,
        rstd: Vec<f32>,
    },
    GatedAdd {
        x: Var,
        y: Var,
        gate: Var,
    },
    ChannelNorm {
        x: Var,
        gamma: Var,
    },
    Mean(Var, usize),
    Gelu(Var),
    Silu(Var),
    Conv2d {
        x: Var,
        w: Var,
        b: Option<Var>,
        stride: [usize; 2],
        pads: [usize; 4],
    },
    Upsample2(Var),
    Rotate {
        x: Var,
        cos: Var,
        sin: Var,
    },
    /// saved: attention weights `[b, heads, nq, nk]`
    Attention {
        q: Var,
        k: Var,
        v: Var,
        bias: Option<Var>,
        scale: f32,
        weights: Vec<f32>,
        heads: usize,
    },
}

struct Node {
    shape: Vec<usize>,
    data: Arc<Vec<f32>>,
    op: Op,
    needs: bool,
}

/// Free buffers of one size.
#[derive(Default)]
struct Shelf {
    free: Vec<Vec<f32>>,
    made: usize,
}

fn give(pool: &mut HashMap<usize, Shelf>, v: Vec<f32>) {
    if let Some(shelf) = pool.get_mut(&v.len()).filter(|s| s.free.len() < s.made) {
        shelf.free.push(v);
    }
}

/// The interpreter; see the module.
#[derive(Default)]
pub struct Eager {
    params: Arc<Params>,
    train: bool,
    only: Vec<String>,
    collect: bool,
    prefix: String,
    nodes: Vec<Node>,
    pool: HashMap<usize, Shelf>,
    cache: HashMap<usize, Var>,
    /// See [`crate::autograd::Autograd::adapt`], by weight.
    adapters: HashMap<usize, (Var, Var, f32)>,
    /// Gradients of the weights, summed over [`Eager::backward`] calls until [`Eager::take_grads`].
    param_grads: Vec<Vec<f32>>,
    marks: Option<Vec<(String, Var)>>,
}

/// Whether a weight is among those whose names contain one of `only`; all are where there are none.
#[must_use]
pub fn is_chosen(only: &[String], name: &str) -> bool {
    only.is_empty() || only.iter().any(|part| name.contains(part.as_str()))
}

fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl Eager {
    /// An interpreter over these weights; `train` keeps what gradients need.
    #[must_use]
    pub fn new(params: Arc<Params>, train: bool) -> Self {
        Self { params, train, ..Self::default() }
    }

    /// An interpreter that makes up zeros for every weight that a network asks for: run it once to learn what
    /// the network needs (see [`Eager::params`]).
    #[must_use]
    pub fn collecting() -> Self {
        Self { collect: true, ..Self::default() }
    }

    /// Gradients of those weights only that these names choose (see [`is_chosen`]); of all where there are none.
    #[must_use]
    pub fn of_only(mut self, only: &[String]) -> Self {
        self.only = only.to_vec();
        self
    }

    /// Whether what is computed from now on keeps what gradients need; returns whether it was so before.
    pub(crate) fn record(&mut self, record: bool) -> bool {
        std::mem::replace(&mut self.train, record)
    }

    /// Puts this before the name of every weight that networks ask for from now on: several networks share one
    /// set of weights.
    pub fn set_prefix(&mut self, prefix: &str) {
        self.prefix = prefix.to_string();
    }

    /// The weights, in the order in which they were added.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Forgets the tape (the buffers go back to the pool) and takes new weights.
    pub fn restart(&mut self, params: Arc<Params>) {
        self.clear();
        self.params = params;
    }

    /// Forgets the tape and the weights; the buffers go back to the pool.
    pub fn clear(&mut self) {
        self.cache.clear();
        self.adapters.clear();
        for node in self.nodes.drain(..) {
            let mut give = |v: Vec<f32>| give(&mut self.pool, v);
            if let Ok(v) = Arc::try_unwrap(node.data) {
                give(v);
            }
            match node.op {
                Op::LayerNorm { rstd, .. } | Op::RmsNorm { rstd, .. } => give(rstd),
                Op::ModNorm { norm, rstd, .. } => {
                    give(norm);
                    give(rstd);
                }
                Op::Attention { weights, .. } => give(weights),
                _ => {}
            }
        }
        self.params = Arc::default();
    }

    /// See [`crate::autograd::Autograd::adapt`].
    pub(crate) fn adapt(&mut self, w: Var, down: Var, up: Var, scale: f32) {
        self.adapters.insert(w.0, (down, up, scale));
    }

    /// Records named intermediate values from now on ([`Ops::mark`]).
    pub fn record_marks(&mut self) {
        self.marks = Some(Vec::new());
    }

    /// The recorded values.
    #[must_use]
    pub fn marks(&self) -> &[(String, Var)] {
        self.marks.as_deref().unwrap_or_default()
    }

    /// An input.
    ///
    /// # Panics
    /// When `data` does not have as many values as `shape`.
    pub fn input(&mut self, shape: &[usize], data: Vec<f32>) -> Var {
        assert_eq!(count(shape), data.len(), "input of shape {shape:?}");
        self.push(shape.to_vec(), data, Op::Leaf, false)
    }

    /// An input whose gradient is wanted (see [`Eager::backward`]).
    ///
    /// # Panics
    /// As [`Eager::input`].
    pub fn variable(&mut self, shape: &[usize], data: Vec<f32>) -> Var {
        assert_eq!(count(shape), data.len(), "variable of shape {shape:?}");
        let train = self.train;
        self.push(shape.to_vec(), data, Op::Leaf, train)
    }

    /// Row numbers.
    ///
    /// # Panics
    /// When `rows` does not have as many values as `shape`.
    #[must_use]
    pub fn index(&self, shape: &[usize], rows: Vec<usize>) -> IndexVar {
        assert_eq!(count(shape), rows.len(), "index of shape {shape:?}");
        IndexVar { shape: shape.to_vec(), rows: Arc::new(rows) }
    }

    /// Shape and values.
    #[must_use]
    pub fn value(&self, x: Var) -> (&[usize], &[f32]) {
        let n = &self.nodes[x.0];
        (&n.shape, &n.data)
    }

    fn shape(&self, x: Var) -> Vec<usize> {
        self.nodes[x.0].shape.clone()
    }

    fn data(&self, x: Var) -> Arc<Vec<f32>> {
        self.nodes[x.0].data.clone()
    }

    fn needs(&self, xs: &[Var]) -> bool {
        self.train && xs.iter().any(|x| self.nodes[x.0].needs)
    }

    fn push(&mut self, shape: Vec<usize>, data: Vec<f32>, op: Op, needs: bool) -> Var {
        self.push_shared(shape, Arc::new(data), op, needs)
    }

    fn push_shared(&mut self, shape: Vec<usize>, data: Arc<Vec<f32>>, op: Op, needs: bool) -> Var {
        debug_assert_eq!(count(&shape), data.len());
        self.nodes.push(Node {
            shape,
            data,
            op: if needs || matches!(op, Op::Leaf) { op } else { Op::Leaf },
            needs,
        });
        Var(self.nodes.len() - 1)
    }

    /// A buffer with arbitrary content.
    fn take(&mut self, n: usize) -> Vec<f32> {
        let shelf = self.pool.entry(n).or_default();
        shelf.free.pop().unwrap_or_else(|| {
            shelf.made += 1;
            vec![0.0; n]
        })
    }

    /// Takes a buffer back. Buffers that came from outside are kept only in place of our own: the pool never grows
    /// beyond what was in use at one time.
    fn give(&mut self, v: Vec<f32>) {
        give(&mut self.pool, v);
    }

    fn zeros(&mut self, n: usize) -> Vec<f32> {
        let mut v = self.take(n);
        v.fill(0.0);
        v
    }

    /// A linear layer as it is.
    fn layer(&mut self, x: &Var, w: &Var, b: Option<&Var>) -> Var {
        let (xs, ws) = (self.shape(*x), self.shape(*w));
        let (k, n) = (ws[1], ws[0]);
        assert_eq!(xs.last(), Some(&k), "linear: {xs:?} by {ws:?}");
        let m = count(&xs) / k;
        let (xd, wd) = (self.data(*x), self.data(*w));
        let mut out = self.take(m * n);
        let mut keep = 0.0;
        if let Some(b) = b {
            let bd = self.data(*b);
            for row in out.chunks_exact_mut(n) {
                row.copy_from_slice(&bd);
            }
            keep = 1.0;
        }
        gemm(
            [m, n, k],
            &mut out,
            View::rows(0, n),
            keep,
            &xd,
            View::rows(0, k),
            &wd,
            View::rows(0, k).t(),
            1.0,
        );
        let mut shape = xs;
        *shape.last_mut().expect("linear needs an axis") = n;
        let needs = self.needs(&[*x, *w]) || b.is_some_and(|b| self.needs(&[*b]));
        self.push(shape, out, Op::Linear { x: *x, w: *w, b: b.copied() }, needs)
    }

    fn map(&mut self, x: &Var, op: Op, f: impl Fn(f32) -> f32) -> Var {
        let (shape, data) = (self.shape(*x), self.data(*x));
        let mut out = self.take(data.len());
        wide(
            #[inline(always)]
            || {
                for (o, v) in out.iter_mut().zip(data.iter()) {
                    *o = f(*v);
                }
            },
        );
        let needs = self.needs(&[*x]);
        self.push(shape, out, op, needs)
    }

    fn binary(&mut self, a: &Var, b: &Var, op: Op, f: impl Fn(f32, f32) -> f32) -> Var {
        let plan = Broadcast::new(&self.nodes[a.0].shape, &self.nodes[b.0].shape);
        let (x, y) = (self.data(*a), self.data(*b));
        let mut out = self.take(count(&plan.shape));
        wide(
            #[inline(always)]
            || {
                plan.rows(|o, i, j, n| {
                    let out = &mut out[o..o + n];
                    match (plan.step_a, plan.step_b) {
                        (1, 1) => {
                            for ((o, a), b) in out.iter_mut().zip(&x[i..i + n]).zip(&y[j..j + n]) {
                                *o = f(*a, *b);
                            }
                        }
                        (1, _) => {
                            let b = y[j];
                            for (o, a) in out.iter_mut().zip(&x[i..i + n]) {
                                *o = f(*a, b);
                            }
                        }
                        (_, 1) => {
                            let a = x[i];
                            for (o, b) in out.iter_mut().zip(&y[j..j + n]) {
                                *o = f(a, *b);
                            }
                        }
                        _ => out.fill(f(x[i], y[j])),
                    }
                });
            },
        );
        let needs = self.needs(&[*a, *b]);
        self.push(plan.shape, out, op, needs)
    }
}

/// How two shapes broadcast: rows of the last (merged) axis, visited in order of the output.
struct Broadcast {
    shape: Vec<usize>,
    /// merged axes: (size, step in a, step in b), slowest first
    axes: Vec<(usize, usize, usize)>,
    step_a: usize,
    step_b: usize,
}

impl Broadcast {
    fn new(a: &[usize], b: &[usize]) -> Self {
        let n = a.len().max(b.len());
        let at = |s: &[usize], i: usize| if i + s.len() < n { 1 } else { s[i + s.len() - n] };
        let mut shape = Vec::with_capacity(n);
        for i in 0..n {
            let (x, y) = (at(a, i), at(b, i));
            assert!(x == y || x == 1 || y == 1, "shapes {a:?} and {b:?} do not broadcast");
            shape.push(x.max(y));
        }
        // Steps from the right, then neighbouring axes merge where both operands run on without a break.
        let (mut sa, mut sb) = (1, 1);
        let mut axes: Vec<(usize, usize, usize)> = Vec::new();
        for i in (0..n).rev() {
            let (x, y) = (at(a, i), at(b, i));
            let axis = (shape[i], if x == 1 { 0 } else { sa }, if y == 1 { 0 } else { sb });
            sa *= x;
            sb *= y;
            if axis.0 == 1 {
                continue;
            }
            match axes.last_mut() {
                Some(last)
                    if (last.1 * last.0 == axis.1 && (last.1 != 0 || axis.1 == 0))
                        && (last.2 * last.0 == axis.2 && (last.2 != 0 || axis.2 == 0)) =>
                {
                    last.0 *= axis.0;
                }
                _ => axes.push(axis),
            }
        }
        if axes.is_empty() {
            axes.push((1, 1, 1));
        }
        axes.reverse();
        let last = axes[axes.len() - 1];
        Self { shape, step_a: last.1, step_b: last.2, axes }
    }

    /// Calls `f(out offset, a offset, b offset, length)` for each row.
    #[inline(always)]
    fn rows(&self, mut f: impl FnMut(usize, usize, usize, usize)) {
        let (outer, last) = self.axes.split_at(self.axes.len() - 1);
        let n = last[0].0;
        let rows: usize = outer.iter().map(|a| a.0).product();
        let mut at = vec![0usize; outer.len()];
        let (mut i, mut j) = (0, 0);
        for row in 0..rows {
            f(row * n, i, j, n);
            for d in (0..outer.len()).rev() {
                at[d] += 1;
                i += outer[d].1;
                j += outer[d].2;
                if at[d] < outer[d].0 {
                    break;
                }
                i -= outer[d].1 * outer[d].0;
                j -= outer[d].2 * outer[d].0;
                at[d] = 0;
            }
        }
    }
}

/// Visits a permutation: `f(out offset, in offset)` for runs of `run` neighbouring values.
fn permuted(shape: &[usize], perm: &[usize], mut f: impl FnMut(usize, usize, usize)) {
    let n = shape.len();
    let mut strides = vec![1; n];
    for i in (0..n - 1).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    let mut keep = n;
    while keep > 0 && perm[keep - 1] == keep - 1 {
        keep -= 1;
    }
    let run: usize = shape[keep..].iter().product();
    let outer: Vec<(usize, usize)> = perm[..keep].iter().map(|p| (shape[*p], strides[*p])).collect();
    let total: usize = outer.iter().map(|a| a.0).product();
    let mut at = vec![0usize; outer.len()];
    let mut i = 0;
    for row in 0..total {
        f(row * run, i, run);
        for d in (0..outer.len()).rev() {
            at[d] += 1;
            i += outer[d].1;
            if at[d] < outer[d].0 {
                break;
            }
            i -= outer[d].1 * outer[d].0;
            at[d] = 0;
        }
    }
}

fn permuted_shape(shape: &[usize], perm: &[usize]) -> Vec<usize> {
    perm.iter().map(|p| shape[*p]).collect()
}

/// Sizes of a convolution.
struct ConvSize {
    n: usize,
    ci: usize,
    h: usize,
    w: usize,
    co: usize,
    kh: usize,
    kw: usize,
    oh: usize,
    ow: usize,
}

impl ConvSize {
    fn new(x: &[usize], w: &[usize], stride: [usize; 2], pads: [usize; 4]) -> Self {
        let (&[n, ci, h, wd], &[co, wi, kh, kw]) = (x, w) else { panic!("conv2d of shapes {x:?} and {w:?}") };
        assert_eq!(ci, wi, "conv2d channels of {x:?} and {w:?}");
        let oh = (h + pads[0] + pads[2] - kh) / stride[0] + 1;
        let ow = (wd + pads[1] + pads[3] - kw) / stride[1] + 1;
        Self { n, ci, h, w: wd, co, kh, kw, oh, ow }
    }

    /// Calls `f(column row, column col, Some(offset in one image's planes))`.
    fn columns(&self, stride: [usize; 2], pads: [usize; 4], mut f: impl FnMut(usize, Option<usize>)) {
        let mut at = 0;
        for c in 0..self.ci {
            for ky in 0..self.kh {
                for kx in 0..self.kw {
                    for oy in 0..self.oh {
                        let y = (oy * stride[0] + ky).wrapping_sub(pads[0]);
                        for ox in 0..self.ow {
                            let x = (ox * stride[1] + kx).wrapping_sub(pads[1]);
                            let inside = y < self.h && x < self.w;
                            f(at, inside.then(|| (c * self.h + y) * self.w + x));
                            at += 1;
                        }
                    }
                }
            }
        }
    }
}

impl Ops for Eager {
    type Tensor = Var;
    type Index = IndexVar;

    fn param(&mut self, name: &str, shape: &[usize]) -> Var {
        let full = format!("{}{name}", self.prefix);
        let name = full.as_str();
        if self.collect && self.params.position(name).is_none() {
            Arc::make_mut(&mut self.params).insert(name, shape, vec![0.0; count(shape)]);
        }
        let i = self.params.position(name).unwrap_or_else(|| panic!("weight `{name}` is missing"));
        if let Some(v) = self.cache.get(&i) {
            return *v;
        }
        assert_eq!(self.params.shapes[i], shape, "shape of weight `{name}`");
        let data = self.params.data[i].clone();
        let needs = self.train && is_chosen(&self.only, name);
        let v = self.push_shared(shape.to_vec(), data, Op::Param(i), needs);
        self.cache.insert(i, v);
        v
    }

    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> Var {
        self.input(shape, data)
    }

    fn add(&mut self, a: &Var, b: &Var) -> Var {
        self.binary(a, b, Op::Add(*a, *b, 1.0), |x, y| x + y)
    }

    fn sub(&mut self, a: &Var, b: &Var) -> Var {
        self.binary(a, b, Op::Add(*a, *b, -1.0), |x, y| x - y)
    }

    fn mul(&mut self, a: &Var, b: &Var) -> Var {
        self.binary(a, b, Op::Mul(*a, *b), |x, y| x * y)
    }

    fn scale(&mut self, x: &Var, k: f32) -> Var {
        self.map(x, Op::Scale(*x, k), |v| v * k)
    }

    fn offset(&mut self, x: &Var, k: f32) -> Var {
        self.map(x, Op::Pass(*x), |v| v + k)
    }

    fn linear(&mut self, x: &Var, w: &Var, b: Option<&Var>) -> Var {
        let y = self.layer(x, w, b);
        let Some((down, up, scale)) = self.adapters.get(&w.0).copied() else { return y };
        let low = low_rank(self, x, (&down, &up, scale));
        self.add(&y, &low)
    }

    fn matmul(&mut self, a: &Var, b: &Var) -> Var {
        let (sa, sb) = (self.shape(*a), self.shape(*b));
        let d = sa.len();
        let (m, k, n) = (sa[d - 2], sa[d - 1], sb[d - 1]);
        assert!(sb.len() == d && sa[..d - 2] == sb[..d - 2] && sb[d - 2] == k, "matmul: {sa:?} by {sb:?}");
        let batch = count(&sa[..d - 2]);
        let (ad, bd) = (self.data(*a), self.data(*b));
        let mut out = self.take(batch * m * n);
        for i in 0..batch {
            gemm(
                [m, n, k],
                &mut out,
                View::rows(i * m * n, n),
                0.0,
                &ad,
                View::rows(i * m * k, k),
                &bd,
                View::rows(i * k * n, n),
                1.0,
            );
        }
        let mut shape = sa;
        shape[d - 1] = n;
        let needs = self.needs(&[*a, *b]);
        self.push(shape, out, Op::MatMul(*a, *b), needs)
    }

    fn reshape(&mut self, x: &Var, dims: &[i64]) -> Var {
        let (old, data) = (self.shape(*x), self.data(*x));
        let mut shape: Vec<usize> = dims
            .iter()
            .enumerate()
            .map(|(i, d)| if *d == 0 { old[i] } else { (*d).max(1) as usize })
            .collect();
        if let Some(i) = dims.iter().position(|d| *d == -1) {
            let known: usize = count(&shape);
            shape[i] = data.len().checked_div(known).unwrap_or(0);
        }
        assert_eq!(count(&shape), data.len(), "reshape {old:?} to {dims:?}");
        let needs = self.needs(&[*x]);
        self.push_shared(shape, data, Op::Pass(*x), needs)
    }

    fn permute(&mut self, x: &Var, perm: &[usize]) -> Var {
        let (shape, data) = (self.shape(*x), self.data(*x));
        assert_eq!(perm.len(), shape.len(), "permute {shape:?} by {perm:?}");
        let mut out = self.take(data.len());
        permuted(&shape, perm, |o, i, n| out[o..o + n].copy_from_slice(&data[i..i + n]));
        let needs = self.needs(&[*x]);
        self.push(permuted_shape(&shape, perm), out, Op::Permute(*x, perm.to_vec()), needs)
    }

    fn concat(&mut self, xs: &[Var], axis: usize) -> Var {
        let mut shape = self.shape(xs[0]);
        shape[axis] = xs.iter().map(|x| self.nodes[x.0].shape[axis]).sum();
        let outer = count(&shape[..axis]);
        let row = count(&shape[axis..]);
        let mut out = self.take(outer * row);
        let mut at = 0;
        for x in xs {
            let part = self.data(*x);
            let n = part.len() / outer;
            for i in 0..outer {
                out[i * row + at..i * row + at + n].copy_from_slice(&part[i * n..(i + 1) * n]);
            }
            at += n;
        }
        let needs = self.needs(xs);
        self.push(shape, out, Op::Concat(xs.to_vec(), axis), needs)
    }

    fn slice(&mut self, x: &Var, axis: usize, start: i64, end: Option<i64>) -> Var {
        let (mut shape, data) = (self.shape(*x), self.data(*x));
        let size = shape[axis] as i64;
        let clip = |v: i64| (if v < 0 { v + size } else { v }).clamp(0, size) as usize;
        let (start, end) = (clip(start), clip(end.unwrap_or(size)));
        let outer = count(&shape[..axis]);
        let inner = count(&shape[axis + 1..]);
        let keep = end.saturating_sub(start);
        let from_row = shape[axis] * inner;
        shape[axis] = keep;
        let n = keep * inner;
        let mut out = self.take(outer * n);
        for i in 0..outer {
            let at = i * from_row + start * inner;
            out[i * n..(i + 1) * n].copy_from_slice(&data[at..at + n]);
        }
        let needs = self.needs(&[*x]);
        self.push(shape, out, Op::Slice { x: *x, axis, start }, needs)
    }

    fn gather(&mut self, table: &Var, index: &IndexVar) -> Var {
        let (ts, data) = (self.shape(*table), self.data(*table));
        let n = count(&ts[1..]);
        let mut out = self.take(index.rows.len() * n);
        for (to, row) in out.chunks_exact_mut(n).zip(index.rows.iter()) {
            assert!(*row < ts[0], "gather row {row} of {}", ts[0]);
            to.copy_from_slice(&data[row * n..(row + 1) * n]);
        }
        let shape = [&index.shape, &ts[1..]].concat();
        let needs = self.needs(&[*table]);
        self.push(shape, out, Op::Gather(*table, index.rows.clone()), needs)
    }

    fn softmax(&mut self, x: &Var) -> Var {
        let (shape, data) = (self.shape(*x), self.data(*x));
        let n = shape[shape.len() - 1];
        let mut out = self.take(data.len());
        out.copy_from_slice(&data);
        softmax_rows(&mut out, n);
        let needs = self.needs(&[*x]);
        self.push(shape, out, Op::Softmax(*x), needs)
    }

    fn layer_norm(&mut self, x: &Var, eps: f32) -> Var {
        let (shape, data) = (self.shape(*x), self.data(*x));
        let n = shape[shape.len() - 1];
        let mut out = self.take(data.len());
        let mut rstd = self.take(data.len() / n);
        normalise(&data, &mut out, &mut rstd, n, eps);
        let needs = self.needs(&[*x]);
        self.push(shape, out, Op::LayerNorm { x: *x, rstd }, needs)
    }

    fn rms_norm(&mut self, x: &Var, weight: &Var, eps: f32) -> Var {
        let (shape, data, w) = (self.shape(*x), self.data(*x), self.data(*weight));
        let n = shape[shape.len() - 1];
        let mut out = self.take(data.len());
        let mut rstd = self.take(data.len() / n);
        wide(
            #[inline(always)]
            || {
                for ((o, x), r) in out.chunks_exact_mut(n).zip(data.chunks_exact(n)).zip(rstd.iter_mut()) {
                    *r = 1.0 / (math::sum(x, |v| v * v) / n as f32 + eps).sqrt();
                    for ((o, x), w) in o.iter_mut().zip(x).zip(w.iter()) {
                        *o = x * *r * w;
                    }
                }
            },
        );
        let needs = self.needs(&[*x, *weight]);
        self.push(shape, out, Op::RmsNorm { x: *x, w: *weight, rstd }, needs)
    }

    fn channel_norm(&mut self, x: &Var, gamma: &Var, channels: usize) -> Var {
        let (shape, data, g) = (self.shape(*x), self.data(*x), self.data(*gamma));
        let (n, hw) = (shape[0], count(&shape[2..]));
        assert!(
            shape[1] == channels && g.len() == channels,
            "channel_norm of {shape:?} with {} weights",
            g.len()
        );
        let k = (channels as f32).sqrt();
        let mut out = self.take(data.len());
        for b in 0..n {
            for p in 0..hw {
                let at = |c: usize| (b * channels + c) * hw + p;
                let norm = (0..channels).map(|c| data[at(c)] * data[at(c)]).sum::<f32>().sqrt().max(1e-12);
                for c in 0..channels {
                    out[at(c)] = data[at(c)] / norm * k * g[c];
                }
            }
        }
        let needs = self.needs(&[*x, *gamma]);
        self.push(shape, out, Op::ChannelNorm { x: *x, gamma: *gamma }, needs)
    }

    fn mean(&mut self, x: &Var, axis: usize) -> Var {
        let (mut shape, data) = (self.shape(*x), self.data(*x));
        let (outer, size, inner) = (count(&shape[..axis]), shape[axis], count(&shape[axis + 1..]));
        let mut out = self.zeros(outer * inner);
        let k = 1.0 / size as f32;
        for o in 0..outer {
            for s in 0..size {
                let from = &data[(o * size + s) * inner..][..inner];
                for (to, v) in out[o * inner..(o + 1) * inner].iter_mut().zip(from) {
                    *to += v * k;
                }
            }
        }
        shape[axis] = 1;
        let needs = self.needs(&[*x]);
        self.push(shape, out, Op::Mean(*x, axis), needs)
    }

    fn gelu_tanh(&mut self, x: &Var) -> Var {
        self.map(x, Op::Gelu(*x), math::gelu)
    }

    fn silu(&mut self, x: &Var) -> Var {
        self.map(x, Op::Silu(*x), math::silu)
    }

    fn conv2d(&mut self, x: &Var, w: &Var, b: Option<&Var>, stride: [usize; 2], pads: [usize; 4]) -> Var {
        let (xd, wd) = (self.data(*x), self.data(*w));
        let s = ConvSize::new(&self.nodes[x.0].shape, &self.nodes[w.0].shape, stride, pads);
        let (k, o) = (s.ci * s.kh * s.kw, s.oh * s.ow);
        let mut columns = self.take(k * o);
        let mut out = self.take(s.n * s.co * o);
        let bias = b.map(|b| self.data(*b));
        for i in 0..s.n {
            let image = &xd[i * s.ci * s.h * s.w..(i + 1) * s.ci * s.h * s.w];
            s.columns(stride, pads, |at, from| columns[at] = from.map_or(0.0, |f| image[f]));
            if let Some(bias) = &bias {
                for (c, v) in bias.iter().enumerate() {
                    out[(i * s.co + c) * o..(i * s.co + c + 1) * o].fill(*v);
                }
            }
            let keep = if bias.is_some() { 1.0 } else { 0.0 };
            let to = View::rows(i * s.co * o, o);
            gemm([s.co, o, k], &mut out, to, keep, &wd, View::rows(0, k), &columns, View::rows(0, o), 1.0);
        }
        self.give(columns);
        let needs = self.needs(&[*x, *w]) || b.is_some_and(|b| self.needs(&[*b]));
        self.push(
            vec![s.n, s.co, s.oh, s.ow],
            out,
            Op::Conv2d { x: *x, w: *w, b: b.copied(), stride, pads },
            needs,
        )
    }

    fn upsample2(&mut self, x: &Var) -> Var {
        let (shape, data) = (self.shape(*x), self.data(*x));
        let (planes, h, w) = (shape[0] * shape[1], shape[2], shape[3]);
        let mut out = self.take(planes * h * w * 4);
        for p in 0..planes {
            for y in 0..2 * h {
                for xx in 0..2 * w {
                    out[(p * 2 * h + y) * 2 * w + xx] = data[(p * h + y / 2) * w + xx / 2];
                }
            }
        }
        let needs = self.needs(&[*x]);
        self.push(vec![shape[0], shape[1], 2 * h, 2 * w], out, Op::Upsample2(*x), needs)
    }

    fn rotate(&mut self, x: &Var, cos: &Var, sin: &Var, heads: usize, head_dim: usize) -> Var {
        let (shape, data, c, s) = (self.shape(*x), self.data(*x), self.data(*cos), self.data(*sin));
        let row = heads * head_dim;
        let half = head_dim / 2;
        // One table for all batch entries, or one for each.
        let n = c.len() / half;
        assert!(n == shape[1] || n == shape[0] * shape[1], "rotate: table for {n} tokens, {shape:?} given");
        let mut out = self.take(data.len());
        for (i, (to, from)) in out.chunks_exact_mut(row).zip(data.chunks_exact(row)).enumerate() {
            let at = i % n * half;
            rotate_row(to, from, &c[at..at + half], &s[at..at + half], head_dim, 1.0);
        }
        let needs = self.needs(&[*x]);
        self.push(shape, out, Op::Rotate { x: *x, cos: *cos, sin: *sin }, needs)
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
        let (qs, ks) = (self.shape(*q), self.shape(*k));
        let (batch, nq, nk, row) = (qs[0], qs[1], ks[1], heads * head_dim);
        assert!(
            count(&qs[2..]) == row && ks[0] == batch && count(&ks[2..]) == row,
            "attention: {qs:?} over {ks:?}"
        );
        let (qd, kd, vd) = (self.data(*q), self.data(*k), self.data(*v));
        let mut weights = self.take(batch * heads * nq * nk);
        let mut out = self.take(batch * nq * row);
        for b in 0..batch {
            for h in 0..heads {
                let at = (b * heads + h) * nq * nk;
                gemm(
                    [nq, nk, head_dim],
                    &mut weights,
                    View::rows(at, nk),
                    0.0,
                    &qd,
                    View::rows(b * nq * row + h * head_dim, row),
                    &kd,
                    View::rows(b * nk * row + h * head_dim, row).t(),
                    scale,
                );
            }
        }
        if let Some(bias) = bias {
            let plan = Broadcast::new(&[batch, heads, nq, nk], &self.nodes[bias.0].shape);
            let bd = self.data(*bias);
            plan.rows(|o, _, j, n| {
                for (i, w) in weights[o..o + n].iter_mut().enumerate() {
                    *w += bd[j + i * plan.step_b];
                }
            });
        }
        softmax_rows(&mut weights, nk);
        for b in 0..batch {
            for h in 0..heads {
                gemm(
                    [nq, head_dim, nk],
                    &mut out,
                    View::rows(b * nq * row + h * head_dim, row),
                    0.0,
                    &weights,
                    View::rows((b * heads + h) * nq * nk, nk),
                    &vd,
                    View::rows(b * nk * row + h * head_dim, row),
                    1.0,
                );
            }
        }
        let needs = self.needs(&[*q, *k, *v]) || bias.is_some_and(|b| self.needs(&[*b]));
        let op = Op::Attention { q: *q, k: *k, v: *v, bias: bias.copied(), scale, weights, heads };
        self.push(vec![batch, nq, row], out, op, needs)
    }

    fn modulated_norm(&mut self, x: &Var, shift: &Var, scale: &Var, eps: f32) -> Var {
        let (shape, data) = (self.shape(*x), self.data(*x));
        let d = shape[shape.len() - 1];
        let (s, c) = (self.data(*shift), self.data(*scale));
        // Rows of the modulation are shared by runs of neighbouring tokens.
        let Some(run) = modulation_run(&shape, &self.nodes[shift.0].shape, &self.nodes[scale.0].shape) else {
            let h = self.layer_norm(x, eps);
            let scale = self.offset(scale, 1.0);
            let h = self.mul(&h, &scale);
            return self.add(&h, shift);
        };
        let mut norm = self.take(data.len());
        let mut rstd = self.take(data.len() / d);
        normalise(&data, &mut norm, &mut rstd, d, eps);
        let mut out = self.take(data.len());
        wide(
            #[inline(always)]
            || {
                for (i, (o, h)) in out.chunks_exact_mut(d).zip(norm.chunks_exact(d)).enumerate() {
                    let at = i / run * d;
                    for (((o, h), s), c) in o.iter_mut().zip(h).zip(&s[at..at + d]).zip(&c[at..at + d]) {
                        *o = h * (1.0 + c) + s;
                    }
                }
            },
        );
        let needs = self.needs(&[*x, *shift, *scale]);
        self.push(shape, out, Op::ModNorm { x: *x, shift: *shift, scale: *scale, norm, rstd }, needs)
    }

    fn gated_add(&mut self, x: &Var, y: &Var, gate: &Var) -> Var {
        let (shape, xd, yd, g) = (self.shape(*x), self.data(*x), self.data(*y), self.data(*gate));
        let d = shape[shape.len() - 1];
        let gs = &self.nodes[gate.0].shape;
        let Some(run) = modulation_run(&shape, gs, gs).filter(|_| self.nodes[y.0].shape == shape) else {
            let y = self.mul(y, gate);
            return self.add(x, &y);
        };
        let mut out = self.take(xd.len());
        wide(
            #[inline(always)]
            || {
                for (i, ((o, x), y)) in
                    out.chunks_exact_mut(d).zip(xd.chunks_exact(d)).zip(yd.chunks_exact(d)).enumerate()
                {
                    let at = i / run * d;
                    for (((o, x), y), g) in o.iter_mut().zip(x).zip(y).zip(&g[at..at + d]) {
                        *o = x + y * g;
                    }
                }
            },
        );
        let needs = self.needs(&[*x, *y, *gate]);
        self.push(shape, out, Op::GatedAdd { x: *x, y: *y, gate: *gate }, needs)
    }

    fn mark(&mut self, name: &str, x: &Var) {
        if let Some(marks) = &mut self.marks {
            marks.push((name.to_string(), *x));
        }
    }
}

/// For `x[.., tokens, d]` and rows `[.., 1, d]` with equal leading axes: how many neighbouring tokens share a row.
fn modulation_run(x: &[usize], a: &[usize], b: &[usize]) -> Option<usize> {
    let n = x.len();
    let fits =
        n >= 2 && a == b && a.len() == n && a[n - 1] == x[n - 1] && a[n - 2] == 1 && a[..n - 2] == x[..n - 2];
    fits.then(|| x[n - 2])
}

fn softmax_rows(x: &mut [f32], n: usize) {
    wide(
        #[inline(always)]
        || {
            for row in x.chunks_exact_mut(n) {
                let mut top = f32::NEG_INFINITY;
                for v in row.iter() {
                    top = top.max(*v);
                }
                for v in row.iter_mut() {
                    *v = math::exp(*v - top);
                }
                let k = 1.0 / math::sum(row, |v| v);
                for v in row.iter_mut() {
                    *v *= k;
                }
            }
        },
    );
}

fn normalise(x: &[f32], out: &mut [f32], rstd: &mut [f32], n: usize, eps: f32) {
    wide(
        #[inline(always)]
        || {
            for ((o, x), r) in out.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(rstd.iter_mut()) {
                let mean = math::sum(x, |v| v) / n as f32;
                let var = math::sum(x, |v| (v - mean) * (v - mean)) / n as f32;
                *r = 1.0 / (var + eps).sqrt();
                for (o, v) in o.iter_mut().zip(x) {
                    *o = (v - mean) * *r;
                }
            }
        },
    );
}

fn rotate_row(to: &mut [f32], from: &[f32], cos: &[f32], sin: &[f32], head_dim: usize, sign: f32) {
    for (to, from) in to.chunks_exact_mut(head_dim).zip(from.chunks_exact(head_dim)) {
        for (((to, from), c), s) in to.chunks_exact_mut(2).zip(from.chunks_exact(2)).zip(cos).zip(sin) {
            to[0] = from[0] * c - from[1] * s * sign;
            to[1] = from[0] * s * sign + from[1] * c;
        }
    }
}

#[cfg(test)]
mod tests;
