//! The linear codec's basis: the leading principal components of blocks of four images.

use mindseye_world::Rng;

use crate::data::{Codec, Source, Worlds};
use crate::eager::Params;
use crate::eager::ffi::gemm::{View, gemm};
use crate::family::HouseModel;

pub(crate) const BASIS: &str = mindseye_engines::model::codec::BASIS;
pub(crate) const MEAN: &str = mindseye_engines::model::codec::MEAN;

/// The codec's basis from rendered blocks: mean and leading principal components.
///
/// # Panics
/// When there are fewer blocks than values in a block.
#[must_use]
pub fn fit_codec(model: &HouseModel, worlds: impl Into<Worlds>, seed: u64, count: usize) -> Codec {
    let mut source = Source::new(model, worlds, None);
    fit_codec_to(model, seed, source.blocks(seed ^ 0xc0dec, count))
}

/// The codec's basis from blocks `[count, 12 * block^2]`: mean and leading principal components.
///
/// # Panics
/// When there are fewer blocks than values in a block.
#[must_use]
pub fn fit_codec_to(model: &HouseModel, seed: u64, mut blocks: Vec<f32>) -> Codec {
    let (k, c) = (model.codec.block_values(), model.codec.channels);
    let count = blocks.len() / k;
    assert!(count >= k, "codec_blocks = {count}: at least {k} are needed");
    let mut mean = vec![0.0f64; k];
    for b in blocks.chunks_exact(k) {
        for (m, v) in mean.iter_mut().zip(b) {
            *m += f64::from(*v) / count as f64;
        }
    }
    let mean: Vec<f32> = mean.into_iter().map(|v| v as f32).collect();
    for b in blocks.chunks_exact_mut(k) {
        for (v, m) in b.iter_mut().zip(&mean) {
            *v -= m;
        }
    }
    let mut cov = vec![0.0f32; k * k];
    let bv = View::rows(0, k);
    gemm([k, k, count], &mut cov, bv, 0.0, &blocks, bv.t(), &blocks, bv, 1.0 / count as f32);
    // Orthogonal iteration with Gram-Schmidt, from seeded vectors.
    let mut rng = Rng::new(seed ^ 0xba515);
    let mut basis: Vec<f32> = (0..c * k).map(|_| rng.normal() as f32).collect();
    let mut next = vec![0.0f32; c * k];
    for _ in 0..40 {
        gemm([c, k, k], &mut next, View::rows(0, k), 0.0, &basis, View::rows(0, k), &cov, bv, 1.0);
        std::mem::swap(&mut basis, &mut next);
        for i in 0..c {
            for j in 0..i {
                let (head, tail) = basis.split_at_mut(i * k);
                let (a, b) = (&head[j * k..(j + 1) * k], &mut tail[..k]);
                let dot: f32 = a.iter().zip(b.iter()).map(|(x, y)| x * y).sum();
                for (y, x) in b.iter_mut().zip(a) {
                    *y -= dot * x;
                }
            }
            let row = &mut basis[i * k..(i + 1) * k];
            let len = row.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-20);
            for v in row {
                *v /= len;
            }
        }
    }
    Codec { basis, mean }
}
/// The codec among the weights.
#[must_use]
pub fn codec_of(params: &Params) -> Option<Codec> {
    let take = |name: &str| params.position(name).map(|i| params.get(i).2.to_vec());
    Some(Codec { basis: take(BASIS)?, mean: take(MEAN)? })
}
