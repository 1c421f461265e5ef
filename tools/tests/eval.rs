//! `mindseye-tools eval` from end to end with the shipped bundle.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

type Outcome = Result<(), Box<dyn Error>>;

fn eval(args: &[&str]) -> Result<Output, Box<dyn Error>> {
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny");
    Ok(Command::new(env!("CARGO_BIN_EXE_mindseye-tools"))
        .arg("eval")
        .args(args)
        .env("MINDSEYE_BUNDLE", bundle)
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .output()?)
}

fn document(args: &[&str]) -> Result<Value, Box<dyn Error>> {
    let out = eval(args)?;
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {errors}");
    Ok(serde_json::from_slice(&out.stdout)?)
}

fn value(of: &Value, pointer: &str) -> f64 {
    of.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number at {pointer} in {of}"))
}

#[test]
fn the_same_houses_give_the_same_figures() -> Outcome {
    let dir = tempfile::tempdir()?;
    let report = dir.path().join("report.html").display().to_string();
    let args = ["grounding", "--quick", "--houses", "2", "--json"];
    let (a, b) = (document(&args)?, document(&[&args[..], &["--report", &report]].concat())?);
    assert_eq!(a["rows"], b["rows"]);
    assert_eq!(a["goal_pose"], b["goal_pose"]);
    assert_eq!(a["outcomes"].as_array().map(Vec::len), Some(2));
    assert!(a["rows"]["model"]["sd_m"]["value"].is_null(), "no examiner, no SD");
    // Every house is a row that opens, with its drive, the true one and the map.
    let report = fs::read_to_string(report)?;
    assert_eq!((report.matches("<details>").count(), report.matches("<img ").count()), (2, 6));
    let goal = a["outcomes"][0]["goal"].as_str().ok_or("no goal")?;
    assert!(report.contains("<span>house 900000</span>") && report.contains(&format!("<span>{goal}</span>")));
    assert!(!report.contains("<script"));
    Ok(())
}

#[test]
fn the_shipped_model_finds_named_things_in_rooms_that_it_never_saw() -> Outcome {
    const HOUSES: usize = 6;
    let d = document(&["grounding", "--quick", "--houses", "6", "--seed", "424242", "--json"])?;
    let outcomes = d["outcomes"].as_array().ok_or("no outcomes")?;
    assert_eq!(outcomes.len(), HOUSES);
    let mut near = 0;
    for o in outcomes {
        // Whatever is given as a pose is before the thing; most things are found, and found well.
        let Some([heading, position]) = o["answer"].as_array().map(|a| [0, 1].map(|k| a[k].as_f64())) else {
            continue;
        };
        let (heading, position) = (heading.ok_or("no heading")?, position.ok_or("no position")?);
        assert!(heading < 25.0 && position < 0.6, "{heading} degrees, {position} m: {o}");
        near += usize::from(position < 0.3);
        // Where the drive ends the thing is looked at once more: the goal is here, or it is asked again.
        let off = o["looked_off_m"].as_f64().ok_or("nothing was seen at the end")?;
        assert!(off < 0.5 && (off <= 0.1 || o["reasked"] == true), "{off} m: {o}");
    }
    assert!(near >= 5, "{near} of {HOUSES} within 0.3 m");
    assert!(value(&d, "/rows/model/arrived/value") >= 0.8, "{}", d["rows"]["model"]);
    Ok(())
}

/// The drive decides: the same goals with the same memory, but other pictures in the drive.
#[test]
fn a_destroyed_drive_gives_no_pose_and_says_why() -> Outcome {
    let args = ["grounding", "--quick", "--destroyed", "--houses", "3", "--seed", "424242"];
    let d = document(&[&args[..], &["--json"]].concat())?;
    let outcomes = d["outcomes"].as_array().ok_or("no outcomes")?;
    let found = outcomes.iter().filter(|o| o["status"] == "found").count();
    assert!(found >= 2, "{found} of 3 true drives are believed");
    let mut reasons = String::new();
    for o in outcomes.iter().filter(|o| o["status"] == "found") {
        let kinds = o["destroyed"].as_object().ok_or("nothing was destroyed")?;
        assert_eq!(kinds.len(), 4);
        for (kind, answer) in kinds {
            assert_eq!(answer["status"], "inconsistent", "{kind}: {o}");
            let reason = answer["reason"].as_str().ok_or("no reason")?;
            assert!(reason.contains("the imagined drive"), "{kind}: {reason}");
            reasons += reason;
        }
    }
    assert!(reasons.contains("shows nothing") && reasons.contains("frame"), "{reasons}");
    for kind in ["zeros", "noise", "house", "end"] {
        assert_eq!(value(&d, &format!("/rows/destroyed_{kind}/found/value")), 0.0, "{kind}");
    }
    Ok(())
}

/// The model for furnished rooms, whose weights are stored as codes.
#[test]
fn furnished_tiny_finds_furniture_in_rooms_that_it_never_saw() -> Outcome {
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/furnished-tiny").display().to_string();
    let args = ["grounding", "--quick", "--houses", "5", "--seed", "424242", "--json"];
    let d = document(&[&args[..], &["--difficulty", "furnished,plain", "--bundle", &bundle]].concat())?;
    let mut given = [0, 0];
    for o in d["outcomes"].as_array().ok_or("no outcomes")? {
        if let [Some(heading), Some(position)] = [0, 1].map(|k| o["answer"][k].as_f64()) {
            assert!(heading < 25.0 && position < 0.6, "{heading} degrees, {position} m: {o}");
            given[usize::from(o["difficulty"] == "plain")] += 1;
        }
    }
    assert!(given[0] >= 2 && given[1] >= 1, "poses in furnished and in plain rooms: {given:?}");
    let parts = d["parts"].as_array().ok_or("no parts")?;
    assert!(["furnished", "plain"].iter().all(|world| parts.iter().any(|p| p["of"] == *world)), "{parts:?}");
    Ok(())
}

/// What was moved since it was seen is remembered where it was: figures hold the answer against where it is, and the look
/// where the drive ends does not confirm it.
#[test]
fn answers_of_moved_things_are_held_against_where_they_are_now() -> Outcome {
    let d = document(&["grounding", "--quick", "--moved", "--houses", "4", "--seed", "424242", "--json"])?;
    let mut given = 0;
    for o in d["outcomes"].as_array().ok_or("no outcomes")? {
        assert!(value(o, "/sights/0") > 0.0, "it was seen where it was: {o}");
        if let Some(off) = o["answer"][1].as_f64() {
            assert!(off > 0.5, "{off} m: {o}");
            assert!(o["first_arrived"] == false && o["reasked"] == true, "{o}");
            assert!(o["confirmed"] == false, "it is not there: {o}");
            given += 1;
        }
    }
    assert!(given >= 1, "none is remembered: {d}");
    Ok(())
}

#[test]
fn bad_requests_are_refused_in_one_line() -> Outcome {
    let dir = tempfile::tempdir()?;
    let nonsense = dir.path().join("lpips.onnx");
    fs::write(&nonsense, "nonsense")?;
    let nonsense = nonsense.display().to_string();
    let cases: [(&[&str], &str); 7] = [
        (&["grounding", "--houses", "0"], "--houses"),
        (&["grounding", "--difficulty", "plain,castle"], "castle"),
        (&["grounding", "--difficulty", "plain,house"], "--quick"),
        (&["navigation", "--bundle", "/nowhere"], "/nowhere"),
        (&["grounding", "--lpips", &nonsense], "lpips.onnx"),
        (&["ablation", "--minutes", "0"], "--minutes"),
        (&["compare", "/nowhere"], "/nowhere"),
    ];
    for (args, part) in cases {
        let out = eval(args)?;
        let errors = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{args:?}: {errors}");
        assert!(errors.contains(part) && errors.lines().count() == 1, "{args:?}: {errors}");
        assert!(out.stdout.is_empty(), "{args:?}");
    }
    Ok(())
}

fn accepted(of: &Value, what: &str, kind: usize) -> f64 {
    value(of, &format!("/accepted_{what}/{kind}/share/value"))
}

#[test]
fn true_renders_are_placed_by_landmarks_and_another_house_is_not() -> Outcome {
    let d = document(&["landmarks", "--houses", "1", "--json"])?;
    assert!(accepted(&d, "frames", 0) > 0.0, "{d}");
    assert!(accepted(&d, "frames", 1) == 0.0 && accepted(&d, "drives", 1) == 0.0, "another house: {d}");
    assert!(accepted(&d, "drives", 2) == 0.0, "a thing painted in: {d}");
    Ok(())
}

#[test]
#[ignore = "twenty houses: some minutes"]
fn goals_of_true_renders_in_twenty_houses() -> Outcome {
    let d = document(&["landmarks", "--houses", "20", "--json"])?;
    assert!(value(&d, "/position_m/median") <= 0.1 && value(&d, "/heading_deg/median") <= 3.0, "{d}");
    assert!(accepted(&d, "frames", 0) >= 0.9 && accepted(&d, "frames", 1) <= 0.02, "{d}");
    Ok(())
}

#[test]
#[ignore = "slow: trains the examiner, half a minute or more"]
fn controls_stand_beside_the_model() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (table, sheet) = (dir.path().join("t.md"), dir.path().join("s.png"));
    let bundle = dir.path().join("bundle");
    fs::create_dir(&bundle)?;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny"))? {
        let entry = entry?;
        fs::copy(entry.path(), bundle.join(entry.file_name()))?;
    }
    let bundle_arg = bundle.display().to_string();
    let (table_arg, sheet_arg) = (table.display().to_string(), sheet.display().to_string());
    let d = document(&[
        "grounding",
        "--houses",
        "12",
        "--examiner-houses",
        "600",
        "--json",
        "--markdown",
        &table_arg,
        "--sheet",
        &sheet_arg,
        "--store",
        &bundle_arg,
    ])?;
    let kept: toml::Table = fs::read_to_string(bundle.join("bundle.toml"))?.parse()?;
    let measured = &kept["evaluation"]["grounding"];
    let kept = &measured["figures"];
    let followed = value(&d, "/figures/instruction_followed/value");
    assert!((kept["instruction_followed"][0].as_float().unwrap_or(-1.0) - followed).abs() < 1e-3);
    assert_eq!(measured["measured_bundle"].as_str(), d["bundle"].as_str());
    // The bundle with its figures is a bundle still.
    document(&["grounding", "--quick", "--houses", "1", "--json", "--bundle", &bundle_arg])?;
    let sd = |row: &str| value(&d, &format!("/rows/{row}/sd_m/value"));
    // The instrument: true drives are near the house, those of another house are not.
    assert!(sd("truth") < 0.3, "true drives have SD {}", sd("truth"));
    assert!(sd("truth_wrong_room") > 2.0 * sd("truth"), "another house has SD {}", sd("truth_wrong_room"));
    assert!(value(&d, "/sd_tells_rooms_apart_auc/value") > 0.9);
    assert!(value(&d, "/examiner/named") > 0.8);
    assert_eq!(value(&d, "/rows/truth/instruction_followed/value"), 1.0);
    assert_eq!(value(&d, "/rows/copy_first/instruction_followed/value"), 0.0);
    assert_eq!(value(&d, "/rows/copy_first/dynamic_degree/value"), 0.0);
    let text = fs::read_to_string(&table)?;
    assert!(text.contains("IF(SD<0.2)") && text.contains("control: another house altogether"), "{text}");
    assert!(fs::metadata(&sheet)?.len() > 10_000);
    Ok(())
}

#[test]
#[ignore = "slow: five houses in all variants, a minute or more"]
fn ablations_on_five_houses_and_on_again_after_a_stop() -> Outcome {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("ablation");
    let out_arg = out.display().to_string();
    let kept = dir.path().join("examiner.safetensors").display().to_string();
    let run = |houses: &str| {
        document(&[
            "ablation",
            "--houses",
            houses,
            "--out",
            &out_arg,
            "--examiner",
            &kept,
            "--examiner-houses",
            "300",
            "--json",
        ])
    };
    let first = run("3")?;
    assert_eq!(first["houses"], 3);
    let all = run("5")?;
    assert_eq!((&all["houses"], &all["resumed_houses"]), (&Value::from(5), &Value::from(3)));
    for variant in
        ["base", "no_cfg", "no_context_cfg", "first_only", "vanilla_rope", "contiguous", "cfg_7", "context_1"]
    {
        let n = value(&all, &format!("/variants/{variant}/sd_m/n"));
        assert_eq!(n, 5.0, "{variant}");
    }
    // Any of more repeats cannot pass less often.
    let passes: Vec<f64> =
        (0..5).map(|k| value(&all, &format!("/repeats/{k}/instruction_followed/value"))).collect();
    assert!(passes.windows(2).all(|p| p[0] <= p[1]), "{passes:?}");
    let text = fs::read_to_string(out.join("ablation.md"))?;
    for part in ["Table 1", "Table 3", "Figure 8a", "Figure 13", "Figure 14", "not measured"] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
    assert!(fs::metadata(out.join("ablation.png"))?.len() > 10_000);
    // The same model twice: the same figures beside each other.
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/house-tiny").display().to_string();
    let compared = document(&[
        "compare",
        &bundle,
        &bundle,
        "--houses",
        "5",
        "--examiner",
        &kept,
        "--examiner-houses",
        "300",
        "--json",
    ])?;
    for key in ["sd_m", "instruction_followed", "psnr_db", "passes"] {
        let of = |k: usize| value(&compared, &format!("/bundles/{k}/figures/{key}/value"));
        assert_eq!(of(0), of(1), "{key}");
        assert_eq!(of(0), value(&all, &format!("/variants/base/{key}/value")), "{key}");
    }
    // The state belongs to this run.
    let refused = eval(&["ablation", "--houses", "3", "--seed", "7", "--out", &out_arg])?;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another --out"));
    Ok(())
}
