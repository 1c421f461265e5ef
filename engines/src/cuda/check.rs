//! Every kernel on a device: its error against sums in f64, and its rate.

use std::collections::HashSet;
use std::sync::Arc;

use mindseye_base::random::Rng;
use serde::Serialize;

use super::kernels::{Activation, Element, ElementOp, Kernel};
use super::plan::{PRODUCT_NAME, Planner, Queued, Slot};
use super::program::{Codes, Op, Program, Step};
use super::{CudaError, Device, Memory, Pinned};

/// One kernel on a device.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct KernelReport {
    /// Its name.
    pub kernel: &'static str,
    /// Sizes at which it was held against f64.
    pub shape: String,
    /// L2 of the difference over L2 of the right result.
    pub relative_error: f64,
    /// Most that [`KernelReport::relative_error`] may be.
    pub allowed: f64,
    /// Sizes at which it was timed.
    pub timed_shape: String,
    /// Milliseconds of one call.
    pub millis: f64,
    /// Arithmetic or memory traffic by the second.
    pub rate: f64,
    /// `TFLOP/s` or `GB/s`.
    pub unit: &'static str,
}

/// An operand: its elements are rounded to its type.
#[derive(Clone)]
struct Operand {
    element: Element,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// One step with its inputs: sizes for the values, and larger ones for the time.
struct Case {
    op: Op,
    /// The kernel that must do it; none where it is the library of products.
    kernel: Option<Kernel>,
    inputs: Vec<(Element, Vec<usize>)>,
    timed: Vec<(Element, Vec<usize>)>,
}

/// Runs every kernel, and products by the library where the device has one. `small` times them at the sizes at which they are checked, as an emulator needs it.
///
/// # Errors
/// A failed call.
pub fn check_kernels(device: &Arc<dyn Device>, small: bool) -> Result<Vec<KernelReport>, CudaError> {
    let mut random = Rng::new(5);
    let mut reports = Vec::new();
    let products = if device.products().is_some() { products() } else { Vec::new() };
    for case in products.into_iter().chain(cases()) {
        let name = case.kernel.map_or(PRODUCT_NAME, Kernel::name);
        let library = case.kernel.is_none();
        let given = operands(&case.inputs, &mut random);
        let once = run(device, &case.op, &given, 1, library)?;
        let wanted = reference(&case.op, &given);
        let (mut difference, mut size) = (0.0, 0.0);
        for (&got, &right) in once.values.iter().zip(&wanted) {
            difference += (f64::from(got) - right).powi(2);
            size += right.powi(2);
        }
        let complete = once.values.len() == wanted.len() && once.name == name;
        let relative_error = if complete { (difference / size).sqrt() } else { f64::INFINITY };
        let (timed_shape, timed) = if small {
            (&case.inputs, once)
        } else {
            (&case.timed, run(device, &case.op, &operands(&case.timed, &mut random), 20, library)?)
        };
        let (work, unit) = work(&case.op, timed_shape, timed.values.len());
        reports.push(KernelReport {
            kernel: name,
            shape: shown(&case.inputs),
            relative_error,
            allowed: if case.inputs.iter().any(|i| i.0 == Element::Bf16) { 4e-3 } else { 5e-6 },
            timed_shape: shown(timed_shape),
            millis: timed.millis,
            rate: work / (timed.millis * 1e-3),
            unit,
        });
    }
    Ok(reports)
}

/// Fills device memory from page-locked memory and reads it back: seconds of each way.
///
/// # Errors
/// A failed call; [`CudaError::Call`] where other bytes come back.
pub fn round_trip(
    device: &Arc<dyn Device>,
    memory: &Memory,
    staging: &mut Pinned,
) -> Result<[f64; 2], CudaError> {
    let bytes = memory.bytes().min(staging.bytes().len());
    let pattern = |i: usize| (i * 7 % 251) as u8;
    staging.bytes_mut().iter_mut().enumerate().for_each(|(i, b)| *b = pattern(i));
    // SAFETY: both ranges are at least `bytes` long, here and below; `time` waits for the copy.
    let there =
        device.time(&mut || unsafe { device.copy_in(memory.address(), staging.bytes().as_ptr(), bytes) })?;
    device.synchronize()?;
    staging.bytes_mut().fill(0);
    let to = staging.bytes_mut().as_mut_ptr();
    // SAFETY: as above.
    let back = device.time(&mut || unsafe { device.copy_out(to, memory.address(), bytes) })?;
    device.synchronize()?;
    match staging.bytes()[..bytes].iter().enumerate().position(|(i, &b)| b != pattern(i)) {
        None => Ok([there * 1e-3, back * 1e-3]),
        Some(at) => {
            let reason = format!("byte {at} of {bytes} came back changed");
            Err(CudaError::Call { call: "a copy to the device and back", reason })
        }
    }
}

/// Linear layers of the large model by the library.
fn products() -> Vec<Case> {
    use Element::{Bf16, F32};
    let inputs = |[m, k, n]: [usize; 3]| vec![(Bf16, vec![m, k]), (Bf16, vec![k, n]), (F32, vec![n])];
    let case = |activation, large| Case {
        op: Op::Linear(activation),
        kernel: None,
        inputs: inputs([200, 72, 136]),
        timed: inputs(large),
    };
    let (square, wide) = ([13_624, 3072, 3072], [13_624, 3072, 14_336]);
    vec![case(Activation::None, square), case(Activation::GeluTanh, wide)]
}

/// Every kernel at a small size with edges, and at one that is timed. Long, since it is one table.
fn cases() -> Vec<Case> {
    use Element::{Bf16, F32, I8, I32};
    let linear = |kernel, element, [m, k, n]: [usize; 3], [tm, tk, tn]: [usize; 3]| Case {
        op: Op::Linear(Activation::GeluTanh),
        kernel: Some(kernel),
        inputs: vec![(element, vec![m, k]), (element, vec![k, n]), (F32, vec![n])],
        timed: vec![(element, vec![tm, tk]), (element, vec![tk, tn]), (F32, vec![tn])],
    };
    let coded = |kernel, small: [usize; 3], large: [usize; 3]| {
        let inputs =
            |[m, k, n]: [usize; 3]| vec![(I8, vec![m, k]), (I8, vec![k, n]), (F32, vec![n]), (F32, vec![n])];
        let op = Op::Coded { codes: Codes::Byte, scale: 1e-4, activation: Activation::None };
        Case { op, kernel: Some(kernel), inputs: inputs(small), timed: inputs(large) }
    };
    // Side of the kernel, channels, height, width, channels made.
    let conv = |kernel, element, small: [usize; 5], large: [usize; 5]| {
        let inputs = |[side, channels, height, width, made]: [usize; 5]| {
            let weights = (element, vec![made, channels, side, side]);
            vec![(element, vec![1, channels, height, width]), weights, (F32, vec![made])]
        };
        let pads = [small[0] / 2; 4];
        let op = Op::Conv { strides: [1, 1], pads, enlarged: false };
        Case { op, kernel: Some(kernel), inputs: inputs(small), timed: inputs(large) }
    };
    let attention = |kernel, element, d: usize, n: usize| {
        let three = |nq: usize, nk: usize, heads: usize| {
            [nq, nk, nk].map(|n| (element, vec![1, n, heads, d])).to_vec()
        };
        Case {
            op: Op::Attention { scale: 0.1, rows_of: None },
            kernel: Some(kernel),
            inputs: three(70, 100, 2),
            timed: three(n, n, 3072 / d),
        }
    };
    let rows = |op: Op, kernel, inputs: Vec<(Element, Vec<usize>)>, timed| Case {
        op,
        kernel: Some(kernel),
        inputs,
        timed,
    };
    let norm = |rows: usize, width: usize| {
        let one = |shape: &[usize]| (F32, shape.to_vec());
        vec![
            one(&[1, rows, 4, width]),
            one(&[width]),
            one(&[width]),
            one(&[1, rows, 1, width]),
            one(&[1, rows, 1, width]),
        ]
    };
    let rotate = |n: usize, heads: usize, d: usize| {
        vec![(F32, vec![1, n, heads, d]), (F32, vec![n, d / 2]), (F32, vec![n, d / 2])]
    };
    let wide = vec![(F32, vec![13_624, 3072])];
    vec![
        linear(Kernel::GemmBf16x64, Bf16, [70, 136, 72], [64, 3072, 3072]),
        linear(Kernel::GemmBf16x128, Bf16, [1000, 40, 1000], [13_624, 3072, 3072]),
        linear(Kernel::GemmAny, F32, [70, 99, 65], [2048, 2048, 2048]),
        coded(Kernel::GemmInt8x64, [70, 144, 72], [64, 3072, 3072]),
        coded(Kernel::GemmInt8x128, [1000, 48, 1000], [13_624, 3072, 3072]),
        conv(Kernel::Conv1Bf16x128, Bf16, [1, 8, 64, 64, 130], [1, 1024, 88, 160, 1024]),
        conv(Kernel::Conv1Bf16x64, Bf16, [1, 40, 9, 7, 70], [1, 1024, 44, 80, 48]),
        conv(Kernel::Conv3Bf16x128, Bf16, [3, 8, 64, 64, 130], [3, 768, 88, 160, 256]),
        conv(Kernel::Conv3Bf16x64, Bf16, [3, 24, 9, 7, 70], [3, 3072, 44, 80, 1024]),
        conv(Kernel::ConvAny, F32, [3, 5, 9, 7, 70], [3, 36, 176, 320, 160]),
        attention(Kernel::AttentionBf16x48, Bf16, 48, 4096),
        attention(Kernel::AttentionBf16x64, Bf16, 64, 4096),
        attention(Kernel::AttentionBf16x128, Bf16, 128, 13_624),
        attention(Kernel::AttentionAny, F32, 96, 1024),
        rows(Op::Norm { centred: true, epsilon: 1e-6 }, Kernel::NormRows, norm(5, 99), norm(3406, 3072)),
        rows(Op::Softmax, Kernel::SoftmaxRows, vec![(F32, vec![9, 130])], wide.clone()),
        rows(
            Op::Reduce { axis: 1, keep: true, root_of_squares: false },
            Kernel::ReduceAxis,
            vec![(F32, vec![3, 50, 7])],
            vec![(F32, vec![131, 104, 3072])],
        ),
        rows(
            Op::ChannelNorm { least: 1e-12, silu: true },
            Kernel::NormChannels,
            vec![(F32, vec![2, 21, 5, 9]), (F32, vec![1, 21, 1, 1])],
            vec![(F32, vec![1, 256, 176, 320]), (F32, vec![1, 256, 1, 1])],
        ),
        rows(Op::Rotate { rows_of: None }, Kernel::RotateHeads, rotate(9, 3, 48), rotate(13_624, 24, 128)),
        rows(
            Op::Gather,
            Kernel::GatherRows,
            vec![(F32, vec![6, 33]), (I32, vec![20])],
            vec![(F32, vec![131, 3072]), (I32, vec![13_624])],
        ),
        rows(
            Op::Element(ElementOp::AddProduct),
            Kernel::Elementwise,
            vec![(F32, vec![4, 6, 33]), (F32, vec![4, 6, 33]), (F32, vec![4, 1, 33])],
            vec![(F32, vec![131, 104, 3072]), (F32, vec![131, 104, 3072]), (F32, vec![131, 1, 3072])],
        ),
    ]
}

fn shown(inputs: &[(Element, Vec<usize>)]) -> String {
    let one =
        |(_, shape): &(Element, Vec<usize>)| shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    inputs.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn operands(inputs: &[(Element, Vec<usize>)], random: &mut Rng) -> Vec<Operand> {
    let rows = inputs[0].1[0];
    let one = |(element, shape): &(Element, Vec<usize>)| {
        let values = (0..shape.iter().product::<usize>()).map(|_| match element {
            Element::I8 => random.range(-127.0, 127.0).round() as f32,
            Element::F32 => random.range(-1.0, 1.0) as f32,
            Element::Bf16 => half::bf16::from_f32(random.range(-1.0, 1.0) as f32).to_f32(),
            Element::I32 => random.below(rows) as f32,
        });
        Operand { element: *element, shape: shape.clone(), values: values.collect() }
    };
    inputs.iter().map(one).collect()
}

/// Floating-point operations, or bytes that must be read and written.
fn work(op: &Op, inputs: &[(Element, Vec<usize>)], results: usize) -> (f64, &'static str) {
    let size = |i: usize, axis: usize| inputs[i].1[axis] as f64;
    match op {
        Op::Linear(_) | Op::Coded { .. } => (2e-12 * size(0, 0) * size(0, 1) * size(1, 1), "TFLOP/s"),
        Op::Conv { .. } => (2e-12 * results as f64 * size(1, 1) * size(1, 2) * size(1, 3), "TFLOP/s"),
        Op::Attention { .. } => (4e-12 * size(0, 1) * size(1, 1) * size(0, 2) * size(0, 3), "TFLOP/s"),
        _ => {
            let all: usize = inputs.iter().map(|(e, s)| s.iter().product::<usize>() * e.bytes()).sum();
            ((all + 4 * results) as f64 * 1e-9, "GB/s")
        }
    }
}

/// What a step made, what made it, and how long one call took.
struct Ran {
    values: Vec<f32>,
    name: &'static str,
    millis: f64,
}

/// Plans one step, by the library of products or without it, runs it, and times its first call.
fn run(
    device: &Arc<dyn Device>,
    op: &Op,
    operands: &[Operand],
    repeats: usize,
    library: bool,
) -> Result<Ran, CudaError> {
    let names: Vec<String> = (0..operands.len()).map(|i| i.to_string()).collect();
    let step = Step { op: op.clone(), inputs: names.clone(), output: "out".into() };
    let program = Program { steps: vec![step], products: HashSet::new(), transposed: HashSet::new() };
    let mut planner = Planner::new(&program, operands[0].element == Element::Bf16);
    if library {
        planner = planner.with_products_of(device.as_ref());
    }
    for (name, operand) in names.iter().zip(operands) {
        planner.input(name, operand.element, &operand.shape);
    }
    let wrong = |reason: String| CudaError::Call { call: "plan of a kernel's check", reason };
    planner.steps().map_err(|e| wrong(e.to_string()))?;
    let out = planner.output("out").map_err(|e| wrong(e.to_string()))?;
    let plan = planner.finish();
    let arena = Memory::new(device, plan.arena_bytes, "operands of one kernel")?;
    let address = |slot: usize| match plan.slots[slot] {
        Slot::Arena(_) => arena.address() + plan.offsets[slot] as u64,
        Slot::Outside(_) => 0,
    };
    for (name, operand) in names.iter().zip(operands) {
        let bytes: Vec<u8> = match operand.element {
            Element::F32 => operand.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Element::Bf16 => {
                operand.values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
            }
            Element::I32 => operand.values.iter().flat_map(|&v| (v as i32).to_le_bytes()).collect(),
            Element::I8 => operand.values.iter().map(|&v| (v as i8).cast_unsigned()).collect(),
        };
        // SAFETY: the buffer was planned for these bytes, which live until `synchronize`.
        unsafe { device.copy_in(address(plan.values[name].place.slot), bytes.as_ptr(), bytes.len())? };
        device.synchronize()?;
    }
    let calls: Vec<Queued> = plan.calls.iter().map(|c| c.at(&address)).collect();
    let Some(first) = calls.first() else { return Err(wrong("no kernel was needed".into())) };
    // SAFETY: as planned: arguments are the kernels' own, addresses lie in the arena.
    calls.iter().try_for_each(|call| unsafe { call.run(device.as_ref()) })?;
    device.synchronize()?;
    let millis = device.time(&mut || {
        // SAFETY: as above; a kernel may run again over the same operands.
        (0..repeats).try_for_each(|_| unsafe { first.run(device.as_ref()) })
    })?;
    let mut bytes = vec![0u8; out.bytes()];
    // SAFETY: both are `out.bytes()` long.
    unsafe {
        device.copy_out(bytes.as_mut_ptr(), address(out.place.slot) + out.place.offset as u64, bytes.len())?
    };
    device.synchronize()?;
    let values = bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    Ok(Ran { values, name: first.name(), millis: millis / repeats as f64 })
}

/// The right result, in f64. Long, since each operation is one arm.
fn reference(op: &Op, operands: &[Operand]) -> Vec<f64> {
    let at = |i: usize, j: usize| f64::from(operands[i].values[j]);
    let shape = |i: usize| operands[i].shape.as_slice();
    let gelu =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
    let mut out = Vec::new();
    match op {
        Op::Linear(activation) => {
            let gelu = |x: f64| if *activation == Activation::None { x } else { gelu(x) };
            let (m, k, n) = (shape(0)[0], shape(0)[1], shape(1)[1]);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                out.push(gelu(at(2, j) + (0..k).map(|l| at(0, i * k + l) * at(1, l * n + j)).sum::<f64>()));
            }
        }
        Op::Coded { scale, .. } => {
            let (m, k, n) = (shape(0)[0], shape(0)[1], shape(1)[1]);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let sum = (0..k).map(|l| at(0, i * k + l) * at(1, j * k + l)).sum::<f64>();
                out.push(f64::from(*scale) * at(3, j) * sum + at(2, j));
            }
        }
        Op::Attention { scale, .. } => {
            let (nq, nk, heads, d) = (shape(0)[1], shape(1)[1], shape(0)[2], shape(0)[3]);
            for (i, h) in (0..nq).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                let place = |row: usize, e: usize| (row * heads + h) * d + e;
                let score = |j: usize| (0..d).map(|e| at(0, place(i, e)) * at(1, place(j, e))).sum::<f64>();
                let weights: Vec<f64> = (0..nk).map(|j| (f64::from(*scale) * score(j)).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend(
                    (0..d).map(|e| (0..nk).map(|j| weights[j] / total * at(2, place(j, e))).sum::<f64>()),
                );
            }
        }
        Op::Conv { pads, .. } => {
            let (channels, height, width) = (shape(0)[1], shape(0)[2], shape(0)[3]);
            let (made, side) = (shape(1)[0], shape(1)[2]);
            for (m, place) in (0..made).flat_map(|m| (0..height * width).map(move |p| (m, p))) {
                let mut sum = at(2, m);
                for (c, k) in (0..channels).flat_map(|c| (0..side * side).map(move |k| (c, k))) {
                    let (y, x) = (place / width + k / side, place % width + k % side);
                    if (pads[0]..height + pads[0]).contains(&y) && (pads[1]..width + pads[1]).contains(&x) {
                        let from = (c * height + y - pads[0]) * width + x - pads[1];
                        sum += at(0, from) * at(1, (m * channels + c) * side * side + k);
                    }
                }
                out.push(sum);
            }
        }
        Op::ChannelNorm { least, .. } => {
            let (channels, pixels) = (shape(0)[1], shape(0)[2] * shape(0)[3]);
            for place in 0..operands[0].values.len() {
                let (picture, pixel) = (place / (channels * pixels), place % pixels);
                let squares = (0..channels).map(|c| at(0, (picture * channels + c) * pixels + pixel).powi(2));
                let length = squares.sum::<f64>().sqrt().max(f64::from(*least));
                let y = at(0, place) / length * at(1, place / pixels % channels);
                out.push(y / (1.0 + (-y).exp()));
            }
        }
        Op::Norm { epsilon, .. } => {
            let (tokens, width) = (shape(0)[2], shape(0)[3]);
            for row in 0..shape(0)[1] * tokens {
                let x: Vec<f64> = (0..width).map(|i| at(0, row * width + i)).collect();
                let mean = x.iter().sum::<f64>() / width as f64;
                let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
                let of = row / tokens * width;
                out.extend(x.iter().enumerate().map(|(i, v)| {
                    let y = (v - mean) / (variance + f64::from(*epsilon)).sqrt() * at(1, i) + at(2, i);
                    y * (1.0 + at(3, of + i)) + at(4, of + i)
                }));
            }
        }
        Op::Softmax => {
            for row in operands[0].values.chunks(shape(0)[1]) {
                let total: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
                out.extend(row.iter().map(|&v| f64::from(v).exp() / total));
            }
        }
        Op::Reduce { .. } => {
            let (size, inner) = (shape(0)[1], shape(0)[2]);
            for (o, i) in (0..shape(0)[0]).flat_map(|o| (0..inner).map(move |i| (o, i))) {
                out.push((0..size).map(|s| at(0, (o * size + s) * inner + i)).sum::<f64>() / size as f64);
            }
        }
        Op::Rotate { .. } => {
            let (heads, d) = (shape(0)[2], shape(0)[3]);
            for place in 0..operands[0].values.len() {
                let (j, table) = (place % d, place / (heads * d) * (d / 2) + place % d % (d / 2));
                let (other, sign) = if j < d / 2 { (place + d / 2, -1.0) } else { (place - d / 2, 1.0) };
                out.push(at(0, place) * at(1, table) + sign * at(0, other) * at(2, table));
            }
        }
        Op::Gather => {
            let width = shape(0)[1];
            for &row in &operands[1].values {
                out.extend((0..width).map(|i| at(0, row as usize * width + i)));
            }
        }
        _ => {
            let (tokens, width) = (shape(0)[1], shape(0)[2]);
            for place in 0..operands[0].values.len() {
                let gate = place / (tokens * width) * width + place % width;
                out.push(at(0, place) + at(1, place) * at(2, gate));
            }
        }
    }
    out
}
