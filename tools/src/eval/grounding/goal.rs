//! One goal in one house: the model's answer, controls, trivial answers, and what came of each.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, bail};
use mindseye::config::NavigateTable;
use mindseye::context::GROUP;
use mindseye::ground::{Grounded, Mind, ground, look};
use mindseye::guide::along;
use mindseye::image::{RgbImage, mean_difference};
use mindseye::imagine::{Budget, Flow, NoClock};
use mindseye::lift::{Registered, Witness};
use mindseye_bridge::answer::{FramedPose2, Status};
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_world::{
    BlindController, Camera, Controller, ControllerLimits, Frame, House, OdometryNoise, Pose2,
    ROBOT_RADIUS_M, Robot, goal_pose, project_box, wrap_angle,
};
use serde::Serialize;

use super::GroundingArgs;
use super::adds;
use super::calibrate::ELLIPSE_90;
use super::html::map;
use super::odometry::{Regime, Told};
use crate::eval::altered::Replacement;
use crate::eval::degrade::{blurred_to, noisy_to};
use crate::eval::examiner::Examiner;
use crate::eval::judge::{Judge, Rules, Verdict, true_drive};
use crate::eval::picture::{Lpips, LpipsSession, psnr, squared_difference};
use crate::eval::visit::{
    Bench, Tools, Visit, absent_name, calibration, picture, sees, swapped_name, world_pose,
};

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
    /// Its pictures beside those of the house along the way that the drive itself claims; none where it claims none.
    pub own_way: Option<OwnWay>,
}

/// How like the house, seen along the way that a drive claims, its pictures on the way are (those with a box left out): what
/// they are worth as pictures, wherever the drive leads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OwnWay {
    /// All of them (dB).
    pub psnr: f64,
    /// The worst one (dB).
    pub worst: f64,
}

impl OwnWay {
    /// Of frames (the given first one [`GROUP`] times, the last `boxed` with a box) along a way in the map: one pose for the
    /// given first frame and one for each other.
    fn of(
        house: &House,
        camera: &Camera,
        frames: &[RgbImage],
        boxed: usize,
        way: &[Pose2],
        space: &mut Frame,
    ) -> Option<Self> {
        let on_the_way = frames.get(GROUP..frames.len().checked_sub(boxed)?)?;
        let errors = on_the_way
            .iter()
            .zip(way.get(1..)?)
            .map(|(frame, pose)| squared_difference(frame, &picture(house, *pose, camera, space)));
        let errors: Vec<f64> = errors.collect();
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        let worst = errors.iter().copied().fold(0.0, f64::max);
        (!errors.is_empty()).then(|| Self { psnr: psnr(mean), worst: psnr(worst) })
    }
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
    /// Its difficulty.
    pub difficulty: String,
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
    /// What the drive's pictures show.
    pub registered: Option<Registered>,
    /// Distance of the drive's end from plan and memory in spreads.
    pub drive_apart: Option<f64>,
    /// Why the pose was refused, or what else was said.
    pub reason: Option<String>,
    /// What came of the same goal when its drives were destroyed, by the names in [`ROWS`].
    pub destroyed: BTreeMap<&'static str, Destroyed>,
    /// How far the network misplaces its own context (m).
    pub localisation_m: Option<f64>,
    /// From the robot to the object (m).
    pub distance_m: f64,
    /// Whether the first picture shows the object.
    pub visible_at_start: bool,
    /// Whether it is in another room than the robot; none where there is but one.
    pub in_another_room: Option<bool>,
    /// Whether the rollout begins where the robot is, and not where it was when it saw the thing.
    pub begins_here: bool,
    /// Context groups in use that show the object.
    pub groups_with_it: usize,
    /// Whether the first drive arrived.
    pub first_arrived: Option<bool>,
    /// How far from there the goal's pose is, as the runtime sees it when it looks once more (m).
    pub looked_off_m: Option<f64>,
    /// Whether that is near enough, for the last drive that was made.
    pub confirmed: Option<bool>,
    /// Whether the goal was asked again because it was not.
    pub reasked: bool,
    /// Whether a robot that has a map of several rooms, and is told by it where it is, arrives at the first answer's pose.
    pub arrived_by_map: Option<bool>,
    /// Whether the robot's body would touch something on the imagined path.
    pub touched: Option<bool>,
    /// How far the pictures of the drive that was sampled from the video alone stand, in the true house, from where the
    /// answer's path puts them: the mean over latents of the distance of the last picture (m). None without an examiner.
    pub off_path_m: Option<f64>,
    /// Mean error of the codec on what was remembered (0..1).
    pub reconstruction_error: Option<f64>,
    /// Objects in the house.
    pub objects: usize,
    /// In how many remembered views the object is seen, in how many whole, and in how many from near.
    pub sights: [usize; 3],
    /// Where poses that rest on some of the witnesses lead in one drive, by the names in `adds::WAYS`; without
    /// those that are not given.
    pub rests_on: BTreeMap<&'static str, Reached>,
    /// Time for the answer (ms).
    pub ms: f64,
    /// By the names in [`ROWS`].
    pub rows: BTreeMap<&'static str, Row>,
}

/// What came of a goal whose drives were destroyed.
#[derive(Clone, Debug, Serialize)]
pub struct Destroyed {
    /// What was answered.
    pub status: Status,
    /// Why.
    pub reason: Option<String>,
    /// What the pictures showed.
    pub registered: Option<Registered>,
    /// Distance of the drive's end from plan and memory in spreads.
    pub drive_apart: Option<f64>,
}

/// Kinds of drives, with what they are.
pub const ROWS: [(&str, &str); 16] = [
    ("model", "the model: guided where it was, else video only"),
    ("video_only", "the model, video only: the witness"),
    ("warp", "what was seen, carried into the guided drive's views, no network"),
    ("wrong_context", "control: memories of another house, first picture true"),
    ("wrong_room", "control: another house altogether"),
    ("destroyed_zeros", "drive destroyed: zeros"),
    ("destroyed_noise", "drive destroyed: noise"),
    ("destroyed_house", "drive destroyed: the drive of another house"),
    ("destroyed_end", "drive destroyed: its last latents of another room"),
    ("random_object", "chance: true drive to a random object"),
    ("nearest_remembered", "baseline: nearest remembered picture (oracle poses)"),
    ("copy_first", "baseline: copy of the first picture"),
    ("truth", "ceiling: the true drive through the codec"),
    ("truth_wrong_room", "SD control: a true drive in another house"),
    ("truth_blurred", "SD ruler: the true drive, blurred to the model's PSNR"),
    ("truth_noisy", "SD ruler: the true drive, with noise to the model's PSNR"),
];

/// Which thing that is not there is asked for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum AbsentKind {
    /// Any name that nothing in the house has.
    Any,
    /// The colour of one thing with the shape of another.
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
    args: &GroundingArgs,
) -> anyhow::Result<Asked> {
    let told = Told::of(scene, args.odometry, seed);
    let began = Instant::now();
    let goal = text_goal(seed, name, args.candidates);
    let out = ground(&mut tools.mind, &told.scene, &goal, &NoClock, None, &mut |_| Flow::Continue)?;
    if out.answer.status == Status::Failed {
        bail!("{}", out.answer.reason.as_deref().unwrap_or("failed"));
    }
    Ok(Asked { out, told, ms: began.elapsed().as_secs_f64() * 1e3 })
}

/// What was told and answered, and how long that took.
struct Asked {
    out: Grounded,
    told: Told,
    ms: f64,
}

impl Asked {
    /// The answer's pose, in the map of the house that it was asked in.
    fn pose(&self) -> Option<Pose2> {
        self.out.answer.pose.as_ref().map(|p| self.told.in_map(p))
    }

    /// The way that a drive claims which was led by nothing, in the same map: one pose for the given first frame and one for
    /// each other, between those of the answer's path.
    fn own_way(&self) -> Vec<Pose2> {
        self.in_map(&along(&self.out.path, 0, None))
    }

    fn in_map(&self, way: &[mindseye::planar::Pose2]) -> Vec<Pose2> {
        way.iter().map(|p| self.told.in_map(&FramedPose2::new("", *p))).collect()
    }

    /// Where the rollout begins, in the same map: here, where it is not known to be elsewhere.
    fn begins(&self, here: Pose2) -> Pose2 {
        self.out.origin.map_or(here, |o| self.told.in_map(&FramedPose2::new("", o)))
    }

    /// The answer's path, one pose per target latent, in the same map.
    fn path(&self) -> Vec<Pose2> {
        self.in_map(&self.out.path)
    }
}

pub(super) struct Case<'a> {
    pub(super) house: &'a House,
    /// The house as it was when it was looked around in.
    remembered: &'a House,
    pub(super) here: Pose2,
    object: usize,
    pub(super) truth: Option<Pose2>,
    camera: &'a Camera,
    odometry: Regime,
}

impl Case<'_> {
    fn error(&self, p: Pose2) -> Option<[f64; 2]> {
        let t = self.truth?;
        Some([wrap_angle(p.yaw - t.yaw).abs().to_degrees(), (p.x - t.x).hypot(p.y - t.y)])
    }

    /// Drives to a pose and looks.
    fn reach(&self, pose: Pose2) -> Reached {
        self.drive_to(pose, self.here, 0.0).0
    }

    /// Drives from a place to a pose, after having driven some metres already, and looks; also where it then stands, and
    /// the metres in all.
    fn drive_to(&self, pose: Pose2, from: Pose2, before: f64) -> (Reached, Pose2, f64) {
        let (end, driven) = drive(self, from, pose);
        let (edge, length) = (self.edge_from(end), before + driven);
        let shortest = self.truth.map_or(0.0, |t| t.distance(self.here));
        (Reached { error: self.error(pose), ..reached(edge, length, shortest) }, end, length)
    }

    /// Distance to the object's edge (m); infinite where it is out of view.
    fn edge_from(&self, end: Pose2) -> f64 {
        let named = &self.house.objects[self.object];
        match project_box(self.house, end, self.camera, self.object) {
            Some(_) => named.distance(end.x, end.y),
            None => f64::INFINITY,
        }
    }

    /// Whether the robot's body touches something between poses (map).
    fn touches(&self, path: &[Pose2]) -> bool {
        path.windows(2).any(|pair| {
            (0..=10).any(|k| {
                let part = f64::from(k) / 10.0;
                let between = |a: f64, b: f64| a + part * (b - a);
                let (x, y) = (between(pair[0].x, pair[1].x), between(pair[0].y, pair[1].y));
                self.house.clearance(x, y) < ROBOT_RADIUS_M
            })
        })
    }
}

/// How far a thing is moved since it was seen, where there is room (m).
const MOVED_M: f64 = 1.5;

/// From the object's edge, at most, when the robot has arrived (m).
const ARRIVED_M: f64 = 1.0;
/// The same for the wider figure (m): drives in training end 1.2 m from the object's centre.
const ARRIVED_WIDER_M: f64 = 1.2;

/// How a drive ended: `edge` from the object's edge, `length` driven, `shortest` from start to goal (m).
fn reached(edge: f64, length: f64, shortest: f64) -> Reached {
    let arrived = edge <= ARRIVED_M;
    Reached {
        error: None,
        arrived,
        arrived_within_1_2_m: edge <= ARRIVED_WIDER_M,
        spl: match (arrived, length > 1e-3) {
            (false, _) => 0.0,
            (true, false) => 1.0,
            (true, true) => (shortest / length).min(1.0),
        },
    }
}

/// Noise of the wheels on drives: as the runtime's odometry, but never better than a fair robot's.
fn wheels(odometry: Regime) -> OdometryNoise {
    match odometry {
        Regime::Five => odometry.noise(),
        Regime::Exact | Regime::Typical | Regime::None => OdometryNoise::typical(),
    }
}

/// Drives a simulated robot to a goal as a robot without a map does: by its odometry, and around what stops it. Where it
/// ends, and the driven length (m).
fn drive(case: &Case<'_>, from: Pose2, goal: Pose2) -> (Pose2, f64) {
    let mut robot = Robot::new(from, wheels(case.odometry), 1);
    let mut controller = BlindController::new(from, goal, ControllerLimits::default());
    let mut length = 0.0;
    for _ in 0..1200 {
        if controller.done() {
            break;
        }
        let before = robot.pose;
        let (v, w) = controller.step(robot.odom, robot.collided, 0.05);
        robot.step(case.house, v, w, 0.05);
        length += before.distance(robot.pose);
    }
    (robot.pose, length)
}

/// Where a robot ends that plans its way on a map.
fn drive_by_map(case: &Case<'_>, goal: Pose2) -> Pose2 {
    let mut robot = Robot::new(case.here, OdometryNoise::default(), 1);
    let mut controller = Controller::new(case.house, case.here, goal, ControllerLimits::default());
    for _ in 0..2400 {
        if controller.done() {
            break;
        }
        let (v, w) = controller.step(robot.pose, 0.05);
        robot.step(case.house, v, w, 0.05);
    }
    robot.pose
}

/// The seed of a house that lacks this name, for controls.
fn other_house(bench: &Bench, seed: u64, name: &str) -> u64 {
    (0..)
        .map(|k| (seed ^ 0x5ca1_ab1e).wrapping_add(k << 32))
        .find(|s| House::generate(*s, bench.difficulty(*s).1).find(name).is_none())
        .unwrap_or(seed)
}

/// Pictures of one goal for the sheet.
pub(super) struct SheetRow {
    pub(super) newest: RgbImage,
    /// The drive that is shown, in as many pixels as there are.
    pub(super) frames: Vec<RgbImage>,
    /// The house seen along the way that it claims, in the same pixels; only for a sheet.
    pub(super) house: Vec<RgbImage>,
    pub(super) truth: Vec<RgbImage>,
    /// From above, for a report.
    pub(super) map: Option<RgbImage>,
}

/// What is drawn into the map of a report.
pub(super) struct MapSheet {
    pub(super) path: Vec<Pose2>,
    pub(super) answer: Option<Pose2>,
}

/// What all goals are asked with.
pub(super) struct Setup<'a> {
    pub(super) bench: &'a Bench,
    pub(super) args: &'a GroundingArgs,
    pub(super) examiner: Option<&'a Examiner>,
    pub(super) lpips: Option<&'a Lpips>,
}

/// What a question for something that is not there came to.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Absent {
    house: u64,
    goal: String,
    pub(super) status: Status,
    pub(super) mask_max: f64,
}

#[cfg(test)]
impl Absent {
    /// A question of which nothing is known but the largest mask logit.
    pub(super) fn with_mask(mask_max: f64) -> Self {
        Self { house: 0, goal: String::new(), status: Status::NotInContext, mask_max }
    }
}

pub(super) fn absent_goal(
    s: &Setup<'_>,
    tools: &mut Tools,
    seed: u64,
    kind: AbsentKind,
) -> anyhow::Result<Option<Absent>> {
    let bench = s.bench;
    let mut v = bench.visit(seed, tools.encoder.as_mut())?;
    v.rng.below(v.house.objects.len()); // the same draws as for a present one
    let name = match kind {
        AbsentKind::Swapped => swapped_name(&v.house, &mut v.rng),
        AbsentKind::Any => Some(absent_name(&v.house, &mut v.rng)),
    };
    let Some(name) = name else { return Ok(None) };
    tools.mind.by.learn_depth(&[&v], &bench.camera);
    let Asked { out, .. } = ask(tools, &v, seed, &name, s.args)?;
    let mask_max = out.lifted.as_ref().map_or(f64::NAN, |l| l.estimate.mask_max);
    Ok(Some(Absent { house: seed, goal: name, status: out.answer.status, mask_max }))
}

/// Rows of one goal while they are filled.
struct Rows<'a, 'j> {
    case: &'a Case<'j>,
    judge: Judge<'j>,
    lpips: Option<LpipsSession>,
    /// Frames at the end of a drive that show the box.
    boxed: usize,
    rows: BTreeMap<&'static str, Row>,
}

impl Rows<'_, '_> {
    fn add(
        &mut self,
        key: &'static str,
        frames: &[RgbImage],
        pose: Pose,
        tools: &mut Tools,
    ) -> anyhow::Result<()> {
        let verdict = if frames.is_empty() {
            None
        } else {
            Some(self.judge.verdict(frames, &mut tools.eager, self.lpips.as_mut())?)
        };
        let reach = |p: Pose2| self.case.reach(p);
        let (reached, found) = match pose {
            Pose::Answer(p) => (Some(p.map(reach).unwrap_or_default()), Some(p.is_some())),
            Pose::Known(p) => (p.map(reach), None),
            Pose::None => (None, None),
        };
        self.rows.insert(key, Row { verdict, reached, found, own_way: None });
        Ok(())
    }

    /// Holds a drive of the model against the house seen along the way (in the map) that it claims.
    fn along(&mut self, key: &'static str, frames: &[RgbImage], way: &[Pose2]) {
        let Some(row) = self.rows.get_mut(key) else { return };
        let boxed = self.boxed;
        row.own_way = OwnWay::of(self.case.house, self.case.camera, frames, boxed, way, &mut Frame::new());
    }
}

/// One house from its recording to the figures of its goal. Long, since it is one trial whose parts share its things.
pub(super) fn present_goal(
    s: &Setup<'_>,
    tools: &mut Tools,
    seed: u64,
) -> anyhow::Result<(Outcome, SheetRow)> {
    let (bench, camera) = (s.bench, &s.bench.camera);
    let mut v = bench.visit(seed, tools.encoder.as_mut())?;
    let object = v.rng.below(v.house.objects.len());
    let name = v.house.objects[object].name.clone();
    let remembered = v.house.clone();
    if s.args.moved {
        let moved = v.house.with_moved(object, MOVED_M, &mut v.rng);
        v.house = moved.with_context(|| format!("the {name} fits nowhere else"))?;
        v = v.moved_to(v.here, camera);
    }
    let spec = tools.mind.spec().clone();
    let targets = spec.settings.target_latents;
    // Without lift heads boxes and poses cannot be judged.
    calibration(&spec)?;
    tools.mind.by.learn_depth(&[&v], camera);
    let asked = ask(tools, &v, seed, &name, s.args)?;
    let rules = Rules { camera, examiner: s.examiner, box_latents: spec.box_latents, box_min: spec.box_min };
    // Draws what follows from its own copy, since the house is borrowed from the visit.
    let mut rng = v.rng.clone();
    // The near side of a thing in another room is that of the view that the way there begins with.
    let start = asked.begins(v.here);
    let truth = goal_pose(&v.house, start, object);
    let odometry = s.args.odometry;
    let case =
        Case { house: &v.house, remembered: &remembered, here: v.here, object, truth, camera, odometry };
    let mut rows = Rows {
        case: &case,
        judge: Judge::new(rules, &v.house, start, object, targets),
        lpips: s.lpips.map(Lpips::session).transpose()?,
        boxed: spec.box_latents.max(1) * GROUP,
        rows: BTreeMap::new(),
    };
    rows.add("model", &asked.out.frames, Pose::Answer(None), tools)?;
    let closed = closed_loop(s, &case, &v, &asked, (seed, &name), tools)?;
    if let Some(row) = rows.rows.get_mut("model") {
        (row.reached, row.found) = (Some(closed.reached), Some(asked.out.answer.pose.is_some()));
    }
    let video_only = asked.out.guided.as_ref().map_or(&asked.out.frames, |guided| &guided.video_only);
    rows.add("video_only", video_only, Pose::None, tools)?;
    rows.along("video_only", video_only, &asked.own_way());
    let off_path_m = off_path(&rows.judge.registered, &asked.path());
    if let Some(guided) = &asked.out.guided {
        rows.add("warp", &guided.carried, Pose::None, tools)?;
        let way = asked.in_map(&guided.way);
        rows.along("warp", &guided.carried, &way);
        rows.along("model", &asked.out.frames, &way);
    } else {
        rows.along("model", &asked.out.frames, &asked.own_way());
    }
    let mut truth_frames = Vec::new();
    let mut destroyed = BTreeMap::new();
    let other = if s.args.quick && !s.args.destroyed {
        None
    } else {
        let other_seed = other_house(bench, seed, &name);
        Some(bench.visit(other_seed, tools.encoder.as_mut())?)
    };
    if let Some(other) = &other {
        tools.mind.by.learn_depth(&[&v, other], camera);
        let ask = |tools: &mut Tools, scene: &Visit| ask(tools, scene, seed, &name, s.args);
        destroyed = destroyed_drives(&mut rows, tools, &v, other, seed, ask)?;
    }
    if let Some(other) = other.filter(|_| !s.args.quick) {
        let ask = |tools: &mut Tools, scene: &Visit| ask(tools, scene, seed, &name, s.args);
        controls(&mut rows, tools, &v, &other, ask)?;
        let random = rng.below(v.house.objects.len());
        truth_frames = references(&mut rows, tools, (&v, start), random, &rules, targets)?;
        let there = rng.below(other.house.objects.len());
        let frames = tools.coded_drive(&true_drive(&other.house, other.here, there, &rules, targets))?;
        rows.add("truth_wrong_room", &frames, Pose::None, tools)?;
        if s.examiner.is_some() {
            rulers(&mut rows, tools, &truth_frames, seed)?;
        }
    }
    let rows = rows.rows;
    let map = s.args.report.is_some().then(|| {
        if truth_frames.is_empty() {
            truth_frames = true_drive(&v.house, start, object, &rules, targets);
        }
        map(&case, &MapSheet { path: asked.path(), answer: asked.pose() })
    });
    let kept = v.memory.iter().filter_map(|seen| v.sweep.get(GROUP * seen.info.index as usize).copied());
    let mut params = calibration(&spec)?.clone();
    params.standoff_m = params.standoff_for(&format!("find the {name}"));
    let rests_on = adds::poses(&asked.out, &params).into_iter();
    let outcome = Outcome {
        difficulty: bench.difficulty(seed).0.to_owned(),
        sights: adds::sights(&remembered, camera, kept, object),
        rests_on: rests_on.map(|(key, pose)| (key, case.reach(start.compose(world_pose(pose))))).collect(),
        destroyed,
        off_path_m,
        reconstruction_error: reconstruction_error(tools, &v)?,
        ..outcome(&case, &v, &asked, (seed, name), closed, rows)
    };
    let frames = asked.out.shown().to_vec();
    let house = match (s.args.sheet.is_some(), &asked.out.guided, frames.first()) {
        (true, Some(guided), Some(first)) => {
            let eye = Camera { width: first.width, height: first.height, ..*camera };
            let mut frame = Frame::new();
            let way = asked.in_map(&guided.way);
            let pictures = way.iter().map(|pose| picture(&v.house, *pose, &eye, &mut frame));
            pictures.collect()
        }
        _ => Vec::new(),
    };
    Ok((outcome, SheetRow { newest: v.newest.clone(), frames, house, truth: truth_frames, map }))
}

/// What came of driving to the model's answer.
#[derive(Default)]
struct Closed {
    reached: Reached,
    first_arrived: Option<bool>,
    looked_off_m: Option<f64>,
    confirmed: Option<bool>,
    reasked: bool,
    arrived_by_map: Option<bool>,
}

/// Drives to the answer, looks once more at what was asked for, and asks once more from there when it is elsewhere: as the
/// runtime does where it is told of arrivals.
fn closed_loop(
    s: &Setup<'_>,
    case: &Case<'_>,
    v: &Visit,
    asked: &Asked,
    (seed, name): (u64, &str),
    tools: &mut Tools,
) -> anyhow::Result<Closed> {
    let Some(pose) = asked.pose() else { return Ok(Closed::default()) };
    let limits = NavigateTable::default();
    let goal = text_goal(seed ^ 1, name, s.args.candidates);
    let look_from = |end: Pose2, tools: &mut Tools| {
        let told = Told::of(&v.moved_to(end, case.camera), s.args.odometry, seed ^ 1);
        let budget = Budget { clock: &NoClock, until: None };
        look(&mut tools.mind, &told.scene, &goal, budget)
    };
    let here = |off: Option<mindseye::planar::Pose2>| {
        off.is_some_and(|off| {
            off.x.hypot(off.y) <= limits.within_m && off.yaw.abs().to_degrees() <= limits.within_deg
        })
    };
    let (reached, end, length) = case.drive_to(pose, case.here, 0.0);
    let off = look_from(end, tools);
    let mut closed = Closed { reached, confirmed: Some(here(off)), ..Closed::default() };
    closed.looked_off_m = off.map(|off| off.x.hypot(off.y));
    closed.first_arrived = Some(reached.arrived);
    closed.arrived_by_map =
        (case.house.rooms.len() > 1).then(|| case.edge_from(drive_by_map(case, pose)) <= ARRIVED_M);
    if closed.confirmed == Some(true) {
        return Ok(closed);
    }
    closed.reasked = true;
    let again = ask(tools, &v.moved_to(end, case.camera), seed ^ 1, name, s.args)?;
    if let Some(pose) = again.pose() {
        let (reached, end, _) = case.drive_to(pose, end, length);
        closed.reached = reached;
        closed.confirmed = Some(here(look_from(end, tools)));
    }
    Ok(closed)
}

/// How badly the codec reproduces what was remembered (0..1); none where latents cannot be decoded alone.
fn reconstruction_error(tools: &mut Tools, v: &Visit) -> anyhow::Result<Option<f64>> {
    if !tools.mind.decodes_alone() {
        return Ok(None);
    }
    let latents: Vec<f32> = v.memory.iter().flat_map(|c| c.latent.iter().copied()).collect();
    let frames = tools.mind.decode(&latents)?;
    let decoded = frames.iter().skip(GROUP - 1).step_by(GROUP);
    let errors: Vec<f64> =
        v.memory.iter().zip(decoded).filter_map(|(c, frame)| mean_difference(frame, &c.picture)).collect();
    Ok((!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64))
}

/// The control that the drive decides: the same goal with the same memory, but other pictures in the drive.
fn destroyed_drives(
    rows: &mut Rows<'_, '_>,
    tools: &mut Tools,
    v: &Visit,
    other: &Visit,
    seed: u64,
    ask: impl Fn(&mut Tools, &Visit) -> anyhow::Result<Asked>,
) -> anyhow::Result<BTreeMap<&'static str, Destroyed>> {
    let there = ask(tools, other)?.out;
    let (len, targets) = (tools.mind.spec().latent_len, tools.mind.spec().settings.target_latents);
    let other_house = tools.latents_of(&there.frames)?;
    let mut rng = mindseye_world::Rng::new(seed ^ 0xde57);
    let noise = (0..targets * len).map(|_| rng.normal() as f32).collect();
    // The end is the last motion and the box.
    let end = targets.saturating_sub(2);
    let kinds = [
        ("destroyed_zeros", 0, vec![0.0; targets * len]),
        ("destroyed_noise", 0, noise),
        ("destroyed_house", 0, other_house.clone()),
        ("destroyed_end", end, other_house.get(end * len..).unwrap_or_default().to_vec()),
    ];
    let mut out = BTreeMap::new();
    for (key, first, values) in kinds {
        tools.mind.by.replacement = Some(Replacement { latents: first..targets, values });
        let asked = ask(tools, v);
        tools.mind.by.replacement = None;
        let asked = asked?;
        rows.add(key, &[], Pose::Answer(asked.pose()), tools)?;
        rows.along(key, &asked.out.frames, &asked.own_way());
        let answer = asked.out;
        let lifted = answer.lifted.as_ref();
        out.insert(
            key,
            Destroyed {
                status: answer.answer.status,
                reason: answer.answer.reason.clone(),
                registered: lifted.and_then(|l| l.registered),
                drive_apart: lifted.and_then(|l| l.drive_apart),
            },
        );
    }
    Ok(out)
}

/// Controls: the memories of a house without such a thing; with and without the true first picture.
fn controls(
    rows: &mut Rows<'_, '_>,
    tools: &mut Tools,
    v: &Visit,
    other: &Visit,
    ask: impl Fn(&mut Tools, &Visit) -> anyhow::Result<Asked>,
) -> anyhow::Result<()> {
    let mixed = Visit {
        house: v.house.clone(),
        memory: other.memory.clone(),
        sweep: v.sweep.clone(),
        newest: v.newest.clone(),
        newest_detail: v.newest_detail.clone(),
        here: v.here,
        rng: v.rng.clone(),
    };
    let wrong = ask(tools, &mixed)?;
    rows.add("wrong_context", &wrong.out.frames, Pose::Answer(wrong.pose()), tools)?;
    let wrong = ask(tools, other)?;
    let pose = wrong.pose().map(|p| v.here.compose(other.here.relative(p)));
    rows.add("wrong_room", &wrong.out.frames, Pose::Answer(pose), tools)
}

/// Chance, trivial answers and the true drive; returns the frames of the latter.
fn references(
    rows: &mut Rows<'_, '_>,
    tools: &mut Tools,
    (v, start): (&Visit, Pose2),
    random: usize,
    rules: &Rules<'_>,
    targets: usize,
) -> anyhow::Result<Vec<RgbImage>> {
    let case = rows.case;
    let frames = tools.coded_drive(&true_drive(&v.house, start, random, rules, targets))?;
    rows.add("random_object", &frames, Pose::Known(goal_pose(&v.house, start, random)), tools)?;
    let first = tools.coded_still(&v.newest)?;
    rows.add("copy_first", &vec![first; GROUP * targets], Pose::Known(Some(v.here)), tools)?;
    let nearest = case.truth.and_then(|goal| {
        let cost = |p: Pose2| p.distance(goal) + wrap_angle(p.yaw - goal.yaw).abs();
        let poses = v.memory.iter().filter_map(|c| Some((world_pose(c.info.odom_from_base?), &c.picture)));
        poses.min_by(|a, b| cost(a.0).total_cmp(&cost(b.0)))
    });
    if let Some((pose, picture)) = nearest {
        let still = tools.coded_still(picture)?;
        rows.add("nearest_remembered", &vec![still; GROUP * targets], Pose::Known(Some(pose)), tools)?;
    }
    let truth = tools.coded_drive(&true_drive(&v.house, start, case.object, rules, targets))?;
    rows.add("truth", &truth, Pose::Known(case.truth), tools)?;
    Ok(truth)
}

/// What SD makes of the true drive when its pictures are as unlike the truth as the model's, by blur and by noise: what
/// of the model's SD is owed to its pictures alone.
fn rulers(
    rows: &mut Rows<'_, '_>,
    tools: &mut Tools,
    truth_frames: &[RgbImage],
    seed: u64,
) -> anyhow::Result<()> {
    let Some(psnr) = rows.rows.get("model").and_then(|r| r.verdict).map(|v| v.psnr) else { return Ok(()) };
    let truth = rows.judge.truth.clone();
    let blurred = blurred_to(truth_frames, &truth, psnr);
    rows.add("truth_blurred", &blurred, Pose::None, tools)?;
    let noisy = noisy_to(truth_frames, &truth, psnr, seed);
    rows.add("truth_noisy", &noisy, Pose::None, tools)
}

/// Mean distance (m) of each latent's last picture, by where pictures stand (without the given first one), from the path,
/// which has one pose for the first picture and one per latent. None when one of them is empty.
fn off_path(registered: &[Pose2], path: &[Pose2]) -> Option<f64> {
    let last = registered.iter().skip(GROUP - 1).step_by(GROUP);
    let far: Vec<f64> = last.zip(path.iter().skip(1)).map(|(at, claimed)| at.distance(*claimed)).collect();
    (!far.is_empty()).then(|| far.iter().sum::<f64>() / far.len() as f64)
}

/// Squared Mahalanobis distance of the true place from a pose, by a covariance in ROS order.
fn squared_spreads(covariance: &[f64], pose: Pose2, truth: Pose2) -> f64 {
    let (dx, dy) = (pose.x - truth.x, pose.y - truth.y);
    let (a, b, d) = (covariance[0], covariance[1], covariance[7]);
    let det = (a * d - b * b).max(1e-12);
    (d * dx * dx - 2.0 * b * dx * dy + a * dy * dy) / det
}

/// Whether a squared Mahalanobis distance lies inside the 90 % ellipse.
fn in_ellipse_90(squared_spreads: f64) -> bool {
    squared_spreads <= ELLIPSE_90
}

/// Everything that is kept of a goal. Long, since it names every field once.
fn outcome(
    case: &Case<'_>,
    v: &Visit,
    asked: &Asked,
    (seed, name): (u64, String),
    closed: Closed,
    rows: BTreeMap<&'static str, Row>,
) -> Outcome {
    let Asked { out, told, ms } = asked;
    let (camera, object) = (case.camera, case.object);
    let named = &v.house.objects[object];
    let seen_from_here = v.here.relative(Pose2::unwrapped(named.x, named.y, 0.0));
    let lifted = out.lifted.as_ref();
    let pose = asked.pose();
    let begins = asked.begins(case.here);
    let witness = |w: Option<Witness>| w.and_then(|w| case.error(begins.compose(world_pose(w.pose))));
    let seen_from_beginning = begins.relative(Pose2::unwrapped(named.x, named.y, 0.0));
    let off = |w: Option<Witness>| {
        w.map(|w| (w.object.0 - seen_from_beginning.x).hypot(w.object.1 - seen_from_beginning.y))
    };
    let [plan, memory, drive] = [
        lifted.and_then(|l| l.estimate.plan),
        lifted.and_then(|l| l.estimate.memory),
        lifted.and_then(|l| l.rollout),
    ];
    let covariance = out.answer.covariance.as_deref();
    let squared_spreads = match (covariance, pose, case.truth) {
        (Some(c), Some(p), Some(t)) => Some(squared_spreads(c, told.in_answer(p), told.in_answer(t))),
        _ => None,
    };
    let path = asked.path();
    let mut frame = Frame::new();
    let groups_with_it = out
        .used
        .iter()
        .filter_map(|p| v.memory.get(*p))
        .filter(|c| {
            let k = c.info.index as usize;
            let seen = |p: &Pose2| sees(case.remembered, *p, camera, object, &mut frame);
            v.sweep[GROUP * k - 3..=GROUP * k].iter().any(seen)
        })
        .count();
    Outcome {
        house: seed,
        difficulty: String::new(),
        goal: name,
        status: out.answer.status,
        consistency: out.answer.consistency,
        answer: pose.and_then(|p| case.error(p)),
        plan: witness(plan),
        memory: witness(memory),
        drive: witness(drive),
        object: [off(plan), off(memory), off(drive)],
        in_ellipse_90: squared_spreads.map(in_ellipse_90),
        squared_spreads,
        heading_std_deg: covariance.map(|c| c[35].max(0.0).sqrt().to_degrees()),
        mask_max: lifted.map_or(f64::NAN, |l| l.estimate.mask_max),
        disagreement: lifted.and_then(|l| l.estimate.disagreement),
        localisation_m: lifted.and_then(|l| l.estimate.localisation_m),
        registered: lifted.and_then(|l| l.registered),
        drive_apart: lifted.and_then(|l| l.drive_apart),
        reason: out.answer.reason.clone(),
        destroyed: BTreeMap::new(),
        distance_m: seen_from_here.x.hypot(seen_from_here.y),
        visible_at_start: sees(&v.house, v.here, camera, object, &mut frame),
        in_another_room: (v.house.rooms.len() > 1)
            .then(|| !v.house.rooms[named.room].rect.contains(v.here.x, v.here.y)),
        begins_here: begins.distance(v.here) < 1e-6,
        groups_with_it,
        first_arrived: closed.first_arrived,
        looked_off_m: closed.looked_off_m,
        confirmed: closed.confirmed,
        reasked: closed.reasked,
        arrived_by_map: closed.arrived_by_map,
        touched: (!path.is_empty()).then(|| case.touches(&path)),
        off_path_m: None,
        reconstruction_error: None,
        objects: v.house.objects.len(),
        sights: [0; 3],
        rests_on: BTreeMap::new(),
        ms: *ms,
        rows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_world::Difficulty;

    #[test]
    fn arrival_and_path_length_by_hand() {
        let of = |edge: f64, length: f64, shortest: f64| {
            let r = reached(edge, length, shortest);
            (r.arrived, r.arrived_within_1_2_m, r.spl)
        };
        assert_eq!(of(0.99, 2.0, 1.5), (true, true, 0.75));
        assert_eq!(of(1.01, 2.0, 1.5), (false, true, 0.0));
        assert_eq!(of(1.19, 2.0, 1.5), (false, true, 0.0));
        assert_eq!(of(1.21, 2.0, 1.5), (false, false, 0.0));
        // Standing nearer than the goal pose asks for: no more than one.
        assert_eq!(of(0.5, 1.0, 1.5), (true, true, 1.0));
        assert_eq!(of(0.5, 0.0, 0.0), (true, true, 1.0));
        assert_eq!(of(f64::INFINITY, 3.0, 1.0), (false, false, 0.0));
    }

    #[test]
    fn pictures_are_held_against_the_house_along_their_own_way() {
        let house = House::generate(5, &Difficulty::plain());
        let (camera, space) = (Camera::new(24, 16), &mut Frame::new());
        let at = |k: usize| Pose2::unwrapped(0.05 * k as f64, 0.0, 0.1 * k as f64);
        let way: Vec<Pose2> = (0..=2 * GROUP).map(at).collect();
        let mut frames = vec![RgbImage::filled(24, 16, [0; 3]); GROUP];
        frames.extend(way[1..].iter().map(|p| picture(&house, *p, &camera, space)));
        // A box in the last ones does not count.
        frames.iter_mut().skip(2 * GROUP).for_each(|f| f.data.fill(255));
        let of = |frames: &[RgbImage], space: &mut Frame| {
            OwnWay::of(&house, &camera, frames, GROUP, &way, space).expect("there is a way")
        };
        assert_eq!(of(&frames, space), OwnWay { psnr: 60.0, worst: 60.0 });
        // One picture of four that is off by 8 everywhere: mean squares of 64 and of 16.
        for v in &mut frames[GROUP + 2].data {
            *v = if *v > 127 { *v - 8 } else { *v + 8 };
        }
        let got = of(&frames, space);
        assert!((got.worst - psnr(64.0)).abs() < 1e-9 && (got.psnr - psnr(16.0)).abs() < 1e-9, "{got:?}");
        assert!(OwnWay::of(&house, &camera, &frames, GROUP, &[], space).is_none());
        assert!(OwnWay::of(&house, &camera, &[], GROUP, &way, space).is_none());
    }

    #[test]
    fn pictures_off_the_path_by_hand() {
        let at = |x: f64| Pose2::unwrapped(x, 0.0, 0.0);
        // Of eight pictures the fourth and the eighth are held against the second and the third pose.
        let registered: Vec<Pose2> = (0..8).map(|k| at(f64::from(k))).collect();
        assert_eq!(off_path(&registered, &[at(9.0), at(2.5), at(7.1)]), Some((0.5 + (7.1 - 7.0)) / 2.0));
        assert_eq!(off_path(&registered, &[]), None);
        assert_eq!(off_path(&[], &[at(0.0), at(1.0)]), None);
    }

    #[test]
    fn a_drive_to_the_goal_arrives_and_one_to_nowhere_does_not() {
        let house = House::generate(5, &Difficulty::plain());
        let camera = Camera::new(24, 16);
        let here = mindseye_world::random_pose(&house, &mut mindseye_world::Rng::new(5));
        let object = 0;
        let truth = goal_pose(&house, here, object);
        let case = Case {
            house: &house,
            remembered: &house,
            here,
            object,
            truth,
            camera: &camera,
            odometry: Regime::Exact,
        };
        let goal = truth.expect("it can be stood before");
        let good = case.reach(goal);
        assert!(good.arrived && good.spl > 0.6 && good.spl <= 1.0, "{good:?}");
        assert_eq!(good.error, Some([0.0, 0.0]));
        // Looking away from it.
        let away = case.reach(Pose2::new(goal.x, goal.y, goal.yaw + std::f64::consts::PI));
        assert!(!away.arrived && !away.arrived_within_1_2_m && away.spl == 0.0, "{away:?}");
        let error = away.error.expect("there is a truth");
        assert!((error[0] - 180.0).abs() < 1e-6 && error[1] < 1e-9, "{error:?}");
    }

    #[test]
    fn paths_touch_what_stands_in_the_way() {
        let house = House::generate(5, &Difficulty::plain());
        let camera = Camera::new(24, 16);
        let (here, odometry) = (Pose2::default(), Regime::Exact);
        let case = Case {
            house: &house,
            remembered: &house,
            here,
            object: 0,
            truth: None,
            camera: &camera,
            odometry,
        };
        let thing = &house.objects[0];
        let free = mindseye_world::random_pose(&house, &mut mindseye_world::Rng::new(2));
        assert!(!case.touches(&[free, Pose2::new(free.x + 0.01, free.y, 0.0)]));
        assert!(case.touches(&[free, Pose2::new(thing.x, thing.y, 0.0)]), "ends in it");
        let beyond = Pose2::new(2.0 * thing.x - free.x, 2.0 * thing.y - free.y, 0.0);
        assert!(case.touches(&[free, beyond]), "passes through it");
        assert!(!case.touches(&[free]) && !case.touches(&[]));
    }

    #[test]
    fn headings_are_compared_the_short_way_round() {
        let house = House::generate(1, &Difficulty::plain());
        let camera = Camera::new(24, 16);
        let truth = Some(Pose2::new(1.0, 1.0, 170f64.to_radians()));
        let case = Case {
            house: &house,
            remembered: &house,
            here: Pose2::default(),
            object: 0,
            truth,
            camera: &camera,
            odometry: Regime::Exact,
        };
        let [turn, far] = case.error(Pose2::new(1.3, 1.4, -170f64.to_radians())).expect("a truth");
        assert!((turn - 20.0).abs() < 1e-9 && (far - 0.5).abs() < 1e-9, "{turn} {far}");
    }

    #[test]
    fn the_ellipse_holds_nine_tenths_of_a_planar_normal() {
        // P(d^2 <= c) = 1 - exp(-c / 2) in the plane.
        assert!((ELLIPSE_90 + 2.0 * 0.1f64.ln()).abs() < 1e-3, "{ELLIPSE_90}");
        assert!(in_ellipse_90(4.60) && !in_ellipse_90(4.61));
        let covariance = |xx: f64, xy: f64, yy: f64| {
            let mut c = vec![0.0; 36];
            (c[0], c[1], c[6], c[7]) = (xx, xy, xy, yy);
            c
        };
        let of = |c: &[f64], dx: f64, dy: f64| {
            squared_spreads(c, Pose2::new(1.0 + dx, 2.0 + dy, 0.0), Pose2::new(1.0, 2.0, 0.0))
        };
        // Standard deviations 0.2 and 0.1 m: one of each.
        assert!((of(&covariance(0.04, 0.0, 0.01), 0.2, 0.1) - 2.0).abs() < 1e-9);
        // (d dx^2 - 2 b dx dy + a dy^2) / (a d - b^2) = (0.05 + 0.04 + 0.05) * 0.01 / 0.0021.
        assert!((of(&covariance(0.05, 0.02, 0.05), 0.1, -0.1) - 2.0 / 3.0).abs() < 1e-9);
    }
}
