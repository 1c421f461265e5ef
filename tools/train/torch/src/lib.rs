//! The networks of the family computed by libtorch, with its gradients, for training on the CPU or on a GPU.
//!
//! [`TorchDevice`] is one more [`mindseye_train::autograd::Device`]: samples, losses, optimiser, checkpoints and the
//! command line are those of `mindseye-train` and `mindseye-tools`, which know nothing of libtorch. The reference is
//! [`mindseye_train::eager::Eager`]; `tests/agreement.rs` compares the two.
//!
//! This crate is a workspace of its own, with a `Cargo.lock` of its own, that depends on the other one: a feature of
//! `mindseye-tools` would put tch and its thirty megabytes of bindings into everybody's `Cargo.lock`, `cargo clippy
//! --all-features` and licence checks, and libtorch is half a gigabyte that a robot never needs. `build.sh` says how it is
//! built.

pub mod device;
mod ffi;
pub mod ops;
pub mod ranks;

pub use device::{OpenDeviceError, TorchDevice};
pub use ops::TorchOps;
