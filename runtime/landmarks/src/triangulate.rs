//! A point from the rays of several cameras whose poses are known.

use nalgebra::{Isometry3, Matrix2x3, Matrix3, Point3, Vector2, Vector3};

/// One view of a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sight {
    /// Where the camera was.
    pub map_from_camera: Isometry3<f64>,
    /// Where it sees the point, in the plane `z = 1` of its axes.
    pub ray: Vector2<f64>,
    /// Standard deviation of `ray` in each direction.
    pub sigma: f64,
}

/// A point and how well it is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Triangulated {
    /// Place in the map (metres).
    pub position: Point3<f64>,
    /// Its covariance (m²), from the sights' standard deviations.
    pub covariance: Matrix3<f64>,
    /// Largest angle between two of its rays (radians).
    pub parallax_rad: f64,
    /// Root mean square of the residuals' lengths, in standard deviations of the sights.
    pub residual: f64,
}

/// Why rays give no point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unplaced {
    /// Fewer than two sights, or all along one line.
    #[error("the rays have no parallax")]
    NoParallax,
    /// The rays meet behind a camera, or nowhere.
    #[error("the rays do not meet before the cameras")]
    Behind,
}

/// The point nearest to all rays, refined to the least squares of its residuals in the pictures.
///
/// # Errors
/// [`Unplaced`] when the rays are parallel or meet behind a camera. How well they meet is in
/// [`Triangulated::residual`], and is for the caller to judge.
pub fn triangulate(sights: &[Sight]) -> Result<Triangulated, Unplaced> {
    let parallax_rad = parallax(sights);
    if parallax_rad < 1e-5 {
        return Err(Unplaced::NoParallax);
    }
    let mut left = Matrix3::zeros();
    let mut right = Vector3::zeros();
    for sight in sights {
        let direction = direction(sight);
        let across = Matrix3::identity() - direction * direction.transpose();
        left += across;
        right += across * sight.map_from_camera.translation.vector;
    }
    let mut position = Point3::from(left.try_inverse().ok_or(Unplaced::NoParallax)? * right);
    let mut information = Matrix3::zeros();
    let mut residual = 0.0;
    for _ in 0..6 {
        information = Matrix3::zeros();
        let mut gradient = Vector3::zeros();
        residual = 0.0;
        for sight in sights {
            let (r, slope) = seen(&position, sight).ok_or(Unplaced::Behind)?;
            information += slope.transpose() * slope;
            gradient += slope.transpose() * r;
            residual += r.norm_squared();
        }
        let step = information.try_inverse().ok_or(Unplaced::NoParallax)? * gradient;
        position -= step;
        if step.norm() < 1e-9 * (1.0 + position.coords.norm()) {
            break;
        }
    }
    if !position.coords.iter().all(|v| v.is_finite()) || sights.iter().any(|s| seen(&position, s).is_none()) {
        return Err(Unplaced::Behind);
    }
    let covariance = information.try_inverse().ok_or(Unplaced::NoParallax)?;
    let residual = (residual / sights.len() as f64).sqrt();
    Ok(Triangulated { position, covariance, parallax_rad, residual })
}

/// How far the point that some sights triangulate moves, by how far it seems to be moved in each of them alone: a matrix for
/// each sight, and all of them add up to one. Nothing where the sights do not determine it.
#[must_use]
pub fn moved_by_sights<'a>(
    position: &Point3<f64>,
    sights: impl Iterator<Item = &'a Sight>,
) -> Vec<Matrix3<f64>> {
    let parts: Option<Vec<Matrix3<f64>>> =
        sights.map(|s| seen(position, s).map(|(_, slope)| slope.transpose() * slope)).collect();
    let Some(parts) = parts else { return Vec::new() };
    let Some(inverse) = parts.iter().sum::<Matrix3<f64>>().try_inverse() else { return Vec::new() };
    parts.into_iter().map(|part| inverse * part).collect()
}

/// Length of a point's residual in a sight, in its standard deviations; `None` behind the camera.
#[must_use]
pub fn residual(position: &Point3<f64>, sight: &Sight) -> Option<f64> {
    Some(seen(position, sight)?.0.norm())
}

/// Residual and its slope by the point, both in the sight's standard deviations.
fn seen(position: &Point3<f64>, sight: &Sight) -> Option<(Vector2<f64>, Matrix2x3<f64>)> {
    let point = sight.map_from_camera.inverse_transform_point(position);
    if point.z <= 1e-3 {
        return None;
    }
    let ideal = Vector2::new(point.x, point.y) / point.z;
    let slope = Matrix2x3::new(1.0, 0.0, -ideal.x, 0.0, 1.0, -ideal.y) / (point.z * sight.sigma);
    let turn = sight.map_from_camera.rotation.inverse().to_rotation_matrix();
    Some(((ideal - sight.ray) / sight.sigma, slope * turn.matrix()))
}

fn direction(sight: &Sight) -> Vector3<f64> {
    sight.map_from_camera.rotation * Vector3::new(sight.ray.x, sight.ray.y, 1.0).normalize()
}

fn parallax(sights: &[Sight]) -> f64 {
    let all: Vec<Vector3<f64>> = sights.iter().map(direction).collect();
    let mut most = 0.0f64;
    for (k, a) in all.iter().enumerate() {
        for b in &all[k + 1..] {
            most = most.max(a.cross(b).norm().atan2(a.dot(b)));
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_base::random::Rng;

    fn at(x: f64, y: f64, z: f64) -> Isometry3<f64> {
        Isometry3::translation(x, y, z)
    }

    fn sight(map_from_camera: Isometry3<f64>, point: Point3<f64>) -> Sight {
        let p = map_from_camera.inverse_transform_point(&point);
        Sight { map_from_camera, ray: Vector2::new(p.x / p.z, p.y / p.z), sigma: 0.002 }
    }

    #[test]
    fn two_exact_rays_meet_in_the_point() {
        // Cameras 1 m apart, the point 2 m before the middle: the rays make an angle of 2 atan(1/4).
        let point = Point3::new(0.5, 0.0, 2.0);
        let got = triangulate(&[sight(at(0.0, 0.0, 0.0), point), sight(at(1.0, 0.0, 0.0), point)]).unwrap();
        assert!((got.position - point).norm() < 1e-9);
        assert!(got.residual < 1e-6);
        assert!((got.parallax_rad - 2.0 * 0.25f64.atan()).abs() < 1e-9);
        // By hand: two views, slope 1/z = 1/2 and, along z, ±(.25)/2: information (2/4, 2/4, 2/64) / σ².
        let variance = 0.002f64.powi(2);
        for (k, want) in [(0, 2.0), (1, 2.0), (2, 32.0)] {
            assert!((got.covariance[(k, k)] / variance - want).abs() < 1e-6, "{}", got.covariance);
        }
    }

    #[test]
    fn errors_are_as_large_as_the_covariance_says() {
        let mut rng = Rng::new(2);
        let point = Point3::new(0.2, -0.1, 3.0);
        let cameras = [at(0.0, 0.0, 0.0), at(0.4, 0.0, 0.1), at(0.2, 0.3, 0.0)];
        let mut within = 0;
        for _ in 0..500 {
            let sights = cameras.map(|c| {
                let mut s = sight(c, point);
                s.ray += Vector2::new(rng.normal(), rng.normal()) * s.sigma;
                s
            });
            let got = triangulate(&sights).unwrap();
            let off = got.position - point;
            let d2 = (off.transpose() * got.covariance.try_inverse().unwrap() * off)[0];
            within += usize::from(d2 < 6.251); // 90 % of a chi-square with three degrees of freedom
        }
        assert!((430..=470).contains(&within), "{within} of 500, 450 expected");
    }

    #[test]
    fn a_point_moves_as_its_sights_say() {
        let point = Point3::new(0.2, -0.1, 2.0);
        let cameras = [at(0.0, 0.0, 0.0), at(0.3, 0.0, 0.1), at(0.1, 0.2, 0.0)];
        let exact = cameras.map(|c| sight(c, point));
        let moved = moved_by_sights(&point, exact.iter());
        assert!((moved.iter().sum::<Matrix3<f64>>() - Matrix3::identity()).norm() < 1e-9);
        // What the second camera sees lies where its pose says: a pose that is 1 mm off carries the point along.
        let off = Vector3::new(0.001, -0.0005, 0.0002);
        let mut wrong = exact;
        wrong[1].map_from_camera.translation.vector += off;
        let got = triangulate(&wrong).unwrap().position - point;
        assert!((got - moved[1] * off).norm() < 1e-5, "{got} instead of {}", moved[1] * off);
        assert!(got.norm() > 0.0005);
    }

    #[test]
    fn parallel_and_diverging_rays_give_no_point() {
        let point = Point3::new(0.0, 0.0, 2.0);
        let one = sight(at(0.0, 0.0, 0.0), point);
        assert_eq!(triangulate(&[one]), Err(Unplaced::NoParallax));
        assert_eq!(triangulate(&[one, one]), Err(Unplaced::NoParallax), "pure rotation");
        let away = Sight { ray: Vector2::new(0.3, 0.0), ..sight(at(1.0, 0.0, 0.0), point) };
        assert_eq!(triangulate(&[one, away]), Err(Unplaced::Behind));
    }
}
