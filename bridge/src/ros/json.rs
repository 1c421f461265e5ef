//! Queryables on plain keys that take and give JSON, for clients without ROS.

use super::RosError;
use super::queue::{CloseOnDrop, Queue};
use super::route::Route;
use super::session::RosSession;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::query::{ConsolidationMode, Query, QueryTarget};

/// Requests that wait; more are refused at once with `{"error": "busy"}`.
const MAX_WAITING: usize = 64;
/// Largest request, bytes; larger ones are refused at once.
const MAX_REQUEST: usize = crate::goal::MAX_JSON_BYTES;

/// Replies of several servers that are kept; of more the newest.
const REPLIES_MAX: usize = 1024;

/// A server must have appeared within this. Processes that start together find each other well within it.
const SERVER_WITHIN: Duration = Duration::from_secs(5);
/// Pause before a query that ended without an answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

impl RosSession {
    /// A queryable on a plain key that takes and gives JSON, e.g. `mindseye/bot1/ground`.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn json_queryable(&self, key: &str) -> Result<JsonQueryable, RosError> {
        JsonQueryable::declare(self.zenoh(), key)
    }

    /// Asks a queryable on a plain key; gives the first reply's text. Waits at most 5 s until somebody serves the
    /// key; a query that ends without an answer within that time (its server began or went just then) is asked
    /// again. All of it happens within `timeout`.
    ///
    /// # Errors
    /// [`RosError::NoServer`] when nobody serves the key, [`RosError::Timeout`] and [`RosError::Unanswered`] when
    /// nobody answers, [`RosError::Refused`] with the other side's words.
    pub fn query_json(&self, key: &str, body: &str, timeout: Duration) -> Result<String, RosError> {
        let began = Instant::now();
        let what = || format!("query {key}");
        let within = SERVER_WITHIN.min(timeout);
        let route = Route::to(self.zenoh(), key, QueryTarget::BestMatching)?;
        loop {
            if !route.wait(within.saturating_sub(began.elapsed())) {
                return Err(RosError::NoServer { what: what(), waited: began.elapsed() });
            }
            match ask(self.zenoh(), key, body, timeout.saturating_sub(began.elapsed())) {
                Err(RosError::Unanswered { .. }) if began.elapsed() + ASK_AGAIN < within => {
                    std::thread::sleep(ASK_AGAIN);
                }
                Err(RosError::Unanswered { .. } | RosError::Timeout { .. }) => {
                    return Err(RosError::no_reply(what(), began.elapsed(), timeout));
                }
                answer => return answer,
            }
        }
    }

    /// Asks everybody who serves a key that matches, e.g. `mindseye/*/status`; gives the texts of all replies that come
    /// within `timeout`. Refusals are left out.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn query_all_json(&self, key: &str, timeout: Duration) -> Result<Vec<String>, RosError> {
        let answers: Arc<Queue<zenoh::query::Reply>> = Arc::new(Queue::new(REPLIES_MAX));
        let closer = CloseOnDrop(answers.clone());
        self.zenoh()
            .get(key.to_owned())
            .target(QueryTarget::All)
            // All reply on the key that was asked.
            .consolidation(ConsolidationMode::None)
            .timeout(timeout)
            .callback(move |reply| {
                closer.0.push(reply);
            })
            .wait()
            .map_err(RosError::zenoh(format!("ask {key}")))?;
        let until = Instant::now() + timeout + Duration::from_millis(200);
        let mut texts = Vec::new();
        while let Some(reply) = answers.pop_timeout(until.saturating_duration_since(Instant::now())) {
            if let Ok(sample) = reply.into_result() {
                texts.push(String::from_utf8_lossy(&sample.payload().to_bytes()).into_owned());
            }
        }
        Ok(texts)
    }
}

/// Requests on one key.
pub struct JsonQueryable {
    _queryable: zenoh::query::Queryable<()>,
    queue: Arc<Queue<JsonRequest>>,
    key: String,
}

/// One request. A client whose request is dropped without a reply gets none.
#[derive(Debug)]
pub struct JsonRequest {
    query: Query,
    body: Vec<u8>,
}

impl JsonQueryable {
    fn declare(session: &zenoh::Session, key: &str) -> Result<Self, RosError> {
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

/// Asks once.
fn ask(session: &zenoh::Session, key: &str, body: &str, timeout: Duration) -> Result<String, RosError> {
    let began = Instant::now();
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
        Some(cause) if cause != "Timeout" => RosError::Refused { what, cause },
        Some(_) => RosError::Timeout { what, waited: began.elapsed() },
        None => RosError::no_reply(what, began.elapsed(), timeout),
    })
}
