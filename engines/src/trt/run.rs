//! A serialized engine on a device: deserialised from a mapped file, run on one stream.
#![allow(unsafe_code)] // FFI fence: virtual calls into TensorRT, one mapped file.

use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi::Slots;
use super::ffi::{self, Dims, Object, method};
use super::library::{Library, LibraryError};
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
pub type Given<'a> = (&'a str, &'a [i64], &'a [u8]);

/// Told of each output of a run: which, its shape, its bytes.
pub type Take<'a> = dyn FnMut(&Io, &[i64], &[u8]) + 'a;

/// How to run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Most device memory that one context may take, bytes: activations and I/O together.
    pub memory_limit: Option<u64>,
    /// Record the work as a CUDA graph after the first run of a shape, and fall back where that fails.
    pub cuda_graphs: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions { memory_limit: None, cuda_graphs: true }
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
}

// SAFETY: methods of ICudaEngine used through `&self` are the const getters and `createExecutionContext`, which
// TensorRT documents as safe to call from several threads.
unsafe impl Sync for TrtEngine {}

impl TrtEngine {
    /// Maps `path` and deserialises it.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn load(
        library: &Arc<Library>,
        device: &Arc<dyn Device>,
        path: &Path,
    ) -> Result<Arc<TrtEngine>, RunError> {
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

    /// A context: one arena for activations, inputs and outputs, sized for the largest shapes.
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

/// One tensor's place in the arena and in the staging buffer.
struct Place {
    c_name: CString,
    offset: usize,
    capacity: usize,
    shape: Vec<i64>,
}

/// A way to run an engine: own shapes, memory and, after the first run, own CUDA graph. One thread at a time.
pub struct TrtContext {
    // Dropped in this order: graph (in Drop), context, memory.
    context: Object,
    engine: Arc<TrtEngine>,
    arena: Memory,
    staging: Pinned,
    places: Vec<Place>,
    graph: GraphState,
}

enum GraphState {
    /// Not wanted, or failed before.
    Off,
    /// The shapes ran this many times without a graph.
    Warming(u32),
    /// Recorded for the present shapes.
    Ready(u64),
}

const ALIGN: usize = 256;

fn aligned(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(ALIGN)
}

fn byte_count(shape: &[i64], dtype: DType) -> Option<usize> {
    shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(usize::try_from(d).ok()?))
}

impl TrtContext {
    fn new(engine: &Arc<TrtEngine>, options: &RunOptions) -> Result<TrtContext, RunError> {
        type Create = unsafe extern "C" fn(NonNull<c_void>, i32) -> *mut c_void;
        let library = &engine.library;
        let slots = library.abi().slots();
        let this = engine.engine.implementation();
        const USER_MANAGED: i32 = 2;
        // SAFETY: `IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy)`; the result is ours.
        let context =
            unsafe { Object::own(method::<Create>(this, slots.engine_create_context)(this, USER_MANAGED)) };
        let context = context.ok_or_else(|| RunError::Run {
            what: "create an execution context".into(),
            log: library.errors_text(),
        })?;
        let mut places = Vec::new();
        for io in &engine.io {
            let c_name = CString::new(io.name.as_bytes())
                .map_err(|_| RunError::Input { input: io.name.clone(), reason: "NUL in the name".into() })?;
            places.push(Place { c_name, offset: 0, capacity: 0, shape: Vec::new() });
        }
        // Largest shapes: inputs by profile, outputs as the context infers them.
        for (io, place) in engine.io.iter().zip(&mut places) {
            if let Some((_, max)) = &io.limits {
                set_input_shape(library, &context, &place.c_name, max)?;
                place.shape.clone_from(max);
            }
        }
        let mut end = 0usize;
        let too_large =
            |name: &str| RunError::Input { input: name.to_owned(), reason: "its size overflows".into() };
        for (io, place) in engine.io.iter().zip(&mut places) {
            if !io.input {
                place.shape = tensor_shape(slots, &context, &place.c_name);
            }
            place.capacity = byte_count(&place.shape, io.dtype).ok_or_else(|| RunError::Input {
                input: io.name.clone(),
                reason: format!("its largest shape {:?} is not known before a run", place.shape),
            })?;
            place.offset = end;
            end = aligned(place.capacity)
                .and_then(|b| end.checked_add(b))
                .ok_or_else(|| too_large(&io.name))?;
        }
        let activations = usize::try_from(engine.activation_bytes).map_err(|_| too_large("activations"))?;
        let needed = end.checked_add(activations).ok_or_else(|| too_large("activations"))?;
        if let Some(limit) = options.memory_limit.filter(|&l| needed as u64 > l) {
            return Err(RunError::Memory {
                needed: needed as u64,
                activations: activations as u64,
                io: end as u64,
                limit,
            });
        }
        let arena = Memory::new(&engine.device, needed, "an engine's activations, inputs and outputs")?;
        let staging = Pinned::new(&engine.device, end)?;
        type SetMemory = unsafe extern "C" fn(NonNull<c_void>, u64);
        type SetMemorySized = unsafe extern "C" fn(NonNull<c_void>, u64, i64);
        type SetAddress = unsafe extern "C" fn(NonNull<c_void>, *const c_char, u64) -> bool;
        let this = context.implementation();
        let scratch = arena.address() + end as u64;
        // SAFETY: `setDeviceMemory(void*)` or `setDeviceMemoryV2(void*, int64_t)`: the arena outlives the context and
        // has the engine's size behind `scratch`, 256-byte aligned. `setTensorAddress(char const*, void*)`: each
        // tensor has its own range of the arena.
        unsafe {
            if library.abi().device_memory_has_size() {
                let size = i64::try_from(activations).unwrap_or(i64::MAX);
                method::<SetMemorySized>(this, slots.context_set_device_memory)(this, scratch, size);
            } else {
                method::<SetMemory>(this, slots.context_set_device_memory)(this, scratch);
            }
            for place in &places {
                let address = arena.address() + place.offset as u64;
                if !method::<SetAddress>(this, slots.context_set_tensor_address)(
                    this,
                    place.c_name.as_ptr(),
                    address,
                ) {
                    let what = format!("set the address of {:?}", place.c_name);
                    return Err(RunError::Run { what, log: library.errors_text() });
                }
            }
        }
        let graph = if options.cuda_graphs { GraphState::Warming(0) } else { GraphState::Off };
        Ok(TrtContext { context, engine: Arc::clone(engine), arena, staging, places, graph })
    }

    /// Device memory that this context holds, bytes.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// True when the present shapes run as a recorded CUDA graph.
    #[must_use]
    pub fn uses_graph(&self) -> bool {
        matches!(self.graph, GraphState::Ready(_))
    }

    /// Runs once. `inputs`: name, shape and little-endian bytes of every input, in any order. `output` is called for
    /// each output with its name, shape and bytes.
    ///
    /// # Errors
    /// A missing, unknown or wrongly shaped input, or TensorRT or CUDA fails.
    pub fn run(&mut self, inputs: &[Given<'_>], output: &mut Take<'_>) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let library = &engine.library;
        let slots = library.abi().slots();
        let mut changed = false;
        for (name, _, _) in inputs {
            if !engine.io.iter().any(|io| io.input && io.name == *name) {
                return Err(RunError::Input {
                    input: (*name).to_owned(),
                    reason: "the engine has no such input".into(),
                });
            }
        }
        for (io, place) in engine.io.iter().zip(&mut self.places).filter(|(io, _)| io.input) {
            let bad = |reason: String| RunError::Input { input: io.name.clone(), reason };
            let (_, shape, bytes) =
                inputs.iter().find(|(name, _, _)| *name == io.name).ok_or_else(|| bad("not given".into()))?;
            let fits = io.limits.as_ref().is_some_and(|(min, max)| {
                shape.len() == min.len()
                    && shape.iter().zip(min).zip(max).all(|((&d, &lo), &hi)| lo <= d && d <= hi)
            });
            if !fits {
                return Err(bad(format!("shape {shape:?} is outside {:?}", io.limits)));
            }
            if byte_count(shape, io.dtype) != Some(bytes.len()) {
                return Err(bad(format!(
                    "{} bytes given for shape {shape:?} of {:?}",
                    bytes.len(),
                    io.dtype
                )));
            }
            if place.shape != *shape {
                set_input_shape(library, &self.context, &place.c_name, shape)?;
                place.shape = shape.to_vec();
                changed = true;
            }
            self.staging.bytes_mut()[place.offset..place.offset + bytes.len()].copy_from_slice(bytes);
        }
        if changed {
            self.forget_graph();
        }
        for (io, place) in engine.io.iter().zip(&mut self.places).filter(|(io, _)| !io.input) {
            if changed || place.shape.is_empty() {
                place.shape = tensor_shape(slots, &self.context, &place.c_name);
            }
            if byte_count(&place.shape, io.dtype).is_none_or(|b| b > place.capacity) {
                return Err(RunError::Run {
                    what: format!("give {:?} the shape {:?}", io.name, place.shape),
                    log: library.errors_text(),
                });
            }
        }
        self.queue()?;
        engine.device.synchronize()?;
        for (io, place) in engine.io.iter().zip(&self.places).filter(|(io, _)| !io.input) {
            let bytes = byte_count(&place.shape, io.dtype).unwrap_or(0);
            output(io, &place.shape, &self.staging.bytes()[place.offset..place.offset + bytes]);
        }
        Ok(())
    }

    /// Queues copies in, the work, and copies out.
    fn queue(&mut self) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let device = &engine.device;
        self.copy(true)?;
        match self.graph {
            GraphState::Ready(graph) => device.launch(graph)?,
            // TensorRT wants one ordinary run of a shape before a capture.
            GraphState::Warming(runs) if runs > 0 => {
                let captured = device.capture(&mut || self.enqueue());
                match captured {
                    Ok(Some(graph)) => {
                        self.graph = GraphState::Ready(graph);
                        device.launch(graph)?;
                    }
                    Ok(None) => {
                        self.graph = GraphState::Off;
                        self.enqueue_or_fail()?;
                    }
                    Err(reason) => {
                        tracing::warn!("no CUDA graph for this engine, running without: {reason}");
                        self.graph = GraphState::Off;
                        self.enqueue_or_fail()?;
                    }
                }
            }
            GraphState::Warming(runs) => {
                self.enqueue_or_fail()?;
                self.graph = GraphState::Warming(runs + 1);
            }
            GraphState::Off => self.enqueue_or_fail()?,
        }
        self.copy(false)
    }

    fn copy(&mut self, inwards: bool) -> Result<(), RunError> {
        let engine = Arc::clone(&self.engine);
        let base = self.staging.bytes_mut().as_mut_ptr();
        for (io, place) in engine.io.iter().zip(&self.places).filter(|(io, _)| io.input == inwards) {
            let bytes = byte_count(&place.shape, io.dtype).unwrap_or(0).min(place.capacity);
            let at = self.arena.address() + place.offset as u64;
            // SAFETY: both buffers have `capacity` bytes at `offset`; the staging buffer is left alone until
            // `synchronize`.
            unsafe {
                if inwards {
                    engine.device.copy_in(at, base.add(place.offset), bytes)?;
                } else {
                    engine.device.copy_out(base.add(place.offset), at, bytes)?;
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

    fn forget_graph(&mut self) {
        if let GraphState::Ready(graph) = self.graph {
            self.engine.device.drop_graph(graph);
        }
        if !matches!(self.graph, GraphState::Off) {
            self.graph = GraphState::Warming(0);
        }
    }
}

impl Drop for TrtContext {
    fn drop(&mut self) {
        if let Err(e) = self.engine.device.synchronize() {
            tracing::warn!("a run did not finish: {e}");
        }
        self.forget_graph();
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
