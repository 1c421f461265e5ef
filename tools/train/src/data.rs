//! Training samples from the procedural house: a pure function of a seed.

use mindseye_engines::model::codec::{LinearCodec, LinearCodecConfig};
use mindseye_world::{
    Camera, Difficulty, Frame, House, Pose2, RenderOptions, Rng, Shape, approach, draw_box,
    exploration_drive, exploration_sweep, project_box_in, random_drive_from, random_pose, random_pose_beside,
    render_with, wrap_angle,
};

use serde::{Deserialize, Serialize};

use crate::eager::ffi::gemm::{View, gemm};
use crate::family::{END, FIRST_WORD, HouseModel, SequenceLayout};
use crate::guide::{GuideConfig, Guides};

/// What makes training pictures and recordings as varied as a robot's: `[variety]` of a training configuration.
/// Shares of 0 draw nothing, so that a run without them stays the run that it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variety {
    /// Share of samples rendered with 4x4 instead of 2x2 rays per pixel: what a larger camera image is when it is
    /// averaged down.
    #[serde(default)]
    pub fine: f64,
    /// Share of recordings whose turn takes 49 to 145 images instead of the layout's number.
    #[serde(default)]
    pub paced: f64,
    /// Share of recordings that go on with 16 to 96 images of driving about after the turn.
    #[serde(default)]
    pub wander: f64,
}

/// The worlds that houses are drawn from, each with its share.
#[derive(Clone, Debug, PartialEq)]
pub struct Worlds(Vec<(f64, Difficulty)>);

impl From<&Difficulty> for Worlds {
    fn from(one: &Difficulty) -> Self {
        Self(vec![(1.0, one.clone())])
    }
}

impl From<Difficulty> for Worlds {
    fn from(one: Difficulty) -> Self {
        Self::from(&one)
    }
}

impl From<&Worlds> for Worlds {
    fn from(same: &Self) -> Self {
        same.clone()
    }
}

impl Worlds {
    /// Several worlds, of which each has a share above 0; none where there is none.
    #[must_use]
    pub fn mixed(worlds: Vec<(f64, Difficulty)>) -> Option<Self> {
        (!worlds.is_empty() && worlds.iter().all(|(share, _)| share.is_finite() && *share > 0.0))
            .then_some(Self(worlds))
    }

    /// The house with this seed, in the world that the seed falls to.
    #[must_use]
    pub fn house(&self, seed: u64) -> House {
        let all: f64 = self.0.iter().map(|(share, _)| share).sum();
        let mut left = Rng::new(seed ^ 0x3017d).range(0.0, all);
        let fallen = self.0.iter().find(|(share, _)| {
            left -= share;
            left < 0.0
        });
        House::generate(seed, fallen.map_or(&self.0[self.0.len() - 1].1, |(_, difficulty)| difficulty))
    }

    /// Nouns that a model of these worlds needs, in the order of their indices.
    #[must_use]
    pub fn nouns(&self) -> &'static [Shape] {
        self.0.iter().map(|(_, d)| d.nouns()).max_by_key(|nouns| nouns.len()).unwrap_or_default()
    }
}

/// What a sample asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Go to a named object that is there.
    Ground,
    /// A name that nothing in the room has: only the mask learns from it.
    Absent,
    /// Drive along given poses.
    Navigate,
}

/// One training or evaluation sample; latents are clean.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What it asks for.
    pub task: Task,
    /// Seed of the house.
    pub house_seed: u64,
    /// Latents `[latents, channels, h, w]`: context, then first image, motion, box.
    pub latents: Vec<f32>,
    /// Source index of each context latent.
    pub context_index: Vec<usize>,
    /// Base pose at the last image of each latent, relative to the first target image (m, rad).
    pub pose: Vec<Pose2>,
    /// Which labels are known.
    pub known: Known,
    /// Token ids `[text_len]`, zero-padded.
    pub ids: Vec<usize>,
    /// Camera rays `[latents, tokens, 24]`, zero unless navigating.
    pub camera: Vec<f32>,
    /// Share of each token's pixels that show the named object: `[context + 1, tokens]`.
    pub seen: Vec<f32>,
    /// Named object's centre from the base at the last image of each latent: (forward, left), metres.
    pub locate: Vec<[f32; 2]>,
    /// Colours and shapes seen in each context token, `[context, tokens, attributes]` of 0 or 1.
    pub attributes: Vec<f32>,
    /// Index of the named object in its house.
    pub object: usize,
    /// Map pose of the base at the first target image.
    pub map_from_start: Pose2,
    /// Carried latents and their trust `[latents, tokens, guide_channels]`; zero, or empty, where there are none.
    pub guide: Vec<f32>,
}

/// Which labels of a sample are known; losses of the others are off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// All of them.
    All,
    /// Of each latent, whether its pose is; neither mask, place nor attributes.
    Poses(Vec<bool>),
}

impl Known {
    /// Whether mask, place and attributes are known.
    #[must_use]
    pub fn dense(&self) -> bool {
        *self == Self::All
    }

    /// Whether the pose of a latent is known.
    #[must_use]
    pub fn pose(&self, latent: usize) -> bool {
        match self {
            Self::All => true,
            Self::Poses(known) => known.get(latent).copied().unwrap_or(false),
        }
    }
}

/// Weights of the codec: `basis[channels, values]`, `mean[values]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Codec {
    /// Orthonormal rows.
    pub basis: Vec<f32>,
    /// Mean block.
    pub mean: Vec<f32>,
}

/// Makes samples; holds the buffers that rendering reuses.
pub struct Source {
    model: HouseModel,
    worlds: Worlds,
    variety: Variety,
    supersample: usize,
    codec: Option<Codec>,
    guides: Option<Guides>,
    camera: Camera,
    frame: Frame,
    scratch: Frame,
}

/// Pixels of a token that must show an object before the token counts as showing it.
pub const SEEN_SHARE: f32 = 6.0 / 256.0;

impl Source {
    /// A source of samples for this model; without a codec, latents stay empty (see [`Source::blocks`]).
    #[must_use]
    pub fn new(model: &HouseModel, worlds: impl Into<Worlds>, codec: Option<Codec>) -> Self {
        Self {
            camera: Camera::new(model.codec.width, model.codec.height),
            model: model.clone(),
            worlds: worlds.into(),
            variety: Variety::default(),
            supersample: RenderOptions::rgb_only().supersample,
            codec,
            guides: None,
            frame: Frame::new(),
            scratch: Frame::new(),
        }
    }

    /// The same source, with samples that vary by these shares.
    #[must_use]
    pub fn varied(mut self, variety: Variety) -> Self {
        self.variety = variety;
        self
    }

    /// The same source, whose samples have a guide.
    #[must_use]
    pub fn guided(mut self, guide: Option<GuideConfig>) -> Self {
        self.guides = guide.and_then(|guide| Guides::new(guide, &self.camera));
        self
    }

    /// The camera that samples are rendered with.
    #[must_use]
    pub fn camera(&self) -> &Camera {
        &self.camera
    }

    /// Renders one image and appends it to `out` as `[3, H, W]` in [-1, 1]; returns nothing else, the instance ids
    /// stay in the frame.
    fn shoot(
        &mut self,
        house: &House,
        pose: Pose2,
        ids: bool,
        boxed: Option<usize>,
        look: &Look,
        out: &mut Vec<f32>,
    ) {
        let options = if ids { RenderOptions::rgb_ids() } else { RenderOptions::rgb_only() };
        let options = RenderOptions { supersample: self.supersample, ..options };
        render_with(house, pose, &self.camera, options, &mut self.frame);
        let w = self.camera.width;
        if let Some(object) = boxed
            && let Some(area) = project_box_in(house, pose, &self.camera, object, &mut self.scratch)
        {
            // The box keeps its colour whatever the channels are permuted to.
            let mut red = [0u8; 3];
            red[look.channels[0]] = 255;
            draw_box(&mut self.frame.rgb, w, area, red);
        }
        look.pixels(&self.frame, out);
    }

    /// See [`encode_blocks`]; empty without a codec.
    fn encode(&self, blocks: Vec<f32>) -> Vec<f32> {
        self.codec.as_ref().map_or_else(Vec::new, |codec| encode_blocks(&self.model.codec, codec, blocks))
    }

    /// The sample with this seed.
    #[must_use]
    pub fn sample(&mut self, seed: u64, task: Task, augment: bool) -> Sample {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed);
        let house_seed = rng.next_u64() >> 1;
        let house = self.worlds.house(house_seed);
        self.sample_in(&house, house_seed, task, augment, &mut rng)
    }

    /// A sample in a given house.
    #[must_use]
    pub fn sample_in(
        &mut self,
        house: &House,
        house_seed: u64,
        task: Task,
        augment: bool,
        rng: &mut Rng,
    ) -> Sample {
        let look = Look::draw(rng, augment);
        self.sample_as(house, house_seed, task, &look, augment, rng)
    }

    /// A sample with given augmentation; `augment` draws the image whose pose is zero in camera rays.
    fn sample_as(
        &mut self,
        house: &House,
        house_seed: u64,
        task: Task,
        look: &Look,
        augment: bool,
        rng: &mut Rng,
    ) -> Sample {
        let coarse = RenderOptions::rgb_only().supersample;
        self.supersample = if happens(rng, self.variety.fine) { 2 * coarse } else { coarse };
        let plan = Plan::draw(&self.model.layout, self.variety, house, task, rng);
        let mut marks = Marks::new(&self.model, self.model.layout.context_latents + 1);
        let blocks = self.render(house, task, &plan, look, &mut marks);
        let guide = self.guide(house, &plan, look, rng);
        let mut pose = plan.poses(&self.model);
        let mut locate = plan.places(house, &pose);
        let camera = if task == Task::Navigate {
            self.rays(&plan.drive, look, rng, augment)
        } else {
            vec![
                0.0;
                self.model.latents() * self.model.dit.tokens_per_frame() * self.model.dit.camera_channels
            ]
        };
        if look.mirror {
            for p in &mut pose {
                *p = Pose2::unwrapped(p.x, -p.y, -p.yaw);
            }
            for l in &mut locate {
                l[1] = -l[1];
            }
        }
        let mut ids = vec![0; self.model.dit.text_len];
        if task == Task::Navigate {
            ids[0] = END;
        } else {
            ids[0] = FIRST_WORD + look.colour(plan.colour);
            ids[1] = FIRST_WORD + 6 + plan.shape;
            ids[2] = END;
        }
        Sample {
            task,
            house_seed,
            latents: self.encode(blocks),
            context_index: plan.context_index,
            pose,
            known: Known::All,
            ids,
            camera,
            seen: marks.seen,
            locate,
            attributes: marks.attributes,
            object: plan.object,
            map_from_start: plan.start,
            guide,
        }
    }

    /// The guide of a sample: what the first and the last image of each context group and the first target image show.
    fn guide(&mut self, house: &House, plan: &Plan, look: &Look, rng: &mut Rng) -> Vec<f32> {
        let (Some(guides), Some(codec)) = (&mut self.guides, &self.codec) else { return Vec::new() };
        // Noise of its own, so that the other draws of a sample are those of one without a guide.
        let mut rng = Rng::new(rng.clone().next_u64() ^ 0x6d1de);
        let context = plan.context_index.iter().flat_map(|k| [plan.sweep[4 * k - 3], plan.sweep[4 * k]]);
        let poses: Vec<Pose2> = context.chain([plan.start]).collect();
        guides.guide(&self.model, codec, house, &poses, &plan.drive, look, self.supersample, &mut rng)
    }

    /// Blocks of all latents: context, first image four times, motion, still images with the box. `marks` gets what is
    /// seen in context and first image.
    fn render(&mut self, house: &House, task: Task, plan: &Plan, look: &Look, marks: &mut Marks) -> Vec<f32> {
        let layout = self.model.layout.clone();
        let shown = (task != Task::Absent).then_some(plan.object);
        let per_image = 3 * self.camera.width * self.camera.height;
        let mut blocks = Vec::new();
        let mut group = Vec::with_capacity(4 * per_image);
        for (i, k) in plan.context_index.iter().enumerate() {
            group.clear();
            for image in &plan.sweep[4 * k - 3..=4 * k] {
                self.shoot(house, *image, true, None, look, &mut group);
                marks.add(&self.frame, house, i, shown, look);
            }
            blocks.extend(LinearCodec::blocks(&self.model.codec, &group));
        }
        group.clear();
        self.shoot(house, plan.drive[0], true, None, look, &mut group);
        for _ in 0..4 {
            marks.add(&self.frame, house, layout.context_latents, shown, look);
        }
        for _ in 0..3 {
            group.extend_from_within(..per_image);
        }
        blocks.extend(LinearCodec::blocks(&self.model.codec, &group));
        for k in 1..self.model.target_latents() {
            group.clear();
            let boxed = (task != Task::Navigate && k > layout.motion_latents).then_some(plan.object);
            for image in &plan.drive[4 * k - 3..=4 * k] {
                if boxed.is_some() && !group.is_empty() {
                    group.extend_from_within(..per_image);
                } else {
                    self.shoot(house, *image, false, boxed, look, &mut group);
                }
            }
            blocks.extend(LinearCodec::blocks(&self.model.codec, &group));
        }
        blocks
    }

    /// Plücker rays of the target latents, zero for the context (Video4Spatial: moment first, four images per
    /// latent, the first image repeated), averaged over each token.
    fn rays(&self, drive: &[Pose2], look: &Look, rng: &mut Rng, augment: bool) -> Vec<f32> {
        let reference = if augment { drive[rng.below(drive.len())] } else { drive[0] };
        let poses: Vec<Pose2> = drive
            .iter()
            .map(|p| {
                let r = reference.relative(*p);
                if look.mirror { Pose2::unwrapped(r.x, -r.y, -r.yaw) } else { r }
            })
            .collect();
        let mut out = vec![
            0.0;
            self.model.layout.context_latents
                * self.model.dit.tokens_per_frame()
                * self.model.dit.camera_channels
        ];
        out.extend(plucker_tokens(&self.camera, &poses, self.model.dit.grid()));
        out
    }

    /// Random blocks of four images for the codec's basis: `count` vectors of `12 * block^2` values.
    #[must_use]
    pub fn blocks(&mut self, seed: u64, count: usize) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        let mut out = Vec::new();
        let config = self.model.codec;
        let n = config.block_values();
        while out.len() < count * n {
            let house = self.worlds.house(rng.next_u64() >> 1);
            let look = Look::draw(&mut rng, true);
            let sweep = exploration_sweep(&house, &mut rng, self.model.layout.recording_images);
            let object = rng.below(house.objects.len());
            let drive = approach(&house, random_pose(&house, &mut rng), object, 17).poses;
            for (poses, boxed) in [
                (&sweep[1..5], None),
                (&sweep[41..45], None),
                (&drive[9..13], None),
                (&drive[13..17], Some(object)),
            ] {
                let mut group = Vec::new();
                for pose in poses {
                    self.shoot(&house, *pose, false, boxed, &look, &mut group);
                }
                out.extend(LinearCodec::blocks(&config, &group));
            }
        }
        out.truncate(count * n);
        out
    }
}

/// What a sample shows, before any picture is rendered.
struct Plan {
    /// Base poses of the recording, in the map.
    sweep: Vec<Pose2>,
    /// Context groups, ascending from 1: group `k` holds images `4k-3 ..= 4k` of the recording.
    context_index: Vec<usize>,
    /// Base pose at the first target image, in the map.
    start: Pose2,
    /// Index of the object that is gone to.
    object: usize,
    /// Colour and shape that are asked for, by index.
    colour: usize,
    shape: usize,
    /// Base poses of the target images, in the map.
    drive: Vec<Pose2>,
}

impl Plan {
    fn draw(layout: &SequenceLayout, variety: Variety, house: &House, task: Task, rng: &mut Rng) -> Self {
        let sweep = recording(house, rng, layout.recording_images, variety);
        let groups = (sweep.len() - 1) / 4;
        // Context: groups of four images, at random and without repetition, in order.
        let mut order: Vec<usize> = (1..=groups).collect();
        rng.shuffle(&mut order);
        let mut context_index = order[..layout.context_latents].to_vec();
        context_index.sort_unstable();

        // Half of the goals are given where the recording ends, half somewhere else in the house; of several rooms, in one
        // that was seen.
        let start = if rng.chance(0.5) {
            sweep[sweep.len() - 1]
        } else if house.rooms.len() == 1 {
            random_pose(house, rng)
        } else {
            random_pose_beside(house, sweep[rng.below(sweep.len())], rng)
        };
        let object = named(house, context_index.iter().map(|k| sweep[4 * k]), rng);
        let (colour, shape) = match task {
            Task::Absent => absent_name(house, rng),
            _ => (house.objects[object].colour.index(), house.objects[object].shape.index()),
        };
        let moving = 1 + 4 * layout.motion_latents;
        let images = moving + 4 * layout.box_latents;
        let drive = if task == Task::Navigate {
            random_drive_from(house, rng, start, images)
        } else {
            let mut poses = approach(house, start, object, moving).poses;
            let last = poses[poses.len() - 1];
            poses.resize(images, last);
            poses
        };
        Self { sweep, context_index, start, object, colour, shape, drive }
    }

    /// Base pose at the last image of each latent, relative to the start.
    fn poses(&self, model: &HouseModel) -> Vec<Pose2> {
        let context = self.context_index.iter().map(|k| self.start.relative(self.sweep[4 * k]));
        let targets = (1..model.target_latents()).map(|k| self.start.relative(self.drive[4 * k]));
        context.chain([Pose2::default()]).chain(targets).collect()
    }

    /// The object's centre (forward, left; m) from each of these poses.
    fn places(&self, house: &House, poses: &[Pose2]) -> Vec<[f32; 2]> {
        let named = &house.objects[self.object];
        let object = Pose2::unwrapped(named.x, named.y, 0.0);
        poses
            .iter()
            .map(|p| {
                let seen = self.start.compose(*p).relative(object);
                [seen.x as f32, seen.y as f32]
            })
            .collect()
    }
}

/// Share of goals in several rooms for whatever there is: those that nothing was seen of are to be told.
const ANYTHING: f64 = 0.15;
/// How far from the middle of a picture a thing is in it for certain (rad).
const IN_VIEW_RAD: f64 = 0.7;

/// The object that is gone to: of several rooms, mostly one that was in sight of one of these poses.
fn named(house: &House, seen_from: impl Iterator<Item = Pose2> + Clone, rng: &mut Rng) -> usize {
    if house.rooms.len() > 1 && !rng.chance(ANYTHING) {
        let in_sight = |p: &Pose2, x: f64, y: f64| {
            wrap_angle(p.bearing_to(x, y) - p.yaw).abs() < IN_VIEW_RAD
                && house.walls_clear((p.x, p.y), (x, y))
        };
        let seen = |o: &usize| {
            let object = &house.objects[*o];
            seen_from.clone().any(|p| in_sight(&p, object.x, object.y))
        };
        let seen: Vec<usize> = (0..house.objects.len()).filter(seen).collect();
        if !seen.is_empty() {
            return seen[rng.below(seen.len())];
        }
    }
    rng.below(house.objects.len())
}

fn happens(rng: &mut Rng, share: f64) -> bool {
    share > 0.0 && rng.chance(share)
}

/// Base poses of a recording, 1 + 4k of them: a turn of `images` poses, more or less of them and followed by
/// driving about where [`Variety`] says so. In several rooms `images` poses of a visit to all of them.
fn recording(house: &House, rng: &mut Rng, images: usize, variety: Variety) -> Vec<Pose2> {
    let turn = if happens(rng, variety.paced) { 49 + rng.below(97) } else { images };
    if house.rooms.len() > 1 {
        let mut poses = exploration_drive(house, rng, turn);
        let length = (images.min(poses.len()) - 1) / 4 * 4 + 1;
        poses.drain(..rng.below(poses.len() - length + 1));
        poses.truncate(length);
        return poses;
    }
    let mut poses = exploration_sweep(house, rng, turn);
    if happens(rng, variety.wander)
        && let Some(last) = poses.last().copied()
    {
        // Two poses for one of the drive's, which are 0.25 s apart.
        let more = 8 + rng.below(41);
        let drive = random_drive_from(house, rng, last, more + 1);
        for pair in drive.windows(2) {
            let half = pair[0].relative(pair[1]);
            poses.push(pair[0].compose(Pose2::unwrapped(half.x / 2.0, half.y / 2.0, half.yaw / 2.0)));
            poses.push(pair[1]);
        }
    }
    poses.truncate((poses.len() - 1) / 4 * 4 + 1);
    poses
}

/// Latents `[groups, channels, h, w]` of groups of four images, given as blocks `[groups * cells, values]`: what
/// [`LinearCodec`] computes, as one matrix product.
pub(crate) fn encode_blocks(config: &LinearCodecConfig, codec: &Codec, mut blocks: Vec<f32>) -> Vec<f32> {
    let (h, w) = config.latent_size();
    let (k, c, cells) = (config.block_values(), config.channels, h * w);
    let rows = blocks.len() / k;
    for block in blocks.chunks_exact_mut(k) {
        for (v, m) in block.iter_mut().zip(&codec.mean) {
            *v -= m;
        }
    }
    let mut flat = vec![0.0; rows * c];
    let (to, from) = (View::rows(0, c), View::rows(0, k));
    gemm([rows, c, k], &mut flat, to, 0.0, &blocks, from, &codec.basis, from.t(), config.scale);
    let mut out = vec![0.0; rows * c];
    for (row, values) in flat.chunks_exact(c).enumerate() {
        let (group, cell) = (row / cells, row % cells);
        for (ch, v) in values.iter().enumerate() {
            out[(group * c + ch) * cells + cell] = *v;
        }
    }
    out
}

/// Rays of a pinhole camera on a planar base, packed as four images per latent, averaged per token:
/// `[latents, tokens, 24]`. `poses` holds 1 + 4k base poses relative to the reference base; coordinates are those
/// of the reference camera's optical frame.
///
/// # Panics
/// When the number of poses is not 1 + 4k.
#[must_use]
pub fn plucker_tokens(camera: &Camera, poses: &[Pose2], grid: [usize; 2]) -> Vec<f32> {
    assert!(poses.len() % 4 == 1, "{} poses are not 1 + 4k", poses.len());
    let [rows, cols] = grid;
    let (cell_h, cell_w) = (camera.height / rows, camera.width / cols);
    let f = camera.focal_px();
    let (cx, cy) = (camera.width as f64 / 2.0, camera.height as f64 / 2.0);
    let (base_r, base_t) = camera.base_from_camera();
    let latents = 1 + (poses.len() - 1) / 4;
    let mut out = vec![0.0; latents * rows * cols * 24];
    for (slot, image) in (0..4 * latents).map(|s| (s, s.saturating_sub(3))) {
        let (r, t) = camera.map_from_camera(poses[image]);
        // reference camera from this camera: inv(base_from_camera) * (base_from_map_camera)
        let back =
            |v: [f64; 3]| -> [f64; 3] { std::array::from_fn(|i| (0..3).map(|k| base_r[k][i] * v[k]).sum()) };
        let origin = back([t[0] - base_t[0], t[1] - base_t[1], t[2] - base_t[2]]);
        for row in 0..rows {
            for col in 0..cols {
                let mut sum = [0.0f64; 6];
                for py in 0..cell_h {
                    for px in 0..cell_w {
                        let u = ((col * cell_w + px) as f64 + 0.5 - cx) / f;
                        let v = ((row * cell_h + py) as f64 + 0.5 - cy) / f;
                        let n = (u * u + v * v + 1.0).sqrt();
                        let d = [u / n, v / n, 1.0 / n];
                        let world: [f64; 3] = std::array::from_fn(|i| (0..3).map(|k| r[i][k] * d[k]).sum());
                        let d = back(world);
                        let m = [
                            origin[1] * d[2] - origin[2] * d[1],
                            origin[2] * d[0] - origin[0] * d[2],
                            origin[0] * d[1] - origin[1] * d[0],
                        ];
                        for k in 0..3 {
                            sum[k] += m[k];
                            sum[3 + k] += d[k];
                        }
                    }
                }
                let at = ((slot / 4 * rows + row) * cols + col) * 24 + slot % 4 * 6;
                for k in 0..6 {
                    out[at + k] = (sum[k] / (cell_h * cell_w) as f64) as f32;
                }
            }
        }
    }
    out
}

/// A colour and a shape that no object of the house has together; half of the time one of the two is there.
fn absent_name(house: &House, rng: &mut Rng) -> (usize, usize) {
    loop {
        let kinds = house.kinds();
        let (mut colour, mut shape) = (rng.below(6), kinds[rng.below(kinds.len())].index());
        let object = &house.objects[rng.below(house.objects.len())];
        match rng.below(4) {
            0 => colour = object.colour.index(),
            1 => shape = object.shape.index(),
            _ => {}
        }
        if !house.objects.iter().any(|o| o.colour.index() == colour && o.shape.index() == shape) {
            return (colour, shape);
        }
    }
}

/// Augmentation: permuted colour channels (the names follow) and mirroring (the poses follow).
pub(crate) struct Look {
    /// Output channel `c` shows the rendered channel `channels[c]`.
    channels: [usize; 3],
    pub(crate) mirror: bool,
}

impl Look {
    /// Appends an image of colours in 0..1, `width` pixels per row, as `[3, H, W]` in [-1, 1].
    pub(crate) fn floats(&self, rgb: &[[f32; 3]], width: usize, out: &mut Vec<f32>) {
        for channel in self.channels {
            for row in rgb.chunks_exact(width) {
                let value = |pixel: &[f32; 3]| 2.0 * pixel[channel] - 1.0;
                if self.mirror {
                    out.extend(row.iter().rev().map(value));
                } else {
                    out.extend(row.iter().map(value));
                }
            }
        }
    }

    /// Appends a rendered image as `[3, H, W]` in [-1, 1].
    pub(crate) fn pixels(&self, frame: &Frame, out: &mut Vec<f32>) {
        let (w, h) = (frame.width, frame.height);
        for channel in self.channels {
            for y in 0..h {
                for x in 0..w {
                    let from = if self.mirror { w - 1 - x } else { x };
                    out.push(f32::from(frame.rgb[(y * w + from) * 3 + channel]) / 127.5 - 1.0);
                }
            }
        }
    }

    pub(crate) fn draw(rng: &mut Rng, augment: bool) -> Self {
        let mut channels = [0, 1, 2];
        let mut mirror = false;
        if augment {
            rng.shuffle(&mut channels);
            mirror = rng.chance(0.5);
        }
        Self { channels, mirror }
    }

    fn colour(&self, colour: usize) -> usize {
        mindseye_world::Colour::ALL[colour].permuted(self.channels).index()
    }
}

struct Marks {
    seen: Vec<f32>,
    attributes: Vec<f32>,
    counts: Vec<f32>,
    tokens: usize,
    context: usize,
    attrs: usize,
    cell: [usize; 2],
    cols: usize,
}

impl Marks {
    fn new(model: &HouseModel, frames: usize) -> Self {
        let tokens = model.dit.tokens_per_frame();
        let [rows, cols] = model.dit.grid();
        let context = model.layout.context_latents;
        let attrs = model.dit.attributes;
        Self {
            seen: vec![0.0; frames * tokens],
            attributes: vec![0.0; context * tokens * attrs],
            counts: vec![0.0; context * tokens * attrs],
            tokens,
            context,
            attrs,
            cell: [model.codec.height / rows, model.codec.width / cols],
            cols,
        }
    }

    /// Adds one image (a quarter of a latent) to frame `i`.
    fn add(&mut self, frame: &Frame, house: &House, i: usize, named: Option<usize>, look: &Look) {
        let share = 1.0 / (4 * self.cell[0] * self.cell[1]) as f32;
        for (at, id) in frame.ids.iter().enumerate().filter(|(_, id)| **id > 0) {
            let (y, mut x) = (at / frame.width, at % frame.width);
            if look.mirror {
                x = frame.width - 1 - x;
            }
            let token = y / self.cell[0] * self.cols + x / self.cell[1];
            let object = usize::from(*id) - 1;
            if named == Some(object) {
                self.seen[i * self.tokens + token] += share;
            }
            if i < self.context && self.attrs > 0 {
                let o = &house.objects[object];
                let mine = [look.colour(o.colour.index()), 6 + o.shape.index()];
                for a in mine.into_iter().filter(|a| *a < self.attrs) {
                    let slot = (i * self.tokens + token) * self.attrs + a;
                    self.counts[slot] += share;
                    if self.counts[slot] >= SEEN_SHARE {
                        self.attributes[slot] = 1.0;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> HouseModel {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/models/house-tiny.toml");
        HouseModel::load(std::path::Path::new(path)).expect("the shipped configuration")
    }

    const PLAIN: [usize; 3] = [0, 1, 2];

    /// The same sample as it is and mirrored.
    fn both(seed: u64, task: Task) -> [Sample; 2] {
        let house = House::generate(seed, &Difficulty::plain());
        [false, true].map(|mirror| {
            let mut source = Source::new(&model(), Difficulty::plain(), None);
            let look = Look { channels: PLAIN, mirror };
            source.sample_as(&house, seed, task, &look, false, &mut Rng::new(seed))
        })
    }

    #[test]
    fn mirrored_samples_have_mirrored_poses_places_and_masks() {
        let model = model();
        let [_, cols] = model.dit.grid();
        let tokens = model.dit.tokens_per_frame();
        for seed in 0..3 {
            let [plain, mirrored] = both(seed, Task::Ground);
            for (a, b) in plain.pose.iter().zip(&mirrored.pose) {
                assert_eq!((a.x, a.y, a.yaw), (b.x, -b.y, -b.yaw));
            }
            for (a, b) in plain.locate.iter().zip(&mirrored.locate) {
                assert_eq!(*a, [b[0], -b[1]]);
            }
            for (a, b) in plain.seen.chunks(tokens).zip(mirrored.seen.chunks(tokens)) {
                for (a, b) in a.chunks(cols).zip(b.chunks(cols)) {
                    assert!(a.iter().zip(b.iter().rev()).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
                }
            }
            assert!(plain.seen.iter().any(|s| *s > 0.0), "house {seed}: it is seen somewhere");
        }
    }

    #[test]
    fn places_are_where_pictures_show_them_and_stand_still() {
        let model = model();
        let ([_, cols], tokens) = (model.dit.grid(), model.dit.tokens_per_frame());
        // Otherwise and so.
        let (mut left, mut right) = ([0, 0], [0, 0]);
        for seed in 0..6 {
            for sample in both(seed, Task::Ground) {
                // One object: from wherever it is placed, it is the same point.
                let point = |t: usize| {
                    let [x, y] = sample.locate[t].map(f64::from);
                    sample.pose[t].compose(Pose2::new(x, y, 0.0))
                };
                for t in 1..sample.pose.len() {
                    assert!(point(t).distance(point(0)) < 1e-5, "seed {seed}, latent {t}");
                }
                // What is clearly to the left is seen in the left column, and the other way round.
                for (t, seen) in sample.seen.chunks(tokens).enumerate() {
                    let column = |c: usize| seen.iter().skip(c).step_by(cols).sum::<f32>();
                    let (l, r) = (column(0), column(cols - 1));
                    if l.max(r) < SEEN_SHARE || l.min(r) > 0.0 {
                        continue;
                    }
                    let [x, y] = sample.locate[t];
                    let side = if l > r { &mut left } else { &mut right };
                    side[usize::from(x > 0.0 && (y > 0.0) == (l > r))] += 1;
                }
            }
        }
        // The robot turns while the four images of a latent are taken, and things stand before each other.
        for [otherwise, so] in [left, right] {
            assert!(so >= 4 && 8 * otherwise <= so, "{left:?} left, {right:?} right");
        }
    }

    #[test]
    fn a_drive_ends_at_the_standoff_and_its_last_latents_stand_still() {
        let model = model();
        for seed in 0..4 {
            let [sample, _] = both(seed, Task::Ground);
            let context = model.layout.context_latents;
            assert_eq!(sample.pose.len(), model.latents());
            assert_eq!(sample.pose[context], Pose2::default(), "the first target image is the origin");
            assert_eq!(sample.context_index.len(), context);
            assert!(sample.context_index.is_sorted_by(|a, b| a < b) && sample.context_index[0] >= 1);
            let last = sample.pose.len() - 1;
            for t in last - model.layout.box_latents..last {
                assert_eq!(sample.pose[t], sample.pose[last]);
            }
            // Before the object, looking at it.
            let [x, y] = sample.locate[last].map(f64::from);
            assert!(y.atan2(x).abs() < 5f64.to_radians(), "seed {seed}: {x} {y}");
            assert!((0.6..2.6).contains(&x), "seed {seed}: {x} m ahead");
            assert_eq!(sample.ids[2], END);
            assert!(sample.camera.iter().all(|v| *v == 0.0), "no rays without given poses");
        }
    }

    /// A level camera at the base's origin.
    fn level() -> Camera {
        Camera { pitch_rad: 0.0, mount_forward_m: 0.0, ..Camera::new(24, 16) }
    }

    #[test]
    fn rays_by_hand() {
        // Five poses: here, and one metre ahead, to the left, and turned.
        let poses = [
            Pose2::default(),
            Pose2::new(1.0, 0.0, 0.0),
            Pose2::new(0.0, 1.0, 0.0),
            Pose2::new(0.0, 0.0, std::f64::consts::FRAC_PI_2),
            Pose2::new(2.0, 0.0, 0.0),
        ];
        let (rows, cols) = (2, 3);
        let rays = plucker_tokens(&level(), &poses, [rows, cols]);
        assert_eq!(rays.len(), 2 * rows * cols * 24);
        // Moment and direction of one image of a latent at a token.
        let at = |latent: usize, image: usize, token: usize| -> ([f32; 3], [f32; 3]) {
            let from = (latent * rows * cols + token) * 24 + image * 6;
            (std::array::from_fn(|k| rays[from + k]), std::array::from_fn(|k| rays[from + 3 + k]))
        };
        let near = |a: [f32; 3], b: [f32; 3]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        for token in 0..rows * cols {
            let (moment, d) = at(0, 0, token);
            assert!(near(moment, [0.0; 3]), "{token}: nothing has moved");
            assert!(d[2] > 0.5 && (d[1] > 0.0) == (token >= cols), "{token}: y is down: {d:?}");
            assert_eq!(token % cols == 2, d[0] > 0.3, "{token}: x is to the right: {d:?}");
            // The first latent is one image four times.
            assert_eq!((1..4).map(|k| at(0, k, token)).collect::<Vec<_>>(), vec![at(0, 0, token); 3]);
            // o x d with o = (0, 0, 1): (-dy, dx, 0); the direction stays.
            let (moment, ahead) = at(1, 0, token);
            assert!(near(ahead, d) && near(moment, [-d[1], d[0], 0.0]), "{token}: {moment:?}");
            // To the left is -x: o = (-1, 0, 0) gives (0, dz, -dy).
            let (moment, _) = at(1, 1, token);
            assert!(near(moment, [0.0, d[2], -d[1]]), "{token}: {moment:?}");
            // Turned to the left: what was ahead (z) is now to the left (-x), what was right (x) is ahead (z).
            let (moment, turned) = at(1, 2, token);
            assert!(near(moment, [0.0; 3]) && near(turned, [-d[2], d[1], d[0]]), "{token}: {turned:?}");
            // Twice as far, twice the moment.
            assert!(near(at(1, 3, token).0, [-2.0 * d[1], 2.0 * d[0], 0.0]), "{token}");
        }
    }

    #[test]
    fn the_image_whose_pose_is_zero_is_drawn_in_training_only() {
        let model = model();
        let mut source = Source::new(&model, Difficulty::plain(), None);
        let tokens = model.dit.tokens_per_frame();
        let from = model.layout.context_latents * tokens * 24;
        // Slots (four a latent) whose moments are all zero: those that stand where the reference stands.
        let mut zeros = |seed: u64, augment: bool| -> Vec<usize> {
            let sample = source.sample(seed, Task::Navigate, augment);
            assert!(sample.camera[..from].iter().all(|v| *v == 0.0), "the context has no rays");
            let rays = &sample.camera[from..];
            (0..4 * model.target_latents())
                .filter(|slot| {
                    let moment = |t: usize| {
                        let at = (slot / 4 * tokens + t) * 24 + slot % 4 * 6;
                        rays[at..at + 3].iter().all(|v| v.abs() < 1e-6)
                    };
                    (0..tokens).all(moment)
                })
                .collect()
        };
        let mut firsts = std::collections::BTreeSet::new();
        for seed in 0..10 {
            assert_eq!(zeros(seed, false)[..4], [0, 1, 2, 3], "seed {seed}: the first image");
            let drawn = zeros(seed, true);
            assert!(!drawn.is_empty(), "seed {seed}: one image is the reference");
            firsts.insert(drawn[0]);
        }
        assert!(firsts.len() >= 4, "references drawn: {firsts:?}");
    }

    #[test]
    fn houses_are_drawn_from_worlds_by_their_shares() {
        let one = Worlds::from(Difficulty::plain());
        assert_eq!(one.house(7), House::generate(7, &Difficulty::plain()));
        let mixed =
            Worlds::mixed(vec![(1.0, Difficulty::plain()), (3.0, Difficulty::house())]).expect("shares");
        let several = (0..400).filter(|seed| mixed.house(*seed).rooms.len() > 1).count();
        assert!((270..330).contains(&several), "{several} of 400 in the world of three shares of four");
        assert_eq!(mixed.house(7), mixed.house(7));
        let furnished = Worlds::mixed(vec![(1.0, Difficulty::furnished()), (1.0, Difficulty::plain())]);
        let nouns = furnished.expect("shares").nouns();
        assert!(nouns.len() > Difficulty::plain().nouns().len() && nouns.starts_with(&Shape::PLAIN));
        for shares in [vec![], vec![(0.0, Difficulty::plain())], vec![(f64::NAN, Difficulty::plain())]] {
            assert_eq!(Worlds::mixed(shares), None);
        }
    }

    #[test]
    fn in_several_rooms_a_part_of_the_visit_is_seen_and_most_goals_are_in_sight_of_it() {
        let layout = model().layout;
        let variety = Variety { paced: 0.5, wander: 0.5, ..Variety::default() };
        let (mut in_sight, mut begun) = (0, Vec::new());
        let all = 60;
        for seed in 0..all {
            let house = House::generate(seed, &Difficulty::house());
            let plan = Plan::draw(&layout, variety, &house, Task::Ground, &mut Rng::new(seed));
            assert_eq!(plan.sweep.len(), layout.recording_images);
            let walks = plan.sweep.windows(2).all(|w| w[0].distance(w[1]) < 0.1);
            assert!(walks && plan.context_index.iter().all(|k| 4 * k < plan.sweep.len()), "seed {seed}");
            let room = |p: &Pose2| house.rooms.iter().position(|r| r.rect.contains(p.x, p.y));
            let seen: Vec<Option<usize>> = plan.sweep.iter().map(room).collect();
            assert!(seen.contains(&room(&plan.start)), "seed {seed}: it begins where something was seen");
            begun.push(seen[0]);
            let object = &house.objects[plan.object];
            in_sight += u64::from(plan.context_index.iter().any(|k| {
                let p = plan.sweep[4 * k];
                let off = wrap_angle(p.bearing_to(object.x, object.y) - p.yaw).abs();
                off < IN_VIEW_RAD && house.walls_clear((p.x, p.y), (object.x, object.y))
            }));
        }
        assert!((all * 8 / 10..all).contains(&in_sight), "{in_sight} of {all} in sight");
        begun.dedup();
        assert!(begun.len() > 10, "parts begin in all rooms");
    }

    #[test]
    fn absent_names_are_not_in_the_house() {
        let house = House::generate(3, &Difficulty::plain());
        let mut rng = Rng::new(3);
        for _ in 0..50 {
            let (colour, shape) = absent_name(&house, &mut rng);
            let mut names = house.objects.iter().map(|o| (o.colour.index(), o.shape.index()));
            assert!(names.all(|name| name != (colour, shape)));
        }
        let [ground, _] = both(4, Task::Absent);
        assert!(ground.seen.iter().all(|s| *s == 0.0), "nothing shows it");
    }
}
