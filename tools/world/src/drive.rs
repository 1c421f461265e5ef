//! Drives: sequences of base poses for recording and training, one per frame.

use crate::geom::{Pose2, wrap_angle};
use crate::house::{House, Object, ROBOT_RADIUS_M, Room};
use crate::plan::NavGrid;
use mindseye_base::random::Rng;
use std::f64::consts::{PI, TAU};

/// Forward speed on drives (m/s).
pub const DRIVE_SPEED_MPS: f64 = 0.6;
/// Turning speed on drives (rad/s).
pub const TURN_RATE_RADPS: f64 = 0.9;
/// Time between two frames of [`random_drive`] (s).
pub const RANDOM_DRIVE_DT_SECS: f64 = 0.25;
/// Free space kept around the robot's body on planned drives (m).
pub const DRIVE_MARGIN_M: f64 = 0.04;

/// Least distance between the robot and the centre of the object that it approached (m).
pub const STANDOFF_M: f64 = 1.2;

/// Where an approach ends: the distance from the object's centre to the robot's, `max(1.2, radius + 0.8)` (m).
#[must_use]
pub fn standoff_m(object: &Object) -> f64 {
    STANDOFF_M.max(object.radius + 0.8)
}

/// A drive to an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Approach {
    /// Base poses, one per frame: the first is the start, the last is `final_pose`.
    pub poses: Vec<Pose2>,
    /// Where the base stands at the end: at [`standoff_m`] from the object's centre, looking straight at it.
    pub final_pose: Pose2,
    /// False when no free place at the stand-off distance could be reached: the drive only turns to the object.
    pub reached: bool,
}

/// One piece of a drive. Angles are not wrapped: a turn may be longer than a full circle.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Turn { x: f64, y: f64, from: f64, to: f64 },
    Drive { from: (f64, f64), to: (f64, f64), yaw: f64 },
}

impl Phase {
    fn secs(&self) -> f64 {
        match *self {
            Self::Turn { from, to, .. } => (to - from).abs() / TURN_RATE_RADPS,
            Self::Drive { from, to, .. } => (to.0 - from.0).hypot(to.1 - from.1) / DRIVE_SPEED_MPS,
        }
    }

    /// The pose after a fraction `k` of the phase; yaw not wrapped.
    fn at(&self, k: f64) -> Pose2 {
        match *self {
            Self::Turn { x, y, from, to } => Pose2::unwrapped(x, y, from + (to - from) * k),
            Self::Drive { from, to, yaw } => {
                Pose2::unwrapped(from.0 + (to.0 - from.0) * k, from.1 + (to.1 - from.1) * k, yaw)
            }
        }
    }
}

/// A polyline on the floor (map metres).
type Way = Vec<(f64, f64)>;

/// A drive under construction: where it has come to, and how.
struct Track {
    now: Pose2,
    phases: Vec<Phase>,
}

impl Track {
    fn new(start: Pose2) -> Self {
        Self { now: start, phases: Vec::new() }
    }

    /// Turns the short way to a heading.
    fn face(&mut self, yaw: f64) {
        self.turn(wrap_angle(yaw - self.now.yaw));
    }

    fn turn(&mut self, by: f64) {
        let to = self.now.yaw + by;
        if by != 0.0 {
            self.phases.push(Phase::Turn { x: self.now.x, y: self.now.y, from: self.now.yaw, to });
        }
        self.now.yaw = to;
    }

    /// Slides to a point without changing the heading.
    fn slide(&mut self, to: (f64, f64)) {
        self.phases.push(Phase::Drive { from: (self.now.x, self.now.y), to, yaw: self.now.yaw });
        (self.now.x, self.now.y) = to;
    }

    fn follow(&mut self, path: &[(f64, f64)]) {
        for p in path {
            if (p.0 - self.now.x).hypot(p.1 - self.now.y) > 1e-6 {
                self.face(self.now.bearing_to(p.0, p.1));
                self.slide(*p);
            }
        }
    }

    fn secs(&self) -> f64 {
        self.phases.iter().map(Phase::secs).sum()
    }

    /// Poses at `count` equally spaced times over the first `secs` seconds, first and last included. Corners are
    /// rounded by a moving average where that stays free; ends are exact.
    fn sample(&self, house: &House, start: Pose2, secs: f64, count: usize, ease: bool) -> Vec<Pose2> {
        if self.phases.is_empty() || count == 0 {
            return vec![start; count];
        }
        const FINE: usize = 6;
        let n = (count.max(2) - 1) * FINE + 1;
        let mut dense = Vec::with_capacity(n);
        let (mut k, mut before) = (0, 0.0);
        for i in 0..n {
            let s = i as f64 / (n - 1) as f64;
            let s = if ease { 0.4 * s + 0.6 * s * s * (3.0 - 2.0 * s) } else { s };
            let t = s * secs;
            while k + 1 < self.phases.len() && t > before + self.phases[k].secs() {
                before += self.phases[k].secs();
                k += 1;
            }
            let span = self.phases[k].secs();
            dense.push(self.phases[k].at(if span > 0.0 {
                ((t - before) / span).clamp(0.0, 1.0)
            } else {
                1.0
            }));
        }
        let half = ((0.45 / secs.max(1e-9) * (n - 1) as f64) as usize).clamp(1, n / 8 + 1);
        (0..count)
            .map(|c| {
                let i = (c * FINE).min(n - 1);
                let h = half.min(i).min(n - 1 - i);
                let window = &dense[i - h..=i + h];
                let inv = 1.0 / window.len() as f64;
                let mut mean = Pose2::default();
                for p in window {
                    mean.x += p.x * inv;
                    mean.y += p.y * inv;
                    mean.yaw += p.yaw * inv;
                }
                let smooth = house.clearance(mean.x, mean.y) >= ROBOT_RADIUS_M;
                let p = if smooth && h > 0 { mean } else { dense[i] };
                Pose2::unwrapped(p.x, p.y, wrap_angle(p.yaw))
            })
            .collect()
    }
}

/// A free base pose anywhere in the house, with a random heading.
#[must_use]
pub fn random_pose(house: &House, rng: &mut Rng) -> Pose2 {
    pose_in_one_of(house, &house.rooms, rng)
}

/// A free base pose anywhere in the room that this one is in, or in the house where that is none, with a random heading.
#[must_use]
pub fn random_pose_beside(house: &House, pose: Pose2, rng: &mut Rng) -> Pose2 {
    let here = house.rooms.iter().position(|room| room.rect.contains(pose.x, pose.y));
    pose_in_one_of(house, here.map_or(&house.rooms[..], |i| &house.rooms[i..=i]), rng)
}

fn pose_in_one_of(house: &House, rooms: &[Room], rng: &mut Rng) -> Pose2 {
    for margin in [0.12, DRIVE_MARGIN_M] {
        for _ in 0..200 {
            let r = &rooms[rng.below(rooms.len())].rect;
            let (x, y) = (rng.range(r.x0, r.x1), rng.range(r.y0, r.y1));
            if house.clearance(x, y) >= ROBOT_RADIUS_M + margin {
                return Pose2::unwrapped(x, y, rng.range(-PI, PI));
            }
        }
    }
    let (x, y) = rooms[0].rect.centre();
    Pose2::unwrapped(x, y, rng.range(-PI, PI))
}

/// The context recording of a robot that takes its time, about `turn` images for each full turn: in one room
/// [`exploration_sweep`]; in several, as long as the visit to all of them takes at that pace.
#[must_use]
pub fn exploration_drive(house: &House, rng: &mut Rng, turn: usize) -> Vec<Pose2> {
    if house.rooms.len() == 1 {
        return exploration_sweep(house, rng, turn);
    }
    let (start, track) = tour(house, rng);
    let frames = 1 + (track.secs() * TURN_RATE_RADPS / TAU * turn as f64).round() as usize;
    track.sample(house, start, track.secs(), frames, false)
}

/// The context recording. In one room: about 360 degrees (340 to 400) from a random heading in a random direction,
/// the position wandering within 0.4 m of the room's middle. In several rooms: a visit to every room with such a
/// sweep in each. Exactly `frames` poses, all free of collisions.
#[must_use]
pub fn exploration_sweep(house: &House, rng: &mut Rng, frames: usize) -> Vec<Pose2> {
    if house.rooms.len() == 1 {
        let (heading, sign) = (rng.range(-PI, PI), if rng.chance(0.5) { 1.0 } else { -1.0 });
        let (cx, cy) = house.rooms[0].rect.centre();
        let total = rng.range(340.0, 400.0).to_radians() * sign;
        let (ax, ay) = (rng.range(0.05, 0.26), rng.range(0.05, 0.26));
        let (px, py) = (rng.range(0.0, TAU), rng.range(0.0, TAU));
        let (fx, fy) = (rng.range(0.4, 1.3), rng.range(0.4, 1.3));
        let wobble = rng.range(0.0, 0.15);
        return (0..frames)
            .map(|i| {
                let s = i as f64 / frames.max(2).saturating_sub(1) as f64;
                let turned = s + wobble * (TAU * s).sin() / TAU;
                Pose2::unwrapped(
                    cx + ax * (px + TAU * fx * s).sin(),
                    cy + ay * (py + TAU * fy * s).sin(),
                    wrap_angle(heading + total * turned),
                )
            })
            .collect();
    }
    let (start, track) = tour(house, rng);
    track.sample(house, start, track.secs(), frames, false)
}

/// A visit to every room, the nearest one next, with a turn in each: where it begins, and the drive.
fn tour(house: &House, rng: &mut Rng) -> (Pose2, Track) {
    let (heading, sign) = (rng.range(-PI, PI), if rng.chance(0.5) { 1.0 } else { -1.0 });
    let grid = house.nav();
    let mut left: Vec<usize> = (0..house.rooms.len()).collect();
    let first = left.swap_remove(rng.below(left.len()));
    let (x, y) = house.rooms[first].rect.centre();
    let start = Pose2::unwrapped(x + rng.range(-0.25, 0.25), y + rng.range(-0.25, 0.25), heading);
    let mut track = Track::new(start);
    track.turn(sign * rng.range(330.0, 380.0).to_radians());
    while !left.is_empty() {
        // The nearest room that is left, by the way there.
        let here = (track.now.x, track.now.y);
        let mut best: Option<(f64, usize, Way)> = None;
        for (k, room) in left.iter().enumerate() {
            let (x, y) = house.rooms[*room].rect.centre();
            let Some(path) = grid.path(house, here, (x, y)) else {
                continue;
            };
            let length: f64 = path.windows(2).map(|w| (w[1].0 - w[0].0).hypot(w[1].1 - w[0].1)).sum();
            if best.as_ref().is_none_or(|b| length < b.0) {
                best = Some((length, k, path));
            }
        }
        let Some((_, k, path)) = best else { break };
        left.swap_remove(k);
        track.follow(&path);
        track.turn(sign * rng.range(330.0, 380.0).to_radians());
    }
    (start, track)
}

/// Where a robot coming from `from` should stand to look at the object, with the way there.
fn stand(house: &House, grid: &NavGrid, from: Pose2, object: &Object) -> Option<(Pose2, Way)> {
    let standoff = standoff_m(object);
    let centre = (object.x, object.y);
    // The near side when the object is in sight of the start, else the side of its room's middle.
    let reference = if house.walls_clear((from.x, from.y), centre) {
        (from.x, from.y)
    } else {
        house.rooms[object.room].rect.centre()
    };
    let direction = (reference.1 - object.y).atan2(reference.0 - object.x);
    let body = ROBOT_RADIUS_M + DRIVE_MARGIN_M;
    for strict in [true, false] {
        for step in 0..=36 {
            let offset =
                f64::from((step + 1) / 2) * 10.0f64.to_radians() * if step % 2 == 0 { 1.0 } else { -1.0 };
            let a = direction + offset;
            let (x, y) = (object.x + standoff * a.cos(), object.y + standoff * a.sin());
            if house.clearance(x, y) < body || !house.walls_clear((x, y), centre) {
                continue;
            }
            // Nothing else stands in the line of sight.
            let hidden = house.objects.iter().any(|o| {
                (o.x, o.y) != centre && {
                    let (dx, dy) = (centre.0 - x, centre.1 - y);
                    let k = (((o.x - x) * dx + (o.y - y) * dy) / (dx * dx + dy * dy)).clamp(0.0, 1.0);
                    let near = (x + k * dx - o.x).hypot(y + k * dy - o.y) < o.radius;
                    // Furniture hides what its rectangle stands before.
                    near && (o.mesh.is_none()
                        || (1..24)
                            .map(|i| f64::from(i) / 24.0)
                            .any(|k| o.distance(x + k * dx, y + k * dy) < 0.0))
                }
            });
            if strict && hidden {
                continue;
            }
            if let Some(path) = grid.path(house, (from.x, from.y), (x, y)) {
                return Some((Pose2::unwrapped(x, y, wrap_angle(a + PI)), path));
            }
        }
    }
    None
}

/// The pose of [`approach`]'s end alone; none when it cannot be reached.
#[must_use]
pub fn goal_pose(house: &House, start: Pose2, object_index: usize) -> Option<Pose2> {
    let object = house.objects.get(object_index)?;
    let grid = house.nav();
    stand(house, grid, start, object).map(|s| s.0)
}

/// The drive from `start` to an object: exactly `frames` poses, from `start` itself to the final pose, without
/// collisions. The robot turns to the way, drives it (through doors where it must) and ends looking straight at the
/// object's centre from [`standoff_m`]; a robot that is too close backs off. An index out of range stays at the
/// start.
#[must_use]
pub fn approach(house: &House, start: Pose2, object_index: usize, frames: usize) -> Approach {
    let Some(object) = house.objects.get(object_index) else {
        return Approach { poses: vec![start; frames], final_pose: start, reached: false };
    };
    let grid = house.nav();
    let mut track = Track::new(start);
    let bearing = start.bearing_to(object.x, object.y);
    let Some((goal, path)) = stand(house, grid, start, object) else {
        track.face(bearing);
        let poses = track.sample(house, start, track.secs(), frames, true);
        let final_pose = poses.last().copied().unwrap_or(start);
        return Approach { poses, final_pose, reached: false };
    };
    let length: f64 = path.windows(2).map(|w| (w[1].0 - w[0].0).hypot(w[1].1 - w[0].1)).sum();
    let backs_off =
        path.len() == 2 && wrap_angle(start.bearing_to(goal.x, goal.y) - bearing).abs() > PI / 2.0;
    if length < 1e-6 || backs_off {
        track.face(bearing);
        track.slide((goal.x, goal.y));
    } else {
        track.follow(&path);
    }
    track.face(goal.yaw);
    let mut poses = track.sample(house, start, track.secs(), frames, true);
    if let Some(last) = poses.last_mut() {
        *last = goal;
    }
    if frames > 1 {
        poses[0] = start;
    }
    Approach { poses, final_pose: goal, reached: true }
}

/// Wandering from one random place to another at cruising speed: exactly `frames` poses,
/// [`RANDOM_DRIVE_DT_SECS`] apart, free of collisions.
#[must_use]
pub fn random_drive(house: &House, rng: &mut Rng, frames: usize) -> Vec<Pose2> {
    let start = random_pose(house, rng);
    random_drive_from(house, rng, start, frames)
}

/// [`random_drive`] from a given pose, which is the first of the result.
#[must_use]
pub fn random_drive_from(house: &House, rng: &mut Rng, start: Pose2, frames: usize) -> Vec<Pose2> {
    let grid = house.nav();
    let secs = frames.saturating_sub(1) as f64 * RANDOM_DRIVE_DT_SECS;
    let mut track = Track::new(start);
    for _ in 0..10_000 {
        if track.secs() >= secs {
            break;
        }
        let to = random_pose(house, rng);
        match grid.path(house, (track.now.x, track.now.y), (to.x, to.y)) {
            Some(path) => track.follow(&path),
            None => track.turn(rng.range(-1.5, 1.5)),
        }
    }
    if track.secs() < secs {
        // Shut in: turn on the spot.
        let by = (secs - track.secs()) * TURN_RATE_RADPS;
        track.turn(by);
    }
    track.sample(house, start, secs, frames, false)
}
