//! `mindseye-tools eval`: success rates on houses that training never saw, through the same code as the robot's.
//!
//! # Figures
//! * **goal**: heading and place of the answer's pose against the pose at the stand-off from the named object; what
//!   each witness alone would have said stands beside it.
//! * **IF** (instruction following): the red box found in the last imagined frames has its centre within 0.6 of
//!   the half size of the image (`|x - W/2| <= 0.6 W/2`, the same for y), and those frames are nearer (mean
//!   squared difference) to the true view of the named object than to that of any other object of the house.
//! * **arrival**: a simulated robot drives to the pose of a `found` answer; it has arrived when the named object is in
//!   its view and the object's edge is within 1 m, or within 1.2 m in the second figure (drives in training end 1.2 m
//!   from the object's centre, which leaves up to 1 m to the edge). **SPL** weighs the first by shortest over driven path.
//! * **absent**: the same houses, asked for a thing that they do not have; **AUC** compares the largest mask logit.
//!
//! Intervals are 95 % (Wilson for shares, bootstrap for medians).

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use mindseye::context::{ContextLatent, GROUP, GroupEncoder, LatentInfo};
use mindseye::ground::{Grounded, Mind, Scene, ground};
use mindseye::image::RgbImage;
use mindseye::imagine::{Budget, Flow, NoClock, Prompt, Seen, imagine};
use mindseye::mind::{Pipeline, find_bundle};
use mindseye_bridge::answer::Status;
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_bridge::time::Timestamp;
use mindseye_world::{
    Camera, Controller, ControllerLimits, Difficulty, Frame, House, OdometryNoise, Pose2, RenderOptions, Rng,
    Robot, draw_box, exploration_sweep, goal_pose, project_box, random_drive_from, render_with, wrap_angle,
};
use serde::Serialize;

/// Arguments of `eval`.
#[derive(clap::Args, Debug)]
pub struct EvalArgs {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(clap::Subcommand, Debug)]
enum EvalCommand {
    /// Go to named objects.
    #[command(after_help = "Examples: mindseye-tools eval grounding --houses 200 --seed 900000 --json\n\
                            \x20         mindseye-tools eval grounding --absent --houses 50 --json")]
    Grounding(GroundingArgs),
    /// Drive along given poses.
    #[command(after_help = "Example: mindseye-tools eval navigation --houses 100 --seed 900000 --json")]
    Navigation(CommonArgs),
}

#[derive(clap::Args, Debug, Clone)]
struct CommonArgs {
    /// Bundle to evaluate; the shipped one when left out.
    #[arg(long)]
    bundle: Option<PathBuf>,
    /// Number of houses.
    #[arg(long, default_value_t = 200)]
    houses: usize,
    /// Seed of the first house; training draws its own from the whole range at random.
    #[arg(long, default_value_t = 900_000)]
    seed: u64,
    /// Difficulty of the world.
    #[arg(long, default_value = "plain")]
    difficulty: String,
    /// Backend.
    #[arg(long, default_value = "rten")]
    backend: String,
    /// Houses evaluated at the same time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Denoising steps instead of the bundle's.
    #[arg(long)]
    steps: Option<usize>,
    /// Guidance instead of the bundle's; 1 is none.
    #[arg(long)]
    guidance: Option<f32>,
    /// One JSON document on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Debug, Clone)]
struct GroundingArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Ask for things that are not there, and report how often a pose is given all the same.
    #[arg(long)]
    absent: bool,
    /// Control: the context is that of another house.
    #[arg(long)]
    wrong_room: bool,
    /// Candidates per goal instead of the runtime's.
    #[arg(long)]
    candidates: Option<u32>,
    /// Measure the `[lift]` table on these houses and write it into this bundle directory.
    #[arg(long)]
    calibrate: Option<PathBuf>,
    /// Write a picture of the first houses' imaginations.
    #[arg(long)]
    sheet: Option<PathBuf>,
}

/// Runs `eval`.
///
/// # Errors
/// A bundle that cannot be loaded, an unknown difficulty or backend.
pub fn run(args: EvalArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        EvalCommand::Grounding(args) => grounding(&args),
        EvalCommand::Navigation(args) => navigation(&args),
    }
}

/// A house as the robot knows it after looking around once.
struct Visit {
    house: House,
    memory: Vec<ContextLatent>,
    newest: RgbImage,
    here: Pose2,
    rng: Rng,
}

fn picture(house: &House, pose: Pose2, camera: &Camera, frame: &mut Frame) -> RgbImage {
    render_with(house, pose, camera, RenderOptions::rgb_only(), frame);
    RgbImage { width: camera.width, height: camera.height, data: frame.rgb.clone() }
}

fn plain_pose(p: Pose2) -> mindseye::planar::Pose2 {
    mindseye::planar::Pose2::new(p.x, p.y, p.yaw)
}

fn visit(
    seed: u64,
    difficulty: &Difficulty,
    camera: &Camera,
    encoder: &mut dyn GroupEncoder,
    images: usize,
) -> anyhow::Result<Visit> {
    let house = House::generate(seed, difficulty);
    let mut rng = Rng::new(seed ^ 0x0e7a1);
    let sweep = exploration_sweep(&house, &mut rng, images);
    let mut frame = Frame::new();
    let mut memory = Vec::new();
    for k in 1..=(sweep.len() - 1) / GROUP {
        let frames: Vec<RgbImage> = sweep[GROUP * k - 3..=GROUP * k]
            .iter()
            .map(|p| picture(&house, *p, camera, &mut frame))
            .collect();
        let mut latent = vec![0.0; encoder.latent_len()];
        encoder.encode_group(&frames, &mut latent)?;
        let info = LatentInfo {
            index: k as u64,
            segment: 0,
            captured_at: stamp(GROUP * k),
            odom_from_base: Some(plain_pose(sweep[GROUP * k])),
        };
        let last = frames.into_iter().next_back().context("a group has frames")?;
        memory.push(ContextLatent { info, latent, picture: last });
    }
    let here = sweep[sweep.len() - 1];
    let newest = picture(&house, here, camera, &mut frame);
    Ok(Visit { house, memory, newest, here, rng })
}

fn stamp(image: usize) -> Timestamp {
    Timestamp(1_700_000_000_000_000_000 + image as i64 * 100_000_000)
}

/// One goal's outcome.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    house: u64,
    goal: String,
    status: Status,
    consistency: Option<f64>,
    /// Heading (degrees) and place (m) of the answer's pose.
    answer: Option<[f64; 2]>,
    plan: Option<[f64; 2]>,
    memory: Option<[f64; 2]>,
    drive: Option<[f64; 2]>,
    /// Object's place errors of the witnesses (m): plan, memory, drive.
    object: [Option<f64>; 3],
    in_ellipse_90: Option<bool>,
    heading_std_deg: Option<f64>,
    box_centred: bool,
    instruction_followed: bool,
    arrived: bool,
    arrived_within_1_2_m: bool,
    spl: f64,
    mask_max: f64,
    disagreement: Option<f64>,
    localisation_m: Option<f64>,
    distance_m: f64,
    visible_at_start: bool,
    ms: f64,
}

/// A colour and shape that the house does not have together.
fn absent_name(house: &House, rng: &mut Rng) -> String {
    use mindseye_world::{Colour, Shape};
    loop {
        let name = format!("{} {}", Colour::ALL[rng.below(6)].name(), Shape::ALL[rng.below(8)].name());
        if house.find(&name).is_none() {
            return name;
        }
    }
}

struct Bench {
    pipeline: Pipeline,
    difficulty: Difficulty,
    camera: Camera,
    images: usize,
}

impl Bench {
    fn new(args: &CommonArgs) -> anyhow::Result<Self> {
        let directory = find_bundle(args.bundle.as_deref(), |v| std::env::var(v).ok())?;
        let pipeline = Pipeline::load(&directory, &args.backend, 1)?;
        let Some(difficulty) = Difficulty::named(&args.difficulty) else {
            bail!("unknown difficulty {:?}; known: plain, house", args.difficulty);
        };
        if args.houses == 0 || args.jobs == 0 {
            bail!("--houses and --jobs must be at least 1");
        }
        let image = &pipeline.bundle().manifest().image;
        let camera = Camera::new(image.width, image.height);
        Ok(Self { pipeline, difficulty, camera, images: 97 })
    }

    /// Calls `f` for every house, `jobs` at a time; results in the order of houses.
    fn each<T: Send>(
        &self,
        args: &CommonArgs,
        f: impl Fn(&mut dyn Mind, &mut dyn GroupEncoder, u64) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let next = AtomicUsize::new(0);
        let parts: Vec<anyhow::Result<Vec<(usize, T)>>> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..args.jobs)
                .map(|_| {
                    scope.spawn(|| {
                        let mut mind = self.pipeline.mind(0)?;
                        let mut encoder = self.pipeline.encoder()?;
                        let mut out = Vec::new();
                        loop {
                            let i = next.fetch_add(1, Ordering::Relaxed);
                            if i >= args.houses {
                                return Ok(out);
                            }
                            out.push((i, f(mind.as_mut(), encoder.as_mut(), args.seed + i as u64)?));
                        }
                    })
                })
                .collect();
            handles.into_iter().map(|h| h.join().expect("an evaluation thread panicked")).collect()
        });
        let mut all = Vec::new();
        for part in parts {
            all.extend(part?);
        }
        all.sort_by_key(|(i, _)| *i);
        Ok(all.into_iter().map(|(_, t)| t).collect())
    }
}

struct Ask<'a> {
    args: &'a GroundingArgs,
    absent: bool,
}

fn one_goal(
    bench: &Bench,
    ask: &Ask,
    mind: &mut dyn Mind,
    encoder: &mut dyn GroupEncoder,
    seed: u64,
) -> anyhow::Result<(Outcome, Grounded, RgbImage)> {
    let mut v = visit(seed, &bench.difficulty, &bench.camera, encoder, bench.images)?;
    let object = v.rng.below(v.house.objects.len());
    let name =
        if ask.absent { absent_name(&v.house, &mut v.rng) } else { v.house.objects[object].name.clone() };
    let memory = if ask.args.wrong_room {
        visit(seed ^ 0x5ca1_ab1e, &bench.difficulty, &bench.camera, encoder, bench.images)?.memory
    } else {
        v.memory.clone()
    };
    let scene = Scene {
        memory,
        newest: v.newest.clone(),
        captured_at: stamp(bench.images - 1),
        odom_from_base: Some(plain_pose(v.here)),
        odom_frame: "odom".into(),
        base_frame: "base_link".into(),
        base_from_camera: None,
    };
    let goal = Goal {
        id: format!("eval-{seed}"),
        kind: GoalKind::Text(format!("find the {name}")),
        deadline: None,
        max_frame_age: None,
        candidates: ask.args.candidates,
        seed: Some(seed),
    };
    let began = Instant::now();
    let out = ground(mind, &scene, &goal, &NoClock, None, &mut |_| Flow::Continue)
        .map_err(|e| anyhow::anyhow!("house {seed}: {e}"))?;
    let ms = began.elapsed().as_secs_f64() * 1e3;
    if out.answer.status == Status::Failed {
        bail!("house {seed}: {}", out.answer.reason.as_deref().unwrap_or("failed"));
    }
    let mut frame = Frame::new();
    let truth = goal_pose(&v.house, v.here, object);
    let named = &v.house.objects[object];
    let seen_from_here = v.here.relative(Pose2::new(named.x, named.y, 0.0));
    let err = |p: mindseye::planar::Pose2| {
        truth.map(|t| [wrap_angle(p.yaw - t.yaw).abs().to_degrees(), (p.x - t.x).hypot(p.y - t.y)])
    };
    let from_here = |p: mindseye::planar::Pose2| plain_pose(v.here).compose(p);
    let lifted = out.lifted.as_ref();
    let witness = |w: Option<mindseye::lift::Witness>| w.and_then(|w| err(from_here(w.pose)));
    let off = |w: Option<mindseye::lift::Witness>| {
        w.map(|w| (w.object.0 - seen_from_here.x).hypot(w.object.1 - seen_from_here.y))
    };
    let answer_pose = out.answer.pose.as_ref().map(|p| mindseye::planar::Pose2::new(p.x, p.y, p.yaw));
    let (mut edge, mut spl) = (f64::INFINITY, 0.0);
    if let (Status::Found, Some(goal)) = (out.answer.status, answer_pose) {
        (edge, spl) =
            drive(&v.house, v.here, Pose2::new(goal.x, goal.y, goal.yaw), truth, object, &bench.camera);
    }
    let in_ellipse_90 = match (&out.answer.covariance, answer_pose, truth) {
        (Some(c), Some(p), Some(t)) => {
            let (dx, dy) = (p.x - t.x, p.y - t.y);
            let (a, b, d) = (c[0], c[1], c[7]);
            let det = (a * d - b * b).max(1e-12);
            Some((d * dx * dx - 2.0 * b * dx * dy + a * dy * dy) / det <= 4.605)
        }
        _ => None,
    };
    let box_centred = out.found_box.is_some_and(|b| {
        let [x0, y0, x1, y1] = b.edges();
        let (w, h) = (bench.camera.width as f64, bench.camera.height as f64);
        ((x0 + x1) / 2.0 - w / 2.0).abs() <= 0.3 * w && ((y0 + y1) / 2.0 - h / 2.0).abs() <= 0.3 * h
    });
    let shown = last_still(&out.frames, mind.spec().box_latents);
    let mut nearest: Option<(f64, usize)> = None;
    for (i, _) in v.house.objects.iter().enumerate() {
        let Some(pose) = goal_pose(&v.house, v.here, i) else { continue };
        let mut view = picture(&v.house, pose, &bench.camera, &mut frame);
        if let Some(area) = project_box(&v.house, pose, &bench.camera, i) {
            draw_box(&mut view.data, view.width, area, [255, 0, 0]);
        }
        if let Some(shown) = &shown {
            let d = squared_difference(shown, &view);
            if nearest.is_none_or(|n| d < n.0) {
                nearest = Some((d, i));
            }
        }
    }
    let outcome = Outcome {
        house: seed,
        goal: name,
        status: out.answer.status,
        consistency: out.answer.consistency,
        answer: answer_pose.and_then(err),
        plan: witness(lifted.and_then(|l| l.plan)),
        memory: witness(lifted.and_then(|l| l.memory)),
        drive: witness(lifted.and_then(|l| l.drive)),
        object: [
            off(lifted.and_then(|l| l.plan)),
            off(lifted.and_then(|l| l.memory)),
            off(lifted.and_then(|l| l.drive)),
        ],
        in_ellipse_90,
        heading_std_deg: out.answer.covariance.as_ref().map(|c| c[35].max(0.0).sqrt().to_degrees()),
        box_centred,
        instruction_followed: box_centred && nearest.is_some_and(|n| n.1 == object) && !ask.absent,
        arrived: edge <= 1.0,
        arrived_within_1_2_m: edge <= 1.2,
        spl,
        mask_max: lifted.map_or(f64::NAN, |l| l.mask_max),
        disagreement: lifted.and_then(|l| l.disagreement),
        localisation_m: lifted.and_then(|l| l.localisation_m),
        distance_m: seen_from_here.x.hypot(seen_from_here.y),
        visible_at_start: project_box(&v.house, v.here, &bench.camera, object).is_some(),
        ms,
    };
    Ok((outcome, out, v.newest))
}

fn last_still(frames: &[RgbImage], box_latents: usize) -> Option<RgbImage> {
    let tail = &frames[frames.len().saturating_sub(box_latents.max(1) * GROUP)..];
    let first = tail.first()?;
    let mut sum = vec![0u32; first.data.len()];
    for f in tail {
        for (s, v) in sum.iter_mut().zip(&f.data) {
            *s += u32::from(*v);
        }
    }
    let data = sum.iter().map(|s| (s / tail.len() as u32) as u8).collect();
    Some(RgbImage { width: first.width, height: first.height, data })
}

fn squared_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let n = a.data.len().max(1) as f64;
    a.data.iter().zip(&b.data).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>() / n
}

/// Drives a simulated robot to the goal: distance to the object's edge where it ends (infinite when the object is
/// out of its view), and SPL at 1 m.
fn drive(
    house: &House,
    start: Pose2,
    goal: Pose2,
    truth: Option<Pose2>,
    object: usize,
    camera: &Camera,
) -> (f64, f64) {
    let mut robot = Robot::new(start, OdometryNoise::default(), 1);
    let mut controller = Controller::new(house, start, goal, ControllerLimits::default());
    let mut length = 0.0;
    for _ in 0..1200 {
        if controller.done() {
            break;
        }
        let before = robot.pose;
        let (v, w) = controller.step(before, 0.05);
        robot.step(house, v, w, 0.05);
        length += before.distance(robot.pose);
    }
    let end = robot.pose;
    let named = &house.objects[object];
    let edge = (named.x - end.x).hypot(named.y - end.y) - named.radius;
    let edge = if project_box(house, end, camera, object).is_some() { edge } else { f64::INFINITY };
    let arrived = edge <= 1.0;
    let best = truth.map_or(0.0, |t| t.distance(start));
    let spl = if arrived { if length > 1e-3 { (best / length).min(1.0) } else { 1.0 } } else { 0.0 };
    (edge, spl)
}

/// A figure with its 95 % interval.
#[derive(Clone, Copy, Debug, Serialize)]
struct Figure {
    value: f64,
    low: f64,
    high: f64,
    n: usize,
}

fn share(hits: impl Iterator<Item = bool>) -> Figure {
    let (mut k, mut n) = (0.0, 0usize);
    for hit in hits {
        n += 1;
        k += f64::from(u8::from(hit));
    }
    if n == 0 {
        return Figure { value: f64::NAN, low: f64::NAN, high: f64::NAN, n };
    }
    let (p, z, m) = (k / n as f64, 1.96f64, n as f64);
    let centre = (p + z * z / (2.0 * m)) / (1.0 + z * z / m);
    let half = z * (p * (1.0 - p) / m + z * z / (4.0 * m * m)).sqrt() / (1.0 + z * z / m);
    Figure { value: p, low: centre - half, high: centre + half, n }
}

fn median_of(v: &mut [f64]) -> f64 {
    v.sort_by(f64::total_cmp);
    if v.is_empty() { f64::NAN } else { v[v.len() / 2] }
}

fn median(values: impl Iterator<Item = f64>) -> Figure {
    let mut v: Vec<f64> = values.filter(|x| x.is_finite()).collect();
    let n = v.len();
    let value = median_of(&mut v);
    let mut rng = Rng::new(1);
    let mut boots: Vec<f64> =
        (0..400).map(|_| median_of(&mut (0..n).map(|_| v[rng.below(n)]).collect::<Vec<_>>())).collect();
    boots.sort_by(f64::total_cmp);
    Figure { value, low: boots[10], high: boots[389], n }
}

#[derive(Serialize)]
struct PoseRow {
    from: &'static str,
    heading_deg_median: Figure,
    within_25_deg: Figure,
    position_m_median: Figure,
}

fn pose_row(from: &'static str, outcomes: &[Outcome], get: impl Fn(&Outcome) -> Option<[f64; 2]>) -> PoseRow {
    let all: Vec<[f64; 2]> = outcomes.iter().filter_map(get).collect();
    PoseRow {
        from,
        heading_deg_median: median(all.iter().map(|e| e[0])),
        within_25_deg: share(all.iter().map(|e| e[0] <= 25.0)),
        position_m_median: median(all.iter().map(|e| e[1])),
    }
}

fn auc(present: &[f64], absent: &[f64]) -> f64 {
    let wins: f64 = present
        .iter()
        .flat_map(|p| {
            absent.iter().map(move |a| match p.total_cmp(a) {
                std::cmp::Ordering::Greater => 1.0,
                std::cmp::Ordering::Equal => 0.5,
                std::cmp::Ordering::Less => 0.0,
            })
        })
        .sum();
    wins / (present.len() * absent.len()).max(1) as f64
}

fn say(f: Figure) -> String {
    format!("{:.3} ({:.3} to {:.3}, n = {})", f.value, f.low, f.high, f.n)
}

fn counts(outcomes: &[Outcome]) -> std::collections::BTreeMap<String, usize> {
    let mut out = std::collections::BTreeMap::new();
    for o in outcomes {
        let name = serde_json::to_value(o.status).ok().and_then(|v| v.as_str().map(str::to_string));
        *out.entry(name.unwrap_or_default()).or_insert(0) += 1;
    }
    out
}

fn grounding(args: &GroundingArgs) -> anyhow::Result<ExitCode> {
    let mut bench = Bench::new(&args.common)?;
    bench.pipeline.adjust(args.common.steps, args.common.guidance);
    let began = Instant::now();
    let absent: Vec<Outcome> = bench.each(&args.common, |mind, encoder, seed| {
        let ask = Ask { args, absent: true };
        Ok(one_goal(&bench, &ask, mind, encoder, seed)?.0)
    })?;
    if args.absent {
        let refused =
            share(absent.iter().map(|o| matches!(o.status, Status::NotInContext | Status::Inconsistent)));
        let document = serde_json::json!({
            "bundle": bench.pipeline.bundle().hash(),
            "houses": args.common.houses,
            "seed": args.common.seed,
            "difficulty": args.common.difficulty,
            "refused": refused,
            "statuses": counts(&absent),
            "seconds": began.elapsed().as_secs_f64(),
        });
        if args.common.json {
            println!("{document}");
        } else {
            println!("asked for absent things: refused {}", say(refused));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let results = bench.each(&args.common, |mind, encoder, seed| {
        let ask = Ask { args, absent: false };
        one_goal(&bench, &ask, mind, encoder, seed)
    })?;
    if let Some(path) = &args.sheet {
        sheet(path, &results, &bench)?;
    }
    let outcomes: Vec<Outcome> = results.into_iter().map(|(o, _, _)| o).collect();
    if let Some(directory) = &args.calibrate {
        calibrate(directory, &outcomes, &absent)?;
    }
    let found: Vec<&Outcome> = outcomes.iter().filter(|o| o.status == Status::Found).collect();
    let mut by_confidence: Vec<&Outcome> = outcomes.iter().filter(|o| o.answer.is_some()).collect();
    by_confidence.sort_by(|a, b| b.consistency.unwrap_or(0.0).total_cmp(&a.consistency.unwrap_or(0.0)));
    let best_half = &by_confidence[..by_confidence.len() / 2];
    let rows = [
        pose_row("answer (all witnesses)", &outcomes, |o| o.answer),
        pose_row("plan: pose head, one pass", &outcomes, |o| o.plan),
        pose_row("memory: mask and place with odometry", &outcomes, |o| o.memory),
        pose_row("drive: end of the imagined video", &outcomes, |o| o.drive),
    ];
    let separation = auc(
        &outcomes.iter().map(|o| o.mask_max).collect::<Vec<_>>(),
        &absent.iter().map(|o| o.mask_max).collect::<Vec<_>>(),
    );
    let figures = serde_json::json!({
        "instruction_followed": share(outcomes.iter().map(|o| o.instruction_followed)),
        "box_centred": share(outcomes.iter().map(|o| o.box_centred)),
        "found": share(outcomes.iter().map(|o| o.status == Status::Found)),
        "arrived": share(outcomes.iter().map(|o| o.arrived)),
        "arrived_within_1_2_m": share(outcomes.iter().map(|o| o.arrived_within_1_2_m)),
        "spl": outcomes.iter().map(|o| o.spl).sum::<f64>() / outcomes.len().max(1) as f64,
        "found_within_25_deg": share(found.iter().filter_map(|o| o.answer).map(|e| e[0] <= 25.0)),
        "confident_half_within_25_deg": share(best_half.iter().filter_map(|o| o.answer).map(|e| e[0] <= 25.0)),
        "in_90_ellipse": share(outcomes.iter().filter_map(|o| o.in_ellipse_90)),
        "absent_auc": separation,
        "absent_refused": share(
            absent.iter().map(|o| matches!(o.status, Status::NotInContext | Status::Inconsistent))),
        "visible_at_start_followed":
            share(outcomes.iter().filter(|o| o.visible_at_start).map(|o| o.instruction_followed)),
        "only_in_context_followed":
            share(outcomes.iter().filter(|o| !o.visible_at_start).map(|o| o.instruction_followed)),
        "near_followed": share(outcomes.iter().filter(|o| o.distance_m < 2.0).map(|o| o.instruction_followed)),
        "far_followed": share(outcomes.iter().filter(|o| o.distance_m >= 2.0).map(|o| o.instruction_followed)),
        "chance": 1.0 / (outcomes.iter().map(|o| House::generate(o.house, &bench.difficulty).objects.len())
            .sum::<usize>() as f64 / outcomes.len().max(1) as f64),
        "goal_ms_median": median(outcomes.iter().map(|o| o.ms)),
    });
    let document = serde_json::json!({
        "bundle": bench.pipeline.bundle().hash(),
        "houses": args.common.houses,
        "seed": args.common.seed,
        "difficulty": args.common.difficulty,
        "wrong_room": args.wrong_room,
        "figures": figures,
        "goal_pose": rows,
        "statuses": counts(&outcomes),
        "seconds": began.elapsed().as_secs_f64(),
        "outcomes": outcomes,
    });
    if args.common.json {
        println!("{document}");
    } else {
        println!("| figure | value |\n|---|---|");
        if let Some(map) = figures.as_object() {
            for (name, value) in map {
                let text = match serde_json::from_value::<Loose>(value.clone()) {
                    Ok(f) => format!("{:.3} ({:.3} to {:.3}, n = {})", f.value, f.low, f.high, f.n),
                    Err(_) => format!("{:.3}", value.as_f64().unwrap_or(f64::NAN)),
                };
                println!("| {} | {text} |", name.replace('_', " "));
            }
        }
        println!(
            "\n| goal pose read from | heading, median (deg) | within 25 deg | position, median (m) |\n|---|---|---|---|"
        );
        for r in &rows {
            println!(
                "| {} | {:.1} | {:.3} | {:.3} |",
                r.from, r.heading_deg_median.value, r.within_25_deg.value, r.position_m_median.value
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(serde::Deserialize)]
struct Loose {
    value: f64,
    low: f64,
    high: f64,
    n: usize,
}

/// Rewrites the `[lift]` table of a bundle from what was measured.
fn calibrate(directory: &std::path::Path, present: &[Outcome], absent: &[Outcome]) -> anyhow::Result<()> {
    let path = directory.join(mindseye_engines::bundle::MANIFEST);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut manifest: mindseye_engines::bundle::Manifest =
        toml::from_str(&text).with_context(|| path.display().to_string())?;
    // The threshold that tells present from absent best (balanced accuracy).
    let mut cuts: Vec<f64> = present.iter().chain(absent).map(|o| o.mask_max).collect();
    cuts.sort_by(f64::total_cmp);
    let score = |c: f64| {
        let hit = present.iter().filter(|o| o.mask_max >= c).count() as f64 / present.len().max(1) as f64;
        let miss = absent.iter().filter(|o| o.mask_max < c).count() as f64 / absent.len().max(1) as f64;
        hit + miss
    };
    let best = cuts.iter().copied().max_by(|a, b| score(*a).total_cmp(&score(*b))).unwrap_or(0.0);
    let lift = &mut manifest.lift;
    lift.insert("mask_present".into(), (best * 1e3).round() / 1e3);
    lift.insert("mask_vote".into(), ((best - 1.0) * 1e3).round() / 1e3);
    // Robust spreads: the median distance of a planar normal error is 1.1774 sigma.
    let seen: Vec<&Outcome> = present.iter().filter(|o| o.mask_max >= best).collect();
    for (i, key) in ["plan_sigma_m", "memory_sigma_m", "drive_sigma_m"].into_iter().enumerate() {
        let mut v: Vec<f64> = seen.iter().filter_map(|o| o.object[i]).collect();
        if !v.is_empty() {
            lift.insert(key.into(), (median_of(&mut v) / 1.1774 * 1e3).round() / 1e3);
        }
    }
    // Agreement and consistency: what nearly all goals that were located well reach. Robots' cameras and odometry are
    // worse than these clean views, so what decides about withholding is wider than what is seen here.
    const WIDER: f64 = 1.5;
    let well: Vec<&&Outcome> = seen.iter().filter(|o| o.object[1].is_some_and(|e| e < 0.4)).collect();
    let mut apart: Vec<f64> = well.iter().filter_map(|o| o.disagreement).collect();
    apart.sort_by(f64::total_cmp);
    if let Some(p) = apart.get(apart.len().saturating_sub(1).min(apart.len() * 96 / 100)) {
        lift.insert("agree_max".into(), (WIDER * p * 1e3).round() / 1e3);
    }
    let mut consistency: Vec<f64> = well.iter().filter_map(|o| o.consistency).collect();
    consistency.sort_by(f64::total_cmp);
    if let Some(p) = consistency.get(consistency.len() * 2 / 100) {
        lift.insert("consistency_min".into(), (p / WIDER.powi(2) * 1e3).round() / 1e3);
    }
    let mut yaw: Vec<f64> = seen.iter().filter_map(|o| o.answer).map(|e| e[0].to_radians()).collect();
    if !yaw.is_empty() {
        lift.insert("yaw_sigma_rad".into(), (median_of(&mut yaw) / 0.6745 * 1e3).round() / 1e3);
    }
    let mut places: Vec<f64> = present.iter().filter_map(|o| o.localisation_m).collect();
    if !places.is_empty() {
        let middle = median_of(&mut places);
        lift.insert("localisation_sigma_m".into(), (WIDER.powi(2) * middle * 1e3).round() / 1e3);
        lift.insert(
            "localisation_max_m".into(),
            (2.0 * WIDER * places[places.len() * 98 / 100] * 1e3).round() / 1e3,
        );
    }
    let out = toml::to_string_pretty(&manifest)?;
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, out).with_context(|| temporary.display().to_string())?;
    std::fs::rename(&temporary, &path).with_context(|| path.display().to_string())
}

fn sheet(
    path: &std::path::Path,
    results: &[(Outcome, Grounded, RgbImage)],
    bench: &Bench,
) -> anyhow::Result<()> {
    use mindseye_world::draw::Canvas;
    let (w, h, zoom) = (bench.camera.width, bench.camera.height, 5);
    let shown = results.len().min(12);
    let columns = 1 + results.first().map_or(0, |r| r.1.frames.len() / 2);
    let (cw, ch) = (w * zoom + 4, h * zoom + 22);
    let mut canvas = Canvas::new(columns * cw + 8, shown * ch + 8, [24, 24, 28]);
    for (row, (o, g, newest)) in results.iter().take(shown).enumerate() {
        let y = (row * ch + 20) as i64;
        let title = format!(
            "{}: {:?}, followed {}, heading off {:.0} deg, {:.2} m",
            o.goal,
            o.status,
            o.instruction_followed,
            o.answer.map_or(f64::NAN, |e| e[0]),
            o.answer.map_or(f64::NAN, |e| e[1])
        );
        canvas.text(8, y - 16, &title, 2, [230, 230, 230]);
        canvas.blit(8, y, &newest.data, w, zoom);
        for (i, f) in g.frames.iter().skip(1).step_by(2).enumerate().take(columns - 1) {
            canvas.blit((8 + (i + 1) * cw) as i64, y, &f.data, w, zoom);
        }
    }
    let (cw, ch) = (canvas.width, canvas.height);
    let image = RgbImage { width: cw, height: ch, data: canvas.rgb };
    image.save_png(path).with_context(|| path.display().to_string())
}

fn psnr(mse: f64) -> f64 {
    10.0 * (255.0f64 * 255.0 / mse.max(1e-9)).log10()
}

fn navigation(args: &CommonArgs) -> anyhow::Result<ExitCode> {
    let mut bench = Bench::new(args)?;
    bench.pipeline.adjust(args.steps, args.guidance);
    let began = Instant::now();
    let rows: Vec<[f64; 4]> = bench.each(args, |mind, encoder, seed| {
        let mut v = visit(seed, &bench.difficulty, &bench.camera, encoder, bench.images)?;
        let spec = mind.spec().clone();
        let images = 1 + (spec.settings.target_latents - 1) * GROUP;
        let drive = random_drive_from(&v.house, &mut v.rng, v.here, images);
        let along: Vec<_> = drive.iter().map(|p| plain_pose(v.here.relative(*p))).collect();
        let rays = mind.camera_rays(&along, None).context("this model does not follow poses")?;
        let null_text = mind.encode_text("")?;
        let picks = mindseye::context::spread(v.memory.len(), spec.context_max);
        let seen = Seen {
            index: picks.iter().map(|i| v.memory[*i].info.index).collect(),
            latents: picks.iter().flat_map(|i| v.memory[*i].latent.iter().copied()).collect(),
            first: mind.encode_still(&v.newest)?,
        };
        let mut settings = spec.settings.clone();
        settings.candidates = 1;
        settings.seed = seed;
        let prompt = Prompt { text: &null_text, null_text: &null_text, camera: Some(&rays) };
        let budget = Budget { clock: &NoClock, until: None };
        let imagined = imagine(mind.denoiser(), &seen, prompt, &settings, budget, &mut |_| Flow::Continue)?;
        let latents = &imagined.drives.first().context("no drive was sampled")?.latents;
        let frames = mind.decode(latents)?;
        let mut frame = Frame::new();
        let (mut ours, mut copy, mut near, mut motion) = (0.0, 0.0, 0.0, 0.0);
        for (i, pose) in drive.iter().enumerate().skip(1) {
            let truth = picture(&v.house, *pose, &bench.camera, &mut frame);
            ours += squared_difference(&frames[i + 3], &truth);
            copy += squared_difference(&v.newest, &truth);
            motion += squared_difference(&frames[i + 3], &v.newest);
            let nearest = v
                .memory
                .iter()
                .min_by(|a, b| {
                    let d = |c: &ContextLatent| {
                        c.info.odom_from_base.map_or(f64::MAX, |p| {
                            (p.x - pose.x).hypot(p.y - pose.y) + wrap_angle(p.yaw - pose.yaw).abs()
                        })
                    };
                    d(a).total_cmp(&d(b))
                })
                .context("nothing was seen")?;
            near += squared_difference(&nearest.picture, &truth);
        }
        let n = (drive.len() - 1) as f64;
        Ok([psnr(ours / n), psnr(copy / n), psnr(near / n), (motion / n).sqrt() / 255.0])
    })?;
    let mean = |k: usize| rows.iter().map(|r| r[k]).sum::<f64>() / rows.len().max(1) as f64;
    let document = serde_json::json!({
        "bundle": bench.pipeline.bundle().hash(),
        "houses": args.houses,
        "seed": args.seed,
        "psnr_db": mean(0),
        "psnr_copy_first_db": mean(1),
        "psnr_nearest_context_db": mean(2),
        "gain_over_copy_first_db": mean(0) - mean(1),
        "dynamic_degree": mean(3),
        "seconds": began.elapsed().as_secs_f64(),
    });
    if args.json {
        println!("{document}");
    } else {
        println!(
            "navigation: PSNR {:.2} dB, copy of the first frame {:.2} dB, nearest context frame {:.2} dB, \
             dynamic degree {:.3}",
            mean(0),
            mean(1),
            mean(2),
            mean(3)
        );
    }
    Ok(ExitCode::SUCCESS)
}
