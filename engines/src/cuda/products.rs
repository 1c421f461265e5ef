//! Matrix products by cuBLASLt, where it is found: its library, the algorithm for each shape, the call.
//!
//! Our own kernels multiply whatever comes. The library takes over the products that it is made for, by a fixed rule:
//! linear layers of bf16 on the tensor cores, not batched, of [`LEAST_ROWS`] rows and more, with a bias or none, with
//! the tanh form of GELU or nothing behind it. A product for which it offers no algorithm stays ours.
//!
//! Sums keep a fixed order: only algorithms without reductions over a split depth are asked for, the first one that the
//! library names is taken, and it is kept by shape. So the bytes depend on card, library version and shape alone;
//! [`crate::backend::Backend::version`] names card and version.
//!
//! cuBLASLt counts matrices by columns. Our rows of `out[m, n] = x[m, k] w[k, n]` are its columns of `outᵀ = wᵀ xᵀ`:
//! the first operand is `w` (`n` by `k`, leading dimension `n`), the second `x` (`k` by `m`, leading dimension `k`), and
//! the bias of `n` elements goes along the result's columns, as its epilogues want it. Nothing is transposed.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))] // devices know kernels that only the engine calls

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use super::CudaError;
use super::kernels::Element;
use super::library::functions;
use crate::python::python_packages;

/// The environment variable that names cuBLASLt's library or its folder; `none` leaves all products to our kernels.
pub const PRODUCTS_VARIABLE: &str = "MINDSEYE_CUBLASLT_LIBRARY";

/// Fewer rows than this are left to our kernels: there is less to gain than a call costs.
pub(super) const LEAST_ROWS: usize = 64;
/// Most scratch memory of a product.
const WORKSPACE_BYTES: u64 = 32 << 20;

const FILES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
const FOLDERS: [&str; 5] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/local/cuda/targets/aarch64-linux/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
];

// Numbers of `cublasLt.h` and `library_types.h`.
const FLOAT: c_int = 0;
const BFLOAT16: c_int = 14;
const COMPUTE_FLOAT: c_int = 68;
const OPERATION_COMPUTE_TYPE: c_int = 0;
const OPERATION_SCALE_TYPE: c_int = 1;
const OPERATION_EPILOGUE: c_int = 7;
const OPERATION_BIAS_POINTER: c_int = 8;
const OPERATION_BIAS_TYPE: c_int = 26;
const EPILOGUE_NOTHING: u32 = 1;
const EPILOGUE_BIAS: u32 = 4;
const EPILOGUE_GELU: u32 = 32;
const LAYOUT_TYPE: c_int = 0;
const LAYOUT_ROWS: c_int = 2;
const LAYOUT_COLUMNS: c_int = 3;
const LAYOUT_LEADING: c_int = 4;
const PREFERENCE_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTIONS: c_int = 3;
const NO_REDUCTION: u32 = 0;

type Handle = *mut c_void;

/// An algorithm, as the library describes it to itself.
#[repr(C)]
#[derive(Clone, Copy)]
struct Algorithm([u64; 8]);

/// What the library says of an algorithm: `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

functions! {
    "it is not cuBLASLt 12 or 13";
    version = "cublasLtGetVersion"() -> usize;
    status_name = "cublasLtGetStatusName"(c_int) -> *const c_char;
    create = "cublasLtCreate"(*mut Handle);
    destroy = "cublasLtDestroy"(Handle);
    operation_create = "cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int);
    operation_set = "cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize);
    operation_get = "cublasLtMatmulDescGetAttribute"(Handle, c_int, *mut c_void, usize, *mut usize);
    operation_destroy = "cublasLtMatmulDescDestroy"(Handle);
    layout_create = "cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64);
    layout_get = "cublasLtMatrixLayoutGetAttribute"(Handle, c_int, *mut c_void, usize, *mut usize);
    layout_destroy = "cublasLtMatrixLayoutDestroy"(Handle);
    preference_create = "cublasLtMatmulPreferenceCreate"(*mut Handle);
    preference_set = "cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize);
    preference_destroy = "cublasLtMatmulPreferenceDestroy"(Handle);
    heuristic = "cublasLtMatmulAlgoGetHeuristic"(
        Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int
    );
    matmul = "cublasLtMatmul"(
        Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void,
        Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle
    );
}

/// A product `out[m, n] = gelu(x[m, k] w[k, n] + bias[n])` of bf16, in order; the bias has the result's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProductShape {
    /// Rows of `x` and of the result.
    pub m: usize,
    /// Columns of `w` and of the result.
    pub n: usize,
    /// What is summed over.
    pub k: usize,
    /// Whether the result is bf16, else f32.
    pub bf16: bool,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether GELU, in its tanh form, comes last.
    pub gelu: bool,
}

impl ProductShape {
    /// Element type of the result.
    pub(super) fn element(self) -> Element {
        if self.bf16 { Element::Bf16 } else { Element::F32 }
    }

    fn result_type(self) -> c_int {
        if self.bf16 { BFLOAT16 } else { FLOAT }
    }

    fn epilogue(self) -> u32 {
        match (self.bias, self.gelu) {
            (false, false) => EPILOGUE_NOTHING,
            (bias, gelu) => (if bias { EPILOGUE_BIAS } else { 0 }) | if gelu { EPILOGUE_GELU } else { 0 },
        }
    }

    /// Type, rows, columns and leading dimension of `w`, `x` and the result, as the library counts.
    fn layouts(self) -> [(c_int, usize, usize); 3] {
        let Self { m, n, k, .. } = self;
        [(BFLOAT16, n, k), (BFLOAT16, k, m), (self.result_type(), n, m)]
    }
}

/// A product with its addresses; 0 where there is none.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// What is multiplied.
    pub shape: ProductShape,
    /// `x`, `w`, bias, result.
    pub operands: [u64; 4],
    /// As many bytes as [`super::Device::product_workspace`] said.
    pub workspace: u64,
}

/// Descriptors of one product.
struct Descriptors<'l> {
    library: &'l Functions,
    operation: Handle,
    layouts: [Handle; 3],
}

impl Drop for Descriptors<'_> {
    fn drop(&mut self) {
        // SAFETY: each was made below, is destroyed once, and null where it was not made.
        unsafe {
            for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
                (self.library.layout_destroy)(layout);
            }
            if !self.operation.is_null() {
                (self.library.operation_destroy)(self.operation);
            }
        }
    }
}

impl Functions {
    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: returns a constant of the library, or null.
        let name = unsafe { (self.status_name)(code) };
        let reason = if name.is_null() {
            format!("status {code}")
        } else {
            // SAFETY: a NUL-terminated constant of the library.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        Err(CudaError::Call { call, reason })
    }

    fn set<T>(&self, operation: Handle, attribute: c_int, value: &T) -> Result<(), CudaError> {
        // SAFETY: reads as many bytes as the value has.
        let code = unsafe {
            (self.operation_set)(operation, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        };
        self.check("cublasLtMatmulDescSetAttribute", code)
    }

    fn describe(&self, shape: ProductShape, bias: u64) -> Result<Descriptors<'_>, CudaError> {
        let mut made = Descriptors { library: self, operation: null_mut(), layouts: [null_mut(); 3] };
        // SAFETY: one handle is written, which `made` destroys.
        let code = unsafe { (self.operation_create)(&raw mut made.operation, COMPUTE_FLOAT, FLOAT) };
        self.check("cublasLtMatmulDescCreate", code)?;
        self.set(made.operation, OPERATION_EPILOGUE, &shape.epilogue())?;
        if shape.bias {
            self.set(made.operation, OPERATION_BIAS_POINTER, &bias)?;
            self.set(made.operation, OPERATION_BIAS_TYPE, &shape.result_type())?;
        }
        for (layout, (dtype, rows, columns)) in made.layouts.iter_mut().zip(shape.layouts()) {
            // SAFETY: as above.
            let code = unsafe {
                (self.layout_create)(&raw mut *layout, dtype, rows as u64, columns as u64, rows as i64)
            };
            self.check("cublasLtMatrixLayoutCreate", code)?;
        }
        Ok(made)
    }

    /// Reads back what a product was described by: a library that counts its attributes otherwise is not used.
    fn understands(&self) -> Result<(), CudaError> {
        let shape = ProductShape { m: 200, n: 136, k: 72, bf16: true, bias: true, gelu: true };
        let bias = 0x1234_5600u64;
        let made = self.describe(shape, bias)?;
        type Get = unsafe extern "C" fn(Handle, c_int, *mut c_void, usize, *mut usize) -> c_int;
        let same = |get: Get, of: Handle, attribute: c_int, bytes: usize, wanted: u64| {
            let (mut value, mut written) = (0u64, 0usize);
            // SAFETY: at most eight bytes are written to `value`, and one integer.
            let code = unsafe { get(of, attribute, (&raw mut value).cast(), bytes, &raw mut written) };
            self.check("reading an attribute back", code)?;
            if value == wanted {
                return Ok(());
            }
            let reason = format!("attribute {attribute} of {bytes} bytes reads {value}, not {wanted}");
            Err(CudaError::Call { call: "a description in cuBLASLt", reason })
        };
        let number = |value: c_int| u64::from(value.cast_unsigned());
        for (attribute, bytes, wanted) in [
            (OPERATION_COMPUTE_TYPE, 4, number(COMPUTE_FLOAT)),
            (OPERATION_SCALE_TYPE, 4, number(FLOAT)),
            (OPERATION_EPILOGUE, 4, 36),
            (OPERATION_BIAS_POINTER, 8, bias),
            (OPERATION_BIAS_TYPE, 4, number(BFLOAT16)),
        ] {
            same(self.operation_get, made.operation, attribute, bytes, wanted)?;
        }
        for (layout, (dtype, rows, columns)) in made.layouts.into_iter().zip(shape.layouts()) {
            same(self.layout_get, layout, LAYOUT_TYPE, 4, number(dtype))?;
            same(self.layout_get, layout, LAYOUT_ROWS, 8, rows as u64)?;
            same(self.layout_get, layout, LAYOUT_COLUMNS, 8, columns as u64)?;
            same(self.layout_get, layout, LAYOUT_LEADING, 8, rows as u64)?;
        }
        Ok(())
    }

    fn version_text(&self) -> String {
        // SAFETY: takes nothing.
        let version = unsafe { (self.version)() };
        // 130100 is 13.1.0.
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }
}

/// Opens the library at `path` as an engine would, without a device: its version, once it has understood how a product
/// is described to it.
///
/// # Errors
/// [`CudaError::Library`], [`CudaError::Symbol`]; [`CudaError::Call`] for a description that reads otherwise.
pub fn product_library(path: &Path) -> Result<String, CudaError> {
    let library = Functions::open(path, PRODUCTS_VARIABLE)?;
    library.understands()?;
    Ok(library.version_text())
}

/// cuBLASLt with a handle for one device.
pub(super) struct Products {
    library: Functions,
    handle: usize,
    /// Algorithm and bytes of scratch memory by shape; none where the library has no algorithm.
    known: Mutex<HashMap<ProductShape, Option<(Algorithm, usize)>>>,
}

impl Products {
    /// Looks for the library: where the variable says; beside `driver`, the file of a driver that was named; else where
    /// the loader and NVIDIA's packages have it. The device's context is current. None where there is none.
    ///
    /// # Errors
    /// What [`PRODUCTS_VARIABLE`] names cannot be used.
    pub fn find(driver: Option<&Path>) -> Result<Option<Arc<Products>>, CudaError> {
        if let Some(named) = std::env::var_os(PRODUCTS_VARIABLE) {
            if named == "none" {
                return Ok(None);
            }
            let named = PathBuf::from(named);
            let inside = || FILES.iter().map(|f| named.join(f)).find(|f| f.is_file());
            let file = if named.is_dir() { inside() } else { None };
            return Products::open(&file.unwrap_or(named)).map(|found| Some(Arc::new(found)));
        }
        let folders = match driver.and_then(Path::parent) {
            Some(folder) => vec![folder.to_owned()],
            None => folders(),
        };
        for path in FILES.iter().flat_map(|file| folders.iter().map(move |folder| folder.join(file))) {
            match Products::open(&path) {
                Ok(found) => return Ok(Some(Arc::new(found))),
                Err(CudaError::Library { .. }) => {}
                Err(error) => tracing::warn!("{} is not used: {error}", path.display()),
            }
        }
        Ok(None)
    }

    fn open(path: &Path) -> Result<Products, CudaError> {
        let library = Functions::open(path, PRODUCTS_VARIABLE)?;
        library.understands()?;
        let mut handle = null_mut();
        // SAFETY: one handle is written; a context is current.
        library.check("cublasLtCreate", unsafe { (library.create)(&raw mut handle) })?;
        let products = Products { library, handle: handle as usize, known: Mutex::default() };
        tracing::info!("products by {}", products.description());
        Ok(products)
    }

    /// Version and file.
    pub fn description(&self) -> String {
        format!("cuBLASLt {} ({})", self.library.version_text(), mapped(&self.library.path).display())
    }

    fn algorithm(&self, shape: ProductShape) -> Option<(Algorithm, usize)> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry(shape).or_insert_with(|| {
            self.ask(shape).unwrap_or_else(|error| {
                tracing::warn!("{shape:?} stays with our own kernels: {error}");
                None
            })
        })
    }

    /// The first algorithm that the library names.
    fn ask(&self, shape: ProductShape) -> Result<Option<(Algorithm, usize)>, CudaError> {
        let library = &self.library;
        // Biases lie at multiples of this.
        let made = library.describe(shape, 256)?;
        let mut preference = null_mut();
        // SAFETY: one handle is written, which is destroyed below.
        let code = unsafe { (library.preference_create)(&raw mut preference) };
        library.check("cublasLtMatmulPreferenceCreate", code)?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: `value` is that long.
            let code = unsafe { (library.preference_set)(preference, attribute, value, bytes) };
            library.check("cublasLtMatmulPreferenceSetAttribute", code)
        };
        let empty = Heuristic {
            algorithm: Algorithm([0; 8]),
            workspace_bytes: 0,
            state: -1,
            waves: 0.0,
            reserved: [0; 4],
        };
        let (mut found, mut count) = (empty, 0);
        let (most, reductions) = (WORKSPACE_BYTES, NO_REDUCTION);
        let asked = set(PREFERENCE_WORKSPACE, (&raw const most).cast(), 8)
            .and_then(|()| set(PREFERENCE_REDUCTIONS, (&raw const reductions).cast(), 4))
            .map(|()| {
                let [w, x, out] = made.layouts;
                // SAFETY: all handles live; one result and one integer are written.
                unsafe {
                    (library.heuristic)(
                        self.handle as Handle,
                        made.operation,
                        w,
                        x,
                        out,
                        out,
                        preference,
                        1,
                        &raw mut found,
                        &raw mut count,
                    )
                }
            });
        // SAFETY: made above, destroyed once.
        unsafe { (library.preference_destroy)(preference) };
        // A status says that there is none; so does a count of zero.
        Ok((asked? == 0 && count > 0 && found.state == 0).then_some((found.algorithm, found.workspace_bytes)))
    }

    /// Bytes of scratch memory for a product; none where the library has no algorithm for it.
    pub fn workspace(&self, shape: ProductShape) -> Option<usize> {
        self.algorithm(shape).map(|(_, bytes)| bytes)
    }

    /// Queues a product on a stream.
    ///
    /// # Safety
    /// Operands are as large as the shape says, the scratch memory as [`Products::workspace`] said.
    ///
    /// # Errors
    /// A failed call, or a shape for which the library has no algorithm.
    pub unsafe fn multiply(&self, product: &Product, stream: Handle) -> Result<(), CudaError> {
        let Some((algorithm, workspace)) = self.algorithm(product.shape) else {
            let reason = format!("no algorithm for {:?}", product.shape);
            return Err(CudaError::Call { call: "cublasLtMatmul", reason });
        };
        let [x, w, bias, out] = product.operands;
        let made = self.library.describe(product.shape, bias)?;
        let (one, zero) = (1.0f32, 0.0f32);
        let [w_layout, x_layout, out_layout] = made.layouts;
        // SAFETY: the caller promises the operands; numbers and algorithm are read before the call returns.
        let code = unsafe {
            (self.library.matmul)(
                self.handle as Handle,
                made.operation,
                (&raw const one).cast(),
                w as *const c_void,
                w_layout,
                x as *const c_void,
                x_layout,
                (&raw const zero).cast(),
                out as *const c_void,
                out_layout,
                out as *mut c_void,
                out_layout,
                &raw const algorithm,
                product.workspace as *mut c_void,
                workspace,
                stream,
            )
        };
        self.library.check("cublasLtMatmul", code)
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `open`, last used here.
        let code = unsafe { (self.library.destroy)(self.handle as Handle) };
        if let Err(e) = self.library.check("cublasLtDestroy", code) {
            tracing::warn!("{e}");
        }
    }
}

/// Where the library may lie: first wherever the loader looks, then NVIDIA's folders, then those of Python's packages.
fn folders() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::iter::once("").chain(FOLDERS).map(PathBuf::from).collect();
    for packages in python_packages() {
        all.extend(["cu13", "cublas"].map(|p| packages.join("nvidia").join(p).join("lib")));
    }
    all
}

/// The whole path of a library that is open under this name.
fn mapped(path: &Path) -> PathBuf {
    let maps = match path.is_absolute() {
        true => String::new(),
        false => std::fs::read_to_string("/proc/self/maps").unwrap_or_default(),
    };
    let file = |line: &str| line.find('/').map(|at| PathBuf::from(&line[at..]));
    let found = maps.lines().filter_map(file).find(|f| f.file_name() == path.file_name());
    found.unwrap_or_else(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_described_by_columns() {
        let shape = ProductShape { m: 3, n: 5, k: 7, bf16: false, bias: true, gelu: false };
        assert_eq!(shape.layouts(), [(BFLOAT16, 5, 7), (BFLOAT16, 7, 3), (FLOAT, 5, 3)]);
        let epilogue = |bias, gelu| ProductShape { bias, gelu, ..shape }.epilogue();
        assert_eq!(
            [epilogue(false, false), epilogue(true, false), epilogue(false, true), epilogue(true, true)],
            [1, 4, 32, 36]
        );
        assert_eq!(size_of::<Heuristic>(), 96);
    }
}
