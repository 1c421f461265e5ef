//! CUDA through its driver library, opened at run time: probing, device memory, one stream, pinned staging, graphs.
//!
//! Nothing of CUDA is needed to build this crate, nor to run it on a machine without a GPU: every entry first checks
//! that the driver library is there and answers with [`CudaError::NoDriver`] if it is not.
//!
//! [`Device`] is what an engine needs of a device. [`CudaDevice`] is the real one; [`HostDevice`] keeps "device"
//! memory on the host, for libraries that stand in for TensorRT in tests.
#![allow(unsafe_code)] // FFI fence: calls into the CUDA driver, one SAFETY comment each.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use serde::{Deserialize, Serialize};

use crate::target::ComputeCapability;

/// What one GPU says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Index among the machine's devices.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Compute capability.
    pub compute_capability: ComputeCapability,
    /// Memory, bytes.
    pub total_bytes: u64,
    /// Number of multiprocessors.
    pub multiprocessors: u32,
}

/// What the driver says about the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriverInfo {
    /// CUDA version that the driver speaks, as `1000 major + 10 minor`.
    pub cuda_version: i32,
    /// The GPUs.
    pub devices: Vec<DeviceInfo>,
}

/// Why CUDA cannot be used, or what it refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver library on this machine.
    #[error("no CUDA driver: libcuda.so.1 was not found; install the NVIDIA driver, or use a CPU backend")]
    NoDriver,
    /// The driver is there, and no device.
    #[error("the CUDA driver finds no device")]
    NoDevice,
    /// A driver call failed.
    #[error("cuda {call} failed: {reason}")]
    Call {
        /// The call.
        call: &'static str,
        /// The driver's own words.
        reason: String,
    },
    /// More memory asked for than there is.
    #[error("device memory: {wanted} bytes wanted for {what}, {free} free")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes free.
        free: u64,
    },
}

fn call<T>(name: &'static str, r: Result<T, result::DriverError>) -> Result<T, CudaError> {
    r.map_err(|e| CudaError::Call { call: name, reason: format!("{e:?}") })
}

/// Initialises the driver and lists the devices.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::NoDevice`], or a failed call.
pub fn probe() -> Result<DriverInfo, CudaError> {
    // SAFETY: only tries to open the library by name.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    match result::init() {
        Ok(()) => {}
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(CudaError::NoDevice),
        Err(e) => return call("cuInit", Err(e)),
    }
    let mut cuda_version = 0;
    // SAFETY: writes one integer.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut cuda_version) };
    call("cuDriverGetVersion", code.result())?;
    let count = call("cuDeviceGetCount", result::device::get_count())?;
    let mut devices = Vec::new();
    for ordinal in 0..count {
        devices.push(describe(ordinal)?);
    }
    if devices.is_empty() {
        return Err(CudaError::NoDevice);
    }
    Ok(DriverInfo { cuda_version, devices })
}

fn describe(ordinal: i32) -> Result<DeviceInfo, CudaError> {
    use sys::CUdevice_attribute as Attr;
    let dev = call("cuDeviceGet", result::device::get(ordinal))?;
    let attribute = |a| {
        // SAFETY: `dev` came from cuDeviceGet.
        let value = call("cuDeviceGetAttribute", unsafe { result::device::get_attribute(dev, a) })?;
        Ok::<u32, CudaError>(u32::try_from(value).unwrap_or(0))
    };
    Ok(DeviceInfo {
        ordinal: usize::try_from(ordinal).unwrap_or(0),
        name: call("cuDeviceGetName", result::device::get_name(dev))?,
        compute_capability: ComputeCapability {
            major: attribute(Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        // SAFETY: `dev` came from cuDeviceGet.
        total_bytes: call("cuDeviceTotalMem", unsafe { result::device::total_mem(dev) })? as u64,
        multiprocessors: attribute(Attr::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}

/// What an engine needs of a device: memory, one stream, copies, graphs.
///
/// Addresses are plain integers; [`Memory`] and [`Pinned`] own them. All work is queued on one stream, in order.
///
/// # Safety
/// Implementors promise that addresses from `alloc` and `alloc_pinned` stay valid until freed, and that after
/// `synchronize` all queued copies are finished.
pub unsafe trait Device: Send + Sync {
    /// What the device is.
    fn info(&self) -> DeviceInfo;
    /// Bytes free now.
    ///
    /// # Errors
    /// A failed call.
    fn free_bytes(&self) -> Result<u64, CudaError>;
    /// Allocates device memory.
    ///
    /// # Errors
    /// A failed call, out of memory for one.
    fn alloc(&self, bytes: usize) -> Result<u64, CudaError>;
    /// Frees what `alloc` gave.
    ///
    /// # Safety
    /// `address` came from `alloc` of this device and is not used afterwards.
    unsafe fn free(&self, address: u64);
    /// Allocates page-locked host memory.
    ///
    /// # Errors
    /// A failed call.
    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError>;
    /// Frees what `alloc_pinned` gave.
    ///
    /// # Safety
    /// As `free`; `bytes` is what was asked for.
    unsafe fn free_pinned(&self, at: *mut u8, bytes: usize);
    /// Queues a copy to the device.
    ///
    /// # Safety
    /// Both ranges are valid, and `from` is not written before `synchronize`.
    ///
    /// # Errors
    /// A failed call.
    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), CudaError>;
    /// Queues a copy from the device.
    ///
    /// # Safety
    /// Both ranges are valid, and `to` is not read or written before `synchronize`.
    ///
    /// # Errors
    /// A failed call.
    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), CudaError>;
    /// The stream, as libraries take it.
    fn stream(&self) -> *mut c_void;
    /// Waits for all queued work.
    ///
    /// # Errors
    /// A failed call; also errors of work queued before.
    fn synchronize(&self) -> Result<(), CudaError>;
    /// Records what `work` queues as a graph instead of running it. `None` when this device has no graphs.
    ///
    /// # Errors
    /// The capture was refused; the stream is usable again afterwards.
    fn capture(&self, work: &mut dyn FnMut() -> bool) -> Result<Option<u64>, CudaError>;
    /// Queues a recorded graph.
    ///
    /// # Errors
    /// A failed call.
    fn launch(&self, graph: u64) -> Result<(), CudaError>;
    /// Drops a recorded graph.
    fn drop_graph(&self, graph: u64);
}

/// Device memory that is freed when dropped.
pub struct Memory {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Allocates at least one byte.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] with what it was for, or a failed call.
    pub fn new(device: &Arc<dyn Device>, bytes: usize, what: &str) -> Result<Memory, CudaError> {
        let free = device.free_bytes()?;
        if bytes as u64 > free {
            return Err(CudaError::OutOfMemory { what: what.to_owned(), wanted: bytes as u64, free });
        }
        let address = device.alloc(bytes.max(1))?;
        Ok(Memory { device: Arc::clone(device), address, bytes })
    }

    /// Device address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `address` came from `alloc` and this is the only owner.
        unsafe { self.device.free(self.address) }
    }
}

/// Page-locked host memory that is freed when dropped.
pub struct Pinned {
    device: Arc<dyn Device>,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is plain bytes with one owner; the device is Send + Sync.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Allocates, filled with zeros.
    ///
    /// # Errors
    /// A failed call.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Pinned, CudaError> {
        let bytes = bytes.max(1);
        let at = device.alloc_pinned(bytes)?;
        // SAFETY: `at` is `bytes` long.
        unsafe { std::ptr::write_bytes(at, 0, bytes) };
        Ok(Pinned { device: Arc::clone(device), at, bytes })
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and initialised in `new`, owned by self.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }

    /// The bytes, to write.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: `at` came from `alloc_pinned` with this size.
        unsafe { self.device.free_pinned(self.at, self.bytes) }
    }
}

/// A GPU with its primary context and one stream.
pub struct CudaDevice {
    info: DeviceInfo,
    context: usize,
    device: sys::CUdevice,
    stream: usize,
}

impl CudaDevice {
    /// Opens a device.
    ///
    /// # Errors
    /// No driver, no such device, or a failed call.
    pub fn open(ordinal: usize) -> Result<Arc<dyn Device>, CudaError> {
        let info = probe()?.devices.into_iter().find(|d| d.ordinal == ordinal).ok_or(CudaError::NoDevice)?;
        let device = call("cuDeviceGet", result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)))?;
        // SAFETY: `device` came from cuDeviceGet; the context is released in `drop`.
        let context = call("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        // SAFETY: the context was just retained.
        call("cuCtxSetCurrent", unsafe { result::ctx::set_current(context) })?;
        let stream = call("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(Arc::new(CudaDevice { info, context: context as usize, device, stream: stream as usize }))
    }

    fn bind(&self) -> Result<sys::CUstream, CudaError> {
        // SAFETY: the context lives as long as self.
        call("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context as sys::CUcontext) })?;
        Ok(self.stream as sys::CUstream)
    }
}

// SAFETY: addresses come from the driver and live until freed; `synchronize` waits for the only stream.
unsafe impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn free_bytes(&self) -> Result<u64, CudaError> {
        self.bind()?;
        Ok(call("cuMemGetInfo", result::mem_get_info())?.0 as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<u64, CudaError> {
        self.bind()?;
        // SAFETY: a context is current; the memory is raw bytes, written before it is read.
        call("cuMemAlloc", unsafe { result::malloc_sync(bytes) })
    }

    unsafe fn free(&self, address: u64) {
        if self.bind().is_ok() {
            // SAFETY: the caller owns `address`; freeing waits for work that uses it.
            if let Err(e) = unsafe { result::free_sync(address) } {
                tracing::warn!("cuMemFree: {e:?}");
            }
        }
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        self.bind()?;
        // SAFETY: a context is current.
        Ok(call("cuMemHostAlloc", unsafe { result::malloc_host(bytes, 0) })?.cast())
    }

    unsafe fn free_pinned(&self, at: *mut u8, _bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: the caller owns `at`.
            if let Err(e) = unsafe { result::free_host(at.cast()) } {
                tracing::warn!("cuMemFreeHost: {e:?}");
            }
        }
    }

    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: the caller promises both ranges.
        unsafe {
            let from = std::slice::from_raw_parts(from, bytes);
            call("cuMemcpyHtoDAsync", result::memcpy_htod_async(to, from, stream))
        }
    }

    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: the caller promises both ranges.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to, bytes);
            call("cuMemcpyDtoHAsync", result::memcpy_dtoh_async(to, from, stream))
        }
    }

    fn stream(&self) -> *mut c_void {
        self.stream as *mut c_void
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: the stream lives as long as self.
        call("cuStreamSynchronize", unsafe { result::stream::synchronize(stream) })
    }

    fn capture(&self, work: &mut dyn FnMut() -> bool) -> Result<Option<u64>, CudaError> {
        let stream = self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours and not capturing.
        call("cuStreamBeginCapture", unsafe { result::stream::begin_capture(stream, mode) })?;
        let worked = work();
        // SAFETY: ends the capture begun above, on success and on failure alike.
        let graph = call("cuStreamEndCapture", unsafe { result::stream::end_capture(stream) })?;
        if graph.is_null() {
            return Err(CudaError::Call { call: "cuStreamEndCapture", reason: "no graph came back".into() });
        }
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: `graph` came from the capture; it is destroyed once, here.
        let exec = unsafe {
            let exec = if worked {
                call("cuGraphInstantiate", result::graph::instantiate(graph, flags))
            } else {
                Err(CudaError::Call { call: "graph capture", reason: "the work refused to be queued".into() })
            };
            if let Err(e) = result::graph::destroy(graph) {
                tracing::warn!("cuGraphDestroy: {e:?}");
            }
            exec
        };
        Ok(Some(exec? as u64))
    }

    fn launch(&self, graph: u64) -> Result<(), CudaError> {
        let stream = self.bind()?;
        // SAFETY: `graph` came from `capture`.
        call("cuGraphLaunch", unsafe { result::graph::launch(graph as sys::CUgraphExec, stream) })
    }

    fn drop_graph(&self, graph: u64) {
        if self.bind().is_ok() {
            // SAFETY: `graph` came from `capture` and is dropped once.
            if let Err(e) = unsafe { result::graph::exec_destroy(graph as sys::CUgraphExec) } {
                tracing::warn!("cuGraphExecDestroy: {e:?}");
            }
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if let Ok(stream) = self.bind() {
            // SAFETY: both are ours and last used here.
            unsafe {
                if let Err(e) = result::stream::destroy(stream) {
                    tracing::warn!("cuStreamDestroy: {e:?}");
                }
                if let Err(e) = result::primary_ctx::release(self.device) {
                    tracing::warn!("cuDevicePrimaryCtxRelease: {e:?}");
                }
            }
        }
    }
}

/// A stand-in device: memory on the host, copies at once, no graphs. For tests with stand-in libraries.
pub struct HostDevice {
    info: DeviceInfo,
    capacity: u64,
    used: std::sync::Mutex<std::collections::BTreeMap<u64, usize>>,
    /// Bytes that a stand-in library holds besides, asked whenever something happens here.
    beside: Box<dyn Fn() -> u64 + Send + Sync>,
    peak: std::sync::atomic::AtomicU64,
}

impl HostDevice {
    /// A stand-in with this compute capability and memory.
    #[must_use]
    pub fn open(compute_capability: ComputeCapability, capacity: u64) -> Arc<dyn Device> {
        HostDevice::counting(compute_capability, capacity, || 0)
    }

    /// As [`HostDevice::open`], with an allocation counter that also counts what a library says it holds.
    #[must_use]
    pub fn counting(
        compute_capability: ComputeCapability,
        capacity: u64,
        beside: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Arc<HostDevice> {
        Arc::new(HostDevice {
            info: DeviceInfo {
                ordinal: 0,
                name: "host stand-in".into(),
                compute_capability,
                total_bytes: capacity,
                multiprocessors: 1,
            },
            capacity,
            used: std::sync::Mutex::default(),
            beside: Box::new(beside),
            peak: std::sync::atomic::AtomicU64::new(0),
        })
    }

    /// Most bytes that were held at one moment, page-locked memory and the library's included.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.peak.load(std::sync::atomic::Ordering::SeqCst)
    }

    fn count(&self) {
        let now = self.used().values().map(|&b| b as u64).sum::<u64>() + (self.beside)();
        self.peak.fetch_max(now, std::sync::atomic::Ordering::SeqCst);
    }

    fn used(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<u64, usize>> {
        self.used.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn layout(bytes: usize) -> Result<std::alloc::Layout, CudaError> {
        std::alloc::Layout::from_size_align(bytes.max(1), 256)
            .map_err(|e| CudaError::Call { call: "alloc", reason: e.to_string() })
    }
}

// SAFETY: addresses come from the global allocator; copies are finished when the call returns.
unsafe impl Device for HostDevice {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn free_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.capacity - self.used().values().map(|&b| b as u64).sum::<u64>().min(self.capacity))
    }

    fn alloc(&self, bytes: usize) -> Result<u64, CudaError> {
        // SAFETY: the layout has a size above zero.
        let at = unsafe { std::alloc::alloc_zeroed(Self::layout(bytes)?) };
        if at.is_null() {
            return Err(CudaError::Call { call: "alloc", reason: "the host has no memory left".into() });
        }
        self.used().insert(at as u64, bytes);
        self.count();
        Ok(at as u64)
    }

    unsafe fn free(&self, address: u64) {
        let bytes = self.used().remove(&address);
        if let Some(Ok(layout)) = bytes.map(Self::layout) {
            // SAFETY: allocated by `alloc` with this layout, removed from the table, so freed once.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) }
        }
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        Ok(self.alloc(bytes)? as *mut u8)
    }

    unsafe fn free_pinned(&self, at: *mut u8, _bytes: usize) {
        // SAFETY: as `free`.
        unsafe { self.free(at as u64) }
    }

    unsafe fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller promises both ranges; they belong to different allocations.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
        Ok(())
    }

    fn stream(&self) -> *mut c_void {
        std::ptr::null_mut()
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        self.count();
        Ok(())
    }

    fn capture(&self, _work: &mut dyn FnMut() -> bool) -> Result<Option<u64>, CudaError> {
        Ok(None)
    }

    fn launch(&self, _graph: u64) -> Result<(), CudaError> {
        Err(CudaError::Call { call: "launch", reason: "this device has no graphs".into() })
    }

    fn drop_graph(&self, _graph: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs on any machine: without a driver the answer is `NoDriver`; with one, memory goes there and back.
    #[test]
    fn probe_answers_and_memory_makes_the_round_trip() {
        let cc = ComputeCapability { major: 8, minor: 0 };
        let mut devices = vec![HostDevice::open(cc, 1 << 20)];
        match probe() {
            Ok(info) => {
                assert!(info.cuda_version >= 11_000);
                devices.push(CudaDevice::open(info.devices[0].ordinal).unwrap());
            }
            Err(e) => {
                assert!(matches!(e, CudaError::NoDriver | CudaError::NoDevice), "{e}");
                println!("skipped on a GPU: {e}");
            }
        }
        for device in devices {
            let data: Vec<u8> = (0..10_000u32).map(|i| (i * 7 % 251) as u8).collect();
            let memory = Memory::new(&device, data.len(), "test").unwrap();
            let mut pinned = Pinned::new(&device, data.len()).unwrap();
            pinned.bytes_mut().copy_from_slice(&data);
            let mut back = Pinned::new(&device, data.len()).unwrap();
            // SAFETY: both ranges are data.len() bytes and untouched until `synchronize`.
            unsafe {
                device.copy_in(memory.address(), pinned.bytes().as_ptr(), data.len()).unwrap();
                device.copy_out(back.bytes_mut().as_mut_ptr(), memory.address(), data.len()).unwrap();
            }
            device.synchronize().unwrap();
            assert_eq!(back.bytes(), &data[..]);
        }
    }

    #[test]
    fn too_much_memory_is_refused_with_figures() {
        let device = HostDevice::open(ComputeCapability { major: 8, minor: 7 }, 1000);
        let Err(e) = Memory::new(&device, 1001, "activations") else { panic!("accepted") };
        assert_eq!(e.to_string(), "device memory: 1001 bytes wanted for activations, 1000 free");
    }
}
