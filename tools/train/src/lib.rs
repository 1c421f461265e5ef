//! The eager interpreter with gradients, and the trainer. Nothing here is part of the on-device binary.
//!
//! From below: [`eager`] computes, [`autograd`] says what else may, [`family`] and [`net`] are the model and its losses, [`data`] and [`clips`] make
//! samples, [`config`] says how to train, [`checkpoint`] is what a run keeps, [`trainer`] runs, [`ranks`] are several that do so together.

mod ahead;
pub mod autoencoder;
pub mod autograd;
pub mod checkpoint;
pub mod clips;
pub mod codec_fit;
pub mod config;
pub mod curve;
pub mod data;
pub mod depth;
pub mod distill;
pub mod eager;
pub mod error;
pub mod evaluation;
pub mod family;
pub mod finetune;
pub mod guide;
pub mod latents;
pub mod net;
pub mod optim;
pub mod plan;
pub mod ranks;
mod resume;
pub mod run;
mod step;
pub mod task;
pub mod trainer;
pub mod wan;
