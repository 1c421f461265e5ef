//! What a client asks for, and the checks on it.

use crate::geometry::isometry;
use crate::time::TimeDelta;
use nalgebra::Isometry3;
use serde::Deserialize;

/// Most characters in a goal's text.
pub const MAX_TEXT_CHARS: usize = 1_000;
/// Most waypoints in a goal.
pub const MAX_WAYPOINTS: usize = 1_000;
/// Farthest waypoint from the robot, metres.
pub const MAX_WAYPOINT_DISTANCE_M: f64 = 100.0;
/// Most imaginations per goal.
pub const MAX_CANDIDATES: u32 = 64;
/// Longest deadline and frame age: one hour.
pub const MAX_SPAN: TimeDelta = TimeDelta(3_600 * crate::time::NANOS_PER_SEC);
/// Largest goal document, bytes.
pub const MAX_JSON_BYTES: usize = 1 << 20;

/// What to go to.
#[derive(Debug, Clone, PartialEq)]
pub enum GoalKind {
    /// A description, such as "find the red chair". Between 1 and [`MAX_TEXT_CHARS`] characters.
    Text(String),
    /// Camera poses to pass, relative to the robot's base when the goal arrived (`base_link`: x forward,
    /// y left, z up; metres). At least one.
    Waypoints(Vec<Isometry3<f64>>),
}

/// A checked goal. Make one with [`Goal::text`], [`Goal::waypoints`] or [`Goal::from_json`].
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// Name that answers carry.
    pub id: String,
    /// What to go to.
    pub kind: GoalKind,
    /// Time allowed from arrival to answer; `None`: the configuration's default.
    pub deadline: Option<TimeDelta>,
    /// Oldest newest-frame allowed; `None`: the configuration's default.
    pub max_frame_age: Option<TimeDelta>,
    /// How many imaginations; `None`: the configuration's default.
    pub candidates: Option<u32>,
    /// Seed of the noise; `None`: the configuration's default.
    pub seed: Option<u64>,
}

/// Why a goal was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GoalError {
    /// Not JSON, an unknown key, or a wrong type.
    #[error(
        "goal is not the JSON that is wanted: {0}; known keys: text, waypoints, deadline_ms, candidates, seed, max_age_ms"
    )]
    Json(String),
    /// The document is too long.
    #[error("goal has {got} bytes; at most {MAX_JSON_BYTES} are read")]
    TooLarge {
        /// Length found.
        got: usize,
    },
    /// Neither or both of text and waypoints.
    #[error("goal must have exactly one of text and waypoints; it has {0}")]
    OneOf(&'static str),
    /// Nothing in it but white space.
    #[error("goal text is empty; say what to look for, for example \"find the red chair\"")]
    EmptyText,
    /// Too long.
    #[error("goal text has {got} characters; at most {MAX_TEXT_CHARS} are allowed")]
    LongText {
        /// Characters found.
        got: usize,
    },
    /// No waypoint.
    #[error("goal has no waypoints; give at least one")]
    NoWaypoints,
    /// Too many.
    #[error("goal has {got} waypoints; at most {MAX_WAYPOINTS} are allowed")]
    ManyWaypoints {
        /// Number found.
        got: usize,
    },
    /// NaN, or no unit quaternion, or a wrong number of numbers.
    #[error("waypoint {index}: {cause}")]
    BadWaypoint {
        /// Position in the list, from 0.
        index: usize,
        /// What is wrong.
        cause: String,
    },
    /// Beyond reach.
    #[error("waypoint {index} is {distance_m:.1} m away; at most {MAX_WAYPOINT_DISTANCE_M} m are allowed")]
    FarWaypoint {
        /// Position in the list, from 0.
        index: usize,
        /// Distance from the robot.
        distance_m: f64,
    },
    /// A number outside its range.
    #[error("goal {field} is {got}; wanted {want}")]
    Range {
        /// Which.
        field: &'static str,
        /// What it is.
        got: f64,
        /// What would be right.
        want: &'static str,
    },
}

/// A waypoint on the wire: `[x, y, yaw]`, `[x, y, z, roll, pitch, yaw]`, `[x, y, z, qx, qy, qz, qw]`, or an
/// object with `x`, `y` and optionally `z`, `roll`, `pitch`, `yaw`. Metres and radians.
#[derive(Deserialize)]
#[serde(untagged)]
enum WireWaypoint {
    List(Vec<f64>),
    Named(WireNamed),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireNamed {
    x: f64,
    y: f64,
    #[serde(default)]
    z: f64,
    #[serde(default)]
    roll: f64,
    #[serde(default)]
    pitch: f64,
    #[serde(default)]
    yaw: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireGoal {
    text: Option<String>,
    waypoints: Option<Vec<WireWaypoint>>,
    deadline_ms: Option<f64>,
    candidates: Option<u64>,
    seed: Option<u64>,
    max_age_ms: Option<f64>,
}

impl Goal {
    /// A goal by description.
    ///
    /// # Errors
    /// [`GoalError::EmptyText`], [`GoalError::LongText`].
    pub fn text(id: impl Into<String>, text: &str) -> Result<Self, GoalError> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Err(GoalError::EmptyText);
        }
        let got = trimmed.chars().count();
        if got > MAX_TEXT_CHARS {
            return Err(GoalError::LongText { got });
        }
        Ok(Self::of(id.into(), GoalKind::Text(trimmed.to_owned())))
    }

    /// A goal by poses in the robot's base frame.
    ///
    /// # Errors
    /// [`GoalError::NoWaypoints`], [`GoalError::ManyWaypoints`], [`GoalError::BadWaypoint`],
    /// [`GoalError::FarWaypoint`].
    pub fn waypoints(id: impl Into<String>, poses: Vec<Isometry3<f64>>) -> Result<Self, GoalError> {
        if poses.is_empty() {
            return Err(GoalError::NoWaypoints);
        }
        if poses.len() > MAX_WAYPOINTS {
            return Err(GoalError::ManyWaypoints { got: poses.len() });
        }
        for (index, pose) in poses.iter().enumerate() {
            let distance_m = pose.translation.vector.norm();
            let finite = distance_m.is_finite() && pose.rotation.coords.iter().all(|v| v.is_finite());
            if !finite {
                return Err(GoalError::BadWaypoint { index, cause: "a number is not finite".into() });
            }
            if distance_m > MAX_WAYPOINT_DISTANCE_M {
                return Err(GoalError::FarWaypoint { index, distance_m });
            }
        }
        Ok(Self::of(id.into(), GoalKind::Waypoints(poses)))
    }

    fn of(id: String, kind: GoalKind) -> Self {
        Self { id, kind, deadline: None, max_frame_age: None, candidates: None, seed: None }
    }

    /// Reads the JSON that queryables take:
    /// `{"text": "find the red chair", "deadline_ms": 5000, "candidates": 2, "seed": 7, "max_age_ms": 500}`,
    /// or `"waypoints": [[x, y, yaw], ...]` in place of the text (forms: three numbers; six with z, roll,
    /// pitch; seven with a quaternion; or objects `{"x": 1, "y": 0, "yaw": 0}`).
    ///
    /// # Errors
    /// [`GoalError`] names the field and the limit.
    pub fn from_json(id: impl Into<String>, json: &[u8]) -> Result<Self, GoalError> {
        if json.len() > MAX_JSON_BYTES {
            return Err(GoalError::TooLarge { got: json.len() });
        }
        let wire: WireGoal = serde_json::from_slice(json).map_err(|e| GoalError::Json(e.to_string()))?;
        let mut goal = match (wire.text, wire.waypoints) {
            (Some(text), None) => Self::text(id, &text)?,
            (None, Some(list)) => {
                if list.len() > MAX_WAYPOINTS {
                    return Err(GoalError::ManyWaypoints { got: list.len() });
                }
                let poses: Result<Vec<_>, _> =
                    list.iter().enumerate().map(|(index, w)| w.pose(index)).collect();
                Self::waypoints(id, poses?)?
            }
            (None, None) => return Err(GoalError::OneOf("neither")),
            (Some(_), Some(_)) => return Err(GoalError::OneOf("both")),
        };
        goal.deadline = span("deadline_ms", wire.deadline_ms)?;
        goal.max_frame_age = span("max_age_ms", wire.max_age_ms)?;
        goal.candidates = match wire.candidates {
            None => None,
            Some(n) if (1..=u64::from(MAX_CANDIDATES)).contains(&n) => Some(n as u32),
            Some(n) => {
                return Err(GoalError::Range { field: "candidates", got: n as f64, want: "1 to 64" });
            }
        };
        goal.seed = wire.seed;
        Ok(goal)
    }

    /// Reads the poses of a `nav_msgs/msg/Path` whose frame is the robot's base.
    ///
    /// # Errors
    /// As [`Goal::waypoints`].
    pub fn from_path(id: impl Into<String>, path: &crate::msg::Path) -> Result<Self, GoalError> {
        if path.poses.len() > MAX_WAYPOINTS {
            return Err(GoalError::ManyWaypoints { got: path.poses.len() });
        }
        let poses: Result<Vec<_>, _> = path
            .poses
            .iter()
            .enumerate()
            .map(|(index, p)| {
                p.pose.isometry().map_err(|e| GoalError::BadWaypoint { index, cause: e.to_string() })
            })
            .collect();
        Self::waypoints(id, poses?)
    }
}

fn span(field: &'static str, millis: Option<f64>) -> Result<Option<TimeDelta>, GoalError> {
    let Some(ms) = millis else { return Ok(None) };
    let max = MAX_SPAN.as_millis_f64();
    if !(ms > 0.0 && ms <= max) {
        return Err(GoalError::Range { field, got: ms, want: "more than 0 and at most 3600000" });
    }
    Ok(Some(TimeDelta::from_secs_f64(ms / 1e3)))
}

impl WireWaypoint {
    fn pose(&self, index: usize) -> Result<Isometry3<f64>, GoalError> {
        let euler = |x: f64, y: f64, z: f64, r: f64, p: f64, w: f64| {
            let all = [x, y, z, r, p, w];
            if let Some(bad) = all.iter().find(|v| !v.is_finite()) {
                return Err(GoalError::BadWaypoint { index, cause: format!("a number is {bad}") });
            }
            Ok(Isometry3::from_parts(
                nalgebra::Translation3::new(x, y, z),
                nalgebra::UnitQuaternion::from_euler_angles(r, p, w),
            ))
        };
        match self {
            Self::Named(n) => euler(n.x, n.y, n.z, n.roll, n.pitch, n.yaw),
            Self::List(v) => match v[..] {
                [x, y, yaw] => euler(x, y, 0.0, 0.0, 0.0, yaw),
                [x, y, z, r, p, w] => euler(x, y, z, r, p, w),
                [x, y, z, qx, qy, qz, qw] => isometry([x, y, z], [qx, qy, qz, qw])
                    .map_err(|e| GoalError::BadWaypoint { index, cause: e.to_string() }),
                _ => Err(GoalError::BadWaypoint {
                    index,
                    cause: format!("{} numbers; wanted 3, 6 or 7", v.len()),
                }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_goals() {
        let g = Goal::from_json(
            "a",
            br#"{"text":" find the red chair ","deadline_ms":5000,"candidates":2,"seed":7,"max_age_ms":500}"#,
        )
        .unwrap();
        assert_eq!(g.kind, GoalKind::Text("find the red chair".into()));
        assert_eq!(g.deadline, Some(TimeDelta::from_millis(5000)));
        assert_eq!(g.max_frame_age, Some(TimeDelta::from_millis(500)));
        assert_eq!((g.candidates, g.seed, g.id.as_str()), (Some(2), Some(7), "a"));
        let forms = r#"{"waypoints":[[1,0,0.5],[1,0,0,0,0,0.5],[1,0,0,0,0,0.24740395925452294,0.9689124217106447],{"x":1,"y":0,"yaw":0.5}]}"#;
        let g = Goal::from_json("b", forms.as_bytes()).unwrap();
        let GoalKind::Waypoints(poses) = g.kind else { panic!("waypoints wanted") };
        assert_eq!(poses.len(), 4);
        for p in &poses {
            assert!(p.rotation.angle_to(&poses[0].rotation) < 1e-9 && p.translation == poses[0].translation);
        }
    }

    #[test]
    fn refused_goals() {
        let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(1_001));
        let many = format!(r#"{{"waypoints":[{}]}}"#, vec!["[0,0,0]"; 1_001].join(","));
        let check = |json: &str, part: &str| {
            let error = Goal::from_json("g", json.as_bytes()).expect_err(json).to_string();
            assert!(error.contains(part), "{json}: {error}");
        };
        check("", "not the JSON");
        check("[]", "not the JSON");
        check("{}", "neither");
        check(r#"{"text":"a","waypoints":[]}"#, "both");
        check(r#"{"text":"  \n"}"#, "empty");
        check(&long, "1001 characters");
        check(&many, "1001 waypoints");
        check(r#"{"text":"a","colour":"red"}"#, "unknown field `colour`");
        check(r#"{"waypoints":[]}"#, "at least one");
        check(r#"{"waypoints":[[0,0,0],[1000,0,0]]}"#, "waypoint 1 is 1000.0 m away");
        check(r#"{"waypoints":[[1,2]]}"#, "2 numbers");
        check(r#"{"waypoints":[[1e999,0,0]]}"#, "not the JSON");
        check(r#"{"waypoints":[[NaN,0,0]]}"#, "not the JSON");
        check(r#"{"waypoints":[[1,0,0,0,0,0,0]]}"#, "norm is 0");
        check(r#"{"text":"a","deadline_ms":-5}"#, "deadline_ms is -5");
        check(r#"{"text":"a","max_age_ms":1e99}"#, "max_age_ms");
        check(r#"{"text":"a","candidates":0}"#, "candidates is 0");
        check(r#"{"text":"a","candidates":4000000000000}"#, "candidates");
        check(r#"{"text":"a","seed":-1}"#, "not the JSON");
        let nan = Isometry3::translation(f64::NAN, 0.0, 0.0);
        assert!(matches!(Goal::waypoints("g", vec![nan]), Err(GoalError::BadWaypoint { index: 0, .. })));
        let huge = vec![b' '; MAX_JSON_BYTES + 1];
        assert!(matches!(Goal::from_json("g", &huge), Err(GoalError::TooLarge { .. })));
    }
}
