//! The small member of the family, by configuration: codec, text rows, diffusion transformer, sequence layout.

use std::path::{Path, PathBuf};

use mindseye_engines::model::ConfigError;
use mindseye_engines::model::codec::LinearCodecConfig;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5::Umt5Config;
use serde::{Deserialize, Serialize};

pub use mindseye_engines::text::{END, FIRST_WORD};

/// `configs/models/house-tiny.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HouseModel {
    /// Name of the model.
    pub name: String,
    /// The denoiser.
    pub dit: DitConfig,
    /// The video codec.
    pub codec: LinearCodecConfig,
    /// The text encoder's sizes.
    pub text: TextConfig,
    /// How a sequence is laid out.
    pub layout: SequenceLayout,
}

/// The text encoder: a umT5 encoder without blocks (embedding and final norm) over a closed vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Words that the model knows, colours first; other words of a goal carry no meaning for it.
    pub words: Vec<String>,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// Sequence layout in latents and images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceLayout {
    /// Images of one recording that context groups are taken from.
    pub recording_images: usize,
    /// Context latents per sample.
    pub context_latents: usize,
    /// Latents of motion after the first image.
    pub motion_latents: usize,
    /// Latents of still images with the red box at the end.
    pub box_latents: usize,
    /// Distance between the last context index and the first target index.
    pub gap: usize,
}

/// Why TOML could not be read: one line, with its place in the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct ParseError {
    /// Line of the text, from 1; 0 where it is not known.
    pub line: usize,
    /// What is wrong there. The parser's own error shows the text over several lines.
    pub reason: String,
}

/// Reads TOML.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, ParseError> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(0, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        ParseError { line, reason: e.message().to_owned() }
    })
}

/// Why a model configuration cannot be used for training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadModelError {
    /// The file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The file is no such configuration.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: ParseError,
    },
    /// A model of the family that cannot be trained here.
    #[error(
        "{path}: [{part}]: only models with a linear codec and a list of words can be trained here: give [codec] \
         and [text], as in configs/models/house-tiny.toml"
    )]
    NotTrainable {
        /// The file.
        path: PathBuf,
        /// Its table that there is no training for.
        part: &'static str,
    },
    /// The parts do not fit each other.
    #[error("{path}: {source}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: ModelError,
    },
}

/// Parts of a model that do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Sizes of the denoiser or of the codec.
    #[error(transparent)]
    Sizes(#[from] ConfigError),
    /// Latents of the codec are not those of the denoiser.
    #[error("codec latents are {}x{}, dit expects {}x{}", .codec[0], .codec[1], .dit[0], .dit[1])]
    LatentSize {
        /// Height and width of the codec's latents.
        codec: [usize; 2],
        /// Height and width of the denoiser's latents.
        dit: [usize; 2],
    },
    /// Codec and denoiser differ in channels.
    #[error("codec has {codec} channels, dit {dit}")]
    Channels {
        /// Channels of the codec.
        codec: usize,
        /// Channels of the denoiser.
        dit: usize,
    },
    /// Too few rows of text.
    #[error("dit.text_len = {0}: a name needs three rows (colour, shape, end)")]
    TextRows(usize),
    /// A count of the layout is too small.
    #[error("layout: every count must be at least 1, recording_images at least 8")]
    Layout,
}

impl HouseModel {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`LoadModelError`] names the file and the field.
    pub fn load(path: &Path) -> Result<Self, LoadModelError> {
        let at = || path.to_path_buf();
        let text =
            std::fs::read_to_string(path).map_err(|source| LoadModelError::Io { path: at(), source })?;
        // The family's large member is a configuration too, but not one that can be trained here.
        let table: toml::Table = toml::from_str(&text).unwrap_or_default();
        if let Some(part) = ["vae", "umt5"].into_iter().find(|p| table.contains_key(*p)) {
            return Err(LoadModelError::NotTrainable { path: at(), part });
        }
        let model: Self = parse(&text).map_err(|source| LoadModelError::Parse { path: at(), source })?;
        model.validate().map_err(|source| LoadModelError::Invalid { path: at(), source })?;
        Ok(model)
    }

    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// [`ModelError`] names the field.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.dit.validate()?;
        self.codec.validate()?;
        let (height, width) = self.codec.latent_size();
        let dit = [self.dit.latent_height, self.dit.latent_width];
        if [height, width] != dit {
            return Err(ModelError::LatentSize { codec: [height, width], dit });
        }
        if self.codec.channels != self.dit.in_channels {
            return Err(ModelError::Channels { codec: self.codec.channels, dit: self.dit.in_channels });
        }
        if self.dit.text_len < 3 {
            return Err(ModelError::TextRows(self.dit.text_len));
        }
        let l = &self.layout;
        if l.context_latents == 0 || l.motion_latents == 0 || l.box_latents == 0 || l.recording_images < 8 {
            return Err(ModelError::Layout);
        }
        Ok(())
    }

    /// Target latents: first image, motion, box.
    #[must_use]
    pub fn target_latents(&self) -> usize {
        1 + self.layout.motion_latents + self.layout.box_latents
    }

    /// All latents of one sample.
    #[must_use]
    pub fn latents(&self) -> usize {
        self.layout.context_latents + self.target_latents()
    }

    /// The text encoder: a umT5 without blocks.
    #[must_use]
    pub fn umt5(&self) -> Umt5Config {
        Umt5Config {
            vocab_size: self.vocabulary(),
            d_model: self.dit.text_dim,
            d_kv: 1,
            d_ff: 1,
            num_layers: 0,
            num_heads: 1,
            buckets: 32,
            max_distance: 128,
            eps: self.text.eps,
        }
    }

    /// Size of the embedding table.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        FIRST_WORD + self.text.words.len()
    }
}
