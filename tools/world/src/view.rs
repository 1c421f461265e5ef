//! What a camera sees of one object: its box and how much of it is visible.

use crate::drive::random_pose;
use crate::geom::{Camera, Pose2, wrap_angle};
use crate::house::House;
use crate::render::{Frame, Grid, RenderOptions, render_with};
use mindseye_base::random::Rng;

/// Samples per pixel side of box measurements: about 192 columns, from 3 to 8.
fn fineness(camera: &Camera) -> usize {
    192usize.div_ceil(camera.width.max(1)).clamp(3, 8)
}

/// The bounding box of the visible part of an object in continuous pixels `[x0, y0, x1, y1]` (see [`Camera`]), with
/// everything that hides it taken into account; none when nothing of it is seen. Measured with 3 to 8
/// samples per pixel side, about 192 columns where that is enough.
#[must_use]
pub fn project_box(house: &House, pose: Pose2, camera: &Camera, object_index: usize) -> Option<[f32; 4]> {
    project_box_in(house, pose, camera, object_index, &mut Frame::new())
}

/// [`project_box`] with the caller's frame as working memory (its pictures are left as they are).
#[must_use]
pub fn project_box_in(
    house: &House,
    pose: Pose2,
    camera: &Camera,
    object_index: usize,
    frame: &mut Frame,
) -> Option<[f32; 4]> {
    if object_index >= house.objects.len() || camera.width == 0 || camera.height == 0 {
        return None;
    }
    let ss = fineness(camera);
    let grid = Grid::new(camera, ss, 1.0);
    frame.trace(house, pose, camera, &grid, None);
    let wanted = (object_index + 1).min(255) as u8;
    let (mut x0, mut y0, mut x1, mut y1) = (usize::MAX, usize::MAX, 0, 0);
    for (j, row) in frame.code.chunks_exact(grid.nx).enumerate() {
        for (i, c) in row.iter().enumerate() {
            if frame.scene.instance(*c) == wanted {
                x0 = x0.min(i);
                x1 = x1.max(i + 1);
                y0 = y0.min(j);
                y1 = y1.max(j + 1);
            }
        }
    }
    let k = 1.0 / ss as f32;
    (x1 > 0).then_some([x0 as f32 * k, y0 as f32 * k, x1 as f32 * k, y1 as f32 * k])
}

/// How much of an object's silhouette is visible, 0 to 1: the part of it inside the image and not hidden, over all
/// of it. The silhouette is measured on an image twice as wide and high; what lies outside even that is ignored.
#[must_use]
pub fn visible_fraction(house: &House, pose: Pose2, camera: &Camera, object_index: usize) -> f32 {
    if object_index >= house.objects.len() || camera.width == 0 || camera.height == 0 {
        return 0.0;
    }
    let mut frame = Frame::new();
    let ss = fineness(camera).min(4);
    let wanted = (object_index + 1).min(255) as u8;
    let count = |frame: &Frame| frame.code.iter().filter(|c| frame.scene.instance(**c) == wanted).count();
    frame.trace(house, pose, camera, &Grid::new(camera, ss, 2.0), Some(object_index));
    let whole = frame.w.iter().zip(&frame.code).filter(|(w, _)| **w > 0.0).count();
    if whole == 0 {
        return 0.0;
    }
    frame.trace(house, pose, camera, &Grid::new(camera, ss, 1.0), None);
    (count(&frame) as f32 / whole as f32).min(1.0)
}

/// Draws the outline of a box (continuous pixels) one pixel wide into an RGB image of `width` pixels per row. The
/// paper's red is `[255, 0, 0]`. Boxes that stick out are cut at the image's edge.
pub fn draw_box(rgb: &mut [u8], width: usize, area: [f32; 4], colour: [u8; 3]) {
    if width == 0 {
        return;
    }
    let height = rgb.len() / (3 * width);
    if height == 0 || area.iter().any(|v| !v.is_finite()) {
        return;
    }
    let first = |v: f32, n: usize| (v.floor().max(0.0) as usize).min(n - 1);
    let last = |v: f32, n: usize| ((v.ceil() - 1.0).max(0.0) as usize).min(n - 1);
    let (x0, y0) = (first(area[0], width), first(area[1], height));
    let (x1, y1) = (last(area[2], width).max(x0), last(area[3], height).max(y0));
    let mut put = |x: usize, y: usize| {
        let at = (y * width + x) * 3;
        rgb[at..at + 3].copy_from_slice(&colour);
    };
    for x in x0..=x1 {
        put(x, y0);
        put(x, y1);
    }
    for y in y0..=y1 {
        put(x0, y);
        put(x1, y);
    }
}

/// A free pose with a good view: of 96 poses tried, the one that shows the most different objects at a fair size.
/// The same house and camera give the same pose.
#[must_use]
pub fn scenic_pose(house: &House, camera: &Camera) -> Pose2 {
    let mut rng = Rng::new(house.seed ^ 0x5ce1_71c5);
    let small = Camera {
        width: 48,
        height: (48 * camera.height).div_ceil(camera.width.max(1)).clamp(8, 96),
        ..*camera
    };
    let options = RenderOptions { rgb: false, depth: false, ids: true, ..RenderOptions::default() };
    let mut frame = Frame::new();
    let mut best = (f64::NEG_INFINITY, Pose2::default());
    for _ in 0..96 {
        let mut pose = random_pose(house, &mut rng);
        // Rather across the room than into a wall.
        let (x, y) = house.rooms[house.room_at(pose.x, pose.y).unwrap_or(0)].rect.centre();
        if pose.distance(Pose2::unwrapped(x, y, 0.0)) > 0.5 {
            pose.yaw = wrap_angle(pose.bearing_to(x, y) + rng.range(-0.5, 0.5));
        }
        render_with(house, pose, &small, options, &mut frame);
        let mut pixels = vec![0usize; house.objects.len() + 1];
        for id in &frame.ids {
            if let Some(n) = pixels.get_mut(usize::from(*id)) {
                *n += 1;
            }
        }
        let total = frame.ids.len() as f64;
        // Each object counts up to 2 % of the picture; one that fills more than a tenth is in the way.
        let score: f64 = pixels[1..]
            .iter()
            .map(|n| *n as f64 / total)
            .map(|k| (k / 0.02).min(1.0).sqrt() - (k - 0.1).max(0.0) * 6.0)
            .sum();
        if score > best.0 {
            best = (score, pose);
        }
    }
    best.1
}
