//! A serialized engine on a device: deserialised from a mapped file, run on one stream.
#![allow(unsafe_code)] // FFI fence: virtual calls into TensorRT, one mapped file.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Instant;

use mindseye_base::sync::lock;

use super::abi::{RuntimeCacheSlots, Slots};
use super::ffi::{self, Dims, Object, method};
use super::library::{Library, LibraryError};
use crate::backend::{RunTimes, is_state, state_input};
use crate::cuda::{CudaError, Device, Memory, Pinned};

/// Element types, numbered as TensorRT numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DType {
    F32,
    F16,
    I8,
    I32,
    Bool,
    U8,
    Bf16,
    I64,
}

impl DType {
    fn of(number: i32) -> Option<DType> {
        Some(match number {
            0 => DType::F32,
            1 => DType::F16,
            2 => DType::I8,
            3 => DType::I32,
            4 => DType::Bool,
            5 => DType::U8,
            7 => DType::Bf16,
            8 => DType::I64,
            _ => return None,
        })
    }

    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::I8 | DType::Bool | DType::U8 => 1,
            DType::I64 => 8,
        }
    }
}

/// One input or output of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Io {
    /// Name.
    pub name: String,
    /// True for an input.
    pub input: bool,
    /// Element type.
    pub dtype: DType,
    /// Shape, -1 where it depends on the inputs.
    pub shape: Vec<i64>,
    /// Smallest and largest shape of an input.
    pub limits: Option<(Vec<i64>, Vec<i64>)>,
}

/// One input of a run: name, shape, little-endian bytes.
pub type InputBytes<'a> = (&'a str, &'a [i64], &'a [u8]);

/// Receives the outputs of a run: which, its shape, its bytes.
pub type OutputSink<'a> = dyn FnMut(&Io, &[i64], &[u8]) + 'a;

/// How to run.
#[derive(Clone)]
pub struct RunOptions {
    /// Most device memory that one context may take, bytes: activations and I/O together.
    pub memory_limit: Option<u64>,
    /// Record the work as a CUDA graph after the first run of a shape, and fall back where that fails.
    pub cuda_graphs: bool,
    /// Memory that contexts share which run one after the other; none: each context has its own.
    pub arenas: Option<Arc<Arenas>>,
    /// TensorRT-RTX compiles kernels when shapes are first seen: keep them beside the engine ([`runtime_cache_path`]) for
    /// the next start.
    pub runtime_cache: bool,
    /// Wait after each step of a run, so that [`TrtContext::times`] can separate copies from compute.
    pub timed: bool,
}

/// Where kernels of TensorRT-RTX are kept: `<engine>.kernels`. The library refuses those of another version, device or
/// driver.
#[must_use]
pub fn runtime_cache_path(engine: &Path) -> PathBuf {
    let mut name = engine.file_name().unwrap_or_default().to_owned();
    name.push(".kernels");
    engine.with_file_name(name)
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions { memory_limit: None, cuda_graphs: true, arenas: None, runtime_cache: true, timed: false }
    }
}

/// Activations, inputs and outputs of one context at a time, and page-locked memory to copy through.
struct Arena {
    memory: Option<Memory>,
    staging: Option<Pinned>,
}

impl Arena {
    const EMPTY: Arena = Arena { memory: None, staging: None };

    /// Makes room. What was there is freed first, so that both are never held together.
    fn reserve(&mut self, device: &Arc<dyn Device>, bytes: usize, staged: usize) -> Result<(), CudaError> {
        if self.memory.as_ref().is_none_or(|m| m.bytes() < bytes) {
            self.memory = None;
            self.memory = Some(Memory::new(device, bytes, "an engine's activations, inputs and outputs")?);
        }
        if self.staging.as_ref().is_none_or(|s| s.bytes().len() < staged) {
            self.staging = None;
            self.staging = Some(Pinned::new(device, staged)?);
        }
        Ok(())
    }
}

type Lane = Arc<Mutex<Arena>>;

/// One arena for each thread that runs engines, as large as the largest context that ran on it: parts that a thread
/// runs one after the other need no memory of their own.
pub struct Arenas {
    device: Arc<dyn Device>,
    lanes: Mutex<HashMap<ThreadId, Lane>>,
}

impl Arenas {
    /// None yet.
    #[must_use]
    pub fn new(device: &Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Arenas { device: Arc::clone(device), lanes: Mutex::default() })
    }

    /// Refuses a context that can never run here.
    fn check(&self, bytes: usize) -> Result<(), CudaError> {
        let total = self.device.info().total_bytes;
        if bytes as u64 <= total {
            return Ok(());
        }
        let what = "an engine's activations, inputs and outputs".to_owned();
        Err(CudaError::OutOfMemory { what, wanted: bytes as u64, free: total, total })
    }

    fn of_this_thread(&self) -> Lane {
        let mut lanes = lock(&self.lanes);
        if let Some(lane) = lanes.get(&std::thread::current().id()) {
            return Arc::clone(lane);
        }
        // Those of threads whose contexts are gone.
        lanes.retain(|_, lane| Arc::strong_count(lane) > 1);
        let lane: Lane = Arc::new(Mutex::new(Arena::EMPTY));
        lanes.insert(std::thread::current().id(), Arc::clone(&lane));
        lane
    }
}

/// A tensor that stays on the device between runs.
struct DeviceTensor {
    memory: Memory,
    dtype: DType,
    shape: Vec<i64>,
}

/// State that one run leaves on the device for later runs, by the name of the input that reads it.
#[derive(Default)]
pub struct DeviceState {
    tensors: BTreeMap<String, DeviceTensor>,
}

impl DeviceState {
    /// Device memory that it holds, bytes.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.tensors.values().map(|t| t.memory.bytes()).sum()
    }

    /// Memory for a tensor, that of an earlier one where it is large enough.
    fn place(
        &mut self,
        device: &Arc<dyn Device>,
        name: &str,
        dtype: DType,
        shape: &[i64],
        bytes: usize,
    ) -> Result<u64, CudaError> {
        let old = self.tensors.remove(name).map(|t| t.memory).filter(|m| m.bytes() >= bytes);
        let memory = match old {
            Some(memory) => memory,
            None => Memory::new(device, bytes, name)?,
        };
        let address = memory.address();
        self.tensors.insert(name.to_owned(), DeviceTensor { memory, dtype, shape: shape.to_vec() });
        Ok(address)
    }
}

/// Why an engine does not load or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The library cannot be used.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// CUDA refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Not an engine at all.
    #[error("{path} is not a TensorRT engine: it begins with {got:02x?}")]
    NotAnEngine {
        /// The file.
        path: String,
        /// Its first bytes.
        got: Vec<u8>,
    },
    /// An engine that this library or device cannot run.
    #[error("TensorRT could not load {path}{log}; rebuild it on this machine")]
    Load {
        /// The file.
        path: String,
        /// What was logged.
        log: String,
    },
    /// A wrong input.
    #[error("input {input:?}: {reason}")]
    Input {
        /// The input.
        input: String,
        /// What is wrong.
        reason: String,
    },
    /// More memory than allowed.
    #[error(
        "the engine needs {needed} bytes ({activations} activations, {io} inputs and outputs), the limit is {limit}"
    )]
    Memory {
        /// Total.
        needed: u64,
        /// Activations and scratch.
        activations: u64,
        /// Inputs and outputs.
        io: u64,
        /// Allowed.
        limit: u64,
    },
    /// The run failed.
    #[error("TensorRT could not {what}{log}")]
    Run {
        /// What was being done.
        what: String,
        /// What was logged.
        log: String,
    },
}

/// A loaded engine. Share it; make one context per thread.
pub struct TrtEngine {
    // Dropped in this order: engine, then runtime.
    engine: Object,
    _runtime: Object,
    library: Arc<Library>,
    device: Arc<dyn Device>,
    io: Vec<Io>,
    activation_bytes: u64,
    layers: u32,
    path: PathBuf,
}

// SAFETY: methods of ICudaEngine used through `&self` are the const getters and `createExecutionContext`, which
// TensorRT documents as safe to call from several threads.
unsafe impl Sync for TrtEngine {}

impl TrtEngine {
    /// Maps `path` and deserialises it. `host_code`: the engine was built version-compatible and brings code of its
    /// own for the host, which TensorRT runs only where it is allowed to. Allow it for engines whose passport was
    /// checked.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn load(
        library: &Arc<Library>,
        device: &Arc<dyn Device>,
        path: &Path,
        host_code: bool,
    ) -> Result<Arc<TrtEngine>, RunError> {
        type Allow = unsafe extern "C" fn(NonNull<c_void>, bool);
        type Deserialize = unsafe extern "C" fn(NonNull<c_void>, *const u8, usize) -> *mut c_void;
        let shown = path.display().to_string();
        let io = |source| RunError::Io { path: shown.clone(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        // SAFETY: the file is mapped privately and read only while it is deserialised; engines are replaced by
        // renaming, never written in place.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        if !super::is_engine(&bytes) {
            return Err(RunError::NotAnEngine { path: shown, got: bytes[..bytes.len().min(4)].to_vec() });
        }
        drop(library.take_errors());
        let slots = library.abi().slots();
        let runtime = library.create_runtime()?;
        let this = runtime.implementation();
        if host_code {
            // SAFETY: `void setEngineHostCodeAllowed(bool)`.
            unsafe { method::<Allow>(this, slots.runtime_set_host_code_allowed)(this, true) };
        }
        // SAFETY: `ICudaEngine* deserializeCudaEngine(void const*, size_t)`; the bytes are copied; the result is ours.
        let engine = unsafe {
            Object::own(method::<Deserialize>(this, slots.runtime_deserialize)(
                this,
                bytes.as_ptr(),
                bytes.len(),
            ))
        };
        let engine = engine.ok_or_else(|| RunError::Load { path: shown, log: library.errors_text() })?;
        let io = describe(slots, &engine)?;
        let this = engine.implementation();
        type Size = unsafe extern "C" fn(NonNull<c_void>) -> i64;
        type Count = unsafe extern "C" fn(NonNull<c_void>) -> i32;
        // SAFETY: `size_t getDeviceMemorySize()` or `int64_t getDeviceMemorySizeV2()`; `int32_t getNbLayers()`.
        let (size, layers) = unsafe {
            (
                method::<Size>(this, slots.engine_get_device_memory_size)(this),
                method::<Count>(this, slots.engine_get_nb_layers)(this),
            )
        };
        Ok(Arc::new(TrtEngine {
            engine,
            _runtime: runtime,
            library: Arc::clone(library),
            device: Arc::clone(device),
            io,
            activation_bytes: u64::try_from(size).unwrap_or(0),
            layers: u32::try_from(layers).unwrap_or(0),
            path: path.to_owned(),
        }))
    }

    /// Inputs and outputs.
    #[must_use]
    pub fn io(&self) -> &[Io] {
        &self.io
    }

    /// Bytes of activations and scratch that one context needs.
    #[must_use]
    pub fn activation_bytes(&self) -> u64 {
        self.activation_bytes
    }

    /// Number of layers after fusion.
    #[must_use]
    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// TensorRT's own description of the layers, JSON. None where it gives none.
    #[must_use]
    pub fn inspect(&self) -> Option<String> {
        type Create = unsafe extern "C" fn(NonNull<c_void>) -> *mut c_void;
        type Information = unsafe extern "C" fn(NonNull<c_void>, i32) -> *const c_char;
        let slots = self.library.abi().slots();
        let this = self.engine.implementation();
        // SAFETY: `IEngineInspector* createEngineInspector()` is ours; `char const* getEngineInformation(kJSON = 1)`
        // lives until the next call, and is copied.
        unsafe {
            let inspector = Object::own(method::<Create>(this, slots.engine_create_inspector)(this))?;
            let this = inspector.implementation();
            let text = ffi::text(method::<Information>(this, slots.inspector_engine_information)(this, 1));
            (!text.is_empty()).then_some(text)
        }
    }

    /// A context: room for activations, inputs and outputs of the largest shapes, of its own or shared.
    ///
    /// # Errors
    /// More memory than the limit or than the device has, or TensorRT refuses.
    pub fn context(self: &Arc<Self>, options: &RunOptions) -> Result<TrtContext, RunError> {
        TrtContext::new(self, options)
    }
}

fn describe(slots: &Slots, engine: &Object) -> Result<Vec<Io>, RunError> {
    type Count = unsafe extern "C" fn(NonNull<c_void>) -> i32;
    type NameAt = unsafe extern "C" fn(NonNull<c_void>, i32) -> *const c_char;
    type Number = unsafe extern "C" fn(NonNull<c_void>, *const c_char) -> i32;
    type Shape = unsafe extern "C" fn(NonNull<c_void>, *const c_char) -> Dims;
    type ProfileShape = unsafe extern "C" fn(NonNull<c_void>, *const c_char, i32, i32) -> Dims;
    let this = engine.implementation();
    let mut found = Vec::new();
    // SAFETY: getters of ICudaEngine over names that it gave; names live as long as the engine.
    unsafe {
        for i in 0..method::<Count>(this, slots.engine_get_nb_io_tensors)(this).clamp(0, 4096) {
            let c_name = method::<NameAt>(this, slots.engine_get_io_tensor_name)(this, i);
            let name = ffi::text(c_name);
            let number = method::<Number>(this, slots.engine_get_tensor_dtype)(this, c_name);
            let dtype = DType::of(number).ok_or_else(|| RunError::Input {
                input: name.clone(),
                reason: format!("element type number {number} is not supported at the edge of an engine"),
            })?;
            let input = method::<Number>(this, slots.engine_get_tensor_io_mode)(this, c_name) == 1;
            let shape = method::<Shape>(this, slots.engine_get_tensor_shape)(this, c_name)
                .shape()
                .unwrap_or_default();
            let profile = |select| {
                method::<ProfileShape>(this, slots.engine_get_profile_shape)(this, c_name, 0, select).shape()
            };
            let limits = match (input, shape.contains(&-1)) {
                (true, true) => profile(0).zip(profile(2)),
                (true, false) => Some((shape.clone(), shape.clone())),
                (false, _) => None,
            };
            found.push(Io { name, input, dtype, shape, limits });
        }
    }
    Ok(found)
}

/// One tensor's place in the arena and in the staging buffer; state has none, it lies outside.
struct Place {
    c_name: CString,
    offset: usize,
    capacity: usize,
    state: bool,
    shape: Vec<i64>,
    /// Address that TensorRT was given last.
    bound: u64,
}

/// A way to run an engine: own shapes and CUDA graphs, own or shared memory. One thread at a time.
pub struct TrtContext {
    // Dropped in this order: graphs (in Drop), context, kernels, memory.
    context: Object,
    kernels: Option<Kernels>,
    engine: Arc<TrtEngine>,
    /// Its own arena, or that of the thread which ran it last.
    lane: Option<Lane>,
    arenas: Option<Arc<Arenas>>,
    /// Bytes of places in the arena; scratch memory begins there.
    places_end: usize,
    activations: usize,
    /// Scratch memory that TensorRT was given last.
    bound_scratch: u64,
    places: Vec<Place>,
    graphs: Graphs,
    timed: bool,
    times: Option<RunTimes>,
}

/// Recorded work, for the present shapes, by the addresses that it reads and writes.
struct Graphs {
    wanted: bool,
    known: Vec<(Vec<u64>, Recorded)>,
}

/// Contexts alternate between two sets of caches, or of keys and values: with two to spare.
const GRAPHS_KEPT: usize = 4;

enum Recorded {
    /// Ran once without a graph.
    Warm,
    Ready(u64),
}

const ALIGN: usize = 256;

fn aligned(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(ALIGN)
}

fn byte_count(shape: &[i64], dtype: DType) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(usize::try_from(d).ok()?))
}

/// What is copied and kept around one run.
struct Edges<'a> {
    /// Bytes of inputs that have a place in the arena.
    inputs: Vec<(usize, &'a [u8])>,
    /// Bytes of state that the host gives.
    host_state: Vec<(u64, &'a [u8])>,
    /// Memory of state that nobody keeps.
    passing: Vec<(usize, Memory)>,
}

impl TrtContext {
    fn new(engine: &Arc<TrtEngine>, options: &RunOptions) -> Result<TrtContext, RunError> {
        let library = &engine.library;
        let (context, kernels) = create_context(engine, options.runtime_cache)?;
        let mut places = Vec::new();
        for io in &engine.io {
            let c_name = CString::new(io.name.as_bytes())
                .map_err(|_| RunError::Input { input: io.name.clone(), reason: "NUL in the name".into() })?;
            let state = is_state(&io.name);
            places.push(Place { c_name, offset: 0, capacity: 0, state, shape: Vec::new(), bound: 0 });
        }
        let places_end = lay_out(library, &context, &engine.io, &mut places)?;
        let overflow =
            || RunError::Input { input: "activations".into(), reason: "its size overflows".into() };
        let activations = usize::try_from(engine.activation_bytes).map_err(|_| overflow())?;
        let needed = places_end.checked_add(activations).ok_or_else(overflow)?;
        if let Some(limit) = options.memory_limit.filter(|&l| needed as u64 > l) {
            return Err(RunError::Memory {
                needed: needed as u64,
                activations: activations as u64,
                io: places_end as u64,
                limit,
            });
        }
        let lane = match &options.arenas {
            Some(arenas) => {
                arenas.check(needed)?;
                None
            }
            None => {
                let mut arena = Arena::EMPTY;
                arena.reserve(&engine.device, needed, places_end)?;
                Some(Arc::new(Mutex::new(arena)))
            }
        };
        Ok(TrtContext {
            context,
            kernels,
            engine: Arc::clone(engine),
            lane,
            arenas: options.arenas.clone(),
            places_end,
            activations,
            bound_scratch: 0,
            places,
            graphs: Graphs { wanted: options.cuda_graphs, known: Vec::new() },
            timed: options.timed,
            times: None,
        })
    }

    /// Device memory that this context needs, bytes; where it is shared, others use it, too.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.places_end + self.activations
    }

    /// True when the present shapes run as a recorded CUDA graph.
    #[must_use]
    pub fn uses_graph(&self) -> bool {
        self.graphs.known.iter().any(|(_, r)| matches!(r, Recorded::Ready(_)))
    }

    /// How long the steps of the last run took, where runs are timed ([`RunOptions::timed`]).
    #[must_use]
    pub fn times(&self) -> Option<RunTimes> {
        self.times
    }

    /// Runs once. `inputs`: name, shape and little-endian bytes of every input, in any order. `output` is called for
    /// each output with its name, shape and bytes.
    ///
    /// # Errors
    /// A missing, unknown or wrongly shaped input, or TensorRT or CUDA fails.
    pub fn run(&mut self, inputs: &[InputBytes<'_>], output: &mut OutputSink<'_>) -> Result<(), RunError> {
        self.run_with_state(inputs, None, None, &|_| true, output)
    }

    /// As [`TrtContext::run`], with state on the device: inputs that are state come from `from` where it has them, and
    /// outputs that are state go to `to`. Without `to` they come to `output` where they are `wanted`, else nowhere.
    ///
    /// # Errors
    /// As [`TrtContext::run`].
    pub fn run_with_state(
        &mut self,
        inputs: &[InputBytes<'_>],
        from: Option<&DeviceState>,
        to: Option<&mut DeviceState>,
        wanted: &dyn Fn(&str) -> bool,
        output: &mut OutputSink<'_>,
    ) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        if let Some((name, _, _)) =
            inputs.iter().find(|(name, _, _)| !engine.io.iter().any(|io| io.input && io.name == *name))
        {
            let reason = "the engine has no such input".into();
            return Err(RunError::Input { input: (*name).to_owned(), reason });
        }
        let lane = match &self.arenas {
            Some(arenas) => arenas.of_this_thread(),
            None => self.lane.clone().unwrap_or_else(|| Arc::new(Mutex::new(Arena::EMPTY))),
        };
        self.lane = Some(Arc::clone(&lane));
        let mut arena = lock(&lane);
        let (bytes, staged) = (self.device_bytes(), self.places_end);
        arena.reserve(&engine.device, bytes, staged)?;
        let Arena { memory: Some(memory), staging: Some(staging) } = &mut *arena else {
            return Err(RunError::Run { what: "reserve memory".into(), log: String::new() });
        };
        let base = memory.address();
        let mut edges = Edges { inputs: Vec::new(), host_state: Vec::new(), passing: Vec::new() };
        let mut addresses = vec![0; self.places.len()];
        self.take_inputs(inputs, from, base, &mut addresses, &mut edges)?;
        let kept = to.is_some();
        self.place_outputs(to, base, &mut addresses, &mut edges)?;
        self.bind(&addresses, base + self.places_end as u64)?;
        for &(offset, bytes) in &edges.inputs {
            staging.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        self.queue(base, staging, &edges)?;
        engine.device.synchronize()?;
        if let Some(kernels) = &mut self.kernels {
            kernels.keep(&engine);
        }
        for (i, (io, place)) in
            engine.io.iter().zip(&self.places).enumerate().filter(|(_, (io, _))| !io.input)
        {
            let bytes = byte_count(&place.shape, io.dtype).unwrap_or(0);
            if !place.state {
                output(io, &place.shape, &staging.bytes()[place.offset..place.offset + bytes]);
            } else if !kept && wanted(&io.name) {
                let mut copy = vec![0u8; bytes];
                // SAFETY: both ranges are `bytes` long; `synchronize` follows before `copy` is read or freed.
                unsafe { engine.device.copy_out(copy.as_mut_ptr(), addresses[i], bytes)? };
                engine.device.synchronize()?;
                output(io, &place.shape, &copy);
            }
        }
        Ok(())
    }

    /// Checks inputs, sets their shapes, and finds their addresses.
    fn take_inputs<'a>(
        &mut self,
        inputs: &[InputBytes<'a>],
        from: Option<&DeviceState>,
        base: u64,
        addresses: &mut [u64],
        edges: &mut Edges<'a>,
    ) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let mut changed = false;
        for (i, (io, place)) in
            engine.io.iter().zip(&mut self.places).enumerate().filter(|(_, (io, _))| io.input)
        {
            let bad = |reason: String| RunError::Input { input: io.name.clone(), reason };
            let kept = from.filter(|_| place.state).and_then(|s| s.tensors.get(&io.name));
            let given = inputs.iter().find(|(name, _, _)| *name == io.name);
            let shape = match (kept, given) {
                (Some(tensor), _) if tensor.dtype != io.dtype => {
                    return Err(bad(format!("state of {:?} given for {:?}", tensor.dtype, io.dtype)));
                }
                (Some(tensor), _) => tensor.shape.as_slice(),
                (None, Some((_, shape, _))) => shape,
                (None, None) => return Err(bad("not given".into())),
            };
            let fits = io.limits.as_ref().is_some_and(|(min, max)| {
                shape.len() == min.len()
                    && shape.iter().zip(min).zip(max).all(|((&d, &lo), &hi)| lo <= d && d <= hi)
            });
            if !fits {
                return Err(bad(format!("shape {shape:?} is outside {:?}", io.limits)));
            }
            if place.shape != *shape {
                set_input_shape(&engine.library, &self.context, &place.c_name, shape)?;
                place.shape = shape.to_vec();
                changed = true;
            }
            if let Some(tensor) = kept {
                addresses[i] = tensor.memory.address();
                continue;
            }
            let bytes = given.map_or(&[][..], |(_, _, bytes)| bytes);
            if byte_count(shape, io.dtype) != Some(bytes.len()) {
                return Err(bad(format!(
                    "{} bytes given for shape {shape:?} of {:?}",
                    bytes.len(),
                    io.dtype
                )));
            }
            if place.state {
                let memory = Memory::new(&engine.device, bytes.len(), &io.name)?;
                addresses[i] = memory.address();
                edges.host_state.push((memory.address(), bytes));
                edges.passing.push((i, memory));
            } else {
                addresses[i] = base + place.offset as u64;
                edges.inputs.push((place.offset, bytes));
            }
        }
        if changed {
            // TensorRT's own state follows the shapes: what was recorded before is void.
            self.forget_graphs();
            if let Some(kernels) = &mut self.kernels {
                kernels.changed = true;
            }
        }
        Ok(())
    }

    /// Asks for the outputs' shapes and finds their addresses.
    fn place_outputs(
        &mut self,
        mut to: Option<&mut DeviceState>,
        base: u64,
        addresses: &mut [u64],
        edges: &mut Edges<'_>,
    ) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let slots = engine.library.abi().slots();
        for (i, (io, place)) in
            engine.io.iter().zip(&mut self.places).enumerate().filter(|(_, (io, _))| !io.input)
        {
            place.shape = tensor_shape(slots, &self.context, &place.c_name);
            let bytes = byte_count(&place.shape, io.dtype).filter(|&b| b <= place.capacity);
            let Some(bytes) = bytes else {
                return Err(RunError::Run {
                    what: format!("give {:?} the shape {:?}", io.name, place.shape),
                    log: engine.library.errors_text(),
                });
            };
            addresses[i] = match to.as_deref_mut().filter(|_| place.state) {
                Some(to) => {
                    to.place(&engine.device, &state_input(&io.name), io.dtype, &place.shape, bytes)?
                }
                None if place.state => {
                    let memory = Memory::new(&engine.device, bytes, &io.name)?;
                    let address = memory.address();
                    edges.passing.push((i, memory));
                    address
                }
                None => base + place.offset as u64,
            };
        }
        Ok(())
    }

    /// Tells TensorRT of addresses that changed.
    fn bind(&mut self, addresses: &[u64], scratch: u64) -> Result<(), RunError> {
        type SetMemory = unsafe extern "C" fn(NonNull<c_void>, u64);
        type SetMemorySized = unsafe extern "C" fn(NonNull<c_void>, u64, i64);
        type SetAddress = unsafe extern "C" fn(NonNull<c_void>, *const c_char, u64) -> bool;
        let library = &self.engine.library;
        let slots = library.abi().slots();
        let this = self.context.implementation();
        // SAFETY: `setDeviceMemory(void*)` or `setDeviceMemoryV2(void*, int64_t)`: the arena is locked for this run and
        // has the engine's size behind `scratch`, 256-byte aligned. `setTensorAddress(char const*, void*)`: each tensor
        // has its own range, which lives until the run is over.
        unsafe {
            if scratch != self.bound_scratch {
                if library.abi().device_memory_has_size() {
                    let size = i64::try_from(self.activations).unwrap_or(i64::MAX);
                    method::<SetMemorySized>(this, slots.context_set_device_memory)(this, scratch, size);
                } else {
                    method::<SetMemory>(this, slots.context_set_device_memory)(this, scratch);
                }
                self.bound_scratch = scratch;
            }
            for (place, &address) in self.places.iter_mut().zip(addresses).filter(|(p, a)| p.bound != **a) {
                if !method::<SetAddress>(this, slots.context_set_tensor_address)(
                    this,
                    place.c_name.as_ptr(),
                    address,
                ) {
                    let what = format!("set the address of {:?}", place.c_name);
                    return Err(RunError::Run { what, log: library.errors_text() });
                }
                place.bound = address;
            }
        }
        Ok(())
    }

    /// Queues copies in, the work, and copies out.
    fn queue(&mut self, base: u64, staging: &mut Pinned, edges: &Edges<'_>) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let started = Instant::now();
        // The time since the start, when all that was queued is done; zero where runs are not timed.
        let timed = self.timed;
        let waited = || -> Result<_, CudaError> {
            if timed {
                engine.device.synchronize()?;
            }
            Ok(started.elapsed())
        };
        self.copy(true, base, staging)?;
        for &(to, bytes) in &edges.host_state {
            // SAFETY: `to` has room for them, and the caller's bytes live until `synchronize`.
            unsafe { engine.device.copy_in(to, bytes.as_ptr(), bytes.len())? };
        }
        let copied_in = waited()?;
        // Passing memory is another one each time: nothing is gained by recording it.
        if self.graphs.wanted && edges.passing.is_empty() {
            self.run_recorded()?;
        } else {
            self.enqueue_or_fail()?;
        }
        let computed = waited()?;
        self.copy(false, base, staging)?;
        let done = waited()?;
        self.times = timed.then(|| RunTimes {
            copy_in: copied_in,
            compute: computed.saturating_sub(copied_in),
            copy_out: done.saturating_sub(computed),
        });
        Ok(())
    }

    /// Runs by the graph of the present addresses; records it the second time they are seen, since TensorRT wants one
    /// ordinary run of a shape before a capture.
    fn run_recorded(&mut self) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let key: Vec<u64> = self.places.iter().map(|p| p.bound).chain([self.bound_scratch]).collect();
        let at = self.graphs.known.iter().position(|(k, _)| *k == key);
        match at.map(|at| &self.graphs.known[at].1) {
            Some(&Recorded::Ready(graph)) => engine.device.launch(graph)?,
            Some(Recorded::Warm) => match engine.device.capture(&mut || self.enqueue()) {
                Ok(Some(graph)) => {
                    if let Some(at) = at {
                        self.graphs.known[at].1 = Recorded::Ready(graph);
                    }
                    engine.device.launch(graph)?;
                }
                Ok(None) => {
                    self.graphs.wanted = false;
                    self.enqueue_or_fail()?;
                }
                Err(reason) => {
                    tracing::warn!("no CUDA graph for this engine, running without: {reason}");
                    self.graphs.wanted = false;
                    self.enqueue_or_fail()?;
                }
            },
            None => {
                self.enqueue_or_fail()?;
                if self.graphs.known.len() == GRAPHS_KEPT {
                    let (_, oldest) = self.graphs.known.remove(0);
                    self.drop_graph(&oldest);
                }
                self.graphs.known.push((key, Recorded::Warm));
            }
        }
        Ok(())
    }

    fn copy(&mut self, inwards: bool, base: u64, staging: &mut Pinned) -> Result<(), RunError> {
        let device = &self.engine.device;
        let staged = staging.bytes_mut().as_mut_ptr();
        let with_place = |(io, place): &(&Io, &Place)| io.input == inwards && !place.state;
        for (io, place) in self.engine.io.iter().zip(&self.places).filter(with_place) {
            let bytes = byte_count(&place.shape, io.dtype).unwrap_or(0).min(place.capacity);
            let at = base + place.offset as u64;
            // SAFETY: both buffers have `capacity` bytes at `offset`; the staging buffer is left alone until
            // `synchronize`.
            unsafe {
                if inwards {
                    device.copy_in(at, staged.add(place.offset), bytes)?;
                } else {
                    device.copy_out(staged.add(place.offset), at, bytes)?;
                }
            }
        }
        Ok(())
    }

    fn enqueue(&self) -> bool {
        type Enqueue = unsafe extern "C" fn(NonNull<c_void>, *mut c_void) -> bool;
        let this = self.context.implementation();
        let slot = self.engine.library.abi().slots().context_enqueue_v3;
        // SAFETY: `bool enqueueV3(cudaStream_t)`: shapes, addresses and scratch memory are set.
        unsafe { method::<Enqueue>(this, slot)(this, self.engine.device.stream()) }
    }

    fn enqueue_or_fail(&self) -> Result<(), RunError> {
        if self.enqueue() {
            return Ok(());
        }
        Err(RunError::Run { what: "queue the engine's work".into(), log: self.engine.library.errors_text() })
    }

    fn drop_graph(&self, recorded: &Recorded) {
        if let Recorded::Ready(graph) = recorded {
            self.engine.device.drop_graph(*graph);
        }
    }

    fn forget_graphs(&mut self) {
        for (_, recorded) in std::mem::take(&mut self.graphs.known) {
            self.drop_graph(&recorded);
        }
    }
}

/// Kernels that TensorRT-RTX compiled for the shapes that it saw, and the file that they are kept in.
struct Kernels {
    cache: Object,
    config: Object,
    slots: RuntimeCacheSlots,
    path: PathBuf,
    /// Bytes of what is in the file.
    kept: usize,
    /// New shapes were seen since.
    changed: bool,
}

impl Kernels {
    /// Configuration with a cache that holds what the file of an engine has; none where the library keeps none.
    fn new(engine: &TrtEngine) -> Option<Kernels> {
        type Create = unsafe extern "C" fn(NonNull<c_void>) -> *mut c_void;
        type SetStrategy = unsafe extern "C" fn(NonNull<c_void>, i32);
        type SetCache = unsafe extern "C" fn(NonNull<c_void>, NonNull<c_void>) -> bool;
        type Deserialize = unsafe extern "C" fn(NonNull<c_void>, *const u8, usize) -> bool;
        let slots = engine.library.abi().slots().runtime_cache?;
        let this = engine.engine.implementation();
        // SAFETY: `IRuntimeConfig* createRuntimeConfig()` and `IRuntimeCache* createRuntimeCache()` are ours;
        // `setExecutionContextAllocationStrategy(kUSER_MANAGED = 2)`; `bool setRuntimeCache(IRuntimeCache const&)`: the
        // cache lives as long as the configuration.
        let (config, cache) = unsafe {
            let config = Object::own(method::<Create>(this, slots.engine_create_runtime_config)(this))?;
            let this = config.implementation();
            method::<SetStrategy>(this, slots.config_set_allocation_strategy)(this, USER_MANAGED);
            let cache = Object::own(method::<Create>(this, slots.config_create_cache)(this))?;
            method::<SetCache>(this, slots.config_set_cache)(this, cache.pointer())
                .then_some((config, cache))?
        };
        let path = runtime_cache_path(&engine.path);
        let known = match std::fs::metadata(&path) {
            Ok(m) if m.len() <= MAX_KERNEL_BYTES => std::fs::read(&path).unwrap_or_default(),
            _ => Vec::new(),
        };
        let this = cache.implementation();
        // SAFETY: `bool deserialize(void const*, size_t)` copies what it takes, and refuses what is not for this machine.
        let taken = !known.is_empty()
            && unsafe {
                method::<Deserialize>(this, slots.cache_deserialize)(this, known.as_ptr(), known.len())
            };
        if !known.is_empty() && !taken {
            tracing::info!("{}: of another version, device or driver; made again", path.display());
        }
        let kept = if taken { known.len() } else { 0 };
        Some(Kernels { cache, config, slots, path, kept, changed: true })
    }

    /// Writes what was compiled since, at best effort: without it the next start compiles again.
    fn keep(&mut self, engine: &TrtEngine) {
        type Serialize = unsafe extern "C" fn(NonNull<c_void>) -> *mut c_void;
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let this = self.cache.implementation();
        // SAFETY: `IHostMemory* serialize()`; the result is ours.
        let blob = unsafe { Object::own(method::<Serialize>(this, self.slots.cache_serialize)(this)) };
        let slots = engine.library.abi().slots();
        let Some(bytes) = blob.as_ref().and_then(|b| super::build::host_memory(slots, b)) else { return };
        // Kernels are only ever added.
        if bytes.len() == self.kept {
            return;
        }
        match mindseye_base::file::replace(&self.path, bytes) {
            Ok(()) => self.kept = bytes.len(),
            Err(e) => tracing::warn!("{}: compiled kernels are not kept: {e}", self.path.display()),
        }
    }
}

/// Files of kernels larger than this are not read.
const MAX_KERNEL_BYTES: u64 = 1 << 30;
/// `ExecutionContextAllocationStrategy::kUSER_MANAGED`.
const USER_MANAGED: i32 = 2;

/// A context, with a cache of kernels where one is wanted and the library keeps one.
fn create_context(engine: &TrtEngine, cache: bool) -> Result<(Object, Option<Kernels>), RunError> {
    type Create = unsafe extern "C" fn(NonNull<c_void>, i32) -> *mut c_void;
    type CreateWith = unsafe extern "C" fn(NonNull<c_void>, NonNull<c_void>) -> *mut c_void;
    let this = engine.engine.implementation();
    let kernels = if cache { Kernels::new(engine) } else { None };
    // SAFETY: `IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy)`, or with an
    // `IRuntimeConfig*` that lives as long as the context; the result is ours.
    let context = unsafe {
        Object::own(match &kernels {
            Some(k) => method::<CreateWith>(this, k.slots.engine_create_context)(this, k.config.pointer()),
            None => {
                method::<Create>(this, engine.library.abi().slots().engine_create_context)(this, USER_MANAGED)
            }
        })
    };
    let context = context.ok_or_else(|| RunError::Run {
        what: "create an execution context".into(),
        log: engine.library.errors_text(),
    })?;
    Ok((context, kernels))
}

/// Offsets of inputs and outputs at their largest shapes: inputs by profile, outputs as the context infers them. State
/// gets no place. The bytes of all places.
fn lay_out(library: &Library, context: &Object, io: &[Io], places: &mut [Place]) -> Result<usize, RunError> {
    for (io, place) in io.iter().zip(places.iter_mut()) {
        if let Some((_, max)) = &io.limits {
            set_input_shape(library, context, &place.c_name, max)?;
            place.shape.clone_from(max);
        }
    }
    let mut end = 0usize;
    for (io, place) in io.iter().zip(places) {
        if !io.input {
            place.shape = tensor_shape(library.abi().slots(), context, &place.c_name);
        }
        place.capacity = byte_count(&place.shape, io.dtype).ok_or_else(|| RunError::Input {
            input: io.name.clone(),
            reason: format!("its largest shape {:?} is not known before a run", place.shape),
        })?;
        if place.state {
            continue;
        }
        place.offset = end;
        end = aligned(place.capacity)
            .and_then(|b| end.checked_add(b))
            .ok_or_else(|| RunError::Input { input: io.name.clone(), reason: "its size overflows".into() })?;
    }
    Ok(end)
}

impl Drop for TrtContext {
    fn drop(&mut self) {
        if let Err(e) = self.engine.device.synchronize() {
            tracing::warn!("a run did not finish: {e}");
        }
        self.forget_graphs();
    }
}

fn set_input_shape(
    library: &Library,
    context: &Object,
    name: &CString,
    shape: &[i64],
) -> Result<(), RunError> {
    type Set = unsafe extern "C" fn(NonNull<c_void>, *const c_char, *const Dims) -> bool;
    let slot = library.abi().slots().context_set_input_shape;
    let this = context.implementation();
    let bad = |reason: String| RunError::Input { input: name.to_string_lossy().into_owned(), reason };
    let dims = Dims::new(shape).ok_or_else(|| bad("more than 8 axes".into()))?;
    // SAFETY: `bool setInputShape(char const*, Dims const&)`.
    if unsafe { method::<Set>(this, slot)(this, name.as_ptr(), &raw const dims) } {
        return Ok(());
    }
    Err(bad(format!("shape {shape:?} was refused{}", library.errors_text())))
}

fn tensor_shape(slots: &Slots, context: &Object, name: &CString) -> Vec<i64> {
    type Get = unsafe extern "C" fn(NonNull<c_void>, *const c_char) -> Dims;
    let this = context.implementation();
    // SAFETY: `Dims getTensorShape(char const*)`.
    unsafe { method::<Get>(this, slots.context_get_tensor_shape)(this, name.as_ptr()) }
        .shape()
        .unwrap_or_default()
}
