//! The eager interpreter with gradients, and the trainer. Nothing here is part of the on-device binary.

pub mod eager;
