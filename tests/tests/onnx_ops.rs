//! Each operation as the graph writer spells it, run on rten, against a plain loop.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::sync::Arc;

use mindseye_builder::onnx::{GraphBuilder, MemoryWeights, NodeValue};
use mindseye_engines::backend::{BackendError, PrepareOptions, Tensor, by_name};
use mindseye_engines::model::Ops;
use mindseye_engines::onnx::{Dim, SaveOptions};

/// Numbers in -1..1 that repeat from run to run.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Writes a graph, runs it with the inputs and returns shape and values of its result. All first sizes are symbols.
fn run(
    inputs: &[(&str, &[usize], &[f32])],
    index: &[(&str, &[usize], &[i64])],
    weights: MemoryWeights,
    build: impl FnOnce(&mut GraphBuilder, &[NodeValue], &[mindseye_builder::onnx::IndexValue]) -> NodeValue,
    rank: usize,
) -> (Vec<usize>, Vec<f32>) {
    let mut ops = GraphBuilder::new("test", Arc::new(weights));
    let dims = |name: &str, shape: &[usize]| {
        let mut dims: Vec<Dim> = shape.iter().map(|&s| Dim::Fixed(s)).collect();
        dims[0] = Dim::Symbol(format!("n_{name}"));
        dims
    };
    let values: Vec<NodeValue> = inputs.iter().map(|(n, s, _)| ops.input(n, &dims(n, s))).collect();
    let indices: Vec<_> = index.iter().map(|(n, s, _)| ops.index_input(n, &dims(n, s))).collect();
    let y = build(&mut ops, &values, &indices);
    ops.output("y", &y, &vec![Dim::Unknown; rank]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test.onnx");
    ops.finish().unwrap().save(&path, &SaveOptions::default()).unwrap();
    let options = PrepareOptions::default().with_threads(1);
    let engine = by_name("rten").unwrap().prepare(&path, &options).unwrap();
    let mut tensors: Vec<(&str, Tensor)> =
        inputs.iter().map(|(n, s, v)| (*n, Tensor::f32(s, v.to_vec()))).collect();
    tensors.extend(index.iter().map(|(n, s, v)| (*n, Tensor::i64(s, v.to_vec()))));
    let given: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    let mut session = engine.session().unwrap();
    let first = session.run(&given).unwrap().remove(0).1;
    let again = session.run(&given).unwrap().remove(0).1;
    assert_eq!(first, again, "two runs give the same bits");
    (first.shape.clone(), first.into_f32().unwrap())
}

#[track_caller]
fn check(what: &str, got: (Vec<usize>, Vec<f32>), shape: &[usize], wanted: &[f32]) {
    assert_eq!(got.0, shape, "{what}");
    let worst = got.1.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert_eq!(got.1.len(), wanted.len(), "{what}");
    assert!(worst < 2e-6, "{what}: off by {worst}\n{:?}\n{wanted:?}", got.1);
}

fn map(values: &[f32], f: impl Fn(f64) -> f64) -> Vec<f32> {
    values.iter().map(|&v| f(f64::from(v)) as f32).collect()
}

#[test]
fn elementwise() {
    let (a, b) = (noise(6, 1), noise(3, 2));
    let both = [("a", &[2, 3][..], &a[..]), ("b", &[1, 3][..], &b[..])];
    type Binary = fn(&mut GraphBuilder, &NodeValue, &NodeValue) -> NodeValue;
    type BinaryLoop = fn(f64, f64) -> f64;
    let table: [(&str, Binary, BinaryLoop); 3] = [
        ("add", GraphBuilder::add, |a, b| a + b),
        ("sub", GraphBuilder::sub, |a, b| a - b),
        ("mul", GraphBuilder::mul, |a, b| a * b),
    ];
    for (what, op, plain) in table {
        let got = run(&both, &[], MemoryWeights::new(), |o, v, _| op(o, &v[0], &v[1]), 2);
        let wanted: Vec<f32> = (0..6).map(|i| plain(f64::from(a[i]), f64::from(b[i % 3])) as f32).collect();
        check(what, got, &[2, 3], &wanted);
    }
    type Unary = fn(&mut GraphBuilder, &NodeValue) -> NodeValue;
    type UnaryLoop = fn(f64) -> f64;
    let table: [(&str, Unary, UnaryLoop); 4] = [
        ("scale", |o, x| o.scale(x, 3.5), |v| 3.5 * v),
        ("offset", |o, x| o.offset(x, -2.0), |v| v - 2.0),
        ("silu", |o, x| o.silu(x), |v| v / (1.0 + (-v).exp())),
        (
            "gelu_tanh",
            |o, x| o.gelu_tanh(x),
            |v| 0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v)).tanh()),
        ),
    ];
    for (what, op, plain) in table {
        let x = map(&noise(10, 3), |v| 4.0 * v);
        let got = run(&[("x", &[2, 5], &x)], &[], MemoryWeights::new(), |o, v, _| op(o, &v[0]), 2);
        check(what, got, &[2, 5], &map(&x, plain));
    }
}

#[test]
fn linear_and_matmul() {
    let (x, w, b) = (noise(2 * 3 * 4, 1), noise(5 * 4, 2), noise(5, 3));
    let weights =
        || MemoryWeights::from([("l.weight", vec![5, 4], w.clone()), ("l.bias", vec![5], b.clone())]);
    let mut wanted = vec![0.0; 6 * 5];
    for row in 0..6 {
        for out in 0..5 {
            let sum: f64 = (0..4).map(|i| f64::from(x[row * 4 + i]) * f64::from(w[out * 4 + i])).sum();
            wanted[row * 5 + out] = (sum + f64::from(b[out])) as f32;
        }
    }
    let dense = |o: &mut GraphBuilder, v: &[NodeValue]| {
        let (w, b) = (o.param("l.weight", &[5, 4]), o.param("l.bias", &[5]));
        o.linear(&v[0], &w, Some(&b))
    };
    let got = run(&[("x", &[2, 3, 4], &x)], &[], weights(), |o, v, _| dense(o, v), 3);
    check("linear", got, &[2, 3, 5], &wanted);
    // The weight as an input: transposed in the graph.
    let got = run(
        &[("x", &[2, 3, 4], &x), ("w", &[5, 4], &w)],
        &[],
        weights(),
        |o, v, _| {
            let b = o.param("l.bias", &[5]);
            o.linear(&v[0], &v[1], Some(&b))
        },
        3,
    );
    check("linear, computed weight", got, &[2, 3, 5], &wanted);

    let (a, b) = (noise(2 * 3 * 4, 4), noise(2 * 4 * 2, 5));
    let mut wanted = vec![0.0; 2 * 3 * 2];
    for (n, out) in wanted.iter_mut().enumerate() {
        let (batch, row, column) = (n / 6, n / 2 % 3, n % 2);
        *out = (0..4).map(|k| a[batch * 12 + row * 4 + k] * b[batch * 8 + k * 2 + column]).sum();
    }
    let inputs = [("a", &[2, 3, 4][..], &a[..]), ("b", &[2, 4, 2][..], &b[..])];
    let got = run(&inputs, &[], MemoryWeights::new(), |o, v, _| o.matmul(&v[0], &v[1]), 3);
    check("matmul", got, &[2, 3, 2], &wanted);
}

#[test]
fn shapes() {
    let x: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let input = [("x", &[2, 3, 4][..], &x[..])];
    let none = MemoryWeights::new;
    let got = run(&input, &[], none(), |o, v, _| o.reshape(&v[0], &[0, -1, 2]), 3);
    check("reshape", got, &[2, 6, 2], &x);
    let got = run(&input, &[], none(), |o, v, _| o.permute(&v[0], &[2, 0, 1]), 3);
    let wanted: Vec<f32> = (0..24).map(|i| x[i % 6 / 3 * 12 + i % 3 * 4 + i / 6]).collect();
    check("permute", got, &[4, 2, 3], &wanted);
    let got = run(&input, &[], none(), |o, v, _| o.slice(&v[0], 2, -3, Some(-1)), 3);
    let wanted: Vec<f32> = x.chunks(4).flat_map(|r| r[1..3].to_vec()).collect();
    check("slice", got, &[2, 3, 2], &wanted);
    let got = run(&input, &[], none(), |o, v, _| o.slice(&v[0], 1, 1, None), 3);
    let wanted: Vec<f32> = x.chunks(12).flat_map(|r| r[4..].to_vec()).collect();
    check("slice to the end", got, &[2, 2, 4], &wanted);
    let got = run(&input, &[], none(), |o, v, _| o.concat(&[v[0].clone(), v[0].clone()], 1), 3);
    let wanted: Vec<f32> = x.chunks(12).flat_map(|r| [r, r].concat()).collect();
    check("concat", got, &[2, 6, 4], &wanted);
    let index = [("i", &[2, 2][..], &[1i64, 0, 1, 1][..])];
    let got = run(&input, &index, none(), |o, v, i| o.gather(&v[0], &i[0]), 4);
    let wanted: Vec<f32> = [1, 0, 1, 1].iter().flat_map(|&r| x[r * 12..r * 12 + 12].to_vec()).collect();
    check("gather", got, &[2, 2, 3, 4], &wanted);
    let got = run(&input, &[], none(), |o, v, _| o.mean(&v[0], 1), 3);
    let wanted: Vec<f32> = (0..8).map(|i| x[i / 4 * 12 + i % 4] + 4.0).collect();
    check("mean", got, &[2, 1, 4], &wanted);
}

/// What is done to weights while they are written equals what is done to values while the graph runs.
#[test]
fn steps_on_weights_are_folded() {
    let w = noise(2 * 3 * 4, 9);
    let weights = MemoryWeights::from([("w", vec![2, 3, 4], w.clone())]);
    type Chain = fn(&mut GraphBuilder, &NodeValue) -> NodeValue;
    let chains: [(&str, Chain, &[usize]); 3] = [
        ("permute", |o, x| o.permute(x, &[2, 0, 1]), &[4, 2, 3]),
        ("slice", |o, x| o.slice(x, 1, 1, None), &[2, 2, 4]),
        (
            "all",
            |o, x| {
                let x = o.permute(x, &[1, 2, 0]);
                let x = o.slice(&x, 1, -3, Some(-1));
                let x = o.scale(&x, 0.5);
                o.reshape(&x, &[4, -1])
            },
            &[4, 3],
        ),
    ];
    for (what, chain, shape) in chains {
        let zero = vec![0.0; shape.iter().product()];
        let folded = run(
            &[("z", shape, &zero)],
            &[],
            weights.clone(),
            |o, v, _| {
                let w = o.param("w", &[2, 3, 4]);
                let w = chain(o, &w);
                o.add(&v[0], &w)
            },
            shape.len(),
        );
        let computed =
            run(&[("w", &[2, 3, 4], &w)], &[], MemoryWeights::new(), |o, v, _| chain(o, &v[0]), shape.len());
        assert_eq!(folded, computed, "{what}");
        assert_eq!(folded.0, shape, "{what}");
    }
}

#[test]
fn norms_and_softmax() {
    let x = map(&noise(12, 1), |v| 3.0 * v);
    let input = [("x", &[3, 4][..], &x[..])];
    let (g, b) = (noise(4, 2), noise(4, 3));
    let weights = || MemoryWeights::from([("g", vec![4], g.clone()), ("b", vec![4], b.clone())]);
    let rows = |f: &dyn Fn(&[f64]) -> Vec<f64>| -> Vec<f32> {
        let row = |r: &[f32]| f(&r.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
        x.chunks(4).flat_map(row).map(|v| v as f32).collect()
    };
    let normed = |r: &[f64]| -> Vec<f64> {
        let mean = r.iter().sum::<f64>() / 4.0;
        let var = r.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4.0;
        r.iter().map(|v| (v - mean) / (var + 1e-3).sqrt()).collect()
    };
    let got = run(&input, &[], weights(), |o, v, _| o.layer_norm(&v[0], 1e-3), 2);
    check("layer_norm", got, &[3, 4], &rows(&normed));
    // Weight and bias are taken into the norm; a second bias is not.
    let affine = |times: usize| {
        let got = run(
            &input,
            &[],
            weights(),
            |o, v, _| {
                let (g, b) = (o.param("g", &[4]), o.param("b", &[4]));
                let mut h = o.layer_norm(&v[0], 1e-3);
                h = o.mul(&h, &g);
                for _ in 0..times {
                    h = o.add(&h, &b);
                }
                h
            },
            2,
        );
        let wanted = rows(&|r| {
            let at = |i: usize| normed(r)[i] * f64::from(g[i]) + times as f64 * f64::from(b[i]);
            (0..4).map(at).collect()
        });
        check(&format!("affine norm, {times} biases"), got, &[3, 4], &wanted);
    };
    (0..3).for_each(affine);
    let got = run(
        &input,
        &[],
        weights(),
        |o, v, _| {
            let g = o.param("g", &[4]);
            o.rms_norm(&v[0], &g, 1e-3)
        },
        2,
    );
    let wanted = rows(&|r| {
        let rms = (r.iter().map(|v| v * v).sum::<f64>() / 4.0 + 1e-3).sqrt();
        (0..4).map(|i| r[i] / rms * f64::from(g[i])).collect()
    });
    check("rms_norm", got, &[3, 4], &wanted);
    let got = run(&input, &[], weights(), |o, v, _| o.softmax(&v[0]), 2);
    let wanted = rows(&|r| {
        let sum: f64 = r.iter().map(|v| v.exp()).sum();
        r.iter().map(|v| v.exp() / sum).collect()
    });
    check("softmax", got, &[3, 4], &wanted);

    // One pixel is all zeros: the clamp keeps it zero.
    let mut image = noise(2 * 3 * 2, 4);
    for c in 0..3 {
        image[c * 2] = 0.0;
    }
    let gamma = noise(3, 5);
    let weights = MemoryWeights::from([("gamma", vec![3, 1, 1], gamma.clone())]);
    let got = run(
        &[("x", &[2, 3, 1, 2], &image)],
        &[],
        weights,
        |o, v, _| {
            let gamma = o.param("gamma", &[3, 1, 1]);
            o.channel_norm(&v[0], &gamma, 3)
        },
        4,
    );
    let wanted: Vec<f32> = (0..12)
        .map(|i| {
            let (n, c, p) = (i / 6, i / 2 % 3, i % 2);
            let at = |c: usize| f64::from(image[n * 6 + c * 2 + p]);
            let norm = (0..3).map(|c| at(c) * at(c)).sum::<f64>().sqrt().max(1e-12);
            (f64::from(gamma[c]) * 3f64.sqrt() * at(c) / norm) as f32
        })
        .collect();
    check("channel_norm", got, &[2, 3, 1, 2], &wanted);
}

#[test]
fn images() {
    let x = noise(2 * 3 * 5 * 4, 1);
    let (w, b) = (noise(2 * 3 * 3 * 2, 2), noise(2, 3));
    let weights = MemoryWeights::from([("w", vec![2, 3, 3, 2], w.clone()), ("b", vec![2], b.clone())]);
    let pads = [1, 0, 2, 1]; // top, left, bottom, right
    let got = run(
        &[("x", &[2, 3, 5, 4], &x)],
        &[],
        weights,
        |o, v, _| {
            let (w, b) = (o.param("w", &[2, 3, 3, 2]), o.param("b", &[2]));
            o.conv2d(&v[0], &w, Some(&b), [2, 1], pads)
        },
        4,
    );
    let (oh, ow) = ((5 + 1 + 2 - 3) / 2 + 1, 4 + 1 - 2 + 1);
    let mut wanted = Vec::new();
    for n in 0..2 {
        for (co, bias) in b.iter().enumerate() {
            for y in 0..oh {
                for z in 0..ow {
                    let mut sum = f64::from(*bias);
                    for ci in 0..3 {
                        for ky in 0..3 {
                            for kx in 0..2 {
                                let (iy, ix) = ((y * 2 + ky) as isize - 1, z + kx);
                                if (0..5).contains(&iy) && ix < 4 {
                                    let at = ((n * 3 + ci) * 5 + iy as usize) * 4 + ix;
                                    let k = ((co * 3 + ci) * 3 + ky) * 2 + kx;
                                    sum += f64::from(x[at]) * f64::from(w[k]);
                                }
                            }
                        }
                    }
                    wanted.push(sum as f32);
                }
            }
        }
    }
    check("conv2d", got, &[2, 2, oh, ow], &wanted);
    let small = noise(6, 5);
    let got =
        run(&[("x", &[1, 1, 2, 3], &small)], &[], MemoryWeights::new(), |o, v, _| o.upsample2(&v[0]), 4);
    let wanted: Vec<f32> = (0..24).map(|i| small[i / 6 / 2 * 3 + i % 6 / 2]).collect();
    check("upsample2", got, &[1, 1, 4, 6], &wanted);
}

/// Rotated queries and keys give the scores of adjacent pairs, whether their channels come from weights (which are
/// reordered) or from elsewhere.
#[test]
fn rotation_keeps_scores() {
    let (heads, dim, tokens) = (2, 6, 3);
    let width = heads * dim;
    let (x, wq, wk) = (noise(tokens * width, 1), noise(width * width, 2), noise(width * width, 3));
    let (bq, nq) = (noise(width, 4), noise(width, 5));
    let angles = noise(tokens * dim / 2, 6);
    let (cos, sin) = (map(&angles, f64::cos), map(&angles, f64::sin));
    let weights = MemoryWeights::from([
        ("q.weight", vec![width, width], wq.clone()),
        ("q.bias", vec![width], bq.clone()),
        ("q.norm", vec![width], nq.clone()),
        ("k.weight", vec![width, width], wk.clone()),
    ]);
    let table = [tokens, dim / 2];
    let inputs = [
        ("x", &[1, tokens, width][..], &x[..]),
        ("cos", &table[..], &cos[..]),
        ("sin", &table[..], &sin[..]),
    ];
    let network = |direct: bool| {
        move |o: &mut GraphBuilder, v: &[NodeValue], _: &[mindseye_builder::onnx::IndexValue]| {
            let w = o.param("q.weight", &[width, width]);
            let b = o.param("q.bias", &[width]);
            let n = o.param("q.norm", &[width]);
            let q = o.linear(&v[0], &w, Some(&b));
            let q = o.rms_norm(&q, &n, 1e-6);
            let w = o.param("k.weight", &[width, width]);
            let mut k = o.linear(&v[0], &w, None);
            if !direct {
                k = o.offset(&k, 0.0); // between weight and rotation: cannot be reordered
            }
            let shape = [0, 0, heads as i64, dim as i64];
            let (q, k) = (o.reshape(&q, &shape), o.reshape(&k, &shape));
            let q = o.rotate(&q, &v[1], &v[2], heads, dim);
            let k = o.rotate(&k, &v[1], &v[2], heads, dim);
            let q = o.permute(&q, &[0, 2, 1, 3]);
            let k = o.permute(&k, &[0, 2, 3, 1]);
            o.matmul(&q, &k)
        }
    };
    // In f64, with adjacent pairs.
    let linear = |w: &[f32], b: Option<&[f32]>| -> Vec<f64> {
        (0..tokens * width)
            .map(|i| {
                let (t, o) = (i / width, i % width);
                let dot = (0..width).map(|c| f64::from(x[t * width + c]) * f64::from(w[o * width + c]));
                dot.sum::<f64>() + b.map_or(0.0, |b| f64::from(b[o]))
            })
            .collect()
    };
    let mut q = linear(&wq, Some(&bq));
    for row in q.chunks_mut(width) {
        let rms = (row.iter().map(|v| v * v).sum::<f64>() / width as f64 + 1e-6).sqrt();
        row.iter_mut().zip(&nq).for_each(|(v, n)| *v *= f64::from(*n) / rms);
    }
    let mut k = linear(&wk, None);
    for values in [&mut q, &mut k] {
        for (t, row) in values.chunks_mut(width).enumerate() {
            for (p, pair) in row.chunks_mut(2).enumerate() {
                let angle = t * dim / 2 + p % (dim / 2);
                let (c, s) = (f64::from(cos[angle]), f64::from(sin[angle]));
                (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c);
            }
        }
    }
    let mut wanted = Vec::new();
    for head in 0..heads {
        for a in 0..tokens {
            for b in 0..tokens {
                let at = |v: &[f64], t: usize, d: usize| v[t * width + head * dim + d];
                wanted.push((0..dim).map(|d| at(&q, a, d) * at(&k, b, d)).sum::<f64>() as f32);
            }
        }
    }
    for direct in [true, false] {
        let got = run(&inputs, &[], weights.clone(), network(direct), 4);
        assert_eq!(got.0, [1, heads, tokens, tokens]);
        for (a, b) in got.1.iter().zip(&wanted) {
            assert!((a - b).abs() < 1e-5, "direct {direct}: {a} and {b}");
        }
    }
}

#[test]
fn attention_is_softmax_of_scaled_scores() {
    let (heads, dim, nq, nk) = (2, 3, 2, 4);
    let (q, k, v) = (noise(nq * heads * dim, 1), noise(nk * heads * dim, 2), noise(nk * heads * dim, 3));
    let bias = [0.0, -1e9, 0.5, 0.0, 0.0, 0.0, 0.0, -1e9];
    let shape = |n: usize| [1, n, heads, dim];
    let (sq, sk) = (shape(nq), shape(nk));
    let inputs = [("q", &sq[..], &q[..]), ("k", &sk, &k), ("v", &sk, &v), ("bias", &[1, 1, nq, nk], &bias)];
    for masked in [false, true] {
        let got = run(
            &inputs[..if masked { 4 } else { 3 }],
            &[],
            MemoryWeights::new(),
            |o, t, _| o.attention(&t[0], &t[1], &t[2], 0.7, masked.then(|| &t[3]), heads, dim),
            3,
        );
        let mut wanted = vec![0f32; nq * heads * dim];
        for head in 0..heads {
            for i in 0..nq {
                let at = |x: &[f32], n: usize, d: usize| f64::from(x[(n * heads + head) * dim + d]);
                let scores: Vec<f64> = (0..nk)
                    .map(|j| {
                        let dot: f64 = (0..dim).map(|d| at(&q, i, d) * at(&k, j, d)).sum();
                        (0.7 * dot + if masked { f64::from(bias[i * nk + j]) } else { 0.0 }).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for d in 0..dim {
                    let mixed: f64 = (0..nk).map(|j| scores[j] / sum * at(&v, j, d)).sum();
                    wanted[(i * heads + head) * dim + d] = mixed as f32;
                }
            }
        }
        check(&format!("attention, masked {masked}"), got, &[1, nq, heads * dim], &wanted);
    }
}

/// A value that is read rotated and unrotated: its channels are put into halves at run time, the weight is as it was.
#[test]
fn a_value_that_is_read_rotated_and_unrotated() {
    let (x, w) = (noise(3 * 4, 2), noise(16, 1));
    let angles = noise(3 * 2, 6);
    let (cos, sin) = (map(&angles, f64::cos), map(&angles, f64::sin));
    let got = run(
        &[("x", &[1, 3, 4], &x), ("cos", &[3, 2], &cos), ("sin", &[3, 2], &sin)],
        &[],
        MemoryWeights::from([("w", vec![4, 4], w.clone())]),
        |o, v, _| {
            let w = o.param("w", &[4, 4]);
            let q = o.linear(&v[0], &w, None);
            let q = o.reshape(&q, &[0, 0, 1, 4]);
            let r = o.rotate(&q, &v[1], &v[2], 1, 4);
            // One number per token, whatever the order in which rotated channels are kept.
            let square = o.mul(&r, &r);
            let (square, q) = (o.mean(&square, 3), o.slice(&q, 3, 1, Some(2)));
            o.add(&square, &q)
        },
        4,
    );
    let wanted: Vec<f32> = (0..3)
        .map(|t| {
            let q: Vec<f64> = (0..4)
                .map(|o| (0..4).map(|i| f64::from(x[t * 4 + i]) * f64::from(w[o * 4 + i])).sum())
                .collect();
            let mut square = 0.0;
            for pair in 0..2 {
                let (c, s) = (f64::from(cos[t * 2 + pair]), f64::from(sin[t * 2 + pair]));
                let (a, b) = (q[2 * pair], q[2 * pair + 1]);
                square += (a * c - b * s).powi(2) + (a * s + b * c).powi(2);
            }
            (square / 4.0 + q[1]) as f32
        })
        .collect();
    check("rotated and not", got, &[1, 3, 1, 1], &wanted);
}

#[test]
fn wrong_weights_and_inputs_are_named() {
    let finish = |weights: MemoryWeights| {
        let mut o = GraphBuilder::new("test", Arc::new(weights));
        let x = o.input("x", &[Dim::from("n"), Dim::from(2)]);
        let w = o.param("blocks.0.w", &[3, 2]);
        let y = o.linear(&x, &w, None);
        o.output("y", &y, &[Dim::from("n"), Dim::from(3)]);
        o.finish()
    };
    let error = finish(MemoryWeights::new()).unwrap_err().to_string();
    assert!(error.contains("blocks.0.w") && error.contains("missing"), "{error}");
    let error =
        finish(MemoryWeights::from([("blocks.0.w", vec![2, 3], noise(6, 1))])).unwrap_err().to_string();
    assert!(error.contains("blocks.0.w") && error.contains("[3, 2]") && error.contains("[2, 3]"), "{error}");

    let model = finish(MemoryWeights::from([("blocks.0.w", vec![3, 2], noise(6, 1))])).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.onnx");
    model.save(&path, &SaveOptions::default()).unwrap();
    let backend = by_name("rten").unwrap();
    let engine = backend.prepare(&path, &PrepareOptions::default()).unwrap();
    let mut session = engine.session().unwrap();
    let wide = Tensor::f32(&[4, 3], vec![0.0; 12]);
    let good = Tensor::f32(&[4, 2], vec![0.0; 8]);
    let whole = Tensor::i64(&[4, 2], vec![0; 8]);
    for (given, wanted) in [
        (vec![("x", &wide)], "f32 [n, 2], got f32 [4, 3]"),
        (vec![("x", &whole)], "got i64 [4, 2]"),
        (vec![], "got nothing"),
        (vec![("x", &good), ("z", &good)], "one of x"),
    ] {
        let error = session.run(&given).unwrap_err();
        assert!(matches!(error, BackendError::Input { .. }), "{error}");
        assert!(error.to_string().contains(wanted), "{error} does not say {wanted}");
    }

    let mut broken = model.clone();
    broken.graph.nodes[0].op_type = "NoSuchOperator".into();
    broken.save(&path, &SaveOptions::default()).unwrap();
    let error = backend.prepare(&path, &PrepareOptions::default()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("NoSuchOperator") && error.contains("m.onnx"), "{error}");
}
