//! Calls into code whose interface is unsafe, each behind a checked function.
#![allow(unsafe_code)]

pub mod gemm;
