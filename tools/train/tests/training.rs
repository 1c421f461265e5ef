//! Training on the smallest configuration: the loss falls, and a run that is stopped and resumed is the same run. (Runs
//! that are killed are in `tools/tests/train.rs`.)

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use mindseye_train::config::TrainConfig;
use mindseye_train::trainer::{Metrics, Trainer};

const MODEL: &str = include_str!("../../../tests/data/train/model.toml");
const TRAIN: &str = include_str!("../../../tests/data/train/train.toml");

fn open(dir: &Path, run: &str) -> Trainer {
    open_as(dir, run, MODEL, TRAIN)
}

fn open_as(dir: &Path, run: &str, model: &str, train: &str) -> Trainer {
    std::fs::write(dir.join("model.toml"), model).expect("the model file is written");
    std::fs::write(dir.join("train.toml"), train).expect("the configuration is written");
    let (config, model) = TrainConfig::load(&dir.join("train.toml")).expect("the configuration is valid");
    Trainer::open(config, model, &dir.join(run)).expect("the run opens")
}

/// Runs until a metrics line of this step was written, then stops.
fn run_until(trainer: &mut Trainer, step: u64) {
    let stop = AtomicBool::new(false);
    trainer.run(&stop, |m, _| stop.store(m.step >= step, Ordering::Relaxed)).expect("the run goes on");
}

fn metrics(dir: &Path, run: &str) -> String {
    std::fs::read_to_string(dir.join(run).join("metrics.jsonl")).expect("metrics were written")
}

#[test]
fn the_loss_falls_and_a_stopped_run_goes_on_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().unwrap();
    run_until(&mut open(dir.path(), "whole"), 240);
    let whole = metrics(dir.path(), "whole");
    let lines: Vec<Metrics> = whole.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 6);
    let (first, last) = (lines[0].losses.total, lines[5].losses.total);
    assert!(last < 0.9 * first, "the loss went from {first} to {last}");

    // Stopped at step 200, between two checkpoints: one more is written.
    run_until(&mut open(dir.path(), "stopped"), 200);
    let mut again = open(dir.path(), "stopped");
    assert_eq!(again.state.step, 200);
    run_until(&mut again, 240);
    assert_eq!(metrics(dir.path(), "stopped"), whole);
}

fn losses(dir: &Path, run: &str) -> Vec<Metrics> {
    metrics(dir, run).lines().map(|l| serde_json::from_str(l).expect("JSON")).collect()
}

#[test]
fn velocity_is_trained_by_configuration() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = MODEL.replace("prediction = \"x0\"", "prediction = \"velocity\"");
    run_until(&mut open_as(dir.path(), "run", &model, TRAIN), 240);
    let lines = losses(dir.path(), "run");
    let (first, last) = (lines[0].losses, lines[5].losses);
    assert!(last.video < 0.9 * first.video, "the video loss went from {} to {}", first.video, last.video);
    assert!(last.total < 0.9 * first.total, "the loss went from {} to {}", first.total, last.total);
}

#[test]
fn gradients_of_several_passes_are_those_of_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let train = TRAIN.replace("steps = 240", "steps = 4").replace("log_every = 40", "log_every = 1");
    run_until(&mut open_as(dir.path(), "one", MODEL, &train), 4);
    let train = train.replace("workers = 2", "workers = 2\naccumulate = 2");
    run_until(&mut open_as(dir.path(), "two", MODEL, &train), 4);
    for (a, b) in losses(dir.path(), "one").iter().zip(losses(dir.path(), "two")) {
        let near = |x: f64, y: f64| (x - y).abs() < 1e-3 * x.abs();
        assert!(near(a.losses.total, b.losses.total) && near(a.grad_norm, b.grad_norm), "{a:?} {b:?}");
    }
}

#[test]
fn attention_alone_can_be_trained() {
    let dir = tempfile::tempdir().expect("a directory");
    let train = format!("only = [\"attn1\", \"attn2\"]\n{}", TRAIN.replace("steps = 240", "steps = 10"));
    let mut trainer = open_as(dir.path(), "run", MODEL, &train);
    let before = trainer.state.params.clone();
    run_until(&mut trainer, 10);
    let mut changed = 0;
    for i in 0..before.len() {
        let (name, _, values) = before.get(i);
        let same = values == trainer.state.params.get(i).2;
        assert!(same || name.contains("attn"), "{name} has changed");
        changed += usize::from(!same);
    }
    assert!(changed >= 8, "only {changed} weights have changed");
}

#[test]
fn a_loss_that_is_no_number_ends_the_run_and_leaves_the_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let steps = |n: u64| TRAIN.replace("steps = 240", &format!("steps = {n}"));
    run_until(&mut open_as(dir.path(), "run", MODEL, &steps(2)), 2);
    let checkpoint = || std::fs::read(dir.path().join("run/checkpoint.safetensors")).expect("a checkpoint");
    let before = checkpoint();
    let mut trainer = open_as(dir.path(), "run", MODEL, &steps(4));
    let params = std::sync::Arc::make_mut(&mut trainer.state.params);
    params.all_values_mut().for_each(|values| values[0] = f32::NAN);
    let error = trainer.run(&AtomicBool::new(false), |_, _| ()).expect_err("it diverged").to_string();
    assert!(error.starts_with("step 3: the loss is not finite; lower optim.lr"), "{error}");
    assert!(checkpoint() == before);
}

#[test]
fn no_libtorch_and_another_version_are_named_before_anything_is_built() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("torch/build.sh");
    let torch = dir.path().join("torch");
    let said = || {
        let mut command = std::process::Command::new("bash");
        command
            .arg(&script)
            .env("MINDSEYE_LIBTORCH", &torch)
            .env("CARGO_TARGET_DIR", dir.path().join("target"));
        let out = command.output().expect("there is a shell");
        assert_eq!(out.status.code(), Some(1));
        String::from_utf8(out.stderr).expect("text")
    };
    let line = |found: &str| {
        format!(
            "error: {} is not PyTorch 2.11.0 (found: {found}); name one with MINDSEYE_LIBTORCH\n",
            torch.canonicalize().unwrap_or_else(|_| torch.clone()).display()
        )
    };
    assert_eq!(said(), line("none"));
    std::fs::create_dir_all(torch.join("lib")).expect("a directory");
    std::fs::write(torch.join("lib/libtorch_cpu.so"), "").expect("it is written");
    std::fs::write(torch.join("version.py"), "__version__ = '2.10.1+cpu'\n").expect("it is written");
    assert_eq!(said(), line("2.10.1"));
    assert!(!dir.path().join("target").exists(), "nothing is built");
}

#[test]
fn a_checkpoint_of_another_model_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    run_until(&mut open(dir.path(), "run"), 80);
    let (config, mut model) = TrainConfig::load(&dir.path().join("train.toml")).unwrap();
    model.dit.ffn_dim = 48;
    let Err(error) = Trainer::open(config, model, &dir.path().join("run")) else {
        panic!("a checkpoint of another model was taken");
    };
    assert!(error.to_string().contains("ffn"), "{error}");
}
