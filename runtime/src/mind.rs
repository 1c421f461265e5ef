//! A model bundle, loaded and ready: text encoder, codec and denoiser behind [`Mind`] and [`GroupEncoder`].
//!
//! Besides the manifest's own fields these tables of `[networks]` are read:
//! * `networks.text.words`: the closed vocabulary of a small model (ids 4, 5, ... after pad, end, begin, unknown);
//!   without it the `tokenizer` component is used;
//! * `networks.layout`: `motion_latents`, `box_latents`, and `recording_images`, which bounds the distance between
//!   context indices;
//! * `networks.camera`: `horizontal_fov_deg` (90 when left out), `pitch_deg` and `height_m` of the training camera.

use crate::context::{EncodeError, GROUP, GroupEncoder};
use crate::ground::{Mind, MindError, MindSpec};
use crate::image::{ModelCamera, RgbImage};
use crate::imagine::Settings;
use crate::lift::{LiftParams, LiftTableError};
use crate::planar::Pose2;
use mindseye_bridge::geometry::body_from_optical;
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::backend::{BackendError, Engine, PrepareOptions, Session, Tensor, by_name};
use mindseye_engines::bundle::{Bundle, BundleError, Manifest};
use mindseye_engines::denoise::{Denoise, DenoiseError};
use mindseye_engines::model::umt5::host_inputs;
use mindseye_engines::plucker;
use mindseye_engines::session_denoiser::SessionDenoiser;
use mindseye_engines::text::{Tokenizer, TokenizerError};
use nalgebra::{Isometry3, Translation3, UnitQuaternion};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// End of text, in the umT5 vocabulary and in ours.
const END: i64 = 1;
/// Ids before the words of a closed vocabulary.
const FIRST_WORD: i64 = 4;

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is none.
    #[error(
        "no model bundle found; looked in {}; give one with --bundle DIR or MINDSEYE_BUNDLE",
        looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NotFound {
        /// Places.
        looked: Vec<PathBuf>,
    },
    /// It does not hold together.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Its calibration is not whole.
    #[error(transparent)]
    Lift(#[from] LiftTableError),
    /// A graph cannot be run.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The denoiser does not fit.
    #[error(transparent)]
    Denoiser(#[from] DenoiseError),
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A part or a value that this program needs is not there.
    #[error("bundle: {0}")]
    Unsupported(String),
}

/// The directory of the bundle to use: the one given, else `MINDSEYE_BUNDLE`, else `models/house-tiny` in the
/// working directory, beside the executable, or in the source tree that this program was built from.
///
/// # Errors
/// [`LoadError::NotFound`] with the places. A place that was given is not searched for alternatives.
pub fn find_bundle(given: Option<&Path>, var: impl Fn(&str) -> Option<String>) -> Result<PathBuf, LoadError> {
    let is_bundle = |dir: &Path| dir.join(mindseye_engines::bundle::MANIFEST).is_file();
    let asked = given.map(Path::to_owned).or_else(|| var("MINDSEYE_BUNDLE").map(PathBuf::from));
    if let Some(dir) = asked {
        return if is_bundle(&dir) { Ok(dir) } else { Err(LoadError::NotFound { looked: vec![dir] }) };
    }
    let name = Path::new("models/house-tiny");
    let mut looked = vec![name.to_owned()];
    if let Some(beside) = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name))) {
        looked.push(beside);
    }
    looked.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name));
    match looked.iter().find(|dir| is_bundle(dir)) {
        Some(dir) => Ok(dir.clone()),
        None => Err(LoadError::NotFound { looked }),
    }
}

/// How a text becomes token ids.
enum Words {
    Closed(Vec<String>),
    SentencePiece(Arc<Tokenizer>),
}

/// A loaded bundle; sessions for threads are made from it.
pub struct Pipeline {
    bundle: Bundle,
    spec: MindSpec,
    words: Arc<Words>,
    text: Arc<dyn Engine>,
    encoder: Arc<dyn Engine>,
    decoder: Arc<dyn Engine>,
    denoiser: Arc<dyn Engine>,
    training_mount: Isometry3<f64>,
}

impl Pipeline {
    /// Loads and checks a bundle and prepares its graphs on the backend called `backend`, each evaluation on
    /// `threads` threads (0 = the backend's choice).
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(directory: &Path, backend: &str, threads: usize) -> Result<Self, LoadError> {
        let backend = by_name(backend)?;
        let bundle = Bundle::load(directory)?;
        let manifest = bundle.manifest();
        let lift = LiftParams::from_table(&manifest.lift)?;
        let spec = spec_of(&bundle, lift, &format!("{} {}", backend.name(), backend.version()))?;
        let words = match closed_vocabulary(manifest)? {
            Some(words) => Words::Closed(words),
            None => Words::SentencePiece(Arc::new(Tokenizer::open(&bundle.path("tokenizer")?)?)),
        };
        let options = PrepareOptions::default().with_threads(threads);
        let prepare = |component: &str| -> Result<Arc<dyn Engine>, LoadError> {
            let engine = backend.prepare(&bundle.path(component)?, &options)?;
            bundle.check_engine(component, engine.as_ref())?;
            Ok(engine)
        };
        if !bundle.has("vae_encoder") || !bundle.has("vae_decoder") {
            return Err(LoadError::Unsupported(format!(
                "{}: only bundles with a stateless codec (vae_encoder, vae_decoder) can be run by this version",
                directory.display()
            )));
        }
        let (text, encoder) = (prepare("text_encoder")?, prepare("vae_encoder")?);
        let (decoder, denoiser) = (prepare("vae_decoder")?, prepare("denoiser")?);
        let camera = Camera::of(manifest);
        Ok(Self {
            spec,
            words: Arc::new(words),
            text,
            encoder,
            decoder,
            denoiser,
            training_mount: camera.mount(),
            bundle,
        })
    }

    /// The bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// What it says about itself.
    pub fn spec(&self) -> &MindSpec {
        &self.spec
    }

    /// Replaces the sampler's number of steps and guidance weight, where given, for sessions made from now on.
    pub fn adjust(&mut self, steps: Option<usize>, guidance: Option<f32>) {
        let settings = &mut self.spec.settings;
        if let Some(steps) = steps {
            settings.steps = steps.max(1);
            settings.min_steps = settings.min_steps.min(settings.steps);
        }
        if let Some(guidance) = guidance {
            settings.guidance = guidance;
        }
    }

    /// The words of a closed vocabulary; empty for an open one.
    pub fn words(&self) -> &[String] {
        match self.words.as_ref() {
            Words::Closed(words) => words,
            Words::SentencePiece(_) => &[],
        }
    }

    /// Sessions for one thread that grounds goals. `seed` is used by goals that give none.
    ///
    /// # Errors
    /// When a session cannot be made or does not fit the configuration.
    pub fn mind(&self, seed: u64) -> Result<Box<dyn Mind>, LoadError> {
        self.mind_with(seed, self.spec.lift)
    }

    /// As [`Pipeline::mind`], with another calibration.
    ///
    /// # Errors
    /// As [`Pipeline::mind`].
    pub fn mind_with(&self, seed: u64, lift: LiftParams) -> Result<Box<dyn Mind>, LoadError> {
        let config = self.bundle.manifest().dit.clone();
        let mut spec = self.spec.clone();
        spec.settings.seed = seed;
        spec.lift = lift;
        Ok(Box::new(Thread {
            spec,
            words: self.words.clone(),
            text: self.text.session()?,
            codec: self.codec()?,
            decoder: self.decoder.session()?,
            denoiser: SessionDenoiser::new(config, self.denoiser.session()?)?,
            training_mount: self.training_mount,
        }))
    }

    /// A session for one thread that encodes frames.
    ///
    /// # Errors
    /// When a session cannot be made.
    pub fn encoder(&self) -> Result<Box<dyn GroupEncoder + Send>, LoadError> {
        Ok(Box::new(self.codec()?))
    }

    fn codec(&self) -> Result<Codec, LoadError> {
        let manifest = self.bundle.manifest();
        Ok(Codec {
            session: self.encoder.session()?,
            size: (manifest.image.width, manifest.image.height),
            mean: manifest.latent.mean.clone(),
            std: manifest.latent.std.clone(),
            cells: manifest.latent.height * manifest.latent.width,
            output: Tensor::empty(),
        })
    }
}

fn table_number(manifest: &Manifest, table: &str, key: &str) -> Option<f64> {
    let value = manifest.networks.get(table)?.get(key)?;
    value.as_float().or_else(|| value.as_integer().map(|i| i as f64)).filter(|v| v.is_finite())
}

fn closed_vocabulary(manifest: &Manifest) -> Result<Option<Vec<String>>, LoadError> {
    let Some(words) = manifest.networks.get("text").and_then(|t| t.get("words")) else { return Ok(None) };
    let words: Vec<String> =
        words.as_array().into_iter().flatten().filter_map(|w| w.as_str().map(str::to_lowercase)).collect();
    if words.is_empty() {
        return Err(LoadError::Unsupported("networks.text.words is not a list of words".into()));
    }
    Ok(Some(words))
}

/// The camera of the training world.
struct Camera {
    horizontal_fov_rad: f64,
    pitch_rad: f64,
    height_m: f64,
}

impl Camera {
    fn of(manifest: &Manifest) -> Self {
        let number = |key, default: f64| table_number(manifest, "camera", key).unwrap_or(default);
        Self {
            horizontal_fov_rad: number("horizontal_fov_deg", 90.0).to_radians(),
            pitch_rad: number("pitch_deg", 0.0).to_radians(),
            height_m: number("height_m", 1.0),
        }
    }

    fn mount(&self) -> Isometry3<f64> {
        let pitch = UnitQuaternion::from_euler_angles(0.0, self.pitch_rad, 0.0);
        Isometry3::from_parts(Translation3::new(0.0, 0.0, self.height_m), pitch * body_from_optical())
    }
}

fn spec_of(bundle: &Bundle, lift: LiftParams, engine: &str) -> Result<MindSpec, LoadError> {
    let manifest = bundle.manifest();
    if manifest.latent.frames != GROUP {
        let got = manifest.latent.frames;
        return Err(LoadError::Unsupported(format!("latent.frames: wanted {GROUP}, got {got}")));
    }
    let layout = |key| table_number(manifest, "layout", key).map(|v| v.max(0.0) as usize);
    let box_latents = layout("box_latents").unwrap_or(1).max(1);
    let target_latents = match layout("motion_latents") {
        Some(motion) => 1 + motion + box_latents,
        None => manifest.limits.target_trained,
    };
    let sampler = &manifest.sampler;
    let image = &manifest.image;
    Ok(MindSpec {
        camera: ModelCamera::from_fov(image.width, image.height, Camera::of(manifest).horizontal_fov_rad),
        frame_period: TimeDelta::from_secs_f64(image.frame_stride as f64 / image.frames_per_second),
        latent_len: manifest.latent.channels * manifest.latent.height * manifest.latent.width,
        context_max: manifest.limits.context_trained.clamp(1, manifest.limits.context_allowed),
        settings: Settings {
            target_latents,
            gap: manifest.rope.gap,
            max_span: layout("recording_images").map(|images| ((images.max(9) - 1) / GROUP - 1) as f64),
            steps: sampler.steps,
            min_steps: (sampler.steps / 3).max(1),
            guidance: sampler.guidance as f32,
            grid: sampler.grid,
            shift: sampler.shift,
            solver: sampler.solver,
            early_timestep: lift.early_timestep,
            candidates: 2,
            seed: 0,
        },
        lift,
        box_latents,
        bundle_sha256: bundle.hash().to_owned(),
        engine_sha256: engine_hash(manifest, engine),
    })
}

/// Hash of what is run: the denoiser's file and the backend's name and version.
fn engine_hash(manifest: &Manifest, engine: &str) -> String {
    use sha2::{Digest, Sha256};
    let files = manifest.component.get("denoiser").map(|c| c.files.as_slice()).unwrap_or_default();
    let mut hasher = Sha256::new();
    hasher.update(engine);
    for file in files {
        hasher.update(&file.sha256);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Codec {
    session: Box<dyn Session>,
    size: (usize, usize),
    mean: Vec<f32>,
    std: Vec<f32>,
    cells: usize,
    output: Tensor,
}

impl Codec {
    fn encode(&mut self, frames: &[&RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
        let (width, height) = self.size;
        let plane = width * height;
        let mut pixels = vec![0.0f32; GROUP * 3 * plane];
        for (t, frame) in frames.iter().enumerate() {
            if frame.data.len() != 3 * plane {
                let (expected, got) = (3 * plane, frame.data.len());
                return Err(EncodeError::Size { what: "frame", expected, got });
            }
            // (frame, channel, row, column), -1..1
            for (p, rgb) in frame.data.chunks_exact(3).enumerate() {
                for (c, value) in rgb.iter().enumerate() {
                    pixels[(t * 3 + c) * plane + p] = f32::from(*value) / 127.5 - 1.0;
                }
            }
        }
        let input = Tensor::f32(&[1, GROUP, 3, height, width], pixels);
        self.session
            .run_into(&[("frames", &input)], &mut [("latent", &mut self.output)])
            .map_err(|e| EncodeError::Backend(e.to_string()))?;
        let values = self.output.as_f32().unwrap_or_default();
        if values.len() != latent.len() {
            let (expected, got) = (latent.len(), values.len());
            return Err(EncodeError::Size { what: "latent", expected, got });
        }
        for (i, (to, from)) in latent.iter_mut().zip(values).enumerate() {
            let channel = i / self.cells;
            *to = (from - self.mean[channel]) / self.std[channel];
        }
        Ok(())
    }
}

impl GroupEncoder for Codec {
    fn latent_len(&self) -> usize {
        self.mean.len() * self.cells
    }

    fn encode_group(&mut self, frames: &[RgbImage], latent: &mut [f32]) -> Result<(), EncodeError> {
        if frames.len() != GROUP {
            return Err(EncodeError::Size { what: "group", expected: GROUP, got: frames.len() });
        }
        self.encode(&frames.iter().collect::<Vec<_>>(), latent)
    }

    fn encode_still(&mut self, frame: &RgbImage, latent: &mut [f32]) -> Result<(), EncodeError> {
        self.encode(&[frame; GROUP], latent)
    }

    fn reset(&mut self) {}
}

struct Thread {
    spec: MindSpec,
    words: Arc<Words>,
    text: Box<dyn Session>,
    codec: Codec,
    decoder: Box<dyn Session>,
    denoiser: SessionDenoiser,
    training_mount: Isometry3<f64>,
}

fn part(part: &'static str) -> impl Fn(BackendError) -> MindError {
    move |e| MindError::Part { part, reason: e.to_string() }
}

/// Ids of the known words in a text, in the order of the vocabulary (colours come before shapes there), and the
/// end. Other words carry no meaning for the model; but without any known word there is nothing to look for.
fn closed_ids(words: &[String], text: &str, length: usize) -> Result<Vec<i64>, MindError> {
    let said: Vec<String> =
        text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect();
    let mut ids: Vec<i64> = words
        .iter()
        .enumerate()
        .filter(|(_, word)| said.iter().any(|s| s == *word || s.strip_suffix('s') == Some(word)))
        .map(|(i, _)| FIRST_WORD + i as i64)
        .collect();
    if ids.is_empty() {
        return Err(MindError::Words { known: words.join(", ") });
    }
    if ids.len() >= length {
        return Err(MindError::Words {
            known: format!("one thing at a time, by at most {} of: {}", length - 1, words.join(", ")),
        });
    }
    ids.push(END);
    Ok(ids)
}

impl Mind for Thread {
    fn spec(&self) -> &MindSpec {
        &self.spec
    }

    fn encode_text(&mut self, text: &str) -> Result<Vec<f32>, MindError> {
        let (length, dim) = {
            let config = self.denoiser.config();
            (config.text_len, config.text_dim)
        };
        let mut ids = match self.words.as_ref() {
            _ if text.is_empty() => vec![END],
            Words::Closed(words) => closed_ids(words, text, length)?,
            Words::SentencePiece(tokenizer) => {
                let encoded = tokenizer
                    .encode_prompt(text, length)
                    .map_err(|e| MindError::Part { part: "tokenizer", reason: e.to_string() })?;
                encoded.ids.iter().take(encoded.length).map(|id| i64::from(*id)).collect()
            }
        };
        let used = ids.len();
        ids.resize(length, 0);
        let (bias, keep) = host_inputs(&[used], length);
        let ids = Tensor::i64(&[1, length], ids);
        let bias = Tensor::f32(&[1, 1, 1, length], bias);
        let keep = Tensor::f32(&[1, length, 1], keep);
        // A graph asks only for those inputs that its blocks use.
        let given = [("ids", &ids), ("mask_bias", &bias), ("keep", &keep)];
        let ports = self.text.engine().inputs().to_vec();
        let inputs: Vec<(&str, &Tensor)> =
            given.into_iter().filter(|(name, _)| ports.iter().any(|p| p.name == *name)).collect();
        let mut rows = Tensor::empty();
        self.text.run_into(&inputs, &mut [("rows", &mut rows)]).map_err(part("text encoder"))?;
        let rows = rows.into_f32().unwrap_or_default();
        if rows.len() != length * dim {
            let reason = format!("gave {} values, expected {}", rows.len(), length * dim);
            return Err(MindError::Part { part: "text encoder", reason });
        }
        Ok(rows)
    }

    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        let mut latent = vec![0.0; self.spec.latent_len];
        self.codec.encode_still(frame, &mut latent)?;
        Ok(latent)
    }

    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        let len = self.spec.latent_len;
        let count = latents.len() / len;
        if count == 0 {
            return Ok(Vec::new());
        }
        let (channels, cells) = (self.codec.mean.len(), self.codec.cells);
        let z: Vec<f32> = latents[..count * len]
            .iter()
            .enumerate()
            .map(|(i, v)| {
                let channel = i / cells % channels;
                v * self.codec.std[channel] + self.codec.mean[channel]
            })
            .collect();
        let config = self.denoiser.config();
        let shape = [count, channels, 1, config.latent_height, config.latent_width];
        let mut out = Tensor::empty();
        self.decoder
            .run_into(&[("latent", &Tensor::f32(&shape, z))], &mut [("frames", &mut out)])
            .map_err(part("decoder"))?;
        let pixels = out.into_f32().unwrap_or_default();
        let (width, height) = self.codec.size;
        let plane = width * height;
        if pixels.len() != count * GROUP * 3 * plane {
            let reason = format!("gave {} values, expected {}", pixels.len(), count * GROUP * 3 * plane);
            return Err(MindError::Part { part: "decoder", reason });
        }
        let frame = |values: &[f32]| {
            let mut data = vec![0u8; 3 * plane];
            for (c, channel) in values.chunks_exact(plane).enumerate() {
                for (p, v) in channel.iter().enumerate() {
                    data[p * 3 + c] = ((v + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
                }
            }
            RgbImage { width, height, data }
        };
        Ok(pixels.chunks_exact(3 * plane).map(frame).collect())
    }

    fn camera_rays(
        &self,
        here_from_base: &[Pose2],
        base_from_camera: Option<&Isometry3<f64>>,
    ) -> Option<Vec<f32>> {
        let config = self.denoiser.config();
        if config.camera_channels != plucker::CHANNELS {
            return None;
        }
        let mount = base_from_camera.unwrap_or(&self.training_mount);
        let poses: Vec<plucker::Pose> = here_from_base
            .iter()
            .map(|base| {
                let m = (base.to_isometry() * mount).to_homogeneous();
                std::array::from_fn(|i| std::array::from_fn(|j| m[(i, j)]))
            })
            .collect();
        let camera = &self.spec.camera;
        let intrinsics = plucker::Intrinsics {
            fx: camera.focal_px,
            fy: camera.focal_px,
            cx: camera.width as f64 / 2.0,
            cy: camera.height as f64 / 2.0,
        };
        let [rows, columns] = config.grid();
        let cell = camera.height / rows;
        if camera.width != cell * columns {
            return None;
        }
        let maps = plucker::features(&poses, 0, &intrinsics, camera.height, camera.width, cell).ok()?;
        // (channel, latent, token) to (latent, token, channel)
        let (tokens, latents) = (rows * columns, 1 + (poses.len() - 1) / GROUP);
        let mut rays = vec![0.0; maps.len()];
        for channel in 0..plucker::CHANNELS {
            for at in 0..latents * tokens {
                rays[at * plucker::CHANNELS + channel] = maps[channel * latents * tokens + at];
            }
        }
        Some(rays)
    }

    fn denoiser(&mut self) -> &mut dyn Denoise {
        &mut self.denoiser
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_become_known_words() {
        let words: Vec<String> = ["red", "blue", "chair", "table"].map(String::from).to_vec();
        let check = |text: &str, want: Result<&[i64], &str>| match (closed_ids(&words, text, 4), want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{text}"),
            (Err(e), Err(want)) => assert!(e.to_string().contains(want), "{text}: {e}"),
            (got, want) => panic!("{text}: {got:?}, wanted {want:?}"),
        };
        check("find the red chair", Ok(&[4, 6, 1]));
        check("Find the RED chair, please!", Ok(&[4, 6, 1]));
        check("the chair that is red", Ok(&[4, 6, 1]));
        check("chairs", Ok(&[6, 1]));
        check("credence table", Ok(&[7, 1]));
        check("the fridge", Err("red, blue, chair, table"));
        check("red blue chair table", Err("one thing at a time"));
    }

    #[test]
    fn a_bundle_that_is_not_there_is_told_with_its_place() {
        let error = find_bundle(Some(Path::new("/nowhere/bundle")), |_| None).unwrap_err();
        assert!(error.to_string().contains("/nowhere/bundle"), "{error}");
        let error = find_bundle(None, |_| Some("/nowhere/else".into())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/else"), "{error}");
    }
}
