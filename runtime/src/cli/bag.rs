//! `mindseye bag info | play | verify | recover | convert`.

use super::progress::ProgressBar;
use super::{say, stop_flag};
use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};
use mindseye_bridge::bag::play::{
    Control, PlayClock, PlayOptions, PlayReport, PlayState, Player, PublishSink, SinkError, TopicFilter,
    run as run_player, unknown_topics,
};
use mindseye_bridge::bag::report::{image_json, info_json, utc, verify_json};
use mindseye_bridge::bag::{
    self, Bag, BagInfo, CdrConverter, ConvertReport, Damage, HashBasis, ImageReport, OpenOptions, Order,
    PublisherSlots, QosProfile, ReadOptions, TopicId, TopicInfo, TypeKey, VerifyReport,
};
use mindseye_bridge::msg::{Clock, RosType};
use mindseye_bridge::ros::{
    Durability, History, KeyStyle, Qos, RawPublisher, Reliability, RosConfig, RosError, RosSession,
};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
#[command(
    after_help = "Exit status: 0 when the bag could be opened, also when it is damaged; 1 otherwise.\n\n\
                        Examples:\n  mindseye bag info drive.bag\n  mindseye bag info recording/ --json"
)]
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
    after_help = "Exit status: 0 when everything can be read; 1 when anything is damaged, when messages do not fit their \
                  type, or when the bag cannot be opened.\n\n\
                  Examples:\n  mindseye bag verify drive.mcap\n  mindseye bag verify recording/ --images --json"
)]
struct VerifyArgs {
    /// File, or directory with metadata.yaml.
    path: PathBuf,
    /// Decode every image, with a digest of its pixels.
    #[arg(long)]
    images: bool,
    /// Kept for scripts: damage always gives exit status 1.
    #[arg(long, hide = true)]
    strict: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[command(
    after_help = "ROS messages are written as CDR with their definitions. Attachments, metadata and everything that is not \
                  understood are kept byte for byte, and named.\n\n\
                  Exit status: 0 when the file is written (what is lost is named); 1 when nothing is written, when no \
                  message of those that the bag holds could be kept, or when it was interrupted.\n\n\
                  Examples:\n  mindseye bag convert drive.bag drive.mcap\n  \
                  mindseye bag convert drive.mcap short.mcap --topics /odom /camera/image_raw/compressed\n  \
                  mindseye bag recover broken.db3 saved.mcap"
)]
struct RewriteArgs {
    /// File, or directory with metadata.yaml.
    input: PathBuf,
    /// File to write [default: the input's name with .mcap, for recover _recovered.mcap].
    output: Option<PathBuf>,
    #[command(flatten)]
    filter: FilterArgs,
    /// Write over a file that exists.
    #[arg(long)]
    force: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Which topics; names count with or without the slash in front.
#[derive(Args)]
struct FilterArgs {
    /// Topics to take [default: all].
    #[arg(long, num_args = 1.., value_name = "TOPIC")]
    topics: Vec<String>,
    /// Topics to leave out.
    #[arg(long, alias = "exclude", num_args = 1.., value_name = "TOPIC")]
    exclude_topics: Vec<String>,
    /// Take topics whose name matches.
    #[arg(short = 'e', long, value_name = "REGEX")]
    regex: Option<String>,
    /// Leave out topics whose name matches.
    #[arg(short = 'x', long, value_name = "REGEX")]
    exclude_regex: Option<String>,
}

impl FilterArgs {
    /// The topics that are chosen. Names that the bag does not have are named on stderr; a choice of none is refused.
    fn choose(&self, info: &BagInfo, path: &Path) -> anyhow::Result<Vec<String>> {
        let filter = TopicFilter::new(
            self.topics.clone(),
            self.regex.as_deref(),
            self.exclude_topics.clone(),
            self.exclude_regex.as_deref(),
        )?;
        let unknown = filter.unknown(info);
        let chosen = filter.apply(info);
        let known: Vec<&str> = info.topics.iter().map(|t| t.name.as_str()).collect();
        // A bag without topics may still hold attachments.
        if chosen.is_empty() && !(info.topics.is_empty() && unknown.is_empty()) {
            let which = if unknown.is_empty() { String::new() } else { format!(" {}", unknown.join(", ")) };
            bail!("{}: no topic is chosen{which}; it has {}", path.display(), known.join(", "));
        }
        for name in unknown {
            tracing::warn!("{}: there is no topic {name}; it has {}", path.display(), known.join(", "));
        }
        Ok(chosen)
    }
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
    after_help = "Keys: space pauses and goes on, right arrow sends the next message while paused, up and down arrow \
                        change the rate, q or Ctrl-C ends.\n\n\
                        Each topic is published under the type hash of the layout that was recorded. Latched topics \
                        (/tf_static, transient local) get one publisher for each of those that were recorded, so that \
                        a late subscriber gets what all of them kept.\n\n\
                        Exit status: 0 at the end, and after Ctrl-C or SIGTERM, which end within a second with the \
                        report; 1 when nothing could be played.\n\n\
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
    #[command(flatten)]
    filter: FilterArgs,
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

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn bytes_of(info: &BagInfo) -> u64 {
    info.files.iter().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum()
}

/// Encoding of the messages and language of their definition.
fn encoding_of(topic: &TopicInfo) -> String {
    match topic.schema.as_ref().map(|s| s.encoding.as_str()).filter(|e| !e.is_empty()) {
        Some(definition) => format!("{} ({definition})", topic.encoding.name()),
        None => format!("{} (no definition)", topic.encoding.name()),
    }
}

/// What the publishers of a topic offered; equal ones counted.
fn qos_text(topic: &TopicInfo) -> String {
    let mut counted: Vec<(QosProfile, usize)> = Vec::new();
    for profile in topic.qos_profiles() {
        match counted.iter_mut().find(|(known, _)| *known == profile) {
            Some((_, count)) => *count += 1,
            None => counted.push((profile, 1)),
        }
    }
    let one = |(profile, count): &(QosProfile, usize)| match count {
        1 => profile.to_string(),
        count => format!("{count} x {profile}"),
    };
    match counted.is_empty() {
        true if topic.latched => "latched".to_owned(),
        true => String::new(),
        false => counted.iter().map(one).collect::<Vec<_>>().join("; "),
    }
}

fn print_topics(info: &BagInfo, counts: &[u64]) -> anyhow::Result<()> {
    say("topics:")?;
    let width = |of: &dyn Fn(&TopicInfo) -> usize| info.topics.iter().map(of).max().unwrap_or(0);
    let (names, types) = (width(&|t| t.name.len()), width(&|t| t.type_name.len()));
    let encodings = width(&|t| encoding_of(t).len());
    for (topic, count) in info.topics.iter().zip(counts) {
        let (encoding, qos) = (encoding_of(topic), qos_text(topic));
        let line = format!(
            "  {:<names$}  {count:>8}  {:<types$}  {encoding:<encodings$}  {qos}",
            topic.name, topic.type_name
        );
        say(line.trim_end())?;
    }
    Ok(())
}

/// Prints what a bag holds: by its index, or, where it was read through, as it was read.
fn print_info(bag: &Bag, read: Option<&VerifyReport>) -> anyhow::Result<()> {
    let info = bag.info();
    let mode = match info.compression_mode.as_str() {
        "" => String::new(),
        mode => format!(" ({mode})"),
    };
    let profile = if info.profile.is_empty() { String::new() } else { format!(", profile {}", info.profile) };
    let (messages, start, end) = match read {
        Some(read) => (read.messages, read.start_ns, read.end_ns),
        None => (info.messages, info.start_ns, info.end_ns),
    };
    let bytes = bytes_of(info);
    say(&format!("format:      {}{profile}, compression {}{mode}", info.format, info.compression))?;
    say(&format!("files:       {}, {} ({bytes} bytes)", info.files.len(), size(bytes)))?;
    say(&format!("messages:    {messages}"))?;
    // A float has not enough digits for nanoseconds since 1970.
    let exact = |ns: i64| format!("{}.{:09} s", ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    say(&format!("start:       {}, {}", exact(start), utc(start)))?;
    say(&format!("end:         {}, {}", exact(end), utc(end)))?;
    say(&format!("duration:    {:.3} s", seconds(end.saturating_sub(start))))?;
    if let Some(unstamped) = read.map(|r| r.unstamped).filter(|n| *n > 0) {
        let first = bag.first_stamp_ns();
        say(&format!("no log time: {unstamped} messages; the others start at {}", utc(first)))?;
    }
    let counts: Vec<u64> = match read {
        Some(read) => read.topics.iter().map(|t| t.count).collect(),
        None => info.topics.iter().map(|t| t.count).collect(),
    };
    print_topics(info, &counts)?;
    if !info.attachments.is_empty() {
        say("attachments:")?;
    }
    for a in &info.attachments {
        let date = if a.log_time_ns == 0 {
            String::new()
        } else {
            utc(i64::try_from(a.log_time_ns).unwrap_or(i64::MAX))
        };
        let line = format!("  {}  {}  {}  {date}", a.name, size(a.bytes), a.media_type);
        say(line.trim_end())?;
    }
    if !info.metadata.is_empty() {
        say("metadata:")?;
    }
    for record in &info.metadata {
        let entries: Vec<String> = record.entries.iter().map(|(k, v)| format!("{k}={v}")).collect();
        say(&format!("  {}: {}", record.name, entries.join(", ")))?;
    }
    if !info.private.is_empty() {
        say(&format!("private:     {} records", info.private.len()))?;
    }
    Ok(())
}

fn info(args: &InfoArgs) -> anyhow::Result<ExitCode> {
    let bag = open(&args.path)?;
    let info = bag.info();
    let bytes = bytes_of(info);
    let read = (!args.quick && bytes <= READ_THROUGH_BYTES)
        .then(|| bag::verify(&bag, &ReadOptions::default(), None, &mut |_| {}));
    if args.json {
        let mut document = info_json(&bag, read.as_ref());
        document["bytes"] = json!(bytes);
        say(&document.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    print_info(&bag, read.as_ref())?;
    say_damage(read.as_ref().map_or(&info.damage, |r| &r.damage))?;
    Ok(ExitCode::SUCCESS)
}

fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let bag = open(&args.path)?;
    let info = bag.info();
    let total = usize::try_from(info.messages).unwrap_or(usize::MAX);
    let mut progress = ProgressBar::new(!std::io::stderr().is_terminal());
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
        let mut document = verify_json(&bag, &read, None);
        document["bytes"] = json!(bytes_of(info));
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
        print_info(&bag, Some(&read))?;
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
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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
    let topics = args.filter.choose(bag.info(), &args.input)?;
    let held: u64 = bag.info().topics.iter().filter(|t| topics.contains(&t.name)).map(|t| t.count).sum();
    // All of them: the bag is then held against its own count.
    let all = bag.info().topics.iter().all(|t| topics.contains(&t.name));
    let options = ReadOptions { topics: (!all).then_some(topics), ..ReadOptions::default() };
    let total = usize::try_from(held).unwrap_or(usize::MAX);
    let mut progress = ProgressBar::new(!std::io::stderr().is_terminal());
    let stop = stop_flag()?;
    let report = bag::rewrite_as_mcap(&bag, &output, &options, &mut |done| {
        if done % 512 == 0 {
            progress.bar("writing", done as usize, total);
        }
        !stop.load(Ordering::Relaxed)
    })?;
    drop(progress);
    print_rewrite(args, &output, &report)?;
    if report.stopped {
        bail!("stopped: {} holds the first {} messages", output.display(), report.messages);
    }
    if held > 0 && report.messages == 0 {
        bail!("{}: no message of {} could be kept", output.display(), args.input.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn print_rewrite(args: &RewriteArgs, output: &Path, report: &ConvertReport) -> anyhow::Result<()> {
    if args.json {
        let damage: Vec<_> = report.damage.iter().map(ToString::to_string).collect();
        let document = json!({
            "output": output.display().to_string(),
            "messages": report.messages,
            "attachments": report.attachments,
            "records": report.records,
            "stopped": report.stopped,
            "kept": report.kept,
            "lost": damage,
        });
        return say(&document.to_string());
    }
    let beside = match (report.attachments, report.records) {
        (0, 0) => String::new(),
        (attachments, records) => format!(", {attachments} attachments, {records} other records"),
    };
    say(&format!("{}: {} messages{beside}", output.display(), report.messages))?;
    report.kept.iter().try_for_each(|kept| say(&format!("kept as recorded: {kept}")))?;
    say_damage(&report.damage)
}

/// A topic that is played.
struct PlayedTopic {
    /// Name under which it is published.
    name: String,
    key: TypeKey,
}

/// Publishes over Zenoh.
struct ZenohSink<'a> {
    session: &'a RosSession,
    info: &'a BagInfo,
    /// How many publishers each topic had, and what they offered.
    slots: PublisherSlots,
    topics: HashMap<TopicId, PlayedTopic>,
    publishers: HashMap<(TopicId, usize), RawPublisher>,
    clock: Option<RawPublisher>,
    /// Nothing may be lost.
    all: bool,
    /// Messages so far; also read when playing must end at once.
    sent: Arc<AtomicU64>,
}

/// How long a publisher that is declared while playing waits for those who listen to its topic already.
const MATCHING: Duration = Duration::from_millis(100);

impl ZenohSink<'_> {
    /// Declares the publishers that are known beforehand.
    fn declare_all(&mut self) -> Result<(), RosError> {
        let topics: Vec<TopicId> = self.topics.keys().copied().collect();
        for topic in topics {
            for slot in 0..self.slots.count(topic) {
                self.declare(topic, slot)?;
            }
        }
        Ok(())
    }

    fn declare(&mut self, topic: TopicId, slot: usize) -> Result<(), RosError> {
        let Some(PlayedTopic { name, key }) = self.topics.get(&topic) else { return Ok(()) };
        let qos = qos_of(self.info.topic(topic), self.slots.profile(topic, slot), self.all);
        let publisher = self.session.raw_publisher(name, &key.type_name, &key.hash, &qos)?;
        self.publishers.insert((topic, slot), publisher);
        Ok(())
    }

    fn send(&mut self, topic: TopicId, slot: usize, cdr: &[u8]) -> Result<bool, RosError> {
        if !self.topics.contains_key(&topic) {
            return Ok(false);
        }
        if !self.publishers.contains_key(&(topic, slot)) {
            self.declare(topic, slot)?;
            let listened = self.publishers.get(&(topic, 0)).is_some_and(RawPublisher::has_subscribers);
            if let (true, Some(publisher)) = (listened, self.publishers.get(&(topic, slot))) {
                let _ = publisher.wait_for_subscribers(MATCHING);
            }
        }
        let Some(publisher) = self.publishers.get(&(topic, slot)) else { return Ok(false) };
        publisher.publish(cdr.to_vec())?;
        self.sent.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }
}

fn sink_error(source: RosError) -> SinkError {
    SinkError { source: Box::new(source) }
}

impl PublishSink for ZenohSink<'_> {
    fn publish(
        &mut self,
        topic: TopicId,
        slot: usize,
        cdr: &[u8],
        _must_take: bool,
    ) -> Result<bool, SinkError> {
        // Publishers that must lose nothing are declared so that a full queue blocks.
        self.send(topic, slot, cdr).map_err(sink_error)
    }

    fn clock(&mut self, time_ns: i64) -> Result<(), SinkError> {
        let Some(publisher) = &self.clock else { return Ok(()) };
        let (sec, nanosec) = (time_ns.div_euclid(1_000_000_000), time_ns.rem_euclid(1_000_000_000));
        let mut cdr = vec![0, 1, 0, 0];
        cdr.extend((sec as i32).to_le_bytes());
        cdr.extend((nanosec as u32).to_le_bytes());
        publisher.publish(cdr).map(drop).map_err(sink_error)
    }
}

/// The quality of service of one publisher. With `all`, nothing may be lost.
fn qos_of(topic: &TopicInfo, profile: Option<QosProfile>, all: bool) -> Qos {
    let keeps = topic.latched || topic.name.ends_with("tf_static");
    // One publisher stands for all of a topic that is not latched: reliable, if one of them was, serves both kinds of
    // subscribers.
    let reliable = if keeps {
        profile.is_none_or(|p| p.reliable)
    } else {
        let profiles = topic.qos_profiles();
        profiles.is_empty() || profiles.iter().any(|p| p.reliable)
    };
    let depth = profile.map_or(Some(10), |p| p.depth).unwrap_or(1000).clamp(1, 10_000) as usize;
    Qos {
        reliability: if reliable || all { Reliability::Reliable } else { Reliability::BestEffort },
        durability: if keeps { Durability::TransientLocal } else { Durability::Volatile },
        history: if all && !keeps { History::KeepAll } else { History::KeepLast(depth) },
    }
}

/// Wall time, the stop flag and, on a terminal, the keys.
struct RealClock {
    start: Instant,
    keys: bool,
    stop: Arc<AtomicBool>,
    status: StatusLine,
}

/// Rate, pause and position: drawn in place on a terminal, a line for each change elsewhere.
struct StatusLine {
    terminal: bool,
    drawn: Option<Instant>,
    shown: Option<PlayState>,
}

impl StatusLine {
    /// Times between two drawings.
    const PERIOD: Duration = Duration::from_millis(200);

    fn show(&mut self, state: &PlayState) {
        let same = |shown: PlayState| {
            (shown.rate, shown.paused, shown.loops) == (state.rate, state.paused, state.loops)
        };
        let changed = self.shown.is_some_and(|shown| !same(shown));
        if self.terminal {
            if changed || self.drawn.is_none_or(|at| at.elapsed() >= Self::PERIOD) {
                eprint!("\r\x1b[K{}", Self::text(state));
                // A terminal that cannot be flushed shows the line a little later.
                let _ = std::io::stderr().flush();
                self.drawn = Some(Instant::now());
            }
        } else if changed {
            eprintln!("{}", Self::text(state));
        }
        self.shown = Some(*state);
    }

    fn text(state: &PlayState) -> String {
        let what = if state.paused { "paused" } else { "playing" };
        let rate =
            if state.rate > 0.0 { format!("rate {:.2}", state.rate) } else { "as fast as taken".to_owned() };
        let loops = if state.loops > 0 { format!(", loop {}", state.loops + 1) } else { String::new() };
        let (here, end) = (seconds(state.position_ns), seconds(state.length_ns));
        format!("{what} at {here:.1} s of {end:.1} s, {rate}{loops}")
    }

    fn close(&mut self) {
        if self.drawn.take().is_some() {
            eprint!("\r\x1b[K");
        }
    }
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

    fn show(&mut self, state: &PlayState) {
        self.status.show(state);
    }
}

/// Ends the process when it does not end by itself after it was asked to: a subscriber may keep the last message, or the
/// closing of the session, waiting. Says how many messages were sent, unless the report (`ended`) is out already.
fn end_in_time(stop: Arc<AtomicBool>, ended: Arc<AtomicBool>, sent: Arc<AtomicU64>, json: bool) {
    const GRACE: Duration = Duration::from_millis(700);
    let watch = move || {
        while !stop.load(Ordering::Relaxed) {
            if ended.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(GRACE);
        let _ = crossterm::terminal::disable_raw_mode();
        if !ended.load(Ordering::Relaxed) {
            let messages = sent.load(Ordering::Relaxed);
            let text = if json {
                json!({ "messages": messages, "stopped": true, "waiting": true }).to_string()
            } else {
                format!("{messages} messages published; stopped while a subscriber did not take the next one")
            };
            let _ = say(&text);
        }
        std::process::exit(0);
    };
    // Without the thread, playing ends when the subscriber lets it.
    let _ = std::thread::Builder::new().name("end-in-time".to_owned()).spawn(watch);
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

/// What part of a bag is played, checked against its length.
fn span(args: &PlayArgs, bag: &Bag) -> anyhow::Result<(i64, Option<i64>)> {
    let first_ns = bag.first_stamp_ns();
    let length_ns = bag.info().end_ns.saturating_sub(first_ns);
    let start_offset_ns = nanos(args.start_offset, "--start-offset")?;
    if start_offset_ns > length_ns {
        let (offset, length) = (args.start_offset, seconds(length_ns));
        bail!("--start-offset {offset}: {} is {length:.3} s long", args.path.display());
    }
    let duration_ns = match (args.playback_duration, args.playback_until_sec) {
        (Some(s), _) => Some(nanos(s, "--playback-duration")?),
        (None, Some(s)) => {
            let start_ns = first_ns.saturating_add(start_offset_ns);
            let duration = nanos(s, "--playback-until-sec")?.saturating_sub(start_ns);
            if duration < 0 {
                bail!("--playback-until-sec {s}: playing starts later, at {:.3} s", seconds(start_ns));
            }
            Some(duration)
        }
        (None, None) => None,
    };
    Ok((start_offset_ns, duration_ns))
}

/// Messages by which the layout of a topic is known whose definition the bag does not hold.
const SAMPLES: usize = 8;

/// Finds the type hash of each chosen topic. Gives the topics that can be played, and why the others cannot.
fn played_topics(
    args: &PlayArgs,
    bag: &Bag,
    chosen: &[String],
) -> anyhow::Result<(HashMap<TopicId, PlayedTopic>, BTreeMap<String, String>)> {
    let info = bag.info();
    let (mut played, mut refused) = (HashMap::new(), BTreeMap::new());
    let mut converter = CdrConverter::new(info);
    for (at, topic) in info.topics.iter().enumerate().filter(|(_, t)| chosen.contains(&t.name)) {
        let defined =
            topic.schema.as_ref().is_some_and(|s| s.encoding.ends_with("msg") && !s.data.is_empty());
        let known = topic.type_hash.is_some() || defined;
        let mut samples = Vec::new();
        if !known && topic.encoding.is_ros() {
            let only = ReadOptions { topics: Some(vec![topic.name.clone()]), ..ReadOptions::default() };
            let mine = bag.messages(&only).filter(|m| m.topic.0 as usize == at).take(SAMPLES);
            for message in mine {
                samples.extend(converter.convert(&message).ok().map(<[u8]>::to_vec));
            }
        }
        let key = match bag::type_key(topic, &samples) {
            Ok(key) => key,
            Err(e) => {
                tracing::warn!("not played: {e}");
                refused.insert(topic.name.clone(), e.to_string());
                continue;
            }
        };
        match key.basis {
            HashBasis::OtherLayout => tracing::warn!(
                "{}: the recorded layout of {} is not the one that ROS 2 has today: published under its own hash {}, \
                 subscribers of today's type do not receive it",
                topic.name,
                key.type_name,
                key.hash
            ),
            HashBasis::NameOnly => tracing::warn!(
                "{}: no type hash of {} is recorded or can be computed: published as Humble does, without a hash",
                topic.name,
                key.type_name
            ),
            _ => {}
        }
        let name = remapped(&topic.name, &args.remap)?;
        let name = if name.starts_with('/') { name } else { format!("/{name}") };
        played.insert(TopicId(at as u32), PlayedTopic { name, key });
    }
    if played.is_empty() {
        let why = refused.into_values().next().unwrap_or_default();
        bail!("{}: no topic can be played: {why}", args.path.display());
    }
    Ok((played, refused))
}

/// Waits for a subscriber; false when it was interrupted.
fn wait_for_subscribers(args: &PlayArgs, sink: &ZenohSink<'_>, stop: &AtomicBool) -> anyhow::Result<bool> {
    let wait = args.wait_for_subscribers.unwrap_or(if args.rate == 0.0 { 10.0 } else { 0.0 });
    let until = Instant::now() + Duration::from_nanos(nanos(wait, "--wait-for-subscribers")?.unsigned_abs());
    while !sink.publishers.values().any(RawPublisher::has_subscribers) {
        if stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if Instant::now() >= until {
            if args.rate == 0.0 {
                bail!("nobody listens to the topics of {}: start the consumer first", args.path.display());
            }
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

/// Says what is about to be played, and which keys there are.
fn say_start(args: &PlayArgs, player: &Player, topics: &HashMap<TopicId, PlayedTopic>, keys: bool) {
    let state = player.state(0);
    let rate =
        if state.rate > 0.0 { format!("rate {:.2}", state.rate) } else { "as fast as taken".to_owned() };
    let paused = if state.paused { ", paused" } else { "" };
    let length = seconds(state.length_ns);
    eprintln!("{}: {} topics, {length:.1} s, {rate}{paused}", args.path.display(), topics.len());
    if keys {
        eprintln!(
            "keys: space pauses and goes on, right arrow sends the next message while paused, up and down change the \
             rate, q ends"
        );
    } else {
        eprintln!("no keys: Ctrl-C ends");
    }
}

fn play(args: &PlayArgs) -> anyhow::Result<ExitCode> {
    if !(args.rate >= 0.0 && args.rate.is_finite()) {
        bail!("--rate {}: give 0 or a positive number", args.rate);
    }
    if args.clock.is_some_and(|hz| !(hz > 0.0 && hz <= 1e6)) {
        bail!("--clock: give a positive number of ticks per second");
    }
    let stop = stop_flag()?;
    let (sent, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    end_in_time(stop.clone(), ended.clone(), sent.clone(), args.json);
    let bag = open(&args.path)?;
    let info = bag.info();
    let chosen = args.filter.choose(info, &args.path)?;
    let (start_offset_ns, duration_ns) = span(args, &bag)?;
    let clock_topics = if args.clock_topics_all { chosen.clone() } else { args.clock_topics.clone() };
    let remapped_from = args.remap.iter().filter_map(|r| Some(r.split_once(":=")?.0.to_owned()));
    let mentioned: Vec<String> = args.clock_topics.iter().cloned().chain(remapped_from).collect();
    for name in unknown_topics(info, &mentioned) {
        tracing::warn!("{}: there is no topic {name}", args.path.display());
    }
    let (topics, refused) = played_topics(args, &bag, &chosen)?;
    let ticks = args.clock.is_some() || !clock_topics.is_empty();
    let options = PlayOptions {
        rate: args.rate,
        looping: args.looping,
        start_offset_ns,
        duration_ns,
        delay_ns: nanos(args.delay, "--delay")?,
        topics: Some(topics.keys().map(|id| info.topic(*id).name.clone()).collect()),
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

    let session = play_session(args)?;
    let clock = if ticks {
        Some(session.raw_publisher("/clock", Clock::NAME, Clock::HASH, &Qos::default())?)
    } else {
        None
    };
    let (slots, publishers) = (PublisherSlots::new(info), HashMap::new());
    let all = args.rate == 0.0;
    let mut sink = ZenohSink { session: &session, info, slots, topics, publishers, clock, all, sent };
    sink.declare_all()?;
    let report = if wait_for_subscribers(args, &sink, &stop)? {
        play_through(args, &bag, options, &mut sink, &stop)?
    } else {
        let mut nothing = PlayReport::default();
        nothing.stopped = true;
        nothing
    };
    print_play(args, &report, &refused)?;
    ended.store(true, Ordering::Relaxed);
    // What was handed to Zenoh last is still on its way.
    std::thread::sleep(Duration::from_millis(200));
    drop(sink);
    session.close()?;
    if !report.stopped && report.published.is_empty() && report.unplayable > 0 {
        bail!("{}: no message could be played", args.path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Plays with the keys of the terminal, if there is one.
fn play_through(
    args: &PlayArgs,
    bag: &Bag,
    options: PlayOptions,
    sink: &mut ZenohSink<'_>,
    stop: &Arc<AtomicBool>,
) -> anyhow::Result<PlayReport> {
    let keys = !args.disable_keyboard_controls && std::io::stdin().is_terminal();
    let mut player = Player::new(bag, options, 0);
    say_start(args, &player, &sink.topics, keys);
    let terminal = RawTerminal::enter(keys);
    let status = StatusLine { terminal: std::io::stderr().is_terminal(), drawn: None, shown: None };
    let (start, keys) = (Instant::now(), terminal.is_some());
    let mut clock_and_keys = RealClock { start, keys, stop: stop.clone(), status };
    let played = run_player(&mut player, sink, &mut clock_and_keys);
    clock_and_keys.status.close();
    drop(terminal);
    Ok(played?)
}

fn print_play(
    args: &PlayArgs,
    report: &PlayReport,
    refused: &BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let total: u64 = report.published.values().sum();
    let late_max_ms = report.late_max.as_secs_f64() * 1e3;
    if args.json {
        let damage: Vec<_> = report.damage.iter().map(ToString::to_string).collect();
        let unplayable: BTreeMap<_, _> =
            report.unplayable_topics.iter().map(|(topic, (_, why))| (topic, why)).collect();
        let document = json!({
            "published": report.published,
            "messages": total,
            "dropped": report.dropped,
            "unplayable": report.unplayable,
            "unplayable_topics": unplayable,
            "refused": refused,
            "late": report.late,
            "late_max_ms": late_max_ms,
            "loops": report.loops,
            "stopped": report.stopped,
            "lost": damage,
        });
        return say(&document.to_string());
    }
    let stopped = if report.stopped { ", stopped before the end" } else { "" };
    say(&format!("{total} messages published, {} dropped{stopped}", report.dropped))?;
    if report.late > 0 {
        say(&format!("{} messages were more than 100 ms late, at most {late_max_ms:.0} ms", report.late))?;
    }
    for why in refused.values() {
        say(&format!("not played: {why}"))?;
    }
    for (count, why) in report.unplayable_topics.values() {
        say(&format!("{count} messages cannot be played: {why}"))?;
    }
    say_damage(&report.damage)
}
