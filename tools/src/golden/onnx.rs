//! Runs a network as an exported ONNX graph on the embedded backend.

use std::{collections::BTreeMap, sync::Arc};

use super::engine::{Array, Inputs, Program};
use crate::eager::Params;

/// Graphs made so far.
pub(super) struct OnnxEngine {
    _params: Arc<Params>,
}

impl OnnxEngine {
    pub(super) fn new(params: Arc<Params>) -> Self {
        Self { _params: params }
    }

    pub(super) fn run<P: Program>(
        &mut self,
        program: &P,
        _inputs: &Inputs,
    ) -> anyhow::Result<BTreeMap<String, Array>> {
        anyhow::bail!("{}: the ONNX path is not wired yet", program.key())
    }
}
