//! `mindseye run`: the node, until a signal stops it.

use super::serve::MindArgs;
use super::view::{ViewArgs, both};
use super::{found_or_detecting, say, stop_flag};
use crate::config::{RobotConfig, Topics};
use crate::mind::find_bundle;
use crate::no_model::no_model;
use crate::node::{Node, NodeParts};
use crate::record::Recorder;
use crate::served::Feed;
use crate::topics::{Offered, TopicWatch, Wanted, adapt, published};
use anyhow::Context;
use clap::Args;
use mindseye_bridge::clock;
use mindseye_bridge::ros::RosSession;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye run --config configs/robots/sim.toml\n  \
                        mindseye run --connect tcp/robot.local:7447 --record today.mcap\n  \
                        mindseye run --mind zenoh:hall --fallback models/house-tiny\n\n\
                        Topics and their defaults are in configs/robots/sim.toml. ROS_DOMAIN_ID, \
                        ZENOH_SESSION_CONFIG_URI and ZENOH_CONFIG_OVERRIDE are heeded.")]
pub struct RunArgs {
    /// Robot configuration [default: topics of the design, the router on this machine].
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    /// Endpoint to connect to instead of the configuration's; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    connect: Vec<String>,
    /// Endpoint to listen on instead of the configuration's; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    listen: Vec<String>,
    /// Directory of the model bundle instead of the configuration's.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Backend that runs the model instead of the configuration's: rten, onnxruntime, cuda or cuda-f32.
    #[arg(long, value_name = "NAME")]
    backend: Option<String>,
    /// The camera's topic, raw or compressed, instead of the configuration's.
    #[arg(long, value_name = "TOPIC")]
    image: Option<String>,
    /// The topic of odometry instead of the configuration's.
    #[arg(long, value_name = "TOPIC")]
    odom: Option<String>,
    /// An object detector (ONNX) that sees things in the frames, instead of the configuration's.
    #[arg(long, value_name = "ONNX")]
    detector: Option<PathBuf>,
    /// Record what comes in and goes out; the same as Foxglove's schemas goes to NAME.foxglove.mcap beside it.
    #[arg(long, value_name = "MCAP")]
    record: Option<PathBuf>,
    /// Stop by itself after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// At the end, print counts and stage times as one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    mind: MindArgs,
    #[command(flatten)]
    view: ViewArgs,
}

/// The configuration with what the command line overrides.
pub fn configure(
    config: Option<&PathBuf>,
    connect: &[String],
    listen: &[String],
) -> anyhow::Result<RobotConfig> {
    let mut robot = match config {
        Some(path) => RobotConfig::load(path)?,
        None => RobotConfig::default(),
    };
    robot.ros = robot.ros.with_env(|name| std::env::var(name).ok())?;
    if !connect.is_empty() {
        robot.ros.zenoh.connect = Some(connect.to_vec());
    }
    if !listen.is_empty() {
        robot.ros.zenoh.listen = Some(listen.to_vec());
    }
    Ok(robot)
}

/// Time in which a robot that is there has said what it publishes.
const GRAPH_KNOWN_AFTER: Duration = Duration::from_millis(700);

/// What the robot publishes at the start, where the session can know it.
fn at_start(session: &RosSession, topics: &Topics) -> Vec<Offered> {
    let Some(graph) = session.graph() else { return Vec::new() };
    let is_camera = |name: &str| name == topics.image || name == topics.compressed;
    // A robot with the configured camera needs no waiting; without it every topic counts.
    let _known = graph.wait_until(GRAPH_KNOWN_AFTER, |graph| {
        graph.topics().iter().any(|t| t.publishers > 0 && is_camera(&t.name))
    });
    published(graph)
}

/// Listens to what a robot that started later publishes.
fn follow(watch: &mut TopicWatch, node: &Node, session: &RosSession) {
    let Some(graph) = session.graph() else { return };
    let adapted = watch.look(published(graph), clock::monotonic());
    for line in &adapted.lines {
        eprintln!("mindseye: {line}");
    }
    if !adapted.senses.is_empty()
        && let Err(error) = node.listen_to(session, watch.topics(), &adapted.senses)
    {
        tracing::error!(%error, "the topics stay as they were");
    }
}

/// Topics that appear while the node runs are looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Follows what the robot publishes until it is to stop: a signal came, or the seconds are over.
fn watch_topics(
    watch: &mut TopicWatch,
    node: &Node,
    session: &RosSession,
    (stop, seconds): (&AtomicBool, Option<f64>),
) {
    let began = Instant::now();
    let mut look_at = began;
    while !stop.load(Ordering::Relaxed) && seconds.is_none_or(|s| began.elapsed().as_secs_f64() < s) {
        if Instant::now() >= look_at {
            look_at += LOOK_EVERY;
            follow(watch, node, session);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let mut config = configure(args.config.as_ref(), &args.connect, &args.listen)?;
    config.detect_with(args.detector.as_deref());
    let stop = stop_flag()?;
    let given = args.bundle.as_ref().or(config.model.bundle.as_ref());
    let found = find_bundle(given.map(PathBuf::as_path), |name| std::env::var(name).ok());
    let directory = found_or_detecting(found, &config)?;
    let backend = args.backend.as_ref().unwrap_or(&config.model.backend);
    let runs = (backend.as_str(), config.model.threads);
    let load = |dir: &PathBuf| args.mind.load(dir, runs);
    let mut pipeline = directory.as_ref().map(load).transpose()?;
    if let (Some(pipeline), Some(latents)) = (&mut pipeline, config.model.context_latents) {
        pipeline.look_at(latents)?;
    }
    let session = RosSession::open(&config.ros).context("cannot open the Zenoh session")?;
    let wanted = Wanted { image: args.image.clone(), odom: args.odom.clone() };
    let offered = at_start(&session, &config.topics);
    for line in adapt(&mut config.topics, &offered, &wanted) {
        eprintln!("mindseye: {line}");
    }
    let mut watch = TopicWatch::new(config.topics.clone(), wanted);
    let recorder = args.record.as_deref().map(Recorder::start).transpose()?;
    let robot = config.robot.clone();
    let served = args.mind.open(Some(&session), &robot, pipeline.as_ref(), runs)?;
    let (mind, encoder) = match (&pipeline, &served) {
        (Some(pipeline), Some(served)) => (served.mind(pipeline, config.model.seed)?, pipeline.encoder()?),
        (Some(pipeline), None) => (pipeline.mind(config.model.seed)?, pipeline.encoder()?),
        (None, _) => no_model(),
    };
    let page = args.view.open(&robot, pipeline.as_ref())?;
    let record = || recorder.as_ref().and_then(Recorder::sender);
    let beside = args.record.as_deref().filter(|_| cfg!(feature = "view"));
    let beside = beside.map(Recorder::start_beside).transpose()?;
    let channels = args.view.channels(beside.as_ref().and_then(Recorder::sender), &config.frames.odom)?;
    let node = Node::start(
        &session,
        NodeParts {
            mind,
            encoder,
            config,
            record: record(),
            observer: both(page.observer(), channels.observer()),
        },
    )?;
    page.serve(&node);
    let feed = served.as_ref().map(|served| Feed::start(served.link(), node.context()));
    let _feed = feed.transpose()?;
    let model = directory.map_or("a detector alone".into(), |dir| dir.display().to_string());
    eprintln!("mindseye: serving {robot:?} with {model}; Ctrl-C stops");
    eprintln!("mindseye: ask by the topic /mindseye/goal/text, or by the key mindseye/{robot}/ground");

    watch_topics(&mut watch, &node, &session, (&stop, args.seconds));
    let (counts, profile) = (node.counts(), node.profile());
    node.stop();
    drop(channels);
    if let Err(error) = session.close() {
        tracing::warn!(%error, "the session did not close cleanly");
    }
    let recorded = recorder.map(Recorder::finish).transpose()?;
    beside.map(Recorder::finish).transpose()?;
    if args.json {
        let document = serde_json::json!({
            "robot": robot,
            "frames": {
                "received": counts.camera_received,
                "dropped": counts.camera_dropped,
                "context": counts.context,
            },
            "bad_messages": counts.bad_messages,
            "recorded_messages": recorded,
            "stages_ms": profile.summary(),
        });
        say(&document.to_string())?;
    } else if !profile.summary().is_empty() {
        eprint!("{}", profile.table());
    }
    Ok(ExitCode::SUCCESS)
}
