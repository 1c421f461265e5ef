//! The vocabulary in which every network of the family is written down, once.
//!
//! A network is a function generic over [`Ops`]. Who calls it decides what it means: the eager interpreter
//! computes numbers (and gradients), the ONNX interpreter writes a graph, the counting interpreter adds up
//! arithmetic and collects the parameters. There is no second copy of a forward pass.
//!
//! Conventions: tensors are dense, row-major `f32`; axes are counted from the left and written in the comment
//! beside each call; sizes that may differ between calls (frames, tokens, batch) never appear as numbers in a
//! network: [`Ops::reshape`] copies (`0`) or infers (`-1`) them, as ONNX does.

/// The operations that networks are made of.
///
/// Shape errors are programming errors of the network, not of its input: interpreters panic on them. Names and
/// shapes of foreign weights are checked before a network is run (see [`crate::model::ParamSpec`]).
pub trait Ops {
    /// A tensor of `f32`.
    type Tensor: Clone;
    /// A tensor of integers used to pick rows.
    type Index: Clone;

    /// The weight called `name`, of exactly this shape.
    fn param(&mut self, name: &str, shape: &[usize]) -> Self::Tensor;
    /// A constant.
    fn constant(&mut self, shape: &[usize], data: Vec<f32>) -> Self::Tensor;

    /// `a + b` with numpy broadcasting.
    fn add(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;
    /// `a - b` with numpy broadcasting.
    fn sub(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;
    /// `a * b`, element by element, with numpy broadcasting.
    fn mul(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;
    /// `x * k`.
    fn scale(&mut self, x: &Self::Tensor, k: f32) -> Self::Tensor;
    /// `x + k`.
    fn offset(&mut self, x: &Self::Tensor, k: f32) -> Self::Tensor;

    /// `x[.., in] @ w[out, in]^T + b[out]`; `x` has any number of leading axes.
    fn linear(&mut self, x: &Self::Tensor, w: &Self::Tensor, b: Option<&Self::Tensor>) -> Self::Tensor;
    /// `a[.., m, k] @ b[.., k, n]`; both have the same leading axes.
    fn matmul(&mut self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;

    /// New shape, same elements. `0` copies the size of the same axis of `x`; one `-1` is inferred.
    fn reshape(&mut self, x: &Self::Tensor, dims: &[i64]) -> Self::Tensor;
    /// Axis `i` of the result is axis `perm[i]` of `x`.
    fn permute(&mut self, x: &Self::Tensor, perm: &[usize]) -> Self::Tensor;
    /// Joins along `axis`.
    fn concat(&mut self, xs: &[Self::Tensor], axis: usize) -> Self::Tensor;
    /// `x[.., start..end, ..]` along `axis`; negative bounds count from the end, `None` is the end.
    fn slice(&mut self, x: &Self::Tensor, axis: usize, start: i64, end: Option<i64>) -> Self::Tensor;
    /// Rows of `table[rows, ..]`: the result has shape `index.shape ++ table.shape[1..]`.
    fn gather(&mut self, table: &Self::Tensor, index: &Self::Index) -> Self::Tensor;

    /// Softmax over the last axis, in f32.
    fn softmax(&mut self, x: &Self::Tensor) -> Self::Tensor;
    /// `(x - mean) / sqrt(var + eps)` over the last axis, biased variance, no weights.
    fn layer_norm(&mut self, x: &Self::Tensor, eps: f32) -> Self::Tensor;
    /// `weight[d] * x / sqrt(mean(x^2) + eps)` over the last axis.
    fn rms_norm(&mut self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Self::Tensor;
    /// `gamma[c] * sqrt(c) * x / max(|x|_2, 1e-12)` over axis 1 of `x[n, c, h, w]`; `gamma` has `c` values.
    fn channel_norm(&mut self, x: &Self::Tensor, gamma: &Self::Tensor, channels: usize) -> Self::Tensor;
    /// Mean over one axis, which stays with size 1.
    fn mean(&mut self, x: &Self::Tensor, axis: usize) -> Self::Tensor;

    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    fn gelu_tanh(&mut self, x: &Self::Tensor) -> Self::Tensor;
    /// `x * sigmoid(x)`.
    fn silu(&mut self, x: &Self::Tensor) -> Self::Tensor;

    /// 2-D convolution of `x[n, ci, h, w]` with `w[co, ci, kh, kw]`, zero padding `[top, left, bottom, right]`.
    fn conv2d(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        b: Option<&Self::Tensor>,
        stride: [usize; 2],
        pads: [usize; 4],
    ) -> Self::Tensor;
    /// Nearest-neighbour upsampling by two of `x[n, c, h, w]`.
    fn upsample2(&mut self, x: &Self::Tensor) -> Self::Tensor;

    /// Rotates adjacent pairs of `x[b, n, heads, head_dim]`: `(a, b) -> (a cos - b sin, a sin + b cos)` with
    /// `cos`, `sin` of shape `[n, head_dim / 2]`, the same for every head and batch entry.
    fn rotate(
        &mut self,
        x: &Self::Tensor,
        cos: &Self::Tensor,
        sin: &Self::Tensor,
        heads: usize,
        head_dim: usize,
    ) -> Self::Tensor {
        let half = (head_dim / 2) as i64;
        let pairs = self.reshape(x, &[0, 0, heads as i64, half, 2]); // (b, n, heads, half, 2)
        let a = self.slice(&pairs, 4, 0, Some(1));
        let b = self.slice(&pairs, 4, 1, Some(2));
        let cos = self.reshape(cos, &[1, -1, 1, half, 1]);
        let sin = self.reshape(sin, &[1, -1, 1, half, 1]);
        let (ac, bs) = (self.mul(&a, &cos), self.mul(&b, &sin));
        let (as_, bc) = (self.mul(&a, &sin), self.mul(&b, &cos));
        let first = self.sub(&ac, &bs);
        let second = self.add(&as_, &bc);
        let out = self.concat(&[first, second], 4);
        self.reshape(&out, &[0, 0, heads as i64, head_dim as i64])
    }

    /// Softmax attention of `q[b, nq, heads, d]` over `k`, `v` of shape `[b, nk, heads, d]`; `bias`, where given,
    /// is added to the scores and broadcasts to `[b, heads, nq, nk]`. The result is `[b, nq, heads * d]`.
    fn attention(
        &mut self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        scale: f32,
        bias: Option<&Self::Tensor>,
        heads: usize,
        head_dim: usize,
    ) -> Self::Tensor {
        let q = self.permute(q, &[0, 2, 1, 3]); // (b, heads, nq, d)
        let k = self.permute(k, &[0, 2, 3, 1]); // (b, heads, d, nk)
        let v = self.permute(v, &[0, 2, 1, 3]); // (b, heads, nk, d)
        let q = if scale == 1.0 { q } else { self.scale(&q, scale) };
        let mut scores = self.matmul(&q, &k);
        if let Some(bias) = bias {
            scores = self.add(&scores, bias);
        }
        let weights = self.softmax(&scores);
        let out = self.matmul(&weights, &v);
        let out = self.permute(&out, &[0, 2, 1, 3]); // (b, nq, heads, d)
        self.reshape(&out, &[0, 0, (heads * head_dim) as i64])
    }

    /// `layer_norm(x) * (1 + scale) + shift`, `scale` and `shift` broadcasting to `x`.
    fn modulated_norm(
        &mut self,
        x: &Self::Tensor,
        shift: &Self::Tensor,
        scale: &Self::Tensor,
        eps: f32,
    ) -> Self::Tensor {
        let h = self.layer_norm(x, eps);
        let scale = self.offset(scale, 1.0);
        let h = self.mul(&h, &scale);
        self.add(&h, shift)
    }

    /// `x + y * gate`, `gate` broadcasting to `x`.
    fn gated_add(&mut self, x: &Self::Tensor, y: &Self::Tensor, gate: &Self::Tensor) -> Self::Tensor {
        let y = self.mul(y, gate);
        self.add(x, &y)
    }

    /// Names the value in the interpreter's output where that helps (ONNX node names, per-block probes).
    fn mark(&mut self, _name: &str, _x: &Self::Tensor) {}
}
