//! Bounded queue between Zenoh's threads and a consumer. Pushing never waits: a full queue loses its
//! oldest item, and counts it.

use super::lock;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How many undecoded messages wait for the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueuePolicy {
    /// Only the newest.
    Latest,
    /// The newest so many (at least 1, at most 100 000).
    KeepLast(usize),
}

impl QueuePolicy {
    pub(super) fn capacity(self) -> usize {
        match self {
            Self::Latest => 1,
            Self::KeepLast(n) => n.clamp(1, 100_000),
        }
    }
}

#[derive(Debug)]
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
    arrived_async: Notify,
    capacity: usize,
    received: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    closed: bool,
}

impl<T> Queue<T> {
    pub fn new(capacity: usize) -> Self {
        Self {
            // Room for everything from the start, as long as that is little.
            state: Mutex::new(State { items: VecDeque::with_capacity(capacity.min(1_024)), closed: false }),
            arrived: Condvar::new(),
            arrived_async: Notify::new(),
            capacity,
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// Puts an item in; the oldest is returned when it had to make room.
    pub fn push(&self, item: T) -> Option<T> {
        self.received.fetch_add(1, Ordering::Relaxed);
        let mut state = lock(&self.state);
        let lost = if state.items.len() >= self.capacity { state.items.pop_front() } else { None };
        state.items.push_back(item);
        drop(state);
        if lost.is_some() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.arrived.notify_one();
        self.arrived_async.notify_one();
        lost
    }

    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.arrived.notify_all();
        self.arrived_async.notify_waiters();
        self.arrived_async.notify_one();
    }

    pub fn try_pop(&self) -> Option<T> {
        lock(&self.state).items.pop_front()
    }

    /// Waits at most `timeout`; `None` when nothing came or the queue is closed and empty.
    pub fn pop_timeout(&self, timeout: Duration) -> Option<T> {
        let until = Instant::now().checked_add(timeout);
        let mut state = lock(&self.state);
        loop {
            if let Some(item) = state.items.pop_front() {
                return Some(item);
            }
            if state.closed {
                return None;
            }
            let left = match until {
                Some(until) => until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())?,
                None => Duration::from_secs(3_600),
            };
            state = match self.arrived.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Waits for the next item; `None` when the queue is closed and empty. Cancel-safe.
    pub async fn pop(&self) -> Option<T> {
        loop {
            let arrived = self.arrived_async.notified();
            {
                let mut state = lock(&self.state);
                if let Some(item) = state.items.pop_front() {
                    if !state.items.is_empty() {
                        self.arrived_async.notify_one();
                    }
                    return Some(item);
                }
                if state.closed {
                    return None;
                }
            }
            arrived.await;
        }
    }

    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub fn len(&self) -> usize {
        lock(&self.state).items.len()
    }
}

/// Closes the queue when Zenoh lets go of the callback that fills it: the query is over.
pub(super) struct CloseOnDrop<T>(pub Arc<Queue<T>>);

impl<T> Drop for CloseOnDrop<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_goes_first_and_is_counted() {
        for capacity in [1usize, 3] {
            let q = Queue::new(capacity);
            let lost = (0..10).filter_map(|i| q.push(i)).count();
            assert_eq!((lost, q.dropped(), q.received()), (10 - capacity, (10 - capacity) as u64, 10));
            let left: Vec<i32> = std::iter::from_fn(|| q.try_pop()).collect();
            assert_eq!(left, (10 - capacity as i32..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn waiting() {
        let q = Arc::new(Queue::new(4));
        assert_eq!(q.pop_timeout(Duration::from_millis(5)), None::<i32>);
        let other = q.clone();
        let t = std::thread::spawn(move || other.pop_timeout(Duration::from_secs(10)));
        q.push(7);
        assert_eq!(t.join().unwrap(), Some(7));
        let other = q.clone();
        let t = std::thread::spawn(move || other.pop_timeout(Duration::MAX));
        q.close();
        assert_eq!(t.join().unwrap(), None);
    }

    #[test]
    fn async_waiting_loses_nothing() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let q = Arc::new(Queue::new(10_000));
        let writer = {
            let q = q.clone();
            std::thread::spawn(move || {
                for i in 0..10_000 {
                    q.push(i);
                }
                q.close();
            })
        };
        let got = runtime.block_on(async {
            let mut got = Vec::new();
            while let Some(i) = q.pop().await {
                got.push(i);
            }
            got
        });
        writer.join().unwrap();
        assert_eq!(got, (0..10_000).collect::<Vec<_>>());
    }
}
