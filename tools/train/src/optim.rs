//! Muon for the matrices of the blocks, AdamW for everything else.
//!
//! Muon: momentum (Nesterov), then the nearest semi-orthogonal matrix by Newton-Schulz steps, scaled so that
//! its root mean square is that of an AdamW step (0.2), then decoupled weight decay.

use serde::{Deserialize, Serialize};

use crate::eager::Params;
use crate::eager::ffi::gemm::{View, gemm};
use crate::eager::math::wide;

/// Settings of the optimiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimConfig {
    /// Learning rate at its height.
    pub lr: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Momentum of Muon.
    pub momentum: f64,
    /// First and second moment decay of AdamW.
    pub betas: [f64; 2],
    /// Largest gradient norm (all weights together).
    pub clip: f64,
    /// Whether block matrices use Muon.
    pub muon: bool,
}

/// Which rule a weight follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Orthogonalised momentum.
    Muon,
    /// AdamW with weight decay.
    Matrix,
    /// AdamW without.
    Vector,
}

/// The rule for a weight, from its name and shape.
#[must_use]
pub fn rule(config: &OptimConfig, name: &str, shape: &[usize]) -> Rule {
    if shape.len() != 2 || name.starts_with("text.") || name.starts_with("codec.") {
        return Rule::Vector;
    }
    // Keys and values of the text see four rows only, heads have few outputs: AdamW.
    let muon = name.starts_with("blocks.") && !name.contains("attn2.to_k") && !name.contains("attn2.to_v");
    if muon && config.muon { Rule::Muon } else { Rule::Matrix }
}

/// State of one weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// First moment or momentum.
    pub first: Vec<f32>,
    /// Second moment (AdamW).
    pub second: Vec<f32>,
}

/// Changes one weight by its gradient. `step` counts from 1.
pub fn update(
    config: &OptimConfig,
    rule: Rule,
    shape: &[usize],
    weights: &mut [f32],
    grad: &[f32],
    moments: &mut Moments,
    lr: f64,
    step: u64,
) {
    let n = weights.len();
    moments.first.resize(n, 0.0);
    let decay = 1.0 - (lr * config.weight_decay) as f32;
    if rule == Rule::Muon {
        let mu = config.momentum as f32;
        let mut direction = vec![0.0; n];
        for ((m, g), d) in moments.first.iter_mut().zip(grad).zip(&mut direction) {
            *m = mu * *m + (1.0 - mu) * g;
            *d = mu * *m + (1.0 - mu) * g;
        }
        orthogonalise(&mut direction, shape[0], shape[1]);
        let k = (lr * 0.2 * (shape[0].max(shape[1]) as f64).sqrt()) as f32;
        for (w, d) in weights.iter_mut().zip(&direction) {
            *w = *w * decay - k * d;
        }
        return;
    }
    moments.second.resize(n, 0.0);
    let [b1, b2] = config.betas;
    let scale_1 = (1.0 / (1.0 - b1.powf(step as f64))) as f32;
    let scale_2 = (1.0 / (1.0 - b2.powf(step as f64))) as f32;
    let (b1, b2, lr) = (b1 as f32, b2 as f32, lr as f32);
    let decay = if rule == Rule::Matrix { decay } else { 1.0 };
    wide(
        #[inline(always)]
        || {
            for (((w, g), m), v) in
                weights.iter_mut().zip(grad).zip(moments.first.iter_mut()).zip(moments.second.iter_mut())
            {
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *w = *w * decay - lr * (*m * scale_1) / ((*v * scale_2).sqrt() + 1e-8);
            }
        },
    );
}

/// Nearest semi-orthogonal matrix of `x[rows, cols]`, in place, by four quintic Newton-Schulz steps. They are
/// polynomials of the short side's Gram matrix, so long matrices are touched only at the beginning and the end.
pub fn orthogonalise(x: &mut Vec<f32>, rows: usize, cols: usize) {
    const STEPS: usize = 4;
    let norm = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    let k = (1.0 / (norm + 1e-7)) as f32;
    let (m, n) = (rows.min(cols), rows.max(cols));
    // The short side first.
    let xv = if rows <= cols { View::rows(0, n) } else { View::rows(0, m).t() };
    let av = View::rows(0, m);
    let mut gram = vec![0.0f32; m * m];
    gemm([m, m, n], &mut gram, av, 0.0, x, xv, x, xv.t(), k * k);
    let (ka, kb, kc) = (3.4445, -4.7750, 2.0315);
    let mut product: Vec<f32> = Vec::new();
    let (mut factor, mut other) = (vec![0.0f32; m * m], vec![0.0f32; m * m]);
    for step in 0..STEPS {
        // factor = ka + kb gram + kc gram^2
        factor.copy_from_slice(&gram);
        gemm([m, m, m], &mut factor, av, kb, &gram, av, &gram, av, kc);
        for i in 0..m {
            factor[i * m + i] += ka;
        }
        if product.is_empty() {
            product = factor.clone();
        } else {
            gemm([m, m, m], &mut other, av, 0.0, &factor, av, &product, av, 1.0);
            std::mem::swap(&mut product, &mut other);
        }
        if step + 1 < STEPS {
            // The next Gram matrix: factor gram factor, all of which commute.
            gemm([m, m, m], &mut other, av, 0.0, &factor, av, &gram, av, 1.0);
            gemm([m, m, m], &mut gram, av, 0.0, &other, av, &factor, av, 1.0);
        }
    }
    let mut out = vec![0.0f32; m * n];
    let ov = if rows <= cols { View::rows(0, n) } else { View::rows(0, m).t() };
    gemm([m, n, m], &mut out, ov, 0.0, &product, av, x, xv, k);
    *x = out;
}

/// Rules of all weights.
#[must_use]
pub fn rules(config: &OptimConfig, params: &Params) -> Vec<Rule> {
    (0..params.len())
        .map(|i| {
            let (name, shape, _) = params.get(i);
            rule(config, name, shape)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonalised_rows_are_nearly_orthonormal() {
        for (rows, cols) in [(8, 24), (24, 8)] {
            let mut rng = mindseye_world::Rng::new(5);
            let mut x: Vec<f32> = (0..rows * cols).map(|_| rng.normal() as f32).collect();
            orthogonalise(&mut x, rows, cols);
            let (m, n) = (rows.min(cols), rows.max(cols));
            let at = |i: usize, j: usize| if rows <= cols { x[i * cols + j] } else { x[j * cols + i] };
            for i in 0..m {
                let len: f32 = (0..n).map(|j| at(i, j) * at(i, j)).sum();
                assert!((0.4..1.6).contains(&len), "row {i} of {rows}x{cols} has squared length {len}");
            }
        }
    }
}
