//! What viewers get: named slots that hold their newest content only. A viewer that is slow skips what was replaced
//! meanwhile, and nobody who writes waits for one who reads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Viewers at a time; more are refused.
pub const VIEWERS_MAX: usize = 8;

/// What a slot is for, in the order in which a new viewer gets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Slot {
    Hello,
    Status,
    Map,
    Memory,
    History,
    Goal,
    /// The picture of a candidate's drive.
    Candidate(usize),
    Camera,
}

/// The content of a slot.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Payload {
    /// A JSON document.
    Document(Arc<str>),
    /// A PNG or JPEG file.
    Picture(Arc<[u8]>),
}

/// How often each slot had been written when a viewer last looked.
pub(super) type Known = BTreeMap<Slot, u64>;

#[derive(Default)]
pub(super) struct Hub {
    slots: Mutex<BTreeMap<Slot, (u64, Payload)>>,
    viewers: AtomicUsize,
    refused: AtomicU64,
    skipped: AtomicU64,
}

/// A viewer's place; given back when dropped.
pub(super) struct Seat(Arc<Hub>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts of viewers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ViewerCounts {
    /// Connected now.
    pub viewers: usize,
    /// Refused because there were [`VIEWERS_MAX`].
    pub refused: u64,
    /// Contents that a viewer was too slow for.
    pub skipped: u64,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Slot, (u64, Payload)>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the content of a slot.
    pub fn put(&self, slot: Slot, payload: Payload) {
        let mut slots = self.lock();
        let count = slots.get(&slot).map_or(0, |(count, _)| *count);
        slots.insert(slot, (count + 1, payload));
    }

    /// What was written since the viewer last looked.
    pub fn newer(&self, known: &mut Known) -> Vec<Payload> {
        let mut newer = Vec::new();
        for (slot, (count, payload)) in self.lock().iter() {
            let before = known.insert(*slot, *count).unwrap_or(*count - 1);
            if before < *count {
                self.skipped.fetch_add(count - before - 1, Ordering::Relaxed);
                newer.push(payload.clone());
            }
        }
        newer
    }

    /// A place for one more viewer, if there is one.
    pub fn enter(self: &Arc<Self>) -> Option<Seat> {
        let more = |n: usize| (n < VIEWERS_MAX).then_some(n + 1);
        let entered = self.viewers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if !entered {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        entered.then(|| Seat(self.clone()))
    }

    pub fn counts(&self) -> ViewerCounts {
        ViewerCounts {
            viewers: self.viewers.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Payload {
        Payload::Document(text.into())
    }

    #[test]
    fn only_the_newest_counts_and_what_is_skipped_is_counted() {
        let hub = Hub::default();
        let mut known = Known::new();
        assert!(hub.newer(&mut known).is_empty());
        hub.put(Slot::Map, document("1"));
        hub.put(Slot::Map, document("2"));
        // What was there before the viewer came is not skipped.
        assert_eq!(hub.newer(&mut known), [document("2")]);
        assert_eq!((hub.newer(&mut known), hub.counts().skipped), (vec![], 0));
        for text in ["3", "4", "5"] {
            hub.put(Slot::Map, document(text));
        }
        hub.put(Slot::Hello, document("h"));
        assert_eq!(hub.newer(&mut known), [document("h"), document("5")]);
        assert_eq!(hub.counts().skipped, 2);
    }

    #[test]
    fn places_are_limited_and_given_back() {
        let hub = Arc::new(Hub::default());
        let seats: Vec<_> = (0..VIEWERS_MAX).map(|_| hub.enter().unwrap()).collect();
        assert!(hub.enter().is_none());
        drop(seats);
        assert!(hub.enter().is_some());
        assert_eq!(hub.counts(), ViewerCounts { viewers: 0, refused: 1, skipped: 0 });
    }
}
