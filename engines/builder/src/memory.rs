//! The one call into the C library.
#![allow(unsafe_code)]

/// Gives freed memory back to the system. Large models are loaded and dropped one after another while an engine is
/// made; the C library would keep what they had taken.
pub(crate) fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> std::ffi::c_int;
        }
        // SAFETY: glibc's own function; it only returns free pages.
        unsafe { malloc_trim(0) };
    }
}
