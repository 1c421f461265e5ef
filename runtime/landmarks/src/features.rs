//! Features of a picture: scale-space extrema with SIFT descriptors (Lowe 2004), RootSIFT-normalised (Arandjelović and
//! Zisserman 2012).
//!
//! Two things differ from the textbook, for speed: the pyramid starts at the picture's own size with a small first blur
//! instead of at double size, and a descriptor is taken from a patch that is resampled once in the keypoint's own axes,
//! so that all of its spatial weights are constants.

use std::f32::consts::PI;

/// A grey picture: `height` rows of `width` values in 0..1.
#[derive(Clone, Debug, PartialEq)]
pub struct Gray {
    width: usize,
    height: usize,
    data: Vec<f32>,
}

impl Gray {
    /// From `height * width` values in 0..1; missing ones are 0.
    #[must_use]
    pub fn new(width: usize, height: usize, mut data: Vec<f32>) -> Self {
        data.resize(width * height, 0.0);
        Self { width, height, data }
    }

    /// From `[height, width, 3]` bytes, sRGB; luma of ITU-R BT.601. Missing bytes are black.
    #[must_use]
    pub fn from_rgb8(width: usize, height: usize, rgb: &[u8]) -> Self {
        let luma =
            |p: &[u8]| (0.299 * f32::from(p[0]) + 0.587 * f32::from(p[1]) + 0.114 * f32::from(p[2])) / 255.0;
        Self::new(width, height, rgb.chunks_exact(3).take(width * height).map(luma).collect())
    }

    /// Columns and rows.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// The value at a pixel; 0 outside.
    #[must_use]
    pub fn value(&self, x: usize, y: usize) -> f32 {
        if x < self.width { self.data.get(y * self.width + x).copied().unwrap_or(0.0) } else { 0.0 }
    }

    fn row(&self, y: usize) -> &[f32] {
        &self.data[y * self.width..(y + 1) * self.width]
    }

    fn zeros(width: usize, height: usize) -> Self {
        Self { width, height, data: vec![0.0; width * height] }
    }

    /// Bilinear value; coordinates beyond the edge give the edge.
    fn sample(&self, x: f32, y: f32) -> f32 {
        let x = x.clamp(0.0, (self.width - 1) as f32);
        let y = y.clamp(0.0, (self.height - 1) as f32);
        // By way of `i32`: an `f32` to `usize` takes several instructions more.
        let (x0, y0) = (x as i32 as usize, y as i32 as usize);
        let (x1, y1) = ((x0 + 1).min(self.width - 1), (y0 + 1).min(self.height - 1));
        let (fx, fy) = (x - x0 as f32, y - y0 as f32);
        let (upper, lower) = (y0 * self.width, y1 * self.width);
        let a = self.data[upper + x0] + fx * (self.data[upper + x1] - self.data[upper + x0]);
        let b = self.data[lower + x0] + fx * (self.data[lower + x1] - self.data[lower + x0]);
        a + fy * (b - a)
    }
}

/// Where a feature is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keypoint {
    /// Column (pixels, centres at integers).
    pub x: f32,
    /// Row (pixels).
    pub y: f32,
    /// Standard deviation of the blur at which it was found (pixels).
    pub scale: f32,
    /// Direction of the strongest gradient (radians, from x towards y).
    pub angle: f32,
    /// Absolute contrast at the extremum.
    pub response: f32,
}

/// What a feature looks like: 4 x 4 cells of 8 directions. Its length is 512 in the Euclidean norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub [u8; 128]);

impl Descriptor {
    /// Squared Euclidean distance, at most `2 * 512²`.
    #[must_use]
    pub fn distance(&self, other: &Self) -> u32 {
        let mut sum = 0i32;
        for (a, b) in self.0.iter().zip(&other.0) {
            let d = i16::from(*a) - i16::from(*b);
            sum += i32::from(d) * i32::from(d);
        }
        sum as u32
    }
}

/// Features of one picture: `keypoints` and `descriptors` are of the same length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Features {
    /// Where they are, strongest first.
    pub keypoints: Vec<Keypoint>,
    /// What they look like.
    pub descriptors: Vec<Descriptor>,
}

impl Features {
    /// Number of features.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keypoints.len()
    }

    /// True without any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keypoints.is_empty()
    }
}

/// What is extracted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExtractorConfig {
    /// At most this many features, the strongest ones.
    pub features_max: usize,
    /// Smallest contrast of an extremum in a difference of Gaussians (pictures are in 0..1).
    pub contrast_min: f32,
    /// Largest ratio of principal curvatures; beyond it the extremum is on an edge.
    pub edge_ratio_max: f32,
    /// Blur of the first layer (pixels); the picture itself counts as blurred by half a pixel.
    pub sigma: f32,
    /// Octaves at most.
    pub octaves_max: usize,
}

impl Default for ExtractorConfig {
    fn default() -> Self {
        Self { features_max: 800, contrast_min: 0.008, edge_ratio_max: 10.0, sigma: 1.0, octaves_max: 4 }
    }
}

/// Layers per octave in which extrema are looked for.
const LAYERS: usize = 3;
/// Pixels at the edge of a picture without features.
const BORDER: usize = 5;
/// Layers at most that are kept for the next picture.
const SPARE_MAX: usize = 64;
/// Samples of a descriptor's patch along each side.
const PATCH: usize = 20;
/// Samples of a patch per descriptor cell.
const SAMPLES_PER_CELL: f32 = 4.0;
/// Distance of samples in units of the keypoint's scale: a cell is three scales wide.
const SAMPLE_STEP: f32 = 3.0 / SAMPLES_PER_CELL;

/// Shares of each column of a patch in the descriptor's columns of cells, at most two `(cell, weight)`, with the window
/// along this axis; those of rows are the same.
type Shares = [[(usize, f32); 2]; PATCH];

/// Extracts features; keeps its buffers between pictures.
#[derive(Debug)]
pub struct Extractor {
    config: ExtractorConfig,
    shares: Shares,
    scratch: Gray,
    padded: Vec<f32>,
    /// Memory of layers that are not needed any more.
    spare: Vec<Vec<f32>>,
}

/// An extremum before its orientation is known; coordinates in pixels of its octave.
struct Extremum {
    x: f32,
    y: f32,
    layer: usize,
    sigma: f32,
    response: f32,
}

/// Gaussian layers of one octave.
#[derive(Clone, Debug, PartialEq)]
struct Octave {
    gauss: Vec<Gray>,
    /// Pixels of the picture per pixel of the octave.
    step: f32,
}

/// A picture's features, and the blurred copies of it in which they were found: about 32 bytes a pixel.
#[derive(Clone, Debug)]
pub struct Picture {
    /// What was found.
    pub features: Features,
    octaves: Vec<Octave>,
    /// Blur of the first layer (pixels).
    sigma: f32,
    shares: Shares,
}

impl Picture {
    /// What a feature at this place, of this scale (pixels) and direction (radians), would look like, whether or not there is
    /// an extremum. `None` where the picture has no layer of that scale.
    #[must_use]
    pub fn describe_at(&self, at: [f64; 2], scale: f64, angle: f64) -> Option<Descriptor> {
        let steps = (scale as f32 / self.sigma).log2() * LAYERS as f32;
        if !(-0.5..).contains(&steps) {
            return None;
        }
        // Octaves overlap; features lie in their inner layers.
        let steps = steps.round() as usize;
        let (octave, layer) = match steps.checked_sub(1) {
            None => (0, 0),
            Some(inner) => (inner / LAYERS, inner % LAYERS + 1),
        };
        let Octave { gauss, step } = self.octaves.get(octave)?;
        let sigma = scale as f32 / step;
        let extremum =
            Extremum { x: at[0] as f32 / step, y: at[1] as f32 / step, layer, sigma, response: 0.0 };
        Some(describe(gauss.get(layer)?, &extremum, angle as f32, &self.shares))
    }
}

impl Extractor {
    /// An extractor with these settings.
    #[must_use]
    pub fn new(config: ExtractorConfig) -> Self {
        let shares = std::array::from_fn(shares);
        Self { config, shares, scratch: Gray::zeros(0, 0), padded: Vec::new(), spare: Vec::new() }
    }

    /// Features of a picture; none when it is smaller than 16 pixels on a side or without texture.
    pub fn extract(&mut self, picture: &Gray) -> Features {
        let Picture { features, octaves, .. } = self.scan(picture);
        octaves.into_iter().flat_map(|octave| octave.gauss).for_each(|layer| self.recycle(layer));
        features
    }

    /// A layer, in spare memory where there is some: its values are any.
    fn layer(&mut self, width: usize, height: usize) -> Gray {
        let n = width * height;
        let fits = |spare: &Vec<f32>| (n..2 * n.max(1)).contains(&spare.capacity());
        let mut data = match self.spare.iter().position(fits) {
            Some(at) => self.spare.swap_remove(at),
            None => Vec::with_capacity(n),
        };
        data.resize(n, 0.0);
        Gray { width, height, data }
    }

    fn recycle(&mut self, layer: Gray) {
        // More than a picture has are of other sizes.
        if self.spare.len() >= SPARE_MAX {
            self.spare.clear();
        }
        self.spare.push(layer.data);
    }

    /// [`Extractor::extract`], with what it takes to look at places of the picture where there is no feature.
    pub fn scan(&mut self, picture: &Gray) -> Picture {
        let mut found = Vec::new();
        let mut octaves = Vec::new();
        let (sigma, shares) = (self.config.sigma, self.shares);
        if picture.width.min(picture.height) < 16 {
            return Picture { features: Features::default(), octaves, sigma, shares };
        }
        let first = (self.config.sigma.powi(2) - 0.25).max(0.01).sqrt();
        let mut base = self.layer(picture.width, picture.height);
        self.blur(picture, first, &mut base);
        for octave in 0..self.config.octaves_max {
            let gauss = self.layers(base);
            let step = (1usize << octave) as f32;
            let differences: Vec<Gray> = gauss
                .windows(2)
                .map(|w| {
                    let mut out = self.layer(w[0].width, w[0].height);
                    difference(&mut out.data, &w[0].data, &w[1].data);
                    out
                })
                .collect();
            for extremum in extrema(&differences, &self.config) {
                found.push((octave, extremum));
            }
            differences.into_iter().for_each(|layer| self.recycle(layer));
            base = halved(&gauss[LAYERS]);
            octaves.push(Octave { gauss, step });
            if base.width.min(base.height) < 16 {
                break;
            }
        }
        found.sort_by(|a, b| b.1.response.total_cmp(&a.1.response));
        let features = self.described(&octaves, &found);
        Picture { features, octaves, sigma, shares }
    }

    /// Features of extrema, the strongest first.
    fn described(&self, octaves: &[Octave], found: &[(usize, Extremum)]) -> Features {
        let mut out = Features::default();
        for (octave, extremum) in found {
            let octave = &octaves[*octave];
            let layer = &octave.gauss[extremum.layer];
            for angle in orientations(layer, extremum) {
                if out.len() >= self.config.features_max {
                    return out;
                }
                out.descriptors.push(describe(layer, extremum, angle, &self.shares));
                out.keypoints.push(Keypoint {
                    x: extremum.x * octave.step,
                    y: extremum.y * octave.step,
                    scale: extremum.sigma * octave.step,
                    angle,
                    response: extremum.response,
                });
            }
        }
        out
    }

    /// The Gaussian layers above a base.
    fn layers(&mut self, base: Gray) -> Vec<Gray> {
        let mut gauss = vec![base];
        let factor = 2f32.powf(1.0 / LAYERS as f32);
        for layer in 1..LAYERS + 3 {
            let before = self.config.sigma * factor.powi(layer as i32 - 1);
            let more = ((before * factor).powi(2) - before.powi(2)).sqrt();
            let mut next = self.layer(gauss[0].width, gauss[0].height);
            self.blur(&gauss[layer - 1], more, &mut next);
            gauss.push(next);
        }
        gauss
    }

    /// Separable Gaussian blur; the edge pixels go on outside.
    fn blur(&mut self, source: &Gray, sigma: f32, target: &mut Gray) {
        let radius = (3.0 * sigma).ceil() as usize;
        let mut kernel: Vec<f32> = (0..=radius).map(|k| (-0.5 * (k as f32 / sigma).powi(2)).exp()).collect();
        let sum = kernel[0] + 2.0 * kernel[1..].iter().sum::<f32>();
        kernel.iter_mut().for_each(|k| *k /= sum);
        let (w, h) = (source.width, source.height);
        if (self.scratch.width, self.scratch.height) != (w, h) {
            self.scratch = Gray::zeros(w, h);
        }
        self.padded.resize(w + 2 * radius, 0.0);
        for y in 0..h {
            let row = source.row(y);
            self.padded[..radius].fill(row[0]);
            self.padded[radius..radius + w].copy_from_slice(row);
            self.padded[radius + w..].fill(row[w - 1]);
            let out = &mut self.scratch.data[y * w..(y + 1) * w];
            scale(out, row, kernel[0]);
            for (k, weight) in kernel.iter().enumerate().skip(1) {
                let (left, right) = (&self.padded[radius - k..][..w], &self.padded[radius + k..][..w]);
                add_pair(out, left, right, *weight);
            }
        }
        for y in 0..h {
            let out = &mut target.data[y * w..(y + 1) * w];
            scale(out, self.scratch.row(y), kernel[0]);
            for (k, weight) in kernel.iter().enumerate().skip(1) {
                let (above, below) = (y.saturating_sub(k), (y + k).min(h - 1));
                add_pair(out, self.scratch.row(above), self.scratch.row(below), *weight);
            }
        }
    }
}

/// The descriptor at an extremum, its axes turned by `angle`.
fn describe(layer: &Gray, at: &Extremum, angle: f32, shares: &Shares) -> Descriptor {
    const SIDE: usize = PATCH + 2;
    let mut patch = [0f32; SIDE * SIDE];
    let step = at.sigma * SAMPLE_STEP;
    let (sin, cos) = (step * angle.sin(), step * angle.cos());
    let middle = 0.5 * (SIDE as f32 - 1.0);
    for (j, row) in patch.chunks_exact_mut(SIDE).enumerate() {
        let v = j as f32 - middle;
        for (i, value) in row.iter_mut().enumerate() {
            let u = i as f32 - middle;
            *value = layer.sample(at.x + u * cos - v * sin, at.y + u * sin + v * cos);
        }
    }
    let mut histogram = [0f32; 128];
    let (mut magnitudes, mut turns) = ([0f32; PATCH], [0f32; PATCH]);
    for (j, in_rows) in shares.iter().enumerate() {
        let (above, below) = (&patch[j * SIDE + 1..][..PATCH], &patch[(j + 2) * SIDE + 1..][..PATCH]);
        let (left, right) = (&patch[(j + 1) * SIDE..][..PATCH], &patch[(j + 1) * SIDE + 2..][..PATCH]);
        for i in 0..PATCH {
            let (gx, gy) = (right[i] - left[i], below[i] - above[i]);
            magnitudes[i] = (gx * gx + gy * gy).sqrt();
            turns[i] = octants(gy, gx);
        }
        // A row's share in the four columns of cells, which then goes into one or two rows of cells.
        let mut row = [0f32; 32];
        for (i, in_columns) in shares.iter().enumerate() {
            let low = turns[i] as i32;
            let part = turns[i] - low as f32;
            let (low, high) = ((low & 7) as usize, ((low + 1) & 7) as usize);
            let (less, more) = (magnitudes[i] * (1.0 - part), magnitudes[i] * part);
            for (cell, weight) in in_columns {
                row[8 * (cell & 3) + low] += less * weight;
                row[8 * (cell & 3) + high] += more * weight;
            }
        }
        for (cell, weight) in in_rows {
            for (sum, value) in histogram[32 * (cell & 3)..][..32].iter_mut().zip(&row) {
                *sum += weight * value;
            }
        }
    }
    quantised(&mut histogram)
}

/// Shares of a column of a patch in the descriptor's columns of cells.
fn shares(column: usize) -> [(usize, f32); 2] {
    let u = (column as f32 - 0.5 * (PATCH as f32 - 1.0)) / SAMPLES_PER_CELL;
    // The window's standard deviation is half the descriptor's width: two cells.
    let window = (-u * u / 8.0).exp();
    let x = u + 1.5;
    [x.floor(), x.floor() + 1.0].map(|cell| {
        let weight = (1.0 - (x - cell).abs()) * window;
        if (0.0..4.0).contains(&cell) { (cell as usize, weight) } else { (0, 0.0) }
    })
}

/// Normalises, cuts the peaks, takes roots, and rounds to bytes.
fn quantised(histogram: &mut [f32; 128]) -> Descriptor {
    let norm = histogram.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
    let mut sum = 0.0;
    for v in histogram.iter_mut() {
        *v = (*v / norm).min(0.2);
        sum += *v;
    }
    let sum = sum.max(1e-12);
    let mut out = [0u8; 128];
    for (byte, v) in out.iter_mut().zip(histogram.iter()) {
        *byte = (512.0 * (v / sum).sqrt()).round().min(255.0) as u8;
    }
    Descriptor(out)
}

/// Direction of `(x, y)` in eighths of a turn, in `0..8`; within 1e-4 of the true one.
fn octants(y: f32, x: f32) -> f32 {
    let (ax, ay) = (x.abs(), y.abs());
    let a = ax.min(ay) / ax.max(ay).max(1e-20);
    let s = a * a;
    let mut r = ((-0.046_496_475 * s + 0.159_314_22) * s - 0.327_622_76) * s * a + a;
    if ay > ax {
        r = 0.5 * PI - r;
    }
    if x < 0.0 {
        r = PI - r;
    }
    let turn = if y < 0.0 { 2.0 * PI - r } else { r } * (4.0 / PI);
    if turn >= 8.0 { turn - 8.0 } else { turn }
}

fn scale(out: &mut [f32], source: &[f32], weight: f32) {
    for (o, s) in out.iter_mut().zip(source) {
        *o = weight * s;
    }
}

fn add_pair(out: &mut [f32], a: &[f32], b: &[f32], weight: f32) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o += weight * (a + b);
    }
}

fn difference(out: &mut [f32], below: &[f32], above: &[f32]) {
    for ((o, b), a) in out.iter_mut().zip(below).zip(above) {
        *o = a - b;
    }
}

/// Every second pixel of every second row.
fn halved(source: &Gray) -> Gray {
    let (w, h) = (source.width / 2, source.height / 2);
    let data = (0..h).flat_map(|y| source.row(2 * y).iter().copied().step_by(2).take(w)).collect();
    Gray { width: w, height: h, data }
}

/// Refined extrema of the differences of Gaussians of one octave.
fn extrema(differences: &[Gray], config: &ExtractorConfig) -> Vec<Extremum> {
    let mut out = Vec::new();
    let (w, h) = (differences[0].width, differences[0].height);
    let least = 0.5 * config.contrast_min;
    for layer in 1..=LAYERS {
        let triple = [&differences[layer - 1], &differences[layer], &differences[layer + 1]];
        for y in BORDER..h.saturating_sub(BORDER) {
            let row = triple[1].row(y);
            for (x, value) in row.iter().copied().enumerate().take(w.saturating_sub(BORDER)).skip(BORDER) {
                if value.abs() > least
                    && is_extremum(triple, x, y, value)
                    && let Some(found) = refined(differences, layer, x, y, config)
                {
                    out.push(found);
                }
            }
        }
    }
    out
}

fn is_extremum(triple: [&Gray; 3], x: usize, y: usize, value: f32) -> bool {
    let w = triple[1].width;
    let at = y * w + x;
    let around = [at - w - 1, at - w, at - w + 1, at - 1, at + 1, at + w - 1, at + w, at + w + 1];
    let beats = |v: f32| if value > 0.0 { value >= v } else { value <= v };
    around.iter().all(|k| beats(triple[1].data[*k]))
        && [triple[0], triple[2]]
            .iter()
            .all(|g| beats(g.data[at]) && around.iter().all(|k| beats(g.data[*k])))
}

/// Moves an extremum to the top of the parabola through its neighbours; `None` when it has too little contrast, lies on an
/// edge, or runs away.
fn refined(
    differences: &[Gray],
    mut layer: usize,
    mut x: usize,
    mut y: usize,
    config: &ExtractorConfig,
) -> Option<Extremum> {
    let (w, h) = (differences[0].width, differences[0].height);
    for _ in 0..5 {
        let at = y * w + x;
        let (below, here, above) =
            (&differences[layer - 1].data, &differences[layer].data, &differences[layer + 1].data);
        let value = here[at];
        let gradient = nalgebra::Vector3::new(
            0.5 * (here[at + 1] - here[at - 1]),
            0.5 * (here[at + w] - here[at - w]),
            0.5 * (above[at] - below[at]),
        );
        let dxx = here[at + 1] + here[at - 1] - 2.0 * value;
        let dyy = here[at + w] + here[at - w] - 2.0 * value;
        let dss = above[at] + below[at] - 2.0 * value;
        let dxy = 0.25 * (here[at + w + 1] - here[at + w - 1] - here[at - w + 1] + here[at - w - 1]);
        let dxs = 0.25 * (above[at + 1] - above[at - 1] - below[at + 1] + below[at - 1]);
        let dys = 0.25 * (above[at + w] - above[at - w] - below[at + w] + below[at - w]);
        let hessian = nalgebra::Matrix3::new(dxx, dxy, dxs, dxy, dyy, dys, dxs, dys, dss);
        let offset = -(hessian.try_inverse()? * gradient);
        if !offset.iter().all(|v| v.abs() < 3.0) {
            return None;
        }
        if offset.iter().all(|v| v.abs() <= 0.5) {
            let response = (value + 0.5 * gradient.dot(&offset)).abs();
            let (trace, determinant) = (dxx + dyy, dxx * dyy - dxy * dxy);
            let ratio = config.edge_ratio_max;
            if response < config.contrast_min
                || determinant <= 0.0
                || trace * trace * ratio >= (ratio + 1.0).powi(2) * determinant
            {
                return None;
            }
            let place = layer as f32 + offset.z;
            return Some(Extremum {
                x: x as f32 + offset.x,
                y: y as f32 + offset.y,
                layer: (place.round() as usize).clamp(1, LAYERS),
                sigma: config.sigma * 2f32.powf(place / LAYERS as f32),
                response,
            });
        }
        let moved = |v: usize, by: f32, least: usize, most: usize| {
            let to = v as i64 + by.round() as i64;
            (to >= least as i64 && to <= most as i64).then_some(to as usize)
        };
        x = moved(x, offset.x, BORDER, w - 1 - BORDER)?;
        y = moved(y, offset.y, BORDER, h - 1 - BORDER)?;
        layer = moved(layer, offset.z, 1, LAYERS)?;
    }
    None
}

/// Directions of the strongest gradients around an extremum (radians): at most two.
fn orientations(layer: &Gray, at: &Extremum) -> impl Iterator<Item = f32> {
    const BINS: usize = 36;
    let sigma = 1.5 * at.sigma;
    let radius = (3.0 * sigma).round() as i64;
    let (cx, cy) = (at.x.round() as i64, at.y.round() as i64);
    let mut histogram = [0f32; BINS];
    let (w, h) = (layer.width as i64, layer.height as i64);
    let falloff: Vec<f32> = (0..=radius).map(|k| (-0.5 * (k as f32 / sigma).powi(2)).exp()).collect();
    for y in (cy - radius).max(1)..=(cy + radius).min(h - 2) {
        for x in (cx - radius).max(1)..=(cx + radius).min(w - 2) {
            let k = (y * w + x) as usize;
            let gx = layer.data[k + 1] - layer.data[k - 1];
            let gy = layer.data[k + layer.width] - layer.data[k - layer.width];
            let weight =
                falloff[(y - cy).unsigned_abs() as usize] * falloff[(x - cx).unsigned_abs() as usize];
            let bin = octants(gy, gx) * (BINS as f32 / 8.0);
            histogram[((bin + 0.5) as i32 as usize) % BINS] += weight * (gx * gx + gy * gy).sqrt();
        }
    }
    let at = |k: usize| histogram[k % BINS];
    // Twice smoothed by 1 4 6 4 1.
    let smooth: [f32; BINS] = std::array::from_fn(|k| {
        let k = k + BINS;
        (at(k - 2) + at(k + 2) + 4.0 * (at(k - 1) + at(k + 1)) + 6.0 * at(k)) / 16.0
    });
    let most = smooth.iter().copied().fold(0.0, f32::max);
    let mut peaks: Vec<(f32, f32)> = (0..BINS)
        .filter_map(|k| {
            let (before, here, after) = (smooth[(k + BINS - 1) % BINS], smooth[k], smooth[(k + 1) % BINS]);
            if here < 0.8 * most || here <= before || here < after {
                return None;
            }
            let shift = 0.5 * (before - after) / (before - 2.0 * here + after);
            Some((here, (k as f32 + shift) * (2.0 * PI / BINS as f32)))
        })
        .collect();
    peaks.sort_by(|a, b| b.0.total_cmp(&a.0));
    peaks.truncate(2);
    peaks.into_iter().map(|p| p.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Round blobs: `(x, y, standard deviation, height)`.
    fn blobs(width: usize, height: usize, all: &[(f32, f32, f32, f32)]) -> Gray {
        let mut data = vec![0.2; width * height];
        for (k, value) in data.iter_mut().enumerate() {
            let (x, y) = ((k % width) as f32, (k / width) as f32);
            for (bx, by, sigma, high) in all {
                *value += high * (-0.5 * ((x - bx).powi(2) + (y - by).powi(2)) / sigma.powi(2)).exp();
            }
        }
        Gray::new(width, height, data)
    }

    #[test]
    fn blobs_are_found_where_they_are_and_as_large_as_they_are() {
        let all = [(30.3, 40.7, 2.0, 0.5), (80.0, 30.25, 3.5, 0.4), (60.5, 90.0, 6.0, -0.15)];
        let found = Extractor::new(ExtractorConfig::default()).extract(&blobs(128, 128, &all));
        for (x, y, sigma, _) in all {
            let near = found
                .keypoints
                .iter()
                .map(|k| ((k.x - x).hypot(k.y - y), k.scale))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .unwrap();
            assert!(near.0 < 0.2, "blob at {x} {y}: nearest feature {near:?}");
            // A difference of Gaussians answers most to a blob when their widths are about the same.
            assert!((near.1 / sigma).ln().abs() < 0.35, "blob of {sigma}: scale {}", near.1);
        }
    }

    #[test]
    fn flat_pictures_and_tiny_ones_have_no_features() {
        let mut extractor = Extractor::new(ExtractorConfig::default());
        assert!(extractor.extract(&Gray::new(64, 48, vec![0.5; 64 * 48])).is_empty());
        assert!(extractor.extract(&Gray::new(8, 8, vec![0.5; 64])).is_empty());
        let slope = (0..64 * 48).map(|k| (k % 64) as f32 / 64.0).collect();
        assert!(extractor.extract(&Gray::new(64, 48, slope)).is_empty(), "a slope has no extremum");
    }

    #[test]
    fn directions_are_eighths_of_a_turn() {
        for k in 0..64 {
            let angle = (k as f32 + 0.3) * PI / 32.0;
            let got = octants(angle.sin(), angle.cos());
            assert!((got - angle * 4.0 / PI).abs() < 2e-3, "{angle}: {got}");
        }
    }

    #[test]
    fn descriptors_turn_with_the_picture_and_not_with_a_mirror() {
        let mut rng = mindseye_base::random::Rng::new(5);
        let all: Vec<(f32, f32, f32, f32)> = (0..90)
            .map(|_| {
                let mut within = |a: f64, b: f64| (a + (b - a) * rng.unit()) as f32;
                (within(0.0, 99.0), within(0.0, 99.0), within(1.2, 5.0), within(-0.25, 0.25))
            })
            .collect();
        let n = 100;
        let seen = |f: &dyn Fn(f32, f32) -> (f32, f32)| {
            let moved: Vec<_> = all.iter().map(|(x, y, s, v)| (f(*x, *y).0, f(*x, *y).1, *s, *v)).collect();
            Extractor::new(ExtractorConfig::default()).extract(&blobs(n, n, &moved))
        };
        let plain = seen(&|x, y| (x, y));
        let turned = seen(&|x, y| (99.0 - y, x));
        let mirrored = seen(&|x, y| (99.0 - x, y));
        assert!(plain.len() > 30, "{}", plain.len());
        let matched = |other: &Features, map: &dyn Fn(f32, f32) -> (f32, f32)| {
            let mut right = 0;
            for (point, descriptor) in plain.keypoints.iter().zip(&plain.descriptors) {
                let best =
                    (0..other.len()).min_by_key(|k| other.descriptors[*k].distance(descriptor)).unwrap();
                let (x, y) = map(point.x, point.y);
                let at = other.keypoints[best];
                right += usize::from((at.x - x).hypot(at.y - y) < 1.5);
            }
            right as f64 / plain.len() as f64
        };
        let same = matched(&turned, &|x, y| (99.0 - y, x));
        let mirror = matched(&mirrored, &|x, y| (99.0 - x, y));
        assert!(same > 0.8, "turned: {same}");
        assert!(mirror < 0.4 * same, "mirrored: {mirror}");
    }
}
