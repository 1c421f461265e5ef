//! The model family, ONNX writing, quantisation, engine building and inference backends of mindseye.

pub mod denoise;
pub mod model;
pub mod plucker;
pub mod sampler;
pub mod text;
pub mod cuda;
pub mod target;
pub mod trt;
pub mod backend;
pub mod onnx;
pub mod plan;
pub mod session_denoiser;
pub mod passport;
pub mod bundle;
pub mod checkpoint;
pub mod count;
pub mod quant;
