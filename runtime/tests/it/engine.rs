//! `mindseye engine` on the bundle of the repository, as a deployment engineer uses it: processes and documents.
//!
//! Real engines need TensorRT-RTX (see `tests/tests/engine_build.rs` in the repository on how to get it): where it is
//! missing, those tests say so on one line and are skipped.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Says on a line of its own, which the test program does not hold back, that a test is skipped and why.
macro_rules! skipped {
    ($($why:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}", format_args!($($why)*));
    }};
}

fn bundle() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny")
}

fn engine(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mindseye"));
    command.arg("engine").args(args).env_remove("MINDSEYE_BUNDLE");
    // What is measured is kept there, not in the home of whoever runs the tests.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

fn document(args: &[&str]) -> Value {
    let output = engine(args).arg("--json").output().unwrap();
    let (out, err) = texts(&output);
    assert!(output.status.success(), "{args:?}: {out} {err}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out} {err}"))
}

fn refused(args: &[&str], want: &str) {
    let output = engine(args).output().unwrap();
    let (out, err) = texts(&output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {out} {err}");
    let last = err.trim().lines().last().unwrap_or_default();
    assert!(last.starts_with("mindseye: ") && last.contains(want), "{args:?}: wanted {want:?}: {err}");
}

/// The folder of TensorRT-RTX, or a line that says why not.
fn rtx() -> Option<PathBuf> {
    let folder = std::env::var_os("MINDSEYE_TENSORRT_LIB_DIR").filter(|v| !v.is_empty()).map(PathBuf::from);
    let found = folder.filter(|f| f.join("libtensorrt_rtx.so.1").is_file());
    if found.is_none() {
        skipped!("MINDSEYE_TENSORRT_LIB_DIR does not name a folder with libtensorrt_rtx.so.1");
    }
    found
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Every precision that the A100 has, and FP8 for the L4, from the shipped bundle.
#[test]
fn rtx_builds_the_shipped_bundle() {
    let Some(lib) = rtx() else { return };
    let folder = tempfile::tempdir().unwrap();
    let bundle = bundle();
    let hash = mindseye_base::file::sha256_of_file(&bundle.join("bundle.toml")).unwrap();
    let mut denoisers = std::collections::BTreeMap::new();
    for (target, cc, precision) in [
        ("a100", "8.0", "fp16"),
        ("a100", "8.0", "bf16"),
        ("a100", "8.0", "int8"),
        ("a100", "8.0", "int4w"),
        ("l4", "8.9", "fp8"),
    ] {
        let out = folder.path().join(format!("{target}-{precision}"));
        let started = Instant::now();
        let built = document(&[
            "build",
            text(&bundle),
            "--target",
            target,
            "--precision",
            precision,
            "--out",
            text(&out),
            "--lib",
            text(&lib),
            "--calibration-items",
            "8",
            "--verify-items",
            "4",
        ]);
        let seconds = started.elapsed().as_secs_f64();
        let engines = built["engines"].as_array().unwrap();
        let names: Vec<&str> = engines.iter().map(|e| e["passport"]["component"].as_str().unwrap()).collect();
        assert_eq!(names, PARTS);
        let mut total = 0.0;
        for e in engines {
            let (p, file) = (&e["passport"], PathBuf::from(e["file"].as_str().unwrap()));
            let name = p["component"].as_str().unwrap();
            let bytes = std::fs::read(&file).unwrap();
            assert_eq!(&bytes[..4], b"vtrt", "{target} {precision} {name}: TensorRT-RTX's magic");
            assert_eq!(number(&p["engine_bytes"]) as usize, bytes.len());
            assert_eq!(p["engine_sha256"], mindseye_base::file::sha256(&bytes));
            assert_eq!(p["bundle_sha256"], hash.as_str());
            assert_eq!((&p["target"], &p["compute_capability"]), (&target.into(), &cc.into()));
            assert_eq!(p["library"], "tensorrt-rtx");
            assert!(p["library_version"].as_str().unwrap().starts_with("1.7."));
            let took = number(&p["build_seconds"]);
            assert!(took > 0.0 && took < seconds, "{took} of {seconds}");
            let quantised = name == "denoiser" && !["fp16", "bf16"].contains(&precision);
            let float = if precision == "bf16" { "bf16" } else { "fp16" };
            assert_eq!(p["precision"], if quantised { precision } else { float }, "{name}");
            assert_eq!(p["scales_sha256"].is_string(), quantised, "{name}");
            assert_eq!(p["calibration_sha256"].is_string(), quantised && precision != "int4w", "{name}");
            if quantised {
                let error = number(&p["verification"]["outputs"]["sample"]);
                let limit = [("int8", 0.05), ("fp8", 0.1), ("int4w", 0.15)].iter().find(|l| l.0 == precision);
                let limit = limit.unwrap().1;
                assert!(error > 0.0 && error < limit, "{precision}: {error}");
                assert!(!p["kept_high"].as_array().unwrap().is_empty());
            }
            if name == "denoiser" {
                denoisers.insert(format!("{target} {precision}"), bytes.len());
            }
            total += bytes.len() as f64;
        }
        println!("{target} {precision}: {seconds:.1} s, {:.2} MB", total / 1e6);
        // Kernels are compiled in; the weights of the bundle are 15 MB in 32 bits.
        assert!((2e6..60e6).contains(&total), "{total}");
        let settings: Value =
            serde_json::from_slice(&std::fs::read(out.join("build.json")).unwrap()).unwrap();
        let calibrated = !["fp16", "bf16"].contains(&precision);
        assert_eq!(settings["calibration"], if calibrated { "scenes" } else { "noise" });
    }
    println!("denoisers: {denoisers:?}");
    for small in ["a100 int8", "a100 int4w"] {
        assert!(denoisers[small] < denoisers["a100 fp16"], "{denoisers:?}");
    }

    // Passports are shown; engines run nowhere here, and the reason is told.
    let out = folder.path().join("a100-int8");
    let shown = document(&["inspect", text(&out)]);
    assert_eq!(shown["engines"].as_array().unwrap().len(), 5);
    let mut demo = Command::new(env!("CARGO_BIN_EXE_mindseye"));
    let demo = demo.args(["replay", "none.mcap", "--bundle", text(&bundle), "--engines", text(&out)]);
    let output = demo.env("MINDSEYE_TENSORRT_LIB_DIR", &lib).output().unwrap();
    if output.status.code() == Some(1) && !Path::new("/dev/nvidia0").exists() {
        let (_, err) = texts(&output);
        assert!(err.contains("tensorrt") && err.contains("driver"), "{err}");
    }
}

/// The 5B model's plans against the cost model that was worked out for it by hand and with torch's counter: seconds at
/// peak for 50 steps of two branches, and bytes.
#[test]
fn plans_of_the_large_model_agree_with_its_cost_model() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/models/wan22-5b.toml");
    let close = |got: f64, want: f64, what: &str| {
        assert!((got / want - 1.0).abs() < 0.05, "{what}: {got} against {want}");
    };
    for (target, precision, seconds, weights) in [
        ("a100", "bf16", 61.0, 10.0e9),
        ("h200", "bf16", 19.2, 10.0e9),
        ("orin-agx", "fp16", 447.0, 10.0e9),
        ("orin-agx", "int8", 223.0, 5.0e9),
    ] {
        let plan = document(&["plan", text(&model), "--target", target, "--precision", precision]);
        assert!(plan["refusal"].is_null());
        let components = plan["plan"]["components"].as_array().unwrap();
        let part = |name: &str| components.iter().find(|c| c["name"] == name).unwrap();
        let denoiser = part("denoiser");
        let at_peak = number(&denoiser["seconds_all_at_rate"]) * number(&denoiser["calls"]);
        close(at_peak, seconds, &format!("{target} {precision} seconds"));
        close(number(&denoiser["teraflop"]), 189.9, "TFLOP of one pass");
        if precision != "int8" {
            close(number(&denoiser["weight_bytes"]), weights, "weights");
            close(number(&part("text_encoder")["weight_bytes"]), 11.4e9, "text encoder");
        } else {
            // Two of 30 blocks stay in 16 bits.
            let kept = weights * 2.0 / 30.0;
            close(number(&denoiser["weight_bytes"]), weights + kept, "weights");
        }
        close(number(&part("vae_encoder_next")["teraflop"]), 1.49, "encoder");
        close(number(&part("vae_decoder_next")["teraflop"]), 7.84, "decoder");
    }
    let args = ["plan", text(&model), "--target", "orin-nano", "--precision", "bf16"];
    refused(&args, "does not fit orin-nano: weights ");
    refused(&args, "6.50 GB usable");
}

/// Steps, guidance, candidates, sizes and the kind of context change the numbers of calls and their sizes.
#[test]
fn a_plan_takes_how_the_model_is_run() {
    let house = bundle();
    let denoiser = |more: &[&str]| {
        let plan =
            document(&[&["plan", text(&house), "--target", "a100", "--precision", "fp16"], more].concat());
        let components = plan["plan"]["components"].as_array().unwrap().clone();
        let calls = |name: &str| components.iter().find(|c| c["name"] == name).map(|c| number(&c["calls"]));
        let unit = components.iter().find(|c| c["name"] == "denoiser").map(|c| c["unit"].clone());
        (calls("denoiser"), calls("denoiser_prefill"), calls("denoiser_cached"), unit)
    };
    // Six steps of two branches of four candidates, and a first opinion of each.
    let (calls, _, _, unit) = denoiser(&[]);
    assert_eq!(calls, Some(52.0));
    assert_eq!(
        unit.unwrap(),
        "12 + 6 latents",
        "the most that the bundle allows, as in the engines' profiles"
    );
    let (calls, _, _, unit) = denoiser(&[
        "--steps",
        "3",
        "--guidance",
        "1",
        "--candidates",
        "2",
        "--context",
        "5",
        "--targets",
        "4",
    ]);
    assert_eq!((calls, unit.unwrap()), (Some(8.0), "5 + 4 latents".into()));
    // The context's keys and values, and those of the noise that each candidate puts in its place.
    let (joint, prefill, cached, _) = denoiser(&["--cached"]);
    assert_eq!((joint, prefill, cached), (None, Some(5.0), Some(52.0)));
}

#[test]
fn plans_are_compared_in_one_table_and_say_what_would_fit() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/models/wan22-5b.toml");
    let plans = document(&["plan", text(&model), "--compare"]);
    let plans = plans["plans"].as_array().unwrap();
    let targets = mindseye_engines::target::Target::all();
    assert_eq!(plans.len(), targets.iter().map(|t| 2 * t.precisions.len()).sum::<usize>());
    let output = engine(&["plan", text(&model), "--compare", "--target", "orin-agx"]).output().unwrap();
    let (table, err) = texts(&output);
    assert!(output.status.success(), "{err}");
    assert!(
        table.contains("| orin-agx | int8 | cached |")
            && table.contains("context joint: int8, --keep-loaded all"),
        "{table}"
    );
    let large = ["plan", text(&model), "--target", "a100-40", "--precision", "bf16", "--keep-loaded", "all"];
    let large = [&large[..], &["--context", "4000"]].concat();
    refused(&large, "what would fit: ");
    refused(&large, "--context ");
}

/// An engine that is empty, changed or without a passport is no engine.
#[test]
fn what_is_not_whole_is_said_by_inspect() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, out) = (bundle(), folder.path().join("engines"));
    document(&["build", text(&bundle), "--target", "cpu", "--precision", "fp32", "--out", text(&out)]);
    let shown = document(&["inspect", text(&out)]);
    assert!(shown["engines"].as_array().unwrap().iter().all(|e| e["problem"].is_null()));
    let encoder = out.join("vae_encoder.onnx");
    let whole = std::fs::read(&encoder).unwrap();
    std::fs::write(&encoder, b"").unwrap();
    refused(&["inspect", text(&out)], "vae_encoder.onnx is empty");
    std::fs::write(&encoder, &whole[1..]).unwrap();
    refused(&["inspect", text(&out)], "engine_sha256 is");
    std::fs::write(&encoder, whole).unwrap();
    std::fs::remove_file(out.join("vae_encoder.onnx.passport.json")).unwrap();
    for command in ["inspect", "verify"] {
        refused(&[command, text(&out)], "vae_encoder.onnx has no passport");
    }
}

#[test]
fn what_cannot_be_built_is_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, out) = (bundle(), folder.path().join("engines"));
    let build = |target: &str, precision: &str, more: &[&str], want: &str| {
        let mut args =
            vec!["build", text(&bundle), "--target", target, "--precision", precision, "--out", text(&out)];
        args.extend(more);
        refused(&args, want);
        assert!(!out.exists(), "{target} {precision}");
    };
    for target in ["a100", "orin-agx", "orin-nx", "orin-nano"] {
        build(target, "fp8", &[], "compute capability 8.9");
        build(target, "fp8", &[], "--precision int8");
    }
    build("moon", "int8", &[], "unknown target \"moon\"");
    build("a100", "int3", &[], "unknown precision");
    build("a100", "int8", &["--lib", "/nowhere"], "no TensorRT library found");
    build("cpu", "int8", &["--calibrator", "guess"], "--calibrator guess");
    build(
        "cpu",
        "int8",
        &["--context", "99"],
        "99 context latents are outside the bundle's limits (1 to 12)",
    );
    build("cpu", "int8", &["--calibrate-with", "/nowhere.mcap"], "--calibration-goal");
    let bag = ["--calibrate-with", "/nowhere.mcap", "--calibration-goal", "find the red chair"];
    build("cpu", "int8", &bag, "/nowhere.mcap");
    build("cpu", "int8", &["--keep", "blocks"], "no layer is left to quantise");
    if let Some(lib) = rtx() {
        for precision in ["fp16", "int8"] {
            let want = "does not know orin-agx (compute capability 8.7)";
            build("orin-agx", precision, &["--lib", text(&lib)], want);
        }
        build("h100", "int8", &["--lib", text(&lib)], "TensorRT 10.0 or 11.0");
    }
    refused(&["verify", "/nowhere"], "/nowhere");
    refused(&["plan", "/nowhere", "--target", "a100"], "/nowhere");
    std::fs::create_dir(&out).unwrap();
    refused(&["inspect", text(&out)], "holds no engines");
}

/// Quantised for the CPU with rendered scenes, verified with the task, run in place of the bundle's graph.
#[test]
fn int8_of_the_shipped_bundle_is_verified_by_numbers_and_by_the_task() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, out) = (bundle(), folder.path().join("cpu"));
    document(&["build", text(&bundle), "--target", "cpu", "--precision", "int8", "--out", text(&out)]);
    let verified = document(&["verify", text(&out), "--task", "--task-houses", "8"]);
    let v = &verified["verified"][0];
    let (with, without) =
        (number(&v["report"]["outputs"]["sample"]), number(&v["without_smoothing"]["outputs"]["sample"]));
    println!("int8 `sample`, relative L2: {with:.5} with SmoothQuant, {without:.5} without");
    assert!(with < 5e-2, "{with}");
    assert!(with < without, "SmoothQuant lowers the error: {with} against {without}");
    let task = &v["report"]["task"];
    println!("task: {task}");
    assert_eq!((&task["fp32"]["scenes"], &task["quantised"]["scenes"]), (&8.into(), &8.into()));
    let (before, after) = (number(&task["fp32"]["success"]), number(&task["quantised"]["success"]));
    assert!(before >= 0.5, "the shipped model succeeds in most houses, not in {before}");
    assert!((before - after).abs() <= 0.25 + 1e-9, "{before} -> {after}");
    assert!(number(&task["quantised"]["consistency"]) > 0.0);
    // People see the same figures.
    let output = engine(&["verify", text(&out), "--task", "--task-houses", "1"]).output().unwrap();
    let (shown, err) = texts(&output);
    for want in ["sample: relative L2", "(without SmoothQuant", "task in 1 houses: success", "consistency"] {
        assert!(shown.contains(want), "{want}: {shown} {err}");
    }

    // The quantised graph in place of the bundle's, on the same bag.
    let bag = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/runtime/house.mcap");
    let replay = |engines: &[&str]| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mindseye"));
        command.args(["replay", text(&bag), "--goal", "find the red chair", "--json", "--candidates", "1"]);
        command.args(["--bundle", text(&bundle)]).args(engines);
        let output = command.output().unwrap();
        let (out, err) = texts(&output);
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}"))
    };
    let (fp32, int8) = (replay(&[]), replay(&["--engines", text(&out)]));
    assert_eq!(fp32["answer"]["status"], int8["answer"]["status"]);
    assert_ne!(fp32["answer"]["engine_sha256"], int8["answer"]["engine_sha256"]);
    let timed = document(&["bench", text(&out), "--runs", "3"]);
    let timed = timed["engines"].as_array().unwrap();
    assert_eq!(timed.iter().map(|e| e["component"].as_str().unwrap()).collect::<Vec<_>>(), PARTS);
    for part in timed {
        assert!(number(&part["to_fp32"]) > 0.0 && number(&part["millis_p50"]) > 0.0, "{part}");
    }

    // A passport that was changed by hand is refused wherever the engine is used, with the field.
    let passport = out.join("denoiser.onnx.passport.json");
    let written = std::fs::read_to_string(&passport).unwrap();
    std::fs::write(&passport, written.replacen("\"target\": \"cpu\"", "\"target\": \"a100\"", 1)).unwrap();
    refused(&["verify", text(&out)], "passport_sha256");
    refused(&["inspect", text(&out)], "passport_sha256");
}

/// FP8 and 4-bit weights by their emulation on the CPU, with the task.
#[test]
fn fp8_and_int4w_are_emulated_and_verified_the_same_way() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = bundle();
    for (precision, limit) in [("fp8", 0.1), ("int4w", 0.15)] {
        let out = folder.path().join(precision);
        let args = ["build", text(&bundle), "--target", "l4", "--precision", precision, "--out", text(&out)];
        document(&[&args[..], &["--graphs-only", "--calibration-items", "8"]].concat());
        let verified = document(&["verify", text(&out), "--task", "--task-houses", "3"]);
        let v = &verified["verified"][0];
        assert_eq!(v["precision"], precision);
        let error = number(&v["report"]["outputs"]["sample"]);
        let task = &v["report"]["task"];
        println!("{precision} `sample`: relative L2 {error:.5}; task: {task}");
        assert!(error > 0.0 && error < limit, "{precision}: {error}");
        assert_eq!(task["quantised"]["scenes"], 3);
    }
}

/// The parts of the shipped bundle that are graphs.
const PARTS: [&str; 5] = ["denoiser", "depth", "text_encoder", "vae_decoder", "vae_encoder"];

/// Sizes that are asked for are those of the calibration inputs, and people are told what they are.
#[test]
fn calibration_inputs_have_the_sizes_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, out) = (bundle(), folder.path().join("cpu"));
    let args = ["build", text(&bundle), "--target", "cpu", "--precision", "int8", "--out", text(&out)];
    let sizes =
        ["--calibrate-with", "noise", "--context", "2", "--targets", "2", "--calibration-items", "16"];
    let output = engine(&[&args[..], &sizes, &["--verify-items", "1"]].concat()).output().unwrap();
    let (shown, err) = texts(&output);
    assert!(output.status.success(), "{err}");
    let want = "in int8 for cpu, calibrated with synthetic noise, 16 items of 2 + 2 latents, seed 1";
    assert!(shown.contains(want), "{shown}");
    let little = [&args[..], &["--calibrate-with", "scenes", "--calibration-memory", "0.01"]].concat();
    refused(&little, "allow more with --calibration-memory");
}

/// Every part in every precision is compared with fp32.
#[test]
fn verify_reports_every_part_in_every_precision() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = bundle();
    for precision in ["fp16", "bf16", "int8", "int4w", "fp8"] {
        let out = folder.path().join(precision);
        let args = ["build", text(&bundle), "--target", "l4", "--precision", precision, "--out", text(&out)];
        document(
            &[&args[..], &["--graphs-only", "--calibration-items", "16", "--verify-items", "4"]].concat(),
        );
        let verified = document(&["verify", text(&out), "--layers"]);
        let all = verified["verified"].as_array().unwrap();
        assert_eq!(all.iter().map(|v| v["component"].as_str().unwrap()).collect::<Vec<_>>(), PARTS);
        for v in all {
            let outputs = v["report"]["outputs"].as_object().unwrap();
            assert!(!outputs.is_empty(), "{precision}: {v}");
            for (name, error) in outputs {
                assert!(number(error) > 0.0 && number(error) < 0.2, "{precision} {name}: {error}");
            }
            assert!(!v["layers"].as_array().unwrap().is_empty() || v["component"] != "denoiser", "{v}");
        }
    }
}

/// A copy of the shipped bundle whose part `component` has one weight that is not a number: its name.
fn poison(to: &Path, component: &str) -> String {
    use mindseye_engines::onnx::{DataType, Initializer, Model, SaveOptions};
    std::fs::create_dir(to).unwrap();
    for file in std::fs::read_dir(bundle()).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
    let file = to.join(format!("{component}.onnx"));
    let before = std::fs::read(&file).unwrap();
    let mut model = Model::load(&file).unwrap();
    let weights = model.graph.initializers.iter_mut();
    let weight = weights.filter(|i| i.dtype == DataType::F32).max_by_key(|i| i.elements()).unwrap();
    let mut values = weight.to_f32().unwrap();
    *values.last_mut().unwrap() = f32::NAN;
    let name = weight.name.clone();
    let origin = weight.origin.take();
    *weight = Initializer { origin, ..Initializer::from_f32(&name, &weight.shape.clone(), &values) };
    model.save(&file, &SaveOptions::default()).unwrap();
    let after = std::fs::read(&file).unwrap();
    let manifest = to.join("bundle.toml");
    let stated = |bytes: &[u8]| {
        format!("bytes = {}\nsha256 = \"{}\"", bytes.len(), mindseye_base::file::sha256(bytes))
    };
    let text = std::fs::read_to_string(&manifest).unwrap();
    assert!(text.contains(&stated(&before)), "{component}");
    std::fs::write(&manifest, text.replace(&stated(&before), &stated(&after))).unwrap();
    name
}

#[test]
fn a_weight_that_is_no_number_is_refused_by_name_in_every_part() {
    let folder = tempfile::tempdir().unwrap();
    for component in PARTS {
        let (broken, out) = (folder.path().join(component), folder.path().join("engines"));
        let weight = poison(&broken, component);
        for precision in ["fp16", "int8"] {
            let args =
                ["build", text(&broken), "--target", "l4", "--precision", precision, "--out", text(&out)];
            let noise = ["--graphs-only", "--calibrate-with", "noise", "--calibration-items", "1"];
            let args = [&args[..], &noise, &["--verify-items", "1"]].concat();
            refused(&args, &format!("{component}: weight {weight:?} is NaN or infinite"));
            assert!(!out.exists());
        }
    }
}

/// Calibration with what a robot recorded.
#[test]
fn a_bag_calibrates() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, out) = (bundle(), folder.path().join("cpu"));
    let bag = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/runtime/house.mcap");
    let args = ["build", text(&bundle), "--target", "cpu", "--precision", "int8", "--out", text(&out)];
    let with = ["--calibrate-with", text(&bag), "--calibration-goal", "find the red chair"];
    let built = document(&[&args[..], &with, &["--calibration-items", "4", "--verify-items", "2"]].concat());
    let described = built["engines"][0]["calibration"].as_str().unwrap();
    assert!(described.contains("house.mcap"), "{described}");
    let verified = document(&["verify", text(&out)]);
    assert!(number(&verified["verified"][0]["report"]["outputs"]["sample"]) < 5e-2);
    refused(&["verify", text(&out), "--bag", "/nowhere.mcap"], "/nowhere.mcap");
}

/// Ctrl-C during a build: soon, with exit status 1, and nothing is left behind.
#[test]
fn ctrl_c_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, out, scratch) = (bundle(), folder.path().join("engines"), folder.path().join("scratch"));
    std::fs::create_dir(&scratch).unwrap();
    let args = ["build", text(&bundle), "--target", "cpu", "--precision", "int8", "--out", text(&out)];
    let mut child = engine(&args)
        .args(["--calibration-items", "100000"])
        .env("TMPDIR", &scratch)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    // Wait for the calibration to begin: its inputs are kept in the temporary folder.
    while std::fs::read_dir(&scratch).unwrap().count() < 2 && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(500));
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let asked = Instant::now();
    let status = child.wait().unwrap();
    let (took, mut err) = (asked.elapsed(), String::new());
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut err).unwrap();
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains("cancelled; nothing was written"), "{err}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["scratch"], "{left:?}");
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
}

/// The demo and a bag through onnxruntime: what rten answers.
#[test]
fn onnxruntime_answers_as_rten_does() {
    if let Err(e) = mindseye_engines::backend::by_name("onnxruntime") {
        skipped!("{e}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let bag = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/runtime/house.mcap");
    let run = |backend: &str, args: &[&str]| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mindseye"));
        command.args(args).args(["--json", "--backend", backend, "--bundle", text(&bundle())]);
        command.env_remove("ROS_DOMAIN_ID").env_remove("ZENOH_CONFIG_OVERRIDE");
        let output = command.output().unwrap();
        let (out, err) = texts(&output);
        serde_json::from_str::<Value>(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}"))["answer"].clone()
    };
    let demo = ["demo", "--fast", "--out", text(folder.path())];
    let replay = ["replay", text(&bag), "--goal", "find the red chair"];
    for (name, args, tolerance) in [("replay", &replay[..], 1e-3), ("demo", &demo[..], 2e-2)] {
        let (rten, ort) = (run("rten", args), run("onnxruntime", args));
        let total = |a: &Value| number(&a["timings_ms"]["total"]);
        println!(
            "{name}: {} in {:.0} ms by rten, {:.0} ms by onnxruntime ({:.2})",
            rten["status"],
            total(&rten),
            total(&ort),
            total(&rten) / total(&ort)
        );
        assert_eq!(rten["status"], ort["status"], "{rten} {ort}");
        let (a, b) = (&rten["consistency"], &ort["consistency"]);
        assert!((number(a) - number(b)).abs() < tolerance, "{name}: consistency {a} and {b}");
        assert_eq!(rten["pose"].is_null(), ort["pose"].is_null());
        for key in ["x", "y", "yaw"].iter().filter(|_| !rten["pose"].is_null()) {
            let (a, b) = (&rten["pose"][key], &ort["pose"][key]);
            assert!((number(a) - number(b)).abs() < tolerance, "{name}: {key} {a} and {b}");
        }
        assert_ne!(rten["engine_sha256"], ort["engine_sha256"], "the answer says what ran");
    }
}
