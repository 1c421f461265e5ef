//! Plain keys that carry bytes: questions with any number of replies, puts, and who is there. For programs of ours that
//! talk to each other; what the bytes mean is theirs.
//!
//! Nothing here waits for the other side, and nothing is kept: what comes is handed to a callback on one of Zenoh's threads,
//! which must not block.

use super::RosError;
use super::session::RosSession;
use std::time::Duration;
use zenoh::Wait;
use zenoh::liveliness::LivelinessToken;
use zenoh::qos::CongestionControl;
use zenoh::query::{ConsolidationMode, Query, QueryTarget};
use zenoh::sample::SampleKind;

/// Something declared on a session; it ends when this is dropped.
pub struct Declared(#[allow(dead_code)] Kept); // held for its drop

#[allow(dead_code)] // held for their drop
enum Kept {
    Queryable(zenoh::query::Queryable<()>),
    Subscriber(zenoh::pubsub::Subscriber<()>),
    Token(LivelinessToken),
}

impl std::fmt::Debug for Declared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Declared")
    }
}

/// A question that came. It ends for whoever asked when this is dropped.
#[derive(Debug)]
pub struct Question(Query);

impl Question {
    /// What was asked, copied.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        self.0.payload().map(|p| p.to_bytes().into_owned()).unwrap_or_default()
    }

    /// Bytes of what was asked.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.payload().map_or(0, zenoh::bytes::ZBytes::len)
    }

    /// Whether nothing was said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One more reply. May wait while the link is congested.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when whoever asked is gone.
    pub fn reply(&self, body: Vec<u8>) -> Result<(), RosError> {
        self.0.reply(self.0.key_expr().clone(), body).wait().map_err(RosError::zenoh("reply to a question"))
    }
}

/// Tells when Zenoh lets go of a callback: the question is over.
struct Over<F: Fn(Option<Vec<u8>>)>(F);

impl<F: Fn(Option<Vec<u8>>)> Drop for Over<F> {
    fn drop(&mut self) {
        (self.0)(None);
    }
}

impl RosSession {
    /// Takes questions on a plain key.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn questions(
        &self,
        key: &str,
        take: impl Fn(Question) + Send + Sync + 'static,
    ) -> Result<Declared, RosError> {
        self.zenoh()
            .declare_queryable(key.to_owned())
            .callback(move |query| take(Question(query)))
            .wait()
            .map(|queryable| Declared(Kept::Queryable(queryable)))
            .map_err(RosError::zenoh(format!("take questions on {key}")))
    }

    /// Asks everybody who takes questions on a key (which may hold `*`). `heard` gets every reply as it comes, and `None`
    /// once, when no more will: all have answered, those that did not are gone, or `timeout` has passed.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the session is closed; `heard` gets its `None` all the same.
    pub fn ask(
        &self,
        key: &str,
        body: Vec<u8>,
        timeout: Duration,
        heard: impl Fn(Option<Vec<u8>>) + Send + Sync + 'static,
    ) -> Result<(), RosError> {
        let heard = Over(heard);
        self.zenoh()
            .get(key.to_owned())
            .target(QueryTarget::All)
            .consolidation(ConsolidationMode::None)
            .payload(body)
            .timeout(timeout)
            .callback(move |reply| {
                // An error is Zenoh's own: out of time, or the other side closed.
                if let Ok(sample) = reply.into_result() {
                    (heard.0)(Some(sample.payload().to_bytes().into_owned()));
                }
            })
            .wait()
            .map_err(RosError::zenoh(format!("ask {key}")))
    }

    /// Hands bytes to whoever hears a key; they are lost where nobody is there. On a congested link `wait` says whether to
    /// wait, else they are lost.
    ///
    /// # Errors
    /// [`RosError::Zenoh`] when the session is closed.
    pub fn put(&self, key: &str, body: Vec<u8>, wait: bool) -> Result<(), RosError> {
        let congestion = if wait { CongestionControl::Block } else { CongestionControl::Drop };
        let put = self.zenoh().put(key.to_owned(), body).congestion_control(congestion);
        put.wait().map_err(RosError::zenoh(format!("put to {key}")))
    }

    /// Hears what is put to a key (which may hold `*`): `take` gets the key and the bytes. `at_most` bytes are read; a longer
    /// one is let go of.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn hear(
        &self,
        key: &str,
        at_most: usize,
        take: impl Fn(&str, Vec<u8>) + Send + Sync + 'static,
    ) -> Result<Declared, RosError> {
        self.zenoh()
            .declare_subscriber(key.to_owned())
            .callback(move |sample| {
                if sample.payload().len() <= at_most {
                    take(sample.key_expr().as_str(), sample.payload().to_bytes().into_owned());
                }
            })
            .wait()
            .map(|subscriber| Declared(Kept::Subscriber(subscriber)))
            .map_err(RosError::zenoh(format!("hear {key}")))
    }

    /// Says that somebody is here under a key, until what this returns is dropped or the process is gone.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn be_here(&self, key: &str) -> Result<Declared, RosError> {
        self.zenoh()
            .liveliness()
            .declare_token(key.to_owned())
            .wait()
            .map(|token| Declared(Kept::Token(token)))
            .map_err(RosError::zenoh(format!("be here as {key}")))
    }

    /// Watches who is here under a key (which may hold `*`): `changed` gets the key and whether somebody is there, for those
    /// who were there before, too.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn who_is_here(
        &self,
        key: &str,
        changed: impl Fn(&str, bool) + Send + Sync + 'static,
    ) -> Result<Declared, RosError> {
        self.zenoh()
            .liveliness()
            .declare_subscriber(key.to_owned())
            .history(true)
            .callback(move |sample| changed(sample.key_expr().as_str(), sample.kind() == SampleKind::Put))
            .wait()
            .map(|subscriber| Declared(Kept::Subscriber(subscriber)))
            .map_err(RosError::zenoh(format!("watch who is here as {key}")))
    }
}
