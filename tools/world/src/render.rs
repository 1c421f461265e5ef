//! The software renderer: a hybrid of scan conversion (planes) and ray casting (round solids).
//!
//! Visibility works on inverse planar depth `w = 1 / z`, which is an affine function of the image coordinates on
//! every plane, so that floors, walls and box faces need no division per sample. Shading happens once per sample,
//! for the nearest surface only.

use crate::decor::{self, Decor, Hung};
use crate::furniture::{Model, Paint, cross, dot, sub};
use crate::geom::{Camera, Pose2};
use crate::house::{CEILING_M, FloorPattern, House, Palette, SHADE_CELL_M, Solid, Tint, WallPattern};

/// How samples are lit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quality {
    /// Fixed light and stored contact shadows: what training and the simulated robot's camera use.
    #[default]
    Fast,
    /// A ceiling lamp in each room with soft shadows: for pictures.
    Fine,
}

/// What [`render_with`] computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderOptions {
    /// Colour samples per pixel side, 1 to 8.
    pub supersample: usize,
    /// Fill [`Frame::rgb`].
    pub rgb: bool,
    /// Fill [`Frame::depth`].
    pub depth: bool,
    /// Fill [`Frame::ids`].
    pub ids: bool,
    /// How samples are lit.
    pub quality: Quality,
    /// In fast light: grain on every surface, so that pictures of some hundred pixels have features everywhere. What is
    /// rendered without it is the same to the bit.
    pub grain: bool,
}

impl Default for RenderOptions {
    /// 2x2 supersampling, colour, depth and ids, fast light.
    fn default() -> Self {
        Self { supersample: 2, rgb: true, depth: true, ids: true, quality: Quality::Fast, grain: false }
    }
}

impl RenderOptions {
    /// Colour only.
    #[must_use]
    pub fn rgb_only() -> Self {
        Self { depth: false, ids: false, ..Self::default() }
    }

    /// Colour and instance ids.
    #[must_use]
    pub fn rgb_ids() -> Self {
        Self { depth: false, ..Self::default() }
    }

    /// Colour only, 3x3 supersampling, soft shadows.
    #[must_use]
    pub fn picture() -> Self {
        Self { supersample: 3, quality: Quality::Fine, ..Self::rgb_only() }
    }
}

/// A rendered image with its working memory. Reuse one frame: rendering then allocates nothing.
#[derive(Debug, Clone, Default)]
pub struct Frame {
    /// Width (pixels).
    pub width: usize,
    /// Height (pixels).
    pub height: usize,
    /// `height x width x 3`, sRGB.
    pub rgb: Vec<u8>,
    /// `height x width`: planar depth along the optical axis at the pixels' centres (m). Empty if not asked for.
    pub depth: Vec<f32>,
    /// `height x width`: 0 = structure, `1 + k` = object `k`, at the pixels' centres. Empty if not asked for.
    pub ids: Vec<u8>,
    pub(crate) w: Vec<f32>,
    pub(crate) code: Vec<u32>,
    acc: Vec<f32>,
    pub(crate) scene: Scene,
}

impl Frame {
    /// An empty frame; the first rendering gives it its size.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills the working buffers with what is visible, and leaves the pictures alone.
    pub(crate) fn trace(
        &mut self,
        house: &House,
        pose: Pose2,
        camera: &Camera,
        grid: &Grid,
        only: Option<usize>,
    ) {
        self.scene.prepare(house, &camera.map_from_camera(pose));
        self.scene.trace(house, grid, only, &mut self.w, &mut self.code);
    }
}

/// Renders colour (2x2 supersampled), depth and ids of what the camera sees from a base at `pose` (map frame).
///
/// The camera must be inside the house: poses in walls or outside give meaningless pictures, but no panic.
pub fn render(house: &House, pose: Pose2, camera: &Camera, frame: &mut Frame) {
    render_with(house, pose, camera, RenderOptions::default(), frame);
}

/// [`render`] with options. What is not asked for is left empty.
pub fn render_with(house: &House, pose: Pose2, camera: &Camera, options: RenderOptions, frame: &mut Frame) {
    render_from(house, &camera.map_from_camera(pose), camera, options, frame);
}

/// [`render_with`] for a camera anywhere in space: `map_from_camera` (optical frame) is a row-major rotation and a
/// translation (m); of `camera` only the image and the field of view count.
pub fn render_from(
    house: &House,
    map_from_camera: &([[f64; 3]; 3], [f64; 3]),
    camera: &Camera,
    options: RenderOptions,
    frame: &mut Frame,
) {
    frame.width = camera.width;
    frame.height = camera.height;
    frame.rgb.clear();
    frame.depth.clear();
    frame.ids.clear();
    if camera.width == 0 || camera.height == 0 {
        return;
    }
    let mut scene = std::mem::take(&mut frame.scene);
    scene.prepare(house, map_from_camera);
    if options.depth || options.ids {
        let grid = Grid::new(camera, 1, 1.0);
        scene.trace(house, &grid, None, &mut frame.w, &mut frame.code);
        if options.depth {
            frame.depth.extend(frame.w.iter().map(|w| 1.0 / w));
        }
        if options.ids {
            frame.ids.extend(frame.code.iter().map(|c| scene.instance(*c)));
        }
    }
    if options.rgb {
        let ss = options.supersample.clamp(1, 8);
        let grid = Grid::new(camera, ss, 1.0);
        scene.trace(house, &grid, None, &mut frame.w, &mut frame.code);
        frame.rgb.reserve(camera.width * camera.height * 3);
        let scale = 1.0 / (ss * ss) as f32;
        let rows = frame.w.chunks_exact(grid.nx * ss).zip(frame.code.chunks_exact(grid.nx * ss));
        for (row, (w, code)) in rows.enumerate() {
            if let (Some(decor), Quality::Fast) = (&house.decor, options.quality) {
                let samples = Samples { grid: &grid, ss, w, code };
                scene.shade_row_furnished(house, decor, &samples, row, options.grain, &mut frame.rgb);
                continue;
            }
            if options.grain && options.quality == Quality::Fast {
                scene.shade_row_grained(house, &Samples { grid: &grid, ss, w, code }, row, &mut frame.rgb);
                continue;
            }
            if options.quality == Quality::Fast {
                scene.shade_row(house, &Samples { grid: &grid, ss, w, code }, row, &mut frame.rgb);
                continue;
            }
            frame.acc.clear();
            frame.acc.resize(camera.width * 3, 0.0);
            for sub in 0..ss {
                let (w, code) = (&w[sub * grid.nx..][..grid.nx], &code[sub * grid.nx..][..grid.nx]);
                let samples = Samples { grid: &grid, ss, w, code };
                scene.shade_row_fine(house, &samples, row * ss + sub, &mut frame.acc);
            }
            frame.rgb.extend(frame.acc.iter().map(|v| (v * scale + 0.5) as u8));
        }
    }
    frame.scene = scene;
}

/// The samples' places on the image plane: `u = u0 + i du`, `v = v0 + j du` (tangents, right and down).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) nx: usize,
    pub(crate) ny: usize,
    u0: f32,
    v0: f32,
    du: f32,
}

impl Grid {
    /// `zoom_out` widens the image about its centre without changing the samples' spacing.
    pub(crate) fn new(camera: &Camera, ss: usize, zoom_out: f64) -> Self {
        let nx = ((camera.width as f64 * zoom_out).round() as usize).max(1) * ss;
        let ny = ((camera.height as f64 * zoom_out).round() as usize).max(1) * ss;
        let du = 1.0 / (camera.focal_px() * ss as f64);
        Self {
            nx,
            ny,
            u0: ((0.5 - nx as f64 * 0.5) * du) as f32,
            v0: ((0.5 - ny as f64 * 0.5) * du) as f32,
            du: du as f32,
        }
    }
}

/// Traced samples of one row: inverse depths and surface codes, `ss` per pixel side.
#[derive(Clone, Copy)]
struct Samples<'a> {
    grid: &'a Grid,
    ss: usize,
    w: &'a [f32],
    code: &'a [u32],
}

/// A camera's place and axes in some frame.
#[derive(Debug, Clone, Copy, Default)]
struct Eye {
    o: [f32; 3],
    f: [f32; 3],
    r: [f32; 3],
    d: [f32; 3],
}

#[derive(Debug, Clone, Copy)]
struct FlatPart {
    solid: Solid,
    object: usize,
    albedo: [f32; 3],
}

#[derive(Debug, Clone, Copy)]
struct RoomLook {
    x: [f32; 2],
    y: [f32; 2],
    walls: [[f32; 3]; 4],
    patterns: [WallPattern; 4],
    floor: [[f32; 3]; 2],
    floor_pattern: FloorPattern,
    period: f32,
}

/// What rendering one frame needs of the house, in f32 and flat.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scene {
    eye: Eye,
    /// Eye in each object's frame, and cos and sin of the object's yaw.
    local: Vec<(Eye, f32, f32)>,
    /// Fast light on each object's six upright faces (order of `FACE_NORMALS`).
    face_light: Vec<[f32; 6]>,
    parts: Vec<FlatPart>,
    rooms: Vec<RoomLook>,
    part_base: u32,
    ceiling: [f32; 3],
    frame_colour: [f32; 3],
    origin: [f32; 2],
    meshes: Vec<Mesh>,
    triangles: Vec<Seen>,
    /// Places of a mesh's vertices in the camera's frame.
    vertices: Vec<[f32; 3]>,
    sunny: Vec<decor::Sunny>,
    /// Where the panels of each room's sides begin and end.
    hung: Vec<[u32; 2]>,
}

/// A piece of furniture in a scene.
#[derive(Debug, Clone, Copy)]
struct Mesh {
    object: usize,
    model: &'static Model,
    /// The object's colour, and the direction to the light in its own frame.
    colour: [f32; 3],
    light: [f32; 3],
    /// First of its triangles in [`Scene::triangles`], and the one after its last.
    triangles: [u32; 2],
}

/// A triangle before the camera. Along the ray `(u, v, 1)` it is met where three functions, affine in u and v, are not
/// negative; their sum is the inverse depth, their shares of it the barycentric weights (Olano and Greer 1997).
#[derive(Debug, Clone, Copy)]
struct Seen {
    edges: [[f32; 3]; 3],
    /// Smallest and largest u, then v.
    u: [f32; 2],
    v: [f32; 2],
    mesh: u32,
    index: u32,
    /// -1 where the camera is behind it.
    facing: f32,
}

/// Codes from here on are triangles.
const MESH_BASE: u32 = 1 << 31;
/// Nearest distance at which a triangle's outline is projected (m).
const NEAR_M: f32 = 0.02;

const WALL_BASE: u32 = 8;
/// Sizes of the spots of grain (m), and how much each of them does.
const GRAINS_M: [f32; 6] = [0.4, 0.2, 0.1, 0.05, 0.025, 0.0125];
const GRAIN_GAIN: f32 = 0.45;
/// Structure is lit by the direction of its normal alone: east, north, west, south walls.
const WALL_LIGHT: [f32; 4] = [0.88, 0.95, 1.0, 0.92];
const LIGHT: [f32; 3] = [0.362, 0.259, 0.895];

fn rgb(c: [u8; 3]) -> [f32; 3] {
    c.map(f32::from)
}

fn mix(a: [f32; 3], b: [f32; 3], k: f32) -> [f32; 3] {
    [a[0] + (b[0] - a[0]) * k, a[1] + (b[1] - a[1]) * k, a[2] + (b[2] - a[2]) * k]
}

fn scale(a: [f32; 3], k: f32) -> [f32; 3] {
    [a[0] * k, a[1] * k, a[2] * k]
}

/// Largest integer not above `x`, for |x| < 60000.
fn floor_i(x: f32) -> i32 {
    (x + 65536.0) as i32 - 65536
}

fn hash(a: i32, b: i32) -> f32 {
    let mut h = (a as u32).wrapping_mul(0x9e37_79b1) ^ (b as u32).wrapping_mul(0x85eb_ca6b);
    h ^= h >> 15;
    h = h.wrapping_mul(0x2c1b_3c6d);
    h ^= h >> 12;
    (h & 0xffff) as f32 * (1.0 / 65536.0)
}

/// Smooth noise in space, 0 to 1.
fn noise(p: [f32; 3], size: f32, salt: i32) -> f32 {
    let at = p.map(|v| v / size);
    let cell = at.map(floor_i);
    let ease = |k: usize| {
        let f = at[k] - cell[k] as f32;
        f * f * (3.0 - 2.0 * f)
    };
    let e = [ease(0), ease(1), ease(2)];
    let corner = |i: i32, j: i32, k: i32| {
        hash(
            (cell[0] + i).wrapping_mul(73_856_093) ^ (cell[1] + j).wrapping_mul(19_349_663),
            (cell[2] + k) ^ salt,
        )
    };
    let along = |j, k| corner(0, j, k) + (corner(1, j, k) - corner(0, j, k)) * e[0];
    let across = |k| along(0, k) + (along(1, k) - along(0, k)) * e[1];
    across(0) + (across(1) - across(0)) * e[2]
}

fn tinted(palette: &Palette, colour: usize, tint: Tint) -> [f32; 3] {
    let main = rgb(palette.objects[colour]);
    match tint {
        Tint::Main => main,
        Tint::Light => mix(main, [255.0; 3], 0.45),
        Tint::Dark => scale(main, 0.72),
        Tint::Neutral(i) => rgb(palette.neutral[i]),
    }
}

impl Scene {
    pub(crate) fn prepare(&mut self, house: &House, (m, t): &([[f64; 3]; 3], [f64; 3])) {
        let axis = |k: usize| [m[0][k] as f32, m[1][k] as f32, m[2][k] as f32];
        self.eye = Eye { o: t.map(|v| v as f32), f: axis(2), r: axis(0), d: axis(1) };
        self.part_base = WALL_BASE + 6 * house.walls.len() as u32;
        self.local.clear();
        self.face_light.clear();
        self.parts.clear();
        self.rooms.clear();
        for (k, o) in house.objects.iter().enumerate() {
            let (s, c) = o.yaw.sin_cos();
            let (s, c) = (s as f32, c as f32);
            let turn = |v: [f32; 3]| [c * v[0] + s * v[1], c * v[1] - s * v[0], v[2]];
            let e = &self.eye;
            let local = Eye {
                o: turn([e.o[0] - o.x as f32, e.o[1] - o.y as f32, e.o[2]]),
                f: turn(e.f),
                r: turn(e.r),
                d: turn(e.d),
            };
            self.local.push((local, c, s));
            self.face_light
                .push(FACE_NORMALS.map(|n| object_light([c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]])));
            for p in &o.parts {
                let albedo = tinted(&house.palette, o.colour.index(), p.tint);
                self.parts.push(FlatPart { solid: p.solid, object: k, albedo });
            }
        }
        for room in &house.rooms {
            let r = &room.rect;
            self.rooms.push(RoomLook {
                x: [r.x0 as f32, r.x1 as f32],
                y: [r.y0 as f32, r.y1 as f32],
                walls: room.wall_colour.map(|c| rgb(house.palette.walls[c % house.palette.walls.len()])),
                patterns: room.wall_pattern,
                floor: house.palette.floors[room.floor_colour % house.palette.floors.len()].map(rgb),
                floor_pattern: room.floor_pattern,
                period: room.floor_period_m as f32,
            });
        }
        self.prepare_meshes(house);
        self.sunny.clear();
        self.hung.clear();
        if let Some(decor) = &house.decor {
            self.sunny.extend(decor.sunny(&house.rooms));
            let mut at = 0u32;
            for place in 0..4 * house.rooms.len() {
                let more = decor.panels[at as usize..].iter().take_while(|p| 4 * p.room + p.side == place);
                let end = at + more.count() as u32;
                self.hung.push([at, end]);
                at = end;
            }
        }
        self.ceiling = rgb(house.palette.neutral[4]);
        self.frame_colour = rgb(house.palette.neutral[5]);
        self.origin = [house.bounds.x0 as f32, house.bounds.y0 as f32];
    }

    /// Triangles of the furniture that is not behind the camera.
    fn prepare_meshes(&mut self, house: &House) {
        self.meshes.clear();
        self.triangles.clear();
        for (object, o) in house.objects.iter().enumerate() {
            let Some((model, scale)) = o.mesh else { continue };
            let (e, c, s) = self.local[object];
            let rel = [-e.o[0], -e.o[1], o.z as f32 - e.o[2]];
            if dot(rel, e.f) < -(o.radius.hypot(o.size[2] * 0.5) as f32) {
                continue;
            }
            let turn = |v: [f32; 3]| [c * v[0] + s * v[1], c * v[1] - s * v[0], v[2]];
            let first = self.triangles.len() as u32;
            self.vertices.clear();
            self.vertices.extend(model.points.iter().map(|p| {
                let p = sub(p.map(|x| x * scale), e.o);
                [dot(p, e.r), dot(p, e.d), dot(p, e.f)]
            }));
            let mesh = self.meshes.len() as u32;
            for (index, t) in model.triangles.iter().enumerate() {
                let corners = t.vertices.map(|v| self.vertices[usize::from(v)]);
                self.triangles.extend(Seen::new(corners, mesh, index as u32));
            }
            let colour = rgb(house.palette.objects[o.colour.index()]);
            let triangles = [first, self.triangles.len() as u32];
            self.meshes.push(Mesh { object, model, colour, light: turn(LIGHT), triangles });
        }
    }

    pub(crate) fn instance(&self, code: u32) -> u8 {
        if code >= MESH_BASE {
            let mesh = self.triangles.get((code - MESH_BASE) as usize).map_or(0, |t| t.mesh as usize);
            return self.meshes.get(mesh).map_or(0, |m| (m.object + 1).min(255) as u8);
        }
        if code < self.part_base {
            0
        } else {
            let part = ((code - self.part_base) / 6) as usize;
            self.parts.get(part).map_or(0, |p| (p.object + 1).min(255) as u8)
        }
    }

    /// Nearest surface of each sample: inverse depth and surface code. With `only`, that object alone in the void.
    pub(crate) fn trace(
        &self,
        house: &House,
        grid: &Grid,
        only: Option<usize>,
        w: &mut Vec<f32>,
        code: &mut Vec<u32>,
    ) {
        let n = grid.nx * grid.ny;
        w.clear();
        w.resize(n, 0.0);
        code.clear();
        code.resize(n, 0);
        let mut buffer = Buffer { grid, w, code };
        if only.is_none() {
            buffer.shell(&self.eye, house);
            for (k, wall) in house.walls.iter().enumerate() {
                let r = &wall.rect;
                buffer.cuboid(
                    &self.eye,
                    [r.x0 as f32, r.y0 as f32, wall.z0 as f32],
                    [r.x1 as f32, r.y1 as f32, CEILING_M as f32],
                    WALL_BASE + 6 * k as u32,
                );
            }
        }
        let mut seen = (usize::MAX, false);
        for (k, part) in self.parts.iter().enumerate() {
            if only.is_some_and(|o| o != part.object) {
                continue;
            }
            let eye = &self.local[part.object].0;
            if seen.0 != part.object {
                let o = &house.objects[part.object];
                let rel = [-eye.o[0], -eye.o[1], o.z as f32 - eye.o[2]];
                let reach = (o.radius.hypot(o.size[2] * 0.5)) as f32;
                seen = (part.object, grid.may_see(eye, rel, reach));
            }
            if !seen.1 {
                continue;
            }
            let base = self.part_base + 6 * k as u32;
            match part.solid {
                Solid::Cuboid { min, max } => buffer.cuboid(eye, min, max, base),
                Solid::Frustum { x, y, z0, z1, r0, r1 } => {
                    buffer.frustum(eye, [x, y], [z0, z1], [r0, r1], base)
                }
                Solid::Ellipsoid { c, r } => buffer.ellipsoid(eye, c, r, base),
            }
        }
        self.trace_meshes(house, only, &mut buffer);
    }

    fn trace_meshes(&self, house: &House, only: Option<usize>, buffer: &mut Buffer<'_>) {
        for mesh in self.meshes.iter().filter(|m| only.is_none_or(|o| o == m.object)) {
            let eye = &self.local[mesh.object].0;
            let o = &house.objects[mesh.object];
            let rel = [-eye.o[0], -eye.o[1], o.z as f32 - eye.o[2]];
            if !buffer.grid.may_see(eye, rel, o.radius.hypot(o.size[2] * 0.5) as f32) {
                continue;
            }
            for k in mesh.triangles[0]..mesh.triangles[1] {
                buffer.triangle(&self.triangles[k as usize], MESH_BASE + k);
            }
        }
    }

    fn room_of(&self, x: f32, y: f32) -> Option<&RoomLook> {
        if self.rooms.len() == 1 {
            return self.rooms.first();
        }
        self.rooms.iter().find(|r| x >= r.x[0] && x <= r.x[1] && y >= r.y[0] && y <= r.y[1])
    }

    fn nearest_room(&self, x: f32, y: f32) -> &RoomLook {
        let away =
            |r: &RoomLook| (r.x[0] - x).max(x - r.x[1]).max(0.0) + (r.y[0] - y).max(y - r.y[1]).max(0.0);
        let mut best = &self.rooms[0];
        for r in &self.rooms[1..] {
            if away(r) < away(best) {
                best = r;
            }
        }
        best
    }

    /// Colour of the floor before light; `foot` is the size of a sample on it (m).
    fn floor_albedo(&self, x: f32, y: f32, foot: f32) -> [f32; 3] {
        let room = self.room_of(x, y).unwrap_or_else(|| self.nearest_room(x, y));
        let p = room.period;
        // Patterns fade to their mean where samples are too coarse for them.
        let keep = (1.7 - 1.7 * foot / p).clamp(0.0, 1.0);
        let tone = match room.floor_pattern {
            FloorPattern::Checker => ((floor_i(x / p) + floor_i(y / p)) & 1) as f32,
            FloorPattern::Planks => {
                let board = floor_i(y / p);
                let along = x / (p * 5.0) + hash(board, 11) * 7.0;
                let piece = floor_i(along);
                let tone = hash(board, piece);
                let (fy, fx) = (y - board as f32 * p, (along - piece as f32) * p * 5.0);
                if foot < 0.03 && (fy < 0.007 || fx < 0.007) {
                    tone + 1.0
                } else if foot < 0.03 {
                    // Grain.
                    let g = hash(floor_i(x * 9.0), floor_i(y * 160.0) ^ (board * 7919));
                    tone + 0.35 * (g - 0.5)
                } else {
                    tone
                }
            }
            FloorPattern::Tiles => {
                let (ix, iy) = (floor_i(x / p), floor_i(y / p));
                let (fx, fy) = (x - ix as f32 * p, y - iy as f32 * p);
                if fx < 0.03 || fy < 0.03 { 1.0 } else { 0.3 * hash(ix, iy) }
            }
        };
        let mean = if room.floor_pattern == FloorPattern::Tiles { 0.25 } else { 0.5 };
        mix(room.floor[0], room.floor[1], mean + (tone - mean) * keep)
    }

    fn floor_shade(&self, house: &House, x: f32, y: f32) -> f32 {
        let s = &house.shade;
        let i = ((x - self.origin[0]) * (1.0 / SHADE_CELL_M as f32) + 0.5) as usize;
        let j = ((y - self.origin[1]) * (1.0 / SHADE_CELL_M as f32) + 0.5) as usize;
        s.cells.get(j.min(s.rows - 1) * s.cols + i.min(s.cols - 1)).copied().unwrap_or(1.0)
    }

    fn floor_shade_smooth(&self, house: &House, x: f32, y: f32) -> f32 {
        let s = &house.shade;
        let fx = ((x - self.origin[0]) * (1.0 / SHADE_CELL_M as f32)).clamp(0.0, (s.cols - 1) as f32 - 0.001);
        let fy = ((y - self.origin[1]) * (1.0 / SHADE_CELL_M as f32)).clamp(0.0, (s.rows - 1) as f32 - 0.001);
        let (i, j) = (fx as usize, fy as usize);
        let (kx, ky) = (fx - i as f32, fy - j as f32);
        let at = |i: usize, j: usize| s.cells[j.min(s.rows - 1) * s.cols + i.min(s.cols - 1)];
        let top = at(i, j) + (at(i + 1, j) - at(i, j)) * kx;
        let bottom = at(i, j + 1) + (at(i + 1, j + 1) - at(i, j + 1)) * kx;
        top + (bottom - top) * ky
    }

    /// Colour of a wall before light. `side`: 0 east, 1 north, 2 west, 3 south of `room`.
    fn wall_albedo(&self, room: &RoomLook, side: usize, x: f32, y: f32, z: f32, foot: f32) -> [f32; 3] {
        let base = room.walls[side];
        let s = if side & 1 == 0 { y } else { x };
        if foot < 0.04 && z < 0.09 {
            return if z > 0.08 { scale(self.frame_colour, 0.85) } else { self.frame_colour };
        }
        let (tone, period) = match room.patterns[side] {
            WallPattern::Plain => return base,
            WallPattern::Stripes => ((floor_i(s * (1.0 / 0.3)) & 1) as f32 * 0.7, 0.3),
            WallPattern::Panel => {
                if z > 0.95 && z < 1.02 {
                    (-0.6, 0.1)
                } else {
                    (if z < 1.0 { 1.0 } else { 0.0 }, 10.0)
                }
            }
            WallPattern::Bricks => {
                let row = floor_i(z * 5.0);
                let shift = s * (1.0 / 0.46) + (row & 1) as f32 * 0.5;
                let (fx, fz) = (shift - floor_i(shift) as f32, z * 5.0 - row as f32);
                let joint = fx < 0.05 || fz < 0.12;
                (if joint { -0.5 } else { 0.3 + 0.5 * hash(floor_i(shift), row) }, 0.2)
            }
            WallPattern::Dots => {
                let row = floor_i(z * 2.5);
                let (a, b) = (s * 2.5 + (row & 1) as f32 * 0.5, z * 2.5);
                let (fa, fb) = (a - floor_i(a) as f32 - 0.5, b - row as f32 - 0.5);
                (if fa * fa + fb * fb < 0.07 { 1.0 } else { 0.0 }, 0.25)
            }
        };
        let keep = (1.7 - 1.7 * foot / period).clamp(0.0, 1.0);
        let k = 1.0 - 0.30 * (0.3 + (tone - 0.3) * keep);
        scale(base, k)
    }

    /// The normal of a wall at a map point, and the room and side that it shows; none for door frames.
    fn wall_of(&self, code: u32, p: [f32; 3]) -> ([f32; 3], Option<(&RoomLook, usize)>) {
        let face = if code < WALL_BASE {
            [0, 2, 1, 3][(code.saturating_sub(2) & 3) as usize]
        } else {
            ((code - WALL_BASE) % 6) as usize
        };
        let n = FACE_NORMALS[face];
        if face > 3 {
            return (n, None);
        }
        let room = self.room_of(p[0] + n[0] * 0.05, p[1] + n[1] * 0.05);
        (n, room.map(|r| (r, [0, 2, 1, 3][face])))
    }

    /// Albedo (0-255), normal in the map, and whether it is structure, of a surface at a map point.
    fn surface(&self, code: u32, p: [f32; 3], local_p: [f32; 3], foot: f32) -> ([f32; 3], [f32; 3]) {
        match code {
            0 => (self.floor_albedo(p[0], p[1], foot), [0.0, 0.0, 1.0]),
            1 => {
                let room = self.room_of(p[0], p[1]).unwrap_or(&self.rooms[0]);
                let (cx, cy) = ((room.x[0] + room.x[1]) * 0.5, (room.y[0] + room.y[1]) * 0.5);
                let lamp = (p[0] - cx) * (p[0] - cx) + (p[1] - cy) * (p[1] - cy) < 0.09;
                (if lamp { [255.0, 252.0, 240.0] } else { self.ceiling }, [0.0, 0.0, -1.0])
            }
            _ if code < self.part_base => {
                let (n, wall) = self.wall_of(code, p);
                let colour = wall.map_or(self.frame_colour, |(room, side)| {
                    self.wall_albedo(room, side, p[0], p[1], p[2], foot)
                });
                (colour, n)
            }
            _ => {
                let k = code - self.part_base;
                let Some(part) = self.parts.get((k / 6) as usize) else {
                    return ([0.0; 3], [0.0, 0.0, 1.0]);
                };
                let face = (k % 6) as usize;
                let n = match part.solid {
                    Solid::Cuboid { .. } => FACE_NORMALS[face],
                    Solid::Frustum { .. } if face != 0 => FACE_NORMALS[face],
                    Solid::Frustum { x, y, z0, z1, r0, r1 } => {
                        let slope = (r1 - r0) / (z1 - z0);
                        let (dx, dy) = (local_p[0] - x, local_p[1] - y);
                        unit([dx, dy, -slope * (dx * dx + dy * dy).sqrt()])
                    }
                    Solid::Ellipsoid { c, r } => unit([
                        (local_p[0] - c[0]) / (r[0] * r[0]),
                        (local_p[1] - c[1]) / (r[1] * r[1]),
                        (local_p[2] - c[2]) / (r[2] * r[2]),
                    ]),
                };
                let (_, c, s) = self.local[part.object];
                (part.albedo, [c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]])
            }
        }
    }

    /// Places of a sample: in the map, and in the object's frame when the code is a part's.
    fn place(&self, code: u32, u: f32, v: f32, t: f32) -> ([f32; 3], [f32; 3]) {
        let at = |e: &Eye| {
            let k = |i: usize| e.o[i] + t * (e.f[i] + v * e.d[i] + u * e.r[i]);
            [k(0), k(1), k(2)]
        };
        let p = at(&self.eye);
        if code < self.part_base {
            return (p, p);
        }
        if code >= MESH_BASE {
            let object = usize::from(self.instance(code)).saturating_sub(1);
            return (p, at(&self.local[object].0));
        }
        match self.parts.get(((code - self.part_base) / 6) as usize) {
            Some(part) => (p, at(&self.local[part.object].0)),
            None => (p, p),
        }
    }

    /// Size on the surface of one sample (m).
    fn footprint(&self, du: f32, code: u32, t: f32) -> f32 {
        if code == 0 { du * t * (t * 0.5 / self.eye.o[2].max(0.1)).max(1.0) } else { du * t }
    }

    /// One row of pixels in fast light. A pixel whose samples all lie on one evenly coloured surface is shaded once,
    /// in its middle.
    fn shade_row(&self, house: &House, samples: &Samples, row: usize, out: &mut Vec<u8>) {
        let Samples { grid, ss, w, code } = *samples;
        let nx = grid.nx;
        let count = (ss * ss) as f32;
        let v0 = grid.v0 + (row * ss) as f32 * grid.du;
        let middle = (ss as f32 - 1.0) * 0.5 * grid.du;
        let coarse = grid.du * ss as f32;
        for k in 0..nx / ss {
            let first = code[k * ss];
            let u0 = grid.u0 + (k * ss) as f32 * grid.du;
            let mut colour = [0.0f32; 3];
            let wall = (2..self.part_base).contains(&first);
            if (wall || first >= self.part_base)
                && (0..ss).all(|j| code[j * nx + k * ss..][..ss].iter().all(|c| *c == first))
            {
                let sum: f32 = (0..ss).map(|j| w[j * nx + k * ss..][..ss].iter().sum::<f32>()).sum();
                let t = count / sum;
                let (u, v) = (u0 + middle, v0 + middle);
                if !wall {
                    colour = self.fast(house, grid, first, u, v, t);
                } else {
                    let (p, _) = self.place(first, u, v, t);
                    let (n, wall) = self.wall_of(first, p);
                    // Skirting boards show only where samples are fine.
                    let skirting = p[2] < 0.1 + 2.0 * coarse * t && grid.du * t < 0.04;
                    let albedo = match wall {
                        None => self.frame_colour,
                        Some((room, side)) if room.patterns[side] == WallPattern::Plain && !skirting => {
                            room.walls[side]
                        }
                        Some((room, side)) => {
                            let mut sum = [0.0f32; 3];
                            for j in 0..ss {
                                let v = v0 + j as f32 * grid.du;
                                for i in 0..ss {
                                    let t = 1.0 / w[j * nx + k * ss + i];
                                    let (p, _) = self.place(first, u0 + i as f32 * grid.du, v, t);
                                    let c = self.wall_albedo(room, side, p[0], p[1], p[2], grid.du * t);
                                    sum = [sum[0] + c[0], sum[1] + c[1], sum[2] + c[2]];
                                }
                            }
                            scale(sum, 1.0 / count)
                        }
                    };
                    colour = scale(albedo, wall_light(n) * self.corner(p)).map(|c| c.min(255.0));
                }
                out.extend(colour.map(|c| (c + 0.5) as u8));
                continue;
            }
            for j in 0..ss {
                let v = v0 + j as f32 * grid.du;
                for i in 0..ss {
                    let at = j * nx + k * ss + i;
                    let c = self.fast(house, grid, code[at], u0 + i as f32 * grid.du, v, 1.0 / w[at]);
                    colour = [colour[0] + c[0], colour[1] + c[1], colour[2] + c[2]];
                }
            }
            out.extend(colour.map(|c| (c / count + 0.5) as u8));
        }
    }

    /// As [`Scene::shade_row`], every sample by itself and with grain.
    fn shade_row_grained(&self, house: &House, samples: &Samples, row: usize, out: &mut Vec<u8>) {
        let Samples { grid, ss, w, code } = *samples;
        let pixel = grid.du * ss as f32;
        for k in 0..grid.nx / ss {
            let mut colour = [0.0f32; 3];
            // Grain is smooth within a pixel: once for each surface that it shows.
            let (mut last, mut grain) = (u32::MAX, 0.0);
            for j in 0..ss {
                let v = grid.v0 + (row * ss + j) as f32 * grid.du;
                for i in k * ss..(k + 1) * ss {
                    let (code, t) = (code[j * grid.nx + i], 1.0 / w[j * grid.nx + i]);
                    let u = grid.u0 + i as f32 * grid.du;
                    if code != last {
                        last = code;
                        let to = |at: f32| at + 0.5 * (pixel - grid.du);
                        let (u, v) = (
                            to(grid.u0 + (k * ss) as f32 * grid.du),
                            to(grid.v0 + (row * ss) as f32 * grid.du),
                        );
                        grain = self.grain(code, u, v, t, self.footprint(pixel, code, t));
                    }
                    // Towards white and black: dark and pure colours are grained, too.
                    let most = if grain > 0.0 { 255.0 } else { 0.0 };
                    for (sum, value) in colour.iter_mut().zip(self.fast(house, grid, code, u, v, t)) {
                        *sum += value + (most - value) * grain.abs();
                    }
                }
            }
            out.extend(colour.map(|c| (c / (ss * ss) as f32 + 0.5) as u8));
        }
    }

    /// Grain of a surface where a pixel of width `foot` (m) meets it, -1 to 1: spots of six sizes in space, of which no two
    /// places have the same, so that there is detail at every distance; spots smaller than the pixel fade out. It goes with
    /// the house and, on things, with the thing.
    fn grain(&self, code: u32, u: f32, v: f32, t: f32, foot: f32) -> f32 {
        let (p, local_p) = self.place(code, u, v, t);
        let (p, salt) = match code.checked_sub(self.part_base) {
            None => (p, 0),
            Some(_) => (local_p, i32::from(self.instance(code))),
        };
        let (x, y) = (self.origin[0] * 64.0, self.origin[1] * 64.0);
        let salt = salt + 31 * floor_i(x) + 977 * floor_i(y);
        let mut sum = 0.0;
        for (k, size) in GRAINS_M.into_iter().enumerate() {
            let weight = (size / (2.0 * foot) - 0.5).clamp(0.0, 1.0);
            if weight > 0.0 {
                // Spots with edges rather than hills.
                let spot = (2.5 * (noise(p, size, salt + 7001 * k as i32) - 0.5)).clamp(-0.5, 0.5);
                sum += weight * spot;
            }
        }
        (GRAIN_GAIN * sum).clamp(-0.9, 0.9)
    }

    /// The colour of a sample in fast light, 0 to 255.
    fn fast(&self, house: &House, grid: &Grid, code: u32, u: f32, v: f32, t: f32) -> [f32; 3] {
        let e = &self.eye;
        let z = e.o[2] + t * (e.f[2] + v * e.d[2] + u * e.r[2]);
        let (colour, light) = if code >= self.part_base {
            let k = code - self.part_base;
            let Some(part) = self.parts.get((k / 6) as usize) else { return [0.0; 3] };
            let low = 0.80 + 0.20 * (z * 4.0).min(1.0);
            let face = (k % 6) as usize;
            let light = match part.solid {
                Solid::Cuboid { .. } => self.face_light[part.object][face],
                Solid::Frustum { .. } if face != 0 => self.face_light[part.object][face],
                _ => {
                    let (p, local_p) = self.place(code, u, v, t);
                    object_light(self.surface(code, p, local_p, 0.0).1)
                }
            };
            (part.albedo, light * low)
        } else {
            let p = [
                e.o[0] + t * (e.f[0] + v * e.d[0] + u * e.r[0]),
                e.o[1] + t * (e.f[1] + v * e.d[1] + u * e.r[1]),
                z,
            ];
            if code == 0 {
                let foot = self.footprint(grid.du, code, t);
                // The shading map's cells would show where samples are finer than they are.
                let shade = if grid.du < 0.012 {
                    self.floor_shade_smooth(house, p[0], p[1])
                } else {
                    self.floor_shade(house, p[0], p[1])
                };
                (self.floor_albedo(p[0], p[1], foot), shade)
            } else {
                let (colour, n) = self.surface(code, p, p, grid.du * t);
                (colour, if code == 1 { 0.97 } else { wall_light(n) * self.corner(p) })
            }
        };
        colour.map(|c| (c * light).min(255.0))
    }

    /// Darkening of walls towards the floor and the ceiling.
    fn corner(&self, p: [f32; 3]) -> f32 {
        let d = p[2].min(CEILING_M as f32 - p[2]);
        0.86 + 0.14 * (d * 2.5).clamp(0.0, 1.0)
    }

    /// One row of samples in lamp light, added to the row of pixels that they belong to.
    fn shade_row_fine(&self, house: &House, samples: &Samples, j: usize, acc: &mut [f32]) {
        let Samples { grid, ss, w, code } = *samples;
        let v = grid.v0 + j as f32 * grid.du;
        for i in 0..grid.nx {
            let (w, code) = (w[i], code[i]);
            let u = grid.u0 + i as f32 * grid.du;
            let t = 1.0 / w;
            let (p, local_p) = self.place(code, u, v, t);
            let pixel = &mut acc[(i / ss) * 3..(i / ss) * 3 + 3];
            if let Some(decor) = &house.decor {
                let look = self.look(house, decor, grid.du, code, (u, v), t, p);
                let light = match look.glow {
                    true => [1.0; 3],
                    false => self.lit_furnished(house, decor, code, &look, p, (i, j), ss),
                };
                for c in 0..3 {
                    pixel[c] += (look.albedo[c] * light[c]).min(255.0);
                }
                continue;
            }
            let (albedo, n) = self.surface(code, p, local_p, self.footprint(grid.du, code, t));
            let light = self.lit(house, code, p, n, (i, j), ss);
            for c in 0..3 {
                pixel[c] += (albedo[c] * light[c]).min(255.0);
            }
        }
    }

    /// Light at a point: an area lamp at the middle of the room's ceiling, and an ambient term with occlusion.
    fn lit(
        &self,
        house: &House,
        code: u32,
        p: [f32; 3],
        n: [f32; 3],
        seed: (usize, usize),
        ss: usize,
    ) -> [f32; 3] {
        let room = self.room_of(p[0] + n[0] * 0.05, p[1] + n[1] * 0.05);
        let room = room.unwrap_or_else(|| self.nearest_room(p[0], p[1]));
        let (cx, cy) = ((room.x[0] + room.x[1]) * 0.5, (room.y[0] + room.y[1]) * 0.5);
        if code == 1 {
            let d2 = (p[0] - cx) * (p[0] - cx) + (p[1] - cy) * (p[1] - cy);
            return [if d2 < 0.09 { 1.0 } else { 0.80 + 0.16 / (1.0 + 2.0 * d2) }; 3];
        }
        // The samples of one pixel share the lamp's disc between them (a Vogel spiral, turned from pixel to pixel).
        const RAYS: usize = 2;
        let (i, j) = seed;
        let count = ss * ss * RAYS;
        let turn = hash((i / ss) as i32, (j / ss) as i32) * std::f32::consts::TAU;
        let mut direct = 0.0;
        for k in 0..RAYS {
            let index = (((i % ss) * ss + j % ss) * RAYS + k) as f32;
            let a = index * 2.399_963 + turn;
            let r = 0.28 * ((index + 0.5) / count as f32).sqrt();
            let lamp = [cx + r * a.cos(), cy + r * a.sin(), CEILING_M as f32 - 0.12];
            let to = [lamp[0] - p[0], lamp[1] - p[1], lamp[2] - p[2]];
            let d2 = dot(to, to);
            let cos = dot(n, to) / d2.sqrt();
            if cos > 0.0 && !self.shadowed(house, p, n, to) {
                direct += cos * 7.0 / (4.0 + d2);
            }
        }
        direct /= RAYS as f32;
        let ambient = match code {
            0 => 0.50 * self.floor_shade_smooth(house, p[0], p[1]),
            _ if code < self.part_base => 0.56 * self.corner(p) * self.wall_corner(room, p, n),
            _ => (0.46 + 0.08 * n[2]) * (0.72 + 0.28 * (p[2] * 3.0).min(1.0)),
        };
        // Lamp light is a little warm, ambient a little cool.
        [ambient * 1.10 + direct * 0.74, ambient * 1.12 + direct * 0.72, ambient * 1.16 + direct * 0.68]
    }

    /// Darkening of walls towards the room's vertical corners.
    fn wall_corner(&self, room: &RoomLook, p: [f32; 3], n: [f32; 3]) -> f32 {
        let d = if n[0].abs() > 0.5 {
            (p[1] - room.y[0]).min(room.y[1] - p[1])
        } else {
            (p[0] - room.x[0]).min(room.x[1] - p[0])
        };
        0.84 + 0.16 * (d * 2.0).clamp(0.0, 1.0)
    }

    fn shadowed(&self, house: &House, p: [f32; 3], n: [f32; 3], to: [f32; 3]) -> bool {
        let start = [p[0] + n[0] * 0.004, p[1] + n[1] * 0.004, p[2] + n[2] * 0.004];
        let len2 = dot(to, to);
        let mut near = (usize::MAX, false);
        for part in &self.parts {
            let o = &house.objects[part.object];
            if near.0 != part.object {
                let rel = [o.x as f32 - start[0], o.y as f32 - start[1], o.z as f32 - start[2]];
                let k = (dot(rel, to) / len2).clamp(0.0, 1.0);
                let miss = [rel[0] - to[0] * k, rel[1] - to[1] * k, rel[2] - to[2] * k];
                let reach = o.radius.hypot(o.size[2] * 0.5) as f32;
                near = (part.object, dot(miss, miss) < reach * reach);
            }
            if !near.1 {
                continue;
            }
            let (_, c, s) = self.local[part.object];
            let (dx, dy) = (start[0] - o.x as f32, start[1] - o.y as f32);
            let lo = [c * dx + s * dy, c * dy - s * dx, start[2]];
            let ld = [c * to[0] + s * to[1], c * to[1] - s * to[0], to[2]];
            if blocks(&part.solid, lo, ld) {
                return true;
            }
        }
        self.shadowed_by_meshes(house, start, to)
    }

    /// Whether furniture stands between a place and the one at `to` from it.
    fn shadowed_by_meshes(&self, house: &House, start: [f32; 3], to: [f32; 3]) -> bool {
        let len2 = dot(to, to);
        house.objects.iter().enumerate().any(|(k, o)| {
            let Some((model, scale)) = o.mesh else { return false };
            let rel = [o.x as f32 - start[0], o.y as f32 - start[1], o.z as f32 - start[2]];
            let at = (dot(rel, to) / len2).clamp(0.0, 1.0);
            let miss = [rel[0] - to[0] * at, rel[1] - to[1] * at, rel[2] - to[2] * at];
            let reach = o.radius.hypot(o.size[2] * 0.5) as f32;
            if dot(miss, miss) >= reach * reach {
                return false;
            }
            let (_, c, s) = self.local[k];
            let (dx, dy) = (start[0] - o.x as f32, start[1] - o.y as f32);
            let inv = 1.0 / scale;
            let lo = [(c * dx + s * dy) * inv, (c * dy - s * dx) * inv, start[2] * inv];
            let ld = [(c * to[0] + s * to[1]) * inv, (c * to[1] - s * to[0]) * inv, to[2] * inv];
            let [ex, ey, ez] = model.extent;
            let hull = Solid::Cuboid { min: [-0.5 * ex, -0.5 * ey, 0.0], max: [0.5 * ex, 0.5 * ey, ez] };
            blocks(&hull, lo, ld) && model_blocks(model, lo, ld)
        })
    }
}

/// What a sample shows of a furnished house, before light.
struct Look {
    /// 0 to 255.
    albedo: [f32; 3],
    /// In the map.
    normal: [f32; 3],
    /// Fast light, and openness to the light of the room.
    light: f32,
    open: f32,
    /// Shines by itself.
    glow: bool,
    /// Index of the room.
    room: usize,
}

impl Scene {
    /// As [`Scene::shade_row`], for a furnished house. A pixel whose samples all lie on the floor, on a wall without
    /// anything on it, or on one triangle is shaded once; one whose samples lie on one thing, twice.
    fn shade_row_furnished(
        &self,
        house: &House,
        decor: &Decor,
        samples: &Samples,
        row: usize,
        grain: bool,
        out: &mut Vec<u8>,
    ) {
        let Samples { grid, ss, w, code } = *samples;
        let nx = grid.nx;
        let count = 1.0 / (ss * ss) as f32;
        let middle = (ss as f32 - 1.0) * 0.5 * grid.du;
        let v0 = grid.v0 + (row * ss) as f32 * grid.du;
        for k in 0..nx / ss {
            let first = code[k * ss];
            let u0 = grid.u0 + (k * ss) as f32 * grid.du;
            let every = |same: &dyn Fn(u32) -> bool| {
                (0..ss).all(|j| code[j * nx + k * ss..][..ss].iter().all(|c| same(*c)))
            };
            let one = every(&|c| c == first);
            let bare = !(2..MESH_BASE).contains(&first) || self.bare(first);
            if one && bare && ss > 1 && !grain {
                let sum: f32 = (0..ss).map(|j| w[j * nx + k * ss..][..ss].iter().sum::<f32>()).sum();
                let t = (ss * ss) as f32 / sum;
                let foot = grid.du * ss as f32;
                let colour = self.lit_fast(house, decor, foot, first, (u0 + middle, v0 + middle), t);
                out.extend(colour.map(|c| (c + 0.5) as u8));
                continue;
            }
            let thing = first >= MESH_BASE && {
                let mesh = self.triangles[(first - MESH_BASE) as usize].mesh;
                every(&|c| c >= MESH_BASE && self.triangles[(c - MESH_BASE) as usize].mesh == mesh)
            };
            let (mut colour, mut n) = ([0.0f32; 3], 0.0f32);
            for j in 0..ss {
                let v = v0 + j as f32 * grid.du;
                for i in 0..ss {
                    // Every second one, as on a chessboard.
                    if thing && !grain && (i + j) & 1 == 1 {
                        continue;
                    }
                    let at = j * nx + k * ss + i;
                    let (u, t) = (u0 + i as f32 * grid.du, 1.0 / w[at]);
                    let lit = self.lit_fast(house, decor, grid.du, code[at], (u, v), t);
                    let foot = self.footprint(grid.du, code[at], t);
                    let gain = if grain { 1.0 + 0.6 * self.grain(code[at], u, v, t, foot) } else { 1.0 };
                    (0..3).for_each(|c| colour[c] += (lit[c] * gain).min(255.0));
                    n += 1.0;
                }
            }
            let inv = if thing { 1.0 / n } else { count };
            out.extend(colour.map(|c| (c * inv + 0.5) as u8));
        }
    }

    /// Whether nothing hangs on the wall that a code is of.
    fn bare(&self, code: u32) -> bool {
        self.hung.len() == 4
            && (2..WALL_BASE).contains(&code)
            && self.hung.get(code as usize - 2).is_some_and(|h| h[0] == h[1])
    }

    /// The colour of a sample of a furnished house in fast light, 0 to 255; `du` is the samples' distance.
    fn lit_fast(
        &self,
        house: &House,
        decor: &Decor,
        du: f32,
        code: u32,
        (u, v): (f32, f32),
        t: f32,
    ) -> [f32; 3] {
        let e = &self.eye;
        let p: [f32; 3] = std::array::from_fn(|k| e.o[k] + t * (e.f[k] + v * e.d[k] + u * e.r[k]));
        let look = self.look(house, decor, du, code, (u, v), t, p);
        let mut light = [look.light; 3];
        if !look.glow {
            let sun = self.sun(decor, &look, p);
            (0..3).for_each(|c| light[c] += sun * SUN[c]);
        }
        [0, 1, 2].map(|c| (look.albedo[c] * light[c]).min(255.0))
    }

    /// Light of the sun that falls through the windows, without shadows of furniture.
    fn sun(&self, decor: &Decor, look: &Look, p: [f32; 3]) -> f32 {
        let cos = dot(look.normal, decor.sun);
        if cos <= 0.0 || self.sunny.is_empty() {
            return 0.0;
        }
        let lit: f32 = self.sunny.iter().map(|w| w.lights(decor.sun, look.room, p)).sum();
        cos * lit.min(1.0)
    }

    fn look(
        &self,
        house: &House,
        decor: &Decor,
        du: f32,
        code: u32,
        (u, v): (f32, f32),
        t: f32,
        p: [f32; 3],
    ) -> Look {
        if code >= MESH_BASE {
            return self.mesh_look(house, code, (u, v), t, p);
        }
        let foot = self.footprint(du, code, t);
        match code {
            0 => {
                let room = self.room_index(p[0], p[1]);
                let [light, dark] = self.rooms[room].floor;
                let shade = self.floor_shade_smooth(house, p[0], p[1]);
                let rug = decor.rooms[room].rug.as_ref();
                let albedo = match rug.and_then(|rug| Some((rug.colours, rug.at(p[0], p[1], foot)?))) {
                    Some((colours, [tone, bright])) => {
                        let [ground, pattern] = colours.map(|c| rgb(house.palette.walls[c]));
                        scale(mix(scale(ground, 0.8), pattern, tone), bright)
                    }
                    None => {
                        let texture = decor::floor_texture(decor.rooms[room].floor);
                        let [tone, bright] = texture.at(p[0], p[1], foot);
                        scale(mix(light, dark, tone), bright)
                    }
                };
                Look { albedo, normal: [0.0, 0.0, 1.0], light: 1.04 * shade, open: shade, glow: false, room }
            }
            1 => {
                let (albedo, normal) = self.surface(code, p, p, foot);
                let room = self.room_index(p[0], p[1]);
                let r = &self.rooms[room];
                let edge = (p[0] - r.x[0]).min(r.x[1] - p[0]).min(p[1] - r.y[0]).min(r.y[1] - p[1]);
                let light = 0.90 + 0.08 * (edge * 2.0).clamp(0.0, 1.0);
                Look { albedo, normal, light, open: 1.0, glow: albedo[1] > 251.0, room }
            }
            _ => {
                let (n, wall) = self.wall_of(code, p);
                let light = wall_light(n) * self.corner(p);
                let Some((look, side)) = wall else {
                    let room = self.room_index(p[0], p[1]);
                    let albedo = self.frame_colour;
                    return Look { albedo, normal: n, light, open: 1.0, glow: false, room };
                };
                let room = self.room_index(p[0] + n[0] * 0.05, p[1] + n[1] * 0.05);
                let open = self.wall_corner(look, p, n);
                let (albedo, glow) = self.wall_look(house, decor, room, side, (u, v), p, foot);
                let light = if glow { 1.0 } else { 1.08 * light * open };
                Look { albedo, normal: n, light, open, glow, room }
            }
        }
    }

    fn room_index(&self, x: f32, y: f32) -> usize {
        if self.rooms.len() == 1 {
            return 0;
        }
        let away =
            |r: &RoomLook| (r.x[0] - x).max(x - r.x[1]).max(0.0) + (r.y[0] - y).max(y - r.y[1]).max(0.0);
        let mut best = (0, f32::MAX);
        for (k, r) in self.rooms.iter().enumerate() {
            let d = away(r);
            if d < best.1 {
                best = (k, d);
            }
        }
        best.0
    }

    /// The colour of a wall with what hangs on it, and whether it shines.
    fn wall_look(
        &self,
        house: &House,
        decor: &Decor,
        room: usize,
        side: usize,
        (u, v): (f32, f32),
        p: [f32; 3],
        foot: f32,
    ) -> ([f32; 3], bool) {
        let s = if side & 1 == 0 { p[1] } else { p[0] };
        let z = p[2];
        let mut hung = None;
        let [first, last] = self.hung.get(4 * room + side).copied().unwrap_or_default();
        for panel in &decor.panels[first as usize..last as usize] {
            if s >= panel.s[0] && s < panel.s[1] && z >= panel.z[0] && z < panel.z[1] {
                hung = Some(panel);
            }
        }
        // Seen from inside, the left end of the east and of the south wall has the larger coordinate.
        let across = |lo: f32, hi: f32| {
            let k = (s - lo) / (hi - lo).max(1e-6);
            if side == 0 || side == 3 { 1.0 - k } else { k }
        };
        if let Some(panel) = hung {
            let edge = (s - panel.s[0]).min(panel.s[1] - s).min(z - panel.z[0]).min(panel.z[1] - z);
            match panel.what {
                Hung::Window => {
                    let middle = (s - 0.5 * (panel.s[0] + panel.s[1])).abs();
                    if edge < decor::FRAME_M || middle < 0.3 * decor::FRAME_M {
                        return (scale(self.frame_colour, 1.06), false);
                    }
                    let e = &self.eye;
                    let d: [f32; 3] = std::array::from_fn(|k| e.f[k] + v * e.d[k] + u * e.r[k]);
                    return (decor::outside(d), true);
                }
                Hung::Picture(index) => {
                    if edge < 0.025 {
                        let dark = if index & 1 == 0 { [66.0, 48.0, 36.0] } else { [196.0, 168.0, 110.0] };
                        return (dark, false);
                    }
                    let (a, b) =
                        (across(panel.s[0], panel.s[1]), (z - panel.z[0]) / (panel.z[1] - panel.z[0]));
                    return (decor::painting(index, a, b, foot < 0.03), false);
                }
                Hung::Curtain(colour) => {
                    let base = rgb(house.palette.walls[colour % house.palette.walls.len()]);
                    let fold = ((s * 42.0).sin() + 0.4 * (s * 97.0 + 0.6 * z).sin()) * 0.12;
                    return (scale(base, 0.95 + if foot < 0.05 { fold } else { 0.0 }), false);
                }
            }
        }
        let base = self.rooms[room].walls[side];
        if z < 0.10 {
            return (scale(self.frame_colour, if z > 0.088 { 0.8 } else { 0.97 }), false);
        }
        let look = &decor.rooms[room];
        let panelled = look.panelled && z < decor::PANEL_M;
        if panelled && z > decor::PANEL_M - 0.05 {
            return (scale(self.frame_colour, if z > decor::PANEL_M - 0.012 { 1.0 } else { 0.88 }), false);
        }
        let texture = decor::wall_texture(if panelled { 4 } else { look.walls[side] });
        let [tone, bright] = texture.at(s, z, foot);
        // Light walls get darker patterns, dark ones lighter.
        let other = if base[1] > 150.0 { scale(base, 0.72) } else { mix(base, [255.0; 3], 0.32) };
        (scale(mix(base, other, tone), bright).map(|c| c.min(255.0)), false)
    }

    fn mesh_look(&self, house: &House, code: u32, (u, v): (f32, f32), t: f32, p: [f32; 3]) -> Look {
        let seen = &self.triangles[(code - MESH_BASE) as usize];
        let mesh = &self.meshes[seen.mesh as usize];
        let model = mesh.model;
        let triangle = &model.triangles[seen.index as usize];
        let b = seen.edges.map(|e| ((e[0] * u + e[1] * v + e[2]) * t).clamp(0.0, 1.0));
        let corners = &model.normals[seen.index as usize];
        let n: [f32; 3] = std::array::from_fn(|k| {
            (b[0] * corners[0][k] + b[1] * corners[1][k] + b[2] * corners[2][k]) * seen.facing
        });
        let open: f32 = (0..3).map(|k| b[k] * model.open[usize::from(triangle.vertices[k])]).sum();
        let albedo = lattice_colour(model, triangle, b, mesh.colour);
        let light = (0.68 + 0.09 * n[2] + 0.42 * dot(n, mesh.light).max(0.0)) * (0.45 + 0.55 * open);
        let (_, c, s) = self.local[mesh.object];
        let normal = [c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]];
        let low = 0.86 + 0.14 * (p[2] * 4.0).clamp(0.0, 1.0);
        Look { albedo, normal, light: light * low, open, glow: false, room: house.objects[mesh.object].room }
    }

    /// Light of pictures in a furnished house: the room's lamp, the sun and the sky, with shadows.
    fn lit_furnished(
        &self,
        house: &House,
        decor: &Decor,
        code: u32,
        look: &Look,
        p: [f32; 3],
        seed: (usize, usize),
        ss: usize,
    ) -> [f32; 3] {
        let n = look.normal;
        if code == 1 {
            return [look.light; 3];
        }
        let room = &self.rooms[look.room];
        let (cx, cy) = ((room.x[0] + room.x[1]) * 0.5, (room.y[0] + room.y[1]) * 0.5);
        // One ray a sample; those of a pixel share the lamp's disc.
        let (i, j) = seed;
        let turn = hash((i / ss) as i32, (j / ss) as i32) * std::f32::consts::TAU;
        let index = ((i % ss) * ss + j % ss) as f32;
        let (a, r) = (index * 2.399_963 + turn, 0.34 * ((index + 0.5) / (ss * ss) as f32).sqrt());
        let to = [cx + r * a.cos() - p[0], cy + r * a.sin() - p[1], CEILING_M as f32 - 0.12 - p[2]];
        let d2 = dot(to, to);
        let cos = dot(n, to) / d2.sqrt();
        let lamp = if cos > 0.0 && !self.shadowed(house, p, n, to) { cos * 4.6 / (4.0 + d2) } else { 0.0 };
        let mut sun = self.sun(decor, look, p);
        if sun > 0.0 {
            let to = decor.sun.map(|d| d * 8.0);
            if self.shadowed(house, p, n, to) {
                sun = 0.0;
            }
        }
        // Seen sky and the light that the walls give back.
        let ambient = (0.68 + 0.05 * n[2])
            * (0.38 + 0.62 * look.open)
            * if code > 1 && code < self.part_base { self.corner(p) } else { 1.0 };
        let warm = [1.0, 0.95, 0.86];
        [0, 1, 2].map(|c| ambient * [1.0, 1.01, 1.04][c] + lamp * 0.62 * warm[c] + 1.15 * sun * SUN[c])
    }
}

/// Colour of sunlight on a surface that faces it.
const SUN: [f32; 3] = [0.80, 0.73, 0.58];

/// The colour of a triangle at barycentric weights: linear between the samples of its lattice.
fn lattice_colour(
    model: &Model,
    triangle: &crate::furniture::Triangle,
    b: [f32; 3],
    tint: [f32; 3],
) -> [f32; 3] {
    let colour = |k: usize| {
        let paint = model.lattice.get(triangle.first as usize + k).map(|c| model.paints[usize::from(*c)]);
        match paint {
            Some(Paint::Own(c)) => rgb(c),
            Some(Paint::Tinted(gain)) => scale(tint, gain),
            None => [0.0; 3],
        }
    };
    if triangle.steps == 0 {
        return colour(0);
    }
    let n = f32::from(triangle.steps);
    // Row from the first vertex, place in it from the second's side.
    let (y, x) = ((1.0 - b[0]) * n, b[2] * n);
    let row = (y as usize).min(usize::from(triangle.steps) - 1);
    let column = (x as usize).min(row);
    let (fy, fx) = (y - row as f32, x - column as f32);
    let at = |i: usize, j: usize| colour(i * (i + 1) / 2 + j.min(i));
    // The cell is split along the diagonal.
    let (near, far) = (at(row, column), at(row + 1, column + 1));
    if fx <= fy {
        let other = at(row + 1, column);
        [0, 1, 2].map(|c| near[c] * (1.0 - fy) + other[c] * (fy - fx) + far[c] * fx)
    } else {
        let other = at(row, column + 1);
        [0, 1, 2].map(|c| near[c] * (1.0 - fx) + other[c] * (fx - fy) + far[c] * fy)
    }
}

/// Whether the segment `o + t d`, t in (0, 1), meets a model (its own frame and scale).
fn model_blocks(model: &Model, o: [f32; 3], d: [f32; 3]) -> bool {
    const NEAR: f32 = 2e-3;
    model.triangles.iter().any(|t| {
        let [a, b, c] = t.vertices.map(|v| model.points[usize::from(v)]);
        let (e1, e2) = (sub(b, a), sub(c, a));
        let q = cross(d, e2);
        let det = dot(e1, q);
        if det.abs() < 1e-12 {
            return false;
        }
        let inv = 1.0 / det;
        let from = sub(o, a);
        let u = dot(from, q) * inv;
        if !(0.0..=1.0).contains(&u) {
            return false;
        }
        let r = cross(from, e1);
        let v = dot(d, r) * inv;
        v >= 0.0 && u + v <= 1.0 && {
            let t = dot(e2, r) * inv;
            t > NEAR && t < 1.0
        }
    })
}

impl Seen {
    /// A triangle given in the camera's frame; none when it is behind the camera or seen edge-on.
    fn new(corners: [[f32; 3]; 3], mesh: u32, index: u32) -> Option<Self> {
        let [a, b, c] = corners;
        if a[2].max(b[2]).max(c[2]) < NEAR_M {
            return None;
        }
        let bc = cross(b, c);
        let det = dot(a, bc);
        if det.abs() < 1e-9 {
            return None;
        }
        let inv = 1.0 / det;
        let edges = [scale(bc, inv), scale(cross(c, a), inv), scale(cross(a, b), inv)];
        let (mut u, mut v) = ([f32::MIN, f32::MAX], [f32::MIN, f32::MAX]);
        if a[2].min(b[2]).min(c[2]) >= NEAR_M {
            (u, v) = ([f32::MAX, f32::MIN], [f32::MAX, f32::MIN]);
            for p in corners {
                let inv = 1.0 / p[2];
                let (x, y) = (p[0] * inv, p[1] * inv);
                u = [u[0].min(x), u[1].max(x)];
                v = [v[0].min(y), v[1].max(y)];
            }
        }
        // In a frame with x right and y down, the front's corners turn against the clock.
        Some(Self { edges, u, v, mesh, index, facing: if det < 0.0 { 1.0 } else { -1.0 } })
    }
}

const FACE_NORMALS: [[f32; 3]; 6] =
    [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]];

/// Fast light on a wall with this normal.
fn wall_light(n: [f32; 3]) -> f32 {
    let side = if n[0] < -0.5 {
        0
    } else if n[1] < -0.5 {
        1
    } else if n[0] > 0.5 {
        2
    } else {
        3
    };
    WALL_LIGHT[side]
}

/// Fast light on an object's surface with this normal (map).
fn object_light(n: [f32; 3]) -> f32 {
    0.62 + 0.08 * n[2] + 0.38 * dot(n, LIGHT).max(0.0)
}

fn unit(v: [f32; 3]) -> [f32; 3] {
    scale(v, 1.0 / dot(v, v).sqrt().max(1e-12))
}

/// Whether the segment `o + t d`, t in (0, 1), meets the solid.
fn blocks(solid: &Solid, o: [f32; 3], d: [f32; 3]) -> bool {
    const NEAR: f32 = 1e-4;
    match *solid {
        Solid::Cuboid { min, max } => {
            let (mut t0, mut t1) = (NEAR, 1.0f32);
            for k in 0..3 {
                let inv = 1.0 / if d[k].abs() < 1e-9 { 1e-9 } else { d[k] };
                let (a, b) = ((min[k] - o[k]) * inv, (max[k] - o[k]) * inv);
                t0 = t0.max(a.min(b));
                t1 = t1.min(a.max(b));
            }
            t0 < t1
        }
        Solid::Ellipsoid { c, r } => {
            let p = [(o[0] - c[0]) / r[0], (o[1] - c[1]) / r[1], (o[2] - c[2]) / r[2]];
            let q = [d[0] / r[0], d[1] / r[1], d[2] / r[2]];
            let (a, b, c) = (dot(q, q), dot(p, q), dot(p, p) - 1.0);
            let disc = b * b - a * c;
            disc > 0.0 && {
                let s = disc.sqrt();
                let (t0, t1) = ((-b - s) / a, (-b + s) / a);
                (t0 > NEAR && t0 < 1.0) || (t0 <= NEAR && t1 > 0.02 && c < 0.0)
            }
        }
        Solid::Frustum { x, y, z0, z1, r0, r1 } => {
            let (t, _) = frustum_hit([o[0] - x, o[1] - y, o[2]], d, [z0, z1], [r0, r1]);
            t > NEAR && t < 1.0
        }
    }
}

/// First positive meeting of a ray with an upright frustum about the z axis: `t` and face (0 side, 4 bottom,
/// 5 top); `t` is 0 for none.
fn frustum_hit(o: [f32; 3], d: [f32; 3], z: [f32; 2], r: [f32; 2]) -> (f32, u32) {
    let k = (r[1] - r[0]) / (z[1] - z[0]);
    let ro = r[0] + k * (o[2] - z[0]);
    let a = d[0] * d[0] + d[1] * d[1] - k * k * d[2] * d[2];
    let b = o[0] * d[0] + o[1] * d[1] - k * d[2] * ro;
    let c = o[0] * o[0] + o[1] * o[1] - ro * ro;
    let mut best = (f32::INFINITY, 0);
    let disc = b * b - a * c;
    if disc >= 0.0 {
        let s = disc.sqrt();
        let a = if a.abs() < 1e-9 { 1e-9 } else { a };
        for t in [(-b - s) / a, (-b + s) / a] {
            let h = o[2] + t * d[2];
            if t > 1e-4 && t < best.0 && h >= z[0] && h <= z[1] {
                best = (t, 0);
            }
        }
    }
    for (h, radius, face) in [(z[0], r[0], 4), (z[1], r[1], 5)] {
        let t = (h - o[2]) / d[2];
        if t > 1e-4 && t < best.0 {
            let (px, py) = (o[0] + t * d[0], o[1] + t * d[1]);
            if px * px + py * py <= radius * radius {
                best = (t, face);
            }
        }
    }
    if best.0.is_finite() { best } else { (0.0, 0) }
}

impl Grid {
    /// Whether a sphere at `rel` (from the eye) may touch the view.
    fn may_see(&self, eye: &Eye, rel: [f32; 3], reach: f32) -> bool {
        let (x, y, z) = (dot(rel, eye.r), dot(rel, eye.d), dot(rel, eye.f));
        if z < -reach {
            return false;
        }
        let outside = |c: f32, edge: f32| {
            // Signed distance beyond the plane through the eye with this tangent.
            (c.abs() - z * edge) > reach * (1.0 + edge * edge).sqrt()
        };
        let (eu, ev) = (-self.u0 + self.du, -self.v0 + self.du);
        !outside(x, eu) && !outside(y, ev)
    }

    /// Samples that a box may cover: `[i0, i1) x [j0, j1)`.
    fn cover(&self, eye: &Eye, min: [f32; 3], max: [f32; 3]) -> Option<(usize, usize, usize, usize)> {
        let (mut u0, mut u1, mut v0, mut v1) = (f32::MAX, f32::MIN, f32::MAX, f32::MIN);
        for corner in 0..8 {
            let pick = |k: usize| if corner >> k & 1 == 0 { min[k] } else { max[k] } - eye.o[k];
            let rel = [pick(0), pick(1), pick(2)];
            let z = dot(rel, eye.f);
            if z < 0.02 {
                return Some((0, self.nx, 0, self.ny));
            }
            let (u, v) = (dot(rel, eye.r) / z, dot(rel, eye.d) / z);
            u0 = u0.min(u);
            u1 = u1.max(u);
            v0 = v0.min(v);
            v1 = v1.max(v);
        }
        let lo = |x: f32, first: f32, n: usize| {
            ((x - first) / self.du - 0.01).ceil().clamp(0.0, n as f32) as usize
        };
        let hi = |x: f32, first: f32, n: usize| {
            ((x - first) / self.du + 1.01).floor().clamp(0.0, n as f32) as usize
        };
        let (i0, i1) = (lo(u0, self.u0, self.nx), hi(u1, self.u0, self.nx));
        let (j0, j1) = (lo(v0, self.v0, self.ny), hi(v1, self.v0, self.ny));
        (i0 < i1 && j0 < j1).then_some((i0, i1, j0, j1))
    }
}

struct Buffer<'a> {
    grid: &'a Grid,
    w: &'a mut [f32],
    code: &'a mut [u32],
}

/// Narrows `[lo, hi]` to where `a + b i >= 0`.
fn clip(a: f32, b: f32, lo: &mut f32, hi: &mut f32) {
    if b > 1e-12 {
        *lo = lo.max(-a / b);
    } else if b < -1e-12 {
        *hi = hi.min(-a / b);
    } else if a < 0.0 {
        *hi = f32::NEG_INFINITY;
    }
}

impl Buffer<'_> {
    /// Floor, ceiling and outer walls, seen from inside: the nearest plane has the largest `w`.
    fn shell(&mut self, eye: &Eye, house: &House) {
        let g = self.grid;
        let b = &house.bounds;
        let inv = |plane: f64, o: f32| 1.0 / (plane as f32 - o);
        let (ex, wx) = (inv(b.x1, eye.o[0]), inv(b.x0, eye.o[0]));
        let (ny, sy) = (inv(b.y1, eye.o[1]), inv(b.y0, eye.o[1]));
        let (up, down) = (inv(CEILING_M, eye.o[2]), inv(0.0, eye.o[2]));
        let rows = self.w.chunks_exact_mut(g.nx).zip(self.code.chunks_exact_mut(g.nx));
        for (j, (w_row, code_row)) in rows.enumerate() {
            let v = g.v0 + j as f32 * g.du;
            let row = |k: usize| eye.f[k] + v * eye.d[k] + g.u0 * eye.r[k];
            let (bx, by, dz) = (row(0), row(1), row(2));
            let (rx, ry, rz) = (eye.r[0] * g.du, eye.r[1] * g.du, eye.r[2] * g.du);
            let level = |dz: f32| if dz < 0.0 { (dz * down, 0) } else { (dz * up, 1) };
            let along = level(dz);
            for (i, (w, code)) in w_row.iter_mut().zip(code_row.iter_mut()).enumerate() {
                let i = i as i32 as f32;
                let (dx, dy) = (bx + i * rx, by + i * ry);
                let (we, ww, wn, ws) = (dx * ex, dx * wx, dy * ny, dy * sy);
                // A camera without roll sees one level along a row.
                let (mut best, mut c) = if rz == 0.0 { along } else { level(dz + i * rz) };
                if we > best {
                    best = we;
                    c = 2;
                }
                if wn > best {
                    best = wn;
                    c = 3;
                }
                if ww > best {
                    best = ww;
                    c = 4;
                }
                if ws > best {
                    best = ws;
                    c = 5;
                }
                *w = best.max(1e-6);
                *code = c;
            }
        }
    }

    fn cuboid(&mut self, eye: &Eye, min: [f32; 3], max: [f32; 3], base: u32) {
        let g = self.grid;
        let Some((i0, i1, j0, j1)) = g.cover(eye, min, max) else {
            return;
        };
        for axis in 0..3 {
            let (plane, face) = if eye.o[axis] < min[axis] {
                (min[axis], 2 * axis)
            } else if eye.o[axis] > max[axis] {
                (max[axis], 2 * axis + 1)
            } else {
                continue;
            };
            let inv = 1.0 / (plane - eye.o[axis]);
            let (p, q) = ((axis + 1) % 3, (axis + 2) % 3);
            let edges = [
                (p, min[p] - eye.o[p], 1.0f32),
                (p, max[p] - eye.o[p], -1.0),
                (q, min[q] - eye.o[q], 1.0),
                (q, max[q] - eye.o[q], -1.0),
            ];
            let code = base + face as u32;
            for j in j0..j1 {
                let v = g.v0 + j as f32 * g.du;
                let start = |k: usize| eye.f[k] + v * eye.d[k] + g.u0 * eye.r[k];
                let step = |k: usize| eye.r[k] * g.du;
                let (wa, wb) = (start(axis) * inv, step(axis) * inv);
                let (mut lo, mut hi) = (i0 as f32, i1 as f32 - 1.0);
                clip(wa, wb, &mut lo, &mut hi);
                for (k, edge, sign) in edges {
                    clip(sign * (start(k) - edge * wa), sign * (step(k) - edge * wb), &mut lo, &mut hi);
                }
                if lo.is_nan() || hi.is_nan() || lo > hi + 2e-3 {
                    continue;
                }
                let from = (lo - 1e-3).ceil().max(0.0) as usize;
                let to = ((hi + 1e-3).floor() as usize + 1).min(g.nx);
                if from >= to {
                    continue;
                }
                let at = j * g.nx;
                let w_row = &mut self.w[at + from..at + to];
                let code_row = &mut self.code[at + from..at + to];
                let wa = wa + from as f32 * wb;
                for (i, (w, c)) in w_row.iter_mut().zip(code_row.iter_mut()).enumerate() {
                    let here = wa + i as i32 as f32 * wb;
                    let near = here > *w;
                    *w = if near { here } else { *w };
                    *c = if near { code } else { *c };
                }
            }
        }
    }

    fn triangle(&mut self, t: &Seen, code: u32) {
        let g = self.grid;
        let range = |ends: [f32; 2], first: f32, n: usize| {
            let lo = ((ends[0] - first) / g.du).ceil().clamp(0.0, n as f32) as usize;
            (lo, ((ends[1] - first) / g.du + 1.0).floor().clamp(0.0, n as f32) as usize)
        };
        let (i0, i1) = range(t.u, g.u0, g.nx);
        let (j0, j1) = range(t.v, g.v0, g.ny);
        if i0 >= i1 {
            return;
        }
        let steps = t.edges.map(|e| e[0] * g.du);
        let sum_step = steps[0] + steps[1] + steps[2];
        for j in j0..j1 {
            let v = g.v0 + j as f32 * g.du;
            let starts = t.edges.map(|e| e[0] * g.u0 + e[1] * v + e[2]);
            let (mut lo, mut hi) = (i0 as f32, i1 as f32 - 1.0);
            for k in 0..3 {
                clip(starts[k], steps[k], &mut lo, &mut hi);
            }
            if lo.is_nan() || hi.is_nan() || lo > hi + 2e-3 {
                continue;
            }
            let from = (lo - 1e-3).ceil().max(0.0) as usize;
            let to = ((hi + 1e-3).floor() as usize + 1).min(g.nx);
            if from >= to {
                continue;
            }
            let at = j * g.nx;
            let wa = starts[0] + starts[1] + starts[2] + from as f32 * sum_step;
            let row = self.w[at + from..at + to].iter_mut().zip(&mut self.code[at + from..at + to]);
            for (i, (w, c)) in row.enumerate() {
                let here = wa + i as i32 as f32 * sum_step;
                let near = here > *w;
                *w = if near { here } else { *w };
                *c = if near { code } else { *c };
            }
        }
    }

    fn frustum(&mut self, eye: &Eye, at: [f32; 2], z: [f32; 2], r: [f32; 2], base: u32) {
        let g = self.grid;
        let reach = r[0].max(r[1]);
        let min = [at[0] - reach, at[1] - reach, z[0]];
        let max = [at[0] + reach, at[1] + reach, z[1]];
        let Some((i0, i1, j0, j1)) = g.cover(eye, min, max) else {
            return;
        };
        let o = [eye.o[0] - at[0], eye.o[1] - at[1], eye.o[2]];
        for j in j0..j1 {
            let v = g.v0 + j as f32 * g.du;
            for i in i0..i1 {
                let u = g.u0 + i as f32 * g.du;
                let dir = |k: usize| eye.f[k] + v * eye.d[k] + u * eye.r[k];
                let (t, face) = frustum_hit(o, [dir(0), dir(1), dir(2)], z, r);
                let slot = j * g.nx + i;
                if t > 0.0 && 1.0 / t > self.w[slot] {
                    self.w[slot] = 1.0 / t;
                    self.code[slot] = base + face;
                }
            }
        }
    }

    fn ellipsoid(&mut self, eye: &Eye, c: [f32; 3], r: [f32; 3], base: u32) {
        let g = self.grid;
        let min = [c[0] - r[0], c[1] - r[1], c[2] - r[2]];
        let max = [c[0] + r[0], c[1] + r[1], c[2] + r[2]];
        let Some((i0, i1, j0, j1)) = g.cover(eye, min, max) else {
            return;
        };
        let over = |v: [f32; 3]| [v[0] / r[0], v[1] / r[1], v[2] / r[2]];
        let o = over([eye.o[0] - c[0], eye.o[1] - c[1], eye.o[2] - c[2]]);
        let (f, rt, dn) = (over(eye.f), over(eye.r), over(eye.d));
        let cc = dot(o, o) - 1.0;
        if cc <= 1e-6 {
            return;
        }
        let inv = 1.0 / cc;
        for j in j0..j1 {
            let v = g.v0 + j as f32 * g.du;
            let row = [f[0] + v * dn[0], f[1] + v * dn[1], f[2] + v * dn[2]];
            for i in i0..i1 {
                let u = g.u0 + i as f32 * g.du;
                let d = [row[0] + u * rt[0], row[1] + u * rt[1], row[2] + u * rt[2]];
                let (a, b) = (dot(d, d), dot(o, d));
                let disc = b * b - a * cc;
                if disc >= 0.0 && b < 0.0 {
                    let w = (disc.sqrt() - b) * inv;
                    let slot = j * g.nx + i;
                    if w > self.w[slot] {
                        self.w[slot] = w;
                        self.code[slot] = base;
                    }
                }
            }
        }
    }
}
