//! The model family, its bundle, and the backends that run it: what a robot needs of a model.
//!
//! A network is written down once, in [`model`], over the vocabulary [`model::Ops`]; what it means is decided by the
//! interpreter that runs it: [`count::CountOps`] adds up arithmetic, the builder crate has one that writes graphs, and the
//! training crate one that computes numbers and gradients.
//!
//! * networks: [`model`], [`text`], [`plucker`], [`sampler`], [`denoise`];
//! * files: [`bundle`], [`onnx`], [`protobuf`], [`passport`];
//! * running: [`backend`], [`session_denoiser`], [`detector`], [`cuda`], [`trt`];
//! * what it costs: [`count`], [`residency`], [`target`].

pub mod backend;
pub mod bundle;
pub mod count;
pub mod cuda;
pub mod denoise;
pub mod detector;
pub mod e4m3;
pub mod model;
pub mod onnx;
pub mod passport;
pub mod plucker;
pub mod protobuf;
mod python;
pub mod residency;
pub mod sampler;
pub mod session_denoiser;
pub mod target;
pub mod text;
pub mod trt;
