//! The model family, ONNX writing, quantisation, engine building and inference backends of mindseye.
//!
//! A network is written down once, in [`model`], over the vocabulary [`model::Ops`]; what it means is decided by the
//! interpreter that runs it: [`onnx::GraphBuilder`] writes a graph, [`count::CountOps`] adds up arithmetic, and the
//! training crate has one that computes numbers and gradients.
//!
//! ```
//! use std::sync::Arc;
//!
//! use mindseye_engines::backend::{PrepareOptions, Tensor, by_name};
//! use mindseye_engines::model::Ops;
//! use mindseye_engines::onnx::{Dim, GraphBuilder, MemoryWeights, SaveOptions};
//!
//! // A network of one layer, as a graph ...
//! let weights = MemoryWeights::from([("w", vec![1, 2], vec![3.0, 4.0])]);
//! let mut ops = GraphBuilder::new("sum", Arc::new(weights));
//! let x = ops.input("x", &[Dim::from("rows"), Dim::from(2)]);
//! let w = ops.param("w", &[1, 2]);
//! let y = ops.linear(&x, &w, None);
//! ops.output("y", &y, &[Dim::from("rows"), Dim::from(1)]);
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("sum.onnx");
//! ops.finish()?.save(&path, &SaveOptions::default())?;
//!
//! // ... on the embedded backend.
//! let engine = by_name("rten")?.prepare(&path, &PrepareOptions::default().with_threads(1))?;
//! let x = Tensor::f32(&[2, 2], vec![1.0, 1.0, 1.0, -1.0]);
//! let results = engine.session()?.run(&[("x", &x)])?;
//! assert_eq!(results[0].1.as_f32(), Some(&[7.0, -1.0][..]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! * networks: [`model`], [`text`], [`plucker`], [`sampler`], [`denoise`];
//! * weights and graphs: [`checkpoint`], [`onnx`], [`protobuf`], [`bundle`], [`count`];
//! * running: [`backend`], [`session_denoiser`], [`cuda`], [`trt`];
//! * building for a target: [`target`], [`quant`], [`plan`], [`passport`].

pub mod backend;
pub mod bundle;
pub mod count;
pub mod cuda;
pub mod denoise;
pub mod model;
pub mod onnx;
pub mod passport;
pub mod plucker;
pub mod protobuf;
pub mod residency;
pub mod sampler;
pub mod session_denoiser;
pub mod target;
pub mod text;
pub mod trt;
