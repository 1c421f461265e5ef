//! Our CUDA engine behind the traits of [`crate::backend`].

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::kernels::Element;
use super::plan::{Place, Plan, Planner, Queued, Slot, View};
use super::program::Program;
use super::weights::{Weights, layout};
use super::{CudaDevice, CudaError, Device, Memory, Pinned, walk};
use crate::backend::{
    Backend, BackendError, Elements, Engine, Port, PrepareOptions, Resident, SampleStep, Session, State,
    Tensor, check_inputs, describe, is_state, state_input,
};
use crate::onnx::{DataType, Dim, Graph, Model, ValueInfo};
use crate::target::Precision;

/// Shapes whose plans a session keeps, and addresses for which a plan is kept ready to launch.
const PLANS_KEPT: usize = 8;
const BINDINGS_KEPT: usize = 4;
const ALIGNMENT: usize = 256;
/// Weights of which it is told how many are on the device.
const TOLD_BYTES: u64 = 1 << 30;

/// Runs ONNX graphs with the kernels of this crate, node by node or several nodes in one kernel.
pub struct CudaBackend {
    device: Arc<dyn Device>,
    precision: Precision,
    /// Most device memory of one engine and of each of its sessions together, bytes.
    pub memory_limit: Option<u64>,
}

impl CudaBackend {
    /// Opens a GPU and loads the kernels. Products and attention run in bf16 on the tensor cores
    /// ([`Precision::Bf16`]; everything between them stays f32), or all in f32 ([`Precision::Fp32`]).
    ///
    /// # Errors
    /// [`BackendError::Unavailable`]: no driver, no device, either too old, or another precision.
    pub fn open(precision: Precision, ordinal: usize) -> Result<Self, BackendError> {
        let device = CudaDevice::with_kernels(ordinal, None)
            .map_err(|e| BackendError::Unavailable { backend: name_of(precision), what: e.to_string() })?;
        CudaBackend::on(device, precision)
    }

    /// On a device that was opened with kernels.
    ///
    /// # Errors
    /// [`BackendError::Unavailable`] for another precision than bf16 and f32.
    pub fn on(device: Arc<dyn Device>, precision: Precision) -> Result<Self, BackendError> {
        if !matches!(precision, Precision::Bf16 | Precision::Fp32) {
            let what = format!("no kernels in {}; there are bf16 and fp32", precision.name());
            return Err(BackendError::Unavailable { backend: "cuda", what });
        }
        Ok(CudaBackend { device, precision, memory_limit: None })
    }
}

fn name_of(precision: Precision) -> &'static str {
    if precision == Precision::Fp32 { "cuda-f32" } else { "cuda" }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        name_of(self.precision)
    }

    fn version(&self) -> String {
        let info = self.device.info();
        let products = self.device.products().map_or(String::new(), |library| format!(", {library}"));
        format!("PTX 8.5 on {} ({}){products}", info.name, info.compute_capability)
    }

    fn prepare(&self, path: &Path, _options: &PrepareOptions) -> Result<Arc<dyn Engine>, BackendError> {
        let backend = self.name();
        let fail = |what: String| BackendError::Prepare { backend, path: path.to_owned(), what };
        let model = Model::load(path).map_err(|e| fail(e.to_string()))?;
        let graph = &model.graph;
        // Before any weight is read: what cannot run is told at once.
        let program = Program::of(graph).map_err(|e| fail(e.to_string()))?;
        let port = |info: &ValueInfo| match (info.dtype, &info.shape) {
            (Some(dtype @ (DataType::F32 | DataType::I64 | DataType::I32)), Some(shape)) => {
                Ok(Port { name: info.name.clone(), dtype, shape: shape.clone() })
            }
            (dtype, _) => {
                let dtype = dtype.map_or("no stated type", DataType::name);
                Err(fail(format!("value {:?} has elements of {dtype}, or no shape", info.name)))
            }
        };
        let is_constant = |info: &&ValueInfo| graph.initializer(&info.name).is_none();
        let inputs = graph.inputs.iter().filter(is_constant).map(port).collect::<Result<Vec<_>, _>>()?;
        let outputs = graph.outputs.iter().map(port).collect::<Result<Vec<_>, _>>()?;
        let bf16 = self.precision == Precision::Bf16;
        let (mut tenths, name) = (0, path.file_name().unwrap_or_default());
        let mut tell = |done: u64, of: u64| {
            let now = 10 * done / of.max(1);
            if of >= TOLD_BYTES && now > tenths {
                tenths = now;
                let gigabytes = |bytes: u64| bytes as f64 / 1e9;
                tracing::info!(
                    "{}: {:.1} of {:.1} GB on the device",
                    name.display(),
                    gigabytes(done),
                    gigabytes(of)
                );
            }
        };
        let limit = self.memory_limit;
        let weights = Weights::load(&self.device, &graph.initializers, &program, bf16, limit, &mut tell)
            .map_err(|e| fail(e.to_string()))?;
        Ok(Arc::new(CudaEngine(Arc::new(Shared {
            backend,
            device: Arc::clone(&self.device),
            program,
            bf16,
            inputs,
            outputs,
            weights,
            memory_limit: self.memory_limit,
        }))))
    }
}

/// What a graph takes on a device, known without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct GraphNeeds {
    /// Bytes of its constants, in the types in which they are kept.
    pub weight_bytes: u64,
    /// Bytes of everything that one run makes, inputs and outputs included; state is left out, and what a library of
    /// products works in (32 MB at most).
    pub arena_bytes: u64,
    /// Bytes of the state that a run leaves for the next.
    pub state_bytes: u64,
    /// Kernels of one run.
    pub launches: usize,
}

/// Plans one run of a graph, without a device and without reading weights. `size` gives the sizes of its symbols.
///
/// # Errors
/// [`CudaError::Operators`]; [`CudaError::Shapes`], also for a symbol without a size.
pub fn graph_needs(
    graph: &Graph,
    precision: Precision,
    size: &dyn Fn(&str) -> Option<usize>,
) -> Result<GraphNeeds, CudaError> {
    let bf16 = precision == Precision::Bf16;
    let program = Program::of(graph)?;
    let (all, weight_bytes) = layout(&graph.initializers, &program, bf16);
    let mut planner = Planner::new(&program, bf16);
    for (_, weight) in &all {
        planner.outside(&weight.name, 0, weight.offset, weight.element, &weight.shape);
    }
    for (i, info) in graph.inputs.iter().enumerate().filter(|(_, v)| graph.initializer(&v.name).is_none()) {
        let wrong = |what: String| CudaError::Shapes { place: info.name.clone(), what };
        let sizes = info.shape.iter().flatten().map(|dim| match dim {
            Dim::Fixed(n) => Ok(*n),
            Dim::Symbol(name) => size(name).ok_or_else(|| wrong(format!("nothing says how large {name} is"))),
            Dim::Unknown => Err(wrong("a size without a name".into())),
        });
        let shape = sizes.collect::<Result<Vec<_>, _>>()?;
        let integers = matches!(info.dtype, Some(DataType::I64 | DataType::I32));
        let element = match integers {
            true => Element::I32,
            // As a run before would have left it.
            false if bf16 && program.products.contains(&info.name) && is_state(&info.name) => Element::Bf16,
            false => Element::F32,
        };
        if is_state(&info.name) {
            planner.outside(&info.name, 1 + i, 0, element, &shape);
        } else {
            planner.input(&info.name, element, &shape);
        }
    }
    planner.steps()?;
    let mut state_bytes = 0;
    for (i, info) in graph.outputs.iter().enumerate() {
        if is_state(&info.name) {
            let (element, shape) = planner.state(&info.name, 1 + graph.inputs.len() + i)?;
            state_bytes += shape.iter().product::<usize>() * element.bytes();
        } else {
            planner.output(&info.name)?;
        }
    }
    let plan = planner.finish();
    Ok(GraphNeeds {
        weight_bytes: weight_bytes as u64,
        arena_bytes: plan.arena_bytes as u64,
        state_bytes: state_bytes as u64,
        launches: plan.calls.len(),
    })
}

struct Shared {
    backend: &'static str,
    device: Arc<dyn Device>,
    program: Program,
    bf16: bool,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    weights: Weights,
    memory_limit: Option<u64>,
}

#[derive(Clone)]
struct CudaEngine(Arc<Shared>);

impl Engine for CudaEngine {
    fn inputs(&self) -> &[Port] {
        &self.0.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.0.outputs
    }

    fn session(&self) -> Result<Box<dyn Session>, BackendError> {
        // A stream of its own: what one session queues is no part of what another one records.
        let device = self
            .0
            .device
            .with_own_stream()
            .map_err(|e| BackendError::Unavailable { backend: self.0.backend, what: e.to_string() })?;
        Ok(Box::new(CudaSession {
            engine: self.clone(),
            device,
            arena: None,
            staging: None,
            plans: Vec::new(),
        }))
    }
}

/// Tensors on the device, by the name of the input that reads them.
#[derive(Default)]
pub(super) struct DeviceState(Vec<StateTensor>);

pub(super) struct StateTensor {
    name: String,
    pub memory: Memory,
    pub element: Element,
    pub shape: Vec<usize>,
}

impl DeviceState {
    pub fn find(&self, name: &str) -> Option<&StateTensor> {
        self.0.iter().find(|s| s.name == name)
    }
}

/// What a plan is made for.
#[derive(Clone, PartialEq)]
struct PlanKey {
    /// Shapes of the inputs, in the order of the ports, their elements, and whether they are state.
    shapes: Vec<(Vec<usize>, Element, bool)>,
    /// Those that the caller reads.
    outputs: Vec<String>,
    /// Those that stay on the device.
    left: Vec<String>,
}

/// A plan with what is ready to run it.
struct Planned {
    key: PlanKey,
    plan: Plan,
    /// What the caller reads, in the order asked for.
    outputs: Vec<View>,
    /// What stays on the device: the input that reads it, elements, shape.
    state: Vec<(String, Element, Vec<usize>)>,
    bindings: Vec<Binding>,
    /// Whether the last run was one of this plan: its inputs are still on the device, and in the staging memory.
    fresh: bool,
}

/// Launches at certain addresses.
struct Binding {
    /// Of the arena, then of everything outside.
    addresses: Vec<u64>,
    calls: Vec<Queued>,
    runs: u64,
    graph: Option<u64>,
}

struct CudaSession {
    engine: CudaEngine,
    device: Arc<dyn Device>,
    arena: Option<Memory>,
    staging: Option<Pinned>,
    /// Newest first.
    plans: Vec<Planned>,
}

impl Drop for CudaSession {
    fn drop(&mut self) {
        self.forget();
    }
}

impl CudaSession {
    fn run_error(&self, what: impl ToString) -> BackendError {
        BackendError::Run { backend: self.engine.0.backend, what: what.to_string() }
    }

    /// Drops recorded graphs: their addresses are not valid any more.
    fn forget(&mut self) {
        for planned in self.plans.drain(..) {
            drop_graphs(self.device.as_ref(), planned.bindings);
        }
    }

    /// The plan for these inputs, at the front of the list.
    fn planned(&mut self, key: PlanKey, from: &[&StateTensor]) -> Result<(), BackendError> {
        if let Some(at) = self.plans.iter().position(|p| p.key == key) {
            let found = self.plans.remove(at);
            self.plans.insert(0, found);
            return Ok(());
        }
        let shared = Arc::clone(&self.engine.0);
        let mut planner = Planner::new(&shared.program, shared.bf16).with_products_of(self.device.as_ref());
        for weight in &shared.weights.all {
            planner.outside(&weight.name, 0, weight.offset, weight.element, &weight.shape);
        }
        for (port, (shape, element, _)) in shared.inputs.iter().zip(&key.shapes) {
            match from.iter().position(|s| s.name == port.name) {
                Some(i) => planner.outside(&port.name, 1 + i, 0, *element, shape),
                None => planner.input(&port.name, *element, shape),
            }
        }
        planner.steps().map_err(|e| self.run_error(e))?;
        let outputs = key.outputs.iter().map(|name| planner.output(name)).collect::<Result<Vec<_>, _>>();
        let outputs = outputs.map_err(|e| self.run_error(e))?;
        let mut state = Vec::new();
        for name in &key.left {
            let left = planner.state(name, 1 + from.len() + state.len());
            let (element, shape) = left.map_err(|e| self.run_error(e))?;
            state.push((state_input(name), element, shape));
        }
        let plan = planner.finish();
        let total = plan.arena_bytes as u64 + shared.weights.memory.bytes() as u64;
        if let Some(limit) = shared.memory_limit.filter(|&l| total > l) {
            let (weights, arena) = (shared.weights.memory.bytes(), plan.arena_bytes);
            return Err(self.run_error(format!(
                "weights of {weights} bytes and an arena of {arena} for these shapes, the limit is {limit}"
            )));
        }
        if self.plans.len() == PLANS_KEPT
            && let Some(oldest) = self.plans.pop()
        {
            drop_graphs(self.device.as_ref(), oldest.bindings);
        }
        self.plans.insert(0, Planned { key, plan, outputs, state, bindings: Vec::new(), fresh: false });
        Ok(())
    }

    /// Room for the plan at the front of the list; more room is made where it is too little.
    fn reserve(&mut self, staged: usize) -> Result<(), BackendError> {
        let Some(wanted) = self.plans.first().map(|p| p.plan.arena_bytes) else { return Ok(()) };
        if self.arena.as_ref().is_none_or(|a| a.bytes() < wanted) {
            // Launches at the old addresses go first, then the old memory, then the new is asked for.
            for planned in &mut self.plans {
                drop_graphs(self.device.as_ref(), std::mem::take(&mut planned.bindings));
            }
            self.arena = None;
            self.arena =
                Some(Memory::new(&self.device, wanted, "values of one run").map_err(|e| self.run_error(e))?);
        }
        if self.staging.as_ref().is_none_or(|s| s.bytes().len() < staged) {
            self.staging = None;
            self.staging = Some(Pinned::new(&self.device, staged).map_err(|e| self.run_error(e))?);
        }
        Ok(())
    }

    /// Memory for what the plan at the front of the list leaves on the device: that of what was left before, where it is
    /// large enough.
    fn room_for_state(&mut self, to: &mut State) -> Result<DeviceState, BackendError> {
        let state = self.plans.first().map(|p| p.state.clone()).unwrap_or_default();
        let mut left = DeviceState::default();
        if state.is_empty() {
            return Ok(left);
        }
        let mut before = to.device_mut::<DeviceState>().map(std::mem::take).unwrap_or_default();
        for (name, element, shape) in state {
            let bytes = shape.iter().product::<usize>() * element.bytes();
            let old = before.0.iter().position(|s| s.name == name && s.memory.bytes() >= bytes);
            let memory = match old {
                Some(at) => before.0.swap_remove(at).memory,
                None => {
                    self.let_go(&mut before, &name)?;
                    Memory::new(&self.device, bytes, &name).map_err(|e| self.run_error(e))?
                }
            };
            left.0.push(StateTensor { name, memory, element, shape });
        }
        if !before.0.is_empty() {
            self.wait()?;
        }
        Ok(left)
    }

    /// Drops a tensor, when what was queued does not use it any more.
    fn let_go(&self, state: &mut DeviceState, name: &str) -> Result<(), BackendError> {
        if state.0.iter().any(|s| s.name == name) {
            self.wait()?;
            state.0.retain(|s| s.name != name);
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), BackendError> {
        run_result(self.engine.0.backend, self.device.synchronize())
    }

    /// Tensors on the device, of this backend.
    fn tensors<'s>(&self, state: &'s State) -> Result<&'s [StateTensor], BackendError> {
        if state.is_empty() {
            return Ok(&[]);
        }
        let found = state.device::<DeviceState>().map(|s| s.0.as_slice());
        found.ok_or_else(|| self.run_error("state that a run of another backend left cannot be read here"))
    }

    /// Runs the plan at the front of the list at these addresses: one launch after the other the first time, recorded
    /// the second time, as one graph from then on.
    fn launch(&mut self, addresses: Vec<u64>) -> Result<(), CudaError> {
        let device = Arc::clone(&self.device);
        let Some(planned) = self.plans.first_mut() else { return Ok(()) };
        let at = match planned.bindings.iter().position(|b| b.addresses == addresses) {
            Some(at) => at,
            None => {
                if planned.bindings.len() == BINDINGS_KEPT {
                    drop_graphs(device.as_ref(), vec![planned.bindings.remove(0)]);
                }
                let plan = &planned.plan;
                let address = |slot: usize| match plan.slots[slot] {
                    Slot::Arena(_) => addresses[0] + plan.offsets[slot] as u64,
                    Slot::Outside(number) => addresses[1 + number],
                };
                let calls = plan.calls.iter().map(|c| c.at(&address)).collect();
                planned.bindings.push(Binding { addresses: addresses.clone(), calls, runs: 0, graph: None });
                planned.bindings.len() - 1
            }
        };
        let binding = &mut planned.bindings[at];
        binding.runs += 1;
        if binding.runs == 2 {
            let calls = &binding.calls;
            let mut queue = || {
                // SAFETY: as below.
                calls.iter().all(|call| unsafe { call.run(device.as_ref()) }.is_ok())
            };
            binding.graph = device.capture(&mut queue)?;
        }
        match binding.graph {
            Some(graph) => device.launch(graph),
            None => binding.calls.iter().try_for_each(|call| {
                // SAFETY: the plan gives each kernel its own arguments, in buffers of the sizes that it reads and
                // writes; arena, weights and state live until the session synchronises.
                unsafe { call.run(device.as_ref()) }
            }),
        }
    }
}

fn drop_graphs(device: &dyn Device, bindings: Vec<Binding>) {
    bindings.into_iter().filter_map(|b| b.graph).for_each(|g| device.drop_graph(g));
}

fn run_result(backend: &'static str, result: Result<(), CudaError>) -> Result<(), BackendError> {
    result.map_err(|e| BackendError::Run { backend, what: e.to_string() })
}

/// Writes an input as the kernels take it; whether that changed anything.
fn write_input(name: &str, data: &Elements, to: &mut [u8]) -> Result<bool, BackendError> {
    let mut changed = false;
    let mut put = |word: &mut [u8], new: [u8; 4]| {
        changed |= word != new;
        word.copy_from_slice(&new);
    };
    let words = to.chunks_exact_mut(4);
    match data {
        Elements::F32(values) => words.zip(values).for_each(|(w, v)| put(w, v.to_le_bytes())),
        Elements::I32(values) => words.zip(values).for_each(|(w, v)| put(w, v.to_le_bytes())),
        Elements::I64(values) => {
            for (word, &value) in words.zip(values) {
                let narrow = i32::try_from(value).map_err(|_| BackendError::Input {
                    name: name.to_owned(),
                    expected: "integers of 32 bits".into(),
                    got: value.to_string(),
                })?;
                put(word, narrow.to_le_bytes());
            }
        }
    }
    Ok(changed)
}

/// Indices that are rows of the table that they are used on.
fn check_indices(plan: &Plan, inputs: &[(&str, &Tensor)]) -> Result<(), BackendError> {
    for (name, rows) in &plan.index_limits {
        let Some((_, tensor)) = inputs.iter().find(|(n, _)| n == name) else { continue };
        let rows = i64::try_from(*rows).unwrap_or(i64::MAX);
        let outside = match &tensor.data {
            Elements::I64(values) => values.iter().copied().find(|v| !(-rows..rows).contains(v)),
            Elements::I32(values) => {
                values.iter().map(|&v| i64::from(v)).find(|v| !(-rows..rows).contains(v))
            }
            Elements::F32(_) => None,
        };
        if let Some(value) = outside {
            return Err(BackendError::Input {
                name: name.clone(),
                expected: format!("rows of a table of {rows}"),
                got: value.to_string(),
            });
        }
    }
    Ok(())
}

impl Session for CudaSession {
    fn engine(&self) -> &dyn Engine {
        &self.engine
    }

    fn resident(&mut self) -> Option<&mut dyn Resident> {
        Some(self)
    }

    fn run_into(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
    ) -> Result<(), BackendError> {
        self.run_with_state(inputs, outputs, None, None)
    }

    /// Long, since it is one run from its checks to its results, whose parts share their places in memory.
    fn run_with_state(
        &mut self,
        inputs: &[(&str, &Tensor)],
        outputs: &mut [(&str, &mut Tensor)],
        from: Option<&State>,
        mut to: Option<&mut State>,
    ) -> Result<(), BackendError> {
        let shared = Arc::clone(&self.engine.0);
        let backend = shared.backend;
        let from = match from {
            None => Vec::new(),
            Some(state) => self.tensors(state)?.iter().collect(),
        };
        let mut ports = shared.inputs.clone();
        ports.retain(|p| !from.iter().any(|s| s.name == p.name));
        check_inputs(&ports, inputs)?;
        if let Some((name, _)) =
            outputs.iter().find(|(name, _)| !shared.outputs.iter().any(|p| p.name == *name))
        {
            let known: Vec<&str> = shared.outputs.iter().map(|p| p.name.as_str()).collect();
            return Err(BackendError::Output {
                name: (*name).to_owned(),
                expected: format!("one of {}", known.join(", ")),
                got: "a name that the engine lacks".into(),
            });
        }
        let mut shapes = Vec::with_capacity(shared.inputs.len());
        for port in &shared.inputs {
            if let Some(state) = from.iter().find(|s| s.name == port.name) {
                shapes.push((state.shape.clone(), state.element, true));
            } else if let Some((_, tensor)) = inputs.iter().find(|(n, _)| *n == port.name) {
                let element = if port.dtype == DataType::F32 { Element::F32 } else { Element::I32 };
                shapes.push((tensor.shape.clone(), element, false));
            }
        }
        let state = shared.outputs.iter().map(|p| &p.name).filter(|n| to.is_some() && is_state(n));
        let key = PlanKey {
            shapes,
            outputs: outputs.iter().map(|(name, _)| (*name).to_owned()).collect(),
            left: state.cloned().collect(),
        };
        self.planned(key, &from)?;
        check_indices(&self.plans[0].plan, inputs)?;

        // Where inputs and outputs pass through page-locked memory.
        let planned = &self.plans[0];
        let mut inputs = inputs.to_vec();
        inputs.sort_by_key(|(name, _)| shared.inputs.iter().position(|p| p.name == *name));
        let mut places: Vec<(View, usize)> = Vec::new();
        let mut staged = 0;
        for view in inputs.iter().filter_map(|(n, _)| planned.plan.values.get(*n)).chain(&planned.outputs) {
            places.push((view.clone(), staged));
            staged += view.bytes().next_multiple_of(ALIGNMENT);
        }
        // What the last run of the same plan was given is not copied again; that run may have been of another plan.
        let fresh = planned.fresh;
        self.plans.iter_mut().for_each(|p| p.fresh = false);
        self.reserve(staged)?;

        let left = match to.as_deref_mut() {
            Some(to) => self.room_for_state(to)?,
            None => DeviceState::default(),
        };

        let (Some(arena), Some(staging)) = (&self.arena, &mut self.staging) else {
            return Err(BackendError::Run { backend, what: "no memory was reserved".into() });
        };
        let base = arena.address();
        let mut filled = Vec::new();
        for ((name, tensor), (view, at)) in inputs.iter().zip(&places) {
            let changed = write_input(name, &tensor.data, &mut staging.bytes_mut()[*at..*at + view.bytes()])?;
            if view.count() > 0 && (changed || !fresh) {
                filled.push((view, at));
            }
        }
        let plan = &self.plans[0].plan;
        let address = |view: &View| base + (plan.offsets[view.place.slot] + view.place.offset) as u64;
        let queued = filled.into_iter().try_for_each(|(view, at)| {
            // SAFETY: both ranges are `view.bytes()` long; staging is not written before `synchronize`.
            unsafe { self.device.copy_in(address(view), staging.bytes()[*at..].as_ptr(), view.bytes()) }
        });
        let mut addresses = vec![base, shared.weights.memory.address()];
        addresses.extend(from.into_iter().chain(&left.0).map(|s| s.memory.address()));
        let results = places[inputs.len()..].iter().filter(|(view, _)| view.count() > 0);
        let results: Vec<_> = results.map(|(view, at)| (address(view), *at, view.bytes())).collect();
        let mut done = queued.and_then(|()| self.launch(addresses));
        if let Some(staging) = &mut self.staging {
            for &(address, at, bytes) in &results {
                // SAFETY: both ranges are `bytes` long; staging is not read before `synchronize`.
                done = done.and_then(|()| unsafe {
                    self.device.copy_out(staging.bytes_mut()[at..].as_mut_ptr(), address, bytes)
                });
            }
        }
        // Also after a failure: nothing may use this memory any more when the caller goes on.
        let synchronised = self.device.synchronize();
        run_result(backend, done.and(synchronised))?;
        self.plans[0].fresh = true;
        let Some(staging) = &self.staging else { return Ok(()) };
        for ((_, out), (view, at)) in outputs.iter_mut().zip(&places[inputs.len()..]) {
            **out = read_output(view, &staging.bytes()[*at..*at + view.bytes()]);
        }
        if let Some(state) = to.and_then(|to| to.device_mut::<DeviceState>()) {
            *state = left;
        }
        Ok(())
    }
}

impl Resident for CudaSession {
    fn put(&mut self, on: &mut State, name: &str, tensor: &Tensor) -> Result<(), BackendError> {
        let element = if matches!(tensor.data, Elements::F32(_)) { Element::F32 } else { Element::I32 };
        let bytes = tensor.data.len() * element.bytes();
        let mut staging = Pinned::new(&self.device, bytes).map_err(|e| self.run_error(e))?;
        write_input(name, &tensor.data, &mut staging.bytes_mut()[..bytes])?;
        let mut state = on.device_mut::<DeviceState>().map(std::mem::take).unwrap_or_default();
        if state.find(name).is_none_or(|s| s.memory.bytes() < bytes) {
            self.let_go(&mut state, name)?;
            let memory = Memory::new(&self.device, bytes, name).map_err(|e| self.run_error(e))?;
            state.0.push(StateTensor { name: name.to_owned(), memory, element, shape: Vec::new() });
        }
        let copied = match state.0.iter_mut().find(|s| s.name == name) {
            Some(to) => {
                (to.element, to.shape) = (element, tensor.shape.clone());
                // SAFETY: both ranges are at least `bytes` long; staging lives until `wait` below.
                unsafe { self.device.copy_in(to.memory.address(), staging.bytes().as_ptr(), bytes) }
            }
            None => Ok(()),
        };
        if let Some(on) = on.device_mut::<DeviceState>() {
            *on = state;
        }
        self.wait()?;
        run_result(self.engine.0.backend, copied)
    }

    fn queue(&mut self, from: &[&State], outputs: &[&str], to: &mut State) -> Result<(), BackendError> {
        let shared = Arc::clone(&self.engine.0);
        let mut tensors = Vec::new();
        for state in from {
            tensors.extend(self.tensors(state)?);
        }
        let mut shapes = Vec::with_capacity(shared.inputs.len());
        for port in &shared.inputs {
            let found = tensors.iter().find(|s| s.name == port.name);
            let sizes = |s: &&&StateTensor| {
                s.shape.len() == port.shape.len()
                    && port
                        .shape
                        .iter()
                        .zip(&s.shape)
                        .all(|(d, &size)| !matches!(d, Dim::Fixed(n) if *n != size))
            };
            let integers = matches!(port.dtype, DataType::I64 | DataType::I32);
            let fits = |s: &&&StateTensor| sizes(s) && (s.element == Element::I32) == integers;
            let Some(tensor) = found.filter(fits) else {
                let got = found.map_or_else(|| "nothing on the device".into(), |s| format!("{:?}", s.shape));
                return Err(BackendError::Input { name: port.name.clone(), expected: describe(port), got });
            };
            shapes.push((tensor.shape.clone(), tensor.element, true));
        }
        if let Some(name) = outputs.iter().find(|name| !shared.outputs.iter().any(|p| p.name == **name)) {
            let (expected, got) = ("an output of the engine".into(), "a name that it lacks".into());
            return Err(BackendError::Output { name: (*name).to_owned(), expected, got });
        }
        let left = outputs.iter().map(|&name| name.to_owned()).collect();
        self.planned(PlanKey { shapes, outputs: Vec::new(), left }, &tensors)?;
        self.plans.iter_mut().for_each(|p| p.fresh = false);
        self.reserve(0)?;
        let room = self.room_for_state(to)?;
        let arena = self.arena.as_ref().map_or(0, Memory::address);
        let mut addresses = vec![arena, shared.weights.memory.address()];
        addresses.extend(tensors.into_iter().chain(&room.0).map(|s| s.memory.address()));
        let queued = self.launch(addresses);
        if queued.is_err() {
            self.wait()?;
        }
        run_result(shared.backend, queued)?;
        if let Some(to) = to.device_mut::<DeviceState>() {
            *to = room;
        }
        Ok(())
    }

    fn sample(&mut self, step: &SampleStep<'_>) -> Result<(), BackendError> {
        let launch = walk::launch(step).map_err(|what| self.run_error(what))?;
        // SAFETY: the launch has this kernel's arguments, and `walk` has checked the sizes of all that it reads and
        // writes, which their owners keep until they have waited.
        let queued = unsafe { self.device.run(&launch) };
        if queued.is_err() {
            self.wait()?;
        }
        run_result(self.engine.0.backend, queued)
    }

    fn get(&mut self, from: &State, name: &str) -> Result<Tensor, BackendError> {
        let Some(tensor) = self.tensors(from)?.iter().find(|s| s.name == name) else {
            let (expected, got) = ("a tensor on the device".into(), "no such name".into());
            return Err(BackendError::Output { name: name.to_owned(), expected, got });
        };
        let bytes = tensor.shape.iter().product::<usize>() * tensor.element.bytes();
        if self.staging.as_ref().is_none_or(|s| s.bytes().len() < bytes) {
            self.staging = None;
            self.staging = Some(Pinned::new(&self.device, bytes).map_err(|e| self.run_error(e))?);
        }
        let Some(staging) = &mut self.staging else {
            return Err(BackendError::Run {
                backend: self.engine.0.backend,
                what: "no memory was reserved".into(),
            });
        };
        // SAFETY: both ranges are `bytes` long, and staging is read after `wait`.
        let copied =
            unsafe { self.device.copy_out(staging.bytes_mut().as_mut_ptr(), tensor.memory.address(), bytes) };
        // What other plans have in the staging memory is overwritten.
        self.plans.iter_mut().for_each(|p| p.fresh = false);
        self.wait()?;
        run_result(self.engine.0.backend, copied)?;
        let Some(staging) = &self.staging else { return Ok(Tensor::empty()) };
        let view = View::new(Place { slot: 0, offset: 0 }, tensor.element, &tensor.shape);
        Ok(read_output(&view, &staging.bytes()[..bytes]))
    }
}

fn read_output(view: &View, bytes: &[u8]) -> Tensor {
    fn words<T>(bytes: &[u8], f: fn([u8; 4]) -> T) -> Vec<T> {
        bytes.chunks_exact(4).map(|c| f([c[0], c[1], c[2], c[3]])).collect()
    }
    let data = match view.element {
        Element::I32 => Elements::I32(words(bytes, i32::from_le_bytes)),
        Element::Bf16 => Elements::F32(
            bytes.chunks_exact(2).map(|c| half::bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
        ),
        _ => Elements::F32(words(bytes, f32::from_le_bytes)),
    };
    Tensor { shape: view.shape.clone(), data }
}
