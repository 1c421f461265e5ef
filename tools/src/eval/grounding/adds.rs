//! What imagination adds: the same goals answered with the sampled drive, without it, and by the drive alone.

use std::collections::BTreeMap;

use mindseye::ground::Grounded;
use mindseye::lift::{Decision, Evidence, LiftParams, verify};
use mindseye::planar::Pose2;
use mindseye_world as world;
use mindseye_world::{Camera, House, project_box};
use serde::Serialize;

use super::goal::{Outcome, Reached};
use crate::eval::report::Table;
use crate::eval::stats::{Figure, median, share};

/// Witnesses that a pose may rest on, with what they are.
pub const WAYS: [(&str, &str); 3] = [
    ("with_drive", "memory, plan and sampled drive (the answer)"),
    ("without_drive", "memory and plan alone"),
    ("drive_alone", "the sampled drive alone"),
];

/// The poses of one answer by each of [`WAYS`], relative to where its rollout begins; those that are not given are left
/// out: without the drive the gate is that of a draft; the drive alone gives one where its end could be placed and shows a
/// box, or, where drives are not registered, always.
pub(super) fn poses(out: &Grounded, params: &LiftParams) -> BTreeMap<&'static str, Pose2> {
    let Some(lifted) = &out.lifted else { return BTreeMap::new() };
    let estimate = lifted.estimate.without_drive(params);
    let pose = estimate.pose;
    let draft = verify(estimate, &[], Evidence::default(), params);
    let boxed = lifted.registered.is_none_or(|shown| shown.box_score.is_some());
    let all = [
        lifted.estimate.pose.filter(|_| lifted.decision == Decision::Found),
        pose.filter(|_| draft.decision == Decision::Found),
        lifted.rollout.map(|w| w.pose).filter(|_| boxed),
    ];
    WAYS.iter().zip(all).filter_map(|((key, _), pose)| Some((*key, pose?))).collect()
}

/// What is near (m).
const NEAR_M: f64 = 2.5;

/// In how many of the views a thing is seen (at least a pixel of it), in how many whole, which is clear of the picture's
/// edges, and in how many from less than [`NEAR_M`].
pub(super) fn sights(
    house: &House,
    camera: &Camera,
    views: impl Iterator<Item = world::Pose2>,
    object: usize,
) -> [usize; 3] {
    let (w, h) = (camera.width as f32, camera.height as f32);
    let thing = &house.objects[object];
    let mut counts = [0; 3];
    for pose in views {
        let Some([x0, y0, x1, y1]) = project_box(house, pose, camera, object) else { continue };
        let whole = x0 > 0.5 && y0 > 0.5 && x1 < w - 0.5 && y1 < h - 0.5;
        let near = (thing.x - pose.x).hypot(thing.y - pose.y) < NEAR_M;
        for (count, is) in counts.iter_mut().zip([true, whole, near]) {
            *count += usize::from(is);
        }
    }
    counts
}

/// The figures of one of [`WAYS`] for some of the goals.
#[derive(Serialize)]
pub(super) struct Added {
    goals: &'static str,
    rests_on: &'static str,
    given: Figure,
    arrived: Figure,
    heading_deg_median: Figure,
    position_m_median: Figure,
}

type Group = (&'static str, fn(&Outcome) -> bool);
const GROUPS: [Group; 6] = [
    ("all", |_| true),
    ("seen whole in a remembered view", |o| o.sights[1] > 0),
    ("never seen whole", |o| o.sights[1] == 0),
    ("seen in at most two remembered views", |o| o.sights[0] <= 2),
    ("seen from afar only, beyond 2.5 m", |o| o.sights[0] > 0 && o.sights[2] == 0),
    ("in another room than the robot", |o| o.in_another_room == Some(true)),
];

/// All of them.
pub(super) fn added(outcomes: &[Outcome]) -> Vec<Added> {
    let mut out = Vec::new();
    for (goals, of) in GROUPS {
        for (key, rests_on) in WAYS {
            let all = || outcomes.iter().filter(|o| of(o)).map(|o| o.rests_on.get(key));
            let errors = || all().flatten().filter_map(|r: &Reached| r.error);
            out.push(Added {
                goals,
                rests_on,
                given: share(all().map(|r| r.is_some())),
                arrived: share(all().map(|r| r.is_some_and(|r| r.arrived))),
                heading_deg_median: median(errors().map(|e| e[0])),
                position_m_median: median(errors().map(|e| e[1])),
            });
        }
    }
    out
}

/// The figures as a table. One drive to each pose, without asking again.
pub(super) fn table(added: &[Added]) -> String {
    let mut t = Table::new(&[
        "what imagination adds: things",
        "the pose rests on",
        "pose given",
        "arrival, one drive",
        "heading, median (deg)",
        "position, median (m)",
    ]);
    for a in added.iter().filter(|a| a.given.n > 0) {
        t.row([
            a.goals.to_owned(),
            a.rests_on.to_owned(),
            a.given.text(2),
            a.arrived.text(2),
            a.heading_deg_median.text(1),
            a.position_m_median.text(3),
        ]);
    }
    t.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::grounding::figures::tests::outcome;

    #[test]
    fn goals_are_counted_by_what_their_poses_rest_on() {
        let mut all = vec![outcome(1.0, 0.5), outcome(1.0, 0.5), outcome(1.0, 0.5)];
        let reached =
            |deg: f64, arrived: bool| Reached { error: Some([deg, 0.1]), arrived, ..Reached::default() };
        all[0].sights = [3, 2, 3];
        all[0].rests_on =
            BTreeMap::from([("with_drive", reached(2.0, true)), ("drive_alone", reached(8.0, false))]);
        all[1].sights = [2, 0, 0];
        all[1].rests_on = BTreeMap::from([("with_drive", reached(4.0, false))]);
        let added = added(&all);
        let of = |goals: &str, rests_on: &str| {
            added.iter().find(|a| a.goals.contains(goals) && a.rests_on.contains(rests_on)).expect("a row")
        };
        let a = of("all", "(the answer)");
        assert!((a.given.value - 2.0 / 3.0).abs() < 1e-12 && (a.arrived.value - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!((a.heading_deg_median.value, a.heading_deg_median.n), (4.0, 2));
        assert_eq!(
            (of("all", "memory and plan alone").given.value, of("all", "drive alone").arrived.value),
            (0.0, 0.0)
        );
        assert_eq!(
            (of("seen whole", "(the answer)").given.n, of("seen whole", "(the answer)").given.value),
            (1, 1.0)
        );
        assert_eq!((of("never", "(the answer)").given.n, of("never", "(the answer)").given.value), (2, 0.5));
        assert_eq!(of("at most two", "(the answer)").given.n, 2, "one of them was never seen at all");
        assert_eq!(of("from afar", "(the answer)").given.n, 1);
        let empty = WAYS.len();
        assert_eq!(of("another room", "(the answer)").given.n, 0, "there is but one");
        assert_eq!(table(&added).lines().count(), 2 + GROUPS.len() * WAYS.len() - empty);
    }

    #[test]
    fn a_thing_is_seen_whole_or_cut_off() {
        let house = House::generate(5, &mindseye_world::Difficulty::plain());
        let camera = Camera::new(24, 16);
        let of = |pose: world::Pose2, object: usize| sights(&house, &camera, [pose].into_iter(), object);
        let stand = |object: usize| world::goal_pose(&house, world::Pose2::default(), object);
        let whole = |object: &usize| stand(*object).is_some_and(|pose| of(pose, *object) == [1, 1, 1]);
        let object = (0..house.objects.len()).find(whole).expect("one is seen whole from before it");
        let before = stand(object).expect("it can be stood before");
        let turned = |by: f64| world::Pose2::unwrapped(before.x, before.y, before.yaw + by);
        assert_eq!(of(turned(std::f64::consts::PI), object), [0, 0, 0]);
        // Turned by half the field of view its middle lies on the picture's edge.
        assert_eq!(of(turned(std::f64::consts::FRAC_PI_4), object), [1, 0, 1]);
    }
}
