//! ROS services: clients and servers.

use super::keys::{Attachment, EndpointKind, Qos};
use super::lock;
use super::queue::{CloseOnDrop, Queue};
use super::route::Route;
use super::session::RosSession;
use super::{KeyStyle, RosError};
use crate::clock;
use crate::msg::RosType;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::liveliness::LivelinessToken;
use zenoh::query::{ConsolidationMode, Query, QueryTarget, Reply};

/// Requests that wait at a server.
const MAX_WAITING: usize = 64;

impl RosSession {
    /// A client of a ROS service. Both types carry the service's name and hash.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn service_client<Q: RosType, A: RosType>(
        &self,
        service: &str,
    ) -> Result<ServiceClient<Q, A>, RosError> {
        ServiceClient::declare(self, service)
    }

    /// A ROS service; at most 64 requests wait.
    ///
    /// # Errors
    /// [`RosError::Key`], [`RosError::Zenoh`].
    pub fn service_server<Q: RosType, A: RosType>(
        &self,
        service: &str,
    ) -> Result<ServiceServer<Q, A>, RosError> {
        ServiceServer::declare(self, service)
    }
}

/// Asks a ROS service: `Q` is the request, `A` the response, both with the service's name and hash.
pub struct ServiceClient<Q, A> {
    _token: Option<LivelinessToken>,
    session: RosSession,
    service: String,
    key: String,
    route: Route,
    gid: [u8; 16],
    last_sequence: Mutex<i64>,
    types: PhantomData<fn(&Q) -> A>,
}

/// A request that is on its way.
pub struct PendingReply<A> {
    replies: Arc<Queue<Reply>>,
    service: String,
    asked_at: Instant,
    timeout: Duration,
    response: PhantomData<fn() -> A>,
}

impl<Q: RosType, A: RosType> ServiceClient<Q, A> {
    fn declare(session: &RosSession, service: &str) -> Result<Self, RosError> {
        let service = session.resolve(service);
        let key = session.topic_key(&service, Q::NAME, Q::HASH)?;
        let (token, gid) =
            session.endpoint(EndpointKind::Client, &service, Q::NAME, Q::HASH, Qos::default())?;
        let route = Route::to(session.zenoh(), &key, QueryTarget::AllComplete)?;
        Ok(Self {
            _token: token,
            session: session.clone(),
            service,
            key,
            route,
            gid,
            last_sequence: Mutex::new(0),
            types: PhantomData,
        })
    }

    /// Sends a request; the reply is waited for on what it returns.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the session is closed.
    pub fn send(&self, request: &Q, timeout: Duration) -> Result<PendingReply<A>, RosError> {
        let sequence = {
            let mut last = lock(&self.last_sequence);
            *last += 1;
            *last
        };
        let attachment = (self.session.key_style() == KeyStyle::RmwZenoh)
            .then(|| Attachment { sequence, source_stamp_ns: clock::now().0, gid: self.gid }.to_bytes());
        let replies = Arc::new(Queue::new(4));
        let closer = CloseOnDrop(replies.clone());
        self.session
            .zenoh()
            .get(self.key.clone())
            .target(QueryTarget::AllComplete)
            .consolidation(ConsolidationMode::None)
            .timeout(timeout)
            .payload(request.encode())
            .attachment(attachment)
            .callback(move |reply| {
                closer.0.push(reply);
            })
            .wait()
            .map_err(RosError::zenoh(format!("ask {}", self.service)))?;
        let asked_at = Instant::now();
        Ok(PendingReply { replies, service: self.service.clone(), asked_at, timeout, response: PhantomData })
    }

    /// Whether a server is there and can be reached. A session that was opened just now, or a server that was
    /// started just now, takes a moment until they know of each other.
    #[must_use]
    pub fn has_server(&self) -> bool {
        self.route.is_there()
    }

    /// Waits in a task until a server can be reached; false when none could in time.
    pub async fn wait_for_server(&self, timeout: Duration) -> bool {
        self.route.wait_async(timeout).await
    }

    /// Waits for a server, sends it a request and waits for its response.
    ///
    /// # Errors
    /// [`RosError::NoServer`], [`RosError::Timeout`], [`RosError::Unanswered`], [`RosError::Refused`], [`RosError::Decode`], [`RosError::Zenoh`].
    pub fn call(&self, request: &Q, timeout: Duration) -> Result<A, RosError> {
        let began = Instant::now();
        if !self.route.wait(timeout) {
            let what = format!("service {}", self.service);
            return Err(RosError::NoServer { what, waited: began.elapsed() });
        }
        self.send(request, timeout.saturating_sub(began.elapsed()))?.wait()
    }

    /// The service, fully qualified.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.service
    }
}

impl<A: RosType> PendingReply<A> {
    /// Waits on this thread.
    ///
    /// # Errors
    /// [`RosError::Timeout`], [`RosError::Unanswered`], [`RosError::Refused`], [`RosError::Decode`].
    pub fn wait(self) -> Result<A, RosError> {
        let limit = self.timeout.saturating_add(Duration::from_secs(1));
        self.finish(self.replies.pop_timeout(limit))
    }

    /// Waits in a task.
    ///
    /// # Errors
    /// As [`PendingReply::wait`].
    pub async fn wait_async(self) -> Result<A, RosError> {
        let reply = self.replies.pop().await;
        self.finish(reply)
    }

    fn finish(&self, reply: Option<Reply>) -> Result<A, RosError> {
        let what = format!("service {}", self.service);
        match reply.map(Reply::into_result) {
            None => Err(RosError::no_reply(what, self.asked_at.elapsed(), self.timeout)),
            Some(Ok(sample)) => A::decode(&sample.payload().to_bytes()).map_err(|cause| RosError::Decode {
                topic: self.service.clone(),
                type_name: A::NAME,
                cause,
            }),
            Some(Err(error)) => {
                let cause = String::from_utf8_lossy(&error.payload().to_bytes()).into_owned();
                // Zenoh reports a query that nobody finished in time as an error of this text.
                Err(if cause == "Timeout" {
                    RosError::Timeout { what, waited: self.timeout }
                } else {
                    RosError::Refused { what, cause }
                })
            }
        }
    }
}

impl<Q, A> std::fmt::Debug for ServiceClient<Q, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServiceClient({})", self.key)
    }
}

impl<A> std::fmt::Debug for PendingReply<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PendingReply({})", self.service)
    }
}

/// Answers a ROS service.
pub struct ServiceServer<Q, A> {
    _token: Option<LivelinessToken>,
    _queryable: zenoh::query::Queryable<()>,
    queue: Arc<Queue<Query>>,
    service: String,
    key: String,
    _session: RosSession,
    types: PhantomData<fn(&Q) -> A>,
}

/// One request at a server.
#[derive(Debug)]
pub struct ServiceRequest<Q, A> {
    /// What is asked.
    pub request: Q,
    query: Query,
    key: String,
    response: PhantomData<fn(A)>,
}

impl<Q: RosType, A: RosType> ServiceServer<Q, A> {
    fn declare(session: &RosSession, service: &str) -> Result<Self, RosError> {
        let service = session.resolve(service);
        let key = session.topic_key(&service, Q::NAME, Q::HASH)?;
        let queue = Arc::new(Queue::new(MAX_WAITING));
        let taker = queue.clone();
        let queryable = session
            .zenoh()
            .declare_queryable(key.clone())
            .complete(true)
            .callback(move |query| {
                taker.push(query);
            })
            .wait()
            .map_err(RosError::zenoh(format!("declare the service {key}")))?;
        let (token, _) =
            session.endpoint(EndpointKind::Service, &service, Q::NAME, Q::HASH, Qos::default())?;
        Ok(Self {
            _token: token,
            _queryable: queryable,
            queue,
            service,
            key,
            _session: session.clone(),
            types: PhantomData,
        })
    }

    /// The next request; `Ok(None)` when none came in time.
    ///
    /// # Errors
    /// [`RosError::Decode`]: that request is dropped.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Option<ServiceRequest<Q, A>>, RosError> {
        let Some(query) = self.queue.pop_timeout(timeout) else { return Ok(None) };
        let bytes = query.payload().map(|p| p.to_bytes().into_owned()).unwrap_or_default();
        let request = Q::decode(&bytes).map_err(|cause| RosError::Decode {
            topic: self.service.clone(),
            type_name: Q::NAME,
            cause,
        })?;
        Ok(Some(ServiceRequest { request, query, key: self.key.clone(), response: PhantomData }))
    }
}

impl<Q, A: RosType> ServiceRequest<Q, A> {
    /// Answers; the attachment carries the request's number and the client's GID back.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the client is gone.
    pub fn respond(self, response: &A) -> Result<(), RosError> {
        let attachment = self
            .query
            .attachment()
            .and_then(|a| Attachment::from_bytes(&a.to_bytes()))
            .map(|a| Attachment { source_stamp_ns: clock::now().0, ..a }.to_bytes());
        self.query
            .reply(self.key, response.encode())
            .attachment(attachment)
            .wait()
            .map_err(RosError::zenoh("respond to a service request"))
    }
}

impl<Q, A> Drop for ServiceServer<Q, A> {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl<Q, A> std::fmt::Debug for ServiceServer<Q, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServiceServer({})", self.key)
    }
}
