//! What a plan needs to know of a model: the configurations of its networks, and how it is run.

use serde::{Deserialize, Serialize};

use mindseye_engines::bundle::{Manifest, TextSpec};
use mindseye_engines::model::ConfigError;
use mindseye_engines::model::codec::LinearCodecConfig;
use mindseye_engines::model::depth::DepthConfig;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5::Umt5Config;
use mindseye_engines::model::vae::VaeConfig;

/// How the model is run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Latent frames of context.
    pub context_latents: u64,
    /// Latent frames imagined, the given first one included.
    pub target_latents: u64,
    /// Denoising steps.
    pub steps: u64,
    /// Forward passes per step (2 with classifier-free guidance).
    pub branches: u64,
    /// Rollouts sampled for one answer.
    pub candidates: u64,
    /// True when context keys and values are computed once (one-way mask).
    pub cached_context: bool,
}

/// Everything that a plan needs to know of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSpec {
    /// Name.
    pub name: String,
    /// The denoiser.
    pub dit: DitConfig,
    /// The video VAE, if that is the codec.
    pub vae: Option<VaeConfig>,
    /// The linear codec, if that is the codec.
    pub codec: Option<LinearCodecConfig>,
    /// The text encoder.
    pub text_encoder: Option<Umt5Config>,
    /// The depth reader, if there is one.
    pub depth: Option<DepthConfig>,
    /// How it is run.
    pub workload: Workload,
}

/// Why a model cannot be planned for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// A text that is not the TOML that is expected.
    #[error("{what}: {source}")]
    Toml {
        /// Which file or table.
        what: String,
        /// What is wrong, with the line.
        #[source]
        source: toml::de::Error,
    },
    /// Sizes that do not fit each other.
    #[error(transparent)]
    Sizes(#[from] ConfigError),
    /// A size of the workload out of its range.
    #[error("workload.{field} = {got} is not between {least} and 2^20")]
    Workload {
        /// Which.
        field: &'static str,
        /// Its value.
        got: u64,
        /// The least that is allowed.
        least: u64,
    },
}

/// A model file (`configs/models/*.toml`); tables that a plan does not need are ignored.
#[derive(Deserialize)]
struct Wire {
    name: String,
    dit: DitConfig,
    vae: Option<VaeConfig>,
    umt5: Option<Umt5Config>,
    codec: Option<LinearCodecConfig>,
    text: Option<ClosedText>,
    layout: LayoutTable,
    sampler: Option<SamplerTable>,
}

/// The closed vocabulary of a small model.
#[derive(Deserialize)]
struct ClosedText {
    words: Option<Vec<String>>,
    eps: Option<f32>,
}

#[derive(Deserialize)]
struct LayoutTable {
    context_latents: u64,
    motion_latents: u64,
    box_latents: u64,
}

#[derive(Deserialize)]
struct SamplerTable {
    steps: u64,
    guidance: f64,
}

/// The text encoder of a closed vocabulary: the embedding and the final norm.
fn embedding(text: &ClosedText, dit: &DitConfig) -> Option<Umt5Config> {
    Some(Umt5Config {
        vocab_size: text.words.as_ref()?.len() + mindseye_engines::text::FIRST_WORD,
        d_model: dit.text_dim,
        d_kv: 0,
        d_ff: 0,
        num_layers: 0,
        num_heads: 0,
        buckets: 0,
        max_distance: 0,
        eps: text.eps.unwrap_or(dit.eps),
    })
}

/// Rollouts of one answer where nothing else is said: the heads' opinions are averaged over four; without heads one is
/// all that is looked at.
fn usual_candidates(dit: &DitConfig) -> u64 {
    if dit.lift { 4 } else { 1 }
}

fn branches(guidance: f64) -> u64 {
    if guidance == 1.0 { 1 } else { 2 }
}

impl ModelSpec {
    /// Reads a model file: the sizes of its `[layout]`, its sampler's defaults.
    ///
    /// # Errors
    /// The key and what is wrong with it.
    pub fn from_toml(text: &str) -> Result<ModelSpec, SpecError> {
        let wire: Wire =
            toml::from_str(text).map_err(|source| SpecError::Toml { what: "model file".into(), source })?;
        let sampler = wire.sampler.unwrap_or(SamplerTable { steps: 1, guidance: 1.0 });
        let spec = ModelSpec {
            vae: wire.vae,
            text_encoder: wire.umt5.or_else(|| embedding(wire.text.as_ref()?, &wire.dit)),
            codec: wire.codec,
            depth: None,
            workload: Workload {
                context_latents: wire.layout.context_latents,
                // The first image of the motion is a latent of its own.
                target_latents: wire.layout.motion_latents + wire.layout.box_latents + 1,
                steps: sampler.steps,
                branches: branches(sampler.guidance),
                candidates: usual_candidates(&wire.dit),
                cached_context: false,
            },
            name: wire.name,
            dit: wire.dit,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Reads a bundle's manifest: the most latents that it allows, its sampler's defaults.
    ///
    /// # Errors
    /// The field and what is wrong with it.
    pub fn from_manifest(manifest: &Manifest) -> Result<ModelSpec, SpecError> {
        let networks = &manifest.networks;
        let dit = manifest.dit.clone();
        let words = match &networks.text {
            Some(TextSpec::Closed { words, .. }) => Some(words.clone()),
            _ => None,
        };
        let text = ClosedText { words, eps: None };
        let spec = ModelSpec {
            name: manifest.name.clone(),
            vae: networks.vae.clone(),
            text_encoder: networks.umt5.clone().or_else(|| embedding(&text, &dit)),
            codec: networks.codec,
            depth: networks.depth.clone().filter(|_| manifest.component.contains_key("depth")),
            workload: Workload {
                context_latents: manifest.limits.context_allowed as u64,
                target_latents: manifest.limits.target_allowed as u64,
                steps: manifest.sampler.steps as u64,
                branches: branches(manifest.sampler.guidance),
                candidates: usual_candidates(&dit),
                cached_context: ["denoiser_prefill", "denoiser_cached"]
                    .iter()
                    .all(|half| manifest.component.contains_key(*half)),
            },
            dit,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Checks sizes.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn check(&self) -> Result<(), SpecError> {
        self.dit.validate()?;
        for checked in [
            self.codec.as_ref().map(LinearCodecConfig::validate),
            self.vae.as_ref().map(VaeConfig::validate),
            self.text_encoder.as_ref().map(Umt5Config::validate),
            self.depth.as_ref().map(DepthConfig::validate),
        ] {
            checked.unwrap_or(Ok(()))?;
        }
        let w = &self.workload;
        for (field, got, least) in [
            ("context_latents", w.context_latents, 0),
            ("target_latents", w.target_latents, 1),
            ("steps", w.steps, 1),
            ("branches", w.branches, 1),
            ("candidates", w.candidates, 1),
        ] {
            if got < least || got > 1 << 20 {
                return Err(SpecError::Workload { field, got, least });
            }
        }
        Ok(())
    }
}
