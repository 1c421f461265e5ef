//! Paths for a round robot: A* on a coarse grid, then straightened.

use crate::house::{House, Rect};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Side of a planning cell (m).
const CELL_M: f64 = 0.1;

/// Cells of the floor in which a robot of some radius stands free.
#[derive(Debug, Clone, PartialEq)]
pub struct NavGrid {
    x0: f64,
    y0: f64,
    cols: usize,
    rows: usize,
    radius_m: f64,
    free: Vec<bool>,
}

impl NavGrid {
    /// The grid for a disc of this radius (m).
    #[must_use]
    pub fn new(house: &House, radius_m: f64) -> Self {
        let b = &house.bounds;
        let cols = (b.width() / CELL_M).floor() as usize + 1;
        let rows = (b.depth() / CELL_M).floor() as usize + 1;
        let mut free = vec![false; cols * rows];
        let x = |i: usize| b.x0 + i as f64 * CELL_M;
        let y = |j: usize| b.y0 + j as f64 * CELL_M;
        let inside = |v: f64, lo: f64, hi: f64| v - lo >= radius_m && hi - v >= radius_m;
        for (j, row) in free.chunks_exact_mut(cols).enumerate() {
            if inside(y(j), b.y0, b.y1) {
                for (i, cell) in row.iter_mut().enumerate() {
                    *cell = inside(x(i), b.x0, b.x1);
                }
            }
        }
        // Everything else only reaches as far as its outline grown by the radius.
        let mut stamp = |area: Rect, distance: &dyn Fn(f64, f64) -> f64| {
            let lo = |v: f64, first: f64| ((v - radius_m - first) / CELL_M).floor().max(0.0) as usize;
            let hi = |v: f64, first: f64, n: usize| {
                (((v + radius_m - first) / CELL_M).ceil().max(0.0) as usize).min(n - 1)
            };
            for j in lo(area.y0, b.y0)..=hi(area.y1, b.y0, rows) {
                for i in lo(area.x0, b.x0)..=hi(area.x1, b.x0, cols) {
                    if distance(x(i), y(j)) < radius_m {
                        free[j * cols + i] = false;
                    }
                }
            }
        };
        for w in house.walls.iter().filter(|w| w.z0 == 0.0) {
            stamp(w.rect, &|x, y| w.rect.distance(x, y));
        }
        for o in &house.objects {
            let r = o.radius;
            let area = Rect { x0: o.x - r, y0: o.y - r, x1: o.x + r, y1: o.y + r };
            stamp(area, &|x, y| o.distance(x, y));
        }
        Self { x0: b.x0, y0: b.y0, cols, rows, radius_m, free }
    }

    fn place(&self, cell: usize) -> (f64, f64) {
        (self.x0 + (cell % self.cols) as f64 * CELL_M, self.y0 + (cell / self.cols) as f64 * CELL_M)
    }

    /// The free cell nearest to a point, within 0.6 m.
    fn snap(&self, x: f64, y: f64) -> Option<usize> {
        if !x.is_finite() || !y.is_finite() {
            return None;
        }
        let clamp = |v: f64, n: usize| (v.round().max(0.0) as usize).min(n.saturating_sub(1));
        let (i, j) = (clamp((x - self.x0) / CELL_M, self.cols), clamp((y - self.y0) / CELL_M, self.rows));
        let mut best: Option<(f64, usize)> = None;
        for dj in -6i64..=6 {
            for di in -6i64..=6 {
                let (ci, cj) = (i as i64 + di, j as i64 + dj);
                if ci < 0 || cj < 0 || ci >= self.cols as i64 || cj >= self.rows as i64 {
                    continue;
                }
                let cell = cj as usize * self.cols + ci as usize;
                let (px, py) = self.place(cell);
                let d = (px - x).hypot(py - y);
                if self.free[cell] && d <= 0.6 && best.is_none_or(|b| d < b.0) {
                    best = Some((d, cell));
                }
            }
        }
        best.map(|b| b.1)
    }

    /// The point itself where the disc stands free there, else the nearest free cell within 0.6 m.
    #[must_use]
    pub fn nearest_free(&self, house: &House, x: f64, y: f64) -> Option<(f64, f64)> {
        if x.is_finite() && y.is_finite() && house.clearance(x, y) >= self.radius_m {
            return Some((x, y));
        }
        self.snap(x, y).map(|c| self.place(c))
    }

    /// A polyline from `from` to `to` (both included, map metres) that the disc can follow; none when there is no
    /// way. Ends that are not free are joined to the nearest free place within 0.6 m.
    #[must_use]
    pub fn path(&self, house: &House, from: (f64, f64), to: (f64, f64)) -> Option<Vec<(f64, f64)>> {
        if house.segment_free(from, to, self.radius_m) {
            return Some(vec![from, to]);
        }
        let (start, goal) = (self.snap(from.0, from.1)?, self.snap(to.0, to.1)?);
        let n = self.cols * self.rows;
        let mut cost = vec![u32::MAX; n];
        let mut parent = vec![u32::MAX; n];
        let mut queue = BinaryHeap::new();
        // Costs in tenths of a cell: 10 straight, 14 diagonal.
        let rest = |cell: usize| {
            let dx = (cell % self.cols).abs_diff(goal % self.cols) as u32;
            let dy = (cell / self.cols).abs_diff(goal / self.cols) as u32;
            10 * dx.max(dy) + 4 * dx.min(dy)
        };
        cost[start] = 0;
        queue.push(Reverse((rest(start), start)));
        while let Some(Reverse((estimate, cell))) = queue.pop() {
            if cell == goal {
                break;
            }
            if estimate > cost[cell].saturating_add(rest(cell)) {
                continue;
            }
            let (i, j) = ((cell % self.cols) as i64, (cell / self.cols) as i64);
            for (di, dj, step) in [
                (1i64, 0i64, 10u32),
                (-1, 0, 10),
                (0, 1, 10),
                (0, -1, 10),
                (1, 1, 14),
                (1, -1, 14),
                (-1, 1, 14),
                (-1, -1, 14),
            ] {
                let (ci, cj) = (i + di, j + dj);
                if ci < 0 || cj < 0 || ci >= self.cols as i64 || cj >= self.rows as i64 {
                    continue;
                }
                let next = cj as usize * self.cols + ci as usize;
                let total = cost[cell] + step;
                if self.free[next] && total < cost[next] {
                    cost[next] = total;
                    parent[next] = cell as u32;
                    queue.push(Reverse((total + rest(next), next)));
                }
            }
        }
        if cost[goal] == u32::MAX {
            return None;
        }
        let mut cells = vec![to];
        let mut at = goal;
        while at != start {
            cells.push(self.place(at));
            at = parent[at] as usize;
        }
        cells.push(self.place(start));
        cells.push(from);
        cells.reverse();
        Some(self.straighten(house, &cells))
    }

    /// Keeps only the corners that are needed: from each one, the furthest point that can be reached straight.
    fn straighten(&self, house: &House, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        let mut out = vec![points[0]];
        let mut i = 0;
        while i + 1 < points.len() {
            let mut next = i + 1;
            for j in (i + 2..points.len()).rev() {
                if house.segment_free(points[i], points[j], self.radius_m) {
                    next = j;
                    break;
                }
            }
            out.push(points[next]);
            i = next;
        }
        out.dedup_by(|a, b| (a.0 - b.0).hypot(a.1 - b.1) < 1e-9);
        out
    }
}
