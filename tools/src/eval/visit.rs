//! Visits to seeded houses, and the machinery that goes through many of them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, bail};
use mindseye::context::{GROUP, GroupEncoder};
use mindseye::ground::{Mind, MindSpec};
use mindseye::image::RgbImage;
use mindseye::interpose::Interposed;
use mindseye::lift::LiftParams;
use mindseye::mind::{Pipeline, SHIPPED, SHIPPED_FURNISHED, find_bundle_or};
use mindseye::visit::SWEEP;
pub use mindseye::visit::{Visit, picture, plain_pose, world_pose};
use mindseye_train::eager::Eager;
use mindseye_world::{
    Camera, Colour, Difficulty, Frame, House, Pose2, RenderOptions, Rng, draw_box, project_box, render_with,
};

use super::altered::Altered;
use super::examiner::{self, Coder, Effort, Examiner};
use super::examiner_cache::{default_folder, kept_or_trained};

/// Arguments that all evaluations share.
#[derive(clap::Args, Debug, Clone)]
pub struct CommonArgs {
    /// Bundle to evaluate; when left out one that ships: furnished-tiny for furniture, else house-tiny.
    #[arg(long)]
    pub bundle: Option<PathBuf>,
    /// Number of houses.
    #[arg(long, default_value_t = 200)]
    pub houses: usize,
    /// Seed of the first house; training draws its own from the whole range at random. Houses from 900000 on are a
    /// development set: the model and its settings were chosen by them. For figures of a release give a seed that was
    /// never used.
    #[arg(long, default_value_t = 900_000)]
    pub seed: u64,
    /// Difficulty of the world, or several separated by commas: houses take turns.
    #[arg(long, default_value = "plain")]
    pub difficulty: String,
    /// Backend.
    #[arg(long, default_value = "rten")]
    pub backend: String,
    /// Houses evaluated at the same time.
    #[arg(long, default_value_t = 2)]
    pub jobs: usize,
    /// Denoising steps instead of the bundle's.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Guidance instead of the bundle's; 1 is none.
    #[arg(long)]
    pub guidance: Option<f32>,
    /// Look at as many context latents as this, up to the bundle's limit, instead of those of training.
    #[arg(long)]
    pub context_latents: Option<usize>,
    /// Read depth from the houses themselves in place of the bundle's depth reader, off by this many percent.
    #[arg(long, value_name = "PERCENT")]
    pub true_depth: Option<f64>,
    /// ONNX file of LPIPS (two pictures in, one number out); without it LPIPS is left out.
    #[arg(long)]
    pub lpips: Option<PathBuf>,
    /// Houses that the examiner learns from (see the documentation of SD); fewer is faster and less exact.
    #[arg(long, default_value_t = Effort::default().houses)]
    pub examiner_houses: usize,
    /// Keep the examiner in this file instead of the cache: read when it was made for the same codec and world, else
    /// trained and written there.
    #[arg(long, conflicts_with_all = ["cache", "no_cache"])]
    pub examiner: Option<PathBuf>,
    /// Folder where examiners are kept; mindseye/examiner in XDG_CACHE_HOME or ~/.cache when left out.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Train the examiner anew (minutes), and keep it nowhere.
    #[arg(long, conflicts_with = "cache")]
    pub no_cache: bool,
    /// One JSON document on stdout.
    #[arg(long)]
    pub json: bool,
    /// Also write the Markdown tables into this file.
    #[arg(long)]
    pub markdown: Option<PathBuf>,
}

/// [`picture`] with a red box around an object, where it is seen.
pub fn boxed_picture(
    house: &House,
    pose: Pose2,
    camera: &Camera,
    object: usize,
    frame: &mut Frame,
) -> RgbImage {
    let mut view = picture(house, pose, camera, frame);
    if let Some(area) = project_box(house, pose, camera, object) {
        draw_box(&mut view.data, view.width, area, [255, 0, 0]);
    }
    view
}

/// Pixels (1 % of the picture, at least 2) at which an object counts as seen.
fn seen_pixels(camera: &Camera) -> usize {
    (camera.width * camera.height / 100).max(2)
}

/// Whether an object is seen from a base pose.
pub fn sees(house: &House, pose: Pose2, camera: &Camera, object: usize, frame: &mut Frame) -> bool {
    let options = RenderOptions { rgb: false, depth: false, ids: true, ..RenderOptions::default() };
    render_with(house, pose, camera, options, frame);
    frame.ids.iter().filter(|id| usize::from(**id) == object + 1).count() >= seen_pixels(camera)
}

/// The bundle's calibration.
///
/// # Errors
/// For a bundle without one: its drives cannot be judged.
pub fn calibration(spec: &MindSpec) -> anyhow::Result<&LiftParams> {
    spec.lift.as_ref().context("the bundle has no [lift] table: boxes and poses of its drives cannot be read")
}

/// A colour and shape that the house does not have together.
pub fn absent_name(house: &House, rng: &mut Rng) -> String {
    loop {
        let kinds = house.kinds();
        let name = format!("{} {}", Colour::ALL[rng.below(6)].name(), kinds[rng.below(kinds.len())].name());
        if house.find(&name).is_none() {
            return name;
        }
    }
}

/// The colour of one object with the shape of another, where the house does not have them together.
pub fn swapped_name(house: &House, rng: &mut Rng) -> Option<String> {
    let objects = &house.objects;
    let mut names: Vec<String> = Vec::new();
    for a in objects {
        for b in objects {
            let name = format!("{} {}", a.colour.name(), b.shape.name());
            if house.find(&name).is_none() && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    (!names.is_empty()).then(|| names.swap_remove(rng.below(names.len())))
}

/// What one thread works with.
pub struct Tools {
    /// The model.
    pub mind: Interposed<Altered>,
    /// Its encoder.
    pub encoder: Box<dyn GroupEncoder + Send>,
    /// For the examiner's networks.
    pub eager: Eager,
}

impl Tools {
    /// A still through the codec and back.
    ///
    /// # Errors
    /// When the codec fails.
    pub fn coded_still(&mut self, image: &RgbImage) -> anyhow::Result<RgbImage> {
        let latent = self.mind.encode_still(image)?;
        self.mind.decode(&latent)?.into_iter().next().context("the decoder gave no picture")
    }

    /// A drive through the codec and back, as the model's own come out: the first image four times, then groups
    /// of four. `images` holds 1 + 4k.
    ///
    /// # Errors
    /// When the codec fails.
    pub fn coded_drive(&mut self, images: &[RgbImage]) -> anyhow::Result<Vec<RgbImage>> {
        let (first, rest) = images.split_first().context("a drive has images")?;
        let mut latents = self.mind.encode_still(first)?;
        for group in rest.chunks_exact(GROUP) {
            let mut latent = vec![0.0; self.encoder.latent_len()];
            self.encoder.encode_group(group, &mut latent)?;
            latents.extend(latent);
        }
        Ok(self.mind.decode(&latents)?)
    }
}

impl Tools {
    /// The latents of decoded frames (groups of four): what the codec makes of them again.
    ///
    /// # Errors
    /// When the codec fails.
    pub fn latents_of(&mut self, frames: &[RgbImage]) -> anyhow::Result<Vec<f32>> {
        let mut latents = Vec::new();
        for group in frames.chunks_exact(GROUP) {
            let mut latent = vec![0.0; self.encoder.latent_len()];
            self.encoder.encode_group(group, &mut latent)?;
            latents.extend(latent);
        }
        Ok(latents)
    }
}

impl Coder for Tools {
    fn coded(&mut self, frames: &[RgbImage]) -> anyhow::Result<Vec<RgbImage>> {
        let mut latent = vec![0.0; self.encoder.latent_len()];
        self.encoder.encode_group(frames, &mut latent)?;
        Ok(self.mind.decode(&latent)?)
    }
}

/// A loaded bundle and the world that it is evaluated in.
pub struct Bench {
    /// The bundle.
    pub pipeline: Pipeline,
    /// Of the houses, which take turns, by their names.
    difficulties: Vec<(String, Difficulty)>,
    /// The robot's camera.
    pub camera: Camera,
    /// Images of a turn of a recording.
    pub images: usize,
    /// What true depth is off by, as a share, where it takes the place of the bundle's.
    pub true_depth: Option<f64>,
}

impl Bench {
    /// Loads what the arguments name.
    ///
    /// # Errors
    /// A bundle that cannot be loaded, an unknown difficulty or backend, counts of zero.
    pub fn new(args: &CommonArgs) -> anyhow::Result<Self> {
        let named = |name: &str| {
            let known = Difficulty::NAMES.join(", ");
            let difficulty = Difficulty::named(name);
            let difficulty =
                difficulty.with_context(|| format!("unknown difficulty {name:?}; known: {known}"))?;
            Ok((name.to_owned(), difficulty))
        };
        let difficulties = args.difficulty.split(',').map(named).collect::<anyhow::Result<Vec<_>>>()?;
        if args.houses == 0 || args.jobs == 0 || args.examiner_houses == 0 {
            bail!("--houses, --jobs and --examiner-houses must be at least 1");
        }
        let furnished = difficulties.iter().all(|(_, difficulty)| difficulty.furnished);
        let shipped = if furnished { SHIPPED_FURNISHED } else { SHIPPED };
        let directory = find_bundle_or(shipped, args.bundle.as_deref(), |v| std::env::var(v).ok())?;
        let mut pipeline = Pipeline::load(&directory, &args.backend, 1)?;
        pipeline.adjust(args.steps, args.guidance);
        if let Some(latents) = args.context_latents {
            pipeline.look_at(latents)?;
        }
        let image = &pipeline.bundle().manifest().image;
        let camera = Camera::new(image.width, image.height);
        let true_depth = args.true_depth.map(|percent| percent / 100.0);
        Ok(Self { pipeline, difficulties, camera, images: SWEEP, true_depth })
    }

    /// Name and difficulty of the house with this seed.
    #[must_use]
    pub fn difficulty(&self, seed: u64) -> (&str, &Difficulty) {
        let (name, difficulty) = &self.difficulties[(seed % self.difficulties.len() as u64) as usize];
        (name, difficulty)
    }

    /// Looks around the house with this seed.
    ///
    /// # Errors
    /// When the encoder fails.
    pub fn visit(&self, seed: u64, encoder: &mut dyn GroupEncoder) -> anyhow::Result<Visit> {
        let rng = Rng::new(seed ^ 0x0e7a1);
        let house = House::generate(seed, self.difficulty(seed).1);
        Ok(Visit::new(house, rng, &self.camera, encoder, self.images)?)
    }

    /// Says no when the bundle has a closed vocabulary that lacks words for this world's things.
    ///
    /// # Errors
    /// Words are missing.
    pub fn knows_things(&self) -> anyhow::Result<()> {
        let words = self.pipeline.words();
        let lacks = |noun: &&str| !words.is_empty() && !words.iter().any(|w| w == noun);
        let kinds = self.difficulties.iter().flat_map(|(_, d)| d.kinds());
        let missing: BTreeSet<&str> = kinds.map(|k| k.name()).filter(lacks).collect();
        if !missing.is_empty() {
            bail!(
                "the bundle's model has no word for {} of the things that there may be: {}; evaluate a model that was \
                 trained in this world, such as models/{SHIPPED_FURNISHED}",
                missing.len(),
                Vec::from_iter(missing).join(", ")
            );
        }
        Ok(())
    }

    /// Sessions for one thread.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn tools(&self) -> anyhow::Result<Tools> {
        Ok(Tools {
            mind: Altered::mind(self.pipeline.mind(0)?, self.true_depth),
            encoder: self.pipeline.encoder()?,
            eager: Eager::new(std::sync::Arc::default(), false),
        })
    }

    /// The examiner for this bundle's codec: from where it is kept, else trained and kept there.
    ///
    /// # Errors
    /// Several difficulties; when the codec fails; when the file that `--examiner` names is none of an examiner, or cannot be written.
    pub fn examiner(&self, args: &CommonArgs) -> anyhow::Result<Examiner> {
        let effort = Effort { houses: args.examiner_houses, ..Effort::default() };
        let [(_, difficulty)] = &self.difficulties[..] else {
            bail!("--difficulty {}: an examiner is of one world; give one, or --quick", args.difficulty);
        };
        let camera = &self.camera;
        let made_for = examiner::made_for(difficulty, camera, effort, &mut self.tools()?)?;
        let train = || {
            let coders = (0..args.jobs).map(|_| self.tools()).collect::<anyhow::Result<Vec<Tools>>>()?;
            Examiner::train(difficulty, camera, effort, coders)
        };
        let mut say = |line: String| eprintln!("{line}");
        if let Some(path) = &args.examiner {
            if path.exists() {
                match Examiner::load(path, &made_for, camera)? {
                    Some(known) => return Ok(known),
                    None => say(format!("{}: made for another codec or world; made again", path.display())),
                }
            }
            let made = train()?;
            made.save(path, &made_for)?;
            return Ok(made);
        }
        let folder = args.cache.clone().or_else(|| default_folder(|v| std::env::var(v).ok()));
        match folder.filter(|_| !args.no_cache) {
            Some(folder) => kept_or_trained(&folder, &made_for, camera, train, &mut say),
            None => train(),
        }
    }

    /// Calls `f` for every house, `jobs` at a time; results in the order of houses. The first error stops all.
    ///
    /// # Errors
    /// Those of `f` and of making sessions.
    pub fn each<T: Send>(
        &self,
        args: &CommonArgs,
        f: impl Fn(&mut Tools, u64) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = || -> anyhow::Result<Vec<(usize, T)>> {
            let mut tools = self.tools()?;
            let mut out = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= args.houses || failed.load(Ordering::Relaxed) {
                    return Ok(out);
                }
                let seed = args.seed.wrapping_add(i as u64);
                match f(&mut tools, seed).with_context(|| format!("house {seed}")) {
                    Ok(value) => out.push((i, value)),
                    Err(e) => {
                        failed.store(true, Ordering::Relaxed);
                        return Err(e);
                    }
                }
            }
        };
        let parts: Vec<anyhow::Result<Vec<(usize, T)>>> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..args.jobs).map(|_| scope.spawn(work)).collect();
            handles.into_iter().map(|h| h.join().expect("an evaluation thread panicked")).collect()
        });
        let mut all = Vec::new();
        for part in parts {
            all.extend(part?);
        }
        all.sort_by_key(|(i, _)| *i);
        Ok(all.into_iter().map(|(_, t)| t).collect())
    }
}
