//! Our CUDA engine behind the traits of [`crate::backend`].

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::kernels::{Element, Launch};
use super::plan::{Plan, Planner, Slot, View};
use super::program::Program;
use super::{CudaDevice, CudaError, Device, Memory, Pinned};
use crate::backend::{
    Backend, BackendError, Elements, Engine, Port, PrepareOptions, Session, State, Tensor, check_inputs,
    is_state, state_input,
};
use crate::onnx::{DataType, Dim, Graph, Initializer, Model, ValueInfo};
use crate::target::Precision;

/// Shapes whose plans a session keeps, and addresses for which a plan is kept ready to launch.
const PLANS_KEPT: usize = 8;
const BINDINGS_KEPT: usize = 4;
/// Weights go to the device in pieces of this many bytes.
const STAGING_BYTES: usize = 32 << 20;
const ALIGNMENT: usize = 256;

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
        format!("PTX 8.5 on {} ({})", info.name, info.compute_capability)
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
        let weights = Weights::load(&self.device, &graph.initializers, &program, bf16, self.memory_limit)
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

/// Why weights cannot be put on the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum WeightsError {
    #[error(transparent)]
    Read(#[from] crate::onnx::OnnxError),
    #[error(transparent)]
    Device(#[from] CudaError),
    #[error("weight {name:?} has integer {value}, the kernels take 32 bits")]
    Integer { name: String, value: i64 },
    #[error("weights of {bytes} bytes, the limit is {limit}")]
    Limit { bytes: u64, limit: u64 },
}

/// A constant on the device.
struct Weight {
    name: String,
    offset: usize,
    element: Element,
    shape: Vec<usize>,
}

/// All constants that steps read, in one piece of memory.
struct Weights {
    memory: Memory,
    all: Vec<Weight>,
}

impl Weights {
    fn load(
        device: &Arc<dyn Device>,
        constants: &[Initializer],
        program: &Program,
        bf16: bool,
        limit: Option<u64>,
    ) -> Result<Weights, WeightsError> {
        let (all, bytes) = layout(constants, program, bf16);
        if let Some(limit) = limit.filter(|&l| bytes as u64 > l) {
            return Err(WeightsError::Limit { bytes: bytes as u64, limit });
        }
        let memory = Memory::new(device, bytes, "weights")?;
        let mut staging = Pinned::new(device, STAGING_BYTES.min(bytes.max(1)))?;
        for (constant, weight) in &all {
            let data = encoded(constant, weight.element)?;
            for (i, piece) in data.chunks(staging.bytes().len()).enumerate() {
                staging.bytes_mut()[..piece.len()].copy_from_slice(piece);
                let to = memory.address() + (weight.offset + i * staging.bytes().len()) as u64;
                // SAFETY: `piece` fits both; the staging memory is not written before `synchronize`.
                unsafe { device.copy_in(to, staging.bytes().as_ptr(), piece.len())? };
                device.synchronize()?;
            }
        }
        Ok(Weights { memory, all: all.into_iter().map(|(_, w)| w).collect() })
    }
}

/// Places of the constants that steps read, one after the other, and how many bytes they take together.
fn layout<'c>(
    constants: &'c [Initializer],
    program: &Program,
    bf16: bool,
) -> (Vec<(&'c Initializer, Weight)>, usize) {
    let read = |name: &str| program.steps.iter().any(|s| s.inputs.iter().any(|i| i == name));
    let mut all = Vec::new();
    let mut bytes = 0;
    for constant in constants.iter().filter(|c| read(&c.name)) {
        let element = match constant.dtype {
            DataType::I64 | DataType::I32 => Element::I32,
            _ if bf16 && program.products.contains(&constant.name) => Element::Bf16,
            _ => Element::F32,
        };
        let count = constant.shape.iter().product::<usize>();
        all.push((
            constant,
            Weight { name: constant.name.clone(), offset: bytes, element, shape: constant.shape.clone() },
        ));
        bytes += (count * element.bytes()).next_multiple_of(ALIGNMENT);
    }
    (all, bytes)
}

/// The bytes of a constant as the kernels take them; those of the file where they are that already.
fn encoded(constant: &Initializer, element: Element) -> Result<Cow<'_, [u8]>, WeightsError> {
    let as_it_is = match element {
        Element::F32 => DataType::F32,
        Element::Bf16 => DataType::BF16,
        Element::I32 => DataType::I32,
    };
    if constant.dtype == as_it_is {
        return Ok(constant.bytes()?);
    }
    Ok(Cow::Owned(match element {
        Element::F32 => constant.to_f32()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Element::Bf16 => {
            constant.to_f32()?.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
        }
        Element::I32 => {
            let mut bytes = Vec::new();
            for value in constant.to_i64()? {
                let narrow = i32::try_from(value)
                    .map_err(|_| WeightsError::Integer { name: constant.name.clone(), value })?;
                bytes.extend(narrow.to_le_bytes());
            }
            bytes
        }
    }))
}

/// What a graph takes on a device, known without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct GraphNeeds {
    /// Bytes of its constants, in the types in which they are kept.
    pub weight_bytes: u64,
    /// Bytes of everything that one run makes, inputs and outputs included, state left out.
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

/// State on the device, by the name of the input that reads it.
#[derive(Default)]
struct DeviceState(Vec<StateTensor>);

struct StateTensor {
    name: String,
    memory: Memory,
    element: Element,
    shape: Vec<usize>,
}

/// What a plan is made for.
#[derive(Clone, PartialEq)]
struct PlanKey {
    /// Shapes of the inputs, in the order of the ports, their elements, and whether they are state.
    shapes: Vec<(Vec<usize>, Element, bool)>,
    outputs: Vec<String>,
    leaves_state: bool,
}

/// A plan with what is ready to run it.
struct Planned {
    key: PlanKey,
    plan: Plan,
    /// What the caller reads, in the order asked for.
    outputs: Vec<View>,
    /// State that is left: the input that reads it, elements, shape.
    state: Vec<(String, Element, Vec<usize>)>,
    bindings: Vec<Binding>,
    /// Whether the last run was one of this plan: its inputs are still on the device, and in the staging memory.
    fresh: bool,
}

/// Launches at certain addresses.
struct Binding {
    /// Of the arena, then of everything outside.
    addresses: Vec<u64>,
    launches: Vec<Launch>,
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
    fn planned(&mut self, key: PlanKey, from: &DeviceState) -> Result<(), BackendError> {
        if let Some(at) = self.plans.iter().position(|p| p.key == key) {
            let found = self.plans.remove(at);
            self.plans.insert(0, found);
            return Ok(());
        }
        let shared = Arc::clone(&self.engine.0);
        let mut planner = Planner::new(&shared.program, shared.bf16);
        for weight in &shared.weights.all {
            planner.outside(&weight.name, 0, weight.offset, weight.element, &weight.shape);
        }
        for (port, (shape, element, _)) in shared.inputs.iter().zip(&key.shapes) {
            match from.0.iter().position(|s| s.name == port.name) {
                Some(i) => planner.outside(&port.name, 1 + i, 0, *element, shape),
                None => planner.input(&port.name, *element, shape),
            }
        }
        planner.steps().map_err(|e| self.run_error(e))?;
        let outputs = key.outputs.iter().map(|name| planner.output(name)).collect::<Result<Vec<_>, _>>();
        let outputs = outputs.map_err(|e| self.run_error(e))?;
        let mut state = Vec::new();
        for port in shared.outputs.iter().filter(|p| key.leaves_state && is_state(&p.name)) {
            let left = planner.state(&port.name, 1 + from.0.len() + state.len());
            let (element, shape) = left.map_err(|e| self.run_error(e))?;
            state.push((state_input(&port.name), element, shape));
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
                let launches = plan.calls.iter().map(|c| c.launch(&address)).collect();
                planned.bindings.push(Binding {
                    addresses: addresses.clone(),
                    launches,
                    runs: 0,
                    graph: None,
                });
                planned.bindings.len() - 1
            }
        };
        let binding = &mut planned.bindings[at];
        binding.runs += 1;
        if binding.runs == 2 {
            let launches = &binding.launches;
            let mut queue = || {
                // SAFETY: as below.
                launches.iter().all(|l| unsafe { device.run(l) }.is_ok())
            };
            binding.graph = device.capture(&mut queue)?;
        }
        match binding.graph {
            Some(graph) => device.launch(graph),
            None => binding.launches.iter().try_for_each(|launch| {
                // SAFETY: the plan gives each kernel its own arguments, in buffers of the sizes that it reads and
                // writes; arena, weights and state live until the session synchronises.
                unsafe { device.run(launch) }
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
        let empty = DeviceState::default();
        let from = match from {
            None => &empty,
            Some(state) if state.is_empty() => &empty,
            Some(state) => state.device::<DeviceState>().ok_or_else(|| {
                self.run_error("state that a run of another backend left cannot be read here")
            })?,
        };
        let mut ports = shared.inputs.clone();
        ports.retain(|p| !from.0.iter().any(|s| s.name == p.name));
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
            if let Some(state) = from.0.iter().find(|s| s.name == port.name) {
                shapes.push((state.shape.clone(), state.element, true));
            } else if let Some((_, tensor)) = inputs.iter().find(|(n, _)| *n == port.name) {
                let element = if port.dtype == DataType::F32 { Element::F32 } else { Element::I32 };
                shapes.push((tensor.shape.clone(), element, false));
            }
        }
        let key = PlanKey {
            shapes,
            outputs: outputs.iter().map(|(name, _)| (*name).to_owned()).collect(),
            leaves_state: to.is_some(),
        };
        self.planned(key, from)?;
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
        let state = planned.state.clone();
        // What the last run of the same plan was given is not copied again; that run may have been of another plan.
        let fresh = planned.fresh;
        self.plans.iter_mut().for_each(|p| p.fresh = false);
        self.reserve(staged)?;

        // State is left in the memory of what was left before, where it is large enough.
        let mut left = DeviceState::default();
        if let Some(to) = to.as_deref_mut().filter(|_| !state.is_empty()) {
            let mut before = to.device_mut::<DeviceState>().map(std::mem::take).unwrap_or_default();
            for (name, element, shape) in state {
                let bytes = shape.iter().product::<usize>() * element.bytes();
                let old = before.0.iter().position(|s| s.name == name && s.memory.bytes() >= bytes);
                let memory = match old {
                    Some(at) => before.0.swap_remove(at).memory,
                    None => {
                        before.0.retain(|s| s.name != name);
                        Memory::new(&self.device, bytes, &name).map_err(|e| self.run_error(e))?
                    }
                };
                left.0.push(StateTensor { name, memory, element, shape });
            }
        }

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
        addresses.extend(from.0.iter().chain(&left.0).map(|s| s.memory.address()));
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

fn read_output(view: &View, bytes: &[u8]) -> Tensor {
    fn words<T>(bytes: &[u8], f: fn([u8; 4]) -> T) -> Vec<T> {
        bytes.chunks_exact(4).map(|c| f([c[0], c[1], c[2], c[3]])).collect()
    }
    let data = match view.element {
        Element::I32 => Elements::I32(words(bytes, i32::from_le_bytes)),
        _ => Elements::F32(words(bytes, f32::from_le_bytes)),
    };
    Tensor { shape: view.shape.clone(), data }
}
