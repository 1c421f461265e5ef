//! The video autoencoder, latents that are encoded once, and the transformer on them, in a few steps.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use mindseye_train::autoencoder::{AutoencoderConfig, AutoencoderTrainer};
use mindseye_train::autograd::EagerDevice;
use mindseye_train::error::TrainError;
use mindseye_train::finetune::{Encoders, FineTuneConfig, FineTuneTrainer, encode};
use mindseye_train::task::TaskMetrics;

const MODEL: &str = include_str!("../../../tests/data/train/wan/model.toml");
const AUTOENCODER: &str = include_str!("../../../tests/data/train/wan/autoencoder.toml");
const FINE_TUNE: &str = include_str!("../../../tests/data/train/wan/fine_tune.toml");
const STEPS: u64 = 12;

fn write(dir: &Path, name: &str, text: &str) {
    let text = text
        .replace("\nsteps = 2000", &format!("\nsteps = {STEPS}"))
        .replace("\nsteps = 1500", &format!("\nsteps = {STEPS}"))
        .replace("warmup = 20", "warmup = 2")
        .replace("log_every = 100", "log_every = 1");
    std::fs::write(dir.join(format!("{name}.toml")), text).expect("it is written");
}

fn configure(dir: &Path) {
    let tokenizer = "../../tests/data/golden/set1/tokenizer/tiny.model";
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join(tokenizer);
    std::fs::copy(tokenizer, dir.join("tiny.model")).expect("it is copied");
    for (name, text) in [("model", MODEL), ("autoencoder", AUTOENCODER), ("fine_tune", FINE_TUNE)] {
        write(dir, name, text);
    }
}

fn metrics(dir: &Path, run: &str) -> Vec<TaskMetrics> {
    let text = std::fs::read_to_string(dir.join(run).join("metrics.jsonl")).expect("metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn autoencoder(dir: &Path, run: &str, until: u64) -> Result<(), TrainError> {
    let loaded = AutoencoderConfig::load(&dir.join("autoencoder.toml"))?;
    let mut trainer = AutoencoderTrainer::open(&EagerDevice, loaded, &dir.join(run), None)?;
    trainer.run(Some(until), &AtomicBool::new(false), |_, _| ())
}

fn fine_tune(dir: &Path, run: &str, until: u64) -> Result<(), TrainError> {
    let (path, go) = (dir.join("fine_tune.toml"), AtomicBool::new(false));
    let (config, model) = FineTuneConfig::load_to_train(&path)?;
    let encoders = Encoders::load(&path, &config, &model)?;
    let latents = encode(&path, &config, &model, &encoders, &dir.join("latents"), &go)?;
    let mut trainer = FineTuneTrainer::open(
        &EagerDevice,
        &path,
        (config, model),
        &encoders,
        latents,
        &dir.join(run),
        None,
        None,
    )?;
    trainer.run(Some(until), &go, |_, _| ())
}

/// The loss falls over the first steps.
fn falls(lines: &[TaskMetrics]) {
    assert_eq!(lines.len(), STEPS as usize);
    let mean = |lines: &[TaskMetrics]| lines.iter().map(|m| m.loss).sum::<f64>() / lines.len() as f64;
    let (first, last) = (mean(&lines[..4]), mean(&lines[8..]));
    assert!(last < first, "the loss went from {first} to {last}");
}

#[test]
fn an_autoencoder_and_a_transformer_on_its_latents_learn_and_go_on_exactly() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir);
    let refused = |run: &str| fine_tune(dir, run, STEPS).expect_err("refused").to_string();
    assert!(refused("run").contains("autoencoder/checkpoint.safetensors: No such file"));
    autoencoder(dir, "autoencoder", STEPS).expect("it runs");
    falls(&metrics(dir, "autoencoder"));
    autoencoder(dir, "stopped", 5).expect("it runs");
    autoencoder(dir, "stopped", STEPS).expect("it goes on");
    assert_eq!(metrics(dir, "stopped"), metrics(dir, "autoencoder"));

    fine_tune(dir, "run", STEPS).expect("it runs");
    falls(&metrics(dir, "run"));
    fine_tune(dir, "stopped run", 7).expect("it runs");
    fine_tune(dir, "stopped run", STEPS).expect("it goes on");
    assert_eq!(metrics(dir, "stopped run"), metrics(dir, "run"));

    // A loss that is no number.
    write(dir, "fine_tune", &FINE_TUNE.replace("lr = 3e-3", "lr = 1e30"));
    let said = refused("diverged");
    assert!(said.contains("the loss is not finite; lower optim.lr"), "{said}");
    write(dir, "fine_tune", FINE_TUNE);

    // A shard that changed, latents of another autoencoder, and a configuration that is a plan only.
    let shard = dir.join("latents/00001.safetensors");
    let good = std::fs::read(&shard).expect("a shard");
    let mut bad = good.clone();
    *bad.last_mut().expect("bytes") ^= 1;
    std::fs::write(&shard, bad).expect("it is written");
    assert!(refused("other").contains("00001.safetensors: its SHA-256 is"));
    std::fs::write(&shard, good).expect("it is written");
    write(dir, "autoencoder", &AUTOENCODER.replace("seed = 5", "seed = 7"));
    std::fs::remove_dir_all(dir.join("autoencoder")).expect("it is removed");
    autoencoder(dir, "autoencoder", 1).expect("it runs");
    assert!(refused("other").contains("latents of another autoencoder"));
    let (head, rest) = FINE_TUNE.split_at(FINE_TUNE.find("[course]").expect("a table"));
    write(dir, "fine_tune", &format!("{head}{}", &rest[rest.find("[optim]").expect("a table")..]));
    assert!(refused("other").contains("it can only be planned (--plan)"));
}
