//! The mind's thread: one goal after the other.

use super::figures::{Figures, lock};
use super::requests::Inbox;
use super::{MonotonicClock, NodeEvent, Observer};
use crate::agent::Ticket;
use crate::ground::{Grounded, Mind, Stage, ground, look};
use crate::imagine::{Budget, Flow};
use crate::planar::Pose2;
use crate::senses::ContextHandle;
use mindseye_bridge::clock;
use mindseye_bridge::goal::Goal;
use mindseye_bridge::time::TimeDelta;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};

/// A goal to work on.
pub(super) struct Job {
    pub ticket: Ticket,
    pub goal: Box<Goal>,
    pub work: Work,
}

/// What to do about a goal.
pub(super) enum Work {
    /// Answer it.
    Ground {
        /// When the answer must be there.
        until: TimeDelta,
    },
    /// Look at it once more, from where a drive ended.
    Look,
}

/// Longest look: a newer goal may wait.
const LOOK_WITHIN: TimeDelta = TimeDelta::from_millis(1000);

/// What the thread holds.
pub(super) struct Worker {
    pub mind: Box<dyn Mind>,
    pub context: ContextHandle,
    pub jobs: Receiver<Job>,
    pub inbox: SyncSender<Inbox>,
    /// Ticket of the goal that is still wanted; 0 = none.
    pub wanted: Arc<AtomicU64>,
    pub figures: Arc<Figures>,
    pub observer: Arc<Observer>,
}

impl Worker {
    /// Until nobody sends jobs any more.
    pub fn run(mut self) {
        while let Ok(job) = self.jobs.recv() {
            let ticket = job.ticket;
            let done = match job.work {
                Work::Ground { until } if self.wanted.load(Ordering::Relaxed) == ticket.0 => {
                    Inbox::Done { ticket, grounded: self.work(&job, until) }
                }
                Work::Look if self.mind.spec().lift.is_some() => {
                    Inbox::Looked { ticket, base_from_goal: self.look(&job.goal) }
                }
                Work::Ground { .. } | Work::Look => continue,
            };
            if self.inbox.send(done).is_err() {
                break;
            }
        }
    }

    fn look(&mut self, goal: &Goal) -> Option<Pose2> {
        let scene = self.context.scene()?;
        let budget = Budget { clock: &MonotonicClock, until: Some(clock::monotonic() + LOOK_WITHIN) };
        look(self.mind.as_mut(), &scene, goal, budget)
    }

    fn work(&mut self, job: &Job, until: TimeDelta) -> Option<Box<Grounded>> {
        let scene = self.context.scene()?;
        (self.observer)(NodeEvent::Begun { goal: &job.goal, scene: &scene, until: Some(until) });
        let (wanted, observer, inbox) = (&self.wanted, &self.observer, &self.inbox);
        let mut progress = |stage: Stage<'_>| {
            if let Stage::Draft(answer) = stage {
                let draft = Inbox::Draft { ticket: job.ticket, answer: Box::new(answer.clone()) };
                // A draft is a courtesy; when the inbox is full it is not worth waiting.
                let _ = inbox.try_send(draft);
            }
            observer(NodeEvent::Stage(stage));
            if wanted.load(Ordering::Relaxed) == job.ticket.0 { Flow::Continue } else { Flow::Stop }
        };
        let result =
            ground(self.mind.as_mut(), &scene, &job.goal, &MonotonicClock, Some(until), &mut progress);
        let grounded = Box::new(result.ok()?);
        let mut profile = lock(&self.figures.profile);
        for (stage, millis) in &grounded.answer.timings_ms {
            profile.push(stage, *millis);
        }
        for millis in &grounded.step_ms {
            profile.push("denoise_step", *millis);
        }
        drop(profile);
        (self.observer)(NodeEvent::Evidence(&grounded));
        Some(grounded)
    }
}
