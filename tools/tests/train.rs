//! `mindseye-tools train` as a process: killed, interrupted, on a full disk, with another configuration, on clips that a
//! lab wrote.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use mindseye_base::picture::save_png;
use mindseye_tools::world::{RecordOptions, record};
use serde_json::{Value, json};

const MODEL: &str = include_str!("../../tests/data/train/model.toml");
/// The smallest run, with checkpoints that fall between lines of the metrics file.
static TRAIN: LazyLock<String> = LazyLock::new(|| {
    include_str!("../../tests/data/train/train.toml")
        .replace("workers = 2", "workers = 2\naccumulate = 2")
        .replace("checkpoint_every = 80", "checkpoint_every = 35")
        .replace("log_every = 40", "log_every = 20")
        .replace("eval_every = 240", "eval_every = 120")
});

fn configure(dir: &Path, train: &str) {
    fs::write(dir.join("model.toml"), MODEL).expect("the model file is written");
    fs::write(dir.join("train.toml"), train).expect("the configuration is written");
}

fn command(dir: &Path, run: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mindseye-tools"));
    command.arg("train").arg(dir.join("train.toml")).arg("--out").arg(dir.join(run));
    command
}

fn go(dir: &Path, run: &str, more: &[&str]) -> Output {
    command(dir, run).args(more).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn metrics(dir: &Path, run: &str) -> String {
    fs::read_to_string(dir.join(run).join("metrics.jsonl")).unwrap_or_default()
}

/// Starts a run and waits until its metrics file has this many lines.
fn start(dir: &Path, run: &str, lines: usize) -> Child {
    let child = command(dir, run).stderr(Stdio::null()).spawn().expect("the program starts");
    let until = Instant::now() + Duration::from_secs(120);
    while metrics(dir, run).lines().count() < lines {
        assert!(Instant::now() < until, "no line {lines} in metrics.jsonl");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

fn wait(mut child: Child) -> ExitStatus {
    child.wait().expect("the child ends")
}

#[test]
fn a_killed_run_goes_on_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, &TRAIN);
    let whole = go(dir, "whole", &[]);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    let wanted = metrics(dir, "whole");
    assert_eq!(wanted.lines().count(), 12);
    // Before the first checkpoint, between two, and once more.
    let mut killed = 0;
    for lines in [1, 4, 9] {
        let mut child = start(dir, "killed", lines);
        child.kill().expect("SIGKILL is sent");
        killed += usize::from(wait(child).code().is_none());
    }
    assert!(killed >= 2, "only {killed} runs were killed before they ended");
    let last = go(dir, "killed", &[]);
    assert!(last.status.success(), "{}", text(&last.stderr));
    assert_eq!(metrics(dir, "killed"), wanted);
    assert!(dir.join("killed/curve.png").is_file());
}

#[test]
fn an_interrupted_run_says_so_and_loses_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, &TRAIN);
    assert!(go(dir, "whole", &[]).status.success());
    let child = start(dir, "stopped", 3);
    let signal = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status();
    assert!(signal.expect("sh starts").success());
    let status = wait(child);
    assert_eq!(status.code(), Some(130), "{status}");
    // Nothing has to be done again: the checkpoint is at the very step.
    let before = metrics(dir, "stopped");
    let out = go(dir, "stopped", &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let after = metrics(dir, "stopped");
    assert!(after.starts_with(&before));
    assert_eq!(after, metrics(dir, "whole"));
}

#[test]
fn a_full_disk_is_named_and_the_last_checkpoint_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, &TRAIN);
    assert!(go(dir, "whole", &[]).status.success());
    assert!(go(dir, "full", &["--until", "70"]).status.success());
    let checkpoint = fs::read(dir.join("full/checkpoint.safetensors")).expect("a checkpoint");
    // No file may be longer than 8 blocks of 512 bytes: the metrics fit for a while, a checkpoint does not.
    let limited = command(dir, "full");
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -f 8 && trap '' XFSZ && exec \"$@\"", "sh"]).arg(limited.get_program());
    let out = shell.args(limited.get_args()).output().expect("sh starts");
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(said.contains("checkpoint.safetensors") && said.contains("make room"), "{said}");
    assert!(fs::read(dir.join("full/checkpoint.safetensors")).expect("a checkpoint") == checkpoint);
    let out = go(dir, "full", &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(metrics(dir, "full"), metrics(dir, "whole"));
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused_by_field() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, &TRAIN);
    assert!(go(dir, "run", &["--until", "20"]).status.success());
    let check = |train: &str, model: &str, more: &[&str], wanted: Option<&[&str]>| {
        fs::write(dir.join("train.toml"), train).expect("the configuration is written");
        fs::write(dir.join("model.toml"), model).expect("the model file is written");
        let more = [more, &["--until", "20"]].concat();
        let out = go(dir, "run", &more);
        let said = text(&out.stderr);
        match wanted {
            None => assert!(out.status.success(), "{said}"),
            Some(words) => {
                assert_eq!(out.status.code(), Some(1), "{said}");
                assert!(words.iter().all(|w| said.contains(w)), "{said}");
                assert_eq!(said.lines().count(), 1, "{said}");
            }
        }
    };
    let seed = TRAIN.replace("seed = 3", "seed = 4");
    check(&seed, MODEL, &[], Some(&["seed = 3 there, 4 here", "--out"]));
    check(&seed, MODEL, &["--other-configuration"], None);
    check(&TRAIN.replace("betas = [0.9, 0.99]", "betas = [0.9, 0.9]"), MODEL, &[], Some(&["optim.betas"]));
    check(
        &TRAIN,
        &MODEL.replace("gap = 50", "gap = 20"),
        &[],
        Some(&["model.layout.gap = 50 there, 20 here"]),
    );
    check(&TRAIN, &MODEL.replace("ffn_dim = 32", "ffn_dim = 48"), &[], Some(&["ffn"]));
    check(&TRAIN.replace("lr = 3e-3", "lr = 1e-3").replace("steps = 240", "steps = 300"), MODEL, &[], None);
    check(&TRAIN.replace("accumulate = 2", "accumulate = 3"), MODEL, &[], Some(&["accumulate"]));
    check(&TRAIN.replace("log_every = 20", "log_every = 0"), MODEL, &[], Some(&["log_every"]));
    // The large member of the family.
    check(&TRAIN, "[vae]\nbase_dim = 160\n", &[], Some(&["model.toml: [vae]", "linear codec"]));
    // A file that is no checkpoint.
    fs::write(dir.join("run/checkpoint.safetensors"), b"nothing").expect("a file");
    check(&TRAIN, MODEL, &[], Some(&["checkpoint.safetensors", "remove it"]));
}

/// Writes a bundle of a run with the options `more`.
fn ship(dir: &Path, run: &str, out: &str, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mindseye-tools"))
        .arg("ship")
        .arg(dir.join(run))
        .arg("--config")
        .arg(dir.join("train.toml"))
        .arg("--out")
        .arg(dir.join(out))
        .args(more)
        .output()
        .expect("the program starts")
}

#[test]
fn a_student_is_distilled_from_a_bundle_and_shipped_with_fewer_steps() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    configure(dir, &TRAIN);
    let teacher = go(dir, "teacher", &[]);
    assert!(teacher.status.success(), "{}", text(&teacher.stderr));
    let shipped = ship(dir, "teacher", "bundle", &["--raw", "--cached"]);
    assert!(shipped.status.success(), "{}", text(&shipped.stderr));

    let table =
        "[distill]\nteacher = \"bundle\"\nguidance = 2.0\nteacher_steps = 6\nsteps = 2\nshare = 0.7\n";
    let student = TRAIN.replace("steps = 240", "steps = 60") + table;
    configure(dir, &student);
    let whole = go(dir, "student", &[]);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    // Interrupted and gone on with, it is the same run.
    assert_eq!(go(dir, "again", &["--until", "30"]).status.code(), Some(0));
    assert!(go(dir, "again", &[]).status.success());
    assert_eq!(metrics(dir, "again"), metrics(dir, "student"));
    // It begins as its teacher, so what it is asked for is near what it says; without the teacher it is not.
    let video = |run: &str| -> f64 {
        let first = metrics(dir, run);
        let line: Value = serde_json::from_str(first.lines().next().expect("a line")).expect("JSON");
        line["losses"]["video"].as_f64().expect("a loss")
    };
    configure(dir, &TRAIN.replace("steps = 240", "steps = 60"));
    assert!(go(dir, "alone", &[]).status.success());
    assert!(video("student") < 0.7 * video("alone"), "{} of {}", video("student"), video("alone"));

    configure(dir, &student);
    let shipped = ship(dir, "student", "small", &["--raw"]);
    assert!(shipped.status.success(), "{}", text(&shipped.stderr));
    let manifest = fs::read_to_string(dir.join("small/bundle.toml")).expect("a manifest");
    let manifest: toml::Table = manifest.parse().expect("TOML");
    assert_eq!(manifest["sampler"]["steps"].as_integer(), Some(2));
    assert_eq!(manifest["sampler"]["guidance"].as_float(), Some(1.0));
    assert_eq!(manifest["provenance"]["training"]["distill"]["teacher_steps"].as_integer(), Some(6));

    fs::remove_dir_all(dir.join("bundle")).expect("the teacher is removed");
    let refused = go(dir, "student", &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("distill.teacher"), "{}", text(&refused.stderr));
}

/// Pictures of a shade that drifts across.
fn pictures(dir: &Path, count: usize) {
    fs::create_dir_all(dir).expect("a directory");
    let (w, h) = (48, 32);
    for k in 0..count {
        let rgb: Vec<u8> = (0..w * h * 3)
            .map(|i| ((i / 3 % w * 5 + i / (3 * w) * 3 + k * 7 + i % 3 * 40) % 256) as u8)
            .collect();
        save_png(&dir.join(format!("{k:04}.png")), w, h, &rgb).expect("a picture");
    }
}

/// Two places: a directory of pictures with KITTI poses, and a bag.
fn lab(dir: &Path) {
    let data = dir.join("data");
    for part in ["recordings", "clips"] {
        fs::create_dir_all(data.join(part)).expect("a directory");
    }
    let write = |path: &str, value: Value| fs::write(data.join(path), value.to_string()).expect("a manifest");
    write("dataset.json", json!({"format": 1, "root": "videos"}));
    pictures(&data.join("videos/monday"), 60);
    let mut poses = String::new();
    for k in 0..60 {
        poses += &match k {
            7 => "nan ".repeat(12) + "\n",
            _ => format!("1 0 0 {} 0 1 0 0 0 0 1 {}\n", 0.01 * f64::from(k), 0.02 * f64::from(k)),
        };
    }
    fs::write(data.join("videos/monday.txt"), poses).expect("poses");
    write(
        "recordings/monday.json",
        json!({"id": "monday", "environment": "kitchen", "video": "monday", "poses": "monday.txt",
               "intrinsics": [40.0, 40.0, 23.5, 15.5]}),
    );
    let options = RecordOptions {
        seed: 5,
        difficulty: "plain".into(),
        seconds: 4.0,
        rate: 10.0,
        width: 48,
        height: 32,
    };
    record(&data.join("videos/house.mcap"), &options).expect("a recording");
    write("recordings/house.json", json!({"id": "house", "video": "house.mcap"}));
    for (name, recording, first, caption) in [
        ("a", "monday", 10, "The camera moves across a kitchen. Finally, it focuses on the red box."),
        ("b", "monday", 30, "the green chair"),
        ("c", "house", 12, "the blue lamp"),
    ] {
        write(
            &format!("clips/{name}.json"),
            json!({"id": name, "recording": recording, "first": first, "frames": 9, "caption": caption,
                   "area": [0.3, 0.3, 0.7, 0.7]}),
        );
    }
}

const CLIPS: &str = "[data]\nkind = \"clips\"\npath = \"data\"\n";

fn report(dir: &Path, run: &str) -> Value {
    let out = go(dir, run, &["--prepare", "--json"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON document")
}

#[test]
fn videos_that_a_lab_wrote_train_and_resume() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    lab(dir);
    configure(dir, &format!("{}{CLIPS}", *TRAIN));
    let first = report(dir, "whole");
    assert_eq!(
        (&first["recordings"], &first["decoded"], &first["images"]),
        (&json!(2), &json!(2), &json!(101))
    );
    // One line of NaN; the bag's poses come from its odometry.
    assert_eq!((&first["without_pose"], &first["faults"]["bad_poses"]), (&json!(1), &json!(1)));
    assert_eq!(first["found"]["clips"], 3);
    assert!(first["found"]["walks"].as_u64() > Some(40), "{first}");
    assert_eq!(report(dir, "whole")["decoded"], 0, "decoded once");

    let whole = go(dir, "whole", &[]);
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    let lines: Vec<Value> =
        metrics(dir, "whole").lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let loss = |k: usize| lines[k]["losses"]["total"].as_f64().expect("a number");
    assert!(loss(11) < 0.8 * loss(0), "the loss went from {} to {}", loss(0), loss(11));
    let mut child = start(dir, "killed", 5);
    child.kill().expect("SIGKILL is sent");
    wait(child);
    assert!(go(dir, "killed", &[]).status.success());
    assert_eq!(metrics(dir, "killed"), metrics(dir, "whole"));

    // The same pictures elsewhere are the same data; another picture is not.
    fs::rename(dir.join("data"), dir.join("moved")).expect("a move");
    configure(dir, &format!("{}{CLIPS}", *TRAIN).replace("path = \"data\"", "path = \"moved\""));
    let out = go(dir, "whole", &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    fs::copy(dir.join("moved/videos/monday/0001.png"), dir.join("moved/videos/monday/0002.png"))
        .expect("a copy");
    let out = go(dir, "whole", &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("the clips have changed"), "{}", text(&out.stderr));
}

#[test]
fn held_out_places_and_houses_can_be_mixed_in() {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    lab(dir);
    // One of the two places falls below this share.
    let more = "house = 0.5\nheld_out = 0.5\ncontext = \"same\"\n";
    configure(dir, &format!("{}{CLIPS}{more}", *TRAIN));
    let found = &report(dir, "run")["found"];
    let (train, held) = (found["clips"].as_u64(), found["clips_held_out"].as_u64());
    assert_eq!(train.zip(held).map(|(a, b)| a + b), Some(3));
    assert!(train > Some(0) && held > Some(0), "{found}");
    let out = go(dir, "run", &["--until", "120"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let last: Value = serde_json::from_str(metrics(dir, "run").lines().last().expect("lines")).expect("JSON");
    assert!(last["held_out"]["video"].as_f64() > Some(0.0), "{last}");
    assert!(last["eval"]["mask_yaw_deg"].is_number(), "{last}");
    // Houses have dense labels.
    assert!(last["losses"]["mask"].as_f64() > Some(0.0), "{last}");
}

#[test]
fn what_is_wrong_with_clips_is_counted_and_the_rest_trains() {
    let check = |spoil: &dyn Fn(&Path), path: &str, wanted: u64, clips: u64, words: &str| {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        lab(dir);
        spoil(&dir.join("data"));
        configure(dir, &format!("{}{CLIPS}", *TRAIN));
        let report = report(dir, "run");
        assert_eq!(report.pointer(path).and_then(Value::as_u64), Some(wanted), "{path}: {report}");
        assert_eq!(report["found"]["clips"].as_u64(), Some(clips), "{report}");
        assert!(report.to_string().contains(words), "{words}: {report}");
    };
    let edit = |data: &Path, path: &str, edit: &dyn Fn(&mut Value)| {
        let mut value = serde_json::from_slice(&fs::read(data.join(path)).expect("a file")).expect("JSON");
        edit(&mut value);
        fs::write(data.join(path), value.to_string()).expect("a file");
    };
    let clip = |f: fn(&mut Value)| move |data: &Path| edit(data, "clips/b.json", &f);
    check(&clip(|c| c["caption"] = json!("  ")), "/faults/clips", 1, 2, "empty caption");
    check(&clip(|c| c["caption"] = json!("the thing")), "/unknown_words", 1, 2, "words");
    check(&clip(|c| c["area"] = json!([0.5, 0.2, 0.4, 0.9])), "/faults/clips", 1, 2, "area");
    check(&clip(|c| c["area"] = json!(null)), "/found/without_box", 1, 3, "");
    check(&clip(|c| c["recording"] = json!("nowhere")), "/faults/clips", 1, 2, "nowhere");
    check(
        &clip(|c| c["frames"] = json!(4)),
        "/found/left_out/fewer than 5 images, which the model's motion takes",
        1,
        2,
        "",
    );
    check(
        &clip(|c| {
            c["first"] = json!(3);
            c["frames"] = json!(55);
        }),
        "/found/left_out/fewer than 2 groups of context",
        1,
        2,
        "",
    );
    // A picture of clip b.
    check(
        &|data| fs::write(data.join("videos/monday/0033.png"), b"\x89PNG\r\n\x1a\nnothing").expect("a file"),
        "/unreadable_images",
        1,
        2,
        "0033.png",
    );
    check(
        &|data| {
            let mut bytes = fs::read(data.join("videos/monday/0033.png")).expect("a file");
            bytes.truncate(bytes.len() / 2);
            fs::write(data.join("videos/monday/0033.png"), bytes).expect("a file");
        },
        "/unreadable_images",
        1,
        2,
        "0033.png",
    );
    // A bag that is none, and one without the topic that is asked for.
    check(
        &|data| fs::write(data.join("videos/house.mcap"), b"not a bag at all").expect("a file"),
        "/faults/recordings",
        1,
        2,
        "house.mcap",
    );
    check(
        &|data| {
            // Twenty images come before the cut; the clip on images 12 to 20 is lost, and the damage is named.
            let bytes = fs::read(data.join("videos/house.mcap")).expect("a file");
            fs::write(data.join("videos/house.mcap"), &bytes[..bytes.len() * 4 / 5]).expect("a file");
        },
        "/recordings",
        2,
        2,
        "the file is cut inside the chunk",
    );
    check(
        &|data| edit(data, "recordings/house.json", &|r| r["topic"] = json!("/other")),
        "/faults/recordings",
        1,
        2,
        "no image topic",
    );
    check(
        &|data| fs::write(data.join("videos/monday.txt"), "1 0 0 0\n").expect("a file"),
        "/faults/recordings",
        1,
        1,
        "monday.txt: 1 lines",
    );
    check(
        &|data| fs::remove_dir_all(data.join("videos/monday")).expect("gone"),
        "/faults/recordings",
        1,
        1,
        "",
    );
    check(
        &|data| {
            edit(data, "recordings/monday.json", &|r| {
                r["frames"] = (0..50).map(|k| json!({"file": format!("monday/{k:04}.png")})).collect();
                for key in ["video", "poses", "intrinsics"] {
                    r.as_object_mut().expect("an object").remove(key);
                }
            });
            fs::remove_file(data.join("videos/monday/0033.png")).expect("gone");
        },
        "/faults/missing_images",
        1,
        2,
        "0033.png: missing",
    );

    // Nothing is left.
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    lab(dir);
    fs::remove_dir_all(dir.join("data/videos/monday")).expect("gone");
    fs::write(dir.join("data/videos/house.mcap"), b"not a bag at all").expect("a file");
    configure(dir, &format!("{}{CLIPS}", *TRAIN));
    let out = go(dir, "run", &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("nothing to train on"), "{}", text(&out.stderr));
    // No dataset, no path, a setting that does not exist.
    let check = |data: &str, words: &str| {
        configure(dir, &format!("{}{data}", *TRAIN));
        let out = go(dir, "run", &[]);
        assert_eq!(out.status.code(), Some(1));
        let said = text(&out.stderr);
        assert!(said.contains(words) && said.lines().count() == 1, "{words}: {said}");
    };
    check("[data]\nkind = \"clips\"\npath = \"nowhere\"\n", "nowhere/dataset.json");
    check("[data]\nkind = \"clips\"\n", "data.path");
    check("[data]\nkind = \"videos\"\n", "train.toml: line 37: unknown variant `videos`");
    check(&format!("{CLIPS}house = 1.5\n"), "data.house = 1.5");
}
