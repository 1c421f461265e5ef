//! What the runtime is told of the robot's motion: exact poses, noisy ones, or none.

use mindseye::ground::Scene;
use mindseye_bridge::answer::FramedPose2;
use mindseye_world::{OdometryNoise, Pose2, Rng, odometry_of};
use serde::Serialize;

use super::goal::Outcome;
use crate::eval::report::Table;
use crate::eval::stats::{Figure, mean, median, share};
use crate::eval::visit::{Visit, plain_pose, world_pose};

/// How good odometry is. The runtime is told the noise (as a robot's configuration states it), not the error.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Regime {
    /// The map's own poses.
    Exact,
    /// 1 cm and 0.5 degrees per metre, 1 degree per radian.
    Typical,
    /// Five times that.
    Five,
    /// No poses at all.
    None,
}

impl Regime {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Exact, Self::Typical, Self::Five, Self::None];

    fn text(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Typical => "typical noise",
            Self::Five => "five times typical",
            Self::None => "none",
        }
    }

    /// The noise of it.
    pub fn noise(self) -> OdometryNoise {
        match self {
            Self::Exact | Self::None => OdometryNoise::default(),
            Self::Typical => OdometryNoise::typical(),
            Self::Five => OdometryNoise::typical().times(5.0),
        }
    }
}

/// A visit as the runtime is told of it, and how to understand its answer.
pub(in crate::eval) struct Told {
    pub(in crate::eval) scene: Scene,
    /// The answer's frame in the map, as true as the robot's place now; none: it is the map.
    map_from_answer: Option<Pose2>,
}

impl Told {
    /// Tells of a visit. What odometry is off depends on `seed` only.
    pub(in crate::eval) fn of(visit: &Visit, regime: Regime, seed: u64) -> Self {
        let mut scene = visit.scene();
        let here = visit.here;
        if regime == Regime::Exact {
            return Self { scene, map_from_answer: None };
        }
        scene.odometry_noise = regime.noise();
        let way: Vec<Pose2> = scene
            .memory
            .iter()
            .map(|c| c.info.odom_from_base)
            .chain([scene.odom_from_base])
            .filter_map(|p| p.map(world_pose))
            .collect();
        let mut told = odometry_of(&way, regime.noise(), &mut Rng::new(seed ^ 0x0d0_71e5)).into_iter();
        let mut next = || told.next().filter(|_| regime != Regime::None).map(plain_pose);
        for latent in &mut scene.memory {
            latent.info.odom_from_base = latent.info.odom_from_base.and_then(|_| next());
        }
        scene.odom_from_base = scene.odom_from_base.and_then(|_| next());
        // Answers without odometry are relative to where the robot stands.
        let answer_from_here = scene.odom_from_base.map(world_pose).unwrap_or_default();
        Self { scene, map_from_answer: Some(here.compose(answer_from_here.inverse())) }
    }

    /// A pose of the answer in the map.
    pub(super) fn in_map(&self, pose: &FramedPose2) -> Pose2 {
        let pose = Pose2::unwrapped(pose.x, pose.y, pose.yaw);
        self.map_from_answer.map_or(pose, |frame| frame.compose(pose))
    }

    /// A pose of the map in the answer's frame, in which its covariance is.
    pub(super) fn in_answer(&self, pose: Pose2) -> Pose2 {
        self.map_from_answer.map_or(pose, |frame| frame.relative(pose))
    }
}

/// What poses are worth with one kind of odometry.
#[derive(Serialize)]
pub(super) struct RegimeRow {
    odometry: Regime,
    found: Figure,
    arrived: Figure,
    arrived_before_asking_again: Figure,
    arrived_within_1_2_m: Figure,
    spl: Figure,
    in_90_ellipse: Figure,
    heading_deg_median: Figure,
    position_m_median: Figure,
    imagined_path_free: Figure,
    confirmed: Figure,
    reasked: Figure,
}

impl RegimeRow {
    pub(super) fn of(odometry: Regime, outcomes: &[Outcome]) -> Self {
        let rows = || outcomes.iter().filter_map(|o| o.rows.get("model"));
        let reached = || rows().filter_map(|r| r.reached);
        let answers = || outcomes.iter().filter_map(|o| o.answer);
        Self {
            odometry,
            found: share(rows().filter_map(|r| r.found)),
            arrived: share(reached().map(|r| r.arrived)),
            arrived_before_asking_again: share(outcomes.iter().map(|o| o.first_arrived == Some(true))),
            arrived_within_1_2_m: share(reached().map(|r| r.arrived_within_1_2_m)),
            spl: mean(reached().map(|r| r.spl)),
            in_90_ellipse: share(outcomes.iter().filter_map(|o| o.in_ellipse_90)),
            heading_deg_median: median(answers().map(|e| e[0])),
            position_m_median: median(answers().map(|e| e[1])),
            imagined_path_free: share(outcomes.iter().filter_map(|o| o.touched.map(|t| !t))),
            confirmed: share(outcomes.iter().filter_map(|o| o.confirmed)),
            reasked: share(outcomes.iter().map(|o| o.reasked)),
        }
    }
}

/// The regimes one below the other.
pub(super) fn table(rows: &[RegimeRow]) -> String {
    let mut t = Table::new(&[
        "odometry",
        "pose given",
        "arrival",
        "before asking again",
        "within 1.2 m",
        "SPL",
        "in 90 % ellipse",
        "heading (deg)",
        "position (m)",
        "imagined path free",
        "arrival confirmed",
        "asked again",
    ]);
    for r in rows {
        t.row([
            r.odometry.text().to_owned(),
            r.found.text(2),
            r.arrived.text(2),
            r.arrived_before_asking_again.text(2),
            r.arrived_within_1_2_m.text(2),
            r.spl.text(2),
            r.in_90_ellipse.text(2),
            r.heading_deg_median.text(1),
            r.position_m_median.text(3),
            r.imagined_path_free.text(2),
            r.confirmed.text(2),
            r.reasked.text(2),
        ]);
    }
    t.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odometry_drifts_as_it_is_told() {
        // A turn on the spot in 24 steps, 1000 times: the heading is off by 1 degree per root radian.
        let truth: Vec<Pose2> = (0..25).map(|k| Pose2::new(0.3, 0.1, f64::from(k) * 0.25)).collect();
        let drive: Vec<Pose2> = (0..25).map(|k| Pose2::new(f64::from(k) * 0.1, 0.2, 0.0)).collect();
        let noise = OdometryNoise::typical();
        let (mut turned, mut driven, mut mean) = (0.0, 0.0, 0.0);
        for seed in 0..1000 {
            let rng = &mut Rng::new(seed);
            let told = odometry_of(&truth, noise, rng);
            assert_eq!((told.len(), told[0]), (25, truth[0]));
            turned += mindseye_world::wrap_angle(told[24].yaw - truth[24].yaw).powi(2) / 1000.0;
            let told = odometry_of(&drive, noise, rng);
            driven += (told[24].x - 2.4).powi(2) / 1000.0;
            mean += (told[24].x - 2.4) / 1000.0;
        }
        // 6 rad and 2.4 m; what a heading of 0.8 degrees shortens the way by is far below a millimetre.
        assert!((turned.sqrt() / (1f64.to_radians() * 6f64.sqrt()) - 1.0).abs() < 0.07, "{}", turned.sqrt());
        assert!((driven.sqrt() / (0.01 * 2.4f64.sqrt()) - 1.0).abs() < 0.07 && mean.abs() < 2e-3, "{driven}");
        let exact = odometry_of(&drive, OdometryNoise::default(), &mut Rng::new(1));
        assert!(exact.iter().zip(&drive).all(|(a, b)| a.distance(*b) < 1e-12));
    }
}
