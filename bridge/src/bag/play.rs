//! Playing a bag: what is sent, and when.
//!
//! [`Player`] is the scheduling core: it reads no clock and sends nothing, [`Player::step`] takes the time
//! and gives the next thing to do. [`run`] drives it against a [`PlayClock`] and a [`PublishSink`].
//!
//! Latched topics (`/tf_static`, transient local) are given first after every start, seek and loop: for
//! transforms everything that came before, for others what each original publisher would still have.
//!
//! Messages with a log time of 0, which recorders give to what comes before the first `/clock`, are sent at the start.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use regex::Regex;

use super::latch::{keeps_for_late, kept_depth};
use super::{
    Bag, BagInfo, CdrConverter, Damage, Messages, Order, PublisherSlots, RawMessage, ReadOptions, TopicId,
};

/// Bytes of messages that wait, at most, whatever the number allowed.
const READ_AHEAD_BYTES: usize = 64 << 20;

/// What is played and how.
#[derive(Clone, Debug)]
pub struct PlayOptions {
    /// Speed: 1 is as recorded; 0 as fast as the consumer takes the messages.
    pub rate: f64,
    /// Start again at the end.
    pub looping: bool,
    /// Time after the start of the bag at which playing starts, in nanoseconds.
    pub start_offset_ns: i64,
    /// How much of the bag is played, in nanoseconds of the bag.
    pub duration_ns: Option<i64>,
    /// Wait before the first message, in nanoseconds.
    pub delay_ns: i64,
    /// Topics by name; `None`: all.
    pub topics: Option<Vec<String>>,
    /// Simulated time: ticks per second on `/clock`.
    pub clock_hz: Option<f64>,
    /// Tick `/clock` before each message of these topics.
    pub clock_topics: Vec<String>,
    /// Wait for [`Control::TogglePause`] or [`Control::Next`] at the start.
    pub start_paused: bool,
    /// Messages that are read before they are due.
    pub read_ahead: usize,
    /// The stamp by which messages are timed.
    pub order: Order,
}

impl Default for PlayOptions {
    fn default() -> Self {
        Self {
            rate: 1.0,
            looping: false,
            start_offset_ns: 0,
            duration_ns: None,
            delay_ns: 0,
            topics: None,
            clock_hz: None,
            clock_topics: Vec::new(),
            start_paused: false,
            read_ahead: 1000,
            order: Order::LogTime,
        }
    }
}

/// Which topics of a bag are wanted.
#[derive(Clone, Debug, Default)]
pub struct TopicFilter {
    /// Names that are wanted; with [`regex`](Self::regex) both count. Neither: all.
    pub topics: Vec<String>,
    /// Names that match are wanted.
    pub regex: Option<Regex>,
    /// Names that are not wanted.
    pub exclude: Vec<String>,
    /// Names that match are not wanted.
    pub exclude_regex: Option<Regex>,
}

/// A pattern of topics cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("pattern {pattern:?}: {source}")]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    #[source]
    pub source: regex::Error,
}

/// True for the same topic, with or without the slash in front.
fn same_topic(a: &str, b: &str) -> bool {
    a.trim_start_matches('/') == b.trim_start_matches('/')
}

impl TopicFilter {
    /// A filter of names and regular expressions.
    ///
    /// # Errors
    /// An expression that cannot be parsed, with the reason.
    pub fn new(
        topics: Vec<String>,
        regex: Option<&str>,
        exclude: Vec<String>,
        exclude_regex: Option<&str>,
    ) -> Result<Self, PatternError> {
        let compile =
            |text: &str| Regex::new(text).map_err(|source| PatternError { pattern: text.to_owned(), source });
        Ok(Self {
            topics,
            regex: regex.map(compile).transpose()?,
            exclude,
            exclude_regex: exclude_regex.map(compile).transpose()?,
        })
    }

    /// The names of the topics of `info` that pass.
    #[must_use]
    pub fn apply(&self, info: &BagInfo) -> Vec<String> {
        let all = self.topics.is_empty() && self.regex.is_none();
        let passes = |name: &str| {
            let named = self.topics.iter().any(|t| same_topic(t, name));
            let wanted = all || named || self.regex.as_ref().is_some_and(|r| r.is_match(name));
            let excluded = self.exclude.iter().any(|t| same_topic(t, name))
                || self.exclude_regex.as_ref().is_some_and(|r| r.is_match(name));
            wanted && !excluded
        };
        let mut names: Vec<String> =
            info.topics.iter().map(|t| t.name.clone()).filter(|name| passes(name)).collect();
        names.dedup();
        names
    }

    /// The names, wanted or not, that no topic of `info` has.
    #[must_use]
    pub fn unknown(&self, info: &BagInfo) -> Vec<String> {
        unknown_topics(info, self.topics.iter().chain(&self.exclude))
    }
}

/// Those of `names` that no topic of `info` has.
pub fn unknown_topics<'a>(info: &BagInfo, names: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let known = |name: &String| info.topics.iter().any(|t| same_topic(&t.name, name));
    names.into_iter().filter(|name| !known(name)).cloned().collect()
}

/// What a person at the keyboard wants.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Control {
    /// Pause, or go on.
    TogglePause,
    /// While paused: one more message.
    Next,
    /// Multiply the rate by this.
    Faster(f64),
    /// Go to this time of the bag, in nanoseconds since the Unix epoch.
    Seek(i64),
    /// Stop playing.
    Stop,
}

/// What is to be done now.
#[derive(Debug)]
pub enum Step {
    /// Send this message.
    Publish(RawMessage),
    /// Send this time, in nanoseconds since the Unix epoch, on `/clock`.
    Clock(i64),
    /// Nothing until this time, or until a control comes.
    WaitUntil(i64),
    /// Nothing until a control comes.
    Paused,
    /// Everything is played.
    Finished,
}

/// Times of the bag against times of playing.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    bag_ns: i64,
    play_ns: i64,
    rate: f64,
}

impl Schedule {
    fn due(&self, bag_ns: i64) -> i64 {
        if self.rate <= 0.0 {
            return self.play_ns;
        }
        let ahead = bag_ns.saturating_sub(self.bag_ns) as f64 / self.rate;
        self.play_ns.saturating_add(ahead as i64)
    }

    fn bag_time(&self, now: i64) -> i64 {
        let passed = now.saturating_sub(self.play_ns).max(0) as f64 * self.rate;
        self.bag_ns.saturating_add(passed as i64)
    }
}

/// Playback position, for display.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PlayState {
    /// Speed; 0: as fast as the consumer takes the messages.
    pub rate: f64,
    /// Nothing is sent now.
    pub paused: bool,
    /// Time of the bag since the start of playing, in nanoseconds.
    pub position_ns: i64,
    /// How much of the bag is played, in nanoseconds.
    pub length_ns: i64,
    /// How often the bag has started again.
    pub loops: u64,
}

/// Gives the messages of a bag at the right times. Times of playing are nanoseconds of any steady clock.
pub struct Player {
    bag: Bag,
    options: PlayOptions,
    messages: Messages,
    queue: VecDeque<RawMessage>,
    queued_bytes: usize,
    /// Latched messages that come before all others.
    latched: VecDeque<RawMessage>,
    schedule: Schedule,
    /// The smallest log time above 0.
    first_ns: i64,
    start_ns: i64,
    end_ns: i64,
    paused: bool,
    step_once: bool,
    stopped: bool,
    next_clock_ns: Option<i64>,
    clock_topics: Vec<bool>,
    /// The tick before the message at the head of the queue was given.
    ticked: bool,
    damage: Vec<Damage>,
    loops: u64,
    given_in_loop: u64,
    position_ns: i64,
}

impl Player {
    /// A player that starts at `now`.
    #[must_use]
    pub fn new(bag: &Bag, options: PlayOptions, now: i64) -> Self {
        let info = bag.info();
        // Without an offset also what has no log time is played.
        let first_ns = bag.first_stamp_ns();
        let start_ns = first_ns.saturating_add(options.start_offset_ns.max(0));
        let end_ns = options.duration_ns.map_or(i64::MAX, |d| start_ns.saturating_add(d.max(0)));
        let ticks = |name: &str| options.clock_topics.iter().any(|t| same_topic(t, name));
        let clock_topics = info.topics.iter().map(|t| ticks(&t.name)).collect();
        let begin = now.saturating_add(options.delay_ns.max(0));
        let mut player = Self {
            bag: bag.clone(),
            messages: bag.messages(&ReadOptions { topics: Some(Vec::new()), ..ReadOptions::default() }),
            queue: VecDeque::new(),
            queued_bytes: 0,
            latched: VecDeque::new(),
            schedule: Schedule { bag_ns: start_ns, play_ns: begin, rate: options.rate.max(0.0) },
            first_ns,
            start_ns,
            end_ns,
            paused: options.start_paused,
            step_once: false,
            stopped: false,
            next_clock_ns: None,
            clock_topics,
            ticked: false,
            damage: Vec::new(),
            loops: 0,
            given_in_loop: 0,
            position_ns: start_ns,
            options,
        };
        player.go_to(start_ns, begin);
        player
    }

    fn go_to(&mut self, bag_ns: i64, now: i64) {
        let topics = self.options.topics.clone();
        let options = ReadOptions {
            topics: topics.clone(),
            start_ns: (bag_ns > self.first_ns).then_some(bag_ns),
            end_ns: Some(self.end_ns),
            order: self.options.order,
            threads: None,
        };
        self.damage.extend(
            self.messages.damage().iter().filter(|d| !self.damage.contains(d)).cloned().collect::<Vec<_>>(),
        );
        self.messages = self.bag.messages(&options);
        self.queue.clear();
        self.queued_bytes = 0;
        self.latched = latched_before(&self.bag, topics.as_deref(), bag_ns, self.options.order);
        self.schedule = Schedule { bag_ns, play_ns: now, rate: self.schedule.rate };
        self.next_clock_ns = self.options.clock_hz.map(|_| bag_ns);
        self.ticked = false;
        self.position_ns = bag_ns;
    }

    /// Reads one message before it is due, for the time between two messages; false when no more may wait.
    pub fn read_ahead(&mut self) -> bool {
        if self.queue.len() >= self.options.read_ahead.max(1) || self.queued_bytes >= READ_AHEAD_BYTES {
            return false;
        }
        let Some(message) = self.messages.next() else { return false };
        self.queued_bytes += message.data.len();
        self.queue.push_back(message);
        true
    }

    /// What is to be done at `now`; later calls must not have an earlier time.
    pub fn step(&mut self, now: i64) -> Step {
        if self.stopped {
            return Step::Finished;
        }
        if now < self.schedule.play_ns {
            return Step::WaitUntil(self.schedule.play_ns);
        }
        if let Some(message) = self.latched.pop_front() {
            return Step::Publish(message);
        }
        if self.paused && !self.step_once {
            // Time stands still.
            self.schedule = Schedule { bag_ns: self.position_ns, play_ns: now, rate: self.schedule.rate };
            return Step::Paused;
        }
        if self.queue.is_empty()
            && let Some(message) = self.messages.next()
        {
            self.queued_bytes += message.data.len();
            self.queue.push_back(message);
        }
        let Some(head) = self.queue.front() else {
            // A bag without messages must not loop for ever.
            if self.options.looping && self.given_in_loop > 0 {
                self.loops += 1;
                self.given_in_loop = 0;
                self.go_to(self.start_ns, now);
                return self.step(now);
            }
            self.stopped = true;
            return Step::Finished;
        };
        let stamp = head.order_time_ns;
        let topic = head.topic.0 as usize;
        let rate = self.schedule.rate;
        let immediately = rate <= 0.0 || self.step_once;
        let bag_now = if immediately { stamp } else { self.schedule.bag_time(now).min(stamp) };
        if let (Some(next), Some(hz)) = (self.next_clock_ns, self.options.clock_hz)
            && hz > 0.0
            && bag_now >= next
        {
            let period = (1e9 / hz * if rate > 0.0 { rate } else { 1.0 }).max(1.0) as i64;
            // Ticks that were missed are left out.
            let missed = (bag_now - next) / period;
            let tick = next + missed * period;
            self.next_clock_ns = Some(tick + period);
            return Step::Clock(tick);
        }
        if !immediately {
            let due = self.schedule.due(stamp);
            if now < due {
                let tick = self.next_clock_ns.map_or(due, |t| self.schedule.due(t));
                return Step::WaitUntil(due.min(tick.max(now + 1)));
            }
        }
        if self.clock_topics.get(topic).copied().unwrap_or(false)
            && !std::mem::replace(&mut self.ticked, true)
        {
            return Step::Clock(stamp);
        }
        self.ticked = false;
        self.step_once = false;
        self.given_in_loop += 1;
        self.position_ns = stamp;
        let Some(message) = self.queue.pop_front() else { return Step::Finished };
        self.queued_bytes -= message.data.len();
        Step::Publish(message)
    }

    /// Applies a control at `now`.
    pub fn control(&mut self, control: Control, now: i64) {
        let here = if self.paused { self.position_ns } else { self.schedule.bag_time(now) };
        match control {
            Control::TogglePause => {
                self.paused = !self.paused;
                self.step_once = false;
                if self.paused {
                    self.position_ns = here.max(self.position_ns);
                }
                self.schedule = Schedule { bag_ns: self.position_ns, play_ns: now, rate: self.schedule.rate };
            }
            Control::Next => self.step_once = self.paused,
            Control::Faster(factor) if factor > 0.0 && self.schedule.rate > 0.0 => {
                let rate = (self.schedule.rate * factor).clamp(0.01, 1000.0);
                self.schedule = Schedule { bag_ns: here, play_ns: now, rate };
            }
            Control::Faster(_) => {}
            Control::Seek(bag_ns) => {
                let wanted = bag_ns.max(self.first_ns).min(self.end_ns);
                self.go_to(wanted, now);
            }
            Control::Stop => self.stopped = true,
        }
    }

    /// The bag time that playing has come to.
    #[must_use]
    pub fn position_ns(&self) -> i64 {
        self.position_ns
    }

    /// Where playing has come to.
    #[must_use]
    pub fn state(&self, now: i64) -> PlayState {
        let here = if self.paused { self.position_ns } else { self.schedule.bag_time(now) };
        let end_ns = self.bag.info().end_ns.min(self.end_ns);
        PlayState {
            rate: self.schedule.rate,
            paused: self.paused,
            position_ns: here.max(self.position_ns).min(end_ns).saturating_sub(self.start_ns).max(0),
            length_ns: end_ns.saturating_sub(self.start_ns).max(0),
            loops: self.loops,
        }
    }

    /// True after the end, or after [`Control::Stop`].
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// True while paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The rate of now.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.schedule.rate
    }

    /// How often the bag has started again.
    #[must_use]
    pub fn loops(&self) -> u64 {
        self.loops
    }

    /// Nanoseconds by which the message that [`step`](Self::step) just gave is late.
    #[must_use]
    fn lateness(&self, message: &RawMessage, now: i64) -> i64 {
        if self.schedule.rate <= 0.0 || self.paused {
            return 0;
        }
        now.saturating_sub(self.schedule.due(message.order_time_ns))
    }

    /// Damage met on reading so far.
    #[must_use]
    pub fn damage(&self) -> Vec<Damage> {
        let mut all = self.bag.info().damage.clone();
        for damage in self.damage.iter().chain(self.messages.damage()) {
            if !all.contains(damage) {
                all.push(damage.clone());
            }
        }
        all
    }
}

/// The latched messages before `bag_ns` that late subscribers would get.
fn latched_before(bag: &Bag, topics: Option<&[String]>, bag_ns: i64, order: Order) -> VecDeque<RawMessage> {
    let info = bag.info();
    let wanted = |name: &String| topics.is_none_or(|t| t.contains(name));
    let names: Vec<String> =
        info.topics.iter().filter(|t| keeps_for_late(t) && wanted(&t.name)).map(|t| t.name.clone()).collect();
    if names.is_empty() || bag_ns <= bag.first_stamp_ns() {
        return VecDeque::new();
    }
    let options = ReadOptions {
        topics: Some(names),
        end_ns: Some(bag_ns.saturating_sub(1)),
        order,
        ..ReadOptions::default()
    };
    let mut kept: HashMap<(TopicId, u32), VecDeque<(usize, RawMessage)>> = HashMap::new();
    for (number, message) in bag.messages(&options).enumerate() {
        let depth = kept_depth(info.topic(message.topic));
        let of_publisher = kept.entry((message.topic, message.publisher)).or_default();
        of_publisher.push_back((number, message));
        if depth.is_some_and(|depth| of_publisher.len() > depth) {
            of_publisher.pop_front();
        }
    }
    let mut all: Vec<(usize, RawMessage)> = kept.into_values().flatten().collect();
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, message)| message).collect()
}

/// The sink cannot send any more.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct SinkError {
    /// What is wrong.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Where messages go.
pub trait PublishSink {
    /// Sends one message of a topic of the bag as little-endian CDR. `slot` is the one of its publishers that sends
    /// it, see [`PublisherSlots`]. True: taken; false: dropped, for example because nobody can take it. With
    /// `must_take` it waits instead.
    ///
    /// # Errors
    /// The connection is gone.
    fn publish(
        &mut self,
        topic: TopicId,
        slot: usize,
        cdr: &[u8],
        must_take: bool,
    ) -> Result<bool, SinkError>;

    /// Sends the simulated time, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// The connection is gone.
    fn clock(&mut self, time_ns: i64) -> Result<(), SinkError>;
}

/// The passing of time, and the keyboard.
pub trait PlayClock {
    /// Now, in nanoseconds of a steady clock.
    fn now(&mut self) -> i64;
    /// Waits until a time, or less if a control comes first. `None` waits for a control only.
    fn wait(&mut self, until: Option<i64>) -> Option<Control>;
    /// A control that came meanwhile, without waiting.
    fn poll(&mut self) -> Option<Control>;
    /// Takes note of where playing has come to; called often.
    fn show(&mut self, _state: &PlayState) {}
}

/// What came of playing.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct PlayReport {
    /// Messages taken by the sink, by topic name.
    pub published: BTreeMap<String, u64>,
    /// Messages that the sink dropped.
    pub dropped: u64,
    /// Messages that cannot be turned into CDR.
    pub unplayable: u64,
    /// By topic, how many messages cannot, and why the first of them cannot.
    pub unplayable_topics: BTreeMap<String, (u64, String)>,
    /// Playing ended before the end of the bag because that was asked for.
    pub stopped: bool,
    /// Messages that were sent more than 100 ms late.
    pub late: u64,
    /// Longest delay of a message behind its time.
    pub late_max: Duration,
    /// How often the bag has started again.
    pub loops: u64,
    /// What could not be read.
    pub damage: Vec<Damage>,
}

/// Reading ahead stops this long before the next message is due.
const READ_AHEAD_MARGIN_NS: i64 = 2_000_000;

/// Later than this counts as late.
const LATE_NS: i64 = 100_000_000;

/// Plays until the end, or until [`Control::Stop`].
///
/// # Errors
/// What the sink said when its connection was gone.
pub fn run(
    player: &mut Player,
    sink: &mut dyn PublishSink,
    clock: &mut dyn PlayClock,
) -> Result<PlayReport, SinkError> {
    let mut report = PlayReport::default();
    let info = player.bag.info().clone();
    let mut converter = CdrConverter::new(&info);
    let mut slots = PublisherSlots::new(&info);
    loop {
        // A clock may say over and over again that playing is to end.
        while !player.is_stopped()
            && let Some(control) = clock.poll()
        {
            report.stopped |= control == Control::Stop;
            player.control(control, clock.now());
        }
        let now = clock.now();
        clock.show(&player.state(now));
        let wait = match player.step(now) {
            Step::Publish(message) => {
                let late = player.lateness(&message, now).max(0);
                // Latched messages of before the start are not late.
                if message.order_time_ns >= player.schedule.bag_ns {
                    report.late += u64::from(late > LATE_NS);
                    report.late_max = report.late_max.max(Duration::from_nanos(late as u64));
                }
                let name = &info.topic(message.topic).name;
                match converter.convert(&message) {
                    Ok(cdr) => {
                        let must_take = player.rate() <= 0.0;
                        let slot = slots.of(&message, cdr);
                        if sink.publish(message.topic, slot, cdr, must_take)? {
                            match report.published.get_mut(name) {
                                Some(count) => *count += 1,
                                None => drop(report.published.insert(name.clone(), 1)),
                            }
                        } else {
                            report.dropped += 1;
                        }
                    }
                    Err(e) => {
                        report.unplayable += 1;
                        let of_topic = report.unplayable_topics.entry(name.clone());
                        of_topic.or_insert_with(|| (0, e.to_string())).0 += 1;
                    }
                }
                continue;
            }
            Step::Clock(time_ns) => {
                sink.clock(time_ns)?;
                continue;
            }
            Step::WaitUntil(until) => {
                while clock.now() + READ_AHEAD_MARGIN_NS < until && player.read_ahead() {}
                clock.wait(Some(until))
            }
            Step::Paused => clock.wait(None),
            Step::Finished => break,
        };
        if let Some(control) = wait {
            report.stopped |= control == Control::Stop;
            player.control(control, clock.now());
        }
    }
    report.loops = player.loops();
    report.damage = player.damage();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bag::{McapWriter, OpenOptions, offered_qos, open, schema};

    const MS: i64 = 1_000_000;

    /// `/a` at 0, 10, … 90 ms; `/tf_static` at 0 and 5 ms; `/map` (latched) at 0 and 20 ms; `/b` at 55 ms.
    fn bag() -> (tempfile::TempDir, Bag) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.mcap");
        let mut writer = McapWriter::create(&path).unwrap();
        let mut add = |name: &str, kind: &str, latched: bool| {
            let qos = offered_qos(true, latched, 1);
            writer.add_channel(name, kind, schema::ros2msg(kind).unwrap(), None, &qos).unwrap()
        };
        let a = add("/a", "std_msgs/msg/Int32", false);
        let tf = add("/tf_static", "tf2_msgs/msg/TFMessage", false);
        let map = add("/map", "std_msgs/msg/Int32", true);
        let b = add("/b", "std_msgs/msg/Int32", false);
        let mut put = |channel, ms: i64| {
            let stamp = 1000 * MS + ms * MS;
            writer.write(channel, stamp, stamp, &[0, 1, 0, 0, ms as u8, 0, 0, 0]).unwrap();
        };
        for (channel, ms) in [(tf, 0), (map, 0), (tf, 5), (map, 20), (b, 55)] {
            put(channel, ms);
        }
        (0..10).for_each(|i| put(a, i * 10));
        writer.finish().unwrap();
        let bag = open(&path, &OpenOptions::default()).unwrap();
        (dir, bag)
    }

    /// A clock that jumps to what is waited for, and gives controls at set times.
    struct Scripted {
        now: i64,
        controls: VecDeque<(i64, Control)>,
    }

    impl PlayClock for Scripted {
        fn now(&mut self) -> i64 {
            self.now
        }
        fn wait(&mut self, until: Option<i64>) -> Option<Control> {
            let next = self.controls.front().copied();
            match (until, next) {
                (Some(until), Some((at, _))) if at > until => self.now = until,
                (Some(until), None) => self.now = until,
                (_, Some((at, control))) => {
                    self.now = self.now.max(at);
                    self.controls.pop_front();
                    return Some(control);
                }
                (None, None) => return Some(Control::Stop),
            }
            None
        }
        fn poll(&mut self) -> Option<Control> {
            let due = self.controls.front().is_some_and(|(at, _)| *at <= self.now);
            due.then(|| self.controls.pop_front()).flatten().map(|(_, control)| control)
        }
    }

    /// What was sent: first letter of the topic and its stamp in ms, `c` for ticks.
    fn play(options: PlayOptions, controls: &[(i64, Control)]) -> Vec<(char, i64, i64)> {
        struct Sink<'a> {
            names: Vec<char>,
            sent: Vec<(char, i64)>,
            when: &'a std::cell::Cell<i64>,
            times: Vec<i64>,
        }
        impl PublishSink for Sink<'_> {
            fn publish(&mut self, topic: TopicId, _: usize, cdr: &[u8], _: bool) -> Result<bool, SinkError> {
                self.sent.push((self.names[topic.0 as usize], i64::from(cdr[4])));
                self.times.push(self.when.get());
                Ok(true)
            }
            fn clock(&mut self, time_ns: i64) -> Result<(), SinkError> {
                self.sent.push(('c', time_ns / MS - 1000));
                self.times.push(self.when.get());
                Ok(())
            }
        }
        struct Watched<'a>(Scripted, &'a std::cell::Cell<i64>);
        impl PlayClock for Watched<'_> {
            fn now(&mut self) -> i64 {
                self.1.set(self.0.now);
                self.0.now()
            }
            fn wait(&mut self, until: Option<i64>) -> Option<Control> {
                self.0.wait(until)
            }
            fn poll(&mut self) -> Option<Control> {
                self.0.poll()
            }
        }
        let (_dir, bag) = bag();
        let names = bag.info().topics.iter().map(|t| t.name.chars().nth(1).unwrap()).collect();
        let when = std::cell::Cell::new(0);
        let mut sink = Sink { names, sent: Vec::new(), when: &when, times: Vec::new() };
        let controls = controls.iter().map(|(at, c)| (at * MS, *c)).collect();
        let mut clock = Watched(Scripted { now: 0, controls }, &when);
        let mut player = Player::new(&bag, options, 0);
        run(&mut player, &mut sink, &mut clock).unwrap();
        sink.sent.into_iter().zip(sink.times).map(|((c, v), t)| (c, v, t / MS)).collect()
    }

    fn only_a() -> PlayOptions {
        PlayOptions { topics: Some(vec!["/a".to_owned()]), ..PlayOptions::default() }
    }

    #[test]
    fn messages_come_when_they_are_due() {
        let every = |from: i64, step: i64, at: i64| {
            (from..10).map(move |i| ('a', i * 10, at + (i - from) * step)).collect::<Vec<_>>()
        };
        // options, controls, (topic, stamp ms, sent at ms)
        type Case = (&'static str, PlayOptions, Vec<(i64, Control)>, Vec<(char, i64, i64)>);
        let cases: Vec<Case> = vec![
            ("as recorded", only_a(), vec![], every(0, 10, 0)),
            ("double", PlayOptions { rate: 2.0, ..only_a() }, vec![], every(0, 5, 0)),
            ("at once", PlayOptions { rate: 0.0, ..only_a() }, vec![], every(0, 0, 0)),
            ("delay", PlayOptions { delay_ns: 7 * MS, ..only_a() }, vec![], every(0, 10, 7)),
            ("offset", PlayOptions { start_offset_ns: 60 * MS, ..only_a() }, vec![], every(6, 10, 0)),
            (
                "duration",
                PlayOptions { duration_ns: Some(15 * MS), ..only_a() },
                vec![],
                vec![('a', 0, 0), ('a', 10, 10)],
            ),
            (
                "pause, one more, go on",
                PlayOptions { start_offset_ns: 60 * MS, ..only_a() },
                vec![(5, Control::TogglePause), (50, Control::Next), (100, Control::TogglePause)],
                vec![('a', 60, 0), ('a', 70, 50), ('a', 80, 110), ('a', 90, 120)],
            ),
            (
                "seek",
                PlayOptions { ..only_a() },
                vec![(15, Control::Seek(1080 * MS))],
                vec![('a', 0, 0), ('a', 10, 10), ('a', 80, 15), ('a', 90, 25)],
            ),
            (
                "clock",
                PlayOptions { clock_hz: Some(50.0), duration_ns: Some(20 * MS), ..only_a() },
                vec![],
                vec![('c', 0, 0), ('a', 0, 0), ('a', 10, 10), ('c', 20, 20), ('a', 20, 20)],
            ),
            (
                "clock before messages",
                PlayOptions { clock_topics: vec!["/a".to_owned()], duration_ns: Some(10 * MS), ..only_a() },
                vec![],
                vec![('c', 0, 0), ('a', 0, 0), ('c', 10, 10), ('a', 10, 10)],
            ),
            (
                "latched topics come first after an offset",
                PlayOptions { start_offset_ns: 52 * MS, duration_ns: Some(9 * MS), ..PlayOptions::default() },
                vec![],
                vec![('t', 0, 0), ('t', 5, 0), ('m', 20, 0), ('b', 55, 3), ('a', 60, 8)],
            ),
        ];
        for (name, options, controls, want) in cases {
            assert_eq!(play(options, &controls), want, "{name}");
        }
    }

    /// A clock whose stop flag stays set, as that of a signal does.
    struct StoppedAt(i64, i64);

    impl PlayClock for StoppedAt {
        fn now(&mut self) -> i64 {
            self.0
        }
        fn wait(&mut self, until: Option<i64>) -> Option<Control> {
            self.0 = until.unwrap_or(i64::MAX).min(self.1);
            self.poll()
        }
        fn poll(&mut self) -> Option<Control> {
            (self.0 >= self.1).then_some(Control::Stop)
        }
    }

    struct Nothing;

    impl PublishSink for Nothing {
        fn publish(&mut self, _: TopicId, _: usize, _: &[u8], _: bool) -> Result<bool, SinkError> {
            Ok(true)
        }
        fn clock(&mut self, _: i64) -> Result<(), SinkError> {
            Ok(())
        }
    }

    #[test]
    fn a_stop_that_is_said_again_and_again_ends_playing() {
        let (_dir, bag) = bag();
        for (options, published) in [
            (only_a(), 4),
            (PlayOptions { start_paused: true, ..only_a() }, 0),
            (PlayOptions { delay_ns: 50 * MS, ..only_a() }, 0),
            (PlayOptions { looping: true, rate: 10.0, ..only_a() }, 40),
        ] {
            let name = format!("{options:?}");
            let mut player = Player::new(&bag, options, 0);
            let report = run(&mut player, &mut Nothing, &mut StoppedAt(0, 30 * MS)).unwrap();
            assert!(report.stopped, "{name}");
            assert!(report.published.values().sum::<u64>() <= published, "{name}: {report:?}");
        }
    }

    #[test]
    fn messages_without_a_log_time_are_sent_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.mcap");
        let mut writer = McapWriter::create(&path).unwrap();
        let kind = "std_msgs/msg/Int32";
        let text = schema::ros2msg(kind).unwrap();
        let channel = writer.add_channel("/a", kind, text, None, "").unwrap();
        for ns in [0, 0, 1_700_000_000_000_000_000i64, 1_700_000_000_000_000_000 + 20 * MS] {
            writer.write(channel, ns, ns, &[0, 1, 0, 0, 0, 0, 0, 0]).unwrap();
        }
        writer.finish().unwrap();
        let bag = open(&path, &OpenOptions::default()).unwrap();
        let mut player = Player::new(&bag, PlayOptions::default(), 0);
        let mut clock = Scripted { now: 0, controls: VecDeque::new() };
        let report = run(&mut player, &mut Nothing, &mut clock).unwrap();
        assert_eq!((report.published["/a"], clock.now / MS), (4, 20));
        assert_eq!(player.state(clock.now).length_ns, 20 * MS);
    }

    #[test]
    fn names_that_are_not_in_the_bag_are_known() {
        let (_dir, bag) = bag();
        let filter = TopicFilter {
            topics: vec!["a".into(), "/typo".into()],
            exclude: vec!["/b".into(), "/c".into()],
            ..Default::default()
        };
        assert_eq!(filter.unknown(bag.info()), ["/typo", "/c"]);
    }

    #[test]
    fn a_loop_starts_again_until_stopped() {
        let options = PlayOptions { looping: true, duration_ns: Some(10 * MS), ..only_a() };
        let sent = play(options, &[(25, Control::Stop)]);
        assert_eq!(sent[..4], [('a', 0, 0), ('a', 10, 10), ('a', 0, 10), ('a', 10, 20)]);
        assert!(sent.len() <= 6, "{sent:?}");
    }

    #[test]
    fn topics_are_chosen_by_name_and_pattern() {
        let (_dir, bag) = bag();
        let regex = |text: &str| Some(Regex::new(text).unwrap());
        let cases: Vec<(TopicFilter, &[&str])> = vec![
            (TopicFilter::default(), &["/a", "/tf_static", "/map", "/b"]),
            (TopicFilter { topics: vec!["a".into()], ..Default::default() }, &["/a"]),
            (TopicFilter { regex: regex("^/(a|b)$"), ..Default::default() }, &["/a", "/b"]),
            (
                TopicFilter { exclude: vec!["/a".into()], exclude_regex: regex("tf"), ..Default::default() },
                &["/map", "/b"],
            ),
        ];
        for (filter, want) in cases {
            assert_eq!(filter.apply(bag.info()), want, "{filter:?}");
        }
    }
}
