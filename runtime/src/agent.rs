//! The agent: goals, pre-emption, cancellation, staleness and deadlines, as a step function.
//!
//! [`Agent::step`] takes an event and the present time and returns what to do. It reads no clock and starts no
//! thread, so every behaviour can be replayed. The node around it carries the actions out.
//!
//! Invariant: every goal gets exactly one [`Action::Answer`]. Goals are told apart by [`Ticket`]s, which the agent
//! hands out; the same client-side id may come twice.

use crate::planar::{Pose2, wrap_angle};
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::goal::Goal;
use mindseye_bridge::time::{TimeDelta, Timestamp};

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
    /// Kept back for decoding, lifting and publishing when the worker is told when to be ready.
    pub reserve: TimeDelta,
    /// The same goal pose is published again only after this long.
    pub republish_after: TimeDelta,
    /// Published goals are driven to by an action, whose end is told by [`Event::DriveOver`].
    pub drives: bool,
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
    /// The drive to a published goal ended, however.
    DriveOver {
        /// Whose.
        ticket: Ticket,
    },
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
    /// Tell the client.
    Answer {
        /// Whose.
        ticket: Ticket,
        /// What.
        answer: Box<Answer>,
    },
    /// Publish the answer's pose as the robot's goal, or drive there. Comes before the answer itself.
    PublishGoal {
        /// Whose.
        ticket: Ticket,
        /// The answer with the pose.
        answer: Box<Answer>,
    },
    /// Stop driving to a goal.
    StopDrive {
        /// Whose.
        ticket: Ticket,
    },
}

#[derive(Debug)]
struct Active {
    ticket: Ticket,
    id: String,
    began: TimeDelta,
    deadline: TimeDelta,
    allowed: TimeDelta,
    publish: bool,
    best: Option<Box<Answer>>,
}

/// The agent's state.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    active: Option<Active>,
    newest_frame: Option<(TimeDelta, Timestamp)>,
    /// Why the frames that come do not count.
    camera_fault: Option<String>,
    latents: usize,
    published: Option<(TimeDelta, String, Pose2)>,
    /// The drive under way and the client's id of its goal.
    driving: Option<(Ticket, String)>,
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
        let counts = AgentCounts::default();
        Self {
            config,
            active: None,
            newest_frame: None,
            camera_fault: None,
            latents: 0,
            published: None,
            driving: None,
            counts,
        }
    }

    /// The goal in work.
    pub fn active(&self) -> Option<(Ticket, &str)> {
        self.active.as_ref().map(|a| (a.ticket, a.id.as_str()))
    }

    /// Counts so far.
    pub fn counts(&self) -> AgentCounts {
        self.counts
    }

    /// Time since the newest frame arrived; `None` before the first.
    pub fn frame_age(&self, now: TimeDelta) -> Option<TimeDelta> {
        self.newest_frame.map(|(at, _)| now - at)
    }

    /// When [`Event::Tick`] is due next.
    pub fn next_tick(&self) -> Option<TimeDelta> {
        self.active.as_ref().map(|a| a.deadline)
    }

    /// One step: what to do about `event` at the monotonic time `now`.
    pub fn step(&mut self, event: Event, now: TimeDelta) -> Vec<Action> {
        let mut actions = Vec::new();
        self.expire(now, &mut actions);
        match event {
            Event::Goal { ticket, goal, publish } => self.goal(ticket, goal, publish, now, &mut actions),
            Event::BadGoal { ticket, id, reason } => {
                self.counts.goals += 1;
                self.answer(ticket, Answer::new(id, Status::Failed, Some(reason)), &mut actions);
            }
            Event::Cancel { id } => {
                if self.active.as_ref().is_some_and(|a| id.is_empty() || a.id == id) {
                    self.stop(Status::Cancelled, "cancelled by a client", &mut actions);
                }
                if self.driving.as_ref().is_some_and(|(_, driving)| id.is_empty() || *driving == id) {
                    self.stop_drive(&mut actions);
                }
            }
            Event::Frame { captured_at } => self.newest_frame = Some((now, captured_at)),
            Event::CameraFault { reason } => self.camera_fault = reason,
            Event::ContextReady { latents } => self.latents = latents,
            Event::ContextLost => self.latents = 0,
            Event::Draft { ticket, answer } => {
                if let Some(active) = self.active.as_mut().filter(|a| a.ticket == ticket) {
                    active.best = Some(answer);
                }
            }
            Event::Done { ticket, answer } => self.done(ticket, answer, now, &mut actions),
            Event::DriveOver { ticket } => {
                self.driving.take_if(|(driving, _)| *driving == ticket);
            }
            Event::Tick => {}
        }
        actions
    }

    fn goal(&mut self, ticket: Ticket, goal: Goal, publish: bool, now: TimeDelta, actions: &mut Vec<Action>) {
        self.counts.goals += 1;
        // The newest wish counts, even if it cannot be met: the old one is no longer wanted.
        self.stop(Status::Cancelled, &format!("pre-empted by goal {:?}", goal.id), actions);
        // Asking only moves nobody, and stops nobody.
        if publish {
            self.stop_drive(actions);
        }
        let max_age = goal.max_frame_age.unwrap_or(self.config.max_frame_age);
        let Some((arrived, _)) = self.newest_frame else {
            let reason = "no camera frame has come yet; check the camera topic and that it publishes";
            return self.answer(ticket, Answer::new(goal.id, Status::Stale, Some(reason.into())), actions);
        };
        let age = now - arrived;
        if age > max_age {
            let reason = format!(
                "the newest camera frame came {:.2} s ago, at most {:.2} s is allowed",
                age.as_secs_f64(),
                max_age.as_secs_f64()
            );
            return self.answer(ticket, Answer::new(goal.id, Status::Stale, Some(reason)), actions);
        }
        if let Some(reason) = self.camera_fault.clone() {
            return self.answer(ticket, Answer::new(goal.id, Status::Stale, Some(reason)), actions);
        }
        if self.latents == 0 {
            let reason = "not enough has been seen yet: the memory needs at least four kept frames";
            return self.answer(ticket, Answer::new(goal.id, Status::Failed, Some(reason.into())), actions);
        }
        let allowed = goal.deadline.unwrap_or(self.config.deadline);
        let deadline = now + allowed;
        // A tight deadline keeps back at most a fifth.
        let reserve = self.config.reserve.min(TimeDelta(allowed.0 / 5));
        self.active =
            Some(Active { ticket, id: goal.id.clone(), began: now, deadline, allowed, publish, best: None });
        actions.push(Action::Begin { ticket, goal: Box::new(goal), until: deadline - reserve });
    }

    fn done(&mut self, ticket: Ticket, mut answer: Box<Answer>, now: TimeDelta, actions: &mut Vec<Action>) {
        let Some(active) = self.active.take_if(|a| a.ticket == ticket) else {
            return; // answered already: cancelled, pre-empted or late
        };
        answer.timings_ms.insert("total".into(), (now - active.began).as_millis_f64());
        if active.publish
            && answer.status == Status::Found
            && let Some(pose) = &answer.pose
        {
            // A pose on a topic may still be on the way to being driven to; a drive's end is known.
            let published = self.published.as_ref().filter(|_| !self.config.drives);
            let repeated = published.is_some_and(|(at, frame, last)| {
                *frame == pose.frame
                    && last.distance(pose.pose2()) < 0.01
                    && wrap_angle(last.yaw - pose.yaw).abs() < 0.01
                    && now - *at < self.config.republish_after
            });
            if !repeated {
                self.published = Some((now, pose.frame.clone(), pose.pose2()));
                self.counts.published += 1;
                if self.config.drives {
                    self.driving = Some((ticket, active.id));
                }
                actions.push(Action::PublishGoal { ticket, answer: answer.clone() });
            }
        }
        self.answer(ticket, *answer, actions);
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
        self.answer(active.ticket, answer, actions);
    }

    /// Ends the goal in work, if there is one.
    fn stop(&mut self, status: Status, reason: &str, actions: &mut Vec<Action>) {
        let Some(active) = self.active.take() else { return };
        actions.push(Action::Halt { ticket: active.ticket });
        self.answer(active.ticket, Answer::new(active.id, status, Some(reason.into())), actions);
    }

    fn stop_drive(&mut self, actions: &mut Vec<Action>) {
        if let Some((ticket, _)) = self.driving.take() {
            actions.push(Action::StopDrive { ticket });
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer, actions: &mut Vec<Action>) {
        self.counts.answers += 1;
        self.counts.found += u64::from(answer.status == Status::Found);
        actions.push(Action::Answer { ticket, answer: Box::new(answer) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mindseye_bridge::answer::FramedPose2;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const fn ms(millis: i64) -> TimeDelta {
        TimeDelta::from_millis(millis)
    }

    fn agent() -> Agent {
        driven(false)
    }

    fn driven(drives: bool) -> Agent {
        Agent::new(AgentConfig {
            drives,
            deadline: ms(5000),
            max_frame_age: ms(500),
            reserve: ms(300),
            republish_after: ms(10_000),
        })
    }

    fn goal(ticket: u64, id: &str) -> Event {
        Event::Goal {
            ticket: Ticket(ticket),
            goal: Goal::text(id, "find the red chair").unwrap(),
            publish: true,
        }
    }

    fn with_deadline(ticket: u64, millis: i64) -> Event {
        let mut goal = Goal::text(format!("g{ticket}"), "find the red chair").unwrap();
        goal.deadline = Some(ms(millis));
        Event::Goal { ticket: Ticket(ticket), goal, publish: true }
    }

    fn found(x: f64) -> Box<Answer> {
        let mut answer = Answer::new("g", Status::Found, None);
        answer.pose = Some(FramedPose2::new("odom", Pose2::new(x, 0.0, 0.0)));
        Box::new(answer)
    }

    fn frame() -> Event {
        Event::Frame { captured_at: Timestamp(5) }
    }

    /// Actions in words: "begin 1", "halt 1", "found 1", "publish".
    fn words(actions: &[Action]) -> Vec<String> {
        actions
            .iter()
            .map(|a| match a {
                Action::Begin { ticket, .. } => format!("begin {}", ticket.0),
                Action::Halt { ticket } => format!("halt {}", ticket.0),
                Action::Answer { ticket, answer } => format!("{} {}", answer.status, ticket.0),
                Action::PublishGoal { .. } => "publish".into(),
                Action::StopDrive { .. } => "stop drive".into(),
            })
            .collect()
    }

    fn play(name: &str, script: Vec<(i64, Event, &[&str])>) {
        let mut agent = agent();
        for (i, (at, event, want)) in script.into_iter().enumerate() {
            let shown = format!("{event:?}");
            let got = words(&agent.step(event, ms(at)));
            assert_eq!(got, want, "{name}, step {i} at {at} ms: {shown}");
        }
    }

    #[test]
    fn stories() {
        let ready = || Event::ContextReady { latents: 3 };
        let done = |ticket, x| Event::Done { ticket: Ticket(ticket), answer: found(x) };
        let cancel = |id: &str| Event::Cancel { id: id.into() };
        let fault = |reason: Option<&str>| Event::CameraFault { reason: reason.map(str::to_owned) };
        play(
            "a frozen camera",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (10, fault(Some("frozen")), &[]),
                (20, frame(), &[]),
                (20, goal(1, "a"), &["stale 1"]),
                (30, fault(None), &[]),
                (30, frame(), &[]),
                (40, goal(2, "b"), &["begin 2"]),
            ],
        );
        play(
            "a goal is met",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (10, goal(1, "a"), &["begin 1"]),
                (900, done(1, 1.0), &["publish", "found 1"]),
                (910, done(1, 1.0), &[]),
            ],
        );
        play("nothing was seen", vec![(0, goal(1, "a"), &["stale 1"])]);
        play("one frame only", vec![(0, frame(), &[]), (1, goal(1, "a"), &["failed 1"])]);
        play(
            "the camera stalls",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (501, goal(1, "a"), &["stale 1"]),
                (502, frame(), &[]),
                (503, goal(2, "a"), &["begin 2"]),
            ],
        );
        play(
            "a newer goal pre-empts",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (10, goal(1, "a"), &["begin 1"]),
                (20, goal(2, "a"), &["halt 1", "cancelled 1", "begin 2"]),
                (30, done(1, 1.0), &[]),
                (40, done(2, 2.0), &["publish", "found 2"]),
            ],
        );
        play(
            "cancelling",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (10, goal(1, "a"), &["begin 1"]),
                (20, cancel("b"), &[]),
                (30, cancel("a"), &["halt 1", "cancelled 1"]),
                (40, cancel("a"), &[]),
                (50, goal(2, "b"), &["begin 2"]),
                (60, cancel(""), &["halt 2", "cancelled 2"]),
            ],
        );
        play(
            "too late",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (10, with_deadline(1, 50), &["begin 1"]),
                (59, Event::Tick, &[]),
                (60, Event::Tick, &["halt 1", "late 1"]),
                (61, done(1, 1.0), &[]),
                (70, with_deadline(2, 50), &["begin 2"]),
                // Even without a tick: the answer came after the deadline.
                (125, done(2, 1.0), &["halt 2", "late 2"]),
            ],
        );
        play(
            "a broken goal leaves the one in work alone",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (10, goal(1, "a"), &["begin 1"]),
                (
                    20,
                    Event::BadGoal { ticket: Ticket(2), id: "b".into(), reason: "empty".into() },
                    &["failed 2"],
                ),
                (30, done(1, 1.0), &["publish", "found 1"]),
            ],
        );
        play(
            "the same pose is not published twice in a row",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (1, goal(1, "a"), &["begin 1"]),
                (2, done(1, 1.0), &["publish", "found 1"]),
                (3, goal(2, "a"), &["begin 2"]),
                (4, done(2, 1.001), &["found 2"]),
                (5, goal(3, "a"), &["begin 3"]),
                (6, done(3, 1.1), &["publish", "found 3"]),
                (10_100, frame(), &[]),
                (10_101, goal(4, "a"), &["begin 4"]),
                (10_102, done(4, 1.1), &["publish", "found 4"]),
            ],
        );
        let ask = Event::Goal {
            ticket: Ticket(1),
            goal: Goal::text("a", "find the red chair").unwrap(),
            publish: false,
        };
        play(
            "a question moves nobody",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (1, ask, &["begin 1"]),
                (2, done(1, 1.0), &["found 1"]),
            ],
        );
        play(
            "after the memory was lost",
            vec![
                (0, frame(), &[]),
                (0, ready(), &[]),
                (1, Event::ContextLost, &[]),
                (2, goal(1, "a"), &["failed 1"]),
            ],
        );
    }

    #[test]
    fn late_answers_carry_the_best_so_far() {
        let mut agent = agent();
        agent.step(frame(), ms(0));
        agent.step(Event::ContextReady { latents: 3 }, ms(0));
        let began = agent.step(with_deadline(1, 100), ms(0));
        let [Action::Begin { until, .. }] = began.as_slice() else { panic!("{began:?}") };
        assert_eq!(*until, ms(80), "a fifth is kept back");
        assert_eq!(agent.next_tick(), Some(ms(100)));
        agent.step(Event::Draft { ticket: Ticket(1), answer: found(4.0) }, ms(50));
        let actions = agent.step(Event::Tick, ms(100));
        let Some(Action::Answer { answer, .. }) = actions.last() else { panic!("{actions:?}") };
        assert_eq!(answer.status, Status::Late);
        assert_eq!(answer.pose.as_ref().unwrap().x, 4.0);
        assert!(answer.reason.as_ref().unwrap().contains("not published"));
        assert_eq!(agent.next_tick(), None);
    }

    /// What a drive is told: published goals as `go N`, stops as `stop N`.
    fn drives(actions: &[Action]) -> Vec<String> {
        let told = |action: &Action| match action {
            Action::PublishGoal { ticket, .. } => Some(format!("go {}", ticket.0)),
            Action::StopDrive { ticket } => Some(format!("stop {}", ticket.0)),
            _ => None,
        };
        actions.iter().filter_map(told).collect()
    }

    #[test]
    fn a_drive_ends_with_its_goal() {
        let ready = |drives: bool| {
            let mut agent = driven(drives);
            agent.step(frame(), ms(0));
            agent.step(Event::ContextReady { latents: 3 }, ms(0));
            agent
        };
        let found_at = |agent: &mut Agent, ticket: u64| {
            let mut actions = agent.step(goal(ticket, &format!("g{ticket}")), ms(10));
            actions.extend(agent.step(Event::Done { ticket: Ticket(ticket), answer: found(1.0) }, ms(20)));
            drives(&actions)
        };
        let cancel =
            |agent: &mut Agent, id: &str| drives(&agent.step(Event::Cancel { id: id.into() }, ms(30)));

        let mut agent = ready(true);
        assert_eq!(found_at(&mut agent, 1), ["go 1"]);
        assert_eq!(
            found_at(&mut agent, 2),
            ["stop 1", "go 2"],
            "pre-empted, and the same pose is driven to again"
        );
        let asked =
            Event::Goal { ticket: Ticket(3), goal: Goal::text("g3", "a chair").unwrap(), publish: false };
        assert_eq!(drives(&agent.step(asked, ms(25))), [""; 0], "asking only stops nobody");
        assert_eq!(cancel(&mut agent, "g1"), [""; 0], "another goal's id");
        assert_eq!(cancel(&mut agent, "g2"), ["stop 2"]);
        assert_eq!(cancel(&mut agent, ""), [""; 0], "once is enough");
        assert_eq!(found_at(&mut agent, 4), ["go 4"]);
        agent.step(Event::DriveOver { ticket: Ticket(2) }, ms(40));
        assert_eq!(cancel(&mut agent, ""), ["stop 4"], "the end of an older drive is not the newer one's");
        assert_eq!(found_at(&mut agent, 5), ["go 5"]);
        agent.step(Event::DriveOver { ticket: Ticket(5) }, ms(40));
        assert_eq!(cancel(&mut agent, ""), [""; 0], "it is over");

        // On a topic nobody knows of drives, and the same pose is published once.
        let mut agent = ready(false);
        assert_eq!(found_at(&mut agent, 1), ["go 1"]);
        assert_eq!(found_at(&mut agent, 2), [""; 0]);
        assert_eq!(cancel(&mut agent, ""), [""; 0]);
    }

    proptest! {
        #[test]
        fn exactly_one_answer_per_goal(script in proptest::collection::vec((0u8..9, 0i64..400, 0u64..6), 1..200)) {
            let mut agent = agent();
            let (mut now, mut next) = (0, 0u64);
            let mut answers: HashMap<u64, u32> = HashMap::new();
            let mut working: Option<u64> = None;
            let mut take = |actions: Vec<Action>, working: &mut Option<u64>| {
                for action in actions {
                    match action {
                        Action::Begin { ticket, .. } => {
                            assert!(working.is_none(), "one goal at a time");
                            *working = Some(ticket.0);
                        }
                        Action::Halt { ticket } => assert_eq!(working.take(), Some(ticket.0)),
                        Action::Answer { ticket, answer } => {
                            *answers.entry(ticket.0).or_default() += 1;
                            if answer.status == Status::Found {
                                *working = None;
                            }
                        }
                        Action::PublishGoal { .. } | Action::StopDrive { .. } => {}
                    }
                }
            };
            for (kind, wait, which) in script {
                now += wait;
                let event = match kind {
                    0 | 1 => frame(),
                    2 => Event::ContextReady { latents: which as usize },
                    3 => { next += 1; goal(next, &format!("g{which}")) }
                    4 => { next += 1; with_deadline(next, 100) }
                    5 => Event::Cancel { id: format!("g{which}") },
                    6 => Event::Done { ticket: Ticket(next.saturating_sub(which)), answer: found(which as f64) },
                    7 => { next += 1; Event::BadGoal { ticket: Ticket(next), id: "x".into(), reason: "y".into() } }
                    _ => Event::Tick,
                };
                let actions = agent.step(event, ms(now));
                take(actions, &mut working);
            }
            let actions = agent.step(Event::Tick, ms(now + 1_000_000));
            take(actions, &mut working);
            for ticket in 1..=next {
                prop_assert_eq!(answers.get(&ticket), Some(&1), "goal {}", ticket);
            }
            prop_assert_eq!(agent.counts().goals, agent.counts().answers);
        }
    }
}
