//! What makes a furnished room look lived in: textures of floors and walls, windows with the sun in them, pictures.

use crate::house::{House, Object, Rect, Room};
use mindseye_base::random::Rng;
use std::f32::consts::TAU;
use std::sync::OnceLock;

/// Side of a texture's square on a floor or wall, after which it repeats (m), and its texels per side.
pub(crate) const TILE_M: f32 = 2.4;
const TEXELS: usize = 256;
/// Kinds of floor and of wall.
pub(crate) const FLOORS: usize = 7;
pub(crate) const WALLS: usize = 7;
/// Height of panelling on walls that have it (m).
pub(crate) const PANEL_M: f32 = 0.95;
/// Different pictures, and their texels.
const PAINTINGS: usize = 24;
const PAINTING: (usize, usize) = (64, 48);

/// What hangs on, or opens in, a wall: at `s` along the wall (map x or y, m) and `z` above the floor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Panel {
    pub(crate) room: usize,
    /// 0 east, 1 north, 2 west, 3 south.
    pub(crate) side: usize,
    pub(crate) s: [f32; 2],
    pub(crate) z: [f32; 2],
    pub(crate) what: Hung,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Hung {
    Window,
    Picture(usize),
    /// Of a wall colour of the palette.
    Curtain(usize),
}

/// The look of one room.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RoomLook {
    pub(crate) floor: usize,
    pub(crate) walls: [usize; 4],
    pub(crate) panelled: bool,
    pub(crate) rug: Option<Rug>,
}

/// A rug on a floor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rug {
    middle: [f32; 2],
    half: [f32; 2],
    /// Wall colours of the palette: ground and pattern.
    pub(crate) colours: [usize; 2],
    pattern: usize,
}

impl Rug {
    fn draw(rng: &mut Rng, r: &Rect) -> Self {
        let (cx, cy) = r.centre();
        let half = [r.width(), r.depth()].map(|side| (side * rng.range(0.16, 0.24)) as f32);
        let middle = [cx + rng.range(-0.3, 0.3), cy + rng.range(-0.3, 0.3)].map(|v| v as f32);
        let first = rng.below(10);
        let colours = [first, (first + 1 + rng.below(9)) % 10];
        Self { middle, half, colours, pattern: rng.below(4) }
    }

    /// How much of the pattern's colour a place on the floor shows, and its brightness; none beside the rug.
    pub(crate) fn at(&self, x: f32, y: f32, foot: f32) -> Option<[f32; 2]> {
        let (dx, dy) = (x - self.middle[0], y - self.middle[1]);
        let edge = (self.half[0] - dx.abs()).min(self.half[1] - dy.abs());
        if edge < 0.0 {
            return None;
        }
        let wave = |v: f32| (v * TAU).sin();
        let pattern = match self.pattern {
            // Diamonds.
            0 => wave((dx + dy) * 2.2) * wave((dx - dy) * 2.2),
            // Stripes.
            1 => wave(dx * 3.0) + 0.4 * wave(dx * 9.0),
            // Frames in each other.
            2 => wave(edge * 3.5),
            // Medallions.
            _ => wave(dx * 1.6) + wave(dy * 1.6) + 0.5 * wave((dx * dx + dy * dy).sqrt() * 3.0),
        };
        let border = edge > 0.05 && edge < 0.16;
        // The pattern is finer than what coarse samples show.
        let sharp = 3.0 / (1.0 + 12.0 * foot);
        let tone = if border { 0.9 } else { (0.5 + sharp * pattern).clamp(0.0, 1.0) };
        let weave = if foot < 0.012 { 0.06 * wave(x * 60.0) * wave(y * 60.0) } else { 0.0 };
        Some([tone, 0.94 + weave])
    }
}

/// A window that the sun shines through.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sunny {
    room: usize,
    /// Coordinate across its wall: 0 for x.
    axis: usize,
    plane: f32,
    /// Along the wall: left end, middle bar, right end; then z.
    s: [f32; 4],
    z: [f32; 2],
}

/// Everything about a house's look beside its plain colours.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decor {
    pub(crate) rooms: Vec<RoomLook>,
    /// In the order of room and side.
    pub(crate) panels: Vec<Panel>,
    /// Direction to the sun (unit, map).
    pub(crate) sun: [f32; 3],
}

impl Decor {
    /// Draws the look of a house whose objects stand.
    pub(crate) fn draw(rng: &mut Rng, bounds: &Rect, rooms: &[Room], objects: &[Object]) -> Self {
        let mut looks = Vec::new();
        let mut panels: Vec<Panel> = Vec::new();
        for (index, room) in rooms.iter().enumerate() {
            let (most, accent) = (rng.below(WALLS), rng.below(WALLS));
            let mut walls = [most; 4];
            walls[rng.below(4)] = accent;
            let floor = rng.below(FLOORS);
            let panelled = rng.chance(0.3);
            let rug = rng.chance(0.7).then(|| Rug::draw(rng, &room.rect));
            looks.push(RoomLook { floor, walls, panelled, rug });
            for side in 0..4 {
                let outer = is_outer(&room.rect, side, bounds);
                hang(rng, index, room, side, outer, objects, &mut panels);
            }
        }
        // The sun stands before one of the windows.
        let windows: Vec<&Panel> = panels.iter().filter(|p| p.what == Hung::Window).collect();
        let outward = match windows.len() {
            0 => rng.range(0.0, std::f64::consts::TAU),
            n => windows[rng.below(n)].side as f64 * std::f64::consts::FRAC_PI_2,
        };
        let azimuth = (outward + rng.range(-0.9, 0.9)) as f32;
        let elevation = rng.range(0.45, 0.85) as f32;
        let level = elevation.cos();
        let sun = [level * azimuth.cos(), level * azimuth.sin(), elevation.sin()];
        Self { rooms: looks, panels, sun }
    }

    /// The windows that the sun shines through.
    pub(crate) fn sunny(&self, rooms: &[Room]) -> impl Iterator<Item = Sunny> {
        let windows = self.panels.iter().filter(|p| p.what == Hung::Window);
        windows.filter_map(move |w| {
            let axis = w.side & 1;
            let r = &rooms.get(w.room)?.rect;
            let plane = [r.x1, r.y1, r.x0, r.y0][w.side] as f32;
            let bar = 0.3 * FRAME_M;
            let middle = (w.s[0] + w.s[1]) * 0.5;
            let outward = if w.side < 2 { self.sun[axis] } else { -self.sun[axis] };
            (outward > 0.02).then_some(Sunny {
                room: w.room,
                axis,
                plane,
                s: [w.s[0] + FRAME_M, middle - bar, middle + bar, w.s[1] - FRAME_M],
                z: [w.z[0] + FRAME_M, w.z[1] - FRAME_M],
            })
        })
    }
}

impl Sunny {
    /// Share of the sun's disc that is seen through the window from a point in a room.
    pub(crate) fn lights(&self, sun: [f32; 3], room: usize, p: [f32; 3]) -> f32 {
        let t = (self.plane - p[self.axis]) / sun[self.axis];
        if t <= 0.0 || room != self.room {
            return 0.0;
        }
        let z = p[2] + t * sun[2];
        let soft = 0.012 + 0.012 * t;
        if z < self.z[0] - soft || z > self.z[1] + soft {
            return 0.0;
        }
        let s = p[1 - self.axis] + t * sun[1 - self.axis];
        let inv = 1.0 / soft;
        let within = |v: f32, lo: f32, hi: f32| {
            ((v - lo) * inv + 0.5).clamp(0.0, 1.0) * ((hi - v) * inv + 0.5).clamp(0.0, 1.0)
        };
        (within(s, self.s[0], self.s[1]) + within(s, self.s[2], self.s[3])) * within(z, self.z[0], self.z[1])
    }
}

/// Width of a window's frame (m).
pub(crate) const FRAME_M: f32 = 0.06;

fn is_outer(r: &Rect, side: usize, bounds: &Rect) -> bool {
    let gap = [r.x1 - bounds.x1, r.y1 - bounds.y1, r.x0 - bounds.x0, r.y0 - bounds.y0];
    gap[side].abs() < 1e-6
}

/// Hangs windows (in outer walls) and pictures where no furniture covers them.
fn hang(
    rng: &mut Rng,
    index: usize,
    room: &Room,
    side: usize,
    outer: bool,
    objects: &[Object],
    panels: &mut Vec<Panel>,
) {
    let r = &room.rect;
    let along_y = side & 1 == 0;
    let (lo, hi) = if along_y { (r.y0, r.y1) } else { (r.x0, r.x1) };
    // How far something reaches into the room before this wall, and how high.
    let covered = |s: [f64; 2], z: f64| {
        objects.iter().filter(|o| o.room == index).any(|o| {
            let (from_wall, at) = match side {
                0 => (r.x1 - o.x, o.y),
                1 => (r.y1 - o.y, o.x),
                2 => (o.x - r.x0, o.y),
                _ => (o.y - r.y0, o.x),
            };
            from_wall < o.radius + 0.35 && o.size[2] > z && at + o.radius > s[0] && at - o.radius < s[1]
        })
    };
    let mut taken: Vec<[f64; 2]> = Vec::new();
    let mut fits = |rng: &mut Rng, width: f64, z: f64| {
        for _ in 0..12 {
            if hi - lo < width + 0.6 {
                return None;
            }
            let from = rng.range(lo + 0.3, hi - 0.3 - width);
            let s = [from, from + width];
            let free = taken.iter().all(|t| s[1] + 0.25 < t[0] || s[0] - 0.25 > t[1]);
            if free && !covered(s, z) {
                taken.push(s);
                return Some([s[0] as f32, s[1] as f32]);
            }
        }
        None
    };
    let mut hang = |s: [f32; 2], z: [f32; 2], what| panels.push(Panel { room: index, side, s, z, what });
    if outer && rng.chance(0.65) {
        let width = rng.range(1.0, 1.7);
        let curtains = rng.chance(0.6);
        let drape = if curtains { 0.28f32 } else { 0.0 };
        if let Some(s) = fits(rng, width + 2.0 * f64::from(drape), 0.9) {
            let z = [rng.range(0.8, 0.95) as f32, rng.range(2.0, 2.2) as f32];
            hang([s[0] + drape, s[1] - drape], z, Hung::Window);
            if curtains {
                let colour = rng.below(10);
                for s in [[s[0], s[0] + drape + 0.06], [s[1] - drape - 0.06, s[1]]] {
                    hang(s, [0.06, 2.3], Hung::Curtain(colour));
                }
            }
        }
    }
    for _ in 0..rng.below(3) {
        let width = rng.range(0.45, 1.0);
        let height = width * if rng.chance(0.3) { 1.25 } else { 0.75 };
        let middle = rng.range(1.45, 1.6);
        if let Some(s) = fits(rng, width, middle - height * 0.5) {
            let z = [(middle - height * 0.5) as f32, (middle + height * 0.5) as f32];
            hang(s, z, Hung::Picture(rng.below(PAINTINGS)));
        }
    }
}

// ---------------------------------------------------------------------------------------------------- textures

/// Two values per texel, with coarser copies: where between a surface's two colours it is, and its brightness.
#[derive(Debug)]
pub(crate) struct Texture {
    levels: Vec<Vec<[u8; 2]>>,
}

impl Texture {
    fn new(texel: impl Fn(f32, f32) -> [f32; 2]) -> Self {
        let k = TILE_M / TEXELS as f32;
        let mut finest = Vec::with_capacity(TEXELS * TEXELS);
        for y in 0..TEXELS {
            for x in 0..TEXELS {
                // Edges of joints are smoothed.
                let mut sum = [0.0f32; 2];
                for (dx, dy) in [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)] {
                    let t = texel((x as f32 + dx) * k, (y as f32 + dy) * k);
                    sum = [sum[0] + t[0] * 0.25, sum[1] + t[1] * 0.25];
                }
                finest.push([
                    (sum[0].clamp(0.0, 1.0) * 255.0 + 0.5) as u8,
                    (sum[1] * 128.0 + 0.5).clamp(0.0, 255.0) as u8,
                ]);
            }
        }
        let mut levels = vec![finest];
        let mut side = TEXELS;
        while side > 1 {
            let fine = &levels[levels.len() - 1];
            let half = side / 2;
            let coarse = (0..half * half)
                .map(|k| {
                    let (x, y) = (2 * (k % half), 2 * (k / half));
                    let at = |x: usize, y: usize| fine[y * side + x].map(u16::from);
                    let four = [at(x, y), at(x + 1, y), at(x, y + 1), at(x + 1, y + 1)];
                    [0, 1].map(|c| ((four.iter().map(|t| t[c]).sum::<u16>() + 2) / 4) as u8)
                })
                .collect();
            levels.push(coarse);
            side = half;
        }
        Self { levels }
    }

    /// Tone (0 to 1) and brightness (1 is the mean) at a place (m), where a sample measures `foot` (m).
    pub(crate) fn at(&self, x: f32, y: f32, foot: f32) -> [f32; 2] {
        let texel = TILE_M / TEXELS as f32;
        // The exponent of a number is its logarithm rounded down.
        let exponent = (foot * (1.0 / texel)).max(1.0).to_bits() >> 23;
        let level = (exponent as usize - 127).min(self.levels.len() - 1);
        let side = TEXELS >> level;
        let scale = side as f32 / TILE_M;
        // Places are within some metres of the origin: shifted by whole tiles they are not negative.
        let (fx, fy) = (x * scale + (64 * side) as f32 - 0.5, y * scale + (64 * side) as f32 - 0.5);
        let (ix, iy) = (fx as usize, fy as usize);
        let (tx, ty) = (fx - ix as f32, fy - iy as f32);
        let mask = side - 1;
        let level = &self.levels[level];
        let at = |dx: usize, dy: usize| level[((iy + dy) & mask) * side + ((ix + dx) & mask)].map(f32::from);
        let (a, b, c, d) = (at(0, 0), at(1, 0), at(0, 1), at(1, 1));
        let blend = |k: usize| {
            let top = a[k] + (b[k] - a[k]) * tx;
            top + (c[k] + (d[k] - c[k]) * tx - top) * ty
        };
        [blend(0) * (1.0 / 255.0), blend(1) * (1.0 / 128.0)]
    }
}

fn hash(a: i32, b: i32, salt: u32) -> f32 {
    let mut h = (a as u32).wrapping_mul(0x9e37_79b1) ^ (b as u32).wrapping_mul(0x85eb_ca6b) ^ salt;
    h ^= h >> 15;
    h = h.wrapping_mul(0x2c1b_3c6d);
    h ^= h >> 12;
    h = h.wrapping_mul(0x297a_2d39);
    h ^= h >> 15;
    (h & 0xffff) as f32 / 65_536.0
}

/// Smooth noise of `nx` by `ny` cells a tile, 0 to 1, that repeats with the tile.
fn noise(x: f32, y: f32, nx: i32, ny: i32, salt: u32) -> f32 {
    let (fx, fy) = (x / TILE_M * nx as f32, y / TILE_M * ny as f32);
    let (ix, iy) = (fx.floor() as i32, fy.floor() as i32);
    let ease = |f: f32| f * f * (3.0 - 2.0 * f);
    let (tx, ty) = (ease(fx - ix as f32), ease(fy - iy as f32));
    let at = |i: i32, j: i32| hash((ix + i).rem_euclid(nx), (iy + j).rem_euclid(ny), salt);
    let top = at(0, 0) + (at(1, 0) - at(0, 0)) * tx;
    let low = at(0, 1) + (at(1, 1) - at(0, 1)) * tx;
    top + (low - top) * ty
}

/// Noise of several sizes.
fn cloud(x: f32, y: f32, cells: i32, salt: u32) -> f32 {
    let at = |k: u32| noise(x, y, cells << k, cells << k, salt + k);
    (at(0) + 0.5 * at(1) + 0.25 * at(2) + 0.125 * at(3)) / 1.875
}

/// Wood: rings drawn out along x.
fn wood(x: f32, y: f32, salt: u32) -> f32 {
    let fine = noise(x, y, 6, 240, salt);
    let bend = noise(x, y, 8, 24, salt + 1);
    0.6 * fine + 0.4 * (0.5 + 0.5 * ((y * 40.0 + bend * 5.0) * TAU * 0.3).sin())
}

/// A floor's tone and brightness at a place (m).
fn floor_texel(kind: usize, x: f32, y: f32) -> [f32; 2] {
    let joint = |d: f32, half: f32| if d < half { 0.72 } else { 1.0 };
    let cell = |v: f32, size: f32| ((v / size).floor() as i32, v - (v / size).floor() * size);
    let edge = |f: f32, size: f32| f.min(size - f);
    match kind {
        // Boards, 12 cm wide and 1.2 m long.
        0 => {
            let (row, fy) = cell(y, 0.12);
            let (piece, fx) = cell(x + 1.2 * hash(row, 3, 1), 1.2);
            let tone = hash(row, piece.rem_euclid(2), 2);
            let grain = wood(x, y + 0.37 * tone, 5);
            [
                0.25 + 0.5 * tone + 0.4 * (grain - 0.5),
                joint(edge(fy, 0.12), 0.003) * joint(edge(fx, 1.2), 0.003),
            ]
        }
        // Parquet: squares of four strips, crosswise.
        1 => {
            let ((i, fx), (j, fy)) = (cell(x, 0.4), cell(y, 0.4));
            let (along, across, fa) = if (i + j) & 1 == 0 { (x, y, fy) } else { (y, x, fx) };
            let (strip, fs) = cell(fa, 0.1);
            let tone = hash(i * 4 + strip, j, 7);
            let grain = wood(along, across, 9);
            let square = joint(edge(fx, 0.4).min(edge(fy, 0.4)), 0.003);
            [0.3 + 0.4 * tone + 0.35 * (grain - 0.5), square * joint(edge(fs, 0.1), 0.002)]
        }
        // Stone tiles.
        2 => {
            let ((i, fx), (j, fy)) = (cell(x, 0.4), cell(y, 0.4));
            let grout = edge(fx, 0.4).min(edge(fy, 0.4)) < 0.006;
            let vein = cloud(x, y, 6, 11);
            let tone = if grout { 1.0 } else { 0.15 * hash(i, j, 12) + 0.5 * (vein - 0.2) };
            [tone, if grout { 0.8 } else { 0.94 + 0.12 * cloud(x, y, 20, 13) }]
        }
        // Checkered tiles.
        3 => {
            let ((i, fx), (j, fy)) = (cell(x, 0.3), cell(y, 0.3));
            let grout = edge(fx, 0.3).min(edge(fy, 0.3)) < 0.004;
            let tone = if (i + j) & 1 == 0 { 0.05 } else { 0.95 };
            [tone + 0.12 * (cloud(x, y, 8, 15) - 0.5), if grout { 0.75 } else { 1.0 }]
        }
        // Carpet.
        4 => {
            let pile = noise(x, y, 120, 120, 17);
            let worn = cloud(x, y, 4, 18);
            [0.3 + 0.4 * worn + 0.3 * (pile - 0.5), 0.82 + 0.36 * pile]
        }
        // Bricks of earthenware.
        5 => {
            let (row, fy) = cell(y, 0.15);
            let (piece, fx) = cell(x + 0.15 * (row & 1) as f32, 0.3);
            let grout = edge(fy, 0.15).min(edge(fx, 0.3)) < 0.005;
            let tone = hash(row, piece.rem_euclid(8), 21);
            [
                if grout { 0.0 } else { 0.2 + 0.8 * tone },
                if grout { 1.08 } else { 0.9 + 0.2 * cloud(x, y, 24, 22) },
            ]
        }
        // Marble.
        _ => {
            let bend = cloud(x, y, 5, 25);
            let vein = (1.0 - (TAU * (1.5 * bend + noise(x, y, 3, 3, 26))).sin().abs()).powi(6);
            [0.25 * cloud(x, y, 3, 27) + 0.75 * vein, 0.97 + 0.06 * bend]
        }
    }
}

/// A wall's tone and brightness at a place (m): along the wall, and above the floor.
fn wall_texel(kind: usize, x: f32, y: f32) -> [f32; 2] {
    let cell = |v: f32, size: f32| ((v / size).floor() as i32, v - (v / size).floor() * size);
    let plaster = |salt: u32| 0.95 + 0.1 * cloud(x, y, 10, salt);
    let smooth = |v: f32, at: f32, soft: f32| ((v - at) / soft + 0.5).clamp(0.0, 1.0);
    match kind {
        // Plaster.
        0 => [0.25 * cloud(x, y, 5, 31), 0.9 + 0.2 * cloud(x, y, 16, 32)],
        // Wallpaper: medallions in a lattice.
        1 => {
            let (row, fy) = cell(y, 0.24);
            let (_, fx) = cell(x + 0.12 * (row & 1) as f32, 0.24);
            let (u, v) = ((fx - 0.12) / 0.12, (fy - 0.12) / 0.12);
            let (r, a) = (u.hypot(v), v.atan2(u));
            let petal = 0.42 + 0.2 * (4.0 * a).cos();
            let ring = (r - 0.82).abs() < 0.05;
            let tone = smooth(petal, r, 0.06) - smooth(0.16, r, 0.05) + if ring { 0.5 } else { 0.0 };
            [tone, plaster(33)]
        }
        // Stripes.
        2 => {
            let (_, fx) = cell(x, 0.24);
            let thin = (fx - 0.18).abs() < 0.008;
            [if thin { 1.0 } else { 0.6 * smooth(0.12, fx, 0.01) }, plaster(34)]
        }
        // Bricks.
        3 => {
            let (row, fy) = cell(y, 0.08);
            let (piece, fx) = cell(x + 0.12 * (row & 1) as f32, 0.24);
            let joint = fy < 0.009 || fx < 0.009;
            let tone = hash(row.rem_euclid(30), piece.rem_euclid(10), 35);
            [
                if joint { 0.9 } else { 0.5 * tone },
                if joint { 1.08 } else { 0.78 + 0.25 * tone + 0.2 * (cloud(x, y, 40, 36) - 0.5) },
            ]
        }
        // Upright boards.
        4 => {
            let (board, fx) = cell(x, 0.15);
            let groove = fx < 0.007;
            let tone = hash(board.rem_euclid(16), 1, 37);
            [0.3 * tone + 0.4 * wood(y, x, 38), if groove { 0.7 } else { 0.92 + 0.1 * tone }]
        }
        // Rough stone or concrete.
        5 => [0.8 * cloud(x, y, 7, 39), 0.8 + 0.4 * cloud(x, y, 28, 40)],
        // Small flowers, scattered.
        _ => {
            let ((i, fx), (j, fy)) = (cell(x, 0.16), cell(y, 0.16));
            let (ci, cj) = (i.rem_euclid(15), j.rem_euclid(15));
            let (cx, cy) = (0.05 + 0.06 * hash(ci, cj, 41), 0.05 + 0.06 * hash(ci, cj, 42));
            let (dx, dy) = (fx - cx, fy - cy);
            let (r, a) = (dx.hypot(dy), dy.atan2(dx));
            let petal = 0.022 + 0.012 * (5.0 * a + 6.0 * hash(ci, cj, 43)).cos();
            [smooth(petal, r, 0.006) - 0.7 * smooth(0.008, r, 0.004), plaster(44)]
        }
    }
}

/// The texture of a floor.
pub(crate) fn floor_texture(kind: usize) -> &'static Texture {
    static MADE: [OnceLock<Texture>; FLOORS] = [const { OnceLock::new() }; FLOORS];
    MADE[kind % FLOORS].get_or_init(|| Texture::new(|x, y| floor_texel(kind % FLOORS, x, y)))
}

/// The texture of a wall.
pub(crate) fn wall_texture(kind: usize) -> &'static Texture {
    static MADE: [OnceLock<Texture>; WALLS] = [const { OnceLock::new() }; WALLS];
    MADE[kind % WALLS].get_or_init(|| Texture::new(|x, y| wall_texel(kind % WALLS, x, y)))
}

// ---------------------------------------------------------------------------------------------------- pictures

/// The colour of a picture at (s, t) from its lower left corner, 0 to 1; `fine` is false where a sample covers several
/// texels.
pub(crate) fn painting(index: usize, s: f32, t: f32, fine: bool) -> [f32; 3] {
    static MADE: OnceLock<Vec<[Vec<[u8; 3]>; 2]>> = OnceLock::new();
    let made = MADE.get_or_init(|| (0..PAINTINGS).map(paint).collect());
    let [whole, coarse] = &made[index % PAINTINGS];
    let (texels, (w, h)) = if fine { (whole, PAINTING) } else { (coarse, (PAINTING.0 / 4, PAINTING.1 / 4)) };
    let place = |v: f32, n: usize| ((v * n as f32).max(0.0) as usize).min(n - 1);
    texels[place(1.0 - t, h) * w + place(s, w)].map(f32::from)
}

fn blend(a: [f32; 3], b: [f32; 3], k: f32) -> [f32; 3] {
    [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * k.clamp(0.0, 1.0))
}

/// A colour whose parts are between `lo` and `hi`.
fn between(rng: &mut Rng, lo: f64, hi: f64) -> [f32; 3] {
    [0, 1, 2].map(|_| rng.range(lo, hi) as f32)
}

/// Paints a picture: landscapes, still lifes of circles, blocks of colour, waves. In two sizes.
fn paint(index: usize) -> [Vec<[u8; 3]>; 2] {
    let mut rng = Rng::new(0x9a11_0000 + index as u64);
    let (w, h) = PAINTING;
    let mut out = vec![[0.0f32; 3]; w * h];
    match index % 4 {
        0 => landscape(&mut out, &mut rng),
        1 => circles(&mut out, &mut rng),
        2 => blocks(&mut out, &mut rng),
        _ => waves(&mut out, &mut rng),
    }
    let byte = |p: &[f32; 3]| p.map(|v| (v + 0.5).clamp(0.0, 255.0) as u8);
    let coarse = (0..w * h / 16)
        .map(|k| {
            let (x, y) = (4 * (k % (w / 4)), 4 * (k / (w / 4)));
            let mut sum = [0.0f32; 3];
            for (dx, dy) in (0..16).map(|n| (n % 4, n / 4)) {
                let p = out[(y + dy) * w + x + dx];
                (0..3).for_each(|c| sum[c] += p[c] / 16.0);
            }
            byte(&sum)
        })
        .collect();
    [out.iter().map(byte).collect(), coarse]
}

fn landscape(out: &mut [[f32; 3]], rng: &mut Rng) {
    let (w, h) = PAINTING;
    let (sky, low) = (between(rng, 110.0, 240.0), between(rng, 180.0, 255.0));
    let sun = [rng.range(0.2, 0.8) as f32, rng.range(0.5, 0.85) as f32, rng.range(0.04, 0.1) as f32];
    let hills: Vec<([f32; 3], f32, f32, f32)> = (0..4)
        .map(|k| {
            let height = 0.55 - 0.13 * k as f32;
            (between(rng, 30.0, 150.0), height, rng.range(2.0, 7.0) as f32, rng.range(0.0, 6.0) as f32)
        })
        .collect();
    for (k, p) in out.iter_mut().enumerate() {
        let (x, y) = ((k % w) as f32 / w as f32, 1.0 - (k / w) as f32 / h as f32);
        *p = blend(low, sky, y * 1.4 - 0.4);
        if (x - sun[0]).hypot((y - sun[1]) * 0.75) < sun[2] {
            *p = [255.0, 244.0, 190.0];
        }
        for (colour, height, rate, phase) in &hills {
            let edge = height + 0.08 * (rate * x + phase).sin() + 0.03 * (3.1 * rate * x + phase).sin();
            if y < edge {
                *p = blend(*colour, low, 0.5 - (edge - y) * 2.0);
            }
        }
    }
}

fn circles(out: &mut [[f32; 3]], rng: &mut Rng) {
    let (w, h) = PAINTING;
    let ground = between(rng, 150.0, 245.0);
    out.fill(ground);
    for _ in 0..9 {
        let colour = between(rng, 20.0, 250.0);
        let c = [rng.range(0.1, 0.9) as f32, rng.range(0.1, 0.9) as f32];
        let (r, hollow) = (rng.range(0.05, 0.26) as f32, rng.chance(0.3));
        for (k, p) in out.iter_mut().enumerate() {
            let d = ((k % w) as f32 / w as f32 - c[0]).hypot(((k / w) as f32 / h as f32 - c[1]) * 0.75);
            if d < r && !(hollow && d < 0.7 * r) {
                *p = blend(colour, [255.0; 3], 0.3 * (1.0 - d / r));
            }
        }
    }
}

fn blocks(out: &mut [[f32; 3]], rng: &mut Rng) {
    const GROUND: [f32; 3] = [236.0, 232.0, 220.0];
    let (w, h) = PAINTING;
    let mut parts = vec![[0usize, 0, w, h]];
    for _ in 0..7 {
        let k = (0..parts.len()).max_by_key(|k| parts[*k][2] * parts[*k][3]).unwrap_or(0);
        let [x, y, pw, ph] = parts.swap_remove(k);
        let share = rng.range(0.25, 0.75);
        if pw * 3 > ph * 4 {
            let cut = ((pw as f64 * share) as usize).max(1);
            parts.extend([[x, y, cut, ph], [x + cut, y, pw - cut, ph]]);
        } else {
            let cut = ((ph as f64 * share) as usize).max(1);
            parts.extend([[x, y, pw, cut], [x, y + cut, pw, ph - cut]]);
        }
    }
    for [x, y, pw, ph] in parts {
        let colour = if rng.chance(0.6) { between(rng, 25.0, 250.0) } else { GROUND };
        for j in y..y + ph {
            for i in x..x + pw {
                let line = i < x + 2 || j < y + 2;
                out[j * w + i] = if line { [28.0; 3] } else { colour };
            }
        }
    }
}

fn waves(out: &mut [[f32; 3]], rng: &mut Rng) {
    let (w, h) = PAINTING;
    let colours: Vec<[f32; 3]> = (0..5).map(|_| between(rng, 25.0, 245.0)).collect();
    let (rate, phase) = (rng.range(4.0, 11.0) as f32, rng.range(0.0, 6.0) as f32);
    for (k, p) in out.iter_mut().enumerate() {
        let (x, y) = ((k % w) as f32 / w as f32, (k / w) as f32 / h as f32);
        let band = y * 4.6 + 0.45 * (rate * x + phase).sin() + 0.2 * (2.3 * rate * x).sin();
        let i = band.max(0.0);
        *p = blend(colours[i as usize % 5], colours[(i as usize + 1) % 5], (i.fract() - 0.8) * 5.0);
    }
}

/// What is seen through a window in a direction (map): sky, clouds, hills, grass. 0 to 255.
pub(crate) fn outside(d: [f32; 3]) -> [f32; 3] {
    let level = d[0].hypot(d[1]).max(1e-6);
    let rise = d[2] / level;
    let azimuth = d[1].atan2(d[0]) / TAU + 0.5;
    let at = |cells: i32, salt: u32| noise(azimuth * TILE_M, 0.0, cells, 1, salt);
    let hill = 0.03 + 0.10 * at(9, 51) + 0.05 * at(31, 52);
    let near = -0.04 + 0.07 * at(60, 53);
    let mix = |a: [f32; 3], b: [f32; 3], k: f32| [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * k.clamp(0.0, 1.0));
    if rise < near {
        mix([104.0, 142.0, 74.0], [150.0, 176.0, 104.0], -rise * 1.6)
    } else if rise < hill {
        mix([118.0, 146.0, 128.0], [150.0, 172.0, 164.0], (rise - near) * 6.0)
    } else {
        let sky = mix([214.0, 232.0, 246.0], [126.0, 178.0, 236.0], rise * 1.6);
        let cloud =
            noise(azimuth * TILE_M, rise, 14, 8, 54) + 0.5 * noise(azimuth * TILE_M, rise, 40, 22, 55);
        mix(sky, [250.0, 252.0, 255.0], (cloud - 0.75) * 2.5)
    }
}

/// The look of a house's rooms, drawn from its seed; none for plain ones.
pub(crate) fn decorate(house: &House) -> Decor {
    let mut rng = Rng::new(house.seed ^ 0xdec0_7a7e);
    Decor::draw(&mut rng, &house.bounds, &house.rooms, &house.objects)
}
