//! A small complete member of the large family, made from nothing: its video autoencoder is trained, rooms are encoded once,
//! its transformer is trained on them, it is exported, and the runtime imagines a drive in a room that it was trained on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mindseye::config::RobotConfig;
use mindseye::imagine::NoClock;
use mindseye::mind::Pipeline;
use mindseye::replay::{Replay, replay};
use mindseye::topics::Wanted;
use mindseye_base::picture::save_png;
use mindseye_bridge::goal::Goal;
use mindseye_engines::backend::{PrepareOptions, by_name};
use mindseye_engines::denoise::{Denoise, DenoiseStep};
use mindseye_engines::session_denoiser::SessionDenoiser;
use mindseye_tools::replayable::{self, BagArgs};
use mindseye_tools::retrain::denoiser_of;
use mindseye_tools::ship::ship_fine_tune;
use mindseye_tools::train::{TrainArgs, run};
use mindseye_train::eager::Params;
use mindseye_train::finetune::{FineTuneConfig, finished};
use mindseye_train::task::TaskMetrics;
use mindseye_train::wan::{FootageSource, WanModel};
use mindseye_world::{Camera, Difficulty};
use serde_json::json;

const MODEL: &str = include_str!("../data/train/wan/model.toml");
const AUTOENCODER: &str = include_str!("../data/train/wan/autoencoder.toml");
const FINE_TUNE: &str = include_str!("../data/train/wan/fine_tune.toml");
const HEADS: &str = include_str!("../data/train/wan/heads.toml");

fn write(dir: &Path, name: &str, text: &str) {
    std::fs::write(dir.join(format!("{name}.toml")), text).unwrap();
}

fn configure(dir: &Path) {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/golden/set1/tokenizer/tiny.model");
    std::fs::copy(tokenizer, dir.join("tiny.model")).unwrap();
    for (name, text) in
        [("model", MODEL), ("autoencoder", AUTOENCODER), ("fine_tune", FINE_TUNE), ("heads", HEADS)]
    {
        write(dir, name, text);
    }
}

fn arguments(dir: &Path, config: &str, out: &str) -> TrainArgs {
    TrainArgs {
        config: dir.join(format!("{config}.toml")),
        out: Some(dir.join(out)),
        plan: false,
        target: "h100".to_owned(),
        devices: 1,
        device: "eager".to_owned(),
        init: None,
        until: None,
        prepare: false,
        other_configuration: false,
        json: false,
    }
}

fn metrics(run: &Path) -> Vec<TaskMetrics> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Peak signal-to-noise ratio of pictures in [-1, 1], dB.
fn psnr(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64;
    10.0 * (4.0 / square).log10()
}

/// The recording of room 0 as a bag, every picture three times: the runtime keeps every third.
fn bag(dir: &Path, model: &WanModel) -> PathBuf {
    let [height, width] = model.image();
    let camera = Camera::new(width, height);
    let footage = FootageSource::new(model, Difficulty::plain()).footage(0, 13, 13, 4);
    let (dataset, pictures) = (dir.join("dataset"), dir.join("dataset/pictures"));
    for folder in ["pictures", "recordings", "clips"] {
        std::fs::create_dir_all(dataset.join(folder)).unwrap();
    }
    let mut frames = Vec::new();
    for (i, (planes, pose)) in
        footage.context.chunks_exact(3 * width * height).zip(&footage.poses).enumerate()
    {
        let n = width * height;
        let byte = |at: usize, c: usize| (127.5 * (planes[c * n + at] + 1.0)).round() as u8;
        let rgb: Vec<u8> = (0..n).flat_map(|at| [byte(at, 0), byte(at, 1), byte(at, 2)]).collect();
        save_png(&pictures.join(format!("{i:03}.png")), width, height, &rgb).unwrap();
        let (rotation, place) = camera.map_from_camera(*pose);
        let rows: Vec<f64> =
            (0..3).flat_map(|r| [rotation[r][0], rotation[r][1], rotation[r][2], place[r]]).collect();
        let f = camera.focal_px();
        let intrinsics = [f, f, width as f64 / 2.0 - 0.5, height as f64 / 2.0 - 0.5];
        for again in 0..3 {
            let file = format!("pictures/{i:03}.png");
            frames.push(json!({"file": file, "index": 3 * i + again, "map_from_camera": rows, "intrinsics": intrinsics}));
        }
    }
    let recording = json!({"id": "room", "up": [0.0, 0.0, 1.0], "frames": frames});
    std::fs::write(dataset.join("dataset.json"), json!({"format": 1}).to_string()).unwrap();
    std::fs::write(dataset.join("recordings/room.json"), recording.to_string()).unwrap();
    let out = dir.join("room.mcap");
    let frames = format!("0:{}:1", 3 * footage.poses.len()).parse().unwrap();
    replayable::run(&BagArgs { dataset, recording: None, frames, rate: 30.0, out: out.clone() }).unwrap();
    out
}

/// Weights that are the same in two sets, and those that are not or that the second lacks.
fn compared(a: &Params, b: &Params) -> (Vec<String>, Vec<String>) {
    let names = (0..a.len()).map(|i| a.get(i).0.to_owned());
    names.partition(|name| {
        let values = |p: &Params| p.position(name).map(|at| p.get(at).2.to_vec());
        values(a) == values(b)
    })
}

/// A checkpoint without heads gets them: trained on its frozen trunk, then with LoRA, exported; the runtime's graph gives poses.
#[test]
fn a_published_network_gets_lift_heads() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    configure(dir);
    write(dir, "autoencoder", &AUTOENCODER.replace("steps = 2000", "steps = 4"));
    write(dir, "fine_tune", &FINE_TUNE.replace("steps = 1500", "steps = 4"));
    run(&arguments(dir, "autoencoder", "autoencoder")).unwrap();
    run(&arguments(dir, "fine_tune", "plain")).unwrap();
    let bundle =
        ship_fine_tune(&dir.join("plain"), &dir.join("fine_tune.toml"), &dir.join("bundle")).unwrap();
    assert!(bundle.manifest().lift.is_none() && !bundle.manifest().dit.lift);
    let published = dir.join("plain/published");

    // A frozen trunk of noise is refused, and so is one that lacks a weight.
    let heads = |init: Option<&Path>, until| {
        run(&TrainArgs { init: init.map(Path::to_path_buf), until, ..arguments(dir, "heads", "heads") })
    };
    let said = heads(None, None).unwrap_err().to_string();
    assert!(said.contains("give --init DIR"), "{said}");
    let said = heads(Some(&dir.join("plain")), None).unwrap_err().to_string();
    assert!(said.contains("patch_embedding.weight is missing"), "{said}");

    // The heads alone, from the published weights; a bundle of graphs is the same start.
    let config = dir.join("heads.toml");
    let (heads_config, model) = FineTuneConfig::load_to_train(&config).unwrap();
    let start = denoiser_of(&published, &model.dit).unwrap();
    let from_graphs = denoiser_of(&dir.join("bundle"), &model.dit).unwrap();
    assert_eq!(compared(&start, &from_graphs).1, Vec::<String>::new(), "the same start");
    heads(Some(&published), Some(40)).unwrap();
    let after = |at: &str| finished(&dir.join(at), &heads_config, &model).unwrap();
    assert_eq!(compared(&start, &after("heads")).1, Vec::<String>::new(), "the trunk stays");
    let lines = metrics(&dir.join("heads"));
    let poses = |m: &TaskMetrics| m.losses.map(|l| l.context_pose + l.target_pose).unwrap();
    let (first, last) = (poses(&lines[0]), poses(&lines[3]));
    println!("poses: loss {first:.3} to {last:.3}");
    assert!(last < 0.7 * first, "poses: the loss went from {first} to {last}");

    // Then LoRA: merged, only matrices of attention differ.
    heads(None, None).unwrap();
    let trained = after("heads");
    let (same, others) = compared(&start, &trained);
    assert!(others.len() >= 8 * model.dit.layers && others.iter().all(|n| n.contains(".attn")), "{others:?}");
    assert!(same.iter().any(|n| n.contains("ffn")));

    let bundle = ship_fine_tune(&dir.join("heads"), &config, &dir.join("with heads")).unwrap();
    assert!(bundle.manifest().lift.is_some() && bundle.manifest().networks.camera.is_some());
    let engine =
        by_name("rten").unwrap().prepare(&bundle.path("denoiser").unwrap(), &PrepareOptions::default());
    let dit = bundle.manifest().dit.clone();
    let mut session = SessionDenoiser::new(dit.clone(), engine.unwrap().session().unwrap()).unwrap();
    let f = 9;
    let values = f * dit.in_channels * dit.latent_height * dit.latent_width;
    let step = DenoiseStep {
        latents: &(0..values).map(|i| (i as f32).sin()).collect::<Vec<_>>(),
        timesteps: &[0.0, 970.0],
        rows: &(0..f).map(|t| usize::from(t > 4)).collect::<Vec<_>>(),
        t_index: &(0..f).map(|t| t as f64).collect::<Vec<_>>(),
        text: &vec![0.1; dit.text_len * dit.text_dim],
        camera: Some(&vec![0.0; f * dit.tokens_per_frame() * dit.camera_channels]),
        guide: None,
    };
    let poses = session.denoise(&step).unwrap().pose;
    assert!(poses.len() == f && poses.iter().flatten().all(|v| v.is_finite()), "{poses:?}");
    assert!(poses.iter().flatten().any(|v| *v != 0.0), "heads say something");

    // Without poses in the data heads stay off.
    let text = HEADS.replace("shift = 3.0", "shift = 3.0\nposes = false").replace("steps = 60", "steps = 2");
    write(dir, "heads", &text.replace("trunk_from = 40", "trunk_from = 1"));
    let off = TrainArgs { init: Some(published), ..arguments(dir, "heads", "off") };
    run(&off).unwrap();
    let bundle = ship_fine_tune(&dir.join("off"), &config, &dir.join("without heads")).unwrap();
    assert!(bundle.manifest().lift.is_none() && !bundle.manifest().dit.lift);
}

#[test]
#[ignore = "trains an autoencoder and a denoiser for minutes"]
fn a_small_complete_model_imagines_a_room_that_it_was_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    configure(dir);
    let began = Instant::now();
    run(&arguments(dir, "autoencoder", "autoencoder")).unwrap();
    println!("autoencoder: {:.0} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    run(&arguments(dir, "fine_tune", "run")).unwrap();
    println!("transformer: {:.0} s", began.elapsed().as_secs_f64());
    for (name, most) in [("autoencoder", 0.3), ("run", 0.6)] {
        let lines = metrics(&dir.join(name));
        let (first, last) = (lines[0].loss, lines[lines.len() - 1].loss);
        println!("{name}: loss {first:.4} to {last:.4}");
        assert!(last < most * first, "{name}: the loss went from {first} to {last}");
    }
    let config = dir.join("fine_tune.toml");
    ship_fine_tune(&dir.join("run"), &config, &dir.join("bundle")).unwrap();
    let (_, model) = FineTuneConfig::load_to_train(&config).unwrap();
    let pipeline = Pipeline::load(&dir.join("bundle"), "rten", 1).unwrap();
    let footage = FootageSource::new(&model, Difficulty::plain()).footage(0, 13, 13, 4);
    let mut goal = Goal::text("replay", &format!("find the {}", footage.thing)).unwrap();
    goal.seed = Some(1);
    let asked = Replay {
        bag: bag(dir, &model),
        config: RobotConfig::default(),
        wanted: Wanted::default(),
        goal: Some(goal),
        at_secs: None,
        deadline: None,
    };
    let replayed = replay(&pipeline, &asked, &NoClock, &mut |_| (), &|| true).unwrap();
    println!("{:?} {:?}", replayed.counts, replayed.answer.as_ref().map(|a| (a.status, a.reason.clone())));
    let frames = replayed.grounded.unwrap().frames;
    let planes = 3 * model.image()[0] * model.image()[1];
    // The first latent is one picture, said four times.
    let imagined: Vec<f32> = frames[4..]
        .iter()
        .flat_map(|f| {
            (0..3).flat_map(|c| f.data.iter().skip(c).step_by(3).map(|v| f32::from(*v) / 127.5 - 1.0))
        })
        .collect();
    let truth = &footage.target[planes..];
    let first = &footage.target[..planes];
    let copied: Vec<f32> = first.iter().copied().cycle().take(truth.len()).collect();
    let (got, copying) = (psnr(&imagined, truth), psnr(&copied, truth));
    println!("imagined {got:.2} dB, copying the first picture {copying:.2} dB");
    assert!(got > copying + 1.0, "imagined {got:.2} dB, copying {copying:.2} dB");
}
