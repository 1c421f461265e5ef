//! The figures of many goals.

use std::collections::{BTreeMap, BTreeSet};

use mindseye_base::stats::median as middle;
use mindseye_bridge::answer::Status;
use serde::Serialize;

use super::adds::{Added, added};
use super::goal::{Absent, Outcome, ROWS, Reached, Row};
use crate::eval::examiner::Quality;
use crate::eval::judge::{Scores, Verdict};
use crate::eval::stats::{Figure, auc, mean, median, share};

/// The figures of one kind of drive.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    drives: usize,
    #[serde(flatten)]
    pub(super) scores: Scores,
    pub(super) dynamic_degree: Figure,
    /// See [`super::goal::OwnWay`]; means over drives (dB).
    pub(super) own_way_psnr_db: Figure,
    pub(super) own_way_worst_db: Figure,
    pub(super) found: Figure,
    pub(super) heading_deg_median: Figure,
    pub(super) position_m_median: Figure,
    pub(super) arrived: Figure,
    pub(super) arrived_within_1_2_m: Figure,
    pub(super) spl: Figure,
}

/// A drive is dynamic when its motion is at least this share of the median true drive's.
const DYNAMIC: f64 = 0.25;

fn summary(outcomes: &[Outcome], key: &str, moving: f64) -> Summary {
    let rows: Vec<Row> = outcomes.iter().filter_map(|o| o.rows.get(key).copied()).collect();
    let shown: Vec<Verdict> = rows.iter().filter_map(|r| r.verdict).collect();
    let reached: Vec<Reached> = rows.iter().filter_map(|r| r.reached).collect();
    let is = |f: &dyn Fn(&Verdict) -> bool| share(shown.iter().map(f));
    Summary {
        drives: shown.len(),
        scores: Scores::of(&shown),
        dynamic_degree: if moving > 0.0 { is(&|v| v.motion >= DYNAMIC * moving) } else { share([]) },
        own_way_psnr_db: mean(rows.iter().filter_map(|r| Some(r.own_way?.psnr))),
        own_way_worst_db: mean(rows.iter().filter_map(|r| Some(r.own_way?.worst))),
        found: share(rows.iter().filter_map(|r| r.found)),
        heading_deg_median: median(reached.iter().filter_map(|r| r.error).map(|e| e[0])),
        position_m_median: median(reached.iter().filter_map(|r| r.error).map(|e| e[1])),
        arrived: share(reached.iter().map(|r| r.arrived)),
        arrived_within_1_2_m: share(reached.iter().map(|r| r.arrived_within_1_2_m)),
        spl: mean(reached.iter().map(|r| r.spl)),
    }
}

#[derive(Serialize)]
pub(super) struct PoseRow {
    pub(super) from: &'static str,
    pub(super) heading_deg_median: Figure,
    pub(super) within_15_deg: Figure,
    pub(super) within_25_deg: Figure,
    pub(super) position_m_median: Figure,
}

fn pose_row(from: &'static str, outcomes: &[Outcome], get: impl Fn(&Outcome) -> Option<[f64; 2]>) -> PoseRow {
    let all: Vec<[f64; 2]> = outcomes.iter().filter_map(get).collect();
    PoseRow {
        from,
        heading_deg_median: median(all.iter().map(|e| e[0])),
        within_15_deg: share(all.iter().map(|e| e[0] <= 15.0)),
        within_25_deg: share(all.iter().map(|e| e[0] <= 25.0)),
        position_m_median: median(all.iter().map(|e| e[1])),
    }
}

pub(super) fn counts(statuses: impl Iterator<Item = Status>) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for status in statuses {
        let name = serde_json::to_value(status).ok().and_then(|v| v.as_str().map(str::to_string));
        *out.entry(name.unwrap_or_default()).or_insert(0) += 1;
    }
    out
}

pub(super) fn refused(absent: &[Absent]) -> Figure {
    share(absent.iter().map(|o| matches!(o.status, Status::NotInContext | Status::Inconsistent)))
}

/// A group of goals and the model's figures in it.
#[derive(Serialize)]
pub(super) struct Part {
    pub(super) of: String,
    pub(super) found: Figure,
    /// Imagined paths that touch nothing.
    pub(super) path_free: Figure,
    pub(super) instruction_followed: Figure,
    pub(super) followed_sd_0_2: Figure,
    pub(super) sd_m: Figure,
    pub(super) heading_deg_median: Figure,
    pub(super) position_m_median: Figure,
    pub(super) arrived: Figure,
}

fn parts(outcomes: &[Outcome]) -> Vec<Part> {
    let part = |of: String, keep: &dyn Fn(&Outcome) -> bool| {
        let some: Vec<Outcome> = outcomes.iter().filter(|o| keep(o)).cloned().collect();
        let s = summary(&some, "model", 0.0);
        Part {
            of,
            found: s.found,
            path_free: share(some.iter().filter_map(|o| o.touched.map(|t| !t))),
            instruction_followed: s.scores.instruction_followed,
            followed_sd_0_2: s.scores.followed_sd_0_2,
            sd_m: s.scores.sd_m,
            heading_deg_median: s.heading_deg_median,
            position_m_median: s.position_m_median,
            arrived: s.arrived,
        }
    };
    let mut out = Vec::new();
    let difficulties: BTreeSet<&str> = outcomes.iter().map(|o| o.difficulty.as_str()).collect();
    if difficulties.len() > 1 {
        out.extend(difficulties.into_iter().map(|d| part(d.to_owned(), &|o| o.difficulty == d)));
    }
    for (low, high) in [(0.0, 1.5), (1.5, 2.5), (2.5, f64::INFINITY)] {
        let of = if high.is_finite() {
            format!("object at {low} to {high} m")
        } else {
            format!("object beyond {low} m")
        };
        out.push(part(of, &|o| (low..high).contains(&o.distance_m)));
    }
    out.push(part("visible in the first picture".into(), &|o| o.visible_at_start));
    out.push(part("not visible in the first picture".into(), &|o| !o.visible_at_start));
    if outcomes.iter().any(|o| o.in_another_room.is_some()) {
        out.push(part("in the room where the robot is".into(), &|o| o.in_another_room == Some(false)));
        out.push(part("in another room".into(), &|o| o.in_another_room == Some(true)));
    }
    for (low, high) in [(0, 2), (3, 4), (5, usize::MAX)] {
        let of = match high {
            usize::MAX => format!("seen in {low} or more of the context groups in use"),
            _ => format!("seen in {low} to {high} of the context groups in use"),
        };
        out.push(part(of, &|o| (low..=high).contains(&o.groups_with_it)));
    }
    out
}

/// How much of SD is owed to the pictures alone: see [`super::goal::ROWS`].
#[derive(Serialize)]
pub(super) struct Rulers {
    /// SD of the model (m).
    pub(super) sd_m: Figure,
    /// The mean over its pictures in place of the largest (m).
    pub(super) sd_mean_m: Figure,
    /// SD of the true drive, blurred to the model's PSNR in the same house (m).
    pub(super) blurred_sd_m: Figure,
    /// SD of the true drive with noise to the same PSNR (m).
    pub(super) noisy_sd_m: Figure,
    /// SD of the model less that of the blurred true drive, house by house (m).
    pub(super) over_blurred_m: Figure,
    /// SD of the model less that of the noisy true drive, house by house (m).
    pub(super) over_noisy_m: Figure,
    /// How far pictures stand from where the answer's path puts them, mean over drives (m).
    pub(super) off_path_m: Figure,
    /// IF(SD < 0.1 m) of the model.
    pub(super) followed_sd_0_1: Figure,
    /// IF(SD < 0.1 m) of the true drive through the codec: the ceiling.
    pub(super) followed_sd_0_1_ceiling: Figure,
}

impl Rulers {
    /// Of goals that were judged by an examiner; none otherwise.
    fn of(outcomes: &[Outcome]) -> Option<Self> {
        let verdict = |o: &Outcome, key: &str| o.rows.get(key).and_then(|r| r.verdict);
        let sd = |key: &'static str| {
            mean(outcomes.iter().filter_map(move |o| verdict(o, key)).filter_map(|v| v.sd))
        };
        let over = |key: &'static str| {
            mean(outcomes.iter().filter_map(move |o| Some(verdict(o, "model")?.sd? - verdict(o, key)?.sd?)))
        };
        let scores = |key: &'static str| {
            Scores::of(&outcomes.iter().filter_map(|o| verdict(o, key)).collect::<Vec<_>>())
        };
        let (model, truth) = (scores("model"), scores("truth"));
        (model.sd_m.n > 0).then(|| Self {
            sd_m: model.sd_m,
            sd_mean_m: model.sd_mean_m,
            blurred_sd_m: sd("truth_blurred"),
            noisy_sd_m: sd("truth_noisy"),
            over_blurred_m: over("truth_blurred"),
            over_noisy_m: over("truth_noisy"),
            off_path_m: mean(outcomes.iter().filter_map(|o| o.off_path_m)),
            followed_sd_0_1: model.followed_sd_0_1,
            followed_sd_0_1_ceiling: truth.followed_sd_0_1,
        })
    }
}

/// All figures of a run.
pub(super) struct Figures {
    /// By the names in [`ROWS`], with what they are; those that were measured, the model first.
    pub(super) rows: Vec<(&'static str, &'static str, Summary)>,
    pub(super) poses: [PoseRow; 4],
    pub(super) gate: Vec<(&'static str, Figure)>,
    pub(super) parts: Vec<Part>,
    /// What imagination adds.
    pub(super) added: Vec<Added>,
    pub(super) rulers: Option<Rulers>,
    /// How well SD tells a true drive in another house from one in this house.
    pub(super) sd_tells_rooms_apart: Figure,
    pub(super) examiner: Option<Quality>,
}

impl Figures {
    pub(super) fn of(
        outcomes: &[Outcome],
        absent: &[Absent],
        swapped: &[Absent],
        examiner: Option<Quality>,
    ) -> Self {
        let mut motions: Vec<f64> =
            outcomes.iter().filter_map(|o| o.rows.get("truth")?.verdict).map(|v| v.motion).collect();
        let moving = if motions.is_empty() { 0.0 } else { middle(&mut motions) };
        let rows: Vec<(&str, &str, Summary)> = ROWS
            .iter()
            .filter(|(key, _)| *key == "model" || outcomes.iter().any(|o| o.rows.contains_key(key)))
            .map(|(key, what)| (*key, *what, summary(outcomes, key, moving)))
            .collect();
        let sd = |key: &'static str| outcomes.iter().filter_map(move |o| o.rows.get(key)?.verdict?.sd);
        Self {
            gate: gate(outcomes, absent, swapped, rows[0].2.found),
            rows,
            poses: [
                pose_row("answer (all witnesses)", outcomes, |o| o.answer),
                pose_row("plan: pose head, one pass", outcomes, |o| o.plan),
                pose_row("memory: mask and place with odometry", outcomes, |o| o.memory),
                pose_row("drive: end of the imagined video", outcomes, |o| o.drive),
            ],
            parts: parts(outcomes),
            added: added(outcomes),
            rulers: Rulers::of(outcomes),
            sd_tells_rooms_apart: auc(sd("truth_wrong_room"), sd("truth")),
            examiner,
        }
    }
}

/// How many of the drives whose end was confirmed, or was not, arrived.
fn arrived_where(outcomes: &[Outcome], confirmed: bool) -> Figure {
    let some = outcomes.iter().filter(|o| o.confirmed == Some(confirmed));
    share(some.filter_map(|o| Some(o.rows.get("model")?.reached?.arrived)))
}

/// What the decision to give a pose is worth.
fn gate(
    outcomes: &[Outcome],
    absent: &[Absent],
    swapped: &[Absent],
    found: Figure,
) -> Vec<(&'static str, Figure)> {
    let mut by_confidence: Vec<&Outcome> = outcomes.iter().filter(|o| o.answer.is_some()).collect();
    by_confidence.sort_by(|a, b| b.consistency.unwrap_or(0.0).total_cmp(&a.consistency.unwrap_or(0.0)));
    let within_25 = |some: &[&Outcome]| share(some.iter().filter_map(|o| o.answer).map(|e| e[0] <= 25.0));
    let half = by_confidence.len() / 2;
    let masks =
        |absent: &[Absent]| auc(outcomes.iter().map(|o| o.mask_max), absent.iter().map(|o| o.mask_max));
    vec![
        ("found", found),
        ("found_within_25_deg", within_25(&by_confidence)),
        ("confident_half_within_25_deg", within_25(&by_confidence[..half])),
        ("other_half_within_25_deg", within_25(&by_confidence[half..])),
        ("in_90_ellipse", share(outcomes.iter().filter_map(|o| o.in_ellipse_90))),
        ("imagined_path_free", share(outcomes.iter().filter_map(|o| o.touched.map(|t| !t)))),
        ("arrived_before_asking_again", share(outcomes.iter().filter_map(|o| o.first_arrived))),
        ("arrived_by_map", share(outcomes.iter().filter_map(|o| o.arrived_by_map))),
        ("arrival_confirmed", share(outcomes.iter().filter_map(|o| o.confirmed))),
        ("arrived_where_confirmed", arrived_where(outcomes, true)),
        ("arrived_where_not_confirmed", arrived_where(outcomes, false)),
        ("reasked", share(outcomes.iter().filter(|o| o.answer.is_some()).map(|o| o.reasked))),
        ("absent_auc", masks(absent)),
        ("absent_refused", refused(absent)),
        ("swapped_auc", masks(swapped)),
        ("swapped_refused", refused(swapped)),
        ("chance", mean(outcomes.iter().map(|o| 1.0 / o.objects.max(1) as f64))),
        ("goal_ms_median", median(outcomes.iter().map(|o| o.ms))),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A goal of which nothing is known but this.
    pub(in crate::eval::grounding) fn outcome(mask_max: f64, consistency: f64) -> Outcome {
        Outcome {
            house: 0,
            difficulty: String::new(),
            goal: String::new(),
            status: Status::Found,
            consistency: Some(consistency),
            answer: None,
            plan: None,
            memory: None,
            drive: None,
            object: [None; 3],
            in_ellipse_90: None,
            squared_spreads: None,
            heading_std_deg: None,
            mask_max,
            disagreement: None,
            registered: None,
            drive_apart: None,
            reason: None,
            destroyed: BTreeMap::new(),
            localisation_m: None,
            distance_m: 1.0,
            visible_at_start: false,
            in_another_room: None,
            begins_here: true,
            groups_with_it: 0,
            first_arrived: None,
            looked_off_m: None,
            confirmed: None,
            reasked: false,
            arrived_by_map: None,
            touched: None,
            off_path_m: None,
            reconstruction_error: None,
            objects: 5,
            ms: 10.0,
            sights: [0; 3],
            rests_on: BTreeMap::new(),
            rows: BTreeMap::new(),
        }
    }

    fn shown(sd: f64, mean: f64, followed: bool, motion: f64) -> Row {
        let verdict = Verdict { sd: Some(sd), sd_mean: Some(mean), followed, motion, ..Verdict::default() };
        Row { verdict: Some(verdict), ..Row::default() }
    }

    #[test]
    fn a_row_sums_up_pictures_and_drives() {
        let mut outcomes = vec![outcome(1.0, 0.5), outcome(1.0, 0.5), outcome(1.0, 0.5), outcome(1.0, 0.5)];
        for (k, o) in outcomes.iter_mut().enumerate() {
            let reached = Reached {
                error: (k < 3).then_some([10.0 * k as f64, 0.1 * k as f64]),
                arrived: k == 0,
                arrived_within_1_2_m: k < 2,
                spl: if k == 0 { 0.8 } else { 0.0 },
            };
            // Motion a quarter of the median true one is dynamic.
            let row = shown(0.2, 0.1, k != 3, [0.024, 0.026, 0.1, 0.2][k]);
            o.rows.insert("model", Row { reached: Some(reached), found: Some(k < 3), ..row });
        }
        let s = summary(&outcomes, "model", 0.1);
        assert_eq!((s.drives, s.scores.instruction_followed.value, s.found.value), (4, 0.75, 0.75));
        assert_eq!((s.arrived.value, s.arrived_within_1_2_m.value), (0.25, 0.5));
        assert!((s.spl.value - 0.2).abs() < 1e-12);
        assert_eq!((s.heading_deg_median.value, s.heading_deg_median.n), (10.0, 3));
        assert_eq!(s.dynamic_degree.value, 0.75);
        assert_eq!(summary(&outcomes, "truth", 0.1).drives, 0);
    }

    #[test]
    fn the_confident_half_stands_beside_the_other() {
        let mut outcomes = Vec::new();
        for (consistency, heading, inside) in
            [(0.2, 90.0, false), (0.9, 5.0, true), (0.1, 20.0, true), (0.8, 24.0, true), (0.7, 26.0, false)]
        {
            let mut o = outcome(3.0, consistency);
            o.answer = Some([heading, 0.1]);
            o.in_ellipse_90 = Some(inside);
            outcomes.push(o);
        }
        // One that gave no pose has no part in either half.
        outcomes.push(outcome(0.0, 0.95));
        let figures: BTreeMap<&str, Figure> = gate(&outcomes, &[], &[], share([true])).into_iter().collect();
        // Five poses: .9 and .8 against .7, .2 and .1.
        assert_eq!(figures["confident_half_within_25_deg"].value, 1.0);
        assert!((figures["other_half_within_25_deg"].value - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!((figures["found_within_25_deg"].value, figures["in_90_ellipse"].value), (0.6, 0.6));
        assert!((figures["chance"].value - 0.2).abs() < 1e-12 && figures["absent_auc"].n == 0);
    }

    #[test]
    fn goals_are_grouped_by_distance_and_sight() {
        let mut near = outcome(1.0, 0.5);
        near.distance_m = 1.49;
        near.visible_at_start = true;
        near.groups_with_it = 3;
        let mut far = outcome(1.0, 0.5);
        far.distance_m = 2.5;
        far.in_another_room = Some(true);
        far.touched = Some(true);
        far.groups_with_it = 5;
        for (o, followed) in [(&mut near, true), (&mut far, false)] {
            o.rows.insert("model", Row { found: Some(!followed), ..shown(0.3, 0.1, followed, 0.0) });
        }
        let parts = parts(&[near, far]);
        let part = |name: &str| parts.iter().find(|p| p.of == name).expect("a part");
        let of = |name: &str| part(name).instruction_followed;
        let another = part("in another room");
        assert_eq!((another.found.n, another.found.value), (1, 1.0));
        assert_eq!((another.path_free.n, another.path_free.value), (1, 0.0));
        assert_eq!(part("in the room where the robot is").found.n, 0, "of the other nothing is known");
        assert_eq!((of("object at 0 to 1.5 m").n, of("object at 0 to 1.5 m").value), (1, 1.0));
        assert_eq!(of("object at 1.5 to 2.5 m").n, 0);
        assert_eq!((of("object beyond 2.5 m").n, of("object beyond 2.5 m").value), (1, 0.0));
        assert_eq!(of("visible in the first picture").value, 1.0);
        assert_eq!(of("not visible in the first picture").value, 0.0);
        assert_eq!(of("seen in 3 to 4 of the context groups in use").value, 1.0);
        assert_eq!(of("seen in 5 or more of the context groups in use").n, 1);
    }

    #[test]
    fn rulers_are_differences_house_by_house() {
        let mut outcomes = vec![outcome(1.0, 0.5), outcome(1.0, 0.5)];
        for (o, [model, blurred, noisy, truth]) in
            outcomes.iter_mut().zip([[0.4, 0.3, 0.5, 0.09], [0.6, 0.3, 0.5, 0.11]])
        {
            o.rows.insert("model", shown(model, 0.5 * model, true, 0.0));
            o.rows.insert("truth_blurred", shown(blurred, 0.1, true, 0.0));
            o.rows.insert("truth_noisy", shown(noisy, 0.1, true, 0.0));
            o.rows.insert("truth", shown(truth, 0.1, true, 0.0));
        }
        let r = Rulers::of(&outcomes).expect("they were examined");
        for (figure, wanted) in [
            (r.sd_m, 0.5),
            (r.sd_mean_m, 0.25),
            (r.blurred_sd_m, 0.3),
            (r.noisy_sd_m, 0.5),
            (r.over_blurred_m, 0.2),
            (r.over_noisy_m, 0.0),
            (r.followed_sd_0_1, 0.0),
            (r.followed_sd_0_1_ceiling, 0.5),
        ] {
            assert!((figure.value - wanted).abs() < 1e-12 && figure.n == 2, "{figure:?} instead of {wanted}");
        }
        outcomes.iter_mut().for_each(|o| o.rows.clear());
        assert!(Rulers::of(&outcomes).is_none(), "nobody examined them");
    }

    #[test]
    fn refusals_and_poses_are_counted() {
        let row = pose_row("x", &[outcome(1.0, 0.5), outcome(1.0, 0.5), outcome(1.0, 0.5)], |_| None);
        assert_eq!(row.within_25_deg.n, 0);
        let mut outcomes: Vec<Outcome> = (0..4).map(|_| outcome(1.0, 0.5)).collect();
        for (o, heading) in outcomes.iter_mut().zip([15.0, 15.1, 25.0, 25.1]) {
            o.plan = Some([heading, heading / 100.0]);
        }
        let row = pose_row("plan", &outcomes, |o| o.plan);
        assert_eq!((row.within_15_deg.value, row.within_25_deg.value), (0.25, 0.75));
        assert_eq!((row.heading_deg_median.value, row.position_m_median.value), (25.0, 0.25));
        let statuses = [Status::Found, Status::NotInContext, Status::NotInContext];
        assert_eq!(
            counts(statuses.into_iter()),
            BTreeMap::from([("found".to_owned(), 1), ("not_in_context".to_owned(), 2)])
        );
    }
}
