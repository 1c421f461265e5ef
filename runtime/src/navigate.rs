//! Driving by nav2's NavigateToPose action instead of the topic `/goal_pose`: the goal is sent, followed, cancelled,
//! and its end is told.
//!
//! One task owns the action's client. The agent's thread gives it commands and gets a [`Drive`] for every change.
//! There is at most one drive at a time; a new one replaces the old one, as nav2 itself does. When the node stops,
//! a drive under way is cancelled: no robot goes on driving for a runtime that is gone.

use crate::agent::Ticket;
use mindseye_bridge::clock;
use mindseye_bridge::msg::PoseStamped;
use mindseye_bridge::ros::{CancelOutcome, GoalHandle, NavError, NavResult, NavigateClient, RosError};
use mindseye_bridge::time::TimeDelta;
use serde::Serialize;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Commands that wait for the task.
const COMMANDS_WAITING: usize = 16;
/// How often feedback is looked at.
const FEEDBACK_EVERY: Duration = Duration::from_millis(200);
/// A cancelled drive must be over after this long.
const CANCEL_WITHIN: Duration = Duration::from_secs(5);

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

/// A drive to a goal that was found, for status and answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drive {
    /// The client's id of the goal.
    pub goal_id: String,
    /// Where it stands.
    pub state: DriveState,
    /// Why it ended, unless it arrived.
    pub reason: Option<String>,
    /// Metres left along the path, as the server says.
    pub distance_remaining_m: Option<f32>,
    /// Times that the server had to recover.
    pub recoveries: Option<i16>,
    /// Since the goal was sent.
    pub elapsed_ms: f64,
}

impl Drive {
    /// A drive that was just asked for.
    #[must_use]
    pub fn requested(goal_id: impl Into<String>) -> Self {
        Self {
            goal_id: goal_id.into(),
            state: DriveState::Requested,
            reason: None,
            distance_remaining_m: None,
            recoveries: None,
            elapsed_ms: 0.0,
        }
    }
}

pub(crate) enum Command {
    /// Drive there.
    Go { ticket: Ticket, goal_id: String, pose: Box<PoseStamped> },
    /// Stop the drive of this ticket.
    Stop { ticket: Ticket },
}

/// How to drive.
pub(crate) struct NavigatorSettings {
    /// Name of the action, for messages.
    pub action: String,
    /// nav2's behaviour tree; empty for its default.
    pub behavior_tree: String,
    /// Longest time to wait for the server's acceptance.
    pub accept: Duration,
    /// Longest drive.
    pub longest: Duration,
}

type Ending = Pin<Box<dyn Future<Output = Result<NavResult, NavError>> + Send>>;

struct Current {
    ticket: Ticket,
    handle: GoalHandle,
    drive: Drive,
    began: TimeDelta,
    ending: Ending,
    /// Cancelled; when, at the latest, that must have had effect, and what to say then.
    stopping: Option<(TimeDelta, String)>,
}

/// The task. It ends when `commands` is closed.
pub(crate) struct Navigator {
    client: Arc<NavigateClient>,
    settings: NavigatorSettings,
    commands: mpsc::Receiver<Command>,
    report: Box<dyn Fn(Ticket, Drive) + Send>,
    current: Option<Current>,
}

impl Navigator {
    /// A task, and the way to command it. `report` is called for every change of state and for feedback, and must
    /// not block.
    pub(crate) fn new(
        client: NavigateClient,
        settings: NavigatorSettings,
        report: Box<dyn Fn(Ticket, Drive) + Send>,
    ) -> (Self, mpsc::Sender<Command>) {
        let (sender, commands) = mpsc::channel(COMMANDS_WAITING);
        (Self { client: Arc::new(client), settings, commands, report, current: None }, sender)
    }

    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(FEEDBACK_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let ending = async {
                match self.current.as_mut() {
                    Some(current) => current.ending.as_mut().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Go { ticket, goal_id, pose }) => self.go(ticket, goal_id, *pose).await,
                    Some(Command::Stop { ticket }) => self.stop(Some(ticket), "cancelled").await,
                    None => break,
                },
                result = ending => self.ended(result),
                _ = tick.tick() => self.tick().await,
            }
        }
        self.stop(None, "the runtime stops").await;
    }

    fn tell(&mut self, state: DriveState, reason: Option<String>) {
        if let Some(current) = &mut self.current {
            current.drive.state = state;
            current.drive.reason = reason;
            current.drive.elapsed_ms = (clock::monotonic() - current.began).as_millis_f64();
            (self.report)(current.ticket, current.drive.clone());
        }
        if state.is_over() {
            self.current = None;
        }
    }

    async fn go(&mut self, ticket: Ticket, goal_id: String, pose: PoseStamped) {
        // The server replaces the goal; its old result says nothing about the new one.
        self.tell(DriveState::Cancelled, Some("replaced by a newer goal".into()));
        let began = clock::monotonic();
        let mut drive = Drive::requested(goal_id);
        let (client, tree) = (self.client.clone(), self.settings.behavior_tree.clone());
        let accept = self.settings.accept;
        let sent = tokio::task::spawn_blocking(move || client.send_goal(&pose, &tree, accept)).await;
        let handle = match sent {
            Ok(Ok(handle)) => handle,
            Ok(Err(error)) => {
                (drive.state, drive.reason) = match error {
                    NavError::Ros(RosError::Timeout { .. }) => (
                        DriveState::Failed,
                        Some(format!(
                            "no navigation server answered at {} within {:.1} s; is nav2 running?",
                            self.settings.action,
                            accept.as_secs_f64()
                        )),
                    ),
                    NavError::Rejected { .. } => (DriveState::Rejected, Some(error.to_string())),
                    _ => (DriveState::Failed, Some(error.to_string())),
                };
                drive.elapsed_ms = (clock::monotonic() - began).as_millis_f64();
                return (self.report)(ticket, drive);
            }
            Err(error) => {
                (drive.state, drive.reason) = (DriveState::Failed, Some(error.to_string()));
                return (self.report)(ticket, drive);
            }
        };
        let (client, longest) = (self.client.clone(), self.settings.longest);
        // Cancelling comes before the server's own silence is noticed.
        let patience = longest + 4 * CANCEL_WITHIN;
        let ending: Ending = Box::pin(async move { client.result_async(&handle, patience).await });
        self.current = Some(Current { ticket, handle, drive, began, ending, stopping: None });
        self.tell(DriveState::Driving, None);
    }

    /// Cancels the drive of this ticket, or any.
    async fn stop(&mut self, ticket: Option<Ticket>, why: &str) {
        let Some(current) = self.current.as_mut().filter(|c| ticket.is_none_or(|t| c.ticket == t)) else {
            return;
        };
        if current.stopping.is_some() {
            return;
        }
        current.stopping = Some((clock::monotonic() + TimeDelta::from(CANCEL_WITHIN), why.to_owned()));
        let (client, handle) = (self.client.clone(), current.handle);
        let asked = tokio::task::spawn_blocking(move || client.cancel(&handle, CANCEL_WITHIN)).await;
        match asked {
            // The result says how it ended.
            Ok(Ok(CancelOutcome::Canceling | CancelOutcome::AlreadyOver)) => {}
            Ok(Ok(CancelOutcome::UnknownGoal)) => self.tell(DriveState::Cancelled, Some(why.to_owned())),
            Ok(Ok(CancelOutcome::Rejected)) => {
                self.tell(DriveState::Failed, Some("the navigation server refuses to cancel".into()));
            }
            Ok(Err(error)) => self.tell(DriveState::Failed, Some(format!("not cancelled: {error}"))),
            Err(error) => self.tell(DriveState::Failed, Some(format!("not cancelled: {error}"))),
        }
    }

    fn ended(&mut self, result: Result<NavResult, NavError>) {
        let why = self.current.as_ref().and_then(|c| c.stopping.as_ref()).map(|(_, why)| why.clone());
        let (state, reason) = match result {
            Ok(NavResult::Succeeded) => (DriveState::Arrived, None),
            Ok(NavResult::Canceled) => {
                let why = why.unwrap_or_else(|| "cancelled at the navigation server".into());
                (DriveState::Cancelled, Some(why))
            }
            Ok(NavResult::Aborted { code, message }) => {
                let words = if message.is_empty() { "no reason given" } else { &message };
                (DriveState::Failed, Some(format!("the navigation server gave up: {words} (code {code})")))
            }
            Ok(NavResult::Unknown) => {
                let what = "the navigation server no longer knows the goal; was it restarted?";
                (DriveState::Failed, Some(what.into()))
            }
            Err(error) => (DriveState::Failed, Some(error.to_string())),
        };
        self.tell(state, reason);
    }

    async fn tick(&mut self) {
        let mut news = false;
        while let Ok(Some(feedback)) = self.client.feedback().try_recv() {
            let feedback = feedback.message;
            let Some(current) = self.current.as_mut().filter(|c| c.handle.id == feedback.goal_id) else {
                continue;
            };
            let left = feedback.distance_remaining;
            current.drive.distance_remaining_m = left.is_finite().then_some(left);
            current.drive.recoveries = Some(feedback.number_of_recoveries);
            news = true;
        }
        let Some(current) = &self.current else { return };
        let now = clock::monotonic();
        let elapsed = now - current.began;
        match &current.stopping {
            Some((until, why)) if now > *until => {
                let reason = format!("{why}, but the navigation server did not say that it stopped");
                self.tell(DriveState::Failed, Some(reason));
            }
            None if elapsed > TimeDelta::from(self.settings.longest) => {
                let why = format!("still under way after {:.0} s", elapsed.as_secs_f64());
                self.stop(None, &why).await;
            }
            _ if news => self.tell(DriveState::Driving, None),
            _ => {}
        }
    }
}
