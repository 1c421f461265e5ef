//! `mindseye bag info | play | verify | recover | convert`.

use super::progress::Progress;
use super::{say, stop_flag};
use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};
use mindseye_bridge::bag::play::{
    Control, PlayClock, PlayOptions, PlayReport, Player, PublishSink, TopicFilter, run as run_player,
};
use mindseye_bridge::bag::report::{image_json, info_json, verify_json};
use mindseye_bridge::bag::{
    self, Bag, BagInfo, Damage, ImageReport, OpenOptions, Order, ReadOptions, TopicId, TopicInfo,
};
use mindseye_bridge::msg::{Clock, RosType, type_hash};
use mindseye_bridge::ros::{
    Durability, History, KeyStyle, Qos, RawPublisher, Reliability, RosConfig, RosSession,
};
use serde_json::json;
use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bags up to this size are read through by `info`; larger ones are answered from their index.
const READ_THROUGH_BYTES: u64 = 64 << 20;

#[derive(Args)]
pub struct BagArgs {
    #[command(subcommand)]
    command: BagCommand,
}

#[derive(Subcommand)]
enum BagCommand {
    /// What a bag holds.
    Info(InfoArgs),
    /// Publishes a bag over Zenoh, as `ros2 bag play` does.
    Play(Box<PlayArgs>),
    /// Reads everything: digests per topic, damage, decoded images.
    Verify(VerifyArgs),
    /// Saves what a damaged bag still holds as a clean MCAP file.
    Recover(RewriteArgs),
    /// Rewrites a bag of any format as MCAP with ROS 2 messages.
    Convert(RewriteArgs),
}

#[derive(Args)]
#[command(after_help = "Examples:\n  mindseye bag info drive.bag\n  mindseye bag info recording/ --json")]
struct InfoArgs {
    /// File, or directory with metadata.yaml.
    path: PathBuf,
    /// Answer from the index; do not read small bags through.
    #[arg(long)]
    quick: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  mindseye bag verify drive.mcap\n  mindseye bag verify recording/ --images --json"
)]
struct VerifyArgs {
    /// File, or directory with metadata.yaml.
    path: PathBuf,
    /// Decode every image, with a digest of its pixels.
    #[arg(long)]
    images: bool,
    /// Exit status 1 when anything is damaged.
    #[arg(long)]
    strict: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  mindseye bag convert drive.bag drive.mcap\n  mindseye bag recover broken.db3 saved.mcap"
)]
struct RewriteArgs {
    /// File, or directory with metadata.yaml.
    input: PathBuf,
    /// File to write [default: the input's name with .mcap, for recover _recovered.mcap].
    output: Option<PathBuf>,
    /// Topics to keep [default: all].
    #[arg(long, num_args = 1.., value_name = "TOPIC")]
    topics: Vec<String>,
    /// Write over a file that exists.
    #[arg(long)]
    force: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum OrderArg {
    /// When the recorder received them.
    Received,
    /// When they were sent.
    Sent,
    /// By header.stamp.
    Header,
}

#[derive(Clone, Copy, ValueEnum)]
enum StyleArg {
    /// Keys of rmw_zenoh.
    RmwZenoh,
    /// Keys of zenoh-bridge-ros2dds.
    Ros2dds,
    /// The topic is the key.
    Raw,
}

#[derive(Args)]
#[command(
    after_help = "Keys: space pause and go on, right arrow next message while paused, up and down arrow rate.\n\n\
                        Examples:\n  mindseye bag play drive.mcap --rate 2 --loop\n  \
                        mindseye bag play drive.bag --topics /camera/image_raw/compressed /odom --start-offset 5\n  \
                        mindseye bag play recording/ --remap /odom:=/odometry --clock 100\n  \
                        mindseye bag play drive.mcap --rate 0 --connect tcp/robot.local:7447"
)]
struct PlayArgs {
    /// File, or directory with metadata.yaml.
    path: PathBuf,
    /// Speed; 0: as fast as the consumer takes the messages, losing none.
    #[arg(short, long, default_value_t = 1.0)]
    rate: f64,
    /// Start again at the end.
    #[arg(short, long = "loop")]
    looping: bool,
    /// Start this many seconds into the bag.
    #[arg(long, default_value_t = 0.0, value_name = "S")]
    start_offset: f64,
    /// Play this many seconds of the bag.
    #[arg(long, alias = "duration", value_name = "S")]
    playback_duration: Option<f64>,
    /// Play until this time of the bag, in seconds since the Unix epoch.
    #[arg(long, value_name = "S", conflicts_with = "playback_duration")]
    playback_until_sec: Option<f64>,
    /// Wait this many seconds before the first message.
    #[arg(short, long, default_value_t = 0.0, value_name = "S")]
    delay: f64,
    /// Topics to play [default: all].
    #[arg(long, num_args = 1.., value_name = "TOPIC")]
    topics: Vec<String>,
    /// Topics to leave out.
    #[arg(long, alias = "exclude", num_args = 1.., value_name = "TOPIC")]
    exclude_topics: Vec<String>,
    /// Play topics whose name matches.
    #[arg(short = 'e', long, value_name = "REGEX")]
    regex: Option<String>,
    /// Leave out topics whose name matches.
    #[arg(short = 'x', long, value_name = "REGEX")]
    exclude_regex: Option<String>,
    /// Publish under another name: old:=new.
    #[arg(short = 'm', long, num_args = 1.., value_name = "OLD:=NEW")]
    remap: Vec<String>,
    /// Publish the bag's time on /clock so many times a second.
    #[arg(long, num_args = 0..=1, default_missing_value = "40", value_name = "HZ")]
    clock: Option<f64>,
    /// Publish the bag's time on /clock before each message of these topics.
    #[arg(long, num_args = 1.., value_name = "TOPIC")]
    clock_topics: Vec<String>,
    /// As --clock-topics, for every topic.
    #[arg(long)]
    clock_topics_all: bool,
    /// Start paused.
    #[arg(short = 'p', long)]
    start_paused: bool,
    /// Messages that are read before they are due.
    #[arg(long, alias = "read-ahead", default_value_t = 1000, value_name = "N")]
    read_ahead_queue_size: usize,
    /// Which stamp times the messages.
    #[arg(long, value_enum, default_value = "received")]
    message_order: OrderArg,
    /// No keys, even on a terminal.
    #[arg(long)]
    disable_keyboard_controls: bool,
    /// Wait up to this many seconds for a subscriber [default: 10 with --rate 0, otherwise 0].
    #[arg(long, value_name = "S")]
    wait_for_subscribers: Option<f64>,
    /// How topics become keys.
    #[arg(long, value_enum, default_value = "rmw-zenoh")]
    key_style: StyleArg,
    /// ROS domain [default: ROS_DOMAIN_ID, or 0].
    #[arg(long, value_name = "N")]
    domain: Option<u32>,
    /// Endpoint to connect to instead of the router of this machine; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    connect: Vec<String>,
    /// Endpoint to listen on; may be repeated.
    #[arg(long, value_name = "ENDPOINT")]
    listen: Vec<String>,
    /// Print one JSON document at the end.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &BagArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        BagCommand::Info(args) => info(args),
        BagCommand::Verify(args) => verify(args),
        BagCommand::Recover(args) => rewrite(args, true),
        BagCommand::Convert(args) => rewrite(args, false),
        BagCommand::Play(args) => play(args),
    }
}

fn open(path: &Path) -> anyhow::Result<Bag> {
    Ok(bag::open(path, &OpenOptions::default())?)
}

fn seconds(ns: i64) -> f64 {
    ns as f64 * 1e-9
}

fn say_damage(damage: &[Damage]) -> anyhow::Result<()> {
    damage.iter().try_for_each(|d| say(&format!("damage: {d}")))
}

fn print_info(info: &BagInfo, counts: &[u64], (messages, start, end): (u64, i64, i64)) -> anyhow::Result<()> {
    let mode = match info.compression_mode.as_str() {
        "" => String::new(),
        mode => format!(" ({mode})"),
    };
    say(&format!("format:      {}, compression {}{mode}", info.format, info.compression))?;
    say(&format!("files:       {}", info.files.len()))?;
    say(&format!("messages:    {messages}"))?;
    say(&format!("start:       {:.9} s", seconds(start)))?;
    say(&format!("duration:    {:.3} s", seconds(end.saturating_sub(start))))?;
    say("topics:")?;
    let width = info.topics.iter().map(|t| t.name.len()).max().unwrap_or(0);
    for (topic, count) in info.topics.iter().zip(counts) {
        say(&format!("  {:<width$}  {count:>8}  {}", topic.name, topic.type_name))?;
    }
    Ok(())
}

fn info(args: &InfoArgs) -> anyhow::Result<ExitCode> {
    let bag = open(&args.path)?;
    let info = bag.info();
    let bytes: u64 = info.files.iter().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
    let read = (!args.quick && bytes <= READ_THROUGH_BYTES)
        .then(|| bag::verify(&bag, &ReadOptions::default(), None, &mut |_| {}));
    if args.json {
        say(&info_json(&bag, read.as_ref()).to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let counts: Vec<u64> = match &read {
        Some(read) => read.topics.iter().map(|t| t.count).collect(),
        None => info.topics.iter().map(|t| t.count).collect(),
    };
    let span = match &read {
        Some(read) => (read.messages, read.start_ns, read.end_ns),
        None => (info.messages, info.start_ns, info.end_ns),
    };
    print_info(info, &counts, span)?;
    say_damage(read.as_ref().map_or(&info.damage, |r| &r.damage))?;
    Ok(ExitCode::SUCCESS)
}

fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let bag = open(&args.path)?;
    let info = bag.info();
    let total = usize::try_from(info.messages).unwrap_or(usize::MAX);
    let mut progress = Progress::new(!std::io::stderr().is_terminal());
    let mut images: Vec<ImageReport> = Vec::new();
    let mut failed = None;
    let mut on_image = |image: ImageReport| {
        if args.json {
            images.push(image);
        } else if let Err(e) = say(&image_json(&image).to_string()) {
            failed.get_or_insert(e);
        }
    };
    let on_image: Option<&mut dyn FnMut(ImageReport)> = if args.images { Some(&mut on_image) } else { None };
    let read = bag::verify(&bag, &ReadOptions::default(), on_image, &mut |done| {
        if done % 512 == 0 {
            progress.bar("reading", done as usize, total);
        }
    });
    drop(progress);
    if let Some(e) = failed {
        return Err(e);
    }
    if args.json {
        let document = verify_json(&bag, &read, None);
        let mut out = std::io::stdout().lock();
        let text = document.to_string();
        if args.images {
            // One line per image inside the one document.
            let head = text.strip_suffix('}').unwrap_or(&text);
            writeln!(out, "{head},\"images\":[").context("stdout")?;
            for (at, image) in images.iter().enumerate() {
                let comma = if at + 1 < images.len() { "," } else { "" };
                writeln!(out, "{}{comma}", image_json(image)).context("stdout")?;
            }
            writeln!(out, "]}}").context("stdout")?;
        } else {
            writeln!(out, "{text}").context("stdout")?;
        }
    } else {
        let counts: Vec<u64> = read.topics.iter().map(|t| t.count).collect();
        print_info(info, &counts, (read.messages, read.start_ns, read.end_ns))?;
        say("sha256 of the CDR:")?;
        for (topic, report) in info.topics.iter().zip(&read.topics) {
            say(&format!("  {}  {}", report.sha256, topic.name))?;
            if let Some(first) = &report.first_misfit {
                say(&format!("  {} messages do not fit their type: {first}", report.misfits))?;
            }
        }
        say_damage(&read.damage)?;
    }
    let bad = !read.damage.is_empty() || read.topics.iter().any(|t| t.misfits > 0);
    Ok(if bad && args.strict { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn rewrite(args: &RewriteArgs, recover: bool) -> anyhow::Result<ExitCode> {
    let bag = open(&args.input)?;
    let output = match &args.output {
        Some(output) => output.clone(),
        None => {
            let stem =
                args.input.file_stem().unwrap_or(args.input.as_os_str()).to_string_lossy().into_owned();
            let ending = if recover { "_recovered.mcap" } else { ".mcap" };
            args.input.with_file_name(format!("{stem}{ending}"))
        }
    };
    if output.exists() && !args.force {
        bail!("{}: the file exists; name another one or pass --force", output.display());
    }
    let topics = (!args.topics.is_empty()).then(|| args.topics.clone());
    let options = ReadOptions { topics, ..ReadOptions::default() };
    let total = usize::try_from(bag.info().messages).unwrap_or(usize::MAX);
    let mut progress = Progress::new(!std::io::stderr().is_terminal());
    let stop = stop_flag()?;
    let report = bag::rewrite_as_mcap(&bag, &output, &options, &mut |done| {
        if done % 512 == 0 {
            progress.bar("writing", done as usize, total);
        }
        !stop.load(Ordering::Relaxed)
    })?;
    drop(progress);
    if args.json {
        let damage: Vec<_> = report.damage.iter().map(ToString::to_string).collect();
        let document = json!({
            "output": output.display().to_string(),
            "messages": report.messages,
            "stopped": report.stopped,
            "lost": damage,
        });
        say(&document.to_string())?;
    } else {
        say(&format!("{}: {} messages", output.display(), report.messages))?;
        say_damage(&report.damage)?;
    }
    if report.stopped {
        bail!("stopped: {} holds the first {} messages", output.display(), report.messages);
    }
    Ok(ExitCode::SUCCESS)
}

/// Publishes over Zenoh.
struct ZenohSink {
    publishers: HashMap<TopicId, RawPublisher>,
    clock: Option<RawPublisher>,
}

impl PublishSink for ZenohSink {
    fn publish(&mut self, topic: TopicId, cdr: &[u8], _must_take: bool) -> Result<bool, String> {
        // Publishers that must lose nothing are declared so that a full queue blocks.
        match self.publishers.get(&topic) {
            Some(publisher) => publisher.publish(cdr.to_vec()).map(|_| true).map_err(|e| e.to_string()),
            None => Ok(false),
        }
    }

    fn clock(&mut self, time_ns: i64) -> Result<(), String> {
        let Some(publisher) = &self.clock else { return Ok(()) };
        let (sec, nanosec) = (time_ns.div_euclid(1_000_000_000), time_ns.rem_euclid(1_000_000_000));
        let mut cdr = vec![0, 1, 0, 0];
        cdr.extend((sec as i32).to_le_bytes());
        cdr.extend((nanosec as u32).to_le_bytes());
        publisher.publish(cdr).map(drop).map_err(|e| e.to_string())
    }
}

/// The quality of service that the recorded publisher offered. With `all`, nothing may be lost.
fn qos_of(topic: &TopicInfo, all: bool) -> Qos {
    let value = |name: &str| {
        let mut lines = topic.offered_qos.lines().map(|l| l.trim_start_matches(['-', ' ']));
        lines.find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(|v| v.trim().to_owned())
    };
    let best_effort = value("reliability").is_some_and(|v| v == "2" || v == "best_effort");
    let depth =
        value("depth").and_then(|d| d.parse().ok()).filter(|d| (1..=10_000).contains(d)).unwrap_or(10);
    let keeps = topic.latched || topic.name.ends_with("tf_static");
    Qos {
        reliability: if best_effort && !all { Reliability::BestEffort } else { Reliability::Reliable },
        durability: if keeps { Durability::TransientLocal } else { Durability::Volatile },
        history: if all && !keeps { History::KeepAll } else { History::KeepLast(depth) },
    }
}

/// Wall time, the stop flag and, on a terminal, the keys.
struct RealClock {
    start: Instant,
    keys: bool,
    stop: Arc<AtomicBool>,
}

impl RealClock {
    fn key(&self) -> Option<Control> {
        if !self.keys || !crossterm::event::poll(Duration::ZERO).unwrap_or(false) {
            return None;
        }
        let Ok(Event::Key(key)) = crossterm::event::read() else { return None };
        if key.kind == KeyEventKind::Release {
            return None;
        }
        match key.code {
            KeyCode::Char(' ') => Some(Control::TogglePause),
            KeyCode::Right => Some(Control::Next),
            KeyCode::Up => Some(Control::Faster(1.1)),
            KeyCode::Down => Some(Control::Faster(1.0 / 1.1)),
            KeyCode::Char('q') => Some(Control::Stop),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Control::Stop),
            _ => None,
        }
    }
}

impl PlayClock for RealClock {
    fn now(&mut self) -> i64 {
        i64::try_from(self.start.elapsed().as_nanos()).unwrap_or(i64::MAX)
    }

    fn wait(&mut self, until: Option<i64>) -> Option<Control> {
        loop {
            if let Some(control) = self.poll() {
                return Some(control);
            }
            let left = until.map_or(i64::MAX, |until| until - self.now());
            if left <= 0 {
                return None;
            }
            // Keys and Ctrl-C are looked at 50 times a second.
            std::thread::sleep(Duration::from_nanos(left.unsigned_abs().min(20_000_000)));
        }
    }

    fn poll(&mut self) -> Option<Control> {
        if self.stop.load(Ordering::Relaxed) {
            return Some(Control::Stop);
        }
        self.key()
    }
}

/// Single keys instead of lines, until it is dropped.
struct RawTerminal;

impl RawTerminal {
    fn enter(wanted: bool) -> Option<Self> {
        (wanted && crossterm::terminal::enable_raw_mode().is_ok()).then_some(Self)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = crossterm::terminal::disable_raw_mode();
    }
}

fn nanos(seconds: f64, name: &str) -> anyhow::Result<i64> {
    if !(0.0..=9.0e9).contains(&seconds) {
        bail!("{name} {seconds}: give a number of seconds that is not negative");
    }
    Ok((seconds * 1e9) as i64)
}

fn remapped(name: &str, remap: &[String]) -> anyhow::Result<String> {
    for rule in remap {
        let Some((old, new)) = rule.split_once(":=") else {
            bail!("--remap {rule}: give old:=new");
        };
        if old.trim_start_matches('/') == name.trim_start_matches('/') {
            return Ok(new.to_owned());
        }
    }
    Ok(name.to_owned())
}

fn play_session(args: &PlayArgs) -> anyhow::Result<RosSession> {
    let mut config = RosConfig::robot("mindseye_bag_play").with_env(|name| std::env::var(name).ok())?;
    if let Some(domain) = args.domain {
        config.domain_id = domain;
    }
    if !args.connect.is_empty() {
        config.zenoh.connect = Some(args.connect.clone());
    }
    if !args.listen.is_empty() {
        config.zenoh.listen = Some(args.listen.clone());
    }
    config.key_style = match args.key_style {
        StyleArg::RmwZenoh => KeyStyle::RmwZenoh,
        StyleArg::Ros2dds => KeyStyle::Ros2Dds,
        StyleArg::Raw => KeyStyle::Raw,
    };
    Ok(RosSession::open(&config)?)
}

fn play(args: &PlayArgs) -> anyhow::Result<ExitCode> {
    if !(args.rate >= 0.0 && args.rate.is_finite()) {
        bail!("--rate {}: give 0 or a positive number", args.rate);
    }
    if args.clock.is_some_and(|hz| !(hz > 0.0 && hz <= 1e6)) {
        bail!("--clock: give a positive number of ticks per second");
    }
    let bag = open(&args.path)?;
    let info = bag.info();
    let filter = TopicFilter::new(
        args.topics.clone(),
        args.regex.as_deref(),
        args.exclude_topics.clone(),
        args.exclude_regex.as_deref(),
    )
    .map_err(anyhow::Error::msg)?;
    let topics = filter.apply(info);
    if topics.is_empty() {
        bail!("{}: no topic is left to play; see `mindseye bag info`", args.path.display());
    }
    let start_offset_ns = nanos(args.start_offset, "--start-offset")?;
    let duration_ns = match (args.playback_duration, args.playback_until_sec) {
        (Some(s), _) => Some(nanos(s, "--playback-duration")?),
        (None, Some(s)) => {
            Some(nanos(s, "--playback-until-sec")?.saturating_sub(info.start_ns + start_offset_ns).max(0))
        }
        (None, None) => None,
    };
    let clock_topics: Vec<String> =
        if args.clock_topics_all { topics.clone() } else { args.clock_topics.clone() };
    let ticks = args.clock.is_some() || !clock_topics.is_empty();

    let session = play_session(args)?;
    let mut publishers = HashMap::new();
    for (at, topic) in info.topics.iter().enumerate() {
        if !topics.contains(&topic.name) || topic.type_name.is_empty() {
            continue;
        }
        let hash = topic.type_hash.as_deref().or_else(|| type_hash(&topic.type_name));
        // Keys of types without a known hash are those of Humble.
        let hash = hash.unwrap_or("TypeHashNotSupported");
        let name = remapped(&topic.name, &args.remap)?;
        let name = if name.starts_with('/') { name } else { format!("/{name}") };
        let publisher =
            session.raw_publisher(&name, &topic.type_name, hash, &qos_of(topic, args.rate == 0.0));
        match publisher {
            Ok(publisher) => drop(publishers.insert(TopicId(at as u32), publisher)),
            Err(e) => tracing::warn!("{} is not played: {e}", topic.name),
        }
    }
    let clock = if ticks {
        Some(session.raw_publisher("/clock", Clock::NAME, Clock::HASH, &Qos::default())?)
    } else {
        None
    };
    let stop = stop_flag()?;
    let wait = args.wait_for_subscribers.unwrap_or(if args.rate == 0.0 { 10.0 } else { 0.0 });
    let until = Instant::now() + Duration::from_nanos(nanos(wait, "--wait-for-subscribers")?.unsigned_abs());
    while !publishers.values().any(RawPublisher::has_subscribers) {
        if Instant::now() >= until || stop.load(Ordering::Relaxed) {
            if args.rate == 0.0 {
                bail!("nobody listens to the topics of {}: start the consumer first", args.path.display());
            }
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }

    let options = PlayOptions {
        rate: args.rate,
        looping: args.looping,
        start_offset_ns,
        duration_ns,
        delay_ns: nanos(args.delay, "--delay")?,
        topics: Some(topics),
        clock_hz: args.clock,
        clock_topics,
        start_paused: args.start_paused,
        read_ahead: args.read_ahead_queue_size,
        order: match args.message_order {
            OrderArg::Received => Order::LogTime,
            OrderArg::Sent => Order::PublishTime,
            OrderArg::Header => Order::HeaderTime,
        },
    };
    let keys = !args.disable_keyboard_controls && std::io::stdin().is_terminal();
    let terminal = RawTerminal::enter(keys);
    let mut clock_and_keys = RealClock { start: Instant::now(), keys: terminal.is_some(), stop };
    let mut sink = ZenohSink { publishers, clock };
    let mut player = Player::new(&bag, options, 0);
    let played = run_player(&mut player, &mut sink, &mut clock_and_keys);
    drop(terminal);
    let report = played.map_err(anyhow::Error::msg)?;
    // What was handed to Zenoh last is still on its way.
    std::thread::sleep(Duration::from_millis(200));
    session.close()?;
    print_play(args, &report)?;
    Ok(ExitCode::SUCCESS)
}

fn print_play(args: &PlayArgs, report: &PlayReport) -> anyhow::Result<()> {
    let total: u64 = report.published.values().sum();
    let late_max_ms = report.late_max.as_secs_f64() * 1e3;
    if args.json {
        let damage: Vec<_> = report.damage.iter().map(ToString::to_string).collect();
        let document = json!({
            "published": report.published,
            "messages": total,
            "dropped": report.dropped,
            "unplayable": report.unplayable,
            "late": report.late,
            "late_max_ms": late_max_ms,
            "loops": report.loops,
            "lost": damage,
        });
        return say(&document.to_string());
    }
    say(&format!("{total} messages published, {} dropped", report.dropped))?;
    if report.late > 0 {
        say(&format!("{} messages were more than 100 ms late, at most {late_max_ms:.0} ms", report.late))?;
    }
    if let Some(first) = &report.first_unplayable {
        say(&format!("{} messages cannot be played: {first}", report.unplayable))?;
    }
    say_damage(&report.damage)
}
