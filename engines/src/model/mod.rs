//! The model family: each network once, generic over [`Ops`].

/// A [`SizesError`] from a format string.
macro_rules! sizes_error {
    ($($text:tt)*) => { $crate::model::SizesError::new(format!($($text)*)) };
}

pub mod codec;
pub mod dit;
pub mod ops;
pub mod umt5;
pub mod vae;

pub use ops::Ops;

/// Name and shape of one weight, as the networks ask for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Canonical (diffusers) name.
    pub name: String,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
}

/// Sizes of a network that do not fit each other: which field, what it is, what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct SizesError {
    what: String,
}

impl SizesError {
    fn new(what: String) -> Self {
        Self { what }
    }
}
