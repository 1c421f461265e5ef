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

/// Drives nav2: sends a goal, follows it, cancels it, tells how it ended.
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
    /// UUID (version 4).
    pub id: [u8; 16],
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
        /// 0 = not told.
        code: u16,
        /// For a person.
        message: String,
    },
    /// The server does not know the goal (it was restarted).
    Unknown,
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
    pub(super) fn declare(session: &RosSession, action: &str) -> Result<Self, RosError> {
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

    fn new_id(&self) -> [u8; 16] {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        let mut input = self.seed.to_vec();
        input.extend_from_slice(&n.to_le_bytes());
        let mut id = xxhash_rust::xxh3::xxh3_128(&input).to_le_bytes();
        // Version 4, variant 1 (RFC 9562).
        id[6] = (id[6] & 0x0f) | 0x40;
        id[8] = (id[8] & 0x3f) | 0x80;
        id
    }

    /// Sends a goal and waits until the server accepts it.
    ///
    /// # Errors
    /// [`NavError::Rejected`]; [`NavError::Ros`] with a timeout when no server runs.
    pub fn send_goal(
        &self,
        pose: &PoseStamped,
        behavior_tree: &str,
        timeout: Duration,
    ) -> Result<GoalHandle, NavError> {
        let goal_id = self.new_id();
        let request =
            NavigateSendGoalRequest { goal_id, pose: pose.clone(), behavior_tree: behavior_tree.to_owned() };
        let response = self.send.call(&request, timeout)?;
        if !response.accepted {
            return Err(NavError::Rejected { frame: pose.header.frame_id.clone() });
        }
        Ok(GoalHandle { id: goal_id, accepted_at: response.stamp.timestamp() })
    }

    /// Waits for the end of a drive.
    ///
    /// # Errors
    /// [`NavError::Ros`]; with a timeout the drive goes on, and the question can be asked again.
    pub fn result(&self, goal: &GoalHandle, timeout: Duration) -> Result<NavResult, NavError> {
        let r = self.result.call(&NavigateGetResultRequest { goal_id: goal.id }, timeout)?;
        Ok(ended(r))
    }

    /// As [`NavigateClient::result`], in a task.
    ///
    /// # Errors
    /// As [`NavigateClient::result`].
    pub async fn result_async(&self, goal: &GoalHandle, timeout: Duration) -> Result<NavResult, NavError> {
        let pending = self.result.send(&NavigateGetResultRequest { goal_id: goal.id }, timeout)?;
        Ok(ended(pending.wait_async().await?))
    }

    /// Asks the server to stop a drive.
    ///
    /// # Errors
    /// [`NavError::Ros`].
    pub fn cancel(&self, goal: &GoalHandle, timeout: Duration) -> Result<CancelOutcome, NavError> {
        let request = CancelGoalRequest { goal_info: GoalInfo { goal_id: goal.id, ..GoalInfo::default() } };
        Ok(match self.cancel.call(&request, timeout)?.return_code {
            0 => CancelOutcome::Canceling,
            2 => CancelOutcome::UnknownGoal,
            3 => CancelOutcome::AlreadyOver,
            _ => CancelOutcome::Rejected,
        })
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

fn ended(r: NavigateGetResultResponse) -> NavResult {
    match r.status {
        4 => NavResult::Succeeded,
        5 => NavResult::Canceled,
        6 => NavResult::Aborted { code: r.error_code, message: r.error_msg },
        _ => NavResult::Unknown,
    }
}
