//! `mindseye-tools eval localise`: photographs placed by landmarks of other photographs of the place.
//!
//! Some frames of a recording are kept with their poses, as a robot keeps them; others are placed from their pixels
//! alone, and their true poses are compared afterwards. With `--hallucinations` the queries are also put in as what a video
//! model might invent of them, and so are pictures of another place (`--elsewhere`): the share that is accepted should be
//! 1 for true pictures and 0 for all others. Settings are those that a robot runs with. Times are those that one
//! thread ran, decoding of files left out.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use mindseye_base::stats::busy_ms;
use mindseye_landmarks::{
    Camera, Extractor, ExtractorConfig, Features, Gray, LandmarkMap, LiftConfig, MapConfig, PosedPicture,
    RegisterConfig, Registration, Unregistered,
};
use nalgebra::Isometry3;
use serde::Serialize;

use super::stats::{Figure, quantile_of, share};
use crate::curate::dataset::{Dataset, DatasetError, Fit, Picture, Recording};

/// Arguments of `eval localise`.
#[derive(clap::Args, Debug)]
pub struct LocaliseArgs {
    /// Directory of the dataset.
    pub dataset: PathBuf,
    /// Recording of the dataset; may be left out where there is only one.
    #[arg(long)]
    pub recording: Option<String>,
    /// Frames whose poses are known, A:B:STEP: from index A, before index B, every STEP-th.
    #[arg(long)]
    pub context: Span,
    /// Frames that are placed; none may be in the context.
    #[arg(long)]
    pub query: Span,
    /// Width that pictures are reduced to (pixels); as they are stored when left out.
    #[arg(long, value_parser = clap::value_parser!(u32).range(32..=8192))]
    pub width: Option<u32>,
    /// Focal length of the stored pictures (pixels) in place of the dataset's.
    #[arg(long)]
    pub focal: Option<f64>,
    /// Also tell true queries from spoilt ones: mirrored, warped, with something painted in.
    #[arg(long)]
    pub hallucinations: bool,
    /// Dataset of another place, whose pictures must not be accepted.
    #[arg(long, requires = "hallucinations")]
    pub elsewhere: Option<PathBuf>,
    /// Print the report as one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// Indices `first`, `first + step`, ... below `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    first: usize,
    end: usize,
    step: usize,
}

/// A span that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?}: wanted A:B:STEP with A below B and STEP at least 1, for example 0:700:10")]
pub struct SpanError(String);

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let parts: Result<Vec<usize>, _> = text.split(':').map(str::parse).collect();
        match parts.as_deref() {
            Ok([first, end, step]) if first < end && *step > 0 => {
                Ok(Self { first: *first, end: *end, step: *step })
            }
            _ => Err(SpanError(text.to_owned())),
        }
    }
}

impl Span {
    /// Whether an index is one of it.
    #[must_use]
    pub fn contains(&self, index: usize) -> bool {
        (self.first..self.end).contains(&index) && (index - self.first).is_multiple_of(self.step)
    }
}

/// Median and nine-tenths quantile.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Half of the cases are at most this.
    pub median: Option<f64>,
    /// Nine tenths are.
    pub p90: Option<f64>,
}

impl Spread {
    /// Of some values; nothing without any.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        let at = |share: f64| Some(quantile_of(&mut values.to_vec(), share)).filter(|v| v.is_finite());
        Self { median: at(0.5), p90: at(0.9) }
    }
}

/// A query that was not placed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lost {
    /// Its index.
    pub frame: usize,
    /// Why.
    pub reason: String,
}

/// What `eval localise` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Frames to be placed.
    pub queries: usize,
    /// Of them, not placed.
    pub lost: usize,
    /// Errors of the others' places (metres).
    pub position_m: Spread,
    /// Errors of their directions (degrees).
    pub rotation_deg: Spread,
    /// Share of all queries placed within 10 cm and 5 degrees.
    pub within_10cm_5deg: f64,
    /// Share of the placed ones inside the 90 % ellipsoid of their place.
    pub within_90: Figure,
    /// What covariances should be multiplied by so that it were nine tenths: what the context's poses are off with each other
    /// is in it.
    pub variance_factor: Option<f64>,
    /// Landmarks in the map.
    pub landmarks: usize,
    /// Median time of placing a picture, features given (milliseconds of a core).
    pub ms_per_query: Option<f64>,
    /// The longest time of a query, placed or not.
    pub ms_longest_query: Option<f64>,
    /// Median time of finding a picture's features (milliseconds of a core).
    pub ms_per_features: Option<f64>,
    /// Median number of features.
    pub features: Option<f64>,
    /// Frames in the context.
    pub context: usize,
    /// Size that pictures were reduced to (pixels).
    pub size: Option<(u32, u32)>,
    /// Median of what the focal length should be multiplied by, where pictures say.
    pub focal_factor: Option<f64>,
    /// Queries that were not placed.
    pub lost_frames: Vec<Lost>,
    /// Pictures that could not be used: unreadable, without pose or without intrinsics.
    pub unusable: usize,
    /// Share of pictures that are accepted (placed, and no region without its landmarks), by what was done to them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub accepted: Vec<Accepted>,
}

/// How often pictures of one kind are accepted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accepted {
    /// What was done to them.
    pub kind: &'static str,
    /// Share accepted, with its 95 % interval.
    pub share: Figure,
}

/// A picture's features and camera, and where the camera really was.
pub(super) struct Query {
    pub(super) index: usize,
    pub(super) camera: Camera,
    pub(super) gray: Gray,
    pub(super) features: Features,
    pub(super) map_from_camera: Isometry3<f64>,
}

/// Runs `eval localise`.
///
/// # Errors
/// A dataset or recording that cannot be read, spans that overlap or are empty, a camera that cannot be used.
pub fn run(args: &LocaliseArgs) -> anyhow::Result<ExitCode> {
    let dataset = Dataset::open(&args.dataset)?;
    let recording = chosen(&dataset, args.recording.as_deref())?;
    let report = evaluate(&dataset, recording, args)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(ExitCode::SUCCESS)
}

/// The recording of this name, or the only one.
pub(crate) fn chosen<'a>(dataset: &'a Dataset, name: Option<&str>) -> anyhow::Result<&'a Recording> {
    let all: Vec<&Recording> = dataset.recordings().collect();
    let names = || all.iter().map(|r| r.id.as_str()).collect::<Vec<_>>().join(", ");
    match (name, &all[..]) {
        (Some(name), _) => all
            .iter()
            .find(|r| r.id == name)
            .copied()
            .ok_or_else(|| anyhow::anyhow!("no recording {name:?}; there are: {}", names())),
        (None, [one]) => Ok(one),
        (None, []) => anyhow::bail!("the dataset has no recording that can be used"),
        (None, _) => anyhow::bail!("several recordings ({}); name one with --recording", names()),
    }
}

/// The camera of a picture that is reduced to a width, and the reduced size; none without intrinsics.
pub(super) fn camera_of(
    picture: &Picture,
    intrinsics: Option<[f64; 4]>,
    width: Option<u32>,
    focal: Option<f64>,
) -> anyhow::Result<Option<Camera>> {
    let Some(mut k) = intrinsics else { return Ok(None) };
    if let Some(focal) = focal {
        (k[0], k[1]) = (focal, focal);
    }
    let width = width.map_or(picture.width, |w| w as usize);
    let height = (picture.height as f64 * width as f64 / picture.width as f64).round().max(1.0) as usize;
    let [fx, fy, cx, cy] = Fit::new((picture.width, picture.height), (width, height)).intrinsics(k);
    Ok(Some(Camera::pinhole(width as u32, height as u32, fx, fy, cx, cy)?))
}

fn evaluate(dataset: &Dataset, recording: &Recording, args: &LocaliseArgs) -> anyhow::Result<Report> {
    let indices = |span: Span| recording.frames.iter().filter(move |f| span.contains(f.index)).count();
    let (context, queries) = (indices(args.context), indices(args.query));
    if context == 0 || queries == 0 {
        let last = recording.frames.last().map_or(0, |f| f.index);
        anyhow::bail!("{context} frames of context, {queries} queries; indices go to {last}");
    }
    let both =
        |f: &&crate::curate::dataset::Frame| args.context.contains(f.index) && args.query.contains(f.index);
    if let Some(frame) = recording.frames.iter().find(both) {
        anyhow::bail!("frame {} is context and query: its pose would be known", frame.index);
    }
    let mut extractor = Extractor::new(ExtractorConfig::default());
    let mut map: Option<LandmarkMap> = None;
    let (mut asked, mut extraction, mut counts, mut unusable) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut failure = None;
    let wanted = |at: usize| {
        let index = recording.frames[at].index;
        args.context.contains(index) || args.query.contains(index)
    };
    dataset.pictures_at(recording, &wanted, &mut |at, picture| {
        let frame = &recording.frames[at];
        let Ok(picture) = picture else {
            unusable += 1;
            return Ok(());
        };
        let camera = match camera_of(&picture, frame.intrinsics, args.width, args.focal) {
            Ok(camera) => camera,
            Err(e) => {
                failure.get_or_insert(e);
                return Ok(());
            }
        };
        let (Some(camera), Some(map_from_camera)) = (camera, frame.map_from_camera) else {
            unusable += 1;
            return Ok(());
        };
        let (w, h) = camera.size();
        let (w, h) = (w as usize, h as usize);
        let gray = Gray::from_rgb8(w, h, &picture.fitted(w, h)?.data);
        let started = busy_ms();
        let features = extractor.extract(&gray);
        extraction.push(busy_ms() - started);
        counts.push(features.len() as f64);
        if args.context.contains(frame.index) {
            map.get_or_insert_with(|| LandmarkMap::new(MapConfig::for_width(camera.size().0))).insert(
                &features,
                &camera,
                &map_from_camera,
            );
        } else {
            asked.push(Query { index: frame.index, camera, gray, features, map_from_camera });
        }
        Ok::<(), DatasetError>(())
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    let Some(mut map) = map else {
        anyhow::bail!("no frame of the context has a picture, a pose and intrinsics")
    };
    let mut report = placed(&mut map, &asked);
    if args.hallucinations {
        report.accepted = accepted(&mut map, &mut extractor, &asked, args.elsewhere.as_deref())?;
    }
    report.context = context;
    report.unusable = unusable;
    report.ms_per_features = Spread::of(&extraction).median;
    report.features = Spread::of(&counts).median;
    Ok(report)
}

/// Nine tenths of a chi-square with three degrees of freedom.
const CHI2_3_90: f64 = 6.251;

/// Places the queries and compares.
fn placed(map: &mut LandmarkMap, asked: &[Query]) -> Report {
    let config = RegisterConfig::for_width(asked.first().map_or(0, |q| q.camera.size().0));
    let mut times = Vec::new();
    let mut found: HashMap<usize, Result<Registration, Unregistered>> = HashMap::new();
    for query in asked {
        let started = busy_ms();
        let got = map.register(&query.features, &query.camera, None, &config);
        times.push(busy_ms() - started);
        found.insert(query.index, got);
    }
    let (mut positions, mut rotations, mut factors, mut lost) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut within, mut distances) = (0, Vec::new());
    for query in asked {
        match &found[&query.index] {
            Ok(got) => {
                let off = got.map_from_camera.inverse() * query.map_from_camera;
                let (position, rotation) = (off.translation.vector.norm(), off.rotation.angle().to_degrees());
                within += usize::from(position <= 0.1 && rotation <= 5.0);
                positions.push(position);
                rotations.push(rotation);
                factors.extend(got.focal_factor);
                let (v, c) = (off.translation.vector, got.covariance.fixed_view::<3, 3>(0, 0).into_owned());
                distances.extend(c.try_inverse().map(|s| (v.transpose() * s * v)[0]));
            }
            Err(e) => lost.push(Lost { frame: query.index, reason: e.to_string() }),
        }
    }
    Report {
        queries: asked.len(),
        lost: lost.len(),
        position_m: Spread::of(&positions),
        rotation_deg: Spread::of(&rotations),
        within_10cm_5deg: within as f64 / asked.len().max(1) as f64,
        within_90: share(distances.iter().map(|d2| *d2 < CHI2_3_90)),
        variance_factor: Spread::of(&distances).p90.map(|d2| d2 / CHI2_3_90),
        landmarks: map.len(),
        ms_per_query: Spread::of(&times).median,
        ms_longest_query: times.into_iter().max_by(f64::total_cmp),
        ms_per_features: None,
        features: None,
        context: 0,
        size: asked.first().map(|q| q.camera.size()),
        focal_factor: Spread::of(&factors).median,
        lost_frames: lost,
        unusable: 0,
        accepted: Vec::new(),
    }
}

/// A spoilt picture; the second argument is another query's.
type Spoil = fn(&Gray, &Gray) -> Gray;

/// What is done to the queries.
const SPOILT: [(&str, Spoil); 4] =
    [("true", |g, _| g.clone()), ("mirrored", mirrored), ("warped", warped), ("painted", painted)];

fn redrawn(picture: &Gray, from: impl Fn(usize, usize) -> (f64, f64)) -> Gray {
    let (w, h) = picture.size();
    let value = |k: usize| {
        let (x, y) = from(k % w, k / w);
        let at = |v: f64, n: usize| (v.round().max(0.0) as usize).min(n - 1);
        picture.value(at(x, w), at(y, h))
    };
    Gray::new(w, h, (0..w * h).map(value).collect())
}

fn mirrored(picture: &Gray, _: &Gray) -> Gray {
    let w = picture.size().0;
    redrawn(picture, |x, y| ((w - 1 - x) as f64, y as f64))
}

/// Waves of 4 % of the width: straight edges bend, places stay recognisable.
fn warped(picture: &Gray, _: &Gray) -> Gray {
    let w = picture.size().0 as f64;
    let wave = |v: f64| 0.04 * w * (std::f64::consts::TAU * v / (0.4 * w)).sin();
    redrawn(picture, |x, y| (x as f64 + wave(y as f64), y as f64 + wave(x as f64)))
}

/// A third of the width and nearly half of the height, in the middle, from another picture, mirrored.
fn painted(picture: &Gray, other: &Gray) -> Gray {
    let (w, h) = picture.size();
    let other = mirrored(other, other);
    let inside = |x: usize, y: usize| (w / 3..2 * w / 3).contains(&x) && (3 * h / 10..3 * h / 4).contains(&y);
    let value = |k: usize| {
        let (x, y) = (k % w, k / w);
        if inside(x, y) { other.value(x, y) } else { picture.value(x, y) }
    };
    Gray::new(w, h, (0..w * h).map(value).collect())
}

/// How often true, spoilt and foreign pictures are accepted.
fn accepted(
    map: &mut LandmarkMap,
    extractor: &mut Extractor,
    asked: &[Query],
    elsewhere: Option<&Path>,
) -> anyhow::Result<Vec<Accepted>> {
    let Some(first) = asked.first() else { return Ok(Vec::new()) };
    let camera = first.camera;
    let config = RegisterConfig::for_width(camera.size().0);
    let hole_sigmas = LiftConfig::default().hole_sigmas;
    let mut believed = |picture: &Gray, camera: &Camera| {
        let picture = &extractor.scan(picture);
        map.register(&picture.features, camera, None, &config).is_ok_and(|placed| {
            let map_from_camera = &placed.map_from_camera;
            let region = map.least_likely_region(&PosedPicture { picture, camera, map_from_camera });
            region.is_none_or(|r| r.sigmas() <= hole_sigmas)
        })
    };
    let mut out = Vec::new();
    for (kind, spoil) in SPOILT {
        let other = |k: usize| &asked[(k + asked.len() / 2) % asked.len()].gray;
        let hits = asked.iter().enumerate().map(|(k, q)| believed(&spoil(&q.gray, other(k)), &q.camera));
        out.push(Accepted { kind, share: share(hits.collect::<Vec<_>>()) });
    }
    if let Some(path) = elsewhere {
        let dataset = Dataset::open(path)?;
        let (w, h) = (camera.size().0 as usize, camera.size().1 as usize);
        let mut hits = Vec::new();
        for recording in dataset.recordings() {
            dataset.pictures(recording, &mut |_, picture| {
                if let Ok(picture) = picture {
                    let gray = Gray::from_rgb8(w, h, &picture.fitted(w, h)?.data);
                    hits.push(believed(&gray, &camera));
                }
                Ok(())
            })?;
        }
        out.push(Accepted { kind: "elsewhere", share: share(hits) });
    }
    Ok(out)
}

fn text(r: &Report) -> String {
    let number = |v: Option<f64>, digits: usize| v.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    let mut out = format!(
        "{} queries, {} lost; position median {} m, p90 {} m; rotation median {}°, p90 {}°; within 10 cm and 5°: {:.2}\n\
         {} landmarks of {} frames, {} features each; {} ms for a picture's features, {} ms to place it, {} at most\n",
        r.queries,
        r.lost,
        number(r.position_m.median, 3),
        number(r.position_m.p90, 3),
        number(r.rotation_deg.median, 2),
        number(r.rotation_deg.p90, 2),
        r.within_10cm_5deg,
        r.landmarks,
        r.context,
        number(r.features, 0),
        number(r.ms_per_features, 1),
        number(r.ms_per_query, 1),
        number(r.ms_longest_query, 1),
    );
    out += &format!(
        "inside the 90 % ellipsoid: {}; variances are to be multiplied by {}\n",
        r.within_90.text(2),
        number(r.variance_factor, 1)
    );
    if let Some(factor) = r.focal_factor.filter(|f| (f - 1.0).abs() > 0.03) {
        out += &format!("the focal length should be multiplied by {factor:.3} to fit these pictures\n");
    }
    for kind in &r.accepted {
        out += &format!("accepted, {}: {} of {}\n", kind.kind, kind.share.text(3), kind.share.n);
    }
    for lost in &r.lost_frames {
        out += &format!("lost {}: {}\n", lost.frame, lost.reason);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        let span: Span = "5:12:3".parse().unwrap();
        let got: Vec<usize> = (0..20).filter(|k| span.contains(*k)).collect();
        assert_eq!(got, [5, 8, 11]);
        for wrong in ["", "5", "5:12", "12:5:1", "5:12:0", "a:b:c", "1:2:3:4"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn intrinsics_follow_the_width() {
        let picture = Picture { width: 640, height: 480, rgb: Vec::new() };
        let camera = camera_of(&picture, Some([525.0, 525.0, 319.5, 239.5]), Some(320), None);
        let camera = camera.unwrap().unwrap();
        assert_eq!(camera.size(), (320, 240));
        assert_eq!(camera.focal(), (262.5, 262.5));
        let other = camera_of(&picture, Some([525.0, 525.0, 319.5, 239.5]), None, Some(600.0));
        assert_eq!(other.unwrap().unwrap().focal(), (600.0, 600.0));
        assert!(camera_of(&picture, None, None, None).unwrap().is_none());
    }

    #[test]
    fn quantiles_of_nothing_are_nothing() {
        assert_eq!(Spread::of(&[]), Spread { median: None, p90: None });
        assert_eq!(Spread::of(&[3.0]), Spread { median: Some(3.0), p90: Some(3.0) });
    }
}
