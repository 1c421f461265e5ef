//! `mindseye replay`: a recorded bag instead of a robot. The same bag, seed and bundle give the same document, byte
//! for byte, except for `timings_ms` (and `profile_ms`).

use super::goal::in_words;
use super::progress::ProgressBar;
use super::run::configure;
use super::serve::MindArgs;
use super::view::{Facts, Page, Report, ReportArgs, ViewArgs, both};
use super::{ModelArgs, say, stop_flag};
use crate::config::RobotConfig;
use crate::ground::Mind;
use crate::mind::Pipeline;
use crate::no_model::no_model;
use crate::node::{MonotonicClock, NodeEvent};
use crate::overview::{overview, stacked};
use crate::replay::{Replay, Replayed, Told, replay_with, replay_without_model, watch_rest};
use crate::topics::Wanted;
use anyhow::{Context, bail};
use clap::Args;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::ros::RosSession;
use mindseye_bridge::time::TimeDelta;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye replay drive.mcap --goal \"find the red chair\"\n  \
                        mindseye replay drive.mcap --goal \"find the red chair\" --seed 3 --json --profile\n\n\
                        Reads MCAP, rosbag2 (sqlite3) and ROS 1 bags. Times apart, the document depends only on the \
                        bag, the bundle, the goal and the seed.")]
pub struct ReplayArgs {
    /// The bag: a file or a rosbag2 directory.
    bag: PathBuf,
    /// What to find at the end of the bag.
    #[arg(long, value_name = "TEXT")]
    goal: Option<String>,
    /// Ask this many seconds after the start of the bag instead of at its end.
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    at: Option<f64>,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many drives to imagine [default: the runtime's].
    #[arg(long, value_name = "N")]
    candidates: Option<u32>,
    /// Most context latents to look at, up to what the bundle allows [default: the configuration's, else as trained].
    #[arg(long, value_name = "N")]
    context_latents: Option<usize>,
    /// Give up after so long, as a robot would; the document then depends on the machine's speed.
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<i64>,
    /// Robot configuration: topics, context, camera.
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    /// The camera's topic, raw or compressed, instead of the configuration's.
    #[arg(long, value_name = "TOPIC")]
    image: Option<String>,
    /// The topic of odometry instead of the configuration's.
    #[arg(long, value_name = "TOPIC")]
    odom: Option<String>,
    /// An object detector (ONNX) that sees things in the frames, instead of the configuration's.
    #[arg(long, value_name = "ONNX")]
    detector: Option<PathBuf>,
    /// Print p50, p99 and maximum per stage.
    #[arg(long)]
    profile: bool,
    /// Write a picture of the imagined frames, and a map of what was placed: landmarks, things, frames, answer.
    #[arg(long, value_name = "PNG")]
    strip: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// Endpoint to find the servers of --mind at; may be repeated [default: the configuration's].
    #[arg(long, value_name = "ENDPOINT", requires = "mind")]
    connect: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    mind: MindArgs,
    #[command(flatten)]
    view: ViewArgs,
    #[command(flatten)]
    report: ReportArgs,
}

/// Side of the map of `--strip` (pixels).
const MAP_PX: usize = 640;

impl ReplayArgs {
    /// The goal that is asked, if any.
    fn goal(&self) -> anyhow::Result<Option<Goal>> {
        let Some(text) = &self.goal else { return Ok(None) };
        let mut goal = Goal::text("replay", text)?;
        (goal.seed, goal.candidates) = (Some(self.seed), self.candidates);
        Ok(Some(goal))
    }

    /// The configuration, with what the command line says otherwise.
    fn config(&self) -> anyhow::Result<RobotConfig> {
        let mut config = match (&self.config, self.mind.is_served()) {
            (path, true) => configure(path.as_ref(), &self.connect, &[])?,
            (Some(path), false) => RobotConfig::load(path)?,
            (None, false) => RobotConfig::default(),
        };
        config.detect_with(self.detector.as_deref());
        Ok(config)
    }
}

pub fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let (config, goal) = (args.config()?, args.goal()?);
    if args.at.is_some_and(|at| !at.is_finite() || at < 0.0) {
        bail!("--at must be a number of seconds, 0 or more");
    }
    let stop = stop_flag()?;
    let mut progress = ProgressBar::new(args.json);
    let mut pipeline = args.model.load_or_detect(&config, &args.mind)?;
    let latents = args.context_latents.or(config.model.context_latents);
    if let (Some(pipeline), Some(latents)) = (&mut pipeline, latents) {
        pipeline.look_at(latents)?;
    }
    let session = args.mind.is_served().then(|| RosSession::open(&config.ros)).transpose()?;
    let runs = (args.model.backend.as_str(), args.model.threads);
    let served = args.mind.open(session.as_ref(), &config.robot, pipeline.as_ref(), runs)?;
    let mind_of = |pipeline: &Pipeline, seed: u64| match &served {
        Some(served) => served.mind(pipeline, seed),
        None => pipeline.mind(seed),
    };
    let asked = Replay {
        bag: args.bag.clone(),
        config,
        wanted: Wanted { image: args.image.clone(), odom: args.odom.clone() },
        goal,
        at_secs: args.at,
        deadline: args.deadline_ms.map(TimeDelta::from_millis),
    };
    let page = args.view.open("replay", pipeline.as_ref())?;
    let report = args.report.open("replay", pipeline.as_ref())?;
    let channels = args.view.channels(None, &asked.config.frames.odom)?;
    let observer = both(both(page.observer(), report.observer()), channels.observer());
    let mut tell = |told: Told<'_>| match told {
        Told::Line(line) => progress.line(&line),
        Told::Bar(what, done, of) => progress.bar(what, done, of),
        Told::Event(event) => observer.iter().for_each(|observer| observer(event)),
    };
    let go_on = || !stop.load(Ordering::Relaxed);
    let replayed = match &pipeline {
        Some(pipeline) => {
            let (mind, encoder) = (mind_of(pipeline, 0)?, pipeline.encoder()?);
            replay_with(mind, encoder, &asked, &MonotonicClock, &mut tell, &go_on)
        }
        None => replay_without_model(&asked, &MonotonicClock, &mut tell, &go_on),
    };
    let mut replayed = replayed.with_context(|| args.bag.display().to_string())?;
    say_result(args, &replayed)?;
    write_strip(args, &replayed)?;
    if let Some(observer) = report.observer() {
        watch_rest(&asked, &MonotonicClock, &mut |event| observer(event), &go_on)?;
    }
    write_report(&report, args, &asked.config, &replayed, pipeline.as_ref())?;
    let failed = replayed.answer.as_ref().is_some_and(|a| a.status == Status::Failed);
    if page.is_open() {
        let mind = match &pipeline {
            Some(pipeline) => mind_of(pipeline, args.seed)?,
            None => no_model().0,
        };
        answer_page(&page, mind, &asked, &mut replayed, &mut tell, &stop);
        // With what was asked on the page.
        write_report(&report, args, &asked.config, &replayed, pipeline.as_ref())?;
    } else if channels.is_live() {
        eprintln!("mindseye: Foxglove's channels stay open; Ctrl-C ends");
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Prints the document, or the answer in words.
fn say_result(args: &ReplayArgs, replayed: &Replayed) -> anyhow::Result<()> {
    if !args.json {
        match &replayed.answer {
            Some(answer) => say(&in_words(answer))?,
            None => say("no --goal given: the bag was read, nothing was asked")?,
        }
        if args.profile {
            say(replayed.profile.table().trim_end())?;
        }
        return Ok(());
    }
    let mut document = serde_json::json!({
        "bag": args.bag.display().to_string(),
        "seed": args.seed,
        "goal": args.goal,
        "frames": replayed.counts,
        "topics": replayed.topics.keys().collect::<Vec<_>>(),
        "faults": replayed.faults.sentences(),
        "latents": replayed.scene.as_ref().map_or(0, |scene| scene.memory.len()),
        "segments": replayed.segments,
        "refused_messages": replayed.refused,
        "odometry": replayed.odometry,
        "camera_info": replayed.camera_info,
        "study": replayed.study,
        "answer": replayed.answer,
    });
    if args.profile {
        document["profile_ms"] = serde_json::to_value(replayed.profile.summary())?;
    }
    say(&document.to_string())
}

/// Writes the imagined frames and the map, where a picture of them is wanted.
fn write_strip(args: &ReplayArgs, replayed: &Replayed) -> anyhow::Result<()> {
    let Some(path) = &args.strip else { return Ok(()) };
    let frames = replayed.grounded.as_ref().map(|g| g.frames.as_slice()).unwrap_or_default();
    let known = replayed.grounded.as_ref().zip(replayed.scene.as_ref());
    let map = known.and_then(|(grounded, scene)| overview(grounded, scene, MAP_PX));
    match stacked(crate::node::strip(frames), map) {
        Some(picture) => picture.save_png(path).with_context(|| path.display().to_string()),
        None => {
            eprintln!("mindseye: nothing was imagined or placed: no picture to write");
            Ok(())
        }
    }
}

/// Answers what viewers of the page ask, until a signal stops it.
fn answer_page(
    page: &Page,
    mut mind: Box<dyn Mind>,
    asked: &Replay,
    replayed: &mut Replayed,
    tell: &mut dyn FnMut(Told<'_>),
    stop: &AtomicBool,
) {
    eprintln!("mindseye: the page answers goals from what the bag showed; Ctrl-C ends");
    page.answer_goals(stop, |goal, cancelled| {
        let go_on = || !stop.load(Ordering::Relaxed) && !cancelled.load(Ordering::Relaxed);
        let sampling = asked.time_for_sampling();
        if replayed.ask(mind.as_mut(), &goal, sampling, &MonotonicClock, tell, &go_on).is_err() {
            let answer = Answer::new(&goal.id, Status::Cancelled, Some("cancelled by a viewer".into()));
            tell(Told::Event(NodeEvent::Answered(&answer)));
        }
    });
}

/// Writes the report, where one is wanted.
fn write_report(
    report: &Report,
    args: &ReplayArgs,
    config: &RobotConfig,
    replayed: &Replayed,
    pipeline: Option<&Pipeline>,
) -> anyhow::Result<()> {
    if let Some(path) = report.write(|| facts(args, config, replayed, pipeline))? {
        eprintln!("mindseye: wrote {}", path.display());
    }
    Ok(())
}

/// What the report says of how it came about.
#[cfg(feature = "view")]
fn facts(args: &ReplayArgs, config: &RobotConfig, replayed: &Replayed, pipeline: Option<&Pipeline>) -> Facts {
    let mut recording = super::facts::recording(&args.bag);
    let counts = &replayed.counts;
    let topics: Vec<String> =
        replayed.topics.iter().map(|(name, sense)| format!("{name} ({sense:?})")).collect();
    let row = |name: &str, value: String| (name.to_owned(), value);
    recording.1.extend([
        row("topics", topics.join(", ")),
        row(
            "pictures",
            format!("{} seen, {} kept, {} out of order", counts.offered, counts.kept, counts.late),
        ),
        row("messages that could not be used", replayed.refused.to_string()),
        row("segments", replayed.segments.join("; ")),
    ]);
    let question = vec![
        row("goal", args.goal.clone().unwrap_or_default()),
        row("seed", args.seed.to_string()),
        row("asked", args.at.map_or("at the end".into(), |at| format!("{at} s after the start"))),
        row("backend", format!("{}, {} threads", args.model.backend, args.model.threads)),
        row("answer", replayed.answer.as_ref().map(Answer::to_json).unwrap_or_default()),
    ];
    let mut tables = vec![("Question".to_owned(), question), recording];
    tables.push(super::facts::configuration(config, args.config.as_deref()));
    tables.extend(super::facts::program(pipeline));
    tables
}

#[cfg(not(feature = "view"))]
fn facts(_: &ReplayArgs, _: &RobotConfig, _: &Replayed, _: Option<&Pipeline>) -> Facts {
    Facts::new()
}
