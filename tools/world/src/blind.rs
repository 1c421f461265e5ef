//! A controller that knows no map: all floor is free until the robot is stopped there.

use crate::geom::Pose2;
use crate::house::ROBOT_RADIUS_M;
use crate::robot::{Controller, ControllerLimits, ControllerState};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Side of a planning cell (m), and how far beyond start and goal there are any.
const CELL_M: f64 = 0.1;
const BEYOND_M: f64 = 2.0;
/// Kept from a place where something was met, to the robot's middle (m).
const KEPT_M: f64 = ROBOT_RADIUS_M + 0.15;
/// How far it backs off (m), and how fast (m/s).
const BACK_M: f64 = 0.12;
const BACK_MPS: f64 = 0.2;
/// After so many stops it turns to the goal's heading where it stands.
const STOPS_MAX: usize = 16;

type Point = (f64, f64);

/// Drives a robot to a goal pose without a map, in whatever frame its poses are (an odometry's): straight ahead, and
/// around what has stopped it so far.
#[derive(Debug, Clone)]
pub struct BlindController {
    goal: Pose2,
    limits: ControllerLimits,
    /// Places where something was met.
    met: Vec<Point>,
    follow: Controller,
    /// Signed speed of the last step (m/s).
    speed_mps: f64,
    /// Left to back off (m), and the direction.
    back: (f64, f64),
}

impl BlindController {
    /// Plans from `start` to `goal`.
    #[must_use]
    pub fn new(start: Pose2, goal: Pose2, limits: ControllerLimits) -> Self {
        let way = vec![(start.x, start.y), (goal.x, goal.y)];
        let follow = Controller::along(way, goal, limits);
        Self { goal, limits, met: Vec::new(), follow, speed_mps: 0.0, back: (0.0, 0.0) }
    }

    /// Whether it has stopped for good.
    #[must_use]
    pub fn done(&self) -> bool {
        self.back.0 <= 0.0 && self.follow.done()
    }

    /// How often it was stopped.
    #[must_use]
    pub fn stops(&self) -> usize {
        self.met.len()
    }

    /// Speeds for the next `dt` seconds from the estimated pose: `(v, w)` in m/s and rad/s; zero when done. `stopped`
    /// says that the last step was stopped by something.
    pub fn step(&mut self, estimate: Pose2, stopped: bool, dt: f64) -> (f64, f64) {
        if stopped && self.back.0 <= 0.0 {
            let direction = if self.speed_mps < 0.0 { -1.0 } else { 1.0 };
            let (s, c) = estimate.yaw.sin_cos();
            let ahead = direction * (ROBOT_RADIUS_M + 0.05);
            self.met.push((estimate.x + ahead * c, estimate.y + ahead * s));
            self.back = (BACK_M, -direction);
        } else if stopped {
            self.back.0 = 0.0;
            self.plan(estimate);
        }
        if self.back.0 > 0.0 {
            let v = BACK_MPS.min(self.back.0 / dt.max(1e-3));
            self.back.0 -= v * dt.max(1e-3);
            if self.back.0 <= 1e-9 {
                self.back.0 = 0.0;
                self.plan(estimate);
            }
            return (self.back.1 * v, 0.0);
        }
        let (v, w) = self.follow.step(estimate, dt);
        self.speed_mps = v;
        (v, w)
    }

    fn plan(&mut self, estimate: Pose2) {
        let here = (estimate.x, estimate.y);
        let way = if self.met.len() > STOPS_MAX {
            vec![here]
        } else {
            way_around(here, (self.goal.x, self.goal.y), &self.met)
        };
        let (x, y) = way.last().copied().unwrap_or(here);
        self.follow = Controller::along(way, Pose2::unwrapped(x, y, self.goal.yaw), self.limits);
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> ControllerState {
        self.follow.state()
    }
}

fn apart(a: Point, b: Point) -> f64 {
    (a.0 - b.0).hypot(a.1 - b.1)
}

/// Whether a straight piece keeps away from everything that was met, but for what its beginning is near to already.
fn clear(from: Point, to: Point, met: &[Point]) -> bool {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    met.iter().all(|m| {
        let k = ((m.0 - from.0) * dx + (m.1 - from.1) * dy) / (dx * dx + dy * dy).max(1e-12);
        let k = k.clamp(0.0, 1.0);
        apart((from.0 + k * dx, from.1 + k * dy), *m) >= KEPT_M.min(apart(from, *m))
    })
}

/// The shortest way over a grid to the goal, or to the reachable place nearest to it, straightened.
fn way_around(from: Point, to: Point, met: &[Point]) -> Vec<Point> {
    if clear(from, to, met) {
        return vec![from, to];
    }
    let low = (from.0.min(to.0) - BEYOND_M, from.1.min(to.1) - BEYOND_M);
    let cells = |a: f64, b: f64| (((a - b).abs() + 2.0 * BEYOND_M) / CELL_M).ceil() as usize + 1;
    let (columns, rows) = (cells(from.0, to.0).min(1000), cells(from.1, to.1).min(1000));
    let place =
        |cell: usize| (low.0 + (cell % columns) as f64 * CELL_M, low.1 + (cell / columns) as f64 * CELL_M);
    let index = |v: f64, low: f64, n: usize| (((v - low) / CELL_M).round().max(0.0) as usize).min(n - 1);
    let start = index(from.1, low.1, rows) * columns + index(from.0, low.0, columns);
    // Costs in tenths of a cell: 10 straight, 14 diagonal.
    let (mut cost, mut parent) = (vec![u32::MAX; columns * rows], vec![start; columns * rows]);
    let mut queue = BinaryHeap::from([Reverse((0u32, start))]);
    cost[start] = 0;
    while let Some(Reverse((sum, cell))) = queue.pop() {
        if sum > cost[cell] {
            continue;
        }
        let (i, j) = ((cell % columns) as i64, (cell / columns) as i64);
        for (di, dj) in [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)] {
            let (ni, nj) = (i + di, j + dj);
            if ni < 0 || nj < 0 || ni >= columns as i64 || nj >= rows as i64 {
                continue;
            }
            let next = nj as usize * columns + ni as usize;
            let there = sum + if di != 0 && dj != 0 { 14 } else { 10 };
            if there < cost[next] && clear(place(cell), place(next), met) {
                cost[next] = there;
                parent[next] = cell;
                queue.push(Reverse((there, next)));
            }
        }
    }
    let reached = (0..cost.len()).filter(|cell| cost[*cell] < u32::MAX);
    let Some(end) = reached.min_by(|a, b| apart(place(*a), to).total_cmp(&apart(place(*b), to))) else {
        return vec![from];
    };
    let mut cells = vec![end];
    while let Some(last) = cells.last().copied().filter(|c| *c != start) {
        cells.push(parent[last]);
    }
    let mut points: Vec<Point> = cells.into_iter().rev().map(place).collect();
    points[0] = from;
    if points.last().is_some_and(|end| apart(*end, to) < CELL_M && clear(*end, to, met)) {
        points.push(to);
    }
    // From each corner to the farthest one that is in sight.
    let (mut out, mut at) = (vec![from], 0);
    while at + 1 < points.len() {
        at = (at + 2..points.len()).rev().find(|k| clear(points[at], points[*k], met)).unwrap_or(at + 1);
        out.push(points[at]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Difficulty, House, OdometryNoise, Rng, Robot, goal_pose, random_pose};

    #[test]
    fn ways_lead_around_what_was_met() {
        assert_eq!(way_around((0.0, 0.0), (2.0, 0.0), &[(1.0, 1.0)]), [(0.0, 0.0), (2.0, 0.0)]);
        let met = [(1.0, 0.0), (1.0, 0.2)];
        let way = way_around((0.0, 0.0), (2.0, 0.0), &met);
        assert!(way.len() > 2 && way[0] == (0.0, 0.0), "{way:?}");
        assert!(apart(way[way.len() - 1], (2.0, 0.0)) < 1e-9, "{way:?}");
        for pair in way.windows(2) {
            assert!(clear(pair[0], pair[1], &met), "{way:?}");
        }
        let length: f64 = way.windows(2).map(|w| apart(w[0], w[1])).sum();
        assert!(length < 2.6, "below it, not above: {length}");
        // A goal in something that was met: as near as one gets.
        let way = way_around((0.0, 0.0), (2.0, 0.0), &[(2.0, 0.1)]);
        let end = apart(way[way.len() - 1], (2.0, 0.1));
        assert!((KEPT_M - 1e-9..KEPT_M + 0.15).contains(&end), "{way:?}");
    }

    #[test]
    fn it_finds_its_way_without_a_map() {
        let (mut arrived, mut all) = (0, 0);
        for seed in 0..40 {
            let house = House::generate(seed, &Difficulty::plain());
            let here = random_pose(&house, &mut Rng::new(seed));
            for object in 0..house.objects.len() {
                let Some(goal) = goal_pose(&house, here, object) else { continue };
                let mut robot = Robot::new(here, OdometryNoise::default(), seed);
                let mut controller = BlindController::new(here, goal, ControllerLimits::default());
                for _ in 0..2400 {
                    if controller.done() {
                        break;
                    }
                    let (v, w) = controller.step(robot.odom, robot.collided, 0.05);
                    robot.step(&house, v, w, 0.05);
                }
                all += 1;
                arrived += usize::from(robot.pose.distance(goal) < 0.1);
                assert!(controller.done(), "house {seed}, object {object}: {:?}", controller.state());
            }
        }
        assert!(arrived * 100 >= all * 95, "{arrived} of {all}");
    }
}
