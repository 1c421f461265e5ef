//! Every node on the network at a glance: what each one said last, and how that looks as lines of a terminal.
//!
//! [`Fleet`] takes what was heard and the time, and [`screen`] gives lines: both are pure. `mindseye top` asks and draws.

use mindseye_bridge::ros::Claimant;
use mindseye_bridge::time::TimeDelta;
use serde_json::Value;
use std::collections::BTreeMap;

/// A node that says nothing for so long is shown as silent.
const SILENT_AFTER: TimeDelta = TimeDelta::from_millis(5000);
/// A node that is neither there nor heard of for so long is forgotten.
const FORGOTTEN_AFTER: TimeDelta = TimeDelta::from_millis(60_000);
/// Nodes that are followed; more are counted.
const NODES_MAX: usize = 256;
/// Columns: head, width. A negative width is for numbers, which stand at the right.
const COLUMNS: [(&str, isize); 10] = [
    ("ROBOT", 16),
    ("STATE", 10),
    ("PICTURES", -9),
    ("AGE", -8),
    ("DROPPED", -8),
    ("MOMENTS", -8),
    ("GOALS", -6),
    ("TIME", -8),
    ("HEARD", -8),
    ("LAST GOAL", 40),
];

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As it is.
    Plain,
    /// Names of columns.
    Head,
    /// The chosen node.
    Chosen,
    /// A node that works on a goal.
    Busy,
    /// Something is wrong.
    Bad,
    /// Less important.
    Soft,
}

/// One line of the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// How it is drawn.
    pub style: Style,
    /// No wider than the screen.
    pub text: String,
}

/// What is known of one node.
#[derive(Clone, Debug, Default)]
struct Node {
    robot: String,
    /// On the liveliness of the network.
    is_there: bool,
    /// The newest status document and when it came.
    status: Option<(TimeDelta, Value)>,
    /// Pictures received when the document before came.
    before: Option<(TimeDelta, u64)>,
    /// Pictures a second between the two newest documents.
    rate_hz: Option<f64>,
    seen_at: TimeDelta,
}

/// All nodes that were heard of.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    nodes: BTreeMap<(String, String), Node>,
    chosen: usize,
    /// Nodes that were too many.
    left_out: usize,
}

fn text_of<'a>(document: &'a Value, path: &str) -> Option<&'a str> {
    document.pointer(path)?.as_str()
}

fn count_of(document: &Value, path: &str) -> Option<u64> {
    document.pointer(path)?.as_u64()
}

/// A duration in a few characters.
fn short(time: TimeDelta) -> String {
    let seconds = time.as_secs_f64().max(0.0);
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.1} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

impl Fleet {
    /// Takes one look: who is alive (the robot's name and the claim on it), and the status documents that came.
    pub fn take(&mut self, now: TimeDelta, alive: &[(String, Claimant)], documents: Vec<Value>) {
        for node in self.nodes.values_mut() {
            node.is_there = false;
        }
        self.left_out = 0;
        for (robot, claimant) in alive {
            if let Some(node) = self.node(robot, &claimant.session) {
                (node.is_there, node.seen_at) = (true, now);
            }
        }
        for document in documents {
            let Some(robot) = text_of(&document, "/robot").map(str::to_owned) else { continue };
            let session = text_of(&document, "/node/session").unwrap_or_default().to_owned();
            let Some(node) = self.node(&robot, &session) else { continue };
            let received = count_of(&document, "/frames/received");
            if let (Some((at, before)), Some(received)) = (node.before, received) {
                let seconds = (now - at).as_secs_f64();
                // A count that went back is another process's, or another topic's.
                node.rate_hz =
                    (seconds > 0.0 && received >= before).then(|| (received - before) as f64 / seconds);
            }
            node.before = received.map(|received| (now, received));
            (node.status, node.seen_at) = (Some((now, document)), now);
        }
        self.nodes.retain(|_, node| now - node.seen_at < FORGOTTEN_AFTER);
        self.chosen = self.chosen.min(self.nodes.len().saturating_sub(1));
    }

    fn node(&mut self, robot: &str, session: &str) -> Option<&mut Node> {
        let key = (robot.to_owned(), session.to_owned());
        if !self.nodes.contains_key(&key) && self.nodes.len() >= NODES_MAX {
            self.left_out += 1;
            return None;
        }
        let node = self.nodes.entry(key).or_default();
        node.robot = robot.to_owned();
        Some(node)
    }

    /// Nodes that are known.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Chooses the node before or after the chosen one.
    pub fn choose(&mut self, down: bool) {
        let last = self.nodes.len().saturating_sub(1);
        self.chosen = if down { (self.chosen + 1).min(last) } else { self.chosen.saturating_sub(1) };
    }
}

impl Node {
    /// One word, and how the line is drawn.
    fn state(&self, now: TimeDelta) -> (&'static str, Style) {
        let Some((at, document)) = &self.status else {
            // Of several nodes with one name only the first one tells.
            return if self.is_there { ("waits", Style::Soft) } else { ("gone", Style::Bad) };
        };
        if !self.is_there && now - *at > TimeDelta::from_millis(2000) {
            return ("gone", Style::Bad);
        }
        if now - *at > SILENT_AFTER {
            return ("silent", Style::Bad);
        }
        let has_faults = document["faults"].as_array().is_some_and(|faults| !faults.is_empty());
        let drive = text_of(document, "/drive/state");
        let is_driving = drive.is_some_and(|state| ["requested", "driving"].contains(&state));
        if has_faults {
            ("faulty", Style::Bad)
        } else if document["goal"].is_string() {
            ("thinking", Style::Busy)
        } else if is_driving {
            ("driving", Style::Busy)
        } else if document.pointer("/frames/age_ms").is_none_or(Value::is_null) {
            ("blind", Style::Bad)
        } else {
            ("ready", Style::Plain)
        }
    }

    /// The cells of its line, as [`COLUMNS`] has them.
    fn cells(&self, now: TimeDelta, state: &str) -> [String; 10] {
        let none = || "–".to_owned();
        let (heard, document) = match &self.status {
            Some((at, document)) => (short(now - *at), document),
            None => (none(), &Value::Null),
        };
        let count = |path: &str| count_of(document, path).map_or_else(none, |n| n.to_string());
        let millis = |path: &str| {
            let value = document.pointer(path).and_then(Value::as_f64);
            value.map_or_else(none, |ms| short(TimeDelta::from_secs_f64(ms / 1e3)))
        };
        let dropped = ["dropped", "missed", "poses_dropped", "events_dropped"];
        let dropped: u64 =
            dropped.iter().filter_map(|name| count_of(document, &format!("/frames/{name}"))).sum();
        let last = match (text_of(document, "/goal"), text_of(document, "/last_answer/status")) {
            (Some(goal), _) => format!("{goal}: in work"),
            (None, Some(status)) => {
                let id = text_of(document, "/last_answer/goal_id").unwrap_or_default();
                format!("{id}: {}", status.replace('_', " "))
            }
            (None, None) => none(),
        };
        // Of a node that is gone nothing comes any more.
        let (rate, age) = match state {
            "gone" => (none(), none()),
            _ => (self.rate_hz.map_or_else(none, |hz| format!("{hz:.1}/s")), millis("/frames/age_ms")),
        };
        [
            self.robot.clone(),
            state.to_owned(),
            rate,
            age,
            if self.status.is_some() { dropped.to_string() } else { none() },
            count("/context/latents"),
            count("/goals/goals"),
            millis("/last_answer/timings_ms/total"),
            heard,
            last,
        ]
    }

    /// More of the chosen node.
    fn details(&self) -> Vec<Line> {
        let line = |style, text: String| Line { style, text };
        let Some((_, document)) = &self.status else {
            return vec![line(
                Style::Soft,
                "this node has told nothing: another one of its name was started earlier".into(),
            )];
        };
        let mut out = Vec::new();
        if let Some(reason) = text_of(document, "/last_answer/reason") {
            out.push(line(Style::Plain, format!("last answer: {reason}")));
        }
        if let Some(pose) = document.pointer("/last_answer/pose").filter(|pose| pose.is_object()) {
            let number = |name: &str| pose[name].as_f64().unwrap_or_default();
            let frame = text_of(pose, "/frame").unwrap_or_default();
            let yaw = number("yaw").to_degrees();
            let text = format!(
                "last pose: x {:.2} m, y {:.2} m, yaw {yaw:.0}° in {frame:?}",
                number("x"),
                number("y")
            );
            out.push(line(Style::Plain, text));
        }
        for fault in document["faults"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            out.push(line(Style::Bad, format!("fault: {fault}")));
        }
        let stages = document["stages_ms"].as_object().into_iter().flatten();
        let times: Vec<String> = stages
            .filter_map(|(name, s)| {
                Some(format!("{name} {:.1}/{:.1}", s["p50"].as_f64()?, s["p99"].as_f64()?))
            })
            .collect();
        if !times.is_empty() {
            out.push(line(Style::Soft, format!("ms, p50/p99: {}", times.join(", "))));
        }
        out
    }
}

/// A text in a cell: cut off where it is too long. Control characters are shown as spaces: texts come from the network.
fn cell(text: &str, width: isize) -> String {
    let most = width.unsigned_abs();
    let mut shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(most).collect();
    if text.chars().count() > most && most > 1 {
        shown.pop();
        shown.push('…');
    }
    if width < 0 { format!("{shown:>most$}") } else { format!("{shown:<most$}") }
}

/// The screen: `width` columns, at most `height` lines. `link` says how the network is reached.
pub fn screen(fleet: &Fleet, now: TimeDelta, (width, height): (usize, usize), link: &str) -> Vec<Line> {
    let mut lines = vec![Line {
        style: Style::Head,
        text: format!("mindseye top: {} nodes, {link}   q quits, arrows choose", fleet.len()),
    }];
    let head: Vec<String> = COLUMNS.iter().map(|(name, width)| cell(name, *width)).collect();
    lines.push(Line { style: Style::Soft, text: head.join(" ") });
    let details = fleet.nodes.values().nth(fleet.chosen).map(Node::details).unwrap_or_default();
    // The chosen node stays in view, and so do its details as far as there is room.
    let below = if details.is_empty() { 0 } else { (details.len() + 1).min(height.saturating_sub(4)) };
    let room = height.saturating_sub(2 + below).max(1);
    let first = (fleet.chosen + 1).saturating_sub(room);
    for (i, node) in fleet.nodes.values().enumerate().skip(first).take(room) {
        let (state, style) = node.state(now);
        let cells: Vec<String> =
            node.cells(now, state).iter().zip(COLUMNS).map(|(text, (_, width))| cell(text, width)).collect();
        let style = if i == fleet.chosen && fleet.len() > 1 { Style::Chosen } else { style };
        lines.push(Line { style, text: cells.join(" ") });
    }
    if fleet.is_empty() {
        lines.push(Line { style: Style::Bad, text: "no node is there".into() });
    }
    if below > 0 {
        lines.push(Line { style: Style::Plain, text: String::new() });
        lines.extend(details);
    }
    if fleet.left_out > 0 {
        lines.push(Line { style: Style::Bad, text: format!("{} more are not shown", fleet.left_out) });
    }
    lines.truncate(height);
    for line in &mut lines {
        line.text = cell(line.text.trim_end(), width as isize).trim_end().to_owned();
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_bridge::time::Timestamp;
    use serde_json::json;

    fn at(seconds: i64) -> TimeDelta {
        TimeDelta::from_millis(1000 * seconds)
    }

    fn alive(robot: &str, session: &str) -> (String, Claimant) {
        (robot.into(), Claimant { since: Timestamp(1), session: session.into() })
    }

    fn status(robot: &str, session: &str, received: u64) -> Value {
        json!({
            "robot": robot,
            "node": {"session": session},
            "goal": null,
            "last_answer": {"goal_id": "g7", "status": "not_in_context", "reason": "nothing like it was seen",
                            "pose": null, "timings_ms": {"total": 1320.0}},
            "drive": null,
            "goals": {"goals": 3, "answers": 3},
            "frames": {"age_ms": 31.0, "received": received, "dropped": 2, "missed": 1, "poses_dropped": 0,
                       "events_dropped": 0},
            "faults": [],
            "context": {"latents": 24},
            "stages_ms": {"denoise_step": {"count": 5, "p50": 12.0, "p99": 15.25, "max": 16.0}},
        })
    }

    fn texts(lines: &[Line]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn three_nodes_as_they_are_seen() {
        let mut fleet = Fleet::default();
        let everybody = [alive("ant", "a-1"), alive("bee", "b-1"), alive("bee", "b-2")];
        fleet.take(at(10), &everybody, vec![status("ant", "a-1", 100), status("bee", "b-1", 5)]);
        let mut bee = status("bee", "b-1", 5);
        bee["goal"] = "page-1".into();
        fleet.take(at(12), &everybody, vec![status("ant", "a-1", 160), bee]);
        let lines = screen(&fleet, at(13), (140, 20), "1 link");
        assert_eq!(
            texts(&lines),
            [
                "mindseye top: 3 nodes, 1 link   q quits, arrows choose",
                "ROBOT            STATE       PICTURES      AGE  DROPPED  MOMENTS  GOALS     TIME    HEARD LAST GOAL",
                "ant              ready         30.0/s    31 ms        3       24      3    1.3 s    1.0 s g7: not in context",
                "bee              thinking       0.0/s    31 ms        3       24      3    1.3 s    1.0 s page-1: in work",
                "bee              waits              –        –        –        –      –        –        – –",
                "",
                "last answer: nothing like it was seen",
                "ms, p50/p99: denoise_step 12.0/15.2",
            ]
        );
        let styles: Vec<Style> = lines[2..5].iter().map(|line| line.style).collect();
        assert_eq!(styles, [Style::Chosen, Style::Busy, Style::Soft]);
    }

    #[test]
    fn states_are_told_apart() {
        let check = |change: &dyn Fn(&mut Value), heard_at: i64, is_there: bool, want: &str| {
            let mut document = status("ant", "a-1", 1);
            change(&mut document);
            let there = [alive("ant", "a-1")];
            let mut fleet = Fleet::default();
            fleet.take(at(heard_at), &there, vec![document]);
            fleet.take(at(20), if is_there { &there } else { &[] }, Vec::new());
            let lines = screen(&fleet, at(20), (100, 9), "");
            assert_eq!(lines[2].text.split_whitespace().nth(1), Some(want), "{:?}", lines[2].text);
        };
        check(&|_| (), 20, true, "ready");
        check(&|d| d["faults"] = json!(["the camera is frozen"]), 20, true, "faulty");
        check(&|d| d["frames"]["age_ms"] = Value::Null, 20, true, "blind");
        check(&|d| d["drive"] = json!({"state": "driving"}), 20, true, "driving");
        check(&|d| d["goal"] = "x".into(), 20, true, "thinking");
        check(&|_| (), 14, true, "silent");
        check(&|_| (), 14, false, "gone");
    }

    #[test]
    fn a_node_that_is_gone_has_no_rate_and_no_age() {
        let mut fleet = Fleet::default();
        let there = [alive("ant", "a-1")];
        fleet.take(at(0), &there, vec![status("ant", "a-1", 100)]);
        fleet.take(at(1), &there, vec![status("ant", "a-1", 130)]);
        let cells = |fleet: &Fleet, now| {
            let line = screen(fleet, now, (140, 9), "")[2].text.clone();
            line.split_whitespace().skip(1).take(4).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(cells(&fleet, at(1)), ["ready", "30.0/s", "31", "ms"]);
        fleet.take(at(4), &[], Vec::new());
        assert_eq!(cells(&fleet, at(4)), ["gone", "–", "–", "3"]);
    }

    #[test]
    fn counts_that_went_back_give_no_rate_and_old_nodes_are_forgotten() {
        let mut fleet = Fleet::default();
        let there = [alive("ant", "a-1")];
        fleet.take(at(0), &there, vec![status("ant", "a-1", 100)]);
        fleet.take(at(1), &there, vec![status("ant", "a-1", 40)]);
        assert!(screen(&fleet, at(1), (100, 9), "")[2].text.contains(" – "));
        fleet.take(at(59), &[], Vec::new());
        assert_eq!(fleet.len(), 1);
        fleet.take(at(62), &[], Vec::new());
        assert!(fleet.is_empty());
        assert_eq!(texts(&screen(&fleet, at(62), (100, 9), "no link"))[2], "no node is there");
    }

    #[test]
    fn whatever_the_terminal_and_the_texts_the_lines_fit() {
        let mut fleet = Fleet::default();
        let mut loud = status(&"long\u{1b}[31m".repeat(9), "a-1", 1);
        loud["last_answer"]["reason"] = "\n\u{7}x".repeat(300).into();
        let many: Vec<(String, Claimant)> = (0..300).map(|i| alive(&format!("r{i:03}"), "s")).collect();
        fleet.take(at(0), &many, vec![loud]);
        assert_eq!((fleet.len(), fleet.left_out), (NODES_MAX, 45));
        for (width, height) in [(0, 0), (1, 1), (20, 3), (80, 24), (300, 400)] {
            for step in 0..3 {
                let lines = screen(&fleet, at(1), (width, height), "x");
                assert!(lines.len() <= height, "{width}x{height}");
                assert!(
                    lines
                        .iter()
                        .all(|l| l.text.chars().count() <= width && !l.text.contains(char::is_control))
                );
                fleet.choose(step < 2);
            }
        }
        (0..400).for_each(|_| fleet.choose(true));
        let lines = screen(&fleet, at(1), (100, 10), "x");
        assert!(lines.iter().any(|l| l.style == Style::Chosen), "the chosen one is in view: {lines:?}");
    }
}
