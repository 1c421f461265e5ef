//! `mindseye-tools train --device cpu` as a process: stopped, killed, gone on with exactly, shipped, evaluated.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/data/train")
}

fn configure(dir: &Path) {
    std::fs::copy(data().join("model.toml"), dir.join("model.toml")).expect("it is copied");
    let train = std::fs::read_to_string(data().join("train.toml")).expect("it is there");
    let train = train
        .replace("checkpoint_every = 80", "checkpoint_every = 35")
        .replace("log_every = 40", "log_every = 20");
    std::fs::write(dir.join("train.toml"), train).expect("it is written");
}

fn command(dir: &Path, run: &str, device: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mindseye-tools"));
    command
        .arg("train")
        .arg(dir.join("train.toml"))
        .arg("--out")
        .arg(dir.join(run))
        .args(["--device", device]);
    command
}

fn succeeds(command: &mut Command) -> Output {
    let out = command.output().expect("the program starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    out
}

fn metrics(dir: &Path, run: &str) -> String {
    std::fs::read_to_string(dir.join(run).join("metrics.jsonl")).unwrap_or_default()
}

#[test]
fn a_run_that_was_stopped_and_killed_goes_on_exactly_ships_and_is_evaluated() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir);
    succeeds(&mut command(dir, "whole", "cpu"));
    let wanted = metrics(dir, "whole");
    assert_eq!(wanted.lines().count(), 12);
    succeeds(command(dir, "stopped", "cpu").args(["--until", "110"]));
    // The other interpreter takes the checkpoint, too.
    std::fs::create_dir(dir.join("other")).expect("a directory");
    for file in ["checkpoint.safetensors", "metrics.jsonl"] {
        std::fs::copy(dir.join("stopped").join(file), dir.join("other").join(file)).expect("it is copied");
    }
    // Gone on with, killed, and gone on with again.
    let mut child = command(dir, "stopped", "cpu").stderr(Stdio::null()).spawn().expect("the program starts");
    let until = Instant::now() + Duration::from_secs(240);
    while metrics(dir, "stopped").lines().count() < 8 {
        assert!(Instant::now() < until, "no line 8 in metrics.jsonl");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("SIGKILL is sent");
    assert!(child.wait().expect("it ends").code().is_none(), "it had ended before it was killed");
    succeeds(&mut command(dir, "stopped", "cpu"));
    assert_eq!(metrics(dir, "stopped"), wanted);
    succeeds(&mut command(dir, "other", "eager"));
    assert_eq!(metrics(dir, "other").lines().count(), 12);
    let mut ship = Command::new(env!("CARGO_BIN_EXE_mindseye-tools"));
    ship.arg("ship").arg(dir.join("stopped")).arg("--config").arg(dir.join("train.toml"));
    succeeds(ship.arg("--out").arg(dir.join("bundle")));
    assert!(dir.join("bundle/bundle.toml").is_file());
    let mut eval = Command::new(env!("CARGO_BIN_EXE_mindseye-tools"));
    eval.args(["eval", "grounding", "--quick", "--houses", "2", "--jobs", "1", "--seed", "700000", "--json"]);
    let out = succeeds(eval.arg("--bundle").arg(dir.join("bundle")));
    let figures: serde_json::Value = serde_json::from_slice(&out.stdout).expect("one JSON document");
    assert!(figures.is_object(), "{figures}");
}

#[test]
fn a_device_that_is_not_there_is_one_line() {
    let dir = tempfile::tempdir().expect("a directory");
    configure(dir.path());
    for (device, word) in [("tpu", "expected eager, cpu, cuda or cuda:N"), ("cuda:99", "--device cuda:99")] {
        let out = command(dir.path(), "run", device).output().expect("the program starts");
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!((out.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains(word), "{said}");
    }
}
