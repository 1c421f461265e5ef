//! `mindseye replay`: a recorded bag instead of a robot. The same bag, seed and bundle give the same document, byte
//! for byte, except for `timings_ms` (and `profile_ms`).

use super::goal::in_words;
use super::progress::Progress;
use super::{ModelArgs, say};
use crate::config::RobotConfig;
use crate::ground::{Stage, ground};
use crate::imagine::{Clock, Flow};
use crate::node::MonotonicClock;
use crate::profile::Profile;
use crate::senses::{Sense, Senses};
use anyhow::{Context, bail};
use clap::Args;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::bag::{BagInfo, CdrConverter, OpenOptions, ReadOptions, TopicId, open};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::time::TimeDelta;
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye replay drive.mcap --goal \"find the red chair\"\n  \
                        mindseye replay drive.mcap --goal \"find the red chair\" --seed 3 --json --profile\n\n\
                        Reads MCAP, rosbag2 (sqlite3) and ROS 1 bags. Times apart, the document depends only on the \
                        bag, the bundle, the goal and the seed.")]
pub struct ReplayArgs {
    /// The bag: a file or a rosbag2 directory.
    bag: PathBuf,
    /// What to find at the end of the bag.
    #[arg(long, value_name = "TEXT")]
    goal: Option<String>,
    /// Ask this many seconds after the start of the bag instead of at its end.
    #[arg(long, value_name = "SECONDS")]
    at: Option<f64>,
    /// Seed of the noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many drives to imagine [default: the runtime's].
    #[arg(long, value_name = "N")]
    candidates: Option<u32>,
    /// Give up after so long, as a robot would; the document then depends on the machine's speed.
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<i64>,
    /// Robot configuration: topics, context, camera.
    #[arg(long, value_name = "TOML")]
    config: Option<PathBuf>,
    /// Print p50, p99 and maximum per stage.
    #[arg(long)]
    profile: bool,
    /// Write a picture of the imagined frames.
    #[arg(long, value_name = "PNG")]
    strip: Option<PathBuf>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Which topic is which: the configuration's names where the bag has them, else the only topic of a type.
fn topics(info: &BagInfo, config: &RobotConfig, progress: &mut Progress) -> HashMap<TopicId, Sense> {
    let t = &config.topics;
    let wanted = [
        (Sense::Image, &t.image, "sensor_msgs/Image"),
        (Sense::Compressed, &t.compressed, "sensor_msgs/CompressedImage"),
        (Sense::CameraInfo, &t.camera_info, "sensor_msgs/CameraInfo"),
        (Sense::Odometry, &t.odom, "nav_msgs/Odometry"),
        (Sense::Tf, &t.tf, "tf2_msgs/TFMessage"),
        (Sense::TfStatic, &t.tf_static, "tf2_msgs/TFMessage"),
    ];
    let mut found = HashMap::new();
    for (sense, name, type_name) in wanted {
        let of_type: Vec<usize> = (0..info.topics.len())
            .filter(|i| info.topics[*i].type_name.replace("/msg/", "/") == type_name)
            .collect();
        let named = of_type.iter().copied().find(|i| info.topics[*i].name == *name);
        let by_type = |only: &[usize]| match only {
            [one] if sense != Sense::Tf && sense != Sense::TfStatic => Some(*one),
            _ => None,
        };
        let Some(i) = named.or_else(|| by_type(&of_type)) else { continue };
        if named.is_none() {
            progress.line(&format!("{} instead of {name}", info.topics[i].name));
        }
        found.insert(TopicId(i as u32), sense);
    }
    // Pictures come once: the topic with more messages.
    let count = |sense: Sense, found: &HashMap<TopicId, Sense>| {
        found.iter().find(|(_, s)| **s == sense).map(|(id, _)| (*id, info.topic(*id).count))
    };
    if let (Some((raw, n)), Some((compressed, m))) =
        (count(Sense::Image, &found), count(Sense::Compressed, &found))
    {
        found.remove(if m > n { &raw } else { &compressed });
    }
    found
}

pub fn run(args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let config = match &args.config {
        Some(path) => RobotConfig::load(path)?,
        None => RobotConfig::default(),
    };
    let mut goal = match &args.goal {
        Some(text) => Some(Goal::text("replay", text)?),
        None => None,
    };
    if let Some(goal) = &mut goal {
        goal.seed = Some(args.seed);
        goal.candidates = args.candidates;
    }
    if args.at.is_some_and(|at| !at.is_finite() || at < 0.0) {
        bail!("--at must be a number of seconds, 0 or more");
    }
    let mut progress = Progress::new(args.json);
    let pipeline = args.model.load()?;
    let mut mind = pipeline.mind(args.seed)?;
    let mut senses =
        Senses::new(config.senses(mind.spec().frame_period), mind.spec().camera, pipeline.encoder()?);
    let bag = open(&args.bag, &OpenOptions::default()).with_context(|| args.bag.display().to_string())?;
    let info = bag.info().clone();
    let topics = topics(&info, &config, &mut progress);
    if !topics.values().any(|s| matches!(s, Sense::Image | Sense::Compressed)) {
        bail!(
            "{}: no camera topic {} or {} and no single topic of these types; name it in a --config",
            args.bag.display(),
            config.topics.image,
            config.topics.compressed
        );
    }

    let mut profile = Profile::default();
    let names = topics.keys().map(|id| info.topic(*id).name.clone()).collect();
    let end_ns = args.at.map(|at| info.start_ns.saturating_add((at * 1e9) as i64));
    let options = ReadOptions { topics: Some(names), end_ns, ..ReadOptions::default() };
    let mut converter = CdrConverter::new(&info);
    let total: u64 = topics.keys().map(|id| info.topic(*id).count).sum();
    let (mut taken, mut refused, mut segments) = (0u64, 0u64, Vec::new());
    for message in bag.messages(&options) {
        let Some(sense) = topics.get(&message.topic) else { continue };
        let result = match converter.convert(&message) {
            Ok(cdr) => senses.take(*sense, cdr, &MonotonicClock, &mut profile).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        taken += 1;
        match result {
            Ok(took) => segments.extend(took.segment.map(|s| s.to_string())),
            Err(error) => {
                if refused == 0 {
                    tracing::warn!(%error, "a message was left out");
                }
                refused += 1;
            }
        }
        if taken.is_multiple_of(64) || taken == total {
            progress.bar("read and encode", taken as usize, total as usize);
        }
    }
    let counts = senses.counts();
    progress.line(&format!(
        "{} frames, {} kept, {} latents in memory{}",
        counts.offered,
        counts.kept,
        senses.seen().latents(),
        if refused > 0 { format!(", {refused} messages left out") } else { String::new() },
    ));

    let answer = goal.as_ref().map(|goal| {
        let Some(scene) = senses.seen().scene() else {
            return Answer::new("replay", Status::Stale, Some("the bag holds no usable camera frame".into()));
        };
        if scene.memory.is_empty() {
            let reason = "not enough has been seen: the memory needs at least four kept frames";
            return Answer::new("replay", Status::Failed, Some(reason.into()));
        }
        let until = args.deadline_ms.map(|ms| MonotonicClock.now() + TimeDelta::from_millis(ms));
        let began = MonotonicClock.now();
        let mut show = |stage: Stage<'_>| {
            match stage {
                Stage::Scan(part, parts) => progress.bar("look through memory", part, parts),
                Stage::Step { candidate, candidates, step, steps } => {
                    progress.bar("imagine", candidate * steps + step, candidates * steps);
                }
                _ => {}
            }
            Flow::Continue
        };
        match ground(mind.as_mut(), &scene, goal, &MonotonicClock, until, &mut show) {
            Ok(mut grounded) => {
                for (stage, millis) in &grounded.answer.timings_ms {
                    profile.push(stage, *millis);
                }
                grounded.step_ms.iter().for_each(|millis| profile.push("denoise_step", *millis));
                let total = (MonotonicClock.now() - began).as_millis_f64();
                grounded.answer.timings_ms.insert("total".into(), total);
                if let (Some(path), Some(strip)) = (&args.strip, crate::node::strip(&grounded.frames))
                    && let Err(error) = strip.save_png(path)
                {
                    tracing::warn!(%error, path = %path.display(), "the picture was not written");
                }
                grounded.answer
            }
            Err(stopped) => Answer::new("replay", Status::Failed, Some(stopped.to_string())),
        }
    });

    if args.json {
        let mut document = serde_json::json!({
            "bag": args.bag.display().to_string(),
            "seed": args.seed,
            "goal": args.goal,
            "frames": counts,
            "latents": senses.seen().latents(),
            "segments": segments,
            "refused_messages": refused,
            "odometry": senses.pose().is_some(),
            "camera_info": senses.has_intrinsics(),
            "answer": answer,
        });
        if args.profile {
            document["profile_ms"] = serde_json::to_value(profile.summary())?;
        }
        say(&document.to_string())?;
    } else {
        match &answer {
            Some(answer) => say(&in_words(answer))?,
            None => say("no --goal given: the bag was read, nothing was asked")?,
        }
        if args.profile {
            say(profile.table().trim_end())?;
        }
    }
    let failed = answer.is_some_and(|a| a.status == Status::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
