//! From a bundle of graphs back to the weights of training.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use mindseye_builder::checkpoint::names::{Component, umt5_params, vae_params};
use mindseye_builder::onnx::{
    DeclaredWeights, Way, WeightSource, codec_graph, denoiser_graph, text_encoder_graph,
};
use mindseye_engines::bundle::{Bundle, ComponentFormat, MANIFEST};
use mindseye_engines::count::{count_codec_encoder, count_denoiser, count_text};
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::onnx::{Dim, Model};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::text::Tokenizer;
use mindseye_train::autoencoder::Autoencoder;
use mindseye_train::eager::Params;
use mindseye_train::finetune::{Encoders, FineTuneConfig};
use mindseye_train::run::CHECKPOINT;
use mindseye_train::wan::WanModel;

use crate::import::{self, Part};

/// What names of the text encoder's weights begin with in training; its graph has them without it.
pub const TEXT_PREFIX: &str = "text.";

/// The components that hold all weights of a model, and what is put before their names.
const PARTS: [(&str, &str); 3] = [("denoiser", ""), ("text_encoder", TEXT_PREFIX), ("vae_encoder", "")];

/// The weights of a bundle of graphs under the names of training: the way back from [`crate::ship::ship`]. Heads that
/// only training has are not in a bundle.
///
/// Graphs say themselves which weight each constant is and what was done to it. Those of bundles from before they did
/// are compared with the same networks written anew.
///
/// # Errors
/// A bundle that cannot be read, a graph that lacks weights or is not one of this program's networks.
pub fn weights_of(bundle: &Path) -> anyhow::Result<Params> {
    let bundle = Bundle::load(bundle)?;
    let mut params = Params::new();
    for (component, prefix) in PARTS {
        let path = bundle.path(component)?;
        let mut model = Model::load(&path)?;
        if !model.graph.has_origins() {
            let network = written_anew(&bundle, component)?;
            model.graph.adopt_origins(&network.graph).with_context(|| {
                format!(
                    "{}: it does not say where its constants come from, and it is not the graph that this program \
                     writes for its configuration; continue from the run's checkpoint.safetensors instead",
                    path.display()
                )
            })?;
        }
        let weights = model.graph.stored_weights().with_context(|| path.display().to_string())?;
        if weights.is_empty() {
            bail!("{}: no weights in it", path.display());
        }
        for (name, (shape, values)) in weights {
            params.insert(&format!("{prefix}{name}"), &shape, values);
        }
    }
    Ok(params)
}

/// The weights of a bundle's depth reader under the names of training.
///
/// # Errors
/// A bundle that cannot be read or has none, a graph that does not say where its constants come from.
pub fn depth_of(bundle: &Path) -> anyhow::Result<Params> {
    let path = Bundle::load(bundle)?.path("depth")?;
    let weights = Model::load(&path)?.graph.stored_weights().with_context(|| path.display().to_string())?;
    let mut params = Params::new();
    for (name, (shape, values)) in weights {
        params.insert(&name, &shape, values);
    }
    Ok(params)
}

/// The denoiser's weights of a bundle, or of published weights in any layout that `import` reads. What published ones lack of
/// `dit` (heads, the projection of camera rays) is left out.
///
/// # Errors
/// Files that cannot be read; a tensor that is missing, left over or misshapen.
pub fn denoiser_of(dir: &Path, dit: &DitConfig) -> anyhow::Result<Params> {
    let mut params = Params::new();
    if dir.join(MANIFEST).is_file() {
        let bundle = Bundle::load(dir)?;
        if bundle.component("denoiser")?.format == ComponentFormat::Onnx {
            let path = bundle.path("denoiser")?;
            let weights = Model::load(&path)?.graph.stored_weights();
            for (name, (shape, values)) in weights.with_context(|| path.display().to_string())? {
                params.insert(&name, &shape, values);
            }
            return Ok(params);
        }
    }
    import::weights(dir, Part::Denoiser, |there| (Component::Dit, import::denoiser_params(dit, there).0))
}

/// The networks that a fine-tune runs once: of a run of an autoencoder (see [`Encoders::load`]), or published ones in any layout
/// that `import` reads, with the statistics of latents that the model's file has.
///
/// # Errors
/// Files that cannot be read; a tensor that is missing, left over or misshapen.
pub fn encoders_of(path: &Path, config: &FineTuneConfig, model: &WanModel) -> anyhow::Result<Encoders> {
    let beside = |file: &Path| path.parent().unwrap_or(Path::new(".")).join(file);
    let published =
        config.latents.as_ref().map(|latents| (beside(&latents.autoencoder), beside(&latents.tokenizer)));
    let Some((dir, tokenizer)) = published.filter(|(dir, _)| dir.is_dir() && !dir.join(CHECKPOINT).is_file())
    else {
        return Ok(Encoders::load(path, config, model)?);
    };
    let vae = import::weights(&dir, Part::Vae, |_| (Component::Vae, vae_params(&model.vae)))?;
    let text = |_: &_| (Component::TextEncoder, umt5_params(&model.umt5));
    Ok(Encoders {
        autoencoder: Autoencoder::with(model.vae.clone(), Arc::new(vae)),
        umt5: import::weights(&dir, Part::TextEncoder, text)?,
        tokenizer: Tokenizer::open(&tokenizer).with_context(|| tokenizer.display().to_string())?,
    })
}

/// The graph that this program writes for a component of the bundle, without values of weights.
fn written_anew(bundle: &Bundle, component: &str) -> anyhow::Result<Model> {
    let (dit, networks) = (&bundle.manifest().dit, &bundle.manifest().networks);
    let declared = |specs: &[ParamSpec]| -> Arc<dyn WeightSource> { Arc::new(DeclaredWeights::new(specs)) };
    let missing = |table: &str| format!("{component}: no networks.{table} in the bundle");
    Ok(match component {
        "text_encoder" => {
            let cfg = networks.umt5.as_ref().with_context(|| missing("umt5"))?;
            text_encoder_graph(cfg, dit.text_len, declared(count_text(cfg, dit.text_len).params()))?
        }
        "vae_encoder" => {
            let cfg = networks.codec.as_ref().with_context(|| missing("codec"))?;
            codec_graph(cfg, Way::Encode, declared(count_codec_encoder(cfg, 1).params()))?
        }
        _ => {
            let weights = declared(count_denoiser(dit, 2, 0, 2).params());
            denoiser_graph(dit, weights, DenoiserKind::Joint, Dim::Fixed(1))?
        }
    })
}

#[cfg(test)]
mod tests {
    use mindseye_train::depth::{DepthTrainConfig, DepthTrainer};

    use super::*;

    /// `house-tiny` was written before graphs said where their constants come from; weights of `furnished-tiny` are stored as
    /// codes.
    #[test]
    fn the_shipped_bundles_are_a_start() {
        let shipped = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny"));
        for dir in [shipped.with_file_name("furnished-tiny"), shipped.to_owned()] {
            let (params, bundle) = (weights_of(&dir).unwrap(), Bundle::load(&dir).unwrap());
            for spec in count_denoiser(&bundle.manifest().dit, 2, 0, 2).params() {
                let at = params.position(&spec.name).unwrap_or_else(|| panic!("{} is missing", spec.name));
                assert_eq!(params.get(at).1, spec.shape, "{}", spec.name);
            }
        }
        let params = weights_of(shipped).unwrap();
        assert!(params.position("text.shared.weight").is_some());
        assert!(params.position("codec.basis").is_some());
    }

    #[test]
    fn the_shipped_depth_reader_is_a_start() {
        let shipped = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny"));
        let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/train/furnished-tiny-depth.toml");
        let dir = tempfile::tempdir().unwrap();
        let config = DepthTrainConfig::load(Path::new(recipe)).unwrap();
        let mut trainer = DepthTrainer::open(config, dir.path(), false).unwrap();
        let before = trainer.state.params.clone();
        assert!(trainer.state.start_from(&depth_of(shipped).unwrap(), shipped).unwrap().is_empty());
        assert_ne!(before.get(0).2, trainer.state.params.get(0).2);
        assert!(depth_of(dir.path()).unwrap_err().to_string().contains("bundle.toml"));
    }
}
