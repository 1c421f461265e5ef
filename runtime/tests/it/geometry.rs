//! A model without lift heads, from end to end: a network in whose place true renders of a house with grain are returned,
//! 416 x 256 pixels, and named so. What is tested is everything after the network: landmarks from kept frames, placing of the
//! imagined ones, box, object, standing pose, and what is withheld.

use mindseye::context::{ContextLatent, EncodeError, LatentInfo};
use mindseye::ground::{Grounded, Mind, MindError, MindSpec, RaysError, Scene, ground};
use mindseye::image::{ModelCamera, RgbImage};
use mindseye::imagine::{Dropped, Flow, NoClock, RolloutSettings, Rope};
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
use nalgebra::{Matrix3, Rotation3, Translation3, UnitQuaternion};

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
    RgbImage::from_rgb(camera.width, camera.height, frame.rgb.clone()).unwrap()
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

fn visit(seed: u64, camera: &Camera) -> Visit {
    let house = House::generate(seed, &Difficulty::plain());
    let mut rng = Rng::new(seed);
    let mut path = exploration_sweep(&house, &mut rng, 40);
    let last = path[path.len() - 1];
    path.extend(random_drive_from(&house, &mut rng, last, 24).into_iter().skip(1));
    let config = StudyConfig { landmarks_max: Some(20_000), ..StudyConfig::default() };
    let mut study = Study::inline(config, None);
    let [fx, fy, cx, cy] = camera.intrinsics();
    let lens = Lens::pinhole(SIZE.0 as u32, SIZE.1 as u32, fx, fy, cx, cy).unwrap();
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
    let (newest, captured_at) = newest.unwrap();
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
    Visit { house, scene, here }
}

/// A drive to one of the things, in renders with the box at the end, and the pose that it ends in; `None` where the thing is
/// not in view at the end.
fn drive(house: &House, from: Base, thing: usize, camera: &Camera) -> Option<(Vec<RgbImage>, Base)> {
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
    let mut end = picture(house, way.final_pose, camera, &mut frame);
    outline(&mut end, area);
    all.extend(std::iter::repeat_n(end, 4));
    Some((all, way.final_pose))
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

fn asked(scene: &Scene, frames: Vec<RgbImage>, camera: &Camera) -> Grounded {
    let mut mind = true_renders(frames, camera);
    let goal = Goal::text("g", "find the thing").unwrap();
    ground(&mut mind, scene, &goal, &NoClock, None, &mut |_| Flow::Continue).unwrap()
}

/// Frames that are believed, and all.
fn believed(grounded: &Grounded) -> (usize, usize) {
    let frames = &grounded.geometry.as_ref().unwrap().frames;
    let most = LiftConfig::default().hole_sigmas;
    let good = frames.iter().filter(|f| f.placed.is_ok() && f.hole.is_none_or(|h| h.sigmas <= most));
    (good.count(), frames.len())
}

/// What came of some houses.
#[derive(Debug, Default)]
struct Tally {
    position_m: Vec<f64>,
    heading_deg: Vec<f64>,
    withheld: usize,
    /// Squared distance of the goal from the truth in standard deviations.
    d2: Vec<f64>,
    true_frames: (usize, usize),
    other_frames: (usize, usize),
    other_found: usize,
}

fn tally(houses: u64) -> Tally {
    let camera = Camera::new(SIZE.0, SIZE.1);
    let mut out = Tally::default();
    for seed in 700_000..700_000 + houses {
        let visit = visit(seed, &camera);
        let other = House::generate(seed + 50_000, &Difficulty::plain());
        let things = (0..visit.house.objects.len())
            .find_map(|k| Some((k, drive(&visit.house, visit.here, k, &camera)?)))
            .and_then(|(k, (frames, end))| Some((frames, truth(&visit.house, end, k, &camera)?)));
        let Some((frames, want)) = things else { continue };
        let grounded = asked(&visit.scene, frames, &camera);
        let (good, all) = believed(&grounded);
        out.true_frames = (out.true_frames.0 + good, out.true_frames.1 + all);
        match (grounded.answer.status, &grounded.answer.pose) {
            (Status::Found, Some(pose)) => {
                let off = [pose.x - want.x, pose.y - want.y];
                out.position_m.push(off[0].hypot(off[1]));
                out.heading_deg.push(wrap_angle(pose.yaw - want.yaw).abs().to_degrees());
                let c = grounded.answer.covariance.as_ref().unwrap();
                let s = nalgebra::Matrix2::new(c[0], c[1], c[6], c[7]);
                let off = nalgebra::Vector2::from(off);
                out.d2.push((off.transpose() * s.try_inverse().unwrap() * off)[0]);
            }
            _ => {
                eprintln!("house {seed}: {:?}", grounded.answer.reason);
                out.withheld += 1;
            }
        }
        let start = mindseye_world::random_pose(&other, &mut Rng::new(seed));
        let elsewhere = (0..other.objects.len()).find_map(|k| drive(&other, start, k, &camera));
        if let Some((frames, _)) = elsewhere {
            let grounded = asked(&visit.scene, frames, &camera);
            let (good, all) = believed(&grounded);
            out.other_frames = (out.other_frames.0 + good, out.other_frames.1 + all);
            out.other_found += usize::from(grounded.answer.status == Status::Found);
        }
    }
    out
}

/// Wilson's 95 % interval of a share.
fn interval((hits, n): (usize, usize)) -> (f64, f64, f64) {
    let (n, z) = (n.max(1) as f64, 1.96);
    let p = hits as f64 / n;
    let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
    let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    (p, middle - half, middle + half)
}

#[test]
#[ignore = "not met yet: most frames of the drive are not placed by landmarks of so short a visit"]
fn true_renders_give_a_pose_and_another_house_none() {
    let mut got = tally(1);
    assert_eq!((got.withheld, got.position_m.len()), (0, 1), "{got:?}");
    assert!(got.position_m[0] < 0.2 && got.heading_deg[0] < 6.0, "{got:?}");
    assert!(got.true_frames.0 * 10 >= got.true_frames.1 * 7, "{got:?}");
    assert!(got.other_found == 0 && got.other_frames.0 == 0, "{got:?}");
    got.d2.clear();
}

#[test]
#[ignore = "renders some 1500 pictures of 416 x 256: minutes"]
fn goals_of_true_renders_in_twenty_houses() {
    let mut got = tally(20);
    let (accepted, withheld) =
        (interval(got.true_frames), interval((got.other_frames.1 - got.other_frames.0, got.other_frames.1)));
    let position = mindseye_base::stats::median(&mut got.position_m);
    let heading = mindseye_base::stats::median(&mut got.heading_deg);
    let inside = got.d2.iter().filter(|d| **d < 4.605).count();
    eprintln!(
        "{} goals ({} withheld): median {position:.3} m, {heading:.2} degrees; {inside} inside their 90 % ellipse; true \
         frames accepted {accepted:.3?}; frames of another house withheld {withheld:.3?}, {} drives of it believed",
        got.position_m.len(),
        got.withheld,
        got.other_found
    );
    assert!(position <= 0.10 && heading <= 3.0, "{position} m, {heading} degrees");
    assert!(accepted.0 >= 0.9, "{accepted:?}");
    assert!(withheld.0 >= 0.98 && got.other_found == 0, "{withheld:?}");
}
