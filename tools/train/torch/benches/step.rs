//! Samples per second of forward and backward on one thread: the eager interpreter, libtorch in f32, with checkpoints, and in
//! bfloat16, in turns, so that a busy machine is busy for all: `tools/train/torch/build.sh bench --no-default-features`.

use std::path::Path;
use std::time::Instant;

use mindseye_torch::TorchDevice;
use mindseye_train::autograd::{Autograd, Device, EagerDevice, Settings};
use mindseye_train::checkpoint::State;
use mindseye_train::codec_fit::codec_of;
use mindseye_train::config::TrainConfig;
use mindseye_train::data::{Sample, Source, Task};
use mindseye_train::net::{self, Draw};
use mindseye_world::Rng;

const SAMPLES: usize = 12;
const ROUNDS: usize = 5;

fn main() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../configs/train/house-tiny.toml");
    let (mut config, model) = TrainConfig::load(&path).expect("it is shipped");
    config.codec_blocks = 800;
    let world = config.world().expect("a world");
    let state = State::new(&config, &model, &world);
    let mut source = Source::new(&model, world, codec_of(&state.params));
    let samples: Vec<Sample> =
        (0..SAMPLES).map(|seed| source.sample(seed as u64, Task::Ground, true)).collect();
    let mut rng = Rng::new(1);
    let draws: Vec<Draw> =
        samples.iter().map(|s| Draw::new(&mut rng, s.latents.len(), 0.3, 3.0, 0.0, false)).collect();
    let settings = |checkpoint_blocks, bf16| Settings { checkpoint_blocks, bf16, ..Settings::default() };
    let (cpu, fits) = (TorchDevice::cpu(), "the device is there");
    let mut eager = EagerDevice.interpreter(Settings::default()).expect(fits);
    let mut torch = [(false, false), (true, false), (false, true)]
        .map(|(checkpoints, bf16)| cpu.interpreter(settings(checkpoints, bf16)).expect(fits));
    let names = ["eager", "libtorch f32", "libtorch f32, checkpoints", "libtorch bf16"];
    let mut seconds = vec![Vec::new(); names.len()];
    let pass = |e: &mut dyn FnMut()| {
        let began = Instant::now();
        e();
        began.elapsed().as_secs_f64()
    };
    for round in 0..=ROUNDS {
        let mut times = vec![pass(&mut || step(&mut eager, &config, &model, &state, &samples, &draws))];
        for e in &mut torch {
            times.push(pass(&mut || step(e, &config, &model, &state, &samples, &draws)));
        }
        // The first round warms up.
        if round > 0 {
            seconds.iter_mut().zip(times).for_each(|(all, one)| all.push(one));
        }
    }
    for (name, mut seconds) in names.into_iter().zip(seconds) {
        seconds.sort_by(f64::total_cmp);
        let median = seconds[ROUNDS / 2];
        println!("{name:28} {:6.1} samples/s (median of {ROUNDS}, one thread)", SAMPLES as f64 / median);
    }
}

fn step<A: Autograd>(
    e: &mut A,
    config: &TrainConfig,
    model: &mindseye_train::family::HouseModel,
    state: &State,
    samples: &[Sample],
    draws: &[Draw],
) {
    e.restart(state.params.clone());
    let out = net::forward(e, model, samples, draws);
    let (_, grads) = net::losses(e, model, samples, draws, &out, &config.loss, samples.len());
    e.backward(grads);
    assert!(!e.take_grads().is_empty());
    e.clear();
}
