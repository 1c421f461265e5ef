//! Recordings of indoor scanning datasets: which frames there are, where the camera was, and what is wrong.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use nalgebra::{Isometry3, Matrix3, Rotation3, Translation3, UnitQuaternion, Vector3};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Counts, CurateError};

/// Directory layouts that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SourceLayout {
    /// ScanNet++: `data/<scene>/iphone/{rgb/frame_000000.jpg, pose_intrinsic_imu.json}`, else
    /// `data/<scene>/dslr/{images, nerfstudio/transforms.json}`.
    #[value(name = "scannetpp")]
    Scannetpp,
    /// ARKitScenes: `<video>/lowres_wide/<video>_<time>.png`, `lowres_wide_intrinsics/*.pincam`,
    /// `lowres_wide.traj`, also inside `<video>_frames`.
    #[value(name = "arkitscenes")]
    Arkitscenes,
    /// 7-Scenes: `<scene>/seq-01/frame-000000.{color.png, pose.txt}`, or one such sequence; JPEG pictures too.
    #[value(name = "7scenes")]
    #[serde(rename = "7scenes")]
    SevenScenes,
    /// TUM RGB-D: `<sequence>/{rgb.txt, groundtruth.txt, rgb/<time>.png}`.
    #[value(name = "tum")]
    Tum,
}

/// One recording that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SceneRef {
    /// Its name in the dataset.
    pub id: String,
    /// Recordings of the same place share this.
    pub environment: String,
    /// Its directory.
    pub dir: PathBuf,
}

/// One frame that was kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frame {
    /// Picture, relative to the dataset's root.
    pub file: PathBuf,
    /// Number among the kept frames; a gap stands for frames that were left out.
    pub index: usize,
    /// First three rows of `map_from_camera`, row-major (metres; camera x right, y down, z forward).
    pub map_from_camera: [f64; 12],
    /// `[fx, fy, cx, cy]` in pixels of the picture as it is stored.
    pub intrinsics: [f64; 4],
}

/// One recording: every n-th frame that has a picture, a pose and intrinsics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// Its name.
    pub id: String,
    /// Recordings of the same place share this.
    pub environment: String,
    /// Kept frames, ascending in `index`.
    pub frames: Vec<Frame>,
}

/// A rigid motion from a rotation matrix that may be rounded by up to 2 %.
fn rigid(r: Matrix3<f64>, t: Vector3<f64>) -> Option<Isometry3<f64>> {
    if !r.iter().chain(t.iter()).all(|v| v.is_finite()) {
        return None;
    }
    let off = (r.transpose() * r - Matrix3::identity()).abs().max();
    if off > 0.04 || r.determinant() < 0.0 {
        return None;
    }
    let rotation = Rotation3::from_matrix_eps(&r, 1e-12, 100, Rotation3::identity());
    let rotation = UnitQuaternion::from_rotation_matrix(&rotation);
    Some(Isometry3::from_parts(Translation3::from(t), rotation))
}

fn rows(pose: &Isometry3<f64>) -> [f64; 12] {
    let r = pose.rotation.to_rotation_matrix();
    let t = pose.translation.vector;
    let m = r.matrix();
    [
        m[(0, 0)],
        m[(0, 1)],
        m[(0, 2)],
        t.x,
        m[(1, 0)],
        m[(1, 1)],
        m[(1, 2)],
        t.y,
        m[(2, 0)],
        m[(2, 1)],
        m[(2, 2)],
        t.z,
    ]
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> CurateError + '_ {
    move |source| CurateError::Io { path: path.to_path_buf(), source }
}

fn directories(dir: &Path) -> Result<Vec<PathBuf>, CurateError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let path = entry.map_err(io(dir))?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Recordings below a dataset's root, by name.
///
/// # Errors
/// The root cannot be read, or holds no recording of this layout.
pub fn scenes(layout: SourceLayout, root: &Path) -> Result<Vec<SceneRef>, CurateError> {
    let mut found = Vec::new();
    match layout {
        SourceLayout::Scannetpp => {
            for base in [root.to_path_buf(), root.join("data")] {
                if !base.is_dir() && base != root {
                    continue;
                }
                for dir in directories(&base)? {
                    if dir.join("iphone").is_dir() || dir.join("dslr").is_dir() {
                        let id = name_of(&dir);
                        found.push(SceneRef { environment: id.clone(), id, dir });
                    }
                }
            }
        }
        SourceLayout::Arkitscenes => {
            let mut bases = vec![root.to_path_buf()];
            for inner in ["raw", "3dod", "Training", "Validation"] {
                for k in 0..bases.len() {
                    let base = bases[k].join(inner);
                    if base.is_dir() {
                        bases.push(base);
                    }
                }
            }
            let visits = visits(&bases);
            for base in &bases {
                for dir in directories(base)? {
                    if arkit_dir(&dir).is_some() {
                        let id = name_of(&dir);
                        let environment =
                            visits.get(&id).map_or_else(|| id.clone(), |v| format!("visit-{v}"));
                        found.push(SceneRef { id, environment, dir });
                    }
                }
            }
        }
        SourceLayout::SevenScenes => sequences(root, &is_seven_scenes, &mut found)?,
        SourceLayout::Tum => sequences(root, &is_tum, &mut found)?,
    }
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found.dedup_by(|a, b| a.id == b.id);
    if found.is_empty() {
        return Err(CurateError::NoScenes { root: root.to_path_buf(), layout });
    }
    Ok(found)
}

/// Sequences at the root, below it, or two levels below it; those of one directory show one place.
fn sequences(
    root: &Path,
    is_sequence: &dyn Fn(&Path) -> bool,
    found: &mut Vec<SceneRef>,
) -> Result<(), CurateError> {
    if is_sequence(root) {
        // `.` has no name of its own.
        let named = fs::canonicalize(root).map_err(io(root))?;
        let id = name_of(&named);
        found.push(SceneRef { environment: id.clone(), id, dir: root.to_path_buf() });
    }
    for dir in directories(root)? {
        let outer = name_of(&dir);
        if is_sequence(&dir) {
            found.push(SceneRef { id: outer.clone(), environment: outer.clone(), dir: dir.clone() });
        }
        for inner in directories(&dir)?.into_iter().filter(|d| is_sequence(d)) {
            let id = format!("{outer}-{}", name_of(&inner));
            found.push(SceneRef { id, environment: outer.clone(), dir: inner });
        }
    }
    Ok(())
}

fn is_seven_scenes(dir: &Path) -> bool {
    let pose = |e: fs::DirEntry| {
        let name = e.file_name();
        let name = name.to_string_lossy();
        name.starts_with("frame-") && name.ends_with(".pose.txt")
    };
    fs::read_dir(dir).is_ok_and(|entries| entries.flatten().any(pose))
}

fn is_tum(dir: &Path) -> bool {
    dir.join("rgb.txt").is_file() && dir.join("groundtruth.txt").is_file()
}

/// `metadata.csv` of ARKitScenes: the visit of each video.
fn visits(bases: &[PathBuf]) -> HashMap<String, String> {
    let mut out = HashMap::new();
    for base in bases {
        let Ok(text) = fs::read_to_string(base.join("metadata.csv")) else { continue };
        let mut lines = text.lines();
        let head: Vec<&str> = lines.next().unwrap_or_default().split(',').map(str::trim).collect();
        let column = |name: &str| head.iter().position(|h| *h == name);
        let (Some(video), Some(visit)) = (column("video_id"), column("visit_id")) else { continue };
        for line in lines {
            let cells: Vec<&str> = line.split(',').map(str::trim).collect();
            if let (Some(video), Some(visit)) = (cells.get(video), cells.get(visit))
                && !visit.is_empty()
                && *visit != "NA"
            {
                out.insert((*video).to_owned(), visit.trim_end_matches(".0").to_owned());
            }
        }
    }
    out
}

/// The directory that holds `lowres_wide` and its poses.
fn arkit_dir(dir: &Path) -> Option<PathBuf> {
    let inner = dir.join(format!("{}_frames", name_of(dir)));
    [dir.to_path_buf(), inner]
        .into_iter()
        .find(|d| d.join("lowres_wide").is_dir() || d.join("lowres_wide.traj").is_file())
}

/// Reads the frames, poses and intrinsics of one recording and keeps every `interval`-th frame. What is missing is
/// counted.
///
/// # Errors
/// The recording as a whole cannot be used: no pictures (a video file has to be taken apart first), no poses, a
/// file that is not of its format.
pub fn read(
    layout: SourceLayout,
    scene: &SceneRef,
    root: &Path,
    interval: usize,
    counts: &mut Counts,
) -> Result<Recording, CurateError> {
    let interval = interval.max(1);
    let frames = match layout {
        SourceLayout::Arkitscenes => arkit(scene, root, interval, counts)?,
        SourceLayout::SevenScenes => seven_scenes(scene, root, interval, counts)?,
        SourceLayout::Tum => tum(scene, root, interval, counts)?,
        SourceLayout::Scannetpp if scene.dir.join("iphone/pose_intrinsic_imu.json").is_file() => {
            scannetpp_iphone(scene, root, interval, counts)?
        }
        SourceLayout::Scannetpp => scannetpp_dslr(scene, root, interval, counts)?,
    };
    Ok(Recording { id: scene.id.clone(), environment: scene.environment.clone(), frames })
}

fn bad(path: &Path, reason: impl Into<String>) -> CurateError {
    CurateError::Scene { path: path.to_path_buf(), reason: reason.into() }
}

/// Longest list of poses that is read (bytes).
const POSES_MAX: u64 = 512 << 20;

fn text(path: &Path) -> Result<String, CurateError> {
    let length = fs::metadata(path).map_err(io(path))?.len();
    if length > POSES_MAX {
        return Err(bad(path, format!("{length} bytes; the limit is {POSES_MAX}")));
    }
    fs::read_to_string(path).map_err(io(path))
}

/// JSON without the numbers that Python writes and JSON does not know.
pub(super) fn without_nan(text: &str) -> String {
    text.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null")
}

fn json(path: &Path) -> Result<Value, CurateError> {
    let text = text(path)?;
    // Python writes NaN, which JSON does not know: such a pose is counted instead of losing the whole file.
    let parsed = match serde_json::from_str(&text) {
        Err(_) if text.contains("NaN") || text.contains("Infinity") => {
            serde_json::from_str(&without_nan(&text))
        }
        parsed => parsed,
    };
    parsed.map_err(|source| CurateError::Json { path: path.to_path_buf(), source })
}

/// Numbers of a nested array, row by row; none when one is missing.
fn numbers(value: Option<&Value>, wanted: usize) -> Option<Vec<f64>> {
    fn flatten(value: &Value, out: &mut Vec<f64>) -> bool {
        match value {
            Value::Array(items) => items.len() <= 16 && items.iter().all(|v| flatten(v, out)),
            _ => value.as_f64().map(|v| out.push(v)).is_some(),
        }
    }
    let mut out = Vec::new();
    (flatten(value?, &mut out) && out.len() == wanted).then_some(out)
}

fn pose_4x4(m: &[f64]) -> Option<Isometry3<f64>> {
    pose_3x4(&m[..12])
}

/// A pose from twelve numbers, row by row; none when they are no rigid motion.
pub(super) fn pose_3x4(m: &[f64]) -> Option<Isometry3<f64>> {
    if m.len() != 12 {
        return None;
    }
    rigid(
        Matrix3::new(m[0], m[1], m[2], m[4], m[5], m[6], m[8], m[9], m[10]),
        Vector3::new(m[3], m[7], m[11]),
    )
}

fn relative(file: &Path, root: &Path) -> PathBuf {
    file.strip_prefix(root).unwrap_or(file).to_path_buf()
}

fn not_extracted(scene: &SceneRef, video: &Path, frames: &str) -> CurateError {
    bad(
        &scene.dir,
        format!(
            "no pictures in {frames}; video files are not read: take {} apart first, for example with \
             ffmpeg -i {} -start_number 0 -q:v 2 {frames}/frame_%06d.jpg",
            name_of(video),
            name_of(video)
        ),
    )
}

fn scannetpp_iphone(
    scene: &SceneRef,
    root: &Path,
    interval: usize,
    counts: &mut Counts,
) -> Result<Vec<Frame>, CurateError> {
    let dir = scene.dir.join("iphone");
    let rgb = dir.join("rgb");
    let pictures = listing(&rgb, &["jpg", "jpeg", "png"])?;
    if pictures.is_empty() {
        let video = ["rgb.mkv", "rgb.mp4"].map(|n| dir.join(n)).into_iter().find(|p| p.is_file());
        return Err(not_extracted(scene, &video.unwrap_or_else(|| dir.join("rgb.mkv")), "rgb"));
    }
    let by_stem: HashMap<String, PathBuf> = pictures.into_iter().collect();
    let path = dir.join("pose_intrinsic_imu.json");
    let Value::Object(entries) = json(&path)? else { return Err(bad(&path, "wanted an object of frames")) };
    let mut entries: Vec<_> = entries.into_iter().collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let mut frames = Vec::new();
    for (index, (stem, entry)) in entries.iter().step_by(interval).enumerate() {
        counts.frames += 1;
        let Some(file) = by_stem.get(stem) else {
            counts.missing_image += 1;
            continue;
        };
        let Some(value) = entry.get("aligned_pose").or_else(|| entry.get("pose")) else {
            counts.missing_pose += 1;
            continue;
        };
        let Some(pose) = numbers(Some(value), 16).and_then(|m| pose_4x4(&m)) else {
            counts.bad_pose += 1;
            continue;
        };
        let Some(k) = numbers(entry.get("intrinsic"), 9).filter(|k| usable(k[0], k[4])) else {
            counts.missing_intrinsics += 1;
            continue;
        };
        frames.push(Frame {
            file: relative(file, root),
            index,
            map_from_camera: rows(&pose),
            intrinsics: [k[0], k[4], k[2], k[5]],
        });
    }
    Ok(frames)
}

fn usable(fx: f64, fy: f64) -> bool {
    fx.is_finite() && fy.is_finite() && fx > 0.0 && fy > 0.0
}

/// Nerfstudio's `transforms.json`; its cameras look along -z with y up.
fn scannetpp_dslr(
    scene: &SceneRef,
    root: &Path,
    interval: usize,
    counts: &mut Counts,
) -> Result<Vec<Frame>, CurateError> {
    let dslr = scene.dir.join("dslr");
    let candidates = [
        ("transforms_undistorted.json", "resized_undistorted_images"),
        ("transforms_undistorted.json", "undistorted_images"),
        ("transforms.json", "resized_images"),
        ("transforms.json", "images"),
    ];
    let found = candidates
        .map(|(json, images)| (dslr.join("nerfstudio").join(json), dslr.join(images)))
        .into_iter()
        .find(|(json, images)| json.is_file() && images.is_dir());
    let Some((path, images)) = found else {
        return Err(bad(
            &scene.dir,
            "neither iphone/pose_intrinsic_imu.json nor dslr/nerfstudio/transforms.json with its pictures",
        ));
    };
    let document = json(&path)?;
    let number = |entry: &Value, key: &str| {
        entry.get(key).or_else(|| document.get(key)).and_then(Value::as_f64).filter(|v| v.is_finite())
    };
    let entries = document.get("frames").and_then(Value::as_array).ok_or_else(|| bad(&path, "no frames"))?;
    let mut sorted: Vec<&Value> = entries.iter().collect();
    sorted.sort_by_key(|e| e.get("file_path").and_then(Value::as_str).unwrap_or_default().to_owned());
    let mut frames = Vec::new();
    for (index, entry) in sorted.into_iter().step_by(interval).enumerate() {
        counts.frames += 1;
        let name = entry.get("file_path").and_then(Value::as_str).map(Path::new).and_then(Path::file_name);
        let file = name.map(|n| images.join(n));
        let Some(file) = file.filter(|f| f.is_file()) else {
            counts.missing_image += 1;
            continue;
        };
        let flipped = numbers(entry.get("transform_matrix"), 16).and_then(|mut m| {
            for row in 0..3 {
                m[row * 4 + 1] = -m[row * 4 + 1];
                m[row * 4 + 2] = -m[row * 4 + 2];
            }
            pose_4x4(&m)
        });
        let Some(pose) = flipped else {
            counts.bad_pose += 1;
            continue;
        };
        let k = ["fl_x", "fl_y", "cx", "cy"].map(|key| number(entry, key));
        let [Some(fx), Some(fy), Some(cx), Some(cy)] = k else {
            counts.missing_intrinsics += 1;
            continue;
        };
        if !usable(fx, fy) {
            counts.missing_intrinsics += 1;
            continue;
        }
        frames.push(Frame {
            file: relative(&file, root),
            index,
            map_from_camera: rows(&pose),
            intrinsics: [fx, fy, cx, cy],
        });
    }
    Ok(frames)
}

/// Files with these endings, by stem, sorted; none when the directory is missing.
fn listing(dir: &Path, endings: &[&str]) -> Result<Vec<(String, PathBuf)>, CurateError> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let path = entry.map_err(io(dir))?.path();
        let fits = path
            .extension()
            .is_some_and(|e| endings.iter().any(|w| e.to_string_lossy().eq_ignore_ascii_case(w)));
        if fits && let Some(stem) = path.file_stem() {
            found.push((stem.to_string_lossy().into_owned(), path));
        }
    }
    found.sort();
    Ok(found)
}

/// The time in `<video>_<seconds>`.
fn stamp(stem: &str) -> Option<f64> {
    stem.rsplit_once('_')?.1.parse().ok().filter(|v: &f64| v.is_finite())
}

/// Poses are further apart than pictures; between two poses at most this far apart (s) they are interpolated.
const POSE_GAP_SECS: f64 = 0.25;
/// A picture may be this much before the first or after the last pose (s).
const POSE_SLACK_SECS: f64 = 0.02;
/// A picture's intrinsics may carry a stamp this much off (s).
const INTRINSICS_SLACK_SECS: f64 = 0.02;

fn arkit(
    scene: &SceneRef,
    root: &Path,
    interval: usize,
    counts: &mut Counts,
) -> Result<Vec<Frame>, CurateError> {
    let dir = arkit_dir(&scene.dir).ok_or_else(|| bad(&scene.dir, "no lowres_wide"))?;
    let pictures = listing(&dir.join("lowres_wide"), &["png", "jpg", "jpeg"])?;
    if pictures.is_empty() {
        let video = dir.join(format!("{}.mov", scene.id));
        return Err(not_extracted(scene, &video, "lowres_wide"));
    }
    let poses = trajectory(&dir.join("lowres_wide.traj"), counts)?;
    let mut cameras: Vec<(f64, PathBuf)> = listing(&dir.join("lowres_wide_intrinsics"), &["pincam"])?
        .into_iter()
        .filter_map(|(stem, path)| Some((stamp(&stem)?, path)))
        .collect();
    cameras.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut stamped: Vec<(f64, PathBuf)> =
        pictures.into_iter().filter_map(|(stem, path)| Some((stamp(&stem)?, path))).collect();
    stamped.sort_by(|a, b| a.0.total_cmp(&b.0));
    if stamped.is_empty() {
        return Err(bad(&dir, "names in lowres_wide carry no time: wanted <video>_<seconds>.png"));
    }
    let mut gaps: Vec<f64> = stamped.windows(2).map(|w| w[1].0 - w[0].0).collect();
    gaps.sort_by(f64::total_cmp);
    let usual = gaps.get(gaps.len() / 2).copied().unwrap_or(0.0);

    let mut frames = Vec::new();
    let mut index = 0;
    let mut last: Option<f64> = None;
    for (at, file) in stamped.iter().step_by(interval) {
        // A hole in the recording: the next frame does not follow the one before.
        if let Some(last) = last {
            index += 1;
            if usual > 0.0 && at - last > usual * (interval as f64 + 2.5) {
                index += 1;
                counts.missing_image += 1;
            }
        }
        last = Some(*at);
        counts.frames += 1;
        let Some(pose) = pose_at(&poses, *at) else {
            counts.missing_pose += 1;
            continue;
        };
        let k = cameras.partition_point(|c| c.0 < *at);
        let nearest = [k.checked_sub(1), Some(k)]
            .into_iter()
            .flatten()
            .filter_map(|i| cameras.get(i))
            .min_by(|a, b| (a.0 - at).abs().total_cmp(&(b.0 - at).abs()))
            .filter(|c| (c.0 - at).abs() <= INTRINSICS_SLACK_SECS);
        let Some(intrinsics) = nearest.and_then(|c| pincam(&c.1)) else {
            counts.missing_intrinsics += 1;
            continue;
        };
        frames.push(Frame { file: relative(file, root), index, map_from_camera: rows(&pose), intrinsics });
    }
    Ok(frames)
}

/// `width height fx fy cx cy`.
fn pincam(path: &Path) -> Option<[f64; 4]> {
    let text = fs::read_to_string(path).ok()?;
    let v: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let [_, _, fx, fy, cx, cy] = v[..] else { return None };
    (usable(fx, fy) && cx.is_finite() && cy.is_finite()).then_some([fx, fy, cx, cy])
}

/// Lines `time rx ry rz tx ty tz`: rotation vector (rad) and translation (m) of `camera_from_map`.
fn trajectory(path: &Path, counts: &mut Counts) -> Result<BTreeMap<i64, Isometry3<f64>>, CurateError> {
    let text = text(path)?;
    let mut poses = BTreeMap::new();
    for (k, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let v: Vec<f64> = line.split_whitespace().map(|t| t.parse().unwrap_or(f64::NAN)).collect();
        let [at, rx, ry, rz, tx, ty, tz] = v[..] else {
            return Err(bad(
                path,
                format!("line {}: {} numbers; wanted time, rotation, translation", k + 1, v.len()),
            ));
        };
        if !v.iter().all(|n| n.is_finite()) || at.abs() > 1e9 {
            counts.bad_pose += 1;
            continue;
        }
        let camera_from_map = Isometry3::from_parts(
            Translation3::new(tx, ty, tz),
            UnitQuaternion::new(Vector3::new(rx, ry, rz)),
        );
        poses.insert((at * 1e6).round() as i64, camera_from_map.inverse());
    }
    if poses.is_empty() {
        return Err(bad(path, "no usable pose"));
    }
    Ok(poses)
}

pub(super) fn pose_at(poses: &BTreeMap<i64, Isometry3<f64>>, at: f64) -> Option<Isometry3<f64>> {
    let micros = (at * 1e6).round() as i64;
    let before = poses.range(..=micros).next_back();
    let after = poses.range(micros..).next();
    let slack = (POSE_SLACK_SECS * 1e6) as i64;
    match (before, after) {
        (Some((a, pose)), Some((b, _))) if a == b => Some(*pose),
        (Some((a, from)), Some((b, to))) if b - a <= (POSE_GAP_SECS * 1e6) as i64 => {
            let k = (micros - a) as f64 / (b - a) as f64;
            let rotation = from.rotation.try_slerp(&to.rotation, k, 1e-9)?;
            let t = from.translation.vector.lerp(&to.translation.vector, k);
            Some(Isometry3::from_parts(t.into(), rotation))
        }
        (Some((a, pose)), _) if micros - a <= slack => Some(*pose),
        (_, Some((b, pose))) if b - micros <= slack => Some(*pose),
        _ => None,
    }
}

/// Colour camera of 7-Scenes; the 585 pixels that the dataset names are the depth camera's.
const SEVEN_SCENES_INTRINSICS: [f64; 4] = [525.0, 525.0, 319.5, 239.5];

/// `frame-000000.color.png` or `.jpg` with `frame-000000.pose.txt`: `map_from_camera`, four rows of four.
fn seven_scenes(
    scene: &SceneRef,
    root: &Path,
    interval: usize,
    counts: &mut Counts,
) -> Result<Vec<Frame>, CurateError> {
    let pictures: Vec<(String, PathBuf)> = listing(&scene.dir, &["png", "jpg", "jpeg"])?
        .into_iter()
        .filter_map(|(stem, path)| Some((stem.strip_suffix(".color")?.to_owned(), path)))
        .collect();
    if pictures.is_empty() {
        return Err(bad(&scene.dir, "no pictures frame-*.color.png; unpack the sequence first"));
    }
    let mut frames = Vec::new();
    for (index, (stem, file)) in pictures.iter().step_by(interval).enumerate() {
        counts.frames += 1;
        let path = scene.dir.join(format!("{stem}.pose.txt"));
        if !path.is_file() {
            counts.missing_pose += 1;
            continue;
        }
        let numbers: Vec<f64> =
            text(&path)?.split_whitespace().map(|t| t.parse().unwrap_or(f64::NAN)).collect();
        let Some(pose) = (numbers.len() == 16).then(|| pose_4x4(&numbers)).flatten() else {
            counts.bad_pose += 1;
            continue;
        };
        let intrinsics = SEVEN_SCENES_INTRINSICS;
        frames.push(Frame { file: relative(file, root), index, map_from_camera: rows(&pose), intrinsics });
    }
    Ok(frames)
}

/// Cameras of TUM RGB-D as the dataset's authors calibrated them, by the number in the sequence's name; any other is
/// taken for a camera with the driver's default calibration.
fn tum_intrinsics(sequence: &str) -> [f64; 4] {
    let is = |n: u8| sequence.contains(&format!("freiburg{n}")) || sequence.contains(&format!("fr{n}"));
    match () {
        () if is(1) => [517.3, 516.5, 318.6, 255.3],
        () if is(2) => [520.9, 521.0, 325.1, 249.7],
        () if is(3) => [535.4, 539.2, 320.1, 247.6],
        () => [525.0, 525.0, 319.5, 239.5],
    }
}

/// `rgb.txt`: lines `time file`; `groundtruth.txt`: lines `time tx ty tz qx qy qz qw` of `map_from_camera`.
fn tum(
    scene: &SceneRef,
    root: &Path,
    interval: usize,
    counts: &mut Counts,
) -> Result<Vec<Frame>, CurateError> {
    let lines = |name: &str| -> Result<Vec<Vec<String>>, CurateError> {
        let text = text(&scene.dir.join(name))?;
        let given = text.lines().filter(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#'));
        Ok(given.map(|l| l.split_whitespace().map(str::to_owned).collect()).collect())
    };
    let mut poses = BTreeMap::new();
    for line in lines("groundtruth.txt")? {
        let v: Vec<f64> = line.iter().map(|t| t.parse().unwrap_or(f64::NAN)).collect();
        let [at, x, y, z, qx, qy, qz, qw] = v[..] else {
            return Err(bad(&scene.dir.join("groundtruth.txt"), "wanted lines of eight numbers"));
        };
        let turn = nalgebra::Quaternion::new(qw, qx, qy, qz);
        if !v.iter().all(|n| n.is_finite()) || (turn.norm() - 1.0).abs() > 0.02 {
            counts.bad_pose += 1;
            continue;
        }
        let pose = Isometry3::from_parts(Translation3::new(x, y, z), UnitQuaternion::from_quaternion(turn));
        poses.insert((at * 1e6).round() as i64, pose);
    }
    if poses.is_empty() {
        return Err(bad(&scene.dir.join("groundtruth.txt"), "no usable pose"));
    }
    let mut frames = Vec::new();
    for (index, line) in lines("rgb.txt")?.iter().step_by(interval).enumerate() {
        counts.frames += 1;
        let (at, file) = match &line[..] {
            [at, file] => (at.parse::<f64>().unwrap_or(f64::NAN), scene.dir.join(file)),
            _ => return Err(bad(&scene.dir.join("rgb.txt"), "wanted lines of a time and a file")),
        };
        if !at.is_finite() || !file.is_file() {
            counts.missing_image += 1;
            continue;
        }
        let Some(pose) = pose_at(&poses, at) else {
            counts.missing_pose += 1;
            continue;
        };
        let intrinsics = tum_intrinsics(&scene.id);
        frames.push(Frame { file: relative(&file, root), index, map_from_camera: rows(&pose), intrinsics });
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn seven_scenes_sequences() {
        let dir = tempfile::tempdir().unwrap();
        let pose = "1 0 0 0.5\n0 0 -1 1.5\n0 1 0 2.5\n0 0 0 1\n";
        let seq = |name: &str| format!("office/seq-01/{name}");
        let files = [
            (seq("frame-000000.color.png"), ""),
            (seq("frame-000000.pose.txt"), pose),
            (seq("frame-000001.color.png"), ""),
            (seq("frame-000002.color.png"), ""),
            (seq("frame-000002.pose.txt"), &pose.replace('1', "nan")),
            (seq("frame-000000.depth.png"), ""),
        ];
        let files: Vec<(&str, &str)> = files.iter().map(|(n, t)| (n.as_str(), *t)).collect();
        written(dir.path(), &files);
        let found = scenes(SourceLayout::SevenScenes, dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].id.as_str(), found[0].environment.as_str()), ("office-seq-01", "office"));
        let mut counts = Counts::default();
        let got = read(SourceLayout::SevenScenes, &found[0], dir.path(), 1, &mut counts).unwrap();
        assert_eq!((counts.frames, counts.missing_pose, counts.bad_pose), (3, 1, 1));
        assert_eq!(got.frames.len(), 1);
        let frame = &got.frames[0];
        assert_eq!(frame.file, Path::new("office/seq-01/frame-000000.color.png"));
        assert_eq!(frame.intrinsics, [525.0, 525.0, 319.5, 239.5]);
        let wanted = [1., 0., 0., 0.5, 0., 0., -1., 1.5, 0., 1., 0., 2.5];
        assert!(frame.map_from_camera.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-9));
        // The sequence by itself.
        let alone = scenes(SourceLayout::SevenScenes, &dir.path().join("office/seq-01")).unwrap();
        assert_eq!(alone[0].id, "seq-01");
        assert!(matches!(
            scenes(SourceLayout::Tum, dir.path()),
            Err(CurateError::NoScenes { layout: SourceLayout::Tum, .. })
        ));
    }

    #[test]
    fn tum_sequences() {
        let dir = tempfile::tempdir().unwrap();
        // A quarter turn about z between the poses; the second picture is halfway, the third has no pose.
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let truth = format!("# time x y z\n1.0 0 0 0 0 0 0 1\n1.2 2 0 0 0 0 {half} {half}\n");
        written(
            dir.path(),
            &[
                ("rgbd_dataset_freiburg1_desk/groundtruth.txt", &truth),
                (
                    "rgbd_dataset_freiburg1_desk/rgb.txt",
                    "# x\n1.0 rgb/a.png\n1.1 rgb/b.png\n9.0 rgb/a.png\n1.1 rgb/c.png\n",
                ),
                ("rgbd_dataset_freiburg1_desk/rgb/a.png", ""),
                ("rgbd_dataset_freiburg1_desk/rgb/b.png", ""),
            ],
        );
        let found = scenes(SourceLayout::Tum, dir.path()).unwrap();
        let mut counts = Counts::default();
        let got = read(SourceLayout::Tum, &found[0], dir.path(), 1, &mut counts).unwrap();
        assert_eq!((counts.frames, counts.missing_pose, counts.missing_image), (4, 1, 1));
        assert_eq!(got.frames[1].intrinsics[0], 517.3);
        let m = got.frames[1].map_from_camera;
        assert!((m[0] - half).abs() < 1e-9 && (m[3] - 1.0).abs() < 1e-9, "{m:?}");
    }
}
