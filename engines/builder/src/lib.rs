//! Import, export, quantisation and engine building: everything about a model that a robot does not need at run time.
//!
//! ```
//! use std::sync::Arc;
//!
//! use mindseye_builder::onnx::{GraphBuilder, MemoryWeights};
//! use mindseye_engines::backend::{PrepareOptions, Tensor, by_name};
//! use mindseye_engines::model::Ops;
//! use mindseye_engines::onnx::{Dim, SaveOptions};
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
