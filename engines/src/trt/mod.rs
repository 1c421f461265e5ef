//! TensorRT, opened at run time: no TensorRT, CUDA or C++ is needed to build this crate or to run the rest of it.
//!
//! The library is found ([`Library::find`]), asked for its own version, and served through the slot table of its
//! binary interface ([`abi`]). One style of network is used everywhere: strongly typed, with explicit Q/DQ.
//!
//! * [`Library`]: discovery, versions, the log.
//! * [`build()`]: ONNX file in, serialized engine out.
//! * [`TrtEngine`], [`TrtContext`]: a serialized engine on a device.
//!
//! TensorRT's objects must go before its logger; here the logger lives as long as the process, and so does a library
//! once opened.

pub mod abi;
mod backend;
mod build;
mod ffi;
mod library;
mod log;
mod run;

pub use backend::{TensorRtBackend, library_name};
pub use build::{BuildError, BuildOptions, Built, InputProfile, Progress, build};
pub use library::{LIB_DIR_VARIABLE, Library, LibraryError, LoadOptions, Probe};
pub use run::{
    Arenas, DType, DeviceState, InputBytes, Io, OutputSink, RunError, RunOptions, TrtContext, TrtEngine,
    runtime_cache_path,
};

/// First bytes of an engine file of TensorRT-RTX: what 1.7.1 writes, and compares a file with when it loads it.
pub const RTX_ENGINE_MAGIC: [u8; 4] = *b"vtrt";

/// First bytes of an engine file of TensorRT 10 and 11: what the lean runtimes 10.16.1 and 11.4.0 compare a file's
/// first word with (read from their code; no such engine was built here).
pub const ENGINE_MAGIC: [u8; 4] = *b"ftrt";

/// True for the first bytes of a file that TensorRT or TensorRT-RTX wrote.
#[must_use]
pub fn is_engine(bytes: &[u8]) -> bool {
    bytes.starts_with(&ENGINE_MAGIC) || bytes.starts_with(&RTX_ENGINE_MAGIC)
}
