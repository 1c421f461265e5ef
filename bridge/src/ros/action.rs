//! Client of nav2's NavigateToPose action: three services and two topics.

use super::keys::Qos;
use super::queue::QueuePolicy;
use super::service::ServiceClient;
use super::session::RosSession;
use super::{RosError, Subscriber};
use crate::msg::{
    CancelGoalRequest, CancelGoalResponse, GoalInfo, GoalStatusArray, NavigateFeedback,
    NavigateGetResultRequest, NavigateGetResultResponse, NavigateSendGoalRequest, NavigateSendGoalResponse,
    PoseStamped,
};
use crate::time::Timestamp;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Names a goal at the navigation server: a UUID of version 4, chosen by the client.
pub type GoalId = [u8; 16];

impl RosSession {
    /// A client of a `nav2_msgs/action/NavigateToPose` server, usually `/navigate_to_pose`.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn navigate_client(&self, action: &str) -> Result<NavigateClient, RosError> {
        NavigateClient::declare(self, action)
    }
}

/// Client of nav2: sends a goal, follows it, cancels it, reports how it ended.
#[derive(Debug)]
pub struct NavigateClient {
    send: ServiceClient<NavigateSendGoalRequest, NavigateSendGoalResponse>,
    result: ServiceClient<NavigateGetResultRequest, NavigateGetResultResponse>,
    cancel: ServiceClient<CancelGoalRequest, CancelGoalResponse>,
    feedback: Subscriber<NavigateFeedback>,
    status: Subscriber<GoalStatusArray>,
    seed: [u8; 16],
    count: AtomicU64,
}

/// A goal that the server accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoalHandle {
    /// Its name.
    pub id: GoalId,
    /// When the server accepted it, on the server's clock.
    pub accepted_at: Timestamp,
}

/// How a drive ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NavResult {
    /// The robot stands at the goal.
    Succeeded,
    /// Cancelled.
    Canceled,
    /// Given up, with nav2's code and words (Humble has none).
    Aborted {
        /// 0 = not given.
        code: u16,
        /// For a person.
        message: String,
    },
    /// The server does not know the goal (it was restarted).
    Unknown,
}

/// A goal's state as published on the server's status topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoalState {
    /// Taken, not begun.
    Accepted,
    /// The robot drives.
    Executing,
    /// A cancellation was taken.
    Canceling,
    /// The robot stands at the goal.
    Succeeded,
    /// Cancelled.
    Canceled,
    /// Given up.
    Aborted,
}

impl GoalState {
    /// The state of a `action_msgs/msg/GoalStatus` number; `None` for unknown ones.
    #[must_use]
    pub const fn from_number(status: i8) -> Option<Self> {
        Some(match status {
            1 => Self::Accepted,
            2 => Self::Executing,
            3 => Self::Canceling,
            4 => Self::Succeeded,
            5 => Self::Canceled,
            6 => Self::Aborted,
            _ => return None,
        })
    }
}

/// What a cancel request did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelOutcome {
    /// The goal is being cancelled.
    Canceling,
    /// The server refused.
    Rejected,
    /// The server does not know the goal.
    UnknownGoal,
    /// The goal is over already.
    AlreadyOver,
}

/// What a drive could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NavError {
    /// nav2 does not take the goal.
    #[error("the navigation server rejected the goal; is it active, and is the frame {frame:?} known to it?")]
    Rejected {
        /// Frame of the pose.
        frame: String,
    },
    /// Nothing came back, or nonsense.
    #[error(transparent)]
    Ros(#[from] RosError),
}

impl NavigateClient {
    fn declare(session: &RosSession, action: &str) -> Result<Self, RosError> {
        let base = session.resolve(action);
        let base = base.trim_end_matches('/');
        let part = |name: &str| format!("{base}/_action/{name}");
        let send = session.service_client(&part("send_goal"))?;
        let seed = super::gid_of(&format!("{} {base} {}", session.zid(), crate::clock::now().0));
        Ok(Self {
            send,
            result: session.service_client(&part("get_result"))?,
            cancel: session.service_client(&part("cancel_goal"))?,
            feedback: session.subscriber(&part("feedback"), &Qos::default(), QueuePolicy::KeepLast(16))?,
            status: session.subscriber(&part("status"), &Qos::latched(1), QueuePolicy::Latest)?,
            seed,
            count: AtomicU64::new(0),
        })
    }

    /// A fresh name for a goal.
    #[must_use]
    pub fn new_id(&self) -> GoalId {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        let mut input = self.seed.to_vec();
        input.extend_from_slice(&n.to_le_bytes());
        let mut id = xxhash_rust::xxh3::xxh3_128(&input).to_le_bytes();
        // Version 4, variant 1 (RFC 9562).
        id[6] = (id[6] & 0x0f) | 0x40;
        id[8] = (id[8] & 0x3f) | 0x80;
        id
    }

    /// Waits until the server can be reached; false when it could not in time.
    pub async fn wait_for_server(&self, timeout: Duration) -> bool {
        self.send.wait_for_server(timeout).await
    }

    /// Sends a goal and waits until the server accepts it.
    ///
    /// # Errors
    /// [`NavError::Rejected`]; [`NavError::Ros`] with [`RosError::NoServer`] when no server runs. After any other
    /// error the server may have taken the goal: it can be cancelled by its id.
    pub fn send_goal(
        &self,
        pose: &PoseStamped,
        behavior_tree: &str,
        timeout: Duration,
    ) -> Result<GoalHandle, NavError> {
        let request = goal_request(self.new_id(), pose, behavior_tree);
        accepted(&request, &self.send.call(&request, timeout)?)
    }

    /// As [`NavigateClient::send_goal`], in a task, without waiting for a server, and with an id from
    /// [`NavigateClient::new_id`].
    ///
    /// # Errors
    /// As [`NavigateClient::send_goal`].
    pub async fn send_goal_async(
        &self,
        id: GoalId,
        pose: &PoseStamped,
        behavior_tree: &str,
        timeout: Duration,
    ) -> Result<GoalHandle, NavError> {
        let request = goal_request(id, pose, behavior_tree);
        let response = self.send.send(&request, timeout)?.wait_async().await?;
        accepted(&request, &response)
    }

    /// Waits for the end of a drive.
    ///
    /// # Errors
    /// [`NavError::Ros`]; the drive goes on, and the question can be asked again.
    pub fn result(&self, goal: GoalId, timeout: Duration) -> Result<NavResult, NavError> {
        Ok(ended(self.result.call(&NavigateGetResultRequest { goal_id: goal }, timeout)?))
    }

    /// As [`NavigateClient::result`], in a task.
    ///
    /// # Errors
    /// As [`NavigateClient::result`].
    pub async fn result_async(&self, goal: GoalId, timeout: Duration) -> Result<NavResult, NavError> {
        let pending = self.result.send(&NavigateGetResultRequest { goal_id: goal }, timeout)?;
        Ok(ended(pending.wait_async().await?))
    }

    /// Asks the server to stop a drive.
    ///
    /// # Errors
    /// [`NavError::Ros`].
    pub fn cancel(&self, goal: GoalId, timeout: Duration) -> Result<CancelOutcome, NavError> {
        Ok(cancelled(&self.cancel.call(&cancel_request(goal), timeout)?))
    }

    /// As [`NavigateClient::cancel`], in a task.
    ///
    /// # Errors
    /// As [`NavigateClient::cancel`].
    pub async fn cancel_async(&self, goal: GoalId, timeout: Duration) -> Result<CancelOutcome, NavError> {
        let pending = self.cancel.send(&cancel_request(goal), timeout)?;
        Ok(cancelled(&pending.wait_async().await?))
    }

    /// Feedback of every goal of the server; compare `goal_id`.
    #[must_use]
    pub fn feedback(&self) -> &Subscriber<NavigateFeedback> {
        &self.feedback
    }

    /// States of every goal of the server.
    #[must_use]
    pub fn status(&self) -> &Subscriber<GoalStatusArray> {
        &self.status
    }
}

fn goal_request(goal_id: GoalId, pose: &PoseStamped, behavior_tree: &str) -> NavigateSendGoalRequest {
    NavigateSendGoalRequest { goal_id, pose: pose.clone(), behavior_tree: behavior_tree.to_owned() }
}

fn accepted(
    request: &NavigateSendGoalRequest,
    response: &NavigateSendGoalResponse,
) -> Result<GoalHandle, NavError> {
    if !response.accepted {
        return Err(NavError::Rejected { frame: request.pose.header.frame_id.clone() });
    }
    Ok(GoalHandle { id: request.goal_id, accepted_at: response.stamp.timestamp() })
}

fn cancel_request(goal_id: GoalId) -> CancelGoalRequest {
    CancelGoalRequest { goal_info: GoalInfo { goal_id, ..GoalInfo::default() } }
}

fn cancelled(response: &CancelGoalResponse) -> CancelOutcome {
    match response.return_code {
        0 => CancelOutcome::Canceling,
        2 => CancelOutcome::UnknownGoal,
        3 => CancelOutcome::AlreadyOver,
        _ => CancelOutcome::Rejected,
    }
}

fn ended(r: NavigateGetResultResponse) -> NavResult {
    match r.status {
        4 => NavResult::Succeeded,
        5 => NavResult::Canceled,
        6 => NavResult::Aborted { code: r.error_code, message: r.error_msg },
        _ => NavResult::Unknown,
    }
}
