//! What happens as messages: a thread of its own takes it from a [`Tap`], as the page does.

use super::channels::{Channels, Topic};
use super::messages::{Colour, Level, Scene, compressed_image, log, poses_in_frame};
use crate::context::spread;
use crate::planar::{Pose2, point_from};
use crate::record::RecordSender;
use crate::senses::Sense;
use crate::view::story::{CAMERA_PNG_PIXELS_MAX, CAMERA_WIDTH, browsers_read, camera_picture, picture_file};
use crate::view::tap::{Evidence, GoalEvent, Remembered, Surroundings, Tap, Waiting};
use crate::view::words::evidence_in_words;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::clock;
use mindseye_bridge::msg::{CompressedImageView, HeaderView, ImageView};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// New messages are made this often at most; imagined pictures follow each other at this pace.
const PERIOD: Duration = Duration::from_millis(100);
/// The way driven is sent this often at most, with so many poses.
const WAY_PERIOD: Duration = Duration::from_secs(1);
const WAY_POSES_MAX: usize = 400;
/// Pictures of an imagined drive that are sent: an even choice of more.
const IMAGINED_MAX: usize = 64;
/// Corners of an ellipse.
const CORNERS: u32 = 36;
/// Square of the distance in spreads within which 90 % of a plane's normal distribution lies.
const ELLIPSE_90: f64 = 4.605;

const GREEN: Colour = [0.15, 0.65, 0.3, 0.9];
const ORANGE: Colour = [0.9, 0.4, 0.1, 0.9];
const RED: Colour = [0.8, 0.15, 0.15, 0.9];
const GREY: Colour = [0.5, 0.5, 0.55, 0.8];

/// A picture that waits for its turn.
struct Picture {
    kind: &'static str,
    file: Vec<u8>,
}

pub(super) struct Feed {
    tap: Arc<Tap>,
    channels: Arc<Channels>,
    record: Option<RecordSender>,
    /// Where poses are, unless an answer says otherwise.
    odom_frame: String,
    surroundings: Surroundings,
    evidence: Option<Box<Evidence>>,
    imagined: VecDeque<Picture>,
    way: Option<Vec<Pose2>>,
    way_due: Instant,
    faults: Vec<String>,
}

impl Feed {
    pub fn new(
        tap: Arc<Tap>,
        channels: Arc<Channels>,
        record: Option<RecordSender>,
        odom_frame: String,
    ) -> Self {
        Self {
            tap,
            channels,
            record,
            odom_frame,
            surroundings: Surroundings::default(),
            evidence: None,
            imagined: VecDeque::new(),
            way: None,
            way_due: Instant::now(),
            faults: Vec::new(),
        }
    }

    /// Until the tap is closed; what waits then is sent.
    pub fn run(mut self) {
        loop {
            let began = Instant::now();
            let taken = self.tap.take(PERIOD);
            let is_open = taken.is_some();
            self.take(taken.map_or_else(|| self.tap.rest(), |(waiting, _)| waiting));
            if !is_open {
                break;
            }
            std::thread::sleep(PERIOD.saturating_sub(began.elapsed()));
        }
        self.send_way();
        let mut at = clock::now().as_nanos();
        while let Some(picture) = self.imagined.pop_front() {
            self.send_imagined(at, &picture);
            at += PERIOD.as_nanos() as i64;
        }
    }

    fn send(&self, topic: Topic, stamp_ns: i64, message: Vec<u8>) {
        if let Some(record) = &self.record {
            record.foreign(topic.name(), topic.schema(), stamp_ns, message.clone());
        }
        self.channels.put(topic, stamp_ns, message);
    }

    fn say(&self, level: Level, words: &str) {
        let now = clock::now().as_nanos();
        self.send(Topic::Log, now, log(now, level, "mindseye", words));
    }

    fn take(&mut self, waiting: Waiting) {
        if let Some((sense, cdr)) = &waiting.camera {
            self.camera(*sense, cdr);
        }
        for change in &waiting.memory {
            match change {
                Remembered::Evicted(eviction) => {
                    self.say(
                        Level::Debug,
                        &format!("moment {} left the memory: {eviction}", eviction.index()),
                    );
                }
                Remembered::Cleared => {
                    self.say(Level::Warning, "the memory was cleared: the camera's stream began anew");
                }
                Remembered::Stored { .. } => {}
            }
        }
        for (_, event) in waiting.goals {
            self.goal(event);
        }
        self.way = waiting.path.or(self.way.take());
        if self.way_due <= Instant::now() {
            self.way_due = Instant::now() + WAY_PERIOD;
            self.send_way();
        }
        if let Some(status) = waiting.status {
            self.status(&status);
        }
        if let Some(picture) = self.imagined.pop_front() {
            self.send_imagined(clock::now().as_nanos(), &picture);
        }
    }

    fn camera(&self, sense: Sense, cdr: &[u8]) {
        let send = |header: &HeaderView<'_>, kind: &str, file: &[u8]| {
            let stamp = header.stamp.timestamp().as_nanos();
            let message = compressed_image(stamp, header.frame_id, kind, file);
            self.send(Topic::Camera, clock::now().as_nanos(), message);
        };
        let made = || picture_file(&camera_picture(sense, cdr, CAMERA_WIDTH)?, CAMERA_PNG_PIXELS_MAX);
        if sense == Sense::Image {
            let Ok(image) = ImageView::decode(cdr) else { return };
            if let Some((kind, file)) = made() {
                send(&image.header, kind, &file);
            }
        } else if let Ok(image) = CompressedImageView::decode(cdr) {
            if browsers_read(image.data) {
                let kind = if image.data.starts_with(b"\x89PNG") { "png" } else { "jpeg" };
                send(&image.header, kind, image.data);
            } else if let Some((kind, file)) = made() {
                send(&image.header, kind, &file);
            }
        }
    }

    fn send_way(&mut self) {
        let Some(way) = self.way.take() else { return };
        let now = clock::now().as_nanos();
        let poses = spread(way.len(), WAY_POSES_MAX).into_iter().map(|i| way[i]);
        self.send(Topic::Way, now, poses_in_frame(now, &self.odom_frame, poses));
    }

    fn send_imagined(&self, stamp_ns: i64, picture: &Picture) {
        let message = compressed_image(stamp_ns, "imagined_camera", picture.kind, &picture.file);
        self.send(Topic::Imagined, stamp_ns, message);
    }

    fn goal(&mut self, event: GoalEvent) {
        match event {
            GoalEvent::Asked { words, .. } => self.say(Level::Info, &format!("asked: {words}")),
            GoalEvent::Begun { words, memory, surroundings, .. } => {
                self.say(Level::Debug, &format!("begun: {words} ({} moments remembered)", memory.len()));
                (self.surroundings, self.evidence) = (surroundings, None);
                self.imagined.clear();
            }
            GoalEvent::Done { draft: Some(draft), .. } => {
                if let Some(p) = &draft.pose {
                    self.say(Level::Debug, &format!("first guess: x {:.2} m, y {:.2} m", p.x, p.y));
                }
            }
            GoalEvent::Done { .. } => {}
            GoalEvent::Evidence(evidence) => {
                self.imagined = spread(evidence.frames.len(), IMAGINED_MAX)
                    .into_iter()
                    .filter_map(|i| picture_file(&evidence.frames[i], CAMERA_PNG_PIXELS_MAX))
                    .map(|(kind, file)| Picture { kind, file })
                    .collect();
                self.evidence = Some(evidence);
            }
            GoalEvent::Answered(answer) => self.answered(&answer),
        }
    }

    fn answered(&mut self, answer: &Answer) {
        let reason = answer.reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
        let level = if answer.status == Status::Found { Level::Info } else { Level::Warning };
        self.say(level, &format!("answer: {}{reason}", answer.status));
        let evidence = self.evidence.take();
        for sentence in evidence.iter().flat_map(|e| evidence_in_words(e, Some(answer))) {
            self.say(Level::Debug, &sentence);
        }
        let frame = answer.pose.as_ref().map_or(&self.odom_frame, |pose| &pose.frame);
        let now = clock::now().as_nanos();
        let goal = answer.pose.iter().map(|pose| pose.pose2());
        self.send(Topic::Goal, now, poses_in_frame(now, frame, goal));
        let way = evidence.iter().flat_map(|e| e.path.iter().copied());
        self.send(Topic::Drive, now, poses_in_frame(now, frame, way));
        let mut scene = Scene::new(now, frame);
        draw(&mut scene, answer, evidence.as_deref(), &self.surroundings);
        self.send(Topic::Scene, now, scene.bytes());
    }

    /// What is wrong with the senses, when it changed.
    fn status(&mut self, document: &str) {
        let document: serde_json::Value = serde_json::from_str(document).unwrap_or_default();
        let texts = document["faults"].as_array().into_iter().flatten().filter_map(|f| f.as_str());
        let faults: Vec<String> = texts.map(str::to_owned).collect();
        for fault in faults.iter().filter(|fault| !self.faults.contains(fault)) {
            self.say(Level::Warning, fault);
        }
        self.faults = faults;
    }
}

/// What the page's map shows.
fn draw(scene: &mut Scene<'_>, answer: &Answer, evidence: Option<&Evidence>, around: &Surroundings) {
    if !around.landmarks.is_empty() {
        scene.dots("landmarks", &around.landmarks, GREY);
    }
    for (i, (class, at)) in around.things.iter().enumerate() {
        scene.ball(&format!("seen {i}"), *at, 0.15, GREY, class);
    }
    if let Some(evidence) = evidence {
        let way: Vec<(f64, f64)> = evidence.path.iter().map(|p| (p.x, p.y)).collect();
        if way.len() > 1 {
            scene.line("imagined way", &way, false, ORANGE);
        }
        let origin = evidence.origin.unwrap_or_default();
        let lifted = evidence.lifted.as_ref();
        let witnesses =
            lifted.map(|l| [("plan", l.estimate.plan), ("memory", l.estimate.memory), ("drive", l.rollout)]);
        for (name, witness) in witnesses.into_iter().flatten() {
            if let Some(w) = witness {
                scene.ball(name, point_from(origin, w.object.0, w.object.1), 0.1, GREY, name);
            }
        }
        if let Some(object) = evidence.object {
            scene.ball("thing", object, 0.3, RED, "the thing");
        }
    }
    if let Some(pose) = &answer.pose {
        scene.arrow("goal", pose.pose2(), GREEN);
        if let Some([a, b, .., d]) = answer.covariance.as_deref().and_then(|c| c.get(..8)) {
            scene.line("goal, 90 %", &ellipse((pose.x, pose.y), *a, *b, *d), true, GREEN);
        }
    }
}

/// The corners of the ellipse that holds 90 % of a normal distribution with variances `a` and `d` and covariance `b`.
fn ellipse((x, y): (f64, f64), a: f64, b: f64, d: f64) -> Vec<(f64, f64)> {
    let (mean, apart) = ((a + d) / 2.0, ((a - d) / 2.0).hypot(b));
    let axis = |variance: f64| (variance.max(0.0) * ELLIPSE_90).sqrt();
    let (long, short) = (axis(mean + apart), axis(mean - apart));
    let turn = Pose2::new(x, y, 0.5 * (2.0 * b).atan2(a - d));
    let corner = |i: u32| {
        let (sin, cos) = (std::f64::consts::TAU * f64::from(i) / f64::from(CORNERS)).sin_cos();
        point_from(turn, long * cos, short * sin)
    };
    (0..CORNERS).map(corner).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_lie_on_the_ellipse_of_ninety_percent() {
        // Variances 0.04 and 0.01 with a covariance: every corner is as many spreads away.
        let (a, b, d) = (0.04, 0.012, 0.01);
        let determinant = a * d - b * b;
        let corners = ellipse((3.0, -1.0), a, b, d);
        assert_eq!(corners.len(), CORNERS as usize);
        for (x, y) in corners {
            let (x, y) = (x - 3.0, y + 1.0);
            let squared = (d * x * x - 2.0 * b * x * y + a * y * y) / determinant;
            assert!((squared - ELLIPSE_90).abs() < 1e-9, "{squared}");
        }
        // A point has none.
        assert!(ellipse((1.0, 2.0), 0.0, 0.0, 0.0).iter().all(|p| *p == (1.0, 2.0)));
    }
}
