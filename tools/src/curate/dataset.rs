#![doc = include_str!("../../DATASET.md")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use mindseye::image::{Lens, Misfit, ModelCamera, RgbImage};
use mindseye_bridge::image::{ImageError, Limits, decode_compressed_rgb8};
use nalgebra::Isometry3;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::bags;
use super::layout::{self, SourceLayout};

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
    /// Layout that it was curated from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<SourceLayout>,
    /// Directory that picture files are relative to; itself relative to the dataset.
    #[serde(default)]
    pub root: PathBuf,
    /// Every how many images of a source one is kept.
    #[serde(default = "one")]
    pub interval: usize,
    /// Frames of every clip, if they are all as long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_frames: Option<usize>,
}

fn one() -> usize {
    1
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
    /// The object, in a few words; may be empty.
    #[serde(default)]
    pub object: String,
    /// Box of the object in the last frame, `[x0, y0, x1, y1]` as shares of width and height.
    #[serde(default)]
    pub area: Option<[f64; 4]>,
}

/// `recordings/<id>.json`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordingFile {
    id: String,
    #[serde(default)]
    environment: Option<String>,
    #[serde(default)]
    map: Option<String>,
    #[serde(default)]
    up: Option<[f64; 3]>,
    #[serde(default)]
    frames: Option<Vec<FrameFile>>,
    #[serde(default)]
    video: Option<PathBuf>,
    #[serde(default)]
    topic: Option<String>,
    #[serde(default)]
    poses: Option<PathBuf>,
    #[serde(default)]
    intrinsics: Option<Vec<Option<f64>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FrameFile {
    file: PathBuf,
    #[serde(default)]
    index: Option<usize>,
    #[serde(default)]
    map_from_camera: Option<Vec<Option<f64>>>,
    #[serde(default)]
    intrinsics: Option<Vec<Option<f64>>>,
}

/// One image of a recording.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Picture, or the bag that it is in, relative to the root.
    pub file: PathBuf,
    /// Number among the kept images; a gap stands for images that were left out.
    pub index: usize,
    /// Where the camera was (metres; camera x right, y down, z forward).
    pub map_from_camera: Option<Isometry3<f64>>,
    /// `[fx, fy, cx, cy]` in pixels of the picture as it is stored, integers being pixel centres.
    pub intrinsics: Option<[f64; 4]>,
}

/// One recording.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    /// Its name.
    pub id: String,
    /// Recordings of the same place share this.
    pub environment: String,
    /// Recordings whose poses are in the same map share this.
    pub map: String,
    /// Direction of up in the map, if it is known.
    pub up: Option<[f64; 3]>,
    /// Its images, ascending in `index`.
    pub frames: Vec<Frame>,
    /// The bag that they are in and the image topic, unless they are files.
    bag: Option<(PathBuf, Option<String>)>,
}

/// What opening a dataset found wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Faults {
    /// Recordings that cannot be used.
    pub recordings: u64,
    /// Clips that cannot be used.
    pub clips: u64,
    /// Images whose pose is NaN or no rotation; they count as images without pose.
    pub bad_poses: u64,
    /// Images whose intrinsics are no camera's; they count as images without intrinsics.
    pub bad_intrinsics: u64,
    /// Images that are not there.
    pub missing_images: u64,
}

/// Why a dataset, or a part of it, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// A picture whose size and pixels disagree, or that is to have no pixels.
    #[error(transparent)]
    Size(#[from] Misfit),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A bag cannot be read.
    #[error(transparent)]
    Bag(Box<mindseye_bridge::bag::OpenBagError>),
    /// A file is not text.
    #[error("{path}: {source}")]
    Text {
        /// The file.
        path: PathBuf,
        /// Where it is not.
        source: std::string::FromUtf8Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// A picture cannot be decoded.
    #[error("{path}: {source}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
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

pub(super) fn invalid(path: &Path, reason: impl Into<String>) -> DatasetError {
    DatasetError::Invalid { path: path.to_path_buf(), reason: reason.into() }
}

pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> DatasetError + '_ {
    move |source| DatasetError::Io { path: path.to_path_buf(), source }
}

/// Writes a value as JSON under a temporary name, which is then renamed.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), DatasetError> {
    mindseye_base::file::write_atomically(path, |out| {
        serde_json::to_writer(&mut *out, value)?;
        out.write_all(b"\n")
    })
    .map_err(io(path))
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, DatasetError> {
    let text = text(path)?;
    // Python writes NaN, which JSON does not know: such a number is missing, the rest of the file is not.
    let parsed = match serde_json::from_str(&text) {
        Err(_) if text.contains("NaN") || text.contains("Infinity") => {
            serde_json::from_str(&layout::without_nan(&text))
        }
        parsed => parsed,
    };
    parsed.map_err(|source| DatasetError::Json { path: path.to_path_buf(), source })
}

fn text(path: &Path) -> Result<String, DatasetError> {
    String::from_utf8(bounded(path, MANIFEST_MAX)?)
        .map_err(|source| DatasetError::Text { path: path.to_path_buf(), source })
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
            .map_err(|source| DatasetError::Image { path: path.to_path_buf(), source })?;
        if size.width == 0 || size.height == 0 {
            return Err(invalid(path, "an empty picture"));
        }
        Ok(Self { width: size.width as usize, height: size.height as usize, rgb })
    }

    /// Scales so that both sides are covered, cuts the middle out, and averages.
    ///
    /// # Errors
    /// A side is zero, or the pixels are fewer or more than the size says.
    pub fn fitted(&self, width: usize, height: usize) -> Result<RgbImage, DatasetError> {
        let mut out = RgbImage::filled(0, 0, [0; 3]);
        Lens::new(ModelCamera::any(width, height)).look(
            &self.rgb,
            self.width,
            self.height,
            None,
            &mut out,
        )?;
        Ok(out)
    }
}

/// A scaling with a cut, as [`Picture::fitted`] does it.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    scale: f64,
    /// Left edge of what is kept (pixels of the source).
    left: f64,
    /// Its upper edge.
    top: f64,
}

impl Fit {
    /// From one size `(width, height)` to another.
    #[must_use]
    pub fn new(from: (usize, usize), to: (usize, usize)) -> Self {
        let (w, h) = (to.0 as f64, to.1 as f64);
        let scale = (w / from.0 as f64).max(h / from.1 as f64);
        Self { scale, left: (from.0 as f64 - w / scale) * 0.5, top: (from.1 as f64 - h / scale) * 0.5 }
    }

    /// A point in continuous pixels of the source, in continuous pixels of the result.
    #[must_use]
    pub fn point(&self, x: f64, y: f64) -> (f64, f64) {
        ((x - self.left) * self.scale, (y - self.top) * self.scale)
    }

    /// Intrinsics whose integers are pixel centres.
    #[must_use]
    pub fn intrinsics(&self, k: [f64; 4]) -> [f64; 4] {
        let moved = |c: f64, edge: f64| (c + 0.5 - edge) * self.scale - 0.5;
        [k[0] * self.scale, k[1] * self.scale, moved(k[2], self.left), moved(k[3], self.top)]
    }
}

/// A dataset. Parts that cannot be used are left out, counted and listed.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// How it was made.
    pub info: Info,
    /// Clips whose manifests are good, by name.
    pub clips: Vec<Clip>,
    /// What is wrong, counted.
    pub faults: Faults,
    /// What is wrong, in words: the first [`LISTED_MAX`] of each kind.
    pub rejected: Vec<String>,
    recordings: BTreeMap<String, Recording>,
    root: PathBuf,
}

/// Faults of one kind that are listed in words.
pub const LISTED_MAX: u64 = 20;

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
        if info.clip_frames == Some(0) {
            return Err(invalid(&path, "clip_frames = 0"));
        }
        if info.interval == 0 {
            return Err(invalid(&path, "interval = 0"));
        }
        let root = dir.join(&info.root);
        let mut dataset = Self {
            info,
            clips: Vec::new(),
            faults: Faults::default(),
            rejected: Vec::new(),
            recordings: BTreeMap::new(),
            root,
        };
        for path in manifests(&dir.join("recordings"))? {
            match read_json::<RecordingFile>(&path).and_then(|file| dataset.recording(&path, file)) {
                Ok(recording) => {
                    dataset.recordings.insert(recording.id.clone(), recording);
                }
                Err(e) => {
                    dataset.faults.recordings += 1;
                    dataset.reject(dataset.faults.recordings, e.to_string());
                }
            }
        }
        let clips = dir.join("clips");
        for path in if clips.is_dir() { manifests(&clips)? } else { Vec::new() } {
            match read_json::<Clip>(&path).and_then(|clip| dataset.check_clip(&path, clip)) {
                Ok(clip) => dataset.clips.push(clip),
                Err(e) => {
                    dataset.faults.clips += 1;
                    dataset.reject(dataset.faults.clips, e.to_string());
                }
            }
        }
        Ok(dataset)
    }

    fn reject(&mut self, so_far: u64, what: String) {
        if so_far <= LISTED_MAX {
            self.rejected.push(what);
        }
    }

    /// Makes a recording of its manifest.
    fn recording(&mut self, path: &Path, file: RecordingFile) -> Result<Recording, DatasetError> {
        let bad = |reason: &str| invalid(path, reason);
        if file.id.is_empty() || file.id.starts_with('.') || file.id.contains(['/', '\\', '\0']) {
            return Err(bad("\"id\": wanted a name that can be a file name"));
        }
        if file.up.is_some_and(|u| !u.iter().all(|v| v.is_finite()) || u.iter().all(|v| *v == 0.0)) {
            return Err(bad("\"up\": wanted a direction"));
        }
        let mut up = file.up;
        let mut bag = None;
        let mut frames = match (file.frames, file.video) {
            (Some(_), Some(_)) | (None, None) => return Err(bad("wanted either \"frames\" or \"video\"")),
            (Some(listed), None) => {
                if file.poses.is_some() || file.topic.is_some() {
                    return Err(bad("\"poses\" and \"topic\" go with \"video\""));
                }
                self.listed(path, listed)?
            }
            (None, Some(video)) => {
                let at = self.root.join(&video);
                if at.is_dir() && !is_bag_directory(&at)? {
                    self.images(&at, &video)?
                } else {
                    let (images, damage) = bags::list(&at, file.topic.as_deref())?;
                    self.rejected.extend(damage.into_iter().take(LISTED_MAX as usize));
                    // Odometry is level (REP-105).
                    up = up.or(Some([0.0, 0.0, 1.0]));
                    bag = Some((at, file.topic));
                    let kept = images.into_iter().step_by(self.info.interval).enumerate();
                    kept.map(|(index, i)| Frame {
                        file: video.clone(),
                        index,
                        map_from_camera: i.pose,
                        intrinsics: i.intrinsics,
                    })
                    .collect()
                }
            }
        };
        if let Some(poses) = file.poses {
            self.kitti(&self.root.join(poses), &mut frames)?;
        }
        if let Some(given) = file.intrinsics {
            let intrinsics = numbers(&given).and_then(usable);
            if intrinsics.is_none() {
                return Err(bad("\"intrinsics\": wanted [fx, fy, cx, cy] in pixels"));
            }
            for frame in &mut frames {
                frame.intrinsics = frame.intrinsics.or(intrinsics);
            }
        }
        let environment = file.environment.unwrap_or_else(|| file.id.clone());
        let map = file.map.unwrap_or_else(|| file.id.clone());
        Ok(Recording { id: file.id, environment, map, up, frames, bag })
    }

    /// Frames that a manifest lists.
    fn listed(&mut self, path: &Path, listed: Vec<FrameFile>) -> Result<Vec<Frame>, DatasetError> {
        let mut frames = Vec::with_capacity(listed.len());
        let mut before = None;
        for (k, frame) in listed.into_iter().enumerate() {
            let index = frame.index.unwrap_or(k);
            if before.is_some_and(|b| index <= b) {
                return Err(invalid(path, "frames are not in ascending order"));
            }
            before = Some(index);
            if !self.root.join(&frame.file).is_file() {
                self.faults.missing_images += 1;
                let file = self.root.join(&frame.file);
                self.reject(self.faults.missing_images, format!("{}: missing", file.display()));
                continue;
            }
            let map_from_camera = frame.map_from_camera.and_then(|given| {
                let pose = numbers(&given).and_then(|m| layout::pose_3x4(&m));
                if pose.is_none() {
                    self.bad_pose(path, index);
                }
                pose
            });
            let intrinsics = frame.intrinsics.and_then(|given| {
                let k = numbers(&given).and_then(usable);
                if k.is_none() {
                    self.faults.bad_intrinsics += 1;
                    let what = format!("{}: frame {index}: intrinsics {given:?}", path.display());
                    self.reject(self.faults.bad_intrinsics, what);
                }
                k
            });
            frames.push(Frame { file: frame.file, index, map_from_camera, intrinsics });
        }
        Ok(frames)
    }

    fn bad_pose(&mut self, path: &Path, index: usize) {
        self.faults.bad_poses += 1;
        let what = format!("{}: frame {index}: its pose is no pose", path.display());
        self.reject(self.faults.bad_poses, what);
    }

    /// Every n-th picture of a directory, in the order of their names.
    fn images(&self, dir: &Path, name: &Path) -> Result<Vec<Frame>, DatasetError> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).map_err(io(dir))? {
            let file = entry.map_err(io(dir))?.file_name();
            let ending = Path::new(&file).extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
            if matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg")) {
                files.push(file);
            }
        }
        if files.is_empty() {
            return Err(invalid(dir, "no PNG or JPEG pictures; take a video apart first"));
        }
        files.sort();
        let kept = files.into_iter().step_by(self.info.interval).enumerate();
        Ok(kept
            .map(|(index, file)| Frame {
                file: name.join(file),
                index,
                map_from_camera: None,
                intrinsics: None,
            })
            .collect())
    }

    /// Poses of a file with one line per image of the source: twelve numbers, `map_from_camera` row by row (the
    /// format of KITTI's odometry).
    fn kitti(&mut self, path: &Path, frames: &mut [Frame]) -> Result<(), DatasetError> {
        let text = text(path)?;
        let lines: Vec<&str> = text.lines().collect();
        let images = frames.last().map_or(0, |f| f.index * self.info.interval + 1);
        if lines.len() < images {
            return Err(invalid(path, format!("{} lines for {images} or more images", lines.len())));
        }
        for frame in frames {
            let line = lines[frame.index * self.info.interval];
            let m: Vec<f64> = line.split_whitespace().map(|t| t.parse().unwrap_or(f64::NAN)).collect();
            frame.map_from_camera = (m.len() == 12).then(|| layout::pose_3x4(&m)).flatten();
            if frame.map_from_camera.is_none() {
                self.bad_pose(path, frame.index);
            }
        }
        Ok(())
    }

    fn check_clip(&self, path: &Path, clip: Clip) -> Result<Clip, DatasetError> {
        let bad = |reason: String| invalid(path, reason);
        if clip.caption.trim().is_empty() {
            return Err(bad("empty caption".to_owned()));
        }
        if let Some([x0, y0, x1, y1]) = clip.area
            && !(0.0 <= x0 && x0 < x1 && x1 <= 1.0 && 0.0 <= y0 && y0 < y1 && y1 <= 1.0)
        {
            let area = [x0, y0, x1, y1];
            return Err(bad(format!("area {area:?}: wanted shares with x0 < x1, y0 < y1")));
        }
        if let Some(frames) = self.info.clip_frames
            && clip.frames != frames
        {
            return Err(bad(format!("{} frames; the dataset has {frames}", clip.frames)));
        }
        if clip.frames == 0 || self.range(&clip).is_none() {
            return Err(bad(format!("recording {:?} has no such consecutive frames", clip.recording)));
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

    /// Recordings by name.
    pub fn recordings(&self) -> impl Iterator<Item = &Recording> {
        self.recordings.values()
    }

    /// What a recording's pictures are, without reading them: names, sizes, times of change.
    ///
    /// # Errors
    /// A file is gone.
    pub fn stamps(&self, recording: &Recording) -> Result<Vec<String>, DatasetError> {
        let stamp = |path: &Path| -> Result<String, DatasetError> {
            let about = fs::metadata(path).map_err(io(path))?;
            let changed = about.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            let changed = changed.unwrap_or_default().as_nanos();
            Ok(format!("{} {} {changed}", path.display(), about.len()))
        };
        match &recording.bag {
            Some((path, topic)) => {
                Ok(vec![stamp(path)?, topic.clone().unwrap_or_default(), self.info.interval.to_string()])
            }
            None => recording.frames.iter().map(|f| stamp(&self.root.join(&f.file))).collect(),
        }
    }

    /// [`Dataset::pictures`] of the frames at some positions only. Of a bag all are decoded nevertheless.
    ///
    /// # Errors
    /// As [`Dataset::pictures`].
    pub fn pictures_at(
        &self,
        recording: &Recording,
        wanted: &dyn Fn(usize) -> bool,
        take: &mut dyn FnMut(usize, Result<Picture, DatasetError>) -> Result<(), DatasetError>,
    ) -> Result<(), DatasetError> {
        if recording.bag.is_some() {
            return self.pictures(recording, &mut |at, p| if wanted(at) { take(at, p) } else { Ok(()) });
        }
        for (at, frame) in recording.frames.iter().enumerate().filter(|(at, _)| wanted(*at)) {
            take(at, Picture::read(&self.root.join(&frame.file)))?;
        }
        Ok(())
    }

    /// A file beside a frame's picture: its name with `from` replaced by `to`; `None` where the name has no `from`, there
    /// is no such file, or the recording is a bag.
    #[must_use]
    pub fn beside(&self, recording: &Recording, frame: &Frame, from: &str, to: &str) -> Option<PathBuf> {
        let file = self.root.join(&frame.file);
        let name = file.file_name()?.to_str()?;
        let at = name.rfind(from)?;
        let other = file.with_file_name(format!("{}{to}", &name[..at]));
        (recording.bag.is_none() && other.is_file()).then_some(other)
    }

    /// Decodes the pictures of a recording one after the other; `take` gets the position of each in
    /// [`Recording::frames`].
    ///
    /// # Errors
    /// What `take` returns; a bag that cannot be opened any more.
    pub fn pictures(
        &self,
        recording: &Recording,
        take: &mut dyn FnMut(usize, Result<Picture, DatasetError>) -> Result<(), DatasetError>,
    ) -> Result<(), DatasetError> {
        match &recording.bag {
            Some((path, topic)) => {
                let interval = self.info.interval;
                bags::pictures(path, topic.as_deref(), interval, &mut |k, p| take(k / interval, p))
            }
            None => {
                for (k, frame) in recording.frames.iter().enumerate() {
                    take(k, Picture::read(&self.root.join(&frame.file)))?;
                }
                Ok(())
            }
        }
    }
}

/// All numbers, unless one is missing.
fn numbers(given: &[Option<f64>]) -> Option<Vec<f64>> {
    given.iter().copied().collect()
}

fn usable(k: Vec<f64>) -> Option<[f64; 4]> {
    let k: [f64; 4] = k.try_into().ok()?;
    (k.iter().all(|v| v.is_finite()) && k[0] > 0.0 && k[1] > 0.0).then_some(k)
}

/// Whether a directory is a recording of rosbag2.
fn is_bag_directory(dir: &Path) -> Result<bool, DatasetError> {
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let name = entry.map_err(io(dir))?.file_name();
        let ending = Path::new(&name).extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        if name == "metadata.yaml" || matches!(ending.as_deref(), Some("mcap" | "db3" | "bag")) {
            return Ok(true);
        }
    }
    Ok(false)
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
        let check = |size: (usize, usize), wanted: &[u8]| {
            let got = picture.fitted(size.0, size.1).unwrap();
            let rgb: Vec<u8> = wanted.iter().flat_map(|v| [*v, *v, 0]).collect();
            assert_eq!(got, RgbImage { width: size.0, height: size.1, data: rgb });
        };
        check((4, 2), &[0, 100, 200, 250, 0, 100, 200, 250]);
        check((2, 1), &[50, 225]);
        // Square: the two middle columns.
        check((2, 2), &[100, 200, 100, 200]);
        check((1, 1), &[150]);
        assert!(matches!(picture.fitted(0, 1), Err(DatasetError::Size(_))));
        let k = Fit::new((4, 2), (2, 2)).intrinsics([4.0, 4.0, 1.5, 0.5]);
        assert_eq!(k, [4.0, 4.0, 0.5, 0.5], "the middle stays the middle");
        let k = Fit::new((4, 2), (8, 4)).intrinsics([4.0, 4.0, 1.5, 0.5]);
        assert_eq!(k, [8.0, 8.0, 3.5, 1.5]);
    }
}
