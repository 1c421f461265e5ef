//! Libraries of libtorch that are opened when a device asks for them.
#![allow(unsafe_code)]

pub(crate) mod nccl;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Opens `libtorch_cuda.so`, whose initialisers tell libtorch that there is CUDA; it stays open.
pub(crate) fn open_cuda() -> Result<(), libloading::Error> {
    // SAFETY: the library's initialisers only register kernels; it is the one that belongs to the libtorch that this
    // program is linked with, found beside it.
    let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}
