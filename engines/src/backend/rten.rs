//! The embedded backend: rten, pure Rust, on the CPU.
//!
//! Same inputs, same thread count, same machine: same bits. rten has no 64-bit integers; they are narrowed on the
//! way in and refused where they do not fit.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use rten::{ModelOptions, NodeId, RunOptions, ThreadPool, Value, ValueOrView, ValueView};
use rten_tensor::prelude::*;

use super::{
    Backend, BackendError, Elements, Engine, Port, PrepareOptions, Session, Tensor, check_inputs,
    check_output, describe, wanted_outputs,
};
use crate::onnx::{DataType, Model};

const NAME: &str = "rten";
/// Larger models are not held twice.
const PREPACK_LIMIT: u64 = 1 << 30;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct RtenBackend;

impl Backend for RtenBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        "0.27".into()
    }

    fn prepare(&self, path: &Path, options: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError> {
        let fail = |what: String| BackendError::Prepare { backend: NAME, path: path.to_owned(), what };
        // Our own reader first: it does not trust the file, and knows symbols and 64-bit integers.
        let (inputs, outputs, weight_bytes) = {
            let model = Model::load(path).map_err(|e| fail(e.to_string()))?;
            let constants: std::collections::HashSet<&str> =
                model.graph.initializers.iter().map(|i| i.name.as_str()).collect();
            let port = |info: &crate::onnx::ValueInfo| -> Result<Port, BackendError> {
                let Some(dtype) = info.dtype else {
                    return Err(fail(format!("value {:?} has no element type", info.name)));
                };
                if !matches!(dtype, DataType::F32 | DataType::I64 | DataType::I32) {
                    return Err(fail(format!("value {:?} has elements of {}", info.name, dtype.name())));
                }
                let Some(shape) = info.shape.clone() else {
                    return Err(fail(format!("value {:?} has no shape", info.name)));
                };
                Ok(Port { name: info.name.clone(), dtype, shape })
            };
            let given = model.graph.inputs.iter().filter(|i| !constants.contains(i.name.as_str()));
            let inputs = given.map(port).collect::<Result<Vec<_>, _>>()?;
            let outputs = model.graph.outputs.iter().map(port).collect::<Result<Vec<_>, _>>()?;
            (inputs, outputs, model.weight_bytes())
        };
        // A second copy of the weights in the order of the kernels: a few per cent faster, where there is room.
        let prepack = weight_bytes <= PREPACK_LIMIT;
        let loaded = catch_unwind(|| ModelOptions::with_all_ops().prepack_weights(prepack).load_file(path))
            .map_err(|_| fail("the loader panicked".into()))?;
        let model = loaded.map_err(|e| fail(e.to_string()))?;
        let ids = |ports: &[Port]| -> Result<Vec<NodeId>, BackendError> {
            ports.iter().map(|p| model.node_id(&p.name).map_err(|e| fail(e.to_string()))).collect()
        };
        let (input_ids, output_ids) = (ids(&inputs)?, ids(&outputs)?);
        let pool = (options.threads > 0).then(|| Arc::new(ThreadPool::with_num_threads(options.threads)));
        Ok(Arc::new(RtenEngine(Arc::new(Shared { model, inputs, outputs, input_ids, output_ids, pool }))))
    }
}

struct Shared {
    model: rten::Model,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    input_ids: Vec<NodeId>,
    output_ids: Vec<NodeId>,
    pool: Option<Arc<ThreadPool>>,
}

#[derive(Clone)]
struct RtenEngine(Arc<Shared>);

impl Engine for RtenEngine {
    fn inputs(&self) -> &[Port] {
        &self.0.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.0.outputs
    }

    fn session(&self) -> Result<Box<dyn Session>, BackendError> {
        Ok(Box::new(RtenSession { engine: self.clone(), narrow: Vec::new() }))
    }
}

struct RtenSession {
    engine: RtenEngine,
    /// Buffers for narrowed integers.
    narrow: Vec<Vec<i32>>,
}

fn run_error(what: impl ToString) -> BackendError {
    BackendError::Run { backend: NAME, what: what.to_string() }
}

impl Session for RtenSession {
    fn engine(&self) -> &dyn Engine {
        &self.engine
    }

    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError> {
        let shared = &*self.engine.0;
        check_inputs(&shared.inputs, inputs)?;
        let wanted = wanted_outputs(&shared.outputs, outputs)?;
        self.narrow.resize_with(inputs.len(), Vec::new);
        for ((name, tensor), narrow) in inputs.iter().zip(&mut self.narrow) {
            narrow.clear();
            if let Elements::I64(values) = &tensor.data {
                for &value in values {
                    narrow.push(i32::try_from(value).map_err(|_| BackendError::Input {
                        name: (*name).to_owned(),
                        expected: "integers of 32 bits (rten has no wider ones)".into(),
                        got: value.to_string(),
                    })?);
                }
            }
        }
        let mut views: Vec<(NodeId, ValueOrView<'_>)> = Vec::with_capacity(inputs.len());
        for ((name, tensor), narrow) in inputs.iter().zip(&self.narrow) {
            let Some(index) = shared.inputs.iter().position(|p| p.name == *name) else {
                continue;
            };
            let view = match &tensor.data {
                Elements::F32(v) => ValueView::from_shape(&tensor.shape, v).map_err(run_error)?,
                Elements::I64(_) => ValueView::from_shape(&tensor.shape, narrow).map_err(run_error)?,
                Elements::I32(v) => ValueView::from_shape(&tensor.shape, v).map_err(run_error)?,
            };
            views.push((shared.input_ids[index], view.into()));
        }
        let ids: Vec<NodeId> = wanted.iter().map(|&i| shared.output_ids[i]).collect();
        let options = RunOptions::default().with_thread_pool(shared.pool.clone());
        let results = catch_unwind(AssertUnwindSafe(|| shared.model.run(views, &ids, Some(options))))
            .map_err(|_| run_error("a kernel panicked"))?
            .map_err(run_error)?;
        for (((name, out), value), &index) in outputs.iter_mut().zip(results).zip(&wanted) {
            let port = &shared.outputs[index];
            **out = match value {
                Value::FloatTensor(t) if port.dtype == DataType::F32 => {
                    Tensor { shape: t.shape().to_vec(), data: Elements::F32(t.into_data()) }
                }
                Value::Int32Tensor(t) if port.dtype != DataType::F32 => {
                    let shape = t.shape().to_vec();
                    let values = t.into_data();
                    let data = if port.dtype == DataType::I64 {
                        Elements::I64(values.into_iter().map(i64::from).collect())
                    } else {
                        Elements::I32(values)
                    };
                    Tensor { shape, data }
                }
                other => {
                    let (name, got) = ((*name).to_owned(), format!("{:?}", other.dtype()));
                    return Err(BackendError::Output { name, expected: describe(port), got });
                }
            };
            check_output(port, out)?;
        }
        Ok(())
    }
}
