//! The eager interpreter with gradients, and the trainer. Nothing here is part of the on-device binary.

pub mod clips;
pub mod curve;
pub mod data;
pub mod distill;
pub mod eager;
pub mod family;
pub mod net;
pub mod optim;
mod resume;
pub mod trainer;
