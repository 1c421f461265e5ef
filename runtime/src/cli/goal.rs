//! `mindseye goal`: asks a running node.

use super::run::configure;
use super::say;
use crate::config::RobotConfig;
use anyhow::{Context, bail};
use clap::Args;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::ros::{RosError, RosSession};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye goal \"find the red chair\"\n  \
                        mindseye goal \"find the blue table\" --ask-only --json\n  \
                        mindseye goal \"find the green plant\" --wait\n  \
                        mindseye goal --waypoint 1,0,0 --waypoint 2,1,1.57\n  mindseye goal --cancel")]
pub struct GoalArgs {
    /// What to find.
    #[arg(required_unless_present_any = ["cancel", "waypoint"], conflicts_with_all = ["cancel", "waypoint"])]
    text: Option<String>,
    /// A camera pose to pass, relative to the robot: x,y,yaw in metres and radians; may be repeated.
    #[arg(long, value_name = "X,Y,YAW", allow_hyphen_values = true, conflicts_with = "cancel")]
    waypoint: Vec<String>,
    /// Stop the goal in work.
    #[arg(long)]
    cancel: bool,
    /// Only answer; do not publish /goal_pose.
    #[arg(long)]
    ask_only: bool,
    /// Come back when the robot stands at the goal, or will not get there. Needs [navigate] action in the runtime's
    /// configuration; without it nobody knows of arrivals, and the answer comes at once.
    #[arg(long, conflicts_with_all = ["cancel", "ask_only"])]
    wait: bool,
    /// Time allowed from the goal's arrival to the answer.
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<u64>,
    /// Oldest camera frame allowed.
    #[arg(long, value_name = "MS")]
    max_age_ms: Option<u64>,
    /// How many drives to imagine.
    #[arg(long, value_name = "N")]
    candidates: Option<u32>,
    /// Seed of the noise.
    #[arg(long)]
    seed: Option<u64>,
    /// Robot configuration: whom to ask, and where.
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    /// Name of the robot [default: the configuration's].
    #[arg(long)]
    robot: Option<String>,
    /// Endpoint to connect to instead of the configuration's; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    connect: Vec<String>,
    /// Print the answer as one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &GoalArgs) -> anyhow::Result<ExitCode> {
    let mut config = configure(args.config.as_ref(), &args.connect, &[])?;
    // A client needs no port of its own and must not take the robot's.
    config.ros.zenoh.listen = Some(vec![]);
    config.ros.node = "mindseye_goal".into();
    let robot = args.robot.clone().unwrap_or_else(|| config.robot.clone());
    let body = request(args)?;
    let text = ask(args, &config, &robot, &body)?;
    if args.cancel {
        say(if args.json { &text } else { "cancellation requested" })?;
        return Ok(ExitCode::SUCCESS);
    }
    let answer: Answer = match serde_json::from_str(&text) {
        Ok(answer) => answer,
        Err(error) => bail!("the answer is not what this version understands: {error}: {text}"),
    };
    let document: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let drive = document.get("drive").filter(|drive| drive.is_object());
    if args.json {
        say(&text)?;
    } else {
        say(&in_words(&answer))?;
        if let Some(drive) = drive {
            say(&drive_in_words(drive))?;
        } else if args.wait && answer.status == Status::Found {
            say(
                "  the runtime publishes /goal_pose and cannot know of arrivals ([navigate] action is not set)",
            )?;
        }
    }
    let arrived = drive.is_none_or(|d| !args.wait || d["state"] == "arrived");
    Ok(if answer.status == Status::Found && arrived { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The body of the query.
fn request(args: &GoalArgs) -> anyhow::Result<String> {
    let mut body = serde_json::Map::new();
    if let Some(text) = &args.text {
        body.insert("text".into(), text.clone().into());
    }
    if !args.waypoint.is_empty() {
        let waypoints: anyhow::Result<Vec<Vec<f64>>> = args.waypoint.iter().map(|w| numbers(w)).collect();
        body.insert("waypoints".into(), serde_json::json!(waypoints?));
    }
    let numbers = [
        ("deadline_ms", args.deadline_ms),
        ("max_age_ms", args.max_age_ms),
        ("candidates", args.candidates.map(u64::from)),
        ("seed", args.seed),
    ];
    body.extend(numbers.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.into()))));
    if args.wait {
        body.insert("wait".into(), true.into());
    }
    Ok(serde_json::Value::Object(body).to_string())
}

/// Asks the robot, and gives the text of its reply.
fn ask(args: &GoalArgs, config: &RobotConfig, robot: &str, body: &str) -> anyhow::Result<String> {
    let session = RosSession::open(&config.ros).context("cannot open the Zenoh session")?;
    let asked = if args.cancel {
        session.query_json(&format!("mindseye/{robot}/cancel"), "", Duration::from_secs(5))
    } else {
        let verb = if args.ask_only { "ground" } else { "navigate" };
        let mut wait = Duration::from_millis(args.deadline_ms.unwrap_or(60_000)) + Duration::from_secs(5);
        if args.wait {
            let longest = Duration::from_millis(config.navigate.longest_ms.unsigned_abs());
            wait += longest + Duration::from_secs(30);
        }
        session.query_json(&format!("mindseye/{robot}/{verb}"), body, wait)
    };
    let links = session.links();
    // The answer counts; a session that does not close cleanly changes nothing about it.
    let _ = session.close();
    if let Err(RosError::NoServer { waited, .. }) = &asked {
        let connect = config.ros.zenoh.connect.clone().unwrap_or_default().join(", ");
        let reached = match links {
            0 => format!("nobody is reached at [{connect}]; is the router, or mindseye run, there?"),
            _ => format!("{links} reached at [{connect}], but none serves this robot; is mindseye run up?"),
        };
        let waited = waited.as_secs_f64();
        bail!("robot {robot:?} does not answer: {reached} (looked for {waited:.1} s)");
    }
    asked.with_context(|| format!("robot {robot:?}"))
}

/// A drive for a person.
fn drive_in_words(drive: &serde_json::Value) -> String {
    let state = drive["state"].as_str().unwrap_or("unknown");
    let after = drive["elapsed_ms"].as_f64().filter(|ms| *ms > 0.0);
    let after = after.map(|ms| format!(" after {:.1} s", ms / 1e3)).unwrap_or_default();
    match drive["reason"].as_str() {
        Some(reason) => format!("  drive: {state}{after}: {reason}"),
        None => format!("  drive: {state}{after}"),
    }
}

fn numbers(waypoint: &str) -> anyhow::Result<Vec<f64>> {
    let numbers: Result<Vec<f64>, _> = waypoint.split(',').map(|n| n.trim().parse::<f64>()).collect();
    match numbers {
        Ok(n) if n.len() == 3 && n.iter().all(|v| v.is_finite()) => Ok(n),
        _ => bail!("waypoint {waypoint:?} is not X,Y,YAW: three finite numbers, metres and radians"),
    }
}

/// An answer for a person.
pub fn in_words(answer: &Answer) -> String {
    let mut text = answer.status.to_string();
    if let Some(pose) = &answer.pose {
        let sigma = answer.covariance.as_ref().and_then(|c| c.first()).map_or(0.0, |v| v.sqrt());
        text += &format!(
            ": stand at x {:.2} m, y {:.2} m, yaw {:.0}° in {:?} (± {sigma:.2} m)",
            pose.x,
            pose.y,
            pose.yaw.to_degrees(),
            pose.frame
        );
    }
    if let Some(consistency) = answer.consistency {
        text += &format!(", consistency {consistency:.2}");
    }
    if let Some(reason) = &answer.reason {
        text += &format!("\n  {reason}");
    }
    if !answer.eyes.is_empty() {
        text += &format!("\n  seen by {}", answer.eyes.join(", "));
    }
    if let Some(why) = &answer.fallback {
        text += &format!("\n  answered by the small model here: {why}");
    }
    if let Some(total) = answer.timings_ms.get("total") {
        text += &format!("\n  {total:.0} ms, {} steps, {} candidates", answer.steps, answer.candidates);
    }
    text
}
