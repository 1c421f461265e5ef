//! TensorRT's log: into `tracing`, and kept for the text of errors.
//!
//! The logger is an object that we hand to TensorRT, so its vtable is ours. It differs between interfaces: in 10.x
//! `{log, destructors}`; from 11 on `ILogger` derives from `IVersionedInterface`:
//! `{getAPILanguage, getInterfaceInfo, destructors, log}`.
#![allow(unsafe_code)] // FFI fence: functions that TensorRT calls.

use std::collections::VecDeque;
use std::ffi::{c_char, c_void};
use std::sync::{Mutex, PoisonError};

use super::abi::Abi;
use super::ffi;

/// Name and version of an interface, as `getInterfaceInfo` returns it.
#[repr(C)]
pub(super) struct InterfaceInfo {
    pub(super) kind: *const c_char,
    pub(super) major: i32,
    pub(super) minor: i32,
}

/// Most messages kept; older ones go.
const KEPT: usize = 64;

#[repr(C)]
struct VtableV10 {
    log: extern "C" fn(*const Logger, i32, *const c_char),
    destroy: extern "C" fn(*const Logger),
    delete: extern "C" fn(*const Logger),
}

#[repr(C)]
struct VtableV11 {
    api_language: extern "C" fn(*const c_void) -> i32,
    interface_info: extern "C" fn(*const c_void) -> InterfaceInfo,
    destroy: extern "C" fn(*const Logger),
    delete: extern "C" fn(*const Logger),
    log: extern "C" fn(*const Logger, i32, *const c_char),
}

static V10: VtableV10 = VtableV10 { log, destroy: nothing, delete: nothing };
static V11: VtableV11 =
    VtableV11 { api_language: language_cpp, interface_info, destroy: nothing, delete: nothing, log };

/// The logger object. Its first word is the vtable pointer.
#[repr(C)]
pub(super) struct Logger {
    vtable: *const c_void,
    errors: Mutex<VecDeque<String>>,
}

// SAFETY: the vtable pointer is to a constant, the rest is behind a mutex.
unsafe impl Sync for Logger {}
// SAFETY: as above.
unsafe impl Send for Logger {}

impl Logger {
    /// A logger for one interface, for the life of the process (TensorRT keeps the first one it sees).
    pub(super) fn leak(abi: Abi) -> &'static Logger {
        let vtable = match abi {
            Abi::V10 => (&raw const V10).cast(),
            Abi::V11 | Abi::Rtx17 => (&raw const V11).cast(),
        };
        Box::leak(Box::new(Logger { vtable, errors: Mutex::default() }))
    }

    pub(super) fn pointer(&'static self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Takes the errors logged since the last time.
    pub(super) fn take_errors(&self) -> Vec<String> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}

extern "C" fn log(logger: *const Logger, severity: i32, message: *const c_char) {
    // SAFETY: TensorRT passes a NUL-terminated string.
    let message = unsafe { ffi::text(message) };
    match severity {
        0 | 1 => {
            // Not an error record: the caller reports it, once, with what it was doing.
            tracing::debug!(target: "tensorrt", "{message}");
            // SAFETY: the pointer is the leaked logger that we handed over.
            let mut errors = unsafe { &*logger }.errors.lock().unwrap_or_else(PoisonError::into_inner);
            if errors.len() == KEPT {
                errors.pop_front();
            }
            errors.push_back(message);
        }
        // Said once for every input of 64-bit integers, whatever is bound to it. We bind what the engine states.
        2 if message.contains("has Int64 binding") => tracing::debug!(target: "tensorrt", "{message}"),
        // A text encoder of words alone has no use for the mask that every text encoder is given.
        2 if message.contains("Unused Input: ")
            || message.contains("is unused or used only at compile-time") =>
        {
            tracing::debug!(target: "tensorrt", "{message}");
        }
        2 => tracing::warn!(target: "tensorrt", "{message}"),
        3 => tracing::debug!(target: "tensorrt", "{message}"),
        _ => tracing::trace!(target: "tensorrt", "{message}"),
    }
}

extern "C" fn nothing(_logger: *const Logger) {}

/// `APILanguage::kCPP`.
pub(super) extern "C" fn language_cpp(_this: *const c_void) -> i32 {
    0
}

extern "C" fn interface_info(_this: *const c_void) -> InterfaceInfo {
    InterfaceInfo { kind: c"ILogger".as_ptr(), major: 1, minor: 0 }
}
