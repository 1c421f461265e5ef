//! What the CUDA engine of our own needs for a model, without a GPU and without weights: every graph that the model is
//! exported as, planned as a run would be.

use std::sync::Arc;

use serde::Serialize;

use mindseye_engines::count::{count_codec_encoder, count_denoiser, count_depth};
use mindseye_engines::cuda::{CudaError, GraphNeeds, graph_needs};
use mindseye_engines::model::ParamSpec;
use mindseye_engines::model::vae::Chunk;
use mindseye_engines::onnx::{Dim, Model, OnnxError};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::target::Precision;

use super::ModelSpec;
use crate::checkpoint::names::{umt5_params, vae_params};
use crate::onnx::{
    DeclaredWeights, Way, WeightSource, codec_graph, denoiser_graph, depth_graph, step_component,
    text_encoder_graph, vae_graph,
};

/// What one component needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CudaNeeds {
    /// Component of the bundle.
    pub component: String,
    /// At the sizes of the model's workload.
    #[serde(flatten)]
    pub needs: GraphNeeds,
}

/// Why the CUDA engine cannot be planned for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaPlanError {
    /// A graph cannot be written.
    #[error(transparent)]
    Graph(#[from] OnnxError),
    /// A graph cannot run.
    #[error("{component}: {source}")]
    Needs {
        /// Component of the bundle.
        component: String,
        /// Operator or shape.
        #[source]
        source: CudaError,
    },
}

/// Every graph that a model is exported as, by component; weights are declared, and not there.
///
/// # Errors
/// Sizes that make no graph.
pub fn declared_graphs(model: &ModelSpec) -> Result<Vec<(String, Model)>, OnnxError> {
    let declared = |specs: &[ParamSpec]| -> Arc<dyn WeightSource> { Arc::new(DeclaredWeights::new(specs)) };
    let mut graphs = Vec::new();
    let dit = &model.dit;
    let kinds: &[DenoiserKind] = match model.workload.cached_context {
        true => &[DenoiserKind::Prefill, DenoiserKind::Cached],
        false => &[DenoiserKind::Joint],
    };
    for &kind in kinds {
        let weights = declared(count_denoiser(dit, 2, 0, 2).params());
        graphs.push((kind.component().to_owned(), denoiser_graph(dit, weights, kind, Dim::Fixed(1))?));
    }
    if let Some(cfg) = &model.text_encoder {
        let graph = text_encoder_graph(cfg, dit.text_len, declared(&umt5_params(cfg)))?;
        graphs.push(("text_encoder".into(), graph));
    }
    for way in [Way::Encode, Way::Decode] {
        if let Some(cfg) = &model.codec {
            let weights = declared(count_codec_encoder(cfg, 1).params());
            graphs.push((way.component().into(), codec_graph(cfg, way, weights)?));
        }
        let steps = [Chunk::First, Chunk::Next];
        for (chunk, cfg) in steps.into_iter().flat_map(|chunk| model.vae.iter().map(move |cfg| (chunk, cfg)))
        {
            let latent = [dit.latent_height, dit.latent_width];
            let graph = vae_graph(cfg, latent, way, chunk, declared(&vae_params(cfg)))?;
            graphs.push((step_component(way, chunk), graph));
        }
    }
    if let Some(cfg) = &model.depth {
        graphs.push(("depth".into(), depth_graph(cfg, declared(count_depth(cfg).params()))?));
    }
    Ok(graphs)
}

/// Plans every graph of a model for the CUDA engine, products in `precision` (bf16 or fp32).
///
/// # Errors
/// An operator without a kernel, or a shape that no kernel takes, with the component.
pub fn cuda_needs(model: &ModelSpec, precision: Precision) -> Result<Vec<CudaNeeds>, CudaPlanError> {
    let to_size = |latents: u64| usize::try_from(latents).unwrap_or(usize::MAX);
    let (context, targets) =
        (to_size(model.workload.context_latents), to_size(model.workload.target_latents));
    let per_frame = model.dit.tokens_per_frame();
    let of = |(component, graph): (String, Model)| {
        // The first target latent is given: halves see it with the context.
        let frames = match component.as_str() {
            "denoiser_prefill" => context + 1,
            "denoiser_cached" => targets.saturating_sub(1).max(1),
            _ => context + targets,
        };
        let groups = if component == Way::Decode.component() { targets.max(context) } else { 1 };
        let size = |symbol: &str| match symbol {
            "batch" => Some(1),
            "timesteps" => Some(2),
            "frames" => Some(frames),
            "tokens" => Some(frames * per_frame),
            "context_tokens" => Some((context + 1) * per_frame),
            "groups" => Some(groups),
            _ => None,
        };
        match graph_needs(&graph.graph, precision, &size) {
            Ok(needs) => Ok(CudaNeeds { component, needs }),
            Err(source) => Err(CudaPlanError::Needs { component, source }),
        }
    };
    declared_graphs(model)?.into_iter().map(of).collect()
}
