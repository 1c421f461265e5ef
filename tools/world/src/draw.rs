//! Drawing into RGB images: lines, shapes, text and scaled copies. Coordinates are pixels, x right, y down; what lies
//! outside the image is cut off.

/// An RGB image, 8 bits per channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canvas {
    /// Width (pixels).
    pub width: usize,
    /// Height (pixels).
    pub height: usize,
    /// `height x width x 3`.
    pub rgb: Vec<u8>,
}

impl Canvas {
    /// A canvas of one colour.
    #[must_use]
    pub fn new(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, rgb: colour.repeat(width * height) }
    }

    /// A canvas from pixels; none unless `rgb` has `width x height x 3` bytes.
    #[must_use]
    pub fn from_rgb(width: usize, height: usize, rgb: Vec<u8>) -> Option<Self> {
        (width.checked_mul(height)?.checked_mul(3)? == rgb.len()).then_some(Self { width, height, rgb })
    }

    /// Sets one pixel.
    pub fn put(&mut self, x: i64, y: i64, colour: [u8; 3]) {
        self.blend(x, y, colour, 1.0);
    }

    /// Mixes a colour into one pixel; `cover` 0 leaves it, 1 replaces it.
    pub fn blend(&mut self, x: i64, y: i64, colour: [u8; 3], cover: f32) {
        if x < 0 || y < 0 || x as usize >= self.width || y as usize >= self.height {
            return;
        }
        let at = (y as usize * self.width + x as usize) * 3;
        let cover = cover.clamp(0.0, 1.0);
        for (p, c) in self.rgb[at..at + 3].iter_mut().zip(colour) {
            *p = (f32::from(*p) + (f32::from(c) - f32::from(*p)) * cover + 0.5) as u8;
        }
    }

    /// The colour of one pixel; black outside.
    #[must_use]
    pub fn get(&self, x: usize, y: usize) -> [u8; 3] {
        if x >= self.width || y >= self.height {
            return [0; 3];
        }
        let at = (y * self.width + x) * 3;
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// Blends every pixel whose centre is inside, with a soft edge: `distance` is negative inside (pixels).
    fn soft(&mut self, area: [f32; 4], colour: [u8; 3], cover: f32, distance: impl Fn(f32, f32) -> f32) {
        if area.iter().any(|v| !v.is_finite()) {
            return;
        }
        let x0 = (area[0] - 1.0).floor().max(0.0) as i64;
        let y0 = (area[1] - 1.0).floor().max(0.0) as i64;
        let x1 = (area[2] + 1.0).ceil().min(self.width as f32) as i64;
        let y1 = (area[3] + 1.0).ceil().min(self.height as f32) as i64;
        for y in y0..y1 {
            for x in x0..x1 {
                let d = distance(x as f32 + 0.5, y as f32 + 0.5);
                if d < 0.5 {
                    self.blend(x, y, colour, cover * (0.5 - d).clamp(0.0, 1.0));
                }
            }
        }
    }

    /// A line of some thickness with round ends.
    pub fn line(&mut self, a: (f32, f32), b: (f32, f32), thickness: f32, colour: [u8; 3]) {
        self.line_cover(a, b, thickness, colour, 1.0);
    }

    /// A translucent [`Canvas::line`].
    pub fn line_cover(&mut self, a: (f32, f32), b: (f32, f32), thickness: f32, colour: [u8; 3], cover: f32) {
        let r = thickness * 0.5;
        let area = [a.0.min(b.0) - r, a.1.min(b.1) - r, a.0.max(b.0) + r, a.1.max(b.1) + r];
        let (dx, dy) = (b.0 - a.0, b.1 - a.1);
        let len2 = (dx * dx + dy * dy).max(1e-12);
        self.soft(area, colour, cover, |x, y| {
            let k = (((x - a.0) * dx + (y - a.1) * dy) / len2).clamp(0.0, 1.0);
            (x - a.0 - k * dx).hypot(y - a.1 - k * dy) - r
        });
    }

    /// A polyline.
    pub fn polyline(&mut self, points: &[(f32, f32)], thickness: f32, colour: [u8; 3]) {
        for pair in points.windows(2) {
            self.line(pair[0], pair[1], thickness, colour);
        }
    }

    /// A filled circle.
    pub fn disc(&mut self, centre: (f32, f32), radius: f32, colour: [u8; 3]) {
        self.disc_cover(centre, radius, colour, 1.0);
    }

    /// A translucent [`Canvas::disc`].
    pub fn disc_cover(&mut self, centre: (f32, f32), radius: f32, colour: [u8; 3], cover: f32) {
        let area = [centre.0 - radius, centre.1 - radius, centre.0 + radius, centre.1 + radius];
        self.soft(area, colour, cover, |x, y| (x - centre.0).hypot(y - centre.1) - radius);
    }

    /// A circle's outline.
    pub fn circle(&mut self, centre: (f32, f32), radius: f32, thickness: f32, colour: [u8; 3]) {
        let r = radius + thickness * 0.5;
        let area = [centre.0 - r, centre.1 - r, centre.0 + r, centre.1 + r];
        self.soft(area, colour, 1.0, |x, y| {
            ((x - centre.0).hypot(y - centre.1) - radius).abs() - thickness * 0.5
        });
    }

    /// A filled convex polygon (either winding).
    pub fn polygon(&mut self, points: &[(f32, f32)], colour: [u8; 3]) {
        self.polygon_cover(points, colour, 1.0);
    }

    /// A translucent [`Canvas::polygon`].
    pub fn polygon_cover(&mut self, points: &[(f32, f32)], colour: [u8; 3], cover: f32) {
        if points.len() < 3 {
            return;
        }
        let mut area = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
        let mut doubled = 0.0;
        for (k, p) in points.iter().enumerate() {
            area = [area[0].min(p.0), area[1].min(p.1), area[2].max(p.0), area[3].max(p.1)];
            let q = points[(k + 1) % points.len()];
            doubled += p.0 * q.1 - q.0 * p.1;
        }
        let sign = doubled.signum();
        self.soft(area, colour, cover, |x, y| {
            let mut d = f32::MIN;
            for (k, p) in points.iter().enumerate() {
                let q = points[(k + 1) % points.len()];
                let (ex, ey) = (q.0 - p.0, q.1 - p.1);
                let length = ex.hypot(ey).max(1e-6);
                d = d.max(-sign * (ex * (y - p.1) - ey * (x - p.0)) / length);
            }
            d
        });
    }

    /// An arrow from `a` to `b` with a filled head.
    pub fn arrow(&mut self, a: (f32, f32), b: (f32, f32), thickness: f32, colour: [u8; 3]) {
        let (dx, dy) = (b.0 - a.0, b.1 - a.1);
        let length = dx.hypot(dy);
        if length.is_nan() || length <= 1e-3 {
            return;
        }
        let (ux, uy) = (dx / length, dy / length);
        let head = (thickness * 3.5).max(5.0).min(length);
        let neck = (b.0 - ux * head, b.1 - uy * head);
        self.line(a, neck, thickness, colour);
        let side = head * 0.55;
        self.polygon(
            &[b, (neck.0 - uy * side, neck.1 + ux * side), (neck.0 + uy * side, neck.1 - ux * side)],
            colour,
        );
    }

    /// A filled rectangle of whole pixels.
    pub fn fill_rect(&mut self, x: i64, y: i64, width: usize, height: usize, colour: [u8; 3]) {
        self.fill_rect_cover(x, y, width, height, colour, 1.0);
    }

    /// A translucent [`Canvas::fill_rect`].
    pub fn fill_rect_cover(
        &mut self,
        x: i64,
        y: i64,
        width: usize,
        height: usize,
        colour: [u8; 3],
        cover: f32,
    ) {
        let x1 = x.saturating_add_unsigned(width as u64).min(self.width as i64);
        let y1 = y.saturating_add_unsigned(height as u64).min(self.height as i64);
        for py in y.max(0)..y1 {
            for px in x.max(0)..x1 {
                self.blend(px, py, colour, cover);
            }
        }
    }

    /// A rectangle's outline, drawn inwards.
    pub fn outline_rect(
        &mut self,
        x: i64,
        y: i64,
        width: usize,
        height: usize,
        thickness: usize,
        colour: [u8; 3],
    ) {
        let t = thickness.min(width.div_ceil(2)).min(height.div_ceil(2));
        let (w, h, ti) = (width as i64, height as i64, t as i64);
        self.fill_rect(x, y, width, t, colour);
        self.fill_rect(x, y + h - ti, width, t, colour);
        self.fill_rect(x, y, t, height, colour);
        self.fill_rect(x + w - ti, y, t, height, colour);
    }

    /// Copies an RGB image of `width` pixels per row, enlarged by whole pixels (nearest neighbour).
    pub fn blit(&mut self, x: i64, y: i64, rgb: &[u8], width: usize, zoom: usize) {
        if width == 0 || zoom == 0 {
            return;
        }
        for (k, p) in rgb.chunks_exact(3).enumerate() {
            let (px, py) = (x + ((k % width) * zoom) as i64, y + ((k / width) * zoom) as i64);
            self.fill_rect(px, py, zoom, zoom, [p[0], p[1], p[2]]);
        }
    }

    /// Copies an RGB image into a rectangle of any size (bilinear; box-averaged when it shrinks).
    pub fn blit_scaled(&mut self, x: i64, y: i64, width: usize, height: usize, image: (&[u8], usize)) {
        let (rgb, from_width) = image;
        let from_height = rgb.len().checked_div(3 * from_width).unwrap_or(0);
        if from_height == 0 || width == 0 || height == 0 {
            return;
        }
        let (kx, ky) = (from_width as f32 / width as f32, from_height as f32 / height as f32);
        let taps = |k: f32| (k.ceil() as usize).clamp(1, 8);
        let (nx, ny) = (taps(kx), taps(ky));
        let at = |i: i64, j: i64, c: usize| {
            let (i, j) = (i.clamp(0, from_width as i64 - 1), j.clamp(0, from_height as i64 - 1));
            f32::from(rgb[(j as usize * from_width + i as usize) * 3 + c])
        };
        for py in 0..height {
            for px in 0..width {
                let mut sum = [0.0f32; 3];
                for sy in 0..ny {
                    for sx in 0..nx {
                        let fx = (px as f32 + (sx as f32 + 0.5) / nx as f32) * kx - 0.5;
                        let fy = (py as f32 + (sy as f32 + 0.5) / ny as f32) * ky - 0.5;
                        let (i, j) = (fx.floor(), fy.floor());
                        let (tx, ty) = (fx - i, fy - j);
                        let (i, j) = (i as i64, j as i64);
                        for (c, s) in sum.iter_mut().enumerate() {
                            let top = at(i, j, c) * (1.0 - tx) + at(i + 1, j, c) * tx;
                            let low = at(i, j + 1, c) * (1.0 - tx) + at(i + 1, j + 1, c) * tx;
                            *s += top * (1.0 - ty) + low * ty;
                        }
                    }
                }
                let n = (nx * ny) as f32;
                self.put(x + px as i64, y + py as i64, sum.map(|s| (s / n + 0.5) as u8));
            }
        }
    }

    /// Text in a 5 x 7 bitmap font (descenders use an eighth row), enlarged by `zoom`; each character takes `6 * zoom` pixels. Printable ASCII;
    /// other characters show as a box. Returns the x after the last character.
    pub fn text(&mut self, x: i64, y: i64, text: &str, zoom: usize, colour: [u8; 3]) -> i64 {
        let mut at = x;
        for c in text.chars() {
            for (i, bits) in glyph(c).into_iter().enumerate() {
                for row in 0..8 {
                    if bits >> row & 1 == 1 {
                        let (px, py) = (at + (i * zoom) as i64, y + (row * zoom) as i64);
                        self.fill_rect(px, py, zoom, zoom, colour);
                    }
                }
            }
            at += (6 * zoom) as i64;
        }
        at
    }
}

/// Width of a text in pixels.
#[must_use]
pub fn text_width(text: &str, zoom: usize) -> usize {
    text.chars().count() * 6 * zoom
}

/// Five columns of bits, lowest bit on top; the eighth row holds descenders.
fn glyph(c: char) -> [u8; 5] {
    let index = (c as u32).wrapping_sub(32) as usize;
    FONT.get(index).copied().unwrap_or([0x7f, 0x41, 0x41, 0x41, 0x7f])
}

/// Space to tilde.
const FONT: [[u8; 5]; 95] = [
    [0x00, 0x00, 0x00, 0x00, 0x00],
    [0x00, 0x00, 0x5f, 0x00, 0x00],
    [0x00, 0x07, 0x00, 0x07, 0x00],
    [0x14, 0x7f, 0x14, 0x7f, 0x14],
    [0x24, 0x2a, 0x7f, 0x2a, 0x12],
    [0x23, 0x13, 0x08, 0x64, 0x62],
    [0x36, 0x49, 0x55, 0x22, 0x50],
    [0x00, 0x05, 0x03, 0x00, 0x00],
    [0x00, 0x1c, 0x22, 0x41, 0x00],
    [0x00, 0x41, 0x22, 0x1c, 0x00],
    [0x14, 0x08, 0x3e, 0x08, 0x14],
    [0x08, 0x08, 0x3e, 0x08, 0x08],
    [0x00, 0x50, 0x30, 0x00, 0x00],
    [0x08, 0x08, 0x08, 0x08, 0x08],
    [0x00, 0x60, 0x60, 0x00, 0x00],
    [0x20, 0x10, 0x08, 0x04, 0x02],
    [0x3e, 0x51, 0x49, 0x45, 0x3e],
    [0x00, 0x42, 0x7f, 0x40, 0x00],
    [0x42, 0x61, 0x51, 0x49, 0x46],
    [0x21, 0x41, 0x45, 0x4b, 0x31],
    [0x18, 0x14, 0x12, 0x7f, 0x10],
    [0x27, 0x45, 0x45, 0x45, 0x39],
    [0x3c, 0x4a, 0x49, 0x49, 0x30],
    [0x01, 0x71, 0x09, 0x05, 0x03],
    [0x36, 0x49, 0x49, 0x49, 0x36],
    [0x06, 0x49, 0x49, 0x29, 0x1e],
    [0x00, 0x36, 0x36, 0x00, 0x00],
    [0x00, 0x56, 0x36, 0x00, 0x00],
    [0x08, 0x14, 0x22, 0x41, 0x00],
    [0x14, 0x14, 0x14, 0x14, 0x14],
    [0x00, 0x41, 0x22, 0x14, 0x08],
    [0x02, 0x01, 0x51, 0x09, 0x06],
    [0x32, 0x49, 0x79, 0x41, 0x3e],
    [0x7e, 0x11, 0x11, 0x11, 0x7e],
    [0x7f, 0x49, 0x49, 0x49, 0x36],
    [0x3e, 0x41, 0x41, 0x41, 0x22],
    [0x7f, 0x41, 0x41, 0x22, 0x1c],
    [0x7f, 0x49, 0x49, 0x49, 0x41],
    [0x7f, 0x09, 0x09, 0x09, 0x01],
    [0x3e, 0x41, 0x49, 0x49, 0x7a],
    [0x7f, 0x08, 0x08, 0x08, 0x7f],
    [0x00, 0x41, 0x7f, 0x41, 0x00],
    [0x20, 0x40, 0x41, 0x3f, 0x01],
    [0x7f, 0x08, 0x14, 0x22, 0x41],
    [0x7f, 0x40, 0x40, 0x40, 0x40],
    [0x7f, 0x02, 0x0c, 0x02, 0x7f],
    [0x7f, 0x04, 0x08, 0x10, 0x7f],
    [0x3e, 0x41, 0x41, 0x41, 0x3e],
    [0x7f, 0x09, 0x09, 0x09, 0x06],
    [0x3e, 0x41, 0x51, 0x21, 0x5e],
    [0x7f, 0x09, 0x19, 0x29, 0x46],
    [0x46, 0x49, 0x49, 0x49, 0x31],
    [0x01, 0x01, 0x7f, 0x01, 0x01],
    [0x3f, 0x40, 0x40, 0x40, 0x3f],
    [0x1f, 0x20, 0x40, 0x20, 0x1f],
    [0x3f, 0x40, 0x38, 0x40, 0x3f],
    [0x63, 0x14, 0x08, 0x14, 0x63],
    [0x07, 0x08, 0x70, 0x08, 0x07],
    [0x61, 0x51, 0x49, 0x45, 0x43],
    [0x00, 0x7f, 0x41, 0x41, 0x00],
    [0x02, 0x04, 0x08, 0x10, 0x20],
    [0x00, 0x41, 0x41, 0x7f, 0x00],
    [0x04, 0x02, 0x01, 0x02, 0x04],
    [0x40, 0x40, 0x40, 0x40, 0x40],
    [0x00, 0x01, 0x02, 0x04, 0x00],
    [0x20, 0x54, 0x54, 0x54, 0x78],
    [0x7f, 0x48, 0x44, 0x44, 0x38],
    [0x38, 0x44, 0x44, 0x44, 0x20],
    [0x38, 0x44, 0x44, 0x48, 0x7f],
    [0x38, 0x54, 0x54, 0x54, 0x18],
    [0x08, 0x7e, 0x09, 0x01, 0x02],
    [0x18, 0xa4, 0xa4, 0xa4, 0x7c],
    [0x7f, 0x08, 0x04, 0x04, 0x78],
    [0x00, 0x44, 0x7d, 0x40, 0x00],
    [0x40, 0x80, 0x84, 0x7d, 0x00],
    [0x7f, 0x10, 0x28, 0x44, 0x00],
    [0x00, 0x41, 0x7f, 0x40, 0x00],
    [0x7c, 0x04, 0x18, 0x04, 0x78],
    [0x7c, 0x08, 0x04, 0x04, 0x78],
    [0x38, 0x44, 0x44, 0x44, 0x38],
    [0xfc, 0x24, 0x24, 0x24, 0x18],
    [0x18, 0x24, 0x24, 0x24, 0xfc],
    [0x7c, 0x08, 0x04, 0x04, 0x08],
    [0x48, 0x54, 0x54, 0x54, 0x20],
    [0x04, 0x3f, 0x44, 0x40, 0x20],
    [0x3c, 0x40, 0x40, 0x20, 0x7c],
    [0x1c, 0x20, 0x40, 0x20, 0x1c],
    [0x3c, 0x40, 0x30, 0x40, 0x3c],
    [0x44, 0x28, 0x10, 0x28, 0x44],
    [0x1c, 0xa0, 0xa0, 0xa0, 0x7c],
    [0x44, 0x64, 0x54, 0x4c, 0x44],
    [0x00, 0x08, 0x36, 0x41, 0x00],
    [0x00, 0x00, 0x7f, 0x00, 0x00],
    [0x00, 0x41, 0x36, 0x08, 0x00],
    [0x08, 0x04, 0x08, 0x10, 0x08],
];
