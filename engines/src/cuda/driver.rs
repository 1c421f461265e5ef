//! The CUDA driver: its library, found and opened by ourselves, and a device behind it.
//!
//! Every function is looked up when the library is opened, so that what is missing is an error with its name, once,
//! and not a panic in the middle of a goal (as it is in `cudarc`'s loader, of which the bindings' constants are used
//! here, not the loader). The types are those of `cuda.h`: handles are pointers or integers, results are numbers of
//! `CUresult`.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{
    CUdevice_attribute, CUfunction_attribute, CUresult, CUstream_flags, CUstreamCaptureMode,
};

use super::kernels::{Kernel, Launch, ptx};
use super::library::functions;
use super::products::{Product, ProductShape, Products};
use super::{CudaError, Device, DeviceInfo, DriverInfo};
use crate::target::ComputeCapability;

/// The environment variable that names the driver's library, or the folder of `libcuda.so.1`.
pub const LIBRARY_VARIABLE: &str = "MINDSEYE_CUDA_LIBRARY";

const FILE: &str = "libcuda.so.1";

/// Where drivers put it that tell the loader nothing.
const FOLDERS: [&str; 9] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu/nvidia",
    "/usr/lib/aarch64-linux-gnu/tegra",
    "/usr/lib64",
    "/usr/lib",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
    "/usr/local/cuda/compat",
];

const OUT_OF_MEMORY: c_int = CUresult::CUDA_ERROR_OUT_OF_MEMORY as c_int;
const NO_DEVICE: c_int = CUresult::CUDA_ERROR_NO_DEVICE as c_int;

// Every later call of the process fails, too.
const ECC_UNCORRECTABLE: c_int = CUresult::CUDA_ERROR_ECC_UNCORRECTABLE as c_int;
const ILLEGAL_ADDRESS: c_int = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS as c_int;
const LAUNCH_TIMEOUT: c_int = CUresult::CUDA_ERROR_LAUNCH_TIMEOUT as c_int;
const CONTEXT_IS_DESTROYED: c_int = CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED as c_int;
const HARDWARE_STACK_ERROR: c_int = CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR as c_int;
const LAUNCH_FAILED: c_int = CUresult::CUDA_ERROR_LAUNCH_FAILED as c_int;

const MULTIPROCESSORS: c_int = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as c_int;
const CAPABILITY_MAJOR: c_int = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as c_int;
const CAPABILITY_MINOR: c_int = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as c_int;
const DYNAMIC_SHARED_BYTES: c_int =
    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_int;
/// Shared memory that a kernel may use without asking.
const SHARED_BYTES_ALWAYS: u32 = 48 << 10;
const NON_BLOCKING: c_uint = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
const CAPTURE_THREAD_LOCAL: c_int = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as c_int;
/// What the PTX is written for: version 8.5, compute capability 8.0.
const PTX_CUDA_VERSION: i32 = 12_050;

type Handle = *mut c_void;

functions! {
    "it is no CUDA driver, or too old; install driver 555 or newer";
    init = "cuInit"(c_uint);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    error_name = "cuGetErrorName"(c_int, *mut *const c_char);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    device_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
    context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
    context_set = "cuCtxSetCurrent"(Handle);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    memory_alloc = "cuMemAlloc_v2"(*mut u64, usize);
    memory_free = "cuMemFree_v2"(u64);
    host_alloc = "cuMemHostAlloc"(*mut Handle, usize, c_uint);
    host_free = "cuMemFreeHost"(Handle);
    copy_in = "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, Handle);
    copy_out = "cuMemcpyDtoHAsync_v2"(Handle, u64, usize, Handle);
    stream_create = "cuStreamCreate"(*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    stream_synchronize = "cuStreamSynchronize"(Handle);
    capture_begin = "cuStreamBeginCapture_v2"(Handle, c_int);
    capture_end = "cuStreamEndCapture"(Handle, *mut Handle);
    graph_instantiate = "cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64);
    graph_launch = "cuGraphLaunch"(Handle, Handle);
    graph_destroy = "cuGraphDestroy"(Handle);
    exec_destroy = "cuGraphExecDestroy"(Handle);
    module_load = "cuModuleLoadData"(*mut Handle, *const c_void);
    module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncSetAttribute"(Handle, c_int, c_int);
    launch_kernel = "cuLaunchKernel"(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut Handle, *mut Handle
    );
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_record = "cuEventRecord"(Handle, Handle);
    event_synchronize = "cuEventSynchronize"(Handle);
    event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
    event_destroy = "cuEventDestroy_v2"(Handle);
}

impl Functions {
    /// A driver that stays open.
    fn at(path: &Path) -> Result<&'static Self, CudaError> {
        Ok(Box::leak(Box::new(Functions::open(path, LIBRARY_VARIABLE)?)))
    }

    /// The driver of this machine, opened once.
    fn here() -> Result<&'static Self, CudaError> {
        static HERE: OnceLock<Result<&'static Functions, CudaError>> = OnceLock::new();
        HERE.get_or_init(|| {
            if let Some(named) = std::env::var_os(LIBRARY_VARIABLE) {
                let named = PathBuf::from(named);
                return Functions::at(&if named.is_dir() { named.join(FILE) } else { named });
            }
            let places = std::iter::once(PathBuf::from(FILE));
            for path in places.chain(FOLDERS.iter().map(|f| Path::new(f).join(FILE))) {
                match Functions::at(&path) {
                    Err(CudaError::Library { .. }) => {}
                    opened => return opened,
                }
            }
            Err(CudaError::NoDriver)
        })
        .clone()
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: writes one pointer, to a constant of the library.
        let known = unsafe { (self.error_name)(code, &raw mut name) } == 0 && !name.is_null();
        let reason = if known {
            // SAFETY: a NUL-terminated constant of the library.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        } else {
            format!("error {code}")
        };
        let lost = Err(CudaError::Lost { call, reason: reason.clone() });
        match code {
            ECC_UNCORRECTABLE | ILLEGAL_ADDRESS | LAUNCH_TIMEOUT | CONTEXT_IS_DESTROYED => lost,
            HARDWARE_STACK_ERROR..=LAUNCH_FAILED => lost,
            _ => Err(CudaError::Call { call, reason }),
        }
    }

    /// As [`Functions::check`], for what cannot be reported to a caller.
    fn check_quietly(&self, call: &'static str, code: c_int) {
        if let Err(e) = self.check(call, code) {
            tracing::warn!("{e}");
        }
    }

    fn probe(&self) -> Result<DriverInfo, CudaError> {
        // SAFETY: no flags are defined.
        match unsafe { (self.init)(0) } {
            NO_DEVICE => return Err(CudaError::NoDevice),
            code => self.check("cuInit", code)?,
        }
        let (mut cuda_version, mut count) = (0, 0);
        // SAFETY: each writes one integer.
        unsafe {
            self.check("cuDriverGetVersion", (self.driver_version)(&raw mut cuda_version))?;
            self.check("cuDeviceGetCount", (self.device_count)(&raw mut count))?;
        }
        let devices = (0..count).map(|i| self.describe(i)).collect::<Result<Vec<_>, _>>()?;
        if devices.is_empty() { Err(CudaError::NoDevice) } else { Ok(DriverInfo { cuda_version, devices }) }
    }

    fn device(&self, ordinal: usize) -> Result<c_int, CudaError> {
        let mut device = 0;
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: writes one integer.
        self.check("cuDeviceGet", unsafe { (self.device_get)(&raw mut device, ordinal) })?;
        Ok(device)
    }

    fn describe(&self, ordinal: c_int) -> Result<DeviceInfo, CudaError> {
        let ordinal = usize::try_from(ordinal).unwrap_or(0);
        let device = self.device(ordinal)?;
        let attribute = |number| {
            let mut value = 0;
            // SAFETY: writes one integer.
            let code = unsafe { (self.device_attribute)(&raw mut value, number, device) };
            self.check("cuDeviceGetAttribute", code)?;
            Ok::<u32, CudaError>(u32::try_from(value).unwrap_or(0))
        };
        let (mut name, mut total_bytes) = ([0u8; 256], 0usize);
        // SAFETY: writes at most 255 bytes and a NUL, and one integer.
        unsafe {
            self.check("cuDeviceGetName", (self.device_name)(name.as_mut_ptr().cast(), 256, device))?;
            self.check("cuDeviceTotalMem", (self.device_memory)(&raw mut total_bytes, device))?;
        }
        let name =
            CStr::from_bytes_until_nul(&name).map_or(String::new(), |n| n.to_string_lossy().into_owned());
        Ok(DeviceInfo {
            ordinal,
            name,
            compute_capability: ComputeCapability {
                major: attribute(CAPABILITY_MAJOR)?,
                minor: attribute(CAPABILITY_MINOR)?,
            },
            total_bytes: total_bytes as u64,
            multiprocessors: attribute(MULTIPROCESSORS)?,
        })
    }
}

/// Initialises the driver and lists the devices.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::NoDevice`], or a failed call.
pub fn probe() -> Result<DriverInfo, CudaError> {
    Functions::here()?.probe()
}

/// The driver's library, as it was found.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::Library`], [`CudaError::Symbol`].
pub fn library() -> Result<PathBuf, CudaError> {
    Ok(Functions::here()?.path.clone())
}

/// Our kernels on a device, by [`Kernel`]. They live as long as the device's primary context.
struct LoadedKernels([usize; Kernel::ALL.len()]);

/// A GPU with its primary context and one stream.
pub struct CudaDevice {
    driver: &'static Functions,
    info: DeviceInfo,
    device: c_int,
    context: usize,
    stream: usize,
    kernels: Option<Arc<LoadedKernels>>,
    /// cuBLASLt, where it was found.
    products: Option<Arc<Products>>,
}

impl CudaDevice {
    /// Opens a device, without kernels of ours.
    ///
    /// # Errors
    /// No driver, no such device, or a failed call.
    pub fn open(ordinal: usize) -> Result<Arc<dyn Device>, CudaError> {
        Ok(Arc::new(CudaDevice::on(Functions::here()?, ordinal)?))
    }

    /// Opens a device and loads our kernels, through the library at `library` or, where none is given, this machine's.
    /// The driver compiles them the first time, in a few seconds, and keeps the result in its cache. Products are
    /// cuBLASLt's where that is found ([`super::PRODUCTS_VARIABLE`]), for a driver that was named: beside it.
    ///
    /// # Errors
    /// As [`CudaDevice::open`]; [`CudaError::TooOld`].
    pub fn with_kernels(ordinal: usize, library: Option<&Path>) -> Result<Arc<dyn Device>, CudaError> {
        let driver = library.map_or_else(Functions::here, Functions::at)?;
        let mut device = CudaDevice::on(driver, ordinal)?;
        device.kernels = Some(Arc::new(device.load_kernels()?));
        let named = library.is_some() || std::env::var_os(LIBRARY_VARIABLE).is_some();
        device.products = Products::find(named.then_some(driver.path.as_path()))?;
        Ok(Arc::new(device))
    }

    fn on(driver: &'static Functions, ordinal: usize) -> Result<Self, CudaError> {
        let info =
            driver.probe()?.devices.into_iter().find(|d| d.ordinal == ordinal).ok_or(CudaError::NoDevice)?;
        let device = driver.device(ordinal)?;
        let (mut context, mut stream) = (null_mut(), null_mut());
        // SAFETY: each writes one handle; the context is released in `drop`, or here where no stream can be had.
        unsafe {
            driver.check("cuDevicePrimaryCtxRetain", (driver.context_retain)(&raw mut context, device))?;
            let made = driver.check("cuCtxSetCurrent", (driver.context_set)(context)).and_then(|()| {
                driver.check("cuStreamCreate", (driver.stream_create)(&raw mut stream, NON_BLOCKING))
            });
            if let Err(e) = made {
                driver.check_quietly("cuDevicePrimaryCtxRelease", (driver.context_release)(device));
                return Err(e);
            }
        }
        Ok(CudaDevice {
            driver,
            info,
            device,
            context: context as usize,
            stream: stream as usize,
            kernels: None,
            products: None,
        })
    }

    fn load_kernels(&self) -> Result<LoadedKernels, CudaError> {
        let driver = self.driver;
        let version = driver.probe()?.cuda_version;
        if version < PTX_CUDA_VERSION {
            return Err(CudaError::TooOld {
                what: format!("the driver (CUDA {}.{})", version / 1000, version % 1000 / 10),
                needed: "CUDA 12.5, which comes with driver 555",
            });
        }
        if self.info.compute_capability.major < 8 {
            return Err(CudaError::TooOld {
                what: format!("{} (compute capability {})", self.info.name, self.info.compute_capability),
                needed: "compute capability 8.0",
            });
        }
        self.bind()?;
        let (image, mut module) = (ptx()?, null_mut());
        // SAFETY: the image is NUL-terminated text; one handle is written.
        driver.check("cuModuleLoadData", unsafe {
            (driver.module_load)(&raw mut module, image.as_ptr().cast())
        })?;
        let mut functions = [0; Kernel::ALL.len()];
        for (kernel, place) in Kernel::ALL.into_iter().zip(&mut functions) {
            let mut function = null_mut();
            // SAFETY: the module was just loaded, the name is NUL-terminated, one handle is written.
            unsafe {
                let name = kernel.name_with_nul().as_ptr();
                driver.check(
                    "cuModuleGetFunction",
                    (driver.module_function)(&raw mut function, module, name.cast()),
                )?;
                if kernel.shared_bytes_most() > SHARED_BYTES_ALWAYS {
                    let most = c_int::try_from(kernel.shared_bytes_most()).unwrap_or(c_int::MAX);
                    let code = (driver.function_attribute)(function, DYNAMIC_SHARED_BYTES, most);
                    driver.check("cuFuncSetAttribute", code)?;
                }
            }
            *place = function as usize;
        }
        Ok(LoadedKernels(functions))
    }

    fn bind(&self) -> Result<Handle, CudaError> {
        // SAFETY: the context lives as long as self.
        self.driver.check("cuCtxSetCurrent", unsafe { (self.driver.context_set)(self.context as Handle) })?;
        Ok(self.stream as Handle)
    }
}

// SAFETY: addresses come from the driver and live until freed; `synchronize` waits for the only stream.
unsafe impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn free_bytes(&self) -> Result<u64, CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        let code = unsafe { (self.driver.memory_info)(&raw mut free, &raw mut total) };
        self.driver.check("cuMemGetInfo", code)?;
        Ok(free as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<u64, CudaError> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: a context is current; the memory is raw bytes, written before it is read.
        match unsafe { (self.driver.memory_alloc)(&raw mut address, bytes) } {
            OUT_OF_MEMORY => Err(CudaError::OutOfMemory {
                what: "a tensor".into(),
                wanted: bytes as u64,
                free: self.free_bytes()?,
                total: self.info.total_bytes,
            }),
            code => self.driver.check("cuMemAlloc", code).map(|()| address),
        }
    }

    unsafe fn free(&self, address: u64) {
        if self.bind().is_ok() {
            // SAFETY: the caller owns `address`; freeing waits for work that uses it.
            self.driver.check_quietly("cuMemFree", unsafe { (self.driver.memory_free)(address) });
        }
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        self.bind()?;
        let mut at = null_mut();
        // SAFETY: a context is current; one pointer is written.
        self.driver.check("cuMemHostAlloc", unsafe { (self.driver.host_alloc)(&raw mut at, bytes, 0) })?;
        Ok(at.cast())
    }

    unsafe fn free_pinned(&self, at: *mut u8, _bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: the caller owns `at`.
            self.driver.check_quietly("cuMemFreeHost", unsafe { (self.driver.host_free)(at.cast()) });
        }
    }

    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: the caller promises both ranges.
        let code = unsafe { (self.driver.copy_in)(to, from.cast(), bytes, stream) };
        self.driver.check("cuMemcpyHtoDAsync", code)
    }

    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: the caller promises both ranges.
        let code = unsafe { (self.driver.copy_out)(to.cast(), from, bytes, stream) };
        self.driver.check("cuMemcpyDtoHAsync", code)
    }

    fn stream(&self) -> *mut c_void {
        self.stream as *mut c_void
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: the stream lives as long as self.
        self.driver.check("cuStreamSynchronize", unsafe { (self.driver.stream_synchronize)(stream) })
    }

    fn capture(&self, work: &mut dyn FnMut() -> bool) -> Result<Option<u64>, CudaError> {
        let (driver, stream) = (self.driver, self.bind()?);
        // SAFETY: the stream is ours and not capturing.
        let code = unsafe { (driver.capture_begin)(stream, CAPTURE_THREAD_LOCAL) };
        driver.check("cuStreamBeginCapture", code)?;
        // The capture ends whatever the work does: a stream left capturing takes no other work.
        let worked = catch_unwind(AssertUnwindSafe(work));
        let mut graph = null_mut();
        // SAFETY: ends the capture begun above; one handle is written.
        let ended =
            driver.check("cuStreamEndCapture", unsafe { (driver.capture_end)(stream, &raw mut graph) });
        let worked = worked.unwrap_or_else(|panic| resume_unwind(panic));
        ended?;
        if graph.is_null() {
            return Err(CudaError::Call { call: "cuStreamEndCapture", reason: "no graph came back".into() });
        }
        let mut exec = null_mut();
        // SAFETY: `graph` came from the capture; it is destroyed once, here.
        let made = unsafe {
            let made = if worked {
                driver.check("cuGraphInstantiate", (driver.graph_instantiate)(&raw mut exec, graph, 0))
            } else {
                Err(CudaError::Call { call: "graph capture", reason: "the work refused to be queued".into() })
            };
            driver.check_quietly("cuGraphDestroy", (driver.graph_destroy)(graph));
            made
        };
        made.map(|()| Some(exec as u64))
    }

    fn launch(&self, graph: u64) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: `graph` came from `capture`.
        self.driver.check("cuGraphLaunch", unsafe { (self.driver.graph_launch)(graph as Handle, stream) })
    }

    fn drop_graph(&self, graph: u64) {
        if self.bind().is_ok() {
            // SAFETY: `graph` came from `capture` and is dropped once.
            let code = unsafe { (self.driver.exec_destroy)(graph as Handle) };
            self.driver.check_quietly("cuGraphExecDestroy", code);
        }
    }

    unsafe fn run(&self, launch: &Launch) -> Result<(), CudaError> {
        let Some(kernels) = &self.kernels else {
            let reason = "the device was opened without kernels".into();
            return Err(CudaError::Call { call: "cuLaunchKernel", reason });
        };
        let stream = self.bind()?;
        let function = kernels.0[launch.kernel as usize] as Handle;
        let mut arguments = launch.arguments.pointers();
        let [x, y, z] = launch.grid;
        // SAFETY: the caller promises arguments and addresses; the driver copies the arguments before it returns.
        let code = unsafe {
            (self.driver.launch_kernel)(
                function,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                stream,
                arguments.as_mut_ptr(),
                null_mut(),
            )
        };
        self.driver.check(launch.kernel.name(), code)
    }

    fn products(&self) -> Option<String> {
        self.products.as_ref().map(|p| p.description())
    }

    fn product_workspace(&self, shape: &ProductShape) -> Option<usize> {
        self.bind().ok()?;
        self.products.as_ref()?.workspace(*shape)
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), CudaError> {
        let Some(products) = &self.products else {
            let reason = "the device was opened without it".into();
            return Err(CudaError::Call { call: "cublasLtMatmul", reason });
        };
        let stream = self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { products.multiply(product, stream) }
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let (driver, stream) = (self.driver, self.bind()?);
        let (mut from, mut to, mut millis) = (null_mut(), null_mut(), 0f32);
        // SAFETY: each event is made, used and destroyed here.
        unsafe {
            driver.check("cuEventCreate", (driver.event_create)(&raw mut from, 0))?;
            let measured =
                driver.check("cuEventCreate", (driver.event_create)(&raw mut to, 0)).and_then(|()| {
                    driver.check("cuEventRecord", (driver.event_record)(from, stream))?;
                    work()?;
                    driver.check("cuEventRecord", (driver.event_record)(to, stream))?;
                    driver.check("cuEventSynchronize", (driver.event_synchronize)(to))?;
                    driver.check("cuEventElapsedTime", (driver.event_elapsed)(&raw mut millis, from, to))
                });
            for event in [from, to].into_iter().filter(|e| !e.is_null()) {
                driver.check_quietly("cuEventDestroy", (driver.event_destroy)(event));
            }
            measured.map(|()| f64::from(millis))
        }
    }

    fn with_own_stream(&self) -> Result<Arc<dyn Device>, CudaError> {
        let mut other = CudaDevice::on(self.driver, self.info.ordinal)?;
        other.kernels.clone_from(&self.kernels);
        other.products.clone_from(&self.products);
        Ok(Arc::new(other))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if let Ok(stream) = self.bind() {
            // Before the context goes in which its handle was made.
            self.products = None;
            // SAFETY: both are ours and last used here.
            unsafe {
                self.driver.check_quietly("cuStreamDestroy", (self.driver.stream_destroy)(stream));
                let code = (self.driver.context_release)(self.device);
                self.driver.check_quietly("cuDevicePrimaryCtxRelease", code);
            }
        }
    }
}
