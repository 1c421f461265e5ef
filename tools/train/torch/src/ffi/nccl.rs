//! NCCL, opened when ranks train together: the few functions that sums and broadcasts need.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

type Comm = *mut c_void;
/// `ncclFloat32` and `ncclSum`.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// Functions of the library, which stays open.
pub(crate) struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int,
    broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

/// What this process's threads launch on from now on is GPU `number`, as NCCL wants it; nothing where it is 0, which is so
/// anyway.
pub(crate) fn use_gpu(number: usize) -> Result<(), libloading::Error> {
    if number == 0 {
        return Ok(());
    }
    // SAFETY: CUDA's runtime, which libtorch has opened already; its initialisers have run.
    let library = unsafe { Library::open(Some("libcudart.so.13"), RTLD_NOW | RTLD_LOCAL) }?;
    // SAFETY: `cudaError_t cudaSetDevice(int)` of the runtime's C interface.
    unsafe {
        let set = library.get::<unsafe extern "C" fn(c_int) -> c_int>(b"cudaSetDevice\0")?;
        set(number as c_int);
    }
    std::mem::forget(library);
    Ok(())
}

impl Nccl {
    /// Opens the library of this name or path.
    pub(crate) fn open(name: &str) -> Result<Self, libloading::Error> {
        // SAFETY: its initialisers only set up the library; the symbols are those of `nccl.h` 2.x with their types.
        unsafe {
            let library = Library::open(Some(name), RTLD_NOW | RTLD_LOCAL)?;
            Ok(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                comm_init_rank: *library.get(b"ncclCommInitRank\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
                broadcast: *library.get(b"ncclBroadcast\0")?,
                comm_abort: *library.get(b"ncclCommAbort\0")?,
                error_string: *library.get(b"ncclGetErrorString\0")?,
                _library: library,
            })
        }
    }

    fn done(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the library gives a text that lives as long as itself, for every code.
        let text = unsafe {
            let text = (self.error_string)(code);
            if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
        };
        Err(format!("NCCL: {}", text.unwrap_or_else(|| format!("error {code}"))))
    }

    pub(crate) fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes the 128 bytes of `id`.
        self.done(unsafe { (self.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// Waits until all ranks have come.
    pub(crate) fn communicator(self: Arc<Self>, ranks: usize, rank: usize, id: UniqueId) -> Result<Communicator, String> {
        let mut comm: Comm = std::ptr::null_mut();
        // SAFETY: writes one pointer; the identity is passed by value, as the header has it.
        self.done(unsafe { (self.comm_init_rank)(&raw mut comm, ranks as c_int, id, rank as c_int) })?;
        Ok(Communicator { nccl: self, comm: Arc::new(AtomicPtr::new(comm)) })
    }
}

/// A communicator; null once it was aborted.
#[derive(Clone)]
pub(crate) struct Communicator {
    nccl: Arc<Nccl>,
    comm: Arc<AtomicPtr<c_void>>,
}

impl Communicator {
    fn comm(&self) -> Result<Comm, String> {
        let comm = self.comm.load(Ordering::Acquire);
        if comm.is_null() { Err("a rank was lost".to_owned()) } else { Ok(comm) }
    }

    /// Sums the values of this tensor over all ranks, in place, on the device's default stream.
    pub(crate) fn all_reduce(&self, values: &tch::Tensor) -> Result<(), String> {
        let (at, comm) = (values.data_ptr(), self.comm()?);
        // SAFETY: `at` is the device's memory of a contiguous f32 tensor with `numel` values, which outlives the call and
        // the copy after it on the same stream; sending and receiving in place is allowed.
        self.nccl.done(unsafe {
            (self.nccl.all_reduce)(at, at, values.numel(), FLOAT32, SUM, comm, std::ptr::null_mut())
        })
    }

    /// Replaces the values of this tensor by those of `root`, as [`Communicator::all_reduce`].
    pub(crate) fn broadcast(&self, values: &tch::Tensor, root: usize) -> Result<(), String> {
        let (at, comm) = (values.data_ptr(), self.comm()?);
        // SAFETY: as above.
        self.nccl.done(unsafe {
            (self.nccl.broadcast)(at, at, values.numel(), FLOAT32, root as c_int, comm, std::ptr::null_mut())
        })
    }

    /// Ends calls that wait for a rank that is lost; may be called from any thread.
    pub(crate) fn abort(&self) {
        let comm = self.comm.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !comm.is_null() {
            // SAFETY: a live communicator, aborted once; NCCL allows it while another thread waits in a call.
            let _ = unsafe { (self.nccl.comm_abort)(comm) };
        }
    }
}
