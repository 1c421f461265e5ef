//! A model bundle, loaded and ready: text encoder, codec and denoiser behind [`Mind`] and [`GroupEncoder`].
//!
//! Two kinds of bundles are run by the same code:
//! * small models with a stateless codec, a closed vocabulary and lift heads;
//! * the full Wan2.2 family: streaming video autoencoder, umT5 with its SentencePiece tokenizer, no heads. Such a
//!   model imagines; it has nothing to read a metric pose from (see [`crate::ground`]).
//!
//! With `denoiser_prefill` and `denoiser_cached` (a network trained with the one-way mask) the context's keys and
//! values are computed once per goal and branch; otherwise `denoiser` sees context and targets at every step.
//!
//! What the manifest holds beside the components is described at [`mindseye_engines::bundle::Networks`].

use crate::codec::{CodecEngines, CodecError, Decoder, Encoder};
use crate::context::{EncodeError, GROUP, GroupEncoder};
use crate::ground::{Mind, MindError, MindSpec, RaysError};
use crate::image::{ModelCamera, RgbImage};
use crate::imagine::{Dropped, RolloutSettings, Rope};
use crate::lift::LiftParams;
use crate::no_model::NoDenoiser;
use mindseye_base::file::{sha256, sha256_of_file};
use mindseye_bridge::geometry::body_from_optical;
use mindseye_bridge::time::TimeDelta;
use mindseye_engines::backend::{Backend, BackendError, Engine, PrepareOptions, Session, Tensor, by_name};
use mindseye_engines::bundle::{Bundle, BundleError, CameraSpec, LayoutSpec, Manifest, PortSpec, TextSpec};
use mindseye_engines::denoise::{Denoise, DenoiseError};
use mindseye_engines::model::umt5::host_inputs;
use mindseye_engines::passport::{PassportError, Present, engines_in};
use mindseye_engines::plucker::{self, Intrinsics, PluckerError};
use mindseye_engines::residency::{Keep, Residency, SETTINGS_FILE, Source, keep_of};
use mindseye_engines::session_denoiser::{CachedDenoiser, SessionDenoiser, SplitDenoiser};
use mindseye_engines::text::{END, Tokenizer, TokenizerError, unknown_words, word_ids};
use mindseye_engines::trt::{LoadOptions, TensorRtBackend};
use nalgebra::{Isometry3, Translation3, UnitQuaternion};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    /// A graph cannot be run.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The denoiser does not fit.
    #[error(transparent)]
    Denoiser(#[from] DenoiseError),
    /// A folder of engines lacks one that is run.
    #[error("{} holds no engine of {component:?}; build it again with `mindseye engine build`", folder.display())]
    NoEngine {
        /// The component.
        component: String,
        /// The folder.
        folder: PathBuf,
    },
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The codec's graphs do not fit each other.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The folder of engines cannot be read, or an engine does not fit the bundle or this machine.
    #[error(transparent)]
    Passport(#[from] PassportError),
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bundle holds weights instead of graphs.
    #[error(
        "bundle: {} holds weights, not graphs; make it runnable with: mindseye-tools export {} --out DIR",
        directory.display(), directory.display()
    )]
    Weights {
        /// Where it is.
        directory: PathBuf,
    },
    /// The bundle lacks a table that is needed to run it.
    #[error("bundle: {0}: wanted a table, got nothing")]
    Table(&'static str),
    /// The bundle's latents hold another number of frames than the runtime gathers.
    #[error("bundle: latent.frames: wanted {GROUP}, got {0}")]
    Frames(usize),
    /// More context was asked for than the bundle allows, or none.
    #[error(
        "bundle: limits.context_allowed is {allowed}; a context of {asked} latents was asked for, wanted 1 to {allowed}"
    )]
    Context {
        /// Asked for.
        asked: usize,
        /// Allowed by the bundle.
        allowed: usize,
    },
    /// Two bundles that should share what was seen do not.
    #[error(
        "the fallback {} has another codec, or pictures of another size, than {}: what one remembers means nothing to the \
         other; give a fallback that was trained on the same latents",
        other.display(), one.display()
    )]
    OtherCodec {
        /// The one.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// There is nothing to calibrate.
    #[error("bundle: this model has no lift heads to be calibrated")]
    NoLift,
}

/// The model that ships, for rooms of plain shapes.
pub const SHIPPED: &str = "house-tiny";
/// The one for rooms with furniture.
pub const SHIPPED_FURNISHED: &str = "furnished-tiny";

/// The directory of the bundle to use: [`find_bundle_or`] of [`SHIPPED`].
///
/// # Errors
/// As there.
pub fn find_bundle(given: Option<&Path>, var: impl Fn(&str) -> Option<String>) -> Result<PathBuf, LoadError> {
    find_bundle_or(SHIPPED, given, var)
}

/// The directory of the bundle to use: the one given, else `MINDSEYE_BUNDLE`, else `models/` with this name in the
/// working directory, beside the executable, or in the source tree that this program was built from.
///
/// # Errors
/// [`LoadError::NotFound`] with the places. A place that was given is not searched for alternatives.
pub fn find_bundle_or(
    shipped: &str,
    given: Option<&Path>,
    var: impl Fn(&str) -> Option<String>,
) -> Result<PathBuf, LoadError> {
    let is_bundle = |dir: &Path| dir.join(mindseye_engines::bundle::MANIFEST).is_file();
    let asked = given.map(Path::to_owned).or_else(|| var("MINDSEYE_BUNDLE").map(PathBuf::from));
    if let Some(dir) = asked {
        return if is_bundle(&dir) { Ok(dir) } else { Err(LoadError::NotFound { looked: vec![dir] }) };
    }
    let name = Path::new("models").join(shipped);
    let mut looked = vec![name.clone()];
    if let Some(beside) = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(&name))) {
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
    SentencePiece {
        tokenizer: Box<Tokenizer>,
        /// The training's sentence, `{}` in the place of what is wanted.
        prompt: Option<String>,
    },
}

/// What runs a component: a backend and its file.
type Part = (Arc<dyn Backend>, PathBuf);

/// The denoiser's engines.
enum DenoiserEngines {
    /// Context and targets at every step.
    Joint(Arc<dyn Engine>),
    /// Context once, then targets alone.
    Halves(Arc<dyn Engine>, Arc<dyn Engine>),
    /// A server has it.
    Elsewhere,
}

/// A loaded bundle; sessions for threads are made from it.
pub struct Pipeline {
    bundle: Bundle,
    spec: MindSpec,
    words: Arc<Words>,
    /// `None`: a server has it.
    text: Option<Arc<dyn Engine>>,
    encoder: CodecEngines,
    decoder: CodecEngines,
    denoiser: DenoiserEngines,
    depth: Option<Arc<dyn Engine>>,
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
        let part = |bundle: &Bundle, name: &str| Ok((backend.clone(), bundle.path(name)?));
        let mut pipeline = Self::load_parts(bundle, Keep::All, threads, &part)?;
        let engine = format!("{} {}", backend.name(), backend.version());
        pipeline.spec.engine_sha256 = engine_hash(pipeline.bundle.manifest(), &engine);
        Ok(pipeline)
    }

    /// As [`Pipeline::load`], without what a server does in its place: the denoiser, and a text encoder with an open
    /// vocabulary. Their files need not be there.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load_served(directory: &Path, backend: &str, threads: usize) -> Result<Self, LoadError> {
        let backend = by_name(backend)?;
        let open = !matches!(
            Bundle::load_parts(directory, &|_| false)?.manifest().networks.text,
            Some(TextSpec::Closed { .. })
        );
        let elsewhere = |name: &str| name.starts_with("denoiser") || (open && name == "text_encoder");
        let bundle = Bundle::load_parts(directory, &|name| !elsewhere(name))?;
        let part = |bundle: &Bundle, name: &str| Ok((backend.clone(), bundle.path(name)?));
        Self::load_wanted(bundle, Keep::All, threads, &part, &|name| !elsewhere(name))
    }

    /// As [`Pipeline::load`], with the engines of a folder that `engine build` wrote in place of the bundle's graphs.
    /// Their passports must match the bundle and this machine. Parts that are graphs run on the backend called
    /// `backend`.
    ///
    /// # Errors
    /// [`LoadError`]; a passport that does not match names the field.
    pub fn load_engines(
        directory: &Path,
        engines: &Path,
        backend: &str,
        threads: usize,
    ) -> Result<Self, LoadError> {
        Self::load_engines_on(directory, engines, by_name(backend)?, None, threads)
    }

    /// As [`Pipeline::load_engines`], graphs on `backend` and engines on `gpu`; TensorRT on the first device where none
    /// is given.
    ///
    /// # Errors
    /// As [`Pipeline::load_engines`].
    pub fn load_engines_on(
        directory: &Path,
        engines: &Path,
        backend: Arc<dyn Backend>,
        gpu: Option<TensorRtBackend>,
        threads: usize,
    ) -> Result<Self, LoadError> {
        let bundle = Bundle::load(directory)?;
        let built = engines_in(engines)?;
        let mut tensorrt: Option<Arc<dyn Backend>> = None;
        if built.iter().any(|(_, passport)| passport.library != "onnx") {
            let mut gpu = match gpu {
                Some(gpu) => gpu,
                None => TensorRtBackend::open(&LoadOptions::default(), 0)?,
            };
            gpu.bundle_sha256 = Some(bundle.hash().to_owned());
            tensorrt = Some(Arc::new(gpu));
        }
        let part = |bundle: &Bundle, name: &str| -> Result<Part, LoadError> {
            // A part of the bundle in an engine's place would be another model, on another machine: never silently.
            let Some((file, passport)) = built.iter().find(|(_, p)| p.component == name) else {
                return Err(LoadError::NoEngine { component: name.to_owned(), folder: engines.to_owned() });
            };
            if let Some(gpu) = tensorrt.as_ref().filter(|_| passport.library != "onnx") {
                return Ok((gpu.clone(), file.clone()));
            }
            let here = Present { bundle_sha256: Some(bundle.hash()), ..Present::default() };
            passport.check(file, &here)?;
            Ok((backend.clone(), file.clone()))
        };
        let keep = keep_of(engines)
            .map_err(|source| LoadError::File { path: engines.join(SETTINGS_FILE), source })?;
        let mut pipeline = Self::load_parts(bundle, keep, threads, &part)?;
        let denoiser = built.iter().find(|(_, p)| p.component == "denoiser").map(|(_, p)| &p.engine_sha256);
        pipeline.spec.engine_sha256 = denoiser.cloned().unwrap_or_default();
        Ok(pipeline)
    }

    fn load_parts(
        bundle: Bundle,
        keep: Keep,
        threads: usize,
        part: &dyn Fn(&Bundle, &str) -> Result<Part, LoadError>,
    ) -> Result<Self, LoadError> {
        Self::load_wanted(bundle, keep, threads, part, &|_| true)
    }

    fn load_wanted(
        bundle: Bundle,
        keep: Keep,
        threads: usize,
        part: &dyn Fn(&Bundle, &str) -> Result<Part, LoadError>,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Self, LoadError> {
        let manifest = bundle.manifest();
        check_runnable(&bundle)?;
        let spec = spec_of(&bundle)?;
        let words = match &manifest.networks.text {
            Some(TextSpec::Closed { words, .. }) => Words::Closed(words.clone()),
            _ if !wanted("text_encoder") => Words::Closed(Vec::new()),
            open => Words::SentencePiece {
                tokenizer: Box::new(Tokenizer::open(&bundle.path("tokenizer")?)?),
                prompt: match open {
                    Some(TextSpec::Sentence { prompt }) => Some(prompt.clone()),
                    _ => None,
                },
            },
        };
        let options = PrepareOptions::default().with_threads(threads);
        let residency = Residency::new(keep, &|component| bundle.has(component) && wanted(component));
        let prepare = |component: &str| -> Result<Arc<dyn Engine>, LoadError> {
            let (backend, file) = part(&bundle, component)?;
            let stated = bundle.component(component)?;
            let ports =
                |specs: &[PortSpec]| specs.iter().map(PortSpec::to_port).collect::<Result<Vec<_>, _>>();
            let (inputs, outputs) = (ports(&stated.inputs)?, ports(&stated.outputs)?);
            let source = Source { backend, file, options: options.clone(), inputs, outputs };
            let engine = residency.prepare(component, source)?;
            bundle.check_engine(component, engine.as_ref())?;
            Ok(engine)
        };
        let codec = |component: &str| -> Result<CodecEngines, LoadError> {
            if bundle.has(component) {
                return Ok(CodecEngines::Plain(prepare(component)?));
            }
            let part = |name| prepare(&format!("{component}_{name}"));
            Ok(CodecEngines::Stream(part("first")?, part("next")?))
        };
        let text = wanted("text_encoder").then(|| prepare("text_encoder")).transpose()?;
        let (encoder, decoder) = (codec("vae_encoder")?, codec("vae_decoder")?);
        let denoiser = if !wanted("denoiser") {
            DenoiserEngines::Elsewhere
        } else if bundle.has("denoiser_prefill") && bundle.has("denoiser_cached") {
            DenoiserEngines::Halves(prepare("denoiser_prefill")?, prepare("denoiser_cached")?)
        } else {
            DenoiserEngines::Joint(prepare("denoiser")?)
        };
        let depth = if bundle.has("depth") { Some(prepare("depth")?) } else { None };
        let words = Arc::new(words);
        Ok(Self { spec, words, text, encoder, decoder, denoiser, depth, bundle })
    }

    /// Puts another graph of the same inputs and outputs in the denoiser's place, for sessions made from now on.
    ///
    /// # Errors
    /// When it cannot be prepared or does not fit the bundle.
    pub fn replace_denoiser(
        &mut self,
        backend: &dyn Backend,
        file: &Path,
        threads: usize,
    ) -> Result<(), LoadError> {
        let engine = backend.prepare(file, &PrepareOptions::default().with_threads(threads))?;
        self.bundle.check_engine("denoiser", engine.as_ref())?;
        self.denoiser = DenoiserEngines::Joint(engine);
        self.spec.engine_sha256 =
            sha256_of_file(file).map_err(|source| LoadError::File { path: file.to_owned(), source })?;
        Ok(())
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

    /// Lets sessions made from now on look at up to `latents` context latents, also at more than training did.
    ///
    /// # Errors
    /// [`LoadError::Context`] where the bundle's limits do not allow it.
    pub fn look_at(&mut self, latents: usize) -> Result<(), LoadError> {
        let allowed = self.bundle.manifest().limits.context_allowed;
        if !(1..=allowed).contains(&latents) {
            return Err(LoadError::Context { asked: latents, allowed });
        }
        self.spec.context_max = latents;
        Ok(())
    }

    /// The words of a closed vocabulary; empty for an open one.
    pub fn words(&self) -> &[String] {
        match self.words.as_ref() {
            Words::Closed(words) => words,
            Words::SentencePiece { .. } => &[],
        }
    }

    /// Pieces of the tokenizer of an open vocabulary; `None` for a closed one.
    pub fn pieces(&self) -> Option<usize> {
        match self.words.as_ref() {
            Words::Closed(_) => None,
            Words::SentencePiece { tokenizer, .. } => Some(tokenizer.vocabulary()),
        }
    }

    /// Whether texts are encoded here.
    pub fn has_text_encoder(&self) -> bool {
        self.text.is_some()
    }

    /// Refuses another model whose latents are not this one's.
    ///
    /// # Errors
    /// [`LoadError::Codec`].
    pub(crate) fn check_same_codec(&self, other: &Self) -> Result<(), LoadError> {
        let codec = |p: &Self| {
            let manifest = p.bundle.manifest();
            let parts = manifest.component.iter().filter(|(name, _)| name.starts_with("vae_"));
            let files = parts.flat_map(|(_, c)| c.files.iter().map(|f| f.sha256.clone())).collect::<Vec<_>>();
            (files, manifest.image.width, manifest.image.height, manifest.latent.channels, p.spec.detail)
        };
        if codec(self) == codec(other) {
            return Ok(());
        }
        let directory = |p: &Self| p.bundle.directory().to_owned();
        Err(LoadError::OtherCodec { one: directory(self), other: directory(other) })
    }

    /// Whether frames are encoded as a stream, by a video autoencoder with state.
    pub fn is_streaming(&self) -> bool {
        matches!(self.encoder, CodecEngines::Stream(..))
    }

    /// Whether the context's keys and values are computed once per goal.
    pub fn caches_context(&self) -> bool {
        matches!(self.denoiser, DenoiserEngines::Halves(..))
    }

    /// Sessions for one thread that grounds goals. `seed` is used by goals that give none.
    ///
    /// # Errors
    /// When a session cannot be made or does not fit the configuration.
    pub fn mind(&self, seed: u64) -> Result<Box<dyn Mind>, LoadError> {
        let mut spec = self.spec.clone();
        spec.settings.seed = seed;
        self.thread(spec)
    }

    /// As [`Pipeline::mind`], with another calibration.
    ///
    /// # Errors
    /// As [`Pipeline::mind`]; a model without lift heads has nothing to calibrate.
    pub fn mind_with(&self, seed: u64, lift: LiftParams) -> Result<Box<dyn Mind>, LoadError> {
        let mut spec = self.spec.clone();
        spec.settings.seed = seed;
        if spec.lift.is_none() {
            return Err(LoadError::NoLift);
        }
        spec.lift = Some(lift);
        self.thread(spec)
    }

    fn thread(&self, spec: MindSpec) -> Result<Box<dyn Mind>, LoadError> {
        let manifest = self.bundle.manifest();
        let config = manifest.dit.clone();
        let denoiser: Box<dyn Denoise + Send> =
            match &self.denoiser {
                DenoiserEngines::Joint(engine) => Box::new(SessionDenoiser::new(config, engine.session()?)?),
                DenoiserEngines::Halves(prefill, cached) => Box::new(SplitDenoiser::new(
                    CachedDenoiser::new(config, prefill.session()?, cached.session()?)?,
                )),
                DenoiserEngines::Elsewhere => Box::new(NoDenoiser(config)),
            };
        Ok(Box::new(Thread {
            spec,
            words: self.words.clone(),
            text: self.text.as_ref().map(|text| text.session()).transpose()?,
            encoder: Encoder::new(&self.encoder, manifest)?,
            decoder: Decoder::new(&self.decoder, manifest)?,
            denoiser,
            depth: match (&self.depth, &manifest.networks.depth) {
                (Some(engine), Some(config)) => {
                    Some(DepthReader::new(engine.session()?, [config.width, config.height]))
                }
                _ => None,
            },
        }))
    }

    /// Decodes latents for one thread, beside the minds; `None` where the codec is a video autoencoder with state, which
    /// takes too long for pictures of work in progress.
    ///
    /// # Errors
    /// When a session cannot be made.
    pub fn latent_decoder(&self) -> Result<Option<LatentDecoder>, LoadError> {
        let mut decoder = Decoder::new(&self.decoder, self.bundle.manifest())?;
        let decode = move |latents: &[f32]| decoder.decode(latents).map_err(MindError::Decode);
        Ok((!self.is_streaming()).then(|| Box::new(decode) as LatentDecoder))
    }

    /// A session for one thread that encodes frames.
    ///
    /// # Errors
    /// When a session cannot be made.
    pub fn encoder(&self) -> Result<Box<dyn GroupEncoder + Send>, LoadError> {
        Ok(Box::new(Encoder::new(&self.encoder, self.bundle.manifest())?))
    }
}

/// A clip `[n, channels, height, width]` to `4 n` frames, as [`Mind::decode`] does it.
pub type LatentDecoder = Box<dyn FnMut(&[f32]) -> Result<Vec<RgbImage>, MindError> + Send>;

/// Refuses what can only be run after another command.
fn check_runnable(bundle: &Bundle) -> Result<(), LoadError> {
    use mindseye_engines::bundle::ComponentFormat;
    let weights = |name: &str| {
        bundle.component(name).is_ok_and(|component| component.format == ComponentFormat::Safetensors)
    };
    if ["denoiser", "vae", "text_encoder"].into_iter().any(weights) {
        return Err(LoadError::Weights { directory: bundle.directory().to_owned() });
    }
    Ok(())
}

/// The thing that a goal names: without "find", "go to" and the like in front, and without an end mark.
fn wanted_thing(text: &str) -> &str {
    let mut thing = text.trim().trim_end_matches(['.', '!', '?']).trim_end();
    for verb in ["please ", "find ", "go to ", "drive to ", "look for ", "search for ", "show me "] {
        let starts = thing.get(..verb.len()).is_some_and(|start| start.eq_ignore_ascii_case(verb));
        if starts && thing.len() > verb.len() {
            thing = thing[verb.len()..].trim_start();
        }
    }
    thing
}

/// `base_from_camera` of the training pictures.
fn mounting(camera: &CameraSpec) -> Isometry3<f64> {
    let pitch = UnitQuaternion::from_euler_angles(0.0, camera.pitch_deg.to_radians(), 0.0);
    Isometry3::from_parts(Translation3::new(0.0, 0.0, camera.height_m), pitch * body_from_optical())
}

fn spec_of(bundle: &Bundle) -> Result<MindSpec, LoadError> {
    let manifest = bundle.manifest();
    if manifest.latent.frames != GROUP {
        return Err(LoadError::Frames(manifest.latent.frames));
    }
    let Some(LayoutSpec { motion_latents, box_latents, recording_images }) = manifest.networks.layout else {
        return Err(LoadError::Table("networks.layout"));
    };
    let lift = manifest.lift.as_ref();
    let sampler = &manifest.sampler;
    let image = &manifest.image;
    Ok(MindSpec {
        camera: match &manifest.networks.camera {
            Some(camera) => {
                ModelCamera::from_fov(image.width, image.height, camera.horizontal_fov_deg.to_radians())
            }
            None => ModelCamera::any(image.width, image.height),
        },
        frame_period: TimeDelta::from_secs_f64(image.frame_stride as f64 / image.frames_per_second),
        latent_len: manifest.latent.channels * manifest.latent.height * manifest.latent.width,
        context_max: manifest.limits.context_trained.clamp(1, manifest.limits.context_allowed),
        context_trained: manifest.limits.context_trained,
        settings: RolloutSettings {
            target_latents: 1 + motion_latents + box_latents,
            gap: manifest.rope.gap,
            max_span: recording_images.map(|images| ((images - 1) / GROUP - 1) as f64),
            steps: sampler.steps,
            min_steps: (sampler.steps / 3).max(1),
            guidance: sampler.guidance as f32,
            dropped: Dropped::default(),
            rope: Rope::default(),
            grid: sampler.grid,
            shift: sampler.shift,
            solver: sampler.solver,
            glance_timestep: lift.map_or(1000.0, |lift| lift.glance_timestep),
            // Heads are averaged over candidates; without heads one drive is all that is looked at.
            candidates: if lift.is_some() { 4 } else { 1 },
            seed: 0,
        },
        lift: lift.cloned(),
        detail: manifest
            .networks
            .depth
            .as_ref()
            .filter(|_| bundle.has("depth"))
            .map(|depth| (depth.width, depth.height)),
        guide: sampler.guide,
        mounting: manifest.networks.camera.as_ref().map(mounting),
        attributes: match &manifest.networks.text {
            Some(TextSpec::Closed { attributes, .. }) => attributes.clone(),
            _ => Vec::new(),
        },
        box_min: manifest.bounding_box.score_min,
        box_latents,
        bundle_sha256: bundle.hash().to_owned(),
        engine_sha256: String::new(),
    })
}

/// Hash of what is run: the denoiser's file and the backend's name and version.
fn engine_hash(manifest: &Manifest, engine: &str) -> String {
    let mut run = engine.to_owned();
    // As they are run: both halves, or the whole.
    let halves = ["denoiser_prefill", "denoiser_cached"];
    let split = halves.iter().all(|name| manifest.component.contains_key(*name));
    for name in if split { &halves[..] } else { &["denoiser"] } {
        for file in manifest.component.get(*name).map(|c| c.files.as_slice()).unwrap_or_default() {
            run.push_str(&file.sha256);
        }
    }
    sha256(run.as_bytes())
}

/// Pictures whose depth is known: those of a memory are read once, whatever number of goals ask for them.
const DEPTHS_KEPT: usize = 96;

/// Reads depth from pictures of one size.
struct DepthReader {
    session: Box<dyn Session>,
    /// Width and height.
    size: [usize; 2],
    /// Pixels and their depth, the oldest first; at most [`DEPTHS_KEPT`].
    known: std::collections::VecDeque<(Vec<u8>, Vec<f32>)>,
}

impl DepthReader {
    fn new(session: Box<dyn Session>, size: [usize; 2]) -> Self {
        Self { session, size, known: std::collections::VecDeque::with_capacity(DEPTHS_KEPT) }
    }

    fn read(&mut self, picture: &RgbImage) -> Result<Vec<f32>, MindError> {
        let (expected, got) = (self.size, [picture.width, picture.height]);
        if expected != got {
            return Err(MindError::DepthSize { expected, got });
        }
        if let Some((_, depth)) = self.known.iter().find(|(pixels, _)| *pixels == picture.data) {
            return Ok(depth.clone());
        }
        let depth = self.read_anew(picture)?;
        if self.known.len() == DEPTHS_KEPT {
            self.known.pop_front();
        }
        self.known.push_back((picture.data.clone(), depth.clone()));
        Ok(depth)
    }

    fn read_anew(&mut self, picture: &RgbImage) -> Result<Vec<f32>, MindError> {
        let channel = |c: usize| picture.data.iter().skip(c).step_by(3).map(|v| f32::from(*v) / 127.5 - 1.0);
        let pixels = (0..3).flat_map(channel).collect();
        let input = Tensor::f32(&[1, 3, picture.height, picture.width], pixels);
        let mut output = Tensor::empty();
        self.session
            .run_into(&[("picture", &input)], &mut [("log_depth", &mut output)])
            .map_err(MindError::Depth)?;
        let mut depth = output.into_f32().unwrap_or_default();
        depth.iter_mut().for_each(|v| *v = v.exp());
        let unusable = depth.iter().filter(|v| !v.is_finite()).count();
        let (expected, got) = (picture.width * picture.height, depth.len());
        if got != expected || unusable > 0 {
            return Err(MindError::DepthValues { expected, got, unusable });
        }
        Ok(depth)
    }
}

struct Thread {
    spec: MindSpec,
    words: Arc<Words>,
    text: Option<Box<dyn Session>>,
    encoder: Encoder,
    decoder: Decoder,
    denoiser: Box<dyn Denoise + Send>,
    depth: Option<DepthReader>,
}

/// Ids of the words of a text, and the end. A model that left a word out would go to another thing than was asked for,
/// so words that carry meaning must be known.
fn closed_ids(words: &[String], text: &str, length: usize) -> Result<Vec<i64>, MindError> {
    let known = || words.to_vec();
    let unknown = unknown_words(words, text);
    if !unknown.is_empty() {
        return Err(MindError::Unknown { unknown, known: known() });
    }
    let mut ids = word_ids(words, text);
    if ids.is_empty() {
        return Err(MindError::Nothing { known: known() });
    }
    if ids.len() >= length {
        return Err(MindError::Several { most: length - 1, known: known() });
    }
    ids.push(END);
    Ok(ids.into_iter().map(|id| id as i64).collect())
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
            _ if text.is_empty() => vec![END as i64],
            Words::Closed(words) => closed_ids(words, text, length)?,
            Words::SentencePiece { tokenizer, prompt } => {
                let text = match prompt {
                    Some(prompt) => prompt.replacen("{}", wanted_thing(text), 1),
                    None => text.to_owned(),
                };
                let encoded = tokenizer.encode_prompt(&text, length)?;
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
        let session = self.text.as_mut().ok_or(MindError::NoModel)?;
        let ports = session.engine().inputs().to_vec();
        let inputs: Vec<(&str, &Tensor)> =
            given.into_iter().filter(|(name, _)| ports.iter().any(|p| p.name == *name)).collect();
        let mut rows = Tensor::empty();
        session.run_into(&inputs, &mut [("rows", &mut rows)]).map_err(MindError::TextEncoder)?;
        let rows = rows.into_f32().unwrap_or_default();
        if rows.len() != length * dim {
            return Err(MindError::TextRows { expected: length * dim, got: rows.len() });
        }
        Ok(rows)
    }

    fn encode_still(&mut self, frame: &RgbImage) -> Result<Vec<f32>, EncodeError> {
        let mut latent = vec![0.0; self.spec.latent_len];
        self.encoder.encode_still(frame, &mut latent)?;
        Ok(latent)
    }

    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, MindError> {
        Ok(self.decoder.decode(latents)?)
    }

    fn depth(&mut self, picture: &RgbImage) -> Result<Option<Vec<f32>>, MindError> {
        self.depth.as_mut().map(|reader| reader.read(picture)).transpose()
    }

    fn encode_frames(&mut self, frames: &[RgbImage]) -> Result<Option<Vec<f32>>, MindError> {
        if !self.decoder.is_stateless() || !frames.len().is_multiple_of(GROUP) {
            return Ok(None);
        }
        let mut latents = vec![0.0; frames.len() / GROUP * self.spec.latent_len];
        for (group, latent) in frames.chunks_exact(GROUP).zip(latents.chunks_exact_mut(self.spec.latent_len))
        {
            self.encoder.encode_group(group, latent)?;
        }
        Ok(Some(latents))
    }

    fn decodes_alone(&self) -> bool {
        self.decoder.is_stateless()
    }

    fn camera_rays(
        &self,
        here_from_camera: &[Isometry3<f64>],
        intrinsics: Option<&Intrinsics>,
    ) -> Result<Vec<f32>, RaysError> {
        let config = self.denoiser.config();
        if config.camera_channels != plucker::CHANNELS {
            return Err(RaysError::NotTrained);
        }
        let poses: Vec<plucker::Pose> = here_from_camera
            .iter()
            .map(|camera| {
                let m = camera.to_homogeneous();
                std::array::from_fn(|i| std::array::from_fn(|j| m[(i, j)]))
            })
            .collect();
        let camera = &self.spec.camera;
        let intrinsics = camera.intrinsics().or(intrinsics.copied()).ok_or(RaysError::NoIntrinsics)?;
        let [rows, columns] = config.grid();
        let cell = camera.height / rows;
        if camera.width != cell * columns {
            return Err(PluckerError::Cells { width: camera.width, height: camera.height, cell }.into());
        }
        let maps = plucker::features(&poses, 0, &intrinsics, camera.height, camera.width, cell)?;
        // (channel, latent, token) to (latent, token, channel)
        let (tokens, latents) = (rows * columns, 1 + (poses.len() - 1) / GROUP);
        let mut rays = vec![0.0; maps.len()];
        for channel in 0..plucker::CHANNELS {
            for at in 0..latents * tokens {
                rays[at * plucker::CHANNELS + channel] = maps[channel * latents * tokens + at];
            }
        }
        Ok(rays)
    }

    fn denoiser(&mut self) -> &mut dyn Denoise {
        self.denoiser.as_mut()
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
        check("Please go to the table in front of you", Ok(&[7, 1]));
        check("credence table", Err("does not know \"credence\""));
        check("the fridge", Err("red, blue, chair, table"));
        check(
            "the bleu chiar",
            Err(
                "\"bleu\" (the nearest known word is \"blue\") and \"chiar\" (the nearest known word is \"chair\")",
            ),
        );
        check("go there", Err("names nothing that this model knows; it knows red, blue, chair, table"));
        check("red blue chair table", Err("one thing at a time"));
    }

    #[test]
    fn sentences_are_built_around_the_thing() {
        for (text, want) in [
            ("find the red chair", "the red chair"),
            ("Find the red chair.", "the red chair"),
            ("please go to the blue table!", "the blue table"),
            ("the lamp", "the lamp"),
            ("find ", "find"),
            ("finding nemo", "finding nemo"),
            ("\u{fc}ber das Sofa", "\u{fc}ber das Sofa"),
        ] {
            assert_eq!(wanted_thing(text), want, "{text}");
        }
    }

    #[test]
    fn a_missing_bundle_is_named_with_its_place() {
        let error = find_bundle(Some(Path::new("/nowhere/bundle")), |_| None).unwrap_err();
        assert!(error.to_string().contains("/nowhere/bundle"), "{error}");
        let error = find_bundle(None, |_| Some("/nowhere/else".into())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/else"), "{error}");
        let error = find_bundle_or("house-huge", None, |_| None).unwrap_err();
        assert!(error.to_string().contains("models/house-huge"), "{error}");
    }
}
