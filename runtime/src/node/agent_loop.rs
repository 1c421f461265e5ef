//! The agent's thread: carries out what [`Agent::step`] says, and decides nothing by itself.

use super::figures::{Figures, lock};
use super::navigate::Command;
use super::publish::{Outputs, StatusSource, stamped_pose};
use super::requests::{Clients, Inbox, Origin};
use super::worker::{Job, Work};
use super::{NodeEvent, Observer};
use crate::agent::{Action, Agent, DriveNews, Event, Ticket};
use crate::ground::Grounded;
use crate::senses::ContextHandle;
use mindseye_bridge::answer::{Answer, Status};
use mindseye_bridge::clock;
use mindseye_bridge::ros::Claim;
use mindseye_bridge::time::TimeDelta;
use ringbuf::HeapCons;
use ringbuf::traits::Consumer;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use tokio::sync::mpsc;

/// Longest wait for a request: events of the senses and news of drives are looked at that often.
const LOOK_EVERY: TimeDelta = TimeDelta::from_millis(5);

/// What the thread holds.
pub(super) struct AgentLoop {
    pub agent: Agent,
    pub robot: String,
    /// Between two status messages; zero: never.
    pub period: TimeDelta,
    pub requests: Receiver<Inbox>,
    pub events: HeapCons<Event>,
    pub jobs: SyncSender<Job>,
    /// Ticket of the goal that is still wanted; 0 = none.
    pub wanted: Arc<AtomicU64>,
    pub outputs: Outputs,
    pub commands: Option<mpsc::Sender<Command>>,
    pub drives: mpsc::Receiver<(Ticket, DriveNews)>,
    pub clients: Clients,
    pub claim: Claim,
    /// [`Claim::changes`] when it was last looked at.
    pub claim_changes: u64,
    pub figures: Arc<Figures>,
    pub context: ContextHandle,
    pub observer: Arc<Observer>,
    pub stop: Arc<AtomicBool>,
}

impl AgentLoop {
    /// Until the node stops.
    pub fn run(mut self) {
        let mut status_due = clock::monotonic();
        loop {
            let now = clock::monotonic();
            let tick = self.agent.next_tick().map_or(TimeDelta::MAX, |at| at - now);
            let request = match self.requests.recv_timeout(LOOK_EVERY.min(tick).to_std()) {
                Ok(Inbox::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(request) => Some(request),
                Err(RecvTimeoutError::Timeout) => None,
            };
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            // What the senses saw before the request counts for it.
            while let Some(event) = self.events.try_pop() {
                self.step(event, None);
            }
            while let Ok((ticket, news)) = self.drives.try_recv() {
                self.step(Event::Drive { ticket, news }, None);
            }
            self.look_at_rivals();
            match request {
                Some(request) => self.request(request),
                None => self.step(Event::Tick, None),
            }
            if self.period > TimeDelta::ZERO && clock::monotonic() >= status_due {
                status_due = clock::monotonic() + self.period;
                self.publish_status();
            }
        }
        self.step(Event::Stop, None);
        self.wanted.store(0, Ordering::Relaxed);
    }

    /// Of several nodes with one robot's name only the one that was started first answers and publishes.
    fn look_at_rivals(&mut self) {
        let changes = self.claim.changes();
        if std::mem::replace(&mut self.claim_changes, changes) == changes {
            return;
        }
        let (own, others) = (self.claim.own(), self.claim.others());
        let robot = &self.robot;
        let first = others.first().filter(|first| *first < own);
        match (first, others.first()) {
            (Some(first), _) => tracing::warn!(
                robot,
                "another node ({first}) with this robot's name was started earlier: this one ({own}) answers and \
                 publishes nothing until it is gone. Give each robot its own name"
            ),
            (None, Some(other)) => tracing::warn!(
                robot,
                "another node ({other}) has this robot's name: this one ({own}) was started earlier and goes on, the \
                 other answers and publishes nothing. Give each robot its own name"
            ),
            (None, None) => tracing::info!(robot, "no other node has this robot's name any more"),
        }
        let name = first.map(ToString::to_string);
        self.step(Event::Rival { name }, None);
    }

    fn publish_status(&self) {
        let status = self.status();
        let document = status.document();
        (self.observer)(NodeEvent::Status(&document));
        self.outputs.status(&document, &status);
    }

    fn status(&self) -> StatusSource<'_> {
        StatusSource {
            robot: &self.robot,
            claim: &self.claim,
            agent: &self.agent,
            figures: &self.figures,
            context: &self.context,
            record: self.outputs.record.as_ref(),
            now: clock::monotonic(),
        }
    }

    fn request(&mut self, request: Inbox) {
        match request {
            Inbox::Goal { goal, origin, publish, wait } => {
                (self.observer)(NodeEvent::Asked(&goal));
                let ticket = self.clients.register(origin);
                self.step(Event::Goal { ticket, goal, publish, wait }, None);
            }
            Inbox::Bad { id, reason, origin } => {
                let ticket = self.clients.register(origin);
                self.step(Event::BadGoal { ticket, id, reason }, None);
            }
            Inbox::Cancel { id } => self.step(Event::Cancel { id }, None),
            // Like goals: the node that was started earlier tells.
            Inbox::Status(_) if self.agent.has_rival() => {}
            Inbox::Status(query) => {
                if let Err(error) = query.reply(&self.status().document().to_string()) {
                    tracing::debug!(%error, "client is gone");
                }
            }
            Inbox::Draft { ticket, answer } => self.step(Event::Draft { ticket, answer }, None),
            Inbox::Done { ticket, grounded: Some(grounded) } => {
                let answer = Box::new(grounded.answer.clone());
                self.step(Event::Done { ticket, answer }, Some(&grounded));
            }
            Inbox::Looked { ticket, base_from_goal } => {
                tracing::info!(?base_from_goal, "arrived: looked once more");
                self.step(Event::Looked { ticket, base_from_goal }, None);
            }
            Inbox::Done { ticket, grounded: None } => {
                // Stopped on demand, which was answered then; or the memory was lost meanwhile.
                let reason = "what was seen got lost meanwhile: the camera's stream began anew".into();
                self.step(Event::NoAnswer { ticket, reason }, None);
            }
            Inbox::Stop => {}
        }
    }

    /// Steps the agent and carries out what it says.
    fn step(&mut self, event: Event, evidence: Option<&Grounded>) {
        for action in self.agent.step(event, clock::monotonic()) {
            match action {
                Action::Begin { ticket, goal, until } => {
                    self.wanted.store(ticket.0, Ordering::Relaxed);
                    if self.jobs.try_send(Job { ticket, goal, work: Work::Ground { until } }).is_err() {
                        // The mind is still letting go of earlier goals.
                        let reason = "busy: too many goals in a row; ask again".into();
                        self.step(Event::NoAnswer { ticket, reason }, None);
                    }
                }
                Action::Halt { .. } => self.wanted.store(0, Ordering::Relaxed),
                Action::PublishGoal { stamp, answer } => self.outputs.goal_pose(&answer, stamp),
                Action::StartDrive { ticket, stamp, answer } => {
                    if let Some(pose) = stamped_pose(&answer, stamp) {
                        self.command(ticket, Command::Send { ticket, pose: Box::new(pose) });
                    }
                }
                Action::Drive { ticket, command } => self.command(ticket, Command::Ask { ticket, command }),
                Action::LookAgain { ticket, goal } => {
                    // A mind that is busy has newer goals to work on: the arrival stays as it was told.
                    let _ = self.jobs.try_send(Job { ticket, goal, work: Work::Look });
                }
                Action::AskAgain { goal } => {
                    let ticket = self.clients.register(Origin::Topic);
                    self.step(Event::Goal { ticket, goal: *goal, publish: true, wait: false }, None);
                }
                Action::DriveChanged { drive } => {
                    if drive.state.is_over() {
                        let (goal, state, reason) = (&drive.goal_id, drive.state, &drive.reason);
                        tracing::info!(goal, ?state, reason, "drive is over");
                    }
                    self.publish_status();
                }
                Action::Answer { answer, .. } => self.answered(answer, evidence),
                Action::Leave { ticket } => {
                    tracing::info!("a goal is left to the node that was started earlier");
                    self.clients.leave(ticket);
                }
                Action::Reply { ticket, answer, drive } => {
                    self.clients.reply(ticket, &answer, drive.as_deref());
                }
            }
        }
    }

    fn answered(&mut self, answer: Box<Answer>, evidence: Option<&Grounded>) {
        let began = clock::monotonic();
        if let Some(grounded) = evidence {
            self.outputs.evidence(&answer, grounded);
        }
        match answer.status {
            Status::Found => tracing::info!(goal = answer.goal_id, "found"),
            status => tracing::info!(goal = answer.goal_id, %status, reason = answer.reason, "answered"),
        }
        (self.observer)(NodeEvent::Answered(&answer));
        self.publish_status();
        let took = (clock::monotonic() - began).as_millis_f64();
        lock(&self.figures.profile).push("publish", took);
    }

    fn command(&mut self, ticket: Ticket, command: Command) {
        let Some(commands) = &self.commands else { return };
        let Err(refused) = commands.try_send(command) else { return };
        let reason = "the navigation client is too slow: commands pile up".to_owned();
        let news = refused.into_inner().unanswered(reason);
        self.step(Event::Drive { ticket, news }, None);
    }
}
