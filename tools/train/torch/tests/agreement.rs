//! Libtorch against the eager interpreter: gradients of every weight, losses of a run, checkpoints that either goes on from.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mindseye_engines::denoise::sinusoid;
use mindseye_engines::model::Ops;
use mindseye_engines::model::dit::{self, DitConfig, DitInputs, Prediction};
use mindseye_engines::model::umt5::{self, Umt5Config, Umt5Inputs};
use mindseye_engines::model::vae::{self, Chunk, VaeConfig};
use mindseye_torch::TorchDevice;
use mindseye_train::autograd::{Autograd, Device, EagerDevice, OutputGrads, Settings};
use mindseye_train::checkpoint::State;
use mindseye_train::codec_fit::codec_of;
use mindseye_train::config::TrainConfig;
use mindseye_train::data::{Source, Task};
use mindseye_train::eager::{Eager, Params};
use mindseye_train::net::{self, Draw};
use mindseye_train::ranks::{Place, Ranks};
use mindseye_train::trainer::{Metrics, OpenOptions, Trainer};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..")
}

/// Seeded numbers, about normal.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..4).map(|_| uniform()).sum::<f32>() * 1.7
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// No weight is zero, so that every gradient is something.
fn shaken(params: &Params, scale: f32) -> Arc<Params> {
    let (mut params, mut noise) = (params.clone(), Noise(4));
    params.all_values_mut().flatten().for_each(|v| *v += scale * noise.next());
    Arc::new(params)
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Gradients of every weight agree; those that are nothing beside the others may differ by as little.
///
/// With `by_layer` a bias is judged by the scale of its layer: adding to all keys of an attention what a query weighs
/// alike changes no weight of it, so the gradient of a key's bias is what is left after the others cancel, a tenth of
/// that of the layer's weight or less, and has the whole layer's rounding.
fn agree(params: &Params, got: &[Vec<f32>], wanted: &[Vec<f32>], tolerance: f64, by_layer: bool) {
    let largest = wanted.iter().map(|g| norm(g)).fold(0.0, f64::max);
    let mut seen = 0;
    for i in 0..params.len() {
        let (name, _, _) = params.get(i);
        assert_eq!(got[i].len(), wanted[i].len(), "{name}");
        if wanted[i].is_empty() {
            continue;
        }
        let layer = name.strip_suffix(".bias").filter(|_| by_layer);
        let weight = layer.and_then(|layer| params.position(&format!("{layer}.weight")));
        let scale = norm(&wanted[i]).max(weight.map_or(0.0, |at| norm(&wanted[at])));
        let off: Vec<f32> = got[i].iter().zip(&wanted[i]).map(|(a, b)| a - b).collect();
        let relative = norm(&off) / scale.max(1e-5 * largest);
        assert!(relative < tolerance, "{name}: gradients differ by {relative:.1e} of {scale:.1e}");
        seen += 1;
    }
    assert!(seen > 20, "only {seen} weights have gradients");
}

/// Gradients of a pass by the eager interpreter, and by libtorch with and without checkpoints.
trait Pass {
    fn run<A: Autograd>(&self, e: &mut A) -> OutputGrads<A::Tensor>;
}

fn gradients<A: Autograd>(e: &mut A, params: &Arc<Params>, pass: &impl Pass) -> Vec<Vec<f32>> {
    // Twice: gradients of several passes are summed, and weights stay on the device.
    for _ in 0..2 {
        e.restart(params.clone());
        let outputs = pass.run(e);
        e.backward(outputs);
    }
    let grads = e.take_grads();
    e.clear();
    grads
}

fn compare(params: &Arc<Params>, pass: &impl Pass) {
    let mut eager = EagerDevice.interpreter(Settings::default()).expect("eager");
    let wanted = gradients(&mut eager, params, pass);
    for checkpoint_blocks in [false, true] {
        let settings = Settings { checkpoint_blocks, ..Settings::default() };
        let mut torch = TorchDevice::cpu().interpreter(settings).expect("libtorch");
        agree(params, &gradients(&mut torch, params, pass), &wanted, 1e-4, false);
    }
    let settings = Settings { bf16: true, ..Settings::default() };
    let mut torch = TorchDevice::cpu().interpreter(settings).expect("libtorch");
    agree(params, &gradients(&mut torch, params, pass), &wanted, 0.2, true);
}

#[test]
fn gradients_of_the_shipped_model() {
    let (mut config, model) =
        TrainConfig::load(&repository().join("configs/train/house-tiny.toml")).expect("it is shipped");
    config.codec_blocks = 800;
    let world = config.world().expect("a world");
    let state = State::new(&config, &model, &world);
    let params = shaken(&state.params, 0.02);
    let mut source = Source::new(&model, world, codec_of(&state.params));
    let samples: Vec<_> = [(1, Task::Ground), (2, Task::Navigate), (3, Task::Absent), (4, Task::Ground)]
        .map(|(seed, task)| source.sample(seed, task, true))
        .into();
    let mut noise = Noise(9);
    let draws: Vec<Draw> = samples
        .iter()
        .enumerate()
        .map(|(i, s)| Draw {
            s: [0.9, 0.4, 0.97, 0.7][i],
            dropped: i == 3,
            one_way: false,
            guided: false,
            noise: noise.values(s.latents.len()),
            target: None,
        })
        .collect();
    struct House<'a>(
        &'a TrainConfig,
        &'a mindseye_train::family::HouseModel,
        &'a [mindseye_train::data::Sample],
        &'a [Draw],
    );
    impl Pass for House<'_> {
        fn run<A: Autograd>(&self, e: &mut A) -> OutputGrads<A::Tensor> {
            let Self(config, model, samples, draws) = self;
            let out = net::forward(e, model, samples, draws);
            net::losses(e, model, samples, draws, &out, &config.loss, samples.len()).1
        }
    }
    compare(&params, &House(&config, &model, &samples, &draws));
    let one_way: Vec<Draw> = draws.iter().map(|d| Draw { one_way: true, ..d.clone() }).collect();
    compare(&params, &House(&config, &model, &samples, &one_way));
}

/// A complete member of the large family, tiny: autoencoder, text encoder with blocks, transformer with velocity and rays.
struct Wan {
    vae: VaeConfig,
    umt5: Umt5Config,
    dit: DitConfig,
}

const LATENT: [usize; 2] = [2, 4];

impl Wan {
    fn tiny() -> Self {
        let vae = VaeConfig {
            base_dim: 8,
            decoder_base_dim: 8,
            z_dim: 4,
            dim_mult: vec![1, 2, 2],
            num_res_blocks: 1,
            temporal_downsample: vec![true, true],
            patch_size: 2,
            latents_mean: vec![0.1, -0.2, 0.0, 0.3],
            latents_std: vec![0.5, 1.0, 0.8, 1.2],
        };
        let umt5 = Umt5Config {
            vocab_size: 20,
            d_model: 16,
            d_kv: 8,
            d_ff: 24,
            num_layers: 2,
            num_heads: 2,
            buckets: 8,
            max_distance: 16,
            eps: 1e-6,
        };
        let dit = DitConfig {
            in_channels: 4,
            out_channels: 4,
            latent_height: LATENT[0],
            latent_width: LATENT[1],
            patch: [2, 2],
            heads: 2,
            head_dim: 12,
            layers: 3,
            ffn_dim: 40,
            text_dim: 16,
            text_len: 6,
            freq_dim: 16,
            eps: 1e-6,
            rope_theta: 10000.0,
            prediction: Prediction::Velocity,
            camera_channels: 6,
            pooled_text: false,
            lift: false,
            attributes: 0,
            guide: None,
        };
        vae.validate().and(umt5.validate()).and(dit.validate()).expect("a family");
        Self { vae, umt5, dit }
    }
}

impl Pass for Wan {
    fn run<A: Autograd>(&self, e: &mut A) -> OutputGrads<A::Tensor> {
        let (cfg, mut noise) = (&self.dit, Noise(3));
        let [height, width] = LATENT.map(|s| s * self.vae.spatial_factor());
        // A clip of nine frames: latents of three, decoded again.
        let clip = e.input(&[9, 3, height, width], noise.values(9 * 3 * height * width));
        let latents = vae::encode_clip(e, &self.vae, LATENT, &clip, 9);
        let (mut frames, mut caches) = (Vec::new(), Vec::new());
        for (i, z) in latents.iter().enumerate() {
            let chunk = if i == 0 { Chunk::First } else { Chunk::Next };
            let out = vae::decode(e, &self.vae, LATENT, chunk, z, &caches);
            (caches, frames) = (out.caches, [frames, vec![out.frames]].concat());
        }
        let decoded = e.concat(&frames, 0);
        // Text of five tokens and one padded.
        let ids = e.index(&[1, 6], vec![3, 7, 2, 19, 1, 0]);
        let buckets = e.index(&[6, 6], self.umt5.bucket_table(6));
        let (mask_bias, keep) = umt5::host_inputs(&[5], 6);
        let (mask_bias, keep) = (e.input(&[1, 1, 1, 6], mask_bias), e.input(&[1, 6, 1], keep));
        e.set_prefix("text.");
        let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
        let text = umt5::encode(e, &self.umt5, &inputs).rows;
        e.set_prefix("");
        // What the transformer sees are the latents themselves, so that gradients reach the encoder.
        let z = e.concat(&latents, 0);
        let z = e.reshape(&z, &[1, 3, 4, LATENT[0] as i64, LATENT[1] as i64]);
        let z = e.permute(&z, &[0, 2, 1, 3, 4]);
        let time = e.input(&[2, cfg.freq_dim], [0.0, 730.0].map(|t| sinusoid(t, cfg.freq_dim)).concat());
        let rows = e.index(&[1, 3], vec![0, 1, 1]);
        let n = 3 * cfg.tokens_per_frame();
        let (cos, sin) = cfg.rotary_tables(&[4.0, 54.0, 55.0]);
        let table = [n, cfg.head_dim / 2];
        let (cos, sin) = (e.input(&table, cos), e.input(&table, sin));
        let rays = [1, 3, cfg.tokens_per_frame(), cfg.camera_channels];
        let camera = e.input(&rays, noise.values(rays.iter().product()));
        let inputs = DitInputs {
            latents: &z,
            time: &time,
            rows: &rows,
            row_batch: None,
            text: &text,
            cos: &cos,
            sin: &sin,
            camera: Some(&camera),
            guide: None,
            bias: None,
            memory: None,
        };
        let sample = dit::forward(e, cfg, &inputs).sample;
        [decoded, sample]
            .into_iter()
            .map(|out| {
                let n = e.value(&out).len();
                (out, noise.values(n))
            })
            .collect()
    }
}

#[test]
fn gradients_of_a_complete_model_of_the_large_family() {
    let wan = Wan::tiny();
    let mut e = Eager::collecting();
    wan.run(&mut e);
    compare(&shaken(e.params(), 0.2), &wan);
}

/// The smallest run, with a line of metrics for every step.
fn configure(dir: &Path, steps: u64) -> PathBuf {
    let data = repository().join("tests/data/train");
    std::fs::copy(data.join("model.toml"), dir.join("model.toml")).expect("it is copied");
    let train = std::fs::read_to_string(data.join("train.toml")).expect("it is there");
    let train = train
        .replace("steps = 240", &format!("steps = {steps}"))
        .replace("decay_from = 200", "decay_from = 45")
        .replace("log_every = 40", "log_every = 1");
    std::fs::write(dir.join("train.toml"), train).expect("it is written");
    dir.join("train.toml")
}

fn train<D: Device>(device: &D, config: &Path, run: &str, until: u64) -> Vec<Metrics> {
    let (config, model) = TrainConfig::load(config).expect("the recipe is valid");
    let out = Path::new(run);
    let mut trainer = Trainer::open_on(device, config, model, out, OpenOptions::default()).expect("it opens");
    let stop = AtomicBool::new(false);
    trainer.run(&stop, |m, _| stop.store(m.step >= until, Ordering::Relaxed)).expect("it goes on");
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    metrics.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
}

fn near(got: &[Metrics], wanted: &[Metrics]) {
    assert_eq!(got.len(), wanted.len());
    for (a, b) in got.iter().zip(wanted) {
        let off = (a.losses.total / b.losses.total - 1.0).abs();
        assert!(off < 1e-3, "step {}: losses {} and {}", a.step, a.losses.total, b.losses.total);
    }
}

#[test]
fn fifty_steps_have_the_same_losses_and_either_goes_on_from_the_others_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = configure(dir.path(), 50);
    let run = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let torch = TorchDevice::cpu();
    let wanted = train(&EagerDevice, &config, &run("eager"), 50);
    let whole = train(&torch, &config, &run("torch"), 50);
    near(&whole, &wanted);
    let mean = |lines: &[Metrics]| lines.iter().map(|m| m.losses.total).sum::<f64>() / lines.len() as f64;
    assert!(mean(&wanted[40..]) < 0.95 * mean(&wanted[..10]), "the loss falls");
    // Stopped and gone on: the same run, exactly.
    train(&torch, &config, &run("stopped"), 23);
    assert_eq!(train(&torch, &config, &run("stopped"), 50), whole);
    // From one interpreter to the other and back.
    train(&EagerDevice, &config, &run("mixed"), 15);
    train(&torch, &config, &run("mixed"), 31);
    near(&train(&EagerDevice, &config, &run("mixed"), 50), &wanted);
}

/// The process that is killed below.
#[test]
#[ignore = "is started and killed by a_killed_run_goes_on_exactly"]
fn killed_in_the_middle() {
    let dir = PathBuf::from(std::env::var_os("MINDSEYE_TEST_RUN").expect("where the run is"));
    train(&TorchDevice::cpu(), &dir.join("train.toml"), &dir.join("killed").to_string_lossy(), 400);
}

#[test]
fn a_killed_run_goes_on_exactly() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = configure(dir.path(), 400);
    let text = std::fs::read_to_string(&config).expect("it is there");
    std::fs::write(&config, text.replace("checkpoint_every = 80", "checkpoint_every = 7")).expect("written");
    let metrics =
        |run: &str| std::fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).unwrap_or_default();
    // Before the first checkpoint, and between two.
    for lines in [3, 24] {
        let mut child = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "killed_in_the_middle", "--ignored"])
            .env("MINDSEYE_TEST_RUN", dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("it starts");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(240);
        while metrics("killed").lines().count() < lines {
            assert!(std::time::Instant::now() < until, "no line {lines}");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().expect("SIGKILL is sent");
        assert!(child.wait().expect("it ends").code().is_none(), "it had ended before it was killed");
    }
    let run = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let whole = train(&TorchDevice::cpu(), &config, &run("whole"), 60);
    assert_eq!(train(&TorchDevice::cpu(), &config, &run("killed"), 60), whole);
}

/// LoRA on a layer of a block: forward and gradients as the eager interpreter's, with and without checkpoints.
#[test]
fn adapted_layers_agree() {
    let mut params = Params::new();
    let mut noise = Noise(9);
    for (name, shape) in [("w", [5, 4]), ("down", [2, 4]), ("up", [5, 2]), ("v", [3, 5])] {
        params.insert(name, &shape, noise.values(shape[0] * shape[1]));
    }
    let (params, given, gradient) = (Arc::new(params), noise.values(12), noise.values(9));
    fn pass<A: Autograd>(e: &mut A, params: &Arc<Params>, given: &[f32], gradient: &[f32]) -> Vec<Vec<f32>> {
        e.restart(params.clone());
        let x = e.input(&[3, 4], given.to_vec());
        let (w, down, up) = (e.param("w", &[5, 4]), e.param("down", &[2, 4]), e.param("up", &[5, 2]));
        e.adapt(&w, down, up, 0.5);
        let y = e.linear(&x, &w, None);
        let y = e.silu(&y);
        e.mark("blocks.0.out", &y);
        let v = e.param("v", &[3, 5]);
        let y = e.linear(&y, &v, None);
        let said = e.value(&y).into_owned();
        e.backward(vec![(y, gradient.to_vec())]);
        e.take_grads().into_iter().chain([said]).collect()
    }
    let only = ["down".to_owned(), "up".to_owned(), "v".to_owned()];
    let settings = Settings { only: &only, ..Settings::default() };
    let mut eager = EagerDevice.interpreter(settings).expect("eager");
    let wanted = pass(&mut eager, &params, &given, &gradient);
    assert!(wanted[0].is_empty() && wanted[1..].iter().all(|g| norm(g) > 0.1), "{wanted:?}");
    for checkpoint_blocks in [false, true] {
        let settings = Settings { checkpoint_blocks, ..settings };
        let mut torch = TorchDevice::cpu().interpreter(settings).expect("libtorch");
        let got = pass(&mut torch, &params, &given, &gradient);
        for (got, wanted) in got.iter().zip(&wanted) {
            let off: Vec<f32> = got.iter().zip(wanted).map(|(a, b)| a - b).collect();
            assert!(got.len() == wanted.len() && norm(&off) <= 1e-5 * norm(wanted), "{got:?} {wanted:?}");
        }
    }
}

#[test]
fn devices_that_are_not_there_are_refused_by_name() {
    let said = |name: &str| TorchDevice::open(name).expect_err(name).to_string();
    for name in ["gpu", "cuda:", "cuda:x", "cpu:0", ""] {
        assert!(said(name).contains("expected eager, cpu, cuda or cuda:N"), "{name}");
    }
    let far = said("cuda:99");
    assert!(far.contains("libtorch_cuda.so") || far.contains("CUDA devices found"), "{far}");
    assert_eq!(TorchDevice::open("cpu").expect("it is always there"), TorchDevice::cpu());
}

#[test]
fn what_libtorch_cannot_do_ends_the_run_with_what_it_said() {
    let mut e = TorchDevice::cpu().interpreter(Settings::default()).expect("libtorch");
    e.restart(Arc::default());
    let (a, b) = (e.input(&[2, 3], vec![0.0; 6]), e.input(&[4, 5], vec![0.0; 20]));
    let caught =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| e.add(&a, &b))).expect_err("shapes");
    let error = caught.downcast::<mindseye_train::autograd::DeviceError>().expect("a typed payload");
    let said = error.to_string();
    assert!(said.starts_with("cpu: addition of [2, 3]: The size of tensor a"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// One rank of a run, over the fake NCCL that its environment names.
#[test]
#[ignore = "is started by ranks_sum_through_nccls_interface"]
fn rank_process() {
    let set = |name: &str| std::env::var(name).ok();
    let dir = PathBuf::from(set("MINDSEYE_TEST_RUN").expect("where the run is"));
    let place = Place::from_environment(set).expect("a place").expect("several ranks");
    let ranks = Some(Ranks::join(place, &TorchDevice::cpu()).expect("the others come"));
    let (config, model) = TrainConfig::load(&dir.join("train.toml")).expect("the recipe is valid");
    let options = OpenOptions { ranks, ..OpenOptions::default() };
    let mut trainer =
        Trainer::open_on(&TorchDevice::cpu(), config, model, &dir.join("ranks"), options).expect("it opens");
    trainer.run(&AtomicBool::new(false), |_, _| ()).expect("it runs");
}

#[test]
fn ranks_sum_through_nccls_interface() {
    let dir = tempfile::tempdir().expect("a directory");
    let fake = dir.path().join("libfake_nccl.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nccl.c");
    let built = std::process::Command::new("cc")
        .args(["-O1", "-shared", "-fPIC", "-o"])
        .args([&fake, &source])
        .status()
        .expect("a C compiler");
    assert!(built.success());
    let config = configure(dir.path(), 12);
    let whole = train(&TorchDevice::cpu(), &config, &dir.path().join("whole").to_string_lossy(), 12);
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its number");
    let ranks: Vec<_> = (0..2)
        .map(|rank| {
            std::process::Command::new(std::env::current_exe().expect("this program"))
                .args(["--exact", "rank_process", "--ignored"])
                .env("MINDSEYE_TEST_RUN", dir.path())
                .env("MINDSEYE_FAKE_NCCL", &fake)
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", "2")
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", (free.port() - 1).to_string())
                .stdout(std::process::Stdio::null())
                .spawn()
                .expect("it starts")
        })
        .collect();
    for mut rank in ranks {
        assert!(rank.wait().expect("it ends").success());
    }
    let text = std::fs::read_to_string(dir.path().join("ranks/metrics.jsonl")).expect("metrics");
    let got: Vec<Metrics> = text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(got.len(), whole.len());
    for (a, b) in got.iter().zip(&whole) {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs();
        assert!(near(a.losses.total, b.losses.total) && near(a.grad_norm, b.grad_norm), "{a:?} {b:?}");
    }
}
