//! Whether somebody serves a key. A session that was opened just now does not know its peers' queryables yet, and a
//! query that is sent before its route exists ends at once without an answer.

use super::RosError;
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::query::{Querier, QueryTarget};

/// How often the route is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// The route to the servers of one key.
pub(super) struct Route {
    querier: Querier<'static>,
}

impl Route {
    pub fn to(session: &zenoh::Session, key: &str, target: QueryTarget) -> Result<Self, RosError> {
        let querier = session
            .declare_querier(key.to_owned())
            .target(target)
            .wait()
            .map_err(RosError::zenoh(format!("look for who serves {key}")))?;
        Ok(Self { querier })
    }

    pub fn is_there(&self) -> bool {
        self.querier.matching_status().wait().is_ok_and(|status| status.matching())
    }

    /// Waits until somebody serves the key; false when nobody did in time.
    pub fn wait(&self, timeout: Duration) -> bool {
        let began = Instant::now();
        while !self.is_there() {
            if began.elapsed() >= timeout {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        true
    }

    /// As [`Route::wait`], in a task.
    pub async fn wait_async(&self, timeout: Duration) -> bool {
        let began = Instant::now();
        while !self.is_there() {
            if began.elapsed() >= timeout {
                return false;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        true
    }
}
