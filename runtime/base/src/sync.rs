//! Mutexes whose data is whole whenever nobody holds them.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex, also after a holder panicked. For data of which every change is one store, or that is written before it
/// is read: what a panic leaves behind is then as good as what was there before.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
