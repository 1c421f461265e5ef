//! The curated dataset on disk, and reading it for training.
//!
//! ```text
//! out/dataset.json            {"format": 1, "layout", "root", "interval", "clip_frames"}
//! out/recordings/<id>.json    {"id", "environment", "frames": [{"file", "index", "map_from_camera", "intrinsics"}]}
//! out/clips/<id>.json         {"id", "recording", "first", "frames", "caption", "object", "area"}
//! out/state.jsonl             what has been asked, for going on after a stop
//! ```
//!
//! Pictures stay where they are: `file` is relative to `root`. A clip is `frames` consecutive kept frames of its
//! recording, from the one whose `index` is `first`; in the last one the object is centred, and `area` is its box
//! as shares of width and height.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use mindseye_bridge::image::{Limits, decode_compressed_rgb8};
use nalgebra::Isometry3;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::layout::{Frame, Layout, Recording};

/// Version of the format.
pub const FORMAT: u32 = 1;
/// Longest manifest that is read (bytes).
const MANIFEST_MAX: u64 = 256 << 20;
/// Longest picture file that is read (bytes).
const PICTURE_MAX: u64 = 64 << 20;

/// `dataset.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Info {
    /// [`FORMAT`].
    pub format: u32,
    /// Where it comes from.
    pub layout: Layout,
    /// Directory that picture files are relative to.
    pub root: PathBuf,
    /// Every how many frames of the source one is kept.
    pub interval: usize,
    /// Frames of a clip.
    pub clip_frames: usize,
}

/// `clips/<id>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clip {
    /// Its name.
    pub id: String,
    /// The recording that it is part of.
    pub recording: String,
    /// `index` of its first frame.
    pub first: usize,
    /// Number of frames.
    pub frames: usize,
    /// The instruction.
    pub caption: String,
    /// The object, in a few words.
    pub object: String,
    /// Box of the object in the last frame, `[x0, y0, x1, y1]` as shares of width and height.
    pub area: [f64; 4],
}

/// Why a dataset, or a part of it, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

fn invalid(path: &Path, reason: impl Into<String>) -> DatasetError {
    DatasetError::Invalid { path: path.to_path_buf(), reason: reason.into() }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> DatasetError + '_ {
    move |source| DatasetError::Io { path: path.to_path_buf(), source }
}

/// Writes a value as JSON under a temporary name, which is then renamed.
pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DatasetError> {
    crate::world::write_atomically(path, |out| {
        serde_json::to_writer(&mut *out, value)?;
        out.write_all(b"\n")
    })
    .map_err(io(path))
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, DatasetError> {
    let bytes = bounded(path, MANIFEST_MAX)?;
    serde_json::from_slice(&bytes).map_err(|e| invalid(path, e.to_string()))
}

fn bounded(path: &Path, max: u64) -> Result<Vec<u8>, DatasetError> {
    let length = fs::metadata(path).map_err(io(path))?.len();
    if length > max {
        return Err(invalid(path, format!("{length} bytes; the limit is {max}")));
    }
    fs::read(path).map_err(io(path))
}

/// A picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width, 3]`, sRGB.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// Reads a JPEG or PNG file.
    ///
    /// # Errors
    /// The file is missing, too large or damaged.
    pub fn read(path: &Path) -> Result<Self, DatasetError> {
        let bytes = bounded(path, PICTURE_MAX)?;
        let mut rgb = Vec::new();
        let size = decode_compressed_rgb8(&bytes, &Limits::default(), &mut rgb)
            .map_err(|e| invalid(path, e.to_string()))?;
        if size.width == 0 || size.height == 0 {
            return Err(invalid(path, "an empty picture"));
        }
        Ok(Self { width: size.width as usize, height: size.height as usize, rgb })
    }

    /// Scales so that both sides are covered, cuts the middle out, and averages: `[3, height, width]` in [-1, 1].
    #[must_use]
    pub fn fitted(&self, width: usize, height: usize) -> Vec<f32> {
        let fit = Fit::new((self.width, self.height), (width, height));
        let columns = spans(fit.left, fit.scale, width, self.width);
        let rows = spans(fit.top, fit.scale, height, self.height);
        let mut out = vec![0.0f32; 3 * width * height];
        for (y, row) in rows.iter().enumerate() {
            for (x, column) in columns.iter().enumerate() {
                let mut sum = [0.0f32; 3];
                for (j, wy) in row {
                    for (i, wx) in column {
                        let at = (j * self.width + i) * 3;
                        for (c, s) in sum.iter_mut().enumerate() {
                            *s += wy * wx * f32::from(self.rgb[at + c]);
                        }
                    }
                }
                for (c, s) in sum.iter().enumerate() {
                    out[(c * height + y) * width + x] = s / 127.5 - 1.0;
                }
            }
        }
        out
    }
}

/// A scaling with a cut.
#[derive(Clone, Copy, Debug)]
struct Fit {
    scale: f64,
    /// Left edge of what is kept (pixels of the source).
    left: f64,
    /// Its upper edge.
    top: f64,
}

impl Fit {
    fn new(from: (usize, usize), to: (usize, usize)) -> Self {
        let (w, h) = (to.0 as f64, to.1 as f64);
        let scale = (w / from.0 as f64).max(h / from.1 as f64);
        Self { scale, left: (from.0 as f64 - w / scale) * 0.5, top: (from.1 as f64 - h / scale) * 0.5 }
    }

    /// Intrinsics whose integers are pixel centres.
    fn intrinsics(&self, k: [f64; 4]) -> [f64; 4] {
        let moved = |c: f64, edge: f64| (c + 0.5 - edge) * self.scale - 0.5;
        [k[0] * self.scale, k[1] * self.scale, moved(k[2], self.left), moved(k[3], self.top)]
    }
}

/// Source pixels and their weights, which sum to one, for every target pixel.
fn spans(edge: f64, scale: f64, count: usize, source: usize) -> Vec<Vec<(usize, f32)>> {
    (0..count)
        .map(|k| {
            let a = (edge + k as f64 / scale).clamp(0.0, source as f64 - 1e-6);
            let b = (edge + (k + 1) as f64 / scale).clamp(a + 1e-9, source as f64);
            let last = (b.ceil() as usize).clamp(a as usize + 1, source);
            (a as usize..last)
                .map(|i| (i, (((b.min((i + 1) as f64) - a.max(i as f64)) / (b - a)).max(0.0)) as f32))
                .collect()
        })
        .collect()
}

/// A decoded clip, ready for training.
#[derive(Clone, Debug)]
pub struct ClipSample {
    /// The clip's name.
    pub id: String,
    /// The instruction.
    pub caption: String,
    /// Columns of every frame.
    pub width: usize,
    /// Rows of every frame.
    pub height: usize,
    /// One `[3, height, width]` per frame, in [-1, 1].
    pub frames: Vec<Vec<f32>>,
    /// Camera poses relative to the first frame (m; x right, y down, z forward).
    pub first_from_camera: Vec<Isometry3<f64>>,
    /// `[fx, fy, cx, cy]` of every frame in its pixels, integers being pixel centres.
    pub intrinsics: Vec<[f64; 4]>,
    /// Box of the object in the last frame, `[x0, y0, x1, y1]` in continuous pixels, cut at the edges.
    pub area: [f64; 4],
}

/// A curated dataset. Parts that cannot be used are left out and listed.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// How it was made.
    pub info: Info,
    /// Clips that can be used, by name.
    pub clips: Vec<Clip>,
    /// Manifests that were left out, with the reason.
    pub rejected: Vec<String>,
    recordings: BTreeMap<String, Recording>,
}

impl Dataset {
    /// Opens a dataset directory and checks it: manifests, poses, captions, boxes, and that the pictures are there.
    ///
    /// # Errors
    /// `dataset.json` is missing or of another format.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, DatasetError> {
        let dir = dir.as_ref();
        let path = dir.join("dataset.json");
        let info: Info = read_json(&path)?;
        if info.format != FORMAT {
            return Err(invalid(&path, format!("format {}; this program reads {FORMAT}", info.format)));
        }
        if info.clip_frames == 0 {
            return Err(invalid(&path, "clip_frames = 0"));
        }
        let mut rejected = Vec::new();
        let mut recordings = BTreeMap::new();
        for path in manifests(&dir.join("recordings"))? {
            let read = read_json::<Recording>(&path).and_then(|r| check_recording(&path, r));
            match read {
                Ok(recording) => {
                    recordings.insert(recording.id.clone(), recording);
                }
                Err(e) => rejected.push(e.to_string()),
            }
        }
        let mut dataset = Self { info, clips: Vec::new(), rejected, recordings };
        for path in manifests(&dir.join("clips"))? {
            match read_json::<Clip>(&path).and_then(|clip| dataset.check_clip(&path, clip)) {
                Ok(clip) => dataset.clips.push(clip),
                Err(e) => dataset.rejected.push(e.to_string()),
            }
        }
        Ok(dataset)
    }

    fn check_clip(&self, path: &Path, clip: Clip) -> Result<Clip, DatasetError> {
        let bad = |reason: String| invalid(path, reason);
        if clip.caption.trim().is_empty() {
            return Err(bad("empty caption".to_owned()));
        }
        let [x0, y0, x1, y1] = clip.area;
        if !(0.0 <= x0 && x0 < x1 && x1 <= 1.0 && 0.0 <= y0 && y0 < y1 && y1 <= 1.0) {
            return Err(bad(format!("area {:?}: wanted shares with x0 < x1, y0 < y1", clip.area)));
        }
        if clip.frames != self.info.clip_frames {
            return Err(bad(format!("{} frames; the dataset has {}", clip.frames, self.info.clip_frames)));
        }
        let frames = self
            .range(&clip)
            .ok_or_else(|| bad(format!("recording {:?} has no such consecutive frames", clip.recording)))?;
        for frame in frames {
            let file = self.info.root.join(&frame.file);
            if !file.is_file() {
                return Err(bad(format!("{}: missing", file.display())));
            }
        }
        Ok(clip)
    }

    fn range(&self, clip: &Clip) -> Option<&[Frame]> {
        let frames = &self.recordings.get(&clip.recording)?.frames;
        let at = frames.binary_search_by_key(&clip.first, |f| f.index).ok()?;
        let run = frames.get(at..at.checked_add(clip.frames)?)?;
        (run.last()?.index == clip.first + clip.frames - 1).then_some(run)
    }

    /// Frames of a clip in order, the last one with the object in its middle.
    #[must_use]
    pub fn frames(&self, clip: &Clip) -> &[Frame] {
        self.range(clip).unwrap_or_default()
    }

    /// Recordings by name, for camera-pose instructions, which need no object.
    pub fn recordings(&self) -> impl Iterator<Item = &Recording> {
        self.recordings.values()
    }

    /// Groups of four consecutive kept frames that context can be taken from: of other recordings of the place
    /// where there are any, else of the clip's own recording outside the clip (Video4Spatial, section 6.2).
    #[must_use]
    pub fn context_groups(&self, clip: &Clip) -> Vec<[&Frame; 4]> {
        let Some(own) = self.recordings.get(&clip.recording) else { return Vec::new() };
        let others: Vec<&Recording> =
            self.recordings.values().filter(|r| r.environment == own.environment && r.id != own.id).collect();
        let from = if others.is_empty() { vec![own] } else { others };
        let clear = |f: &Frame, r: &Recording| {
            r.id != clip.recording || f.index < clip.first || f.index >= clip.first + clip.frames
        };
        from.into_iter()
            .flat_map(|r| {
                r.frames.chunks(4).filter_map(move |c| {
                    let [a, b, c, d] = c else { return None };
                    let fits = d.index == a.index + 3 && [a, b, c, d].into_iter().all(|f| clear(f, r));
                    fits.then_some([a, b, c, d])
                })
            })
            .collect()
    }

    /// Decodes one frame to `[3, height, width]` in [-1, 1]; the middle is kept where the shapes differ.
    ///
    /// # Errors
    /// The picture is missing or damaged.
    pub fn decode(&self, frame: &Frame, width: usize, height: usize) -> Result<Vec<f32>, DatasetError> {
        Ok(Picture::read(&self.info.root.join(&frame.file))?.fitted(width, height))
    }

    /// Decodes a clip.
    ///
    /// # Errors
    /// A picture is missing or damaged.
    pub fn sample(&self, clip: &Clip, width: usize, height: usize) -> Result<ClipSample, DatasetError> {
        let run = self.frames(clip);
        let (mut frames, mut intrinsics, mut poses) = (Vec::new(), Vec::new(), Vec::new());
        let mut area = [0.0; 4];
        for frame in run {
            let path = self.info.root.join(&frame.file);
            let picture = Picture::read(&path)?;
            let fit = Fit::new((picture.width, picture.height), (width, height));
            frames.push(picture.fitted(width, height));
            intrinsics.push(fit.intrinsics(frame.intrinsics));
            poses.push(frame.isometry().ok_or_else(|| invalid(&path, "its pose is no pose"))?);
            let x = |v: f64| ((v * picture.width as f64 - fit.left) * fit.scale).clamp(0.0, width as f64);
            let y = |v: f64| ((v * picture.height as f64 - fit.top) * fit.scale).clamp(0.0, height as f64);
            area = [x(clip.area[0]), y(clip.area[1]), x(clip.area[2]), y(clip.area[3])];
        }
        let first_from_map = poses.first().map(Isometry3::inverse).unwrap_or_else(Isometry3::identity);
        Ok(ClipSample {
            id: clip.id.clone(),
            caption: clip.caption.clone(),
            width,
            height,
            frames,
            first_from_camera: poses.iter().map(|p| first_from_map * p).collect(),
            intrinsics,
            area,
        })
    }

    /// All clips, decoded one after the other.
    pub fn samples(
        &self,
        width: usize,
        height: usize,
    ) -> impl Iterator<Item = Result<ClipSample, DatasetError>> + '_ {
        self.clips.iter().map(move |clip| self.sample(clip, width, height))
    }
}

fn check_recording(path: &Path, recording: Recording) -> Result<Recording, DatasetError> {
    if !recording.frames.windows(2).all(|w| w[0].index < w[1].index) {
        return Err(invalid(path, "frames are not in ascending order"));
    }
    for f in &recording.frames {
        if f.isometry().is_none() {
            return Err(invalid(path, format!("frame {}: its pose is no pose", f.index)));
        }
        if !f.intrinsics.iter().all(|v| v.is_finite()) || f.intrinsics[0] <= 0.0 || f.intrinsics[1] <= 0.0 {
            return Err(invalid(path, format!("frame {}: intrinsics {:?}", f.index, f.intrinsics)));
        }
    }
    Ok(recording)
}

fn manifests(dir: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let path = entry.map_err(io(dir))?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if !hidden && path.extension().is_some_and(|e| e == "json") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fitted_pictures() {
        // Columns 0, 100, 200, 250 in every row.
        let rgb: Vec<u8> =
            (0..2).flat_map(|_| [0u8, 100, 200, 250].into_iter().flat_map(|v| [v, v, 0])).collect();
        let picture = Picture { width: 4, height: 2, rgb };
        let check = |size: (usize, usize), wanted: &[f32]| {
            let got = picture.fitted(size.0, size.1);
            assert_eq!(got.len(), 3 * size.0 * size.1);
            for (a, b) in got.iter().zip(wanted) {
                assert!(((a + 1.0) * 127.5 - b).abs() < 1e-2, "{size:?}: {got:?}");
            }
        };
        check((4, 2), &[0.0, 100.0, 200.0, 250.0, 0.0, 100.0, 200.0, 250.0]);
        check((2, 1), &[50.0, 225.0]);
        // Square: the two middle columns.
        check((2, 2), &[100.0, 200.0, 100.0, 200.0]);
        check((1, 1), &[150.0]);
        let k = Fit::new((4, 2), (2, 2)).intrinsics([4.0, 4.0, 1.5, 0.5]);
        assert_eq!(k, [4.0, 4.0, 0.5, 0.5], "the middle stays the middle");
        let k = Fit::new((4, 2), (8, 4)).intrinsics([4.0, 4.0, 1.5, 0.5]);
        assert_eq!(k, [8.0, 8.0, 3.5, 1.5]);
    }
}
