//! Features by place, so that those near a pixel are found without looking at all.

use crate::features::Keypoint;
use nalgebra::Vector2;

const CELL_PX: f64 = 8.0;

/// Keypoints in square cells.
#[derive(Debug)]
pub(crate) struct Grid {
    columns: usize,
    rows: usize,
    /// First keypoint of each cell in `order`, and one more.
    starts: Vec<u32>,
    order: Vec<u32>,
    places: Vec<Vector2<f64>>,
}

impl Grid {
    pub(crate) fn new(keypoints: &[Keypoint], (width, height): (u32, u32)) -> Self {
        let columns = (f64::from(width) / CELL_PX).ceil().max(1.0) as usize;
        let rows = (f64::from(height) / CELL_PX).ceil().max(1.0) as usize;
        let places: Vec<Vector2<f64>> =
            keypoints.iter().map(|k| Vector2::new(f64::from(k.x), f64::from(k.y))).collect();
        let cell = |p: &Vector2<f64>| {
            let at = |v: f64, n: usize| ((v / CELL_PX).max(0.0) as usize).min(n - 1);
            at(p.y, rows) * columns + at(p.x, columns)
        };
        let mut starts = vec![0u32; columns * rows + 1];
        for p in &places {
            starts[cell(p) + 1] += 1;
        }
        for c in 1..starts.len() {
            starts[c] += starts[c - 1];
        }
        let mut next = starts.clone();
        let mut order = vec![0; places.len()];
        for (k, p) in places.iter().enumerate() {
            let slot = &mut next[cell(p)];
            order[*slot as usize] = k as u32;
            *slot += 1;
        }
        Self { columns, rows, starts, order, places }
    }

    /// Calls `take` with each keypoint within a radius (pixels).
    pub(crate) fn within(&self, at: Vector2<f64>, radius: f64, mut take: impl FnMut(u32)) {
        let cells = |v: f64, n: usize| {
            let low = ((v - radius) / CELL_PX).max(0.0) as usize;
            let high = ((v + radius) / CELL_PX).max(0.0) as usize;
            low.min(n - 1)..=high.min(n - 1)
        };
        for row in cells(at.y, self.rows) {
            for column in cells(at.x, self.columns) {
                let c = row * self.columns + column;
                for k in &self.order[self.starts[c] as usize..self.starts[c + 1] as usize] {
                    if (self.places[*k as usize] - at).norm_squared() <= radius * radius {
                        take(*k);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_base::random::Rng;

    #[test]
    fn the_same_as_looking_at_all() {
        let mut rng = Rng::new(3);
        let all: Vec<Keypoint> = (0..300)
            .map(|_| Keypoint {
                x: rng.range(0.0, 99.0) as f32,
                y: rng.range(0.0, 59.0) as f32,
                scale: 1.0,
                angle: 0.0,
                response: 1.0,
            })
            .collect();
        let grid = Grid::new(&all, (100, 60));
        for _ in 0..50 {
            let (x, y, radius) = (rng.range(-5.0, 105.0), rng.range(-5.0, 65.0), rng.range(0.5, 20.0));
            let mut got = Vec::new();
            grid.within(Vector2::new(x, y), radius, |k| got.push(k));
            got.sort_unstable();
            let want: Vec<u32> = (0..300)
                .filter(|k| {
                    let p = &all[*k as usize];
                    (f64::from(p.x) - x).hypot(f64::from(p.y) - y) <= radius
                })
                .collect();
            assert_eq!(got, want, "at {x} {y}, {radius}");
        }
    }
}
