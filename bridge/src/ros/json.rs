//! Queryables on plain keys that take and give JSON, for clients without ROS.

use super::RosError;
use super::queue::Queue;
use std::sync::Arc;
use std::time::Duration;
use zenoh::Wait;
use zenoh::query::Query;

/// Requests that wait; more are refused at once with `{"error": "busy"}`.
const MAX_WAITING: usize = 64;
/// Largest request, bytes; larger ones are refused at once.
const MAX_REQUEST: usize = crate::goal::MAX_JSON_BYTES;

/// Requests on one key.
pub struct JsonQueryable {
    _queryable: zenoh::query::Queryable<()>,
    queue: Arc<Queue<JsonRequest>>,
    key: String,
}

/// One request. Dropping it without a reply tells the client nothing came.
#[derive(Debug)]
pub struct JsonRequest {
    query: Query,
    body: Vec<u8>,
}

impl JsonQueryable {
    pub(super) fn declare(session: &zenoh::Session, key: &str) -> Result<Self, RosError> {
        let queue = Arc::new(Queue::new(MAX_WAITING));
        let taker = queue.clone();
        let queryable = session
            .declare_queryable(key.to_owned())
            .callback(move |query| {
                let size = query.payload().map_or(0, zenoh::bytes::ZBytes::len);
                if size > MAX_REQUEST {
                    refuse(&query, &format!("request has {size} bytes; at most {MAX_REQUEST} are read"));
                    return;
                }
                let body = query.payload().map(|p| p.to_bytes().into_owned()).unwrap_or_default();
                if let Some(oldest) = taker.push(JsonRequest { query, body }) {
                    refuse(&oldest.query, "busy: too many requests are waiting; ask again");
                }
            })
            .wait()
            .map_err(RosError::zenoh(format!("declare a queryable on {key}")))?;
        Ok(Self { _queryable: queryable, queue, key: key.to_owned() })
    }

    /// The next request; waits at most `timeout`.
    #[must_use]
    pub fn recv_timeout(&self, timeout: Duration) -> Option<JsonRequest> {
        self.queue.pop_timeout(timeout)
    }

    /// The next request. Cancel-safe.
    pub async fn recv(&self) -> Option<JsonRequest> {
        self.queue.pop().await
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl std::fmt::Debug for JsonQueryable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JsonQueryable({})", self.key)
    }
}

impl Drop for JsonQueryable {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl JsonRequest {
    /// What the client sent; empty when it sent nothing.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Answers with a JSON document.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the client is gone.
    pub fn reply(self, json: &str) -> Result<(), RosError> {
        self.query
            .reply(self.query.key_expr().clone(), json.to_owned())
            .encoding(zenoh::bytes::Encoding::APPLICATION_JSON)
            .wait()
            .map_err(RosError::zenoh("reply to a query"))
    }

    /// Answers with an error: `{"error": "..."}`.
    pub fn refuse(self, why: &str) {
        refuse(&self.query, why);
    }
}

fn refuse(query: &Query, why: &str) {
    let body = serde_json::json!({ "error": why }).to_string();
    if let Err(error) = query.reply_err(body).encoding(zenoh::bytes::Encoding::APPLICATION_JSON).wait() {
        tracing::debug!(%error, "client is gone before its refusal");
    }
}

pub(super) fn query(
    session: &zenoh::Session,
    key: &str,
    body: &str,
    timeout: Duration,
) -> Result<String, RosError> {
    let answers: Arc<Queue<zenoh::query::Reply>> = Arc::new(Queue::new(8));
    let closer = CloseOnDrop(answers.clone());
    session
        .get(key.to_owned())
        .payload(body.to_owned())
        .timeout(timeout)
        .callback(move |reply| {
            closer.0.push(reply);
        })
        .wait()
        .map_err(RosError::zenoh(format!("ask {key}")))?;
    let mut refused = None;
    // Zenoh drops the callback when the query is over, which closes the queue.
    while let Some(reply) = answers.pop_timeout(timeout + Duration::from_secs(1)) {
        match reply.into_result() {
            Ok(sample) => return Ok(String::from_utf8_lossy(&sample.payload().to_bytes()).into_owned()),
            Err(e) => refused = Some(String::from_utf8_lossy(&e.payload().to_bytes()).into_owned()),
        }
    }
    let what = format!("query {key}");
    Err(match refused {
        // Zenoh reports a query that nobody finished in time as an error of this text.
        Some(cause) if cause == "Timeout" => RosError::Timeout { what, waited: timeout },
        Some(cause) => RosError::Refused { what, cause },
        None => RosError::Timeout { what, waited: timeout },
    })
}

pub(super) struct CloseOnDrop<T>(pub Arc<Queue<T>>);

impl<T> Drop for CloseOnDrop<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}
