//! Latents on their way from the memory to the servers, as they are stored: each once. What gets lost is asked for when a
//! goal needs it.

use super::link::Link;
use super::wire::Seen;
use super::{ServedError, spawn};
use crate::senses::ContextHandle;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The memory is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Most latents in one message.
const TOGETHER: usize = 32;

/// A thread that sends what is remembered. Dropping it stops it.
pub struct Feed {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Feed {
    /// Sends what `context` holds, and what it will hold.
    ///
    /// # Errors
    /// [`ServedError::Thread`].
    pub fn start(link: Arc<Link>, context: ContextHandle) -> Result<Self, ServedError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = spawn("feed", move || {
            let mut last = None;
            while !stopped.load(Ordering::Relaxed) {
                let new = context.seen_after(last, TOGETHER);
                let Some(newest) = new.last() else {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                };
                last = Some(newest.info.index);
                let seen = new
                    .into_iter()
                    .map(|c| Seen { index: c.info.index, segment: c.info.segment, values: c.latent })
                    .collect();
                link.send_latents(seen);
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that sends latents panicked");
        }
    }
}
