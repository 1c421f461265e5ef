//! Writes pictures of a few houses to look at.
//!
//! `cargo run --release -p mindseye-world --example pictures -- DIR [furnished]`

use mindseye_world::{
    Camera, Colour, Difficulty, Frame, House, MapView, Pose2, RenderOptions, Rng, Shape, approach,
    draw::Canvas, draw_box, draw_path, draw_pose, draw_robot, draw_view, exploration_sweep, project_box,
    random_pose, render_with, scenic_pose, top_down,
};

fn save(dir: &str, name: &str, width: usize, height: usize, rgb: &[u8]) -> std::io::Result<()> {
    mindseye_base::picture::save_png(
        std::path::Path::new(dir).join(format!("{name}.png")).as_path(),
        width,
        height,
        rgb,
    )
}

/// Frames side by side, each pixel enlarged.
struct Sheet {
    columns: usize,
    zoom: usize,
    tile: (usize, usize),
    tiles: Vec<Vec<u8>>,
}

impl Sheet {
    fn save(&self, dir: &str, name: &str) -> std::io::Result<()> {
        let (w, h) = (self.tile.0 * self.zoom + 4, self.tile.1 * self.zoom + 4);
        let rows = self.tiles.len().div_ceil(self.columns);
        let mut out = vec![20u8; w * self.columns * h * rows * 3];
        for (k, tile) in self.tiles.iter().enumerate() {
            let (ox, oy) = ((k % self.columns) * w, (k / self.columns) * h);
            for y in 0..self.tile.1 * self.zoom {
                for x in 0..self.tile.0 * self.zoom {
                    let from = ((y / self.zoom) * self.tile.0 + x / self.zoom) * 3;
                    let to = ((oy + y) * w * self.columns + ox + x) * 3;
                    out[to..to + 3].copy_from_slice(&tile[from..from + 3]);
                }
            }
        }
        save(dir, name, w * self.columns, h * rows, &out)
    }
}

/// Seeds of the rooms that are shown.
const ROOMS: [u64; 6] = [2, 3, 4, 5, 8, 9];

/// Every kind of furniture from where an approach to it ends, and rooms.
fn furnished(dir: &str) -> std::io::Result<()> {
    let mut frame = Frame::new();
    let difficulty = Difficulty::furnished();
    let camera = Camera::new(208, 128);
    let mut sheet = Sheet { columns: 8, zoom: 1, tile: (208, 128), tiles: Vec::new() };
    for kind in difficulty.kinds() {
        let mut sizes: Vec<[i64; 3]> = Vec::new();
        for seed in 0..400 {
            let house = House::generate(seed, &difficulty);
            let Some(k) = house.objects.iter().position(|o| o.shape == *kind) else { continue };
            let o = &house.objects[k];
            // Models differ in their proportions.
            let shape = [1, 2].map(|c| (10.0 * o.size[c] / o.size[0]).round() as i64);
            if sizes.iter().any(|s| (s[0] - shape[0]).abs() <= 1 && (s[1] - shape[1]).abs() <= 1) {
                continue;
            }
            sizes.push([shape[0], shape[1], 0]);
            let drive = approach(&house, Pose2::default(), k, 17);
            render_with(&house, drive.final_pose, &camera, RenderOptions::picture(), &mut frame);
            sheet.tiles.push(frame.rgb.clone());
            if sizes.len() == 3 {
                break;
            }
        }
    }
    sheet.save(dir, "furnished_kinds")?;
    // Six rooms for the documentation: 32 steps a channel, so that the file stays small.
    let camera = Camera::new(416, 256);
    for (name, options) in [("rooms_fast", RenderOptions::rgb_only()), ("rooms", RenderOptions::picture())] {
        let mut sheet = Sheet { columns: 2, zoom: 1, tile: (416, 256), tiles: Vec::new() };
        for seed in ROOMS {
            let house = House::generate(seed, &difficulty);
            render_with(&house, scenic_pose(&house, &camera), &camera, options, &mut frame);
            sheet.tiles.push(frame.rgb.iter().map(|v| v / 8 * 8 + 4).collect());
        }
        sheet.save(dir, &format!("furnished_{name}"))?;
    }
    Ok(())
}

/// Every plain shape from about 2 m, in several colours.
fn shapes(dir: &str) -> std::io::Result<()> {
    let mut frame = Frame::new();
    let plain = Difficulty::plain();
    for (name, camera, zoom, options) in [
        ("shapes_24x16", Camera::new(24, 16), 8, RenderOptions::rgb_only()),
        ("shapes_48x32", Camera::new(48, 32), 4, RenderOptions::rgb_only()),
        ("shapes_fine", Camera::new(208, 128), 2, RenderOptions::picture()),
    ] {
        let mut sheet = Sheet { columns: 4, zoom, tile: (camera.width, camera.height), tiles: Vec::new() };
        for shape in Shape::PLAIN {
            let mut found = 0;
            for seed in 0..2000 {
                let house = House::generate(seed, &plain);
                let Some(k) = house.objects.iter().position(|o| o.shape == shape) else {
                    continue;
                };
                if house.objects[k].colour == Colour::ALL[(shape.index() + 3 * found) % 6] {
                    let end = approach(&house, Pose2::default(), k, 17).final_pose;
                    let back = if found == 0 { 0.0 } else { 0.9 };
                    let pose =
                        Pose2::unwrapped(end.x - back * end.yaw.cos(), end.y - back * end.yaw.sin(), end.yaw);
                    render_with(&house, pose, &camera, options, &mut frame);
                    sheet.tiles.push(frame.rgb.clone());
                    found += 1;
                    if found == 2 {
                        break;
                    }
                }
            }
        }
        sheet.save(dir, name)?;
    }
    Ok(())
}

/// What a robot sees on its way through plain houses, and their maps.
fn houses(dir: &str) -> std::io::Result<()> {
    let mut frame = Frame::new();
    for (kind, difficulty) in [("plain", Difficulty::plain()), ("house", Difficulty::house())] {
        for seed in 1..4u64 {
            let house = House::generate(seed, &difficulty);
            let mut rng = Rng::new(seed);
            let poses = exploration_sweep(&house, &mut rng, 96);
            let small = Camera::new(24, 16);
            let mut sheet = Sheet { columns: 6, zoom: 8, tile: (24, 16), tiles: Vec::new() };
            for pose in poses.iter().step_by(8) {
                render_with(&house, *pose, &small, RenderOptions::rgb_only(), &mut frame);
                sheet.tiles.push(frame.rgb.clone());
            }
            let drive = approach(&house, random_pose(&house, &mut rng), 0, 12);
            for pose in &drive.poses {
                render_with(&house, *pose, &small, RenderOptions::rgb_only(), &mut frame);
                if let Some(area) = project_box(&house, *pose, &small, 0) {
                    draw_box(&mut frame.rgb, 24, area, [255, 0, 0]);
                }
                sheet.tiles.push(frame.rgb.clone());
            }
            sheet.save(dir, &format!("{kind}{seed}_sweep"))?;
            let medium = Camera::new(416, 256);
            for (quality, options) in
                [("fast", RenderOptions::rgb_only()), ("fine", RenderOptions::picture())]
            {
                render_with(&house, scenic_pose(&house, &medium), &medium, options, &mut frame);
                save(dir, &format!("{kind}{seed}_{quality}"), 416, 256, &frame.rgb)?;
            }
        }
        let house = House::generate(5, &difficulty);
        let view = MapView::fit(&house, 900, 760);
        let mut canvas = Canvas::new(900, 760, [0; 3]);
        top_down(&house, &view, &mut canvas);
        let mut rng = Rng::new(5);
        let drive = approach(&house, random_pose(&house, &mut rng), house.objects.len() - 1, 17);
        draw_path(&view, &mut canvas, &exploration_sweep(&house, &mut rng, 96), 6, [120, 124, 140]);
        draw_path(&view, &mut canvas, &drive.poses, 2, [30, 110, 220]);
        draw_view(&view, &mut canvas, drive.final_pose, 1.57, 1.0, [30, 110, 220]);
        draw_robot(&view, &mut canvas, drive.poses[0], [40, 44, 60]);
        draw_pose(&view, &mut canvas, drive.final_pose, 0.5, [220, 30, 30]);
        save(dir, &format!("{kind}_map"), canvas.width, canvas.height, &canvas.rgb)?;
        let pose = scenic_pose(&house, &Camera::new(1248, 768));
        render_with(&house, pose, &Camera::new(1248, 768), RenderOptions::picture(), &mut frame);
        save(dir, &format!("{kind}_large"), 1248, 768, &frame.rgb)?;
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| "/tmp".into());
    std::fs::create_dir_all(&dir)?;
    if std::env::args().nth(2).is_some_and(|only| only == "furnished") {
        return furnished(&dir);
    }
    shapes(&dir)?;
    furnished(&dir)?;
    houses(&dir)
}
