//! A report to send: the page as one file that opens anywhere, with what a viewer would have been sent, a recording of the
//! camera, and how to do it again.

use super::hub::{Hub, Known, Payload, Slot};
use super::story::{CAMERA_PNG_PIXELS_MAX, CAMERA_WIDTH, Past, Story, camera_picture, picture_file};
use super::tap::Tap;
use super::{About, hello};
use crate::mind::LatentDecoder;
use crate::node::NodeEvent;
use crate::planar::Pose2;
use crate::senses::is_camera;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mindseye_base::file::sha256_bytes;
use mindseye_base::sync::lock;
use mindseye_bridge::clock;
use mindseye_bridge::time::{TimeDelta, Timestamp};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Most pictures of the recording, and bytes of them; when there are more every second one is left out.
const VIDEO_FRAMES_MAX: usize = 320;
const VIDEO_BYTES_MAX: usize = 2_400_000;
/// Between two pictures of the recording at first.
const VIDEO_PERIOD: TimeDelta = TimeDelta::from_millis(100);
/// Most bytes of goals before the newest one.
const EARLIER_GOALS_BYTES_MAX: usize = 500_000;

/// What only whoever makes the report knows.
#[derive(Clone, Debug, Default)]
pub struct ReportFacts {
    /// The command that does it again.
    pub command: String,
    /// Tables with their titles: configuration, hashes, versions.
    pub tables: Vec<(String, Vec<(String, String)>)>,
}

/// Hears what happens, and makes a report of it. Its memory is bounded whatever the length of the recording.
pub struct Reporter {
    hub: Arc<Hub>,
    tap: Arc<Tap>,
    inner: Mutex<Inner>,
}

struct Inner {
    story: Story,
    past: Past,
    video: Video,
    asked_at: Option<Timestamp>,
}

/// One picture of the recording, as a file.
struct Shot {
    stamp: Timestamp,
    pose: Option<Pose2>,
    kind: &'static str,
    file: Vec<u8>,
}

/// An even choice of the camera's pictures.
struct Video {
    shots: Vec<Shot>,
    bytes: usize,
    period: TimeDelta,
}

impl Video {
    /// Whether a picture of this stamp is taken; a clock that jumped back begins anew.
    fn wants(&self, stamp: Timestamp) -> bool {
        self.shots.last().is_none_or(|last| stamp < last.stamp || stamp.since(last.stamp) >= self.period)
    }

    fn push(&mut self, shot: Shot) {
        self.bytes += shot.file.len();
        self.shots.push(shot);
        while self.shots.len() > 1 && (self.shots.len() > VIDEO_FRAMES_MAX || self.bytes > VIDEO_BYTES_MAX) {
            let mut place = 0;
            self.shots.retain(|_| {
                place += 1;
                place % 2 == 1
            });
            self.bytes = self.shots.iter().map(|shot| shot.file.len()).sum();
            self.period = TimeDelta(self.period.0.saturating_mul(2));
        }
    }

    fn document(&self, asked_at: Option<Timestamp>) -> Value {
        let Some(first) = self.shots.first() else { return json!({"frames": [], "asked_s": null}) };
        let seconds = |stamp: Timestamp| (stamp.since(first.stamp).as_secs_f64() * 1e3).round() / 1e3;
        let frames: Vec<Value> = self
            .shots
            .iter()
            .map(|s| json!([seconds(s.stamp), s.pose.map(super::story::pose), data_url(s.kind, &s.file)]))
            .collect();
        json!({"frames": frames, "asked_s": asked_at.map(seconds)})
    }
}

impl Reporter {
    /// A reporter that has heard nothing yet. Candidates are shown where a `decoder` is given.
    pub fn new(about: &About, decoder: Option<LatentDecoder>) -> Self {
        let hub = Arc::new(Hub::default());
        hub.put(Slot::Hello, hello(about, true));
        let tap = Arc::new(Tap::new(hub.clone(), decoder.is_some()));
        let past = Past::default();
        let story = Story::new(hub.clone(), tap.clone(), decoder, past.clone());
        let video = Video { shots: Vec::new(), bytes: 0, period: VIDEO_PERIOD };
        Self { hub, tap, inner: Mutex::new(Inner { story, past, video, asked_at: None }) }
    }

    /// Hears an event. Pictures of the recording are made smaller on the caller's thread, ten a second of the recording's
    /// time at most.
    pub fn hear(&self, event: NodeEvent<'_>) {
        let mut inner = lock(&self.inner);
        let Inner { story, video, asked_at, .. } = &mut *inner;
        match event {
            NodeEvent::Sensed { sense, cdr, outcome, pose, .. } if is_camera(sense) => {
                if let Some(stamp) = outcome.frame.filter(|stamp| video.wants(*stamp))
                    && let Some(picture) = camera_picture(sense, cdr, CAMERA_WIDTH)
                    && let Some((kind, file)) = picture_file(&picture, CAMERA_PNG_PIXELS_MAX)
                {
                    video.push(Shot { stamp, pose, kind, file });
                }
            }
            NodeEvent::Begun { scene, .. } => *asked_at = Some(scene.captured_at),
            _ => {}
        }
        self.tap.hear(event);
        if let Some((waiting, _)) = self.tap.take(Duration::ZERO) {
            // Nobody watches: there is no camera's message among it.
            let _ = story.absorb(waiting);
        }
    }

    /// The report so far, as an HTML file.
    pub fn html(&self, facts: &ReportFacts) -> String {
        let mut inner = lock(&self.inner);
        inner.story.finish();
        let mut messages = Vec::new();
        for payload in self.hub.newer(&mut Known::new()) {
            if let Payload::Document(text) = payload {
                messages.push(text);
            }
        }
        let mut earlier = Vec::new();
        let mut room = EARLIER_GOALS_BYTES_MAX;
        for (number, goal) in lock(&inner.past).iter().rev().skip(1) {
            room = room.saturating_sub(goal.len());
            if room > 0 {
                earlier.push(format!("\"{number}\":{goal}"));
            }
        }
        // Documents are put in as they are: they may be large.
        let data = format!(
            "{{\"made_ms\":{},\"command\":{},\"facts\":{},\"video\":{},\"goals\":{{{}}},\"messages\":[{}]}}",
            clock::now().as_nanos() / 1_000_000,
            json!(facts.command),
            json!(facts.tables),
            inner.video.document(inner.asked_at),
            earlier.join(","),
            messages.join(",")
        );
        page(&data)
    }
}

/// A picture's file as an address that holds it; `kind` is `png` or `jpeg`.
pub fn data_url(kind: &str, file: &[u8]) -> String {
    format!("data:image/{kind};base64,{}", STANDARD.encode(file))
}

/// As a policy names a script or a style.
fn hash(text: &str) -> String {
    format!("'sha256-{}'", STANDARD.encode(sha256_bytes(text.as_bytes())))
}

/// A document without a script in the page's style and `more`; `title` and `body` are HTML. Its policy lets nothing be
/// fetched.
pub fn still_page(title: &str, more: &str, body: &str) -> String {
    let style = format!("{}\n{more}\n", include_str!("page.css"));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"dark light\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src {}; img-src data:\">\n\
         <title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
        hash(&style)
    )
}

/// What the page's head asks for, and what stands in its place in a file.
const LINKS: &str = "<link rel=\"stylesheet\" href=\"page.css\">\n<script src=\"page.js\" defer></script>\n";

/// The page's files and a JSON document as one file. Its policy lets nothing run but the page's own script, and nothing be
/// fetched.
fn page(data: &str) -> String {
    let (html, css, js) = (include_str!("page.html"), include_str!("page.css"), include_str!("page.js"));
    let head = format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src {}; style-src {}; \
         img-src data:; base-uri 'none'; form-action 'none'\">\n<style>{css}</style>\n",
        hash(js),
        hash(css)
    );
    // Within a JSON document "<" stands in texts only: written so it can end no element.
    let data = data.replace('<', "\\u003c");
    let tail = format!(
        "<script type=\"application/json\" id=\"report\">{data}</script>\n<script>{js}</script>\n</body>"
    );
    html.replacen(LINKS, &head, 1).replacen("</body>", &tail, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_is_thinned_evenly_and_stays_within_its_bounds() {
        let mut video = Video { shots: Vec::new(), bytes: 0, period: VIDEO_PERIOD };
        // A camera of 30 Hz for ten minutes, 9 kB a picture.
        for i in 0..18_000i64 {
            let stamp = Timestamp(1_700_000_000_000_000_000 + i * 33_333_333);
            if video.wants(stamp) {
                video.push(Shot { stamp, pose: None, kind: "jpeg", file: vec![0; 9000] });
            }
        }
        assert!(video.bytes <= VIDEO_BYTES_MAX && video.shots.len() <= VIDEO_FRAMES_MAX);
        assert!(video.shots.len() > VIDEO_FRAMES_MAX / 4, "{}", video.shots.len());
        let steps: Vec<f64> =
            video.shots.windows(2).map(|w| w[1].stamp.since(w[0].stamp).as_secs_f64()).collect();
        let (least, most) = steps.iter().fold((f64::MAX, 0.0f64), |(a, b), s| (a.min(*s), b.max(*s)));
        assert!(most < 2.1 * least, "{least} {most}");
        assert!(video.shots.last().unwrap().stamp.since(video.shots[0].stamp).as_secs_f64() > 590.0);
        // A clock that jumped back is no end of the recording.
        assert!(video.wants(Timestamp(0)));
    }

    #[test]
    fn the_file_holds_the_page_and_nothing_ends_its_data() {
        let file = page("{\"command\": \"</script><script>alert(1)</script>\"}");
        assert!(!file.contains("page.css") && !file.contains("src=\"page.js\""));
        assert_eq!(file.matches("</script>").count(), 2, "the data's and the page's own");
        assert_eq!(file.matches("</style>").count(), 1);
        assert!(file.contains("\\u003c/script>\\u003cscript>alert(1)"));
        let js = include_str!("page.js");
        assert!(file.contains(&format!("<script>{js}</script>\n</body>")));
        assert!(file.contains(&format!("script-src {}; style-src 'sha256-", hash(js))));
        for elsewhere in ["http://", "https://", "@import", "url("] {
            assert!(!file.contains(elsewhere), "{elsewhere}");
        }
    }
}
