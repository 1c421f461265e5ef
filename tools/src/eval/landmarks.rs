//! `mindseye-tools eval landmarks`: a model without lift heads, from end to end, in rendered houses.
//!
//! In the network's place true renders with grain are returned, 416 x 256 pixels, with the red box at their end. What is
//! measured is everything after the network: landmarks from kept frames, placing of the imagined ones, box, object, standing
//! pose, covariance, and what is withheld: frames of another house, and true frames with a thing of another house painted
//! in, which the box then names.

use anyhow::Context;
use mindseye::context::{ContextLatent, EncodeError, LatentInfo};
use mindseye::ground::{Grounded, Mind, MindError, MindSpec, RaysError, Scene, ground};
use mindseye::image::{ModelCamera, RgbImage};
use mindseye::imagine::{Dropped, Flow, NoClock, RolloutSettings, Rope};
use mindseye::overview::{overview, stacked};
use mindseye::planar::{Pose2, wrap_angle};
use mindseye::study::{FullFrame, Study, StudyConfig};
use mindseye_bridge::answer::Status;
use mindseye_bridge::geometry::{Isometry3, planar_isometry};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::denoise::{Denoise, DenoiseError, DenoiseStep, Denoised};
use mindseye_engines::model::dit::{DitConfig, Prediction};
use mindseye_engines::plucker::Intrinsics;
use mindseye_engines::sampler::{Grid, Solver};
use mindseye_landmarks::{Camera as Lens, LiftConfig};
use mindseye_world::{
    Camera, Difficulty, Frame, House, RenderOptions, Rng, approach, exploration_sweep, project_box,
    random_drive_from, render_with,
};
use nalgebra::{Matrix2, Matrix3, Rotation3, Translation3, UnitQuaternion, Vector2};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::localise::{Accepted, Spread};
use super::stats::{Figure, share};

/// Arguments of `eval landmarks`.
#[derive(clap::Args, Debug)]
pub struct LandmarksArgs {
    /// How many houses.
    #[arg(long, default_value_t = 20)]
    pub houses: u64,
    /// Seed of the first one.
    #[arg(long, default_value_t = 700_000)]
    pub seed: u64,
    /// Write a picture of the first house's drive, and the map of its landmarks and registered frames.
    #[arg(long, value_name = "PNG")]
    pub strip: Option<PathBuf>,
    /// Print the report as one JSON document.
    #[arg(long)]
    pub json: bool,
}

const SIZE: (usize, usize) = (416, 256);
/// Latents of a drive: the first frame, the way, the box.
const LATENTS: usize = 7;

/// The network's place: what it "imagines" was rendered before.
struct TrueRenders {
    spec: MindSpec,
    denoiser: Nothing,
    frames: Vec<RgbImage>,
}

struct Nothing(DitConfig);

impl Denoise for Nothing {
    fn config(&self) -> &DitConfig {
        &self.0
    }
    fn denoise(&mut self, step: &DenoiseStep) -> Result<Denoised, DenoiseError> {
        let prediction = vec![0.0; step.latents.len()];
        Ok(Denoised { prediction, pose: Vec::new(), mask: Vec::new(), locate: Vec::new() })
    }
}

impl Mind for TrueRenders {
    fn spec(&self) -> &MindSpec {
        &self.spec
    }
    fn encode_text(&mut self, _: &str) -> Result<Vec<f32>, MindError> {
        Ok(vec![0.0; 6])
    }
    fn encode_still(&mut self, _: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        Ok(vec![0.0; 12])
    }
    fn decode(&mut self, _: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        Ok(self.frames.clone())
    }
    fn camera_rays(&self, _: &[Isometry3<f64>], _: Option<&Intrinsics>) -> Result<Vec<f32>, RaysError> {
        Err(RaysError::NotTrained)
    }
    fn denoiser(&mut self) -> &mut dyn Denoise {
        &mut self.denoiser
    }
}

fn true_renders(frames: Vec<RgbImage>, camera: &Camera) -> TrueRenders {
    let config = DitConfig {
        in_channels: 2,
        out_channels: 2,
        latent_height: 2,
        latent_width: 3,
        patch: [1, 1],
        heads: 1,
        head_dim: 12,
        layers: 1,
        ffn_dim: 8,
        text_dim: 3,
        text_len: 2,
        freq_dim: 8,
        eps: 1e-6,
        rope_theta: 10000.0,
        prediction: Prediction::X0,
        camera_channels: 0,
        pooled_text: false,
        lift: false,
        attributes: 0,
        guide: None,
    };
    let settings = RolloutSettings {
        target_latents: LATENTS,
        gap: 50.0,
        max_span: None,
        steps: 1,
        min_steps: 1,
        guidance: 1.0,
        dropped: Dropped::default(),
        rope: Rope::default(),
        grid: Grid::Plain,
        shift: 3.0,
        solver: Solver::Euler,
        glance_timestep: 950.0,
        candidates: 1,
        seed: 0,
    };
    let spec = MindSpec {
        camera: ModelCamera { width: SIZE.0, height: SIZE.1, focal_px: Some(camera.focal_px()) },
        mounting: None,
        frame_period: TimeDelta::from_millis(100),
        latent_len: 12,
        context_max: 6,
        context_trained: 6,
        settings,
        lift: None,
        attributes: Vec::new(),
        box_min: 0.2,
        box_latents: 1,
        detail: None,
        guide: mindseye_engines::bundle::Guide::None,
        bundle_sha256: "true renders".into(),
        engine_sha256: "true renders".into(),
    };
    TrueRenders { spec, denoiser: Nothing(config), frames }
}

fn mount(camera: &Camera) -> Isometry3<f64> {
    let (r, t) = camera.base_from_camera();
    let rotation = Rotation3::from_matrix_unchecked(Matrix3::from_fn(|i, j| r[i][j]));
    Isometry3::from_parts(Translation3::from(t), UnitQuaternion::from_rotation_matrix(&rotation))
}

type Base = mindseye_world::Pose2;

fn plain(pose: Base) -> Pose2 {
    Pose2::new(pose.x, pose.y, pose.yaw)
}

fn picture(house: &House, pose: Base, camera: &Camera, frame: &mut Frame) -> RgbImage {
    render_with(house, pose, camera, RenderOptions { grain: true, ..RenderOptions::rgb_only() }, frame);
    RgbImage { width: camera.width, height: camera.height, data: frame.rgb.clone() }
}

/// A red outline as thick as a network of this size draws it.
fn outline(picture: &mut RgbImage, area: [f32; 4]) {
    for inset in 0..6 {
        let i = inset as f32;
        let inner = [area[0] + i, area[1] + i, area[2] - i, area[3] - i];
        mindseye_world::draw_box(&mut picture.data, picture.width, inner, [255, 0, 0]);
    }
}

/// What a robot has seen of a house, and where it stands.
struct Visit {
    house: House,
    scene: Scene,
    here: Base,
}

fn visit(seed: u64, camera: &Camera) -> anyhow::Result<Visit> {
    let house = House::generate(seed, &Difficulty::plain());
    let mut rng = Rng::new(seed);
    let mut path = exploration_sweep(&house, &mut rng, 40);
    let last = path[path.len() - 1];
    path.extend(random_drive_from(&house, &mut rng, last, 24).into_iter().skip(1));
    let config = StudyConfig { landmarks_max: Some(20_000), ..StudyConfig::default() };
    let mut study = Study::inline(config, None);
    let [fx, fy, cx, cy] = camera.intrinsics();
    let lens = Lens::pinhole(SIZE.0 as u32, SIZE.1 as u32, fx, fy, cx, cy)?;
    let mut frame = Frame::new();
    let mut newest = None;
    for (k, pose) in path.iter().enumerate() {
        let seen = picture(&house, *pose, camera, &mut frame);
        // Further apart in time than frames are studied, so that each one is.
        let captured_at = Timestamp(1_000_000_000) + TimeDelta::from_millis(500 * k as i64);
        let odom_from_camera = planar_isometry(plain(*pose)) * mount(camera);
        let full =
            FullFrame { rgb: seen.data.clone(), size: SIZE, captured_at, camera: lens, odom_from_camera };
        study.offer(full, &NoClock);
        newest = Some((seen, captured_at));
    }
    let (newest, captured_at) = newest.context("an empty visit")?;
    let here = path[path.len() - 1];
    let info = LatentInfo { index: 1, segment: 0, captured_at, odom_from_base: Some(plain(here)) };
    let scene = Scene {
        memory: vec![ContextLatent {
            info,
            latent: vec![0.0; 12],
            picture: newest.clone(),
            detail: None,
            by: None,
        }],
        newest,
        newest_detail: None,
        captured_at,
        odom_from_base: Some(plain(here)),
        odom_frame: "odom".into(),
        base_frame: "base_link".into(),
        base_from_camera: Some(mount(camera)),
        odometry_noise: Default::default(),
        intrinsics: None,
        studied: study.results().studied(),
    };
    Ok(Visit { house, scene, here })
}

/// A drive in renders, without the box.
struct Drive {
    frames: Vec<RgbImage>,
    /// Where it ends.
    end: Base,
    thing: usize,
    /// Edges of the thing in the last frames.
    area: [f32; 4],
}

impl Drive {
    /// The frames with the box around the thing at the end.
    fn imagined(&self) -> Vec<RgbImage> {
        let mut out = self.frames.clone();
        let boxed = out.len().saturating_sub(4);
        out[boxed..].iter_mut().for_each(|frame| outline(frame, self.area));
        out
    }
}

/// A drive to one of the things; `None` where it is not in view at the end.
fn drive(house: &House, from: Base, thing: usize, camera: &Camera) -> Option<Drive> {
    let frames = 4 * LATENTS;
    let way = approach(house, from, thing, frames - 4);
    if !way.reached {
        return None;
    }
    let area = project_box(house, way.final_pose, camera, thing)?;
    let mut frame = Frame::new();
    let mut all: Vec<RgbImage> = Vec::new();
    // Only the last frame of each latent is looked at.
    for k in 0..frames - 4 {
        let again = all.last().filter(|_| k % 4 != 3).cloned();
        all.push(match again {
            Some(before) => before,
            None => picture(house, way.poses[k], camera, &mut frame),
        });
    }
    let end = picture(house, way.final_pose, camera, &mut frame);
    all.extend(std::iter::repeat_n(end, 4));
    Some(Drive { frames: all, end: way.final_pose, thing, area })
}

/// A drive with the thing at the end of another house's drive painted over all its frames, where it is there.
fn painted(own: &Drive, other: &House, its: &Drive, camera: &Camera) -> Drive {
    let mut frame = Frame::new();
    render_with(other, its.end, camera, RenderOptions { rgb: false, ..RenderOptions::default() }, &mut frame);
    let Some(source) = its.frames.last() else { return Drive { frames: Vec::new(), ..*own } };
    let mut frames = own.frames.clone();
    for picture in &mut frames {
        for (k, id) in frame.ids.iter().enumerate() {
            if usize::from(*id) == its.thing + 1 {
                picture.data[3 * k..3 * k + 3].copy_from_slice(&source.data[3 * k..3 * k + 3]);
            }
        }
    }
    Drive { frames, end: own.end, thing: its.thing, area: its.area }
}

/// Where the base should stand: 1.2 m before the front of the thing that the middle of its box shows, by the renderer's depth.
fn truth(house: &House, end: Base, thing: usize, camera: &Camera) -> Option<Pose2> {
    let area = project_box(house, end, camera, thing)?;
    let mut frame = Frame::new();
    render_with(house, end, camera, RenderOptions { rgb: false, ..RenderOptions::default() }, &mut frame);
    let (w, h) = (0.1 * (area[2] - area[0]), 0.1 * (area[3] - area[1]));
    let mut depths = Vec::new();
    for y in (area[1] + h) as usize..(area[3] - h) as usize {
        for x in (area[0] + w) as usize..(area[2] - w) as usize {
            if usize::from(frame.ids[y * camera.width + x]) == thing + 1 {
                depths.push(f64::from(frame.depth[y * camera.width + x]));
            }
        }
    }
    if depths.len() < 20 {
        return None;
    }
    let depth = mindseye_base::stats::median(&mut depths);
    let [fx, fy, cx, cy] = camera.intrinsics();
    let middle = [0.5 * f64::from(area[0] + area[2]) - 0.5, 0.5 * f64::from(area[1] + area[3]) - 0.5];
    let at = nalgebra::Point3::new((middle[0] - cx) / fx * depth, (middle[1] - cy) / fy * depth, depth);
    let map_from_camera = planar_isometry(plain(end)) * mount(camera);
    let object = map_from_camera * at;
    let eye = map_from_camera.translation.vector;
    let yaw = (object.y - eye.y).atan2(object.x - eye.x);
    Some(Pose2::new(object.x - 1.2 * yaw.cos(), object.y - 1.2 * yaw.sin(), yaw))
}

fn asked(scene: &Scene, frames: Vec<RgbImage>, camera: &Camera) -> anyhow::Result<Grounded> {
    let mut mind = true_renders(frames, camera);
    let goal = Goal::text("g", "find the thing")?;
    ground(&mut mind, scene, &goal, &NoClock, None, &mut |_| Flow::Continue)
        .map_err(|_| anyhow::anyhow!("the goal was stopped"))
}

/// How often one kind of drives, and their frames, are believed.
#[derive(Debug, Default)]
struct Tally {
    frames: Vec<bool>,
    drives: Vec<bool>,
}

impl Tally {
    /// Puts a drive in the network's place.
    fn ask(&mut self, visit: &Visit, drive: &Drive, camera: &Camera) -> anyhow::Result<Grounded> {
        let grounded = asked(&visit.scene, drive.imagined(), camera)?;
        let most = LiftConfig::default().hole_sigmas;
        let lifted = grounded.geometry.as_ref();
        self.frames.extend(
            lifted
                .iter()
                .flat_map(|l| &l.frames)
                .map(|f| f.placed.is_ok() && f.hole.is_none_or(|h| h.sigmas() <= most)),
        );
        self.drives.push(grounded.answer.status == Status::Found);
        Ok(grounded)
    }
}

/// What `eval landmarks` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Houses with a thing that can be driven to.
    pub houses: usize,
    /// Distances of the goals from the truth (metres).
    pub position_m: Spread,
    /// Their headings' (degrees).
    pub heading_deg: Spread,
    /// Share of the goals inside their 90 % ellipse.
    pub within_90: Figure,
    /// Shares of frames that are accepted, by what they are.
    pub accepted_frames: Vec<Accepted>,
    /// The same of whole drives: a goal is given.
    pub accepted_drives: Vec<Accepted>,
    /// Why true drives were withheld.
    pub withheld: Vec<String>,
}

/// Runs `eval landmarks`.
///
/// # Errors
/// A camera that cannot be used, or a report that cannot be written.
pub fn run(args: &LandmarksArgs) -> anyhow::Result<ExitCode> {
    let report = evaluate(args.seed, args.houses, args.strip.as_deref())?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(ExitCode::SUCCESS)
}

/// Goals and rates of some houses; `strip` names a file for a picture of the first.
///
/// # Errors
/// A camera that cannot be used, or a picture that cannot be written.
pub fn evaluate(seed: u64, houses: u64, mut strip: Option<&Path>) -> anyhow::Result<Report> {
    let camera = Camera::new(SIZE.0, SIZE.1);
    let (mut position, mut heading, mut inside, mut withheld) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut tallies: [Tally; 3] = Default::default();
    for seed in seed..seed + houses {
        let visit = visit(seed, &camera)?;
        let to_thing = |k| {
            let drive = drive(&visit.house, visit.here, k, &camera)?;
            let want = truth(&visit.house, drive.end, k, &camera)?;
            Some((drive, want))
        };
        let Some((own, want)) = (0..visit.house.objects.len()).find_map(to_thing) else { continue };
        let [of_true, of_other, of_painted] = &mut tallies;
        let grounded = of_true.ask(&visit, &own, &camera)?;
        if let Some(path) = strip.take() {
            let map = overview(&grounded, &visit.scene, 640);
            let picture =
                stacked(mindseye::node::strip(&grounded.frames), map).context("an empty picture")?;
            picture.save_png(path).with_context(|| path.display().to_string())?;
        }
        match (grounded.answer.status, &grounded.answer.pose, &grounded.answer.covariance) {
            (Status::Found, Some(pose), Some(c)) => {
                let off = Vector2::new(pose.x - want.x, pose.y - want.y);
                position.push(off.norm());
                heading.push(wrap_angle(pose.yaw - want.yaw).abs().to_degrees());
                let d2 = Matrix2::new(c[0], c[1], c[6], c[7])
                    .try_inverse()
                    .map_or(f64::INFINITY, |s| (off.transpose() * s * off)[0]);
                // 90 % of a chi-square with two degrees of freedom.
                inside.push(d2 < 4.605);
            }
            _ => withheld.push(format!("house {seed}: {}", grounded.answer.reason.unwrap_or_default())),
        }
        let other = House::generate(seed + 50_000, &Difficulty::plain());
        let start = mindseye_world::random_pose(&other, &mut Rng::new(seed));
        let elsewhere = (0..other.objects.len()).find_map(|k| drive(&other, start, k, &camera));
        if let Some(its) = elsewhere {
            of_other.ask(&visit, &its, &camera)?;
            of_painted.ask(&visit, &painted(&own, &other, &its, &camera), &camera)?;
        }
    }
    let names = ["true", "another house", "thing painted in"];
    let table = |of: &dyn Fn(&Tally) -> &[bool]| {
        let rows = names.iter().zip(&tallies);
        rows.map(|(kind, t)| Accepted { kind, share: share(of(t).iter().copied()) }).collect()
    };
    Ok(Report {
        houses: tallies[0].drives.len(),
        position_m: Spread::of(&position),
        heading_deg: Spread::of(&heading),
        within_90: share(inside),
        accepted_frames: table(&|t| &t.frames),
        accepted_drives: table(&|t| &t.drives),
        withheld,
    })
}

fn text(r: &Report) -> String {
    let number = |v: Option<f64>, digits: usize| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    let mut out = format!(
        "{} houses: goal median {} m (90 %: {}), heading median {}° (90 %: {}); inside the 90 % ellipse {}\n",
        r.houses,
        number(r.position_m.median, 3),
        number(r.position_m.p90, 3),
        number(r.heading_deg.median, 2),
        number(r.heading_deg.p90, 2),
        r.within_90.text(2),
    );
    for (what, rows) in [("frames", &r.accepted_frames), ("drives", &r.accepted_drives)] {
        for row in rows {
            out += &format!("{what} accepted, {}: {} of {}\n", row.kind, row.share.text(3), row.share.n);
        }
    }
    r.withheld.iter().for_each(|line| out += &format!("withheld, {line}\n"));
    out
}
