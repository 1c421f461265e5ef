//! Pictures at another size: averaged where they become smaller, interpolated where they become larger.

/// What goes into one pixel along one axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Taps {
    /// The first source pixel.
    pub first: usize,
    /// A weight for it and each that follows.
    pub weights: Vec<f32>,
}

impl Taps {
    /// The source pixels, of `count`, that the stretch from `from` to `to` covers, source pixel `k` being the stretch from
    /// `k` to `k + 1`: each with its share of the whole stretch. What lies outside has no weight.
    #[must_use]
    pub fn covering(from: f64, to: f64, count: usize) -> Self {
        let (a, b) = (from.max(0.0), to.min(count as f64));
        if b <= a {
            return Self::default();
        }
        let first = (a.floor() as usize).min(count - 1);
        let last = ((b.ceil() as usize).max(first + 1)).min(count);
        let length = to - from;
        let share = |k: usize| (((b.min(k as f64 + 1.0) - a.max(k as f64)).max(0.0)) / length) as f32;
        Self { first, weights: (first..last).map(share).collect() }
    }

    /// The sum of the weights: the share of the stretch that lies inside.
    #[must_use]
    pub fn inside(&self) -> f32 {
        self.weights.iter().sum()
    }
}

/// From one size to another; what goes into each pixel is found once.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaler {
    from: (usize, usize),
    columns: Vec<Taps>,
    rows: Vec<Taps>,
    line: Vec<f32>,
}

/// A picture of another size than the scaler's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{got} bytes for a picture of {}x{} RGB pixels", size.0, size.1)]
pub struct WrongSize {
    /// Bytes given.
    pub got: usize,
    /// Width and height that were promised.
    pub size: (usize, usize),
}

impl Scaler {
    /// For pictures of `from` (width, height) pixels, to `to`; no side may be 0, such sides count as 1.
    #[must_use]
    pub fn new(from: (usize, usize), to: (usize, usize)) -> Self {
        let from = (from.0.max(1), from.1.max(1));
        Self::with_taps(from, taps(from.0, to.0.max(1)), taps(from.1, to.1.max(1)))
    }

    /// For pictures of `from` (width, height) pixels, with what goes into each column and row of the scaled picture: source
    /// pixels that there are.
    #[must_use]
    pub fn with_taps(from: (usize, usize), columns: Vec<Taps>, rows: Vec<Taps>) -> Self {
        Self { from, columns, rows, line: vec![0.0; from.0 * 3] }
    }

    /// Width and height of its pictures.
    #[must_use]
    pub fn from(&self) -> (usize, usize) {
        self.from
    }

    /// Width and height of what it makes.
    #[must_use]
    pub fn to(&self) -> (usize, usize) {
        (self.columns.len(), self.rows.len())
    }

    /// Calls `put` with each pixel (red, green, blue in 0..255) of the scaled picture, row by row.
    ///
    /// # Errors
    /// [`WrongSize`] when `rgb` is not `width * height * 3` bytes.
    pub fn scale(&mut self, rgb: &[u8], mut put: impl FnMut([f32; 3])) -> Result<(), WrongSize> {
        let (width, height) = self.from;
        if rgb.len() != width * height * 3 {
            return Err(WrongSize { got: rgb.len(), size: self.from });
        }
        for row in &self.rows {
            self.line.fill(0.0);
            for (k, weight) in row.weights.iter().enumerate() {
                let source = &rgb[(row.first + k) * width * 3..][..width * 3];
                for (sum, value) in self.line.iter_mut().zip(source) {
                    *sum += weight * f32::from(*value);
                }
            }
            for column in &self.columns {
                let mut sum = [0.0f32; 3];
                let pixels = self.line[column.first * 3..].chunks_exact(3);
                for (weight, pixel) in column.weights.iter().zip(pixels) {
                    for (s, v) in sum.iter_mut().zip(pixel) {
                        *s += weight * v;
                    }
                }
                put(sum);
            }
        }
        Ok(())
    }
}

fn taps(from: usize, to: usize) -> Vec<Taps> {
    let step = from as f64 / to as f64;
    (0..to)
        .map(|i| {
            // A source pixel's centre is at k + 1/2.
            let (a, b) = if step >= 1.0 {
                (i as f64 * step, (i + 1) as f64 * step)
            } else {
                let centre = (i as f64 + 0.5) * step;
                (centre - 0.5, centre + 0.5)
            };
            let mut taps = Taps::covering(a, b, from);
            let inside = taps.inside().max(1e-9);
            taps.weights.iter_mut().for_each(|w| *w /= inside);
            taps
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(rgb: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<f32> {
        let mut out = Vec::new();
        Scaler::new(from, to).scale(rgb, |p| out.push(p[0])).expect("the sizes agree");
        out
    }

    #[test]
    fn values_by_hand() {
        let grey = |values: &[u8]| -> Vec<u8> { values.iter().flat_map(|v| [*v; 3]).collect() };
        let check = |values: &[u8], from, to, want: &[f32]| {
            let got = scaled(&grey(values), from, to);
            let near = got.len() == want.len() && got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-3);
            assert!(near, "{got:?}, wanted {want:?}");
        };
        check(&[0, 10, 20, 30], (4, 1), (4, 1), &[0.0, 10.0, 20.0, 30.0]);
        check(&[0, 10, 20, 30], (4, 1), (2, 1), &[5.0, 25.0]);
        check(&[0, 10, 20, 30], (2, 2), (1, 1), &[15.0]);
        // 3 to 2: pixels of 1.5 source pixels.
        check(&[0, 30, 60], (3, 1), (2, 1), &[10.0, 50.0]);
        // Larger: linear between the centres, the edge beyond them.
        check(&[0, 40], (2, 1), (4, 1), &[0.0, 10.0, 30.0, 40.0]);
        assert!(Scaler::new((2, 2), (1, 1)).scale(&[0; 5], |_| ()).is_err());
    }
}
