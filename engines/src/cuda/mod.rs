//! CUDA through its driver library, opened at run time: probing, device memory, one stream, pinned staging, graphs; and
//! our own engine over it, [`CudaBackend`], which runs ONNX graphs with the kernels of `kernels/*.cu`.
//!
//! Nothing of CUDA is needed to build this crate, nor to run it on a machine without a GPU: every entry first checks
//! that the driver library is there and answers with [`CudaError::NoDriver`] if it is not.
//!
//! [`Device`] is what an engine needs of a device. [`CudaDevice`] is the real one; [`HostDevice`] keeps "device"
//! memory on the host, for libraries that stand in for TensorRT in tests. A graph becomes numbers in four steps, of
//! which only the last touches a device:
//!
//! | module | from | to |
//! |---|---|---|
//! | `program` | an ONNX graph | steps that kernels can do, or the names of operators that they cannot |
//! | `plan` | steps and the shapes of one call | kernel calls, and where each value lies in one arena |
//! | `kernels`, `products` | a call | grid, threads, shared memory, arguments; or a product by cuBLASLt |
//! | `backend` (`weights`, `walk`) | calls | launches, recorded as a CUDA graph when the same shapes come again |
//!
//! Every sum has a fixed order: the same inputs on the same device, with the same library of products or none, give the
//! same bytes.
//!
//! Without the feature `cuda` the engine is left out; devices, which TensorRT uses as well, stay.
#![allow(unsafe_code)] // FFI fence: calls into the CUDA driver, one SAFETY comment each.

#[cfg(feature = "cuda")]
mod backend;
#[cfg(feature = "cuda")]
mod check;
mod driver;
mod host;
mod kernels;
mod library;
#[cfg(feature = "cuda")]
mod plan;
mod products;
#[cfg(feature = "cuda")]
mod program;
#[cfg(feature = "cuda")]
mod walk;
#[cfg(feature = "cuda")]
mod weights;

#[cfg(feature = "cuda")]
pub use backend::{CudaBackend, GraphNeeds, graph_needs};
#[cfg(feature = "cuda")]
pub use check::{KernelReport, check_kernels, round_trip};
pub use driver::{CudaDevice, LIBRARY_VARIABLE, library, probe};
pub use host::HostDevice;
pub use kernels::{Kernel, Launch};
pub use products::{PRODUCTS_VARIABLE, Product, ProductShape, product_library};

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;

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
    /// The program was built without our kernels.
    #[error("this program was built without its CUDA engine (feature cuda); use a CPU backend")]
    LeftOut,
    /// No driver library on this machine.
    #[error("no CUDA driver: libcuda.so.1 was not found; install the NVIDIA driver, or use a CPU backend")]
    NoDriver,
    /// The driver is there, and no device.
    #[error("the CUDA driver finds no device")]
    NoDevice,
    /// A library that was named cannot be opened.
    #[error("{variable} names {}, which cannot be opened: {reason}", path.display())]
    Library {
        /// The environment variable that names it: [`LIBRARY_VARIABLE`], [`PRODUCTS_VARIABLE`].
        variable: &'static str,
        /// The file.
        path: PathBuf,
        /// What the loader says.
        reason: String,
    },
    /// The library lacks a function.
    #[error("{} has no {symbol}: {needed}", path.display())]
    Symbol {
        /// The file.
        path: PathBuf,
        /// The function.
        symbol: &'static str,
        /// What follows from that.
        needed: &'static str,
    },
    /// The driver or the device cannot run our kernels.
    #[error("{what} is too old for the kernels: they need {needed}")]
    TooOld {
        /// What is too old, and how it describes itself.
        what: String,
        /// The least that would do.
        needed: &'static str,
    },
    /// Operators of a graph that no kernel does, each with the first node that has it.
    #[error("no CUDA kernel for {}; use another backend", .0.join(", "))]
    Operators(Vec<String>),
    /// No plan can be made for these shapes.
    #[error("{place}: {what}")]
    Shapes {
        /// The value that is made, or an input.
        place: String,
        /// What does not fit.
        what: String,
    },
    /// A driver call failed.
    #[error("cuda {call} failed: {reason}")]
    Call {
        /// The call.
        call: &'static str,
        /// The driver's own words.
        reason: String,
    },
    /// A driver call failed after which all others do.
    #[error("the GPU was lost in {call}: {reason}; goals fail until this program is started again")]
    Lost {
        /// The call.
        call: &'static str,
        /// The driver's own words.
        reason: String,
    },
    /// More memory asked for than there is.
    #[error("device memory: {wanted} bytes wanted for {what}, {free} free of {total}{}", held(*.wanted, *.total))]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes wanted.
        wanted: u64,
        /// Bytes free.
        free: u64,
        /// Bytes of the device.
        total: u64,
    },
}

/// What to do where a device has as much memory as is wanted, and others hold it.
fn held(wanted: u64, total: u64) -> &'static str {
    if wanted <= total { "; nvidia-smi lists the programs that hold the rest" } else { "" }
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
    /// [`CudaError::OutOfMemory`], or a failed call.
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
    /// Queues a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and the addresses among them are valid for what it reads and writes.
    ///
    /// # Errors
    /// A failed call; a device without kernels.
    unsafe fn run(&self, launch: &Launch) -> Result<(), CudaError> {
        let reason = format!("this device has no kernel {}", launch.kernel.name());
        Err(CudaError::Call { call: "cuLaunchKernel", reason })
    }
    /// The library of matrix products behind this device, with its version and file.
    fn products(&self) -> Option<String> {
        None
    }
    /// Bytes of scratch memory that the library of products wants for one; none where there is no library, or it has no
    /// algorithm for it.
    fn product_workspace(&self, shape: &ProductShape) -> Option<usize> {
        let _ = shape;
        None
    }
    /// Queues a product by that library.
    ///
    /// # Safety
    /// The operands are as large as the shape says, the scratch memory as [`Device::product_workspace`] said.
    ///
    /// # Errors
    /// A failed call; a device without such a library.
    unsafe fn multiply(&self, product: &Product) -> Result<(), CudaError> {
        let reason = format!("this device has no library for {:?}", product.shape);
        Err(CudaError::Call { call: "cublasLtMatmul", reason })
    }
    /// Milliseconds between the start and the end of what `work` queues, on the device's own clock.
    ///
    /// # Errors
    /// A failed call; what `work` fails with.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let _ = work;
        Err(CudaError::Call { call: "cuEventCreate", reason: "this device has no clock".into() })
    }
    /// The same device with a stream of its own. Memory is shared.
    ///
    /// # Errors
    /// A failed call; a device that has one stream.
    fn with_own_stream(&self) -> Result<Arc<dyn Device>, CudaError> {
        Err(CudaError::Call { call: "cuStreamCreate", reason: "this device has one stream".into() })
    }
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
        // Tried, not asked about: where GPU and CPU share memory, caches that can be emptied do not count as free.
        let address = device.alloc(bytes.max(1)).map_err(|e| match e {
            CudaError::OutOfMemory { wanted, free, total, .. } => {
                CudaError::OutOfMemory { what: what.to_owned(), wanted, free, total }
            }
            other => other,
        })?;
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
        assert_eq!(e.to_string(), "device memory: 1001 bytes wanted for activations, 1000 free of 1000");
        let other = Memory::new(&device, 600, "another's").unwrap();
        let Err(e) = Memory::new(&device, 500, "weights") else { panic!("accepted") };
        let wanted = "device memory: 500 bytes wanted for weights, 400 free of 1000; nvidia-smi lists the programs that \
                      hold the rest";
        assert_eq!(e.to_string(), wanted);
        drop(other);
    }
}
