//! Reduction of large models to furniture: what cannot be seen is dropped, edges are collapsed by quadric error
//! (Garland and Heckbert 1997), and the colours of the original are laid on the triangles that are left.

use crate::furniture::{Model, Paint, Source, Triangle, corner_normals, cross, dot, lattice_len, sub};
use crate::house::Shape;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// What a surface of an original looks like.
#[derive(Debug, Clone, Default)]
pub struct Material {
    /// Its name.
    pub name: String,
    /// Colour where there is no texture (sRGB).
    pub colour: [u8; 3],
    /// Width, height and RGB8 rows of its texture.
    pub texture: Option<(usize, usize, Vec<u8>)>,
    /// Never takes the object's colour.
    pub fixed: bool,
}

/// A triangle of an original.
#[derive(Debug, Clone, Copy)]
pub struct Face {
    /// Indices of its vertices.
    pub vertices: [u32; 3],
    /// Texture coordinates of its corners, v upwards.
    pub uv: [[f32; 2]; 3],
    /// Index of its material.
    pub material: usize,
}

/// An original model in the object's frame (m): x to the front, z up, standing on the floor.
#[derive(Debug, Clone, Default)]
pub struct Original {
    /// Vertices.
    pub points: Vec<[f32; 3]>,
    /// Triangles.
    pub faces: Vec<Face>,
    /// Materials.
    pub materials: Vec<Material>,
}

/// Why a model cannot be reduced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReduceError {
    /// Nothing of it can be seen.
    #[error("nothing of it can be seen: {faces} triangles, none with area")]
    Empty {
        /// Triangles of the original.
        faces: usize,
    },
}

/// Side of a direction's picture (pixels) and number of directions.
const SIDE: usize = 288;
const DIRECTIONS: usize = 44;
/// Distance of colour samples on a triangle (m), and most steps per side.
const SPACING_M: f32 = 0.03;
const STEPS_MAX: usize = 60;
/// Share of the visible surface that takes the object's colour, at least, if so much may.
const TINTED_SHARE: f64 = 0.85;

/// Reduces an original to about `triangles` triangles.
///
/// # Errors
/// Nothing of it can be seen.
pub fn reduce(
    original: &Original,
    kind: Shape,
    source: Source,
    triangles: usize,
) -> Result<Model, ReduceError> {
    let views = Views::of(original);
    let faces: Vec<Face> =
        original.faces.iter().zip(&views.seen).filter(|(_, n)| **n > 0).map(|(f, _)| *f).collect();
    let empty = ReduceError::Empty { faces: original.faces.len() };
    if faces.is_empty() {
        return Err(empty);
    }
    let (points, corners) = collapse(original, &faces, triangles);
    if corners.is_empty() {
        return Err(empty);
    }
    let tinted = tinted(original, &views.seen);
    let nearest = Nearest::new(original, &faces);
    let mut colours = Vec::new();
    let mut out = Vec::new();
    for t in &corners {
        let p = t.map(|v| points[v as usize]);
        let n = cross(sub(p[1], p[0]), sub(p[2], p[0]));
        let long = (0..3).map(|k| dot(sub(p[k], p[(k + 1) % 3]), sub(p[k], p[(k + 1) % 3])).sqrt());
        let steps = (long.fold(0.0, f32::max) / SPACING_M).ceil().clamp(1.0, STEPS_MAX as f32) as u8;
        let mut mine: Vec<(usize, [f32; 3])> = weights(steps)
            .map(|w| {
                // A little inside, so that neighbours' colours do not bleed.
                let w = w.map(|w| 0.04 / 3.0 + 0.96 * w);
                let at = std::array::from_fn(|k| (0..3).map(|c| w[c] * p[c][k]).sum());
                nearest.colour(at, n)
            })
            .collect();
        let first = mine[0];
        let even = mine.iter().all(|c| c.0 == first.0 && (0..3).all(|k| (c.1[k] - first.1[k]).abs() < 6.0));
        if even {
            mine.truncate(1);
        }
        out.push((t.map(|v| v as u16), if even { 0 } else { steps }));
        colours.extend(mine);
    }
    let (paints, lattice) = paints(&colours, &tinted);
    let mut at = 0;
    let triangles: Vec<Triangle> = out
        .into_iter()
        .map(|(vertices, steps)| {
            let first = at as u32;
            at += lattice_len(steps);
            Triangle { vertices, steps, first }
        })
        .collect();
    let normals = corner_normals(&points, &triangles);
    let open = views.openness(&points, &triangles);
    let extent = [0, 1, 2].map(|k| {
        let reach = points.iter().map(|p| p[k].abs()).fold(0.01f32, f32::max);
        if k < 2 { 2.0 * reach } else { reach }
    });
    Ok(Model { kind, source, extent, points, open, paints, triangles, lattice, normals })
}

/// Barycentric weights of a lattice's samples, in the file's order.
fn weights(steps: u8) -> impl Iterator<Item = [f32; 3]> {
    let n = u16::from(steps.max(1));
    (0..=n).flat_map(move |i| {
        (0..=i).map(move |j| {
            let n = f32::from(n);
            let (a, c) = (1.0 - f32::from(i) / n, f32::from(j) / n);
            [a, 1.0 - a - c, c]
        })
    })
}

/// Which materials take the object's colour: the largest in sight, until they make up [`TINTED_SHARE`].
fn tinted(original: &Original, seen: &[u32]) -> Vec<bool> {
    let mut share = vec![0.0f64; original.materials.len()];
    for (f, n) in original.faces.iter().zip(seen) {
        share[f.material] += f64::from(*n);
    }
    let all: f64 = share.iter().sum();
    let mut order: Vec<usize> = (0..share.len()).filter(|m| !original.materials[*m].fixed).collect();
    order.sort_by(|a, b| share[*b].total_cmp(&share[*a]).then(a.cmp(b)));
    let (mut out, mut sum) = (vec![false; share.len()], 0.0);
    for m in order {
        if sum >= TINTED_SHARE * all {
            break;
        }
        out[m] = true;
        sum += share[m];
    }
    out
}

/// A palette of at most 256 colours for samples (material, colour), and each sample's place in it.
fn paints(samples: &[(usize, [f32; 3])], tinted: &[bool]) -> (Vec<Paint>, Vec<u8>) {
    let light = |c: [f32; 3]| 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2];
    let mut lights: Vec<f32> = samples.iter().filter(|(m, _)| tinted[*m]).map(|(_, c)| light(*c)).collect();
    lights.sort_by(f32::total_cmp);
    let middle = lights.get(lights.len() / 2).copied().unwrap_or(128.0).max(12.0);
    // Tinted: 32 brightnesses. Own: the most frequent of 4 bits a channel, the others go to the nearest.
    const GAINS: usize = 32;
    let gain = |c: [f32; 3]| 0.45 + 1.0 * (light(c) / (2.0 * middle)).clamp(0.0, 1.0);
    let gain_of = |k: usize| 0.45 + k as f32 / (GAINS - 1) as f32;
    let cell = |c: [f32; 3]| c.map(|v| (v / 16.0).clamp(0.0, 15.0) as u8);
    let mut bins: HashMap<[u8; 3], (u32, [f64; 3])> = HashMap::new();
    for (_, c) in samples.iter().filter(|(m, _)| !tinted[*m]) {
        let bin = bins.entry(cell(*c)).or_default();
        bin.0 += 1;
        (0..3).for_each(|k| bin.1[k] += f64::from(c[k]));
    }
    let mut bins: Vec<_> = bins.into_iter().collect();
    bins.sort_by_key(|(cell, (n, _))| (Reverse(*n), *cell));
    bins.truncate(256 - GAINS);
    let mut all: Vec<Paint> = (0..GAINS).map(|k| Paint::Tinted(gain_of(k))).collect();
    all.extend(bins.iter().map(|(_, (n, sum))| Paint::Own(sum.map(|s| (s / f64::from(*n) + 0.5) as u8))));
    let place = |(m, c): &(usize, [f32; 3])| -> usize {
        if tinted[*m] {
            return ((gain(*c) - 0.45) * (GAINS - 1) as f32 + 0.5) as usize;
        }
        let away = |p: &Paint| match p {
            Paint::Own(o) => (0..3).map(|k| (f32::from(o[k]) - c[k]).powi(2)).sum(),
            Paint::Tinted(_) => f32::INFINITY,
        };
        (0..all.len()).min_by(|a, b| away(&all[*a]).total_cmp(&away(&all[*b]))).unwrap_or(0)
    };
    // Only what is used is kept.
    let places: Vec<usize> = samples.iter().map(place).collect();
    let mut used: Vec<usize> = places.clone();
    used.sort_unstable();
    used.dedup();
    let lattice = places.iter().map(|p| used.binary_search(p).unwrap_or(0) as u8).collect();
    (used.iter().map(|k| all[*k]).collect(), lattice)
}

// ------------------------------------------------------------------------------------------------- what is seen

/// Depth pictures of an original from directions above and a little below the horizon.
struct Views {
    /// Direction from the model to the eye, right and up, and the depth picture (towards the eye, larger is nearer).
    pictures: Vec<([[f32; 3]; 3], Vec<f32>)>,
    /// Pixels on which each face was seen, in all pictures together.
    seen: Vec<u32>,
    centre: [f32; 3],
    scale: f32,
}

impl Views {
    fn of(original: &Original) -> Self {
        let (mut lo, mut hi) = ([f32::MAX; 3], [f32::MIN; 3]);
        for p in &original.points {
            (0..3).for_each(|k| (lo[k], hi[k]) = (lo[k].min(p[k]), hi[k].max(p[k])));
        }
        let centre = [0, 1, 2].map(|k| (lo[k] + hi[k]) * 0.5);
        let radius = dot(sub(hi, centre), sub(hi, centre)).sqrt().max(1e-3);
        let scale = (SIDE as f32 * 0.5 - 1.0) / radius;
        let mut out = Self { pictures: Vec::new(), seen: vec![0; original.faces.len()], centre, scale };
        for k in 0..DIRECTIONS {
            let z = 0.98 - 1.13 * (k as f32 + 0.5) / DIRECTIONS as f32;
            let (a, r) = (k as f32 * 2.399_963, (1.0 - z * z).sqrt());
            let d = [r * a.cos(), r * a.sin(), z];
            let right = [-a.sin(), a.cos(), 0.0];
            let axes = [d, right, cross(d, right)];
            let (mut depth, mut ids) = (vec![f32::MIN; SIDE * SIDE], vec![u32::MAX; SIDE * SIDE]);
            for (id, f) in original.faces.iter().enumerate() {
                let p = f.vertices.map(|v| out.pixel(&axes, original.points[v as usize]));
                fill(p, |at, w| {
                    let near = w[0] * p[0][2] + w[1] * p[1][2] + w[2] * p[2][2];
                    if near > depth[at] {
                        (depth[at], ids[at]) = (near, id as u32);
                    }
                });
            }
            for id in ids.iter().filter(|id| **id != u32::MAX) {
                out.seen[*id as usize] += 1;
            }
            out.pictures.push((axes, depth));
        }
        out
    }

    /// Pixel (x, y) and nearness of a point.
    fn pixel(&self, axes: &[[f32; 3]; 3], p: [f32; 3]) -> [f32; 3] {
        let rel = sub(p, self.centre);
        let half = SIDE as f32 * 0.5;
        [half + self.scale * dot(rel, axes[1]), half + self.scale * dot(rel, axes[2]), dot(rel, axes[0])]
    }

    /// Share of the directions above the floor and in front of each vertex from which it is seen.
    fn openness(&self, points: &[[f32; 3]], triangles: &[Triangle]) -> Vec<f32> {
        let mut normals = vec![[0.0f32; 3]; points.len()];
        for t in triangles {
            let [a, b, c] = t.vertices.map(|v| points[usize::from(v)]);
            let n = cross(sub(b, a), sub(c, a));
            for v in t.vertices {
                (0..3).for_each(|k| normals[usize::from(v)][k] += n[k]);
            }
        }
        let slack = 3.0 / self.scale;
        points
            .iter()
            .zip(&normals)
            .map(|(p, n)| {
                let (mut open, mut all) = (0.0f32, 0.0f32);
                let long = dot(*n, *n).sqrt().max(1e-12);
                for (axes, depth) in self.pictures.iter().filter(|(axes, _)| axes[0][2] > 0.0) {
                    // Both sides of thin things are lit.
                    let facing = (dot(*n, axes[0]) / long).abs().max(0.1);
                    let out = [0, 1, 2].map(|k| p[k] + axes[0][k] * slack);
                    let at = self.pixel(axes, out);
                    let (x, y) = (at[0].max(0.0) as usize, at[1].max(0.0) as usize);
                    let hidden = x < SIDE && y < SIDE && depth[y * SIDE + x] > at[2] + slack;
                    all += facing;
                    open += if hidden { 0.0 } else { facing };
                }
                open / all.max(1e-6)
            })
            .collect()
    }
}

/// Calls `pixel` with index and barycentric weights for the pixels' centres in a triangle.
fn fill(p: [[f32; 3]; 3], mut pixel: impl FnMut(usize, [f32; 3])) {
    let area = (p[1][0] - p[0][0]) * (p[2][1] - p[0][1]) - (p[2][0] - p[0][0]) * (p[1][1] - p[0][1]);
    if area.abs() < 1e-9 {
        return;
    }
    let range = |k: usize| {
        let v = [p[0][k], p[1][k], p[2][k]];
        let lo = v.iter().copied().fold(f32::MAX, f32::min);
        let hi = v.iter().copied().fold(f32::MIN, f32::max);
        let clamp = |v: f32| v.clamp(0.0, SIDE as f32) as usize;
        clamp((lo - 0.5).ceil())..clamp((hi + 0.5).floor().max(0.0))
    };
    for y in range(1) {
        for x in range(0) {
            let (fx, fy) = (x as f32 + 0.5, y as f32 + 0.5);
            let edge = |a: [f32; 3], b: [f32; 3]| (b[0] - a[0]) * (fy - a[1]) - (fx - a[0]) * (b[1] - a[1]);
            let w = [edge(p[1], p[2]) / area, edge(p[2], p[0]) / area, edge(p[0], p[1]) / area];
            if w.iter().all(|w| *w >= 0.0) {
                pixel(y * SIDE + x, w);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ edge collapse

/// A symmetric 4x4 matrix: the sum of squared distances to planes.
#[derive(Clone, Copy, Default)]
struct Quadric([f64; 10]);

impl Quadric {
    fn plane(n: [f64; 3], d: f64, weight: f64) -> Self {
        let v = [n[0], n[1], n[2], d];
        let mut q = [0.0; 10];
        let mut at = 0;
        for i in 0..4 {
            for j in i..4 {
                q[at] = weight * v[i] * v[j];
                at += 1;
            }
        }
        Self(q)
    }

    fn plus(mut self, other: &Self) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a += b);
        self
    }

    fn error(&self, p: [f64; 3]) -> f64 {
        let q = &self.0;
        let v = p[0] * (q[0] * p[0] + 2.0 * (q[1] * p[1] + q[2] * p[2] + q[3]))
            + p[1] * (q[4] * p[1] + 2.0 * (q[5] * p[2] + q[6]))
            + p[2] * (q[7] * p[2] + 2.0 * q[8])
            + q[9];
        v.max(0.0)
    }

    /// The point of least error; none where it is not well defined.
    fn best(&self) -> Option<[f64; 3]> {
        let q = &self.0;
        let m = [[q[0], q[1], q[2]], [q[1], q[4], q[5]], [q[2], q[5], q[7]]];
        let b = [-q[3], -q[6], -q[8]];
        let det3 = |m: [[f64; 3]; 3]| {
            m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
                - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
                + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
        };
        let det = det3(m);
        let trace = q[0] + q[4] + q[7];
        if det.abs() < 1e-4 * trace.powi(3) {
            return None;
        }
        Some([0, 1, 2].map(|k| {
            let mut with = m;
            (0..3).for_each(|r| with[r][k] = b[r]);
            det3(with) / det
        }))
    }
}

struct Collapser {
    points: Vec<[f64; 3]>,
    quadrics: Vec<Quadric>,
    /// Faces around each vertex; empty for vertices that are gone.
    around: Vec<Vec<u32>>,
    faces: Vec<Option<[u32; 3]>>,
    stamp: Vec<u32>,
    heap: BinaryHeap<Reverse<(u64, u32, u32, u32, u32)>>,
}

fn minus(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

fn normal(a: [f64; 3], b: [f64; 3], c: [f64; 3]) -> [f64; 3] {
    let (u, v) = (minus(b, a), minus(c, a));
    [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]
}

fn inner(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// Collapses edges until so many triangles are left; vertices and triangles. Places closer than half a millimetre are
/// one vertex.
fn collapse(original: &Original, faces: &[Face], triangles: usize) -> (Vec<[f32; 3]>, Vec<[u32; 3]>) {
    let mut cells: HashMap<[i32; 3], u32> = HashMap::new();
    let mut points = Vec::new();
    let mut weld = |v: u32| {
        let p = original.points[v as usize];
        *cells.entry(p.map(|c| (c * 2000.0).round() as i32)).or_insert_with(|| {
            points.push(p.map(f64::from));
            points.len() as u32 - 1
        })
    };
    let mut corners: Vec<[u32; 3]> = faces.iter().map(|f| f.vertices.map(&mut weld)).collect();
    corners.retain(|t| t[0] != t[1] && t[1] != t[2] && t[2] != t[0]);
    let mut seen = std::collections::HashSet::new();
    corners.retain(|t| {
        let mut key = *t;
        key.sort_unstable();
        seen.insert(key)
    });
    let mut c = Collapser::new(points, &corners);
    let mut left = corners.len();
    while left > triangles {
        let Some(Reverse((_, a, b, stamp_a, stamp_b))) = c.heap.pop() else { break };
        if c.stamp[a as usize] != stamp_a || c.stamp[b as usize] != stamp_b {
            continue;
        }
        left -= c.merge(a, b);
    }
    let mut index = vec![u32::MAX; c.points.len()];
    let mut out = Vec::new();
    let kept: Vec<[u32; 3]> = c
        .faces
        .iter()
        .flatten()
        .filter(|t| {
            let n = normal(c.points[t[0] as usize], c.points[t[1] as usize], c.points[t[2] as usize]);
            inner(n, n) > 1e-14
        })
        .map(|t| {
            t.map(|v| {
                let slot = &mut index[v as usize];
                if *slot == u32::MAX {
                    *slot = out.len() as u32;
                    out.push(c.points[v as usize].map(|x| x as f32));
                }
                *slot
            })
        })
        .collect();
    (out, kept)
}

impl Collapser {
    fn new(points: Vec<[f64; 3]>, corners: &[[u32; 3]]) -> Self {
        let n = points.len();
        let mut c = Self {
            quadrics: vec![Quadric::default(); n],
            around: vec![Vec::new(); n],
            faces: corners.iter().copied().map(Some).collect(),
            stamp: vec![0; n],
            heap: BinaryHeap::new(),
            points,
        };
        let mut edges: HashMap<(u32, u32), (u32, u32)> = HashMap::new();
        for (k, t) in corners.iter().enumerate() {
            let p = t.map(|v| c.points[v as usize]);
            let n = normal(p[0], p[1], p[2]);
            let size = inner(n, n).sqrt();
            for v in t {
                c.around[*v as usize].push(k as u32);
            }
            if size < 1e-14 {
                continue;
            }
            let unit = n.map(|x| x / size);
            // By area, and a little for each triangle, so that thin parts count too.
            let q = Quadric::plane(unit, -inner(unit, p[0]), size * 0.5 + 2e-5);
            for v in t {
                c.quadrics[*v as usize] = c.quadrics[*v as usize].plus(&q);
            }
            for e in 0..3 {
                let (a, b) = (t[e], t[(e + 1) % 3]);
                let entry = edges.entry((a.min(b), a.max(b))).or_insert((0, k as u32));
                entry.0 += 1;
            }
        }
        // Open edges hold their line.
        let mut order: Vec<_> = edges.into_iter().collect();
        order.sort_unstable();
        for ((a, b), (count, face)) in &order {
            let (pa, pb) = (c.points[*a as usize], c.points[*b as usize]);
            let along = minus(pb, pa);
            let length = inner(along, along).sqrt();
            if let (1, Some(t), true) = (*count, c.faces[*face as usize], length > 1e-9) {
                let p = t.map(|v| c.points[v as usize]);
                let n = normal(p[0], p[1], p[2]);
                let side = normal([0.0; 3], along, n);
                let size = inner(side, side).sqrt().max(1e-14);
                let unit = side.map(|x| x / size);
                let q = Quadric::plane(unit, -inner(unit, pa), 0.5 * length * length);
                for v in [a, b] {
                    c.quadrics[*v as usize] = c.quadrics[*v as usize].plus(&q);
                }
            }
        }
        for ((a, b), _) in &order {
            c.push(*a, *b);
        }
        c
    }

    /// Where two vertices would be merged, and at what cost.
    fn plan(&self, a: u32, b: u32) -> ([f64; 3], f64) {
        let q = self.quadrics[a as usize].plus(&self.quadrics[b as usize]);
        let (pa, pb) = (self.points[a as usize], self.points[b as usize]);
        let middle = [0, 1, 2].map(|k| (pa[k] + pb[k]) * 0.5);
        let length = inner(minus(pa, pb), minus(pa, pb));
        let near = |p: &[f64; 3]| inner(minus(*p, middle), minus(*p, middle)) <= length * 1.5 + 1e-12;
        let mut best = (middle, q.error(middle));
        for p in [Some(pa), Some(pb), q.best().filter(near)].into_iter().flatten() {
            let e = q.error(p);
            if e < best.1 {
                best = (p, e);
            }
        }
        // Among equals the shorter edge goes first.
        (best.0, best.1 + 1e-9 * length)
    }

    fn push(&mut self, a: u32, b: u32) {
        let cost = self.plan(a, b).1;
        // Costs are not negative, so that their bits are in their order.
        self.heap.push(Reverse((cost.to_bits(), a, b, self.stamp[a as usize], self.stamp[b as usize])));
    }

    /// Merges `b` into `a` unless a triangle would turn over; the number of triangles that went.
    fn merge(&mut self, a: u32, b: u32) -> usize {
        let (to, _) = self.plan(a, b);
        for v in [a, b] {
            for f in &self.around[v as usize] {
                let Some(t) = self.faces[*f as usize] else { continue };
                if t.contains(&a) && t.contains(&b) {
                    continue;
                }
                let p = t.map(|w| self.points[w as usize]);
                let q = t.map(|w| if w == a || w == b { to } else { self.points[w as usize] });
                let (before, after) = (normal(p[0], p[1], p[2]), normal(q[0], q[1], q[2]));
                let sizes = (inner(before, before) * inner(after, after)).sqrt();
                if inner(before, after) < 0.2 * sizes {
                    return 0;
                }
            }
        }
        let mut gone = 0;
        let moved = std::mem::take(&mut self.around[b as usize]);
        for f in moved {
            let Some(t) = self.faces[f as usize] else { continue };
            if t.contains(&a) {
                self.faces[f as usize] = None;
                gone += 1;
            } else {
                self.faces[f as usize] = Some(t.map(|v| if v == b { a } else { v }));
                self.around[a as usize].push(f);
            }
        }
        let faces = &self.faces;
        self.around[a as usize].retain(|f| faces[*f as usize].is_some());
        self.quadrics[a as usize] = self.quadrics[a as usize].plus(&self.quadrics[b as usize]);
        self.points[a as usize] = to;
        self.stamp[b as usize] = u32::MAX;
        self.stamp[a as usize] += 1;
        let mut others: Vec<u32> = Vec::new();
        for f in &self.around[a as usize] {
            others.extend(self.faces[*f as usize].into_iter().flatten().filter(|v| *v != a));
        }
        others.sort_unstable();
        others.dedup();
        for other in others {
            self.push(a, other);
        }
        gone
    }
}

// --------------------------------------------------------------------------------------------- nearest surface

/// Finds the nearest triangle of an original.
struct Nearest<'a> {
    original: &'a Original,
    faces: &'a [Face],
    low: [f32; 3],
    cell: f32,
    size: [usize; 3],
    cells: Vec<Vec<u32>>,
}

impl<'a> Nearest<'a> {
    fn new(original: &'a Original, faces: &'a [Face]) -> Self {
        let (mut low, mut high) = ([f32::MAX; 3], [f32::MIN; 3]);
        for p in faces.iter().flat_map(|f| f.vertices).map(|v| original.points[v as usize]) {
            (0..3).for_each(|k| (low[k], high[k]) = (low[k].min(p[k]), high[k].max(p[k])));
        }
        let cell = ((0..3).map(|k| high[k] - low[k]).fold(0.0, f32::max) / 40.0).max(1e-3);
        let size = [0, 1, 2].map(|k| ((high[k] - low[k]) / cell) as usize + 1);
        let mut out =
            Self { original, faces, low, cell, size, cells: vec![Vec::new(); size[0] * size[1] * size[2]] };
        for (id, f) in faces.iter().enumerate() {
            let p = f.vertices.map(|v| original.points[v as usize]);
            let (mut lo, mut hi) = (out.place(p[0]), out.place(p[0]));
            for q in [out.place(p[1]), out.place(p[2])] {
                (0..3).for_each(|k| (lo[k], hi[k]) = (lo[k].min(q[k]), hi[k].max(q[k])));
            }
            for z in lo[2]..=hi[2] {
                for y in lo[1]..=hi[1] {
                    for x in lo[0]..=hi[0] {
                        out.cells[(z * size[1] + y) * size[0] + x].push(id as u32);
                    }
                }
            }
        }
        out
    }

    fn place(&self, p: [f32; 3]) -> [usize; 3] {
        [0, 1, 2].map(|k| (((p[k] - self.low[k]) / self.cell).max(0.0) as usize).min(self.size[k] - 1))
    }

    /// Material and colour of the surface nearest to a point; surfaces across the normal count as a little farther.
    fn colour(&self, p: [f32; 3], n: [f32; 3]) -> (usize, [f32; 3]) {
        let at = self.place(p);
        let long = dot(n, n).sqrt().max(1e-12);
        let mut best: Option<(f32, usize, [f32; 3])> = None;
        for ring in 0..self.size.iter().copied().max().unwrap_or(1) {
            if best.is_some_and(|b| b.0 < (ring as f32 - 1.0) * self.cell) {
                break;
            }
            let span = |k: usize| at[k].saturating_sub(ring)..=(at[k] + ring).min(self.size[k] - 1);
            for z in span(2) {
                for y in span(1) {
                    for x in span(0) {
                        let away = [x, y, z].into_iter().zip(at).map(|(a, b)| a.abs_diff(b)).max();
                        if away != Some(ring) {
                            continue;
                        }
                        for id in &self.cells[(z * self.size[1] + y) * self.size[0] + x] {
                            let f = &self.faces[*id as usize];
                            let t = f.vertices.map(|v| self.original.points[v as usize]);
                            let w = closest(p, t);
                            let q: [f32; 3] = std::array::from_fn(|k| (0..3).map(|c| w[c] * t[c][k]).sum());
                            let m = cross(sub(t[1], t[0]), sub(t[2], t[0]));
                            let agree = (dot(m, n) / (dot(m, m).sqrt().max(1e-12) * long)).abs();
                            let d = dot(sub(p, q), sub(p, q)).sqrt() + 0.012 * (1.0 - agree);
                            if best.is_none_or(|b| d < b.0) {
                                best = Some((d, *id as usize, w));
                            }
                        }
                    }
                }
            }
        }
        let Some((_, id, w)) = best else { return (0, [128.0; 3]) };
        let f = &self.faces[id];
        let material = &self.original.materials[f.material];
        let uv = [0, 1].map(|k| (0..3).map(|c| w[c] * f.uv[c][k]).sum::<f32>());
        (f.material, material.at(uv))
    }
}

impl Material {
    /// A material of this name about which nothing is known.
    #[must_use]
    pub fn grey(name: &str) -> Self {
        Self { name: name.to_owned(), colour: [200; 3], ..Self::default() }
    }

    /// The colour at texture coordinates: the mean of 3x3 texels, the texture repeated.
    fn at(&self, uv: [f32; 2]) -> [f32; 3] {
        let Some((w, h, rgb)) = &self.texture else { return self.colour.map(f32::from) };
        let texel = |v: f32, n: usize, off: i64| {
            ((v.rem_euclid(1.0) * n as f32) as i64 + off).rem_euclid(n as i64) as usize
        };
        let mut sum = [0.0f32; 3];
        for dy in -1..=1 {
            for dx in -1..=1 {
                let at = (texel(1.0 - uv[1], *h, dy) * w + texel(uv[0], *w, dx)) * 3;
                (0..3).for_each(|c| sum[c] += f32::from(rgb[at + c]) / 9.0);
            }
        }
        sum
    }
}

/// Weights of the point of a triangle that is closest to `p` (Ericson, Real-Time Collision Detection, 5.1.5).
fn closest(p: [f32; 3], [a, b, c]: [[f32; 3]; 3]) -> [f32; 3] {
    let (ab, ac, ap) = (sub(b, a), sub(c, a), sub(p, a));
    let (d1, d2) = (dot(ab, ap), dot(ac, ap));
    if d1 <= 0.0 && d2 <= 0.0 {
        return [1.0, 0.0, 0.0];
    }
    let bp = sub(p, b);
    let (d3, d4) = (dot(ab, bp), dot(ac, bp));
    if d3 >= 0.0 && d4 <= d3 {
        return [0.0, 1.0, 0.0];
    }
    let cp = sub(p, c);
    let (d5, d6) = (dot(ab, cp), dot(ac, cp));
    if d6 >= 0.0 && d5 <= d6 {
        return [0.0, 0.0, 1.0];
    }
    let vc = d1 * d4 - d3 * d2;
    if vc <= 0.0 && d1 >= 0.0 && d3 <= 0.0 {
        let v = d1 / (d1 - d3).max(1e-20);
        return [1.0 - v, v, 0.0];
    }
    let vb = d5 * d2 - d1 * d6;
    if vb <= 0.0 && d2 >= 0.0 && d6 <= 0.0 {
        let w = d2 / (d2 - d6).max(1e-20);
        return [1.0 - w, 0.0, w];
    }
    let va = d3 * d6 - d5 * d4;
    if va <= 0.0 && d4 - d3 >= 0.0 && d5 - d6 >= 0.0 {
        let w = (d4 - d3) / ((d4 - d3) + (d5 - d6)).max(1e-20);
        return [0.0, 1.0 - w, w];
    }
    let sum = (va + vb + vc).max(1e-20);
    [va / sum, vb / sum, vc / sum]
}
