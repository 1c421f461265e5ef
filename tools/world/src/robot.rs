//! A differential-drive robot with collisions and odometry, and a controller that drives it to a goal.

use crate::geom::{Pose2, wrap_angle};
use crate::house::{House, ROBOT_RADIUS_M};
use crate::plan::NavGrid;
pub use mindseye_base::planar::OdometryNoise;
use mindseye_base::random::Rng;

/// A round differential-drive robot of radius [`ROBOT_RADIUS_M`].
#[derive(Debug, Clone)]
pub struct Robot {
    /// True pose in the map.
    pub pose: Pose2,
    /// Odometry: starts equal to the true pose and drifts by the noise.
    pub odom: Pose2,
    /// Whether the last step was stopped by a wall or an object.
    pub collided: bool,
    /// Steps stopped so far.
    pub collisions: u64,
    /// Odometry noise.
    pub noise: OdometryNoise,
    rng: Rng,
}

impl Robot {
    /// A robot standing at `pose`, with odometry equal to it.
    #[must_use]
    pub fn new(pose: Pose2, noise: OdometryNoise, seed: u64) -> Self {
        Self { pose, odom: pose, collided: false, collisions: 0, noise, rng: Rng::new(seed ^ 0x0d0_e7e5) }
    }

    /// Drives at `v` (m/s, forward) and `w` (rad/s, counter-clockwise) for `dt` seconds. The robot stops where its
    /// body would touch something (`collided` is then set); turning on the spot is always possible. Odometry
    /// measures the motion that happened. Values that are not finite, and a negative `dt`, do nothing.
    pub fn step(&mut self, house: &House, v: f64, w: f64, dt: f64) {
        self.collided = false;
        if !(v.is_finite() && w.is_finite() && dt.is_finite()) || dt <= 0.0 {
            return;
        }
        let travel = (v * dt).abs().min(100.0);
        let pieces = ((travel / 0.02).ceil().max((w * dt).abs() / 0.1).max(1.0) as usize).min(10_000);
        let h = dt.min(60.0) / pieces as f64;
        for _ in 0..pieces {
            let (mut ds, da) = (v * h, w * h);
            // Exact arc: the chord points along the mean heading.
            let chord = |ds: f64| {
                let half = da * 0.5;
                if half.abs() < 1e-9 { ds } else { ds * half.sin() / half }
            };
            let heading = self.pose.yaw + da * 0.5;
            let next = |ds: f64, pose: Pose2| {
                (pose.x + chord(ds) * heading.cos(), pose.y + chord(ds) * heading.sin())
            };
            let (x, y) = next(ds, self.pose);
            let room = house.clearance(x, y);
            // A robot that already touches something may move away from it.
            if room < ROBOT_RADIUS_M && room < house.clearance(self.pose.x, self.pose.y) {
                self.collided = true;
                ds = 0.0;
            }
            let (x, y) = next(ds, self.pose);
            self.pose = Pose2::unwrapped(x, y, wrap_angle(self.pose.yaw + da));
            self.measure(ds, da);
        }
        self.collisions += u64::from(self.collided);
    }

    fn measure(&mut self, ds: f64, da: f64) {
        let (along, heading) = self.noise.after(ds.abs(), da.abs());
        let (mut ds, mut da) = (ds, da);
        if along > 0.0 {
            ds += along * self.rng.normal();
        }
        if heading > 0.0 {
            da += heading * self.rng.normal();
        }
        let half = da * 0.5;
        let chord = if half.abs() < 1e-9 { ds } else { ds * half.sin() / half };
        let mean = self.odom.yaw + half;
        self.odom = Pose2::unwrapped(
            self.odom.x + chord * mean.cos(),
            self.odom.y + chord * mean.sin(),
            wrap_angle(self.odom.yaw + da),
        );
    }
}

/// What odometry says of a drive along `truth`: it begins there and drifts by the noise.
#[must_use]
pub fn odometry_of(truth: &[Pose2], noise: OdometryNoise, rng: &mut Rng) -> Vec<Pose2> {
    let mut out: Vec<Pose2> = truth.first().copied().into_iter().collect();
    for pair in truth.windows(2) {
        let step = pair[0].relative(pair[1]);
        let way = step.x.hypot(step.y);
        let (along, heading) = noise.after(way, step.yaw.abs());
        let scale = if way > 0.0 { 1.0 + along * rng.normal() / way } else { 1.0 };
        let turn = heading * rng.normal();
        // Half of the heading's error has come about when the robot is half way.
        let (s, c) = (0.5 * turn).sin_cos();
        let moved = Pose2::unwrapped(
            scale * (c * step.x - s * step.y),
            scale * (s * step.x + c * step.y),
            step.yaw + turn,
        );
        out.push(out[out.len() - 1].compose(moved));
    }
    out
}

/// Limits and tolerances of a [`Controller`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControllerLimits {
    /// Greatest forward speed (m/s).
    pub speed_mps: f64,
    /// Greatest turning speed (rad/s).
    pub turn_radps: f64,
    /// Distance at which the position counts as reached (m).
    pub position_m: f64,
    /// Heading error at which the goal counts as reached (rad).
    pub heading_rad: f64,
}

impl Default for ControllerLimits {
    fn default() -> Self {
        Self { speed_mps: 0.6, turn_radps: 1.2, position_m: 0.04, heading_rad: 0.03 }
    }
}

/// What a [`Controller`] is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControllerState {
    /// On its way.
    Driving,
    /// At the goal's place, turning to its heading.
    Aligning,
    /// Arrived.
    Done,
    /// There is no way to the goal.
    NoPath,
}

/// Drives a robot to a goal pose: A* on the house's map, then pure pursuit along the path.
///
/// It knows the house as a map server would; it does not know the true pose, only the estimate that it is given.
#[derive(Debug, Clone)]
pub struct Controller {
    goal: Pose2,
    path: Vec<(f64, f64)>,
    next: usize,
    state: ControllerState,
    limits: ControllerLimits,
}

impl Controller {
    /// Plans from `start` to `goal` (map frame). A goal inside an obstacle is replaced by the nearest free place
    /// within 0.6 m; its heading is kept.
    #[must_use]
    pub fn new(house: &House, start: Pose2, goal: Pose2, limits: ControllerLimits) -> Self {
        Self::on_grid(house, house.nav(), start, goal, limits)
    }

    fn on_grid(house: &House, grid: &NavGrid, start: Pose2, goal: Pose2, limits: ControllerLimits) -> Self {
        let finite = [start.x, start.y, start.yaw, goal.x, goal.y, goal.yaw].iter().all(|v| v.is_finite());
        let place = if finite { grid.nearest_free(house, goal.x, goal.y) } else { None };
        let path = place.and_then(|to| grid.path(house, (start.x, start.y), to));
        let state = if path.is_some() { ControllerState::Driving } else { ControllerState::NoPath };
        let (x, y) = place.unwrap_or((goal.x, goal.y));
        Self {
            goal: Pose2::unwrapped(x, y, goal.yaw),
            path: path.unwrap_or_default(),
            next: 1,
            state,
            limits,
        }
    }

    /// Follows a way that is known to be free.
    pub(crate) fn along(path: Vec<(f64, f64)>, goal: Pose2, limits: ControllerLimits) -> Self {
        Self { goal, path, next: 1, state: ControllerState::Driving, limits }
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> ControllerState {
        self.state
    }

    /// Whether it has stopped for good: arrived, or no way.
    #[must_use]
    pub fn done(&self) -> bool {
        matches!(self.state, ControllerState::Done | ControllerState::NoPath)
    }

    /// The planned way (map metres), from start to goal; empty when there is none.
    #[must_use]
    pub fn path(&self) -> &[(f64, f64)] {
        &self.path
    }

    /// The pose that it drives to.
    #[must_use]
    pub fn goal(&self) -> Pose2 {
        self.goal
    }

    /// Speeds for the next `dt` seconds from the estimated pose: `(v, w)` in m/s and rad/s; zero when done.
    pub fn step(&mut self, estimate: Pose2, dt: f64) -> (f64, f64) {
        let dt = dt.max(1e-3);
        let turn = |error: f64, limit: f64| {
            (error * 3.0).clamp(-limit, limit).clamp(-error.abs() / dt, error.abs() / dt)
        };
        let l = self.limits;
        if self.state == ControllerState::Driving {
            let away = (estimate.x - self.goal.x).hypot(estimate.y - self.goal.y);
            if away <= l.position_m {
                self.state = ControllerState::Aligning;
            } else {
                let Some(target) = self.pursue(estimate) else {
                    self.state = ControllerState::NoPath;
                    return (0.0, 0.0);
                };
                let error = wrap_angle(estimate.bearing_to(target.0, target.1) - estimate.yaw);
                // A goal just behind is reached in reverse.
                let reverse = self.next + 1 >= self.path.len() && away < 0.8 && error.abs() > 2.2;
                let error = if reverse { wrap_angle(error + std::f64::consts::PI) } else { error };
                let w = turn(error, l.turn_radps);
                // Turn on the spot for large errors; slow down for corners and for the goal.
                let aim = (1.0 - error.abs() / 0.6).max(0.0);
                let v = (l.speed_mps * aim).min(1.2 * away + 0.02).min(away / dt);
                return (if reverse { -v } else { v }, w);
            }
        }
        if self.state == ControllerState::Aligning {
            let error = wrap_angle(self.goal.yaw - estimate.yaw);
            if error.abs() <= l.heading_rad {
                self.state = ControllerState::Done;
            } else {
                return (0.0, turn(error, l.turn_radps));
            }
        }
        (0.0, 0.0)
    }

    /// The point ahead on the path to steer for. Corners are taken closely: paths touch the margins.
    fn pursue(&mut self, at: Pose2) -> Option<(f64, f64)> {
        const AHEAD_M: f64 = 0.12;
        while self.next + 1 < self.path.len() {
            let p = self.path[self.next];
            if (p.0 - at.x).hypot(p.1 - at.y) > AHEAD_M {
                break;
            }
            self.next += 1;
        }
        self.path.get(self.next.min(self.path.len().saturating_sub(1))).copied()
    }
}
