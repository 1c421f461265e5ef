//! Shared libraries that are opened at run time, their functions looked up all at once.

/// The type that a function returns: a status where none is given.
macro_rules! returned {
    () => {
        std::ffi::c_int
    };
    ($type:ty) => {
        $type
    };
}

/// A structure of functions, with a `load` that looks each up by its symbol or names the first that is missing.
macro_rules! functions {
    ($needed:literal; $($(#[$doc:meta])* $field:ident = $symbol:literal ($($argument:ty),*) $(-> $return:ty)?;)*) => {
        /// The functions of the library that are used.
        struct Functions {
            path: std::path::PathBuf,
            $($(#[$doc])* $field: unsafe extern "C" fn($($argument),*) -> $crate::cuda::library::returned!($($return)?),)*
        }

        impl Functions {
            fn load(library: &'static libloading::Library, path: std::path::PathBuf) -> Result<Self, CudaError> {
                $(
                    // SAFETY: the type is that of the library's header for this name; the library stays open.
                    let found = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> $crate::cuda::library::returned!($($return)?)>(
                            concat!($symbol, "\0").as_bytes(),
                        )
                    };
                    let $field = match found {
                        Ok(function) => *function,
                        Err(_) => return Err(CudaError::Symbol { path, symbol: $symbol, needed: $needed }),
                    };
                )*
                Ok(Functions { path, $($field,)* })
            }

            /// Opens the library at `path`, or the one that the loader finds under this name. It stays open until the
            /// process ends.
            fn open(path: &std::path::Path, variable: &'static str) -> Result<Self, CudaError> {
                // SAFETY: the initialisers of NVIDIA's libraries are trusted.
                let library = unsafe { libloading::Library::new(path) }.map_err(|e| CudaError::Library {
                    variable,
                    path: path.to_owned(),
                    reason: e.to_string(),
                })?;
                Functions::load(Box::leak(Box::new(library)), path.to_owned())
            }
        }
    };
}

pub(super) use {functions, returned};
