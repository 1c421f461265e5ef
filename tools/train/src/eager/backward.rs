//! Reverse pass over the tape.

use std::sync::Arc;

use super::ffi::gemm::{View, gemm};
use super::math::{self, wide};
use super::{Broadcast, ConvSize, Eager, Op, Var, count, permuted, permuted_shape, rotate_row};

/// Gradients by tape position.
pub struct Grads {
    by_node: Vec<Option<Vec<f32>>>,
}

impl Grads {
    /// Gradient of a [`Eager::variable`], if the outputs depend on it.
    #[must_use]
    pub fn get(&self, x: Var) -> Option<&[f32]> {
        self.by_node[x.0].as_deref()
    }
}

impl Eager {
    /// Walks the tape back from the given outputs and their gradients. Weight gradients are added up inside
    /// (see [`Eager::take_grads`]); gradients of variables are returned.
    ///
    /// # Panics
    /// When the interpreter was not made for training, or a gradient has the wrong size.
    pub fn backward(&mut self, outputs: Vec<(Var, Vec<f32>)>) -> Grads {
        assert!(self.train, "the interpreter was made without gradients");
        self.param_grads.resize_with(self.params.len(), Vec::new);
        let mut grads: Vec<Option<Vec<f32>>> = Vec::new();
        grads.resize_with(self.nodes.len(), || None);
        for (x, g) in outputs {
            assert_eq!(g.len(), self.nodes[x.0].data.len(), "gradient of output {}", x.0);
            add_into(self, &mut grads, x, g);
        }
        for i in (0..self.nodes.len()).rev() {
            let keep_leaf = matches!(self.nodes[i].op, Op::Leaf);
            if keep_leaf || !self.nodes[i].needs {
                continue;
            }
            let Some(g) = grads[i].take() else { continue };
            self.step_back(i, g, &mut grads);
        }
        Grads { by_node: grads }
    }

    /// The summed weight gradients, one vector per weight in the order of [`super::Params`] (empty = no gradient);
    /// they start again from nothing.
    pub fn take_grads(&mut self) -> Vec<Vec<f32>> {
        std::mem::take(&mut self.param_grads)
    }

    fn step_back(&mut self, i: usize, g: Vec<f32>, grads: &mut [Option<Vec<f32>>]) {
        let op = std::mem::replace(&mut self.nodes[i].op, Op::Leaf);
        let shape = self.nodes[i].shape.clone();
        match &op {
            Op::Leaf => {}
            Op::Param(p) => {
                let slot = &mut self.param_grads[*p];
                if slot.is_empty() {
                    *slot = g;
                } else {
                    accumulate(slot, &g);
                    self.give(g);
                }
                self.nodes[i].op = op;
                return;
            }
            Op::Add(a, b, k) => {
                self.reduce_to(*a, *b, &g, grads, |g, _| g, true);
                let k = *k;
                self.reduce_to(*a, *b, &g, grads, move |g, _| g * k, false);
            }
            Op::Mul(a, b) => {
                self.reduce_to(*a, *b, &g, grads, |g, other| g * other, true);
                self.reduce_to(*a, *b, &g, grads, |g, other| g * other, false);
            }
            Op::Scale(x, k) => self.scale_back(*x, *k, &g, grads),
            Op::Pass(x) => {
                add_into(self, grads, *x, g);
                self.nodes[i].op = op;
                return;
            }
            Op::Linear { x, w, b } => self.linear_back(*x, *w, *b, &g, grads),
            Op::MatMul(a, b) => self.matmul_back(*a, *b, &g, grads),
            Op::Permute(x, perm) => self.permute_back(*x, perm, &shape, &g, grads),
            Op::Concat(xs, axis) => self.concat_back(xs, *axis, &shape, &g, grads),
            Op::Slice { x, axis, start } => self.slice_back(*x, *axis, *start, &shape, &g, grads),
            Op::Gather(table, rows) => self.gather_back(*table, rows, &g, grads),
            Op::Softmax(x) => {
                let y = self.nodes[i].data.clone();
                let n = shape[shape.len() - 1];
                let mut d = self.take(g.len());
                d.copy_from_slice(&g);
                softmax_back(&mut d, &y, n, 1.0);
                add_into(self, grads, *x, d);
            }
            Op::LayerNorm { x, rstd } => {
                let y = self.nodes[i].data.clone();
                let n = shape[shape.len() - 1];
                let mut d = self.take(g.len());
                norm_back(&mut d, &g, &y, rstd, n);
                add_into(self, grads, *x, d);
            }
            Op::RmsNorm { x, w, rstd } => self.rms_back(*x, *w, rstd, &g, grads),
            Op::ModNorm { x, shift, scale, norm, rstd } => {
                self.mod_norm_back([*x, *shift, *scale], norm, rstd, &g, grads);
            }
            Op::GatedAdd { x, y, gate } => {
                self.gated_back(*y, *gate, &g, grads);
                let x = *x;
                self.nodes[i].op = op;
                add_into(self, grads, x, g);
                return;
            }
            Op::ChannelNorm { x, gamma } => self.channel_back(*x, *gamma, &g, grads),
            Op::Mean(x, axis) => self.mean_back(*x, *axis, &g, grads),
            Op::Gelu(x) => self.map_back(*x, &g, grads, math::gelu_grad),
            Op::Silu(x) => self.map_back(*x, &g, grads, math::silu_grad),
            Op::Conv2d { x, w, b, stride, pads } => self.conv_back([*x, *w], *b, *stride, *pads, &g, grads),
            Op::Upsample2(x) => self.upsample_back(*x, &g, grads),
            Op::Rotate { x, cos, sin } => self.rotate_back(*x, [*cos, *sin], &shape, &g, grads),
            Op::Attention { q, k, v, bias, scale, weights, heads } => {
                self.attention_back([*q, *k, *v], *bias, *scale, weights, *heads, &g, grads);
            }
        }
        self.nodes[i].op = op;
        self.give(g);
    }

    fn gather_back(&mut self, table: Var, rows: &[usize], g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let full = self.nodes[table.0].shape.clone();
        let n = count(&full[1..]);
        let mut d = self.zeros(count(&full));
        for (g, row) in g.chunks_exact(n).zip(rows) {
            accumulate(&mut d[row * n..(row + 1) * n], g);
        }
        add_into(self, grads, table, d);
    }

    fn scale_back(&mut self, x: Var, k: f32, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let mut d = self.take(g.len());
        for (d, g) in d.iter_mut().zip(g) {
            *d = g * k;
        }
        add_into(self, grads, x, d);
    }

    fn permute_back(
        &mut self,
        x: Var,
        perm: &[usize],
        shape: &[usize],
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let mut back = vec![0; perm.len()];
        for (to, from) in perm.iter().enumerate() {
            back[*from] = to;
        }
        debug_assert_eq!(permuted_shape(shape, &back), self.nodes[x.0].shape);
        let mut d = self.take(g.len());
        permuted(shape, &back, |o, j, n| d[o..o + n].copy_from_slice(&g[j..j + n]));
        add_into(self, grads, x, d);
    }

    fn concat_back(
        &mut self,
        xs: &[Var],
        axis: usize,
        shape: &[usize],
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let (outer, row) = (count(&shape[..axis]), count(&shape[axis..]));
        let mut at = 0;
        for x in xs {
            let n = self.nodes[x.0].data.len() / outer;
            if self.nodes[x.0].needs {
                let mut d = self.take(outer * n);
                for o in 0..outer {
                    d[o * n..(o + 1) * n].copy_from_slice(&g[o * row + at..o * row + at + n]);
                }
                add_into(self, grads, *x, d);
            }
            at += n;
        }
    }

    fn slice_back(
        &mut self,
        x: Var,
        axis: usize,
        start: usize,
        shape: &[usize],
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let full = self.nodes[x.0].shape.clone();
        let mut d = self.zeros(count(&full));
        let inner = count(&full[axis + 1..]);
        let n = shape[axis] * inner;
        for o in 0..count(&full[..axis]) {
            let at = (o * full[axis] + start) * inner;
            d[at..at + n].copy_from_slice(&g[o * n..(o + 1) * n]);
        }
        add_into(self, grads, x, d);
    }

    fn mean_back(&mut self, x: Var, axis: usize, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let full = self.nodes[x.0].shape.clone();
        let (outer, size, inner) = (count(&full[..axis]), full[axis], count(&full[axis + 1..]));
        let k = 1.0 / size as f32;
        let mut d = self.take(count(&full));
        for o in 0..outer {
            for s in 0..size {
                for j in 0..inner {
                    d[(o * size + s) * inner + j] = g[o * inner + j] * k;
                }
            }
        }
        add_into(self, grads, x, d);
    }

    fn upsample_back(&mut self, x: Var, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let s = self.nodes[x.0].shape.clone();
        let (planes, h, w) = (s[0] * s[1], s[2], s[3]);
        let mut d = self.zeros(count(&s));
        for p in 0..planes {
            for y in 0..2 * h {
                for xx in 0..2 * w {
                    d[(p * h + y / 2) * w + xx / 2] += g[(p * 2 * h + y) * 2 * w + xx];
                }
            }
        }
        add_into(self, grads, x, d);
    }

    fn rotate_back(
        &mut self,
        x: Var,
        [cos, sin]: [Var; 2],
        shape: &[usize],
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let head_dim = shape[3];
        let (row, half) = (shape[2] * head_dim, head_dim / 2);
        let mut d = self.take(g.len());
        let (c, s) = (self.data(cos), self.data(sin));
        let n = c.len() / half;
        for (r, (to, from)) in d.chunks_exact_mut(row).zip(g.chunks_exact(row)).enumerate() {
            let at = r % n * half;
            rotate_row(to, from, &c[at..at + half], &s[at..at + half], head_dim, -1.0);
        }
        add_into(self, grads, x, d);
    }

    /// Adds `f(gradient, other operand)` to the gradient of one operand of a broadcasting operation, summing
    /// where it was repeated.
    fn reduce_to(
        &mut self,
        a: Var,
        b: Var,
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
        f: impl Fn(f32, f32) -> f32,
        first: bool,
    ) {
        let (target, other) = if first { (a, b) } else { (b, a) };
        if !self.nodes[target.0].needs {
            return;
        }
        let (ts, os) = (self.nodes[target.0].shape.clone(), self.nodes[other.0].shape.clone());
        let plan = Broadcast::new(&ts, &os);
        let od = self.data(other);
        let mut d = self.zeros(count(&ts));
        wide(
            #[inline(always)]
            || {
                plan.rows(|o, i, j, n| {
                    let g = &g[o..o + n];
                    match (plan.step_a, plan.step_b) {
                        (1, 1) => {
                            for ((d, g), o) in d[i..i + n].iter_mut().zip(g).zip(&od[j..j + n]) {
                                *d += f(*g, *o);
                            }
                        }
                        (1, _) => {
                            let o = od[j];
                            for (d, g) in d[i..i + n].iter_mut().zip(g) {
                                *d += f(*g, o);
                            }
                        }
                        (_, 1) => d[i] += math::sum2(g, &od[j..j + n], &f),
                        _ => {
                            let o = od[j];
                            d[i] += math::sum(g, |g| f(g, o));
                        }
                    }
                });
            },
        );
        add_into(self, grads, target, d);
    }

    fn map_back(&mut self, x: Var, g: &[f32], grads: &mut [Option<Vec<f32>>], f: impl Fn(f32) -> f32) {
        let xd = self.data(x);
        let mut d = self.take(g.len());
        wide(
            #[inline(always)]
            || {
                for ((d, g), x) in d.iter_mut().zip(g).zip(xd.iter()) {
                    *d = g * f(*x);
                }
            },
        );
        add_into(self, grads, x, d);
    }

    fn linear_back(&mut self, x: Var, w: Var, b: Option<Var>, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let (xd, wd) = (self.data(x), self.data(w));
        let ws = self.nodes[w.0].shape.clone();
        let (n, k) = (ws[0], ws[1]);
        let m = g.len() / n;
        if self.nodes[x.0].needs {
            // Added straight into the gradient that is there already.
            let (mut d, keep) = match grads[x.0].take() {
                Some(d) => (d, 1.0),
                None => (self.take(m * k), 0.0),
            };
            gemm([m, k, n], &mut d, View::rows(0, k), keep, g, View::rows(0, n), &wd, View::rows(0, k), 1.0);
            grads[x.0] = Some(d);
        }
        if self.nodes[w.0].needs {
            let (mut d, keep) = match grads[w.0].take() {
                Some(d) => (d, 1.0),
                None => (self.take(n * k), 0.0),
            };
            gemm(
                [n, k, m],
                &mut d,
                View::rows(0, k),
                keep,
                g,
                View::rows(0, n).t(),
                &xd,
                View::rows(0, k),
                1.0,
            );
            grads[w.0] = Some(d);
        }
        if let Some(b) = b.filter(|b| self.nodes[b.0].needs) {
            let mut d = self.zeros(n);
            wide(
                #[inline(always)]
                || {
                    for row in g.chunks_exact(n) {
                        for (d, g) in d.iter_mut().zip(row) {
                            *d += g;
                        }
                    }
                },
            );
            add_into(self, grads, b, d);
        }
    }

    fn matmul_back(&mut self, a: Var, b: Var, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let (sa, sb) = (self.nodes[a.0].shape.clone(), self.nodes[b.0].shape.clone());
        let d = sa.len();
        let (m, k, n) = (sa[d - 2], sa[d - 1], sb[d - 1]);
        let batch = count(&sa[..d - 2]);
        let (ad, bd) = (self.data(a), self.data(b));
        let (mut da, mut db) = (self.take(batch * m * k), self.take(batch * k * n));
        for i in 0..batch {
            let gv = View::rows(i * m * n, n);
            let (av, bv) = (View::rows(i * m * k, k), View::rows(i * k * n, n));
            gemm([m, k, n], &mut da, av, 0.0, g, gv, &bd, bv.t(), 1.0);
            gemm([k, n, m], &mut db, bv, 0.0, &ad, av.t(), g, gv, 1.0);
        }
        add_into(self, grads, a, da);
        add_into(self, grads, b, db);
    }

    fn rms_back(&mut self, x: Var, w: Var, rstd: &[f32], g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let (xd, wd) = (self.data(x), self.data(w));
        let n = wd.len();
        let mut dx = self.take(g.len());
        let mut dw = self.zeros(n);
        wide(
            #[inline(always)]
            || {
                for (((d, g), x), r) in
                    dx.chunks_exact_mut(n).zip(g.chunks_exact(n)).zip(xd.chunks_exact(n)).zip(rstd)
                {
                    for ((d, g), w) in d.iter_mut().zip(g).zip(wd.iter()) {
                        *d = g * w * r;
                    }
                    let dot = math::sum2(d, x, |a, b| a * b) * r * r / n as f32;
                    for (((d, x), g), w) in d.iter_mut().zip(x).zip(g).zip(dw.iter_mut()) {
                        *d -= x * dot;
                        *w += g * x * r;
                    }
                }
            },
        );
        add_into(self, grads, x, dx);
        add_into(self, grads, w, dw);
    }

    fn mod_norm_back(
        &mut self,
        [x, shift, scale]: [Var; 3],
        norm: &[f32],
        rstd: &[f32],
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let d = *self.nodes[x.0].shape.last().expect("a norm has an axis");
        let cd = self.data(scale);
        let run = g.len() / cd.len();
        let mut dn = self.take(g.len());
        let (mut ds, mut dc) = (self.zeros(cd.len()), self.zeros(cd.len()));
        wide(
            #[inline(always)]
            || {
                for (i, ((dn, g), h)) in
                    dn.chunks_exact_mut(d).zip(g.chunks_exact(d)).zip(norm.chunks_exact(d)).enumerate()
                {
                    let at = i / run * d;
                    let (ds, dc, c) = (&mut ds[at..at + d], &mut dc[at..at + d], &cd[at..at + d]);
                    for (((((dn, g), h), ds), dc), c) in dn.iter_mut().zip(g).zip(h).zip(ds).zip(dc).zip(c) {
                        *dn = g * (1.0 + c);
                        *ds += g;
                        *dc += g * h;
                    }
                }
            },
        );
        let mut dx = self.take(g.len());
        norm_back(&mut dx, &dn, norm, rstd, d);
        self.give(dn);
        add_into(self, grads, x, dx);
        add_into(self, grads, shift, ds);
        add_into(self, grads, scale, dc);
    }

    fn gated_back(&mut self, y: Var, gate: Var, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let (yd, gd) = (self.data(y), self.data(gate));
        let d = *self.nodes[y.0].shape.last().expect("a gate has an axis");
        let run = g.len() / gd.len();
        let mut dy = self.take(g.len());
        let mut dg = self.zeros(gd.len());
        wide(
            #[inline(always)]
            || {
                for (i, ((dy, g), y)) in
                    dy.chunks_exact_mut(d).zip(g.chunks_exact(d)).zip(yd.chunks_exact(d)).enumerate()
                {
                    let at = i / run * d;
                    for ((((dy, g), y), dg), k) in
                        dy.iter_mut().zip(g).zip(y).zip(&mut dg[at..at + d]).zip(&gd[at..at + d])
                    {
                        *dy = g * k;
                        *dg += g * y;
                    }
                }
            },
        );
        add_into(self, grads, y, dy);
        add_into(self, grads, gate, dg);
    }

    fn channel_back(&mut self, x: Var, gamma: Var, g: &[f32], grads: &mut [Option<Vec<f32>>]) {
        let (xd, gd) = (self.data(x), self.data(gamma));
        let s = self.nodes[x.0].shape.clone();
        let (n, c, hw) = (s[0], s[1], count(&s[2..]));
        let k = (c as f32).sqrt();
        let (mut dx, mut dg) = (self.take(g.len()), self.zeros(c));
        for b in 0..n {
            for p in 0..hw {
                let at = |ch: usize| (b * c + ch) * hw + p;
                let norm = (0..c).map(|ch| xd[at(ch)] * xd[at(ch)]).sum::<f32>().sqrt();
                let len = norm.max(1e-12);
                let dot: f32 = (0..c).map(|ch| g[at(ch)] * gd[ch] * k * xd[at(ch)]).sum();
                for ch in 0..c {
                    let direct = g[at(ch)] * gd[ch] * k / len;
                    let pull = if norm > 1e-12 { xd[at(ch)] * dot / (len * len * len) } else { 0.0 };
                    dx[at(ch)] = direct - pull;
                    dg[ch] += g[at(ch)] * k * xd[at(ch)] / len;
                }
            }
        }
        add_into(self, grads, x, dx);
        add_into(self, grads, gamma, dg);
    }

    fn conv_back(
        &mut self,
        [x, w]: [Var; 2],
        b: Option<Var>,
        stride: [usize; 2],
        pads: [usize; 4],
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let (xd, wd) = (self.data(x), self.data(w));
        let s = ConvSize::new(&self.nodes[x.0].shape, &self.nodes[w.0].shape, stride, pads);
        let (k, o, image) = (s.ci * s.kh * s.kw, s.oh * s.ow, s.ci * s.h * s.w);
        let (mut dx, mut dw) = (self.zeros(xd.len()), self.zeros(wd.len()));
        let mut columns = self.take(k * o);
        for i in 0..s.n {
            let xi = &xd[i * image..(i + 1) * image];
            let gv = View::rows(i * s.co * o, o);
            s.columns(stride, pads, |at, from| columns[at] = from.map_or(0.0, |f| xi[f]));
            gemm([s.co, k, o], &mut dw, View::rows(0, k), 1.0, g, gv, &columns, View::rows(0, o).t(), 1.0);
            gemm([k, o, s.co], &mut columns, View::rows(0, o), 0.0, &wd, View::rows(0, k).t(), g, gv, 1.0);
            let di = &mut dx[i * image..(i + 1) * image];
            s.columns(stride, pads, |at, from| {
                if let Some(f) = from {
                    di[f] += columns[at];
                }
            });
        }
        self.give(columns);
        add_into(self, grads, x, dx);
        add_into(self, grads, w, dw);
        if let Some(b) = b {
            let mut db = self.zeros(s.co);
            for (row, g) in g.chunks_exact(o).enumerate() {
                db[row % s.co] += g.iter().sum::<f32>();
            }
            add_into(self, grads, b, db);
        }
    }

    fn attention_back(
        &mut self,
        [q, k, v]: [Var; 3],
        bias: Option<Var>,
        scale: f32,
        weights: &[f32],
        heads: usize,
        g: &[f32],
        grads: &mut [Option<Vec<f32>>],
    ) {
        let (qs, ks) = (self.nodes[q.0].shape.clone(), self.nodes[k.0].shape.clone());
        let (batch, nq, nk) = (qs[0], qs[1], ks[1]);
        let row = count(&qs[2..]);
        let d = row / heads;
        let (qd, kd, vd): (Arc<Vec<f32>>, _, _) = (self.data(q), self.data(k), self.data(v));
        let (mut dq, mut dk, mut dv) = (self.take(qd.len()), self.take(kd.len()), self.take(vd.len()));
        let mut ds = self.take(nq * nk);
        // The gradient of the bias is that of the scores, added up where it was broadcast.
        let mut bias = bias.filter(|b| self.nodes[b.0].needs).map(|b| {
            let shape = self.nodes[b.0].shape.clone();
            let plan = Broadcast::new(&[batch, heads, nq, nk], &shape);
            (b, plan, self.zeros(count(&shape)), self.take(batch * heads * nq * nk))
        });
        for b in 0..batch {
            for h in 0..heads {
                let at = (b * heads + h) * nq * nk;
                let qv = View::rows(b * nq * row + h * d, row);
                let kv = View::rows(b * nk * row + h * d, row);
                let wv = View::rows(at, nk);
                let sv = View::rows(0, nk);
                gemm([nk, d, nq], &mut dv, kv, 0.0, weights, wv.t(), g, qv, 1.0);
                gemm([nq, nk, d], &mut ds, sv, 0.0, g, qv, &vd, kv.t(), 1.0);
                let own = &weights[at..at + nq * nk];
                if let Some((.., scores)) = &mut bias {
                    softmax_back(&mut ds, own, nk, 1.0);
                    scores[at..at + nq * nk].copy_from_slice(&ds);
                    ds.iter_mut().for_each(|d| *d *= scale);
                } else {
                    softmax_back(&mut ds, own, nk, scale);
                }
                gemm([nq, d, nk], &mut dq, qv, 0.0, &ds, sv, &kd, kv, 1.0);
                gemm([nk, d, nq], &mut dk, kv, 0.0, &ds, sv.t(), &qd, qv, 1.0);
            }
        }
        self.give(ds);
        if let Some((b, plan, mut db, scores)) = bias {
            plan.rows(|o, _, j, n| {
                for (i, s) in scores[o..o + n].iter().enumerate() {
                    db[j + i * plan.step_b] += s;
                }
            });
            self.give(scores);
            add_into(self, grads, b, db);
        }
        add_into(self, grads, q, dq);
        add_into(self, grads, k, dk);
        add_into(self, grads, v, dv);
    }
}

fn add_into(eager: &mut Eager, grads: &mut [Option<Vec<f32>>], x: Var, g: Vec<f32>) {
    if !eager.nodes[x.0].needs {
        eager.give(g);
        return;
    }
    match &mut grads[x.0] {
        Some(sum) => {
            accumulate(sum, &g);
            eager.give(g);
        }
        slot => *slot = Some(g),
    }
}

/// `a += b`.
pub fn accumulate(a: &mut [f32], b: &[f32]) {
    wide(
        #[inline(always)]
        || {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
        },
    );
}

/// In place: gradient of the softmax output to gradient of its input, times `scale`.
fn softmax_back(d: &mut [f32], y: &[f32], n: usize, scale: f32) {
    wide(
        #[inline(always)]
        || {
            for (d, y) in d.chunks_exact_mut(n).zip(y.chunks_exact(n)) {
                let dot = math::sum2(d, y, |a, b| a * b);
                for (d, y) in d.iter_mut().zip(y) {
                    *d = (*d - dot) * y * scale;
                }
            }
        },
    );
}

/// Gradient of `(x - mean) / std` from its output `y`.
fn norm_back(d: &mut [f32], g: &[f32], y: &[f32], rstd: &[f32], n: usize) {
    wide(
        #[inline(always)]
        || {
            for (((d, g), y), r) in
                d.chunks_exact_mut(n).zip(g.chunks_exact(n)).zip(y.chunks_exact(n)).zip(rstd)
            {
                let mean = math::sum(g, |v| v) / n as f32;
                let dot = math::sum2(g, y, |a, b| a * b) / n as f32;
                for ((d, g), y) in d.iter_mut().zip(g).zip(y) {
                    *d = (g - mean - y * dot) * r;
                }
            }
        },
    );
}
