//! A fake of TensorRT's libraries for tests; see README.md beside it. It computes y = 2 x and nothing else; engines with
//! other inputs and outputs write zeros.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::not_unsafe_ptr_arg_deref)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

const SLOTS: &str = include_str!("../data/tensorrt/slots.json");
const VERSION: &str = if cfg!(rtx) {
    "rtx1.7"
} else if cfg!(v11) {
    "v11.4"
} else {
    "v10.16"
};
/// The interface of TensorRT 11, which TensorRT-RTX shares in most.
const NEW: bool = cfg!(any(v11, rtx));
/// Objects that were made and not deleted.
static ALIVE: AtomicI64 = AtomicI64::new(0);
/// Bytes of weights of the engines that are loaded.
static WEIGHTS: AtomicU64 = AtomicU64::new(0);

/// Index of a method in the generated lists.
fn index(class: &str, method: &str) -> usize {
    let version = SLOTS.split(&format!("\"{VERSION}\"")).nth(1).expect("version");
    let list = version.split(&format!("\"{class}\"")).nth(1).expect("class");
    let list = list.split(']').next().expect("end of list");
    let names: Vec<&str> = list.split('"').skip(1).step_by(2).collect();
    names.iter().position(|n| *n == method).unwrap_or_else(|| panic!("{class} has no {method}"))
}

pub type Function = *const c_void;

extern "C" fn unexpected() -> *const c_void {
    eprintln!("fake TensorRT {VERSION}: a slot was called that the binding should not call");
    std::process::abort();
}

/// A vtable with functions at the slots of their names; `first` slots come before index 0.
fn vtable(class: &str, first: usize, functions: &[(&str, Function)]) -> *const Function {
    let mut table = vec![unexpected as *const () as Function; 96];
    for (name, f) in functions {
        table[first + index(class, name)] = *f;
    }
    Box::leak(table.into_boxed_slice()).as_ptr()
}

/// What the binding holds: a vtable with the destructors, and the implementation.
#[repr(C)]
pub struct Outer {
    vtable: *const Function,
    implementation: *mut Inner,
}

#[repr(C)]
pub struct Inner {
    vtable: *const Function,
    data: Data,
}

#[derive(Default)]
pub struct Data {
    logger: usize,
    text: String,
    bytes: Vec<u8>,
    profiles: i32,
    monitor: usize,
    cache: usize,
    tensors: Vec<usize>,
    name: Vec<u8>,
    engine: Description,
    _held: Held,
    shapes: HashMap<String, Vec<i64>>,
    addresses: HashMap<String, usize>,
    memory: (usize, i64),
    refused: bool,
    host_code: bool,
}

/// An input or output of an engine.
#[derive(Clone)]
struct Port {
    name: CString,
    input: bool,
    dtype: i32,
    /// A number, or a name with limits (of an input).
    dims: Vec<Size>,
}

#[derive(Clone)]
enum Size {
    Fixed(i64),
    Named(String, i64, i64),
}

impl Port {
    fn bytes_of_one(&self) -> usize {
        match self.dtype {
            1 | 7 => 2,
            8 => 8,
            _ => 4,
        }
    }
}

/// What a fake engine's file says, a line each: `weights N`, `scratch N`, `in NAME DTYPE SIZE..`, `out NAME DTYPE SIZE..`;
/// a size is a number or `name=least..most` (`name` in outputs).
#[derive(Clone, Default)]
struct Description {
    weights: u64,
    scratch: i64,
    ports: Vec<Port>,
}

fn description(text: &str) -> Description {
    // The engine that the tests of the binding use.
    let plain = "scratch 1000\nin x 0 rows=1..8 4\nout y 0 rows 4";
    let mut lines = text.lines().skip(1).peekable();
    let lines: Vec<&str> = if lines.peek().is_some() { lines.collect() } else { plain.lines().collect() };
    let mut all = Description::default();
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "weights" => all.weights = words[1].parse().expect("number"),
            "scratch" => all.scratch = words[1].parse().expect("number"),
            kind => all.ports.push(Port {
                name: CString::new(words[1]).expect("no NUL"),
                input: kind == "in",
                dtype: words[2].parse().expect("number"),
                dims: words[3..].iter().map(|w| size(w)).collect(),
            }),
        }
    }
    all
}

fn size(word: &str) -> Size {
    match (word.parse(), word.split_once('=')) {
        (Ok(n), _) => Size::Fixed(n),
        (_, Some((name, limits))) => {
            let (least, most) = limits.split_once("..").expect("limits");
            Size::Named(name.into(), least.parse().expect("number"), most.parse().expect("number"))
        }
        (_, None) => Size::Named(word.into(), 0, 0),
    }
}

impl Data {
    fn port(&self, name: *const c_char) -> &Port {
        let name = unsafe { CStr::from_ptr(name) };
        self.engine.ports.iter().find(|p| p.name.as_c_str() == name).expect("a name that the engine gave")
    }

    /// Sizes of the present inputs by name.
    fn sizes(&self) -> HashMap<String, i64> {
        let mut sizes = HashMap::new();
        for port in self.engine.ports.iter().filter(|p| p.input) {
            let shape = self.shapes.get(port.name.to_str().expect("utf-8"));
            for (dim, &n) in port.dims.iter().zip(shape.into_iter().flatten()) {
                if let Size::Named(name, ..) = dim {
                    sizes.insert(name.clone(), n);
                }
            }
        }
        sizes
    }

    fn shape(&self, port: &Port) -> Vec<i64> {
        let sizes = self.sizes();
        let of = |d: &Size| match d {
            Size::Fixed(n) => *n,
            Size::Named(name, ..) => sizes.get(name).copied().unwrap_or(-1),
        };
        port.dims.iter().map(of).collect()
    }
}

/// Weights of a loaded engine.
#[derive(Default)]
struct Held(u64);

impl Held {
    fn new(bytes: u64) -> Held {
        WEIGHTS.fetch_add(bytes, Ordering::SeqCst);
        Held(bytes)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        WEIGHTS.fetch_sub(self.0, Ordering::SeqCst);
    }
}

extern "C" fn delete(object: *mut Outer) {
    unsafe {
        drop(Box::from_raw((*object).implementation));
        drop(Box::from_raw(object));
    }
    ALIVE.fetch_sub(1, Ordering::SeqCst);
}

fn make(class: &str, functions: &[(&str, Function)], data: Data) -> *mut Outer {
    ALIVE.fetch_add(1, Ordering::SeqCst);
    let implementation = Box::into_raw(Box::new(Inner { vtable: vtable(class, 2, functions), data }));
    let mut table = vec![unexpected as *const () as Function; 8];
    table[1] = delete as *const () as Function;
    let vtable = Box::leak(table.into_boxed_slice()).as_ptr();
    Box::into_raw(Box::new(Outer { vtable, implementation }))
}

fn outer(pointer: usize) -> &'static mut Data {
    unsafe { &mut (*(*(pointer as *mut Outer)).implementation).data }
}

fn log(logger: usize, severity: i32, message: &str) {
    let text = std::ffi::CString::new(message).expect("no NUL");
    let slot = if NEW { 4 } else { 0 };
    unsafe {
        let table = *(logger as *const *const Function);
        let f: extern "C" fn(usize, i32, *const c_char) = std::mem::transmute(*table.add(slot));
        f(logger, severity, text.as_ptr());
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Dims {
    count: i32,
    extent: [i64; 8],
}

fn dims(shape: &[i64]) -> Dims {
    let mut extent = [0; 8];
    extent[..shape.len()].copy_from_slice(shape);
    Dims { count: shape.len() as i32, extent }
}

macro_rules! version {
    ($($name:ident = $value:expr;)*) => { $(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> i32 { $value }
    )* };
}

version! {
    getInferLibMajorVersion = if cfg!(rtx) { 1 } else if cfg!(v11) { 11 } else { 10 };
    getInferLibMinorVersion = if cfg!(rtx) { 7 } else if cfg!(v11) { 4 } else { 3 };
    getInferLibPatchVersion = 0;
    getInferLibBuildVersion = 30;
    getInferLibVersion = if cfg!(v11) { 110400 } else { 100300 };
    getNvOnnxParserVersion = 100;
}

/// Objects alive: zero when the binding has deleted all.
#[unsafe(no_mangle)]
pub extern "C" fn fakeAlive() -> i64 {
    ALIVE.load(Ordering::SeqCst)
}

/// Bytes of weights of all loaded engines.
#[unsafe(no_mangle)]
pub extern "C" fn fakeWeights() -> u64 {
    WEIGHTS.load(Ordering::SeqCst)
}

fn broken(logger: usize) -> *mut Outer {
    log(logger, 1, "createInferRuntime: CUDA initialization failure with error: 35");
    0x228 as *mut Outer
}

#[unsafe(no_mangle)]
pub extern "C" fn createInferBuilder_INTERNAL(logger: usize, version: i32) -> *mut Outer {
    if cfg!(broken) || version != getInferLibVersion() {
        return broken(logger);
    }
    log(logger, 3, "fake builder created");
    make(
        "VBuilder",
        &[
            ("createBuilderConfig", create_config as *const () as Function),
            ("createNetworkV2", create_network as *const () as Function),
            ("createOptimizationProfile", create_profile as *const () as Function),
            ("buildSerializedNetwork", build as *const () as Function),
        ],
        Data { logger, ..Data::default() },
    )
}

extern "C" fn create_config(this: &Inner) -> *mut Outer {
    make(
        "VBuilderConfig",
        &[
            ("setFlag", nothing as *const () as Function),
            ("addOptimizationProfile", add_profile as *const () as Function),
            ("setProfilingVerbosity", nothing as *const () as Function),
            ("createTimingCache", create_cache as *const () as Function),
            ("setTimingCache", set_cache as *const () as Function),
            ("getTimingCache", get_cache as *const () as Function),
            ("setMemoryPoolLimit", nothing as *const () as Function),
            ("setBuilderOptimizationLevel", nothing as *const () as Function),
            ("setHardwareCompatibilityLevel", nothing as *const () as Function),
            ("setProgressMonitor", set_monitor as *const () as Function),
        ],
        Data { logger: this.data.logger, ..Data::default() },
    )
}

extern "C" fn nothing(_this: &Inner) {}

extern "C" fn set_monitor(this: &mut Inner, monitor: usize) {
    this.data.monitor = monitor;
}

extern "C" fn create_cache(_this: &Inner, blob: *const u8, size: usize) -> *mut Outer {
    let bytes =
        if size == 0 { Vec::new() } else { unsafe { std::slice::from_raw_parts(blob, size) }.to_vec() };
    if !bytes.is_empty() && !bytes.starts_with(b"fake cache") {
        return std::ptr::null_mut();
    }
    make(
        "VTimingCache",
        &[("serialize", serialize_cache as *const () as Function)],
        Data { bytes, ..Data::default() },
    )
}

extern "C" fn set_cache(this: &mut Inner, cache: usize, _ignore: bool) -> bool {
    this.data.cache = cache;
    true
}

extern "C" fn get_cache(this: &Inner) -> usize {
    this.data.cache
}

extern "C" fn serialize_cache(this: &Inner) -> *mut Outer {
    let mut bytes = if this.data.bytes.is_empty() { b"fake cache".to_vec() } else { this.data.bytes.clone() };
    bytes.push(b'+');
    host_memory(bytes)
}

fn host_memory(bytes: Vec<u8>) -> *mut Outer {
    let functions: &[(&str, Function)] =
        &[("data", memory_data as *const () as Function), ("size", memory_size as *const () as Function)];
    make("VHostMemory", functions, Data { bytes, ..Data::default() })
}

extern "C" fn memory_data(this: &Inner) -> *const u8 {
    this.data.bytes.as_ptr()
}

extern "C" fn memory_size(this: &Inner) -> usize {
    this.data.bytes.len()
}

extern "C" fn create_network(this: &Inner, flags: u32) -> *mut Outer {
    let wanted = if NEW { 0 } else { 2 };
    if flags != wanted {
        log(this.data.logger, 1, "the network is not strongly typed");
        return std::ptr::null_mut();
    }
    let tensor = |name: &str| {
        make(
            "VTensor",
            &[
                ("getName", name_of as *const () as Function),
                ("getDimensions", tensor_dims as *const () as Function),
            ],
            Data { name: [name.as_bytes(), b"\0"].concat(), ..Data::default() },
        ) as usize
    };
    // Tensors belong to the network: they are not among the objects that the binding deletes.
    let tensors = vec![tensor("x"), tensor("y")];
    ALIVE.fetch_sub(2, Ordering::SeqCst);
    make(
        "VNetworkDefinition",
        &[
            ("getNbLayers", one as *const () as Function),
            ("getNbInputs", one as *const () as Function),
            ("getInput", network_input as *const () as Function),
            ("getNbOutputs", one as *const () as Function),
            ("getOutput", network_output as *const () as Function),
        ],
        Data { logger: this.data.logger, tensors, ..Data::default() },
    )
}

extern "C" fn one(_this: &Inner) -> i32 {
    1
}

extern "C" fn network_input(this: &Inner, _index: i32) -> usize {
    this.data.tensors[0]
}

extern "C" fn network_output(this: &Inner, _index: i32) -> usize {
    this.data.tensors[1]
}

extern "C" fn name_of(this: &Inner) -> *const c_char {
    this.data.name.as_ptr().cast()
}

extern "C" fn tensor_dims(_this: &Inner) -> Dims {
    dims(&[-1, 4])
}

extern "C" fn create_profile(_this: &Inner) -> *mut Outer {
    let profile = make(
        "VOptimizationProfile",
        &[
            ("setDimensions", profile_set as *const () as Function),
            ("isValid", profile_valid as *const () as Function),
        ],
        Data::default(),
    );
    // Belongs to the builder.
    ALIVE.fetch_sub(1, Ordering::SeqCst);
    profile
}

extern "C" fn profile_set(this: &mut Inner, name: *const c_char, select: i32, shape: &Dims) -> bool {
    let name = unsafe { CStr::from_ptr(name) };
    this.data.profiles |= 1 << select;
    name == c"x" && shape.count == 2 && shape.extent[1] == 4
}

extern "C" fn profile_valid(this: &Inner) -> bool {
    this.data.profiles == 7
}

extern "C" fn add_profile(this: &mut Inner, _profile: usize) -> i32 {
    this.data.profiles += 1;
    this.data.profiles - 1
}

extern "C" fn build(this: &Inner, network: usize, config: usize) -> *mut Outer {
    let (network, config) = (outer(network), outer(config));
    if config.profiles != 1 {
        log(this.data.logger, 1, "no optimization profile");
        return std::ptr::null_mut();
    }
    if config.monitor != 0 {
        type Start = extern "C" fn(usize, *const c_char, *const c_char, i32);
        type Step = extern "C" fn(usize, *const c_char, i32) -> bool;
        type Finish = extern "C" fn(usize, *const c_char);
        let (m, phase) = (config.monitor, c"Fake phase".as_ptr());
        unsafe {
            let table = *(m as *const *const Function);
            std::mem::transmute::<Function, Start>(*table.add(4))(m, phase, std::ptr::null(), 2);
            for step in 0..2 {
                if !std::mem::transmute::<Function, Step>(*table.add(5))(m, phase, step) {
                    return std::ptr::null_mut();
                }
            }
            std::mem::transmute::<Function, Finish>(*table.add(6))(m, phase);
        }
    }
    if network.text.contains("BUILDFAIL") {
        log(this.data.logger, 1, "Could not find any implementation for node {ForeignNode[blocks.3/MatMul]}");
        return std::ptr::null_mut();
    }
    host_memory(b"ftrt a fake engine".to_vec())
}

/// The parser, its vtable directly on the object.
#[repr(C)]
struct Parser {
    vtable: *const Function,
    logger: usize,
    network: usize,
    error: *mut ParserError,
}

#[repr(C)]
struct ParserError {
    vtable: *const Function,
}

#[unsafe(no_mangle)]
pub extern "C" fn createNvOnnxParser_INTERNAL(network: usize, logger: usize, _version: i32) -> *mut c_void {
    ALIVE.fetch_add(1, Ordering::SeqCst);
    // The destructor is declared once and takes two slots: later methods move by one, which none called here does.
    let table = vtable(
        "IParser",
        0,
        &[
            ("parseFromFile", parse_from_file as *const () as Function),
            ("getNbErrors", parser_errors as *const () as Function),
            ("getError", parser_error as *const () as Function),
        ],
    );
    let deleting = index("IParser", "~IParser") + 1;
    unsafe { *table.cast_mut().add(deleting) = delete_parser as *const () as Function };
    let error = Box::into_raw(Box::new(ParserError {
        vtable: vtable(
            "IParserError",
            0,
            &[
                ("code", error_code as *const () as Function),
                ("desc", error_desc as *const () as Function),
                ("node", error_node as *const () as Function),
                ("nodeName", error_name as *const () as Function),
                ("nodeOperator", error_operator as *const () as Function),
            ],
        ),
    }));
    Box::into_raw(Box::new(Parser { vtable: table, logger, network, error })).cast()
}

extern "C" fn delete_parser(this: *mut Parser) {
    unsafe {
        drop(Box::from_raw((*this).error));
        drop(Box::from_raw(this));
    }
    ALIVE.fetch_sub(1, Ordering::SeqCst);
}

extern "C" fn parse_from_file(this: &Parser, path: *const c_char, _verbosity: i32) -> bool {
    let path = unsafe { CStr::from_ptr(path) }.to_str().expect("utf-8");
    let network = outer(this.network);
    network.text = std::fs::read_to_string(path).unwrap_or_default();
    network.refused = network.text.contains("UNSUPPORTED");
    if network.refused {
        log(this.logger, 1, "fake parser: unsupported operator");
    }
    !network.refused
}

extern "C" fn parser_errors(this: &Parser) -> i32 {
    i32::from(outer(this.network).refused)
}

extern "C" fn parser_error(this: &Parser, _index: i32) -> *mut ParserError {
    this.error
}

extern "C" fn error_code(_this: &ParserError) -> i32 {
    8
}

extern "C" fn error_desc(_this: &ParserError) -> *const c_char {
    c"no importer registered for op".as_ptr()
}

extern "C" fn error_node(_this: &ParserError) -> i32 {
    17
}

extern "C" fn error_name(_this: &ParserError) -> *const c_char {
    c"blocks.0/Frobnicate".as_ptr()
}

extern "C" fn error_operator(_this: &ParserError) -> *const c_char {
    c"Frobnicate".as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn createInferRuntime_INTERNAL(logger: usize, _version: i32) -> *mut Outer {
    if cfg!(broken) {
        return broken(logger);
    }
    make(
        "VRuntime",
        &[
            ("deserializeCudaEngine", deserialize as *const () as Function),
            ("setEngineHostCodeAllowed", allow_host_code as *const () as Function),
        ],
        Data { logger, ..Data::default() },
    )
}

extern "C" fn allow_host_code(this: &mut Inner, allowed: bool) {
    this.data.host_code = allowed;
}

extern "C" fn deserialize(this: &Inner, blob: *const u8, size: usize) -> *mut Outer {
    let bytes = unsafe { std::slice::from_raw_parts(blob, size) };
    // As TensorRT does with engines that bring host code of their own.
    if bytes == b"ftrt a fake engine with host code" && !this.data.host_code {
        log(this.data.logger, 1, "The engine has host code, and setEngineHostCodeAllowed was not called");
        return std::ptr::null_mut();
    }
    let magic: &[u8] = if cfg!(rtx) { b"vtrt a fake engine" } else { b"ftrt a fake engine" };
    if !bytes.starts_with(magic) {
        log(this.data.logger, 1, "The engine plan file is not compatible with this device");
        return std::ptr::null_mut();
    }
    let size = if NEW { "getDeviceMemorySizeV2" } else { "getDeviceMemorySize" };
    let mut functions = vec![
            ("createExecutionContext", create_context as *const () as Function),
            ("getNbLayers", one as *const () as Function),
            ("createEngineInspector", create_inspector as *const () as Function),
            ("getTensorShape", engine_shape as *const () as Function),
            ("getTensorDataType", engine_dtype as *const () as Function),
            ("getTensorIOMode", engine_mode as *const () as Function),
            ("getProfileShape", engine_profile as *const () as Function),
            ("getNbIOTensors", engine_count as *const () as Function),
            ("getIOTensorName", engine_name as *const () as Function),
            (size, scratch as *const () as Function),
    ];
    if cfg!(rtx) {
        functions.push(("createRuntimeConfig", create_runtime_config as *const () as Function));
        functions.push(("createExecutionContextWithRuntimeConfig", create_context_with as *const () as Function));
    }
    make(
        "VCudaEngine",
        &functions,
        {
            let engine = description(&String::from_utf8_lossy(bytes));
            let held = Held::new(engine.weights);
            Data { logger: this.data.logger, engine, _held: held, ..Data::default() }
        },
    )
}

extern "C" fn engine_count(this: &Inner) -> i32 {
    this.data.engine.ports.len() as i32
}

extern "C" fn scratch(this: &Inner) -> i64 {
    this.data.engine.scratch
}

extern "C" fn engine_name(this: &Inner, index: i32) -> *const c_char {
    this.data.engine.ports[index as usize].name.as_ptr()
}

extern "C" fn engine_shape(this: &Inner, name: *const c_char) -> Dims {
    let of = |d: &Size| if let Size::Fixed(n) = d { *n } else { -1 };
    dims(&this.data.port(name).dims.iter().map(of).collect::<Vec<_>>())
}

extern "C" fn engine_dtype(this: &Inner, name: *const c_char) -> i32 {
    this.data.port(name).dtype
}

extern "C" fn engine_mode(this: &Inner, name: *const c_char) -> i32 {
    if this.data.port(name).input { 1 } else { 2 }
}

extern "C" fn engine_profile(this: &Inner, name: *const c_char, _profile: i32, select: i32) -> Dims {
    let of = |d: &Size| match (d, select) {
        (Size::Fixed(n), _) => *n,
        (Size::Named(_, least, _), 0) => *least,
        (Size::Named(_, least, most), 1) => (least + 1).min(*most),
        (Size::Named(_, _, most), _) => *most,
    };
    dims(&this.data.port(name).dims.iter().map(of).collect::<Vec<_>>())
}

extern "C" fn create_inspector(_this: &Inner) -> *mut Outer {
    make(
        "VEngineInspector",
        &[("getEngineInformation", information as *const () as Function)],
        Data::default(),
    )
}

extern "C" fn information(_this: &Inner, format: i32) -> *const c_char {
    if format == 1 { c"{\"Layers\": [\"fake\"]}".as_ptr() } else { c"fake".as_ptr() }
}

extern "C" fn create_context(this: &Inner, strategy: i32) -> *mut Outer {
    if strategy != 2 {
        return std::ptr::null_mut();
    }
    let memory: (&str, Function) = if NEW {
        ("setDeviceMemoryV2", memory_sized as *const () as Function)
    } else {
        ("setDeviceMemory", memory_plain as *const () as Function)
    };
    make(
        "VExecutionContext",
        &[
            memory,
            ("setInputShape", context_set_shape as *const () as Function),
            ("getTensorShape", context_shape as *const () as Function),
            ("setTensorAddress", context_address as *const () as Function),
            ("enqueueV3", enqueue as *const () as Function),
        ],
        Data { logger: this.data.logger, engine: this.data.engine.clone(), ..Data::default() },
    )
}

/// What every cache of kernels of this machine begins with; a byte for each number of rows follows.
const KERNELS: &[u8] = b"fake kernels:";

extern "C" fn create_runtime_config(_this: &Inner) -> *mut Outer {
    make(
        "VRuntimeConfig",
        &[
            ("setExecutionContextAllocationStrategy", set_strategy as *const () as Function),
            ("createRuntimeCache", create_kernels as *const () as Function),
            ("setRuntimeCache", set_kernels as *const () as Function),
        ],
        Data::default(),
    )
}

extern "C" fn set_strategy(this: &mut Inner, strategy: i32) {
    this.data.profiles = strategy;
}

extern "C" fn create_kernels(_this: &Inner) -> *mut Outer {
    make(
        "VRuntimeCache",
        &[
            ("serialize", serialize_kernels as *const () as Function),
            ("deserialize", deserialize_kernels as *const () as Function),
        ],
        Data { bytes: KERNELS.to_vec(), ..Data::default() },
    )
}

extern "C" fn serialize_kernels(this: &Inner) -> *mut Outer {
    host_memory(this.data.bytes.clone())
}

extern "C" fn deserialize_kernels(this: &mut Inner, blob: *const u8, size: usize) -> bool {
    let bytes = unsafe { std::slice::from_raw_parts(blob, size) };
    let ours = bytes.starts_with(KERNELS);
    if ours {
        this.data.bytes = bytes.to_vec();
    }
    ours
}

extern "C" fn set_kernels(this: &mut Inner, cache: usize) -> bool {
    this.data.cache = cache;
    true
}

extern "C" fn create_context_with(this: &Inner, config: usize) -> *mut Outer {
    let context = create_context(this, outer(config).profiles);
    if !context.is_null() {
        outer(context as usize).cache = outer(config).cache;
    }
    context
}

extern "C" fn memory_plain(this: &mut Inner, memory: usize) {
    this.data.memory = (memory, this.data.engine.scratch);
}

extern "C" fn memory_sized(this: &mut Inner, memory: usize, size: i64) {
    this.data.memory = (memory, size);
}

extern "C" fn context_set_shape(this: &mut Inner, name: *const c_char, shape: &Dims) -> bool {
    let given = shape.extent[..shape.count as usize].to_vec();
    let port = this.data.port(name).clone();
    let fits = |(d, &n): (&Size, &i64)| match d {
        Size::Fixed(wanted) => *wanted == n,
        Size::Named(_, least, most) => (least..=most).contains(&&n),
    };
    let all = given.len() == port.dims.len() && port.dims.iter().zip(&given).all(fits);
    this.data.shapes.insert(port.name.to_str().expect("utf-8").into(), given);
    all
}

extern "C" fn context_shape(this: &Inner, name: *const c_char) -> Dims {
    dims(&this.data.shape(this.data.port(name)))
}

extern "C" fn context_address(this: &mut Inner, name: *const c_char, address: usize) -> bool {
    let name = this.data.port(name).name.to_str().expect("utf-8").to_owned();
    this.data.addresses.insert(name, address);
    address.is_multiple_of(256)
}

extern "C" fn enqueue(this: &Inner, _stream: usize) -> bool {
    let d = &this.data;
    if d.memory.0 == 0 || d.memory.1 < d.engine.scratch || d.addresses.len() != d.engine.ports.len() {
        log(d.logger, 1, "memory or addresses are not set");
        return false;
    }
    if d.cache != 0 {
        // Compiled once for each number of rows.
        let (rows, kernels) = (d.shape(&d.engine.ports[0])[0] as u8, &mut outer(d.cache).bytes);
        if !kernels[KERNELS.len()..].contains(&rows) {
            kernels.push(rows);
        }
    }
    let place = |port: &Port| {
        let count = usize::try_from(d.shape(port).iter().product::<i64>()).expect("positive");
        (d.addresses[port.name.to_str().expect("utf-8")], count)
    };
    unsafe {
        std::ptr::write_bytes(d.memory.0 as *mut u8, 0xab, d.engine.scratch as usize);
        if let [x, y] = &d.engine.ports[..]
            && x.name.as_c_str() == c"x"
        {
            let ((from, n), (to, _)) = (place(x), place(y));
            let x = std::slice::from_raw_parts(from as *const f32, n);
            let y = std::slice::from_raw_parts_mut(to as *mut f32, n);
            if x[0] == 666.0 {
                log(d.logger, 1, "fake kernel failed");
                return false;
            }
            y.iter_mut().zip(x).for_each(|(y, x)| *y = 2.0 * x);
            return true;
        }
        for port in d.engine.ports.iter().filter(|p| !p.input) {
            let (to, n) = place(port);
            std::ptr::write_bytes(to as *mut u8, 0, n * port.bytes_of_one());
        }
    }
    true
}
