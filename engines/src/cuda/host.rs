//! A device whose memory is the host's: for libraries that stand in for TensorRT in tests.

use std::ffi::c_void;
use std::sync::Arc;

use super::{CudaError, Device, DeviceInfo};
use crate::target::ComputeCapability;

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

    fn allocate(&self, bytes: usize) -> Result<u64, CudaError> {
        // SAFETY: the layout has a size above zero.
        let at = unsafe { std::alloc::alloc_zeroed(Self::layout(bytes)?) };
        if at.is_null() {
            return Err(CudaError::Call { call: "alloc", reason: "the host has no memory left".into() });
        }
        self.used().insert(at as u64, bytes);
        self.count();
        Ok(at as u64)
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
        let free = self.free_bytes()?;
        if bytes as u64 > free {
            return Err(CudaError::OutOfMemory {
                what: "a tensor".into(),
                wanted: bytes as u64,
                free,
                total: self.capacity,
            });
        }
        self.allocate(bytes)
    }

    unsafe fn free(&self, address: u64) {
        let bytes = self.used().remove(&address);
        if let Some(Ok(layout)) = bytes.map(Self::layout) {
            // SAFETY: allocated by `alloc` with this layout, removed from the table, so freed once.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) }
        }
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<*mut u8, CudaError> {
        Ok(self.allocate(bytes)? as *mut u8)
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
