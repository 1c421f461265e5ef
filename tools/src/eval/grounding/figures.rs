//! The figures of many goals.

use std::collections::BTreeMap;

use mindseye_base::stats::median as middle;
use mindseye_bridge::answer::Status;
use serde::Serialize;

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
            instruction_followed: s.scores.instruction_followed,
            followed_sd_0_2: s.scores.followed_sd_0_2,
            sd_m: s.scores.sd_m,
            heading_deg_median: s.heading_deg_median,
            position_m_median: s.position_m_median,
            arrived: s.arrived,
        }
    };
    let mut out = Vec::new();
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
            rulers: Rulers::of(outcomes),
            sd_tells_rooms_apart: auc(sd("truth_wrong_room"), sd("truth")),
            examiner,
        }
    }
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
        ("absent_auc", masks(absent)),
        ("absent_refused", refused(absent)),
        ("swapped_auc", masks(swapped)),
        ("swapped_refused", refused(swapped)),
        ("chance", mean(outcomes.iter().map(|o| 1.0 / o.objects.max(1) as f64))),
        ("goal_ms_median", median(outcomes.iter().map(|o| o.ms))),
    ]
}
