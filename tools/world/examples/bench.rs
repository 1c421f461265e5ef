//! Prints rendering and generation rates of one core.
//!
//! `cargo run --release -p mindseye-world --example bench [DIFFICULTY]`

use mindseye_world::{
    Camera, Difficulty, Frame, House, RenderOptions, Rng, approach, exploration_sweep, project_box_in,
    random_pose, render_with,
};

fn main() {
    let now = || 1e-3 * mindseye_base::stats::busy_ms();
    let only = std::env::args().nth(1);
    for name in Difficulty::NAMES.into_iter().filter(|n| only.as_deref().is_none_or(|o| o == *n)) {
        let Some(difficulty) = Difficulty::named(name) else { continue };
        let houses: Vec<House> = (0..16).map(|s| House::generate(s, &difficulty)).collect();
        let mut rng = Rng::new(1);
        let poses: Vec<_> = houses.iter().map(|h| exploration_sweep(h, &mut rng, 96)).collect();
        let mut frame = Frame::new();
        for (width, height) in [(24, 16), (32, 32), (48, 32), (64, 48), (416, 256)] {
            let camera = Camera::new(width, height);
            for (what, options) in [
                ("rgb", RenderOptions::rgb_only()),
                ("rgb+depth+ids", RenderOptions::default()),
                ("rgb 1x1", RenderOptions { supersample: 1, ..RenderOptions::rgb_only() }),
            ] {
                let (mut n, mut sum) = (0u32, 0u64);
                let start = now();
                while now() - start < 0.3 {
                    for (house, poses) in houses.iter().zip(&poses) {
                        for pose in poses.iter().step_by(12) {
                            render_with(house, *pose, &camera, options, &mut frame);
                            sum += u64::from(frame.rgb[0]);
                            n += 1;
                        }
                    }
                }
                let rate = f64::from(n) / (now() - start);
                println!(
                    "{name} {width}x{height} {what}: {rate:.0} frames per core-second (check {})",
                    sum % 97
                );
            }
        }
        let camera = Camera::new(24, 16);
        let start = now();
        let n = 300;
        for seed in 0..n {
            let house = House::generate(1000 + seed, &difficulty);
            let mut rng = Rng::new(seed);
            let sweep = exploration_sweep(&house, &mut rng, 96);
            let drive = approach(&house, random_pose(&house, &mut rng), 0, 17);
            for pose in sweep.iter().step_by(12).chain(&drive.poses) {
                render_with(&house, *pose, &camera, RenderOptions::rgb_ids(), &mut frame);
            }
            let _ = project_box_in(&house, drive.final_pose, &camera, 0, &mut frame);
        }
        let each = (now() - start) * 1e3 / n as f64;
        println!("{name}: a house, a sweep, an approach, 25 frames of 24x16 with ids, a box: {each:.3} ms");
        let time = |what: &str, f: &mut dyn FnMut(u64)| {
            let start = now();
            (0..3000).for_each(&mut *f);
            println!("{name}: {what}: {:.1} us", (now() - start) * 1e6 / 3000.0);
        };
        time("generate", &mut |s| drop(House::generate(s, &difficulty)));
        time("sweep", &mut |s| drop(exploration_sweep(&houses[(s % 16) as usize], &mut Rng::new(s), 96)));
        time("approach", &mut |s| {
            let house = &houses[(s % 16) as usize];
            drop(approach(house, random_pose(house, &mut Rng::new(s)), 0, 17));
        });
    }
}
