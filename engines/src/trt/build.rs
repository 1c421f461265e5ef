//! ONNX file in, serialized engine out.
#![allow(unsafe_code)] // FFI fence: virtual calls into TensorRT.

use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mindseye_base::file::replace;

use super::abi::{Abi, Slots};
use super::ffi::{self, Dims, Object, method};
use super::library::{Library, LibraryError};
use super::log::{InterfaceInfo, language_cpp};
use crate::target::ComputeCapability;

/// Shapes that one dynamic input may take; `opt` is what kernels are chosen for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputProfile {
    /// Input name.
    pub name: String,
    /// Smallest shape.
    pub min: Vec<i64>,
    /// Usual shape.
    pub opt: Vec<i64>,
    /// Largest shape.
    pub max: Vec<i64>,
}

/// What the builder is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A phase has begun (TensorRT's own name for it, or ours), with its number of steps where known.
    Phase {
        /// Name.
        name: String,
        /// Steps, 0 where unknown.
        steps: u32,
    },
    /// A step of a phase is done.
    Step {
        /// Phase.
        name: String,
        /// Number of steps done.
        done: u32,
        /// Steps in all.
        steps: u32,
    },
    /// A phase is over.
    Finished {
        /// Phase.
        name: String,
    },
}

/// How to build.
#[derive(Clone, Default)]
pub struct BuildOptions {
    /// Most scratch memory for kernels, bytes; TensorRT's own default where none.
    pub workspace_bytes: Option<u64>,
    /// One for each dynamic input.
    pub profiles: Vec<InputProfile>,
    /// What to build for. TensorRT-RTX builds for any that it knows; others build for the GPU that is there, and it
    /// must be of this compute capability.
    pub compute_capability: Option<ComputeCapability>,
    /// Kernel timings: read if it exists, merged, written back. Not used by TensorRT-RTX, which times nothing.
    pub timing_cache: Option<PathBuf>,
    /// Let the engine run on other Ampere and later GPUs.
    pub hardware_compatible: bool,
    /// Let the engine run on later TensorRT versions of the same major.
    pub version_compatible: bool,
    /// 0 to 5; TensorRT's own default where none.
    pub optimization_level: Option<u8>,
    /// Set to stop: the build ends with [`BuildError::Cancelled`] at the next step.
    pub cancel: Arc<AtomicBool>,
    /// Told about progress, from TensorRT's threads.
    pub progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
}

/// A built engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Built {
    /// Size of the engine file.
    pub bytes: u64,
    /// Seconds for parsing and building.
    pub seconds: f64,
    /// Layers of the parsed network.
    pub layers: u32,
    /// Names, ranks and dynamic axes of the inputs.
    pub inputs: Vec<(String, Vec<i64>)>,
    /// Names of the outputs.
    pub outputs: Vec<String>,
}

/// Why an engine was not built. Nothing is left at the output path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The library cannot be used.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The ONNX file was refused.
    #[error("{path} does not parse: {errors}")]
    Parse {
        /// The file.
        path: String,
        /// Node, operator and reason, for each error.
        errors: String,
    },
    /// A profile that does not fit its input.
    #[error("optimisation profile of input {input:?}: {reason}")]
    Profile {
        /// The input.
        input: String,
        /// What is wrong.
        reason: String,
    },
    /// An option that this library or machine cannot serve.
    #[error("{0}")]
    Unsupported(String),
    /// The library's GPU is not the target.
    #[error(
        "the target has compute capability {wanted}, and this machine's GPU ({name}) has {got}: build on the target itself"
    )]
    WrongDevice {
        /// Target.
        wanted: ComputeCapability,
        /// Machine.
        got: ComputeCapability,
        /// Name of the GPU.
        name: String,
    },
    /// TensorRT gave up.
    #[error("TensorRT could not build {path}{log}")]
    Build {
        /// The ONNX file.
        path: String,
        /// What it logged.
        log: String,
    },
    /// Stopped on request.
    #[error("the build was cancelled")]
    Cancelled,
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
}

/// Timing caches larger than this are not read.
const MAX_TIMING_CACHE_BYTES: u64 = 1 << 30;

/// Parses `onnx`, builds an engine and writes it to `out`, atomically.
///
/// # Errors
/// [`BuildError`]; then `out` is as it was before.
pub fn build(
    library: &Library,
    onnx: &Path,
    out: &Path,
    options: &BuildOptions,
) -> Result<Built, BuildError> {
    let started = Instant::now();
    let shown = onnx.display().to_string();
    let cancelled = || {
        if options.cancel.load(Ordering::Relaxed) { Err(BuildError::Cancelled) } else { Ok(()) }
    };
    let report = |name: &str| {
        if let Some(progress) = &options.progress {
            progress(Progress::Phase { name: name.to_owned(), steps: 0 });
        }
    };
    check_device(library, options)?;
    if !onnx.is_file() {
        return Err(BuildError::Io { path: shown, source: std::io::ErrorKind::NotFound.into() });
    }
    drop(library.take_errors());
    let abi = library.abi();
    let slots = abi.slots();
    let builder = library.create_builder()?;
    let network = create_network(library, &builder)?;

    report("parse");
    // The parser owns nothing of the network, but weights that it loaded live in it: keep it until the engine is out.
    let parser = library.create_parser(&network)?;
    parse(library, &parser, onnx)?;
    cancelled()?;
    let (inputs, outputs, layers) = describe(slots, &network);

    let config = create_config(library, &builder)?;
    configure(library, &config, options)?;
    add_profiles(library, &builder, &config, &inputs, &options.profiles)?;
    let timing = (abi != Abi::Rtx17).then_some(options.timing_cache.as_deref()).flatten();
    // The cache object must outlive the build.
    let _cache = match timing {
        Some(path) => attach_timing_cache(slots, &config, path)?,
        None => None,
    };
    report("build");
    let serialized = serialize(slots, &builder, &network, &config, options);
    cancelled()?;
    let Some(serialized) = serialized else {
        return Err(BuildError::Build { path: shown, log: library.errors_text() });
    };
    let bytes = host_memory(slots, &serialized).ok_or_else(|| BuildError::Build {
        path: shown,
        log: ": the engine that came back is empty".into(),
    })?;
    report("write");
    replace(out, bytes).map_err(|source| BuildError::Io { path: out.display().to_string(), source })?;
    if let Some(path) = timing {
        save_timing_cache(slots, &config, path)?;
    }
    Ok(Built { bytes: bytes.len() as u64, seconds: started.elapsed().as_secs_f64(), layers, inputs, outputs })
}

/// Builds, with progress and cancelling; none where TensorRT gave up.
fn serialize(
    slots: &Slots,
    builder: &Object,
    network: &Object,
    config: &Object,
    options: &BuildOptions,
) -> Option<Object> {
    type SetMonitor = unsafe extern "C" fn(NonNull<c_void>, *const Monitor);
    type Build = unsafe extern "C" fn(NonNull<c_void>, NonNull<c_void>, NonNull<c_void>) -> *mut c_void;
    let monitor = Monitor::new(options);
    let this = config.implementation();
    // SAFETY: `setProgressMonitor(IProgressMonitor*)`: the monitor is unset below before it goes.
    unsafe { method::<SetMonitor>(this, slots.config_set_progress_monitor)(this, &raw const *monitor) };
    // SAFETY: builder, network and config are alive and belong together; the result is an owned IHostMemory.
    let serialized = unsafe {
        let pointer = method::<Build>(builder.implementation(), slots.builder_build_serialized)(
            builder.implementation(),
            network.pointer(),
            config.pointer(),
        );
        Object::own(pointer)
    };
    // SAFETY: as above; null unsets it.
    unsafe { method::<SetMonitor>(this, slots.config_set_progress_monitor)(this, std::ptr::null()) };
    serialized
}

fn check_device(library: &Library, options: &BuildOptions) -> Result<(), BuildError> {
    let Some(wanted) = options.compute_capability else {
        return Ok(());
    };
    if library.abi() == Abi::Rtx17 {
        // Measured: 1.7.1 accepts these and refuses 8.7, 9.0, 10.0 and 11.0.
        return if [75, 80, 86, 89, 120, 121].contains(&wanted.sm()) {
            Ok(())
        } else {
            Err(BuildError::Unsupported(format!(
                "TensorRT-RTX {} does not know compute capability {wanted}; build on the target itself with its own \
                 TensorRT 10 or 11",
                library.version()
            )))
        };
    }
    match library.driver().and_then(|d| d.devices.first()) {
        Some(device) if device.compute_capability == wanted => Ok(()),
        Some(device) if options.hardware_compatible && device.compute_capability.major == wanted.major => {
            Ok(())
        }
        Some(device) => {
            Err(BuildError::WrongDevice { wanted, got: device.compute_capability, name: device.name.clone() })
        }
        None => {
            Err(BuildError::Unsupported("TensorRT builds on a machine with the target's GPU only".into()))
        }
    }
}

fn create_network(library: &Library, builder: &Object) -> Result<Object, BuildError> {
    type Create = unsafe extern "C" fn(NonNull<c_void>, u32) -> *mut c_void;
    let this = builder.implementation();
    // SAFETY: `INetworkDefinition* createNetworkV2(uint32_t)`; the result is owned by us.
    let network = unsafe {
        Object::own(method::<Create>(this, library.abi().slots().builder_create_network)(
            this,
            library.abi().strongly_typed(),
        ))
    };
    network.ok_or_else(|| {
        LibraryError::Create { version: library.version(), what: "network", log: library.errors_text() }
            .into()
    })
}

fn create_config(library: &Library, builder: &Object) -> Result<Object, BuildError> {
    type Create = unsafe extern "C" fn(NonNull<c_void>) -> *mut c_void;
    let this = builder.implementation();
    // SAFETY: `IBuilderConfig* createBuilderConfig()`; the result is owned by us.
    let config =
        unsafe { Object::own(method::<Create>(this, library.abi().slots().builder_create_config)(this)) };
    config.ok_or_else(|| {
        LibraryError::Create {
            version: library.version(),
            what: "builder config",
            log: library.errors_text(),
        }
        .into()
    })
}

fn parse(library: &Library, parser: &Object, onnx: &Path) -> Result<(), BuildError> {
    type Parse = unsafe extern "C" fn(NonNull<c_void>, *const c_char, i32) -> bool;
    type Count = unsafe extern "C" fn(NonNull<c_void>) -> i32;
    type Get = unsafe extern "C" fn(NonNull<c_void>, i32) -> *mut c_void;
    type Number = unsafe extern "C" fn(NonNull<c_void>) -> i32;
    type Text = unsafe extern "C" fn(NonNull<c_void>) -> *const c_char;
    let shown = onnx.display().to_string();
    let name = CString::new(shown.as_bytes())
        .map_err(|_| BuildError::Unsupported(format!("{shown:?} has a NUL in its name")))?;
    let slots = library.abi().slots();
    let this = parser.pointer();
    // SAFETY: `bool parseFromFile(char const*, int)`; the name lives during the call. Weights in files beside the
    // ONNX file are found through this name.
    if unsafe { method::<Parse>(this, slots.parser_parse_from_file)(this, name.as_ptr(), 2) } {
        return Ok(());
    }
    let mut errors = Vec::new();
    // SAFETY: `int getNbErrors()`, `IParserError const* getError(int)`; errors belong to the parser and live with it.
    // They have no implementation class, so their vtable is used directly.
    unsafe {
        let count = method::<Count>(this, slots.parser_get_nb_errors)(this);
        for i in 0..count.clamp(0, 16) {
            let Some(e) = ffi::valid(method::<Get>(this, slots.parser_get_error)(this, i)) else {
                continue;
            };
            let text = |slot| ffi::text(method::<Text>(e, slot)(e));
            let node = method::<Number>(e, slots.parser_error_node)(e);
            let (name, operator) =
                (text(slots.parser_error_node_name), text(slots.parser_error_node_operator));
            let desc = text(slots.parser_error_desc);
            errors.push(if name.is_empty() && operator.is_empty() {
                desc
            } else {
                format!("node {node} {name:?} ({operator}): {desc}")
            });
        }
    }
    if errors.is_empty() {
        errors = library.take_errors();
    }
    if errors.is_empty() {
        errors.push("the parser gave no reason".into());
    }
    Err(BuildError::Parse { path: shown, errors: errors.join("; ") })
}

/// A tensor's name and shape, -1 where dynamic.
type Named = (String, Vec<i64>);

/// Inputs with shapes (-1 where dynamic), output names, number of layers.
fn describe(slots: &Slots, network: &Object) -> (Vec<Named>, Vec<String>, u32) {
    type Count = unsafe extern "C" fn(NonNull<c_void>) -> i32;
    type Get = unsafe extern "C" fn(NonNull<c_void>, i32) -> *mut c_void;
    type Name = unsafe extern "C" fn(NonNull<c_void>) -> *const c_char;
    type Dimensions = unsafe extern "C" fn(NonNull<c_void>) -> Dims;
    let this = network.implementation();
    let tensors = |count_slot, get_slot| {
        let mut found = Vec::new();
        // SAFETY: `int32_t getNb...()`, `ITensor* get...(int32_t)`, and on the tensor's implementation
        // `char const* getName()`, `Dims getDimensions()`; tensors belong to the network.
        unsafe {
            for i in 0..method::<Count>(this, count_slot)(this).clamp(0, 4096) {
                let Some(tensor) = ffi::valid(method::<Get>(this, get_slot)(this, i)) else {
                    continue;
                };
                let tensor = ffi::implementation(tensor);
                let name = ffi::text(method::<Name>(tensor, slots.tensor_get_name)(tensor));
                let dims = method::<Dimensions>(tensor, slots.tensor_get_dimensions)(tensor);
                found.push((name, dims.shape().unwrap_or_default()));
            }
        }
        found
    };
    let inputs = tensors(slots.network_get_nb_inputs, slots.network_get_input);
    let outputs = tensors(slots.network_get_nb_outputs, slots.network_get_output);
    // SAFETY: `int32_t getNbLayers()`.
    let layers = unsafe { method::<Count>(this, slots.network_get_nb_layers)(this) };
    (inputs, outputs.into_iter().map(|(name, _)| name).collect(), u32::try_from(layers).unwrap_or(0))
}

fn configure(library: &Library, config: &Object, options: &BuildOptions) -> Result<(), BuildError> {
    type SetFlag = unsafe extern "C" fn(NonNull<c_void>, i32);
    type SetLimit = unsafe extern "C" fn(NonNull<c_void>, i32, usize);
    type SetCount = unsafe extern "C" fn(NonNull<c_void>, i32) -> bool;
    type SetCapability = unsafe extern "C" fn(NonNull<c_void>, i32, i32) -> bool;
    let abi = library.abi();
    let slots = abi.slots();
    let this = config.implementation();
    if abi == Abi::Rtx17 && (options.version_compatible || options.hardware_compatible) {
        return Err(BuildError::Unsupported(
            "TensorRT-RTX engines are compiled for the device when they are loaded: hardware and version \
             compatibility are options of TensorRT 10 and 11"
                .into(),
        ));
    }
    // SAFETY: `setMemoryPoolLimit(kWORKSPACE = 0, size_t)`, `setFlag(BuilderFlag)`,
    // `setHardwareCompatibilityLevel(kAMPERE_PLUS = 1)`, `setBuilderOptimizationLevel(int32_t)`,
    // `setProfilingVerbosity(kDETAILED = 2)`: all take 32-bit integers except the size.
    unsafe {
        if let Some(bytes) = options.workspace_bytes {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            method::<SetLimit>(this, slots.config_set_memory_pool_limit)(this, 0, bytes);
        }
        if options.version_compatible {
            method::<SetFlag>(this, slots.config_set_flag)(this, abi.flag_version_compatible());
        }
        if options.hardware_compatible {
            method::<SetFlag>(this, slots.config_set_hardware_compatibility)(this, 1);
        }
        if let Some(level) = options.optimization_level {
            method::<SetFlag>(this, slots.config_set_optimization_level)(this, i32::from(level.min(5)));
        }
        method::<SetFlag>(this, slots.config_set_profiling_verbosity)(this, 2);
    }
    if let (Some(slots), Some(cc)) = (slots.config_compute_capabilities, options.compute_capability) {
        let sm = i32::try_from(cc.sm()).unwrap_or(0);
        // SAFETY: `bool setNbComputeCapabilities(int32_t)`, `bool setComputeCapability(ComputeCapability, int32_t)`.
        let set = unsafe {
            method::<SetCount>(this, slots.set_count)(this, 1)
                && method::<SetCapability>(this, slots.set)(this, sm, 0)
        };
        if !set {
            return Err(BuildError::Unsupported(format!(
                "TensorRT {} does not build for compute capability {cc}{}",
                library.version(),
                library.errors_text()
            )));
        }
    }
    Ok(())
}

fn add_profiles(
    library: &Library,
    builder: &Object,
    config: &Object,
    inputs: &[(String, Vec<i64>)],
    profiles: &[InputProfile],
) -> Result<(), BuildError> {
    type Create = unsafe extern "C" fn(NonNull<c_void>) -> *mut c_void;
    type SetDimensions = unsafe extern "C" fn(NonNull<c_void>, *const c_char, i32, *const Dims) -> bool;
    type IsValid = unsafe extern "C" fn(NonNull<c_void>) -> bool;
    type Add = unsafe extern "C" fn(NonNull<c_void>, NonNull<c_void>) -> i32;
    let bad = |input: &str, reason: String| BuildError::Profile { input: input.to_owned(), reason };
    let dynamic: Vec<_> = inputs.iter().filter(|(_, shape)| shape.contains(&-1)).collect();
    for p in profiles {
        if !inputs.iter().any(|(name, _)| *name == p.name) {
            let names: Vec<_> = inputs.iter().map(|(n, _)| n.as_str()).collect();
            return Err(bad(&p.name, format!("the graph has no such input; it has {}", names.join(", "))));
        }
    }
    if dynamic.is_empty() {
        return Ok(());
    }
    let slots = library.abi().slots();
    let this = builder.implementation();
    // SAFETY: `IOptimizationProfile* createOptimizationProfile()`. The builder keeps ownership of profiles: the
    // object is not deleted by us.
    let profile = unsafe { ffi::valid(method::<Create>(this, slots.builder_create_profile)(this)) };
    let profile = profile.ok_or_else(|| LibraryError::Create {
        version: library.version(),
        what: "optimisation profile",
        log: library.errors_text(),
    })?;
    // SAFETY: a live IOptimizationProfile.
    let this = unsafe { ffi::implementation(profile) };
    for (name, shape) in dynamic {
        let p = profiles
            .iter()
            .find(|p| p.name == *name)
            .ok_or_else(|| bad(name, format!("missing; its shape is {shape:?} and -1 needs limits")))?;
        for s in [&p.min, &p.opt, &p.max] {
            let fits = s.len() == shape.len()
                && s.iter().zip(shape).all(|(&got, &want)| got > 0 && (want == -1 || want == got));
            if !fits {
                return Err(bad(name, format!("{s:?} does not fit the graph's {shape:?}")));
            }
        }
        if !p.min.iter().zip(&p.opt).zip(&p.max).all(|((a, b), c)| a <= b && b <= c) {
            return Err(bad(name, format!("{:?}, {:?}, {:?} are not in order", p.min, p.opt, p.max)));
        }
        let c_name = CString::new(name.as_bytes()).map_err(|_| bad(name, "NUL in the name".into()))?;
        for (select, s) in [(0, &p.min), (1, &p.opt), (2, &p.max)] {
            let dims = Dims::new(s).ok_or_else(|| bad(name, "more than 8 axes".into()))?;
            // SAFETY: `bool setDimensions(char const*, OptProfileSelector, Dims const&)`.
            let set = unsafe {
                method::<SetDimensions>(this, slots.profile_set_dimensions)(
                    this,
                    c_name.as_ptr(),
                    select,
                    &raw const dims,
                )
            };
            if !set {
                return Err(bad(name, format!("{s:?} was refused{}", library.errors_text())));
            }
        }
    }
    let this_config = config.implementation();
    // SAFETY: `bool isValid()`, `int32_t addOptimizationProfile(IOptimizationProfile const*)`.
    let added = unsafe {
        method::<IsValid>(this, slots.profile_is_valid)(this)
            && method::<Add>(this_config, slots.config_add_profile)(this_config, profile) >= 0
    };
    if added {
        Ok(())
    } else {
        Err(bad("(all)", format!("the profile is not valid{}", library.errors_text())))
    }
}

pub(super) fn host_memory<'a>(slots: &Slots, memory: &'a Object) -> Option<&'a [u8]> {
    type Data = unsafe extern "C" fn(NonNull<c_void>) -> *const u8;
    type Size = unsafe extern "C" fn(NonNull<c_void>) -> usize;
    let this = memory.implementation();
    // SAFETY: `void* data()`, `size_t size()`; the bytes live as long as the object.
    unsafe {
        let (data, size) =
            (method::<Data>(this, slots.memory_data)(this), method::<Size>(this, slots.memory_size)(this));
        (!data.is_null() && size > 0).then(|| std::slice::from_raw_parts(data, size))
    }
}

fn attach_timing_cache(slots: &Slots, config: &Object, path: &Path) -> Result<Option<Object>, BuildError> {
    type Create = unsafe extern "C" fn(NonNull<c_void>, *const u8, usize) -> *mut c_void;
    type Set = unsafe extern "C" fn(NonNull<c_void>, NonNull<c_void>, bool) -> bool;
    let blob = match std::fs::metadata(path) {
        Ok(m) if m.len() > MAX_TIMING_CACHE_BYTES => {
            return Err(BuildError::Unsupported(format!(
                "timing cache {} is larger than 1 GiB",
                path.display()
            )));
        }
        Ok(_) => std::fs::read(path)
            .map_err(|source| BuildError::Io { path: path.display().to_string(), source })?,
        Err(_) => Vec::new(),
    };
    let this = config.implementation();
    let make = |blob: &[u8]| {
        // SAFETY: `ITimingCache* createTimingCache(void const*, size_t)`; the blob is copied; the result is ours.
        let cache = unsafe {
            Object::own(method::<Create>(this, slots.config_create_timing_cache)(
                this,
                blob.as_ptr(),
                blob.len(),
            ))
        }?;
        // SAFETY: `bool setTimingCache(ITimingCache const&, bool ignoreMismatch = false)`; the caller keeps the cache
        // until after the build.
        let set = unsafe { method::<Set>(this, slots.config_set_timing_cache)(this, cache.pointer(), false) };
        set.then_some(cache)
    };
    if let Some(cache) = make(&blob) {
        return Ok(Some(cache));
    }
    tracing::warn!("timing cache {} is from another device or version: starting a new one", path.display());
    Ok(make(&[]))
}

fn save_timing_cache(slots: &Slots, config: &Object, path: &Path) -> Result<(), BuildError> {
    type Get = unsafe extern "C" fn(NonNull<c_void>) -> *mut c_void;
    let this = config.implementation();
    // SAFETY: `ITimingCache const* getTimingCache()` is owned by us or the config; `IHostMemory* serialize()` is ours.
    let blob = unsafe {
        ffi::valid(method::<Get>(this, slots.config_get_timing_cache)(this)).and_then(|cache| {
            let cache = ffi::implementation(cache);
            Object::own(method::<Get>(cache, slots.timing_cache_serialize)(cache))
        })
    };
    match blob.as_ref().and_then(|b| host_memory(slots, b)) {
        Some(bytes) => {
            replace(path, bytes).map_err(|source| BuildError::Io { path: path.display().to_string(), source })
        }
        None => Ok(()),
    }
}

#[repr(C)]
struct MonitorVtable {
    api_language: extern "C" fn(*const c_void) -> i32,
    interface_info: extern "C" fn(*const c_void) -> InterfaceInfo,
    destroy: extern "C" fn(*const Monitor),
    delete: extern "C" fn(*const Monitor),
    phase_start: extern "C" fn(*const Monitor, *const c_char, *const c_char, i32),
    step_complete: extern "C" fn(*const Monitor, *const c_char, i32) -> bool,
    phase_finish: extern "C" fn(*const Monitor, *const c_char),
}

static MONITOR: MonitorVtable = MonitorVtable {
    api_language: language_cpp,
    interface_info: monitor_info,
    destroy: monitor_nothing,
    delete: monitor_nothing,
    phase_start,
    step_complete,
    phase_finish,
};

/// `IProgressMonitor`: the same virtual methods in all supported versions.
#[repr(C)]
struct Monitor {
    vtable: *const MonitorVtable,
    cancel: Arc<AtomicBool>,
    progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
    steps: Mutex<std::collections::BTreeMap<String, u32>>,
}

impl Monitor {
    fn new(options: &BuildOptions) -> Box<Monitor> {
        Box::new(Monitor {
            vtable: &raw const MONITOR,
            cancel: Arc::clone(&options.cancel),
            progress: options.progress.clone(),
            steps: Mutex::default(),
        })
    }

    fn report(&self, what: Progress) {
        if let Some(progress) = &self.progress {
            progress(what);
        }
    }
}

extern "C" fn monitor_info(_this: *const c_void) -> InterfaceInfo {
    InterfaceInfo { kind: c"IProgressMonitor".as_ptr(), major: 1, minor: 0 }
}

extern "C" fn monitor_nothing(_this: *const Monitor) {}

extern "C" fn phase_start(this: *const Monitor, phase: *const c_char, _parent: *const c_char, steps: i32) {
    // SAFETY: TensorRT passes back our monitor, alive until the build returns, and a NUL-terminated name.
    let (this, name) = unsafe { (&*this, ffi::text(phase)) };
    let steps = u32::try_from(steps).unwrap_or(0);
    this.steps.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), steps);
    this.report(Progress::Phase { name, steps });
}

extern "C" fn step_complete(this: *const Monitor, phase: *const c_char, step: i32) -> bool {
    // SAFETY: as above.
    let (this, name) = unsafe { (&*this, ffi::text(phase)) };
    let steps = this.steps.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied().unwrap_or(0);
    let done = u32::try_from(step).unwrap_or(0) + 1;
    this.report(Progress::Step { name, done, steps });
    !this.cancel.load(Ordering::Relaxed)
}

extern "C" fn phase_finish(this: *const Monitor, phase: *const c_char) {
    // SAFETY: as above.
    let (this, name) = unsafe { (&*this, ffi::text(phase)) };
    this.steps.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
    this.report(Progress::Finished { name });
}
