//! From a training run to a bundle of graphs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use mindseye_builder::onnx::denoiser_graph;
use mindseye_builder::onnx::{
    MemoryWeights, WeightSource, codec_decoder_graph, codec_encoder_graph, text_encoder_graph,
};
use mindseye_engines::bundle::{
    BoundingBoxSpec, Bundle, BundleWriter, CameraSpec, ComponentFormat, Evaluation, Guide, ImageSpec,
    LatentSpec, LayoutSpec, LiftParams, Limits, Manifest, Networks, Provenance, RopeSpec, SamplerSpec,
    TextSpec,
};
use mindseye_engines::onnx::{Dim, Model, SaveOptions};
use mindseye_engines::sampler::{Grid, Solver};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::text::word_model;
use mindseye_train::checkpoint::State;
use mindseye_train::config::TrainConfig;
use mindseye_train::eager::Params;
use mindseye_train::family::HouseModel;

use crate::retrain::TEXT_PREFIX;

/// What goes into the bundle besides the run.
#[derive(Clone, Debug, Default)]
pub struct ShipOptions {
    /// Take the last weights instead of the averaged ones.
    pub raw: bool,
    /// Calibration of the lift; provisional values where nothing is given.
    pub lift: Option<LiftParams>,
    /// Figures to store with the bundle.
    pub evaluation: Evaluation,
    /// Also write the halves for the one-way mask, even of weights that were not trained with it.
    pub cached: bool,
    /// Denoising steps to sample with; those that a student was trained for, else 12.
    pub steps: Option<usize>,
    /// Guidance to sample with; 1 for a student, else 2.
    pub guidance: Option<f64>,
}

/// Calibration to begin with; `eval grounding --calibrate` replaces it by measured values.
#[must_use]
pub fn provisional_lift() -> LiftParams {
    LiftParams {
        standoff_m: mindseye_world::STANDOFF_M,
        standoff_by_word_m: standoffs(),
        ..LiftParams::uncalibrated()
    }
}

/// Where rollouts to wide shapes end (m, by name): the mean over generated houses, for shapes that are more than 2 cm
/// off the least standoff.
fn standoffs() -> BTreeMap<String, f64> {
    use mindseye_world::{Difficulty, House, Shape, standoff_m};
    let mut sums = [(0.0, 0usize); Shape::ALL.len()];
    for seed in 0..100 {
        for object in House::generate(seed, &Difficulty::plain()).objects {
            let (sum, n) = &mut sums[object.shape.index()];
            *sum += standoff_m(&object);
            *n += 1;
        }
    }
    let mean = |(sum, n): (f64, usize)| (sum / n.max(1) as f64 * 1e3).round() / 1e3;
    Shape::ALL
        .iter()
        .zip(sums)
        .filter(|(_, s)| s.1 > 0 && mean(*s) > mindseye_world::STANDOFF_M + 0.02)
        .map(|(shape, s)| (shape.name().to_owned(), mean(s)))
        .collect()
}

/// The weights of one network, under the names that it asks for.
fn part(params: &Params, keep: impl Fn(&str) -> Option<&str>) -> Arc<dyn WeightSource> {
    let mut weights = MemoryWeights::new();
    for i in 0..params.len() {
        let (name, shape, data) = params.get(i);
        if let Some(name) = keep(name) {
            weights.insert(name, shape.to_vec(), data.to_vec());
        }
    }
    Arc::new(weights)
}

fn revision() -> String {
    let out = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output();
    out.ok()
        .filter(|o| o.status.success())
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string())
        .unwrap_or_default()
}

/// Writes the bundle of a training run.
///
/// # Errors
/// A run or configuration that cannot be read, a file that cannot be written.
pub fn ship(run: &Path, config_path: &Path, out: &Path, options: &ShipOptions) -> anyhow::Result<Bundle> {
    let (config, model) = TrainConfig::load(config_path)?;
    let checkpoint = run.join("checkpoint.safetensors");
    if !checkpoint.is_file() {
        bail!("{}: no checkpoint.safetensors; train first", run.display());
    }
    let state = State::load(&checkpoint, &model)?;
    let params: &Params = if options.raw { &state.params } else { &state.ema };
    let manifest = manifest(&config, &model, &state, options)?;
    let mut writer = BundleWriter::create(out, manifest)?;

    let dit = part(params, |n| (!n.starts_with(TEXT_PREFIX) && !n.starts_with("codec.")).then_some(n));
    let text = part(params, |n| n.strip_prefix(TEXT_PREFIX));
    let codec = part(params, |n| n.starts_with("codec.").then_some(n));
    let mut graph = |name: &str, model: Model| -> anyhow::Result<()> {
        let file = format!("{name}.onnx");
        model.save(writer.path(&file), &SaveOptions::default())?;
        writer.add(name, ComponentFormat::Onnx, &[&file])?;
        Ok(())
    };
    let mut exported = model.dit.clone();
    exported.attributes = 0; // training only
    let kinds: &[DenoiserKind] = if options.cached || config.one_way {
        &[DenoiserKind::Joint, DenoiserKind::Prefill, DenoiserKind::Cached]
    } else {
        &[DenoiserKind::Joint]
    };
    for kind in kinds {
        graph(kind.component(), denoiser_graph(&exported, dit.clone(), *kind, Dim::Fixed(1))?)?;
    }
    graph("text_encoder", text_encoder_graph(&model.umt5(), model.dit.text_len, text)?)?;
    graph("vae_encoder", codec_encoder_graph(&model.codec, codec.clone())?)?;
    graph("vae_decoder", codec_decoder_graph(&model.codec, codec)?)?;
    std::fs::write(writer.path("tokenizer.model"), word_model(&model.text.words))?;
    writer.add("tokenizer", ComponentFormat::Sentencepiece, &["tokenizer.model"])?;
    Ok(writer.finish()?)
}

fn manifest(
    config: &TrainConfig,
    model: &HouseModel,
    state: &State,
    options: &ShipOptions,
) -> anyhow::Result<Manifest> {
    let (h, w) = model.codec.latent_size();
    let mut dit = model.dit.clone();
    dit.attributes = 0;
    let mut training = toml::Table::try_from(config)?;
    training.insert("done_steps".into(), toml::Value::Integer(state.step as i64));
    training.insert("samples".into(), toml::Value::Integer((state.step * config.batch as u64) as i64));
    training.insert("weights".into(), if options.raw { "last" } else { "averaged" }.into());
    let seen_by = mindseye_world::Camera::new(model.codec.width, model.codec.height);
    let networks = Networks {
        camera: Some(CameraSpec {
            horizontal_fov_deg: seen_by.hfov_rad.to_degrees(),
            pitch_deg: seen_by.pitch_rad.to_degrees(),
            height_m: seen_by.mount_height_m,
        }),
        layout: Some(LayoutSpec {
            motion_latents: model.layout.motion_latents,
            box_latents: model.layout.box_latents,
            recording_images: Some(model.layout.recording_images),
        }),
        text: Some(TextSpec::Closed { words: model.text.words.iter().map(|w| w.to_lowercase()).collect() }),
        codec: Some(model.codec),
        vae: None,
        umt5: Some(model.umt5()),
    };
    Ok(Manifest {
        format: mindseye_engines::bundle::FORMAT,
        name: model.name.clone(),
        precision: "f32".into(),
        target: "cpu".into(),
        license: "Apache-2.0 OR MIT".into(),
        image: ImageSpec {
            width: model.codec.width,
            height: model.codec.height,
            frame_stride: 1,
            frames_per_second: 10.0,
        },
        latent: LatentSpec {
            channels: model.codec.channels,
            height: h,
            width: w,
            frames: 4,
            mean: vec![0.0; model.codec.channels],
            std: vec![1.0; model.codec.channels],
        },
        rope: RopeSpec { gap: model.layout.gap as f64 },
        limits: Limits {
            context_trained: model.layout.context_latents,
            context_allowed: 2 * model.layout.context_latents,
            target_trained: model.target_latents(),
            target_allowed: model.target_latents(),
        },
        sampler: SamplerSpec {
            grid: Grid::Plain,
            solver: Solver::Euler,
            shift: config.shift,
            steps: options.steps.or(config.distill.as_ref().map(|d| d.steps)).unwrap_or(12),
            guidance: options.guidance.unwrap_or(if config.distill.is_some() { 1.0 } else { 2.0 }),
            prediction: model.dit.prediction,
            guide: Guide::Warp,
        },
        provenance: Provenance {
            source: "trained".into(),
            training,
            seeds: vec![config.seed],
            revision: revision(),
        },
        dit,
        networks,
        bounding_box: BoundingBoxSpec { score_min: 0.3 },
        lift: model.dit.lift.then(|| options.lift.clone().unwrap_or_else(provisional_lift)),
        evaluation: options.evaluation.clone(),
        component: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_come_back_from_a_bundle_as_they_went_in() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/train/house-tiny.toml");
        let text = std::fs::read_to_string(recipe).expect("the shipped recipe");
        let text = text.replace("../models/house-tiny.toml", "model.toml").replace("24000", "800");
        let config_path = dir.path().join("train.toml");
        let model = include_str!("../../tests/data/train/model.toml").replace("layers = 1", "layers = 2");
        std::fs::write(dir.path().join("model.toml"), model).expect("the model is written");
        std::fs::write(&config_path, text).expect("the recipe is written");
        let (config, model) = TrainConfig::load(&config_path).expect("the recipe is valid");
        let plain = mindseye_world::Difficulty::plain();
        let mut state = State::new(&config, &model, &plain);
        // Norms and heads begin as ones and zeros, which would hide a wrong order.
        let params = Arc::make_mut(&mut state.params);
        for (i, values) in params.all_values_mut().enumerate() {
            for (j, v) in values.iter_mut().enumerate() {
                *v += ((i * 31 + j) as f32).sin();
            }
        }
        state.save(&dir.path().join("checkpoint.safetensors"), &config).expect("the checkpoint is written");
        let options = ShipOptions { raw: true, ..Default::default() };
        let bundle = dir.path().join("bundle");
        ship(dir.path(), &config_path, &bundle, &options).expect("the run ships");

        let back = crate::retrain::weights_of(&bundle).expect("the bundle is read");
        let mut compared = 0;
        for i in 0..state.params.len() {
            let (name, shape, want) = state.params.get(i);
            if name.starts_with("lift.attributes") {
                continue; // training only
            }
            let (_, _, have) = back.get(back.position(name).unwrap_or_else(|| panic!("{name} is missing")));
            assert_eq!(have, want, "{name} {shape:?}");
            compared += 1;
        }
        assert!(compared > 50, "only {compared} weights were compared");
        let mut fresh = State::new(&config, &model, &plain);
        assert_eq!(fresh.start_from(&back, &bundle).expect("shapes fit"), 2);
        assert_eq!(fresh.params.get(3).2, state.params.get(3).2);
    }
}
