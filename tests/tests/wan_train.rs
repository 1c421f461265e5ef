//! A small complete member of the large family, made from nothing: its video autoencoder is trained, rooms are encoded once,
//! its transformer is trained on them, it is exported, and the runtime imagines a drive in a room that it was trained on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mindseye::config::RobotConfig;
use mindseye::imagine::NoClock;
use mindseye::mind::Pipeline;
use mindseye::replay::{Replay, replay};
use mindseye::topics::Wanted;
use mindseye_base::picture::save_png;
use mindseye_bridge::goal::Goal;
use mindseye_tools::replayable::{self, BagArgs};
use mindseye_tools::ship::ship_fine_tune;
use mindseye_tools::train::{TrainArgs, run};
use mindseye_train::finetune::FineTuneConfig;
use mindseye_train::task::TaskMetrics;
use mindseye_train::wan::{FootageSource, WanModel};
use mindseye_world::{Camera, Difficulty};
use serde_json::json;

/// Pictures of 32 x 16 pixels, latents of 4 x 2.
const MODEL: &str = r#"
name = "wan-trained"
[dit]
in_channels = 8
out_channels = 8
latent_height = 2
latent_width = 4
patch = [1, 1]
heads = 4
head_dim = 16
layers = 3
ffn_dim = 128
text_dim = 16
text_len = 32
freq_dim = 32
eps = 1e-6
rope_theta = 10000.0
prediction = "velocity"
camera_channels = 24
[vae]
base_dim = 8
decoder_base_dim = 8
z_dim = 8
dim_mult = [1, 2, 2]
num_res_blocks = 1
temporal_downsample = [true, true]
patch_size = 2
latents_mean = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
latents_std = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
[umt5]
vocab_size = 512
d_model = 16
d_kv = 8
d_ff = 24
num_layers = 1
num_heads = 2
buckets = 32
max_distance = 128
eps = 1e-6
[layout]
context_latents = 4
motion_latents = 3
box_latents = 1
gap = 50
[sampler]
grid = "plain"
solver = "euler"
shift = 3.0
steps = 8
guidance = 1.0
[text]
prompt = "{}"
[bounding_box]
score_min = 0.2
"#;

const AUTOENCODER: &str = r#"
model = "model.toml"
steps = 500
batch = 2
[autoencoder]
difficulty = "plain"
rooms = 2
latents = 3
kl = 1e-4
[course]
seed = 5
workers = 2
warmup = 20
decay_from = 300
ema = 0.98
checkpoint_every = 100
log_every = 50
[optim]
lr = 4e-3
weight_decay = 0.0
momentum = 0.95
betas = [0.9, 0.99]
clip = 1.0
muon = false
"#;

const FINE_TUNE: &str = r#"
model = "model.toml"
steps = 500
batch = 4
only = []
[finetune]
context_latents = 4
target_latents = 4
box_latents = 1
[course]
seed = 6
workers = 2
warmup = 20
decay_from = 300
ema = 0.98
checkpoint_every = 100
log_every = 50
[latents]
autoencoder = "autoencoder"
tokenizer = "tiny.model"
difficulty = "plain"
samples = 2
per_shard = 1
recorded_latents = 4
drop = 0.1
high_noise = 0.2
shift = 3.0
[optim]
lr = 3e-3
weight_decay = 0.01
momentum = 0.95
betas = [0.9, 0.99]
clip = 1.0
muon = true
"#;

fn configure(dir: &Path, short: bool) {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/golden/set1/tokenizer/tiny.model");
    std::fs::copy(tokenizer, dir.join("tiny.model")).unwrap();
    for (name, text) in [("model", MODEL), ("autoencoder", AUTOENCODER), ("fine_tune", FINE_TUNE)] {
        let text = if short {
            text.replace("steps = 500", "steps = 4").replace("log_every = 50", "log_every = 1")
        } else {
            text.to_owned()
        };
        std::fs::write(dir.join(format!("{name}.toml")), text).unwrap();
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

#[test]
#[ignore = "trains an autoencoder and a denoiser: about ten minutes of one core"]
fn a_small_complete_model_imagines_a_room_that_it_was_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    configure(dir, false);
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

#[test]
fn latents_of_another_autoencoder_and_changed_shards_are_refused_and_runs_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    configure(dir, true);
    let refused = |config: &str| format!("{:#}", run(&arguments(dir, config, "run")).unwrap_err());
    assert!(refused("fine_tune").contains("autoencoder/checkpoint.safetensors: No such file"));
    run(&arguments(dir, "autoencoder", "autoencoder")).unwrap();
    // Stopped and gone on: the same run.
    run(&TrainArgs { until: Some(2), ..arguments(dir, "autoencoder", "stopped") }).unwrap();
    run(&arguments(dir, "autoencoder", "stopped")).unwrap();
    assert_eq!(metrics(&dir.join("stopped")), metrics(&dir.join("autoencoder")));
    run(&arguments(dir, "fine_tune", "run")).unwrap();
    let lines = metrics(&dir.join("run"));
    assert_eq!((lines.len(), lines.iter().map(|l| l.step).collect::<HashSet<_>>().len()), (4, 4));
    run(&TrainArgs { until: Some(3), ..arguments(dir, "fine_tune", "stopped_run") }).unwrap();
    run(&arguments(dir, "fine_tune", "stopped_run")).unwrap();
    assert_eq!(metrics(&dir.join("stopped_run")), lines);

    let shard = dir.join("run/latents/00001.safetensors");
    let good = std::fs::read(&shard).unwrap();
    let mut bad = good.clone();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    std::fs::write(&shard, bad).unwrap();
    assert!(refused("fine_tune").contains("00001.safetensors: its SHA-256 is"));
    std::fs::write(&shard, good).unwrap();
    let other = AUTOENCODER.replace("steps = 500", "steps = 4").replace("seed = 5", "seed = 7");
    std::fs::write(dir.join("autoencoder.toml"), other).unwrap();
    std::fs::remove_dir_all(dir.join("autoencoder")).unwrap();
    run(&arguments(dir, "autoencoder", "autoencoder")).unwrap();
    assert!(refused("fine_tune").contains("latents of another autoencoder"));
    // What is only a plan says so.
    let plan = FINE_TUNE.split("[course]").next().unwrap().to_owned()
        + FINE_TUNE.split_at(FINE_TUNE.find("[optim]").unwrap()).1;
    std::fs::write(dir.join("fine_tune.toml"), plan).unwrap();
    assert!(refused("fine_tune").contains("it can only be planned (--plan)"));
}
