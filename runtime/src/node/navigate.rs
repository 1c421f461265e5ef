//! The client of nav2's NavigateToPose action: carries out what the agent wants of drives, and brings it the news.
//!
//! One task owns the client. It keeps nothing but the server's names of the goals that were sent; what the news mean
//! is decided by the agent ([`crate::agent::DriveNews`]). Each question is a task of its own, so that none waits for
//! another.

use crate::agent::{DriveCommand, DriveNews, Ticket};
use crate::config::NavigateTable;
use mindseye_bridge::msg::PoseStamped;
use mindseye_bridge::ros::{GoalId, GoalState, NavError, NavigateClient, RosError, RosSession};
use mindseye_bridge::time::TimeDelta;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Commands that wait for the task, which takes each at once.
const COMMANDS_WAITING: usize = 64;
/// Goals whose names are kept; more than the agent follows.
const IDS_MAX: usize = 64;
/// Questions under way; more are refused.
const QUESTIONS_MAX: usize = 256;
/// Feedback is passed on at most this often.
const FEEDBACK_EVERY: Duration = Duration::from_millis(200);
/// A cancellation is answered within this, or not at all.
const CANCEL_WITHIN: Duration = Duration::from_secs(3);
/// So long after the time to accept, a late acceptance is still heard.
const ACCEPTED_LATE: Duration = Duration::from_secs(60);
/// So long after the longest drive, its result is still heard.
const RESULT_LATE: Duration = Duration::from_secs(20);

/// What the agent wants.
pub(super) enum Command {
    /// Send this goal.
    Send { ticket: Ticket, pose: Box<PoseStamped> },
    /// Ask about a goal that was sent.
    Ask { ticket: Ticket, command: DriveCommand },
}

impl Command {
    /// What it means that it could not be carried out.
    pub fn unanswered(self, reason: String) -> DriveNews {
        match self {
            Self::Send { .. } => DriveNews::NotSent { reason },
            Self::Ask { command: DriveCommand::AskResult, .. } => DriveNews::ResultUnanswered { reason },
            Self::Ask { command: DriveCommand::Cancel, .. } => DriveNews::CancelUnanswered { reason },
        }
    }
}

/// The task. It ends when `commands` is closed and every cancellation is answered.
pub(super) struct Navigator {
    client: Arc<NavigateClient>,
    table: NavigateTable,
    commands: mpsc::Receiver<Command>,
    news: mpsc::Sender<(Ticket, DriveNews)>,
    ids: VecDeque<(Ticket, GoalId)>,
    fed: Option<Instant>,
}

type Questions = JoinSet<(Ticket, DriveNews)>;

impl Navigator {
    /// A task and the way to command it, where an action is configured.
    pub fn new(
        session: &RosSession,
        table: &NavigateTable,
        news: mpsc::Sender<(Ticket, DriveNews)>,
    ) -> Result<Option<(Self, mpsc::Sender<Command>)>, RosError> {
        if table.action.is_empty() {
            return Ok(None);
        }
        let client = Arc::new(session.navigate_client(&table.action)?);
        let (sender, commands) = mpsc::channel(COMMANDS_WAITING);
        let (ids, table) = (VecDeque::with_capacity(IDS_MAX), table.clone());
        Ok(Some((Self { client, table, commands, news, ids, fed: None }, sender)))
    }

    pub async fn run(mut self) {
        let mut questions = Questions::new();
        let client = self.client.clone();
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.carry_out(command, &mut questions).await,
                    None => break,
                },
                Some(answered) = questions.join_next(), if !questions.is_empty() => {
                    // A question's task neither panics nor is it aborted.
                    if let Ok((ticket, news)) = answered {
                        self.tell(ticket, news).await;
                    }
                }
                received = client.status().recv() => match received {
                    Ok(received) => {
                        for goal in &received.message.status_list {
                            let ticket = self.ticket(goal.goal_info.goal_id);
                            if let Some((ticket, state)) = ticket.zip(GoalState::from_number(goal.status)) {
                                self.tell(ticket, DriveNews::Status(state)).await;
                            }
                        }
                    }
                    Err(error) => unreadable(&error).await,
                },
                received = client.feedback().recv() => match received {
                    Ok(received) => self.feedback(&received.message),
                    Err(error) => unreadable(&error).await,
                },
            }
        }
        // The agent is gone and has cancelled what it knew of; what is accepted only now is cancelled as well.
        while let Some(answered) = questions.join_next().await {
            if let Ok((ticket, DriveNews::Accepted)) = answered {
                let command = DriveCommand::Cancel;
                self.carry_out(Command::Ask { ticket, command }, &mut questions).await;
            }
        }
    }

    async fn tell(&self, ticket: Ticket, news: DriveNews) {
        // Fails only when the agent is gone, which needs no news.
        let _ = self.news.send((ticket, news)).await;
    }

    fn ticket(&self, id: GoalId) -> Option<Ticket> {
        self.ids.iter().rev().find(|(_, known)| *known == id).map(|(ticket, _)| *ticket)
    }

    fn feedback(&mut self, feedback: &mindseye_bridge::msg::NavigateFeedback) {
        let Some(ticket) = self.ticket(feedback.goal_id) else { return };
        if self.fed.is_some_and(|at| at.elapsed() < FEEDBACK_EVERY) {
            return;
        }
        self.fed = Some(Instant::now());
        let left = feedback.distance_remaining;
        let news = DriveNews::Feedback {
            distance_remaining_m: left.is_finite().then_some(left),
            recoveries: feedback.number_of_recoveries,
        };
        // The next one comes soon.
        let _ = self.news.try_send((ticket, news));
    }

    async fn carry_out(&mut self, command: Command, questions: &mut Questions) {
        let (Command::Send { ticket, .. } | Command::Ask { ticket, .. }) = command;
        if questions.len() >= QUESTIONS_MAX {
            let news = command.unanswered("too many questions to the navigation server are open".into());
            return self.tell(ticket, news).await;
        }
        let client = self.client.clone();
        match command {
            Command::Send { ticket, pose } => {
                let id = client.new_id();
                if self.ids.len() == IDS_MAX {
                    self.ids.pop_front();
                }
                self.ids.push_back((ticket, id));
                let table = self.table.clone();
                questions.spawn(async move { (ticket, send(&client, id, &pose, &table).await) });
            }
            Command::Ask { ticket, command } => {
                let Some((_, id)) = self.ids.iter().find(|(known, _)| *known == ticket).copied() else {
                    let command = Command::Ask { ticket, command };
                    return self.tell(ticket, command.unanswered("the goal was never sent".into())).await;
                };
                let longest = millis(self.table.longest_ms);
                questions.spawn(async move { (ticket, ask(&client, id, command, longest).await) });
            }
        }
    }
}

/// A message that does not decode is dropped; a closed session has no more of them.
async fn unreadable(error: &RosError) {
    if matches!(error, RosError::Closed) {
        std::future::pending::<()>().await;
    }
    tracing::warn!(%error, "news of a drive was dropped");
}

fn millis(ms: i64) -> Duration {
    TimeDelta::from_millis(ms).to_std()
}

async fn send(client: &NavigateClient, id: GoalId, pose: &PoseStamped, table: &NavigateTable) -> DriveNews {
    let accept = millis(table.accept_ms);
    // Less than the time to accept, so that the reason is known before that is up.
    let found = accept * 4 / 5;
    let no_server = || {
        let (action, secs) = (&table.action, found.as_secs_f64());
        let reason =
            format!("no navigation server was found at {action} within {secs:.1} s; is nav2 running?");
        DriveNews::NotSent { reason }
    };
    if !client.wait_for_server(found).await {
        return no_server();
    }
    match client.send_goal_async(id, pose, &table.behavior_tree, accept + ACCEPTED_LATE).await {
        Ok(_) => DriveNews::Accepted,
        Err(error @ NavError::Rejected { .. }) => DriveNews::Rejected { reason: error.to_string() },
        Err(NavError::Ros(error @ (RosError::Zenoh { .. } | RosError::Key(_)))) => {
            DriveNews::NotSent { reason: error.to_string() }
        }
        Err(error) => {
            tracing::warn!(%error, "the navigation server did not say whether it takes the goal");
            DriveNews::SendUnanswered
        }
    }
}

async fn ask(client: &NavigateClient, id: GoalId, command: DriveCommand, longest: Duration) -> DriveNews {
    let unanswered = |error: NavError| {
        // The goal's ticket means nothing here: only the reason is used.
        Command::Ask { ticket: Ticket(0), command }.unanswered(error.to_string())
    };
    match command {
        DriveCommand::AskResult => {
            client.result_async(id, longest + RESULT_LATE).await.map_or_else(unanswered, DriveNews::Result)
        }
        DriveCommand::Cancel => {
            client.cancel_async(id, CANCEL_WITHIN).await.map_or_else(unanswered, DriveNews::Cancel)
        }
    }
}
