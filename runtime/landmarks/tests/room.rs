//! Rooms with painted walls, rendered exactly: what is placed must be right, and what is not of the room must be withheld.

use mindseye_landmarks::{
    Camera, Extractor, ExtractorConfig, Features, GeometricLift, Gray, ImaginedFrame, Inconsistent,
    LandmarkMap, Lift, LiftConfig, MapConfig, PictureLift, RegisterConfig, Registration, Unregistered,
};
use nalgebra::{Isometry3, Point3, UnitQuaternion, Vector2, Vector3};

/// A number in 0..1 for a corner of a grid.
fn hash(seed: u64, wall: u64, i: i64, j: i64) -> f64 {
    let mut z = seed ^ (wall << 56) ^ ((i as u64) << 28) ^ (j as u64 & 0xfff_ffff);
    for _ in 0..2 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    (z >> 11) as f64 / (1u64 << 53) as f64
}

/// Paint of a wall at a place on it (metres): smooth noise of three grains.
fn paint(seed: u64, wall: u64, u: f64, v: f64) -> f64 {
    let noise = |grain: f64, salt: u64| {
        let (x, y) = (u / grain, v / grain);
        let (i, j) = (x.floor() as i64, y.floor() as i64);
        let ease = |t: f64| t * t * (3.0 - 2.0 * t);
        let (fx, fy) = (ease(x - x.floor()), ease(y - y.floor()));
        let at = |di: i64, dj: i64| hash(seed.wrapping_add(salt), wall, i + di, j + dj);
        let upper = at(0, 0) * (1.0 - fx) + at(1, 0) * fx;
        let lower = at(0, 1) * (1.0 - fx) + at(1, 1) * fx;
        upper * (1.0 - fy) + lower * fy
    };
    (0.4 * noise(0.32, 0) + 0.35 * noise(0.15, 77) + 0.25 * noise(0.08, 991)).clamp(0.0, 1.0)
}

/// What a ray from inside a room of 5 x 4 x 2.5 m sees.
fn look(seed: u64, from: Point3<f64>, along: Vector3<f64>) -> f64 {
    let size = [5.0, 4.0, 2.5];
    let (mut nearest, mut wall) = (f64::INFINITY, 0);
    for axis in 0..3 {
        for (side, at) in [(0, 0.0), (1, size[axis])] {
            let t = (at - from[axis]) / along[axis];
            if t > 1e-6 && t < nearest {
                (nearest, wall) = (t, 2 * axis + side);
            }
        }
    }
    let hit = from + along * nearest;
    let (u, v) = match wall / 2 {
        0 => (hit.y, hit.z),
        1 => (hit.x, hit.z),
        _ => (hit.x, hit.y),
    };
    paint(seed, wall as u64, u, v)
}

fn render(seed: u64, camera: &Camera, map_from_camera: &Isometry3<f64>) -> Gray {
    let (w, h) = camera.size();
    let from = Point3::from(map_from_camera.translation.vector);
    let mut data = Vec::with_capacity((w * h) as usize);
    for y in 0..h {
        for x in 0..w {
            let mut sum = 0.0;
            for (dx, dy) in [(-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)] {
                let ray = camera.ray(Vector2::new(f64::from(x) + dx, f64::from(y) + dy));
                let along = ray.map_or(Vector3::z(), |r| Vector3::new(r.x, r.y, 1.0));
                sum += 0.25 * look(seed, from, map_from_camera.rotation * along);
            }
            data.push(sum as f32);
        }
    }
    Gray::new(w as usize, h as usize, data)
}

fn camera() -> Camera {
    Camera::pinhole(208, 156, 170.0, 170.0, 103.5, 77.5).expect("a camera")
}

/// At a place (metres), looking level along a heading (radians from x towards y); z is up.
fn pose(x: f64, y: f64, z: f64, heading: f64) -> Isometry3<f64> {
    let ahead = Vector3::new(heading.cos(), heading.sin(), 0.0);
    let turn = UnitQuaternion::face_towards(&ahead, &-Vector3::z());
    Isometry3::from_parts(Point3::new(x, y, z).coords.into(), turn)
}

/// Sideways along one side of the room, looking across.
fn walk() -> Vec<Isometry3<f64>> {
    (0..9)
        .map(|k| {
            let s = f64::from(k);
            pose(1.2 + 0.16 * s, 0.9 + 0.05 * (s % 3.0), 1.1, 1.45 + 0.03 * s)
        })
        .collect()
}

fn features(picture: &Gray) -> Features {
    Extractor::new(ExtractorConfig::default()).extract(picture)
}

fn map_of(seed: u64, camera: &Camera, poses: &[Isometry3<f64>], config: MapConfig) -> LandmarkMap {
    let mut map = LandmarkMap::new(config);
    for pose in poses {
        map.insert(&features(&render(seed, camera, pose)), camera, pose);
    }
    map
}

fn place(map: &mut LandmarkMap, camera: &Camera, picture: &Gray) -> Result<Registration, Unregistered> {
    map.register(&features(picture), camera, None, &RegisterConfig::default())
}

fn apart(a: &Isometry3<f64>, b: &Isometry3<f64>) -> (f64, f64) {
    let d = a.inverse() * b;
    (d.translation.vector.norm(), d.rotation.angle().to_degrees())
}

#[test]
fn pictures_of_the_room_are_placed_and_others_withheld() {
    let camera = camera();
    let mut map = map_of(1, &camera, &walk(), MapConfig::default());
    assert!(map.len() > 150, "{} landmarks", map.len());
    let truths = [pose(1.55, 1.1, 1.05, 1.6), pose(2.1, 0.8, 1.2, 1.5), pose(1.9, 1.3, 1.1, 1.62)];
    for truth in truths {
        let picture = render(1, &camera, &truth);
        let got = place(&mut map, &camera, &picture).unwrap();
        let (shift, turn) = apart(&got.map_from_camera, &truth);
        assert!(shift < 0.04 && turn < 1.0, "{shift} m, {turn} degrees: {got:?}");
        let sigma = got.covariance.fixed_view::<3, 3>(0, 0).trace().sqrt();
        assert!((0.002..0.1).contains(&sigma), "{sigma} m");
        // From a guess that is 20 cm off.
        let guess = truth * Isometry3::translation(0.15, -0.05, 0.1);
        let guided = map.register(&features(&picture), &camera, Some(&guess), &RegisterConfig::default());
        let (shift, turn) = apart(&guided.unwrap().map_from_camera, &truth);
        assert!(shift < 0.04 && turn < 1.0, "guided: {shift} m, {turn} degrees");
    }
    let truth = truths[0];
    let straight = render(1, &camera, &truth);
    let (w, h) = straight.size();
    let redrawn = |f: &dyn Fn(usize, usize) -> (usize, usize)| {
        let value = |k: usize| {
            let (x, y) = f(k % w, k / w);
            straight.value(x, y)
        };
        Gray::new(w, h, (0..w * h).map(value).collect())
    };
    // Upside down is a true picture: the camera hangs the other way round.
    let hanging = place(&mut map, &camera, &redrawn(&|x, y| (w - 1 - x, h - 1 - y))).unwrap();
    let over = truth * Isometry3::rotation(Vector3::z() * std::f64::consts::PI);
    let (shift, turn) = apart(&hanging.map_from_camera, &over);
    assert!(shift < 0.04 && turn < 1.0, "upside down: {shift} m, {turn} degrees");
    // These are not.
    let check = |name: &str, map: &mut LandmarkMap, picture: &Gray| {
        let got = place(map, &camera, picture);
        assert!(got.is_err(), "{name} was placed: {got:?}");
    };
    check("a mirrored picture", &mut map, &redrawn(&|x, y| (w - 1 - x, y)));
    check("another room", &mut map, &render(2, &camera, &truth));
    check("another wall", &mut map, &render(1, &camera, &pose(2.0, 3.0, 1.1, -1.5)));
    let blank = place(&mut map, &camera, &Gray::new(w, h, vec![0.5; w * h]));
    assert_eq!(blank, Err(Unregistered::NoFeatures { features: 0 }));
}

#[test]
fn turning_on_the_spot_makes_no_landmarks() {
    let camera = camera();
    let poses: Vec<_> = (0..6).map(|k| pose(2.0, 1.0, 1.1, 1.3 + 0.08 * f64::from(k))).collect();
    let mut map = map_of(1, &camera, &poses, MapConfig::default());
    assert_eq!(map.len(), 0);
    assert_eq!(map.counts().frames_without_baseline, 6);
    let answer = place(&mut map, &camera, &render(1, &camera, &poses[2]));
    assert_eq!(answer, Err(Unregistered::NoLandmarks { landmarks: 0 }));
}

#[test]
fn memory_is_bounded_and_counted() {
    let camera = camera();
    let config = MapConfig { landmarks_max: 120, frames_max: 4, ..MapConfig::default() };
    let mut map = LandmarkMap::new(config);
    for _ in 0..3 {
        for pose in walk() {
            map.insert(&features(&render(1, &camera, &pose)), &camera, &pose);
            assert!(map.len() <= 120);
        }
    }
    let counts = map.counts();
    assert!(counts.dropped > 0 && counts.created - counts.dropped == map.len() as u64, "{counts:?}");
    let truth = pose(1.9, 1.0, 1.1, 1.6);
    let got = place(&mut map, &camera, &render(1, &camera, &truth)).unwrap();
    assert!(apart(&got.map_from_camera, &truth).0 < 0.06, "{got:?}");
    map.clear();
    assert!(map.is_empty());
}

/// Resident memory of this process (bytes).
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let resident = pages.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok());
    4096 * resident.expect("a number of pages")
}

#[test]
#[ignore = "36 000 frames, ten a second for an hour: about a minute of a core"]
fn an_hour_of_frames_takes_no_more_memory_than_ten_minutes() {
    let camera = camera();
    let few = ExtractorConfig { features_max: 80, ..ExtractorConfig::default() };
    let seen: Vec<_> =
        walk().iter().map(|p| (Extractor::new(few).extract(&render(1, &camera, p)), *p)).collect();
    // A bound that is met after a minute, so that room is made all the time.
    let mut map = LandmarkMap::new(MapConfig { landmarks_max: 2000, ..MapConfig::default() });
    let (frames, began) = (36_000, std::time::Instant::now());
    let mut early = 0;
    for k in 0..frames {
        // Each lap elsewhere: always new landmarks, and never room for all.
        let (features, pose) = &seen[k % seen.len()];
        let lap = 0.7 * (k / seen.len()) as f64;
        map.insert(features, &camera, &(Isometry3::translation(lap, 0.0, 0.0) * pose));
        if k == frames / 6 {
            early = resident();
        }
    }
    let (late, counts) = (resident(), map.counts());
    println!(
        "{} landmarks, {counts:?}: {early} bytes resident after ten minutes, {late} after an hour, in {:.0} s",
        map.len(),
        began.elapsed().as_secs_f64()
    );
    assert!(counts.dropped > 50_000, "{counts:?}");
    assert!(late < early + (4 << 20), "{early} bytes, then {late}");
}

#[test]
fn poses_of_kept_frames_that_are_off_are_in_the_covariance() {
    let camera = camera();
    let seen: Vec<_> = walk().iter().map(|p| (features(&render(1, &camera, p)), *p)).collect();
    let truths = [pose(1.55, 1.1, 1.05, 1.6), pose(2.1, 0.8, 1.2, 1.5), pose(1.9, 1.3, 1.1, 1.62)];
    let queries = truths.map(|truth| (features(&render(1, &camera, &truth)), truth));
    let config = RegisterConfig { drift_sigma_m: 0.015, drift_sigma_rad: 0.005, ..RegisterConfig::default() };
    let mut rng = mindseye_base::random::Rng::new(7);
    let (mut placed, mut within) = (0, 0);
    for _ in 0..16 {
        let mut map = LandmarkMap::new(MapConfig::default());
        for (features, pose) in &seen {
            let mut normal = |sigma: f64| Vector3::new(rng.normal(), rng.normal(), rng.normal()) * sigma;
            let off = Isometry3::new(normal(0.015), normal(0.005));
            map.insert(features, &camera, &(pose * off));
        }
        for (features, truth) in &queries {
            let Ok(got) = map.register(features, &camera, None, &config) else { continue };
            placed += 1;
            let off = (got.map_from_camera.inverse() * truth).translation.vector;
            let inverse = got.covariance.fixed_view::<3, 3>(0, 0).try_inverse().unwrap();
            // 90 % of a chi-square with three degrees of freedom.
            within += usize::from((off.transpose() * inverse * off)[0] < 6.251);
        }
    }
    assert!(placed >= 24 && 10 * within >= 8 * placed, "{within} of {placed} placed, of 48");
}

#[test]
fn lenses_are_undone() {
    let lens = camera().with_distortion("plumb_bob", &[-0.2, 0.05, 0.001, -0.001, 0.0]).unwrap();
    let mut map = map_of(3, &lens, &walk(), MapConfig::default());
    let truth = pose(1.7, 1.0, 1.1, 1.55);
    let got = place(&mut map, &lens, &render(3, &lens, &truth)).unwrap();
    let (shift, turn) = apart(&got.map_from_camera, &truth);
    assert!(shift < 0.04 && turn < 1.0, "{shift} m, {turn} degrees");
}

#[test]
fn a_wrong_focal_length_is_noticed() {
    let camera = camera();
    // Into a corner: a wall straight ahead looks the same through a longer lens from further away.
    let poses: Vec<_> = walk().iter().map(|p| p * Isometry3::rotation(Vector3::y() * 0.6)).collect();
    let mut map = map_of(1, &camera, &poses, MapConfig::default());
    let truth = pose(1.7, 1.0, 1.1, 0.95);
    for factor in [1.0, 1.1] {
        let picture = render(1, &camera.with_focal_scaled(factor), &truth);
        let got = place(&mut map, &camera, &picture).unwrap();
        let noticed = got.focal_factor.unwrap();
        assert!((noticed - factor).abs() < 0.04, "factor {noticed} instead of {factor}");
    }
}

/// Pictures of a drive along the walk, and one box, around a place on the far wall, in the last one.
fn drive(seed: u64, camera: &Camera, target: &Point3<f64>) -> Vec<(Gray, Option<[f64; 4]>)> {
    let poses = [
        pose(1.5, 0.95, 1.1, 1.5),
        pose(1.65, 1.05, 1.1, 1.55),
        pose(1.8, 1.15, 1.1, 1.55),
        pose(1.9, 1.3, 1.1, 1.57),
    ];
    let end = poses[3].inverse_transform_point(target);
    let at = camera.project(&end).expect("the target is in the last picture");
    let area = [at.x - 25.0, at.y - 20.0, at.x + 25.0, at.y + 20.0];
    poses.iter().enumerate().map(|(k, p)| (render(seed, camera, p), (k == 3).then_some(area))).collect()
}

fn lifted(map: &mut LandmarkMap, camera: &Camera, drive: &[(Gray, Option<[f64; 4]>)]) -> PictureLift {
    let frames: Vec<ImaginedFrame> =
        drive.iter().map(|(g, area)| ImaginedFrame { picture: g.clone(), area: *area }).collect();
    let extractor = &mut Extractor::new(ExtractorConfig::default());
    GeometricLift { map, extractor, camera: *camera, map_from_start: None, config: LiftConfig::default() }
        .lift(&frames)
}

#[test]
fn true_drives_give_the_goal_and_invented_ones_are_named() {
    let camera = camera();
    let mut map = map_of(1, &camera, &walk(), MapConfig::default());
    let target = Point3::new(2.1, 4.0, 1.2);
    let truth = drive(1, &camera, &target);
    let got = lifted(&mut map, &camera, &truth);
    assert_eq!(got.verdict, Ok(()), "{:?}", got.frames);
    assert!(got.sd_m.unwrap() < 0.1, "{:?}", got.sd_m);
    let goal = got.goal.unwrap();
    assert!((goal.object - target).norm() < 0.1, "{:?}", goal.object);
    // By hand: 1.2 m before the target on the line from the last camera at (1.9, 1.3).
    let yaw = (4.0f64 - 1.3).atan2(2.1 - 1.9);
    let want = [2.1 - 1.2 * yaw.cos(), 4.0 - 1.2 * yaw.sin(), yaw];
    let off = (goal.base[0] - want[0]).hypot(goal.base[1] - want[1]);
    assert!(off < 0.1 && (goal.base[2] - want[2]).abs() < 0.05, "{:?}, wanted {want:?}", goal.base);
    let d2 = (0..2).map(|k| (goal.base[k] - want[k]).powi(2) / goal.covariance[(k, k)]).sum::<f64>();
    assert!(d2 < 12.0, "{d2}: outside what the covariance says");
    assert!(goal.covariance.symmetric_eigenvalues().min() > -1e-12);

    let elsewhere = lifted(&mut map, &camera, &drive(2, &camera, &target));
    assert!(
        matches!(elsewhere.verdict, Err(Inconsistent::NotPlaced { frame: 0, .. })),
        "{:?}",
        elsewhere.verdict
    );
    // A patch of another room painted into the last two pictures, a fifth of their area.
    let mut painted = truth.clone();
    for (k, other) in drive(2, &camera, &target).iter().enumerate().skip(2) {
        let (w, h) = painted[k].0.size();
        let inside = |x: usize, y: usize| (60..140).contains(&x) && (40..125).contains(&y);
        let value = |k2: usize| {
            let (x, y) = (k2 % w, k2 / w);
            if inside(x, y) { other.0.value(x, y) } else { painted[k].0.value(x, y) }
        };
        painted[k].0 = Gray::new(w, h, (0..w * h).map(value).collect());
    }
    let got = lifted(&mut map, &camera, &painted);
    let hole = |e: &Inconsistent| matches!(e, Inconsistent::Hole { frame: 2 | 3, .. });
    assert!(got.verdict.as_ref().is_err_and(hole), "{:?}", got.verdict);
    // Without a box there is no goal.
    let unnamed: Vec<_> = truth.iter().map(|(g, _)| (g.clone(), None)).collect();
    let got = lifted(&mut map, &camera, &unnamed);
    assert!(matches!(got.verdict, Err(Inconsistent::NoObject { points: 0, .. })), "{:?}", got.verdict);
    assert_eq!(lifted(&mut map, &camera, &[]).verdict, Err(Inconsistent::NoFrames));
}
