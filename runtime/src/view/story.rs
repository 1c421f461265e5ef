//! What is shown, as documents: the camera, the memory, the map, and the goals with a bounded history. One thread of
//! its own makes them out of what the [`Tap`] took.

use super::hub::{Hub, Payload, Slot};
use super::report::data_url;
use super::tap::{Estimate, Evidence, GoalEvent, Remembered, Surroundings, Tap, Waiting, no_wider, small};
use super::words::evidence_in_words;
use crate::image::RgbImage;
use crate::lift::Witness;
use crate::mind::LatentDecoder;
use crate::planar::{Pose2, point_from};
use crate::senses::Sense;
use mindseye_bridge::answer::Answer;
use mindseye_bridge::clock;
use mindseye_bridge::image::{Limits, RawImage, decode_compressed_rgb8, decode_raw_rgb8, encode_jpeg};
use mindseye_bridge::msg::{CompressedImageView, ImageView};
use mindseye_bridge::time::TimeDelta;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most goals that are kept.
pub const GOALS_KEPT: usize = 20;
/// Most bytes of pictures of past goals; the newest goal is kept whatever it takes.
const GOAL_BYTES_KEPT: usize = 6 << 20;
/// Candidates of which a drive is shown.
const CANDIDATES_SHOWN: usize = 8;
/// Pixels of all frames of one drive that is shown; longer drives leave out frames.
const DRIVE_PIXELS_MAX: usize = 300_000;
/// Moments that are shown after they were evicted.
const EVICTED_SHOWN: usize = 12;
/// Strips of more pixels are JPEG files: small pictures side by side would run into each other.
const STRIP_PNG_PIXELS_MAX: usize = 40_000;
/// The camera's pictures of more pixels are JPEG files: of fewer every pixel counts.
pub(super) const CAMERA_PNG_PIXELS_MAX: usize = 8_000;
/// Quality of pictures that are made for people.
const JPEG_QUALITY: u8 = 80;
/// Widest camera picture that is sent, and the largest file that is sent as it came.
pub(super) const CAMERA_WIDTH: usize = 320;
const CAMERA_BYTES_MAX: usize = 300_000;
/// New contents are made this often at most.
const PERIOD: Duration = Duration::from_millis(100);
/// Without viewers the thread looks this often.
const IDLE_PERIOD: Duration = Duration::from_millis(500);
/// Decoding an estimate may take this share of the time.
const DECODE_SHARE: u32 = 10;

/// Pictures side by side in one file, as the page takes them.
#[derive(Clone, Debug, Default)]
struct Strip {
    url: Arc<str>,
    frames: usize,
    width: usize,
    height: usize,
}

impl Strip {
    /// Pictures that differ in size from the first are left out.
    fn of<'a>(pictures: impl IntoIterator<Item = &'a RgbImage>) -> Self {
        let mut pictures: Vec<&RgbImage> = pictures.into_iter().collect();
        let Some(first) = pictures.first().copied() else { return Self::default() };
        let (width, height) = (first.width, first.height);
        pictures.retain(|p| (p.width, p.height) == (width, height));
        let mut all = RgbImage::filled(width * pictures.len(), height, [0; 3]);
        for (i, picture) in pictures.iter().enumerate() {
            all.paste_scaled(picture, i * width, 0, 1);
        }
        let (kind, file) = picture_file(&all, STRIP_PNG_PIXELS_MAX).unwrap_or_default();
        Self { url: data_url(kind, &file).into(), frames: pictures.len(), width, height }
    }

    fn document(&self) -> Value {
        json!({"url": &*self.url, "frames": self.frames, "width": self.width, "height": self.height})
    }
}

/// The frames of a drive, or every so many of them.
#[derive(Clone, Debug, Default)]
struct Drive {
    strip: Strip,
    every: usize,
    total: usize,
}

impl Drive {
    fn of(frames: &[RgbImage]) -> Self {
        let pixels: usize = frames.iter().map(|f| f.width * f.height).sum();
        let every = pixels.div_ceil(DRIVE_PIXELS_MAX).max(1);
        // The last frame shows where the drive ends.
        let kept: Vec<&RgbImage> = frames.iter().rev().step_by(every).collect();
        Self { strip: Strip::of(kept.into_iter().rev()), every, total: frames.len() }
    }

    fn document(&self) -> Value {
        let mut document = self.strip.document();
        (document["every"], document["total"]) = (self.every.into(), self.total.into());
        document
    }
}

#[derive(Debug)]
struct Candidate {
    step: usize,
    steps: usize,
    drive: Drive,
}

/// One goal.
#[derive(Debug, Default)]
struct Record {
    number: u64,
    id: String,
    words: String,
    /// Milliseconds since the Unix epoch.
    asked_ms: i64,
    asked: TimeDelta,
    begun: Option<TimeDelta>,
    ended: Option<TimeDelta>,
    until: Option<TimeDelta>,
    /// Stages in the order in which they began: what, done, of, milliseconds since the goal came.
    stages: Vec<(&'static str, usize, usize, f64)>,
    memory: Vec<u64>,
    surroundings: Surroundings,
    planned: usize,
    candidates: BTreeMap<usize, Candidate>,
    draft: Option<Box<Answer>>,
    answer: Option<Box<Answer>>,
    evidence: Option<Box<Evidence>>,
    /// The moments that were used, as they looked.
    used: Strip,
    used_index: Vec<u64>,
    /// The way driven until the end.
    path: Vec<Pose2>,
}

fn rounded(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

fn points(path: &[Pose2]) -> Vec<[f64; 2]> {
    path.iter().map(|p| [rounded(p.x), rounded(p.y)]).collect()
}

pub(super) fn pose(p: Pose2) -> [f64; 3] {
    [rounded(p.x), rounded(p.y), rounded(p.yaw)]
}

impl Record {
    fn bytes(&self) -> usize {
        self.used.url.len() + self.candidates.values().map(|c| c.drive.strip.url.len()).sum::<usize>()
    }

    /// Without pictures of drives.
    fn document(&self, now: TimeDelta) -> Value {
        let end = self.ended.unwrap_or(now);
        let millis = |t: TimeDelta| (t - self.asked).as_millis_f64().round();
        let evidence = self.evidence.as_deref();
        let shown = evidence.filter(|e| !e.frames.is_empty());
        let lifted = evidence.and_then(|e| e.lifted.as_ref());
        let origin = evidence.and_then(|e| e.origin).unwrap_or_default();
        let witness = |name: &str, w: Option<Witness>| {
            w.map(|w| {
                let (x, y) = point_from(origin, w.object.0, w.object.1);
                json!({"name": name, "pose": pose(origin.compose(w.pose)), "object": [rounded(x), rounded(y)],
                       "sigma_m": rounded(w.sigma_m)})
            })
        };
        let witnesses: Vec<Value> = lifted
            .map(|l| {
                let e = &l.estimate;
                [witness("plan", e.plan), witness("memory", e.memory), witness("drive", l.rollout)]
            })
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        json!({
            "kind": "goal",
            "number": self.number,
            "id": self.id,
            "words": self.words,
            "asked_ms": self.asked_ms,
            "waited_ms": self.begun.map(millis),
            "elapsed_ms": millis(end),
            "deadline_ms": self.until.map(millis),
            "over": self.ended.is_some(),
            "stages": self.stages.iter().map(|(what, done, of, ms)| json!([what, done, of, ms.round()]))
                .collect::<Vec<_>>(),
            "remembered": self.memory.len(),
            "used": self.used.document(),
            "used_index": self.used_index,
            "planned": self.planned,
            "candidates": self.candidates.iter().map(|(i, c)| json!([i, c.step, c.steps])).collect::<Vec<_>>(),
            "chosen": shown.map(|e| e.candidate),
            "witness": shown.map(|e| e.guided.unwrap_or(e.candidate)),
            "evidence": evidence.map(|e| evidence_in_words(e, self.answer.as_deref())),
            "explained": evidence.map(|e| e.explained.iter().map(|(at, v)| json!([at, rounded(*v)])).collect::<Vec<_>>()),
            "draft": self.draft.as_ref().filter(|_| self.answer.is_none()),
            "answer": self.answer,
            "parts": lifted.map(|l| l.parts),
            "witnesses": witnesses,
            "imagined": evidence.map(|e| e.path.iter().copied().map(pose).collect::<Vec<_>>()),
            "object": evidence.and_then(|e| e.object).map(|(x, y)| [rounded(x), rounded(y)]),
            "path": points(&self.path),
            "landmarks": self.surroundings.landmarks.iter().map(|(x, y)| [rounded(*x), rounded(*y)]).collect::<Vec<_>>(),
            "things": self.surroundings.things.iter()
                .map(|(class, (x, y))| json!([class, rounded(*x), rounded(*y)])).collect::<Vec<_>>(),
        })
    }

    fn candidate_document(&self, index: usize) -> Option<Value> {
        let candidate = self.candidates.get(&index)?;
        Some(json!({"kind": "candidate", "goal": self.number, "candidate": index, "step": candidate.step,
                    "steps": candidate.steps, "drive": candidate.drive.document()}))
    }

    /// Everything, for who looks at it later.
    fn whole(&self) -> Value {
        let mut document = self.document(self.ended.unwrap_or(self.asked));
        let drives: Vec<Value> = self.candidates.keys().filter_map(|i| self.candidate_document(*i)).collect();
        document["drives"] = drives.into();
        document
    }
}

/// Past goals as whole documents, for the server.
pub(super) type Past = Arc<Mutex<BTreeMap<u64, Arc<str>>>>;

/// What makes the contents.
pub(super) struct Story {
    pub hub: Arc<Hub>,
    pub tap: Arc<Tap>,
    pub decoder: Option<LatentDecoder>,
    pub past: Past,
    memory: BTreeMap<u64, Moment>,
    evicted: VecDeque<(u64, String, RgbImage)>,
    memory_changed: bool,
    path: Vec<Pose2>,
    here: Option<Pose2>,
    map_changed: bool,
    goals: VecDeque<Record>,
    goals_seen: u64,
    status: Option<Value>,
    status_changed: bool,
    dropped: u64,
    next_decode: Instant,
    estimates: BTreeMap<usize, Estimate>,
}

#[derive(Debug)]
struct Moment {
    picture: RgbImage,
    segment: u32,
    stamp_s: f64,
    pose: Option<Pose2>,
}

impl Story {
    pub fn new(hub: Arc<Hub>, tap: Arc<Tap>, decoder: Option<LatentDecoder>, past: Past) -> Self {
        Self {
            hub,
            tap,
            decoder,
            past,
            memory: BTreeMap::new(),
            evicted: VecDeque::new(),
            memory_changed: true,
            path: Vec::new(),
            here: None,
            map_changed: true,
            goals: VecDeque::new(),
            goals_seen: 0,
            status: None,
            status_changed: true,
            dropped: 0,
            next_decode: Instant::now(),
            estimates: BTreeMap::new(),
        }
    }

    /// Until the page is closed.
    pub fn run(mut self) {
        let mut began = Instant::now();
        loop {
            let watched = self.hub.counts().viewers > 0;
            let Some((waiting, dropped)) = self.tap.take(if watched { PERIOD } else { IDLE_PERIOD }) else {
                return;
            };
            self.status_changed |= std::mem::replace(&mut self.dropped, dropped) != dropped;
            self.take(waiting, watched);
            // A goal wakes the thread at every step: the contents need not change that often.
            std::thread::sleep(PERIOD.saturating_sub(began.elapsed()));
            began = Instant::now();
        }
    }

    fn take(&mut self, waiting: Waiting, watched: bool) {
        let camera = self.absorb(waiting);
        self.decode_estimate(watched);
        if !watched {
            return;
        }
        if let Some(picture) = camera.and_then(|(sense, cdr)| self.camera(sense, &cdr)) {
            self.hub.put(Slot::Camera, Payload::Picture(picture.into()));
        }
        self.show();
    }

    /// Takes in what waits; gives the camera's message among it.
    pub fn absorb(&mut self, waiting: Waiting) -> Option<(Sense, Vec<u8>)> {
        for change in waiting.memory {
            self.remember(change);
        }
        if let Some(path) = waiting.path {
            (self.path, self.map_changed) = (path, true);
        }
        self.map_changed |= waiting.pose.is_some();
        self.here = waiting.pose.or(self.here);
        for (at, event) in waiting.goals {
            self.goal(at, event);
        }
        self.estimates.extend(waiting.estimates);
        if let Some(status) = waiting.status.and_then(|text| serde_json::from_str(&text).ok()) {
            (self.status, self.status_changed) = (Some(status), true);
        }
        waiting.camera
    }

    /// Decodes what is left of the newest goal's candidates, and shows everything.
    pub fn finish(&mut self) {
        while self.decode_one(|e| e.step == e.steps) {}
        self.show();
    }

    /// Shows what has changed.
    fn show(&mut self) {
        if std::mem::take(&mut self.memory_changed) {
            self.put(Slot::Memory, &self.memory_document());
        }
        if std::mem::take(&mut self.map_changed) {
            let map = json!({"kind": "map", "path": points(&self.path), "here": self.here.map(pose)});
            self.put(Slot::Map, &map);
        }
        if std::mem::take(&mut self.status_changed) {
            let status = json!({"kind": "status", "node": self.status, "view": self.hub.counts(),
                                "events_dropped": self.dropped});
            self.put(Slot::Status, &status);
        }
    }

    fn put(&self, slot: Slot, document: &Value) {
        self.hub.put(slot, Payload::Document(document.to_string().into()));
    }

    fn remember(&mut self, change: Remembered) {
        self.memory_changed = true;
        let (evictions, why): (Vec<u64>, String) = match change {
            Remembered::Stored { info, picture } => {
                let moment = Moment {
                    picture,
                    segment: info.segment,
                    stamp_s: info.captured_at.as_nanos() as f64 / 1e9,
                    pose: info.odom_from_base,
                };
                self.memory.insert(info.index, moment);
                return;
            }
            Remembered::Evicted(eviction) => (vec![eviction.index()], eviction.to_string()),
            Remembered::Cleared => {
                (self.memory.keys().copied().collect(), "the camera's stream began anew".into())
            }
        };
        for index in evictions {
            let Some(moment) = self.memory.remove(&index) else { continue };
            self.evicted.push_front((index, why.clone(), moment.picture));
        }
        self.evicted.truncate(EVICTED_SHOWN);
    }

    fn memory_document(&self) -> Value {
        let moments: Vec<Value> = self
            .memory
            .iter()
            .map(|(index, m)| json!([index, m.segment, rounded(m.stamp_s), m.pose.map(pose)]))
            .collect();
        let evicted: Vec<Value> = self.evicted.iter().map(|(index, why, _)| json!([index, why])).collect();
        json!({
            "kind": "memory",
            "moments": moments,
            "pictures": Strip::of(self.memory.values().map(|m| &m.picture)).document(),
            "evicted": evicted,
            "evicted_pictures": Strip::of(self.evicted.iter().map(|(_, _, picture)| picture)).document(),
        })
    }

    /// The goal that an event is about: the one in work, or the newest of that id without an answer.
    fn current(&mut self) -> Option<&mut Record> {
        self.goals.iter_mut().rev().find(|g| g.begun.is_some() && g.answer.is_none())
    }

    fn of_id(&mut self, id: &str) -> Option<&mut Record> {
        self.goals.iter_mut().rev().find(|g| g.id == id && g.answer.is_none())
    }

    fn open(&mut self, id: String, words: String, at: TimeDelta) {
        self.goals_seen += 1;
        let asked_ms = clock::now().as_nanos() / 1_000_000;
        let number = self.goals_seen;
        self.goals.push_back(Record { number, id, words, asked_ms, asked: at, ..Record::default() });
    }

    fn goal(&mut self, at: TimeDelta, event: GoalEvent) {
        match event {
            GoalEvent::Asked { id, words } => self.open(id, words, at),
            GoalEvent::Begun { id, words, until, memory, surroundings } => {
                if self.of_id(&id).is_none() {
                    self.open(id.clone(), words, at);
                }
                self.estimates.clear();
                if let Some(goal) = self.of_id(&id) {
                    (goal.begun, goal.until, goal.memory) = (Some(at), until, memory);
                    goal.surroundings = surroundings;
                }
            }
            GoalEvent::Done { what, done, of, draft } => {
                let Some(goal) = self.current() else { return };
                let ms = (at - goal.asked).as_millis_f64();
                match goal.stages.iter_mut().find(|stage| stage.0 == what) {
                    Some(stage) => *stage = (what, done, of, ms),
                    None => goal.stages.push((what, done, of, ms)),
                }
                goal.draft = draft.or(goal.draft.take());
            }
            GoalEvent::Evidence(evidence) => self.evidence(evidence),
            GoalEvent::Answered(answer) => {
                if self.of_id(&answer.goal_id).is_none() {
                    self.open(answer.goal_id.clone(), String::new(), at);
                }
                let path = self.path.clone();
                if let Some(goal) = self.of_id(&answer.goal_id) {
                    (goal.answer, goal.ended, goal.path) = (Some(answer), Some(at), path);
                }
            }
        }
        self.show_goal();
    }

    fn evidence(&mut self, evidence: Box<Evidence>) {
        let drive = Drive::of(&evidence.frames);
        let number = match self.current() {
            Some(goal) => goal.number,
            None => return,
        };
        let Some(place) = self.goals.iter().position(|g| g.number == number) else { return };
        let index: Vec<u64> =
            evidence.used.iter().filter_map(|p| self.goals[place].memory.get(*p).copied()).collect();
        let used = Strip::of(index.iter().filter_map(|i| self.memory.get(i)).map(|m| &m.picture));
        let goal = &mut self.goals[place];
        (goal.used, goal.used_index) = (used, index);
        if drive.strip.frames > 0 {
            let candidate = evidence.candidate;
            let steps = goal.candidates.get(&candidate).map_or(0, |c| c.steps);
            goal.candidates.insert(candidate, Candidate { step: steps, steps, drive });
            let document = goal.candidate_document(candidate);
            if let Some(document) = document.filter(|_| candidate < CANDIDATES_SHOWN) {
                self.put(Slot::Candidate(candidate), &document);
            }
        }
        self.goals[place].evidence = Some(evidence);
        self.estimates.remove(&self.goals[place].evidence.as_ref().map_or(0, |e| e.candidate));
    }

    /// Shows what a candidate looks like so far, one at a time, as long as that does not take too much of the machine.
    fn decode_estimate(&mut self, watched: bool) {
        let began = Instant::now();
        if began < self.next_decode || self.estimates.is_empty() {
            return;
        }
        // Without a viewer only what a candidate ended as is of use.
        if self.decode_one(|e| watched || e.step == e.steps) {
            self.next_decode = Instant::now() + began.elapsed() * DECODE_SHARE;
        }
    }

    /// Shows what the last candidate that is due looks like so far; false when none was decoded.
    fn decode_one(&mut self, is_due: impl Fn(&Estimate) -> bool) -> bool {
        let due = self.estimates.iter().filter(|(_, e)| is_due(e)).map(|(i, _)| *i).next_back();
        let Some((candidate, estimate)) = due.and_then(|i| self.estimates.remove_entry(&i)) else {
            return false;
        };
        let Some(decoder) = &mut self.decoder else { return false };
        let frames: Vec<RgbImage> = match decoder(&estimate.latents) {
            Ok(frames) => frames.iter().map(small).collect(),
            Err(error) => {
                tracing::debug!(%error, "an estimate cannot be shown");
                return true;
            }
        };
        let drive = Drive::of(&frames);
        let Some(goal) = self.goals.iter_mut().rev().find(|g| g.begun.is_some()) else { return true };
        let settled = goal.evidence.as_ref().is_some_and(|e| e.candidate == candidate);
        if settled || candidate >= CANDIDATES_SHOWN {
            return true;
        }
        let Estimate { step, steps, candidates, .. } = estimate;
        goal.planned = candidates;
        goal.candidates.insert(candidate, Candidate { step, steps, drive });
        if let Some(document) = goal.candidate_document(candidate) {
            self.put(Slot::Candidate(candidate), &document);
        }
        self.show_goal();
        true
    }

    /// The newest goal, and the list of all.
    fn show_goal(&mut self) {
        while self.goals.len() > GOALS_KEPT
            || self.goals.len() > 1 && self.goals.iter().map(Record::bytes).sum::<usize>() > GOAL_BYTES_KEPT
        {
            self.goals.pop_front();
        }
        let Some(newest) = self.goals.back() else { return };
        let now = newest.ended.unwrap_or_else(clock::monotonic);
        self.put(Slot::Goal, &newest.document(now));
        let list: Vec<Value> = self
            .goals
            .iter()
            .map(|g| json!([g.number, g.words, g.answer.as_ref().map(|a| a.status), g.asked_ms]))
            .collect();
        self.put(Slot::History, &json!({"kind": "history", "goals": list}));
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.retain(|number, _| self.goals.iter().any(|g| g.number == *number));
        // Later estimates of a goal may come after its answer.
        for goal in self.goals.iter().rev().take(2).filter(|g| g.ended.is_some()) {
            past.insert(goal.number, goal.whole().to_string().into());
        }
    }

    /// A camera message as a file that a browser reads.
    fn camera(&mut self, sense: Sense, cdr: &[u8]) -> Option<Vec<u8>> {
        if sense == Sense::Compressed
            && let Ok(image) = CompressedImageView::decode(cdr)
            && image.data.len() <= CAMERA_BYTES_MAX
            && browsers_read(image.data)
        {
            return Some(image.data.to_vec());
        }
        Some(picture_file(&camera_picture(sense, cdr, CAMERA_WIDTH)?, CAMERA_PNG_PIXELS_MAX)?.1)
    }
}

/// A picture as a file, and its kind: PNG up to so many pixels, JPEG above.
pub(super) fn picture_file(picture: &RgbImage, png_pixels_max: usize) -> Option<(&'static str, Vec<u8>)> {
    if picture.width * picture.height <= png_pixels_max {
        return Some(("png", picture.to_png().ok()?));
    }
    Some(("jpeg", encode_jpeg(picture, JPEG_QUALITY)?))
}

/// The picture of a camera message, reduced where it is wider than `most`; `None` where it cannot be read.
pub(super) fn camera_picture(sense: Sense, cdr: &[u8], most: usize) -> Option<RgbImage> {
    let (limits, mut pixels) = (Limits::default(), Vec::new());
    let size = if sense == Sense::Image {
        let image = ImageView::decode(cdr).ok()?;
        decode_raw_rgb8(&RawImage::from(&image), &limits, &mut pixels).ok()?
    } else {
        let image = CompressedImageView::decode(cdr).ok()?;
        decode_compressed_rgb8(image.data, &limits, &mut pixels).ok()?
    };
    let picture = RgbImage::from_rgb(size.width as usize, size.height as usize, pixels)?;
    Some(no_wider(&picture, most))
}

/// PNG, or JPEG with its own Huffman tables.
pub(super) fn browsers_read(file: &[u8]) -> bool {
    file.starts_with(b"\x89PNG")
        || (file.starts_with(&[0xff, 0xd8]) && file.windows(2).any(|w| w == [0xff, 0xc4]))
}
