//! Finding, opening and asking TensorRT's libraries.
#![allow(unsafe_code)] // FFI fence: dlopen and exported functions.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::abi::{Abi, UnknownVersion, Version};
use super::ffi::Object;
use super::log::Logger;
use crate::cuda::{self, CudaError, DriverInfo};

/// Why TensorRT cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibraryError {
    /// No file of a known name in any known place.
    #[error(
        "no TensorRT library found (looked for {names} in {places}); pass --lib FOLDER or set MINDSEYE_TENSORRT_LIB_DIR"
    )]
    NotFound {
        /// File names tried.
        names: String,
        /// Folders tried.
        places: String,
    },
    /// A file that the loader refuses.
    #[error("cannot open {path}: {reason}")]
    Open {
        /// The file.
        path: String,
        /// The loader's words.
        reason: String,
    },
    /// A function that should be exported.
    #[error("{path} does not export {symbol}: it is not a TensorRT library")]
    Symbol {
        /// The file.
        path: String,
        /// The function.
        symbol: &'static str,
    },
    /// A version that has no slot table.
    #[error("{path}: {source}")]
    Version {
        /// The file.
        path: String,
        /// What is supported.
        source: UnknownVersion,
    },
    /// The library wants a GPU, and CUDA is not usable.
    #[error("TensorRT {version} needs a GPU: {source}")]
    Cuda {
        /// Library version.
        version: Version,
        /// The cause.
        source: CudaError,
    },
    /// The library returned no object.
    #[error("TensorRT {version} could not create its {what}{log}")]
    Create {
        /// Library version.
        version: Version,
        /// What was asked for.
        what: &'static str,
        /// What it logged, after a colon.
        log: String,
    },
}

/// The environment variable that names the folder of the libraries.
pub const LIB_DIR_VARIABLE: &str = "MINDSEYE_TENSORRT_LIB_DIR";

/// A family of file names: core library, parser library, and whether it is TensorRT-RTX.
const NAMES: [(&str, &str, bool); 3] = [
    ("libnvinfer.so.11", "libnvonnxparser.so.11", false),
    ("libnvinfer.so.10", "libnvonnxparser.so.10", false),
    ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1", true),
];

const PLACES: [&str; 9] = [
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/usr/local/tensorrt/lib",
    "/usr/src/tensorrt/lib",
    "/opt/tensorrt/lib",
    "/usr/local/cuda/lib64",
];

/// A probe of the CUDA driver.
pub type Probe = Arc<dyn Fn() -> Result<DriverInfo, CudaError> + Send + Sync>;

/// How to find and open the library.
#[derive(Clone)]
pub struct LoadOptions {
    /// File of the core library, or folder that holds it; searched for where not given.
    pub path: Option<PathBuf>,
    /// What to ask about CUDA before the library is used; [`cuda::probe`] by default. Stand-in libraries in tests
    /// come with a stand-in driver.
    pub probe: Probe,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { path: None, probe: Arc::new(cuda::probe) }
    }
}

impl LoadOptions {
    /// Default options with a file or folder.
    #[must_use]
    pub fn at(path: Option<PathBuf>) -> Self {
        LoadOptions { path, ..LoadOptions::default() }
    }
}

/// An opened TensorRT library. Stays in memory until the process ends.
pub struct Library {
    path: PathBuf,
    version: Version,
    abi: Abi,
    core: &'static libloading::Library,
    parser_path: PathBuf,
    logger: &'static Logger,
    driver: Option<DriverInfo>,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorRT {} at {}", self.version, self.path.display())
    }
}

impl Library {
    /// Finds and opens the library: at `options.path`; else in `MINDSEYE_TENSORRT_LIB_DIR`; else by name through the
    /// loader; else in the usual folders. Libraries that need a GPU are refused where CUDA is not usable.
    ///
    /// # Errors
    /// [`LibraryError`].
    pub fn find(options: &LoadOptions) -> Result<Library, LibraryError> {
        let (path, parser_path, rtx) = locate(options.path.as_deref())?;
        let shown = path.display().to_string();
        let core = open(&path)?;
        let number = |symbol: &'static str, name: &[u8]| {
            type Number = unsafe extern "C" fn() -> i32;
            // SAFETY: the exported version functions take nothing and return a 32-bit integer, in every version.
            let value = unsafe { core.get::<Number>(name).map(|f| f()) };
            value
                .map(|v| u32::try_from(v).unwrap_or(0))
                .map_err(|_| LibraryError::Symbol { path: shown.clone(), symbol })
        };
        let version = Version {
            major: number("getInferLibMajorVersion", b"getInferLibMajorVersion\0")?,
            minor: number("getInferLibMinorVersion", b"getInferLibMinorVersion\0")?,
            patch: number("getInferLibPatchVersion", b"getInferLibPatchVersion\0")?,
            build: number("getInferLibBuildVersion", b"getInferLibBuildVersion\0")?,
        };
        let abi = Abi::of(version, rtx).map_err(|source| LibraryError::Version { path: shown, source })?;
        let driver = match (options.probe)() {
            Ok(info) => Some(info),
            Err(source) if abi.needs_driver() => return Err(LibraryError::Cuda { version, source }),
            Err(reason) => {
                tracing::debug!("TensorRT {version} without a GPU: {reason}");
                None
            }
        };
        tracing::info!("TensorRT {version} ({abi:?}) at {}", path.display());
        Ok(Library { path, version, abi, core, parser_path, logger: Logger::leak(abi), driver })
    }

    /// The library's own version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its binary interface.
    #[must_use]
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The CUDA driver and devices; none on a machine without.
    #[must_use]
    pub fn driver(&self) -> Option<&DriverInfo> {
        self.driver.as_ref()
    }

    /// Takes what the library logged as errors since the last time.
    #[must_use]
    pub fn take_errors(&self) -> Vec<String> {
        self.logger.take_errors()
    }

    /// The logged errors as the tail of a message.
    pub(super) fn errors_text(&self) -> String {
        let errors = self.take_errors();
        if errors.is_empty() { String::new() } else { format!(": {}", errors.join("; ")) }
    }

    fn symbol_missing(&self, symbol: &'static str) -> LibraryError {
        LibraryError::Symbol { path: self.path.display().to_string(), symbol }
    }

    fn create(&self, what: &'static str, symbol: &'static str, name: &[u8]) -> Result<Object, LibraryError> {
        type Create = unsafe extern "C" fn(*mut c_void, i32) -> *mut c_void;
        let version = self.own_version_number()?;
        // SAFETY: `create...(logger, version)` of every supported version; the logger lives for ever, and the object
        // begins with INoCopy.
        let object = unsafe {
            let create = self.core.get::<Create>(name).map_err(|_| self.symbol_missing(symbol))?;
            Object::own(create(self.logger.pointer(), version))
        };
        object.ok_or_else(|| LibraryError::Create { version: self.version, what, log: self.errors_text() })
    }

    /// The number that headers of this very version would pass.
    fn own_version_number(&self) -> Result<i32, LibraryError> {
        type Number = unsafe extern "C" fn() -> i32;
        // SAFETY: takes nothing, returns an integer.
        unsafe { self.core.get::<Number>(b"getInferLibVersion\0").map(|f| f()) }
            .map_err(|_| self.symbol_missing("getInferLibVersion"))
    }

    pub(super) fn create_builder(&self) -> Result<Object, LibraryError> {
        self.create("builder", "createInferBuilder_INTERNAL", b"createInferBuilder_INTERNAL\0")
    }

    pub(super) fn create_runtime(&self) -> Result<Object, LibraryError> {
        self.create("runtime", "createInferRuntime_INTERNAL", b"createInferRuntime_INTERNAL\0")
    }

    /// A parser that fills `network`.
    pub(super) fn create_parser(&self, network: &Object) -> Result<Object, LibraryError> {
        type Create = unsafe extern "C" fn(*mut c_void, *mut c_void, i32) -> *mut c_void;
        type Number = unsafe extern "C" fn() -> i32;
        let library = open(&self.parser_path)?;
        let missing = |symbol| LibraryError::Symbol { path: self.parser_path.display().to_string(), symbol };
        // SAFETY: exported by every parser library; the network and the logger outlive the parser, and the deleting
        // destructor lies where the slot table says.
        let parser = unsafe {
            let version = library
                .get::<Number>(b"getNvOnnxParserVersion\0")
                .map_err(|_| missing("getNvOnnxParserVersion"))?();
            let create = library
                .get::<Create>(b"createNvOnnxParser_INTERNAL\0")
                .map_err(|_| missing("createNvOnnxParser_INTERNAL"))?;
            let pointer = create(network.pointer().as_ptr(), self.logger.pointer(), version);
            Object::own_with(pointer, self.abi.slots().parser_delete)
        };
        parser.ok_or_else(|| LibraryError::Create {
            version: self.version,
            what: "ONNX parser",
            log: self.errors_text(),
        })
    }
}

fn open(path: &Path) -> Result<&'static libloading::Library, LibraryError> {
    // SAFETY: opening runs the library's initialisers; the user named or installed it. It is never closed, so that
    // objects and the logger's vtable stay valid.
    let library = unsafe { libloading::Library::new(path) };
    match library {
        Ok(library) => Ok(Box::leak(Box::new(library))),
        Err(e) => Err(LibraryError::Open { path: path.display().to_string(), reason: e.to_string() }),
    }
}

/// Core library, parser library, RTX or not.
fn locate(path: Option<&Path>) -> Result<(PathBuf, PathBuf, bool), LibraryError> {
    if let Some(file) = path.filter(|p| p.is_file()) {
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let rtx = name.contains("tensorrt_rtx");
        // The parser has the same version suffix as the core: libnvinfer.so.10.3.0 -> libnvonnxparser.so.10.3.0.
        let parser = if rtx {
            name.replacen("tensorrt_rtx", "tensorrt_onnxparser_rtx", 1)
        } else {
            name.replacen("nvinfer", "nvonnxparser", 1)
        };
        return Ok((file.to_owned(), file.with_file_name(parser), rtx));
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    match (path, std::env::var_os(LIB_DIR_VARIABLE)) {
        (Some(folder), _) => folders.push(folder.to_owned()),
        (None, Some(folder)) if !folder.is_empty() => folders.push(folder.into()),
        (None, _) => folders.extend(PLACES.iter().map(PathBuf::from)),
    }
    // A Python wheel unpacks into a folder of this name.
    let nested: Vec<PathBuf> = folders.iter().map(|f| f.join("tensorrt_rtx_libs")).collect();
    folders.extend(nested);
    for folder in &folders {
        for (core, parser, rtx) in NAMES {
            if folder.join(core).is_file() {
                return Ok((folder.join(core), folder.join(parser), rtx));
            }
        }
    }
    if path.is_none() && std::env::var_os(LIB_DIR_VARIABLE).is_none_or(|v| v.is_empty()) {
        for (core, parser, rtx) in NAMES {
            if open(Path::new(core)).is_ok() {
                return Ok((core.into(), parser.into(), rtx));
            }
        }
    }
    Err(LibraryError::NotFound {
        names: NAMES.map(|(core, _, _)| core).join(", "),
        places: folders
            .iter()
            .filter(|f| f.exists() || path.is_some())
            .map(|f| f.display().to_string())
            .collect::<Vec<_>>()
            .join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_wrong_libraries_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let at = |p: PathBuf| Library::find(&LoadOptions::at(Some(p))).unwrap_err().to_string();
        let text = at(folder.path().to_owned());
        assert!(text.contains("libnvinfer.so.10") && text.contains("--lib"), "{text}");
        let file = folder.path().join("libnvinfer.so.10");
        std::fs::write(&file, b"not a library").unwrap();
        let text = at(folder.path().to_owned());
        assert!(text.contains("cannot open") && text.contains("libnvinfer.so.10"), "{text}");
    }
}
