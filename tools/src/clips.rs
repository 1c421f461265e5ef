//! Clips for training: a dataset on disk, its pictures decoded once into the model's size.
//!
//! Decoding a phone's video takes far longer than a training step of a small model, so every picture is decoded once,
//! before training, and kept as raw bytes in a cache: `<recording>.rgb`, `[images, height, width, 3]`, and
//! `<recording>.json`, which says what it was made of. A recording is finished or not there; a run that was stopped
//! goes on with the next one, and one whose pictures have changed is decoded again.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use mindseye_engines::plucker::Pose;
use mindseye_train::clips::{Clip, Clips, Found, Image, Pixels, Recording};
use mindseye_train::config::DataConfig;
use mindseye_train::family::{END, HouseModel};
use nalgebra::Isometry3;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::curate::dataset::{self, Dataset, DatasetError, Faults, Fit, LISTED_MAX, read_json};
use mindseye_base::file::write_atomically;

/// Version of the cache.
const FORMAT: u32 = 1;

/// What a dataset holds, and what of it cannot be used.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Recordings with at least one image.
    pub recordings: usize,
    /// Of them, decoded now; the others were in the cache.
    pub decoded: usize,
    /// Images that can be used.
    pub images: usize,
    /// Of them, without a pose.
    pub without_pose: usize,
    /// Images that cannot be decoded.
    pub unreadable_images: usize,
    /// What is wrong with manifests, poses and files.
    pub faults: Faults,
    /// Clips whose words the model does not know.
    pub unknown_words: usize,
    /// What can be trained on.
    pub found: Found,
    /// What is wrong, in words: the first of each kind.
    pub problems: Vec<String>,
}

impl Report {
    /// One line about what there is, and one about what is left out, if anything is.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let (f, faults) = (&self.found, &self.faults);
        let mut out = vec![format!(
            "{} clips and {} walks in {} recordings of {} images ({} recordings decoded now); held out: {} clips, {} \
             walks; {} images without pose, {} clips without box",
            f.clips,
            f.walks,
            self.recordings,
            self.images,
            self.decoded,
            f.clips_held_out,
            f.walks_held_out,
            self.without_pose,
            f.without_box
        )];
        let mut left: Vec<String> = [
            (faults.recordings, "recordings that cannot be used"),
            (faults.missing_images, "missing images"),
            (self.unreadable_images as u64, "unreadable images"),
            (faults.bad_poses, "bad poses"),
            (faults.bad_intrinsics, "bad intrinsics"),
            (faults.clips, "bad clips"),
            (self.unknown_words as u64, "clips whose words the model does not know"),
        ]
        .into_iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, what)| format!("{n} {what}"))
        .collect();
        left.extend(f.left_out.iter().map(|(why, n)| format!("{n} clips: {why}")));
        if !left.is_empty() {
            out.push(format!("left out: {}", left.join("; ")));
        }
        out
    }
}

/// `<recording>.json` of the cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cached {
    /// Hash of what it was made of.
    key: String,
    /// Hash of the pixels.
    sha256: String,
    /// Position of each image in the recording, and size of its picture.
    images: Vec<(usize, [usize; 2])>,
    /// Pictures that could not be decoded.
    unreadable: usize,
    /// What is wrong with them: the first few.
    problems: Vec<String>,
}

/// Opens a dataset, decodes what is not in the cache, and takes what the model can be trained on. `progress` gets a
/// line per recording that is decoded.
///
/// # Errors
/// A dataset that cannot be opened, a cache that cannot be written, nothing to train on, or `stop`; the next call
/// then goes on with the recording that was not finished.
pub fn prepare(
    dir: &Path,
    cache: &Path,
    model: &HouseModel,
    config: &DataConfig,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<(Clips, Report)> {
    let dataset = Dataset::open(dir)?;
    fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
    let size = (model.codec.width, model.codec.height);
    let mut identity = Sha256::new();
    identity.update(format!("{FORMAT} {} {} {:?}", size.0, size.1, model.text.words));
    let mut take = Taken {
        report: Report { faults: dataset.faults, problems: dataset.rejected.clone(), ..Report::default() },
        size,
        identity,
        recordings: Vec::new(),
        by_name: BTreeMap::new(),
        sizes: BTreeMap::new(),
    };
    let count = dataset.recordings().count();
    for (k, source) in dataset.recordings().enumerate() {
        let stamps = match dataset.stamps(source) {
            Ok(stamps) => stamps,
            Err(e) => {
                take.report.faults.recordings += 1;
                take.report.problems.push(e.to_string());
                continue;
            }
        };
        let files = CacheFiles::new(cache, &source.id);
        let key = mindseye_base::file::sha256(
            format!("{FORMAT} {} {}\n{}", size.0, size.1, stamps.join("\n")).as_bytes(),
        );
        let cached = match files.reusable(&key, size.0 * size.1 * 3) {
            Some(cached) => cached,
            None => {
                let done = decode(&dataset, source, &files.pixels, key, size, stop)?;
                let Some(done) = done else { bail!("stopped; run the same command again to go on") };
                dataset::write_json(&files.about, &done)?;
                take.report.decoded += 1;
                progress(&format!(
                    "decoded {} ({} of {count}): {} images, {} unreadable",
                    source.id,
                    k + 1,
                    done.images.len(),
                    done.unreadable
                ));
                done
            }
        };
        take.recording(source, cached, files.pixels)?;
    }
    take.report.recordings = take.recordings.len();
    let clips = take.clips(&dataset, model)?;
    let identity = mindseye_base::file::hex(&take.identity.finalize());
    let mut report = take.report;
    let (clips, found) = Clips::new(model, config, take.recordings, clips, identity).map_err(|e| {
        let mut lines = vec![e.to_string()];
        lines.extend(report.lines().into_iter().skip(1));
        lines.extend(report.problems.iter().take(3).cloned());
        anyhow::anyhow!("{}: {}", dir.display(), lines.join("; "))
    })?;
    report.found = found;
    Ok((clips, report))
}

/// What has been taken of a dataset so far.
struct Taken {
    report: Report,
    /// Width and height of the model's images.
    size: (usize, usize),
    /// Hash of everything that training depends on.
    identity: Sha256,
    recordings: Vec<Recording>,
    /// Position in `recordings` by name.
    by_name: BTreeMap<String, usize>,
    /// Size of the picture of an image, by recording and index.
    sizes: BTreeMap<(usize, usize), [usize; 2]>,
}

impl Taken {
    /// Takes a recording whose pixels are in the cache; one without any picture that can be read is left out.
    fn recording(
        &mut self,
        source: &dataset::Recording,
        cached: Cached,
        pixels: PathBuf,
    ) -> anyhow::Result<()> {
        self.report.unreadable_images += cached.unreadable;
        self.report.problems.extend(cached.problems);
        let mut images = Vec::with_capacity(cached.images.len());
        for (at, size) in cached.images {
            let Some(frame) = source.frames.get(at) else { continue };
            let fit = Fit::new((size[0], size[1]), self.size);
            let image = Image {
                index: frame.index,
                map_from_camera: frame.map_from_camera.as_ref().map(matrix),
                intrinsics: frame.intrinsics.map(|k| {
                    let [fx, fy, cx, cy] = fit.intrinsics(k);
                    [fx, fy, cx + 0.5, cy + 0.5]
                }),
            };
            self.sizes.insert((self.recordings.len(), frame.index), size);
            self.report.without_pose += usize::from(image.map_from_camera.is_none());
            images.push(image);
        }
        if images.is_empty() {
            return Ok(());
        }
        self.report.images += images.len();
        let recording = Recording {
            id: source.id.clone(),
            environment: source.environment.clone(),
            map: source.map.clone(),
            up: source.up,
            images,
            pixels: Pixels::File(pixels),
        };
        let about = (&recording.id, &recording.environment, &recording.map, recording.up, &recording.images);
        self.identity.update(serde_json::to_vec(&(cached.sha256, about))?);
        self.by_name.insert(recording.id.clone(), self.recordings.len());
        self.recordings.push(recording);
        Ok(())
    }

    /// The clips whose words the model knows and whose recordings were taken.
    fn clips(&mut self, dataset: &Dataset, model: &HouseModel) -> anyhow::Result<Vec<Clip>> {
        let mut clips = Vec::new();
        for clip in &dataset.clips {
            self.identity.update(serde_json::to_vec(clip)?);
            let text = if clip.object.trim().is_empty() { &clip.caption } else { &clip.object };
            let Some(ids) = word_ids(&model.text.words, text, model.dit.text_len) else {
                self.report.unknown_words += 1;
                continue;
            };
            // A recording without any picture that can be read is not there.
            let Some(recording) = self.by_name.get(&clip.recording).copied() else { continue };
            let last = clip.first + clip.frames - 1;
            let size = self.sizes.get(&(recording, last));
            let area = clip.area.zip(size).map(|(share, size)| fitted_area(share, *size, self.size));
            clips.push(Clip { id: clip.id.clone(), recording, first: clip.first, last, ids, area });
        }
        Ok(clips)
    }
}

/// A box given as shares of a picture's width and height, in continuous pixels of the fitted picture.
fn fitted_area(share: [f64; 4], from: [usize; 2], (width, height): (usize, usize)) -> [f32; 4] {
    let (w, h) = (from[0] as f64, from[1] as f64);
    let fit = Fit::new((from[0], from[1]), (width, height));
    let (x0, y0) = fit.point(share[0] * w, share[1] * h);
    let (x1, y1) = fit.point(share[2] * w, share[3] * h);
    let cut = |v: f64, n: usize| v.clamp(0.0, n as f64) as f32;
    [cut(x0, width), cut(y0, height), cut(x1, width), cut(y1, height)]
}

/// Where the cache keeps a recording.
struct CacheFiles {
    pixels: PathBuf,
    about: PathBuf,
}

impl CacheFiles {
    fn new(cache: &Path, id: &str) -> Self {
        Self { pixels: cache.join(format!("{id}.rgb")), about: cache.join(format!("{id}.json")) }
    }

    /// What the cache holds, if it is of these pictures and whole.
    fn reusable(&self, key: &str, image_bytes: usize) -> Option<Cached> {
        let cached: Cached = read_json(&self.about).ok()?;
        let length = fs::metadata(&self.pixels).ok()?.len();
        (cached.key == key && length == (cached.images.len() * image_bytes) as u64).then_some(cached)
    }
}

/// Ids of the known words of a text in the order of the vocabulary, and the end, zero-padded: what the runtime
/// makes of a goal. None when no word is known, or more than the model has rows for.
#[must_use]
pub fn word_ids(words: &[String], text: &str, length: usize) -> Option<Vec<usize>> {
    let mut ids = mindseye_engines::text::word_ids(words, text);
    if ids.is_empty() || ids.len() >= length {
        return None;
    }
    ids.push(END);
    ids.resize(length, 0);
    Some(ids)
}

/// Decodes a recording into the cache; none when `stop` came first, and then nothing is left behind.
fn decode(
    dataset: &Dataset,
    source: &dataset::Recording,
    pixels: &Path,
    key: String,
    (width, height): (usize, usize),
    stop: &AtomicBool,
) -> anyhow::Result<Option<Cached>> {
    let mut cached =
        Cached { key, sha256: String::new(), images: Vec::new(), unreadable: 0, problems: Vec::new() };
    let mut hash = Sha256::new();
    let written = write_atomically(pixels, |out| {
        dataset
            .pictures(source, &mut |at, picture| {
                if stop.load(Ordering::Relaxed) {
                    return Err(dataset::io(pixels)(std::io::ErrorKind::Interrupted.into()));
                }
                match picture {
                    Ok(picture) => {
                        let bytes = picture.fitted(width, height)?.data;
                        hash.update(&bytes);
                        out.write_all(&bytes).map_err(dataset::io(pixels))?;
                        cached.images.push((at, [picture.width, picture.height]));
                    }
                    Err(e) => {
                        cached.unreadable += 1;
                        if cached.unreadable as u64 <= LISTED_MAX {
                            cached.problems.push(e.to_string());
                        }
                    }
                }
                Ok(())
            })
            .map_err(|e| match e {
                DatasetError::Io { source, .. } => source,
                other => std::io::Error::other(other.to_string()),
            })
    });
    match written {
        Ok(()) => {
            cached.sha256 = format!("{:x}", hash.finalize());
            Ok(Some(cached))
        }
        Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Ok(None),
        Err(e) => Err(anyhow::Error::new(e).context(pixels.display().to_string())),
    }
}

fn matrix(pose: &Isometry3<f64>) -> Pose {
    let m = pose.to_homogeneous();
    std::array::from_fn(|i| std::array::from_fn(|j| m[(i, j)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_become_what_the_runtime_makes_of_goals() {
        let words: Vec<String> = ["red", "blue", "chair", "lamp"].map(String::from).to_vec();
        let check = |text: &str, wanted: Option<&[usize]>| {
            assert_eq!(word_ids(&words, text, 4).as_deref(), wanted, "{text:?}");
        };
        check("the red chair by the desk", Some(&[4, 6, END, 0]));
        check("Chairs, RED", Some(&[4, 6, END, 0]));
        check("a lamp.", Some(&[7, END, 0, 0]));
        check("the desk", None);
        check("", None);
        check("a red and blue chair", Some(&[4, 5, 6, END]));
        check("a red and blue chair with a lamp", None);
    }
}
