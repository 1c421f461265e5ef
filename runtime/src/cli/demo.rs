//! `mindseye demo`: the whole way in one process. A simulated robot explores a house and publishes what a ROS 2 robot
//! publishes; the runtime hears it over Zenoh, is asked for a thing, and the robot drives to the pose that comes back.
//!
//! The robot's side knows the house (its controller avoids walls with it, as a navigation stack would). The runtime
//! knows only what arrives on topics.

use super::picture::{Picture, VIEW, draw};
use super::progress::ProgressBar;
use super::view::{Channels, Page, Report, ReportArgs, ViewArgs, both};
use super::{ModelArgs, say, stop_flag};
use crate::config::RobotConfig;
use crate::ground::{Grounded, Scene, Stage};
use crate::image::RgbImage;
use crate::mind::{Pipeline, SHIPPED, SHIPPED_FURNISHED};
use crate::node::{Node, NodeEvent, NodeParts};
use crate::planar::{Pose2, wrap_angle};
use crate::record::Recorder;
use crate::visit::SWEEP;
use anyhow::{Context, bail};
use clap::Args;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::clock;
use mindseye_bridge::geometry::planar_isometry;
use mindseye_bridge::msg::{
    CameraInfo, Header, Image, Odometry, Pose, PoseStamped, PoseWithCovariance, StringMsg, TFMessage,
    TransformStamped,
};
use mindseye_bridge::ros::{Publisher, Qos, QueuePolicy, RosConfig, RosSession, Subscriber};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_world as world;
use nalgebra::{Isometry3, Matrix3, Rotation3, Translation3, UnitQuaternion};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Args)]
#[command(
    after_help = "Examples:\n  mindseye demo\n  mindseye demo --seed 7 --goal \"find the red chair\" --out out/\n  \
                        mindseye demo --fast --json\n\n\
                        Writes imagination.png, demo.mcap, and demo.foxglove.mcap (the same as Foxglove's schemas)."
)]
pub struct DemoArgs {
    /// Seed of the house, the drive and the imagination.
    #[arg(long, default_value_t = 10)]
    seed: u64,
    /// What to find [default: something in the house that the robot does not see when it asks].
    #[arg(long, value_name = "TEXT")]
    goal: Option<String>,
    /// Directory for the files that it writes.
    #[arg(long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    /// As fast as the machine goes, instead of in real time.
    #[arg(long)]
    fast: bool,
    /// Rooms and what is in them: plain (one room) or house (several) with plain shapes, furnished or apartment with furniture.
    /// Where no model is named, models/furnished-tiny is taken for furniture.
    #[arg(long, default_value = "plain", value_name = "NAME")]
    difficulty: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    view: ViewArgs,
    #[command(flatten)]
    report: ReportArgs,
}

/// File names in `--out`.
const PICTURE: &str = "imagination.png";
const RECORDING: &str = "demo.mcap";
/// Camera frames per second of the simulated robot.
const RATE_HZ: f64 = 30.0;
/// Picture size of its camera.
const CAMERA: (usize, usize) = (96, 64);
/// Longest drive to a goal, seconds of simulated time.
const DRIVE_MAX_SECS: f64 = 60.0;
/// The robot has arrived when it sees the object and its edge is at most this far away, metres.
const ARRIVED_M: f64 = 1.2;

/// The robot's side: body, camera, publishers.
struct Robot {
    house: world::House,
    body: world::Robot,
    camera: world::Camera,
    frame: world::Frame,
    began: Timestamp,
    ticks: u64,
    image: Publisher<Image>,
    info: Publisher<CameraInfo>,
    odom: Publisher<Odometry>,
    tf: Publisher<TFMessage>,
    fast: bool,
    wall: Instant,
    driven: Vec<Pose2>,
}

fn planar(p: world::Pose2) -> Pose2 {
    Pose2::new(p.x, p.y, p.yaw)
}

/// `base_from_camera` of the simulated camera.
fn mounting(camera: &world::Camera) -> Isometry3<f64> {
    let (r, t) = camera.base_from_camera();
    let rotation = Rotation3::from_matrix_unchecked(Matrix3::from_fn(|i, j| r[i][j]));
    Isometry3::from_parts(
        Translation3::new(t[0], t[1], t[2]),
        UnitQuaternion::from_rotation_matrix(&rotation),
    )
}

impl Robot {
    fn new(
        session: &RosSession,
        args: &DemoArgs,
        house: world::House,
        start: world::Pose2,
    ) -> anyhow::Result<Self> {
        let sensor = Qos::SENSOR_DATA;
        Ok(Self {
            body: world::Robot::new(start, world::OdometryNoise::typical(), args.seed),
            house,
            camera: world::Camera::new(CAMERA.0, CAMERA.1),
            frame: world::Frame::new(),
            began: clock::now(),
            ticks: 0,
            image: session.publisher("/camera/image_raw", &sensor)?,
            info: session.publisher("/camera/camera_info", &sensor)?,
            odom: session.publisher("/odom", &sensor)?,
            tf: session.publisher("/tf", &sensor)?,
            fast: args.fast,
            wall: Instant::now(),
            driven: Vec::new(),
        })
    }

    fn stamp(&self) -> Timestamp {
        self.began + TimeDelta::from_secs_f64(self.ticks as f64 / RATE_HZ)
    }

    /// Moves for one camera period, then publishes odometry, tf and a picture.
    fn tick(&mut self, v: f64, w: f64, node: &Node, stop: &AtomicBool) -> anyhow::Result<()> {
        if stop.load(Ordering::Relaxed) {
            bail!("stopped");
        }
        self.body.step(&self.house, v, w, 1.0 / RATE_HZ);
        self.ticks += 1;
        let stamp = self.stamp();
        let pose = planar(self.body.odom);
        let header = Header::new(stamp, "odom");
        self.odom.publish(&Odometry {
            header,
            child_frame_id: "base_link".into(),
            pose: PoseWithCovariance { pose: Pose::from_pose2(pose), ..PoseWithCovariance::default() },
            ..Odometry::default()
        })?;
        let transform = TransformStamped::new(stamp, "odom", "base_link", &planar_isometry(pose));
        self.tf.publish(&TFMessage { transforms: vec![transform] })?;
        world::render(&self.house, self.body.pose, &self.camera, &mut self.frame);
        let header = Header::new(stamp, "camera_optical_frame");
        let (width, height) = (self.camera.width as u32, self.camera.height as u32);
        let [fx, fy, cx, cy] = self.camera.intrinsics();
        self.info.publish(&CameraInfo {
            header: header.clone(),
            width,
            height,
            distortion_model: "plumb_bob".into(),
            d: vec![0.0; 5],
            k: [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0],
            r: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
            p: [fx, 0.0, cx, 0.0, 0.0, fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0],
            ..CameraInfo::default()
        })?;
        self.image.publish(&Image {
            header,
            width,
            height,
            encoding: "rgb8".into(),
            step: width * 3,
            data: self.frame.rgb.clone(),
            ..Image::default()
        })?;
        self.driven.push(planar(self.body.pose));
        if self.fast {
            // No faster than the runtime takes it in: nothing may be dropped for speed alone.
            let waited = Instant::now();
            while node.counts().context.offered < self.ticks && waited.elapsed() < Duration::from_secs(2) {
                std::thread::sleep(Duration::from_micros(200));
            }
        } else {
            let due = Duration::from_secs_f64(self.ticks as f64 / RATE_HZ);
            std::thread::sleep(due.saturating_sub(self.wall.elapsed()));
        }
        Ok(())
    }
}

/// What the runtime showed of its work on the goal.
#[derive(Default)]
struct Shown {
    evidence: Option<Box<Grounded>>,
    scene: Option<Scene>,
}

/// How far the runtime's work on the goal has come.
enum Work {
    Bar((&'static str, usize, usize)),
    Answered(Box<Answer>),
}

/// Both sides, running: the simulated robot, and the runtime that hears it.
struct Demo {
    session: RosSession,
    robot: Robot,
    node: Node,
    recorder: Recorder,
    beside: Recorder,
    channels: Channels,
    ask: Publisher<StringMsg>,
    goals: Subscriber<PoseStamped>,
    events: Receiver<Work>,
    shown: Arc<Mutex<Shown>>,
    stop: Arc<AtomicBool>,
    /// Latched: it has to live as long as the robot.
    _static_tf: Publisher<TFMessage>,
}

/// What happened between the first picture and the end of the drive.
struct Story {
    asked_at: world::Pose2,
    goal: String,
    /// Index of the object that is meant, in the house.
    object: Option<usize>,
    answer: Box<Answer>,
    /// The true goal pose.
    truth: Option<world::Pose2>,
    /// Length of [`Robot::driven`] when the goal was asked.
    driven_before: usize,
    /// A goal pose came.
    went: bool,
    arrived: bool,
}

impl Story {
    /// Distance (metres) and heading (degrees) between answer and truth.
    fn error(&self) -> Option<(f64, f64)> {
        let estimate = self.answer.pose.as_ref().map(|p| p.pose2());
        estimate.zip(self.truth).map(|(got, want)| {
            let heading = wrap_angle(got.yaw - want.yaw).abs().to_degrees();
            (got.distance(planar(want)), heading)
        })
    }
}

pub fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let Some(difficulty) = world::Difficulty::named(&args.difficulty) else {
        bail!("--difficulty {:?}: known are {}", args.difficulty, world::Difficulty::NAMES.join(", "));
    };
    let stop = stop_flag()?;
    let mut progress = ProgressBar::new(args.json);
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let pipeline = args.model.load_or(if difficulty.furnished { SHIPPED_FURNISHED } else { SHIPPED })?;
    progress.line(&format!(
        "model {} from {}",
        pipeline.bundle().manifest().name,
        pipeline.bundle().directory().display()
    ));

    let house = world::House::generate(args.seed, &difficulty);
    let mut rng = world::Rng::new(args.seed);
    let sweep = world::exploration_drive(&house, &mut rng, SWEEP);
    progress.line(&format!("house {}: {}", args.seed, described(&house)));

    let page = args.view.open("sim", Some(&pipeline))?;
    let report = args.report.open("sim", Some(&pipeline))?;
    let mut demo = Demo::new(args, house, sweep[0], &pipeline, stop, (&page, &report))?;
    let story = demo.play(args.goal.as_deref(), &sweep, &mut rng, &mut progress);
    if (page.is_open() || demo.channels.is_live()) && story.is_ok() {
        progress.line(if page.is_open() {
            "the page stays open: ask there, the robot drives; Ctrl-C ends"
        } else {
            "Foxglove's channels stay open; Ctrl-C ends"
        });
        demo.stay(&mut progress)?;
    }
    // Whatever happened, everybody leaves in order and the recording is closed: what was recorded is kept.
    let Demo { session, robot, node, recorder, beside, channels, goals, shown, .. } = demo;
    drop(goals); // before its publisher goes, which would warn of a subscriber without one
    node.stop();
    drop(channels); // what they have left to record
    // Whatever is still on its way is not waited for.
    let _ = session.close();
    let (recorded, beside) = (recorder.finish(), beside.finish());
    let recording = args.out.join(RECORDING);
    let story = match story {
        Ok(story) => story,
        Err(error) => {
            if let Ok(messages) = recorded {
                progress.line(&format!("kept {} ({messages} messages)", recording.display()));
            }
            return Err(error);
        }
    };

    let shown = std::mem::take(&mut *shown.lock().unwrap_or_else(PoisonError::into_inner));
    let picture = args.out.join(PICTURE);
    let painted = paint(&picture, &robot, &story, shown);
    progress.line(match (story.arrived, story.went) {
        (true, _) => "arrived: the robot stands before it and sees it",
        (false, true) => "not arrived: it is not in view, or too far away",
        (false, false) => "the robot stayed where it was",
    });
    let schemas = Recorder::beside(&recording);
    if let (Ok(()), Ok(messages), Ok(_)) = (&painted, &recorded, &beside) {
        let [picture, recording, schemas] = [&picture, &recording, &schemas].map(|path| path.display());
        progress.line(&format!("wrote {picture}, {recording} ({messages} messages) and {schemas}"));
    }
    let reported = report.write(|| facts(args, &story, &pipeline));
    if let Ok(Some(path)) = &reported {
        progress.line(&format!("wrote {}", path.display()));
    }
    let written = [(painted.is_ok(), &picture), (recorded.is_ok(), &recording), (beside.is_ok(), &schemas)];
    conclude(args, &robot.house, &story, &written)?;
    // The answer is out; what could not be written is a failure all the same.
    recorded?;
    beside?;
    painted?;
    reported?;
    Ok(if story.answer.status == Status::Failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The last words: the answer beside the truth, or the document with the files that were written.
fn conclude(
    args: &DemoArgs,
    house: &world::House,
    story: &Story,
    written: &[(bool, &PathBuf)],
) -> anyhow::Result<()> {
    if !args.json {
        return say_truth(house, story);
    }
    let files: Vec<String> =
        written.iter().filter(|(there, _)| *there).map(|(_, path)| path.display().to_string()).collect();
    say(&document(args.seed, house, story, &files).to_string())
}

/// "one room with red chair, ..."
fn described(house: &world::House) -> String {
    let names: Vec<&str> = house.objects.iter().map(|o| o.name.as_str()).collect();
    let rooms = match house.rooms.len() {
        1 => "one room".to_owned(),
        n => format!("{n} rooms"),
    };
    format!("{rooms} with {}", names.join(", "))
}

/// What the report says of how it came about.
#[cfg(feature = "view")]
fn facts(args: &DemoArgs, story: &Story, pipeline: &Pipeline) -> super::view::Facts {
    let row = |name: &str, value: String| (name.to_owned(), value);
    let error = story.error().map(|(metres, degrees)| format!("{metres:.2} m, {degrees:.0}°"));
    let mut question = vec![
        row("goal", story.goal.clone()),
        row("seed", args.seed.to_string()),
        row("difficulty", args.difficulty.clone()),
        row("answer", story.answer.to_json()),
        row("off the truth by", error.unwrap_or_else(|| "not known: no pose, or no such thing".into())),
        row("arrived", if story.arrived { "yes" } else { "no" }.into()),
    ];
    question
        .push(row("repeatable", "the robot drives in real time: another run may see other pictures".into()));
    let mut tables = vec![("Question".to_owned(), question)];
    tables.extend(super::facts::program(Some(pipeline)));
    tables
}

#[cfg(not(feature = "view"))]
fn facts(_: &DemoArgs, _: &Story, _: &Pipeline) -> super::view::Facts {
    Vec::new()
}

/// The story as one JSON document.
fn document(seed: u64, house: &world::House, story: &Story, files: &[String]) -> serde_json::Value {
    let named = story.object.map(|i| &house.objects[i]);
    serde_json::json!({
        "seed": seed,
        "goal": story.goal,
        "answer": story.answer,
        "truth": {
            "object": named.map(|o| serde_json::json!({"name": o.name, "x": o.x, "y": o.y})),
            "pose": story.truth.map(|p| serde_json::json!({"x": p.x, "y": p.y, "yaw": p.yaw})),
        },
        "error": story.error().map(|(m, deg)| serde_json::json!({"position_m": m, "heading_deg": deg})),
        "arrived": story.arrived,
        "files": files,
    })
}

/// The truth, and how far the answer is from it.
fn say_truth(house: &world::House, story: &Story) -> anyhow::Result<()> {
    match (story.object.map(|i| &house.objects[i]), story.truth) {
        (Some(o), Some(p)) => say(&format!(
            "truth: the {} is at x {:.2} m, y {:.2} m; stand at x {:.2} m, y {:.2} m, yaw {:.0}°",
            o.name,
            o.x,
            o.y,
            p.x,
            p.y,
            p.yaw.to_degrees()
        ))?,
        (Some(o), None) => say(&format!("truth: the {} is there, but nobody can stand before it", o.name))?,
        (None, _) => say("truth: there is no such thing in this house")?,
    }
    if let Some((metres, degrees)) = story.error() {
        let arrived = if story.arrived { "yes" } else { "no" };
        say(&format!("error: {metres:.2} m, {degrees:.0}°; arrived: {arrived}"))?;
    }
    Ok(())
}

impl Demo {
    /// Two nodes on one in-process Zenoh session: the robot at `start`, and the runtime.
    fn new(
        args: &DemoArgs,
        house: world::House,
        start: world::Pose2,
        pipeline: &Pipeline,
        stop: Arc<AtomicBool>,
        (page, report): (&Page, &Report),
    ) -> anyhow::Result<Self> {
        let session = RosSession::open(&RosConfig::in_process("simulated_robot"))?;
        let runtime_side = session.another_node("mindseye", "/")?;
        let recorder = Recorder::start(&args.out.join(RECORDING))?;
        let static_tf = session.publisher::<TFMessage>("/tf_static", &Qos::latched(1))?;
        let ask = session.publisher::<StringMsg>("/mindseye/goal/text", &Qos::default())?;
        let goals = session.subscriber::<PoseStamped>("/goal_pose", &Qos::default(), QueuePolicy::Latest)?;
        let robot = Robot::new(&session, args, house, start)?;
        let shown: Arc<Mutex<Shown>> = Arc::default();
        let (events_in, events) = channel();
        let observed = shown.clone();
        let beside = Recorder::start_beside(&args.out.join(RECORDING))?;
        let channels = args.view.channels(beside.sender(), "odom")?;
        let viewed = both(both(page.observer(), report.observer()), channels.observer());
        let mut config = RobotConfig { robot: "sim".into(), ..RobotConfig::default() };
        config.context.frozen_after_ms = 0; // while it stands, a camera without noise shows the same to the bit
        let parts = NodeParts {
            config,
            mind: pipeline.mind(args.seed)?,
            encoder: pipeline.encoder()?,
            record: recorder.sender(),
            observer: Some(Box::new(move |event| {
                viewed.iter().for_each(|observer| observer(event));
                // The demo's own end of the channel may be gone already.
                let _ = match event {
                    NodeEvent::Evidence(grounded) => {
                        let evidence = Some(Box::new(grounded.clone()));
                        observed.lock().unwrap_or_else(PoisonError::into_inner).evidence = evidence;
                        Ok(())
                    }
                    NodeEvent::Stage(stage @ (Stage::Scan(..) | Stage::Step { .. })) => {
                        events_in.send(Work::Bar(stage.bar()))
                    }
                    NodeEvent::Answered(answer) => events_in.send(Work::Answered(Box::new(answer.clone()))),
                    _ => Ok(()),
                };
            })),
        };
        let node = Node::start(&runtime_side, parts)?;
        page.serve(&node);
        if !robot.image.wait_for_subscribers(Duration::from_secs(5)) {
            bail!("the runtime's subscription did not appear on the in-process session");
        }
        let mount = mounting(&robot.camera);
        let mount = TransformStamped::new(robot.began, "base_link", "camera_optical_frame", &mount);
        static_tf.publish(&TFMessage { transforms: vec![mount] })?;
        let _static_tf = static_tf;
        Ok(Self {
            session,
            robot,
            node,
            recorder,
            beside,
            channels,
            ask,
            goals,
            events,
            shown,
            stop,
            _static_tf,
        })
    }

    /// Stands, and drives to whatever goal poses come, until it is stopped.
    fn stay(&mut self, progress: &mut ProgressBar) -> anyhow::Result<()> {
        let Self { robot, node, stop, goals, .. } = self;
        while !stop.load(Ordering::Relaxed) {
            robot.tick(0.0, 0.0, node, stop)?;
            if robot.fast {
                std::thread::sleep(Duration::from_secs_f64(1.0 / RATE_HZ));
            }
            if let Some(goal) = goals.try_recv()? {
                let driven = drive(robot, goal_in_plane(&goal.message.pose)?, node, stop, progress);
                if !stop.load(Ordering::Relaxed) {
                    driven?;
                }
            }
        }
        Ok(())
    }

    /// Explores along `sweep`, asks for `goal` (or something of its own choice), and drives to the pose that comes
    /// over `/goal_pose`.
    fn play(
        &mut self,
        goal: Option<&str>,
        sweep: &[world::Pose2],
        rng: &mut world::Rng,
        progress: &mut ProgressBar,
    ) -> anyhow::Result<Story> {
        let Self { robot, node, stop, .. } = self;
        robot.wall = Instant::now();
        explore(robot, sweep, node, stop, progress)?;
        let counts = node.counts();
        progress.line(&format!(
            "explored: {} frames seen, {} kept, {} latents in memory, {} dropped",
            counts.context.offered, counts.context.kept, counts.latents, counts.camera_dropped
        ));

        // The robot goes on publishing while the runtime thinks.
        let asked_at = robot.body.pose;
        let (goal, meant) = choose_goal(robot, goal, rng);
        progress.line(&format!("asking: \"{goal}\""));
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).scene = node.context().scene();
        let driven_before = robot.driven.len();
        self.ask.publish(&StringMsg { data: goal.clone() })?;
        let answer = wait_for_answer(robot, node, stop, &self.events, progress)?;
        progress.line(&super::goal::in_words(&answer).replace('\n', "\n          "));

        let object = answered(&robot.house, asked_at, &meant, &answer);
        let truth = object.and_then(|i| world::goal_pose(&robot.house, asked_at, i));
        let received = if answer.status == Status::Found {
            let received = self.goals.recv_timeout(Duration::from_secs(2))?;
            received.map(|r| goal_in_plane(&r.message.pose)).transpose()?
        } else {
            None
        };
        if let Some(target) = received {
            drive(robot, target, node, stop, progress)?;
        }
        let arrived = received.is_some() && object.is_some_and(|i| stands_before(robot, i));
        Ok(Story { asked_at, goal, object, answer, truth, driven_before, went: received.is_some(), arrived })
    }
}

/// Follows the sweep: turns and drives as its poses do, three camera frames per pose.
fn explore(
    robot: &mut Robot,
    sweep: &[world::Pose2],
    node: &Node,
    stop: &AtomicBool,
    progress: &mut ProgressBar,
) -> anyhow::Result<()> {
    const FRAMES_PER_POSE: usize = 3;
    let dt = FRAMES_PER_POSE as f64 / RATE_HZ;
    for (i, next) in sweep.iter().enumerate().skip(1) {
        // A differential drive cannot slide sideways: it takes the part of the way that lies ahead.
        let here = robot.body.pose;
        let way = here.relative(*next);
        let v = (way.x / dt).clamp(-0.6, 0.6);
        let w = wrap_angle(next.yaw - here.yaw) / dt;
        for _ in 0..FRAMES_PER_POSE {
            robot.tick(v, w, node, stop)?;
        }
        progress.bar("explore", i, sweep.len() - 1);
    }
    // Stand still until the newest kept frame shows where the robot stands.
    for _ in 0..2 * FRAMES_PER_POSE {
        robot.tick(0.0, 0.0, node, stop)?;
    }
    Ok(())
}

/// The text to ask with, and which objects it may mean.
fn choose_goal(robot: &Robot, given: Option<&str>, rng: &mut world::Rng) -> (String, Vec<usize>) {
    let objects = &robot.house.objects;
    if let Some(text) = given {
        return (text.to_owned(), meant_by(&robot.house, text));
    }
    let mut order: Vec<usize> = (0..objects.len()).collect();
    rng.shuffle(&mut order);
    let reachable = |i: &usize| world::goal_pose(&robot.house, robot.body.pose, *i).is_some();
    let unseen = |i: &usize| world::visible_fraction(&robot.house, robot.body.pose, &robot.camera, *i) < 0.05;
    let chosen = order
        .iter()
        .find(|i| reachable(i) && unseen(i))
        .or_else(|| order.iter().find(|i| reachable(i)))
        .or(order.first());
    match chosen {
        Some(i) => (format!("find the {}", objects[*i].name), vec![*i]),
        None => ("find the red chair".into(), Vec::new()),
    }
}

/// The objects that a text may mean: the one that it names in full; where it names none so, and only a kind or only a colour,
/// all that are of it.
fn meant_by(house: &world::House, text: &str) -> Vec<usize> {
    let said = text.to_lowercase();
    let words: Vec<&str> = said.split(|c: char| !c.is_alphanumeric()).collect();
    let of = |means: &dyn Fn(&world::Object) -> bool| -> Vec<usize> {
        (0..house.objects.len()).filter(|i| means(&house.objects[*i])).collect()
    };
    let named = of(&|o| o.name.split(' ').all(|word| words.contains(&word)));
    if !named.is_empty() {
        return named;
    }
    let colours = world::Colour::ALL.iter().filter(|c| words.contains(&c.name())).count();
    let kinds = world::Shape::ALL.iter().filter(|k| words.contains(&k.name())).count();
    if colours + kinds != 1 {
        return Vec::new();
    }
    of(&|o| words.contains(&o.colour.name()) || words.contains(&o.shape.name()))
}

/// Which of the objects that were meant an answer is of: the one whose goal pose is nearest, or the first where there is no
/// pose.
fn answered(house: &world::House, asked_at: world::Pose2, meant: &[usize], answer: &Answer) -> Option<usize> {
    let Some(pose) = answer.pose.as_ref().map(|p| p.pose2()) else { return meant.first().copied() };
    let off = |i: usize| {
        let goal = world::goal_pose(house, asked_at, i);
        goal.map_or(f64::INFINITY, |goal| (goal.x - pose.x).hypot(goal.y - pose.y))
    };
    meant.iter().copied().min_by(|a, b| off(*a).total_cmp(&off(*b)))
}

fn wait_for_answer(
    robot: &mut Robot,
    node: &Node,
    stop: &AtomicBool,
    events: &Receiver<Work>,
    progress: &mut ProgressBar,
) -> anyhow::Result<Box<Answer>> {
    let began = Instant::now();
    loop {
        while let Ok(event) = events.try_recv() {
            match event {
                Work::Bar((what, done, of)) => progress.bar(what, done, of),
                Work::Answered(answer) => return Ok(answer),
            }
        }
        if began.elapsed() > Duration::from_secs(60) {
            bail!("no answer within 60 s");
        }
        robot.tick(0.0, 0.0, node, stop)?;
        if robot.fast {
            std::thread::sleep(Duration::from_secs_f64(1.0 / RATE_HZ));
        }
    }
}

/// A goal pose as the controller takes it.
fn goal_in_plane(pose: &Pose) -> anyhow::Result<world::Pose2> {
    let pose = pose.isometry()?;
    let (t, forward) = (pose.translation, pose.rotation * nalgebra::Vector3::x());
    Ok(world::Pose2::unwrapped(t.x, t.y, forward.y.atan2(forward.x)))
}

/// Drives by the robot's own odometry until the controller is content.
fn drive(
    robot: &mut Robot,
    target: world::Pose2,
    node: &Node,
    stop: &AtomicBool,
    progress: &mut ProgressBar,
) -> anyhow::Result<()> {
    let limits = world::ControllerLimits::default();
    let mut controller = world::Controller::new(&robot.house, robot.body.odom, target, limits);
    if controller.state() == world::ControllerState::NoPath {
        progress.line("the robot's controller knows no way to that pose");
        return Ok(());
    }
    let start = robot.body.odom.distance(target).max(0.01);
    for _ in 0..(DRIVE_MAX_SECS * RATE_HZ) as usize {
        let (v, w) = controller.step(robot.body.odom, 1.0 / RATE_HZ);
        robot.tick(v, w, node, stop)?;
        let left = robot.body.odom.distance(controller.goal());
        let done = (100.0 * (1.0 - left / start)).clamp(0.0, 99.0) as usize;
        if controller.done() {
            progress.bar("drive", 100, 100);
            break;
        }
        progress.bar("drive", done, 100);
    }
    Ok(())
}

/// Whether the robot sees the object and stands near it.
fn stands_before(robot: &Robot, object: usize) -> bool {
    let o = &robot.house.objects[object];
    let pose = robot.body.pose;
    let edge = o.distance(pose.x, pose.y);
    let seen = world::visible_fraction(&robot.house, pose, &robot.camera, object);
    edge <= ARRIVED_M && seen >= 0.2
}

/// The picture of the story: what was remembered, what was imagined, and where the robot drove.
fn paint(path: &Path, robot: &Robot, story: &Story, shown: Shown) -> anyhow::Result<()> {
    let Shown { evidence, scene } = shown;
    let Story { goal, asked_at, driven_before, answer, truth, arrived, .. } = story;
    let evidence = evidence.map(|e| *e);
    let context: Vec<RgbImage> = match (&evidence, &scene) {
        (Some(e), Some(s)) => {
            e.used.iter().filter_map(|i| s.memory.get(*i)).map(|c| c.picture.clone()).collect()
        }
        _ => Vec::new(),
    };
    let moved = robot.driven.len() > *driven_before && answer.status == Status::Found;
    let mut said = answer.status.to_string();
    if let Some(total) = answer.timings_ms.get("total") {
        said += &format!(" in {:.2} s", total / 1000.0);
    }
    if let Some((metres, degrees)) = story.error() {
        said += &format!(", {metres:.2} m and {degrees:.0} degrees from the truth");
    }
    if moved {
        said += if *arrived { ", arrived" } else { ", not arrived" };
    }
    let mut lines = vec![said];
    if let Some(reason) = &answer.reason {
        lines.push(reason.clone());
    }
    let mut real = world::Frame::new();
    let large = world::Camera::new(VIEW.0, VIEW.1);
    world::render_with(&robot.house, robot.body.pose, &large, world::RenderOptions::picture(), &mut real);
    let view = RgbImage::from_rgb(large.width, large.height, real.rgb);
    let studied = scene.as_ref().and_then(|s| s.studied.landmarks.as_ref());
    let landmarks: Vec<(f64, f64)> =
        studied.iter().flat_map(|m| m.landmarks()).map(|l| (l.position.x, l.position.y)).collect();
    let picture = draw(&Picture {
        goal,
        lines: &lines,
        remembered: scene.as_ref().map_or(0, |s| s.memory.len()),
        context: &context,
        imagined: evidence.as_ref().map_or(&[], |e| e.shown()),
        found_box: evidence.as_ref().and_then(|e| {
            let finer = e.shown().first()?.width as f64 / e.frames.first()?.width.max(1) as f64;
            Some(e.found_box?.edges().map(|edge| edge * finer))
        }),
        view: view.as_ref(),
        moved,
        house: &robot.house,
        asked_at: planar(*asked_at),
        driven: &robot.driven[(*driven_before).min(robot.driven.len())..],
        path: evidence.as_ref().map_or(&[], |e| e.path.as_slice()),
        answer: answer.pose.as_ref().map(|p| p.pose2()),
        truth: truth.map(planar),
        object: evidence.as_ref().and_then(|e| e.object),
        landmarks: &landmarks,
        registered: evidence.as_ref().map_or(&[], |e| e.registered.as_slice()),
    })
    .context("the picture has no size")?;
    picture.save_png(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_means_what_it_names_or_all_that_are_of_its_kind_or_colour() {
        let house = world::House::generate(10, &world::Difficulty::plain());
        let names = |text: &str| -> Vec<&str> {
            meant_by(&house, text).into_iter().map(|i| house.objects[i].name.as_str()).collect()
        };
        assert_eq!(names("Find the yellow CONE!"), ["yellow cone"]);
        assert_eq!(names("find the cone"), ["yellow cone"]);
        assert_eq!(names("the blue one"), ["blue box"]);
        for absent in ["find the yellow bed", "find the lamp", "go there", "find the red or blue lamp"] {
            assert!(names(absent).is_empty(), "{absent}: {:?}", names(absent));
        }
        // Of several the one that was answered.
        let all: Vec<usize> = (0..house.objects.len()).collect();
        let here = world::Pose2::default();
        let mut answer = Answer::new("g", Status::Found, None);
        assert_eq!(answered(&house, here, &all, &answer), Some(0));
        for i in all.iter().copied() {
            let Some(goal) = world::goal_pose(&house, here, i) else { continue };
            let pose = Pose2::new(goal.x + 0.1, goal.y, goal.yaw);
            answer.pose = Some(mindseye_bridge::answer::FramedPose2::new("odom", pose));
            assert_eq!(answered(&house, here, &all, &answer), Some(i));
        }
        assert_eq!(answered(&house, here, &[], &answer), None);
    }
}
