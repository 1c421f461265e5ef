use super::*;
use mindseye_base::random::Rng;
use mindseye_world::{self as world, Difficulty, Frame, House, RenderOptions, render_with};
use nalgebra::{Rotation3, Translation3, UnitQuaternion};

/// Four pixels wide, two high, 90 degrees: focal length 2.
fn camera() -> Camera {
    Camera::pinhole(4, 2, 2.0, 2.0, 1.5, 0.5).unwrap()
}

fn at(x: f64, y: f64, z: f64) -> Isometry3<f64> {
    Isometry3::translation(x, y, z)
}

/// A picture whose pixels are 10, 20, 30, ... in all channels.
fn steps() -> RgbImage {
    RgbImage { width: 4, height: 2, data: (0..8u8).flat_map(|i| [10 * (i + 1); 3]).collect() }
}

#[test]
fn from_its_own_pose_a_view_is_itself() {
    let mut memory = Remembered::new(8);
    memory.insert(&steps(), &[2.0; 8], &camera(), &at(1.0, 2.0, 3.0)).unwrap();
    let mut carrier = Carrier::default();
    let carried = carrier.carry(&memory, &camera(), &at(1.0, 2.0, 3.0));
    assert_eq!(carried.picture(), steps());
    assert!(carried.trust.iter().all(|t| (t - 1.0).abs() < 1e-3), "{:?}", carried.trust);
    assert!(carried.depth_m.iter().all(|d| (d - 2.0).abs() < 1e-5));
    assert!((carried.covered() - 1.0).abs() < 1e-3);
}

#[test]
fn a_sideways_step_moves_the_picture_by_hand() {
    // A wall 2 m ahead, focal length 2 px: one pixel is one metre. One metre to the right moves the picture one pixel to
    // the left; the last column was never seen.
    let mut memory = Remembered::new(8);
    memory.insert(&steps(), &[2.0; 8], &camera(), &Isometry3::identity()).unwrap();
    let mut carrier = Carrier::default();
    let carried = carrier.carry(&memory, &camera(), &at(1.0, 0.0, 0.0));
    let row = |y: usize| -> Vec<u8> { (0..4).map(|x| carried.picture().pixel(x, y)[0]).collect() };
    assert_eq!((row(0), row(1)), (vec![20, 30, 40, 0], vec![60, 70, 80, 0]));
    assert_eq!((carried.trust[3], carried.trust[7], carried.depth_m[3]), (0.0, 0.0, 0.0));
    assert!(carried.trust[2] > 0.9);
    // The hole is closed from its edge: the mean of what it touches, 40 and 80.
    carried.fill();
    assert_eq!(carried.picture().pixel(3, 0), [60; 3]);
    assert_eq!((carried.depth_m[3], carried.trust[3]), (2.0, 0.0));
}

#[test]
fn the_nearest_surface_is_seen() {
    let mut memory = Remembered::new(16);
    let wall = RgbImage::filled(4, 2, [200; 3]);
    let thing = RgbImage::filled(4, 2, [20; 3]);
    memory.insert(&wall, &[4.0; 8], &camera(), &Isometry3::identity()).unwrap();
    // Of the thing two pixels have depth: the others are no measurement.
    let depth = [f32::NAN, 2.0, 2.0, 0.0, -1.0, 2.0, f32::INFINITY, 0.0];
    memory.insert(&thing, &depth, &camera(), &Isometry3::identity()).unwrap();
    let mut carrier = Carrier::default();
    let carried = carrier.carry(&memory, &camera(), &Isometry3::identity());
    let seen: Vec<u8> = carried.picture().data.iter().step_by(3).copied().collect();
    assert_eq!(seen, [200, 20, 20, 200, 200, 20, 200, 200]);
    // 4 % behind is the same surface, and what differs is trusted less.
    let mut memory = Remembered::new(16);
    memory.insert(&wall, &[2.0; 8], &camera(), &Isometry3::identity()).unwrap();
    memory.insert(&thing, &[2.08; 8], &camera(), &Isometry3::identity()).unwrap();
    let carried = carrier.carry(&memory, &camera(), &Isometry3::identity());
    assert_eq!(carried.picture().pixel(0, 0), [110; 3]);
    // The standard deviation is 90 / 255 = .353; 1 / (1 + (.353 / .15)^2) = .153.
    assert!((carried.trust[0] - 0.153).abs() < 1e-3, "{}", carried.trust[0]);
}

#[test]
fn views_taken_nearby_count_more() {
    let mut memory = Remembered::new(16);
    memory.insert(&RgbImage::filled(4, 2, [100; 3]), &[2.0; 8], &camera(), &Isometry3::identity()).unwrap();
    memory.insert(&RgbImage::filled(4, 2, [200; 3]), &[2.25; 8], &camera(), &at(0.0, 0.0, -0.25)).unwrap();
    let mut carrier = Carrier::new(CarryConfig { same_m: 0.5, ..CarryConfig::default() });
    let carried = carrier.carry(&memory, &camera(), &Isometry3::identity());
    // A quarter of a metre away: half the weight, squared: (100 + 200 / 4) / (5 / 4) = 120. The far view's squares are an
    // eighth wider, (9/8)^2 in area but for what the picture's edge cuts off.
    let middle = carried.picture().pixel(1, 0)[0];
    assert!((120..=123).contains(&middle), "{middle}");
}

#[test]
fn close_by_no_pinholes_are_left() {
    // From 1 m on to a wall that was seen from 4 m: one remembered pixel covers four by four.
    let camera = Camera::pinhole(24, 16, 12.0, 12.0, 11.5, 7.5).unwrap();
    let mut memory = Remembered::new(400);
    memory.insert(&RgbImage::filled(24, 16, [90; 3]), &[4.0; 384], &camera, &Isometry3::identity()).unwrap();
    let mut carrier = Carrier::default();
    let carried = carrier.carry(&memory, &camera, &at(0.0, 0.0, 3.0));
    assert!(carried.rgb.iter().all(|c| (c[0] - 90.0 / 255.0).abs() < 1e-3));
    // Magnified four times: trusted half.
    assert!(carried.trust.iter().all(|t| (t - 0.5).abs() < 0.02), "{:?}", carried.trust[0]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut memory = Remembered::new(12);
    let id = Isometry3::identity();
    let error = |e: CarryError| e.to_string();
    let small = RgbImage::filled(3, 2, [0; 3]);
    assert_eq!(
        error(memory.insert(&small, &[1.0; 8], &camera(), &id).unwrap_err()),
        "carried view: picture has 6 pixels, expected 8"
    );
    assert!(error(memory.insert(&steps(), &[1.0; 7], &camera(), &id).unwrap_err()).contains("depth has 7"));
    assert_eq!(memory.insert(&steps(), &[1.0; 8], &camera(), &at(f64::NAN, 0.0, 0.0)), Err(CarryError::Pose));
    memory.insert(&steps(), &[1.0; 8], &camera(), &id).unwrap();
    let full = memory.insert(&steps(), &[1.0; 8], &camera(), &id).unwrap_err();
    assert_eq!(full, CarryError::Full { got: 8, left: 4, most: 12 });
    let bytes = memory.bytes();
    memory.clear();
    assert!(
        memory.is_empty()
            && memory.bytes() == bytes
            && memory.insert(&steps(), &[1.0; 8], &camera(), &id).is_ok()
    );
}

#[test]
fn a_view_is_reduced_to_means_of_blocks() {
    let values = [1.0f32, 3.0, 9.0, 5.0, 7.0, 9.0, 8.0, 8.0, 8.0];
    let view = Carried {
        width: 3,
        height: 3,
        rgb: values.map(|v| [v, 0.0, 2.0 * v]).to_vec(),
        trust: values.map(|v| 0.1 * v).to_vec(),
        depth_m: values.to_vec(),
    };
    // 1, 3, 5, 7; the third column and row are left out.
    let small = view.reduced(2);
    assert_eq!((small.width, small.height, &small.rgb[..]), (1, 1, &[[4.0, 0.0, 8.0]][..]));
    assert!((small.trust[0] - 0.4).abs() < 1e-6 && small.depth_m == [4.0]);
    assert_eq!((view.reduced(1), view.reduced(0)), (view.clone(), view));
}

#[test]
fn a_picture_without_anything_is_grey() {
    let mut carrier = Carrier::default();
    let carried = carrier.carry(&Remembered::new(0), &camera(), &Isometry3::identity());
    assert_eq!(carried.covered(), 0.0);
    carried.fill();
    assert_eq!(carried.picture(), RgbImage::filled(4, 2, [128; 3]));
}

/// What the renderer's camera is here: centres of pixels are at integers.
pub(crate) fn pinhole(camera: &world::Camera) -> Camera {
    let [fx, fy, cx, cy] = camera.intrinsics();
    Camera::pinhole(camera.width as u32, camera.height as u32, fx, fy, cx, cy).unwrap()
}

pub(crate) fn mounting(camera: &world::Camera) -> Isometry3<f64> {
    let (r, t) = camera.base_from_camera();
    let r = nalgebra::Matrix3::from_fn(|i, j| r[i][j]);
    let rotation = UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(r));
    Isometry3::from_parts(Translation3::new(t[0], t[1], t[2]), rotation)
}

pub(crate) fn planar(pose: world::Pose2) -> Isometry3<f64> {
    let yaw = UnitQuaternion::from_axis_angle(&Vector3::z_axis(), pose.yaw);
    Isometry3::from_parts(Translation3::new(pose.x, pose.y, 0.0), yaw)
}

/// What depth and poses are off by: depth as a share, metres, radians (standard deviations).
#[derive(Clone, Copy)]
pub(crate) struct Noise(pub f64, pub f64, pub f64);

/// Renders a house's sweep and remembers every fourth picture of it at this size.
pub(crate) fn remember(
    house: &House,
    sweep: &[world::Pose2],
    size: (usize, usize),
    noise: Noise,
    rng: &mut Rng,
) -> Remembered {
    let camera = world::Camera::new(size.0, size.1);
    let mut memory = Remembered::new(sweep.len() * size.0 * size.1);
    let mut frame = Frame::new();
    for pose in sweep.iter().step_by(4) {
        render_with(house, *pose, &camera, RenderOptions::default(), &mut frame);
        // One factor per picture and one per pixel, as networks are off.
        let whole = 1.0 + 0.7 * noise.0 * rng.normal();
        let depth: Vec<f32> =
            frame.depth.iter().map(|d| d * (whole * (1.0 + 0.7 * noise.0 * rng.normal())) as f32).collect();
        let picture = RgbImage { width: size.0, height: size.1, data: frame.rgb.clone() };
        let off = world::Pose2::unwrapped(
            pose.x + noise.1 * rng.normal(),
            pose.y + noise.1 * rng.normal(),
            pose.yaw + noise.2 * rng.normal(),
        );
        memory.insert(&picture, &depth, &pinhole(&camera), &(planar(off) * mounting(&camera))).unwrap();
    }
    memory
}

fn squared_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    let sum: f64 = a.data.iter().zip(&b.data).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    sum / a.data.len() as f64
}

/// Mean PSNR (dB) over drives, and of the worst frame, of pictures carried from a sweep; mean trust.
fn carried_psnr(rooms: u64, seed: u64, size: (usize, usize), noise: Noise) -> [f64; 3] {
    let target = world::Camera::new(24, 16);
    let (mut all, mut worst, mut covered) = (0.0, 0.0, 0.0);
    let mut carrier = Carrier::default();
    let psnr = |mse: f64| 10.0 * (255.0f64.powi(2) / mse.max(1e-9)).log10();
    for k in 0..rooms {
        let house = House::generate(seed + k, &Difficulty::plain());
        let mut rng = Rng::new(seed + k);
        let sweep = world::exploration_sweep(&house, &mut rng, 97);
        let memory = remember(&house, &sweep, size, noise, &mut rng);
        let drive = world::random_drive_from(&house, &mut rng, sweep[96], 21);
        let mut frame = Frame::new();
        let (mut sum, mut most, mut seen) = (0.0, 0.0f64, 0.0);
        for pose in &drive[1..] {
            render_with(&house, *pose, &target, RenderOptions::rgb_only(), &mut frame);
            let truth = RgbImage { width: 24, height: 16, data: frame.rgb.clone() };
            let carried = carrier.carry(&memory, &pinhole(&target), &(planar(*pose) * mounting(&target)));
            seen += carried.covered() / 20.0;
            carried.fill();
            let d = squared_difference(&carried.picture(), &truth);
            sum += d / 20.0;
            most = most.max(d);
        }
        all += psnr(sum);
        worst += psnr(most);
        covered += seen;
    }
    [all, worst, covered].map(|v| v / rooms as f64)
}

const EXACT: Noise = Noise(0.0, 0.0, 0.0);
const TYPICAL: Noise = Noise(0.05, 0.02, 1.0 * std::f64::consts::PI / 180.0);

#[test]
fn carried_views_are_like_rendered_ones() {
    let [exact, worst, covered] = carried_psnr(6, 40, (48, 32), EXACT);
    assert!(
        exact > 25.0 && worst > 21.5 && covered > 0.75,
        "{exact:.1} dB, worst {worst:.1}, covered {covered:.2}"
    );
    let [noisy, ..] = carried_psnr(6, 40, (48, 32), TYPICAL);
    assert!((22.0..exact).contains(&noisy), "{noisy:.1} dB");
}

/// `cargo test --release -p mindseye-landmarks --lib carried_in_sixty -- --ignored --nocapture`
#[test]
#[ignore = "prints a table of 60 rooms"]
fn carried_in_sixty_rooms() {
    println!("memory, depth, poses: PSNR dB (worst frame), trusted");
    let degree = std::f64::consts::PI / 180.0;
    for (name, size, noise) in [
        ("24x16, exact", (24, 16), EXACT),
        ("48x32, exact", (48, 32), EXACT),
        ("96x64, exact", (96, 64), EXACT),
        ("48x32, depth 2.2 %", (48, 32), Noise(0.022, 0.0, 0.0)),
        ("48x32, depth 5 %, 2 cm, 1 degree", (48, 32), TYPICAL),
        ("48x32, depth 2.2 %, 10 cm, 5 degrees", (48, 32), Noise(0.022, 0.1, 5.0 * degree)),
    ] {
        let began = std::time::Instant::now();
        let [all, worst, covered] = carried_psnr(60, 910_000, size, noise);
        println!("{name:40} {all:.2} ({worst:.2}) {covered:.2}   {:.1} s", began.elapsed().as_secs_f64());
    }
}
