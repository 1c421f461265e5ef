//! The model family: each network once, generic over [`Ops`].

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
