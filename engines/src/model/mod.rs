//! The model family: each network once, generic over [`Ops`].

pub mod codec;
pub mod depth;
pub mod dit;
pub mod ops;
pub mod umt5;
pub mod vae;

pub use ops::Ops;

/// Why a configuration describes no network: a size that is out of range, or does not fit another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {got}: expected {wanted}")]
pub struct ConfigError {
    /// The field, with its table: `dit.heads`.
    pub field: String,
    /// Its value, with those that it depends on.
    pub got: String,
    /// What would do.
    pub wanted: String,
}

impl ConfigError {
    fn new(field: impl Into<String>, got: impl ToString, wanted: impl Into<String>) -> Self {
        Self { field: field.into(), got: got.to_string(), wanted: wanted.into() }
    }

    /// Refuses sizes that are zero or larger than `most`.
    fn check_sizes<'a>(
        table: &str,
        sizes: impl IntoIterator<Item = (&'a str, usize)>,
        most: usize,
    ) -> Result<(), Self> {
        match sizes.into_iter().find(|(_, value)| *value == 0 || *value > most) {
            Some((name, value)) => Err(Self::new(format!("{table}.{name}"), value, format!("1 to {most}"))),
            None => Ok(()),
        }
    }
}

/// Name and shape of one weight, as the networks ask for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Canonical (diffusers) name.
    pub name: String,
    /// Shape, slowest axis first.
    pub shape: Vec<usize>,
}
