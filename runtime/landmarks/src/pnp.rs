//! The pose of a camera from points whose places are known: three points (Grunert 1841, in the form of Haralick et al.
//! 1994), random samples of three (Fischler and Bolles 1981, scored as by Torr and Zisserman 2000), and
//! Levenberg-Marquardt with Cauchy's weights on all that agree.

use mindseye_base::random::Rng;
use nalgebra::{
    Isometry3, Matrix2, Matrix2x3, Matrix2x6, Matrix3, Matrix6, Matrix6x2, Matrix6x3, Point3, Rotation3,
    Translation3, UnitQuaternion, Vector2, Vector3, Vector6,
};

/// A point with a known place, and where the camera sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sighting {
    /// In the plane `z = 1` of the camera's axes.
    pub ray: Vector2<f64>,
    /// Place in the map (metres).
    pub point: Point3<f64>,
    /// Covariance of the place (m²); zero for an exact one.
    pub covariance: Matrix3<f64>,
    /// Which point it is: for the caller.
    pub id: u32,
}

/// Settings of [`ransac`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RansacConfig {
    /// Largest residual of an inlier, in the plane `z = 1`.
    pub threshold: f64,
    /// Samples at most.
    pub samples_max: usize,
    /// Stop when a better pose would have been found with this probability.
    pub confidence: f64,
    /// Seed of the samples.
    pub seed: u64,
}

/// A refined pose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Refined {
    /// The camera's pose, inverted: what carries points into the camera's axes.
    pub camera_from_map: Isometry3<f64>,
    /// Covariance of a small motion of the camera: translation (m) and rotation (rad), along and about its own axes. Scaled
    /// up where residuals are larger than their standard deviations say. Errors that points have in common are not in it: see
    /// [`moved_by_points`].
    pub covariance: Matrix6<f64>,
    /// Root mean square of the residuals' lengths in the plane `z = 1`.
    pub rms: f64,
}

/// Poses `camera_from_map` from which three points are seen along three unit directions: at most four.
#[must_use]
pub fn p3p(directions: [Vector3<f64>; 3], points: [Point3<f64>; 3]) -> Vec<Isometry3<f64>> {
    let [f1, f2, f3] = directions;
    let [p1, p2, p3] = points;
    let (a, b, c) = ((p2 - p3).norm(), (p1 - p3).norm(), (p1 - p2).norm());
    if a.min(b).min(c) < 1e-6 || (p2 - p1).cross(&(p3 - p1)).norm() < 1e-3 * b * c {
        return Vec::new();
    }
    let (cos_a, cos_b, cos_c) = (f2.dot(&f3), f1.dot(&f3), f1.dot(&f2));
    let (ra, rc) = ((a / b).powi(2), (c / b).powi(2));
    let (m, s) = (ra - rc, ra + rc);
    let quartic = [
        (1.0 + m).powi(2) - 4.0 * ra * cos_c * cos_c,
        4.0 * (-m * (1.0 + m) * cos_b + 2.0 * ra * cos_c * cos_c * cos_b - (1.0 - s) * cos_a * cos_c),
        2.0 * (m * m - 1.0 + 2.0 * m * m * cos_b * cos_b + 2.0 * (1.0 - rc) * cos_a * cos_a
            - 4.0 * s * cos_a * cos_b * cos_c
            + 2.0 * (1.0 - ra) * cos_c * cos_c),
        4.0 * (m * (1.0 - m) * cos_b - (1.0 - s) * cos_a * cos_c + 2.0 * rc * cos_a * cos_a * cos_b),
        (m - 1.0).powi(2) - 4.0 * rc * cos_a * cos_a,
    ];
    let mut out = Vec::new();
    for v in positive_roots(&quartic) {
        let below = 2.0 * (cos_c - v * cos_a);
        let u = if below.abs() > 1e-9 {
            ((m - 1.0) * v * v - 2.0 * m * cos_b * v + 1.0 + m) / below
        } else {
            continue;
        };
        let square = 1.0 + v * v - 2.0 * v * cos_b;
        if u <= 0.0 || square <= 1e-12 {
            continue;
        }
        let first = b / square.sqrt();
        let Some(depths) =
            polished(Vector3::new(first, u * first, v * first), [cos_a, cos_b, cos_c], [a * a, b * b, c * c])
        else {
            continue;
        };
        out.extend(aligned([f1 * depths.x, f2 * depths.y, f3 * depths.z], points));
    }
    out
}

/// Newton's iteration on the three distances between the points.
fn polished(mut s: Vector3<f64>, cos: [f64; 3], squares: [f64; 3]) -> Option<Vector3<f64>> {
    let scale = squares[1];
    for _ in 0..4 {
        let off = Vector3::new(
            s.y * s.y + s.z * s.z - 2.0 * s.y * s.z * cos[0] - squares[0],
            s.x * s.x + s.z * s.z - 2.0 * s.x * s.z * cos[1] - squares[1],
            s.x * s.x + s.y * s.y - 2.0 * s.x * s.y * cos[2] - squares[2],
        );
        if off.norm() < 1e-13 * scale {
            break;
        }
        let slope = 2.0
            * Matrix3::new(
                0.0,
                s.y - s.z * cos[0],
                s.z - s.y * cos[0],
                s.x - s.z * cos[1],
                0.0,
                s.z - s.x * cos[1],
                s.x - s.y * cos[2],
                s.y - s.x * cos[2],
                0.0,
            );
        // At a double root the slope is singular: the depths are as good as they get.
        let Some(inverse) = slope.try_inverse() else { break };
        let step = inverse * off;
        if step.norm() > 0.1 * s.norm() {
            break;
        }
        s -= step;
    }
    (s.min() > 0.0).then_some(s)
}

/// The motion that carries three points of the map onto three of the camera, whose distances are the same.
fn aligned(camera: [Vector3<f64>; 3], map: [Point3<f64>; 3]) -> Option<Isometry3<f64>> {
    let axes = |p: [Vector3<f64>; 3]| {
        let x = (p[1] - p[0]).try_normalize(1e-9)?;
        let z = x.cross(&(p[2] - p[0])).try_normalize(1e-9)?;
        Some(Matrix3::from_columns(&[x, z.cross(&x), z]))
    };
    let map = map.map(|p| p.coords);
    let turn = axes(camera)? * axes(map)?.transpose();
    let shift = camera[0] - turn * map[0];
    let rotation = UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(turn));
    Some(Isometry3::from_parts(Translation3::from(shift), rotation))
}

/// Positive real roots of a polynomial, constant term first: between neighbouring extrema, which are roots of its
/// derivative, there is at most one.
fn positive_roots(coefficients: &[f64]) -> Vec<f64> {
    let most = coefficients.iter().fold(0.0f64, |m, c| m.max(c.abs()));
    let degree = coefficients.iter().rposition(|c| c.abs() > 1e-12 * most).unwrap_or(0);
    if degree == 0 || !most.is_finite() {
        return Vec::new();
    }
    let p = &coefficients[..=degree];
    if degree == 1 {
        let root = -p[0] / p[1];
        return if root > 0.0 { vec![root] } else { Vec::new() };
    }
    let value = |x: f64| p.iter().rev().fold(0.0, |sum, c| sum * x + c);
    let slope: Vec<f64> = p.iter().enumerate().skip(1).map(|(k, c)| k as f64 * c).collect();
    // Cauchy's bound.
    let end = 1.0 + p[..degree].iter().fold(0.0f64, |m, c| m.max((c / p[degree]).abs()));
    let extrema = positive_roots(&slope);
    let mut corners = vec![0.0];
    corners.extend(extrema.iter().copied().filter(|x| *x < end));
    corners.push(end);
    let mut out = Vec::new();
    for pair in corners.windows(2) {
        let (mut low, mut high) = (pair[0], pair[1]);
        let (at_low, at_high) = (value(low), value(high));
        if at_low == 0.0 || at_low.signum() == at_high.signum() {
            continue;
        }
        // Newton's steps, and halves where they leave the bracket.
        let mut x = 0.5 * (low + high);
        for _ in 0..100 {
            let here = value(x);
            if here.signum() == at_low.signum() {
                low = x
            } else {
                high = x
            }
            let newton = x - here / slope.iter().rev().fold(0.0, |sum, c| sum * x + c);
            let next = if newton > low && newton < high { newton } else { 0.5 * (low + high) };
            let step = (next - x).abs();
            x = next;
            if step <= 1e-15 * x {
                break;
            }
        }
        out.push(x);
    }
    // A double root touches zero without crossing it.
    for x in extrema {
        let size = p.iter().enumerate().map(|(k, c)| c.abs() * x.powi(k as i32)).sum::<f64>();
        if value(x).abs() < 1e-9 * size && !out.iter().any(|r| (r - x).abs() < 1e-6 * (1.0 + x)) {
            out.push(x);
        }
    }
    out.sort_by(f64::total_cmp);
    out
}

/// The pose with which most sightings agree, and which they are. `None` when no sample of three gives one with at least
/// four.
#[must_use]
pub fn ransac(sightings: &[Sighting], config: &RansacConfig) -> Option<(Isometry3<f64>, Vec<usize>)> {
    let n = sightings.len();
    if n < 4 {
        return None;
    }
    let directions: Vec<Vector3<f64>> =
        sightings.iter().map(|s| Vector3::new(s.ray.x, s.ray.y, 1.0).normalize()).collect();
    let limit = config.threshold * config.threshold;
    let mut rng = Rng::new(config.seed);
    let mut best: Option<(Isometry3<f64>, f64)> = None;
    let mut wanted = config.samples_max;
    let mut samples = 0;
    while samples < wanted {
        samples += 1;
        let picked = [rng.below(n), rng.below(n), rng.below(n)];
        if picked[0] == picked[1] || picked[1] == picked[2] || picked[0] == picked[2] {
            continue;
        }
        for pose in p3p(picked.map(|k| directions[k]), picked.map(|k| sightings[k].point)) {
            let most = best.as_ref().map_or(f64::INFINITY, |b| b.1);
            let Some(cost) = cost(sightings, &pose, limit, most) else { continue };
            let (mut pose, mut cost) = (pose, cost);
            // Polished at once: the inliers of a noisy sample are fewer than those of the pose that they imply.
            let inliers = inliers(sightings, &pose, config.threshold);
            if inliers.len() >= 6
                && let Some(refined) = refine(sightings, &inliers, &pose, 0.5 * config.threshold, 4)
                && let Some(lower) = self::cost(sightings, &refined.camera_from_map, limit, cost)
            {
                (pose, cost) = (refined.camera_from_map, lower);
            }
            best = Some((pose, cost));
            let share = self::inliers(sightings, &pose, config.threshold).len() as f64 / n as f64;
            let miss = (1.0 - share.powi(3)).clamp(1e-12, 1.0 - 1e-12).ln();
            let needed = (1.0 - config.confidence).max(1e-12).ln() / miss;
            wanted = wanted.min((needed.ceil() as usize).max(samples));
        }
    }
    let pose = best?.0;
    let inliers = inliers(sightings, &pose, config.threshold);
    (inliers.len() >= 4).then_some((pose, inliers))
}

/// Sum of squared residuals, each at most `limit`; `None` as soon as it is not below `most`.
fn cost(sightings: &[Sighting], pose: &Isometry3<f64>, limit: f64, most: f64) -> Option<f64> {
    let turn = pose.rotation.to_rotation_matrix();
    let mut sum = 0.0;
    for s in sightings {
        let p = turn * s.point.coords + pose.translation.vector;
        sum += if p.z > 1e-3 {
            (Vector2::new(p.x / p.z, p.y / p.z) - s.ray).norm_squared().min(limit)
        } else {
            limit
        };
        if sum >= most {
            return None;
        }
    }
    Some(sum)
}

/// Sightings whose residual in the plane `z = 1` is within the threshold.
#[must_use]
pub fn inliers(sightings: &[Sighting], camera_from_map: &Isometry3<f64>, threshold: f64) -> Vec<usize> {
    let within = |s: &Sighting| {
        let p = camera_from_map * s.point;
        p.z > 1e-3 && (Vector2::new(p.x / p.z, p.y / p.z) - s.ray).norm() < threshold
    };
    (0..sightings.len()).filter(|k| within(&sightings[*k])).collect()
}

/// Refines a pose on the chosen sightings; `sigma` is the standard deviation of a ray in each direction. `None` when the
/// sightings do not determine it.
#[must_use]
pub fn refine(
    sightings: &[Sighting],
    chosen: &[usize],
    start: &Isometry3<f64>,
    sigma: f64,
    steps_max: usize,
) -> Option<Refined> {
    // Cauchy's weights by the promised spread hold the pose best; how well it is known goes by the spread that there is.
    let (pose, at) = descend(sightings, chosen, start, Noise { sigma, inflation: 1.0 }, steps_max)?;
    let at = match at.inflation() {
        inflation if inflation > 1.05 => System::new(sightings, chosen, &pose, Noise { sigma, inflation })?,
        _ => at,
    };
    let covariance = at.information.try_inverse().filter(|c| c.iter().all(|v| v.is_finite()))?;
    Some(Refined { camera_from_map: pose, covariance, rms: at.rms })
}

/// How a refined pose moves by how each of its points moves, as a small motion of the camera (translation and rotation, along
/// and about its own axes) for each metre in the map; `sigma` as for [`refine`]. `None` when the sightings do not determine it.
#[must_use]
pub fn moved_by_points(
    sightings: &[Sighting],
    camera_from_map: &Isometry3<f64>,
    sigma: f64,
) -> Option<Vec<Matrix6x3<f64>>> {
    let noise = Noise { sigma, inflation: 1.0 };
    let turn = camera_from_map.rotation.to_rotation_matrix();
    let mut information = Matrix6::zeros();
    let mut out = Vec::with_capacity(sightings.len());
    for s in sightings {
        let seen = seen(s, camera_from_map, &turn, noise)?;
        information += seen.weighted * seen.slope;
        out.push(seen.weighted * seen.by_map);
    }
    let inverse = information.try_inverse().filter(|c| c.iter().all(|v| v.is_finite()))?;
    out.iter_mut().for_each(|pull| *pull = -inverse * *pull);
    Some(out)
}

/// How much rays scatter.
#[derive(Clone, Copy)]
struct Noise {
    /// Standard deviation of a ray in each direction.
    sigma: f64,
    /// What the variances of rays and points are multiplied by.
    inflation: f64,
}

/// Levenberg and Marquardt's iteration.
fn descend(
    sightings: &[Sighting],
    chosen: &[usize],
    start: &Isometry3<f64>,
    noise: Noise,
    steps_max: usize,
) -> Option<(Isometry3<f64>, System)> {
    let mut pose = *start;
    let mut damping = 1e-4;
    let mut at = System::new(sightings, chosen, &pose, noise)?;
    for _ in 0..steps_max {
        let mut damped = at.information;
        for k in 0..6 {
            damped[(k, k)] *= 1.0 + damping;
        }
        let step = -(damped.cholesky()?.solve(&at.gradient));
        let moved = motion(&step) * pose;
        match System::new(sightings, chosen, &moved, noise) {
            Some(next) if next.cost <= at.cost => {
                let gained = at.cost - next.cost;
                pose = moved;
                at = next;
                damping = (damping * 0.2).max(1e-9);
                if gained < 1e-9 * at.cost || step.norm() < 1e-10 {
                    break;
                }
            }
            _ => {
                damping *= 10.0;
                if damping > 1e6 {
                    break;
                }
            }
        }
    }
    Some((pose, at))
}

/// The motion of a small step: translation, then rotation vector.
fn motion(step: &Vector6<f64>) -> Isometry3<f64> {
    Isometry3::from_parts(
        Translation3::new(step[0], step[1], step[2]),
        UnitQuaternion::from_scaled_axis(Vector3::new(step[3], step[4], step[5])),
    )
}

/// Normal equations of the pose at one place.
struct System {
    information: Matrix6<f64>,
    gradient: Vector6<f64>,
    cost: f64,
    /// Squared residuals in their standard deviations.
    distances: Vec<f64>,
    rms: f64,
}

/// A sighting as a pose sees it.
struct Seen {
    residual: Vector2<f64>,
    /// The square of the residual in its standard deviations.
    d2: f64,
    /// Slope of the residual by a small motion of the camera.
    slope: Matrix2x6<f64>,
    /// The same by the point's place in the map.
    by_map: Matrix2x3<f64>,
    /// The slope, transposed, times the residual's weight.
    weighted: Matrix6x2<f64>,
}

/// `None` behind the camera.
fn seen(s: &Sighting, pose: &Isometry3<f64>, turn: &Rotation3<f64>, noise: Noise) -> Option<Seen> {
    let p = turn * s.point.coords + pose.translation.vector;
    if p.z <= 1e-3 {
        return None;
    }
    let ideal = Vector2::new(p.x / p.z, p.y / p.z);
    let residual = ideal - s.ray;
    let by_point = Matrix2x3::new(1.0, 0.0, -ideal.x, 0.0, 1.0, -ideal.y) / p.z;
    let by_map = by_point * turn.matrix();
    let spread = (Matrix2::identity() * (noise.sigma * noise.sigma)
        + by_map * s.covariance * by_map.transpose())
        * noise.inflation;
    let weight = spread.try_inverse()?;
    let mut slope = Matrix2x6::zeros();
    slope.fixed_view_mut::<2, 3>(0, 0).copy_from(&by_point);
    slope.fixed_view_mut::<2, 3>(0, 3).copy_from(&(-by_point * p.cross_matrix()));
    let d2 = (residual.transpose() * weight * residual)[0];
    let robust = 1.0 / (1.0 + d2 / (CAUCHY * CAUCHY));
    Some(Seen { residual, d2, slope, by_map, weighted: slope.transpose() * weight * robust })
}

/// Residuals of this many standard deviations count half.
const CAUCHY: f64 = 2.5;

impl System {
    fn new(sightings: &[Sighting], chosen: &[usize], pose: &Isometry3<f64>, noise: Noise) -> Option<Self> {
        let turn = pose.rotation.to_rotation_matrix();
        let mut out = Self {
            information: Matrix6::zeros(),
            gradient: Vector6::zeros(),
            cost: 0.0,
            distances: Vec::with_capacity(chosen.len()),
            rms: 0.0,
        };
        for k in chosen {
            let Some(seen) = seen(sightings.get(*k)?, pose, &turn, noise) else { continue };
            out.information += seen.weighted * seen.slope;
            out.gradient += seen.weighted * seen.residual;
            out.cost += CAUCHY * CAUCHY * (1.0 + seen.d2 / (CAUCHY * CAUCHY)).ln();
            out.distances.push(seen.d2);
            out.rms += seen.residual.norm_squared();
        }
        if out.distances.len() < 3 {
            return None;
        }
        out.rms = (out.rms / out.distances.len() as f64).sqrt();
        Some(out)
    }

    /// What the variances have to be multiplied by to explain the residuals; at least 1.
    fn inflation(&self) -> f64 {
        let n = 2.0 * self.distances.len() as f64;
        // The median of a chi-square with two degrees of freedom is 1.386; the pose took six degrees of all.
        let free = n / (n - 6.0).max(1.0);
        (mindseye_base::stats::median(&mut self.distances.clone()) / 1.386 * free).max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pose(rng: &mut Rng) -> Isometry3<f64> {
        let mut three = |s: f64| Vector3::new(rng.normal(), rng.normal(), rng.normal()) * s;
        Isometry3::new(three(1.0), three(0.8))
    }

    /// Points 1 to 5 m before the camera, with rays of this noise and places of that.
    fn scene(rng: &mut Rng, n: usize, pose: &Isometry3<f64>, ray: f64, place: f64) -> Vec<Sighting> {
        (0..n)
            .map(|k| {
                let z = rng.range(1.0, 5.0);
                let in_camera = Point3::new(z * rng.range(-0.6, 0.6), z * rng.range(-0.45, 0.45), z);
                let noise = Vector2::new(rng.normal(), rng.normal()) * ray;
                let shift = Vector3::new(rng.normal(), rng.normal(), rng.normal()) * place;
                Sighting {
                    ray: Vector2::new(in_camera.x, in_camera.y) / z + noise,
                    point: pose.inverse_transform_point(&in_camera) + shift,
                    covariance: Matrix3::identity() * place * place,
                    id: k as u32,
                }
            })
            .collect()
    }

    fn apart(a: &Isometry3<f64>, b: &Isometry3<f64>) -> (f64, f64) {
        let d = a.inverse() * b;
        (d.translation.vector.norm(), d.rotation.angle())
    }

    #[test]
    fn three_points_seen_from_the_origin() {
        let check = |points: [Point3<f64>; 3], within: f64| {
            let poses = p3p(points.map(|p| p.coords.normalize()), points);
            assert!((1..=4).contains(&poses.len()));
            let near = |p: &Isometry3<f64>| {
                let (shift, turn) = apart(p, &Isometry3::identity());
                shift < within && turn < within
            };
            assert!(poses.iter().any(near), "{poses:?}");
        };
        let p = Point3::new;
        check([p(0.2, -0.1, 2.0), p(1.0, 0.1, 2.5), p(-0.1, 1.0, 1.8)], 1e-9);
        // A right triangle square before the camera: a double root, known to the root of the rounding only.
        check([p(0.0, 0.0, 2.0), p(1.0, 0.0, 2.0), p(0.0, 1.0, 2.0)], 1e-4);
    }

    #[test]
    fn three_points_give_the_pose_back() {
        let mut rng = Rng::new(11);
        let mut found = 0;
        for _ in 0..300 {
            let truth = pose(&mut rng);
            let s = scene(&mut rng, 3, &truth, 0.0, 0.0);
            let directions = [0, 1, 2].map(|k| Vector3::new(s[k].ray.x, s[k].ray.y, 1.0).normalize());
            let poses = p3p(directions, [s[0].point, s[1].point, s[2].point]);
            let best = poses.iter().map(|p| apart(p, &truth).0).fold(f64::INFINITY, f64::min);
            found += usize::from(best < 1e-6);
        }
        assert!(found >= 295, "{found} of 300");
        let line = [Point3::new(0.0, 0.0, 2.0), Point3::new(1.0, 0.0, 2.0), Point3::new(2.0, 0.0, 2.0)];
        assert!(p3p(line.map(|p| p.coords.normalize()), line).is_empty(), "points on a line");
    }

    #[test]
    fn roots_of_known_polynomials() {
        let check = |p: &[f64], want: &[f64]| {
            let got = positive_roots(p);
            assert!(
                got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-7),
                "{p:?}: {got:?}"
            );
        };
        check(&[24.0, -50.0, 35.0, -10.0, 1.0], &[1.0, 2.0, 3.0, 4.0]);
        check(&[-6.0, 1.0, 1.0], &[2.0]);
        check(&[1.0, -2.0, 1.0], &[1.0]);
        check(&[1.0, 0.0, 1.0], &[]);
        check(&[-2.0, 1.0, 0.0, 0.0], &[2.0]);
        check(&[0.0; 5], &[]);
    }

    const CONFIG: RansacConfig =
        RansacConfig { threshold: 0.008, samples_max: 1000, confidence: 0.999, seed: 1 };

    #[test]
    fn outliers_are_left_out() {
        let mut rng = Rng::new(4);
        for _ in 0..20 {
            let truth = pose(&mut rng);
            let mut all = scene(&mut rng, 200, &truth, 0.002, 0.0);
            for s in all.iter_mut().take(130) {
                s.ray = Vector2::new(rng.range(-0.6, 0.6), rng.range(-0.45, 0.45));
            }
            let (found, inliers) = ransac(&all, &CONFIG).unwrap();
            let refined = refine(&all, &inliers, &found, 0.002, 20).unwrap();
            let (shift, turn) = apart(&refined.camera_from_map, &truth);
            assert!(shift < 0.02 && turn < 0.01, "{shift} m, {turn} rad");
            assert!((65..80).contains(&inliers.len()), "{}", inliers.len());
        }
    }

    #[test]
    fn nothing_to_agree_on_is_no_pose_or_a_weak_one() {
        let mut rng = Rng::new(9);
        let truth = pose(&mut rng);
        let mut all = scene(&mut rng, 100, &truth, 0.0, 0.0);
        for s in &mut all {
            s.ray = Vector2::new(rng.range(-0.6, 0.6), rng.range(-0.45, 0.45));
        }
        let most = ransac(&all, &CONFIG).map_or(0, |(_, inliers)| inliers.len());
        assert!(most < 12, "{most} of 100 random sightings agree");
        assert_eq!(ransac(&all[..3], &CONFIG), None);
    }

    #[test]
    fn covariance_holds_the_truth_as_often_as_it_says() {
        let mut rng = Rng::new(21);
        let mut within = 0;
        for _ in 0..300 {
            let truth = pose(&mut rng);
            let all = scene(&mut rng, 60, &truth, 0.002, 0.01);
            let chosen: Vec<usize> = (0..60).collect();
            let got = refine(&all, &chosen, &truth, 0.002, 20).unwrap();
            let off = truth * got.camera_from_map.inverse();
            let turn = off.rotation.scaled_axis();
            let t = off.translation.vector;
            let step = Vector6::new(t.x, t.y, t.z, turn.x, turn.y, turn.z);
            let d2 = (step.transpose() * got.covariance.try_inverse().unwrap() * step)[0];
            within += usize::from(d2 < 10.645); // 90 % of a chi-square with six degrees of freedom
        }
        // Scaling by the residuals only ever widens: a few per cent more than 90.
        assert!((260..=295).contains(&within), "{within} of 300");
    }

    #[test]
    fn a_pose_moves_with_its_points() {
        let mut rng = Rng::new(33);
        let truth = pose(&mut rng);
        let all = scene(&mut rng, 40, &truth, 0.0, 0.0);
        let moved = moved_by_points(&all, &truth, 0.002).unwrap();
        // All points together carry the camera with them, in its own axes the other way round: points seem to move.
        let shift = Vector3::new(0.003, -0.002, 0.001);
        let mut shifted = all.clone();
        shifted.iter_mut().for_each(|s| s.point += shift);
        let chosen: Vec<usize> = (0..all.len()).collect();
        let got = refine(&shifted, &chosen, &truth, 0.002, 20).unwrap().camera_from_map * truth.inverse();
        let turn = got.rotation.scaled_axis();
        let t = got.translation.vector;
        let got = Vector6::new(t.x, t.y, t.z, turn.x, turn.y, turn.z);
        let want: Vector6<f64> = moved.iter().map(|m| m * shift).sum();
        assert!((got - want).norm() < 1e-4 && got.norm() > 0.003, "{got} instead of {want}");
    }

    #[test]
    fn larger_residuals_than_promised_widen_the_covariance() {
        let mut rng = Rng::new(8);
        let truth = pose(&mut rng);
        let chosen: Vec<usize> = (0..200).collect();
        let honest = refine(&scene(&mut rng, 200, &truth, 0.002, 0.0), &chosen, &truth, 0.002, 20).unwrap();
        let worse = refine(&scene(&mut rng, 200, &truth, 0.006, 0.0), &chosen, &truth, 0.002, 20).unwrap();
        assert!(worse.covariance.trace() > 4.0 * honest.covariance.trace());
    }
}
