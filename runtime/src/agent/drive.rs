//! Drives to goals by nav2's NavigateToPose action, as a step function without threads or clocks.
//!
//! A drive is over for its client when the server says how it ended, when it was cancelled, or when the server
//! cannot be heard for too long. Losing contact is no end: the question for the result is asked again, and a
//! drive that is given up is cancelled by its id. Until the server confirms, the id stays on a watch list, so that
//! a goal that is accepted late, or a server that comes back, is cancelled as well: no robot goes on driving to a
//! goal that nobody follows any more.

use super::Ticket;
use mindseye_bridge::ros::{CancelOutcome, GoalState, NavResult};
use mindseye_bridge::time::TimeDelta;
use serde::Serialize;

/// Drives followed at once, those on the watch list included; the oldest gives way.
const DRIVES_MAX: usize = 16;
/// A cancelled drive must be over after this long.
const STOP_WITHIN: TimeDelta = TimeDelta::from_millis(5000);
/// A cancellation that was not answered, or refused, is repeated after this long.
const CANCEL_AGAIN: TimeDelta = TimeDelta::from_millis(1000);
/// The same for a drive that is only watched: its server may be away for long.
const WATCH_AGAIN: TimeDelta = TimeDelta::from_millis(5000);
/// The first and the longest pause before the result is asked for again; it doubles in between.
const ASK_AGAIN: (TimeDelta, TimeDelta) = (TimeDelta::from_millis(250), TimeDelta::from_millis(2000));
/// A question for the result that the server keeps open for this long is contact: it answers when the drive is over.
const HELD: TimeDelta = TimeDelta::from_millis(3000);
/// After the status topic tells of an end, the result with its reason must come within this.
const RESULT_WITHIN: TimeDelta = TimeDelta::from_millis(2000);

/// Limits of driving by an action.
#[derive(Clone, Debug, PartialEq)]
pub struct DriveLimits {
    /// Name of the action, for messages.
    pub action: String,
    /// The server must accept a goal within this.
    pub accept: TimeDelta,
    /// A drive that lasts longer is cancelled.
    pub longest: TimeDelta,
    /// A drive of which nothing is heard for this long is cancelled.
    pub contact: TimeDelta,
    /// An arrival is confirmed when the goal's pose, seen from there, is at most this far away, metres.
    pub within_m: f64,
    /// The same of its heading, radians.
    pub within_rad: f64,
}

/// Where a drive stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DriveState {
    /// Sent to the navigation server, not accepted yet.
    Requested,
    /// The robot drives.
    Driving,
    /// The robot stands at the goal.
    Arrived,
    /// Cancelled, by a client or by a newer goal.
    Cancelled,
    /// The navigation server did not take the goal.
    Rejected,
    /// The navigation server gave up, or cannot be heard.
    Failed,
}

impl DriveState {
    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Requested | Self::Driving)
    }
}

/// Where the goal is, seen from where the robot arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrival {
    /// Here.
    Confirmed,
    /// Elsewhere, or nothing like it is seen: the goal was asked again from there.
    Reasked,
    /// The same for the second time.
    Missed,
}

/// A drive to a goal that was found, for status and answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drive {
    /// The client's id of the goal.
    pub goal_id: String,
    /// Where it stands.
    pub state: DriveState,
    /// Why it ended, unless it arrived; what is wrong with it, while it lasts.
    pub reason: Option<String>,
    /// Where the goal is from there, once that was looked at.
    pub arrival: Option<Arrival>,
    /// Metres left along the path, as the server says.
    pub distance_remaining_m: Option<f32>,
    /// Times that the server had to recover.
    pub recoveries: Option<i16>,
    /// Milliseconds since the goal was sent, up to the end of the drive.
    pub elapsed_ms: f64,
}

/// What to ask the navigation server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveCommand {
    /// Ask for the result; the answer comes when the drive is over.
    AskResult,
    /// Cancel the goal by its id.
    Cancel,
}

/// What is heard of a drive.
#[derive(Clone, Debug, PartialEq)]
pub enum DriveNews {
    /// The goal was never sent: no server, or no way to it.
    NotSent {
        /// Why, for a person.
        reason: String,
    },
    /// The server took the goal.
    Accepted,
    /// The server refused the goal.
    Rejected {
        /// Why, for a person.
        reason: String,
    },
    /// The question whether the server takes the goal ended without an answer; it may drive all the same.
    SendUnanswered,
    /// The server's answer to the question for the result.
    Result(NavResult),
    /// The question for the result ended without an answer.
    ResultUnanswered {
        /// Why, for a person.
        reason: String,
    },
    /// The server's answer to a cancellation.
    Cancel(CancelOutcome),
    /// A cancellation ended without an answer.
    CancelUnanswered {
        /// Why, for a person.
        reason: String,
    },
    /// The server's status topic.
    Status(GoalState),
    /// The server's feedback.
    Feedback {
        /// Metres left along the path.
        distance_remaining_m: Option<f32>,
        /// Times that the server had to recover.
        recoveries: i16,
    },
}

/// What comes of a step.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// To be asked of the server.
    Command(Ticket, DriveCommand),
    /// The drive's state changed.
    Changed(Ticket, Drive),
}

#[derive(Debug)]
enum Phase {
    Requested,
    Driving,
    /// Cancelled; when, at the latest, that must have had effect, and how the drive then ended.
    Stopping {
        until: TimeDelta,
        why: String,
        state: DriveState,
    },
    /// Over for the client, without the server's word.
    Watched {
        until: TimeDelta,
    },
}

#[derive(Debug)]
struct Entry {
    ticket: Ticket,
    drive: Drive,
    began: TimeDelta,
    phase: Phase,
    /// Since when a question for the result is under way.
    asking: Option<TimeDelta>,
    /// When the result is asked for again, and the pause before that.
    ask_at: Option<TimeDelta>,
    pause: TimeDelta,
    /// Since when nothing was heard.
    silent_since: Option<TimeDelta>,
    cancelling: bool,
    cancel_at: Option<TimeDelta>,
    /// What went wrong with the last cancellation.
    trouble: Option<String>,
    /// Until when the result itself is waited for, and the end as the status topic has it.
    ended: Option<(TimeDelta, NavResult)>,
}

/// The drives under way, and those that are watched.
#[derive(Debug)]
pub(super) struct Drives {
    limits: DriveLimits,
    entries: Vec<Entry>,
    newest: Option<(Ticket, TimeDelta, Drive)>,
}

impl Drives {
    pub fn new(limits: DriveLimits) -> Self {
        Self { limits, entries: Vec::new(), newest: None }
    }

    /// The newest drive, over or not.
    pub fn newest(&self, now: TimeDelta) -> Option<Drive> {
        let (_, began, drive) = self.newest.as_ref()?;
        let mut drive = drive.clone();
        if !drive.state.is_over() {
            drive.elapsed_ms = (now - *began).as_millis_f64();
        }
        Some(drive)
    }

    /// The newest drive, if it belongs to this ticket.
    pub fn of(&self, ticket: Ticket) -> Option<&Drive> {
        self.newest.as_ref().filter(|(newest, ..)| *newest == ticket).map(|(.., drive)| drive)
    }

    /// Notes what the camera shows at the end of the newest drive; `None` when it is another one's.
    pub fn note(&mut self, ticket: Ticket, arrival: Arrival) -> Option<Drive> {
        let (_, _, drive) = self.newest.as_mut().filter(|(newest, ..)| *newest == ticket)?;
        drive.arrival = Some(arrival);
        Some(drive.clone())
    }

    /// Begins a drive: the goal is being sent. What was under way is replaced.
    pub fn start(&mut self, ticket: Ticket, goal_id: String, now: TimeDelta) -> Vec<Outcome> {
        let mut out = self.stop(|_| true, "replaced by a newer goal", now);
        if self.entries.len() >= DRIVES_MAX {
            // Only a server that confirms nothing for many goals in a row gets here.
            let oldest = self.entries.remove(0);
            if !matches!(oldest.phase, Phase::Watched { .. }) {
                let reason = "the navigation server confirms nothing";
                out.push(self.changed(
                    oldest.ticket,
                    oldest.began,
                    oldest.over(DriveState::Failed, Some(reason.into()), now),
                ));
            }
        }
        let drive = Drive {
            goal_id,
            state: DriveState::Requested,
            reason: None,
            arrival: None,
            distance_remaining_m: None,
            recoveries: None,
            elapsed_ms: 0.0,
        };
        self.newest = Some((ticket, now, drive.clone()));
        self.entries.push(Entry {
            ticket,
            drive,
            began: now,
            phase: Phase::Requested,
            asking: None,
            ask_at: None,
            pause: ASK_AGAIN.0,
            silent_since: None,
            cancelling: false,
            cancel_at: None,
            trouble: None,
            ended: None,
        });
        out
    }

    /// Cancels the drives under way whose goal's id is wanted.
    pub fn stop(&mut self, wanted: impl Fn(&str) -> bool, why: &str, now: TimeDelta) -> Vec<Outcome> {
        let mut out = Vec::new();
        for entry in &mut self.entries {
            if matches!(entry.phase, Phase::Requested | Phase::Driving) && wanted(&entry.drive.goal_id) {
                entry.stop(DriveState::Cancelled, why.to_owned(), now);
                out.extend(entry.cancel());
            }
        }
        out
    }

    /// The runtime stops: every drive is cancelled and over, whatever the server says.
    pub fn abandon(&mut self, why: &str, now: TimeDelta) -> Vec<Outcome> {
        let mut out = self.stop(|_| true, why, now);
        for entry in std::mem::take(&mut self.entries) {
            if !matches!(entry.phase, Phase::Watched { .. }) {
                out.push(self.changed(
                    entry.ticket,
                    entry.began,
                    entry.over(DriveState::Cancelled, Some(why.into()), now),
                ));
            }
        }
        out
    }

    /// When [`Drives::tick`] is due.
    pub fn next_tick(&self) -> Option<TimeDelta> {
        self.entries.iter().filter_map(|entry| entry.due(&self.limits)).min()
    }

    /// What was heard of one drive.
    pub fn news(&mut self, ticket: Ticket, news: DriveNews, now: TimeDelta) -> Vec<Outcome> {
        self.each(
            |entry, limits, out| {
                if entry.ticket == ticket { entry.news(news.clone(), limits, now, out) } else { Next::Stay }
            },
            now,
        )
    }

    /// Time passed.
    pub fn tick(&mut self, now: TimeDelta) -> Vec<Outcome> {
        self.each(|entry, limits, out| entry.tick(limits, now, out), now)
    }

    /// Steps every entry and carries out where it goes next.
    fn each(
        &mut self,
        mut step: impl FnMut(&mut Entry, &DriveLimits, &mut Vec<Outcome>) -> Next,
        now: TimeDelta,
    ) -> Vec<Outcome> {
        let mut out = Vec::new();
        let (mut kept, mut changes) = (Vec::with_capacity(self.entries.len()), Vec::new());
        for mut entry in std::mem::take(&mut self.entries) {
            let before = entry.drive.state;
            let next = step(&mut entry, &self.limits, &mut out);
            let (ticket, began) = (entry.ticket, entry.began);
            match next {
                Next::Stay => {
                    if !matches!(entry.phase, Phase::Watched { .. }) {
                        entry.drive.elapsed_ms = (now - began).as_millis_f64();
                        changes.push((ticket, began, entry.drive.clone(), entry.drive.state != before));
                    }
                    kept.push(entry);
                }
                Next::Over(state, reason) => {
                    if !matches!(entry.phase, Phase::Watched { .. }) {
                        changes.push((ticket, began, entry.over(state, reason, now), true));
                    }
                }
                Next::GiveUp(state, reason) => {
                    let drive = entry.over(state, Some(reason), now);
                    entry.phase = Phase::Watched { until: now + self.limits.longest };
                    changes.push((ticket, began, drive, true));
                    kept.push(entry);
                }
                Next::Forget => {}
            }
        }
        self.entries = kept;
        for (ticket, began, drive, news) in changes {
            let change = self.changed(ticket, began, drive);
            out.extend(news.then_some(change));
        }
        out
    }

    /// Keeps the newest drive's picture up to date; an older one's end may come after a newer one's beginning.
    fn changed(&mut self, ticket: Ticket, began: TimeDelta, drive: Drive) -> Outcome {
        if self.newest.as_ref().is_none_or(|(newest, ..)| *newest <= ticket) {
            self.newest = Some((ticket, began, drive.clone()));
        }
        Outcome::Changed(ticket, drive)
    }
}

/// Where an entry goes after a step.
enum Next {
    Stay,
    /// The server's word is known; nothing more is to be done.
    Over(DriveState, Option<String>),
    /// Over for the client only: the server may still drive, and is watched.
    GiveUp(DriveState, String),
    /// A watched drive that the server has let go.
    Forget,
}

impl Entry {
    fn over(&self, state: DriveState, reason: Option<String>, now: TimeDelta) -> Drive {
        let elapsed_ms = (now - self.began).as_millis_f64();
        Drive { state, reason, elapsed_ms, ..self.drive.clone() }
    }

    fn stop(&mut self, state: DriveState, why: String, now: TimeDelta) {
        self.phase = Phase::Stopping { until: now + STOP_WITHIN, why, state };
    }

    fn cancel(&mut self) -> Option<Outcome> {
        self.cancel_at = None;
        if std::mem::replace(&mut self.cancelling, true) {
            return None; // one is under way
        }
        Some(Outcome::Command(self.ticket, DriveCommand::Cancel))
    }

    fn ask_result(&mut self, now: TimeDelta) -> Option<Outcome> {
        self.ask_at = None;
        if self.asking.is_some() {
            return None;
        }
        self.asking = Some(now);
        Some(Outcome::Command(self.ticket, DriveCommand::AskResult))
    }

    /// Something was heard.
    fn alive(&mut self) {
        self.silent_since = None;
        self.pause = ASK_AGAIN.0;
        if matches!(self.phase, Phase::Driving) {
            self.drive.reason = None;
        }
    }

    /// The server drives to this goal.
    fn taken(&mut self, now: TimeDelta, out: &mut Vec<Outcome>) {
        match self.phase {
            Phase::Requested => {
                self.phase = Phase::Driving;
                self.drive.state = DriveState::Driving;
                out.extend(self.ask_result(now));
            }
            Phase::Driving => {}
            // The cancellation under way may have come before the goal was known.
            Phase::Stopping { .. } | Phase::Watched { .. } if self.cancelling => {
                self.cancel_at = Some(now + CANCEL_AGAIN);
            }
            Phase::Stopping { .. } | Phase::Watched { .. } => out.extend(self.cancel()),
        }
    }

    fn news(
        &mut self,
        news: DriveNews,
        limits: &DriveLimits,
        now: TimeDelta,
        out: &mut Vec<Outcome>,
    ) -> Next {
        match news {
            DriveNews::NotSent { reason } => match &self.phase {
                Phase::Stopping { why, state, .. } => Next::Over(*state, Some(why.clone())),
                _ => Next::Over(DriveState::Failed, Some(reason)),
            },
            DriveNews::Rejected { reason } => match &self.phase {
                Phase::Stopping { why, state, .. } => Next::Over(*state, Some(why.clone())),
                Phase::Watched { .. } => Next::Forget,
                _ => Next::Over(DriveState::Rejected, Some(reason)),
            },
            DriveNews::Accepted => {
                self.alive();
                self.taken(now, out);
                Next::Stay
            }
            // The server may have taken it all the same: until the time is up, its status and feedback tell.
            DriveNews::SendUnanswered => Next::Stay,
            DriveNews::Feedback { distance_remaining_m, recoveries } => {
                self.alive();
                self.drive.distance_remaining_m = distance_remaining_m;
                self.drive.recoveries = Some(recoveries);
                match self.phase {
                    Phase::Requested => self.taken(now, out),
                    // Whoever tells of progress has not stopped.
                    Phase::Watched { .. } if !self.cancelling && self.cancel_at.is_none() => {
                        self.cancel_at = Some(now + CANCEL_AGAIN);
                    }
                    _ => {}
                }
                Next::Stay
            }
            DriveNews::Status(state) => self.status(state, now, out),
            DriveNews::Result(result) => {
                self.asking = None;
                self.result(result)
            }
            DriveNews::ResultUnanswered { reason } => {
                self.asking = None;
                self.unanswered(&reason, limits, now)
            }
            DriveNews::Cancel(outcome) => {
                self.cancelling = false;
                self.cancelled(outcome, now, out)
            }
            DriveNews::CancelUnanswered { reason } => {
                self.cancelling = false;
                self.trouble = Some(reason);
                let watched = matches!(self.phase, Phase::Watched { .. });
                self.cancel_at = Some(now + if watched { WATCH_AGAIN } else { CANCEL_AGAIN });
                Next::Stay
            }
        }
    }

    /// The result's question ended without an answer: it is asked again. That is no end of the drive.
    fn unanswered(&mut self, reason: &str, limits: &DriveLimits, now: TimeDelta) -> Next {
        if matches!(self.phase, Phase::Watched { .. }) {
            return Next::Stay;
        }
        let since = *self.silent_since.get_or_insert(now);
        self.ask_at = Some(now + self.pause);
        self.pause = (self.pause + self.pause).min(ASK_AGAIN.1);
        if matches!(self.phase, Phase::Driving) {
            let left = (since + limits.contact - now).max(TimeDelta::ZERO);
            self.drive.reason = Some(format!(
                "no contact with the navigation server ({reason}); asking again, cancelling in {:.0} s",
                left.as_secs_f64()
            ));
        }
        Next::Stay
    }

    fn status(&mut self, state: GoalState, now: TimeDelta, out: &mut Vec<Outcome>) -> Next {
        self.alive();
        let end = match state {
            GoalState::Accepted | GoalState::Executing => {
                self.taken(now, out);
                return Next::Stay;
            }
            GoalState::Canceling => return Next::Stay,
            GoalState::Succeeded => NavResult::Succeeded,
            GoalState::Canceled => NavResult::Canceled,
            GoalState::Aborted => NavResult::Aborted { code: 0, message: String::new() },
        };
        match self.phase {
            Phase::Watched { .. } => return Next::Forget,
            Phase::Stopping { .. } => return self.result(end),
            Phase::Requested => self.taken(now, out),
            Phase::Driving => out.extend(self.ask_result(now)),
        }
        self.ended.get_or_insert((now + RESULT_WITHIN, end));
        Next::Stay
    }

    /// The server says how the drive ended.
    fn result(&self, result: NavResult) -> Next {
        let (why, stopped) = match &self.phase {
            Phase::Stopping { why, state, .. } => (Some(why.clone()), *state),
            Phase::Watched { .. } => return Next::Forget,
            _ => (None, DriveState::Cancelled),
        };
        match result {
            NavResult::Succeeded => Next::Over(DriveState::Arrived, None),
            NavResult::Canceled => {
                let why = why.unwrap_or_else(|| "cancelled at the navigation server".into());
                Next::Over(stopped, Some(why))
            }
            NavResult::Aborted { code, message } => {
                let words = if message.is_empty() { "no reason given" } else { &message };
                let reason = format!("the navigation server gave up: {words} (code {code})");
                Next::Over(DriveState::Failed, Some(reason))
            }
            NavResult::Unknown => {
                let what = "the navigation server no longer knows the goal; was it restarted?";
                Next::Over(DriveState::Failed, Some(what.into()))
            }
        }
    }

    fn cancelled(&mut self, outcome: CancelOutcome, now: TimeDelta, out: &mut Vec<Outcome>) -> Next {
        match (&self.phase, outcome) {
            (Phase::Watched { .. }, CancelOutcome::Canceling | CancelOutcome::AlreadyOver) => Next::Forget,
            (Phase::Stopping { .. }, CancelOutcome::Canceling | CancelOutcome::AlreadyOver) => {
                // The result says how it ended.
                (self.trouble, self.cancel_at) = (None, None);
                out.extend(self.ask_result(now));
                Next::Stay
            }
            // It may have been sent and not accepted yet: watched.
            (Phase::Stopping { why, state, .. }, CancelOutcome::UnknownGoal) => {
                Next::GiveUp(*state, why.clone())
            }
            (Phase::Stopping { .. } | Phase::Watched { .. }, CancelOutcome::Rejected) => {
                self.trouble = Some("the navigation server refuses to cancel".into());
                self.cancel_at = Some(now + CANCEL_AGAIN);
                Next::Stay
            }
            _ => Next::Stay,
        }
    }

    fn due(&self, limits: &DriveLimits) -> Option<TimeDelta> {
        let phase = match self.phase {
            Phase::Requested => self.began + limits.accept,
            Phase::Driving => {
                let silence = self.silent_since.map(|since| {
                    let held = self.asking.map_or(TimeDelta::MAX, |asked| asked + HELD);
                    held.min(since + limits.contact)
                });
                let ended = self.ended.as_ref().map(|(until, _)| *until);
                silence.into_iter().chain(ended).fold(self.began + limits.longest, TimeDelta::min)
            }
            Phase::Stopping { until, .. } | Phase::Watched { until } => until,
        };
        [Some(phase), self.ask_at, self.cancel_at].into_iter().flatten().min()
    }

    fn tick(&mut self, limits: &DriveLimits, now: TimeDelta, out: &mut Vec<Outcome>) -> Next {
        let due = |at: Option<TimeDelta>| at.is_some_and(|at| now >= at);
        if due(self.cancel_at) {
            out.extend(self.cancel());
        }
        if due(self.ask_at) {
            out.extend(self.ask_result(now));
        }
        match &self.phase {
            Phase::Requested if now >= self.began + limits.accept => {
                out.extend(self.cancel());
                Next::GiveUp(
                    DriveState::Failed,
                    format!(
                        "the navigation server at {} did not accept the goal within {:.1} s; it was cancelled, \
                         and is cancelled again should it be accepted late",
                        limits.action,
                        limits.accept.as_secs_f64()
                    ),
                )
            }
            Phase::Driving => {
                if let Some((_, end)) = self.ended.take_if(|(until, _)| now >= *until) {
                    return self.result(end);
                }
                if self.asking.is_some_and(|asked| now >= asked + HELD) {
                    self.alive();
                }
                let elapsed = now - self.began;
                let silent = self.silent_since.map(|since| now - since).filter(|s| *s >= limits.contact);
                let (state, why) = if let Some(silent) = silent {
                    let secs = silent.as_secs_f64();
                    let why =
                        format!("no contact with the navigation server for {secs:.1} s: cancelled by its id");
                    (DriveState::Failed, why)
                } else if elapsed >= limits.longest {
                    (DriveState::Cancelled, format!("still under way after {:.0} s", elapsed.as_secs_f64()))
                } else {
                    return Next::Stay;
                };
                self.stop(state, why, now);
                out.extend(self.cancel());
                Next::Stay
            }
            Phase::Stopping { until, why, .. } if now >= *until => {
                let trouble = self.trouble.as_ref().map(|t| format!(" ({t})")).unwrap_or_default();
                let reason = format!("{why}, but the navigation server did not say that it stopped{trouble}");
                self.cancel_at = Some(now + CANCEL_AGAIN);
                Next::GiveUp(DriveState::Failed, reason)
            }
            Phase::Watched { until } if now >= *until => Next::Forget,
            _ => Next::Stay,
        }
    }
}
