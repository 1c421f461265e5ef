//! The agent: goals, pre-emption, cancellation, staleness, deadlines, drives and arrivals, as a step function.
//!
//! [`Agent::step`] takes an event and the present time and returns what to do. It reads no clock and starts no
//! thread, so every behaviour can be replayed. The node around it carries the actions out.
//!
//! Invariant: every goal gets exactly one [`Action::Answer`] and, not before it, exactly one [`Action::Reply`].
//! Goals are told apart by [`Ticket`]s; the same client-side id may come twice.
//! Invariant: a client waits only while its drive is followed, and at most 16 drives are.

mod drive;
mod publishing;
#[cfg(test)]
mod tests;

pub use drive::{Arrival, Drive, DriveCommand, DriveLimits, DriveNews, DriveState};
pub use publishing::{GoalStamp, OdometryHeard};

use crate::planar::{Pose2, wrap_angle};
use drive::{Drives, Outcome};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::goal::{Goal, GoalKind};
use mindseye_bridge::time::{TimeDelta, Timestamp};
use publishing::Unpublishable;

/// Of the time allowed for a goal, what may pass until sampling is over: `reserve` is kept back, of a tight deadline at most
/// a fifth.
pub fn time_for_sampling(allowed: TimeDelta, reserve: TimeDelta) -> TimeDelta {
    allowed - reserve.min(TimeDelta(allowed.0 / 5))
}

/// Names one goal inside this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Defaults for what goals leave open, and the limits of publishing.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    /// Time allowed from arrival to answer.
    pub deadline: TimeDelta,
    /// Oldest newest-frame allowed.
    pub max_frame_age: TimeDelta,
    /// Kept back from the deadline for decoding, lifting and publishing.
    pub reserve: TimeDelta,
    /// The same goal pose is published again only after this long.
    pub republish_after: TimeDelta,
    /// Goals that were found are driven to by nav2's action, within these limits; `None`: their pose is published
    /// on a topic, and nobody knows of arrivals.
    pub drives: Option<DriveLimits>,
    /// The stamp of goal poses in the frame of odometry.
    pub stamp: GoalStamp,
    /// How long the navigation server keeps transforms. A goal pose whose frame was not heard of for longer, or that is
    /// relative to the robot and older than this, is not published.
    pub tf_buffer: TimeDelta,
}

/// What happens to the agent.
#[derive(Clone, Debug)]
pub enum Event {
    /// A goal came; `ticket` is new.
    Goal {
        /// Where its answer belongs.
        ticket: Ticket,
        /// The goal.
        goal: Goal,
        /// Whether a pose that is found is published for the robot to drive to; otherwise the client only
        /// wants to know.
        publish: bool,
        /// Whether the client wants its reply when the drive is over, where there is one.
        wait: bool,
    },
    /// A request that could not be read as a goal.
    BadGoal {
        /// Where its answer belongs.
        ticket: Ticket,
        /// The client's id.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A client wants a goal stopped: the one with this id, or any when empty.
    Cancel {
        /// The client's id, or empty.
        id: String,
    },
    /// A camera frame arrived.
    Frame {
        /// The camera's stamp.
        captured_at: Timestamp,
    },
    /// Odometry arrived. The node tells of it about ten times a second.
    Odometry(OdometryHeard),
    /// Another node that was started earlier serves the same robot, or none does any more.
    Rival {
        /// Its name.
        name: Option<String>,
    },
    /// The camera's frames do not count at present though they come, or do again.
    CameraFault {
        /// Why they do not; `None`: they do.
        reason: Option<String>,
    },
    /// A full latent is in the memory now.
    ContextReady {
        /// Latents held.
        latents: usize,
    },
    /// The memory was cleared (a new segment).
    ContextLost,
    /// The worker has a first answer, not yet confirmed.
    Draft {
        /// Whose.
        ticket: Ticket,
        /// The best so far.
        answer: Box<Answer>,
    },
    /// The worker is ready.
    Done {
        /// Whose.
        ticket: Ticket,
        /// Its answer.
        answer: Box<Answer>,
    },
    /// The worker has no answer to give: it did not take the goal, or what was seen got lost.
    NoAnswer {
        /// Whose.
        ticket: Ticket,
        /// Why, for a person.
        reason: String,
    },
    /// Something was heard of a drive.
    Drive {
        /// Whose.
        ticket: Ticket,
        /// What.
        news: DriveNews,
    },
    /// What was asked for was looked at once more from where a drive ended.
    Looked {
        /// Whose drive.
        ticket: Ticket,
        /// Where the goal's pose is from there; `None`: nothing like it is seen.
        base_from_goal: Option<Pose2>,
    },
    /// The node stops: what is in work is cancelled, and whoever waits is answered.
    Stop,
    /// Time passed.
    Tick,
}

/// What the node has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Start imagining; be ready by `until` (monotonic).
    Begin {
        /// Whose.
        ticket: Ticket,
        /// What is wanted.
        goal: Box<Goal>,
        /// When the worker must be ready.
        until: TimeDelta,
    },
    /// Stop imagining between two steps; nothing it says later counts.
    Halt {
        /// Whose.
        ticket: Ticket,
    },
    /// The goal is decided: publish what the answer rests on, and note it.
    Answer {
        /// Whose.
        ticket: Ticket,
        /// What.
        answer: Box<Answer>,
    },
    /// Tell the client. Comes with the answer, or when the drive is over for a client that waits for that.
    Reply {
        /// Whose.
        ticket: Ticket,
        /// What.
        answer: Box<Answer>,
        /// Where the drive to it stands, if there is one.
        drive: Option<Box<Drive>>,
    },
    /// The goal is left to the node that was started earlier; the client gets nothing from this one.
    Leave {
        /// Whose.
        ticket: Ticket,
    },
    /// Publish the answer's pose on the goal topic. Comes before the answer itself.
    PublishGoal {
        /// Stamp of the pose; zero: the newest transform.
        stamp: Timestamp,
        /// The answer with the pose.
        answer: Box<Answer>,
    },
    /// Send the answer's pose to the navigation server. Comes before the answer itself.
    StartDrive {
        /// Whose.
        ticket: Ticket,
        /// Stamp of the pose; zero: the newest transform.
        stamp: Timestamp,
        /// The answer with the pose.
        answer: Box<Answer>,
    },
    /// Ask the navigation server about a drive that was sent.
    Drive {
        /// Whose.
        ticket: Ticket,
        /// What to ask.
        command: DriveCommand,
    },
    /// The robot stands where it was sent: look once more at what was asked for, and tell by [`Event::Looked`].
    LookAgain {
        /// Whose drive.
        ticket: Ticket,
        /// What is wanted.
        goal: Box<Goal>,
    },
    /// The robot does not stand where the goal is, seen from there: take the goal in once more.
    AskAgain {
        /// What is wanted.
        goal: Box<Goal>,
    },
    /// A drive's state changed; the status is worth publishing.
    DriveChanged {
        /// Where it stands now.
        drive: Box<Drive>,
    },
}

#[derive(Debug)]
struct Active {
    ticket: Ticket,
    id: String,
    goal: Goal,
    began: TimeDelta,
    deadline: TimeDelta,
    allowed: TimeDelta,
    publish: bool,
    wait: bool,
    best: Option<Box<Answer>>,
    /// Why a pose that is found now would mean nothing.
    obsolete: Option<Unpublishable>,
}

/// The agent's state.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    active: Option<Active>,
    newest_frame: Option<(TimeDelta, Timestamp)>,
    odometry: Option<(TimeDelta, OdometryHeard)>,
    rival: Option<String>,
    /// Why the frames that come do not count.
    camera_fault: Option<String>,
    latents: usize,
    published: Option<(TimeDelta, String, Pose2)>,
    drives: Option<Drives>,
    /// The goal that is driven to, or was last, where it can be looked for at the end.
    driven: Option<(Ticket, Goal)>,
    /// The id of the goal that was asked again because the robot did not stand where it is.
    asked_again: Option<String>,
    /// Clients that wait for a drive to be over, with their answers.
    waiting: Vec<(Ticket, Box<Answer>)>,
    last_answer: Option<Box<Answer>>,
    counts: AgentCounts,
}

/// How many goals ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct AgentCounts {
    /// Goals taken, good and bad.
    pub goals: u64,
    /// Answers given.
    pub answers: u64,
    /// Of these `found`.
    pub found: u64,
    /// Goal poses published.
    pub published: u64,
}

impl Agent {
    /// An agent without a goal.
    pub fn new(config: AgentConfig) -> Self {
        Self {
            drives: config.drives.clone().map(Drives::new),
            config,
            active: None,
            newest_frame: None,
            odometry: None,
            rival: None,
            camera_fault: None,
            latents: 0,
            published: None,
            driven: None,
            asked_again: None,
            waiting: Vec::new(),
            last_answer: None,
            counts: AgentCounts::default(),
        }
    }

    /// The goal in work.
    pub fn active(&self) -> Option<(Ticket, &str)> {
        self.active.as_ref().map(|a| (a.ticket, a.id.as_str()))
    }

    /// Whether another node that was started earlier serves the same robot.
    pub fn has_rival(&self) -> bool {
        self.rival.is_some()
    }

    /// The robot's clock: the newest stamp of odometry, else of the camera; zero before both.
    pub fn robot_time(&self) -> Timestamp {
        let odometry = self.odometry.as_ref().map(|(_, heard)| heard.stamp);
        let camera = self.newest_frame.map(|(_, stamp)| stamp);
        let known = odometry.into_iter().chain(camera).find(|stamp| *stamp != Timestamp::ZERO);
        known.unwrap_or(Timestamp::ZERO)
    }

    /// Counts so far.
    pub fn counts(&self) -> AgentCounts {
        self.counts
    }

    /// The newest answer.
    pub fn last_answer(&self) -> Option<&Answer> {
        self.last_answer.as_deref()
    }

    /// The newest drive, over or not.
    pub fn drive(&self, now: TimeDelta) -> Option<Drive> {
        self.drives.as_ref()?.newest(now)
    }

    /// Time since the newest frame arrived; `None` before the first.
    pub fn frame_age(&self, now: TimeDelta) -> Option<TimeDelta> {
        self.newest_frame.map(|(at, _)| now - at)
    }

    /// When [`Event::Tick`] is due next.
    pub fn next_tick(&self) -> Option<TimeDelta> {
        let deadline = self.active.as_ref().map(|a| a.deadline);
        let drives = self.drives.as_ref().and_then(Drives::next_tick);
        deadline.into_iter().chain(drives).min()
    }

    /// One step: what to do about `event` at the monotonic time `now`.
    pub fn step(&mut self, event: Event, now: TimeDelta) -> Vec<Action> {
        let mut actions = Vec::new();
        self.expire(now, &mut actions);
        let outcomes = self.drives.as_mut().map(|drives| drives.tick(now)).unwrap_or_default();
        self.carry_out(outcomes, &mut actions);
        match event {
            Event::Goal { ticket, .. } | Event::BadGoal { ticket, .. } if self.rival.is_some() => {
                actions.push(Action::Leave { ticket });
            }
            Event::Goal { ticket, goal, publish, wait } => {
                self.goal(ticket, goal, publish, wait, now, &mut actions);
            }
            Event::BadGoal { ticket, id, reason } => {
                self.counts.goals += 1;
                let answer = Answer::new(id, Status::Failed, Some(reason));
                self.answer(ticket, answer, false, &mut actions);
            }
            Event::Cancel { id } => {
                let why = "cancelled by a client";
                if self.active.as_ref().is_some_and(|a| id.is_empty() || a.id == id) {
                    self.stop(why, &mut actions);
                }
                self.stop_drives(|goal| id.is_empty() || goal == id, why, now, &mut actions);
            }
            Event::Frame { captured_at } => self.newest_frame = Some((now, captured_at)),
            Event::CameraFault { reason } => self.camera_fault = reason,
            Event::ContextReady { latents } => self.latents = latents,
            Event::Odometry(heard) => self.odometry(heard, now),
            Event::Rival { name } => self.rival = name,
            Event::ContextLost => {
                self.latents = 0;
                self.obsolete(Unpublishable::MemoryLost);
            }
            Event::Draft { ticket, answer } => {
                if let Some(active) = self.active.as_mut().filter(|a| a.ticket == ticket) {
                    active.best = Some(answer);
                }
            }
            Event::Done { ticket, answer } => self.done(ticket, answer, now, &mut actions),
            Event::NoAnswer { ticket, reason } => {
                if let Some(active) = self.active.take_if(|a| a.ticket == ticket) {
                    let answer = Answer::new(active.id, Status::Failed, Some(reason));
                    self.answer(ticket, answer, active.wait, &mut actions);
                }
            }
            Event::Drive { ticket, news } => {
                let outcomes = self.drives.as_mut().map(|drives| drives.news(ticket, news, now));
                self.carry_out(outcomes.unwrap_or_default(), &mut actions);
            }
            Event::Looked { ticket, base_from_goal } => self.looked(ticket, base_from_goal, &mut actions),
            Event::Stop => {
                let why = "the runtime stops";
                self.stop(why, &mut actions);
                let outcomes = self.drives.as_mut().map(|drives| drives.abandon(why, now));
                self.carry_out(outcomes.unwrap_or_default(), &mut actions);
            }
            Event::Tick => {}
        }
        actions
    }

    fn goal(
        &mut self,
        ticket: Ticket,
        goal: Goal,
        publish: bool,
        wait: bool,
        now: TimeDelta,
        actions: &mut Vec<Action>,
    ) {
        self.counts.goals += 1;
        self.asked_again.take_if(|id| *id != goal.id);
        // The newest wish counts, even if it cannot be met: the old one is no longer wanted.
        let why = format!("pre-empted by goal {:?}", goal.id);
        self.stop(&why, actions);
        // Asking only moves nobody, and stops nobody.
        if publish {
            self.stop_drives(|_| true, &why, now, actions);
        }
        let max_age = goal.max_frame_age.unwrap_or(self.config.max_frame_age);
        let Some((arrived, _)) = self.newest_frame else {
            let reason = "no camera frame has come yet; check the camera topic and that it publishes";
            let answer = Answer::new(goal.id, Status::Stale, Some(reason.into()));
            return self.answer(ticket, answer, wait, actions);
        };
        let age = now - arrived;
        if age > max_age {
            let reason = format!(
                "the newest camera frame came {:.2} s ago, at most {:.2} s is allowed",
                age.as_secs_f64(),
                max_age.as_secs_f64()
            );
            return self.answer(ticket, Answer::new(goal.id, Status::Stale, Some(reason)), wait, actions);
        }
        if let Some(reason) = self.camera_fault.clone() {
            return self.answer(ticket, Answer::new(goal.id, Status::Stale, Some(reason)), wait, actions);
        }
        if self.latents == 0 {
            let reason = "not enough has been seen yet: the memory needs at least four kept frames";
            let answer = Answer::new(goal.id, Status::Failed, Some(reason.into()));
            return self.answer(ticket, answer, wait, actions);
        }
        let allowed = goal.deadline.unwrap_or(self.config.deadline);
        let deadline = now + allowed;
        let sampling = time_for_sampling(allowed, self.config.reserve);
        self.active = Some(Active {
            ticket,
            id: goal.id.clone(),
            goal: goal.clone(),
            began: now,
            deadline,
            allowed,
            publish,
            wait,
            best: None,
            obsolete: None,
        });
        actions.push(Action::Begin { ticket, goal: Box::new(goal), until: now + sampling });
    }

    fn done(&mut self, ticket: Ticket, mut answer: Box<Answer>, now: TimeDelta, actions: &mut Vec<Action>) {
        let Some(active) = self.active.take_if(|a| a.ticket == ticket) else {
            return; // answered already: cancelled, pre-empted or late
        };
        answer.timings_ms.insert("total".into(), (now - active.began).as_millis_f64());
        let stamp = match self.stamp(&active, &answer, now) {
            Ok(stamp) => stamp,
            Err(refusal) => {
                *answer = refusal.refuse(&answer);
                Timestamp::ZERO
            }
        };
        if active.publish
            && answer.status == Status::Found
            && let Some(pose) = &answer.pose
        {
            // A pose on a topic may still be on the way to being driven to; a drive's end is known.
            let published = self.published.as_ref().filter(|_| self.drives.is_none());
            let repeated = published.is_some_and(|(at, frame, last)| {
                *frame == pose.frame
                    && last.distance(pose.pose2()) < 0.01
                    && wrap_angle(last.yaw - pose.yaw).abs() < 0.01
                    && now - *at < self.config.republish_after
            });
            if !repeated {
                self.published = Some((now, pose.frame.clone(), pose.pose2()));
                self.counts.published += 1;
                let answer = answer.clone();
                match &mut self.drives {
                    Some(drives) => {
                        // Only what was imagined from a text can be looked for again.
                        let text = matches!(active.goal.kind, GoalKind::Text(_)) && answer.imagined;
                        self.driven = text.then_some((ticket, active.goal));
                        let outcomes = drives.start(ticket, active.id, now);
                        self.carry_out(outcomes, actions);
                        actions.push(Action::StartDrive { ticket, stamp, answer });
                    }
                    None => actions.push(Action::PublishGoal { stamp, answer }),
                }
            }
        }
        self.answer(ticket, *answer, active.wait, actions);
    }

    fn odometry(&mut self, heard: OdometryHeard, now: TimeDelta) {
        if let Some((_, before)) = &self.odometry {
            if before.frame != heard.frame {
                let (from, to) = (before.frame.clone(), heard.frame.clone());
                self.obsolete(Unpublishable::FrameChanged { from, to });
            } else if let Some(by) = heard.jumped_from(before) {
                let frame = heard.frame.clone();
                self.obsolete(Unpublishable::Jumped { frame, by });
            }
        }
        self.odometry = Some((now, heard));
    }

    /// What is found for the goal in work means nothing any more.
    fn obsolete(&mut self, why: Unpublishable) {
        if let Some(active) = &mut self.active {
            active.obsolete.get_or_insert(why);
        }
    }

    /// The stamp with which a pose that was found may be published now.
    fn stamp(&self, active: &Active, answer: &Answer, now: TimeDelta) -> Result<Timestamp, Unpublishable> {
        let Some(pose) = answer.pose.as_ref().filter(|_| answer.status == Status::Found) else {
            return Ok(Timestamp::ZERO);
        };
        if let Some(why) = &active.obsolete {
            return Err(why.clone());
        }
        if !active.publish {
            return Ok(Timestamp::ZERO);
        }
        if let Some(name) = &self.rival {
            return Err(Unpublishable::Rival { name: name.clone() });
        }
        let captured_at = answer.stamp_ns.map_or(Timestamp::ZERO, Timestamp);
        let newest = self.newest_frame.map_or(Timestamp::ZERO, |(_, stamp)| stamp);
        let most = self.config.tf_buffer;
        match &self.odometry {
            Some((at, odometry)) if pose.frame != odometry.base => {
                let silent = now - *at;
                if silent > most {
                    return Err(Unpublishable::FrameSilent { frame: pose.frame.clone(), silent, most });
                }
                Ok(match self.config.stamp {
                    GoalStamp::Robot => self.robot_time(),
                    GoalStamp::Zero => Timestamp::ZERO,
                })
            }
            // Relative to the robot, which has moved since.
            _ => {
                let age = newest - captured_at;
                if age > most {
                    return Err(Unpublishable::Old { frame: pose.frame.clone(), age, most });
                }
                Ok(captured_at)
            }
        }
    }

    /// Answers the goal in work when its deadline has passed.
    fn expire(&mut self, now: TimeDelta, actions: &mut Vec<Action>) {
        let Some(active) = self.active.take_if(|a| now >= a.deadline) else {
            return;
        };
        actions.push(Action::Halt { ticket: active.ticket });
        let reason = format!("the deadline of {:.0} ms passed", active.allowed.as_millis_f64());
        let mut answer = match active.best {
            Some(best) => *best,
            None => Answer::new(active.id, Status::Late, None),
        };
        let what = if answer.pose.is_some() { "; the best so far is attached, not published" } else { "" };
        answer.status = Status::Late;
        answer.reason = Some(reason + what);
        answer.timings_ms.insert("total".into(), (now - active.began).as_millis_f64());
        self.answer(active.ticket, answer, active.wait, actions);
    }

    /// Confirms an arrival, or asks for the goal once more. A newer goal in work is not disturbed.
    fn looked(&mut self, ticket: Ticket, base_from_goal: Option<Pose2>, actions: &mut Vec<Action>) {
        let Some((_, goal)) = self.driven.take_if(|(driven, _)| *driven == ticket) else { return };
        let again = self.asked_again.take().is_some() || self.active.is_some();
        let there = base_from_goal.zip(self.config.drives.as_ref()).is_some_and(|(off, limits)| {
            off.distance(Pose2::default()) <= limits.within_m && off.yaw.abs() <= limits.within_rad
        });
        let arrival = match (there, again) {
            (true, _) => Arrival::Confirmed,
            (false, false) => Arrival::Reasked,
            (false, true) => Arrival::Missed,
        };
        let Some(drive) = self.drives.as_mut().and_then(|drives| drives.note(ticket, arrival)) else {
            return;
        };
        actions.push(Action::DriveChanged { drive: Box::new(drive) });
        if arrival == Arrival::Reasked {
            self.asked_again = Some(goal.id.clone());
            actions.push(Action::AskAgain { goal: Box::new(goal) });
        }
    }

    /// Cancels the goal in work, if there is one.
    fn stop(&mut self, why: &str, actions: &mut Vec<Action>) {
        let Some(active) = self.active.take() else { return };
        actions.push(Action::Halt { ticket: active.ticket });
        let answer = Answer::new(active.id, Status::Cancelled, Some(why.into()));
        self.answer(active.ticket, answer, active.wait, actions);
    }

    /// Cancels the drives under way whose goal's id is wanted.
    fn stop_drives(
        &mut self,
        wanted: impl Fn(&str) -> bool,
        why: &str,
        now: TimeDelta,
        actions: &mut Vec<Action>,
    ) {
        let outcomes = self.drives.as_mut().map(|drives| drives.stop(wanted, why, now));
        self.carry_out(outcomes.unwrap_or_default(), actions);
    }

    /// What comes of drives: questions for the server, and replies to those who wait for an end.
    fn carry_out(&mut self, outcomes: Vec<Outcome>, actions: &mut Vec<Action>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Command(ticket, command) => actions.push(Action::Drive { ticket, command }),
                Outcome::Changed(ticket, drive) => {
                    let drive = Box::new(drive);
                    let arrived = drive.state == DriveState::Arrived && drive.arrival.is_none();
                    if let Some((_, goal)) =
                        self.driven.as_ref().filter(|(driven, _)| arrived && *driven == ticket)
                    {
                        actions.push(Action::LookAgain { ticket, goal: Box::new(goal.clone()) });
                    }
                    if drive.state.is_over()
                        && let Some(at) = self.waiting.iter().position(|(waits, _)| *waits == ticket)
                    {
                        let (ticket, answer) = self.waiting.remove(at);
                        actions.push(Action::Reply { ticket, answer, drive: Some(drive.clone()) });
                    }
                    actions.push(Action::DriveChanged { drive });
                }
            }
        }
    }

    /// Decides a goal. The client gets its reply at once, or when its drive is over if it waits for that.
    fn answer(&mut self, ticket: Ticket, answer: Answer, wait: bool, actions: &mut Vec<Action>) {
        self.counts.answers += 1;
        self.counts.found += u64::from(answer.status == Status::Found);
        let answer = Box::new(answer);
        self.last_answer = Some(answer.clone());
        actions.push(Action::Answer { ticket, answer: answer.clone() });
        let drive = self.drives.as_ref().and_then(|drives| drives.of(ticket)).cloned().map(Box::new);
        if wait && drive.as_ref().is_some_and(|drive| !drive.state.is_over()) {
            self.waiting.push((ticket, answer));
        } else {
            actions.push(Action::Reply { ticket, answer, drive });
        }
    }
}
