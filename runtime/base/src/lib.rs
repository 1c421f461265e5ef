//! What every crate of mindseye shares and none of them owns: files that are written whole or not at all, hashes,
//! random numbers, planar poses, RGB pictures and their scaling, medians, locks.
//!
//! Nothing here knows of robots, models or messages. Invariant: this crate depends on no other crate of mindseye.

pub mod file;
pub mod picture;
pub mod planar;
pub mod random;
pub mod scale;
pub mod stats;
pub mod sync;
