//! Each operation's gradient against central differences.

use std::sync::Arc;

use mindseye_engines::model::Ops;

use super::{Eager, Params, Var};

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    }

    fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Checks d(sum of weights * f(inputs))/d(inputs) for every input value.
fn check(name: &str, shapes: &[&[usize]], f: impl Fn(&mut Eager, &[Var]) -> Var) {
    let mut noise = Noise(name.bytes().map(u64::from).sum::<u64>() + 7);
    let inputs: Vec<Vec<f32>> = shapes.iter().map(|s| noise.vec(s.iter().product())).collect();
    let run = |inputs: &[Vec<f32>]| {
        let mut e = Eager::new(Arc::new(Params::new()), true);
        let vars: Vec<Var> = shapes.iter().zip(inputs).map(|(s, d)| e.variable(s, d.clone())).collect();
        let y = f(&mut e, &vars);
        (e, vars, y)
    };
    let (mut e, vars, y) = run(&inputs);
    let weights = noise.vec(e.value(y).1.len());
    let grads = e.backward(vec![(y, weights.clone())]);
    let loss = |inputs: &[Vec<f32>]| -> f64 {
        let (e, _, y) = run(inputs);
        e.value(y).1.iter().zip(&weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let mut largest = 0f64;
    for (i, values) in inputs.iter().enumerate() {
        let got = grads.get(vars[i]).unwrap_or_else(|| panic!("{name}: input {i} has no gradient"));
        for j in 0..values.len() {
            let h = 1e-2f32;
            let mut moved = inputs.clone();
            moved[i][j] = values[j] + h;
            let up = loss(&moved);
            moved[i][j] = values[j] - h;
            let down = loss(&moved);
            let want = (up - down) / (2.0 * f64::from(h));
            let err = (want - f64::from(got[j])).abs();
            largest = largest.max(want.abs());
            assert!(
                err < 4e-3 * (1.0 + want.abs()),
                "{name}: input {i}[{j}]: {want} by differences, {}",
                got[j]
            );
        }
    }
    assert!(largest > 0.01, "{name}: the gradient is zero, nothing was checked");
}

#[test]
fn gradients_match_finite_differences() {
    check("add", &[&[2, 3, 4], &[2, 3, 4]], |e, x| e.add(&x[0], &x[1]));
    check("add row", &[&[2, 3, 4], &[4]], |e, x| e.add(&x[0], &x[1]));
    check("sub middle", &[&[2, 3, 4], &[2, 1, 4]], |e, x| e.sub(&x[0], &x[1]));
    check("mul", &[&[2, 3, 4], &[2, 3, 4]], |e, x| e.mul(&x[0], &x[1]));
    check("mul middle", &[&[2, 3, 4], &[2, 1, 4]], |e, x| e.mul(&x[0], &x[1]));
    check("mul outer", &[&[2, 1, 4], &[1, 3, 1]], |e, x| e.mul(&x[0], &x[1]));
    check("mul last", &[&[2, 3, 1], &[2, 3, 4]], |e, x| e.mul(&x[0], &x[1]));
    check("scale", &[&[5]], |e, x| e.scale(&x[0], -1.7));
    check("offset", &[&[5]], |e, x| e.offset(&x[0], 0.3));
    check("linear", &[&[2, 3, 4], &[5, 4], &[5]], |e, x| e.linear(&x[0], &x[1], Some(&x[2])));
    check("linear shared", &[&[3, 4], &[4, 4]], |e, x| {
        let y = e.linear(&x[0], &x[1], None);
        e.linear(&y, &x[1], None)
    });
    check("matmul", &[&[2, 3, 4], &[2, 4, 5]], |e, x| e.matmul(&x[0], &x[1]));
    check("reshape", &[&[2, 6]], |e, x| {
        let y = e.reshape(&x[0], &[0, 3, -1]);
        e.mul(&y, &y)
    });
    check("permute", &[&[2, 3, 4]], |e, x| e.permute(&x[0], &[2, 0, 1]));
    check("concat", &[&[2, 3], &[2, 2]], |e, x| e.concat(&[x[0], x[1], x[0]], 1));
    check("slice", &[&[2, 5, 2]], |e, x| e.slice(&x[0], 1, 1, Some(-1)));
    check("gather", &[&[3, 2]], |e, x| {
        let rows = e.index(&[2, 2], vec![2, 0, 2, 2]);
        e.gather(&x[0], &rows)
    });
    check("softmax", &[&[3, 5]], |e, x| e.softmax(&x[0]));
    check("layer_norm", &[&[3, 6]], |e, x| e.layer_norm(&x[0], 1e-2));
    check("rms_norm", &[&[3, 6], &[6]], |e, x| e.rms_norm(&x[0], &x[1], 1e-2));
    check("channel_norm", &[&[2, 4, 2, 2], &[4]], |e, x| e.channel_norm(&x[0], &x[1], 4));
    check("mean", &[&[2, 3, 4]], |e, x| e.mean(&x[0], 1));
    check("gelu_tanh", &[&[40]], |e, x| e.gelu_tanh(&x[0]));
    check("silu", &[&[40]], |e, x| e.silu(&x[0]));
    check("conv2d", &[&[2, 3, 5, 4], &[2, 3, 3, 3], &[2]], |e, x| {
        e.conv2d(&x[0], &x[1], Some(&x[2]), [2, 1], [0, 1, 1, 1])
    });
    check("upsample2", &[&[1, 2, 2, 3]], |e, x| e.upsample2(&x[0]));
    check("modulated_norm", &[&[2, 3, 6], &[2, 1, 6], &[2, 1, 6]], |e, x| {
        e.modulated_norm(&x[0], &x[1], &x[2], 1e-2)
    });
    check("gated_add", &[&[2, 3, 4], &[2, 3, 4], &[2, 1, 4]], |e, x| e.gated_add(&x[0], &x[1], &x[2]));
    check("rotate", &[&[2, 3, 2, 4]], |e, x| {
        let cos = e.input(&[3, 2], vec![0.5, 0.8, -0.3, 1.0, 0.1, 0.2]);
        let sin = e.input(&[3, 2], vec![0.8, -0.6, 0.9, 0.0, -1.0, 0.9]);
        e.rotate(&x[0], &cos, &sin, 2, 4)
    });
    check("attention", &[&[2, 3, 2, 4], &[2, 5, 2, 4], &[2, 5, 2, 4]], |e, x| {
        let bias = e.input(&[1, 1, 1, 5], vec![0.0, 0.5, -9.0, 0.0, 0.2]);
        e.attention(&x[0], &x[1], &x[2], 0.7, Some(&bias), 2, 4)
    });
    // A bias by head and key, and one for every score.
    for bias in [[1, 2, 1, 5], [2, 2, 3, 5]] {
        check("attention with a bias", &[&[2, 3, 2, 4], &[2, 5, 2, 4], &[2, 5, 2, 4], &bias], |e, x| {
            e.attention(&x[0], &x[1], &x[2], 0.7, Some(&x[3]), 2, 4)
        });
    }
}

/// The defaults of the trait and our own faster forms are the same functions.
#[test]
fn overrides_equal_the_composed_forms() {
    struct Plain(Eager);
    macro_rules! same {
        ($a:expr, $b:expr, $e:expr) => {
            let (x, y) = ($e.value($a).1.to_vec(), $e.value($b).1.to_vec());
            assert_eq!(x.len(), y.len());
            for (x, y) in x.iter().zip(&y) {
                assert!((x - y).abs() < 1e-5, "{x} {y}");
            }
        };
    }
    let mut noise = Noise(3);
    let mut p = Plain(Eager::new(Arc::new(Params::new()), false));
    let e = &mut p.0;
    let x = e.input(&[2, 3, 6], noise.vec(36));
    let (s, c) = (e.input(&[2, 1, 6], noise.vec(12)), e.input(&[2, 1, 6], noise.vec(12)));
    let fast = e.modulated_norm(&x, &s, &c, 1e-6);
    let h = e.layer_norm(&x, 1e-6);
    let one = e.offset(&c, 1.0);
    let h = e.mul(&h, &one);
    let slow = e.add(&h, &s);
    same!(fast, slow, e);
    let q = e.input(&[2, 3, 2, 4], noise.vec(48));
    let k = e.input(&[2, 5, 2, 4], noise.vec(80));
    let v = e.input(&[2, 5, 2, 4], noise.vec(80));
    let fast = e.attention(&q, &k, &v, 0.5, None, 2, 4);
    let (qp, kp, vp) =
        (e.permute(&q, &[0, 2, 1, 3]), e.permute(&k, &[0, 2, 3, 1]), e.permute(&v, &[0, 2, 1, 3]));
    let scores = e.matmul(&qp, &kp);
    let scores = e.scale(&scores, 0.5);
    let w = e.softmax(&scores);
    let slow = e.matmul(&w, &vp);
    let slow = e.permute(&slow, &[0, 2, 1, 3]);
    same!(fast, slow, e);
}
