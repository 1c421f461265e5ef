//! The full Wan2.2 family in the runtime: a tiny checkpoint of random weights in the published layout is imported,
//! exported, and answers goals from a recording, by the path that a real one would take.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use mindseye::config::RobotConfig;
use mindseye::context::GroupEncoder;
use mindseye::ground::{Scene, ground};
use mindseye::image::RgbImage;
use mindseye::imagine::{Budget, ContextLatents, Flow, NoClock, Prompt, imagine};
use mindseye::mind::Pipeline;
use mindseye::node::{Node, NodeParts};
use mindseye::replay::{Replay, Replayed, replay};
use mindseye::topics::Wanted;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::msg::{CompressedImage, Header, Image};
use mindseye_bridge::ros::{Qos, QueuePolicy, RosConfig, RosSession};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_builder::checkpoint::Checkpoint;
use mindseye_builder::checkpoint::names::{dit_params, umt5_params, vae_params};
use mindseye_builder::onnx::CheckpointWeights;
use mindseye_builder::pipeline::{self, Settings};
use mindseye_builder::plan::{ModelSpec, Plan, PlanOptions, plan};
use mindseye_engines::backend::{PrepareOptions, Tensor, by_name, is_state};
use mindseye_engines::bundle::{Bundle, ComponentFormat};
use mindseye_engines::cuda::{CudaBackend, CudaDevice, DeviceInfo, DriverInfo, HostDevice};
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::{VaeConfig, encode_clip};
use mindseye_engines::onnx::{DataType, Dim, SaveOptions};
use mindseye_engines::passport::{FORMAT, Passport};
use mindseye_engines::residency::{Keep, SETTINGS_FILE};
use mindseye_engines::sampler::Noise;
use mindseye_engines::target::{ComputeCapability, Precision, Target};
use mindseye_engines::trt::{self, TensorRtBackend};
use mindseye_tools::export::{ExportArgs, export_graph};
use mindseye_tools::import::{ImportArgs, Part};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

#[path = "../cuda-emulator/driver.rs"]
mod emulated;

/// Pictures of 64 x 32 pixels, latents of 4 x 2.
const MODEL: &str = r#"
name = "wan-tiny"
[dit]
in_channels = 4
out_channels = 4
latent_height = 2
latent_width = 4
patch = [2, 2]
heads = 2
head_dim = 12
layers = 2
ffn_dim = 32
text_dim = 16
text_len = 96
freq_dim = 16
eps = 1e-6
rope_theta = 10000.0
prediction = "velocity"
camera_channels = 24
[vae]
base_dim = 4
decoder_base_dim = 4
z_dim = 4
dim_mult = [1, 2, 4, 4]
num_res_blocks = 1
temporal_downsample = [false, true, true]
patch_size = 2
latents_mean = [0.0, 0.1, 0.2, 0.3]
latents_std = [1.0, 1.0, 1.0, 2.0]
[umt5]
vocab_size = 512
d_model = 16
d_kv = 8
d_ff = 24
num_layers = 2
num_heads = 2
buckets = 32
max_distance = 128
eps = 1e-6
[layout]
context_latents = 8
motion_latents = 3
box_latents = 1
gap = 50
[sampler]
grid = "wan_unipc"
solver = "unipc"
shift = 5.0
steps = 4
guidance = 5.0
[text]
prompt = "The camera moves across the room. Finally, it focuses on {} in the center of the frame."
[bounding_box]
score_min = 0.2
"#;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn table(name: &str) -> toml::Value {
    toml::from_str::<toml::Table>(MODEL).unwrap()[name].clone()
}

fn vae() -> VaeConfig {
    table("vae").try_into().unwrap()
}

/// Weights that keep activations in bounds: noise over the square root of the fan-in, gains near one.
fn write_weights(path: &Path, params: &[ParamSpec], seed: u64) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (i, p) in params.iter().enumerate() {
        let from = data.len();
        let mut noise = Noise::new(seed, i as u64);
        let fan_in = p.shape[1..].iter().product::<usize>().max(1) as f32;
        let gain = p.name.ends_with("gamma") || (p.shape.len() == 1 && p.name.ends_with("weight"));
        for _ in 0..p.shape.iter().product::<usize>() {
            let value = if gain { 1.0 + 0.1 * noise.sample() } else { noise.sample() / fan_in.sqrt() };
            data.extend_from_slice(&value.to_le_bytes());
        }
        let entry = serde_json::json!({"dtype": "F32", "shape": p.shape, "data_offsets": [from, data.len()]});
        header.insert(p.name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    std::fs::write(path, file).unwrap();
}

/// One test at a time: one of them looks at the memory of the whole process.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The bundle of weights, and the bundle of graphs made from it.
struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn new(cached: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("checkpoint");
        let dit: DitConfig = table("dit").try_into().unwrap();
        let umt5: Umt5Config = table("umt5").try_into().unwrap();
        let networks = [
            ("transformer", dit_params(&dit)),
            ("vae", vae_params(&vae())),
            ("text_encoder", umt5_params(&umt5)),
        ];
        for (i, (folder, params)) in networks.iter().enumerate() {
            std::fs::create_dir_all(from.join(folder)).unwrap();
            write_weights(&from.join(folder).join("model.safetensors"), params, i as u64);
        }
        std::fs::create_dir_all(from.join("tokenizer")).unwrap();
        let tokenizer = root().join("data/golden/set1/tokenizer/tiny.model");
        std::fs::copy(tokenizer, from.join("tokenizer/spiece.model")).unwrap();
        let model = dir.path().join("model.toml");
        std::fs::write(&model, MODEL).unwrap();
        let made = Self { dir };
        mindseye_tools::import::run(ImportArgs {
            dir: from,
            out: made.weights(),
            model: Some(model),
            parts: Part::ALL.to_vec(),
            lora: None,
            lora_strength: None,
            license: "Apache-2.0".to_owned(),
            json: false,
        })
        .unwrap();
        mindseye_tools::export::run(ExportArgs {
            source: made.weights(),
            out: made.graphs(),
            model: None,
            cached,
            external: false,
            vectors: false,
        })
        .unwrap();
        made
    }

    fn weights(&self) -> PathBuf {
        self.dir.path().join("weights")
    }

    fn graphs(&self) -> PathBuf {
        self.dir.path().join("graphs")
    }

    fn pipeline(&self) -> Pipeline {
        Pipeline::load(&self.graphs(), "rten", 1).unwrap()
    }
}

fn ask(pipeline: &Pipeline, text: &str, seed: u64) -> Replayed {
    let mut goal = Goal::text("replay", text).unwrap();
    goal.seed = Some(seed);
    let asked = Replay {
        bag: root().join("data/runtime/house.mcap"),
        config: RobotConfig::default(),
        wanted: Wanted::default(),
        goal: Some(goal),
        at_secs: None,
        deadline: None,
    };
    replay(pipeline, &asked, &NoClock, &mut |_| (), &|| true).unwrap()
}

fn without_times(mut answer: Answer) -> Answer {
    answer.timings_ms.clear();
    answer
}

#[test]
fn a_checkpoint_becomes_a_bundle_that_answers() {
    let _alone = alone();
    for cached in [false, true] {
        let made = Made::new(cached);
        let pipeline = made.pipeline();
        assert!(pipeline.is_streaming() && pipeline.pieces().is_some() && pipeline.words().is_empty());
        assert_eq!(pipeline.caches_context(), cached);
        assert!(pipeline.spec().lift.is_none());

        let first = ask(&pipeline, "find the red chair", 3);
        // The first frame of the segment is a latent of its own, then groups of four.
        let latents = first.counts.latents;
        assert_eq!(latents, 1 + (first.counts.kept - 1) / 4, "{:?}", first.counts);
        let memory = &first.scene.as_ref().unwrap().memory;
        assert!(latents > 3 && memory.len() as u64 == latents);
        assert!(memory.iter().all(|m| m.latent.iter().all(|v| v.is_finite())));

        // It imagines; nothing in it can say where that is, and no pose is made up.
        let (answer, grounded) = (first.answer.unwrap(), first.grounded.unwrap());
        assert_eq!((answer.steps, answer.candidates), (4, 1));
        assert_eq!(grounded.frames.len(), 4 * 5, "the first frame, three latents of motion, one of the box");
        assert!(grounded.frames.iter().all(|f| (f.width, f.height) == (64, 32)));
        assert!(answer.pose.is_none() && answer.camera_pose.is_none() && answer.covariance.is_none());
        assert!(answer.consistency.is_none() && grounded.lifted.is_none());
        let reason = answer.reason.clone().unwrap();
        match answer.status {
            Status::Failed => {
                assert!(
                    answer.bounding_box.is_some() && reason.contains("no heads to read a pose"),
                    "{reason}"
                );
            }
            Status::NotInContext => {
                assert!(answer.bounding_box.is_none() && reason.contains("no box"), "{reason}");
            }
            other => panic!("{other}: {reason}"),
        }

        // The same again, bit for bit; another seed and another text imagine something else.
        let again = ask(&pipeline, "find the red chair", 3);
        assert_eq!(without_times(again.answer.unwrap()), without_times(answer));
        let frames = grounded.frames;
        assert!(again.grounded.unwrap().frames == frames, "the same pictures");
        assert!(ask(&pipeline, "find the red chair", 4).grounded.unwrap().frames != frames, "another seed");
        assert!(ask(&pipeline, "find the blue bed", 3).grounded.unwrap().frames != frames, "another text");

        // The projection of camera rays was not in the checkpoint. Paths are taken, and change nothing yet.
        let weights = Bundle::load(made.weights()).unwrap();
        assert!(weights.manifest().provenance.source.contains("camera_embedding begins with zeros"));
        let weights = Checkpoint::open(&weights.path("denoiser").unwrap()).unwrap();
        assert_eq!(weights.read_f32("camera_embedding.weight").unwrap(), vec![0.0; 24 * 24]);
        let mut scene = again.scene.unwrap();
        let mut mind = pipeline.mind(0).unwrap();
        let mut follow = |scene: &Scene, path: &[u8]| {
            let goal = Goal::from_json("w", path).unwrap();
            ground(mind.as_mut(), scene, &goal, &NoClock, None, &mut |_| Flow::Continue).unwrap()
        };
        let ahead = follow(&scene, br#"{"waypoints": [[1, 0, 0]]}"#);
        let reason = ahead.answer.reason.unwrap();
        assert_eq!(ahead.answer.status, Status::Failed);
        assert!(reason.contains("no heads to tell whether it went there"), "{reason}");
        assert_eq!(ahead.frames.len(), 4 * 5);
        let down = follow(&scene, br#"{"waypoints": [[0, 0.5, 0.3, 0.1, 0.5, -1]]}"#);
        assert!(down.frames == ahead.frames);
        scene.intrinsics = None;
        let reason = follow(&scene, br#"{"waypoints": [[1, 0, 0]]}"#).answer.reason.unwrap();
        assert!(reason.contains("focal length is not known"), "{reason}");
        scene.base_from_camera = None;
        let reason = follow(&scene, br#"{"waypoints": [[1, 0, 0]]}"#).answer.reason.unwrap();
        assert!(reason.contains("mounting is not known"), "{reason}");
    }
}

/// One weight that is not a number, in each part in turn: the import names it.
#[test]
fn imports_refuse_a_weight_that_is_no_number_in_every_part() {
    let dit: DitConfig = table("dit").try_into().unwrap();
    let umt5: Umt5Config = table("umt5").try_into().unwrap();
    let parts: [(Part, &str, Vec<ParamSpec>); 3] = [
        (Part::Denoiser, "transformer", dit_params(&dit)),
        (Part::Vae, "vae", vae_params(&vae())),
        (Part::TextEncoder, "text_encoder", umt5_params(&umt5)),
    ];
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.toml");
    std::fs::write(&model, MODEL).unwrap();
    for (part, folder, params) in parts {
        let from = dir.path().join(folder);
        std::fs::create_dir_all(from.join(folder)).unwrap();
        let file = from.join(folder).join("model.safetensors");
        write_weights(&file, &params, 1);
        // The last value of the file belongs to the last weight.
        let mut bytes = std::fs::read(&file).unwrap();
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        let out = dir.path().join("out");
        let error = mindseye_tools::import::run(ImportArgs {
            dir: from,
            out: out.clone(),
            model: Some(model.clone()),
            parts: vec![part],
            lora: None,
            lora_strength: None,
            license: "Apache-2.0".to_owned(),
            json: false,
        });
        let text = format!("{:#}", error.unwrap_err());
        let name = &params.last().unwrap().name;
        assert!(text.contains(name.as_str()) && text.contains("NaN"), "{folder}: {name}: {text}");
        assert!(!out.exists(), "{folder}");
    }
}

#[test]
fn weights_are_refused_with_the_way_on() {
    let _alone = alone();
    let made = Made::new(false);
    let error = Pipeline::load(&made.weights(), "rten", 1).err().unwrap().to_string();
    assert!(error.contains("mindseye-tools export") && !error.contains('\n'), "{error}");
}

fn picture(seed: u64) -> RgbImage {
    let mut noise = Noise::new(seed, 0);
    let shade = (0..64 * 32 * 3).map(|_| (127.5 + 60.0 * noise.sample()).clamp(0.0, 255.0) as u8).collect();
    RgbImage::from_rgb(64, 32, shade).unwrap()
}

/// Pushes frames through an encoder as the intake does.
fn stream(encoder: &mut dyn GroupEncoder, frames: &[RgbImage]) -> Vec<Vec<f32>> {
    let mut latents = Vec::new();
    let mut rest = frames;
    while rest.len() >= encoder.group_len() {
        let (group, after) = rest.split_at(encoder.group_len());
        let mut latent = vec![0.0; encoder.latent_len()];
        encoder.encode_group(group, &mut latent).unwrap();
        latents.push(latent);
        rest = after;
    }
    latents
}

#[test]
fn the_stream_equals_the_whole_encode() {
    let _alone = alone();
    const FRAMES: usize = 1 + 4 * 6;
    let made = Made::new(false);
    let pipeline = made.pipeline();
    let frames: Vec<RgbImage> = (0..FRAMES as u64).map(picture).collect();
    let mut encoder = pipeline.encoder().unwrap();
    let streamed = stream(encoder.as_mut(), &frames);
    assert_eq!(streamed.len(), 7);

    // The whole clip in one graph, from the weights themselves.
    let cfg = vae();
    let weights = Checkpoint::open(&made.weights().join("vae.safetensors")).unwrap();
    let path = made.dir.path().join("whole.onnx");
    let weights = Arc::new(CheckpointWeights::plain(weights));
    export_graph("whole", weights, &SaveOptions::default(), &path, |ops| {
        let dims = [FRAMES, 3, 32, 64].map(Dim::Fixed);
        let clip = ops.input("frames", &dims);
        for (i, latent) in encode_clip(ops, &cfg, [2, 4], &clip, FRAMES).iter().enumerate() {
            ops.output(&format!("latent.{i}"), latent, &[1, 4, 2, 4].map(Dim::Fixed));
        }
    })
    .unwrap();
    let options = PrepareOptions::default().with_threads(1);
    let mut whole = by_name("rten").unwrap().prepare(&path, &options).unwrap().session().unwrap();
    let mut pixels = Vec::new();
    for frame in &frames {
        for c in 0..3 {
            pixels.extend(frame.data.iter().skip(c).step_by(3).map(|v| f32::from(*v) / 127.5 - 1.0));
        }
    }
    let clip = Tensor::f32(&[FRAMES, 3, 32, 64], pixels);
    let outputs = whole.run(&[("frames", &clip)]).unwrap();
    for (i, latent) in streamed.iter().enumerate() {
        assert_eq!(outputs[i].1.as_f32().unwrap(), latent, "latent {i}, bit for bit");
    }

    // A new segment begins anew; a still is the first latent of a clip and disturbs nothing.
    let mut still = vec![0.0; encoder.latent_len()];
    encoder.reset();
    let (begin, rest) = frames.split_at(5);
    let mut parts = stream(encoder.as_mut(), begin);
    encoder.encode_still(&frames[0], &mut still).unwrap();
    assert_eq!(still, streamed[0]);
    for group in rest.chunks_exact(4) {
        let mut latent = vec![0.0; still.len()];
        encoder.encode_group(group, &mut latent).unwrap();
        parts.push(latent);
    }
    assert_eq!(parts, streamed);
    let wrong = encoder.encode_group(&frames[..1], &mut still).unwrap_err().to_string();
    assert!(wrong.contains("group has 1 values, expected 4"), "{wrong}");
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_long_stream_takes_no_more_memory() {
    let _alone = alone();
    let made = Made::new(false);
    let mut encoder = made.pipeline().encoder().unwrap();
    let frames: Vec<RgbImage> = (0..40).map(picture).collect();
    let mut latent = vec![0.0; encoder.latent_len()];
    let mut warm = 0;
    let mut at = 0;
    for group in 0..600 {
        let count = encoder.group_len();
        at = (at + count) % 32;
        encoder.encode_group(&frames[at..at + count], &mut latent).unwrap();
        if group == 150 {
            warm = resident_bytes();
        }
    }
    let growth = resident_bytes().saturating_sub(warm) as f64 / 1e6;
    println!("{growth:.2} MB after 450 more groups");
    assert!(growth < 2.0, "{growth:.2} MB");
    assert!(latent.iter().all(|v| v.is_finite()));
}

#[test]
fn a_node_publishes_what_it_imagined() {
    let _alone = alone();
    let made = Made::new(false);
    let pipeline = made.pipeline();
    let robot = RosSession::open(&RosConfig::in_process("robot")).unwrap();
    let session = robot.another_node("mindseye", "/").unwrap();
    let images = robot.publisher::<Image>("/camera/image_raw", &Qos::SENSOR_DATA).unwrap();
    let topic = "/mindseye/imagination/compressed";
    let shown =
        robot.subscriber::<CompressedImage>(topic, &Qos::default(), QueuePolicy::KeepLast(4)).unwrap();
    let mut config = RobotConfig { robot: "test".into(), ..RobotConfig::default() };
    config.goals.max_frame_age_ms = 60_000;
    let parts = NodeParts {
        config,
        mind: pipeline.mind(0).unwrap(),
        encoder: pipeline.encoder().unwrap(),
        record: None,
        observer: None,
    };
    let node = Node::start(&session, parts).unwrap();
    assert!(images.wait_for_subscribers(Duration::from_secs(5)));
    let mut stamp = Timestamp(1_700_000_000_000_000_000);
    for i in 0..30u64 {
        stamp = stamp + TimeDelta::from_millis(100);
        let header = Header::new(stamp, "camera");
        let data = picture(i).data;
        let image = Image {
            header,
            width: 64,
            height: 32,
            encoding: "rgb8".into(),
            step: 192,
            data,
            ..Image::default()
        };
        images.publish(&image).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..500 {
        if node.counts().latents >= 8 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(node.counts().latents, 8, "1 + 4 k frames: {:?}", node.counts());
    let body = r#"{"text": "the red chair"}"#;
    let text = robot.query_json("mindseye/test/navigate", body, Duration::from_secs(30)).unwrap();
    let answer: Answer = serde_json::from_str(&text).unwrap();
    assert!(matches!(answer.status, Status::Failed | Status::NotInContext), "{text}");
    assert!(answer.pose.is_none() && answer.steps == 4, "{text}");
    let picture = shown.recv_timeout(Duration::from_secs(5)).unwrap().expect("the imagined frames").message;
    assert!(picture.data.starts_with(b"\x89PNG"));
    node.stop();
}

/// Engines of a fake TensorRT for every part of a bundle: weights and activations as planned, inputs and outputs as
/// stated by the bundle, at most as large as a build's profile allows. They say nothing but zeros.
fn fake_engines(bundle: &Bundle, plan: &Plan, model: &ModelSpec, keep: Keep, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for c in &plan.components {
        let sizes = pipeline::profile_sizes(bundle, model, &c.name);
        let component = bundle.component(&c.name).unwrap();
        let mut text =
            format!("ftrt a fake engine\nweights {}\nscratch {}\n", c.weight_bytes, c.activation_bytes);
        for (kind, ports) in [("in", &component.inputs), ("out", &component.outputs)] {
            for port in ports {
                let port = port.to_port().unwrap();
                let dtype = match port.dtype {
                    // State is as narrow as the engine.
                    DataType::F32 if is_state(&port.name) => 1,
                    DataType::F32 => 0,
                    _ => 8,
                };
                let mut line = format!("{kind} {} {dtype}", port.name);
                for dim in &port.shape {
                    line += &match dim {
                        Dim::Fixed(n) => format!(" {n}"),
                        Dim::Symbol(name) if kind == "in" => {
                            format!(" {name}={}..{}", sizes[name][0], sizes[name][2])
                        }
                        Dim::Symbol(name) => format!(" {name}"),
                        Dim::Unknown => panic!("{}: {} has a size without a name", c.name, port.name),
                    };
                }
                text += &line;
                text.push('\n');
            }
        }
        let engine = folder.join(format!("{}.engine", c.name));
        std::fs::write(&engine, text.trim_end()).unwrap();
        Passport {
            format: FORMAT,
            component: c.name.clone(),
            bundle_sha256: bundle.hash().to_owned(),
            graph_sha256: "g".into(),
            weights_sha256: "w".into(),
            calibration_sha256: None,
            scales_sha256: None,
            engine_sha256: mindseye_base::file::sha256_of_file(&engine).unwrap(),
            files: Default::default(),
            precision: Precision::Fp16,
            kept_high: vec![],
            target: "orin-agx".into(),
            compute_capability: Some(ORIN),
            library: "tensorrt".into(),
            library_version: "10.3.0.30".into(),
            os: std::env::consts::OS.into(),
            arch: std::env::consts::ARCH.into(),
            jetson_release: None,
            driver_version: None,
            builder_flags: Default::default(),
            verification: None,
            build_seconds: 0.0,
            engine_bytes: 0,
            tool_version: "0".into(),
        }
        .write(&engine)
        .unwrap();
    }
    let mut settings = Settings::new(bundle.directory(), "orin-agx", Precision::Fp16);
    settings.keep_loaded = Some(keep);
    std::fs::write(folder.join(SETTINGS_FILE), serde_json::to_vec(&settings).unwrap()).unwrap();
}

const ORIN: ComputeCapability = ComputeCapability { major: 8, minor: 7 };

/// A fake TensorRT 10 with a driver for it, and what it says that its engines weigh.
fn fake_tensorrt(folder: &Path) -> (trt::Library, fn() -> u64) {
    let source = root().join("fake-tensorrt/fake.rs");
    let out = folder.join("libnvinfer.so.10");
    let mut rustc = std::process::Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "cdylib",
        "--crate-name",
        "fake_tensorrt",
        "--cfg",
        "v10",
    ]);
    rustc.args(["--check-cfg", "cfg(v10, v11, broken)"]).arg("-o").arg(&out).arg(source);
    let done = rustc.output().expect("rustc runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    std::os::unix::fs::symlink(&out, folder.join("libnvonnxparser.so.10")).unwrap();
    let device = DeviceInfo {
        ordinal: 0,
        name: "fake GPU".into(),
        compute_capability: ORIN,
        total_bytes: 1 << 30,
        multiprocessors: 1,
    };
    let probe: trt::Probe =
        Arc::new(move || Ok(DriverInfo { cuda_version: 12_060, devices: vec![device.clone()] }));
    let library = trt::Library::find(&trt::LoadOptions { path: Some(out.clone()), probe }).unwrap();
    (library, fake_weights(&out))
}

/// `fakeWeights` of a loaded fake, through the C library's dlopen.
#[allow(unsafe_code)]
fn fake_weights(path: &Path) -> fn() -> u64 {
    use std::sync::atomic::{AtomicUsize, Ordering};
    unsafe extern "C" {
        fn dlopen(name: *const std::ffi::c_char, flags: i32) -> *mut std::ffi::c_void;
        fn dlsym(handle: *mut std::ffi::c_void, name: *const std::ffi::c_char) -> *mut std::ffi::c_void;
    }
    static SYMBOL: AtomicUsize = AtomicUsize::new(0);
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the library is loaded already and never closed.
    let symbol = unsafe { dlsym(dlopen(name.as_ptr(), 2), c"fakeWeights".as_ptr()) };
    assert!(!symbol.is_null());
    SYMBOL.store(symbol as usize, Ordering::SeqCst);
    || {
        let symbol = SYMBOL.load(Ordering::SeqCst) as *const std::ffi::c_void;
        // SAFETY: the symbol is `extern "C" fn() -> u64` in fake.rs.
        unsafe { std::mem::transmute::<*const std::ffi::c_void, extern "C" fn() -> u64>(symbol)() }
    }
}

/// Everything that goals run, on one thread, while another has encoded frames: the most memory that was held.
fn goal_peak(pipeline: &Pipeline, device: &HostDevice) -> u64 {
    let spec = pipeline.spec().clone();
    let frame = RgbImage { width: 64, height: 32, data: vec![90; 3 * 64 * 32] };
    let done = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut encoder = pipeline.encoder().unwrap();
            let mut latent = vec![0.0; spec.latent_len];
            for _ in 0..3 {
                let group = vec![frame.clone(); encoder.group_len()];
                encoder.encode_group(&group, &mut latent).unwrap();
            }
            // The camera's thread lives on while the goal is worked on, and so does its memory.
            done.wait();
            done.wait();
        });
        done.wait();
        let mut mind = pipeline.mind(1).unwrap();
        // The second goal meets what the first one left: state, and the parts that ran last.
        for goal in ["the red chair", "the blue table"] {
            let (text, null) = (mind.encode_text(goal).unwrap(), mind.encode_text("").unwrap());
            let first = mind.encode_still(&frame).unwrap();
            let seen = ContextLatents {
                index: (0..spec.context_max as u64).collect(),
                latents: vec![0.1; spec.context_max * spec.latent_len],
                first,
            };
            let prompt = Prompt { text: &text, null_text: &null, camera: None };
            let budget = Budget { clock: &NoClock, until: None };
            imagine(mind.denoiser(), &seen, prompt, &spec.settings, budget, &mut |_| Flow::Continue).unwrap();
            mind.decode(&vec![0.0; spec.settings.target_latents * spec.latent_len]).unwrap();
        }
        done.wait();
    });
    device.peak_bytes()
}

/// The plan of memory is what the runtime then takes, within a twentieth: whatever is kept loaded, context joint or
/// cached.
#[test]
fn the_runtime_takes_the_memory_that_was_planned() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let (library, weights) = fake_tensorrt(folder.path());
    let library = Arc::new(library);
    for cached in [false, true] {
        let made = Made::new(cached);
        let bundle = Bundle::load(made.graphs()).unwrap();
        let model = ModelSpec::from_manifest(bundle.manifest()).unwrap();
        assert_eq!(model.workload.cached_context, cached);
        let target = Target::named("orin-agx").unwrap();
        let mut peaks = Vec::new();
        for keep in Keep::ALL {
            let options =
                PlanOptions { keep: Some(keep), workspace_bytes: Some(0), ..PlanOptions::default() };
            let planned = plan(&model, &target, Precision::Fp16, &options).unwrap();
            let engines = folder.path().join(format!("{cached}-{keep}"));
            fake_engines(&bundle, &planned, &model, keep, &engines);
            let device = HostDevice::counting(ORIN, 1 << 30, weights);
            let gpu = TensorRtBackend::new(Arc::clone(&library), device.clone());
            let cpu = by_name("rten").unwrap();
            let pipeline = Pipeline::load_engines_on(&made.graphs(), &engines, cpu, Some(gpu), 1).unwrap();
            let taken = goal_peak(&pipeline, &device) as f64;
            let wanted = planned.memory.peak as f64;
            println!("cached {cached}, {keep}: {taken} bytes taken, {wanted} planned");
            assert!(
                (taken / wanted - 1.0).abs() < 0.05,
                "cached {cached}, {keep}: {taken} taken\n{}",
                planned.table()
            );
            peaks.push(taken);
            drop(pipeline);
            assert_eq!(weights(), 0, "every engine was unloaded");
        }
        assert!(
            peaks.is_sorted_by(|a, b| a > b),
            "each way to keep parts takes less than the one before: {peaks:?}"
        );
    }
}

/// Parts that take turns answer as those that stay.
#[test]
fn what_stays_in_memory_changes_no_answer() {
    let _alone = alone();
    let made = Made::new(true);
    let bundle = Bundle::load(made.graphs()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let plain = ask(&made.pipeline(), "find the red chair", 3);
    for keep in [Keep::Halves, Keep::One] {
        // The bundle's own graphs, as a folder of engines.
        let engines = folder.path().join(keep.name());
        graphs_as_engines(&bundle, keep, &engines);
        let cpu = by_name("rten").unwrap();
        let pipeline = Pipeline::load_engines_on(&made.graphs(), &engines, cpu, None, 1).unwrap();
        let turns = ask(&pipeline, "find the red chair", 3);
        let same = |r: &Replayed| {
            let mut answer = without_times(r.answer.clone().unwrap());
            answer.engine_sha256.clear();
            answer
        };
        assert_eq!(same(&turns), same(&plain), "{keep}");
        let frames = |r: &Replayed| r.grounded.as_ref().unwrap().frames.clone();
        assert_eq!(frames(&turns), frames(&plain), "{keep}");
    }
    // A folder that lacks a part is refused, and so is a graph without a passport: nothing takes their place.
    let engines = folder.path().join("one");
    let load = || {
        let cpu = by_name("rten").unwrap();
        Pipeline::load_engines_on(&made.graphs(), &engines, cpu, None, 1).map(drop).unwrap_err().to_string()
    };
    let passport = Passport::path_for(&engines.join("denoiser_cached.onnx"));
    std::fs::remove_file(&passport).unwrap();
    assert!(load().contains("denoiser_cached.onnx has no passport"), "{}", load());
    std::fs::remove_file(engines.join("denoiser_cached.onnx")).unwrap();
    assert!(load().contains("no engine of \"denoiser_cached\""), "{}", load());
}

/// A whole goal by the CUDA engine in the emulator: pictures encoded, text, denoising with guidance, pictures decoded. The
/// answer is rten's, the pictures are within a level of its own, and the same goal again gives the same bytes.
#[test]
#[ignore = "slow: a whole goal in the emulator"]
fn a_whole_goal_by_cuda_agrees_with_rten() {
    let _alone = alone();
    let Some(driver) = emulated::driver() else { return };
    for cached in [false, true] {
        let made = Made::new(cached);
        let bundle = Bundle::load(made.graphs()).unwrap();
        let engines = made.dir.path().join("engines");
        graphs_as_engines(&bundle, Keep::All, &engines);
        let by_rten = ask(&made.pipeline(), "find the red chair", 3);
        let pictures = |r: &Replayed| r.grounded.as_ref().unwrap().frames.clone();
        // Mean difference of colours, in levels of 255.
        let apart = |a: &[RgbImage], b: &[RgbImage]| {
            let bytes = |all: &[RgbImage]| all.iter().flat_map(|f| f.data.clone()).collect::<Vec<u8>>();
            let (a, b) = (bytes(a), bytes(b));
            assert_eq!(a.len(), b.len());
            a.iter().zip(&b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
        };
        for (precision, limit) in [(Precision::Fp32, 0.05), (Precision::Bf16, 3.0)] {
            let device = CudaDevice::with_kernels(0, Some(driver)).unwrap();
            let cuda = Arc::new(CudaBackend::on(device, precision).unwrap());
            let pipeline = Pipeline::load_engines_on(&made.graphs(), &engines, cuda, None, 1).unwrap();
            let began = std::time::Instant::now();
            let first = ask(&pipeline, "find the red chair", 3);
            let apart = apart(&pictures(&first), &pictures(&by_rten));
            println!(
                "cached {cached}, {}: {:.1} s, pictures {apart:.3} levels from rten's",
                precision.name(),
                began.elapsed().as_secs_f64()
            );
            assert!(apart < limit, "{apart}");
            assert_eq!(first.answer.as_ref().unwrap().status, by_rten.answer.as_ref().unwrap().status);
            let again = ask(&pipeline, "find the red chair", 3);
            assert!(pictures(&again) == pictures(&first), "the same goal gave other pictures");
            assert_eq!(without_times(again.answer.unwrap()), without_times(first.answer.unwrap()));
        }
    }
}

/// Copies the graphs of a bundle into a folder, each with a passport.
fn graphs_as_engines(bundle: &Bundle, keep: Keep, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    for (name, component) in &bundle.manifest().component {
        if component.format != ComponentFormat::Onnx {
            continue;
        }
        let graph = folder.join(format!("{name}.onnx"));
        std::fs::copy(bundle.path(name).unwrap(), &graph).unwrap();
        Passport {
            format: FORMAT,
            component: name.clone(),
            bundle_sha256: bundle.hash().to_owned(),
            graph_sha256: "g".into(),
            weights_sha256: "w".into(),
            calibration_sha256: None,
            scales_sha256: None,
            engine_sha256: mindseye_base::file::sha256_of_file(&graph).unwrap(),
            files: Default::default(),
            precision: Precision::Fp32,
            kept_high: vec![],
            target: "cpu".into(),
            compute_capability: None,
            library: "onnx".into(),
            library_version: String::new(),
            os: std::env::consts::OS.into(),
            arch: std::env::consts::ARCH.into(),
            jetson_release: None,
            driver_version: None,
            builder_flags: Default::default(),
            verification: None,
            build_seconds: 0.0,
            engine_bytes: 0,
            tool_version: "0".into(),
        }
        .write(&graph)
        .unwrap();
    }
    let mut settings = Settings::new(bundle.directory(), "cpu", Precision::Fp32);
    settings.keep_loaded = Some(keep);
    std::fs::write(folder.join(SETTINGS_FILE), serde_json::to_vec(&settings).unwrap()).unwrap();
}
