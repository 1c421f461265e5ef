//! What goes out: goal poses, evidence, status.

use super::figures::{Figures, lock};
use crate::agent::Agent;
use crate::config::RobotConfig;
use crate::ground::Grounded;
use crate::image::RgbImage;
use crate::planar::Pose2;
use crate::record::RecordSender;
use crate::senses::ContextHandle;
use mindseye_bridge::answer::Answer;
use mindseye_bridge::clock;
use mindseye_bridge::geometry::Covariance6;
use mindseye_bridge::msg::{
    self, CompressedImage, Cov36, Detection2D, Detection2DArray, DiagnosticArray, DiagnosticStatus, Header,
    KeyValue, Pose, PoseStamped, PoseWithCovariance, PoseWithCovarianceStamped, RosType, StringMsg,
};
use mindseye_bridge::ros::{Claim, Publisher, Qos, RosError, RosSession};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The node's topics.
pub(super) struct Outputs {
    pub goal_pose: Option<Publisher<PoseStamped>>,
    target: Option<Publisher<PoseWithCovarianceStamped>>,
    path: Option<Publisher<msg::Path>>,
    detection: Option<Publisher<Detection2DArray>>,
    imagination: Option<Publisher<CompressedImage>>,
    status: Option<Publisher<StringMsg>>,
    diagnostics: Option<Publisher<DiagnosticArray>>,
    pub record: Option<RecordSender>,
}

impl Outputs {
    /// Declares every topic that has a name.
    pub fn declare(
        session: &RosSession,
        config: &RobotConfig,
        record: Option<RecordSender>,
    ) -> Result<Self, RosError> {
        let t = &config.topics;
        let qos = Qos::default();
        Ok(Self {
            goal_pose: publish(session, &t.goal_pose, &qos)?,
            target: publish(session, &t.target, &qos)?,
            path: publish(session, &t.path, &qos)?,
            detection: publish(session, &t.detection, &qos)?,
            imagination: publish(session, &t.imagination, &qos)?,
            status: publish(session, &t.status, &qos)?,
            diagnostics: publish(session, &t.diagnostics, &qos)?,
            record,
        })
    }

    /// The answer's pose on the goal topic.
    pub fn goal_pose(&self, answer: &Answer, stamp: Timestamp) {
        if let Some(stamped) = stamped_pose(answer, stamp) {
            self.send(self.goal_pose.as_ref(), &stamped);
        }
    }

    fn send<T: RosType>(&self, publisher: Option<&Publisher<T>>, message: &T) {
        let Some(publisher) = publisher else { return };
        let topic = publisher.raw().topic();
        if let Err(error) = publisher.publish(message) {
            tracing::warn!(topic, %error, "not published");
        }
        if let Some(record) = &self.record {
            record.message(topic, clock::now().as_nanos(), message);
        }
    }

    /// Target with covariance, path, box and imagined frames: what the answer rests on.
    pub fn evidence(&self, answer: &Answer, grounded: &Grounded) {
        let stamp = answer.stamp_ns.map_or(Timestamp::ZERO, Timestamp);
        if let (Some(pose), Some(covariance)) = (&answer.pose, &answer.covariance) {
            let mut numbers = Covariance6::unknown().0;
            numbers.iter_mut().zip(covariance).for_each(|(to, from)| *to = *from);
            let target = PoseWithCovarianceStamped {
                header: Header::new(stamp, pose.frame.clone()),
                pose: PoseWithCovariance { pose: Pose::from_pose2(pose.pose2()), covariance: Cov36(numbers) },
            };
            self.send(self.target.as_ref(), &target);
            let path = path_message(stamp, &pose.frame, &grounded.path);
            self.send(self.path.as_ref(), &path);
        }
        if let Some(found) = grounded.found_box {
            let [x0, y0, x1, y1] = found.edges();
            let mut detection =
                Detection2D { header: Header::new(stamp, "imagined_camera"), ..Detection2D::default() };
            detection.bbox.center.position.x = (x0 + x1) / 2.0;
            detection.bbox.center.position.y = (y0 + y1) / 2.0;
            detection.bbox.size_x = x1 - x0;
            detection.bbox.size_y = y1 - y0;
            let message = Detection2DArray { header: detection.header.clone(), detections: vec![detection] };
            self.send(self.detection.as_ref(), &message);
        }
        if let Some(strip) = strip(&grounded.frames)
            && let Ok(data) = strip.to_png()
        {
            let message =
                CompressedImage { header: Header::new(stamp, "imagined_camera"), format: "png".into(), data };
            self.send(self.imagination.as_ref(), &message);
        }
    }

    /// The status document, and the diagnostics beside it.
    pub fn status(&self, document: &serde_json::Value, status: &StatusSource<'_>) {
        self.send(self.status.as_ref(), &StringMsg { data: document.to_string() });
        self.send(self.diagnostics.as_ref(), &status.diagnostics());
    }
}

/// Where the status comes from.
pub(super) struct StatusSource<'a> {
    pub robot: &'a str,
    pub claim: &'a Claim,
    pub agent: &'a Agent,
    pub figures: &'a Arc<Figures>,
    pub context: &'a ContextHandle,
    pub record: Option<&'a RecordSender>,
    pub now: TimeDelta,
}

impl StatusSource<'_> {
    /// One JSON object.
    pub fn document(&self) -> serde_json::Value {
        let camera = *lock(&self.figures.camera);
        let age = self.agent.frame_age(self.now);
        serde_json::json!({
            "robot": self.robot,
            "node": {
                "session": self.claim.own().session,
                "publishes_goals": !self.agent.has_rival(),
                "others_of_this_name": self.claim.others().iter().map(|c| &c.session).collect::<Vec<_>>(),
            },
            "goal": self.agent.active().map(|(_, id)| id),
            "last_answer": self.agent.last_answer(),
            "drive": self.agent.drive(self.now),
            "goals": self.agent.counts(),
            "frames": {
                "age_ms": age.map(|a| a.as_millis_f64()),
                "received": camera.received,
                "dropped": camera.dropped,
                "missed": camera.missed,
                "wrong_type": camera.wrong_hash,
                "ignored": self.figures.ignored_frames.load(Ordering::Relaxed),
                "bad_messages": self.figures.bad_messages.load(Ordering::Relaxed),
                "poses_dropped": self.figures.poses_dropped.load(Ordering::Relaxed),
                "events_dropped": self.figures.events_dropped.load(Ordering::Relaxed),
            },
            "faults": lock(&self.figures.faults).sentences(),
            "context": {
                "latents": self.context.latents(),
                "evicted": self.context.evicted(),
                "frames": *lock(&self.figures.context),
                "segment": *lock(&self.figures.segments),
            },
            "study": self.context.study().map(|study| study.counts()),
            "recording_dropped": self.record.map(RecordSender::dropped),
            "stages_ms": self.figures.profile().summary(),
        })
    }

    fn diagnostics(&self) -> DiagnosticArray {
        let faults = lock(&self.figures.faults).sentences();
        let (level, message) = match self.agent.frame_age(self.now) {
            None => (1, "no camera frame yet".to_owned()),
            Some(age) if age > TimeDelta::from_millis(1000) => {
                (1, format!("the newest camera frame came {:.1} s ago", age.as_secs_f64()))
            }
            Some(_) if !faults.is_empty() => (1, faults.join("; ")),
            Some(_) => (0, "ok".to_owned()),
        };
        let value = |key: &str, value: String| KeyValue { key: key.into(), value };
        let camera = *lock(&self.figures.camera);
        DiagnosticArray {
            header: Header::new(self.agent.robot_time(), ""),
            status: vec![DiagnosticStatus {
                level,
                name: format!("mindseye: {}", self.robot),
                message,
                hardware_id: self.robot.to_owned(),
                values: vec![
                    value("latents", self.context.latents().to_string()),
                    value("frames received", camera.received.to_string()),
                    value("frames dropped", (camera.dropped + camera.missed).to_string()),
                    value("goals", self.agent.counts().goals.to_string()),
                    value("answers", self.agent.counts().answers.to_string()),
                ],
            }],
        }
    }
}

/// The answer's pose as a message; `None` when it has none.
pub(super) fn stamped_pose(answer: &Answer, stamp: Timestamp) -> Option<PoseStamped> {
    let pose = answer.pose.as_ref()?;
    let header = Header::new(stamp, pose.frame.clone());
    Some(PoseStamped { header, pose: Pose::from_pose2(pose.pose2()) })
}

fn publish<T: RosType>(
    session: &RosSession,
    topic: &str,
    qos: &Qos,
) -> Result<Option<Publisher<T>>, RosError> {
    if topic.is_empty() { Ok(None) } else { session.publisher(topic, qos).map(Some) }
}

/// A path of planar poses as a message.
pub fn path_message(stamp: Timestamp, frame: &str, poses: &[Pose2]) -> msg::Path {
    let header = Header::new(stamp, frame);
    let poses =
        poses.iter().map(|p| PoseStamped { header: header.clone(), pose: Pose::from_pose2(*p) }).collect();
    msg::Path { header, poses }
}

/// The last frame of each imagined latent side by side, enlarged to be readable.
pub fn strip(frames: &[RgbImage]) -> Option<RgbImage> {
    let shown: Vec<&RgbImage> = frames.iter().skip(3).step_by(4).collect();
    let first = shown.first()?;
    let scale = (160 / first.width.max(1)).max(1);
    let (w, h) = (first.width * scale, first.height * scale);
    let mut out = RgbImage::filled(w * shown.len() + 4 * (shown.len() - 1), h, [20, 20, 24]);
    for (i, frame) in shown.iter().enumerate() {
        out.paste_scaled(frame, i * (w + 4), 0, scale);
    }
    Some(out)
}
