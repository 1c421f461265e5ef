//! What an answer rests on, in sentences for a person.

use super::tap::Evidence;
use crate::lift::{Registered, Witness};
use mindseye_bridge::answer::Answer;

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// One sentence each; empty where nothing was worked on.
pub(super) fn evidence_in_words(evidence: &Evidence, answer: Option<&Answer>) -> Vec<String> {
    let mut out = Vec::new();
    let mut say = |sentence: String| out.push(sentence);
    if let Some(answer) = answer {
        if let (Some(class), Some(views)) = (&answer.class, answer.views) {
            say(format!("The detector saw a {class} in {views} pictures."));
        }
        if !answer.imagined && answer.pose.is_some() {
            say("No imagined drive stands behind the answer.".into());
        }
        if !answer.eyes.is_empty() {
            say(format!("It rests on what {} saw.", answer.eyes.join(" and ")));
        }
        if let Some(why) = &answer.fallback {
            say(format!("The small model on the robot answered: {why}."));
        }
    }
    if !evidence.used.is_empty() {
        say(format!("{} remembered moments were looked at.", evidence.used.len()));
    }
    let Some(lifted) = &evidence.lifted else { return out };
    let estimate = &lifted.estimate;
    let sigma = |name: &str, w: &Witness| format!("{name} places the thing to within {:.2} m", w.sigma_m);
    match (&estimate.plan, &estimate.memory) {
        (Some(plan), Some(memory)) => {
            let apart = (plan.object.0 - memory.object.0).hypot(plan.object.1 - memory.object.1);
            let spreads =
                estimate.disagreement.map(|d| format!(", {d:.1} of their spreads")).unwrap_or_default();
            say(format!(
                "{} and {}; they are {apart:.2} m apart{spreads}.",
                sigma("The plan", plan),
                sigma("the memory", memory)
            ));
        }
        (Some(plan), None) => say(format!("{}; the memory says nothing of it.", sigma("The plan", plan))),
        (None, Some(memory)) => say(format!("{}; there is no plan.", sigma("The memory", memory))),
        (None, None) => {}
    }
    if let Some(metres) = estimate.localisation_m {
        say(format!(
            "The network misplaces the moments that it looked at by {metres:.2} m (median) against odometry."
        ));
    }
    if let Some(registered) = &lifted.registered {
        registered_in_words(registered, &mut say);
    }
    if let Some(apart) = lifted.drive_apart {
        say(format!("The drive ends {apart:.1} spreads from where plan and memory put the goal."));
    }
    if let Some(error) = evidence.reconstruction_error {
        say(format!("The codec shows the remembered pictures with a mean error of {}.", percent(error)));
    }
    if let Some(candidate) = evidence.guided {
        say(format!(
            "Drive {} decided; the drive that is shown goes the same way, held to what was seen.",
            candidate + 1
        ));
    }
    out
}

fn registered_in_words(r: &Registered, say: &mut impl FnMut(String)) {
    say(format!(
        "What was seen explains the drive's pictures to {} on average, its end to {}, and picture {} worst, to {}.",
        percent(1.0 - r.mean_error),
        percent(1.0 - r.end_error),
        r.way_frame + 1,
        percent(1.0 - r.way_error)
    ));
    let elsewhere =
        r.elsewhere.map(|error| format!("; the best other place explains them to {}", percent(1.0 - error)));
    say(format!(
        "Of its last pictures {} was seen before{}.",
        percent(r.covered),
        elsewhere.unwrap_or_default()
    ));
    match (r.box_score, r.thing_error) {
        (Some(score), Some(error)) => say(format!(
            "They hold a box (score {score:.2}); what was seen explains what is in it to {}.",
            percent(1.0 - error)
        )),
        (Some(score), None) => say(format!("They hold a box (score {score:.2}).")),
        (None, _) => say("They hold no box that is clear enough.".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planar::Pose2;

    fn evidence() -> Evidence {
        let witness = |x: f64, sigma_m: f64| Witness { object: (x, 0.0), pose: Pose2::default(), sigma_m };
        let estimate = crate::lift::Estimate {
            pose: None,
            variances: [0.0; 3],
            object: None,
            mask_max: 1.0,
            plan: Some(witness(2.0, 0.2)),
            memory: Some(witness(2.5, 0.1)),
            disagreement: Some(2.2),
            localisation_m: Some(0.05),
        };
        let registered = Registered {
            pose: Pose2::default(),
            end_frame: 18,
            end_error: 0.1,
            covered: 0.8,
            distinct: 0.5,
            elsewhere: Some(0.25),
            way_frame: 11,
            way_error: 0.3,
            mean_error: 0.15,
            box_score: Some(0.61),
            thing_error: Some(0.2),
        };
        let parts = [crate::lift::Agreement { what: "", weight: 1.0, value: None }; 4];
        let lifted = crate::lift::Lifted {
            decision: crate::lift::Decision::Found,
            consistency: 0.5,
            parts,
            estimate,
            rollout: None,
            registered: Some(registered),
            drive_apart: Some(1.25),
            path: Vec::new(),
        };
        Evidence {
            frames: Vec::new(),
            candidate: 4,
            used: vec![1, 2, 3],
            origin: None,
            path: Vec::new(),
            object: None,
            lifted: Some(lifted),
            explained: Vec::new(),
            guided: Some(1),
            reconstruction_error: None,
        }
    }

    #[test]
    fn every_figure_is_in_a_sentence() {
        let said = evidence_in_words(&evidence(), None).join("\n");
        for part in [
            "3 remembered moments",
            "The plan places the thing to within 0.20 m and the memory places the thing to within 0.10 m",
            "they are 0.50 m apart, 2.2 of their spreads",
            "by 0.05 m (median)",
            "to 85 % on average, its end to 90 %, and picture 12 worst, to 70 %",
            "80 % was seen before; the best other place explains them to 75 %",
            "score 0.61); what was seen explains what is in it to 80 %",
            "ends 1.2 spreads",
            "Drive 2 decided",
        ] {
            assert!(said.contains(part), "{part:?} is not in:\n{said}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let mut bare = evidence();
        (bare.lifted, bare.guided) = (None, None);
        bare.used.clear();
        assert!(evidence_in_words(&bare, None).is_empty());
        let mut answer = Answer::new("g", mindseye_bridge::answer::Status::Found, None);
        (answer.class, answer.views) = (Some("chair".into()), Some(3));
        assert_eq!(evidence_in_words(&bare, Some(&answer)), ["The detector saw a chair in 3 pictures."]);
    }
}
