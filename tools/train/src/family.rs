//! The small member of the family, by configuration: codec, text rows, diffusion transformer, sequence layout.

use std::path::Path;

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
    pub layout: Layout,
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
pub struct Layout {
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

/// Reads TOML; the error is one line and names the line of the text.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(0, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        format!("line {line}: {}", e.message())
    })
}

impl HouseModel {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// A sentence with the file and the field.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        // The family's large member is a configuration too, but not one that can be trained here.
        let table: toml::Table = toml::from_str(&text).unwrap_or_default();
        if let Some(part) = ["vae", "umt5"].into_iter().find(|p| table.contains_key(*p)) {
            return Err(format!(
                "{}: [{part}]: only models with a linear codec and a list of words can be trained here: give [codec] \
                 and [text], as in configs/models/house-tiny.toml",
                path.display()
            ));
        }
        let model: Self = parse(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        model.validate().map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(model)
    }

    /// Checks that the parts fit each other.
    ///
    /// # Errors
    /// A sentence naming the field.
    pub fn validate(&self) -> Result<(), String> {
        self.dit.validate()?;
        self.codec.validate()?;
        let (h, w) = self.codec.latent_size();
        if [h, w] != [self.dit.latent_height, self.dit.latent_width] {
            return Err(format!(
                "codec latents are {h}x{w}, dit expects {}x{}",
                self.dit.latent_height, self.dit.latent_width
            ));
        }
        if self.codec.channels != self.dit.in_channels {
            return Err(format!("codec has {} channels, dit {}", self.codec.channels, self.dit.in_channels));
        }
        if self.dit.text_len < 3 {
            return Err("dit.text_len: a name needs three rows (colour, shape, end)".into());
        }
        let l = &self.layout;
        if l.context_latents == 0 || l.motion_latents == 0 || l.box_latents == 0 || l.recording_images < 8 {
            return Err("layout: every count must be at least 1, recording_images at least 8".into());
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
