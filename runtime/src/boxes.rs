//! Finds the red box that the model draws around the goal in the last imagined frames.
//!
//! The box is a one- or two-pixel outline in pure red. Imagined frames are blurry and goals can be red
//! themselves, so a box is an outline that is redder than both what it encloses and what lies around it.

use crate::image::RgbImage;

/// An axis-aligned box in pixels: the outline's pixels are `x0..=x1` by `y0..=y1`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FoundBox {
    /// Left column.
    pub x0: usize,
    /// Top row.
    pub y0: usize,
    /// Right column.
    pub x1: usize,
    /// Bottom row.
    pub y1: usize,
    /// How much redder the outline is than its surroundings, 0..1.
    pub score: f64,
}

impl FoundBox {
    /// `x0, y0, x1, y1` as edges in pixels (right and bottom edges exclusive).
    pub fn edges(&self) -> [f64; 4] {
        [self.x0 as f64, self.y0 as f64, self.x1 as f64 + 1.0, self.y1 as f64 + 1.0]
    }

    /// Intersection over union with another box given by its edges.
    pub fn iou(&self, other: [f64; 4]) -> f64 {
        let a = self.edges();
        let overlap = |lo: usize, hi: usize| (a[hi].min(other[hi]) - a[lo].max(other[lo])).max(0.0);
        let both = overlap(0, 2) * overlap(1, 3);
        let area = |b: [f64; 4]| (b[2] - b[0]).max(0.0) * (b[3] - b[1]).max(0.0);
        both / (area(a) + area(other) - both).max(1e-9)
    }
}

/// Largest picture side that is searched at full resolution.
const SEARCH_SIDE: usize = 40;

/// The best box in the mean of the given frames (all of one size), or `None` without frames. Whether its score
/// is good enough is the caller's decision.
pub fn find_box(frames: &[RgbImage]) -> Option<FoundBox> {
    let first = frames.first()?;
    let (width, height) = (first.width, first.height);
    if frames.iter().any(|f| (f.width, f.height) != (width, height)) {
        return None;
    }
    // Redness in 0..1: what red has over the brighter of the two others, averaged over frames and blocks.
    let block = width.max(height).div_ceil(SEARCH_SIDE).max(1);
    let (w, h) = (width / block, height / block);
    if w < 3 || h < 3 {
        return None;
    }
    let mut red = vec![0.0f64; w * h];
    for frame in frames {
        for y in 0..h * block {
            for x in 0..w * block {
                let [r, g, b] = frame.pixel(x, y);
                let over = (f64::from(r) - f64::from(g.max(b))).max(0.0) / 255.0;
                red[y / block * w + x / block] += over;
            }
        }
    }
    let samples = (frames.len() * block * block) as f64;
    red.iter_mut().for_each(|v| *v /= samples);

    // Sums over rectangles by inclusion and exclusion.
    let mut sums = vec![0.0f64; (w + 1) * (h + 1)];
    for y in 0..h {
        for x in 0..w {
            sums[(y + 1) * (w + 1) + x + 1] =
                red[y * w + x] + sums[y * (w + 1) + x + 1] + sums[(y + 1) * (w + 1) + x]
                    - sums[y * (w + 1) + x];
        }
    }
    let at = |x: usize, y: usize| sums[y * (w + 1) + x];
    let area = |x0: usize, y0: usize, x1: usize, y1: usize| {
        (at(x1, y1) - at(x0, y1) - at(x1, y0) + at(x0, y0), ((x1 - x0) * (y1 - y0)) as f64)
    };

    let mut best: Option<FoundBox> = None;
    for y0 in 0..h - 2 {
        for y1 in y0 + 2..h {
            for x0 in 0..w - 2 {
                for x1 in x0 + 2..w {
                    let (whole, whole_n) = area(x0, y0, x1 + 1, y1 + 1);
                    let (inner, inner_n) = area(x0 + 1, y0 + 1, x1, y1);
                    let (wide, wide_n) =
                        area(x0.saturating_sub(1), y0.saturating_sub(1), (x1 + 2).min(w), (y1 + 2).min(h));
                    let outline_n = whole_n - inner_n;
                    let outline = (whole - inner) / outline_n;
                    let within = inner / inner_n;
                    let around = if wide_n > whole_n { (wide - whole) / (wide_n - whole_n) } else { 0.0 };
                    // Short outlines reach a high mean by chance; they count less.
                    let trust = outline_n / (outline_n + 4.0);
                    let score = (outline - within.max(around)) * trust;
                    if best.is_none_or(|b| score > b.score) {
                        best = Some(FoundBox { x0, y0, x1, y1, score });
                    }
                }
            }
        }
    }
    best.map(|b| FoundBox {
        x0: b.x0 * block,
        y0: b.y0 * block,
        x1: b.x1 * block + block - 1,
        y1: b.y1 * block + block - 1,
        score: b.score.clamp(0.0, 1.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outline(picture: &mut RgbImage, [x0, y0, x1, y1]: [usize; 4], colour: [u8; 3]) {
        for y in y0..=y1 {
            for x in x0..=x1 {
                if x == x0 || x == x1 || y == y0 || y == y1 {
                    let at = (y * picture.width + x) * 3;
                    picture.data[at..at + 3].copy_from_slice(&colour);
                }
            }
        }
    }

    fn fill(picture: &mut RgbImage, [x0, y0, x1, y1]: [usize; 4], colour: [u8; 3]) {
        for y in y0..=y1 {
            outline(picture, [x0, y, x1, y], colour);
        }
    }

    #[test]
    fn boxes_are_found_where_they_are() {
        let grey = RgbImage::filled(24, 16, [120, 125, 130]);
        let check = |name: &str, picture: RgbImage, want: Option<[usize; 4]>| {
            let found = find_box(&[picture]).unwrap();
            match want {
                Some(want) => {
                    assert_eq!([found.x0, found.y0, found.x1, found.y1], want, "{name}: {found:?}");
                    assert!(found.score > 0.25, "{name}: {found:?}");
                }
                None => assert!(found.score < 0.2, "{name}: {found:?}"),
            }
        };
        let mut plain = grey.clone();
        outline(&mut plain, [8, 4, 15, 12], [255, 0, 0]);
        check("a box", plain, Some([8, 4, 15, 12]));
        let mut pale = grey.clone();
        outline(&mut pale, [8, 4, 15, 12], [220, 70, 70]);
        check("a pale box", pale, Some([8, 4, 15, 12]));
        let mut around_red = grey.clone();
        fill(&mut around_red, [10, 6, 13, 10], [200, 40, 40]);
        outline(&mut around_red, [8, 4, 15, 12], [255, 0, 0]);
        check("a box around a red thing", around_red, Some([8, 4, 15, 12]));
        let mut red_thing = grey.clone();
        fill(&mut red_thing, [8, 4, 15, 12], [220, 40, 40]);
        check("a red thing without a box", red_thing, None);
        check("nothing", grey, None);
        let mut wall = RgbImage::filled(24, 16, [200, 60, 60]);
        fill(&mut wall, [0, 10, 23, 15], [90, 80, 70]);
        check("a red wall", wall, None);
    }

    #[test]
    fn large_pictures_are_searched_in_blocks() {
        let mut picture = RgbImage::filled(120, 80, [100, 100, 100]);
        for inset in 0..3 {
            outline(&mut picture, [30 + inset, 20 + inset, 89 - inset, 59 - inset], [255, 0, 0]);
        }
        let found = find_box(&[picture]).unwrap();
        assert!(found.iou([30.0, 20.0, 90.0, 60.0]) > 0.85, "{found:?}");
    }

    #[test]
    fn odd_inputs_give_none() {
        assert!(find_box(&[]).is_none());
        assert!(find_box(&[RgbImage::filled(2, 9, [0; 3])]).is_none());
        let mixed = [RgbImage::filled(9, 9, [0; 3]), RgbImage::filled(8, 9, [0; 3])];
        assert!(find_box(&mixed).is_none());
    }
}
