//! A sampler's step as a launch of its kernel.

use super::backend::{DeviceState, StateTensor};
use super::kernels::{Arguments, Element, Kernel, Launch};
use crate::backend::{SampleStep, State};
use crate::sampler::{Correct, Factors, Predict, Update};

// Parts that a step has, by their numbers in `sampler.cu`.
const EULER: i32 = 1;
const CORRECT: i32 = 2;
const BACK: i32 = 4;
const PREDICT: i32 = 8;
const SLOPE: i32 = 16;
const CLEAN_PREDICTED: i32 = 32;

/// The launch of a step, or why it cannot be: all sizes are those that the kernel reads and writes.
pub(super) fn launch(step: &SampleStep<'_>) -> Result<Launch, String> {
    let [frames, channels, pixels] = step.shape;
    let (count, pass) = (frames * channels * pixels, channels * step.pass_frames * pixels);
    let last = step.first + i32::try_from(frames).map_err(|e| e.to_string())?;
    if step.first < -1 || last < 1 || usize::try_from(last).is_ok_and(|last| last > step.pass_frames) {
        return Err(format!("{frames} frames from frame {} of {}", step.first, step.pass_frames));
    }
    let of_sample = |name: &str| find(step.sample, name, count);
    let [x, m1, m2, previous] = ["x", "m1", "m2", "previous"].map(of_sample);
    let (Some(conditional), others) = (step.branches.first(), step.branches.get(1)) else {
        return Err("a step without a branch".into());
    };
    let time = floats_of(conditional[1], "time")?;
    let mut arguments = Arguments::default();
    let branches = [Some(conditional), others];
    let predicted = |branch: &[&State; 2]| {
        let tensor = tensor(branch[0], "sample")?;
        let floats = matches!(tensor.element, Element::F32 | Element::Bf16);
        match floats && tensor.shape.iter().product::<usize>() == pass {
            true => Ok([tensor.memory.address(), tensor.element as u64]),
            false => Err(format!("a prediction of {:?} for {pass} values", tensor.shape)),
        }
    };
    for branch in branches {
        for word in branch.map_or(Ok([0, 0]), predicted)? {
            arguments.push(&[word]);
        }
    }
    for tensor in [x, m1, m2, previous] {
        arguments.push(&[tensor?]);
    }
    for branch in branches {
        arguments.push(&[branch.map_or(Ok(0), |b| find(b[1], "latents", pass))?]);
    }
    // Without a next step, this one's timesteps stay.
    for (number, branch) in branches.into_iter().enumerate() {
        let address = match (branch, step.next) {
            (Some(_), Some(next)) => {
                let name = format!("times.{number}");
                let steps = floats_of(step.sample, &name)? / time.max(1);
                if next >= steps {
                    return Err(format!("step {next} of {steps}"));
                }
                tensor(step.sample, &name)?.memory.address() + (4 * next * time) as u64
            }
            (Some(branch), None) => find(branch[1], "time", time)?,
            (None, _) => 0,
        };
        arguments.push(&[address]);
    }
    for branch in branches {
        arguments.push(&[branch.map_or(Ok(0), |b| find(b[1], "time", time))?]);
    }
    let int = |size: usize| i32::try_from(size).map_err(|_| format!("a size of {size}"));
    arguments.push(&words(&[int(time)?]));
    arguments.push(&words(&[int(frames)?, int(channels)?, int(pixels)?, int(step.pass_frames)?, step.first]));
    int(count)?;
    arguments.push(&factors(step));
    let blocks = count.max(time).div_ceil(256).clamp(1, 1 << 16) as u32;
    let kernel = Kernel::SamplerStep;
    Ok(Launch { kernel, grid: [blocks, 1, 1], threads: kernel.threads(), shared_bytes: 0, arguments })
}

/// The numbers of a step, as they lie in the kernel's structure.
fn factors(step: &SampleStep<'_>) -> Vec<u64> {
    let Factors { sigma, update } = step.factors;
    let mut has = if step.predicts_clean { CLEAN_PREDICTED } else { 0 };
    let mut numbers = [0.0f32; 8];
    match update {
        Update::Euler { by } => {
            has |= EULER;
            numbers[0] = by;
        }
        Update::UniPc { correct, predict } => {
            if let Some(Correct { keep, k, back, last }) = correct {
                has |= CORRECT | if back.is_some() { BACK } else { 0 };
                numbers[1..5].copy_from_slice(&[keep, k, back.unwrap_or(0.0), last]);
            }
            if let Some(Predict { keep, k, slope }) = predict {
                has |= PREDICT | if slope.is_some() { SLOPE } else { 0 };
                numbers[5..8].copy_from_slice(&[keep, k, slope.unwrap_or(0.0)]);
            }
        }
    }
    let bits = |v: &f32| v.to_bits().cast_signed();
    let all: Vec<i32> = std::iter::once(has)
        .chain(std::iter::once(bits(&sigma)))
        .chain(numbers.iter().map(bits))
        .chain(std::iter::once(bits(&step.guidance)))
        .collect();
    words(&all)
}

/// Numbers of 32 bits in words of 64, the first one in the low half.
fn words(ints: &[i32]) -> Vec<u64> {
    let pair = |p: &[i32]| {
        let [low, high] = [p[0], p.get(1).copied().unwrap_or(0)].map(|v| u64::from(v.cast_unsigned()));
        low | high << 32
    };
    ints.chunks(2).map(pair).collect()
}

fn tensor<'s>(state: &'s State, name: &str) -> Result<&'s StateTensor, String> {
    let found = state.device::<DeviceState>().and_then(|s| s.find(name));
    found.ok_or_else(|| format!("no {name:?} on the device"))
}

/// How many numbers of f32 a tensor has.
fn floats_of(state: &State, name: &str) -> Result<usize, String> {
    let tensor = tensor(state, name)?;
    let count = tensor.shape.iter().product();
    if tensor.element == Element::F32 { Ok(count) } else { Err(format!("{name:?} is not of f32")) }
}

/// Address of a tensor of so many numbers of f32.
fn find(state: &State, name: &str, count: usize) -> Result<u64, String> {
    match floats_of(state, name)? {
        got if got == count => Ok(tensor(state, name)?.memory.address()),
        got => Err(format!("{name:?} has {got} values, not {count}")),
    }
}
