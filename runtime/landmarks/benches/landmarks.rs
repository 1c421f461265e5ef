//! What landmarks cost of one core, in rendered rooms with grain at 416 x 256 pixels, against a map of 20 000 landmarks:
//! features of a kept frame, keeping it, registering a true frame with and without a guess, and refusing one of another
//! place. Beside that, what looking at every descriptor instead of the index would cost in the same map.
//!
//! `cargo bench -p mindseye-landmarks`. Times are those that the thread ran; a busy machine still has colder caches.

use std::hint::black_box;

use mindseye_base::stats::busy_ms;
use mindseye_landmarks::{
    Camera, Extractor, ExtractorConfig, Features, Gray, LandmarkMap, MapConfig, RegisterConfig,
};
use mindseye_world::{
    Camera as Pinhole, Difficulty, Frame, House, Pose2, RenderOptions, Rng, exploration_sweep,
    random_drive_from, random_pose, render_with,
};
use nalgebra::{Isometry3, Matrix3, Rotation3, Translation3, UnitQuaternion};

const SIZE: (usize, usize) = (416, 256);
/// Landmarks that the map holds at most, and nearly holds.
const LANDMARKS: usize = 20_000;
/// Rooms lie so far apart (metres) that none is seen from another.
const APART_M: f64 = 30.0;

fn main() {
    let pinhole = Pinhole::new(SIZE.0, SIZE.1);
    let [fx, fy, cx, cy] = pinhole.intrinsics();
    let camera = Camera::pinhole(SIZE.0 as u32, SIZE.1 as u32, fx, fy, cx, cy).expect("a camera");
    let mut robot =
        Robot { pinhole, frame: Frame::new(), extractor: Extractor::new(ExtractorConfig::default()) };
    let config = MapConfig { landmarks_max: LANDMARKS, ..MapConfig::for_width(SIZE.0 as u32) };
    let mut map = LandmarkMap::new(config);
    let [mut extraction, mut keeping] = [Times::default(), Times::default()];
    let (mut rooms, mut kept, mut descriptors) = (Vec::new(), 0, Vec::new());
    for seed in 0.. {
        let house = House::generate(1_400_000 + seed, &Difficulty::plain());
        let mut rng = Rng::new(seed);
        let mut path = exploration_sweep(&house, &mut rng, 40);
        let last = path[path.len() - 1];
        path.extend(random_drive_from(&house, &mut rng, last, 24).into_iter().skip(1));
        for pose in &path {
            let gray = robot.look(&house, *pose);
            let features = extraction.of(|| robot.extractor.extract(&gray));
            let map_from_camera = robot.map_from_camera(*pose, seed);
            keeping.of(|| map.insert(&features, &camera, &map_from_camera));
            descriptors.extend(features.descriptors);
        }
        kept += path.len();
        rooms.push((house, path, seed));
        if map.len() * 20 >= LANDMARKS * 19 {
            break;
        }
    }
    println!("{} landmarks of {kept} kept frames in {} rooms", map.len(), rooms.len());
    extraction.print("features of a kept frame");
    keeping.print("keeping it");

    let config = RegisterConfig::for_width(SIZE.0 as u32);
    let [mut without, mut with, mut refused, mut every] = std::array::from_fn(|_| Times::default());
    let (mut placed, mut accepted) = (0, 0);
    let mut queries: Vec<Features> = Vec::new();
    for (house, path, seed) in &rooms {
        for (k, pose) in path.iter().enumerate().skip(3).step_by(9) {
            // Beside the way that was gone.
            let pose = Pose2::unwrapped(pose.x + 0.05, pose.y - 0.05, pose.yaw + 0.05);
            let gray = robot.look(house, pose);
            let features = robot.extractor.extract(&gray);
            let guess = robot.map_from_camera(path[k.saturating_sub(1)], *seed);
            placed += usize::from(without.of(|| map.register(&features, &camera, None, &config)).is_ok());
            placed +=
                usize::from(with.of(|| map.register(&features, &camera, Some(&guess), &config)).is_ok());
            queries.push(features);
        }
        let other = House::generate(1_500_000 + seed, &Difficulty::plain());
        let mut rng = Rng::new(*seed);
        for _ in 0..6 {
            let pose = random_pose(&other, &mut rng);
            let gray = robot.look(&other, pose);
            let features = robot.extractor.extract(&gray);
            let guess = robot.map_from_camera(path[0], *seed);
            let found = refused.of(|| map.register(&features, &camera, Some(&guess), &config));
            accepted += usize::from(found.is_ok());
        }
    }
    descriptors.truncate(2 * LANDMARKS);
    for features in queries.iter().take(4) {
        every.of(|| {
            for own in &features.descriptors {
                black_box(descriptors.iter().map(|d| d.distance(own)).min());
            }
        });
    }
    println!("{placed} of {} true frames were placed", 2 * queries.len());
    without.print("registering a true frame, without a guess");
    with.print("registering it from a guess");
    println!("{accepted} of {} frames of other houses were placed", refused.0.len());
    refused.print("refusing them, from a guess");
    every.print(&format!("peer: matching by looking at each of {} descriptors", descriptors.len()));
    println!("registering without a guess over this peer: {:.3}", without.median() / every.median());
}

/// The robot's camera.
struct Robot {
    pinhole: Pinhole,
    frame: Frame,
    extractor: Extractor,
}

impl Robot {
    fn look(&mut self, house: &House, pose: Pose2) -> Gray {
        let options = RenderOptions { grain: true, ..RenderOptions::rgb_only() };
        render_with(house, pose, &self.pinhole, options, &mut self.frame);
        Gray::from_rgb8(SIZE.0, SIZE.1, &self.frame.rgb)
    }

    /// In a map of many rooms.
    fn map_from_camera(&self, pose: Pose2, room: u64) -> Isometry3<f64> {
        let (r, t) = self.pinhole.map_from_camera(pose);
        let rotation = Rotation3::from_matrix_unchecked(Matrix3::from_fn(|i, j| r[i][j]));
        let at = Translation3::new(t[0] + APART_M * room as f64, t[1], t[2]);
        Isometry3::from_parts(at, UnitQuaternion::from_rotation_matrix(&rotation))
    }
}

/// Milliseconds.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn of<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let began = busy_ms();
        let out = work();
        self.0.push(busy_ms() - began);
        out
    }

    fn median(&self) -> f64 {
        mindseye_base::stats::median(&mut self.0.clone())
    }

    fn print(&self, what: &str) {
        let mut all = self.0.clone();
        all.sort_by(f64::total_cmp);
        let last = all.len().saturating_sub(1);
        let at = |share: f64| all.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN);
        println!(
            "{what}: median {:.1} ms, 90 %: {:.1}, longest {:.1} ({})",
            self.median(),
            at(0.9),
            at(1.0),
            all.len()
        );
    }
}
