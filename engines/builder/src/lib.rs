//! Import, export, quantisation and engine building: everything about a model that a robot does not need at run time.
//!
//! * weights: [`checkpoint`] reads safetensors and pickles, [`onnx`] writes networks as graphs;
//! * precision: [`quant`] calibrates, rewrites and checks graphs;
//! * engines: [`plan`] says what fits, [`pipeline`] turns a bundle into a folder of engines with passports.
//!
//! Invariant: `mindseye-engines` knows nothing of this crate.

pub mod checkpoint;
mod memory;
pub mod onnx;
pub mod pipeline;
pub mod plan;
pub mod quant;
mod state;
