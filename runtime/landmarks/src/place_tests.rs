use super::*;
use crate::carry::tests::{Noise, mounting, pinhole, remember};
use mindseye_base::random::Rng;
use mindseye_base::stats::median;
use mindseye_world::{self as world, Difficulty, Frame, House, RenderOptions, render_with};

fn close(a: f64, b: f64, within: f64) -> bool {
    (a - b).abs() < within
}

#[test]
fn angles_are_good_to_half_a_degree() {
    for k in 0..720 {
        let a = f64::from(k).to_radians() / 2.0 - 3.1;
        let got = f64::from(angle(3.0 * a.sin() as f32, 3.0 * a.cos() as f32));
        assert!(wrap_angle(got - a).abs() < 0.5f64.to_radians(), "{a}: {got}");
    }
}

#[test]
fn outlines_do_not_count() {
    let mut picture = RgbImage::filled(24, 16, [100; 3]);
    let plain = Look::of(&[&picture], |_, _| false).unwrap();
    for x in 8..16 {
        picture.data[(5 * 24 + x) * 3] = 255;
    }
    let masked = Look::of(&[&picture], |x, y| y == 5 && (8..16).contains(&x)).unwrap();
    for (i, (a, b)) in plain.rgb.iter().zip(&masked.rgb).enumerate() {
        let omitted = i / 24 == 5 && (8..16).contains(&(i % 24));
        assert!(omitted || difference(*a, *b) < 1e-9, "pixel {i}: {a:?} {b:?}");
        assert_eq!(masked.weight[i], if omitted { 0.0 } else { 1.0 });
    }
    assert!(Look::of(&[], |_, _| false).is_none());
    let other = RgbImage::filled(16, 24, [0; 3]);
    assert!(Look::of(&[&picture, &other], |_, _| false).is_none(), "pictures of two sizes");
}

/// A camera that looks along the base's x axis from 1 m above the floor, 24 by 16 pixels, 90 degrees.
fn level() -> (Camera, Isometry3<f64>) {
    let camera = Camera::pinhole(24, 16, 12.0, 12.0, 11.5, 7.5).unwrap();
    let eye = world::Camera { pitch_rad: 0.0, ..world::Camera::new(24, 16) };
    (camera, mounting(&eye))
}

#[test]
fn errors_by_hand() {
    // A grey wall that fills the view; the picture is brighter by the half difference in all pixels.
    let (camera, base_from_camera) = level();
    let mut memory = Remembered::new(400);
    memory.insert(&RgbImage::filled(24, 16, [100; 3]), &[2.0; 384], &camera, &base_from_camera).unwrap();
    let config = PlaceConfig { half: 51.0 / 255.0, ..PlaceConfig::default() };
    let mut placer = Placer::new(camera, base_from_camera, config);
    let bright = Look::of(&[&RgbImage::filled(24, 16, [151; 3])], |_, _| false).unwrap();
    let (error, covered) = placer.error_at(&memory, &bright, Pose2::default()).unwrap();
    assert!(close(error, 0.5, 1e-3) && close(covered, 1.0, 1e-3), "{error} {covered}");
    let same = Look::of(&[&RgbImage::filled(24, 16, [100; 3])], |_, _| false).unwrap();
    let (error, _) = placer.error_at(&memory, &same, Pose2::default()).unwrap();
    assert!(error < 1e-3, "{error}");
    // Looking the other way nothing was ever seen: half counts as unexplained.
    let (error, covered) = placer.error_at(&memory, &same, Pose2::new(0.0, 0.0, 3.0)).unwrap();
    assert!(close(error, 0.5, 1e-3) && covered == 0.0, "{error} {covered}");
    let small = Look::of(&[&RgbImage::filled(12, 8, [100; 3])], |_, _| false).unwrap();
    assert!(placer.error_at(&memory, &small, Pose2::default()).is_none(), "another camera's picture");
    assert!(placer.place(&Remembered::new(0), &same, &[Pose2::default()]).is_none(), "nothing is remembered");
}

/// What registration does to the pictures of drives in unseen rooms.
#[derive(Default)]
struct Found {
    /// Metres, degrees.
    off: Vec<f64>,
    turn: Vec<f64>,
    error: Vec<f64>,
    distinct: Vec<f64>,
    elsewhere: Vec<f64>,
    /// Errors along the base's axes and yaw over the curvature's standard deviation.
    spreads: Vec<f64>,
}

impl Found {
    fn line(&mut self) -> String {
        let share =
            |v: &[f64], most: f64| v.iter().filter(|v| **v < most).count() as f64 / v.len().max(1) as f64;
        let at = |v: &mut Vec<f64>, q: usize| {
            v.sort_by(f64::total_cmp);
            v.get(v.len() * q / 100).copied().unwrap_or(f64::NAN)
        };
        format!(
            "n {}: {:.2} m {:.1} deg; within .3 m {:.2}, 15 deg {:.2}; error {:.2} [{:.2} {:.2}], distinct {:.2} [{:.2} \
             {:.2}], elsewhere {:.2}, spreads {:.1} [90 %: {:.1}]",
            self.off.len(),
            median(&mut self.off),
            median(&mut self.turn),
            share(&self.off, 0.3),
            share(&self.turn, 15.0),
            at(&mut self.error, 50),
            at(&mut self.error, 5),
            at(&mut self.error, 95),
            at(&mut self.distinct, 50),
            at(&mut self.distinct, 5),
            at(&mut self.distinct, 95),
            at(&mut self.elsewhere, 50),
            at(&mut self.spreads, 50),
            at(&mut self.spreads, 90),
        )
    }
}

/// How pictures are spoiled before they are placed.
#[derive(Clone, Copy)]
enum Spoil {
    Not,
    /// Normal noise with this standard deviation (0..255).
    Noise(f64),
    /// A mean over so many pixels each way.
    Blur(usize),
    OtherHouse,
}

fn spoiled(picture: &RgbImage, how: Spoil, rng: &mut Rng) -> RgbImage {
    match how {
        Spoil::Noise(sigma) => {
            let noisy = |v: &u8| (f64::from(*v) + sigma * rng.normal()).round().clamp(0.0, 255.0) as u8;
            RgbImage { data: picture.data.iter().map(noisy).collect(), ..*picture }
        }
        Spoil::Blur(n) => {
            let (w, h) = (picture.width, picture.height);
            let mut out = picture.clone();
            for y in 0..h {
                for x in 0..w {
                    for c in 0..3 {
                        let (mut sum, mut all) = (0usize, 0usize);
                        for ny in y.saturating_sub(n)..(y + n + 1).min(h) {
                            for nx in x.saturating_sub(n)..(x + n + 1).min(w) {
                                sum += usize::from(picture.pixel(nx, ny)[c]);
                                all += 1;
                            }
                        }
                        out.data[(y * w + x) * 3 + c] = (sum / all) as u8;
                    }
                }
            }
            out
        }
        Spoil::Not | Spoil::OtherHouse => picture.clone(),
    }
}

/// Places the ends of drives to things. `seeds`: also from a pose that is 0.3 m and 10 degrees off.
fn found(rooms: u64, seed: u64, noise: Noise, how: Spoil, seeded: bool) -> Found {
    let eye = world::Camera::new(24, 16);
    let mut out = Found::default();
    let mut frame = Frame::new();
    for k in 0..rooms {
        let house = House::generate(seed + k, &Difficulty::plain());
        let mut rng = Rng::new(seed + k);
        let sweep = world::exploration_sweep(&house, &mut rng, 97);
        let memory = remember(&house, &sweep, (48, 32), noise, &mut rng);
        let mut placer = Placer::new(pinhole(&eye), mounting(&eye), PlaceConfig::default());
        placer.survey(&memory);
        let object = rng.below(house.objects.len());
        let other = House::generate(seed + 1000 + k, &Difficulty::plain());
        let shown = if matches!(how, Spoil::OtherHouse) { &other } else { &house };
        let Some(goal) = world::goal_pose(shown, sweep[96], object.min(shown.objects.len() - 1)) else {
            continue;
        };
        render_with(shown, goal, &eye, RenderOptions::rgb_only(), &mut frame);
        let truth = RgbImage { width: 24, height: 16, data: frame.rgb.clone() };
        let picture = spoiled(&truth, how, &mut rng);
        let look = Look::of(&[&picture], |_, _| false).unwrap();
        let near = goal.compose(world::Pose2::unwrapped(0.2, -0.2, 0.17));
        let starts = if seeded { vec![near] } else { vec![] };
        let placed = placer.place(&memory, &look, &starts).expect("there is a survey");
        let apart = goal.relative(placed.pose);
        out.off.push(placed.pose.distance(goal));
        out.turn.push(wrap_angle(placed.pose.yaw - goal.yaw).abs().to_degrees());
        out.error.push(placed.error);
        out.distinct.push(placed.distinct);
        out.elsewhere.push(placed.elsewhere.unwrap_or(f64::NAN));
        let v = Vector3::new(apart.x, apart.y, wrap_angle(apart.yaw));
        if let Some(inverse) = placed.covariance.try_inverse() {
            out.spreads.push((v.dot(&(inverse * v)) / 3.0).max(0.0).sqrt());
        }
    }
    out
}

#[test]
fn true_pictures_are_placed_and_those_of_another_house_are_not() {
    let noise = Noise(0.05, 0.02, 0.0175);
    let mut right = found(8, 40, noise, Spoil::Not, false);
    let near = right.off.iter().zip(&right.turn).filter(|(m, d)| **m < 0.3 && **d < 10.0).count();
    assert!(near >= 7, "{near} of {}: {}", right.off.len(), right.line());
    let mut wrong = found(8, 40, noise, Spoil::OtherHouse, false);
    assert!(
        median(&mut right.error) + 0.15 < median(&mut wrong.error),
        "{} against {}",
        right.line(),
        wrong.line()
    );
}

/// `cargo test --release -p mindseye-landmarks --lib placed_in_sixty -- --ignored --nocapture`
#[test]
#[ignore = "prints a table of 60 rooms"]
fn placed_in_sixty_rooms() {
    let typical = Noise(0.05, 0.02, 0.0175);
    for (name, noise, how, seeded) in [
        ("true, exact memory", Noise(0.0, 0.0, 0.0), Spoil::Not, false),
        ("true", typical, Spoil::Not, false),
        ("noise 20 dB", typical, Spoil::Noise(26.0), false),
        ("blur 5x5", typical, Spoil::Blur(2), false),
        ("blur 5x5, near start too", typical, Spoil::Blur(2), true),
        ("another house", typical, Spoil::OtherHouse, false),
        ("another house, a start too", typical, Spoil::OtherHouse, true),
    ] {
        let began = std::time::Instant::now();
        let mut f = found(60, 910_000, noise, how, seeded);
        println!("{name:28} {}   {:.1} s", f.line(), began.elapsed().as_secs_f64());
    }
}
