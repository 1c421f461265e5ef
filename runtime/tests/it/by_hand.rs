//! What decides about an answer, with numbers that can be computed by hand: the joined place, the consistency figure,
//! and which stretch, standoff and mounting an answer is made with.

use super::fake::{FakeMind, STANDOFF_M};
use mindseye::context::{ContextLatent, EncodeError, LatentInfo};
use mindseye::ground::{Grounded, Mind, MindError, MindSpec, RaysError, Scene, ground};
use mindseye::image::RgbImage;
use mindseye::imagine::{Clock, Flow, Heads, NoClock, Rollout};
use mindseye::lift::{Evidence, LiftParams, RegistrationParams, lift, verify};
use mindseye::planar::{OdometryNoise, Pose2};
use mindseye_bridge::answer::Status;
use mindseye_bridge::geometry::planar_isometry;
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use mindseye_engines::denoise::{Denoise, DenoiseStep, Denoised};
use mindseye_engines::plucker::{Intrinsics, ray};
use mindseye_world::{
    CEILING_M, Camera, Difficulty, Frame, House, RenderOptions, Rng, random_pose, render_from,
};
use nalgebra::{Isometry3, Matrix3, Rotation3, Translation3, UnitQuaternion, Vector3};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

fn params() -> LiftParams {
    LiftParams {
        standoff_m: 1.0,
        mask_present: 0.0,
        mask_vote: 0.0,
        plan_sigma_m: 0.3,
        memory_sigma_m: 0.4,
        rollout_sigma_m: (0.16f64 - VARIANCE).sqrt(),
        yaw_sigma_rad: 0.1,
        localisation_sigma_m: 0.2,
        ..LiftParams::uncalibrated()
    }
}

/// Of the joined place below: 1 / (1 / 0.3^2 + 1 / 0.4^2), and half of half the squared distance of 0.5 m.
const VARIANCE: f64 = 0.0576 + 0.0625;

/// One context frame that sees the object 1.5 m ahead of x = 0.5 m, and a plan that ends at x = 1.5 m.
fn glance() -> Heads {
    Heads {
        context: 1,
        // The context frame, placed 0.2 m off; the first target frame; the last.
        pose: vec![[0.7, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.5, 0.0, 1.0, 0.0]],
        mask: vec![5.0, -5.0, -5.0],
        locate: vec![[1.5, 0.0], [0.0, 0.0], [0.0, 0.0]],
    }
}

#[test]
fn plan_and_memory_are_joined_by_their_variances() {
    let context = [Some(Pose2::new(0.5, 0.0, 0.0))];
    let e = lift(&[glance()], &context, &[], &params());
    let near = |got: f64, wanted: f64, what: &str| assert!((got - wanted).abs() < 1e-5, "{what}: {got}");
    // The plan means an object one standoff ahead, at 2.5 m; the memory has seen it at 2 m.
    let (plan, memory) = (e.plan.expect("a plan"), e.memory.expect("a memory"));
    near(plan.object.0, 2.5, "plan");
    near(memory.object.0, 2.0, "memory");
    // 0.5 m apart with a combined spread of 0.5 m.
    near(e.disagreement.expect("both are there"), 1.0, "disagreement");
    near(e.localisation_m.expect("odometry is known"), 0.2, "localisation");
    // (2.5 / 0.09 + 2 / 0.16) / (1 / 0.09 + 1 / 0.16) = 2.32.
    let pose = e.pose.expect("a pose");
    near(e.object.expect("an object").0, 2.32, "object");
    near(pose.x, 1.32, "pose");
    near(pose.yaw, 0.0, "heading");
    near(e.variances[0], VARIANCE, "variance");
    near(e.variances[2], 0.01 + VARIANCE / 4.0, "heading variance");
    let wide = lift(&[glance()], &context, &[], &LiftParams { variance_scale: 2.5, ..params() });
    near(wide.variances[1], 2.5 * VARIANCE, "scaled variance");
    let shared = LiftParams { variance_scale: 2.5, shared_sigma_m: Some(0.3), ..params() };
    let shared = lift(&[glance()], &context, &[], &shared);
    near(shared.variances[0], 2.5 * VARIANCE + 0.09, "shared variance");
    near(shared.variances[2], wide.variances[2], "heading variance");
}

#[test]
fn the_consistency_is_a_weighted_mean_of_what_is_known() {
    let context = [Some(Pose2::new(0.5, 0.0, 0.0))];
    // The rollout ends at x = 2.12 m: its object is 0.8 m from the joined one, twice the combined spread of 0.4 m.
    let mut end = glance();
    end.pose[2][0] = 2.12;
    let rollout = Rollout { latents: Vec::new(), heads: end, steps: 1 };
    let check = |rollouts: &[Rollout], likeness_error: Option<f64>, wanted: f64| {
        let evidence = Evidence { likeness_error, ..Evidence::default() };
        let estimate = lift(&[glance()], &context, &[], &params());
        let got = verify(estimate, rollouts, evidence, &params()).consistency;
        assert!((got - wanted).abs() < 1e-4, "{likeness_error:?}: {got} instead of {wanted}");
    };
    let (one, two) = ((-0.5f64).exp(), (-2.0f64).exp());
    // Agreement and orientation are one spread off each; likeness is 1 - 4 * 0.1.
    check(&[], None, (4.0 * one + 3.0 * one) / 7.0);
    check(std::slice::from_ref(&rollout), None, (7.0 * one + 2.0 * two) / 9.0);
    check(&[], Some(0.1), (7.0 * one + 0.6) / 8.0);
    check(&[rollout], Some(0.1), (7.0 * one + 2.0 * two + 0.6) / 10.0);
    // As unlike as can be: nothing, not less.
    check(&[], Some(0.9), 7.0 * one / 8.0);
}

const TOKENS: usize = 6;
const LATENT: usize = 2 * TOKENS;

/// Heads that see the object `ahead` of every frame for which `sees` holds, and end at `end`.
fn heads(step: &DenoiseStep<'_>, ahead: f32, end: [f32; 4], sees: impl Fn(&[f32]) -> bool) -> Denoised {
    let frames = step.frames();
    let mut pose = vec![[0.0, 0.0, 1.0, 0.0]; frames];
    pose[frames - 1] = end;
    let mask = step
        .latents
        .chunks(LATENT)
        .flat_map(|frame| vec![if sees(frame) { 5.0 } else { -5.0 }; TOKENS])
        .collect();
    Denoised {
        prediction: vec![0.5; step.latents.len()],
        pose,
        mask,
        locate: vec![[ahead, 0.0]; frames * TOKENS],
    }
}

/// A robot that has not moved: latents with these values, one second apart.
fn scene(values: &[f32]) -> Scene {
    let picture = RgbImage::filled(24, 16, [128; 3]);
    let here = Pose2::default();
    let stamp = |k: usize| Timestamp(1_000_000_000 * k as i64);
    let memory = values
        .iter()
        .enumerate()
        .map(|(k, v)| ContextLatent {
            info: LatentInfo {
                index: k as u64 + 1,
                segment: 0,
                captured_at: stamp(k),
                odom_from_base: Some(here),
            },
            latent: vec![*v; LATENT],
            picture: picture.clone(),
            detail: None,
            by: None,
        })
        .collect();
    Scene {
        memory,
        newest: picture,
        newest_detail: None,
        captured_at: stamp(values.len()),
        odom_from_base: Some(here),
        odom_frame: "odom".into(),
        base_frame: "base_link".into(),
        base_from_camera: None,
        intrinsics: None,
        odometry_noise: OdometryNoise::default(),
        studied: Default::default(),
    }
}

/// A mind that takes one evaluation for each rollout.
fn mind(says: impl FnMut(&DenoiseStep<'_>) -> Denoised + Send + 'static) -> FakeMind {
    let mut mind = FakeMind::saying(says);
    (mind.spec.settings.steps, mind.spec.settings.min_steps, mind.spec.settings.guidance) = (1, 1, 1.0);
    mind
}

fn ask(mind: &mut FakeMind, scene: &Scene, kind: GoalKind) -> Grounded {
    let goal =
        Goal { id: "g".into(), kind, deadline: None, max_frame_age: None, candidates: None, seed: None };
    ground(mind, scene, &goal, &NoClock, None, &mut |_| Flow::Continue).expect("nobody says stop")
}

fn text(text: &str) -> GoalKind {
    GoalKind::Text(text.into())
}

#[test]
fn the_standoff_is_that_of_the_named_thing() {
    // 3 m ahead stands something before which one stops at 1.9 m.
    let mut mind = mind(|step| heads(step, 3.0, [1.1, 0.0, 1.0, 0.0], |_| true));
    let lift = mind.spec.lift.as_mut().expect("it has heads");
    lift.standoff_by_word_m.insert("table".into(), 1.9);
    let out = ask(&mut mind, &scene(&[1.0; 4]), text("find the red table"));
    let pose = out.answer.pose.as_ref().expect("it is found");
    assert!((pose.x - 1.1).abs() < 1e-5 && pose.y.abs() < 1e-5, "{pose:?}");
    let lifted = out.lifted.expect("heads");
    assert!(
        lifted.estimate.disagreement.expect("both witnesses") < 1e-5,
        "plan and memory mean the same place"
    );
}

/// Thirty latents, of which the third and the fourth show a thing 2 m ahead, and a mind that looks through them in stretches.
fn long_history() -> (FakeMind, Scene) {
    let end = [(2.0 - STANDOFF_M) as f32, 0.0, 1.0, 0.0];
    let mut mind = mind(move |step| heads(step, 2.0, end, |frame| frame[0] > 0.9));
    mind.spec.settings.max_span = Some(6.0);
    let values: Vec<f32> = (0..30).map(|k| if k == 2 || k == 3 { 1.0 } else { 0.1 }).collect();
    (mind, scene(&values))
}

#[test]
fn of_a_long_history_the_stretch_that_saw_the_thing_wins() {
    let (mut mind, scene) = long_history();
    let out = ask(&mut mind, &scene, text("the chair"));
    assert_eq!(out.answer.status, Status::Found, "{:?}", out.answer.reason);
    assert!(out.used.iter().any(|p| [2, 3].contains(p)), "looked at {:?}", out.used);
    assert!(out.answer.stamp_ns < Some(15_000_000_000), "the answer is of an old view");
}

#[test]
fn what_odometry_drifted_since_a_view_widens_the_answer_that_rests_on_it() {
    let (mut mind, seen) = long_history();
    let mut variances = |noise: OdometryNoise, driven: f64| -> [f64; 3] {
        let mut scene = seen.clone();
        scene.odometry_noise = noise;
        // It stood still while it saw the thing, and then drove straight on.
        for (k, latent) in scene.memory.iter_mut().enumerate().skip(15) {
            let x = driven * (k - 14) as f64 / 16.0;
            latent.info.odom_from_base = Some(Pose2::new(x, 0.0, 0.0));
        }
        scene.odom_from_base = Some(Pose2::new(driven, 0.0, 0.0));
        let out = ask(&mut mind, &scene, text("the chair"));
        assert!(out.answer.pose.as_ref().is_some_and(|p| (p.x - (2.0 - STANDOFF_M)).abs() < 1e-5));
        let covariance = out.answer.covariance.expect("a pose has one");
        [0, 7, 35].map(|at| covariance[at])
    };
    let noise = OdometryNoise { metres_per_metre: 0.1, radians_per_metre: 0.05, radians_per_radian: 0.0 };
    let without = variances(OdometryNoise::default(), 4.0);
    assert_eq!(variances(noise, 0.0), without, "a robot that stood still has not drifted");
    let with = variances(noise, 4.0);
    let (way, heading) = noise.after(4.0, 0.0);
    let range = 4.0 - (2.0 - STANDOFF_M);
    let place = 0.5 * (way.powi(2) + (heading * range).powi(2));
    for (k, more) in [place, place, heading.powi(2)].into_iter().enumerate() {
        assert!((with[k] - without[k] - more).abs() < 1e-9, "{k}: {with:?} {without:?} {more}");
    }
    assert!(place > 0.01, "{place}");
}

#[test]
fn waypoints_of_the_camera_become_poses_of_the_base() {
    // The camera goes 1 m ahead and turns to the left. It sits 0.3 m ahead and 0.1 m left of the base, so it ends at
    // (1.3, 0.1), and the base at (1.3, 0.1) less (0.3, 0.1) turned by a quarter: (1.4, -0.2).
    let mut mind = mind(|step| heads(step, 2.0, [1.4, -0.2, 0.0, 1.0], |_| true));
    let mut scene = scene(&[1.0; 4]);
    scene.base_from_camera = Some(Isometry3::translation(0.3, 0.1, 1.0));
    let left = UnitQuaternion::from_axis_angle(&Vector3::z_axis(), std::f64::consts::FRAC_PI_2);
    let waypoint = Isometry3::from_parts(Translation3::new(1.0, 0.0, 0.0), left);
    let out = ask(&mut mind, &scene, GoalKind::Waypoints(vec![waypoint]));
    assert_eq!(out.answer.status, Status::Found, "{:?}", out.answer.reason);
    let pose = out.answer.pose.as_ref().expect("it is found");
    assert!((pose.x - 1.4).abs() < 1e-9 && (pose.y + 0.2).abs() < 1e-9, "{pose:?}");
    assert!((pose.yaw - std::f64::consts::FRAC_PI_2).abs() < 1e-9, "{pose:?}");
    let camera = out.answer.camera_pose.as_ref().expect("the mounting is known");
    let at = camera.position;
    assert!((at[0] - 1.3).abs() < 1e-9 && (at[1] - 0.1).abs() < 1e-9 && (at[2] - 1.0).abs() < 1e-9, "{at:?}");
}

/// The frames of a drive along waypoints in space, rendered at the poses that the model is told: what is seen through a
/// pixel lies on the pixel's ray.
#[test]
fn waypoints_in_space_keep_height_pitch_and_roll() {
    let house = House::generate(5, &Difficulty::plain());
    let camera = Camera::new(48, 32);
    let map_from_here = planar_isometry(random_pose(&house, &mut Rng::new(3)));
    let (rotation, translation) = camera.base_from_camera();
    let rotation = Rotation3::from_matrix_unchecked(Matrix3::from_fn(|i, j| rotation[i][j]));
    let mount = Isometry3::from_parts(
        Translation3::from(translation),
        UnitQuaternion::from_rotation_matrix(&rotation),
    );
    let mut mind = mind(|step| heads(step, 2.0, [0.2, -0.1, 1.0, 0.0], |_| true));
    let mut scene = scene(&[1.0; 4]);
    scene.base_from_camera = Some(mount);
    let waypoint = |at: [f64; 3], roll, pitch, yaw| {
        Isometry3::from_parts(at.into(), UnitQuaternion::from_euler_angles(roll, pitch, yaw))
    };
    let waypoints =
        vec![waypoint([0.2, 0.1, 0.3], 0.3, -0.2, 0.5), waypoint([0.2, -0.1, -0.25], -0.35, 0.25, -0.3)];
    let last = waypoints[1];
    let out = ask(&mut mind, &scene, GoalKind::Waypoints(waypoints));

    let path = mind.paths.lock().unwrap().pop().expect("rays were asked for");
    assert_eq!(path.len(), 9, "the first frame and two latents of four");
    assert!((path[0].to_homogeneous() - mount.to_homogeneous()).norm() < 1e-12, "it begins here");
    // The camera is moved by the waypoint, in the axes of the base, and keeps its own tilt.
    let end = mount.translation * last * mount.rotation;
    assert!((path[8].to_homogeneous() - end.to_homogeneous()).norm() < 1e-12, "{} {end}", path[8]);
    let told = out.answer.camera_pose.expect("the mounting is known");
    assert!((told.position[2] - 0.75).abs() < 1e-12, "1 m above the floor, less 0.25: {told:?}");

    let focal = camera.focal_px();
    let k = Intrinsics { fx: focal, fy: focal, cx: 24.0, cy: 16.0 };
    let options = RenderOptions { rgb: false, ..RenderOptions::default() };
    let (mut frame, mut on_things, mut roll) = (Frame::new(), 0, 0.0f64);
    for here_from_camera in &path {
        let m = (map_from_here * here_from_camera).to_homogeneous();
        let pose: [[f64; 4]; 4] = std::array::from_fn(|i| std::array::from_fn(|j| m[(i, j)]));
        let rotation: [[f64; 3]; 3] = std::array::from_fn(|i| std::array::from_fn(|j| m[(i, j)]));
        let eye = Vector3::new(m[(0, 3)], m[(1, 3)], m[(2, 3)]);
        roll = roll.max(rotation[2][0].abs());
        render_from(&house, &(rotation, eye.into()), &camera, options, &mut frame);
        for (at, (depth, id)) in frame.depth.iter().zip(&frame.ids).enumerate() {
            let line = ray(&pose, &k, (at % 48) as f64 + 0.5, (at / 48) as f64 + 0.5);
            let direction = Vector3::new(line[3], line[4], line[5]);
            let axis = Vector3::new(m[(0, 2)], m[(1, 2)], m[(2, 2)]);
            let p = eye + direction * (f64::from(*depth) / direction.dot(&axis));
            // Any point of a line has its moment.
            assert!((p.cross(&direction) - Vector3::new(line[0], line[1], line[2])).norm() < 1e-9);
            if *id == 0 {
                let b = &house.bounds;
                let gaps = [p.z, p.z - CEILING_M, p.x - b.x0, p.x - b.x1, p.y - b.y0, p.y - b.y1];
                let gap = gaps.into_iter().map(f64::abs).fold(f64::INFINITY, f64::min);
                assert!(gap < 0.01, "{p} is {gap} m from floor, ceiling and walls");
            } else {
                let thing = &house.objects[usize::from(*id) - 1];
                let off = (p.x - thing.x).hypot(p.y - thing.y);
                assert!(off < thing.radius + 0.02 && p.z > -0.01, "{p} is {off} m from the {}", thing.name);
                on_things += 1;
            }
        }
    }
    assert!(roll > 0.2 && on_things > 50, "{roll} {on_things}");
}

/// A clock that goes on by what is done, and by nothing else.
#[derive(Clone, Default)]
struct WorkClock(Arc<AtomicI64>);

impl WorkClock {
    fn pass(&self, millis: i64) {
        self.0.fetch_add(millis * 1_000_000, Ordering::Relaxed);
    }
}

impl Clock for WorkClock {
    fn now(&self) -> TimeDelta {
        TimeDelta(self.0.load(Ordering::Relaxed))
    }
}

/// A mind to which a drive's pictures take long.
struct SlowToDecode {
    mind: FakeMind,
    clock: WorkClock,
    millis: i64,
}

impl Mind for SlowToDecode {
    fn spec(&self) -> &MindSpec {
        self.mind.spec()
    }
    fn encode_text(&mut self, text: &str) -> Result<Vec<f32>, MindError> {
        self.mind.encode_text(text)
    }
    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        self.mind.encode_still(frame)
    }
    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        self.clock.pass(self.millis);
        self.mind.decode(latents)
    }
    fn camera_rays(&self, poses: &[Isometry3<f64>], k: Option<&Intrinsics>) -> Result<Vec<f32>, RaysError> {
        self.mind.camera_rays(poses, k)
    }
    fn denoiser(&mut self) -> &mut dyn Denoise {
        self.mind.denoiser()
    }
}

#[test]
fn however_many_candidates_are_asked_for_the_answer_comes_in_time() {
    // An evaluation takes 10 ms: 16 glances, then 200 ms a drive of 10 guided steps; looking at one takes 200 ms.
    let ask = |registers: bool, until_ms: i64| {
        let clock = WorkClock::default();
        let passes = clock.clone();
        let mut mind = FakeMind::saying(move |step| {
            passes.pass(10);
            heads(step, 2.0, [0.9, 0.0, 1.0, 0.0], |_| true)
        });
        let registration = RegistrationParams {
            sigma_m: 0.2,
            yaw_sigma_rad: 0.1,
            end_error_max: 0.4,
            way_error_max: 0.5,
            thing_error_max: 0.6,
            agree_max: 3.0,
        };
        if let Some(lift) = &mut mind.spec.lift {
            lift.registration = registers.then_some(registration);
        }
        let mut mind = SlowToDecode { mind, clock: clock.clone(), millis: 200 };
        let goal = Goal { candidates: Some(16), ..Goal::text("g", "find the chair").unwrap() };
        let until = Some(TimeDelta::from_millis(until_ms));
        let got = ground(&mut mind, &scene(&[1.0]), &goal, &clock, until, &mut |_| Flow::Continue).unwrap();
        (got.answer, clock.now().as_millis_f64())
    };
    // Sampling took all of the time: one drive is looked at, and the answer says so.
    let (answer, took) = ask(false, 2000);
    assert!(took <= 2200.0, "{took} ms");
    let reason = answer.reason.unwrap();
    assert!(reason.contains("1 of 9 imagined drives were looked at, to meet the deadline"), "{reason}");
    assert_eq!(answer.status, Status::Found);
    // Where drives are registered a third is kept for that: two of the five that were sampled.
    let (answer, took) = ask(true, 2000);
    assert!((1600.0..=2000.0).contains(&took), "{took} ms");
    let reason = answer.reason.unwrap();
    assert!(
        reason.contains("of 16 candidates") && reason.contains("imagined drives were looked at"),
        "{reason}"
    );
    // With time enough all are, and nothing is said of it.
    let (answer, _) = ask(true, 60_000);
    assert_eq!(answer.reason, None);
}
