//! `mindseye-tools curate`: from indoor scans to grounding clips (Video4Spatial, section 6.2).
//!
//! Every third frame of a recording is kept. A vision-language model behind an OpenAI-compatible endpoint is asked
//! what it sees in each kept frame that has 160 good ones before it; when an object is in the centre region, these
//! 161 frames become a clip, and the model is asked for the two phrases of its instruction. Whatever is missing or
//! unusable is counted; `state.jsonl` remembers what was asked, so that a run that was stopped goes on where it was.
//!
//! * [`layout`]: ScanNet++ and ARKitScenes on disk.
//! * [`vlm`]: the endpoint.
//! * [`dataset`]: the result on disk, and [`Dataset`](dataset::Dataset), which reads it for training; a lab can write
//!   the same by other means.

mod bags;
pub mod dataset;
pub mod layout;
pub mod vlm;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use dataset::{Clip, DatasetError, FORMAT, Info, Picture, read_json, write_json};
use layout::{Frame, Recording, SourceLayout};
use vlm::{Caption, Endpoint, VlmError};

/// Pictures shown with the question for the instruction.
const CAPTION_PICTURES: usize = 8;
/// Longest side of a picture that is sent (pixels).
const SENT_SIDE: usize = 640;
/// Questions in a row without an answer after which the endpoint is given up.
const GIVE_UP: usize = 4;

/// Arguments of `curate`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example: mindseye-tools curate --layout scannetpp --root /data/scannetpp --out clips \
                        --endpoint http://127.0.0.1:8000/v1 --model Qwen3-VL-8B-Instruct\n\
                        Recordings only: mindseye-tools curate --layout 7scenes --root /data/kitchen --out kitchen --interval 1\n\
                        Run it again to go on after a stop. Video files have to be taken apart into pictures first."
)]
pub struct CurateArgs {
    /// Directory layout of the source.
    #[arg(long, value_enum)]
    pub layout: SourceLayout,
    /// Root of the source.
    #[arg(long)]
    pub root: PathBuf,
    /// Where the dataset is put.
    #[arg(long)]
    pub out: PathBuf,
    /// Base address of the endpoint; without one only recordings are written, no clips.
    #[arg(long, requires = "model")]
    pub endpoint: Option<String>,
    /// Name of the model there.
    #[arg(long, requires = "endpoint")]
    pub model: Option<String>,
    /// PEM file of the certificates that an https endpoint is trusted by; those of the operating system when left out.
    #[arg(long, value_name = "PEM", requires = "endpoint")]
    pub certificates: Option<PathBuf>,
    /// Environment variable that holds the endpoint's key, if it wants one.
    #[arg(long)]
    pub key_variable: Option<String>,
    /// Only these recordings (may be repeated).
    #[arg(long)]
    pub scene: Vec<String>,
    /// Every how many frames one is kept.
    #[arg(long, default_value_t = 3)]
    pub interval: usize,
    /// Frames of a clip.
    #[arg(long, default_value_t = 161)]
    pub clip_frames: usize,
    /// An object is centred when its box's centre is within this share of the half size.
    #[arg(long, default_value_t = 0.3)]
    pub center_ratio: f64,
    /// Ask about every so many possible last frames.
    #[arg(long, default_value_t = 1)]
    pub ask_every: usize,
    /// Longest time for one request (s).
    #[arg(long, default_value_t = 60.0)]
    pub timeout_secs: f64,
    /// How often a failed request is sent again.
    #[arg(long, default_value_t = 3)]
    pub retries: usize,
    /// Print the report as one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// What [`curate`] works on.
#[derive(Clone, Debug)]
pub struct CurateOptions {
    /// Directory layout of the source.
    pub layout: SourceLayout,
    /// Root of the source.
    pub root: PathBuf,
    /// Where the dataset is put.
    pub out: PathBuf,
    /// Only these recordings; empty = all.
    pub scenes: Vec<String>,
    /// Every how many frames one is kept.
    pub interval: usize,
    /// Frames of a clip.
    pub clip_frames: usize,
    /// Centre region, share of the half size.
    pub center_ratio: f64,
    /// Ask about every so many possible last frames.
    pub ask_every: usize,
}

/// Why curation could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CurateError {
    /// A setting is out of range.
    #[error("{0}")]
    Setting(String),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// A recording as a whole cannot be used.
    #[error("{path}: {reason}")]
    Scene {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is nothing to read.
    #[error("{root}: no recordings of layout {layout:?}")]
    NoScenes {
        /// The root that was given.
        root: PathBuf,
        /// The layout that was looked for.
        layout: SourceLayout,
    },
    /// The output cannot be written or belongs to another run.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The endpoint cannot be asked at all.
    #[error(transparent)]
    Endpoint(#[from] VlmError),
}

/// What was found, used and left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Frames looked at (every `interval`-th).
    pub frames: u64,
    /// Without a picture; in ARKitScenes: holes in the recording.
    pub missing_image: u64,
    /// Without a pose.
    pub missing_pose: u64,
    /// With a pose that is NaN or no rotation; in ARKitScenes: lines of the trajectory.
    pub bad_pose: u64,
    /// Without usable intrinsics.
    pub missing_intrinsics: u64,
    /// Pictures that could not be decoded.
    pub unreadable_image: u64,
    /// Frames that the model was asked about, with an answer.
    pub asked: u64,
    /// No object in the centre region.
    pub no_centred_object: u64,
    /// The answer was nonsense.
    pub nonsense: u64,
    /// The instruction came back empty.
    pub empty_caption: u64,
    /// Clips made.
    pub clips: u64,
}

impl Counts {
    fn add(&mut self, o: &Self) {
        self.frames += o.frames;
        self.missing_image += o.missing_image;
        self.missing_pose += o.missing_pose;
        self.bad_pose += o.bad_pose;
        self.missing_intrinsics += o.missing_intrinsics;
        self.unreadable_image += o.unreadable_image;
        self.asked += o.asked;
        self.no_centred_object += o.no_centred_object;
        self.nonsense += o.nonsense;
        self.empty_caption += o.empty_caption;
        self.clips += o.clips;
    }

    fn outcome(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::UnreadableImage => {
                self.unreadable_image += 1;
                return;
            }
            Outcome::NoCentredObject => self.no_centred_object += 1,
            Outcome::Nonsense => self.nonsense += 1,
            Outcome::EmptyCaption => self.empty_caption += 1,
            Outcome::Clip => self.clips += 1,
        }
        self.asked += 1;
    }
}

/// What [`curate`] did; counts include earlier runs into the same directory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Recordings found.
    pub scenes: usize,
    /// Recordings finished, earlier runs included.
    pub scenes_done: usize,
    /// Recordings that an earlier run had finished.
    pub scenes_resumed: usize,
    /// Counts over all of them.
    pub counts: Counts,
    /// Questions that got no answer in this run; they are asked again in the next.
    pub endpoint_failures: u64,
    /// Recordings that could not be used, with the reason.
    pub problems: Vec<String>,
    /// Why the run ended early, if it did.
    pub stopped: Option<String>,
}

/// Runs `curate`.
///
/// # Errors
/// A setting out of range, a source or output that cannot be used at all.
pub fn run(args: CurateArgs) -> anyhow::Result<ExitCode> {
    if !(0.1..=3600.0).contains(&args.timeout_secs) {
        anyhow::bail!("timeout-secs = {}: wanted 0.1 to 3600", args.timeout_secs);
    }
    let key = match &args.key_variable {
        Some(name) => Some(std::env::var(name).map_err(|_| anyhow::anyhow!("{name} is not set"))?),
        None => None,
    };
    let timeout = Duration::from_secs_f64(args.timeout_secs);
    let endpoint = match args.endpoint.as_deref().zip(args.model.as_deref()) {
        Some((address, model)) => {
            let endpoint = Endpoint::new(address, model, timeout, args.retries.min(20))?.with_key(key);
            Some(match &args.certificates {
                Some(path) => {
                    let shown = path.display().to_string();
                    let pem = std::fs::read(path)
                        .map_err(|e| VlmError::Certificates { path: shown.clone(), source: e.into() })?;
                    endpoint.with_certificates(&shown, &pem)?
                }
                None => endpoint,
            })
        }
        None => None,
    };
    let options = CurateOptions {
        layout: args.layout,
        root: args.root,
        out: args.out,
        scenes: args.scene,
        interval: args.interval,
        clip_frames: args.clip_frames,
        center_ratio: args.center_ratio,
        ask_every: args.ask_every,
    };
    let report = curate(&options, endpoint.as_ref(), &mut |line| eprintln!("{line}"))?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        for problem in &report.problems {
            println!("left out: {problem}");
        }
        let c = &report.counts;
        println!(
            "{} of {} recordings done, {} clips; of {} frames: {} without picture, {} without pose, {} with a bad \
             pose, {} without intrinsics, {} unreadable; of {} answers: {} without a centred object, {} nonsense, \
             {} with an empty caption; {} questions unanswered",
            report.scenes_done,
            report.scenes,
            c.clips,
            c.frames,
            c.missing_image,
            c.missing_pose,
            c.bad_pose,
            c.missing_intrinsics,
            c.unreadable_image,
            c.asked,
            c.no_centred_object,
            c.nonsense,
            c.empty_caption,
            report.endpoint_failures,
        );
    }
    if let Some(reason) = &report.stopped {
        anyhow::bail!("{reason}; run the same command again to go on");
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Clip,
    NoCentredObject,
    Nonsense,
    EmptyCaption,
    UnreadableImage,
}

/// One line of `state.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Entry {
    Asked { scene: String, frame: usize, outcome: Outcome },
    Done { scene: String, done: Counts },
}

struct State {
    path: PathBuf,
    file: File,
    asked: HashMap<String, HashMap<usize, Outcome>>,
    done: HashMap<String, Counts>,
}

impl State {
    /// Reads what was asked so far. A last line that was cut off in the middle is removed.
    fn open(path: PathBuf) -> Result<Self, CurateError> {
        let io = |source| CurateError::Io { path: path.clone(), source };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(e)),
        };
        let whole = text.rfind('\n').map_or(0, |k| k + 1);
        let (mut asked, mut done) = (HashMap::<String, HashMap<usize, Outcome>>::new(), HashMap::new());
        for (k, line) in text[..whole].lines().enumerate() {
            match serde_json::from_str(line) {
                Ok(Entry::Asked { scene, frame, outcome }) => {
                    asked.entry(scene).or_default().insert(frame, outcome);
                }
                Ok(Entry::Done { scene, done: counts }) => {
                    done.insert(scene, counts);
                }
                Err(e) => {
                    return Err(CurateError::Scene { path, reason: format!("line {}: {e}", k + 1) });
                }
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        if whole < text.len() {
            file.set_len(whole as u64).map_err(io)?;
        }
        Ok(Self { path, file, asked, done })
    }

    fn append(&mut self, entry: &Entry) -> Result<(), CurateError> {
        let mut line = serde_json::to_vec(entry)
            .map_err(|source| CurateError::Json { path: self.path.clone(), source })?;
        line.push(b'\n');
        let finished = matches!(entry, Entry::Done { .. });
        self.file
            .write_all(&line)
            .and_then(|()| if finished { self.file.sync_all() } else { Ok(()) })
            .map_err(|source| CurateError::Io { path: self.path.clone(), source })
    }
}

impl CurateOptions {
    fn check(&self) -> Result<(), CurateError> {
        let setting = |text: String| Err(CurateError::Setting(text));
        if !(1..=1000).contains(&self.interval) {
            return setting(format!("interval = {}: wanted 1 to 1000", self.interval));
        }
        if !(2..=10_000).contains(&self.clip_frames) {
            return setting(format!("clip-frames = {}: wanted 2 to 10000", self.clip_frames));
        }
        if !(self.center_ratio > 0.0 && self.center_ratio <= 1.0) {
            return setting(format!("center-ratio = {}: wanted above 0, at most 1", self.center_ratio));
        }
        if self.ask_every == 0 {
            return setting("ask-every = 0: wanted 1 or more".to_owned());
        }
        Ok(())
    }

    /// The recordings that were asked for.
    fn scenes(&self) -> Result<Vec<layout::SceneRef>, CurateError> {
        let mut scenes = layout::scenes(self.layout, &self.root)?;
        let wanted: HashSet<&str> = self.scenes.iter().map(String::as_str).collect();
        if let Some(unknown) = wanted.iter().find(|w| !scenes.iter().any(|s| s.id == **w)) {
            let root = self.root.display();
            return Err(CurateError::Setting(format!("no recording {unknown:?} in {root}")));
        }
        if !wanted.is_empty() {
            scenes.retain(|s| wanted.contains(s.id.as_str()));
        }
        Ok(scenes)
    }

    /// Makes the output's directories and `dataset.json`, or checks that it was made with these settings.
    fn begin(&self) -> Result<(), CurateError> {
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| CurateError::Io { path, source }
        };
        let info = Info {
            format: FORMAT,
            layout: Some(self.layout),
            root: fs::canonicalize(&self.root).map_err(io(&self.root))?,
            interval: self.interval,
            clip_frames: Some(self.clip_frames),
        };
        for dir in ["clips", "recordings"] {
            let dir = self.out.join(dir);
            fs::create_dir_all(&dir).map_err(io(&dir))?;
        }
        let path = self.out.join("dataset.json");
        if !path.is_file() {
            write_json(&path, &info)?;
        } else if read_json::<Info>(&path)? != info {
            let path = path.display();
            return Err(CurateError::Setting(format!(
                "{path}: made with other settings; give another --out"
            )));
        }
        Ok(())
    }
}

/// Makes or continues a dataset; without an endpoint its recordings only, and a later run with one makes the clips. `progress` gets one line per recording.
///
/// # Errors
/// A setting out of range, a source without recordings, an output that cannot be written or was made with other
/// settings. What is wrong with single recordings, frames and answers is in the report instead.
pub fn curate(
    options: &CurateOptions,
    endpoint: Option<&Endpoint>,
    progress: &mut dyn FnMut(&str),
) -> Result<Report, CurateError> {
    options.check()?;
    let scenes = options.scenes()?;
    options.begin()?;
    let state = State::open(options.out.join("state.jsonl"))?;
    let report = Report { scenes: scenes.len(), ..Report::default() };
    let mut run = Run { options, endpoint, state, report, unanswered_in_a_row: 0 };
    for scene in &scenes {
        if let Some(counts) = run.state.done.get(&scene.id) {
            run.report.scenes_done += 1;
            run.report.scenes_resumed += 1;
            run.report.counts.add(counts);
            continue;
        }
        let mut counts = Counts::default();
        let read = layout::read(options.layout, scene, &options.root, options.interval, &mut counts);
        let recording = match read {
            Ok(recording) => recording,
            Err(e) => {
                progress(&format!("{}: left out: {e}", scene.id));
                run.report.problems.push(e.to_string());
                continue;
            }
        };
        let unanswered = run.recording(scene, &recording, &mut counts)?;
        run.report.counts.add(&counts);
        run.report.endpoint_failures += unanswered;
        if unanswered == 0 && endpoint.is_some() {
            run.state.append(&Entry::Done { scene: scene.id.clone(), done: counts })?;
        }
        run.report.scenes_done += usize::from(unanswered == 0);
        progress(&format!(
            "{}: {} clips of {} answers, {} unanswered ({} of {} recordings)",
            scene.id, counts.clips, counts.asked, unanswered, run.report.scenes_done, run.report.scenes
        ));
        if run.report.stopped.is_some() {
            break;
        }
    }
    Ok(run.report)
}

struct Run<'a> {
    options: &'a CurateOptions,
    endpoint: Option<&'a Endpoint>,
    state: State,
    report: Report,
    unanswered_in_a_row: usize,
}

impl Run<'_> {
    /// Asks about all frames of a recording that can end a clip; returns how many questions got no answer.
    fn recording(
        &mut self,
        scene: &layout::SceneRef,
        recording: &Recording,
        counts: &mut Counts,
    ) -> Result<u64, CurateError> {
        let options = self.options;
        write_json(&options.out.join("recordings").join(format!("{}.json", scene.id)), recording)?;
        let Some(endpoint) = self.endpoint else { return Ok(0) };
        let earlier = self.state.asked.remove(&scene.id).unwrap_or_default();
        let mut unanswered = 0;
        let ends = candidates(&recording.frames, options.clip_frames);
        for last in ends.into_iter().step_by(options.ask_every) {
            let frame = recording.frames[last].index;
            if let Some(outcome) = earlier.get(&frame) {
                counts.outcome(*outcome);
                continue;
            }
            match look(options, endpoint, recording, last) {
                Ok(outcome) => {
                    self.unanswered_in_a_row = 0;
                    counts.outcome(outcome);
                    self.state.append(&Entry::Asked { scene: scene.id.clone(), frame, outcome })?;
                }
                Err(Failure::Endpoint(e)) => {
                    unanswered += 1;
                    self.unanswered_in_a_row += 1;
                    tracing::warn!(scene = scene.id, frame, error = %e, "no answer");
                    if self.unanswered_in_a_row >= GIVE_UP || e.lasting() {
                        self.report.stopped = Some(e.to_string());
                        break;
                    }
                }
                Err(Failure::Output(e)) => return Err(e.into()),
            }
        }
        Ok(unanswered)
    }
}

/// Positions of frames that have enough consecutive ones before them.
fn candidates(frames: &[Frame], clip: usize) -> Vec<usize> {
    (clip - 1..frames.len()).filter(|k| frames[*k].index - frames[k + 1 - clip].index == clip - 1).collect()
}

enum Failure {
    Endpoint(VlmError),
    Output(DatasetError),
}

/// Asks about the frame at `last`, and writes the clip when there is one.
fn look(
    options: &CurateOptions,
    endpoint: &Endpoint,
    recording: &Recording,
    last: usize,
) -> Result<Outcome, Failure> {
    let first = last + 1 - options.clip_frames;
    let picture = |k: usize| sent(&options.root.join(&recording.frames[k].file)).ok();
    let Some(end) = picture(last) else { return Ok(Outcome::UnreadableImage) };
    let answer = endpoint.ask(vlm::DETECT, std::slice::from_ref(&end)).map_err(Failure::Endpoint)?;
    let Some(found) = vlm::detections(&answer) else { return Ok(Outcome::Nonsense) };
    let Some(object) = vlm::centred(&found, options.center_ratio) else {
        return Ok(Outcome::NoCentredObject);
    };
    let shown = CAPTION_PICTURES.min(options.clip_frames);
    let mut pictures = Vec::with_capacity(shown);
    for k in 0..shown - 1 {
        match picture(first + k * (options.clip_frames - 1) / (shown - 1)) {
            Some(p) => pictures.push(p),
            None => return Ok(Outcome::UnreadableImage),
        }
    }
    pictures.push(end);
    let question = vlm::caption_question(&object.label);
    let answer = endpoint.ask(&question, &pictures).map_err(Failure::Endpoint)?;
    let (place, thing) = match vlm::caption(&answer) {
        Caption::Phrases(place, thing) => (place, thing),
        Caption::Empty => return Ok(Outcome::EmptyCaption),
        Caption::Nonsense => return Ok(Outcome::Nonsense),
    };
    let id = format!("{}-{:06}", recording.id, recording.frames[last].index);
    let clip = Clip {
        recording: recording.id.clone(),
        first: recording.frames[first].index,
        frames: options.clip_frames,
        caption: vlm::instruction(&place, &thing),
        object: thing,
        area: Some(object.area),
        id: id.clone(),
    };
    write_json(&options.out.join("clips").join(format!("{id}.json")), &clip).map_err(Failure::Output)?;
    Ok(Outcome::Clip)
}

/// A picture as it is sent: at most [`SENT_SIDE`] wide and high, PNG.
fn sent(path: &Path) -> Result<Vec<u8>, DatasetError> {
    let picture = Picture::read(path)?;
    let scale = (SENT_SIDE as f64 / picture.width.max(picture.height) as f64).min(1.0);
    let side = |n: usize| ((n as f64 * scale).round() as usize).max(1);
    let (width, height) = (side(picture.width), side(picture.height));
    let png = picture.fitted(width, height)?.to_png();
    png.map_err(|e| DatasetError::Invalid { path: path.to_path_buf(), reason: e.to_string() })
}
