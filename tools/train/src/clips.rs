//! Training samples from recorded videos with captions and, where they are known, camera poses.
//!
//! The recipe is Video4Spatial's (sections 3.4 and 6.2):
//! * A *clip* ends with the captioned object in the middle. Its last images, a fixed number of them at an even
//!   stride, are the target; after them the last image stands still with a red box on the object.
//! * Context is non-contiguous groups of four consecutive images with their source indices (group `k` holds images
//!   `4k-3 ..= 4k`), from the clip's own recording outside the clip, or from another recording of the same place.
//! * A *walk* is any run of images with poses: the target of camera-pose instructions, given as Plücker rays
//!   relative to an image of the walk drawn at random.
//!
//! Nothing says where an object is in a clip's context or what else is seen there: the losses of mask, place and
//! attributes are off, and poses count only where they are given and in one map with the target's first image.
//! Clips are not mirrored or recoloured, since captions may speak of sides and colours.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use mindseye_engines::model::codec::LinearCodec;
use mindseye_engines::plucker::{self, Intrinsics, Pose};
use mindseye_world::{Pose2, Rng, draw_box};
use serde::Serialize;

use crate::config::{ContextFrom, DataConfig};
use crate::data::{Codec, Known, Sample, Task, encode_blocks};
use crate::error::{TrainError, io};
use crate::family::{END, HouseModel};

/// One image of a recording.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Image {
    /// Number among the kept images of the source; a gap stands for images that cannot be used.
    pub index: usize,
    /// Where the camera was (metres; camera x right, y down, z forward).
    pub map_from_camera: Option<Pose>,
    /// `[fx, fy, cx, cy]` in pixels of the model's images, pixel centres at +0.5.
    pub intrinsics: Option<[f64; 4]>,
}

/// Where the pixels of a recording are: `[images, height, width, 3]`, 8 bits each, in the model's size.
#[derive(Debug)]
pub enum Pixels {
    /// Here.
    Memory(Vec<u8>),
    /// In a file of nothing else, which is opened for every read: there may be more recordings than open files.
    File(PathBuf),
}

/// One recording.
#[derive(Debug)]
pub struct Recording {
    /// Its name.
    pub id: String,
    /// Recordings of the same place share this.
    pub environment: String,
    /// Recordings whose poses are in the same map share this.
    pub map: String,
    /// Direction of up in the map, if it is known; else up is that of the target's first image.
    pub up: Option<[f64; 3]>,
    /// The images, ascending in `index`.
    pub images: Vec<Image>,
    /// Their pixels, in the same order.
    pub pixels: Pixels,
}

/// One clip.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    /// Its name.
    pub id: String,
    /// Its recording, among those given.
    pub recording: usize,
    /// `index` of its first image.
    pub first: usize,
    /// `index` of its last image, with the object in the middle.
    pub last: usize,
    /// Token ids `[text_len]`, zero-padded.
    pub ids: Vec<usize>,
    /// Box of the object in the last image, `[x0, y0, x1, y1]` in continuous pixels of the model's size.
    pub area: Option<[f32; 4]>,
}

/// Clips and walks that can be trained on.
pub struct Clips {
    model: HouseModel,
    recordings: Vec<Recording>,
    /// Per recording: context groups.
    groups: Vec<Vec<Group>>,
    /// Per recording: others that its targets take context from, itself included where that is allowed.
    partners: Vec<Vec<usize>>,
    clips: Vec<Clip>,
    train: Part,
    held_out: Part,
    /// Images from one image of a walk to the next.
    walk_stride: usize,
    identity: String,
}

/// Context: four consecutive images.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// Source index of the latent.
    latent: usize,
    /// Position of its first image in the recording.
    at: usize,
}

/// Targets of one part of the data.
#[derive(Debug, Default)]
struct Part {
    clips: Vec<usize>,
    /// Recording, and range of positions of first images.
    walks: Vec<(usize, std::ops::Range<usize>)>,
}

impl Part {
    fn walk_count(&self) -> usize {
        self.walks.iter().map(|(_, r)| r.len()).sum()
    }
}

/// Why a clip cannot be used.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Unusable {
    #[error("an image is missing or cannot be read")]
    Images,
    #[error("fewer than {0} images, which the model's motion takes")]
    Short(usize),
    #[error("fewer than {0} groups of context")]
    Context(usize),
}

/// Target of a sample: recording, positions of its images, caption and box.
struct Target<'a> {
    recording: usize,
    /// Positions of the images, the still ones at the end included.
    at: Vec<usize>,
    clip: Option<&'a Clip>,
}

/// What [`Clips::new`] found and left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Clips to train on.
    pub clips: usize,
    /// Clips that are kept apart.
    pub clips_held_out: usize,
    /// Clips without a box: their last images carry none.
    pub without_box: usize,
    /// First images of walks to train on.
    pub walks: usize,
    /// First images of walks that are kept apart.
    pub walks_held_out: usize,
    /// Clips that cannot be used, by reason.
    pub left_out: BTreeMap<String, usize>,
}

/// A number in [0, 1) that depends on the name alone (FNV-1a).
fn share_of(name: &str) -> f64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for b in name.bytes() {
        hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    }
    Rng::new(hash).unit()
}

impl Clips {
    /// Takes what can be used of recordings and clips. `identity` stands for all of their content: a run does not
    /// go on with other data.
    ///
    /// # Errors
    /// When nothing can be trained on: says why.
    pub fn new(
        model: &HouseModel,
        config: &DataConfig,
        recordings: Vec<Recording>,
        clips: Vec<Clip>,
        identity: String,
    ) -> Result<(Self, Found), TrainError> {
        let groups: Vec<Vec<Group>> = recordings.iter().map(|r| groups(&r.images)).collect();
        let partners = partners(&recordings, &groups, config.context, model.layout.context_latents);
        let mut this = Self {
            model: model.clone(),
            walk_stride: 1,
            recordings,
            groups,
            partners,
            clips,
            train: Part::default(),
            held_out: Part::default(),
            identity,
        };
        let mut found = Found::default();
        let mut strides = this.take_clips(config.held_out, &mut found);
        // Walks are as fast as clips are.
        strides.sort_unstable();
        this.walk_stride = strides.get(strides.len() / 2).copied().unwrap_or(1).max(1);
        this.take_walks(config.held_out);
        found.clips = this.train.clips.len();
        found.clips_held_out = this.held_out.clips.len();
        found.walks = this.train.walk_count();
        found.walks_held_out = this.held_out.walk_count();
        if found.clips + found.walks == 0 {
            return Err(TrainError::NoData(this.nothing(&found)));
        }
        Ok((this, found))
    }

    /// Images of a clip's motion.
    fn moving_images(&self) -> usize {
        1 + 4 * self.model.layout.motion_latents
    }

    /// Images of a target, the still ones at the end included.
    fn target_images(&self) -> usize {
        self.moving_images() + 4 * self.model.layout.box_latents
    }

    /// Sorts clips into those to train on and those kept apart, and counts what cannot be used. Returns the strides at
    /// which their motion is taken.
    fn take_clips(&mut self, held_out: f64, found: &mut Found) -> Vec<usize> {
        let moving = self.moving_images();
        let mut strides = Vec::new();
        for k in 0..self.clips.len() {
            let clip = &self.clips[k];
            match self.clip_stride(clip, moving) {
                Ok(stride) => {
                    strides.push(stride);
                    found.without_box += usize::from(clip.area.is_none());
                    let held = share_of(&self.recordings[clip.recording].environment) < held_out;
                    if held { &mut self.held_out } else { &mut self.train }.clips.push(k);
                }
                Err(reason) => *found.left_out.entry(reason.to_string()).or_default() += 1,
            }
        }
        strides
    }

    fn clip_stride(&self, clip: &Clip, moving: usize) -> Result<usize, Unusable> {
        let images = &self.recordings[clip.recording].images;
        let (first, last) = position(images, clip.first)
            .zip(position(images, clip.last))
            .filter(|(first, last)| last >= first && last - first == clip.last - clip.first)
            .ok_or(Unusable::Images)?;
        if last - first + 1 < moving {
            return Err(Unusable::Short(moving));
        }
        if self.sources(clip.recording, clip.first..=clip.last).is_empty() {
            return Err(Unusable::Context(self.model.layout.context_latents));
        }
        Ok((last - first) / (moving - 1))
    }

    /// Sorts walks into those to train on and those kept apart: all runs of consecutive images with poses and intrinsics
    /// that are long enough and leave context.
    fn take_walks(&mut self, held_out: f64) {
        let length = (self.target_images() - 1) * self.walk_stride;
        let fits = |i: &Image| i.map_from_camera.is_some() && i.intrinsics.is_some();
        for k in 0..self.recordings.len() {
            let r = &self.recordings[k];
            let (mut firsts, mut begin) = (Vec::new(), 0);
            for run in r.images.chunk_by(|a, b| fits(a) && fits(b) && b.index == a.index + 1) {
                // Those near the ends of a short recording may leave no context.
                for first in begin..(begin + run.len()).saturating_sub(length) {
                    let span = r.images[first].index..=r.images[first + length].index;
                    if fits(&r.images[first]) && !self.sources(k, span).is_empty() {
                        firsts.push(first);
                    }
                }
                begin += run.len();
            }
            let held = share_of(&r.environment) < held_out;
            let part = if held { &mut self.held_out } else { &mut self.train };
            for first in firsts {
                match part.walks.last_mut() {
                    Some((o, range)) if *o == k && range.end == first => range.end += 1,
                    _ => part.walks.push((k, first..first + 1)),
                }
            }
        }
    }

    /// Why there is nothing to train on.
    fn nothing(&self, found: &Found) -> String {
        let why: Vec<String> = found.left_out.iter().map(|(why, n)| format!("{n}: {why}")).collect();
        format!(
            "none of {} clips can be used{}{}, and no run of {} images with poses and intrinsics leaves {} groups of \
             context",
            self.clips.len(),
            if why.is_empty() { "" } else { ": " },
            why.join("; "),
            (self.target_images() - 1) * self.walk_stride + 1,
            self.model.layout.context_latents
        )
    }

    /// What stands for the content.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Whether anything is kept apart.
    #[must_use]
    pub fn has_held_out(&self) -> bool {
        !self.held_out.clips.is_empty() || !self.held_out.walks.is_empty()
    }

    /// Recordings that a target can take its context from, with the groups that do not touch it.
    fn sources(&self, own: usize, span: std::ops::RangeInclusive<usize>) -> Vec<usize> {
        let need = self.model.layout.context_latents;
        self.partners[own]
            .iter()
            .copied()
            .filter(|r| *r != own || self.groups[own].iter().filter(|g| g.clear_of(&span)).count() >= need)
            .collect()
    }

    /// The sample with this seed; a share `navigate` of them are walks where there are both. `training` draws the
    /// image whose pose is zero, and takes from what is not kept apart.
    ///
    /// # Errors
    /// When pixels cannot be read any more.
    pub fn sample(
        &self,
        seed: u64,
        navigate: f64,
        training: bool,
        codec: &Codec,
    ) -> Result<Sample, TrainError> {
        let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xc119);
        let part = if training { &self.train } else { &self.held_out };
        let (moving, images) = (self.moving_images(), self.target_images());
        let walks = part.walk_count();
        let walk = walks > 0 && (part.clips.is_empty() || rng.chance(navigate));
        let target = if walk {
            let mut n = rng.below(walks);
            let mut chosen = (0, 0);
            for (recording, range) in &part.walks {
                if n < range.len() {
                    chosen = (*recording, range.start + n);
                    break;
                }
                n -= range.len();
            }
            let (recording, first) = chosen;
            Target { recording, at: (0..images).map(|k| first + k * self.walk_stride).collect(), clip: None }
        } else {
            let clip = &self.clips[part.clips[rng.below(part.clips.len())]];
            let all = &self.recordings[clip.recording].images;
            let last = position(all, clip.last).unwrap_or(0);
            let stride = ((clip.last - clip.first) / (moving - 1)).max(1);
            let mut at: Vec<usize> = (0..moving).map(|k| last - (moving - 1 - k) * stride).collect();
            at.resize(images, last);
            Target { recording: clip.recording, at, clip: Some(clip) }
        };
        self.assemble(&target, training, codec, &mut rng)
    }

    fn assemble(
        &self,
        target: &Target<'_>,
        training: bool,
        codec: &Codec,
        rng: &mut Rng,
    ) -> Result<Sample, TrainError> {
        let (model, layout) = (&self.model, &self.model.layout);
        let own = &self.recordings[target.recording];
        let (source, groups) = self.context(target, rng);
        let other = &self.recordings[source];
        let mut blocks = Vec::new();
        self.context_blocks(other, &groups, &mut blocks)?;
        self.target_blocks(target, &mut blocks)?;
        let (pose, known) = self.poses(target, other, &groups);

        let tokens = model.dit.tokens_per_frame();
        let per_latent = tokens * model.dit.camera_channels;
        let mut camera = vec![0.0; layout.context_latents * per_latent];
        if target.clip.is_none() && model.dit.camera_channels == plucker::CHANNELS {
            let reference = if training { rng.below(target.at.len()) } else { 0 };
            camera.extend(self.rays(own, &target.at, reference));
        } else {
            camera.resize(model.latents() * per_latent, 0.0);
        }
        let mut ids = vec![0; model.dit.text_len];
        match target.clip {
            Some(clip) => ids.clone_from(&clip.ids),
            None => ids[0] = END,
        }
        Ok(Sample {
            task: if target.clip.is_some() { Task::Ground } else { Task::Navigate },
            house_seed: 0,
            latents: encode_blocks(&model.codec, codec, blocks),
            context_index: groups.iter().map(|g| g.latent).collect(),
            pose,
            known: Known::Poses(known),
            ids,
            camera,
            seen: vec![0.0; (layout.context_latents + 1) * tokens],
            locate: vec![[0.0; 2]; model.latents()],
            attributes: vec![0.0; layout.context_latents * tokens * model.dit.attributes],
            object: 0,
            map_from_start: Pose2::default(),
            guide: Vec::new(),
        })
    }

    /// Recording and groups that the context of a target is taken from, at random, groups in order.
    fn context(&self, target: &Target<'_>, rng: &mut Rng) -> (usize, Vec<Group>) {
        let images = &self.recordings[target.recording].images;
        let span = match target.clip {
            Some(clip) => clip.first..=clip.last,
            None => images[target.at[0]].index..=images[target.at[target.at.len() - 1]].index,
        };
        let sources = self.sources(target.recording, span.clone());
        let source = sources[rng.below(sources.len())];
        let mut groups: Vec<Group> = self.groups[source]
            .iter()
            .copied()
            .filter(|g| source != target.recording || g.clear_of(&span))
            .collect();
        rng.shuffle(&mut groups);
        groups.truncate(self.model.layout.context_latents);
        groups.sort_unstable_by_key(|g| g.latent);
        (source, groups)
    }

    /// Appends the blocks of context groups, latent by latent.
    fn context_blocks(
        &self,
        recording: &Recording,
        groups: &[Group],
        blocks: &mut Vec<f32>,
    ) -> Result<(), TrainError> {
        let mut group: Vec<u8> = Vec::new();
        for g in groups {
            group.clear();
            for k in 0..4 {
                self.read(recording, g.at + k, &mut group)?;
            }
            blocks.extend(self.blocks_of(&group));
        }
        Ok(())
    }

    /// Appends the blocks of a target: its first image, its motion, and for a clip its last image with the box.
    fn target_blocks(&self, target: &Target<'_>, blocks: &mut Vec<f32>) -> Result<(), TrainError> {
        let recording = &self.recordings[target.recording];
        let mut group: Vec<u8> = Vec::new();
        self.read(recording, target.at[0], &mut group)?;
        still(&mut group);
        blocks.extend(self.blocks_of(&group));
        for latent in 1..self.model.target_latents() {
            group.clear();
            match target.clip {
                Some(clip) if latent > self.model.layout.motion_latents => {
                    self.read(recording, target.at[4 * latent], &mut group)?;
                    if let Some(area) = clip.area {
                        draw_box(&mut group, self.model.codec.width, area, [255, 0, 0]);
                    }
                    still(&mut group);
                }
                _ => {
                    for at in &target.at[4 * latent - 3..=4 * latent] {
                        self.read(recording, *at, &mut group)?;
                    }
                }
            }
            blocks.extend(self.blocks_of(&group));
        }
        Ok(())
    }

    /// Poses on the floor of all latents relative to the first target image, and which of them are known: those given
    /// in one map with it.
    fn poses(&self, target: &Target<'_>, other: &Recording, groups: &[Group]) -> (Vec<Pose2>, Vec<bool>) {
        let own = &self.recordings[target.recording];
        let start = own.images[target.at[0]].map_from_camera;
        let place = |image: &Image, map: &str| match (start, image.map_from_camera) {
            (Some(from), Some(to)) if map == own.map => planar(&from, &to, own.up),
            _ => None,
        };
        let context = groups.iter().map(|g| place(&other.images[g.at + 3], &other.map));
        let targets = (0..self.model.target_latents())
            .map(|latent| place(&own.images[target.at[4 * latent]], &own.map));
        context.chain(targets).map(|pose| (pose.unwrap_or_default(), pose.is_some())).unzip()
    }

    /// Plücker rays of target images `[latents, tokens, 24]`, as [`plucker::features`], with each image's own
    /// intrinsics.
    fn rays(&self, recording: &Recording, at: &[usize], reference: usize) -> Vec<f32> {
        let [rows, cols] = self.model.dit.grid();
        let (cell_h, cell_w) = (self.model.codec.height / rows, self.model.codec.width / cols);
        let tokens = rows * cols;
        let latents = 1 + (at.len() - 1) / 4;
        let mut out = vec![0.0; latents * tokens * plucker::CHANNELS];
        let image = |k: usize| &recording.images[at[k]];
        let Some(origin) = image(reference).map_from_camera else { return out };
        for slot in 0..4 * latents {
            let image = image(slot.saturating_sub(3));
            let (Some(pose), Some([fx, fy, cx, cy])) = (image.map_from_camera, image.intrinsics) else {
                continue;
            };
            let relative = plucker::relative(&origin, &pose);
            let k = Intrinsics { fx, fy, cx, cy };
            for token in 0..tokens {
                let (row, col) = (token / cols, token % cols);
                let mut sum = [0.0f64; 6];
                for y in row * cell_h..(row + 1) * cell_h {
                    for x in col * cell_w..(col + 1) * cell_w {
                        let line = plucker::ray(&relative, &k, x as f64 + 0.5, y as f64 + 0.5);
                        for (s, v) in sum.iter_mut().zip(line) {
                            *s += v;
                        }
                    }
                }
                let to = (slot / 4 * tokens + token) * plucker::CHANNELS + slot % 4 * 6;
                for (c, s) in sum.iter().enumerate() {
                    out[to + c] = (s / (cell_h * cell_w) as f64) as f32;
                }
            }
        }
        out
    }

    /// Appends one image `[height, width, 3]`.
    fn read(&self, recording: &Recording, at: usize, out: &mut Vec<u8>) -> Result<(), TrainError> {
        let n = 3 * self.model.codec.width * self.model.codec.height;
        match &recording.pixels {
            Pixels::Memory(all) => out.extend_from_slice(&all[at * n..(at + 1) * n]),
            Pixels::File(path) => {
                let from = out.len();
                out.resize(from + n, 0);
                File::open(path)
                    .and_then(|file| file.read_exact_at(&mut out[from..], (at * n) as u64))
                    .map_err(io(path))?;
            }
        }
        Ok(())
    }

    /// Blocks of four images `[4, height, width, 3]`.
    fn blocks_of(&self, group: &[u8]) -> Vec<f32> {
        let plane = self.model.codec.width * self.model.codec.height;
        let mut planes = vec![0.0f32; 12 * plane];
        for (i, image) in group.chunks_exact(3 * plane).enumerate() {
            for (p, rgb) in image.chunks_exact(3).enumerate() {
                for (c, v) in rgb.iter().enumerate() {
                    planes[(3 * i + c) * plane + p] = f32::from(*v) / 127.5 - 1.0;
                }
            }
        }
        LinearCodec::blocks(&self.model.codec, &planes)
    }

    /// Random blocks of four images for the codec's basis: `count` vectors of `12 * block^2` values. Half are
    /// moving images, a quarter still ones, a quarter ends of clips with their box.
    ///
    /// # Errors
    /// When pixels cannot be read.
    pub fn blocks(&self, seed: u64, count: usize) -> Result<Vec<f32>, TrainError> {
        let mut rng = Rng::new(seed ^ 0xb10c5);
        let n = self.model.codec.block_values();
        let mut out = Vec::new();
        let mut group = Vec::new();
        let any: Vec<usize> = (0..self.recordings.len()).filter(|r| !self.groups[*r].is_empty()).collect();
        let mut turn = 0;
        while out.len() < count * n {
            turn += 1;
            group.clear();
            let clips = &self.train.clips;
            let boxed = (turn % 4 == 0 && !clips.is_empty())
                .then(|| &self.clips[clips[rng.below(clips.len())]])
                .and_then(|c| Some((c, position(&self.recordings[c.recording].images, c.last)?)));
            if let Some((clip, at)) = boxed {
                self.read(&self.recordings[clip.recording], at, &mut group)?;
                if let Some(area) = clip.area {
                    draw_box(&mut group, self.model.codec.width, area, [255, 0, 0]);
                }
                still(&mut group);
            } else {
                let r = any[rng.below(any.len())];
                let at = self.groups[r][rng.below(self.groups[r].len())].at;
                if turn % 4 == 3 {
                    self.read(&self.recordings[r], at, &mut group)?;
                    still(&mut group);
                } else {
                    for k in 0..4 {
                        self.read(&self.recordings[r], at + k, &mut group)?;
                    }
                }
            }
            out.extend(self.blocks_of(&group));
        }
        out.truncate(count * n);
        Ok(out)
    }
}

impl Group {
    /// Whether no image of the group is in the span of indices.
    fn clear_of(self, span: &std::ops::RangeInclusive<usize>) -> bool {
        4 * self.latent < *span.start() || 4 * self.latent > *span.end() + 3
    }
}

/// Per recording: those that its targets take context from, of which each has `enough` groups by itself; its own is
/// checked target by target.
fn partners(
    recordings: &[Recording],
    groups: &[Vec<Group>],
    context: ContextFrom,
    enough: usize,
) -> Vec<Vec<usize>> {
    (0..recordings.len())
        .map(|own| {
            let place = &recordings[own].environment;
            let others: Vec<usize> = (0..recordings.len())
                .filter(|r| *r != own && recordings[*r].environment == *place && groups[*r].len() >= enough)
                .collect();
            match context {
                ContextFrom::Same => vec![own],
                ContextFrom::Other => others,
                ContextFrom::Auto if !others.is_empty() => others,
                ContextFrom::Auto => vec![own],
                ContextFrom::Both => std::iter::once(own).chain(others).collect(),
            }
        })
        .collect()
}

/// One image, four times.
fn still(group: &mut Vec<u8>) {
    let n = group.len();
    for _ in 0..3 {
        group.extend_from_within(..n);
    }
}

fn position(images: &[Image], index: usize) -> Option<usize> {
    images.binary_search_by_key(&index, |i| i.index).ok()
}

/// Groups of images `4k-3 ..= 4k` that are all there; `k` counts from 1, like latents of a whole recording.
fn groups(images: &[Image]) -> Vec<Group> {
    let first = |at: usize| images[at].index % 4 == 1;
    (0..images.len().saturating_sub(3))
        .filter(|at| first(*at) && images[at + 3].index == images[*at].index + 3)
        .map(|at| Group { latent: images[at].index / 4 + 1, at })
        .collect()
}

/// Pose on the floor of one camera seen from another: metres forward and left, radians to the left. The floor is
/// at right angles to `up`, or to the first camera's own vertical axis. None when a camera looks straight up or down
/// or a number is not finite.
#[must_use]
pub fn planar(map_from_first: &Pose, map_from_other: &Pose, up: Option<[f64; 3]>) -> Option<Pose2> {
    let column = |p: &Pose, j: usize| -> [f64; 3] { std::array::from_fn(|i| p[i][j]) };
    let dot = |a: [f64; 3], b: [f64; 3]| a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
    let unit = |v: [f64; 3]| {
        let n = dot(v, v).sqrt();
        (n.is_finite() && n > 1e-6).then(|| v.map(|x| x / n))
    };
    let up = unit(up.unwrap_or_else(|| column(map_from_first, 1).map(|v| -v)))?;
    let level = |v: [f64; 3]| {
        let k = dot(v, up);
        unit(std::array::from_fn(|i| v[i] - k * up[i]))
    };
    let forward = level(column(map_from_first, 2))?;
    let left = [
        up[1] * forward[2] - up[2] * forward[1],
        up[2] * forward[0] - up[0] * forward[2],
        up[0] * forward[1] - up[1] * forward[0],
    ];
    let heading = level(column(map_from_other, 2))?;
    let moved: [f64; 3] = std::array::from_fn(|i| map_from_other[i][3] - map_from_first[i][3]);
    let pose = Pose2::unwrapped(
        dot(moved, forward),
        dot(moved, left),
        dot(heading, left).atan2(dot(heading, forward)),
    );
    (pose.x.is_finite() && pose.y.is_finite()).then_some(pose)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turned(yaw_left: f64, x: f64, y: f64) -> Pose {
        // Map z up; camera forward = (cos, sin, 0), right = (sin, -cos, 0), down = (0, 0, -1).
        let (s, c) = yaw_left.sin_cos();
        [[s, 0.0, c, x], [-c, 0.0, s, y], [0.0, -1.0, 0.0, 1.4], [0.0, 0.0, 0.0, 1.0]]
    }

    #[test]
    fn planar_poses_are_forward_left_and_to_the_left() {
        let from = turned(0.5, 1.0, 2.0);
        let base = Pose2::unwrapped(1.0, 2.0, 0.5);
        for (yaw, x, y) in [(0.5, 1.0, 2.0), (1.2, 3.0, -1.0), (-2.0, 0.0, 5.0)] {
            let wanted = base.relative(Pose2::unwrapped(x, y, yaw));
            for up in [None, Some([0.0, 0.0, 2.0])] {
                let got = planar(&from, &turned(yaw, x, y), up).expect("a level camera");
                assert!((got.x - wanted.x).abs() < 1e-9 && (got.y - wanted.y).abs() < 1e-9, "{got:?}");
                assert!(mindseye_world::wrap_angle(got.yaw - wanted.yaw).abs() < 1e-9, "{got:?}");
            }
        }
        let mut broken = from;
        broken[0][3] = f64::NAN;
        assert_eq!(planar(&from, &broken, None), None);
        // Looking straight down: there is no forward.
        let down = [[1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1.0]];
        assert_eq!(planar(&down, &from, Some([0.0, 0.0, 1.0])), None);
    }

    #[test]
    fn groups_follow_the_codec_and_skip_holes() {
        let at = |indices: &[usize]| -> Vec<(usize, usize)> {
            let images: Vec<Image> = indices
                .iter()
                .map(|i| Image { index: *i, map_from_camera: None, intrinsics: None })
                .collect();
            groups(&images).iter().map(|g| (g.latent, g.at)).collect()
        };
        assert_eq!(at(&(0..13).collect::<Vec<_>>()), [(1, 1), (2, 5), (3, 9)]);
        assert_eq!(at(&[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]), [(1, 1), (3, 8)]);
        assert_eq!(at(&[1, 2, 3]), []);
        let group = Group { latent: 2, at: 5 }; // images 5..=8
        assert!(group.clear_of(&(0..=4)) && group.clear_of(&(9..=12)));
        assert!(!group.clear_of(&(0..=5)) && !group.clear_of(&(8..=9)) && !group.clear_of(&(6..=7)));
    }
}
