//! Who serves a name. Sessions that claim the same name find each other by liveliness, and all of them agree on who
//! was first.

use super::RosError;
use super::lock;
use super::queue::{CloseOnDrop, Queue};
use super::session::RosSession;
use crate::clock;
use crate::time::Timestamp;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zenoh::Wait;
use zenoh::liveliness::LivelinessToken;
use zenoh::sample::SampleKind;

/// Claimants followed; more are not.
const CLAIMANTS_MAX: usize = 64;

/// One who claims a name. The order is by time, then by session: the least one was first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claimant {
    /// When it claimed the name, on its machine's wall clock.
    pub since: Timestamp,
    /// Its Zenoh id, and the number of the claim within the process.
    pub session: String,
}

impl Claimant {
    fn key(&self, name: &str) -> String {
        format!("{name}/{}/{}", self.since.as_nanos(), self.session)
    }

    fn parse(key: &str) -> Option<Self> {
        let mut parts = key.rsplit('/');
        let session = parts.next()?.to_owned();
        Some(Self { since: Timestamp(parts.next()?.parse().ok()?), session })
    }
}

impl std::fmt::Display for Claimant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.session)
    }
}

/// A name that is claimed until this is dropped.
pub struct Claim {
    _token: LivelinessToken,
    _subscriber: zenoh::pubsub::Subscriber<()>,
    own: Claimant,
    others: Arc<Others>,
}

#[derive(Default)]
struct Others {
    known: Mutex<BTreeSet<Claimant>>,
    changes: AtomicU64,
}

impl RosSession {
    /// Claims a name, e.g. `mindseye/bot1/node`. The claims of others become known within moments.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn claim(&self, name: &str) -> Result<Claim, RosError> {
        static CLAIMS: AtomicU64 = AtomicU64::new(1);
        let number = CLAIMS.fetch_add(1, Ordering::Relaxed);
        let own = Claimant { since: clock::now(), session: format!("{}-{number}", self.zid()) };
        let liveliness = self.zenoh().liveliness();
        let what = || format!("claim {name}");
        let token = liveliness.declare_token(own.key(name)).wait().map_err(RosError::zenoh(what()))?;
        let others = Arc::new(Others::default());
        let (taker, me) = (others.clone(), own.clone());
        let subscriber = liveliness
            .declare_subscriber(format!("{name}/*/*"))
            .history(true)
            .callback(move |sample| {
                let claimant = Claimant::parse(sample.key_expr().as_str());
                if let Some(claimant) = claimant.filter(|claimant| *claimant != me) {
                    taker.take(claimant, sample.kind());
                }
            })
            .wait()
            .map_err(RosError::zenoh(what()))?;
        Ok(Claim { _token: token, _subscriber: subscriber, own, others })
    }

    /// Who claims names that match, e.g. `mindseye/*/node`: each name with its claimant, as far as they are known within
    /// `timeout`.
    ///
    /// # Errors
    /// [`RosError::Zenoh`].
    pub fn claimants(&self, names: &str, timeout: Duration) -> Result<Vec<(String, Claimant)>, RosError> {
        let found: Arc<Queue<(String, Claimant)>> = Arc::new(Queue::new(CLAIMANTS_MAX * 16));
        let closer = CloseOnDrop(found.clone());
        self.zenoh()
            .liveliness()
            .get(format!("{names}/*/*"))
            .timeout(timeout)
            .callback(move |reply| {
                let Ok(sample) = reply.into_result() else { return };
                let key = sample.key_expr().as_str();
                let name = key.rsplitn(3, '/').nth(2).unwrap_or_default().to_owned();
                if let Some(claimant) = Claimant::parse(key) {
                    closer.0.push((name, claimant));
                }
            })
            .wait()
            .map_err(RosError::zenoh(format!("look for {names}")))?;
        let until = Instant::now() + timeout + Duration::from_millis(200);
        let pop = || found.pop_timeout(until.saturating_duration_since(Instant::now()));
        let mut all: Vec<(String, Claimant)> = std::iter::from_fn(pop).collect();
        all.sort();
        all.dedup();
        Ok(all)
    }
}

impl Others {
    fn take(&self, claimant: Claimant, kind: SampleKind) {
        let mut known = lock(&self.known);
        let changed = match kind {
            SampleKind::Put => known.len() < CLAIMANTS_MAX && known.insert(claimant),
            SampleKind::Delete => known.remove(&claimant),
        };
        if changed {
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Claim {
    /// This claim.
    #[must_use]
    pub fn own(&self) -> &Claimant {
        &self.own
    }

    /// Everybody else who claims the name now, the first one first.
    #[must_use]
    pub fn others(&self) -> Vec<Claimant> {
        lock(&self.others.known).iter().cloned().collect()
    }

    /// How often [`Claim::others`] has changed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.others.changes.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Claim({})", self.own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_hold_time_and_session() {
        let claimant = Claimant { since: Timestamp(-7), session: "3cf5-1".into() };
        let key = claimant.key("mindseye/bot1/node");
        assert_eq!(key, "mindseye/bot1/node/-7/3cf5-1");
        assert_eq!(Claimant::parse(&key), Some(claimant.clone()));
        for bad in ["", "a/b", "mindseye/bot1/node/x/3cf5-1"] {
            assert_eq!(Claimant::parse(bad), None, "{bad}");
        }
        let later = Claimant { since: Timestamp(8), session: "0".into() };
        let same = Claimant { since: Timestamp(-7), session: "4".into() };
        assert!(claimant < later && claimant < same && same < later);
    }
}
