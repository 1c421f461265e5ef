//! The top-down map picture.

use crate::draw::{Canvas, text_width};
use crate::geom::Pose2;
use crate::house::{Door, FloorPattern, House, Object, ROBOT_RADIUS_M, Rect, Room, Shape, WALL_THICKNESS_M};

/// Places on a map picture: map x to the right, map y up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MapView {
    /// Pixels per metre.
    pub px_per_m: f64,
    /// Pixel of the map's origin.
    pub origin_px: (f64, f64),
    /// The picture's width (pixels).
    pub width: usize,
    /// The picture's height (pixels).
    pub height: usize,
}

impl MapView {
    /// A view that shows the whole house, centred, in a picture of this size.
    #[must_use]
    pub fn fit(house: &House, width: usize, height: usize) -> Self {
        const EDGE_M: f64 = 0.35;
        let b = &house.bounds;
        let scale_x = width as f64 / (b.width() + 2.0 * EDGE_M);
        let scale_y = height as f64 / (b.depth() + 2.0 * EDGE_M);
        let px_per_m = scale_x.min(scale_y);
        let (cx, cy) = b.centre();
        Self {
            px_per_m,
            origin_px: (width as f64 * 0.5 - cx * px_per_m, height as f64 * 0.5 + cy * px_per_m),
            width,
            height,
        }
    }

    /// The pixel of a map point.
    #[must_use]
    pub fn pixel(&self, x: f64, y: f64) -> (f32, f32) {
        ((self.origin_px.0 + x * self.px_per_m) as f32, (self.origin_px.1 - y * self.px_per_m) as f32)
    }

    /// The map point of a pixel.
    #[must_use]
    pub fn point(&self, px: f64, py: f64) -> (f64, f64) {
        ((px - self.origin_px.0) / self.px_per_m, (self.origin_px.1 - py) / self.px_per_m)
    }

    /// Pixels of a length in metres.
    #[must_use]
    pub fn length(&self, metres: f64) -> f32 {
        (metres * self.px_per_m) as f32
    }
}

/// Draws the house from above: floors, walls, doors, and the objects with their names. The canvas should have the
/// view's size. Names are as large as the scale allows.
pub fn top_down(house: &House, view: &MapView, canvas: &mut Canvas) {
    top_down_named(house, view, canvas, if view.px_per_m >= 110.0 { 2 } else { 1 });
}

/// Colour of walls and of names.
const INK: [u8; 3] = [52, 54, 62];

/// As [`top_down`], with names enlarged by `zoom` (see [`Canvas::text`]).
pub fn top_down_named(house: &House, view: &MapView, canvas: &mut Canvas, zoom: usize) {
    canvas.fill_rect(0, 0, canvas.width, canvas.height, [250, 249, 246]);
    let b = &house.bounds;
    let wall = WALL_THICKNESS_M;
    let outer = Rect { x0: b.x0 - wall, y0: b.y0 - wall, x1: b.x1 + wall, y1: b.y1 + wall };
    fill(view, canvas, &outer, INK);
    for room in &house.rooms {
        draw_room(house, room, view, canvas);
    }
    for door in &house.doors {
        draw_door(door, view, canvas);
    }
    for object in &house.objects {
        draw_object(house, object, view, canvas);
    }
    // Names last, above everything.
    for object in &house.objects {
        draw_name(object, view, canvas, zoom);
    }
}

/// The floor with its pattern, and a band along each wall in the wall's colour.
fn draw_room(house: &House, room: &Room, view: &MapView, canvas: &mut Canvas) {
    let [light, dark] = house.palette.floors[room.floor_colour % house.palette.floors.len()];
    let pale = |c: [u8; 3]| c.map(|v| (f32::from(v) * 0.45 + 255.0 * 0.55) as u8);
    let half =
        |c: [u8; 3], d: [u8; 3]| [0, 1, 2].map(|k| ((u16::from(c[k]) * 3 + u16::from(d[k])) / 4) as u8);
    let (light, dark) = (pale(light), half(pale(light), pale(dark)));
    let r = &room.rect;
    let (p, q) = (view.pixel(r.x0, r.y1), view.pixel(r.x1, r.y0));
    for y in p.1.round() as i64..q.1.round() as i64 {
        for x in p.0.round() as i64..q.0.round() as i64 {
            let (mx, my) = view.point(x as f64 + 0.5, y as f64 + 0.5);
            let k = room.floor_period_m;
            let odd = match room.floor_pattern {
                FloorPattern::Checker => ((mx / k).floor() + (my / k).floor()).rem_euclid(2.0) > 0.5,
                FloorPattern::Planks => (my / k).floor().rem_euclid(2.0) > 0.5,
                FloorPattern::Tiles => (mx / k).rem_euclid(1.0) < 0.05 || (my / k).rem_euclid(1.0) < 0.05,
            };
            canvas.put(x, y, if odd { dark } else { light });
        }
    }
    // A band in each wall's colour.
    let band = 0.07;
    let sides = [
        Rect { x0: r.x1 - band, ..*r },
        Rect { y0: r.y1 - band, ..*r },
        Rect { x1: r.x0 + band, ..*r },
        Rect { y1: r.y0 + band, ..*r },
    ];
    for (side, area) in sides.iter().enumerate() {
        let colour = house.palette.walls[room.wall_colour[side] % house.palette.walls.len()];
        fill(view, canvas, area, colour);
    }
}

fn draw_door(d: &Door, view: &MapView, canvas: &mut Canvas) {
    let wall = WALL_THICKNESS_M;
    let (hx, hy) =
        if d.along_x { (wall * 0.5 + 0.07, d.width_m * 0.5) } else { (d.width_m * 0.5, wall * 0.5 + 0.07) };
    fill(view, canvas, &Rect { x0: d.x - hx, y0: d.y - hy, x1: d.x + hx, y1: d.y + hy }, [226, 218, 204]);
}

/// An object as it looks from above.
fn draw_object(house: &House, o: &Object, view: &MapView, canvas: &mut Canvas) {
    let colour = house.palette.objects[o.colour.index()];
    let dark = colour.map(|c| (f32::from(c) * 0.6) as u8);
    let (s, c) = o.yaw.sin_cos();
    let at = |lx: f64, ly: f64| view.pixel(o.x + c * lx - s * ly, o.y + s * lx + c * ly);
    let shadow = view.pixel(o.x + 0.05, o.y - 0.05);
    canvas.disc_cover(shadow, view.length(o.radius), [40, 36, 32], 0.14);
    let quad = |x0: f64, y0: f64, x1: f64, y1: f64| [at(x0, y0), at(x1, y0), at(x1, y1), at(x0, y1)];
    let (hx, hy) = (o.size[0] * 0.5, o.size[1] * 0.5);
    match o.shape {
        Shape::Ball | Shape::Lamp | Shape::Plant => {
            canvas.disc(at(0.0, 0.0), view.length(hx), dark);
            canvas.disc(at(0.0, 0.0), view.length(hx * 0.86), colour);
            match o.shape {
                Shape::Lamp => canvas.disc(at(0.0, 0.0), view.length(hx * 0.4), [246, 240, 214]),
                Shape::Plant => {
                    for k in 0..5 {
                        let a = f64::from(k) * std::f64::consts::TAU / 5.0;
                        let place = at(hx * 0.5 * a.cos(), hx * 0.5 * a.sin());
                        canvas.circle(place, view.length(hx * 0.34), 1.0, dark);
                    }
                }
                _ => canvas.disc_cover(at(hx * 0.1, hx * 0.3), view.length(hx * 0.25), [255; 3], 0.6),
            }
        }
        Shape::Cone => {
            canvas.polygon(&quad(-hx, -hy, hx, hy), dark);
            canvas.disc(at(0.0, 0.0), view.length(hx * 0.85), colour);
            canvas.disc(at(0.0, 0.0), view.length(hx * 0.55), [236, 234, 228]);
            canvas.disc(at(0.0, 0.0), view.length(hx * 0.42), colour);
        }
        _ => {
            canvas.polygon(&quad(-hx, -hy, hx, hy), dark);
            let inset = 0.03;
            canvas.polygon(&quad(-hx + inset, -hy + inset, hx - inset, hy - inset), colour);
            match o.shape {
                Shape::Chair => canvas.polygon(&quad(-hx, -hy, -hx + 0.08, hy), dark),
                Shape::Bed => {
                    canvas.polygon(&quad(-hx + 0.08, -hy * 0.7, -hx + 0.26, hy * 0.7), [244, 243, 238]);
                }
                _ => {}
            }
        }
    }
}

/// An object's name below it, or above it at the picture's lower edge.
fn draw_name(o: &Object, view: &MapView, canvas: &mut Canvas, zoom: usize) {
    let (x, y) = view.pixel(o.x, o.y);
    let width = text_width(&o.name, zoom) as i64;
    let below = (y + view.length(o.radius) + 3.0) as i64;
    let left = (x as i64 - width / 2).clamp(2, (canvas.width as i64 - width - 2).max(2));
    let top = if below + 9 * zoom as i64 > canvas.height as i64 {
        (y - view.length(o.radius)) as i64 - 10 * zoom as i64
    } else {
        below
    };
    canvas.fill_rect_cover(left - 2, top - 2, width as usize + 3, 9 * zoom, [255; 3], 0.72);
    canvas.text(left, top, &o.name, zoom, INK);
}

fn fill(view: &MapView, canvas: &mut Canvas, area: &Rect, colour: [u8; 3]) {
    let (p, q) = (view.pixel(area.x0, area.y1), view.pixel(area.x1, area.y0));
    let (x, y) = (p.0.round() as i64, p.1.round() as i64);
    let size = |a: f32, b: f32| (b.round() - a.round()).max(0.0) as usize;
    canvas.fill_rect(x, y, size(p.0, q.0), size(p.1, q.1), colour);
}

/// Draws a robot: a disc of the robot's size with its heading.
pub fn draw_robot(view: &MapView, canvas: &mut Canvas, pose: Pose2, colour: [u8; 3]) {
    let at = view.pixel(pose.x, pose.y);
    let r = view.length(ROBOT_RADIUS_M);
    canvas.disc(at, r, colour.map(|c| c / 2));
    canvas.disc(at, (r - 2.0).max(1.0), colour);
    let (s, c) = pose.yaw.sin_cos();
    let nose = view.pixel(pose.x + c * ROBOT_RADIUS_M * 0.95, pose.y + s * ROBOT_RADIUS_M * 0.95);
    canvas.line(at, nose, (r * 0.25).max(1.5), [255; 3]);
}

/// Draws a pose as an arrow of some length (m) from its position.
pub fn draw_pose(view: &MapView, canvas: &mut Canvas, pose: Pose2, length_m: f64, colour: [u8; 3]) {
    let (s, c) = pose.yaw.sin_cos();
    let tip = view.pixel(pose.x + c * length_m, pose.y + s * length_m);
    canvas.arrow(view.pixel(pose.x, pose.y), tip, (view.length(0.035)).max(1.5), colour);
}

/// Draws a path of poses as a line with a heading tick at every `tick`-th pose (0 for none).
pub fn draw_path(view: &MapView, canvas: &mut Canvas, poses: &[Pose2], tick: usize, colour: [u8; 3]) {
    let points: Vec<(f32, f32)> = poses.iter().map(|p| view.pixel(p.x, p.y)).collect();
    canvas.polyline(&points, view.length(0.03).max(1.5), colour);
    if tick > 0 {
        for pose in poses.iter().step_by(tick) {
            let (s, c) = pose.yaw.sin_cos();
            let end = view.pixel(pose.x + 0.14 * c, pose.y + 0.14 * s);
            canvas.line(view.pixel(pose.x, pose.y), end, view.length(0.02).max(1.0), colour);
            canvas.disc(view.pixel(pose.x, pose.y), view.length(0.03).max(1.5), colour);
        }
    }
}

/// Draws the camera's field of view as a translucent wedge of some length (m).
pub fn draw_view(
    view: &MapView,
    canvas: &mut Canvas,
    pose: Pose2,
    hfov_rad: f64,
    length_m: f64,
    colour: [u8; 3],
) {
    let edge = |a: f64| {
        view.pixel(pose.x + length_m * (pose.yaw + a).cos(), pose.y + length_m * (pose.yaw + a).sin())
    };
    let points = [view.pixel(pose.x, pose.y), edge(-hfov_rad * 0.5), edge(0.0), edge(hfov_rad * 0.5)];
    canvas.polygon_cover(&points, colour, 0.22);
}
