//! The large family by configuration: convolutional autoencoder, umT5 rows, diffusion transformer; and videos of the
//! procedural house for it.

use std::path::{Path, PathBuf};

use mindseye_engines::model::Ops as _;
use mindseye_engines::model::dit::DitConfig;
use mindseye_engines::model::umt5::{self, Umt5Config, Umt5Inputs};
use mindseye_engines::model::vae::{self, Chunk, VaeConfig};
use mindseye_world::{
    Camera, Difficulty, Frame, House, Pose2, RenderOptions, Rng, approach, draw_box, exploration_sweep,
    project_box_in, render_with,
};
use serde::Deserialize;

use crate::data::Look;
use crate::eager::{Eager, Params};
use crate::family::{LoadModelError, ModelError, parse};

/// What training needs to know of `configs/models/wan*.toml`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct WanModel {
    /// Name.
    pub name: String,
    /// The denoiser.
    pub dit: DitConfig,
    /// The video autoencoder. Statistics of its latents are those of a trained one.
    pub vae: VaeConfig,
    /// The text encoder.
    pub umt5: Umt5Config,
    /// Sequence layout.
    pub layout: WanLayout,
    /// How a goal is said.
    pub text: WanText,
}

/// `[layout]`, in latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct WanLayout {
    /// Motion after the first image.
    pub motion_latents: usize,
    /// Still images with the red box at the end.
    pub box_latents: usize,
    /// Distance between the last context index and the first target index.
    pub gap: usize,
}

/// `[text]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct WanText {
    /// What is encoded: `{}` stands for the thing.
    pub prompt: String,
}

impl WanModel {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`LoadModelError`] names the file and the field.
    pub fn load(path: &Path) -> Result<Self, LoadModelError> {
        let at = || path.to_path_buf();
        let text =
            std::fs::read_to_string(path).map_err(|source| LoadModelError::Io { path: at(), source })?;
        let model: Self = parse(&text).map_err(|source| LoadModelError::Parse { path: at(), source })?;
        model.validate().map_err(|source| LoadModelError::Invalid { path: at(), source })?;
        Ok(model)
    }

    fn validate(&self) -> Result<(), ModelError> {
        self.dit.validate()?;
        self.vae.validate()?;
        self.umt5.validate()?;
        if self.vae.z_dim != self.dit.in_channels {
            return Err(ModelError::Channels { codec: self.vae.z_dim, dit: self.dit.in_channels });
        }
        Ok(())
    }

    /// Height and width of a latent.
    #[must_use]
    pub fn latent(&self) -> [usize; 2] {
        [self.dit.latent_height, self.dit.latent_width]
    }

    /// Height and width of an image.
    #[must_use]
    pub fn image(&self) -> [usize; 2] {
        self.latent().map(|n| n * self.vae.spatial_factor())
    }

    /// Latents of a target: first image, motion, box.
    #[must_use]
    pub fn target_latents(&self) -> usize {
        1 + self.layout.motion_latents + self.layout.box_latents
    }

    /// Images of this many latents of one video.
    #[must_use]
    pub fn images(&self, latents: usize) -> usize {
        1 + (latents - 1) * self.vae.temporal_factor()
    }

    /// Zeros for every weight of the autoencoder.
    #[must_use]
    pub fn vae_weights(&self) -> Params {
        let mut e = Eager::collecting();
        let [h, w] = self.image();
        let frames = self.images(2);
        let clip = e.input(&[frames, 3, h, w], vec![0.0; frames * 3 * h * w]);
        let mut caches = Vec::new();
        for (i, z) in vae::encode_clip(&mut e, &self.vae, self.latent(), &clip, frames).iter().enumerate() {
            let chunk = if i == 0 { Chunk::First } else { Chunk::Next };
            caches = vae::decode(&mut e, &self.vae, self.latent(), chunk, z, &caches).caches;
        }
        e.params().clone()
    }

    /// Zeros for every weight of the text encoder.
    #[must_use]
    pub fn umt5_weights(&self) -> Params {
        let mut e = Eager::collecting();
        self.rows(&mut e, &[1]);
        e.params().clone()
    }

    /// Rows of text `[text_len, text_dim]` from token ids, of which there are at most `text_len`.
    #[must_use]
    pub fn text_rows(&self, weights: &Params, ids: &[usize]) -> Vec<f32> {
        let mut e = Eager::new(std::sync::Arc::new(weights.clone()), false);
        let rows = self.rows(&mut e, ids);
        e.value(rows).1.to_vec()
    }

    fn rows(&self, e: &mut Eager, ids: &[usize]) -> crate::eager::Var {
        let len = self.dit.text_len;
        let (mask_bias, keep) = umt5::host_inputs(&[ids.len().min(len)], len);
        let mut ids = ids.to_vec();
        ids.resize(len, 0);
        let (ids, buckets) = (e.index(&[1, len], ids), e.index(&[len, len], self.umt5.bucket_table(len)));
        let (mask_bias, keep) = (e.input(&[1, 1, 1, len], mask_bias), e.input(&[1, len, 1], keep));
        let inputs = Umt5Inputs { ids: &ids, buckets: &buckets, mask_bias: &mask_bias, keep: &keep };
        umt5::encode(e, &self.umt5, &inputs).rows
    }

    /// Latents `[latents, z, h, w]` of a video `[images, 3, H, W]`.
    #[must_use]
    pub fn encode(&self, weights: &std::sync::Arc<Params>, video: &[f32]) -> Vec<f32> {
        let [h, w] = self.image();
        let images = video.len() / (3 * h * w);
        let mut e = Eager::new(weights.clone(), false);
        let clip = e.input(&[images, 3, h, w], video.to_vec());
        let latents = vae::encode_clip(&mut e, &self.vae, self.latent(), &clip, images);
        let all = e.concat(&latents, 0);
        e.value(all).1.to_vec()
    }

    /// Images `[images, 3, H, W]` of latents `[latents, z, h, w]` of one video.
    #[must_use]
    pub fn decode(&self, weights: &std::sync::Arc<Params>, latents: &[f32]) -> Vec<f32> {
        let ([h, w], z) = (self.latent(), self.vae.z_dim);
        let (mut caches, mut out) = (Vec::new(), Vec::new());
        let mut e = Eager::new(weights.clone(), false);
        for (i, latent) in latents.chunks_exact(z * h * w).enumerate() {
            let latent = e.input(&[1, z, h, w], latent.to_vec());
            let chunk = if i == 0 { Chunk::First } else { Chunk::Next };
            let decoded = vae::decode(&mut e, &self.vae, [h, w], chunk, &latent, &caches);
            out.extend_from_slice(e.value(decoded.frames).1);
            caches = decoded.caches;
        }
        out
    }
}

/// A recording of a room and a drive to a thing in it; pictures are `[images, 3, H, W]` in [-1, 1].
#[derive(Clone, Debug, PartialEq)]
pub struct Footage {
    /// The recording.
    pub context: Vec<f32>,
    /// The drive from where the recording ends; at the end still images with the red box.
    pub target: Vec<f32>,
    /// The thing: "red chair".
    pub thing: String,
    /// Base poses of the recording, in the map.
    pub poses: Vec<Pose2>,
    /// What heads learn from.
    pub labels: Labels,
}

/// What lift heads learn from: where the base was and where the thing is seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Labels {
    /// Base pose at the last image of each latent, in the map: of the recording, then of the drive.
    pub poses: Vec<Pose2>,
    /// Share of each token's pixels that show the thing, 0 to 1 `[latents, tokens]`: of the recording, then of the drive's
    /// first image.
    pub seen: Vec<f32>,
    /// The thing's centre in the map (m).
    pub place: [f64; 2],
}

/// Makes footage; holds the buffers that rendering reuses.
pub struct FootageSource {
    camera: Camera,
    /// Token rows and columns of a latent, and images in one.
    grid: [usize; 2],
    group: usize,
    difficulty: Difficulty,
    frame: Frame,
    scratch: Frame,
}

impl FootageSource {
    /// Footage of this kind of world at a model's size.
    #[must_use]
    pub fn new(model: &WanModel, difficulty: Difficulty) -> Self {
        let [height, width] = model.image();
        Self {
            camera: Camera::new(width, height),
            grid: model.dit.grid(),
            group: model.vae.temporal_factor(),
            difficulty,
            frame: Frame::new(),
            scratch: Frame::new(),
        }
    }

    /// Adds a picture's share to the latent that it is one of `images` in.
    fn mark(&self, object: usize, images: usize, seen: &mut [f32]) {
        let [rows, cols] = self.grid;
        let cell = [self.frame.height / rows, self.frame.width / cols];
        let share = 1.0 / (images * cell[0] * cell[1]) as f32;
        let named = self.frame.ids.iter().enumerate().filter(|(_, id)| usize::from(**id) == object + 1);
        for (at, _) in named {
            seen[at / self.frame.width / cell[0] * cols + at % self.frame.width / cell[1]] += share;
        }
    }

    fn shoot(&mut self, house: &House, pose: Pose2, boxed: Option<usize>, out: &mut Vec<f32>) {
        render_with(house, pose, &self.camera, RenderOptions::rgb_ids(), &mut self.frame);
        if let Some(object) = boxed
            && let Some(area) = project_box_in(house, pose, &self.camera, object, &mut self.scratch)
        {
            draw_box(&mut self.frame.rgb, self.camera.width, area, [255, 0, 0]);
        }
        Look::draw(&mut Rng::new(0), false).pixels(&self.frame, out);
    }

    /// The footage with this seed: `recorded` images of a room, `moving` of a drive to one of its things and `still` ones at its
    /// end with the box.
    #[must_use]
    pub fn footage(&mut self, seed: u64, recorded: usize, moving: usize, still: usize) -> Footage {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xf007);
        let house = House::generate(rng.next_u64() >> 1, &self.difficulty);
        let sweep = exploration_sweep(&house, &mut rng, recorded);
        let object = rng.below(house.objects.len());
        let start = sweep.last().copied().unwrap_or_default();
        let drive = approach(&house, start, object, moving).poses;
        let (mut context, mut target) = (Vec::new(), Vec::new());
        let tokens = self.grid[0] * self.grid[1];
        // The first image is a latent of its own; the last row is that of the drive's.
        let mut seen = vec![0.0; (sweep.len().saturating_sub(1).div_ceil(self.group) + 2) * tokens];
        let of_drive = seen.len() - tokens;
        for (i, pose) in sweep.iter().enumerate() {
            self.shoot(&house, *pose, None, &mut context);
            let (latent, images) = (i.div_ceil(self.group), if i == 0 { 1 } else { self.group });
            self.mark(object, images, &mut seen[latent * tokens..][..tokens]);
        }
        for (i, pose) in drive.iter().enumerate() {
            self.shoot(&house, *pose, None, &mut target);
            if i == 0 {
                self.mark(object, 1, &mut seen[of_drive..]);
            }
        }
        let end = drive.last().copied().unwrap_or(start);
        (0..still).for_each(|_| self.shoot(&house, end, Some(object), &mut target));
        let named = &house.objects[object];
        let thing = format!("{} {}", named.colour.name(), named.shape.name());
        let last = |poses: &[Pose2]| poses.iter().copied().step_by(self.group).collect::<Vec<_>>();
        let still = std::iter::repeat_n(end, still / self.group);
        let labels = Labels {
            poses: last(&sweep).into_iter().chain(last(&drive)).chain(still).collect(),
            seen,
            place: [named.x, named.y],
        };
        Footage { context, target, thing, poses: sweep, labels }
    }
}

/// A path that a configuration file names relative to itself.
pub(crate) fn place(path: &Path, base: &Path) -> PathBuf {
    base.parent().unwrap_or(Path::new(".")).join(path)
}
