//! `imagination.png`: what the robot saw, what it imagined, and where that leads.

use crate::image::RgbImage;
use crate::planar::Pose2;
use mindseye_world::draw::Canvas;
use mindseye_world::{House, MapView, draw_path, draw_pose, draw_robot, top_down};

/// What is drawn.
pub struct Picture<'a> {
    /// The goal's text.
    pub goal: &'a str,
    /// Lines of text beside the map.
    pub lines: &'a [String],
    /// Frames of the memory that were used.
    pub context: &'a [RgbImage],
    /// Frames of the imagined drive, four per latent.
    pub imagined: &'a [RgbImage],
    /// Box in the last imagined frames, in their pixels.
    pub found_box: Option<[f64; 4]>,
    /// What the camera really sees at the end, larger.
    pub arrival: Option<&'a RgbImage>,
    /// The house.
    pub house: &'a House,
    /// Where the robot was when it asked.
    pub asked_at: Pose2,
    /// Path really driven.
    pub driven: &'a [Pose2],
    /// Path of the imagined drive.
    pub path: &'a [Pose2],
    /// Goal pose of the answer.
    pub answer: Option<Pose2>,
    /// Goal pose by the truth.
    pub truth: Option<Pose2>,
    /// Object's place according to the answer.
    pub object: Option<(f64, f64)>,
}

const PAPER: [u8; 3] = [250, 249, 246];
const INK: [u8; 3] = [32, 34, 40];
const SOFT: [u8; 3] = [112, 116, 124];
const IMAGINED: [u8; 3] = [214, 40, 57];
const DRIVEN: [u8; 3] = [24, 100, 200];
const TRUTH: [u8; 3] = [30, 150, 80];
const MARGIN: usize = 28;
const WIDTH: usize = 1280;
const GAP: usize = 8;

fn world(p: Pose2) -> mindseye_world::Pose2 {
    mindseye_world::Pose2::new(p.x, p.y, p.yaw)
}

/// How much `count` frames of this width are enlarged to fill a row.
fn zoom(width: usize, count: usize) -> usize {
    let room = (WIDTH - 2 * MARGIN + GAP) / count.max(1);
    (room.saturating_sub(GAP) / width.max(1)).clamp(1, 8)
}

/// One row of frames over the picture's width; returns its height.
fn strip(
    canvas: &mut Canvas,
    top: usize,
    frames: &[&RgbImage],
    found_box: Option<(usize, [f64; 4])>,
) -> usize {
    let Some(first) = frames.first() else { return 0 };
    let zoom = zoom(first.width, frames.len());
    for (i, frame) in frames.iter().enumerate() {
        let x = MARGIN + i * (frame.width * zoom + GAP);
        canvas.blit(x as i64, top as i64, &frame.data, frame.width, zoom);
        if let Some((at, [x0, y0, x1, y1])) = found_box
            && at == i
        {
            let px = |v: f64| (v * zoom as f64) as i64;
            let (left, right) = (x as i64 + px(x0), x as i64 + px(x1));
            let (upper, lower) = (top as i64 + px(y0), top as i64 + px(y1));
            for (a, b) in [
                ((left, upper), (right, upper)),
                ((right, upper), (right, lower)),
                ((right, lower), (left, lower)),
                ((left, lower), (left, upper)),
            ] {
                canvas.line((a.0 as f32, a.1 as f32), (b.0 as f32, b.1 as f32), 3.0, [255, 214, 10]);
            }
        }
    }
    first.height * zoom
}

/// Draws it.
pub fn draw(p: &Picture<'_>) -> Option<RgbImage> {
    let map_side = 600;
    let row = |frames: &[RgbImage], count: usize| match frames.first() {
        Some(first) if count > 0 => zoom(first.width, count) * first.height,
        _ => 40,
    };
    let (remembered, imagined) = (row(p.context, p.context.len()), row(p.imagined, p.imagined.len() / 4));
    let height = 72 + 26 + remembered + 18 + 26 + imagined + 22 + map_side + MARGIN;
    let mut canvas = Canvas::new(WIDTH, height, PAPER);
    let left = MARGIN as i64;
    canvas.text(left, 22, &format!("\"{}\"", p.goal), 3, INK);
    let mut top = 72;
    canvas.text(left, top as i64, "what the robot remembers (the frames it chose)", 2, SOFT);
    top += 26;
    let context: Vec<&RgbImage> = p.context.iter().collect();
    top += strip(&mut canvas, top, &context, None) + 18;
    canvas.text(left, top as i64, "what it imagines on the way, with the box around the goal", 2, SOFT);
    top += 26;
    let imagined: Vec<&RgbImage> = p.imagined.iter().skip(3).step_by(4).collect();
    if imagined.is_empty() {
        canvas.text(left, top as i64, "(nothing was imagined)", 2, SOFT);
        top += 40;
    } else {
        let last = imagined.len() - 1;
        top += strip(&mut canvas, top, &imagined, p.found_box.map(|b| (last, b))) + 22;
    }

    let view = MapView::fit(p.house, map_side, map_side);
    let mut map = Canvas::new(map_side, map_side, PAPER);
    top_down(p.house, &view, &mut map);
    let convert = |poses: &[Pose2]| poses.iter().copied().map(world).collect::<Vec<_>>();
    draw_path(&view, &mut map, &convert(p.driven), 0, DRIVEN);
    draw_path(&view, &mut map, &convert(p.path), 1, IMAGINED);
    draw_robot(&view, &mut map, world(p.asked_at), DRIVEN);
    if let Some(truth) = p.truth {
        draw_pose(&view, &mut map, world(truth), 0.45, TRUTH);
    }
    if let Some(answer) = p.answer {
        draw_pose(&view, &mut map, world(answer), 0.45, IMAGINED);
    }
    if let Some((x, y)) = p.object {
        map.circle(view.pixel(x, y), view.length(0.22), 3.0, IMAGINED);
    }
    canvas.blit(left, top as i64, &map.rgb, map_side, 1);

    let x = left + map_side as i64 + 28;
    let mut y = top as i64;
    for line in p.lines {
        canvas.text(x, y, line, 2, INK);
        y += 26;
    }
    y += 10;
    for (text, colour) in [
        ("imagined path, answer and object", IMAGINED),
        ("true goal pose", TRUTH),
        ("driven path, robot when it asked", DRIVEN),
    ] {
        canvas.fill_rect(x, y + 4, 22, 8, colour);
        canvas.text(x + 32, y, text, 2, SOFT);
        y += 26;
    }
    if let Some(arrival) = p.arrival {
        y += 14;
        canvas.text(x, y, "what it really sees there", 2, SOFT);
        y += 26;
        canvas.blit(x, y, &arrival.data, arrival.width, 1);
    }
    RgbImage::from_rgb(canvas.width, canvas.height, canvas.rgb)
}
