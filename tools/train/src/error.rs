//! Why training could not go on.

use std::path::{Path, PathBuf};

use mindseye_engines::text::TokenizerError;

use crate::autograd::DeviceError;
use crate::config::{ConfigError, SettingError};
use crate::distill::DistillError;
use crate::latents::LatentError;
use crate::ranks::RankError;

/// Why training could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A setting cannot be used.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The teacher of a distillation cannot be used.
    #[error(transparent)]
    Distill(#[from] DistillError),
    /// What the run was opened with does not fit its configuration.
    #[error("{0}")]
    Options(&'static str),
    /// The model's words are not those of the world's things.
    #[error(
        "[text] words: word {at} is {found:?}, but difficulty {difficulty:?} needs {wanted:?} there: list the colours \
             and then the nouns in the order of the world's kinds"
    )]
    Words {
        /// Name of the world's difficulty.
        difficulty: String,
        /// Place in the list, from 0.
        at: usize,
        /// What is there; empty past its end.
        found: String,
        /// What has to be there.
        wanted: &'static str,
    },
    /// Nothing in the data can be trained on.
    #[error("nothing to train on: {0}")]
    NoData(String),
    /// A file could not be read or written.
    #[error("{path}: {source}{}", hint(.source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A line of the metrics file cannot be read or written.
    #[error("{path}: line {line}: {source}")]
    Metrics {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A line of the metrics file names no step.
    #[error("{path}: line {line}: no step")]
    NoStep {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
    },
    /// A checkpoint is not of this run.
    #[error("checkpoint {path}: {reason}; remove it or give another --out")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A checkpoint is no safetensors file.
    #[error("checkpoint {path}: {source}; remove it or give another --out")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// A checkpoint is of another configuration.
    #[error(
        "checkpoint {path} is of another configuration: {differences}; give another --out, or \
         --other-configuration to go on all the same"
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// Where they differ.
        differences: String,
    },
    /// The device could not go on; the last checkpoint stays.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A tokenizer cannot be used.
    #[error("{path}: {source}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, or with the text.
        source: TokenizerError,
    },
    /// Pre-encoded latents cannot be used.
    #[error(transparent)]
    Latents(#[from] LatentError),
    /// Several ranks cannot train together, or one is lost; the last checkpoint stays.
    #[error(transparent)]
    Ranks(#[from] RankError),
    /// The loss is not a number any more.
    #[error("step {0}: the loss is not finite; lower optim.lr and resume from the last checkpoint")]
    Diverged(u64),
}

fn hint(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
        "; make room and run the same command again, it goes on from the last checkpoint"
    } else {
        ""
    }
}

/// Names the file of an I/O error.
pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> TrainError + '_ {
    move |source| TrainError::Io { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_comes_with_what_to_do() {
        let written = std::fs::write("/dev/full", b"x").map_err(io(Path::new("run/checkpoint.safetensors")));
        let said = written.expect_err("every write to this device fails").to_string();
        assert!(said.contains("run/checkpoint.safetensors: No space left"), "{said}");
        assert!(said.contains("make room and run the same command again"), "{said}");
        let other = io(Path::new("a"))(std::io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(!other.contains("make room"), "{other}");
    }
}
