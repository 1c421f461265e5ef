//! One training step of the small model, ours against plain PyTorch: the same weights, batch, losses and optimiser rules,
//! the same number of threads, on the same CPU, taking turns.
//!
//! `PYTHON=python3 cargo bench -p mindseye-tests --bench train_step` with a Python that has torch and numpy; without one, a
//! single line says so and nothing is measured. Rendering of the batch is not part of the step. The two losses of the
//! first pass are compared before anything is timed.
//!
//! Ours runs as the trainer does: one worker per thread, each with its share of the batch. PyTorch runs the whole
//! batch with as many intra-op threads. Its threads wait for each other by spinning, so on a busy machine the figures with
//! more than one thread say little; those with one thread hold.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Instant;

use mindseye_engines::denoise::sinusoid;
use mindseye_engines::model::dit::Prediction;
use mindseye_train::codec_fit::fit_codec;
use mindseye_train::config::TrainConfig;
use mindseye_train::data::{SEEN_SHARE, Sample, Source, Task};
use mindseye_train::eager::{Eager, Params};
use mindseye_train::family::HouseModel;
use mindseye_train::net::{self, Draw};
use mindseye_train::optim::{self, Moments, Rule};
use mindseye_world::Rng;
use serde_json::{Value, json};

const ROUNDS: usize = 7;
const STEPS: usize = 4;
/// What is wanted of our speed over PyTorch's on a CPU.
const WANTED: f64 = 0.5;

struct Batch {
    config: TrainConfig,
    model: HouseModel,
    samples: Vec<Sample>,
    draws: Vec<Draw>,
}

fn main() -> ExitCode {
    // `cargo test --benches` and the like run benches with --test: nothing to test here.
    if std::env::args().any(|a| a == "--test") {
        return ExitCode::SUCCESS;
    }
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import torch, numpy"]).stderr(Stdio::null()).status();
    if !has.is_ok_and(|s| s.success()) {
        println!(
            "SKIP: {python} has no torch and numpy (set PYTHON to one that has; pip install torch numpy)"
        );
        return ExitCode::SUCCESS;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    for threads in [1, 2] {
        measure(&python, folder.path(), threads);
    }
    ExitCode::SUCCESS
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn batch() -> (Batch, Params) {
    let (config, model) = TrainConfig::load(&repository().join("configs/train/house-tiny.toml"))
        .expect("the configuration of the shipped model");
    assert_eq!(model.dit.prediction, Prediction::X0, "the peer knows clean-sample prediction only");
    assert!(model.dit.pooled_text && model.dit.lift && model.dit.camera_channels > 0);
    let difficulty = config.world().expect("a known difficulty");
    let codec = fit_codec(&model, &difficulty, 1, model.codec.block_values());
    let mut params = net::init(&model, 1);
    // Weights that begin at zero would leave whole branches without work for the gradient to do.
    let mut rng = Rng::new(9);
    for i in 0..params.len() {
        params.values_mut(i).iter_mut().for_each(|v| *v += 0.02 * rng.normal() as f32);
    }
    let mut source = Source::new(&model, difficulty, Some(codec));
    let tasks = [Task::Ground, Task::Ground, Task::Navigate, Task::Absent];
    let samples: Vec<Sample> =
        (0..config.batch).map(|i| source.sample(i as u64, tasks[i % tasks.len()], true)).collect();
    let draws = samples
        .iter()
        .map(|s| Draw::new(&mut rng, s.latents.len(), config.high_noise, config.shift, config.drop, false))
        .collect();
    (Batch { config, model, samples, draws }, params)
}

/// Our side: the trainer's step without its rendering.
struct Ours {
    batch: Batch,
    params: Arc<Params>,
    ema: Params,
    moments: Vec<Moments>,
    rules: Vec<Rule>,
    workers: Vec<Eager>,
    step: u64,
}

impl Ours {
    fn new(threads: usize) -> Self {
        let (batch, params) = batch();
        let rules = optim::rules(&batch.config.optim, &params);
        Self {
            ema: params.clone(),
            moments: vec![Moments::default(); params.len()],
            workers: (0..threads).map(|_| Eager::new(Arc::default(), true)).collect(),
            params: Arc::new(params),
            rules,
            batch,
            step: 0,
        }
    }

    /// Loss and gradients of the whole batch.
    fn backward(&mut self) -> (f64, Vec<Vec<f32>>) {
        let Batch { config, model, samples, draws } = &self.batch;
        let per = samples.len() / self.workers.len();
        let shares: Vec<(f64, Vec<Vec<f32>>)> = std::thread::scope(|scope| {
            let handles: Vec<_> = self
                .workers
                .iter_mut()
                .zip(samples.chunks(per).zip(draws.chunks(per)))
                .map(|(e, (samples, draws))| {
                    let params = self.params.clone();
                    scope.spawn(move || {
                        e.restart(params);
                        let out = net::forward(e, model, samples, draws);
                        let (losses, grads) =
                            net::losses(e, model, samples, draws, &out, &config.loss, config.batch);
                        e.backward(grads);
                        let grads = e.take_grads();
                        e.clear();
                        (losses.total, grads)
                    })
                })
                .collect();
            handles.into_iter().map(|h| h.join().expect("a worker panicked")).collect()
        });
        let mut loss = 0.0;
        let mut sum: Vec<Vec<f32>> = vec![Vec::new(); self.params.len()];
        for (l, grads) in shares {
            loss += l;
            for (sum, g) in sum.iter_mut().zip(grads) {
                if sum.is_empty() {
                    *sum = g;
                } else {
                    mindseye_train::eager::backward::accumulate(sum, &g);
                }
            }
        }
        (loss, sum)
    }

    fn update(&mut self, grads: Vec<Vec<f32>>) {
        self.step += 1;
        let optim = self.batch.config.optim.clone();
        let norm = grads.iter().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>().sqrt();
        let clip = (optim.clip / norm.max(1e-12)).min(1.0) as f32;
        let params = Arc::make_mut(&mut self.params);
        let shapes: Vec<Vec<usize>> = (0..params.len()).map(|i| params.get(i).1.to_vec()).collect();
        let mut lanes: Vec<Vec<_>> = (0..self.workers.len()).map(|_| Vec::new()).collect();
        let mut turn = [0usize; 2];
        let all = params.all_values_mut().zip(self.ema.all_values_mut()).zip(&mut self.moments);
        for ((((weights, ema), moments), grad), (rule, shape)) in
            all.zip(grads).zip(self.rules.iter().zip(&shapes))
        {
            if grad.is_empty() {
                continue;
            }
            let kind = usize::from(*rule == Rule::Muon);
            let lane = turn[kind] % lanes.len();
            turn[kind] += 1;
            lanes[lane].push((weights, ema, moments, grad, *rule, shape));
        }
        let (optim, step) = (&optim, self.step);
        std::thread::scope(|scope| {
            for lane in &mut lanes {
                scope.spawn(move || {
                    for (weights, ema, moments, grad, rule, shape) in lane {
                        grad.iter_mut().for_each(|g| *g *= clip);
                        optim::update(optim, *rule, shape, weights, grad, moments, optim.lr, step);
                        for (e, w) in ema.iter_mut().zip(weights.iter()) {
                            *e = 0.999 * *e + 0.001 * w;
                        }
                    }
                });
            }
        });
    }

    fn run(&mut self, count: usize, update: bool) -> f64 {
        let began = Instant::now();
        for _ in 0..count {
            let (_, grads) = self.backward();
            if update {
                self.update(grads);
            }
        }
        began.elapsed().as_secs_f64()
    }
}

/// Tensors by name, written as safetensors: floats and integers.
#[derive(Default)]
struct Tensors {
    head: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl Tensors {
    fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let begin = self.data.len();
        self.data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.entry(name, "F32", shape, begin);
    }

    fn rows(&mut self, name: &str, shape: &[usize], values: &[usize]) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let begin = self.data.len();
        self.data.extend(values.iter().flat_map(|v| (*v as i64).to_le_bytes()));
        self.entry(name, "I64", shape, begin);
    }

    fn entry(&mut self, name: &str, dtype: &str, shape: &[usize], begin: usize) {
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, self.data.len()]});
        self.head.insert(name.to_owned(), entry);
    }

    fn write(&self, path: &Path) {
        let mut head = serde_json::to_vec(&self.head).expect("a head");
        head.resize(head.len().next_multiple_of(8), b' ');
        let mut out = (head.len() as u64).to_le_bytes().to_vec();
        out.extend(head);
        out.extend(&self.data);
        std::fs::write(path, out).expect("the batch is written");
    }
}

/// The batch as the peer reads it: inputs as `net::forward` makes them, targets and the weight of each element as
/// `net::losses` has them. That both give one loss is checked.
fn tensors(batch: &Batch, params: &Params) -> Tensors {
    let Batch { config, model, samples, draws } = batch;
    let (b, f, cfg) = (samples.len(), model.latents(), &model.dit);
    let hw = cfg.latent_height * cfg.latent_width;
    let (c, tokens, context) = (cfg.in_channels, cfg.tokens_per_frame(), model.layout.context_latents);
    let a = cfg.attributes;
    let mut t = Tensors::default();
    for i in 0..params.len() {
        let (name, shape, values) = params.get(i);
        t.floats(&format!("w.{name}"), shape, values);
    }
    let mut latents = vec![0.0; b * c * f * hw];
    let (mut clean, mut video_weight) = (vec![0.0; b * f * hw * c], vec![0.0; b * f * hw * c]);
    let (mut rows, mut time, mut row_batch) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ids, mut keep, mut camera) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cos, mut sin) = (Vec::new(), Vec::new());
    let (mut pose, mut pose_weight) = (vec![0.0; b * f * 4], vec![0.0; b * f * 4]);
    let (mut mask, mut mask_weight) = (vec![0.0; b * f * tokens], vec![0.0; b * f * tokens]);
    let (mut locate, mut locate_weight) = (vec![0.0; b * f * tokens * 2], vec![0.0; b * f * tokens * 2]);
    let (mut attributes, mut attributes_weight) =
        (vec![0.0; b * f * tokens * a], vec![0.0; b * f * tokens * a]);
    let share = 1.0 / b as f32;
    for (i, (sample, draw)) in samples.iter().zip(draws).enumerate() {
        let s = draw.s as f32;
        for frame in 0..f {
            let (keep, noise) = match (frame <= context, draw.dropped) {
                (true, true) => (0.0, 1.0),
                (true, false) => (1.0, 0.0),
                (false, _) => (1.0 - s, s),
            };
            for ch in 0..c {
                for p in 0..hw {
                    let from = (frame * c + ch) * hw + p;
                    latents[((i * c + ch) * f + frame) * hw + p] =
                        keep * sample.latents[from] + noise * draw.noise[from];
                    let to = ((i * f + frame) * hw + p) * c + ch;
                    clean[to] = sample.latents[from];
                    if frame > context && sample.task != Task::Absent {
                        let values = ((f - context - 1) * hw * model.codec.block_values()) as f32;
                        video_weight[to] = share / s.max(0.5).powi(2) / values;
                    }
                }
            }
            rows.push(2 * i + usize::from(frame > context));
        }
        time.extend(sinusoid(if draw.dropped { 1000.0 } else { 0.0 }, cfg.freq_dim));
        time.extend(sinusoid(1000.0 * draw.s, cfg.freq_dim));
        row_batch.extend([i, i]);
        let mut own = sample.ids.clone();
        if draw.dropped {
            own.fill(0);
            own[0] = mindseye_train::family::END;
        }
        keep.extend(own.iter().map(|id| if *id == 0 { 0.0 } else { 1.0 }));
        ids.extend(own);
        camera.extend(sample.camera.iter().map(|v| if draw.dropped { 0.0 } else { *v }));
        let (x, y) = cfg.rotary_tables(&net::t_index(model, &sample.context_index));
        cos.extend(x);
        sin.extend(y);
        if draw.dropped {
            continue;
        }
        for frame in 0..f {
            if frame == context || (frame > context && sample.task == Task::Absent) {
                continue;
            }
            let k = if frame < context {
                config.loss.context_pose / context as f32
            } else {
                let last = if frame == f - 1 { 3.0 } else { 1.0 };
                config.loss.target_pose * last / (f - context + 1) as f32
            };
            let p = &sample.pose[frame];
            for (j, want) in [p.x, p.y, p.yaw.cos(), p.yaw.sin()].into_iter().enumerate() {
                pose[(i * f + frame) * 4 + j] = want as f32;
                pose_weight[(i * f + frame) * 4 + j] = k * share;
            }
        }
        if sample.task != Task::Navigate {
            let on = sample.seen.iter().filter(|s| **s >= SEEN_SHARE).count();
            for at in 0..(context + 1) * tokens {
                let to = i * f * tokens + at;
                let seen = sample.seen[at] >= SEEN_SHARE;
                mask[to] = f32::from(u8::from(seen));
                mask_weight[to] = config.loss.mask * share / ((context + 1) * tokens) as f32;
                for j in 0..2 {
                    locate[2 * to + j] = sample.locate[at / tokens][j];
                    locate_weight[2 * to + j] =
                        if seen { config.loss.locate * share / on as f32 } else { 0.0 };
                }
            }
        }
        for j in 0..context * tokens * a {
            attributes[i * f * tokens * a + j] = sample.attributes[j];
            attributes_weight[i * f * tokens * a + j] =
                config.loss.attributes * share / (context * tokens * a) as f32;
        }
    }
    let half = cfg.head_dim / 2;
    t.floats("x.latents", &[b, c, f, cfg.latent_height, cfg.latent_width], &latents);
    t.floats("x.clean", &[b, f, hw, c], &clean);
    t.floats("x.video_weight", &[b, f, hw, c], &video_weight);
    t.rows("x.rows", &[b, f], &rows);
    t.floats("x.time", &[2 * b, cfg.freq_dim], &time);
    t.rows("x.row_batch", &[2 * b], &row_batch);
    t.rows("x.ids", &[b, cfg.text_len], &ids);
    t.floats("x.keep", &[b, cfg.text_len, 1], &keep);
    t.floats("x.camera", &[b, f, tokens, cfg.camera_channels], &camera);
    t.floats("x.cos", &[b, f * tokens, half], &cos);
    t.floats("x.sin", &[b, f * tokens, half], &sin);
    t.floats("x.pose", &[b, f, 4], &pose);
    t.floats("x.pose_weight", &[b, f, 4], &pose_weight);
    t.floats("x.mask", &[b, f, tokens], &mask);
    t.floats("x.mask_weight", &[b, f, tokens], &mask_weight);
    t.floats("x.locate", &[b, f, tokens, 2], &locate);
    t.floats("x.locate_weight", &[b, f, tokens, 2], &locate_weight);
    t.floats("x.attributes", &[b, f, tokens, a], &attributes);
    t.floats("x.attributes_weight", &[b, f, tokens, a], &attributes_weight);
    t
}

/// The peer in its process.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(python: &str, batch: &Path, spec: &Path, threads: usize) -> (Self, Value) {
        let script = repository().join("tests/python/train_step.py");
        let mut child = Command::new(python)
            .arg(script)
            .args([batch, spec])
            .env("OMP_NUM_THREADS", threads.to_string())
            .env("MKL_NUM_THREADS", threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python starts");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut peer = Self { child, input, output };
        let hello = peer.answer();
        (peer, hello)
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the peer answers");
        serde_json::from_str(&line).expect("the peer answers with JSON; its error is above")
    }

    fn run(&mut self, what: &str, count: usize) -> f64 {
        writeln!(self.input, "{what} {count}").expect("the peer listens");
        self.answer()["seconds"].as_f64().expect("seconds")
    }
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn measure(python: &str, folder: &Path, threads: usize) {
    let mut ours = Ours::new(threads);
    let (data, spec) = (folder.join("batch.safetensors"), folder.join("spec.json"));
    tensors(&ours.batch, &ours.params).write(&data);
    let rules: serde_json::Map<String, Value> = (0..ours.params.len())
        .map(|i| (ours.params.get(i).0.to_owned(), format!("{:?}", ours.rules[i]).into()))
        .collect();
    let config = &ours.batch.config;
    let facts = json!({
        "threads": threads,
        "dit": ours.batch.model.dit,
        "text_eps": ours.batch.model.text.eps,
        "loss": config.loss,
        "optim": config.optim,
        "rules": rules,
    });
    std::fs::write(&spec, facts.to_string()).expect("the sizes are written");
    let (mut peer, hello) = Peer::start(python, &data, &spec, threads);
    let theirs = hello["loss"].as_f64().expect("a loss");
    let loss = ours.backward().0;
    assert!((loss / theirs - 1.0).abs() < 1e-3, "not the same step: our loss {loss}, PyTorch's {theirs}");

    // In turns, so that a busy machine is busy for both.
    let (batch, mut lines) = (ours.batch.config.batch, Vec::new());
    for (what, update) in [("grad", false), ("step", true)] {
        ours.run(1, update);
        peer.run(what, 1);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            a.push(ours.run(STEPS, update) / STEPS as f64);
            b.push(peer.run(what, STEPS) / STEPS as f64);
        }
        let ratios = a.iter().zip(&b).map(|(a, b)| b / a).collect();
        lines.push((what, median(a), median(b), median(ratios)));
    }
    for (what, a, b, ratio) in lines {
        let what = if what == "grad" { "forward and backward" } else { "whole step" };
        println!(
            "train_step, {threads} thread(s), batch {batch}, f32, {what}: ours {:.0} ms, PyTorch {} {:.0} ms, \
             ours over PyTorch {ratio:.2}x (wanted at least {WANTED}); losses {loss:.5} and {theirs:.5}",
            1e3 * a,
            hello["torch"].as_str().unwrap_or("?"),
            1e3 * b,
        );
    }
    drop(peer.input);
    let _ = peer.child.wait();
}
