//! `eval grounding`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use mindseye::context::GROUP;
use mindseye::ground::{Grounded, ground};
use mindseye::image::RgbImage;
use mindseye::imagine::{Flow, NoClock};
use mindseye::lift::LiftParams;
use mindseye_bridge::answer::Status;
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_engines::bundle::{MANIFEST, Manifest, Measured};
use mindseye_world::{
    Camera, Controller, ControllerLimits, Frame, House, OdometryNoise, Pose2, Robot, goal_pose, project_box,
    wrap_angle,
};
use serde::Serialize;

use super::examiner::Examiner;
use super::judge::{Judge, Rules, Scores, Verdict, true_drive};
use super::picture::Lpips;
use super::report::{Table, write_atomically};
use super::stats::{Figure, auc, mean, median, share};
use super::visit::{
    Bench, CommonArgs, Tools, Visit, absent_name, calibration, plain_pose, sees, swapped_name, visit,
    world_pose,
};

/// Arguments of `eval grounding`.
#[derive(clap::Args, Debug, Clone)]
pub struct GroundingArgs {
    /// Shared arguments.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Only ask for things that are not there, and report how often a pose is given all the same.
    #[arg(long)]
    pub absent: bool,
    /// Only the model's own figures: no examiner (so no SD), no controls, no absent names.
    #[arg(long, conflicts_with_all = ["absent", "calibrate"])]
    pub quick: bool,
    /// Candidates per goal instead of the runtime's.
    #[arg(long)]
    pub candidates: Option<u32>,
    /// Measure the `[lift]` table on these houses and write it into this bundle directory.
    #[arg(long)]
    pub calibrate: Option<PathBuf>,
    /// Write the model's figures into the `[evaluation]` table of this bundle directory.
    #[arg(long, value_name = "BUNDLE", conflicts_with_all = ["absent", "quick", "calibrate"])]
    pub store: Option<PathBuf>,
    /// Write a picture of the first houses' imaginations.
    #[arg(long)]
    pub sheet: Option<PathBuf>,
}

/// How a goal was reached.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Reached {
    /// Heading (degrees) and place (m) of the pose against the pose before the object.
    pub error: Option<[f64; 2]>,
    /// The object is in view and its edge within 1 m.
    pub arrived: bool,
    /// Within 1.2 m.
    pub arrived_within_1_2_m: bool,
    /// Shortest over driven path where it arrived, else 0.
    pub spl: f64,
}

/// What one kind of drive (the model's, a control, a baseline) came to in one house.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Row {
    /// Its pictures; none when none were imagined.
    pub verdict: Option<Verdict>,
    /// Where its pose led; none for drives that stand for none.
    pub reached: Option<Reached>,
    /// Whether the model gave a pose; none for drives that are not the model's.
    pub found: Option<bool>,
}

/// Whose pose a drive stands for.
enum Pose {
    /// The model's answer, where it gave one.
    Answer(Option<Pose2>),
    /// Known beforehand.
    Known(Option<Pose2>),
    /// Nobody's.
    None,
}

/// One goal's outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Seed of the house.
    pub house: u64,
    /// What was asked for.
    pub goal: String,
    /// What was answered.
    pub status: Status,
    /// The gate's figure.
    pub consistency: Option<f64>,
    /// Heading (degrees) and place (m) of the answer's pose.
    pub answer: Option<[f64; 2]>,
    /// What the plan alone said.
    pub plan: Option<[f64; 2]>,
    /// What the memory alone said.
    pub memory: Option<[f64; 2]>,
    /// What the end of the drive alone said.
    pub drive: Option<[f64; 2]>,
    /// Object's place errors of the witnesses (m): plan, memory, drive.
    pub object: [Option<f64>; 3],
    /// Whether the true place is inside the 90 % ellipse of the answer.
    pub in_ellipse_90: Option<bool>,
    /// Squared Mahalanobis distance of the true place from the answer's, by the answer's covariance.
    pub squared_spreads: Option<f64>,
    /// Standard deviation of the answer's heading (degrees).
    pub heading_std_deg: Option<f64>,
    /// Largest mask logit.
    pub mask_max: f64,
    /// Distance of plan and memory in spreads.
    pub disagreement: Option<f64>,
    /// How far the network misplaces its own context (m).
    pub localisation_m: Option<f64>,
    /// From the robot to the object (m).
    pub distance_m: f64,
    /// Whether the first picture shows the object.
    pub visible_at_start: bool,
    /// Context groups in use that show the object.
    pub groups_with_it: usize,
    /// Objects in the house.
    pub objects: usize,
    /// Time for the answer (ms).
    pub ms: f64,
    /// By the names in [`ROWS`].
    pub rows: BTreeMap<&'static str, Row>,
}

/// Kinds of drives, with what they are.
pub const ROWS: [(&str, &str); 8] = [
    ("model", "the model"),
    ("wrong_context", "control: memories of another house, first picture true"),
    ("wrong_room", "control: another house altogether"),
    ("random_object", "chance: true drive to a random object"),
    ("nearest_remembered", "baseline: nearest remembered picture (oracle poses)"),
    ("copy_first", "baseline: copy of the first picture"),
    ("truth", "ceiling: the true drive through the codec"),
    ("truth_wrong_room", "SD control: a true drive in another house"),
];

/// What is asked for that is not there.
#[derive(Clone, Copy, PartialEq)]
enum Ask {
    Absent,
    Swapped,
}

fn text_goal(seed: u64, name: &str, candidates: Option<u32>) -> Goal {
    Goal {
        id: format!("eval-{seed}"),
        kind: GoalKind::Text(format!("find the {name}")),
        deadline: None,
        max_frame_age: None,
        candidates,
        seed: Some(seed),
    }
}

/// Asks the model. `scene` may be another house's.
fn ask(
    tools: &mut Tools,
    scene: &Visit,
    seed: u64,
    name: &str,
    candidates: Option<u32>,
) -> anyhow::Result<(Grounded, f64)> {
    let began = Instant::now();
    let goal = text_goal(seed, name, candidates);
    let out = ground(tools.mind.as_mut(), &scene.scene(), &goal, &NoClock, None, &mut |_| Flow::Continue)?;
    if out.answer.status == Status::Failed {
        bail!("{}", out.answer.reason.as_deref().unwrap_or("failed"));
    }
    Ok((out, began.elapsed().as_secs_f64() * 1e3))
}

struct Case<'a> {
    house: &'a House,
    here: Pose2,
    object: usize,
    truth: Option<Pose2>,
    camera: &'a Camera,
}

impl Case<'_> {
    fn error(&self, p: Pose2) -> Option<[f64; 2]> {
        let t = self.truth?;
        Some([wrap_angle(p.yaw - t.yaw).abs().to_degrees(), (p.x - t.x).hypot(p.y - t.y)])
    }

    /// Drives to a pose and looks.
    fn reach(&self, pose: Pose2) -> Reached {
        let (edge, length) = drive(self, pose);
        let arrived = edge <= 1.0;
        let best = self.truth.map_or(0.0, |t| t.distance(self.here));
        Reached {
            error: self.error(pose),
            arrived,
            arrived_within_1_2_m: edge <= 1.2,
            spl: match (arrived, length > 1e-3) {
                (false, _) => 0.0,
                (true, false) => 1.0,
                (true, true) => (best / length).min(1.0),
            },
        }
    }
}

/// Drives a simulated robot to the goal: distance to the object's edge where it ends (m, infinite when the object is
/// out of its view), and the driven length (m).
fn drive(case: &Case<'_>, goal: Pose2) -> (f64, f64) {
    let mut robot = Robot::new(case.here, OdometryNoise::default(), 1);
    let mut controller = Controller::new(case.house, case.here, goal, ControllerLimits::default());
    let mut length = 0.0;
    for _ in 0..1200 {
        if controller.done() {
            break;
        }
        let before = robot.pose;
        let (v, w) = controller.step(before, 0.05);
        robot.step(case.house, v, w, 0.05);
        length += before.distance(robot.pose);
    }
    let end = robot.pose;
    let named = &case.house.objects[case.object];
    let edge = (named.x - end.x).hypot(named.y - end.y) - named.radius;
    (
        if project_box(case.house, end, case.camera, case.object).is_some() { edge } else { f64::INFINITY },
        length,
    )
}

/// The seed of a house that lacks this name, for controls.
fn other_house(bench: &Bench, seed: u64, name: &str) -> u64 {
    (0..)
        .map(|k| (seed ^ 0x5ca1_ab1e).wrapping_add(k << 32))
        .find(|s| House::generate(*s, &bench.difficulty).find(name).is_none())
        .unwrap_or(seed)
}

/// Pictures to show of one case.
struct Shown {
    newest: RgbImage,
    frames: Vec<RgbImage>,
    truth: Vec<RgbImage>,
}

struct Settings<'a> {
    bench: &'a Bench,
    args: &'a GroundingArgs,
    examiner: Option<&'a Examiner>,
    lpips: Option<&'a Lpips>,
}

/// What a question for something that is not there came to.
#[derive(Clone, Debug, Serialize)]
struct Absent {
    house: u64,
    goal: String,
    status: Status,
    mask_max: f64,
}

fn absent_goal(s: &Settings<'_>, tools: &mut Tools, seed: u64, kind: Ask) -> anyhow::Result<Option<Absent>> {
    let bench = s.bench;
    let mut v = visit(seed, &bench.difficulty, &bench.camera, tools.encoder.as_mut(), bench.images)?;
    v.rng.below(v.house.objects.len()); // the same draws as for a present one
    let name = match kind {
        Ask::Swapped => swapped_name(&v.house, &mut v.rng),
        _ => Some(absent_name(&v.house, &mut v.rng)),
    };
    let Some(name) = name else { return Ok(None) };
    let (out, _) = ask(tools, &v, seed, &name, s.args.candidates)?;
    let mask_max = out.lifted.as_ref().map_or(f64::NAN, |l| l.estimate.mask_max);
    Ok(Some(Absent { house: seed, goal: name, status: out.answer.status, mask_max }))
}

fn present_goal(s: &Settings<'_>, tools: &mut Tools, seed: u64) -> anyhow::Result<(Outcome, Shown)> {
    let (bench, camera) = (s.bench, &s.bench.camera);
    let mut v = visit(seed, &bench.difficulty, camera, tools.encoder.as_mut(), bench.images)?;
    let object = v.rng.below(v.house.objects.len());
    let name = v.house.objects[object].name.clone();
    let spec = tools.mind.spec().clone();
    let targets = spec.settings.target_latents;
    calibration(&spec)?;
    let (out, ms) = ask(tools, &v, seed, &name, s.args.candidates)?;

    let rules = Rules {
        camera,
        examiner: s.examiner,
        box_latents: spec.box_latents,
        box_min: spec.box_min,
    };
    let mut judge = Judge::new(rules, &v.house, v.here, object, targets);
    let mut lpips = s.lpips.map(Lpips::session).transpose()?;
    let case =
        Case { house: &v.house, here: v.here, object, truth: goal_pose(&v.house, v.here, object), camera };
    let mut rows: BTreeMap<&'static str, Row> = BTreeMap::new();

    // The model.
    let answer_pose = out.answer.pose.as_ref().map(|p| Pose2::unwrapped(p.x, p.y, p.yaw));
    let mut row = |key, frames: &[RgbImage], pose: Pose, eager: &mut _| -> anyhow::Result<()> {
        let verdict =
            if frames.is_empty() { None } else { Some(judge.verdict(frames, eager, lpips.as_mut())?) };
        let (reached, found) = match pose {
            Pose::Answer(p) => (Some(p.map(|p| case.reach(p)).unwrap_or_default()), Some(p.is_some())),
            Pose::Known(p) => (p.map(|p| case.reach(p)), None),
            Pose::None => (None, None),
        };
        rows.insert(key, Row { verdict, reached, found });
        Ok(())
    };
    row("model", &out.frames, Pose::Answer(answer_pose), &mut tools.eager)?;
    let mut truth_frames = Vec::new();
    if !s.args.quick {
        // Controls: the memories of a house without such a thing; with and without the true first picture.
        let other_seed = other_house(bench, seed, &name);
        let other = visit(other_seed, &bench.difficulty, camera, tools.encoder.as_mut(), bench.images)?;
        let mixed = Visit {
            house: v.house.clone(),
            memory: other.memory.clone(),
            sweep: v.sweep.clone(),
            newest: v.newest.clone(),
            here: v.here,
            rng: v.rng.clone(),
        };
        let given = |g: &Grounded| g.answer.pose.as_ref().map(|p| Pose2::unwrapped(p.x, p.y, p.yaw));
        let (wrong, _) = ask(tools, &mixed, seed, &name, s.args.candidates)?;
        row("wrong_context", &wrong.frames, Pose::Answer(given(&wrong)), &mut tools.eager)?;
        let (wrong, _) = ask(tools, &other, seed, &name, s.args.candidates)?;
        let pose = given(&wrong).map(|p| v.here.compose(other.here.relative(p)));
        row("wrong_room", &wrong.frames, Pose::Answer(pose), &mut tools.eager)?;

        // Chance and trivial answers.
        let random = v.rng.below(v.house.objects.len());
        let frames = tools.coded_drive(&true_drive(&v.house, v.here, random, &rules, targets))?;
        row("random_object", &frames, Pose::Known(goal_pose(&v.house, v.here, random)), &mut tools.eager)?;
        let first = tools.coded_still(&v.newest)?;
        row("copy_first", &vec![first; GROUP * targets], Pose::Known(Some(v.here)), &mut tools.eager)?;
        let nearest = case.truth.and_then(|goal| {
            let cost = |p: Pose2| p.distance(goal) + wrap_angle(p.yaw - goal.yaw).abs();
            let poses =
                v.memory.iter().filter_map(|c| Some((world_pose(c.info.odom_from_base?), &c.picture)));
            poses.min_by(|a, b| cost(a.0).total_cmp(&cost(b.0)))
        });
        if let Some((pose, picture)) = nearest {
            let still = tools.coded_still(picture)?;
            row(
                "nearest_remembered",
                &vec![still; GROUP * targets],
                Pose::Known(Some(pose)),
                &mut tools.eager,
            )?;
        }
        truth_frames = tools.coded_drive(&true_drive(&v.house, v.here, object, &rules, targets))?;
        row("truth", &truth_frames, Pose::Known(case.truth), &mut tools.eager)?;
        let there = v.rng.below(other.house.objects.len());
        let frames = tools.coded_drive(&true_drive(&other.house, other.here, there, &rules, targets))?;
        row("truth_wrong_room", &frames, Pose::None, &mut tools.eager)?;
    }

    let named = &v.house.objects[object];
    let seen_from_here = v.here.relative(Pose2::unwrapped(named.x, named.y, 0.0));
    let lifted = out.lifted.as_ref();
    let witness = |w: Option<mindseye::lift::Witness>| {
        w.and_then(|w| case.error(world_pose(plain_pose(v.here).compose(w.pose))))
    };
    let off = |w: Option<mindseye::lift::Witness>| {
        w.map(|w| (w.object.0 - seen_from_here.x).hypot(w.object.1 - seen_from_here.y))
    };
    let squared_spreads = match (&out.answer.covariance, answer_pose, case.truth) {
        (Some(c), Some(p), Some(t)) => {
            let (dx, dy) = (p.x - t.x, p.y - t.y);
            let (a, b, d) = (c[0], c[1], c[7]);
            let det = (a * d - b * b).max(1e-12);
            Some((d * dx * dx - 2.0 * b * dx * dy + a * dy * dy) / det)
        }
        _ => None,
    };
    let in_ellipse_90 = squared_spreads.map(|d| d <= ELLIPSE_90);
    let mut frame = Frame::new();
    let groups_with_it = out
        .used
        .iter()
        .filter_map(|p| v.memory.get(*p))
        .filter(|c| {
            let k = c.info.index as usize;
            v.sweep[GROUP * k - 3..=GROUP * k].iter().any(|p| sees(&v.house, *p, camera, object, &mut frame))
        })
        .count();
    let outcome = Outcome {
        house: seed,
        goal: name,
        status: out.answer.status,
        consistency: out.answer.consistency,
        answer: answer_pose.and_then(|p| case.error(p)),
        plan: witness(lifted.and_then(|l| l.estimate.plan)),
        memory: witness(lifted.and_then(|l| l.estimate.memory)),
        drive: witness(lifted.and_then(|l| l.rollout)),
        object: [
            off(lifted.and_then(|l| l.estimate.plan)),
            off(lifted.and_then(|l| l.estimate.memory)),
            off(lifted.and_then(|l| l.rollout)),
        ],
        in_ellipse_90,
        squared_spreads,
        heading_std_deg: out.answer.covariance.as_ref().map(|c| c[35].max(0.0).sqrt().to_degrees()),
        mask_max: lifted.map_or(f64::NAN, |l| l.estimate.mask_max),
        disagreement: lifted.and_then(|l| l.estimate.disagreement),
        localisation_m: lifted.and_then(|l| l.estimate.localisation_m),
        distance_m: seen_from_here.x.hypot(seen_from_here.y),
        visible_at_start: sees(&v.house, v.here, camera, object, &mut frame),
        groups_with_it,
        objects: v.house.objects.len(),
        ms,
        rows,
    };
    let truth = if truth_frames.is_empty() { Vec::new() } else { truth_frames };
    Ok((outcome, Shown { newest: v.newest.clone(), frames: out.frames, truth }))
}

/// The figures of one kind of drive.
#[derive(Clone, Debug, Serialize)]
struct Summary {
    drives: usize,
    #[serde(flatten)]
    scores: Scores,
    dynamic_degree: Figure,
    found: Figure,
    heading_deg_median: Figure,
    position_m_median: Figure,
    arrived: Figure,
    arrived_within_1_2_m: Figure,
    spl: Figure,
}

/// A drive is dynamic when its motion is at least this share of the median true drive's.
const DYNAMIC: f64 = 0.25;

fn summary(outcomes: &[Outcome], key: &str, moving: f64) -> Summary {
    let rows: Vec<Row> = outcomes.iter().filter_map(|o| o.rows.get(key).copied()).collect();
    let shown: Vec<Verdict> = rows.iter().filter_map(|r| r.verdict).collect();
    let reached: Vec<Reached> = rows.iter().filter_map(|r| r.reached).collect();
    let is = |f: &dyn Fn(&Verdict) -> bool| share(shown.iter().map(f));
    Summary {
        drives: shown.len(),
        scores: Scores::of(&shown),
        dynamic_degree: if moving > 0.0 { is(&|v| v.motion >= DYNAMIC * moving) } else { share([]) },
        found: share(rows.iter().filter_map(|r| r.found)),
        heading_deg_median: median(reached.iter().filter_map(|r| r.error).map(|e| e[0])),
        position_m_median: median(reached.iter().filter_map(|r| r.error).map(|e| e[1])),
        arrived: share(reached.iter().map(|r| r.arrived)),
        arrived_within_1_2_m: share(reached.iter().map(|r| r.arrived_within_1_2_m)),
        spl: mean(reached.iter().map(|r| r.spl)),
    }
}

#[derive(Serialize)]
struct PoseRow {
    from: &'static str,
    heading_deg_median: Figure,
    within_15_deg: Figure,
    within_25_deg: Figure,
    position_m_median: Figure,
}

fn pose_row(from: &'static str, outcomes: &[Outcome], get: impl Fn(&Outcome) -> Option<[f64; 2]>) -> PoseRow {
    let all: Vec<[f64; 2]> = outcomes.iter().filter_map(get).collect();
    PoseRow {
        from,
        heading_deg_median: median(all.iter().map(|e| e[0])),
        within_15_deg: share(all.iter().map(|e| e[0] <= 15.0)),
        within_25_deg: share(all.iter().map(|e| e[0] <= 25.0)),
        position_m_median: median(all.iter().map(|e| e[1])),
    }
}

fn counts(statuses: impl Iterator<Item = Status>) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for status in statuses {
        let name = serde_json::to_value(status).ok().and_then(|v| v.as_str().map(str::to_string));
        *out.entry(name.unwrap_or_default()).or_insert(0) += 1;
    }
    out
}

fn refused(absent: &[Absent]) -> Figure {
    share(absent.iter().map(|o| matches!(o.status, Status::NotInContext | Status::Inconsistent)))
}

/// A group of goals and the model's figures in it.
#[derive(Serialize)]
struct Part {
    of: String,
    instruction_followed: Figure,
    followed_sd_0_2: Figure,
    sd_m: Figure,
    heading_deg_median: Figure,
    position_m_median: Figure,
    arrived: Figure,
}

fn parts(outcomes: &[Outcome]) -> Vec<Part> {
    let part = |of: String, keep: &dyn Fn(&Outcome) -> bool| {
        let some: Vec<Outcome> = outcomes.iter().filter(|o| keep(o)).cloned().collect();
        let s = summary(&some, "model", 0.0);
        Part {
            of,
            instruction_followed: s.scores.instruction_followed,
            followed_sd_0_2: s.scores.followed_sd_0_2,
            sd_m: s.scores.sd_m,
            heading_deg_median: s.heading_deg_median,
            position_m_median: s.position_m_median,
            arrived: s.arrived,
        }
    };
    let mut out = Vec::new();
    for (low, high) in [(0.0, 1.5), (1.5, 2.5), (2.5, f64::INFINITY)] {
        let of = if high.is_finite() {
            format!("object at {low} to {high} m")
        } else {
            format!("object beyond {low} m")
        };
        out.push(part(of, &|o| (low..high).contains(&o.distance_m)));
    }
    out.push(part("visible in the first picture".into(), &|o| o.visible_at_start));
    out.push(part("not visible in the first picture".into(), &|o| !o.visible_at_start));
    for (low, high) in [(0, 2), (3, 4), (5, usize::MAX)] {
        let of = match high {
            usize::MAX => format!("seen in {low} or more of the context groups in use"),
            _ => format!("seen in {low} to {high} of the context groups in use"),
        };
        out.push(part(of, &|o| (low..=high).contains(&o.groups_with_it)));
    }
    out
}

/// Runs `eval grounding`.
///
/// # Errors
/// A bundle or a file that cannot be used.
pub fn run(args: &GroundingArgs) -> anyhow::Result<ExitCode> {
    let bench = Bench::new(&args.common)?;
    let lpips = args.common.lpips.as_deref().map(Lpips::open).transpose()?;
    let began = Instant::now();
    let examiner = if args.quick || args.absent { None } else { Some(bench.examiner(&args.common)?) };
    let examiner_secs = began.elapsed().as_secs_f64();
    let settings = Settings { bench: &bench, args, examiner: examiner.as_ref(), lpips: lpips.as_ref() };
    let absent_of = |kind: Ask| -> anyhow::Result<Vec<Absent>> {
        let all = bench.each(&args.common, |tools, seed| absent_goal(&settings, tools, seed, kind))?;
        Ok(all.into_iter().flatten().collect())
    };
    let (absent, swapped) = if args.quick {
        (Vec::new(), Vec::new())
    } else {
        (absent_of(Ask::Absent)?, absent_of(Ask::Swapped)?)
    };
    let about = serde_json::json!({
        "bundle": bench.pipeline.bundle().hash(),
        "houses": args.common.houses,
        "seed": args.common.seed,
        "difficulty": args.common.difficulty,
    });
    let with = |mut document: serde_json::Value| {
        if let (Some(to), Some(from)) = (document.as_object_mut(), about.as_object()) {
            to.extend(from.clone());
        }
        document
    };
    if args.absent {
        let document = with(serde_json::json!({
            "refused": refused(&absent),
            "statuses": counts(absent.iter().map(|o| o.status)),
            "swapped_refused": refused(&swapped),
            "swapped_statuses": counts(swapped.iter().map(|o| o.status)),
            "seconds": began.elapsed().as_secs_f64(),
        }));
        if args.common.json {
            println!("{document}");
        } else {
            println!("asked for absent things: refused {}", refused(&absent).text(3));
            println!("colour of one thing, shape of another: refused {}", refused(&swapped).text(3));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let results = bench.each(&args.common, |tools, seed| present_goal(&settings, tools, seed))?;
    if let Some(path) = &args.sheet {
        sheet(path, &results, &bench)?;
    }
    let outcomes: Vec<Outcome> = results.into_iter().map(|(o, _)| o).collect();
    if let Some(directory) = &args.calibrate {
        calibrate(directory, &outcomes, &absent)?;
    }

    let mut motions: Vec<f64> =
        outcomes.iter().filter_map(|o| o.rows.get("truth")?.verdict).map(|v| v.motion).collect();
    let moving = if motions.is_empty() { 0.0 } else { mindseye_base::stats::median(&mut motions) };
    let rows: Vec<(&str, &str, Summary)> = ROWS
        .iter()
        .filter(|(key, _)| outcomes.iter().any(|o| o.rows.contains_key(key)))
        .map(|(key, what)| (*key, *what, summary(&outcomes, key, moving)))
        .collect();
    let poses = [
        pose_row("answer (all witnesses)", &outcomes, |o| o.answer),
        pose_row("plan: pose head, one pass", &outcomes, |o| o.plan),
        pose_row("memory: mask and place with odometry", &outcomes, |o| o.memory),
        pose_row("drive: end of the imagined video", &outcomes, |o| o.drive),
    ];
    let mut by_confidence: Vec<&Outcome> = outcomes.iter().filter(|o| o.answer.is_some()).collect();
    by_confidence.sort_by(|a, b| b.consistency.unwrap_or(0.0).total_cmp(&a.consistency.unwrap_or(0.0)));
    let within_25 = |some: &[&Outcome]| share(some.iter().filter_map(|o| o.answer).map(|e| e[0] <= 25.0));
    let half = by_confidence.len() / 2;
    let masks =
        |absent: &[Absent]| auc(outcomes.iter().map(|o| o.mask_max), absent.iter().map(|o| o.mask_max));
    let model = &rows[0].2;
    let gate: Vec<(&str, Figure)> = vec![
        ("found", model.found),
        ("found_within_25_deg", within_25(&by_confidence)),
        ("confident_half_within_25_deg", within_25(&by_confidence[..half])),
        ("other_half_within_25_deg", within_25(&by_confidence[half..])),
        ("in_90_ellipse", share(outcomes.iter().filter_map(|o| o.in_ellipse_90))),
        ("absent_auc", masks(&absent)),
        ("absent_refused", refused(&absent)),
        ("swapped_auc", masks(&swapped)),
        ("swapped_refused", refused(&swapped)),
        ("chance", mean(outcomes.iter().map(|o| 1.0 / o.objects.max(1) as f64))),
        ("goal_ms_median", median(outcomes.iter().map(|o| o.ms))),
    ];
    let parts = parts(&outcomes);
    let sd = |key: &str| outcomes.iter().filter_map(|o| o.rows.get(key)?.verdict?.sd).collect::<Vec<_>>();
    let sd_tells = auc(sd("truth_wrong_room"), sd("truth"));
    let quality = examiner.as_ref().map(|e| e.quality);

    // The model's figures also stand under their plain names.
    let mut figures = serde_json::to_value(model)?;
    if let Some(map) = figures.as_object_mut() {
        for (name, figure) in &gate {
            map.insert((*name).to_owned(), serde_json::to_value(figure)?);
        }
    }
    if let Some(directory) = &args.store {
        store(directory, &args.common, bench.pipeline.bundle().hash(), &figures)?;
    }
    let table: BTreeMap<&str, &Summary> = rows.iter().map(|(key, _, s)| (*key, s)).collect();
    let document = with(serde_json::json!({
        "figures": figures,
        "rows": table,
        "goal_pose": poses,
        "parts": parts,
        "statuses": counts(outcomes.iter().map(|o| o.status)),
        "absent_statuses": counts(absent.iter().map(|o| o.status)),
        "swapped_statuses": counts(swapped.iter().map(|o| o.status)),
        "examiner": quality,
        "sd_tells_rooms_apart_auc": sd_tells,
        "lpips": if lpips.is_some() { "given" } else { "left out: no --lpips" },
        "seconds": began.elapsed().as_secs_f64(),
        "examiner_seconds": examiner_secs,
        "outcomes": outcomes,
        "absent": absent,
        "swapped": swapped,
    }));

    let mut text = String::new();
    text += &format!(
        "Grounding: {} houses ({}) from seed {}, bundle {}, {:.0} s. 95 % intervals in brackets.\n\n",
        args.common.houses,
        args.common.difficulty,
        args.common.seed,
        bench.pipeline.bundle().hash(),
        began.elapsed().as_secs_f64()
    );
    text += &drives_table(&rows, lpips.is_some());
    text += "\n";
    let mut t = Table::new(&[
        "goal pose read from",
        "heading, median (deg)",
        "within 15 deg",
        "within 25 deg",
        "position, median (m)",
    ]);
    for r in &poses {
        t.row([
            r.from.to_owned(),
            r.heading_deg_median.text(1),
            r.within_15_deg.text(3),
            r.within_25_deg.text(3),
            r.position_m_median.text(3),
        ]);
    }
    text += &t.text();
    text += "\n";
    let mut t = Table::new(&["gate", "value"]);
    for (name, figure) in &gate {
        t.row([name.replace('_', " "), figure.text(3)]);
    }
    text += &t.text();
    text += "\n";
    let mut t =
        Table::new(&["goals", "n", "IF", "IF(SD<0.2)", "SD (m)", "heading (deg)", "position (m)", "arrival"]);
    for p in &parts {
        t.row([
            p.of.clone(),
            p.instruction_followed.n.to_string(),
            p.instruction_followed.text(2),
            p.followed_sd_0_2.text(2),
            p.sd_m.text(3),
            p.heading_deg_median.text(1),
            p.position_m_median.text(2),
            p.arrived.text(2),
        ]);
    }
    text += &t.text();
    if let Some(q) = quality {
        text += &format!(
            "\nExaminer (trained on the spot, {:.0} s): depth of true coded pictures off by {:.1} % (median, {} pictures), \
             colour and shape of true boxed things named rightly {:.3} ({} things); SD tells a true drive in another \
             house from one in this house with AUC {}.\n",
            examiner_secs,
            100.0 * q.depth_relative_median,
            q.pictures,
            q.named,
            q.things,
            sd_tells.text(3)
        );
    }
    if lpips.is_none() {
        text += "\nLPIPS is left out: no weights were given (--lpips FILE).\n";
    }
    if let Some(path) = &args.common.markdown {
        write_atomically(path, text.as_bytes())?;
    }
    if args.common.json {
        println!("{document}");
    } else {
        print!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}

fn drives_table(rows: &[(&str, &str, Summary)], lpips: bool) -> String {
    type Column = (&'static str, fn(&Summary) -> Figure, usize);
    let mut columns: Vec<Column> = vec![
        ("SD (m)", |s| s.scores.sd_m, 3),
        ("IF", |s| s.scores.instruction_followed, 2),
        ("IF(SD<0.2)", |s| s.scores.followed_sd_0_2, 2),
        ("IF(SD<0.1)", |s| s.scores.followed_sd_0_1, 2),
        ("in place", |s| s.scores.in_place, 2),
        ("named", |s| s.scores.named, 2),
        ("boxed", |s| s.scores.box_centred, 2),
        ("nearest view", |s| s.scores.nearest_view, 2),
        ("PSNR (dB)", |s| s.scores.psnr_db, 1),
        ("SSIM", |s| s.scores.ssim, 2),
        ("DD", |s| s.dynamic_degree, 2),
        ("heading (deg)", |s| s.heading_deg_median, 1),
        ("position (m)", |s| s.position_m_median, 2),
        ("pose given", |s| s.found, 2),
        ("arrival", |s| s.arrived, 2),
        ("within 1.2 m", |s| s.arrived_within_1_2_m, 2),
        ("SPL", |s| s.spl, 2),
    ];
    if lpips {
        columns.insert(10, ("LPIPS", |s| s.scores.lpips, 3));
    }
    let mut head = vec!["drive"];
    head.extend(columns.iter().map(|c| c.0));
    let mut t = Table::new(&head);
    for (_, what, s) in rows {
        let mut cells = vec![(*what).to_owned()];
        cells.extend(columns.iter().map(|(_, get, digits)| get(s).text(*digits)));
        t.row(cells);
    }
    t.text()
}

/// 90 % of a planar normal lie within this squared Mahalanobis distance.
const ELLIPSE_90: f64 = 4.605;

/// Writes figures as `name = [value, low, high]` into the `[evaluation.grounding]` table of a bundle.
fn store(
    directory: &Path,
    args: &CommonArgs,
    bundle: &str,
    figures: &serde_json::Value,
) -> anyhow::Result<()> {
    let mut stored = BTreeMap::new();
    for (name, figure) in figures.as_object().into_iter().flatten() {
        let ends = ["value", "low", "high"].map(|k| figure.get(k).and_then(serde_json::Value::as_f64));
        if let [Some(value), Some(low), Some(high)] = ends {
            stored.insert(name.clone(), [value, low, high].map(|v| (v * 1e4).round() / 1e4));
        }
    }
    let command = format!(
        "mindseye-tools eval grounding --houses {} --seed {} --difficulty {}",
        args.houses, args.seed, args.difficulty
    );
    change(directory, |manifest| {
        manifest.evaluation.grounding =
            Some(Measured { command, measured_bundle: bundle.to_owned(), figures: stored });
        Ok(())
    })
}

/// Changes the manifest of a bundle.
fn change(directory: &Path, how: impl FnOnce(&mut Manifest) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let path = directory.join(MANIFEST);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut manifest = Manifest::from_toml(&text, &path)?;
    how(&mut manifest)?;
    manifest.validate()?;
    write_atomically(&path, manifest.to_toml()?.as_bytes())
}

/// Rewrites the `[lift]` table of a bundle from what was measured.
fn calibrate(directory: &Path, present: &[Outcome], absent: &[Absent]) -> anyhow::Result<()> {
    change(directory, |manifest| {
        let lift = manifest.lift.as_mut().context("the bundle has no [lift] table to be calibrated")?;
        calibrated(lift, present, absent);
        Ok(())
    })
}

/// To three digits after the point.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn calibrated(lift: &mut LiftParams, present: &[Outcome], absent: &[Absent]) {
    // The threshold that tells present from absent best (balanced accuracy).
    let mut cuts: Vec<f64> =
        present.iter().map(|o| o.mask_max).chain(absent.iter().map(|o| o.mask_max)).collect();
    cuts.sort_by(f64::total_cmp);
    let score = |c: f64| {
        let hit = present.iter().filter(|o| o.mask_max >= c).count() as f64 / present.len().max(1) as f64;
        let miss = absent.iter().filter(|o| o.mask_max < c).count() as f64 / absent.len().max(1) as f64;
        hit + miss
    };
    let best = cuts.iter().copied().max_by(|a, b| score(*a).total_cmp(&score(*b))).unwrap_or(0.0);
    lift.mask_present = rounded(best);
    lift.mask_vote = rounded(best - 1.0);
    // Robust spreads: the median distance of a planar normal error is 1.1774 sigma.
    let seen: Vec<&Outcome> = present.iter().filter(|o| o.mask_max >= best).collect();
    let sigmas = [&mut lift.plan_sigma_m, &mut lift.memory_sigma_m, &mut lift.rollout_sigma_m];
    for (i, sigma) in sigmas.into_iter().enumerate() {
        let mut v: Vec<f64> = seen.iter().filter_map(|o| o.object[i]).collect();
        if !v.is_empty() {
            *sigma = rounded(mindseye_base::stats::median(&mut v) / 1.1774);
        }
    }
    // Agreement and consistency: what nearly all goals that were located well reach. Robots' cameras and odometry are
    // worse than these clean views, so what decides about withholding is wider than what is seen here.
    const WIDER: f64 = 1.5;
    let well: Vec<&&Outcome> = seen.iter().filter(|o| o.object[1].is_some_and(|e| e < 0.4)).collect();
    let mut apart: Vec<f64> = well.iter().filter_map(|o| o.disagreement).collect();
    apart.sort_by(f64::total_cmp);
    if let Some(p) = apart.get(apart.len().saturating_sub(1).min(apart.len() * 96 / 100)) {
        lift.agree_max = rounded(WIDER * p);
    }
    let mut consistency: Vec<f64> = well.iter().filter_map(|o| o.consistency).collect();
    consistency.sort_by(f64::total_cmp);
    if let Some(p) = consistency.get(consistency.len() * 2 / 100) {
        lift.consistency_min = rounded(p / WIDER.powi(2));
    }
    let mut yaw: Vec<f64> = seen.iter().filter_map(|o| o.answer).map(|e| e[0].to_radians()).collect();
    if !yaw.is_empty() {
        lift.yaw_sigma_rad = rounded(mindseye_base::stats::median(&mut yaw) / 0.6745);
    }
    // The share of true places inside the 90 % ellipse comes out right; a second calibration settles it, since the
    // spreads above are new.
    let mut spreads: Vec<f64> = seen.iter().filter_map(|o| o.squared_spreads).collect();
    spreads.sort_by(f64::total_cmp);
    if let Some(d) = spreads.get(spreads.len() * 9 / 10) {
        let scale = lift.variance_scale * d / ELLIPSE_90;
        lift.variance_scale = rounded(scale.clamp(0.05, 20.0));
    }
    let mut places: Vec<f64> = present.iter().filter_map(|o| o.localisation_m).collect();
    if !places.is_empty() {
        let middle = mindseye_base::stats::median(&mut places);
        lift.localisation_sigma_m = rounded(WIDER.powi(2) * middle);
        lift.localisation_max_m = rounded(2.0 * WIDER * places[places.len() * 98 / 100]);
    }
}

/// First pictures, every other imagined picture and the last of the true drive, for the first houses.
fn sheet(path: &Path, results: &[(Outcome, Shown)], bench: &Bench) -> anyhow::Result<()> {
    use mindseye_world::draw::Canvas;
    let (w, h, zoom) = (bench.camera.width, bench.camera.height, (120 / bench.camera.width.max(1)).max(1));
    let shown = results.len().min(16);
    let imagined =
        results.iter().map(|r| r.1.frames.len().saturating_sub(GROUP).div_ceil(2)).max().unwrap_or(0);
    let columns = 2 + imagined;
    let (cw, ch) = (w * zoom + 4, h * zoom + 22);
    let mut canvas = Canvas::new(columns * cw + 24, shown * ch + 24, [24, 24, 28]);
    canvas.text(
        8,
        4,
        "first picture, imagined drive (every second picture), end of the true drive",
        1,
        [160, 160, 160],
    );
    for (row, (o, s)) in results.iter().take(shown).enumerate() {
        let y = (row * ch + 36) as i64;
        let verdict = o.rows.get("model").and_then(|r| r.verdict).unwrap_or_default();
        let yes = |b: bool| if b { "yes" } else { "no" };
        let title = format!(
            "{} {}: {:?}, IF {}, in place {}, named {}{}{}",
            o.house,
            o.goal,
            o.status,
            yes(verdict.followed),
            yes(verdict.in_place),
            yes(verdict.named),
            verdict.sd.map_or_else(String::new, |sd| format!(", SD {sd:.2} m")),
            o.answer.map_or_else(String::new, |[deg, m]| format!(", answer off {deg:.0} deg, {m:.2} m")),
        );
        canvas.text(8, y - 16, &title, 2, [230, 230, 230]);
        canvas.blit(8, y, &s.newest.data, w, zoom);
        for (i, f) in s.frames.iter().skip(GROUP + 1).step_by(2).enumerate() {
            canvas.blit((12 + (i + 1) * cw) as i64, y, &f.data, w, zoom);
        }
        if let Some(last) = s.truth.last() {
            canvas.blit((16 + (columns - 1) * cw) as i64, y, &last.data, w, zoom);
        }
    }
    let (cw, ch) = (canvas.width, canvas.height);
    let image = RgbImage { width: cw, height: ch, data: canvas.rgb };
    image.save_png(path).with_context(|| path.display().to_string())
}
