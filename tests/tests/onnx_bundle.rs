//! Bundles: written whole, read back, refused when anything does not match.

#![allow(clippy::unwrap_used)] // helpers of tests, too

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mindseye_builder::onnx::MemoryWeights;
use mindseye_builder::onnx::denoiser_graph;
use mindseye_engines::backend::{PrepareOptions, by_name};
use mindseye_engines::bundle::{
    BoundingBoxSpec, Bundle, BundleWriter, ComponentFormat, Evaluation, FORMAT, Guide, ImageSpec, LatentSpec,
    LiftParams, Limits, MANIFEST, Manifest, Networks, Provenance, RopeSpec, SamplerSpec,
};
use mindseye_engines::count::count_denoiser;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::onnx::{Dim, ExternalData, Model, SaveOptions};
use mindseye_engines::sampler::{Grid, Solver};
use mindseye_engines::session_denoiser::DenoiserKind;

fn dit() -> DitConfig {
    DitConfig {
        in_channels: 4,
        out_channels: 4,
        latent_height: 2,
        latent_width: 4,
        patch: [1, 2],
        heads: 2,
        head_dim: 12,
        ffn_dim: 32,
        text_dim: 8,
        text_len: 3,
        freq_dim: 16,
        lift: true,
        ..DitConfig::SMALLEST
    }
}

fn manifest() -> Manifest {
    let dit = dit();
    Manifest {
        format: FORMAT,
        name: "test".into(),
        precision: "f32".into(),
        target: "cpu".into(),
        license: "Apache-2.0".into(),
        image: ImageSpec { width: 32, height: 16, frame_stride: 3, frames_per_second: 30.0 },
        latent: LatentSpec {
            channels: 4,
            height: 2,
            width: 4,
            frames: 4,
            mean: vec![0.0, -0.25, 0.5, 0.1],
            std: vec![1.0; 4],
        },
        rope: RopeSpec { gap: 50.0 },
        limits: Limits { context_trained: 6, context_allowed: 12, target_trained: 6, target_allowed: 6 },
        sampler: SamplerSpec {
            grid: Grid::Plain,
            solver: Solver::Euler,
            shift: 5.0,
            steps: 4,
            guidance: 2.0,
            prediction: dit.prediction,
            guide: Guide::Warp,
        },
        provenance: Provenance {
            source: "trained".into(),
            training: toml_table(),
            seeds: vec![1, 2],
            revision: "abc".into(),
        },
        dit,
        networks: Networks::default(),
        bounding_box: BoundingBoxSpec { score_min: 0.3 },
        lift: Some(LiftParams { standoff_m: 1.25, ..LiftParams::uncalibrated() }),
        evaluation: Evaluation::default(),
        component: BTreeMap::new(),
    }
}

fn toml_table() -> toml::Table {
    [("steps".to_owned(), 3.into())].into_iter().collect()
}

fn weights() -> MemoryWeights {
    let mut weights = MemoryWeights::new();
    for (i, p) in count_denoiser(&dit(), 2, 0, 1).params().iter().enumerate() {
        let values =
            (0..p.shape.iter().product()).map(|j| ((i * 31 + j * 7) % 13) as f32 / 13.0 - 0.5).collect();
        weights.insert(p.name.clone(), p.shape.clone(), values);
    }
    weights
}

fn write(target: &Path) -> Bundle {
    let older = target.exists().then(|| Bundle::load(target).unwrap().hash().to_owned());
    let mut writer = BundleWriter::create(target, manifest()).unwrap();
    let graph = denoiser_graph(&dit(), Arc::new(weights()), DenoiserKind::Joint, Dim::Fixed(1)).unwrap();
    graph.save(writer.path("denoiser.onnx"), &SaveOptions::default()).unwrap();
    writer.add("denoiser", ComponentFormat::Onnx, &["denoiser.onnx"]).unwrap();
    std::fs::write(writer.path("tokenizer.model"), b"pieces").unwrap();
    writer.add("tokenizer", ComponentFormat::Sentencepiece, &["tokenizer.model"]).unwrap();
    // Nothing of the new bundle is in its place before it is whole: there is none, or the older one as it was.
    let before = target.exists().then(|| Bundle::load(target).unwrap().hash().to_owned());
    assert_eq!(before, older);
    writer.finish().unwrap()
}

#[test]
fn written_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("house.bundle");
    let written = write(&target);
    let read = Bundle::load(&target).unwrap();
    assert_eq!(read.manifest(), written.manifest());
    assert_eq!(read.hash(), written.hash());
    let mut expected = manifest();
    expected.component.clone_from(&read.manifest().component);
    assert_eq!(*read.manifest(), expected, "every field survives the file");
    // What the writer adds by itself: names, sizes and hashes of the files.
    assert_eq!(read.manifest().component.keys().collect::<Vec<_>>(), ["denoiser", "tokenizer"]);
    for (part, name) in [("denoiser", "denoiser.onnx"), ("tokenizer", "tokenizer.model")] {
        let [file] = read.component(part).unwrap().files.as_slice() else { panic!("{part} is one file") };
        let bytes = std::fs::read(target.join(name)).unwrap();
        assert_eq!((file.name.as_str(), file.bytes), (name, bytes.len() as u64));
        assert_eq!(file.sha256, mindseye_base::file::sha256(&bytes), "{part}");
    }
    assert_eq!(read.component("tokenizer").unwrap().format, ComponentFormat::Sentencepiece);
    let denoiser = read.component("denoiser").unwrap();
    let names: Vec<&str> = denoiser.outputs.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["sample", "pose", "mask", "locate"]);
    let engine = by_name("rten")
        .unwrap()
        .prepare(&read.path("denoiser").unwrap(), &PrepareOptions::default())
        .unwrap();
    read.check_engine("denoiser", engine.as_ref()).unwrap();
    let error = read.check_engine("tokenizer", engine.as_ref()).unwrap_err().to_string();
    assert!(error.contains("component.tokenizer.inputs.latents"), "{error}");
    let error = read.path("vae_encoder").unwrap_err().to_string();
    assert!(error.contains("vae_encoder") && error.contains("denoiser, tokenizer"), "{error}");

    // Same content, same bytes; and a bundle replaces an older one, leaving nothing behind.
    let again = write(&target);
    assert_eq!(again.hash(), written.hash());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_unfinished_bundle_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let writer = BundleWriter::create(dir.path().join("b"), manifest()).unwrap();
    std::fs::write(writer.path("x"), b"x").unwrap();
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // Something that is no bundle is not replaced.
    std::fs::create_dir(dir.path().join("b")).unwrap();
    std::fs::write(dir.path().join("b/mine.txt"), b"mine").unwrap();
    let error = BundleWriter::create(dir.path().join("b"), manifest()).unwrap().finish().unwrap_err();
    assert!(error.to_string().contains("older bundle"), "{error}");
    assert!(dir.path().join("b/mine.txt").exists());
}

#[test]
fn whatever_does_not_match_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("b");
    write(&target);
    let text = std::fs::read_to_string(target.join(MANIFEST)).unwrap();
    let edits: [(&str, &str, &[&str]); 9] = [
        ("format = 2", "format = 1", &["format: wanted 2, got 1"]),
        ("target = \"cpu\"", "target = \"cpu\"\nsurprise = 1", &["surprise"]),
        ("prediction = \"x0\"", "prediction = \"velocity\"", &["prediction", "velocity", "x0"]),
        ("gap = 50.0", "gap = -1.0", &["rope.gap", "-1"]),
        ("steps = 4", "steps = 0", &["sampler.steps", "got 0"]),
        ("component.denoiser", "component.denoizer", &["denoizer", "denoiser"]),
        ("name = \"tokenizer.model\"", "name = \"../tokenizer.model\"", &["plain file name", "../"]),
        ("bytes = 6", "bytes = 7", &["tokenizer.model.bytes", "wanted 7, got 6"]),
        (
            "name = \"latents\"",
            "name = \"latent\"",
            &["component.denoiser.inputs.latent", "f32 [1, 4, frames, 2, 4]"],
        ),
    ];
    for (from, to, wanted) in edits {
        let count = if from.starts_with("component.") { usize::MAX } else { 1 };
        let edited = text.replacen(from, to, count);
        assert_ne!(edited, text, "{from} is not in the manifest:\n{text}");
        std::fs::write(target.join(MANIFEST), edited).unwrap();
        let error = Bundle::load(&target).unwrap_err().to_string();
        for part in wanted {
            assert!(error.contains(part), "{from} -> {to}: {error:?} does not say {part:?}");
        }
    }
    std::fs::write(target.join(MANIFEST), &text).unwrap();
    Bundle::load(&target).unwrap();
    std::fs::write(target.join("tokenizer.model"), b"Pieces").unwrap();
    let error = Bundle::load(&target).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model.sha256: wanted"), "{error}");
    std::fs::remove_file(target.join("tokenizer.model")).unwrap();
    let error = Bundle::load(&target).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model"), "{error}");
}

/// Weights beside a graph that the manifest does not list would be read without a hash.
#[test]
fn weights_that_the_manifest_does_not_list_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (target, other) = (dir.path().join("b"), dir.path().join("denoiser.onnx"));
    write(&target);
    let graph = target.join("denoiser.onnx");
    let before = std::fs::read(&graph).unwrap();
    let model = Model::load(&graph).unwrap();
    model.save(&other, &SaveOptions { external: ExternalData::Always, ..SaveOptions::default() }).unwrap();
    let after = std::fs::read(&other).unwrap();
    std::fs::write(&graph, &after).unwrap();
    std::fs::copy(dir.path().join("denoiser.onnx.data"), target.join("denoiser.onnx.data")).unwrap();
    let stated = |bytes: &[u8]| {
        format!("bytes = {}\nsha256 = \"{}\"", bytes.len(), mindseye_base::file::sha256(bytes))
    };
    let text = std::fs::read_to_string(target.join(MANIFEST)).unwrap();
    assert!(text.contains(&stated(&before)), "{text}");
    std::fs::write(target.join(MANIFEST), text.replace(&stated(&before), &stated(&after))).unwrap();
    let error = Bundle::load(&target).unwrap_err().to_string();
    assert!(error.contains("component.denoiser.files: wanted \"denoiser.onnx.data\""), "{error}");
}
