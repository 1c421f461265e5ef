//! From a training run to a bundle of graphs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use mindseye_builder::onnx::denoiser_graph;
use mindseye_builder::onnx::{
    MemoryWeights, Way, WeightSource, codec_graph, depth_graph, text_encoder_graph,
};
use mindseye_engines::bundle::{
    BoundingBoxSpec, Bundle, BundleWriter, CameraSpec, ComponentFormat, Evaluation, Guide, ImageSpec,
    LatentSpec, LayoutSpec, LiftParams, Limits, MANIFEST, Manifest, Networks, Provenance, RopeSpec,
    SamplerSpec, TextSpec,
};
use mindseye_engines::model::depth::DepthConfig;
use mindseye_engines::onnx::{Dim, Model, SaveOptions, Storage};
use mindseye_engines::sampler::{Grid, Solver};
use mindseye_engines::session_denoiser::DenoiserKind;
use mindseye_engines::text::word_model;
use mindseye_train::checkpoint::State;
use mindseye_train::config::TrainConfig;
use mindseye_train::data::Worlds;
use mindseye_train::depth::finished;
use mindseye_train::eager::Params;
use mindseye_train::family::HouseModel;
use mindseye_train::finetune::{self, FineTuneConfig};

use crate::export::{self, ExportArgs};
use crate::import::{self, ImportArgs, Part};
use crate::retrain::{TEXT_PREFIX, encoders_of};

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
    /// Run of the depth reader to put beside the denoiser.
    pub depth: Option<PathBuf>,
    /// How weights are stored. Other than whole they are rounded to half precision first; only matrices of denoiser and depth
    /// reader become codes.
    pub storage: Storage,
}

impl ShipOptions {
    /// The first option given that [`ship_fine_tune`] has no use for, as it is called on the command line.
    #[must_use]
    pub fn not_for_fine_tunes(&self) -> Option<&'static str> {
        let given = [
            (self.raw, "--raw"),
            (self.cached, "--cached"),
            (self.storage != Storage::Whole, "--weights"),
            (self.steps.is_some(), "--steps"),
            (self.guidance.is_some(), "--guidance"),
            (self.depth.is_some(), "--depth"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }
}

/// Calibration to begin with; `eval grounding --calibrate` replaces it by measured values.
#[must_use]
pub fn provisional_lift(worlds: &Worlds) -> LiftParams {
    LiftParams {
        standoff_m: mindseye_world::STANDOFF_M,
        standoff_by_word_m: standoffs(worlds),
        ..LiftParams::uncalibrated()
    }
}

/// Where rollouts to wide shapes end (m, by name): the mean over generated houses, for shapes that are more than 2 cm
/// off the least standoff.
fn standoffs(worlds: &Worlds) -> BTreeMap<String, f64> {
    use mindseye_world::{Shape, standoff_m};
    let mut sums = [(0.0, 0usize); Shape::ALL.len()];
    for seed in 0..100 {
        for object in worlds.house(seed).objects {
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

/// See [`ShipOptions::storage`]. What is too large for a half stays as it is.
fn round(params: &mut Params) {
    for weight in params.all_values_mut().flatten() {
        let rounded = half::f16::from_f32(*weight);
        if rounded.is_finite() {
            *weight = rounded.to_f32();
        }
    }
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
    let mut manifest = manifest(&config, &model, &state, options)?;
    let mut params = if options.raw { Params::clone(&state.params) } else { state.ema };
    let depth = options.depth.as_deref().map(|run| depth_of(run, options.storage)).transpose()?;
    if options.storage != Storage::Whole {
        round(&mut params);
    }
    let params = &params;
    manifest.networks.depth = depth.as_ref().map(|(sizes, _)| sizes.clone());
    let mut writer = BundleWriter::create(out, manifest)?;

    let dit = part(params, |n| (!n.starts_with(TEXT_PREFIX) && !n.starts_with("codec.")).then_some(n));
    let text = part(params, |n| n.strip_prefix(TEXT_PREFIX));
    let codec = part(params, |n| n.starts_with("codec.").then_some(n));
    let mut graph = |name: &str, model: Model| -> anyhow::Result<()> {
        let file = format!("{name}.onnx");
        // The codec's basis is orthonormal, and texts are few: both stay finer than codes.
        let storage = match options.storage {
            Storage::Codes if !name.starts_with("denoiser") && name != "depth" => Storage::Halves,
            storage => storage,
        };
        model.save(writer.path(&file), &SaveOptions { storage, ..SaveOptions::default() })?;
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
    graph("vae_encoder", codec_graph(&model.codec, Way::Encode, codec.clone())?)?;
    graph("vae_decoder", codec_graph(&model.codec, Way::Decode, codec)?)?;
    if let Some((_, model)) = depth {
        graph("depth", model)?;
    }
    std::fs::write(writer.path("tokenizer.model"), word_model(&model.text.words))?;
    writer.add("tokenizer", ComponentFormat::Sentencepiece, &["tokenizer.model"])?;
    Ok(writer.finish()?)
}

/// Writes the bundle of a fine-tune: its averaged weights in the layout of published ones (`RUN/published`), imported
/// (`RUN/weights`) and exported.
///
/// # Errors
/// A run, configuration or autoencoder that cannot be read, a file that cannot be written.
pub fn ship_fine_tune(run: &Path, config_path: &Path, out: &Path) -> anyhow::Result<Bundle> {
    let (config, model) = FineTuneConfig::load_to_train(config_path)?;
    let encoders = encoders_of(config_path, &config, &model)?;
    let (published, weights) = (run.join("published"), run.join("weights"));
    let trained = finetune::finished(run, &config, &model)?;
    finetune::publish(config_path, &config, &encoders, &trained, &published)?;
    import::run(ImportArgs {
        model: Some(published.join("model.toml")),
        dir: published,
        out: weights.clone(),
        parts: Part::ALL.to_vec(),
        lora: None,
        lora_strength: None,
        license: "NOASSERTION".to_owned(),
        json: false,
    })?;
    export::run(ExportArgs {
        source: weights,
        out: out.to_path_buf(),
        model: None,
        cached: false,
        external: false,
        vectors: false,
    })?;
    Ok(Bundle::load(out)?)
}

/// Sizes and graph of a run of the depth reader, with its averaged weights.
fn depth_of(run: &Path, storage: Storage) -> anyhow::Result<(DepthConfig, Model)> {
    let (config, mut state) = finished(run)?;
    if storage != Storage::Whole {
        round(&mut state.ema);
    }
    let graph = depth_graph(&config.depth, part(&state.ema, |n| Some(n)))?;
    Ok((config.depth, graph))
}

/// Puts the depth reader of a run into a bundle, in place of one that it may have; all other files stay as they are. For
/// `storage` see [`ShipOptions`].
///
/// # Errors
/// A run or bundle that cannot be read, sizes that do not fit the bundle's pictures, a file that cannot be written.
pub fn add_depth(run: &Path, bundle: &Path, storage: Storage) -> anyhow::Result<Bundle> {
    let old = Bundle::load(bundle)?;
    let (sizes, graph) = depth_of(run, storage)?;
    let mut manifest = old.manifest().clone();
    manifest.networks.depth = Some(sizes);
    let mut writer = BundleWriter::create(bundle, manifest)?;
    for (name, component) in old.manifest().component.iter().filter(|(name, _)| *name != "depth") {
        let files: Vec<&str> = component.files.iter().map(|f| f.name.as_str()).collect();
        for file in &files {
            let from = old.directory().join(file);
            std::fs::copy(&from, writer.path(file)).with_context(|| from.display().to_string())?;
        }
        writer.add(name, component.format, &files)?;
    }
    // What is no component stays too: the card.
    for entry in std::fs::read_dir(old.directory())? {
        let (from, to) = {
            let e = entry?;
            (e.path(), writer.path(&e.file_name().to_string_lossy()))
        };
        let replaced = from.file_name().is_some_and(|n| n == MANIFEST || n == "depth.onnx");
        if from.is_file() && !to.exists() && !replaced {
            std::fs::copy(&from, to).with_context(|| from.display().to_string())?;
        }
    }
    graph.save(writer.path("depth.onnx"), &SaveOptions { storage, ..SaveOptions::default() })?;
    writer.add("depth", ComponentFormat::Onnx, &["depth.onnx"])?;
    Ok(writer.finish()?)
}

/// The vocabulary of a model of the house family. Where it has the world's colours, goals name a colour and a kind each.
fn closed_text(model: &HouseModel) -> TextSpec {
    let words: Vec<String> = model.text.words.iter().map(|w| w.to_lowercase()).collect();
    let is_colour = |word: &String| mindseye_world::Colour::ALL.iter().any(|c| c.name() == word);
    let (colours, kinds): (Vec<String>, Vec<String>) = words.iter().cloned().partition(is_colour);
    let named = colours.len() == mindseye_world::Colour::ALL.len() && !kinds.is_empty();
    TextSpec::Closed { words, attributes: if named { vec![colours, kinds] } else { Vec::new() } }
}

/// The manifest without components. Long, since it names every field once.
fn manifest(
    config: &TrainConfig,
    model: &HouseModel,
    state: &State,
    options: &ShipOptions,
) -> anyhow::Result<Manifest> {
    let (h, w) = model.codec.latent_size();
    let mut dit = model.dit.clone();
    dit.attributes = 0;
    let worlds = config.world()?;
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
        text: Some(closed_text(model)),
        codec: Some(model.codec),
        vae: None,
        umt5: Some(model.umt5()),
        depth: None,
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
        lift: model.dit.lift.then(|| options.lift.clone().unwrap_or_else(|| provisional_lift(&worlds))),
        evaluation: options.evaluation.clone(),
        component: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use mindseye::image::RgbImage;
    use mindseye::mind::Pipeline;
    use mindseye_engines::model::depth::log_depth;
    use mindseye_train::depth::{DepthSource, DepthTrainConfig, DepthTrainer, errors};
    use mindseye_train::eager::Eager;

    #[test]
    fn rounded_weights_are_the_nearest_of_eleven_bits() {
        let values = [0.0, 1.0, -1.0, 1.0 / 3.0, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, f32::MAX];
        let mut params = Params::default();
        params.insert("w", &[values.len()], values.to_vec());
        round(&mut params);
        let got = params.get(0).2.to_vec();
        // Between two neighbours that are a thousandth apart the even one is taken; what would overflow stays.
        assert_eq!(got[..3], [0.0, 1.0, -1.0]);
        assert_eq!(got[3], half::f16::from_f32(1.0 / 3.0).to_f32());
        assert_eq!(got[4..], [1.0, 1.0 + 4.0 / 2048.0, f32::MAX]);
    }

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

        // Half precision halves the weights of the file, and what is read back are the nearest halves.
        let small = dir.path().join("small");
        ship(dir.path(), &config_path, &small, &ShipOptions { storage: Storage::Halves, ..options })
            .expect("it ships");
        let size = |of: &Path| std::fs::metadata(of.join("denoiser.onnx")).expect("a file").len();
        assert!(4 * size(&small) < 3 * size(&bundle), "{} of {}", size(&small), size(&bundle));
        let halves = crate::retrain::weights_of(&small).expect("the bundle is read");
        for i in 0..back.len() {
            let (name, _, want) = back.get(i);
            let (_, _, have) =
                halves.get(halves.position(name).unwrap_or_else(|| panic!("{name} is missing")));
            let nearest: Vec<f32> = want.iter().map(|w| half::f16::from_f32(*w).to_f32()).collect();
            assert_eq!(have, nearest, "{name}");
        }
        let mut fresh = State::new(&config, &model, &plain);
        let left = fresh.start_from(&back, &bundle).expect("shapes fit");
        assert_eq!(left.len(), 2, "{left:?}");
        assert_eq!(fresh.params.get(3).2, state.params.get(3).2);

        // A model of more words begins with the rows of those that both have.
        let mut more = model.clone();
        more.text.words.push("couch".to_owned());
        let mut longer = State::new(&config, &more, &plain);
        let rows = |state: &State| {
            state
                .params
                .position("text.shared.weight")
                .map(|i| state.params.get(i).2.to_vec())
                .expect("words")
        };
        let own = rows(&longer);
        let left = longer.start_from(&back, &bundle).expect("shapes fit");
        assert!(left.len() == 3 && left.iter().any(|l| l.ends_with("from row 18 on")), "{left:?}");
        let (taken, new) = (rows(&state), rows(&longer));
        assert_eq!(new[..taken.len()], taken[..]);
        assert_eq!(new[taken.len()..], own[taken.len()..]);
    }

    /// A guided model is run by the runtime's session as training runs it, with its guide and without.
    #[test]
    fn a_guided_model_ships_and_predicts_as_in_training() {
        use mindseye_engines::backend::{PrepareOptions, by_name};
        use mindseye_engines::denoise::{Denoise, DenoiseStep, frames_first};
        use mindseye_engines::session_denoiser::SessionDenoiser;
        use mindseye_train::codec_fit::codec_of;
        use mindseye_train::data::{Source, Task};
        use mindseye_train::net::{self, Draw};
        let dir = tempfile::tempdir().expect("a temporary directory");
        let model = include_str!("../../tests/data/train/model.toml")
            .replace("attributes = 14", "attributes = 14\nguide = \"warp\"");
        let recipe = [
            include_str!("../../tests/data/train/train.toml"),
            "[guide]\ndropped = 0.5\ndepth_noise = 0.03\nposition_noise_m = 0.02\nturn_noise_deg = 1.0\n",
        ];
        let config_path = dir.path().join("train.toml");
        std::fs::write(dir.path().join("model.toml"), model).expect("the model is written");
        std::fs::write(&config_path, recipe.concat()).expect("the recipe is written");
        let (config, model) = TrainConfig::load(&config_path).expect("the recipe is valid");
        let plain = mindseye_world::Difficulty::plain();
        let mut state = State::new(&config, &model, &plain);
        let codec = codec_of(&state.params);
        let params = Arc::make_mut(&mut state.params);
        for (i, values) in params.all_values_mut().enumerate() {
            for (j, v) in values.iter_mut().enumerate() {
                *v += 0.1 * ((i * 31 + j) as f32).sin();
            }
        }
        state.save(&dir.path().join("checkpoint.safetensors"), &config).expect("the checkpoint is written");
        let options = ShipOptions { raw: true, ..Default::default() };
        let bundle = ship(dir.path(), &config_path, &dir.path().join("bundle"), &options).expect("it ships");
        let path = bundle.path("denoiser").expect("a denoiser");
        let engine = by_name("rten")
            .and_then(|rten| rten.prepare(&path, &PrepareOptions::default().with_threads(1)))
            .expect("it is prepared");
        let dit = bundle.manifest().dit.clone();
        let mut session = SessionDenoiser::new(dit, engine.session().expect("a session")).expect("it fits");

        let sample = Source::new(&model, plain, codec).guided(config.guide).sample(2, Task::Navigate, false);
        let (f, context) = (model.latents(), model.layout.context_latents);
        let (c, hw) = (model.dit.in_channels, model.dit.latent_height * model.dit.latent_width);
        let noise: Vec<f32> = (0..sample.latents.len()).map(|i| (i as f32).sin()).collect();
        let latents: Vec<f32> = (0..noise.len())
            .map(|i| if i / (c * hw) > context { noise[i] } else { sample.latents[i] })
            .collect();
        let mut eager = Eager::new(state.params.clone(), false);
        let draw = Draw { s: 1.0, dropped: false, one_way: false, guided: true, noise, target: None };
        let mut results = Vec::new();
        for guided in [true, false] {
            let draw = Draw { guided, ..draw.clone() };
            eager.restart(state.params.clone());
            let samples = std::slice::from_ref(&sample);
            let out = net::forward(&mut eager, &model, samples, std::slice::from_ref(&draw));
            let trained = frames_first(eager.value(out.sample).1, c, f, hw);
            // The text encoder is compared elsewhere: its rows are those of the eager pass.
            let text = text_rows(&state.params, &model, &sample.ids);
            let step = DenoiseStep {
                latents: &latents,
                timesteps: &[0.0, 1000.0],
                rows: &(0..f).map(|t| usize::from(t > context)).collect::<Vec<_>>(),
                t_index: &net::t_index(&model, &sample.context_index),
                text: &text,
                camera: Some(&sample.camera),
                guide: guided.then_some(&sample.guide[..]),
            };
            let run = session.denoise(&step).expect("it runs").prediction;
            let worst = run.iter().zip(&trained).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-4, "guided: {guided}: {worst}");
            results.push(run);
        }
        assert_ne!(results[0], results[1]);
    }

    /// Rows of text from token ids, as training encodes them.
    fn text_rows(params: &Arc<Params>, model: &HouseModel, ids: &[usize]) -> Vec<f32> {
        use mindseye_engines::model::umt5::{self, Umt5Inputs};
        let (len, umt5) = (ids.len(), model.umt5());
        let mut e = Eager::new(params.clone(), false);
        let (bias, keep) = umt5::host_inputs(&[ids.iter().filter(|id| **id != 0).count()], len);
        let (mask_bias, keep) = (e.input(&[1, 1, 1, len], bias), e.input(&[1, len, 1], keep));
        let (ids, buckets) = (e.index(&[1, len], ids.to_vec()), e.index(&[len, len], umt5.bucket_table(len)));
        e.set_prefix(TEXT_PREFIX);
        let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
        let rows = umt5::encode(&mut e, &umt5, &inputs).rows;
        e.value(rows).1.to_vec()
    }

    /// A finished run of the smallest depth reader, and its configuration.
    fn depth_run(run: &Path) -> DepthTrainConfig {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/train/depth.toml");
        let mut config = DepthTrainConfig::load(Path::new(path)).expect("a configuration");
        config.steps = 10;
        let mut trainer = DepthTrainer::open(config.clone(), run, false).expect("the run opens");
        trainer.run(&AtomicBool::new(false), |_, _| {}).expect("it is trained");
        config
    }

    /// The shipped bundle, to be changed.
    fn copied(to: &Path) {
        std::fs::create_dir_all(to).expect("a directory");
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny");
        for entry in std::fs::read_dir(shipped).expect("the bundle").flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
        }
    }

    #[test]
    fn a_depth_reader_joins_a_bundle_and_the_runtime_reads_what_training_reads() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (run, path) = (dir.path().join("run"), dir.path().join("bundle"));
        let config = depth_run(&run);
        copied(&path);
        let before = Bundle::load(&path).expect("the bundle");
        let after = add_depth(&run, &path, Storage::Whole).expect("it joins");
        for (name, component) in before.manifest().component.iter().filter(|(n, _)| *n != "depth") {
            assert_eq!(after.component(name).expect("it stays"), component);
        }
        assert!(path.join("CARD.md").is_file(), "what is no component stays");
        assert!(after.has("depth") && after.manifest().networks.depth.as_ref() == Some(&config.depth));

        let (w, h) = (config.depth.width, config.depth.height);
        let data: Vec<u8> = (0..3 * w * h).map(|i| (i * 37 % 251) as u8).collect();
        let picture = RgbImage::from_rgb(w, h, data).expect("a picture");
        let mut mind = Pipeline::load(&path, "rten", 1).and_then(|p| p.mind(0)).expect("it runs");
        let read = mind.depth(&picture).expect("it reads").expect("there is a reader");
        let (_, state) = finished(&run).expect("the run");
        let mut eager = Eager::new(Arc::new(state.ema), false);
        let planes =
            (0..3).flat_map(|c| picture.data.iter().skip(c).step_by(3).map(|v| f32::from(*v) / 127.5 - 1.0));
        let input = eager.input(&[1, 3, h, w], planes.collect());
        let out = log_depth(&mut eager, &config.depth, &input);
        let trained = eager.value(out).1;
        assert_eq!(read.len(), w * h);
        for (a, b) in read.iter().zip(trained) {
            assert!((a.ln() - b).abs() < 1e-4, "{a} {}", b.exp());
        }
        let spread = read.iter().fold((f32::MAX, 0f32), |(low, high), v| (low.min(*v), high.max(*v)));
        assert!(spread.1 > 1.01 * spread.0, "the reader does not only give one distance: {spread:?}");

        let error = mind.depth(&RgbImage::filled(12, 8, [0; 3])).expect_err("another size").to_string();
        assert!(error.contains("12x8 pixels, expected 24x16"), "{error}");
    }

    /// Nearly as good as its card says, on 32 pictures of the worlds that it was trained in.
    #[test]
    fn the_shipped_depth_reader_reads_rooms() {
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/house-tiny");
        let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/train/house-tiny-depth.toml");
        let config = DepthTrainConfig::load(Path::new(recipe)).expect("the recipe");
        let (w, h) = (config.depth.width, config.depth.height);
        let mut mind =
            Pipeline::load(Path::new(shipped), "rten", 1).and_then(|p| p.mind(0)).expect("it runs");
        let mut source = DepthSource::new(&config).expect("its worlds");
        let (mut read, mut truth) = (Vec::new(), Vec::new());
        for sample in (0..8).flat_map(|seed| source.samples(0xde97_0000 + seed, false)) {
            let value = |at: usize| ((sample.picture[at % 3 * w * h + at / 3] + 1.0) * 127.5).round() as u8;
            let picture = RgbImage::from_rgb(w, h, (0..3 * w * h).map(value).collect()).expect("a picture");
            read.extend(mind.depth(&picture).expect("it reads").expect("there is a reader"));
            truth.extend(sample.depth);
        }
        let e = errors(&read, &truth, w, h);
        assert!(e.mean < 0.04 && e.mean_inside < 0.025 && e.inside > 0.5 && e.within_5 > 0.8, "{e:?}");
    }

    #[test]
    fn a_depth_reader_that_does_not_fit_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (run, path) = (dir.path().join("run"), dir.path().join("bundle"));
        depth_run(&run);
        copied(&path);
        let bundle = add_depth(&run, &path, Storage::Whole).expect("it joins");
        let (text, file) = (bundle.manifest().to_toml().expect("text"), path.join(MANIFEST));
        let refused = |change: &dyn Fn(&mut Manifest), wanted: &str| {
            let mut manifest = bundle.manifest().clone();
            change(&mut manifest);
            std::fs::write(&file, manifest.to_toml().expect("text")).expect("it is written");
            let error = Bundle::load(&path).expect_err(wanted).to_string();
            assert!(error.contains(wanted), "{error}");
            std::fs::write(&file, &text).expect("it is written");
        };
        let depth = |m: &mut Manifest, change: &dyn Fn(&mut DepthConfig)| {
            change(m.networks.depth.as_mut().expect("a table"));
        };
        refused(&|m| m.networks.depth = None, "networks.depth: wanted a table");
        refused(
            &|m| depth(m, &|d| d.width = 28),
            "wanted the shape of image.width, image.height: 24, 16, got 28, 16",
        );
        refused(&|m| depth(m, &|d| (d.width, d.height) = (48, 32)), "component.depth.inputs.picture: wanted");
        refused(&|m| depth(m, &|d| d.layers = 0), "networks.depth.layers: wanted 1 to 4096, got 0");

        // Weights that are no numbers are not shipped, and numbers that are no distances are not given on.
        let (config, mut state) = finished(&run).expect("the run");
        let mut with = |value: f32| {
            let bias = state.ema.position("proj_out.bias").expect("a weight");
            state.ema.values_mut(bias).fill(value);
            state.save(&run.join("checkpoint.safetensors"), &config).expect("it is written");
            add_depth(&run, &path, Storage::Whole)
        };
        let error = with(f32::NAN).expect_err("no weights").to_string();
        assert!(error.contains("proj_out.bias"), "{error}");
        with(1e3).expect("it joins");
        let mut mind = Pipeline::load(&path, "rten", 1).and_then(|p| p.mind(0)).expect("it loads");
        let error = mind.depth(&RgbImage::filled(24, 16, [9; 3])).expect_err("no distances").to_string();
        assert!(error.contains("384 of them not finite"), "{error}");
    }

    #[test]
    fn a_run_of_another_kind_is_no_depth_reader() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = add_depth(dir.path(), dir.path(), Storage::Whole).expect_err("no bundle").to_string();
        assert!(error.contains("bundle.toml"), "{error}");
        copied(&dir.path().join("bundle"));
        let error = add_depth(dir.path(), &dir.path().join("bundle"), Storage::Whole)
            .expect_err("no run")
            .to_string();
        assert!(error.contains("checkpoint.safetensors"), "{error}");
    }
}
